//! Files that others may replace while the gateway runs: with a pipe that nobody writes to, a device that never ends, or what lies
//! on a mount that is dead.
//!
//! Only regular files are read, so that no pipe or device holds the reader. A dead mount does: what is read while the gateway
//! serves is read on a thread of its own, and nobody waits for that but who follows these files.

use std::fs::{Metadata, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::panic::resume_unwind;
use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use rustix::fs::{Access, AtFlags, CWD, OFlags, accessat};
use rustix::io::Errno;
use thiserror::Error;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout_at};

/// A file that does not answer for so long is told of.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// So large may a file be that is read whole.
pub(crate) const MAX_SIZE: u64 = 16 << 20;

/// Reads a regular file of at most [`MAX_SIZE`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_if(path, check)
}

/// The same, but a file that every user can change is refused. `harm` is what anybody could do with it otherwise.
pub(crate) fn read_guarded(path: &Path, harm: &str) -> io::Result<Vec<u8>> {
    read_if(path, |found| {
        check(found)?;
        if !is_open_to_all(found) {
            return Ok(());
        }
        let (mode, path) = (found.mode() & 0o7777, path.display());
        let text = format!(
            "every user can change it (mode {mode:04o}), so that anybody could {harm}: chmod o-w {path}"
        );
        Err(io::Error::other(text))
    })
}

/// Whether every user can change it. In a sticky directory they can make files, but touch nobody else's.
pub(crate) fn is_open_to_all(found: &Metadata) -> bool {
    let is_sticky = found.is_dir() && found.mode() & 0o1000 != 0;
    found.mode() & 0o002 != 0 && !is_sticky
}

/// Fails where this process cannot do that with a file or folder. Its capabilities count, which `access(2)` passes over for any user
/// but root.
pub(crate) fn access(path: &Path, access: Access) -> io::Result<()> {
    let by_capabilities = accessat(CWD, path, access, AtFlags::EACCESS);
    // A container of old may forbid that call, which is of Linux 5.8.
    let looked = by_capabilities.or_else(|error| match error {
        Errno::PERM => accessat(CWD, path, access, AtFlags::empty()),
        _ => Err(error),
    });
    looked.map_err(io::Error::from)
}

fn read_if(path: &Path, check: impl Fn(&Metadata) -> io::Result<()>) -> io::Result<Vec<u8>> {
    check(&fs::metadata(path)?)?; // a device may do something when it is opened
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    check(&found)?; // another one may have been opened than was looked at
    // Whole at once: where it grows, a secret would leave copies behind.
    let mut bytes = Vec::with_capacity(usize::try_from(found.len()).unwrap_or_default() + 1);
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SIZE { Err(too_large()) } else { Ok(bytes) }
}

/// The same, of text.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|_| io::Error::other("is not UTF-8"))
}

fn check(found: &Metadata) -> io::Result<()> {
    match found.len() {
        _ if found.is_dir() => Err(io::Error::other("is not a regular file, but a directory")),
        _ if !found.is_file() => Err(io::Error::other("is not a regular file")),
        length if length > MAX_SIZE => Err(too_large()),
        _ => Ok(()),
    }
}

fn too_large() -> io::Error {
    io::Error::other("is larger than 16 MiB")
}

/// Tells a file from what it was before, without reading it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stamp(Option<[i64; 7]>);

impl Stamp {
    /// Of what a path leads to.
    pub(crate) fn of(path: &Path) -> Self {
        let stamp = |found: Metadata| {
            [
                found.dev().cast_signed(),
                found.ino().cast_signed(),
                found.size().cast_signed(),
                found.mtime(),
                found.mtime_nsec(),
                found.ctime(),
                found.ctime_nsec(),
            ]
        };
        Self(fs::metadata(path).ok().map(stamp))
    }
}

/// What is read does not answer.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a file does not answer within {} s; it is waited for", PATIENCE.as_secs())]
pub(crate) struct Hangs;

/// What works with files, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Aside<S, T> {
    at: At<S, T>,
    patience: Duration,
}

#[derive(Debug)]
enum At<S, T> {
    Here(S),
    There {
        job: JoinHandle<(S, T)>,
        /// `None`: it was told that it hangs.
        until: Option<Instant>,
    },
    /// It ended by a panic.
    Nowhere,
}

impl<S: Send + 'static, T: Send + 'static> Aside<S, T> {
    pub(crate) fn new(state: S) -> Self {
        Self { at: At::Here(state), patience: PATIENCE }
    }

    /// Works, unless earlier work still goes on: then waits for that, and returns what came of it. Says once that work hangs. Can
    /// be cancelled; the work goes on.
    #[expect(clippy::disallowed_methods, reason = "on the background runtime, where no request waits")]
    pub(crate) async fn run(&mut self, work: impl FnOnce(&mut S) -> T + Send + 'static) -> Result<T, Hangs> {
        self.at = match std::mem::replace(&mut self.at, At::Nowhere) {
            At::Here(mut state) => {
                let job = spawn_blocking(move || {
                    let done = work(&mut state);
                    (state, done)
                });
                At::There { job, until: Some(Instant::now() + self.patience) }
            }
            at => at,
        };
        let At::There { job, until } = &mut self.at else { return std::future::pending().await };
        let done = match *until {
            Some(end) => match timeout_at(end, &mut *job).await {
                Ok(done) => done,
                Err(_) => {
                    *until = None;
                    return Err(Hangs);
                }
            },
            None => job.await,
        };
        match done {
            Ok((state, done)) => {
                self.at = At::Here(state);
                Ok(done)
            }
            Err(error) => {
                self.at = At::Nowhere;
                match error.try_into_panic() {
                    Ok(panic) => resume_unwind(panic),
                    Err(_) => std::future::pending().await, // the runtime ends
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn only_regular_files_are_read_also_by_a_link() {
        let folder = tempfile::TempDir::new().unwrap();
        let place = |name: &str| folder.path().join(name);
        let pipe = place("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        symlink(&pipe, place("link")).unwrap();
        for path in [&pipe, &place("link"), Path::new("/dev/zero"), Path::new("/dev/null"), folder.path()] {
            let error = read(path).unwrap_err().to_string();
            assert!(error.contains("is not a regular file"), "{}: {error}", path.display());
        }
        fs::File::create(place("sparse")).unwrap().set_len(MAX_SIZE + 1).unwrap();
        assert!(read(&place("sparse")).unwrap_err().to_string().contains("larger"));
        fs::write(place("good"), "text").unwrap();
        symlink("good", place("to-good")).unwrap();
        assert_eq!(read_text(&place("to-good")).unwrap(), "text", "the control");
    }

    #[tokio::test]
    async fn work_that_hangs_is_told_once_and_waited_for() {
        let mut aside = Aside::new(1);
        aside.patience = Duration::from_millis(20);
        let (go, wait) = mpsc::channel::<()>();
        let work = move |state: &mut i32| {
            let _ = wait.recv();
            *state += 1;
            *state
        };
        assert_eq!(aside.run(work).await, Err(Hangs));
        let again = aside.run(|_| unreachable!("the first one goes on"));
        assert!(tokio::time::timeout(Duration::from_millis(50), again).await.is_err(), "it is told once");
        drop(go);
        assert_eq!(aside.run(|_| unreachable!("the first one goes on")).await, Ok(2));
        assert_eq!(aside.run(|state| *state).await, Ok(2), "the control");
    }
}
