//! Watch with events that are encoded once.
//!
//! A generated service would encode an event's object anew for every watcher. On the wire an embedded message is the same as
//! a field of bytes, so this one sends the encoding that the cache keeps.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use orlop_proto::api::v1::{Object, WatchEvent, WatchRequest, objects_server::ObjectsServer};
use prost::Message;
use tonic::{
    Request, Response, Status,
    body::Body,
    server::{Grpc, NamedService, ServerStreamingService},
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

impl RawWatchEvent {
    /// The message that it stands for.
    ///
    /// # Errors
    /// INTERNAL when the object is not an encoded `Object`.
    pub fn decode(self) -> Result<WatchEvent, Status> {
        let object = self
            .object
            .map(Object::decode)
            .transpose()
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(WatchEvent {
            r#type: self.r#type,
            object,
            resource_version: self.resource_version,
        })
    }
}

/// The generated service, but for Watch.
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
        match request.uri().path() {
            "/orlop.api.v1.Objects/Watch" => {}
            "/orlop.api.v1.Objects/Apply" => return self.apply.call(request),
            _ => return self.generated.call(request),
        }
        let (service, limit) = (self.service.clone(), self.message_bytes);
        Box::pin(async move {
            let codec: ProstCodec<RawWatchEvent, WatchRequest> = ProstCodec::default();
            let mut grpc = Grpc::new(codec).apply_max_message_size_config(Some(limit), None);
            Ok(grpc.server_streaming(Watch(service), request).await)
        })
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
