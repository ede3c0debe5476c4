//! The operator's listener: `/metrics`, `/healthz` and `/readyz`.

use async_trait::async_trait;
use http::{Response, StatusCode, header};
use pingora::apps::http_app::ServeHttp;
use pingora::protocols::http::ServerSession;

use crate::events;
use crate::pair::mint_fault;

/// Answers the operator. Having been made means that the table is loaded: the service does not start without one.
pub struct Admin {
    mint: Vec<String>,
}

impl Admin {
    /// Readiness depends on `mint` being executable.
    pub fn new(mint: Vec<String>) -> Admin {
        Admin { mint }
    }

    fn respond(&self, path: &str) -> (StatusCode, &'static str, Vec<u8>) {
        const TEXT: &str = "text/plain; charset=utf-8";
        match path {
            "/metrics" => {
                let (text, kind) = events::exposition();
                (StatusCode::OK, kind, text)
            }
            "/healthz" => (StatusCode::OK, TEXT, b"ok\n".into()),
            "/readyz" => match mint_fault(&self.mint) {
                None => (StatusCode::OK, TEXT, b"ready\n".into()),
                Some(fault) => {
                    let text = format!("mint command (dispatch.pairing.mint): {fault}\n");
                    (StatusCode::SERVICE_UNAVAILABLE, TEXT, text.into())
                }
            },
            _ => (
                StatusCode::NOT_FOUND,
                TEXT,
                b"there are /metrics, /healthz and /readyz\n".into(),
            ),
        }
    }
}

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let (status, kind, body) = self.respond(session.req_header().uri.path());
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let length = response.body().len().into();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
        headers.insert(header::CONTENT_LENGTH, length);
        response
    }
}
