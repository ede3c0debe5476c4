//! Opens WebSockets in turn through the dispatcher and holds them: how many are lost, and what one costs in memory.
//!
//! `cargo bench --bench held -- 50000` opens that many with an instance that answers at once, and as many with one that
//! answers when it accepts, before it is asked. They are held 4,500 at a time, which takes 9,000 file descriptors on
//! either side.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[path = "../tests/common/mod.rs"]
mod common;

use common::dispatcher::{Dispatcher, Setup, wait_for};
use common::frames::Frame;
use common::mint;
use common::raw::{MASK, ask};

/// Sockets held at once.
const AT_ONCE: usize = 4_500;

const SWITCH: &[u8] =
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";

/// An instance that echoes one frame, and answers either when it is asked or as soon as it accepts.
async fn instance(early: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = serve(stream, early).await;
            });
        }
    });
    port
}

async fn serve(mut stream: TcpStream, early: bool) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    if early {
        stream.write_all(SWITCH).await?;
    }
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        stream.read_buf(&mut request).await?;
    }
    if !early {
        stream.write_all(SWITCH).await?;
    }
    let frame = Frame::read(&mut stream).await?;
    frame.write(&mut stream, None).await?;
    stream.read_u8().await?;
    Ok(())
}

/// Opens `count` sockets, holds them, and tells how many did not echo in the end.
async fn hold(dispatcher: &Dispatcher, count: usize) -> usize {
    let mut held = Vec::with_capacity(count);
    let mut lost = 0;
    for _ in 0..count {
        match ask(dispatcher.address(), "alice", &[]).await {
            (101, client) => held.push(client.stream),
            _ => lost += 1,
        }
    }
    for stream in &mut held {
        let echoed = async {
            Frame::text("held").write(stream, MASK).await?;
            Frame::read(stream).await
        };
        let echoed = tokio::time::timeout(Duration::from_secs(10), echoed).await;
        lost += usize::from(!matches!(echoed, Ok(Ok(_))));
    }
    lost
}

#[tokio::main]
async fn main() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )
    .unwrap();
    let total: usize = std::env::args()
        .skip(1)
        .find_map(|word| word.parse().ok())
        .unwrap_or(2_000);
    for early in [false, true] {
        let base = tempfile::TempDir::new().unwrap();
        let port = instance(early).await;
        let mut setup =
            Setup::new(base.path(), mint::working(base.path())).user("alice", "alice", port);
        setup.log_level = "warn,t3_dispatch=info".into();
        let dispatcher = setup.start().await;
        let before = dispatcher.memory();
        let (mut lost, mut peak) = (0, before);
        let mut left = total;
        while left > 0 {
            let count = left.min(AT_ONCE);
            lost += hold(&dispatcher, count).await;
            peak = peak.max(dispatcher.memory());
            left -= count;
            let open = "t3dispatch_tunnels_open";
            wait_for("end of the sockets", async || {
                dispatcher.metric(open).await == 0.0
            })
            .await;
        }
        let each = (peak - before) / total.min(AT_ONCE);
        tokio::time::sleep(Duration::from_secs(15)).await;
        println!(
            "instance answers {}: {lost} lost of {total}; {each} KiB each; {} MiB at the start, {} MiB 15 s after the last",
            if early { "at accept" } else { "when asked" },
            before / 1024,
            dispatcher.memory() / 1024,
        );
    }
}
