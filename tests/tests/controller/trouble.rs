//! Bad config, token, certificate or network: said in one sentence, never the end, and over when it is repaired.

use std::sync::Arc;
use std::time::{Duration, Instant};

use controller::run::Controller;
use controller::service::ControllerService;
use testbed::sim::{STANDARD_PASSWORD, Simulator};
use tonic::{Code, Status};

use crate::bed::{Bed, MIB, REGION, assert_refused, clusters, create_request, standard, with_config};

/// A repaired file is noticed within a second; more is a fault.
const REPAIR_LIMIT: Duration = Duration::from_secs(20);

async fn create(bed: &Bed) -> Result<proto::csi::Volume, Status> {
    bed.create_as(create_request("pvc-1", "local", 64 * MIB)).await
}

async fn recovers(bed: &Bed) {
    let begun = Instant::now();
    loop {
        match create(bed).await {
            Ok(_) => return,
            Err(status) => assert!(begun.elapsed() < REPAIR_LIMIT, "still: {}", status.message()),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// W51: nothing needs a restart of the controller: config and credentials are read again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_config_file_is_said_and_its_repair_noticed() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let good = clusters(sim.url());
    let cases = [
        (
            format!("features:\n  controllerVMID: 9999\n{good}"),
            "line 2: features has the key \"controllerVMID\"; write it \"controllerVmID\"",
        ),
        (good.replace("region", "regoin"), "unknown key \"regoin\""),
        (good.replace("token_secret", "token_secret_file"), "token_secret_file"),
        ("clusters: [".into(), "YAML"),
        (String::new(), "is empty"),
    ];
    for (text, words) in cases {
        let bed = with_config(Arc::clone(&sim), &text);
        assert_refused(create(&bed).await, Code::FailedPrecondition, &[words, &bed.config.display().to_string()]);
        std::fs::write(&bed.config, &good).unwrap();
        recovers(&bed).await;
    }
    // Missing at first: a secret that is mounted later.
    let bed = with_config(Arc::clone(&sim), &good);
    std::fs::remove_file(&bed.config).unwrap();
    let controller = Arc::new(Controller::new(bed.config.clone(), None));
    assert!(controller.ready().unwrap_err().contains("cannot be read"));
    let late = Bed { sim, csi: ControllerService::new(Arc::clone(&controller)), config: bed.config.clone() };
    assert_refused(create(&late).await, Code::FailedPrecondition, &["cannot be read"]);
    std::fs::write(&late.config, &good).unwrap();
    recovers(&late).await;
    assert_eq!(controller.ready(), Ok(()));
    // Broken again while in use: what was read before stays.
    std::fs::write(&late.config, "nonsense: 1").unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    create(&late).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_token_is_said_and_its_repair_noticed() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let good = clusters(sim.url());
    let bed = with_config(sim, &good.replace("token_secret: \"c5", "token_secret: \"d5"));
    assert_refused(create(&bed).await, Code::FailedPrecondition, &["401 Authentication failed!", "token_id", "config file"]);
    std::fs::write(&bed.config, &good).unwrap();
    recovers(&bed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_secret_is_in_no_answer() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let bed = with_config(sim, &clusters("http://127.0.0.1:1").replace("token_secret: \"", "token_secret: \"hunter2"));
    let refused = create(&bed).await.unwrap_err();
    assert!(!refused.message().contains("hunter2") && !format!("{:?}", bed.csi).contains("hunter2"), "{}", refused.message());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_not_there_or_not_proxmox() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let bed = with_config(Arc::clone(&sim), &clusters("http://127.0.0.1:1"));
    assert_refused(create(&bed).await, Code::Unavailable, &["region fsn1", "http://127.0.0.1:1/api2/json", "cannot be reached"]);
    std::fs::write(&bed.config, clusters(sim.url())).unwrap();
    recovers(&bed).await;
    let bed = with_config(sim, &clusters("https://host.invalid:8006"));
    assert_refused(create(&bed).await, Code::Unavailable, &["host.invalid"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_not_trusted() {
    let sim = Arc::new(Simulator::standard().https().start().await.unwrap());
    let good = clusters(sim.url());
    let bed = with_config(Arc::clone(&sim), &good);
    assert_refused(create(&bed).await, Code::Unavailable, &["certificate", "SSL_CERT_FILE", "insecure: true"]);
    assert!(sim.requests().is_empty(), "nothing is sent to a stranger: {:?}", sim.requests());
    std::fs::write(&bed.config, good.replace("    region", "    insecure: true\n    region")).unwrap();
    recovers(&bed).await;
    // Verified with its own certificate as the CA.
    let bundle = bed.config.with_file_name("ca.pem");
    std::fs::write(&bundle, sim.certificate_pem().unwrap()).unwrap();
    std::fs::write(&bed.config, &good).unwrap();
    let csi = ControllerService::new(Arc::new(Controller::new(bed.config.clone(), Some(bundle))));
    let request = proto::csi::ControllerGetCapabilitiesRequest {};
    proto::csi::controller_server::Controller::controller_get_capabilities(&csi, tonic::Request::new(request)).await.unwrap();
    let request = tonic::Request::new(create_request("pvc-1", "local", 64 * MIB));
    proto::csi::controller_server::Controller::create_volume(&csi, request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_with_a_password_works_too() {
    let sim = Arc::new(Simulator::standard().start().await.unwrap());
    let text = |password: &str| {
        format!("clusters:\n  - url: {}\n    region: {REGION}\n    username: csi@pve\n    password: {password}\n", sim.url())
    };
    let bed = with_config(Arc::clone(&sim), &text("wrong"));
    assert_refused(create(&bed).await, Code::FailedPrecondition, &["authentication failure", "username and password"]);
    std::fs::write(&bed.config, text(STANDARD_PASSWORD)).unwrap();
    recovers(&bed).await;
    let volume = bed.volume("pvc-2", "local").await;
    bed.publish(&volume, "node-101/101").await.unwrap();
    bed.unpublish(&volume, "node-101/101").await.unwrap();
    bed.delete(&volume.to_string()).await.unwrap();
    // A ticket that the server no longer takes is renewed; two hours are nothing to a simulator.
    sim.advance(Duration::from_secs(3 * 3600));
    bed.volume("pvc-3", "local").await;
    let logins = sim.requests().iter().filter(|request| request.contains("/access/ticket")).count();
    assert!(logins >= 2, "{logins}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_privilege_to_create_keeps_its_name() {
    let bed = standard().await;
    bed.sim.set_role("CSI", &["VM.Audit", "VM.Config.Disk", "Datastore.Audit"]);
    assert_refused(create(&bed).await, Code::PermissionDenied, &["Permission check failed (/storage/local, Datastore.AllocateSpace)"]);
    bed.sim.set_role("CSI", &["VM.Audit", "Datastore.AllocateSpace"]);
    let other = Bed {
        sim: Arc::clone(&bed.sim),
        csi: ControllerService::new(Arc::new(Controller::new(bed.config.clone(), None))),
        config: bed.config.with_file_name("unused").join("unused"),
    };
    assert_refused(create(&other).await, Code::InvalidArgument, &["no such storage is shown", "Datastore.Audit"]);
}
