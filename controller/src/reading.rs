//! One reading for all who wait for it, its failure included: a Proxmox that is down costs each of them two tries at most, not one
//! for each who asked before.

use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use crate::pve;

/// What was last read, and when that began.
#[derive(Debug)]
pub(crate) struct Reading<T, E = pve::Error>(AsyncMutex<Held<T, E>>);

#[derive(Debug)]
struct Held<T, E> {
    read: Option<(Instant, T)>,
    failed: Option<(Instant, E)>,
}

impl<T, E> Default for Reading<T, E> {
    fn default() -> Self {
        Self(AsyncMutex::new(Held { read: None, failed: None }))
    }
}

impl<T: Clone, E: Clone> Reading<T, E> {
    /// Read since `since`; by `read` where it was not.
    ///
    /// # Errors
    /// Those of `read`; also those of a try that began after this was asked.
    pub(crate) async fn since(&self, since: Instant, read: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let asked = Instant::now();
        let mut held = self.0.lock().await;
        if let Some((_, read)) = held.read.as_ref().filter(|(read_at, _)| *read_at >= since) {
            return Ok(read.clone());
        }
        if let Some((_, error)) = held.failed.as_ref().filter(|(begun, _)| *begun > asked) {
            return Err(error.clone());
        }
        let begun = Instant::now();
        let done = read.await;
        match &done {
            Ok(read) => *held = Held { read: Some((begun, read.clone())), failed: None },
            Err(error) => held.failed = Some((begun, error.clone())),
        }
        done
    }

    /// The next one who asks reads.
    pub(crate) async fn distrust(&self) {
        self.0.lock().await.read = None;
    }

    /// Keeps what was read true with what was learned since.
    pub(crate) async fn amend(&self, amend: impl FnOnce(&mut T)) {
        if let Some((_, read)) = self.0.lock().await.read.as_mut() {
            amend(read);
        }
    }

    #[cfg(test)]
    pub(crate) async fn put(&self, read_at: Instant, read: T) {
        self.0.lock().await.read = Some((read_at, read));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;
    use tokio::task::JoinSet;

    use super::*;

    /// Before, each had a try of its own, one after the other: of 5 s each, the last of a hundred was told after 500 s.
    #[tokio::test]
    async fn a_failure_is_told_to_all_who_asked_before_it_began() {
        let (reading, tries) = (Arc::<Reading<u8, String>>::default(), Arc::<AtomicUsize>::default());
        let (asked, gives_up) = (Arc::<AtomicUsize>::default(), Arc::new(Semaphore::new(0)));
        let mut asking = JoinSet::new();
        for _ in 0..20 {
            let (reading, tries, asked, gives_up) = (Arc::clone(&reading), Arc::clone(&tries), Arc::clone(&asked), Arc::clone(&gives_up));
            asking.spawn(async move {
                asked.fetch_add(1, Ordering::SeqCst);
                let read = async {
                    tries.fetch_add(1, Ordering::SeqCst);
                    let _given_up = gives_up.acquire().await;
                    Err("down".to_string())
                };
                reading.since(Instant::now(), read).await
            });
        }
        while asked.load(Ordering::SeqCst) < 20 {
            tokio::task::yield_now().await;
        }
        gives_up.add_permits(1);
        for told in asking.join_all().await {
            assert_eq!(told, Err("down".to_string()));
        }
        assert_eq!(tries.load(Ordering::SeqCst), 2, "the one that went on, and one that began after all had asked");
        // Who asks later is told nothing old, and a failure takes away nothing that is new enough.
        let before = Instant::now();
        assert_eq!(reading.since(Instant::now(), async { Ok(7) }).await, Ok(7));
        assert!(reading.since(Instant::now(), async { Err("down".to_string()) }).await.is_err());
        assert_eq!(reading.since(before, async { Err("not asked for".to_string()) }).await, Ok(7));
    }
}
