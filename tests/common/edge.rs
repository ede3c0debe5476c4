//! A stand-in for the sign-on edge: it signs a browser in by the host name it asked for, and tells the dispatcher.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::http::Head;

/// Serves `listener` until it is dropped. `alice.localhost` is signed in as `alice@example.com`, and so on.
pub async fn serve(listener: TcpListener, dispatcher: SocketAddr) {
    while let Ok((browser, _)) = listener.accept().await {
        tokio::spawn(async move {
            let _ = forward(browser, dispatcher).await;
        });
    }
}

/// One request a connection keeps this short: the rest of the bytes pass through as they are.
async fn forward(mut browser: TcpStream, dispatcher: SocketAddr) -> io::Result<()> {
    let mut bytes = Vec::new();
    let (head, length) = loop {
        if let Some(parsed) = Head::parse(&bytes) {
            break parsed;
        }
        if browser.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
    };
    let user = head
        .get("host")
        .unwrap_or_default()
        .split('.')
        .next()
        .unwrap_or_default()
        .to_owned();
    let upgrade = head.get("upgrade").is_some();
    let mut passed = format!("{}\r\n", head.line);
    for (name, value) in &head.headers {
        let ours = name.to_ascii_lowercase().starts_with("x-authentik-");
        if !ours && (upgrade || !name.eq_ignore_ascii_case("connection")) {
            passed += &format!("{name}: {value}\r\n");
        }
    }
    passed += &format!("X-authentik-username: {user}@example.com\r\n");
    passed += if upgrade {
        "\r\n"
    } else {
        "Connection: close\r\n\r\n"
    };
    let mut upstream = TcpStream::connect(dispatcher).await?;
    upstream.write_all(passed.as_bytes()).await?;
    upstream.write_all(&bytes[length..]).await?;
    tokio::io::copy_bidirectional(&mut browser, &mut upstream).await?;
    Ok(())
}
