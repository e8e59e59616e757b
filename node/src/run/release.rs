//! What others have made of a disk that is to be detached: a pod's own dm-crypt, LVM or md on its raw block volume, or what the node's system has
//! found there and activated by itself.

use super::Node;
use crate::error::Cause;
use crate::identity;
use crate::sys::block::{Access, Device};
use crate::sys::scsi::{self, Disk, State};
use crate::sys::{self, Dev, dm};

/// Devices above one disk: a thin pool of LVM is three and its volumes, a machine's disk some more.
const MAX_ABOVE: usize = 64;

impl Node {
    /// Where one of the devices is shown to a pod. A bind of its node, and a pod's ordinary open, are no claim that the kernel would refuse an
    /// exclusive open for.
    pub(super) fn shown_at(&self, devices: &[Dev]) -> Result<Option<String>, Cause> {
        let shown = self.shown_devices(super::look::rdev)?;
        Ok(shown.into_iter().find(|(dev, _)| devices.contains(dev)).map(|(_, at)| format!("shown at {}: unpublish it first", at.display())))
    }

    /// The same of mappings that are there.
    pub(super) fn mappings_shown_at(&self, mappings: &[dm::Mapping]) -> Result<Option<String>, Cause> {
        let devices: Vec<Dev> = mappings.iter().map(|mapping| mapping.dev).collect();
        if devices.is_empty() { Ok(None) } else { self.shown_at(&devices) }
    }

    /// Who uses what was made of the disk; `None`: nobody, and all that was written there has reached the disk.
    pub(super) fn used_above(&self, disk: &Disk) -> Result<Option<String>, Cause> {
        let mut above = scsi::holders(&self.sysfs, &disk.name)?;
        let mut next = 0;
        while let Some(name) = above.get(next).cloned() {
            next += 1;
            if next > MAX_ABOVE {
                return Ok(Some(format!("more than {MAX_ABOVE} devices are made of it, {name} among them")));
            }
            let over = scsi::holders(&self.sysfs, &name)?;
            if let Some(by) = self.used(&name, over.is_empty(), disk)? {
                return Ok(Some(by));
            }
            for name in over {
                if !above.contains(&name) {
                    above.push(name);
                }
            }
        }
        proto::warn!("{} is held by {}, which nothing uses", identity::name(disk), above.join(", "));
        Ok(None)
    }

    /// How a device above the disk is used; `None`: it is not, and is written out. `is_topmost`: nothing is made of it.
    fn used(&self, name: &str, is_topmost: bool, disk: &Disk) -> Result<Option<String>, Cause> {
        let folder = self.sysfs.join("class/block").join(name);
        let text = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        let passing = || Ok(Some(format!("held by {name}, which comes or goes")));
        let Ok(dev) = text("dev").trim().parse::<Dev>() else { return passing() };
        // Whoever waits for its I/O would wait for ever.
        if text("dm/suspended").trim() == "1" {
            return Ok(Some(format!("held by {name}, which is suspended: `dmsetup resume {}`", text("dm/name").trim())));
        }
        let access = if is_topmost { Access::ExclusiveRead } else { Access::Shared };
        let write_out = |device: Device| if disk.read_only { Ok(()) } else { device.flush() };
        match Device::open(&self.devices.join(name), dev, access).and_then(write_out) {
            Ok(()) => Ok(None),
            Err(error) if error.errno == rustix::io::Errno::BUSY => {
                let at = self.mounts()?.into_iter().find(|mount| mount.dev == dev).map(|mount| mount.point);
                Ok(Some(match at {
                    Some(at) => format!("held by {name}, which is mounted at {}", at.display()),
                    None => format!("held by {name}, which is in use (a container that has not ended)"),
                }))
            }
            Err(error) if scsi::is_gone(error.errno) => passing(),
            // Nothing more can be lost of a disk that is gone, or takes no I/O.
            Err(_) if !self.takes_io(disk)? => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn takes_io(&self, disk: &Disk) -> Result<bool, sys::Error> {
        Ok(scsi::disk(&self.sysfs, disk.address)?.is_some_and(|now| now.is(disk) && now.state == State::Running))
    }
}
