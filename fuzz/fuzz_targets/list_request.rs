//! A list's selectors of labels and of fields, and its `continue`, one a line, for every kind.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_control::api::{list::Continue, select::Selection};
use orlop_proto::ResourceKind;

fuzz_target!(|text: &str| {
    let mut lines = text.splitn(3, '\n');
    let mut line = || lines.next().unwrap_or_default();
    let (labels, fields, token) = (line(), line(), line());
    for kind in ResourceKind::ALL {
        if let Err(refused) = Selection::parse(kind, "default", labels, fields) {
            assert!(
                refused.message().chars().all(|c| c == '\n' || !c.is_control()),
                "{refused:?}"
            );
        }
    }
    if let Some(begin) = Continue::from_text(token) {
        assert_eq!(Continue::from_text(&begin.to_text()), Some(begin));
    }
});
