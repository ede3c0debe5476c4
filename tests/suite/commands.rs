//! The command line: `check`, `serve -t`, help, and how the process starts and stops.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::dispatcher::{Setup, own_address, program, wait_for};
use crate::common::http::{self, Client};
use crate::common::instance::{Instance, Version};
use crate::common::mint;
use crate::world::{World, from};

struct Told {
    status: i32,
    out: String,
    err: String,
}

async fn run(arguments: &[&str], conf: &std::path::Path) -> Told {
    let mut command = program();
    command.args(arguments).arg("-c").arg(conf);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    Told {
        status: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

struct Place {
    alice: Instance,
    bob: Instance,
    base: tempfile::TempDir,
}

impl Place {
    async fn new() -> Place {
        let base = tempfile::TempDir::new().unwrap();
        let alice = Instance::start(&mint::home(base.path(), "alice"), Version::V0_0_33).await;
        let bob = Instance::start(&mint::home(base.path(), "bob"), Version::V0_0_24).await;
        Place { base, alice, bob }
    }

    fn setup(&self) -> Setup {
        let setup = Setup::new(self.base.path(), mint::working(self.base.path()));
        setup
            .user("alice", "alice", self.alice.port())
            .user("bob", "bob", self.bob.port())
    }
}

#[tokio::test]
async fn check_tells_one_line_for_each() {
    let place = Place::new().await;
    let conf = place.setup().write();
    let told = run(&["check"], &conf).await;
    assert_eq!(told.status, 0, "{}{}", told.out, told.err);
    let lines: Vec<&str> = told.out.lines().collect();
    assert_eq!(lines.len(), 5, "{}", told.out);
    assert!(
        lines.iter().all(|line| line.starts_with("ok    ")),
        "{}",
        told.out
    );
    let alice = format!(
        "ok    alice     127.0.0.1:{} as alice  t3 0.0.33  cookie {}",
        place.alice.port(),
        place.alice.cookie_name()
    );
    assert_eq!(lines[3], alice);
    assert_eq!(
        lines[4],
        format!(
            "ok    bob       127.0.0.1:{} as bob  t3 0.0.24  cookie t3_session",
            place.bob.port()
        )
    );
    // Not a terminal: no colours. And looking pairs nobody.
    assert!(!told.out.contains('\x1b'));
    assert!(mint::notes(place.base.path()).is_empty());

    let told = run(&["check", "--json"], &conf).await;
    let report: Value = serde_json::from_str(&told.out).unwrap();
    assert_eq!(report["ok"], true);
    assert_eq!(report["checks"][3]["check"], "alice");
    assert_eq!(report["checks"][3]["os_user"], "alice");
    assert_eq!(report["checks"][3]["port"], place.alice.port());
    assert_eq!(report["checks"][3]["version"], "0.0.33");
    assert_eq!(report["checks"][3]["cookie"], place.alice.cookie_name());
}

#[tokio::test]
async fn check_fails_when_anything_is_wrong() {
    let place = Place::new().await;
    let dead = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let conf = place
        .setup()
        .user("carol", "carol", dead)
        .user("dave@example.com", "dave", dead - 1)
        .write();
    let told = run(&["check"], &conf).await;
    assert_eq!(told.status, 1);
    assert!(
        told.out.contains(&format!(
            "127.0.0.1:{dead} as carol  does not answer (ConnectRefused)"
        )),
        "{}",
        told.out
    );
    assert!(
        told.out.contains("a name ends before its first @"),
        "{}",
        told.out
    );
    assert_eq!(
        told.out
            .lines()
            .filter(|line| line.starts_with("FAIL"))
            .count(),
        2
    );

    place.alice.set(|vices| vices.garbage = true);
    place
        .bob
        .set(|vices| vices.check_says = Some((200, "<!doctype html>".into())));
    let told = run(&["check"], &place.setup().write()).await;
    assert_eq!(
        (
            told.status,
            told.out
                .lines()
                .filter(|line| line.starts_with("FAIL"))
                .count()
        ),
        (1, 2),
        "{}",
        told.out
    );

    for (mint, fault) in [
        (json!(["/nonexistent/t3-mint"]), "/nonexistent/t3-mint: "),
        (
            json!(["no-such-program-anywhere"]),
            "no-such-program-anywhere: not found in PATH",
        ),
        (
            json!(["sudo", "-n", "/nonexistent/t3-mint"]),
            "not found in PATH",
        ),
        (
            json!([place.base.path().join("dispatch.json")]),
            "dispatch.json: ",
        ),
        (json!(["/etc"]), "/etc: "),
    ] {
        let told = run(
            &["check"],
            &place.setup().set("pairing.mint", mint.clone()).write(),
        )
        .await;
        assert_eq!(told.status, 1, "{mint}");
        let line = told
            .out
            .lines()
            .find(|line| line.starts_with("FAIL  mint"))
            .unwrap();
        assert!(
            line.contains(fault) || line.contains("/nonexistent/t3-mint: "),
            "{line}"
        );
        assert!(line.ends_with("(dispatch.pairing.mint)"));
    }
    let conf = place.setup().set("listne", 1).write();
    let told = run(&["check"], &conf).await;
    assert_eq!(told.status, 1);
    assert!(
        told.out.contains("dispatch.listne: is not a key here"),
        "{}",
        told.out
    );
    let conf = place.setup().write();
    std::fs::write(place.base.path().join("dispatch.json"), "[]").unwrap();
    let told = run(&["check", "--json"], &conf).await;
    let report: Value = serde_json::from_str(&told.out).unwrap();
    assert_eq!(
        (told.status, &report["ok"], &report["checks"][2]["check"]),
        (1, &json!(false), &json!("table"))
    );
}

/// `--pair` does the real thing and says at which step it failed.
#[tokio::test]
async fn check_pairs_for_real() {
    let place = Place::new().await;
    let conf = place.setup().write();
    for (user, endpoint) in [
        ("alice", "taken at /api/auth/browser-session"),
        ("bob", "taken at /api/auth/bootstrap, the fallback"),
    ] {
        let told = run(&["check", "--pair", user], &conf).await;
        assert_eq!(told.status, 0, "{}", told.out);
        for row in [
            "pair: mint      a credential for",
            endpoint,
            "pair: cookie    t3_session",
            "pair: session   the instance knows the session",
        ] {
            assert!(told.out.contains(row), "lacks {row}\n{}", told.out);
        }
        assert_eq!(mint::count(place.base.path(), user), 1);
    }
    let failing = async |step: &str, setup: Setup| {
        let told = run(&["check", "--pair", "alice"], &setup.write()).await;
        let last = told.out.lines().last().unwrap_or_default().to_owned();
        assert_eq!(told.status, 1);
        assert!(last.starts_with(&format!("FAIL  pair{step}")), "{last}");
    };
    let told = run(&["check", "--pair", "mallory"], &conf).await;
    assert_eq!(told.status, 1);
    assert!(told.out.ends_with("mallory is not in the table\n"));
    let complains = mint::script(
        place.base.path(),
        "mint-complains",
        "echo 'a password is required' >&2; exit 1",
    );
    failing(
        ": mint ",
        place.setup().set("pairing.mint", complains.clone()),
    )
    .await;
    // Whoever runs this sees what the mint command says.
    let told = run(
        &["check", "--pair", "alice"],
        &place.setup().set("pairing.mint", complains).write(),
    )
    .await;
    assert!(told.err.contains("a password is required"));
    place.alice.set(|vices| vices.exchange_says = Some(500));
    failing(": exchange ", place.setup()).await;
    place.alice.set(|vices| *vices = Default::default());
    place.alice.set(|vices| vices.pairs_without_cookie = true);
    failing(": exchange ", place.setup()).await;
    place.alice.set(|vices| *vices = Default::default());
    place
        .alice
        .set(|vices| vices.check_says = Some((200, "{\"authenticated\":false}".into())));
    failing(": session ", place.setup()).await;
}

#[test]
fn help_and_version_help() {
    let say = |arguments: &[&str]| {
        let output = program().args(arguments).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(
        say(&["--version"]),
        format!("t3-dispatch {}\n", env!("CARGO_PKG_VERSION"))
    );
    let help = say(&["--help"]);
    assert!(
        help.contains("serve")
            && help.contains("check")
            && help.contains("their own `t3 serve` instance")
    );
    let help = say(&["serve", "--help"]);
    for part in ["--conf <FILE>", "--upgrade", "--daemon", "--test", "SIGHUP"] {
        assert!(help.contains(part), "{part}");
    }
    assert!(say(&["check", "--help"]).contains("--pair <USER>"));
    assert_eq!(
        program().arg("frobnicate").output().unwrap().status.code(),
        Some(2)
    );
    assert_eq!(program().output().unwrap().status.code(), Some(2));
}

#[tokio::test]
async fn an_address_in_use_is_told_in_a_sentence() {
    let base = tempfile::TempDir::new().unwrap();
    let setup = Setup::new(base.path(), vec!["/bin/true".into()]);
    let taken = tokio::net::TcpListener::bind((setup.ip, 3781))
        .await
        .unwrap();
    let told = run(&["serve"], &setup.write()).await;
    assert_eq!(told.status, 1);
    let expected = format!(
        "dispatch.admin: cannot listen on {}: Address already in use",
        taken.local_addr().unwrap()
    );
    assert!(told.err.contains(&expected), "{}", told.err);
}

#[tokio::test]
async fn sigterm_lets_requests_in_flight_end() {
    let mut world = World::new().await;
    let session = world.alice.new_session();
    let headers = from("alice", &session);
    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
    client
        .send(http::head("GET", "/__test/slow?1500", &headers, 0))
        .await
        .unwrap();
    wait_for("request at the instance", async || {
        !world.alice.seen_at("/__test/slow").is_empty()
    })
    .await;
    let mut idle = Client::connect(world.dispatcher.address()).await.unwrap();
    idle.request("GET", "/healthz", &[], b"").await.unwrap();
    let start = Instant::now();
    world.dispatcher.signal(Signal::TERM);
    assert_eq!(client.read_reply("GET").await.unwrap().text(), "slow\n");
    assert!(world.dispatcher.exited().await.success());
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
}

/// Whoever asks a second time does not want to wait.
#[tokio::test]
async fn a_second_signal_ends_the_wait() {
    for second in [Signal::TERM, Signal::INT] {
        let mut world = World::with(|mut setup| {
            setup.top["grace_period_seconds"] = json!(3600);
            setup
        })
        .await;
        let session = world.alice.new_session();
        let headers = from("alice", &session);
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        client
            .send(http::head("GET", "/__test/slow?600000", &headers, 0))
            .await
            .unwrap();
        wait_for("request at the instance", async || {
            !world.alice.seen_at("/__test/slow").is_empty()
        })
        .await;
        world.dispatcher.signal(Signal::TERM);
        let address = world.dispatcher.address();
        wait_for("end of listening", async || {
            Client::connect(address).await.is_err()
        })
        .await;
        world.dispatcher.signal(second);
        world.dispatcher.exited().await;
    }
}

#[tokio::test]
async fn sigint_ends_at_once_and_sigquit_with_nobody_waiting_ends_nothing() {
    let mut world = World::new().await;
    world.dispatcher.signal(Signal::QUIT);
    world
        .dispatcher
        .wait_for_log("upgrade-failed serving=on")
        .await;
    let session = world.alice.new_session();
    assert_eq!(
        world.dispatcher.navigate("alice", &session).await.status,
        200
    );
    world.dispatcher.signal(Signal::INT);
    assert!(world.dispatcher.exited().await.success());
}

/// Pingora's own way of changing the program: the new process takes the sockets over, the old one ends its requests.
#[tokio::test]
async fn a_graceful_upgrade_hands_the_sockets_over() {
    let mut world = World::new().await;
    let session = world.alice.new_session();
    let headers = from("alice", &session);
    let conf = world.base().join("t3-dispatch.yaml");
    let log = std::fs::File::create(world.base().join("log-new")).unwrap();
    let mut new = program()
        .args(["serve", "-u", "-c"])
        .arg(&conf)
        .stderr(log)
        .spawn()
        .unwrap();
    wait_for("upgrade socket", async || {
        world.base().join("upgrade.sock").exists()
    })
    .await;
    let mut slow = Client::connect(world.dispatcher.address()).await.unwrap();
    slow.send(http::head("GET", "/__test/slow?8000", &headers, 0))
        .await
        .unwrap();
    world.dispatcher.signal(Signal::QUIT);
    // All the while somebody answers.
    let requests = async {
        loop {
            assert_eq!(
                world
                    .dispatcher
                    .get("alice", "/__test/next", &headers[1..])
                    .await
                    .status,
                200
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        reply = slow.read_reply("GET") => assert_eq!(reply.unwrap().text(), "slow\n"),
        () = requests => {}
    }
    assert!(world.dispatcher.exited().await.success());
    assert_eq!(
        world
            .dispatcher
            .get("alice", "/__test/next", &headers[1..])
            .await
            .status,
        200
    );
    assert_eq!(world.dispatcher.metric("t3dispatch_table_users").await, 2.0);
    new.kill().unwrap();
    new.wait().unwrap();
}

/// In the background it leaves its process ID behind, and takes signals as it does in the foreground.
#[tokio::test]
async fn it_goes_to_the_background() {
    let base = tempfile::TempDir::new().unwrap();
    let log = base.path().join("error.log");
    let mut setup = Setup::new(base.path(), mint::working(base.path()));
    setup.top["error_log"] = json!(log);
    let address = (setup.ip, 3780).into();
    let conf = setup.write();
    let mut command = program();
    command.args(["serve", "-d", "-c"]).arg(&conf);
    let status = tokio::task::spawn_blocking(move || command.status().unwrap());
    assert!(status.await.unwrap().success());
    wait_for("start", async || {
        http::request(address, "GET", "/healthz", &[], b"")
            .await
            .is_ok()
    })
    .await;
    let pid: i32 = std::fs::read_to_string(base.path().join("pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, Signal::HUP).unwrap();
    wait_for("reload", async || {
        std::fs::read_to_string(&log).is_ok_and(|log| log.contains("table-reloaded"))
    })
    .await;
    assert_eq!(
        http::request(address, "GET", "/healthz", &[], b"")
            .await
            .unwrap()
            .status,
        200
    );
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    wait_for("end", async || {
        rustix::process::test_kill_process(pid).is_err()
    })
    .await;
}

#[tokio::test]
async fn several_addresses_may_be_listened_on() {
    let second = own_address();
    let world = World::with(|setup| {
        let first = format!("{}:3780", setup.ip);
        setup.set("listen", vec![first, format!("{second}:3790")])
    })
    .await;
    let reply = http::request((second, 3790).into(), "GET", "/healthz", &[], b"")
        .await
        .unwrap();
    assert_eq!(reply.text(), "ok\n");
    world
        .dispatcher
        .wait_for_log(&format!(
            "listen={}:3780,{second}:3790",
            world.dispatcher.ip
        ))
        .await;
}
