//! Passing on: the peer's options, and the headers out and back.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::HttpPeer;
use pingora::protocols::http::authority::{RawTargetAuthority, raw_target_authority};

use crate::gate::GatedConnect;
use crate::instance::{IDLE, peer};
use crate::table::{Instance, unique};

/// Headers that belong to one connection (RFC 9110, section 7.6.1), as far as Pingora leaves them in a response.
const HOP_BY_HOP: [&str; 6] = [
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "te",
    "trailer",
    "upgrade",
];

/// Whether the request asks for a WebSocket (RFC 6455, section 4.1) and nothing else: such a request alone may turn
/// into a tunnel.
pub fn is_websocket(request: &RequestHeader) -> bool {
    let headers = &request.headers;
    request.method == Method::GET
        && request.version == Version::HTTP_11
        && has_token(headers, header::UPGRADE, "websocket")
        && has_token(headers, header::CONNECTION, "upgrade")
        && !headers.contains_key(header::TRANSFER_ENCODING)
        && headers
            .get(header::CONTENT_LENGTH)
            .is_none_or(|length| length == "0")
}

fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|one| one.eq_ignore_ascii_case(token.as_bytes()))
}

fn tokens(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &[u8]> {
    headers
        .get_all(name)
        .into_iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
}

/// The peer for a request to `instance`.
///
/// A kept connection may be closed by the instance at the moment it is used again. Pingora then repeats the request,
/// but only where that does no harm and nothing of a body is lost; every other request gets a connection of its own.
/// So does an upgrade: an instance that refuses one says `keep-alive` and closes.
pub fn peer_for(instance: &Instance, request: &RequestHeader) -> HttpPeer {
    let has_body = request.headers.contains_key(header::TRANSFER_ENCODING)
        || request
            .headers
            .get(header::CONTENT_LENGTH)
            .is_some_and(|length| length != "0");
    let upgrade = request.headers.contains_key(header::UPGRADE);
    let keep = request.method.is_idempotent() && !has_body && !upgrade;
    let mut peer = peer(
        instance.port,
        if keep { instance.generation } else { unique() },
    );
    peer.options.idle_timeout = Some(if keep { IDLE } else { Duration::ZERO });
    if upgrade {
        peer.options.custom_l4 = Some(Arc::new(GatedConnect));
    }
    peer
}

/// Readies the head of a request for the instance. Pingora has removed the hop-by-hop headers by then.
///
/// # Errors
/// When a header cannot be written.
pub fn request_head(request: &mut RequestHeader, client: Option<IpAddr>) -> Result<()> {
    // `GET http://host/path` asks for the same as `GET /path` with that Host; instances know only the latter.
    if let RawTargetAuthority::Absolute {
        authority,
        path_and_query,
        ..
    } = raw_target_authority(request.raw_path())
    {
        let host = HeaderValue::from_bytes(authority).ok();
        let slash: &[u8] = if path_and_query.starts_with(b"/") {
            b""
        } else {
            b"/"
        };
        let target = [slash, path_and_query].concat();
        request.set_raw_path(&target)?;
        if let Some(host) = host {
            request.insert_header(header::HOST, host)?;
        }
    }
    let Some(client) = client else { return Ok(()) };
    let name = HeaderName::from_static("x-forwarded-for");
    let mut chain = Vec::new();
    for value in request.headers.get_all(&name) {
        chain.extend_from_slice(value.as_bytes());
        chain.extend_from_slice(b", ");
    }
    chain.extend_from_slice(client.to_canonical().to_string().as_bytes());
    request.insert_header("X-Forwarded-For", chain)
}

/// Readies the head of a response for the client, which spoke `version`.
pub fn response_head(response: &mut ResponseHeader, version: Version) {
    if response.status == StatusCode::SWITCHING_PROTOCOLS {
        return;
    }
    let nominated: Vec<HeaderName> = tokens(&response.headers, header::CONNECTION)
        .filter_map(|name| HeaderName::from_bytes(name).ok())
        .filter(|name| !matches!(*name, header::CONTENT_LENGTH | header::TRANSFER_ENCODING))
        .collect();
    for name in &nominated {
        response.remove_header(name);
    }
    for name in HOP_BY_HOP {
        response.remove_header(name);
    }
    // HTTP/1.0 has no chunks: the body ends with the connection.
    if version < Version::HTTP_11 {
        response.remove_header(&header::TRANSFER_ENCODING);
    }
}
