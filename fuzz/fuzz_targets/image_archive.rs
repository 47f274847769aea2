//! Image archives: a tar file of these bytes, and one whose index they are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::runtime::archives;

fuzz_target!(|bytes: &[u8]| {
    let _refused_or_read = archives::check(bytes);
});
