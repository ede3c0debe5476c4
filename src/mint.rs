//! Minting, by a command or at a socket. A command is run as a process of its own, bounded in time and output, and never
//! left behind. Behind a socket is a `t3-mint --socket`: it gets a line with the OS user, and answers with what `t3` prints
//! and a last line `exit STATUS`. An answer without that line was cut short and counts for nothing.

use std::fmt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rustix::process::Pid;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use crate::config::{Mint, Pairing};
use crate::events;

/// Most that may be printed by a mint.
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
    /// The command could not be run, the socket not be reached; or it failed, or took too long.
    #[error("the mint {0}")]
    Failed(String),
    /// It printed something else than JSON with a credential.
    #[error("the mint printed {0}")]
    Unparseable(&'static str),
}

/// Mints for `os_user`; what a command writes to standard error goes to `complaints`.
///
/// # Errors
/// When the command cannot be run or the socket not be reached, and when it fails, takes too long, or prints no credential.
pub async fn mint(
    settings: &Pairing,
    os_user: &str,
    complaints: Stdio,
) -> Result<Credential, MintError> {
    let start = Instant::now();
    let limit = settings.mint_timeout;
    let output = match &settings.mint {
        Mint::Command(command) => run(command, limit, os_user, complaints).await,
        Mint::Socket(path) => ask(path, limit, os_user).await,
    };
    events::minted(start.elapsed());
    read_credential(&output?)
}

/// The credential in what a mint printed.
///
/// # Errors
/// When there is none.
pub fn read_credential(output: &[u8]) -> Result<Credential, MintError> {
    let answer = serde_json::from_slice::<Value>(output)
        .map_err(|_| MintError::Unparseable("something else than JSON"))?;
    match answer.get("credential") {
        Some(Value::String(credential)) if !credential.is_empty() => {
            Ok(Credential(credential.clone()))
        }
        _ => Err(MintError::Unparseable("JSON without a credential")),
    }
}

/// Everything that the mint behind the socket printed.
async fn ask(path: &Path, limit: Duration, os_user: &str) -> Result<BytesMut, MintError> {
    let failed = |what: String| MintError::Failed(format!("socket {} {what}", path.display()));
    let asking = async {
        let unreachable =
            "cannot be reached: is t3-mint.socket running, and may this process write to it";
        let mut stream = UnixStream::connect(path)
            .await
            .map_err(|error| failed(format!("{unreachable}? ({error})")))?;
        let broken = |error| {
            failed(format!(
                "broke off: {error}; `journalctl -t t3-mint` may tell why"
            ))
        };
        let line = format!("{os_user}\n");
        // A mint that refuses may have answered and closed before it has read this. What it has said still counts.
        let mut fault = stream.write_all(line.as_bytes()).await.err();
        let mut output = BytesMut::new();
        loop {
            match stream.read_buf(&mut output).await {
                Ok(0) => break,
                Ok(_) if output.len() > OUTPUT_LIMIT => {
                    return Err(MintError::Unparseable("more than 64 KiB"));
                }
                Ok(_) => {}
                Err(error) => {
                    fault.get_or_insert(error);
                    break;
                }
            }
        }
        match last_line(&output) {
            Some((end, 0)) => {
                output.truncate(end);
                Ok(output)
            }
            Some((_, 5)) => Err(failed(
                "takes this process for somebody else than `service_user` of /etc/t3-serve/mint.json (exit status 5)".into(),
            )),
            Some((_, status)) => Err(failed(format!(
                "answered exit status {status}: `journalctl -t t3-mint` tells why"
            ))),
            None => Err(fault.map_or_else(
                || failed("broke off before the end: `journalctl -t t3-mint` may tell why".into()),
                broken,
            )),
        }
    };
    tokio::time::timeout(limit, asking)
        .await
        .unwrap_or_else(|_| Err(failed(format!("took more than {limit:?}"))))
}

/// Where the last line of a socket's whole answer begins, and the exit status in it.
pub fn last_line(answer: &[u8]) -> Option<(usize, u8)> {
    let lines = answer.strip_suffix(b"\n")?;
    let end = lines.iter().rposition(|byte| *byte == b'\n')?;
    let status = lines[end + 1..].strip_prefix(b"exit ")?;
    Some((end, str::from_utf8(status).ok()?.parse().ok()?))
}

async fn run(
    command: &[String],
    limit: Duration,
    os_user: &str,
    complaints: Stdio,
) -> Result<BytesMut, MintError> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| MintError::Failed("command is not set".into()))?;
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
        .map_err(|error| MintError::Failed(format!("command could not be started: {error}")))?;
    let mut group = Group::of(&child);
    let (output, closed) = tokio::time::timeout(limit, collect(&mut child))
        .await
        .unwrap_or_else(|_| {
            Err(MintError::Failed(format!(
                "command ran for more than {limit:?}"
            )))
        })?;
    if closed {
        group.forget();
    }
    Ok(output)
}

/// Everything the command printed, and whether it closed its output.
async fn collect(child: &mut Child) -> Result<(BytesMut, bool), MintError> {
    let failed = |error: std::io::Error| {
        MintError::Failed(format!("command could not be followed: {error}"))
    };
    let mut output = BytesMut::new();
    let mut stdout = child
        .stdout
        .take()
        .ok_or_else(|| MintError::Failed("command has no output".into()))?;
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
        Err(MintError::Failed(format!("command failed: {status}")))
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

/// Why nothing can be minted, if that can be told without minting: a command that cannot be run, under sudo also the one
/// that sudo is to run, or a socket that is not there or may not be written to.
pub fn mint_fault(mint: &Mint) -> Option<String> {
    match mint {
        Mint::Command(command) => command_fault(command),
        Mint::Socket(path) => socket_fault(path),
    }
}

fn socket_fault(path: &Path) -> Option<String> {
    // To connect would start a mint.
    let fault = match std::fs::metadata(path) {
        Err(error) => format!("{error}; `systemctl enable --now t3-mint.socket` makes it"),
        Ok(meta) if !meta.file_type().is_socket() => "is not a socket".into(),
        Ok(_) => {
            let error = rustix::fs::access(path, rustix::fs::Access::WRITE_OK).err()?;
            format!("{error}; the group of the socket must be this process's")
        }
    };
    Some(format!("{}: {fault}", path.display()))
}

fn command_fault(mint: &[String]) -> Option<String> {
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

#[cfg(test)]
mod tests {
    use super::last_line;

    #[test]
    fn only_a_whole_answer_has_a_status() {
        let whole = b"{}\n\nexit 0\n";
        assert_eq!(last_line(whole), Some((3, 0)));
        for cut in 0..whole.len() {
            assert_eq!(last_line(&whole[..cut]), None, "{cut}");
        }
        assert_eq!(last_line(b"\nexit 124\n"), Some((0, 124)));
        for broken in [
            "exit 0\n",
            "\nexit 256\n",
            "\nexit \n",
            "\nexit 0 \n",
            "\nexit 0\n\n",
        ] {
            assert_eq!(last_line(broken.as_bytes()), None, "{broken:?}");
        }
    }
}
