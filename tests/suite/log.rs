//! The log is for whoever reads it, and holds up nobody else.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::timeout;

use crate::common::dispatcher::{Setup, program, wait_for};
use crate::common::http::Client;
use crate::common::mint;

#[tokio::test]
async fn a_log_that_nobody_reads_holds_nobody_up() {
    let base = TempDir::new().unwrap();
    let setup = Setup::new(base.path(), mint::working(base.path()));
    let address = (setup.ip, 3780).into();
    let mut child = program()
        .args(["serve", "-c"])
        .arg(setup.write())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("connection", async || {
        Client::connect(address).await.is_ok()
    })
    .await;
    let mut client = Client::connect(address).await.unwrap();
    // Each leaves a line, and the pipe holds 64 KiB.
    let refused = async |client: &mut Client| {
        let reply = client.request("GET", "/", &[], b"");
        let reply = timeout(Duration::from_secs(20), reply).await;
        assert_eq!(reply.expect("an answer").unwrap().status, 403);
    };
    for _ in 0..3_000 {
        refused(&mut client).await;
    }
    let read = BufReader::new(child.stderr.take().unwrap());
    let reading = tokio::task::spawn_blocking(|| {
        let mut lines = read.lines().map(Result::unwrap);
        let kept = lines.by_ref().take_while(|line| !line.contains("log-lost"));
        let refused = kept.filter(|line| line.contains(" refused ")).count();
        (refused, lines.next())
    });
    while !reading.is_finished() {
        refused(&mut client).await;
    }
    let (kept, next) = reading.await.unwrap();
    assert!((300..3_000).contains(&kept), "{kept}");
    assert!(next.unwrap().contains(" refused code=unknown-user "));
    child.kill().unwrap();
    child.wait().unwrap();
}
