//! What tests run in their labs: web servers behind a service, and pods to ask them from.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Child,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use orlop_proto::{
    Resource,
    core::v1::{Pod, Service},
};

use crate::lab::{Lab, output, pod_is_ready};

/// A ReplicaSet of web servers.
pub fn servers(name: &str, replicas: u32) -> String {
    format!(
        "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {{name: {name}, namespace: default}}\n\
         spec:\n  replicas: {replicas}\n  selector: {{matchLabels: {{app: {name}}}}}\n  template:\n\
         \x20   metadata: {{labels: {{app: {name}}}}}\n\
         \x20   spec:\n      terminationGracePeriodSeconds: 2\n      containers:\n\
         \x20     - {{name: web, image: \"orlop.dev/fixture:1\", args: [web, \"8080\"]}}\n"
    )
}

/// The same and its service: TCP and UDP on port 80.
pub fn web(name: &str, replicas: u32) -> String {
    let servers = servers(name, replicas);
    format!(
        "{servers}---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec:\n\
         \x20 selector: {{app: {name}}}\n  ports:\n\
         \x20 - {{name: http, port: 80, targetPort: 8080}}\n\
         \x20 - {{name: udp, port: 80, targetPort: 8080, protocol: UDP}}\n"
    )
}

/// A pod on one node that only waits, to run clients in.
pub fn client(name: &str, node: &str) -> String {
    pod(name, node, &["sleep"])
}

/// A pod on one node that runs the fixture with arguments.
pub fn pod(name: &str, node: &str, arguments: &[&str]) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default}}\n\
         spec:\n  terminationGracePeriodSeconds: 1\n  nodeSelector: {{kubernetes.io/hostname: {node}}}\n  containers:\n\
         \x20 - {{name: main, image: \"orlop.dev/fixture:1\", args: {arguments:?}}}\n"
    )
}

impl Lab {
    /// Waits until exactly `count` pods with a label are ready and none is going, and returns them.
    pub fn wait_for_pods(&self, selector: &str, count: usize) -> Result<Vec<Pod>> {
        self.wait(
            &format!("{count} pods with {selector} are ready"),
            Duration::from_secs(90),
            || {
                let pods: Vec<Pod> = self.client.list("default", selector)?;
                let whole = pods.len() == count && pods.iter().all(|pod| pod_is_ready(pod) && !pod.is_deleting());
                Ok(whole.then_some(pods))
            },
        )
    }

    /// Waits until a pod is ready, and returns it.
    pub fn wait_for_pod(&self, name: &str) -> Result<Pod> {
        self.wait(&format!("pod {name} is ready"), Duration::from_secs(60), || {
            Ok(self.client.get::<Pod>("default", name)?.filter(pod_is_ready))
        })
    }

    /// The address of a service.
    pub fn cluster_ip(&self, name: &str) -> Result<String> {
        let service: Service = self
            .client
            .get("default", name)?
            .with_context(|| format!("no service {name}"))?;
        let address = service.spec.unwrap_or_default().cluster_ip;
        if address.is_empty() {
            bail!("service {name} has no ClusterIP")
        } else {
            Ok(address)
        }
    }

    /// The fixture's client in a pod's network and cgroup.
    pub fn fixture(&self, pod: &Pod, arguments: &[&str]) -> Result<Command> {
        let program = self.spec.static_binaries.join("orlop-fixture").display().to_string();
        let mut words = vec![program.as_str()];
        words.extend(arguments);
        self.in_pod(pod, &words)
    }

    /// The same in a sibling cgroup that has no programs: the baseline of benchmarks.
    pub fn fixture_outside(&self, pod: &Pod, arguments: &[&str]) -> Result<Command> {
        let program = self.spec.static_binaries.join("orlop-fixture").display().to_string();
        let mut words = vec![program.as_str()];
        words.extend(arguments);
        self.in_pod_outside(pod, &words)
    }

    /// What the fixture's client prints.
    pub fn ask(&self, pod: &Pod, arguments: &[&str]) -> Result<String> {
        output(self.fixture(pod, arguments)?)
    }

    /// The fixture's client in the background; its output is read with [`finish`].
    pub fn begin(&self, pod: &Pod, arguments: &[&str]) -> Result<Child> {
        let mut command = self.fixture(pod, arguments)?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting a client")
    }

    /// Asks until every one of the pods has answered through an address, and nobody else has.
    pub fn wait_for_answers(&self, client: &Pod, request: &[&str], pods: &[Pod]) -> Result<()> {
        let expected: BTreeSet<&str> = pods.iter().map(Resource::name).collect();
        let mut seen = BTreeMap::<String, u32>::new();
        self.wait(
            &format!("{expected:?} all answer {request:?}"),
            Duration::from_secs(30),
            || {
                seen.clear();
                for line in self.ask(client, request)?.lines() {
                    let who = line.split(' ').next().unwrap_or_default();
                    *seen.entry(who.to_owned()).or_default() += 1;
                }
                let answered: BTreeSet<&str> = seen.keys().map(String::as_str).collect();
                Ok((answered == expected).then_some(()))
            },
        )
        .with_context(|| format!("the last answers were {seen:?}"))
    }
}

/// Waits for a client that was begun; its failure is an error with its stderr.
pub fn finish(child: Child) -> Result<String> {
    let output = child.wait_with_output().context("waiting for a client")?;
    if !output.status.success() {
        bail!("the client failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    // What it says of single requests.
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
