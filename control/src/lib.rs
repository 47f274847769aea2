//! Orlop's control plane.

pub mod cache;
pub mod kinds;
pub mod registry;
pub mod store;
