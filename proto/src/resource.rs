//! What every kind has in common, so that code can be written once for all of them.

use prost::Message;

use crate::{
    api::v1::{Object, object::Body},
    apps::v1::ReplicaSet,
    coordination::v1::Lease,
    core::v1::{Event, Namespace, Node, Pod, ReplicationController, Service},
    discovery::v1::EndpointSlice,
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
pub trait Resource: Message + Default + Clone + PartialEq + Send + Sync + 'static {
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

impl ResourceKind {
    /// The kind with this plural.
    pub fn by_resource(resource: &str) -> Option<ResourceKind> {
        Self::ALL.iter().find(|kind| kind.resource == resource).copied()
    }

    /// The kind that a manifest names.
    pub fn by_type(api_version: &str, kind: &str) -> Option<ResourceKind> {
        Self::ALL.iter().find(|known| known.api_version == api_version && known.kind == kind).copied()
    }
}
