//! Sandboxes: lease, state directory, pause container; and the removal of a whole pod.

use std::{fs, io, path::Path};

use containerd_client::services::v1::{CreateRequest, DeleteRequest};

use super::{Containerd, client::Refusal as _, container::NewContainer, labels, tasks::labels as label_map};
use crate::runtime::{PodId, RuntimeError, SandboxSpec, files, spec};

impl Containerd {
    /// See [`crate::runtime::Runtime::create_sandbox`].
    pub(super) async fn make_sandbox(&self, sandbox: &SandboxSpec) -> Result<(), RuntimeError> {
        let mut pause = self.pause.lock().await;
        let image = match &*pause {
            Some(image) => image.clone(),
            None => pause.insert(self.pause_image().await?).clone(),
        };
        drop(pause);
        let dir = self.pod_dir(&sandbox.pod.uid);
        files::write_pod_files(&dir, sandbox)
            .and_then(|()| files::mount_shm(&dir))
            .map_err(|source| RuntimeError::Io {
                doing: format!("writing {}", dir.display()),
                source,
            })?;
        self.lease(&sandbox.pod).await?;
        let addresses: Vec<String> = sandbox.addresses.iter().map(ToString::to_string).collect();
        let container = NewContainer {
            id: &sandbox.id,
            pod: &sandbox.pod,
            labels: label_map(&[
                (labels::KIND, "sandbox".to_owned()),
                (labels::ATTEMPT, sandbox.attempt.to_string()),
                (labels::ADDRESSES, addresses.join(",")),
                (labels::HOST_INTERFACE, sandbox.host_interface.clone()),
            ]),
            image: &image,
            spec: spec::sandbox(&self.platform, sandbox, &self.cgroup(&sandbox.pod.uid, &sandbox.id)),
            log: None,
        };
        let made = self.create_and_start(container).await;
        if made.is_err() {
            self.pause.lock().await.take();
        }
        if made.is_err()
            && let Err(error) = self.delete_container(&sandbox.pod, &sandbox.id).await
        {
            tracing::warn!(pod = sandbox.pod.uid, %error, "a sandbox that did not start remains");
        }
        made
    }

    /// Creates the pod's lease; one that is there is kept.
    async fn lease(&self, pod: &PodId) -> Result<(), RuntimeError> {
        let request = self.client.request(CreateRequest {
            id: lease_id(&pod.uid),
            labels: label_map(&[
                (labels::POD_NAME, pod.name.clone()),
                (labels::POD_NAMESPACE, pod.namespace.clone()),
                (labels::POD_UID, pod.uid.clone()),
            ]),
        });
        self.client
            .call("creating the pod's lease", self.client.leases().create(request))
            .await
            .made()?;
        Ok(())
    }

    /// See [`crate::runtime::Runtime::remove_pod`]. The state directory goes last: as long as it is there the pod is observed.
    pub(super) async fn delete_pod(&self, pod: &PodId) -> Result<(), RuntimeError> {
        let request = self.client.request(DeleteRequest {
            id: lease_id(&pod.uid),
            sync: false,
        });
        self.client
            .call("deleting the pod's lease", self.client.leases().delete(request))
            .await
            .found()?;
        self.remove_cgroup(format!("{}/{}", self.options.cgroup_parent, pod.uid))
            .await?;
        let dir = self.pod_dir(&pod.uid);
        files::unmount_shm(&dir).map_err(|source| RuntimeError::Io {
            doing: format!("unmounting in {}", dir.display()),
            source,
        })?;
        for dir in [self.log_dir(pod), self.pod_dir(&pod.uid)] {
            remove_dir(&dir).map_err(|source| RuntimeError::Io {
                doing: format!("removing {}", dir.display()),
                source,
            })?;
        }
        Ok(())
    }
}

/// The lease of a pod.
pub(super) fn lease_id(uid: &str) -> String {
    format!("orlop-pod-{uid}")
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
