//! The latest measurements of every node: `orlop.metrics.v1.Metrics` and Prometheus text. Nothing here is stored.
//!
//! A node reports to the replica that it is connected to. The service asks the other replicas for what they have; the Prometheus
//! text is of this replica's nodes alone, since who scrapes it scrapes every replica.

mod peers;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use orlop_proto::metrics::v1::{
    BackendMetrics, LatestReport, ListNodesRequest, ListNodesResponse, ListPodsRequest, ListPodsResponse,
    ListReportsRequest, ListReportsResponse, ListServicesRequest, ListServicesResponse, NodeReport, ServiceMetrics,
    metrics_server::{Metrics, MetricsServer},
};
use prost::Message as _;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

pub use peers::Peers;

/// A node that has not measured for this long is no longer shown.
const STALE: Duration = Duration::from_secs(60);

/// Keeps each node's latest report. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct NodeMetricsStore {
    nodes: Arc<Mutex<HashMap<Arc<str>, Kept>>>,
    peers: Option<Arc<Peers>>,
}

#[derive(Debug)]
struct Kept {
    /// Encoded: there is one of every node, and few are looked at before the next one comes.
    report: Vec<u8>,
    at: Instant,
}

impl Kept {
    fn report(&self) -> Option<NodeReport> {
        NodeReport::decode(self.report.as_slice()).ok()
    }
}

impl NodeMetricsStore {
    /// Takes a node's report in place of its last one.
    pub fn put(&self, node: &Arc<str>, mut report: NodeReport) {
        for pod in &mut report.pods {
            pod.node_name = node.to_string();
        }
        let kept = Kept {
            report: report.encode_to_vec(),
            at: Instant::now(),
        };
        self.lock().insert(Arc::clone(node), kept);
    }

    /// Forgets a node.
    pub fn remove(&self, node: &str) {
        self.lock().remove(node);
    }

    /// Knows other replicas, and answers for their nodes too.
    #[must_use]
    pub fn with_peers(peers: Peers) -> Self {
        Self {
            peers: Some(Arc::new(peers)),
            ..Self::default()
        }
    }

    /// The reports of this replica's and the other replicas' nodes, in the order of the nodes' names.
    async fn all_reports(&self) -> Vec<Arc<NodeReport>> {
        let Some(peers) = &self.peers else {
            return self.reports();
        };
        latest(self.aged().into_iter().chain(peers.reports().await))
    }

    /// This replica's reports with their ages.
    fn aged(&self) -> Vec<LatestReport> {
        let mut nodes = self.lock();
        nodes.retain(|_, kept| kept.at.elapsed() < STALE);
        let aged = nodes.values().map(|kept| LatestReport {
            report: kept.report(),
            age_ms: u64::try_from(kept.at.elapsed().as_millis()).unwrap_or(u64::MAX),
        });
        aged.collect()
    }

    /// All of this replica's reports that are not stale, in the order of the nodes' names.
    pub fn reports(&self) -> Vec<Arc<NodeReport>> {
        let mut nodes = self.lock();
        nodes.retain(|_, kept| kept.at.elapsed() < STALE);
        let ordered: BTreeMap<&Arc<str>, &Kept> = nodes.iter().collect();
        let reports = ordered.values().filter_map(|kept| kept.report());
        reports.map(Arc::new).collect()
    }

    /// The gRPC service.
    pub fn service(&self) -> MetricsServer<Self> {
        MetricsServer::new(self.clone())
    }

    /// Everything as Prometheus text, with the kubelet's names where it has them.
    pub fn prometheus(&self) -> String {
        orlop_proto::prometheus_text(&self.reports())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<str>, Kept>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last that was heard of every node: one that has changed its replica is known at two.
fn latest(reports: impl Iterator<Item = LatestReport>) -> Vec<Arc<NodeReport>> {
    let mut latest: BTreeMap<String, (u64, NodeReport)> = BTreeMap::new();
    for LatestReport { report, age_ms } in reports {
        let Some(report) = report else { continue };
        let Some(name) = report.node.as_ref().map(|node| node.name.clone()) else {
            continue;
        };
        if latest.get(&name).is_none_or(|(age, _)| age_ms < *age) {
            latest.insert(name, (age_ms, report));
        }
    }
    latest.into_values().map(|(_, report)| Arc::new(report)).collect()
}

/// Connections by service, summed over the nodes.
fn services(reports: &[Arc<NodeReport>]) -> Vec<ServiceMetrics> {
    let mut services: BTreeMap<(&str, &str), ServiceMetrics> = BTreeMap::new();
    let mut backends: BTreeMap<(&str, &str, &str, &str), u64> = BTreeMap::new();
    for service in reports.iter().flat_map(|report| &report.services) {
        let sum = services
            .entry((&service.namespace, &service.name))
            .or_insert_with(|| ServiceMetrics {
                namespace: service.namespace.clone(),
                name: service.name.clone(),
                ..ServiceMetrics::default()
            });
        sum.connections = sum.connections.saturating_add(service.connections);
        sum.refused = sum.refused.saturating_add(service.refused);
        for backend in &service.backends {
            let key = (
                service.namespace.as_str(),
                service.name.as_str(),
                backend.address.as_str(),
                backend.protocol.as_str(),
            );
            let sum = backends.entry(key).or_default();
            *sum = sum.saturating_add(backend.connections);
        }
    }
    for ((namespace, name, address, protocol), connections) in backends {
        if let Some(service) = services.get_mut(&(namespace, name)) {
            let (address, protocol) = (address.to_owned(), protocol.to_owned());
            service.backends.push(BackendMetrics {
                address,
                protocol,
                connections,
            });
        }
    }
    services.into_values().collect()
}

/// An empty filter takes all.
fn takes(filter: &str, value: &str) -> bool {
    filter.is_empty() || filter == value
}

#[async_trait]
impl Metrics for NodeMetricsStore {
    async fn list_nodes(&self, request: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        let request = request.into_inner();
        let reports = self.all_reports().await;
        let nodes = reports.iter().filter_map(|report| report.node.clone());
        let items = nodes.filter(|node| takes(&request.name, &node.name)).collect();
        Ok(Response::new(ListNodesResponse { items }))
    }

    async fn list_pods(&self, request: Request<ListPodsRequest>) -> Result<Response<ListPodsResponse>, Status> {
        let request = request.into_inner();
        let reports = self.all_reports().await;
        let mut items: Vec<_> = reports
            .iter()
            .flat_map(|report| &report.pods)
            .filter(|pod| takes(&request.namespace, &pod.namespace) && takes(&request.name, &pod.name))
            .cloned()
            .collect();
        items.sort_by(|one, other| (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name)));
        Ok(Response::new(ListPodsResponse { items }))
    }

    async fn list_services(
        &self,
        request: Request<ListServicesRequest>,
    ) -> Result<Response<ListServicesResponse>, Status> {
        let request = request.into_inner();
        let mut items = services(&self.all_reports().await);
        items.retain(|service| takes(&request.namespace, &service.namespace) && takes(&request.name, &service.name));
        Ok(Response::new(ListServicesResponse { items }))
    }

    async fn list_reports(&self, _: Request<ListReportsRequest>) -> Result<Response<ListReportsResponse>, Status> {
        Ok(Response::new(ListReportsResponse { items: self.aged() }))
    }
}

#[cfg(test)]
mod tests {
    use orlop_proto::metrics::v1::{Cpu, NodeMetrics, PodMetrics};

    use super::*;

    fn report(node: &str, connections: u64) -> NodeReport {
        NodeReport {
            node: Some(NodeMetrics {
                name: node.into(),
                cpu: Some(Cpu {
                    usage_core_nanoseconds: 1_500_000_000,
                    usage_nanocores: 0,
                }),
                ..Default::default()
            }),
            pods: vec![PodMetrics {
                namespace: "default".into(),
                name: format!("pod-{node}"),
                ..Default::default()
            }],
            services: vec![ServiceMetrics {
                namespace: "default".into(),
                name: "web".into(),
                connections,
                refused: 1,
                backends: vec![BackendMetrics {
                    address: "10.244.1.2:80".into(),
                    protocol: "tcp".into(),
                    connections,
                }],
            }],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_latest_of_every_node_until_it_is_stale() {
        let store = NodeMetricsStore::default();
        store.put(&"b".into(), report("b", 1));
        tokio::time::advance(Duration::from_secs(40)).await;
        store.put(&"a".into(), report("a", 2));
        store.put(&"a".into(), report("a", 3));
        let names = |store: &NodeMetricsStore| -> Vec<String> {
            store
                .reports()
                .iter()
                .map(|report| report.node.as_ref().unwrap().name.clone())
                .collect()
        };
        assert_eq!(names(&store), ["a", "b"]);
        let list = store
            .list_services(Request::new(ListServicesRequest::default()))
            .await
            .unwrap()
            .into_inner();
        assert_eq!(list.items[0].connections, 4);
        assert_eq!(list.items[0].refused, 2);
        assert_eq!(list.items[0].backends.len(), 1);
        assert_eq!(list.items[0].backends[0].connections, 4);
        let request = ListPodsRequest {
            name: "pod-a".into(),
            ..Default::default()
        };
        let list = store.list_pods(Request::new(request)).await.unwrap().into_inner();
        assert_eq!(list.items.len(), 1);
        assert_eq!(list.items[0].node_name, "a");
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(names(&store), ["a"]);
        store.remove("a");
        assert!(store.reports().is_empty());
    }

    #[test]
    fn a_node_that_changed_its_replica_counts_once() {
        let aged = |node: &str, connections, age_ms| LatestReport {
            report: Some(report(node, connections)),
            age_ms,
        };
        let reports = latest(
            [
                aged("b", 1, 900),
                aged("a", 2, 30_000),
                aged("a", 3, 1000),
                aged("a", 4, 2000),
            ]
            .into_iter(),
        );
        assert_eq!(reports.len(), 2);
        assert_eq!(services(&reports)[0].connections, 4);
    }

    #[test]
    fn a_node_that_counts_nonsense_stops_nobody() {
        let reports = [report("a", u64::MAX), report("b", 7)].map(Arc::new);
        let sums = services(&reports);
        assert_eq!(sums[0].connections, u64::MAX);
        assert_eq!(sums[0].backends[0].connections, u64::MAX);
    }

    #[test]
    fn prometheus_text_has_the_kubelets_names() {
        let store = NodeMetricsStore::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let text = runtime.block_on(async {
            store.put(&"a".into(), report("a", 3));
            store.prometheus()
        });
        assert!(
            text.contains("node_cpu_usage_seconds_total{node=\"a\"} 1.5\n"),
            "{text}"
        );
        assert!(
            text.contains("orlop_service_connections_total{namespace=\"default\",service=\"web\",node=\"a\"} 3\n"),
            "{text}"
        );
    }
}
