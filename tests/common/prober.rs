//! The real prober as a process of its own, and servers that a test drives for its legs.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::dispatcher::{own_address, program, wait_for};
use super::frames::{self, Frame, accept_key};
use super::http::{self, Head};

/// A prober that is being set up. It is in a hurry.
pub struct Setup {
    pub base: TempDir,
    pub ip: Ipv4Addr,
    pub probe: Value,
    pub log_level: String,
}

impl Setup {
    pub fn new() -> Setup {
        let ip = own_address();
        Setup {
            base: TempDir::new().unwrap(),
            ip,
            probe: json!({
                "listen": format!("{ip}:9108"),
                "heartbeat": "200ms",
                "rtt_timeout": "5s",
                "connect_timeout": "2s",
                "reconnect": "100ms",
                "reconnect_max": "300ms",
                "legs": [],
            }),
            log_level: "info".into(),
        }
    }

    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Setup {
        self.probe[key] = value.into();
        self
    }

    pub fn leg(mut self, name: &str, kind: &str, url: String, resolve: &str) -> Setup {
        let leg = json!({ "name": name, "kind": kind, "url": url, "resolve": resolve });
        self.probe["legs"].as_array_mut().unwrap().push(leg);
        self
    }

    /// A WebSocket leg without TLS.
    pub fn plain(self, name: &str, to: SocketAddr) -> Setup {
        self.leg(name, "websocket", format!("ws://{to}/probe/ws"), "system")
    }

    pub fn trusting(self, pki: &Pki) -> Setup {
        let file = self.base.path().join("ca.pem");
        std::fs::write(&file, &pki.pem).unwrap();
        self.set("ca_file", file.display().to_string())
    }

    pub fn write(&self) -> PathBuf {
        let file = self.base.path().join("t3-probe.yaml");
        // JSON is YAML.
        std::fs::write(&file, json!({ "probe": self.probe }).to_string()).unwrap();
        file
    }

    /// Runs `probe --once`.
    pub async fn once(&self) -> Output {
        let mut command = tokio::process::Command::from(program());
        command.args(["probe", "--once", "-c"]).arg(self.write());
        command
            .env("RUST_LOG", &self.log_level)
            .kill_on_drop(true)
            .output()
            .await
            .unwrap()
    }

    /// Starts the prober and waits until it shows metrics.
    pub async fn start(self) -> Prober {
        let file = self.write();
        let log = self.base.path().join("log");
        let out = std::fs::File::create(&log).unwrap();
        let child = program()
            .args(["probe", "-c"])
            .arg(&file)
            .env("RUST_LOG", &self.log_level)
            .stdout(out.try_clone().unwrap())
            .stderr(Stdio::from(out))
            .spawn()
            .unwrap();
        let prober = Prober {
            child,
            base: self.base,
            admin: (self.ip, 9108).into(),
            log,
        };
        wait_for("prober", async || {
            http::request(prober.admin, "GET", "/healthz", &[], b"")
                .await
                .is_ok_and(|reply| reply.text() == "ok\n")
        })
        .await;
        prober
    }
}

/// A running prober. Dropping it kills it.
pub struct Prober {
    pub child: Child,
    pub base: TempDir,
    pub admin: SocketAddr,
    log: PathBuf,
}

impl Prober {
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn logged(&self, part: &str) -> Vec<String> {
        let log = self.log();
        let lines = log.lines().filter(|line| line.contains(part));
        lines.map(str::to_owned).collect()
    }

    pub async fn metrics(&self) -> String {
        let reply = http::request(self.admin, "GET", "/metrics", &[], b"").await;
        reply.unwrap().text()
    }

    /// The value of a series without its prefix; `None` where there is none.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let series = format!("t3probe_{series} ");
        let metrics = self.metrics().await;
        let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
        value.map(|value| value.parse().unwrap())
    }

    pub async fn wait_for(&self, series: &str, least: f64) {
        wait_for(&format!("{series} of {least}"), async || {
            self.metric(series)
                .await
                .is_some_and(|value| value >= least)
        })
        .await;
    }

    pub async fn wait_for_log(&self, part: &str) {
        wait_for(&format!("a log line with {part:?}"), async || {
            !self.logged(part).is_empty()
        })
        .await;
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub async fn exited(&mut self) -> ExitStatus {
        let child = Mutex::new(&mut self.child);
        wait_for("exit of the prober", async || {
            child.lock().unwrap().try_wait().unwrap().is_some()
        })
        .await;
        self.child.wait().unwrap()
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the prober's log\n{}", self.log());
        }
    }
}

/// A server on a port of its own.
pub async fn listen() -> (TcpListener, SocketAddr) {
    listen_at(Ipv4Addr::LOCALHOST).await
}

async fn listen_at(ip: Ipv4Addr) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Reads a request's head, and nothing that may follow it.
pub async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> Option<Head> {
    let mut bytes = Vec::new();
    loop {
        bytes.push(stream.read_u8().await.ok()?);
        if let Some((head, _)) = Head::parse(&bytes) {
            return Some(head);
        }
    }
}

/// Takes a WebSocket, adding lines to the answer's head.
pub async fn upgrade(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), more: &str) -> Head {
    let head = read_head(stream).await.unwrap();
    let accept = accept_key(head.get("sec-websocket-key").unwrap());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\n{more}\r\n"
    );
    stream.write_all(answer.as_bytes()).await.unwrap();
    head
}

/// Takes the next connection, which is a WebSocket.
pub async fn next_socket(listener: &TcpListener, more: &str) -> (TcpStream, Head) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let head = upgrade(&mut stream, more).await;
    (stream, head)
}

/// Sends the next text back, and gives it.
pub async fn echo_next(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Option<Frame> {
    let frame = Frame::read(stream).await.ok()?;
    if frame.opcode == frames::TEXT {
        frame.write(stream, None).await.ok()?;
    }
    Some(frame)
}

/// Echoes until the end.
pub async fn echo(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    while let Some(frame) = echo_next(&mut stream).await {
        if frame.opcode == frames::CLOSE {
            let _ = frame.write(&mut stream, None).await;
            return;
        }
    }
}

/// An authority for certificates.
pub struct Pki {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Pki {
    pub fn new() -> Pki {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        // Two with the same name could be taken for each other.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("authority {}", COUNT.fetch_add(1, Ordering::Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        Pki { issuer, pem }
    }

    /// What speaks TLS as `name`.
    pub fn acceptor(&self, name: &str, alpn: &[u8]) -> TlsAcceptor {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()])
            .unwrap()
            .signed_by(&key, &self.issuer)
            .unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        config.alpn_protocols = vec![alpn.to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }
}

/// What a TLS stand-in saw of a leg.
#[derive(Debug, Clone)]
pub struct Seen {
    pub sni: Option<String>,
    pub head: Head,
}

/// An echo behind TLS on an address of its own.
pub struct TlsEcho {
    pub address: SocketAddr,
    pub seen: Arc<Mutex<Vec<Seen>>>,
}

impl TlsEcho {
    pub async fn start(acceptor: TlsAcceptor) -> TlsEcho {
        let (listener, address) = listen_at(own_address()).await;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let noted = seen.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, noted) = (acceptor.clone(), noted.clone());
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let sni = stream.get_ref().1.server_name().map(str::to_owned);
                    let head = upgrade(&mut stream, "").await;
                    noted.lock().unwrap().push(Seen { sni, head });
                    echo(stream).await;
                });
            }
        });
        TlsEcho { address, seen }
    }
}

/// A server for DNS over HTTPS that knows one name, and the paths that it was asked at. It has a certificate for its
/// address, or for another name.
pub async fn doh(
    pki: &Pki,
    certified: Option<&str>,
    name: &'static str,
    ips: [Ipv4Addr; 2],
) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let (listener, address) = listen().await;
    let own = address.ip().to_string();
    let acceptor = pki.acceptor(certified.unwrap_or(&own), b"h2");
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, noted) = (acceptor.clone(), noted.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let service = service_fn(|request: Request<Incoming>| {
                    let noted = noted.clone();
                    async move {
                        noted.lock().unwrap().push(request.uri().path().to_owned());
                        let query = request.into_body().collect().await.unwrap().to_bytes();
                        let response = Response::builder()
                            .header("content-type", "application/dns-message")
                            .body(Full::<Bytes>::from(dns_answer(&query, name, ips)));
                        Ok::<_, Infallible>(response.unwrap())
                    }
                });
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
    (address, asked)
}

/// The answer to a DNS query (RFC 1035): these addresses for this name, and no other name exists.
fn dns_answer(query: &[u8], name: &str, ips: [Ipv4Addr; 2]) -> Vec<u8> {
    let mut labels = Vec::new();
    let mut at = 12;
    while query[at] != 0 {
        let length = usize::from(query[at]);
        labels.push(String::from_utf8_lossy(&query[at + 1..=at + length]).to_lowercase());
        at += length + 1;
    }
    let kind = u16::from_be_bytes([query[at + 1], query[at + 2]]);
    let known = labels.join(".") == name;
    let answers = known && kind == 1;
    let mut answer = query[..2].to_vec();
    answer.extend([0x81, if known { 0x80 } else { 0x83 }]);
    answer.extend([0, 1, 0, if answers { 2 } else { 0 }, 0, 0, 0, 0]);
    answer.extend(&query[12..at + 5]);
    for ip in ips.iter().filter(|_| answers) {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(ip.octets());
    }
    answer
}
