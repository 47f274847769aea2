//! Image references: what is normalised is normal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::runtime::reference::Reference;

fuzz_target!(|text: &str| {
    let Ok(reference) = Reference::parse(text) else { return };
    assert_eq!(
        Reference::parse(&reference.to_string()).expect("a normal reference"),
        reference
    );
});
