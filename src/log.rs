//! A bounded, lossy queue of log lines, and the thread that writes them to stderr.
//!
//! stderr may be a pipe that nobody reads, so no thread that logs waits for it. Lines go into a queue that is
//! bounded in bytes. A line that does not fit is dropped and counted, and so is one that cannot be written
//! (load shedding). The last quarter of the queue is reserved for lines that an operator must not miss: calls
//! of unknown outcome, the trail, configuration, tokens. A flood of other lines cannot displace these.
//!
//! This module promises no delivery: the audit trail is the durable record, not the log.

pub mod requests;

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{io, thread};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use crate::plain;
use crate::supervisor::fault;

/// The size of the queue, in bytes.
const CAPACITY: usize = 1 << 20;

/// The part of the queue that ordinary lines may use, in bytes.
const ORDINARY: usize = CAPACITY / 4 * 3;

/// The longest line, in bytes. A longer one is cut.
const MAX_LINE: usize = 8 << 10;

/// The end of a line that was cut.
const CUT: &[u8] = b" (cut)\n";

/// How many bytes are written at once.
// PIPE_BUF: a pipe that is ready for writing takes that many bytes without blocking (pipe(7)).
const PIECE: usize = 4096;

/// At the end of the process: how long a reader may take nothing before it is given up.
const STALLED: Duration = Duration::from_millis(50);

/// At the end of the process: how long the reader is waited for in all.
const PATIENCE: Duration = Duration::from_secs(1);

/// The modules of this crate whose lines may use the whole queue, from level INFO up.
const KEPT: [&str; 7] = ["app", "audit", "cli", "control", "idempotency", "reload", "token"];

static QUEUE: Queue = Queue::new();

/// The queue of all threads.
struct Queue {
    state: Mutex<State>,
    /// Signalled when the empty queue gets a line.
    filled: Condvar,
    /// Signalled after each piece that was written.
    moved: Condvar,
    dropped: AtomicU64,
    has_ended: AtomicBool,
}

struct State {
    bytes: VecDeque<u8>,
    is_started: bool,
    /// Whether the thread has taken bytes that are not written yet.
    is_writing: bool,
    /// How many pieces have been written.
    written: u64,
}

/// Starts the thread that writes lines to stderr; does nothing if it runs already. Until then, log events are
/// queued and not written.
///
/// Fails if the thread cannot be created.
pub fn start() -> io::Result<()> {
    let mut state = QUEUE.lock();
    if !state.is_started {
        // Allocated once, so that the queue never takes more memory than its bound: a `VecDeque` that grows
        // doubles its capacity.
        state.bytes.reserve_exact(CAPACITY);
        thread::Builder::new().name("log".into()).spawn(|| {
            let _ended = EndMark;
            QUEUE.write_all_to(&mut io::stderr());
        })?;
        state.is_started = true;
    }
    Ok(())
}

/// Notes the end of the thread on drop, also by a panic.
struct EndMark;

impl Drop for EndMark {
    fn drop(&mut self) {
        QUEUE.has_ended.store(true, Ordering::Relaxed);
    }
}

/// Queues text that is not a log event, one line each. Without the thread of [`start`] it is written at once,
/// and blocks if nobody reads stderr.
pub fn say(text: &str) {
    if QUEUE.lock().is_started {
        text.lines().for_each(|line| QUEUE.push(format!("{line}\n").as_bytes(), CAPACITY));
    } else {
        let _ = writeln!(io::stderr(), "{text}");
    }
}

/// Waits until all queued lines are written, but at most a second, and only while the reader takes something
/// every 50 ms. Call it before the process ends. It blocks; do not call it on an event loop.
pub fn flush() {
    QUEUE.flush();
}

/// Whether the thread has ended. Only a panic ends it, and nothing is written afterwards.
pub(crate) fn has_ended() -> bool {
    QUEUE.has_ended.load(Ordering::Relaxed)
}

/// How many lines have been dropped or could not be written since the process began.
pub fn dropped() -> u64 {
    QUEUE.dropped.load(Ordering::Relaxed)
}

/// A [`MakeWriter`] for a [`mod@tracing_subscriber::fmt`] layer that writes into the queue.
#[derive(Clone, Copy, Debug)]
pub struct ToQueue;

/// Queues one log event.
#[derive(Debug)]
pub struct EventWriter {
    /// The part of the queue that this event may use, in bytes.
    up_to: usize,
}

impl<'a> MakeWriter<'a> for ToQueue {
    type Writer = EventWriter;

    fn make_writer(&'a self) -> EventWriter {
        EventWriter { up_to: ORDINARY }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> EventWriter {
        EventWriter { up_to: if is_kept(event) { CAPACITY } else { ORDINARY } }
    }
}

fn is_kept(event: &Metadata<'_>) -> bool {
    let mut path = event.target().split("::");
    let is_ours = path.next() == Some(env!("CARGO_CRATE_NAME"));
    *event.level() <= Level::INFO && is_ours && path.next().is_some_and(|module| KEPT.contains(&module))
}

impl Write for EventWriter {
    /// Queues one event; the layer passes a whole event in one call. Never fails, since a line that does not
    /// fit is dropped.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(&in_one_line(line), self.up_to);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns an event as one line, with control characters and line breaks escaped. Colours stay.
// Values come from other systems, such as error texts. A line break in one would forge a line of the gateway's
// own, and an escape sequence could change the terminal.
fn in_one_line(event: &[u8]) -> Cow<'_, [u8]> {
    let body = event.strip_suffix(b"\n").unwrap_or(event);
    let is_plain = |byte: &u8| matches!(byte, b' '..=b'~' | 0x1B);
    match str::from_utf8(body) {
        Ok(text) if !body.iter().all(is_plain) => (plain::colored(text) + "\n").into_bytes().into(),
        _ => event.into(),
    }
}

impl Queue {
    const fn new() -> Self {
        let state = State { bytes: VecDeque::new(), is_started: false, is_writing: false, written: 0 };
        let (filled, moved) = (Condvar::new(), Condvar::new());
        let (dropped, has_ended) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { state: Mutex::new(state), filled, moved, dropped, has_ended }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a line unless the queue would then hold more than `up_to` bytes.
    fn push(&self, line: &[u8], up_to: usize) {
        let (line, end) = match line.len() > MAX_LINE {
            true => (&line[..char_boundary(line, MAX_LINE - CUT.len())], CUT),
            false => (line, &b""[..]),
        };
        let mut state = self.lock();
        if state.bytes.len() + line.len() + end.len() > up_to {
            // The counter is updated without the lock: at this moment many threads may want it.
            drop(state);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let was_empty = state.bytes.is_empty();
        state.bytes.extend(line);
        state.bytes.extend(end);
        drop(state);
        // The thread sleeps only while the queue is empty, so other lines need no wake-up.
        if was_empty {
            self.filled.notify_one();
        }
    }

    /// Writes lines forever.
    fn write_all_to(&self, stderr: &mut impl Write) {
        let (mut piece, mut reported, mut cut) = (Vec::with_capacity(PIECE), 0, false);
        loop {
            fault::check("the log");
            let mut state = self.lock();
            while state.bytes.is_empty() {
                state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let length = state.bytes.len().min(PIECE);
            piece.clear();
            piece.extend(state.bytes.drain(..length));
            state.is_writing = true;
            drop(state);

            let lost = &piece[write(stderr, &piece)..];
            let is_written = lost.is_empty();
            // A piece may end within a line. The rest of a line that was counted as lost before must not be
            // counted again.
            let is_same = cut && !piece[..piece.len() - lost.len()].contains(&b'\n');
            let lines =
                lost.split_inclusive(|byte| *byte == b'\n').count() - usize::from(is_same && !is_written);
            self.dropped.fetch_add(lines as u64, Ordering::Relaxed);
            cut = lost.last().is_some_and(|last| *last != b'\n');
            let is_empty = self.lock().bytes.is_empty();
            // Reported once the reader has caught up: a warning for each missing line would fill the queue that
            // is too full already.
            let dropped = self.dropped.load(Ordering::Relaxed);
            if is_written && is_empty && dropped > reported {
                tracing::warn!(
                    lines = dropped - reported,
                    "log lines were dropped: stderr was not read in time, or could not be written"
                );
                reported = dropped;
            }
            // Only after the warning is queued does the piece count as written, so that a flush waits for the
            // warning, too.
            let mut state = self.lock();
            (state.is_writing, state.written) = (false, state.written + 1);
            drop(state);
            self.moved.notify_all();
        }
    }

    fn flush(&self) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while state.is_started && (state.is_writing || !state.bytes.is_empty()) && Instant::now() < end {
            let before = state.written;
            let (next, waited) =
                self.moved.wait_timeout(state, STALLED).unwrap_or_else(PoisonError::into_inner);
            state = next;
            // On a busy machine the thread may not have run for 50 ms. A flush that gave up then lost the last
            // line of commands that fail. So it gives up only if stderr takes nothing.
            if waited.timed_out() && state.written == before && !takes_more() {
                return;
            }
        }
    }
}

/// Whether stderr can be written to without blocking.
fn takes_more() -> bool {
    let mut stderr = [PollFd::from_borrowed_fd(rustix::stdio::stderr(), PollFlags::OUT)];
    let ready = retry_on_intr(|| poll(&mut stderr, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })));
    ready.is_ok_and(|ready| ready > 0)
}

/// Writes all of a piece and returns how many bytes were written before an error.
// stderr may be non-blocking without the gateway having asked for it: the flag belongs to the open file and is
// shared with every process that has it (fcntl(2)).
fn write(stderr: &mut impl Write, piece: &[u8]) -> usize {
    let mut written = 0;
    while written < piece.len() {
        match stderr.write(&piece[written..]) {
            Ok(0) => break,
            Ok(length) => written += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let stderr = PollFd::from_borrowed_fd(rustix::stdio::stderr(), PollFlags::OUT);
                if retry_on_intr(|| poll(&mut [stderr.clone()], None)).is_err() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    written
}

/// The last position up to `end` that is not within a UTF-8 character.
fn char_boundary(text: &[u8], end: usize) -> usize {
    (end.saturating_sub(3)..=end).rev().find(|at| text[*at] & 0xC0 != 0x80).unwrap_or(end)
}

/// Rate limit for a log line that any call or connection can cause: once a second, with a count.
#[derive(Debug, Default)]
pub struct OncePerSecond(Mutex<Repeated>);

#[derive(Debug, Default)]
struct Repeated {
    last: Option<Instant>,
    times: u64,
}

impl OncePerSecond {
    /// A limiter that lets the first line pass; for a `static`.
    pub const fn new() -> Self {
        Self(Mutex::new(Repeated { last: None, times: 0 }))
    }

    /// Returns how many times the line was due since it was last written, this time included, if it may be
    /// written now; `None` if it may not.
    pub fn times(&self) -> Option<u64> {
        let mut repeated = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        repeated.times += 1;
        if repeated.last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            return None;
        }
        repeated.last = Some(Instant::now());
        Some(std::mem::take(&mut repeated.times))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(queue: &Queue) -> String {
        String::from_utf8(queue.lock().bytes.iter().copied().collect()).unwrap()
    }

    #[test]
    fn log_event_stays_on_one_line_with_any_values() {
        let forged = "error=broken\nERROR all is lost\r\u{202e}x\u{9b}1m \u{1b}[2mdim\u{1b}[0m é\n";
        let event = String::from_utf8(in_one_line(forged.as_bytes()).into_owned()).unwrap();
        let wanted = "error=broken\\nERROR all is lost\\u000d\\u202ex\\u009b1m \u{1b}[2mdim\u{1b}[0m é\n";
        assert_eq!(event, wanted);
        let plain = b"\x1b[32m INFO\x1b[0m ready\n";
        assert!(matches!(in_one_line(plain), Cow::Borrowed(same) if same == plain), "the control");
    }

    // The three beginnings put the cut at each of the three positions within a character of three bytes.
    #[test]
    fn overlong_log_line_is_truncated_between_characters() {
        for begin in ["", "x", "xx"] {
            let line = |length| format!("{begin}{}\n", "€".repeat((length - begin.len()) / 3));
            let (queue, short) = (Queue::new(), line(MAX_LINE - 1));
            queue.push(short.as_bytes(), CAPACITY);
            assert_eq!(text(&queue), short);
            let queue = Queue::new();
            queue.push(line(2 * MAX_LINE).as_bytes(), CAPACITY);
            let cut = text(&queue);
            assert!(
                cut.ends_with("€ (cut)\n") && (MAX_LINE - 2..=MAX_LINE).contains(&cut.len()),
                "{}",
                cut.len()
            );
        }
    }

    #[test]
    fn ordinary_lines_leave_a_quarter_of_the_log_queue_free() {
        let (queue, line) = (Queue::new(), "x".repeat(1000));
        queue.lock().bytes.reserve_exact(CAPACITY);
        for (up_to, lines) in [(ORDINARY, ORDINARY / 1000), (CAPACITY, CAPACITY / 1000)] {
            let before = queue.dropped.load(Ordering::Relaxed);
            (0..2000).for_each(|_| queue.push(line.as_bytes(), up_to));
            assert_eq!(queue.lock().bytes.len(), lines * 1000);
            assert!(queue.dropped.load(Ordering::Relaxed) > before);
        }
        assert!(queue.lock().bytes.capacity() <= CAPACITY);
    }

    // The only test here with real time: the limiter measures seconds by `Instant`.
    #[test]
    fn repeated_line_is_logged_once_a_second_with_its_count() {
        let line = OncePerSecond::new();
        assert_eq!(line.times(), Some(1));
        let began = Instant::now();
        let mut asked = 0;
        let times = loop {
            asked += 1;
            if let Some(times) = line.times() {
                break times;
            }
            thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(times, asked);
        assert!(asked > 1 && began.elapsed() > Duration::from_millis(900), "{:?}", began.elapsed());
    }
}
