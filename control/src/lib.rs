//! Orlop's control plane.

pub mod advertise;
pub mod api;
pub mod cache;
pub mod config;
pub mod controllers;
pub mod events;
pub mod kinds;
pub mod leader;
pub mod link;
pub mod manifest;
pub mod merge;
pub mod metrics;
pub mod model;
pub mod panics;
pub mod pki;
pub mod registry;
pub mod run;
pub mod scheduler;
pub mod server;
pub mod store;
