//! When the blocks that a volume's filesystem does not use any more are given back to its storage: once a week, each volume at a time of its own.
//!
//! Pure: no I/O, no clock. A volume's time of the week follows from its name, so that nothing has to be remembered: an agent that was started anew
//! knows it too, a node's volumes come one after the other, and those of many nodes are spread over the week. A time at which no agent was
//! there is left out; a week later is the next.

use std::time::Duration;

/// As Debian's and Red Hat's fstrim.timer.
pub const PERIOD: Duration = Duration::from_secs(7 * 24 * 3600);
/// So many looks in a period: in a week, every ten minutes.
const LOOKS: u32 = 1008;
/// Two block groups of ext4, which it remembers as trimmed when a piece holds all of them.
const PIECE_BYTES: u64 = 256 << 20;
/// A look at all free extents of a group for each piece: no more pieces than this.
const MAX_PIECES: u64 = 256;

/// From one look at what is due to the next.
#[must_use]
pub fn pause(period: Duration) -> Duration {
    // A tenth of a second: for tests with a period of seconds.
    (period / LOOKS).max(Duration::from_millis(100))
}

/// Whether a time of the volume (by whatever names it for good) lies after `from` and not after `to`, both since 1970.
#[must_use]
pub fn is_due(name: &str, from: Duration, to: Duration, period: Duration) -> bool {
    let period = period.as_millis().max(1);
    let own = u128::from(spread(name)) % period;
    let passed = |moment: Duration| (moment.as_millis() + period - own) / period;
    passed(to) > passed(from)
}

/// How much of a filesystem of that size is done at once; between two pieces it is seen whether it is to end.
#[must_use]
pub fn piece_bytes(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(MAX_PIECES).div_ceil(PIECE_BYTES).saturating_mul(PIECE_BYTES).max(PIECE_BYTES)
}

/// The piece at that offset where the kernel gives free extents back as a whole, for each piece that touches them (xfs, seen with Linux 6.1): up to
/// the end of whole allocation groups, in which extents lie.
#[must_use]
pub fn whole_groups(at: u64, piece: u64, group_bytes: u64) -> u64 {
    let unit = piece.div_ceil(group_bytes.max(1)).saturating_mul(group_bytes.max(1));
    unit - at % unit.max(1)
}

/// FNV-1a: the same on every machine and in every release.
fn spread(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_volume_has_one_time_in_every_week_wherever_the_looks_fall() {
        for number in 0..200 {
            let name = format!("csi-{number:016x}");
            // From any moment of 2026 on, with looks of any length.
            let begin = Duration::from_secs(1_767_225_600 + 7919 * number);
            let pause = pause(PERIOD) + Duration::from_secs(number);
            let mut times = Vec::new();
            let mut now = begin;
            while now < begin + 4 * PERIOD {
                if is_due(&name, now, now + pause, PERIOD) {
                    times.push(now);
                }
                now += pause;
            }
            assert_eq!(times.len(), 4, "{name}");
            for pair in times.windows(2) {
                let between = pair[1] - pair[0];
                assert!(between >= PERIOD - pause && between <= PERIOD + pause, "{name}: {between:?}");
            }
        }
    }

    #[test]
    fn the_times_are_spread_over_the_week() {
        let day = PERIOD / 7;
        for number in 0..7 {
            let due = |name: &str| is_due(name, day * number, day * (number + 1), PERIOD);
            let on_that_day = (0..700).filter(|volume| due(&format!("csi-{volume:016x}"))).count();
            assert!((40..200).contains(&on_that_day), "{on_that_day} of 700 volumes on day {number}");
        }
    }

    #[test]
    fn pieces_are_whole_groups_and_not_too_many() {
        for size_bytes in [0, 1, 64 << 20, 1 << 30, (1 << 30) + 1, 1 << 40, (1 << 44) + 4096, u64::MAX] {
            let piece = piece_bytes(size_bytes);
            assert!(piece >= PIECE_BYTES && piece.is_multiple_of(PIECE_BYTES), "{size_bytes}: {piece}");
            assert!(size_bytes.div_ceil(piece) <= MAX_PIECES, "{size_bytes}: {piece}");
        }
        assert_eq!(piece_bytes(1 << 40), 4 << 30);
    }

    #[test]
    fn pieces_of_whole_groups_end_where_groups_end() {
        for (piece, group_bytes) in [(256 << 20, 1 << 30), (4 << 30, 256 << 30), (4 << 30, 16 << 20), (1 << 20, 1)] {
            let mut at = 3 * 4096_u64;
            for _ in 0..5 {
                let length = whole_groups(at, piece, group_bytes);
                assert!(length > 0 && length <= piece.next_multiple_of(group_bytes), "{piece}, {group_bytes}: {length}");
                at += length;
                assert!(at.is_multiple_of(group_bytes), "{piece}, {group_bytes}: {at}");
            }
        }
        assert!(whole_groups(7, 256 << 20, 0) > 0, "no geometry is no division by zero");
    }

    #[test]
    fn a_clock_that_stands_or_goes_back_makes_nothing_due() {
        let now = Duration::from_secs(1_767_225_600);
        for number in 0..50 {
            let name = format!("csi-{number:016x}");
            assert!(!is_due(&name, now, now, PERIOD) && !is_due(&name, now, now - PERIOD, PERIOD));
            assert!(is_due(&name, now, now + 3 * PERIOD, PERIOD), "one that jumps makes it due once");
        }
    }
}
