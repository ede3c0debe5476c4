//! `/probe/ws`: a WebSocket echo for anybody, which reaches no instance.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use http::{StatusCode, header};
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::proxy::Session;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use crate::refuse::Refusal;
use crate::server::{Phase, phase};

/// How long an echo may hear nothing.
const SILENCE: Duration = Duration::from_secs(90);

/// How long the other side may take over its Close frame.
const GOODBYE: Duration = Duration::from_secs(5);

/// The longest message.
const MESSAGE: usize = 64 * 1024;

/// Echoes at once, in all and for one client address.
const ALL: usize = 256;
const EACH: usize = 16;

static PLACES: Mutex<Option<HashMap<IpAddr, usize>>> = Mutex::new(None);

/// A place at the echo, given back when dropped.
struct Place(IpAddr);

impl Place {
    fn take(client: IpAddr) -> Option<Place> {
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        let places = places.get_or_insert_default();
        if places.values().sum::<usize>() >= ALL {
            return None;
        }
        let taken = places.entry(client).or_default();
        if *taken >= EACH {
            return None;
        }
        *taken += 1;
        Some(Place(client))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(places) = places.as_mut()
            && let Some(taken) = places.get_mut(&self.0)
        {
            *taken -= 1;
            if *taken == 0 {
                places.remove(&self.0);
            }
        }
    }
}

/// Echoes to `client` until either side ends it.
///
/// # Errors
/// A refusal, before anything was written; then nothing but the end of the connection.
pub async fn serve(session: &mut Session, client: IpAddr) -> Result<Result<(), Refusal>> {
    let request = session.req_header();
    let key = request
        .headers
        .get("sec-websocket-key")
        .map(|key| derive_accept_key(key.as_bytes()));
    let version = request
        .headers
        .get("sec-websocket-version")
        .is_some_and(|version| version == "13");
    let (Some(accept), true, true) = (key, version, session.is_upgrade_req()) else {
        return Ok(Err(Refusal::NotAWebSocket));
    };
    let Some(_place) = Place::take(client) else {
        return Ok(Err(Refusal::ProbeBusy));
    };
    let mut switch = ResponseHeader::build(StatusCode::SWITCHING_PROTOCOLS, Some(3))?;
    switch.insert_header(header::UPGRADE, "websocket")?;
    switch.insert_header(header::CONNECTION, "Upgrade")?;
    switch.insert_header("Sec-WebSocket-Accept", accept)?;
    session
        .write_response_header(Box::new(switch), false)
        .await?;

    let (near, far) = duplex(MESSAGE);
    let config = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE))
        .max_frame_size(Some(MESSAGE));
    let socket = WebSocketStream::from_raw_socket(near, Role::Server, Some(config)).await;
    pump(session, far, echo(socket)).await?;
    Ok(Ok(()))
}

/// Sends back what comes. Pings are answered by the library.
async fn echo(mut socket: WebSocketStream<DuplexStream>) {
    let mut phase = phase();
    let code = loop {
        let next = tokio::select! {
            next = timeout(SILENCE, socket.next()) => next,
            Ok(_) = phase.wait_for(|phase| *phase == Phase::Leaving) => break CloseCode::Away,
        };
        match next {
            Ok(Some(Ok(message))) if message.is_text() || message.is_binary() => {
                if socket.send(message).await.is_err() {
                    return;
                }
            }
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(Error::Capacity(CapacityError::MessageTooLong { .. })))) => {
                break CloseCode::Size;
            }
            Ok(Some(Err(Error::Utf8(_)))) => break CloseCode::Invalid,
            Ok(Some(Err(Error::Protocol(_)))) => break CloseCode::Protocol,
            // The close handshake is done, or the client is gone.
            Ok(Some(Err(_)) | None) => return,
            Err(_) => break CloseCode::Away,
        }
    };
    let frame = CloseFrame {
        code,
        reason: "".into(),
    };
    if socket.close(Some(frame)).await.is_ok() {
        let rest = async { while let Some(Ok(_)) = socket.next().await {} };
        let _ = timeout(GOODBYE, rest).await;
    }
}

/// Carries bytes between Pingora's session and the stream that the WebSocket library works on.
async fn pump(
    session: &mut Session,
    stream: DuplexStream,
    echo: impl Future<Output = ()>,
) -> Result<()> {
    let (mut from_echo, mut to_echo) = split(stream);
    let (mut coming, mut going) = (Bytes::new(), BytesMut::with_capacity(4096));
    let mut open = true;
    let mut done = false;
    tokio::pin!(echo);
    loop {
        tokio::select! {
            biased;
            read = from_echo.read_buf(&mut going) => match read {
                Ok(0) | Err(_) => return Ok(()),
                Ok(_) => session.write_response_body(Some(going.split().freeze()), false).await?,
            },
            // Its end is dropped with it, so what is left of its bytes is read above, then the end.
            () = &mut echo, if !done => done = true,
            written = to_echo.write(&coming), if !done && !coming.is_empty() => match written {
                Ok(written) => coming.advance(written),
                Err(_) => coming.clear(),
            },
            read = session.read_request_body(), if !done && open && coming.is_empty() => match read? {
                Some(bytes) => coming = bytes,
                None => {
                    open = false;
                    let _ = to_echo.shutdown().await;
                }
            },
        }
    }
}
