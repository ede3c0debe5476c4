//! Thousands of instances in one process.
//!
//! `fleet COUNT` listens on that many ports of 127.0.0.1 and prints them on one line. Each answers every `GET` with 1 KB,
//! tells at `/api/auth/session` what its session cookie is called, and echoes the messages of WebSockets.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const SESSION: &str = r#"{"authenticated":true,"auth":{"sessionCookieName":"t3_session"}}"#;

const SWITCH: &str =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";

/// The longest head or message that there may be.
const LIMIT: usize = 4096;

fn answer(kind: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|part| part == b"\r\n\r\n") {
                break at + 4;
            }
            if bytes.len() > LIMIT || stream.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
        };
        let head: Vec<u8> = bytes.drain(..end).collect();
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        if head.contains("\r\nupgrade: websocket\r\n") {
            stream.write_all(SWITCH.as_bytes()).await?;
            return echo(stream, bytes).await;
        }
        let answer = if head.starts_with("get /api/auth/session ") {
            answer("application/json", SESSION)
        } else {
            answer("text/plain", &"x".repeat(1024))
        };
        stream.write_all(answer.as_bytes()).await?;
    }
}

/// Echoes whole frames, unmasked, as a server has to.
async fn echo(mut stream: TcpStream, mut bytes: Vec<u8>) -> io::Result<()> {
    loop {
        while bytes.len() < 2 || bytes.len() < 6 + usize::from(bytes[1] & 0x7f) {
            if bytes.len() > LIMIT || stream.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
        }
        let length = usize::from(bytes[1] & 0x7f);
        if length > 125 || bytes[1] & 0x80 == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let frame: Vec<u8> = bytes.drain(..6 + length).collect();
        let mut echo = vec![frame[0], frame[1] & 0x7f];
        let mask = frame[2..6].iter().cycle();
        echo.extend(frame[6..].iter().zip(mask).map(|(byte, mask)| byte ^ mask));
        stream.write_all(&echo).await?;
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let Some(count) = std::env::args().nth(1).and_then(|text| text.parse().ok()) else {
        eprintln!("usage: fleet COUNT");
        std::process::exit(2);
    };
    let mut ports = Vec::new();
    for _ in 0..count {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        ports.push(listener.local_addr()?.port().to_string());
        tokio::spawn(async move {
            loop {
                if let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(serve(stream));
                }
            }
        });
    }
    println!("{}", ports.join(" "));
    std::future::pending().await
}
