//! The dispatch table: checked as a whole, reloaded at once, never half.

use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::common::dispatcher::{Setup, program, wait_for};
use crate::common::mint;
use crate::world::World;

/// Runs `serve -t` with a table of this text.
fn try_table(text: &[u8]) -> Output {
    let base = TempDir::new().unwrap();
    let file = Setup::new(base.path(), vec!["/bin/true".into()]).write();
    std::fs::write(base.path().join("dispatch.json"), text).unwrap();
    program()
        .args(["serve", "-t", "-c"])
        .arg(file)
        .output()
        .unwrap()
}

#[test]
fn a_bad_table_at_start_is_refused_with_every_fault_named() {
    for (text, faults) in [
        ("", &["is not a JSON object of names to instances", "line 1"][..]),
        ("[]", &["is not a JSON object of names to instances", "expected an object"]),
        ("{\"alice\": {\"os_user\": \"alice\", \"port\": 3773}", &["EOF", "line 1"]),
        ("{} {}", &["trailing characters"]),
        ("{\"alice\": 3773}", &["\"alice\": 3773 is not an object such as"]),
        ("{\"alice\": {}}", &["\"alice\".os_user: null is not the name of an OS user", "\"alice\".port: null is not a port"]),
        ("{\"alice\": {\"os_user\": \"alice\", \"port\": 0}}", &["\"alice\".port: 0 is not a port (1 to 65535)"]),
        ("{\"alice\": {\"os_user\": \"alice\", \"port\": 65536}}", &["\"alice\".port: 65536 is not a port"]),
        ("{\"alice\": {\"os_user\": \"alice\", \"port\": -1}}", &["\"alice\".port: -1 is not a port"]),
        ("{\"alice\": {\"os_user\": \"alice\", \"port\": 3773.5}}", &["\"alice\".port: 3773.5 is not a port"]),
        ("{\"alice\": {\"os_user\": \"alice\", \"port\": \"3773\"}}", &["\"alice\".port: \"3773\" is not a port"]),
        (
            "{\"a\": {\"os_user\": \"Alice\", \"port\": 1}, \"b\": {\"os_user\": \"1b\", \"port\": 2},
              \"c\": {\"os_user\": \"\", \"port\": 3}, \"d\": {\"os_user\": \"a;reboot\", \"port\": 4},
              \"e\": {\"os_user\": \"-n\", \"port\": 5}, \"f\": {\"os_user\": \"a23456789012345678901234567890123\", \"port\": 6},
              \"g\": {\"os_user\": \"alice\\n\", \"port\": 7}, \"h\": {\"os_user\": 8, \"port\": 8}}",
            &[
                "\"a\".os_user: \"Alice\" is not", "\"b\".os_user: \"1b\" is not", "\"c\".os_user: \"\" is not",
                "\"d\".os_user: \"a;reboot\" is not", "\"e\".os_user: \"-n\" is not",
                "\"f\".os_user: \"a23456789012345678901234567890123\" is not", "\"g\".os_user: \"alice\\n\" is not",
                "\"h\".os_user: 8 is not",
            ],
        ),
        (
            "{\"alice\": {\"os_user\": \"alice\", \"port\": 3773}, \"alice\": {\"os_user\": \"bob\", \"port\": 3774}}",
            &["\"alice\": stands in the table twice"],
        ),
        (
            "{\"alice\": {\"os_user\": \"alice\", \"port\": 3773}, \"bob\": {\"os_user\": \"bob\", \"port\": 3773}}",
            &["\"bob\".port: 3773 belongs to OS user \"alice\" already, by \"alice\""],
        ),
        (
            "{\"alice\": {\"os_user\": \"alice\", \"port\": 3773, \"port\": 3774}}",
            &["\"alice\".port: is given twice"],
        ),
    ] {
        let output = try_table(text.as_bytes());
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}\n{said}");
        assert!(said.contains("dispatch.json") && said.contains("dispatch.table"), "{said}");
        for fault in faults {
            assert!(said.contains(fault), "{text}\nlacks {fault:?} in\n{said}");
        }
    }
    assert_eq!(try_table(b"{\"\xff\": {}}").status.code(), Some(1));
}

#[test]
fn a_table_that_cannot_be_read_is_refused() {
    let base = TempDir::new().unwrap();
    let setup = Setup::new(base.path(), vec!["/bin/true".into()]);
    let file = setup.write();
    let table = base.path().join("dispatch.json");
    std::fs::remove_file(&table).unwrap();
    let refused = |what: &str| {
        let output = program()
            .args(["serve", "-t", "-c"])
            .arg(&file)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(what), "{said}");
    };
    refused("cannot be read: No such file");
    std::fs::create_dir(&table).unwrap();
    refused("cannot be read: is not a file");
    std::fs::remove_dir(&table).unwrap();
    std::process::Command::new("mkfifo")
        .arg(&table)
        .status()
        .unwrap();
    refused("cannot be read: is not a file");
}

#[test]
fn a_good_table_may_hold_more_than_we_know() {
    for text in [
        "{}",
        "{\"alice\": {\"os_user\": \"alice\", \"port\": 3773, \"note\": {\"since\": 2026}, \"port2\": 0}}",
        // Several names of one OS user, and one OS user with several instances.
        "{\"alice\": {\"os_user\": \"alice\", \"port\": 3773}, \"a.smith\": {\"os_user\": \"alice\", \"port\": 3773},
          \"alice-two\": {\"os_user\": \"alice\", \"port\": 3774}}",
        "{\"älice\": {\"os_user\": \"_a-1\", \"port\": 65535}}",
    ] {
        let output = try_table(text.as_bytes());
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Whether `user` has an instance by now.
async fn has_instance(world: &World, user: &str) -> bool {
    world
        .dispatcher
        .get(
            user,
            "/healthcheck-of-the-test",
            &[("Cookie", "t3_session=x")],
        )
        .await
        .status
        != 403
}

async fn in_force_within_a_second(world: &World, user: &str, wanted: bool) {
    let start = Instant::now();
    wait_for("change of the table", async || {
        has_instance(world, user).await == wanted
    })
    .await;
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{user} after {:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn a_changed_file_is_in_force_within_a_second() {
    let world = World::new().await;
    let file = world.base().join("dispatch.json");
    let without = json!({ "bob": { "os_user": "bob", "port": world.bob.port() } });
    let with = json!({ "bob": without["bob"], "alice": { "os_user": "alice", "port": world.alice.port() } });
    for _ in 0..3 {
        // A rename over it.
        world.dispatcher.write_table(&without);
        in_force_within_a_second(&world, "alice", false).await;
        // An edit in place.
        std::fs::write(&file, with.to_string()).unwrap();
        in_force_within_a_second(&world, "alice", true).await;
    }
    assert!(has_instance(&world, "bob").await);
    assert_eq!(world.dispatcher.metric("t3dispatch_table_users").await, 2.0);
    assert_eq!(
        world
            .dispatcher
            .metric("t3dispatch_table_reloads_total{result=\"failed\"}")
            .await,
        0.0
    );
}

/// Kubernetes mounts a ConfigMap as `FILE -> ..data/FILE`, `..data -> ..TIMESTAMP`, and swaps the latter link.
#[tokio::test]
async fn a_swapped_symlink_is_in_force_within_a_second() {
    use std::os::unix::fs::symlink;
    let mount = TempDir::new().unwrap();
    let at = |name: &str| mount.path().join(name);
    let put = |revision: &str, table: String| {
        std::fs::create_dir(at(revision)).unwrap();
        std::fs::write(at(revision).join("dispatch.json"), table).unwrap();
        symlink(revision, at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
    };
    put(
        "..1",
        json!({ "carol": { "os_user": "carol", "port": 1 } }).to_string(),
    );
    symlink("..data/dispatch.json", at("dispatch.json")).unwrap();
    let table = at("dispatch.json").display().to_string();
    let world = World::with(|setup| setup.set("table", table)).await;
    assert!(!has_instance(&world, "alice").await);
    for revision in ["..2", "..3"] {
        let alice = json!({ "os_user": "alice", "port": world.alice.port() });
        let table = if revision == "..2" {
            json!({ "alice": alice })
        } else {
            json!({})
        };
        put(revision, table.to_string());
        in_force_within_a_second(&world, "alice", revision == "..2").await;
    }
}

#[tokio::test]
async fn a_bad_table_later_leaves_the_good_one() {
    let world = World::new().await;
    let failed = async || {
        world
            .dispatcher
            .metric("t3dispatch_table_reloads_total{result=\"failed\"}")
            .await
    };
    let good_load = async || {
        world
            .dispatcher
            .metric("t3dispatch_table_last_good_load_timestamp_seconds")
            .await
    };
    assert!(good_load().await > 1_700_000_000.0);
    let file = world.base().join("dispatch.json");
    let bad =
        r#"{"alice": {"os_user": "root!", "port": 3773}, "bob": {"os_user": "bob", "port": 0}}"#;
    std::fs::write(&file, bad).unwrap();
    wait_for("failed reload", async || failed().await == 1.0).await;
    assert!(has_instance(&world, "alice").await && has_instance(&world, "bob").await);
    let lines = world.dispatcher.logged("table-rejected");
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].contains("\\\"alice\\\".os_user") && lines[0].contains("\\\"bob\\\".port"),
        "{}",
        lines[0]
    );

    std::fs::remove_file(&file).unwrap();
    wait_for("failed reload", async || failed().await == 2.0).await;
    std::fs::create_dir(&file).unwrap();
    wait_for("failed reload", async || failed().await == 3.0).await;
    assert!(has_instance(&world, "alice").await);
    // One line a fault, however often it is looked at.
    assert_eq!(world.dispatcher.logged("table-rejected").len(), 3);

    std::fs::remove_dir(&file).unwrap();
    world.dispatcher.write_table(&json!({}));
    in_force_within_a_second(&world, "alice", false).await;
}

/// Hangup reads the table at once and says what it found, even when that is nothing new.
#[tokio::test]
async fn hangup_reads_the_table_again() {
    let mut world = World::new().await;
    world.dispatcher.signal(Signal::HUP);
    world
        .dispatcher
        .wait_for_log("table-reloaded users=2")
        .await;
    std::fs::write(world.base().join("dispatch.json"), "nothing").unwrap();
    world.dispatcher.signal(Signal::HUP);
    world.dispatcher.wait_for_log("table-rejected").await;
    for _ in 0..10 {
        world.dispatcher.signal(Signal::HUP);
    }
    assert!(has_instance(&world, "alice").await);
    assert!(world.dispatcher.child.try_wait().unwrap().is_none());
}

/// A change that leaves no trace in what stat(2) tells is found by reading the file every now and then.
#[tokio::test]
async fn the_file_is_read_every_poll_in_any_case() {
    let world = World::with(|setup| setup.set("table_poll", "1s")).await;
    let stamp = async || {
        world
            .dispatcher
            .metric("t3dispatch_table_last_good_load_timestamp_seconds")
            .await
    };
    let first = stamp().await;
    wait_for("a later good load", async || stamp().await > first + 3.0).await;
    // Reading the same again is no news.
    assert!(world.dispatcher.logged("table-reloaded").is_empty());
}

/// Swaps are atomic: while the table changes all the time, requests of those who stay never notice.
#[tokio::test]
async fn live_requests_never_notice_a_swap() {
    let world = World::new().await;
    let session = world.bob.new_session();
    let done = AtomicBool::new(false);
    let bob = json!({ "os_user": "bob", "port": world.bob.port() });
    let swaps = async {
        for round in 0..20 {
            let mut table = json!({ "bob": bob });
            for user in 0..round * 50 {
                table[format!("user{user}")] = json!({ "os_user": "alice", "port": 1 });
            }
            world.dispatcher.write_table(&table);
            let users = (round * 50 + 1) as f64;
            wait_for("swap", async || {
                world.dispatcher.metric("t3dispatch_table_users").await == users
            })
            .await;
        }
        done.store(true, Ordering::Relaxed);
    };
    let requests = async {
        let mut count = 0;
        while !done.load(Ordering::Relaxed) {
            let reply = world
                .dispatcher
                .get("bob", "/__test/next", &[("Cookie", &session)])
                .await;
            assert_eq!((reply.status, reply.text().as_str()), (200, "next\n"));
            count += 1;
        }
        count
    };
    let ((), count) = tokio::join!(swaps, requests);
    assert!(count > 20);
    // The entry did not change, so nothing that was known of the instance was forgotten.
    assert_eq!(world.bob.seen_at("/api/auth/session").len(), 1);
}

/// When an entry changes, what was known of the old instance is forgotten, its connections included.
#[tokio::test]
async fn a_moved_person_reaches_the_new_instance() {
    let world = World::new().await;
    let session = world.alice.new_session();
    assert_eq!(
        world.dispatcher.navigate("alice", &session).await.status,
        200
    );
    world
        .dispatcher
        .write_table(&json!({ "alice": { "os_user": "bob", "port": world.bob.port() } }));
    world.dispatcher.wait_for_log("table-reloaded").await;
    let reply = world
        .dispatcher
        .get("alice", "/", &[("Cookie", &world.bob.new_session())])
        .await;
    assert!(reply.text().contains("bob's workspace"));
    // Alice's old cookie has another name than bob's instance uses, so it is no session there.
    assert_eq!(
        world
            .dispatcher
            .get("alice", "/", &[("Cookie", &session)])
            .await
            .status,
        302
    );
    assert_eq!(mint::count(world.base(), "bob"), 1);
    assert_eq!(world.mints(), 0);
}

/// A table of 100,000 names is read beside the requests: the one thread that they have goes on answering meanwhile.
#[tokio::test]
async fn requests_go_on_while_a_large_table_is_read() {
    let world = World::with(|mut setup| {
        setup.top["threads"] = 1.into();
        setup
    })
    .await;
    let session = world.bob.new_session();
    let mut table = json!({ "bob": { "os_user": "bob", "port": world.bob.port() } });
    let free = (1024..=u16::MAX).filter(|port| *port != world.bob.port());
    for (user, port) in free.cycle().take(99_999).enumerate() {
        table[format!("user{user}")] = json!({ "os_user": format!("os{port}"), "port": port });
    }
    world.dispatcher.write_table(&table);
    let mut answered = Vec::new();
    let line = loop {
        let reply = world
            .dispatcher
            .get("bob", "/__test/next", &[("Cookie", &session)])
            .await;
        assert_eq!((reply.status, reply.text().as_str()), (200, "next\n"));
        answered.push(Instant::now());
        if let Some(line) = world.dispatcher.logged("table-reloaded users=100000").pop() {
            break line;
        }
    };
    let took = line.split("dur_ms=").nth(1).unwrap().parse().unwrap();
    let took = Duration::from_millis(took);
    let end = *answered.last().unwrap();
    // What was answered just before the line was seen may have been answered after the reading.
    let meanwhile = |at: &&Instant| (took / 4..took).contains(&(end - **at));
    assert!(answered.iter().filter(meanwhile).count() > 5, "{line}");
}

/// Where there are more threads than cores, the one that reads the table makes way for the others.
#[tokio::test]
async fn the_thread_that_reads_the_table_is_nice() {
    let world = World::new().await;
    let threads = format!("/proc/{}/task", world.dispatcher.child.id());
    let nice_ones = || -> Vec<String> {
        let nice = |stat: String| {
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
            // The 19th field (proc_pid_stat(5)), counted from the third.
            (rest.split(' ').nth(16)? == "10").then(|| name.to_owned())
        };
        let threads = std::fs::read_dir(&threads).unwrap();
        let stats =
            threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("stat")));
        stats.filter_map(|stat| nice(stat.ok()?)).collect()
    };
    wait_for("nice thread", async || nice_ones() == ["BG table"]).await;
}
