//! What is written to a connection and not sent yet.
//!
//! Pingora's own buffer sends what it holds by itself before anything that does not fit: the head of an answer with one system
//! call, its body with the next. Here they leave together.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

/// So many bytes wait for more, or for a flush: what fits a packet of an ordinary network.
const MOST: usize = 1460;

/// So many slices are sent at once, what has waited being one. A piece of a chunked body has three.
const SLICES: usize = 8;

/// Bytes that wait.
#[derive(Default)]
pub struct Unsent(Vec<u8>);

impl Unsent {
    /// Writes `slices`: has them wait where there is room, and sends them with what has waited where there is not.
    ///
    /// # Errors
    /// Those of `stream`.
    pub fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        mut stream: S,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        loop {
            if self.0.len() + length <= MOST {
                for slice in slices {
                    self.0.extend_from_slice(slice);
                }
                return Poll::Ready(Ok(length));
            }
            if self.0.is_empty() {
                let stream = Pin::new(&mut stream);
                return match slices {
                    [bytes] => stream.poll_write(cx, bytes),
                    _ => stream.poll_write_vectored(cx, slices),
                };
            }
            let mut all = [IoSlice::new(&self.0); SLICES];
            let count = slices.len().min(SLICES - 1);
            all[1..=count].copy_from_slice(&slices[..count]);
            let sent = ready!(Pin::new(&mut stream).poll_write_vectored(cx, &all[..=count]))?;
            let of_these = sent.saturating_sub(self.0.len());
            self.forget(sent)?;
            if of_these > 0 {
                return Poll::Ready(Ok(of_these));
            }
        }
    }

    /// Sends all that waits.
    ///
    /// # Errors
    /// Those of `stream`.
    pub fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        mut stream: S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.0.is_empty() {
            let sent = ready!(Pin::new(&mut stream).poll_write(cx, &self.0))?;
            self.forget(sent)?;
        }
        Poll::Ready(Ok(()))
    }

    /// So many bytes have been sent, these first.
    fn forget(&mut self, sent: usize) -> io::Result<()> {
        if sent == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.0.drain(..sent.min(self.0.len()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Takes so many bytes with each call, nothing where that is 0, and keeps apart what came with each.
    #[derive(Default)]
    struct Wire {
        takes: Vec<usize>,
        calls: Vec<Vec<u8>>,
    }

    impl Wire {
        fn taking(takes: &[usize]) -> Wire {
            let takes = takes.iter().rev().copied().collect();
            let calls = Vec::new();
            Wire { takes, calls }
        }
    }

    impl AsyncWrite for Wire {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let mut all: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
            all.truncate(self.takes.pop().unwrap_or(usize::MAX));
            if all.is_empty() {
                return Poll::Pending;
            }
            let length = all.len();
            self.calls.push(all);
            Poll::Ready(Ok(length))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn write(unsent: &mut Unsent, wire: &mut Wire, bytes: &[u8]) -> Poll<usize> {
        let mut cx = Context::from_waker(Waker::noop());
        let written = unsent.poll_write(wire, &mut cx, &[IoSlice::new(bytes)]);
        written.map(|written| written.expect("the wire takes it"))
    }

    fn send(unsent: &mut Unsent, wire: &mut Wire) -> Poll<()> {
        let mut cx = Context::from_waker(Waker::noop());
        let sent = unsent.poll_send(wire, &mut cx);
        sent.map(|sent| sent.expect("the wire takes it"))
    }

    #[test]
    fn little_waits_and_leaves_at_once() {
        let (mut unsent, mut wire) = (Unsent::default(), Wire::default());
        assert_eq!(write(&mut unsent, &mut wire, b"head"), Poll::Ready(4));
        assert_eq!(write(&mut unsent, &mut wire, b"body"), Poll::Ready(4));
        assert!(wire.calls.is_empty());
        assert_eq!(send(&mut unsent, &mut wire), Poll::Ready(()));
        assert_eq!(wire.calls, [b"headbody"]);
        assert_eq!(send(&mut unsent, &mut wire), Poll::Ready(()));
        assert_eq!(wire.calls.len(), 1);
    }

    #[test]
    fn much_leaves_together_with_what_has_waited() {
        let (mut unsent, mut wire) = (Unsent::default(), Wire::default());
        let body = [b'x'; 65536];
        assert_eq!(write(&mut unsent, &mut wire, b"head"), Poll::Ready(4));
        let written = write(&mut unsent, &mut wire, &body);
        assert_eq!(written, Poll::Ready(body.len()));
        assert_eq!(wire.calls, [[&b"head"[..], &body].concat()]);
        let written = write(&mut unsent, &mut wire, &body);
        assert_eq!(written, Poll::Ready(body.len()));
        assert_eq!(wire.calls[1], body);
    }

    #[test]
    fn all_slices_that_fit_leave_together() {
        let (mut unsent, mut wire) = (Unsent::default(), Wire::default());
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(write(&mut unsent, &mut wire, b"head"), Poll::Ready(4));
        let piece = [b'x'; 500];
        let slices = [IoSlice::new(&piece); 9];
        let written = unsent.poll_write(&mut wire, &mut cx, &slices);
        assert!(matches!(written, Poll::Ready(Ok(3500))), "{written:?}");
        assert_eq!(wire.calls, [[&b"head"[..], &[b'x'; 3500]].concat()]);
    }

    /// Whatever the connection takes at once, it gets every byte in order, and nothing is told to be written that is not.
    #[test]
    fn nothing_is_lost_where_a_connection_takes_less() {
        let text: Vec<u8> = (0..6000u32).map(|number| number as u8).collect();
        for takes in [
            &[0, 1, 99, 1, 0, 1][..],
            &[100, 0, 2000],
            &[99, 0, 0, 1, 5],
            &[101, 1],
        ] {
            let (mut unsent, mut wire) = (Unsent::default(), Wire::taking(takes));
            assert_eq!(
                write(&mut unsent, &mut wire, &text[..100]),
                Poll::Ready(100)
            );
            let mut at = 100;
            while at < text.len() {
                if let Poll::Ready(written) = write(&mut unsent, &mut wire, &text[at..]) {
                    assert!(written > 0);
                    at += written;
                }
            }
            while send(&mut unsent, &mut wire).is_pending() {}
            assert_eq!(wire.calls.concat(), text, "{takes:?}");
        }
    }

    #[test]
    fn a_connection_that_takes_nothing_is_an_error() {
        let mut full = io::Cursor::new(&mut [][..]);
        let mut unsent = Unsent::default();
        let mut cx = Context::from_waker(Waker::noop());
        assert_eq!(
            write(&mut unsent, &mut Wire::default(), b"head"),
            Poll::Ready(4)
        );
        let sent = unsent.poll_send(&mut full, &mut cx);
        let sent = sent.map_err(|error| error.kind());
        assert_eq!(sent, Poll::Ready(Err(io::ErrorKind::WriteZero)));
    }
}
