//! `t3-dispatch check`: whether everything that serving needs is in place.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use http::{HeaderValue, StatusCode};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::config::{Dispatch, Settings};
use crate::instance::{Caller, address};
use crate::jwt::Keys;
use crate::mint::{mint, mint_fault};
use crate::pair::Pairer;
use crate::session::{Verdict, read_check};
use crate::table::{Instance, Table};

/// Where an instance says which version it is.
const ENVIRONMENT: &str = "/.well-known/t3/environment";

/// Longest wait for an instance's answer.
const LIMIT: Duration = Duration::from_secs(5);

/// Instances asked at once.
const AT_ONCE: usize = 16;

/// What was looked at, in the order of looking.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    well: bool,
    what: String,
    detail: String,
    /// What a program may want beside `well`, `what` and `detail`.
    facts: Map<String, Value>,
}

impl Report {
    fn add(&mut self, what: impl Into<String>, found: Result<String, String>) {
        let well = found.is_ok();
        let (Ok(detail) | Err(detail)) = found;
        self.rows.push(Row {
            well,
            what: what.into(),
            detail,
            facts: Map::new(),
        });
    }

    /// Whether nothing is wrong.
    pub fn all_well(&self) -> bool {
        self.rows.iter().all(|row| row.well)
    }

    /// The report as one JSON object.
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let mut object = row.facts.clone();
                object.insert("check".into(), json!(row.what));
                object.insert("ok".into(), json!(row.well));
                object.insert("detail".into(), json!(row.detail));
                Value::Object(object)
            })
            .collect();
        json!({ "ok": self.all_well(), "checks": rows })
    }

    /// Prints one aligned line a row, coloured on a terminal.
    pub fn print(&self) {
        let width = self
            .rows
            .iter()
            .map(|row| row.what.chars().count())
            .max()
            .unwrap_or(0);
        for row in &self.rows {
            let (mark, colour) = if row.well {
                ("ok  ", AnsiColor::Green)
            } else {
                ("FAIL", AnsiColor::Red)
            };
            let style = Style::new().bold().fg_color(Some(colour.into()));
            let detail = row
                .detail
                .replace('\n', &format!("\n{:width$}", "", width = width + 8));
            anstream::println!("{style}{mark}{style:#}  {:width$}  {detail}", row.what);
        }
    }
}

/// Looks at everything, and pairs `user` for real where one is named.
pub fn run(conf: Option<&Path>, user: Option<&str>) -> Report {
    let mut report = Report::default();
    let settings = match Settings::load(conf) {
        Ok(settings) => {
            let file = conf.map_or("defaults, no file".into(), |file| {
                file.display().to_string()
            });
            report.add("settings", Ok(file));
            settings
        }
        Err(error) => {
            report.add("settings", Err(error.to_string()));
            return report;
        }
    };
    for warning in settings.warnings {
        report.add("settings", Err(warning));
    }
    let dispatch = settings.dispatch;
    let way = &dispatch.pairing.mint;
    report.add(
        "mint",
        match mint_fault(way) {
            None => Ok(way.to_string()),
            Some(fault) => Err(format!("{fault} ({})", way.key())),
        },
    );
    let file = dispatch.table.display().to_string();
    let empty = Table::beside(dispatch.own_ports());
    let table = match Table::load(&dispatch.table, &empty) {
        Ok(table) => {
            report.add("table", Ok(format!("{file}, {} users", table.len())));
            table
        }
        Err(error) => {
            report.add("table", Err(format!("{file}: {error} (dispatch.table)")));
            return report;
        }
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            report.add("runtime", Err(error.to_string()));
            return report;
        }
    };
    runtime.block_on(async {
        if let Some(jwt) = &dispatch.identity.jwt {
            let found = Keys::new(jwt.clone()).fetch().await;
            let source = &jwt.jwks;
            let found = found
                .map(|keys| format!("{source}, {} keys", keys.len()))
                .map_err(|error| format!("{source} {error} (dispatch.identity.jwt.jwks)"));
            report.add("keys", found);
        }
        let caller = Arc::new(Caller::new(false));
        report
            .rows
            .extend(instances(&dispatch, &table, &caller).await);
        if let Some(user) = user {
            pair(&mut report, dispatch, &table, user, caller).await;
        }
    });
    report
}

/// One row a user, in the order of their names.
async fn instances(dispatch: &Dispatch, table: &Table, caller: &Arc<Caller>) -> Vec<Row> {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut asking = JoinSet::new();
    for (position, (name, instance)) in table.users().into_iter().enumerate() {
        let (name, instance, caller, places) = (
            name.to_owned(),
            instance.clone(),
            caller.clone(),
            places.clone(),
        );
        let path = dispatch.session.check_path.clone();
        asking.spawn(async move {
            let _place = places.acquire().await;
            (
                position,
                instance_row(name, &instance, &caller, &path).await,
            )
        });
    }
    let mut rows = asking.join_all().await;
    rows.sort_by_key(|(position, _)| *position);
    rows.into_iter().map(|(_, row)| row).collect()
}

async fn instance_row(name: String, instance: &Instance, caller: &Caller, check_path: &str) -> Row {
    let mut facts = Map::new();
    facts.insert("os_user".into(), json!(instance.os_user));
    facts.insert("port".into(), json!(instance.port));
    let found = async {
        if name.is_empty() || name != name.trim() || name.contains('@') {
            return Err(
                "can never be asked for: a name ends before its first @, is not empty, and has no blanks around it".into(),
            );
        }
        let unanswered = |error: Box<pingora::Error>| {
            format!(
                "does not answer ({}); is t3 serve running as {} on this port?",
                error.etype().as_str(),
                instance.os_user
            )
        };
        let answer = caller
            .get(instance, check_path, None, LIMIT)
            .await
            .map_err(unanswered)?;
        let cookie = match read_check(&answer.body) {
            (_, Some(cookie)) if answer.status == StatusCode::OK => cookie,
            _ => {
                return Err(format!(
                    "{check_path} answers {}, and not as t3 does",
                    answer.status.as_u16()
                ));
            }
        };
        let environment = caller
            .get(instance, ENVIRONMENT, None, LIMIT)
            .await
            .map_err(unanswered)?;
        let environment: Value = serde_json::from_slice(&environment.body).unwrap_or_default();
        let version = environment
            .get("serverVersion")
            .and_then(Value::as_str)
            .unwrap_or("of unknown version");
        facts.insert("version".into(), json!(version));
        facts.insert("cookie".into(), json!(cookie));
        Ok(format!("t3 {version}  cookie {cookie}"))
    }
    .await;
    let well = found.is_ok();
    let (Ok(text) | Err(text)) = found;
    let detail = format!("{} as {}  {text}", address(instance.port), instance.os_user);
    Row {
        well,
        what: name,
        detail,
        facts,
    }
}

/// The real thing, step by step: this is what no health check on `/` can tell.
async fn pair(
    report: &mut Report,
    dispatch: Dispatch,
    table: &Table,
    user: &str,
    caller: Arc<Caller>,
) {
    let rules = dispatch.session;
    let Some(instance) = table.get(user) else {
        report.add("pair", Err(format!("{user} is not in the table")));
        return;
    };
    let pairer = Pairer::new(dispatch.pairing.clone(), caller.clone());
    // What the mint command complains of is for the person at this terminal, and for no log.
    let credential = match mint(&dispatch.pairing, &instance.os_user, Stdio::inherit()).await {
        Ok(credential) => credential,
        Err(error) => return report.add("pair: mint", Err(error.to_string())),
    };
    report.add(
        "pair: mint",
        Ok(format!("a credential for {}", instance.os_user)),
    );
    let paired = match pairer.exchange(instance, credential).await {
        Ok(paired) => paired,
        Err(error) => return report.add("pair: exchange", Err(error.to_string())),
    };
    let by_fallback = if paired.fallback {
        ", the fallback"
    } else {
        ""
    };
    report.add(
        "pair: exchange",
        Ok(format!("taken at {}{by_fallback}", paired.endpoint)),
    );
    report.add("pair: cookie", Ok(paired.cookie.clone()));
    let value = paired
        .set_cookies
        .iter()
        .filter_map(|line| line.to_str().ok()?.split(';').next())
        .find(|pair| pair.starts_with(&paired.cookie))
        .and_then(|pair| HeaderValue::from_str(pair).ok());
    let answer = caller
        .get(
            instance,
            &rules.check_path,
            value.as_ref(),
            rules.check_timeout,
        )
        .await;
    let alive = match answer {
        Ok(answer) if answer.status == StatusCode::OK => match read_check(&answer.body).0 {
            Verdict::Alive => Ok("the instance knows the session".into()),
            _ => Err("the instance does not know the session it has just given".into()),
        },
        Ok(answer) => Err(format!(
            "{} answers {}",
            rules.check_path,
            answer.status.as_u16()
        )),
        Err(error) => Err(format!(
            "{} does not answer ({})",
            rules.check_path,
            error.etype().as_str()
        )),
    };
    report.add("pair: session", alive);
}
