//! Orlop's node agent.

pub mod config;
pub mod dataplane;
pub mod desired;
pub mod network;
pub mod reconciler;
pub mod runtime;
