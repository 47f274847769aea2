//! What a benchmark tells: lines for people as it goes, then `docs/benchmarks/NAME.svg` and `.json`, and the same JSON as the last
//! line.

use std::{fs, process::Command};

use anyhow::{Context, Result};
use orlop_tests::lab::repository;
use serde::Serialize;

use super::{plot, statistics::Ratio};

/// Who is measured when nobody else is named.
pub const OURS: &str = "Orlop";

/// What a figure has to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    /// Ratios and rates.
    AtLeast(f64),
    /// Times and sizes.
    Below(f64),
    /// What should be one, and by how much it may not be.
    OneWithin(f64),
}

impl Bar {
    /// The number.
    pub fn value(self) -> f64 {
        match self {
            Self::AtLeast(value) | Self::Below(value) => value,
            Self::OneWithin(_) => 1.0,
        }
    }
}

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured: figures of one chart are drawn together, and have one unit.
    pub chart: String,
    /// At which size, or how.
    pub name: String,
    /// Whose figure it is: [`OURS`] or a competitor's name.
    pub of: String,
    /// The figure.
    pub value: f64,
    /// "ratio", "ns", "ms", "MB", "/s", ...
    pub unit: &'static str,
    /// The 95 % interval, for ratios.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// What it has to reach; most competitors' figures have to reach nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bar: Option<Bar>,
    /// Whether it does: a ratio by the lower end of its interval. `None` with a bar is "undecided".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holds: Option<bool>,
}

impl Figure {
    /// A number of ours without a bar.
    pub fn new(chart: impl Into<String>, name: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self {
            chart: chart.into(),
            name: name.into(),
            of: OURS.to_owned(),
            value,
            unit,
            interval: None,
            bar: None,
            holds: None,
        }
    }

    /// A ratio of ours with its interval.
    pub fn ratio(chart: impl Into<String>, name: impl Into<String>, ratio: Ratio) -> Self {
        Self {
            interval: Some([ratio.low, ratio.high]),
            ..Self::new(chart, name, ratio.median, "ratio")
        }
    }

    /// It is a competitor's.
    #[must_use]
    pub fn of(mut self, whose: &str) -> Self {
        whose.clone_into(&mut self.of);
        self
    }

    /// It has to be at least this.
    #[must_use]
    pub fn at_least(mut self, bar: f64) -> Self {
        let [low, high] = self.interval.unwrap_or([self.value, self.value]);
        self.bar = Some(Bar::AtLeast(bar));
        self.holds = verdict(low >= bar, high < bar);
        self
    }

    /// It has to be below this.
    #[must_use]
    pub fn below(mut self, bar: f64) -> Self {
        let [low, high] = self.interval.unwrap_or([self.value, self.value]);
        self.bar = Some(Bar::Below(bar));
        self.holds = verdict(high < bar, low >= bar);
        self
    }

    /// It has to be one: the method's own test, two ways that are the same.
    #[must_use]
    pub fn one_within(mut self, tolerance: f64) -> Self {
        let [low, high] = self.interval.unwrap_or([self.value, self.value]);
        let (least, most) = (1.0 - tolerance, 1.0 + tolerance);
        self.bar = Some(Bar::OneWithin(tolerance));
        self.holds = verdict(least <= low && high <= most, high < least || most < low);
        self
    }

    fn say(&self) -> String {
        let interval = self
            .interval
            .map_or(String::new(), |[low, high]| format!(" [{low:.4}, {high:.4}]"));
        let bar = self.bar.map_or(String::new(), |bar| {
            let verdict = self
                .holds
                .map_or("undecided", |holds| if holds { "holds" } else { "missed" });
            match bar {
                Bar::AtLeast(bar) => format!(", at least {bar}: {verdict}"),
                Bar::Below(bar) => format!(", below {bar}: {verdict}"),
                Bar::OneWithin(tolerance) => format!(", one within {tolerance}: {verdict}"),
            }
        });
        let value = number(self.value);
        format!(
            "{}, {} ({}): {value} {}{interval}{bar}",
            self.chart, self.name, self.of, self.unit
        )
    }
}

fn verdict(holds: bool, missed: bool) -> Option<bool> {
    if holds {
        Some(true)
    } else if missed {
        Some(false)
    } else {
        None
    }
}

/// A number with as many digits as tell something.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 2.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// All figures and the machine that they are from.
#[derive(Debug, Serialize)]
pub struct Report {
    bench: &'static str,
    machine: String,
    build: &'static str,
    /// Of the tree that was measured; with a `+` when something was changed and not committed.
    commit: String,
    date: String,
    /// What else the machine did: processes that ran or waited for the disk, over the minute before the first figure.
    load: f64,
    /// In the order in which they were measured.
    pub figures: Vec<Figure>,
    /// Parts that could not be measured, and why.
    failures: Vec<String>,
}

impl Report {
    /// An empty report about this machine.
    pub fn new(bench: &'static str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name\t: "))
            .unwrap_or("unknown CPU");
        let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
        let kernel = read("/proc/sys/kernel/osrelease");
        Self {
            bench,
            machine: format!(
                "{cpus} x {model}, {:.0} GB, Linux {}",
                gigabytes(&read("/proc/meminfo")),
                kernel.trim()
            ),
            build: if cfg!(debug_assertions) {
                "development"
            } else {
                "release"
            },
            commit: commit(),
            date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(f64::NAN),
            figures: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// One more figure.
    pub fn add(&mut self, figure: Figure) {
        println!("   {}", figure.say());
        self.figures.push(figure);
    }

    /// A part that failed: the others still count. `true` when it did not.
    pub fn part(&mut self, what: &str, outcome: Result<()>) -> bool {
        let Err(error) = outcome else { return true };
        println!("   {what} failed: {error:#}");
        self.failures.push(format!("{what}: {error:#}"));
        false
    }

    /// Writes plot and JSON, and prints the last line.
    pub fn finish(&self) -> Result<()> {
        self.save()?;
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }

    /// Writes plot and JSON of what there is so far.
    pub fn save(&self) -> Result<()> {
        let folder = repository().join("docs").join("benchmarks");
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let caption = format!(
            "{}; {} build of {}, {}",
            self.machine, self.build, self.commit, self.date
        );
        let picture = plot::svg(self.bench, &caption, &self.figures);
        for (ending, text) in [("svg", picture), ("json", serde_json::to_string_pretty(self)? + "\n")] {
            let path = folder.join(format!("{}.{ending}", self.bench));
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

/// Of the whole machine, by `/proc/meminfo`.
fn gigabytes(meminfo: &str) -> f64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kibibytes = total.and_then(|total| total.trim().strip_suffix(" kB")?.parse().ok());
    kibibytes.unwrap_or(f64::NAN) * 1024.0 / 1e9
}

fn commit() -> String {
    let git = |words: &[&str]| {
        let output = Command::new("git")
            .current_dir(repository())
            .args(words)
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    // What benchmarks write themselves does not count.
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"]);
    match git(&["rev-parse", "--short=10", "HEAD"]) {
        Some(commit) if changed.as_deref() == Some("") => commit,
        Some(commit) => commit + "+",
        None => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_judged_by_its_interval() {
        let ratio = |low, high| Ratio {
            median: f64::midpoint(low, high),
            low,
            high,
        };
        let holds = |low, high| {
            Figure::ratio("crr", "10 services", ratio(low, high))
                .at_least(0.97)
                .holds
        };
        assert_eq!(holds(0.975, 0.99), Some(true));
        assert_eq!(holds(0.95, 0.96), Some(false));
        assert_eq!(holds(0.96, 0.98), None);
        let same = |low, high| {
            Figure::ratio("direct / direct", "rr", ratio(low, high))
                .one_within(0.01)
                .holds
        };
        assert_eq!(same(0.995, 1.004), Some(true));
        assert_eq!(same(0.98, 1.004), None);
        assert_eq!(same(1.02, 1.03), Some(false));
        assert_eq!(Figure::new("rss", "10", 29.0, "MB").below(30.0).holds, Some(true));
    }
}
