use proptest::prelude::*;
use proto::csi::volume_capability::{AccessMode, BlockVolume};

use super::*;

const ID: &str = "fsn1/pve-1/lvm/vm-9999-pvc-1";
const STAGING: &str = "/var/lib/kubelet/plugins/kubernetes.io/csi/csi.proxmox.sinextra.dev/0a/globalmount";
const TARGET: &str = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/pvc-1/mount";

fn folders() -> Folders {
    Folders::new(vec!["/var/lib/kubelet".into()]).unwrap()
}

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_string(), (*value).to_string())).collect()
}

fn capability(fs_type: &str, mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume { fs_type: fs_type.into(), ..Default::default() })),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

fn legacy_context() -> HashMap<String, String> {
    map(&[("DevicePath", "/dev/disk/by-id/wwn-0x5056432d49443031"), ("lun", "1")])
}

fn stage() -> csi::NodeStageVolumeRequest {
    csi::NodeStageVolumeRequest {
        volume_id: ID.into(),
        publish_context: legacy_context(),
        staging_target_path: STAGING.into(),
        volume_capability: Some(capability("ext4", Mode::SingleNodeWriter)),
        secrets: HashMap::new(),
        volume_context: map(&[(volume_context::PROVISIONER_IDENTITY, "1-2-csi"), ("storage", "lvm"), ("someone", "else's")]),
    }
}

fn publish() -> csi::NodePublishVolumeRequest {
    csi::NodePublishVolumeRequest {
        volume_id: ID.into(),
        publish_context: legacy_context(),
        staging_target_path: STAGING.into(),
        target_path: TARGET.into(),
        volume_capability: Some(capability("", Mode::SingleNodeWriter)),
        ..Default::default()
    }
}

fn staged(change: impl Fn(&mut csi::NodeStageVolumeRequest)) -> Result<StageRequest, Refusal> {
    let mut request = stage();
    change(&mut request);
    let passphrases = Passphrases::take(&mut request.secrets)?;
    StageRequest::new(&request, passphrases.as_ref(), &folders())
}

#[test]
fn a_volume_of_the_reference_driver() {
    let request = staged(|_| ()).unwrap();
    assert_eq!(request.format, Format::May(FormatOptions::default()));
    assert_eq!((request.zeroed, request.grow_required), (Zeroed::Unknown, false));
    assert_eq!(request.disk.wwid.as_deref(), Some("naa.5056432d49443031"));
    assert_eq!((request.disk.lun, request.disk.serial_promised, request.disk.size_bytes), (Some(1), false, None));
    assert_eq!(request.disk.serial, ID.parse::<VolumeHandle>().unwrap().serial());
}

#[test]
fn a_volume_of_ours() {
    let serial = ID.parse::<VolumeHandle>().unwrap().serial();
    let request = staged(|request| {
        request.publish_context.extend(map(&[("serial", serial.as_str()), ("zeroed", "1"), ("sizeBytes", "1073741824")]));
        request.volume_context.extend(map(&[("contentSource", "none"), ("blockSize", "1024"), ("inodeSize", "512")]));
    })
    .unwrap();
    assert!(request.disk.serial_promised);
    assert_eq!((request.zeroed, request.disk.size_bytes), (Zeroed::Yes, Some(1 << 30)));
    assert_eq!(request.format, Format::May(FormatOptions { block_size: Some(1024), inode_size: Some(512), ..FormatOptions::default() }));
}

#[test]
fn each_missing_field_is_named_before_anything_else_is_judged() {
    let fields = |refused: Result<StageRequest, Refusal>| match refused.unwrap_err() {
        Refusal::Missing { field } => field,
        other => panic!("{other:?}"),
    };
    // As csi-sanity sends it: the ids are fake and the publish context is a mock's.
    let fake = |request: &mut csi::NodeStageVolumeRequest| {
        request.volume_id = "fake-vol-id".into();
        request.publish_context = map(&[("device", "/dev/mock")]);
    };
    assert_eq!(fields(staged(|request| request.volume_id.clear())), "volume_id");
    assert_eq!(
        fields(staged(|request| {
            fake(request);
            request.staging_target_path.clear()
        })),
        "staging_target_path"
    );
    assert_eq!(
        fields(staged(|request| {
            fake(request);
            request.volume_capability = None
        })),
        "volume_capability"
    );

    let missing = |change: &dyn Fn(&mut csi::NodePublishVolumeRequest)| {
        let mut request = publish();
        request.volume_id = "fake-vol-id".into();
        change(&mut request);
        PublishRequest::new(&request, &folders()).unwrap_err()
    };
    assert_eq!(missing(&|request| request.volume_id.clear()), Refusal::Missing { field: "volume_id" });
    assert_eq!(missing(&|request| request.target_path.clear()), Refusal::Missing { field: "target_path" });
    assert_eq!(missing(&|request| request.volume_capability = None), Refusal::Missing { field: "volume_capability" });
    assert!(matches!(missing(&|_| ()), Refusal::Handle(_)));

    let mut request = publish();
    request.staging_target_path.clear();
    assert_eq!(PublishRequest::new(&request, &folders()).unwrap_err(), Refusal::Missing { field: "staging_target_path" });
    let request = csi::NodeUnpublishVolumeRequest { volume_id: "fake".into(), target_path: String::new() };
    assert_eq!(UnpublishRequest::new(&request, &folders()).unwrap_err(), Refusal::Missing { field: "target_path" });
    let request = csi::NodeUnstageVolumeRequest { volume_id: "fake".into(), staging_target_path: String::new() };
    assert_eq!(UnstageRequest::new(&request, &folders()).unwrap_err(), Refusal::Missing { field: "staging_target_path" });
}

#[test]
fn stats_and_expand_do_not_find_what_cannot_be_there() {
    let stats = |id: &str, path: &str| {
        let request = csi::NodeGetVolumeStatsRequest { volume_id: id.into(), volume_path: path.into(), ..Default::default() };
        StatsRequest::new(&request, &folders())
    };
    assert!(matches!(stats("fake-vol-id", "some/path"), Err(Refusal::NoSuchVolume(_))));
    assert!(matches!(stats(ID, "some/path"), Err(Refusal::NotAPublishedPath { .. })));
    assert_eq!(stats("", "some/path").unwrap_err(), Refusal::Missing { field: "volume_id" });
    assert_eq!(stats("fake-vol-id", "").unwrap_err(), Refusal::Missing { field: "volume_path" });
    assert!(stats(ID, TARGET).is_ok());
    let expand = |id: &str, path: &str| {
        let request = csi::NodeExpandVolumeRequest { volume_id: id.into(), volume_path: path.into(), ..Default::default() };
        ExpandRequest::new(&request, &folders())
    };
    assert!(matches!(expand("fake-vol-id", "some/path"), Err(Refusal::NoSuchVolume(_))));
    assert_eq!(expand("fake-vol-id", "").unwrap_err(), Refusal::Missing { field: "volume_path" });
    assert_eq!(expand(ID, TARGET).unwrap().required_bytes, None);
}

#[test]
fn paths_outside_the_kubelet_folder_are_refused_with_the_folder_named() {
    for path in ["/etc", "/var/lib/kubelet", "/var/lib/kubelet/../../etc", "/var/lib/kubeletx/a", "a/b", "/", "/var/lib/kubelet/a\0b"] {
        let refused = staged(|request| request.staging_target_path = path.into()).unwrap_err();
        assert!(matches!(&refused, Refusal::Path { field: "staging_target_path", .. }), "{path}: {refused:?}");
    }
    let refused = staged(|request| request.staging_target_path = "/etc/x".into()).unwrap_err().to_string();
    assert_eq!(refused, "staging_target_path \"/etc/x\" is not inside the kubelet folder /var/lib/kubelet (--kubelet-dir)");
    for folders in [vec![], vec!["/".into()], vec!["a".into()], vec!["/a/..".into()]] {
        assert!(Folders::new(folders.clone()).is_err(), "{folders:?}");
    }
}

#[test]
fn xfs_is_made_and_ext2_and_ext3_are_only_mounted() {
    let of = |fstype: &str| staged(|request| request.volume_capability = Some(capability(fstype, Mode::SingleNodeWriter))).unwrap();
    let made = |fstype: &str| match of(fstype).format {
        Format::May(options) => Some(options.filesystem),
        Format::Never(why) => {
            assert!(why.contains(fstype), "{why}");
            None
        }
    };
    assert_eq!(["", "ext4", "xfs"].map(made), [Some(Filesystem::Ext4), Some(Filesystem::Ext4), Some(Filesystem::Xfs)]);
    assert_eq!(["ext2", "ext3"].map(made), [None, None]);
    assert_eq!(["", "ext3", "xfs"].map(|fstype| of(fstype).fstype), [None, Some("ext3"), Some("xfs")]);
}

#[test]
fn access_modes_and_filesystems_beyond_ours_are_refused() {
    for mode in [Mode::Unknown, Mode::MultiNodeReaderOnly, Mode::MultiNodeSingleWriter, Mode::MultiNodeMultiWriter] {
        let refused = staged(|request| request.volume_capability = Some(capability("ext4", mode))).unwrap_err();
        assert_eq!(refused, Refusal::AccessMode { given: mode.into() });
    }
    let refused = staged(|request| request.volume_capability = Some(capability("btrfs", Mode::SingleNodeWriter))).unwrap_err();
    assert_eq!(refused.to_string(), "fs_type \"btrfs\" is not supported: this node makes ext4 and xfs, and mounts ext2 and ext3 too");
    let refused = staged(|request| request.volume_capability.as_mut().unwrap().access_type = None).unwrap_err();
    assert_eq!(refused, Refusal::NoAccessType);
    assert!(staged(|request| request.volume_capability = Some(capability("", Mode::SingleNodeMultiWriter))).is_ok());
}

#[test]
fn the_publish_context_is_read_strictly_where_it_could_mean_another_disk() {
    let with = |pairs: &[(&str, &str)]| staged(|request| request.publish_context = map(pairs)).unwrap_err();
    assert_eq!(with(&[]), Refusal::NoDiskNamed);
    assert_eq!(with(&[("DevicePath", "/dev/sda")]), Refusal::NoDiskNamed);
    for lun in ["0", "30", "x", "-1", "257"] {
        assert!(matches!(with(&[("lun", lun)]), Refusal::Context { key: "lun", .. }), "{lun}");
    }
    assert!(matches!(with(&[("lun", "1"), ("serial", "csi-0000000000000000")]), Refusal::OtherSerial { .. }));
    assert!(matches!(with(&[("lun", "1"), ("zeroed", "yes")]), Refusal::Context { key: "zeroed", .. }));
    assert!(matches!(with(&[("lun", "1"), ("sizeBytes", "1G")]), Refusal::Context { key: "sizeBytes", .. }));
}

#[test]
fn what_may_never_be_formatted() {
    let format = |pairs: &[(&str, &str)]| staged(|request| request.volume_context = map(pairs)).unwrap().format;
    let dynamic = (volume_context::PROVISIONER_IDENTITY, "x");
    let never = |format: Format| matches!(format, Format::Never(_));
    assert!(never(format(&[("storage", "lvm")])));
    assert!(never(format(&[dynamic, ("contentSource", "snapshot")])));
    assert!(never(format(&[("contentSource", "volume")])));
    assert!(never(format(&[dynamic, ("resizeRequired", "1")])));
    assert!(never(format(&[dynamic, ("blockSize", "4k")])));
    assert!(!never(format(&[dynamic])));
    assert!(!never(format(&[("contentSource", "none")])));
    assert!(!never(format(&[dynamic, ("blockSize", "0"), ("inodeSize", "")])));
    let resized = staged(|request| _ = request.publish_context.insert("resizeRequired".into(), "true".into())).unwrap();
    assert!(resized.grow_required && never(resized.format));
}

/// What stage would make of a blank disk with this in the volume context.
fn made_with(pairs: &[(&str, &str)]) -> FormatOptions {
    match staged(|request| request.volume_context.extend(map(pairs))).unwrap().format {
        Format::May(options) => options,
        other => panic!("{other:?}"),
    }
}

#[test]
fn parameter_block_size() {
    assert_eq!(made_with(&[("blockSize", "2048")]), FormatOptions { block_size: Some(2048), ..made_with(&[]) });
    assert_eq!(made_with(&[]).block_size, None);
}

#[test]
fn parameter_inode_size() {
    assert_eq!(made_with(&[("inodeSize", "1024")]), FormatOptions { inode_size: Some(1024), ..made_with(&[]) });
    assert_eq!(made_with(&[]).inode_size, None);
}

#[test]
fn parameter_fstype_empty_means_ext4() {
    let of = |fs_type: &str| {
        let request = staged(|request| {
            request.volume_capability.as_mut().unwrap().access_type =
                Some(AccessType::Mount(MountVolume { fs_type: fs_type.into(), ..Default::default() }));
        });
        request.unwrap().format
    };
    assert_eq!(of(""), of("ext4"));
    assert_ne!(of(""), of("xfs"));
}

#[test]
fn ssd_adds_noatime_and_an_explicit_flag_wins() {
    let options = |ssd: &str, flags: &[&str]| {
        let request = staged(|request| {
            request.volume_context.insert("ssd".into(), ssd.into());
            let mount_flags = flags.iter().map(|flag| (*flag).to_string()).collect();
            request.volume_capability.as_mut().unwrap().access_type =
                Some(AccessType::Mount(MountVolume { mount_flags, ..Default::default() }));
        });
        request.unwrap().access
    };
    let noatime = Access::Filesystem(mount::Options::parse(["noatime"]));
    assert_eq!(options("1", &[]), noatime);
    assert_eq!(options("true", &[]), noatime);
    assert_eq!(options("0", &[]), Access::Filesystem(mount::Options::default()));
    assert_eq!(options("1", &["relatime"]), Access::Filesystem(mount::Options::default()));
}

#[test]
fn publish_of_each_kind() {
    let mut request = publish();
    let PublishSource::Staging(staged) = PublishRequest::new(&request, &folders()).unwrap().source else { panic!() };
    assert_eq!((staged.path, staged.disk.lun), (STAGING.into(), Some(1)));
    request.readonly = true;
    assert!(PublishRequest::new(&request, &folders()).unwrap().read_only);
    request.readonly = false;
    request.volume_capability = Some(capability("", Mode::SingleNodeReaderOnly));
    assert!(PublishRequest::new(&request, &folders()).unwrap().read_only);
    request.volume_capability = Some(capability("", Mode::SingleNodeSingleWriter));
    assert!(PublishRequest::new(&request, &folders()).unwrap().single_target);
    request.volume_capability = Some(VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
    });
    assert!(matches!(PublishRequest::new(&request, &folders()).unwrap().source, PublishSource::Device(_)));
}

#[test]
fn capacity_ranges() {
    let range = |required_bytes, limit_bytes| required(&csi::CapacityRange { required_bytes, limit_bytes });
    assert_eq!((range(0, 0), range(5, 0), range(5, 5)), (Ok(None), Ok(Some(5)), Ok(Some(5))));
    assert!(matches!(range(-1, 0), Err(Refusal::Range { field: "required_bytes", .. })));
    assert!(matches!(range(5, 4), Err(Refusal::Range { field: "limit_bytes", .. })));
}

proptest! {
    #[test]
    fn no_request_panics(
        id in "\\PC{0,40}", staging in "[/.a-z\\x00]{0,40}", fs_type in "\\PC{0,8}", mode in any::<i32>(),
        flags in proptest::collection::vec("\\PC{0,12}", 0..3), value in "\\PC{0,20}",
    ) {
        let keys = ["DevicePath", "lun", "serial", "zeroed", "sizeBytes", "resizeRequired", "blockSize", "contentSource"];
        let context: HashMap<String, String> = keys.iter().map(|key| ((*key).to_string(), value.clone())).collect();
        let request = csi::NodeStageVolumeRequest {
            volume_id: id.clone(),
            publish_context: context.clone(),
            staging_target_path: format!("/var/lib/kubelet/{staging}"),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume { fs_type, mount_flags: flags, ..Default::default() })),
                access_mode: Some(AccessMode { mode }),
            }),
            secrets: HashMap::new(),
            volume_context: context,
        };
        let _ = StageRequest::new(&request, None, &folders()).map_err(|refused| refused.to_string());
        let request = csi::NodeStageVolumeRequest { volume_id: ID.into(), volume_capability: Some(capability("", Mode::SingleNodeWriter)), ..request };
        let _ = StageRequest::new(&request, None, &folders()).map_err(|refused| refused.to_string());
    }
}

/// W16: nor is its raw block device.
#[test]
fn an_encrypted_volume_is_never_staged_in_plain() {
    for access_type in [AccessType::Mount(MountVolume::default()), AccessType::Block(BlockVolume {})] {
        let with = |secrets: &[(&str, &str)], context: &[(&str, &str)]| {
            staged(|request| {
                request.secrets = map(secrets);
                request.volume_context.extend(map(context));
                request.volume_capability.as_mut().unwrap().access_type = Some(access_type.clone());
            })
        };
        assert!(with(&[("encryption-passphrase", "hunter2")], &[]).unwrap().encryption.is_some());
        assert!(with(&[("else", "x")], &[]).unwrap().encryption.is_none());
        for key in proto::volume_context::LUKS_KEYS {
            let refused = with(&[("else", "x")], &[(key, "1")]).unwrap_err();
            assert_eq!(refused, Refusal::NoPassphrase);
            assert!(refused.to_string().contains("node-stage-secret-name"), "{refused}");
        }
        // A bad cost stops the making of the volume only: it may exist for years.
        let odd = with(&[("encryption-passphrase", "hunter2")], &[("luksKdfMemory", "1")]).unwrap();
        let Format::Never(why) = odd.format else { panic!("{odd:?}") };
        assert!(why.contains("memory") && odd.encryption.is_some(), "{why}");
    }
}

#[test]
fn refusals_show_nothing_of_a_passphrase() {
    for secrets in [&[("encryption-passphrase", "")][..], &[("encryption-passphrase-previous", "hunter2")]] {
        let refused = staged(|request| request.secrets = map(secrets)).unwrap_err();
        let sentence = format!("{refused} {refused:?}");
        assert!(sentence.contains("encryption-passphrase") && !sentence.contains("hunter2"), "{sentence}");
    }
}

#[test]
fn a_missing_access_mode_is_missing_and_not_unsupported() {
    let refused = staged(|request| request.volume_capability.as_mut().unwrap().access_mode = None).unwrap_err();
    assert_eq!(refused, Refusal::Missing { field: "volume_capability.access_mode" });
}

#[test]
fn a_secret_without_a_passphrase_makes_no_plain_filesystem() {
    let misspelt = staged(|request| request.secrets = map(&[("passphrase", "x"), ("encryption-passphrase ", "y")])).unwrap();
    let Format::Never(why) = misspelt.format else { panic!("{misspelt:?}") };
    assert!(misspelt.encryption.is_none() && why.contains("has encryption-passphrase , passphrase, and no encryption-passphrase"), "{why}");
    assert!(matches!(staged(|_| ()).unwrap().format, Format::May(_)));
    let block = |source: &[(&str, &str)]| {
        staged(|request| {
            request.secrets = map(&[("passphrase", "x")]);
            request.volume_context.extend(map(source));
            request.volume_capability.as_mut().unwrap().access_type = Some(AccessType::Block(BlockVolume {}));
        })
    };
    // One of the reference driver's is in plain already.
    assert!(block(&[]).unwrap().encryption.is_none());
    assert_eq!(block(&[("contentSource", "none")]).unwrap_err(), Refusal::NoPassphrase);
}

/// A pod's plain data may begin behind all that a probe looks at.
#[test]
fn a_raw_block_volume_of_the_reference_driver_is_never_made_an_encrypted_one() {
    let of = |access_type: AccessType, context: &[(&str, &str)]| {
        staged(|request| {
            request.secrets = map(&[("encryption-passphrase", "hunter2")]);
            request.volume_context.extend(map(context));
            request.volume_capability.as_mut().unwrap().access_type = Some(access_type.clone());
        })
        .unwrap()
        .format
    };
    let (block, mount) = (AccessType::Block(BlockVolume {}), AccessType::Mount(MountVolume::default()));
    let Format::Never(why) = of(block.clone(), &[]) else { panic!("it may be formatted") };
    assert!(why.contains("in plain"), "{why}");
    // Ours; and filesystems, which the reference driver does encrypt.
    assert!(matches!(of(block, &[("contentSource", "none")]), Format::May(_)));
    assert!(matches!(of(mount, &[]), Format::May(_)));
}
