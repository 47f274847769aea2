//! Runs of scenarios, and what differs between their ends.

use std::{
    any::Any,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Mutex,
    thread,
    time::Instant,
};

use tokio::task::LocalSet;

use crate::{
    cluster::{Cluster, Fate},
    environment::simulate,
    scenarios::{self, Scenario},
    state::past_faults,
};

/// What a run came to.
#[derive(Debug)]
pub struct Run {
    normal: Vec<String>,
    faults: Vec<String>,
    /// How many writes there were; `None` when control was killed at one.
    pub writes: Option<u64>,
}

/// Runs a scenario to its end.
///
/// # Errors
/// The panic of a run that never comes to its end.
pub fn run(scenario: Scenario, seed: u64, fate: Fate) -> Result<Run, String> {
    let simulation = move || async move {
        let tell = async {
            let cluster = Cluster::start(&fate);
            (scenario.run)(&cluster).await;
            let state = cluster.settled().await;
            let mut faults = state.faults();
            faults.extend(past_faults(&cluster.data));
            Run {
                normal: state.normal(),
                faults,
                writes: cluster.writes(),
            }
        };
        LocalSet::new().run_until(tell).await
    };
    catch_unwind(AssertUnwindSafe(|| simulate(seed, simulation))).map_err(|panic| said(&*panic))
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "a panic without words".to_owned())
}

/// What is wrong with a run that was to end like another.
pub fn what_differs(expected: &Run, found: &Result<Run, String>) -> Vec<String> {
    let found = match found {
        Ok(found) => found,
        Err(panic) => return vec![panic.clone()],
    };
    // Two things can look the same: how many of each there are counts, too.
    let mut surplus: BTreeMap<&str, i64> = BTreeMap::new();
    for line in &found.normal {
        *surplus.entry(line).or_default() += 1;
    }
    for line in &expected.normal {
        *surplus.entry(line).or_default() -= 1;
    }
    let mut wrong = found.faults.clone();
    wrong.extend(surplus.into_iter().filter_map(|(line, count)| match count {
        0 => None,
        1.. => Some(format!("+{count} {line}")),
        _ => Some(format!("{count} {line}")),
    }));
    wrong
}

/// Checks every scenario, or those whose name contains `ORLOP_SCENARIO`, on all processors.
///
/// # Panics
/// With everything that the checks find wrong.
pub fn each_scenario(check: impl Fn(Scenario) -> Vec<String> + Sync) {
    let only = std::env::var("ORLOP_SCENARIO").unwrap_or_default();
    let queue = Mutex::new(scenarios::ALL.iter().filter(|one| one.name.contains(&only)));
    let wrong = Mutex::new(Vec::new());
    let next = || queue.lock().ok()?.next();
    let work = || {
        while let Some(scenario) = next() {
            let began = Instant::now();
            let found = check(*scenario);
            println!("{}: {:?}", scenario.name, began.elapsed());
            if let Ok(mut wrong) = wrong.lock() {
                wrong.extend(found);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(work);
        }
    });
    let wrong = wrong.into_inner().unwrap_or_default();
    assert!(
        wrong.is_empty(),
        "{} runs are wrong:\n\n{}",
        wrong.len(),
        wrong.join("\n\n")
    );
}

/// A number that the caller of a test gives.
///
/// # Panics
/// When it is none.
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(normal: &[&str]) -> Run {
        Run {
            normal: normal.iter().map(|line| (*line).to_owned()).collect(),
            faults: Vec::new(),
            writes: None,
        }
    }

    #[test]
    fn how_many_there_are_of_each_counts() {
        let expected = run(&["a", "a", "b"]);
        assert!(what_differs(&expected, &Ok(run(&["a", "a", "b"]))).is_empty());
        assert_eq!(what_differs(&expected, &Ok(run(&["a", "b", "b"]))), ["-1 a", "+1 b"]);
        assert_eq!(what_differs(&expected, &Ok(run(&["a", "c"]))), ["-1 a", "-1 b", "+1 c"]);
    }
}
