//! What every kind has in common, so that code can be written once for all of them.

use prost::{DecodeError, Message};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    api::v1::{Object, object::Body},
    apps::v1::ReplicaSet,
    coordination::v1::Lease,
    core::v1::{Event, Namespace, Node, Pod, ReplicationController, Service},
    discovery::v1::EndpointSlice,
    json::JsonError,
    meta::v1::ObjectMeta,
};

/// A kind of object, as the API and the store know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceKind {
    /// "v1", "apps/v1", ...
    pub api_version: &'static str,
    /// "Pod", ...
    pub kind: &'static str,
    /// The plural in lower case, "pods": the name in store keys and requests.
    pub resource: &'static str,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
}

/// A message that is an object of the model.
pub trait Resource:
    Message + Default + Clone + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// Its kind.
    const KIND: ResourceKind;

    /// Its metadata; an absent message reads as the empty one.
    fn meta(&self) -> &ObjectMeta;
    /// Its metadata, made present.
    fn meta_mut(&mut self) -> &mut ObjectMeta;
    /// Writes `apiVersion` and `kind`.
    fn set_type(&mut self);
    /// As an object of any kind.
    fn into_object(self) -> Object;
    /// The object of this kind, or `None` when it is of another.
    fn from_object(object: Object) -> Option<Self>;

    /// The object's name.
    fn name(&self) -> &str {
        &self.meta().name
    }
    /// The object's namespace, empty for cluster-wide kinds.
    fn namespace(&self) -> &str {
        &self.meta().namespace
    }
    /// The object's uid.
    fn uid(&self) -> &str {
        &self.meta().uid
    }
    /// Whether a deletion has been asked for.
    fn is_deleting(&self) -> bool {
        self.meta().deletion_timestamp.is_some()
    }
}

static EMPTY_META: ObjectMeta = ObjectMeta {
    name: String::new(),
    generate_name: String::new(),
    namespace: String::new(),
    uid: String::new(),
    resource_version: String::new(),
    generation: 0,
    creation_timestamp: None,
    deletion_timestamp: None,
    deletion_grace_period_seconds: None,
    labels: std::collections::BTreeMap::new(),
    annotations: std::collections::BTreeMap::new(),
    owner_references: Vec::new(),
    finalizers: Vec::new(),
};

/// Evaluates an expression for whatever an object holds: `with_body!(body, object => object.name().to_owned())`, where
/// `body` is an `object::Body`, or a reference to one.
#[macro_export]
macro_rules! with_body {
    ($body:expr, $object:ident => $result:expr) => {
        match $body {
            $crate::api::v1::object::Body::Namespace($object) => $result,
            $crate::api::v1::object::Body::Node($object) => $result,
            $crate::api::v1::object::Body::Pod($object) => $result,
            $crate::api::v1::object::Body::Service($object) => $result,
            $crate::api::v1::object::Body::EndpointSlice($object) => $result,
            $crate::api::v1::object::Body::ReplicationController($object) => $result,
            $crate::api::v1::object::Body::ReplicaSet($object) => $result,
            $crate::api::v1::object::Body::Event($object) => $result,
            $crate::api::v1::object::Body::Lease($object) => $result,
        }
    };
}

/// Evaluates an expression with the message type of a [`ResourceKind`] (a place, not an expression with effects):
/// `with_kind!(kind, T => Ok(list::<T>()), else Err(UnknownKind))`.
#[macro_export]
macro_rules! with_kind {
    ($kind:expr, $message:ident => $result:expr, else $unknown:expr) => {
        match $kind.resource {
            "namespaces" => {
                type $message = $crate::core::v1::Namespace;
                $result
            }
            "nodes" => {
                type $message = $crate::core::v1::Node;
                $result
            }
            "pods" => {
                type $message = $crate::core::v1::Pod;
                $result
            }
            "services" => {
                type $message = $crate::core::v1::Service;
                $result
            }
            "endpointslices" => {
                type $message = $crate::discovery::v1::EndpointSlice;
                $result
            }
            "replicationcontrollers" => {
                type $message = $crate::core::v1::ReplicationController;
                $result
            }
            "replicasets" => {
                type $message = $crate::apps::v1::ReplicaSet;
                $result
            }
            "events" => {
                type $message = $crate::core::v1::Event;
                $result
            }
            "leases" => {
                type $message = $crate::coordination::v1::Lease;
                $result
            }
            _ => $unknown,
        }
    };
}

macro_rules! resources {
    ($($message:ident, $variant:ident, $api_version:literal, $resource:literal, $namespaced:literal;)*) => {
        $(
            impl Resource for $message {
                const KIND: ResourceKind = ResourceKind {
                    api_version: $api_version,
                    kind: stringify!($message),
                    resource: $resource,
                    namespaced: $namespaced,
                };

                fn meta(&self) -> &ObjectMeta {
                    self.metadata.as_ref().unwrap_or(&EMPTY_META)
                }
                fn meta_mut(&mut self) -> &mut ObjectMeta {
                    self.metadata.get_or_insert_default()
                }
                fn set_type(&mut self) {
                    self.api_version = $api_version.to_owned();
                    self.kind = stringify!($message).to_owned();
                }
                fn into_object(self) -> Object {
                    Object { body: Some(Body::$variant(self)) }
                }
                fn from_object(object: Object) -> Option<Self> {
                    match object.body {
                        Some(Body::$variant(message)) => Some(message),
                        _ => None,
                    }
                }
            }
        )*

        impl ResourceKind {
            /// All kinds of the model.
            pub const ALL: &'static [ResourceKind] = &[$(<$message as Resource>::KIND),*];
        }

        /// The kind of an object; `None` when its body is not set.
        pub fn object_kind(object: &Object) -> Option<ResourceKind> {
            object.body.as_ref().map(|body| match body {
                $(Body::$variant(_) => <$message as Resource>::KIND,)*
            })
        }

        impl Object {
            /// The metadata of the object inside; `None` when the body is not set.
            pub fn meta(&self) -> Option<&ObjectMeta> {
                self.body.as_ref().map(|body| match body {
                    $(Body::$variant(message) => message.meta(),)*
                })
            }

            /// The metadata of the object inside, made present; `None` when the body is not set.
            pub fn meta_mut(&mut self) -> Option<&mut ObjectMeta> {
                self.body.as_mut().map(|body| match body {
                    $(Body::$variant(message) => message.meta_mut(),)*
                })
            }

            /// Reads the JSON of an object of this kind; `apiVersion` and `kind` in it are not looked at.
            pub fn from_value_as(kind: ResourceKind, value: &Value) -> Result<Self, Vec<JsonError>> {
                match kind.kind {
                    $(stringify!($message) => crate::json::from_value::<$message>(value).map(Resource::into_object),)*
                    unknown => Err(vec![JsonError::unknown_kind(kind.api_version, unknown)]),
                }
            }

            /// Decodes the message of an object of this kind (not of an `Object` around it).
            pub fn decode_as(kind: ResourceKind, bytes: &[u8]) -> Result<Self, DecodeError> {
                match kind.kind {
                    $(stringify!($message) => <$message>::decode(bytes).map(Resource::into_object),)*
                    unknown => Err(DecodeError::new_unexpected_type_url(unknown, "a kind of the model")),
                }
            }

            /// Encodes the message of the object inside, without the `Object` around it.
            pub fn encode_inner(&self) -> Vec<u8> {
                match &self.body {
                    $(Some(Body::$variant(message)) => message.encode_to_vec(),)*
                    None => Vec::new(),
                }
            }

            /// Writes `apiVersion` and `kind` of the object inside.
            pub fn set_type(&mut self) {
                match &mut self.body {
                    $(Some(Body::$variant(message)) => message.set_type(),)*
                    None => {}
                }
            }
        }
    };
}

resources! {
    Namespace, Namespace, "v1", "namespaces", false;
    Node, Node, "v1", "nodes", false;
    Pod, Pod, "v1", "pods", true;
    Service, Service, "v1", "services", true;
    EndpointSlice, EndpointSlice, "discovery.k8s.io/v1", "endpointslices", true;
    ReplicationController, ReplicationController, "v1", "replicationcontrollers", true;
    ReplicaSet, ReplicaSet, "apps/v1", "replicasets", true;
    Event, Event, "v1", "events", true;
    Lease, Lease, "coordination.k8s.io/v1", "leases", true;
}

impl Object {
    /// The kind of the object inside; `None` when the body is not set.
    pub fn kind(&self) -> Option<ResourceKind> {
        object_kind(self)
    }

    /// The object's JSON, as Kubernetes writes it.
    pub fn to_value(&self) -> Result<Value, serde_json::Error> {
        serde_json::to_value(self)
    }
}

impl ResourceKind {
    /// The kind with this plural.
    pub fn by_resource(resource: &str) -> Option<ResourceKind> {
        Self::ALL.iter().find(|kind| kind.resource == resource).copied()
    }

    /// The kind that a manifest names.
    pub fn by_type(api_version: &str, kind: &str) -> Option<ResourceKind> {
        Self::ALL
            .iter()
            .find(|known| known.api_version == api_version && known.kind == kind)
            .copied()
    }
}
