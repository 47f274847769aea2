//! Control and many agents, all of them the real ones, in bad weather. `ORLOP_SEED=N` repeats a storm, `ORLOP_SEEDS=COUNT` makes more of
//! them, `RUST_LOG` lets the parts talk.

use std::time::Duration;

use orlop_simulation::{
    environment::simulate,
    runs::number,
    storm::{Outcome, Shape, storm},
};
use tokio::task::LocalSet;

/// Storms in CI.
const STORMS: u64 = 3;

fn weather(seed: u64, shape: Shape) -> Outcome {
    simulate(seed, move || async move {
        LocalSet::new().run_until(storm(seed, &shape)).await
    })
}

#[test]
fn what_must_hold_holds_in_every_storm() {
    let seeds = match number("ORLOP_SEED") {
        Some(seed) => seed..seed + 1,
        None => 1..1 + number("ORLOP_SEEDS").unwrap_or(STORMS),
    };
    for seed in seeds {
        holds(
            seed,
            Shape {
                nodes: 4,
                lasts: Duration::from_secs(240),
            },
        );
    }
}

#[test]
fn it_holds_in_a_storm_over_many_nodes() {
    let shape = Shape {
        nodes: 30,
        lasts: Duration::from_secs(120),
    };
    holds(number("ORLOP_SEED").unwrap_or(1), shape);
}

fn holds(seed: u64, shape: Shape) {
    let _once = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .try_init();
    let (nodes, began) = (shape.nodes, std::time::Instant::now());
    let outcome = weather(seed, shape);
    println!(
        "seed {seed}, {nodes} nodes: {} writes, trace {:016x}, {:?}",
        outcome.writes,
        outcome.trace,
        began.elapsed()
    );
    assert!(
        outcome.faults.is_empty(),
        "seed {seed}, {nodes} nodes:\n{}\nafter\n{}",
        outcome.faults.join("\n"),
        outcome.log.join("\n")
    );
}
