//! Faults, one by one and together, while two hundred people work. Who may see what is written in `docs/reliability.md`;
//! nobody else sees anything, and nothing is left behind.

#[path = "../common/mod.rs"]
mod common;
mod crowd;
mod world;

use std::time::{Duration, Instant};

use common::dispatcher::wait_for;
use common::http::{self, Client};
use crowd::PATIENCE;
use world::{Fault, World};

/// People at work.
const SIZE: usize = 200;

#[tokio::test(flavor = "multi_thread")]
async fn only_those_who_are_struck_see_a_fault() {
    let mut world = World::new(SIZE).await;
    // Everything has been used once before it is counted.
    let shift = world.crowd.work();
    world.everybody_is_well_since(Instant::now()).await;
    let (first, others) = Fault::ALL.split_at(2);
    for fault in first {
        world.go_through(&[*fault]).await;
    }
    shift.end().await;
    let descriptors = world.descriptors_at_rest().await;
    let memory = world.dispatcher.memory();
    eprintln!("at rest {descriptors} descriptors, {memory} KiB");
    full_but_not_spinning(&world).await;

    let shift = world.crowd.work();
    world.everybody_is_well_since(Instant::now()).await;
    for fault in others {
        world.go_through(&[*fault]).await;
    }
    let together: Vec<Fault> = Fault::ALL
        .into_iter()
        .filter(|fault| fault.goes_with_others())
        .collect();
    world.go_through(&together).await;
    shift.end().await;

    world.look_back().await;
    wait_for("return to the descriptors before", async || {
        world.descriptors() == descriptors
    })
    .await;
    wait_for("return to the memory before", async || {
        world.dispatcher.memory() < memory * 3 / 2
    })
    .await;
    eprintln!(
        "at rest again {} descriptors, {} KiB",
        world.descriptors(),
        world.dispatcher.memory()
    );
}

/// Without a descriptor left for the clients that wait, the process does not run in circles, and answers them later.
async fn full_but_not_spinning(world: &World) {
    world.dispatcher.allow_descriptors(false);
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        client
            .send("GET /healthz HTTP/1.1\r\nHost: t3.example.com\r\n\r\n")
            .await
            .unwrap();
        waiting.push(client);
    }
    world.dispatcher.wait_for_log("Accept() failed").await;
    let (cpu, then) = (world.cpu(), Instant::now());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = world.cpu() - cpu;
    assert!(used < then.elapsed() / 4, "{used:?} of CPU");
    world.dispatcher.allow_descriptors(true);
    for mut client in waiting {
        assert_eq!(client.read_reply("GET").await.unwrap().status, 200);
    }
}

/// What may be under way at one instance: three quarters of the connections that the settings allow.
const MOST: usize = world::CONNECTIONS / 4 * 3;

/// What one person can keep with an instance that hangs is bounded, and given back when they leave.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_hangs_leaves_room_for_others() {
    let world = World::new(2).await;
    let [alice, bob] = [0, 1].map(|number| world.crowd.people[number].clone());
    let headers = [
        ("X-authentik-username", alice.name.as_str()),
        ("Cookie", alice.cookie.as_str()),
    ];
    let asked = http::request(world.dispatcher.address(), "GET", "/", &headers, b"");
    assert_eq!(asked.await.unwrap().status, 200);
    world.descriptors_at_rest().await;
    let sockets = world.sockets();
    world.crowd.instance(0).set(|vices| vices.silent = true);
    let mut hanging = Vec::new();
    for _ in 0..MOST {
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        client
            .send(http::head("GET", "/", &headers, 0))
            .await
            .unwrap();
        hanging.push(client);
    }
    wait_for("as many requests that hang", async || {
        world.sockets() >= sockets + 2 * MOST
    })
    .await;
    let asked = http::request(world.dispatcher.address(), "GET", "/", &headers, b"");
    let refused = tokio::time::timeout(PATIENCE, asked)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(refused.get("x-t3-dispatch-error"), Some("instance-busy"));
    let answered = world.dispatcher.navigate(&bob.name, &bob.cookie).await;
    assert_eq!(answered.status, 200);
    drop(hanging);
    wait_for("return to the sockets before", async || {
        world.sockets() == sockets
    })
    .await;
    world.crowd.instance(0).set(|vices| vices.silent = false);
    let answered = world.dispatcher.navigate(&alice.name, &alice.cookie).await;
    assert_eq!(answered.status, 200);
}
