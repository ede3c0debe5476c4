//! The flush gate under the two conditions in which Pingora by itself loses sockets for certain, or nearly so.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::AbortHandle;
use pingora::Result;
use pingora::apps::HttpServerApp;
use pingora::prelude::HttpPeer;
use pingora::protocols::Digest;
use pingora::protocols::http::ServerSession;
use pingora::protocols::l4::stream::Stream;
use pingora::proxy::{ProxyHttp, Session, http_proxy};
use pingora::server::configuration::ServerConf;
use t3_dispatch::forward::{self, Shape};
use t3_dispatch::table::{Instance, Table};
use t3_dispatch::tunnel::live::{About, Tunnel};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::common::frames::Frame;
use crate::common::raw::{self, MASK, RawInstance, open};

const SOCKETS: usize = 40;
const PAUSE: Duration = Duration::from_millis(20);

/// A proxy that does nothing but take its time.
struct Slow {
    instance: Arc<Instance>,
    before_head: bool,
    before_body_end: bool,
}

#[async_trait]
impl ProxyHttp for Slow {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, session: &mut Session, _ctx: &mut ()) -> Result<Box<HttpPeer>> {
        let about = About {
            user: "alice".into(),
            instance: self.instance.clone(),
            ip: String::new(),
            chain: Vec::new(),
            id: String::new(),
        };
        let request = session.req_header();
        let tunnel = Tunnel::new(about, &Default::default(), AbortHandle::new_pair().0);
        let shape = Shape::of(&request.headers);
        let (peer, _) = forward::peer_for(&self.instance, false, shape, Some(&tunnel));
        Ok(Box::new(peer))
    }

    async fn connected_to_upstream(
        &self,
        _session: &mut Session,
        _reused: bool,
        _peer: &HttpPeer,
        _fd: std::os::fd::RawFd,
        _digest: Option<&Digest>,
        _ctx: &mut (),
    ) -> Result<()> {
        if self.before_head {
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        _body: &mut Option<bytes::Bytes>,
        _end: bool,
        _ctx: &mut (),
    ) -> Result<()> {
        if self.before_body_end && !session.was_upgraded() {
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

/// Opens sockets one after the other through such a proxy, holds them, and gives how many were lost.
async fn lost(port: u16, before_head: bool, before_body_end: bool) -> usize {
    let table = format!("{{\"alice\": {{\"os_user\": \"alice\", \"port\": {port}}}}}");
    let table = Table::parse(table.as_bytes(), &Table::default()).unwrap();
    let slow = Slow {
        instance: table.get("alice").unwrap().clone(),
        before_head,
        before_body_end,
    };
    let proxy = Arc::new(http_proxy(&Arc::new(ServerConf::default()), slow));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (_keep, shutdown) = tokio::sync::watch::channel(false);
        while let Ok((stream, _)) = listener.accept().await {
            let (proxy, shutdown) = (proxy.clone(), shutdown.clone());
            tokio::spawn(async move {
                let session = ServerSession::new_http1(Box::new(Stream::from(stream)));
                proxy.process_new_http(session, &shutdown).await;
            });
        }
    });
    let mut held = Vec::new();
    for _ in 0..SOCKETS {
        held.push(open(address, "alice").await);
    }
    let mut lost = 0;
    for stream in &mut held {
        let sent = Frame::text("held").write(stream, MASK).await;
        let echoed = tokio::time::timeout(Duration::from_secs(5), Frame::read(stream)).await;
        lost += usize::from(sent.is_err() || !matches!(echoed, Ok(Ok(_))));
    }
    lost
}

#[tokio::test]
async fn no_socket_is_lost_when_a_body_filter_takes_its_time() {
    let mut instance = RawInstance::start().await;
    let port = instance.port;
    tokio::spawn(async move {
        loop {
            let mut stream = instance.next().await;
            tokio::spawn(async move {
                let frame = Frame::read(&mut stream).await.unwrap();
                frame.write(&mut stream, None).await.unwrap();
                let _ = stream.read_u8().await;
            });
        }
    });
    assert_eq!(lost(port, false, true).await, 0);
}

#[tokio::test]
async fn no_socket_is_lost_when_the_instance_answers_before_it_is_asked() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(raw::SWITCH.as_bytes()).await.unwrap();
                raw::head(&mut stream).await;
                let frame = Frame::read(&mut stream).await.unwrap();
                frame.write(&mut stream, None).await.unwrap();
                let _ = stream.read_u8().await;
            });
        }
    });
    assert_eq!(lost(port, true, false).await, 0);
}
