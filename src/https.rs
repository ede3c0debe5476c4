//! Our own requests to servers that are no instances, with or without TLS.

use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

/// Why there can be no TLS connections at all.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Nobody could be believed.
    #[error(
        "the system has no certificate authorities: install them (ca-certificates), or name a ca_file"
    )]
    NoRoots,
    /// The TLS library refuses.
    #[error("TLS cannot be set up: {0}")]
    Refused(#[from] rustls::Error),
}

/// A byte stream to a server, with or without TLS.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// TLS that believes `roots`, and the system's certificate authorities where those are `needed`.
///
/// # Errors
/// When they are needed and there are none.
pub fn tls(roots: &[CertificateDer<'static>], needed: bool) -> Result<ClientConfig, TlsError> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(roots.iter().cloned());
    if needed {
        store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if store.is_empty() {
            return Err(TlsError::NoRoots);
        }
    }
    let mut tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(store)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(tls)
}

/// Why a request has no whole answer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// There was none.
    #[error("instead of an answer: {}", chain(.0))]
    NoAnswer(#[from] hyper::Error),
    /// It broke off, or was longer than it may be.
    #[error("within the answer: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
}

/// Sends a request and reads its answer, the body of which is read where the status is 200, for `most` bytes at most.
///
/// # Errors
/// When there is no whole answer.
pub async fn exchange(
    stream: impl Connection + 'static,
    request: Request<Empty<Bytes>>,
    most: usize,
) -> Result<Response<Bytes>, ExchangeError> {
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let ask = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        if head.status != StatusCode::OK {
            return Ok(Response::from_parts(head, Bytes::new()));
        }
        match Limited::new(body, most).collect().await {
            Ok(body) => Ok(Response::from_parts(head, body.to_bytes())),
            Err(error) => Err(ExchangeError::Body(error)),
        }
    };
    tokio::pin!(connection, ask);
    // The connection does the work for the request, and may be done first.
    let mut open = true;
    loop {
        tokio::select! {
            answer = &mut ask => return answer,
            _ = &mut connection, if open => open = false,
        }
    }
}

/// An error with its causes, which hyper leaves out of its text.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}
