//! An instance whose WebSockets the test drives byte by byte, and a client that it drives likewise.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::frames::Frame;
use super::http::{self, Client};

/// The answer to a handshake.
pub const SWITCH: &str =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";

/// Answers everything but WebSockets like an instance that knows the session `t3_session=x`.
pub struct RawInstance {
    pub port: u16,
    upgraded: mpsc::UnboundedReceiver<TcpStream>,
}

impl RawInstance {
    pub async fn start() -> RawInstance {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (tell, upgraded) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let tell = tell.clone();
                tokio::spawn(async move {
                    let _ = stream.set_nodelay(true);
                    let mut client = Client {
                        stream,
                        unread: Vec::new(),
                    };
                    while let Some(head) = client.read_request().await {
                        if head.get("upgrade").is_some() {
                            client.send(SWITCH).await.unwrap();
                            let _ = tell.send(client.stream);
                            return;
                        }
                        let body = "{\"authenticated\":true,\"auth\":{\"sessionCookieName\":\"t3_session\"}}";
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        if client.send(answer).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        RawInstance { port, upgraded }
    }

    /// The instance's end of the WebSocket that was opened next.
    pub async fn next(&mut self) -> TcpStream {
        self.upgraded.recv().await.unwrap()
    }
}

/// Asks for a WebSocket as `user`'s browser does behind the edge, and gives the status of the answer.
pub async fn ask(address: SocketAddr, user: &str, headers: &[(&str, &str)]) -> (u16, Client) {
    let mut client = Client::connect(address).await.unwrap();
    let mut all = [&[("X-authentik-username", user)][..], &http::HANDSHAKE].concat();
    if !headers.iter().any(|(name, _)| *name == "Cookie") {
        all.push(("Cookie", "t3_session=x"));
    }
    all.extend(headers);
    client
        .send(http::head("GET", "/ws", &all, 0))
        .await
        .unwrap();
    let (status, _) = client.read_head().await.unwrap();
    (status, client)
}

/// A WebSocket that is open.
pub async fn open(address: SocketAddr, user: &str) -> TcpStream {
    let (status, client) = ask(address, user, &[]).await;
    assert_eq!(status, 101);
    client.stream
}

/// The mask of every frame that tests send as clients.
pub const MASK: Option<[u8; 4]> = Some([7, 7, 7, 7]);

/// Closes the connection with a reset.
pub fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    drop(stream);
}

/// Sends `text` one way and waits for it on the other side.
pub async fn say(from: &mut TcpStream, to: &mut TcpStream, text: &str, mask: Option<[u8; 4]>) {
    Frame::text(text).write(from, mask).await.unwrap();
    assert_eq!(Frame::read(to).await.unwrap(), Frame::text(text));
}

/// A head, and nothing of what comes behind it.
pub async fn head(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(bytes).unwrap()
}

/// Everything that still comes, up to the end.
pub async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await;
    bytes
}

/// Writes raw bytes.
pub async fn write(stream: &mut TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
}

/// A server that reads one request a connection and answers with these bytes, and what it was asked. It holds the
/// connections where it is to `hold` them, so that an answer without an end has none.
pub async fn canned(answer: String, hold: bool) -> (u16, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, asked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap_or(0);
            // Whoever says nothing has looked whether somebody listens.
            if length == 0 {
                continue;
            }
            let _ = tell.send(String::from_utf8_lossy(&request[..length]).into_owned());
            let _ = stream.write_all(answer.as_bytes()).await;
            if hold {
                held.push(stream);
            }
        }
    });
    (port, asked)
}
