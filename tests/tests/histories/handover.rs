//! Two attachments of one volume while the Lease goes from one controller to the next, the old holder stopped (SIGSTOP) in the
//! middle of its call: never two OKs, none left attached twice, and one wins in the end.
//!
//! What a stopped process had sent is on its way: Proxmox gets it within 5 s, or its proxy passes it on later, up to 30 s. What
//! it was about to send meets a closed connection when it goes on.

use std::time::Duration;

use testbed::history::chance::of_name;
use testbed::history::judge::all_traces;
use testbed::history::{Answer, Rpc, World, plan, under_paused_time};
use testbed::sim::{Effect, Fault, Waiting};
use tonic::Code;

use super::{CALL_LIMIT, SHARE, holders, pairs, rivals};

/// A Lease that is not given back: 15 s, and 35 s for what may still come; renewals that wait at the door besides.
const HANDOVER_LIMIT: Duration = Duration::from_secs(120);
/// A sidecar repeats for hours; a race is over after some calls.
const TRIES: usize = 12;
const BACK_OFF: Duration = Duration::from_secs(20);
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Requests of the old holder before it is stopped: more than its call has.
const MOST_STEPS: u64 = 60;

const OLD: &str = "c0";
const OLD_KUBE: &str = "c0 kube";

/// What became of the old holder's call, and of the rival's.
#[derive(Debug, Default)]
struct Answers {
    old: Option<Answer>,
    rival: Option<Answer>,
}

struct Race {
    world: World,
    seed: u64,
    old: usize,
    rival: Option<usize>,
    answers: Answers,
    /// Nothing of it goes in or out.
    is_stopped: bool,
    pause: Duration,
}

impl Race {
    fn take_answers(&mut self) {
        for (call, answer) in self.world.answers() {
            if call == self.old {
                self.answers.old = Some(answer);
            } else if Some(call) == self.rival {
                self.answers.rival = Some(answer);
            }
        }
    }

    fn is_of_old(one: &Waiting) -> bool {
        one.door == OLD || one.door == OLD_KUBE
    }

    /// One step, as the seed says; the Lease's own requests go first, since nobody renews for 10 s without them.
    async fn step(&mut self) {
        self.take_answers();
        let waiting = self.world.sim.waiting();
        let free = waiting.into_iter().filter(|one| !(self.is_stopped && Self::is_of_old(one)));
        let next = free.max_by_key(|one| (one.door.ends_with("kube"), of_name(self.seed, &format!("{one:?}"))));
        match next {
            Some(one) => {
                self.world.admit(&one).await.unwrap();
                self.pause = SHORTEST_PAUSE;
            }
            None => {
                self.world.pass(self.pause).await.unwrap();
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    async fn until(&mut self, what: &str, limit: Duration, done: impl Fn(&Race) -> bool) {
        let end = self.world.now() + limit;
        self.take_answers();
        while !done(self) {
            assert!(self.world.now() < end, "seed {}: no end of {what}\n{}", self.seed, self.world.log().join("\n"));
            self.step().await;
            self.take_answers();
        }
    }

    /// SIGSTOP after so many of its requests. What it has sent is on its way; the rest it finds closed later.
    async fn stop(&mut self) {
        let steps = of_name(self.seed, "stop") % MOST_STEPS;
        for _ in 0..steps {
            self.step().await;
        }
        self.is_stopped = true;
        self.world.note("SIGSTOP to c0");
        let on_its_way: Vec<Waiting> = self.world.sim.waiting().into_iter().filter(|one| one.door == OLD && !one.answer).collect();
        for one in on_its_way {
            match of_name(self.seed, &one.request) % 4 {
                // Still in the process.
                0 => continue,
                // Through a proxy that gives up, and is not heard of by who carries it out.
                1 | 2 if !one.request.starts_with("GET") => {
                    self.world.sim.inject(Fault { method: None, path: "/**".into(), nth: 1, times: 1, effect: Effect::TimeOutButComplete });
                }
                _ => self.world.pass(Duration::from_secs(of_name(self.seed, "network") % 5)).await.unwrap(),
            }
            self.world.admit(&one).await.unwrap();
        }
    }

    /// SIGCONT: what it sends now meets connections that Proxmox has closed.
    async fn go_on(&mut self) {
        self.world.note("SIGCONT to c0");
        self.is_stopped = false;
        for one in self.world.sim.waiting().into_iter().filter(|one| one.door == OLD && !one.answer) {
            self.world.sim.inject(Fault { method: None, path: "/**".into(), nth: 1, times: 1, effect: Effect::Close });
            self.world.admit(&one).await.unwrap();
        }
    }

    fn story(&self) -> String {
        format!("seed {}: {:?}\n{}", self.seed, self.answers, self.world.log().join("\n"))
    }
}

async fn one_pair(seed: u64) {
    let mut world = World::with_lease(plan::cluster(), 2, plan::claims()).await.unwrap();
    let (volume, [one, other]) = rivals(seed);
    world.answer_to(0, &Rpc::Create { volume }, CALL_LIMIT).await.unwrap().unwrap();
    let old = world.call(0, &Rpc::Publish { volume, vm: one }).unwrap();
    world.calm().await.unwrap();
    let mut race = Race { world, seed, old, rival: None, answers: Answers::default(), is_stopped: false, pause: SHORTEST_PAUSE };
    race.stop().await;
    race.until("the hand-over", HANDOVER_LIMIT, |race| race.world.serves(1)).await;
    race.rival = Some(race.world.call(1, &Rpc::Publish { volume, vm: other }).unwrap());
    // It goes on when the rival has its answer, or in the middle of that.
    let early = of_name(seed, "early").is_multiple_of(2);
    for _ in 0..if early { of_name(seed, "cont") % 30 } else { 0 } {
        race.step().await;
    }
    if !early {
        race.until("the rival's call", CALL_LIMIT, |race| race.answers.rival.is_some()).await;
    }
    race.go_on().await;
    race.until("both calls", CALL_LIMIT, |race| race.answers.old.is_some() && race.answers.rival.is_some()).await;
    race.until("the old holder", HANDOVER_LIMIT, |race| race.world.ends(0)).await;

    let Answers { old: Some(of_old), rival: Some(of_rival) } = &race.answers else { panic!("answered") };
    let story = || race.story();
    let mut has_it: Vec<u32> = [(one, of_old), (other, of_rival)].iter().filter(|(_, answer)| answer.is_ok()).map(|(vm, _)| *vm).collect();
    assert!(has_it.len() < 2, "two OKs: {}", story());
    for answer in [of_old, of_rival] {
        let code = answer.as_ref().err().map(tonic::Status::code);
        assert!(matches!(code, None | Some(Code::FailedPrecondition | Code::Aborted | Code::Unavailable)), "{}", story());
    }
    let left = holders(&race.world, volume);
    assert!(left.len() < 2 && has_it.iter().all(|vm| left == [*vm]), "left in {left:?}: {}", story());
    // As the sidecars do, which are the new holder's by now: both repeat until one has it.
    for _ in 0..TRIES {
        if !has_it.is_empty() {
            break;
        }
        for vm in [one, other] {
            if race.world.answer_to(1, &Rpc::Publish { volume, vm }, CALL_LIMIT).await.unwrap().is_ok() {
                has_it.push(vm);
            }
        }
        race.world.go_on(BACK_OFF, |_| false).await.unwrap();
    }
    assert_eq!(has_it.len(), 1, "after retries: {}", race.story());
    assert_eq!(holders(&race.world, volume), has_it, "{}", race.story());
    let volid = race.world.claims[volume].handle().unwrap().volid();
    assert!(all_traces(&race.world.sim, &volid).iter().all(|(_, traces)| traces.len() == 2), "{}", race.story());
}

#[test]
fn racing_pairs_at_a_handover_of_the_lease() {
    proto::log::set_level("error").unwrap();
    for seed in pairs(SHARE) {
        under_paused_time(async {
            one_pair(seed).await;
            Ok(())
        })
        .unwrap();
    }
}
