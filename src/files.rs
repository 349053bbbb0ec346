//! Reads files that others may replace while the gateway runs: with a pipe that nobody writes to, with a device
//! that never ends, or with something on a dead mount.
//!
//! Only regular files are read, so that no pipe or device can block the reader. A dead mount still can. What is
//! read while the gateway serves is therefore read through [`Aside`], on the blocking pool, and only the task
//! that follows these files waits for it.

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

/// How long a file may take to answer before that is reported.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The largest file that is read, in bytes.
// Configuration, secrets and certificates are far smaller. Without a bound, a file that grows while it is read
// could take all memory.
pub(crate) const MAX_SIZE: u64 = 16 << 20;

/// Reads a regular file of at most [`MAX_SIZE`]. Symbolic links are followed.
///
/// Fails for anything but a regular file, for a larger one, and if it cannot be read. Blocks on file I/O.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    read_if(path, check)
}

/// Reads a file as [`read`] does, and fails if every user can change it. `harm` completes the sentence "so that
/// anybody could …" in the error.
pub(crate) fn read_guarded(path: &Path, harm: &str) -> io::Result<Vec<u8>> {
    read_if(path, |found| {
        check(found)?;
        if !is_open_to_all(found) {
            return Ok(());
        }
        let (mode, path) = (found.mode() & 0o7777, path.display());
        let text =
            format!("every user can change it (mode {mode:04o}), so everyone could {harm}: chmod o-w {path}");
        Err(io::Error::other(text))
    })
}

/// Whether every user can change a file or directory. In a sticky directory users can make files but not remove
/// or rename those of others, so it does not count.
pub(crate) fn is_open_to_all(found: &Metadata) -> bool {
    let is_sticky = found.is_dir() && found.mode() & 0o1000 != 0;
    found.mode() & 0o002 != 0 && !is_sticky
}

/// Fails if this process may not access a file or directory in this way.
// `access(2)` checks the real user and ignores capabilities of any user but root. So `check` refused
// directories that the gateway could use by CAP_DAC_OVERRIDE. `AT_EACCESS` checks what the process can do now.
pub(crate) fn access(path: &Path, access: Access) -> io::Result<()> {
    let by_capabilities = accessat(CWD, path, access, AtFlags::EACCESS);
    // That flag needs faccessat2, new in Linux 5.8. Seccomp filters of older container engines answer it with
    // EPERM.
    let looked = by_capabilities.or_else(|error| match error {
        Errno::PERM => accessat(CWD, path, access, AtFlags::empty()),
        _ => Err(error),
    });
    looked.map_err(io::Error::from)
}

fn read_if(path: &Path, check: impl Fn(&Metadata) -> io::Result<()>) -> io::Result<Vec<u8>> {
    // Checked before it is opened: opening a device may have effects, such as rewinding a tape.
    check(&fs::metadata(path)?)?;
    // A pipe may take its place between the check and the opening: `O_NONBLOCK` keeps that from blocking.
    // `O_NOCTTY`: a terminal does not become the controlling one.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    // Checked again, through the descriptor: another file may have been opened than the one that was checked.
    check(&found)?;
    // The buffer has its final size at once. If it grew, copies of a secret would stay in freed memory. One
    // byte more, since the end of the file is found only by reading beyond it.
    let mut bytes = Vec::with_capacity(usize::try_from(found.len()).unwrap_or_default() + 1);
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SIZE { Err(too_large()) } else { Ok(bytes) }
}

/// Reads a file as [`read`] does, and fails if it is not UTF-8.
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

/// The identity, size and times of a file, to notice a change without reading it.
// Device and inode are part of it: a file that is renamed over another one may have the same size and an older
// time.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stamp(Option<[i64; 7]>);

impl Stamp {
    /// The stamp of what a path leads to, following links. If it cannot be determined, all such stamps are
    /// equal.
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

/// File work did not end within [`PATIENCE`]. It goes on.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a file does not answer within {} s; the gateway keeps waiting for it", PATIENCE.as_secs())]
pub(crate) struct Hangs;

/// Runs file work on the blocking pool, one job at a time. `S` is the state that jobs work on, `T` their
/// result.
// One job, since a dead mount would otherwise take one more thread of the pool with every check.
#[derive(Debug)]
pub(crate) struct Aside<S, T> {
    at: At<S, T>,
    patience: Duration,
}

#[derive(Debug)]
enum At<S, T> {
    Here(S),
    /// A job runs.
    There {
        job: JoinHandle<(S, T)>,
        /// When the job counts as hanging; `None` if that has been reported.
        until: Option<Instant>,
    },
    /// The job panicked or the runtime has ended.
    Nowhere,
}

impl<S: Send + 'static, T: Send + 'static> Aside<S, T> {
    /// Runs jobs on this state.
    pub(crate) fn new(state: S) -> Self {
        Self { at: At::Here(state), patience: PATIENCE }
    }

    /// Runs a job and returns its result. If an earlier job still runs, `work` is dropped, and the result of
    /// that job is waited for and returned.
    ///
    /// Fails with [`Hangs`] once per job, after [`PATIENCE`]. Cancellation safe: a job that has begun goes on,
    /// and the next call waits for it. A panic of the job is resumed here.
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
                    // The job was cancelled, which only the end of the runtime does.
                    Err(_) => std::future::pending().await,
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
    fn only_regular_files_are_read_even_through_a_symlink() {
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

    // The channel stands for a dead mount: the job blocks until the test drops the sender.
    #[tokio::test]
    async fn hanging_file_access_is_reported_once_and_awaited() {
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
