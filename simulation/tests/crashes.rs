//! Control is killed at every single write of every scenario, before and after the write took effect, and started anew over what is in
//! the store, alone or as a replica that has to be elected. Each time it comes to the end that it comes to without a crash. `ORLOP_SCENARIO=NAME ORLOP_WRITE=N` repeats one of them.

use orlop_simulation::{
    cluster::Fate,
    mortal::{CrashPoint, Dies},
    runs::{each_scenario, number, run, what_differs},
    scenarios::{self, Scenario},
};

const SEED: u64 = 1;
/// A scenario in which less is written tells little.
const WRITES: u64 = 20;

/// The story in which replicas are killed.
const ELECTED: &str = "replica_sets_scale";

#[test]
fn control_may_die_at_every_write() {
    each_scenario(|scenario| killed_everywhere(scenario, false));
}

/// At the claim and the fence, at the writes of the term, and at the next replica's, which has to wait until the claim is over.
#[test]
fn a_leader_may_die_at_every_write() {
    let scenario = scenarios::ALL.iter().find(|one| one.name == ELECTED);
    let wrong = killed_everywhere(*scenario.expect("the scenario is there"), true);
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

/// What goes otherwise when control is killed, for each of its writes.
fn killed_everywhere(scenario: Scenario, elects: bool) -> Vec<String> {
    let only = number("ORLOP_WRITE");
    let fate = Fate {
        elects,
        ..Fate::default()
    };
    let expected = run(scenario, SEED, fate.clone()).expect("it ends without a crash");
    let mut wrong = Vec::new();
    let mut note = |found: Vec<String>, what: String| {
        if !found.is_empty() {
            wrong.push(format!("{} {what}:\n{}", scenario.name, found.join("\n")));
        }
    };
    // It is like itself, but for what is wrong with it.
    let expected = Ok(expected);
    let own = expected.as_ref().map(|run| what_differs(run, &expected));
    note(own.unwrap_or_default(), "without a crash".to_owned());
    let Ok(expected) = expected else { return wrong };
    for write in only.unwrap_or(1).. {
        let mut died = false;
        for dies in [Dies::Before, Dies::After] {
            let crash = Some(CrashPoint { write, dies });
            let found = run(scenario, SEED, Fate { crash, ..fate.clone() });
            died |= found.as_ref().is_ok_and(|found| found.writes.is_none());
            note(
                what_differs(&expected, &found),
                format!("killed {dies:?} write {write}"),
            );
        }
        if !died || only.is_some() {
            assert!(only.is_some() || write > WRITES, "{}: {write} writes", scenario.name);
            break;
        }
    }
    wrong
}
