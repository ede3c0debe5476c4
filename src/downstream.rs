//! Connections of clients: how many there may be, how long one may be silent, and how long a head may take.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp};
use pingora::protocols::http::ServerSession;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream,
    TimingDigest, UniqueID, UniqueIDType,
};
use pingora::proxy::HttpProxy;
use pingora::server::ShutdownWatch;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Sleep, sleep, timeout};

use crate::config::Identity;
use crate::dispatch::{Dispatcher, until_cut};
use crate::events;
use crate::head::Progress;
use crate::identity::Peer;
use crate::probe::host;
use crate::refuse::Refusal;

/// How long a head may take, from its first byte; of a new connection, from its beginning.
const HEAD: Duration = Duration::from_secs(15);

/// How long a process that was replaced answers on the connections that clients keep with it, each answer being the last
/// one, before it closes those that are unused.
pub const LAST_ANSWERS: Duration = Duration::from_secs(3);

/// How long, and for how many bytes, a client that was refused is listened to: closing a socket with unread bytes resets the
/// connection, and the answer may be lost with it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 1024 * 1024;

/// How often the log is told that there is no room.
const TELL_AGAIN: Duration = Duration::from_secs(60);

tokio::task_local! {
    static CONNECTION: Arc<Head>;
}

/// The head of the present request has been read. What comes now may take its time.
pub fn head_is_read() {
    let _ = CONNECTION.try_with(|head| head.is_read());
}

/// Pingora's proxy on connections that are held to limits.
pub struct Front {
    app: Arc<LastAnswers>,
    room: Arc<Room>,
    identity: Identity,
}

impl Front {
    /// The proxy, with room for so many connections, and for so many of one address that may not name people.
    pub fn new(
        proxy: HttpProxy<Dispatcher>,
        most: usize,
        most_each: usize,
        identity: Identity,
    ) -> Front {
        Front {
            app: Arc::new(LastAnswers {
                proxy: Arc::new(proxy),
            }),
            room: Arc::new(Room {
                most,
                most_each,
                taken: Mutex::default(),
            }),
            identity,
        }
    }
}

#[async_trait]
impl ServerApp for Front {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let peer = peer(&stream);
        let stranger = match peer {
            Some(Peer::Address(ip)) if !self.identity.trusts(ip) => Some(network(ip)),
            _ => None,
        };
        let Some(_place) = self.room.enter(stranger) else {
            dismiss(stream, &Refusal::TooManyConnections).await;
            return None;
        };
        let head = Arc::new(Head::default());
        head.state().deadline = Some(Box::pin(sleep(HEAD)));
        let guarded = Box::new(Guarded {
            stream: Some(stream),
            head: head.clone(),
        });
        let served = CONNECTION.scope(head.clone(), self.app.process_new(guarded, shutdown));
        tokio::select! {
            biased;
            _ = served => return None,
            () = head.refused.notified() => {}
        }
        // By now what served it has been dropped, and has left the connection behind.
        let left = {
            let mut state = head.state();
            state.left.take().zip(state.refusal.take())
        };
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

/// What counts as one address: a household with IPv6 has 2^64 of them.
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        ip => ip,
    }
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

/// How many connections there may be.
#[derive(Debug)]
struct Room {
    most: usize,
    most_each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    strangers: usize,
    each: HashMap<IpAddr, usize>,
    /// When the log was told last that there is no room for the edge.
    told: Option<Instant>,
}

impl Room {
    fn taken(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a connection, if there is one. `stranger` is its address where that may not name people.
    fn enter(self: &Arc<Room>, stranger: Option<IpAddr>) -> Option<Place> {
        let mut taken = self.taken();
        let full = taken.all >= self.most;
        if let Some(ip) = stranger {
            // Half of the room is kept for the edge, whoever else pushes in.
            let crowded = taken.strangers >= self.most / 2;
            let of_this = taken.each.get(&ip).copied().unwrap_or(0);
            if full || crowded || of_this >= self.most_each {
                return None;
            }
            taken.strangers += 1;
            taken.each.insert(ip, of_this + 1);
        } else if full {
            if taken.told.is_none_or(|at| at.elapsed() > TELL_AGAIN) {
                taken.told = Some(Instant::now());
                events::full(taken.all);
            }
            return None;
        }
        taken.all += 1;
        events::connections(taken.all);
        Some(Place {
            room: self.clone(),
            stranger,
        })
    }
}

/// A place for a connection, given back when dropped.
struct Place {
    room: Arc<Room>,
    stranger: Option<IpAddr>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.room.taken();
        taken.all -= 1;
        events::connections(taken.all);
        let Some(ip) = self.stranger else { return };
        taken.strangers -= 1;
        if let Some(count) = taken.each.get_mut(&ip) {
            *count -= 1;
            if *count == 0 {
                taken.each.remove(&ip);
            }
        }
    }
}

/// What a connection and what serves it know of the present head.
#[derive(Default)]
struct Head {
    /// Whether one is being read.
    reading: AtomicBool,
    state: Mutex<State>,
    /// The head is one that is not read to its end.
    refused: Notify,
}

#[derive(Default)]
struct State {
    progress: Progress,
    /// When the head has to be there. What counts the time between requests is Pingora.
    deadline: Option<Pin<Box<Sleep>>>,
    refusal: Option<Refusal>,
    left: Option<Stream>,
}

impl Head {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A head is to be read.
    fn expect(&self) {
        self.state().progress = Progress::default();
        self.reading.store(true, Ordering::Relaxed);
    }

    /// The head is there.
    fn is_read(&self) {
        self.reading.store(false, Ordering::Relaxed);
        self.state().deadline = None;
    }

    fn refuse(&self, mut state: std::sync::MutexGuard<'_, State>, refusal: Refusal) {
        state.refusal = Some(refusal);
        self.refused.notify_one();
    }
}

/// A connection whose heads are counted and timed while they are read. Once it refuses one, it has nothing more to say to
/// what reads from it, and is left behind when that is dropped.
struct Guarded {
    /// Always there, until it is dropped.
    stream: Option<Stream>,
    head: Arc<Head>,
}

impl Guarded {
    fn stream(&self) -> &Stream {
        self.stream.as_ref().expect("it is there until the drop")
    }

    fn stream_mut(&mut self) -> &mut Stream {
        self.stream.as_mut().expect("it is there until the drop")
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let mut state = self.head.state();
        if state.refusal.is_some() {
            state.left = self.stream.take();
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(self.stream_mut()).poll_read(cx, buf);
        if !self.head.reading.load(Ordering::Relaxed) {
            return read;
        }
        let mut state = self.head.state();
        if state.refusal.is_some() {
            return Poll::Pending;
        }
        if read.is_ready() {
            let ended = state.progress.has_ended();
            let came = &buf.filled()[before..];
            if came.is_empty() {
                return read;
            }
            // Pingora asks for more behind the end that everybody else sees.
            if ended {
                buf.set_filled(before);
                self.head.refuse(state, Refusal::BadRequest);
                return Poll::Pending;
            }
            if let Err(error) = state.progress.add(came) {
                buf.set_filled(before);
                self.head.refuse(state, Refusal::Head(error));
                return Poll::Pending;
            }
            return read;
        }
        let begun = state.progress.has_begun();
        if begun && state.deadline.is_none() {
            state.deadline = Some(Box::pin(sleep(HEAD)));
        }
        let over = state
            .deadline
            .as_mut()
            .is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready());
        if !over {
            return Poll::Pending;
        }
        if begun {
            self.head.refuse(state, Refusal::HeadTooSlow);
            Poll::Pending
        } else {
            // A connection on which nothing was ever said ends without a word.
            Poll::Ready(Ok(()))
        }
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.stream_mut()).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream_mut()).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(self.stream_mut()).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream().is_write_vectored()
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
        self.stream().get_timing_digest()
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
struct LastAnswers {
    proxy: Arc<HttpProxy<Dispatcher>>,
}

#[async_trait]
impl HttpServerApp for LastAnswers {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        host::watch();
        let _ = CONNECTION.try_with(|head| head.expect());
        until_cut(self.proxy.process_new_http(session, shutdown)).await
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        self.proxy.server_options()
    }

    async fn http_cleanup(&self) {
        sleep(LAST_ANSWERS).await;
        self.proxy.http_cleanup().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(most: usize, most_each: usize) -> Arc<Room> {
        Arc::new(Room {
            most,
            most_each,
            taken: Mutex::default(),
        })
    }

    #[test]
    fn an_address_has_so_many_places_and_gets_them_back() {
        let room = room(100, 2);
        let mallory = Some("192.0.2.1".parse().unwrap());
        let first = room.enter(mallory).unwrap();
        let _second = room.enter(mallory).unwrap();
        assert!(room.enter(mallory).is_none());
        assert!(room.enter(Some("192.0.2.2".parse().unwrap())).is_some());
        drop(first);
        assert!(room.enter(mallory).is_some());
        let edge: Vec<_> = (0..90).map(|_| room.enter(None).unwrap()).collect();
        drop(edge);
        let taken = room.taken();
        assert_eq!((taken.all, taken.strangers, taken.each.len()), (1, 1, 1));
    }

    #[test]
    fn half_of_the_room_is_the_edges() {
        let room = room(8, 100);
        let stranger = |last: u8| Some(IpAddr::from([192, 0, 2, last]));
        let _strangers: Vec<_> = (0..4).map(|i| room.enter(stranger(i)).unwrap()).collect();
        assert!(room.enter(stranger(9)).is_none());
        let _edge: Vec<_> = (0..4).map(|_| room.enter(None).unwrap()).collect();
        assert!(room.enter(None).is_none());
    }

    #[test]
    fn one_household_is_one_address() {
        let network = |ip: &str| super::network(ip.parse().unwrap()).to_string();
        assert_eq!(network("192.0.2.1"), "192.0.2.1");
        assert_eq!(network("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(network("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
