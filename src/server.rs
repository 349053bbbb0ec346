//! Listeners, accept loops, and the connections of callers.
//!
//! Each worker is one current-thread runtime that accepts on a socket of its own (TCP, `SO_REUSEPORT`) or on a clone
//! of one socket (Unix, inherited). Guarantees the bounds on connections and the deadlines of each. Does not look at
//! requests: see [`crate::gateway`].

pub mod connection;
mod handshake;
pub mod inherited;
pub mod tls;

use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use rustix::fs::Access;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use thiserror::Error;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::time::{interval, sleep};

use crate::admission::Hosts;
use crate::concurrency::Stranger;
use crate::config;
use crate::config::ListenAddress;
use crate::files::access;
use crate::gateway::Gateway;
use crate::log::OncePerSecond;
use crate::model::peer::Peer;
use crate::supervisor::Vital;
use connection::{AcceptedConnection, CallerStream, Deadlines, stranger};
use inherited::Inherited;
use tls::{ListenerTlsError, Tls};

/// How many connections the kernel holds until they are accepted. std's 128 overflow in a burst: the SYN that is
/// dropped is sent again only after a second.
pub(crate) const BACKLOG: i32 = 4096;

/// A bound listener, with one socket per worker. It does not accept yet.
#[derive(Debug)]
pub struct BoundListener {
    /// Where it listens, with the real port if 0 was configured.
    pub address: ListenAddress,
    hosts: Hosts,
    tls: Option<Arc<Tls>>,
    /// The socket came from systemd and outlives this process.
    pub is_inherited: bool,
    sockets: Vec<Socket>,
}

/// Why there is no listener.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Its TLS files cannot be used.
    #[error(transparent)]
    Tls(#[from] ListenerTlsError),
    /// Its socket cannot be bound or used.
    #[error(transparent)]
    Socket(#[from] io::Error),
}

/// Makes the listener of one worker. Must be called on that worker's runtime, which registers the socket.
pub(crate) type Listen = Box<dyn FnOnce() -> io::Result<Listener> + Send>;

/// The listener of one worker.
#[derive(Debug)]
pub struct Listener {
    hosts: Arc<Hosts>,
    tls: Option<Arc<Tls>>,
    is_inherited: bool,
    socket: Accepting,
}

#[derive(Debug)]
enum Accepting {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl BoundListener {
    /// Reads the TLS files of a listener, and binds its socket for `workers` workers, unless it is inherited. With
    /// `only_v6`, `[::]` takes no IPv4 address.
    ///
    /// # Errors
    ///
    /// Returns a [`ListenError`] if a file cannot be used or the socket cannot be bound.
    pub fn bind(
        listener: &config::Listener,
        inherited: &mut Inherited,
        workers: usize,
        only_v6: bool,
    ) -> Result<Self, ListenError> {
        // Files before sockets: a mistake in one must not leave a socket behind.
        let tls = listener.tls.as_ref().map(Tls::load).transpose()?;
        let hosts = Hosts::new(listener.hosts.clone());
        let inherited = inherited.take(&listener.address);
        let is_inherited = inherited.is_some();
        let (address, sockets) = match (&listener.address, inherited) {
            (address, Some(socket)) => {
                // systemd passes blocking sockets by default. One of them would stop the worker in `accept`.
                socket.set_nonblocking(true)?;
                (address.clone(), shared(&socket, workers)?)
            }
            (ListenAddress::Tcp(address), None) => {
                let sockets = bind_tcp(*address, workers, only_v6)?;
                let real = sockets[0].local_addr()?.as_socket().unwrap_or(*address);
                (ListenAddress::Tcp(real), sockets)
            }
            (ListenAddress::Unix { path, mode }, None) => {
                (listener.address.clone(), bind_unix(path, *mode, workers)?)
            }
        };
        Ok(Self { address, hosts, tls, is_inherited, sockets })
    }

    /// The listener's TLS; `None` if it speaks plain HTTP.
    pub fn tls(&self) -> Option<&Arc<Tls>> {
        self.tls.as_ref()
    }

    /// Splits it into one listener per worker.
    pub(crate) fn split(self) -> Vec<Listen> {
        let hosts = Arc::new(self.hosts);
        let is_unix = matches!(self.address, ListenAddress::Unix { .. });
        self.sockets
            .into_iter()
            .map(|socket| {
                let (hosts, tls, is_inherited) = (hosts.clone(), self.tls.clone(), self.is_inherited);
                let listen: Listen = Box::new(move || {
                    let socket = if is_unix {
                        Accepting::Unix(UnixListener::from_std(socket.into())?)
                    } else {
                        Accepting::Tcp(TcpListener::from_std(socket.into())?)
                    };
                    Ok(Listener { hosts, tls, is_inherited, socket })
                });
                listen
            })
            .collect()
    }
}

/// Binds an address for `workers` workers, one socket each, and listens.
///
/// # Errors
///
/// Fails if the address is in use by another process, or if a socket cannot be made.
pub(crate) fn bind_tcp(address: SocketAddr, workers: usize, only_v6: bool) -> io::Result<Vec<Socket>> {
    // Without `SO_REUSEPORT`, which proves that no other process has the port: with it another gateway of the same
    // user would get a part of our connections. Only then is the port shared among the workers, and it is never free
    // in between.
    let first = bound_tcp(address, only_v6)?;
    // Port 0 is a real port by now, and the other workers need the same.
    let address = first.local_addr()?.as_socket().unwrap_or(address);
    if workers > 1 {
        first.set_reuse_port(true)?;
    }
    let mut sockets = vec![first];
    for _ in 1..workers {
        let socket = tcp_socket(address, only_v6)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        sockets.push(socket);
    }
    // All are bound before the first one listens, so that a start which fails accepts nobody.
    sockets.iter().try_for_each(|socket| socket.listen(BACKLOG))?;
    Ok(sockets)
}

/// A socket that is bound and does not listen. It does not disturb another process that binds the same address
/// meanwhile.
fn bound_tcp(address: SocketAddr, only_v6: bool) -> io::Result<Socket> {
    let socket = tcp_socket(address, only_v6)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn tcp_socket(address: SocketAddr, only_v6: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // Set in either case: the default is a setting of the machine (`net.ipv6.bindv6only`).
        socket.set_only_v6(only_v6)?;
    }
    // Connections of the last process in TIME_WAIT must not stop a restart.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Checks whether an address can be bound. Changes nothing.
pub(crate) fn try_tcp(address: SocketAddr, only_v6: bool) -> io::Result<()> {
    bound_tcp(address, only_v6).map(drop)
}

/// Binds a Unix socket with `mode` for `workers` workers, and listens. Replaces a socket file that no process serves.
///
/// # Errors
///
/// Fails as [`try_unix`] does, and if the socket cannot be made.
pub(crate) fn bind_unix(path: &Path, mode: u32, workers: usize) -> io::Result<Vec<Socket>> {
    try_unix(path)?;
    if path.symlink_metadata().is_ok() {
        // The file of a process that is gone: `bind` would fail with EADDRINUSE.
        fs::remove_file(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // Between `bind` and `listen`, so that no connection is possible before the mode is right, whatever the umask is.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    socket.listen(BACKLOG)?;
    shared(&socket, workers)
}

/// Checks whether a Unix socket can be bound: the directory must be writable, and in its place may be nothing but a
/// socket that no process serves. Changes nothing.
///
/// # Errors
///
/// `AddrInUse` if a process serves it, otherwise what an operator has to repair.
pub(crate) fn try_unix(path: &Path) -> io::Result<()> {
    let address = SockAddr::unix(path)?;
    let fail = |kind, reason: String| Err(io::Error::new(kind, reason));
    match path.symlink_metadata() {
        Ok(found) if found.file_type().is_socket() => {
            // The kernel refuses a datagram socket with EPROTOTYPE where a stream socket is bound, and with
            // ECONNREFUSED where only the file is left. A real connection would start the gateway if systemd holds
            // the socket, and would hang if the queue of a program that accepts nobody is full.
            match Socket::new(Domain::UNIX, Type::DGRAM, None)?.connect(&address) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Ok(()) | Err(_) => return Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        Ok(_) => {
            return fail(
                io::ErrorKind::AlreadyExists,
                "something other than a socket has this path: remove it".into(),
            );
        }
        Err(_) => {}
    }
    // Checked one by one, since `bind` says only EACCES or ENOENT, and not what is wrong with which directory.
    let folder = path.parent().unwrap_or(path);
    let shown = folder.display();
    match fs::metadata(folder) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return fail(io::ErrorKind::NotADirectory, format!("{shown} is not a directory")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return fail(error.kind(), format!("its directory {shown} is missing: make it"));
        }
        Err(error) => return fail(error.kind(), format!("{shown}: {error}")),
    }
    access(folder, Access::WRITE_OK | Access::EXEC_OK)
        .or_else(|error| fail(error.kind(), format!("no socket can be made in {shown}: {error}")))
}

/// Clones one socket for each worker.
fn shared(socket: &Socket, workers: usize) -> io::Result<Vec<Socket>> {
    (0..workers).map(|_| socket.try_clone()).collect()
}

impl Listener {
    /// Accepts one connection. Returns its stream and its peer.
    async fn accept(&self) -> io::Result<(CallerStream, Peer)> {
        match &self.socket {
            Accepting::Tcp(socket) => {
                let (stream, address) = socket.accept().await?;
                // A reply is written at once. Nagle's algorithm would hold back its last part until the caller
                // acknowledges the first.
                stream.set_nodelay(true)?;
                Ok((CallerStream::Tcp(stream), Peer::Tcp(address)))
            }
            Accepting::Unix(socket) => {
                let (stream, _) = socket.accept().await?;
                let peer = stream.peer_cred()?;
                Ok((CallerStream::Unix(stream), Peer::Unix { uid: peer.uid(), gid: peer.gid() }))
            }
        }
    }
}

/// How far a stop has come, for accept loops and connections. The order of the variants is the order in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lifecycle {
    /// No stop has begun.
    Serving,
    /// The grace: inherited sockets are no longer accepted on, since the next process does that. Other listeners go
    /// on.
    Draining,
    /// No connection is accepted any more, and connections end.
    Stopping,
}

/// Runs one worker until the stop: accepts on its listeners, sweeps its pool, then waits until its connections are
/// closed.
///
/// `vital` makes a [`Vital`] for a task of this worker. The wait has no bound: the caller bounds it.
pub(crate) async fn run(
    gateway: Arc<Gateway>,
    listeners: Vec<Listener>,
    deadlines: Deadlines,
    mut stop: watch::Receiver<Lifecycle>,
    vital: impl Fn(&str) -> Vital,
) {
    // Nothing is sent. Each accept loop and connection holds a sender, so the end of the last one ends `recv` below.
    let (alive, mut done) = mpsc::channel::<()>(1);
    for listener in listeners {
        let accepts = accept(gateway.clone(), listener, deadlines, stop.clone(), alive.clone());
        tokio::spawn(vital("the accept loop").run(accepts));
    }
    drop(alive);
    let pool = gateway.pool.clone();
    let sweeps = async move {
        let mut second = interval(Duration::from_secs(1));
        loop {
            second.tick().await;
            pool.sweep();
        }
    };
    tokio::spawn(vital("the sweep of the pool").run(sweeps));
    let _ = stop.wait_for(|stop| *stop == Lifecycle::Stopping).await;
    let _ = done.recv().await;
}

/// Accepts connections until the stop, and serves each in a task of its own.
async fn accept(
    gateway: Arc<Gateway>,
    listener: Listener,
    deadlines: Deadlines,
    mut stop: watch::Receiver<Lifecycle>,
    alive: mpsc::Sender<()>,
) {
    // Two receivers, since each `wait_for` borrows its own.
    let mut stopped = stop.clone();
    loop {
        // `biased`, with the stop after `accept`: connections in the kernel's queue are still accepted and get a
        // reply, since a reset would leave their callers in doubt. On an inherited socket the stop comes first: there
        // they wait for the next process.
        let accepted = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop != Lifecycle::Serving), if listener.is_inherited => return,
            accepted = listener.accept() => accepted,
            _ = stopped.wait_for(|stop| *stop == Lifecycle::Stopping) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                // The place is taken before the next `accept`. One over a bound is closed here, so that strangers
                // cannot use up the file descriptors.
                if let Some((accepted, stranger)) = admit(&gateway, &listener, stream, peer) {
                    let served = connection::serve(gateway.clone(), accepted, deadlines, stop.clone());
                    let alive = alive.clone();
                    tokio::spawn(async move {
                        served.await;
                        drop((stranger, alive));
                    });
                }
            }
            // The peer had closed it in the queue. Nothing is wrong here, so no pause is needed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                // Usually no file descriptors are left. The connection then stays in the queue, so that without a
                // pause this loop would use the whole worker.
                static FAILED: OncePerSecond = OncePerSecond::new();
                if let Some(times) = FAILED.times() {
                    tracing::warn!(%error, times, "accept failed");
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Takes the place of a new connection, and a stranger's if its peer is no known caller. `None`: there is none, and
/// the connection is closed by being dropped.
fn admit(
    gateway: &Gateway,
    listener: &Listener,
    stream: CallerStream,
    peer: Peer,
) -> Option<(AcceptedConnection, Option<Stranger>)> {
    // With certificates the caller is known only after the handshake. `connection::serve` asks for a stranger's place
    // then.
    let asks = listener.tls.as_ref().is_some_and(|tls| tls.asks_for_certificates());
    let stranger = stranger(gateway, asks || gateway.state.load().admission.knows(peer), peer)?;
    let slot = gateway.limits.connection(!asks && stranger.is_none());
    let slot = slot.inspect_err(|_| gateway.metrics.connection_closed("overloaded")).ok()?;
    let (tls, hosts) = (listener.tls.clone(), listener.hosts.clone());
    Some((AcceptedConnection { stream, tls, hosts, peer, slot }, stranger))
}
