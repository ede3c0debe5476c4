//! A new process takes over without a socket or a request lost, or nothing happens at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::common::dispatcher::{Dispatcher, Setup, program, wait_for};
use crate::common::frames::Frame;
use crate::common::http;
use crate::common::instance::{Instance, Version};
use crate::common::mint;
use crate::common::raw::{MASK, ask, rest};
use crate::common::successor::{Successor, reload};
use crate::world::{World, from};

/// A socket of alice's through whoever listens now.
async fn socket(world: &World, session: &str) -> TcpStream {
    let (status, client) = ask(world.dispatcher.address(), "alice", &[("Cookie", session)]).await;
    assert_eq!(status, 101);
    client.stream
}

/// A socket of alice's through this process, and how many have gone to its predecessor, which takes connections for a
/// moment more.
async fn socket_at(world: &World, session: &str, process: &Successor) -> (TcpStream, usize) {
    for earlier in 0.. {
        let opened = || world.dispatcher.logged(" ws open ");
        let before = opened().len();
        let stream = socket(world, session).await;
        wait_for("log line", async || opened().len() > before).await;
        // The ID of a request that came without one holds the process's.
        let pid = process.0.as_raw_nonzero().get();
        if opened()[before].contains(&format!("-{pid:x}-")) {
            return (stream, earlier);
        }
        close(stream).await;
    }
    unreachable!("there are numbers enough")
}

async fn echo(stream: &mut TcpStream, text: &str) {
    Frame::text(text).write(stream, MASK).await.unwrap();
    assert_eq!(Frame::read(stream).await.unwrap(), Frame::text(text));
}

async fn close(mut stream: TcpStream) {
    Frame::close(1000).write(&mut stream, MASK).await.unwrap();
    assert_eq!(Frame::read(&mut stream).await.unwrap(), Frame::close(1000));
    stream.shutdown().await.unwrap();
    rest(&mut stream).await;
}

/// Three upgrades leave four processes, each with its own socket. Each ends with its last one.
#[tokio::test]
async fn a_chain_of_upgrades() {
    let mut world = World::new().await;
    let session = world.alice.new_session();
    let conf = world.base().join("t3-dispatch.yaml");
    let mut sockets = vec![socket(&world, &session).await];
    let mut successors = Vec::new();
    let mut more = 0;
    for _ in 0..3 {
        let successor = Successor::of(&conf).await;
        let (socket, earlier) = socket_at(&world, &session, &successor).await;
        successors.push(successor);
        sockets.push(socket);
        more += earlier;
    }
    assert!(world.dispatcher.child.try_wait().unwrap().is_none());
    assert!(successors.iter().all(Successor::is_alive));
    for (position, socket) in sockets.iter_mut().enumerate() {
        echo(socket, &format!("socket {position}")).await;
    }
    // They end in any order, each process with its own.
    let mut sockets: Vec<Option<TcpStream>> = sockets.into_iter().map(Some).collect();
    close(sockets[1].take().unwrap()).await;
    successors[0].gone().await;
    assert!(world.dispatcher.child.try_wait().unwrap().is_none() && successors[1].is_alive());
    close(sockets[0].take().unwrap()).await;
    assert!(world.dispatcher.exited().await.success());
    echo(sockets[2].as_mut().unwrap(), "still here").await;
    close(sockets[2].take().unwrap()).await;
    successors[1].gone().await;
    echo(sockets[3].as_mut().unwrap(), "me too").await;
    assert!(successors[2].is_alive());
    // One record each, all in one ledger.
    close(sockets[3].take().unwrap()).await;
    let records = world.dispatcher.wait_for_records(4 + more).await;
    assert!(
        records.iter().all(|record| record["cause"] == "graceful"),
        "{records:#?}"
    );
}

/// Whatever keeps a new process from serving, the old one goes on as if nothing had been asked, and says so.
#[tokio::test]
async fn a_new_process_that_cannot_serve_changes_nothing() {
    let mut world = World::new().await;
    let session = world.alice.new_session();
    let mut held = socket(&world, &session).await;
    let conf = world.base().join("t3-dispatch.yaml");
    let table = world.base().join("dispatch.json");
    let good = (
        std::fs::read_to_string(&conf).unwrap(),
        std::fs::read_to_string(&table).unwrap(),
    );
    let settings = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut settings: serde_json::Value = serde_json::from_str(&good.0).unwrap();
        change(&mut settings);
        std::fs::write(&conf, settings.to_string()).unwrap();
    };
    let mut failures = 0;
    let mut refused = async |what: &str| {
        let (taken, said) = reload(&conf).await;
        assert!(!taken && said.contains(what), "{said}");
        failures += 1;
        failures
    };
    // Settings that cannot be used: told before anybody is asked.
    settings(&|settings| settings["dispatch"]["listne"] = json!(1));
    refused("dispatch.listne: is not a key here").await;
    // A table that cannot be used.
    std::fs::write(&conf, &good.0).unwrap();
    std::fs::write(&table, "[]").unwrap();
    refused("is not a JSON object of names to instances").await;
    std::fs::write(&table, &good.1).unwrap();
    // An address that is somebody else's.
    let taken = tokio::net::TcpListener::bind((world.dispatcher.ip, 3799))
        .await
        .unwrap();
    settings(&|settings| settings["dispatch"]["admin"] = json!(taken.local_addr().unwrap()));
    // WebSockets that are opened meanwhile are the old one's.
    let mut opened = Vec::new();
    tokio::select! {
        failures = refused("the new process ended before it served (exit status: 1)") => assert_eq!(failures, 3),
        () = async {
            loop {
                opened.push(socket(&world, &session).await);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        } => {}
    }
    assert!(opened.len() > 20, "{}", opened.len());
    for socket in &mut opened {
        echo(socket, "mine").await;
    }
    drop(opened);
    world
        .dispatcher
        .wait_for_log("not-serving error=\"cannot listen on ")
        .await;
    drop(taken);
    std::fs::write(&conf, &good.0).unwrap();
    assert!(world.dispatcher.child.try_wait().unwrap().is_none());
    assert!(world.dispatcher.logged("upgrade-failed serving=on").len() == 1);
    echo(&mut held, "still here").await;
    assert_eq!(
        world.dispatcher.navigate("alice", &session).await.status,
        200
    );
    // And the next one that can serve takes over.
    let successor = Successor::of(&conf).await;
    assert_eq!(
        world.dispatcher.navigate("alice", &session).await.status,
        200
    );
    echo(&mut held, "still the same").await;
    close(held).await;
    assert!(world.dispatcher.exited().await.success());
    assert!(successor.is_alive());
}

/// A new process that dies in its first seconds, after it had the sockets, takes nothing with it.
#[tokio::test]
async fn a_new_process_that_dies_at_once_changes_nothing() {
    let mut world = World::new().await;
    let session = world.alice.new_session();
    let conf = world.base().join("t3-dispatch.yaml");
    // A stand-in for the new process: it takes the sockets, says that it serves, and is gone.
    let taker = tokio::net::UnixListener::bind(world.base().join("upgrade.sock")).unwrap();
    world.dispatcher.signal(Signal::QUIT);
    let (mut sockets, _) = taker.accept().await.unwrap();
    let mut addresses = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut sockets, &mut addresses)
        .await
        .unwrap();
    assert!(
        addresses.contains(&world.dispatcher.address().to_string()),
        "{addresses}"
    );
    let control = world.base().join("upgrade.sock.control");
    let mut word = tokio::net::UnixStream::connect(control).await.unwrap();
    word.write_all(b"ready 4711\n").await.unwrap();
    drop(word);
    world
        .dispatcher
        .wait_for_log("upgrade-failed serving=on error=\"the new process was gone again")
        .await;
    assert_eq!(
        world.dispatcher.navigate("alice", &session).await.status,
        200
    );
    assert!(world.dispatcher.child.try_wait().unwrap().is_none());
    let _successor = Successor::of(&conf).await;
    assert!(world.dispatcher.exited().await.success());
}

#[tokio::test]
async fn nobody_there_to_reload_is_told() {
    let base = TempDir::new().unwrap();
    let conf = Setup::new(base.path(), vec!["/bin/true".into()]).write();
    let (taken, said) = reload(&conf).await;
    assert!(!taken);
    assert!(
        said.contains("no t3-dispatch listens at") && said.contains("upgrade.sock.control"),
        "{said}"
    );
}

/// Changed settings are in force, and a process that was replaced still follows the table.
#[tokio::test]
async fn a_replaced_process_still_follows_the_table() {
    let mut world = World::new().await;
    let session = world.alice.new_session();
    let mut held = socket(&world, &session).await;
    let conf = world.base().join("t3-dispatch.yaml");
    let mut settings: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&conf).unwrap()).unwrap();
    settings["dispatch"]["identity"] = json!({ "header": "Remote-User" });
    std::fs::write(&conf, settings.to_string()).unwrap();
    let _successor = Successor::of(&conf).await;
    assert_eq!(world.dispatcher.get("alice", "/", &[]).await.status, 403);
    let headers = [("Remote-User", "alice"), ("Cookie", session.as_str())];
    let reply = http::request(world.dispatcher.address(), "GET", "/", &headers, b"")
        .await
        .unwrap();
    assert_eq!(reply.status, 200);
    // Alice loses her instance: the old process, which has her socket, ends it.
    world.dispatcher.write_table(&json!({}));
    assert_eq!(Frame::read(&mut held).await.unwrap(), Frame::close(1008));
    assert!(world.dispatcher.exited().await.success());
}

#[tokio::test]
async fn sigterm_ends_a_replaced_process_too() {
    let mut world = World::new().await;
    let session = world.alice.new_session();
    let mut held = socket(&world, &session).await;
    let _successor = Successor::of(&world.base().join("t3-dispatch.yaml")).await;
    world.dispatcher.signal(Signal::TERM);
    assert_eq!(Frame::read(&mut held).await.unwrap(), Frame::close(1001));
    assert!(world.dispatcher.exited().await.success());
    assert_eq!(
        world.dispatcher.wait_for_records(1).await[0]["cause"],
        "dispatch_shutdown"
    );
}

#[tokio::test]
async fn a_replaced_process_leaves_at_its_limit() {
    let mut world = World::with(|setup| setup.set("tunnels.drain_limit", "5s")).await;
    let session = world.alice.new_session();
    let mut held = socket(&world, &session).await;
    let _successor = Successor::of(&world.base().join("t3-dispatch.yaml")).await;
    echo(&mut held, "still here").await;
    assert_eq!(Frame::read(&mut held).await.unwrap(), Frame::close(1001));
    assert!(world.dispatcher.exited().await.success());
}

/// One person's traffic on a socket: numbered messages, each of which must come back in its order.
async fn talk(mut stream: TcpStream, done: Arc<AtomicBool>, number: usize) -> usize {
    let mut count = 0;
    loop {
        echo(&mut stream, &format!("{number}: message {count}")).await;
        count += 1;
        if done.load(Ordering::Relaxed) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    close(stream).await;
    count
}

/// Five hundred sockets with traffic, requests all the while on kept and on new connections, a table that changes every
/// second, and three upgrades: nothing lost, nothing reordered, and every record at the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_sockets_across_three_upgrades() {
    const SOCKETS: usize = 500;
    let base = TempDir::new().unwrap();
    let alice = Instance::start(&mint::home(base.path(), "alice"), Version::V0_0_24).await;
    let setup =
        Setup::new(base.path(), mint::working(base.path())).user("alice", "alice", alice.port());
    let mut dispatcher: Dispatcher = setup.start().await;
    let conf = base.path().join("t3-dispatch.yaml");
    let session = alice.new_session();
    let (address, done) = (dispatcher.address(), Arc::new(AtomicBool::new(false)));
    let mut talks = tokio::task::JoinSet::new();
    let mut successors = Vec::new();
    for part in 0..4 {
        for number in 0..SOCKETS / 4 {
            let (status, client) = ask(address, "alice", &[("Cookie", &session)]).await;
            assert_eq!(status, 101);
            talks.spawn(talk(client.stream, done.clone(), part * 1000 + number));
        }
        if part == 0 {
            let (done, session, port) = (done.clone(), session.clone(), alice.port());
            let requests = Arc::new(AtomicUsize::new(0));
            for kept in [true, false] {
                let (done, session, requests) = (done.clone(), session.clone(), requests.clone());
                talks.spawn(async move {
                    let headers = from("alice", &session);
                    let mut client = http::Client::connect(address).await.unwrap();
                    while !done.load(Ordering::Relaxed) {
                        let reply = client
                            .request("POST", "/__test/echo", &headers, b"x")
                            .await
                            .unwrap();
                        assert_eq!((reply.status, reply.body.as_slice()), (200, &b"x"[..]));
                        requests.fetch_add(1, Ordering::Relaxed);
                        if !kept || reply.get("connection") == Some("close") {
                            client = http::Client::connect(address).await.unwrap();
                        }
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    requests.load(Ordering::Relaxed)
                });
            }
            let file = base.path().to_owned();
            talks.spawn(async move {
                let mut swaps = 0;
                while !done.load(Ordering::Relaxed) {
                    let table = json!({
                        "alice": { "os_user": "alice", "port": port },
                        format!("user{swaps}"): { "os_user": "bob", "port": 1 },
                    });
                    std::fs::write(file.join("dispatch.json.new"), table.to_string()).unwrap();
                    std::fs::rename(file.join("dispatch.json.new"), file.join("dispatch.json"))
                        .unwrap();
                    swaps += 1;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                swaps
            });
        }
        if part < 3 {
            successors.push(Successor::of(&conf).await);
        }
    }
    done.store(true, Ordering::Relaxed);
    let counts = talks.join_all().await;
    assert!(counts.iter().all(|count| *count > 0));
    let records = dispatcher.wait_for_records(SOCKETS).await;
    assert!(records.iter().all(|record| record["cause"] == "graceful"));
    assert!(dispatcher.exited().await.success());
    for successor in &successors[..2] {
        successor.gone().await;
    }
    assert!(test_kill_process(successors[2].0).is_ok());
}

/// What systemd is told (sd_notify(3)): that the service is ready, which process is the main one by now, and that it ends.
#[tokio::test]
async fn systemd_is_kept_informed() {
    let base = TempDir::new().unwrap();
    let setup = Setup::new(base.path(), mint::working(base.path()));
    let systemd = tokio::net::UnixDatagram::bind(base.path().join("notify")).unwrap();
    let told = async || {
        let mut text = vec![0; 200];
        let length = tokio::time::timeout(Duration::from_secs(20), systemd.recv(&mut text))
            .await
            .unwrap()
            .unwrap();
        String::from_utf8_lossy(&text[..length]).into_owned()
    };
    let conf = setup.write();
    let mut command = program();
    command
        .args(["serve", "-c"])
        .arg(&conf)
        .env("NOTIFY_SOCKET", base.path().join("notify"));
    let mut first = command.spawn().unwrap();
    assert_eq!(told().await, "READY=1\n");
    let successor = Successor::of(&conf).await;
    // The new process says so itself as well, which systemd does not take from it and does not need.
    let said = [told().await, told().await];
    assert!(
        said.contains(&format!("MAINPID={}\n", successor.0.as_raw_nonzero())),
        "{said:?}"
    );
    kill_process(successor.0, Signal::TERM).unwrap();
    assert_eq!(told().await, "STOPPING=1\n");
    successor.gone().await;
    first.wait().unwrap();
}

/// In the background, the file with the process ID names the newest process.
#[tokio::test]
async fn the_pid_file_follows() {
    let base = TempDir::new().unwrap();
    let mut setup = Setup::new(base.path(), mint::working(base.path()));
    setup.top["error_log"] = json!(base.path().join("error.log"));
    let conf = setup.write();
    let mut command = program();
    command.args(["serve", "-d", "-c"]).arg(&conf);
    assert!(
        tokio::task::spawn_blocking(move || command.status().unwrap())
            .await
            .unwrap()
            .success()
    );
    wait_for("control socket", async || {
        base.path().join("upgrade.sock.control").exists()
    })
    .await;
    let pid = || {
        let pid = std::fs::read_to_string(base.path().join("pid")).unwrap();
        Pid::from_raw(pid.trim().parse().unwrap()).unwrap()
    };
    let first = Successor(pid());
    let second = Successor::of(&conf).await;
    wait_for("the newest process ID", async || pid() == second.0).await;
    first.gone().await;
    assert!(second.is_alive());
}

/// A new program in the place of the old one, as a package brings it, is what takes over.
#[tokio::test]
async fn a_new_program_takes_over() {
    let base = TempDir::new().unwrap();
    let installed = base.path().join("t3-dispatch");
    let install = || {
        let new = base.path().join("t3-dispatch.new");
        std::fs::copy(env!("CARGO_BIN_EXE_t3-dispatch"), &new).unwrap();
        std::fs::rename(new, &installed).unwrap();
    };
    install();
    let setup = Setup::new(base.path(), mint::working(base.path()));
    let address = (setup.ip, 3780).into();
    let conf = setup.write();
    let mut first = std::process::Command::new(&installed)
        .args(["serve", "-c"])
        .arg(&conf)
        .spawn()
        .unwrap();
    wait_for("control socket", async || {
        base.path().join("upgrade.sock.control").exists()
    })
    .await;
    let program_of = |pid: u32| {
        std::fs::read_link(format!("/proc/{pid}/exe"))
            .unwrap()
            .display()
            .to_string()
    };
    install();
    assert!(program_of(first.id()).ends_with(" (deleted)"));
    let successor = Successor::of(&conf).await;
    assert_eq!(
        program_of(successor.0.as_raw_nonzero().get() as u32),
        installed.display().to_string()
    );
    assert_eq!(
        http::request(address, "GET", "/healthz", &[], b"")
            .await
            .unwrap()
            .status,
        200
    );
    assert!(
        tokio::task::spawn_blocking(move || first.wait().unwrap())
            .await
            .unwrap()
            .success()
    );
}

/// A Unix socket whose file is gone cannot be handed over, nor one be made where there is no folder: the old process serves
/// on, and the command says so at once.
#[tokio::test]
async fn a_socket_that_cannot_be_taken_over_changes_nothing() {
    let mut socket = std::path::PathBuf::new();
    let world = World::with(|setup| {
        socket = setup.base.join("http.sock");
        let tcp = setup.dispatch["listen"][0].clone();
        setup.set("listen", json!([tcp, format!("unix:{}", socket.display())]))
    })
    .await;
    let conf = world.base().join("t3-dispatch.yaml");
    let good = std::fs::read_to_string(&conf).unwrap();
    for gone in [true, false] {
        if gone {
            std::fs::remove_file(&socket).unwrap();
        } else {
            let elsewhere = world.base().join("nowhere/http.sock").display().to_string();
            let text = good.replace(&socket.display().to_string(), &elsewhere);
            std::fs::write(&conf, text).unwrap();
        }
        let (taken, said) = reload(&conf).await;
        assert!(!taken && said.contains("ended before it served"), "{said}");
        let reply = world.dispatcher.get("alice", "/healthz", &[]).await;
        assert_eq!(reply.status, 200);
    }
}

/// Who is ended while it hands over leaves no half-made successor behind.
#[tokio::test]
async fn sigterm_during_a_handover_ends_both() {
    let mut world = World::new().await;
    let conf = world.base().join("t3-dispatch.yaml");
    let asking = tokio::spawn(async move { reload(&conf).await });
    // The new process has the sockets and is on probation.
    wait_for("start of the new process", async || {
        std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            line.contains("serve --upgrade") && line.contains(&world.base().display().to_string())
        })
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    world.dispatcher.signal(Signal::TERM);
    assert!(world.dispatcher.exited().await.success());
    assert!(!asking.await.unwrap().0);
    let address = world.dispatcher.address();
    wait_for("end of the new process", async || {
        http::Client::connect(address).await.is_err()
    })
    .await;
}

/// Whoever asks for an upgrade while there is no descriptor to listen with waits until there is one.
#[tokio::test]
async fn an_upgrade_that_is_asked_for_without_descriptors_comes_later() {
    let world = World::new().await;
    let conf = world.base().join("t3-dispatch.yaml");
    // What is still closed from the start would leave one free.
    wait_for("descriptors at rest", async || {
        let open = world.dispatcher.descriptors();
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if world.dispatcher.descriptors() != open {
                return false;
            }
        }
        true
    })
    .await;
    world.dispatcher.allow_descriptors(false);
    let mut asking = UnixStream::connect(world.base().join("upgrade.sock.control"))
        .await
        .unwrap();
    asking.write_all(b"anything else\n").await.unwrap();
    let mut answer = [0];
    let answered = tokio::time::timeout(Duration::from_millis(500), asking.read(&mut answer));
    assert!(answered.await.is_err(), "nobody listens any more");
    world.dispatcher.allow_descriptors(true);
    assert_eq!(asking.read(&mut answer).await.unwrap(), 0);
    Successor::of(&conf).await;
}
