//! Watch with events that are encoded once, and lists that are never decoded as a whole.
//!
//! A generated service would encode an event's object anew for every watcher, and would have all objects of a list decoded, at twelve
//! times their size, before it encodes the first. On the wire an embedded message is the same as a field of bytes, so this one sends
//! the encoding that the cache keeps, and lists of objects that are encoded one by one.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use orlop_proto::{
    Resource,
    api::v1::{ListRequest, Object, ObjectList, WatchEvent, WatchRequest, objects_server::ObjectsServer},
};
use prost::Message;
use tonic::{
    Request, Response, Status,
    body::Body,
    server::{Grpc, NamedService, ServerStreamingService, UnaryService},
};
use tonic_prost::ProstCodec;
use tower::Service;

use super::{ObjectsService, watch::RawStream};

/// orlop.api.v1.WatchEvent with an object that is encoded already.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RawWatchEvent {
    /// As in `WatchEvent`.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// An encoded `Object`.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub object: Option<Bytes>,
    /// As in `WatchEvent`.
    #[prost(string, tag = "3")]
    pub resource_version: String,
}

/// orlop.api.v1.ObjectList with objects that are encoded already.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RawObjectList {
    /// As in `ObjectList`.
    #[prost(string, tag = "1")]
    pub resource_version: String,
    /// As in `ObjectList`.
    #[prost(string, tag = "2")]
    pub r#continue: String,
    /// Encoded `Object`s.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub items: Vec<Bytes>,
}

/// An object as an encoded `Object`.
pub(super) fn encode<T: Resource>(object: T) -> Bytes {
    object.into_object().encode_to_vec().into()
}

fn decode(object: Bytes) -> Result<Object, Status> {
    Object::decode(object).map_err(|error| Status::internal(error.to_string()))
}

impl RawObjectList {
    /// The message that it stands for.
    ///
    /// # Errors
    /// INTERNAL when an item is not an encoded `Object`.
    pub fn decode(self) -> Result<ObjectList, Status> {
        Ok(ObjectList {
            resource_version: self.resource_version,
            r#continue: self.r#continue,
            items: self.items.into_iter().map(decode).collect::<Result<_, _>>()?,
        })
    }
}

impl RawWatchEvent {
    /// The message that it stands for.
    ///
    /// # Errors
    /// INTERNAL when the object is not an encoded `Object`.
    pub fn decode(self) -> Result<WatchEvent, Status> {
        Ok(WatchEvent {
            r#type: self.r#type,
            object: self.object.map(decode).transpose()?,
            resource_version: self.resource_version,
        })
    }
}

/// The generated service, but for Watch and List.
#[derive(Clone)]
pub struct RawObjects {
    service: ObjectsService,
    generated: ObjectsServer<ObjectsService>,
    /// The same for Apply alone, whose messages may be larger than all others.
    apply: ObjectsServer<ObjectsService>,
    message_bytes: usize,
}

impl RawObjects {
    pub(super) fn new(service: ObjectsService, message_bytes: usize, manifest_bytes: usize) -> Self {
        let generated = ObjectsServer::new(service.clone());
        Self {
            service,
            apply: generated.clone().max_decoding_message_size(manifest_bytes),
            generated: generated.max_decoding_message_size(message_bytes),
            message_bytes,
        }
    }
}

impl NamedService for RawObjects {
    const NAME: &'static str = <ObjectsServer<ObjectsService> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for RawObjects {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (service, limit) = (self.service.clone(), self.message_bytes);
        match request.uri().path() {
            "/orlop.api.v1.Objects/Watch" => Box::pin(async move {
                let codec: ProstCodec<RawWatchEvent, WatchRequest> = ProstCodec::default();
                let mut grpc = Grpc::new(codec).apply_max_message_size_config(Some(limit), None);
                Ok(grpc.server_streaming(Watch(service), request).await)
            }),
            "/orlop.api.v1.Objects/List" => Box::pin(async move {
                let codec: ProstCodec<RawObjectList, ListRequest> = ProstCodec::default();
                let mut grpc = Grpc::new(codec).apply_max_message_size_config(Some(limit), None);
                Ok(grpc.unary(List(service), request).await)
            }),
            "/orlop.api.v1.Objects/Apply" => self.apply.call(request),
            _ => self.generated.call(request),
        }
    }
}

struct List(ObjectsService);

impl UnaryService<ListRequest> for List {
    type Response = RawObjectList;
    type Future = Pin<Box<dyn Future<Output = Result<Response<RawObjectList>, Status>> + Send>>;

    fn call(&mut self, request: Request<ListRequest>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move { service.raw_list(request.into_inner()).await.map(Response::new) })
    }
}

struct Watch(ObjectsService);

impl ServerStreamingService<WatchRequest> for Watch {
    type Response = RawWatchEvent;
    type ResponseStream = RawStream;
    type Future = Pin<Box<dyn Future<Output = Result<Response<RawStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<WatchRequest>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move { service.raw_watch(request.into_inner()).await.map(Response::new) })
    }
}
