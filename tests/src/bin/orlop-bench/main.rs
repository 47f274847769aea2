//! `cargo xtask bench NAME`: benchmarks in a lab of their own. The last line is one JSON object.

mod connect;
mod report;
mod statistics;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let name = words.next().unwrap_or_default();
    let options: Vec<String> = words.collect();
    match name.as_str() {
        "connect" => connect::run(&options),
        other => bail!("no benchmark {other:?}: connect"),
    }
}
