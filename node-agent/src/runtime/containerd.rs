//! The [`Runtime`] on containerd's own API (1.6 to 2.x, no CRI).
//!
//! A pod is a lease, a pause container and the pod's containers, all in one shim, in containerd's namespace `orlop`. What the
//! agent must know again after a restart stands in the containers' labels; the agent keeps nothing of its own on disk here, but
//! the files that are mounted into containers.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use containerd_client::services::v1::GetRequest;
use tokio::sync::Notify;

use super::{
    ContainerSpec, Image, ImageRequest, Observed, PodId, Runtime, RuntimeError, SandboxSpec,
    archives::Archives,
    cgroup::Cgroups,
    garbage::{ImageStore, Unwanted},
    image_source::ImageSource,
    registry::{PullSettings, Registries, RegistrySettings},
    spec,
};
use crate::config::Config;

mod client;
mod container;
mod content;
mod events;
mod garbage;
mod hung;
#[doc(hidden)]
pub mod images;
mod labels;
mod observe;
mod sandbox;
mod tasks;
mod unpack;
#[doc(hidden)]
pub mod users;

use client::{Client, Refusal as _};

/// containerd's namespace that everything of ours is in.
pub const NAMESPACE: &str = "orlop";

/// How this node uses containerd.
#[derive(Debug, Clone)]
pub struct Options {
    /// containerd's socket.
    pub socket: PathBuf,
    /// Below it: `pods/UID`, what is mounted into containers.
    pub run_dir: PathBuf,
    /// Containers' logs.
    pub log_dir: PathBuf,
    /// Image archives.
    pub image_dirs: Vec<PathBuf>,
    /// How images are pulled.
    pub images: PullSettings,
    /// What is known of registries.
    pub registries: BTreeMap<String, RegistrySettings>,
    /// The static pause program.
    pub pause_binary: PathBuf,
    /// The logger that the shim starts.
    pub logger_binary: PathBuf,
    /// The cgroup that pods are in, below the root of the hierarchy: `/orlop/INSTANCE`.
    pub cgroup_parent: String,
    /// containerd's snapshotter.
    pub snapshotter: String,
}

impl Options {
    /// As the configuration says.
    pub fn from_config(config: &Config) -> Self {
        Self {
            socket: config.containerd_socket.clone(),
            run_dir: config.run_dir.clone(),
            log_dir: config.log_dir.clone(),
            image_dirs: config.image_dirs.clone(),
            images: config.images.clone(),
            registries: config.registries.clone(),
            pause_binary: config.pause_binary.clone(),
            logger_binary: config.logger_binary.clone(),
            cgroup_parent: format!("/orlop/{}", config.instance()),
            snapshotter: "overlayfs".to_owned(),
        }
    }
}

/// containerd as a [`Runtime`].
pub struct Containerd {
    client: Client,
    options: Options,
    cgroups: Cgroups,
    platform: spec::Platform,
    sources: Vec<Arc<dyn ImageSource>>,
    /// Imports run one at a time per image: one import serves all pods that wait for it.
    imports: tokio::sync::Mutex<BTreeMap<String, Arc<images::Turn>>>,
    /// The pause image, once it is there; forgotten when a sandbox cannot be made from it.
    pause: tokio::sync::Mutex<Option<Image>>,
    /// Which life of the agent this is.
    life: String,
    changed: Arc<Notify>,
    hung: hung::Hung,
    /// Ended with the value: the event subscription.
    subscription: tokio::task::JoinHandle<()>,
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.subscription.abort();
    }
}

impl Containerd {
    /// Uses the containerd at the socket, which need not be there yet: connections are made, and made again, when they are
    /// needed. Must be called inside a tokio runtime.
    pub fn new(options: Options) -> Result<Self, RuntimeError> {
        let client = Client::new(&options.socket)?;
        let cgroups = Cgroups::detect()?;
        let changed = Arc::new(Notify::new());
        let subscription = tokio::spawn(events::subscribe(client.clone(), changed.clone()));
        Ok(Self {
            platform: spec::Platform::detect(&cgroups),
            sources: vec![
                Arc::new(Archives::new(options.image_dirs.clone())),
                Arc::new(Registries::new(options.images.clone(), options.registries.clone())),
            ],
            imports: tokio::sync::Mutex::default(),
            pause: tokio::sync::Mutex::default(),
            life: uuid::Uuid::new_v4().simple().to_string(),
            client,
            options,
            cgroups,
            changed,
            hung: hung::Hung::default(),
            subscription,
        })
    }

    fn pod_dir(&self, uid: &str) -> PathBuf {
        self.options.run_dir.join("pods").join(uid)
    }

    fn log_dir(&self, pod: &PodId) -> PathBuf {
        self.options
            .log_dir
            .join(format!("{}_{}_{}", pod.namespace, pod.name, pod.uid))
    }

    /// A containerd whose disk was full or failing when it started goes on without the plugins that could not start. What runs no
    /// pods is not healthy, so what pods need is asked for something that is not there; no shim takes part in that.
    async fn is_whole(&self) -> Result<(), RuntimeError> {
        const NOBODY: &str = "orlop-health";
        let request = self.client.request(GetRequest {
            container_id: NOBODY.to_owned(),
            exec_id: String::new(),
        });
        self.client
            .call("asking for tasks", self.client.tasks().get(request))
            .await
            .found()?;
        self.has_snapshot(NOBODY).await.map(drop)
    }

    /// Removes a cgroup: this may wait for its last process, so it is done beside the async threads.
    async fn remove_cgroup(&self, cgroup: String) -> Result<(), RuntimeError> {
        let cgroups = self.cgroups.clone();
        tokio::task::spawn_blocking(move || cgroups.remove(&cgroup))
            .await
            .map_err(|error| RuntimeError::Io {
                doing: "removing a cgroup".to_owned(),
                source: std::io::Error::other(error),
            })?
    }

    fn cgroup(&self, uid: &str, container_id: &str) -> String {
        format!("{}/{uid}/{container_id}", self.options.cgroup_parent)
    }
}

#[async_trait]
impl Runtime for Containerd {
    async fn observe(&self) -> Result<Observed, RuntimeError> {
        self.observe_all().await
    }

    fn changed(&self) -> Arc<Notify> {
        self.changed.clone()
    }

    async fn ensure_image(&self, request: &ImageRequest) -> Result<Image, RuntimeError> {
        self.image(request).await
    }

    async fn has_image(&self, reference: &str) -> Result<bool, RuntimeError> {
        self.is_present(reference).await
    }

    async fn create_sandbox(&self, spec: &SandboxSpec) -> Result<(), RuntimeError> {
        self.make_sandbox(spec).await
    }

    async fn start_container(&self, spec: &ContainerSpec) -> Result<(), RuntimeError> {
        self.make_container(spec).await
    }

    async fn signal(&self, id: &str, signal: i32) -> Result<(), RuntimeError> {
        self.kill_task(id, signal.unsigned_abs()).await
    }

    async fn terminate(&self, id: &str) -> Result<(), RuntimeError> {
        self.terminate_task(id).await
    }

    async fn remove_container(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.delete_container(pod, id).await
    }

    async fn remove_sandbox(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        self.delete_container(pod, id).await
    }

    async fn remove_pod(&self, pod: &PodId) -> Result<(), RuntimeError> {
        self.delete_pod(pod).await
    }

    async fn disk_usage(&self) -> Result<BTreeMap<String, u64>, RuntimeError> {
        self.layers_usage().await
    }

    async fn images(&self) -> Result<Option<ImageStore>, RuntimeError> {
        self.stored_images().await.map(Some)
    }

    async fn remove_image(&self, name: &str, unwanted: Unwanted<'_>) -> Result<bool, RuntimeError> {
        self.drop_image(name, unwanted).await
    }

    async fn version(&self) -> Result<String, RuntimeError> {
        self.is_whole().await?;
        let answer = self
            .client
            .call(
                "asking for the version",
                self.client.version().version(self.client.request(())),
            )
            .await?;
        Ok(format!("containerd://{}", plain_version(&answer.version)))
    }
}

/// What distributions and build systems add to a version says nothing of containerd: "1.6.20~ds1", "2.1.9+unknown", "v2.0.0".
fn plain_version(version: &str) -> &str {
    let end = version.find(['~', '+']).unwrap_or(version.len());
    version[..end].trim_start_matches('v')
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_version_is_shown_without_what_builders_add() {
        for (version, plain) in [
            ("1.6.20~ds1", "1.6.20"),
            ("2.1.9+unknown", "2.1.9"),
            ("v2.0.0-rc.1", "2.0.0-rc.1"),
            ("", ""),
        ] {
            assert_eq!(super::plain_version(version), plain);
        }
    }
}
