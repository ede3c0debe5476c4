//! The sensor of one WebSocket: bytes seen in a direction at a time, and the ends of each direction and how they came.
//! It knows nothing of Pingora.
//!
//! [`live`] keeps the sensors of the tunnels that are open, and closes the books of each exactly once.

mod heads;
pub mod live;

use std::time::{Duration, Instant};

use heads::Heads;
use serde::Serialize;

/// One of the two ends of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The browser, or the edge before it.
    Client,
    /// The `t3 serve` process.
    Instance,
}

/// Who ended a tunnel first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ender {
    /// The browser's side.
    Client,
    /// The instance's side.
    Instance,
    /// This service.
    Dispatch,
}

impl From<Side> for Ender {
    fn from(side: Side) -> Ender {
        match side {
            Side::Client => Ender::Client,
            Side::Instance => Ender::Instance,
        }
    }
}

/// How a side ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// By a Close frame.
    Close,
    /// By closing its connection.
    Fin,
    /// By resetting its connection.
    Rst,
    /// It was gone: TCP's keepalive or user timeout ran out.
    Timeout,
    /// It did not take the tunnel: no connection, or another answer than 101.
    Refused,
    /// The person lost the instance.
    Revoked,
    /// This process was told to end.
    Shutdown,
    /// Something else, for which this service answers.
    Error,
}

/// One direction: what its sender was seen to do.
#[derive(Debug)]
struct Direction {
    heads: Heads,
    bytes: u64,
    messages: u64,
    last: Instant,
    longest_silence: Duration,
    close_code: Option<u16>,
}

impl Direction {
    fn new(now: Instant) -> Direction {
        Direction {
            heads: Heads::default(),
            bytes: 0,
            messages: 0,
            last: now,
            longest_silence: Duration::ZERO,
            close_code: None,
        }
    }

    fn silence(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last)
    }
}

/// The sensor.
#[derive(Debug)]
pub struct Sensor {
    start: Instant,
    opened: bool,
    client: Direction,
    instance: Direction,
    /// When the first of those client messages came that the instance has sent nothing after.
    unanswered: Option<Instant>,
    first: Option<(Ender, How)>,
    ended: Option<Instant>,
}

/// What was seen of a tunnel from its beginning to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Whether it was open: the instance answered 101.
    pub opened: bool,
    /// From the request to the end.
    pub duration: Duration,
    /// What the client sent.
    pub client: Sent,
    /// What the instance sent.
    pub instance: Sent,
    /// For how long the oldest client message had been waiting for anything from the instance.
    pub unanswered: Option<Duration>,
    /// Who ended it first, and how; nobody where the end came without a sign.
    pub first: Option<(Ender, How)>,
}

/// What one side sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// Bytes, frame heads included.
    pub bytes: u64,
    /// Data messages.
    pub messages: u64,
    /// The longest time without a byte, the one at the end included.
    pub longest_silence: Duration,
    /// The time without a byte at the end.
    pub silence: Duration,
    /// The code of its Close frame.
    pub close_code: Option<u16>,
    /// Whether it ended within a frame.
    pub mid_frame: bool,
}

impl Sensor {
    /// A sensor for a tunnel that was asked for at `now`.
    pub fn new(now: Instant) -> Sensor {
        Sensor {
            start: now,
            opened: false,
            client: Direction::new(now),
            instance: Direction::new(now),
            unanswered: None,
            first: None,
            ended: None,
        }
    }

    /// The instance has answered 101.
    pub fn open(&mut self, now: Instant) {
        self.opened = true;
        self.client.last = now;
        self.instance.last = now;
    }

    /// `bytes` have come from `side`; gives the data messages that ended in them.
    pub fn bytes(&mut self, side: Side, bytes: &[u8], now: Instant) -> u64 {
        let direction = self.direction(side);
        let seen = direction.heads.read(bytes);
        direction.bytes += bytes.len() as u64;
        direction.messages += seen.messages;
        direction.longest_silence = direction.longest_silence.max(direction.silence(now));
        direction.last = now;
        match side {
            Side::Client if seen.messages > 0 => {
                self.unanswered.get_or_insert(now);
            }
            Side::Client => {}
            Side::Instance => self.unanswered = None,
        }
        if let Some(code) = seen.close {
            self.direction(side).close_code.get_or_insert(code);
            self.first.get_or_insert((side.into(), How::Close));
        }
        seen.messages
    }

    /// `side` has ended, in that way.
    pub fn end(&mut self, side: Side, how: How, now: Instant) {
        self.end_by(side.into(), how, now);
    }

    /// Somebody has ended the tunnel, in that way. What comes later changes nothing any more.
    pub fn end_by(&mut self, ender: Ender, how: How, now: Instant) {
        self.ended.get_or_insert(now);
        self.first.get_or_insert((ender, how));
    }

    /// How many bytes of `side`'s may be read without reading beyond the frame that has begun; 0 between frames.
    pub fn left_in_frame(&self, side: Side) -> usize {
        match side {
            Side::Client => self.client.heads.left_in_frame(),
            Side::Instance => self.instance.heads.left_in_frame(),
        }
    }

    /// Whether the client is between two frames and all `written` of its bytes have been passed on.
    pub fn nothing_under_way(&self, written: u64) -> bool {
        self.client.heads.at_boundary() && self.client.bytes == written
    }

    /// What was seen, as of `now`.
    pub fn facts(&self, now: Instant) -> Facts {
        let now = self.ended.unwrap_or(now);
        let sent = |direction: &Direction| Sent {
            bytes: direction.bytes,
            messages: direction.messages,
            longest_silence: direction.longest_silence.max(direction.silence(now)),
            silence: direction.silence(now),
            close_code: direction.close_code,
            mid_frame: !direction.heads.at_boundary(),
        };
        Facts {
            opened: self.opened,
            duration: now.saturating_duration_since(self.start),
            client: sent(&self.client),
            instance: sent(&self.instance),
            unanswered: self
                .unanswered
                .map(|since| now.saturating_duration_since(since)),
            first: self.first,
        }
    }

    fn direction(&mut self, side: Side) -> &mut Direction {
        match side {
            Side::Client => &mut self.client,
            Side::Instance => &mut self.instance,
        }
    }
}
