//! Random histories.

use testbed::history::{History, check, shrink};

/// Seeds of the histories that `scripts/test` runs; `PROXMOX_CSI_HISTORIES=FIRST:COUNT` takes others.
const SHARE: (u64, u64) = (1, 80);
/// A failing history is run so often at most to find a shorter one.
const SHRINK_RUNS: usize = 150;

fn seeds() -> std::ops::Range<u64> {
    let wanted = std::env::var("PROXMOX_CSI_HISTORIES").ok();
    let wanted = wanted.as_deref().and_then(|text| text.split_once(':'));
    let (first, count) = wanted.map_or(SHARE, |(first, count)| (first.parse().unwrap(), count.parse().unwrap()));
    first..first + count
}

#[test]
fn the_same_seed_gives_the_same_log() {
    proto::log::set_level("error").unwrap();
    for seed in 1..=12 {
        let run = |seed| match check(&History::new(seed)) {
            Ok(log) => log,
            Err(failure) => failure.log,
        };
        let (first, second) = (run(seed), run(seed));
        let differs = first.iter().zip(&second).position(|(one, other)| one != other);
        assert!(
            first == second,
            "seed {seed} differs at {differs:?}: {:?} {:?}",
            differs.map(|at| &first[at]),
            differs.map(|at| &second[at])
        );
    }
}

#[test]
fn random_histories() {
    proto::log::set_level("error").unwrap();
    let mut failed = Vec::new();
    let begun = std::time::Instant::now();
    let mut steps = 0;
    for seed in seeds() {
        match check(&History::new(seed)) {
            Ok(log) => steps += log.len(),
            Err(failure) => {
                let failure = shrink(failure, SHRINK_RUNS);
                println!("{failure}");
                failed.push((seed, failure.what));
            }
        }
    }
    println!("{} histories, {steps} lines, {:.1} s", seeds().count(), begun.elapsed().as_secs_f64());
    assert!(failed.is_empty(), "{failed:#?}");
}
