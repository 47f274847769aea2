//! What the program tells its allocator, which jemalloc finds by a symbol's name alone: a wrong name would go unnoticed.

use std::process::Command;

#[test]
fn jemalloc_takes_every_option_that_it_is_told() {
    let output = Command::new(env!("CARGO_BIN_EXE_orlop-control"))
        .arg("--version")
        .env("_RJEM_MALLOC_CONF", "confirm_conf:true,abort_conf:true")
        .output()
        .expect("the program runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    for option in [
        "narenas:2",
        "background_thread:true",
        "dirty_decay_ms:3000",
        "muzzy_decay_ms:0",
    ] {
        assert!(told.contains(&format!("Set conf value: {option}")), "{option}: {told}");
    }
}
