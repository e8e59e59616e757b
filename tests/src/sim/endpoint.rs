//! The endpoints there are: method, path, who may call, whether pvedaemon works on it, and the schema of the parameters.

use super::answer::ApiError;
use super::options;
use super::params::{self, Params, Property, Type};
use super::route::Call;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Version,
    ClusterStatus,
    ClusterTasks,
    Resources,
    NextId,
    HaResources,
    Nodes,
    Permissions,
    Ticket,
    StorageConfigs,
    StorageConfig,
    NodeStorages,
    NodeStorage,
    StorageStatus,
    ContentList,
    ContentCreate,
    ContentLook,
    ContentSet,
    ContentCopy,
    ContentDelete,
    TaskList,
    TaskStop,
    TaskStatus,
    TaskLog,
    VmList,
    VmStatus,
    VmConfig,
    VmPending,
    VmUpdate,
    VmUpdateAsync,
    VmUnlink,
    VmResize,
    VmStart,
    VmStop,
    VmSuspend,
    VmResume,
    SnapshotList,
    SnapshotCreate,
}

/// The static permission of an endpoint.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Check {
    /// Any user or token.
    Anybody,
    /// Even without.
    World,
    /// No `permissions` entry: root@pam with a ticket.
    RootOnly,
    /// One of these on that path.
    AnyOf(&'static str, &'static [&'static str]),
}

#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) method: &'static str,
    pub(crate) path: &'static str,
    pub(crate) endpoint: Endpoint,
    /// Worked on by pvedaemon.
    pub(crate) protected: bool,
    pub(crate) check: Check,
}

const fn route(method: &'static str, path: &'static str, endpoint: Endpoint, protected: bool, check: Check) -> Route {
    Route { method, path, endpoint, protected, check }
}

const VM: &str = "/vms/{vmid}";
const AUDIT: Check = Check::AnyOf(VM, &["VM.Audit"]);
const POWER: Check = Check::AnyOf(VM, &["VM.PowerMgmt"]);
const STORAGE: &str = "/storage/{storage}";
const SEES_STORAGE: Check = Check::AnyOf(STORAGE, &["Datastore.Audit", "Datastore.AllocateSpace"]);
const CONFIGURES: Check = Check::AnyOf(
    VM,
    &[
        "VM.Config.Disk",
        "VM.Config.CDROM",
        "VM.Config.CPU",
        "VM.Config.Memory",
        "VM.Config.Network",
        "VM.Config.HWType",
        "VM.Config.Options",
        "VM.Config.Cloudinit",
    ],
);

static ROUTES: [Route; 38] = [
    route("GET", "/version", Endpoint::Version, false, Check::Anybody),
    route("GET", "/cluster/status", Endpoint::ClusterStatus, true, Check::AnyOf("/", &["Sys.Audit"])),
    route("GET", "/cluster/tasks", Endpoint::ClusterTasks, false, Check::Anybody),
    route("GET", "/cluster/resources", Endpoint::Resources, false, Check::Anybody),
    route("GET", "/cluster/nextid", Endpoint::NextId, false, Check::Anybody),
    route("GET", "/cluster/ha/resources", Endpoint::HaResources, false, Check::AnyOf("/", &["Sys.Audit"])),
    route("GET", "/nodes", Endpoint::Nodes, false, Check::Anybody),
    route("GET", "/access/permissions", Endpoint::Permissions, false, Check::Anybody),
    route("POST", "/access/ticket", Endpoint::Ticket, false, Check::World),
    route("GET", "/storage", Endpoint::StorageConfigs, false, Check::Anybody),
    route("GET", "/storage/{storage}", Endpoint::StorageConfig, false, Check::AnyOf(STORAGE, &["Datastore.Allocate"])),
    route("GET", "/nodes/{node}/storage", Endpoint::NodeStorages, true, Check::Anybody),
    route("GET", "/nodes/{node}/storage/{storage}", Endpoint::NodeStorage, false, SEES_STORAGE),
    route("GET", "/nodes/{node}/storage/{storage}/status", Endpoint::StorageStatus, true, SEES_STORAGE),
    route("GET", "/nodes/{node}/storage/{storage}/content", Endpoint::ContentList, true, SEES_STORAGE),
    route(
        "POST",
        "/nodes/{node}/storage/{storage}/content",
        Endpoint::ContentCreate,
        true,
        Check::AnyOf(STORAGE, &["Datastore.AllocateSpace"]),
    ),
    route("GET", "/nodes/{node}/storage/{storage}/content/{*volume}", Endpoint::ContentLook, true, Check::Anybody),
    route("PUT", "/nodes/{node}/storage/{storage}/content/{*volume}", Endpoint::ContentSet, true, Check::Anybody),
    route("POST", "/nodes/{node}/storage/{storage}/content/{*volume}", Endpoint::ContentCopy, true, Check::RootOnly),
    route("DELETE", "/nodes/{node}/storage/{storage}/content/{*volume}", Endpoint::ContentDelete, true, Check::Anybody),
    route("GET", "/nodes/{node}/tasks", Endpoint::TaskList, false, Check::Anybody),
    route("DELETE", "/nodes/{node}/tasks/{upid}", Endpoint::TaskStop, true, Check::Anybody),
    route("GET", "/nodes/{node}/tasks/{upid}/status", Endpoint::TaskStatus, true, Check::Anybody),
    route("GET", "/nodes/{node}/tasks/{upid}/log", Endpoint::TaskLog, true, Check::Anybody),
    route("GET", "/nodes/{node}/qemu", Endpoint::VmList, true, Check::Anybody),
    route("GET", "/nodes/{node}/qemu/{vmid}/status/current", Endpoint::VmStatus, true, AUDIT),
    route("GET", "/nodes/{node}/qemu/{vmid}/config", Endpoint::VmConfig, false, AUDIT),
    route("GET", "/nodes/{node}/qemu/{vmid}/pending", Endpoint::VmPending, false, AUDIT),
    route("PUT", "/nodes/{node}/qemu/{vmid}/config", Endpoint::VmUpdate, true, CONFIGURES),
    route("POST", "/nodes/{node}/qemu/{vmid}/config", Endpoint::VmUpdateAsync, true, CONFIGURES),
    route("PUT", "/nodes/{node}/qemu/{vmid}/unlink", Endpoint::VmUnlink, true, Check::AnyOf(VM, &["VM.Config.Disk"])),
    route("PUT", "/nodes/{node}/qemu/{vmid}/resize", Endpoint::VmResize, true, Check::AnyOf(VM, &["VM.Config.Disk"])),
    route("POST", "/nodes/{node}/qemu/{vmid}/status/start", Endpoint::VmStart, true, POWER),
    route("POST", "/nodes/{node}/qemu/{vmid}/status/stop", Endpoint::VmStop, true, POWER),
    route("POST", "/nodes/{node}/qemu/{vmid}/status/suspend", Endpoint::VmSuspend, true, POWER),
    route("POST", "/nodes/{node}/qemu/{vmid}/status/resume", Endpoint::VmResume, true, POWER),
    route("GET", "/nodes/{node}/qemu/{vmid}/snapshot", Endpoint::SnapshotList, true, AUDIT),
    route("POST", "/nodes/{node}/qemu/{vmid}/snapshot", Endpoint::SnapshotCreate, true, Check::AnyOf(VM, &["VM.Snapshot"])),
];

/// The route of a decoded path, with the parameters in it.
pub(crate) fn find(method: &str, path: &str) -> Option<(&'static Route, Params)> {
    ROUTES.iter().filter(|route| route.method == method).find_map(|route| Some((route, fits(route.path, path)?)))
}

fn fits(pattern: &str, path: &str) -> Option<Params> {
    let mut params = Params::new();
    let mut given: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    given.reverse();
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        if let Some(name) = part.strip_prefix("{*").and_then(|name| name.strip_suffix('}')) {
            given.reverse();
            params.insert(name.to_owned(), given.join("/"));
            return (!given.is_empty()).then_some(params);
        }
        let value = given.pop()?;
        match part.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
            Some(name) => {
                params.insert(name.to_owned(), value.to_owned());
            }
            None if part == value => {}
            None => return None,
        }
    }
    given.is_empty().then_some(params)
}

const NODE: Property = ("node", Type::Text(64), true);
const VMID: Property = ("vmid", Type::Vmid, true);
const STORE: Property = ("storage", Type::Storage, true);
const DIGEST: Property = ("digest", Type::Text(40), false);
const DELAY: Type = Type::Integer(1, 30);

/// The parameters of an endpoint; for a config update beside the options of a VM.
fn properties(endpoint: Endpoint) -> &'static [Property] {
    use Endpoint as E;
    match endpoint {
        E::Version | E::ClusterStatus | E::ClusterTasks | E::HaResources | E::Nodes => &[],
        E::Resources => &[("type", Type::Choice("vm, storage, node, sdn"), false)],
        E::NextId => &[("vmid", Type::Vmid, false)],
        E::Permissions => &[("path", Type::Text(256), false), ("userid", Type::Text(128), false)],
        E::Ticket => &[
            ("username", Type::Text(64), true),
            ("password", Type::Text(4096), true),
            ("realm", Type::Text(32), false),
            ("new-format", Type::Boolean, false),
        ],
        E::StorageConfigs => &[("type", Type::Text(32), false)],
        E::StorageConfig => &[STORE],
        E::NodeStorages => &[
            NODE,
            ("storage", Type::Storage, false),
            ("content", Type::Content, false),
            ("enabled", Type::Boolean, false),
            ("target", Type::Text(64), false),
            ("format", Type::Boolean, false),
        ],
        E::NodeStorage | E::StorageStatus => &[NODE, STORE],
        E::ContentList => &[NODE, STORE, ("content", Type::Content, false), ("vmid", Type::Vmid, false)],
        E::ContentCreate => &[
            NODE,
            STORE,
            VMID,
            ("filename", Type::Text(255), true),
            ("size", Type::AllocationSize, true),
            ("format", Type::Choice("raw, qcow2, subvol, vmdk"), false),
        ],
        E::ContentLook => &[NODE, ("storage", Type::Storage, false), ("volume", Type::Text(1024), true)],
        E::ContentSet => &[
            NODE,
            ("storage", Type::Storage, false),
            ("volume", Type::Text(1024), true),
            ("notes", Type::Text(4096), false),
            ("protected", Type::Boolean, false),
        ],
        E::ContentCopy => &[
            NODE,
            ("storage", Type::Storage, false),
            ("volume", Type::Text(1024), true),
            ("target", Type::Text(1024), true),
            ("target_node", Type::Text(64), false),
        ],
        E::ContentDelete => &[NODE, ("storage", Type::Storage, false), ("volume", Type::Text(1024), true), ("delay", DELAY, false)],
        E::TaskList => &[
            NODE,
            ("start", Type::Integer(0, i64::MAX), false),
            ("limit", Type::Integer(0, i64::MAX), false),
            ("vmid", Type::Vmid, false),
            ("typefilter", Type::Text(64), false),
            ("userfilter", Type::Text(128), false),
            ("source", Type::Choice("archive, active, all"), false),
            ("errors", Type::Boolean, false),
            ("since", Type::Integer(0, i64::MAX), false),
            ("until", Type::Integer(0, i64::MAX), false),
            ("statusfilter", Type::Text(64), false),
        ],
        E::TaskStop | E::TaskStatus => &[NODE, ("upid", Type::Text(512), true)],
        E::TaskLog => &[
            NODE,
            ("upid", Type::Text(512), true),
            ("start", Type::Integer(0, i64::MAX), false),
            ("limit", Type::Integer(0, i64::MAX), false),
            ("download", Type::Boolean, false),
        ],
        E::VmList => &[NODE, ("full", Type::Boolean, false)],
        E::VmStatus | E::VmPending | E::SnapshotList => &[NODE, VMID],
        E::VmConfig => &[NODE, VMID, ("current", Type::Boolean, false), ("snapshot", Type::SnapshotName, false)],
        E::VmUpdate => &[
            NODE,
            VMID,
            DIGEST,
            ("delete", Type::Text(8192), false),
            ("revert", Type::Text(8192), false),
            ("force", Type::Boolean, false),
            ("skiplock", Type::Boolean, false),
        ],
        E::VmUpdateAsync => &[
            NODE,
            VMID,
            DIGEST,
            ("delete", Type::Text(8192), false),
            ("revert", Type::Text(8192), false),
            ("force", Type::Boolean, false),
            ("skiplock", Type::Boolean, false),
            ("background_delay", DELAY, false),
            ("import-working-storage", Type::Storage, false),
        ],
        E::VmUnlink => &[NODE, VMID, ("idlist", Type::Text(8192), true), ("force", Type::Boolean, false)],
        E::VmResize => {
            &[NODE, VMID, DIGEST, ("disk", Type::DriveName, true), ("size", Type::ResizeSize, true), ("skiplock", Type::Boolean, false)]
        }
        E::VmStart | E::VmStop | E::VmSuspend | E::VmResume => {
            &[NODE, VMID, ("skiplock", Type::Boolean, false), ("timeout", Type::Integer(0, i64::MAX), false)]
        }
        E::SnapshotCreate => &[
            NODE,
            VMID,
            ("snapname", Type::SnapshotName, true),
            ("vmstate", Type::Boolean, false),
            ("description", Type::Text(8192), false),
        ],
    }
}

/// The 400 of a call whose parameters do not follow the schema.
pub(crate) fn verify(call: &Call) -> Result<(), ApiError> {
    let properties = properties(call.endpoint);
    let updates = matches!(call.endpoint, Endpoint::VmUpdate | Endpoint::VmUpdateAsync);
    let type_of = |name: &str| {
        let own = properties.iter().find(|(own, _, _)| *own == name).map(|(_, kind, _)| *kind);
        own.or_else(|| updates.then(|| options::option_type(name)).flatten())
    };
    let required: Vec<&str> = properties.iter().filter(|(_, _, required)| *required).map(|(name, _, _)| *name).collect();
    params::verify(&call.params, type_of, &required)?;
    if updates && call.get("force").is_some() && call.get("delete").is_none() {
        return Err(ApiError::param("delete", "missing property required by 'force'"));
    }
    if call.get("snapshot").is_some() && call.flag("current") {
        let text = "cannot use 'snapshot' parameter with 'current'".to_owned();
        return Err(ApiError::params([("snapshot".to_owned(), text.clone()), ("current".to_owned(), text)].into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_swallows_the_rest_of_the_path() {
        let (route, params) = find("DELETE", "/nodes/pve1/storage/ds1/content/ds1:9999/vm-9999-a.raw").unwrap();
        assert_eq!(route.endpoint, Endpoint::ContentDelete);
        assert_eq!(params["volume"], "ds1:9999/vm-9999-a.raw");
        assert_eq!(find("GET", "/nodes/pve1/storage/ds1/content").unwrap().0.endpoint, Endpoint::ContentList);
        assert!(find("GET", "/nosuch").is_none());
    }
}
