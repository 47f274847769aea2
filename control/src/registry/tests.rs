//! The registry over the embedded engine.

use std::sync::Arc;

use orlop_proto::{
    Resource as _,
    core::v1::{Container, Namespace, Node, Pod, PodSpec, PodTemplateSpec, Service, ServicePort, ServiceSpec},
    meta::v1::{LabelSelector, ObjectMeta},
};
use tempfile::TempDir;

use super::*;
use crate::store::{
    Expected, Key, Listing, Record, Revision, Store, StoreError, Transaction, Watch, Write,
    embedded::{EmbeddedConfig, EmbeddedStore},
};

mod claims;
mod deletion;
mod writes;

struct World {
    registry: Registry,
    _dir: TempDir,
}

async fn world() -> World {
    world_with(RegistryConfig::default()).await
}

async fn world_with(config: RegistryConfig) -> World {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("store.redb"), EmbeddedConfig::default()).unwrap();
    let store: Arc<dyn Store> = Arc::new(store);
    let cache = Cache::start(store.clone()).await;
    let registry = Registry::new(store, cache, config);
    registry.ensure_bootstrap().await.unwrap();
    World { registry, _dir: dir }
}

fn meta(name: &str) -> Option<ObjectMeta> {
    Some(ObjectMeta {
        name: name.to_owned(),
        namespace: "default".to_owned(),
        ..ObjectMeta::default()
    })
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("default", name)
}

fn pod_spec() -> PodSpec {
    let container = Container {
        name: "app".to_owned(),
        image: "web:1".to_owned(),
        ..Container::default()
    };
    PodSpec {
        containers: vec![container],
        ..PodSpec::default()
    }
}

fn pod(name: &str) -> Pod {
    Pod {
        metadata: meta(name),
        spec: Some(pod_spec()),
        ..Pod::default()
    }
}

fn service(name: &str, address: &str) -> Service {
    let port = ServicePort {
        port: 80,
        protocol: "TCP".to_owned(),
        ..ServicePort::default()
    };
    let spec = ServiceSpec {
        ports: vec![port],
        cluster_ip: address.to_owned(),
        ..ServiceSpec::default()
    };
    Service {
        metadata: meta(name),
        spec: Some(spec),
        ..Service::default()
    }
}

fn replica_set(name: &str, replicas: i32) -> orlop_proto::apps::v1::ReplicaSet {
    let labels = std::collections::BTreeMap::from([("app".to_owned(), name.to_owned())]);
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: labels.clone(),
            ..ObjectMeta::default()
        }),
        spec: Some(pod_spec()),
    };
    let spec = orlop_proto::apps::v1::ReplicaSetSpec {
        replicas: Some(replicas),
        selector: Some(LabelSelector {
            match_labels: labels,
            ..LabelSelector::default()
        }),
        template: Some(template),
        ..Default::default()
    };
    orlop_proto::apps::v1::ReplicaSet {
        metadata: meta(name),
        spec: Some(spec),
        ..Default::default()
    }
}

fn node(name: &str) -> Node {
    let metadata = Some(ObjectMeta {
        name: name.to_owned(),
        ..ObjectMeta::default()
    });
    Node {
        metadata,
        ..Node::default()
    }
}

impl World {
    async fn revision(&self) -> Revision {
        self.registry.store().revision().await.unwrap()
    }

    async fn bound(&self, name: &str) -> Pod {
        let created = self.registry.create(pod(name)).await.unwrap();
        let binding = Binding {
            pod: key(name),
            uid: created.uid().to_owned(),
            node: "n1".to_owned(),
        };
        self.registry.bind_pod(&binding).await.unwrap()
    }
}

fn message(error: &RegistryError) -> String {
    error.to_string()
}
