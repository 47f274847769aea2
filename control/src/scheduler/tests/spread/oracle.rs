//! Everything against a reckoning from scratch, as kube-scheduler makes it.

use super::*;

const KEYS: [&str; 3] = [ZONE, HOST, "rack"];

#[derive(Debug, Clone)]
enum Step {
    /// Number, zone, whether it has a host name, taint, cordon, disk.
    Node(usize, Option<usize>, bool, bool, bool, bool),
    NodeGone(usize),
    /// Number, node, labels, namespace, whether it is being deleted.
    Pod(usize, usize, (usize, usize), bool, bool),
    Reserve(usize, usize, (usize, usize)),
    Release(usize),
    PodGone(usize),
    Keep(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = (
        0..6usize,
        prop::option::weighted(0.8, 0..3usize),
        prop::bool::weighted(0.8),
        prop::bool::weighted(0.2),
    )
        .prop_flat_map(|(number, zone, host, taint)| {
            (prop::bool::weighted(0.1), any::<bool>())
                .prop_map(move |(cordon, disk)| Step::Node(number, zone, host, taint, cordon, disk))
        });
    let labels = || (0..2usize, 0..2usize);
    let pod = (
        0..20usize,
        0..7usize,
        labels(),
        prop::bool::weighted(0.9),
        prop::bool::weighted(0.1),
    )
        .prop_map(|(number, node, labels, here, deleting)| Step::Pod(number, node, labels, here, deleting));
    let step = prop_oneof![
        3 => node,
        1 => (0..6usize).prop_map(Step::NodeGone),
        8 => pod,
        2 => (0..20usize, 0..6usize, labels()).prop_map(|(pod, node, labels)| Step::Reserve(pod, node, labels)),
        1 => (0..20usize).prop_map(Step::Release),
        2 => (0..20usize).prop_map(Step::PodGone),
        2 => (0..4usize).prop_map(Step::Keep),
    ];
    prop::collection::vec(step, 1..60)
}

fn constraints() -> impl Strategy<Value = Vec<TopologySpreadConstraint>> {
    let selector = prop_oneof![
        1 => Just(None),
        1 => Just(Some(LabelSelector::default())),
        6 => (0..2usize, any::<bool>()).prop_map(|(app, version)| {
            let mut selector = LabelSelector { match_labels: amounts(&[("app", APPS[app])]), match_expressions: Vec::new() };
            if version {
                selector.match_expressions.push(LabelSelectorRequirement {
                    key: "version".into(),
                    operator: "NotIn".into(),
                    values: vec!["1".into()],
                });
            }
            Some(selector)
        }),
    ];
    let policy = || prop::sample::select(vec!["", "Honor", "Ignore"]);
    let one = (
        1..4i32,
        0..3usize,
        any::<bool>(),
        selector,
        prop::option::of(1..4i32),
        policy(),
        policy(),
    )
        .prop_map(|(max_skew, key, hard, label_selector, min_domains, affinity, taints)| {
            TopologySpreadConstraint {
                max_skew,
                topology_key: KEYS[key].into(),
                when_unsatisfiable: if hard { "DoNotSchedule" } else { "ScheduleAnyway" }.into(),
                label_selector,
                min_domains: min_domains.filter(|_| hard),
                node_affinity_policy: affinity.into(),
                node_taints_policy: taints.into(),
                match_label_keys: Vec::new(),
            }
        });
    prop::collection::vec(one, 1..4).prop_map(|mut list| {
        let mut seen = BTreeSet::new();
        list.retain(|one: &TopologySpreadConstraint| {
            seen.insert((one.topology_key.clone(), one.when_unsatisfiable.clone()))
        });
        list
    })
}

fn asker() -> impl Strategy<Value = Pod> {
    (constraints(), any::<bool>(), any::<bool>(), 0..2usize).prop_map(|(list, picky, tolerant, app)| {
        let mut pod = labelled("asker", &[("app", APPS[app]), ("version", "0")], &list);
        let spec = pod.spec.get_or_insert_default();
        if picky {
            spec.node_selector = amounts(&[("disk", "ssd")]);
        }
        if tolerant {
            spec.tolerations = vec![Toleration {
                key: "gpu".into(),
                operator: "Exists".into(),
                ..Toleration::default()
            }];
        }
        pod
    })
}

const APPS: [&str; 2] = ["web", "db"];
const VERSIONS: [&str; 2] = ["0", "1"];

/// What is there, without any counts.
#[derive(Default)]
struct Plain {
    nodes: BTreeMap<String, Node>,
    pods: BTreeMap<String, (String, Pod, bool)>,
}

fn node_of(step: &Step) -> Option<Node> {
    let Step::Node(number, zone, host, taint, cordon, disk) = step else {
        return None;
    };
    let name = format!("n{number}");
    let mut node = node(&name, "64", "64Gi");
    let labels = &mut node.meta_mut().labels;
    if let Some(zone) = zone {
        labels.insert(ZONE.into(), format!("z{zone}"));
        labels.insert("rack".into(), format!("r{}", zone / 2));
    }
    if *host {
        labels.insert(HOST.into(), name);
    }
    if *disk {
        labels.insert("disk".into(), "ssd".into());
    }
    let spec = node.spec.get_or_insert_default();
    if *taint {
        spec.taints.push(crate::scheduler::taints::taint("gpu", NO_SCHEDULE));
    }
    spec.unschedulable = *cordon;
    Some(node)
}

fn pod_of(number: usize, (app, version): (usize, usize), here: bool) -> Pod {
    let mut pod = labelled(
        &format!("p{number}"),
        &[("app", APPS[app]), ("version", VERSIONS[version])],
        &[],
    );
    if !here {
        pod.meta_mut().namespace = "other".into();
    }
    pod
}

fn apply(step: &Step, view: &mut ClusterView, plain: &mut Plain, askers: &[Pod]) {
    match step {
        Step::Node(number, ..) => {
            let node = node_of(step).unwrap();
            view.set_node(&node);
            plain.nodes.insert(format!("n{number}"), node);
        }
        Step::NodeGone(number) => {
            view.remove_node(&format!("n{number}"));
            plain.nodes.remove(&format!("n{number}"));
        }
        Step::Pod(number, node, labels, here, deleting) => {
            let (mut pod, node) = (pod_of(*number, *labels, *here), format!("n{node}"));
            if *deleting {
                pod.meta_mut().deletion_timestamp = Some(prost_types::Timestamp::default());
            }
            view.set_pod(&bound(pod.clone(), &node));
            plain.pods.insert(format!("p{number}"), (node, pod, false));
        }
        Step::Reserve(number, node, labels) => {
            let (pod, node) = (pod_of(*number, *labels, true), format!("n{node}"));
            view.reserve(&info(pod.clone()), &node);
            plain.pods.insert(format!("p{number}"), (node, pod, true));
        }
        Step::Release(number) => {
            let uid = format!("p{number}");
            view.release(&uid);
            if plain.pods.get(&uid).is_some_and(|(_, _, reserved)| *reserved) {
                plain.pods.remove(&uid);
            }
        }
        Step::PodGone(number) => {
            view.remove_pod(&format!("p{number}"));
            plain.pods.remove(&format!("p{number}"));
        }
        Step::Keep(asker) => {
            if let Some(asker) = askers.get(*asker) {
                view.keep_for(&info(asker.clone()));
            }
        }
    }
}

impl Plain {
    fn includes(one: &TopologySpreadConstraint, asker: &Pod, node: &Node) -> bool {
        let spec = asker.spec.as_ref().unwrap();
        let node_spec = node.spec.as_ref().unwrap();
        let mut taints = node_spec.taints.clone();
        if node_spec.unschedulable {
            taints.push(crate::scheduler::taints::taint(UNSCHEDULABLE, NO_SCHEDULE));
        }
        let bears = |taint: &Taint| crate::scheduler::taints::tolerated(&spec.tolerations, taint);
        (one.node_affinity_policy == "Ignore"
            || crate::scheduler::affinity::allows(spec, &crate::scheduler::Named::of(node)))
            && (one.node_taints_policy != "Honor" || taints.iter().all(bears))
    }

    fn count(&self, one: &TopologySpreadConstraint, asker: &Pod, node: &str) -> i64 {
        let selector = Selector::from_message(one.label_selector.as_ref()).unwrap();
        let counts = |(on, pod, _): &&(String, Pod, bool)| {
            on == node
                && !pod.is_deleting()
                && pod.namespace() == asker.namespace()
                && !selector.is_everything()
                && selector.matches(&pod.meta().labels)
        };
        i64::try_from(self.pods.values().filter(counts).count()).unwrap()
    }

    fn of(asker: &Pod, action: &str) -> Vec<TopologySpreadConstraint> {
        let all = &asker.spec.as_ref().unwrap().topology_spread_constraints;
        all.iter()
            .filter(|one| one.when_unsatisfiable == action)
            .cloned()
            .collect()
    }

    /// kube-scheduler's PreFilter: pods by domain.
    fn domains(
        &self,
        one: &TopologySpreadConstraint,
        all: &[TopologySpreadConstraint],
        asker: &Pod,
    ) -> BTreeMap<String, i64> {
        let mut domains = BTreeMap::new();
        for (name, node) in &self.nodes {
            let labels = &node.meta().labels;
            let has_all = all.iter().all(|one| labels.contains_key(&one.topology_key));
            if has_all && Self::includes(one, asker, node) {
                *domains.entry(labels[&one.topology_key].clone()).or_default() += self.count(one, asker, name);
            }
        }
        domains
    }

    /// kube-scheduler's Filter.
    fn check(&self, asker: &Pod, node: &Node) -> Result<(), SpreadMisfit> {
        let hard = Self::of(asker, "DoNotSchedule");
        for one in &hard {
            let Some(value) = node.meta().labels.get(&one.topology_key) else {
                return Err(SpreadMisfit::Label);
            };
            let domains = self.domains(one, &hard, asker);
            let mut fewest = domains.values().min().copied().unwrap_or(i64::from(i32::MAX));
            if domains.len() < usize::try_from(one.min_domains.unwrap_or(1)).unwrap() {
                fewest = 0;
            }
            let selector = Selector::from_message(one.label_selector.as_ref()).unwrap();
            let itself = i64::from(selector.matches(&asker.meta().labels));
            if domains.get(value).copied().unwrap_or(0) + itself - fewest > i64::from(one.max_skew) {
                return Err(SpreadMisfit::Skew);
            }
        }
        Ok(())
    }

    /// kube-scheduler's PreScore, Score and NormalizeScore.
    #[allow(clippy::cast_possible_truncation, reason = "few pods")]
    fn scores(&self, asker: &Pod, feasible: &[String]) -> Vec<i64> {
        let soft = Self::of(asker, "ScheduleAnyway");
        let labels = |name: &String| &self.nodes[name].meta().labels;
        let is_scored = |name: &&String| soft.iter().all(|one| labels(name).contains_key(&one.topology_key));
        let sums: Vec<Option<i64>> = feasible
            .iter()
            .map(|name| {
                is_scored(&name).then(|| {
                    let mut sum = 0.0;
                    for one in &soft {
                        let value = &labels(name)[&one.topology_key];
                        let values: BTreeSet<&String> = feasible
                            .iter()
                            .filter(is_scored)
                            .map(|name| &labels(name)[&one.topology_key])
                            .collect();
                        let pods = self.domains(one, &soft, asker).get(value).copied().unwrap_or(0);
                        let weight = f64::from(u32::try_from(values.len()).unwrap() + 2).ln();
                        sum += f64::from(i32::try_from(pods).unwrap()) * weight + f64::from(one.max_skew - 1);
                    }
                    sum.round() as i64
                })
            })
            .collect();
        let most = sums.iter().flatten().max().copied().unwrap_or(0);
        let fewest = sums.iter().flatten().min().copied().unwrap_or(0);
        sums.iter()
            .map(|sum| match sum {
                None => 0,
                Some(_) if most == 0 => 100,
                Some(sum) => 100 * (most + fewest - sum) / most,
            })
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// After any events the kept counts say what kube-scheduler would reckon from scratch, and so do counts that were not kept.
    #[test]
    fn kept_counts_are_those_of_a_reckoning_from_scratch(
        steps in steps(),
        askers in prop::collection::vec(asker(), 1..4),
    ) {
        let (mut view, mut plain) = (ClusterView::default(), Plain::default());
        for step in &steps {
            apply(step, &mut view, &mut plain, &askers);
            for asker in &askers {
                let asking = info(asker.clone());
                let limits = Limits::of(&asking.spread, &view);
                let mut feasible = Vec::new();
                for slot in view.order() {
                    let node = view.at(*slot).unwrap();
                    let (found, expected) = (limits.check(*slot), plain.check(asker, &plain.nodes[&*node.named.name]));
                    prop_assert_eq!(found, expected, "{} after {:?}", node.named.name, step);
                    if expected.is_ok() && fits(node, &asking, asker.spec.as_ref().unwrap()).is_ok() {
                        feasible.push((*slot, node.named.name.to_string()));
                    }
                }
                match schedule(&view, &asking, 0).decision {
                    Decision::Bind(node) => prop_assert!(feasible.iter().any(|(_, name)| *name == *node)),
                    Decision::Unschedulable(_) => prop_assert!(feasible.is_empty()),
                }
                if asking.spread.is_preferred() {
                    let (slots, names): (Vec<_>, Vec<_>) = feasible.into_iter().unzip();
                    prop_assert_eq!(scores(&asking.spread, &view, &slots), plain.scores(asker, &names));
                }
            }
        }
    }

    /// Pods that no constraint counts wake nobody, and others do.
    #[test]
    fn who_waits_is_told_of_what_counts(app in 0..2usize, other in 0..2usize) {
        let hard = TopologySpreadConstraint {
            label_selector: Some(LabelSelector { match_labels: amounts(&[("app", APPS[app])]), match_expressions: Vec::new() }),
            ..constraint(ZONE, "DoNotSchedule")
        };
        let waiting = Spread::of(&labelled("w", &[], &[hard]), None);
        let mut view = view([zoned("a1", "a")]);
        view.set_pod(&bound(pod_of(1, (other, 0), true), "a1"));
        let told = view.take_changed_pods().iter().any(|pods| waiting.counts(pods));
        prop_assert_eq!(told, app == other);
        prop_assert!(view.take_changed_pods().is_empty());
    }
}
