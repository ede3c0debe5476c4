//! The load of the WebSocket works, in steps that are told on standard output, a JSON object each. A line on standard input
//! begins the next step.
//!
//! `load ADDRESS USER SOCKETS SECONDS` opens the sockets; then echoes messages on all of them, each sent when the one before
//! has come back, for so long, or one on each where it is 0; then closes them. A socket that ends too early is counted as
//! lost, and dialled anew.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::LocalSet;
use tokio::time::{Instant, timeout};

/// Bytes of a message.
const SIZE: usize = 128;

/// The longest wait for what should come at once.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the sockets are to do.
#[derive(Clone, Copy)]
enum Step {
    Hold,
    Echo { until: Instant },
    Close,
}

/// What all sockets share.
struct Load {
    address: String,
    handshake: String,
    /// Most sockets that may be lost before there is no use in going on.
    most_lost: usize,
    tally: RefCell<Tally>,
}

struct Tally {
    lost: usize,
    /// In nanoseconds.
    latencies: Histogram<u64>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, user, sockets, seconds] = &arguments[..] else {
        fail("usage: load ADDRESS USER SOCKETS SECONDS");
    };
    let (Ok(sockets), Ok(seconds)) = (sockets.parse(), seconds.parse()) else {
        fail("SOCKETS and SECONDS are numbers");
    };
    let load = Load {
        // The key and its answer are the example of RFC 6455, section 1.3.
        handshake: format!(
            "GET /ws HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             X-authentik-username: {user}\r\nCookie: t3_session=bench.0\r\n\r\n"
        ),
        address: address.clone(),
        most_lost: 10 + sockets / 10,
        tally: RefCell::new(Tally {
            lost: 0,
            latencies: Histogram::new_with_max(60_000_000_000, 3)
                .unwrap_or_else(|error| fail(&error.to_string())),
        }),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended =
        runtime.and_then(|runtime| LocalSet::new().block_on(&runtime, run(load, sockets, seconds)));
    if let Err(error) = ended {
        fail(&error.to_string());
    }
}

fn fail(why: &str) -> ! {
    eprintln!("load: {why}");
    std::process::exit(1);
}

async fn run(load: Load, sockets: usize, seconds: u64) -> io::Result<()> {
    let (heard, mut lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        let lines = io::stdin().lines();
        lines.map_while(|line| heard.send(line.ok()?).ok()).count()
    });
    let load = Rc::new(load);
    let (order, orders) = watch::channel(Step::Hold);
    let (tell, mut told) = mpsc::unbounded_channel();
    for _ in 0..sockets {
        let stream = load.dial().await?;
        let load = load.clone();
        tokio::task::spawn_local(load.hold(stream, orders.clone(), tell.clone()));
    }
    load.say("opened", "");

    next(&mut lines).await?;
    let start = Instant::now();
    let until = start + Duration::from_secs(seconds);
    let _ = order.send(Step::Echo { until });
    let stuck = all(&mut told, sockets, until).await;
    let seconds = start.elapsed().as_secs_f64();
    load.say("echoed", &{
        let all = &load.tally.borrow().latencies;
        let at = |quantile| all.value_at_quantile(quantile) as f64 / 1000.0;
        format!(
            r#","operations":{},"seconds":{seconds:.3},"stuck":{stuck},"p50":{},"p90":{},"p99":{},"p99_9":{},"max":{}"#,
            all.len(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            all.max() as f64 / 1000.0
        )
    });

    next(&mut lines).await?;
    let _ = order.send(Step::Close);
    let stuck = all(&mut told, sockets, Instant::now()).await;
    load.say("closed", &format!(r#","stuck":{stuck}"#));
    Ok(())
}

async fn next(lines: &mut mpsc::UnboundedReceiver<String>) -> io::Result<()> {
    // Without one, whoever told us what to do has gone.
    let line = lines.recv().await;
    line.map(drop).ok_or(io::ErrorKind::UnexpectedEof.into())
}

/// Waits until all have told that they are done. Gives how many have not, long after they should have been.
async fn all(told: &mut mpsc::UnboundedReceiver<()>, sockets: usize, from: Instant) -> usize {
    let mut left = sockets;
    let counting = async {
        while left > 0 && told.recv().await.is_some() {
            left -= 1;
        }
    };
    let _ = tokio::time::timeout_at(from + PATIENCE, counting).await;
    left
}

impl Load {
    fn say(&self, step: &str, more: &str) {
        let lost = self.tally.borrow().lost;
        println!(r#"{{"step":"{step}","lost":{lost}{more}}}"#);
    }

    async fn dial(&self) -> io::Result<TcpStream> {
        let dialling = async {
            let mut stream = TcpStream::connect(&self.address).await?;
            stream.set_nodelay(true)?;
            stream.write_all(self.handshake.as_bytes()).await?;
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                // To the byte: what comes behind the head is the tunnel's.
                head.push(stream.read_u8().await?);
            }
            let head = String::from_utf8_lossy(&head);
            if head.starts_with("HTTP/1.1 101 ") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=") {
                Ok(stream)
            } else {
                Err(io::Error::other(head))
            }
        };
        timeout(PATIENCE, dialling).await?
    }

    /// Does with one socket what the orders are.
    async fn hold(
        self: Rc<Self>,
        mut stream: TcpStream,
        mut orders: watch::Receiver<Step>,
        tell: mpsc::UnboundedSender<()>,
    ) {
        loop {
            let step = *orders.borrow_and_update();
            match step {
                Step::Hold => {}
                Step::Echo { until } => {
                    while let Err(error) = self.echo(&mut stream, until).await {
                        stream = self.dial_anew(error).await;
                    }
                    let _ = tell.send(());
                }
                Step::Close => {
                    let _ = timeout(PATIENCE, close(&mut stream)).await;
                    let _ = tell.send(());
                    return;
                }
            }
            loop {
                tokio::select! {
                    _ = orders.changed() => break,
                    error = silence(&mut stream) => stream = self.dial_anew(error).await,
                }
            }
        }
    }

    async fn echo(&self, stream: &mut TcpStream, until: Instant) -> io::Result<()> {
        let (message, expected) = (message(), echo_of_message());
        let mut back = [0; SIZE + 4];
        loop {
            let start = Instant::now();
            stream.write_all(&message).await?;
            stream.read_exact(&mut back).await?;
            let end = Instant::now();
            if back != expected {
                return Err(io::Error::other("another message came back"));
            }
            let took = (end - start).as_nanos() as u64;
            self.tally.borrow_mut().latencies.saturating_record(took);
            if end >= until {
                return Ok(());
            }
        }
    }

    async fn dial_anew(&self, error: io::Error) -> TcpStream {
        let lost = {
            let mut tally = self.tally.borrow_mut();
            tally.lost += 1;
            tally.lost
        };
        if lost > self.most_lost {
            fail(&format!("{lost} sockets lost, the last one by: {error}"));
        }
        let dialled = self.dial().await;
        dialled.unwrap_or_else(|error| fail(&format!("cannot dial anew: {error}")))
    }
}

const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

/// A binary message, masked as a client has to (RFC 6455, section 5.2).
fn message() -> [u8; SIZE + 8] {
    let mut frame = [0; SIZE + 8];
    frame[..4].copy_from_slice(&[0x82, 0x80 | 126, 0, SIZE as u8]);
    frame[4..8].copy_from_slice(&MASK);
    for (at, byte) in frame[8..].iter_mut().enumerate() {
        *byte = at as u8 ^ MASK[at % 4];
    }
    frame
}

fn echo_of_message() -> [u8; SIZE + 4] {
    let mut frame = [0; SIZE + 4];
    frame[..4].copy_from_slice(&[0x82, 126, 0, SIZE as u8]);
    for (at, byte) in frame[4..].iter_mut().enumerate() {
        *byte = at as u8;
    }
    frame
}

/// Says goodbye, and waits until the other end has gone.
async fn close(stream: &mut TcpStream) -> io::Result<()> {
    let mut frame = vec![0x88, 0x80 | 2];
    frame.extend(MASK);
    frame.extend([0x03 ^ MASK[0], 0xe8 ^ MASK[1]]);
    stream.write_all(&frame).await?;
    stream.read_to_end(&mut frame).await?;
    Ok(())
}

/// Waits until a socket ends on which nothing should happen.
async fn silence(stream: &mut TcpStream) -> io::Error {
    match stream.read_u8().await {
        Ok(_) => io::Error::other("bytes that nobody asked for"),
        Err(error) => error,
    }
}
