//! Join tokens: what is read is well-formed, and is written as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_control::pki::Token;

fuzz_target!(|text: &str| {
    let Ok(token) = Token::parse(text) else { return };
    // It becomes a part of a key.
    assert!(token.id.len() == 16 && token.id.bytes().all(|byte| byte.is_ascii_hexdigit()));
    assert!(token.to_string().eq_ignore_ascii_case(text));
});
