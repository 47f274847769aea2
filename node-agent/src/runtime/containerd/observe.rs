//! What exists, from containerd's records and tasks and from the state directories.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
};

use containerd_client::{
    services::v1::{Container, ListContainersRequest, ListRequest, snapshots::UsageRequest},
    types::v1::Status,
};
use jiff::Timestamp;

use super::{Containerd, hung::Task, labels};
use crate::runtime::{
    Exit, Observed, ObservedContainer, ObservedPod, ObservedSandbox, PodId, ProcessState, RuntimeError, files,
};

impl Containerd {
    /// See [`crate::runtime::Runtime::observe`].
    pub(super) async fn observe_all(&self) -> Result<Observed, RuntimeError> {
        let filters = vec![format!("labels.\"{}\"", labels::KIND)];
        let request = self.client.request(ListContainersRequest { filters });
        let records = self
            .client
            .call("listing containers", self.client.containers().list(request))
            .await?;
        let containers = records.containers.iter().map(|record| record.id.clone()).collect();
        let tasks = self.hung.tasks(&self.client, &self.changed, containers).await?;
        let mut observed = Observed::default();
        for record in records.containers {
            self.add(&mut observed, &record, tasks.get(&record.id).unwrap_or(&Task::Unknown));
        }
        for pod in observed.pods.values_mut() {
            pod.sandboxes
                .sort_by(|a, b| (a.attempt, &a.id).cmp(&(b.attempt, &b.id)));
            pod.containers
                .sort_by(|a, b| (&a.name, a.restart_count, &a.id).cmp(&(&b.name, b.restart_count, &b.id)));
        }
        self.add_remains(&mut observed).await?;
        Ok(observed)
    }

    /// What each container's writable layer holds. containerd walks the files, so a layer that is being removed may fail.
    pub(super) async fn layers_usage(&self) -> Result<BTreeMap<String, u64>, RuntimeError> {
        let filters = vec![format!("labels.\"{}\"", labels::KIND)];
        let request = self.client.request(ListContainersRequest { filters });
        let records = self
            .client
            .call("listing containers", self.client.containers().list(request))
            .await?;
        let mut usage = BTreeMap::new();
        for record in records.containers {
            let request = self.client.request(UsageRequest {
                snapshotter: record.snapshotter,
                key: record.snapshot_key,
            });
            let mut snapshots = self.client.snapshots();
            if let Ok(measured) = self.client.call("measuring a layer", snapshots.usage(request)).await {
                usage.insert(record.id, u64::try_from(measured.size).unwrap_or(0));
            }
        }
        Ok(usage)
    }

    fn add(&self, observed: &mut Observed, record: &Container, task: &Task) {
        let Some(id) = pod_id(&record.labels) else { return };
        let label = |key: &str| record.labels.get(key).map_or("", String::as_str);
        let state = self.state(&id, record, task);
        let pod = observed.pods.entry(id.uid.clone()).or_insert_with(|| empty(id));
        if label(labels::KIND) == "sandbox" {
            pod.sandboxes.push(ObservedSandbox {
                id: record.id.clone(),
                attempt: label(labels::ATTEMPT).parse().unwrap_or(0),
                state,
                addresses: label(labels::ADDRESSES)
                    .split(',')
                    .filter_map(|text| text.parse().ok())
                    .collect(),
                host_interface: label(labels::HOST_INTERFACE).to_owned(),
            });
        } else {
            pod.containers.push(ObservedContainer {
                id: record.id.clone(),
                sandbox_id: label(labels::SANDBOX).to_owned(),
                name: label(labels::CONTAINER_NAME).to_owned(),
                restart_count: label(labels::RESTART_COUNT).parse().unwrap_or(0),
                backoff_ms: label(labels::BACKOFF).parse().ok(),
                image: label(labels::IMAGE).to_owned(),
                image_id: label(labels::IMAGE_ID).to_owned(),
                grace_seconds: label(labels::GRACE).parse().unwrap_or(0),
                state,
            });
        }
    }

    fn state(&self, pod: &PodId, record: &Container, task: &Task) -> ProcessState {
        let label = |key: &str| record.labels.get(key);
        let time = |key: &str| label(key).and_then(|text| text.parse::<Timestamp>().ok());
        let created_at = timestamp(record.created_at.as_ref()).unwrap_or(Timestamp::UNIX_EPOCH);
        let started_at = time(labels::STARTED_AT).unwrap_or(created_at);
        let never_started = label(labels::STARTED_AT).is_none();
        match task {
            Task::Unknown => ProcessState::Unknown,
            Task::Is(process) => match process.status() {
                Status::Running | Status::Paused | Status::Pausing => ProcessState::Running {
                    pid: process.pid,
                    started_at,
                },
                Status::Stopped => {
                    let finished_at = timestamp(process.exited_at.as_ref()).unwrap_or(started_at);
                    let code = i32::try_from(process.exit_status).unwrap_or(255);
                    let oom = code == 137 && self.cgroups.oom_killed(&self.cgroup(&pod.uid, &record.id));
                    let reason = match code {
                        _ if oom => "OOMKilled",
                        0 => "Completed",
                        _ => "Error",
                    };
                    let (reason, message) = (reason.to_owned(), String::new());
                    ProcessState::Exited(Exit {
                        code,
                        reason,
                        message,
                        started_at,
                        finished_at,
                    })
                }
                Status::Created => ProcessState::Created,
                Status::Unknown => ProcessState::Unknown,
            },
            Task::IsNot => {
                if let Some(message) = label(labels::START_ERROR) {
                    let finished_at = time(labels::FAILED_AT).unwrap_or(created_at);
                    let (reason, message) = ("StartError".to_owned(), message.clone());
                    return ProcessState::Exited(Exit {
                        code: 128,
                        reason,
                        message,
                        started_at: finished_at,
                        finished_at,
                    });
                }
                if never_started {
                    return ProcessState::Created;
                }
                ProcessState::Exited(Exit {
                    code: 137,
                    reason: "ContainerStatusUnknown".to_owned(),
                    message: "the container's process was lost: its shim or the machine ended".to_owned(),
                    started_at,
                    finished_at: timestamp(record.updated_at.as_ref()).unwrap_or(started_at),
                })
            }
        }
    }

    /// Adds the pods of which only a state directory or a lease is left, and marks those that have one.
    async fn add_remains(&self, observed: &mut Observed) -> Result<(), RuntimeError> {
        let request = self.client.request(ListRequest { filters: Vec::new() });
        let leases = self
            .client
            .call("listing leases", self.client.leases().list(request))
            .await?;
        let leased = leases.leases.iter().filter_map(|lease| pod_id(&lease.labels));
        let dirs = fs::read_dir(self.options.run_dir.join("pods"));
        let kept = dirs
            .into_iter()
            .flatten()
            .filter_map(|entry| files::read_pod_id(&entry.ok()?.path()));
        for id in leased.chain(kept) {
            observed.pods.entry(id.uid.clone()).or_insert_with(|| empty(id)).remains = true;
        }
        Ok(())
    }
}

fn empty(id: PodId) -> ObservedPod {
    ObservedPod {
        id,
        sandboxes: Vec::new(),
        containers: Vec::new(),
        networks: Vec::new(),
        remains: false,
    }
}

fn pod_id(labels: &HashMap<String, String>) -> Option<PodId> {
    Some(PodId {
        namespace: labels.get(labels::POD_NAMESPACE)?.clone(),
        name: labels.get(labels::POD_NAME)?.clone(),
        uid: labels.get(labels::POD_UID)?.clone(),
    })
}

fn timestamp(time: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    // containerd writes Go's zero time for none.
    time.filter(|time| time.seconds > 0)
        .and_then(|time| Timestamp::new(time.seconds, time.nanos).ok())
}
