//! Requests that two servers may read in two ways: an instance sees none that the dispatcher has not attributed to its
//! user. The variants are those of the published corpora: smuggler's `exhaustive`, the permutations of PortSwigger's
//! HTTP Request Smuggler, the chunk and line-end tricks of http-garden and Http11Probe, and the Expect, CL.0 and TE.0
//! desyncs.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::common::dispatcher::{Dispatcher, Setup};
use crate::common::http::{Client, Head};
use crate::common::mint;
use crate::common::witness::{Framing, Witness, read_chunks, read_head, strict};

/// Stands for the number of a sending wherever it is in a variant; as long as what it stands for.
const NUMBER: &str = "NNNNNN";

/// What is hidden in a body. Nothing but framing keeps it from bob's instance: the edge is trusted to name people.
const STOLEN: &str = "GET /stolen/NNNNNN HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: bob\r\nCookie: t3_session=bob\r\n\r\n";

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(15);

/// What must become of a variant.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Expect {
    /// Refused with a 4xx before any instance hears of it, and the connection closed.
    Refused,
    /// The head is in order and may have gone to the instance; the body is not, so nobody ever gets to its end.
    Broken,
    /// Out of order, and yet Pingora's reader of chunks takes it. Something may be taken for the body, and nothing behind
    /// it for a request.
    Contained,
    /// As much as was sent is in order, but the end has not come, and does not.
    Unfinished,
    /// The head is in order, but it is not for an instance: an answer, and whatever the body was, it was a body.
    Ours(u16),
    /// Legal, and read alike by everybody: served, with exactly this body.
    Served(Vec<u8>),
    /// Legal, and yet odd enough to be refused; if it is served, then with exactly this body.
    Either(Vec<u8>),
    /// Several requests that follow each other, of these users.
    Pipelined(&'static [&'static str]),
}
use Expect::{Broken, Contained, Either, Ours, Pipelined, Refused, Served, Unfinished};

#[derive(Debug, Clone)]
struct Variant {
    name: String,
    /// What is sent, in two parts between which the sender may wait.
    parts: [Vec<u8>; 2],
    expect: Expect,
}

/// A head of alice's: a line and her headers, with `odd` lines between them.
fn head(line: &str, odd: &[u8]) -> Vec<u8> {
    let begin = format!("{line}\r\nHost: t3.example.com\r\n");
    let end = "X-authentik-username: alice\r\nCookie: t3_session=alice\r\n\r\n";
    [begin.as_bytes(), odd, end.as_bytes()].concat()
}

const POST: &str = "POST /v/NNNNNN HTTP/1.1";
const GET: &str = "GET /v/NNNNNN HTTP/1.1";

/// How the bodies begin that Pingora's reader of chunks takes, out of order as they are: control characters and line ends
/// within extensions, no size for 0, anything for trailers.
const TAKEN: [&[u8]; 14] = [
    b"68;\n",
    b"68;a\n",
    b"68;\0",
    b"68;a\0",
    b"68;a=\"\n",
    b"\r\n",
    b";68\r\n",
    b"2;a\n",
    b"5\r\nhello\r\n\r\n",
    b"5\r\nhello\r\n0;\n",
    b"5\r\nhello\r\n0\r\n ",
    b"5\r\nhello\r\n0\r\nX",
    b"5\r\nhello\r\n0\r\n\0",
    b"2;\n",
];

#[derive(Default)]
struct Corpus(Vec<Variant>);

impl Corpus {
    fn add(
        &mut self,
        name: impl Into<String>,
        first: impl Into<Vec<u8>>,
        second: impl Into<Vec<u8>>,
        expect: Expect,
    ) {
        self.0.push(Variant {
            name: name.into(),
            parts: [first.into(), second.into()],
            expect,
        });
    }

    /// A `POST` with these odd header lines, each with its line end, and this body.
    fn post(&mut self, odd: impl AsRef<[u8]>, body: impl Into<Vec<u8>>, expect: Expect) {
        let odd = odd.as_ref();
        self.add(
            odd.escape_ascii().to_string(),
            head(POST, odd),
            body,
            expect,
        );
    }

    /// A request in chunks with this body.
    fn chunks(&mut self, body: impl AsRef<[u8]>, expect: Expect) {
        let body = body.as_ref();
        let name = body.escape_ascii().to_string();
        let is_taken = TAKEN.iter().any(|start| body.starts_with(start));
        let expect = if expect == Broken && is_taken {
            Contained
        } else {
            expect
        };
        let first = head(POST, b"Transfer-Encoding: chunked\r\n");
        self.add(name, first, body, expect);
    }
}

/// `data` as one chunk.
fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

/// Ways to write `Transfer-Encoding: chunked` so that one server sees it and another does not, without the line's end;
/// and whether nothing is odd about it but that it is another header.
fn disguises() -> Vec<(Vec<u8>, bool)> {
    let mut all: Vec<(Vec<u8>, bool)> = Vec::new();
    for plain in [
        "Transfer-Encoding: chunked",
        "Transfer-Encoding:chunked",
        "Transfer-Encoding:  chunked",
        "TrAnSFer-EnCODinG: cHuNkeD",
        "tRANSFER-ENCODING: chunked",
        "TRANSFER-ENCODING: CHUNKED",
        "Transfer-Encoding: chunked, cow",
        "Transfer-Encoding: cow, chunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: identity, chunked, identity",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked,",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding: , chunked",
        "Transfer-Encoding: chunked;q=0.5",
        "Transfer-Encoding: chunked; foo=bar",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: 'chunked'",
        "Transfer-Encoding: chunk",
        "Transfer-Encoding: chunkedchunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: x chunked",
        "Transfer-Encoding: cow chunked bar",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding:",
        "Transfer-Encoding: 0",
        "Transfer-Encoding: chu\tnked",
        "Transfer-Encoding:\tchunked",
        "Transfer-Encoding: \tchunked",
        "Transfer-Encoding\t:\tchunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding x: chunked",
        "Transfer-Encoding",
        "Transfer-Encoding chunked",
        "Transfer Encoding: chunked",
        "Transfer Encoding:chunked",
        "Transfer\\Encoding: chunked",
        "Transfer-Encoding\\: chunked",
        "Transfer-Encoding[]: chunked",
        "(Transfer-Encoding): chunked",
        ": chunked\r\nTransfer-Encoding: chunked",
        " Transfer-Encoding: chunked",
        "Foo: bar\r\n Transfer-Encoding: chunked",
        "Foo: bar\r\n\tTransfer-Encoding: chunked",
        "Foo: bar\rTransfer-Encoding: chunked",
        "Foo: bar\nTransfer-Encoding: chunked",
        "Foo: bar\r\n\rTransfer-Encoding: chunked",
        "Foo: bar\n\nTransfer-Encoding: chunked",
        "Foo: bar\r\rTransfer-Encoding: chunked",
        "Foo: bar\0\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding:\n chunked",
        "Transfer-Encoding:\r\n chunked",
        "Transfer-Encoding:\r\n\tchunked",
        "Transfer-Encoding: \r\n chunked",
        "Transfer-Encoding\r\n : chunked",
        "Transfer-Encoding\n : chunked",
        "Transfer-Encoding: \n\x0bchunked",
        "Transfer-Encoding: chunked\r\n ",
        "Transfer-Encoding: chunked\r\n , identity",
        "Transfer-Encoding: identity\r\n , chunked",
        "Transfer-Encoding: chunked\r",
        "Transfer-Encoding: chunked\n",
        "Transfer\r-Encoding: chunked",
        "Tra\rnsfer-Encoding: chunked",
        "Tra\nnsfer-Encoding: chunked",
        "Tra\0nsfer-Encoding: chunked",
        "Transfer-Encoding: cow\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: cow",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-encoding: identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding:\r\nTransfer-Encoding: chunked",
        "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked",
        "Connection: close, Transfer-Encoding\r\nTransfer-Encoding: chunked",
        "Connection: Content-Length\r\nTransfer-Encoding: chunked",
        "TE: chunked\r\nTransfer-Encoding: chunked",
        "Upgrade: websocket\r\nConnection: Upgrade\r\nTransfer-Encoding: chunked",
    ] {
        all.push((plain.into(), false));
    }
    for bytes in [
        &b"Transfer-Encoding: ch\x96nked"[..],
        b"Transf\x82r-Encoding: chunked",
        b"Transfer-Encoding: \xc2\xa0chunked",
        b"Transfer-Encoding: chunked\xc2\x85",
        "Tranſfer-Encoding: chunked".as_bytes(),
        "Transfer-Encoding: chun\u{212a}ed".as_bytes(),
        "Transfer‐Encoding: chunked".as_bytes(),
    ] {
        all.push((bytes.into(), false));
    }
    // Other headers, whatever somebody may fold them into.
    for other in [
        "Transfer_Encoding: chunked",
        "Content-Encoding: chunked",
        "Transfer-%45ncoding: chunked",
        "X-Transfer-Encoding: chunked",
        "TransferEncoding: chunked",
        "Transfer.Encoding: chunked",
        "TE: chunked",
        "Foo: bar^~Transfer-Encoding: chunked",
    ] {
        all.push((other.into(), true));
    }
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    for byte in (0x00..=0x2f)
        .chain(0x3a..=0x40)
        .chain(0x5b..=0x60)
        .chain(0x7b..=0xff)
    {
        // A line end here gives lines that have places of their own above; of a colon nothing odd is left.
        if byte != b':' {
            let part =
                |before: &str, after: &str| [before.as_bytes(), &[byte], after.as_bytes()].concat();
            all.push((part("Transfer-Encoding:", "chunked"), false));
            all.push((part("Transfer-Encoding", ": chunked"), is_token(byte)));
            all.push((part("", "Transfer-Encoding: chunked"), is_token(byte)));
            all.push((part("Transfer-Encoding: chunked", ""), false));
        }
    }
    all
}

/// Whether lines say that a body comes in chunks, and nothing that could be taken otherwise.
fn is_chunked(lines: &[u8]) -> bool {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let mut lines = lines.split(|byte| *byte == b'\n').rev();
    let last = lines.next().unwrap_or_default();
    let Some(colon) = last.iter().position(|byte| *byte == b':') else {
        return false;
    };
    let mut value = &last[colon + 1..];
    while value.first().is_some_and(is_blank) {
        value = &value[1..];
    }
    while value.last().is_some_and(is_blank) {
        value = &value[..value.len() - 1];
    }
    let harmless = |line: &[u8]| {
        line.ends_with(b"\r")
            && (line.starts_with(b"TE: ")
                || line.starts_with(b"Connection: ")
                || line.starts_with(b"Upgrade: "))
    };
    last[..colon].eq_ignore_ascii_case(b"transfer-encoding")
        && value.eq_ignore_ascii_case(b"chunked")
        && lines.all(harmless)
}

/// `Content-Length` said in a way that cannot be relied upon. `L` stands for the length of the body.
const LENGTHS: [&str; 46] = [
    "Content-Length: +L",
    "Content-Length: -L",
    "Content-Length: -1",
    "Content-Length: 0xL",
    "Content-Length: L, L",
    "Content-Length: L,L",
    "Content-Length: 0, L",
    "Content-Length: L, 0",
    "Content-Length: 5, 6",
    "Content-Length: L,",
    "Content-Length: ,L",
    "Content-Length: L;",
    "Content-Length: L L",
    "Content-Length: 0 L",
    "Content-Length: L.0",
    "Content-Length: L_0",
    "Content-Length: Le0",
    "Content-Length: L\x0b",
    "Content-Length: \x0bL",
    "Content-Length: L\x0c",
    "Content-Length: L\0",
    "Content-Length: \0L",
    "Content-Length: \"L\"",
    "Content-Length: ",
    "Content-Length:",
    "Content-Length: zero",
    "Content-Length: L\r\nContent-Length: L",
    "Content-Length: 0\r\nContent-Length: L",
    "Content-Length: L\r\nContent-Length: 0",
    "Content-Length: 5\r\nContent-Length: 6",
    "Content-Length: L\r\ncontent-length: 0",
    "Content-Length: L\r\nContent-Length: ",
    "Content-Length : L",
    "Content-Length\t: L",
    "Content-Length\0: L",
    " Content-Length: L",
    "Foo: bar\r\n Content-Length: L",
    "Foo: bar\nContent-Length: L",
    "Foo: bar\rContent-Length: L",
    "Content-Length:\r\n L",
    "Content-Length:\n L",
    "Content-Length: L\r\n ",
    "Content-Length: 0\r\n L",
    "Content-Length: 18446744073709551616",
    "Content-Length: 18446744073709551661",
    "Content-Length: 99999999999999999999999999",
];

/// Everything: each is to be sent in several ways.
fn corpus() -> Vec<Variant> {
    let mut corpus = Corpus::default();
    codings(&mut corpus);
    lengths(&mut corpus);
    request_lines(&mut corpus);
    hosts(&mut corpus);
    identities(&mut corpus);
    line_ends(&mut corpus);
    chunk_tricks(&mut corpus);
    bodies(&mut corpus);
    corpus.0
}

fn codings(corpus: &mut Corpus) {
    let ended = format!("0\r\n\r\n{STOLEN}");
    let whole = format!("{}0\r\n\r\n", chunk(STOLEN));
    for (disguise, is_another) in disguises() {
        let line = [&disguise[..], b"\r\n"].concat();
        // CL.TE: who believes the coding sees the end at once, and then a request.
        let odd = [
            format!("Content-Length: {}\r\n", ended.len()).as_bytes(),
            &line,
        ]
        .concat();
        let expect = match is_another {
            true => Either(ended.clone().into()),
            false => Refused,
        };
        corpus.post(odd, ended.clone(), expect);
        if is_another {
            continue;
        }
        // TE.CL: who believes the length takes the chunk's size for the body, and the chunk for a request.
        let odd = [&line[..], b"Content-Length: 4\r\n"].concat();
        corpus.post(odd, whole.clone(), Refused);
        // TE.0: alone.
        let expect = match is_chunked(&disguise) {
            true => Either(STOLEN.into()),
            false => Refused,
        };
        corpus.post(line, whole.clone(), expect);
    }
    // HTTP/1.0 has no codings.
    for line in ["POST /v/NNNNNN HTTP/1.0", "GET /v/NNNNNN HTTP/1.0"] {
        for odd in [
            "Transfer-Encoding: chunked\r\n",
            "Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n",
            "Transfer-Encoding: chunked\r\nContent-Length: 4\r\nConnection: keep-alive\r\n",
            "Transfer-Encoding: identity\r\nContent-Length: 4\r\nConnection: keep-alive\r\n",
        ] {
            corpus.add(
                format!("{line} {odd}"),
                head(line, odd.as_bytes()),
                whole.clone(),
                Refused,
            );
        }
    }
}

fn lengths(corpus: &mut Corpus) {
    for length in LENGTHS {
        let odd = length
            .replace('L', &STOLEN.len().to_string())
            .replace(&format!("{}ength", STOLEN.len()), "Length");
        corpus.post(format!("{odd}\r\n"), STOLEN, Refused);
    }
    let bare = [
        &b"Content-Length: \xd9\xa1\xd9\xa2"[..],
        b"Content-Length: \xef\xbc\x95",
        b"Content-Length: 5\xff",
    ];
    for odd in bare {
        corpus.post([odd, b"\r\n"].concat(), STOLEN, Refused);
    }
    for odd in [
        format!("Content-Length: 000{}\r\n", STOLEN.len()),
        format!("Content-Length:\t{}\t\r\n", STOLEN.len()),
        format!("Content-Length:{}\r\n", STOLEN.len()),
        format!("CONTENT-LENGTH:   {}   \r\n", STOLEN.len()),
        format!("Content_Length: 0\r\nContent-Length: {}\r\n", STOLEN.len()),
        format!(
            "Connection: Content-Length\r\nContent-Length: {}\r\n",
            STOLEN.len()
        ),
        format!(
            "Connection: close, content-length\r\nContent-Length: {}\r\n",
            STOLEN.len()
        ),
    ] {
        corpus.post(odd, STOLEN, Either(STOLEN.into()));
    }
    // So long that it never ends; everything behind the head is of the body.
    for length in [
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "4294967296",
    ] {
        corpus.post(format!("Content-Length: {length}\r\n"), STOLEN, Unfinished);
    }
}

fn request_lines(corpus: &mut Corpus) {
    let length = format!("Content-Length: {}\r\n", STOLEN.len());
    for line in [
        &b"POST  /v/NNNNNN HTTP/1.1"[..],
        b"POST /v/NNNNNN  HTTP/1.1",
        b"POST\t/v/NNNNNN HTTP/1.1",
        b"POST /v/NNNNNN\tHTTP/1.1",
        b"POST /v/NNNNNN HTTP/1.1 ",
        b"POST /v/NNNNNN HTTP/1.1\t",
        b" POST /v/NNNNNN HTTP/1.1",
        b"POST /v/NNNNNN HTTP/1.2",
        b"POST /v/NNNNNN HTTP/1.10",
        b"POST /v/NNNNNN HTTP/01.1",
        b"POST /v/NNNNNN HTTP/2.0",
        b"POST /v/NNNNNN HTTP/0.9",
        b"POST /v/NNNNNN HTTP/9.9",
        b"POST /v/NNNNNN HTTP/1",
        b"POST /v/NNNNNN HTTP/1.",
        b"POST /v/NNNNNN http/1.1",
        b"POST /v/NNNNNN Http/1.1",
        b"POST /v/NNNNNN XHTTP/1.1",
        b"POST /v/NNNNNN HTTP /1.1",
        b"POST /v/NNNNNN HTTP/1.1\r",
        b"POST /v/NNNNNN HTTP/1.1\x0b",
        b"POST /v/NNNNNN HTTP/1.1 HTTP/1.1",
        b"POST /v/NNNNNN x HTTP/1.1",
        b"POST /v/NNNNNN",
        b"POST",
        b"/v/NNNNNN HTTP/1.1",
        b"POST /v/NNNNNN HTTP/1.1\nX: y",
        b"POST /v/NNNNNN HTTP/1.1\rX: y",
        b"POST /v/NNNNNN\r\n HTTP/1.1",
        b"POST /v/NNNNNN\n HTTP/1.1",
        b"POST /v/NNNNNN\0 HTTP/1.1",
        b"POST /v/NNNNNN\x0b HTTP/1.1",
        b"POST /v/NNNNNN\x7f HTTP/1.1",
        b"POST v/NNNNNN HTTP/1.1",
        b"PO\0ST /v/NNNNNN HTTP/1.1",
        b"PO\xffST /v/NNNNNN HTTP/1.1",
        b"PO:ST /v/NNNNNN HTTP/1.1",
        b"\"POST\" /v/NNNNNN HTTP/1.1",
        b"\x16\x03\x01 /v/NNNNNN HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"CONNECT /v/NNNNNN HTTP/1.1",
        b"CONNECT t3.example.com:443 HTTP/1.1",
        b"POST t3.example.com:443 HTTP/1.1",
        b"POST * HTTP/1.1",
        b"POST ? HTTP/1.1",
        b"POST ://t3.example.com/v/NNNNNN HTTP/1.1",
        b"POST http:///v/NNNNNN HTTP/1.1",
        b"POST http://bob@t3.example.com/v/NNNNNN HTTP/1.1",
        b"POST http://t3.example.com@evil.example.com/v/NNNNNN HTTP/1.1",
        b"POST http://t3.example.com:80:80/v/NNNNNN HTTP/1.1",
        b"POST http://t3.example.com\\@evil.example.com/v/NNNNNN HTTP/1.1",
        b"POST http://t3.example.com /v/NNNNNN HTTP/1.1",
        b"POST http://evil.example.com/v/NNNNNN HTTP/1.1",
        b"POST HTTP://evil.example.com/v/NNNNNN HTTP/1.1",
        b"POST file:///v/NNNNNN HTTP/1.1",
        b"POST http:/v/NNNNNN HTTP/1.1",
    ] {
        let first = [
            line,
            b"\r\nHost: t3.example.com\r\n",
            length.as_bytes(),
            b"X-authentik-username: alice\r\nCookie: t3_session=alice\r\n\r\n",
        ]
        .concat();
        corpus.add(line.escape_ascii().to_string(), first, STOLEN, Refused);
    }
    for line in [
        "post /v/NNNNNN HTTP/1.1",
        "M-SEARCH /v/NNNNNN HTTP/1.1",
        "TRACE /v/NNNNNN HTTP/1.1",
        "DELETE /v/NNNNNN HTTP/1.1",
        "OPTIONS /v/NNNNNN HTTP/1.1",
        "POST http://t3.example.com/v/NNNNNN HTTP/1.1",
        "POST HTTP://t3.example.com/v/NNNNNN HTTP/1.1",
        "POST /v/NNNNNN HTTP/1.0",
        "\r\nPOST /v/NNNNNN HTTP/1.1",
    ] {
        corpus.add(
            line,
            head(line, length.as_bytes()),
            STOLEN,
            Either(STOLEN.into()),
        );
    }
    // HTTP/0.9, which has no headers.
    for line in [
        "GET /v/NNNNNN\r\n",
        "GET /v/NNNNNN\r\n\r\n",
        "GET /v/NNNNNN\n\n",
    ] {
        corpus.add(line, line, STOLEN, Refused);
    }
}

fn hosts(corpus: &mut Corpus) {
    let rest = format!(
        "Content-Length: {}\r\nX-authentik-username: alice\r\nCookie: t3_session=alice\r\n\r\n",
        STOLEN.len()
    );
    for odd in [
        &b""[..],
        b"Host: t3.example.com\r\nHost: t3.example.com\r\n",
        b"Host: t3.example.com\r\nHost: evil.example.com\r\n",
        b"Host: t3.example.com\r\nhost: evil.example.com\r\n",
        b"Host: t3.example.com\r\nHost:\r\n",
        b"Host : t3.example.com\r\n",
        b"Host\t: t3.example.com\r\n",
        b" Host: t3.example.com\r\n",
        b"Host:\r\n t3.example.com\r\n",
        b"Host: t3.example.com\r\n evil.example.com\r\n",
        b"Host: t3.example.com\r\n\tevil.example.com\r\n",
        b"Host: t3.example.com\nHost: evil.example.com\r\n",
        b"Host: t3.example.com\rHost: evil.example.com\r\n",
        b"Host: t3.example.com\0evil.example.com\r\n",
        b"Host: t3.example.com\x0b\r\n",
        b"Host: t3.example.com, evil.example.com\r\n",
        b"Host: t3.example.com evil.example.com\r\n",
        b"Host: bob@t3.example.com\r\n",
        b"Host: t3.example.com/../evil\r\n",
        b"Host: t3.example.com?x\r\n",
        b"Host: t3.example.com#x\r\n",
        b"Host: t3.example.com\\evil\r\n",
        b"Host: http://t3.example.com\r\n",
        b"Host: t3.example.com:80:80\r\n",
        b"Host: t3.example.com:port\r\n",
        b"Host: \xff\r\n",
    ] {
        let first = [POST.as_bytes(), b"\r\n", odd, rest.as_bytes()].concat();
        corpus.add(odd.escape_ascii().to_string(), first, STOLEN, Refused);
    }
    for odd in [
        "Host:\r\n",
        "Host: T3.EXAMPLE.COM\r\n",
        "host:t3.example.com:443\r\n",
        "X-Forwarded-Host: evil.example.com\r\nHost: t3.example.com\r\n",
    ] {
        let first = format!("{POST}\r\n{odd}{rest}");
        corpus.add(odd, first, STOLEN, Either(STOLEN.into()));
    }
}

fn identities(corpus: &mut Corpus) {
    let length = format!("Content-Length: {}\r\n", STOLEN.len());
    let with = |identity: &[u8]| {
        [
            POST.as_bytes(),
            b"\r\nHost: t3.example.com\r\n",
            length.as_bytes(),
            identity,
            b"Cookie: t3_session=alice\r\n\r\n",
        ]
        .concat()
    };
    for identity in [
        &b"X-authentik-username: alice\r\n bob\r\n"[..],
        b"X-authentik-username: alice\r\n\tbob\r\n",
        b"X-authentik-username:\r\n bob\r\n",
        b"X-authentik-username: alice\r\n X-authentik-username: bob\r\n",
        b"X-authentik-username: alice\nX-authentik-username: bob\r\n",
        b"X-authentik-username: alice\rX-authentik-username: bob\r\n",
        b"Foo: bar\nX-authentik-username: alice\r\n",
        b"Foo: bar\rX-authentik-username: alice\r\n",
        b"X-authentik-username : alice\r\n",
        b"X-authentik-username\t: alice\r\n",
        b"X-authentik-username: alice\r\nX-authentik-username : bob\r\n",
        b"X-authentik-username: alice\r\nX-authentik-username\x00: bob\r\n",
        b"X-authentik-username: alice\r\nX-authentik-username\x0b: bob\r\n",
        b"X-authentik-username: alice\r\n\x0bX-authentik-username: bob\r\n",
        b"X-authentik-username: alice\r\nX-authentik-username\xff: bob\r\n",
        b"X-authentik-username: alice\0bob\r\n",
        b"X-authentik-username: alice\0\r\n",
        b"X-authentik-username: alice\x0b\r\n",
        b"X-authentik-username: alice\x7f\r\n",
        b"X-authentik-username: alice\r\r\n",
    ] {
        corpus.add(
            identity.escape_ascii().to_string(),
            with(identity),
            STOLEN,
            Refused,
        );
    }
    // In order as heads go, but nobody's: the body stays a body.
    for (identity, status) in [
        (&b""[..], 403),
        (b"X-authentik-username:\r\n", 403),
        (b"X-authentik-username: mallory\r\n", 403),
        (b"X-authentik-username: alice, bob\r\n", 403),
        (b"X-authentik-username: alice\tbob\r\n", 403),
        (b"X-authentik-username: \xff\r\n", 403),
        (b"X-authentik-username: al\xc3\xadce\r\n", 403),
        (
            b"X-authentik-username: alice\r\nX-authentik-username: bob\r\n",
            400,
        ),
        (
            b"X-authentik-username: alice\r\nX-Authentik-Username: alice\r\n",
            400,
        ),
        (
            b"X-authentik-username: alice\r\nX_authentik_username: bob\r\n",
            400,
        ),
        (
            b"X-authentik-username: alice\r\nX.authentik.username: bob\r\n",
            400,
        ),
        (b"X_authentik_username: alice\r\n", 400),
    ] {
        let name = identity.escape_ascii().to_string();
        corpus.add(name, with(identity), STOLEN, Ours(status));
    }
    for (line, status) in [
        ("POST /healthz HTTP/1.1", 200),
        ("GET /probe/healthz HTTP/1.1", 200),
        ("GET /probe/ws HTTP/1.1", 0),
        ("GET /.t3-dispatch HTTP/1.1", 0),
    ] {
        corpus.add(line, head(line, length.as_bytes()), STOLEN, Ours(status));
        let chunked = head(line, b"Transfer-Encoding: chunked\r\n");
        let body = format!("{}0\r\n\r\n", chunk(STOLEN));
        corpus.add(format!("{line} in chunks"), chunked, body, Ours(status));
    }
    for nobody in ["mallory", "", "alice, bob"] {
        let first = format!(
            "{POST}\r\nHost: t3.example.com\r\nTransfer-Encoding: chunked\r\nX-authentik-username: {nobody}\r\n\r\n"
        );
        let body = format!("{}0\r\n\r\n", chunk(STOLEN));
        corpus.add(format!("{nobody:?} in chunks"), first, body, Ours(403));
    }
    // A proxy takes away what `Connection` names, and must not take its own words away.
    for odd in [
        "Connection: X-authentik-username\r\n",
        "Connection: close, x-authentik-username\r\n",
        "Connection: Host\r\n",
        "Connection: X-Forwarded-For\r\n",
        "Connection: keep-alive, keep-alive\r\n",
        "Proxy-Connection: X-authentik-username\r\n",
        "Keep-Alive: X-authentik-username\r\n",
        "Trailer: X-authentik-username\r\n",
        "X-Forwarded-User: bob\r\nRemote-User: bob\r\nX-authentik-email: bob\r\n",
        "X-HTTP-Method-Override: GET\r\nX-Original-URL: /stolen/NNNNNN\r\nX-Rewrite-URL: /stolen/NNNNNN\r\n",
    ] {
        corpus.post(format!("{odd}{length}"), STOLEN, Either(STOLEN.into()));
    }
}

fn line_ends(corpus: &mut Corpus) {
    let good = String::from_utf8(head(
        POST,
        format!("Content-Length: {}\r\n", STOLEN.len()).as_bytes(),
    ))
    .unwrap();
    // Every line of the head in turn ends oddly, and then all of them.
    let lines = good.matches("\r\n").count();
    for end in [
        "\n", "\r", "\n\r", "\r\r\n", "\r\n\r", "\0\r\n", "\x0b\r\n", "\x0c\r\n",
    ] {
        for odd in 0..=lines {
            // What comes behind the end of the head is of the body.
            if end == "\r\n\r" && odd == lines - 1 {
                continue;
            }
            let mut parts = good.split("\r\n").peekable();
            let (mut text, mut number) = (String::new(), 0);
            while let Some(part) = parts.next() {
                text += part;
                if parts.peek().is_some() {
                    let is_odd = number == odd || odd == lines;
                    text += if is_odd { end } else { "\r\n" };
                    number += 1;
                }
            }
            let name = format!("line end {:?} at {odd}", end);
            // A line feed might still follow the last of them.
            text += &STOLEN[..4];
            corpus.add(name, text, &STOLEN[4..], Refused);
        }
    }
    // The head that seems to end early, and the one that begins late.
    for (name, first) in [
        (
            "blank line of LF",
            "POST /v/NNNNNN HTTP/1.1\r\nHost: a\n\nContent-Length: 0\r\n\r\n",
        ),
        (
            "blank line of CR",
            "POST /v/NNNNNN HTTP/1.1\r\nHost: a\r\rContent-Length: 0\r\n\r\n",
        ),
        (
            "blank line with a blank",
            "POST /v/NNNNNN HTTP/1.1\r\nHost: a\r\nX-authentik-username: alice\r\nCookie: t3_session=alice\r\n \r\n\r\n",
        ),
        (
            "LF before",
            "\nPOST /v/NNNNNN HTTP/1.1\r\nHost: a\r\nX-authentik-username: alice\r\nCookie: t3_session=alice\r\n\r\n",
        ),
        (
            "CR before",
            "\rPOST /v/NNNNNN HTTP/1.1\r\nHost: a\r\nX-authentik-username: alice\r\nCookie: t3_session=alice\r\n\r\n",
        ),
        (
            "BOM before",
            "\u{feff}POST /v/NNNNNN HTTP/1.1\r\nHost: a\r\nX-authentik-username: alice\r\nCookie: t3_session=alice\r\n\r\n",
        ),
        (
            "folded first line",
            "POST /v/NNNNNN HTTP/1.1\r\n Host: a\r\nX-authentik-username: alice\r\nCookie: t3_session=alice\r\n\r\n",
        ),
        (
            "a line without a colon",
            "POST /v/NNNNNN HTTP/1.1\r\nHost: a\r\nX-authentik-username: alice\r\nfoo\r\nCookie: t3_session=alice\r\n\r\n",
        ),
        (
            "a line without a name",
            "POST /v/NNNNNN HTTP/1.1\r\nHost: a\r\nX-authentik-username: alice\r\n: foo\r\nCookie: t3_session=alice\r\n\r\n",
        ),
        (
            "a request for a header",
            "POST /v/NNNNNN HTTP/1.1\r\nHost: a\r\nX-authentik-username: alice\r\nCookie: t3_session=alice\r\nGET /stolen/NNNNNN HTTP/1.1\r\n\r\n",
        ),
    ] {
        corpus.add(name, first, STOLEN, Refused);
    }
}

fn chunk_tricks(corpus: &mut Corpus) {
    let size = STOLEN.len();
    let served = || Served(STOLEN.into());
    let either = || Either(STOLEN.into());
    // All of these are a chunk with the hidden request and an end; only their writing differs.
    let mut sized = |start: String, expect: Expect| {
        corpus.chunks(format!("{start}{STOLEN}\r\n0\r\n\r\n"), expect);
    };
    sized(format!("{size:x}\r\n"), served());
    sized(format!("{size:X}\r\n"), served());
    sized(format!("000{size:x}\r\n"), either());
    sized(format!("{size:016x}\r\n"), either());
    for extension in [";a", ";a=b", ";a=\"b\"", ";a;b=c", " ; a = b"] {
        sized(format!("{size:x}{extension}\r\n"), either());
    }
    for start in [
        "Lx\n",
        "Lx\r",
        "Lx\r\r\n",
        "Lx\n\r\n",
        "Lx\0\r\n",
        "Lx;\n",
        "Lx;a\n",
        "Lx;a\r",
        "Lx;a\rb\r\n",
        "Lx;a\nb\r\n",
        "Lx;\0\r\n",
        "Lx;a\0\r\n",
        "Lx;a=\"\n\"\r\n",
        "Lx;a=\"\r\n\"\r\n",
        "Lx \n",
        "Lx\x0b\r\n",
        "0xLx\r\n",
        "0XLx\r\n",
        "xLx\r\n",
        "hLx\r\n",
        "+Lx\r\n",
        "-Lx\r\n",
        "Lx_0\r\n",
        "_Lx\r\n",
        "Lx.0\r\n",
        "Lx,0\r\n",
        "Lxg\r\n",
        "Lx\u{85}\r\n",
        "\u{ff15}\r\n",
        "\r\nLx\r\n",
        "\nLx\r\n",
        "\tLx\r\n",
        " Lx\r\n",
        "\x0bLx\r\n",
        "\0Lx\r\n",
        ";Lx\r\n",
        "=\r\n",
        "\"Lx\"\r\n",
        "\r\n",
        "\n",
        "10000000000000000Lx\r\n",
        "fffffffffffffffffLx\r\n",
        "100000000000000Lx00\r\n",
        "Lx 0\r\n",
        "Lx\t0\r\n",
    ] {
        sized(start.replace("Lx", &format!("{size:x}")), Broken);
    }
    // Sizes that are legal numbers of bytes which never come.
    for start in [
        "ffffffffffffffff\r\n",
        "fffffffffffffff0\r\n",
        "7fffffffffffffff\r\n",
        "8000000000000000\r\n",
    ] {
        sized(start.to_owned(), Unfinished);
    }
    // A blank before the line's end or the extension is no part of the grammar, yet nobody is misled.
    for start in [
        "Lx \r\n",
        "Lx\t\r\n",
        "Lx;\r\n",
        "Lx; \r\n",
        "Lx;;\r\n",
        "Lx;=\r\n",
        "Lx;a=\"\r\n",
        "Lx;\x0b\r\n",
        "Lx;\u{e4}\r\n",
    ] {
        sized(start.replace("Lx", &format!("{size:x}")), either());
    }
    // What follows the data of a chunk. A reader that takes two bytes for its end, whatever they are, goes on elsewhere
    // than one that looks for a line end.
    for end in [
        "", "\n", "\r", "\n\n", "\r\r", "\n\r", "XX", "X\r\n", " \r\n", "\0\0", "\r\n\r\n", "\rX",
        "X\n", "\r\r\n", ";\r\n",
    ] {
        corpus.chunks(format!("5\r\nhello{end}0\r\n\r\n{STOLEN}"), Broken);
        corpus.chunks(
            format!("5\r\nhello{end}{size:x}\r\n{STOLEN}\r\n0\r\n\r\n"),
            Broken,
        );
    }
    // TERM.EXT, EXT.TERM, and spills: line ends inside an extension.
    for start in [
        "2;\nxx\r\n",
        "2;\rxx\r\n",
        "2;a\n\r\nxx\r\n",
        "2\nxx\r\n",
        "2\rxx\r\n",
        "2;\r\r\nxx\r\n",
        "2;a\n0\r\n\r\n",
    ] {
        corpus.chunks(format!("{start}{size:x}\r\n0\r\n\r\n{STOLEN}"), Broken);
        corpus.chunks(format!("{start}0\r\n\r\n{STOLEN}"), Broken);
    }
    // The last chunk.
    for end in [
        "0\n\n",
        "0\r\r",
        "0\n\r\n",
        "0\r\n\n",
        "0\r\n\r",
        "0\r\n\rX",
        "0\r\nX",
        "0\r\n\0\0",
        "0;\n\n",
        "0\r\n \r\n",
        "-0\r\n\r\n",
        "0x0\r\n\r\n",
        "\r\n0\r\n\r\n",
        "0\r\nXX",
        "0\n\r\n\r\n",
        "00000000000000000\n\r\n",
        "+0\r\n\r\n",
    ] {
        corpus.chunks(format!("5\r\nhello\r\n{end}{STOLEN}"), Broken);
    }
    // Trailers say nothing that an instance hears, least of all who asks.
    for trailers in [
        "X-authentik-username: bob\r\n",
        "X-Checksum: 1\r\nX-authentik-username: bob\r\nCookie: t3_session=bob\r\n",
        "Content-Length: 5\r\n",
        "Transfer-Encoding: identity\r\n",
        "Host: evil.example.com\r\n",
    ] {
        let body = format!("{}0\r\n{trailers}\r\n", chunk("hello"));
        corpus.chunks(body, Either("hello".into()));
    }
    for trailers in [
        "X: a\n",
        "X: a\r",
        "X: a\n\n",
        "X: a\r\r\n",
        "X\n: a\r\n",
        "\nX: a\r\n",
        "X: a\rGET /stolen/NNNNNN HTTP/1.1\r\n",
    ] {
        corpus.chunks(
            format!("{}0\r\n{trailers}\r\n{STOLEN}", chunk("hello")),
            Broken,
        );
    }
    // Cut off before the end.
    for body in [
        "",
        "5",
        "5\r",
        "5\r\n",
        "5\r\nhel",
        "5\r\nhello",
        "5\r\nhello\r\n",
        "5\r\nhello\r\n0",
        "5\r\nhello\r\n0\r\n",
        "5\r\nhello\r\n0\r\nX: y\r\n",
    ] {
        corpus.chunks(body, Unfinished);
    }
}

fn bodies(corpus: &mut Corpus) {
    let length = format!("Content-Length: {}\r\n", STOLEN.len());
    let whole = format!("{}0\r\n\r\n", chunk(STOLEN));
    // A body is a body, whatever the method.
    for method in [
        "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "REPORT", "SEARCH",
        "PROPFIND",
    ] {
        let line = format!("{method} /v/NNNNNN HTTP/1.1");
        corpus.add(
            format!("{method} with a length"),
            head(&line, length.as_bytes()),
            STOLEN,
            Served(STOLEN.into()),
        );
        corpus.add(
            format!("{method} in chunks"),
            head(&line, b"Transfer-Encoding: chunked\r\n"),
            whole.clone(),
            Served(STOLEN.into()),
        );
    }
    // Expect, said well and said oddly; the instance may answer as it likes, the body is there.
    for expect in [
        "Expect: 100-continue",
        "Expect: 100-Continue",
        "Expect: 100-continue, 100-continue",
        "Expect: y 100-continue",
        "Expect: 100-continue\r\nExpect: 100-continue",
        "Expect: 200-ok",
        "Expect:",
        "Expect:\t100-continue\t",
    ] {
        for line in [
            POST,
            GET,
            "HEAD /v/NNNNNN HTTP/1.1",
            "OPTIONS /v/NNNNNN HTTP/1.1",
            "POST /v/NNNNNN HTTP/1.0",
        ] {
            let odd = format!("{expect}\r\n{length}");
            corpus.add(
                format!("{line} {odd}"),
                head(line, odd.as_bytes()),
                STOLEN,
                Either(STOLEN.into()),
            );
        }
        let odd = format!("{expect}\r\nTransfer-Encoding: chunked\r\n");
        corpus.add(
            format!("{odd} in chunks"),
            head(POST, odd.as_bytes()),
            whole.clone(),
            Either(STOLEN.into()),
        );
    }
    for odd in [
        "Expect : 100-continue\r\n",
        "Expect:\r\n 100-continue\r\n",
        "Expect: 100-continue\nX: y\r\n",
    ] {
        corpus.post(format!("{odd}{length}"), STOLEN, Refused);
    }
    // Requests that follow each other are not smuggled: the edge has put its word into each.
    let alice = String::from_utf8(head("GET /v/NNNNNN HTTP/1.1", b"")).unwrap();
    corpus.add(
        "two in one write",
        alice.clone(),
        STOLEN,
        Pipelined(&["alice", "bob"]),
    );
    let post = String::from_utf8(head(POST, b"Content-Length: 5\r\n")).unwrap();
    corpus.add(
        "behind a body",
        format!("{post}hello"),
        STOLEN,
        Pipelined(&["alice", "bob"]),
    );
    let chunked = String::from_utf8(head(POST, b"Transfer-Encoding: chunked\r\n")).unwrap();
    // But after chunks the connection ends.
    corpus.add(
        "behind chunks",
        format!("{chunked}{}0\r\n\r\n", chunk("hello")),
        STOLEN,
        Contained,
    );
    let trailers = format!("{chunked}{}0\r\nX: y\r\n\r\n", chunk("hello"));
    corpus.add("behind trailers", trailers, STOLEN, Contained);
}

/// How the two parts of a variant are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    AtOnce,
    /// With a pause before the second part.
    Paused,
    /// A few bytes at a time.
    Dribbled,
    /// The second part once the first has been answered.
    Answered,
}

const WAYS: [Way; 4] = [Way::AtOnce, Way::Paused, Way::Dribbled, Way::Answered];

impl Way {
    /// Only what is refused by its head has an answer before its body.
    fn suits(self, variant: &Variant) -> bool {
        self != Way::Answered || matches!(variant.expect, Refused | Ours(_))
    }
}

/// What an edge reads, which takes an answer only if it can be read in one way.
enum Reply {
    /// A status, and the body where it came as a whole.
    Whole(u16, Vec<u8>),
    /// An answer that ends with the connection, early or not.
    Ended,
    /// No answer: the connection is over.
    Closed,
    /// Nothing within the time.
    Nothing,
    Fault(String),
}

async fn read_reply(client: &mut Client, method: &str, patience: Duration) -> Reply {
    match timeout(patience, read_strictly(client, method)).await {
        Err(_) => Reply::Nothing,
        Ok(Err(_)) => Reply::Ended,
        Ok(Ok(reply)) => reply,
    }
}

async fn read_strictly(client: &mut Client, method: &str) -> std::io::Result<Reply> {
    loop {
        let head = match read_head(client).await {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(Reply::Closed),
            Err(_) if client.unread.is_empty() => return Ok(Reply::Closed),
            Err(_) => {
                let what = format!("half an answer: {}", client.unread.escape_ascii());
                return Ok(Reply::Fault(what));
            }
        };
        let (line, framing) = match strict(&head) {
            Ok(read) => read,
            Err(fault) => return Ok(Reply::Fault(fault)),
        };
        let status = line.strip_prefix("HTTP/1.1 ").and_then(|rest| {
            let (status, _) = rest.split_once(' ')?;
            let three = status.len() == 3 && status.bytes().all(|byte| byte.is_ascii_digit());
            three.then(|| status.parse::<u16>().ok())?
        });
        let Some(status) = status else {
            return Ok(Reply::Fault(format!("not a status line: {line:?}")));
        };
        let has_no_body = method == "HEAD" || status < 200 || matches!(status, 204 | 304);
        if status < 200 && status != 101 {
            continue;
        }
        let body = match framing {
            _ if has_no_body => Vec::new(),
            Framing::Length(length) => client.read_exact(length).await?,
            Framing::Chunked => match read_chunks(client).await? {
                Ok(body) => body,
                Err(fault) => return Ok(Reply::Fault(fault)),
            },
            Framing::Unsaid => {
                let mut rest = std::mem::take(&mut client.unread);
                client.stream.read_to_end(&mut rest).await?;
                return Ok(Reply::Ended);
            }
        };
        return Ok(Reply::Whole(status, body));
    }
}

/// An honest request on the edge's connection, and whether it was answered by whom it should be; `None` where the
/// connection has been closed.
async fn is_honest(client: &mut Client, user: &str, number: usize) -> Option<Result<(), String>> {
    let target = format!("/honest/{user}/{number}");
    let request = format!(
        "GET {target} HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: {user}\r\nCookie: t3_session={user}\r\n\r\n"
    );
    if client.send(request).await.is_err() {
        return None;
    }
    let read = read_reply(client, "GET", PATIENCE).await;
    let fault = match read {
        Reply::Whole(200, body) => {
            let body: Value = serde_json::from_slice(&body).unwrap_or_default();
            if body["who"] == user && body["target"] == target.as_str() {
                return Some(Ok(()));
            }
            format!("{user} got {body}")
        }
        Reply::Whole(status, body) => format!("{user} got {status} {}", body.escape_ascii()),
        Reply::Closed | Reply::Ended => return None,
        Reply::Nothing => format!("{user} got nothing"),
        Reply::Fault(fault) => format!("{user} got {fault}"),
    };
    Some(Err(fault))
}

/// An honest request on a connection of its own.
async fn is_served(dispatcher: &Dispatcher, user: &str, number: usize) -> Result<(), String> {
    let mut client = Client::connect(dispatcher.address()).await.unwrap();
    let served = is_honest(&mut client, user, number).await;
    served.unwrap_or_else(|| Err(format!("{user}'s connection was closed")))
}

struct World {
    dispatcher: Dispatcher,
    alice: Witness,
    bob: Witness,
    _base: TempDir,
}

impl World {
    async fn with(change: impl FnOnce(Setup) -> Setup) -> World {
        let base = TempDir::new().unwrap();
        let (alice, bob) = (Witness::start("alice").await, Witness::start("bob").await);
        let setup = Setup::new(base.path(), mint::working(base.path()))
            .user("alice", "alice", alice.port)
            .user("bob", "bob", bob.port);
        let dispatcher = change(setup).start().await;
        World {
            dispatcher,
            alice,
            bob,
            _base: base,
        }
    }
}

/// Sends a variant, and says what was wrong with what came of it; also whether it was served.
async fn send(
    dispatcher: &Dispatcher,
    variant: &Variant,
    way: Way,
    number: usize,
) -> Result<bool, String> {
    let numbered = |part: &[u8]| {
        let text = format!("{number:0width$}", width = NUMBER.len());
        let mut part = part.to_vec();
        while let Some(at) = part
            .windows(NUMBER.len())
            .position(|six| six == NUMBER.as_bytes())
        {
            part[at..at + NUMBER.len()].copy_from_slice(text.as_bytes());
        }
        part
    };
    let [first, second] = variant.parts.each_ref().map(|part| numbered(part));
    let method = str::from_utf8(&first).unwrap_or_default().trim_start();
    let method = method.split(' ').next().unwrap_or_default().to_owned();
    let mut client = Client::connect(dispatcher.address()).await.unwrap();
    let mut answered = None;
    // Whoever is refused early may find the connection closed.
    match way {
        Way::AtOnce => {
            let _ = client.send([first, second].concat()).await;
        }
        Way::Paused => {
            let _ = client.send(first).await;
            // Long enough for the first part to be read alone, mostly; nothing depends on it.
            tokio::time::sleep(Duration::from_millis(3)).await;
            let _ = client.send(second).await;
        }
        Way::Dribbled => {
            for piece in [first, second].concat().chunks(7) {
                let _ = client.send(piece).await;
                tokio::task::yield_now().await;
            }
        }
        Way::Answered => {
            let _ = client.send(first).await;
            answered = Some(read_reply(&mut client, &method, PATIENCE).await);
            let _ = client.send(second).await;
        }
    }
    if matches!(variant.expect, Contained | Unfinished) {
        let _ = client.stream.shutdown().await;
    }
    let reply = match answered {
        Some(reply) => reply,
        None => read_reply(&mut client, &method, PATIENCE).await,
    };
    let (status, body) = match reply {
        Reply::Whole(status, body) => (status, body),
        Reply::Closed | Reply::Ended
            if matches!(variant.expect, Broken | Contained | Unfinished) =>
        {
            return Ok(false);
        }
        Reply::Closed => return Err("closed without an answer".into()),
        Reply::Ended => (200, Vec::new()),
        Reply::Nothing => return Err("nothing came of it".into()),
        Reply::Fault(fault) => return Err(fault),
    };
    let refused = (400..500).contains(&status);
    let expected = match &variant.expect {
        Refused | Broken | Unfinished => refused,
        Contained | Either(_) => refused || status == 200,
        Served(_) | Pipelined(_) => status == 200,
        Ours(0) => status < 500,
        Ours(expected) => status == *expected,
    };
    if !expected {
        return Err(format!("answered {status} {}", body.escape_ascii()));
    }
    match &variant.expect {
        // After an answer of ours to a head that is in order, the connection may be kept, if the body is passed over.
        Ours(_) => match is_honest(&mut client, "alice", number + 3_000_000).await {
            None | Some(Ok(())) => Ok(false),
            Some(Err(fault)) => Err(fault),
        },
        Pipelined(users) => {
            for _ in &users[1..] {
                match read_reply(&mut client, "GET", PATIENCE).await {
                    Reply::Whole(200, _) => {}
                    _ => return Err("the second request was not answered".into()),
                }
            }
            Ok(true)
        }
        _ if !refused && variant.expect != Contained => Ok(true),
        // Not one byte behind it may be read as a request.
        _ => match read_reply(&mut client, "GET", PATIENCE).await {
            Reply::Closed | Reply::Ended if client.unread.is_empty() => Ok(false),
            Reply::Nothing => Err("refused, but not closed".into()),
            Reply::Whole(status, _) => Err(format!("refused, and then answered {status}")),
            _ => Err(format!(
                "refused, and then {}",
                client.unread.escape_ascii()
            )),
        },
    }
}

/// Every variant in every way. What the instances have seen in the end is counted, request by request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_sees_no_request_that_was_in_a_body() {
    let world = Arc::new(World::with(|setup| setup).await);
    let variants = Arc::new(corpus());
    let (next, faults) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(Mutex::new(Vec::new())),
    );
    let sent = Arc::new(Mutex::new(Vec::new()));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (world, variants, next) = (world.clone(), variants.clone(), next.clone());
        let (faults, sent) = (faults.clone(), sent.clone());
        workers.spawn(async move {
            let mut edge = Client::connect(world.dispatcher.address()).await.unwrap();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(variant) = variants.get(index) else {
                    return;
                };
                let note = |what: String| {
                    faults
                        .lock()
                        .unwrap()
                        .push(format!("{:?} {} {what}", variant.expect, variant.name))
                };
                for (place, way) in WAYS
                    .into_iter()
                    .enumerate()
                    .filter(|(_, way)| way.suits(variant))
                {
                    let number = index * WAYS.len() + place;
                    let served = send(&world.dispatcher, variant, way, number).await;
                    let served = served.unwrap_or_else(|fault| {
                        note(format!("[{way:?}]: {fault}"));
                        false
                    });
                    sent.lock().unwrap().push((number, served));
                }
                // Whatever came of it, everybody else is served.
                if let Err(fault) = is_served(&world.dispatcher, "alice", index + 1_000_000).await {
                    note(fault);
                }
                for user in ["bob", "alice"] {
                    match is_honest(&mut edge, user, index + 2_000_000).await {
                        Some(Ok(())) => {}
                        Some(Err(fault)) => note(fault),
                        None => note(format!("{user}'s connection was closed")),
                    }
                }
            }
        });
    }
    workers.join_all().await;

    let mut faults = Arc::into_inner(faults).unwrap().into_inner().unwrap();
    faults.extend(world.alice.faults());
    faults.extend(world.bob.faults());
    let (mut alice, mut bob) = (world.alice.take(), world.bob.take());
    let mut honest = 0;
    for (user, seen) in [("alice", &mut alice), ("bob", &mut bob)] {
        seen.retain(|target, seen| {
            let is_honest = target.starts_with(&format!("/honest/{user}/"));
            honest += if is_honest { seen.len() } else { 0 };
            if is_honest && seen.len() != 1 {
                faults.push(format!("{target} came {} times", seen.len()));
            }
            !is_honest
        });
    }
    let mut attributed = 0;
    for (number, served) in sent.lock().unwrap().iter() {
        let variant = &variants[number / WAYS.len()];
        let at = |kind: &str| format!("/{kind}/{number:06}");
        let outer = alice.remove(&at("v")).unwrap_or_default();
        let inner = bob.remove(&at("stolen")).unwrap_or_default();
        attributed += outer.len() + inner.len();
        let right = match &variant.expect {
            Refused | Ours(_) => outer.is_empty() && inner.is_empty(),
            Broken | Unfinished => {
                outer.len() <= 1 && outer.iter().all(|seen| seen.body.is_none()) && inner.is_empty()
            }
            Contained => outer.len() <= 1 && inner.is_empty(),
            Pipelined(_) => outer.len() == 1 && inner.len() == 1,
            Served(body) | Either(body) => {
                let body = String::from_utf8_lossy(body).replace(NUMBER, &format!("{number:06}"));
                let whole = outer
                    .iter()
                    .all(|seen| seen.body.as_deref() == Some(body.as_bytes()));
                outer.len() == usize::from(*served) && whole && inner.is_empty()
            }
        };
        let own = outer.iter().all(|seen| {
            seen.head
                .all("x-authentik-username")
                .all(|name| name == "alice")
        });
        if !right || !own {
            faults.push(format!(
                "{:?} {}: alice's instance saw {outer:?}, bob's {inner:?}",
                variant.expect, variant.name
            ));
        }
    }
    for (target, seen) in alice.into_iter().chain(bob) {
        faults.push(format!("nobody sent {target}: {seen:?}"));
    }
    let sent = sent.lock().unwrap().len();
    println!(
        "{} variants, {sent} sendings, {attributed} requests attributed, {honest} honest ones, {} faults",
        variants.len(),
        faults.len()
    );
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

/// Behind what asks for a tunnel and does not get one, nothing is a request: whoever has asked may take what it sends for
/// the tunnel's.
#[tokio::test]
async fn bytes_behind_a_refused_upgrade_are_no_request() {
    let world = World::with(|setup| setup).await;
    let websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let mut number = 0;
    for (user, cookie, odd, statuses) in [
        ("alice", "t3_session=bob", "", &[401][..]),
        (
            "alice",
            "t3_session=alice",
            "Origin: https://evil.example.com\r\n",
            &[403],
        ),
        ("mallory", "t3_session=bob", "", &[403]),
        ("", "t3_session=bob", "", &[403]),
        // Without a session there is a redirect to pair, or the word that pairing failed.
        ("alice", "a=b", "", &[302, 502, 503]),
    ] {
        for body in ["", "Content-Length: 0\r\n"] {
            number += 1;
            let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
            let stolen = STOLEN.replace(NUMBER, &format!("{number:06}"));
            let head = format!(
                "GET /ws HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: {user}\r\nCookie: {cookie}\r\n{odd}{body}{websocket}\r\n"
            );
            client.send(format!("{head}{stolen}")).await.unwrap();
            match read_reply(&mut client, "GET", PATIENCE).await {
                Reply::Whole(status, _) => assert!(
                    statuses.contains(&status),
                    "{user} {cookie} {odd}: {status}"
                ),
                // What has come too early may end it before there is an answer.
                Reply::Closed => {}
                _ => panic!("{user} {cookie} {odd}"),
            }
            let next = read_reply(&mut client, "GET", PATIENCE).await;
            assert!(
                matches!(next, Reply::Closed | Reply::Ended),
                "{user} {cookie} {odd}"
            );
        }
    }
    // What is no WebSocket, or not wholly one, is an ordinary request, and the last on its connection.
    for odd in [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
        "Connection: Upgrade\r\nUpgrade: h2c, websocket2\r\n",
        "Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n",
        "Upgrade: websocket\r\n",
        "Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n",
        "Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n",
    ] {
        number += 1;
        let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
        let stolen = STOLEN.replace(NUMBER, &format!("{number:06}"));
        let body = if odd.contains("Length") { "hello" } else { "" };
        let head = String::from_utf8(head("GET /v/upgrade HTTP/1.1", odd.as_bytes())).unwrap();
        client.send(format!("{head}{body}{stolen}")).await.unwrap();
        let reply = read_reply(&mut client, "GET", PATIENCE).await;
        assert!(matches!(reply, Reply::Whole(200, _)), "{odd}");
        let next = read_reply(&mut client, "GET", PATIENCE).await;
        assert!(matches!(next, Reply::Closed | Reply::Ended), "{odd}");
    }
    assert!(world.bob.take().is_empty());
    assert!(
        world
            .alice
            .take()
            .into_values()
            .flatten()
            .all(|seen| seen.head.get("upgrade") != Some("h2c"))
    );
    assert_eq!((world.alice.faults(), world.bob.faults()), (vec![], vec![]));
}

/// An instance that answers before it has read the body: the body stays a body.
#[tokio::test]
async fn a_body_that_comes_after_the_answer_is_still_a_body() {
    let world = World::with(|setup| setup).await;
    let whole = format!("{}0\r\n\r\n", chunk(STOLEN));
    let length = format!("Content-Length: {}\r\n", STOLEN.len());
    let mut number = 0;
    for method in ["POST", "GET", "PUT"] {
        for expect in ["", "Expect: 100-continue\r\n", "Expect: y 100-continue\r\n"] {
            for (framing, body) in [
                (&*length, STOLEN),
                ("Transfer-Encoding: chunked\r\n", &whole),
            ] {
                for begun in [0, 20] {
                    number += 1;
                    let line = format!("{method} /early/{number} HTTP/1.1");
                    let odd = format!("{expect}{framing}");
                    let head = head(&line, odd.as_bytes());
                    let body = body.replace(NUMBER, &format!("{number:06}"));
                    let mut client = Client::connect(world.dispatcher.address()).await.unwrap();
                    client
                        .send([&head, &body.as_bytes()[..begun]].concat())
                        .await
                        .unwrap();
                    let reply = read_reply(&mut client, method, PATIENCE).await;
                    assert!(matches!(reply, Reply::Whole(200, _)), "{line} {odd}");
                    let _ = client.send(&body.as_bytes()[begun..]).await;
                    match is_honest(&mut client, "alice", number).await {
                        None | Some(Ok(())) => {}
                        Some(Err(fault)) => panic!("{line} {odd}: {fault}"),
                    }
                }
            }
        }
    }
    assert!(world.bob.take().is_empty());
    let seen = world.alice.take();
    assert_eq!(
        seen.keys()
            .filter(|target| target.starts_with("/early/"))
            .count(),
        number
    );
    assert!(
        seen.keys()
            .all(|target| target.starts_with("/early/") || target.starts_with("/honest/alice/"))
    );
    assert_eq!((world.alice.faults(), world.bob.faults()), (vec![], vec![]));
}

/// An answer of a hostile instance, in parts with a pause between them.
type Answer = Vec<Vec<u8>>;

/// What stands in an answer where the instance wants to answer somebody else.
const POISON: &str = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nX-Who: mallory\r\n\r\npoison";

/// Answers that can be read in two ways, or of which more comes than there is. The first one is in order.
fn answers() -> Vec<Answer> {
    let ok = "HTTP/1.1 200 OK\r\n";
    let mut all: Vec<Answer> = Vec::new();
    let mut add = |parts: &[&[u8]]| all.push(parts.iter().map(|part| part.to_vec()).collect());
    add(&[format!("{ok}Content-Length: 5\r\n\r\nhello").as_bytes()]);
    // Framing said twice, or badly. Both an answer of five bytes and one in chunks can be seen in each.
    for framing in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5, 5",
        "Content-Length: 5, 6",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Content-Length: 005",
        "Content-Length: 5 5",
        "Content-Length:",
        "Content-Length: five",
        "Content-Length: 18446744073709551621",
        "Content-Length: \x0b5",
        "Content-Length : 5",
        "Content-Length\t: 5",
        " Content-Length: 5",
        "X: y\r\n Content-Length: 5",
        "Content-Length: 5\r\n ",
        "Content-Length: 5\r\n 0",
        "Content-Length:\r\n 5",
        "X: y\nContent-Length: 5",
        "X: y\rContent-Length: 5",
        "Connection: Content-Length\r\nContent-Length: 5",
        "Connection: keep-alive, Transfer-Encoding\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: Chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, gzip",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding:\r\n chunked",
        "Transfer-Encoding: chunked\r\n , identity",
        "Transfer-Encoding: identity\r\nContent-Length: 5",
        "Transfer-Encoding: gzip\r\nContent-Length: 5",
        "Transfer-Encoding:\r\nContent-Length: 5",
        "Transfer_Encoding: chunked\r\nContent-Length: 5",
        "Connection: keep-alive\r\nKeep-Alive: timeout=1000",
        "Connection: close\r\nContent-Length: 5",
        "X: y",
    ] {
        for body in ["5\r\nhello\r\n0\r\n\r\n", "0\r\n\r\n", "hello"] {
            add(&[format!("{ok}{framing}\r\n\r\n{body}{POISON}").as_bytes()]);
        }
        let framed = format!("{ok}{framing}\r\n\r\n0\r\n\r\n");
        add(&[framed.as_bytes(), POISON.as_bytes()]);
        for version in [
            "HTTP/1.0 200 OK\r\n",
            "HTTP/1.1 204 No Content\r\n",
            "HTTP/1.1 304 Not Modified\r\n",
        ] {
            add(&[format!("{version}{framing}\r\n\r\n0\r\n\r\n{POISON}").as_bytes()]);
        }
    }
    // A good answer, and more behind it: at once, soon, twice.
    let good = format!("{ok}Content-Length: 5\r\n\r\nhello");
    let chunked = format!("{ok}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n");
    for good in [&good, &chunked, &format!("{ok}Content-Length: 0\r\n\r\n")] {
        for more in [
            POISON,
            "x",
            "\r\n",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        ] {
            add(&[format!("{good}{more}").as_bytes()]);
            add(&[good.as_bytes(), more.as_bytes()]);
            add(&[good.as_bytes(), more.as_bytes(), POISON.as_bytes()]);
        }
    }
    // Chunks out of order.
    for chunks in [
        "5\nhello\n0\n\n",
        "5;a\nb\r\nhello\r\n0\r\n\r\n",
        "5\r\nhelloXX0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "5_0\r\nhello\r\n0\r\n\r\n",
        "ffffffffffffffff\r\nhello\r\n0\r\n\r\n",
        "10000000000000005\r\nhello\r\n0\r\n\r\n",
        "\r\n5\r\nhello\r\n0\r\n\r\n",
        "zz\r\n",
        "5\r\nhello\r\n0\r\nX: y\r\nContent-Length: 9\r\n\r\n",
        "5\r\nhello\r\n0\r\nX\r\n\r\n",
        "5\r\nhello\r\n0\n\n",
        "5\r\nhello\r\n0\r\n",
        "5\r\nhello\r\n",
        "5\r\nhel",
        "",
    ] {
        add(&[format!("{ok}Transfer-Encoding: chunked\r\n\r\n{chunks}{POISON}").as_bytes()]);
        add(&[
            format!("{ok}Transfer-Encoding: chunked\r\n\r\n{chunks}").as_bytes(),
            POISON.as_bytes(),
        ]);
    }
    // Heads that inject others, and heads that are none.
    for head in [
        &b"HTTP/1.1 200 OK\r\nX: a\nSet-Cookie: t3_session=mallory\r\nContent-Length: 5\r\n\r\nhello"[..],
        b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: t3_session=mallory\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: a\r\n Set-Cookie: t3_session=mallory\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: a\r\n\tb: c\r\n d\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: a\x7fb\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX\0: a\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX y: a\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n: a\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 O\nK: HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 O\rK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 O\0K\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 \xff\xfe\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1  200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 20 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 000 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 099 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 999 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 -200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.2 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/0.9 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"http/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"ICY 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"\xef\xbb\xbfHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\nContent-Length: 5\n\nhello",
        b"HTTP/1.1 200 OK\rContent-Length: 5\r\rhello",
        b"HTTP/1.1 205 Reset\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 199 Last\r\nContent-Length: 5\r\n\r\nhello",
        b"<html>hello</html>",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\0",
        b"",
    ] {
        add(&[&[head, POISON.as_bytes()].concat()]);
        add(&[head, POISON.as_bytes()]);
    }
    // Interim answers: many, with bodies, with lengths, without an end, and switches that nobody asked for.
    let interim = |count: usize| "HTTP/1.1 100 Continue\r\n\r\n".repeat(count);
    add(&[format!("{}{good}", interim(1)).as_bytes()]);
    add(&[format!("{}{good}{POISON}", interim(5_000)).as_bytes()]);
    add(&[interim(5_000).as_bytes()]);
    for head in [
        "HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 100 Continue\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 5\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nX: a\r\n b\r\n\r\n",
        "HTTP/1.1 102 Processing\r\nConnection: close\r\n\r\n",
        "HTTP/1.0 100 Continue\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.0 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ] {
        add(&[format!("{head}{good}").as_bytes()]);
        add(&[format!("{head}{POISON}{good}").as_bytes()]);
        add(&[head.as_bytes(), POISON.as_bytes()]);
        add(&[format!("{good}{head}").as_bytes(), POISON.as_bytes()]);
    }
    all
}

/// An instance that answers the request for `/h/NUMBER` with the answer of that number, and keeps the connection for a
/// while, whatever it has said.
async fn hostile(answers: Arc<Vec<Answer>>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answers = answers.clone();
            tokio::spawn(async move {
                let _ = stream.set_nodelay(true);
                let mut client = Client {
                    stream,
                    unread: Vec::new(),
                };
                // An answer without an end ends with the connection.
                while let Ok(Ok(Some(head))) =
                    timeout(Duration::from_millis(200), read_head(&mut client)).await
                {
                    let (head, _) = Head::parse(&head).unwrap();
                    let number = head
                        .target()
                        .strip_prefix("/h/")
                        .and_then(|number| number.parse::<usize>().ok());
                    let Some(number) = number else {
                        let body = "{\"authenticated\":true,\"auth\":{\"sessionCookieName\":\"t3_session\"}}";
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        let _ = client.send(answer).await;
                        continue;
                    };
                    for part in &answers[number] {
                        if client.send(part).await.is_err() {
                            return;
                        }
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            });
        }
    });
    port
}

/// How mallory asks his own instance for one of its answers, on a connection that others share.
const ASKED: [&str; 5] = ["GET", "HEAD", "POST", "upgrade", "pipelined"];

/// Whatever an instance answers, its bytes reach nobody else: not on the edge's connection, where others ask after its
/// user and before him, and not from a kept connection. What the edge gets can be read in one way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_instance_answers_nobody_but_its_own_user() {
    let answers = Arc::new(answers());
    let port = hostile(answers.clone()).await;
    let world = Arc::new(World::with(|setup| setup.user("mallory", "mallory", port)).await);
    let next = Arc::new(AtomicUsize::new(0));
    let (kept, faults) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(Mutex::new(Vec::new())),
    );
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (world, answers, next, kept, faults) = (
            world.clone(),
            answers.clone(),
            next.clone(),
            kept.clone(),
            faults.clone(),
        );
        workers.spawn(async move {
            let mut edge = Client::connect(world.dispatcher.address()).await.unwrap();
            loop {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                let (number, asked) = (turn / ASKED.len(), ASKED[turn % ASKED.len()]);
                let Some(answer) = answers.get(number) else {
                    return;
                };
                let name = || format!("{asked}: {}", answer.iter().map(|part| part[..part.len().min(300)].escape_ascii().to_string()).collect::<Vec<_>>().join(" … "));
                let note = |what: String| faults.lock().unwrap().push(format!("{} {what}", name()));
                let (line, odd, body) = match asked {
                    "POST" => ("POST", "Content-Length: 5\r\n", "hello"),
                    "upgrade" => ("GET", "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""),
                    "HEAD" => ("HEAD", "", ""),
                    _ => ("GET", "", ""),
                };
                let head = format!("{line} /h/{number} HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: mallory\r\nCookie: t3_session=mallory\r\n{odd}\r\n{body}");
                let behind = "GET /pipelined HTTP/1.1\r\nHost: t3.example.com\r\nX-authentik-username: bob\r\nCookie: t3_session=bob\r\n\r\n";
                let pipelined = asked == "pipelined";
                let sent = if pipelined { format!("{head}{behind}") } else { head };
                if edge.send(&sent).await.is_err() {
                    edge = Client::connect(world.dispatcher.address()).await.unwrap();
                    edge.send(&sent).await.unwrap();
                }
                let mut open = match read_reply(&mut edge, line, PATIENCE).await {
                    Reply::Whole(101, _) => {
                        // A WebSocket of mallory's own has no way back.
                        if answer[0].starts_with(b"HTTP/1.0 ") {
                            note("HTTP/1.0 has no tunnels".into());
                        }
                        false
                    }
                    Reply::Whole(..) => true,
                    Reply::Closed | Reply::Ended => false,
                    Reply::Nothing => {
                        note("nothing came of it".into());
                        false
                    }
                    Reply::Fault(fault) => {
                        note(format!("the edge got {fault}"));
                        false
                    }
                };
                if open && pipelined {
                    open = match read_reply(&mut edge, "GET", PATIENCE).await {
                        Reply::Whole(200, body) if body.starts_with(b"{") && body.windows(11).any(|part| part == b"\"who\":\"bob\"") => true,
                        Reply::Closed | Reply::Ended => false,
                        Reply::Whole(status, body) => {
                            note(format!("bob got {status} {}", body.escape_ascii()));
                            false
                        }
                        Reply::Nothing | Reply::Fault(_) => {
                            note("bob got no answer".into());
                            false
                        }
                    };
                }
                // As the edge does it: the others ask on the connection that mallory asked on, while it is there.
                for user in ["bob", "alice"] {
                    if open {
                        match is_honest(&mut edge, user, turn).await {
                            Some(Ok(())) => {
                                kept.fetch_add(1, Ordering::Relaxed);
                            }
                            Some(Err(fault)) => {
                                note(fault);
                                open = false;
                            }
                            None => open = false,
                        }
                    }
                    if let Err(fault) = is_served(&world.dispatcher, user, turn + 1_000_000).await {
                        note(fault);
                    }
                }
                if !open {
                    edge = Client::connect(world.dispatcher.address()).await.unwrap();
                }
            }
        });
    }
    workers.join_all().await;
    let kept = kept.load(Ordering::Relaxed);
    let mut faults = Arc::into_inner(faults).unwrap().into_inner().unwrap();
    faults.extend(world.alice.faults());
    faults.extend(world.bob.faults());
    for (user, witness) in [("alice", &world.alice), ("bob", &world.bob)] {
        for (target, seen) in witness.take() {
            let own = target.starts_with(&format!("/honest/{user}/"))
                || (user == "bob" && target == "/pipelined");
            if !own
                || seen
                    .iter()
                    .any(|seen| seen.head.get("x-authentik-username") != Some(user))
            {
                faults.push(format!("{user}'s instance saw {target} {}", seen.len()));
            }
        }
    }
    println!(
        "{} answers, each asked for in {} ways; {kept} requests of others on the same connection, {} faults",
        answers.len(),
        ASKED.len(),
        faults.len()
    );
    // Without connections that are kept there is nothing to be seen here.
    assert!(kept > answers.len(), "{kept}");
    assert!(
        faults.is_empty(),
        "{} faults:\n{}",
        faults.len(),
        faults.join("\n")
    );
}
