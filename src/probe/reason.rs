//! Why a leg went down, or did not come up.

use std::fmt;

/// The label of a disconnect. docs/probe.md says what each means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// No address took the connection.
    ConnectFailed,
    /// Connect, TLS or upgrade took too long.
    ConnectTimeout,
    /// There was no address to connect to.
    DnsFailed,
    /// TLS was not agreed on; mostly a certificate that is not believed.
    TlsFailed,
    /// An echo, or an HTTP answer, took too long.
    RttTimeout,
    /// The connection broke, or spoke another language.
    IoError,
    /// The other side sent a Close frame with this code; 1005 for one without.
    Closed(u16),
    /// The request was answered with this status, and not as hoped.
    Http(u16),
}

impl Reason {
    /// The reasons whose series are there from the start: all that bear no number, and the usual ones that do.
    pub fn usual() -> impl Iterator<Item = Reason> {
        let codes = [1000, 1001, 1005, 1006, 1011, 1012];
        let statuses = [401, 403, 404, 429, 500, 502, 503, 504];
        [
            Reason::ConnectFailed,
            Reason::ConnectTimeout,
            Reason::DnsFailed,
            Reason::TlsFailed,
            Reason::RttTimeout,
            Reason::IoError,
        ]
        .into_iter()
        .chain(codes.map(Reason::Closed))
        .chain(statuses.map(Reason::Http))
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::ConnectFailed => f.write_str("connect_failed"),
            Reason::ConnectTimeout => f.write_str("connect_timeout"),
            Reason::DnsFailed => f.write_str("dns_failed"),
            Reason::TlsFailed => f.write_str("tls_failed"),
            Reason::RttTimeout => f.write_str("rtt_timeout"),
            Reason::IoError => f.write_str("io_error"),
            Reason::Closed(code) => write!(f, "closed_{code}"),
            Reason::Http(status) => write!(f, "http_{status}"),
        }
    }
}

/// A reason, with what was seen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct Failure {
    /// The label.
    pub reason: Reason,
    /// What was seen, in words and without secrets.
    pub what: String,
}

impl Failure {
    /// A failure of which `what` was seen.
    pub fn new(reason: Reason, what: impl Into<String>) -> Failure {
        Failure {
            reason,
            what: what.into(),
        }
    }

    /// What to do about it, where that is known.
    pub fn remedy(&self) -> Option<&'static str> {
        Some(match self.reason {
            Reason::DnsFailed => {
                "the name must be in the DNS that this leg asks (`resolve`); for DNS over HTTPS, see that its server can be \
                 reached from here"
            }
            Reason::ConnectFailed => {
                "see that something listens there, and that no firewall refuses; the address is that of `resolve`"
            }
            Reason::ConnectTimeout => {
                "something drops the packets or hangs: look at firewalls and routes, then at the server itself"
            }
            Reason::TlsFailed
                if ["UnknownIssuer", "BadSignature"]
                    .iter()
                    .any(|fault| self.what.contains(fault)) =>
            {
                "the certificate is not trusted here: name its authority's file in probe.ca_file"
            }
            Reason::TlsFailed if self.what.contains("not valid for name") => {
                "the server has a certificate for another name: see that it knows the name in `url`, and that `resolve` leads \
                 to the right server"
            }
            Reason::TlsFailed if self.what.contains("expired") => {
                "the certificate has run out: renew it, or set this machine's clock"
            }
            Reason::TlsFailed => {
                "see the server's certificate, and that it speaks TLS on this port"
            }
            Reason::RttTimeout => {
                "the way is open, but what is sent there does not come back: see what lies between, then the server"
            }
            Reason::IoError => {
                "something on the way ended the connection: see the logs of the proxies between, and that they let WebSockets \
                 through"
            }
            Reason::Http(300..400) => "/probe is behind the sign-on: leave it out at the edge",
            Reason::Http(400) => {
                "the server, or a proxy before it, did not take the request as a WebSocket: let the proxy pass Upgrade and \
                 Connection"
            }
            Reason::Http(401 | 403) => {
                "somebody on the way wants a sign-in, or bars this address: leave /probe out there"
            }
            Reason::Http(404) => {
                "nothing is at this path: see the URL, and that the host leads to t3-dispatch (/probe/ws) or t3 serve"
            }
            Reason::Http(429 | 503) => {
                "the server has no place left, or is going down: try again, and see how many probers there are"
            }
            Reason::Http(500..600) => {
                "the proxy before the server cannot reach it, or the server is in trouble: see their logs"
            }
            Reason::Closed(_) => "the server ended it by itself: see its log",
            Reason::Http(_) => return None,
        })
    }
}
