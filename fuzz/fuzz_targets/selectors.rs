//! Label and field selectors, two in two lines: what both select together is what each selects, and nothing that lacks what they require.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use orlop_control::model::selector::{FieldSelector, Selector};
use orlop_proto::core::v1::Pod;

fuzz_target!(|text: &str| {
    let (first, second) = text.split_once('\n').unwrap_or((text, ""));
    let together = format!("{first},{second}");
    if let (Ok(one), Ok(other)) = (Selector::parse(first), Selector::parse(second)) {
        let both = Selector::parse(&together).ok();
        let splits = !one.is_everything() && !other.is_everything();
        assert!(!splits || both.is_some() || together.len() > 4096, "{together:?}");
        let required: BTreeMap<String, String> = one
            .required_labels()
            .map(|(label, value)| (label.to_owned(), value.to_owned()))
            .collect();
        let web = [("app".to_owned(), "web".to_owned())].into();
        for labels in [BTreeMap::new(), web, required.clone()] {
            assert!(one.matches(&labels) || !one.is_everything());
            if one.matches(&labels) {
                assert!(
                    one.required_labels()
                        .all(|(label, value)| labels.get(label).is_some_and(|has| has == value))
                );
            }
            if let (true, Some(both)) = (splits, &both) {
                assert_eq!(
                    both.matches(&labels),
                    one.matches(&labels) && other.matches(&labels),
                    "{together:?}"
                );
            }
        }
    }
    if let (Ok(one), Ok(other)) = (FieldSelector::parse::<Pod>(first), FieldSelector::parse::<Pod>(second)) {
        let pod = Pod::default();
        assert!(one.matches(&pod) || !one.is_everything());
        // A backslash would take the comma to itself.
        if !one.is_everything()
            && !other.is_everything()
            && !first.ends_with('\\')
            && let Ok(both) = FieldSelector::parse::<Pod>(&together)
        {
            assert_eq!(
                both.matches(&pod),
                one.matches(&pod) && other.matches(&pod),
                "{together:?}"
            );
        }
    }
});
