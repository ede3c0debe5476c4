//! The legs to the instances: each one with open WebSockets is asked for a sign of life every heartbeat, and at once when a
//! WebSocket of its ended.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pingora::ErrorType;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use tokio::sync::{Semaphore, mpsc};

use crate::events;
use crate::evidence::{self, Event, Kind, Trouble, clock};
use crate::instance::Caller;
use crate::table::Instance;
use crate::tunnel::live;

/// Instances that are asked at once.
const AT_ONCE: usize = 64;

/// When an instance that has ended a WebSocket is asked again, to see whether it restarts: that takes it some seconds.
const AGAIN: [u64; 4] = [500, 1000, 2000, 3000];

/// Requests that may wait to be looked at.
const WAITING: usize = 1024;

static ASK: OnceLock<mpsc::Sender<(Arc<Instance>, bool)>> = OnceLock::new();

/// Has the instance asked now, and again if it may be restarting.
pub fn ask(instance: Arc<Instance>, may_restart: bool) {
    if let Some(asker) = ASK.get() {
        // Where so many wait, this one is asked with its next heartbeat.
        let _ = asker.try_send((instance, may_restart));
    }
}

/// The background task.
pub struct ServeLegs {
    asker: Arc<Asker>,
    heartbeat: Duration,
}

struct Asker {
    caller: Caller,
    path: String,
    /// An answer that takes longer is late.
    stall: Duration,
    /// An answer that takes longer is not waited for.
    limit: Duration,
    places: Semaphore,
    /// The ports that are being asked.
    asked: Mutex<HashSet<u16>>,
}

impl ServeLegs {
    /// Asks for `path` every `heartbeat`. An answer that takes over `stall` is late; one over `limit` is not waited for.
    pub fn new(path: String, heartbeat: Duration, stall: Duration, limit: Duration) -> ServeLegs {
        ServeLegs {
            asker: Arc::new(Asker {
                // As a rule, signs of life come further apart than connections are kept.
                caller: Caller::new(false),
                path,
                stall,
                limit,
                places: Semaphore::new(AT_ONCE),
                asked: Mutex::default(),
            }),
            heartbeat,
        }
    }
}

#[async_trait]
impl BackgroundService for ServeLegs {
    async fn start(&self, _shutdown: ShutdownWatch) {
        let (sender, mut requests) = mpsc::channel(WAITING);
        let _ = ASK.set(sender);
        let mut beat = tokio::time::interval(self.heartbeat);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = beat.tick() => {
                    let instances = live::instances();
                    let step = self.heartbeat / (instances.len().max(1) as u32);
                    let (asker, begin) = (self.asker.clone(), tokio::time::Instant::now());
                    tokio::spawn(async move {
                        for (position, instance) in instances.into_iter().enumerate() {
                            // Spread out, so that thousands are not asked in one moment, nor hold memory until they are.
                            tokio::time::sleep_until(begin + step * position as u32).await;
                            let asker = asker.clone();
                            tokio::spawn(async move { asker.ask(&instance).await });
                        }
                    });
                }
                Some((instance, may_restart)) = requests.recv() => {
                    let asker = self.asker.clone();
                    tokio::spawn(async move {
                        asker.ask(&instance).await;
                        let again: &[u64] = if may_restart { &AGAIN } else { &[] };
                        for wait in again {
                            tokio::time::sleep(Duration::from_millis(*wait)).await;
                            asker.ask(&instance).await;
                        }
                    });
                }
            }
        }
    }
}

impl Asker {
    fn asked(&self) -> std::sync::MutexGuard<'_, HashSet<u16>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks an instance for a sign of life, unless that is being done.
    async fn ask(&self, instance: &Instance) {
        let port = instance.port;
        if !self.asked().insert(port) {
            return;
        }
        let Ok(_place) = self.places.acquire().await else {
            return;
        };
        let (asked, then) = (evidence::now(), Instant::now());
        let call = self.caller.get(instance, &self.path, None, self.limit);
        tokio::pin!(call);
        let mut late = None;
        let answer = tokio::select! {
            answer = &mut call => answer,
            () = tokio::time::sleep(self.stall) => {
                let trouble = Trouble {
                    earliest: asked,
                    latest: asked,
                    until: None,
                    kind: Kind::Stall,
                    what: format!("was asked for a sign of life at {} and did not answer", clock(asked)),
                };
                events::serve_leg_trouble("late");
                late = Some(trouble.clone());
                evidence::record(Event::InstanceTrouble { port, trouble });
                call.await
            }
        };
        let now = evidence::now();
        match (answer, late) {
            (Ok(_), late) => {
                events::serve_leg_answered(then.elapsed());
                if let Some(mut trouble) = late {
                    trouble.until = Some(now);
                    trouble.what = format!(
                        "took {:.1} s to give a sign of life, asked at {}",
                        then.elapsed().as_secs_f64(),
                        clock(asked)
                    );
                    evidence::record(Event::InstanceTrouble { port, trouble });
                }
                evidence::record(Event::InstanceWell { port });
            }
            (Err(_), Some(_)) => {}
            (Err(error), None) => {
                let (kind, what) = match error.etype() {
                    ErrorType::ConnectRefused => ("refused", "refused connections"),
                    _ => ("failed", "broke off a request"),
                };
                events::serve_leg_trouble(kind);
                evidence::record(Event::InstanceTrouble {
                    port,
                    trouble: Trouble {
                        earliest: asked,
                        latest: now,
                        until: None,
                        kind: Kind::Cut,
                        what: format!("{what} at {}", clock(now)),
                    },
                });
            }
        }
        self.asked().remove(&port);
    }
}
