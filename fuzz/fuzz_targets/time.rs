//! Times: what is read is written in its canonical form, and read again as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_proto::time::{format_seconds, parse};

fuzz_target!(|text: &str| {
    let Ok(time) = parse(text) else { return };
    let seconds = parse(&format_seconds(&time)).expect("what was written is read");
    assert_eq!(seconds.seconds, time.seconds, "{text:?}");
});
