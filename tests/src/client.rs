//! A plain blocking client of control, for tests and for `up`. It goes through control's unix socket, which it reaches by the
//! holder's view of the file system; TLS is what grpcurl is for.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{StreamExt as _, TryStreamExt as _};
use orlop_proto::{
    Resource,
    api::v1::{
        ApplyRequest, ApplyResult, CreateRequest, DeleteRequest, GetRequest, ListRequest, Object, UpdateRequest,
        WatchRequest, apply_request::Input, objects_client::ObjectsClient,
    },
    cluster::v1::{CreateTokenRequest, join_client::JoinClient},
    metrics::v1::{
        ListNodesRequest, ListPodsRequest, ListServicesRequest, NodeMetrics, PodMetrics, ServiceMetrics,
        metrics_client::MetricsClient,
    },
};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint};

use crate::layout::Members;

/// The largest answer that is read: a list of many objects.
const MAX_MESSAGE: usize = 256 << 20;
/// How long a history may take to be told.
const HISTORY: Duration = Duration::from_secs(120);

/// A connection to control.
pub struct Client {
    runtime: Runtime,
    channel: Channel,
}

impl Client {
    /// Connects to a lab's control; the first one, when there are several.
    pub fn connect(members: &Members) -> Result<Self> {
        Self::connect_to(members, "control")
    }

    /// Connects to one of a lab's control replicas.
    pub fn connect_to(members: &Members, replica: &str) -> Result<Self> {
        // With a thread of its own, so that the connection answers control's pings between two calls.
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("starting a runtime")?;
        let socket = format!("unix://{}", members.control_socket(replica)?);
        let endpoint = Endpoint::from_shared(socket)?
            .timeout(Duration::from_secs(300))
            .connect_timeout(Duration::from_secs(5));
        let channel = runtime
            .block_on(endpoint.connect())
            .context("connecting to control's unix socket")?;
        Ok(Self { runtime, channel })
    }

    /// Asks for something that needs the store.
    pub fn ready(&self) -> Result<()> {
        self.list_objects("namespaces", "", "").map(drop)
    }

    /// A join token without a limit of uses, good for a day.
    pub fn create_token(&self) -> Result<String> {
        let mut client = JoinClient::new(self.channel.clone());
        let request = CreateTokenRequest {
            ttl_seconds: 24 * 3600,
            uses: 0,
        };
        Ok(self
            .runtime
            .block_on(client.create_token(request))
            .context("making a join token")?
            .into_inner()
            .token)
    }

    /// Applies a manifest; fails with all that failed in it.
    pub fn apply(&self, manifest: &str) -> Result<Vec<ApplyResult>> {
        self.apply_slowly(manifest, Duration::from_secs(30))
    }

    /// As [`Self::apply`], with a time limit of its own.
    pub fn apply_slowly(&self, manifest: &str, limit: Duration) -> Result<Vec<ApplyResult>> {
        let input = ApplyRequest {
            input: Some(Input::Manifest(manifest.to_owned())),
            namespace: String::new(),
        };
        let mut request = tonic::Request::new(input);
        request.set_timeout(limit);
        let results = self.runtime.block_on(async {
            let mut stream = self.objects().apply(request).await?.into_inner();
            let mut results = Vec::new();
            while let Some(result) = stream.message().await? {
                results.push(result);
            }
            Ok::<_, tonic::Status>(results)
        })?;
        let failed: Vec<String> = results
            .iter()
            .filter(|result| result.action == "failed")
            .map(|result| format!("{} {}: {}", result.resource, result.name, result.message))
            .collect();
        if failed.is_empty() {
            Ok(results)
        } else {
            bail!("{}", failed.join("; "))
        }
    }

    /// All objects of a kind in a namespace (empty: all) that a label selector chooses.
    pub fn list<T: Resource>(&self, namespace: &str, label_selector: &str) -> Result<Vec<T>> {
        let objects = self.list_objects(T::KIND.resource, namespace, label_selector)?;
        Ok(objects.into_iter().filter_map(T::from_object).collect())
    }

    /// Creates objects, many at once; in which order is open.
    pub fn create_all(&self, objects: Vec<Object>) -> Result<()> {
        const AT_ONCE: usize = 64;
        let creations = futures::stream::iter(objects.into_iter().map(|object| {
            let mut client = self.objects();
            let request = CreateRequest { object: Some(object) };
            async move { client.create(request).await.map(drop) }
        }));
        self.runtime
            .block_on(creations.buffer_unordered(AT_ONCE).try_collect::<()>())
            .context("creating objects")
    }

    /// Replaces an object; as it is stored then.
    pub fn update<T: Resource>(&self, object: T) -> Result<T> {
        let request = UpdateRequest {
            object: Some(object.into_object()),
        };
        let stored = self.runtime.block_on(self.objects().update(request));
        T::from_object(stored.context("replacing an object")?.into_inner()).context("an object of another kind")
    }

    /// The store's revision, as a list of a kind tells it.
    pub fn list_revision(&self, resource: &str) -> Result<u64> {
        let request = ListRequest {
            resource: resource.to_owned(),
            limit: 1,
            ..ListRequest::default()
        };
        let list = self.runtime.block_on(self.objects().list(request))?.into_inner();
        Ok(list.resource_version.parse()?)
    }

    /// One object; `None` when it is not there.
    pub fn get<T: Resource>(&self, namespace: &str, name: &str) -> Result<Option<T>> {
        let request = GetRequest {
            resource: T::KIND.resource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        };
        match self.runtime.block_on(self.objects().get(request)) {
            Ok(object) => Ok(T::from_object(object.into_inner())),
            Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
            Err(status) => Err(status).with_context(|| format!("getting {} {namespace}/{name}", T::KIND.resource)),
        }
    }

    /// The changes of a kind after one revision and up to another: (what, name, resourceVersion).
    pub fn history(&self, resource: &str, after: u64, until: u64) -> Result<Vec<(String, String, String)>> {
        let request = WatchRequest {
            resource: resource.to_owned(),
            resource_version: after.to_string(),
            allow_watch_bookmarks: true,
            ..WatchRequest::default()
        };
        let told = async {
            let mut stream = self.objects().watch(request).await?.into_inner();
            let mut seen = Vec::new();
            while let Some(event) = stream.message().await? {
                let version: u64 = event.resource_version.parse().context("a resourceVersion")?;
                if version > until {
                    break;
                }
                if let Some(object) = event.object {
                    let name = object.meta().map(|meta| meta.name.clone());
                    seen.push((event.r#type, name.unwrap_or_default(), event.resource_version));
                }
                if version == until {
                    break;
                }
            }
            Ok(seen)
        };
        self.runtime.block_on(async {
            let told = tokio::time::timeout(HISTORY, told).await;
            told.with_context(|| format!("{resource} are not told up to revision {until} within {HISTORY:?}"))?
        })
    }

    /// The store's revision as this replica knows it, after it has caught up.
    pub fn revision(&self) -> Result<u64> {
        let request = ListRequest {
            resource: "namespaces".to_owned(),
            ..ListRequest::default()
        };
        let list = self
            .runtime
            .block_on(self.objects().list(request))
            .context("listing namespaces")?;
        list.into_inner().resource_version.parse().context("a resourceVersion")
    }

    /// Deletes an object; what is not there is no error.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str, grace: Option<i64>) -> Result<()> {
        let request = DeleteRequest {
            resource: resource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            grace_period_seconds: grace,
            ..DeleteRequest::default()
        };
        match self.runtime.block_on(self.objects().delete(request)) {
            Err(status) if status.code() != tonic::Code::NotFound => {
                Err(status).with_context(|| format!("deleting {resource} {namespace}/{name}"))
            }
            _ => Ok(()),
        }
    }

    /// The latest metrics of all nodes.
    pub fn node_metrics(&self) -> Result<Vec<NodeMetrics>> {
        let mut client = MetricsClient::new(self.channel.clone());
        Ok(self
            .runtime
            .block_on(client.list_nodes(ListNodesRequest::default()))?
            .into_inner()
            .items)
    }

    /// The latest metrics of all pods of a namespace (empty: all).
    pub fn pod_metrics(&self, namespace: &str) -> Result<Vec<PodMetrics>> {
        let mut client = MetricsClient::new(self.channel.clone());
        let request = ListPodsRequest {
            namespace: namespace.to_owned(),
            name: String::new(),
        };
        Ok(self.runtime.block_on(client.list_pods(request))?.into_inner().items)
    }

    /// The connections of all services of a namespace (empty: all), summed over the nodes.
    pub fn service_metrics(&self, namespace: &str) -> Result<Vec<ServiceMetrics>> {
        let mut client = MetricsClient::new(self.channel.clone());
        let request = ListServicesRequest {
            namespace: namespace.to_owned(),
            name: String::new(),
        };
        Ok(self.runtime.block_on(client.list_services(request))?.into_inner().items)
    }

    fn list_objects(
        &self,
        resource: &str,
        namespace: &str,
        selector: &str,
    ) -> Result<Vec<orlop_proto::api::v1::Object>> {
        let request = ListRequest {
            resource: resource.to_owned(),
            namespace: namespace.to_owned(),
            label_selector: selector.to_owned(),
            ..ListRequest::default()
        };
        let list = self
            .runtime
            .block_on(self.objects().list(request))
            .with_context(|| format!("listing {resource}"))?;
        Ok(list.into_inner().items)
    }

    fn objects(&self) -> ObjectsClient<Channel> {
        ObjectsClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }
}
