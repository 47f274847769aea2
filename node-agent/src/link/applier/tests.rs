//! What a restarted agent does with the services and routes that its ledger and the kernel hold.

use std::{path::Path, time::Duration};

use orlop_proto::node::v1 as link;

use super::*;
use crate::simulated::{SimulatedDataplane, SimulatedNetwork};

/// What outlives the agent.
#[derive(Default)]
struct Host {
    dataplane: Arc<SimulatedDataplane>,
    network: Arc<SimulatedNetwork>,
}

/// An agent's life until it is killed.
struct Life {
    handle: ApplierHandle,
    desired: watch::Receiver<Arc<Desired>>,
    task: tokio::task::JoinHandle<()>,
}

impl Life {
    fn begin(dir: &Path, host: &Host) -> Self {
        let (ledger, desired, _) = Ledger::open(dir).unwrap();
        let (applier, handle, desired) = Applier::new(ledger, desired, host.dataplane.clone(), host.network.clone());
        let task = tokio::spawn(applier.run(CancellationToken::new()));
        Self { handle, desired, task }
    }

    async fn session(&self) {
        self.handle.welcome(1, welcome()).await;
    }

    /// Another session, with this and nothing else in its snapshot.
    async fn next_session(&self, change: link::change::Change) {
        self.handle.welcome(2, welcome()).await;
        let update = link::Update {
            version: 1,
            changes: vec![link::Change { change: Some(change) }],
            snapshot_end: true,
        };
        self.handle.update(2, update).await;
        let mut applied = self.handle.applied();
        let acknowledged = applied.wait_for(|applied| applied.session == 2 && applied.version == 1);
        let in_time = tokio::time::timeout(Duration::from_secs(60), acknowledged).await;
        in_time.expect("it is acknowledged").unwrap();
    }

    async fn update(&self, version: u64, service: link::Service) {
        self.change(version, link::change::Change::Service(service)).await;
    }

    async fn change(&self, version: u64, change: link::change::Change) {
        let change = link::Change { change: Some(change) };
        let update = link::Update {
            version,
            changes: vec![change],
            snapshot_end: version == 1,
        };
        self.handle.update(1, update).await;
        let mut applied = self.handle.applied();
        let acknowledged = applied.wait_for(|applied| applied.version == version);
        let in_time = tokio::time::timeout(Duration::from_secs(60), acknowledged).await;
        in_time.expect("it is acknowledged").unwrap();
    }

    async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

fn web(uid: &str) -> link::Service {
    link::Service {
        namespace: "default".into(),
        name: "web".into(),
        uid: uid.into(),
        ..Default::default()
    }
}

fn route(node: &str) -> link::change::Change {
    link::change::Change::Route(link::Route {
        node_name: node.into(),
        ..link::Route::default()
    })
}

fn welcome() -> link::Welcome {
    link::Welcome {
        pod_cidrs: vec!["10.244.0.0/24".to_owned()],
        ..link::Welcome::default()
    }
}

fn pod(uid: &str) -> link::change::Change {
    let mut pod = orlop_proto::core::v1::Pod::default();
    pod.metadata.get_or_insert_default().uid = uid.to_owned();
    link::change::Change::Pod(pod)
}

/// A disk that hangs when a file is written: who opens a FIFO to write waits until somebody reads.
struct HangingDisk(std::path::PathBuf);

impl HangingDisk {
    fn of(dir: &Path, file: &str) -> Self {
        let path = dir.join(format!("ledger/{file}.tmp"));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        Self(path)
    }

    /// What is read is thrown away: the write fails, and is made again in the file's right place.
    fn goes_on(self) {
        std::io::copy(&mut std::fs::File::open(&self.0).unwrap(), &mut std::io::sink()).unwrap();
    }
}

fn in_force(host: &Host) -> Vec<String> {
    host.dataplane
        .services()
        .values()
        .map(|service| service.uid.clone())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn maps_that_are_newer_than_the_ledger_are_not_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::default();
    let life = Life::begin(dir.path(), &host);
    life.session().await;
    life.update(1, web("old")).await;
    // Until the ledger has it.
    while crate::ledger::read_services(dir.path()).unwrap().is_empty() {
        tokio::time::sleep(WRITE_BEHIND).await;
    }
    life.update(2, web("new")).await;
    life.kill().await;
    assert_eq!(crate::ledger::read_services(dir.path()).unwrap()[0].uid, "old");

    // Control does not answer.
    let life = Life::begin(dir.path(), &host);
    tokio::time::sleep(WRITE_BEHIND).await;
    assert_eq!(in_force(&host), ["new"]);
    life.kill().await;

    // After a reboot there are no maps, and the ledger is the best there is.
    let host = Host::default();
    let life = Life::begin(dir.path(), &host);
    tokio::time::sleep(WRITE_BEHIND).await;
    assert_eq!(in_force(&host), ["old"]);

    // Control answers: the ledger catches up, and counts again.
    life.session().await;
    life.update(1, web("newest")).await;
    let (ledger, ..) = Ledger::open(dir.path()).unwrap();
    while ledger.services_are_behind() {
        tokio::time::sleep(WRITE_BEHIND).await;
    }
    assert_eq!(crate::ledger::read_services(dir.path()).unwrap()[0].uid, "newest");
    life.kill().await;
}

#[tokio::test(start_paused = true)]
async fn routes_reach_the_ledger_and_a_burst_of_them_costs_few_writes() {
    let dir = tempfile::tempdir().unwrap();
    let life = Life::begin(dir.path(), &Host::default());
    life.session().await;
    let file = dir.path().join("ledger/routes");
    // Each write is longer than the one before.
    let written = || std::fs::metadata(&file).ok().map(|data| data.len());
    let mut seen = std::collections::BTreeSet::new();
    for version in 1..=60 {
        life.change(version, route(&format!("n{version}"))).await;
        tokio::time::sleep(WRITE_BEHIND / 20).await;
        seen.extend(written());
    }
    assert!(seen.len() <= 4, "{} writes", seen.len());
    tokio::time::sleep(WRITE_BEHIND * 2).await;
    while Ledger::open(dir.path()).unwrap().1.routes.len() < 60 {
        tokio::time::sleep(WRITE_BEHIND).await;
    }
    life.kill().await;
}

#[tokio::test(start_paused = true)]
async fn routes_that_the_ledger_does_not_have_stay_until_control_has_told_of_all() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::default();
    let routed = || {
        host.network
            .routes()
            .keys()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    let life = Life::begin(dir.path(), &host);
    life.session().await;
    life.change(1, route("n1")).await;
    life.change(2, route("n2")).await;
    life.kill().await;
    assert!(Ledger::open(dir.path()).unwrap().1.routes.is_empty(), "killed too late");
    assert_eq!(routed(), ["n1", "n2"]);

    // Control does not answer, and the ledger has the range only.
    let life = Life::begin(dir.path(), &host);
    tokio::time::sleep(WRITE_BEHIND).await;
    assert_eq!(routed(), ["n1", "n2"]);

    // It does. Its Welcome says nothing of routes yet; then the first of them is gone.
    life.session().await;
    while life.desired.borrow().ranges.is_none() {
        tokio::time::sleep(WRITE_BEHIND).await;
    }
    tokio::time::sleep(WRITE_BEHIND).await;
    assert_eq!(routed(), ["n1", "n2"]);
    life.change(1, route("n2")).await;
    tokio::time::sleep(WRITE_BEHIND).await;
    assert_eq!(routed(), ["n2"]);
    life.kill().await;
}

#[tokio::test(start_paused = true)]
async fn services_go_on_while_the_ledger_takes_no_pods() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::default();
    let mut life = Life::begin(dir.path(), &host);
    life.session().await;
    life.update(1, web("old")).await;
    let (pods, away) = (dir.path().join("ledger/pods"), dir.path().join("away"));
    std::fs::rename(&pods, &away).unwrap();
    life.change(2, pod("a")).await;
    // Without acknowledgements control would fall silent after a few more.
    life.update(3, web("new")).await;
    assert_eq!(in_force(&host), ["new"]);
    assert!(life.handle.ledger().borrow().is_some(), "people are told");
    assert!(
        life.desired.borrow().pods.is_empty(),
        "what is not durable is not acted on"
    );
    std::fs::rename(&away, &pods).unwrap();
    let acted_on = life.desired.wait_for(|desired| desired.pods.contains_key("a"));
    let in_time = tokio::time::timeout(Duration::from_secs(60), acted_on).await;
    in_time.expect("the order is acted on").unwrap();
    assert!(life.handle.ledger().borrow().is_none());
    life.kill().await;
}

#[tokio::test]
async fn services_go_on_while_the_disk_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::default();
    let mut life = Life::begin(dir.path(), &host);
    life.session().await;
    life.update(1, web("old")).await;
    let disk = HangingDisk::of(dir.path(), "pods/a");
    life.change(2, pod("a")).await;
    // A pod waits behind it; routes and services do not.
    life.change(3, route("n1")).await;
    life.update(4, web("new")).await;
    assert_eq!(in_force(&host), ["new"]);
    life.change(5, pod("b")).await;
    life.update(6, web("newest")).await;
    assert_eq!(in_force(&host), ["newest"]);
    assert!(
        life.desired.borrow().pods.is_empty(),
        "what is not durable is not acted on"
    );
    assert!(host.network.routes().keys().eq([&Arc::from("n1")]));

    disk.goes_on();
    let acted_on = life
        .desired
        .wait_for(|desired| desired.pods.contains_key("a") && desired.pods.contains_key("b"));
    let in_time = tokio::time::timeout(Duration::from_secs(60), acted_on).await;
    in_time.expect("the orders are acted on").unwrap();
    assert_eq!(
        host.network.routes().keys().map(|node| &**node).collect::<Vec<_>>(),
        ["n1"]
    );
    let names = crate::ledger::files(dir.path()).into_keys().collect::<Vec<_>>();
    assert_eq!(names, ["a", "b"]);
    life.kill().await;
}

#[tokio::test]
async fn a_session_that_begins_while_the_disk_hangs_sweeps_what_it_does_not_name() {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::default();
    let mut life = Life::begin(dir.path(), &host);
    life.session().await;
    life.update(1, web("old")).await;
    let disk = HangingDisk::of(dir.path(), "pods/a");
    life.change(2, pod("a")).await;
    // The next session knows of another pod only.
    life.next_session(pod("b")).await;
    assert!(life.desired.borrow().pods.is_empty());
    disk.goes_on();
    let only_b = |desired: &Arc<Desired>| desired.pods.keys().eq(["b"]);
    let in_time = tokio::time::timeout(Duration::from_secs(60), life.desired.wait_for(only_b)).await;
    in_time.expect("the orders are acted on").unwrap();
    assert!(crate::ledger::files(dir.path()).into_keys().eq(["b"]));
    life.kill().await;
}

#[tokio::test]
async fn a_session_that_begins_while_a_file_is_late_is_written_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut life = Life::begin(dir.path(), &Host::default());
    life.session().await;
    let disk = HangingDisk::of(dir.path(), "services");
    life.update(1, web("old")).await;
    life.change(2, route("n1")).await;
    // The services' file hangs by then, and the routes' is due.
    tokio::time::sleep(WRITE_BEHIND * 2).await;
    life.next_session(pod("b")).await;
    disk.goes_on();
    let acted_on = life.desired.wait_for(|desired| desired.pods.contains_key("b"));
    let in_time = tokio::time::timeout(Duration::from_secs(60), acted_on).await;
    in_time.expect("the order is acted on").unwrap();
    life.kill().await;
}

#[test]
fn orders_that_were_not_written_yield_to_later_ones() {
    let update = |changes: Vec<link::change::Change>, snapshot_end| link::Update {
        version: 1,
        changes: changes
            .into_iter()
            .map(|change| link::Change { change: Some(change) })
            .collect(),
        snapshot_end,
    };
    let gone = |uid: &str| {
        link::change::Change::PodRemoved(link::PodKey {
            uid: uid.to_owned(),
            ..Default::default()
        })
    };
    let mut batch = Batch::begin(Arc::default());
    batch.absorb(update(vec![pod("a"), pod("b")], true));
    // Taken while the snapshot arrived; what was being written then came into force after it.
    let mut in_force = Desired::default();
    let mut earlier = Batch::begin(Arc::default());
    earlier.absorb(update(vec![pod("c")], true));
    earlier.take_orders().apply(&mut in_force);
    let orders = batch.take_orders();
    batch.absorb(update(vec![gone("a"), pod("d")], false));
    batch.put_back(orders);
    let pods = batch.take_orders().apply(&mut in_force);
    assert!(in_force.pods.keys().eq(["b", "d"]));
    assert!(pods.iter().eq(["b", "c", "d"]));
    assert!(!batch.has_orders());
}

#[test]
fn a_small_clusters_routes_are_written_soon_and_a_large_ones_seldom() {
    assert_eq!(routes_pause(0), WRITE_BEHIND);
    assert_eq!(routes_pause(100), WRITE_BEHIND);
    assert_eq!(routes_pause(5000), Duration::from_secs(25));
}
