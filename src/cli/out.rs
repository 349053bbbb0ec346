//! What commands print. Whatever becomes of it, a command does its work, and nothing panics: a reader that left is no error,
//! and of anything else one line on stderr tells.
//!
//! What is printed may hold texts of others: of the upstream, of callers, of file names, of arguments. None of them moves the cursor,
//! hides a part or begins a line of its own: see [`plain`].

use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};
use std::{fmt, io};

use ccsqm_gateway::{log, plain};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, retry_on_intr, write};
use rustix::stdio::stdout;

/// Prints a line. In the place of `println!`, which panics.
macro_rules! out {
    ($($text:tt)*) => { $crate::cli::out::line(format_args!($($text)*)) };
}

/// Prints a line to stderr. In the place of `eprintln!`, which panics.
macro_rules! complain {
    ($($text:tt)*) => { $crate::cli::out::complain_line(format_args!($($text)*)) };
}

pub(super) use {complain, out};

/// All was written so far.
const GOOD: u8 = 0;

/// Nobody reads any more.
const UNREAD: u8 = 1;

/// It cannot be written.
const FAILED: u8 = 2;

static STATE: AtomicU8 = AtomicU8::new(GOOD);

/// Prints one line, whatever is in it.
pub(super) fn line(text: fmt::Arguments<'_>) {
    print(plain::line(&text.to_string()));
}

/// Prints a text whose line breaks are this program's own.
pub(super) fn lines(text: &str) {
    print(plain::lines(text));
}

/// Prints one line to stderr, whatever is in it.
pub(super) fn complain_line(text: fmt::Arguments<'_>) {
    log::say(&plain::line(&text.to_string()));
}

/// Prints a text to stderr whose line breaks are this program's own.
pub(super) fn complain_lines(text: &str) {
    log::say(&plain::lines(text));
}

/// Prints a text, unless an earlier one could not be printed.
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

/// The exit code of a command that ends with this one: output that is lost is no success.
pub(super) fn exit_code(code: ExitCode) -> ExitCode {
    let is_lost = STATE.load(Ordering::Relaxed) == FAILED;
    if is_lost && code == ExitCode::SUCCESS { ExitCode::FAILURE } else { code }
}

/// Writes all of it, though stdout may be one that does not block: it shares that with whoever else has it.
fn write_all(mut text: &[u8]) -> Result<(), Errno> {
    while !text.is_empty() {
        match retry_on_intr(|| write(stdout(), text)) {
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
