//! Who has which instance: the dispatch table, read, checked as a whole, swapped at once, and watched.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::marker::PhantomData;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora::server::ShutdownWatch;
use pingora::services::background::BackgroundService;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use tokio::sync::{Notify, watch};

use crate::events;
use crate::pool::Pool;
use crate::session::CookieName;

/// How often the file is looked at. A change is in force two looks later at the latest.
const LOOK: Duration = Duration::from_millis(200);

/// The nice value of the thread that reads it.
const NICE: i32 = 10;

/// After so many entries the thread that reads it lets others go first.
const STRETCH: usize = 1024;

/// How long a file may go on changing before a fault in it is reported all the same.
const SETTLE: Duration = Duration::from_secs(1);

/// One `t3 serve` process, as the table names it, and what has been learnt of it since.
///
/// Names that share an instance share this value, and a reload that leaves the instance alone keeps it.
#[derive(Debug)]
pub struct Instance {
    /// The OS user that the process runs as.
    pub os_user: Box<str>,
    /// The loopback port that it listens on.
    pub port: u16,
    /// Number that no other instance in this process has had.
    pub generation: u64,
    /// The name of its session cookie.
    pub cookie: CookieName,
    /// Connections to it that nobody uses. Most instances of a large table have never had any.
    pool: OnceLock<Arc<Pool>>,
    /// Requests and tunnels that are under way.
    under_way: AtomicUsize,
}

impl Instance {
    fn new(os_user: &str, port: u16) -> Instance {
        Instance {
            os_user: os_user.into(),
            port,
            generation: unique(),
            cookie: CookieName::default(),
            pool: OnceLock::new(),
            under_way: AtomicUsize::new(0),
        }
    }

    /// The connections to it that nobody uses.
    pub fn pool(&self) -> Arc<Pool> {
        self.pool.get_or_init(Arc::default).clone()
    }

    /// A place for a request or a tunnel, if fewer than `most` are under way.
    pub fn enter(self: &Arc<Instance>, most: usize) -> Option<Place> {
        let more = |count| (count < most).then_some(count + 1);
        self.under_way
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more)
            .ok()?;
        Some(Place(self.clone()))
    }
}

/// A place at an instance, given back when dropped.
#[derive(Debug)]
pub struct Place(Arc<Instance>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A number that this process has not given out before, and never 0.
pub fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A dispatch table that passed every check.
#[derive(Debug, Default)]
pub struct Table {
    users: HashMap<Box<str>, Arc<Instance>>,
    /// Ports on which no instance can be, as it would be the dispatcher itself.
    ours: Box<[u16]>,
}

/// Why a table cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The file could not be read.
    #[error("cannot be read: {0}")]
    Unreadable(String),
    /// It is not JSON, or not an object.
    #[error("is not a JSON object of names to instances: {0}")]
    NotAnObject(String),
    /// Entries that break a rule: each fault with its key, never empty.
    #[error("{}", .0.join("\n  "))]
    Entries(Vec<String>),
}

impl Table {
    /// The table of a dispatcher that listens on these ports of 127.0.0.1, and knows nobody yet.
    pub fn beside(ours: impl Into<Box<[u16]>>) -> Table {
        Table {
            ours: ours.into(),
            ..Table::default()
        }
    }

    /// Reads and checks the file. Instances that `old` has too are taken over with what is known of them, and so are the ports
    /// that are the dispatcher's own.
    ///
    /// # Errors
    /// When the file cannot be read or any entry breaks a rule; a table is good as a whole or not at all.
    pub fn load(path: &Path, old: &Table) -> Result<Table, TableError> {
        Table::parse(&read(path)?, old)
    }

    /// The table that `text` means: `{"alice": {"os_user": "alice", "port": 3773}, …}`.
    ///
    /// # Errors
    /// All broken rules.
    pub fn parse(text: &[u8], old: &Table) -> Result<Table, TableError> {
        let Pairs::<&RawValue>(entries) = serde_json::from_slice(text)
            .map_err(|error| TableError::NotAnObject(error.to_string()))?;
        let mut faults = Vec::new();
        let mut users = HashMap::with_capacity(entries.len());
        // By port: the first name, and the instance.
        let mut owners = vec![None; 1 << 16];
        let mut known = vec![None; 1 << 16];
        for instance in old.users.values() {
            known[usize::from(instance.port)] = Some(instance);
        }
        for (count, (Text(name), entry)) in entries.iter().enumerate() {
            breathe(count + 1);
            let (os_user, port) = match read_entry(entry) {
                Ok(entry) => entry,
                Err(wrong) => {
                    faults.extend(wrong.into_iter().map(|what| format!("{name:?}{what}")));
                    continue;
                }
            };
            if old.ours.contains(&port) {
                faults.push(format!(
                    "{name:?}.port: {port} is t3-dispatch's own (dispatch.listen, dispatch.admin)"
                ));
                continue;
            }
            let (first, instance) = owners[usize::from(port)].get_or_insert_with(|| {
                let instance = match known[usize::from(port)] {
                    Some(instance) if *instance.os_user == *os_user => instance.clone(),
                    _ => Arc::new(Instance::new(&os_user, port)),
                };
                (name, instance)
            });
            if *instance.os_user != *os_user {
                faults.push(format!(
                    "{name:?}.port: {port} belongs to OS user {:?} already, by {first:?}: one port serves one OS user",
                    instance.os_user
                ));
                continue;
            }
            if users.insert((**name).into(), instance.clone()).is_some() {
                faults.push(format!("{name:?}: stands in the table twice"));
            }
        }
        if faults.is_empty() {
            let ours = old.ours.clone();
            Ok(Table { users, ours })
        } else {
            Err(TableError::Entries(faults))
        }
    }

    /// The instance of the person called `name`.
    pub fn get(&self, name: &str) -> Option<&Arc<Instance>> {
        self.users.get(name)
    }

    /// Number of names in the table.
    pub fn len(&self) -> usize {
        self.users.len()
    }

    /// Whether nobody has an instance.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// Every name with its instance, in the order of the names.
    pub fn users(&self) -> Vec<(&str, &Arc<Instance>)> {
        let mut users: Vec<_> = self
            .users
            .iter()
            .map(|(name, instance)| (&**name, instance))
            .collect();
        users.sort_by_key(|(name, _)| *name);
        users
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TableError> {
    let unreadable = |error: std::io::Error| TableError::Unreadable(error.to_string());
    // Opening a FIFO would wait for a writer for ever.
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(TableError::Unreadable("is not a file".into()));
    }
    std::fs::read(path).map_err(unreadable)
}

fn read_entry(entry: &RawValue) -> Result<(Cow<'_, str>, u16), Vec<String>> {
    let Ok(Pairs::<&RawValue>(fields)) = serde_json::from_str(entry.get()) else {
        return Err(vec![format!(
            ": {entry} is not an object such as {{\"os_user\": \"alice\", \"port\": 3773}}"
        )]);
    };
    let mut faults = Vec::new();
    let mut field = |key: &str| {
        let mut values = fields.iter().filter(|(Text(name), _)| name == key);
        let value = values.next().map_or("null", |(_, value)| value.get());
        if values.next().is_some() {
            faults.push(format!(".{key}: is given twice"));
        }
        value
    };
    let (os_user, port) = (field("os_user"), field("port"));
    let os_user = serde_json::from_str(os_user)
        .ok()
        .map(|Text(name)| name)
        .filter(|name| is_os_user(name))
        .ok_or_else(|| {
            faults.push(format!(
                ".os_user: {os_user} is not the name of an OS user (^[a-z_][a-z0-9_-]{{0,31}}$)"
            ));
        });
    let port = serde_json::from_str(port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| faults.push(format!(".port: {port} is not a port (1 to 65535)")));
    match (os_user, port) {
        (Ok(os_user), Ok(port)) if faults.is_empty() => Ok((os_user, port)),
        _ => Err(faults),
    }
}

/// Whether `name` matches `^[a-z_][a-z0-9_-]{0,31}$`, the names that useradd(8) makes.
fn is_os_user(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 32
        && bytes
            .next()
            .is_some_and(|byte| byte.is_ascii_lowercase() || byte == b'_')
        && bytes.all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
}

/// A JSON string, in place where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A JSON object as it was written, so that a key given twice is seen.
struct Pairs<'a, V>(Vec<(Text<'a>, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<'de, V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Collect<V> {
            type Value = Pairs<'de, V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<'de, V>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                    breathe(pairs.len());
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect(PhantomData))
    }
}

/// The table in force. Reading it takes no lock; a reload replaces it whole.
#[derive(Debug)]
pub struct Tables {
    path: PathBuf,
    current: ArcSwap<Table>,
    /// Hash of the text that `current` was first made from.
    opened: u64,
    asked: Notify,
    swaps: watch::Sender<()>,
}

impl Tables {
    /// Loads the table that the service starts with, where there was the `empty` one.
    ///
    /// # Errors
    /// As [`Table::load`].
    pub fn open(path: &Path, empty: &Table) -> Result<Tables, TableError> {
        let text = read(path)?;
        let table = Table::parse(&text, empty)?;
        events::table_good(table.len());
        Ok(Tables {
            path: path.into(),
            current: ArcSwap::from_pointee(table),
            opened: hash(&text),
            asked: Notify::new(),
            swaps: watch::channel(()).0,
        })
    }

    /// The table in force now.
    pub fn current(&self) -> arc_swap::Guard<Arc<Table>> {
        self.current.load()
    }

    /// Tells of each time that another table came into force.
    pub fn swaps(&self) -> watch::Receiver<()> {
        self.swaps.subscribe()
    }

    /// Has the file read again soon, and the outcome logged even when nothing changed.
    pub fn reload(&self) {
        self.asked.notify_one();
    }
}

/// Has those wait no longer than a moment who answer requests on the same core: for a whole slice of time, the kernel would not
/// take the core from the thread that reads the table.
fn breathe(entries: usize) {
    if entries.is_multiple_of(STRETCH) {
        std::thread::yield_now();
    }
}

fn hash(text: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// What is seen of a file without reading it.
///
/// Looking beats inotify here: it sees through any chain of symbolic links, needs no watch to be renewed when a folder
/// is replaced, works on every file system, and costs one stat(2) a look.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Look {
    Seen {
        device: u64,
        inode: u64,
        size: u64,
        modified: (i64, i64),
        changed: (i64, i64),
    },
    Missing(std::io::ErrorKind),
}

impl Look {
    fn at(path: &Path) -> Look {
        match std::fs::metadata(path) {
            Ok(meta) => Look::Seen {
                device: meta.dev(),
                inode: meta.ino(),
                size: meta.size(),
                modified: (meta.mtime(), meta.mtime_nsec()),
                changed: (meta.ctime(), meta.ctime_nsec()),
            },
            Err(error) => Look::Missing(error.kind()),
        }
    }

    /// Whether the file changed so recently that a further change could leave the very same time stamps.
    fn is_fresh(&self) -> bool {
        let Look::Seen { changed, .. } = self else {
            return false;
        };
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |age| age.as_secs() as i64);
        (now - changed.0).abs() <= 1
    }
}

/// Keeps [`Tables`] in step with its file.
pub struct Watcher {
    tables: Arc<Tables>,
    poll: Duration,
}

impl Watcher {
    /// Reads the file whenever it changes, and every `poll` in any case.
    pub fn new(tables: Arc<Tables>, poll: Duration) -> Watcher {
        Watcher { tables, poll }
    }
}

/// How the file was at the last reading.
enum State {
    Good,
    /// Wrong since then, perhaps only because it is being written: reported once it has settled.
    Suspect(Instant),
    /// Wrong, and reported.
    Bad(TableError),
}

#[async_trait]
impl BackgroundService for Watcher {
    // The file is read on this service's own thread, so a slow disk or a huge table holds up no request.
    // A process that was replaced goes on reading it: access of the people whose tunnels it has ends there too.
    async fn start(&self, _shutdown: ShutdownWatch) {
        let Tables {
            path,
            current,
            opened,
            asked,
            swaps,
        } = &*self.tables;
        // Where there are more threads than cores, those that answer requests go first. It still gets a tenth of a core.
        let _ = rustix::process::setpriority_process(None, NICE);
        let mut in_force = *opened;
        let mut state = State::Good;
        let mut seen = None;
        let mut read_at = Instant::now();
        let mut retired = Vec::new();
        loop {
            let asked = tokio::select! {
                () = tokio::time::sleep(LOOK) => false,
                () = asked.notified() => true,
            };
            // Whoever lets go of a large table last is busy for a while, and that is never a request.
            retired.retain(|table| Arc::strong_count(table) > 1);
            let look = Look::at(path);
            let settled = seen.as_ref() == Some(&look);
            let due = asked || look.is_fresh() || read_at.elapsed() >= self.poll;
            if settled && !due && !matches!(state, State::Suspect(_)) {
                continue;
            }
            seen = Some(look);
            read_at = Instant::now();
            let loaded = read(path).and_then(|text| match hash(&text) {
                hash if hash == in_force => Ok(None),
                hash => Table::parse(&text, &current.load()).map(|table| Some((table, hash))),
            });
            match loaded {
                Ok(changed) => {
                    let news = asked || changed.is_some() || matches!(state, State::Bad(_));
                    if let Some((table, hash)) = changed {
                        retired.push(current.swap(Arc::new(table)));
                        swaps.send_replace(());
                        in_force = hash;
                    }
                    state = State::Good;
                    let users = current.load().len();
                    events::table_good(users);
                    if news {
                        events::table_reloaded(users, read_at.elapsed());
                    }
                }
                Err(error) => {
                    let report = asked
                        || match &state {
                            State::Good => false,
                            State::Suspect(since) => settled || since.elapsed() >= SETTLE,
                            State::Bad(known) if *known == error => continue,
                            State::Bad(_) => false,
                        };
                    state = if report {
                        events::table_rejected(path, &error);
                        State::Bad(error)
                    } else if let State::Suspect(since) = state {
                        State::Suspect(since)
                    } else {
                        State::Suspect(Instant::now())
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_instance_is_the_dispatcher_itself() {
        let parse = |old: &Table, port: u16| {
            let text = format!(r#"{{"alice": {{"os_user": "alice", "port": {port}}}}}"#);
            Table::parse(text.as_bytes(), old)
        };
        let first = parse(&Table::beside([3780, 3781]), 3773).unwrap();
        for port in [3780, 3781] {
            let fault = format!(
                "\"alice\".port: {port} is t3-dispatch's own (dispatch.listen, dispatch.admin)"
            );
            assert_eq!(
                parse(&first, port).unwrap_err(),
                TableError::Entries(vec![fault])
            );
        }
        assert!(parse(&first, 3782).is_ok());
    }

    /// A request that lets go of a table which is no longer in force leaves it to the watcher to drop it.
    #[tokio::test]
    async fn no_request_drops_a_table() {
        let base = tempfile::TempDir::new().unwrap();
        let path = base.path().join("table.json");
        std::fs::write(&path, r#"{"alice": {"os_user": "alice", "port": 3773}}"#).unwrap();
        let tables = Arc::new(Tables::open(&path, &Table::default()).unwrap());
        let mut swaps = tables.swaps();
        let watcher = Watcher::new(tables.clone(), Duration::from_secs(60));
        let (_stop, shutdown) = watch::channel(false);
        tokio::spawn(async move { watcher.start(shutdown).await });
        let request = tables.current();
        let old = Arc::downgrade(&request);
        std::fs::write(&path, "{}").unwrap();
        swaps.changed().await.unwrap();
        drop(request);
        assert!(old.upgrade().is_some());
        let limit = Instant::now() + Duration::from_secs(20);
        while old.upgrade().is_some() {
            assert!(Instant::now() < limit);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
