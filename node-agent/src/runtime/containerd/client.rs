//! The connection to containerd: made on demand, made again after a failure, a deadline on every call.

use std::{future::Future, path::Path, time::Duration};

use containerd_client::services::v1::{
    containers_client::ContainersClient, content_client::ContentClient, diff_client::DiffClient,
    events_client::EventsClient, images_client::ImagesClient, introspection_client::IntrospectionClient,
    leases_client::LeasesClient, snapshots::snapshots_client::SnapshotsClient, tasks_client::TasksClient,
    version_client::VersionClient,
};
use hyper_util::rt::TokioIo;
use tonic::{
    Code, Request, Response, Status,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint},
};

use super::NAMESPACE;
use crate::runtime::RuntimeError;

/// No call takes longer, save those that say so.
const DEADLINE: Duration = Duration::from_secs(30);
/// containerd's own limit for messages.
const MAX_MESSAGE: usize = 16 << 20;

/// containerd's services.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
}

impl Client {
    /// A client that connects when it is first used.
    pub fn new(socket: &Path) -> Result<Self, RuntimeError> {
        let socket = socket.to_owned();
        // The address is not used: the connector dials the socket.
        let channel = Endpoint::from_static("http://containerd.invalid").connect_with_connector_lazy(
            tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            }),
        );
        Ok(Self { channel })
    }

    /// A request in our namespace.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("containerd-namespace", AsciiMetadataValue::from_static(NAMESPACE));
        request
    }

    /// A request in our namespace, what it makes being held by a lease.
    pub fn leased<T>(&self, lease: &str, message: T) -> Request<T> {
        let mut request = self.request(message);
        if let Ok(lease) = AsciiMetadataValue::try_from(lease) {
            request.metadata_mut().insert("containerd-lease", lease);
        }
        request
    }

    /// Awaits a call, for at most the usual deadline.
    pub async fn call<T>(
        &self,
        doing: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, RuntimeError> {
        self.call_within(DEADLINE, doing, call).await
    }

    /// Awaits a call, for at most this time.
    pub async fn call_within<T>(
        &self,
        deadline: Duration,
        doing: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, RuntimeError> {
        let status = match tokio::time::timeout(deadline, call).await {
            Ok(Ok(response)) => return Ok(response.into_inner()),
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs())),
        };
        Err(RuntimeError::Containerd {
            doing: doing.to_owned(),
            source: Box::new(status),
        })
    }

    /// Containers.
    pub fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    /// Tasks.
    pub fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    /// Images.
    pub fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    /// Content.
    pub fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
    /// Snapshots.
    pub fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }
    /// Diffs.
    pub fn diff(&self) -> DiffClient<Channel> {
        DiffClient::new(self.channel.clone())
    }
    /// Leases.
    pub fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }
    /// Events.
    pub fn events(&self) -> EventsClient<Channel> {
        EventsClient::new(self.channel.clone())
    }
    /// What containerd is made of.
    pub fn introspection(&self) -> IntrospectionClient<Channel> {
        IntrospectionClient::new(self.channel.clone())
    }
    /// The version.
    pub fn version(&self) -> VersionClient<Channel> {
        VersionClient::new(self.channel.clone())
    }
}

/// What containerd's refusals mean to a caller that wants an end, not a step.
pub trait Refusal<T> {
    /// `None` when what was asked for is not there.
    fn found(self) -> Result<Option<T>, RuntimeError>;
    /// `None` when what was to be made is there already.
    fn made(self) -> Result<Option<T>, RuntimeError>;
}

impl<T> Refusal<T> for Result<T, RuntimeError> {
    fn found(self) -> Result<Option<T>, RuntimeError> {
        unless(self, Code::NotFound)
    }
    fn made(self) -> Result<Option<T>, RuntimeError> {
        unless(self, Code::AlreadyExists)
    }
}

fn unless<T>(result: Result<T, RuntimeError>, code: Code) -> Result<Option<T>, RuntimeError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(RuntimeError::Containerd { source, .. }) if source.code() == code => Ok(None),
        Err(error) => Err(error),
    }
}
