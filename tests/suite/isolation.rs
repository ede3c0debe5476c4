//! One person can never reach another's instance: 100,000 random requests against an oracle.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::time::timeout;

use crate::common::dispatcher::{Dispatcher, Setup, wait_for};
use crate::common::frames::Frame;
use crate::common::http::{Client, Reply};
use crate::common::raw::MASK;
use crate::common::witness::Witness;

/// How many requests there are in all.
const REQUESTS: usize = 100_000;

/// The cases follow from this alone. `T3_TEST_SEED` names another.
const SEED: u64 = 1;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connections of the edge at once.
const LANES: usize = 8;

const NAMES: [&str; 5] = ["alice", "bob", "carol", "dave", "al"];
const OS_USERS: [&str; 4] = ["alice", "bob", "carol", "dave"];
/// The instances; a table gives them to people and to OS users as it likes.
const INSTANCES: usize = 4;

/// Whose instance is which.
#[derive(Debug, Clone)]
struct Table {
    /// The instance of each name, if it has one.
    of: [Option<usize>; NAMES.len()],
    /// How far the OS users are shifted against the instances.
    shift: usize,
}

impl Table {
    fn get(&self, name: &str) -> Option<usize> {
        let place = NAMES.iter().position(|known| *known == name)?;
        self.of[place]
    }
}

/// A header that may name somebody: a spelling of its name, and a value.
type Naming = (&'static str, &'static str);

/// What a request brings along beside its name.
#[derive(Debug, Clone)]
struct Ask {
    namings: Vec<Naming>,
    cookies: Cookies,
    kind: Kind,
    decoys: Vec<&'static str>,
    host: &'static str,
    /// Whether the target is a whole URL.
    absolute: bool,
}

#[derive(Debug, Clone, Copy)]
enum Cookies {
    None,
    /// A session of the instance that is the person's own by now, if there is one.
    Own,
    /// A session of that instance.
    Of(usize),
    /// Sessions of two; the first counts.
    Both(usize, usize),
    /// One among others of all kinds.
    Among(usize),
    /// One that nobody knows.
    Forged,
}

impl Cookies {
    fn line(self) -> String {
        match self {
            Cookies::None | Cookies::Own => "theme=dark; user=bob".into(),
            Cookies::Of(one) => format!("t3_session=i{one}"),
            Cookies::Both(one, other) => format!("t3_session=i{one}; t3_session=i{other}"),
            Cookies::Among(one) => format!(
                "a=1; ;=; X-authentik-username=bob; t3_session_3774_0123456789ab=bob; t3_session=i{one}; junk"
            ),
            Cookies::Forged => "t3_session=payload-bob.signature".into(),
        }
    }

    /// Whose session it is.
    fn of(self) -> Option<usize> {
        match self {
            Cookies::Of(one) | Cookies::Both(one, _) | Cookies::Among(one) => Some(one),
            Cookies::None | Cookies::Own | Cookies::Forged => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Get,
    Head,
    Navigation,
    Post(usize),
    Chunks(usize),
    /// Of HTTP/1.0.
    Old,
    WebSocket,
    /// The connection is cut within the body.
    Cut(usize),
}

/// What the edge does next on a connection: requests in one write, whose answers it then reads.
type Step = Vec<Ask>;

/// A table that comes into force, and what each connection carries meanwhile and afterwards.
#[derive(Debug, Clone)]
struct Epoch {
    table: Table,
    lanes: Vec<(Vec<Step>, Vec<Step>)>,
}

/// The oracle: who is named by a request's headers, read from the rules and nothing else.
fn named(namings: &[Naming]) -> Result<&'static str, u16> {
    let fold = |name: &str| {
        name.to_ascii_lowercase()
            .replace(|c: char| !c.is_ascii_alphanumeric(), "_")
    };
    let own = |name: &str| name.eq_ignore_ascii_case("x-authentik-username");
    let like = |(name, _): &&Naming| fold(name) == "x_authentik_username";
    match namings.iter().filter(like).collect::<Vec<_>>()[..] {
        [] => Err(403),
        [(name, value)] if own(name) => {
            Ok(value.trim_matches([' ', '\t']).split('@').next().unwrap())
        }
        _ => Err(400),
    }
}

fn naming() -> impl Strategy<Value = Vec<Naming>> {
    let right = prop::sample::select(vec![
        "X-authentik-username",
        "x-authentik-username",
        "X-AUTHENTIK-USERNAME",
        "X-Authentik-Username",
    ]);
    let people = prop::sample::select(vec![
        "alice",
        "bob",
        "carol",
        "dave",
        "al",
        "alice@example.com",
        "bob@example.com",
        "carol@dave.example.com",
        "dave@alice",
        "  alice\t",
        "bob@",
        "al@bob@carol",
    ]);
    let nobody = prop::sample::select(vec![
        "",
        "@",
        "@bob",
        "Alice",
        "BOB",
        "alice,bob",
        "alice, bob",
        "alice;bob",
        "alice bob",
        "ali",
        "alicebob",
        "mallory",
        "root",
        "%61lice",
        "bob%40example.com",
        "\"bob\"",
        "../bob",
        "alice/bob",
        "älice",
        "bob\u{a0}",
    ]);
    let name = prop::sample::select(vec![
        "X_authentik_username",
        "X-authentik_username",
        "X.authentik.username",
        "X-Authentik~Username",
        "X-authentik-username",
        "x-authentik-username",
        "X-authentik-usernames",
        "X-authentik-user",
        "X-authentik-email",
        "X-authentik-uid",
        "X-Forwarded-User",
        "Remote-User",
    ]);
    let one = (right.clone(), people.clone()).prop_map(|one| vec![one]);
    let odd = (right.clone(), nobody).prop_map(|one| vec![one]);
    let other = (name.clone(), people.clone()).prop_map(|one| vec![one]);
    let several =
        (right, people.clone(), vec((name, people), 1..3)).prop_map(|(name, value, more)| {
            let mut all = more;
            all.insert(all.len() / 2, (name, value));
            all
        });
    prop_oneof![80 => one, 6 => odd, 4 => other, 10 => several]
}

fn ask(kinds: impl Strategy<Value = Kind> + 'static) -> impl Strategy<Value = Ask> {
    let cookies = prop_oneof![
        40 => Just(Cookies::Own),
        30 => (0..INSTANCES).prop_map(Cookies::Of),
        10 => (0..INSTANCES, 0..INSTANCES).prop_map(|(one, other)| Cookies::Both(one, other)),
        15 => (0..INSTANCES).prop_map(Cookies::Among),
        5 => Just(Cookies::Forged),
        1 => Just(Cookies::None),
    ];
    let decoys = prop::sample::subsequence(
        vec![
            "X-Forwarded-For: 203.0.113.9",
            "X-Forwarded-User: bob",
            "Forwarded: for=bob;host=bob.example.com",
            "X-Original-URL: /bob",
            "X-Forwarded-Host: bob.example.com",
            "Authorization: Bearer bob",
            "Referer: https://bob.example.com/",
            "X-authentik-groups: admins",
        ],
        0..3,
    );
    let host = prop::sample::select(vec![
        "t3.example.com",
        "bob.example.com",
        "alice@t3.example.com",
    ]);
    let host = host.prop_map(|host| host.split('@').next_back().unwrap());
    (
        naming(),
        cookies,
        kinds,
        decoys,
        host,
        prop::bool::weighted(0.05),
    )
        .prop_map(|(namings, cookies, kind, decoys, host, absolute)| Ask {
            namings,
            cookies,
            kind,
            decoys,
            host,
            absolute,
        })
}

fn step() -> impl Strategy<Value = Step> {
    let simple = prop_oneof![
        24 => Just(Kind::Get),
        4 => Just(Kind::Head),
        1 => Just(Kind::Navigation),
        8 => (1..3000_usize).prop_map(Kind::Post),
    ];
    let last = prop_oneof![
        4 => (1..3000_usize).prop_map(Kind::Chunks),
        2 => Just(Kind::Old),
        4 => Just(Kind::WebSocket),
        2 => (2..3000_usize).prop_map(Kind::Cut),
    ];
    prop_oneof![
        80 => vec(ask(simple), 1..=2),
        8 => vec(ask(last), 1),
        3 => vec(ask(Just(Kind::Get)), 2..=5),
    ]
}

fn epochs() -> impl Strategy<Value = Vec<Epoch>> {
    let table = (
        prop::array::uniform5(prop::option::weighted(0.85, 0..INSTANCES)),
        0..OS_USERS.len(),
    );
    let lane = (vec(step(), 0..12), vec(step(), 0..60));
    let epoch = (table, vec(lane, LANES)).prop_map(|((of, shift), lanes)| Epoch {
        table: Table { of, shift },
        lanes,
    });
    vec(epoch, 1..=4)
}

/// A request that was sent, and what may have become of it.
#[derive(Debug)]
struct Sent {
    /// Whose it may be: by the table before and by the one after.
    may: Vec<Option<usize>>,
    user: &'static str,
    kind: Kind,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Answered by that instance.
    By(usize),
    /// Answered by the dispatcher itself.
    Refused,
    /// Not answered: cut off, or behind one that ended the connection.
    Unanswered,
}

struct World {
    dispatcher: Dispatcher,
    instances: Vec<Witness>,
    /// Counts targets, tables and answers.
    targets: AtomicUsize,
    tables: AtomicUsize,
    requests: AtomicUsize,
    attributed: AtomicUsize,
    refused: AtomicUsize,
    paired: AtomicUsize,
    websockets: AtomicUsize,
    unanswered: AtomicUsize,
    /// Which instances may yet come to hear of requests that nobody waits for.
    loose: std::sync::Mutex<HashMap<String, Vec<Option<usize>>>>,
    /// The first target of a case, once one has failed: what broke off then may still come in.
    fresh: AtomicUsize,
    _base: TempDir,
}

impl World {
    async fn new() -> World {
        let base = TempDir::new().unwrap();
        let mut instances = Vec::new();
        for number in 0..INSTANCES {
            instances.push(Witness::start(&format!("i{number}")).await);
        }
        let socket = base.path().join("mint.sock");
        let mint = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = mint.accept().await {
                tokio::spawn(async move {
                    let _ = stream.read(&mut [0; 64]).await;
                    let _ = stream.write_all(b"{\"credential\":\"c\"}\nexit 0\n").await;
                });
            }
        });
        let setup = Setup::new(base.path(), Vec::new())
            .set("pairing", json!({ "mint_socket": socket, "per_user_per_minute": 100_000, "max_concurrent": 50 }))
            .user("canary", "alice", instances[0].port);
        World {
            dispatcher: setup.start().await,
            instances,
            targets: AtomicUsize::new(0),
            tables: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            attributed: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            paired: AtomicUsize::new(0),
            websockets: AtomicUsize::new(0),
            unanswered: AtomicUsize::new(0),
            loose: Default::default(),
            fresh: AtomicUsize::new(0),
            _base: base,
        }
    }

    /// Puts a table in force, and returns once it is: a name that stands in no other has an instance then.
    async fn put(&self, table: &Table) {
        let canary = format!("canary{}", self.tables.fetch_add(1, Ordering::Relaxed));
        let os_user = |instance: usize| OS_USERS[(instance + table.shift) % OS_USERS.len()];
        let entry = |instance: usize| json!({ "os_user": os_user(instance), "port": self.instances[instance].port });
        let mut file = json!({ &canary: entry(0) });
        for name in NAMES {
            if let Some(instance) = table.get(name) {
                file[name] = entry(instance);
            }
        }
        self.dispatcher.write_table(&file);
        self.dispatcher.signal(Signal::HUP);
        wait_for("table in force", async || {
            let cookie = [("Cookie", "t3_session=i0")];
            self.dispatcher
                .get(&canary, "/canary", &cookie)
                .await
                .status
                == 200
        })
        .await;
    }
}

/// Runs a case.
async fn run(world: &Arc<World>, epochs: Vec<Epoch>) -> Result<(), String> {
    // Whatever was before, a case begins with nobody having anything.
    let mut before = Table {
        of: [None; NAMES.len()],
        shift: 0,
    };
    world.put(&before).await;
    let mut connections: Vec<Option<Client>> = (0..LANES).map(|_| None).collect();
    let mut sent = HashMap::new();
    for epoch in epochs {
        let settled = Arc::new(AtomicBool::new(false));
        let mut running = tokio::task::JoinSet::new();
        for (place, (meanwhile, afterwards)) in epoch.lanes.into_iter().enumerate() {
            let mut lane = Lane {
                world: world.clone(),
                client: connections[place].take(),
                tables: [before.clone(), epoch.table.clone()],
                settled: settled.clone(),
                sent: Vec::new(),
            };
            running.spawn(async move {
                for step in meanwhile {
                    lane.take(step).await?;
                }
                let until = std::time::Instant::now() + PATIENCE;
                while !lane.settled.load(Ordering::Acquire) {
                    if std::time::Instant::now() > until {
                        return Err("the table never came into force".into());
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                for step in afterwards {
                    lane.take(step).await?;
                }
                Ok::<_, String>((place, lane.client, lane.sent))
            });
        }
        world.put(&epoch.table).await;
        settled.store(true, Ordering::Release);
        while let Some(lane) = running.join_next().await {
            let (place, client, of_lane) = lane.map_err(|error| error.to_string())??;
            connections[place] = client;
            sent.extend(of_lane);
        }
        before = epoch.table;
    }
    count(world, sent)
}

/// Counts at the instances: what was answered in an instance's name was seen there, once, under the person's own name,
/// and nothing else was seen anywhere.
fn count(world: &World, sent: HashMap<String, Sent>) -> Result<(), String> {
    let mut loose = world.loose.lock().unwrap();
    let mut seen_at: HashMap<String, Vec<usize>> = HashMap::new();
    for (number, instance) in world.instances.iter().enumerate() {
        for (target, seen) in instance.take() {
            let number_in = target
                .strip_prefix("/r/")
                .and_then(|number| number.parse().ok());
            let is_stale =
                number_in.is_some_and(|number: usize| number < world.fresh.load(Ordering::Relaxed));
            if target == "/canary" || is_stale {
                continue;
            }
            let sent = sent.get(&target);
            let late = loose.get(&target);
            let Some(may) = sent.map(|sent| &sent.may).or(late) else {
                return Err(format!(
                    "instance {number} saw {target}, which nobody sent: {seen:?}"
                ));
            };
            if !may.contains(&Some(number)) {
                return Err(format!(
                    "instance {number} saw {target}, which was for {may:?}: {seen:?}"
                ));
            }
            for seen in &seen {
                let users: Vec<_> = seen.head.all("x-authentik-username").collect();
                if sent.is_some_and(|sent| users != [sent.user]) {
                    return Err(format!(
                        "instance {number} saw {users:?} in {target}: {sent:?}"
                    ));
                }
            }
            seen_at
                .entry(target)
                .or_default()
                .extend(vec![number; seen.len()]);
        }
        if let Some(fault) = instance.faults().first() {
            return Err(fault.clone());
        }
    }
    for (target, sent) in sent {
        let seen = seen_at.remove(&target).unwrap_or_default();
        let right = match sent.end {
            End::By(instance) => seen == [instance],
            // A WebSocket that is asked for while the table takes the instance away may have got there.
            End::Refused if sent.kind == Kind::WebSocket && sent.may.len() > 1 => seen.len() <= 1,
            End::Refused => seen.is_empty(),
            End::Unanswered => seen.len() <= 1,
        };
        if !right {
            return Err(format!("{target} was seen by {seen:?}: {sent:?}"));
        }
        match sent.end {
            End::By(_) => world.attributed.fetch_add(1, Ordering::Relaxed),
            End::Refused => world.refused.fetch_add(1, Ordering::Relaxed),
            End::Unanswered => {
                if seen.is_empty() {
                    loose.insert(target, sent.may);
                }
                world.unanswered.fetch_add(1, Ordering::Relaxed)
            }
        };
    }
    Ok(())
}

/// One connection of the edge, over which everybody's requests go.
struct Lane {
    world: Arc<World>,
    client: Option<Client>,
    /// The table that was in force, and the one that comes.
    tables: [Table; 2],
    settled: Arc<AtomicBool>,
    sent: Vec<(String, Sent)>,
}

impl Lane {
    /// Sends the requests of a step, and holds the answers against the oracle.
    async fn take(&mut self, step: Step) -> Result<(), String> {
        let address = self.world.dispatcher.address();
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(address)
                .await
                .map_err(|error| error.to_string())?,
        };
        let tables = if self.settled.load(Ordering::Acquire) {
            &self.tables[1..]
        } else {
            &self.tables
        };
        let mut bytes = Vec::new();
        let mut waiting = Vec::new();
        for mut ask in step {
            let number = self.world.targets.fetch_add(1, Ordering::Relaxed);
            self.world.requests.fetch_add(1, Ordering::Relaxed);
            let target = format!("/r/{number}");
            let name = named(&ask.namings);
            let may: Vec<Option<usize>> =
                tables.iter().map(|table| table.get(name.ok()?)).collect();
            if matches!(ask.cookies, Cookies::Own) {
                ask.cookies = may
                    .last()
                    .copied()
                    .flatten()
                    .map_or(Cookies::None, Cookies::Of);
            }
            bytes.extend(wire(&ask, &target));
            waiting.push((ask, target, name, may));
        }
        // A kept connection may have been closed after the last answer; then nobody has read this.
        let mut written = client.send(&bytes).await;
        if written.is_err() {
            client = Client::connect(address)
                .await
                .map_err(|error| error.to_string())?;
            written = client.send(&bytes).await;
        }
        let mut open = written.is_ok();
        for (ask, target, name, may) in waiting {
            let user = ask
                .namings
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case("x-authentik-username"))
                .map_or("", |(_, value)| value.trim_matches([' ', '\t']));
            let mut sent = Sent {
                may,
                user,
                kind: ask.kind,
                end: End::Unanswered,
            };
            if let Kind::Cut(_) = ask.kind {
                open = false;
            }
            if open {
                let method = if ask.kind == Kind::Head {
                    "HEAD"
                } else {
                    "GET"
                };
                match timeout(PATIENCE, client.read_reply(method)).await {
                    Err(_) => return Err(format!("{target} has no answer: {ask:?}")),
                    Ok(Err(_)) => open = false,
                    Ok(Ok(reply)) => {
                        sent.end = self
                            .judge(&ask, &reply, name, &sent.may, tables.len() == 1)
                            .map_err(|fault| {
                                format!("{target}: {fault}\n{ask:?}\n{sent:?}\n{reply:?}")
                            })?;
                        if reply.status == 101 {
                            self.world.websockets.fetch_add(1, Ordering::Relaxed);
                            let talked = talk(&mut client).await;
                            // A table that takes the instance away ends it.
                            if !talked && tables.len() == 1 {
                                return Err(format!("{target}: the WebSocket ended: {ask:?}"));
                            }
                            open = false;
                        }
                        let closes = reply.head.has_token("connection", "close");
                        open &= !closes && ask.kind != Kind::Old;
                    }
                }
            }
            self.sent.push((target, sent));
        }
        self.client = open.then_some(client);
        Ok(())
    }

    /// Whether the answer is one that the oracle allows, and who gave it.
    fn judge(
        &self,
        ask: &Ask,
        reply: &Reply,
        name: Result<&str, u16>,
        may: &[Option<usize>],
        settled: bool,
    ) -> Result<End, String> {
        let instance = |text: Option<&str>| text?.strip_prefix('i')?.parse::<usize>().ok();
        if reply.get("x-t3-dispatch-error").is_some() {
            let expected = match name {
                // It may have been taken away while it was looked for.
                Ok(_) if may.contains(&None) => reply.status == 403 || !settled,
                Ok(_) => !settled,
                Err(status) => reply.status == status,
            };
            return expected.then_some(End::Refused).ok_or("refused".into());
        }
        if reply.status == 302 {
            let own = ask
                .cookies
                .of()
                .is_some_and(|of| may.iter().all(|may| *may == Some(of)));
            let asked = matches!(ask.cookies, Cookies::None) || ask.kind == Kind::Navigation;
            let given: Vec<_> = reply.cookies();
            let fine = given
                .iter()
                .all(|cookie| may.contains(&instance(cookie.strip_prefix("t3_session="))))
                && (given.len() == 1 || !settled);
            self.world.paired.fetch_add(1, Ordering::Relaxed);
            return (fine && asked && !own && may.iter().any(Option::is_some))
                .then_some(End::Refused)
                .ok_or("paired".into());
        }
        let Some(who) = instance(reply.get("x-who")) else {
            return Err("nobody's answer".into());
        };
        if !may.contains(&Some(who)) {
            return Err(format!("answered by {who}"));
        }
        let opened = matches!(reply.status, 200 | 101);
        if opened != (ask.cookies.of() == Some(who)) {
            return Err("a session opened what it is not for, or did not open its own".into());
        }
        if ask.kind != Kind::Head && reply.status != 101 {
            let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
            let length = match ask.kind {
                Kind::Post(length) | Kind::Chunks(length) => length,
                _ => 0,
            };
            if body["body"] != length {
                return Err("another body".into());
            }
        }
        Ok(End::By(who))
    }
}

/// The bytes of a request.
fn wire(ask: &Ask, target: &str) -> Vec<u8> {
    let url = if ask.absolute {
        format!("http://{}{target}", ask.host)
    } else {
        target.to_owned()
    };
    let (method, version) = match ask.kind {
        Kind::Get | Kind::Navigation | Kind::WebSocket => ("GET", "1.1"),
        Kind::Head => ("HEAD", "1.1"),
        Kind::Post(_) | Kind::Chunks(_) | Kind::Cut(_) => ("POST", "1.1"),
        Kind::Old => ("GET", "1.0"),
    };
    let mut head = format!("{method} {url} HTTP/{version}\r\nHost: {}\r\n", ask.host);
    for (name, value) in &ask.namings {
        head += &format!("{name}: {value}\r\n");
    }
    for decoy in &ask.decoys {
        head += &format!("{decoy}\r\n");
    }
    head += &format!("Cookie: {}\r\n", ask.cookies.line());
    let body = match ask.kind {
        Kind::Navigation => {
            head += "Sec-Fetch-Dest: document\r\nAccept: text/html\r\n";
            Vec::new()
        }
        Kind::Post(length) => {
            head += &format!("Content-Length: {length}\r\n");
            vec![b'x'; length]
        }
        Kind::Cut(length) => {
            head += &format!("Content-Length: {length}\r\n");
            vec![b'x'; length / 2]
        }
        Kind::Chunks(length) => {
            head += "Transfer-Encoding: chunked\r\n";
            let part = format!("{:x}\r\n{}\r\n", length, "x".repeat(length));
            format!("{part}0\r\n\r\n").into_bytes()
        }
        Kind::WebSocket => {
            head += "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
            Vec::new()
        }
        Kind::Get | Kind::Head | Kind::Old => Vec::new(),
    };
    head += "\r\n";
    [head.into_bytes(), body].concat()
}

/// Whether a WebSocket carries a message there and back, and ends.
async fn talk(client: &mut Client) -> bool {
    let talking = async {
        let hello = Frame::text("hello");
        hello.write(&mut client.stream, MASK).await?;
        let echo = Frame::read(&mut client.stream).await?;
        Frame::close(1000).write(&mut client.stream, MASK).await?;
        Ok::<_, std::io::Error>(echo == hello)
    };
    matches!(timeout(PATIENCE, talking).await, Ok(Ok(true)))
}

#[test]
fn nobody_reaches_anybody_elses_instance() {
    let seed = std::env::var("T3_TEST_SEED").map_or(SEED, |seed| seed.parse().unwrap());
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        failure_persistence: None,
        max_shrink_iters: 300,
        max_shrink_time: 60_000,
        ..Config::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let world = Arc::new(runtime.block_on(World::new()));
    let strategy = epochs();
    let mut cases = 0;
    while world.requests.load(Ordering::Relaxed) < REQUESTS {
        cases += 1;
        let tree = strategy.new_tree(&mut runner).unwrap();
        let outcome = runner.run_one(tree, |epochs| {
            let ran = runtime.block_on(run(&world, epochs));
            ran.map_err(|fault| {
                eprintln!("case {cases}: {fault}");
                let next = world.targets.load(Ordering::Relaxed);
                world.fresh.store(next, Ordering::Relaxed);
                TestCaseError::fail(fault)
            })
        });
        if let Err(error) = outcome {
            panic!("T3_TEST_SEED={seed}, case {cases}: {error}");
        }
    }
    let of = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let (requests, attributed) = (of(&world.requests), of(&world.attributed));
    let (refused, unanswered) = (of(&world.refused), of(&world.unanswered));
    println!(
        "{requests} requests in {cases} cases, {} tables: {attributed} answered by instances, {} of them WebSockets; \
         {refused} by the dispatcher, {} of them pairings; {unanswered} cut off",
        of(&world.tables),
        of(&world.websockets),
        of(&world.paired),
    );
    assert!(requests >= REQUESTS && attributed > REQUESTS / 4 && refused > REQUESTS / 20);
    assert!(unanswered < REQUESTS / 20);
    assert_eq!(attributed + refused + unanswered, requests);
}
