//! The faults: how each is brought about and ended, whom it strikes, and what they may see.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::common::dispatcher::{Dispatcher, Setup, program, wait_for};
use crate::common::http::{self, Client};
use crate::common::instance::{Instance, Spoil, Version, Vices};
use crate::common::mint;
use crate::common::raw;
use crate::crowd::{Crowd, Doing, Trouble, What};

/// People that each fault of an instance strikes.
const STRUCK: usize = 3;

/// As many connections as there may be.
pub const CONNECTIONS: usize = 2000;

/// How long after the end of a fault something that is begun may still fail.
const AFTERWARDS: Duration = Duration::from_secs(5);

/// Where Debian's package `faketime` has it.
const FAKETIME: &str = "faketime/libfaketime.so.1";

/// A disk of its own for the ledger, and a clock of its own, for the dispatcher alone.
const ENTER: &str = r#"set -e
mount -t tmpfs -o size=24m none "$DISK"
exec env LD_PRELOAD="$LIBRARY" FAKETIME_TIMESTAMP_FILE="$CLOCK" FAKETIME_DONT_FAKE_MONOTONIC=1 \
  FAKETIME_CACHE_DURATION=1 "$@""#;

/// What the mint does for those who come for the first time, by their name.
const MINT: &str = r#"echo "start $user" >> "$base/mints"
case $user in
  hangs*) exec sleep 1000;;
  fails*) exit 1;;
  babbles*) echo 'Welcome!'; exit;;
esac"#;

/// Everything that can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Killed,
    Stopped,
    Silent,
    Slow,
    Trickling,
    ResetInHead,
    ResetInBody,
    NoHttp,
    EndlessHead,
    HugeHead,
    ShortBody,
    BadChunks,
    EndlessInterim,
    Mint,
    DiskFull,
    TableTruncated,
    TableIsFolder,
    TableDeleted,
    TableFlaps,
    NoDescriptors,
    ClockAhead,
    ClockBack,
}

impl Fault {
    pub const ALL: [Fault; 22] = [
        Fault::Killed,
        Fault::Mint,
        Fault::Stopped,
        Fault::Silent,
        Fault::Slow,
        Fault::Trickling,
        Fault::ResetInHead,
        Fault::ResetInBody,
        Fault::NoHttp,
        Fault::EndlessHead,
        Fault::HugeHead,
        Fault::ShortBody,
        Fault::BadChunks,
        Fault::EndlessInterim,
        Fault::DiskFull,
        Fault::TableTruncated,
        Fault::TableIsFolder,
        Fault::TableDeleted,
        Fault::TableFlaps,
        Fault::NoDescriptors,
        Fault::ClockAhead,
        Fault::ClockBack,
    ];

    /// The table flaps through its other faults, and without descriptors everybody is struck.
    pub fn goes_with_others(self) -> bool {
        use Fault::*;
        !matches!(
            self,
            TableTruncated | TableIsFolder | TableDeleted | NoDescriptors | ClockBack
        )
    }

    /// The people that it strikes, of so many.
    fn strikes(self, people: usize) -> std::ops::Range<usize> {
        match self {
            Fault::NoDescriptors => 0..people,
            // The one who is missing in some of the tables.
            Fault::TableFlaps => people - 1..people,
            _ if (self as usize) < Fault::Mint as usize => {
                let first = self as usize * STRUCK;
                first..first + STRUCK
            }
            _ => 0..0,
        }
    }

    /// What the people that it strikes may see.
    fn allows(self, trouble: &Trouble) -> bool {
        use Fault::*;
        let Trouble { doing, what, .. } = trouble;
        let refused = |status, code: &str| *what == What::Refused(status, code.into());
        let is_handshake = *doing == Doing::Handshake;
        let is_cut = *what == What::Broken || is_handshake && *what == What::Status(200);
        match self {
            Killed => {
                refused(502, "instance-unreachable")
                    || refused(502, "instance-failed")
                    || *what == What::Broken
                    || *what == What::Closed(None)
            }
            Stopped => *what == What::NoAnswer,
            Silent | EndlessInterim => *what == What::NoAnswer && *doing != Doing::Socket,
            ResetInHead | NoHttp | EndlessHead | HugeHead => refused(502, "instance-failed"),
            ResetInBody | ShortBody | BadChunks => is_cut && *doing != Doing::Socket,
            TableFlaps => {
                refused(403, "unknown-user")
                    || refused(502, "instance-unreachable")
                    || *what == What::Closed(Some(1008))
            }
            NoDescriptors => {
                refused(503, "out-of-descriptors")
                    || *what == What::NoAnswer && *doing != Doing::Socket
            }
            _ => false,
        }
    }

    /// Whether those whom it strikes are bound to see something.
    fn is_seen(self) -> bool {
        !matches!(self, Fault::Slow | Fault::Trickling)
    }

    /// By how much it sets the clock.
    fn hours(self) -> i32 {
        if self == Fault::ClockBack { -5 } else { 5 }
    }

    /// Who pairs too often before the clock is set.
    fn visitor(self) -> &'static str {
        if self == Fault::ClockBack {
            "erin"
        } else {
            "dave"
        }
    }

    /// What an instance does that it strikes.
    fn vices(self) -> Vices {
        use Fault::*;
        let spoils = match self {
            Trickling => Some(Spoil::Trickle),
            ResetInHead => Some(Spoil::CutHead),
            ResetInBody => Some(Spoil::CutBody),
            EndlessHead => Some(Spoil::EndlessHead),
            HugeHead => Some(Spoil::HugeHead),
            ShortBody => Some(Spoil::ShortBody),
            BadChunks => Some(Spoil::BadChunks),
            EndlessInterim => Some(Spoil::EndlessInterim),
            _ => None,
        };
        Vices {
            silent: self == Silent,
            garbage: self == NoHttp,
            answers_after: Duration::from_millis(if self == Slow { 1500 } else { 0 }),
            spoils,
            ..Vices::default()
        }
    }
}

pub struct World {
    pub dispatcher: Dispatcher,
    pub crowd: Crowd,
    table: Value,
    /// The instances of those who come for the first time.
    _newcomers: Vec<Instance>,
    flapping: Option<(watch::Sender<bool>, JoinHandle<()>)>,
    waiting: Vec<Client>,
    lost: f64,
    base: TempDir,
}

impl World {
    pub async fn new(size: usize) -> World {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test has to run as root: it gives the dispatcher a disk of its own, and looks at its descriptors"
        );
        use_all_descriptors();
        let base = TempDir::new().unwrap();
        let path = |name: &str| base.path().join(name);
        fs::create_dir(path("disk")).unwrap();
        fs::write(path("clock"), "+0").unwrap();
        let script = mint::script(base.path(), "mint-some", &format!("{MINT}\n{}", mint::MINT));
        let mut enter = Command::new("unshare");
        enter
            .args(["--mount", "sh", "-c", ENTER, "enter"])
            .arg(program().get_program())
            .env("DISK", path("disk"))
            .env("CLOCK", path("clock"))
            .env("LIBRARY", faketime())
            .stdin(Stdio::null());
        let mut setup = Setup::new(base.path(), script)
            .set("tunnels.ledger", json!(path("disk").join("closes.jsonl")))
            .set("tunnels.ledger_max_mb", 4)
            .set("tunnels.client_heartbeat", "500ms")
            .set("tunnels.client_watchdog", "3s")
            .set("session.check_timeout", "1s")
            .set("pairing.mint_timeout", "2s")
            .set("table_poll", "1s")
            .set("max_connections", CONNECTIONS)
            .through(enter);
        let crowd = Crowd::new(base.path(), size, (setup.ip, 3780).into()).await;
        for (number, person) in crowd.people.iter().enumerate() {
            setup = setup.user(&person.name, &person.name, crowd.instance(number).port());
        }
        let mut newcomers = Vec::new();
        for name in [
            "hangs1", "hangs2", "fails", "babbles", "alice", "bob", "carol", "dave", "erin",
        ] {
            let home = mint::home(base.path(), name);
            let instance = Instance::start(&home, Version::V0_0_33).await;
            setup = setup.user(name, name, instance.port());
            newcomers.push(instance);
        }
        let table = setup.table.clone();
        World {
            dispatcher: setup.start().await,
            crowd,
            table,
            _newcomers: newcomers,
            flapping: None,
            waiting: Vec::new(),
            lost: 0.0,
            base,
        }
    }

    fn proc(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.dispatcher.child.id()).into()
    }

    /// How many file descriptors the dispatcher has open.
    pub fn descriptors(&self) -> usize {
        self.dispatcher.descriptors().len()
    }

    /// How many of them are sockets.
    pub fn sockets(&self) -> usize {
        let open = fs::read_dir(self.proc("fd")).unwrap();
        // One that was closed since has no target any more.
        let targets = open.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        let is_socket = |target: &PathBuf| target.to_string_lossy().starts_with("socket:");
        targets.filter(is_socket).count()
    }

    /// How many descriptors it has once nobody has come for a while, and kept connections are closed.
    pub async fn descriptors_at_rest(&self) -> usize {
        let (mut count, mut since) = (self.descriptors(), Instant::now());
        while since.elapsed() < Duration::from_secs(5) {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = self.descriptors();
            if now != count {
                (count, since) = (now, Instant::now());
            }
        }
        count
    }

    /// The CPU time that the dispatcher has used.
    pub fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(self.proc("stat")).unwrap();
        let (_, rest) = stat.rsplit_once(") ").unwrap();
        let ticks = rest.split(' ').skip(11).take(2);
        let ticks: u64 = ticks.map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Waits until everybody has done everything well that they do, begun after `then`.
    pub async fn everybody_is_well_since(&self, then: Instant) {
        wait_for("time when all was well", async || {
            self.crowd
                .people
                .iter()
                .all(|person| person.is_well_since(then))
        })
        .await;
    }

    /// Brings the faults about, all at once, and ends them; and looks at who has seen what.
    pub async fn go_through(&mut self, faults: &[Fault]) {
        let people = self.crowd.people.clone();
        let strikes = |number: usize| {
            let mut of = faults.iter();
            of.find(|fault| fault.strikes(people.len()).contains(&number))
        };
        let begun = Instant::now();
        for fault in faults {
            self.strike(*fault).await;
        }
        let struck = Instant::now();
        wait_for("effect of the faults", async || {
            people
                .iter()
                .enumerate()
                .all(|(number, person)| match strikes(number) {
                    None => person.is_well_since(struck),
                    Some(Fault::NoDescriptors) => person.was_well(Doing::Socket, struck),
                    Some(fault) if fault.is_seen() => !person.troubles.lock().unwrap().is_empty(),
                    Some(_) => person.has_been_well_since(struck),
                })
        })
        .await;
        if faults.contains(&Fault::Mint) {
            self.first_visits().await;
        }
        for fault in faults {
            self.mend(*fault).await;
        }
        let ended = Instant::now();
        wait_for(&format!("recovery from {faults:?}"), async || {
            people
                .iter()
                .enumerate()
                .all(|(number, person)| strikes(number).is_none() || person.is_well_since(ended))
        })
        .await;
        let mut seen: BTreeMap<(Doing, What), usize> = BTreeMap::new();
        let mut wrong = Vec::new();
        for (number, person) in people.iter().enumerate() {
            for trouble in std::mem::take(&mut *person.troubles.lock().unwrap()) {
                *seen
                    .entry((trouble.doing, trouble.what.clone()))
                    .or_default() += 1;
                let is_right = strikes(number).is_some_and(|fault| fault.allows(&trouble))
                    && trouble.at < ended + AFTERWARDS;
                if !is_right {
                    wrong.push(format!(
                        "{} with {:?}: {:?} {:?} {:?} after the beginning, {:?} after the end",
                        person.name,
                        strikes(number),
                        trouble.doing,
                        trouble.what,
                        trouble.at.saturating_duration_since(begun),
                        trouble.at.saturating_duration_since(ended),
                    ));
                }
            }
        }
        eprintln!(
            "{faults:?}, {:?} and {:?}: {seen:?}",
            ended - begun,
            ended.elapsed()
        );
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    async fn strike(&mut self, fault: Fault) {
        let table = self.base.path().join("dispatch.json");
        let whole = self.table.to_string();
        match fault {
            Fault::Killed => {
                for number in fault.strikes(self.crowd.people.len()) {
                    self.crowd.instances[number].take().unwrap().kill().await;
                }
            }
            Fault::Mint => {}
            Fault::DiskFull => {
                self.lost = self.lost_lines().await;
                let filler = self
                    .proc("root")
                    .join(self.disk().strip_prefix("/").unwrap());
                let mut filler = fs::File::create(filler.join("filler")).unwrap();
                std::io::copy(&mut std::io::repeat(0), &mut filler).unwrap_err();
                wait_for("line that is lost", async || {
                    self.lost_lines().await > self.lost
                })
                .await;
            }
            Fault::TableTruncated => fs::write(table, &whole[..whole.len() / 2]).unwrap(),
            Fault::TableIsFolder => {
                fs::remove_file(&table).unwrap();
                fs::create_dir(table).unwrap();
            }
            Fault::TableDeleted => fs::remove_file(table).unwrap(),
            Fault::TableFlaps => {
                let mut without = self.table.clone();
                let last = &self.crowd.people.last().unwrap().name;
                without.as_object_mut().unwrap().remove(last);
                let (end, over) = watch::channel(false);
                let flapping = tokio::spawn(flap(table, whole, without.to_string(), over));
                self.flapping = Some((end, flapping));
            }
            Fault::NoDescriptors => {
                self.dispatcher.allow_descriptors(false);
                for _ in 0..20 {
                    let mut client = Client::connect(self.dispatcher.address()).await.unwrap();
                    let head = "GET /healthz HTTP/1.1\r\nHost: t3.example.com\r\n\r\n";
                    client.send(head).await.unwrap();
                    self.waiting.push(client);
                }
                // It never goes over a connection that was kept, so it needs one more.
                let is_refused = |trouble: &Trouble| {
                    trouble.doing == Doing::Post
                        && trouble.what == What::Refused(503, "out-of-descriptors".into())
                };
                wait_for("POST that is refused without descriptors", async || {
                    let mut people = self.crowd.people.iter();
                    people.any(|person| person.troubles.lock().unwrap().iter().any(is_refused))
                })
                .await;
            }
            Fault::ClockAhead | Fault::ClockBack => {
                let id = self.drop_a_socket(fault).await;
                let visits_too_often =
                    async || self.dispatcher.navigate(fault.visitor(), "").await.status == 429;
                wait_for("pairing too often", visits_too_often).await;
                self.set_clock(fault.hours()).await;
                self.under_another_clock(fault, &id).await;
            }
            _ => {
                for number in fault.strikes(self.crowd.people.len()) {
                    let instance = self.crowd.instance(number);
                    instance.stop(fault == Fault::Stopped);
                    instance.set(|vices| *vices = fault.vices());
                }
            }
        }
    }

    async fn mend(&mut self, fault: Fault) {
        let table = self.base.path().join("dispatch.json");
        match fault {
            Fault::Killed => {
                for number in fault.strikes(self.crowd.people.len()) {
                    let entry = &self.table[&self.crowd.people[number].name];
                    let port = entry["port"].as_u64().unwrap() as u16;
                    let home = mint::home(self.base.path(), &self.crowd.people[number].name);
                    let keep_alive = Duration::from_secs(5);
                    let version = Version::V0_0_33;
                    let instance = Instance::start_with(&home, version, port, keep_alive).await;
                    self.crowd.instances[number] = Some(instance);
                }
            }
            Fault::Mint => {}
            Fault::DiskFull => {
                let disk = self
                    .proc("root")
                    .join(self.disk().strip_prefix("/").unwrap());
                fs::remove_file(disk.join("filler")).unwrap();
                let lines = self.ledger().len();
                wait_for("line that is written again", async || {
                    self.ledger().len() != lines
                })
                .await;
            }
            Fault::TableTruncated | Fault::TableDeleted => self.dispatcher.write_table(&self.table),
            Fault::TableIsFolder => {
                fs::remove_dir(table).unwrap();
                self.dispatcher.write_table(&self.table);
            }
            Fault::TableFlaps => {
                let (end, flapping) = self.flapping.take().unwrap();
                end.send_replace(true);
                flapping.await.unwrap();
            }
            Fault::NoDescriptors => {
                self.dispatcher.allow_descriptors(true);
                for mut client in std::mem::take(&mut self.waiting) {
                    assert_eq!(client.read_reply("GET").await.unwrap().status, 200);
                }
            }
            Fault::ClockAhead | Fault::ClockBack => self.set_clock(0).await,
            _ => {
                for number in fault.strikes(self.crowd.people.len()) {
                    let instance = self.crowd.instance(number);
                    instance.set(|vices| *vices = Vices::default());
                    instance.stop(false);
                }
            }
        }
    }

    fn disk(&self) -> PathBuf {
        self.base.path().join("disk")
    }

    /// The ledger's lines, each of them whole.
    pub fn ledger(&self) -> Vec<Value> {
        let disk = self
            .proc("root")
            .join(self.disk().strip_prefix("/").unwrap());
        let text = fs::read_to_string(disk.join("closes.jsonl")).unwrap();
        // The last one may be being written.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let lines = text[..whole].lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    async fn lost_lines(&self) -> f64 {
        self.dispatcher
            .metric("t3dispatch_ledger_lines_lost_total")
            .await
    }

    /// Sets the dispatcher's clock by so much from the real one, and waits until it is.
    async fn set_clock(&self, hours: i32) {
        let new = self.base.path().join("clock.new");
        fs::write(&new, format!("{hours:+}h")).unwrap();
        fs::rename(&new, self.base.path().join("clock")).unwrap();
        let by = f64::from(hours) * 3600.0;
        wait_for("another time", async || {
            let then = self
                .dispatcher
                .metric("t3dispatch_table_last_good_load_timestamp_seconds")
                .await;
            let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
            (then - now - by).abs() < 60.0
        })
        .await;
    }

    /// Breaks a WebSocket off, and gives its ID once it has left its record.
    async fn drop_a_socket(&self, fault: Fault) -> String {
        let person = &self.crowd.people[self.crowd.people.len() / 2];
        let id = format!("before-{fault:?}-{:?}", Instant::now());
        let id: String = id
            .chars()
            .filter(|char| char.is_ascii_alphanumeric())
            .collect();
        let id = id[id.len().saturating_sub(60)..].to_owned();
        let headers = [("Cookie", person.cookie.as_str()), ("X-Request-Id", &id)];
        let (status, client) = raw::ask(self.dispatcher.address(), &person.name, &headers).await;
        assert_eq!(status, 101);
        raw::reset(client.stream);
        self.dispatcher
            .wait_for_log(&format!("id={id} dur_ms="))
            .await;
        id
    }

    /// What has to hold after the clock has jumped, of a drop before that, and of somebody who paired too often before.
    async fn under_another_clock(&self, fault: Fault, id: &str) {
        let (dispatcher, hours) = (&self.dispatcher, f64::from(fault.hours()));
        let refused = dispatcher.navigate(fault.visitor(), "").await;
        let again: u64 = refused.get("retry-after").unwrap().parse().unwrap();
        assert!((1..=60).contains(&again), "{again}");
        // Its window was open when the clock was set.
        wait_for("verdict", async || {
            let judged = dispatcher.logged("ws verdict");
            judged
                .iter()
                .any(|line| line.contains(&format!("id={id} ")))
        })
        .await;
        let own = |line: &str| humantime::parse_rfc3339(line.split(' ').next().unwrap()).unwrap();
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64() + hours * 3600.0;
        wait_for("log line under the other clock", async || {
            let last = dispatcher.logged("ws close").pop().unwrap();
            let logged = own(&last).duration_since(SystemTime::UNIX_EPOCH).unwrap();
            (logged.as_secs_f64() - now).abs() < 60.0
        })
        .await;
        let closes = http::request(dispatcher.admin(), "GET", "/closes?since=10m", &[], b"");
        let closes = closes.await.unwrap();
        assert_eq!(closes.status, 200);
        let closes: Vec<Value> = serde_json::from_slice(&closes.body).unwrap();
        for record in closes {
            let ended = humantime::parse_rfc3339(record["time"].as_str().unwrap()).unwrap();
            let ended = ended.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            assert!(ended.as_secs_f64() > now - 700.0, "{record:#}");
        }
        let mut explain = program();
        explain
            .args(["explain", "--since", "1h", "-c"])
            .arg(self.settings_outside());
        let explain = tokio::task::spawn_blocking(move || explain.output().unwrap());
        let explain = explain.await.unwrap();
        assert!(explain.status.success(), "{explain:?}");
    }

    /// The settings for somebody who sees the ledger's disk from outside.
    fn settings_outside(&self) -> PathBuf {
        let text = fs::read_to_string(self.base.path().join("t3-dispatch.yaml")).unwrap();
        let disk = self.disk().display().to_string();
        let outside = self.base.path().join("outside.yaml");
        let root = self.proc("root").display().to_string();
        fs::write(&outside, text.replace(&disk, &format!("{root}{disk}"))).unwrap();
        outside
    }

    /// People come for the first time while the mint hangs, fails or babbles for some of them.
    async fn first_visits(&self) {
        let dispatcher = &self.dispatcher;
        let mints = |name: &str| mint::count(self.base.path(), name);
        let before = ["hangs1", "hangs2"].map(mints);
        let hanging = async {
            tokio::join!(
                dispatcher.navigate("hangs1", ""),
                dispatcher.navigate("hangs2", "")
            )
        };
        let others = async {
            wait_for("two mints that hang", async || {
                ["hangs1", "hangs2"]
                    .map(mints)
                    .iter()
                    .zip(before)
                    .all(|(now, then)| *now > then)
            })
            .await;
            tokio::join!(
                dispatcher.navigate("fails", ""),
                dispatcher.navigate("babbles", ""),
                dispatcher.navigate("alice", ""),
                dispatcher.navigate("bob", ""),
                dispatcher.navigate("carol", ""),
            )
        };
        let ((hangs1, hangs2), (fails, babbles, alice, bob, carol)) = tokio::join!(hanging, others);
        for (reply, code) in [
            (hangs1, "mint-failed"),
            (hangs2, "mint-failed"),
            (fails, "mint-failed"),
            (babbles, "mint-unparseable"),
        ] {
            assert_eq!(reply.get("x-t3-dispatch-error"), Some(code));
        }
        for reply in [alice, bob, carol] {
            assert_eq!((reply.status, reply.cookies().len()), (302, 1));
        }
    }

    /// What holds at the end of it all.
    pub async fn look_back(&mut self) {
        assert!(self.dispatcher.child.try_wait().unwrap().is_none());
        assert_eq!(self.dispatcher.logged("panicked"), Vec::<String>::new());
        assert_eq!(self.dispatcher.logged(" started version=").len(), 1);
        let mints = mint::notes(self.base.path());
        let of_the_crowd = mints.iter().filter(|line| line.contains("person"));
        assert_eq!(of_the_crowd.count(), 0, "{mints:?}");
        self.ledger();
    }
}

/// A table that is good, cut short, a folder, not there, good without somebody; and so on, many times a second.
async fn flap(table: PathBuf, whole: String, without: String, mut over: watch::Receiver<bool>) {
    let new = table.with_extension("new");
    let clear = || {
        let _ = fs::remove_file(&table);
        let _ = fs::remove_dir(&table);
    };
    let replace = |text: &str| {
        clear();
        fs::write(&new, text).unwrap();
        fs::rename(&new, &table).unwrap();
    };
    for turn in 0.. {
        match turn % 6 {
            0 | 2 => replace(&whole),
            1 => fs::write(&table, &whole[..whole.len() / 2]).unwrap(),
            3 => {
                clear();
                fs::create_dir(&table).unwrap();
            }
            4 => replace(&without),
            _ => clear(),
        }
        let pause = Duration::from_millis(17);
        if tokio::time::timeout(pause, over.wait_for(|over| *over))
            .await
            .is_ok()
        {
            return replace(&whole);
        }
    }
}

fn use_all_descriptors() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, all).unwrap();
}

fn faketime() -> PathBuf {
    let folders = fs::read_dir("/usr/lib").unwrap();
    let mut found = folders.map(|folder| folder.unwrap().path().join(FAKETIME));
    found
        .find(|library| library.exists())
        .expect("install the package faketime")
}
