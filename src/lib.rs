//! t3-dispatch sends each signed-in person to their own `t3 serve` instance, and pairs the browser on the way.
//!
//! A request walks down this list and never back up; [`dispatch`] alone calls the rooms.
//!
//! 1. [`identity`]: the socket peer and the headers say who is asking.
//! 2. [`table`]: who is asking says which instance is theirs.
//! 3. [`session`]: the request's kind, its cookies and the instance's answer say whether to proxy or to pair.
//! 4. [`pair`]: a credential from [`mint`], exchanged for the session cookie, which is relayed to the browser.
//! 5. [`instance`]: our own HTTP calls to an instance, for the session check and the exchange.
//! 6. [`forward`]: the peer's options and the headers, out and back; Pingora does the rest.
//! 7. [`tunnel`]: the sensor of one WebSocket; [`gate`] is the connection under it; [`close`] says why it ended.
//!
//! Beside the walk stand [`refuse`] (every answer that is a refusal), [`events`] (every log line and metric), [`ledger`]
//! (a line for each WebSocket that ended), [`probe`] (the echo, and the prober on its other end), [`config`] (settings),
//! [`server`] (listeners and signals), [`upgrade`] (handing over to a new process), [`admin`] (the operator's listener),
//! [`check`] and [`cli`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod admin;
pub mod check;
pub mod cli;
pub mod close;
pub mod config;
pub mod dispatch;
pub mod events;
pub mod forward;
pub mod gate;
pub mod identity;
pub mod instance;
pub mod ledger;
pub mod mint;
pub mod pair;
pub mod probe;
pub mod refuse;
pub mod server;
pub mod session;
pub mod table;
pub mod tunnel;
pub mod upgrade;
