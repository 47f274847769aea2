//! What a CNI runtime gives our plugin: variables in the first lines, then stdin. Checked, not acted upon.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use orlop_bridge::{config, request, result::CniResult, version::CniVersion};

const NAMES: [&str; 5] = ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS"];

fuzz_target!(|text: &str| {
    let mut lines = text.splitn(NAMES.len() + 1, '\n');
    let env: BTreeMap<String, String> = NAMES
        .into_iter()
        .map_while(|name| lines.next().map(|line| (name.to_owned(), line.to_owned())))
        .collect();
    let mut args = BTreeMap::new();
    if let Ok(verb) = request::verb(&env)
        && let Ok(attachment) = request::attachment(&env, verb)
    {
        assert!(!attachment.container_id.contains('/') && !attachment.ifname.contains('/'));
        args = attachment.args;
    }
    let Ok(object) = config::object(lines.next().unwrap_or_default().as_bytes()) else {
        return;
    };
    if let Some(previous) = object.get("prevResult")
        && let Ok(result) = CniResult::parse(previous)
    {
        for version in CniVersion::ALL {
            CniResult::parse(&result.to_json(version)).expect("its own result is read");
        }
    }
    let _refused_or_read = config::Config::parse(object, &args);
});
