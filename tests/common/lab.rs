//! A laboratory: people, an edge, a load balancer, the real dispatcher and the real prober, and an instance for each person.
//! Every segment between them is a relay that can be broken in several ways.

use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, frame::coding::CloseCode};
use tokio_tungstenite::tungstenite::{Message, http::HeaderValue};

use super::dispatcher::{Dispatcher, Setup, program, wait_for};
use super::instance::{Instance, Version};
use super::successor::Successor;
use super::{http, mint};

/// What a client does, shortened.
pub const HEARTBEAT: Duration = Duration::from_millis(400);
pub const WATCHDOG: Duration = Duration::from_secs(2);

/// A way to break a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Both ends of every connection are closed.
    Cut,
    /// Both ends of every connection are reset.
    Reset,
    /// What comes is taken and lost.
    Blackhole,
    /// Nothing is taken any more, until it is.
    Freeze,
    /// Everything comes later than a client waits.
    Delay,
    /// A few bytes a second.
    Throttle,
    /// What goes towards the instance is lost.
    LoseUp,
    /// What goes towards the client is lost.
    LoseDown,
}

impl Way {
    pub const ALL: [Way; 8] = [
        Way::Cut,
        Way::Reset,
        Way::Blackhole,
        Way::Freeze,
        Way::Delay,
        Way::Throttle,
        Way::LoseUp,
        Way::LoseDown,
    ];

    /// Whether what goes in a direction is lost.
    fn loses(self, up: bool) -> bool {
        match self {
            Way::Blackhole => true,
            Way::LoseUp => up,
            Way::LoseDown => !up,
            _ => false,
        }
    }
}

/// What a relay does now, and how often it has cut and reset its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Orders {
    /// The way in which it is broken for as long as it is.
    mode: Option<Way>,
    cuts: u32,
    resets: u32,
}

/// A segment of the way.
pub struct Relay {
    pub address: SocketAddr,
    orders: watch::Sender<Orders>,
    task: JoinHandle<()>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relay {
    /// Listens on loopback and relays to `target`.
    pub async fn start(target: SocketAddr) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (orders, watched) = watch::channel(Orders {
            mode: None,
            cuts: 0,
            resets: 0,
        });
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(relay(near, target, watched.clone()));
            }
        });
        Relay {
            address,
            orders,
            task,
        }
    }

    pub fn break_(&self, way: Way) {
        self.orders.send_modify(|orders| match way {
            Way::Cut => orders.cuts += 1,
            Way::Reset => orders.resets += 1,
            way => orders.mode = Some(way),
        });
    }

    /// All is well again. Connections that have lost bytes cannot go on.
    pub fn mend(&self) {
        self.orders.send_modify(|orders| {
            if orders
                .mode
                .is_some_and(|way| way.loses(true) || way.loses(false))
            {
                orders.cuts += 1;
            }
            orders.mode = None;
        });
    }
}

/// How much later things come through a delaying relay.
const LATER: Duration = Duration::from_secs(3);

/// A throttled relay passes a byte in this time.
const NARROW: Duration = Duration::from_millis(200);

async fn relay(near: TcpStream, target: SocketAddr, mut orders: watch::Receiver<Orders>) {
    let Ok(far) = TcpStream::connect(target).await else {
        return;
    };
    for stream in [&near, &far] {
        let _ = stream.set_nodelay(true);
    }
    let began = *orders.borrow_and_update();
    let (near, far) = (near.into_std().unwrap(), far.into_std().unwrap());
    // Kept for the end, which is to be one of our own making.
    let ends = [near.try_clone().unwrap(), far.try_clone().unwrap()];
    let (near, far) = (
        TcpStream::from_std(near).unwrap(),
        TcpStream::from_std(far).unwrap(),
    );
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let up = tokio::spawn(pass(true, near_read, far_write, orders.clone()));
    let down = tokio::spawn(pass(false, far_read, near_write, orders.clone()));
    let (up_stop, down_stop) = (up.abort_handle(), down.abort_handle());
    let reset = tokio::select! {
        // Either direction's end is the end of both, once it has come through.
        _ = async { tokio::select! { _ = up => {}, _ = down => {} } } => false,
        reset = async {
            loop {
                if orders.changed().await.is_err() {
                    break false;
                }
                let now = *orders.borrow_and_update();
                if now.resets != began.resets {
                    break true;
                }
                if now.cuts != began.cuts {
                    break false;
                }
            }
        } => reset,
    };
    up_stop.abort();
    down_stop.abort();
    for end in ends {
        let socket = socket2::Socket::from(end);
        if reset {
            let _ = socket.set_linger(Some(Duration::ZERO));
        } else {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// One direction.
async fn pass(
    up: bool,
    mut from: tokio::net::tcp::OwnedReadHalf,
    to: tokio::net::tcp::OwnedWriteHalf,
    mut orders: watch::Receiver<Orders>,
) {
    let (later, mut queue) = tokio::sync::mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    // Bytes that have been taken and not been passed on.
    let waiting = Arc::new(AtomicUsize::new(0));
    // Bytes stay in order, so those that come after late ones are late as well.
    let writer = tokio::spawn({
        let mut orders = orders.clone();
        let mut to = to;
        let waiting = waiting.clone();
        async move {
            while let Some((due, bytes)) = queue.recv().await {
                tokio::time::sleep_until(due.into()).await;
                let mut left = &bytes[..];
                while !left.is_empty() {
                    let mode = orders.borrow_and_update().mode;
                    let step = match mode {
                        Some(Way::Throttle) => {
                            let _ = timeout(NARROW, orders.changed()).await;
                            1
                        }
                        Some(Way::Freeze) => {
                            if orders.changed().await.is_err() {
                                return;
                            }
                            continue;
                        }
                        _ => left.len(),
                    };
                    if to.write_all(&left[..step]).await.is_err() {
                        return;
                    }
                    waiting.fetch_sub(step, Ordering::AcqRel);
                    left = &left[step..];
                }
            }
            let _ = to.shutdown().await;
            // The end has come through; the other end has to see it before everything is closed.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let mode = orders.borrow_and_update().mode;
        if mode == Some(Way::Freeze) {
            if orders.changed().await.is_err() {
                return;
            }
            continue;
        }
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            changed = orders.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        let Ok(count @ 1..) = read else {
            // In a black hole an end is lost as well.
            let lost = orders.borrow().mode.is_some_and(|way| way.loses(up));
            if lost {
                std::future::pending::<()>().await;
            }
            break;
        };
        let mode = orders.borrow().mode;
        if mode.is_some_and(|way| way.loses(up)) {
            continue;
        }
        let wait = if mode == Some(Way::Delay) {
            LATER
        } else {
            Duration::ZERO
        };
        waiting.fetch_add(count, Ordering::AcqRel);
        let _ = later.send((Instant::now() + wait, buffer[..count].to_vec()));
        // A narrow place holds back whoever sends.
        while is_narrow(&orders) && waiting.load(Ordering::Acquire) > 4096 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    drop(later);
    let _ = writer.await;
}

fn is_narrow(orders: &watch::Receiver<Orders>) -> bool {
    orders.borrow().mode == Some(Way::Throttle)
}

/// A person with a browser: a WebSocket that comes back when it is lost.
pub struct Person {
    /// From the person's device to the edge.
    pub last_mile: Relay,
    orders: watch::Sender<Does>,
    state: watch::Receiver<Counts>,
    task: JoinHandle<()>,
}

/// What a person does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Does {
    Work,
    /// The device sleeps: nothing is sent, read or closed.
    Sleep,
    /// The tab is closed.
    Leave,
    /// The page ends its WebSocket and does not come back.
    Finish,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    pub opened: usize,
    pub lost: usize,
    pub is_open: bool,
}

impl Drop for Person {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Person {
    pub fn does(&self, what: Does) {
        self.orders.send_replace(what);
    }

    pub fn counts(&self) -> Counts {
        *self.state.borrow()
    }
}

/// How a client gives its WebSocket up: by a Close frame with a code, by one without, by hanging up, by a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goodbye {
    Code(u16),
    NoCode,
    Fin,
    Reset,
}

/// That of each person.
const GOODBYES: [Goodbye; 5] = [
    Goodbye::Code(1000),
    Goodbye::Fin,
    Goodbye::Code(4000),
    Goodbye::Reset,
    Goodbye::NoCode,
];

/// A person's client: heartbeat, watchdog, and the way back.
async fn client(
    address: SocketAddr,
    gives_up: Goodbye,
    headers: Vec<(&'static str, String)>,
    busy: bool,
    mut orders: watch::Receiver<Does>,
    state: watch::Sender<Counts>,
) {
    loop {
        let attempt = timeout(WATCHDOG, async {
            let stream = TcpStream::connect(address).await.ok()?;
            let _ = stream.set_nodelay(true);
            let mut request = "ws://t3.example.com/ws".into_client_request().unwrap();
            for (name, value) in &headers {
                let value = HeaderValue::from_str(value).unwrap();
                request.headers_mut().insert(*name, value);
            }
            let opened = tokio_tungstenite::client_async(request, stream).await;
            opened.ok().map(|(socket, _)| socket)
        });
        let Ok(Some(mut socket)) = attempt.await else {
            if matches!(*orders.borrow(), Does::Leave | Does::Finish) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            continue;
        };
        state.send_modify(|counts| {
            counts.opened += 1;
            counts.is_open = true;
        });
        let mut beat = tokio::time::interval(HEARTBEAT);
        let mut work = tokio::time::interval(Duration::from_millis(25));
        let mut heard = Instant::now();
        let goodbye = loop {
            match *orders.borrow_and_update() {
                Does::Work => {}
                Does::Leave => break Some(Goodbye::Code(1001)),
                Does::Finish => break Some(Goodbye::Code(1000)),
                Does::Sleep => {}
            }
            if *orders.borrow() == Does::Sleep {
                if orders.changed().await.is_err() {
                    return;
                }
                continue;
            }
            // A watchdog: nothing heard for so long, so the WebSocket is given up as a page does it.
            if heard.elapsed() >= WATCHDOG {
                break Some(gives_up);
            }
            let sent = tokio::select! {
                message = socket.next() => match message {
                    Some(Ok(Message::Close(_)) | Err(_)) | None => break None,
                    Some(Ok(_)) => {
                        heard = Instant::now();
                        Ok(Ok(()))
                    }
                },
                _ = orders.changed() => Ok(Ok(())),
                _ = beat.tick() => timeout(WATCHDOG, socket.send(Message::text("{\"_tag\":\"Ping\"}"))).await,
                _ = work.tick(), if busy => timeout(WATCHDOG, socket.send(Message::binary(vec![7; 2000]))).await,
                () = tokio::time::sleep_until((heard + WATCHDOG).into()) => Ok(Ok(())),
            };
            if !matches!(sent, Ok(Ok(()))) {
                break None;
            }
        };
        let asked = matches!(*orders.borrow(), Does::Leave | Does::Finish);
        state.send_modify(|counts| {
            counts.is_open = false;
            counts.lost += usize::from(!asked);
        });
        let frame = match goodbye {
            Some(Goodbye::Code(code)) => Some(Some(CloseFrame {
                code: CloseCode::from(code),
                reason: "".into(),
            })),
            Some(Goodbye::NoCode) => Some(None),
            _ => None,
        };
        if let Some(frame) = frame {
            let _ = timeout(Duration::from_millis(500), async {
                let _ = socket.close(frame).await;
                while let Some(Ok(_)) = socket.next().await {}
            })
            .await;
        }
        if goodbye == Some(Goodbye::Reset) {
            let stream = socket.get_ref();
            let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
        }
        drop(socket);
        if asked {
            return;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// The whole of it.
pub struct Lab {
    pub people: Vec<Person>,
    pub edge: Relay,
    pub balancer: Relay,
    /// From the dispatcher to each person's instance.
    pub serve: Vec<Relay>,
    pub instances: Vec<Instance>,
    pub dispatcher: Dispatcher,
    /// Who has taken over from it.
    pub successor: Option<Successor>,
    prober: Option<Child>,
    pub base: TempDir,
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(prober) = &mut self.prober {
            let _ = prober.kill();
            let _ = prober.wait();
        }
    }
}

const TOKEN: &str = "a-token-for-the-laboratory";

impl Lab {
    /// A laboratory with so many people, all of whom are connected, and both legs. In an office they share an address.
    pub async fn new(people: usize, busy: bool, office: bool) -> Lab {
        let base = TempDir::new().unwrap();
        let mut setup = Setup::new(base.path(), mint::working(base.path()))
            .set("tunnels.client_heartbeat", "400ms")
            .set("tunnels.client_watchdog", "2s")
            .set("probe", json!({ "token": TOKEN, "heartbeat": "1s" }));
        let (mut instances, mut serve) = (Vec::new(), Vec::new());
        for name in NAMES.iter().take(people) {
            let instance = Instance::start(&mint::home(base.path(), name), Version::V0_0_33).await;
            let relay = Relay::start(([127, 0, 0, 1], instance.port()).into()).await;
            setup = setup.user(name, name, relay.address.port());
            serve.push(relay);
            instances.push(instance);
        }
        let dispatcher = setup.start().await;
        let balancer = Relay::start(dispatcher.address()).await;
        let edge = Relay::start(balancer.address).await;
        let mut lab = Lab {
            people: Vec::new(),
            edge,
            balancer,
            serve,
            instances,
            dispatcher,
            successor: None,
            prober: None,
            base,
        };
        lab.start_prober();
        for number in 0..people {
            let ip = if office { 1 } else { number + 1 };
            lab.add_person(number, busy, format!("203.0.113.{ip}"))
                .await;
        }
        lab.wait_until_well().await;
        lab
    }

    async fn add_person(&mut self, number: usize, busy: bool, ip: String) {
        let session = self.instances[number].new_session();
        let last_mile = Relay::start(self.edge.address).await;
        let (orders, ordered) = watch::channel(Does::Work);
        let (counts, state) = watch::channel(Counts::default());
        let headers = vec![
            (
                "X-authentik-username",
                format!("{}@example.com", NAMES[number]),
            ),
            ("X-Forwarded-For", ip),
            ("Cookie", session),
        ];
        let gives_up = GOODBYES[number];
        let task = tokio::spawn(client(
            last_mile.address,
            gives_up,
            headers,
            busy,
            ordered,
            counts,
        ));
        self.people.push(Person {
            last_mile,
            orders,
            state,
            task,
        });
    }

    pub fn start_prober(&mut self) {
        let file = self.base.path().join("probe.yaml");
        let leg = |name: &str, relay: &Relay| {
            let url = format!("ws://{}/probe/ws", relay.address);
            json!({ "name": name, "kind": "websocket", "url": url, "resolve": "system" })
        };
        let settings = json!({ "probe": {
            "listen": format!("{}:9108", self.dispatcher.ip),
            "token": TOKEN,
            "heartbeat": "500ms",
            "rtt_timeout": "2s",
            "connect_timeout": "1s",
            "reconnect": "300ms",
            "reconnect_max": "1s",
            "legs": [leg("cloudflare", &self.edge), leg("internal", &self.balancer)],
        }});
        std::fs::write(&file, settings.to_string()).unwrap();
        let log = std::fs::File::create(self.base.path().join("probe.log")).unwrap();
        let child = program()
            .args(["probe", "-c"])
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.prober = Some(child);
    }

    pub async fn signal_prober(&mut self, signal: Signal) {
        let child = self.prober.as_mut().unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
        if signal != Signal::STOP && signal != Signal::CONT {
            while child.try_wait().unwrap().is_none() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            self.prober = None;
        }
    }

    /// Waits until everybody and both legs are connected, and have been for a moment.
    pub async fn wait_until_well(&self) {
        let well = async || {
            let people = self.people.iter().all(|person| person.counts().is_open);
            let log =
                std::fs::read_to_string(self.base.path().join("probe.log")).unwrap_or_default();
            let metrics = http::request(self.dispatcher.admin(), "GET", "/metrics", &[], b"").await;
            let metrics = metrics.map(|reply| reply.text()).unwrap_or_default();
            let up = |leg: &str| {
                metrics.contains(&format!("t3dispatch_leg_connected{{leg=\"{leg}\"}} 1"))
            };
            assert!(!log.contains("panicked"), "{log}");
            people && (self.prober.is_none() || up("cloudflare") && up("internal"))
        };
        wait_for("everybody to be connected", well).await;
        // Heartbeats enough for silence to mean something.
        tokio::time::sleep(HEARTBEAT * 4).await;
        wait_for("everybody to be connected still", well).await;
    }

    /// Everybody leaves in good order; gives the records, each with its verdict.
    pub async fn finish(&mut self) -> Vec<Value> {
        for person in &self.people {
            person.does(Does::Finish);
        }
        wait_for("the end of all WebSockets", async || {
            self.open_tunnels().await == 0
        })
        .await;
        self.judged().await
    }

    pub async fn open_tunnels(&self) -> usize {
        self.dispatcher.metric("t3dispatch_tunnels_open").await as usize
    }

    /// Waits until all records have their verdicts.
    pub async fn judged(&self) -> Vec<Value> {
        let until = Instant::now() + Duration::from_secs(40);
        loop {
            let records = self.dispatcher.records();
            if records.iter().all(|record| !record["verdict"].is_null()) {
                return records;
            }
            assert!(Instant::now() < until, "no verdict: {records:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// The people of the laboratory.
pub const NAMES: [&str; 5] = ["alice", "bob", "carol", "dave", "erin"];
