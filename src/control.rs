//! The control socket: requests of operators to a running gateway, and the client that sends them.
//!
//! A Unix socket of mode 0600. A connection carries one line of JSON, a [`Request`], and gets one line, an
//! [`Response`]. Only root and the gateway's own user are served. The length of a line, the number of connections
//! and their time are bounded. A request that was read runs to its end, whether its peer waits or not.
//!
//! A command finds the socket through the audit directory: it is `control.sock` there, or the file `control`
//! contains its path.

use std::fs::{OpenOptions, Permissions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use anyhow::Context as _;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

use crate::audit::Audit;
use crate::audit::resolution::{Finding, ResolveError, Resolved};
use crate::idempotency::Idempotency;
use crate::log::OncePerSecond;
use crate::seats::{Seat, Seats};
use crate::server::bind_unix;
use crate::{config, files, ids};

/// The name of the socket.
const SOCKET: &str = "control.sock";

/// The name of the file in the audit directory that contains the path of a socket elsewhere.
const POINTER: &str = "control";

/// The longest request, in bytes.
const MAX_LINE: u64 = 8 * 1024;

/// The largest number of open connections. A further one replaces the one that has been idle longest, and waits
/// while all are being served.
const MAX_CONNECTIONS: usize = 8;

/// The time within which a request must arrive and its answer must be read. A command waits as long for the
/// connection.
const DEADLINE: Duration = Duration::from_secs(5);

/// How long a command waits for its answer.
// Longer than a commit should take: giving up early leaves the operator without knowing whether it happened.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// The pause after a failed accept.
// Without it, a process at its limit on open files would spin.
const RETRY: Duration = Duration::from_millis(100);

/// A request of an operator.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// Records a resolution: see [`Audit::resolve`].
    Resolve(Finding),
    /// Accepts the wall clock: see [`Audit::accept_clock`].
    AcceptClock,
}

/// The answer to a request. It is sent after everything that it reports is committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// Whether the request has been carried out, now or before.
    pub ok: bool,
    /// The number of the record that was added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// A description for people.
    pub text: String,
}

impl Response {
    /// An answer that the request was not carried out.
    pub fn refused(reason: &(impl ToString + ?Sized)) -> Self {
        Self { ok: false, seq: None, text: reason.to_string() }
    }

    /// The answer to [`Request::Resolve`].
    pub fn of_resolution(finding: &Finding, resolved: Result<Resolved, ResolveError>) -> Self {
        let result = finding.result.as_str();
        match resolved {
            Ok(Resolved::Recorded(seq)) => {
                Self { ok: true, seq: Some(seq), text: format!("resolved as {result} (record {seq})") }
            }
            Ok(Resolved::Before(earlier)) => {
                let text = format!("was resolved as {result} before, by {} at {}", earlier.by, earlier.time);
                Self { ok: true, seq: None, text }
            }
            Err(error) => Self::refused(&error),
        }
    }
}

/// A bound control socket. On drop, its name is removed.
#[derive(Debug)]
pub struct BoundSocket {
    socket: Socket,
    path: PathBuf,
    /// The inode of the socket when it was bound.
    inode: u64,
    /// The file in the audit directory that contains its path.
    pointer: Option<PathBuf>,
}

impl BoundSocket {
    /// Binds the socket of a gateway whose trail is in `directory`; `None` if the configuration turns it off. A
    /// socket that no process serves any more is replaced.
    ///
    /// Fails if the configured socket cannot be bound. A default socket that cannot be bound is only a warning:
    /// the gateway works without it.
    pub fn bind(control: &config::Control, directory: &Path) -> io::Result<Option<Self>> {
        let path = match control {
            config::Control::Off => return Ok(None),
            config::Control::Path(path) => path.clone(),
            config::Control::Default => runtime_directory().unwrap_or_else(|| directory.into()).join(SOCKET),
        };
        match Self::bind_at(&path, directory) {
            Ok(bound) => Ok(Some(bound)),
            Err(error) if matches!(control, config::Control::Default) => {
                tracing::warn!(
                    path = %path.display(), %error,
                    "the control socket cannot be created: set admin.control to a path that can be used"
                );
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn bind_at(path: &Path, directory: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let mut sockets = bind_unix(&path, 0o600, 1)?;
        let socket = sockets.pop().ok_or(io::ErrorKind::Other)?;
        let inode = fs::symlink_metadata(&path)?.ino();
        let mut bound = Self { socket, path, inode, pointer: None };
        bound.pointer = bound.name_in(directory)?;
        Ok(bound)
    }

    /// Writes the path of the socket into the audit directory, unless that is where commands look first.
    fn name_in(&self, directory: &Path) -> io::Result<Option<PathBuf>> {
        let pointer = directory.join(POINTER);
        if self.path == std::path::absolute(directory.join(SOCKET))? {
            return match fs::remove_file(pointer) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(None),
            };
        }
        // Written under another name and renamed, so that a command never reads half a path.
        let unfinished = directory.join(format!("{POINTER}.new"));
        // Commands trust this file, so no other user may change it, whatever the umask. An existing file keeps
        // its mode when it is opened: hence the second call.
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.write_all(self.path.as_os_str().as_encoded_bytes())?;
        fs::rename(unfinished, &pointer)?;
        Ok(Some(pointer))
    }

    /// Serves until its runtime ends.
    pub async fn serve(self, control: Arc<Resources>) {
        let socket = self.socket.try_clone().map(Into::into).and_then(UnixListener::from_std);
        let listener = match socket {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(%error, "the control socket cannot be served"),
        };
        tracing::info!(path = %self.path.display(), "listening (control)");
        let seats = Seats::new(MAX_CONNECTIONS);
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                sleep(RETRY).await;
                continue;
            };
            let seat = seats.take().await;
            let control = control.clone();
            tokio::spawn(async move {
                if let Err(error) = control.converse(stream, &seat).await {
                    tracing::debug!(%error, "a control connection failed");
                }
            });
            // The new task runs first. Otherwise a flood of connections could take the seat of one that has
            // sent its request already.
            yield_now().await;
        }
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        // Another gateway may have bound the same path meanwhile. Its socket has another inode and must stay.
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
        if let Some(pointer) = &self.pointer {
            let _ = fs::remove_file(pointer);
        }
    }
}

/// The first of the directories that systemd made for this process (`RuntimeDirectory=`).
fn runtime_directory() -> Option<PathBuf> {
    let directories = std::env::var_os("RUNTIME_DIRECTORY")?;
    let first = std::env::split_paths(&directories).next()?;
    (!first.as_os_str().is_empty()).then_some(first)
}

/// What the control socket works on.
#[derive(Debug)]
pub struct Resources {
    /// The audit trail, as the background runtime uses it.
    pub audit: Audit,
    /// The audit directory.
    pub directory: PathBuf,
    /// The deduplication that follows a resolution.
    pub idempotency: Arc<Idempotency>,
}

impl Resources {
    async fn converse(&self, stream: UnixStream, seat: &Seat) -> io::Result<()> {
        let uid = stream.peer_cred()?.uid();
        let (read, mut write) = stream.into_split();
        // The mode of the socket is not enough: it can be changed, and in a user namespace every user without a
        // mapping shows the same id.
        let is_own = uid == geteuid().as_raw() && !ids::users().is_nobody(uid);
        let answer = if uid == 0 || is_own {
            let mut line = Vec::new();
            let mut read = tokio::io::BufReader::new(read.take(MAX_LINE));
            in_time(seat, read.read_until(b'\n', &mut line)).await?;
            // From here on the request must not be cut off: its event may be committed before the answer
            // exists.
            seat.works();
            let answer = self.answer(&line, uid).await;
            seat.steps();
            answer
        } else {
            // A user without the right could otherwise fill the log.
            static REFUSED: OncePerSecond = OncePerSecond::new();
            if let Some(times) = REFUSED.times() {
                tracing::warn!(uid, times, "a user without permission connected to the control socket");
            }
            Response::refused("only root and the gateway's own user may use this socket")
        };
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        in_time(seat, write.write_all(&line)).await
    }

    async fn answer(&self, line: &[u8], uid: u32) -> Response {
        if !line.ends_with(b"\n") {
            return Response::refused(&format!("a request is one line of less than {MAX_LINE} bytes"));
        }
        match serde_json::from_slice(line) {
            Err(error) => Response::refused(&format!("not a request: {error}")),
            Ok(Request::Resolve(finding)) => {
                let apply = |call: &_| self.idempotency.resolve(call, finding.result);
                let resolved = self.audit.resolve(&self.directory, &finding, uid, apply).await;
                Response::of_resolution(&finding, resolved)
            }
            Ok(Request::AcceptClock) => {
                let details = Map::from_iter([("uid".to_owned(), json!(uid))]);
                let seq = self.audit.accept_clock(details);
                match self.audit.committed(seq).await {
                    Ok(()) => Response {
                        ok: true,
                        seq: Some(seq),
                        text: format!("accepted: the gateway trusts the wall clock (record {seq})"),
                    },
                    Err(error) => Response::refused(&error),
                }
            }
        }
    }
}

/// Waits for a peer until the deadline, or until another connection takes the seat.
async fn in_time<T>(seat: &Seat, peer: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::select! {
        done = timeout(DEADLINE, peer) => done?,
        () = seat.is_taken() => Err(io::Error::other("another connection took its place")),
    }
}

/// Sends a request to the gateway that writes the trail in `directory`, at `socket` if that is given, and
/// returns its answer. Blocks for up to 30 s.
///
/// Fails if there is no answer. After the request was sent, it may have been carried out all the same.
pub fn ask(directory: &Path, socket: Option<&Path>, request: &Request) -> anyhow::Result<Response> {
    let path = match socket {
        Some(path) => path.to_owned(),
        None => find(directory)?,
    };
    let no_answer = || format!("the control socket {} does not answer", path.display());
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // On Linux this bounds `connect` of a Unix socket, too. It would wait forever while the queue of a listener
    // that accepts nobody is full.
    socket.set_write_timeout(Some(DEADLINE))?;
    socket.connect(&SockAddr::unix(&path)?).with_context(no_answer)?;
    let mut stream = BlockingStream::from(OwnedFd::from(socket));
    stream.set_read_timeout(Some(ANSWER_TIME))?;
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).with_context(no_answer)?;
    let mut answer = Vec::new();
    BufReader::new(stream.take(MAX_LINE)).read_until(b'\n', &mut answer).with_context(no_answer)?;
    serde_json::from_slice(&answer).with_context(|| {
        format!("{}; the request may or may not have been carried out: run the command again", no_answer())
    })
}

/// The path of the socket for a trail.
fn find(directory: &Path) -> io::Result<PathBuf> {
    match files::read_text(&directory.join(POINTER)) {
        Ok(path) => Ok(path.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(directory.join(SOCKET)),
        Err(error) => Err(error),
    }
}
