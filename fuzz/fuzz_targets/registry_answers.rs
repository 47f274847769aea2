//! What a registry and its token service answer: the first line is a `Content-Range`, the rest a body.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::runtime::registry::{complaint, endpoint::token_in, range_begin};

fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let (range, body) = (&bytes[..end], bytes.get(end + 1..).unwrap_or_default());
    if let Ok(range) = std::str::from_utf8(range)
        && let Some(begin) = range_begin(range)
    {
        assert!(range.contains(&begin.to_string()), "{range:?}: {begin}");
    }
    if let Ok(token) = token_in(body) {
        assert!(!token.is_empty());
    }
    for status in [400, 404, 500] {
        let text = complaint(status, body).expect("a status");
        assert!(text.starts_with(&format!("HTTP status {status}")), "{text:?}");
        assert!(
            text.chars().count() <= 512 && !text.chars().any(char::is_control),
            "{text:?}"
        );
    }
});
