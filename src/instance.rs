//! Our own HTTP calls to an instance: the session check and the credential exchange.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use pingora::connectors::http::v1::Connector;
use pingora::connectors::l4::Connect;
use pingora::http::RequestHeader;
use pingora::prelude::HttpPeer;
use pingora::protocols::http::v1::client::HttpSession;
use pingora::{Error, ErrorType, Result};

use crate::pool::Checkout;
use crate::table::Instance;

/// Most that is read of an answer's body; real ones have a few hundred bytes.
const BODY_LIMIT: usize = 256 * 1024;

/// The address that an instance listens on.
pub fn address(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// An instance's answer to a call.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Vec<u8>,
}

/// Makes the calls. One serves the whole process.
pub struct Caller {
    connector: Connector,
    /// Whether it may use kept connections again, and leave some behind.
    keeps: bool,
}

impl Caller {
    /// One that keeps connections, or has a new one for each call.
    pub fn new(keeps: bool) -> Caller {
        Caller {
            connector: Connector::new(None),
            keeps,
        }
    }
}

impl Caller {
    /// Asks for `path`, over a kept connection where there is one.
    ///
    /// # Errors
    /// When there is no whole answer within `limit`, or it is longer than 256 KiB.
    pub async fn get(
        &self,
        instance: &Instance,
        path: &str,
        cookie: Option<&HeaderValue>,
        limit: Duration,
    ) -> Result<Answer> {
        within(limit, async {
            let mut request = request(Method::GET, path, instance.port)?;
            if let Some(cookie) = cookie {
                request.insert_header(header::COOKIE, cookie)?;
            }
            let checkout = Checkout::new(self.keeps.then(|| instance.pool()));
            let is_reused = checkout.is_reused();
            let peer = peer(instance, Arc::new(checkout));
            let (session, _) = self.connector.get_http_session(&peer).await?;
            match exchange(session, &request).await {
                Ok((answer, session)) => {
                    self.connector
                        .release_http_session(session, &peer, None)
                        .await;
                    Ok(answer)
                }
                // The instance may have closed the kept connection at that very moment.
                Err(_) if is_reused => {
                    let session = self.connect(instance).await?;
                    Ok(exchange(session, &request).await?.0)
                }
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Posts `body` as JSON, over a connection of its own: a credential must not be lost to a connection that the
    /// instance is about to close. The answer's head is all that counts, so its body is left unread.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn post_json(&self, instance: &Instance, path: &str, body: &[u8]) -> Result<Answer> {
        let mut request = request(Method::POST, path, instance.port)?;
        request.insert_header(header::CONTENT_TYPE, "application/json")?;
        request.insert_header(header::CONTENT_LENGTH, body.len())?;
        let mut session = self.connect(instance).await?;
        let (status, headers) = ask(&mut session, &request, body).await?;
        Ok(Answer {
            status,
            headers,
            body: Vec::new(),
        })
    }

    /// A connection of its own.
    async fn connect(&self, instance: &Instance) -> Result<HttpSession> {
        let peer = peer(instance, Arc::new(Checkout::new(None)));
        Ok(self.connector.get_http_session(&peer).await?.0)
    }
}

/// Gives up on a call after `limit`.
///
/// # Errors
/// The call's own, or a timeout.
pub async fn within<T>(limit: Duration, call: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, call).await {
        Ok(result) => result,
        Err(_) => Error::e_explain(
            ErrorType::ReadTimedout,
            format!("no answer within {limit:?}"),
        ),
    }
}

/// The instance as a place that `connect` opens connections to. None of them meets Pingora's own pool.
pub fn peer(instance: &Instance, connect: Arc<dyn Connect + Send + Sync>) -> HttpPeer {
    let mut peer = HttpPeer::new(address(instance.port), false, String::new());
    peer.options.custom_l4 = Some(connect);
    peer
}

fn request(method: Method, path: &str, port: u16) -> Result<RequestHeader> {
    let mut request = RequestHeader::build(method, path.as_bytes(), Some(5))?;
    request.insert_header(header::HOST, address(port).to_string())?;
    request.insert_header(header::ACCEPT, "application/json")?;
    Ok(request)
}

/// Sends a request, and reads the head of the answer.
async fn ask(
    session: &mut HttpSession,
    request: &RequestHeader,
    body: &[u8],
) -> Result<(StatusCode, HeaderMap)> {
    session
        .write_request_header(Box::new(request.clone()))
        .await?;
    if !body.is_empty() {
        session.write_body(body).await?;
    }
    session.finish_body().await?;
    loop {
        session.read_response().await?;
        let head = session.resp_header().ok_or_else(|| {
            Error::explain(
                ErrorType::InternalError,
                "no response head after reading it",
            )
        })?;
        if !head.status.is_informational() {
            return Ok((head.status, head.headers.clone()));
        }
    }
}

/// Sends a request without a body, and reads the whole answer.
async fn exchange(
    mut session: HttpSession,
    request: &RequestHeader,
) -> Result<(Answer, HttpSession)> {
    let (status, headers) = ask(&mut session, request, b"").await?;
    let mut body = Vec::new();
    while let Some(chunk) = session.read_body_bytes().await? {
        if body.len() + chunk.len() > BODY_LIMIT {
            return Error::e_explain(ErrorType::ReadError, "the answer is longer than 256 KiB");
        }
        body.extend_from_slice(&chunk);
    }
    Ok((
        Answer {
            status,
            headers,
            body,
        },
        session,
    ))
}
