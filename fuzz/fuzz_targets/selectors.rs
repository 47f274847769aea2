//! Label and field selectors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_control::model::selector::{FieldSelector, Selector};
use orlop_proto::core::v1::Pod;

fuzz_target!(|text: &str| {
    if let Ok(selector) = Selector::parse(text) {
        let labels = [("app".to_owned(), "web".to_owned())].into();
        assert!(selector.matches(&labels) || !selector.is_everything());
    }
    if let Ok(selector) = FieldSelector::parse::<Pod>(text) {
        assert!(selector.matches(&Pod::default()) || !selector.is_everything());
    }
});
