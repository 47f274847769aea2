//! Quantities: what is written is read as the same amount.
#![no_main]

use std::cmp::Ordering;

use libfuzzer_sys::fuzz_target;
use orlop_proto::quantity::{Quantity, compare};

fuzz_target!(|text: &str| {
    let Ok(quantity) = text.parse::<Quantity>() else { return };
    let written = quantity.to_string();
    assert_eq!(
        written.parse::<Quantity>().expect("what was written is read"),
        quantity,
        "{text:?} {written:?}"
    );
    assert_eq!(compare(text, text), Some(Ordering::Equal), "{text:?}");
});
