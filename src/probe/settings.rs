//! The prober's settings file: the section `probe`, and nothing beside it.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_rustls::rustls::pki_types::CertificateDer;
use yaml_serde::Value;

use crate::config::section::{self, Section, address, certificates, duration, leg_name, plain};
use crate::config::url::{Target, target};
use crate::config::{ConfigError, Fault, Secret};

/// The dispatcher holds so many echoes for one address.
const MOST_LEGS: usize = 16;

/// The dispatcher, and many an edge, ends a WebSocket that is silent for longer than about this.
const LONGEST_HEARTBEAT: Duration = Duration::from_secs(60);

/// Heartbeats more often than this would load the path that they measure.
const SHORTEST_HEARTBEAT: Duration = Duration::from_millis(100);

/// The longest wait for anything, so that what is waited for stays bounded.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// Everything that the prober needs to know.
#[derive(Debug)]
pub struct Settings {
    /// Where the operator asks for `/metrics` and `/healthz`.
    pub listen: SocketAddr,
    /// What shows the dispatcher that a WebSocket is a leg of ours.
    pub token: Option<Secret>,
    /// How often a leg says something.
    pub heartbeat: Duration,
    /// After how long without its echo a heartbeat is lost, and the leg with it.
    pub rtt_timeout: Duration,
    /// Longest wait for each of DNS, connect, TLS and upgrade.
    pub connect_timeout: Duration,
    /// The first wait before a reconnect, and by how much it grows with each try that failed.
    pub reconnect: Duration,
    /// The longest wait before a reconnect.
    pub reconnect_max: Duration,
    /// Certificates that are believed beside the system's.
    pub roots: Vec<CertificateDer<'static>>,
    /// In the order of the file, never empty.
    pub legs: Vec<Leg>,
}

/// One permanent path to the dispatcher or to an instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Leg {
    /// Its name, in the URL, in labels and in log lines.
    pub name: String,
    /// What it speaks.
    pub kind: Kind,
    /// What it asks for.
    pub url: Target,
    /// How it finds the address.
    pub resolve: Resolve,
}

/// What a leg speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A WebSocket that is held, with heartbeats and their echoes.
    WebSocket,
    /// A GET every heartbeat.
    Http,
}

/// How a leg finds the address that it connects to. Everything else stays that of the URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolve {
    /// As the system does.
    System,
    /// It is this one; without a port, the URL's.
    Pinned(IpAddr, Option<u16>),
    /// By DNS over HTTPS, from this server.
    Https(Target),
}

impl Settings {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, is not YAML, or says something that cannot be meant.
    pub fn load(file: &Path) -> Result<Settings, ConfigError> {
        section::load(file, Settings::parse)
    }

    /// The meaning of a settings file's text. Files that it names are read.
    ///
    /// # Errors
    /// All faults of the text.
    pub fn parse(text: &str) -> Result<Settings, Vec<Fault>> {
        let mut top = section::mapping(text)?;
        let mut faults = Vec::new();
        let ours = top.remove("probe").unwrap_or(Value::Null);
        let settings = Settings::read(Section::new("probe".into(), ours, &mut faults));
        faults.extend(top.keys().map(|key| Fault {
            key: plain(key),
            what: "is not a key here; the only one at the top level is probe".into(),
        }));
        if faults.is_empty() {
            Ok(settings)
        } else {
            Err(faults)
        }
    }

    fn read(mut section: Section<'_>) -> Settings {
        let settings = Settings {
            listen: section.take("listen", "0.0.0.0:9108", address),
            token: section.token(),
            heartbeat: section.take("heartbeat", "10s", |text| {
                within(text, SHORTEST_HEARTBEAT, LONGEST_HEARTBEAT)
            }),
            rtt_timeout: section.take("rtt_timeout", "20s", wait),
            connect_timeout: section.take("connect_timeout", "10s", wait),
            reconnect: section.take("reconnect", "3s", wait),
            reconnect_max: section.take("reconnect_max", "30s", wait),
            roots: section.take("ca_file", None::<PathBuf>, |file: Option<PathBuf>| {
                file.map_or(Ok(Vec::new()), |file| certificates(&file))
            }),
            legs: section
                .take_each("legs", Leg::read)
                .into_iter()
                .flatten()
                .collect(),
        };
        if settings.reconnect_max < settings.reconnect && !section.is_faulty("reconnect") {
            section.fault(
                "reconnect_max",
                "is shorter than reconnect: it is the longest wait before a reconnect",
            );
        }
        if settings.legs.is_empty() && !section.is_faulty("legs") {
            section.fault(
                "legs",
                "is empty: name at least one leg, with name, kind and url",
            );
        }
        if settings.legs.len() > MOST_LEGS {
            let what = format!(
                "are {}: the dispatcher takes at most {MOST_LEGS} from one address",
                settings.legs.len()
            );
            section.fault("legs", what);
        }
        let mut names = HashSet::new();
        for leg in &settings.legs {
            if !names.insert(&leg.name) {
                let what = format!("hold {:?} twice: a leg's name is its own", leg.name);
                section.fault("legs", what);
            }
        }
        section.finish();
        settings
    }
}

impl Leg {
    /// The leg, unless a part of it is missing or faulty, which is then told.
    fn read(section: &mut Section<'_>) -> Option<Leg> {
        let name = section.require("name", "write for example cloudflare", leg_name);
        let kind = section.require("kind", "write websocket or http", |text: String| match text
            .as_str()
        {
            "websocket" => Ok(Kind::WebSocket),
            "http" => Ok(Kind::Http),
            _ => Err(format!(
                "{text:?} is not a kind of leg: write websocket or http"
            )),
        });
        let url = section.require(
            "url",
            "write for example wss://t3.example.com/probe/ws",
            |text: String| target(&text, &["wss", "ws", "https", "http"]),
        );
        let resolve = section.take("resolve", "system", resolve);
        let (scheme, url) = url?;
        let (name, kind) = (name?, kind?);
        let (fits, write) = match kind {
            Kind::WebSocket => (matches!(scheme, "ws" | "wss"), "wss:// or ws://"),
            Kind::Http => (matches!(scheme, "http" | "https"), "https:// or http://"),
        };
        if !fits {
            section.fault(
                "url",
                format!("begins with {scheme}://, which a leg of this kind does not speak: write {write}"),
            );
            return None;
        }
        if kind == Kind::WebSocket && url.path.split(['?', '&']).skip(1).any(is_leg_parameter) {
            section.fault(
                "url",
                "has leg= in its query, which the prober adds by itself: leave it out",
            );
            return None;
        }
        if matches!(resolve, Resolve::Https(_)) && url.host.parse::<IpAddr>().is_ok() {
            section.fault(
                "resolve",
                "has nothing to look up, as the URL holds an address: leave it out, or write a name in the URL",
            );
            return None;
        }
        Some(Leg {
            name,
            kind,
            url,
            resolve,
        })
    }
}

fn is_leg_parameter(pair: &str) -> bool {
    pair == "leg" || pair.starts_with("leg=")
}

impl fmt::Display for Resolve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Resolve::System => f.write_str("system"),
            Resolve::Pinned(ip, None) => write!(f, "{ip}"),
            Resolve::Pinned(ip, Some(port)) => write!(f, "{}", SocketAddr::new(*ip, *port)),
            Resolve::Https(server) => write!(f, "https://{}{}", server.authority(), server.path),
        }
    }
}

fn wait(text: String) -> Result<Duration, String> {
    within(text, Duration::from_millis(1), LONGEST_WAIT)
}

fn within(text: String, shortest: Duration, longest: Duration) -> Result<Duration, String> {
    let meant = duration(text.clone())?;
    if (shortest..=longest).contains(&meant) {
        Ok(meant)
    } else {
        Err(format!(
            "{text} is out of range: write {} to {}",
            humantime::format_duration(shortest),
            humantime::format_duration(longest)
        ))
    }
}

fn resolve(text: String) -> Result<Resolve, String> {
    if text == "system" {
        return Ok(Resolve::System);
    }
    if let Ok(ip) = text.parse() {
        return Ok(Resolve::Pinned(ip, None));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return match address.port() {
            0 => Err(format!("{text:?} has no port that can be connected to")),
            port => Ok(Resolve::Pinned(address.ip(), Some(port))),
        };
    }
    if text.starts_with("https://") {
        let (_, server) = target(&text, &["https"])?;
        // The resolver puts the query into the body, and leaves no room for one in the URL.
        return match server.path.contains('?') {
            true => Err(format!(
                "{text:?} has a query: leave out what follows the ?"
            )),
            false => Ok(Resolve::Https(server)),
        };
    }
    Err(format!(
        "{text:?} is no way to resolve: write system, an address such as 192.0.2.7 or 192.0.2.7:8443, or the URL of a \
         server for DNS over HTTPS such as https://1.1.1.1/dns-query"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_to_resolve_read_as_they_are_written() {
        for text in [
            "system",
            "192.0.2.7",
            "192.0.2.7:8443",
            "2001:db8::7",
            "[2001:db8::7]:8443",
            "https://1.1.1.1/dns-query",
            "https://dns.example.com:8443/",
        ] {
            assert_eq!(resolve(text.into()).unwrap().to_string(), text);
        }
        for text in [
            "",
            "dns",
            "192.0.2.7:0",
            "1.1.1.1/dns-query",
            "http://1.1.1.1/",
            "https://1.1.1.1/?a",
        ] {
            resolve(text.into()).unwrap_err();
        }
    }
}
