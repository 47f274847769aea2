//! Two ways to one server, measured in turn: a client for each that makes a slice when it is told to.
//!
//! A process keeps what it happens to get at its start (places of its pages and buffers, its connection's numbers) and is
//! faster or slower by it than another of the same kind, by more than what is looked for. So clients are replaced by new ones
//! every few pairs, and the interval takes a client's pairs together, not as so many independent ones.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    affinity,
    statistics::{Ratio, bootstrap, median},
};

/// How long a client's slice is.
pub const SLICE_SECONDS: &str = "0.05";
/// The first of a client are not counted: caches are cold, and windows small.
const WARM: usize = 2;
/// Pairs that two clients make before they are replaced.
const PAIRS: usize = 10;
/// How many times they are before the interval is looked at for the first time, and at most.
const ROUNDS: (usize, usize) = (8, 60);
/// An interval narrower than this is good enough.
const WIDTH: f64 = 0.006;

/// A client (`orlop-fixture slices`) that waits for a line.
struct Slices {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Slices {
    /// Starts it on a CPU.
    fn start(mut command: Command, cpu: usize) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = affinity::on(cpu, || command.spawn().with_context(|| format!("starting {command:?}")))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("a client without pipes")
        };
        let mut slices = Self {
            child,
            input,
            output: BufReader::new(output),
        };
        for _ in 0..WARM {
            slices.rate()?;
        }
        Ok(slices)
    }

    /// One slice: operations (or bytes) a second.
    fn rate(&mut self) -> Result<f64> {
        self.input.write_all(b"\n").context("the client has ended")?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["count", count, "seconds", seconds, ..] = words[..] else {
            bail!("the client printed {line:?}")
        };
        Ok(count.parse::<f64>()? / seconds.parse::<f64>()?)
    }
}

impl Drop for Slices {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// One of two ways: how its clients are started, and what is done before each of their slices.
pub struct Way<'a> {
    /// The client's command.
    pub client: Box<dyn Fn() -> Result<Command> + 'a>,
    /// What makes the slice one of this way, where the clients are alike.
    pub before: Box<dyn FnMut() -> Result<()> + 'a>,
}

impl<'a> Way<'a> {
    /// One that its client alone makes.
    pub fn of(client: impl Fn() -> Result<Command> + 'a) -> Self {
        Self {
            client: Box::new(client),
            before: Box::new(|| Ok(())),
        }
    }
}

/// A ratio and the rate that it is against.
pub struct Compared {
    /// Through / direct.
    pub ratio: Ratio,
    /// Direct, a second, the median.
    pub direct: f64,
    /// How many pairs there were.
    pub pairs: usize,
}

/// Pairs of slices, each pair in the other order than the one before, until the interval is narrow or the time is over. Whether the
/// ratio holds has no say in when that is.
pub fn compare<'a>(mut through: Way<'a>, mut direct: Way<'a>, cpu: usize, limit: Duration) -> Result<Compared> {
    let end = Instant::now() + limit;
    let (mut rounds, mut rates): (Vec<Vec<f64>>, Vec<f64>) = (Vec::new(), Vec::new());
    loop {
        let (mut ours, mut theirs) = if rounds.len().is_multiple_of(2) {
            let ours = Slices::start((through.client)()?, cpu)?;
            (ours, Slices::start((direct.client)()?, cpu)?)
        } else {
            let theirs = Slices::start((direct.client)()?, cpu)?;
            (Slices::start((through.client)()?, cpu)?, theirs)
        };
        let mut round = Vec::with_capacity(PAIRS);
        for pair in 0..PAIRS {
            let mut rate = |of_ours: bool| {
                let (way, client) = if of_ours {
                    (&mut through, &mut ours)
                } else {
                    (&mut direct, &mut theirs)
                };
                (way.before)()?;
                client.rate()
            };
            let ours_first = pair % 2 == rounds.len() % 2;
            let (first, second) = (rate(ours_first)?, rate(!ours_first)?);
            let (ours, theirs) = if ours_first { (first, second) } else { (second, first) };
            ensure!(theirs > 0.0, "a slice without operations");
            round.push(ours / theirs);
            rates.push(theirs);
        }
        rounds.push(round);
        if rounds.len() < ROUNDS.0 {
            continue;
        }
        let ratio = bootstrap(&rounds);
        if rounds.len() >= ROUNDS.1 || Instant::now() > end || ratio.high - ratio.low < WIDTH {
            return Ok(Compared {
                ratio,
                direct: median(&rates),
                pairs: rates.len(),
            });
        }
    }
}
