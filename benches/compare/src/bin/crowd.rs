//! A crowd of people before the dispatcher.
//!
//! `crowd ADDRESS FIRST USERS TUNNELS RATE CONNECTIONS` holds TUNNELS WebSockets of USERS people, from `userFIRST` on, each with
//! a message every five seconds, all of them spread evenly, and asks for a page RATE times a second over CONNECTIONS kept
//! connections, for one person after the other in no order. A request is due at its time whether others have been answered or not, and its
//! latency counts from then. It goes on until it is killed, and prints a line of JSON each second with what has happened in it;
//! latencies are in microseconds, those of requests behind the milliseconds since 1970 at which they were due.

use std::fmt::Write;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::{sleep, sleep_until, timeout};

const HEARTBEAT: Duration = Duration::from_secs(5);

/// A client gives its WebSocket up after so long without an answer.
const WATCHDOG: Duration = Duration::from_secs(20);

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// WebSockets that are opened in a second.
const OPENED: u32 = 500;

const PING: &[u8] = br#"{"_tag":"Ping"}"#;

/// What has happened since the last line.
#[derive(Default)]
struct Told {
    opened: u64,
    refused: u64,
    lost: u64,
    beats: u64,
    echoes: Vec<u64>,
    failed: u64,
    done: Vec<(u64, u64)>,
    why: String,
}

struct Crowd {
    address: SocketAddr,
    first: u64,
    users: u64,
    told: Mutex<Told>,
}

impl Crowd {
    fn tell(&self, what: impl FnOnce(&mut Told)) {
        what(&mut self.told.lock().expect("nobody panics with it"));
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn request(&self, user: u64, path: &str, more: &str) -> String {
        format!(
            "GET {path} HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: user{}\r\nCookie: t3_session=x\r\n{more}\r\n",
            self.first + user % self.users
        )
    }

    /// Holds one WebSocket, with its heartbeat at `phase` of each period.
    async fn tunnel(&self, number: u64, phase: Duration) {
        let opening = timeout(PATIENCE, self.open(number));
        let Ok(Ok(mut stream)) = opening.await else {
            return self.tell(|told| told.refused += 1);
        };
        self.tell(|told| told.opened += 1);
        sleep(phase).await;
        let mut due = tokio::time::Instant::now();
        let mut frame = vec![0x81, 0x80 | PING.len() as u8, 1, 2, 3, 4];
        let masked = PING.iter().zip([1, 2, 3, 4].iter().cycle());
        frame.extend(masked.map(|(byte, mask)| byte ^ mask));
        loop {
            sleep_until(due).await;
            due += HEARTBEAT;
            self.tell(|told| told.beats += 1);
            let sent = Instant::now();
            let echoed = timeout(WATCHDOG, async {
                stream.write_all(&frame).await?;
                let mut echo = [0; 2 + PING.len()];
                stream.read_exact(&mut echo).await?;
                io::Result::Ok(&echo[2..] == PING)
            });
            match echoed.await {
                Ok(Ok(true)) => self.tell(|told| told.echoes.push(micros(sent.elapsed()))),
                error => {
                    return self.tell(|told| {
                        told.lost += 1;
                        told.why = format!("heartbeat: {error:?}");
                    });
                }
            }
        }
    }

    async fn open(&self, number: u64) -> io::Result<TcpStream> {
        let mut stream = self.connect().await?;
        let handshake = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        let request = self.request(number, "/ws", handshake);
        stream.write_all(request.as_bytes()).await?;
        match head(&mut stream).await? {
            head if head.starts_with(b"HTTP/1.1 101 ") => Ok(stream),
            head => Err(io::Error::other(
                String::from_utf8_lossy(&head).into_owned(),
            )),
        }
    }

    /// Asks over a connection of its own whenever a request is due.
    async fn ask(&self, schedule: &Schedule) {
        let mut kept = None;
        loop {
            let (number, due) = schedule.next().await;
            // No order, but the same one each time.
            let user = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 32;
            let asked = timeout(PATIENCE, self.fetch(&mut kept, user)).await;
            let took = micros(due.elapsed());
            match asked {
                Ok(Ok(())) => {
                    let at = SystemTime::now().duration_since(UNIX_EPOCH);
                    let at = at.map_or(0, |at| at.as_millis() as u64) - took / 1000;
                    self.tell(|told| told.done.push((at, took)));
                }
                error => {
                    kept = None;
                    self.tell(|told| {
                        told.failed += 1;
                        told.why = format!("request: {error:?}");
                    });
                }
            }
        }
    }

    async fn fetch(&self, kept: &mut Option<TcpStream>, user: u64) -> io::Result<()> {
        let stream = match kept {
            Some(stream) => stream,
            None => kept.insert(self.connect().await?),
        };
        let request = self.request(user, "/page", "");
        stream.write_all(request.as_bytes()).await?;
        let head = head(stream).await?;
        let text = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let length = text
            .split("content-length: ")
            .nth(1)
            .and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        let (true, Some(length)) = (text.starts_with("http/1.1 200 "), length) else {
            return Err(io::Error::other(text));
        };
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        if text.contains("\r\nconnection: close\r\n") {
            *kept = None;
        }
        Ok(())
    }
}

/// Reads up to the end of a head, and no further.
async fn head(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(512);
    let mut seen = [0; 1024];
    loop {
        let count = stream.peek(&mut seen).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The end may be split between two readings.
        let before = head.len();
        head.extend(&seen[..count]);
        let end = head.windows(4).position(|part| part == b"\r\n\r\n");
        let take = end.map_or(count, |at| at + 4 - before);
        stream.read_exact(&mut seen[..take]).await?;
        if end.is_some() {
            head.truncate(before + take);
            return Ok(head);
        }
    }
}

/// When requests are due.
struct Schedule {
    start: Instant,
    rate: u64,
    due: Semaphore,
    taken: AtomicU64,
}

impl Schedule {
    /// Lets requests go, each at its time: a thread does that better than a timer of whole milliseconds.
    fn keep(&self) {
        for number in 0.. {
            std::thread::sleep(self.at(number).saturating_duration_since(Instant::now()));
            self.due.add_permits(1);
        }
    }

    fn at(&self, number: u64) -> Instant {
        self.start + Duration::from_nanos(number * 1_000_000_000 / self.rate)
    }

    async fn next(&self) -> (u64, Instant) {
        if let Ok(one) = self.due.acquire().await {
            one.forget();
        }
        let number = self.taken.fetch_add(1, Ordering::Relaxed);
        (number, self.at(number))
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

fn line(told: &Told) -> String {
    let list = |text: &mut String, numbers: &mut dyn Iterator<Item = String>| {
        let _ = write!(text, "[{}]", numbers.collect::<Vec<_>>().join(","));
    };
    let mut text = format!(
        "{{\"opened\":{},\"refused\":{},\"lost\":{},\"beats\":{},\"failed\":{},\"why\":{:?},\"echoes\":",
        told.opened, told.refused, told.lost, told.beats, told.failed, told.why
    );
    list(&mut text, &mut told.echoes.iter().map(u64::to_string));
    text.push_str(",\"done\":");
    let done = told.done.iter();
    list(
        &mut text,
        &mut done.map(|(due, took)| format!("[{due},{took}]")),
    );
    text.push('}');
    text
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize| arguments.get(place)?.parse::<u64>().ok();
    let address = arguments.first().and_then(|text| text.parse().ok());
    let (Some(address), Some(first), Some(users), Some(tunnels), Some(rate), Some(connections)) = (
        address,
        number(1),
        number(2),
        number(3),
        number(4),
        number(5),
    ) else {
        eprintln!("usage: crowd ADDRESS FIRST USERS TUNNELS RATE CONNECTIONS");
        std::process::exit(2);
    };
    let crowd = Arc::new(Crowd {
        address,
        first,
        users,
        told: Mutex::default(),
    });
    let schedule = Arc::new(Schedule {
        start: Instant::now(),
        rate: rate.max(1),
        due: Semaphore::new(0),
        taken: AtomicU64::new(0),
    });
    for _ in 0..connections.min(rate * 1000) {
        let (crowd, schedule) = (crowd.clone(), schedule.clone());
        tokio::spawn(async move { crowd.ask(&schedule).await });
    }
    std::thread::spawn(move || schedule.keep());
    let opening = crowd.clone();
    tokio::spawn(async move {
        for number in 0..tunnels {
            let phase = HEARTBEAT.mul_f64(number as f64 / tunnels as f64);
            let crowd = opening.clone();
            tokio::spawn(async move { crowd.tunnel(number, phase).await });
            sleep(Duration::from_secs(1) / OPENED).await;
        }
    });
    loop {
        sleep(Duration::from_secs(1)).await;
        let mut told = Told::default();
        crowd.tell(|now| std::mem::swap(now, &mut told));
        println!("{}", line(&told));
    }
}
