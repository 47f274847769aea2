//! An image's `User`, its passwd and its group file: root only who is said to be.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_node::runtime::containerd::users::find;

fuzz_target!(|text: &str| {
    let mut parts = text.splitn(3, "\n---\n");
    let mut part = || parts.next().unwrap_or_default();
    let (user, passwd, group) = (part(), part(), part());
    if let Ok(found) = find(user, passwd, group) {
        let name = user.split(':').next().unwrap_or_default();
        match name.parse::<u32>() {
            Ok(number) if passwd.is_empty() => assert_eq!(found.uid, number),
            Ok(_) => {}
            Err(_) => assert!(passwd.contains(name), "a user from nowhere"),
        }
    }
});
