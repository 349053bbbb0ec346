//! The admin listener: liveness (`/livez`), readiness (`/readyz`), `/metrics` and `/status`. GET and HEAD only, no CORS.
//!
//! It runs on a thread of its own, so that neither busy workers nor a hanging background task can starve it. Its peers cannot
//! either: a connection has one request, 3 s for its head and 3 s for the answer, and the one that has been idle longest makes
//! room for a new one. Peers are not authenticated. Nothing can be changed here, and no secret is shown.

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
use crate::concurrency::Limits;
use crate::config::LOOPBACK_NOTICE;
use crate::idempotency::Idempotency;
use crate::log::OncePerSecond;
use crate::metrics::Metrics;
use crate::registry::Format;
use crate::seats::{Seat, Seats};
use crate::state::{Route, State};
use crate::watchdog::Watchdog;
use hosts::AdminHosts;

/// What the admin listener reports on. It only reads from these parts.
pub struct Admin {
    /// The names of `[admin] hosts`.
    pub hosts: Vec<String>,
    /// The compiled configuration.
    pub state: Arc<ArcSwap<State>>,
    /// The audit trail.
    pub audit: Audit,
    /// Deduplication.
    pub idempotency: Arc<Idempotency>,
    /// The bounds on concurrent work.
    pub limits: Arc<Limits>,
    /// The metrics of the process.
    pub metrics: Arc<Metrics>,
    /// The addresses of the listeners for callers.
    pub addresses: Vec<String>,
    /// The files and sockets of this gateway.
    pub place: Instance,
    /// The number of workers that accept connections.
    pub accepting: watch::Receiver<usize>,
    /// The number of workers.
    pub workers: usize,
    pub(crate) watchdog: Arc<Watchdog>,
}

/// The files and sockets of a running gateway, in `/status`. `check` reads them: a socket that this gateway uses is free once
/// it has been replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The configuration file; `None` if it is not a regular file.
    pub file: Option<PathBuf>,
    /// The audit directory.
    pub audit_directory: PathBuf,
    /// The addresses of all its sockets.
    pub sockets: Vec<String>,
}

/// The most open connections. For a further one, the connection that has been idle longest is closed.
// Closing the new one instead would let 64 silent connections fail the probes of an orchestrator, which then restarts the
// gateway.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may take for its head, and once more for reading the answer.
const DEADLINE: Duration = Duration::from_secs(3);

/// The longest answer that [`ask`] reads, in bytes. `/status` names each route and credential, so it may be long.
const MAX_ANSWER: usize = 1 << 20;

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const JSON: &str = "application/json";

/// Sends a GET to the admin listener of a gateway and returns the answer, head and body. Blocks for at most 6 s.
///
/// # Errors
///
/// Fails if there is no complete answer within 3 s after the connection, or if it is longer than 1 MiB: any program may listen at
/// that address.
pub fn ask(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = BlockingStream::connect_timeout(&address, DEADLINE)?;
    let deadline = std::time::Instant::now() + DEADLINE;
    // The one name that every admin listener accepts for every path, `/status` included.
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Set anew for each read: else a server that sends a byte now and then would hold this command for ever.
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece) {
            Ok(0) => return String::from_utf8(answer).map_err(io::Error::other),
            Ok(read) => answer.extend_from_slice(&piece[..read]),
            // The read timed out; the next turn of the loop reports it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if answer.len() > MAX_ANSWER {
            return Err(io::Error::other("the answer has no end"));
        }
    }
}

/// Accepts and answers connections until the runtime ends.
pub async fn serve(listener: TcpListener, admin: Arc<Admin>) {
    let (seats, hosts) = (Seats::new(MAX_CONNECTIONS), Arc::new(AdminHosts::new(&admin.hosts)));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                static FAILED: OncePerSecond = OncePerSecond::new();
                if let Some(times) = FAILED.times() {
                    tracing::warn!(%error, times, "accept failed (admin)");
                }
                // Without file descriptors accept fails at once, again and again, and would occupy the whole thread.
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let seat = seats.take().await;
        tokio::spawn(converse(stream, seat, admin.clone(), hosts.clone()));
        // Lets the new task run first. A probe that sends its request at once is answered before a flood of others takes its
        // seat.
        yield_now().await;
    }
}

/// Answers one request and closes the connection. A client that sends many requests and reads no answer costs as much as one.
async fn converse(stream: TcpStream, seat: Seat, admin: Arc<Admin>, hosts: Arc<AdminHosts>) {
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
    // A simple probe, such as one by netcat, closes its side once it has sent the request, and still expects an answer.
    server.keep_alive(false).half_close(true);
    let connection = server.serve_connection(TokioIo::new(stream), service);
    let deadline = sleep(DEADLINE);
    tokio::pin!(connection, deadline);
    loop {
        tokio::select! {
            _ = &mut connection => return,
            // The answer gets its own time, so that a slow head does not cut it short.
            () = is_asked.notified() => deadline.as_mut().reset(Instant::now() + DEADLINE),
            () = &mut deadline => return,
            () = seat.is_taken() => return,
        }
    }
}

impl Admin {
    /// Answers a request. Waits for nothing, so no part of the gateway that hangs can hold it up.
    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        // HEAD needs no code of its own: hyper leaves out the body of its answer (RFC 9110, section 9.3.2).
        // tests/hyper.rs: hyper_omits_the_body_of_a_response_to_head
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "GET and HEAD only\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            // Whether the event loops turn, and nothing else: a restart would not cure a cloud or a disk that fails.
            "/livez" => match self.watchdog.hangs() {
                None => reply(StatusCode::OK, TEXT, "ok\n"),
                Some(hangs) => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{hangs}\n")),
            },
            "/readyz" => self.ready(),
            "/metrics" => {
                // Gauges of the trail are set when they are read, not with each record.
                self.audit.count();
                let format = Format::asked_by(request.headers());
                let quota = self.state.load().terms.quota.share();
                match self.metrics.render(format, &self.limits, self.idempotency.keys(), quota) {
                    Ok(text) => reply(StatusCode::OK, format.content_type(), text),
                    Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error}\n")),
                }
            }
            "/status" => reply(StatusCode::OK, JSON, format!("{:#}\n", self.status())),
            _ => reply(
                StatusCode::NOT_FOUND,
                TEXT,
                "unknown path; there are /livez, /readyz, /metrics and /status\n",
            ),
        }
    }

    /// Answers `/readyz`: 200 if the gateway can do its work, else 503 with the reasons.
    fn ready(&self) -> Response<Full<Bytes>> {
        let mut reasons: Vec<String> = Vec::new();
        if self.limits.is_stopping() {
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
        // Only before the first token, which shows a wrong credential during a rollout. Later, all replicas would become
        // unready at the same time when the token endpoint fails, and callers would get no answer instead of a 503 that says
        // why.
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

    /// Returns what operators should know, but what does not make the gateway unready.
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

    /// Returns the document of `/status`. It names routes and addresses, so [`AdminHosts`] admits fewer names to it.
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
            "draining": self.limits.is_stopping(),
            "connections": self.limits.connections(),
            "requests_in_flight": self.limits.in_flight(),
            "audit": self.audit.status(),
            "config": self.metrics.changes.status(),
            "clock": {
                "doubtful": self.audit.clock_doubt().map(ClockDoubt::as_str),
                "wall_ahead_seconds": clock::wall_ahead() / 1_000_000_000,
            },
            "upstream": {
                "suspended": state.terms.breaker.is_open(),
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
