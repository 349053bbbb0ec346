//! A simulator of the cloud in one process, with fault injection: `tokenByAkSk` and the CCSQM calls with their rules.
//!
//! It decides as the vendor's pages say: whether a call gets a token, whether a token is still valid, whether a task is
//! assigned. It records every request byte for byte before it answers, and can misbehave in every way that [`Faults`] describes.
//! It uses raw sockets on a thread and a runtime of its own, so that neither a busy nor a stuck gateway in the same process
//! changes its behaviour.
//!
//! It shares no rule with the gateway: it is a second, independent reading of the vendor's pages, so that tests compare two
//! readings. It protects no secrets: records hold credentials in clear. It is not a model of the vendor's speed, and not a
//! general HTTP server: HTTP/1.1, one request at a time per connection, bodies by `Content-Length` only (a chunked one is
//! answered 411).
//!
//! Memory is bounded: the newest [`KEPT`] requests and tasks are stored, older ones are dropped.

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

/// The path of the token endpoint.
pub const TOKEN_PATH: &str = "/apigovernance/api/oauth/tokenByAkSk";

/// The path of `appointQualityTask`, the call that the gateway exists for.
pub const APPOINT_PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask";

/// The most connections that the kernel holds until they are accepted.
// Tests open thousands at once. Those beyond the backlog would wait a second or more for a retransmitted SYN.
const BACKLOG: i32 = 4096;

/// The number of failed TLS handshakes whose text is stored.
const HANDSHAKES_KEPT: usize = 1000;

/// The setup of a sandbox.
#[derive(Clone, Debug)]
pub struct Options {
    /// The address to listen at. With port 0 the kernel chooses a free port.
    pub listen: SocketAddr,
    /// Gives the token endpoint a listener of its own (same address, free port), so that it can be down
    /// while the business calls are up. The first listener then answers 404 to the token path.
    pub token_listener: bool,
    /// The app key that is accepted.
    pub app_key: String,
    /// The app secret that is accepted.
    pub app_secret: String,
    /// The certificate for TLS on all listeners; `None` for plain HTTP.
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
    /// The chain in PEM, the server's certificate first.
    pub cert_pem: String,
    /// The private key in PEM: PKCS#8, PKCS#1 or SEC1.
    pub key_pem: String,
}

impl Tls {
    /// Reads both from regular files.
    ///
    /// # Errors
    ///
    /// A file cannot be read or is not a regular one; the error names it.
    // A FIFO in the place of a file would block the command until something writes to it.
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

/// Counts of the connections of all listeners, control connections included.
#[derive(Clone, Debug, Serialize)]
pub struct Connections {
    /// The number of connections accepted so far.
    pub accepted: u64,
    /// The number of connections that are open.
    pub open: u64,
    /// The bytes of requests received so far, after decryption; 0 means that no client sent any application data.
    /// What arrives after a scripted end or during a hang is read but not counted.
    pub application_bytes: u64,
    /// One text per failed TLS handshake, of the first 1,000; it names the alert that the client sent.
    pub handshake_failures: Vec<String>,
}

/// A running sandbox. It stops, with all its connections, when this is dropped.
pub struct Sandbox {
    cloud: Arc<Cloud>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Sandbox {
    /// Binds all listeners, then serves on a thread of its own. Clients can connect as soon as this returns.
    ///
    /// # Errors
    ///
    /// An address cannot be bound, or the certificate or key is unusable ([`io::ErrorKind::InvalidInput`]).
    pub fn start(options: Options) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let cloud = Arc::new(Cloud::new(options)?);
        let (stop, stopped) = oneshot::channel();
        let serving = Arc::clone(&cloud);
        let thread = thread::Builder::new().name("sandbox".to_owned()).spawn(move || {
            runtime.block_on(async move {
                let doors = connection::accept_all(serving);
                // Ends when `stop` is dropped, which is an error here.
                let _ = stopped.await;
                drop(doors);
            });
        })?;
        Ok(Self { cloud, stop: Some(stop), thread: Some(thread) })
    }

    /// Returns the address that serves business calls and, unless it has a listener of its own, the token endpoint.
    pub fn address(&self) -> SocketAddr {
        self.cloud.api.address
    }

    /// Returns the base URL of business calls, without a path, such as `http://127.0.0.1:18080`.
    pub fn url(&self) -> String {
        self.cloud.url(&self.cloud.api)
    }

    /// Returns the whole URL of the token endpoint.
    pub fn token_url(&self) -> String {
        let door = self.cloud.token.as_ref().unwrap_or(&self.cloud.api);
        format!("{}{TOKEN_PATH}", self.cloud.url(door))
    }

    /// Returns every request received outside `/_sandbox/` and the token endpoint, in order of the first byte.
    /// Includes unfinished ones and bytes that are not HTTP.
    pub fn requests(&self) -> Vec<Received> {
        self.cloud.journal().requests()
    }

    /// Returns every call of the token endpoint, in order of the first byte.
    pub fn token_calls(&self) -> Vec<TokenCall> {
        self.cloud.journal().token_calls()
    }

    /// Returns every task that was assigned, in order. A call that meets the rules assigns its task even if its reply never
    /// arrives. A scripted status, body or failure code means that nothing was assigned.
    pub fn tasks(&self) -> Vec<Task> {
        lock(&self.cloud.tasks).iter().cloned().collect()
    }

    /// Returns the counts of connections.
    pub fn connections(&self) -> Connections {
        self.cloud.connections()
    }

    /// Replaces the whole script, counters and token habits included. `Faults::default()` ends all faults.
    /// When this returns, listeners are down or up as the script says.
    ///
    /// # Errors
    ///
    /// The script contradicts itself, or a listener cannot change its state; the error is a sentence for people. The script
    /// before it stays in effect.
    pub fn faults(&self, faults: Faults) -> Result<(), String> {
        self.cloud.apply(faults)
    }

    /// Drops all records and tasks and ends all faults. Tokens stay valid.
    pub fn reset(&self) {
        self.cloud.reset();
    }

    /// Replaces the accepted pair of app key and secret. Tokens that were issued before stay valid.
    pub fn secret(&self, app_key: &str, app_secret: &str) {
        lock(&self.cloud.tokens).rotate(app_key, app_secret);
    }

    /// Invalidates every token issued so far.
    pub fn revoke(&self) {
        lock(&self.cloud.tokens).revoke();
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed by its hook. A panic in `drop` could abort the process.
            let _ = thread.join();
        }
    }
}

/// The state that all connections share.
// Locks are held for moments and never across an `await`: the sandbox has one thread, which a waiting lock would stop.
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
        // The script is replaced last, so that it stays as it was if a listener cannot follow.
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
        // Fails only if a port that was down was taken meanwhile. Then records and tasks must go nevertheless.
        let _ = self.apply(Faults::default());
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

/// One listener. Its socket stays bound for the sandbox's life; down means that it does not listen.
struct Door {
    socket: RawSocket,
    address: SocketAddr,
    up: watch::Sender<bool>,
}

impl Door {
    fn open(address: SocketAddr) -> io::Result<Self> {
        // Two sockets, since a port that the kernel chose is lost at a shutdown (see `set_up`): the first one only reserves a
        // free port until the second one is bound to it by number.
        let found = bind(address)?;
        let address = found.local_addr()?.as_socket().unwrap_or(address);
        let socket = bind(address)?;
        socket.listen(BACKLOG)?;
        Ok(Self { socket, address, up: watch::Sender::new(true) })
    }

    /// Puts the listener up or down. While it is down, the kernel refuses connections, and the open ones are closed.
    // Linux: a listening socket that is shut down keeps a port that it was bound to by number. The kernel gives it to no socket
    // that asks for a free port, and `listen` brings the same port back.
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

    /// Returns a new handle of the socket for tokio.
    // A new one each time the listener comes up: tokio never forgets that it saw the shutdown of a socket.
    fn listener(&self) -> io::Result<TcpListener> {
        TcpListener::from_std(StdListener::from(self.socket.try_clone()?))
    }
}

/// Returns a bound socket that does not listen yet.
fn bind(address: SocketAddr) -> io::Result<RawSocket> {
    let socket = RawSocket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // So that two sockets may be bound to one port while neither listens.
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
    // Named, so that a client that offers h2 first does not speak it to a server that has none.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Locks a mutex, poisoned or not.
// A panic of one connection must not end the others. The data is valid between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
