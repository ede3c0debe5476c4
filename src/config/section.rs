//! A settings file as written: its mappings key by key, and what values mean. All faults are reported at once.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use yaml_serde::{Mapping, Value};

/// One thing that is wrong with the settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Path of the key, such as `dispatch.session.check_timeout`; empty where the file as a whole is meant.
    pub key: String,
    /// What is wrong with it, and what to write instead.
    pub what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.key.is_empty() {
            f.write_str(&self.what)
        } else {
            write!(f, "{}: {}", self.key, self.what)
        }
    }
}

/// Settings that cannot be used: every fault that the file has.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {}", list(faults))]
pub struct ConfigError {
    /// The file, as it was named.
    pub file: String,
    /// All of its faults, never empty.
    pub faults: Vec<Fault>,
}

/// One fault on the line of the file, several below it.
fn list(faults: &[Fault]) -> String {
    match faults {
        [only] => only.to_string(),
        many => many
            .iter()
            .fold(format!("{} faults", many.len()), |text, fault| {
                format!("{text}\n  {fault}")
            }),
    }
}

/// Reads a file and its meaning.
pub(crate) fn load<T>(
    file: &Path,
    parse: impl FnOnce(&str) -> Result<T, Vec<Fault>>,
) -> Result<T, ConfigError> {
    std::fs::read_to_string(file)
        .map_err(|error| {
            vec![whole(format!(
                "cannot be read: {error}; name a readable settings file with -c"
            ))]
        })
        .and_then(|text| parse(&text))
        .map_err(|faults| ConfigError {
            file: file.display().to_string(),
            faults,
        })
}

/// The mapping that a file's text is.
pub(crate) fn mapping(text: &str) -> Result<Mapping, Vec<Fault>> {
    match yaml_serde::from_str(text) {
        Ok(Value::Mapping(map)) => Ok(map),
        Ok(Value::Null) => Ok(Mapping::new()),
        Ok(_) => Err(vec![whole("is not a mapping of keys to values")]),
        Err(error) => Err(vec![whole(format!("is not YAML: {error}"))]),
    }
}

pub(crate) fn whole(what: impl Into<String>) -> Fault {
    Fault {
        key: String::new(),
        what: what.into(),
    }
}

/// A mapping that is read key by key. What nobody asked for by the time of [`Section::finish`] is unknown.
pub(crate) struct Section<'a> {
    path: String,
    map: Mapping,
    known: Vec<&'static str>,
    faults: &'a mut Vec<Fault>,
}

impl<'a> Section<'a> {
    pub(crate) fn new(path: String, value: Value, faults: &'a mut Vec<Fault>) -> Section<'a> {
        let map = match value {
            Value::Mapping(map) => map,
            Value::Null => Mapping::new(),
            other => {
                faults.push(Fault {
                    key: path.clone(),
                    what: format!("{} is not a mapping of keys to values", shown(&other)),
                });
                Mapping::new()
            }
        };
        Section {
            path,
            map,
            known: Vec::new(),
            faults,
        }
    }

    pub(crate) fn section(&mut self, key: &'static str) -> Section<'_> {
        self.known.push(key);
        let value = self.map.remove(key).unwrap_or(Value::Null);
        Section::new(format!("{}.{key}", self.path), value, self.faults)
    }

    /// The meaning of `key`, or of `default`, which is written as it would be in the file, where it is absent.
    pub(crate) fn take<W: DeserializeOwned, T>(
        &mut self,
        key: &'static str,
        default: impl serde::Serialize,
        meaning: impl Fn(W) -> Result<T, String>,
    ) -> T {
        self.known.push(key);
        let read = |value: &Value| {
            yaml_serde::from_value(value.clone())
                .map_err(|error| format!("{} is not usable: {error}", shown(value)))
                .and_then(&meaning)
        };
        let written = self.map.remove(key).map(|value| read(&value));
        match written {
            Some(Ok(meant)) => meant,
            written => {
                if let Some(Err(what)) = written {
                    self.fault(key, what);
                }
                let default = yaml_serde::to_value(default).unwrap_or(Value::Null);
                read(&default).expect("a default is a valid setting")
            }
        }
    }

    /// The meaning of a list, each of whose faults is told by its place.
    pub(crate) fn take_list<T>(
        &mut self,
        key: &'static str,
        default: &[&str],
        meaning: impl Fn(String) -> Result<T, String>,
    ) -> Vec<T> {
        let texts: Vec<String> = self.take(key, default, Ok);
        let mut meant = Vec::new();
        for (position, text) in texts.into_iter().enumerate() {
            match meaning(text) {
                Ok(one) => meant.push(one),
                Err(what) => self.fault(&format!("{key}[{position}]"), what),
            }
        }
        meant
    }

    /// The meaning of `key`, which has no default: `None` where it is absent or cannot be meant, which is then told.
    pub(crate) fn require<W: DeserializeOwned, T>(
        &mut self,
        key: &'static str,
        missing: &str,
        meaning: impl Fn(W) -> Result<T, String>,
    ) -> Option<T> {
        let meant = self.take(key, None::<()>, |written: Option<W>| {
            written.map(&meaning).transpose()
        });
        if meant.is_none() && !self.is_faulty(key) {
            self.fault(key, format!("is missing: {missing}"));
        }
        meant
    }

    /// The meanings of a list of mappings, each read by `read`. What `read` did not ask for is unknown.
    pub(crate) fn take_each<T>(
        &mut self,
        key: &'static str,
        mut read: impl FnMut(&mut Section<'_>) -> T,
    ) -> Vec<T> {
        self.known.push(key);
        let items = match self.map.remove(key) {
            Some(Value::Sequence(items)) => items,
            None | Some(Value::Null) => Vec::new(),
            Some(other) => {
                self.fault(key, format!("{} is not a list of mappings", shown(&other)));
                Vec::new()
            }
        };
        let mut meant = Vec::new();
        for (position, item) in items.into_iter().enumerate() {
            let path = format!("{}.{key}[{position}]", self.path);
            let mut section = Section::new(path, item, self.faults);
            meant.push(read(&mut section));
            section.finish();
        }
        meant
    }

    /// The secret under `token`, or in the file that `token_file` names.
    pub(crate) fn token(&mut self) -> Option<Secret> {
        // A secret is never quoted, whatever is wrong with it.
        let mut read = |key: &'static str| -> Option<Value> {
            self.known.push(key);
            self.map.remove(key).filter(|value| !value.is_null())
        };
        let (written, file) = (read("token"), read("token_file"));
        let text = match (&written, &file) {
            (None, None) => return None,
            (Some(_), Some(_)) => {
                self.fault("token_file", "stands beside token: write one of the two");
                return None;
            }
            (Some(value), None) => (
                "token",
                value
                    .as_str()
                    .map(str::to_owned)
                    .ok_or_else(|| "is not a text: put it in quotation marks".to_owned()),
            ),
            (None, Some(value)) => {
                let path = value.as_str().unwrap_or_default();
                let text = std::fs::read_to_string(path)
                    .map(|text| text.trim_end().to_owned())
                    .map_err(|error| format!("{path:?} cannot be read: {error}"));
                ("token_file", text)
            }
        };
        match text.1.and_then(token) {
            Ok(secret) => Some(secret),
            Err(what) => {
                self.fault(text.0, what);
                None
            }
        }
    }

    /// Whether the file has `key`, which has not been taken yet.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Whether the file says something under `key`, which has not been taken yet.
    pub(crate) fn is_written(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(|value| !value.is_null())
    }

    /// Whether a fault in `key` or in a part of it has been told.
    pub(crate) fn is_faulty(&self, key: &str) -> bool {
        let key = format!("{}.{key}", self.path);
        self.faults.iter().any(|fault| fault.key.starts_with(&key))
    }

    pub(crate) fn fault(&mut self, key: &str, what: impl Into<String>) {
        self.faults.push(Fault {
            key: format!("{}.{key}", self.path),
            what: what.into(),
        });
    }

    pub(crate) fn finish(mut self) {
        let unknown: Vec<String> = self.map.keys().map(plain).collect();
        for key in unknown {
            let what = format!("is not a key here; the keys are {}", self.known.join(", "));
            self.fault(&key, what);
        }
    }
}

/// A value on one line, as a person would recognise it.
pub(crate) fn shown(value: &Value) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "this value".into())
}

/// A key, which is nearly always a string, without quotes where it can be seen without them.
pub(crate) fn plain(key: &Value) -> String {
    key.as_str()
        .filter(|key| !key.is_empty())
        .map_or_else(|| shown(key), str::to_owned)
}

pub(crate) fn address(text: String) -> Result<SocketAddr, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(address),
        _ => Err(format!(
            "{text:?} is not an IP address with a port: write for example 0.0.0.0:3780 or [::]:3780"
        )),
    }
}

/// The longest duration: with what is later reckoned with it, no clock of this machine overflows.
const LONGEST: Duration = Duration::from_secs(3650 * 24 * 60 * 60);

/// Whether a duration, which is `shown` so, can be reckoned with.
pub(crate) fn not_too_long(duration: Duration, shown: impl fmt::Display) -> Result<(), String> {
    if duration > LONGEST {
        return Err(format!("{shown} is longer than 3650 days"));
    }
    Ok(())
}

pub(crate) fn duration(text: String) -> Result<Duration, String> {
    match humantime::parse_duration(&text) {
        Ok(duration) if !duration.is_zero() => {
            not_too_long(duration, format_args!("{text:?}")).map(|()| duration)
        }
        _ => Err(format!(
            "{text:?} is not a duration above zero: write for example 60s or 500ms"
        )),
    }
}

pub(crate) fn path(text: String) -> Result<String, String> {
    // It goes into a request line, so nothing may end that line or the path in it.
    if text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text)
    } else {
        Err(format!(
            "{text:?} is not a path: it begins with / and has no blanks"
        ))
    }
}

/// 32 bits hold more than anybody means, and leave room to reckon with it.
pub(crate) fn at_least_one(number: u32) -> Result<u32, String> {
    filled(number, |number| *number == 0, "at least 1")
}

pub(crate) fn filled<T: fmt::Debug>(
    value: T,
    empty: impl Fn(&T) -> bool,
    wanted: &str,
) -> Result<T, String> {
    if empty(&value) {
        Err(format!("{value:?} is not enough: write {wanted}"))
    } else {
        Ok(value)
    }
}

/// A value that must not be seen: no `Debug` output holds it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Whether `text` is it. How long that takes does not tell how much of it was right.
    pub fn is(&self, text: &[u8]) -> bool {
        let secret = self.0.as_bytes();
        let differing = secret
            .iter()
            .zip(text.iter().chain(std::iter::repeat(&0)))
            .fold(0, |differing, (a, b)| differing | (a ^ b));
        std::hint::black_box(differing) == 0 && secret.len() == text.len()
    }

    /// The value itself, for whoever has to send it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// A token that may stand in a header.
pub(crate) fn token(text: String) -> Result<Secret, String> {
    if text.len() >= 16 && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(Secret(text))
    } else {
        // The value is not quoted: it is to be a secret.
        Err("is not a token: write at least 16 letters, digits or signs, without blanks".into())
    }
}

/// The name of a leg, which goes into a URL, a label and a log line.
pub(crate) fn leg_name(text: String) -> Result<String, String> {
    let fits =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
    if (1..=32).contains(&text.len()) && text.bytes().all(fits) {
        Ok(text)
    } else {
        Err(format!(
            "{text:?} is not the name of a leg: write up to 32 of a-z, 0-9, - and _"
        ))
    }
}

/// The certificates in a PEM file, each of which can be believed.
pub(crate) fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let shown = file.display();
    let pem =
        std::fs::read(file).map_err(|error| format!("\"{shown}\" cannot be read: {error}"))?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("\"{shown}\" is not a file of PEM certificates: {error}"))?;
    if found.is_empty() {
        return Err(format!(
            "\"{shown}\" holds no certificate: write a file with -----BEGIN CERTIFICATE-----"
        ));
    }
    let mut roots = tokio_rustls::rustls::RootCertStore::empty();
    for (position, certificate) in found.iter().enumerate() {
        roots.add(certificate.clone()).map_err(|error| {
            format!(
                "\"{shown}\": certificate {} is not usable: {error}",
                position + 1
            )
        })?;
    }
    Ok(found)
}
