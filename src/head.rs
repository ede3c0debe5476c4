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
    /// A line ends with LF alone.
    #[error("a line of the head does not end as it should")]
    LineEnding,
    /// The request line is not three words.
    #[error("the request line is not a method, a target and a version")]
    RequestLine,
    /// Where the body ends can be read in more than one way (RFC 9112, section 6.3).
    #[error("the head does not say beyond doubt where the body ends")]
    Framing,
}

/// Reads a head while it comes in, line by line, so that one without an end is not kept until it has filled the memory, and
/// one that leaves a doubt gets no further.
///
/// Pingora's parser (httparse, strict as it is for requests) looks at the same bytes afterwards. It takes nothing but tokens for
/// names, with the colon right behind them, no control characters in values, and no line that continues another. But it takes
/// LF for CR LF, Pingora mends a request line that is not well formed in a way of its own, and then settles by itself what
/// contradicts itself. That is what is looked for here.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: usize,
    /// Lines so far, with the request line and without empty ones.
    lines: usize,
    /// What has come of a line whose end has not.
    part: Vec<u8>,
    /// What a line has said of where the body ends.
    body: Option<Body>,
    ended: bool,
}

/// How a head says where the body ends.
#[derive(Debug, Clone, Copy)]
enum Body {
    Length(u64),
    Chunks,
}

impl Reader {
    /// Whether anything has come but empty lines.
    pub fn has_begun(&self) -> bool {
        self.lines > 0 || !self.part.is_empty()
    }

    /// Whether the empty line at the end of the head has come.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// How many bytes come behind a head as its body (RFC 9112, section 6.3), where the head can tell.
    pub fn body_length(&self) -> Option<u64> {
        match self.body {
            None => Some(0),
            Some(Body::Length(length)) => Some(length),
            Some(Body::Chunks) => None,
        }
    }

    /// Reads on. Gives how much of it belongs to the head.
    ///
    /// # Errors
    /// When it is more than a head may be, or leaves a doubt.
    pub fn read(&mut self, bytes: &[u8]) -> Result<usize, HeadError> {
        let mut start = 0;
        for end in memchr::memchr_iter(b'\n', bytes) {
            let rest = &bytes[start..end];
            start = end + 1;
            if self.part.is_empty() {
                self.line(rest)?;
            } else {
                let mut line = std::mem::take(&mut self.part);
                line.extend_from_slice(rest);
                self.line(&line)?;
            }
            if self.ended {
                break;
            }
        }
        if !self.ended && start < bytes.len() {
            let rest = &bytes[start..];
            // What is no HTTP at all may never have an end of a line.
            if !self.has_begun() {
                check_request_line(rest.strip_suffix(b"\r").unwrap_or(rest))?;
            }
            self.part.extend_from_slice(rest);
            start = bytes.len();
        }
        self.bytes += start;
        if self.bytes > MOST_BYTES {
            return Err(HeadError::TooLarge);
        }
        Ok(start)
    }

    /// Reads a line, which has come without its LF.
    fn line(&mut self, line: &[u8]) -> Result<(), HeadError> {
        let line = line.strip_suffix(b"\r").ok_or(HeadError::LineEnding)?;
        if line.is_empty() {
            self.ended = self.lines > 0;
            return Ok(());
        }
        if self.lines == 0 {
            check_request_line(line)?;
        } else {
            self.framing(line)?;
        }
        self.lines += 1;
        if self.lines > MOST_LINES + 1 {
            return Err(HeadError::TooLarge);
        }
        Ok(())
    }

    /// Sees to what a header says about where the body ends.
    fn framing(&mut self, line: &[u8]) -> Result<(), HeadError> {
        // Most lines can be told by their first letter.
        let body = match line[0] {
            b'c' | b'C' => value(line, b"content-length:").map(length),
            b't' | b'T' => value(line, b"transfer-encoding:").map(chunks),
            _ => None,
        };
        match body {
            None => Ok(()),
            Some(body) if body.is_some() && self.body.is_none() => {
                self.body = body;
                Ok(())
            }
            Some(_) => Err(HeadError::Framing),
        }
    }
}

fn length(value: &[u8]) -> Option<Body> {
    let digits = value.iter().all(u8::is_ascii_digit);
    let number = std::str::from_utf8(value).ok().filter(|_| digits)?;
    number.parse().ok().map(Body::Length)
}

fn chunks(coding: &[u8]) -> Option<Body> {
    coding
        .eq_ignore_ascii_case(b"chunked")
        .then_some(Body::Chunks)
}

/// The value in a line, if it begins with that name and colon.
fn value<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (begin, rest) = line.split_at_checked(name.len())?;
    begin.eq_ignore_ascii_case(name).then(|| rest.trim_ascii())
}

fn check_request_line(line: &[u8]) -> Result<(), HeadError> {
    let spaces = line.iter().filter(|byte| **byte == b' ').count();
    if spaces > 2 || line.iter().any(u8::is_ascii_control) {
        return Err(HeadError::RequestLine);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &[u8]) -> Result<usize, HeadError> {
        Reader::default().read(text)
    }

    /// What is wrong with a whole head, and `None` where the parser does not take what nothing is wrong with.
    fn look(head: &[u8]) -> Option<Result<(), HeadError>> {
        let mut room = [httparse::EMPTY_HEADER; MOST_LINES];
        let mut request = httparse::Request::new(&mut room);
        let taken = request.parse(head).is_ok_and(|status| status.is_complete());
        match read(head) {
            Ok(length) => taken.then(|| assert_eq!(length, head.len())).map(Ok),
            Err(error) => Some(Err(error)),
        }
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
            ("Host: a\r\n\n", LineEnding),
            ("Content-Length: 5\r\nContent-Length: 5\r\n", Framing),
            ("Content-Length: 5, 5\r\n", Framing),
            ("Content-Length: +5\r\n", Framing),
            ("Content-Length: 0x5\r\n", Framing),
            ("Content-Length:\r\n", Framing),
            ("Content-Length: 99999999999999999999\r\n", Framing),
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
        let read = |lines: &str| {
            let head = format!("GET / HTTP/1.1\r\n{lines}\r\n");
            read(head.as_bytes()).map(drop)
        };
        assert_eq!(read(&"X: y\r\n".repeat(MOST_LINES)), Ok(()));
        let more = "X: y\r\n".repeat(MOST_LINES + 1);
        assert_eq!(read(&more), Err(HeadError::TooLarge));
        let frame = "GET / HTTP/1.1\r\nX: \r\n\r\n".len();
        let filled = |bytes: usize| read(&format!("X: {}\r\n", "y".repeat(bytes - frame)));
        assert_eq!(filled(MOST_BYTES), Ok(()));
        assert_eq!(filled(MOST_BYTES + 1), Err(HeadError::TooLarge));
        // Without an end, too.
        let mut reader = Reader::default();
        assert_eq!(reader.read(&[b'x'; MOST_BYTES]), Ok(MOST_BYTES));
        assert_eq!(reader.read(b"x"), Err(HeadError::TooLarge));
    }

    #[test]
    fn a_request_line_is_three_words() {
        let read = |line: &str| {
            let head = format!("{line}\r\nHost: a\r\n\r\n");
            read(head.as_bytes()).map(|length| assert_eq!(length, head.len()))
        };
        for line in [
            "GET / HTTP/1.1",
            "GET /ä HTTP/1.1",
            "\r\n\r\nGET /?a=b HTTP/1.0",
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
    fn what_is_no_http_need_not_end_a_line() {
        let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
        assert_eq!(read(hello), Err(HeadError::RequestLine));
    }

    #[test]
    fn a_body_does_not_count_as_head() {
        let mut reader = Reader::default();
        let head = "\r\n\r\nPOST / HTTP/1.1\r\nX: y\r\n\r\n";
        let request = format!("{head}{}", "\n".repeat(4096));
        assert_eq!(reader.read(request.as_bytes()), Ok(head.len()));
        assert!(reader.has_ended());
    }

    #[test]
    fn a_head_tells_how_long_its_body_is() {
        let length = |lines: &str| {
            let mut reader = Reader::default();
            let head = format!("POST / HTTP/1.1\r\n{lines}\r\n");
            assert_eq!(reader.read(head.as_bytes()), Ok(head.len()));
            reader.body_length()
        };
        assert_eq!(length("Host: a\r\n"), Some(0));
        assert_eq!(length("content-length:\t0042 \r\n"), Some(42));
        let most = u64::MAX;
        assert_eq!(length(&format!("Content-Length: {most}\r\n")), Some(most));
        assert_eq!(length("Transfer-Encoding: chunked\r\n"), None);
    }

    proptest! {
        /// However a head is cut into pieces, it reads the same.
        #[test]
        fn pieces_read_as_the_whole(
            lines in prop::collection::vec("([a-z:]{0,40}|content-length:1?)\r{0,2}\n", 0..150),
            cuts in prop::collection::vec(1usize..50, 1..20),
        ) {
            let text = lines.concat();
            let mut whole = Reader::default();
            let verdict = whole.read(text.as_bytes());
            let mut pieces = Reader::default();
            let mut rest = text.as_bytes();
            let mut piecewise = Ok(0);
            let mut cuts = cuts.iter().cycle();
            while !rest.is_empty() && piecewise.is_ok() && !pieces.has_ended() {
                let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                piecewise = pieces.read(piece).map(|length| length + piecewise.unwrap_or(0));
                rest = after;
            }
            prop_assert_eq!(verdict, piecewise);
            if verdict.is_ok() {
                prop_assert_eq!(whole.has_ended(), pieces.has_ended());
                prop_assert_eq!(whole.has_begun(), pieces.has_begun());
            }
        }
    }
}
