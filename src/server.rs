//! Listeners, background tasks and signals; no request logic.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora::proxy::http_proxy;
use pingora::server::configuration::Opt;
use pingora::server::{RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::background::{BackgroundService, background_service};
use pingora::services::listening::Service;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::admin::Admin;
use crate::config::{Jwks, Listen, Settings};
use crate::dispatch::{Dispatcher, requests_in_flight};
use crate::downstream::{Front, LAST_ANSWERS, LastAnswers};
use crate::events;
use crate::judge::{self, Judge};
use crate::jwt::{KeyError, Keys, Refresher, Tokens};
use crate::ledger::{self, Ledger};
use crate::listen::{self, Access, ListenError};
use crate::mint::end_mints;
use crate::pool;
use crate::probe::serve::ServeLegs;
use crate::room::Room;
use crate::table::{Table, TableError, Tables, Watcher};
use crate::tunnel::live;
use crate::upgrade::{self, Handover, Keeper, Message, UpgradeError};

/// How long SIGTERM waits for requests in flight where `grace_period_seconds` does not say.
const TERM_GRACE: Duration = Duration::from_secs(8);

/// Connections to the operator's listener, which any local program may open.
const ADMIN_CONNECTIONS: usize = 64;

/// How long a tunnel that is revoked may take to end in good order, before it is cut off.
const CUT_OFF: Duration = Duration::from_millis(1500);

/// How long the last records may take to reach the disk.
const LAST_RECORDS: Duration = Duration::from_secs(1);

/// How to start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Start {
    /// Take the listening sockets over from a running process.
    pub upgrade: bool,
    /// Go to the background.
    pub daemon: bool,
    /// Only find out whether the service could start.
    pub test: bool,
}

/// Why the service did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The table cannot be used.
    #[error("{file}: {error}\n  the file is named by dispatch.table")]
    Table {
        /// The table's file.
        file: String,
        /// What is wrong with it.
        error: TableError,
    },
    /// There are no keys to verify tokens with.
    #[error("dispatch.identity.jwt.jwks: {file} {error}")]
    Keys {
        /// The file that has none.
        file: String,
        /// What is wrong with it.
        error: KeyError,
    },
    /// It cannot listen where it should.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// It cannot take over.
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    /// The process could not be set up.
    #[error("cannot start: {0}")]
    Process(#[from] std::io::Error),
}

/// Runs the service until a signal ends it. `file` is where the settings came from.
///
/// # Errors
/// When it cannot start. Once it has started, it returns only after a signal.
pub fn serve(settings: Settings, file: Option<&Path>, start: Start) -> Result<(), ServeError> {
    let Settings {
        pingora: mut conf,
        dispatch,
        warnings,
    } = settings;
    for warning in warnings {
        events::settings_warning(&warning);
    }
    let empty = Table::beside(dispatch.own_ports());
    let tables = Tables::open(&dispatch.table, &empty).map_err(|error| ServeError::Table {
        file: dispatch.table.display().to_string(),
        error,
    })?;
    let access = Access::new(&dispatch)?;
    let keys = dispatch.identity.jwt.clone().map(Keys::new);
    if let Some(keys) = &keys {
        first_keys(keys, start.test)?;
    }
    if start.test {
        println!("settings and table are good");
        return Ok(());
    }
    let tables = Arc::new(tables);
    keep_secrets();
    end_if_not_ready();
    use_all_descriptors();
    ignore_hangup_until_ready()?;
    if !start.upgrade {
        listen::try_all(&dispatch, &access)?;
    }
    if dispatch.tunnels.per_user_metrics {
        events::count_by_user();
    }

    let admin_address = dispatch.admin.to_string();
    let addresses = dispatch
        .listen
        .iter()
        .map(listen::key)
        .chain([admin_address.clone()])
        .collect();
    let handover = Handover::new(
        conf.upgrade_sock.clone(),
        upgrade::successor(file)?,
        addresses,
        conf.pid_file.clone().into(),
    );
    let term_grace = conf
        .grace_period_seconds
        .map_or(TERM_GRACE, Duration::from_secs);
    let drain_limit = dispatch.tunnels.drain_limit;
    // The process ends itself, in time; Pingora would sleep through its whole grace period.
    conf.grace_period_seconds = Some((drain_limit + term_grace).as_secs() + 60);
    let opt = Opt {
        upgrade: start.upgrade,
        daemon: start.daemon,
        ..Opt::default()
    };
    let mut server = Server::new_with_opt_and_conf(opt, conf);
    server.bootstrap();

    let tunnels = &dispatch.tunnels;
    let ledger = Ledger {
        path: tunnels.ledger.clone(),
        limit: u64::from(tunnels.ledger_max_mb) << 20,
    };
    let judge = Judge::new(&dispatch, &ledger);
    let rules = judge::rules(&dispatch.tunnels);
    let serve_legs = ServeLegs::new(
        dispatch.session.check_path.clone(),
        dispatch.probe.heartbeat,
        rules.stall(),
        rules.watchdog * 2,
    );
    let tokens = keys.clone().map(Tokens::new);
    let each = server.configuration.upstream_keepalive_pool_size;
    let kept = each.saturating_mul(server.configuration.threads);
    let most = room(dispatch.max_connections as usize, kept);
    pool::make_room(kept);
    let dispatcher = Dispatcher::new(dispatch.clone(), tables.clone(), tokens, most);
    let front = Front::new(
        LastAnswers::new(http_proxy(&server.configuration, dispatcher)),
        Room::new(most, dispatch.max_connections_per_address as usize),
        Some(dispatch.identity.clone()),
    );
    let mut proxy = Service::new("dispatch".into(), front);
    for place in &dispatch.listen {
        proxy.add_listener(listen::endpoint(place, &access));
    }
    let mut admin = Service::new(
        "admin".into(),
        Front::new(
            Admin::new(dispatch.pairing.mint.clone(), ledger.clone()),
            Room::new(ADMIN_CONNECTIONS, ADMIN_CONNECTIONS),
            None,
        ),
    );
    admin.threads = Some(1);
    admin.add_tcp(&admin_address);
    let proxy = server.add_service(proxy);
    server.add_service(admin);
    let keeper = server.add_service(Keeper {
        handover: handover.clone(),
        after: admin_address,
    });
    proxy.add_dependency(keeper);
    server.add_service(background_service(
        "table",
        Watcher::new(tables.clone(), dispatch.table_poll),
    ));
    if let Some(keys) = keys {
        server.add_service(background_service("keys", Refresher(keys)));
    }
    server.add_service(background_service("judge", judge));
    server.add_service(background_service("serve-legs", serve_legs));
    server.add_service(background_service(
        "revoke",
        Revoker {
            tables: tables.clone(),
        },
    ));

    let signals = Signals {
        tables,
        handover,
        ledger,
        upgraded: start.upgrade,
        listen: dispatch.listen.clone(),
        access,
        term_grace,
        drain_limit,
    };
    server.run(RunArgs {
        shutdown_signal: Box::new(signals),
    });
    Ok(())
}

/// Ends the tunnels of people who lost their instance, in a process that was replaced too.
struct Revoker {
    tables: Arc<Tables>,
}

#[async_trait]
impl BackgroundService for Revoker {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let mut swaps = self.tables.swaps();
        while swaps.changed().await.is_ok() {
            let table = self.tables.current();
            let revoked = live::revoke(|user, instance| {
                !table
                    .get(user)
                    .is_some_and(|now| Arc::ptr_eq(now, instance))
            });
            // Those alone: what the next table revokes has its own time.
            tokio::spawn(async move {
                tokio::time::sleep(CUT_OFF).await;
                live::cut_off(&revoked);
            });
        }
    }
}

/// Secrets pass through this process: no core dump and no other process of the same user may read them.
pub fn keep_secrets() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    // An old kernel may refuse; the service is of use all the same.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Whether the process has begun to serve.
static READY: AtomicBool = AtomicBool::new(false);

/// Pingora panics in a thread of its own where it cannot listen, and goes on without. Until the process serves, that must
/// end it, so that an old one does not hand over to it.
fn end_if_not_ready() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if !READY.load(Ordering::Acquire) {
            std::process::exit(1);
        }
    }));
}

/// Every WebSocket takes two file descriptors, and the usual soft limit of 1024 is there for select(2) alone.
fn use_all_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // Where it is not allowed, the limit stays what it was.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
}

/// File descriptors for everything but connections that have a place, and those to instances: the operator's, those that
/// are refused, and what threads, files and mints take.
const OTHER_DESCRIPTORS: usize = 512;

/// How many connections there is room for: as many as wanted, if the file descriptors suffice for two each beside those of
/// the connections to instances that are `kept`.
fn room(wanted: usize, kept: usize) -> usize {
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let possible = descriptors.map_or(usize::MAX, |all| {
        let all = usize::try_from(all).unwrap_or(usize::MAX);
        // Where there are few, not all of the others will be wanted.
        (all - kept.saturating_add(OTHER_DESCRIPTORS).min(all / 2)) / 2
    });
    if possible < wanted {
        events::settings_warning(&format!(
            "dispatch.max_connections: there are file descriptors for {possible} connections only; raise the limit (LimitNOFILE=)"
        ));
    }
    wanted.min(possible).max(2)
}

/// Fetches the keys that tokens are verified with, so that nobody has to wait for them. A server that is down may come up
/// again; a file has to be there.
fn first_keys(keys: &Keys, test: bool) -> Result<(), ServeError> {
    let source = &keys.settings().jwks;
    if test && matches!(source, Jwks::Url(_)) {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(keys.refresh());
    // A name server that does not answer would hold it up for much longer than the limit.
    runtime.shutdown_background();
    match (outcome, source) {
        (Err(error), Jwks::File(path)) => Err(ServeError::Keys {
            file: path.display().to_string(),
            error,
        }),
        _ => Ok(()),
    }
}

/// A hangup would kill the process until somebody listens for it. Having listened once is enough, for good.
fn ignore_hangup_until_ready() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async { signal(SignalKind::hangup()).map(drop) })
}

/// What this process is about, for everything that has to end with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It takes new requests.
    Serving,
    /// It keeps what it has.
    Leaving,
}

static PHASE: std::sync::LazyLock<watch::Sender<Phase>> =
    std::sync::LazyLock::new(|| watch::channel(Phase::Serving).0);

/// Tells when this process begins to leave.
pub fn phase() -> watch::Receiver<Phase> {
    PHASE.subscribe()
}

/// What each signal means.
struct Signals {
    tables: Arc<Tables>,
    handover: Arc<Handover>,
    ledger: Ledger,
    upgraded: bool,
    listen: Vec<Listen>,
    access: Access,
    term_grace: Duration,
    drain_limit: Duration,
}

struct Listening {
    hangup: Signal,
    quit: Signal,
    terminate: Signal,
    interrupt: Signal,
    user2: Signal,
}

impl Listening {
    fn new() -> std::io::Result<Listening> {
        Ok(Listening {
            hangup: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            user2: signal(SignalKind::user_defined2())?,
        })
    }
}

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        // Going to the background may have undone it.
        keep_secrets();
        let mut signals = Listening::new().expect("these signals can be listened for");
        if let Err(error) = self.ledger.clone().start() {
            events::ledger_failing(&self.ledger.path, &error);
        }
        let (messages, mut inbox) = mpsc::channel(8);
        let serving = self.serving(messages);
        tokio::pin!(serving);
        let mut served = false;
        let mut handing_over: Option<Attempt> = None;
        loop {
            tokio::select! {
                () = &mut serving, if !served => served = true,
                _ = signals.hangup.recv() => self.tables.reload(),
                // Pingora would stop serving even with nobody there to take over.
                _ = signals.quit.recv() => self.begin(&mut handing_over, false, None),
                _ = signals.user2.recv() => self.begin(&mut handing_over, true, None),
                Some(message) = inbox.recv() => match message {
                    Message::Upgrade(asker) => self.begin(&mut handing_over, true, Some(asker)),
                    Message::Ready(pid, stream) => if let Some(attempt) = &handing_over {
                        let _ = attempt.ready.try_send((pid, stream));
                    },
                },
                outcome = outcome(&mut handing_over) => {
                    let askers = handing_over.take().map(|attempt| attempt.askers).unwrap_or_default();
                    match &outcome {
                        Ok(pid) => {
                            events::replaced(*pid);
                            judge::replaced();
                            upgrade::notify(NotifyState::MainPid(*pid));
                        }
                        Err(error) => events::upgrade_failed(error),
                    }
                    for asker in askers {
                        upgrade::tell(asker, &outcome).await;
                    }
                    if outcome.is_ok() {
                        self.leave(signals, self.drain_limit);
                        return ShutdownSignal::GracefulTerminate;
                    }
                }
                _ = signals.terminate.recv() => {
                    abandon(handing_over).await;
                    self.terminate(signals);
                    return ShutdownSignal::GracefulTerminate;
                }
                _ = signals.interrupt.recv() => {
                    abandon(handing_over).await;
                    last_words();
                    return ShutdownSignal::FastShutdown;
                }
            }
        }
    }
}

/// A handover that is under way, and those who want to know how it goes.
struct Attempt {
    task: tokio::task::JoinHandle<Result<u32, UpgradeError>>,
    ready: mpsc::Sender<(u32, tokio::net::UnixStream)>,
    askers: Vec<tokio::net::UnixStream>,
}

/// Gives a handover up, and ends the process that was started for it.
async fn abandon(attempt: Option<Attempt>) {
    if let Some(attempt) = attempt {
        attempt.task.abort();
        let _ = attempt.task.await;
    }
}

async fn outcome(attempt: &mut Option<Attempt>) -> Result<u32, UpgradeError> {
    match attempt {
        Some(attempt) => match (&mut attempt.task).await {
            Ok(outcome) => outcome,
            Err(error) => Err(std::io::Error::other(error).into()),
        },
        None => std::future::pending().await,
    }
}

impl Signals {
    /// Waits until this process serves, then tells everybody who should know.
    async fn serving(&self, messages: mpsc::Sender<Message>) {
        let listening = self.handover.listening().await;
        let granted = listening
            .map_err(ServeError::from)
            .and_then(|()| Ok(self.access.grant(&self.listen)?));
        if let Err(error) = granted {
            events::not_serving(&error);
            last_words();
            std::process::exit(1);
        }
        READY.store(true, Ordering::Release);
        match self.handover.word(self.upgraded).await {
            Ok(()) => {}
            // The predecessor may be gone, or of an older kind; there is nobody else to serve.
            Err(error) => events::predecessor_silent(&error),
        }
        if let Err(error) = upgrade::listen(&self.handover.upgrade_sock, messages) {
            events::control_failed(&self.handover.upgrade_sock, &error);
        }
        upgrade::notify(NotifyState::Ready);
        let listen: Vec<String> = self.listen.iter().map(Listen::to_string).collect();
        events::started(&listen.join(","), self.tables.current().len());
    }

    /// Begins to hand over, unless that is under way already.
    fn begin(
        &self,
        attempt: &mut Option<Attempt>,
        start: bool,
        asker: Option<tokio::net::UnixStream>,
    ) {
        let attempt = attempt.get_or_insert_with(|| {
            let (ready, waiting) = mpsc::channel(1);
            let task = tokio::spawn(self.handover.clone().hand_over(start, waiting));
            Attempt {
                task,
                ready,
                askers: Vec::new(),
            }
        });
        attempt.askers.extend(asker);
    }

    /// Ends the process once it has nothing left to do, at the latest after `limit`.
    fn leave(&self, mut signals: Listening, limit: Duration) {
        PHASE.send_replace(Phase::Leaving);
        let (tables, term_grace) = (self.tables.clone(), self.term_grace);
        tokio::spawn(async move {
            let start = Instant::now();
            tokio::time::sleep(LAST_ANSWERS + Duration::from_millis(500)).await;
            while requests_in_flight() > 0 && start.elapsed() < limit {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_millis(100)) => {}
                    _ = signals.hangup.recv() => tables.reload(),
                    _ = signals.terminate.recv() => break,
                    _ = signals.interrupt.recv() => break,
                    // It is not the one to hand over any more.
                    _ = signals.quit.recv() => {}
                    _ = signals.user2.recv() => {}
                }
            }
            tokio::select! {
                () = end_tunnels(term_grace) => {}
                _ = signals.interrupt.recv() => {}
            }
            exit();
        });
    }

    /// Ends the process: requests in flight may end, tunnels are closed. Whoever asks again does not want to wait.
    fn terminate(&self, mut signals: Listening) {
        PHASE.send_replace(Phase::Leaving);
        upgrade::notify(NotifyState::Stopping);
        let grace = self.term_grace;
        tokio::spawn(async move {
            tokio::select! {
                () = end_tunnels(grace) => {}
                _ = signals.terminate.recv() => {}
                _ = signals.interrupt.recv() => {}
            }
            exit();
        });
    }
}

/// Closes every tunnel, and waits for all requests to end, for `grace` at most.
async fn end_tunnels(grace: Duration) {
    let until = Instant::now() + grace;
    live::end_all();
    tokio::time::sleep(Duration::from_millis(100)).await;
    while requests_in_flight() > 0 && Instant::now() < until {
        // On connections that are kept for the last answers, another may have been opened.
        live::end_all();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Ends what would outlive the process, and writes the records of what is still there.
fn last_words() {
    end_mints();
    live::close_all_books();
    judge::last_words();
    ledger::flush(LAST_RECORDS);
}

fn exit() -> ! {
    events::stopped(requests_in_flight());
    last_words();
    std::process::exit(0)
}
