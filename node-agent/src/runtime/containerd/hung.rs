//! Asking shims for their tasks, without waiting for one that does not answer.
//!
//! A shim that is stopped, or starved, answers nobody, and containerd waits for it: one after the other in a list of tasks, for
//! seconds each in every question. A look at the node must not: what does not answer soon is not known for now, and is asked again
//! beside, until there is an answer. That answer wakes whoever waits for changes.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_client::{
    services::v1::{GetRequest, ListTasksRequest},
    types::v1::{Process, Status},
};
use futures::{StreamExt as _, stream};
use tokio::{sync::Notify, time::timeout};

use super::client::{Client, Refusal as _};
use crate::runtime::RuntimeError;

/// A look waits so long for the list of all tasks, in which a hung shim holds up the others.
const LIST_PATIENCE: Duration = Duration::from_secs(2);
/// A look waits so long for one shim.
const PATIENCE: Duration = Duration::from_secs(1);
/// A question beside is given up after this time; containerd itself waits for two seconds.
const SHIM_DEADLINE: Duration = Duration::from_secs(5);
/// Between two questions beside.
const RETRY: Duration = Duration::from_secs(1);
/// Shims that are asked at the same time.
const AT_ONCE: usize = 64;

/// What is known of a container's process.
pub(super) enum Task {
    Is(Process),
    IsNot,
    Unknown,
}

/// The containers whose shims did not answer; somebody asks on for each.
#[derive(Clone, Default)]
pub(super) struct Hung(Arc<Mutex<BTreeSet<String>>>);

impl Hung {
    /// The tasks of containers. Takes a moment longer when a shim begins to hang, and no longer while it does.
    pub(super) async fn tasks(
        &self,
        client: &Client,
        changed: &Arc<Notify>,
        containers: Vec<String>,
    ) -> Result<HashMap<String, Task>, RuntimeError> {
        let mut tasks = HashMap::new();
        if self.lock().is_empty()
            && let Ok(listed) = timeout(LIST_PATIENCE, list(client)).await
        {
            tasks = listed?;
        }
        // The list also leaves out tasks whose shim does not answer: only a clear "not found" means that there is none.
        let missing: Vec<String> = containers.into_iter().filter(|id| !tasks.contains_key(id)).collect();
        let mut answers = stream::iter(
            missing
                .into_iter()
                .map(|id| self.look(client.clone(), changed.clone(), id)),
        )
        .buffer_unordered(AT_ONCE);
        while let Some((id, task)) = answers.next().await {
            tasks.insert(id, task);
        }
        Ok(tasks)
    }

    async fn look(&self, client: Client, changed: Arc<Notify>, id: String) -> (String, Task) {
        if self.lock().contains(&id) {
            return (id, Task::Unknown);
        }
        match timeout(PATIENCE, ask(&client, &id)).await {
            Ok(Some(task)) => (id, task),
            _ => {
                self.ask_on(client, changed, id.clone());
                (id, Task::Unknown)
            }
        }
    }

    /// Asks beside until there is an answer, or nobody wants it any more.
    fn ask_on(&self, client: Client, changed: Arc<Notify>, id: String) {
        if !self.lock().insert(id.clone()) {
            return;
        }
        tracing::warn!(
            container = id,
            "a shim does not answer: nothing is concluded of its container until it does"
        );
        let waiting = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(RETRY).await;
                let answer = ask(&client, &id).await;
                let Some(waiting) = waiting.upgrade() else { return };
                if answer.is_some() {
                    Self(waiting).lock().remove(&id);
                    tracing::info!(container = id, "its shim answers again");
                    changed.notify_one();
                    return;
                }
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn list(client: &Client) -> Result<HashMap<String, Task>, RuntimeError> {
    let request = client.request(ListTasksRequest::default());
    let listed = client.call("listing tasks", client.tasks().list(request)).await?;
    let named = |task: Process| (task_id(&task).to_owned(), Task::Is(task));
    Ok(listed.tasks.into_iter().filter(is_clear).map(named).collect())
}

/// `None` when there is no clear answer.
async fn ask(client: &Client, id: &str) -> Option<Task> {
    let request = client.request(GetRequest {
        container_id: id.to_owned(),
        exec_id: String::new(),
    });
    let answer = client
        .call_within(SHIM_DEADLINE, "looking for a task", client.tasks().get(request))
        .await
        .found();
    match answer {
        Ok(Some(answer)) => answer.process.filter(is_clear).map(Task::Is),
        Ok(None) => Some(Task::IsNot),
        Err(error) => {
            tracing::debug!(container = id, %error, "a task's state is not known");
            None
        }
    }
}

/// containerd 1.6 answers for a shim that does not, after its own deadline: with a status that is not known.
fn is_clear(task: &Process) -> bool {
    task.status() != Status::Unknown
}

/// containerd 1.6 gives the id of a container's first process as `id`, and `container_id` not at all.
fn task_id(task: &Process) -> &str {
    if task.container_id.is_empty() {
        &task.id
    } else {
        &task.container_id
    }
}
