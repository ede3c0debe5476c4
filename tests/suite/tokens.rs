//! Signed identity: who a token lets in, and what does not.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::dispatcher::{Setup, program, wait_for};
use crate::common::http::{self, Reply};
use crate::common::prober::Pki;
use crate::common::signer::{AUDIENCE, ISSUER, Jwks, Signer, base64, claims, now};
use crate::world::World;

fn wants_tokens(setup: Setup, jwks: &str) -> Setup {
    let jwt = json!({ "jwks": jwks, "issuer": ISSUER, "audience": [AUDIENCE] });
    setup.set("identity.jwt", jwt)
}

async fn ask(world: &World, headers: &[(&str, &str)]) -> Reply {
    let cookies = [world.alice.new_session(), world.bob.new_session()].join("; ");
    let mut all = vec![("Cookie", cookies.as_str())];
    all.extend(headers);
    http::request(world.dispatcher.address(), "GET", "/whoami", &all, b"")
        .await
        .unwrap()
}

#[tokio::test]
async fn a_token_of_each_kind_says_who_is_asking() {
    let jwks = Jwks::start().await;
    let signers = [Signer::rs256(), Signer::es256(), Signer::eddsa()];
    let mut keys: Vec<Value> = signers.iter().map(|key| key.jwk(key.algorithm())).collect();
    // What is of no use here does no harm.
    let mut encrypts = signers[0].jwk("encrypts");
    encrypts["use"] = "enc".into();
    keys.extend([
        json!({ "kty": "oct", "k": "c2VjcmV0", "kid": "shared", "alg": "HS256" }),
        json!({ "kty": "new", "kid": "later" }),
        json!("rubbish"),
        encrypts,
    ]);
    jwks.has(&keys);
    let world = World::with(|setup| wants_tokens(setup, &jwks.url())).await;
    assert_eq!(
        world.dispatcher.metric("t3dispatch_identity_keys").await,
        3.0
    );
    for signer in &signers {
        let algorithm = signer.algorithm();
        let token = signer.good(algorithm, "alice@example.com");
        // With the header of the edge, and without.
        for named in [&[][..], &[("X-authentik-username", "alice")][..]] {
            let mut headers = vec![("X-authentik-jwt", token.as_str())];
            headers.extend(named);
            let reply = ask(&world, &headers).await;
            assert_eq!(reply.status, 200, "{algorithm}: {}", reply.text());
        }
    }
    // Several audiences, ours among them; a clock that goes a little wrong.
    let mut lenient = claims("alice");
    lenient["aud"] = json!(["other", AUDIENCE]);
    lenient["exp"] = json!(now() - 20);
    lenient["nbf"] = json!(now() + 20);
    let token = signers[1].token(&signers[1].header("ES256"), &lenient);
    assert_eq!(
        ask(&world, &[("X-authentik-jwt", &token)]).await.status,
        200
    );
    // One key of a kind need not be named.
    let token = signers[1].token(&json!({ "alg": "ES256" }), &claims("alice"));
    assert_eq!(
        ask(&world, &[("X-authentik-jwt", &token)]).await.status,
        200
    );
    let seen = world.alice.seen_at("/whoami");
    assert_eq!(seen.len(), 8);
    for request in seen {
        assert_eq!(
            request.head.get("x-authentik-jwt"),
            None,
            "a token was passed on"
        );
    }
    assert_eq!(world.bob.seen_at("/whoami").len(), 0);
}

#[tokio::test]
async fn what_proves_nothing_lets_nobody_in() {
    let jwks = Jwks::start().await;
    let (signer, rsa, stranger) = (Signer::es256(), Signer::rs256(), Signer::es256());
    jwks.has(&[signer.jwk("ours"), rsa.jwk("rsa")]);
    let world = World::with(|setup| wants_tokens(setup, &jwks.url())).await;
    let good = signer.good("ours", "alice");
    let reply = ask(&world, &[("X-authentik-jwt", &good)]).await;
    assert_eq!(reply.status, 200, "{}", reply.text());

    let [head, body, signature]: [&str; 3] =
        good.split('.').collect::<Vec<_>>().try_into().unwrap();
    let with_claim = |name: &str, value: Value| {
        let mut claims = claims("alice");
        claims[name] = value;
        signer.token(&signer.header("ours"), &claims)
    };
    let with_header = |header: Value| signer.token(&header, &claims("alice"));
    let without = |name: &str| {
        let mut claims = claims("alice");
        claims.as_object_mut().unwrap().remove(name);
        signer.token(&signer.header("ours"), &claims)
    };
    // An HMAC whose secret is a public key that everybody knows.
    let hmac = |algorithm: &str, kid: &str, secret: &[u8]| {
        let head = base64(json!({ "alg": algorithm, "kid": kid }).to_string());
        let message = format!("{head}.{body}");
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
        format!(
            "{message}.{}",
            base64(ring::hmac::sign(&key, message.as_bytes()))
        )
    };
    let none = |name: &str| format!("{}.{body}.", base64(json!({ "alg": name }).to_string()));
    let bobs = base64(claims("bob").to_string());
    let mut pointing = signer.header("mallorys");
    pointing["jku"] = jwks.url().into();
    pointing["x5u"] = jwks.url().into();
    pointing["jwk"] = stranger.jwk("mallorys");
    let cases = [
        ("no algorithm", none("none")),
        ("no algorithm, loudly", none("NONE")),
        (
            "no algorithm, and a signature",
            format!("{}{signature}", none("none")),
        ),
        (
            "HMAC with the EC key",
            hmac("HS256", "ours", &signer.public()),
        ),
        ("HMAC with the RSA key", hmac("HS256", "rsa", &rsa.public())),
        (
            "an HMAC that is called ES256",
            hmac("ES256", "ours", &signer.public()),
        ),
        (
            "an HMAC that is called RS256",
            hmac("RS256", "rsa", &rsa.public()),
        ),
        (
            "mallory's key under our name",
            stranger.good("ours", "alice"),
        ),
        (
            "mallory's key in the header",
            stranger.token(&pointing, &claims("alice")),
        ),
        (
            "mallory's key, no name",
            stranger.token(&json!({ "alg": "ES256" }), &claims("alice")),
        ),
        (
            "a key of another kind",
            with_header(json!({ "alg": "ES256", "kid": "rsa" })),
        ),
        (
            "another algorithm than the key's",
            with_header(json!({ "alg": "RS256", "kid": "rsa" })),
        ),
        (
            "an algorithm that is not listed",
            with_header(json!({ "alg": "ES384", "kid": "ours" })),
        ),
        (
            "somebody else's claims",
            format!("{head}.{bobs}.{signature}"),
        ),
        ("no signature", format!("{head}.{body}.")),
        (
            "a signature of zeros",
            format!("{head}.{body}.{}", base64([0; 64])),
        ),
        (
            "half a signature",
            format!("{head}.{body}.{}", &signature[..40]),
        ),
        ("two parts", format!("{head}.{body}")),
        ("four parts", format!("{good}.{signature}")),
        ("blank inside", format!("{head}. {body}.{signature}")),
        ("padding", format!("{head}.{body}.{signature}==")),
        ("a word", "alice".into()),
        ("dots", "..".into()),
        (
            "critical",
            with_header(json!({ "alg": "ES256", "kid": "ours", "crit": ["exp"] })),
        ),
        (
            "compressed",
            with_header(json!({ "alg": "ES256", "kid": "ours", "zip": "DEF" })),
        ),
        ("over", with_claim("exp", json!(now() - 60))),
        ("over for ages", with_claim("exp", json!(0))),
        ("never over", without("exp")),
        ("over at a word", with_claim("exp", json!("tomorrow"))),
        ("over at less than nothing", with_claim("exp", json!(-1))),
        ("not yet begun", with_claim("nbf", json!(now() + 90))),
        (
            "another issuer",
            with_claim("iss", json!("https://evil.example.com/")),
        ),
        (
            "an issuer that begins alike",
            with_claim("iss", json!(format!("{ISSUER}x"))),
        ),
        ("no issuer", without("iss")),
        ("another audience", with_claim("aud", json!("t4"))),
        ("other audiences", with_claim("aud", json!(["a", "b"]))),
        ("no audience", without("aud")),
        ("audience null", with_claim("aud", Value::Null)),
        ("no name", without("preferred_username")),
        (
            "a name that is none",
            with_claim("preferred_username", json!(["alice"])),
        ),
        ("an empty name", with_claim("preferred_username", json!(""))),
    ];
    let before = world.alice.seen().len();
    for (what, token) in &cases {
        for named in [&[][..], &[("X-authentik-username", "alice")][..]] {
            let mut headers = vec![("X-authentik-jwt", token.as_str())];
            headers.extend(named);
            let reply = ask(&world, &headers).await;
            assert_eq!(reply.status, 403, "{what}: {}", reply.text());
            assert_eq!(
                reply.get("x-t3-dispatch-error"),
                Some("bad-token"),
                "{what}"
            );
            for part in token.split('.').filter(|part| part.len() > 16) {
                assert!(!reply.text().contains(part), "{what} is quoted");
                assert!(!world.dispatcher.log().contains(part), "{what} is logged");
            }
        }
    }
    let no_name = with_claim("preferred_username", json!("@example.com"));
    for (what, headers, status, code) in [
        (
            "no token",
            vec![("X-authentik-username", "alice")],
            403,
            "unknown-user",
        ),
        (
            "a name of nothing",
            vec![("X-authentik-jwt", &*no_name)],
            403,
            "unknown-user",
        ),
        (
            "two tokens",
            vec![("X-authentik-jwt", &*good), ("X-Authentik-Jwt", &good)],
            400,
            "ambiguous-identity",
        ),
        (
            "another spelling",
            vec![("X-authentik-jwt", &good), ("X_authentik_jwt", &good)],
            400,
            "ambiguous-identity",
        ),
        (
            "another spelling alone",
            vec![("X_authentik_jwt", &good)],
            400,
            "ambiguous-identity",
        ),
        (
            "two names",
            vec![("X-authentik-jwt", &good), ("X-authentik-username", "bob")],
            400,
            "bad-token",
        ),
        (
            "a name twice",
            vec![
                ("X-authentik-jwt", &good),
                ("X-authentik-username", "alice"),
                ("X-authentik-username", "alice"),
            ],
            400,
            "ambiguous-identity",
        ),
    ] {
        let reply = ask(&world, &headers).await;
        assert_eq!(reply.status, status, "{what}: {}", reply.text());
        assert_eq!(reply.get("x-t3-dispatch-error"), Some(code), "{what}");
    }
    assert_eq!(world.alice.seen().len(), before);
    assert_eq!(world.bob.seen_at("/whoami").len(), 0);
    // What names no key of ours has had the keys asked for, but once.
    assert_eq!(jwks.asked(), 2);
}

#[tokio::test]
async fn a_new_key_is_fetched_when_it_is_first_used_and_once_a_minute_at_most() {
    let jwks = Jwks::start().await;
    let (old, new, newest) = (Signer::es256(), Signer::es256(), Signer::es256());
    jwks.has(&[old.jwk("old")]);
    let world = World::with(|setup| wants_tokens(setup, &jwks.url())).await;
    assert_eq!(jwks.asked(), 1);
    jwks.has(&[old.jwk("old"), new.jwk("new")]);
    // Everybody comes at once with the new one, and nobody is turned away.
    let token = new.good("new", "alice");
    let asks = (0..20).map(|_| async {
        assert_eq!(
            ask(&world, &[("X-authentik-jwt", &token)]).await.status,
            200
        );
    });
    futures_util::future::join_all(asks).await;
    assert_eq!(jwks.asked(), 2);
    jwks.has(&[newest.jwk("newest")]);
    for _ in 0..5 {
        let token = newest.good("newest", "alice");
        assert_eq!(
            ask(&world, &[("X-authentik-jwt", &token)]).await.status,
            403
        );
    }
    assert_eq!(jwks.asked(), 2);
    let token = old.good("old", "alice");
    assert_eq!(
        ask(&world, &[("X-authentik-jwt", &token)]).await.status,
        200
    );
}

#[tokio::test]
async fn keys_stay_in_force_while_their_source_is_down() {
    let jwks = Jwks::start().await;
    let (signer, other) = (Signer::eddsa(), Signer::eddsa());
    let token = signer.good("a", "alice");
    let world =
        World::with(|setup| wants_tokens(setup, &jwks.url()).set("identity.jwt.refresh", "100ms"))
            .await;
    // It starts without, and says so, but for what needs no name.
    let reply = ask(&world, &[("X-authentik-jwt", &token)]).await;
    assert_eq!((reply.status, reply.get("retry-after")), (503, Some("5")));
    assert_eq!(reply.get("x-t3-dispatch-error"), Some("no-keys"));
    let reply = http::request(world.dispatcher.address(), "GET", "/healthz", &[], b"").await;
    assert_eq!(reply.unwrap().status, 200);
    jwks.has(&[signer.jwk("a")]);
    wait_for("keys", async || {
        ask(&world, &[("X-authentik-jwt", &token)]).await.status == 200
    })
    .await;
    for what in ["rubbish", "{}", "{\"keys\":[]}", "500", "nothing"] {
        match what {
            "500" => jwks.says("500 Internal Server Error", "{}"),
            "nothing" => jwks.breaks(),
            body => jwks.says("200 OK", body),
        }
        let asked = jwks.asked();
        wait_for("two refreshes", async || jwks.asked() >= asked + 2).await;
        assert_eq!(
            ask(&world, &[("X-authentik-jwt", &token)]).await.status,
            200,
            "{what}"
        );
    }
    jwks.has(&[other.jwk("a")]);
    wait_for("the end of the old key", async || {
        ask(&world, &[("X-authentik-jwt", &token)]).await.status == 403
    })
    .await;
    let token = other.good("a", "alice");
    assert_eq!(
        ask(&world, &[("X-authentik-jwt", &token)]).await.status,
        200
    );
}

#[test]
fn a_file_of_keys_that_is_not_there_is_told_at_start() {
    let base = tempfile::TempDir::new().unwrap();
    let file = base.path().join("jwks.json");
    let setup = wants_tokens(
        Setup::new(base.path(), vec!["true".into()]),
        file.to_str().unwrap(),
    );
    let settings = setup.write();
    let try_it = |arguments: &[&str]| {
        let output = program()
            .args(arguments)
            .arg("-c")
            .arg(&settings)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.code(), said.concat())
    };
    let shown = file.display();
    for (keys, what) in [
        (None, "cannot be read: No such file"),
        (Some("[]"), "is not a JWK set"),
        (
            Some("{\"keys\":[{\"kty\":\"oct\",\"k\":\"AA\"}]}"),
            "has no key for RS256, ES256 or EdDSA",
        ),
    ] {
        if let Some(keys) = keys {
            std::fs::write(&file, keys).unwrap();
        }
        let (code, said) = try_it(&["serve", "-t"]);
        assert_eq!(code, Some(1));
        assert!(
            said.contains(&format!("dispatch.identity.jwt.jwks: {shown} {what}")),
            "{said}"
        );
        let (code, said) = try_it(&["check"]);
        assert_eq!(code, Some(1));
        assert!(said.contains(&format!("{shown} {what}")), "{said}");
    }
    let keys = json!({ "keys": [Signer::eddsa().jwk("a")] });
    std::fs::write(&file, keys.to_string()).unwrap();
    assert_eq!(try_it(&["serve", "-t"]).0, Some(0));
    assert!(try_it(&["check"]).1.contains("1 keys"));
}

#[tokio::test]
async fn keys_come_over_tls_from_whom_the_settings_believe() {
    let (pki, others, signer) = (Pki::new(), Pki::new(), Signer::es256());
    let body = json!({ "keys": [signer.jwk("a")] }).to_string();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = pki.acceptor("localhost", b"http/1.1");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let length = body.len();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let token = signer.good("a", "alice");
    for (believed, status) in [(&pki, 200), (&others, 503)] {
        let world = World::with(|setup| {
            let file = setup.base.join("ca.pem");
            std::fs::write(&file, &believed.pem).unwrap();
            wants_tokens(setup, &format!("https://localhost:{port}/jwks/"))
                .set("identity.jwt.ca_file", file.to_str().unwrap())
        })
        .await;
        let reply = ask(&world, &[("X-authentik-jwt", &token)]).await;
        assert_eq!(reply.status, status, "{}", reply.text());
    }
}

#[tokio::test]
async fn keys_may_be_in_a_file() {
    let (first, second) = (Signer::es256(), Signer::es256());
    let mut file = std::path::PathBuf::new();
    let write = |file: &std::path::Path, signer: &Signer| {
        std::fs::write(file, json!({ "keys": [signer.jwk("a")] }).to_string()).unwrap();
    };
    let world = World::with(|setup| {
        file = setup.base.join("jwks.json");
        write(&file, &first);
        wants_tokens(setup, file.to_str().unwrap()).set("identity.jwt.refresh", "100ms")
    })
    .await;
    let token = first.good("a", "alice");
    assert_eq!(
        ask(&world, &[("X-authentik-jwt", &token)]).await.status,
        200
    );
    std::fs::remove_file(&file).unwrap();
    world
        .dispatcher
        .wait_for_log("identity-keys-failed kept=1")
        .await;
    assert_eq!(
        ask(&world, &[("X-authentik-jwt", &token)]).await.status,
        200
    );
    write(&file, &second);
    let token = second.good("a", "alice");
    wait_for("the new key", async || {
        ask(&world, &[("X-authentik-jwt", &token)]).await.status == 200
    })
    .await;
}
