//! The controllers and the scheduler over a real store, without nodes.
