//! A strict instance: it takes nothing but what every server reads alike, notes all that reaches it, and says who it is.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::frames::{self, Frame};
use super::http::{Client, Head};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub head: Head,
    /// The body, once it was there as a whole.
    pub body: Option<Vec<u8>>,
}

#[derive(Default)]
struct Notes {
    /// By their targets.
    seen: HashMap<String, Vec<Seen>>,
    faults: Vec<String>,
}

/// A running one. Its session cookie is `t3_session=NAME`.
pub struct Witness {
    pub name: String,
    pub port: u16,
    notes: Arc<Mutex<Notes>>,
    accepting: JoinHandle<()>,
}

impl Witness {
    pub async fn start(name: &str) -> Witness {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let notes = Arc::new(Mutex::new(Notes::default()));
        let (own, noting) = (name.to_owned(), notes.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                let (name, notes) = (own.clone(), noting.clone());
                tokio::spawn(async move { serve(stream, &name, &notes).await });
            }
        });
        Witness {
            name: name.to_owned(),
            port,
            notes,
            accepting,
        }
    }

    pub fn cookie(&self) -> String {
        format!("t3_session={}", self.name)
    }

    /// Takes the requests so far away, by their targets. The dispatcher's own questions are left out.
    pub fn take(&self) -> HashMap<String, Vec<Seen>> {
        std::mem::take(&mut self.notes.lock().unwrap().seen)
    }

    /// What came that no server should have to read.
    pub fn faults(&self) -> Vec<String> {
        self.notes.lock().unwrap().faults.clone()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// How the end of a body is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    Length(usize),
    Chunked,
    /// Neither is said.
    Unsaid,
}

/// The first line and the framing of a head, with its empty line, that leaves nothing to interpret.
///
/// # Errors
/// What is wrong with it.
pub fn strict(head: &[u8]) -> Result<(String, Framing), String> {
    let fault = |what: &str| Err(format!("{what}: {}", head.escape_ascii()));
    let Some(text) = head.strip_suffix(b"\r\n\r\n") else {
        return fault("no end");
    };
    let controls = |byte: &u8| (*byte < 0x20 && *byte != b'\t') || *byte == 0x7f;
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") {
        lines.push(&rest[..end]);
        rest = &rest[end + 2..];
    }
    lines.push(rest);
    if lines.iter().any(|line| line.iter().any(controls)) {
        return fault("a control character");
    }
    let (mut lengths, mut codings) = (Vec::new(), Vec::new());
    for line in &lines[1..] {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return fault("a line without a colon");
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.is_empty() || !name.iter().all(is_token) {
            return fault("a name that is none");
        }
        match name.to_ascii_lowercase().as_slice() {
            b"content-length" => lengths.push(value),
            b"transfer-encoding" => codings.push(value),
            _ => {}
        }
    }
    let framing = match (lengths[..].as_ref(), codings[..].as_ref()) {
        ([], []) => Framing::Unsaid,
        ([], [b"chunked"]) => Framing::Chunked,
        ([length], []) if !length.is_empty() && length.iter().all(u8::is_ascii_digit) => {
            match str::from_utf8(length).unwrap().parse() {
                Ok(length) => Framing::Length(length),
                Err(_) => return fault("a length beyond all"),
            }
        }
        _ => return fault("framing that can be read in two ways"),
    };
    Ok((String::from_utf8_lossy(lines[0]).into_owned(), framing))
}

/// The next head, with its empty line; `None` where the connection ends before it begins.
pub async fn read_head(client: &mut Client) -> io::Result<Option<Vec<u8>>> {
    loop {
        if let Some(end) = client
            .unread
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
        {
            return Ok(Some(client.unread.drain(..end + 4).collect()));
        }
        if client.stream.read_buf(&mut client.unread).await? == 0 {
            return match client.unread.is_empty() {
                true => Ok(None),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
    }
}

/// A body in chunks, without anything that is not needed for it.
pub async fn read_chunks(client: &mut Client) -> io::Result<Result<Vec<u8>, String>> {
    let mut body = Vec::new();
    loop {
        let line = loop {
            if let Some(end) = client.unread.windows(2).position(|two| two == b"\r\n") {
                break client.unread.drain(..end + 2).collect::<Vec<u8>>();
            }
            if client.stream.read_buf(&mut client.unread).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        let digits = &line[..line.len() - 2];
        let size = str::from_utf8(digits)
            .ok()
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .and_then(|digits| usize::from_str_radix(digits, 16).ok());
        let Some(size) = size else {
            return Ok(Err(format!("a chunk's size: {}", line.escape_ascii())));
        };
        body.extend(client.read_exact(size).await?);
        let end = client.read_exact(2).await?;
        if end != b"\r\n" {
            return Ok(Err(format!("a chunk's end: {}", end.escape_ascii())));
        }
        if size == 0 {
            return Ok(Ok(body));
        }
    }
}

async fn serve(stream: TcpStream, name: &str, notes: &Mutex<Notes>) -> io::Result<()> {
    let mut client = Client {
        stream,
        unread: Vec::new(),
    };
    let note = |fault: String| notes.lock().unwrap().faults.push(fault);
    loop {
        let head = match read_head(&mut client).await {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(error) => {
                if !client.unread.is_empty() {
                    note(format!("half a head: {}", client.unread.escape_ascii()));
                }
                return Err(error);
            }
        };
        let (line, framing) = match strict(&head) {
            Ok(read) => read,
            Err(fault) => {
                note(fault);
                return Ok(());
            }
        };
        let Some((head, _)) = Head::parse(&head) else {
            return Ok(());
        };
        let words: Vec<&str> = line.split(' ').collect();
        if words.len() != 3 || words[2] != "HTTP/1.1" || head.all("host").count() != 1 {
            note(format!("not a request: {head:?}"));
            return Ok(());
        }
        let ours = matches!(
            head.target(),
            "/api/auth/session" | "/api/auth/browser-session" | "/api/auth/bootstrap"
        );
        let signed_in = head
            .all("cookie")
            .flat_map(|cookies| cookies.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .find(|(key, _)| *key == "t3_session")
            .is_some_and(|(_, value)| value == name);
        let place = (!ours).then(|| {
            let mut notes = notes.lock().unwrap();
            let seen = notes.seen.entry(head.target().to_owned()).or_default();
            seen.push(Seen {
                head: head.clone(),
                body: None,
            });
            seen.len() - 1
        });
        if head.target().starts_with("/early/") {
            respond(&mut client, &head, 200, &json!({ "who": name }), "").await?;
        }
        let read = match framing {
            Framing::Unsaid => Ok(Vec::new()),
            Framing::Length(length) => Ok(client.read_exact(length).await?),
            Framing::Chunked => read_chunks(&mut client).await?,
        };
        let body = match read {
            Ok(body) => body,
            Err(fault) => {
                note(fault);
                return Ok(());
            }
        };
        if let Some(place) = place {
            let mut notes = notes.lock().unwrap();
            // It may have been taken away meanwhile.
            let seen = notes.seen.get_mut(head.target());
            if let Some(seen) = seen.and_then(|seen| seen.get_mut(place)) {
                seen.body = Some(body.clone());
            }
        }
        if head.target().starts_with("/early/") {
            continue;
        }
        match head.target() {
            "/api/auth/session" => {
                let auth = json!({ "sessionCookieName": "t3_session" });
                let answer = json!({ "authenticated": signed_in, "auth": auth });
                respond(&mut client, &head, 200, &answer, "").await?;
            }
            _ if ours => {
                let cookie = format!("Set-Cookie: t3_session={name}; Path=/\r\n");
                let answer = json!({ "authenticated": true });
                respond(&mut client, &head, 200, &answer, &cookie).await?;
            }
            _ if head.get("upgrade").is_some() && signed_in => {
                let key = head.get("sec-websocket-key").unwrap_or_default();
                let accept = frames::accept_key(key);
                let switch = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                     Sec-WebSocket-Accept: {accept}\r\nX-Who: {name}\r\n\r\n"
                );
                client.send(switch).await?;
                let early = std::mem::take(&mut client.unread);
                let (read, mut write) = client.stream.split();
                let mut read = early.as_slice().chain(read);
                while let Ok(frame) = Frame::read(&mut read).await {
                    frame.write(&mut write, None).await?;
                    if frame.opcode == frames::CLOSE {
                        break;
                    }
                }
                return Ok(());
            }
            _ => {
                let answer = json!({
                    "who": name,
                    "target": head.target(),
                    "user": head.all("x-authentik-username").collect::<Vec<_>>(),
                    "body": body.len(),
                });
                let status = if signed_in { 200 } else { 401 };
                let who = format!("X-Who: {name}\r\n");
                respond(&mut client, &head, status, &answer, &who).await?;
            }
        }
    }
}

/// Answers: a `POST` in chunks, anything else with a length.
async fn respond(
    client: &mut Client,
    head: &Head,
    status: u16,
    body: &Value,
    headers: &str,
) -> io::Result<()> {
    let body = body.to_string();
    let (framing, content) = if head.method() == "POST" {
        let chunks = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
        ("Transfer-Encoding: chunked".to_owned(), chunks)
    } else {
        (format!("Content-Length: {}", body.len()), body)
    };
    let content = if head.method() == "HEAD" {
        ""
    } else {
        &content
    };
    let answer = format!("HTTP/1.1 {status} Answer\r\n{headers}{framing}\r\n\r\n{content}");
    client.stream.write_all(answer.as_bytes()).await
}
