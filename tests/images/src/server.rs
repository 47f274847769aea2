//! The servers inside test images.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    thread,
};

use crate::Error;

/// HTTP/1.1 with keep-alive, and UDP, on one port: both answer with the host's name.
pub fn web(port: u16) -> Result<(), Error> {
    let name: Arc<str> = fs::read_to_string("/proc/sys/kernel/hostname")?.trim().into();
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
    let udp_name = name.clone();
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(udp_name.as_bytes(), peer);
        }
    });
    println!("{name} serves on {port}");
    for stream in listener.incoming().flatten() {
        let name = name.clone();
        thread::spawn(move || {
            let _ = serve(stream, &name);
        });
    }
    Ok(())
}

fn serve(stream: TcpStream, name: &str) -> Result<(), Error> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut close = false;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            close |= header
                .to_ascii_lowercase()
                .replace(' ', "")
                .starts_with("connection:close");
        }
        let path = request.split(' ').nth(1).unwrap_or("/");
        let body = match path.strip_prefix("/bytes/").and_then(|count| count.parse().ok()) {
            Some(count) => vec![b'x'; count],
            None => format!("{name}\n").into_bytes(),
        };
        write!(
            writer,
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )?;
        writer.write_all(&body)?;
        if close {
            return Ok(());
        }
    }
}

/// One byte back for every single byte; larger reads are only counted off, so that bulk sends go one way.
pub fn echo(port: u16) -> Result<(), Error> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    println!("echo on {port}");
    for mut stream in listener.incoming().flatten() {
        thread::Builder::new().stack_size(512 << 10).spawn(move || {
            let _ = stream.set_nodelay(true);
            let mut buffer = vec![0; 256 << 10];
            while let Ok(count) = stream.read(&mut buffer) {
                if count == 0 || (count == 1 && stream.write_all(&buffer[..1]).is_err()) {
                    break;
                }
            }
        })?;
    }
    Ok(())
}
