//! Does what the plan says, for one pod at a time, and tells how it went. No choices are made here.

use std::{path::PathBuf, sync::Arc, time::Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::events::Events;
use crate::{
    dataplane::{Dataplane, PodInterface},
    network::{Network, NetworkStatus, PodNetwork},
    plan::{Action, StartContainer, Subject},
    runtime::{ContainerSpec, Image, PodId, PullPolicy, Runtime, RuntimeError, SandboxSpec},
};

/// What actions are done with.
#[derive(Clone)]
pub struct Executor {
    pub runtime: Arc<dyn Runtime>,
    pub network: Arc<dyn Network>,
    pub dataplane: Arc<dyn Dataplane>,
    /// Limits how many pods are started at once.
    pub starts: Arc<Semaphore>,
    /// Tells people what happens.
    pub events: Events,
}

/// What a worker did.
#[derive(Debug)]
pub struct Done {
    /// Whose worker.
    pub uid: String,
    /// How each action went.
    pub results: Vec<(Subject, Result<(), Failed>)>,
    /// Sandboxes whose hooks are now attached.
    pub attached: Vec<String>,
    /// Sandboxes whose hooks are no more.
    pub detached: Vec<String>,
}

/// Why an action failed, for the status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// The word.
    pub reason: String,
    /// The words.
    pub message: String,
}

impl Done {
    fn new(uid: String) -> Self {
        Self {
            uid,
            results: Vec::new(),
            attached: Vec::new(),
            detached: Vec::new(),
        }
    }

    /// Of a worker that did not end as it should.
    pub fn panicked(uid: String, error: &tokio::task::JoinError) -> Self {
        tracing::error!(pod = uid, %error, "a worker ended in a panic");
        let failed = Failed {
            reason: "InternalError".to_owned(),
            message: error.to_string(),
        };
        let results = vec![(Subject::Sandbox, Err(failed.clone())), (Subject::Removal, Err(failed))];
        Self {
            results,
            ..Self::new(uid)
        }
    }
}

impl Failed {
    /// The reason of what was not done because the pod is to go.
    pub const UNWANTED: &str = "PodDeleted";

    fn unwanted() -> Self {
        Self {
            reason: Self::UNWANTED.to_owned(),
            message: "the pod is to go".to_owned(),
        }
    }
}

impl From<RuntimeError> for Failed {
    fn from(error: RuntimeError) -> Self {
        let message = match &error {
            RuntimeError::Containerd { doing, source } => format!("{doing}: {}", source.message()),
            other => other.to_string(),
        };
        Self {
            reason: error.reason().to_owned(),
            message,
        }
    }
}

fn network_failed(error: &crate::network::NetworkError) -> Failed {
    Failed {
        reason: "NetworkFailed".to_owned(),
        message: error.to_string(),
    }
}

fn dataplane_failed(error: &crate::dataplane::DataplaneError) -> Failed {
    Failed {
        reason: "DataplaneFailed".to_owned(),
        message: error.to_string(),
    }
}

impl Executor {
    /// Runs a pod's actions in order. A failure ends the run, save that other containers are still started; when the pod becomes
    /// `unwanted`, nothing more is started, and nobody waits for an image any longer.
    pub async fn execute(
        self,
        pod: PodId,
        actions: Vec<Action>,
        sandboxes: Vec<String>,
        unwanted: CancellationToken,
    ) -> Done {
        let mut done = Done::new(pod.uid.clone());
        for action in actions {
            let subject = action.subject();
            let stops = !matches!(subject, Subject::Container(_));
            let result = self.execute_one(&pod, action, &sandboxes, &unwanted, &mut done).await;
            let failed = result.is_err();
            if let Err(Failed { reason, message }) = &result {
                tracing::warn!(
                    pod = pod.uid,
                    namespace = pod.namespace,
                    name = pod.name,
                    ?subject,
                    reason,
                    message,
                    "an action failed"
                );
                if subject == Subject::Removal {
                    let message = format!("error killing pod: {message}");
                    self.events.say(&pod, None, "Warning", "FailedKillPod", message);
                }
            }
            done.results.push((subject, result));
            if failed && stops {
                break;
            }
        }
        done
    }

    async fn execute_one(
        &self,
        pod: &PodId,
        action: Action,
        sandboxes: &[String],
        unwanted: &CancellationToken,
        done: &mut Done,
    ) -> Result<(), Failed> {
        match action {
            Action::CreateSandbox { attempt, hostname } => {
                if attempt > 0 {
                    let message = "Pod sandbox changed, it will be killed and re-created.".to_owned();
                    self.events.say(pod, None, "Normal", "SandboxChanged", message);
                }
                let _turn = self.turn(unwanted).await?;
                let id = self
                    .create_sandbox(pod, attempt, hostname)
                    .await
                    .inspect_err(|failed| {
                        let message = format!("Failed to create pod sandbox: {}", failed.message);
                        self.events.say(pod, None, "Warning", "FailedCreatePodSandBox", message);
                    })?;
                done.attached.push(id);
                Ok(())
            }
            Action::Attach {
                sandbox_id,
                host_interface,
            } => {
                self.attach(pod, host_interface).await?;
                done.attached.push(sandbox_id);
                Ok(())
            }
            Action::StartContainer(start) => {
                let (name, image) = (start.name.clone(), start.image.reference.clone());
                let started = self.start_container(pod, *start, unwanted).await;
                match &started {
                    Ok(()) => self.events.started(pod, &name),
                    Err(failed) => self.events.not_started(pod, &name, &image, failed),
                }
                started
            }
            Action::Terminate { id } => Ok(self.runtime.terminate(&id).await?),
            Action::Kill { id } => Ok(self.runtime.signal(&id, libc::SIGKILL).await?),
            Action::RemoveContainer { id } => Ok(self.runtime.remove_container(pod, &id).await?),
            Action::RemoveSandbox { id } => {
                // The hooks are the pod's: another sandbox of it is attached again afterwards.
                done.detached.extend_from_slice(sandboxes);
                self.dataplane
                    .detach_pod(&pod.uid)
                    .await
                    .map_err(|error| dataplane_failed(&error))?;
                self.remove_network(pod, &id).await?;
                Ok(self.runtime.remove_sandbox(pod, &id).await?)
            }
            Action::RemoveNetwork { id } => self.remove_network(pod, &id).await,
            Action::RemovePod => {
                self.network.forget(&pod.uid);
                Ok(self.runtime.remove_pod(pod).await?)
            }
        }
    }

    /// The right to start something, as long as it is wanted.
    async fn turn(&self, unwanted: &CancellationToken) -> Result<Option<OwnedSemaphorePermit>, Failed> {
        tokio::select! {
            biased;
            () = unwanted.cancelled() => Err(Failed::unwanted()),
            // The semaphore is never closed.
            turn = self.starts.clone().acquire_owned() => Ok(turn.ok()),
        }
    }

    async fn create_sandbox(&self, pod: &PodId, attempt: u32, hostname: String) -> Result<String, Failed> {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let made = self.try_sandbox(pod, &id, attempt, hostname).await;
        if let Err(failed) = made {
            self.roll_back(pod, &id).await;
            return Err(failed);
        }
        Ok(id)
    }

    async fn try_sandbox(&self, pod: &PodId, id: &str, attempt: u32, hostname: String) -> Result<(), Failed> {
        let netns = self
            .network
            .create_namespace(id)
            .await
            .map_err(|error| network_failed(&error))?;
        let network = pod_network(pod, id, netns.clone());
        let NetworkStatus {
            addresses,
            host_interface,
            ..
        } = self
            .network
            .add(&network)
            .await
            .map_err(|error| network_failed(&error))?;
        let spec = SandboxSpec {
            pod: pod.clone(),
            id: id.to_owned(),
            attempt,
            hostname,
            netns,
            addresses,
            host_interface: host_interface.clone(),
        };
        self.runtime.create_sandbox(&spec).await?;
        self.attach(pod, host_interface).await
    }

    /// Takes everything down that may have been made; what fails here is found and removed later.
    async fn roll_back(&self, pod: &PodId, id: &str) {
        if let Err(error) = self.dataplane.detach_pod(&pod.uid).await {
            tracing::warn!(pod = pod.uid, %error, "cannot detach a sandbox that failed");
        }
        if let Err(failed) = self.remove_network(pod, id).await {
            tracing::warn!(
                pod = pod.uid,
                error = failed.message,
                "cannot remove the network of a sandbox that failed"
            );
        }
        if let Err(error) = self.runtime.remove_sandbox(pod, id).await {
            tracing::warn!(pod = pod.uid, %error, "cannot remove a sandbox that failed");
        }
    }

    async fn attach(&self, pod: &PodId, host_interface: String) -> Result<(), Failed> {
        if host_interface.is_empty() {
            // A foreign CNI plugin that names no interface: its traffic is not counted.
            return Ok(());
        }
        let interface = PodInterface {
            pod_uid: pod.uid.clone(),
            host_interface,
        };
        self.dataplane
            .attach_pod(interface)
            .await
            .map_err(|error| dataplane_failed(&error))
    }

    async fn remove_network(&self, pod: &PodId, id: &str) -> Result<(), Failed> {
        let known = self.network.list().await.map_err(|error| network_failed(&error))?;
        let attachment = known.into_iter().find(|attachment| attachment.sandbox_id == id);
        if let Some(attachment) = attachment {
            let network = attachment
                .pod
                .unwrap_or_else(|| pod_network(pod, id, attachment.netns.unwrap_or_default()));
            self.network
                .del(&network)
                .await
                .map_err(|error| network_failed(&error))?;
        }
        self.network
            .delete_namespace(id)
            .await
            .map_err(|error| network_failed(&error))
    }

    /// Makes a container's image ready, and says what is done for it.
    async fn pull(&self, pod: &PodId, start: &StartContainer) -> Result<Image, RuntimeError> {
        let (image, begin) = (&start.image, Instant::now());
        let asks = match image.policy {
            PullPolicy::Always => true,
            PullPolicy::Never => false,
            // One that is no image's name is refused below.
            PullPolicy::IfNotPresent => !self.runtime.has_image(&image.reference).await.unwrap_or(true),
        };
        if asks {
            self.events.pulling(pod, &start.name, &image.reference);
        }
        let ready = self.runtime.ensure_image(image).await?;
        let took = asks.then(|| begin.elapsed());
        self.events.pulled(pod, &start.name, &image.reference, took);
        Ok(ready)
    }

    async fn start_container(
        &self,
        pod: &PodId,
        start: StartContainer,
        unwanted: &CancellationToken,
    ) -> Result<(), Failed> {
        if let Some(why) = start.refused {
            return Err(RuntimeError::InvalidSpec(why).into());
        }
        let image = tokio::select! {
            biased;
            () = unwanted.cancelled() => return Err(Failed::unwanted()),
            image = self.pull(pod, &start) => image?,
        };
        // Only now: who waits for an image holds up nobody.
        let _turn = self.turn(unwanted).await?;
        let spec = ContainerSpec {
            pod: pod.clone(),
            sandbox_id: start.sandbox_id,
            id: uuid::Uuid::new_v4().simple().to_string(),
            name: start.name,
            hostname: start.hostname,
            restart_count: start.restart_count,
            backoff_ms: start.backoff_ms,
            image,
            image_reference: start.image.reference,
            command: start.command,
            args: start.args,
            working_dir: start.working_dir,
            env: start.env,
            resources: start.resources,
            grace_seconds: start.grace_seconds,
        };
        Ok(self.runtime.start_container(&spec).await?)
    }
}

fn pod_network(pod: &PodId, sandbox_id: &str, netns: PathBuf) -> PodNetwork {
    PodNetwork {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        sandbox_id: sandbox_id.to_owned(),
        netns,
    }
}
