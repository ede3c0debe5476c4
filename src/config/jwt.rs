//! The section `dispatch.identity.jwt`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use http::HeaderName;
use jsonwebtoken::Algorithm;
use tokio_rustls::rustls::pki_types::CertificateDer;

use super::header_name;
use super::section::{Section, certificates, duration, filled};
use super::url::{Target, target};

/// How a signed token says who is asking.
#[derive(Debug, Clone, PartialEq)]
pub struct Jwt {
    /// The header that carries it.
    pub header: HeaderName,
    /// Where the keys are.
    pub jwks: Jwks,
    /// Certificate authorities that are believed about that place, beside the system's.
    pub roots: Vec<CertificateDer<'static>>,
    /// Algorithms that it may be signed with.
    pub algorithms: Vec<Algorithm>,
    /// Who issues it.
    pub issuer: String,
    /// Whom it is issued for: one of these.
    pub audience: Vec<String>,
    /// The claim that names the person.
    pub claim: String,
    /// How often the keys are fetched anew.
    pub refresh: Duration,
}

/// Where a JWK set is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Jwks {
    /// A file.
    File(PathBuf),
    /// A server.
    Url(Target),
}

impl fmt::Display for Jwks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Jwks::File(path) => write!(f, "{}", path.display()),
            Jwks::Url(url) => {
                let scheme = if url.tls { "https" } else { "http" };
                write!(f, "{scheme}://{}{}", url.authority(), url.path)
            }
        }
    }
}

impl Jwt {
    /// The section, unless a part of it is missing or faulty, which is then told.
    pub(super) fn read(section: &mut Section<'_>) -> Option<Jwt> {
        let header = section.take("header", "X-authentik-jwt", header_name);
        let jwks = section.require("jwks", "write the URL or the path of the JWK set", jwks);
        let roots = section.take("ca_file", None::<()>, |file: Option<PathBuf>| {
            file.map_or(Ok(Vec::new()), |file| certificates(&file))
        });
        let algorithms = section.take_list("algorithms", &["RS256", "ES256", "EdDSA"], algorithm);
        let issuer = section.require("issuer", "write what the tokens have as iss", text);
        let audience = section.take_list("audience", &[], text);
        let claim = section.take("claim", "preferred_username", text);
        let refresh = section.take("refresh", "10m", duration);
        if audience.is_empty() && !section.is_faulty("audience") {
            section.fault("audience", "is missing: write what the tokens have as aud");
        }
        if algorithms.is_empty() && !section.is_faulty("algorithms") {
            section.fault("algorithms", "is empty: write RS256, ES256 or EdDSA");
        }
        Some(Jwt {
            header,
            jwks: jwks?,
            roots,
            algorithms,
            issuer: issuer?,
            audience,
            claim,
            refresh,
        })
    }
}

fn text(text: String) -> Result<String, String> {
    filled(text, |text| text.is_empty(), "a text")
}

fn jwks(text: String) -> Result<Jwks, String> {
    if text.starts_with('/') {
        return Ok(Jwks::File(text.into()));
    }
    target(&text, &["https", "http"])
        .map(|(_, url)| Jwks::Url(url))
        .map_err(|what| what + ", or the path of a file from / on")
}

/// An algorithm with a public key. `none` and HMACs, which are signed with what verifies them, are not to be had.
fn algorithm(name: String) -> Result<Algorithm, String> {
    match name.as_str() {
        "RS256" => Ok(Algorithm::RS256),
        "ES256" => Ok(Algorithm::ES256),
        "EdDSA" => Ok(Algorithm::EdDSA),
        _ => Err(format!(
            "{name:?} is not an algorithm here: write RS256, ES256 or EdDSA"
        )),
    }
}
