//! The ledger on a real file system: what is written is read again, and what is damaged is put aside.

use orlop_proto::meta::v1::ObjectMeta;
use proptest::prelude::*;

use super::*;

mod versions;

fn pod(uid: &str) -> Arc<Pod> {
    let metadata = ObjectMeta {
        uid: uid.into(),
        name: format!("pod-{uid}"),
        namespace: "default".into(),
        ..Default::default()
    };
    Arc::new(Pod {
        metadata: Some(metadata),
        ..Default::default()
    })
}

fn pods(uids: &[&str]) -> OrdMap<String, Arc<Pod>> {
    uids.iter().map(|uid| ((*uid).to_owned(), pod(uid))).collect()
}

fn holding(uids: &[&str]) -> Desired {
    Desired {
        pods: pods(uids),
        ..Desired::default()
    }
}

fn uids(of: &[&str]) -> BTreeSet<String> {
    of.iter().map(|uid| (*uid).to_owned()).collect()
}

fn service(name: &str) -> Arc<link::Service> {
    Arc::new(link::Service {
        namespace: "default".into(),
        name: name.into(),
        ..Default::default()
    })
}

fn filled(dir: &Path) -> Desired {
    let (mut ledger, _, damage) = Ledger::open(dir).unwrap();
    assert!(damage.is_empty());
    let generation = ledger.begin_session().unwrap();
    let mut desired = Desired {
        complete: true,
        pods: pods(&["a", "b"]),
        ..Desired::default()
    };
    desired.ranges = Some(Arc::new(link::Welcome {
        pod_cidrs: vec!["10.244.1.0/24".into()],
        ..Default::default()
    }));
    desired.routes.insert(
        "n2".into(),
        Arc::new(link::Route {
            node_name: "n2".into(),
            ..Default::default()
        }),
    );
    desired.services.insert(service("web"));
    ledger.write(generation, &desired, uids(&["a", "b"])).unwrap();
    let writer = ledger.writer(generation).unwrap();
    writer.services(&desired.services, 0).unwrap();
    writer.routes(&desired.routes).unwrap();
    desired
}

#[test]
fn what_was_written_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let written = filled(dir.path());
    let (mut ledger, read, damage) = Ledger::open(dir.path()).unwrap();
    assert!(damage.is_empty());
    assert!(read.complete);
    assert_eq!(read.pods, written.pods);
    assert_eq!(read.services, written.services);
    assert_eq!(read_services(dir.path()).unwrap(), [service("web")]);
    assert_eq!(read.routes, written.routes);
    assert_eq!(read.ranges, written.ranges);
    let generation = ledger.begin_session().unwrap();
    assert_eq!(generation, Generation(2));
    let fewer = Desired {
        pods: pods(&["b"]),
        ..read
    };
    ledger.write(generation, &fewer, uids(&["a", "never-there"])).unwrap();
    let (_, read, _) = Ledger::open(dir.path()).unwrap();
    assert_eq!(read.pods.keys().collect::<Vec<_>>(), ["b"]);
}

#[test]
fn routes_that_an_older_agent_kept_in_another_file_stay_until_there_are_others() {
    let dir = tempfile::tempdir().unwrap();
    let route = |node: &str| link::Route {
        node_name: node.to_owned(),
        ..link::Route::default()
    };
    let (mut ledger, ..) = Ledger::open(dir.path()).unwrap();
    let older = NodeFile {
        routes: vec![route("n2")],
        ..NodeFile::default()
    };
    ledger.write_node(older).unwrap();
    let (mut ledger, read, _) = Ledger::open(dir.path()).unwrap();
    assert_eq!(read.routes.keys().map(|node| &**node).collect::<Vec<_>>(), ["n2"]);
    let generation = ledger.begin_session().unwrap();
    ledger.write(generation, &read, uids(&[])).unwrap();
    let (ledger, read, _) = Ledger::open(dir.path()).unwrap();
    assert_eq!(read.routes.keys().map(|node| &**node).collect::<Vec<_>>(), ["n2"]);
    let routes = OrdMap::unit("n3".into(), Arc::new(route("n3")));
    ledger.writer(generation).unwrap().routes(&routes).unwrap();
    let (_, read, _) = Ledger::open(dir.path()).unwrap();
    assert_eq!(read.routes, routes);
}

#[test]
fn an_older_session_cannot_write() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ledger, _, _) = Ledger::open(dir.path()).unwrap();
    let old = ledger.begin_session().unwrap();
    let new = ledger.begin_session().unwrap();
    ledger.write(new, &holding(&["a"]), uids(&["a"])).unwrap();
    assert!(matches!(
        ledger.write(old, &holding(&[]), uids(&["a"])),
        Err(LedgerError::Stale { .. })
    ));
    assert!(ledger.writer(old).is_err());
    let (mut ledger, read, _) = Ledger::open(dir.path()).unwrap();
    assert_eq!(read.pods.len(), 1);
    assert!(ledger.begin_session().unwrap() > new);
}

#[test]
fn what_cannot_be_read_is_an_error_and_stays_where_it_is() {
    for file in ["pods/a", "services", "node"] {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path());
        let path = dir.path().join("ledger").join(file);
        let kept = dir.path().join("kept");
        fs::rename(&path, &kept).unwrap();
        // Reading a folder fails for root, too.
        fs::create_dir(&path).unwrap();
        let error = Ledger::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains(file), "{error}");
        fs::remove_dir(&path).unwrap();
        fs::rename(&kept, &path).unwrap();
        let (_, read, damage) = Ledger::open(dir.path()).unwrap();
        assert!(
            read.complete && damage.is_empty() && read.pods.contains_key("a"),
            "{file}"
        );
    }
}

#[test]
fn a_damaged_file_is_put_aside_and_the_rest_stays() {
    for (file, garbage) in [
        ("pods/a", &b"garbage"[..]),
        ("services", b""),
        ("node", b"orlopldg\0\0\0\x09"),
        ("pods/a", b"\0"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path());
        let path = dir.path().join("ledger").join(file);
        fs::write(&path, garbage).unwrap();
        let (_, read, damage) = Ledger::open(dir.path()).unwrap();
        assert_eq!(damage.len(), 1, "{file}");
        assert_eq!(damage[0].path, path);
        assert!(!path.exists());
        assert!(
            !read.complete,
            "{file}: nothing may be swept on the word of a damaged ledger"
        );
        assert!(read.pods.contains_key("b"));
        assert_eq!(list(&dir.path().join("ledger/damaged")).unwrap().len(), 1);
        let (_, read, damage) = Ledger::open(dir.path()).unwrap();
        assert!(damage.is_empty());
        assert!(!read.complete, "{file}: nor at the next start");
    }
}

#[test]
fn what_a_failed_write_may_have_left_is_put_right_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ledger, _, _) = Ledger::open(dir.path()).unwrap();
    let generation = ledger.begin_session().unwrap();
    // What cannot be removed stands in for a disk that fails after the renames.
    let stuck = dir.path().join("ledger/pods/stuck");
    fs::create_dir(&stuck).unwrap();
    let failed = ledger.write(generation, &holding(&["a", "b"]), uids(&["a", "b", "stuck"]));
    assert!(matches!(failed, Err(LedgerError::Io { .. })), "{failed:?}");
    assert!(!ledger.doubtful.is_empty());
    fs::remove_dir(&stuck).unwrap();
    // So may a node file that cannot be written, after the pods.
    let node = dir.path().join("ledger/node");
    fs::remove_file(&node).unwrap();
    fs::create_dir(&node).unwrap();
    let complete = Desired {
        complete: true,
        ..holding(&["a", "b"])
    };
    assert!(ledger.write(generation, &complete, uids(&[])).is_err());
    assert!(!ledger.doubtful.is_empty());
    fs::remove_dir(&node).unwrap();
    // Meanwhile control has taken one of them back; nothing else changes.
    ledger.write(generation, &holding(&["b"]), uids(&[])).unwrap();
    assert!(ledger.doubtful.is_empty());
    let (_, read, _) = Ledger::open(dir.path()).unwrap();
    assert_eq!(read.pods, pods(&["b"]));
}

#[test]
fn a_crash_before_the_rename_leaves_the_old_state() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let temporary = Temporary::write(&dir.path().join("ledger/pods/c"), &pod("c").encode_to_vec()).unwrap();
    temporary.sync().unwrap();
    fs::write(dir.path().join("ledger/pods/a.tmp"), b"half").unwrap();
    let (_, read, damage) = Ledger::open(dir.path()).unwrap();
    assert!(damage.is_empty());
    assert_eq!(read.pods.len(), 2);
    assert_eq!(files(dir.path()).len(), 2);
}

#[test]
fn services_that_changed_while_the_file_was_written_are_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ledger, desired, _) = Ledger::open(dir.path()).unwrap();
    let generation = ledger.begin_session().unwrap();
    let (writer, behind) = (ledger.writer(generation).unwrap(), ledger.behind());
    behind.announce();
    behind.write().unwrap();
    let notes = behind.notes();
    behind.announce();
    writer.services(&desired.services, notes).unwrap();
    assert!(
        ledger.services_are_behind(),
        "the file has only what was announced first"
    );
    writer.services(&desired.services, behind.notes()).unwrap();
    assert!(!ledger.services_are_behind());
}

#[test]
fn hostile_uids_write_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ledger, _, _) = Ledger::open(dir.path()).unwrap();
    let generation = ledger.begin_session().unwrap();
    for uid in ["", "..", "../x", "a/b", "a\0", "a.tmp", &"x".repeat(129)] {
        assert!(
            matches!(
                ledger.write(generation, &holding(&[uid]), uids(&[uid])),
                Err(LedgerError::BadUid(_))
            ),
            "{uid:?}"
        );
    }
    assert!(files(dir.path()).is_empty());
}

proptest! {
    #[test]
    fn any_flipped_byte_is_noticed(at in 0usize..4096, bit in 0u8..8) {
        let body = pod("a").encode_to_vec();
        let mut bytes = frame(&body).to_vec();
        bytes.extend_from_slice(&body);
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        prop_assert!(unframe(&bytes).is_err());
    }
}
