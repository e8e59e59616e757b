//! What can be changed of a volume that exists: a VolumeAttributesClass' parameters → options of its drive. Pure.
//!
//! `diskIOPS`, `diskMBps` and `backup` are the reference driver's; the others say the same of one direction, or of bursts. Proxmox
//! changes throttles and `backup` on a plugged drive; `cache` counts from the next attach on.

use std::collections::{BTreeMap, HashMap};

/// qemu-server `PVE/QemuServer/Drive.pm`, `cache`.
const CACHES: &[&str] = &["none", "writethrough", "writeback", "unsafe", "directsync"];
/// QEMU's throttles take up to 10^15; more than this is no limit any more.
const MAX_THROTTLE: u64 = 1_000_000_000;
/// A burst of more than a day is none.
const MAX_BURST_S: u64 = 86_400;

/// Key → options that it sets. Those of both directions come first: what is said of one direction goes before.
const LIMITS: &[(&str, &[&str])] = &[
    ("diskIOPS", &["iops_rd", "iops_wr"]),
    ("diskMBps", &["mbps_rd", "mbps_wr"]),
    ("diskIOPSBurst", &["iops_rd_max", "iops_wr_max"]),
    ("diskMBpsBurst", &["mbps_rd_max", "mbps_wr_max"]),
    // PVs of the reference driver up to 0.15 carry these.
    ("iops_rd", &["iops_rd"]),
    ("iops_wr", &["iops_wr"]),
    ("mbps_rd", &["mbps_rd"]),
    ("mbps_wr", &["mbps_wr"]),
    ("diskIOPSRead", &["iops_rd"]),
    ("diskIOPSWrite", &["iops_wr"]),
    ("diskMBpsRead", &["mbps_rd"]),
    ("diskMBpsWrite", &["mbps_wr"]),
    ("diskIOPSReadBurst", &["iops_rd_max"]),
    ("diskIOPSWriteBurst", &["iops_wr_max"]),
    ("diskMBpsReadBurst", &["mbps_rd_max"]),
    ("diskMBpsWriteBurst", &["mbps_wr_max"]),
    (BURST_SECONDS, &["iops_rd_max_length", "iops_wr_max_length", "bps_rd_max_length", "bps_wr_max_length"]),
];
const BURST_SECONDS: &str = "diskBurstSeconds";
/// Only in PVs that exist.
const LEGACY: &[&str] = &["iops_rd", "iops_wr", "mbps_rd", "mbps_wr"];
/// Limit, burst, length of the burst; and the limit of both directions together, as the reference driver wrote it up to 0.10.
const CHAINS: [(&str, &str, &str, &str); 4] = [
    ("iops_rd", "iops_rd_max", "iops_rd_max_length", "iops"),
    ("iops_wr", "iops_wr_max", "iops_wr_max_length", "iops"),
    ("mbps_rd", "mbps_rd_max", "bps_rd_max_length", "mbps"),
    ("mbps_wr", "mbps_wr_max", "bps_wr_max_length", "mbps"),
];
/// What external-resizer and external-provisioner add with --extra-modify-metadata and --extra-create-metadata.
const PASSED_OVER: &[&str] = &["csi.storage.k8s.io/pv/name", "csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace"];
/// The reference driver takes it, to no effect.
const NOT_BUILT: &str = "replicateSchedule";

/// Parameters that were checked; only what was given changes anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mutable {
    backup: Option<bool>,
    cache: Option<String>,
    /// By our key; 0 takes the limit away.
    limits: BTreeMap<&'static str, u64>,
}

/// A drive's options.
pub type Options = BTreeMap<String, String>;

impl Mutable {
    /// As a VolumeAttributesClass gives them.
    ///
    /// # Errors
    /// A sentence with the key, and what would be right.
    pub fn of_class(given: &HashMap<String, String>) -> Result<Self, String> {
        let mut mutable = Self::default();
        let mut keys: Vec<&String> = given.keys().filter(|key| !PASSED_OVER.contains(&key.as_str())).collect();
        keys.sort();
        for key in keys {
            let value = given.get(key).map(String::as_str).unwrap_or_default();
            mutable.take(key, value)?;
        }
        Ok(mutable)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "backup" => self.backup = Some(boolean(value)?),
            "cache" if CACHES.contains(&value) => self.cache = Some(value.into()),
            "cache" => return Err(format!("mutable parameter cache {value:?} is none of Proxmox's: {}", CACHES.join(", "))),
            NOT_BUILT => return Err(format!("mutable parameter {NOT_BUILT} is not supported by this version (no replication); remove it")),
            _ => {
                let known = LIMITS.iter().find(|(known, _)| *known == key && !LEGACY.contains(known));
                let Some((known, _)) = known else { return Err(unknown(key)) };
                let most = if *known == BURST_SECONDS { MAX_BURST_S } else { MAX_THROTTLE };
                let number = number(value).filter(|n| *n <= most);
                let number =
                    number.ok_or_else(|| format!("mutable parameter {key} {value:?} should be a number from 0 (no limit) to {most}"))?;
                self.limits.insert(known, number);
            }
        }
        Ok(())
    }

    /// Of a class that an existing PV names: what cannot be read is passed over, and said.
    #[must_use]
    pub fn of_existing_class(given: &HashMap<String, String>) -> (Self, Vec<String>) {
        let (mut mutable, mut warnings) = (Self::default(), Vec::new());
        for (key, value) in given.iter().filter(|(key, _)| !PASSED_OVER.contains(&key.as_str())) {
            warnings.extend(mutable.take(key, value).err());
        }
        warnings.sort();
        (mutable, warnings)
    }

    /// What a VolumeContext says beside the class' own `backup`, `cache`, `diskIOPS` and `diskMBps`.
    #[must_use]
    pub fn of_context(given: &HashMap<String, String>) -> Self {
        let own = ["diskIOPS", "diskMBps"];
        let limits = LIMITS.iter().filter(|(key, _)| !own.contains(key));
        let limits = limits.filter_map(|(key, _)| Some((*key, number(given.get(*key)?).filter(|n| *n <= MAX_THROTTLE)?)));
        Self { limits: limits.collect(), ..Self::default() }
    }

    /// As a VolumeContext keeps them, for a controller without Kubernetes.
    pub fn write_context(&self, context: &mut HashMap<String, String>) {
        context.extend(self.backup.map(|on| ("backup".to_string(), String::from(if on { "1" } else { "0" }))));
        context.extend(self.cache.clone().map(|cache| ("cache".to_string(), cache)));
        context.extend(self.limits.iter().map(|(key, n)| ((*key).to_string(), n.to_string())));
    }

    /// Changes a drive's options.
    pub fn apply(&self, options: &mut Options) {
        if let Some(on) = self.backup {
            options.insert("backup".into(), String::from(if on { "1" } else { "0" }));
        }
        if let Some(cache) = &self.cache {
            options.insert("cache".into(), cache.clone());
        }
        let given = LIMITS.iter().filter_map(|(key, of)| Some((self.limits.get(key)?, *of)));
        let given: Vec<(&u64, &[&str])> = given.collect();
        if given.is_empty() {
            return;
        }
        split_totals(options);
        for (number, of) in given {
            for option in of {
                if *number == 0 {
                    options.remove(*option);
                } else {
                    options.insert((*option).into(), number.to_string());
                }
            }
        }
        for (limit, burst, length, _) in CHAINS {
            // Without a limit there is no burst above it, and without a burst no length of it.
            if !options.contains_key(limit) {
                options.remove(burst);
            }
            if !options.contains_key(burst) {
                options.remove(length);
            }
        }
    }
}

/// A limit of both directions together excludes those of one: it becomes both, as the reference driver means it.
fn split_totals(options: &mut Options) {
    for (limit, burst, length, total) in CHAINS {
        let bytes = if total == "mbps" { "bps" } else { total };
        for (from, to) in [(total.to_owned(), limit), (format!("{total}_max"), burst), (format!("{bytes}_max_length"), length)] {
            if let Some(value) = options.get(&from).cloned() {
                options.entry(to.into()).or_insert(value);
            }
        }
    }
    for key in ["iops", "mbps", "iops_max", "mbps_max", "iops_max_length", "bps_max_length"] {
        options.remove(key);
    }
}

/// Bursts that are no bursts, which QEMU refuses: option and sentence.
fn wrong_bursts(options: &Options) -> Vec<(&'static str, String)> {
    let number = |key: &str| options.get(key).and_then(|text| text.parse::<f64>().ok());
    let wrong = CHAINS.iter().filter_map(|(limit, burst, _, _)| {
        let (at_most, at_once) = (number(limit)?, number(burst)?);
        (at_once < at_most).then(|| (*burst, format!("burst {burst}={at_once} is below its limit {limit}={at_most}")))
    });
    wrong.collect()
}

/// Whether QEMU takes these.
///
/// # Errors
/// A sentence with the numbers.
pub fn check(options: &Options) -> Result<(), String> {
    wrong_bursts(options).into_iter().next().map_or(Ok(()), |(_, why)| Err(why))
}

/// Leaves out what QEMU would refuse: a volume that exists is attached, and the limit is what counts.
pub fn mend(options: &mut Options) {
    for (burst, _) in wrong_bursts(options) {
        options.remove(burst);
    }
    for (_, burst, length, _) in CHAINS {
        if !options.contains_key(burst) {
            options.remove(length);
        }
    }
}

fn unknown(key: &str) -> String {
    let known = LIMITS.iter().map(|(known, _)| *known).filter(|known| !LEGACY.contains(known));
    let known: Vec<&str> = ["backup", "cache"].into_iter().chain(known).collect();
    format!("mutable parameter {key:?} is not known; known are {}", known.join(", "))
}

fn number(value: &str) -> Option<u64> {
    value.parse().ok().filter(|_| value.bytes().all(|b| b.is_ascii_digit()))
}

fn boolean(value: &str) -> Result<bool, String> {
    match value {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("mutable parameter backup {value:?} should be \"true\" or \"false\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pve::drive::Drive;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())).collect()
    }

    fn applied(line: &str, pairs: &[(&str, &str)]) -> String {
        let mut drive: Drive = line.parse().unwrap();
        Mutable::of_class(&map(pairs)).unwrap().apply(&mut drive.options);
        drive.to_string()
    }

    #[test]
    fn only_what_is_given_changes() {
        for (line, pairs, after) in [
            ("a:b,backup=0", &[("diskIOPS", "500")][..], "a:b,backup=0,iops_rd=500,iops_wr=500"),
            ("a:b,backup=0,iops_rd=500,iops_wr=500", &[("diskIOPSRead", "100")], "a:b,backup=0,iops_rd=100,iops_wr=500"),
            ("a:b,iops_rd=5", &[("backup", "true"), ("cache", "writeback")], "a:b,backup=1,cache=writeback,iops_rd=5"),
            ("a:b", &[("diskMBps", "10"), ("diskMBpsWrite", "7")], "a:b,mbps_rd=10,mbps_wr=7"),
            (
                "a:b",
                &[("diskIOPS", "10"), ("diskIOPSReadBurst", "90"), ("diskBurstSeconds", "5")],
                "a:b,iops_rd=10,iops_rd_max=90,iops_rd_max_length=5,iops_wr=10",
            ),
            ("a:b,iops_rd=10,iops_rd_max=90,iops_rd_max_length=5,iops_wr=10", &[("diskIOPS", "0")], "a:b"),
            // Of the reference driver up to 0.10.
            ("a:b,iops=100,mbps=5", &[("diskIOPSRead", "50")], "a:b,iops_rd=50,iops_wr=100,mbps_rd=5,mbps_wr=5"),
            ("a:b,iops=100", &[("backup", "0")], "a:b,backup=0,iops=100"),
        ] {
            assert_eq!(applied(line, pairs), after, "{line} {pairs:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_what_is_known() {
        for (pairs, words) in [
            (&[("diskIops", "1")][..], &["\"diskIops\"", "known are backup, cache, diskIOPS"][..]),
            (&[("diskIOPS", "-1")], &["diskIOPS", "number"]),
            (&[("diskIOPS", "1,ro=1")], &["diskIOPS"]),
            (&[("iops_rd", "1")], &["\"iops_rd\" is not known"]),
            (&[("cache", "fast")], &["cache", "writeback"]),
            (&[("backup", "maybe")], &["backup", "true"]),
            (&[("replicateSchedule", "*/5")], &["replication"]),
        ] {
            let why = Mutable::of_class(&map(pairs)).unwrap_err();
            assert!(words.iter().all(|word| why.contains(word)), "{why}");
            let (rest, warnings) = Mutable::of_existing_class(&map(pairs));
            assert_eq!((rest, warnings), (Mutable::default(), vec![why]), "of a PV that exists: passed over, and said");
        }
        assert_eq!(Mutable::of_class(&map(&[("csi.storage.k8s.io/pvc/name", "x")])), Ok(Mutable::default()));
    }

    #[test]
    fn a_burst_below_its_limit_is_refused_or_left_out() {
        let mut options: Options = [("iops_rd", "100"), ("iops_rd_max", "50"), ("iops_rd_max_length", "5")]
            .iter()
            .map(|(key, value)| ((*key).to_string(), (*value).to_string()))
            .collect();
        assert!(check(&options).unwrap_err().contains("iops_rd_max=50"));
        mend(&mut options);
        assert_eq!(options.keys().collect::<Vec<_>>(), ["iops_rd"]);
        assert_eq!(check(&options), Ok(()));
    }

    #[test]
    fn a_context_gives_back_what_was_written() {
        let given = Mutable::of_class(&map(&[("diskIOPSRead", "5"), ("diskMBpsBurst", "7")])).unwrap();
        let mut context = HashMap::new();
        given.write_context(&mut context);
        assert_eq!(Mutable::of_context(&context), given);
        let old = Mutable::of_context(&map(&[("iops_rd", "9"), ("mbps_wr", "junk"), ("diskIOPS", "3")]));
        let mut options = Options::new();
        old.apply(&mut options);
        assert_eq!(options, Options::from([("iops_rd".to_string(), "9".to_string())]));
    }
}
