//! Orlop in one thread: control and agents, the real ones, over a store, machines and a network of this process, under crashes and
//! faults, with a clock that jumps to what is due next. What happens follows a seed, so that what fails once fails again.

pub mod adversary;
pub mod cluster;
pub mod control;
pub mod environment;
pub mod machine;
pub mod mortal;
mod nodes;
pub mod runs;
pub mod scenarios;
pub mod state;
pub mod storm;
pub mod wire;
