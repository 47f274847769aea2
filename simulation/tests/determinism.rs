//! A seed is replayed to the last byte by another process: every scenario, over a good store and over its adversary. (Where agents take
//! part that is nearly so; see `environment`.)

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
};

use orlop_simulation::{adversary::Hardness, cluster::Fate, runs::run, scenarios, state::trace};

const SEED: u64 = 5;
/// Tells this test that it is one of the processes that are compared.
const REPLAYS: &str = "ORLOP_REPLAYS";
/// What a line of such a process begins with.
const MARK: &str = "replayed ";

#[test]
fn a_seed_is_replayed_by_another_process() {
    if std::env::var_os(REPLAYS).is_some() {
        return replay();
    }
    let processes = [(); 2].map(|()| {
        let mut this = Command::new(std::env::current_exe().expect("this test's program"));
        this.args(["--exact", "a_seed_is_replayed_by_another_process", "--nocapture"]);
        let replaying = this.env(REPLAYS, "1").stdout(Stdio::piped()).spawn();
        replaying.expect("a process")
    });
    let [one, other] = processes.map(|process| {
        let output = process.wait_with_output().expect("its output");
        assert!(output.status.success(), "a replay failed: {}", output.status);
        let text = String::from_utf8(output.stdout).expect("text");
        let lines = text
            .lines()
            .filter_map(|line| Some(line.split_once(MARK)?.1.to_owned()));
        lines.collect::<Vec<_>>()
    });
    assert_eq!(one.len(), 2 * scenarios::ALL.len(), "{one:?}");
    assert_eq!(one, other, "what was written follows more than the seed");
    let traces: BTreeSet<_> = one.iter().filter_map(|line| line.split(' ').next_back()).collect();
    assert_eq!(
        traces.len(),
        one.len(),
        "stories that differ have the same trace: {one:?}"
    );
}

fn replay() {
    for scenario in scenarios::ALL {
        for adversary in [None, Some((Hardness::default(), SEED))] {
            let hindered = adversary.is_some();
            let fate = Fate {
                adversary,
                ..Fate::default()
            };
            let told = run(*scenario, SEED, fate).expect("it ends");
            println!("{MARK}{} hindered {hindered} {:016x}", scenario.name, trace(&told.data));
        }
    }
}
