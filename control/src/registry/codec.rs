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

#[cfg(test)]
mod tests {
    use orlop_proto::core::v1::Pod;

    use super::*;

    /// As the first version stored it: metadata, one container, restartPolicy, the grace period, the node.
    const POD: &str = "1a130a01611a0764656661756c7422057569642d61222a0a1a0a0377656212136f726c6f702e6465762f666978747572653a31\
                       1206416c77617973181e2a026e31";
    /// With a field 1000 in the pod, its metadata, its spec and its container.
    const NEWER: &str = "1a1b0a01611a0764656661756c7422057569642d61c23e056c61746572223a0a220a0377656212136f726c6f702e6465762f\
                         666978747572653a31c23e056c617465721206416c77617973181e2a026e31c23e056c61746572c23e056c61746572";

    #[test]
    fn objects_that_other_versions_stored_are_read() {
        let key = Key::object(&Pod::KIND, "default", "a");
        let read = |hex: &str| decode::<Pod>(&key, &hex::decode(hex).unwrap().into(), 7).unwrap();
        let pod = read(POD);
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!((pod.uid(), &*pod.meta().resource_version), ("uid-a", "7"));
        assert_eq!(
            (&*spec.containers[0].image, &*spec.node_name),
            ("orlop.dev/fixture:1", "n1")
        );
        assert_eq!(spec.termination_grace_period_seconds, Some(30));
        assert_eq!(read(NEWER), pod, "fields that are not known are passed over");
    }
}
