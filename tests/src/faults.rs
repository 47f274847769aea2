//! Faults: what is done to a lab, and what holds all the while.
//!
//! - [`plan`] decides, purely, from a seed: which faults, in which order, on whom, for how long.
//! - `act` acts a planned fault out, through the supervisor or a signal, and waits for its end.
//! - [`vigil`] is what goes on meanwhile and is looked at after each fault: pods that must not restart, a long connection, an
//!   open loop of requests, addresses; and the writers and watchers of [`recorder`].
//! - [`history`] is the model that every write and every watch is checked against in the end, purely.
//! - [`versions`] says which version of control or of an agent comes next, where there are two.
//! - [`campaign`] is rounds of all that in one lab.
//!
//! A new fault is a variant of [`plan::Kind`] and [`plan::Fault`], and an arm of `Vigil::suffer`.

mod act;
pub mod campaign;
pub mod history;
pub mod plan;
pub mod pods;
pub mod recorder;
pub mod versions;
pub mod vigil;
