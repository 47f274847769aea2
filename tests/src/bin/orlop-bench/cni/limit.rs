//! What the kernel alone takes to answer the removal of a container's veth: no plugin that waits for that answer is faster.

use std::{process::Command, time::Instant};

use anyhow::{Context, Result, ensure};
use rtnetlink::{LinkMessageBuilder, LinkUnspec};

/// The host's end of the veth that is removed.
const VETH: &str = "limit0";

/// Milliseconds of `RTM_DELLINK`, from the request to the answer, for a veth as a plugin leaves it: a port of the bridge, the other end
/// up with an address in the namespace of that name.
pub fn removals(bridge: &str, namespace: &str, rounds: usize) -> Result<Vec<f64>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
        let connection = tokio::spawn(connection);
        let mut milliseconds = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            let add = [
                "link", "add", VETH, "master", bridge, "up", "type", "veth", "peer", "name", "eth0",
            ];
            ip(&[&add[..], &["netns", namespace]].concat())?;
            ip(&["-n", namespace, "link", "set", "eth0", "up"])?;
            ip(&["-n", namespace, "address", "add", "10.90.0.2/16", "dev", "eth0"])?;
            let message = LinkMessageBuilder::<LinkUnspec>::new().name(VETH).build();
            let begin = Instant::now();
            handle
                .link()
                .del_with_message(message)
                .execute()
                .await
                .context("removing a veth")?;
            milliseconds.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        connection.abort();
        Ok(milliseconds)
    })
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status().context("running ip")?;
    ensure!(status.success(), "ip {}: {status}", arguments.join(" "));
    Ok(())
}
