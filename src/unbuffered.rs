//! The client's side of a WebSocket: Pingora's session, but for its retry buffer.
//!
//! Pingora 0.9.1 keeps a copy of what a client sends, so that the request could be sent anew, and goes on with it after a
//! 101: up to 64 KB for as long as the WebSocket lives, in a buffer that doubles. No setting turns that off, but it is
//! asked for from outside, once, before anything is sent to the instance. So what stands for the session until the 101 does
//! as the session does in everything but that.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;
use http::HeaderMap;
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::v1::server::HttpSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::proxy::Session;

/// The session for which another stands.
pub struct Original(Place);

type Place = Arc<Mutex<Option<HttpSession>>>;

/// Has the request of `session`, which asks for a WebSocket and has no body, keep no copy of what its client sends.
pub fn unbuffer(session: &mut Session) -> Option<Original> {
    let downstream = &mut *session.downstream_session;
    match mem::replace(downstream, nobody()) {
        ServerSession::H1(inner) => {
            let place = Place::default();
            *downstream = ServerSession::new_custom(Box::new(Unbuffered {
                inner: Some(inner),
                place: place.clone(),
            }));
            Some(Original(place))
        }
        other => {
            *downstream = other;
            None
        }
    }
}

impl Original {
    /// Puts it back, where nothing asks for a copy any more: it takes less for each message.
    pub fn restore(self, session: &mut Session) {
        let downstream = &mut *session.downstream_session;
        drop(mem::replace(downstream, nobody()));
        let left = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(inner) = left {
            *downstream = ServerSession::H1(inner);
        }
    }
}

fn nobody() -> ServerSession {
    ServerSession::new_custom(Box::new(()))
}

struct Unbuffered {
    inner: Option<HttpSession>,
    /// Where it is left for its original.
    place: Place,
}

impl Unbuffered {
    fn inner(&self) -> &HttpSession {
        self.inner.as_ref().expect("it is there until the drop")
    }

    fn inner_mut(&mut self) -> &mut HttpSession {
        self.inner.as_mut().expect("it is there until the drop")
    }
}

impl Drop for Unbuffered {
    fn drop(&mut self) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = self.inner.take();
    }
}

type Messages = Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync>;

#[async_trait]
impl CustomSession for Unbuffered {
    fn enable_retry_buffering(&mut self) {}

    fn retry_buffer_truncated(&self) -> bool {
        false
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        None
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        if !data.is_empty() {
            self.inner_mut().write_body(&data).await?;
        }
        if end {
            self.inner_mut().finish_body().await?;
        }
        Ok(())
    }

    // Pingora has two calls for what is one here: the end of the answer, and that of a session, which is never used again.
    async fn finish(&mut self) -> Result<()> {
        self.inner_mut().finish_body().await?;
        self.inner_mut().shutdown().await;
        Ok(())
    }

    async fn shutdown(&mut self, _code: u32, _context: &str) {
        self.inner_mut().shutdown().await
    }

    fn req_header(&self) -> &RequestHeader {
        self.inner().req_header()
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        self.inner_mut().req_header_mut()
    }

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        self.inner_mut().read_body_bytes().await
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        self.inner_mut().read_body_or_idle(no_body_expected).await
    }

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        self.inner_mut().response_duplex_vec(tasks).await
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        self.inner_mut().drain_request_body().await
    }

    async fn write_response_header(&mut self, head: Box<ResponseHeader>, _end: bool) -> Result<()> {
        self.inner_mut().write_response_header(head).await
    }

    async fn write_response_header_ref(&mut self, head: &ResponseHeader, _end: bool) -> Result<()> {
        self.inner_mut().write_response_header_ref(head).await
    }

    async fn write_trailers(&mut self, _trailers: HeaderMap) -> Result<()> {
        Ok(())
    }

    fn proxy_tasks_enabled(&self) -> bool {
        self.inner().proxy_tasks_enabled()
    }

    fn set_proxy_tasks_enabled(&mut self, enabled: bool) {
        self.inner_mut().set_proxy_tasks_enabled(enabled)
    }

    fn send_proxy_task(&mut self, task: HttpTask) {
        self.inner_mut().send_proxy_task(task)
    }

    fn has_pending_proxy_tasks(&self) -> bool {
        self.inner().has_pending_proxy_tasks()
    }

    async fn write_proxy_tasks(&mut self) -> Result<bool> {
        self.inner_mut().write_proxy_tasks().await
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.inner_mut().set_read_timeout(timeout)
    }

    fn get_read_timeout(&self) -> Option<Duration> {
        self.inner().get_read_timeout()
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.inner_mut().set_write_timeout(timeout)
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.inner().get_write_timeout()
    }

    fn set_total_drain_timeout(&mut self, timeout: Option<Duration>) {
        self.inner_mut().set_total_drain_timeout(timeout)
    }

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.inner().get_total_drain_timeout()
    }

    fn request_summary(&self) -> String {
        self.inner().request_summary()
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.inner().response_written()
    }

    fn is_body_done(&mut self) -> bool {
        self.inner_mut().is_body_done()
    }

    fn is_body_empty(&mut self) -> bool {
        self.inner_mut().is_body_empty()
    }

    fn body_bytes_sent(&self) -> usize {
        self.inner().body_bytes_sent()
    }

    fn body_bytes_read(&self) -> usize {
        self.inner().body_bytes_read()
    }

    fn digest(&self) -> Option<&Digest> {
        Some(self.inner().digest())
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        Some(self.inner_mut().digest_mut())
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.inner().client_addr()
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.inner().server_addr()
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.inner().get_headers_raw_bytes()
    }

    fn is_upgrade_req(&self) -> bool {
        self.inner().is_upgrade_req()
    }

    fn was_upgraded(&self) -> bool {
        self.inner().was_upgraded()
    }

    // HTTP has no such messages.

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_reader(&mut self) -> Option<Messages> {
        None
    }

    fn restore_custom_message_reader(&mut self, _reader: Messages) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(
        &mut self,
        _writer: Box<dyn CustomMessageWrite>,
    ) -> Result<()> {
        Ok(())
    }
}
