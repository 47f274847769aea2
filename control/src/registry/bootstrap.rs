//! What every cluster has from the beginning.

use std::collections::BTreeMap;

use orlop_proto::{
    core::v1::{Namespace, Service, ServicePort, ServiceSpec},
    meta::v1::ObjectMeta,
};

use super::{Registered, Registry, RegistryError};
use crate::{cache::ObjectKey, store::StoreError};

const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-node-lease", "kube-public"];
/// The API's port, behind the service's 443.
const API_PORT: i32 = 6443;

impl Registry {
    /// Makes the namespaces default, kube-system, kube-node-lease and kube-public, and the service `default/kubernetes` at the
    /// first address of the service range, where they are missing.
    pub async fn ensure_bootstrap(&self) -> Result<(), RegistryError> {
        for name in NAMESPACES {
            let labels = BTreeMap::from([("kubernetes.io/metadata.name".to_owned(), name.to_owned())]);
            let metadata = ObjectMeta {
                name: name.to_owned(),
                labels,
                ..ObjectMeta::default()
            };
            self.ensure(Namespace {
                metadata: Some(metadata),
                ..Namespace::default()
            })
            .await?;
        }
        self.ensure(self.kubernetes_service()).await
    }

    /// Whether the cache has all of it.
    pub fn is_bootstrapped(&self) -> bool {
        let namespaces = self.cache.reader::<Namespace>();
        NAMESPACES.iter().all(|name| namespaces.get("", name).is_some())
            && self.cache.reader::<Service>().get("default", "kubernetes").is_some()
    }

    async fn ensure<T: Registered>(&self, object: T) -> Result<(), RegistryError> {
        match self.read::<T>(&ObjectKey::of(&object)).await {
            Err(error) if error.is_not_found() => {}
            Err(RegistryError::Store(StoreError::Damaged { .. })) => self.clear_damaged(&object).await?,
            other => return other.map(|_| ()),
        }
        match self.create(object).await {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    /// It has no selector: the control planes write its endpoints themselves.
    fn kubernetes_service(&self) -> Service {
        let labels = BTreeMap::from([
            ("component".to_owned(), "apiserver".to_owned()),
            ("provider".to_owned(), "kubernetes".to_owned()),
        ]);
        let target = prost_types::value::Kind::NumberValue(f64::from(API_PORT));
        let port = ServicePort {
            name: "https".to_owned(),
            protocol: "TCP".to_owned(),
            port: 443,
            target_port: Some(prost_types::Value { kind: Some(target) }),
        };
        let spec = ServiceSpec {
            ports: vec![port],
            cluster_ip: self.kubernetes_address().to_string(),
            cluster_ips: vec![self.kubernetes_address().to_string()],
            r#type: "ClusterIP".to_owned(),
            ..ServiceSpec::default()
        };
        let metadata = ObjectMeta {
            name: "kubernetes".to_owned(),
            namespace: "default".to_owned(),
            labels,
            ..ObjectMeta::default()
        };
        Service {
            metadata: Some(metadata),
            spec: Some(spec),
            ..Service::default()
        }
    }
}
