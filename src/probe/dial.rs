//! From a leg to an open connection, each step timed by itself: DNS, connect, TLS, and the upgrade or the answer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Empty;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, CertificateError, ClientConfig};
use tokio_tungstenite::tungstenite::error::{Error, ProtocolError};
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use crate::https::{self, Connection, ExchangeError, TlsError};

use super::reason::{Failure, Reason};
use super::resolve;
use super::settings::{Leg, Resolve, Settings};

/// The header in which the dispatcher repeats the name of a leg that it knows.
const LEG: &str = "x-t3-leg";

/// The longest message that is taken. Echoes are about 1 KiB.
const MESSAGE: usize = 64 * 1024;

/// The longest answer that an HTTP leg reads.
const ANSWER: usize = 1024 * 1024;

/// How long each step took. A step that was not taken has no time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Steps {
    /// From the name to its addresses.
    pub dns: Option<Duration>,
    /// To the open TCP connection, addresses that failed included.
    pub connect: Option<Duration>,
    /// The TLS handshake.
    pub tls: Option<Duration>,
    /// The WebSocket handshake, or the whole HTTP answer.
    pub upgrade: Option<Duration>,
    /// From a message to its echo.
    pub echo: Option<Duration>,
}

/// An open WebSocket.
pub type Socket = WebSocketStream<Box<dyn Connection>>;

/// What all connections are made with. No two share anything but this.
pub struct Dialer {
    tls: Arc<ClientConfig>,
    limit: Duration,
    /// `Authorization`, marked as sensitive.
    authorization: Option<HeaderValue>,
}

impl Dialer {
    /// Reads the system's certificate authorities if a leg needs them.
    ///
    /// # Errors
    /// When a leg speaks TLS and no authority is known.
    pub fn new(settings: &Settings) -> Result<Dialer, TlsError> {
        let needed = settings
            .legs
            .iter()
            .any(|leg| leg.url.tls || matches!(leg.resolve, Resolve::Https(_)));
        let mut tls = https::tls(&settings.roots, needed)?;
        // Each connection looks at the certificate anew, and none resumes what another leg began.
        tls.resumption = Resumption::disabled();
        let authorization = settings.token.as_ref().and_then(|token| {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", token.reveal())).ok()?;
            value.set_sensitive(true);
            Some(value)
        });
        Ok(Dialer {
            tls: Arc::new(tls),
            limit: settings.connect_timeout,
            authorization,
        })
    }

    /// A WebSocket, and whether the dispatcher knows the leg; `None` where it had no token to know it by.
    ///
    /// # Errors
    /// The step that failed; those before it have left their times in `steps`.
    pub async fn upgrade(
        &self,
        leg: &Leg,
        steps: &mut Steps,
    ) -> Result<(Socket, Option<bool>), Failure> {
        let stream = self.connect(leg, steps).await?;
        let begun = Instant::now();
        let url = &leg.url;
        let scheme = if url.tls { "wss" } else { "ws" };
        let path = url.path_with("leg", &leg.name);
        let mut request = Request::builder()
            .uri(format!("{scheme}://{}{path}", url.authority()))
            .header(header::HOST, url.authority())
            .header(header::CONNECTION, "Upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, generate_key())
            .header(header::USER_AGENT, AGENT);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let request = request.body(()).map_err(unsendable)?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE))
            .max_frame_size(Some(MESSAGE));
        let shaken = timeout(
            self.limit,
            client_async_with_config(request, stream, Some(config)),
        );
        match shaken.await {
            Ok(Ok((socket, response))) => {
                steps.upgrade = Some(begun.elapsed());
                let known = self.authorization.as_ref().map(|_| {
                    response
                        .headers()
                        .get(LEG)
                        .is_some_and(|name| name == leg.name.as_str())
                });
                Ok((socket, known))
            }
            Ok(Err(error)) => Err(not_upgraded(error)),
            Err(_) => Err(self.too_late("no answer to the WebSocket handshake")),
        }
    }

    /// Asks once, over a connection of its own, and gives the time from the request to the end of its answer.
    ///
    /// # Errors
    /// The step that failed, or an answer other than 200 within `limit`.
    pub async fn get(
        &self,
        leg: &Leg,
        limit: Duration,
        steps: &mut Steps,
    ) -> Result<Duration, Failure> {
        let stream = self.connect(leg, steps).await?;
        let request = Request::builder()
            .uri(&leg.url.path)
            .header(header::HOST, leg.url.authority())
            .header(header::ACCEPT, "*/*")
            .header(header::USER_AGENT, AGENT)
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(unsendable)?;
        let begun = Instant::now();
        let late = || {
            let what = format!("no whole answer within {limit:?}");
            Failure::new(Reason::RttTimeout, what)
        };
        let broken = |error: ExchangeError| Failure::new(Reason::IoError, error.to_string());
        let answer = timeout(limit, https::exchange(stream, request, ANSWER))
            .await
            .map_err(|_| late())?
            .map_err(broken)?;
        if answer.status() != StatusCode::OK {
            return Err(answered(&answer));
        }
        let took = begun.elapsed();
        steps.upgrade = Some(took);
        Ok(took)
    }

    async fn connect(&self, leg: &Leg, steps: &mut Steps) -> Result<Box<dyn Connection>, Failure> {
        let begun = Instant::now();
        let addresses = resolve::addresses(leg, &self.tls, self.limit).await?;
        if resolve::is_needed(leg) {
            steps.dns = Some(begun.elapsed());
        }
        let begun = Instant::now();
        let stream = self.connect_first(&addresses).await?;
        steps.connect = Some(begun.elapsed());
        if !leg.url.tls {
            return Ok(Box::new(stream));
        }
        let begun = Instant::now();
        let name = ServerName::try_from(leg.url.host.clone())
            .map_err(|error| Failure::new(Reason::TlsFailed, error.to_string()))?;
        let shaken = TlsConnector::from(self.tls.clone()).connect(name, stream);
        match timeout(self.limit, shaken).await {
            Ok(Ok(stream)) => {
                steps.tls = Some(begun.elapsed());
                Ok(Box::new(stream))
            }
            Ok(Err(error)) => Err(no_tls(&error)),
            Err(_) => Err(self.too_late("no answer to the TLS handshake")),
        }
    }

    /// The first address that takes a connection. The failure is the last one's, in the words of all.
    async fn connect_first(&self, addresses: &[SocketAddr]) -> Result<TcpStream, Failure> {
        let mut said = Vec::new();
        let mut reason = Reason::ConnectFailed;
        for address in addresses {
            match timeout(self.limit, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    // Small messages go at once; a system that cannot do so only makes them later.
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Ok(Err(error)) => {
                    reason = match error.kind() {
                        io::ErrorKind::TimedOut => Reason::ConnectTimeout,
                        _ => Reason::ConnectFailed,
                    };
                    said.push(format!("{address}: {error}"));
                }
                Err(_) => {
                    reason = Reason::ConnectTimeout;
                    said.push(format!("{address}: no answer within {:?}", self.limit));
                }
            }
        }
        Err(Failure::new(reason, said.join("; ")))
    }

    fn too_late(&self, what: &str) -> Failure {
        Failure::new(
            Reason::ConnectTimeout,
            format!("{what} within {:?}", self.limit),
        )
    }
}

const AGENT: &str = concat!("t3-dispatch/", env!("CARGO_PKG_VERSION"), " probe");

/// Settings are such that this cannot happen; the error's text holds no header.
fn unsendable(error: http::Error) -> Failure {
    Failure::new(Reason::IoError, format!("the request: {error}"))
}

fn no_tls(error: &io::Error) -> Failure {
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext {
            expected,
            presented,
        })) => {
            let what = format!(
                "the certificate is not valid for name {}, but for {}",
                expected.to_str(),
                presented
                    .iter()
                    .map(|name| name.split('"').nth(1).unwrap_or(name))
                    .collect::<Vec<_>>()
                    .join(", ")
            );
            Failure::new(Reason::TlsFailed, what)
        }
        Some(fault) => Failure::new(Reason::TlsFailed, format!("TLS: {fault}")),
        None => Failure::new(Reason::IoError, format!("in the TLS handshake: {error}")),
    }
}

fn not_upgraded(error: Error) -> Failure {
    let what = match error {
        Error::Http(response) => return answered(&response),
        Error::Protocol(ProtocolError::HandshakeIncomplete) => {
            "the connection ended before the answer to the WebSocket handshake".into()
        }
        // The request itself is at fault in the others, and could be in their text.
        Error::Io(error) => format!("in the WebSocket handshake: {error}"),
        Error::Protocol(error) => format!("in the WebSocket handshake: {error}"),
        Error::Capacity(error) => format!("in the WebSocket handshake: {error}"),
        _ => "the answer to the WebSocket handshake makes no sense".into(),
    };
    Failure::new(Reason::IoError, what)
}

fn answered<T>(response: &Response<T>) -> Failure {
    let status = response.status();
    let mut what = format!("answered with {status}");
    let place = response
        .headers()
        .get(header::LOCATION)
        .and_then(|place| place.to_str().ok());
    if let Some(place) = place {
        // What follows may be worth a session.
        let place = place.split(['?', '#']).next().unwrap_or_default();
        what += &format!(" to {place}");
    }
    Failure::new(Reason::Http(status.as_u16()), what)
}
