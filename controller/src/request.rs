//! CSI requests made typed. Past this file there are no raw maps and no optional-but-required fields; every refusal names
//! the field, the value and what would be right.

use std::collections::HashMap;

use proto::VolumeHandle;
use proto::csi::{self, volume_capability::AccessType, volume_capability::access_mode::Mode};
use proto::handle::HandleError;
use zeroize::Zeroize as _;

use crate::error::Error;
use crate::mutable::Mutable;
use crate::parameters::{Parameters, filesystem};
use crate::placement::{DEFAULT_SIZE_BYTES, Order, Room, Term, Want};

/// CSI: a name may have 128 bytes; longer ones are cut by nobody.
const MAX_NAME_BYTES: usize = 128;
/// CSI: `node_id` may have 256 bytes since 1.4.
const MAX_NODE_ID_BYTES: usize = 256;
/// The reference driver lets a class place by Proxmox's own names.
const REGION_OVERRIDE: &str = "topology.proxmox.sinextra.dev/region";
const ZONE_OVERRIDES: [&str; 2] = ["topology.proxmox.sinextra.dev/node", "topology.proxmox.sinextra.dev/zone"];

/// CreateVolume.
#[derive(Debug)]
pub struct Create {
    /// The PV's name.
    pub name: String,
    /// Where and how large.
    pub want: Want,
    /// How its drive will be.
    pub parameters: Parameters,
    /// Whom it is for: namespace and name, where the provisioner says it (`--extra-create-metadata`).
    pub claim: Option<(String, String)>,
    /// To be logged.
    pub warnings: Vec<String>,
}

/// A Kubernetes node: a VM by number, or by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeId {
    /// `<name>/<vmid>`
    Vmid(String, u32),
    /// `<name>`: the VM of exactly that name.
    Name(String),
}

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vmid(name, vmid) => write!(f, "{name}/{vmid}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// ControllerPublishVolume.
#[derive(Debug, Clone)]
pub struct Publish {
    /// The volume.
    pub handle: VolumeHandle,
    /// To which VM.
    pub node: NodeId,
    /// Write-protected.
    pub readonly: bool,
    /// How its drive is to be.
    pub parameters: Parameters,
    /// A volume made from a smaller source: the node grows the filesystem.
    pub resize_required: bool,
}

/// ControllerUnpublishVolume.
#[derive(Debug)]
pub struct Unpublish {
    /// The volume.
    pub handle: VolumeHandle,
    /// From which VM; nothing: from every one.
    pub node: Option<NodeId>,
}

/// ControllerExpandVolume.
#[derive(Debug)]
pub struct Expand {
    /// The volume.
    pub handle: VolumeHandle,
    /// Bytes at least.
    pub required_bytes: u64,
    /// Bytes at most.
    pub limit_bytes: Option<u64>,
}

/// ControllerModifyVolume.
#[derive(Debug)]
pub struct Modify {
    /// The volume.
    pub handle: VolumeHandle,
    /// What is to be changed.
    pub wanted: Mutable,
}

/// ListVolumes.
#[derive(Debug, Default)]
pub struct ListPage {
    /// Entries at most; 0: as many as we like.
    pub max_entries: usize,
    /// As the page before gave it; empty: from the beginning.
    pub starting_token: String,
}

/// GetCapacity.
#[derive(Debug, Default)]
pub struct Capacity {
    /// All storages where none is named.
    pub storage: Option<String>,
    /// Everywhere where nothing is said.
    pub term: Option<Term>,
    /// How much of the storage new volumes of the class may have.
    pub room: Room,
}

impl TryFrom<csi::CreateVolumeRequest> for Create {
    type Error = Error;

    fn try_from(mut request: csi::CreateVolumeRequest) -> Result<Self, Error> {
        // The node's secret is seen here only where the class gives it to the provisioner too: that it is there is all.
        let has_passphrase = request.secrets.contains_key(proto::secrets::PASSPHRASE);
        for (_, mut secret) in request.secrets.drain() {
            secret.zeroize();
        }
        if request.name.is_empty() {
            return Err(Error::invalid("name is missing"));
        }
        if request.name.len() > MAX_NAME_BYTES || request.name.chars().any(char::is_control) {
            return Err(Error::invalid(format!(
                "name has {} bytes or control characters; at most {MAX_NAME_BYTES} are allowed",
                request.name.len()
            )));
        }
        if request.volume_capabilities.is_empty() {
            return Err(Error::invalid("volume_capabilities is missing"));
        }
        for capability in &request.volume_capabilities {
            supported(capability).map_err(Error::invalid)?;
        }
        if request.volume_content_source.is_some() {
            return Err(Error::invalid("volume_content_source is not supported by this version: no snapshots, no clones"));
        }
        let mutable = Mutable::of_class(&request.mutable_parameters).map_err(Error::invalid)?;
        let (required_bytes, limit_bytes) = match request.capacity_range {
            None => (DEFAULT_SIZE_BYTES, None),
            Some(range) => range_of(range)?,
        };
        let (mut parameters, warnings) = Parameters::of_class(&request.parameters).map_err(Error::invalid)?;
        parameters.mutable.push(mutable);
        parameters.check_limits().map_err(Error::invalid)?;
        let is_encrypted = parameters.is_encrypting() || has_passphrase;
        if is_encrypted {
            Parameters::fit_luks(required_bytes)?;
        }
        if is_for_xfs(&request, parameters.fstype()) {
            parameters.fit_xfs(required_bytes, is_encrypted)?;
        } else {
            parameters.fit_ext4(required_bytes)?;
        }
        let metadata = |key: &str| request.parameters.get(&format!("csi.storage.k8s.io/pvc/{key}")).cloned();
        let claim = metadata("namespace").zip(metadata("name"));
        let (terms, order) = terms(request.accessibility_requirements.unwrap_or_default(), metadata("name").as_deref())?;
        let want = Want {
            storage: parameters.storage.clone(),
            required_bytes,
            limit_bytes,
            terms,
            order,
            format: parameters.format.clone(),
            room: parameters.room,
        };
        Ok(Self { name: request.name, want, parameters, claim, warnings })
    }
}

impl TryFrom<csi::ControllerPublishVolumeRequest> for Publish {
    type Error = Error;

    fn try_from(request: csi::ControllerPublishVolumeRequest) -> Result<Self, Error> {
        // The order is csi-sanity's: what is missing comes before what is wrong.
        if request.volume_id.is_empty() {
            return Err(Error::invalid("volume_id is missing"));
        }
        if request.node_id.is_empty() {
            return Err(Error::invalid("node_id is missing"));
        }
        let Some(capability) = &request.volume_capability else { return Err(Error::invalid("volume_capability is missing")) };
        access_mode(capability).map_err(Error::invalid)?;
        // A volume that exists may have a filesystem that this version would not make: the node judges.
        let handle = existing(&request.volume_id)?;
        let node = node_id(&request.node_id)?;
        let context = &request.volume_context;
        let parameters = Parameters::of_context(context).map_err(|why| Error::invalid(format!("volume_context: {why}")))?;
        let resize_required =
            context.get(proto::volume_context::RESIZE_REQUIRED).is_some_and(|value| matches!(value.as_str(), "1" | "true"));
        Ok(Self { handle, node, readonly: request.readonly, parameters, resize_required })
    }
}

impl TryFrom<csi::ControllerUnpublishVolumeRequest> for Unpublish {
    type Error = Error;

    fn try_from(request: csi::ControllerUnpublishVolumeRequest) -> Result<Self, Error> {
        if request.volume_id.is_empty() {
            return Err(Error::invalid("volume_id is missing"));
        }
        // Not "not found": saying OK to an id that only we cannot read would leave its disk where it is.
        let handle = request.volume_id.parse().map_err(|why: HandleError| Error::invalid(why.to_string()))?;
        let node = if request.node_id.is_empty() { None } else { Some(node_id(&request.node_id)?) };
        Ok(Self { handle, node })
    }
}

impl TryFrom<csi::ControllerExpandVolumeRequest> for Expand {
    type Error = Error;

    fn try_from(request: csi::ControllerExpandVolumeRequest) -> Result<Self, Error> {
        if request.volume_id.is_empty() {
            return Err(Error::invalid("volume_id is missing"));
        }
        let Some(range) = request.capacity_range else { return Err(Error::invalid("capacity_range is missing")) };
        let (required_bytes, limit_bytes) = range_of(range)?;
        Ok(Self { handle: existing(&request.volume_id)?, required_bytes, limit_bytes })
    }
}

impl TryFrom<csi::ControllerModifyVolumeRequest> for Modify {
    type Error = Error;

    fn try_from(request: csi::ControllerModifyVolumeRequest) -> Result<Self, Error> {
        if request.volume_id.is_empty() {
            return Err(Error::invalid("volume_id is missing"));
        }
        let wanted = Mutable::of_class(&request.mutable_parameters).map_err(Error::invalid)?;
        Ok(Self { handle: existing(&request.volume_id)?, wanted })
    }
}

impl TryFrom<csi::ListVolumesRequest> for ListPage {
    type Error = Error;

    fn try_from(request: csi::ListVolumesRequest) -> Result<Self, Error> {
        let max_entries =
            usize::try_from(request.max_entries).map_err(|_| Error::invalid(format!("max_entries {} is negative", request.max_entries)))?;
        Ok(Self { max_entries, starting_token: request.starting_token })
    }
}

impl TryFrom<csi::GetCapacityRequest> for Capacity {
    type Error = Error;

    fn try_from(request: csi::GetCapacityRequest) -> Result<Self, Error> {
        let storage = request.parameters.get("storage").filter(|storage| !storage.is_empty()).cloned();
        let term = match request.accessible_topology {
            Some(topology) if !topology.segments.is_empty() => Some(term(&topology.segments)?),
            _ => None,
        };
        let room = Parameters::room_of_class(&request.parameters).map_err(Error::invalid)?;
        Ok(Self { storage, term, room })
    }
}

/// Whether the node will make an xfs on it. external-provisioner puts the class's fstype into every capability; `of_class` is
/// for requests that somebody wrote by hand.
fn is_for_xfs(request: &csi::CreateVolumeRequest, of_class: &str) -> bool {
    request.volume_capabilities.iter().any(|capability| match &capability.access_type {
        Some(AccessType::Mount(mount)) if mount.fs_type.is_empty() => of_class == "xfs",
        Some(AccessType::Mount(mount)) => mount.fs_type == "xfs",
        Some(AccessType::Block(_)) | None => false,
    })
}

/// The id of a volume that is said to exist: an id that cannot be one names no volume.
///
/// # Errors
/// NOT_FOUND with what is wrong with it.
pub fn existing(volume_id: &str) -> Result<VolumeHandle, Error> {
    volume_id.parse().map_err(|why: HandleError| Error::not_found(why.to_string()))
}

/// Whether a volume can be used so.
///
/// # Errors
/// A sentence with the field, the value and what is supported.
pub fn supported(capability: &csi::VolumeCapability) -> Result<(), String> {
    access_mode(capability)?;
    match &capability.access_type {
        Some(AccessType::Block(_)) => Ok(()),
        Some(AccessType::Mount(mount)) => filesystem(&mount.fs_type),
        None => Err("volume_capability has neither mount nor block".into()),
    }
}

fn access_mode(capability: &csi::VolumeCapability) -> Result<(), String> {
    let Some(mode) = &capability.access_mode else { return Err("volume_capability has no access_mode".into()) };
    match Mode::try_from(mode.mode) {
        Ok(Mode::SingleNodeWriter | Mode::SingleNodeReaderOnly | Mode::SingleNodeSingleWriter | Mode::SingleNodeMultiWriter) => Ok(()),
        Ok(mode) => Err(format!(
            "access mode {} is not supported: a Proxmox disk belongs to one VM; use ReadWriteOnce or ReadWriteOncePod",
            mode.as_str_name()
        )),
        Err(_) => Err(format!("access mode {} is not known", mode.mode)),
    }
}

fn range_of(range: csi::CapacityRange) -> Result<(u64, Option<u64>), Error> {
    let bytes =
        |name: &str, value: i64| u64::try_from(value).map_err(|_| Error::invalid(format!("capacity_range.{name} {value} is negative")));
    let (required, limit) = (bytes("required_bytes", range.required_bytes)?, bytes("limit_bytes", range.limit_bytes)?);
    match (required, limit) {
        (0, 0) => Err(Error::invalid("capacity_range asks for size 0; required_bytes should be above 0")),
        (0, limit) => Ok((limit.min(DEFAULT_SIZE_BYTES), Some(limit))),
        (required, 0) => Ok((required, None)),
        (required, limit) if limit < required => {
            Err(Error::invalid(format!("capacity_range.limit_bytes {limit} is below required_bytes {required}")))
        }
        (required, limit) => Ok((required, Some(limit))),
    }
}

/// The preferred terms first, and what their order means.
fn terms(requirement: csi::TopologyRequirement, claim: Option<&str>) -> Result<(Vec<Term>, Order), Error> {
    let mut terms: Vec<Term> = Vec::new();
    let preferred = requirement.preferred.iter().map(|topology| term(&topology.segments)).collect::<Result<Vec<_>, _>>()?;
    let requisite = requirement.requisite.iter().map(|topology| term(&topology.segments)).collect::<Result<Vec<_>, _>>()?;
    let order = Order::of(&preferred, claim);
    for term in preferred.into_iter().chain(requisite) {
        if !terms.contains(&term) {
            terms.push(term);
        }
    }
    Ok((terms, order))
}

fn term(segments: &HashMap<String, String>) -> Result<Term, Error> {
    let value = |keys: &[&str]| keys.iter().find_map(|key| segments.get(*key)).filter(|value| !value.is_empty()).cloned();
    let region = value(&[REGION_OVERRIDE, proto::TOPOLOGY_REGION]);
    let zone = value(&[ZONE_OVERRIDES[0], ZONE_OVERRIDES[1], proto::TOPOLOGY_ZONE]);
    if region.is_none() && zone.is_none() {
        let mut keys: Vec<&str> = segments.keys().map(String::as_str).collect();
        keys.sort_unstable();
        return Err(Error::invalid(format!(
            "topology segment with keys [{}] names no region and no zone; expected {} and {}",
            keys.join(", "),
            proto::TOPOLOGY_REGION,
            proto::TOPOLOGY_ZONE
        )));
    }
    Ok(Term { region, zone })
}

/// Reads a node id: `NAME/VMID` or `NAME`.
///
/// # Errors
/// INVALID_ARGUMENT with what is wrong.
pub(crate) fn node_id(given: &str) -> Result<NodeId, Error> {
    let wrong = |what: &str| {
        let shown: String = given.chars().take(100).collect();
        Err(Error::invalid(format!("node_id {shown:?} {what}; it should be NAME or NAME/VMID")))
    };
    if given.len() > MAX_NODE_ID_BYTES || given.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return wrong("is too long or has spaces");
    }
    match given.split_once('/') {
        None => Ok(NodeId::Name(given.into())),
        Some((name, digits)) => match digits.parse::<u32>() {
            // One spelling only: two ids of one VM would be two nodes to Kubernetes.
            Ok(vmid) if !name.is_empty() && (100..=999_999_999).contains(&vmid) && digits == vmid.to_string() => {
                Ok(NodeId::Vmid(name.into(), vmid))
            }
            _ => wrong("has no VMID from 100 to 999999999 after its name"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tonic::Code;

    fn capability(mode: Mode, fs_type: &str) -> csi::VolumeCapability {
        let mount = csi::volume_capability::MountVolume { fs_type: fs_type.into(), ..Default::default() };
        csi::VolumeCapability {
            access_mode: Some(csi::volume_capability::AccessMode { mode: mode.into() }),
            access_type: Some(AccessType::Mount(mount)),
        }
    }

    fn create() -> csi::CreateVolumeRequest {
        csi::CreateVolumeRequest {
            name: "pvc-1".into(),
            volume_capabilities: vec![capability(Mode::SingleNodeWriter, "")],
            parameters: HashMap::from([("storage".to_string(), "ds".to_string())]),
            ..Default::default()
        }
    }

    #[test]
    fn a_small_xfs_is_out_of_range_whatever_the_limit() {
        let of = |fs_type: &str, required_bytes: i64, limit_bytes: i64| {
            let mut request = create();
            request.volume_capabilities = vec![capability(Mode::SingleNodeWriter, fs_type)];
            request.capacity_range = Some(csi::CapacityRange { required_bytes, limit_bytes });
            Create::try_from(request).map(|create| create.want.required_bytes).map_err(|error| error.code)
        };
        for limit in [0, 1 << 30] {
            assert_eq!(of("xfs", (300 << 20) - 1, limit), Err(Code::OutOfRange));
            assert_eq!(of("xfs", 300 << 20, limit), Ok(300 << 20));
            assert_eq!(of("ext4", 1 << 20, limit), Ok(1 << 20));
        }
        assert_eq!(of("xfs", 0, 200 << 20), Err(Code::OutOfRange), "the limit is all there may be");
    }

    #[test]
    fn an_encrypting_class_is_known_by_its_keys_or_by_the_provisioners_secret() {
        let of = |fs_type: &str, required_bytes: i64, parameter: Option<(&str, &str)>, secret: Option<&str>| {
            let mut request = create();
            request.volume_capabilities = vec![capability(Mode::SingleNodeWriter, fs_type)];
            request.capacity_range = Some(csi::CapacityRange { required_bytes, limit_bytes: 0 });
            request.parameters.extend(parameter.map(|(key, value)| (key.to_string(), value.to_string())));
            request.secrets.extend(secret.map(|key| (key.to_string(), "hunter2".to_string())));
            Create::try_from(request).map(|create| create.parameters.volume_context()).map_err(|error| (error.code, error.text))
        };
        const PASSPHRASE: Option<&str> = Some("encryption-passphrase");
        let argon2id = Some(("luksKdf", "argon2id"));
        for (parameter, secret) in [(argon2id, None), (None, PASSPHRASE), (argon2id, PASSPHRASE)] {
            for (fs_type, least) in [("xfs", 316 << 20), ("ext4", 18 << 20)] {
                let context = of(fs_type, least, parameter, secret).unwrap();
                assert_eq!(context.get("luksKdf").map(String::as_str), parameter.map(|(_, value)| value));
                assert!(context.values().all(|value| value != "hunter2"));
                let (code, text) = of(fs_type, least - 1, parameter, secret).unwrap_err();
                assert!(code == Code::OutOfRange && text.contains(&least.to_string()) && !text.contains("hunter2"), "{text}");
            }
        }
        assert!(of("xfs", 300 << 20, None, Some("else")).is_ok());
        let (code, text) = of("ext4", 1 << 30, Some(("luksKdfMemory", "16")), PASSPHRASE).unwrap_err();
        assert!(code == Code::InvalidArgument && text.contains("32 to 1024"), "{text}");
        // What somebody wrote by hand, into the class instead of the capability.
        for key in ["fstype", "csi.storage.k8s.io/fstype"] {
            assert_eq!(of("", 299 << 20, Some((key, "xfs")), None).unwrap_err().0, Code::OutOfRange);
            assert!(of("ext4", 299 << 20, Some((key, "xfs")), None).is_ok(), "the capability is what the node is told");
        }
    }

    #[test]
    fn create_takes_what_the_provisioner_sends() {
        let segments = |zone: &str| csi::Topology {
            segments: HashMap::from([(proto::TOPOLOGY_REGION.into(), "r".into()), (proto::TOPOLOGY_ZONE.into(), zone.into())]),
        };
        let mut request = create();
        request.accessibility_requirements =
            Some(csi::TopologyRequirement { requisite: vec![segments("a"), segments("b")], preferred: vec![segments("b"), segments("a")] });
        let create = Create::try_from(request).unwrap();
        let zones: Vec<&str> = create.want.terms.iter().filter_map(|term| term.zone.as_deref()).collect();
        assert_eq!(zones, ["b", "a"]);
        assert_eq!(create.want.required_bytes, DEFAULT_SIZE_BYTES);
    }

    #[test]
    fn each_wrong_create_is_refused_by_field() {
        type Change = fn(&mut csi::CreateVolumeRequest);
        let cases: &[(Change, &str)] = &[
            (|r| r.name.clear(), "name is missing"),
            (|r| r.name = "x".repeat(129), "129 bytes"),
            (|r| r.volume_capabilities.clear(), "volume_capabilities is missing"),
            (|r| r.volume_capabilities = vec![capability(Mode::MultiNodeMultiWriter, "")], "MULTI_NODE_MULTI_WRITER"),
            (|r| r.volume_capabilities = vec![capability(Mode::SingleNodeWriter, "ntfs")], "supported: ext4, xfs"),
            (|r| r.volume_capabilities = vec![csi::VolumeCapability::default()], "access_mode"),
            (|r| r.volume_capabilities[0].access_type = None, "neither mount nor block"),
            (|r| r.volume_content_source = Some(Default::default()), "volume_content_source"),
            (|r| r.mutable_parameters = HashMap::from([("diskIops".into(), "1".into())]), "diskIops"),
            (|r| r.capacity_range = Some(csi::CapacityRange { required_bytes: 0, limit_bytes: 0 }), "size 0"),
            (|r| r.capacity_range = Some(csi::CapacityRange { required_bytes: -1, limit_bytes: 0 }), "negative"),
            (|r| r.capacity_range = Some(csi::CapacityRange { required_bytes: 10, limit_bytes: 9 }), "below required_bytes 10"),
            (|r| r.parameters.clear(), "storage is missing"),
            (
                |r| {
                    let topology = csi::Topology { segments: HashMap::from([("x".into(), "y".into())]) };
                    r.accessibility_requirements = Some(csi::TopologyRequirement { requisite: vec![topology], preferred: vec![] });
                },
                "topology.kubernetes.io/zone",
            ),
        ];
        for (change, expected) in cases {
            let mut request = create();
            change(&mut request);
            let refused = Create::try_from(request).unwrap_err();
            assert_eq!(refused.code, Code::InvalidArgument, "{refused}");
            assert!(refused.text.contains(expected), "{refused} lacks {expected}");
        }
    }

    #[test]
    fn each_wrong_publish_is_refused_in_sanitys_order() {
        let request = |volume: &str, node: &str| csi::ControllerPublishVolumeRequest {
            volume_id: volume.into(),
            node_id: node.into(),
            volume_capability: Some(capability(Mode::SingleNodeWriter, "xfs")),
            ..Default::default()
        };
        let code = |request: csi::ControllerPublishVolumeRequest| Publish::try_from(request).unwrap_err().code;
        assert_eq!(code(request("", "n")), Code::InvalidArgument);
        assert_eq!(code(request("fake-vol-id", "")), Code::InvalidArgument);
        assert_eq!(
            code(csi::ControllerPublishVolumeRequest { volume_capability: None, ..request("fake-vol-id", "fake") }),
            Code::InvalidArgument
        );
        assert_eq!(code(request("fake-vol-id", "fake-node-id")), Code::NotFound);
        assert_eq!(code(request("r/z/ds/vm-9999-a", "n/x")), Code::InvalidArgument);
        for wrong in ["n/1/2", "n/+101", "n/0101"] {
            assert_eq!(code(request("r/z/ds/vm-9999-a", wrong)), Code::InvalidArgument, "{wrong}");
        }
        let publish = Publish::try_from(request("r/z/ds/vm-9999-a", "n/101")).unwrap();
        assert_eq!(publish.node, NodeId::Vmid("n".into(), 101));
    }

    #[test]
    fn ids_of_expand_and_unpublish() {
        let expand = |id: &str, range| {
            Expand::try_from(csi::ControllerExpandVolumeRequest { volume_id: id.into(), capacity_range: range, ..Default::default() })
        };
        let range = Some(csi::CapacityRange { required_bytes: 1, limit_bytes: 0 });
        assert_eq!(expand("", range).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(expand("a/b/c/d", None).unwrap_err().code, Code::InvalidArgument);
        assert_eq!(expand("nonsense", range).unwrap_err().code, Code::NotFound);
        assert!(expand("a/b/c/d", range).is_ok());
        let unpublish = |id: &str, node: &str| {
            Unpublish::try_from(csi::ControllerUnpublishVolumeRequest { volume_id: id.into(), node_id: node.into(), ..Default::default() })
        };
        assert_eq!(unpublish("", "n").unwrap_err().code, Code::InvalidArgument);
        assert_eq!(unpublish("nonsense", "n").unwrap_err().code, Code::InvalidArgument);
        assert_eq!(unpublish("a/b/c/d", "").unwrap().node, None);
    }

    proptest! {
        #[test]
        fn no_id_panics(id in "\\PC{0,300}", required in any::<i64>(), limit in any::<i64>()) {
            let _ = node_id(&id);
            let _ = existing(&id);
            let _ = range_of(csi::CapacityRange { required_bytes: required, limit_bytes: limit });
        }
    }
}
