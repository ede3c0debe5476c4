//! URLs of legs and of servers for DNS over HTTPS: as written, then in their parts.

use http::Uri;
use tokio_rustls::rustls::pki_types::ServerName;

/// A URL in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Whether TLS goes first.
    pub tls: bool,
    /// The name or address, an IPv6 address without brackets.
    pub host: String,
    /// The port, as written or as the scheme has it.
    pub port: u16,
    /// What follows the host, at least `/`.
    pub path: String,
}

impl Target {
    /// The host as it stands in a URL.
    fn bracketed(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        }
    }

    /// The value of the `Host` header: no port where it is the scheme's own.
    pub fn authority(&self) -> String {
        if self.port == default_port(self.tls) {
            self.bracketed()
        } else {
            format!("{}:{}", self.bracketed(), self.port)
        }
    }

    /// The path with a parameter added to its query.
    pub fn path_with(&self, key: &str, value: &str) -> String {
        let joint = match self.path.split_once('?') {
            None => "?",
            Some((_, query)) if query.is_empty() || query.ends_with('&') => "",
            Some(_) => "&",
        };
        format!("{}{joint}{key}={value}", self.path)
    }
}

/// The scheme, which pages come by, and the host of an origin, without the port where it is the scheme's own: browsers leave it out.
pub fn origin(text: &str) -> Option<(&str, &str)> {
    let (scheme, host) = text.split_once("://")?;
    Some((scheme, without_default_port(scheme, host)?))
}

/// A host without the port where it is that of `scheme`, if pages come by that.
pub fn without_default_port<'a>(scheme: &str, host: &'a str) -> Option<&'a str> {
    let port = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return None,
    };
    Some(host.strip_suffix(port).unwrap_or(host))
}

fn default_port(tls: bool) -> u16 {
    if tls { 443 } else { 80 }
}

/// A URL's scheme, which is one of `schemes`, and its parts.
///
/// # Errors
/// What is wrong with it, and what to write instead.
pub fn target(text: &str, schemes: &[&'static str]) -> Result<(&'static str, Target), String> {
    let wanted = format!("write for example {}://t3.example.com/", schemes[0]);
    // Such a URL is not quoted.
    let authority = text
        .split_once("://")
        .map_or(text, |(_, rest)| rest)
        .split(['/', '?', '#'])
        .next()
        .unwrap_or_default();
    if authority.contains('@') {
        return Err(
            "has credentials in it: leave them out; a token has its place in probe.token_file"
                .into(),
        );
    }
    // The parser would drop it without a word.
    if text.contains('#') {
        return Err(format!(
            "{text:?} has a fragment, which is never sent: leave out what follows the #"
        ));
    }
    let no_url = || format!("{text:?} is not a URL: {wanted}");
    let uri: Uri = text.parse().map_err(|_| no_url())?;
    let scheme = uri.scheme_str().ok_or_else(no_url)?;
    let scheme = schemes
        .iter()
        .find(|known| **known == scheme)
        .ok_or_else(|| format!("{text:?} does not begin with {}://", schemes.join("://, ")))?;
    let host = uri.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    // What is no name for TLS is none for DNS either.
    ServerName::try_from(host).map_err(|_| no_url())?;
    let tls = matches!(*scheme, "wss" | "https");
    let written = uri.authority().is_some_and(|authority| {
        authority
            .as_str()
            .rsplit_once(':')
            .is_some_and(|(_, port)| !port.ends_with(']'))
    });
    let port = match uri.port_u16() {
        Some(0) => return Err(no_url()),
        Some(port) => port,
        None if written => return Err(no_url()),
        None => default_port(tls),
    };
    let path = match uri.path_and_query().map_or("/", |path| path.as_str()) {
        query if query.starts_with('?') => format!("/{query}"),
        "" => "/".into(),
        path => path.into(),
    };
    let target = Target {
        tls,
        host: host.to_owned(),
        port,
        path,
    };
    Ok((scheme, target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_in_their_parts() {
        let parts = |text: &str| {
            let (_, url) = target(text, &["wss", "http"]).unwrap();
            (url.authority(), url.port, url.path_with("leg", "a"))
        };
        for (text, authority, port, path) in [
            ("wss://t3.example.com", "t3.example.com", 443, "/?leg=a"),
            (
                "wss://t3.example.com:443/p",
                "t3.example.com",
                443,
                "/p?leg=a",
            ),
            (
                "http://t3.example.com:443/p?",
                "t3.example.com:443",
                443,
                "/p?leg=a",
            ),
            (
                "http://[::1]:8080/p?q=1",
                "[::1]:8080",
                8080,
                "/p?q=1&leg=a",
            ),
            ("http://[::1]?q&", "[::1]", 80, "/?q&leg=a"),
        ] {
            assert_eq!(parts(text), (authority.into(), port, path.into()), "{text}");
        }
    }
}
