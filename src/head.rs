//! What the head of a request may be, beyond what Pingora sees to: a pure core.
//!
//! The edge in front of us reads the same bytes. Where two readers could find different ends of a request, what is the body
//! of one person's request to the edge might become another person's request here. So whatever is not beyond doubt is
//! refused, and the connection closed.

/// The longest head, in bytes.
pub const MOST_BYTES: usize = 64 * 1024;

/// The most header lines of a head.
pub const MOST_LINES: usize = 128;

/// Why a head is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// It is longer than a head may be, in bytes or in lines.
    #[error("the head is larger than {} KiB or {MOST_LINES} lines", MOST_BYTES / 1024)]
    TooLarge,
    /// A line ends with LF alone, or holds a CR.
    #[error("a line of the head does not end as it should")]
    LineEnding,
    /// The request line is not three words.
    #[error("the request line is not a method, a target and a version")]
    RequestLine,
    /// Where the body ends can be read in more than one way (RFC 9112, section 6.3).
    #[error("the head does not say beyond doubt where the body ends")]
    Framing,
}

/// Looks through a whole head that Pingora's parser has taken. That parser (httparse, strict as it is for requests) takes
/// nothing but tokens for names, with the colon right behind them, no control characters in values, and no line that continues
/// another; but it takes LF for CR LF, and Pingora then settles by itself what contradicts itself.
///
/// # Errors
/// What is wrong with it.
pub fn check(head: &[u8]) -> Result<(), HeadError> {
    let (mut lines, mut framings) = (0, 0);
    for end in memchr::memchr_iter(b'\n', head) {
        if end == 0 || head[end - 1] != b'\r' {
            return Err(HeadError::LineEnding);
        }
        lines += 1;
        let line = &head[end + 1..];
        // Most lines can be told by their first letter.
        let is_clear = match line.first() {
            Some(b'c' | b'C') => value(line, b"content-length:")
                .map(|length| !length.is_empty() && length.iter().all(u8::is_ascii_digit)),
            Some(b't' | b'T') => value(line, b"transfer-encoding:")
                .map(|coding| coding.eq_ignore_ascii_case(b"chunked")),
            _ => None,
        };
        framings += usize::from(is_clear.is_some());
        if is_clear == Some(false) || framings > 1 {
            return Err(HeadError::Framing);
        }
    }
    if memchr::memchr_iter(b'\r', head).count() != lines {
        return Err(HeadError::LineEnding);
    }
    Ok(())
}

/// The value in a line, if it begins with that name and colon.
fn value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (begin, rest) = line.split_at_checked(name.len())?;
    let end = memchr::memchr(b'\r', rest).unwrap_or(rest.len());
    begin
        .eq_ignore_ascii_case(name)
        .then(|| rest[..end].trim_ascii())
}

/// Counts a head while it comes in, so that one without an end is not kept until it has filled the memory.
#[derive(Debug, Default)]
pub struct Progress {
    bytes: usize,
    lines: usize,
    /// Whether the line so far has anything but CR.
    in_line: bool,
    /// Spaces in the request line, and whether its last byte was CR.
    spaces: usize,
    after_cr: bool,
    ended: bool,
}

impl Progress {
    /// Whether anything has come but empty lines.
    pub fn has_begun(&self) -> bool {
        self.lines > 0 || self.in_line
    }

    /// Whether the empty line at the end of the head has come.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Reads a part of the request line, or of empty lines before it.
    fn request_line(&mut self, part: &[u8]) -> Result<(), HeadError> {
        for byte in part {
            let odd = byte.is_ascii_control() && *byte != b'\r';
            self.spaces += usize::from(*byte == b' ');
            if odd || self.spaces > 2 || self.after_cr && *byte != b'\r' {
                return Err(HeadError::RequestLine);
            }
            self.after_cr = *byte == b'\r';
        }
        Ok(())
    }

    /// Counts what has come, and reads the request line: Pingora would mend one that is not well formed, in a way of its own.
    /// Gives how much of it belongs to the head.
    ///
    /// # Errors
    /// When it is more than a head may be, or the request line is none.
    pub fn add(&mut self, bytes: &[u8]) -> Result<usize, HeadError> {
        let mut start = 0;
        for end in memchr::memchr_iter(b'\n', bytes) {
            let line = &bytes[start..end];
            let empty = !self.in_line && is_blank(line);
            if self.lines == 0 {
                self.request_line(line)?;
                self.after_cr = false;
            }
            start = end + 1;
            self.in_line = false;
            if !empty {
                self.lines += 1;
            } else if self.lines > 0 {
                self.ended = true;
                break;
            }
        }
        if !self.ended {
            if self.lines == 0 {
                self.request_line(&bytes[start..])?;
            }
            self.in_line |= !is_blank(&bytes[start..]);
            start = bytes.len();
        }
        self.bytes += start;
        if self.bytes > MOST_BYTES || self.lines > MOST_LINES + 1 {
            return Err(HeadError::TooLarge);
        }
        Ok(start)
    }
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| *byte == b'\r')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is wrong with a head, and `None` where Pingora's parser would not take it.
    fn look(head: &[u8]) -> Option<Result<(), HeadError>> {
        let mut room = [httparse::EMPTY_HEADER; MOST_LINES];
        let mut request = httparse::Request::new(&mut room);
        let status = request.parse(head).ok()?;
        status.is_complete().then(|| check(head))
    }

    fn verdict(lines: &str) -> Option<Result<(), HeadError>> {
        look(format!("GET / HTTP/1.1\r\n{lines}\r\n").as_bytes())
    }

    #[test]
    fn what_is_beyond_doubt_is_taken() {
        for lines in [
            "",
            "Host: t3.example.com\r\n",
            "Host:t3.example.com\r\nX-Empty:\r\nCookie: a=b; c=\"d:e\"\r\n",
            "Content-Length: 5\r\n",
            "content-length:0\r\n",
            "Transfer-Encoding: chunked\r\n",
            "TRANSFER-ENCODING:\tCHUNKED \r\n",
            "X-Content-Length: 5, 6\r\nX: Transfer-Encoding: gzip\r\n",
        ] {
            assert_eq!(verdict(lines), Some(Ok(())), "{lines:?}");
        }
        assert_eq!(look(b"\r\nGET / HTTP/1.1\r\n\r\n"), Some(Ok(())));
    }

    #[test]
    fn what_two_readers_could_read_differently_is_not() {
        use HeadError::{Framing, LineEnding};
        for (lines, error) in [
            ("Host: a\nX: b\r\n", LineEnding),
            ("Content-Length: 5\r\nContent-Length: 5\r\n", Framing),
            ("Content-Length: 5, 5\r\n", Framing),
            ("Content-Length: +5\r\n", Framing),
            ("Content-Length: 0x5\r\n", Framing),
            ("Content-Length:\r\n", Framing),
            (
                "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
                Framing,
            ),
            (
                "Transfer-Encoding: chunked\r\ntransfer-encoding: chunked\r\n",
                Framing,
            ),
            ("Transfer-Encoding: gzip, chunked\r\n", Framing),
            ("Transfer-Encoding: chunked, identity\r\n", Framing),
            ("Transfer-Encoding: xchunked\r\n", Framing),
            ("Transfer-Encoding: \"chunked\"\r\n", Framing),
            ("Transfer-Encoding:\r\n", Framing),
        ] {
            assert_eq!(verdict(lines), Some(Err(error)), "{lines:?}");
        }
    }

    #[test]
    fn the_parser_is_strict() {
        for lines in [
            "Host: a\r\n continued\r\n",
            "Host: a\r\n\tX: b\r\n",
            " Host: a\r\n",
            "Host : a\r\n",
            "Host\r\n",
            ": a\r\n",
            "Transfer-Encoding\x0b: chunked\r\n",
            "Host: a\r\r\n",
            "Host: a\rX: b\r\n",
            "Host: a\0\r\n",
        ] {
            assert_eq!(verdict(lines), None, "{lines:?}");
        }
    }

    #[test]
    fn a_head_has_so_many_lines_and_bytes() {
        let add = |lines: &str| {
            let head = format!("GET / HTTP/1.1\r\n{lines}\r\n");
            Progress::default().add(head.as_bytes()).map(drop)
        };
        assert_eq!(add(&"X: y\r\n".repeat(MOST_LINES)), Ok(()));
        let more = "X: y\r\n".repeat(MOST_LINES + 1);
        assert_eq!(add(&more), Err(HeadError::TooLarge));
        let frame = "GET / HTTP/1.1\r\nX: \r\n\r\n".len();
        let filled = |bytes: usize| add(&format!("X: {}\r\n", "y".repeat(bytes - frame)));
        assert_eq!(filled(MOST_BYTES), Ok(()));
        assert_eq!(filled(MOST_BYTES + 1), Err(HeadError::TooLarge));
    }

    #[test]
    fn a_request_line_is_three_words() {
        let read = |line: &str| {
            let head = format!("{line}\r\nHost: a\r\n\r\n");
            let mut progress = Progress::default();
            progress
                .add(head.as_bytes())
                .map(|length| assert_eq!(length, head.len()))
        };
        for line in [
            "GET / HTTP/1.1",
            "GET /ä HTTP/1.1",
            "\r\n\n\r\nGET /?a=b HTTP/1.0",
        ] {
            assert_eq!(read(line), Ok(()), "{line:?}");
        }
        for line in [
            "GET  / HTTP/1.1",
            "GET /  HTTP/1.1",
            "GET / HTTP/1.1 ",
            " GET / HTTP/1.1",
            "GET / x HTTP/1.1",
            "GET\t/ HTTP/1.1",
            "GET /\0 HTTP/1.1",
            "GET /\x0b HTTP/1.1",
            "GET /\x7f HTTP/1.1",
            "GET /\rx HTTP/1.1",
            "\rGET / HTTP/1.1",
        ] {
            assert_eq!(read(line), Err(HeadError::RequestLine), "{line:?}");
        }
    }

    #[test]
    fn a_body_does_not_count_as_head() {
        let mut progress = Progress::default();
        let head = "\r\n\nPOST / HTTP/1.1\r\nX: y\r\n\r\n";
        let request = format!("{head}{}", "\n".repeat(4096));
        assert_eq!(progress.add(request.as_bytes()), Ok(head.len()));
        assert!(progress.has_ended());
    }

    proptest! {
        /// However a head is cut into pieces, it counts the same.
        #[test]
        fn pieces_count_as_the_whole(
            lines in prop::collection::vec("[a-z:]{0,40}\r{0,2}\n", 0..200),
            cuts in prop::collection::vec(1usize..50, 1..20),
        ) {
            let text = lines.concat();
            let mut whole = Progress::default();
            let verdict = whole.add(text.as_bytes());
            let mut pieces = Progress::default();
            let mut rest = text.as_bytes();
            let mut piecewise = Ok(0);
            let mut cuts = cuts.iter().cycle();
            while !rest.is_empty() && piecewise.is_ok() && !pieces.has_ended() {
                let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                piecewise = pieces.add(piece).map(|length| length + piecewise.unwrap_or(0));
                rest = after;
            }
            prop_assert_eq!(verdict, piecewise);
            if verdict.is_ok() {
                prop_assert_eq!(whole.has_ended(), pieces.has_ended());
            }
        }
    }
}
