//! The clients that tests run inside pods' networks.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::Error;

const TIMEOUT: Duration = Duration::from_secs(3);

/// How a UDP client uses its socket.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Udp {
    /// sendto and recvfrom.
    Unconnected,
    /// connect, send and recv.
    Connected,
    /// An AF_INET6 socket that sends to ::ffff:a.b.c.d.
    Mapped,
}

fn target(ip: Ipv4Addr, port: u16, mapped: bool) -> SocketAddr {
    let ip = if mapped {
        IpAddr::V6(ip.to_ipv6_mapped())
    } else {
        IpAddr::V4(ip)
    };
    SocketAddr::new(ip, port)
}

fn connect(ip: Ipv4Addr, port: u16, mapped: bool) -> Result<TcpStream, Error> {
    let stream = TcpStream::connect_timeout(&target(ip, port, mapped), TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// One request on a connection: the body.
fn request(stream: &TcpStream, path: &str) -> Result<Vec<u8>, Error> {
    let mut writer = stream;
    write!(writer, "GET {path} HTTP/1.1\r\nHost: fixture\r\n\r\n")?;
    let mut reader = BufReader::new(stream);
    let mut length = None;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err("the connection ended inside an answer".into());
        }
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = Some(value.trim().parse()?);
        }
    }
    let mut body = vec![0; length.ok_or("an answer without Content-Length")?];
    reader.read_exact(&mut body)?;
    Ok(body)
}

/// `count` connections, one request each.
pub fn get(ip: Ipv4Addr, port: u16, count: u32, mapped: bool) -> Result<(), Error> {
    for _ in 0..count {
        let stream = connect(ip, port, mapped)?;
        print!("{}", String::from_utf8_lossy(&request(&stream, "/")?));
    }
    Ok(())
}

/// `count` datagrams, each from a new socket.
pub fn udp(ip: Ipv4Addr, port: u16, count: u32, kind: Udp) -> Result<(), Error> {
    for _ in 0..count {
        let mapped = kind == Udp::Mapped;
        let local = if mapped {
            IpAddr::V6(Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED)
        };
        let socket = UdpSocket::bind((local, 0))?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        let mut buffer = [0; 2048];
        let to = target(ip, port, mapped);
        let (length, peer) = if kind == Udp::Connected {
            socket.connect(to)?;
            socket.send(b"who")?;
            (socket.recv(&mut buffer)?, socket.peer_addr()?)
        } else {
            socket.send_to(b"who", to)?;
            socket.recv_from(&mut buffer)?
        };
        println!("{} from {peer}", String::from_utf8_lossy(&buffer[..length]));
    }
    Ok(())
}

/// `count` datagrams from one unconnected socket.
pub fn udp_one(ip: Ipv4Addr, port: u16, count: u32) -> Result<(), Error> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(TIMEOUT))?;
    let mut buffer = [0; 2048];
    for _ in 0..count {
        socket.send_to(b"who", (ip, port))?;
        let (length, peer) = socket.recv_from(&mut buffer)?;
        println!("{} from {peer}", String::from_utf8_lossy(&buffer[..length]));
    }
    Ok(())
}

/// Connects and prints what getpeername says.
pub fn peername(ip: Ipv4Addr, port: u16, mapped: bool) -> Result<(), Error> {
    let stream = connect(ip, port, mapped)?;
    request(&stream, "/")?;
    println!("{}", stream.peer_addr()?);
    Ok(())
}

/// Reads a known number of bytes.
pub fn download(ip: Ipv4Addr, port: u16, bytes: u64) -> Result<(), Error> {
    let stream = connect(ip, port, false)?;
    println!("bytes {}", request(&stream, &format!("/bytes/{bytes}"))?.len());
    Ok(())
}

/// Whether the time is over: SECONDS after now, or, with "stdin", when that ends.
pub fn until(time: &str) -> Result<impl Fn() -> bool + use<>, Error> {
    let ended = Arc::new(AtomicU64::new(0));
    let end = if time == "stdin" {
        let ended = ended.clone();
        thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            ended.store(1, Ordering::Relaxed);
        });
        None
    } else {
        Some(Instant::now() + Duration::from_secs_f64(time.parse()?))
    };
    Ok(move || ended.load(Ordering::Relaxed) == 1 || end.is_some_and(|end| Instant::now() >= end))
}

/// One connection, a request every 20 ms; the first loss ends it with an error.
pub fn hold(ip: Ipv4Addr, port: u16, time: &str) -> Result<(), Error> {
    let stream = connect(ip, port, false)?;
    let over = until(time)?;
    let mut requests = 0u64;
    while !over() {
        request(&stream, "/").map_err(|error| format!("lost after {requests} requests: {error}"))?;
        requests += 1;
        thread::sleep(Duration::from_millis(20));
    }
    println!("requests {requests}");
    Ok(())
}

/// New connections at a fixed rate, whatever becomes of the earlier ones.
pub fn load(ip: Ipv4Addr, port: u16, rate: f64, time: &str) -> Result<(), Error> {
    // With a time, the number of requests is known beforehand, however late the machine is.
    let planned = time.parse::<f64>().ok().map(|seconds| rate * seconds);
    let over = until(time)?;
    let lost = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    let mut threads = Vec::new();
    let mut sent = 0u32;
    while planned.map_or_else(|| !over(), |planned| f64::from(sent) < planned) {
        let due = begin + Duration::from_secs_f64(f64::from(sent) / rate);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let lost = lost.clone();
        threads.push(thread::spawn(move || {
            let outcome = connect(ip, port, false).and_then(|stream| request(&stream, "/"));
            if let Err(error) = outcome {
                eprintln!("lost at {:.3} s: {error}", begin.elapsed().as_secs_f64());
                lost.fetch_add(1, Ordering::Relaxed);
            }
        }));
        sent += 1;
        threads.retain(|thread| !thread.is_finished());
    }
    for thread in threads {
        let _ = thread.join();
    }
    println!("sent {sent} lost {}", lost.load(Ordering::Relaxed));
    Ok(())
}
