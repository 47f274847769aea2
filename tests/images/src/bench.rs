//! Benchmark slices: short, so that two ways to one server can be measured in turn.

use std::{
    io::{BufRead, Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use crate::Error;

/// At most so many samples are kept for the median.
const SAMPLES: usize = 1 << 20;

/// One slice of `kind`: crr (connect, one byte there and back, close), rr (one byte there and back on one connection), or bulk
/// (one way; `count` is bytes).
pub fn slice(kind: &str, ip: Ipv4Addr, port: u16, seconds: f64) -> Result<(), Error> {
    let length = Duration::from_secs_f64(seconds);
    let mut samples = Vec::new();
    let mut count = 0u64;
    let begin = Instant::now();
    if kind == "bulk" {
        let mut stream = dial(ip, port)?;
        let block = vec![0; 128 << 10];
        while begin.elapsed() < length {
            count += stream.write(&block)? as u64;
        }
    } else {
        let mut kept = None;
        while begin.elapsed() < length {
            let start = Instant::now();
            let mut stream = match kept.take() {
                Some(stream) => stream,
                None => dial(ip, port)?,
            };
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            if kind == "rr" {
                kept = Some(stream);
            } else {
                drop(stream);
            }
            push(&mut samples, start);
            count += 1;
        }
    }
    print(count, begin, samples);
    Ok(())
}

/// A slice for every line on stdin, of the same length and kind as [`slice`]; `rr` and `bulk` keep their one connection, so that a
/// slice measures nothing but the traffic.
pub fn slices(kind: &str, ip: Ipv4Addr, port: u16, seconds: f64) -> Result<(), Error> {
    let length = Duration::from_secs_f64(seconds);
    let mut kept = if kind == "crr" { None } else { Some(dial(ip, port)?) };
    let block = vec![0; 128 << 10];
    for line in std::io::stdin().lock().lines() {
        line?;
        let (mut count, mut samples) = (0u64, Vec::new());
        let begin = Instant::now();
        while begin.elapsed() < length {
            let start = Instant::now();
            match &mut kept {
                Some(stream) if kind == "bulk" => count += stream.write(&block)? as u64,
                Some(stream) => count += exchange(stream)?,
                None => count += exchange(&mut dial(ip, port)?)?,
            }
            push(&mut samples, start);
        }
        print(count, begin, samples);
    }
    Ok(())
}

/// One byte there and back.
fn exchange(stream: &mut TcpStream) -> Result<u64, Error> {
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(1)
}

/// Connects and closes at once.
pub fn connect(ip: Ipv4Addr, port: u16, count: u32) -> Result<(), Error> {
    let mut samples = Vec::new();
    let begin = Instant::now();
    for _ in 0..count {
        let start = Instant::now();
        drop(dial(ip, port)?);
        push(&mut samples, start);
    }
    print(u64::from(count), begin, samples);
    Ok(())
}

/// Closing resets the connection, so that no port stays in TIME_WAIT.
fn dial(ip: Ipv4Addr, port: u16) -> Result<TcpStream, Error> {
    let stream = TcpStream::connect((ip, port))?;
    stream.set_nodelay(true)?;
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: the descriptor is open, the pointer and the length are those of a linger structure.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            libc::socklen_t::try_from(size_of::<libc::linger>())?,
        )
    };
    if set == 0 {
        Ok(stream)
    } else {
        Err(std::io::Error::last_os_error().into())
    }
}

fn push(samples: &mut Vec<f64>, start: Instant) {
    if samples.len() < SAMPLES {
        samples.push(start.elapsed().as_secs_f64() * 1e6);
    }
}

fn print(count: u64, begin: Instant, mut samples: Vec<f64>) {
    let seconds = begin.elapsed().as_secs_f64();
    samples.sort_by(f64::total_cmp);
    let median = samples.get(samples.len() / 2).copied().unwrap_or(0.0);
    println!("count {count} seconds {seconds:.6} p50_us {median:.2}");
}
