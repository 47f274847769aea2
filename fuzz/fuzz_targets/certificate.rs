//! Client certificates and requests for a node's: nobody becomes more than they are.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use orlop_control::{config::PkiConfig, pki::Authority, server::Identity};

static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("orlop-fuzz-pki-{}", std::process::id()));
    let authority = Authority::open(&dir, &PkiConfig::default()).expect("an authority");
    std::fs::remove_dir_all(&dir).expect("removes it");
    authority
});

fuzz_target!(|bytes: &[u8]| {
    // It is verified before; here it only must not do harm.
    Identity::from_certificate(bytes).describe();
    if let Ok(issued) = AUTHORITY.sign_node("n1", bytes) {
        match Identity::from_certificate(&issued.certificate) {
            Identity::Node { name, key } => assert!(&*name == "n1" && key == issued.key),
            other => panic!("{other:?}"),
        }
    }
});
