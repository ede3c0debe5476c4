//! WebSocket frames (RFC 6455, section 5.2), as bytes that a test can see and shape.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub const TEXT: u8 = 1;
pub const BINARY: u8 = 2;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// One frame, unmasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub fin: bool,
    /// Set on the first frame of a compressed message (RFC 7692).
    pub rsv1: bool,
    pub opcode: u8,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(opcode: u8, payload: impl Into<Vec<u8>>) -> Frame {
        Frame {
            fin: true,
            rsv1: false,
            opcode,
            payload: payload.into(),
        }
    }

    pub fn text(text: &str) -> Frame {
        Frame::new(TEXT, text)
    }

    pub fn close(code: u16) -> Frame {
        Frame::new(CLOSE, code.to_be_bytes())
    }

    /// The frame on the wire; `mask` as clients must and servers must not.
    pub fn encode(&self, mask: Option<[u8; 4]>) -> Vec<u8> {
        let mut bytes = vec![u8::from(self.fin) << 7 | u8::from(self.rsv1) << 6 | self.opcode];
        let masked = u8::from(mask.is_some()) << 7;
        match self.payload.len() {
            short @ 0..126 => bytes.push(masked | short as u8),
            medium @ 126..65536 => {
                bytes.push(masked | 126);
                bytes.extend((medium as u16).to_be_bytes());
            }
            long => {
                bytes.push(masked | 127);
                bytes.extend((long as u64).to_be_bytes());
            }
        }
        match mask {
            None => bytes.extend(&self.payload),
            Some(mask) => {
                bytes.extend(mask);
                bytes.extend(
                    self.payload
                        .iter()
                        .zip(mask.iter().cycle())
                        .map(|(byte, mask)| byte ^ mask),
                );
            }
        }
        bytes
    }

    /// Reads one frame.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
        let mut start = [0; 2];
        from.read_exact(&mut start).await?;
        let length = match start[1] & 0x7f {
            126 => u64::from(from.read_u16().await?),
            127 => from.read_u64().await?,
            short => u64::from(short),
        };
        let mut mask = [0; 4];
        if start[1] & 0x80 != 0 {
            from.read_exact(&mut mask).await?;
        }
        let mut payload = vec![0; usize::try_from(length).map_err(|_| io::ErrorKind::InvalidData)?];
        from.read_exact(&mut payload).await?;
        payload
            .iter_mut()
            .zip(mask.iter().cycle())
            .for_each(|(byte, mask)| *byte ^= mask);
        Ok(Frame {
            fin: start[0] & 0x80 != 0,
            rsv1: start[0] & 0x40 != 0,
            opcode: start[0] & 0xf,
            payload,
        })
    }

    pub async fn write(
        &self,
        to: &mut (impl AsyncWrite + Unpin),
        mask: Option<[u8; 4]>,
    ) -> io::Result<()> {
        to.write_all(&self.encode(mask)).await?;
        to.flush().await
    }
}

/// The value of `Sec-WebSocket-Accept` for a key (RFC 6455, section 4.2.2).
pub fn accept_key(key: &str) -> String {
    use base64::Engine;
    use sha1::{Digest, Sha1};
    let digest = Sha1::digest(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"));
    base64::engine::general_purpose::STANDARD.encode(digest)
}
