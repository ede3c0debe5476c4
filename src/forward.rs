//! Passing on: the peer's options, and the headers out and back.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::HttpPeer;
use pingora::protocols::TcpKeepalive;
use pingora::protocols::http::authority::{RawTargetAuthority, raw_target_authority};
use pingora::upstreams::peer::HttpUpstreamRequestPolicy;
use pingora::{Error, ErrorType, OrErr, Result};

use crate::config::url;
use crate::gate::GatedConnect;
use crate::instance::{address, peer};
use crate::pool::Checkout;
use crate::refuse::ERROR_HEADER;
use crate::table::Instance;
use crate::tunnel::live::Tunnel;

static FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// What a request has of those headers that say how it is passed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    /// A `Transfer-Encoding`.
    pub coding: bool,
    /// An `Upgrade`.
    pub upgrade: bool,
    /// A body, or a word of one.
    pub body: bool,
    /// Any that belongs to one connection, and so must not be passed on.
    pub hop_by_hop: bool,
}

impl Shape {
    /// One look at all headers, instead of a search for each.
    pub fn of(headers: &HeaderMap) -> Shape {
        let mut shape = Shape::default();
        for (name, value) in headers {
            match name.as_str() {
                "content-length" => shape.body |= value != "0",
                "transfer-encoding" => (shape.coding, shape.body) = (true, true),
                "upgrade" => shape.upgrade = true,
                "connection" | "http2-settings" => shape.hop_by_hop = true,
                name => shape.hop_by_hop |= is_hop_by_hop(name),
            }
        }
        shape.hop_by_hop |= shape.coding || shape.upgrade;
        shape
    }
}

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

/// Whether a request does not say what it is for in a way that everybody reads alike: by a path or a URL, and a host
/// (RFC 9112, section 3.2).
pub fn is_malformed(request: &RequestHeader) -> bool {
    let target = request.raw_path();
    let absolute = matches!(
        raw_target_authority(target),
        RawTargetAuthority::Absolute { .. }
    );
    let asterisk = target == b"*" && request.method == Method::OPTIONS;
    let has_host = match request.headers.get(header::HOST) {
        Some(host) => host.is_empty() || is_host(host.as_bytes()),
        None => absolute || request.version < Version::HTTP_11,
    };
    !has_host || !(target.starts_with(b"/") || absolute || asterisk)
}

/// Whether these bytes are a host, with or without a port.
fn is_host(bytes: &[u8]) -> bool {
    // Most are plain names, about which nobody has to ask a parser.
    let (name, port) = match bytes.iter().rposition(|byte| *byte == b':') {
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
        None => (bytes, &b"80"[..]),
    };
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
    let is_number = port.iter().all(u8::is_ascii_digit);
    let is_port = matches!(port.len(), 1..=4) || port.len() == 5 && port <= &b"65535"[..];
    if !name.is_empty() && name.iter().all(is_plain) && is_number && is_port {
        return true;
    }
    Authority::try_from(bytes)
        .is_ok_and(|authority| authority.as_str() == authority.host() || authority.port().is_some())
}

/// Whether a 101 says that what follows is a WebSocket. HTTP/1.0 has none, and Pingora would switch on one side only.
pub fn switches_to_websocket(response: &ResponseHeader) -> bool {
    response.version == Version::HTTP_11
        && has_token(&response.headers, header::UPGRADE, "websocket")
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

/// Notices a peer that is gone, without a FIN, within a minute: silent ones by probes, others by what they do not
/// acknowledge.
pub fn keepalive() -> TcpKeepalive {
    TcpKeepalive {
        idle: Duration::from_secs(20),
        interval: Duration::from_secs(10),
        count: 3,
        user_timeout: Duration::from_secs(45),
    }
}

/// Whether a page of the request's origin may open a WebSocket here: one from the host that the request names, or from
/// one of `allowed`. Sibling sites share the instance's cookie, and the instance itself does not look. A client that is
/// no browser sends no origin.
pub fn is_origin_allowed(headers: &HeaderMap, allowed: &[String]) -> bool {
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let Some(origin) = origins.next() else {
        return true;
    };
    let (Ok(origin), None) = (origin.to_str(), origins.next()) else {
        return false;
    };
    let origin = origin.to_ascii_lowercase();
    let Some((scheme, from)) = url::origin(&origin) else {
        return false;
    };
    if allowed.contains(&format!("{scheme}://{from}")) {
        return true;
    }
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default()
        .to_ascii_lowercase();
    !from.is_empty() && url::without_default_port(scheme, &host) == Some(from)
}

/// The peer for a request to `instance`, and whether that is a connection which was used before.
///
/// A kept connection may be closed by the instance at the moment it is used again. Pingora then repeats the request,
/// but only where that `may_repeat` and nothing of a body is lost; every other request gets a connection of its own.
/// So does an upgrade: an instance that refuses one says `keep-alive` and closes.
pub fn peer_for(
    instance: &Instance,
    may_repeat: bool,
    shape: Shape,
    tunnel: Option<&Arc<Tunnel>>,
) -> (HttpPeer, bool) {
    let (mut peer, is_reused) = if let Some(tunnel) = tunnel {
        let tunnel = tunnel.clone();
        let mut peer = peer(instance, Arc::new(GatedConnect { tunnel }));
        peer.options.tcp_keepalive = Some(keepalive());
        (peer, false)
    } else {
        let keep = may_repeat && !shape.body;
        let checkout = Checkout::new(keep.then(|| instance.pool()));
        let is_reused = checkout.is_reused();
        (peer(instance, Arc::new(checkout)), is_reused)
    };
    // Pingora searches for a dozen headers to remove. Most requests have none of them.
    if !shape.hop_by_hop {
        peer.options.http_upstream_request_policy = HttpUpstreamRequestPolicy::preserve();
    }
    (peer, is_reused)
}

/// Makes of the head of a request what its instance, which listens on `port`, gets: without the `token`, and with the address
/// of the `client`. A WebSocket handshake keeps how its headers are spelled, as some server may look for them by hand.
///
/// # Errors
/// When a header or the target cannot be written.
pub fn request_head(
    request: &mut RequestHeader,
    port: u16,
    token: Option<&HeaderName>,
    client: Option<HeaderValue>,
    is_tunnel: bool,
) -> Result<()> {
    origin_form(request)?;
    // A client of HTTP/1.0 need not name a host, but an instance wants one.
    if request.version < Version::HTTP_11 && !request.headers.contains_key(header::HOST) {
        request.insert_header(header::HOST, address(port).to_string())?;
    }
    // A token is good for more than this instance.
    if let Some(token) = token {
        request.remove_header(token);
    }
    let chain = client.map(|client| forwarded_for(&request.headers, client));
    match chain.transpose()? {
        Some(chain) if is_tunnel => request.insert_header("X-Forwarded-For", chain),
        None if is_tunnel => Ok(()),
        chain => forget_spelling(request, chain),
    }
}

/// Pingora keeps how the names of headers are spelled beside the headers, and would copy both. They are the same names
/// however they are spelled (RFC 9110, section 5.1). The `chain` is added meanwhile, as that takes least then.
fn forget_spelling(request: &mut RequestHeader, chain: Option<HeaderValue>) -> Result<()> {
    // What the URI cannot tell.
    let target = (!request.raw_path_is_utf8()).then(|| request.raw_path().to_vec());
    let nothing: Parts = http::Request::new(()).into_parts().0;
    let mut parts: Parts = mem::replace(request, nothing.into()).into();
    if let Some(chain) = chain {
        parts.headers.insert(FORWARDED_FOR.clone(), chain);
    }
    *request = parts.into();
    target.map_or(Ok(()), |target| request.set_raw_path(&target))
}

/// Makes `GET http://host/path` what it means, `GET /path` with that Host: instances know only the latter.
fn origin_form(request: &mut RequestHeader) -> Result<()> {
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
    Ok(())
}

/// Those that a request has been forwarded for, and the client.
fn forwarded_for(headers: &HeaderMap, client: HeaderValue) -> Result<HeaderValue> {
    let told = headers.get_all(&FORWARDED_FOR);
    let length = told.iter().map(|value| value.len() + 2).sum::<usize>();
    if length == 0 {
        return Ok(client);
    }
    // Of exactly that size, as what is left over would be given back by a copy.
    let mut chain = Vec::with_capacity(length + client.len());
    for value in told {
        chain.extend_from_slice(value.as_bytes());
        chain.extend_from_slice(b", ");
    }
    chain.extend_from_slice(client.as_bytes());
    HeaderValue::try_from(chain).or_err(ErrorType::InvalidHTTPHeader, "X-Forwarded-For")
}

/// Whether a header belongs to one connection (RFC 9110, section 7.6.1), whichever way it goes.
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "upgrade"
    )
}

/// Whether a header of a response must not reach the client: those that belong to one connection, as far as Pingora leaves them
/// there, and the one that tells whose answer a refusal is, which must be ours.
fn has_to_go(name: &str) -> bool {
    is_hop_by_hop(name) || name.eq_ignore_ascii_case(ERROR_HEADER)
}

/// Readies the head of a response for the client, which spoke `version`.
///
/// # Errors
/// When it does not tell the end of its body in one way only. The connection to the edge is other people's next.
pub fn response_head(response: &mut ResponseHeader, version: Version) -> Result<()> {
    // What most responses have nothing of, one look at their headers tells.
    let (mut codings, mut lengths, mut is_clear) = (0, 0, true);
    let (mut nominates, mut goes) = (false, false);
    for (name, value) in &response.headers {
        match name.as_str() {
            "transfer-encoding" => {
                codings += 1;
                is_clear &= value == "chunked";
            }
            "content-length" => {
                lengths += 1;
                is_clear &= value.as_bytes().iter().all(u8::is_ascii_digit);
            }
            "connection" => nominates |= value != "keep-alive" && value != "close",
            name => goes |= has_to_go(name),
        }
    }
    if !is_clear || codings > 1 || lengths > 1 {
        return Error::e_explain(
            ErrorType::InvalidHTTPHeader,
            "an answer that can be read in two ways",
        );
    }
    // A proxy speaks its own version, whatever the instance speaks (RFC 9110, section 6.2).
    response.set_version(Version::HTTP_11);
    if response.status == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(());
    }
    if nominates {
        let nominated: Vec<HeaderName> = tokens(&response.headers, header::CONNECTION)
            .filter(|token| !matches!(*token, b"close" | b"keep-alive"))
            .filter_map(|name| HeaderName::from_bytes(name).ok())
            .filter(|name| !matches!(*name, header::CONTENT_LENGTH | header::TRANSFER_ENCODING))
            .collect();
        for name in &nominated {
            response.remove_header(name);
        }
    }
    while goes
        && let Some(name) = response
            .headers
            .keys()
            .find(|name| has_to_go(name.as_str()))
            .cloned()
    {
        response.remove_header(&name);
    }
    // Neither has a body (RFC 9112, section 6.3).
    if response.status.is_informational() || response.status == StatusCode::NO_CONTENT {
        response.remove_header(&header::CONTENT_LENGTH);
        response.remove_header(&header::TRANSFER_ENCODING);
    }
    // HTTP/1.0 has no chunks: the body ends with the connection.
    if version < Version::HTTP_11 {
        response.remove_header(&header::TRANSFER_ENCODING);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_and_perhaps_a_port() {
        for host in [
            "t3.example.com",
            "t3.example.com:443",
            "t3.example.com:0",
            "t3.example.com:65535",
            "T3-dev.example.com",
            "t3_dev.example.com",
            "127.0.0.1:3780",
            "[::1]",
            "[::1]:3780",
            "localhost",
        ] {
            assert!(is_host(host.as_bytes()), "{host}");
            assert!(Authority::try_from(host).is_ok(), "{host}");
        }
        for host in [
            "t3.example.com:",
            "t3.example.com:65536",
            "t3.example.com:12345678",
            "t3.example.com:4x",
            "t3.example.com:443:443",
            "alice@t3.example.com",
            "t3.example.com/x",
            "t3 example.com",
            "[::1",
            "::1",
        ] {
            assert!(!is_host(host.as_bytes()), "{host}");
        }
    }

    #[test]
    fn an_instance_gets_the_same_request_and_who_sent_it() {
        let targets = [&b"/a/b?c=d"[..], b"*", b"?c", b"/\xff"];
        let heads = [
            (
                true,
                "X-One: 1\r\nx-oNE: 2\r\nX-Forwarded-For: 192.0.2.7\r\n",
            ),
            (
                false,
                "x-one: 1\r\nx-one: 2\r\nx-forwarded-for: 192.0.2.7\r\n",
            ),
        ];
        let all = targets
            .iter()
            .flat_map(|target| heads.map(|head| (*target, head)));
        for (target, (is_tunnel, head)) in all {
            let mut request = RequestHeader::build("OPTIONS", target, None).unwrap();
            for (name, value) in [("X-One", "1"), ("x-oNE", "2"), ("Token", "secret")] {
                request.append_header(name, value).unwrap();
            }
            let before = request.clone();
            let client = HeaderValue::from_static("192.0.2.7");
            let token = HeaderName::from_static("token");
            request_head(&mut request, 3780, Some(&token), Some(client), is_tunnel).unwrap();
            assert_eq!(request.raw_path(), target);
            assert_eq!(request.raw_path_is_utf8(), before.raw_path_is_utf8());
            assert_eq!(request.uri, before.uri);
            assert_eq!(request.method, before.method);
            assert_eq!(request.version, before.version);
            let mut written = Vec::new();
            request.header_to_h1_wire(&mut written);
            assert_eq!(String::from_utf8(written).unwrap(), head);
        }
    }

    #[test]
    fn a_page_may_open_sockets_to_its_own_host() {
        let allowed = ["https://other.example.com".to_owned()];
        let is = |host: &str, origins: &[&str]| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
            for origin in origins {
                headers.append(header::ORIGIN, HeaderValue::from_str(origin).unwrap());
            }
            is_origin_allowed(&headers, &allowed)
        };
        assert!(is("t3.example.com", &[]));
        assert!(is("t3.example.com", &["https://t3.example.com"]));
        assert!(is("T3.Example.com", &["https://t3.example.COM"]));
        assert!(is("t3.example.com:443", &["https://t3.example.com"]));
        assert!(is("t3.example.com", &["http://t3.example.com:80"]));
        assert!(is("127.0.0.1:3780", &["http://127.0.0.1:3780"]));
        assert!(is("[::1]:3780", &["http://[::1]:3780"]));
        assert!(is("t3.example.com", &["https://other.example.com"]));
        for origin in [
            "https://evil.example.com",
            "https://t3.example.com.evil.example.com",
            "https://evil-t3.example.com",
            "https://t3.example.com:8443",
            "https://user@t3.example.com",
            "t3.example.com",
            "file://t3.example.com",
            "https://",
            "null",
            "",
        ] {
            assert!(!is("t3.example.com", &[origin]), "{origin}");
        }
        assert!(!is(
            "t3.example.com",
            &["https://t3.example.com", "https://t3.example.com"]
        ));
        assert!(!is("", &["https://"]));
    }
}
