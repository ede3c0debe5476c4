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
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use super::far::Far;
use crate::refuse::Refusal;
use crate::room::network;
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
        let client = network(client);
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

/// Echoes to `client`, or to a leg, until either side ends it.
///
/// # Errors
/// A refusal, before anything was written; then nothing but the end of the connection.
pub async fn serve(
    session: &mut Session,
    client: IpAddr,
    leg: Option<Far>,
) -> Result<Result<(), Refusal>> {
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
    // A leg has a place of its own: whoever floods the echo must not blind us.
    let place = Place::take(client);
    if place.is_none() && leg.is_none() {
        return Ok(Err(Refusal::ProbeBusy));
    }
    let mut switch = ResponseHeader::build(StatusCode::SWITCHING_PROTOCOLS, Some(4))?;
    if let Some(leg) = &leg {
        // So that a prober learns whether its token was right.
        switch.insert_header("X-T3-Leg", leg.name())?;
    }
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
    let leg = Mutex::new(leg);
    pump(session, far, echo(socket, &leg), &leg).await?;
    Ok(Ok(()))
}

/// Does something with the far end of the leg, if this is one.
fn with<T>(leg: &Mutex<Option<Far>>, what: impl FnOnce(&mut Far) -> T) -> Option<T> {
    let mut leg = leg.lock().unwrap_or_else(PoisonError::into_inner);
    leg.as_mut().map(what)
}

/// Waits until this process leaves.
async fn left(phase: &mut watch::Receiver<Phase>) {
    let _ = phase.wait_for(|phase| *phase == Phase::Leaving).await;
}

/// Sends back what comes. Pings are answered by the library; a leg is pinged as well.
async fn echo(mut socket: WebSocketStream<DuplexStream>, leg: &Mutex<Option<Far>>) {
    let mut phase = phase();
    let mut leaving = false;
    let mut heard = Instant::now();
    let mut pinged = Instant::now();
    let (code, why) = loop {
        // An answer that is under way is waited for, so that a leg that has just broken is not taken for one that moved.
        if leaving && !with(leg, Far::owes).unwrap_or(false) {
            break (CloseCode::Away, None);
        }
        let pause = with(leg, |leg| leg.pause()).unwrap_or(SILENCE);
        let next = tokio::select! {
            next = timeout_at(heard + SILENCE, socket.next()) => next,
            () = left(&mut phase), if !leaving => {
                leaving = true;
                continue;
            }
            () = sleep_until(pinged + pause) => {
                pinged = Instant::now();
                let ping = if leaving { None } else { with(leg, Far::tick) };
                if let Some(ping) = ping
                    && socket.send(Message::Ping(ping.to_vec().into())).await.is_err()
                {
                    return;
                }
                continue;
            }
        };
        heard = Instant::now();
        match next {
            Ok(Some(Ok(message))) if message.is_text() || message.is_binary() => {
                if let Message::Text(text) = &message {
                    with(leg, |leg| leg.message(text));
                }
                if socket.send(message).await.is_err() {
                    return;
                }
            }
            Ok(Some(Ok(Message::Pong(payload)))) => {
                with(leg, |leg| leg.pong(&payload));
            }
            Ok(Some(Ok(Message::Close(frame)))) => {
                let code = frame.map_or(CloseCode::Status, |frame| frame.code);
                let left = matches!(code, CloseCode::Normal | CloseCode::Away);
                with(leg, |leg| {
                    leg.end(&format!("was closed from its other side ({code})"), left)
                });
            }
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(Error::Capacity(CapacityError::MessageTooLong { .. })))) => {
                break (CloseCode::Size, Some("sent too long a message"));
            }
            Ok(Some(Err(Error::Utf8(_)))) => break (CloseCode::Invalid, Some("sent bad UTF-8")),
            Ok(Some(Err(Error::Protocol(_)))) => {
                break (CloseCode::Protocol, Some("broke the protocol"));
            }
            // The close handshake is done, or the client is gone.
            Ok(Some(Err(_)) | None) => return,
            Err(_) => break (CloseCode::Away, Some("had sent nothing for 90 s")),
        }
    };
    with(leg, |leg| match why {
        Some(what) => leg.end(what, false),
        None => leg.end("was moved to another process", true),
    });
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
    leg: &Mutex<Option<Far>>,
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
                Ok(_) => {
                    let written = session.write_response_body(Some(going.split().freeze()), false).await;
                    written.inspect_err(|_| broke(leg))?
                }
            },
            // Its end is dropped with it, so what is left of its bytes is read above, then the end.
            () = &mut echo, if !done => done = true,
            written = to_echo.write(&coming), if !done && !coming.is_empty() => match written {
                Ok(written) => coming.advance(written),
                Err(_) => coming.clear(),
            },
            read = session.read_request_body(), if !done && open && coming.is_empty() => match read.inspect_err(|_| broke(leg))? {
                Some(bytes) => coming = bytes,
                None => {
                    open = false;
                    with(leg, |leg| leg.end("was closed without a Close frame", false));
                    let _ = to_echo.shutdown().await;
                }
            },
        }
    }
}

/// The connection has broken under a leg.
fn broke(leg: &Mutex<Option<Far>>) {
    with(leg, |leg| leg.end("was reset", false));
}
