//! The flush gate: the upstream connection of a WebSocket, which Pingora may not read too early.
//!
//! Pingora 0.9.1 ends a tunnel right after its 101 when it reads the 101 before it has sent on the end of the (empty)
//! request body: that end is then taken for the end of the tunnel (cloudflare/pingora#946). A fast instance on loopback
//! loses sockets to it. Before Pingora needs to read anything it flushes the upstream connection twice: after the request
//! head, and when the end of the body is sent on. A connection that yields nothing before the second flush makes the bad
//! order impossible, whatever else happens in between.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use pingora::connectors::l4::Connect;
use pingora::protocols::l4::ext::TcpKeepalive;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::l4::virt::{VirtualSockOpt, VirtualSocket, VirtualSocketStream};
use pingora::{Error, ErrorType, OrErr, Result};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Connects to an instance through a gate.
#[derive(Debug)]
pub struct GatedConnect;

#[async_trait]
impl Connect for GatedConnect {
    async fn connect(&self, address: &SocketAddr) -> Result<Stream> {
        let address = address.as_inet().ok_or_else(|| {
            Error::explain(ErrorType::InternalError, "instances have IP addresses")
        })?;
        let stream = TcpStream::connect(address).await.map_err(|error| {
            let kind = match error.kind() {
                io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
                _ => ErrorType::ConnectError,
            };
            Error::because(kind, "connecting to an instance", error)
        })?;
        stream
            .set_nodelay(true)
            .or_err(ErrorType::SocketError, "setting TCP_NODELAY")?;
        let gated = Gated {
            stream,
            stage: Stage::Fresh,
            reader: None,
        };
        Ok(VirtualSocketStream::new(Box::new(gated)).into())
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

#[derive(Debug)]
struct Gated {
    stream: TcpStream,
    stage: Stage,
    /// Who wanted to read before the gate was open.
    reader: Option<Waker>,
}

impl Gated {
    fn open(&mut self) {
        self.stage = Stage::Open;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn written(&mut self, result: &Poll<io::Result<usize>>) {
        match result {
            Poll::Ready(Ok(_)) if self.stage == Stage::Fresh => self.stage = Stage::HeadWritten,
            // There will be no second flush; whoever reads learns what is wrong.
            Poll::Ready(Err(_)) => self.open(),
            _ => {}
        }
    }
}

impl AsyncRead for Gated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.stage == Stage::Open {
            Pin::new(&mut self.stream).poll_read(cx, buf)
        } else {
            self.reader = Some(cx.waker().clone());
            Poll::Pending
        }
    }
}

impl AsyncWrite for Gated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(&result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(&result);
        result
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
