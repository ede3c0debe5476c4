//! The mint command: run as a process of its own, bounded in time and output, and never left behind.

use std::fmt;
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rustix::process::Pid;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};

use crate::config::Pairing;
use crate::events;

/// Most that a mint command may print.
const OUTPUT_LIMIT: usize = 64 * 1024;

/// How long the output may stay open after the mint command has ended, held by a child that it left behind.
const LEFT_OPEN: Duration = Duration::from_millis(100);

/// A pairing credential. It is worth a session, so it shows itself to nobody.
pub struct Credential(String);

impl Credential {
    /// The credential itself, for the instance alone.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(…)")
    }
}

/// Why there is no credential.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MintError {
    /// The command could not be run, failed, or ran for too long.
    #[error("the mint command {0}")]
    Failed(String),
    /// It printed something else than JSON with a credential.
    #[error("the mint command printed {0}")]
    Unparseable(&'static str),
}

/// Runs the mint command for `os_user`; what it writes to standard error goes to `complaints`.
///
/// # Errors
/// When it cannot be run, fails, takes too long, or prints no credential.
pub async fn mint(
    settings: &Pairing,
    os_user: &str,
    complaints: Stdio,
) -> Result<Credential, MintError> {
    let start = Instant::now();
    let output = run(settings, os_user, complaints).await;
    events::minted(start.elapsed());
    let answer = serde_json::from_slice::<Value>(&output?)
        .map_err(|_| MintError::Unparseable("something else than JSON"))?;
    match answer.get("credential") {
        Some(Value::String(credential)) if !credential.is_empty() => {
            Ok(Credential(credential.clone()))
        }
        _ => Err(MintError::Unparseable("JSON without a credential")),
    }
}

async fn run(settings: &Pairing, os_user: &str, complaints: Stdio) -> Result<BytesMut, MintError> {
    let (program, arguments) = settings
        .mint
        .split_first()
        .ok_or_else(|| MintError::Failed("is not set".into()))?;
    let mut child = Command::new(program)
        .args(arguments)
        .arg(os_user)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(complaints)
        // A group of its own, so that whatever it starts can be ended with it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| MintError::Failed(format!("could not be started: {error}")))?;
    let mut group = Group::of(&child);
    let limit = settings.mint_timeout;
    let (output, closed) = tokio::time::timeout(limit, collect(&mut child))
        .await
        .unwrap_or_else(|_| Err(MintError::Failed(format!("ran for more than {limit:?}"))))?;
    if closed {
        group.forget();
    }
    Ok(output)
}

/// Everything the command printed, and whether it closed its output.
async fn collect(child: &mut Child) -> Result<(BytesMut, bool), MintError> {
    let failed =
        |error: std::io::Error| MintError::Failed(format!("could not be followed: {error}"));
    let mut output = BytesMut::new();
    let mut stdout = child
        .stdout
        .take()
        .ok_or_else(|| MintError::Failed("has no output".into()))?;
    let mut status = None;
    let mut closed = false;
    while !closed {
        tokio::select! {
            read = stdout.read_buf(&mut output) => {
                closed = read.map_err(failed)? == 0;
                if output.len() > OUTPUT_LIMIT {
                    return Err(MintError::Unparseable("more than 64 KiB"));
                }
            }
            ended = child.wait(), if status.is_none() => status = Some(ended.map_err(failed)?),
            // A child that was left behind holds the output open. What the command itself printed is read by now.
            () = tokio::time::sleep(LEFT_OPEN), if status.is_some() => break,
        }
    }
    let status = match status {
        Some(status) => status,
        None => child.wait().await.map_err(failed)?,
    };
    if status.success() {
        Ok((output, closed))
    } else {
        Err(MintError::Failed(format!("failed: {status}")))
    }
}

/// The process groups of the mint commands that run, to be ended with this process.
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// The process group of a mint command. Dropping it ends whatever is left of it, unless it is known to be empty.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Group {
        let pid = child
            .id()
            .and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        RUNNING
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(pid);
        Group(pid)
    }

    /// Takes note that no process of the group is left, so that its number may belong to others by now.
    fn forget(&mut self) -> Option<Pid> {
        let group = self.0.take()?;
        RUNNING
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|running| *running != group);
        Some(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.forget() {
            kill(group);
        }
    }
}

fn kill(group: Pid) {
    // Under sudo the group belongs to root and cannot be killed from here; `t3-mint` ends itself in time.
    let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
}

/// Ends every mint command that runs. The process is about to exit.
pub fn end_mints() {
    RUNNING
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .drain(..)
        .for_each(kill);
}

/// Why the mint command cannot be run, if that can be told without running it. Under sudo the command that sudo is to
/// run is looked at too.
pub fn mint_fault(mint: &[String]) -> Option<String> {
    let program = mint.first()?;
    let under_sudo = std::path::Path::new(program)
        .file_name()
        .is_some_and(|name| name == "sudo");
    let inner = mint[1..]
        .iter()
        .find(|word| !word.starts_with('-'))
        .filter(|_| under_sudo);
    std::iter::once(program)
        .chain(inner)
        .find_map(|program| not_executable(program))
}

fn not_executable(program: &str) -> Option<String> {
    let executable = |path: &std::path::Path| -> rustix::io::Result<()> {
        if path.is_dir() {
            return Err(rustix::io::Errno::ISDIR);
        }
        rustix::fs::access(path, rustix::fs::Access::EXEC_OK)
    };
    if program.contains('/') {
        return executable(program.as_ref())
            .err()
            .map(|error| format!("{program}: {error}"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).any(|folder| executable(&folder.join(program)).is_ok());
    (!found).then(|| format!("{program}: not found in PATH"))
}
