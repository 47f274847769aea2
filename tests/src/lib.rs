//! Orlop's lab: a whole cluster in namespaces of one machine, for `cargo xtask up`, the end-to-end tests and the benchmarks.
//!
//! Every node is a network, mount, cgroup and UTS namespace with its own containerd and agent, cabled to a bridge in a
//! namespace that has no way out. Invariant: everything that a lab starts is in one cgroup, and everything that it mounts
//! or pins is in a mount namespace, so ending the processes of that cgroup removes every trace, also after a crash.

pub mod cgroup;
pub mod client;
pub mod disk;
pub mod faults;
pub mod images;
pub mod lab;
pub mod layout;
pub mod namespaces;
pub mod registry;
pub mod supervisor;
pub mod workload;
