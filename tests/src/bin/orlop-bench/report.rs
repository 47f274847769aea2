//! What a benchmark prints: lines for people as it goes, one JSON object at the end.

use std::fs;

use serde::Serialize;

use super::statistics::Ratio;

/// One figure.
#[derive(Debug, Serialize)]
pub struct Figure {
    /// What was measured, and at which size.
    pub name: String,
    /// The figure.
    pub value: f64,
    /// "ratio", "ns", ...
    pub unit: &'static str,
    /// The 95 % interval, for ratios.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<[f64; 2]>,
    /// What it has to reach: "at least" for ratios, "below" for times.
    pub bar: f64,
    /// Whether it does: a ratio by the lower end of its interval. `None` is "undecided".
    pub holds: Option<bool>,
}

/// All figures and the machine that they are from.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: String,
    /// In the order in which they were measured.
    pub figures: Vec<Figure>,
}

impl Report {
    /// An empty report about this machine.
    pub fn new() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name\t: "))
            .unwrap_or("unknown CPU");
        let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
        let kernel = read("/proc/sys/kernel/osrelease");
        Self {
            machine: format!("{cpus} x {model}, Linux {}", kernel.trim()),
            figures: Vec::new(),
        }
    }

    /// A ratio that has to be at least `bar`.
    pub fn ratio(&mut self, name: String, ratio: Ratio, bar: f64) {
        let holds = if ratio.low >= bar {
            Some(true)
        } else if ratio.high < bar {
            Some(false)
        } else {
            None
        };
        let verdict = holds.map_or("undecided", |holds| if holds { "holds" } else { "missed" });
        println!(
            "   {name}: {:.4} [{:.4}, {:.4}], at least {bar}: {verdict}",
            ratio.median, ratio.low, ratio.high
        );
        let interval = Some([ratio.low, ratio.high]);
        self.figures.push(Figure {
            name,
            value: ratio.median,
            unit: "ratio",
            interval,
            bar,
            holds,
        });
    }

    /// A figure that has to stay below `bar`.
    pub fn below(&mut self, name: String, value: f64, unit: &'static str, bar: f64) {
        println!(
            "   {name}: {value:.1} {unit}, below {bar}: {}",
            if value < bar { "holds" } else { "missed" }
        );
        self.figures.push(Figure {
            name,
            value,
            unit,
            interval: None,
            bar,
            holds: Some(value < bar),
        });
    }

    /// The last line.
    pub fn print(&self) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}
