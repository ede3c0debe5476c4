//! The operator's listener: `/metrics`, `/healthz`, `/readyz` and `/closes`.

use std::borrow::Cow;
use std::time::SystemTime;

use async_trait::async_trait;
use http::{Response, StatusCode, header};
use pingora::apps::http_app::ServeHttp;
use pingora::protocols::http::ServerSession;

use crate::config::Mint;
use crate::events;
use crate::ledger::Ledger;
use crate::mint::mint_fault;

/// Records that `/closes` gives where the query does not say, and at most.
const RECORDS: usize = 100;
const MOST_RECORDS: usize = 10_000;

const TEXT: &str = "text/plain; charset=utf-8";

type Reply = (StatusCode, &'static str, Vec<u8>);

/// Answers the operator. Having been made means that the table is loaded: the service does not start without one.
pub struct Admin {
    mint: Mint,
    ledger: Ledger,
}

impl Admin {
    /// Readiness depends on what can be told of `mint` without minting; `/closes` reads `ledger`.
    pub fn new(mint: Mint, ledger: Ledger) -> Admin {
        Admin { mint, ledger }
    }

    fn respond(&self, path: &str, query: &str) -> Reply {
        match path {
            "/metrics" => {
                let (text, kind) = events::exposition();
                (StatusCode::OK, kind, text)
            }
            "/healthz" => (StatusCode::OK, TEXT, b"ok\n".into()),
            "/readyz" => match mint_fault(&self.mint) {
                None => (StatusCode::OK, TEXT, b"ready\n".into()),
                Some(fault) => {
                    let text = format!("mint ({}): {fault}\n", self.mint.key());
                    (StatusCode::SERVICE_UNAVAILABLE, TEXT, text.into())
                }
            },
            "/closes" => self
                .closes(query)
                .unwrap_or_else(|error| (StatusCode::BAD_REQUEST, TEXT, error.into())),
            _ => (
                StatusCode::NOT_FOUND,
                TEXT,
                b"there are /metrics, /healthz, /readyz and /closes\n".into(),
            ),
        }
    }

    /// The newest records that the query asks for, by `user`, `since` (RFC 3339, or a duration before now) and `limit`.
    fn closes(&self, query: &str) -> Result<Reply, String> {
        let (mut user, mut since, mut limit) = (None, None, RECORDS);
        for (key, value) in query.split('&').filter(|pair| !pair.is_empty()).map(pair) {
            match &*key {
                "user" => user = Some(value),
                "since" => {
                    let at = humantime::parse_rfc3339_weak(&value).ok();
                    let ago =
                        || SystemTime::now().checked_sub(humantime::parse_duration(&value).ok()?);
                    since = Some(at.or_else(ago).ok_or_else(|| {
                        format!("since={value}: write a time such as 2026-01-02T15:04:05Z, or a duration such as 1h\n")
                    })?);
                }
                "limit" => {
                    let number = value
                        .parse()
                        .ok()
                        .filter(|number| (1..=MOST_RECORDS).contains(number));
                    limit = number.ok_or_else(|| {
                        format!("limit={value}: write a number from 1 to {MOST_RECORDS}\n")
                    })?;
                }
                other => return Err(format!("{other}: the keys are user, since and limit\n")),
            }
        }
        Ok(match self.ledger.newest(user.as_deref(), since, limit) {
            Ok(found) => (
                StatusCode::OK,
                "application/json",
                format!("{:#}\n", serde_json::json!(found.records)).into(),
            ),
            Err(error) => {
                let text = format!("{}: {error}\n", self.ledger.path.display());
                (StatusCode::INTERNAL_SERVER_ERROR, TEXT, text.into())
            }
        })
    }
}

/// A key and its value, as a query writes them.
fn pair(text: &str) -> (Cow<'_, str>, Cow<'_, str>) {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    let decoded = |text| percent_encoding::percent_decode_str(text).decode_utf8_lossy();
    (decoded(key), decoded(value))
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let (status, kind, body) = {
            let uri = &session.req_header().uri;
            self.respond(uri.path(), uri.query().unwrap_or_default())
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let length = response.body().len().into();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
        headers.insert(header::CONTENT_LENGTH, length);
        response
    }
}
