//! Resource metrics as Prometheus text: the same for the agent, which shows its own node, and control, which shows all.
//!
//! Names are those of the kubelet's `/metrics/resource` and cAdvisor where they have them, `orlop_...` otherwise.

use std::{borrow::Borrow, collections::BTreeMap, fmt::Write};

use crate::metrics::v1::{NodeReport, PodMetrics};

/// Writes reports in the classic text format, grouped by metric as it asks for.
pub fn prometheus_text<R: Borrow<NodeReport>>(reports: &[R]) -> String {
    let mut page = Page::default();
    for report in reports {
        let report = report.borrow();
        let name = report.node.as_ref().map_or("", |node| node.name.as_str());
        write_node(&mut page, name, report);
        for pod in &report.pods {
            write_pod(&mut page, name, pod);
        }
        write_services(&mut page, name, report);
    }
    page.finish()
}

fn write_node(page: &mut Page, name: &str, report: &NodeReport) {
    let Some(node) = &report.node else { return };
    let labels = [("node", name)];
    if let Some(cpu) = &node.cpu {
        page.seconds(
            "node_cpu_usage_seconds_total",
            "CPU time of the node.",
            &labels,
            cpu.usage_core_nanoseconds,
        );
    }
    if let Some(memory) = &node.memory {
        page.gauge(
            "node_memory_working_set_bytes",
            "Working set of the node.",
            &labels,
            memory.working_set_bytes,
        );
    }
    if let Some(filesystem) = &node.filesystem {
        page.gauge(
            "orlop_node_fs_used_bytes",
            "Used space of the node's disk.",
            &labels,
            filesystem.used_bytes,
        );
        page.gauge(
            "orlop_node_fs_capacity_bytes",
            "Size of the node's disk.",
            &labels,
            filesystem.capacity_bytes,
        );
    }
}

fn write_pod(page: &mut Page, node: &str, pod: &PodMetrics) {
    let labels = [
        ("namespace", pod.namespace.as_str()),
        ("pod", pod.name.as_str()),
        ("node", node),
    ];
    let (mut cpu_sum, mut memory_sum) = (0_u64, 0_u64);
    for container in &pod.containers {
        let labels = [("container", container.name.as_str()), labels[0], labels[1], labels[2]];
        if let Some(cpu) = &container.cpu {
            cpu_sum = cpu.usage_core_nanoseconds.saturating_add(cpu_sum);
            let help = "CPU time of the container.";
            page.seconds(
                "container_cpu_usage_seconds_total",
                help,
                &labels,
                cpu.usage_core_nanoseconds,
            );
        }
        if let Some(memory) = &container.memory {
            memory_sum = memory.working_set_bytes.saturating_add(memory_sum);
            let help = "Working set of the container.";
            page.gauge(
                "container_memory_working_set_bytes",
                help,
                &labels,
                memory.working_set_bytes,
            );
        }
        if let Some(rootfs) = &container.rootfs {
            page.gauge(
                "container_fs_usage_bytes",
                "Size of the writable layer.",
                &labels,
                rootfs.used_bytes,
            );
        }
        if let Some(logs) = &container.logs {
            page.gauge(
                "orlop_container_logs_bytes",
                "Size of the container's logs.",
                &labels,
                logs.used_bytes,
            );
        }
    }
    page.seconds(
        "pod_cpu_usage_seconds_total",
        "CPU time of the pod's containers.",
        &labels,
        cpu_sum,
    );
    page.gauge(
        "pod_memory_working_set_bytes",
        "Working set of the pod's containers.",
        &labels,
        memory_sum,
    );
    if let Some(network) = &pod.network {
        let mut counter = |name, help, value| page.counter(name, help, &labels, value);
        counter(
            "container_network_receive_bytes_total",
            "Bytes received by the pod.",
            network.rx_bytes,
        );
        counter(
            "container_network_receive_packets_total",
            "Packets received by the pod.",
            network.rx_packets,
        );
        counter(
            "container_network_transmit_bytes_total",
            "Bytes sent by the pod.",
            network.tx_bytes,
        );
        counter(
            "container_network_transmit_packets_total",
            "Packets sent by the pod.",
            network.tx_packets,
        );
    }
}

fn write_services(page: &mut Page, node: &str, report: &NodeReport) {
    for service in &report.services {
        let labels = [
            ("namespace", service.namespace.as_str()),
            ("service", service.name.as_str()),
            ("node", node),
        ];
        let help = "Connections that were given a backend.";
        page.counter("orlop_service_connections_total", help, &labels, service.connections);
        let help = "Connections refused for want of a ready endpoint.";
        page.counter("orlop_service_refused_total", help, &labels, service.refused);
        for backend in &service.backends {
            let labels = [
                ("address", backend.address.as_str()),
                ("protocol", backend.protocol.as_str()),
                labels[0],
                labels[1],
                labels[2],
            ];
            let help = "Connections that this backend was given.";
            page.counter("orlop_backend_connections_total", help, &labels, backend.connections);
        }
    }
}

/// Collects samples by metric.
#[derive(Default)]
struct Page {
    metrics: BTreeMap<&'static str, Metric>,
}

struct Metric {
    help: &'static str,
    kind: &'static str,
    samples: String,
}

impl Page {
    fn seconds(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], nanoseconds: u64) {
        let (whole, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
        let value = if rest == 0 {
            whole.to_string()
        } else {
            format!("{whole}.{rest:09}").trim_end_matches('0').to_owned()
        };
        self.sample(name, help, "counter", labels, &value);
    }

    fn counter(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: u64) {
        self.sample(name, help, "counter", labels, &value.to_string());
    }

    fn gauge(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: u64) {
        self.sample(name, help, "gauge", labels, &value.to_string());
    }

    fn sample(
        &mut self,
        name: &'static str,
        help: &'static str,
        kind: &'static str,
        labels: &[(&str, &str)],
        value: &str,
    ) {
        let metric = self.metrics.entry(name).or_insert_with(|| Metric {
            help,
            kind,
            samples: String::new(),
        });
        let samples = &mut metric.samples;
        samples.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let before = if index == 0 { '{' } else { ',' };
            // Writing to a string cannot fail.
            let _ = write!(samples, "{before}{label}=\"{text}\"");
        }
        let _ = writeln!(samples, "}} {value}");
    }

    fn finish(self) -> String {
        let mut text = String::new();
        for (name, Metric { help, kind, samples }) in self.metrics {
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::v1::{ContainerMetrics, Cpu, Memory, Network, NodeMetrics};

    #[test]
    fn samples_are_grouped_by_metric_and_labels_escaped() {
        let pod = |name: &str, nanoseconds| PodMetrics {
            namespace: "default".into(),
            name: name.into(),
            containers: vec![ContainerMetrics {
                name: "a\"b".into(),
                cpu: Some(Cpu {
                    usage_core_nanoseconds: nanoseconds,
                    usage_nanocores: 1,
                }),
                memory: Some(Memory {
                    working_set_bytes: 5,
                    ..Default::default()
                }),
                ..Default::default()
            }],
            network: Some(Network {
                rx_bytes: 7,
                ..Default::default()
            }),
            ..Default::default()
        };
        let report = NodeReport {
            node: Some(NodeMetrics {
                name: "n".into(),
                ..Default::default()
            }),
            pods: vec![pod("one", 1_000_000_001), pod("two", 2_000_000_000)],
            ..Default::default()
        };
        let text = prometheus_text(&[report]);
        let cpu: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("container_cpu_usage"))
            .collect();
        assert_eq!(
            cpu,
            [
                "# HELP container_cpu_usage_seconds_total CPU time of the container.",
                "# TYPE container_cpu_usage_seconds_total counter",
                "container_cpu_usage_seconds_total{container=\"a\\\"b\",namespace=\"default\",pod=\"one\",node=\"n\"} 1.000000001",
                "container_cpu_usage_seconds_total{container=\"a\\\"b\",namespace=\"default\",pod=\"two\",node=\"n\"} 2",
            ]
        );
        assert!(
            text.contains("container_network_receive_bytes_total{namespace=\"default\",pod=\"one\",node=\"n\"} 7\n")
        );
        assert!(text.contains("pod_memory_working_set_bytes{namespace=\"default\",pod=\"two\",node=\"n\"} 5\n"));
    }
}
