//! Log lines on their way to stderr.
//!
//! stderr may be a pipe that nobody reads. Nobody who logs waits for it: lines go into a queue that is bounded in bytes, and
//! a thread of its own writes them out. A line that finds no room is dropped and counted, and so is one that cannot be written.
//! The last quarter of the queue is kept for what an operator must not miss (calls of unknown outcome, the trail, configuration,
//! tokens), so that no flood of other lines displaces it.

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

/// So many bytes wait at most.
const CAPACITY: usize = 1 << 20;

/// So many of them may be ordinary lines.
const ORDINARY: usize = CAPACITY / 4 * 3;

/// A longer line is cut, in bytes.
const MAX_LINE: usize = 8 << 10;

/// What ends a line that was cut.
const CUT: &[u8] = b" (cut)\n";

/// So many bytes are written at once. A pipe that can be written to takes them whole.
const PIECE: usize = 4096;

/// At the end of the process a reader that takes nothing for so long is not waited for.
const STALLED: Duration = Duration::from_millis(50);

/// No reader is waited for any longer than that.
const PATIENCE: Duration = Duration::from_secs(1);

/// Modules of this crate whose lines have the last quarter of the queue for themselves, from level INFO on.
const KEPT: [&str; 7] = ["app", "audit", "cli", "control", "idempotency", "reload", "token"];

static QUEUE: Queue = Queue::new();

/// Where the lines of all threads wait.
struct Queue {
    state: Mutex<State>,
    /// There is something to write.
    filled: Condvar,
    /// Something was written.
    moved: Condvar,
    dropped: AtomicU64,
    has_ended: AtomicBool,
}

struct State {
    bytes: VecDeque<u8>,
    is_started: bool,
    /// The thread holds bytes that are not written yet.
    is_writing: bool,
    /// How many pieces were written.
    written: u64,
}

/// Starts the thread that writes lines to stderr. Fails if there can be no thread.
pub fn start() -> io::Result<()> {
    let mut state = QUEUE.lock();
    if !state.is_started {
        state.bytes.reserve_exact(CAPACITY); // so that it never has room for more
        thread::Builder::new().name("log".into()).spawn(|| {
            let _ended = Ending;
            QUEUE.write_all_to(&mut io::stderr());
        })?;
        state.is_started = true;
    }
    Ok(())
}

/// The thread ends.
struct Ending;

impl Drop for Ending {
    fn drop(&mut self) {
        QUEUE.has_ended.store(true, Ordering::Relaxed);
    }
}

/// Queues lines that no log event is made of. Without the thread of [`start`] they are written at once.
pub fn say(text: &str) {
    if QUEUE.lock().is_started {
        text.lines().for_each(|line| QUEUE.push(format!("{line}\n").as_bytes(), CAPACITY));
    } else {
        let _ = writeln!(io::stderr(), "{text}");
    }
}

/// Waits until all lines are written, for a second at most, or for as long as the reader takes something every 50 ms. To be
/// called before the process ends.
pub fn flush() {
    QUEUE.flush();
}

/// Whether the thread has ended, which only a panic does: then nothing is written any more.
pub(crate) fn has_ended() -> bool {
    QUEUE.has_ended.load(Ordering::Relaxed)
}

/// How many lines were dropped so far, or could not be written.
pub fn dropped() -> u64 {
    QUEUE.dropped.load(Ordering::Relaxed)
}

/// Makes the queue the writer of a [`mod@tracing_subscriber::fmt`] layer.
#[derive(Clone, Copy, Debug)]
pub struct ToQueue;

/// Queues one log event.
#[derive(Debug)]
pub struct EventWriter {
    /// How full the queue may be with it, in bytes.
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
    /// A whole event is written at once.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(&in_one_line(line), self.up_to);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An event as one line without characters that a terminal takes for something else: in the text format a value may hold line
/// breaks. Colours stay.
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

    /// Takes a line, if the queue then holds no more than `up_to` bytes.
    fn push(&self, line: &[u8], up_to: usize) {
        let (line, end) = match line.len() > MAX_LINE {
            true => (&line[..char_boundary(line, MAX_LINE - CUT.len())], CUT),
            false => (line, &b""[..]),
        };
        let mut state = self.lock();
        if state.bytes.len() + line.len() + end.len() > up_to {
            drop(state);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let was_empty = state.bytes.is_empty();
        state.bytes.extend(line);
        state.bytes.extend(end);
        drop(state);
        if was_empty {
            self.filled.notify_one();
        }
    }

    /// Writes what comes, for ever.
    fn write_all_to(&self, stderr: &mut impl Write) {
        let (mut piece, mut told, mut cut) = (Vec::with_capacity(PIECE), 0, false);
        loop {
            fault::look("the log");
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
            // The end of a line whose begin was lost counts no more.
            let is_same = cut && !piece[..piece.len() - lost.len()].contains(&b'\n');
            let lines =
                lost.split_inclusive(|byte| *byte == b'\n').count() - usize::from(is_same && !is_written);
            self.dropped.fetch_add(lines as u64, Ordering::Relaxed);
            cut = lost.last().is_some_and(|last| *last != b'\n');
            let is_empty = self.lock().bytes.is_empty();
            // Once the reader has caught up, and not for each line that it missed.
            let dropped = self.dropped.load(Ordering::Relaxed);
            if is_written && is_empty && dropped > told {
                tracing::warn!(
                    lines = dropped - told,
                    "log lines are missing: nobody read them in time, or they could not be written"
                );
                told = dropped;
            }
            // Only now, so that a flush waits for that line, too.
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
            // On a busy machine it may be the thread that did not get its turn.
            if waited.timed_out() && state.written == before && !takes_more() {
                return;
            }
        }
    }
}

/// Whether stderr takes more at once. A pipe does while a page of it is free.
fn takes_more() -> bool {
    let mut stderr = [PollFd::from_borrowed_fd(rustix::stdio::stderr(), PollFlags::OUT)];
    let ready = retry_on_intr(|| poll(&mut stderr, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })));
    ready.is_ok_and(|ready| ready > 0)
}

/// Writes all of it, though stderr may be one that does not block: it shares that with whoever else has it. Returns how many
/// bytes were written before an error.
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

/// The last place up to `end` where no character is cut.
fn char_boundary(text: &[u8], end: usize) -> usize {
    (end.saturating_sub(3)..=end).rev().find(|place| text[*place] & 0xC0 != 0x80).unwrap_or(end)
}

/// A line that can come with every call or connection: it is let through once a second.
#[derive(Debug, Default)]
pub struct OncePerSecond(Mutex<Repeated>);

#[derive(Debug, Default)]
struct Repeated {
    last: Option<Instant>,
    times: u64,
}

impl OncePerSecond {
    /// For a `static`.
    pub const fn new() -> Self {
        Self(Mutex::new(Repeated { last: None, times: 0 }))
    }

    /// Whether the line is to be written now: returns how often it would have been since the last one, this time included.
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
    fn event_is_one_line_whatever_its_values_hold() {
        let forged = "error=broken\nERROR all is lost\r\u{202e}x\u{9b}1m \u{1b}[2mdim\u{1b}[0m é\n";
        let event = String::from_utf8(in_one_line(forged.as_bytes()).into_owned()).unwrap();
        let wanted = "error=broken\\nERROR all is lost\\u000d\\u202ex\\u009b1m \u{1b}[2mdim\u{1b}[0m é\n";
        assert_eq!(event, wanted);
        let plain = b"\x1b[32m INFO\x1b[0m ready\n";
        assert!(matches!(in_one_line(plain), Cow::Borrowed(same) if same == plain), "the control");
    }

    #[test]
    fn line_that_is_too_long_is_cut_between_characters() {
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
    fn ordinary_lines_leave_a_quarter_and_nothing_exceeds_the_bound() {
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

    #[test]
    fn line_that_repeats_comes_once_a_second_with_the_number_of_times() {
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
