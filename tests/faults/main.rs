//! Faults, one by one and together, while two hundred people work. Who may see what is written in `docs/reliability.md`;
//! nobody else sees anything, and nothing is left behind.

#[path = "../common/mod.rs"]
mod common;
mod crowd;
mod world;

use std::time::{Duration, Instant};

use common::dispatcher::wait_for;
use common::http::Client;
use world::{Fault, World};

/// People at work.
const SIZE: usize = 200;

#[tokio::test(flavor = "multi_thread")]
async fn only_those_who_are_struck_see_a_fault() {
    let mut world = World::new(SIZE).await;
    // Everything has been used once before it is counted.
    let shift = world.crowd.work();
    world.everybody_is_well_since(Instant::now()).await;
    world.go_through(&[Fault::Killed, Fault::Mint]).await;
    shift.end().await;
    let descriptors = world.descriptors_at_rest().await;
    let memory = world.dispatcher.memory();
    eprintln!("at rest {descriptors} descriptors, {memory} KiB");
    full_but_not_spinning(&world).await;

    let shift = world.crowd.work();
    world.everybody_is_well_since(Instant::now()).await;
    for fault in Fault::ALL {
        world.go_through(&[fault]).await;
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
