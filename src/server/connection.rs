//! One caller's connection: hyper's HTTP/1.1, under deadlines of ours.
//!
//! Settles whether a caller got the answer that tells of a success: see [`DeliverySlot`].
//!
//! hyper's `header_read_timeout` is also its keep-alive idle time-out, so it is not used: a small state
//! shared by the socket, the service and the timer tells a head that is slow from a connection that idles.

use std::{
    convert::Infallible,
    error::Error as _,
    future::{Future, poll_fn},
    io,
    os::fd::AsFd,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{HeaderName, HeaderValue, Request};
use hyper::{
    body::{Body, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::RecvFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::watch,
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;

use crate::{
    admission::Hosts,
    clock::{self, nanos_of},
    concurrency::{FREE, Part, Place},
    config,
    disconnect::CallerPresence,
    gateway::{Gateway, RequestOrigin},
    idempotency::DeliverySlot,
    model::peer::Peer,
    server::{
        Stop,
        handshake::shake_hands,
        tls::{Certificate, Tls},
    },
};

/// How long and how much a closing connection is read on, so that the caller receives the last answer.
pub(super) const LINGER_TIME: Duration = Duration::from_secs(1);
pub(super) const LINGER_BYTES: usize = 256 * 1024;

/// How long a connection that its caller had closed before the answer is watched for a reset, and how often. Whoever has
/// closed both sides resets it when the answer arrives (RFC 9293 §3.10.7.4); whoever closed its sending side only, reads it.
const RESET_TIME: Duration = Duration::from_millis(250);
const RESET_LOOK: Duration = Duration::from_millis(2);

/// A reset within this time of an answer is a reply to it, in nanoseconds.
const RESET_BEHIND: u64 = 1_000_000_000;

/// Who closes its side of the connection within this time of its request has nothing more to say, in
/// nanoseconds.
const HALF_CLOSE: u64 = 200_000_000;

/// A head has no longer than this once the gateway stops, or on a connection over the cap, in nanoseconds.
pub(super) const STOP_HEADER: u64 = 1_000_000_000;

/// Why a connection ends for which there is no room among what is unfinished.
const NO_ROOM: &str = "too_many_unfinished";

/// What the last answer of a connection says.
const CLOSE: HeaderValue = HeaderValue::from_static("close");

/// The deadlines of a connection, in nanoseconds, and how large a head may be.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    header: u64,
    idle: u64,
    /// hyper answers a larger one with 431.
    max_head: usize,
}

impl Deadlines {
    /// From the configuration.
    pub fn new(server: &config::Server) -> Self {
        let (header, idle) = (nanos_of(server.header_timeout), nanos_of(server.idle_timeout));
        Self { header, idle, max_head: server.max_head }
    }
}

/// A caller's socket.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// Unix.
    Unix(UnixStream),
}

/// What a connection is doing.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    /// Waits for a request, or writes the last answer.
    Idle,
    /// Reads a head.
    Head,
    /// Works on a request.
    Busy,
}

/// The phase and since when, in nanoseconds of this process.
#[derive(Debug)]
struct Watch {
    phase: AtomicU8,
    since: AtomicU64,
    /// The caller may still be sending what nobody reads.
    unread: AtomicBool,
    /// What there is of a head, and while a request is worked on, of what its caller has sent behind it.
    head: Part,
    /// There was no room for the last piece of it.
    has_no_room: AtomicBool,
    /// So much of a body is still to come, at least.
    missing: AtomicUsize,
    presence: CallerPresence,
    /// The success that the last answer told of, until it is known whether the caller got it.
    delivery: DeliverySlot,
}

impl Watch {
    fn new(head: Part) -> Self {
        let watch = Self {
            phase: AtomicU8::new(0),
            since: AtomicU64::new(0),
            unread: AtomicBool::new(false),
            head,
            has_no_room: AtomicBool::new(false),
            missing: AtomicUsize::new(0),
            presence: CallerPresence::default(),
            delivery: DeliverySlot::default(),
        };
        watch.enter(Phase::Head); // a new connection has as long for its first head as a begun one
        watch
    }

    /// A head came whole. What was read with it may hold the body, and what the caller sends behind that; a head is taken for as
    /// short as it can be written.
    fn head_came(&self, request: &Request<Incoming>) {
        self.enter(Phase::Busy);
        let held = self.head.held();
        let read = if held > FREE { held.saturating_sub(least_length(request)) } else { held };
        // Of a chunked body all that is read may lie behind its end.
        let body = request
            .body()
            .size_hint()
            .exact()
            .map_or(0, |length| usize::try_from(length).unwrap_or(usize::MAX));
        self.missing.store(body.saturating_sub(read), Ordering::Relaxed);
        self.head.hold(if held > FREE { read.saturating_sub(body) } else { 0 });
    }

    /// So many bytes came while a request is worked on: its body, and what the caller sends behind that. hyper reads only when
    /// it has passed on what it read before, and no more behind the end of the body.
    fn more_came(&self, bytes: usize) {
        let missing = self.missing.load(Ordering::Relaxed);
        self.missing.store(missing.saturating_sub(bytes), Ordering::Relaxed);
        if !self.head.hold(bytes.saturating_sub(missing)) {
            self.has_no_room.store(true, Ordering::Relaxed);
        }
    }

    /// Whether what the caller has sent behind its request finds no room: the connection ends behind the answer.
    fn must_end(&self) -> bool {
        self.has_no_room.load(Ordering::Relaxed)
    }

    fn enter(&self, phase: Phase) {
        self.since.store(clock::nanos(), Ordering::Relaxed);
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The caller has the last answer, or sends on.
    fn was_delivered(&self) {
        if let Some(mut delivery) = self.delivery.take() {
            delivery.hand_over();
        }
    }

    /// The connection was reset. Right behind an answer that means that nobody was there to take it; later it does not.
    fn was_reset(&self) {
        if clock::nanos() < self.since.load(Ordering::Relaxed) + RESET_BEHIND {
            self.was_not_delivered();
        }
    }

    /// The caller did not get the last answer.
    fn was_not_delivered(&self) {
        if let Some(delivery) = self.delivery.take() {
            delivery.fail();
        }
    }

    fn is(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Relaxed) == phase as u8
    }

    /// When the present phase is over; a busy request has deadlines of its own.
    fn deadline(&self, deadlines: Deadlines) -> u64 {
        let since = self.since.load(Ordering::Relaxed);
        if self.is(Phase::Busy) {
            u64::MAX
        } else if self.is(Phase::Head) {
            since + deadlines.header
        } else {
            since + deadlines.idle
        }
    }

    /// The caller's side has ended while its request waits: has the caller left?
    fn is_gone(&self, end: End) -> bool {
        match end {
            End::Closed => {
                let since = self.since.load(Ordering::Relaxed);
                self.presence.closed(clock::nanos() < since + HALF_CLOSE)
            }
            End::Reset => {
                self.presence.reset();
                true
            }
        }
    }

    /// Whether the present phase has lasted too long. To be asked behind the connection, which moves the
    /// phases: the timer is touched only when a deadline came nearer than it, or when it fires, so that a
    /// request that is served within one poll costs none of that.
    fn is_overdue(&self, alarm: &mut Alarm, deadlines: Deadlines, cx: &mut Context<'_>) -> bool {
        let deadline = self.deadline(deadlines);
        if deadline >= alarm.due && !alarm.sleep.is_elapsed() {
            return false;
        }
        if alarm.sleep.is_elapsed() {
            clock::refresh(); // the timer does not wait for a long turn's end
            if deadline <= clock::nanos() {
                return true;
            }
        }
        let is_busy = deadline == u64::MAX;
        let gone_off = alarm.set(if is_busy { clock::nanos() + deadlines.header } else { deadline }, cx);
        if gone_off && is_busy {
            cx.waker().wake_by_ref(); // a busy request is never overdue here; look again
        }
        gone_off && !is_busy
    }

    /// What to call the end of the present phase.
    fn reason(&self) -> &'static str {
        if self.is(Phase::Head) { "header_timeout" } else { "idle_timeout" }
    }
}

/// A timer that was polled by its connection's task, so that it wakes it.
struct Alarm {
    sleep: Pin<Box<Sleep>>,
    /// In nanoseconds of this process.
    due: u64,
}

impl Alarm {
    fn new() -> Self {
        Self { sleep: Box::pin(sleep(Duration::ZERO)), due: u64::MAX }
    }

    /// Sets it; whether it has gone off already.
    fn set(&mut self, due: u64, cx: &mut Context<'_>) -> bool {
        self.due = due;
        self.sleep.as_mut().reset(clock::instant(due));
        self.sleep.as_mut().poll(cx).is_ready()
    }
}

/// Serves a connection to its end.
pub async fn serve(
    gateway: Arc<Gateway>,
    hosts: Arc<Hosts>,
    (stream, tls): (Stream, Option<Arc<Tls>>),
    peer: Peer,
    place: Place,
    mut deadlines: Deadlines,
    mut stop: watch::Receiver<Stop>,
) {
    let surplus = place.surplus;
    if surplus {
        deadlines.header = deadlines.header.min(STOP_HEADER);
    }
    let (stream, certificate) = match (stream, tls) {
        (Stream::Tcp(stream), Some(tls)) => {
            let unproven = tls.asks_for_certificates().then(|| gateway.bounds.unproven(peer));
            let shaken = shake_hands(&tls, stream, deadlines.header, stop.clone(), unproven);
            match Box::pin(shaken).await {
                Ok((stream, certificate)) => (Stream::Tls(stream), certificate),
                Err(error) => {
                    return error.tell(peer, &gateway.metrics);
                }
            }
        }
        (stream, _) => (stream, None),
    };
    let names = certificate.as_ref().map(Certificate::names);
    let _stranger = if names.is_none_or(|names| gateway.state.load().admission.knows_name(names)) {
        None
    } else if let Some(stranger) = gateway.bounds.stranger(peer) {
        Some(stranger)
    } else {
        gateway.metrics.connection_closed("too_many_strangers");
        return;
    };
    let watch = Arc::new(Watch::new(gateway.bounds.unfinished()));
    let socket = Watched { stream, watch: watch.clone(), linger: None, reset: None };
    let (gateway, hosts, watch, certificate) = (&*gateway, &*hosts, &*watch, certificate.as_ref());
    let service = service_fn(|request| {
        watch.head_came(&request);
        async move {
            let names = certificate.map(Certificate::names);
            let Watch { presence, delivery, .. } = &*watch;
            let from = RequestOrigin { peer, names, hosts, presence, delivery, surplus };
            let mut response = gateway.handle(from, request).await;
            if watch.must_end() {
                gateway.metrics.connection_closed(NO_ROOM);
            }
            let is_last = gateway.bounds.is_stopping() || watch.must_end();
            if is_last {
                response.headers_mut().insert(http::header::CONNECTION, CLOSE);
            }
            watch.unread.store(is_last || response.body().ends_connection(), Ordering::Relaxed);
            watch.enter(Phase::Idle);
            Ok::<_, Infallible>(response)
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            .half_close(true)
            .keep_alive(!surplus)
            .writev(false) // one buffer and send(2) cost less than two and writev(2)
            .max_buf_size(deadlines.max_head)
            .max_header_size(deadlines.max_head) // by itself the bound above lets a head of twice the size pass
            .serve_connection(TokioIo::new(socket), service)
    );
    let mut alarm = Alarm::new();
    let mut stopped = pin!(stop.wait_for(|stop| *stop == Stop::Now));
    let (mut listens, mut stopping) = (false, false);
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
                if let Err(error) = ended {
                    if error.is_parse() {
                        gateway.metrics.connection_closed("head_invalid");
                    } else if ended_for_room(&error) {
                        gateway.metrics.connection_closed(NO_ROOM);
                    }
                    tracing::debug!(%peer, %error, "connection ended");
                }
                return Poll::Ready(());
            }
            // The stop wakes this task once it was asked; before it does, asking again tells nothing.
            let asks = !stopping && (!listens || gateway.bounds.is_stopping());
            listens = true;
            if !asks || stopped.as_mut().poll(cx).is_pending() {
                break;
            }
            // Behind the poll, which has read what is there. Who has sent nothing on a new connection has time to: its
            // answer will be the last one.
            stopping = true;
            deadlines.header = deadlines.header.min(STOP_HEADER);
            if watch.is(Phase::Idle) {
                connection.as_mut().graceful_shutdown();
            }
        }
        if watch.is_overdue(&mut alarm, deadlines, cx) {
            gateway.metrics.connection_closed(watch.reason());
            return Poll::Ready(());
        }
        Poll::Pending
    })
    .await;
}

/// How many bytes a head takes that has no blanks beside its values.
#[cold]
fn least_length(request: &Request<Incoming>) -> usize {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    let line = request.method().as_str().len() + target + "  HTTP/1.1\r\n".len();
    let field =
        |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + ":\r\n".len();
    line + request.headers().iter().map(field).sum::<usize>() + "\r\n".len()
}

/// Whether a connection ended because unfinished heads hold as much as they may.
fn ended_for_room(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::OutOfMemory)
}

/// The socket under hyper: notices when a head begins, and lingers when it closes on unread bytes.
#[derive(Debug)]
struct Watched {
    stream: Stream,
    watch: Arc<Watch>,
    linger: Option<Linger>,
    reset: Option<ResetWatch>,
}

/// Looks for a reset of a connection that its caller had closed before the answer.
#[derive(Debug)]
struct ResetWatch {
    until: Pin<Box<Sleep>>,
    look: Pin<Box<Sleep>>,
}

#[derive(Debug)]
struct Linger {
    until: Pin<Box<Sleep>>,
    left: usize,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // With the last piece the head may have been whole: only one that needs more ends here.
        if self.watch.has_no_room.load(Ordering::Relaxed) && self.watch.is(Phase::Head) {
            return Poll::Ready(Err(io::ErrorKind::OutOfMemory.into()));
        }
        let before = buf.filled().len();
        let read = ready!(self.stream.poll_read(cx, buf));
        // The end of a TLS stream without close_notify is an error, too, and no reset.
        if read.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::UnexpectedEof) {
            self.watch.was_reset();
        }
        read?;
        if buf.filled().len() > before && self.watch.is(Phase::Idle) {
            self.watch.was_delivered();
            self.watch.enter(Phase::Head);
        }
        let more = buf.filled().len() - before;
        if self.watch.is(Phase::Busy) {
            self.watch.more_came(more);
        } else if !self.watch.head.grow(more) {
            self.watch.has_no_room.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        };
        self.went_on(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = match &mut self.stream {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        };
        self.went_on(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// hyper does not read while a request is worked on, but it flushes whenever it was woken.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.watch.presence.is_in_question()
            && let Poll::Ready(end) = self.stream.poll_end(cx)
            && self.watch.is_gone(end)
        {
            cx.waker().wake_by_ref();
        }
        match &mut self.stream {
            Stream::Tcp(_) | Stream::Unix(_) => Poll::Ready(Ok(())), // no buffer of their own
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.linger.is_none() {
            if self.reset.is_none() {
                ready!(self.stream.poll_shutdown(cx)).inspect_err(|_| self.watch.was_reset())?;
            }
            ready!(self.poll_reset(cx));
            if !self.watch.unread.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
            self.linger = Some(Linger { until: Box::pin(sleep(LINGER_TIME)), left: LINGER_BYTES });
        }
        self.poll_linger(cx)
    }
}

/// How much can be read, without reading it.
fn peek(socket: impl AsFd) -> io::Result<usize> {
    let mut byte = [0_u8; 1];
    let (_, bytes) = rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
    Ok(bytes)
}

impl Watched {
    /// A long answer is written piece by piece; a caller that takes the pieces does not idle.
    fn went_on(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Err(_))) {
            self.watch.was_not_delivered();
        }
        if written.is_ready() && self.watch.is(Phase::Idle) {
            self.watch.enter(Phase::Idle);
        }
        written
    }

    /// Settles whether a caller that had closed its side before the answer got it.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_open = self.watch.presence.has_ended() && self.watch.delivery.is_full();
        if !is_open {
            return Poll::Ready(());
        }
        let reset = self.reset.get_or_insert_with(|| ResetWatch {
            until: Box::pin(sleep(RESET_TIME)),
            look: Box::pin(sleep(RESET_LOOK)),
        });
        loop {
            if self.stream.is_reset() {
                self.watch.was_not_delivered();
                return Poll::Ready(());
            }
            if reset.until.as_mut().poll(cx).is_ready() {
                self.watch.was_delivered();
                return Poll::Ready(());
            }
            ready!(reset.look.as_mut().poll(cx));
            reset.look.as_mut().reset(clock::now() + RESET_LOOK);
        }
    }

    /// A socket that is closed with unread bytes sends a reset, and a reset may overtake the answer: so the
    /// rest is read and thrown away, within bounds.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, linger: Some(linger), .. } = self else { return Poll::Ready(Ok(())) };
        while linger.left > 0 && linger.until.as_mut().poll(cx).is_pending() {
            let mut scratch = [0; 4096];
            let mut buf = ReadBuf::new(&mut scratch);
            match ready!(stream.poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {
                    linger.left = linger.left.saturating_sub(buf.filled().len());
                }
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// How the other side of a connection has ended.
#[derive(Clone, Copy, Debug)]
enum End {
    /// It sends no more.
    Closed,
    /// It is gone.
    Reset,
}

impl Stream {
    /// Whether the other side has reset the connection.
    fn is_reset(&self) -> bool {
        let error = match self {
            Self::Tcp(stream) => stream.take_error(),
            Self::Tls(stream) => stream.get_ref().0.take_error(),
            Self::Unix(stream) => stream.take_error(),
        };
        !matches!(error, Ok(None))
    }

    /// Ready when the other side has closed or reset the connection; not when it has more to say.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            let peeked = match self {
                Self::Tls(stream) => return poll_tls_end(stream, cx),
                Self::Tcp(stream) => {
                    let _ = ready!(stream.poll_read_ready(cx));
                    stream.try_io(Interest::READABLE, || peek(&*stream))
                }
                Self::Unix(stream) => {
                    let _ = ready!(stream.poll_read_ready(cx));
                    stream.try_io(Interest::READABLE, || peek(&*stream))
                }
            };
            match peeked {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Poll::Ready(End::Reset),
                Ok(0) => return Poll::Ready(End::Closed),
                Ok(_) => return Poll::Pending,
            }
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// The end of a TLS stream is told within it, so that it cannot be peeked at: what comes is decrypted, and kept where
/// it will be read.
fn poll_tls_end(stream: &mut TlsStream<TcpStream>, cx: &mut Context<'_>) -> Poll<End> {
    let (socket, session) = stream.get_mut();
    while session.wants_read() {
        match session.read_tls(&mut Present { socket, cx }) {
            Ok(0) => return Poll::Ready(End::Closed),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
            Err(_) => return Poll::Ready(End::Reset),
        }
        match session.process_new_packets() {
            Ok(state) if state.peer_has_closed() => return Poll::Ready(End::Closed),
            Ok(_) => {}
            Err(_) => return Poll::Ready(End::Reset),
        }
    }
    Poll::Pending
}

/// What a socket has at present.
struct Present<'a, 'b> {
    socket: &'a mut TcpStream,
    cx: &'a mut Context<'b>,
}

impl io::Read for Present<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut buf = ReadBuf::new(buf);
        match Pin::new(&mut *self.socket).poll_read(self.cx, &mut buf) {
            Poll::Ready(read) => read.map(|()| buf.filled().len()),
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}
