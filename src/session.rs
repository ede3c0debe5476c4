//! Is there a session? From the request's kind, its cookies and the instance's answer to proxy or pair: a pure core.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwapOption;
use cookie::Cookie;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use serde_json::Value;

/// The name that every version before 0.0.29 uses, and later ones that are not bound to loopback.
const PLAIN_NAME: &str = "t3_session";
/// How the names begin that later versions on loopback use, followed by their port and twelve hex digits.
const NAME_PREFIX: &str = "t3_session_";

static FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

/// How long an instance that could not be asked for its cookie's name is left alone.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// What is known of the name of an instance's session cookie. The name is the instance's to say, and changes with its
/// version.
#[derive(Debug, Default)]
pub struct CookieName {
    known: ArcSwapOption<String>,
    /// Set by the first question, which everybody waits for.
    pub(crate) first: tokio::sync::OnceCell<()>,
    /// When the instance was asked last; nobody waits for the later questions.
    asked: Mutex<Option<Instant>>,
}

impl CookieName {
    /// Notes the name that the instance has just said.
    pub fn learn(&self, name: &str) {
        if self
            .known
            .load()
            .as_ref()
            .is_none_or(|known| **known != name)
        {
            self.known.store(Some(Arc::new(name.to_owned())));
        }
    }

    /// Whether it is time to ask again, which is then to be done.
    pub fn ask_again(&self) -> bool {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let due = asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN);
        if due {
            *asked = Some(Instant::now());
        }
        due
    }

    /// Whether a cookie of that name counts as a session cookie.
    pub fn counts(&self, name: &[u8]) -> bool {
        counts(self.known.load().as_deref(), name)
    }

    /// Whether the instance has said it.
    pub fn is_known(&self) -> bool {
        self.known.load().is_some()
    }
}

/// Whether a cookie of that name counts as a session cookie. While the name is unknown every name that an instance may use
/// counts, so that a restart of either side never costs a working session.
fn counts(known: Option<&String>, name: &[u8]) -> bool {
    match known {
        Some(known) => known.as_bytes() == name,
        None => may_be_session(name),
    }
}

fn may_be_session(name: &[u8]) -> bool {
    name == PLAIN_NAME.as_bytes() || name.starts_with(NAME_PREFIX.as_bytes())
}

/// Whether the request is a top-level navigation of a browser. Only such a request may be answered with a redirect
/// because a session died: the web UI's own calls need the instance's own answer.
pub fn is_document_navigation(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::GET
        && match headers.get(&FETCH_DEST).filter(|dest| !dest.is_empty()) {
            Some(dest) => dest == "document",
            None => accepts_html(headers),
        }
}

/// Whether the client says that it can show a page.
pub fn accepts_html(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .any(|value| value.as_bytes().windows(9).any(|part| part == b"text/html"))
}

/// The cookies of a request that count as session cookies where that name is known, as name and value. A cookie of another
/// application may hold any bytes; it must not hide ours.
fn each_session_cookie<'a>(
    headers: &'a HeaderMap,
    known: Option<&'a String>,
) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .flat_map(|line| pairs(line.as_bytes()))
        .filter_map(|pair| {
            let equals = memchr::memchr(b'=', pair)?;
            Some((pair[..equals].trim_ascii(), pair[equals + 1..].trim_ascii()))
        })
        .filter(move |(name, _)| counts(known, name))
}

/// What stands between the semicolons of a line. Other applications' cookies can be long.
fn pairs(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = memchr::memchr_iter(b';', line).chain([line.len()]);
    let mut start = 0;
    ends.map(move |end| {
        let pair = &line[start..end];
        start = end + 1;
        pair
    })
}

/// Whether the request has a session cookie, alive or not.
pub fn has_session_cookie(headers: &HeaderMap, names: &CookieName) -> bool {
    let known = names.known.load();
    each_session_cookie(headers, known.as_deref())
        .next()
        .is_some()
}

/// The session cookies of a request as one `Cookie` header of their own, or `None` where there is none. Of a name that
/// is there twice the first counts, as it does for the instance.
pub fn session_cookies(headers: &HeaderMap, names: &CookieName) -> Option<HeaderValue> {
    let known = names.known.load();
    let mut kept: Vec<(&[u8], &[u8])> = Vec::new();
    for (name, value) in each_session_cookie(headers, known.as_deref()) {
        if !kept.iter().any(|(earlier, _)| *earlier == name) {
            kept.push((name, value));
        }
    }
    let pairs: Vec<_> = kept
        .iter()
        .map(|(name, value)| [*name, *value].join(&b'='))
        .collect();
    let mut value = HeaderValue::from_bytes(&pairs.join(&b"; "[..]))
        .ok()
        .filter(|value| !value.is_empty())?;
    value.set_sensitive(true);
    Some(value)
}

/// The name of the session cookie that a `Set-Cookie` line gives the browser, if it gives one.
pub fn session_cookie_set(line: &HeaderValue, names: &CookieName) -> Option<String> {
    let text = String::from_utf8_lossy(line.as_bytes());
    let cookie = Cookie::parse(text).ok()?;
    // The instance's word for its name may just have changed, so names that were not expected count too.
    let is_session =
        names.counts(cookie.name().as_bytes()) || may_be_session(cookie.name().as_bytes());
    // RFC 6265, section 5.3: Max-Age goes before Expires.
    let expired = match (cookie.max_age(), cookie.expires_datetime()) {
        (Some(age), _) => !age.is_positive(),
        (None, Some(at)) => at <= SystemTime::now(),
        (None, None) => false,
    };
    let deleted = cookie.value().is_empty() || expired;
    (is_session && !deleted).then(|| cookie.name().to_owned())
}

/// What an instance says about a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It knows the session.
    Alive,
    /// It says that it does not know the session.
    Dead,
    /// It said nothing that can be read, which is no reason to take a session away.
    Unknown,
}

/// What the body of a 200 to a session check says: the verdict, and the name of the session cookie. An answer that is
/// clearly an instance's and names no cookie comes from a version where the name is constant.
pub fn read_check(body: &[u8]) -> (Verdict, Option<Cow<'static, str>>) {
    let Some(Ok(Value::Object(answer))) = serde_json::Deserializer::from_slice(body)
        .into_iter::<Value>()
        .next()
    else {
        return (Verdict::Unknown, None);
    };
    let authenticated = answer.get("authenticated");
    let verdict = match authenticated {
        Some(Value::Bool(true)) => Verdict::Alive,
        Some(Value::Bool(false) | Value::Null) | None => Verdict::Dead,
        Some(_) => Verdict::Unknown,
    };
    let name = match answer
        .get("auth")
        .and_then(|auth| auth.get("sessionCookieName"))
    {
        Some(Value::String(name)) if is_token(name) => Some(Cow::Owned(name.clone())),
        // No cookie can have that name, so every browser would seem to have none.
        Some(Value::String(name)) if !name.is_empty() => None,
        _ if authenticated.is_some_and(Value::is_boolean) => Some(Cow::Borrowed(PLAIN_NAME)),
        _ => None,
    };
    (verdict, name)
}

/// Whether `name` may be that of a cookie (RFC 6265, section 4.1.1).
fn is_token(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !name.is_empty() && name.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cookies(lines: &[&[u8]], known: Option<&str>) -> Option<String> {
        let names = CookieName::default();
        if let Some(name) = known {
            names.learn(name);
        }
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::COOKIE, HeaderValue::from_bytes(line).unwrap());
        }
        session_cookies(&headers, &names).map(|value| value.to_str().unwrap().to_owned())
    }

    #[test]
    fn only_the_session_cookie_goes_into_the_check() {
        let known = Some("t3_session");
        let found = |lines: &[&[u8]]| cookies(lines, known);
        assert_eq!(
            found(&[b"a=1; t3_session=p.s; b=2"]).as_deref(),
            Some("t3_session=p.s")
        );
        assert_eq!(
            found(&[b"t3_session=first; t3_session=second"]).as_deref(),
            Some("t3_session=first")
        );
        assert_eq!(
            found(&[b"a=1", b"t3_session=p.s"]).as_deref(),
            Some("t3_session=p.s")
        );
        assert_eq!(
            found(&[b"junk;;=;t3_session=p.s"]).as_deref(),
            Some("t3_session=p.s")
        );
        assert_eq!(
            found(&[b"other=\xff\xfe; t3_session=p.s"]).as_deref(),
            Some("t3_session=p.s")
        );
        assert_eq!(
            found(&[b"t3_session_3773_7b609e3964c4=p.s; xt3_session=1"]),
            None
        );
        assert_eq!(found(&[b""]), None);
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn while_the_name_is_unknown_every_possible_name_counts() {
        let found = cookies(
            &[b"t3_session_3773_7b609e3964c4=a.b; t3_session=c.d; t3_sessions=no"],
            None,
        );
        assert_eq!(
            found.as_deref(),
            Some("t3_session_3773_7b609e3964c4=a.b; t3_session=c.d")
        );
        let found = cookies(
            &[b"t3_session_3773_7b609e3964c4=a.b; t3_session=c.d"],
            Some("t3_session_3773_7b609e3964c4"),
        );
        assert_eq!(found.as_deref(), Some("t3_session_3773_7b609e3964c4=a.b"));
    }

    #[test]
    fn a_navigation_is_what_the_browser_says_it_is() {
        let is = |method: &str, headers: &[(&'static str, &str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(*name, HeaderValue::from_str(value).unwrap());
            }
            is_document_navigation(&Method::from_bytes(method.as_bytes()).unwrap(), &map)
        };
        assert!(is("GET", &[("sec-fetch-dest", "document")]));
        assert!(is(
            "GET",
            &[("accept", "text/html,application/xhtml+xml;q=0.9")]
        ));
        assert!(!is(
            "GET",
            &[("sec-fetch-dest", "empty"), ("accept", "text/html")]
        ));
        assert!(!is(
            "GET",
            &[("sec-fetch-dest", "iframe"), ("accept", "text/html")]
        ));
        assert!(!is("GET", &[("accept", "*/*")]));
        assert!(!is("GET", &[]));
        assert!(!is(
            "POST",
            &[("sec-fetch-dest", "document"), ("accept", "text/html")]
        ));
        assert!(!is("HEAD", &[("accept", "text/html")]));
    }

    #[test]
    fn the_answer_to_a_check() {
        let named = |name: &str| Some(name.to_owned());
        for (body, verdict, name) in [
            (
                r#"{"authenticated":true,"auth":{"sessionCookieName":"x"}}"#,
                Verdict::Alive,
                named("x"),
            ),
            (
                r#"{"authenticated":false,"auth":{"sessionCookieName":"x"}}"#,
                Verdict::Dead,
                named("x"),
            ),
            (
                r#"{"authenticated":false}"#,
                Verdict::Dead,
                named("t3_session"),
            ),
            (
                r#"{"authenticated":true,"auth":{"sessionCookieName":"a b; c=d"}}"#,
                Verdict::Alive,
                None,
            ),
            (r#"{"authenticated":null}"#, Verdict::Dead, None),
            (r#"{"auth":{"sessionCookieName":7}}"#, Verdict::Dead, None),
            ("{}", Verdict::Dead, None),
            (
                r#"{"authenticated":false} and more"#,
                Verdict::Dead,
                named("t3_session"),
            ),
            (r#"{"authenticated":"no"}"#, Verdict::Unknown, None),
            (r#"{"authenticated":fal"#, Verdict::Unknown, None),
            ("<!doctype html>", Verdict::Unknown, None),
            ("[]", Verdict::Unknown, None),
            ("", Verdict::Unknown, None),
        ] {
            let (said, cookie) = read_check(body.as_bytes());
            assert_eq!(
                (said, cookie.map(Cow::into_owned)),
                (verdict, name),
                "{body}"
            );
        }
    }

    #[test]
    fn a_set_cookie_line_names_a_session_only_when_it_gives_one() {
        let set = |line: &str| {
            session_cookie_set(
                &HeaderValue::from_str(line).unwrap(),
                &CookieName::default(),
            )
        };
        assert_eq!(
            set("t3_session=a.b; Path=/; HttpOnly; SameSite=Lax").as_deref(),
            Some("t3_session")
        );
        assert_eq!(
            set("t3_session_3773_7b609e3964c4=a.b; Path=/").as_deref(),
            Some("t3_session_3773_7b609e3964c4")
        );
        assert_eq!(set("theme=dark; Path=/"), None);
        assert_eq!(set("t3_session=; Path=/"), None);
        assert_eq!(set("t3_session=a.b; Max-Age=0"), None);
        let long_ago = "Expires=Thu, 01 Jan 1970 00:00:00 GMT";
        assert_eq!(set(&format!("t3_session=a.b; {long_ago}")), None);
        assert!(set(&format!("t3_session=a.b; {long_ago}; Max-Age=60")).is_some());
    }
}
