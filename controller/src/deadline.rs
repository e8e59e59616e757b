//! How long the caller of an RPC still waits: gRPC's `grpc-timeout`, known to all that works for the call.

use std::future::Future;
use std::time::Duration;

use tokio::time::Instant;

/// Taken off the caller's patience: the answer must still reach it.
const MARGIN: Duration = Duration::from_secs(1);

tokio::task_local! {
    static DEADLINE: Option<Instant>;
}

/// Runs `work` with the patience of a caller who said `timeout` (`15S`); nothing: it said nothing.
pub async fn within<T>(timeout: Option<&str>, work: impl Future<Output = T>) -> T {
    let deadline = timeout.and_then(parse).map(|left| Instant::now() + left.saturating_sub(MARGIN));
    DEADLINE.scope(deadline, work).await
}

/// When the caller should have its answer; nothing: it said nothing.
#[must_use]
pub fn of_caller() -> Option<Instant> {
    DEADLINE.try_with(|deadline| *deadline).ok().flatten()
}

/// gRPC: at most eight digits and a unit.
fn parse(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = Some(number).filter(|digits| digits.len() <= 8 && digits.bytes().all(|b| b.is_ascii_digit()))?.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number.saturating_mul(3600))),
        "M" => Some(Duration::from_secs(number.saturating_mul(60))),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_as_grpc_writes_them() {
        assert_eq!(parse("15S"), Some(Duration::from_secs(15)));
        assert_eq!(parse("2000000u"), Some(Duration::from_secs(2)));
        assert_eq!(parse("1H"), Some(Duration::from_secs(3600)));
        for wrong in ["", "S", "15", "-1S", "123456789S", "1s", "1é"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[tokio::test]
    async fn the_answer_is_due_before_the_caller_leaves() {
        let due = within(Some("10S"), async { of_caller() }).await;
        let left = due.unwrap().saturating_duration_since(Instant::now());
        assert!(left <= Duration::from_secs(9) && left > Duration::from_secs(5), "{left:?}");
        assert_eq!(within(None, async { of_caller() }).await, None);
        assert_eq!(of_caller(), None);
    }
}
