//! Orlop's control plane.

pub mod cache;
pub mod store;
