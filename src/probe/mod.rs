//! Evidence about the way between a client and this service: the echo, which the dispatcher has, and the prober, which
//! holds permanent legs to it that differ in one segment of their path only. Which legs are down says where a path is cut.

pub mod echo;
pub mod far;
pub mod host;
pub mod serve;

mod board;
mod delay;
mod dial;
mod leg;
mod metrics;
mod once;
mod reason;
mod resolve;
pub mod settings;
pub mod view;

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::https::TlsError;
use board::Board;
use dial::Dialer;
use leg::{GOODBYE, Runner};
use metrics::{ListenError, Metrics};
use settings::Settings;

/// Threads of the prober. It has little to do, but what it does is timed, so that nothing should wait for a thread.
const THREADS: usize = 2;

/// How much longer than a Close handshake the end may take.
const SLACK: Duration = Duration::from_millis(500);

/// Why the prober did not start.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No connection could be made.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Metrics could not be shown.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Metrics could not be made.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
    /// The system gave no threads or no signals.
    #[error("cannot start: {0}")]
    System(#[from] std::io::Error),
}

/// How to show what is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// Log lines and metrics only.
    Log,
    /// A view on the terminal, too.
    View,
}

/// Holds the legs until a signal ends it.
///
/// # Errors
/// When it cannot start.
pub fn run(settings: Settings, show: Show) -> Result<(), ProbeError> {
    crate::server::keep_secrets();
    let runtime = runtime()?;
    let outcome = runtime.block_on(hold(settings, show));
    // A look-up of the system's cannot be called off, and is not waited for.
    runtime.shutdown_background();
    outcome
}

/// Tries each leg once and prints what it found. Gives whether all are up.
///
/// # Errors
/// When it cannot start.
pub fn once(settings: Settings) -> Result<bool, ProbeError> {
    let dialer = Arc::new(Dialer::new(&settings)?);
    let board = Arc::new(Board::new(&settings.legs, Metrics::new(&settings.legs)?));
    let runtime = runtime()?;
    let all_up = runtime.block_on(once::run(Arc::new(settings), dialer, board));
    runtime.shutdown_background();
    Ok(all_up)
}

fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
}

async fn hold(settings: Settings, show: Show) -> Result<(), ProbeError> {
    let dialer = Arc::new(Dialer::new(&settings)?);
    let board = Arc::new(Board::new(&settings.legs, Metrics::new(&settings.legs)?));
    let listener = metrics::listen(settings.listen).await?;
    // A terminal that goes away sends SIGHUP, and nobody wants a prober that nobody sees.
    let mut signals = [
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
        signal(SignalKind::hangup())?,
    ];
    tokio::spawn(metrics::serve(listener, board.clone()));
    let watched = board.clone();
    tokio::spawn(async move { watched.watch().await });
    log::info!(
        "probing version={} legs={} listen={}",
        env!("CARGO_PKG_VERSION"),
        settings.legs.len(),
        settings.listen
    );
    let settings = Arc::new(settings);
    let (stop, told) = watch::channel(false);
    let mut legs = JoinSet::new();
    for place in 0..settings.legs.len() {
        let runner = Runner {
            settings: settings.clone(),
            dialer: dialer.clone(),
            board: board.clone(),
            place,
            stop: told.clone(),
        };
        legs.spawn(runner.run());
    }
    let ended = async {
        let [terminate, interrupt, hangup] = &mut signals;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
        stop.send_replace(true);
        let _ = timeout(GOODBYE + SLACK, async {
            while legs.join_next().await.is_some() {}
        })
        .await;
        log::info!("ended");
    };
    match show {
        Show::Log => ended.await,
        Show::View => tokio::select! {
            () = view::show(board) => {}
            () = ended => {}
        },
    }
    Ok(())
}
