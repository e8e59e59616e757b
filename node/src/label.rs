//! The SELinux label of what is mounted, where neither class nor kubelet gives one.
//!
//! Pure. A new filesystem has no labels, and Talos' policy knows a label for what pods may write to: without it every access is logged as denied,
//! and is denied where the policy is enforced. On any other system the class gives a label by its mount options, or kubelet does
//! (SELinuxMount), if one is wanted. An empty one (`context=` among the class' mountOptions) means none, on Talos too.

use crate::sys::mount::Options;

/// As Talos' documentation has it for a StorageClass (mountOptions).
const TALOS: &str = "context=system_u:object_r:ephemeral_t:s0";

/// What the machine says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// `uname -r`: `6.18.45-talos`.
    pub kernel: String,
    /// SELinux is on: `/sys/fs/selinux` is there (made when the kernel starts with it).
    pub has_selinux: bool,
    /// The own label (`/proc/self/attr/current`): `system_u:system_r:pod_t:s0`; `kernel` before a policy is loaded, which would refuse ours.
    pub own: String,
}

/// The option to add; `None`: none.
#[must_use]
pub fn by_default(machine: &Machine, options: &Options) -> Option<&'static str> {
    let is_talos = machine.kernel.trim_end().ends_with("-talos");
    let has_policy = machine.has_selinux && machine.own.contains(':');
    let is_given = options.rules_label_out() || options.label().is_some();
    (is_talos && has_policy && !is_given).then_some(TALOS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn talos_with_a_policy_gets_its_label_unless_one_is_given() {
        let talos = Machine { kernel: "6.18.45-talos\n".into(), has_selinux: true, own: "system_u:system_r:pod_t:s0\0".into() };
        let none = Options::parse(["noatime"]);
        assert_eq!(by_default(&talos, &none), Some(TALOS));
        for given in [
            "context=",
            "noatime,context=\"\"",
            "context=\"a:b:c:s0:c1,c2\"",
            "noatime,context=a:b:c:s0",
            "fscontext=a:b:c",
            "defcontext=a:b:c",
            "rootcontext=a:b:c",
        ] {
            assert_eq!(by_default(&talos, &Options::parse([given])), None, "{given}");
        }
        for other in [
            Machine { kernel: "6.1.0-37-amd64".into(), ..talos.clone() },
            Machine { kernel: "6.18.45-talos-debug".into(), ..talos.clone() },
            Machine { has_selinux: false, ..talos.clone() },
            Machine { own: "kernel".into(), ..talos.clone() },
            Machine { own: String::new(), ..talos.clone() },
        ] {
            assert_eq!(by_default(&other, &none), None, "{other:?}");
        }
    }
}
