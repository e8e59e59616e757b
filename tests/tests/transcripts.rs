//! The simulator against recordings of the real daemons (Proxmox VE 9.2): every request is played again, and status, reason, headers,
//! body, task and resulting state must be the same, volatile fields aside.
//!
//! What the simulator does not have yet is listed once (`NOT_THERE_YET`); whatever else stays different has a line and a reason in the
//! stage's `skips`, and fails the test when it is no longer needed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test: what is not as expected shall panic")]

#[path = "transcripts/checked.rs"]
mod checked;
#[path = "transcripts/player.rs"]
mod player;
#[path = "transcripts/recording.rs"]
mod recording;
#[path = "transcripts/same.rs"]
mod same;
#[path = "transcripts/stage.rs"]
mod stage;
#[path = "transcripts/stages.rs"]
mod stages;

use std::sync::Arc;

use player::{NOT_THERE_YET, Player, Report};
use stage::Stage;
use testbed::sim::Simulator;

async fn play(stage: &Stage) -> Report {
    let file = format!("{}/tests/transcripts/{}.txt", env!("CARGO_MANIFEST_DIR"), stage.name);
    let items = recording::parse(&std::fs::read_to_string(&file).unwrap());
    let sim = Arc::new(Simulator::builder((stage.describe)()).start().await.unwrap());
    for (volid, size) in stage.volumes {
        sim.create_volume("pve1", volid, *size).unwrap_or_else(|error| panic!("{}: {volid}: {error}", stage.name));
    }
    Player::new(sim, stage).play(&items).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_as_the_recorded_daemons_did() {
    let only = std::env::var("TRANSCRIPT").ok();
    let mut differences = Vec::new();
    let (mut compared, mut cut, mut absent) = (0, 0, std::collections::BTreeMap::new());
    for stage in stages::all().iter().filter(|stage| only.as_ref().is_none_or(|only| stage.name == only)) {
        let report = play(stage).await;
        println!("{:55} {:4} compared, {:2} cut, {:2} differ", stage.name, report.compared, report.cut, report.differences.len());
        compared += report.compared;
        cut += report.cut;
        for (index, count) in report.absent {
            *absent.entry(index).or_insert(0) += count;
        }
        for (line, reason) in stage.skips.iter().filter(|(line, _)| !report.skipped.contains(line)) {
            differences.push(format!("{}:{line}: the skip is no longer needed ({reason})", stage.name));
        }
        differences.extend(report.differences);
    }
    println!("{compared} requests compared; {cut} more whose recorded body was cut: status line and headers only");
    for (index, (method, path, word)) in NOT_THERE_YET.iter().enumerate() {
        match absent.get(&index) {
            Some(count) => println!("not there yet: {method} {path} {word}: {count} requests"),
            None if only.is_none() => {
                differences.push(format!("{method} {path} {word} is there, or never asked for: take it off NOT_THERE_YET"))
            }
            None => {}
        }
    }
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
}
