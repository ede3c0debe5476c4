//! The journey in a real browser: headless Chromium against the demo, driven over its DevTools protocol.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use base64::Engine;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::common::dispatcher::wait_for;
use crate::common::http;
use crate::common::instance::{Instance, Version};
use crate::common::mint;
use crate::world::World;

/// A browser and its first page.
struct Browser {
    process: Child,
    page: Page,
    devtools: SocketAddr,
    _profile: tempfile::TempDir,
}

/// A tab, as DevTools see it.
struct Page {
    id: String,
    socket: tokio::sync::Mutex<WebSocketStream<MaybeTlsStream<TcpStream>>>,
    next: AtomicU64,
}

impl Browser {
    async fn start(dark: bool) -> Browser {
        let profile = tempfile::TempDir::new().unwrap();
        let mut command = Command::new("chromium");
        command
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
            ])
            .args([
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ])
            .args([
                "--remote-debugging-port=0",
                "--window-size=900,700",
                "--hide-scrollbars",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if dark {
            command.arg("--blink-settings=preferredColorScheme=0");
        }
        let process = command.spawn().expect("chromium, which tests/run installs");
        let port_file = profile.path().join("DevToolsActivePort");
        wait_for("DevTools port", async || {
            std::fs::read_to_string(&port_file).is_ok_and(|text| text.lines().count() == 2)
        })
        .await;
        let port: u16 = std::fs::read_to_string(&port_file)
            .unwrap()
            .lines()
            .next()
            .unwrap()
            .parse()
            .unwrap();
        let devtools = ([127, 0, 0, 1], port).into();
        let first = async || -> Option<String> {
            let list = http::request(devtools, "GET", "/json", &[("Host", "localhost")], b"")
                .await
                .ok()?;
            let list: Value = serde_json::from_slice(&list.body).ok()?;
            let page = list
                .as_array()?
                .iter()
                .find(|target| target["type"] == "page")?;
            Some(page["id"].as_str()?.to_owned())
        };
        wait_for("page", async || first().await.is_some()).await;
        let page = Page::connect(devtools, &first().await.unwrap()).await;
        Browser {
            process,
            page,
            devtools,
            _profile: profile,
        }
    }

    /// Opens `url` in a second tab.
    async fn tab(&self, url: &str) -> Page {
        let target = self
            .call("Target.createTarget", json!({ "url": url }))
            .await;
        Page::connect(self.devtools, target["targetId"].as_str().unwrap()).await
    }

    /// Closes a tab, from outside: what it says itself might end with it.
    async fn close(&self, page: Page) {
        self.call("Target.closeTarget", json!({ "targetId": page.id }))
            .await;
    }
}

impl std::ops::Deref for Browser {
    type Target = Page;

    fn deref(&self) -> &Page {
        &self.page
    }
}

impl Page {
    async fn connect(devtools: SocketAddr, id: &str) -> Page {
        let url = format!("ws://{devtools}/devtools/page/{id}");
        let (socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
        Page {
            id: id.to_owned(),
            socket: socket.into(),
            next: AtomicU64::new(1),
        }
    }

    async fn call(&self, method: &str, params: Value) -> Value {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut socket = self.socket.lock().await;
        let call = json!({ "id": id, "method": method, "params": params });
        socket.send(Message::text(call.to_string())).await.unwrap();
        loop {
            let message = socket.next().await.unwrap().unwrap();
            let Ok(text) = message.to_text() else {
                continue;
            };
            let answer: Value = serde_json::from_str(text).unwrap_or_default();
            if answer["id"] == id {
                return answer["result"].clone();
            }
        }
    }

    async fn open(&self, url: &str) {
        self.call("Page.navigate", json!({ "url": url })).await;
    }

    async fn evaluate(&self, script: &str) -> Value {
        let params = json!({ "expression": script, "awaitPromise": true, "returnByValue": true });
        self.call("Runtime.evaluate", params).await["result"]["value"].clone()
    }

    /// Waits until the page's text holds `part`.
    async fn sees(&self, part: &str) {
        wait_for(&format!("{part:?} on the page"), async || {
            let text = self
                .evaluate("document.body ? document.body.innerText : ''")
                .await;
            text.as_str().is_some_and(|text| text.contains(part))
        })
        .await;
    }

    /// Puts a picture of the page where a person can look at it.
    async fn picture(&self, name: &str) {
        let picture = self
            .call(
                "Page.captureScreenshot",
                json!({ "format": "png", "captureBeyondViewport": true }),
            )
            .await;
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(picture["data"].as_str().unwrap())
            .unwrap();
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("screenshots");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("{name}.png")), bytes).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a person finds who asks whose fault it was, and how an end looks from a real browser.
#[tokio::test]
async fn a_person_sees_their_drops_and_measures_their_own_way() {
    let mut world = World::with(|setup| {
        setup
            .set("tunnels.client_heartbeat", "200ms")
            .set("tunnels.client_watchdog", "1s")
    })
    .await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(crate::common::edge::serve(
        listener,
        world.dispatcher.address(),
    ));
    let base = format!("http://alice.localhost:{port}");
    let browser = Browser::start(false).await;
    browser.open(&format!("{base}/.t3-dispatch/")).await;
    browser.sees("No drops in the last 24 hours").await;
    assert_eq!(world.mints(), 0, "the page needs no pairing");

    // A tab that is closed, and one that is reloaded, have ended as they should.
    browser.open(&base).await;
    browser.sees("hello 1 to alice").await;
    browser.call("Page.reload", json!({})).await;
    let records = world.dispatcher.wait_for_records(1).await;
    assert_eq!(records[0]["verdict"]["segment"], "none", "{records:#?}");
    browser.sees("hello 1 to alice").await;
    let second = browser.tab(&base).await;
    // A browser whose own end of the handshake is still to come says no Close.
    second.sees("hello 1 to alice").await;
    assert_eq!(
        world.dispatcher.metric("t3dispatch_tunnels_open").await,
        2.0
    );
    browser.close(second).await;
    let records = world.dispatcher.wait_for_records(2).await;
    assert_eq!(records[1]["verdict"]["segment"], "none", "{records:#?}");

    // The instance goes: that is no fault of the person's.
    let other = mint::home(world.base(), "other");
    let other = Instance::start(&other, Version::V0_0_33).await;
    let instance = std::mem::replace(&mut world.alice, other);
    instance.kill().await;
    wait_for("the drop", async || {
        world
            .dispatcher
            .records()
            .iter()
            .any(|record| record["verdict"]["segment"] == "serve")
    })
    .await;
    browser.open(&format!("{base}/.t3-dispatch/")).await;
    browser.sees("1 drop in the last 24 hours").await;
    browser
        .evaluate("document.querySelector('#drops summary').click()")
        .await;
    browser.sees("on our side").await;
    browser.picture("drops").await;
    browser
        .evaluate("document.getElementById('test-toggle').click()")
        .await;
    wait_for("a measured way", async || {
        let result = browser
            .evaluate("document.getElementById('test-result').innerText")
            .await;
        result
            .as_str()
            .is_some_and(|text| text.to_lowercase().contains("steady"))
    })
    .await;
    browser.picture("drops-and-test").await;
    let errors = browser
        .evaluate("document.querySelectorAll('[style]').length")
        .await;
    assert_eq!(errors, 0);
    let narrow = json!({ "width": 360, "height": 800, "deviceScaleFactor": 2, "mobile": true });
    browser
        .call("Emulation.setDeviceMetricsOverride", narrow)
        .await;
    browser.picture("drops-phone").await;
    let fits = browser
        .evaluate("document.documentElement.scrollWidth <= innerWidth")
        .await;
    assert_eq!(fits, true);
    // Everything can be reached by keyboard: the mark on the timeline leads to its drop.
    browser.evaluate("document.querySelector('#drops details').open = false; document.querySelector('#timeline [tabindex=\"0\"]').focus()").await;
    for kind in ["keyDown", "keyUp"] {
        let key = json!({ "type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r" });
        browser.call("Input.dispatchKeyEvent", key).await;
    }
    wait_for("the drop to open", async || {
        browser
            .evaluate("document.querySelector('#drops details').open")
            .await
            == true
    })
    .await;
    let dark = Browser::start(true).await;
    dark.open(&format!("{base}/.t3-dispatch/")).await;
    dark.sees("1 drop in the last 24 hours").await;
    dark.picture("drops-dark").await;
}

/// The demo, which `cargo test` builds beside this test.
fn demo() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent()
        .unwrap()
        .parent()
        .unwrap()
        .join("examples/demo")
}

#[tokio::test]
async fn alice_and_bob_land_and_a_stranger_is_turned_away() {
    let mut demo = tokio::process::Command::new(demo())
        .env("DEMO_PORT", "0")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    let url = loop {
        let line = lines
            .next_line()
            .await
            .unwrap()
            .expect("the demo prints its addresses");
        if let Some(url) = line
            .split_whitespace()
            .find(|word| word.starts_with("http://alice."))
        {
            break url.to_owned();
        }
    };
    let browser = Browser::start(false).await;
    browser.open(&url).await;
    browser.sees("alice's workspace").await;
    browser.sees("signed in, cookie t3_session_").await;
    browser.sees("hello 1 to alice").await;
    browser.picture("alice").await;

    browser.open(&url.replace("alice", "bob")).await;
    browser.sees("bob's workspace").await;
    browser.sees("signed in, cookie t3_session").await;
    browser.sees("hello 1 to bob").await;
    browser.picture("bob").await;

    // The instance forgets its sessions: the page's own call is answered as the instance answers it …
    browser.open(&url).await;
    browser.sees("signed in, cookie").await;
    browser
        .evaluate("document.getElementById('forget').click()")
        .await;
    browser.sees("forgotten: reload this page").await;
    let answer = browser
        .evaluate("fetch('/api/auth/session').then(answer => answer.json())")
        .await;
    assert_eq!(answer["authenticated"], false);
    // … and a reload pairs again and lands.
    browser.call("Page.reload", json!({})).await;
    browser.sees("signed in, cookie t3_session_").await;
    browser.sees("hello 1 to alice").await;

    let stranger = url.replace("alice", "mallory");
    browser.open(&stranger).await;
    browser.sees("There is no workspace for you yet").await;
    browser.sees("unknown-user (403)").await;
    browser.sees("mallory").await;
    browser.picture("unknown-user").await;
    let dark = Browser::start(true).await;
    dark.open(&stranger).await;
    dark.sees("There is no workspace for you yet").await;
    dark.picture("unknown-user-dark").await;
    let background = dark
        .evaluate("getComputedStyle(document.body).backgroundColor")
        .await;
    assert_eq!(background, "rgb(20, 23, 27)");
    // It ends its dispatcher, too.
    let pid = rustix::process::Pid::from_raw(demo.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(demo.wait().await.unwrap().success());
}
