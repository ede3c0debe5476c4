//! People at work, each with an instance of their own, who write down every trouble that they see.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::common::frames::{self, Frame};
use crate::common::http::{self, Client, Reply};
use crate::common::instance::{Instance, Version};
use crate::common::raw::MASK;

/// How long somebody waits for an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How long somebody looks at what they got.
const PAUSE: Duration = Duration::from_millis(500);

/// How long the edge keeps a connection that it does not need.
const KEPT: Duration = Duration::from_secs(30);

/// Most that happens at once between two rests: it keeps a small machine from being the fault.
const FIRST_AT_ONCE: usize = 16;

/// What somebody was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Doing {
    Navigation,
    Get,
    Post,
    Handshake,
    /// A WebSocket that was open.
    Socket,
}

const EVERYTHING: [Doing; 5] = [
    Doing::Navigation,
    Doing::Get,
    Doing::Post,
    Doing::Handshake,
    Doing::Socket,
];

/// What they saw in place of what they wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    /// A refusal: status and code.
    Refused(u16, String),
    /// Another status than the right one.
    Status(u16),
    /// The connection ended before the whole answer was there.
    Broken,
    /// Nothing for as long as they wait.
    NoAnswer,
    /// A WebSocket ended, with that code.
    Closed(Option<u16>),
    /// Another answer than theirs.
    NotTheirs,
}

/// One trouble.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// When what failed was begun; of a WebSocket, when it failed.
    pub at: Instant,
    pub doing: Doing,
    pub what: What,
}

/// One of the crowd.
pub struct Person {
    pub name: String,
    pub cookie: String,
    pub troubles: Mutex<Vec<Trouble>>,
    /// When the last of each was begun that went well.
    well: Mutex<HashMap<Doing, Instant>>,
    pub answers: AtomicUsize,
}

impl Person {
    fn trouble(&self, at: Instant, doing: Doing, what: What) {
        let trouble = Trouble { at, doing, what };
        self.troubles.lock().unwrap().push(trouble);
    }

    /// Whether everything has gone well that was begun after `then`.
    pub fn is_well_since(&self, then: Instant) -> bool {
        EVERYTHING.iter().all(|doing| self.was_well(*doing, then))
    }

    /// Whether anything has gone well that was begun after `then`.
    pub fn has_been_well_since(&self, then: Instant) -> bool {
        EVERYTHING.iter().any(|doing| self.was_well(*doing, then))
    }

    /// Whether one that was begun after `then` has gone well.
    pub fn was_well(&self, doing: Doing, then: Instant) -> bool {
        let well = self.well.lock().unwrap();
        well.get(&doing).is_some_and(|at| *at > then)
    }

    fn went_well(&self, doing: Doing, at: Instant) {
        self.well.lock().unwrap().insert(doing, at);
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    fn headers<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let mut all = vec![
            ("X-authentik-username", self.name.as_str()),
            ("Cookie", self.cookie.as_str()),
        ];
        all.extend(more);
        all
    }
}

/// The edge: it keeps connections, and uses them for whoever comes next.
struct Edge {
    address: SocketAddr,
    idle: Mutex<Vec<(Client, Instant)>>,
}

impl Edge {
    async fn client(&self) -> std::io::Result<Client> {
        let kept = {
            let mut idle = self.idle.lock().unwrap();
            idle.retain(|(_, since)| since.elapsed() < KEPT);
            idle.pop()
        };
        match kept {
            Some((client, _)) => Ok(client),
            None => Client::connect(self.address).await,
        }
    }

    async fn request(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> std::io::Result<Reply> {
        let mut client = self.client().await?;
        let reply = client.request(method, target, headers, body).await?;
        if !reply.head.has_token("connection", "close") {
            self.idle.lock().unwrap().push((client, Instant::now()));
        }
        Ok(reply)
    }
}

/// Everybody.
pub struct Crowd {
    pub people: Vec<Arc<Person>>,
    pub instances: Vec<Option<Instance>>,
    edge: Arc<Edge>,
    first: Arc<Semaphore>,
}

impl Crowd {
    /// The instances of `size` people, whose dispatcher will listen on `address`. Each has a session.
    pub async fn new(base: &Path, size: usize, address: SocketAddr) -> Crowd {
        let (mut people, mut instances) = (Vec::new(), Vec::new());
        for number in 0..size {
            let name = format!("person{number:03}");
            let port = own_port();
            let home = crate::common::mint::home(base, &name);
            let keep_alive = Duration::from_secs(5);
            let instance = Instance::start_with(&home, Version::V0_0_33, port, keep_alive).await;
            people.push(Arc::new(Person {
                cookie: instance.new_session(),
                name,
                troubles: Mutex::default(),
                well: Mutex::default(),
                answers: AtomicUsize::new(0),
            }));
            instances.push(Some(instance));
        }
        let edge = Edge {
            address,
            idle: Mutex::default(),
        };
        Crowd {
            people,
            instances,
            edge: edge.into(),
            first: Arc::new(Semaphore::new(FIRST_AT_ONCE)),
        }
    }

    pub fn instance(&self, number: usize) -> &Instance {
        self.instances[number].as_ref().unwrap()
    }

    /// Has everybody begin to work.
    pub fn work(&self) -> Shift {
        let (end, over) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for (number, person) in self.people.iter().enumerate() {
            let worker = Worker {
                person: person.clone(),
                edge: self.edge.clone(),
                over: over.clone(),
                first: self.first.clone(),
                offset: PAUSE * number as u32 / self.people.len() as u32,
            };
            tasks.spawn(worker.clone().requests());
            tasks.spawn(worker.socket());
        }
        Shift {
            end,
            tasks,
            edge: self.edge.clone(),
        }
    }
}

/// A free port that the kernel gives to no connection while the instance is down.
fn own_port() -> u16 {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (std::process::id() as usize % 50 * 400 + count) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// The time in which everybody works.
pub struct Shift {
    end: watch::Sender<bool>,
    tasks: JoinSet<()>,
    edge: Arc<Edge>,
}

impl Shift {
    /// Has everybody finish what they are at, and close everything.
    pub async fn end(mut self) {
        self.end.send_replace(true);
        while let Some(done) = self.tasks.join_next().await {
            done.unwrap();
        }
        self.edge.idle.lock().unwrap().clear();
    }
}

#[derive(Clone)]
struct Worker {
    person: Arc<Person>,
    edge: Arc<Edge>,
    over: watch::Receiver<bool>,
    first: Arc<Semaphore>,
    offset: Duration,
}

impl Worker {
    /// Waits, and tells whether to go on.
    async fn pause(&mut self, length: Duration) -> bool {
        let over = self.over.wait_for(|over| *over);
        timeout(length, over).await.is_err()
    }

    async fn requests(mut self) {
        let mut go_on = self.pause(self.offset).await;
        while go_on {
            for doing in [Doing::Navigation, Doing::Get, Doing::Post, Doing::Handshake] {
                let at = Instant::now();
                let outcome = timeout(PATIENCE, self.once(doing)).await;
                match outcome.unwrap_or(Err(What::NoAnswer)) {
                    Ok(()) => self.person.went_well(doing, at),
                    Err(what) => self.person.trouble(at, doing, what),
                }
                go_on = self.pause(PAUSE).await;
                if !go_on {
                    return;
                }
            }
        }
    }

    async fn once(&self, doing: Doing) -> Result<(), What> {
        let navigates = [("Sec-Fetch-Dest", "document"), ("Accept", "text/html")];
        let own = format!("<h1>{}'s workspace</h1>", self.person.name);
        match doing {
            Doing::Navigation => {
                let headers = self.person.headers(&navigates);
                self.ask("GET", "/", &headers, "", &own).await
            }
            Doing::Get => {
                let headers = self.person.headers(&[("Accept", "*/*")]);
                self.ask("GET", "/api/anything", &headers, "", &own).await
            }
            Doing::Post => {
                let headers = self.person.headers(&[]);
                let said = format!("of {} {:?}", self.person.name, Instant::now());
                self.ask("POST", "/__test/echo", &headers, &said, &said)
                    .await
            }
            _ => {
                let mut socket = self.open().await?;
                let said = Frame::text(&self.person.name);
                let talk = async {
                    said.write(&mut socket.stream, MASK).await?;
                    let echo = Frame::read(&mut socket.stream).await?;
                    if echo.opcode != frames::CLOSE {
                        goodbye(&mut socket).await?;
                    }
                    std::io::Result::Ok(echo)
                };
                match talk.await {
                    Ok(echo) if echo == said => Ok(()),
                    // It was ordered to end right after it was opened.
                    Ok(close) if close.opcode == frames::CLOSE => Err(closed(&close)),
                    Ok(_) => Err(What::NotTheirs),
                    Err(_) => Err(What::Broken),
                }
            }
        }
    }

    async fn ask(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &str,
        wanted: &str,
    ) -> Result<(), What> {
        let reply = self.edge.request(method, target, headers, body.as_bytes());
        let reply = reply.await.map_err(|_| What::Broken)?;
        judge(reply.status, 200, &reply.head)?;
        if reply.text().contains(wanted) {
            Ok(())
        } else {
            Err(What::NotTheirs)
        }
    }

    async fn open(&self) -> Result<Client, What> {
        let asking = async {
            let mut client = Client::connect(self.edge.address).await?;
            let headers = self.person.headers(&http::HANDSHAKE);
            client.send(http::head("GET", "/ws", &headers, 0)).await?;
            let (status, head) = client.read_head().await?;
            std::io::Result::Ok((client, status, head))
        };
        let (client, status, head) = asking.await.map_err(|_| What::Broken)?;
        judge(status, 101, &head)?;
        Ok(client)
    }

    /// Holds a WebSocket, and opens another where it ends.
    async fn socket(mut self) {
        if !self.pause(self.offset).await {
            return;
        }
        loop {
            let at = Instant::now();
            let opened = {
                let _place = self.first.clone().acquire_owned().await;
                timeout(PATIENCE, self.open()).await
            };
            match opened.unwrap_or(Err(What::NoAnswer)) {
                Ok(socket) => {
                    if self.hold(socket).await {
                        return;
                    }
                }
                Err(what) => self.person.trouble(at, Doing::Handshake, what),
            }
            if !self.pause(PAUSE / 2).await {
                return;
            }
        }
    }

    /// Says something now and then until the work is over; false where the WebSocket ended first.
    async fn hold(&mut self, mut socket: Client) -> bool {
        let said = Frame::text(&self.person.name);
        loop {
            let sent = Instant::now();
            if said.write(&mut socket.stream, MASK).await.is_err() {
                self.person
                    .trouble(Instant::now(), Doing::Socket, What::Closed(None));
                return false;
            }
            let echo = {
                let reading = Frame::read(&mut socket.stream);
                tokio::pin!(reading);
                match timeout(PATIENCE, &mut reading).await {
                    Ok(echo) => echo,
                    Err(_) => {
                        self.person.trouble(sent, Doing::Socket, What::NoAnswer);
                        tokio::select! {
                            echo = &mut reading => echo,
                            _ = self.over.wait_for(|over| *over) => return true,
                        }
                    }
                }
            };
            match echo {
                Ok(echo) if echo == said => {
                    self.person.went_well(Doing::Socket, sent);
                }
                Ok(close) if close.opcode == frames::CLOSE => {
                    self.person
                        .trouble(Instant::now(), Doing::Socket, closed(&close));
                    return false;
                }
                Ok(_) => self.person.trouble(sent, Doing::Socket, What::NotTheirs),
                Err(_) => {
                    self.person
                        .trouble(Instant::now(), Doing::Socket, What::Closed(None));
                    return false;
                }
            }
            if !self.pause(PAUSE).await {
                let _ = timeout(PATIENCE, goodbye(&mut socket)).await;
                return true;
            }
        }
    }
}

/// What a Close frame says.
fn closed(frame: &Frame) -> What {
    let code = frame.payload.first_chunk();
    What::Closed(code.map(|code| u16::from_be_bytes(*code)))
}

/// Closes a WebSocket in good order.
async fn goodbye(socket: &mut Client) -> std::io::Result<()> {
    Frame::close(1000).write(&mut socket.stream, MASK).await?;
    Frame::read(&mut socket.stream).await?;
    Ok(())
}

fn judge(status: u16, right: u16, head: &http::Head) -> Result<(), What> {
    match head.get("x-t3-dispatch-error") {
        Some(code) => Err(What::Refused(status, code.to_owned())),
        None if status != right => Err(What::Status(status)),
        None => Ok(()),
    }
}
