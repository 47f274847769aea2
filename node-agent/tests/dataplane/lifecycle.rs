//! What outlives the agent, and what is refused.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use orlop_ebpf_abi as abi;
use orlop_node::dataplane::{
    Config, Dataplane as _, EbpfDataplane, Sizes, bpf,
    kernel::{self, Kernel, PROGRAMS},
    layout::MAPS,
    verify,
};

use crate::stage::{SIZES, Stage, ask, run, serve, service, upsert, vip, whole};

pub fn started(stage: &Stage) -> EbpfDataplane {
    EbpfDataplane::start(stage.config.clone()).expect("start the dataplane")
}

/// Ids of all programs and maps.
pub fn ids(kernel: &Kernel) -> (Vec<u32>, Vec<u32>) {
    let programs = PROGRAMS
        .iter()
        .map(|spec| bpf::program_info(kernel.program(spec.name)).expect("a program").id)
        .collect();
    (
        programs,
        MAPS.iter().map(|spec| kernel.map(spec.name).info.id).collect(),
    )
}

/// Lookups given up and connections without storage.
pub fn failures(dataplane: &EbpfDataplane) -> (u64, u64) {
    let map = dataplane.kernel().map(abi::FAILURES);
    let mut sums = (0, 0);
    bpf::for_each(&map.fd, &map.info, |_, value| {
        for cpu in value.chunks_exact(16) {
            sums.0 += u64::from_ne_bytes(cpu[..8].try_into().expect("eight bytes"));
            sums.1 += u64::from_ne_bytes(cpu[8..].try_into().expect("eight bytes"));
        }
        true
    })
    .expect("read the failures");
    sums
}

/// No frontend, an arena of zeros, all counters zero, after the grace period.
pub fn assert_empty(dataplane: &EbpfDataplane) {
    let start = Instant::now();
    let left = || {
        [
            abi::FRONTENDS,
            abi::ARENA,
            abi::SERVICE_COUNTERS,
            abi::BACKEND_COUNTERS,
            abi::SOCKETS,
        ]
        .map(|name| {
            let map = dataplane.kernel().map(name);
            let mut used = 0;
            bpf::for_each(&map.fd, &map.info, |_, value| {
                used += usize::from(value.iter().any(|byte| *byte != 0));
                true
            })
            .expect("read a map");
            used
        })
    };
    while left() != [0; 5] {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "frontends, slots, counters left: {:?}",
            left()
        );
        thread::sleep(Duration::from_millis(10));
    }
    let report = dataplane.verify_now().expect("verify");
    assert_eq!((report.differences, report.slots), (vec![], 0));
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("the log").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn wait_for(&self, text: &str) {
        let start = Instant::now();
        loop {
            let log = String::from_utf8_lossy(&self.0.lock().expect("the log")).into_owned();
            if log.contains(text) {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "{text:?} is not in the log: {log}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Every program loads; the verifier's work is recorded, so a change that makes it much harder is seen.
#[test]
fn every_program_loads_within_its_recorded_cost() {
    run("lifecycle::every_program_loads_within_its_recorded_cost", |stage| {
        let dataplane = started(stage);
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/dataplane/verified-instructions.txt");
        let recorded: BTreeMap<String, u32> = fs::read_to_string(file)
            .unwrap_or_default()
            .lines()
            .filter_map(|line| {
                let (name, number) = line.split_once(' ')?;
                Some((name.to_owned(), number.trim().parse().ok()?))
            })
            .collect();
        let now: BTreeMap<String, u32> = PROGRAMS
            .iter()
            .map(|spec| {
                let info = bpf::program_info(dataplane.kernel().program(spec.name)).expect("a program");
                (spec.name.to_owned(), info.verified_instructions)
            })
            .collect();
        if std::env::var_os("ORLOP_RECORD").is_some() {
            let text: String = now.iter().map(|(name, number)| format!("{name} {number}\n")).collect();
            fs::write(file, text).expect("record");
            return;
        }
        for (name, number) in &now {
            let was = recorded.get(name).copied().unwrap_or(0);
            assert!(
                *number > 0 && *number <= was + was / 4 + 50,
                "{name}: the verifier walks {number} instructions, {was} are recorded in {file}: if that is meant, run this \
                 test with ORLOP_RECORD=1"
            );
        }
    });
}

#[test]
fn a_restart_adopts_everything_and_traffic_flows_meanwhile() {
    run(
        "lifecycle::a_restart_adopts_everything_and_traffic_flows_meanwhile",
        |stage| {
            (1..=2).for_each(serve);
            let first = started(stage);
            upsert(&first, &[service(1, &[(1, 1), (2, 1)]), service(2, &[(2, 1)])]);
            let before = ids(first.kernel());
            let mut open = TcpStream::connect(vip(1)).expect("connect");
            for _ in 0..10 {
                ask(vip(1)).expect("an answer");
            }
            drop(first);

            ask(vip(1)).expect("an answer without an agent");
            let second = started(stage);
            assert_eq!(ids(second.kernel()), before, "programs and maps are the same");
            ask(vip(2)).expect("an answer before the agent knows any service");
            // What control says is what is there: nothing is written.
            whole(&second, &[service(1, &[(1, 1), (2, 1)]), service(2, &[(2, 1)])]);
            assert_eq!(second.written(), orlop_node::dataplane::Applied::default());
            let counters = second.read_counters_now().expect("counters");
            assert_eq!(
                counters.services[&("default".to_owned(), "s1".to_owned())].connections,
                12
            );
            assert_eq!(second.verify_now().expect("verify").differences, Vec::<String>::new());
            // A service that went while the agent was away goes with the first whole state.
            whole(&second, &[service(1, &[(1, 1), (2, 1)])]);
            assert!(TcpStream::connect_timeout(&vip(2), Duration::from_millis(300)).is_err());
            let mut byte = [0];
            open.read_exact(&mut byte).expect("the greeting");
            open.write_all(b"x").expect("write");
            open.read_exact(&mut byte).expect("an answer");
            whole(&second, &[]);
            drop(open);
            assert_empty(&second);
        },
    );
}

#[test]
fn what_changes_is_what_is_written() {
    run("lifecycle::what_changes_is_what_is_written", |stage| {
        let dataplane = started(stage);
        let all: Vec<_> = (1..=20)
            .map(|number| service(number, &[(1, 1), (2, 1), (3, 1)]))
            .collect();
        whole(&dataplane, &all);
        let before = dataplane.written();
        assert_eq!((before.frontends_written, before.slots_written), (40, 120));
        whole(&dataplane, &all);
        assert_eq!(dataplane.written(), before);
        upsert(&dataplane, &[service(7, &[(1, 1), (3, 1)])]);
        let after = dataplane.written();
        assert_eq!((after.frontends_written - 40, after.slots_written - 120), (2, 4));
    });
}

#[test]
fn a_full_arena_says_so_and_recovers() {
    run("lifecycle::a_full_arena_says_so_and_recovers", |stage| {
        let config = Config {
            sizes: Sizes { slots: 16, ..SIZES },
            ..stage.config.clone()
        };
        let dataplane = EbpfDataplane::start(config).expect("start the dataplane");
        let wide = |number| service(number, &[(1, 1), (2, 1), (3, 1)]);
        upsert(&dataplane, &[wide(1), wide(2)]);
        // Twelve slots of fifteen are used: a change has room only once the old ranges are free.
        for _ in 0..5 {
            upsert(&dataplane, &[service(1, &[(1, 1), (2, 1), (4, 1)])]);
            upsert(&dataplane, &[wide(1)]);
        }
        let changes = orlop_node::dataplane::ServiceChanges {
            upserts: vec![wide(3)],
            ..Default::default()
        };
        let error = dataplane.apply_now(&changes).expect_err("no room");
        assert!(error.to_string().contains("full"), "{error}");
        let gone = orlop_node::dataplane::ServiceChanges {
            removals: vec![("default".into(), "s1".into())],
            ..Default::default()
        };
        dataplane.apply_now(&gone).expect("now there is room");
        assert_eq!(
            dataplane.verify_now().expect("verify").differences,
            Vec::<String>::new()
        );
    });
}

#[test]
fn a_frontend_that_leads_out_of_the_arena_leads_nowhere() {
    run(
        "lifecycle::a_frontend_that_leads_out_of_the_arena_leads_nowhere",
        |stage| {
            serve(1);
            let services = [service(1, &[(1, 1)])];
            let dataplane = started(stage);
            whole(&dataplane, &services);
            let slots = dataplane.kernel().map(abi::ARENA).info.max_entries;
            for (number, base, ready, terminating) in [
                (2, slots, 1, 0),
                (3, u32::MAX, 1, 0),
                (4, u32::MAX, u32::MAX, u32::MAX),
                (5, slots - 1, 0, u32::MAX),
                (6, 0, 1, 0),
            ] {
                let key = abi::FrontendKey {
                    address: [10, 96, 0, number],
                    port: 80,
                    protocol: abi::Protocol::Tcp,
                    scope: abi::Scope::Cluster,
                };
                let mut value = abi::Frontend {
                    service: 7,
                    generation: 77,
                    base,
                    ready,
                    terminating,
                    flags: 0,
                    owner: 1,
                    check: 0,
                };
                value.check = abi::selection::checksum(&key, &value);
                let words = [
                    value.service,
                    value.generation,
                    base,
                    ready,
                    terminating,
                    0,
                    1,
                    value.check,
                ];
                let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
                let frontends = dataplane.kernel().map(abi::FRONTENDS);
                bpf::update(&frontends.fd, &[10, 96, 0, number, 80, 0, 6, 0], &bytes).expect("write");
                let error = ask(vip(number)).expect_err("it leads nowhere");
                assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{number}");
            }
            assert_eq!(failures(&dataplane), (5, 0));
            assert_eq!(ask(vip(1)).expect("an answer"), 1);
            // An agent that starts on such maps takes none of it, and what is right stays.
            drop(dataplane);
            let healed = started(stage);
            assert_eq!(ask(vip(1)).expect("an answer"), 1);
            whole(&healed, &services);
            assert!(
                verify::verify(&stage.config, &services, &[])
                    .expect("verify")
                    .is_clean()
            );
        },
    );
}

#[test]
fn what_others_damage_is_found_and_healed() {
    run("lifecycle::what_others_damage_is_found_and_healed", |stage| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .init();
        serve(1);
        let services = [service(1, &[(1, 1)]), service(2, &[(1, 1)])];
        let dataplane = started(stage);
        whole(&dataplane, &services);
        let frontends = dataplane.kernel().map(abi::FRONTENDS);
        let key = |number| [10, 96, 0, number, 80, 0, 6, 0];
        bpf::delete(&frontends.fd, &key(2)).expect("delete");
        // The value of another key, as a recycled element would look to a reader.
        let mut value = Vec::new();
        bpf::for_each(&frontends.fd, &frontends.info, |found, bytes| {
            if found == key(1) {
                value = bytes.to_vec();
            }
            true
        })
        .expect("read");
        bpf::update(&frontends.fd, &key(3), &value).expect("write");
        let error = ask(vip(3)).expect_err("it is another's entry");
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
        assert_eq!(failures(&dataplane), (1, 0));
        log.wait_for("10.96.0.3:80 refused");

        let report = verify::verify(&stage.config, &services, &[]).expect("verify");
        // The entry that is missing, the one that is another's, and the slots of the first.
        assert_eq!(report.differences.len(), 3, "{report}");
        assert!(
            report.to_string().contains("10.96.0.2:80") && report.to_string().contains("10.96.0.3:80"),
            "{report}"
        );

        drop(dataplane);
        let healed = started(stage);
        whole(&healed, &services);
        assert!(
            verify::verify(&stage.config, &services, &[])
                .expect("verify")
                .is_clean()
        );
        // The adopted programs' log is read as well.
        bpf::update(&healed.kernel().map(abi::FRONTENDS).fd, &key(4), &value).expect("write");
        ask(vip(4)).expect_err("it is another's entry");
        log.wait_for("10.96.0.4:80 refused");
        bpf::delete(&healed.kernel().map(abi::FRONTENDS).fd, &key(4)).expect("delete");
        fs::remove_file(kernel::Pins::new(&stage.config).link("connect4")).expect("unpin");
        assert!(healed.health().is_err());
        let report = verify::verify(&stage.config, &services, &[]).expect("verify");
        assert!(report.to_string().contains("connect4"), "{report}");
        drop(healed);
        started(stage).health().expect("attached again");
        assert_eq!(ask(vip(1)).expect("an answer"), 1);
    });
}
