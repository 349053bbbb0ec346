//! The admin listener: `/livez`, `/readyz`, `/metrics`, `/status`. GET and HEAD only, no CORS.
//!
//! It has a thread of its own, so that neither a busy data plane nor a background that hangs can starve it. Nor can its
//! own peers: connections, their requests and their time are bounded, and a new one always finds room.

mod hosts;

use std::convert::Infallible;
use std::io;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream as BlockingStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use crate::audit::{Audit, ClockDoubt};
use crate::clock;
use crate::concurrency::Bounds;
use crate::config::LOOPBACK_NOTICE;
use crate::idempotency::Idempotency;
use crate::log::OncePerSecond;
use crate::metrics::Metrics;
use crate::registry::Format;
use crate::seats::{Seat, Seats};
use crate::state::{Route, State};
use crate::watchdog::Watchdog;
use hosts::Hosts;

/// What the admin listener tells of.
pub struct Admin {
    /// Further names of `Host`.
    pub hosts: Vec<String>,
    /// The compiled configuration.
    pub state: Arc<ArcSwap<State>>,
    /// The audit trail.
    pub audit: Audit,
    /// The calls of the window.
    pub idempotency: Arc<Idempotency>,
    /// The bounds on concurrent work.
    pub bounds: Arc<Bounds>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// Where callers connect.
    pub addresses: Vec<String>,
    /// What belongs to this gateway alone.
    pub place: Place,
    /// How many workers accept connections.
    pub accepting: watch::Receiver<usize>,
    /// How many workers there are.
    pub workers: usize,
    pub(crate) watchdog: Arc<Watchdog>,
}

/// Where a gateway is: tells `check` which sockets are those of the gateway that a configuration would replace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The configuration file, unless it is no regular file.
    pub file: Option<PathBuf>,
    /// The audit directory.
    pub audit_directory: PathBuf,
    /// The addresses of all its sockets.
    pub sockets: Vec<String>,
}

/// Open connections. A further one takes the place of the one that has been idle longest.
const MAX_CONNECTIONS: usize = 64;

/// A head must be there within this time, and its answer must be taken.
const DEADLINE: Duration = Duration::from_secs(3);

/// So long an answer may be, in bytes: `/status` names each route and credential.
const MAX_ANSWER: usize = 1 << 20;

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";

/// Asks the admin listener of a gateway, as a probe does. Returns its answer, head and body.
///
/// # Errors
///
/// Fails if there is no whole answer within 3 s after the connection, or if it has more than [`MAX_ANSWER`]: any program may
/// listen there.
pub fn ask(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = BlockingStream::connect_timeout(&address, DEADLINE)?;
    let deadline = std::time::Instant::now() + DEADLINE;
    // The one name that each admin listener takes for each path.
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece) {
            Ok(0) => return String::from_utf8(answer).map_err(io::Error::other),
            Ok(read) => answer.extend_from_slice(&piece[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {} // the time is over
            Err(error) => return Err(error),
        }
        if answer.len() > MAX_ANSWER {
            return Err(io::Error::other("the answer has no end"));
        }
    }
}

/// Serves until the runtime ends.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    let (seats, hosts) = (Seats::new(MAX_CONNECTIONS), Arc::new(Hosts::new(&admin.hosts)));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                static FAILED: OncePerSecond = OncePerSecond::new();
                if let Some(times) = FAILED.times() {
                    tracing::warn!(%error, times, "accept failed (admin)");
                }
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let seat = seats.take().await;
        tokio::spawn(converse(stream, seat, admin.clone(), hosts.clone()));
        yield_now().await; // so that who asks at once is answered before others can take its seat
    }
}

/// One request, one answer: who sends many and reads nothing costs no more than one.
async fn converse(stream: TcpStream, seat: Seat, admin: Arc<Admin>, hosts: Arc<Hosts>) {
    let is_asked = Notify::new();
    let service = service_fn(|request| {
        seat.steps();
        is_asked.notify_one();
        let response = match hosts.check(&request) {
            Ok(()) => admin.answer(&request),
            Err(refused) => reply(StatusCode::MISDIRECTED_REQUEST, TEXT, refused),
        };
        async move { Ok::<_, Infallible>(response) }
    });
    let mut server = http1::Builder::new();
    server.keep_alive(false).half_close(true); // who has asked may have ended its side
    let connection = server.serve_connection(TokioIo::new(stream), service);
    let deadline = sleep(DEADLINE);
    tokio::pin!(connection, deadline);
    loop {
        tokio::select! {
            _ = &mut connection => return,
            () = is_asked.notified() => deadline.as_mut().reset(Instant::now() + DEADLINE),
            () = &mut deadline => return,
            () = seat.is_taken() => return,
        }
    }
}

impl Admin {
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        // hyper leaves the body of an answer to HEAD away (RFC 9110, section 9.3.2).
        // tests/hyper.rs: hyper_leaves_the_body_of_an_answer_to_head_away
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET and HEAD only\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/livez" => match self.watchdog.hangs() {
                None => reply(StatusCode::OK, TEXT, "ok\n"),
                Some(hangs) => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{hangs}\n")),
            },
            "/readyz" => self.ready(),
            "/metrics" => {
                self.audit.count();
                let format = Format::asked_by(request.headers());
                let quota = self.state.load().terms.quota.share();
                match self.metrics.render(format, &self.bounds, self.idempotency.keys(), quota) {
                    Ok(text) => reply(StatusCode::OK, format.content_type(), text),
                    Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
                }
            }
            "/status" => reply(StatusCode::OK, JSON, format!("{:#}\n", self.status())),
            _ => reply(StatusCode::NOT_FOUND, TEXT, "there are /livez, /readyz, /metrics and /status\n"),
        }
    }

    /// Ready once each credential has had a token; never red for the token alone after that.
    fn ready(&self) -> Response<Full<Bytes>> {
        let mut reasons: Vec<String> = Vec::new();
        if self.bounds.is_stopping() {
            reasons.push("draining".into());
        }
        let accepting = *self.accepting.borrow();
        if accepting < self.workers {
            reasons.push(format!("{accepting} of {} workers accept connections", self.workers));
        }
        if !self.audit.healthy() {
            reasons.push("the audit trail cannot be written".into());
        }
        if self.idempotency.holds_all_up() {
            reasons.push("the keys of earlier calls are still being read".into());
        }
        for status in self.state.load().terms.slots.iter().map(|slot| slot.status()) {
            if !status.had_token {
                reasons.push(format!("no token yet for credential {}", status.name));
            }
        }
        let ready = reasons.is_empty();
        let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let said = json!({ "ready": ready, "reasons": reasons, "warnings": self.warnings() });
        reply(status, JSON, format!("{said}\n"))
    }

    /// What an operator should know of and no caller suffers from: it does not make the gateway unready.
    fn warnings(&self) -> Vec<String> {
        let clock = self.audit.clock_doubt().map(|doubt| format!("the wall clock is doubtful: {doubt}"));
        let loss = self.idempotency.loss().map(|loss| {
            format!(
                "a part of the audit trail is lost ({}): keys that are not found get 503",
                loss.first.reason
            )
        });
        clock.into_iter().chain(loss).collect()
    }

    fn status(&self) -> Value {
        let state = self.state.load();
        let routes: Vec<_> = state
            .routes
            .iter()
            .map(Route::as_ref)
            .map(|it| json!({ "name": *it.name, "path": it.path }))
            .collect();
        let credentials: Vec<_> = state.terms.slots.iter().map(|slot| json!(slot.status())).collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "listeners": self.addresses,
            "place": self.place,
            "draining": self.bounds.is_stopping(),
            "connections": self.bounds.connections(),
            "requests_in_flight": self.bounds.in_flight(),
            "audit": self.audit.status(),
            "config": self.metrics.changes.status(),
            "clock": {
                "doubtful": self.audit.clock_doubt().map(ClockDoubt::as_str),
                "wall_ahead_seconds": clock::wall_ahead() / 1_000_000_000,
            },
            "upstream": {
                "suspended": state.terms.breaker.is_suspended(),
                "last_error": state.terms.failures.last(),
            },
            "caller_tls": { "last_error": self.metrics.caller_tls.last() },
            "idempotency": self.idempotency.status(),
            "routes": routes,
            "credentials": credentials,
            "notice": state.trusts_loopback.then_some(LOOPBACK_NOTICE),
        })
    }
}

fn reply(status: StatusCode, media_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}
