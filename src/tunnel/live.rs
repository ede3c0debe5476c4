//! The tunnels that are open, and the record that each of them leaves exactly once.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::future::AbortHandle;
use serde::{Deserialize, Serialize};

use super::{Ender, Facts, Gap, How, Sensor, Side};
use crate::close::{Cause, cause};
use crate::events;
use crate::evidence::{self, Millis};
use crate::identity::forwarded_for;
use crate::judge;
use crate::table::{Instance, unique};
use crate::verdict::{Rules, Verdict, Witness, is_talkative};

/// So many forwarded addresses are recorded. A head has room for thousands, and the ledger must not be full of them.
const EDGES: usize = 16;

/// How long after an abnormal end a new tunnel of the same person still counts as the reconnect.
const GAP: Duration = Duration::from_secs(15 * 60);

/// Whose tunnel it is, and where it comes from and goes to.
#[derive(Debug, Clone)]
pub struct About {
    /// Who asked.
    pub user: String,
    /// Where it goes.
    pub instance: Arc<Instance>,
    /// The client's address: the first of `chain`.
    pub ip: String,
    /// The addresses it came over as the edges told them, our own peer last.
    pub chain: Vec<String>,
    /// The request's ID, from the edge or ours.
    pub id: String,
}

/// Why this service ends a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The person has no claim to the instance any more.
    Revoked,
    /// This process ends.
    Shutdown,
}

impl Order {
    /// The code of the Close frames (RFC 6455, section 7.4.1).
    pub fn code(self) -> u16 {
        match self {
            Order::Revoked => 1008,
            Order::Shutdown => 1001,
        }
    }

    fn how(self) -> How {
        match self {
            Order::Revoked => How::Revoked,
            Order::Shutdown => How::Shutdown,
        }
    }
}

/// One tunnel, or the attempt at one. The last owner who lets go of it closes its books.
#[derive(Debug)]
pub struct Tunnel {
    about: About,
    key: u64,
    /// When it was asked for.
    asked: Millis,
    /// Ends the whole request, whatever it waits for.
    cut: AbortHandle,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    sensor: Sensor,
    order: Option<Order>,
    reader: Option<Waker>,
    gap: Option<Duration>,
    recorded: bool,
}

impl State {
    fn order_or_wake(&mut self, reader: &Waker) -> Option<Order> {
        let is_known = |known: &Waker| known.will_wake(reader);
        if self.order.is_none() && !self.reader.as_ref().is_some_and(is_known) {
            self.reader = Some(reader.clone());
        }
        self.order
    }
}

static LIVE: LazyLock<Mutex<HashMap<u64, Weak<Tunnel>>>> = LazyLock::new(Mutex::default);

/// The abnormal ends that nobody has come back from yet, by user and address.
static GAPS: LazyLock<Mutex<HashMap<(String, String), Instant>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tunnel {
    /// A tunnel that somebody asks for now, of a client that follows `rules`. Aborting `cut` ends its request at once.
    pub fn new(about: About, rules: &Rules, cut: AbortHandle) -> Arc<Tunnel> {
        let key = unique();
        let state = State {
            sensor: Sensor::new(Instant::now(), rules.gap()),
            order: None,
            reader: None,
            gap: None,
            recorded: false,
        };
        let tunnel = Arc::new(Tunnel {
            about,
            key,
            asked: evidence::now(),
            cut,
            state: Mutex::new(state),
        });
        lock(&LIVE).insert(key, Arc::downgrade(&tunnel));
        tunnel
    }

    /// The instance has answered 101.
    pub fn open(&self) {
        let gap = {
            let who = (self.about.user.clone(), self.about.ip.clone());
            let dropped = lock(&GAPS).remove(&who);
            dropped.map(|at| at.elapsed()).filter(|gap| *gap < GAP)
        };
        let mut state = lock(&self.state);
        state.sensor.open(Instant::now());
        state.gap = gap;
        drop(state);
        judge::opened();
        events::tunnel_opened(&self.about, gap);
    }

    /// Bytes have come from `side`.
    pub fn bytes(&self, side: Side, bytes: &[u8]) {
        let messages = lock(&self.state).sensor.bytes(side, bytes, Instant::now());
        events::tunnel_bytes(side, bytes.len() as u64, messages);
    }

    /// The instance has taken what was written to it after all.
    pub fn instance_takes(&self) {
        lock(&self.state).sensor.takes(Side::Instance);
    }

    /// `side` has ended, in that way.
    pub fn end(&self, side: Side, how: How) {
        lock(&self.state).sensor.end(side, how, Instant::now());
    }

    /// The instance has refused it: it never was one. Its answer may take for ever, and the ledger is in the order of the ends.
    pub fn refused(&self) {
        self.end(Side::Instance, How::Refused);
        self.close_books();
    }

    /// This service has failed it.
    pub fn fail(&self) {
        lock(&self.state)
            .sensor
            .end_by(Ender::Dispatch, How::Error, Instant::now());
    }

    /// As [`Sensor::left_in_frame`].
    pub fn left_in_frame(&self, side: Side) -> usize {
        lock(&self.state).sensor.left_in_frame(side)
    }

    /// As [`Sensor::nothing_under_way`].
    pub fn nothing_under_way(&self, written: u64) -> bool {
        lock(&self.state).sensor.nothing_under_way(written)
    }

    /// The order to end, if there is one; else `reader` is woken when it comes. Pingora reads on, so the client has taken
    /// what there was.
    pub fn reads(&self, reader: &Waker) -> Option<Order> {
        let mut state = lock(&self.state);
        state.sensor.takes(Side::Client);
        state.order_or_wake(reader)
    }

    /// The same where the instance does not take what is to be written to it.
    pub fn cannot_write(&self, writer: &Waker) -> Option<Order> {
        let mut state = lock(&self.state);
        state.sensor.refuses(Side::Instance, Instant::now());
        state.order_or_wake(writer)
    }

    /// The order to end, if there is one.
    pub fn order(&self) -> Option<Order> {
        lock(&self.state).order
    }

    /// Orders the tunnel to end, and tells whether that is news to it.
    pub fn give(&self, order: Order) -> bool {
        let mut state = lock(&self.state);
        let is_news = state.order.is_none();
        if is_news {
            state.order = Some(order);
            state
                .sensor
                .end_by(Ender::Dispatch, order.how(), Instant::now());
        }
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        is_news
    }

    /// Writes the record, if it has not been written yet.
    fn close_books(&self) {
        let (facts, order, gap) = {
            let mut state = lock(&self.state);
            if std::mem::replace(&mut state.recorded, true) {
                return;
            }
            if ending() {
                // Dropped by a runtime that shuts down: nobody else ended it.
                state
                    .sensor
                    .end_by(Ender::Dispatch, How::Shutdown, Instant::now());
            }
            (state.sensor.facts(Instant::now()), state.order, state.gap)
        };
        let key = format!("{}-{}-{}", self.asked, std::process::id(), self.key);
        let mut record = Record::new(&self.about, key, &facts, order, gap);
        if facts.opened && record.cause != Cause::Graceful {
            let mut gaps = lock(&GAPS);
            // Before it has to grow, so that it costs nothing where thousands end together.
            if gaps.len() == gaps.capacity() {
                gaps.retain(|_, at| at.elapsed() < GAP);
            }
            gaps.insert(
                (self.about.user.clone(), self.about.ip.clone()),
                Instant::now(),
            );
        }
        record.verdict = judge::at_once(&record);
        events::tunnel_closed(&record);
        judge::ended(record, self.about.instance.clone());
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        lock(&LIVE).remove(&self.key);
        self.close_books();
    }
}

fn live() -> Vec<Arc<Tunnel>> {
    lock(&LIVE).values().filter_map(Weak::upgrade).collect()
}

/// The instances that have tunnels.
pub fn instances() -> Vec<Arc<Instance>> {
    let mut instances: Vec<_> = live()
        .iter()
        .filter(|tunnel| lock(&tunnel.state).sensor.opened())
        .map(|tunnel| tunnel.about.instance.clone())
        .collect();
    instances.sort_unstable_by_key(|instance| instance.port);
    instances.dedup_by_key(|instance| instance.port);
    instances
}

/// What the open tunnels show of their people's connections, and who these are.
pub fn witnesses(rules: &Rules) -> Vec<(String, Witness)> {
    let (now, at) = (Instant::now(), evidence::now());
    let since =
        |instant: Instant| at - now.saturating_duration_since(instant).as_millis() as Millis;
    let witness = |tunnel: Arc<Tunnel>| {
        let state = lock(&tunnel.state);
        let (heard, gap) = state.sensor.client_heard();
        let (heard, gap) = (since(heard), gap.map(|(from, to)| (since(from), since(to))));
        let witness = state.sensor.opened().then(|| Witness {
            ip: tunnel.about.ip.clone(),
            opened: tunnel.asked,
            heard,
            gap,
            talkative: is_talkative(
                state.sensor.client_messages(),
                heard - tunnel.asked - gap.map_or(0, |(from, to)| to - from),
                rules,
            ),
            ended: None,
        });
        witness.map(|witness| (tunnel.about.user.clone(), witness))
    };
    live().into_iter().filter_map(witness).collect()
}

/// Number of tunnels, open or asked for.
pub fn count() -> usize {
    lock(&LIVE).len()
}

/// Orders every tunnel to end of which `lost` says that its person has lost the instance, and gives those that had no order yet.
pub fn revoke(lost: impl Fn(&str, &Arc<Instance>) -> bool) -> Vec<Weak<Tunnel>> {
    let mut revoked = live();
    revoked.retain(|tunnel| {
        lost(&tunnel.about.user, &tunnel.about.instance) && tunnel.give(Order::Revoked)
    });
    revoked.iter().map(Arc::downgrade).collect()
}

/// Cuts off what of these has not ended by itself: one side does not take what is sent to it, so that nothing between two frames
/// ever comes to its turn.
pub fn cut_off(revoked: &[Weak<Tunnel>]) {
    for tunnel in revoked.iter().filter_map(Weak::upgrade) {
        tunnel.cut.abort();
    }
}

static ENDING: AtomicBool = AtomicBool::new(false);

fn ending() -> bool {
    ENDING.load(Ordering::Acquire)
}

/// Orders every tunnel to end because this process does.
pub fn end_all() {
    ENDING.store(true, Ordering::Release);
    for tunnel in live() {
        tunnel.give(Order::Shutdown);
    }
}

/// Writes the records of the tunnels that are still there. The process is about to exit.
pub fn close_all_books() {
    ENDING.store(true, Ordering::Release);
    for tunnel in live() {
        tunnel.close_books();
    }
}

/// What is left of a tunnel: a line of the ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When it ended, RFC 3339 in UTC.
    pub time: String,
    /// What its verdict names it by.
    #[serde(default)]
    pub key: String,
    /// Who had it.
    pub user: String,
    /// The instance's OS user.
    pub os_user: String,
    /// The instance's port.
    pub port: u16,
    /// The client's address.
    pub ip: String,
    /// The addresses it came over, the client's first, our own peer's last.
    pub chain: Vec<String>,
    /// The request's ID.
    pub id: String,
    /// From the request to the end, in milliseconds.
    pub dur_ms: u64,
    /// Why it ended.
    pub cause: Cause,
    /// Who ended it first; absent where nobody was seen to.
    pub ended_by: Option<Ender>,
    /// How.
    pub how: Option<How>,
    /// The code of the Close frame that was first, of whichever side.
    pub code: Option<u16>,
    /// Whether it had been open: false for one that the instance refused.
    pub opened: bool,
    /// What the client sent.
    pub client: SentRecord,
    /// What the instance sent.
    pub instance: SentRecord,
    /// For how long the oldest client message had waited for anything from the instance, in milliseconds.
    pub unanswered_ms: Option<u64>,
    /// For how long no frame of the client's had been whole, in milliseconds.
    #[serde(default)]
    pub unheard_ms: u64,
    /// The client's last long time without a whole frame that was over before the end.
    #[serde(default)]
    pub gap: Option<GapRecord>,
    /// The last long time without a whole answer of the instance's that was over before the end.
    #[serde(default)]
    pub hang: Option<GapRecord>,
    /// Seconds since the same user's last tunnel from the same address ended badly.
    pub ws_gap_seconds: Option<f64>,
    /// Whose fault it was; absent while the evidence is still coming in.
    #[serde(default)]
    pub verdict: Option<Verdict>,
}

/// A long wait, in a [`Record`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapRecord {
    /// How long it was.
    pub length_ms: u64,
    /// How long before the end it was over.
    pub ago_ms: u64,
}

impl From<Gap> for GapRecord {
    fn from(gap: Gap) -> GapRecord {
        GapRecord {
            length_ms: millis(gap.length),
            ago_ms: millis(gap.ago),
        }
    }
}

/// What one side sent, in a [`Record`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SentRecord {
    /// Bytes, frame heads included.
    pub bytes: u64,
    /// Data messages.
    pub messages: u64,
    /// The longest time without a byte.
    pub longest_silence_ms: u64,
    /// The time without a byte at the end.
    pub silence_ms: u64,
    /// Whether it ended within a frame.
    pub mid_frame: bool,
    /// For how long bytes had been waiting for this side to take them.
    #[serde(default)]
    pub untaken_ms: Option<u64>,
}

impl Record {
    fn new(
        about: &About,
        key: String,
        facts: &Facts,
        order: Option<Order>,
        gap: Option<Duration>,
    ) -> Record {
        let sent = |sent: &super::Sent| SentRecord {
            bytes: sent.bytes,
            messages: sent.messages,
            longest_silence_ms: millis(sent.longest_silence),
            silence_ms: millis(sent.silence),
            mid_frame: sent.mid_frame,
            untaken_ms: sent.untaken.map(millis),
        };
        let code = match facts.first {
            Some((Ender::Client, How::Close)) => facts.client.close_code,
            Some((Ender::Instance, How::Close)) => facts.instance.close_code,
            Some((Ender::Dispatch, _)) if facts.opened => order.map(Order::code),
            _ => None,
        };
        Record {
            time: humantime::format_rfc3339_millis(SystemTime::now() - facts.ago).to_string(),
            key,
            user: about.user.clone(),
            os_user: about.instance.os_user.to_string(),
            port: about.instance.port,
            ip: about.ip.clone(),
            chain: about.chain.clone(),
            id: about.id.clone(),
            dur_ms: millis(facts.duration),
            cause: cause(facts),
            ended_by: facts.first.map(|(ender, _)| ender),
            how: facts.first.map(|(_, how)| how),
            code,
            opened: facts.opened,
            client: sent(&facts.client),
            instance: sent(&facts.instance),
            unanswered_ms: facts.unanswered.map(millis),
            unheard_ms: millis(facts.unheard),
            gap: facts.gap.map(GapRecord::from),
            hang: facts.hang.map(GapRecord::from),
            ws_gap_seconds: gap.map(|gap| gap.as_secs_f64()),
            verdict: None,
        }
    }

    /// When it ended.
    pub fn ended(&self) -> Millis {
        let time = humantime::parse_rfc3339(&self.time).unwrap_or(UNIX_EPOCH);
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        since.as_millis() as Millis
    }

    /// Who ended it first, and how.
    pub fn first(&self) -> Option<(Ender, How)> {
        self.ended_by.zip(self.how)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The addresses that a request came over: what the edges forwarded, then our own peer. Of more than there are edges, which
/// a client may have made up, the last ones.
pub fn chain(headers: &http::HeaderMap, peer: Option<IpAddr>) -> Vec<String> {
    let more = forwarded_for(headers).count().saturating_sub(EDGES);
    let edges = forwarded_for(headers).skip(more);
    edges.chain(peer).map(|ip| ip.to_string()).collect()
}
