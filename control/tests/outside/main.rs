//! Control from outside: real servers with the embedded store, and with etcd, on TLS and on a unix socket.

mod allocator;
mod apply;
mod bounds;
mod compacted;
mod continue_tokens;
mod damaged;
mod etcd;
mod etcd_server;
mod harness;
mod hostile_grpc;
mod hostile_manifests;
mod identities;
mod identity;
mod join;
mod log;
mod nodes;
mod objects;
mod patch;
mod propagation;
mod requests;
mod watch;
mod wire;
