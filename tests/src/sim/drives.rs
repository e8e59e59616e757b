//! PUT resize: every check is the task's (`reference/proxmox-api.md` §14).

use std::sync::Arc;

use serde_json::Value;

use super::answer::{ApiError, Reply};
use super::drive::{Drive, parse_size};
use super::hotplug;
use super::route::Call;
use super::state::Cluster;
use super::tasks::Log;

type Result<T> = std::result::Result<T, ApiError>;

struct Wish {
    node: String,
    vmid: u32,
    caller: super::access::Caller,
    disk: String,
    size: String,
    digest: Option<String>,
}

pub(crate) fn resize(cluster: &Arc<Cluster>, call: &Call) -> Result<Reply> {
    if call.flag("skiplock") && !call.caller.is_root() {
        return Err(ApiError::param("skiplock", "Only root may use this option."));
    }
    let wish = Wish {
        node: call.node.clone(),
        vmid: call.vmid(),
        caller: call.caller.clone(),
        disk: call.text("disk").to_owned(),
        size: call.text("size").to_owned(),
        digest: call.get("digest").map(str::to_owned),
    };
    let id = wish.vmid.to_string();
    let upid =
        cluster.fork(&call.node, "resize", &id, &call.caller, move |cluster, log| async move { perform(&cluster, &wish, &log).await });
    Ok(Value::String(upid).into())
}

async fn perform(cluster: &Arc<Cluster>, wish: &Wish, log: &Log) -> Result<()> {
    let (node, vmid, disk) = (wish.node.as_str(), wish.vmid, wish.disk.as_str());
    cluster.state().vm(node, vmid)?;
    let held = cluster.lock_config(vmid).await?;
    let (mut drive, running, wanted, had) = {
        let state = cluster.state();
        let vm = state.vm(node, vmid)?;
        vm.check_digest(wish.digest.as_deref())?;
        vm.check_lock()?;
        let line = vm.config.get(disk).ok_or_else(|| ApiError::die(format!("disk '{disk}' does not exist")))?;
        let drive = Drive::stored(line);
        if drive.is_cdrom() {
            return Err(ApiError::die("you can't resize a cdrom"));
        }
        let (storage, name) = state.volume(&drive.file)?;
        state.access.require(&wish.caller, &format!("/storage/{}", storage.about.id), &["Datastore.AllocateSpace"])?;
        storage.activate(node)?;
        let had = storage.size(node, &name).ok_or_else(|| storage.missing_at_attach(&name, true))?;
        if name.format == "vmdk" {
            return Err(ApiError::die("can't resize this image format"));
        }
        (drive, vm.running, target(&wish.size, had), had)
    };
    if wanted < had {
        return Err(ApiError::die("shrinking disks is not supported"));
    }
    if wanted > had {
        cluster.clock.sleep(cluster.latency.storage).await;
        let padded = wanted.next_multiple_of(1024);
        {
            let state = cluster.state();
            let (storage, name) = state.volume(&drive.file)?;
            storage.resize(node, &name, padded)?;
        }
        if running {
            hotplug::announce_size(cluster, node, vmid, disk, padded).await?;
        } else {
            log.print("Image resized.");
        }
        drive.set_size(wanted);
        cluster.state().vm_mut(node, vmid)?.config.current.insert(disk.to_owned(), drive.print());
    }
    drop(held);
    Ok(())
}

/// `+1M`, `0.03G`, `22020097` → bytes.
fn target(size: &str, had: u64) -> u64 {
    let (added, number) = size.strip_prefix('+').map_or((0, size), |number| (had, number));
    added.saturating_add(parse_size(number).unwrap_or_else(|| fraction(number)))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "Perl's int() of a float; saturates"
)]
fn fraction(number: &str) -> u64 {
    let digits = number.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = parse_size(&format!("1{}", number.get(digits.len()..).unwrap_or_default())).unwrap_or(1);
    (digits.parse::<f64>().unwrap_or(0.0) * unit as f64) as u64
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_of_the_recording() {
        assert_eq!(super::target("0.03G", 0), 32_212_254);
        assert_eq!(super::target("+1M", 20 << 20), 21 << 20);
        assert_eq!(super::target("22020097", 0), 22_020_097);
    }
}
