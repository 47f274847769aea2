//! Orlop's node agent.

pub mod config;
pub mod dataplane;
pub mod desired;
pub mod ledger;
pub mod link;
pub mod network;
pub mod plan;
pub mod reconciler;
pub mod runtime;
