//! Following the file that other processes write to.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::Entry;

/// Follows the file that other processes write to.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    file: Option<File>,
    /// The beginning of a line whose end has not been written yet.
    begun: Vec<u8>,
}

/// What a new process reads of what was there before it.
const HISTORY: u64 = 256 * 1024;

impl Follower {
    /// Follows `path`, whose last part is read first.
    pub fn new(path: PathBuf) -> Follower {
        Follower {
            path,
            file: None,
            begun: Vec::new(),
        }
    }

    /// The lines that have been added.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn read(&mut self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        loop {
            let mut file = match self.file.take() {
                Some(file) => file,
                None => match File::open(&self.path) {
                    Ok(mut file) => {
                        let size = file.metadata()?.len();
                        file.seek(SeekFrom::Start(size.saturating_sub(HISTORY)))?;
                        file
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(entries),
                    Err(error) => return Err(error),
                },
            };
            Read::by_ref(&mut file)
                .take(8 << 20)
                .read_to_end(&mut self.begun)?;
            let whole = self.begun.iter().rposition(|byte| *byte == b'\n');
            if let Some(end) = whole {
                let rest = self.begun.split_off(end + 1);
                let lines = std::mem::replace(&mut self.begun, rest);
                entries.extend(
                    lines
                        .split(|byte| *byte == b'\n')
                        .filter_map(|line| Entry::read(serde_json::from_slice(line).ok()?)),
                );
            }
            let moved_aside = std::fs::metadata(&self.path)
                .is_ok_and(|now| file.metadata().is_ok_and(|meta| now.ino() != meta.ino()));
            if !moved_aside {
                self.file = Some(file);
                return Ok(entries);
            }
            self.begun.clear();
        }
    }
}
