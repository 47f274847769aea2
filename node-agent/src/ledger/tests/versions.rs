//! What agents of other versions wrote. The files are as the first version wrote them: who changes what is in them gives them
//! another format, and goes on reading this one.

use orlop_proto::core::v1::{Container, PodSpec};

use super::{
    super::file::{Unreadable, checksum},
    *,
};

/// The pod default/a: one container "web", restartPolicy Always, 30 s of grace, on n1.
const POD: &str = "\
    6f726c6f706c64670000000135a51a2da748ad55ece279676bddf4918673a8a09f6726295acf9f9031eea04e1a130a01611a0764656661756c742205\
    7569642d61222a0a1a0a0377656212136f726c6f702e6465762f666978747572653a311206416c77617973181e2a026e31\
";
/// The service default/web at 10.96.0.20, TCP 80 to 10.244.1.2:8080, which is ready.
const SERVICES: &str = "\
    6f726c6f706c646700000001b22d66e496a916b3d4e2e071474181589b35bec7741dcd4d112bce592aa6d4160a330a0764656661756c741203776562\
    1a077569642d77656222040a6000142a140a04687474701006185022080af401021f900100\
";
/// The route to 10.244.2.0/24 by n2 at 192.0.2.12.
const ROUTES: &str = "\
    6f726c6f706c646700000001aaf28ce654735514601853d3fb8b377ff7db7eaaaa4729c529fdec99e87ea29a0a1f0a026e32120a3139322e302e322e\
    31321a0d31302e3234342e322e302f3234\
";
/// Generation 7, complete, 10.244.1.0/24 of 10.244.0.0/16 beside 10.96.0.0/12.
const NODE: &str = "\
    6f726c6f706c646700000001f4956a6af561a70caf116b860934dde10a5cf4b5e17a55d9dbf101bfd711372f080710011a2c0a0d31302e3234342e31\
    2e302f3234120d31302e3234342e302e302f31361a0c31302e39362e302e302f3132\
";

/// A ledger of those files.
fn kept(dir: &Path) {
    fs::create_dir_all(dir.join("ledger/pods")).unwrap();
    for (file, hex) in [
        ("pods/uid-a", POD),
        ("services", SERVICES),
        ("routes", ROUTES),
        ("node", NODE),
    ] {
        fs::write(dir.join("ledger").join(file), hex::decode(hex).unwrap()).unwrap();
    }
}

/// What they say.
fn told() -> Desired {
    let metadata = ObjectMeta {
        uid: "uid-a".into(),
        name: "a".into(),
        namespace: "default".into(),
        ..ObjectMeta::default()
    };
    let spec = PodSpec {
        containers: vec![Container {
            name: "web".into(),
            image: "orlop.dev/fixture:1".into(),
            ..Container::default()
        }],
        restart_policy: "Always".into(),
        termination_grace_period_seconds: Some(30),
        node_name: "n1".into(),
        ..PodSpec::default()
    };
    let pod = Pod {
        metadata: Some(metadata),
        spec: Some(spec),
        ..Pod::default()
    };
    let route = link::Route {
        node_name: "n2".into(),
        node_address: "192.0.2.12".into(),
        pod_cidrs: vec!["10.244.2.0/24".into()],
    };
    let ranges = link::Welcome {
        pod_cidrs: vec!["10.244.1.0/24".into()],
        cluster_pod_cidr: "10.244.0.0/16".into(),
        service_cidr: "10.96.0.0/12".into(),
    };
    let mut desired = Desired {
        pods: OrdMap::unit("uid-a".into(), Arc::new(pod)),
        routes: OrdMap::unit("n2".into(), Arc::new(route)),
        ranges: Some(Arc::new(ranges)),
        complete: true,
        ..Desired::default()
    };
    desired.services.insert(Arc::new(link::Service {
        namespace: "default".into(),
        name: "web".into(),
        uid: "uid-web".into(),
        addresses: vec![vec![10, 96, 0, 20].into()],
        ports: vec![link::ServicePort {
            name: "http".into(),
            protocol: 6,
            port: 80,
            backends_v4: vec![10, 244, 1, 2, 0x1f, 0x90, 1, 0].into(),
        }],
    }));
    desired
}

fn assert_is_told(read: &Desired) {
    let told = told();
    assert!(read.complete);
    assert_eq!(read.pods, told.pods);
    assert_eq!(read.services, told.services);
    assert_eq!(read.routes, told.routes);
    assert_eq!(read.ranges, told.ranges);
}

/// All files of a ledger.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let folders = ["", "pods", "damaged"].map(|folder| dir.join("ledger").join(folder));
    let files = folders.iter().flat_map(|folder| list(folder).unwrap_or_default());
    files
        .filter_map(|path| Some((path.clone(), fs::read(path).ok()?)))
        .collect()
}

#[test]
fn what_the_first_agent_wrote_is_read_and_written_the_same() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    kept(dir.path());
    let (mut ledger, read, damage) = Ledger::open(dir.path()).unwrap();
    assert!(damage.is_empty(), "{damage:?}");
    assert_is_told(&read);
    assert_eq!(read_services(dir.path()).unwrap().len(), 1);
    let generation = ledger.begin_session().unwrap();
    assert_eq!(generation, Generation(8), "generations go on");

    let (mut ledger, ..) = Ledger::open(other.path()).unwrap();
    let generations: Vec<Generation> = (0..7).map(|_| ledger.begin_session().unwrap()).collect();
    ledger.write(generations[6], &told(), uids(&["uid-a"])).unwrap();
    let writer = ledger.writer(generations[6]).unwrap();
    writer.services(&told().services, 0).unwrap();
    writer.routes(&told().routes).unwrap();
    for (file, hex) in [
        ("pods/uid-a", POD),
        ("services", SERVICES),
        ("routes", ROUTES),
        ("node", NODE),
    ] {
        let written = fs::read(other.path().join("ledger").join(file)).unwrap();
        assert_eq!(
            hex::encode(written),
            hex,
            "{file} is written in another way: it needs another format"
        );
    }
}

#[test]
fn fields_of_a_newer_agent_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    kept(dir.path());
    for file in ["pods/uid-a", "services", "routes", "node"] {
        let path = dir.path().join("ledger").join(file);
        let bytes = fs::read(&path).unwrap();
        // Field 1000, a text.
        let body = [unframe(&bytes).unwrap(), b"\xc2\x3e\x05later"].concat();
        fs::write(&path, [&frame(&body)[..], &body].concat()).unwrap();
    }
    let (_, read, damage) = Ledger::open(dir.path()).unwrap();
    assert!(damage.is_empty(), "{damage:?}");
    assert_is_told(&read);
}

#[test]
fn a_format_of_a_newer_agent_is_refused_and_left_as_it_is() {
    for file in ["pods/uid-a", "services", "routes", "node"] {
        let dir = tempfile::tempdir().unwrap();
        kept(dir.path());
        drop(Ledger::open(dir.path()).unwrap());
        let path = dir.path().join("ledger").join(file);
        let mut bytes = fs::read(&path).unwrap();
        let sum = checksum(2, unframe(&bytes).unwrap());
        bytes[11] = 2;
        assert!(
            matches!(unframe(&bytes), Err(Unreadable::Damaged(_))),
            "a flipped bit is no newer format"
        );
        bytes[12..44].copy_from_slice(&sum);
        fs::write(&path, bytes).unwrap();
        let before = contents(dir.path());
        let refused = Ledger::open(dir.path()).unwrap_err().to_string();
        for what in [&*path.display().to_string(), "format 2", "start the newer one again"] {
            assert!(refused.contains(what), "{refused}");
        }
        let folder = format!("remove {} when", dir.path().join("ledger").display());
        assert!(refused.contains(&folder), "{refused}");
        assert_eq!(contents(dir.path()), before, "{file}");
        if file == "services" {
            assert_eq!(read_services(dir.path()).unwrap_err().to_string(), refused);
        }
    }
}
