//! The ledger's files: `node`, `services` and a pod of these bytes, with and without a sound frame. They are read or put aside.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::ledger::read_body;

fuzz_target!(|bytes: &[u8]| {
    read_body(bytes);
});
