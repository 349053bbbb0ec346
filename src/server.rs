//! Listen, accept, and the life of a caller's connection.
//!
//! One current-thread runtime a worker; each accepts on its own socket (TCP, `SO_REUSEPORT`) or on a clone
//! of the one Unix socket. Guarantees the caps and the deadlines of a connection.

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
use connection::{Accepted, Deadlines, Stream, stranger};
use inherited::Inherited;
use tls::{Tls, TlsError};

/// How many connections the kernel keeps for us until they are accepted.
pub(crate) const BACKLOG: i32 = 4096;

/// A bound listener, one socket per worker.
#[derive(Debug)]
pub struct Bound {
    /// Where it listens, with the real port.
    pub address: ListenAddress,
    hosts: Hosts,
    tls: Option<Arc<Tls>>,
    /// The socket outlives this process.
    pub is_inherited: bool,
    sockets: Vec<Socket>,
}

/// Why there is no listener.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Its files cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Its socket cannot be had.
    #[error(transparent)]
    Socket(#[from] io::Error),
}

/// Makes the listener of one worker. To be called on the worker's runtime.
pub(crate) type Listen = Box<dyn FnOnce() -> io::Result<Listener> + Send>;

/// A listener of one worker.
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

impl Bound {
    /// Reads the files of a listener, and binds it for so many workers, unless its socket is inherited. With `only_v6`, `[::]`
    /// takes no address of IPv4.
    pub fn bind(
        listener: &config::Listener,
        inherited: &mut Inherited,
        workers: usize,
        only_v6: bool,
    ) -> Result<Self, ListenError> {
        let tls = listener.tls.as_ref().map(Tls::load).transpose()?;
        let hosts = Hosts::new(listener.hosts.clone());
        let inherited = inherited.take(&listener.address);
        let is_inherited = inherited.is_some();
        let (address, sockets) = match (&listener.address, inherited) {
            (address, Some(socket)) => {
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

    /// Its TLS, if it has any.
    pub fn tls(&self) -> Option<&Arc<Tls>> {
        self.tls.as_ref()
    }

    /// Hands each worker its listener.
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

/// The first bind is a plain one: it proves that nobody else has the port. Only then is the port shared
/// among the workers. It is never free in between.
pub(crate) fn bind_tcp(address: SocketAddr, workers: usize, only_v6: bool) -> io::Result<Vec<Socket>> {
    let first = bound_tcp(address, only_v6)?;
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
    sockets.iter().try_for_each(|socket| socket.listen(BACKLOG))?;
    Ok(sockets)
}

/// A socket that is bound and does not listen. Who binds the same address meanwhile, and listens, is not disturbed.
fn bound_tcp(address: SocketAddr, only_v6: bool) -> io::Result<Socket> {
    let socket = tcp_socket(address, only_v6)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn tcp_socket(address: SocketAddr, only_v6: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(only_v6)?; // whatever the machine's default is
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Looks whether an address could be bound, and leaves everything as it is.
pub(crate) fn try_tcp(address: SocketAddr, only_v6: bool) -> io::Result<()> {
    bound_tcp(address, only_v6).map(drop)
}

/// Binds a Unix socket for so many workers. One that nobody serves any more is replaced.
pub(crate) fn bind_unix(path: &Path, mode: u32, workers: usize) -> io::Result<Vec<Socket>> {
    try_unix(path)?;
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path)?; // left behind by a process that is gone
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::unix(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    socket.listen(BACKLOG)?;
    shared(&socket, workers)
}

/// Looks whether a Unix socket could be bound: in a directory where files can be made, and in the place of nothing but a socket
/// that nobody serves.
pub(crate) fn try_unix(path: &Path) -> io::Result<()> {
    let address = SockAddr::unix(path)?;
    let fail = |kind, reason: String| Err(io::Error::new(kind, reason));
    match path.symlink_metadata() {
        Ok(found) if found.file_type().is_socket() => {
            // Of a kind that is never accepted, so that nobody is woken by it, as systemd would be, and a full queue holds nobody.
            match Socket::new(Domain::UNIX, Type::DGRAM, None)?.connect(&address) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Ok(()) | Err(_) => return Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        Ok(_) => {
            return fail(
                io::ErrorKind::AlreadyExists,
                "something else than a socket is there: remove it".into(),
            );
        }
        Err(_) => {}
    }
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

/// One socket for all workers.
fn shared(socket: &Socket, workers: usize) -> io::Result<Vec<Socket>> {
    (0..workers).map(|_| socket.try_clone()).collect()
}

impl Listener {
    async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match &self.socket {
            Accepting::Tcp(socket) => {
                let (stream, address) = socket.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Stream::Tcp(stream), Peer::Tcp(address)))
            }
            Accepting::Unix(socket) => {
                let (stream, _) = socket.accept().await?;
                let peer = stream.peer_cred()?;
                Ok((Stream::Unix(stream), Peer::Unix { uid: peer.uid(), gid: peer.gid() }))
            }
        }
    }
}

/// How far a stop has come, for who accepts and for who is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// It has not begun.
    No,
    /// Inherited sockets are left to who comes next; on others it goes on.
    Begins,
    /// Nobody is accepted any more, and connections end.
    Now,
}

/// Runs one worker until the stop: accepts on all its listeners, then waits until its connections are done.
/// `vital` makes a [`Vital`] for a task of this worker.
pub(crate) async fn run(
    gateway: Arc<Gateway>,
    listeners: Vec<Listener>,
    deadlines: Deadlines,
    mut stop: watch::Receiver<Stop>,
    vital: impl Fn(&str) -> Vital,
) {
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
    let _ = stop.wait_for(|stop| *stop == Stop::Now).await;
    let _ = done.recv().await;
}

async fn accept(
    gateway: Arc<Gateway>,
    listener: Listener,
    deadlines: Deadlines,
    mut stop: watch::Receiver<Stop>,
    alive: mpsc::Sender<()>,
) {
    let mut stopped = stop.clone();
    loop {
        // On a stop, who is connected already is still accepted, and told: a reset would leave it in doubt. Who waits
        // in an inherited socket waits on.
        let accepted = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop != Stop::No), if listener.is_inherited => return,
            accepted = listener.accept() => accepted,
            _ = stopped.wait_for(|stop| *stop == Stop::Now) => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                // Who is over a bound is closed before the next one is accepted, so that strangers use up no files.
                if let Some((accepted, stranger)) = place(&gateway, &listener, stream, peer) {
                    let served = connection::serve(gateway.clone(), accepted, deadlines, stop.clone());
                    let alive = alive.clone();
                    tokio::spawn(async move {
                        served.await;
                        drop((stranger, alive));
                    });
                }
            }
            // A connection that was gone before it was accepted is no reason to pause; no file
            // descriptors left is one.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                static FAILED: OncePerSecond = OncePerSecond::new();
                if let Some(times) = FAILED.times() {
                    tracing::warn!(%error, times, "accept failed");
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Gives a connection its place. `None`: there is none, and it is closed.
fn place(
    gateway: &Gateway,
    listener: &Listener,
    stream: Stream,
    peer: Peer,
) -> Option<(Accepted, Option<Stranger>)> {
    // Who is to show a certificate is known later.
    let asks = listener.tls.as_ref().is_some_and(|tls| tls.asks_for_certificates());
    let stranger = stranger(gateway, asks || gateway.state.load().admission.knows(peer), peer)?;
    let place = gateway.bounds.connection(!asks && stranger.is_none());
    let place = place.inspect_err(|_| gateway.metrics.connection_closed("overloaded")).ok()?;
    let (tls, hosts) = (listener.tls.clone(), listener.hosts.clone());
    Some((Accepted { stream, tls, hosts, peer, place }, stranger))
}
