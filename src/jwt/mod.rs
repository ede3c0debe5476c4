//! Signed identity: a token and the keys in force say who is asking.

mod keys;
mod provider;

use std::collections::HashMap;
use std::sync::Arc;

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde_json::Value;

use crate::config::Jwt;
pub use keys::{KeyError, Keys, Refresher};

/// How far the clocks of the sign-on and of this machine may differ, in seconds.
const LEEWAY: u64 = 30;

/// Why a token proves nothing. No text of it is in here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is not a token at all, or has a header that demands what is not known here.
    #[error("it is not a signed token")]
    Malformed,
    /// Its algorithm is not in `identity.jwt.algorithms`.
    #[error("its algorithm is not one of dispatch.identity.jwt.algorithms")]
    Algorithm,
    /// No key in force has its `kid` and algorithm.
    #[error("no key in force has its kid and algorithm")]
    UnknownKey,
    /// The signature is not that of the key.
    #[error("its signature is wrong")]
    Signature,
    /// It is over, or has not begun.
    #[error("it is not valid at this time")]
    Time,
    /// It is from somebody else, or for somebody else.
    #[error("its issuer or its audience is not the one in dispatch.identity.jwt")]
    Issuer,
    /// It does not name a person.
    #[error("it has no claim as dispatch.identity.jwt.claim says, or one that is not a name")]
    Claim,
}

/// A key that signs tokens.
#[derive(Debug)]
struct Key {
    algorithm: Algorithm,
    key: DecodingKey,
}

/// The keys of a JWK set that can be used.
#[derive(Debug, Default)]
pub struct KeySet {
    keys: Vec<(Option<String>, Key)>,
}

impl KeySet {
    /// Reads a JWK set (RFC 7517). Keys that are not for signatures, or of a kind that is not known here, are passed over.
    ///
    /// # Errors
    /// When it is no JWK set, or has no key that can be used.
    pub fn parse(text: &[u8]) -> Result<KeySet, KeyError> {
        #[derive(serde::Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        let set: Set = serde_json::from_slice(text).map_err(|_| KeyError::NoSet)?;
        let keys: Vec<_> = set.keys.into_iter().filter_map(usable).collect();
        if keys.is_empty() {
            return Err(KeyError::NoKeys);
        }
        Ok(KeySet { keys })
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is none, which no set that was read is.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The key of that `kid`; without one, the only key for that algorithm.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<&Key> {
        let mut fitting = self.keys.iter().filter(|(id, key)| {
            key.algorithm == algorithm && (kid.is_none() || id.as_deref() == kid)
        });
        let (_, first) = fitting.next()?;
        fitting.next().is_none().then_some(first)
    }
}

/// A key of a JWK set, if tokens may be signed with it.
fn usable(value: Value) -> Option<(Option<String>, Key)> {
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
            Algorithm::ES256
        }
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            Algorithm::EdDSA
        }
        _ => return None,
    };
    let meant = match jwk.common.key_algorithm {
        None => true,
        Some(KeyAlgorithm::RS256) => algorithm == Algorithm::RS256,
        Some(KeyAlgorithm::ES256) => algorithm == Algorithm::ES256,
        Some(KeyAlgorithm::EdDSA) => algorithm == Algorithm::EdDSA,
        Some(_) => false,
    };
    let signs = matches!(
        jwk.common.public_key_use,
        None | Some(PublicKeyUse::Signature)
    );
    if !meant || !signs {
        return None;
    }
    let key = DecodingKey::from_jwk(&jwk).ok()?;
    Some((jwk.common.key_id, Key { algorithm, key }))
}

/// What makes a token good, apart from the keys.
#[derive(Debug)]
pub struct Rules {
    validations: HashMap<Algorithm, Validation>,
    claim: String,
}

impl Rules {
    /// As the settings say.
    pub fn new(settings: &Jwt) -> Rules {
        // Another part of the process may have done so; there is only this one to choose.
        let _ = provider::PROVIDER.install_default();
        let validation = |algorithm: &Algorithm| {
            let mut validation = Validation::new(*algorithm);
            validation.leeway = LEEWAY;
            validation.validate_nbf = true;
            validation.set_issuer(&[&settings.issuer]);
            validation.set_audience(&settings.audience);
            validation.set_required_spec_claims(&["exp", "iss", "aud"]);
            (*algorithm, validation)
        };
        Rules {
            validations: settings.algorithms.iter().map(validation).collect(),
            claim: settings.claim.clone(),
        }
    }

    /// Whom a token names, by the keys of `keys`.
    ///
    /// # Errors
    /// Why it proves nothing.
    pub fn verify(&self, token: &[u8], keys: &KeySet) -> Result<String, TokenError> {
        use jsonwebtoken::errors::ErrorKind;
        let header = decode_header(token).map_err(|error| match error.kind() {
            // An algorithm that has no name here, `none` among them.
            ErrorKind::Json(_) => TokenError::Algorithm,
            _ => TokenError::Malformed,
        })?;
        // What is marked as critical has to be understood (RFC 7515, section 4.1.11), and nothing is.
        if header.crit.is_some() || header.enc.is_some() || header.zip.is_some() {
            return Err(TokenError::Malformed);
        }
        let validation = self
            .validations
            .get(&header.alg)
            .ok_or(TokenError::Algorithm)?;
        let key = keys
            .find(header.kid.as_deref(), header.alg)
            .ok_or(TokenError::UnknownKey)?;
        let claims = decode::<serde_json::Map<String, Value>>(token, &key.key, validation)
            .map_err(|error| match error.kind() {
                ErrorKind::InvalidSignature => TokenError::Signature,
                ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature => TokenError::Time,
                ErrorKind::InvalidIssuer | ErrorKind::InvalidAudience => TokenError::Issuer,
                ErrorKind::MissingRequiredClaim(claim) if claim == "exp" => TokenError::Time,
                ErrorKind::InvalidClaimFormat(_) => TokenError::Time,
                ErrorKind::MissingRequiredClaim(_) => TokenError::Issuer,
                _ => TokenError::Malformed,
            })?
            .claims;
        match claims.get(&self.claim) {
            Some(Value::String(name)) if !name.is_empty() => Ok(name.clone()),
            _ => Err(TokenError::Claim),
        }
    }
}

/// Verifies tokens with the keys in force.
pub struct Tokens {
    rules: Rules,
    keys: Arc<Keys>,
}

/// Why nobody is named by a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unproven {
    /// The token proves nothing.
    Token(TokenError),
    /// No key has ever been had, so that nothing can be proved.
    NoKeys,
}

impl Tokens {
    /// Verifies with `keys`, as their settings say.
    pub fn new(keys: Arc<Keys>) -> Tokens {
        Tokens {
            rules: Rules::new(keys.settings()),
            keys,
        }
    }

    /// Whom a token names. A key that is not known may be a new one, so the keys are asked for, if it is time.
    ///
    /// # Errors
    /// Why nobody is named.
    pub async fn verify(&self, token: &[u8]) -> Result<String, Unproven> {
        let verdict = |keys: Option<Arc<KeySet>>| {
            let keys = keys.ok_or(Unproven::NoKeys)?;
            self.rules.verify(token, &keys).map_err(Unproven::Token)
        };
        match verdict(self.keys.current()) {
            Err(Unproven::Token(TokenError::UnknownKey) | Unproven::NoKeys) => {
                self.keys.ask().await;
                verdict(self.keys.current())
            }
            verdict => verdict,
        }
    }
}
