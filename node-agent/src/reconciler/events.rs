//! What happens to pods on this node, told to people: Events with the kubelet's reasons. Best effort.

use std::time::Duration;

use orlop_proto::{
    core::v1::{ContainerStatus, Event, ObjectReference, Pod, PodStatus},
    time,
};
use tokio::sync::mpsc;

use super::execute::Failed;
use crate::runtime::PodId;

/// Where events go. One that nobody has room for is dropped.
#[derive(Debug, Clone)]
pub struct Events(pub mpsc::Sender<Event>);

impl Events {
    /// Says something about a pod, or about one of its containers.
    pub fn say(&self, pod: &PodId, container: Option<&str>, kind: &str, reason: &str, message: String) {
        let now = time::now_seconds();
        let about = ObjectReference {
            api_version: "v1".to_owned(),
            kind: "Pod".to_owned(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            field_path: container.map_or(String::new(), |name| format!("spec.containers{{{name}}}")),
            ..ObjectReference::default()
        };
        let event = Event {
            involved_object: Some(about),
            r#type: kind.to_owned(),
            reason: reason.to_owned(),
            message,
            count: 1,
            first_timestamp: Some(now),
            last_timestamp: Some(now),
            ..Event::default()
        };
        if self.0.try_send(event).is_err() {
            tracing::debug!(pod = pod.uid, reason, "an event was dropped");
        }
    }

    /// An image is looked for outside of this machine.
    pub fn pulling(&self, pod: &PodId, container: &str, image: &str) {
        let message = format!("Pulling image {image:?}");
        self.say(pod, Some(container), "Normal", "Pulling", message);
    }

    /// An image is ready for a container; pulling it took so long, if it was pulled.
    pub fn pulled(&self, pod: &PodId, container: &str, image: &str, took: Option<Duration>) {
        let message = match took {
            Some(took) => format!("Successfully pulled image {image:?} in {} ms", took.as_millis()),
            None => format!("Container image {image:?} already present on machine"),
        };
        self.say(pod, Some(container), "Normal", "Pulled", message);
    }

    /// A container was created and started.
    pub fn started(&self, pod: &PodId, container: &str) {
        self.say(
            pod,
            Some(container),
            "Normal",
            "Created",
            format!("Created container {container}"),
        );
        self.say(
            pod,
            Some(container),
            "Normal",
            "Started",
            format!("Started container {container}"),
        );
    }

    /// A container is asked to end.
    pub fn killing(&self, pod: &PodId, container: &str) {
        self.say(
            pod,
            Some(container),
            "Normal",
            "Killing",
            format!("Stopping container {container}"),
        );
    }

    /// The programs at the pod's interface were not ours to detach, and are attached again.
    pub fn hooks_lost(&self, pod: &PodId) {
        let message = "The programs that count the pod's traffic were detached by somebody else; attaching them again";
        self.say(pod, None, "Warning", "TrafficHooksLost", message.to_owned());
    }

    /// A container could not be started.
    pub fn not_started(&self, pod: &PodId, container: &str, image: &str, failed: &Failed) {
        let Failed { reason, message } = failed;
        let warn = |reason: &str, message: String| self.say(pod, Some(container), "Warning", reason, message);
        match reason.as_str() {
            Failed::UNWANTED => {}
            "ErrImagePull" => {
                warn("Failed", format!("Failed to pull image {image:?}: {message}"));
                warn("Failed", format!("Error: {reason}"));
            }
            "ErrImageNeverPull" => {
                warn("ErrImageNeverPull", message.clone());
                warn("Failed", format!("Error: {reason}"));
            }
            "InvalidImageName" => {
                warn("InspectFailed", message.clone());
                warn("Failed", format!("Error: {reason}"));
            }
            _ => warn("Failed", format!("Error: {message}")),
        }
    }

    /// Back-offs that the new status tells of, and the one before did not.
    pub fn back_offs(&self, pod: &Pod, before: &PodStatus, now: &PodStatus) {
        let id = crate::plan::pod_id(pod);
        for status in &now.container_statuses {
            let earlier = before.container_statuses.iter().find(|other| other.name == status.name);
            let reason = waiting_for(status);
            if earlier.map_or("", waiting_for) == reason {
                continue;
            }
            let name = status.name.as_str();
            match reason {
                "CrashLoopBackOff" => {
                    let (namespace, pod, uid) = (&id.namespace, &id.name, &id.uid);
                    let message =
                        format!("Back-off restarting failed container {name} in pod {pod}_{namespace}({uid})");
                    self.say(&id, Some(name), "Warning", "BackOff", message);
                }
                "ImagePullBackOff" => {
                    let message = format!("Back-off pulling image {:?}", status.image);
                    self.say(&id, Some(name), "Normal", "BackOff", message);
                    self.say(&id, Some(name), "Warning", "Failed", format!("Error: {reason}"));
                }
                _ => {}
            }
        }
    }
}

fn waiting_for(status: &ContainerStatus) -> &str {
    let waiting = status.state.as_ref().and_then(|state| state.waiting.as_ref());
    waiting.map_or("", |waiting| waiting.reason.as_str())
}

#[cfg(test)]
mod tests {
    use orlop_proto::{
        core::v1::{ContainerState, ContainerStateWaiting},
        meta::v1::ObjectMeta,
    };

    use super::*;

    fn status(reason: &str) -> PodStatus {
        let waiting = ContainerStateWaiting {
            reason: reason.to_owned(),
            ..Default::default()
        };
        PodStatus {
            container_statuses: vec![ContainerStatus {
                name: "web".to_owned(),
                image: "web:v1".to_owned(),
                state: Some(ContainerState {
                    waiting: Some(waiting),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    fn said(receiver: &mut mpsc::Receiver<Event>) -> Vec<String> {
        std::iter::from_fn(|| receiver.try_recv().ok())
            .map(|event| {
                let about = event.involved_object.unwrap();
                format!(
                    "{} {} {} {}: {}",
                    event.r#type, event.reason, about.name, about.field_path, event.message
                )
            })
            .collect()
    }

    #[test]
    fn a_back_off_is_told_when_it_begins() {
        let (sender, mut receiver) = mpsc::channel(16);
        let events = Events(sender);
        let metadata = ObjectMeta {
            namespace: "default".to_owned(),
            name: "p".to_owned(),
            uid: "u".to_owned(),
            ..Default::default()
        };
        let pod = Pod {
            metadata: Some(metadata),
            ..Default::default()
        };
        let none = PodStatus::default();
        events.back_offs(&pod, &none, &status("ContainerCreating"));
        events.back_offs(&pod, &status("CrashLoopBackOff"), &status("CrashLoopBackOff"));
        assert!(said(&mut receiver).is_empty());
        events.back_offs(&pod, &none, &status("CrashLoopBackOff"));
        events.back_offs(&pod, &status("ErrImagePull"), &status("ImagePullBackOff"));
        assert_eq!(
            said(&mut receiver),
            [
                "Warning BackOff p spec.containers{web}: Back-off restarting failed container web in pod p_default(u)",
                "Normal BackOff p spec.containers{web}: Back-off pulling image \"web:v1\"",
                "Warning Failed p spec.containers{web}: Error: ImagePullBackOff",
            ]
        );
    }

    #[test]
    fn failures_have_the_kubelets_words_and_a_full_channel_blocks_nobody() {
        let (sender, mut receiver) = mpsc::channel(3);
        let events = Events(sender);
        let pod = PodId {
            namespace: "default".to_owned(),
            name: "p".to_owned(),
            uid: "u".to_owned(),
        };
        let failed = |reason: &str| Failed {
            reason: reason.to_owned(),
            message: "why".to_owned(),
        };
        events.not_started(&pod, "web", "web:v1", &failed(Failed::UNWANTED));
        events.not_started(&pod, "web", "web:v1", &failed("CreateContainerError"));
        events.not_started(&pod, "web", "web:v1", &failed("ErrImagePull"));
        events.started(&pod, "web");
        assert_eq!(
            said(&mut receiver),
            [
                "Warning Failed p spec.containers{web}: Error: why",
                "Warning Failed p spec.containers{web}: Failed to pull image \"web:v1\": why",
                "Warning Failed p spec.containers{web}: Error: ErrImagePull",
            ]
        );
    }
}
