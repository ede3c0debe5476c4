//! WebSocket frame heads (RFC 6455, section 5.2) in a stream of bytes that may be split anywhere.
//!
//! Payloads are stepped over, not looked at, but for the two bytes of a Close frame that hold its code.

/// The longest head: two bytes, eight of length, four of mask.
const LONGEST: usize = 14;

const CLOSE: u8 = 8;

/// What a stretch of bytes held.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Data messages whose last frame's head was in it.
    pub messages: u64,
    /// Data messages whose last byte was in it.
    pub whole: u64,
    /// Whether a frame's last byte was in it.
    pub frame: bool,
    /// The Close frame that was in it: its code, 1005 where it has none (RFC 6455, section 7.1.5).
    pub close: Option<u16>,
}

/// The reader's place in one direction of a WebSocket.
#[derive(Debug, Default, Clone)]
pub struct Heads {
    head: [u8; LONGEST],
    /// How much of the head is there; 0 between frames.
    have: usize,
    /// How much of the payload is still to come, once the head is whole.
    left: u64,
    whole: bool,
    /// What is there of a Close frame's code, unmasked.
    code: [u8; 2],
    code_have: usize,
}

impl Heads {
    /// Whether the next byte begins a frame.
    pub fn at_boundary(&self) -> bool {
        self.have == 0
    }

    /// How many bytes may be read without reading beyond the frame that has begun; 0 between frames.
    pub fn left_in_frame(&self) -> usize {
        match (self.at_boundary(), self.whole) {
            (true, _) => 0,
            // How long the frame is is not known yet.
            (false, false) => 1,
            (false, true) => usize::try_from(self.left).unwrap_or(usize::MAX),
        }
    }

    /// Steps over `bytes`.
    pub fn read(&mut self, mut bytes: &[u8]) -> Seen {
        let mut seen = Seen::default();
        while !bytes.is_empty() {
            if !self.whole {
                let wanted = self.length() - self.have;
                let take = wanted.min(bytes.len());
                self.head[self.have..self.have + take].copy_from_slice(&bytes[..take]);
                self.have += take;
                bytes = &bytes[take..];
                // The first two bytes say how long the head is.
                if self.have < self.length() {
                    continue;
                }
                self.whole = true;
                self.left = self.payload();
                // A continuation, text or binary frame that is final ends a message.
                if self.head[0] & 0x80 != 0 && self.opcode() < CLOSE {
                    seen.messages += 1;
                }
            }
            let take = usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()));
            if self.opcode() == CLOSE {
                self.read_code(&bytes[..take]);
            }
            bytes = &bytes[take..];
            self.left -= take as u64;
            if self.left == 0 {
                seen.frame = true;
                seen.whole += u64::from(self.head[0] & 0x80 != 0 && self.opcode() < CLOSE);
                if self.opcode() == CLOSE {
                    let code = if self.code_have == 2 {
                        u16::from_be_bytes(self.code)
                    } else {
                        1005
                    };
                    seen.close.get_or_insert(code);
                }
                *self = Heads::default();
            }
        }
        seen
    }

    fn opcode(&self) -> u8 {
        self.head[0] & 0x0f
    }

    /// The head's length as far as it is known.
    fn length(&self) -> usize {
        if self.have < 2 {
            return 2;
        }
        let extended = match self.head[1] & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        2 + extended + if self.head[1] & 0x80 != 0 { 4 } else { 0 }
    }

    fn payload(&self) -> u64 {
        let be = |bytes: &[u8]| {
            bytes
                .iter()
                .fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        match self.head[1] & 0x7f {
            126 => be(&self.head[2..4]),
            127 => be(&self.head[2..10]),
            short => u64::from(short),
        }
    }

    fn read_code(&mut self, bytes: &[u8]) {
        let masked = self.head[1] & 0x80 != 0;
        for byte in bytes.iter().take(2 - self.code_have) {
            // The mask is the last part of the head.
            let key = if masked {
                self.head[self.have - 4 + self.code_have]
            } else {
                0
            };
            self.code[self.code_have] = byte ^ key;
            self.code_have += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A recorded exchange: text, a long binary in two frames with a ping between them, a pong, a Close with 1001.
    fn recorded(mask: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut frame = |first: u8, payload: &[u8]| {
            bytes.push(first);
            let flag = u8::from(mask) << 7;
            match payload.len() {
                short @ 0..126 => bytes.push(flag | short as u8),
                medium @ 126..65536 => {
                    bytes.push(flag | 126);
                    bytes.extend((medium as u16).to_be_bytes());
                }
                long => {
                    bytes.push(flag | 127);
                    bytes.extend((long as u64).to_be_bytes());
                }
            }
            let key = if mask { [9, 8, 7, 6] } else { [0; 4] };
            if mask {
                bytes.extend(key);
            }
            bytes.extend(
                payload
                    .iter()
                    .zip(key.iter().cycle())
                    .map(|(byte, key)| byte ^ key),
            );
        };
        frame(0x81, b"{\"_tag\":\"Ping\"}");
        frame(0x02, &[0x88; 300]);
        frame(0x89, b"ping");
        frame(0x80, &[0x81; 70_000]);
        frame(0x8a, b"");
        frame(0xc1, b"compressed");
        frame(0x88, &[0x03, 0xe9, b'b', b'y', b'e']);
        bytes
    }

    fn read_in(parts: impl Iterator<Item = Vec<u8>>) -> (Heads, Seen) {
        let mut heads = Heads::default();
        let mut all = Seen::default();
        for part in parts {
            let seen = heads.read(&part);
            all.messages += seen.messages;
            all.whole += seen.whole;
            all.frame |= seen.frame;
            all.close = all.close.or(seen.close);
        }
        (heads, all)
    }

    const EXPECTED: Seen = Seen {
        messages: 3,
        whole: 3,
        frame: true,
        close: Some(1001),
    };

    #[test]
    fn every_split_in_two_reads_the_same() {
        for mask in [false, true] {
            let bytes = recorded(mask);
            for at in 0..=bytes.len() {
                let (heads, seen) =
                    read_in([bytes[..at].to_vec(), bytes[at..].to_vec()].into_iter());
                assert_eq!(seen, EXPECTED, "split at {at}");
                assert!(heads.at_boundary());
            }
            let (_, seen) = read_in(bytes.iter().map(|byte| vec![*byte]));
            assert_eq!(seen, EXPECTED, "byte by byte");
        }
    }

    #[test]
    fn a_close_frame_without_a_code_is_1005() {
        assert_eq!(Heads::default().read(&[0x88, 0x00]).close, Some(1005));
        assert_eq!(
            Heads::default().read(&[0x88, 0x80, 1, 2, 3, 4]).close,
            Some(1005)
        );
        assert_eq!(Heads::default().read(&[0x88, 0x01, 0x03]).close, Some(1005));
    }

    #[test]
    fn a_boundary_is_between_frames_only() {
        let mut heads = Heads::default();
        assert!(heads.at_boundary());
        for part in [&[0x82][..], &[0x02], &[1]] {
            heads.read(part);
            assert!(!heads.at_boundary());
        }
        heads.read(&[2]);
        assert!(heads.at_boundary());
    }

    proptest! {
        /// However the bytes are chunked, and whatever they are, what is seen is the same.
        #[test]
        fn chunking_never_changes_what_is_seen(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
            cuts in proptest::collection::vec(0..600_usize, 0..20),
            frames in any::<bool>(),
        ) {
            let bytes = if frames { recorded(true)[..600 + bytes.len()].to_vec() } else { bytes };
            let (whole_heads, whole) = read_in(std::iter::once(bytes.clone()));
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut <= bytes.len()).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let parts = cuts.windows(2).map(|pair| bytes[pair[0]..pair[1]].to_vec());
            let (heads, seen) = read_in(parts);
            prop_assert_eq!(seen, whole);
            prop_assert_eq!(heads.at_boundary(), whole_heads.at_boundary());
        }
    }
}
