//! The instance of the WebSocket works: echoes frames as fast as one thread can, and answers the little that a dispatcher asks.
//!
//! `echo LISTEN MINT` listens at the one address for HTTP and WebSockets. At the other, a Unix socket, it mints as
//! `t3-mint --socket` does. Everything is answered at once.

use std::io;

use base64::prelude::{BASE64_STANDARD, Engine};
use sha1::{Digest, Sha1};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(listen), Some(mint)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: echo LISTEN MINT");
        std::process::exit(2);
    };
    let (listener, mint) = (TcpListener::bind(listen).await?, UnixListener::bind(mint)?);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let stream = accepted?.0;
                stream.set_nodelay(true)?;
                tokio::spawn(serve(stream));
            }
            accepted = mint.accept() => { tokio::spawn(give(accepted?.0)); }
        }
    }
}

async fn give(mut stream: UnixStream) -> io::Result<()> {
    let mut line = [0; 64];
    let _ = stream.read(&mut line).await?;
    stream
        .write_all(b"{\"credential\":\"BENCHBENCH00\"}\n\nexit 0\n")
        .await
}

/// Answers requests, until one asks for a WebSocket.
async fn serve(mut stream: TcpStream) -> io::Result<()> {
    let mut came = Vec::new();
    loop {
        let Some(end) = came.windows(4).position(|four| four == b"\r\n\r\n") else {
            if stream.read_buf(&mut came).await? == 0 {
                return Ok(());
            }
            continue;
        };
        let head = String::from_utf8_lossy(&came[..end]).into_owned();
        came.drain(..end + 4);
        if let Some(key) = header(&head, "sec-websocket-key") {
            // RFC 6455, section 4.2.2.
            let digest = Sha1::digest(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"));
            let accept = BASE64_STANDARD.encode(digest);
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                 Sec-WebSocket-Accept: {accept}\r\n\r\n"
            );
            stream.write_all(answer.as_bytes()).await?;
            return echo(stream, came).await;
        }
        let length = header(&head, "content-length").and_then(|length| length.parse().ok());
        let length = length.unwrap_or(0);
        while came.len() < length {
            if stream.read_buf(&mut came).await? == 0 {
                return Ok(());
            }
        }
        came.drain(..length);
        // What is posted is a credential; everything else asks for the session.
        let (cookie, alive) = match head.starts_with("POST ") {
            true => ("Set-Cookie: t3_session=visit.0; Path=/\r\n", true),
            false => ("", header(&head, "cookie").is_some()),
        };
        let body = format!(
            "{{\"authenticated\":{alive},\"auth\":{{\"sessionCookieName\":\"t3_session\"}}}}"
        );
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{cookie}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await?;
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(found, _)| found.eq_ignore_ascii_case(name))?;
    Some(value.trim())
}

async fn echo(mut stream: TcpStream, mut came: Vec<u8>) -> io::Result<()> {
    let (mut frames, mut back) = (Frames::default(), Vec::new());
    loop {
        let go_on = frames.turn(&came, &mut back);
        stream.write_all(&back).await?;
        back.clear();
        came.clear();
        came.reserve(4096);
        if !go_on || stream.read_buf(&mut came).await? == 0 {
            return Ok(());
        }
    }
}

/// A client's frames as they come, split and joined anywhere.
#[derive(Default)]
struct Frames {
    head: [u8; 14],
    /// How much of the head has come.
    known: usize,
    /// Where its mask begins.
    mask: usize,
    /// How much of the payload has come, and how much there is.
    at: u64,
    length: u64,
}

impl Frames {
    /// Turns what came into what goes back: the same without its mask, and a pong for a ping. Gives whether to go on, which
    /// is until a whole Close has come.
    fn turn(&mut self, mut came: &[u8], back: &mut Vec<u8>) -> bool {
        while let [first, rest @ ..] = came {
            if self.mask == 0 || self.known < self.mask + 4 {
                self.head[self.known] = *first;
                self.known += 1;
                came = rest;
                self.read_head(back);
            } else {
                let left = usize::try_from(self.length - self.at).unwrap_or(usize::MAX);
                let (payload, rest) = came.split_at(left.min(came.len()));
                let mask = &self.head[self.mask..self.mask + 4];
                let start = self.at as usize;
                let bytes = payload.iter().enumerate();
                back.extend(bytes.map(|(at, byte)| byte ^ mask[(start + at) % 4]));
                self.at += payload.len() as u64;
                came = rest;
            }
            if self.mask > 0 && self.known == self.mask + 4 && self.at == self.length {
                if self.head[0] & 15 == 8 {
                    return false;
                }
                *self = Frames::default();
            }
        }
        true
    }

    /// Finds out where the mask begins once that can be told, and answers a head that is whole.
    fn read_head(&mut self, back: &mut Vec<u8>) {
        if self.known == 2 {
            self.mask = match self.head[1] & 127 {
                126 => 4,
                127 => 10,
                _ => 2,
            };
        }
        if self.mask == 0 || self.known < self.mask + 4 {
            return;
        }
        self.length = match &self.head[2..self.mask] {
            [] => (self.head[1] & 127).into(),
            long => long.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
        };
        let ping = self.head[0] & 15 == 9;
        back.push(self.head[0] + u8::from(ping));
        back.push(self.head[1] & 127);
        back.extend_from_slice(&self.head[2..self.mask]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The frame of a client, or of a server where there is no mask.
    fn frame(kind: u8, payload: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
        let masked = u8::from(mask.is_some()) << 7;
        let mut frame = vec![128 | kind];
        match payload.len() {
            short @ ..126 => frame.push(masked | short as u8),
            middle @ ..65536 => {
                frame.push(masked | 126);
                frame.extend((middle as u16).to_be_bytes());
            }
            long => {
                frame.push(masked | 127);
                frame.extend((long as u64).to_be_bytes());
            }
        }
        frame.extend(mask.unwrap_or_default().iter().filter(|_| mask.is_some()));
        let mask = mask.unwrap_or_default();
        let payload = payload.iter().enumerate();
        frame.extend(payload.map(|(at, byte)| byte ^ mask[at % 4]));
        frame
    }

    #[test]
    fn frames_come_back_whole_however_they_are_cut() {
        let payloads = [&b""[..], b"a", &[7; 125], &[8; 128], &[9; 70_000], b"end"];
        let (mut there, mut expected) = (Vec::new(), Vec::new());
        for payload in payloads {
            there.extend(frame(2, payload, Some([1, 2, 3, 4])));
            expected.extend(frame(2, payload, None));
        }
        there.extend(frame(9, b"are you there", Some([5, 6, 7, 8])));
        expected.extend(frame(10, b"are you there", None));
        for size in [1, 2, 3, 5, 7, 13, 131, 4096, there.len()] {
            let (mut frames, mut back) = (Frames::default(), Vec::new());
            for part in there.chunks(size) {
                assert!(frames.turn(part, &mut back));
            }
            assert!(back == expected, "in parts of {size}");
        }
    }

    #[test]
    fn a_close_is_the_last_frame() {
        let mut there = frame(8, &1000_u16.to_be_bytes(), Some([1, 2, 3, 4]));
        there.extend(frame(1, b"late", Some([1, 2, 3, 4])));
        let mut back = Vec::new();
        assert!(!Frames::default().turn(&there, &mut back));
        assert_eq!(back, frame(8, &1000_u16.to_be_bytes(), None));
    }
}
