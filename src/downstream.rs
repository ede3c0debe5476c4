//! Connections of clients: who finds room, how long one may be silent, and what a head may take.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::future::{AbortHandle, AbortRegistration, Abortable};
use http::HeaderValue;
use pingora::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora::protocols::http::ServerSession;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream,
    TimingDigest, UniqueID, UniqueIDType,
};
use pingora::proxy::HttpProxy;
use pingora::server::ShutdownWatch;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use crate::config::Identity;
use crate::dispatch::Dispatcher;
use crate::events;
use crate::head::Reader;
use crate::identity::Peer;
use crate::probe::host;
use crate::refuse::Refusal;
use crate::room::Room;
use crate::unsent::Unsent;

/// How long a head may take, from its first byte; of a new connection, from its beginning.
const HEAD: Duration = Duration::from_secs(15);

/// How long a client's connection is kept without a request, once there was one.
const UNUSED: Duration = Duration::from_secs(75);

/// How long a process that was replaced answers on the connections that clients keep with it, each answer being the last
/// one, before it closes those that are unused.
pub const LAST_ANSWERS: Duration = Duration::from_secs(3);

/// How long, and for how many bytes, a client that was refused is listened to: closing a socket with unread bytes resets the
/// connection, and the answer may be lost with it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 1024 * 1024;

/// How much of what a client sends behind a request is read before there is an answer. Whoever sends more is not heard to leave
/// until then.
const EARLY: usize = 64 * 1024;

tokio::task_local! {
    static CONNECTION: Arc<Head>;
}

/// The head of the present request has been read. What comes now may take its time. Where it asks for a `tunnel`, what has
/// come too early waits for the answer.
pub fn head_is_read(tunnel: bool) {
    let _ = CONNECTION.try_with(|head| head.is_read(tunnel));
}

/// What ends the present connection, whatever it waits for.
pub fn cut() -> AbortHandle {
    CONNECTION
        .try_with(|head| head.cut.clone())
        .unwrap_or_else(|_| AbortHandle::new_pair().0)
}

/// The other end of the present connection. Where the system did not say, nobody is to be trusted.
pub fn present_peer() -> Option<Peer> {
    CONNECTION.try_with(|head| head.peer).ok().flatten()
}

/// The address that the present connection comes from, if it has one, as a header has it: made once for all its requests.
pub fn peer_address() -> Option<HeaderValue> {
    let address = CONNECTION.try_with(|head| head.address.clone());
    address.ok().flatten()
}

/// A server on connections that are held to limits.
pub struct Front<A> {
    app: Arc<A>,
    room: Arc<Room>,
    /// Who may name people; without it, who comes is all the same, and nobody counts them.
    identity: Option<Identity>,
}

impl<A> Front<A> {
    /// A server that has so much room.
    pub fn new(app: A, room: Arc<Room>, identity: Option<Identity>) -> Front<A> {
        Front {
            app: Arc::new(app),
            room,
            identity,
        }
    }

    /// A place for a connection from there, which counts while it is held.
    fn enter(&self, peer: Option<Peer>) -> Option<impl Sized + use<A>> {
        let Some(identity) = &self.identity else {
            return self.room.enter(None).ok().map(|place| (place, None));
        };
        let stranger = peer.and_then(Peer::ip).filter(|ip| !identity.trusts(*ip));
        match self.room.enter(stranger) {
            Ok(place) => Some((place, Some(events::connection_open()))),
            Err(full) => {
                if full.tell {
                    events::full(self.room.taken());
                }
                None
            }
        }
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Front<A> {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let peer = peer(&stream);
        let Some(_place) = self.enter(peer) else {
            dismiss(stream, &Refusal::TooManyConnections).await;
            return None;
        };
        let (head, cut) = Head::new(peer);
        let guarded = Box::new(Guarded::new(stream, head.clone()));
        let (app, shutdown) = (self.app.clone(), shutdown.clone());
        let served = async move { app.process_new(guarded, &shutdown).await };
        // A task of its own, so that nothing here is asked each time there is something to read or to write.
        let mut served = tokio::spawn(CONNECTION.scope(head.clone(), served));
        if Abortable::new(&mut served, cut).await.is_ok() {
            return None;
        }
        served.abort();
        // Once it has been dropped, it has left the connection behind.
        let _ = served.await;
        let left = head.left().take();
        if let Some((stream, refusal)) = left {
            dismiss(stream, &refusal).await;
        }
        None
    }

    async fn cleanup(&self) {
        self.app.cleanup().await;
    }
}

/// Whom a connection comes from.
fn peer(stream: &Stream) -> Option<Peer> {
    let digest = stream.get_socket_digest()?;
    Peer::new(digest.peer_addr(), digest.local_addr())
}

/// So many may linger at once, as they have no place in the room.
static LINGERING: Semaphore = Semaphore::const_new(256);

/// Answers with a refusal, and closes the connection.
async fn dismiss(mut stream: Stream, refusal: &Refusal) {
    events::connection_refused(refusal);
    let goodbye = async {
        stream.write_all(&refusal.bare()).await?;
        stream.flush().await?;
        AsyncWriteExt::shutdown(&mut stream).await?;
        if let Ok(_one) = LINGERING.try_acquire() {
            tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await?;
        }
        io::Result::Ok(())
    };
    let _ = timeout(LINGER, goodbye).await;
}

/// What a connection and what serves it tell each other.
struct Head {
    /// The other end of the connection.
    peer: Option<Peer>,
    /// The address that it comes from.
    address: Option<HeaderValue>,
    /// How many heads there were to read so far.
    wanted: AtomicU32,
    /// Whether one is being read.
    reading: AtomicBool,
    /// Whether it asks for a tunnel, and the answer is not written yet.
    waiting: AtomicBool,
    /// The connection and what it is answered with, once it was left behind.
    left: Mutex<Option<(Stream, Refusal)>>,
    /// Makes whatever serves the connection leave it: a head is not read to its end, or a tunnel is cut off.
    cut: AbortHandle,
}

impl Head {
    /// That of a new connection, and what is cut off by it.
    fn new(peer: Option<Peer>) -> (Arc<Head>, AbortRegistration) {
        let (cut, registration) = AbortHandle::new_pair();
        let head = Head {
            peer,
            address: peer
                .and_then(Peer::ip)
                .and_then(|ip| HeaderValue::try_from(ip.to_string()).ok()),
            wanted: AtomicU32::new(0),
            reading: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            left: Mutex::new(None),
            cut,
        };
        (Arc::new(head), registration)
    }

    /// A head is to be read.
    fn expect(&self) {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        self.reading.store(true, Ordering::Relaxed);
    }

    /// The head is there.
    fn is_read(&self, tunnel: bool) {
        self.waiting.store(tunnel, Ordering::Relaxed);
        self.reading.store(false, Ordering::Relaxed);
    }

    fn left(&self) -> MutexGuard<'_, Option<(Stream, Refusal)>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection whose heads are read and timed while they come in. Each is handed on by itself, and behind it no more than its
/// body, so that no head ever gets by unread: what comes behind that waits for the next head to be asked for, or for the answer
/// to a handshake. Once it refuses a head, it has nothing more to say to what reads from it, and is left behind when that is
/// dropped.
struct Guarded {
    /// Always there, until it is dropped.
    stream: Option<Stream>,
    head: Arc<Head>,
    /// Which of the heads this is about.
    number: u32,
    reader: Reader,
    /// Since when the head is waited for; from its first byte on, since that.
    since: Instant,
    /// Wakes who waits for the head when it should be there, or earlier: it is not set anew for each.
    alarm: Option<Pin<Box<Sleep>>>,
    /// Why the head is not read to its end.
    refusal: Option<Refusal>,
    /// How much of the body is still to come; without it, whatever comes may be read.
    left: Option<u64>,
    /// What has come too early.
    rest: BytesMut,
    /// Who wants to read it, while it waits.
    waker: Option<Waker>,
    /// What is written, and not sent.
    unsent: Unsent,
}

impl Guarded {
    fn new(stream: Stream, head: Arc<Head>) -> Guarded {
        Guarded {
            stream: Some(stream),
            head,
            number: 0,
            reader: Reader::default(),
            since: Instant::now(),
            alarm: None,
            refusal: None,
            left: None,
            rest: BytesMut::new(),
            waker: None,
            unsent: Unsent::default(),
        }
    }

    /// Begins anew where another head is to be read than before.
    fn turn_to_head(&mut self) {
        let wanted = self.head.wanted.load(Ordering::Relaxed);
        if wanted != self.number {
            self.number = wanted;
            self.reader = Reader::default();
            if wanted > 1 {
                self.since = Instant::now();
            }
        }
    }

    /// Whether the head should have been there by now; if not, the task is woken when it should.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let unused = self.number > 1 && !self.reader.has_begun();
        let due = self.since + if unused { UNUSED } else { HEAD };
        let alarm = &mut self.alarm;
        let mut alarm = alarm
            .get_or_insert_with(|| Box::pin(sleep_until(due)))
            .as_mut();
        if alarm.deadline() > due {
            alarm.as_mut().reset(due);
        }
        while alarm.as_mut().poll(cx).is_ready() {
            if alarm.deadline() >= due {
                return true;
            }
            alarm.as_mut().reset(due);
        }
        false
    }

    /// Reads no further. Who serves the connection waits for nothing until it is dropped.
    fn refuse(&mut self, refusal: Refusal) {
        self.refusal = Some(refusal);
        self.head.cut.abort();
    }

    fn stream(&self) -> &Stream {
        self.stream.as_ref().expect("it is there until the drop")
    }

    fn stream_mut(&mut self) -> &mut Stream {
        self.stream.as_mut().expect("it is there until the drop")
    }

    /// Reads what came before, then what comes.
    fn poll_bytes(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.rest.is_empty() {
            return Pin::new(self.stream_mut()).poll_read(cx, buf);
        }
        let length = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest.split_to(length));
        Poll::Ready(Ok(()))
    }

    /// Reads what is left of a body.
    fn poll_body(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(left) = self.left else {
            return self.poll_bytes(cx, buf);
        };
        if left == 0 {
            return self.poll_end(cx);
        }
        let before = buf.filled().len();
        let read = self.poll_bytes(cx, buf);
        let came = buf.filled().len() - before;
        let length = usize::try_from(left).map_or(came, |left| left.min(came));
        self.put_back(buf, before + length);
        self.left = Some(left - length as u64);
        read
    }

    /// Waits for the end of the connection, and keeps what comes instead: the end may be behind it.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut bytes = [0; 512];
        while self.rest.len() < EARLY {
            let mut buf = ReadBuf::new(&mut bytes);
            match Pin::new(self.stream_mut()).poll_read(cx, &mut buf)? {
                Poll::Ready(()) if buf.filled().is_empty() => return Poll::Ready(Ok(())),
                Poll::Ready(()) => self.rest.extend_from_slice(buf.filled()),
                Poll::Pending => break,
            }
        }
        if !self.rest.is_empty() {
            self.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Keeps for later what was read beyond `end`.
    fn put_back(&mut self, buf: &mut ReadBuf<'_>, end: usize) {
        let early = &buf.filled()[end..];
        if !early.is_empty() {
            let mut rest = BytesMut::from(early);
            rest.unsplit(std::mem::take(&mut self.rest));
            self.rest = rest;
            buf.set_filled(end);
        }
    }

    /// Sends what is written.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = self.stream.as_mut().expect("it is there until the drop");
        self.unsent.poll_send(stream, cx)
    }

    /// An answer is being written. To a handshake, whatever comes behind it is the tunnel's.
    fn answers(&mut self) {
        if self.head.waiting.load(Ordering::Relaxed) {
            self.head.waiting.store(false, Ordering::Relaxed);
            self.left = None;
            // No head comes after a tunnel.
            self.alarm = None;
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Who is left in the middle of an answer gets what there is of it, if there is room for it now.
        let _ = self.poll_send(&mut Context::from_waker(Waker::noop()));
        if let Some(refusal) = self.refusal.take() {
            *self.head.left() = self.stream.take().zip(Some(refusal));
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.head.reading.load(Ordering::Relaxed) {
            return this.poll_body(cx, buf);
        }
        if this.refusal.is_some() {
            return Poll::Pending;
        }
        this.turn_to_head();
        let before = buf.filled().len();
        let read = this.poll_bytes(cx, buf);
        if read.is_ready() {
            let came = &buf.filled()[before..];
            if came.is_empty() {
                return read;
            }
            let begun = this.reader.has_begun();
            // Behind the end that everybody else sees, Pingora would ask for more.
            let ended = this.reader.has_ended();
            match this.reader.read(came) {
                Ok(length) if !ended => {
                    this.put_back(buf, before + length);
                    if this.reader.has_ended() {
                        this.left = this.reader.body_length();
                    }
                    if this.number > 1 && !begun && !this.reader.has_ended() {
                        this.since = Instant::now();
                    }
                    return read;
                }
                Ok(_) => this.refuse(Refusal::BadRequest),
                Err(error) => this.refuse(Refusal::Head(error)),
            }
            buf.set_filled(before);
            return Poll::Pending;
        }
        if !this.is_late(cx) {
            return Poll::Pending;
        }
        if this.reader.has_begun() {
            this.refuse(Refusal::HeadTooSlow);
            Poll::Pending
        } else {
            // A connection on which nothing was ever said ends without a word.
            Poll::Ready(Ok(()))
        }
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.answers();
        let stream = this.stream.as_mut().expect("it is there until the drop");
        this.unsent.poll_write(stream, cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(self.stream_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(self.stream_mut()).poll_shutdown(cx)
    }
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.stream.fmt(f)
    }
}

#[async_trait]
impl Shutdown for Guarded {
    async fn shutdown(&mut self) {
        let _ = self.flush().await;
        Shutdown::shutdown(self.stream_mut().as_mut()).await;
    }
}

impl UniqueID for Guarded {
    fn id(&self) -> UniqueIDType {
        self.stream().id()
    }
}

impl Ssl for Guarded {}

impl Peek for Guarded {}

impl GetTimingDigest for Guarded {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        // It would be asked for each request, and nobody looks at it.
        Vec::new()
    }
}

impl GetProxyDigest for Guarded {
    fn get_proxy_digest(&self) -> Option<Arc<pingora::protocols::raw_connect::ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for Guarded {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.stream().get_socket_digest()
    }
}

/// Pingora's proxy, but for the way it stops: at once it would drop the connections that clients keep, and a request that
/// is on its way on one of them would be lost.
pub struct LastAnswers {
    proxy: Arc<HttpProxy<Dispatcher>>,
}

impl LastAnswers {
    /// The proxy, stopping so.
    pub fn new(proxy: HttpProxy<Dispatcher>) -> LastAnswers {
        LastAnswers {
            proxy: Arc::new(proxy),
        }
    }
}

#[async_trait]
impl HttpServerApp for LastAnswers {
    // Written as `async_trait` would write it, but for the box, of which the proxy has one already.
    fn process_new_http<'a, 'b, 'c>(
        self: &'a Arc<Self>,
        session: ServerSession,
        shutdown: &'b ShutdownWatch,
    ) -> Pin<Box<dyn Future<Output = Option<ReusedHttpStream>> + Send + 'c>>
    where
        'a: 'c,
        'b: 'c,
    {
        host::watch();
        let _ = CONNECTION.try_with(|head| head.expect());
        self.proxy.process_new_http(session, shutdown)
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        self.proxy.server_options()
    }

    async fn http_cleanup(&self) {
        sleep(LAST_ANSWERS).await;
        self.proxy.http_cleanup().await;
    }
}
