//! Replacing the dispatcher by another process.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use super::dispatcher::{program, wait_for};

/// What `t3-dispatch reload` said, and whether it was content.
pub async fn reload(conf: &Path) -> (bool, String) {
    let mut command = program();
    command.args(["reload", "-c"]).arg(conf);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    let said =
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.success(), said)
}

/// The process that has taken over, which is nobody's child here. Dropping it kills it.
pub struct Successor(pub Pid);

impl Successor {
    pub async fn of(conf: &Path) -> Successor {
        let (taken, said) = reload(conf).await;
        assert!(taken, "{said}");
        let pid = said
            .split_whitespace()
            .nth(1)
            .and_then(|pid| pid.parse().ok())
            .and_then(Pid::from_raw);
        Successor(pid.unwrap_or_else(|| panic!("{said}")))
    }

    pub fn is_alive(&self) -> bool {
        let path = format!("/proc/{}/stat", self.0.as_raw_nonzero());
        let stat = std::fs::read_to_string(path).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    }

    pub async fn gone(&self) {
        wait_for("end of the process", async || !self.is_alive()).await;
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}
