//! The real dispatcher as a process of its own, on a loopback address of its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::http::{self, Reply};

/// An address of 127.0.0.0/8 that no other test uses, so that ports need not be guessed.
pub fn own_address() -> Ipv4Addr {
    static COUNT: AtomicU32 = AtomicU32::new(10);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(
        127,
        COUNT.fetch_add(1, Ordering::Relaxed) as u8,
        high,
        low.max(1),
    )
}

/// A dispatcher that is being set up: change the settings, then start it.
pub struct Setup {
    pub base: PathBuf,
    pub ip: Ipv4Addr,
    /// What goes under `dispatch`.
    pub dispatch: Value,
    /// What goes at the top level.
    pub top: Value,
    pub table: Value,
    pub log_level: String,
    /// What runs the dispatcher, where that is not this test itself.
    through: Option<Command>,
}

impl Setup {
    /// Settings with a table, a mint command and addresses below `base`.
    pub fn new(base: &Path, mint: Vec<String>) -> Setup {
        let ip = own_address();
        Setup {
            base: base.into(),
            ip,
            dispatch: json!({
                "listen": [format!("{ip}:3780")],
                "admin": format!("{ip}:3781"),
                "table": base.join("dispatch.json"),
                "pairing": { "mint": mint },
                "tunnels": { "ledger": base.join("closes.jsonl") },
            }),
            top: json!({
                "threads": 2,
                "upgrade_sock": base.join("upgrade.sock"),
                "pid_file": base.join("pid"),
            }),
            table: json!({}),
            log_level: "info,pingora=warn".into(),
            through: None,
        }
    }

    /// Has the dispatcher started by `command`, which its arguments are added to.
    pub fn through(mut self, command: Command) -> Setup {
        self.through = Some(command);
        self
    }

    /// Gives `name` the instance of `os_user` on `port`.
    pub fn user(mut self, name: &str, os_user: &str, port: u16) -> Setup {
        self.table[name] = json!({ "os_user": os_user, "port": port });
        self
    }

    /// Sets a key below `dispatch`, such as `pairing.max_concurrent`.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Setup {
        let mut place = &mut self.dispatch;
        for part in key.split('.') {
            place = &mut place[part];
        }
        *place = value.into();
        self
    }

    /// Writes settings and table, and names the settings file.
    pub fn write(&self) -> PathBuf {
        let mut settings = self.top.clone();
        settings["dispatch"] = self.dispatch.clone();
        let file = self.base.join("t3-dispatch.yaml");
        // JSON is YAML.
        std::fs::write(&file, settings.to_string()).unwrap();
        std::fs::write(self.base.join("dispatch.json"), self.table.to_string()).unwrap();
        file
    }

    /// Starts the dispatcher and waits until it answers.
    pub async fn start(self) -> Dispatcher {
        let file = self.write();
        let log = self.base.join("log");
        let out = std::fs::File::create(&log).unwrap();
        let child = self
            .through
            .unwrap_or_else(program)
            .args(["serve", "-c"])
            .arg(&file)
            .env("RUST_LOG", &self.log_level)
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        let mut dispatcher = Dispatcher {
            child,
            base: self.base,
            ip: self.ip,
            log: log.clone(),
        };
        let address = dispatcher.address();
        // It answers a moment before everything about it is in place.
        let started = || {
            std::fs::read_to_string(&log)
                .unwrap()
                .contains(" started version=")
        };
        let healthy = async || {
            http::request(address, "GET", "/healthz", &[], b"")
                .await
                .is_ok()
        };
        let until = Instant::now() + Duration::from_secs(20);
        while !(healthy().await && started()) {
            let running = dispatcher.child.try_wait().unwrap().is_none();
            assert!(
                running && Instant::now() < until,
                "the dispatcher did not start:\n{}",
                dispatcher.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        dispatcher
    }
}

/// The binary under test; in an example that is the example itself, which has to behave as one.
pub fn program() -> Command {
    let mut command = match option_env!("CARGO_BIN_EXE_t3-dispatch") {
        Some(program) => Command::new(program),
        None => Command::new(std::env::current_exe().unwrap()),
    };
    command.stdin(Stdio::null());
    command
}

/// A running dispatcher. Dropping it kills it.
pub struct Dispatcher {
    pub child: Child,
    pub base: PathBuf,
    pub ip: Ipv4Addr,
    log: PathBuf,
}

impl Dispatcher {
    pub fn address(&self) -> SocketAddr {
        (self.ip, 3780).into()
    }

    pub fn admin(&self) -> SocketAddr {
        (self.ip, 3781).into()
    }

    /// Everything it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// The log lines so far that hold `part`.
    pub fn logged(&self, part: &str) -> Vec<String> {
        self.log()
            .lines()
            .filter(|line| line.contains(part))
            .map(str::to_owned)
            .collect()
    }

    /// Waits until a log line holds `part`.
    pub async fn wait_for_log(&self, part: &str) {
        wait_for(&format!("a log line with {part:?}"), async || {
            !self.logged(part).is_empty()
        })
        .await;
    }

    /// A request as the edge sends it for `user`.
    pub async fn request(
        &self,
        user: &str,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
    ) -> Reply {
        let identity = format!("{user}@example.com");
        let mut all = vec![("X-authentik-username", identity.as_str())];
        all.extend(headers);
        http::request(self.address(), method, target, &all, b"")
            .await
            .unwrap()
    }

    pub async fn get(&self, user: &str, target: &str, headers: &[(&str, &str)]) -> Reply {
        self.request(user, "GET", target, headers).await
    }

    /// A navigation of `user`'s browser to the workspace, with the cookies it has.
    pub async fn navigate(&self, user: &str, cookies: &str) -> Reply {
        let mut headers = vec![
            ("Sec-Fetch-Dest", "document"),
            ("Accept", "text/html,*/*;q=0.8"),
        ];
        if !cookies.is_empty() {
            headers.push(("Cookie", cookies));
        }
        self.get(user, "/", &headers).await
    }

    /// All metrics.
    pub async fn metrics(&self) -> String {
        http::request(self.admin(), "GET", "/metrics", &[], b"")
            .await
            .unwrap()
            .text()
    }

    /// The value of the one series that is written like `series`, 0 where there is none.
    pub async fn metric(&self, series: &str) -> f64 {
        let metrics = self.metrics().await;
        let value = metrics
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    /// The ledger's records so far, each with its verdict where there is one.
    pub fn records(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.base.join("closes.jsonl")).unwrap_or_default();
        // What is behind the last end of a line is being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let (later, mut records): (Vec<_>, Vec<_>) =
            lines.partition(|line| !line["verdict_of"].is_null());
        for verdict in later {
            for record in &mut records {
                if record["key"] == verdict["verdict_of"] {
                    assert!(record["verdict"].is_null(), "judged twice: {record:#}");
                    record["verdict"] = verdict["verdict"].clone();
                }
            }
        }
        records
    }

    /// Waits until the ledger has that many records, and gives them.
    pub async fn wait_for_records(&self, count: usize) -> Vec<Value> {
        wait_for(&format!("{count} records"), async || {
            self.records().len() >= count
        })
        .await;
        let records = self.records();
        assert_eq!(records.len(), count, "{records:#?}");
        records
    }

    /// Replaces the table by renaming a new file over it.
    pub fn write_table(&self, table: &Value) {
        let new = self.base.join("dispatch.json.new");
        std::fs::write(&new, table.to_string()).unwrap();
        std::fs::rename(&new, self.base.join("dispatch.json")).unwrap();
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits until it has exited.
    pub async fn exited(&mut self) -> ExitStatus {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < until,
                "the dispatcher did not exit:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The numbers of its open file descriptors.
    pub fn descriptors(&self) -> Vec<u64> {
        let folder = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let number = |name: std::ffi::OsString| name.to_str().unwrap().parse().unwrap();
        folder
            .map(|entry| number(entry.unwrap().file_name()))
            .collect()
    }

    /// Lets it open no further file descriptor, or as many as it may again.
    pub fn allow_descriptors(&self, allow: bool) {
        use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
        let maximum = getrlimit(Resource::Nofile).maximum;
        let open = self.descriptors();
        // The limit is one to their numbers.
        let full = (0..).find(|number| !open.contains(number));
        let current = if allow { maximum } else { full };
        let pid = Pid::from_child(&self.child);
        prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum }).unwrap();
    }

    /// Resident memory in KiB.
    pub fn memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the dispatcher's log\n{}", self.log());
        }
    }
}

/// Waits for a condition, for 20 s at most.
pub async fn wait_for(what: &str, condition: impl AsyncFn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !condition().await {
        assert!(Instant::now() < until, "no {what} within 20 s");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
