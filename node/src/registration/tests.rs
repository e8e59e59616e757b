use std::time::Instant;

use super::*;
use crate::testing::Folder;

/// Longer than any step here takes; what is waited for is named at each call.
const LIMIT: Duration = Duration::from_secs(20);

fn kubelet(folder: &Folder) -> Kubelet {
    Kubelet { folder: folder.path().into(), csi_socket: "/var/lib/kubelet/plugins/x/csi.sock".into() }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LIMIT, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn plugin(standing: &Standing) -> Plugin {
    Plugin { endpoint: "/e".into(), standing: standing.clone(), refused: Arc::default() }
}

async fn notify(plugin: &Plugin, plugin_registered: bool, error: &str) {
    use registration_server::Registration as _;
    let status = RegistrationStatus { plugin_registered, error: error.into() };
    plugin.notify_registration_status(Request::new(status)).await.unwrap();
}

#[tokio::test]
async fn kubelet_is_told_name_type_version_and_its_own_way_to_the_csi_socket() {
    use registration_server::Registration as _;
    let info = plugin(&Standing::default()).get_info(Request::new(InfoRequest {})).await.unwrap().into_inner();
    let told = (info.r#type.as_str(), info.name.as_str(), info.endpoint.as_str());
    assert_eq!(told, ("CSIPlugin", "csi.proxmox.sinextra.dev", "/e"));
    assert_eq!(info.supported_versions, ["1.0.0"]);
    assert!(kubelet(&Folder::new()).socket().ends_with(format!("{}-reg.sock", proto::DRIVER_NAME)));
}

#[tokio::test]
async fn kubelets_word_is_the_standing() {
    let standing = Standing::default();
    let plugin = plugin(&standing);
    notify(&plugin, true, "").await;
    assert_eq!(standing.get(), Ok(()));
    notify(&plugin, false, "detected topology value collision").await;
    assert!(standing.get().unwrap_err().contains("topology value collision"));
    // The refusal is heard: the socket will be made anew.
    tokio::time::timeout(LIMIT, plugin.refused.notified()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn while_unknown_it_stays_unregistered_and_says_why() {
    let (folder, standing, known) = (Folder::new(), Standing::default(), Arc::new(Mutex::new(Err("region unknown".to_string()))));
    let (stopping, stop) = watch::channel(false);
    let there = Arc::clone(&known);
    let task = tokio::spawn(run(Some(kubelet(&folder)), move || there.lock().unwrap().clone(), standing.clone(), stop));
    until("the reason", || standing.get() == Err("region unknown".into())).await;
    assert!(!kubelet(&folder).socket().exists());
    *known.lock().unwrap() = Ok(());
    until("the socket", || kubelet(&folder).socket().exists()).await;
    assert!(standing.get().unwrap_err().contains("kubelet has not answered yet"));
    stopping.send(true).unwrap();
    task.await.unwrap();
    assert!(!kubelet(&folder).socket().exists(), "a driver that is gone does not stay registered");
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_was_removed_is_made_anew_and_a_stale_one_replaced() {
    let (folder, standing) = (Folder::new(), Standing::default());
    let socket = kubelet(&folder).socket();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let (stopping, stop) = watch::channel(false);
    let task = tokio::spawn(run(Some(kubelet(&folder)), || Ok(()), standing.clone(), stop));
    until("an answer on the socket", || std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
    std::fs::remove_file(&socket).unwrap();
    until("another socket", || std::os::unix::net::UnixStream::connect(&socket).is_ok()).await;
    // Another process' own is not removed at our end.
    std::fs::remove_file(&socket).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    stopping.send(true).unwrap();
    task.await.unwrap();
    assert!(socket.exists());
}

#[tokio::test(start_paused = true)]
async fn a_folder_that_is_not_there_is_waited_for() {
    let (folder, standing) = (Folder::new(), Standing::default());
    let kubelet = Kubelet { folder: folder.path().join("plugins_registry"), ..kubelet(&folder) };
    let (stopping, stop) = watch::channel(false);
    let task = tokio::spawn(run(Some(kubelet.clone()), || Ok(()), standing.clone(), stop));
    until("the reason", || standing.get().is_err_and(|why| why.contains("is no folder"))).await;
    std::fs::create_dir(&kubelet.folder).unwrap();
    until("the socket", || kubelet.socket().exists()).await;
    stopping.send(true).unwrap();
    task.await.unwrap();
}

#[tokio::test]
async fn with_a_registrar_it_only_finds_out_who_it_is() {
    let standing = Standing::default();
    let (_stopping, stop) = watch::channel(false);
    run(None, || Ok(()), standing.clone(), stop).await;
    assert_eq!(standing.get(), Ok(()));
}
