//! Two ways to one server, measured in turn: a client for each that makes a slice when it is told to.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::statistics::{Ratio, bootstrap};

/// How long a client's slice is.
pub const SLICE_SECONDS: &str = "0.1";
/// The first of a client are not counted: caches are cold, and windows small.
const WARM: usize = 3;
/// Pairs before the interval is looked at for the first time, and at most.
const PAIRS: (usize, usize) = (40, 400);
/// An interval narrower than this is good enough.
const WIDTH: f64 = 0.004;

/// A client (`orlop-fixture slices`) that waits for a line.
pub struct Slices {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Slices {
    /// Starts it.
    pub fn start(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("a client without pipes")
        };
        Ok(Self {
            child,
            input,
            output: BufReader::new(output),
        })
    }

    /// One slice: operations (or bytes) a second.
    pub fn rate(&mut self) -> Result<f64> {
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

/// A ratio and the rate that it is against.
pub struct Compared {
    /// Through / direct.
    pub ratio: Ratio,
    /// Direct, a second, the median.
    pub direct: f64,
    /// How many pairs there were.
    pub pairs: usize,
}

/// Pairs of slices, each pair in the other order than the one before, until the interval is narrow, it is decided against the
/// bar, or the time is over.
pub fn compare(through: Command, direct: Command, bar: Option<f64>, limit: Duration) -> Result<Compared> {
    let (mut through, mut direct) = (Slices::start(through)?, Slices::start(direct)?);
    for _ in 0..WARM {
        through.rate()?;
        direct.rate()?;
    }
    let end = Instant::now() + limit;
    let (mut ratios, mut rates) = (Vec::new(), Vec::new());
    loop {
        let (ours, theirs) = if ratios.len() % 2 == 0 {
            let ours = through.rate()?;
            (ours, direct.rate()?)
        } else {
            let theirs = direct.rate()?;
            (through.rate()?, theirs)
        };
        ensure!(theirs > 0.0, "a slice without operations");
        ratios.push(ours / theirs);
        rates.push(theirs);
        if ratios.len() < PAIRS.0 {
            continue;
        }
        let late = ratios.len() >= PAIRS.1 || Instant::now() > end;
        // The interval costs time of its own: not after every pair.
        if !late && !ratios.len().is_multiple_of(10) {
            continue;
        }
        let ratio = bootstrap(&ratios);
        let decided = bar.is_some_and(|bar| ratio.low >= bar && ratio.high - ratio.low < 0.01);
        if late || decided || ratio.high - ratio.low < WIDTH {
            return Ok(Compared {
                ratio,
                direct: super::statistics::median(&rates),
                pairs: ratios.len(),
            });
        }
    }
}
