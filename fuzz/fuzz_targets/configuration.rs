//! The configuration files of control and agent.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(config) = toml::from_str::<orlop_control::config::Config>(text)
        && config.check().is_ok()
    {
        config.registry();
    }
    if let Ok(config) = toml::from_str::<orlop_node::config::Config>(text) {
        config.instance();
    }
});
