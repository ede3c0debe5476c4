//! The life of a leg: connect, heartbeats, end, and again.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::{FutureExt, Sink, SinkExt, StreamExt};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_tungstenite::tungstenite::error::{Error, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::board::Board;
use super::delay::Delay;
use super::dial::{Dialer, Socket, Steps};
use super::reason::{Failure, Reason};
use super::settings::{Kind, Leg, Settings};

/// How long the other side may take over its part of a Close handshake.
pub const GOODBYE: Duration = Duration::from_secs(1);

/// The Close code of a leg whose echo is overdue.
const OVERDUE: u16 = 4000;

/// So many messages that are no echo, without one among them, are a flood, in which heartbeats would go under.
const FLOOD: usize = 1000;

/// The Close code of a frame that bears none (RFC 6455, section 7.1.5).
const NO_CODE: u16 = 1005;

/// One leg with all that it needs.
pub struct Runner {
    /// The whole settings.
    pub settings: Arc<Settings>,
    /// What makes its connections.
    pub dialer: Arc<Dialer>,
    /// Where it tells how it is.
    pub board: Arc<Board>,
    /// Its place in the settings and on the board.
    pub place: usize,
    /// Turns true when it is to end.
    pub stop: watch::Receiver<bool>,
}

/// How a connection ended.
enum End {
    /// We were told to end.
    Stopped,
    /// It failed, after at least one echo or before the first.
    Failed { failure: Failure, echoed: bool },
}

impl Runner {
    /// Runs until it is told to end.
    pub async fn run(self) {
        let Some(leg) = self.settings.legs.get(self.place) else {
            return;
        };
        match leg.kind {
            Kind::WebSocket => self.hold(leg).await,
            Kind::Http => self.ask(leg).await,
        }
    }

    /// A WebSocket leg.
    async fn hold(&self, leg: &Leg) {
        let settings = &self.settings;
        let mut delay = Delay::new(settings.reconnect, settings.reconnect_max);
        loop {
            let mut steps = Steps::default();
            let dialled = tokio::select! {
                biased;
                () = self.told() => return,
                dialled = self.dialer.upgrade(leg, &mut steps) => dialled,
            };
            match dialled {
                Err(failure) => {
                    self.board.failed(self.place, &failure, None);
                    delay.failed();
                }
                Ok((mut socket, known)) => {
                    if known == Some(false) {
                        log::warn!(
                            "leg-unknown leg={} error=\"the dispatcher did not accept the token: give dispatch.probe.token and \
                             probe.token the same value; until then the leg is a plain echo\"",
                            leg.name
                        );
                    }
                    let opened = Instant::now();
                    match self.converse(&mut socket).await {
                        End::Stopped => return,
                        End::Failed { failure, echoed } => {
                            let age = opened.elapsed();
                            self.board.failed(self.place, &failure, Some(age));
                            delay.ended(failure.reason, echoed, age);
                        }
                    }
                }
            }
            tokio::select! {
                biased;
                () = self.told() => return,
                () = sleep(delay.wait) => {}
            }
        }
    }

    /// An HTTP leg. Each connection is a fresh one: an instance closes idle ones sooner than a heartbeat comes round.
    async fn ask(&self, leg: &Leg) {
        let mut ticks = interval(self.settings.heartbeat);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut up_since = None;
        loop {
            let mut steps = Steps::default();
            let once = async {
                ticks.tick().await;
                let limit = self.settings.rtt_timeout;
                self.dialer.get(leg, limit, &mut steps).await
            };
            let answer = tokio::select! {
                biased;
                () = self.told() => return,
                answer = once => answer,
            };
            match answer {
                Ok(rtt) => {
                    up_since.get_or_insert_with(Instant::now);
                    self.board.echoed(self.place, rtt);
                }
                Err(failure) => {
                    let age = up_since.take().map(|since| since.elapsed());
                    self.board.failed(self.place, &failure, age);
                }
            }
        }
    }

    async fn told(&self) {
        // Without a sender there is nobody left to run for.
        let _ = self.stop.clone().wait_for(|stop| *stop).await;
    }

    /// Heartbeats and echoes, until either side ends it.
    async fn converse(&self, socket: &mut Socket) -> End {
        let every = self.settings.heartbeat;
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unechoed: VecDeque<(Instant, Utf8Bytes)> = VecDeque::new();
        let mut seq = 0;
        let mut echoed = false;
        let mut unasked = 0;
        let failure = loop {
            let overdue = unechoed
                .front()
                .map(|(sent, _)| *sent + self.settings.rtt_timeout);
            tokio::select! {
                biased;
                () = self.told() => {
                    goodbye(socket, CloseCode::Away, "").await;
                    return End::Stopped;
                }
                next = turn(socket) => match next {
                    Ok(Message::Text(text)) => {
                        let now = Instant::now();
                        let found = unechoed.iter().position(|(_, sent)| *sent == text);
                        // Anything else that is said to us is no echo.
                        if let Some((sent, _)) = found.and_then(|at| unechoed.remove(at)) {
                            (echoed, unasked) = (true, 0);
                            self.board.echoed(self.place, now - sent);
                        } else {
                            unasked += 1;
                        }
                    }
                    Ok(Message::Close(frame)) => {
                        // The library has its answer ready, which only goes out if somebody drives it.
                        let _ = timeout(GOODBYE, rest(socket)).await;
                        break closed(frame);
                    }
                    Ok(_) => unasked += 1,
                    Err(error) => break broken(error),
                },
                () = sleep_until(overdue.unwrap_or_else(far).into()), if overdue.is_some() => {
                    let frame = close_frame(CloseCode::Library(OVERDUE), "rtt_timeout");
                    // Whoever does not echo may not read either, so this gets one try.
                    let _ = socket.send(frame).now_or_never();
                    let limit = self.settings.rtt_timeout;
                    break Failure::new(Reason::RttTimeout, format!("no echo within {limit:?}"));
                }
                _ = ticks.tick() => {
                    seq += 1;
                    let text = Utf8Bytes::from(self.board.heartbeat(self.place, seq, every));
                    if let Err(error) = put(socket, Message::Text(text.clone())) {
                        break broken(error);
                    }
                    unechoed.push_back((Instant::now(), text));
                }
            }
            if unasked > FLOOD {
                let what = format!("more than {FLOOD} messages that are no echo");
                break Failure::new(Reason::IoError, what);
            }
        };
        End::Failed { failure, echoed }
    }
}

/// One heartbeat and its echo, then the end in good order.
///
/// # Errors
/// When the echo does not come within `limit`.
pub async fn echo_once(
    socket: &mut Socket,
    heartbeat: String,
    limit: Duration,
) -> Result<Duration, Failure> {
    let text = Utf8Bytes::from(heartbeat);
    let begun = Instant::now();
    let wait = async {
        put(socket, Message::Text(text.clone())).map_err(broken)?;
        loop {
            match turn(socket).await {
                Ok(Message::Text(echo)) if echo == text => return Ok(begun.elapsed()),
                Ok(Message::Close(frame)) => return Err(closed(frame)),
                Ok(_) => {}
                Err(error) => return Err(broken(error)),
            }
        }
    };
    let took = timeout(limit, wait).await.unwrap_or_else(|_| {
        let what = format!("no echo within {limit:?}");
        Err(Failure::new(Reason::RttTimeout, what))
    })?;
    goodbye(socket, CloseCode::Normal, "").await;
    Ok(took)
}

/// Hands a message to the library, which keeps what the connection does not take yet. [`turn`] drives it on.
fn put(socket: &mut Socket, message: Message) -> Result<(), Error> {
    Pin::new(socket).start_send(message)
}

/// The next message. Meanwhile what is to be sent goes out: a connection that takes nothing never keeps us from reading,
/// and pings are answered as they come.
async fn turn(socket: &mut Socket) -> Result<Message, Error> {
    std::future::poll_fn(|context| {
        if let Poll::Ready(next) = socket.poll_next_unpin(context) {
            return Poll::Ready(next.unwrap_or(Err(Error::ConnectionClosed)));
        }
        match socket.poll_flush_unpin(context) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Pending,
        }
    })
    .await
}

/// Ends a WebSocket in good order, if the other side is quick about it.
async fn goodbye(socket: &mut Socket, code: CloseCode, reason: &'static str) {
    let end = async {
        if put(socket, close_frame(code, reason)).is_ok() {
            rest(socket).await;
        }
    };
    let _ = timeout(GOODBYE, end).await;
}

/// Reads on until the end.
async fn rest(socket: &mut Socket) {
    while turn(socket).await.is_ok() {}
}

fn close_frame(code: CloseCode, reason: &'static str) -> Message {
    Message::Close(Some(CloseFrame {
        code,
        reason: reason.into(),
    }))
}

fn closed(frame: Option<CloseFrame>) -> Failure {
    let code = frame.as_ref().map_or(NO_CODE, |frame| frame.code.into());
    let mut what = format!("closed with {code}");
    if let Some(frame) = frame.filter(|frame| !frame.reason.is_empty()) {
        what += &format!(", saying {:?}", frame.reason.as_str());
    }
    Failure::new(Reason::Closed(code), what)
}

fn broken(error: Error) -> Failure {
    let what = match error {
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)
        | Error::ConnectionClosed
        | Error::AlreadyClosed => "the connection ended without a Close frame".into(),
        Error::Io(error) => error.to_string(),
        other => other.to_string(),
    };
    Failure::new(Reason::IoError, what)
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}
