//! The clusters file: the reference driver's format, read strictly.
//!
//! A key that is not known, known under another spelling, or given twice is refused with its line and what would be
//! right: the reference driver passes over such keys, and a `controllerVMID` without effect costs volumes.
//! Reading is split: [`parse`] is pure over the text; [`Reading`] reads the file and the files it names.

mod reach;

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde_yaml::{Mapping, Value};
use zeroize::Zeroizing;

use crate::secret::Secret;
pub use reach::{Fingerprint, MAX_URLS, Trust};

/// The owner in our disks' names where the file does not say: the reference driver's.
const DEFAULT_CONTROLLER_VMID: u32 = 9999;
/// Proxmox's own bounds of a VMID; the reference driver asks for more than 100.
const CONTROLLER_VMIDS: std::ops::RangeInclusive<u32> = 101..=999_999_999;
/// Whose volumes may be deleted, too: Proxmox's own bounds.
const VMIDS: std::ops::RangeInclusive<u32> = 100..=999_999_999;
/// A clusters file is a page; this bounds what a wrong mount makes us read.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Each may hold threads of ours when it hangs: how many there are in all rests on this.
pub const MAX_CLUSTERS: usize = 32;

/// Everything the file says.
#[derive(Debug, Clone)]
pub struct Config {
    /// What `features` says.
    pub features: Features,
    /// At least one; regions differ.
    pub clusters: Vec<ClusterConfig>,
}

/// The file's `features`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Features {
    /// The VMID that our disks carry as their owner; no such VM needs to exist.
    pub controller_vmid: u32,
    /// Attach to VMs with `protection: 1` though their disks cannot be detached until that is taken off.
    pub attach_to_protected: bool,
    /// Attach only volumes whose names carry our owner VMID, or one of those that we delete for.
    pub attach_only_owned: bool,
    /// More owner VMIDs whose volumes are ours to delete: an earlier `controllerVmID`, say.
    pub delete_also_owned_by: BTreeSet<u32>,
    /// Nodes are found by what their Node objects say, as Cluster API's provider (capmox) writes it.
    pub capmox: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            controller_vmid: DEFAULT_CONTROLLER_VMID,
            attach_to_protected: false,
            attach_only_owned: false,
            delete_also_owned_by: BTreeSet::new(),
            capmox: false,
        }
    }
}

/// One Proxmox cluster.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Its name in volume handles and topology.
    pub region: String,
    /// At least one, each `http(s)://host:port/api2/json` without a slash at the end, and all of the same cluster.
    pub urls: Vec<String>,
    /// What makes us believe that it is the one.
    pub trust: Trust,
    /// How we are known there.
    pub credentials: Credentials,
    /// Proxmox nodes of which the operator says that they are off: what their VMs hold counts as let go while the cluster
    /// calls them offline.
    pub fenced: BTreeSet<String>,
}

/// An API token, or a user whose ticket is renewed.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// `user@realm!name` and its UUID.
    Token {
        /// `user@realm!name`
        id: String,
        /// The UUID.
        secret: Secret,
    },
    /// `user@realm` and its password.
    Password {
        /// `user@realm`
        username: String,
        /// The password.
        password: Secret,
    },
}

/// A credential as the file has it: the text itself, or the file that holds it.
#[derive(Debug, Clone)]
enum Source {
    Inline(Secret),
    File(PathBuf),
}

#[derive(Debug)]
struct ClusterText {
    region: String,
    urls: Vec<String>,
    trust: Trust,
    credentials: CredentialSources,
    fenced: BTreeSet<String>,
}

#[derive(Debug)]
enum CredentialSources {
    Token { id: Source, secret: Source },
    Password { username: String, password: Secret },
}

/// A sentence that says what is wrong with the file, and what would be right.
pub type Refusal = String;

const TOP_KEYS: &[&str] = &["features", "clusters"];
const FEATURE_KEYS: &[&str] = &["provider", "controllerVmID", "attachToProtectedVMs", "attachOnlyOwned", "deleteAlsoOwnedBy"];
const CLUSTER_KEYS: &[&str] = &[
    "url",
    "urls",
    "insecure",
    "caFile",
    "fingerprint",
    "token_id",
    "token_id_file",
    "token_secret",
    "token_secret_file",
    "username",
    "password",
    "region",
    "fencedNodes",
];

/// Reads `path` and the files that it names. Also gives every file that was read.
///
/// # Errors
/// A sentence naming the file, the line where there is one, and what would be right.
pub fn load(path: &Path) -> Result<(Config, Vec<PathBuf>), Refusal> {
    let reading = Reading::of(path);
    reading.config.map(|config| (config, reading.files.into_iter().map(|(file, _)| file).collect()))
}

/// Enough to notice a change, also by a swapped symlink (a Kubernetes secret): device, inode, seconds and nanoseconds of the
/// last change, bytes. Nothing: it is not there.
pub type Stamp = Option<(u64, u64, i64, i64, u64)>;

/// A file as it is now.
#[must_use]
pub fn stamp_of(path: &Path) -> Stamp {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec(), metadata.len()))
}

/// What reading the file gave, and every file that was looked at, as it was before: a change of any is a reason to read again, also
/// where the reading failed.
#[derive(Debug)]
pub struct Reading {
    /// A sentence: what is wrong with the file, and what would be right.
    pub config: Result<Config, Refusal>,
    /// In the order of reading, `path` first.
    pub files: Vec<(PathBuf, Stamp)>,
}

impl Reading {
    /// Reads `path` and the files that it names.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        let mut reading = Self { config: Err(Refusal::new()), files: Vec::new() };
        reading.config = reading.read_all(path).map_err(|why| format!("config file {}: {why}", path.display()));
        reading
    }

    fn read_all(&mut self, path: &Path) -> Result<Config, Refusal> {
        let text = self.bytes(path).and_then(text_of)?;
        let (features, texts) = parse(&text)?;
        let mut clusters = Vec::new();
        for cluster in texts {
            let region = cluster.region.clone();
            let one = self.cluster(cluster).map_err(|why| format!("region {region:?}: {why}"))?;
            clusters.push(one);
        }
        Ok(Config { features, clusters })
    }

    fn cluster(&mut self, cluster: ClusterText) -> Result<ClusterConfig, Refusal> {
        let credentials = match cluster.credentials {
            CredentialSources::Token { id, secret } => {
                let id = self.secret("token_id_file", id)?.reveal().to_string();
                check_token_id(&id)?;
                Credentials::Token { id, secret: self.secret("token_secret_file", secret)? }
            }
            CredentialSources::Password { username, password } => Credentials::Password { username, password },
        };
        let trust = match cluster.trust {
            Trust::Ca { file, .. } => {
                let pem = self.bytes(&file).map_err(|why| format!("caFile {} {why}", file.display()))?;
                if crate::pve::http::certificates(&pem).is_empty() {
                    return Err(format!("caFile {} has no certificate (PEM) in it", file.display()));
                }
                Trust::Ca { file, pem: pem.to_vec() }
            }
            trust => trust,
        };
        Ok(ClusterConfig { region: cluster.region, urls: cluster.urls, trust, credentials, fenced: cluster.fenced })
    }

    fn secret(&mut self, key: &str, source: Source) -> Result<Secret, Refusal> {
        let file = match source {
            Source::Inline(secret) => return Ok(secret),
            Source::File(file) => file,
        };
        // What is no path may be the secret itself, pasted under the wrong key: it is not shown.
        let shown = if file.is_absolute() { file.display().to_string() } else { "(no absolute path)".into() };
        let secret = self.bytes(&file).and_then(text_of).map_err(|why| format!("{key} {shown} {why}"))?;
        let secret = secret.trim();
        if secret.is_empty() || secret.contains(char::is_whitespace) {
            return Err(format!("{key} {shown} should hold one word"));
        }
        Ok(Secret::new(secret.into()))
    }

    /// Stamped first: what changes meanwhile is read again.
    fn bytes(&mut self, path: &Path) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let stamp = stamp_of(path);
        self.files.push((path.into(), stamp));
        let bytes = stamp.map_or(0, |(_, _, _, _, bytes)| bytes);
        if bytes > MAX_FILE_BYTES {
            return Err(format!("has {bytes} bytes; more than {MAX_FILE_BYTES} is no such file"));
        }
        let mut read = Zeroizing::new(Vec::new());
        let file = std::fs::File::open(path).map_err(|cause| format!("cannot be read: {cause}"))?;
        file.take(MAX_FILE_BYTES).read_to_end(&mut read).map_err(|cause| format!("cannot be read: {cause}"))?;
        Ok(read)
    }
}

fn text_of(bytes: Zeroizing<Vec<u8>>) -> Result<Zeroizing<String>, Refusal> {
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_string())),
        Err(_) => Err("is no text (UTF-8)".into()),
    }
}

fn parse(text: &str) -> Result<(Features, Vec<ClusterText>), Refusal> {
    let value: Value = serde_yaml::from_str(text).map_err(|cause| format!("is no YAML: {cause}"))?;
    let top = match &value {
        Value::Mapping(top) => top,
        Value::Null => return Err("is empty; it should have clusters: with at least one cluster".into()),
        _ => return Err("should be a mapping with the keys features and clusters".into()),
    };
    let lines = Lines { text };
    known_keys(top, TOP_KEYS, "the file", &lines, 0)?;
    let features = features(top.get("features"), &lines)?;
    let Some(Value::Sequence(list)) = top.get("clusters") else {
        return Err("has no clusters; write clusters: and under it a list with url, region and token_id, token_secret of each".into());
    };
    match list.len() {
        0 => return Err("has an empty list of clusters; at least one is needed".into()),
        1..=MAX_CLUSTERS => (),
        more => return Err(format!("has {more} clusters; at most {MAX_CLUSTERS} are served by one controller")),
    }
    let mut clusters: Vec<ClusterText> = Vec::new();
    let mut regions = BTreeSet::new();
    for (index, value) in list.iter().enumerate() {
        let one = cluster(value, index, &lines)?;
        if !regions.insert(one.region.clone()) {
            return Err(format!(
                "{}has region {:?} twice; each cluster needs a region of its own",
                lines.of_value("region", &one.region, 1),
                one.region
            ));
        }
        clusters.push(one);
    }
    Ok((features, clusters))
}

/// For the fuzz target: what the text alone says (VMID; region and url of each cluster), without the files that it names.
///
/// # Errors
/// As [`load`].
#[cfg(fuzzing)]
pub fn fuzz(text: &str) -> Result<(u32, Vec<(String, String)>), Refusal> {
    let (features, clusters) = parse(text)?;
    Ok((features.controller_vmid, clusters.into_iter().map(|cluster| (cluster.region, cluster.urls.join(" "))).collect()))
}

fn features(value: Option<&Value>, lines: &Lines<'_>) -> Result<Features, Refusal> {
    let map = match value {
        None | Some(Value::Null) => return Ok(Features::default()),
        Some(Value::Mapping(map)) => map,
        Some(_) => return Err("features should be a mapping with controllerVmID".into()),
    };
    known_keys(map, FEATURE_KEYS, "features", lines, 0)?;
    let capmox = match map.get("provider").map(|provider| provider.as_str()) {
        None | Some(Some("default")) => false,
        Some(Some("capmox")) => true,
        _ => return Err(format!("{}features.provider should be default or capmox", lines.of_key("provider", 0))),
    };
    let controller_vmid = match map.get("controllerVmID") {
        None | Some(Value::Null) => DEFAULT_CONTROLLER_VMID,
        Some(given) => given
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .filter(|id| CONTROLLER_VMIDS.contains(id))
            .ok_or_else(|| format!("{}controllerVmID should be a number from 101 to 999999999", lines.of_key("controllerVmID", 0)))?,
    };
    let attach_to_protected = flag(map, "attachToProtectedVMs", "features", lines, 0)?;
    let attach_only_owned = flag(map, "attachOnlyOwned", "features", lines, 0)?;
    Ok(Features { controller_vmid, attach_to_protected, attach_only_owned, delete_also_owned_by: owners(map, lines)?, capmox })
}

/// VMIDs: a list, or nothing.
fn owners(map: &Mapping, lines: &Lines<'_>) -> Result<BTreeSet<u32>, Refusal> {
    let key = "deleteAlsoOwnedBy";
    let wrong = || format!("{}features: {key} should be a list of numbers from 100 to 999999999", lines.of_key(key, 0));
    match map.get(key) {
        None | Some(Value::Null) => Ok(BTreeSet::new()),
        Some(Value::Sequence(list)) => {
            let vmid = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| VMIDS.contains(id));
            list.iter().map(|value| vmid(value).ok_or_else(wrong)).collect()
        }
        Some(_) => Err(wrong()),
    }
}

fn flag(map: &Mapping, key: &str, place: &str, lines: &Lines<'_>, nth: usize) -> Result<bool, Refusal> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(_) => Err(format!("{}{place}: {key} should be true or false", lines.of_key(key, nth))),
    }
}

/// Names of Proxmox nodes: a list, or nothing.
fn fenced(map: &Mapping, place: &str, lines: &Lines<'_>, nth: usize) -> Result<BTreeSet<String>, Refusal> {
    let wrong = || format!("{}{place}: fencedNodes should be a list of names of Proxmox nodes", lines.of_key("fencedNodes", nth));
    match map.get("fencedNodes") {
        None | Some(Value::Null) => Ok(BTreeSet::new()),
        Some(Value::Sequence(list)) => {
            let name = |value: &Value| value.as_str().map(str::trim).filter(|name| !name.is_empty()).map(String::from);
            list.iter().map(|value| name(value).ok_or_else(wrong)).collect()
        }
        Some(_) => Err(wrong()),
    }
}

fn cluster(value: &Value, index: usize, lines: &Lines<'_>) -> Result<ClusterText, Refusal> {
    let place = format!("cluster {}", index + 1);
    let Value::Mapping(map) = value else {
        return Err(format!("{place} should be a mapping with url, region and token_id, token_secret"));
    };
    known_keys(map, CLUSTER_KEYS, &place, lines, index)?;
    let text = |key: &str| match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(Some(text.trim().to_string())),
        Some(Value::String(_)) => Ok(None),
        Some(_) => Err(format!("{}{place}: {key} should be text; put it in quotes", lines.of_key(key, index))),
    };
    let region = text("region")?.ok_or_else(|| format!("{place} has no region; it names the cluster in volume ids and topology labels"))?;
    if region.contains('/') || region.contains(char::is_whitespace) || region == "." || region == ".." {
        return Err(format!("{}{place}: region {region:?} should be one word without a slash", lines.of_key("region", index)));
    }
    let insecure = flag(map, "insecure", &place, lines, index)?;
    let fenced = fenced(map, &place, lines, index)?;
    let urls = reach::urls(map, &place, lines, index)?;
    let trust = reach::trust(map, insecure, &urls, &place, lines, index)?;
    let credentials = credentials(&place, &text)?;
    Ok(ClusterText { region, urls, trust, credentials, fenced })
}

/// One way of credentials, whole: a token (each half inline or in a file) or a user with a password.
fn credentials(place: &str, text: &dyn Fn(&str) -> Result<Option<String>, Refusal>) -> Result<CredentialSources, Refusal> {
    let half = |key: &str| -> Result<Option<Source>, Refusal> {
        let file_key = format!("{key}_file");
        match (text(key)?, text(&file_key)?) {
            (Some(_), Some(_)) => Err(format!("{place} has both {key} and {file_key}; write one of them")),
            (Some(inline), None) => Ok(Some(Source::Inline(Secret::new(inline)))),
            (None, Some(file)) => Ok(Some(Source::File(file.into()))),
            (None, None) => Ok(None),
        }
    };
    let (id, secret) = (half("token_id")?, half("token_secret")?);
    match (id, secret, text("username")?, text("password")?) {
        (Some(_), _, Some(_), _) | (Some(_), _, _, Some(_)) | (_, Some(_), Some(_), _) | (_, Some(_), _, Some(_)) => {
            Err(format!("{place} has a token and a username or password; write one of the two ways"))
        }
        (Some(id), Some(secret), None, None) => Ok(CredentialSources::Token { id, secret }),
        (Some(_), None, None, None) => Err(format!("{place} has a token_id but no token_secret or token_secret_file")),
        (None, Some(_), None, None) => Err(format!("{place} has a token_secret but no token_id or token_id_file")),
        (None, None, Some(username), Some(password)) => {
            if !username.contains('@') {
                return Err(format!("{place}: username {username:?} has no realm; write user@pam or user@pve"));
            }
            Ok(CredentialSources::Password { username, password: Secret::new(password) })
        }
        (None, None, Some(_), None) => Err(format!("{place} has a username but no password")),
        (None, None, None, Some(_)) => Err(format!("{place} has a password but no username")),
        (None, None, None, None) => {
            Err(format!("{place} has no credentials; write token_id and token_secret (or their _file forms), or username and password"))
        }
    }
}

/// Proxmox: `user@realm!name`. The secret pasted in its place must not be echoed, so the value is not shown.
fn check_token_id(id: &str) -> Result<(), Refusal> {
    let fits = id.split_once('!').is_some_and(|(user, name)| {
        user.split_once('@').is_some_and(|(user, realm)| !user.is_empty() && !realm.is_empty()) && name.len() >= 2
    });
    let plain = !id.contains(|c: char| c.is_control() || c.is_whitespace() || matches!(c, '=' | ';' | ','));
    if fits && plain { Ok(()) } else { Err("token_id should look like user@realm!tokenname".into()) }
}

fn known_keys(map: &Mapping, known: &[&str], place: &str, lines: &Lines<'_>, nth: usize) -> Result<(), Refusal> {
    for key in map.keys() {
        let Some(key) = key.as_str() else { return Err(format!("{place} has a key that is no text")) };
        if known.contains(&key) {
            continue;
        }
        // `{token_secret:abc}` is YAML for a key that is `token_secret:abc`: what is no plain word is not shown.
        if !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte)) {
            return Err(format!("{place} has a key with other than letters, digits and '_'; is a space missing after its colon?"));
        }
        let plain = |text: &str| text.to_ascii_lowercase().replace(['_', '-'], "");
        let line = lines.of_key(key, nth);
        let meant = known.iter().find(|known| plain(known) == plain(key));
        return Err(match meant {
            Some(meant) => format!("{line}{place} has the key {key:?}; write it {meant:?} (a misspelt key would have no effect)"),
            None => format!("{line}{place} has the unknown key {key:?}; known are {}", known.join(", ")),
        });
    }
    Ok(())
}

/// Where a key stands: serde_yaml's values carry no lines, so the text is searched; good enough for a sentence.
struct Lines<'a> {
    text: &'a str,
}

impl Lines<'_> {
    /// `line N: ` of the `nth` (from 0) time that `key:` begins a line, or nothing.
    fn of_key(&self, key: &str, nth: usize) -> String {
        let all: Vec<usize> = self.matching(|line| bare_key(line) == Some(key));
        all.get(nth).or(all.last()).map_or(String::new(), |line| format!("line {line}: "))
    }

    fn of_value(&self, key: &str, value: &str, nth: usize) -> String {
        let all = self.matching(|line| bare_key(line) == Some(key) && line.contains(value));
        all.get(nth).or(all.last()).map_or(String::new(), |line| format!("line {line}: "))
    }

    fn matching(&self, is: impl Fn(&str) -> bool) -> Vec<usize> {
        self.text.lines().enumerate().filter(|(_, line)| is(line)).map(|(index, _)| index + 1).collect()
    }
}

fn bare_key(line: &str) -> Option<&str> {
    let line = line.trim_start().trim_start_matches("- ").trim_start();
    Some(line.split_once(':')?.0.trim().trim_matches(['"', '\'']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "features:\n  provider: default\n  controllerVmID: 8000\nclusters:\n  - url: https://pve:8006/api2/json\n    \
                        insecure: true\n    token_id: csi@pve!csi\n    token_secret: 1234\n    region: r1\n";

    fn refusal(text: &str) -> String {
        parse(text).expect_err(text)
    }

    #[test]
    fn the_reference_drivers_file_is_read() {
        let text = GOOD.replace("1234", "\"1234\"");
        let (features, clusters) = parse(&text).unwrap();
        assert_eq!(features, Features { controller_vmid: 8000, attach_to_protected: false, ..Features::default() });
        assert_eq!(clusters[0].urls, ["https://pve:8006/api2/json"]);
        assert_eq!(clusters[0].trust, Trust::Blind);
        assert_eq!(clusters[0].region, "r1");
        let two = format!("{text}  - {{url: 'http://b/', region: r2, username: root@pam, password: p}}\n");
        let (_, clusters) = parse(&two).unwrap();
        assert_eq!(clusters[1].urls, ["http://b/api2/json"]);
        assert!(matches!(clusters[1].credentials, CredentialSources::Password { .. }));
    }

    #[test]
    fn what_the_reference_driver_does_not_have() {
        let text = GOOD.replace("1234", "\"1234\"").replace("8000", "8000\n  attachToProtectedVMs: true");
        let (features, clusters) = parse(&format!("{text}    fencedNodes: [pve2, pve3]\n")).unwrap();
        assert!(features.attach_to_protected);
        assert_eq!(clusters[0].fenced, BTreeSet::from(["pve2".to_string(), "pve3".into()]));
        assert!(refusal(&format!("{text}    fencedNodes: pve2\n")).contains("fencedNodes should be a list"));
        assert!(refusal(&format!("{text}    fencedNodes: [7]\n")).contains("line 11"));
        assert!(refusal(&text.replace("VMs: true", "VMs: 1")).contains("true or false"));
    }

    #[test]
    fn each_wrong_file_has_its_sentence() {
        let base = GOOD.replace("1234", "\"1234\"");
        let cases: &[(&str, &str, &[&str])] = &[
            ("controllerVmID", "controllerVMID", &["line 3", "controllerVMID", "write it \"controllerVmID\""]),
            ("controllerVmID: 8000", "controllerVmID: 100", &["line 3", "101"]),
            ("controllerVmID: 8000", "controllerVmID: abc", &["line 3", "number"]),
            ("    insecure: true", "    insecur: true", &["line 6", "unknown key \"insecur\"", "insecure"]),
            ("    insecure: true", "    insecure: maybe", &["line 6", "true or false"]),
            ("provider: default", "provider: proxmox", &["line 2", "capmox", "default"]),
            ("https://pve:8006/api2/json", "ftp://pve", &["line 5", "https://"]),
            ("https://pve:8006/api2/json", "https://root:1234@pve:8006", &["line 5", "no plain host"]),
            ("https://pve:8006/api2/json", "https://pve:8006/other", &["line 5", "api2/json"]),
            ("    region: r1", "    region: a/b", &["line 9", "slash"]),
            ("    region: r1\n", "", &["no region"]),
            ("    token_secret: \"1234\"\n", "", &["no token_secret"]),
            ("    token_secret: \"1234\"", "    token_secret: 1234", &["line 8", "quotes"]),
            ("    region: r1", "    region: r1\n    token_id_file: /x", &["both token_id and token_id_file"]),
            ("    region: r1", "    region: r1\n    username: a@pam\n    password: b", &["one of the two ways"]),
            ("    region: r1", "    region: r1\n    region: r2", &["duplicate"]),
            ("clusters:", "cluster:", &["unknown key \"cluster\"", "clusters"]),
        ];
        for (from, to, expected) in cases {
            assert!(base.contains(from), "{from}");
            let why = refusal(&base.replacen(from, to, 1));
            for word in *expected {
                assert!(why.contains(word), "{to:?} gives {why:?}, without {word:?}");
            }
            assert!(!why.contains("1234"), "a secret in {why:?}");
        }
        let twice = format!("{base}  - {{url: 'http://b', region: r1, username: a@pam, password: p}}\n");
        assert!(refusal(&twice).contains("region \"r1\" twice"));
        // Found by fuzzing: without its space, key and secret are one key.
        let why = refusal("clusters: [{url: 'http://b', region: r1, username: a@pam, password:hunter2}]");
        assert!(why.contains("space") && !why.contains("hunter2"), "{why}");
        for (text, word) in
            [("", "empty"), ("[]", "mapping"), ("clusters: []", "at least one"), ("a: [", "YAML"), ("features: {}", "clusters")]
        {
            assert!(refusal(text).contains(word), "{text:?}: {}", refusal(text));
        }
    }

    #[test]
    fn credential_files_are_read_and_trimmed() {
        let dir = std::env::temp_dir().join(format!("pve-csi-config-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (path, id, secret) = (dir.join("c.yaml"), dir.join("id"), dir.join("secret"));
        std::fs::write(&id, "csi@pve!csi\n").unwrap();
        std::fs::write(
            &path,
            format!("clusters: [{{url: 'http://a', region: r, token_id_file: {}, token_secret_file: {}}}]", id.display(), secret.display()),
        )
        .unwrap();
        let missing = load(&path).unwrap_err();
        assert!(missing.contains("token_secret_file") && missing.contains("cannot be read"), "{missing}");
        std::fs::write(&secret, " s3cret \n").unwrap();
        let (config, files) = load(&path).unwrap();
        assert_eq!(files.len(), 3);
        assert!(
            matches!(&config.clusters[0].credentials, Credentials::Token { id, secret } if id == "csi@pve!csi" && secret.reveal() == "s3cret")
        );
        std::fs::write(&id, "nonsense").unwrap();
        assert!(load(&path).unwrap_err().contains("user@realm!tokenname"));
        let _ = std::fs::remove_dir_all(&dir);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*", yaml in "[a-z:\\- \\n\\[\\]{}&*!0-9]{0,80}") {
            let _ = parse(&text);
            let _ = parse(&yaml);
        }
    }
}
