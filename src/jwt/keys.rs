//! The keys that tokens are signed with: where they come from, and how they are kept fresh.

use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::Empty;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::KeySet;
use crate::config::url::Target;
use crate::config::{Jwks, Jwt};
use crate::events;
use crate::https::{self, Connection, ExchangeError, TlsError};

/// The largest JWK set.
const MOST: usize = 1024 * 1024;

/// How long the source may take.
const LIMIT: Duration = Duration::from_secs(5);

/// How often a token with an unknown key has the source asked.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// How soon the source is asked again while there are no keys at all.
const RETRY: Duration = Duration::from_secs(5);

/// Why there are no new keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    File(io::Error),
    /// The server cannot be reached.
    #[error("cannot be reached: {0}")]
    Connect(io::Error),
    /// There can be no TLS at all.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The server did not answer the request as it should.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// The server has something else to say.
    #[error("answered with {0}")]
    Status(StatusCode),
    /// It took too long.
    #[error("no whole answer within {LIMIT:?}")]
    TooLate,
    /// It is not JSON with a list `keys`.
    #[error("is not a JWK set: it has no list \"keys\"")]
    NoSet,
    /// It has no key that can be used.
    #[error("has no key for RS256, ES256 or EdDSA")]
    NoKeys,
}

/// A request's question to the source.
struct Asked {
    at: Instant,
    /// How often the source had been asked before; as long as that stands, there is no answer yet.
    before: u64,
}

/// The keys in force, kept while their source is down.
pub struct Keys {
    settings: Jwt,
    current: ArcSwapOption<KeySet>,
    /// When a request has last had the source asked.
    asked: Mutex<Option<Asked>>,
    wanted: Notify,
    /// How often the source has been asked.
    tried: watch::Sender<u64>,
}

impl Keys {
    /// No keys yet.
    pub fn new(settings: Jwt) -> Arc<Keys> {
        Arc::new(Keys {
            settings,
            current: ArcSwapOption::empty(),
            asked: Mutex::default(),
            wanted: Notify::new(),
            tried: watch::channel(0).0,
        })
    }

    /// What the settings say of tokens and of where their keys are.
    pub fn settings(&self) -> &Jwt {
        &self.settings
    }

    /// The keys in force.
    pub fn current(&self) -> Option<Arc<KeySet>> {
        self.current.load_full()
    }

    /// Has the source asked and waits for the outcome, unless it was asked less than a minute ago.
    pub(super) async fn ask(&self) {
        let mut tried = self.tried.subscribe();
        let waiting = {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            match *asked {
                // Somebody else's question has not been answered yet.
                Some(Asked { before, .. }) if *tried.borrow() == before => true,
                Some(Asked { at, .. }) if at.elapsed() < ASK_AGAIN => false,
                _ => {
                    *asked = Some(Asked {
                        at: Instant::now(),
                        before: *tried.borrow(),
                    });
                    self.wanted.notify_one();
                    true
                }
            }
        };
        if waiting {
            let _ = timeout(LIMIT, tried.changed()).await;
        }
    }

    /// Asks the source. What it says is in force from now on; while it says nothing of use, what was before.
    ///
    /// # Errors
    /// Why there are no new keys.
    pub async fn refresh(&self) -> Result<(), KeyError> {
        let outcome = self.fetch().await;
        match &outcome {
            Ok(keys) => events::keys_refreshed(&self.settings.jwks, keys.len()),
            Err(error) => {
                let kept = self.current().map_or(0, |keys| keys.len());
                events::keys_failed(&self.settings.jwks, error, kept);
            }
        }
        let result = outcome.map(|keys| self.current.store(Some(Arc::new(keys))));
        self.tried.send_modify(|count| *count += 1);
        result
    }

    /// What the source has now.
    ///
    /// # Errors
    /// Why there are no keys.
    pub async fn fetch(&self) -> Result<KeySet, KeyError> {
        match &self.settings.jwks {
            Jwks::File(path) => KeySet::parse(&read(path).map_err(KeyError::File)?),
            Jwks::Url(target) => match timeout(LIMIT, self.get(target)).await {
                Ok(text) => KeySet::parse(&text?),
                Err(_) => Err(KeyError::TooLate),
            },
        }
    }

    async fn get(&self, target: &Target) -> Result<Bytes, KeyError> {
        let place = (target.host.clone(), target.port);
        let stream = TcpStream::connect(place).await.map_err(KeyError::Connect)?;
        let stream: Box<dyn Connection> = if target.tls {
            let tls = https::tls(&self.settings.roots, true)?;
            let name = ServerName::try_from(target.host.clone())
                .map_err(|error| KeyError::Connect(io::Error::other(error)))?;
            let connector = TlsConnector::from(Arc::new(tls));
            Box::new(
                connector
                    .connect(name, stream)
                    .await
                    .map_err(KeyError::Connect)?,
            )
        } else {
            Box::new(stream)
        };
        let request = Request::builder()
            .uri(&target.path)
            .header(header::HOST, target.authority())
            .header(header::ACCEPT, "application/json")
            .header(header::CONNECTION, "close")
            .body(Empty::new())
            .map_err(|error| KeyError::Connect(io::Error::other(error)))?;
        let answer = https::exchange(stream, request, MOST).await?;
        match answer.status() {
            StatusCode::OK => Ok(answer.into_body()),
            status => Err(KeyError::Status(status)),
        }
    }
}

/// The text of a file of usual size. Nothing waits at a FIFO.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let mut text = Vec::new();
    std::fs::File::open(path)?
        .take(MOST as u64)
        .read_to_end(&mut text)?;
    Ok(text)
}

/// Keeps the keys fresh, in the background.
pub struct Refresher(pub Arc<Keys>);

#[async_trait]
impl BackgroundService for Refresher {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let keys = &self.0;
        loop {
            let pause = match keys.current() {
                Some(_) => keys.settings.refresh,
                None => RETRY,
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = keys.wanted.notified() => {}
            }
            let _ = keys.refresh().await;
        }
    }
}
