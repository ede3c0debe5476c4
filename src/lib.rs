//! t3-dispatch sends each signed-in person to their own `t3 serve` instance, and pairs the browser on the way.
//!
//! A request walks down this list and never back up; [`dispatch`] alone calls the rooms.
//!
//! 0. [`downstream`]: a connection, if there is [`room`] for it, and a [`head`] that comes in time and has one meaning only;
//!    [`unsent`] is what its answers wait in.
//! 1. [`identity`]: the socket peer and the headers say who is asking, and a signed token ([`jwt`]) where there has to be one.
//! 2. [`table`]: who is asking says which instance is theirs.
//! 3. [`session`]: the request's kind, its cookies and the instance's answer say whether to proxy or to pair.
//! 4. [`pair`]: a credential from [`mint`], exchanged for the session cookie, which is relayed to the browser.
//! 5. [`instance`]: our own HTTP calls to an instance, for the session check and the exchange.
//! 6. [`forward`]: the peer's options and the headers, out and back; [`pool`] has the connection, and Pingora does the rest.
//! 7. [`tunnel`]: the sensor of one WebSocket; [`gate`] is the connection under it, [`unbuffered`] what stands for its client
//!    until the 101; [`close`] says why it ended.
//! 8. [`judge`] keeps a drop until the evidence is in; [`verdict`] says whose fault it was.
//!
//! Beside the walk stand [`refuse`] (every answer that is a refusal), [`events`] (every log line and metric), [`ledger`]
//! (a line for each WebSocket that ended), [`evidence`] (what was seen of legs, instances and this process), [`probe`] (the
//! echo with its far ends of legs, the legs to instances, the host; and the prober, which holds legs to the echo), [`https`]
//! (our requests to servers that are no instances), [`config`] (settings), [`listen`] (addresses and sockets), [`server`]
//! (listeners and signals), [`upgrade`] (handing over to a new process), [`admin`] (the operator's listener), [`story`] (a
//! drop in words), which [`explain`] tells the operator and [`page`] the person, [`check`] and [`cli`].
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod admin;
pub mod check;
pub mod cli;
pub mod close;
pub mod config;
pub mod dispatch;
pub mod downstream;
pub mod events;
pub mod evidence;
pub mod explain;
pub mod forward;
pub mod gate;
pub mod head;
pub mod https;
pub mod identity;
pub mod instance;
pub mod judge;
pub mod jwt;
pub mod ledger;
pub mod listen;
pub mod mint;
pub mod page;
pub mod pair;
pub mod pool;
pub mod probe;
pub mod refuse;
pub mod room;
pub mod server;
pub mod session;
pub mod stderr;
pub mod story;
pub mod table;
pub mod tunnel;
pub mod unbuffered;
pub mod unsent;
pub mod upgrade;
pub mod verdict;
