//! From what a tunnel's sensor saw to the cause of its end: pure.

use serde::{Deserialize, Serialize};

use crate::tunnel::{Ender, Facts, How};

/// Why a tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// By a Close handshake, or a Close frame and then the end.
    Graceful,
    /// The client's side went without a Close frame.
    DownstreamClosed,
    /// The instance's side went without one, or refused the tunnel.
    UpstreamClosed,
    /// This process ended.
    DispatchShutdown,
    /// The table took the instance away from the person.
    DispatchRevoked,
    /// A fault of this service.
    DispatchError,
}

impl Cause {
    /// Every cause.
    pub const ALL: [Cause; 6] = [
        Cause::Graceful,
        Cause::DownstreamClosed,
        Cause::UpstreamClosed,
        Cause::DispatchShutdown,
        Cause::DispatchRevoked,
        Cause::DispatchError,
    ];

    /// Its name in the log, the ledger and the metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Graceful => "graceful",
            Cause::DownstreamClosed => "downstream_closed",
            Cause::UpstreamClosed => "upstream_closed",
            Cause::DispatchShutdown => "dispatch_shutdown",
            Cause::DispatchRevoked => "dispatch_revoked",
            Cause::DispatchError => "dispatch_error",
        }
    }
}

/// The cause, from who ended first and how. An end without any sign is a fault of ours: cloudflare/pingora#946 looks
/// like that.
pub fn cause(facts: &Facts) -> Cause {
    match facts.first {
        Some((_, How::Close)) => Cause::Graceful,
        Some((_, How::Revoked)) => Cause::DispatchRevoked,
        Some((_, How::Shutdown)) => Cause::DispatchShutdown,
        Some((Ender::Dispatch, _)) | None => Cause::DispatchError,
        Some((Ender::Client, _)) => Cause::DownstreamClosed,
        Some((Ender::Instance, _)) => Cause::UpstreamClosed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::{Sensor, Side};
    use std::time::{Duration, Instant};

    #[test]
    fn the_first_end_decides() {
        use Ender::{Client, Dispatch, Instance};
        for (first, expected) in [
            (Some((Client, How::Close)), Cause::Graceful),
            (Some((Instance, How::Close)), Cause::Graceful),
            (Some((Client, How::Fin)), Cause::DownstreamClosed),
            (Some((Client, How::Rst)), Cause::DownstreamClosed),
            (Some((Client, How::Timeout)), Cause::DownstreamClosed),
            (Some((Instance, How::Fin)), Cause::UpstreamClosed),
            (Some((Instance, How::Rst)), Cause::UpstreamClosed),
            (Some((Instance, How::Timeout)), Cause::UpstreamClosed),
            (Some((Instance, How::Refused)), Cause::UpstreamClosed),
            (Some((Dispatch, How::Revoked)), Cause::DispatchRevoked),
            (Some((Dispatch, How::Shutdown)), Cause::DispatchShutdown),
            (Some((Dispatch, How::Error)), Cause::DispatchError),
            (None, Cause::DispatchError),
        ] {
            let now = Instant::now();
            let facts = Facts {
                first,
                ..Sensor::new(now, Duration::MAX).facts(now)
            };
            assert_eq!(cause(&facts), expected, "{first:?}");
        }
    }

    #[test]
    fn a_close_frame_before_the_end_is_graceful_whoever_goes_first_then() {
        let now = Instant::now();
        for (closes, goes) in [
            (Side::Client, Side::Instance),
            (Side::Instance, Side::Client),
        ] {
            let mut sensor = Sensor::new(now, Duration::MAX);
            sensor.bytes(closes, &[0x88, 0x02, 0x03, 0xe8], now);
            sensor.end(goes, How::Rst, now);
            let facts = sensor.facts(now);
            assert_eq!(
                (cause(&facts), facts.first),
                (Cause::Graceful, Some((closes.into(), How::Close)))
            );
        }
        // A Close frame after the end saves nothing.
        let mut sensor = Sensor::new(now, Duration::MAX);
        sensor.end(Side::Client, How::Fin, now);
        sensor.bytes(Side::Instance, &[0x88, 0x02, 0x03, 0xe8], now);
        assert_eq!(cause(&sensor.facts(now)), Cause::DownstreamClosed);
    }
}
