//! A VM's three views → the next step of attaching or detaching a volume. Pure.
//!
//! Configured, planned and plugged all count (docs/architecture.md, decision 4). Called again after every step, so that
//! a crash is only a pause. A failed attach is reverted, a failed detach is finished; a drive is never re-added to heal.

use std::collections::{BTreeMap, BTreeSet};

use crate::pve::drive::{Drive, VmConfig, is_disk_slot, volume_of};

/// One VM as it is seen now.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// Configured and planned.
    pub config: &'a VmConfig,
    /// A QEMU process is there.
    pub running: bool,
    /// What QEMU really has; nothing: QEMU does not say.
    pub plugged: Option<&'a BTreeSet<String>>,
}

/// What to do next towards an attached volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachStep {
    /// It is there, in all three views.
    Attached(u8, Box<Drive>),
    /// Plug it here.
    AttachAt(u8),
    /// QEMU has it here, and it is only planned: written again, nothing is plugged and the config says so. Reverted, it would stay
    /// in QEMU until the VM restarts.
    Finish(u8),
    /// Finish a removal that was begun, or remove a drive that QEMU never took.
    Detach(String),
    /// Forget a plan that was never carried out.
    Revert(String),
}

/// What to do next towards a detached volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetachStep {
    /// Neither configured nor planned.
    Gone,
    /// Remove it.
    Detach(String),
    /// Forget the plan.
    Revert(String),
    /// QEMU has it, and it is only planned: with this line written again it can be removed.
    Finish(String, String),
}

/// Why nothing is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// A template never runs.
    Template,
    /// Not now.
    NotRunning,
    /// QEMU does not answer, so what is plugged is not known.
    QemuSilent,
    /// `hotplug` lacks `disk`; its value.
    NoHotplug(String),
    /// The controller is no virtio one; its name.
    ScsiHw(String),
    /// The drive is there with another write protection; the slot.
    ReadonlyDiffers(String),
    /// `protection: 1`: a disk could be attached, and never be detached again.
    Protected,
    /// Another change of that slot is planned.
    OtherPlan(String),
    /// On a bus or slot that is not ours.
    OtherBus(String),
    /// No slot from 1 to 29 is free.
    Full,
}

/// What is asked for, and what is not to be used for it.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The volume.
    pub volid: &'a str,
    /// Write-protected.
    pub readonly: bool,
    /// Slots that are leaked, or taken by others meanwhile.
    pub avoid: &'a BTreeSet<u8>,
    /// Also where the VM's `protection: 1` would keep the disk there.
    pub allow_protected: bool,
}

/// The next step of attaching a volume.
///
/// # Errors
/// The VM cannot take it, or has it otherwise.
pub fn next_attach(wanted: Wanted<'_>, seen: Seen<'_>) -> Result<AttachStep, Refusal> {
    let (config, volid) = (seen.config, wanted.volid);
    if config.is_on("template") {
        return Err(Refusal::Template);
    }
    if !seen.running {
        return Err(Refusal::NotRunning);
    }
    let plugged = seen.plugged.ok_or(Refusal::QemuSilent)?;
    can_hotplug(config)?;
    let scsihw = config.configured("scsihw").unwrap_or("lsi");
    if !matches!(scsihw, "virtio-scsi-pci" | "virtio-scsi-single") {
        return Err(Refusal::ScsiHw(scsihw.into()));
    }
    if let Some((key, line)) = config.naming(volid).find(|(key, _)| !key.starts_with("unused")) {
        let Some(configured) = line.value.as_deref().filter(|text| volume_of(text) == volid) else {
            let has_it = line.value.is_none() && plugged.contains(key);
            let lun = lun_of(key).filter(|lun| has_it && proto::LUN_RANGE.contains(lun));
            return Ok(lun.map_or_else(|| AttachStep::Revert(key.into()), AttachStep::Finish));
        };
        if line.delete {
            return Ok(AttachStep::Detach(key.into()));
        }
        if line.pending.as_deref().is_some_and(|text| volume_of(text) != volid) {
            return Err(Refusal::OtherPlan(key.into()));
        }
        if !plugged.contains(key) {
            return Ok(AttachStep::Detach(key.into()));
        }
        let (Some(lun), Ok(drive)) = (lun_of(key), configured.parse::<Drive>()) else { return Err(Refusal::OtherBus(key.into())) };
        if drive.is_readonly() != wanted.readonly {
            return Err(Refusal::ReadonlyDiffers(key.into()));
        }
        return Ok(AttachStep::Attached(lun, Box::new(drive)));
    }
    if config.is_on("protection") && !wanted.allow_protected {
        return Err(Refusal::Protected);
    }
    let is_free = |lun: &u8| {
        let key = slot(*lun);
        !config.lines.contains_key(&key) && !plugged.contains(&key) && !wanted.avoid.contains(lun)
    };
    proto::LUN_RANGE.clone().find(is_free).map(AttachStep::AttachAt).ok_or(Refusal::Full)
}

/// The next step of detaching `volid`.
///
/// # Errors
/// The VM runs and does not hot-plug disks: Proxmox would only plan the removal.
pub fn next_detach(volid: &str, seen: Seen<'_>) -> Result<DetachStep, Refusal> {
    let Some((key, line)) = seen.config.naming(volid).find(|(key, _)| !key.starts_with("unused")) else { return Ok(DetachStep::Gone) };
    if line.value.as_deref().is_none_or(|text| volume_of(text) != volid) {
        let plan = line.pending.clone().filter(|_| line.value.is_none() && seen.plugged.is_some_and(|plugged| plugged.contains(key)));
        let Some(plan) = plan else { return Ok(DetachStep::Revert(key.into())) };
        can_hotplug(seen.config)?;
        return Ok(DetachStep::Finish(key.into(), plan));
    }
    if seen.running {
        can_hotplug(seen.config)?;
    }
    Ok(DetachStep::Detach(key.into()))
}

/// qemu-server: absent or `1` means `network,disk,usb`; `0` none.
///
/// # Errors
/// Its value.
pub fn can_hotplug(config: &VmConfig) -> Result<(), Refusal> {
    let hotplug = config.configured("hotplug").unwrap_or("1");
    if hotplug == "1" || hotplug.split([',', ';', ' ']).any(|word| word == "disk") {
        return Ok(());
    }
    Err(Refusal::NoHotplug(hotplug.into()))
}

/// `scsiN`.
#[must_use]
pub fn slot(lun: u8) -> String {
    format!("scsi{lun}")
}

/// N of `scsiN`.
#[must_use]
pub fn lun_of(key: &str) -> Option<u8> {
    key.strip_prefix("scsi")?.parse().ok().filter(|lun| *lun <= 30)
}

/// The slots that QEMU has and the config does not explain: it cannot be said what is in them.
pub fn unexplained<'a>(seen: Seen<'a>) -> impl Iterator<Item = &'a str> {
    let known = move |key: &str| seen.config.lines.get(key).is_some_and(|line| line.value.is_some() || line.pending.is_some());
    seen.plugged.into_iter().flatten().map(String::as_str).filter(move |key| is_disk_slot(key) && !known(key))
}

/// What a slot holds, where the config says so.
#[must_use]
pub fn explained(seen: Seen<'_>) -> BTreeMap<String, String> {
    let plugged = seen.plugged.into_iter().flatten();
    plugged.filter_map(|key| Some((key.clone(), volume_of(seen.config.configured(key)?).to_string()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pve::drive::Line;

    const VOLID: &str = "ds:vm-9999-a";

    fn config(lines: &[(&str, Line)]) -> VmConfig {
        let mut all = VmConfig { digest: "d".into(), ..VmConfig::default() };
        all.lines.insert("scsihw".into(), value("virtio-scsi-pci"));
        all.lines.extend(lines.iter().map(|(key, line)| ((*key).to_string(), line.clone())));
        all
    }

    fn value(text: &str) -> Line {
        Line { value: Some(text.into()), ..Line::default() }
    }

    fn plugged(keys: &[&str]) -> BTreeSet<String> {
        keys.iter().map(|key| (*key).to_string()).collect()
    }

    fn wanted(avoid: &BTreeSet<u8>) -> Wanted<'_> {
        Wanted { volid: VOLID, readonly: false, avoid, allow_protected: false }
    }

    fn attach(lines: &[(&str, Line)], keys: &[&str]) -> Result<AttachStep, Refusal> {
        let (config, plugged) = (config(lines), plugged(keys));
        next_attach(wanted(&BTreeSet::new()), Seen { config: &config, running: true, plugged: Some(&plugged) })
    }

    #[test]
    fn the_lowest_slot_free_in_all_views_is_taken() {
        assert_eq!(attach(&[], &[]), Ok(AttachStep::AttachAt(1)));
        let deleting = Line { delete: true, ..value("ds:b") };
        let planned = Line { pending: Some("ds:c".into()), ..Line::default() };
        assert_eq!(attach(&[("scsi1", deleting), ("scsi2", planned)], &["scsi3", "scsi0"]), Ok(AttachStep::AttachAt(4)));
        let all: Vec<(String, Line)> = (1..=29).map(|n| (slot(n), value("ds:x"))).collect();
        let all: Vec<(&str, Line)> = all.iter().map(|(key, line)| (key.as_str(), line.clone())).collect();
        assert_eq!(attach(&all, &[]), Err(Refusal::Full));
        let (config, none) = (config(&[]), BTreeSet::new());
        let seen = Seen { config: &config, running: true, plugged: Some(&none) };
        assert_eq!(next_attach(wanted(&BTreeSet::from([1, 2])), seen), Ok(AttachStep::AttachAt(3)));
    }

    #[test]
    fn attached_needs_config_and_qemu() {
        let drive = value("ds:vm-9999-a,size=1G,wwn=0x5056432d49443035");
        assert!(matches!(attach(&[("scsi5", drive.clone())], &["scsi5"]), Ok(AttachStep::Attached(5, _))));
        assert_eq!(attach(&[("scsi5", drive.clone())], &[]), Ok(AttachStep::Detach("scsi5".into())), "a phantom is removed");
        assert_eq!(
            attach(&[("scsi5", Line { delete: true, ..drive.clone() })], &["scsi5"]),
            Ok(AttachStep::Detach("scsi5".into())),
            "a removal that was begun is finished, not undone"
        );
        let planned = Line { pending: drive.value.clone(), ..Line::default() };
        assert_eq!(attach(&[("scsi5", planned.clone())], &[]), Ok(AttachStep::Revert("scsi5".into())));
        assert_eq!(attach(&[("scsi5", planned)], &["scsi5"]), Ok(AttachStep::Finish(5)), "its worker died when QEMU had it");
        let other = Line { pending: Some("ds:b".into()), ..drive.clone() };
        assert_eq!(attach(&[("scsi5", other)], &["scsi5"]), Err(Refusal::OtherPlan("scsi5".into())));
        assert_eq!(attach(&[("virtio1", drive)], &["virtio1"]), Err(Refusal::OtherBus("virtio1".into())));
        assert_eq!(attach(&[("scsi5", value("ds:vm-9999-a,ro=1"))], &["scsi5"]), Err(Refusal::ReadonlyDiffers("scsi5".into())));
    }

    #[test]
    fn a_vm_that_cannot_take_a_disk_is_refused() {
        assert_eq!(attach(&[("hotplug", value("network,usb"))], &[]), Err(Refusal::NoHotplug("network,usb".into())));
        assert_eq!(attach(&[("hotplug", value("0"))], &[]), Err(Refusal::NoHotplug("0".into())));
        assert_eq!(attach(&[("hotplug", value("disk"))], &[]), Ok(AttachStep::AttachAt(1)));
        assert_eq!(attach(&[("scsihw", value("lsi"))], &[]), Err(Refusal::ScsiHw("lsi".into())));
        assert_eq!(attach(&[("template", value("1"))], &[]), Err(Refusal::Template));
        let protected = [("protection", value("1")), ("scsi5", value("ds:vm-9999-a"))];
        assert_eq!(attach(&protected[..1], &[]), Err(Refusal::Protected));
        assert!(matches!(attach(&protected, &["scsi5"]), Ok(AttachStep::Attached(5, _))), "what is there is there");
        let (none, protected) = (BTreeSet::new(), config(&protected[..1]));
        let overridden = Wanted { allow_protected: true, ..wanted(&none) };
        let seen = Seen { config: &protected, running: true, plugged: Some(&BTreeSet::new()) };
        assert_eq!(next_attach(overridden, seen), Ok(AttachStep::AttachAt(1)));
        let config = config(&[]);
        let seen = Seen { config: &config, running: true, plugged: None };
        assert_eq!(next_attach(wanted(&BTreeSet::new()), seen), Err(Refusal::QemuSilent));
        let seen = Seen { config: &config, running: false, plugged: None };
        assert_eq!(next_attach(wanted(&BTreeSet::new()), seen), Err(Refusal::NotRunning));
    }

    #[test]
    fn detach_removes_what_is_configured_and_reverts_what_is_planned() {
        let detach = |lines: &[(&str, Line)], keys: &[&str], running| {
            let (config, plugged) = (config(lines), plugged(keys));
            next_detach(VOLID, Seen { config: &config, running, plugged: Some(&plugged) })
        };
        assert_eq!(detach(&[("unused0", value("ds:vm-9999-a")), ("scsi1", value("ds:vm-9999-ab"))], &[], true), Ok(DetachStep::Gone));
        assert_eq!(detach(&[("scsi1", value("ds:vm-9999-a,ro=1"))], &["scsi1"], true), Ok(DetachStep::Detach("scsi1".into())));
        let again = Line { delete: true, ..value("ds:vm-9999-a") };
        assert_eq!(detach(&[("scsi1", again)], &[], true), Ok(DetachStep::Detach("scsi1".into())));
        let planned = Line { pending: Some("ds:vm-9999-a".into()), ..Line::default() };
        assert_eq!(detach(&[("scsi1", planned.clone())], &[], true), Ok(DetachStep::Revert("scsi1".into())));
        let finish = DetachStep::Finish("scsi1".into(), "ds:vm-9999-a".into());
        assert_eq!(detach(&[("scsi1", planned)], &["scsi1"], true), Ok(finish), "its worker died when QEMU had it");
        let cold = [("hotplug", value("0")), ("scsi1", value("ds:vm-9999-a"))];
        assert_eq!(detach(&cold, &["scsi1"], true), Err(Refusal::NoHotplug("0".into())));
        assert_eq!(detach(&cold, &[], false), Ok(DetachStep::Detach("scsi1".into())));
    }

    #[test]
    fn a_plugged_slot_without_a_line_is_unexplained() {
        let config = config(&[("scsi1", value("ds:a,ro=1"))]);
        let plugged = plugged(&["scsi1", "scsi2", "ide2", "pflash0"]);
        let seen = Seen { config: &config, running: true, plugged: Some(&plugged) };
        assert_eq!(unexplained(seen).collect::<Vec<_>>(), ["scsi2"]);
        assert_eq!(explained(seen), BTreeMap::from([("scsi1".to_string(), "ds:a".to_string())]));
    }

    /// Every combination of the views of one slot: a step towards the goal, and never a second slot for one volume.
    #[test]
    fn no_state_of_the_slot_makes_a_second_attachment() {
        let drive = "ds:vm-9999-a,size=1G";
        for value in [None, Some(drive), Some("ds:other")] {
            for pending in [None, Some(drive), Some("ds:other")] {
                for delete in [false, true] {
                    for keys in [&[][..], &["scsi7"]] {
                        let line = Line { value: value.map(Into::into), pending: pending.map(Into::into), delete };
                        let step = attach(&[("scsi7", line)], keys);
                        let names = value == Some(drive) || pending == Some(drive);
                        assert_eq!(
                            names,
                            !matches!(step, Ok(AttachStep::AttachAt(_))),
                            "{value:?} {pending:?} {delete} {keys:?}: {step:?}"
                        );
                    }
                }
            }
        }
    }
}
