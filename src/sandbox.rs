//! The cloud in one process: `tokenByAkSk` and the CCSQM calls, with their rules and with scripted faults.
//!
//! It decides as the vendor's pages say: who gets a token, whether a token still lives, whether a task is
//! assigned. It records every request byte for byte before it answers, and can misbehave in every way that
//! [`Faults`] describes. It talks raw sockets on a thread and a runtime of its own, so neither a busy nor a
//! stuck gateway in the same process changes its behaviour.
//!
//! It deliberately shares nothing with the gateway: it is a second, independent reading of the same pages,
//! so that a test compares two readings. It keeps no secrets: records hold credentials in clear. It is not a
//! model of the vendor's speed, and not a general HTTP server: HTTP/1.1, one request at a time per
//! connection, bodies by `Content-Length` only (a chunked one is answered 411).
//!
//! Memory is bounded: the newest [`KEPT`] requests and tasks are kept, older ones are forgotten.

mod connection;
mod control;
mod faults;
mod http;
mod journal;
mod rules;
mod tokens;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use socket2::{Domain, Protocol, Socket as RawSocket, Type};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio_rustls::TlsAcceptor;

use crate::files;

use self::faults::Script;
pub use self::faults::{Code, ConnectionFault, Fault, Faults, Framing, Habit, Instead, Then};
use self::journal::Journal;
pub use self::journal::{KEPT, Received, TokenCall};
pub use self::rules::{Inspector, Task};
use self::tokens::Tokens;

/// Path of the token endpoint.
pub const TOKEN_PATH: &str = "/apigovernance/api/oauth/tokenByAkSk";

/// Path of the call that the gateway exists for.
pub const APPOINT_PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask";

/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 4096;

/// Failed TLS handshakes whose text is kept.
const HANDSHAKES_KEPT: usize = 1000;

/// How a sandbox is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen. Port 0 takes a free port.
    pub listen: SocketAddr,
    /// Gives the token endpoint a listener of its own (same address, free port), so that it can be down
    /// while the business calls are up. The first listener then answers 404 to the token path.
    pub token_listener: bool,
    /// The app key that is accepted.
    pub app_key: String,
    /// The app secret that is accepted.
    pub app_secret: String,
    /// TLS on all listeners; plain without it.
    pub tls: Option<Tls>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            token_listener: false,
            app_key: "sandbox-app-key".to_owned(),
            app_secret: "sandbox-app-secret".to_owned(),
            tls: None,
        }
    }
}

/// A server certificate chain and its key, both PEM.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The chain, the server's certificate first.
    pub cert_pem: String,
    /// The private key: PKCS#8, PKCS#1 or SEC1.
    pub key_pem: String,
}

impl Tls {
    /// Reads both from regular files: a pipe in the place of one holds nobody.
    pub fn read(cert: &Path, key: &Path) -> io::Result<Self> {
        let read = |file: &Path| {
            let read = files::read_text(file);
            read.map_err(|error| {
                io::Error::new(error.kind(), format!("can't read {}: {error}", file.display()))
            })
        };
        Ok(Self { cert_pem: read(cert)?, key_pem: read(key)? })
    }
}

/// What is known about the connections of all listeners, control connections included.
#[derive(Clone, Debug, Serialize)]
pub struct Connections {
    /// Accepted so far.
    pub accepted: u64,
    /// Open now.
    pub open: u64,
    /// Bytes of requests received so far, after decryption: 0 means that no client sent any application data.
    /// What comes after a scripted end or during a hang is read but not counted.
    pub application_bytes: u64,
    /// One text per failed TLS handshake, the first 1,000 of them; it names the alert that the client sent.
    pub handshake_failures: Vec<String>,
}

/// A running sandbox. It stops, with all its connections, when this is dropped.
pub struct Sandbox {
    cloud: Arc<Cloud>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Sandbox {
    /// Binds, then serves on a thread of its own. Fails when an address can't be bound or when the
    /// certificate or key is unusable ([`io::ErrorKind::InvalidInput`]).
    pub fn start(options: Options) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let cloud = Arc::new(Cloud::new(options)?);
        let (stop, stopped) = oneshot::channel();
        let serving = Arc::clone(&cloud);
        let thread = thread::Builder::new().name("sandbox".to_owned()).spawn(move || {
            runtime.block_on(async move {
                let doors = connection::accept_all(serving);
                let _ = stopped.await; // an error means that the handle is gone: stop as well
                drop(doors);
            });
        })?;
        Ok(Self { cloud, stop: Some(stop), thread: Some(thread) })
    }

    /// Where business calls and, unless it has a listener of its own, the token endpoint are served.
    pub fn address(&self) -> SocketAddr {
        self.cloud.api.address
    }

    /// The base URL, such as `http://127.0.0.1:18080`, without a path.
    pub fn url(&self) -> String {
        self.cloud.url(&self.cloud.api)
    }

    /// The whole URL of the token endpoint.
    pub fn token_url(&self) -> String {
        let door = self.cloud.token.as_ref().unwrap_or(&self.cloud.api);
        format!("{}{TOKEN_PATH}", self.cloud.url(door))
    }

    /// Every request received outside `/_sandbox/` and the token endpoint, in order of the first byte.
    /// Includes unfinished ones and bytes that were not HTTP.
    pub fn requests(&self) -> Vec<Received> {
        self.cloud.journal().requests()
    }

    /// Every call of the token endpoint, in order of the first byte.
    pub fn token_calls(&self) -> Vec<TokenCall> {
        self.cloud.journal().token_calls()
    }

    /// Every task that was assigned, in order. A call assigns when its rules are met, whatever became of the
    /// reply; a scripted status, body or failure code means that nothing was assigned.
    pub fn tasks(&self) -> Vec<Task> {
        lock(&self.cloud.tasks).iter().cloned().collect()
    }

    /// The state of the connections.
    pub fn connections(&self) -> Connections {
        self.cloud.connections()
    }

    /// Replaces the whole script, counters and token habits included. `Faults::default()` ends all faults.
    /// When this returns, listeners are down or up as the script says. Fails with a sentence when the script
    /// contradicts itself or a listener can't come back; the script that was there then stays.
    pub fn faults(&self, faults: Faults) -> Result<(), String> {
        self.cloud.apply(faults)
    }

    /// Forgets records and tasks and ends all faults. Tokens live on.
    pub fn reset(&self) {
        self.cloud.reset();
    }

    /// From now on only this pair buys tokens. Tokens bought before live on.
    pub fn secret(&self, app_key: &str, app_secret: &str) {
        lock(&self.cloud.tokens).rotate(app_key, app_secret);
    }

    /// Refuses every token issued so far.
    pub fn revoke(&self) {
        lock(&self.cloud.tokens).revoke();
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there has been printed; dropping must not panic in turn
        }
    }
}

/// Everything that connections share. Locks are held for moments and never across an `await`.
struct Cloud {
    journal: Mutex<Journal>,
    script: Mutex<Script>,
    tokens: Mutex<Tokens>,
    tasks: Mutex<VecDeque<Task>>,
    accepted: AtomicU64,
    open: AtomicU64,
    application_bytes: AtomicU64,
    handshake_failures: Mutex<Vec<String>>,
    tls: Option<TlsAcceptor>,
    api: Door,
    token: Option<Door>,
}

impl Cloud {
    fn new(options: Options) -> io::Result<Self> {
        let api = Door::open(options.listen)?;
        let token = options.token_listener.then(|| Door::open(SocketAddr::new(api.address.ip(), 0)));
        Ok(Self {
            journal: Mutex::default(),
            script: Mutex::default(),
            tokens: Mutex::new(Tokens::new(options.app_key, options.app_secret)),
            tasks: Mutex::default(),
            accepted: AtomicU64::new(0),
            open: AtomicU64::new(0),
            application_bytes: AtomicU64::new(0),
            handshake_failures: Mutex::default(),
            tls: options.tls.as_ref().map(acceptor).transpose()?,
            api,
            token: token.transpose()?,
        })
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        lock(&self.journal)
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        lock(&self.script)
    }

    fn url(&self, door: &Door) -> String {
        format!("{}://{}", if self.tls.is_some() { "https" } else { "http" }, door.address)
    }

    fn apply(&self, faults: Faults) -> Result<(), String> {
        faults.validate()?;
        match &self.token {
            Some(token) => token.set_up(!faults.token_down),
            None if faults.token_down => return Err("`token_down` needs a token listener".to_owned()),
            None => Ok(()),
        }
        .and_then(|()| self.api.set_up(!faults.down))
        .map_err(|error| format!("a listener can't change its state: {error}"))?;
        *self.script() = Script::new(faults);
        Ok(())
    }

    fn reset(&self) {
        let _ = self.apply(Faults::default()); // fails only if a port that was down was taken meanwhile
        self.journal().clear();
        lock(&self.tasks).clear();
    }

    fn assign(&self, task: Task) {
        let mut tasks = lock(&self.tasks);
        if tasks.len() == KEPT {
            tasks.pop_front();
        }
        tasks.push_back(task);
    }

    fn handshake_failed(&self, error: &io::Error) {
        let mut failures = lock(&self.handshake_failures);
        if failures.len() < HANDSHAKES_KEPT {
            failures.push(error.to_string());
        }
    }

    fn connections(&self) -> Connections {
        Connections {
            accepted: self.accepted.load(Relaxed),
            open: self.open.load(Relaxed),
            application_bytes: self.application_bytes.load(Relaxed),
            handshake_failures: lock(&self.handshake_failures).clone(),
        }
    }
}

/// One listener. It stays bound for the sandbox's life; down means that it does not listen.
struct Door {
    socket: RawSocket,
    address: SocketAddr,
    up: watch::Sender<bool>,
}

impl Door {
    fn open(address: SocketAddr) -> io::Result<Self> {
        let found = bind(address)?; // holds a port that the kernel chose until the next lines have it by number
        let address = found.local_addr()?.as_socket().unwrap_or(address);
        let socket = bind(address)?;
        socket.listen(BACKLOG)?;
        Ok(Self { socket, address, up: watch::Sender::new(true) })
    }

    /// Down: the kernel refuses connections at once, and the open ones are closed. A listening socket that is
    /// shut down keeps a port that it was bound to by number (Linux), so nobody else gets it and `listen`
    /// brings the same port back.
    fn set_up(&self, up: bool) -> io::Result<()> {
        if *self.up.borrow() == up {
            return Ok(());
        }
        if up {
            self.socket.listen(BACKLOG)?;
        } else {
            self.socket.shutdown(std::net::Shutdown::Both)?;
        }
        self.up.send_replace(up);
        Ok(())
    }

    /// The socket, registered anew: tokio never forgets that it saw a listener's shutdown.
    fn listener(&self) -> io::Result<TcpListener> {
        TcpListener::from_std(StdListener::from(self.socket.try_clone()?))
    }
}

/// A bound socket that does not listen yet; two of them may share a port.
fn bind(address: SocketAddr) -> io::Result<RawSocket> {
    let socket = RawSocket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn acceptor(tls: &Tls) -> io::Result<TlsAcceptor> {
    let unusable = |what: &str, error: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{what} unusable: {error}"))
    };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(tls.cert_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| unusable("certificate", &error))?;
    let key =
        PrivateKeyDer::from_pem_slice(tls.key_pem.as_bytes()).map_err(|error| unusable("key", &error))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("protocol versions", &error))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| unusable("certificate", &error))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A panic elsewhere does not end the sandbox: what it guards is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
