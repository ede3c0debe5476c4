//! The page for the person, under `/.t3-dispatch/`: their drops of the last day, and a test of their own connection.

use std::time::{Duration, SystemTime};

use http::{Method, StatusCode, header};
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::proxy::Session;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::config::Dispatch;
use crate::evidence::clock;
use crate::judge;
use crate::ledger::Ledger;
use crate::refuse::answer;
use crate::story::{Story, edge_name};

/// What belongs to us and not to the instance.
const PREFIX: &str = "/.t3-dispatch";

/// How far back it looks.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Most drops that are shown.
const MOST: usize = 500;

/// Readings of the ledger at once: it is a large file, and people reload.
static READERS: Semaphore = Semaphore::const_new(2);

/// How long one waits for its turn. Whoever has left by then is not told from the others.
const PATIENCE: Duration = Duration::from_secs(5);

const BUSY: (StatusCode, &str) = (
    StatusCode::SERVICE_UNAVAILABLE,
    "too many read the ledger; try again shortly\n",
);
const UNREADABLE: (StatusCode, &str) = (
    StatusCode::INTERNAL_SERVER_ERROR,
    "the ledger cannot be read\n",
);

/// Whether the path is one of ours.
pub fn is_ours(path: &str) -> bool {
    path.strip_prefix(PREFIX)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Answers a request for a path of ours.
///
/// # Errors
/// When the client is gone.
pub async fn serve(session: &mut Session, user: &str, settings: &Dispatch) -> Result<()> {
    let request = session.req_header();
    if !matches!(request.method, Method::GET | Method::HEAD) {
        return plain(
            session,
            StatusCode::METHOD_NOT_ALLOWED,
            "there is only GET here\n",
        )
        .await;
    }
    match &request.uri.path()[PREFIX.len()..] {
        "" => {
            let mut header = ResponseHeader::build(StatusCode::MOVED_PERMANENTLY, Some(2))?;
            header.insert_header(header::LOCATION, "/.t3-dispatch/")?;
            answer(session, header, bytes::Bytes::new()).await
        }
        "/" => page(session).await,
        "/drops" => match drops(user, settings).await {
            Ok(body) => {
                let mut header = ResponseHeader::build(StatusCode::OK, Some(4))?;
                header.insert_header(header::CONTENT_TYPE, "application/json")?;
                header.insert_header(header::CACHE_CONTROL, "no-store")?;
                header.insert_header("X-Content-Type-Options", "nosniff")?;
                answer(session, header, body.into()).await
            }
            Err((status, text)) => plain(session, status, text).await,
        },
        _ => {
            plain(
                session,
                StatusCode::NOT_FOUND,
                "there are / and /drops here\n",
            )
            .await
        }
    }
}

async fn plain(session: &mut Session, status: StatusCode, text: &'static str) -> Result<()> {
    let mut header = ResponseHeader::build(status, Some(3))?;
    header.insert_header(header::CONTENT_TYPE, "text/plain; charset=utf-8")?;
    header.insert_header(header::CACHE_CONTROL, "no-store")?;
    answer(session, header, text.into()).await
}

async fn page(session: &mut Session) -> Result<()> {
    let nonce = nonce();
    let body = include_str!("page.html").replace("NONCE", &nonce);
    // Not every browser takes WebSockets to the own host for 'self'.
    let host = session
        .req_header()
        .headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .filter(|host| {
            host.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".:-[]".contains(&byte))
        })
        .map(|host| format!(" ws://{host} wss://{host}"))
        .unwrap_or_default();
    let policy = format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'{host}; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let mut header = ResponseHeader::build(StatusCode::OK, Some(6))?;
    header.insert_header(header::CONTENT_TYPE, "text/html; charset=utf-8")?;
    header.insert_header(header::CACHE_CONTROL, "no-store")?;
    header.insert_header(header::CONTENT_SECURITY_POLICY, policy)?;
    header.insert_header(header::REFERRER_POLICY, "no-referrer")?;
    header.insert_header("X-Content-Type-Options", "nosniff")?;
    answer(session, header, body.into()).await
}

/// A word that nobody can guess who has not seen the page.
fn nonce() -> String {
    use std::hash::{BuildHasher, RandomState};
    // Each state has keys of its own, from the system's randomness.
    let part = || RandomState::new().hash_one(0_u8);
    format!("{:016x}{:016x}", part(), part())
}

/// The person's drops as the page reads them, or what to say instead.
async fn drops(user: &str, settings: &Dispatch) -> Result<Vec<u8>, (StatusCode, &'static str)> {
    let place = timeout(PATIENCE, READERS.acquire()).await;
    let _place = place.map_err(|_| BUSY)?.map_err(|_| UNREADABLE)?;
    let ledger = Ledger {
        path: settings.tunnels.ledger.clone(),
        limit: u64::MAX,
    };
    let (who, rules) = (user.to_owned(), settings.clone());
    let now = SystemTime::now();
    let since = now - DAY;
    let story =
        tokio::task::spawn_blocking(move || Story::read(&ledger, &rules, Some(&who), since));
    let story = story.await.map_err(|_| UNREADABLE)?;
    let story = story.map_err(|_| UNREADABLE)?;
    let edge = edge_name(&settings.probe.edge_leg);
    let time = |at| humantime::format_rfc3339_millis(at).to_string();
    let told: Vec<_> = story
        .drops
        .iter()
        .take(MOST)
        .map(|drop| {
            let record = &drop.record;
            json!({
                "time": record.time,
                "id": record.id,
                "opened": record.opened,
                "dur_ms": record.dur_ms,
                "ip": record.ip,
                "segment": drop.verdict.segment,
                "confidence": drop.verdict.confidence,
                "final": drop.is_final,
                "evidence": drop.verdict.evidence,
                "sentence": drop.sentence(&clock(record.ended()), &edge),
                "gap_seconds": drop.back.map(|back| back as f64 / 1000.0),
            })
        })
        .collect();
    let body = json!({
        "user": user,
        "now": time(now),
        "since": time(since),
        "names": { "edge": edge },
        "window_seconds": judge::rules(&settings.tunnels).window().as_secs_f64(),
        "drops": told,
        "more": story.drops.len() > MOST,
        "ended_well": story.ended_well,
    });
    Ok(body.to_string().into_bytes())
}
