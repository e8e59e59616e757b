//! What the agent counts beside its calls, and its `/metrics` page.

use std::sync::atomic::{AtomicUsize, Ordering};

use proto::metrics::{self, Counter};

use crate::error::Cause;
use crate::plan::Refusal;

/// A disk that is not the volume's: the reason to look at what Proxmox has plugged where.
pub static IDENTITY_MISMATCHES: Counter =
    Counter::new("proxmox_csi_node_identity_mismatches_total", "Calls refused because a disk is not the one that the volume should be on.");
/// Something on the disk that is not overwritten.
pub static REFUSED_FORMATS: Counter =
    Counter::new("proxmox_csi_node_refused_formats_total", "Calls refused because the disk is not blank, or may never be formatted.");
/// A volume in trouble, by its calls or by NodeGetVolumeStats.
pub static FILESYSTEM_ERRORS: Counter = Counter::new(
    "proxmox_csi_node_filesystem_errors_total",
    "Mounts and growths that the kernel refused, a wrong mount option among the reasons, and volumes that became abnormal (filesystem errors, \
     failed commands, a disk gone or offline).",
);
/// Volumes whose last NodeGetVolumeStats said that something is wrong with them.
pub static IN_TROUBLE: AtomicUsize = AtomicUsize::new(0);

/// Calls that wait for the kernel past their time.
pub static LATE: AtomicUsize = AtomicUsize::new(0);

/// Trims that do not come to an end.
pub static STUCK_TRIMS: AtomicUsize = AtomicUsize::new(0);
/// All that there have been of both.
pub static STUCK_EVER: Counter = Counter::new(
    "proxmox_csi_node_stuck_total",
    "Probes, formats and trims whose disk has not answered for so long that others went on without it.",
);

/// Counts what a failed call was about.
pub fn count(cause: &Cause) {
    match cause {
        Cause::Disk(_) | Cause::OtherDiskNow { .. } | Cause::Refused(Refusal::OtherMount { .. }) => IDENTITY_MISMATCHES.add(),
        Cause::NotBlankAnyMore { .. }
        | Cause::Refused(Refusal::HoldsOther { .. } | Refusal::NeverFormat { .. } | Refusal::NeverFinish { .. } | Refusal::ReadOnlyBlank) =>
        {
            REFUSED_FORMATS.add();
        }
        Cause::Mount(_) | Cause::Label { .. } | Cause::Damaged { .. } | Cause::NotGrown { .. } | Cause::MadeReadOnly(_) => {
            FILESYSTEM_ERRORS.add()
        }
        _ => (),
    }
}

/// The page. `stuck`: probes and formats whose disks do not answer; `rotations`: volumes whose passphrase is still to be replaced, if it is known.
#[must_use]
pub fn page(is_ready: bool, stuck: usize, rotations: Option<usize>) -> String {
    let mut page = String::new();
    metrics::fact(&mut page, "proxmox_csi_build_info", "The agent's version.", &[("version", env!("CARGO_PKG_VERSION"))]);
    metrics::gauge(
        &mut page,
        "proxmox_csi_node_ready",
        "1: it knows who it is, and kubelet has registered it (where that is its own task).",
        u8::from(is_ready),
    );
    for counter in [&IDENTITY_MISMATCHES, &REFUSED_FORMATS, &FILESYSTEM_ERRORS, &STUCK_EVER] {
        counter.write(&mut page);
    }
    for (name, help, number) in [
        ("proxmox_csi_node_volumes_in_trouble", "Volumes that NodeGetVolumeStats last called abnormal.", &IN_TROUBLE),
        ("proxmox_csi_node_stuck_trims", "Volumes that are trimmed at this moment, and do not come to an end.", &STUCK_TRIMS),
        ("proxmox_csi_node_late_calls", "Calls that were answered DEADLINE_EXCEEDED and still wait for the kernel.", &LATE),
    ] {
        metrics::gauge(&mut page, name, help, number.load(Ordering::Relaxed));
    }
    metrics::gauge(&mut page, "proxmox_csi_node_stuck_disks", "Disks that do not answer a probe or a format at this moment.", stuck);
    if let Some(rotations) = rotations {
        metrics::gauge(
            &mut page,
            "proxmox_csi_node_rotations_outstanding",
            "Encrypted volumes staged here whose passphrase could not be replaced yet (no free keyslot, too little memory, read-only, LUKS1); \
             absent while that is not known.",
            rotations,
        );
    }
    metrics::calls(&mut page);
    metrics::process(&mut page);
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity;

    #[test]
    fn a_cause_is_counted_by_what_it_is_about() {
        let before = [IDENTITY_MISMATCHES.value(), REFUSED_FORMATS.value()];
        count(&Cause::Disk(identity::Refusal::Ambiguous { what: String::new(), disks: String::new() }));
        count(&Cause::Refused(Refusal::HoldsOther { what: String::new() }));
        assert!(IDENTITY_MISMATCHES.value() > before[0] && REFUSED_FORMATS.value() > before[1]);
    }

    #[test]
    fn the_page_is_prometheus_text() {
        let page = super::page(true, 3, Some(2));
        for line in page.lines() {
            let sample = line.rsplit_once(' ').is_some_and(|(_, value)| value.parse::<f64>().is_ok());
            assert!(line.starts_with("# HELP ") || line.starts_with("# TYPE ") || sample, "{line}");
        }
        for name in [
            "proxmox_csi_node_ready 1\n",
            "proxmox_csi_node_stuck_disks 3\n",
            "proxmox_csi_node_refused_formats_total ",
            "proxmox_csi_node_identity_mismatches_total ",
            "proxmox_csi_node_filesystem_errors_total ",
            "proxmox_csi_node_volumes_in_trouble ",
            "proxmox_csi_node_rotations_outstanding 2\n",
            "process_resident_memory_bytes ",
        ] {
            assert!(page.contains(name), "{page}");
        }
    }

    #[test]
    fn a_number_that_is_not_known_is_no_zero() {
        assert!(!page(true, 0, None).contains("rotations_outstanding"));
    }
}
