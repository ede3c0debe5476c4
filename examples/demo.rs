//! The whole journey on one machine, with nothing else installed: `cargo run --release --example demo`.
//!
//! Stand-in instances for alice (speaking 0.0.33) and bob (speaking 0.0.24), a stand-in sign-on edge that signs you in by
//! the host name you open, a mint command, and the real dispatcher as a process of its own.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use serde_json::json;
use tokio::net::TcpListener;

#[path = "../tests/common/edge.rs"]
mod edge;
#[allow(dead_code)]
#[path = "../tests/common/frames.rs"]
mod frames;
#[allow(dead_code)]
#[path = "../tests/common/http.rs"]
mod http;
#[allow(dead_code)]
#[path = "../tests/common/instance.rs"]
mod instance;
#[allow(dead_code)]
#[path = "../tests/common/mint.rs"]
mod mint;

use instance::{Instance, Version};

/// Where the demo's edge listens, unless `DEMO_PORT` says otherwise.
const PORT: u16 = 8080;

fn main() -> ExitCode {
    // The dispatcher is this very program again, called as `demo serve -c FILE`.
    if std::env::args().nth(1).is_some_and(|word| word == "serve") {
        return t3_dispatch::cli::main();
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    match runtime.block_on(run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let port = std::env::var("DEMO_PORT").map_or(Ok(PORT), |port| port.parse())?;
    let edge = TcpListener::bind(("127.0.0.1", port))
        .await
        .map_err(|error| {
            format!("cannot listen on port {port}: {error}; choose another with DEMO_PORT=8081")
        })?;
    let port = edge.local_addr()?.port();
    let folder = tempfile::TempDir::new()?;
    let base = folder.path();
    let alice = Instance::start(&mint::home(base, "alice"), Version::V0_0_33).await;
    let bob = Instance::start(&mint::home(base, "bob"), Version::V0_0_24).await;
    let listen = free_address().await?;
    let settings = settings(
        base,
        listen,
        free_address().await?,
        &[("alice", &alice), ("bob", &bob)],
    )?;
    let mut dispatcher = tokio::process::Command::from(Command::new(std::env::current_exe()?))
        .args(["serve", "-c"])
        .arg(&settings)
        // Ctrl-C is for this program, which then ends that one.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    while tokio::net::TcpStream::connect(listen).await.is_err() {
        if let Some(status) = dispatcher.try_wait()? {
            return Err(format!("the dispatcher did not start: {status}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let edge = tokio::spawn(edge::serve(edge, listen));
    println!(
        "\nOpen one of these in a browser (the host name signs you in):\n\n  \
         http://alice.localhost:{port}/    alice, whose instance speaks 0.0.33\n  \
         http://bob.localhost:{port}/      bob, whose instance speaks 0.0.24\n  \
         http://mallory.localhost:{port}/  a stranger, who is turned away\n\n\
         The dispatcher listens on {listen}. Ctrl-C stops it all.\n"
    );
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
        status = dispatcher.wait() => return Err(format!("the dispatcher ended: {}", status?).into()),
    }
    edge.abort();
    let _ = dispatcher.kill().await;
    println!("\nStopped.");
    Ok(())
}

async fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0").await?.local_addr()
}

fn settings(
    base: &Path,
    listen: SocketAddr,
    admin: SocketAddr,
    people: &[(&str, &Instance)],
) -> std::io::Result<std::path::PathBuf> {
    let table: serde_json::Map<_, _> = people
        .iter()
        .map(|(name, instance)| {
            (
                (*name).to_owned(),
                json!({ "os_user": name, "port": instance.port() }),
            )
        })
        .collect();
    let table_file = base.join("dispatch.json");
    std::fs::write(&table_file, serde_json::Value::Object(table).to_string())?;
    let settings = json!({
        "upgrade_sock": base.join("upgrade.sock"),
        "pid_file": base.join("pid"),
        "dispatch": {
            "listen": [listen],
            "admin": admin,
            "table": table_file,
            "pairing": { "mint": mint::working(base) },
            "tunnels": { "ledger": base.join("closes.jsonl") },
        },
    });
    let file = base.join("t3-dispatch.yaml");
    std::fs::write(&file, settings.to_string())?;
    Ok(file)
}
