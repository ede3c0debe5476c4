//! A request's walk through the house: `ProxyHttp`, each phase one short call into the room that knows.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use async_trait::async_trait;
use http::{HeaderMap, HeaderValue, StatusCode, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::prelude::HttpPeer;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use pingora::{Error, ErrorSource, ErrorType, Result};

use crate::config::Dispatch;
use crate::downstream::{cut, head_is_read, peer_address, present_peer};
use crate::events::{self, Outcome};
use crate::forward::{self, Shape};
use crate::gate::how;
use crate::identity::{IdentityError, Peer, client, who};
use crate::instance::Caller;
use crate::judge;
use crate::jwt::Tokens;
use crate::page;
use crate::pair::Pairer;
use crate::probe::echo;
use crate::probe::far::{self, Far};
use crate::refuse::{Refusal, answer};
use crate::session::{
    Verdict, accepts_html, has_session_cookie, is_document_navigation, read_check, session_cookies,
};
use crate::table::{Instance, Place, Tables, unique};
use crate::tunnel::live::{self, About, Order, Tunnel};
use crate::tunnel::{How, Side};
use crate::unbuffered::{Original, unbuffer};
use crate::verdict::Rules;

/// The dispatcher, as Pingora calls it.
pub struct Dispatcher(Arc<Inner>);

/// Everything that outlives a request.
struct Inner {
    settings: Dispatch,
    rules: Rules,
    tables: Arc<Tables>,
    caller: Arc<Caller>,
    pairer: Arc<Pairer>,
    tokens: Option<Tokens>,
    /// Requests and tunnels that may be under way at one instance.
    most_each: usize,
}

/// What is known of one request so far.
pub struct Ctx {
    start: Instant,
    /// Its place among what is under way at the instance.
    place: Option<Place>,
    /// Who asks, and where it goes; set once both are known.
    found: Option<(String, Arc<Instance>)>,
    /// The books of the WebSocket that it asks for, which are closed when this is dropped.
    tunnel: Option<Arc<Tunnel>>,
    /// Its session, where another stands for it until the 101.
    original: Option<Original>,
    /// What its headers say of how it is passed on; no upgrade but one to a WebSocket.
    shape: Shape,
    /// Whether it goes over a connection that was used before.
    reused: bool,
    outcome: Option<Outcome>,
    /// Goes last: the process may end once it is gone, and the books have to be closed by then.
    _in_flight: InFlight,
}

/// What is to be done with a request.
enum Step {
    /// It goes to the instance that was found.
    Proxy,
    /// Say that this process is well.
    Health,
    /// Echo.
    Probe,
    /// Show this person their own page.
    Page(String),
    /// Pair this person's browser with their instance.
    Pair(String, Arc<Instance>),
}

/// Why a request is refused, and to whom where that is known.
type Refused = (Refusal, Option<String>);

/// Requests and tunnels that are not over, so that a process that leaves knows when it may.
static IN_FLIGHT: AtomicUsize = AtomicUsize::new(0);

/// Number of requests that are not over; an open WebSocket is one.
pub fn requests_in_flight() -> usize {
    IN_FLIGHT.load(Ordering::Acquire)
}

struct InFlight;

impl InFlight {
    fn enter() -> InFlight {
        IN_FLIGHT.fetch_add(1, Ordering::AcqRel);
        InFlight
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        IN_FLIGHT.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Dispatcher {
    /// A dispatcher that follows `tables`, and asks `tokens` who is asking where people have signed ones. There is room for
    /// so many connections.
    pub fn new(
        settings: Dispatch,
        tables: Arc<Tables>,
        tokens: Option<Tokens>,
        room: usize,
    ) -> Dispatcher {
        let caller = Arc::new(Caller::new(true));
        let pairer = Pairer::new(settings.pairing.clone(), caller.clone());
        Dispatcher(Arc::new(Inner {
            rules: judge::rules(&settings.tunnels),
            settings,
            tables,
            caller,
            pairer,
            tokens,
            // An instance that hangs must leave some for everybody else.
            most_each: (room / 4 * 3).max(1),
        }))
    }
}

impl Inner {
    /// Finds out what is to be done with a request.
    async fn decide(
        self: &Arc<Self>,
        session: &mut Session,
        ctx: &mut Ctx,
    ) -> Result<Step, Refused> {
        let request = session.req_header();
        if forward::is_malformed(request) {
            return Err((Refusal::BadRequest, None));
        }
        match request.uri.path() {
            "/healthz" | "/probe/healthz" => return Ok(Step::Health),
            "/probe/ws" => return Ok(Step::Probe),
            _ => {}
        }
        let (user, instance) = self.find(session).await?;
        ctx.place = instance.enter(self.most_each);
        if ctx.place.is_none() {
            return Err((Refusal::InstanceBusy, Some(user)));
        }
        if page::is_ours(request.uri.path()) {
            return Ok(Step::Page(user));
        }
        let upgrade = ctx.shape.upgrade;
        let origins = &self.settings.tunnels.allowed_origins;
        if upgrade && !forward::is_origin_allowed(&request.headers, origins) {
            return Err((Refusal::CrossOrigin, Some(user)));
        }
        let at_once = instance.cookie.is_known()
            && !is_document_navigation(&request.method, &request.headers);
        let has_session = if at_once {
            has_session_cookie(&request.headers, &instance.cookie)
        } else {
            Box::pin(self.find_session(request, &instance)).await
        };
        if !has_session {
            return Ok(Step::Pair(user, instance));
        }
        if upgrade {
            let about = about(session, &user, &instance);
            ctx.tunnel = Some(Tunnel::new(about, &self.rules, cut()));
        }
        // Looking for the session may have taken seconds, in which the table may have taken the instance away. A tunnel is
        // known to the revocation by now, so that none escapes it.
        if (upgrade || !at_once)
            && let Some(refusal) = self.lost(&user, &instance)
        {
            if let Some(tunnel) = &ctx.tunnel {
                tunnel.give(Order::Revoked);
            }
            return Err((refusal, Some(user)));
        }
        ctx.found = Some((user, instance));
        Ok(Step::Proxy)
    }

    /// Answers a request that does not go to an instance.
    async fn serve(&self, step: Step, session: &mut Session, ctx: &mut Ctx) -> Result<bool> {
        match step {
            Step::Proxy => Ok(false),
            Step::Health => {
                ctx.outcome = Some(Outcome::Health);
                healthy(session).await
            }
            Step::Probe => {
                ctx.outcome = Some(Outcome::Probe);
                self.probe(session, ctx).await
            }
            Step::Page(user) => {
                ctx.outcome = Some(Outcome::Page);
                page::serve(session, &user, &self.settings).await?;
                Ok(true)
            }
            Step::Pair(user, instance) => self.pair(session, ctx, &user, &instance).await,
        }
    }

    /// Who asks, and the instance that is theirs.
    async fn find(&self, session: &Session) -> Result<(String, Arc<Instance>), Refused> {
        let peer = present_peer().ok_or((Refusal::Internal, None))?;
        let rules = &self.settings.identity;
        let headers = &session.req_header().headers;
        let user = who(peer, headers, rules, self.tokens.as_ref()).await;
        let user = user.map_err(|error| {
            let refusal = match error {
                IdentityError::UntrustedPeer(peer) => Refusal::UntrustedProxy(peer),
                IdentityError::Ambiguous(header) => Refusal::AmbiguousIdentity(header),
                IdentityError::Contradiction(_) | IdentityError::Token(..) => {
                    Refusal::BadToken(error)
                }
                IdentityError::NoKeys => Refusal::NoKeys,
                IdentityError::Missing => Refusal::UnknownUser,
            };
            (refusal, None)
        })?;
        match self.tables.current().get(&user).cloned() {
            Some(instance) => Ok((user, instance)),
            None => Err((Refusal::UnknownUser, Some(user))),
        }
    }

    /// What to say to a user whose instance this is not any more, if so. One who has another by now may try again.
    fn lost(&self, user: &str, instance: &Arc<Instance>) -> Option<Refusal> {
        match self.tables.current().get(user) {
            Some(now) if Arc::ptr_eq(now, instance) => None,
            Some(_) => Some(Refusal::InstanceUnreachable),
            None => Some(Refusal::UnknownUser),
        }
    }

    /// Whether the request comes with a session, as far as the instance can tell.
    async fn find_session(
        self: &Arc<Self>,
        request: &RequestHeader,
        instance: &Arc<Instance>,
    ) -> bool {
        let headers = &request.headers;
        let silent = !instance.cookie.is_known() && self.learn_cookie_name(instance).await;
        // An instance that has just not answered one question need not be asked another.
        if silent || !is_document_navigation(&request.method, headers) {
            return has_session_cookie(headers, &instance.cookie);
        }
        self.is_session_alive(headers, instance).await
    }

    /// Whether the instance knows a session that the request comes with, or does not say.
    async fn is_session_alive(&self, headers: &HeaderMap, instance: &Instance) -> bool {
        let mut asked = None;
        // The check may teach us that the cookie has another name by now, under which the browser may have one too.
        while let Some(cookies) =
            session_cookies(headers, &instance.cookie).filter(|now| asked.as_ref() != Some(now))
        {
            let verdict = self.check(instance, Some(&cookies)).await;
            events::session_checked(verdict);
            if verdict != Verdict::Dead {
                return true;
            }
            asked = Some(cookies);
        }
        false
    }

    /// Learns the name of the instance's session cookie. The first question is waited for; gives whether that was just now,
    /// and in vain.
    async fn learn_cookie_name(self: &Arc<Self>, instance: &Arc<Instance>) -> bool {
        let mut asked_now = false;
        let first = instance.cookie.first.get_or_init(|| {
            asked_now = true;
            instance.cookie.ask_again();
            async {
                self.check(instance, None).await;
            }
        });
        first.await;
        let unknown = !instance.cookie.is_known();
        if unknown && !asked_now && instance.cookie.ask_again() {
            let (dispatcher, instance) = (self.clone(), instance.clone());
            tokio::spawn(async move { dispatcher.check(&instance, None).await });
        }
        unknown && asked_now
    }

    /// Asks the instance about a session, and listens for the name of its cookie.
    async fn check(&self, instance: &Instance, cookies: Option<&HeaderValue>) -> Verdict {
        let rules = &self.settings.session;
        match self
            .caller
            .get(instance, &rules.check_path, cookies, rules.check_timeout)
            .await
        {
            Ok(answer) if answer.status == StatusCode::OK => {
                let (verdict, name) = read_check(&answer.body);
                if let Some(name) = name {
                    instance.cookie.learn(&name);
                }
                verdict
            }
            _ => Verdict::Unknown,
        }
    }

    /// Echoes to a probe.
    async fn probe(&self, session: &mut Session, ctx: &mut Ctx) -> Result<bool> {
        let Some(peer) = present_peer() else {
            return refuse(session, ctx, Refusal::Internal, None).await;
        };
        let request = session.req_header();
        let client = client(peer, &request.headers, &self.settings.identity)
            .unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let leg = far::leg(request.uri.query(), &request.headers, &self.settings.probe)
            .and_then(|leg| Far::open(leg, self.rules.stall()));
        match echo::serve(session, client, leg).await {
            Ok(Err(refusal)) => refuse(session, ctx, refusal, None).await,
            // However it ended, it is over and there is nothing to answer.
            Ok(Ok(())) | Err(_) => Ok(true),
        }
    }

    /// Pairs the browser and sends it to its workspace.
    async fn pair(
        &self,
        session: &mut Session,
        ctx: &mut Ctx,
        user: &str,
        instance: &Arc<Instance>,
    ) -> Result<bool> {
        let outcome = self.pairer.pair(user, instance).await;
        // Pairing takes seconds, in which the table may have taken the instance away.
        let cookies = match (self.tables.current().get(user), &*outcome) {
            (None, _) => return refuse(session, ctx, Refusal::UnknownUser, Some(user)).await,
            // The person has another instance by now: the browser comes back for that one's cookie.
            (Some(now), _) if !Arc::ptr_eq(now, instance) => &[][..],
            (_, Ok(paired)) => &paired.set_cookies,
            (_, Err(error)) => return refuse(session, ctx, error.refusal(), Some(user)).await,
        };
        ctx.outcome = Some(Outcome::Paired);
        answer(session, redirect(cookies)?, bytes::Bytes::new()).await?;
        Ok(true)
    }
}

/// The redirect to the workspace that carries the fresh session cookie.
fn redirect(cookies: &[HeaderValue]) -> Result<ResponseHeader> {
    let mut header = ResponseHeader::build(StatusCode::FOUND, Some(4))?;
    header.insert_header(header::LOCATION, "/")?;
    header.insert_header(header::CACHE_CONTROL, "no-store")?;
    for line in cookies {
        header.append_header(header::SET_COOKIE, line)?;
    }
    Ok(header)
}

async fn refuse(
    session: &mut Session,
    ctx: &mut Ctx,
    refusal: Refusal,
    user: Option<&str>,
) -> Result<bool> {
    ctx.outcome = Some(Outcome::Refused);
    events::refused(&refusal, user);
    let request = session.req_header();
    let page =
        is_document_navigation(&request.method, &request.headers) && accepts_html(&request.headers);
    refusal.send(session, page, user).await?;
    Ok(true)
}

async fn healthy(session: &mut Session) -> Result<bool> {
    let mut header = ResponseHeader::build(StatusCode::OK, Some(3))?;
    header.insert_header(header::CONTENT_TYPE, "text/plain; charset=utf-8")?;
    header.insert_header(header::CACHE_CONTROL, "no-store")?;
    answer(session, header, bytes::Bytes::from_static(b"ok\n")).await?;
    Ok(true)
}

/// Whether there is no client any more that could be told something.
fn is_client_gone(error: &Error) -> bool {
    let broken = matches!(
        error.etype(),
        ErrorType::ReadError
            | ErrorType::WriteError
            | ErrorType::ConnectionClosed
            | ErrorType::ReadTimedout
    );
    *error.esource() == ErrorSource::Downstream && broken
}

/// Whether there was no file descriptor for a connection, which is no fault of whoever it was to reach.
fn lacks_descriptors(error: &Error) -> bool {
    use rustix::io::Errno;
    let error = error.root_cause().downcast_ref::<std::io::Error>();
    let errno = error.and_then(Errno::from_io_error);
    errno.is_some_and(|errno| matches!(errno, Errno::MFILE | Errno::NFILE))
}

/// How a connection broke, by the system's error at the root of Pingora's.
fn how_it_broke(error: &Error) -> How {
    if let Some(error) = error.root_cause().downcast_ref::<std::io::Error>() {
        return how(error);
    }
    match error.etype() {
        ErrorType::ReadTimedout | ErrorType::WriteTimedout => How::Timeout,
        ErrorType::ConnectionClosed => How::Fin,
        _ => How::Rst,
    }
}

/// Whose tunnel a request asks for.
fn about(session: &Session, user: &str, instance: &Arc<Instance>) -> About {
    let headers = &session.req_header().headers;
    let chain = live::chain(headers, present_peer().and_then(Peer::ip));
    let told = headers.get("x-request-id").and_then(|id| id.to_str().ok());
    let usable = |id: &&str| {
        !id.is_empty() && id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    About {
        user: user.to_owned(),
        instance: instance.clone(),
        ip: chain.first().cloned().unwrap_or_default(),
        chain,
        id: told.filter(usable).map_or_else(own_id, str::to_owned),
    }
}

/// An ID for a request that came without one: unique on this machine.
fn own_id() -> String {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    format!(
        "{:x}-{:x}-{:x}",
        now.as_secs(),
        std::process::id(),
        unique()
    )
}

#[async_trait]
impl ProxyHttp for Dispatcher {
    type CTX = Ctx;

    fn new_ctx(&self) -> Ctx {
        Ctx {
            start: Instant::now(),
            place: None,
            found: None,
            tunnel: None,
            original: None,
            shape: Shape::default(),
            reused: false,
            outcome: None,
            _in_flight: InFlight::enter(),
        }
    }

    // Pingora would look at each message for something to compress, and find that it need not.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn early_request_filter(&self, session: &mut Session, ctx: &mut Ctx) -> Result<()> {
        let shape = Shape::of(&session.req_header().headers);
        let tunnel = shape.upgrade && forward::is_websocket(session.req_header());
        ctx.shape = Shape {
            upgrade: tunnel,
            ..shape
        };
        head_is_read(tunnel);
        // Neither an upload that pauses nor a silent WebSocket is ended by us.
        session.set_read_timeout(None);
        // HTTP/1.0 knows no interim responses.
        let old = session.req_header().version < Version::HTTP_11;
        session.set_ignore_info_resp(old);
        // Where chunks end is what servers disagree about most, and Pingora's reader takes some that are not in order. So
        // nothing that comes behind them is ever taken for a request.
        // Whoever asks for a tunnel, or for half of one, may take what follows for the tunnel's.
        if shape.coding || shape.upgrade {
            session.set_keepalive(None);
        }
        let request = session.req_header_mut();
        if tunnel {
            // Pingora sees no WebSocket in a list of offers.
            if request
                .headers
                .get(header::UPGRADE)
                .is_none_or(|offer| offer != "websocket")
            {
                request.insert_header(header::UPGRADE, "websocket")?;
            }
        } else if shape.upgrade {
            // Pingora would make a tunnel of less than a whole WebSocket handshake.
            request.remove_header(&header::UPGRADE);
        }
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Ctx) -> Result<bool> {
        // What is rare is boxed, so that every request need not bring the room for it.
        match self.0.decide(session, ctx).await {
            Ok(Step::Proxy) => {
                if let Some((_, instance)) = &ctx.found {
                    let jwt = self.0.settings.identity.jwt.as_ref();
                    let token = jwt.map(|jwt| &jwt.header);
                    let (port, is_tunnel) = (instance.port, ctx.tunnel.is_some());
                    let request = session.req_header_mut();
                    forward::request_head(request, port, token, peer_address(), is_tunnel)?;
                }
                if ctx.tunnel.is_some() {
                    ctx.original = unbuffer(session);
                }
                Ok(false)
            }
            Ok(step) => Box::pin(self.0.serve(step, session, ctx)).await,
            Err((refusal, user)) => Box::pin(refuse(session, ctx, refusal, user.as_deref())).await,
        }
    }

    async fn upstream_peer(&self, session: &mut Session, ctx: &mut Ctx) -> Result<Box<HttpPeer>> {
        match &ctx.found {
            Some((_, instance)) => {
                // Once is enough: Pingora would go on until every kept connection had failed it.
                let may_repeat = session.req_header().method.is_idempotent() && !ctx.reused;
                let (peer, reused) =
                    forward::peer_for(instance, may_repeat, ctx.shape, ctx.tunnel.as_ref());
                ctx.reused = reused;
                Ok(Box::new(peer))
            }
            None => Error::e_explain(ErrorType::InternalError, "no instance was chosen"),
        }
    }

    // Pingora takes every connection for a new one. Only a request that can be repeated gets one that is not.
    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        _session: &mut Session,
        mut error: Box<Error>,
        ctx: &mut Ctx,
        _reused: bool,
    ) -> Box<Error> {
        if ctx.reused {
            error.retry.decide_reuse(true);
        } else {
            error.set_retry(false);
        }
        error
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut Ctx,
    ) -> Result<()> {
        let version = session.req_header().version;
        if response.status == StatusCode::SWITCHING_PROTOCOLS
            && !(ctx.tunnel.is_some() && forward::switches_to_websocket(response))
        {
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "a 101 that nobody asked for")
                .map_err(|error: Box<Error>| error.into_up());
        }
        forward::response_head(response, version).map_err(|error| error.into_up())?;
        // Such a body ends with the connection, which Pingora finds out only after it has promised to keep it.
        if version < Version::HTTP_11 && !response.headers.contains_key(header::CONTENT_LENGTH) {
            session.set_keepalive(None);
        }
        if let Some(tunnel) = &ctx.tunnel {
            match response.status {
                StatusCode::SWITCHING_PROTOCOLS => {
                    if let Some(original) = ctx.original.take() {
                        original.restore(session);
                    }
                    tunnel.open();
                }
                status if status.is_informational() => {}
                _ => tunnel.refused(),
            }
        }
        if !response.status.is_informational() {
            events::first_byte(response.status, ctx.start.elapsed());
        }
        Ok(())
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<bytes::Bytes>,
        end_of_stream: bool,
        ctx: &mut Ctx,
    ) -> Result<()> {
        // Before the 101 this is the end of the empty request body.
        if let Some(tunnel) = ctx.tunnel.as_ref().filter(|_| session.was_upgraded()) {
            if let Some(bytes) = body.as_ref().filter(|bytes| !bytes.is_empty()) {
                tunnel.bytes(Side::Client, bytes);
            }
            if end_of_stream {
                tunnel.end(Side::Client, How::Fin);
            }
        }
        Ok(())
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        ctx: &mut Ctx,
    ) -> FailToProxy {
        let nothing_to_say = FailToProxy {
            error_code: 0,
            can_reuse_downstream: false,
        };
        if is_client_gone(error) {
            ctx.outcome.get_or_insert(Outcome::Aborted);
            return nothing_to_say;
        }
        if session.was_upgraded() {
            return nothing_to_say;
        }
        let user = ctx.found.as_ref().map(|(user, _)| user.clone());
        if let (ErrorSource::Upstream, Some((user, instance))) = (error.esource(), &ctx.found) {
            events::upstream_failed(user, instance.port, error.etype().as_str());
        }
        let revoked = ctx
            .tunnel
            .as_ref()
            .is_some_and(|tunnel| tunnel.order() == Some(Order::Revoked));
        let refusal = match (error.esource(), error.etype()) {
            _ if revoked => Refusal::UnknownUser,
            (ErrorSource::Downstream, _) => Refusal::BadRequest,
            _ if lacks_descriptors(error) => Refusal::OutOfDescriptors,
            (
                ErrorSource::Upstream,
                ErrorType::ConnectRefused
                | ErrorType::ConnectTimedout
                | ErrorType::ConnectNoRoute
                | ErrorType::ConnectError
                | ErrorType::SocketError
                | ErrorType::BindError,
            ) => Refusal::InstanceUnreachable,
            (ErrorSource::Upstream, _) if how_it_broke(error) == How::Timeout => {
                Refusal::InstanceSilent
            }
            (ErrorSource::Upstream, _) => Refusal::InstanceFailed,
            _ => Refusal::Internal,
        };
        // Half an answer cannot be taken back: the connection ends, which is how the client learns of it.
        if session
            .response_written()
            .is_some_and(|response| !response.status.is_informational())
        {
            return nothing_to_say;
        }
        let error_code = refusal.status().as_u16();
        session.set_keepalive(None);
        // The client may be gone as well; there is nobody left to tell then.
        let _ = refuse(session, ctx, refusal, user.as_deref()).await;
        ctx.outcome = Some(Outcome::Failed);
        FailToProxy {
            error_code,
            can_reuse_downstream: false,
        }
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Ctx) {
        if let (Some(tunnel), Some(error)) = (&ctx.tunnel, error) {
            match error.esource() {
                ErrorSource::Downstream if is_client_gone(error) => {
                    tunnel.end(Side::Client, how_it_broke(error))
                }
                ErrorSource::Upstream if session.was_upgraded() => {
                    tunnel.end(Side::Instance, how_it_broke(error))
                }
                ErrorSource::Upstream => tunnel.end(Side::Instance, How::Refused),
                _ => tunnel.fail(),
            }
        }
        let unsaid = if error.is_some() {
            Outcome::Failed
        } else {
            Outcome::Proxied
        };
        let status = session.response_written().map(|response| response.status);
        events::request(ctx.outcome.unwrap_or(unsaid), status);
    }

    // Pingora's own lines quote paths, which may hold a ticket. Ours say what happened.
    fn suppress_error_log(&self, _session: &Session, _ctx: &Ctx, _error: &Error) -> bool {
        true
    }

    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _ctx: &Ctx,
        _error: &Error,
        _context: ProxyWarnLogContext,
    ) -> bool {
        true
    }
}
