//! Connections to instances: kept for the next request that may be repeated, and only where nothing is the matter with them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;

use crate::common::dispatcher::{Dispatcher, Setup, wait_for};
use crate::common::http::{Client, Reply};
use crate::common::mint;
use crate::world::from;

/// What an instance has seen of a connection.
#[derive(Clone, Default)]
struct Seen {
    /// What people have asked for on it.
    paths: Vec<String>,
    /// Whether it has said what nobody asked for.
    chattered: bool,
    ended: bool,
}

/// An instance that never closes a connection by itself, and answers with the connection's number. What it does besides is in
/// the path: `/slow` takes until it is let go on, `/chatter` says more than it was asked for, `/bye` closes the connection after
/// its answer, `/last` when it is asked the next time, and `/fail` instead of an answer.
#[derive(Clone)]
struct Counting {
    port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// How many may be slow no longer.
    go_on: Arc<tokio::sync::Semaphore>,
}

impl Counting {
    async fn start() -> Counting {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let instance = Counting {
            port: listener.local_addr().unwrap().port(),
            seen: Arc::default(),
            go_on: Arc::new(tokio::sync::Semaphore::new(0)),
        };
        let next = AtomicUsize::new(0);
        let this = instance.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (this, number) = (this.clone(), next.fetch_add(1, Ordering::Relaxed));
                this.seen.lock().unwrap().push(Seen::default());
                tokio::spawn(async move {
                    this.serve(stream, number).await;
                    this.note(number, |seen| seen.ended = true);
                });
            }
        });
        instance
    }

    async fn serve(&self, stream: tokio::net::TcpStream, number: usize) {
        let unread = Vec::new();
        let mut client = Client { stream, unread };
        let mut is_last = false;
        while let Some(head) = client.read_request().await {
            let path = head.target();
            let is_check = path == "/api/auth/session";
            if !is_check {
                self.note(number, |seen| seen.paths.push(path.to_owned()));
            }
            if is_last || path == "/fail" {
                return;
            }
            let body = if is_check {
                r#"{"authenticated":true,"auth":{"sessionCookieName":"t3_session"}}"#.to_owned()
            } else {
                number.to_string()
            };
            if path == "/slow" {
                self.go_on.acquire().await.unwrap().forget();
            }
            let length = body.len();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
            client.send(answer).await.unwrap();
            match path {
                "/chatter" => {
                    // By now the connection is kept.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    client.send("HTTP/1.1 200 OK\r\n").await.unwrap();
                    self.note(number, |seen| seen.chattered = true);
                }
                "/bye" => return,
                "/last" => is_last = true,
                _ => {}
            }
        }
    }

    fn note(&self, number: usize, note: impl FnOnce(&mut Seen)) {
        note(&mut self.seen.lock().unwrap()[number]);
    }

    fn seen(&self, number: usize) -> Seen {
        self.seen.lock().unwrap()[number].clone()
    }

    /// The connections that are open, of those that people's requests came on.
    fn open(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        let open = |seen: &&Seen| !seen.paths.is_empty() && !seen.ended;
        seen.iter().filter(open).count()
    }
}

struct Place {
    instance: Counting,
    dispatcher: Dispatcher,
    /// Goes last: it holds the log.
    _base: tempfile::TempDir,
}

impl Place {
    async fn new(adjust: impl FnOnce(Setup) -> Setup) -> Place {
        let base = tempfile::TempDir::new().unwrap();
        let instance = Counting::start().await;
        let setup = Setup::new(base.path(), mint::working(base.path()));
        let setup = setup.user("alice", "alice", instance.port);
        let dispatcher = adjust(setup).start().await;
        Place {
            _base: base,
            instance,
            dispatcher,
        }
    }

    /// Waits until a connection is used again, and tells which. An answer may be there a moment before its connection is
    /// free.
    async fn used_again(&self) -> usize {
        loop {
            let number = self.get("/first").await;
            if self.get("/again").await == number {
                return number;
            }
        }
    }

    /// Opens a connection for each of twenty requests.
    async fn twenty_at_once(&self) {
        // The first request asks for the name of the session's cookie as well.
        self.get("/1").await;
        let slow = futures_util::future::join_all((0..20).map(|_| self.get("/slow")));
        let wait = async {
            wait_for("twenty requests", async || self.instance.open() >= 20).await;
            self.instance.go_on.add_permits(20);
        };
        tokio::join!(slow, wait);
    }

    /// Which connection the answer came on.
    async fn get(&self, path: &str) -> usize {
        let cookie = [("Cookie", "t3_session=x")];
        number(&self.dispatcher.get("alice", path, &cookie).await)
    }
}

fn number(reply: &Reply) -> usize {
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.text().parse().unwrap()
}

#[tokio::test]
async fn a_connection_is_used_again_and_closed_before_an_instance_would() {
    let place = Place::new(|setup| setup).await;
    let first = place.used_again().await;
    assert!(!place.instance.seen(first).ended);
    let ended = async || place.instance.seen(first).ended;
    // A real one waits for five seconds.
    tokio::time::timeout(
        Duration::from_secs(5),
        wait_for("the end of an unused connection", ended),
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn what_may_not_be_repeated_leaves_none_behind() {
    let place = Place::new(|setup| setup).await;
    let kept = place.used_again().await;
    let mut client = Client::connect(place.dispatcher.address()).await.unwrap();
    let headers = from("alice", "t3_session=x");
    let reply = client.request("POST", "/2", &headers, b"").await.unwrap();
    let own = number(&reply);
    assert_ne!(own, kept);
    let ended = async || place.instance.seen(own).ended;
    wait_for("the end of the connection of a POST", ended).await;
    assert_eq!(place.used_again().await, kept);
}

#[tokio::test]
async fn one_that_has_something_to_say_is_not_used_again() {
    let place = Place::new(|setup| setup).await;
    for path in ["/chatter", "/bye"] {
        let spoilt = place.get(path).await;
        let is_spoilt = async || {
            let seen = place.instance.seen(spoilt);
            seen.chattered || seen.ended
        };
        wait_for("a spoilt connection", is_spoilt).await;
        assert_ne!(place.get("/next").await, spoilt, "{path}");
        assert_eq!(place.instance.seen(spoilt).paths.last().unwrap(), path);
    }
}

/// The instance closes it just when it is used again: nobody notices.
#[tokio::test]
async fn a_request_whose_connection_is_gone_is_repeated() {
    let place = Place::new(|setup| setup).await;
    // Until one was used again.
    loop {
        let gone = place.get("/last").await;
        assert_ne!(place.get("/next").await, gone);
        if place
            .instance
            .seen(gone)
            .paths
            .ends_with(&["/last".into(), "/next".into()])
        {
            return;
        }
    }
}

/// Twenty connections are kept, and each would fail it.
#[tokio::test]
async fn a_request_is_repeated_once() {
    let place = Place::new(|setup| setup).await;
    place.twenty_at_once().await;
    place.used_again().await;
    let cookie = [("Cookie", "t3_session=x")];
    let reply = place.dispatcher.get("alice", "/fail", &cookie).await;
    let code = reply.get("x-t3-dispatch-error");
    assert_eq!((reply.status, code), (502, Some("instance-failed")));
    let seen = place.instance.seen.lock().unwrap().clone();
    let paths = seen.iter().flat_map(|seen| &seen.paths);
    assert_eq!(paths.filter(|path| *path == "/fail").count(), 2);
}

#[tokio::test]
async fn no_more_are_kept_than_there_is_room_for() {
    let place = Place::new(|mut setup| {
        setup.top["upstream_keepalive_pool_size"] = 2.into();
        setup
    })
    .await;
    place.twenty_at_once().await;
    // Two threads, two for each.
    wait_for("the end of the others", async || place.instance.open() == 4).await;
    // Long before these are given up.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(place.instance.open(), 4);
    wait_for("the end of all", async || place.instance.open() == 0).await;
    // The room is there again.
    place.used_again().await;
}
