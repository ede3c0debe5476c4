//! What has to hold for any bytes whatever, one function for each fuzz target. `tests/suite/fuzz_corpora.rs` asserts the same
//! of the small corpora that fuzzing has left.
//!
//! ```sh
//! cargo install --locked cargo-fuzz
//! mkdir -p fuzz/work && cargo +nightly fuzz run TARGET fuzz/work fuzz/corpus/TARGET -- -max_total_time=600
//! ```

use std::fmt::Debug;
use std::fs::File;
use std::io::{Cursor, Write};
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime};

use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde_json::{Value, json};
use t3_dispatch::config::{Dispatch, Fault, Identity, Listen, Mint, Settings};
use t3_dispatch::evidence::{self, Entry, Follower, Memory};
use t3_dispatch::explain::{self, ExplainError, Question};
use t3_dispatch::head::{self, HeadError, Reader};
use t3_dispatch::identity::{self, IdentityError, Peer};
use t3_dispatch::jwt::{self, KeySet};
use t3_dispatch::ledger::{Ledger, lines_back};
use t3_dispatch::mint::{last_line, read_credential};
use t3_dispatch::probe::far::Far;
use t3_dispatch::probe::settings as probe;
use t3_dispatch::session::{self, CookieName, Verdict};
use t3_dispatch::story::Story;
use t3_dispatch::table::{Table, TableError};
use t3_dispatch::tunnel::heads::{Heads, Seen};
use t3_dispatch::tunnel::live::Record;
use t3_dispatch::verdict::{self, Around, Leg, Rules};

/// What is asserted of a target's input.
pub type Property = fn(&[u8]);

/// Every target with its property.
pub const TARGETS: [(&str, Property); 12] = [
    ("cookies", cookies),
    ("frames", frames),
    ("head", head),
    ("heartbeats", heartbeats),
    ("identity", identity),
    ("jwt", jwt),
    ("ledger", ledger),
    ("mint_output", mint_output),
    ("probe_settings", probe_settings),
    ("session_answer", session_answer),
    ("settings", settings),
    ("table", table),
];

/// Two tables, parted by a 0: the second replaces the first.
pub fn table(data: &[u8]) {
    let mut texts = data.splitn(2, |byte| *byte == 0);
    let none = Table::default();
    let old = texts.next().and_then(|text| read_table(text, &none));
    let Some(new) = texts
        .next()
        .and_then(|text| read_table(text, old.as_ref().unwrap_or(&none)))
    else {
        return;
    };
    for (name, instance) in new.users() {
        for (_, earlier) in old.iter().flat_map(Table::users) {
            assert_eq!(
                Arc::ptr_eq(earlier, instance),
                (earlier.port, &earlier.os_user) == (instance.port, &instance.os_user),
                "{name:?}: an instance is kept when its port and its OS user stay"
            );
        }
    }
}

fn read_table(text: &[u8], old: &Table) -> Option<Table> {
    let table = match Table::parse(text, old) {
        Ok(table) => table,
        Err(TableError::Entries(faults)) => {
            assert!(!faults.is_empty());
            assert!(faults.iter().all(|fault| fault.starts_with('"')));
            return None;
        }
        Err(_) => return None,
    };
    let users = table.users();
    // Whoever reads the file without these checks, as `t3-mint` does, reads the same.
    let plain: Value = serde_json::from_slice(text).expect("JSON");
    assert_eq!(plain.as_object().expect("an object").len(), users.len());
    for (name, instance) in &users {
        let entry = &plain[name];
        assert_eq!(entry["os_user"], *instance.os_user);
        assert_eq!(entry["port"], instance.port);
        let (first, rest) = instance.os_user.as_bytes().split_first().expect("a name");
        assert!(matches!(first, b'a'..=b'z' | b'_') && rest.len() < 32);
        assert!(
            rest.iter()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
        );
        assert_ne!(instance.port, 0);
        assert!(Arc::ptr_eq(table.get(name).expect("that name"), instance));
        for (_, other) in &users {
            assert_eq!(
                Arc::ptr_eq(other, instance),
                other.port == instance.port,
                "one port is one instance"
            );
        }
    }
    let written: Value = users
        .iter()
        .map(|(name, instance)| {
            let entry = json!({ "os_user": *instance.os_user, "port": instance.port });
            ((*name).to_owned(), entry)
        })
        .collect();
    let again = Table::parse(written.to_string().as_bytes(), &table).expect("the same table");
    for ((name, kept), (again, instance)) in std::iter::zip(&users, again.users()) {
        assert_eq!(*name, again);
        assert!(Arc::ptr_eq(kept, instance));
    }
    assert_eq!(users.len(), again.len());
    Some(table)
}

/// A settings file of the dispatcher.
pub fn settings(data: &[u8]) {
    let Some(text) = settings_text(data) else {
        return;
    };
    let settings = match Settings::parse(text) {
        Ok(settings) => settings,
        Err(faults) => return check_faults(text, &faults, Settings::parse(text).err()),
    };
    let Settings {
        pingora,
        dispatch,
        warnings,
    } = settings;
    keeps_the_secret(text, &dispatch);
    assert!(warnings.iter().all(|warning| !warning.is_empty()));
    assert!(pingora.threads > 0 && pingora.max_retries > 0);
    assert!(!dispatch.listen.is_empty());
    let admin = Listen::Tcp(dispatch.admin);
    let places = || dispatch.listen.iter().chain([&admin]);
    for (position, place) in places().enumerate() {
        assert!(places().skip(position + 1).all(|other| other != place));
        match place {
            Listen::Tcp(address) => assert_ne!(address.port(), 0),
            Listen::Unix(path) => assert!(path.is_absolute()),
        }
    }
    assert!(dispatch.max_connections > 0 && dispatch.max_connections_per_address > 0);
    let pairing = &dispatch.pairing;
    assert!(!pairing.endpoints.is_empty());
    for path in pairing
        .endpoints
        .iter()
        .chain([&dispatch.session.check_path])
    {
        assert!(path.starts_with('/') && path.bytes().all(|byte| byte.is_ascii_graphic()));
    }
    match &pairing.mint {
        Mint::Command(command) => assert!(!command[0].is_empty()),
        Mint::Socket(path) => assert!(path.is_absolute()),
    }
    let tunnels = &dispatch.tunnels;
    assert!(tunnels.client_watchdog > tunnels.client_heartbeat);
    assert_ne!(dispatch.probe.edge_leg, dispatch.probe.internal_leg);
    // What is reckoned with them later stays in range.
    assert!(pairing.max_concurrent > 0 && pairing.per_user_per_minute > 0);
    assert!(tunnels.ledger_max_mb > 0);
    for duration in [
        dispatch.table_poll,
        dispatch.session.check_timeout,
        pairing.mint_timeout,
        pairing.exchange_timeout,
        tunnels.drain_limit,
        tunnels.client_heartbeat,
        tunnels.client_watchdog,
        dispatch.probe.heartbeat,
    ] {
        can_be_waited_for(duration);
    }
    if let Some(jwt) = &dispatch.identity.jwt {
        can_be_waited_for(jwt.refresh);
        assert!(!jwt.algorithms.is_empty() && !jwt.audience.is_empty());
        for text in jwt.audience.iter().chain([&jwt.issuer, &jwt.claim]) {
            assert!(!text.is_empty());
        }
        assert!(jwt.roots.is_empty(), "there is no file of certificates");
    }
    let written = write_dispatch(&dispatch);
    let again = Settings::parse(&written).expect(&written);
    assert_eq!(again.dispatch, dispatch, "{written}");
    assert!(again.warnings.is_empty());
}

/// The text of settings, unless it may name a file that never ends.
fn settings_text(data: &[u8]) -> Option<&str> {
    let text = str::from_utf8(data).ok()?;
    (!text.contains("/dev") && !text.contains("/proc")).then_some(text)
}

fn check_faults(text: &str, faults: &[Fault], again: Option<Vec<Fault>>) {
    assert_eq!(
        again.as_deref(),
        Some(faults),
        "the same text, other faults"
    );
    let whole = |fault: &Fault| {
        fault.what.starts_with("is not YAML: ") || fault.what.starts_with("is not a mapping")
    };
    match faults {
        [] => panic!("refused without a fault"),
        [only] if only.key.is_empty() => assert!(whole(only), "{only}"),
        faults => assert!(
            faults.iter().all(|fault| !fault.key.is_empty()),
            "a fault without a key: {faults:?}"
        ),
    }
    assert!(faults.iter().all(|fault| !fault.what.is_empty()));
    keeps_the_secret(text, &faults);
}

/// Where the only "sesame" of the file is in its token, nothing that is shown has it.
fn keeps_the_secret(text: &str, shown: &impl Debug) {
    let is_token =
        |line: &str| line.trim_start().starts_with("token: \"") && line.contains("sesame");
    if text.matches("sesame").count() == 1 && text.lines().any(is_token) {
        assert!(!format!("{shown:?}").contains("sesame"));
    }
}

fn can_be_waited_for(duration: Duration) {
    assert!(!duration.is_zero());
    let longer = duration.checked_mul(3).expect("a duration to reckon with");
    assert!(Instant::now().checked_add(longer).is_some());
    assert!(i64::try_from(longer.as_nanos()).is_ok());
}

fn write_dispatch(dispatch: &Dispatch) -> String {
    let time = |duration| humantime::format_duration(duration).to_string();
    let mut pairing = json!({
        "mint_timeout": time(dispatch.pairing.mint_timeout),
        "endpoints": dispatch.pairing.endpoints,
        "exchange_timeout": time(dispatch.pairing.exchange_timeout),
        "max_concurrent": dispatch.pairing.max_concurrent,
        "per_user_per_minute": dispatch.pairing.per_user_per_minute,
    });
    match &dispatch.pairing.mint {
        Mint::Command(command) => pairing["mint"] = json!(command),
        Mint::Socket(path) => pairing["mint_socket"] = json!(path),
    }
    let token = dispatch.probe.token.as_ref();
    let listen: Vec<String> = dispatch.listen.iter().map(Listen::to_string).collect();
    let mut identity = json!({
        "header": dispatch.identity.header.as_str(),
        "trusted_proxies": dispatch.identity.trusted_proxies,
    });
    if let Some(jwt) = &dispatch.identity.jwt {
        identity["jwt"] = json!({
            "header": jwt.header.as_str(),
            "jwks": jwt.jwks.to_string(),
            "algorithms": jwt.algorithms,
            "issuer": jwt.issuer,
            "audience": jwt.audience,
            "claim": jwt.claim,
            "refresh": time(jwt.refresh),
        });
    }
    // JSON is YAML.
    json!({ "dispatch": {
        "listen": listen,
        "listen_mode": format!("{:04o}", dispatch.listen_mode),
        "listen_group": dispatch.listen_group,
        "max_connections": dispatch.max_connections,
        "max_connections_per_address": dispatch.max_connections_per_address,
        "admin": dispatch.admin,
        "table": dispatch.table,
        "table_poll": time(dispatch.table_poll),
        "identity": identity,
        "session": {
            "check_path": dispatch.session.check_path,
            "check_timeout": time(dispatch.session.check_timeout),
        },
        "pairing": pairing,
        "tunnels": {
            "allowed_origins": dispatch.tunnels.allowed_origins,
            "ledger": dispatch.tunnels.ledger,
            "ledger_max_mb": dispatch.tunnels.ledger_max_mb,
            "drain_limit": time(dispatch.tunnels.drain_limit),
            "per_user_metrics": dispatch.tunnels.per_user_metrics,
            "client_heartbeat": time(dispatch.tunnels.client_heartbeat),
            "client_watchdog": time(dispatch.tunnels.client_watchdog),
        },
        "probe": {
            "token": token.map(|token| token.reveal()),
            "heartbeat": time(dispatch.probe.heartbeat),
            "edge_leg": dispatch.probe.edge_leg,
            "internal_leg": dispatch.probe.internal_leg,
        },
    }})
    .to_string()
}

/// A settings file of the prober.
pub fn probe_settings(data: &[u8]) {
    let Some(text) = settings_text(data) else {
        return;
    };
    let settings = match probe::Settings::parse(text) {
        Ok(settings) => settings,
        Err(faults) => return check_faults(text, &faults, probe::Settings::parse(text).err()),
    };
    keeps_the_secret(text, &settings);
    assert_ne!(settings.listen.port(), 0);
    assert!(settings.reconnect <= settings.reconnect_max);
    for duration in [
        settings.heartbeat,
        settings.rtt_timeout,
        settings.connect_timeout,
        settings.reconnect,
        settings.reconnect_max,
    ] {
        can_be_waited_for(duration);
        assert!(duration <= Duration::from_secs(600));
    }
    assert!((1..=16).contains(&settings.legs.len()));
    let mut legs = Vec::new();
    for (position, leg) in settings.legs.iter().enumerate() {
        assert!(
            settings.legs[..position]
                .iter()
                .all(|earlier| earlier.name != leg.name)
        );
        let (kind, scheme) = match (leg.kind, leg.url.tls) {
            (probe::Kind::WebSocket, true) => ("websocket", "wss"),
            (probe::Kind::WebSocket, false) => ("websocket", "ws"),
            (probe::Kind::Http, true) => ("http", "https"),
            (probe::Kind::Http, false) => ("http", "http"),
        };
        // Both go into a request line and a header as they are.
        let (authority, path) = (leg.url.authority(), &leg.url.path);
        assert!(path.starts_with('/') && !path.bytes().any(|byte| byte <= b' ' || byte == 0x7f));
        assert!(authority.bytes().all(|byte| byte.is_ascii_graphic()) && !authority.contains('@'));
        assert!(leg.url.port != 0 && !leg.url.host.is_empty());
        legs.push(json!({
            "name": leg.name,
            "kind": kind,
            "url": format!("{scheme}://{authority}{path}"),
            "resolve": leg.resolve.to_string(),
        }));
    }
    let time = |duration| humantime::format_duration(duration).to_string();
    let written = json!({ "probe": {
        "listen": settings.listen,
        "token": settings.token.as_ref().map(|token| token.reveal()),
        "heartbeat": time(settings.heartbeat),
        "rtt_timeout": time(settings.rtt_timeout),
        "connect_timeout": time(settings.connect_timeout),
        "reconnect": time(settings.reconnect),
        "reconnect_max": time(settings.reconnect_max),
        "legs": legs,
    }})
    .to_string();
    let again = probe::Settings::parse(&written).expect(&written);
    assert_eq!(again.legs, settings.legs, "{written}");
    assert_eq!(
        (
            again.listen,
            again.token,
            again.heartbeat,
            again.rtt_timeout
        ),
        (
            settings.listen,
            settings.token,
            settings.heartbeat,
            settings.rtt_timeout
        )
    );
}

/// How the names of session cookies are known, then lines that are `Cookie` and `Set-Cookie` headers.
pub fn cookies(data: &[u8]) {
    let Some((how, text)) = data.split_first() else {
        return;
    };
    let mut lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    let known = match how & 3 {
        0 => None,
        1 => Some("t3_session".into()),
        2 => Some("t3_session_3773_7b609e3964c4".into()),
        _ => session::read_check(lines.remove(0)).1,
    };
    let names = CookieName::default();
    if let Some(name) = known {
        names.learn(&name);
    }
    let lines: Vec<HeaderValue> = lines
        .into_iter()
        .filter_map(|line| HeaderValue::from_bytes(line).ok())
        .collect();

    let headers = cookie_headers(lines.iter().cloned());
    let built = session::session_cookies(&headers, &names);
    assert_eq!(
        built.is_some(),
        session::has_session_cookie(&headers, &names)
    );
    // Plain work on bytes is the measure: pairs between semicolons, blanks around them stripped, the first of a name wins.
    let mut expected: Vec<(&[u8], &[u8])> = Vec::new();
    for line in &lines {
        for pair in line.as_bytes().split(|byte| *byte == b';') {
            let mut halves = pair.splitn(2, |byte| *byte == b'=');
            if let (Some(name), Some(value)) = (halves.next(), halves.next())
                && names.counts(name.trim_ascii())
                && expected
                    .iter()
                    .all(|(earlier, _)| *earlier != name.trim_ascii())
            {
                expected.push((name.trim_ascii(), value.trim_ascii()));
            }
        }
    }
    let pairs: Vec<Vec<u8>> = expected
        .iter()
        .map(|(name, value)| [*name, *value].join(&b'='))
        .collect();
    let text = built.as_ref().map(|value| value.as_bytes());
    assert_eq!(text.unwrap_or_default(), pairs.join(&b"; "[..]));
    if let Some(built) = built {
        assert!(built.is_sensitive());
        let alone = cookie_headers([built.clone()]);
        assert_eq!(
            session::session_cookies(&alone, &names),
            Some(built.clone())
        );
        // Other people's cookies on the line change nothing.
        let among = cookie_headers(lines.iter().map(|line| {
            let line = [b"theme=dark; ", line.as_bytes(), b"; lang=en"].concat();
            HeaderValue::from_bytes(&line).expect("as valid as before")
        }));
        assert_eq!(session::session_cookies(&among, &names), Some(built));
    }

    for line in &lines {
        let Some(name) = session::session_cookie_set(line, &names) else {
            continue;
        };
        let text = String::from_utf8_lossy(line.as_bytes()).into_owned();
        let mut parts = text.split(';').map(str::trim);
        let (given, value) = parts
            .next()
            .and_then(|pair| pair.split_once('='))
            .expect("a pair");
        assert_eq!(given.trim(), name);
        assert!(names.counts(name.as_bytes()) || CookieName::default().counts(name.as_bytes()));
        assert!(
            !value.trim().is_empty(),
            "an empty value takes a session away"
        );
        let attribute = |wanted: &str| {
            let last = parts.clone().filter_map(|part| part.split_once('='));
            let mut last = last.filter(|(name, _)| name.trim().eq_ignore_ascii_case(wanted));
            last.next_back().map(|(_, value)| value.trim().to_owned())
        };
        match attribute("max-age").map(|seconds| seconds.parse::<i64>()) {
            Some(Ok(seconds)) => assert!(seconds > 0, "that takes a session away: {text}"),
            Some(Err(_)) => {}
            None => assert_ne!(
                attribute("expires").as_deref(),
                Some("Thu, 01 Jan 1970 00:00:00 GMT"),
                "that takes a session away: {text}"
            ),
        }
    }
}

fn cookie_headers(lines: impl IntoIterator<Item = HeaderValue>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(header::COOKIE, line);
    }
    headers
}

/// Where to cut, and one direction of a WebSocket.
pub fn frames(data: &[u8]) {
    let Some((count, rest)) = data.split_first() else {
        return;
    };
    let (cuts, bytes) = rest.split_at(usize::from(count & 15).min(rest.len()) & !1);
    let (expected, ends) = read_frames(bytes);
    let mut cuts: Vec<usize> = cuts
        .chunks_exact(2)
        .map(|cut| usize::from(u16::from_be_bytes([cut[0], cut[1]])) % (bytes.len() + 1))
        .chain([0, bytes.len()])
        .collect();
    cuts.sort_unstable();

    let (mut heads, mut seen) = (Heads::default(), Seen::default());
    for cut in cuts.windows(2) {
        add(&mut seen, heads.read(&bytes[cut[0]..cut[1]]));
        assert_eq!(heads.at_boundary(), cut[1] == 0 || ends.contains(&cut[1]));
    }
    assert_eq!(seen, expected);

    // Reading what is left of the frame, and no more, meets each of its ends.
    let (mut heads, mut seen, mut at) = (Heads::default(), Seen::default(), 0);
    let mut met = Vec::new();
    while at < bytes.len() {
        let left = heads.left_in_frame();
        assert_eq!(left == 0, heads.at_boundary());
        let step = left.max(1).min(bytes.len() - at);
        let part = heads.read(&bytes[at..at + step]);
        assert_eq!(part.frame, heads.at_boundary());
        add(&mut seen, part);
        at += step;
        if heads.at_boundary() {
            met.push(at);
        }
    }
    assert_eq!(seen, expected);
    assert_eq!(met, ends);
}

fn add(all: &mut Seen, seen: Seen) {
    all.messages += seen.messages;
    all.whole += seen.whole;
    all.frame |= seen.frame;
    all.close = all.close.or(seen.close);
}

/// RFC 6455, section 5.2, read from one buffer: what it holds, and where its frames end.
fn read_frames(bytes: &[u8]) -> (Seen, Vec<usize>) {
    let (mut seen, mut ends, mut at) = (Seen::default(), Vec::new(), 0_usize);
    loop {
        let frame = &bytes[at..];
        let [first, second, ..] = *frame else {
            return (seen, ends);
        };
        let masked = second & 0x80 != 0;
        let (head, length) = match (second & 0x7f, frame) {
            (126, [_, _, a, b, ..]) => (4, u64::from(u16::from_be_bytes([*a, *b]))),
            (127, [_, _, long @ ..]) if long.len() >= 8 => {
                (10, u64::from_be_bytes(long[..8].try_into().expect("eight")))
            }
            (126 | 127, _) => return (seen, ends),
            (short, _) => (2, u64::from(short)),
        };
        let payload_at = head + if masked { 4 } else { 0 };
        if frame.len() < payload_at {
            return (seen, ends);
        }
        let is_message = first & 0x80 != 0 && first & 0x0f < 8;
        seen.messages += u64::from(is_message);
        let payload = &frame[payload_at..];
        let Some(payload) = usize::try_from(length)
            .ok()
            .and_then(|length| payload.get(..length))
        else {
            return (seen, ends);
        };
        seen.whole += u64::from(is_message);
        seen.frame = true;
        if first & 0x0f == 8 && seen.close.is_none() {
            let key = |place: usize| if masked { frame[head + place] } else { 0 };
            seen.close = Some(match payload {
                [high, low, ..] => u16::from_be_bytes([high ^ key(0), low ^ key(1)]),
                _ => 1005,
            });
        }
        at += payload_at + payload.len();
        ends.push(at);
    }
}

/// An exit status, and what a mint printed.
pub fn mint_output(data: &[u8]) {
    let Some((status, output)) = data.split_first() else {
        return;
    };
    match read_credential(output) {
        Ok(credential) => {
            let secret = credential.reveal();
            assert!(!secret.is_empty());
            assert_eq!(format!("{credential:?}"), "Credential(…)");
            let plain: Value = serde_json::from_slice(output).expect("JSON");
            assert_eq!(plain["credential"], secret);
            // A mint that was cut short gave nothing.
            let whole = output.trim_ascii_end().len();
            for cut in (0..whole).rev().take(64) {
                assert!(read_credential(&output[..cut]).is_err(), "cut at {cut}");
            }
        }
        Err(error) => assert!(
            [
                "the mint printed something else than JSON",
                "the mint printed JSON without a credential"
            ]
            .contains(&&*error.to_string()),
            "an error that may quote what was printed"
        ),
    }
    if let Some((end, status)) = last_line(output) {
        let line = str::from_utf8(&output[end..]).expect("a line of text");
        let number = line
            .strip_prefix("\nexit ")
            .and_then(|rest| rest.strip_suffix('\n'));
        assert_eq!(number.and_then(|number| number.parse().ok()), Some(status));
    }
    let whole = [output, format!("\nexit {status}\n").as_bytes()].concat();
    assert_eq!(last_line(&whole), Some((output.len(), *status)));
    for cut in output.len() + 2..whole.len() {
        assert_eq!(last_line(&whole[..cut]), None, "cut at {cut}");
    }
}

/// The body of an answer to a session check.
pub fn session_answer(data: &[u8]) {
    let (verdict, name) = session::read_check(data);
    if let Some(name) = &name {
        // Whatever the name is, a browser can send it back.
        let names = CookieName::default();
        names.learn(name);
        let line = HeaderValue::try_from(format!("a=1; {name}=payload.signature; b=2"));
        let headers = cookie_headers([line.expect("a header")]);
        let built = session::session_cookies(&headers, &names).expect("the session cookie");
        assert_eq!(built, format!("{name}=payload.signature"));
    }
    let mut values = serde_json::Deserializer::from_slice(data).into_iter::<Value>();
    let Some(Ok(answer @ Value::Object(_))) = values.next() else {
        assert_eq!((verdict, name), (Verdict::Unknown, None));
        return;
    };
    let alive = answer["authenticated"] == true;
    assert_eq!(verdict == Verdict::Alive, alive);
    if alive || answer["authenticated"] == false {
        assert_ne!(verdict, Verdict::Unknown);
    }
    // An answer that was cut short takes no session away.
    let whole = values.byte_offset();
    for cut in (0..whole).rev().take(64) {
        assert_eq!(session::read_check(&data[..cut]), (Verdict::Unknown, None));
    }
}

/// A peer and whom the settings trust, then headers, one a line.
pub fn identity(data: &[u8]) {
    let Some((choice, text)) = data.split_first() else {
        return;
    };
    let rules = Identity {
        header: HeaderName::from_static("x-authentik-username"),
        trusted_proxies: ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32"]
            .map(|network| network.parse().expect("a network"))
            .into(),
        jwt: None,
    };
    let address = |text: &str| Peer::Address(text.parse().expect("an address"));
    let peers = [
        address("10.1.2.3"),
        address("::ffff:10.1.2.3"),
        address("2001:db8::1"),
        Peer::Local,
        address("198.51.100.1"),
        address("::ffff:198.51.100.1"),
        address("::1"),
    ];
    let place = usize::from(*choice) % peers.len();
    let (peer, trusted) = (peers[place], place < 4);
    let mut headers = HeaderMap::new();
    for line in text.split(|byte| *byte == b'\n') {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let (name, value) = (
            parts.next().unwrap_or_default(),
            parts.next().unwrap_or_default(),
        );
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            headers.append(name, value);
        }
    }

    let fold = |name: &HeaderName| {
        name.as_str()
            .replace(|sign: char| !sign.is_ascii_alphanumeric(), "_")
    };
    let alike: Vec<_> = headers
        .iter()
        .filter(|(name, _)| fold(name) == fold(&rules.header))
        .collect();
    let who = identity::who(peer, &headers, &rules, None);
    match who.now_or_never().expect("an answer without tokens") {
        Ok(name) => {
            assert!(trusted && !name.is_empty() && !name.contains('@'));
            let [(header, value)] = alike[..] else {
                panic!("{name} of {} headers", alike.len());
            };
            assert_eq!(header, rules.header);
            let value = value.to_str().expect("text");
            assert!(value == name || value.starts_with(&format!("{name}@")));
        }
        Err(IdentityError::UntrustedPeer(ip)) => assert!(!trusted && Some(ip) == peer.ip()),
        Err(IdentityError::Ambiguous(_)) => {
            assert!(trusted && (alike.len() > 1 || alike[0].0 != rules.header))
        }
        Err(IdentityError::Missing) => assert!(trusted && alike.len() <= 1),
        Err(error) => panic!("without tokens: {error}"),
    }

    let client = identity::client(peer, &headers, &rules);
    let told: Vec<IpAddr> = identity::forwarded_for(&headers).collect();
    assert!(told.iter().all(|ip| *ip == ip.to_canonical()));
    if client != peer.ip() {
        let client = client.expect("an address");
        assert!(trusted, "anybody's word was taken");
        assert!(!rules.trusts(client) && told.contains(&client));
    }
    // What stands before the word of the edge changes nothing.
    let edges_word: IpAddr = "203.0.113.9".parse().expect("an address");
    headers.append("x-forwarded-for", HeaderValue::from_static("203.0.113.9"));
    let expected = if trusted { Some(edges_word) } else { peer.ip() };
    assert_eq!(identity::client(peer, &headers, &rules), expected);
}

/// How much of a file is read at a time, then what is left in the ledger, a 0, and in the evidence beside it.
pub fn ledger(data: &[u8]) {
    let Some((step, texts)) = data.split_first() else {
        return;
    };
    let mut texts = texts.splitn(2, |byte| *byte == 0);
    let [closes, evidence] = [(); 2].map(|()| texts.next().unwrap_or_default());
    let mut lines: Vec<&[u8]> = closes.split(|byte| *byte == b'\n').rev().collect();
    lines.retain(|line| !line.is_empty());
    let mut shown = Vec::new();
    let show = |line: &[u8]| {
        shown.push(line.to_vec());
        ControlFlow::Continue(())
    };
    let end = lines_back(
        Cursor::new(closes),
        closes.len() as u64,
        u64::from(*step).max(1),
        show,
    )
    .expect("memory");
    assert!(end.is_continue());
    assert_eq!(shown, lines);

    let folder = std::env::temp_dir().join(format!("t3-dispatch-ledger-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let ledger = Ledger {
        path: folder.join("closes.jsonl"),
        limit: u64::MAX,
    };
    let beside = ledger.evidence().path;
    std::fs::write(&ledger.path, closes).expect("a file");

    // However the file grows, the same is read of it.
    let (first, second) = evidence.split_at(usize::from(*step).min(evidence.len()));
    std::fs::write(&beside, first).expect("a file");
    let mut follower = Follower::new(beside.clone());
    let mut entries = follower.read().expect("entries");
    let mut file = File::options().append(true).open(&beside).expect("a file");
    file.write_all(second).expect("a file");
    entries.extend(follower.read().expect("entries"));
    let again = Follower::new(beside).read().expect("entries");
    let written = |entries: &[Entry]| -> Vec<String> {
        entries
            .iter()
            .map(|entry| json!(entry).to_string())
            .collect()
    };
    assert_eq!(written(&entries), written(&again));
    let mut memory = Memory::default();
    for entry in entries {
        memory.apply(entry.pid, entry.at(), entry.event);
    }

    let conf = folder.join("t3-dispatch.yaml");
    let text = json!({ "dispatch": { "tunnels": { "ledger": ledger.path } } }).to_string();
    let settings = Settings::parse(&text).expect("settings").dispatch;
    let century = Duration::from_secs(100 * 365 * 86_400);
    let since = SystemTime::now() - century;
    let story = Story::read(&ledger, &settings, None, since).expect("a story");
    let is_verdict = |line: &&&[u8]| {
        serde_json::from_slice(line)
            .is_ok_and(|line: Value| line["verdict_of"].is_string() && evidence::is_ours(&line))
    };
    assert_eq!(
        story.drops.len() + story.ended_well + story.unreadable,
        lines.len() - lines.iter().filter(is_verdict).count(),
        "a line is a record, a verdict, or counted as neither"
    );
    for drop in &story.drops {
        let leg = |name: &str| Leg {
            name: name.into(),
            conns: memory.conns_of(name),
            stood: Vec::new(),
        };
        let around = Around {
            edge: leg("cloudflare"),
            internal: leg("internal"),
            now: drop.record.ended() + 30_000,
            ..Around::default()
        };
        let verdict = verdict::judge(&drop.record, &around, &Rules::default());
        assert!(!verdict.evidence.is_empty());
        // It is written as it is read.
        let line = serde_json::to_value(&drop.record).expect("JSON");
        assert_eq!(
            serde_json::from_value::<Record>(line).expect("a record"),
            drop.record
        );
    }
    std::fs::write(&conf, text).expect("a file");
    for json in [false, true] {
        for at in [None, Some("2026-01-02T14:05:00Z".to_owned())] {
            let question = Question {
                since: Some(century),
                at,
                json,
                ..Question::default()
            };
            match explain::run(Some(&conf), &question) {
                Ok(answer) if json => drop(serde_json::from_str::<Value>(&answer).expect("JSON")),
                Ok(answer) => assert!(!answer.is_empty()),
                Err(error) => assert!(matches!(error, ExplainError::Nothing(_)), "{error}"),
            }
        }
    }
    std::fs::remove_dir_all(folder).expect("the folder");
}

/// A prober's heartbeats, one a line.
pub fn heartbeats(data: &[u8]) {
    let stall = Rules::default().stall();
    let mut far = Far::open("a".into(), stall).expect("a place");
    let began = evidence::now();
    for line in data.split(|byte| *byte == b'\n') {
        far.message(&String::from_utf8_lossy(line));
        assert!(far.pause() >= Duration::from_millis(50) && far.pause() <= stall / 2);
        far.tick();
    }
    let conn = evidence::conns("a").pop().expect("the connection");
    drop(far);
    // What it says is about a time that has been.
    let oldest = began - 31 * 365 * 86_400_000;
    let now = evidence::now();
    let is_past = |times: &[i64]| {
        assert!(times.is_sorted(), "{times:?}");
        assert!(
            times.iter().all(|at| (oldest..=now).contains(at)),
            "{times:?} at {now}"
        );
    };
    for stall in &conn.stalls {
        is_past(&[stall.earliest, stall.latest, stall.until.unwrap_or(now)]);
    }
    is_past(&[conn.prober.unwrap_or(began)]);
    for (since, until) in evidence::stood("a") {
        is_past(&[since, until]);
    }
}

/// Where to cut, and the head of a request.
pub fn head(data: &[u8]) {
    let Some((cut, text)) = data.split_first() else {
        return;
    };
    // A head ends with the first empty line that is not before it.
    let (mut length, mut lines, mut ended, mut fits) = (0, Vec::new(), false, true);
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        length += line.len();
        match line.strip_suffix(b"\r\n") {
            Some(b"") if lines.is_empty() => {}
            Some(b"") => ended = true,
            Some(line) => lines.push(line),
            None => fits = !line.ends_with(b"\n"),
        }
        if ended || !fits {
            break;
        }
    }
    let head = &text[..length];
    // The request line, or what there is of it.
    let rest = head
        .rsplit(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let rest = rest.strip_suffix(b"\r").unwrap_or(rest);
    let first = lines.first().copied().unwrap_or(rest);
    let spaces = first.iter().filter(|byte| **byte == b' ').count();
    fits &= spaces <= 2 && !first.iter().any(u8::is_ascii_control);
    fits &= length <= head::MOST_BYTES && lines.len() <= head::MOST_LINES + 1;
    let headers: Vec<_> = lines
        .iter()
        .skip(1)
        .filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let value = line[colon + 1..].trim_ascii();
            Some((line[..colon].to_ascii_lowercase(), value))
        })
        .collect();
    let says = |(name, _): &&(Vec<u8>, &[u8])| {
        [&b"content-length"[..], b"transfer-encoding"].contains(&name.as_slice())
    };
    fits &= match headers.iter().filter(says).collect::<Vec<_>>()[..] {
        [] => true,
        [(name, value)] if name == b"content-length" => {
            let number = str::from_utf8(value).unwrap_or_default().parse::<u64>();
            number.is_ok() && !value.starts_with(b"+")
        }
        [(_, value)] => value.eq_ignore_ascii_case(b"chunked"),
        // Two say where the body ends.
        _ => false,
    };
    let mut reader = Reader::default();
    let mut parts = head.chunks(usize::from(*cut).max(1));
    let add = |sum, part| Ok::<_, HeadError>(sum + reader.read(part)?);
    let counted = parts.try_fold(0, add);
    let whole = Reader::default().read(text);
    assert_eq!(whole.is_ok(), fits);
    // In pieces, a request line that does not end yet is looked at by its first piece alone.
    assert!(counted.is_ok() == fits || lines.is_empty());
    if fits {
        assert_eq!((counted, whole), (Ok(length), Ok(length)));
        assert_eq!(reader.has_ended(), ended);
        let is_blank = head.chunks(2).all(|line| line == b"\r\n");
        assert_eq!(reader.has_begun(), !is_blank);
    }
    // The parser under Pingora.
    let mut room = [httparse::EMPTY_HEADER; head::MOST_LINES];
    let mut request = httparse::Request::new(&mut room);
    if !ended || !fits || request.parse(head).is_err() {
        return;
    }
    assert!(
        lines
            .iter()
            .all(|line| !line.contains(&b'\r') && !line.contains(&0))
    );
    // The parser reads the same in it.
    let read: Vec<_> = request
        .headers
        .iter()
        .map(|header| (header.name.to_ascii_lowercase().into_bytes(), header.value))
        .collect();
    assert_eq!(read, headers);
}

/// A token; or a change to a good one; or a JWK set, a 0, and a token.
pub fn jwt(data: &[u8]) {
    static RULES: LazyLock<(jwt::Rules, KeySet)> = LazyLock::new(|| {
        let jwt = json!({
            "jwks": "/jwks.json",
            "issuer": "https://sso.example.com/",
            "audience": ["t3"],
        });
        let text = json!({ "dispatch": { "identity": { "jwt": jwt } } }).to_string();
        let settings = Settings::parse(&text).expect("settings").dispatch;
        let rules = jwt::Rules::new(&settings.identity.jwt.expect("the section"));
        (rules, KeySet::parse(KEYS.as_bytes()).expect("keys"))
    });
    let (rules, keys) = &*RULES;
    let Some((how, rest)) = data.split_first() else {
        return;
    };
    let token = match how & 3 {
        0 | 1 => rest.to_vec(),
        2 => {
            let good = TOKENS[usize::from(how >> 2) % TOKENS.len()];
            let mut token = good.as_bytes().to_vec();
            for change in rest.chunks_exact(3) {
                let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % token.len();
                token[at] = change[2];
            }
            if token == good.as_bytes() {
                assert_eq!(rules.verify(&token, keys).as_deref(), Ok("alice"));
            }
            token
        }
        _ => {
            let mut parts = rest.splitn(2, |byte| *byte == 0);
            let [set, token] = [(); 2].map(|()| parts.next().unwrap_or_default());
            if let Ok(keys) = KeySet::parse(set) {
                assert!(!keys.is_empty());
                // Whoever chooses the keys can sign what they like.
                let _ = rules.verify(token, &keys);
                for token in TOKENS {
                    let name = rules.verify(token.as_bytes(), &keys);
                    assert!(name.is_err() || name.as_deref() == Ok("alice"));
                }
            }
            return;
        }
    };
    if let Ok(name) = rules.verify(&token, keys) {
        let is_signed = |good: &str| {
            let (signed, _) = good.rsplit_once('.').expect("three parts");
            token.starts_with(signed.as_bytes()) && token[signed.len()] == b'.'
        };
        assert!(
            name == "alice" && TOKENS.into_iter().any(is_signed),
            "nobody has signed that"
        );
    }
}

/// Public keys. Nobody has the private ones any more.
const KEYS: &str = r#"{"keys":[{"kty":"RSA","kid":"r","use":"sig","alg":"RS256","n":"6XXx25ObZ6W-Nm8OlhP7e40zmICS3QJsMfAC_shpwwNd9YVElkmHWmn0gzlvcn_upTKvb5pEl5aGDZIBctvya8-WH3fCclCA3Ir-PUXXMrUsVDV61PW5OnNMf5b1Z-a7AfWop1b4Ke8ZddIq00SaiTYl5j0n8Ub2JtNT9HOlbbjjzZGYyJSOAPuxk16LnSG8QzBK2Qoh1UnbWMn__inl-2-AHHCTTl3kqjy8R2seKzac5HjyVxwkL70LHjVn8McKq9CN0rc2U07zEki0TSMW8W3zRXfe-djMtbU-s9JnDxSPW7KqKtPWWUjx_X9etVFxxqhIXtZ_80l84oeVK8ThdQ","e":"AQAB"},{"kty":"EC","kid":"e","use":"sig","alg":"ES256","crv":"P-256","x":"vxZWlXPl4u7ckc_dERqj2M5KAb8NRoRWG-TLRZ0SbkU","y":"szCSYN_JKeNFgvHfuNeBBv6p_Q32D0Kg2GQnbvQMzgs"},{"kty":"OKP","kid":"d","use":"sig","alg":"EdDSA","crv":"Ed25519","x":"L8nLK2uIdtdUH2PzqMrqUNYHk_RaiESkhqOSBYfCMWM"}]}"#;

/// What they have signed: alice, until 2100.
const TOKENS: [&str; 4] = [
    "eyJhbGciOiJSUzI1NiIsImtpZCI6InIiLCJ0eXAiOiJKV1QifQ.eyJpc3MiOiJodHRwczovL3Nzby5leGFtcGxlLmNvbS8iLCJhdWQiOiJ0MyIsImV4cCI6NDEwMjQ0NDgwMCwicHJlZmVycmVkX3VzZXJuYW1lIjoiYWxpY2UifQ.h40oH1iLIFWsYCse4uED2k8OuUhPLy3eMAahTPDuHwIVN9chrK9T4x3Mmz1iz7GIoBEtwZ29XJuPPdLrPZuTQWzDbqZ-FRZl3z9O5xSXZ42eeVxtRjT3Kx5ecCpn1SyOsxD50zMu97ZAGarldnoomjuiJo93GUnpPKZFKxdnic24DmUG387q54oA8GazsycGvT3StlV5Rybm04-Bb-oX4qsqNkT0MGv-ImE763ngeAufHOv5spfxj-kGVSi0o-KCwuWPLwGfN_O86pSjdI8FTrM-GTg1VQsn2U5Kljv4tzf9KsqqX5E2acoFno_FG-YKTPAwffxDJmCgegwkjOZuFQ",
    "eyJhbGciOiJFUzI1NiIsImtpZCI6ImUiLCJ0eXAiOiJKV1QifQ.eyJpc3MiOiJodHRwczovL3Nzby5leGFtcGxlLmNvbS8iLCJhdWQiOiJ0MyIsImV4cCI6NDEwMjQ0NDgwMCwicHJlZmVycmVkX3VzZXJuYW1lIjoiYWxpY2UifQ.crcEhFHcArzhG0Xb6cv8Wt4R1_Tyhh-c4_OCfq36bhu20EvwMH0gAwoCChBABSdN5e22pkcVya1jMfxbThf8mg",
    "eyJhbGciOiJFZERTQSIsImtpZCI6ImQiLCJ0eXAiOiJKV1QifQ.eyJpc3MiOiJodHRwczovL3Nzby5leGFtcGxlLmNvbS8iLCJhdWQiOiJ0MyIsImV4cCI6NDEwMjQ0NDgwMCwicHJlZmVycmVkX3VzZXJuYW1lIjoiYWxpY2UifQ.tqwoeSgo-Rc_SpXu_eTjprp6ILwRKkxyZhFexdIDGeRZcKu7oYcrxqQ3iG0SbgSr6h1aGY29_Mh98X7s4FJmBA",
    // It names keys of its own, which are not looked at.
    "eyJhbGciOiJFUzI1NiIsImtpZCI6ImUiLCJ0eXAiOiJKV1QiLCJqd2siOnsia3R5IjoiRUMiLCJraWQiOiJlIiwidXNlIjoic2lnIiwiYWxnIjoiRVMyNTYiLCJjcnYiOiJQLTI1NiIsIngiOiJ2eFpXbFhQbDR1N2NrY19kRVJxajJNNUtBYjhOUm9SV0ctVExSWjBTYmtVIiwieSI6InN6Q1NZTl9KS2VORmd2SGZ1TmVCQnY2cF9RMzJEMEtnMkdRbmJ2UU16Z3MifSwiamt1IjoiaHR0cHM6Ly9tYWxsb3J5LmV4YW1wbGUuY29tLyJ9.eyJpc3MiOiJodHRwczovL3Nzby5leGFtcGxlLmNvbS8iLCJhdWQiOiJ0MyIsImV4cCI6NDEwMjQ0NDgwMCwicHJlZmVycmVkX3VzZXJuYW1lIjoiYWxpY2UifQ.4Y1wX_efbGVoZSmrG3eFxGVny8Rzo_EfQZR2D_pW9tqNyVZmhXRxDUbKM1hnREzaHPh6f5KtI7xRkXRu5bt-8A",
];
