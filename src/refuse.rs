//! Every refusal: its code, its status, its sentence, and the page that a person sees. No policy lives here.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, StatusCode};
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::proxy::Session;

use crate::head::HeadError;
use crate::identity::IdentityError;

/// Header that carries [`Refusal::code`], for machines and for the operator's log of the edge.
pub const ERROR_HEADER: &str = "X-T3-Dispatch-Error";

/// Why a request was not served. `docs/errors.md` has a section for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The connection comes from an address whose identity header is not believed.
    UntrustedProxy(IpAddr),
    /// The identity header is there twice or in a look-alike spelling.
    AmbiguousIdentity(HeaderName),
    /// The identity header and the token name two people, or the token proves nothing.
    BadToken(IdentityError),
    /// No token can be verified yet.
    NoKeys,
    /// Nobody is named, or the table has no such name.
    UnknownUser,
    /// The mint failed or took too long.
    MintFailed,
    /// The mint printed something else than a credential.
    MintUnparseable,
    /// No pairing endpoint of the instance could be reached.
    BootstrapFailed,
    /// A pairing endpoint did not take the credential.
    BootstrapRejected,
    /// A pairing endpoint took the credential and set no session cookie.
    BootstrapNoCookie,
    /// Too many pairings wait for their turn.
    PairingBusy,
    /// The user was paired too often within a minute; a place is free again after that many seconds.
    PairingTooOften(u64),
    /// The instance does not take connections.
    InstanceUnreachable,
    /// The instance took the request and broke off before it answered.
    InstanceFailed,
    /// The instance took a WebSocket's handshake and did not answer it.
    InstanceSilent,
    /// As much is under way at the instance as may be.
    InstanceBusy,
    /// This process has no file descriptor left to reach the instance with.
    OutOfDescriptors,
    /// The echo is for WebSockets.
    NotAWebSocket,
    /// The echo has no place left.
    ProbeBusy,
    /// A page of another site wants to open a WebSocket.
    CrossOrigin,
    /// The request cannot be passed on as it is.
    BadRequest,
    /// The request's head is not one that can be passed on.
    Head(HeadError),
    /// The request's head did not come to its end in time.
    HeadTooSlow,
    /// There are as many connections as there may be.
    TooManyConnections,
    /// A fault of ours.
    Internal,
}

/// What a person is told beside the sentence.
struct Advice {
    title: &'static str,
    text: &'static str,
    /// Whether waiting can help, so that the page tries again by itself.
    passing: bool,
}

impl Refusal {
    /// The stable code, a section of `docs/errors.md`.
    pub fn code(&self) -> &'static str {
        match self {
            Refusal::UntrustedProxy(_) => "untrusted-proxy",
            Refusal::AmbiguousIdentity(_) => "ambiguous-identity",
            Refusal::BadToken(_) => "bad-token",
            Refusal::NoKeys => "no-keys",
            Refusal::UnknownUser => "unknown-user",
            Refusal::MintFailed => "mint-failed",
            Refusal::MintUnparseable => "mint-unparseable",
            Refusal::BootstrapFailed => "bootstrap-failed",
            Refusal::BootstrapRejected => "bootstrap-rejected",
            Refusal::BootstrapNoCookie => "bootstrap-no-cookie",
            Refusal::PairingBusy => "pairing-busy",
            Refusal::PairingTooOften(_) => "pairing-too-often",
            Refusal::InstanceUnreachable => "instance-unreachable",
            Refusal::InstanceFailed => "instance-failed",
            Refusal::InstanceSilent => "instance-silent",
            Refusal::InstanceBusy => "instance-busy",
            Refusal::OutOfDescriptors => "out-of-descriptors",
            Refusal::NotAWebSocket => "not-a-websocket",
            Refusal::ProbeBusy => "probe-busy",
            Refusal::CrossOrigin => "cross-origin",
            Refusal::Head(HeadError::TooLarge) => "head-too-large",
            Refusal::BadRequest | Refusal::Head(_) => "bad-request",
            Refusal::HeadTooSlow => "head-too-slow",
            Refusal::TooManyConnections => "too-many-connections",
            Refusal::Internal => "internal",
        }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Refusal::Head(HeadError::TooLarge) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Refusal::AmbiguousIdentity(_)
            | Refusal::BadToken(IdentityError::Contradiction(_))
            | Refusal::BadRequest
            | Refusal::Head(_)
            | Refusal::NotAWebSocket => StatusCode::BAD_REQUEST,
            Refusal::HeadTooSlow => StatusCode::REQUEST_TIMEOUT,
            Refusal::UntrustedProxy(_)
            | Refusal::BadToken(_)
            | Refusal::UnknownUser
            | Refusal::CrossOrigin => StatusCode::FORBIDDEN,
            Refusal::InstanceSilent => StatusCode::GATEWAY_TIMEOUT,
            Refusal::PairingTooOften(_) => StatusCode::TOO_MANY_REQUESTS,
            Refusal::MintFailed | Refusal::MintUnparseable | Refusal::Internal => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
            Refusal::BootstrapFailed
            | Refusal::BootstrapRejected
            | Refusal::BootstrapNoCookie
            | Refusal::InstanceUnreachable
            | Refusal::InstanceFailed => StatusCode::BAD_GATEWAY,
            Refusal::PairingBusy
            | Refusal::ProbeBusy
            | Refusal::InstanceBusy
            | Refusal::OutOfDescriptors
            | Refusal::TooManyConnections
            | Refusal::NoKeys => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The sentence that is the whole plain-text body.
    pub fn sentence(&self) -> String {
        match self {
            Refusal::UntrustedProxy(peer) => IdentityError::UntrustedPeer(*peer).to_string(),
            Refusal::AmbiguousIdentity(header) => IdentityError::Ambiguous(header.clone()).to_string(),
            Refusal::BadToken(error) => error.to_string(),
            Refusal::NoKeys => IdentityError::NoKeys.to_string(),
            Refusal::UnknownUser => "no t3 instance provisioned for this user".into(),
            Refusal::MintFailed => "pairing mint failed".into(),
            Refusal::MintUnparseable => "unparseable pairing output".into(),
            Refusal::BootstrapFailed => "bootstrap request failed".into(),
            Refusal::BootstrapRejected => "bootstrap rejected".into(),
            Refusal::BootstrapNoCookie => "bootstrap set no session cookie".into(),
            Refusal::PairingBusy => "too many pairings are waiting; try again shortly".into(),
            Refusal::PairingTooOften(_) => {
                "paired too often within a minute; the browser probably does not keep the session cookie".into()
            }
            Refusal::InstanceUnreachable => "t3 instance is not reachable".into(),
            Refusal::InstanceFailed => "t3 instance ended the connection without an answer".into(),
            Refusal::InstanceSilent => "t3 instance does not answer".into(),
            Refusal::InstanceBusy => "too much is under way at this t3 instance; try again shortly".into(),
            Refusal::OutOfDescriptors => "no file descriptor is left; try again shortly".into(),
            Refusal::NotAWebSocket => "this address takes WebSockets only".into(),
            Refusal::ProbeBusy => "too many probes at once".into(),
            Refusal::CrossOrigin => {
                "a page of another origin may not open WebSockets: add it to dispatch.tunnels.allowed_origins if it may".into()
            }
            Refusal::BadRequest => "the request cannot be passed on".into(),
            Refusal::Head(error) => error.to_string(),
            Refusal::HeadTooSlow => "the head of the request took too long".into(),
            Refusal::TooManyConnections => "too many connections".into(),
            Refusal::Internal => "internal error".into(),
        }
    }

    fn retry_after(&self) -> Option<u64> {
        match self {
            Refusal::PairingBusy
            | Refusal::ProbeBusy
            | Refusal::InstanceBusy
            | Refusal::OutOfDescriptors
            | Refusal::TooManyConnections
            | Refusal::NoKeys => Some(5),
            Refusal::PairingTooOften(seconds) => Some(*seconds),
            _ => None,
        }
    }

    fn advice(&self) -> Advice {
        let (title, text, passing) = match self {
            Refusal::UntrustedProxy(_) => (
                "This way in is closed",
                "Open the workspace by the address you sign in at. If this is that address, whoever runs this service \
                 has to name the sign-on edge in its settings.",
                false,
            ),
            Refusal::AmbiguousIdentity(_) => (
                "It is unclear who you are",
                "The request named you more than once. This comes from the sign-on edge or from an add-on in between; \
                 whoever runs this service has to look into it.",
                false,
            ),
            Refusal::BadToken(_) => (
                "Your sign-in could not be verified",
                "Sign out and in again. If it stays like this, whoever runs this service has to look into it.",
                false,
            ),
            Refusal::NoKeys => (
                "Your sign-in cannot be verified yet",
                "The sign-on service has not answered so far. This page tries again by itself.",
                true,
            ),
            Refusal::UnknownUser => (
                "There is no workspace for you yet",
                "You are signed in, but nobody has set up a t3 workspace under your name. Ask whoever runs this service \
                 to add you, or sign in with another account.",
                false,
            ),
            Refusal::MintFailed | Refusal::MintUnparseable => (
                "Your workspace could not be unlocked",
                "The step that issues your key to the workspace failed. Try again; if it keeps failing, whoever runs \
                 this service has to look into it.",
                false,
            ),
            Refusal::BootstrapFailed | Refusal::InstanceUnreachable => (
                "Your workspace is not running",
                "It may be starting or restarting, which takes a few seconds. This page tries again by itself. If it \
                 stays like this, whoever runs this service has to start it.",
                true,
            ),
            Refusal::BootstrapRejected | Refusal::BootstrapNoCookie => (
                "Your workspace did not let you in",
                "It is running, but it did not accept a freshly issued key. Try again; if it keeps failing, whoever \
                 runs this service has to look into it.",
                false,
            ),
            Refusal::PairingBusy => (
                "Many people are signing in",
                "Your turn will come in a few seconds. This page tries again by itself.",
                true,
            ),
            Refusal::PairingTooOften(_) => (
                "Your browser does not stay signed in",
                "It was let in several times within a minute and came back without its cookie each time. Allow cookies \
                 for this site, close private windows that block them, then try again in a minute.",
                false,
            ),
            Refusal::InstanceFailed => (
                "Your workspace broke off",
                "It took the request and ended the connection without an answer. This page tries again by itself.",
                true,
            ),
            Refusal::InstanceBusy => (
                "Too much is waiting for your workspace",
                "It may hang, or an add-on asks it without end. Close what you do not need; this page tries again by itself.",
                true,
            ),
            Refusal::OutOfDescriptors => (
                "Too much is going on at once",
                "Your workspace is well, but it cannot be reached right now. This page tries again by itself.",
                true,
            ),
            Refusal::NotAWebSocket => (
                "There is nothing to see here",
                "This address is for probes, which speak WebSocket.",
                false,
            ),
            // No page opens WebSockets by navigating, so nobody sees these.
            Refusal::ProbeBusy => ("Too many probes", "Try again in a few seconds.", true),
            Refusal::InstanceSilent => (
                "Your workspace does not answer",
                "It is running, but it hangs.",
                true,
            ),
            Refusal::CrossOrigin => (
                "This page may not connect",
                "It belongs to another site.",
                false,
            ),
            Refusal::Head(HeadError::TooLarge) => (
                "Your browser sent too much at once",
                "Most of it are cookies, as a rule. Delete those of this site, then try again.",
                false,
            ),
            // These are answered before anybody knows whether a page would be of use.
            Refusal::HeadTooSlow => ("This request came too slowly", "Try again.", false),
            Refusal::TooManyConnections => (
                "Too many people at once",
                "Try again in a few seconds.",
                true,
            ),
            Refusal::BadRequest | Refusal::Head(_) => (
                "This request cannot be passed on",
                "The browser or something in between sent a request that is not well formed.",
                false,
            ),
            Refusal::Internal => (
                "Something went wrong here",
                "This is a fault of the service itself. Try again; if it stays, tell whoever runs this service.",
                false,
            ),
        };
        Advice {
            title,
            text,
            passing,
        }
    }

    /// The page for a person: one self-contained file, light and dark.
    fn page(&self, user: Option<&str>) -> String {
        let Advice {
            title,
            text,
            passing,
        } = self.advice();
        let refresh = if passing {
            "<meta http-equiv=\"refresh\" content=\"5\">\n"
        } else {
            ""
        };
        let signed_in = user
            .map(|user| format!("<dt>Signed in as</dt><dd>{}</dd>", escape(user)))
            .unwrap_or_default();
        format!(
            include_str!("refuse.html"),
            refresh = refresh,
            title = title,
            text = text,
            sentence = escape(&self.sentence()),
            code = self.code(),
            status = self.status().as_u16(),
            signed_in = signed_in,
        )
    }

    /// The whole answer, for a connection that is closed after it and that Pingora does not answer on.
    pub fn bare(&self) -> Vec<u8> {
        let (status, body) = (self.status(), self.sentence() + "\n");
        let retry = self
            .retry_after()
            .map(|seconds| format!("Retry-After: {seconds}\r\n"))
            .unwrap_or_default();
        format!(
            "HTTP/1.1 {} {}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\
             Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{ERROR_HEADER}: {}\r\n{retry}\
             Connection: close\r\n\r\n{body}",
            status.as_u16(),
            status.canonical_reason().unwrap_or_default(),
            body.len(),
            self.code(),
        )
        .into_bytes()
    }

    /// Answers the request with this refusal: as a page where `page`, else as one plain sentence.
    ///
    /// # Errors
    /// When the client is gone.
    pub async fn send(&self, session: &mut Session, page: bool, user: Option<&str>) -> Result<()> {
        let (kind, body) = if page {
            ("text/html; charset=utf-8", self.page(user))
        } else {
            ("text/plain; charset=utf-8", self.sentence() + "\n")
        };
        let mut header = ResponseHeader::build(self.status(), Some(8))?;
        header.insert_header(http::header::CONTENT_TYPE, kind)?;
        header.insert_header(http::header::CACHE_CONTROL, "no-store")?;
        header.insert_header("X-Content-Type-Options", "nosniff")?;
        header.insert_header(ERROR_HEADER, self.code())?;
        if page {
            let policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";
            header.insert_header(http::header::CONTENT_SECURITY_POLICY, policy)?;
        }
        if let Some(seconds) = self.retry_after() {
            header.insert_header(http::header::RETRY_AFTER, seconds)?;
        }
        answer(session, header, body.into()).await
    }
}

/// Text made harmless inside an HTML element.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// How much of an unread request body is still taken in after an answer, and for how long.
const LINGER_BYTES: usize = 256 * 1024;
const LINGER: Duration = Duration::from_secs(2);

/// Writes a whole answer of our own.
///
/// # Errors
/// When the client is gone.
pub async fn answer(session: &mut Session, mut header: ResponseHeader, body: Bytes) -> Result<()> {
    header.insert_header(http::header::CONTENT_LENGTH, body.len())?;
    let bare = body.is_empty() || session.req_header().method == http::Method::HEAD;
    session
        .write_response_header(Box::new(header), bare)
        .await?;
    if !bare {
        session.write_response_body(Some(body), true).await?;
    }
    // Closing a socket with unread bytes in it resets the connection, and the client may lose the answer. So a body of
    // usual size is read to its end; Pingora closes the connection afterwards in any case.
    let linger = async {
        let mut read = 0;
        while let Ok(Some(chunk)) = session.read_request_body().await {
            read += chunk.len();
            if read > LINGER_BYTES {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, linger).await;
    Ok(())
}
