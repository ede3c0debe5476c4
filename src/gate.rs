//! The upstream connection under a WebSocket: a gate that Pingora may not read through too early, a tap for the tunnel's
//! sensor, and the place where a tunnel is ended by order.
//!
//! **The gate.** Pingora 0.9.1 ends a tunnel right after its 101 when it reads the 101 before it has sent on the end of
//! the (empty) request body: that end is then taken for the end of the tunnel (cloudflare/pingora#946). A fast instance on
//! loopback loses sockets to it. Before Pingora needs to read anything it flushes the upstream connection twice: after the
//! request head, and when the end of the body is sent on. A connection that yields nothing before the second flush makes
//! the bad order impossible, whatever else happens in between.
//!
//! **The order to end.** Pingora's filters run only when bytes flow, so a silent tunnel cannot be ended from there. This
//! stream can: between two frames it hands Pingora a Close frame as if the instance had sent it, writes one to the
//! instance, and ends.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use async_trait::async_trait;
use pingora::Result;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::ext::TcpKeepalive;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use crate::pool::{dial, is_look};
use crate::tunnel::live::{Order, Tunnel};
use crate::tunnel::{How, Side};

/// How long an instance may take to answer the handshake.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// How long a tunnel that is ordered to end may go on to the end of a frame.
const TO_BOUNDARY: Duration = Duration::from_secs(1);

/// The longest response head that is looked at; Pingora refuses longer ones.
const HEAD_LIMIT: usize = 1 << 20;

/// Connects a tunnel to its instance.
#[derive(Debug)]
pub struct GatedConnect {
    /// The tunnel.
    pub tunnel: Arc<Tunnel>,
}

#[async_trait]
impl Connect for GatedConnect {
    async fn connect(&self, address: &SocketAddr) -> Result<Stream> {
        let stream = dial(address).await?;
        let gated = Gated {
            stream,
            tunnel: self.tunnel.clone(),
            stage: Stage::Fresh,
            reader: None,
            response: Response::Head(Vec::new()),
            patience: Box::pin(tokio::time::sleep(HANDSHAKE)),
            written: 0,
            stuck: false,
            ending: Ending::No,
        };
        Ok(VirtualSocketStream::new(Box::new(gated)).into())
    }
}

/// How a connection ended, by the error that it gave.
pub fn how(error: &io::Error) -> How {
    match error.kind() {
        io::ErrorKind::TimedOut
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable => How::Timeout,
        _ => How::Rst,
    }
}

/// How far the request has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Fresh,
    HeadWritten,
    HeadFlushed,
    Open,
}

/// How far the response has got.
#[derive(Debug)]
enum Response {
    /// Within its head, which so far is this.
    Head(Vec<u8>),
    /// After a 101: frames.
    Frames,
    /// After any other answer, which is no concern of ours.
    Plain,
}

/// How far an order to end has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    No,
    /// On the way to the end of a frame.
    ToBoundary,
    /// The Close frames are out.
    Closed,
}

#[derive(Debug)]
struct Gated {
    stream: TcpStream,
    tunnel: Arc<Tunnel>,
    stage: Stage,
    /// Who wanted to read before the gate was open.
    reader: Option<Waker>,
    response: Response,
    /// When waiting ends: for the handshake's answer, later for the end of a frame.
    patience: Pin<Box<Sleep>>,
    /// Bytes of the client's that were written to the instance.
    written: u64,
    /// Whether the instance has not taken what was to be written last.
    stuck: bool,
    ending: Ending,
}

impl Gated {
    fn open(&mut self) {
        self.stage = Stage::Open;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// Takes note of how a write went. One that waits for the instance does not outlive an order to end.
    fn write_result(
        &mut self,
        result: Poll<io::Result<usize>>,
        cx: &Context<'_>,
    ) -> Poll<io::Result<usize>> {
        match &result {
            Poll::Ready(Ok(_)) if self.stage == Stage::Fresh => self.stage = Stage::HeadWritten,
            Poll::Ready(Ok(written)) if matches!(self.response, Response::Frames) => {
                self.written += *written as u64;
                if std::mem::take(&mut self.stuck) {
                    self.tunnel.instance_takes();
                }
            }
            Poll::Ready(Err(error)) => {
                self.tunnel.end(Side::Instance, how(error));
                // There will be no second flush; whoever reads learns what is wrong.
                self.open();
            }
            Poll::Pending => {
                self.stuck = true;
                if self.tunnel.cannot_write(cx.waker()).is_some() {
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
            }
            _ => {}
        }
        result
    }

    /// Reads from the instance, and lets the sensor see it.
    fn poll_instance(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        let bytes = &buf.filled()[before..];
        match &result {
            Ok(()) if bytes.is_empty() => self
                .tunnel
                .end(Side::Instance, self.unless_refused(How::Fin)),
            Ok(()) => match &self.response {
                Response::Plain => {}
                Response::Frames => self.tunnel.bytes(Side::Instance, bytes),
                Response::Head(_) => self.read_head(bytes),
            },
            Err(error) => self
                .tunnel
                .end(Side::Instance, self.unless_refused(how(error))),
        }
        Poll::Ready(result)
    }

    fn unless_refused(&self, how: How) -> How {
        if matches!(self.response, Response::Frames) {
            how
        } else {
            How::Refused
        }
    }

    /// Looks for the end of the response's head; what follows a 101 is frames.
    fn read_head(&mut self, bytes: &[u8]) {
        let Response::Head(head) = &mut self.response else {
            return;
        };
        head.extend_from_slice(bytes);
        while let Some(end) = head.windows(4).position(|part| part == b"\r\n\r\n") {
            let rest = head.split_off(end + 4);
            match head.get(9..12) {
                Some(b"101") => {
                    self.response = Response::Frames;
                    if !rest.is_empty() {
                        self.tunnel.bytes(Side::Instance, &rest);
                    }
                    return;
                }
                // An interim response: another head follows.
                Some([b'1', ..]) => *head = rest,
                _ => {
                    self.response = Response::Plain;
                    return;
                }
            }
        }
        if head.len() > HEAD_LIMIT {
            self.response = Response::Plain;
        }
    }

    /// Ends the tunnel between two frames, or where it stands once patience is over.
    fn poll_end(
        &mut self,
        order: Order,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !matches!(self.response, Response::Frames) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if self.ending == Ending::No {
            self.ending = Ending::ToBoundary;
            self.patience
                .as_mut()
                .reset(tokio::time::Instant::now() + TO_BOUNDARY);
        }
        if self.ending == Ending::Closed {
            return Poll::Ready(Ok(()));
        }
        let left = self.tunnel.left_in_frame(Side::Instance);
        let out_of_patience = self.patience.as_mut().poll(cx).is_ready();
        if left > 0 && !out_of_patience {
            let room = left.min(buf.remaining());
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(room));
            let result = ready!(self.poll_instance(cx, &mut part));
            let read = part.filled().len();
            buf.advance(read);
            return Poll::Ready(result);
        }
        self.ending = Ending::Closed;
        let code = order.code().to_be_bytes();
        // Masked with zeros, which leaves the code as it is (RFC 6455, section 5.3). The instance may be past listening.
        if self.tunnel.nothing_under_way(self.written) {
            let _ = self
                .stream
                .try_write(&[0x88, 0x82, 0, 0, 0, 0, code[0], code[1]]);
        }
        if left == 0 {
            buf.put_slice(&[0x88, 0x02, code[0], code[1]]);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        // Not to be kept, whatever was answered: an instance that refuses an upgrade says `keep-alive` and closes.
        if is_look(cx) {
            return Poll::Ready(Ok(()));
        }
        if this.stage != Stage::Open {
            this.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if let Some(order) = this.tunnel.reads(cx.waker()) {
            return this.poll_end(order, cx, buf);
        }
        let result = this.poll_instance(cx, buf);
        if result.is_pending() && matches!(this.response, Response::Head(_)) {
            ready!(this.patience.as_mut().poll(cx));
            this.tunnel.end(Side::Instance, How::Refused);
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        result
    }
}

impl AsyncWrite for Gated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.ending == Ending::Closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.write_result(result, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.ending == Ending::Closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.write_result(result, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        if result.is_ready() {
            match self.stage {
                Stage::HeadWritten => self.stage = Stage::HeadFlushed,
                Stage::HeadFlushed => self.open(),
                Stage::Fresh | Stage::Open => {}
            }
        }
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.open();
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl VirtualSocket for Gated {
    fn set_socket_option(&self, option: VirtualSockOpt) -> io::Result<()> {
        match option {
            VirtualSockOpt::NoDelay => self.stream.set_nodelay(true),
            VirtualSockOpt::KeepAlive(TcpKeepalive {
                idle,
                interval,
                count,
                user_timeout,
            }) => {
                sockopt::set_socket_keepalive(&self.stream, true)?;
                sockopt::set_tcp_keepidle(&self.stream, idle)?;
                sockopt::set_tcp_keepintvl(&self.stream, interval)?;
                sockopt::set_tcp_keepcnt(&self.stream, u32::try_from(count).unwrap_or(u32::MAX))?;
                let user_timeout = u32::try_from(user_timeout.as_millis()).unwrap_or(u32::MAX);
                Ok(sockopt::set_tcp_user_timeout(&self.stream, user_timeout)?)
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
