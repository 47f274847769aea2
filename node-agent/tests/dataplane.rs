//! The dataplane against the kernel: real programs, real sockets. Needs root; without it these tests fail.
//!
//! Every test runs in a process of its own (`stage`), in its own network and mount namespaces with a private bpffs,
//! and in a cgroup subtree that the test makes and removes. Nothing is sent outside.

#[path = "dataplane/lifecycle.rs"]
mod lifecycle;
#[path = "dataplane/maps.rs"]
mod maps;
#[path = "dataplane/metrics.rs"]
mod metrics;
#[path = "dataplane/sockets.rs"]
mod sockets;
#[path = "dataplane/stage.rs"]
mod stage;
