//! The threads of the process: one that runs everything, and one more for each call that waits for an answer.

use std::time::Duration;

/// Each call holds one thread while it waits. So many that clusters which hang, all of them even, take none from another one, nor
/// from the Lease; they are made when needed only.
const MAX_BLOCKING_THREADS: usize = crate::config::MAX_CLUSTERS * crate::pve::THREADS_PER_CLUSTER + crate::kube::THREADS;
/// Idle threads go, and their stacks with them.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What a process of ours runs in.
///
/// # Errors
/// The kernel's.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().max_blocking_threads(MAX_BLOCKING_THREADS).thread_keep_alive(THREAD_KEEP_ALIVE).build()
}
