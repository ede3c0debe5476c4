//! Handing over to a new process without losing a socket, or staying when that fails.
//!
//! The old process starts the new one (or finds one waiting that an operator has started with `--upgrade`), sends it the
//! listening sockets in Pingora's own way, and goes on serving. Once the new process serves too it says so on the control
//! socket. If it is still there after a probation, the old one lets it take over: it stops accepting and keeps only what
//! it has. If anything goes wrong before that, nothing has happened. `docs/restarts.md` says why it is done like this.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora::server::{ListenFds, ShutdownWatch};
use pingora::services::{ServiceReadyNotifier, ServiceWithDependents};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::events;

/// How long a new process may take from its start until it serves.
const START: Duration = Duration::from_secs(30);

/// How long it must then stay alive before it takes over.
const PROBATION: Duration = Duration::from_secs(2);

/// How long a successor that is given up has to close what it took.
const GOODBYE: Duration = Duration::from_secs(3);

/// How long an address may take to be listened on before it is looked into.
const BIND: Duration = Duration::from_secs(2);

/// How often a thing that will come soon is looked for.
const LOOK: Duration = Duration::from_millis(20);

/// Why a new process did not take over.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// It could not be started, or not be reached.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It ended before it served; its own log says why.
    #[error("the new process ended before it served ({0}); the log says why")]
    Ended(ExitStatus),
    /// It did not serve in time.
    #[error("the new process did not serve within {START:?}")]
    Late,
    /// It served and was gone again.
    #[error("the new process was gone again within {PROBATION:?}")]
    Gone,
    /// An address is not to be had.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        error: io::Error,
    },
    /// There is nobody to hand over to.
    #[error("no process waits at {0} to take over: start one with --upgrade first")]
    Nobody(String),
}

/// What a process needs to know to hand over, and to be handed over to.
pub struct Handover {
    /// Pingora's socket for the transfer of listening sockets.
    pub upgrade_sock: String,
    /// The program and arguments that start a successor.
    pub successor: (PathBuf, Vec<OsString>),
    /// The addresses that are listened on.
    pub addresses: Vec<String>,
    /// The file that holds the process ID while in the background.
    pub pid_file: PathBuf,
    listeners: OnceLock<ListenFds>,
}

/// The control socket of the newest process.
pub fn control_path(upgrade_sock: &str) -> PathBuf {
    format!("{upgrade_sock}.control").into()
}

/// A message to the newest process, with the stream to answer on.
#[derive(Debug)]
pub enum Message {
    /// Somebody asks it to hand over.
    Upgrade(UnixStream),
    /// A successor serves; its process ID.
    Ready(u32, UnixStream),
}

impl Handover {
    /// A handover over `upgrade_sock`.
    pub fn new(
        upgrade_sock: String,
        successor: (PathBuf, Vec<OsString>),
        addresses: Vec<String>,
        pid_file: PathBuf,
    ) -> Arc<Handover> {
        Arc::new(Handover {
            upgrade_sock,
            successor,
            addresses,
            pid_file,
            listeners: OnceLock::new(),
        })
    }

    /// The addresses that are not listened on yet.
    fn missing(&self) -> Vec<&String> {
        let Some(listeners) = self.listeners.get() else {
            return self.addresses.iter().collect();
        };
        let listeners = listeners.lock();
        self.addresses
            .iter()
            .filter(|address| listeners.get(address).is_none())
            .collect()
    }

    /// Waits until this process listens everywhere.
    ///
    /// # Errors
    /// When an address is not to be had.
    pub async fn listening(&self) -> Result<(), UpgradeError> {
        let start = Instant::now();
        loop {
            let missing = self.missing();
            if missing.is_empty() {
                return Ok(());
            }
            // Pingora tries for half a minute, and then goes on without the address.
            if start.elapsed() > BIND && self.listeners.get().is_some() {
                for address in missing {
                    if let Err(error) = crate::listen::is_free(address)
                        && self.missing().contains(&address)
                    {
                        return Err(UpgradeError::Listen {
                            address: address.clone(),
                            error,
                        });
                    }
                }
            }
            sleep(LOOK).await;
        }
    }

    /// A process that was started to take over waits for its predecessor's word.
    ///
    /// # Errors
    /// When the predecessor does not give its word.
    pub async fn word(&self, upgrade: bool) -> Result<(), UpgradeError> {
        if !upgrade {
            return Ok(());
        }
        let mut old = UnixStream::connect(control_path(&self.upgrade_sock)).await?;
        old.write_all(format!("ready {}\n", std::process::id()).as_bytes())
            .await?;
        let mut word = String::new();
        BufReader::new(&mut old).read_line(&mut word).await?;
        // A process in the background has left its ID in a file, where the newest one's belongs.
        let predecessor = rustix::net::sockopt::socket_peercred(&old)
            .map_err(io::Error::from)?
            .pid
            .as_raw_nonzero()
            .to_string();
        if std::fs::read_to_string(&self.pid_file).is_ok_and(|pid| pid.trim() == predecessor) {
            // Renamed over the old one, so that at no moment it names nobody.
            let new = PathBuf::from(format!("{}.new", self.pid_file.display()));
            std::fs::write(&new, std::process::id().to_string())?;
            std::fs::rename(&new, &self.pid_file)?;
        }
        if word == "go\n" {
            Ok(())
        } else {
            Err(UpgradeError::Io(io::ErrorKind::ConnectionAborted.into()))
        }
    }

    /// Hands over to a process that waits for it, or else, where `start`, to one that it starts.
    ///
    /// # Errors
    /// When no process takes over; this one is then as it was.
    pub async fn hand_over(
        self: Arc<Handover>,
        start: bool,
        mut ready: mpsc::Receiver<(u32, UnixStream)>,
    ) -> Result<u32, UpgradeError> {
        let socket = PathBuf::from(&self.upgrade_sock);
        let mut child = None;
        if start {
            let _ = std::fs::remove_file(&socket);
            child = Some(self.start()?);
        } else if !socket.exists() {
            return Err(UpgradeError::Nobody(self.upgrade_sock.clone()));
        }
        let ended = async {
            match &mut child {
                Some(child) => child.wait().await,
                None => std::future::pending().await,
            }
        };
        let taken = async {
            while !socket.exists() {
                sleep(LOOK).await;
            }
            let handover = self.clone();
            let sent = tokio::task::spawn_blocking(move || match handover.listeners.get() {
                Some(listeners) => listeners
                    .lock()
                    .send_to_sock(handover.upgrade_sock.as_str())
                    .map_err(io::Error::from),
                None => Err(io::ErrorKind::NotConnected.into()),
            });
            sent.await.map_err(io::Error::other)??;
            let (pid, mut stream) = ready.recv().await.ok_or(UpgradeError::Late)?;
            // It says nothing more, so whatever comes now is its end.
            match timeout(PROBATION, stream.read_u8()).await {
                Err(_) => Ok((pid, stream)),
                Ok(_) => Err(UpgradeError::Gone),
            }
        };
        let result = tokio::select! {
            taken = timeout(START, taken) => taken.unwrap_or(Err(UpgradeError::Late)),
            status = ended => Err(UpgradeError::Ended(status?)),
        };
        match result {
            Ok((pid, mut stream)) => {
                if let Some(mut child) = child {
                    // It is our child but no longer our concern; it is reaped while we are there.
                    tokio::spawn(async move { child.wait().await });
                }
                stream.write_all(b"go\n").await?;
                Ok(pid)
            }
            Err(error) => {
                if let Some(mut child) = child {
                    end(&mut child).await;
                }
                let _ = std::fs::remove_file(&socket);
                Err(error)
            }
        }
    }

    fn start(&self) -> io::Result<Child> {
        let (program, arguments) = &self.successor;
        // A group of its own: what is typed at the terminal of this process is not meant for it.
        Command::new(program)
            .args(arguments)
            .process_group(0)
            // Whoever gives the handover up has it ended.
            .kill_on_drop(true)
            .spawn()
    }
}

/// Ends a successor that is not wanted any more. It may have taken connections already, and closes them in order.
async fn end(child: &mut Child) {
    let pid = child
        .id()
        .and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
    if let Some(pid) = pid
        && kill_process(pid, Signal::TERM).is_ok()
        && timeout(GOODBYE, child.wait()).await.is_ok()
    {
        return;
    }
    let _ = child.start_kill();
    let _ = child.wait().await;
}

/// How long a control socket that cannot take a connection waits before it tries again.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Opens the control socket in place of the predecessor's, and passes on what comes.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen(upgrade_sock: &str, messages: mpsc::Sender<Message>) -> io::Result<()> {
    let path = control_path(upgrade_sock);
    let new = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
    let _ = std::fs::remove_file(&new);
    let listener = UnixListener::bind(&new)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
    // Renamed over the old one, so that at no moment there is none.
    std::fs::rename(&new, &path)?;
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // No descriptor is left, which passes; and without this socket no successor could ever take over.
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            };
            let messages = messages.clone();
            tokio::spawn(async move {
                if let Ok(Ok(Some(message))) = timeout(Duration::from_secs(5), read(stream)).await {
                    let _ = messages.send(message).await;
                }
            });
        }
    });
    Ok(())
}

async fn read(stream: UnixStream) -> io::Result<Option<Message>> {
    let mut line = String::new();
    let mut stream = BufReader::new(stream);
    stream.read_line(&mut line).await?;
    let stream = stream.into_inner();
    Ok(match line.trim_end().split_once(' ') {
        None if line == "upgrade\n" => Some(Message::Upgrade(stream)),
        Some(("ready", pid)) => pid.parse().ok().map(|pid| Message::Ready(pid, stream)),
        _ => None,
    })
}

/// Asks the newest process to hand over, and gives the successor's process ID.
///
/// # Errors
/// When there is no process, or it says that it goes on.
pub async fn ask(upgrade_sock: &str) -> Result<u32, String> {
    let path = control_path(upgrade_sock);
    let nobody =
        |error: io::Error| format!("no t3-dispatch listens at {}: {error}", path.display());
    let mut stream = UnixStream::connect(&path).await.map_err(nobody)?;
    stream.write_all(b"upgrade\n").await.map_err(nobody)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(nobody)?;
    match answer.trim_end().split_once(' ') {
        Some(("ok", pid)) => pid.parse().map_err(|_| answer),
        Some(("failed", why)) => Err(why.to_owned()),
        _ => Err("the running process went away without an answer".into()),
    }
}

/// Answers somebody who asked for a handover.
pub async fn tell(mut asker: UnixStream, outcome: &Result<u32, UpgradeError>) {
    let answer = match outcome {
        Ok(pid) => format!("ok {pid}\n"),
        Err(error) => format!("failed {error}; the running process goes on as before\n"),
    };
    // Whoever asked may have left.
    let _ = asker.write_all(answer.as_bytes()).await;
}

/// Tells systemd, where it wants to know.
pub fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        events::notify_failed(&error);
    }
}

/// A service that serves nobody: Pingora gives the listening sockets to services only.
pub struct Keeper {
    /// Who is to know them.
    pub handover: Arc<Handover>,
    /// It is ready once this address is listened on. Whoever accepts connections waits for it: where it is not to be had, the
    /// process ends, and nothing of anybody's may end with it.
    pub after: String,
}

#[async_trait]
impl ServiceWithDependents for Keeper {
    async fn start_service(
        &mut self,
        fds: Option<ListenFds>,
        _shutdown: ShutdownWatch,
        _listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        if let Some(fds) = fds {
            let _ = self.handover.listeners.set(fds);
        }
        while self.handover.missing().contains(&&self.after) {
            sleep(LOOK).await;
        }
        ready.notify_ready();
    }

    fn name(&self) -> &str {
        "keeper"
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        Some(Vec::new())
    }
}

/// The arguments that start a successor of this process: the same ones, but for `--upgrade` and never into the background,
/// where it already is.
pub fn successor(conf: Option<&Path>) -> io::Result<(PathBuf, Vec<OsString>)> {
    let mut arguments: Vec<OsString> = vec!["serve".into(), "--upgrade".into()];
    if let Some(conf) = conf {
        arguments.extend(["--conf".into(), std::path::absolute(conf)?.into_os_string()]);
    }
    Ok((std::env::current_exe()?, arguments))
}
