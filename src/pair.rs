//! Pairing: mint a credential as the OS user, exchange it at the instance, and relay the cookie.
//!
//! A mint costs a second of CPU and a quarter of a gigabyte, so it is bounded three ways: one at a time per user,
//! `max_concurrent` in all, and so many a minute for one user, failures included. Requests that come while a pairing of
//! the same person is under way share its outcome: a browser that restores fifty tabs mints once.

use std::collections::{HashMap, VecDeque};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderValue, StatusCode, header};
use pingora::ErrorType;
use tokio::sync::{Semaphore, watch};

use crate::config::Pairing;
use crate::events;
use crate::instance::{Caller, address, within};
use crate::mint::{Credential, MintError, mint};
use crate::pool::dial;
use crate::refuse::Refusal;
use crate::session::session_cookie_set;
use crate::table::Instance;

/// How long a pairing waits for its turn.
const TURN: Duration = Duration::from_secs(20);

/// The stretch in which pairings are counted against `per_user_per_minute`.
const MINUTE: Duration = Duration::from_secs(60);

/// What a pairing gave.
pub struct Paired {
    /// The `Set-Cookie` lines for the browser, as the instance wrote them.
    pub set_cookies: Vec<HeaderValue>,
    /// The name of the session cookie among them.
    pub cookie: String,
    /// The endpoint that took the credential.
    pub endpoint: Arc<str>,
    /// Whether it was another than the preferred one.
    pub fallback: bool,
}

/// Why a pairing gave nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PairError {
    /// There is no credential.
    #[error(transparent)]
    Mint(#[from] MintError),
    /// Nobody listens where the instance should.
    #[error("nobody listens on the instance's port {0}: nothing was minted")]
    Down(u16),
    /// No endpoint could be reached, or all of them were absent.
    #[error("no pairing endpoint of the instance answered: {0}")]
    Unreachable(String),
    /// An endpoint answered anything but 200.
    #[error("the instance answered {status} at {endpoint}")]
    Rejected {
        /// The endpoint.
        endpoint: Arc<str>,
        /// Its answer.
        status: StatusCode,
    },
    /// An endpoint answered 200 and gave no session cookie.
    #[error("the instance took the credential at {endpoint} and set no session cookie")]
    NoCookie {
        /// The endpoint.
        endpoint: Arc<str>,
    },
    /// No turn came within 20 s.
    #[error("too many pairings wait for their turn")]
    Busy,
    /// More pairings within a minute than one user may have.
    #[error("more pairings within a minute than one user may have")]
    TooOften {
        /// Seconds until the next one is allowed.
        again_in: u64,
    },
    /// The pairing died with a panic or at shutdown.
    #[error("the pairing was abandoned")]
    Abandoned,
}

impl PairError {
    /// The value of the label `result`.
    pub fn label(&self) -> &'static str {
        match self {
            PairError::Mint(MintError::Failed(_)) => "mint_failed",
            PairError::Mint(MintError::Unparseable(_)) => "mint_unparseable",
            PairError::Down(_) | PairError::Unreachable(_) => "bootstrap_failed",
            PairError::Rejected { .. } => "bootstrap_rejected",
            PairError::NoCookie { .. } => "bootstrap_no_cookie",
            PairError::Busy => "busy",
            PairError::TooOften { .. } => "too_often",
            PairError::Abandoned => "abandoned",
        }
    }

    /// The endpoint whose answer decided, where one did.
    pub fn endpoint(&self) -> Option<&str> {
        match self {
            PairError::Rejected { endpoint, .. } | PairError::NoCookie { endpoint } => {
                Some(endpoint)
            }
            _ => None,
        }
    }

    /// What the person is told.
    pub fn refusal(&self) -> Refusal {
        match self {
            PairError::Mint(MintError::Failed(_)) => Refusal::MintFailed,
            PairError::Mint(MintError::Unparseable(_)) => Refusal::MintUnparseable,
            PairError::Down(_) | PairError::Unreachable(_) => Refusal::BootstrapFailed,
            PairError::Rejected { .. } => Refusal::BootstrapRejected,
            PairError::NoCookie { .. } => Refusal::BootstrapNoCookie,
            PairError::Busy => Refusal::PairingBusy,
            PairError::TooOften { again_in } => Refusal::PairingTooOften(*again_in),
            PairError::Abandoned => Refusal::Internal,
        }
    }
}

/// How a pairing went, for everybody who waited for it.
pub type Outcome = Arc<Result<Paired, PairError>>;

/// The pairings of one user with one instance.
#[derive(Default)]
struct Turns {
    /// Tells the outcome of the pairing that is under way, if one is.
    running: Option<watch::Receiver<Option<Outcome>>>,
    /// When the mints of the last minute began.
    recent: VecDeque<Instant>,
    /// How the last one failed, if it did.
    failure: Option<PairError>,
}

impl Turns {
    fn forget_old(&mut self) {
        self.recent.retain(|at| at.elapsed() < MINUTE);
    }

    /// What to say instead of minting once more, if that would be too much: a failure stays what it was, and after a
    /// success it is the browser that comes back without its cookie.
    fn too_often(&mut self, allowed: usize) -> Option<PairError> {
        self.forget_old();
        let oldest = *self
            .recent
            .front()
            .filter(|_| self.recent.len() >= allowed)?;
        let again_in = MINUTE.saturating_sub(oldest.elapsed()).as_secs() + 1;
        Some(
            self.failure
                .clone()
                .unwrap_or(PairError::TooOften { again_in }),
        )
    }
}

/// Whose turns they are: the user's name and the generation of their instance.
type Whose = (String, u64);

/// Pairs browsers with instances. One serves the whole process.
pub struct Pairer {
    settings: Pairing,
    endpoints: Vec<Arc<str>>,
    caller: Arc<Caller>,
    places: Semaphore,
    turns: Mutex<HashMap<Whose, Turns>>,
}

impl Pairer {
    /// Pairs as `settings` say, and calls instances through `caller`.
    pub fn new(settings: Pairing, caller: Arc<Caller>) -> Arc<Pairer> {
        Arc::new(Pairer {
            places: Semaphore::new(settings.max_concurrent as usize),
            endpoints: settings
                .endpoints
                .iter()
                .map(|endpoint| endpoint.as_str().into())
                .collect(),
            settings,
            caller,
            turns: Mutex::default(),
        })
    }

    /// Pairs `user`, or waits for the pairing of the same user that is already under way.
    pub async fn pair(self: &Arc<Self>, user: &str, instance: &Arc<Instance>) -> Outcome {
        let mut outcome = match self.join(user, instance) {
            Ok(outcome) => outcome,
            Err(error) => {
                events::pairing_failed(user, &error, Duration::ZERO);
                return Arc::new(Err(error));
            }
        };
        let told = outcome.wait_for(Option::is_some).await;
        told.ok()
            .and_then(|outcome| outcome.clone())
            .unwrap_or_else(|| Arc::new(Err(PairError::Abandoned)))
    }

    fn join(
        self: &Arc<Self>,
        user: &str,
        instance: &Arc<Instance>,
    ) -> Result<watch::Receiver<Option<Outcome>>, PairError> {
        let whose = (user.to_owned(), instance.generation);
        let mut all = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        let turns = all.entry(whose.clone()).or_default();
        // A pairing that died leaves a receiver without a sender behind.
        if let Some(running) = turns
            .running
            .as_ref()
            .filter(|running| running.has_changed().is_ok())
        {
            return Ok(running.clone());
        }
        if let Some(error) = turns.too_often(self.settings.per_user_per_minute as usize) {
            return Err(error);
        }
        let (tell, told) = watch::channel(None);
        turns.running = Some(told.clone());
        // A task of its own, so that a browser that leaves takes nobody else's pairing with it.
        let (pairer, instance) = (self.clone(), instance.clone());
        tokio::spawn(async move {
            let start = Instant::now();
            let outcome = pairer.run(&instance).await;
            pairer.settle(whose, &instance, &outcome, start.elapsed());
            let _ = tell.send(Some(Arc::new(outcome)));
        });
        Ok(told)
    }

    /// Takes note of how a pairing went, and drops what is no longer worth knowing.
    fn settle(
        &self,
        whose: Whose,
        instance: &Instance,
        outcome: &Result<Paired, PairError>,
        took: Duration,
    ) {
        match outcome {
            Ok(paired) => {
                instance.cookie.learn(&paired.cookie);
                events::paired(&whose.0, paired, took);
            }
            Err(error) => events::pairing_failed(&whose.0, error, took),
        }
        let mut all = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        let turns = all.entry(whose).or_default();
        turns.running = None;
        // These have not minted.
        if !matches!(outcome, Err(PairError::Busy | PairError::Down(_))) {
            turns.failure = outcome.as_ref().err().cloned();
            turns.recent.push_back(Instant::now());
        }
        all.retain(|_, turns| {
            turns.forget_old();
            turns.running.is_some() || !turns.recent.is_empty()
        });
    }

    async fn run(&self, instance: &Instance) -> Result<Paired, PairError> {
        // After a restart of the machine everybody's page tries again and again, and each mint would be for nothing.
        if let Err(error) = dial(&address(instance.port).into()).await
            && *error.etype() == ErrorType::ConnectRefused
        {
            return Err(PairError::Down(instance.port));
        }
        // The semaphore is fair: turns come in the order of asking.
        let place = tokio::time::timeout(TURN, self.places.acquire()).await;
        let place = place
            .map_err(|_| PairError::Busy)?
            .map_err(|_| PairError::Abandoned)?;
        let credential = mint(&self.settings, &instance.os_user, Stdio::null()).await?;
        // An instance that hangs takes no turn from others: it is the mint that costs something.
        drop(place);
        self.exchange(instance, credential).await
    }

    /// Takes the credential to the instance's pairing endpoints, the preferred one first. One that is absent in the
    /// instance's version answers 404.
    ///
    /// # Errors
    /// When no endpoint takes it, or the one that does sets no session cookie.
    pub async fn exchange(
        &self,
        instance: &Instance,
        credential: Credential,
    ) -> Result<Paired, PairError> {
        let body = serde_json::json!({ "credential": credential.reveal() }).to_string();
        let deadline = Instant::now() + self.settings.exchange_timeout;
        let mut last = String::new();
        for (position, endpoint) in self.endpoints.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let answer = match within(
                left,
                self.caller.post_json(instance, endpoint, body.as_bytes()),
            )
            .await
            {
                Ok(answer) if answer.status != StatusCode::NOT_FOUND => answer,
                outcome => {
                    // Of an error only its kind: its context may quote what the instance sent.
                    let why = outcome
                        .as_ref()
                        .map_or_else(|error| error.etype().as_str(), |_| "404");
                    last = format!(
                        "{last}{}{why} at {endpoint}",
                        if position > 0 { ", " } else { "" }
                    );
                    continue;
                }
            };
            if answer.status != StatusCode::OK {
                return Err(PairError::Rejected {
                    endpoint: endpoint.clone(),
                    status: answer.status,
                });
            }
            let set_cookies: Vec<HeaderValue> = answer
                .headers
                .get_all(header::SET_COOKIE)
                .iter()
                .cloned()
                .collect();
            return match set_cookies
                .iter()
                .find_map(|line| session_cookie_set(line, &instance.cookie))
            {
                Some(cookie) => Ok(Paired {
                    set_cookies,
                    cookie,
                    endpoint: endpoint.clone(),
                    fallback: position > 0,
                }),
                None => Err(PairError::NoCookie {
                    endpoint: endpoint.clone(),
                }),
            };
        }
        Err(PairError::Unreachable(last))
    }
}
