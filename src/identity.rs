//! Who is asking: the socket peer and the headers it sent, and nothing else.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue};
use pingora::protocols::l4::socket::SocketAddr;

use crate::config::Identity;
use crate::jwt::{TokenError, Tokens, Unproven};

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A host, by the address that it connects from.
    Address(IpAddr),
    /// A program of this machine, on a Unix socket. The file's mode and group have let it in.
    Local,
}

impl Peer {
    /// The peer of a connection between these addresses. A program that connects to a Unix socket has none, as has one that
    /// has gone already: only our own end tells which it is.
    pub fn new(theirs: Option<&SocketAddr>, ours: Option<&SocketAddr>) -> Option<Peer> {
        match (theirs, ours) {
            (Some(SocketAddr::Inet(address)), _) => Some(Peer::Address(address.ip())),
            (_, Some(SocketAddr::Unix(_))) => Some(Peer::Local),
            _ => None,
        }
    }

    /// Its address, if it has one.
    pub fn ip(self) -> Option<IpAddr> {
        match self {
            // A dual-stack listener sees IPv4 peers as ::ffff:a.b.c.d.
            Peer::Address(ip) => Some(ip.to_canonical()),
            Peer::Local => None,
        }
    }
}

impl Identity {
    /// Whether hosts of this address may name people.
    pub fn trusts(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.trusted_proxies
            .iter()
            .any(|network| network.contains(&ip))
    }
}

/// Why nobody is known to ask. All of it fails closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The connection comes from an address that may not name people.
    #[error(
        "{0} may not say who is asking: add it to dispatch.identity.trusted_proxies if it is the sign-on edge"
    )]
    UntrustedPeer(IpAddr),
    /// The identity header is there more than once, or beside one that some servers take for the same.
    #[error("the identity header {0} must be present exactly once and in no other spelling")]
    Ambiguous(HeaderName),
    /// The token names somebody else than the identity header.
    #[error("the token in {0} names somebody else than the identity header")]
    Contradiction(HeaderName),
    /// The token does not prove who is asking.
    #[error("the token in {0} does not prove who is asking: {1}")]
    Token(HeaderName, TokenError),
    /// There are no keys yet that a token could be verified with.
    #[error("there are no keys to verify tokens with yet")]
    NoKeys,
    /// Nobody is named.
    #[error("no user is named")]
    Missing,
}

/// The name of the person who asks, never empty: what the identity header has before its first `@`. Where there have to be
/// signed tokens, it is what `tokens` make of theirs, and the identity header may be absent, but say nothing else.
///
/// # Errors
/// When `peer` is not trusted, or the headers do not name exactly one person.
pub async fn who(
    peer: Peer,
    headers: &HeaderMap,
    rules: &Identity,
    tokens: Option<&Tokens>,
) -> Result<String, IdentityError> {
    if let Some(ip) = peer.ip().filter(|ip| !rules.trusts(*ip)) {
        return Err(IdentityError::UntrustedPeer(ip));
    }
    let named = the_only(headers, &rules.header)?.map(name);
    let (Some(tokens), Some(jwt)) = (tokens, &rules.jwt) else {
        let named = named.ok_or(IdentityError::Missing)??;
        return Ok(named.to_owned());
    };
    let token = the_only(headers, &jwt.header)?.ok_or(IdentityError::Missing)?;
    // Boxed, as it may have to fetch keys and is large: most requests have nothing to verify.
    let claimed = Box::pin(tokens.verify(token.as_bytes())).await;
    let claimed = claimed.map_err(|unproven| match unproven {
        Unproven::Token(error) => IdentityError::Token(jwt.header.clone(), error),
        Unproven::NoKeys => IdentityError::NoKeys,
    })?;
    let claimed = before_at(&claimed).ok_or(IdentityError::Missing)?;
    if named.is_some_and(|named| named.as_deref() != Ok(claimed)) {
        return Err(IdentityError::Contradiction(jwt.header.clone()));
    }
    Ok(claimed.to_owned())
}

/// The value of a header that may be there once, and beside none that some servers take for the same.
fn the_only<'a>(
    headers: &'a HeaderMap,
    header: &HeaderName,
) -> Result<Option<&'a HeaderValue>, IdentityError> {
    let mut found = headers.iter().filter(|(name, _)| looks_like(name, header));
    match (found.next(), found.next()) {
        (None, _) => Ok(None),
        (Some((name, value)), None) if name == header && !is_joined(value) => Ok(Some(value)),
        _ => Err(IdentityError::Ambiguous(header.clone())),
    }
}

/// Whether there are two people behind the first `@`, which ends the name of one: some servers join two lines to one, with a comma
/// (RFC 9110, section 5.3).
fn is_joined(value: &HeaderValue) -> bool {
    let bytes = value.as_bytes().iter();
    bytes
        .skip_while(|byte| **byte != b'@')
        .any(|byte| *byte == b',')
}

fn name(value: &HeaderValue) -> Result<&str, IdentityError> {
    value
        .to_str()
        .ok()
        .and_then(before_at)
        .ok_or(IdentityError::Missing)
}

fn before_at(text: &str) -> Option<&str> {
    text.split('@').next().filter(|name| !name.is_empty())
}

/// The address of the client: of those that trusted proxies have forwarded, the last that is no proxy's itself. Anybody
/// else's word is not taken.
pub fn client(peer: Peer, headers: &HeaderMap, rules: &Identity) -> Option<IpAddr> {
    if let Some(ip) = peer.ip().filter(|ip| !rules.trusts(*ip)) {
        return Some(ip);
    }
    let told: Vec<IpAddr> = forwarded_for(headers).collect();
    let client = told.into_iter().rev().find(|ip| !rules.trusts(*ip));
    client.or(peer.ip())
}

/// The addresses in `X-Forwarded-For`, the client's first. What is no address is left out.
pub fn forwarded_for(headers: &HeaderMap) -> impl Iterator<Item = IpAddr> {
    headers
        .get_all("x-forwarded-for")
        .into_iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter_map(|one| std::str::from_utf8(one).ok()?.trim().parse::<IpAddr>().ok())
        .map(|ip| ip.to_canonical())
}

/// Whether `name` is a header that CGI-style servers fold into the same variable as `header`: they map every character that is
/// no letter or digit to an underscore.
fn looks_like(name: &HeaderName, header: &HeaderName) -> bool {
    let fold = |byte: u8| {
        if byte.is_ascii_alphanumeric() {
            byte
        } else {
            b'_'
        }
    };
    // Nearly always it is that very header, which is sooner told than folded.
    if name == header {
        return true;
    }
    let (name, header) = (name.as_str().as_bytes(), header.as_str().as_bytes());
    name.len() == header.len() && std::iter::zip(name, header).all(|(a, b)| fold(*a) == fold(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Identity {
        Identity {
            header: HeaderName::from_static("x-authentik-username"),
            trusted_proxies: vec![
                "127.0.0.0/8".parse().unwrap(),
                "10.1.0.0/16".parse().unwrap(),
            ],
            jwt: None,
        }
    }

    fn ask(peer: &str, headers: &[(&str, &str)]) -> Result<String, IdentityError> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            map.append(name.parse::<HeaderName>().unwrap(), value);
        }
        let peer = Peer::Address(peer.parse().unwrap());
        futures_util::FutureExt::now_or_never(who(peer, &map, &rules(), None)).unwrap()
    }

    #[test]
    fn the_name_ends_at_the_first_at_sign() {
        for (value, name) in [
            ("alice", "alice"),
            ("alice@example.com", "alice"),
            ("alice@a@b", "alice"),
            ("Alice", "Alice"),
        ] {
            assert_eq!(
                ask("127.0.0.1", &[("X-Authentik-Username", value)]).unwrap(),
                name
            );
        }
        for value in ["", "@example.com", "@", "älice"] {
            let answer = ask("127.0.0.1", &[("X-Authentik-Username", value)]);
            assert_eq!(answer, Err(IdentityError::Missing), "{value:?}");
        }
        assert_eq!(ask("127.0.0.1", &[]), Err(IdentityError::Missing));
    }

    #[test]
    fn only_trusted_peers_are_believed() {
        let named = [("x-authentik-username", "alice")];
        for peer in ["127.0.0.1", "127.9.9.9", "10.1.2.3", "::ffff:127.0.0.1"] {
            assert_eq!(ask(peer, &named).as_deref(), Ok("alice"), "{peer}");
        }
        for peer in [
            "10.2.0.1",
            "192.0.2.1",
            "::1",
            "2001:db8::1",
            "::ffff:192.0.2.1",
        ] {
            assert!(
                matches!(ask(peer, &named), Err(IdentityError::UntrustedPeer(_))),
                "{peer}"
            );
        }
    }

    #[test]
    fn twice_or_in_another_spelling_is_ambiguous() {
        let ambiguous = Err(IdentityError::Ambiguous(rules().header));
        let twice = [
            ("x-authentik-username", "alice"),
            ("X-Authentik-Username", "alice"),
        ];
        assert_eq!(ask("127.0.0.1", &twice), ambiguous);
        for joined in [
            "alice@example.com, bob@example.com",
            "alice@,bob",
            "alice@example.com,",
        ] {
            let joined = [("x-authentik-username", joined)];
            assert_eq!(ask("127.0.0.1", &joined), ambiguous, "{joined:?}");
        }
        for other in [
            "X_authentik_username",
            "X-Authentik.Username",
            "x_authentik-username",
            "X-authentik~username",
        ] {
            let both = [("x-authentik-username", "alice"), (other, "bob")];
            assert_eq!(ask("127.0.0.1", &both), ambiguous, "{other}");
            assert_eq!(
                ask("127.0.0.1", &[(other, "bob")]),
                ambiguous,
                "{other} alone"
            );
        }
        let unlike = [
            ("x-authentik-username", "alice"),
            ("x-authentik-usernames", "bob"),
            ("xauthentikusername", "bob"),
        ];
        assert_eq!(ask("127.0.0.1", &unlike).as_deref(), Ok("alice"));
    }

    #[test]
    fn the_client_is_the_last_address_that_is_no_proxys() {
        let client = |peer: &str, chain: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-forwarded-for", HeaderValue::from_str(chain).unwrap());
            let peer = Peer::Address(peer.parse().unwrap());
            super::client(peer, &headers, &rules()).unwrap().to_string()
        };
        assert_eq!(client("127.0.0.1", "198.51.100.1"), "198.51.100.1");
        assert_eq!(
            client("127.0.0.1", "203.0.113.9, 198.51.100.1, 10.1.0.7"),
            "198.51.100.1"
        );
        // What a client writes itself stands before what the edge adds, and helps it in no way.
        assert_eq!(client("127.0.0.1", "rubbish, 198.51.100.1"), "198.51.100.1");
        assert_eq!(client("127.0.0.1", "10.1.0.7"), "127.0.0.1");
        assert_eq!(client("192.0.2.1", "198.51.100.1"), "192.0.2.1");
    }
}
