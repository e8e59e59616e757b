//! Makes itself known to kubelet, so that the pod needs no registrar beside the agent.
//!
//! kubelet watches its folder `plugins_registry`. When a socket appears there, it asks GetInfo, then NodeGetInfo on the CSI socket that
//! it was told, and says by NotifyRegistrationStatus how it went. As long as we do not know who we are, there is no socket: kubelet
//! would write nothing, or something wrong, into the CSINode. When kubelet could not use the answer, it does not come again by itself
//! (it has the plugin in its list before it asks NodeGetInfo: pluginmanager/operationexecutor), so the socket is taken away and, after a
//! pause, made anew; also when somebody removed it. At the end it is removed first: a driver that is gone must not stay in the CSINode.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::pluginregistration::registration_server::{self, RegistrationServer};
use proto::pluginregistration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use proto::serve::Socket;
use tokio::sync::{Notify, watch};
use tonic::{Request, Response, Status};

/// Between two looks whether we know who we are, whether the folder is there, whether the socket is still in its place.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// From kubelet's refusal to the next offer: its reason may need the API server, which is not to be asked all the time.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);
/// For the answer to kubelet that is under way.
const DRAIN: Duration = Duration::from_secs(2);
/// Begins the standing between the offer and kubelet's answer.
const OFFERED: &str = "offered to kubelet";
/// kubelet's word for what we are.
const CSI_PLUGIN: &str = "CSIPlugin";
/// CSI's, of which kubelet wants the first number to be 1; the registrar says the same.
const SUPPORTED_VERSIONS: &str = "1.0.0";

/// How it stands: `Ok` once kubelet has us, else one sentence.
#[derive(Debug, Clone)]
pub struct Standing(Arc<Mutex<Result<(), String>>>);

impl Default for Standing {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Err("has just been started".into()))))
    }
}

impl Standing {
    /// # Errors
    /// Why not yet.
    pub fn get(&self) -> Result<(), String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says a change in the log, once.
    fn set(&self, now: Result<(), String>) {
        let mut standing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *standing != now {
            match &now {
                Ok(()) => proto::info!("ready"),
                // The way of every start.
                Err(why) if why.starts_with(OFFERED) => proto::info!("{why}"),
                Err(why) => proto::warn!("not ready: {why}"),
            }
            *standing = now;
        }
    }
}

/// Where kubelet is, and what it is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kubelet {
    /// kubelet's `plugins_registry`, as we see it.
    pub folder: PathBuf,
    /// Our CSI socket, as kubelet sees it.
    pub csi_socket: PathBuf,
}

impl Kubelet {
    /// The socket that kubelet finds: the registrar's name for it, so that only one of the two can be at work.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join(format!("{}-reg.sock", proto::DRIVER_NAME))
    }
}

/// Keeps the agent registered until `stop` is true. Without `kubelet` (a registrar does it), only finds out who we are.
pub async fn run(
    kubelet: Option<Kubelet>,
    known: impl Fn() -> Result<(), String> + Clone + Send + 'static,
    standing: Standing,
    mut stop: watch::Receiver<bool>,
) {
    while !*stop.borrow() {
        let pause = match (look(known.clone()).await, &kubelet) {
            (Err(why), _) => {
                standing.set(Err(why));
                LOOK_EVERY
            }
            (Ok(()), None) => return standing.set(Ok(())),
            (Ok(()), Some(kubelet)) => offer(kubelet, &standing, stop.clone()).await,
        };
        let _ = tokio::time::timeout(pause, stop.wait_for(|stop| *stop)).await;
    }
}

async fn look(known: impl Fn() -> Result<(), String> + Send + 'static) -> Result<(), String> {
    tokio::task::spawn_blocking(known).await.unwrap_or_else(|lost| Err(format!("the look was lost: {lost}")))
}

/// Serves the socket as long as it is of use; answers how long to wait before the next time.
async fn offer(kubelet: &Kubelet, standing: &Standing, mut stop: watch::Receiver<bool>) -> Duration {
    let path = kubelet.socket();
    if !kubelet.folder.is_dir() {
        // A folder of our own making would be watched by nobody.
        let folder = kubelet.folder.display();
        standing.set(Err(format!("not registered: {folder} is no folder: mount kubelet's plugins_registry there")));
        return LOOK_EVERY;
    }
    let socket = match Socket::open(&path) {
        Ok(socket) => socket,
        Err(error) => {
            standing.set(Err(format!("not registered: {error}")));
            return LOOK_EVERY;
        }
    };
    standing.set(Err(format!("{OFFERED} at {}; kubelet has not answered yet", path.display())));
    let place = socket.place();
    let refused = Arc::new(Notify::new());
    let plugin = Plugin { endpoint: kubelet.csi_socket.display().to_string(), standing: standing.clone(), refused: Arc::clone(&refused) };
    let mut pause = Duration::ZERO;
    let until = async {
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                () = refused.notified() => {
                    pause = REFUSED_PAUSE;
                    break;
                }
                () = tokio::time::sleep(LOOK_EVERY) => {
                    if !place.is_ours() {
                        standing.set(Err(format!("not registered: somebody removed {}; it is made anew", place.path().display())));
                        break;
                    }
                }
            }
        }
    };
    if let Err(error) = socket.serve(RegistrationServer::new(plugin), until, DRAIN).await {
        standing.set(Err(format!("not registered: {error}")));
        return LOOK_EVERY;
    }
    pause
}

struct Plugin {
    endpoint: String,
    standing: Standing,
    refused: Arc<Notify>,
}

#[tonic::async_trait]
impl registration_server::Registration for Plugin {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: CSI_PLUGIN.into(),
            name: proto::DRIVER_NAME.into(),
            endpoint: self.endpoint.clone(),
            supported_versions: vec![SUPPORTED_VERSIONS.into()],
        }))
    }

    async fn notify_registration_status(
        &self,
        status: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = status.into_inner();
        if status.plugin_registered {
            self.standing.set(Ok(()));
        } else {
            self.standing.set(Err(format!("kubelet refused the registration, which is repeated: {}", status.error)));
            self.refused.notify_one();
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[cfg(test)]
mod tests;
