//! Listeners, background tasks and signals; no request logic.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora::listeners::{L4BufferSettings, ListenerConfig, TcpSocketOptions};
use pingora::proxy::http_proxy_service_with_name;
use pingora::server::configuration::Opt;
use pingora::server::{RunArgs, Server, ShutdownSignal, ShutdownSignalWatch};
use pingora::services::background::background_service;
use pingora::services::listening::Service;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::Admin;
use crate::config::Settings;
use crate::dispatch::{Dispatcher, requests_in_flight};
use crate::events;
use crate::table::{TableError, Tables, Watcher};

/// Read buffer of a client's connection. Pingora's default of 64 KiB is kept by every idle WebSocket.
const READ_BUFFER: usize = 4096;

/// How long SIGTERM waits for requests in flight where `grace_period_seconds` does not say.
const TERM_GRACE: Duration = Duration::from_secs(10);

/// How long Pingora goes on accepting after it has handed its sockets to a new process, and a little more.
const HANDED_OVER: Duration = Duration::from_secs(6);

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
    /// An address is not ours to listen on.
    #[error("{key}: cannot listen on {address}: {error}")]
    Listen {
        /// The setting that names the address.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// The process could not be set up.
    #[error("cannot start: {0}")]
    Process(#[from] std::io::Error),
}

/// Runs the service until a signal ends it.
///
/// # Errors
/// When it cannot start. Once it has started, it returns only after a signal.
pub fn serve(settings: Settings, start: Start) -> Result<(), ServeError> {
    let Settings {
        pingora: mut conf,
        dispatch,
        warnings,
    } = settings;
    for warning in warnings {
        events::settings_warning(&warning);
    }
    let tables = Tables::open(&dispatch.table).map_err(|error| ServeError::Table {
        file: dispatch.table.display().to_string(),
        error,
    })?;
    if start.test {
        println!("settings and table are good");
        return Ok(());
    }
    let tables = Arc::new(tables);
    keep_secrets();
    ignore_hangup_until_ready()?;
    if !start.upgrade {
        // Pingora retries for half a minute and then panics; the operator deserves a sentence.
        let listen = dispatch
            .listen
            .iter()
            .map(|address| ("dispatch.listen", *address));
        for (key, address) in listen.chain([("dispatch.admin", dispatch.admin)]) {
            std::net::TcpListener::bind(address).map_err(|error| ServeError::Listen {
                key,
                address,
                error,
            })?;
        }
    }

    let term_grace = conf
        .grace_period_seconds
        .map_or(TERM_GRACE, Duration::from_secs);
    let upgrade_grace = Duration::from_secs(*conf.grace_period_seconds.get_or_insert(300));
    let upgrade_sock = conf.upgrade_sock.clone();
    let opt = Opt {
        upgrade: start.upgrade,
        daemon: start.daemon,
        ..Opt::default()
    };
    let mut server = Server::new_with_opt_and_conf(opt, conf);
    server.bootstrap();

    let dispatcher = Dispatcher::new(dispatch.clone(), tables.clone());
    let mut proxy = http_proxy_service_with_name(&server.configuration, dispatcher, "dispatch");
    for address in &dispatch.listen {
        proxy.add_listener(
            ListenerConfig::tcp(address.to_string())
                .tcp_socket_options(TcpSocketOptions::default())
                .l4_buffer(L4BufferSettings::default().read(READ_BUFFER)),
        );
    }
    let mut admin = Service::new("admin".into(), Admin::new(dispatch.pairing.mint.clone()));
    admin.threads = Some(1);
    admin.add_tcp(&dispatch.admin.to_string());
    server.add_service(proxy);
    server.add_service(admin);
    server.add_service(background_service(
        "table",
        Watcher::new(tables.clone(), dispatch.table_poll),
    ));

    let listen: Vec<String> = dispatch.listen.iter().map(SocketAddr::to_string).collect();
    events::started(&listen.join(","), tables.current().len());
    let signals = Signals {
        tables,
        upgrade_sock,
        term_grace,
        upgrade_grace,
    };
    server.run(RunArgs {
        shutdown_signal: Box::new(signals),
    });
    Ok(())
}

/// Cookies and credentials pass through this process: no core dump and no other process of the same user may read them.
fn keep_secrets() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};
    // An old kernel may refuse; the service is of use all the same.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// A hangup would kill the process until somebody listens for it. Having listened once is enough, for good.
fn ignore_hangup_until_ready() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async { signal(SignalKind::hangup()).map(drop) })
}

/// What each signal means.
struct Signals {
    tables: Arc<Tables>,
    upgrade_sock: String,
    term_grace: Duration,
    upgrade_grace: Duration,
}

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        // Going to the background may have undone it.
        keep_secrets();
        let listen = |kind| signal(kind).expect("these signals can be listened for");
        let mut hangup = listen(SignalKind::hangup());
        let mut quit = listen(SignalKind::quit());
        let mut terminate = listen(SignalKind::terminate());
        let mut interrupt = listen(SignalKind::interrupt());
        loop {
            tokio::select! {
                _ = hangup.recv() => self.tables.reload(),
                // Pingora would stop serving even with nobody there to take over.
                _ = quit.recv() => if std::path::Path::new(&self.upgrade_sock).exists() {
                    leave_when_idle(HANDED_OVER, self.upgrade_grace);
                    return ShutdownSignal::GracefulUpgrade;
                } else {
                    events::upgrade_refused(&self.upgrade_sock);
                },
                _ = terminate.recv() => {
                    leave_when_idle(Duration::ZERO, self.term_grace);
                    return ShutdownSignal::GracefulTerminate;
                }
                _ = interrupt.recv() => return ShutdownSignal::FastShutdown,
            }
        }
    }
}

/// Ends the process once no request is in flight, at the latest after `grace`, but not before `first` is over. Pingora
/// itself would sleep through the whole grace period.
fn leave_when_idle(first: Duration, grace: Duration) {
    let start = Instant::now();
    std::thread::spawn(move || {
        std::thread::sleep(first.max(Duration::from_millis(100)));
        while requests_in_flight() > 0 && start.elapsed() < grace {
            std::thread::sleep(Duration::from_millis(50));
        }
        events::stopped(requests_in_flight());
        std::process::exit(0);
    });
}
