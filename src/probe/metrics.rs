//! The prober's metrics, and the listener that shows them.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prometheus::{
    Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::board::Board;
use super::reason::Reason;
use super::settings::Leg;

const RTTS: [f64; 9] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0];
const AGES: [f64; 8] = [
    10.0, 60.0, 300.0, 1800.0, 3600.0, 14_400.0, 43_200.0, 86_400.0,
];

/// Connections to the listener at once; more wait.
const CONNECTIONS: usize = 64;

/// How long one of them may last.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest head of a request, with what is read beside it. hyper takes no less.
const HEAD: usize = 8192;

/// All series of all legs, from the start.
pub struct Metrics {
    registry: Registry,
    connected: IntGaugeVec,
    disconnects: IntCounterVec,
    rtt: HistogramVec,
    age: HistogramVec,
    last_disconnect: GaugeVec,
}

impl Metrics {
    /// Every series of `legs` is there, at nought.
    ///
    /// # Errors
    /// When a name is no name for a metric, which no setting can bring about.
    pub fn new(legs: &[Leg]) -> prometheus::Result<Metrics> {
        let opts = |name: &str, help: &str| Opts::new(format!("t3probe_{name}"), help);
        let metrics = Metrics {
            registry: Registry::new(),
            connected: IntGaugeVec::new(
                opts("connected", "Whether the leg's heartbeats come back."),
                &["leg"],
            )?,
            disconnects: IntCounterVec::new(
                opts(
                    "disconnects_total",
                    "Connections that ended, and tries that came to nothing.",
                ),
                &["leg", "reason"],
            )?,
            rtt: HistogramVec::new(
                HistogramOpts::from(opts("rtt_seconds", "From a heartbeat to its echo."))
                    .buckets(RTTS.into()),
                &["leg"],
            )?,
            age: HistogramVec::new(
                HistogramOpts::from(opts(
                    "connection_age_seconds",
                    "How long connections lasted that ended.",
                ))
                .buckets(AGES.into()),
                &["leg"],
            )?,
            last_disconnect: GaugeVec::new(
                opts(
                    "last_disconnect_timestamp",
                    "When the leg last failed, in Unix time; 0 for never.",
                ),
                &["leg"],
            )?,
        };
        let registry = &metrics.registry;
        registry.register(Box::new(metrics.connected.clone()))?;
        registry.register(Box::new(metrics.disconnects.clone()))?;
        registry.register(Box::new(metrics.rtt.clone()))?;
        registry.register(Box::new(metrics.age.clone()))?;
        registry.register(Box::new(metrics.last_disconnect.clone()))?;
        for leg in legs {
            let label = &[leg.name.as_str()];
            metrics.connected.with_label_values(label).set(0);
            metrics.rtt.with_label_values(label);
            metrics.age.with_label_values(label);
            metrics.last_disconnect.with_label_values(label).set(0.0);
            for reason in Reason::usual() {
                let reason = reason.to_string();
                metrics
                    .disconnects
                    .with_label_values(&[leg.name.as_str(), reason.as_str()]);
            }
        }
        Ok(metrics)
    }

    /// A heartbeat came back.
    pub fn echoed(&self, leg: &str, rtt: Duration) {
        self.connected.with_label_values(&[leg]).set(1);
        self.rtt
            .with_label_values(&[leg])
            .observe(rtt.as_secs_f64());
    }

    /// A connection of this `age` ended, or there was none.
    pub fn failed(&self, leg: &str, reason: Reason, age: Option<Duration>) {
        self.connected.with_label_values(&[leg]).set(0);
        let reason = reason.to_string();
        self.disconnects
            .with_label_values(&[leg, reason.as_str()])
            .inc();
        if let Some(age) = age {
            self.age
                .with_label_values(&[leg])
                .observe(age.as_secs_f64());
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        self.last_disconnect
            .with_label_values(&[leg])
            .set(now.unwrap_or_default().as_secs_f64());
    }

    fn exposition(&self) -> Vec<u8> {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            log::error!("metrics-failed error={error}");
        }
        text
    }
}

/// Binds the listener.
///
/// # Errors
/// When the address is not to be had.
pub async fn listen(address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address)
        .await
        .map_err(|error| ListenError { address, error })
}

/// There is nowhere to show metrics.
#[derive(Debug, thiserror::Error)]
#[error(
    "probe.listen: cannot listen on {address}: {error}; write an address of this machine with a free port"
)]
pub struct ListenError {
    address: SocketAddr,
    error: std::io::Error,
}

/// Answers for ever, whatever anybody sends.
pub async fn serve(listener: TcpListener, board: Arc<Board>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let board = board.clone();
                tokio::spawn(async move {
                    // Whoever is slower than that, or sends no HTTP, is nobody's Prometheus.
                    let _ = timeout(PATIENCE, answer(stream, board)).await;
                    drop(place);
                });
            }
            // Mostly too many open files, which takes others to change.
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn answer(stream: TcpStream, board: Arc<Board>) -> hyper::Result<()> {
    let service = service_fn(|request: Request<Incoming>| {
        let response = respond(&request, &board);
        async { Ok::<_, Infallible>(response) }
    });
    hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

fn respond(request: &Request<Incoming>, board: &Board) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    let readable = matches!(*request.method(), Method::GET | Method::HEAD);
    let (status, kind, body) = match request.uri().path() {
        _ if !readable => (StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET only\n".into()),
        "/metrics" => (
            StatusCode::OK,
            prometheus::TEXT_FORMAT,
            board.metrics().exposition().into(),
        ),
        "/healthz" => (StatusCode::OK, TEXT, "ok\n".into()),
        _ => (
            StatusCode::NOT_FOUND,
            TEXT,
            "there are /metrics and /healthz\n".into(),
        ),
    };
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}
