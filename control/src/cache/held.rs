//! Objects as the cache holds them: encoded, as the store has them, and packed. A decoded pod takes twelve times its encoding.
//!
//! Who asks for an object gets it decoded. One that was written a moment ago is still decoded, since everybody reads it: those who follow,
//! and who writes it again. One that is asked for again and again (a list that is polled) stays decoded as long as that goes on.

use std::{
    ops::RangeBounds,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use orlop_proto::Resource;

use super::{
    ObjectKey,
    packed::{Packed, Packer},
};
use crate::store::{Key, Revision};

/// An object at one revision. Clones share it.
#[derive(Debug)]
pub(super) struct Held<T>(Arc<Encoded<T>>);

#[derive(Debug)]
struct Encoded<T> {
    value: Packed,
    /// 0 when it is not known.
    revision: Revision,
    asked: Mutex<Use<T>>,
}

/// How much an object is asked for.
#[derive(Debug)]
enum Use<T> {
    /// It was written a moment ago.
    Fresh(Arc<T>),
    /// Not lately.
    None,
    /// Once since the last sweep.
    Once,
    /// Again and again.
    Much { object: Arc<T>, lately: bool },
}

impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Resource> Held<T> {
    /// A stored object that is fresh, and what it holds; a damaged one is reported and put aside. The revision is 0 when it is not
    /// known. Without a packer it is held as it is.
    pub(super) fn new(
        key: &Key,
        value: &bytes::Bytes,
        revision: Revision,
        packer: Option<&Packer>,
    ) -> Option<(Self, Arc<T>)> {
        let object = match crate::registry::decode::<T>(key, value, revision) {
            Ok(object) => Arc::new(versioned(object, revision)),
            Err(error) => {
                tracing::error!(%key, %error, "a stored object is damaged and was put aside");
                return None;
            }
        };
        let encoded = Encoded {
            value: packer.map_or_else(|| Packed::plain(value), |packer| packer.pack(value)),
            revision,
            asked: Mutex::new(Use::Fresh(object.clone())),
        };
        Some((Self(Arc::new(encoded)), object))
    }

    /// The object itself, for somebody who may ask again.
    pub(super) fn object(&self) -> Arc<T> {
        let mut known = self.0.lock();
        match &mut *known {
            Use::Fresh(object) => object.clone(),
            Use::Much { object, lately } => {
                *lately = true;
                object.clone()
            }
            other => {
                let object = self.0.decode();
                *other = match other {
                    Use::None => Use::Once,
                    _ => Use::Much {
                        object: object.clone(),
                        lately: true,
                    },
                };
                object
            }
        }
    }

    /// The object itself, for somebody who is not to be remembered.
    pub(super) fn peek(&self) -> Arc<T> {
        if let Use::Fresh(object) | Use::Much { object, .. } = &*self.0.lock() {
            return object.clone();
        }
        self.0.decode()
    }

    /// Bytes of its encoding.
    pub(super) fn size(&self) -> usize {
        self.0.value.len()
    }

    /// Another has taken its place: nobody will ask for it again, but those who follow.
    pub(super) fn replaced(&self) {
        self.forget_if(|known| !matches!(known, Use::Fresh(_)));
    }

    /// It is not fresh any more.
    pub(super) fn age(&self) {
        self.forget_if(|known| matches!(known, Use::Fresh(_)));
    }

    fn forget_if(&self, is_over: impl FnOnce(&Use<T>) -> bool) {
        let mut known = self.0.lock();
        if is_over(&known) {
            *known = Use::None;
        }
    }

    /// Nobody who does not ask again before the next sweep will be remembered.
    pub(super) fn sweep(&self) {
        let mut known = self.0.lock();
        match &mut *known {
            Use::Fresh(_) => {}
            Use::Much { lately, .. } if *lately => *lately = false,
            other => *other = Use::None,
        }
    }
}

impl<T: Resource> Encoded<T> {
    /// # Panics
    /// Never: it was decoded when it came.
    fn decode(&self) -> Arc<T> {
        let mut object = self
            .value
            .with(|value| T::decode(value).expect("it was decoded when it came"));
        object.meta_mut().resource_version = self.revision.to_string();
        Arc::new(versioned(object, self.revision))
    }

    fn lock(&self) -> MutexGuard<'_, Use<T>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An object whose revision is not known has none.
fn versioned<T: Resource>(mut object: T, revision: Revision) -> T {
    if revision == 0 {
        object.meta_mut().resource_version.clear();
    }
    object
}

/// All objects of a kind, in the order of namespace, then name. A clone costs a pointer. Objects are decoded as they are asked for.
#[derive(Debug)]
pub struct Objects<T> {
    pub(super) held: imbl::OrdMap<ObjectKey, Held<T>>,
}

impl<T> Clone for Objects<T> {
    fn clone(&self) -> Self {
        Self {
            held: self.held.clone(),
        }
    }
}

impl<T: Resource> Objects<T> {
    pub(super) fn new() -> Self {
        Self {
            held: imbl::OrdMap::new(),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The object with this key.
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<T>> {
        self.held.get(key).map(Held::object)
    }

    /// The object with this key, for somebody who is not to be remembered.
    pub fn peek_at(&self, key: &ObjectKey) -> Option<Arc<T>> {
        self.held.get(key).map(Held::peek)
    }

    /// Whether there is one with this key.
    pub fn contains_key(&self, key: &ObjectKey) -> bool {
        self.held.contains_key(key)
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &ObjectKey> {
        self.held.keys()
    }

    /// All objects.
    pub fn values(&self) -> impl Iterator<Item = Arc<T>> {
        self.held.values().map(Held::object)
    }

    /// All objects, for somebody who goes through them now and then: they are not kept decoded for that.
    pub fn peek(&self) -> impl Iterator<Item = Arc<T>> {
        self.held.values().map(Held::peek)
    }

    /// All objects with their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, Arc<T>)> {
        self.held.iter().map(|(key, held)| (key, held.object()))
    }

    /// The objects of a range of keys, with their keys.
    pub fn range(&self, range: impl RangeBounds<ObjectKey>) -> impl Iterator<Item = (&ObjectKey, Arc<T>)> {
        self.held.range(range).map(|(key, held)| (key, held.object()))
    }
}

impl<T: Resource> Objects<T> {
    /// To be called every now and then: see [`Held::sweep`].
    pub(super) fn sweep(&self) {
        self.held.values().for_each(Held::sweep);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use orlop_proto::core::v1::Pod;
    use prost::Message as _;

    use super::*;

    #[test]
    fn what_is_asked_for_again_and_again_stays_decoded_as_long_as_that_goes_on() {
        let mut pod = Pod::default();
        pod.meta_mut().namespace = "default".to_owned();
        pod.meta_mut().name = "a".to_owned();
        let value = Bytes::from(pod.encode_to_vec());
        let (held, _) = Held::<Pod>::new(&Key::object(&Pod::KIND, "default", "a"), &value, 7, None).unwrap();
        let is_kept = || Arc::ptr_eq(&held.peek(), &held.peek());
        held.sweep();
        held.replaced();
        assert!(is_kept(), "it is fresh");
        held.age();
        assert!(!is_kept());
        assert_eq!(held.object().meta().resource_version, "7");
        assert!(!is_kept(), "once is not much");
        held.sweep();
        held.object();
        assert!(!is_kept(), "the first time is forgotten");
        held.object();
        assert!(is_kept());
        held.sweep();
        assert!(is_kept(), "it was asked for since the sweep before");
        held.sweep();
        assert!(!is_kept());
        held.object();
        held.object();
        held.replaced();
        assert!(!is_kept());
    }
}
