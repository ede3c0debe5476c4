//! The ledger: one JSON line for each tunnel that ended, in a file that an old and a new process share; and beside it the
//! evidence that verdicts lean on. A verdict that came later has a line of its own.
//!
//! A thread of its own writes, so that a slow, full or read-only disk costs lines, which are counted, and nothing else.
//! Every line is appended whole under a lock on the file; whoever finds the file full moves it aside, keeping one
//! predecessor.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

use crate::events;
use crate::evidence::is_ours;

/// Lines that may wait for the disk: one for each tunnel and more, as all of them may end in one moment.
const WAITING: usize = 1 << 15;

/// A line, and whether it is evidence.
type Line = (String, bool);

static SENDER: OnceLock<SyncSender<Line>> = OnceLock::new();
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

    fn write_all(&self, lines: &Receiver<Line>) {
        let evidence = self.evidence();
        let (mut closes_file, mut evidence_file) = (None, None);
        let mut failing = false;
        for (line, is_evidence) in lines {
            let (ledger, file) = if is_evidence {
                (&evidence, &mut evidence_file)
            } else {
                (self, &mut closes_file)
            };
            match ledger.append(file, &line) {
                Ok(()) => failing = false,
                Err(error) => {
                    *file = None;
                    events::ledger_line_lost();
                    if !std::mem::replace(&mut failing, true) {
                        events::ledger_failing(&ledger.path, &error);
                    }
                }
            }
            PENDING.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// The file beside it that holds the evidence, so that the ledger itself has one line for each end.
    pub fn evidence(&self) -> Ledger {
        let mut path = self.path.with_extension("").into_os_string();
        path.push(".evidence.jsonl");
        Ledger {
            path: path.into(),
            limit: self.limit,
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

    /// The newest records that fit, the newest first, each with its verdict under `verdict`.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn newest(
        &self,
        user: Option<&str>,
        since: Option<SystemTime>,
        limit: usize,
    ) -> io::Result<Found> {
        let mut found = Vec::new();
        // A verdict comes later than its record, so it is met first.
        let mut verdicts = HashMap::new();
        let mut timeless = 0;
        let unreadable = self.read_back(|mut line| {
            if let Some(key) = line["verdict_of"].as_str().map(str::to_owned) {
                verdicts.insert(key, (line["verdict"].take(), line["back_after_ms"].take()));
                return ControlFlow::Continue(());
            }
            let later = line["key"].as_str().and_then(|key| verdicts.remove(key));
            if let Some((verdict, back)) = later {
                line["verdict"] = verdict;
                line["back_after_ms"] = back;
            }
            let at = time(&line);
            timeless += usize::from(since.is_some() && at.is_none());
            if since.is_some_and(|since| at.is_some_and(|at| at + OUT_OF_ORDER < since)) {
                return ControlFlow::Break(());
            }
            if user.is_none_or(|user| line["user"] == user)
                && since.is_none_or(|since| at >= Some(since))
            {
                found.push(line);
            }
            if found.len() < limit {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        Ok(Found {
            records: found,
            unreadable: unreadable + timeless,
        })
    }

    /// The lines between two times, the oldest first.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn between(&self, from: SystemTime, to: SystemTime) -> io::Result<Vec<Value>> {
        let mut found = Vec::new();
        self.read_back(|line| {
            match time(&line) {
                Some(at) if at + OUT_OF_ORDER < from => return ControlFlow::Break(()),
                Some(at) if (from..=to).contains(&at) => found.push(line),
                _ => {}
            }
            ControlFlow::Continue(())
        })?;
        found.reverse();
        Ok(found)
    }

    /// Shows the lines of the file and its predecessor, the last one first, until it is told to stop. Gives how many lines
    /// on the way were no JSON.
    fn read_back(&self, mut show: impl FnMut(Value) -> ControlFlow<()>) -> io::Result<usize> {
        let mut unreadable = 0;
        for path in [self.path.clone(), predecessor(&self.path)] {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            // While a line is being appended there may be a part of it. Where no lock can be had, that counts as unreadable.
            let locked = flock(&file, FlockOperation::LockShared);
            let length = file.metadata()?.len();
            let _ = locked.and_then(|()| flock(&file, FlockOperation::Unlock));
            let show = |line: &[u8]| match serde_json::from_slice(line) {
                Ok(line @ Value::Object(_)) if is_ours(&line) => show(line),
                // A line that was cut, or is not ours, is no record.
                _ => {
                    unreadable += 1;
                    ControlFlow::Continue(())
                }
            };
            if lines_back(file, length, READ_BACK, show)?.is_break() {
                break;
            }
        }
        Ok(unreadable)
    }
}

/// Shows the lines of the first `left` bytes of a file that are not empty, the last one first, until it is told to stop. `step`
/// bytes are read at a time.
///
/// # Errors
/// When the file cannot be read.
pub fn lines_back(
    mut file: impl Read + Seek,
    mut left: u64,
    step: u64,
    mut show: impl FnMut(&[u8]) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    // The beginning of a line whose rest has been read.
    let mut rest = Vec::new();
    while left > 0 {
        let step = left.min(step);
        left -= step;
        let mut text = vec![0; step as usize];
        file.seek(SeekFrom::Start(left))?;
        file.read_exact(&mut text)?;
        text.append(&mut rest);
        let begins = match text.iter().position(|byte| *byte == b'\n') {
            Some(end) if left > 0 => end,
            None if left > 0 => {
                rest = text;
                continue;
            }
            _ => 0,
        };
        let lines = text[begins..].split(|byte| *byte == b'\n').rev();
        for line in lines.filter(|line| !line.is_empty()) {
            if show(line).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        text.truncate(begins);
        rest = text;
    }
    Ok(ControlFlow::Continue(()))
}

/// What was read of the ledger.
#[derive(Debug, Default)]
pub struct Found {
    /// The records.
    pub records: Vec<Value>,
    /// Lines on the way that were none.
    pub unreadable: usize,
}

/// How far behind its neighbours a line may stand: processes write side by side, and clocks are set.
const OUT_OF_ORDER: Duration = Duration::from_secs(60);

/// How much of a file is read at a time.
const READ_BACK: u64 = 1 << 18;

fn time(line: &Value) -> Option<SystemTime> {
    humantime::parse_rfc3339(line["time"].as_str()?).ok()
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

/// Hands a line of the ledger to the writer. It never waits.
pub fn append(line: String) {
    send((line, false));
}

/// Hands a line of evidence to the writer. It never waits.
pub fn append_evidence(line: String) {
    send((line, true));
}

fn send(line: Line) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_shown_from_the_last_one_whatever_is_read_at_a_time() {
        let text = b"the first\n\n2\nthe third line\n\ncut";
        for step in 1..=text.len() as u64 + 1 {
            let mut shown = Vec::new();
            let show = |line: &[u8]| {
                shown.push(String::from_utf8_lossy(line).into_owned());
                ControlFlow::Continue(())
            };
            assert!(
                lines_back(io::Cursor::new(text), text.len() as u64, step, show)
                    .unwrap()
                    .is_continue()
            );
            assert_eq!(shown, ["cut", "the third line", "2", "the first"], "{step}");
        }
        let mut count = 0;
        let stopped = lines_back(io::Cursor::new(text), text.len() as u64, 4, |_| {
            count += 1;
            ControlFlow::Break(())
        });
        assert!(stopped.unwrap().is_break() && count == 1);
    }

    #[test]
    fn whoever_reads_while_lines_are_written_sees_whole_lines() {
        let folder = std::env::temp_dir().join(format!("t3-dispatch-lines-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let ledger = Ledger {
            path: folder.join("closes.jsonl"),
            limit: u64::MAX,
        };
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let line = format!("{{\"user\":\"{}\"}}", "a".repeat(900));
                let mut file = None;
                for _ in 0..20_000 {
                    ledger.append(&mut file, &line).unwrap();
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                assert_eq!(ledger.newest(None, None, 1).unwrap().unreadable, 0);
            }
        });
        std::fs::remove_dir_all(folder).unwrap();
    }
}
