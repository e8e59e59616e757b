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
    TicketPage,
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
    ContainerConfig,
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
    /// The parameters; for a config update beside the options of a VM.
    pub(crate) properties: &'static [Property],
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

const NODE: Property = ("node", Type::Text(64), true);
const VMID: Property = ("vmid", Type::Vmid, true);
const STORE: Property = ("storage", Type::Storage, true);
const DIGEST: Property = ("digest", Type::Text(40), false);
const DELAY: Type = Type::Integer(1, 30);

static ROUTES: [Route; 40] = [
    Route { method: "GET", path: "/version", endpoint: Endpoint::Version, protected: false, check: Check::Anybody, properties: &[] },
    Route {
        method: "GET",
        path: "/cluster/status",
        endpoint: Endpoint::ClusterStatus,
        protected: true,
        check: Check::AnyOf("/", &["Sys.Audit"]),
        properties: &[],
    },
    Route {
        method: "GET",
        path: "/cluster/tasks",
        endpoint: Endpoint::ClusterTasks,
        protected: false,
        check: Check::Anybody,
        properties: &[],
    },
    Route {
        method: "GET",
        path: "/cluster/resources",
        endpoint: Endpoint::Resources,
        protected: false,
        check: Check::Anybody,
        properties: &[("type", Type::Choice("vm, storage, node, sdn"), false)],
    },
    Route {
        method: "GET",
        path: "/cluster/nextid",
        endpoint: Endpoint::NextId,
        protected: false,
        check: Check::Anybody,
        properties: &[("vmid", Type::Vmid, false)],
    },
    Route {
        method: "GET",
        path: "/cluster/ha/resources",
        endpoint: Endpoint::HaResources,
        protected: false,
        check: Check::AnyOf("/", &["Sys.Audit"]),
        properties: &[],
    },
    Route { method: "GET", path: "/nodes", endpoint: Endpoint::Nodes, protected: false, check: Check::Anybody, properties: &[] },
    Route {
        method: "GET",
        path: "/access/permissions",
        endpoint: Endpoint::Permissions,
        protected: false,
        check: Check::Anybody,
        properties: &[("path", Type::Text(256), false), ("userid", Type::Text(128), false)],
    },
    Route { method: "GET", path: "/access/ticket", endpoint: Endpoint::TicketPage, protected: false, check: Check::World, properties: &[] },
    Route {
        method: "POST",
        path: "/access/ticket",
        endpoint: Endpoint::Ticket,
        protected: false,
        check: Check::World,
        properties: &[
            ("username", Type::Text(64), true),
            ("password", Type::Text(4096), true),
            ("realm", Type::Text(32), false),
            ("new-format", Type::Boolean, false),
        ],
    },
    Route {
        method: "GET",
        path: "/storage",
        endpoint: Endpoint::StorageConfigs,
        protected: false,
        check: Check::Anybody,
        properties: &[("type", Type::Text(32), false)],
    },
    Route {
        method: "GET",
        path: "/storage/{storage}",
        endpoint: Endpoint::StorageConfig,
        protected: false,
        check: Check::AnyOf(STORAGE, &["Datastore.Allocate"]),
        properties: &[STORE],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/storage",
        endpoint: Endpoint::NodeStorages,
        protected: true,
        check: Check::Anybody,
        properties: &[
            NODE,
            ("storage", Type::Storage, false),
            ("content", Type::Content, false),
            ("enabled", Type::Boolean, false),
            ("target", Type::Text(64), false),
            ("format", Type::Boolean, false),
        ],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/storage/{storage}",
        endpoint: Endpoint::NodeStorage,
        protected: false,
        check: SEES_STORAGE,
        properties: &[NODE, STORE],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/storage/{storage}/status",
        endpoint: Endpoint::StorageStatus,
        protected: true,
        check: SEES_STORAGE,
        properties: &[NODE, STORE],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/storage/{storage}/content",
        endpoint: Endpoint::ContentList,
        protected: true,
        check: SEES_STORAGE,
        properties: &[NODE, STORE, ("content", Type::Content, false), ("vmid", Type::Vmid, false)],
    },
    Route {
        method: "POST",
        path: "/nodes/{node}/storage/{storage}/content",
        endpoint: Endpoint::ContentCreate,
        protected: true,
        check: Check::AnyOf(STORAGE, &["Datastore.AllocateSpace"]),
        properties: &[
            NODE,
            STORE,
            VMID,
            ("filename", Type::Text(255), true),
            ("size", Type::AllocationSize, true),
            ("format", Type::Choice("raw, qcow2, subvol, vmdk"), false),
        ],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/storage/{storage}/content/{*volume}",
        endpoint: Endpoint::ContentLook,
        protected: true,
        check: Check::Anybody,
        properties: &[NODE, ("storage", Type::Storage, false), ("volume", Type::Text(1024), true)],
    },
    Route {
        method: "PUT",
        path: "/nodes/{node}/storage/{storage}/content/{*volume}",
        endpoint: Endpoint::ContentSet,
        protected: true,
        check: Check::Anybody,
        properties: &[
            NODE,
            ("storage", Type::Storage, false),
            ("volume", Type::Text(1024), true),
            ("notes", Type::Text(4096), false),
            ("protected", Type::Boolean, false),
        ],
    },
    Route {
        method: "POST",
        path: "/nodes/{node}/storage/{storage}/content/{*volume}",
        endpoint: Endpoint::ContentCopy,
        protected: true,
        check: Check::RootOnly,
        properties: &[
            NODE,
            ("storage", Type::Storage, false),
            ("volume", Type::Text(1024), true),
            ("target", Type::Text(1024), true),
            ("target_node", Type::Text(64), false),
        ],
    },
    Route {
        method: "DELETE",
        path: "/nodes/{node}/storage/{storage}/content/{*volume}",
        endpoint: Endpoint::ContentDelete,
        protected: true,
        check: Check::Anybody,
        properties: &[NODE, ("storage", Type::Storage, false), ("volume", Type::Text(1024), true), ("delay", DELAY, false)],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/tasks",
        endpoint: Endpoint::TaskList,
        protected: false,
        check: Check::Anybody,
        properties: &[
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
    },
    Route {
        method: "DELETE",
        path: "/nodes/{node}/tasks/{upid}",
        endpoint: Endpoint::TaskStop,
        protected: true,
        check: Check::Anybody,
        properties: &[NODE, ("upid", Type::Text(512), true)],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/tasks/{upid}/status",
        endpoint: Endpoint::TaskStatus,
        protected: true,
        check: Check::Anybody,
        properties: &[NODE, ("upid", Type::Text(512), true)],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/tasks/{upid}/log",
        endpoint: Endpoint::TaskLog,
        protected: true,
        check: Check::Anybody,
        properties: &[
            NODE,
            ("upid", Type::Text(512), true),
            ("start", Type::Integer(0, i64::MAX), false),
            ("limit", Type::Integer(0, i64::MAX), false),
            ("download", Type::Boolean, false),
        ],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/qemu",
        endpoint: Endpoint::VmList,
        protected: true,
        check: Check::Anybody,
        properties: &[NODE, ("full", Type::Boolean, false)],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/qemu/{vmid}/status/current",
        endpoint: Endpoint::VmStatus,
        protected: true,
        check: AUDIT,
        properties: &[NODE, VMID],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/qemu/{vmid}/config",
        endpoint: Endpoint::VmConfig,
        protected: false,
        check: AUDIT,
        properties: &[NODE, VMID, ("current", Type::Boolean, false), ("snapshot", Type::SnapshotName, false)],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/lxc/{vmid}/config",
        endpoint: Endpoint::ContainerConfig,
        protected: false,
        check: AUDIT,
        properties: &[NODE, VMID],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/qemu/{vmid}/pending",
        endpoint: Endpoint::VmPending,
        protected: false,
        check: AUDIT,
        properties: &[NODE, VMID],
    },
    Route {
        method: "PUT",
        path: "/nodes/{node}/qemu/{vmid}/config",
        endpoint: Endpoint::VmUpdate,
        protected: true,
        check: CONFIGURES,
        properties: &[
            NODE,
            VMID,
            DIGEST,
            ("delete", Type::Text(8192), false),
            ("revert", Type::Text(8192), false),
            ("force", Type::Boolean, false),
            ("skiplock", Type::Boolean, false),
        ],
    },
    Route {
        method: "POST",
        path: "/nodes/{node}/qemu/{vmid}/config",
        endpoint: Endpoint::VmUpdateAsync,
        protected: true,
        check: CONFIGURES,
        properties: &[
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
    },
    Route {
        method: "PUT",
        path: "/nodes/{node}/qemu/{vmid}/unlink",
        endpoint: Endpoint::VmUnlink,
        protected: true,
        check: Check::AnyOf(VM, &["VM.Config.Disk"]),
        properties: &[NODE, VMID, ("idlist", Type::Text(8192), true), ("force", Type::Boolean, false)],
    },
    Route {
        method: "PUT",
        path: "/nodes/{node}/qemu/{vmid}/resize",
        endpoint: Endpoint::VmResize,
        protected: true,
        check: Check::AnyOf(VM, &["VM.Config.Disk"]),
        properties: &[
            NODE,
            VMID,
            DIGEST,
            ("disk", Type::DriveName, true),
            ("size", Type::ResizeSize, true),
            ("skiplock", Type::Boolean, false),
        ],
    },
    Route {
        method: "POST",
        path: "/nodes/{node}/qemu/{vmid}/status/start",
        endpoint: Endpoint::VmStart,
        protected: true,
        check: POWER,
        properties: &[NODE, VMID, ("skiplock", Type::Boolean, false), ("timeout", Type::Integer(0, i64::MAX), false)],
    },
    Route {
        method: "POST",
        path: "/nodes/{node}/qemu/{vmid}/status/stop",
        endpoint: Endpoint::VmStop,
        protected: true,
        check: POWER,
        properties: &[NODE, VMID, ("skiplock", Type::Boolean, false), ("timeout", Type::Integer(0, i64::MAX), false)],
    },
    Route {
        method: "POST",
        path: "/nodes/{node}/qemu/{vmid}/status/suspend",
        endpoint: Endpoint::VmSuspend,
        protected: true,
        check: POWER,
        properties: &[NODE, VMID, ("skiplock", Type::Boolean, false), ("timeout", Type::Integer(0, i64::MAX), false)],
    },
    Route {
        method: "POST",
        path: "/nodes/{node}/qemu/{vmid}/status/resume",
        endpoint: Endpoint::VmResume,
        protected: true,
        check: POWER,
        properties: &[NODE, VMID, ("skiplock", Type::Boolean, false), ("timeout", Type::Integer(0, i64::MAX), false)],
    },
    Route {
        method: "GET",
        path: "/nodes/{node}/qemu/{vmid}/snapshot",
        endpoint: Endpoint::SnapshotList,
        protected: true,
        check: AUDIT,
        properties: &[NODE, VMID],
    },
    Route {
        method: "POST",
        path: "/nodes/{node}/qemu/{vmid}/snapshot",
        endpoint: Endpoint::SnapshotCreate,
        protected: true,
        check: Check::AnyOf(VM, &["VM.Snapshot"]),
        properties: &[
            NODE,
            VMID,
            ("snapname", Type::SnapshotName, true),
            ("vmstate", Type::Boolean, false),
            ("description", Type::Text(8192), false),
        ],
    },
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

/// The 400 of a call whose parameters do not follow the schema.
pub(crate) fn verify(call: &Call) -> Result<(), ApiError> {
    let properties = call.properties;
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
