//! Who is asking: the socket peer and the headers it sent, and nothing else.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName};

use crate::config::Identity;

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
    /// Nobody is named.
    #[error("no user is named")]
    Missing,
}

/// The name of the person who asks: the identity header's value up to its first `@`, never empty.
///
/// # Errors
/// When `peer` is not trusted, or the headers do not name exactly one person.
pub fn who<'a>(
    peer: IpAddr,
    headers: &'a HeaderMap,
    rules: &Identity,
) -> Result<&'a str, IdentityError> {
    // A dual-stack listener sees IPv4 peers as ::ffff:a.b.c.d.
    let peer = peer.to_canonical();
    if !rules
        .trusted_proxies
        .iter()
        .any(|network| network.contains(&peer))
    {
        return Err(IdentityError::UntrustedPeer(peer));
    }
    let ambiguous = || IdentityError::Ambiguous(rules.header.clone());
    if headers.keys().any(|name| looks_like(name, &rules.header)) {
        return Err(ambiguous());
    }
    let mut values = headers.get_all(&rules.header).iter();
    let value = values.next().ok_or(IdentityError::Missing)?;
    if values.next().is_some() {
        return Err(ambiguous());
    }
    let name = value.to_str().map_err(|_| IdentityError::Missing)?;
    match name.split('@').next() {
        Some(name) if !name.is_empty() => Ok(name),
        _ => Err(IdentityError::Missing),
    }
}

/// The address of the client: of those that trusted proxies have forwarded, the last that is no proxy's itself. Anybody
/// else's word is not taken.
pub fn client(peer: IpAddr, headers: &HeaderMap, rules: &Identity) -> IpAddr {
    let trusted = |ip: &IpAddr| {
        rules
            .trusted_proxies
            .iter()
            .any(|network| network.contains(ip))
    };
    let peer = peer.to_canonical();
    if !trusted(&peer) {
        return peer;
    }
    let mut told: Vec<IpAddr> = forwarded_for(headers).collect();
    while let Some(ip) = told.pop() {
        if !trusted(&ip) {
            return ip;
        }
    }
    peer
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

/// Whether `name` is another header that CGI-style servers fold into the same variable as `header`: they map every
/// character that is no letter or digit to an underscore.
fn looks_like(name: &HeaderName, header: &HeaderName) -> bool {
    let fold = |byte: u8| {
        if byte.is_ascii_alphanumeric() {
            byte
        } else {
            b'_'
        }
    };
    let (name, header) = (name.as_str().as_bytes(), header.as_str().as_bytes());
    name.len() == header.len()
        && name != header
        && std::iter::zip(name, header).all(|(a, b)| fold(*a) == fold(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn rules() -> Identity {
        Identity {
            header: HeaderName::from_static("x-authentik-username"),
            trusted_proxies: vec![
                "127.0.0.0/8".parse().unwrap(),
                "10.1.0.0/16".parse().unwrap(),
            ],
        }
    }

    fn ask(peer: &str, headers: &[(&str, &str)]) -> Result<String, IdentityError> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let value = HeaderValue::from_bytes(value.as_bytes()).unwrap();
            map.append(name.parse::<HeaderName>().unwrap(), value);
        }
        who(peer.parse().unwrap(), &map, &rules()).map(str::to_owned)
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
            super::client(peer.parse().unwrap(), &headers, &rules()).to_string()
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
