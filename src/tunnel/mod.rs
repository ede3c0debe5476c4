//! The sensor of one WebSocket: bytes seen in a direction at a time, and the ends of each direction and how they came.
//! It knows nothing of Pingora.
//!
//! [`live`] keeps the sensors of the tunnels that are open, and closes the books of each exactly once.

pub mod heads;
pub mod live;

use std::time::{Duration, Instant};

use heads::Heads;
use serde::{Deserialize, Serialize};

/// One of the two ends of a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The browser, or the edge before it.
    Client,
    /// The `t3 serve` process.
    Instance,
}

/// Who ended a tunnel first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Since when bytes have been waiting for this side to take them.
    untaken: Option<Instant>,
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
            untaken: None,
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
    /// A wait that is longer is a gap.
    gap_limit: Duration,
    gap: Option<(Instant, Instant)>,
    /// When the client's last frame was whole.
    heard: Instant,
    /// When a client's message waited that long for the instance.
    hang: Option<(Instant, Instant)>,
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
    /// How long ago the end was.
    pub ago: Duration,
    /// What the client sent.
    pub client: Sent,
    /// What the instance sent.
    pub instance: Sent,
    /// For how long the oldest client message had been waiting for anything from the instance.
    pub unanswered: Option<Duration>,
    /// For how long no frame of the client's had been whole.
    pub unheard: Duration,
    /// The client's last long time without a whole frame that was over before the end.
    pub gap: Option<Gap>,
    /// The last long time without a whole answer of the instance's that was over before the end.
    pub hang: Option<Gap>,
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
    /// For how long bytes had been waiting for it to take them.
    pub untaken: Option<Duration>,
}

/// A long wait that was over before the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// How long it was.
    pub length: Duration,
    /// How long before the end it was over.
    pub ago: Duration,
}

impl Sensor {
    /// A sensor for a tunnel that was asked for at `now`. A wait over `gap_limit` is noted.
    pub fn new(now: Instant, gap_limit: Duration) -> Sensor {
        Sensor {
            start: now,
            opened: false,
            client: Direction::new(now),
            instance: Direction::new(now),
            gap_limit,
            gap: None,
            heard: now,
            hang: None,
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
        self.heard = now;
    }

    /// `bytes` have come from `side`; gives the data messages that ended in them.
    pub fn bytes(&mut self, side: Side, bytes: &[u8], now: Instant) -> u64 {
        let gap_limit = self.gap_limit;
        let direction = self.direction(side);
        let seen = direction.heads.read(bytes);
        let silence = direction.silence(now);
        direction.bytes += bytes.len() as u64;
        direction.messages += seen.messages;
        direction.longest_silence = direction.longest_silence.max(silence);
        direction.last = now;
        match side {
            Side::Client => {
                if seen.frame {
                    let heard = std::mem::replace(&mut self.heard, now);
                    if now.saturating_duration_since(heard) >= gap_limit {
                        self.gap = Some((heard, now));
                    }
                }
                if seen.whole > 0 {
                    self.unanswered.get_or_insert(now);
                }
            }
            Side::Instance => {
                // A client knows whole messages only: one that trickles in is no answer to it.
                if seen.frame
                    && let Some(since) = self.unanswered.take()
                    && now.saturating_duration_since(since) >= gap_limit
                {
                    self.hang = Some((since, now));
                }
                // It is Pingora's now, which comes back for more once the client has taken it.
                self.client.untaken.get_or_insert(now);
            }
        }
        if let Some(code) = seen.close {
            self.direction(side).close_code.get_or_insert(code);
            self.first.get_or_insert((side.into(), How::Close));
        }
        seen.messages
    }

    /// `side` has taken what was there for it. After the end that means nothing.
    pub fn takes(&mut self, side: Side) {
        if self.ended.is_none() {
            self.direction(side).untaken = None;
        }
    }

    /// `side` does not take what is there for it.
    pub fn refuses(&mut self, side: Side, now: Instant) {
        if self.ended.is_none() {
            self.direction(side).untaken.get_or_insert(now);
        }
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
        let ago = self
            .ended
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let now = self.ended.unwrap_or(now);
        let sent = |direction: &Direction| Sent {
            bytes: direction.bytes,
            messages: direction.messages,
            longest_silence: direction.longest_silence.max(direction.silence(now)),
            silence: direction.silence(now),
            close_code: direction.close_code,
            mid_frame: !direction.heads.at_boundary(),
            untaken: direction
                .untaken
                .map(|since| now.saturating_duration_since(since)),
        };
        let gap = |span: Option<(Instant, Instant)>| {
            span.map(|(from, to)| Gap {
                length: to.saturating_duration_since(from),
                ago: now.saturating_duration_since(to),
            })
        };
        Facts {
            opened: self.opened,
            duration: now.saturating_duration_since(self.start),
            ago,
            client: sent(&self.client),
            instance: sent(&self.instance),
            unanswered: self
                .unanswered
                .map(|since| now.saturating_duration_since(since)),
            unheard: now.saturating_duration_since(self.heard),
            gap: gap(self.gap),
            hang: gap(self.hang),
            first: self.first,
        }
    }

    /// When the client was last heard, and its last long silence before that.
    pub fn client_heard(&self) -> (Instant, Option<(Instant, Instant)>) {
        (self.heard, self.gap)
    }

    /// Whether the instance has answered 101.
    pub fn opened(&self) -> bool {
        self.opened
    }

    /// How many messages the client has sent.
    pub fn client_messages(&self) -> u64 {
        self.client.messages
    }

    fn direction(&mut self, side: Side) -> &mut Direction {
        match side {
            Side::Client => &mut self.client,
            Side::Instance => &mut self.instance,
        }
    }
}
