//! How often a request and a message allocate, and what a WebSocket keeps, counted in the dispatcher itself and held to a
//! number.
//!
//! This program is both: started by cargo it is the test, and started by itself it is the dispatcher with an allocator that
//! counts.

#[path = "../common/mod.rs"]
mod common;

use std::alloc::{GlobalAlloc, Layout};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::dispatcher::Setup;
use common::http::{self, Client};
use common::mint;
use common::raw::{MASK, RawInstance, open, say};
use tikv_jemallocator::Jemalloc;

/// What one operation may allocate at most. Whoever makes one cheaper lowers its number.
const REQUEST: u64 = 82;
// 105; one for what goes on meanwhile.
const CONNECTION: u64 = 106;
const MESSAGE: u64 = 5;
// 217 to 222, with what goes on in the seconds that a thousand of them take.
const TUNNEL: u64 = 224;

/// Bytes that an open WebSocket may keep of what is said. Pingora would copy what its client says, up to 64 KB.
const GROWTH: u64 = 4 << 10;

struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);
static TAKEN: AtomicU64 = AtomicU64::new(0);
static GIVEN_BACK: AtomicU64 = AtomicU64::new(0);

fn taken(size: usize) {
    COUNT.fetch_add(1, Ordering::Relaxed);
    TAKEN.fetch_add(size as u64, Ordering::Relaxed);
}

fn given_back(size: usize) {
    GIVEN_BACK.fetch_add(size as u64, Ordering::Relaxed);
}

// SAFETY: everything is passed on to the allocator that the product has.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        unsafe { Jemalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        unsafe { Jemalloc.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size);
        given_back(layout.size());
        unsafe { Jemalloc.realloc(place, layout, size) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        given_back(layout.size());
        unsafe { Jemalloc.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Where the dispatcher tells its allocations so far, and the bytes that it holds.
const TELL: &str = "COUNT_SOCKET";

fn main() -> ExitCode {
    let Some(socket) = std::env::var_os(TELL) else {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        return runtime.block_on(test());
    };
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let held = TAKEN.load(Ordering::Relaxed) - GIVEN_BACK.load(Ordering::Relaxed);
            let figures = [COUNT.load(Ordering::Relaxed), held].map(u64::to_be_bytes);
            let _ = stream.unwrap().write_all(&figures.concat());
        }
    });
    t3_dispatch::cli::main()
}

fn figures(socket: &Path) -> [u64; 2] {
    let mut stream = UnixStream::connect(socket).unwrap();
    [(); 2].map(|()| {
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    })
}

fn count(socket: &Path) -> u64 {
    figures(socket)[0]
}

/// The least of several looks, as some task may hold something for a moment.
fn held(socket: &Path) -> u64 {
    let looks = (0..5).map(|_| {
        std::thread::sleep(Duration::from_millis(10));
        figures(socket)[1]
    });
    looks.min().unwrap_or_default()
}

/// Operations that are counted, and as many as a fifth before, so that everything has its size.
const TIMES: u64 = 1000;

/// Allocations of one `operation`. What else goes on meanwhile is far less than one for each.
async fn each(socket: &Path, mut operation: impl AsyncFnMut()) -> u64 {
    for _ in 0..TIMES / 5 {
        operation().await;
    }
    let before = count(socket);
    for _ in 0..TIMES {
        operation().await;
    }
    (count(socket) - before) / TIMES
}

async fn test() -> ExitCode {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path();
    let socket = base.join("count");
    let mut counting = Command::new(std::env::current_exe().unwrap());
    counting.env(TELL, &socket);
    let mut instance = RawInstance::start().await;
    let mut setup = Setup::new(base, mint::working(base)).through(counting);
    setup.top["threads"] = 1.into();
    let dispatcher = setup.user("alice", "alice", instance.port).start().await;
    let address = dispatcher.address();
    let behind_the_edge = [
        ("Accept", "*/*"),
        ("Accept-Encoding", "gzip, deflate, br"),
        ("Cookie", "theme=dark; t3_session=x"),
        ("Sec-Fetch-Dest", "empty"),
        ("X-authentik-username", "alice@example.com"),
        ("X-Forwarded-For", "192.0.2.7"),
    ];
    let mut over = false;
    let mut hold = |what: &str, count: u64, most: u64| {
        println!("{what}: {count}, {most} at most");
        over |= count > most;
    };

    let mut kept = Client::connect(address).await.unwrap();
    let request = each(&socket, async || {
        let reply = kept.request("GET", "/a", &behind_the_edge, b"").await;
        assert_eq!(reply.unwrap().status, 200);
    });
    hold(
        "allocations of a request on a kept connection",
        request.await,
        REQUEST,
    );

    let connection = each(&socket, async || {
        let reply = http::request(address, "GET", "/a", &behind_the_edge, b"").await;
        assert_eq!(reply.unwrap().status, 200);
    });
    hold(
        "allocations of a request on a new connection",
        connection.await,
        CONNECTION,
    );

    let (mut client, mut server) = (open(address, "alice").await, instance.next().await);
    let message = each(&socket, async || {
        say(&mut client, &mut server, "ping", MASK).await;
        say(&mut server, &mut client, "pong", None).await;
    });
    hold(
        "allocations of a message each way of a WebSocket",
        message.await,
        MESSAGE,
    );

    // What it takes once, its channels for one, it has taken by now; and a copy would not have reached its 64 KB.
    let before = held(&socket);
    let said = "ping".repeat(25);
    for _ in 0..TIMES / 4 {
        say(&mut client, &mut server, &said, MASK).await;
        say(&mut server, &mut client, &said, None).await;
    }
    let more = held(&socket).saturating_sub(before);
    hold("bytes that a WebSocket keeps of what is said", more, GROWTH);

    let tunnel = each(&socket, async || {
        let client = open(address, "alice").await;
        drop((client, instance.next().await));
        // Another thread closes its books. It takes those of several at once, where they wait for it, which would cost less.
        tokio::time::sleep(Duration::from_millis(4)).await;
    });
    hold(
        "allocations of a WebSocket that comes and goes",
        tunnel.await,
        TUNNEL,
    );
    ExitCode::from(u8::from(over))
}
