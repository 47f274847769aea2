//! Tasks: the processes of containers.

use std::{collections::HashMap, path::Path, time::Duration};

use containerd_client::{
    services::v1::{CreateTaskRequest, DeleteTaskRequest, KillRequest, StartRequest, WaitRequest},
    types::Mount,
};
use tonic::Code;

use super::{Containerd, client::Refusal as _};
use crate::runtime::RuntimeError;

/// A killed process that is still there after this time hangs in the kernel.
const KILL_DEADLINE: Duration = Duration::from_secs(15);

impl Containerd {
    /// Creates and starts a task; what was created is deleted again when it cannot be started.
    pub(super) async fn run_task(&self, id: &str, rootfs: Vec<Mount>, log: Option<&Path>) -> Result<u32, RuntimeError> {
        let output = log.map(|log| self.logger(log)).unwrap_or_default();
        let request = self.client.request(CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs,
            stdout: output.clone(),
            stderr: output,
            ..CreateTaskRequest::default()
        });
        let deadline = Duration::from_secs(120);
        self.client
            .call_within(deadline, "creating the task", self.client.tasks().create(request))
            .await?;
        let request = self.client.request(StartRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        });
        match self
            .client
            .call("starting the task", self.client.tasks().start(request))
            .await
        {
            Ok(started) => Ok(started.pid),
            Err(error) => {
                if let Err(error) = self.end_task(id).await {
                    tracing::warn!(container = id, %error, "a task that did not start remains");
                }
                Err(error)
            }
        }
    }

    /// The URI of the logger that the shim starts; the shim passes key and value of its query as arguments.
    fn logger(&self, log: &Path) -> String {
        format!(
            "binary://{}?log={}",
            self.options.logger_binary.display(),
            encode(&log.display().to_string())
        )
    }

    /// Sends a signal; a task that is not there, or has ended, is a success.
    pub(super) async fn kill_task(&self, id: &str, signal: u32) -> Result<(), RuntimeError> {
        let request = self.client.request(KillRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
            signal,
            all: false,
        });
        match self.client.call("signalling", self.client.tasks().kill(request)).await {
            Ok(()) => Ok(()),
            Err(RuntimeError::Containerd { source, .. })
                if matches!(source.code(), Code::NotFound | Code::FailedPrecondition)
                    || source.message().contains("process already finished") =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Kills a task, waits for its end and deletes it; one that is not there is a success.
    pub(super) async fn end_task(&self, id: &str) -> Result<(), RuntimeError> {
        if self.delete_task(id).await.is_ok() {
            return Ok(());
        }
        self.kill_task(id, 9).await?;
        let request = self.client.request(WaitRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        });
        self.client
            .call_within(
                KILL_DEADLINE,
                "waiting for a killed task",
                self.client.tasks().wait(request),
            )
            .await
            .found()?;
        self.delete_task(id).await
    }

    async fn delete_task(&self, id: &str) -> Result<(), RuntimeError> {
        let request = self.client.request(DeleteTaskRequest {
            container_id: id.to_owned(),
        });
        self.client
            .call("deleting the task", self.client.tasks().delete(request))
            .await
            .found()?;
        Ok(())
    }
}

/// Percent-encodes what is not plain in a query's value.
fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_' | b'-') {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// The runtime that containers are run by, and what groups them into one shim is an annotation in their spec.
pub(super) fn runtime() -> containerd_client::services::v1::container::Runtime {
    containerd_client::services::v1::container::Runtime {
        name: "io.containerd.runc.v2".to_owned(),
        options: None,
    }
}

/// Labels from pairs.
pub(super) fn labels(pairs: &[(&str, String)]) -> HashMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), value.clone()))
        .collect()
}
