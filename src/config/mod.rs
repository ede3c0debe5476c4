//! Settings: what was written in the file, then what it means.
//!
//! One YAML file holds Pingora's own keys at its top level and ours under `dispatch`. A file is read whole and every
//! fault in it is reported at once, each with its key path, the value that was not liked, and what to write instead.

mod jwt;
pub(crate) mod section;
pub mod url;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::HeaderName;
use ipnet::IpNet;
use pingora::server::configuration::ServerConf;
use yaml_serde::{Mapping, Value};

pub use jwt::{Jwks, Jwt};
pub use section::{ConfigError, Fault, Secret};
use section::{
    Section, address, at_least_one, duration, filled, leg_name, not_too_long, path, plain, shown,
    whole,
};

/// Everything that `serve` and `check` need to know, ready to use.
#[derive(Debug)]
pub struct Settings {
    /// Pingora's own settings, from the top level of the file.
    pub pingora: ServerConf,
    /// Ours, from the section `dispatch`.
    pub dispatch: Dispatch,
    /// What is odd but no fault: top-level keys that neither Pingora nor we know.
    pub warnings: Vec<String>,
}

/// The section `dispatch`.
#[derive(Debug, Clone, PartialEq)]
pub struct Dispatch {
    /// Where people's requests come in.
    pub listen: Vec<Listen>,
    /// Mode of the Unix sockets among them.
    pub listen_mode: u32,
    /// Group of these sockets, where it is not the service's own.
    pub listen_group: Option<String>,
    /// Connections that clients may hold at once.
    pub max_connections: u32,
    /// Connections that one address may hold that may not name people.
    pub max_connections_per_address: u32,
    /// Address of `/metrics`, `/healthz` and `/readyz` for the operator.
    pub admin: SocketAddr,
    /// Path of the dispatch table.
    pub table: PathBuf,
    /// How often the table is read again even when nothing seems to have changed.
    pub table_poll: Duration,
    /// How a request says who is asking.
    pub identity: Identity,
    /// How an instance is asked about a session.
    pub session: Session,
    /// How a browser is paired with an instance.
    pub pairing: Pairing,
    /// How WebSockets are kept and accounted for.
    pub tunnels: Tunnels,
    /// How a prober's legs are known.
    pub probe: Probe,
}

/// A place to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A Unix socket, by the path of its file.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => address.fmt(f),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The section `dispatch.identity`.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    /// Header in which the sign-on edge names the person.
    pub header: HeaderName,
    /// Socket peers whose header is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// How a signed token says it as well, where one has to.
    pub jwt: Option<Jwt>,
}

/// The section `dispatch.session`.
#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    /// Path on the instance that tells whether a cookie is alive.
    pub check_path: String,
    /// Longest wait for that answer; after it the request is proxied.
    pub check_timeout: Duration,
}

/// The section `dispatch.pairing`.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairing {
    /// What mints a credential.
    pub mint: Mint,
    /// How long that may take.
    pub mint_timeout: Duration,
    /// Paths on the instance that take a credential, the preferred one first.
    pub endpoints: Vec<String>,
    /// Longest wait for the instance to take a credential, over all endpoints.
    pub exchange_timeout: Duration,
    /// Mints that may run at once.
    pub max_concurrent: u32,
    /// Pairings that one user may have in a minute.
    pub per_user_per_minute: u32,
}

/// The keys `dispatch.pairing.mint` and `dispatch.pairing.mint_socket`, of which one holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Mint {
    /// A command; the OS user is appended as its last argument.
    Command(Vec<String>),
    /// A socket behind which `t3-mint --socket` is started for each connection.
    Socket(PathBuf),
}

impl Mint {
    /// The path of the key that says so.
    pub fn key(&self) -> &'static str {
        match self {
            Mint::Command(_) => "dispatch.pairing.mint",
            Mint::Socket(_) => "dispatch.pairing.mint_socket",
        }
    }
}

impl fmt::Display for Mint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mint::Command(command) => f.write_str(&command.join(" ")),
            Mint::Socket(path) => write!(f, "socket {}", path.display()),
        }
    }
}

/// The section `dispatch.tunnels`.
#[derive(Debug, Clone, PartialEq)]
pub struct Tunnels {
    /// Origins, beside the request's own host, whose pages may open WebSockets.
    pub allowed_origins: Vec<String>,
    /// The file that gets a line for each WebSocket that ended.
    pub ledger: PathBuf,
    /// Size in MiB at which that file is moved aside.
    pub ledger_max_mb: u32,
    /// How long a process that was replaced keeps the WebSockets it has.
    pub drain_limit: Duration,
    /// Whether to count ends of WebSockets by user, too.
    pub per_user_metrics: bool,
    /// How often a client says something by itself.
    pub client_heartbeat: Duration,
    /// After how long without an answer a client gives its WebSocket up.
    pub client_watchdog: Duration,
}

/// The section `dispatch.probe`.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// What a leg has to show; without one there are no legs, only echoes.
    pub token: Option<Secret>,
    /// How often an instance with open WebSockets is asked for a sign of life.
    pub heartbeat: Duration,
    /// Name of the leg that takes the whole way of a person's traffic.
    pub edge_leg: String,
    /// Name of the leg that begins at the load balancer.
    pub internal_leg: String,
}

impl Settings {
    /// Reads the file, or takes the defaults where there is none.
    ///
    /// # Errors
    /// When the file cannot be read, is not YAML, or says something that cannot be meant.
    pub fn load(file: Option<&Path>) -> Result<Settings, ConfigError> {
        let Some(file) = file else {
            return Settings::parse("").map_err(|faults| ConfigError {
                file: "default settings".into(),
                faults,
            });
        };
        section::load(file, Settings::parse)
    }

    /// The meaning of a settings file's text.
    ///
    /// # Errors
    /// All faults of the text.
    pub fn parse(text: &str) -> Result<Settings, Vec<Fault>> {
        let mut top = section::mapping(text)?;
        let mut faults = Vec::new();
        let ours = top.remove("dispatch").unwrap_or(Value::Null);
        let dispatch = Dispatch::read(Section::new("dispatch".into(), ours, &mut faults));
        let (pingora, warnings) = read_pingora(top, &mut faults);
        if faults.is_empty() {
            Ok(Settings {
                pingora,
                dispatch,
                warnings,
            })
        } else {
            Err(faults)
        }
    }
}

impl Dispatch {
    /// The ports on which whoever calls 127.0.0.1 reaches the dispatcher.
    pub fn own_ports(&self) -> Vec<u16> {
        let listen = self.listen.iter().filter_map(|place| match place {
            Listen::Tcp(at) => Some(at),
            Listen::Unix(_) => None,
        });
        let all = listen.chain([&self.admin]);
        all.filter(|at| at.ip().is_unspecified() || at.ip() == Ipv4Addr::LOCALHOST)
            .map(SocketAddr::port)
            .collect()
    }

    fn read(mut section: Section<'_>) -> Dispatch {
        let dispatch = Dispatch {
            listen: section.take_list("listen", &["0.0.0.0:3780"], listen),
            listen_mode: section.take("listen_mode", "0660", mode),
            listen_group: section.take("listen_group", None::<()>, Ok),
            max_connections: section.take("max_connections", 20_000, at_least_one),
            max_connections_per_address: section.take(
                "max_connections_per_address",
                100,
                at_least_one,
            ),
            admin: section.take("admin", "127.0.0.1:3781", address),
            table: section.take("table", "/etc/t3-serve/dispatch.json", |path: PathBuf| {
                filled(path, |path| path.as_os_str().is_empty(), "a path")
            }),
            table_poll: section.take("table_poll", "60s", duration),
            identity: {
                let mut section = section.section("identity");
                let identity = Identity {
                    header: section.take("header", "X-authentik-username", header_name),
                    trusted_proxies: section.take_list(
                        "trusted_proxies",
                        &["127.0.0.0/8", "::1/128"],
                        network,
                    ),
                    jwt: {
                        // Nothing written under it must not mean that nothing has to be proved.
                        let wanted = section.has("jwt");
                        let mut section = section.section("jwt");
                        let jwt = wanted.then(|| Jwt::read(&mut section)).flatten();
                        section.finish();
                        jwt
                    },
                };
                section.finish();
                identity
            },
            session: {
                let mut section = section.section("session");
                let session = Session {
                    check_path: section.take("check_path", "/api/auth/session", path),
                    check_timeout: section.take("check_timeout", "5s", duration),
                };
                section.finish();
                session
            },
            pairing: {
                let mut section = section.section("pairing");
                let command_written = section.is_written("mint");
                let command = section.take(
                    "mint",
                    ["sudo", "-n", "/usr/bin/t3-mint"],
                    |argv: Vec<String>| {
                        filled(
                            argv,
                            |argv| argv.first().is_none_or(String::is_empty),
                            "a program and its arguments",
                        )
                    },
                );
                let socket = section.take("mint_socket", None::<()>, |path: Option<PathBuf>| {
                    path.map(|path| filled(path, |path| !path.is_absolute(), "a path from / on"))
                        .transpose()
                });
                if command_written && socket.is_some() {
                    section.fault("mint_socket", "stands beside mint: write one of the two");
                }
                let pairing = Pairing {
                    mint: socket.map_or(Mint::Command(command), Mint::Socket),
                    mint_timeout: section.take("mint_timeout", "10s", duration),
                    endpoints: section.take_list(
                        "endpoints",
                        &["/api/auth/browser-session", "/api/auth/bootstrap"],
                        path,
                    ),
                    exchange_timeout: section.take("exchange_timeout", "10s", duration),
                    max_concurrent: section.take("max_concurrent", 2, at_least_one),
                    per_user_per_minute: section.take("per_user_per_minute", 6, at_least_one),
                };
                section.finish();
                pairing
            },
            tunnels: {
                let mut section = section.section("tunnels");
                let tunnels = Tunnels {
                    allowed_origins: section.take_list("allowed_origins", &[], origin),
                    ledger: section.take(
                        "ledger",
                        "/var/lib/t3-dispatch/closes.jsonl",
                        |path: PathBuf| filled(path, |path| path.as_os_str().is_empty(), "a path"),
                    ),
                    ledger_max_mb: section.take("ledger_max_mb", 16, at_least_one),
                    drain_limit: section.take("drain_limit", "24h", duration),
                    per_user_metrics: section.take("per_user_metrics", false, Ok),
                    client_heartbeat: section.take("client_heartbeat", "5s", duration),
                    client_watchdog: section.take("client_watchdog", "20s", duration),
                };
                if tunnels.client_watchdog <= tunnels.client_heartbeat {
                    section.fault(
                        "client_watchdog",
                        "is not longer than client_heartbeat: a client waits for more than one heartbeat",
                    );
                }
                section.finish();
                tunnels
            },
            probe: {
                let mut section = section.section("probe");
                let probe = Probe {
                    token: section.token(),
                    heartbeat: section.take("heartbeat", "10s", duration),
                    edge_leg: section.take("edge_leg", "cloudflare", leg_name),
                    internal_leg: section.take("internal_leg", "internal", leg_name),
                };
                if probe.edge_leg == probe.internal_leg {
                    section.fault(
                        "internal_leg",
                        "is the edge leg as well: name two legs that differ",
                    );
                }
                section.finish();
                probe
            },
        };
        if dispatch.listen.is_empty() && !section.is_faulty("listen") {
            section.fault("listen", "is empty: name at least one address to listen on");
        }
        if dispatch.pairing.endpoints.is_empty() && !section.is_faulty("pairing.endpoints") {
            section.fault("pairing.endpoints", "is empty: write at least one path");
        }
        // Where one of them means nothing, the others' places are not what they were.
        let whole = !section.is_faulty("listen[");
        for (position, address) in dispatch.listen.iter().enumerate().filter(|_| whole) {
            let earlier = &dispatch.listen[..position];
            if let Some(other) = earlier.iter().find(|other| overlap(address, other)) {
                let what = format!("{address} is taken by {other} already: leave one of them out");
                section.fault(&format!("listen[{position}]"), what);
            }
        }
        let admin = Listen::Tcp(dispatch.admin);
        if let Some(other) = dispatch.listen.iter().find(|other| overlap(&admin, other)) {
            let what = format!(
                "{} is taken by {other} in dispatch.listen: give it a port of its own",
                dispatch.admin
            );
            section.fault("admin", what);
        }
        section.finish();
        dispatch
    }
}

/// Pingora ignores keys that it does not know and stops at the first bad value; here each key is tried by itself.
fn read_pingora(top: Mapping, faults: &mut Vec<Fault>) -> (ServerConf, Vec<String>) {
    let known = match yaml_serde::to_value(ServerConf::default()) {
        Ok(Value::Mapping(map)) => map,
        _ => Mapping::new(),
    };
    let threads_written = top.contains_key("threads");
    let faults_before = faults.len();
    let mut warnings = Vec::new();
    // Pingora's own defaults lie in /tmp, where anybody could put a socket that would then be sent the listening ones.
    let mut accepted = Mapping::from_iter([
        (
            "upgrade_sock".into(),
            "/run/t3-dispatch/upgrade.sock".into(),
        ),
        ("pid_file".into(), "/run/t3-dispatch/t3-dispatch.pid".into()),
    ]);
    for (key, value) in top {
        let name = plain(&key);
        if !known.contains_key(&key) {
            warnings.push(format!(
                "{name}: is neither a key of Pingora's nor the section `dispatch`; it is ignored"
            ));
            continue;
        }
        let alone = Mapping::from_iter([(key.clone(), value.clone())]);
        let tried = yaml_serde::from_value::<ServerConf>(Value::Mapping(alone))
            .map_err(|error| format!("{} is not usable: {error}", shown(&value)))
            .and_then(|conf| conf.validate().map_err(|error| error.to_string()))
            .and_then(|conf| {
                let grace = conf.grace_period_seconds.unwrap_or_default();
                not_too_long(Duration::from_secs(grace), grace)?;
                // Pingora takes both zeros and then serves nobody.
                if conf.threads == 0 || conf.max_retries == 0 {
                    Err("0 would serve no request: write at least 1".into())
                } else {
                    Ok(())
                }
            });
        match tried {
            Ok(()) => {
                accepted.insert(key, value);
            }
            Err(what) => faults.push(Fault { key: name, what }),
        }
    }
    let mut conf = match yaml_serde::from_value::<ServerConf>(Value::Mapping(accepted)) {
        Ok(conf) => conf,
        Err(error) => {
            if faults.len() == faults_before {
                faults.push(whole(error.to_string()));
            }
            ServerConf::default()
        }
    };
    if !threads_written {
        conf.threads = std::thread::available_parallelism().map_or(1, usize::from);
    }
    (conf, warnings)
}

/// Whether both cannot be listened on at once. An unspecified IPv6 address takes IPv4 too.
fn overlap(a: &Listen, b: &Listen) -> bool {
    let (a, b) = match (a, b) {
        (Listen::Tcp(a), Listen::Tcp(b)) => (a, b),
        (Listen::Unix(a), Listen::Unix(b)) => return a == b,
        _ => return false,
    };
    let covers = |one: &SocketAddr, other: &SocketAddr| {
        one.ip().is_unspecified() && (one.is_ipv6() || other.is_ipv4())
    };
    a.port() == b.port() && (a.ip() == b.ip() || covers(a, b) || covers(b, a))
}

fn listen(text: String) -> Result<Listen, String> {
    let Some(path) = text.strip_prefix("unix:") else {
        return address(text).map(Listen::Tcp).map_err(|what| {
            what + ", or unix: and the path of a socket, for example unix:/run/t3-edge/http.sock"
        });
    };
    // The kernel's limit for the path of a socket is 107. The one that is tried before may have a longer name.
    if path.starts_with('/') && path.len() <= 100 && !path.contains('\0') {
        Ok(Listen::Unix(path.into()))
    } else {
        Err(format!(
            "{path:?} is not the path of a socket: it begins with / and has 100 bytes at most"
        ))
    }
}

fn mode(text: String) -> Result<u32, String> {
    match u32::from_str_radix(&text, 8) {
        Ok(mode) if (3..=4).contains(&text.len()) && mode & !0o777 == 0 => Ok(mode),
        _ => Err(format!(
            "{text:?} is not the mode of a socket: write it in quotation marks, for example \"0660\""
        )),
    }
}

fn network(text: String) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse().map(|one: std::net::IpAddr| IpNet::from(one)))
        .map_err(|_| format!("{text:?} is not a network: write for example 10.0.0.0/8 or ::1/128"))
}

fn header_name(text: String) -> Result<HeaderName, String> {
    // These have a meaning of their own, or never reach us as they were sent.
    const NEVER: [&str; 7] = [
        "connection",
        "content-length",
        "cookie",
        "host",
        "te",
        "transfer-encoding",
        "upgrade",
    ];
    match HeaderName::try_from(&text) {
        Ok(name) if !NEVER.contains(&name.as_str()) => Ok(name),
        _ => Err(format!(
            "{text:?} is not the name of a header that can name people"
        )),
    }
}

fn origin(text: String) -> Result<String, String> {
    let origin = text.to_ascii_lowercase();
    let is_host = |host: &str| {
        let parsed = host.parse::<http::uri::Authority>();
        parsed.is_ok() && !host.contains(['@', '*'])
    };
    match url::origin(&origin) {
        Some((scheme, host)) if is_host(host) => Ok(format!("{scheme}://{host}")),
        _ => Err(format!(
            "{text:?} is not an origin: write for example https://t3.example.com"
        )),
    }
}
