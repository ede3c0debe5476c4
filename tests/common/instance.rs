//! A stand-in for `t3 serve`, version by version as the real ones were measured to behave, with named vices.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::frames::{self, Frame};
use super::http::{Client, Head};

/// The versions that were measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_0_24,
    V0_0_28,
    V0_0_33,
}

impl Version {
    pub fn name(self) -> &'static str {
        match self {
            Version::V0_0_24 => "0.0.24",
            Version::V0_0_28 => "0.0.28",
            Version::V0_0_33 => "0.0.33",
        }
    }
}

/// Ways to misbehave. All off is a healthy instance.
#[derive(Debug, Clone, Default)]
pub struct Vices {
    /// Takes connections and requests and never answers.
    pub silent: bool,
    /// Answers the session check with this status and body.
    pub check_says: Option<(u16, String)>,
    /// Never answers a session check.
    pub check_hangs: bool,
    /// Answers an ordinary request with a 101 that nobody asked for.
    pub switches_unasked: bool,
    /// Breaks the connection off at a session check.
    pub check_breaks: bool,
    /// Answers an exchange with this status, whatever the credential.
    pub exchange_says: Option<u16>,
    /// Answers an exchange with 200 and no session cookie (upstream issue 7756).
    pub pairs_without_cookie: bool,
    /// Breaks the connection off at the preferred pairing endpoint.
    pub exchange_breaks: bool,
    /// Answers every request with something that is not HTTP.
    pub garbage: bool,
    /// Closes the connection after reading a request.
    pub closes_unanswered: bool,
    /// Says the cookie's name nowhere but in `Set-Cookie`.
    pub hides_cookie_name: bool,
    /// Speaks as another version than it was started as, as if it had been upgraded.
    pub upgraded_to: Option<Version>,
    /// Answers everything so much later.
    pub answers_after: Duration,
    /// Sends this in place of an answer.
    pub spoils: Option<Spoil>,
}

/// What may come in place of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoil {
    /// A whole answer, of which a byte comes every 15 ms. Handshakes are answered as ever.
    Trickle,
    /// A reset in the middle of the head.
    CutHead,
    /// A reset in the middle of the body.
    CutBody,
    /// Header lines without an end.
    EndlessHead,
    /// One header of two megabytes.
    HugeHead,
    /// Less body than was promised, and then the end.
    ShortBody,
    /// A chunked body whose second chunk has no length.
    BadChunks,
    /// Interim answers without an end.
    EndlessInterim,
}

/// A request as the instance saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Which connection it came on, in the order of accepting.
    pub connection: usize,
    pub head: Head,
}

struct Shared {
    os_user: String,
    port: u16,
    version: Version,
    home: PathBuf,
    keep_alive: Duration,
    vices: Mutex<Vices>,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    body_bytes: AtomicUsize,
}

/// How long a new connection may take over its first request (Node's `headersTimeout`).
const FIRST_REQUEST: Duration = Duration::from_secs(60);

/// A running stand-in. Dropping it kills it: connections break, and its port refuses.
pub struct Instance {
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
    alive: watch::Sender<()>,
    stopped: watch::Sender<bool>,
}

impl Instance {
    /// Starts one on a free port. `home` holds its credentials and sessions.
    pub async fn start(home: &Path, version: Version) -> Instance {
        Instance::start_with(home, version, 0, Duration::from_secs(5)).await
    }

    /// Starts one on `port`, 0 for a free one, that closes connections idle for `keep_alive`.
    pub async fn start_with(
        home: &Path,
        version: Version,
        port: u16,
        keep_alive: Duration,
    ) -> Instance {
        std::fs::create_dir_all(home.join("credentials")).unwrap();
        std::fs::create_dir_all(home.join("sessions")).unwrap();
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let shared = Arc::new(Shared {
            os_user: home.file_name().unwrap().to_string_lossy().into_owned(),
            port: listener.local_addr().unwrap().port(),
            version,
            home: home.into(),
            keep_alive,
            vices: Mutex::default(),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            body_bytes: AtomicUsize::new(0),
        });
        let (alive, watching) = watch::channel(());
        let (stopped, orders) = watch::channel(false);
        let accepting = tokio::spawn(accept(listener, shared.clone(), watching, orders));
        Instance {
            shared,
            accepting,
            alive,
            stopped,
        }
    }

    /// Stops it as SIGSTOP does, or has it go on: the kernel takes connections and bytes, and nobody reads them.
    pub fn stop(&self, stopped: bool) {
        self.stopped.send_replace(stopped);
    }

    pub fn port(&self) -> u16 {
        self.shared.port
    }

    /// Changes the vices from now on.
    pub fn set(&self, change: impl FnOnce(&mut Vices)) {
        change(&mut self.shared.vices.lock().unwrap());
    }

    /// Forgets every session, as a rollback of its database does.
    pub fn forget_sessions(&self) {
        forget_sessions(&self.shared.home);
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// The requests so far whose target begins with `prefix`.
    pub fn seen_at(&self, prefix: &str) -> Vec<Seen> {
        self.seen()
            .into_iter()
            .filter(|seen| seen.head.target().starts_with(prefix))
            .collect()
    }

    /// Bytes of request bodies taken in so far.
    pub fn body_bytes(&self) -> usize {
        self.shared.body_bytes.load(Ordering::Relaxed)
    }

    /// The name of its session cookie.
    pub fn cookie_name(&self) -> String {
        self.shared.cookie_name()
    }

    /// A session cookie that it knows, as `name=value`.
    pub fn new_session(&self) -> String {
        let value = self.shared.new_session();
        format!("{}={value}", self.cookie_name())
    }

    /// Ends it and waits until its port is free.
    pub async fn kill(self) -> u16 {
        let port = self.port();
        self.accepting.abort();
        let _ = self.alive.send(());
        while TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        port
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Forgets the sessions of the stand-in that lives in `home`.
pub fn forget_sessions(home: &Path) {
    for session in std::fs::read_dir(home.join("sessions")).unwrap() {
        std::fs::remove_file(session.unwrap().path()).unwrap();
    }
}

async fn accept(
    listener: TcpListener,
    shared: Arc<Shared>,
    watching: watch::Receiver<()>,
    stopped: watch::Receiver<bool>,
) {
    while let Ok((stream, _)) = unless_stopped(listener.accept(), stopped.clone()).await {
        let _ = stream.set_nodelay(true);
        let (shared, mut watching) = (shared.clone(), watching.clone());
        let stopped = stopped.clone();
        let connection = shared.connections.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            let client = Client {
                stream,
                unread: Vec::new(),
            };
            tokio::select! {
                _ = unless_stopped(shared.serve(client, connection), stopped) => {}
                // Sent on when killed, dropped with the instance: either way this process is gone.
                _ = watching.changed() => {}
            }
        });
    }
}

/// Does nothing of `work` while it is stopped.
async fn unless_stopped<T>(work: impl Future<Output = T>, mut stopped: watch::Receiver<bool>) -> T {
    tokio::pin!(work);
    loop {
        if stopped.wait_for(|stopped| !stopped).await.is_err() {
            return std::future::pending().await;
        }
        tokio::select! {
            biased;
            Ok(()) = stopped.changed() => {}
            done = &mut work => return done,
        }
    }
}

/// What a request got.
enum Next {
    KeepAlive,
    Close,
}

impl Shared {
    fn vices(&self) -> Vices {
        self.vices.lock().unwrap().clone()
    }

    fn version(&self) -> Version {
        self.vices().upgraded_to.unwrap_or(self.version)
    }

    fn cookie_name(&self) -> String {
        if self.version() < Version::V0_0_33 {
            return "t3_session".into();
        }
        let mut hasher = DefaultHasher::new();
        self.home.hash(&mut hasher);
        format!(
            "t3_session_{}_{:012x}",
            self.port,
            hasher.finish() & 0xffff_ffff_ffff
        )
    }

    fn new_session(&self) -> String {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let value = format!(
            "payload-{}-{}-{number}.signature",
            self.os_user,
            std::process::id()
        );
        std::fs::write(self.home.join("sessions").join(&value), "").unwrap();
        value
    }

    /// Whether the request has a session: of a name that is there twice the first counts.
    fn authenticated(&self, head: &Head) -> bool {
        let name = self.cookie_name();
        head.all("cookie")
            .flat_map(|line| line.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .find(|(key, _)| *key == name)
            .is_some_and(|(_, value)| {
                is_file_name(value) && self.home.join("sessions").join(value).exists()
            })
    }

    async fn serve(&self, mut client: Client, connection: usize) -> io::Result<()> {
        // Node's keep-alive timeout is for the time between requests; for the first one it waits longer.
        let mut patience = FIRST_REQUEST;
        loop {
            let waiting = tokio::time::timeout(patience, read_request_head(&mut client));
            let Ok(head) = waiting.await else {
                return Ok(());
            };
            patience = self.keep_alive;
            let Some(head) = head? else {
                return respond(&mut client, 431, &[], b"", false).await;
            };
            self.seen.lock().unwrap().push(Seen {
                connection,
                head: head.clone(),
            });
            match self.answer(&mut client, &head).await? {
                Next::KeepAlive => {}
                Next::Close => return Ok(()),
            }
        }
    }

    async fn answer(&self, client: &mut Client, head: &Head) -> io::Result<Next> {
        let vices = self.vices();
        if vices.silent {
            std::future::pending::<()>().await;
        }
        if vices.garbage {
            client.send("SSH-2.0-OpenSSH_9.2\r\n\r\n").await?;
            return Ok(Next::Close);
        }
        if vices.closes_unanswered {
            return Ok(Next::Close);
        }
        if !vices.answers_after.is_zero() {
            tokio::time::sleep(vices.answers_after).await;
        }
        if let Some(spoil) = vices.spoils
            && (spoil != Spoil::Trickle || head.get("upgrade").is_none())
        {
            return self.spoil(client, head, spoil).await;
        }
        let (method, target) = (head.method(), head.target());
        let path = target.split('?').next().unwrap_or_default();
        if vices.switches_unasked {
            client.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nDATA").await?;
            return Ok(Next::Close);
        }
        if head.get("upgrade").is_some() {
            return self.upgrade(client, head, path).await;
        }
        match (method, path) {
            ("GET", "/api/auth/session") => self.session(client, head, &vices).await,
            ("POST", "/api/auth/browser-session" | "/api/auth/bootstrap") => {
                self.exchange(client, head, path, &vices).await
            }
            ("GET", "/.well-known/t3/environment") => {
                let body = json!({ "serverVersion": self.version().name(), "label": self.os_user });
                self.json(client, 200, &[], &body).await
            }
            (_, path) if path.starts_with("/__test/") => self.test_route(client, head, path).await,
            ("GET" | "HEAD", _) => self.page(client, head).await,
            // It answers before it reads the body, and then closes.
            _ if body_length(head) != Some(0) => {
                respond(client, 404, &[("Connection", "close")], b"", true).await?;
                client.stream.shutdown().await?;
                Ok(Next::Close)
            }
            _ => {
                respond(client, 404, &KEEP_ALIVE, b"", true).await?;
                Ok(Next::KeepAlive)
            }
        }
    }

    async fn spoil(&self, client: &mut Client, head: &Head, spoil: Spoil) -> io::Result<Next> {
        const BEGUN: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n";
        match spoil {
            Spoil::Trickle => {
                let body = match head.method() {
                    "POST" => read_body(client, head).await?,
                    _ => format!("<h1>{}'s workspace</h1>", self.os_user).into(),
                };
                let length = body.len().to_string();
                let answer = response_head(200, &[("Content-Length", &length)]);
                for byte in answer.bytes().chain(body) {
                    client.send([byte]).await?;
                    tokio::time::sleep(Duration::from_millis(15)).await;
                }
                return Ok(Next::KeepAlive);
            }
            Spoil::CutHead | Spoil::CutBody => {
                client.send(BEGUN).await?;
                if spoil == Spoil::CutBody {
                    client.send("Content-Length: 100\r\n\r\nhalf").await?;
                }
                // What is still to be sent would go with the connection.
                tokio::time::sleep(Duration::from_millis(20)).await;
                let none = Some(Duration::ZERO);
                rustix::net::sockopt::set_socket_linger(&client.stream, none)?;
            }
            Spoil::EndlessHead => {
                client.send(BEGUN).await?;
                for number in 0_u64.. {
                    client.send(format!("X-{number}: {number}\r\n")).await?;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            Spoil::HugeHead => {
                client.send(BEGUN).await?;
                client
                    .send(format!("X: {}\r\n\r\n", "x".repeat(2 << 20)))
                    .await?;
            }
            Spoil::ShortBody => {
                let head = response_head(200, &[("Content-Length", "100")]);
                client.send(head + "half").await?;
            }
            Spoil::BadChunks => {
                let head = response_head(200, &[("Transfer-Encoding", "chunked")]);
                client
                    .send(head + "4\r\nhalf\r\nlength\r\nhalf\r\n0\r\n\r\n")
                    .await?;
            }
            Spoil::EndlessInterim => loop {
                client.send("HTTP/1.1 103 Early Hints\r\n\r\n").await?;
                tokio::time::sleep(Duration::from_millis(5)).await;
            },
        }
        Ok(Next::Close)
    }

    async fn json(
        &self,
        client: &mut Client,
        status: u16,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> io::Result<Next> {
        let mut all = vec![("Content-Type", "application/json")];
        all.extend(KEEP_ALIVE);
        all.extend(headers);
        respond(client, status, &all, body.to_string().as_bytes(), false).await?;
        Ok(Next::KeepAlive)
    }

    async fn session(&self, client: &mut Client, head: &Head, vices: &Vices) -> io::Result<Next> {
        if vices.check_hangs {
            std::future::pending::<()>().await;
        }
        if vices.check_breaks {
            return Ok(Next::Close);
        }
        if let Some((status, body)) = &vices.check_says {
            respond(client, *status, &KEEP_ALIVE, body.as_bytes(), false).await?;
            return Ok(Next::KeepAlive);
        }
        let authenticated = self.authenticated(head);
        let mut body = json!({
            "authenticated": authenticated,
            "auth": {
                "policy": "loopback-browser",
                "bootstrapMethods": ["one-time-token"],
                "sessionMethods": ["browser-session-cookie", "bearer-session-token"],
                "sessionCookieName": self.cookie_name(),
            },
        });
        if vices.hides_cookie_name {
            body["auth"]
                .as_object_mut()
                .unwrap()
                .remove("sessionCookieName");
        }
        if authenticated {
            body["sessionMethod"] = "browser-session-cookie".into();
            body["expiresAt"] = "2026-12-21T00:00:00.000Z".into();
            self.add_rights(&mut body);
        }
        self.json(client, 200, &[], &body).await
    }

    fn add_rights(&self, body: &mut Value) {
        if self.version() == Version::V0_0_24 {
            body["role"] = "client".into();
        } else {
            body["scopes"] = json!(["all"]);
        }
    }

    async fn exchange(
        &self,
        client: &mut Client,
        head: &Head,
        path: &str,
        vices: &Vices,
    ) -> io::Result<Next> {
        let version = self.version();
        if vices.exchange_breaks && path == "/api/auth/browser-session" {
            return Ok(Next::Close);
        }
        let own = if version == Version::V0_0_24 {
            "/api/auth/bootstrap"
        } else {
            "/api/auth/browser-session"
        };
        let body = read_body(client, head).await?;
        if path != own {
            respond(client, 404, &KEEP_ALIVE, b"", true).await?;
            return Ok(Next::KeepAlive);
        }
        if let Some(status) = vices.exchange_says {
            return self.json(client, status, &[], &json!({})).await;
        }
        if version != Version::V0_0_24 && head.get("content-type") != Some("application/json") {
            return self.json(client, 415, &[], &json!({})).await;
        }
        let Ok(body) = serde_json::from_slice::<Value>(&body) else {
            return match version {
                Version::V0_0_24 => {
                    self.json(
                        client,
                        400,
                        &[],
                        &json!({ "error": "Invalid bootstrap payload." }),
                    )
                    .await
                }
                version => {
                    let status = if version == Version::V0_0_28 {
                        500
                    } else {
                        400
                    };
                    respond(client, status, &KEEP_ALIVE, b"", false).await?;
                    Ok(Next::KeepAlive)
                }
            };
        };
        let credential = body["credential"].as_str().unwrap_or_default();
        // Removing it is what makes it good for one use.
        let good = is_file_name(credential)
            && std::fs::remove_file(self.home.join("credentials").join(credential)).is_ok();
        if !good {
            let body = match version {
                Version::V0_0_24 => json!({ "error": "Invalid bootstrap credential." }),
                _ => json!({
                    "_tag": "EnvironmentAuthInvalidError",
                    "code": "auth_invalid",
                    "reason": "invalid_credential",
                    "traceId": "0123456789abcdef",
                }),
            };
            return self.json(client, 401, &[], &body).await;
        }
        let mut body = json!({
            "authenticated": true,
            "sessionMethod": "browser-session-cookie",
            "expiresAt": "2026-12-21T00:00:00.000Z",
        });
        self.add_rights(&mut body);
        let cookie = format!(
            "{}={}; Path=/; Expires=Wed, 31 Dec 2098 00:00:00 GMT; HttpOnly; SameSite=Lax",
            self.cookie_name(),
            self.new_session()
        );
        let with_cookie = [("Set-Cookie", cookie.as_str())];
        let headers = if vices.pairs_without_cookie {
            &[][..]
        } else {
            &with_cookie
        };
        self.json(client, 200, headers, &body).await
    }

    /// The app, for any `GET` that is nothing else.
    async fn page(&self, client: &mut Client, head: &Head) -> io::Result<Next> {
        let html = include_str!("workspace.html")
            .replace("{os_user}", &self.os_user)
            .replace("{version}", self.version().name());
        let mut headers = vec![("Content-Type", "text/html; charset=utf-8")];
        headers.extend(KEEP_ALIVE);
        let mut body = html.into_bytes();
        if self.version() >= Version::V0_0_33 && head.has_token("accept-encoding", "gzip") {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), Compression::fast());
            io::Write::write_all(&mut gzip, &body)?;
            body = gzip.finish()?;
            headers.push(("Content-Encoding", "gzip"));
            headers.push(("Vary", "Accept-Encoding"));
        }
        if head.method() == "HEAD" {
            let length = body.len().to_string();
            headers.push(("Content-Length", &length));
            client.send(response_head(200, &headers)).await?;
        } else {
            respond(client, 200, &headers, &body, false).await?;
        }
        Ok(Next::KeepAlive)
    }

    /// Routes that no real instance has, to see what came and to send what a test needs.
    async fn test_route(&self, client: &mut Client, head: &Head, path: &str) -> io::Result<Next> {
        let query = head.target().split_once('?').map_or("", |(_, query)| query);
        let number = || query.parse::<usize>().unwrap_or(0);
        match path {
            // Takes any body in, and says how long it was.
            "/__test/upload" => {
                let length = self.drain_body(client, head).await?;
                let text = length.to_string();
                respond(client, 200, &KEEP_ALIVE, text.as_bytes(), false).await?;
            }
            // Sends the body back.
            "/__test/echo" => {
                let body = read_body(client, head).await?;
                respond(client, 200, &KEEP_ALIVE, &body, false).await?;
            }
            // Sends that many bytes.
            "/__test/download" => {
                let mut left = number();
                client
                    .send(response_head(200, &[("Content-Length", &left.to_string())]))
                    .await?;
                let block = vec![b'x'; 64 * 1024];
                while left > 0 {
                    let size = left.min(block.len());
                    client.send(&block[..size]).await?;
                    left -= size;
                }
            }
            // Sends one chunk for every request that comes at `/__test/next`, and an end after that many.
            "/__test/stream" => {
                client
                    .send(response_head(200, &[("Transfer-Encoding", "chunked")]))
                    .await?;
                let before = self.seen_next();
                for part in 0..number() {
                    while self.seen_next() <= before + part {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    client.send(format!("6\r\npart {part}\r\n")).await?;
                }
                client.send("0\r\n\r\n").await?;
            }
            "/__test/next" => respond(client, 200, &KEEP_ALIVE, b"next\n", false).await?,
            // A response with headers that belong to this connection alone.
            "/__test/hop-by-hop" => {
                let headers = [
                    ("Connection", "keep-alive, X-Nominated"),
                    ("Keep-Alive", "timeout=5"),
                    ("Proxy-Connection", "keep-alive"),
                    ("Trailer", "X-Checksum"),
                    ("X-Nominated", "1"),
                    ("X-Kept", "1"),
                ];
                respond(client, 200, &headers, b"", true).await?;
            }
            // Waits that many milliseconds before it answers.
            "/__test/slow" => {
                tokio::time::sleep(Duration::from_millis(number() as u64)).await;
                respond(client, 200, &KEEP_ALIVE, b"slow\n", false).await?;
            }
            // Breaks off in the middle of a body.
            "/__test/break" => {
                client
                    .send(response_head(200, &[("Content-Length", "100")]))
                    .await?;
                client.send("half").await?;
                return Ok(Next::Close);
            }
            // The body ends with the connection.
            "/__test/until-close" => {
                client
                    .send(response_head(200, &[("Connection", "close")]))
                    .await?;
                client.send("until close").await?;
                return Ok(Next::Close);
            }
            "/__test/chunked" => respond(client, 200, &KEEP_ALIVE, b"chunks", true).await?,
            "/__test/forget" => {
                forget_sessions(&self.home);
                respond(client, 200, &KEEP_ALIVE, b"forgotten\n", false).await?;
            }
            _ => respond(client, 404, &KEEP_ALIVE, b"", true).await?,
        }
        Ok(Next::KeepAlive)
    }

    fn seen_next(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|seen| seen.head.target() == "/__test/next")
            .count()
    }

    async fn drain_body(&self, client: &mut Client, head: &Head) -> io::Result<usize> {
        let mut total = 0;
        if let Some(length) = body_length(head) {
            while total < length {
                let part = client.read_exact((length - total).min(64 * 1024)).await?;
                total += part.len();
                self.body_bytes.fetch_add(part.len(), Ordering::Relaxed);
            }
        } else {
            loop {
                let chunk = client.read_chunk().await?;
                if chunk.is_empty() {
                    break;
                }
                total += chunk.len();
                self.body_bytes.fetch_add(chunk.len(), Ordering::Relaxed);
            }
        }
        Ok(total)
    }

    async fn upgrade(&self, client: &mut Client, head: &Head, path: &str) -> io::Result<Next> {
        let ticket = head
            .target()
            .split_once("wsTicket=")
            .map(|(_, ticket)| ticket);
        let allowed = match ticket {
            // A bad ticket beats a good cookie.
            Some(ticket) => ticket == "good",
            None => self.authenticated(head),
        };
        if path != "/ws" || !allowed {
            // It says that it keeps the connection, and closes it.
            let status = if path == "/ws" { 401 } else { 200 };
            respond(client, status, &KEEP_ALIVE, b"refused\n", false).await?;
            client.stream.shutdown().await?;
            return Ok(Next::Close);
        }
        let mut headers = vec![
            ("Upgrade", "websocket".to_owned()),
            ("Connection", "Upgrade".to_owned()),
        ];
        headers.push((
            "Sec-WebSocket-Accept",
            frames::accept_key(head.get("sec-websocket-key").unwrap_or_default()),
        ));
        if let Some(first) = head
            .get("sec-websocket-protocol")
            .and_then(|offered| offered.split(',').next())
        {
            headers.push(("Sec-WebSocket-Protocol", first.trim().to_owned()));
        }
        let deflate = self.version() >= Version::V0_0_33
            && head
                .get("sec-websocket-extensions")
                .is_some_and(|offer| offer.contains("permessage-deflate"));
        if deflate {
            let agreed =
                "permessage-deflate; client_no_context_takeover; server_no_context_takeover";
            headers.push(("Sec-WebSocket-Extensions", agreed.to_owned()));
        }
        let headers: Vec<(&str, &str)> = headers
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        client.send(response_head(101, &headers)).await?;
        self.converse(client, deflate).await?;
        Ok(Next::Close)
    }

    /// Echoes messages, answers the client's heartbeat, and closes as it is closed.
    async fn converse(&self, client: &mut Client, deflate: bool) -> io::Result<()> {
        let unread = std::mem::take(&mut client.unread);
        let (read, mut write) = client.stream.split();
        let mut read = tokio::io::AsyncReadExt::chain(unread.as_slice(), read);
        let mut message: Option<Frame> = None;
        loop {
            let frame = Frame::read(&mut read).await?;
            match frame.opcode {
                frames::CLOSE => {
                    return Frame::new(frames::CLOSE, frame.payload)
                        .write(&mut write, None)
                        .await;
                }
                frames::PING => {
                    Frame::new(frames::PONG, frame.payload)
                        .write(&mut write, None)
                        .await?
                }
                frames::PONG => {}
                _ => {
                    let done = frame.fin;
                    match &mut message {
                        Some(begun) => begun.payload.extend(frame.payload),
                        None => message = Some(frame),
                    }
                    if let Some(mut whole) = message.take_if(|_| done) {
                        whole.fin = true;
                        if whole.rsv1 {
                            whole.payload = inflate(&whole.payload)?;
                        }
                        if whole.payload == br#"{"_tag":"Ping"}"# {
                            whole.payload = br#"{"_tag":"Pong"}"#.into();
                        }
                        whole.rsv1 = deflate;
                        if deflate {
                            whole.payload = deflated(&whole.payload)?;
                        }
                        whole.write(&mut write, None).await?;
                    }
                }
            }
        }
    }
}

const KEEP_ALIVE: [(&str, &str); 2] = [("Connection", "keep-alive"), ("Keep-Alive", "timeout=5")];

fn is_file_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
}

/// A request's head, or `None` for one that is over the limits.
async fn read_request_head(client: &mut Client) -> io::Result<Option<Head>> {
    loop {
        if let Some((head, length)) = Head::parse(&client.unread) {
            client.unread.drain(..length);
            let fits = length <= 16 * 1024 && head.headers.len() < 1000;
            return Ok(fits.then_some(head));
        }
        if client.unread.len() > 16 * 1024 {
            return Ok(None);
        }
        if tokio::io::AsyncReadExt::read_buf(&mut client.stream, &mut client.unread).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// The length of a request's body; `None` for a chunked one.
fn body_length(head: &Head) -> Option<usize> {
    if head.has_token("transfer-encoding", "chunked") {
        return None;
    }
    Some(
        head.get("content-length")
            .and_then(|length| length.parse().ok())
            .unwrap_or(0),
    )
}

async fn read_body(client: &mut Client, head: &Head) -> io::Result<Vec<u8>> {
    if let Some(length) = body_length(head) {
        return client.read_exact(length).await;
    }
    let mut body = Vec::new();
    loop {
        let chunk = client.read_chunk().await?;
        if chunk.is_empty() {
            return Ok(body);
        }
        body.extend(chunk);
    }
}

fn response_head(status: u16, headers: &[(&str, &str)]) -> String {
    let reason = match status {
        101 => "Switching Protocols",
        200 => "OK",
        401 => "Unauthorized",
        404 => "Not Found",
        _ => "Other",
    };
    let mut head = format!("HTTP/1.1 {status} {reason}\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head + "\r\n"
}

async fn respond(
    client: &mut Client,
    status: u16,
    headers: &[(&str, &str)],
    body: &[u8],
    chunked: bool,
) -> io::Result<()> {
    let length = body.len().to_string();
    let framing = if chunked {
        ("Transfer-Encoding", "chunked")
    } else {
        ("Content-Length", length.as_str())
    };
    let mut bytes = response_head(status, &[headers, &[framing]].concat()).into_bytes();
    if chunked && !body.is_empty() {
        bytes.extend(format!("{:x}\r\n", body.len()).as_bytes());
        bytes.extend(body);
        bytes.extend(b"\r\n");
    }
    bytes.extend(if chunked {
        b"0\r\n\r\n".as_slice()
    } else {
        body
    });
    client.send(bytes).await
}

/// The end of a flushed block, which RFC 7692 leaves out on the wire.
const FLUSHED: [u8; 4] = [0, 0, 0xff, 0xff];

fn inflate(payload: &[u8]) -> io::Result<Vec<u8>> {
    let input = [payload, &FLUSHED].concat();
    let mut inflater = Decompress::new(false);
    let mut output = Vec::with_capacity(input.len() * 4 + 1024);
    while (inflater.total_in() as usize) < input.len() {
        output.reserve(input.len() * 4 + 1024);
        let rest = &input[inflater.total_in() as usize..];
        inflater
            .decompress_vec(rest, &mut output, FlushDecompress::Sync)
            .map_err(io::Error::other)?;
    }
    Ok(output)
}

fn deflated(payload: &[u8]) -> io::Result<Vec<u8>> {
    let mut deflater = Compress::new(Compression::fast(), false);
    let mut output = Vec::with_capacity(payload.len() + 1024);
    deflater
        .compress_vec(payload, &mut output, FlushCompress::Sync)
        .map_err(io::Error::other)?;
    if output.ends_with(&FLUSHED) {
        output.truncate(output.len() - FLUSHED.len());
    }
    Ok(output)
}
