//! A moment as a person reads it in a sentence.

use std::time::{SystemTime, UNIX_EPOCH};

const DAY_S: u64 = 86_400;

/// `2026-11-21T16:33:07.000042Z`, as Kubernetes' MicroTime is written.
#[must_use]
pub(crate) fn rfc3339(moment: SystemTime) -> String {
    let micros = moment.duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_micros());
    let utc = utc(moment).replacen(' ', "T", 1);
    format!("{}.{micros:06}Z", utc.trim_end_matches(" UTC"))
}

/// `2026-11-21 16:33:07 UTC`
#[must_use]
pub(crate) fn utc(moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (year, month, day) = date(seconds / DAY_S);
    let of_day = seconds % DAY_S;
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// Days since 1970 → date. Years are counted from March on, so that a leap day is the last of its year.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next_year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates() {
        let moment = UNIX_EPOCH + Duration::from_micros(1_795_278_787_000_042);
        assert_eq!(rfc3339(moment), "2026-11-21T16:33:07.000042Z");
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_795_278_787, "2026-11-21 16:33:07 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
