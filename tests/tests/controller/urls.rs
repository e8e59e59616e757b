//! Several urls for one cluster, several clusters in one config, which certificates count, and files that change.

use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use base64ct::{Base64, Encoding as _};
use proto::csi;
use sha2::{Digest as _, Sha256};
use testbed::sim::{Effect, Fault, STANDARD_SECRET, Simulator};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::{Code, Status};

use crate::bed::{Bed, MIB, REGION, assert_refused, clusters, create_request, topology, with_config};

/// Where nothing listens.
const REFUSES: &str = "http://127.0.0.1:1";
/// One that hangs keeps a call for 40 s; who waits for it at all is found out by this.
const HANG: Duration = Duration::from_secs(25);

/// A Proxmox node before the simulator, which can fall silent: it still takes connections and requests, and answers nothing.
struct Front {
    url: String,
    silent: Arc<AtomicBool>,
    greeted: Arc<AtomicUsize>,
}

impl Front {
    async fn of(sim: &Simulator) -> Self {
        let to = sim.url().split('/').nth(2).unwrap().to_string();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (silent, greeted) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (is_silent, count) = (Arc::clone(&silent), Arc::clone(&greeted));
        tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                let far = TcpStream::connect(&to).await.unwrap();
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                tokio::spawn(pass_on(near_in, far_out, Arc::clone(&is_silent)));
                tokio::spawn(pass_on(far_in, near_out, Arc::clone(&is_silent)));
            }
        });
        Self { url, silent, greeted }
    }

    fn fall_silent(&self) {
        self.silent.store(true, Ordering::SeqCst);
    }

    fn greeted(&self) -> usize {
        self.greeted.load(Ordering::SeqCst)
    }
}

async fn pass_on(mut from: tokio::net::tcp::OwnedReadHalf, mut to: tokio::net::tcp::OwnedWriteHalf, silent: Arc<AtomicBool>) {
    let mut chunk = [0; 4096];
    while let Ok(amount @ 1..) = from.read(&mut chunk).await {
        if silent.load(Ordering::SeqCst) {
            return std::future::pending().await;
        }
        if to.write_all(&chunk[..amount]).await.is_err() {
            return;
        }
    }
}

fn with_urls(sim: &Arc<Simulator>, urls: &[&str]) -> Bed {
    let text = clusters("X").replace("url: X", &format!("urls: [{}]", urls.join(", ")));
    with_config(Arc::clone(sim), &text)
}

async fn create(bed: &Bed, name: &str) -> Result<csi::Volume, Status> {
    bed.create_as(csi::CreateVolumeRequest { accessibility_requirements: topology(&["pve1"]), ..create_request(name, "local", 64 * MIB) })
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_url_costs_nothing_where_another_one_answers() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    // Its kernel takes connections, and nobody ever answers.
    let hung = TcpListener::bind("127.0.0.1:0").unwrap();
    hung.set_nonblocking(true).unwrap();
    let hung_url = format!("http://{}", hung.local_addr().unwrap());
    let bed = with_urls(&sim, &[REFUSES, &hung_url, sim.url()]);
    let work = async {
        let volume = bed.volume("pvc-1", "local").await;
        bed.publish(&volume, "node-101/101").await.unwrap();
        bed.unpublish(&volume, "node-101/101").await.unwrap();
        bed.delete(&volume.to_string()).await.unwrap();
    };
    tokio::time::timeout(HANG, work).await.expect("the dead ones are waited for");
    let asked = std::iter::from_fn(|| hung.accept().ok()).count();
    assert_eq!(asked, 1, "it is not asked again while another one answers");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_falls_silent_in_the_middle_is_left_for_another() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let fronts = [Front::of(&sim).await, Front::of(&sim).await];
    let bed = with_urls(&sim, &[&fronts[0].url, &fronts[1].url]);
    let volume = bed.volume("pvc-1", "local").await;
    let used = if fronts[0].greeted() > fronts[1].greeted() { 0 } else { 1 };
    fronts[used].fall_silent();
    let attached = tokio::time::timeout(HANG, bed.publish(&volume, "node-101/101")).await.expect("the silent one is waited for");
    attached.unwrap();
    assert_eq!(bed.traces(101, &volume).len(), 2);
    // And remembered.
    let greeted = fronts[used].greeted();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    assert_eq!(fronts[used].greeted(), greeted);
    // It is back, and the other one is gone.
    fronts[used].silent.store(false, Ordering::SeqCst);
    fronts[1 - used].fall_silent();
    tokio::time::timeout(HANG, bed.publish(&volume, "node-101/101")).await.expect("the silent one is waited for").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_answer_is_lost_goes_to_no_other_url() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let fronts = [Front::of(&sim).await, Front::of(&sim).await];
    let bed = with_urls(&sim, &[&fronts[0].url, &fronts[1].url]);
    let volume = bed.volume("pvc-1", "local").await;
    for effect in [Effect::CloseAfterwards, Effect::Close] {
        sim.reset_counters();
        sim.inject(Fault::next("POST", "/nodes/*/qemu/101/config", effect.clone()));
        let answer = bed.publish(&volume, "node-101/101").await;
        let writes = sim.requests().iter().filter(|request| request.starts_with("POST") && request.contains("/config")).count();
        match effect {
            // Looked for afterwards, by way of the other one, and found.
            Effect::CloseAfterwards => assert!(answer.is_ok() && writes == 1, "{answer:?} {writes}"),
            // Nobody can tell that it was not done, until the VM was looked at; what is written then is another one.
            _ => assert!(writes <= 2 && (answer.is_ok() == (writes == 2)), "{answer:?} {writes}"),
        }
        let _ = bed.unpublish(&volume, "node-101/101").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_urls_dead_is_one_sentence_with_each_ones_cause() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let bed = with_urls(&sim, &[REFUSES, "http://127.0.0.1:2", "http://host.invalid:8006"]);
    let words = ["none of the 3 urls answers", "http://127.0.0.1:1/api2/json cannot be reached", "http://127.0.0.1:2/", "host.invalid"];
    assert_refused(create(&bed, "pvc-1").await, Code::Unavailable, &words);
}

/// A node that left the cluster (pvecm delnode), or a mistyped url, answers as well: for other VMs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_of_another_cluster_is_not_used() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let left = Simulator::standard().with(|about| about.cluster = String::new()).start().await.unwrap();
    let bed = with_urls(&sim, &[left.url(), sim.url()]);
    create(&bed, "pvc-1").await.unwrap();
    assert_eq!(sim.volumes("pve1", "local").len(), 1);
    let asked = |sim: &Simulator| {
        sim.requests().iter().filter(|request| !request.contains("/cluster/status") && !request.contains("/access/ticket")).count()
    };
    assert_eq!(asked(&left), 0, "{:?}", left.requests());
    // The one in use is silent: the other one does not take its place.
    let front = Front::of(&sim).await;
    let bed = with_urls(&sim, &[left.url(), &front.url]);
    create(&bed, "pvc-2").await.unwrap();
    front.fall_silent();
    let refused = tokio::time::timeout(HANG, create(&bed, "pvc-3")).await.expect("the silent one is waited for");
    assert_refused(refused, Code::Unavailable, &["is of node pve1 alone", "of one cluster", left.url()]);
    assert_eq!(asked(&left), 0, "{:?}", left.requests());
    // Two clusters: nobody can tell which is meant.
    let other = Simulator::standard().with(|about| about.cluster = "test".into()).start().await.unwrap();
    let bed = with_urls(&sim, &[other.url(), sim.url()]);
    assert_refused(create(&bed, "pvc-4").await, Code::Unavailable, &["cluster test", "cluster fsn1", "must be of one cluster"]);
    assert_eq!(asked(&other), 0, "{:?}", other.requests());
}

/// Another cluster's, perhaps: nobody can tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_whose_cluster_cannot_be_read_is_not_used() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let other = Simulator::standard().with(|about| about.cluster = "test".into()).start().await.unwrap();
    let broken = Effect::Answer { status: 500, reason: "got timeout".into() };
    other.inject(Fault { method: None, path: "/cluster/status".into(), nth: 1, times: 1000, effect: broken });
    let front = Front::of(&sim).await;
    let bed = with_urls(&sim, &[other.url(), &front.url]);
    create(&bed, "pvc-1").await.unwrap();
    front.fall_silent();
    let refused = tokio::time::timeout(HANG, create(&bed, "pvc-2")).await.expect("the silent one is waited for");
    assert_refused(refused, Code::Unavailable, &["its cluster cannot be told", "500", other.url()]);
    assert!(other.volumes("pve1", "local").is_empty());
    let asked = other.requests().iter().filter(|one| !one.contains("/cluster/status") && !one.contains("/access/ticket")).count();
    assert_eq!(asked, 0, "{:?}", other.requests());
}

/// It lost the others, and its proxy still answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_quorum_is_left_for_one_with_it() {
    let sims = [Arc::new(Simulator::standard().start().await.unwrap()), Arc::new(Simulator::standard().start().await.unwrap())];
    let bed = with_urls(&sims[0], &[sims[0].url(), sims[1].url()]);
    let volume: proto::VolumeHandle = "fsn1/pve1/local/9999/vm-9999-a.raw".parse().unwrap();
    assert_refused(bed.publish(&volume, "node-999/999").await, Code::NotFound, &["node-999/999"]);
    let used = if sims[0].requests().len() > sims[1].requests().len() { 0 } else { 1 };
    sims[used].set_quorate(false);
    assert_refused(bed.publish(&volume, "node-999/999").await, Code::Unavailable, &["no quorum"]);
    assert_refused(bed.publish(&volume, "node-999/999").await, Code::NotFound, &["node-999/999"]);
    // None has: said, and not left for each other all the time.
    sims[1 - used].set_quorate(false);
    for _ in 0..3 {
        assert_refused(bed.publish(&volume, "node-999/999").await, Code::Unavailable, &["no quorum"]);
    }
}

/// By its fingerprint, or by its CA in a file; a wrong one is named, and nothing is sent to a stranger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_counts_by_its_fingerprint_or_its_ca() {
    let sim = Arc::new(Simulator::standard().https().start().await.unwrap());
    let stranger = Simulator::standard().https().start().await.unwrap();
    let pem = |sim: &Simulator| sim.certificate_pem().unwrap().to_string();
    let pin = |pem: &str| {
        let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        let der = Sha256::digest(Base64::decode_vec(&body).unwrap());
        der.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
    };
    let (own, other) = (pin(&pem(&sim)), pin(&pem(&stranger)));
    let with = |line: &str| with_config(Arc::clone(&sim), &format!("{}    {line}\n", clusters(sim.url())));
    let bed = with(&format!("fingerprint: {other}"));
    assert_refused(create(&bed, "pvc-1").await, Code::Unavailable, &["has the fingerprint", &own, "config file"]);
    let ca = bed.config.with_file_name("ca.pem");
    std::fs::write(&ca, pem(&stranger)).unwrap();
    let by_ca = with(&format!("caFile: {}", ca.display()));
    assert_refused(create(&by_ca, "pvc-1").await, Code::Unavailable, &["certificate", "not trusted", "caFile"]);
    assert!(sim.requests().is_empty(), "nothing is sent to a stranger: {:?}", sim.requests());
    // The CA's file changes: read again.
    std::fs::write(&ca, pem(&sim)).unwrap();
    looked_at_again().await;
    create(&by_ca, "pvc-1").await.unwrap();
    create(&with(&format!("fingerprint: [\"{other}\", {}]", own.to_lowercase())), "pvc-2").await.unwrap();
    std::fs::write(&ca, "nothing").unwrap();
    assert_refused(create(&with(&format!("caFile: {}", ca.display())), "pvc-1").await, Code::FailedPrecondition, &["no certificate (PEM)"]);
}

/// The config file is looked at once a second, when a call comes.
async fn looked_at_again() {
    tokio::time::sleep(Duration::from_millis(1050)).await;
}

/// As kubelet does it: a new folder, and `..data` swapped over to it.
fn swap(volume: &Path, generation: &str, files: &[(&str, &str)]) {
    let folder = volume.join(format!("..{generation}"));
    std::fs::create_dir_all(&folder).unwrap();
    for (name, text) in files {
        std::fs::write(folder.join(name), text).unwrap();
        let link = volume.join(name);
        if !link.is_symlink() {
            symlink(Path::new("..data").join(name), link).unwrap();
        }
    }
    symlink(format!("..{generation}"), volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mounted_secret_that_is_swapped_is_read_again() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let bed = with_config(Arc::clone(&sim), "");
    let folder = bed.config.parent().unwrap();
    let (config, token) = (folder.join("config"), folder.join("token"));
    std::fs::create_dir_all(&config).unwrap();
    std::fs::create_dir_all(&token).unwrap();
    let inline = clusters(sim.url());
    let text =
        inline.replace(&format!("token_secret: \"{STANDARD_SECRET}\""), &format!("token_secret_file: {}", token.join("secret").display()));
    assert_ne!(text, inline);
    swap(&config, "1", &[("config.yaml", &text)]);
    // Of the same length as the right one, and of the same time below.
    let wrong = STANDARD_SECRET.replace(|c: char| c.is_ascii_digit(), "0");
    swap(&token, "1", &[("secret", &wrong)]);
    let old = std::fs::metadata(token.join("secret")).unwrap().modified().unwrap();
    let _ = std::fs::remove_file(&bed.config);
    symlink(config.join("config.yaml"), &bed.config).unwrap();
    let bed = Bed { csi: controller_on(&bed.config), sim: Arc::clone(&sim), config: bed.config.clone() };
    assert_refused(create(&bed, "pvc-1").await, Code::FailedPrecondition, &["401"]);
    swap(&token, "2", &[("secret", STANDARD_SECRET)]);
    std::fs::File::options().write(true).open(token.join("secret")).unwrap().set_modified(old).unwrap();
    looked_at_again().await;
    create(&bed, "pvc-1").await.unwrap();
    // Emptied by mistake: what was read before serves on.
    swap(&token, "3", &[("secret", "")]);
    looked_at_again().await;
    create(&bed, "pvc-2").await.unwrap();
    // Mended, though the config file itself stayed as it is: seen by its being wrong now.
    swap(&token, "4", &[("secret", &wrong)]);
    looked_at_again().await;
    assert_refused(create(&bed, "pvc-3").await, Code::FailedPrecondition, &["401"]);
}

fn controller_on(config: &Path) -> controller::service::ControllerService {
    controller::service::ControllerService::new(Arc::new(controller::run::Controller::new(config.into(), None)))
}

/// Two clusters, one of which hangs: its own calls wait, nobody else's, also where the other one would be asked for a name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_hangs_keeps_no_other_one_waiting() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let hung = TcpListener::bind("127.0.0.1:0").unwrap();
    let second = clusters(&format!("http://{}", hung.local_addr().unwrap())).replace("clusters:\n", "").replace(REGION, "hung");
    let bed = Arc::new(with_config(Arc::clone(&sim), &format!("{}{second}", clusters(sim.url()))));
    for n in 0..40 {
        let bed = Arc::clone(&bed);
        let request = csi::DeleteVolumeRequest { volume_id: format!("hung/pve1/local/vm-9999-pvc-{n}"), ..Default::default() };
        tokio::spawn(async move { bed.delete(&request.volume_id).await });
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let work = async {
        let volume: proto::VolumeHandle = create(&bed, "pvc-1").await.unwrap().volume_id.parse().unwrap();
        bed.publish(&volume, "node-101/101").await.unwrap();
        assert_refused(bed.publish(&volume, "node-999/999").await, Code::NotFound, &["node-999/999"]);
    };
    tokio::time::timeout(HANG, work).await.expect("the other cluster is waited for");
}
