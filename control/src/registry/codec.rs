//! Objects as the store has them.

use bytes::Bytes;
use orlop_proto::Resource;

use crate::store::{Key, Revision, StoreError};

/// As stored: without its resourceVersion, which is the record's revision, so that equal objects have equal bytes.
pub(super) fn encode<T: Resource>(object: &mut T) -> Bytes {
    object.set_type();
    let version = std::mem::take(&mut object.meta_mut().resource_version);
    let bytes = object.encode_to_vec().into();
    object.meta_mut().resource_version = version;
    bytes
}

/// A stored object with its resourceVersion.
pub fn decode<T: Resource>(key: &Key, value: &Bytes, revision: Revision) -> Result<T, StoreError> {
    let mut object = T::decode(value.clone()).map_err(|error| StoreError::damaged(key, error.to_string()))?;
    if Key::object(&T::KIND, object.namespace(), object.name()) != *key {
        let reason = format!("it holds {}/{}", object.namespace(), object.name());
        return Err(StoreError::damaged(key, reason));
    }
    object.meta_mut().resource_version = revision.to_string();
    Ok(object)
}
