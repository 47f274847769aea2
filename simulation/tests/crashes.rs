//! Control is killed at every single write of every scenario, before and after the write took effect, and started anew over what is in
//! the store. Each time it comes to the end that it comes to without a crash. `ORLOP_SCENARIO=NAME ORLOP_WRITE=N` repeats one of them.

use orlop_simulation::{
    cluster::Fate,
    mortal::{CrashPoint, Dies},
    runs::{each_scenario, number, run, what_differs},
};

const SEED: u64 = 1;
/// A scenario in which less is written tells little.
const WRITES: u64 = 20;

#[test]
fn control_may_die_at_every_write() {
    let only = number("ORLOP_WRITE");
    each_scenario(|scenario| {
        let expected = run(scenario, SEED, Fate::default()).expect("it ends without a crash");
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
                let found = run(scenario, SEED, Fate { crash, adversary: None });
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
    });
}
