//! Requests to the node as they come off the wire: the first byte says which, the rest is protobuf.
#![no_main]

use libfuzzer_sys::fuzz_target;
use node::request::{
    ExpandRequest, Folders, Format, Passphrases, PublishRequest, Refusal, StageRequest, StatsRequest, UnpublishRequest, UnstageRequest,
    Volume,
};
use prost::Message as _;
use proto::csi;
use std::collections::HashMap;
use std::fmt::{Debug, Display};
use std::path::{Component, Path, PathBuf};
use std::sync::LazyLock;

const SECRET: &str = "a-secret-of-the-fuzz-target";
const KUBELET: &str = "/var/lib/kubelet";
static FOLDERS: LazyLock<Folders> = LazyLock::new(|| Folders::new(vec![PathBuf::from(KUBELET)]).expect("a folder"));

/// A sentence of bounded length, without the secret.
fn said<T: Debug>(judged: &Result<T, Refusal>) {
    let all = match judged {
        Ok(typed) => format!("{typed:?}"),
        Err(why) => {
            let text = why.to_string();
            assert!(text.len() < 4096, "{} bytes of refusal", text.len());
            format!("{text} {why:?}")
        }
    };
    assert!(!all.contains(SECRET), "the secret is shown");
}

/// What was taken names the volume and the paths that were given, and the paths lead nowhere else.
fn taken(volume: &Volume, id: &str, paths: &[(&Path, &str)]) {
    assert_eq!(volume.to_string(), id);
    for (path, given) in paths {
        assert_eq!(*path, Path::new(given));
        assert!(path.starts_with(KUBELET) && path.components().all(|part| !matches!(part, Component::ParentDir)), "{}", path.display());
    }
}

/// Taken out and wiped, whatever they are; of what is no passphrase the names stay. `None`: refused.
fn secrets(given: &mut HashMap<String, String>) -> Option<Option<Passphrases>> {
    let taken = Passphrases::take(given);
    assert!(given.values().all(String::is_empty), "secrets are left in the request");
    match taken {
        Ok(taken) => {
            assert!(taken.as_ref().is_none_or(|taken| !taken.current().is_empty() && taken.previous() != Some(taken.current())));
            Some(taken)
        }
        Err(why) => {
            said::<()>(&Err(why));
            None
        }
    }
}

fn display(value: &impl Display) -> usize {
    value.to_string().len()
}

fuzz_target!(init: fuzz::limit_memory(), |data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 6 {
        0 => {
            let Ok(mut given) = csi::NodeStageVolumeRequest::decode(data) else { return };
            if let Some(secret) = given.secrets.values_mut().next() {
                *secret = SECRET.into();
            }
            let Some(passphrases) = secrets(&mut given.secrets) else { return };
            let judged = StageRequest::new(&given, passphrases.as_ref(), &FOLDERS);
            said(&judged);
            if let Ok(stage) = judged {
                assert_eq!(stage.encryption.is_some(), passphrases.is_some(), "a volume is encrypted if there is a passphrase");
                if let (Format::May(_), Some(encryption)) = (&stage.format, &stage.encryption) {
                    assert!(encryption.kdf.check_new().is_ok(), "{encryption:?}");
                }
                taken(&stage.volume, &given.volume_id, &[(&stage.staging, &given.staging_target_path)]);
            }
        }
        1 => {
            let Ok(given) = csi::NodeUnstageVolumeRequest::decode(data) else { return };
            let judged = UnstageRequest::new(&given, &FOLDERS);
            said(&judged);
            if let Ok(unstage) = judged {
                taken(&unstage.volume, &given.volume_id, &[(&unstage.staging, &given.staging_target_path)]);
            }
        }
        2 => {
            let Ok(given) = csi::NodePublishVolumeRequest::decode(data) else { return };
            let judged = PublishRequest::new(&given, &FOLDERS);
            said(&judged);
            if let Ok(publish) = judged {
                taken(&publish.volume, &given.volume_id, &[(&publish.target, &given.target_path)]);
            }
        }
        3 => {
            let Ok(given) = csi::NodeUnpublishVolumeRequest::decode(data) else { return };
            let judged = UnpublishRequest::new(&given, &FOLDERS);
            said(&judged);
            if let Ok(unpublish) = judged {
                taken(&unpublish.volume, &given.volume_id, &[(&unpublish.target, &given.target_path)]);
            }
        }
        4 => {
            let Ok(given) = csi::NodeExpandVolumeRequest::decode(data) else { return };
            let judged = ExpandRequest::new(&given, &FOLDERS);
            said(&judged);
            if let Ok(expand) = judged {
                taken(&expand.volume, &given.volume_id, &[(&expand.path, &given.volume_path)]);
                let _ = display(&expand.volume);
            }
        }
        _ => {
            let Ok(given) = csi::NodeGetVolumeStatsRequest::decode(data) else { return };
            let judged = StatsRequest::new(&given, &FOLDERS);
            said(&judged);
            if let Ok(stats) = judged {
                taken(&stats.volume, &given.volume_id, &[(&stats.path, &given.volume_path)]);
            }
        }
    }
});
