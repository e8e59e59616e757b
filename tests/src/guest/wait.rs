//! Waiting for a named condition, never longer than its limit.

use std::time::{Duration, Instant};

/// Between two looks: short beside what is waited for (a hot-plug takes 50 ms and more), long beside a look.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Looks until there is something; `None` when the limit has passed. An error ends it at once.
pub fn until<T, E>(limit: Duration, mut look: impl FnMut() -> Result<Option<T>, E>) -> Result<Option<T>, E> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(Some(found));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::park_timeout(LOOK_AGAIN);
    }
}
