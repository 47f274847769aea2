//! Containers: record, snapshot, task.

use std::{collections::HashMap, path::Path};

use containerd_client::{
    services::v1::{
        Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest, UpdateContainerRequest,
        snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest},
    },
    types::Mount,
};
use jiff::Timestamp;
use prost_types::{Any, FieldMask};

use super::{
    Containerd,
    client::Refusal as _,
    labels,
    sandbox::lease_id,
    tasks::{labels as label_map, runtime},
};
use crate::runtime::{ContainerSpec, Image, PodId, RuntimeError, spec, stop_signal};

/// What containerd is told of a new container.
pub(super) struct NewContainer<'a> {
    pub id: &'a str,
    pub pod: &'a PodId,
    /// Beside those that say which pod it is.
    pub labels: HashMap<String, String>,
    pub image: &'a Image,
    pub spec: serde_json::Value,
    pub log: Option<&'a Path>,
}

impl Containerd {
    /// See [`crate::runtime::Runtime::start_container`].
    pub(super) async fn make_container(&self, container: &ContainerSpec) -> Result<(), RuntimeError> {
        let pause = self.task_pid(&container.sandbox_id).await?;
        let mounts = self.prepare(&container.pod, &container.id, &container.image).await?;
        let made = self.make_in(container, pause, mounts).await;
        let Err((created, error)) = made else { return Ok(()) };
        // Without a record nothing must remain; with one it stays, and says why it did not start.
        let kept = created && self.note_failure(&container.id, &error).await.is_ok();
        if !kept && let Err(error) = self.delete_container(&container.pod, &container.id).await {
            tracing::warn!(container = container.id, %error, "a container that could not be created remains");
        }
        Err(error)
    }

    /// On failure also says whether the record was created, and only the task failed.
    async fn make_in(
        &self,
        container: &ContainerSpec,
        pause: u32,
        mounts: Vec<Mount>,
    ) -> Result<(), (bool, RuntimeError)> {
        let failed = |error| (false, error);
        let user = super::users::resolve(&container.image.config.user, &mounts).map_err(failed)?;
        let log = self
            .log_dir(&container.pod)
            .join(&container.name)
            .join(format!("{}.log", container.restart_count));
        if let Some(dir) = log.parent() {
            std::fs::create_dir_all(dir).map_err(|source| {
                failed(RuntimeError::Io {
                    doing: format!("making {}", dir.display()),
                    source,
                })
            })?;
        }
        let spec = spec::container(
            &self.platform,
            container,
            &spec::Surroundings {
                user,
                pause_pid: pause,
                pod_dir: self.pod_dir(&container.pod.uid),
                cgroup: self.cgroup(&container.pod.uid, &container.id),
            },
        )
        .map_err(failed)?;
        let new = NewContainer {
            id: &container.id,
            pod: &container.pod,
            labels: container_labels(container),
            image: &container.image,
            spec,
            log: Some(&log),
        };
        self.create_record(&new).await.map_err(failed)?;
        self.start_recorded(&new, mounts).await.map_err(|error| (true, error))
    }

    /// Snapshot, record, task.
    pub(super) async fn create_and_start(&self, new: NewContainer<'_>) -> Result<(), RuntimeError> {
        let mounts = self.prepare(new.pod, new.id, new.image).await?;
        self.create_record(&new).await?;
        self.start_recorded(&new, mounts).await
    }

    async fn prepare(&self, pod: &PodId, id: &str, image: &Image) -> Result<Vec<Mount>, RuntimeError> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.options.snapshotter.clone(),
            key: id.to_owned(),
            parent: image.chain_id.clone(),
            labels: HashMap::new(),
        };
        let request = self.client.leased(&lease_id(&pod.uid), request);
        let prepared = self
            .client
            .call("preparing the root", self.client.snapshots().prepare(request))
            .await?;
        Ok(prepared.mounts)
    }

    async fn create_record(&self, new: &NewContainer<'_>) -> Result<(), RuntimeError> {
        let mut all = new.labels.clone();
        all.insert(labels::POD_NAME.to_owned(), new.pod.name.clone());
        all.insert(labels::POD_NAMESPACE.to_owned(), new.pod.namespace.clone());
        all.insert(labels::POD_UID.to_owned(), new.pod.uid.clone());
        let container = Container {
            id: new.id.to_owned(),
            labels: all,
            image: new.image.name.clone(),
            runtime: Some(runtime()),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned(),
                value: new.spec.to_string().into_bytes(),
            }),
            snapshotter: self.options.snapshotter.clone(),
            snapshot_key: new.id.to_owned(),
            ..Container::default()
        };
        let request = CreateContainerRequest {
            container: Some(container),
        };
        let request = self.client.leased(&lease_id(&new.pod.uid), request);
        self.client
            .call("creating the container", self.client.containers().create(request))
            .await?;
        Ok(())
    }

    async fn start_recorded(&self, new: &NewContainer<'_>, mounts: Vec<Mount>) -> Result<(), RuntimeError> {
        self.run_task(new.id, mounts, new.log).await?;
        let started = label_map(&[(labels::STARTED_AT, Timestamp::now().to_string())]);
        if let Err(error) = self.add_labels(new.id, started).await {
            // It runs; without the label the record's own time is taken.
            tracing::warn!(container = new.id, %error, "cannot note when a container was started");
        }
        Ok(())
    }

    async fn note_failure(&self, id: &str, error: &RuntimeError) -> Result<(), RuntimeError> {
        let mut message = chain(error);
        while message.len() > labels::MAX_VALUE {
            message.pop();
        }
        let noted = label_map(&[
            (labels::START_ERROR, message),
            (labels::FAILED_AT, Timestamp::now().to_string()),
        ]);
        self.add_labels(id, noted).await
    }

    async fn add_labels(&self, id: &str, labels: HashMap<String, String>) -> Result<(), RuntimeError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = self.client.request(UpdateContainerRequest {
            container: Some(Container {
                id: id.to_owned(),
                labels,
                ..Container::default()
            }),
            update_mask: Some(FieldMask { paths }),
        });
        self.client
            .call("labelling the container", self.client.containers().update(request))
            .await?;
        Ok(())
    }

    /// See [`crate::runtime::Runtime::terminate`].
    pub(super) async fn terminate_task(&self, id: &str) -> Result<(), RuntimeError> {
        let Some(known) = self.container(id).await? else {
            return Ok(());
        };
        let named = known.labels.get(labels::STOP_SIGNAL).map_or("", String::as_str);
        self.kill_task(id, stop_signal::number(named)).await
    }

    /// containerd's record of a container.
    async fn container(&self, id: &str) -> Result<Option<Container>, RuntimeError> {
        let request = self.client.request(GetContainerRequest { id: id.to_owned() });
        let mut containers = self.client.containers();
        let call = containers.get(request);
        let known = self.client.call("looking for the container", call).await.found()?;
        Ok(known.and_then(|answer| answer.container))
    }

    /// See [`crate::runtime::Runtime::remove_container`].
    pub(super) async fn delete_container(&self, pod: &PodId, id: &str) -> Result<(), RuntimeError> {
        let known = self.container(id).await?;
        if known.is_some() {
            self.end_task(id).await?;
            let request = self.client.request(DeleteContainerRequest { id: id.to_owned() });
            self.client
                .call("deleting the container", self.client.containers().delete(request))
                .await
                .found()?;
        }
        let request = RemoveSnapshotRequest {
            snapshotter: self.options.snapshotter.clone(),
            key: id.to_owned(),
        };
        let request = self.client.request(request);
        self.client
            .call("removing the root", self.client.snapshots().remove(request))
            .await
            .found()?;
        self.remove_cgroup(self.cgroup(&pod.uid, id)).await?;
        if let Some(container) = known {
            self.remove_log(pod, &container.labels);
        }
        Ok(())
    }

    /// Removes the log of one start of a container, with what was rotated away of it.
    fn remove_log(&self, pod: &PodId, labels: &HashMap<String, String>) {
        let (Some(name), Some(count)) = (labels.get(labels::CONTAINER_NAME), labels.get(labels::RESTART_COUNT)) else {
            return;
        };
        let dir = self.log_dir(pod).join(name);
        let prefix = format!("{count}.log");
        for entry in std::fs::read_dir(&dir).into_iter().flatten().filter_map(Result::ok) {
            if entry.file_name().to_string_lossy().starts_with(&prefix)
                && let Err(error) = std::fs::remove_file(entry.path())
            {
                tracing::warn!(file = %entry.path().display(), %error, "a log remains");
            }
        }
    }

    /// The pid of a running task.
    async fn task_pid(&self, id: &str) -> Result<u32, RuntimeError> {
        let request = containerd_client::services::v1::GetRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let request = self.client.request(request);
        let answer = self
            .client
            .call("looking for the sandbox", self.client.tasks().get(request))
            .await?;
        answer
            .process
            .map(|process| process.pid)
            .filter(|pid| *pid != 0)
            .ok_or_else(|| RuntimeError::InvalidSpec("the sandbox does not run".to_owned()))
    }
}

fn container_labels(container: &ContainerSpec) -> HashMap<String, String> {
    let mut all = label_map(&[
        (labels::KIND, "container".to_owned()),
        (labels::CONTAINER_NAME, container.name.clone()),
        (labels::RESTART_COUNT, container.restart_count.to_string()),
        (labels::SANDBOX, container.sandbox_id.clone()),
        (labels::GRACE, container.grace_seconds.to_string()),
        (labels::IMAGE, container.image_reference.clone()),
        (labels::IMAGE_ID, container.image.id.clone()),
    ]);
    if let Some(backoff) = container.backoff_ms {
        all.insert(labels::BACKOFF.to_owned(), backoff.to_string());
    }
    let stop_signal = &container.image.config.stop_signal;
    if !stop_signal.is_empty() && stop_signal.len() <= labels::MAX_VALUE {
        all.insert(labels::STOP_SIGNAL.to_owned(), stop_signal.clone());
    }
    all
}

/// An error with all its causes.
fn chain(error: &RuntimeError) -> String {
    match error {
        RuntimeError::Containerd { doing, source } => format!("{doing}: {}", source.message()),
        other => other.to_string(),
    }
}
