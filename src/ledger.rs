//! The ledger: one JSON line for each tunnel that ended, in a file that an old and a new process share.
//!
//! A thread of its own writes, so that a slow, full or read-only disk costs lines, which are counted, and nothing else.
//! Every line is appended whole under a lock on the file; whoever finds the file full moves it aside, keeping one
//! predecessor.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

use crate::events;

/// Lines that may wait for the disk.
const WAITING: usize = 4096;

static SENDER: OnceLock<SyncSender<String>> = OnceLock::new();
static PENDING: AtomicUsize = AtomicUsize::new(0);

/// Where the ledger is, and when its file is full.
#[derive(Debug, Clone)]
pub struct Ledger {
    /// The file. Its predecessor has `.1` after the name.
    pub path: PathBuf,
    /// Bytes after which the file is moved aside.
    pub limit: u64,
}

impl Ledger {
    /// Starts the thread that writes. Call it once a process, after it has gone to the background.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(self) -> io::Result<()> {
        let (sender, receiver) = sync_channel(WAITING);
        if SENDER.set(sender).is_ok() {
            std::thread::Builder::new()
                .name("ledger".into())
                .spawn(move || self.write_all(&receiver))?;
        }
        Ok(())
    }

    fn write_all(&self, lines: &Receiver<String>) {
        let mut file = None;
        let mut failing = false;
        for line in lines {
            match self.append(&mut file, &line) {
                Ok(()) => failing = false,
                Err(error) => {
                    file = None;
                    events::ledger_line_lost();
                    if !std::mem::replace(&mut failing, true) {
                        events::ledger_failing(&self.path, &error);
                    }
                }
            }
            PENDING.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn append(&self, open: &mut Option<File>, line: &str) -> io::Result<()> {
        loop {
            let file = match open.take() {
                Some(file) => file,
                None => OpenOptions::new()
                    .append(true)
                    .read(true)
                    .create(true)
                    .mode(0o640)
                    .open(&self.path)?,
            };
            flock(&file, FlockOperation::LockExclusive)?;
            let meta = file.metadata()?;
            // Another process may have moved the file aside since it was opened.
            if std::fs::metadata(&self.path)
                .is_ok_and(|now| now.ino() == meta.ino() && now.dev() == meta.dev())
            {
                if meta.size() > 0 && meta.size() + line.len() as u64 > self.limit {
                    std::fs::rename(&self.path, predecessor(&self.path))?;
                    continue;
                }
                let written = append_whole(&file, meta.size(), line);
                flock(&file, FlockOperation::Unlock)?;
                *open = Some(file);
                return written;
            }
        }
    }

    /// The newest records that fit, the newest first.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn newest(
        &self,
        user: Option<&str>,
        since: Option<SystemTime>,
        limit: usize,
    ) -> io::Result<Vec<Value>> {
        let mut found = Vec::new();
        for path in [self.path.clone(), predecessor(&self.path)] {
            let mut text = Vec::new();
            match File::open(&path) {
                Ok(mut file) => file.read_to_end(&mut text)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for line in text.split(|byte| *byte == b'\n').rev() {
                if found.len() >= limit {
                    return Ok(found);
                }
                // A line that was cut, or is not ours, is no record.
                let Ok(record @ Value::Object(_)) = serde_json::from_slice::<Value>(line) else {
                    continue;
                };
                let at = record["time"]
                    .as_str()
                    .and_then(|time| humantime::parse_rfc3339(time).ok());
                if user.is_none_or(|user| record["user"] == user)
                    && since.is_none_or(|since| at >= Some(since))
                {
                    found.push(record);
                }
            }
        }
        Ok(found)
    }
}

fn predecessor(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Appends a line and its end, or nothing.
fn append_whole(mut file: &File, size: u64, line: &str) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(line.len() + 2);
    // A process that died while it wrote may have left a line without an end.
    if size > 0 {
        let mut last = [0];
        file.seek(SeekFrom::Start(size - 1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            bytes.push(b'\n');
        }
    }
    bytes.extend(line.as_bytes());
    bytes.push(b'\n');
    file.write_all(&bytes).inspect_err(|_| {
        // What a full disk took of it is taken back.
        let _ = file.set_len(size);
    })
}

/// Hands a line to the writer. It never waits.
pub fn append(line: String) {
    let Some(sender) = SENDER.get() else { return };
    PENDING.fetch_add(1, Ordering::AcqRel);
    if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = sender.try_send(line) {
        PENDING.fetch_sub(1, Ordering::AcqRel);
        events::ledger_line_lost();
    }
}

/// Waits until every line is written, for `limit` at most.
pub fn flush(limit: Duration) {
    let until = Instant::now() + limit;
    while PENDING.load(Ordering::Acquire) > 0 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
}
