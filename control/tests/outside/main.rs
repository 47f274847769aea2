//! Control from outside: a real server with the embedded store, on TLS and on a unix socket.

mod apply;
mod harness;
mod identity;
mod join;
mod objects;
mod patch;
mod requests;
mod watch;
