//! The gRPC service `orlop.api.v1.Objects`: one small verb set over all kinds.
//!
//! It parses and answers; what a write means is the registry's business. Who may call is decided before, in `server`.

mod apply;
mod describe;
mod errors;
#[doc(hidden)]
pub mod list;
#[doc(hidden)]
pub mod patch;
mod raw;
#[doc(hidden)]
pub mod select;
mod watch;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::StreamExt;
use orlop_proto::{
    ResourceKind,
    api::v1::{
        ApplyRequest, CreateRequest, DeleteRequest, GetRequest, ListRequest, Object, ObjectList, PatchRequest,
        UpdateRequest, WatchRequest, objects_server,
    },
    object_kind,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

pub use describe::error_details;
pub use errors::{BadRequest, ErrorInfo, FieldViolation, RpcStatus};
pub use raw::{RawObjectList, RawObjects, RawWatchEvent};

use crate::{
    cache::{Cache, ObjectKey},
    registry::{DeleteOptions, Preconditions, Propagation, Registry},
    server::caller,
};

/// How long a read waits for the cache to have what the store has.
const FRESH: Duration = Duration::from_secs(5);

/// The service. Clones share everything.
#[derive(Clone)]
pub struct ObjectsService {
    registry: Registry,
    shutdown: CancellationToken,
}

impl ObjectsService {
    /// Over a registry; watches end with UNAVAILABLE at `shutdown`.
    pub fn new(registry: Registry, shutdown: CancellationToken) -> Self {
        Self { registry, shutdown }
    }

    /// The service for the routes: [`Watch`](objects_server::Objects::watch) sends each event's one encoding to all watchers,
    /// and [`List`](objects_server::Objects::list) never has all objects decoded.
    /// Messages are bounded by `message_bytes`, those of Apply by `manifest_bytes`.
    pub fn into_server(self, message_bytes: usize, manifest_bytes: usize) -> RawObjects {
        RawObjects::new(self, message_bytes, manifest_bytes)
    }

    fn cache(&self) -> &Cache {
        self.registry.cache()
    }

    /// Waits until the cache is as new as the store, so that who has written reads what he wrote.
    async fn catch_up(&self) -> Result<(), Status> {
        match self.cache().catch_up(FRESH).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Status::unavailable("the watch cache is behind the store; try again")),
            Err(error) => Err(errors::of_store(&error)),
        }
    }

    /// A list as it goes over the wire.
    async fn raw_list(&self, request: ListRequest) -> Result<RawObjectList, Status> {
        list::list(self, request).await
    }

    /// A watch as it goes over the wire.
    async fn raw_watch(&self, request: WatchRequest) -> Result<watch::RawStream, Status> {
        let kind = kind_of(&request.resource)?;
        watch::open(self, &kind, request).await
    }
}

/// A stream of answers.
pub type Answers<T> = futures::stream::BoxStream<'static, Result<T, Status>>;

#[async_trait]
impl objects_server::Objects for ObjectsService {
    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<Object>, Status> {
        let by = caller(&request);
        let (kind, object) = body_of(request.into_inner().object, true)?;
        let object = self
            .registry
            .create_object(object)
            .await
            .map_err(|error| errors::of_registry(&error))?;
        audit("create", &by.describe(), &kind, &object);
        Ok(Response::new(object))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Object>, Status> {
        let request = request.into_inner();
        let kind = kind_of(&request.resource)?;
        let key = key_of(&kind, &request.namespace, &request.name)?;
        let object = self
            .registry
            .get_object(&kind, &key)
            .await
            .map_err(|error| errors::of_registry(&error))?;
        Ok(Response::new(object))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ObjectList>, Status> {
        let list = self.raw_list(request.into_inner()).await?;
        list.decode().map(Response::new)
    }

    type WatchStream = Answers<orlop_proto::api::v1::WatchEvent>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let events = self.raw_watch(request.into_inner()).await?;
        Ok(Response::new(
            events.map(|event| event.and_then(RawWatchEvent::decode)).boxed(),
        ))
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        let by = caller(&request);
        let (kind, object) = body_of(request.into_inner().object, false)?;
        let object = self
            .registry
            .update_object(object)
            .await
            .map_err(|error| errors::of_registry(&error))?;
        audit("update", &by.describe(), &kind, &object);
        Ok(Response::new(object))
    }

    async fn update_status(&self, request: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        let by = caller(&request);
        let (kind, object) = body_of(request.into_inner().object, false)?;
        let object = self
            .registry
            .update_object_status(object)
            .await
            .map_err(|error| errors::of_registry(&error))?;
        audit("update status", &by.describe(), &kind, &object);
        Ok(Response::new(object))
    }

    async fn patch(&self, request: Request<PatchRequest>) -> Result<Response<Object>, Status> {
        let by = caller(&request);
        let request = request.into_inner();
        let kind = kind_of(&request.resource)?;
        let key = key_of(&kind, &request.namespace, &request.name)?;
        let patched = patch::patch(&self.registry, &kind, &key, request).await?;
        if patched.written {
            audit(patched.verb, &by.describe(), &kind, &patched.object);
        }
        Ok(Response::new(patched.object))
    }

    type ApplyStream = Answers<orlop_proto::api::v1::ApplyResult>;

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<Self::ApplyStream>, Status> {
        let by: Arc<str> = caller(&request).describe().into();
        apply::apply(self, by, request.into_inner()).await.map(Response::new)
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<Object>, Status> {
        let by = caller(&request);
        let request = request.into_inner();
        let kind = kind_of(&request.resource)?;
        let key = key_of(&kind, &request.namespace, &request.name)?;
        let options = delete_options(&request)?;
        let object = self
            .registry
            .delete_object(&kind, &key, options)
            .await
            .map_err(|error| errors::of_registry(&error))?;
        audit("delete", &by.describe(), &kind, &object);
        Ok(Response::new(object))
    }
}

/// Every write that was done.
fn audit(verb: &str, caller: &str, kind: &ResourceKind, object: &Object) {
    let (namespace, name) = object
        .meta()
        .map_or(("", ""), |meta| (meta.namespace.as_str(), meta.name.as_str()));
    tracing::info!(target: "audit", verb, caller, resource = kind.resource, namespace, name);
}

/// The kind with this plural.
fn kind_of(resource: &str) -> Result<ResourceKind, Status> {
    ResourceKind::by_resource(resource).ok_or_else(|| {
        let known: Vec<&str> = ResourceKind::ALL.iter().map(|kind| kind.resource).collect();
        let shown: String = resource.escape_debug().take(80).collect();
        errors::invalid("resource", &format!("\"{shown}\" is not one of {}", known.join(", ")))
    })
}

/// The key of a request; an empty namespace is "default".
fn key_of(kind: &ResourceKind, namespace: &str, name: &str) -> Result<ObjectKey, Status> {
    let mut wrong = Vec::new();
    if !is_path_segment(name) {
        wrong.push(errors::field("name", "must be an object's name"));
    }
    let namespace = match (kind.namespaced, namespace) {
        (false, _) => "",
        (true, "") => "default",
        (true, namespace) => namespace,
    };
    if kind.namespaced && !is_path_segment(namespace) {
        wrong.push(errors::field("namespace", "must be a namespace's name"));
    }
    if wrong.is_empty() {
        Ok(ObjectKey::new(namespace, name))
    } else {
        Err(errors::bad_request("request", &wrong))
    }
}

/// Whether a text could be a name: what is none would reach into other keys of the store.
fn is_path_segment(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text != "."
        && text != ".."
        && text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b'%')
}

/// An object that must be there; namespaced ones get the namespace "default" when they name none.
fn body_of(object: Option<Object>, may_be_nameless: bool) -> Result<(ResourceKind, Object), Status> {
    let missing = || errors::invalid("object", "is required: one of pod, service, node, ...");
    let mut object = object.ok_or_else(missing)?;
    let kind = object_kind(&object).ok_or_else(missing)?;
    object.set_type();
    let meta = object.meta_mut().ok_or_else(missing)?;
    if kind.namespaced && meta.namespace.is_empty() {
        "default".clone_into(&mut meta.namespace);
    }
    if !kind.namespaced && !meta.namespace.is_empty() {
        return Err(errors::invalid(
            "metadata.namespace",
            &format!("{} have no namespace", kind.resource),
        ));
    }
    if !may_be_nameless && meta.name.is_empty() {
        return Err(errors::invalid("metadata.name", "is required"));
    }
    Ok((kind, object))
}

fn delete_options(request: &DeleteRequest) -> Result<DeleteOptions, Status> {
    if request.grace_period_seconds.is_some_and(|seconds| seconds < 0) {
        return Err(errors::invalid("gracePeriodSeconds", "must not be negative"));
    }
    let propagation = match request.propagation_policy.as_str() {
        "" => Propagation::Default,
        "Background" => Propagation::Background,
        "Foreground" => Propagation::Foreground,
        "Orphan" => Propagation::Orphan,
        _ => {
            return Err(errors::invalid(
                "propagationPolicy",
                "must be Background, Foreground, Orphan or empty",
            ));
        }
    };
    let given = request.preconditions.clone().unwrap_or_default();
    let some = |text: String| (!text.is_empty()).then_some(text);
    Ok(DeleteOptions {
        grace_period_seconds: request.grace_period_seconds,
        preconditions: Preconditions {
            uid: some(given.uid),
            resource_version: some(given.resource_version),
        },
        propagation,
    })
}
