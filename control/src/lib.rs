//! Orlop's control plane.

pub mod cache;
pub mod config;
pub mod kinds;
pub mod pki;
pub mod registry;
pub mod server;
pub mod store;
