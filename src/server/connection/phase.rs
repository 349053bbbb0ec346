//! What a connection is doing, and since when: shared by its socket, its requests and its timer.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::task::Context;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Request};
use hyper::body::{Body as _, Incoming};
use tokio::time::{Sleep, sleep};

use super::Deadlines;
use super::stream::End;
use crate::clock;
use crate::concurrency::{FREE, Part};
use crate::disconnect::CallerPresence;
use crate::idempotency::DeliverySlot;

/// A reset within this time of an answer is a reply to it, in nanoseconds.
const RESET_BEHIND: u64 = 1_000_000_000;

/// Who closes its side of the connection within this time of its request has nothing more to say, in
/// nanoseconds.
const HALF_CLOSE: u64 = 200_000_000;

/// What a connection is doing.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Waits for a request, or writes the last answer.
    Idle,
    /// Reads a head.
    Head,
    /// Works on a request.
    Busy,
}

/// The phase and since when, in nanoseconds of this process.
#[derive(Debug)]
pub(super) struct Watch {
    phase: AtomicU8,
    since: AtomicU64,
    /// The caller may still be sending what nobody reads.
    pub(super) unread: AtomicBool,
    /// What there is of a head, and while a request is worked on, of what its caller has sent behind it.
    pub(super) head: Part,
    /// There was no room for the last piece of it.
    pub(super) has_no_room: AtomicBool,
    /// So much of a body is still to come, at least.
    missing: AtomicUsize,
    pub(super) presence: CallerPresence,
    /// The success that the last answer told of, until it is known whether the caller got it.
    pub(super) delivery: DeliverySlot,
}

impl Watch {
    pub(super) fn new(head: Part) -> Self {
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
    pub(super) fn head_came(&self, request: &Request<Incoming>) {
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
    // tests/hyper.rs: hyper_reads_on_only_when_it_has_passed_on_what_it_read
    // tests/hyper.rs: hyper_reads_no_more_behind_the_end_of_a_body
    pub(super) fn more_came(&self, bytes: usize) {
        let missing = self.missing.load(Ordering::Relaxed);
        self.missing.store(missing.saturating_sub(bytes), Ordering::Relaxed);
        if !self.head.hold(bytes.saturating_sub(missing)) {
            self.has_no_room.store(true, Ordering::Relaxed);
        }
    }

    /// Whether what the caller has sent behind its request finds no room: the connection ends behind the answer.
    pub(super) fn must_end(&self) -> bool {
        self.has_no_room.load(Ordering::Relaxed)
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.since.store(clock::nanos(), Ordering::Relaxed);
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The caller has the last answer, or sends on.
    pub(super) fn was_delivered(&self) {
        if let Some(mut delivery) = self.delivery.take() {
            delivery.hand_over();
        }
    }

    /// The connection was reset. Right behind an answer that means that nobody was there to take it; later it does not.
    pub(super) fn was_reset(&self) {
        if clock::nanos() < self.since.load(Ordering::Relaxed) + RESET_BEHIND {
            self.was_not_delivered();
        }
    }

    /// The caller did not get the last answer.
    pub(super) fn was_not_delivered(&self) {
        if let Some(delivery) = self.delivery.take() {
            delivery.fail();
        }
    }

    pub(super) fn is(&self, phase: Phase) -> bool {
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
    pub(super) fn is_gone(&self, end: End) -> bool {
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
    pub(super) fn is_overdue(&self, alarm: &mut Alarm, deadlines: Deadlines, cx: &mut Context<'_>) -> bool {
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
    pub(super) fn reason(&self) -> &'static str {
        if self.is(Phase::Head) { "header_timeout" } else { "idle_timeout" }
    }
}

/// A timer that was polled by its connection's task, so that it wakes it.
pub(super) struct Alarm {
    sleep: Pin<Box<Sleep>>,
    /// In nanoseconds of this process.
    due: u64,
}

impl Alarm {
    pub(super) fn new() -> Self {
        Self { sleep: Box::pin(sleep(Duration::ZERO)), due: u64::MAX }
    }

    /// Sets it; whether it has gone off already.
    fn set(&mut self, due: u64, cx: &mut Context<'_>) -> bool {
        self.due = due;
        self.sleep.as_mut().reset(clock::instant(due));
        self.sleep.as_mut().poll(cx).is_ready()
    }
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
