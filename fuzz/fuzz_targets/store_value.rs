//! Stored values: what is in a frame is what was put in, and an object is the one that its key names.
#![no_main]

use libfuzzer_sys::fuzz_target;
use orlop_control::{
    kinds::{KindVisitor, visit_kind},
    registry::{Registered, codec::decode},
    store::{Key, framed, unframed},
};
use orlop_proto::ResourceKind;

struct Stored<'a>(&'a [u8]);

impl KindVisitor for Stored<'_> {
    type Output = ();

    fn visit<T: Registered>(self) {
        let Ok(plain) = T::decode(self.0) else { return };
        let value = self.0.to_vec().into();
        let object: T =
            decode(&Key::object(&T::KIND, plain.namespace(), plain.name()), &value, 7).expect("its own key");
        assert_eq!(object.meta().resource_version, "7");
        assert!(decode::<T>(&Key::object(&T::KIND, "other", "name"), &value, 7).is_err() || plain.name() == "name");
    }
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = unframed(bytes) {
        assert_eq!(framed(&value), bytes);
    }
    assert_eq!(unframed(&framed(bytes)).expect("its own frame"), bytes);
    for kind in ResourceKind::ALL {
        visit_kind(kind, Stored(bytes));
    }
});
