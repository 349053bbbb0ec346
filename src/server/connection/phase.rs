//! The phase of a connection and its deadline, shared by the socket, the requests and the timer of the connection.
//!
//! Atomics instead of a lock: all of them are used by one task only, but hyper's futures must be `Send`.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::task::Context;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Request};
use hyper::body::{Body as _, Incoming};
use tokio::time::{Sleep, sleep};

use super::Deadlines;
use super::stream::PeerEnd;
use crate::clock;
use crate::concurrency::{FREE, Part};
use crate::disconnect::CallerPresence;
use crate::idempotency::PendingDelivery;

/// A reset within this time after a reply means that the reply was not received: it is how a socket that was closed
/// before answers data (RFC 9293 §3.10.7.4). A later one ends an idle connection. In nanoseconds.
const RESET_BEHIND: u64 = 1_000_000_000;

/// A caller that closes its sending side within this time after its request has nothing more to say; one that does so
/// later has given up. In nanoseconds.
const HALF_CLOSE: u64 = 200_000_000;

/// What a connection is doing.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// It waits for a request, or writes the last reply.
    Idle,
    /// It reads a head.
    Head,
    /// A request is in flight.
    Busy,
}

/// The state of one connection: its phase, what it holds of the budget of unfinished bytes, and whether its caller is
/// there.
#[derive(Debug)]
pub(super) struct ConnectionPhase {
    /// A [`Phase`].
    phase: AtomicU8,
    /// When the phase began, in nanoseconds of [`clock::nanos`]; while a reply is written, when its last part went
    /// out.
    since: AtomicU64,
    /// The caller may still be sending, and nobody will read it.
    pub(super) unread: AtomicBool,
    /// The bytes of an unfinished head; while a request is in flight, those that its caller has sent after it.
    pub(super) head: Part,
    /// There was no room in the budget for the last piece of `head`.
    pub(super) has_no_room: AtomicBool,
    /// How many bytes of the request's body are still to come, at least.
    missing: AtomicUsize,
    pub(super) presence: CallerPresence,
    /// The success that the last reply reported, until it is known whether the caller received it.
    pub(super) delivery: PendingDelivery,
}

impl ConnectionPhase {
    /// The state of a new connection.
    pub(super) fn new(head: Part) -> Self {
        let new = Self {
            phase: AtomicU8::new(0),
            since: AtomicU64::new(0),
            unread: AtomicBool::new(false),
            head,
            has_no_room: AtomicBool::new(false),
            missing: AtomicUsize::new(0),
            presence: CallerPresence::default(),
            delivery: PendingDelivery::default(),
        };
        // A new connection has as long for its first head as one that has begun it: a silent one must not idle for a
        // minute.
        new.enter(Phase::Head);
        new
    }

    /// Records that a head is whole. What was read with it may also hold the body, and what the caller has sent after
    /// that.
    pub(super) fn head_came(&self, request: &Request<Incoming>) {
        self.enter(Phase::Busy);
        // The length of a head is only known at its least, without blanks around values. Taken for shorter than it
        // is, it leaves more to be counted, which errs to the safe side for memory.
        let held = self.head.held();
        let read = if held > FREE { held.saturating_sub(least_length(request)) } else { held };
        // The end of a chunked body is not known here: all that was read may come after it, so it counts.
        let body = request
            .body()
            .size_hint()
            .exact()
            .map_or(0, |length| usize::try_from(length).unwrap_or(usize::MAX));
        self.missing.store(body.saturating_sub(read), Ordering::Relaxed);
        self.head.hold(if held > FREE { read.saturating_sub(body) } else { 0 });
    }

    /// Records that `bytes` bytes came while a request is in flight: its body, and what the caller sends after it.
    ///
    /// hyper reads only when it has passed on what it read before, and no more after the end of the body. So at most
    /// one read goes beyond the request.
    // tests/hyper.rs: hyper_reads_more_body_only_after_delivering_the_last_part
    // tests/hyper.rs: hyper_reads_nothing_after_the_end_of_a_body
    pub(super) fn more_came(&self, bytes: usize) {
        let missing = self.missing.load(Ordering::Relaxed);
        self.missing.store(missing.saturating_sub(bytes), Ordering::Relaxed);
        if !self.head.hold(bytes.saturating_sub(missing)) {
            self.has_no_room.store(true, Ordering::Relaxed);
        }
    }

    /// Returns whether what the caller has sent after its request finds no room. The connection then ends after the
    /// reply.
    pub(super) fn must_end(&self) -> bool {
        self.has_no_room.load(Ordering::Relaxed)
    }

    /// Begins a phase now. Entering the present phase restarts its deadline.
    pub(super) fn enter(&self, phase: Phase) {
        self.since.store(clock::nanos(), Ordering::Relaxed);
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Settles that the caller received the last reply: it sent on, or did not reset.
    pub(super) fn was_delivered(&self) {
        if let Some(mut delivery) = self.delivery.take() {
            delivery.hand_over();
        }
    }

    /// Records that the connection was reset. Right after a reply this means that the caller did not receive it;
    /// later it does not, since clients close idle connections in this way.
    pub(super) fn was_reset(&self) {
        if clock::nanos() < self.since.load(Ordering::Relaxed) + RESET_BEHIND {
            self.was_not_delivered();
        }
    }

    /// Settles that the caller did not receive the last reply.
    pub(super) fn was_not_delivered(&self) {
        if let Some(delivery) = self.delivery.take() {
            delivery.fail();
        }
    }

    pub(super) fn is(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Relaxed) == phase as u8
    }

    /// When the present phase must be over, in nanoseconds of [`clock::nanos`]; `u64::MAX` while a request is in
    /// flight, which has deadlines of its own.
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

    /// Records that the caller's side has ended while its request waits. Returns whether the caller has disconnected.
    pub(super) fn is_gone(&self, end: PeerEnd) -> bool {
        match end {
            PeerEnd::Closed => {
                // A FIN looks the same from a caller that has nothing more to say and from one that gave up. The time
                // tells them apart: the former sends it with its request.
                let since = self.since.load(Ordering::Relaxed);
                self.presence.closed(clock::nanos() < since + HALF_CLOSE)
            }
            PeerEnd::Reset => {
                self.presence.reset();
                true
            }
        }
    }

    /// Returns whether the present phase has lasted too long. Otherwise sets the timer for its deadline.
    ///
    /// Must be called after the connection was polled, which moves the phases. The timer is touched only when a
    /// deadline is nearer than it, or when it has fired, so that a request which is served within one poll costs
    /// nothing here.
    pub(super) fn is_overdue(
        &self,
        timer: &mut IdleTimer,
        deadlines: Deadlines,
        cx: &mut Context<'_>,
    ) -> bool {
        let deadline = self.deadline(deadlines);
        if deadline >= timer.deadline && !timer.sleep.is_elapsed() {
            return false;
        }
        if timer.sleep.is_elapsed() {
            // The turn may be long, and its reading older than the timer: the phase would then not seem to be over.
            clock::refresh();
            if deadline <= clock::nanos() {
                return true;
            }
        }
        // A busy connection keeps a timer, too. It is on time for the next head without being set at
        // each request.
        let is_busy = deadline == u64::MAX;
        let gone_off = timer.set(if is_busy { clock::nanos() + deadlines.header } else { deadline }, cx);
        if gone_off && is_busy {
            // A request in flight is never overdue here. Polled again, this sets the timer anew.
            cx.waker().wake_by_ref();
        }
        gone_off && !is_busy
    }

    /// The reason by which the end of the present phase is counted.
    pub(super) fn reason(&self) -> &'static str {
        if self.is(Phase::Head) { "header_timeout" } else { "idle_timeout" }
    }
}

/// The timer of a connection. The connection's task polls it, so it wakes that task.
pub(super) struct IdleTimer {
    sleep: Pin<Box<Sleep>>,
    /// When it fires, in nanoseconds of [`clock::nanos`]; `u64::MAX` if it was never set.
    deadline: u64,
}

impl IdleTimer {
    /// A timer that is not set.
    pub(super) fn new() -> Self {
        Self { sleep: Box::pin(sleep(Duration::ZERO)), deadline: u64::MAX }
    }

    /// Sets it. Returns whether it has fired already.
    fn set(&mut self, deadline: u64, cx: &mut Context<'_>) -> bool {
        self.deadline = deadline;
        self.sleep.as_mut().reset(clock::instant(deadline));
        self.sleep.as_mut().poll(cx).is_ready()
    }
}

/// How many bytes a head takes at least: without blanks around the values.
#[cold]
fn least_length(request: &Request<Incoming>) -> usize {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    let line = request.method().as_str().len() + target + "  HTTP/1.1\r\n".len();
    let field =
        |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + ":\r\n".len();
    line + request.headers().iter().map(field).sum::<usize>() + "\r\n".len()
}
