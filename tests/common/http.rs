//! A raw HTTP/1.1 client: it sends exactly the bytes that a test writes, and reads one response at a time.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The head of a request or a response.
#[derive(Debug, Clone, Default)]
pub struct Head {
    /// The first line.
    pub line: String,
    pub headers: Vec<(String, String)>,
}

impl Head {
    /// Takes a head off the front of `bytes`, with its length, if it is there as a whole.
    pub fn parse(bytes: &[u8]) -> Option<(Head, usize)> {
        let length = bytes.windows(4).position(|part| part == b"\r\n\r\n")? + 4;
        let text = String::from_utf8_lossy(&bytes[..length - 4]);
        let mut lines = text.split("\r\n");
        let line = lines.next().unwrap_or_default().to_owned();
        let headers = lines
            .map(|line| {
                let (name, value) = line.split_once(':').unwrap_or((line, ""));
                (name.to_owned(), value.trim().to_owned())
            })
            .collect();
        Some((Head { line, headers }, length))
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.headers
            .iter()
            .filter(move |(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub fn get<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.all(name).next()
    }

    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.all(name)
            .flat_map(|value| value.split(','))
            .any(|one| one.trim().eq_ignore_ascii_case(token))
    }

    pub fn method(&self) -> &str {
        self.line.split(' ').next().unwrap_or_default()
    }

    pub fn target(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }
}

/// What a request for a WebSocket has (RFC 6455, section 4.1), with the key of the RFC's example.
pub const HANDSHAKE: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// A response, read whole.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    pub head: Head,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn get<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.head.get(name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The `name=value` of every cookie that the response sets.
    pub fn cookies(&self) -> Vec<String> {
        let lines = self.head.all("set-cookie");
        lines
            .map(|line| line.split(';').next().unwrap_or_default().to_owned())
            .collect()
    }
}

/// One connection.
pub struct Client {
    pub stream: TcpStream,
    pub unread: Vec<u8>,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> io::Result<Client> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Client {
            stream,
            unread: Vec::new(),
        })
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.stream.write_all(bytes.as_ref()).await
    }

    async fn fill(&mut self) -> io::Result<()> {
        match self.stream.read_buf(&mut self.unread).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// The head of the next request, as a server reads it, unless the connection ends before.
    pub async fn read_request(&mut self) -> Option<Head> {
        loop {
            if let Some((head, length)) = Head::parse(&self.unread) {
                self.unread.drain(..length);
                return Some(head);
            }
            self.fill().await.ok()?;
        }
    }

    /// The next final response's head; interim ones are passed over.
    pub async fn read_head(&mut self) -> io::Result<(u16, Head)> {
        loop {
            if let Some((head, length)) = Head::parse(&self.unread) {
                self.unread.drain(..length);
                let status = head
                    .line
                    .split(' ')
                    .nth(1)
                    .and_then(|status| status.parse().ok());
                let status: u16 = status.ok_or(io::ErrorKind::InvalidData)?;
                if status >= 200 || status == 101 {
                    return Ok((status, head));
                }
                continue;
            }
            self.fill().await?;
        }
    }

    pub async fn read_exact(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.unread.len() < length {
            self.fill().await?;
        }
        Ok(self.unread.drain(..length).collect())
    }

    async fn read_line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|part| part == b"\r\n") {
                let line: Vec<u8> = self.unread.drain(..end + 2).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            self.fill().await?;
        }
    }

    /// The next chunk of a chunked body; empty at its end.
    pub async fn read_chunk(&mut self) -> io::Result<Vec<u8>> {
        let size = self.read_line().await?;
        let size =
            usize::from_str_radix(size.trim(), 16).map_err(|_| io::ErrorKind::InvalidData)?;
        let chunk = self.read_exact(size).await?;
        self.read_line().await?;
        Ok(chunk)
    }

    /// The next response to a request of `method`.
    pub async fn read_reply(&mut self, method: &str) -> io::Result<Reply> {
        let (status, head) = self.read_head().await?;
        let mut body = Vec::new();
        let bodiless = method == "HEAD" || matches!(status, 101 | 204 | 304);
        if bodiless {
        } else if head.has_token("transfer-encoding", "chunked") {
            loop {
                let chunk = self.read_chunk().await?;
                if chunk.is_empty() {
                    break;
                }
                body.extend(chunk);
            }
        } else if let Some(length) = head.get("content-length") {
            let length = length.parse().map_err(|_| io::ErrorKind::InvalidData)?;
            body = self.read_exact(length).await?;
        } else {
            body = std::mem::take(&mut self.unread);
            self.stream.read_to_end(&mut body).await?;
        }
        Ok(Reply { status, head, body })
    }

    /// Sends a request and reads its response. `Host` is `t3.example.com` unless a header says otherwise.
    pub async fn request(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Reply> {
        self.send(head(method, target, headers, body.len())).await?;
        self.send(body).await?;
        self.read_reply(method).await
    }

    /// Waits for the other side to end the connection, dropping what it still sends.
    pub async fn wait_for_end(&mut self) {
        let mut rest = Vec::new();
        let _ = self.stream.read_to_end(&mut rest).await;
    }
}

/// The bytes of a request's head.
pub fn head(method: &str, target: &str, headers: &[(&str, &str)], body: usize) -> String {
    let mut head = format!("{method} {target} HTTP/1.1\r\n");
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("host"))
    {
        head += "Host: t3.example.com\r\n";
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if body > 0 || method == "POST" {
        head += &format!("Content-Length: {body}\r\n");
    }
    head + "\r\n"
}

/// A request on a connection of its own.
pub async fn request(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Reply> {
    Client::connect(address)
        .await?
        .request(method, target, headers, body)
        .await
}
