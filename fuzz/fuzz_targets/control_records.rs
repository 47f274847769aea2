//! Control's own records: join tokens, the keys of nodes, the log of changes. Whatever is in them, nobody gets in by it.
#![no_main]

use std::time::{Duration, SystemTime};

use libfuzzer_sys::fuzz_target;
use orlop_control::{
    pki::{KeyHash, Token, TokenRecord, is_binding_of},
    store::{Change, embedded::logged},
};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(record) = serde_json::from_slice::<TokenRecord>(bytes) {
        assert!(!Token::generate("ca").matches(&record), "a secret that nobody knew");
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 32);
        assert_eq!(record.is_expired(at), record.expires <= 1 << 32);
        let written = serde_json::to_vec(&record).expect("a record has JSON");
        assert_eq!(
            serde_json::from_slice::<TokenRecord>(&written).expect("its own JSON"),
            record
        );
    }
    assert!(!is_binding_of(bytes, KeyHash::of(b"a key that nobody has")));
    if let Some(set) = logged(bytes, 7) {
        assert_eq!(set.revision, 7);
        for change in set.changes {
            if let Change::Put { record, .. } = change {
                assert_eq!(record.revision, 7);
            }
        }
    }
});
