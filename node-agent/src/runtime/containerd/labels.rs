//! The labels of containers: all that a later life of the agent knows about them.

/// The pod's name.
pub const POD_NAME: &str = "io.kubernetes.pod.name";
/// The pod's namespace.
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// The pod's uid.
pub const POD_UID: &str = "io.kubernetes.pod.uid";
/// The container's name in the pod.
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// Which start of the container this is.
pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
/// `sandbox` or `container`.
pub const KIND: &str = "orlop.dev/kind";
/// The sandbox that a container is in.
pub const SANDBOX: &str = "orlop.dev/sandbox";
/// How many sandboxes the pod had before this.
pub const ATTEMPT: &str = "orlop.dev/attempt";
/// A sandbox's addresses, with commas between them.
pub const ADDRESSES: &str = "orlop.dev/addresses";
/// The host's end of the sandbox's veth pair.
pub const HOST_INTERFACE: &str = "orlop.dev/host-interface";
/// The back-off before this start, in milliseconds.
pub const BACKOFF: &str = "orlop.dev/backoff-ms";
/// The pod's terminationGracePeriodSeconds.
pub const GRACE: &str = "orlop.dev/grace-seconds";
/// The image's StopSignal, where it names one.
pub const STOP_SIGNAL: &str = "orlop.dev/stop-signal";
/// The image as the pod names it.
pub const IMAGE: &str = "orlop.dev/image";
/// The image's digest for the status.
pub const IMAGE_ID: &str = "orlop.dev/image-id";
/// When the task was started; written after it was.
pub const STARTED_AT: &str = "orlop.dev/started-at";
/// Why the task could not be started.
pub const START_ERROR: &str = "orlop.dev/start-error";
/// When that was.
pub const FAILED_AT: &str = "orlop.dev/failed-at";
/// containerd takes 4096 bytes for a label's key and value together.
pub const MAX_VALUE: usize = 3000;
