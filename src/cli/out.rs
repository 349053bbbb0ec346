//! The output of commands to stdout and stderr.
//!
//! Output that cannot be written never stops a command and never panics. A reader that has disconnected is no error; any other
//! failure is one line on stderr and, at the end, the exit code.
//!
//! The output may hold texts of others: of the upstream, of callers, file names, arguments. None of them can move the cursor,
//! hide a part or begin a line of its own: all output is escaped by [`plain`].

use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};
use std::{fmt, io};

use ccsqm_gateway::{log, plain};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr, write};
use rustix::stdio::stdout;

/// Prints a line to stdout. Replaces `println!`, which panics if it cannot write.
macro_rules! out {
    ($($text:tt)*) => { $crate::cli::out::line(format_args!($($text)*)) };
}

/// Prints a line to stderr. Replaces `eprintln!`, which panics if it cannot write.
macro_rules! complain {
    ($($text:tt)*) => { $crate::cli::out::complain_line(format_args!($($text)*)) };
}

pub(super) use {complain, out};

/// Everything was written so far.
const GOOD: u8 = 0;

/// The reader has disconnected (`EPIPE`), as in `check | head`.
const UNREAD: u8 = 1;

/// A write failed in another way, such as on a full disk.
const FAILED: u8 = 2;

// For the whole process: what is behind a part that was lost must not be printed, as if it were all.
static STATE: AtomicU8 = AtomicU8::new(GOOD);

/// Prints a text as one line; line breaks in it are escaped.
pub(super) fn line(text: fmt::Arguments<'_>) {
    print(plain::line(&text.to_string()));
}

/// Prints a text with its line breaks. Only for texts whose line breaks are this program's own.
pub(super) fn lines(text: &str) {
    print(plain::lines(text));
}

/// Prints a text to stderr as one line; line breaks in it are escaped.
pub(super) fn complain_line(text: fmt::Arguments<'_>) {
    log::say(&plain::line(&text.to_string()));
}

/// Prints a text to stderr with its line breaks. Only for texts whose line breaks are this program's own.
pub(super) fn complain_lines(text: &str) {
    log::say(&plain::lines(text));
}

/// Prints an escaped text, unless an earlier one could not be printed.
fn print(mut text: String) {
    if STATE.load(Ordering::Relaxed) != GOOD {
        return;
    }
    text.push('\n');
    match write_all(text.as_bytes()) {
        Ok(()) => {}
        Err(Errno::PIPE) => STATE.store(UNREAD, Ordering::Relaxed),
        Err(error) => {
            STATE.store(FAILED, Ordering::Relaxed);
            log::say(&format!("ccsqm-gateway: the output cannot be written: {}", io::Error::from(error)));
        }
    }
}

/// Returns the exit code of the process for that of the command: a success whose output was lost is a failure.
pub(super) fn exit_code(code: ExitCode) -> ExitCode {
    let is_lost = STATE.load(Ordering::Relaxed) == FAILED;
    if is_lost && code == ExitCode::SUCCESS { ExitCode::FAILURE } else { code }
}

/// Writes the whole text to stdout.
// `O_NONBLOCK` belongs to the open file, which other processes share: any of them can set it, and then a write to a full pipe
// fails with `EAGAIN`. The standard library takes that for an error.
fn write_all(mut text: &[u8]) -> Result<(), Errno> {
    while !text.is_empty() {
        match retry_on_intr(|| write(stdout(), text)) {
            // Never for a text that is not empty, but the loop would not end.
            Ok(0) => return Err(Errno::IO),
            Ok(length) => text = &text[length..],
            Err(Errno::AGAIN) => {
                let stdout = PollFd::from_borrowed_fd(stdout(), PollFlags::OUT);
                retry_on_intr(|| poll(&mut [stdout.clone()], None))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
