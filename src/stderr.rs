//! The log's way out. Where nobody reads it any more, the service goes on without it.

use std::io::{self, Write};
use std::time::SystemTime;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a line waits for whoever reads to catch up, as when thousands of WebSockets end together.
const WAIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// The standard error stream for lines that may be lost.
#[derive(Debug, Default)]
pub struct Stderr {
    /// Lines that were lost since the last one that was not. While there are any, none waits.
    lost: u64,
}

impl Stderr {
    fn has_room(&self) -> bool {
        let wait = if self.lost == 0 {
            WAIT
        } else {
            Timespec::default()
        };
        let stderr = io::stderr();
        let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
        // A pipe that is ready has room for 4 KiB, and a file always is. Any other trouble is the write's to tell.
        !matches!(poll(&mut ready, Some(&wait)), Ok(0))
    }
}

impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.has_room() {
            self.lost += 1;
            return Ok(line.len());
        }
        let mut stderr = io::stderr().lock();
        let lost = std::mem::take(&mut self.lost);
        if lost > 0 {
            let time = humantime::format_rfc3339_millis(SystemTime::now());
            writeln!(stderr, "{time} WARN log-lost lines={lost}")?;
        }
        stderr.write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
