//! The one program inside Orlop's test images, and the client that tests run inside pods' networks.
//!
//! Servers answer with the host's name, which in a pod is the pod's name, so a test sees who answered. Static, without
//! an async runtime: one thread a connection is plenty here.

mod bench;
mod client;
mod server;

use std::{env, process::ExitCode, thread, time::Duration};

const USAGE: &str = "usage: fixture COMMAND
servers:  web PORT                     HTTP and UDP: the host's name; GET /bytes/N: N bytes
          echo PORT                    one byte back for each byte, for benchmarks
clients:  get IP PORT COUNT [mapped]   COUNT connections, one request each; prints the answers
          udp IP PORT COUNT [connected|mapped]  COUNT datagrams from one socket each; prints 'answer from PEER'
          udp-one IP PORT COUNT        COUNT datagrams from one unconnected socket
          peername IP PORT [mapped]    connects and prints getpeername
          download IP PORT BYTES       reads BYTES from /bytes/N
          hold IP PORT SECONDS|stdin   one connection, a request every 20 ms; prints 'requests N'; fails on the first loss
          load IP PORT RATE SECONDS|stdin  open loop: RATE new connections a second; prints 'sent N lost N'; stdin: until that ends
          crr|rr|bulk IP PORT SECONDS  a benchmark slice; prints 'count N seconds S p50_us P'
          slices KIND IP PORT SECONDS  such a slice for every line on stdin, rr and bulk on one connection
          connect IP PORT COUNT        connects and closes; prints 'count N seconds S p50_us P'
others:   sleep                        until SIGTERM
          burn SECONDS                 one CPU busy, then sleep
          eat MEGABYTES                takes that much memory, then sleep
          exit CODE [SECONDS]          ends with CODE after SECONDS
          tick MILLISECONDS            a numbered line to stdout every so often
          env                          prints the environment, then sleep";

fn main() -> ExitCode {
    end_on_sigterm();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(1)
        }
    }
}

/// What can go wrong is told in words; nothing here is caught by kind.
pub type Error = Box<dyn std::error::Error>;

fn run(words: &[&str]) -> Result<ExitCode, Error> {
    match *words {
        ["web", port] => server::web(port.parse()?)?,
        ["echo", port] => server::echo(port.parse()?)?,
        ["get", ip, port, count] => client::get(ip.parse()?, port.parse()?, count.parse()?, false)?,
        ["get", ip, port, count, "mapped"] => client::get(ip.parse()?, port.parse()?, count.parse()?, true)?,
        ["udp", ip, port, count] => client::udp(ip.parse()?, port.parse()?, count.parse()?, client::Udp::Unconnected)?,
        ["udp", ip, port, count, "connected"] => {
            client::udp(ip.parse()?, port.parse()?, count.parse()?, client::Udp::Connected)?;
        }
        ["udp", ip, port, count, "mapped"] => {
            client::udp(ip.parse()?, port.parse()?, count.parse()?, client::Udp::Mapped)?;
        }
        ["udp-one", ip, port, count] => client::udp_one(ip.parse()?, port.parse()?, count.parse()?)?,
        ["peername", ip, port] => client::peername(ip.parse()?, port.parse()?, false)?,
        ["peername", ip, port, "mapped"] => client::peername(ip.parse()?, port.parse()?, true)?,
        ["download", ip, port, bytes] => client::download(ip.parse()?, port.parse()?, bytes.parse()?)?,
        ["hold", ip, port, time] => client::hold(ip.parse()?, port.parse()?, time)?,
        ["load", ip, port, rate, time] => client::load(ip.parse()?, port.parse()?, rate.parse()?, time)?,
        [kind @ ("crr" | "rr" | "bulk"), ip, port, seconds] => {
            bench::slice(kind, ip.parse()?, port.parse()?, seconds.parse()?)?;
        }
        ["slices", kind @ ("crr" | "rr" | "bulk"), ip, port, seconds] => {
            bench::slices(kind, ip.parse()?, port.parse()?, seconds.parse()?)?;
        }
        ["connect", ip, port, count] => bench::connect(ip.parse()?, port.parse()?, count.parse()?)?,
        ["sleep"] => sleep(),
        ["burn", seconds] => burn(seconds.parse()?),
        ["eat", megabytes] => eat(megabytes.parse()?),
        ["exit", code] => return Ok(ExitCode::from(code.parse::<u8>()?)),
        ["exit", code, seconds] => {
            thread::sleep(Duration::from_secs_f64(seconds.parse()?));
            return Ok(ExitCode::from(code.parse::<u8>()?));
        }
        ["tick", milliseconds] => {
            for number in 0u64.. {
                println!("tick {number}");
                thread::sleep(Duration::from_millis(milliseconds.parse()?));
            }
        }
        ["env"] => {
            for (name, value) in env::vars() {
                println!("{name}={value}");
            }
            sleep();
        }
        _ => {
            eprintln!("{USAGE}");
            return Ok(ExitCode::from(2));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The first process of a namespace ignores signals that it has no handler for.
fn end_on_sigterm() {
    extern "C" fn end(_signal: libc::c_int) {
        // SAFETY: _exit is async-signal-safe.
        unsafe { libc::_exit(0) }
    }
    let handler: extern "C" fn(libc::c_int) = end;
    // SAFETY: the handler only calls _exit.
    unsafe {
        libc::signal(libc::SIGTERM, handler as libc::sighandler_t);
        libc::signal(libc::SIGINT, handler as libc::sighandler_t);
    }
}

fn sleep() -> ! {
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// Each page is written to: memory that is only asked for is not taken.
fn eat(megabytes: usize) -> ! {
    let mut taken = Vec::new();
    for _ in 0..megabytes {
        taken.push(std::hint::black_box(vec![1u8; 1 << 20]));
    }
    println!("took {} MB", taken.len());
    sleep()
}

fn burn(seconds: f64) -> ! {
    let end = std::time::Instant::now() + Duration::from_secs_f64(seconds);
    let mut sink = 0u64;
    while std::time::Instant::now() < end {
        for value in 0..10_000u64 {
            sink = std::hint::black_box(sink.wrapping_mul(31).wrapping_add(value));
        }
    }
    println!("burnt {seconds} s ({})", sink & 1);
    sleep()
}
