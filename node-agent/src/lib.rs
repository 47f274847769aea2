//! Orlop's node agent.

pub mod desired;
