//! A stand-in for the sign-on's tokens: keys of each kind, tokens signed with them, and a server of their JWK set.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

pub const ISSUER: &str = "https://authentik.example.com/application/o/t3/";
pub const AUDIENCE: &str = "t3";

pub fn base64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A key that signs tokens.
pub enum Signer {
    Es256(Box<EcdsaKeyPair>),
    EdDsa(Ed25519KeyPair),
    /// Ring makes no such keys, so OpenSSL does.
    Rs256(TempDir),
}

fn openssl(folder: &TempDir, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    std::fs::write(folder.path().join("input"), input).unwrap();
    let output = Command::new("openssl")
        .args(arguments)
        .current_dir(folder.path())
        .output()
        .expect("openssl is installed");
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

impl Signer {
    pub fn es256() -> Signer {
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap();
        Signer::Es256(Box::new(pair))
    }

    pub fn eddsa() -> Signer {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Signer::EdDsa(Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap())
    }

    pub fn rs256() -> Signer {
        let folder = TempDir::new().unwrap();
        let bits = "rsa_keygen_bits:2048";
        openssl(
            &folder,
            &[
                "genpkey",
                "-algorithm",
                "RSA",
                "-pkeyopt",
                bits,
                "-out",
                "key",
            ],
            b"",
        );
        Signer::Rs256(folder)
    }

    pub fn algorithm(&self) -> &'static str {
        match self {
            Signer::Es256(_) => "ES256",
            Signer::EdDsa(_) => "EdDSA",
            Signer::Rs256(_) => "RS256",
        }
    }

    /// The public key as bytes: what a careless verifier would take for the secret of an HMAC.
    pub fn public(&self) -> Vec<u8> {
        match self {
            Signer::Es256(pair) => pair.public_key().as_ref().to_vec(),
            Signer::EdDsa(pair) => pair.public_key().as_ref().to_vec(),
            Signer::Rs256(folder) => openssl(folder, &["rsa", "-in", "key", "-pubout"], b""),
        }
    }

    /// The public key as a JWK.
    pub fn jwk(&self, kid: &str) -> Value {
        let mut jwk = match self {
            Signer::Es256(pair) => {
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                json!({ "kty": "EC", "crv": "P-256", "x": base64(x), "y": base64(y) })
            }
            Signer::EdDsa(pair) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "x": base64(pair.public_key()) })
            }
            Signer::Rs256(folder) => {
                let told = openssl(folder, &["rsa", "-in", "key", "-noout", "-modulus"], b"");
                let told = String::from_utf8(told).unwrap();
                let digits = told.trim().strip_prefix("Modulus=").unwrap();
                let modulus: Vec<u8> = (0..digits.len())
                    .step_by(2)
                    .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
                    .collect();
                json!({ "kty": "RSA", "n": base64(modulus), "e": "AQAB" })
            }
        };
        jwk["kid"] = kid.into();
        jwk["use"] = "sig".into();
        jwk["alg"] = self.algorithm().into();
        jwk
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        match self {
            Signer::Es256(pair) => pair
                .sign(&SystemRandom::new(), message)
                .unwrap()
                .as_ref()
                .into(),
            Signer::EdDsa(pair) => pair.sign(message).as_ref().into(),
            Signer::Rs256(folder) => openssl(
                folder,
                &["dgst", "-sha256", "-sign", "key", "input"],
                message,
            ),
        }
    }

    /// A token with this header and these claims.
    pub fn token(&self, header: &Value, claims: &Value) -> String {
        let message = format!(
            "{}.{}",
            base64(header.to_string()),
            base64(claims.to_string())
        );
        let signature = self.sign(message.as_bytes());
        format!("{message}.{}", base64(signature))
    }

    /// A good token for `user`.
    pub fn good(&self, kid: &str, user: &str) -> String {
        self.token(&self.header(kid), &claims(user))
    }

    pub fn header(&self, kid: &str) -> Value {
        json!({ "alg": self.algorithm(), "typ": "JWT", "kid": kid })
    }
}

/// Seconds since 1970, now.
pub fn now() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_secs() as i64
}

/// What a good token for `user` says.
pub fn claims(user: &str) -> Value {
    json!({
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "d2c1",
        "exp": now() + 300,
        "iat": now(),
        "preferred_username": user,
    })
}

/// A server of a JWK set.
pub struct Jwks {
    pub address: SocketAddr,
    /// The whole answer, or nothing where it just closes.
    answer: Arc<Mutex<Option<String>>>,
    asked: Arc<AtomicUsize>,
}

impl Jwks {
    pub async fn start() -> Jwks {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = Arc::new(Mutex::new(None::<String>));
        let asked = Arc::new(AtomicUsize::new(0));
        let (answers, count) = (answer.clone(), asked.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let _ = stream.read(&mut request).await;
                count.fetch_add(1, Ordering::Relaxed);
                let answer = answers.lock().unwrap().clone();
                if let Some(answer) = answer {
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
            }
        });
        Jwks {
            address,
            answer,
            asked,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}/jwks/", self.address)
    }

    /// Has these keys from now on.
    pub fn has(&self, keys: &[Value]) {
        self.says("200 OK", &json!({ "keys": keys }).to_string());
    }

    /// Answers this from now on.
    pub fn says(&self, status: &str, body: &str) {
        let length = body.len();
        *self.answer.lock().unwrap() = Some(format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
    }

    /// Answers nothing from now on.
    pub fn breaks(&self) {
        *self.answer.lock().unwrap() = None;
    }

    /// How often it was asked.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}
