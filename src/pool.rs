//! Connections to an instance that are kept for its next request.
//!
//! Pingora's own pool is one for all instances, and takes a task, a timer, a system call and three locks for each request: more
//! than a twentieth of all that a request costs (docs/performance.md). Here each instance has a list of its own, which goes when
//! it goes, and from which the requests of others push nothing out.
//!
//! Pingora asks for a connection through [`Checkout`], and takes each for a new one. Once it is done with one that could be used
//! again, it looks whether anything unexpected has come, before it would keep it itself. By that look ([`is_look`]) the connection
//! knows that it is free: it says that it has ended, so that Pingora lets go of it, and goes back to its [`Pool`].

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use pingora::{Error, ErrorType, OrErr, Result};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep_until, timeout};

/// How long an unused connection to an instance is kept. An instance closes it after five seconds, so it must be
/// given up well before.
const IDLE: Duration = Duration::from_millis(3500);

/// How long connecting over loopback may take.
const CONNECT: Duration = Duration::from_secs(5);

/// How many more connections may be kept, at all instances together.
static ROOM: Semaphore = Semaphore::const_new(0);

/// Makes room for so many unused connections.
pub fn make_room(most: usize) {
    ROOM.add_permits(most.min(Semaphore::MAX_PERMITS - ROOM.available_permits()));
}

/// The unused connections to one instance.
#[derive(Debug, Default)]
pub struct Pool(Mutex<Unused>);

#[derive(Debug, Default)]
struct Unused {
    /// Each with the time at which it is given up, the one that was used last at the end.
    connections: Vec<(Instant, TcpStream, SemaphorePermit<'static>)>,
    /// Whether a task gives them up in time.
    timed: bool,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Unused> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that was used last, of those that are open and have nothing to say.
    fn take(&self) -> Option<TcpStream> {
        loop {
            let (due, stream, _) = self.lock().connections.pop()?;
            let read = stream.try_read(&mut [0]);
            let is_quiet = read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
            if is_quiet && Instant::now() < due {
                return Some(stream);
            }
        }
    }

    /// Keeps a connection, if there is room for it.
    fn put(self: &Arc<Self>, stream: TcpStream) {
        let Ok(permit) = ROOM.try_acquire() else {
            return;
        };
        let mut unused = self.lock();
        let due = Instant::now() + IDLE;
        unused.connections.push((due, stream, permit));
        if !unused.timed
            && let Ok(runtime) = Handle::try_current()
        {
            unused.timed = true;
            runtime.spawn(give_up(Arc::downgrade(self)));
        }
    }

    /// Closes what is due, and tells when the next one is.
    fn give_up_due(&self) -> Option<Instant> {
        let mut unused = self.lock();
        let now = Instant::now();
        let due = unused.connections.partition_point(|(due, ..)| *due <= now);
        unused.connections.drain(..due);
        let next = unused.connections.first().map(|(due, ..)| *due);
        unused.timed = next.is_some();
        next
    }
}

/// Closes connections in time, until there are none.
async fn give_up(pool: Weak<Pool>) {
    while let Some(due) = pool.upgrade().and_then(|pool| pool.give_up_due()) {
        sleep_until(due).await;
    }
}

/// Opens a connection to an instance.
///
/// # Errors
/// When nobody listens there, or nobody answers within five seconds.
pub async fn dial(address: &SocketAddr) -> Result<TcpStream> {
    let address = address
        .as_inet()
        .ok_or_else(|| Error::explain(ErrorType::InternalError, "instances have IP addresses"))?;
    let connected = timeout(CONNECT, TcpStream::connect(address)).await;
    let connected = connected.or_err(ErrorType::ConnectTimedout, "connecting to an instance")?;
    let stream = connected.map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
            _ => ErrorType::ConnectError,
        };
        Error::because(kind, "connecting to an instance", error)
    })?;
    stream
        .set_nodelay(true)
        .or_err(ErrorType::SocketError, "setting TCP_NODELAY")?;
    Ok(stream)
}

/// Whether it is not to read that somebody asks, but to look: whoever has no way to be woken waits for nothing. Pingora looks so at a
/// connection that it is done with.
pub fn is_look(cx: &Context<'_>) -> bool {
    cx.waker().data().is_null()
}

/// Gets one request its connection.
#[derive(Debug)]
pub struct Checkout {
    /// A kept one.
    kept: Mutex<Option<TcpStream>>,
    /// Where it is kept afterwards.
    pool: Option<Arc<Pool>>,
}

impl Checkout {
    /// For a request that may have a kept connection, and may leave its own behind, in `pool`; without it, it has one of its own.
    pub fn new(pool: Option<Arc<Pool>>) -> Checkout {
        Checkout {
            kept: Mutex::new(pool.as_ref().and_then(|pool| pool.take())),
            pool,
        }
    }

    /// Whether it has a kept one, which the instance may be closing at this moment.
    pub fn is_reused(&self) -> bool {
        self.kept().is_some()
    }

    fn kept(&self) -> MutexGuard<'_, Option<TcpStream>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Connect for Checkout {
    async fn connect(&self, address: &SocketAddr) -> Result<Stream> {
        let kept = self.kept().take();
        let stream = match kept {
            Some(stream) => stream,
            None => dial(address).await?,
        };
        let line = Line {
            stream: Some(stream),
            pool: self.pool.clone(),
        };
        Ok(VirtualSocketStream::new(Box::new(line)).into())
    }
}

/// A connection, as Pingora has it for one request.
#[derive(Debug)]
struct Line {
    /// There until Pingora is done with it, and it can be used again.
    stream: Option<TcpStream>,
    pool: Option<Arc<Pool>>,
}

impl Line {
    /// # Errors
    /// When the request has had it.
    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        let stream = self.stream.as_mut().map(Pin::new);
        stream.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = self.stream()?.poll_read(cx, buf);
        if read.is_pending() && is_look(cx) {
            if let (Some(stream), Some(pool)) = (self.stream.take(), &self.pool) {
                pool.put(stream);
            }
            return Poll::Ready(Ok(()));
        }
        read
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}

impl VirtualSocket for Line {
    fn set_socket_option(&self, option: VirtualSockOpt) -> io::Result<()> {
        match option {
            // Since it was dialled.
            VirtualSockOpt::NoDelay => Ok(()),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
