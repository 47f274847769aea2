//! Orlop's node agent.

pub mod agent;
pub mod config;
pub mod dataplane;
pub mod desired;
pub mod identity;
pub mod ledger;
pub mod link;
pub mod memory;
pub mod metrics;
pub mod network;
pub mod node_status;
pub mod plan;
pub mod reconciler;
pub mod runtime;
pub mod simulated;
