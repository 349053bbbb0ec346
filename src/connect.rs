//! Egress: TCP, proxy tunnel and TLS to the upstream and to the token endpoint.
//!
//! Nothing is written to a server whose certificate is not valid, and no switch turns verification off. Without TLS only
//! loopback is connected to. Connections are not pooled here, and addresses are tried one after the other, without happy
//! eyeballs (RFC 8305).

mod addresses;
mod identity;
pub(crate) mod login;
pub(crate) mod proxy;
mod roots;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::client::conn::http1;
use rustls::RootCertStore;
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config;
use crate::config::{ProxyUrl, Url};
use crate::model::cause::Cause;
use crate::model::reply::{MAX_FIELDS, MAX_HEAD};
use crate::pem::BadPem;
use crate::reason::Reason;
use addresses::Addresses;
pub use identity::Identity;
use login::Basic;
pub use login::{BadLogin, Login};
pub use proxy::TunnelError;
pub use roots::Roots;
use roots::Trust;

/// Protocol names of a TLS handshake (ALPN, RFC 7301).
pub(crate) const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

/// The HTTP/1.1 client for upstream and token endpoint. In a reply it removes blanks between a field's name and its colon, as a
/// proxy must (RFC 9112, section 5.1), and rejects folded lines, as a proxy may (section 5.2).
// tests/hyper.rs: blanks_before_a_colon_are_removed_and_folded_lines_rejected
// tests/hyper.rs: reply_over_any_limit_causes_the_same_error
pub(crate) fn http1() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .max_buf_size(MAX_HEAD)
        // The bound of the buffer alone lets a head of nearly twice its size pass.
        .max_header_size(MAX_HEAD)
        .max_headers(MAX_FIELDS)
        .allow_spaces_after_header_name_in_responses(true)
        // Requests are small: one buffer and send(2) cost less than two buffers and writev(2).
        .writev(false);
    builder
}

/// Why TLS could not be set up.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A certificate or key file cannot be read, or is not PEM.
    #[error(transparent)]
    Pem(#[from] BadPem),
    /// The key does not belong to the certificate.
    #[error("client_key_file is not the key of client_cert_file's certificate")]
    Mismatch,
    /// The system has no root certificate.
    #[error("no root certificate: the system has none")]
    NoRoots,
    /// The URL's host cannot be a server name.
    #[error("not a server name: {0}")]
    Name(#[from] InvalidDnsNameError),
    /// rustls rejects the settings.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// Why [`Egress::new`] failed.
#[derive(Debug, Error)]
pub enum EgressError {
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The user or password for the proxy cannot be used.
    #[error(transparent)]
    Login(#[from] BadLogin),
}

/// Why there is no connection. The text may name addresses: it is for logs and `/status`, never for callers.
#[derive(Debug, Error)]
pub enum DialError {
    /// The name did not resolve.
    #[error("the name does not resolve: {0}")]
    Resolve(io::Error),
    /// The URL is plain `http`, and its host has no loopback address.
    #[error(
        "{0} has no loopback address, and without TLS nothing is sent elsewhere; see the hosts file, or use https://"
    )]
    NotLoopback(Arc<str>),
    /// No address accepted a connection; the error is that of the last one tried.
    #[error("no address answers: {0}")]
    Connect(#[from] io::Error),
    /// The proxy opened no tunnel.
    #[error(transparent)]
    Proxy(#[from] TunnelError),
    /// The TLS handshake failed.
    #[error("TLS: {0}")]
    Tls(io::Error),
    /// The time for all steps was over during this step.
    #[error("{0} took longer than {1:?}")]
    Timeout(SetupStep, Duration),
}

/// The steps of connecting, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SetupStep {
    /// Resolving the host's name.
    Resolve,
    /// Connecting to an address.
    Connect,
    /// Waiting for the permit to send user and password to the proxy.
    Turn,
    /// Opening a tunnel through the proxy.
    Proxy,
    /// The TLS handshake.
    Tls,
}

impl SetupStep {
    fn of(step: &AtomicU8) -> Self {
        let step = step.load(Ordering::Relaxed);
        let all = [Self::Resolve, Self::Connect, Self::Turn, Self::Proxy, Self::Tls];
        all.into_iter().find(|it| *it as u8 == step).unwrap_or(Self::Connect)
    }
}

impl std::fmt::Display for SetupStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Resolve => "the look-up of the name",
            Self::Connect => "the connection",
            Self::Turn => {
                "the wait for the proxy's answer to another connection, which tries its user and password"
            }
            Self::Proxy => "the proxy's answer",
            Self::Tls => "the TLS handshake",
        })
    }
}

impl DialError {
    /// Returns the cause for metrics, audit and callers.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Resolve(_) => Cause::Dns,
            Self::NotLoopback(_) => Cause::NotLoopback,
            Self::Connect(error) | Self::Tls(error) => Cause::of_io(error),
            Self::Proxy(error) => error.cause(),
            Self::Timeout(SetupStep::Resolve, _) => Cause::Dns,
            Self::Timeout(..) => Cause::Timeout,
        }
    }
}

/// The settings of all outgoing connections: roots, own certificate, proxy. Clones share them.
#[derive(Clone, Debug)]
pub struct Egress {
    trust: Arc<Trust>,
    roots: Option<Roots>,
    /// For `https` only: a plain URL leads to loopback, which no proxy can reach.
    proxy: Option<ProxyUrl>,
    login: Option<Arc<Login>>,
    identity: Option<Arc<Identity>>,
}

impl Egress {
    /// Reads the roots, the gateway's own certificate and the proxy's user and password, but none of them if `has_tls` is
    /// false. Blocks on files. Fails if one of them cannot be used.
    pub fn new(upstream: &config::Upstream, has_tls: bool) -> Result<Self, EgressError> {
        let identity = upstream.identity().filter(|_| has_tls);
        let identity = identity.map(|files| Identity::load(files.cert_file, files.key_file)).transpose()?;
        let ca_file = upstream.ca_file.as_deref().filter(|_| has_tls);
        // Taken before the file is read: a change in between then differs from the digest and is noticed later.
        let digest = ca_file.map(roots::contents).transpose()?;
        let store = if has_tls { roots(ca_file)? } else { RootCertStore::empty() };
        let trust = Arc::new(Trust::new(store, identity.clone())?);
        let roots = ca_file.zip(digest).map(|(path, digest)| Roots::new(path.into(), trust.clone(), digest));
        let login = upstream.proxy_login().filter(|_| has_tls).map(Login::load).transpose()?;
        Ok(Self { trust, roots, proxy: upstream.proxy.clone(), login, identity })
    }

    /// The watched `ca_file`, if one is configured.
    pub fn roots(&self) -> Option<&Roots> {
        self.roots.as_ref()
    }

    /// The gateway's own certificate, if one is configured.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        self.identity.as_ref()
    }

    /// The user and password for the proxy, if they are configured.
    pub fn login(&self) -> Option<&Arc<Login>> {
        self.login.as_ref()
    }

    /// Settings that trust no certificate and read no file.
    #[cfg(test)]
    pub(crate) fn plain() -> Self {
        let trust = Arc::new(Trust::new(RootCertStore::empty(), None).unwrap());
        Self { trust, roots: None, proxy: None, login: None, identity: None }
    }
}

/// Returns the roots of `ca_file` alone, or those of the system. Fails if there is none.
pub fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let Some(path) = ca_file else {
        let mut roots = RootCertStore::empty();
        // Errors are ignored here: one unreadable file among a system's hundred roots is no reason not to start.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        return if roots.is_empty() { Err(TlsError::NoRoots) } else { Ok(roots) };
    };
    roots::read(path)
}

/// Connects to one host. Clones share the cache of its addresses.
#[derive(Clone)]
pub struct Connector {
    /// Where the TCP connection goes: the host, or the proxy.
    host: Arc<str>,
    port: u16,
    /// The host with its port, if the connection goes through a proxy.
    behind: Option<Arc<str>>,
    /// For the proxy.
    login: Option<Arc<Login>>,
    tls: Option<Tls>,
    timeout: Duration,
    addresses: Addresses,
}

/// The TLS of a connector.
#[derive(Clone)]
struct Tls {
    trust: Arc<Trust>,
    name: ServerName<'static>,
    offers_http2: bool,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connector({}:{})", self.host, self.port)
    }
}

/// The host and port, and the proxy on the way, as in log lines.
impl std::fmt::Display for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.behind {
            Some(behind) => write!(f, "{behind} through the proxy {}:{}", self.host, self.port),
            None => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl Connector {
    /// Creates a connector for the host of a URL. `timeout` is for all steps together. Fails if the host is not a server name.
    pub fn new(url: &Url, egress: &Egress, timeout: Duration) -> Result<Self, TlsError> {
        let name = url.tls.then(|| ServerName::try_from(url.host.clone())).transpose()?;
        let tls = name.map(|name| Tls { trust: egress.trust.clone(), name, offers_http2: false });
        let (host, port, behind, login) = match egress.proxy.as_ref().filter(|_| url.tls) {
            Some(ProxyUrl { host, port }) => {
                (host, *port, Some(url.authority_with_port().into()), egress.login.clone())
            }
            None => (&url.host, url.port, None, None),
        };
        let (host, addresses) = (host.as_str().into(), Addresses::default());
        Ok(Self { host, port, behind, login, tls, timeout, addresses })
    }

    /// Returns this connector, with HTTP/2 offered before HTTP/1.1 if it uses TLS.
    pub fn offering_http2(mut self) -> Self {
        if let Some(tls) = &mut self.tls {
            tls.offers_http2 = true;
        }
        self
    }

    /// The number of the roots that new connections are verified with. It grows with each change of `ca_file`; 0 without TLS.
    pub fn generation(&self) -> u64 {
        self.tls.as_ref().map_or(0, |tls| tls.trust.generation())
    }

    /// Returns a new connection, verified with the roots that are in use when it is ready. Cancellation safe. Fails
    /// with the cause if a step fails or `timeout` has passed.
    pub async fn connect(&self) -> Result<Stream, Reason> {
        self.connect_under().await.map(|(stream, _)| stream)
    }

    /// Returns a new connection as [`Self::connect`] does, and the number of its roots (see [`Self::generation`]).
    pub async fn connect_under(&self) -> Result<(Stream, u64), Reason> {
        // Outside of the future below, which is dropped when the time is over, so that the error can name the step.
        let step = AtomicU8::new(SetupStep::Resolve as u8);
        let dialed = timeout(self.timeout, self.dial_under(&step)).await;
        let late = |_| {
            let step = SetupStep::of(&step);
            if step == SetupStep::Connect {
                // The timer of the last address ends at the same moment. Whichever is first, the addresses are doubted.
                self.addresses.expire();
            }
            Err(DialError::Timeout(step, self.timeout))
        };
        let dialed = dialed.unwrap_or_else(late);
        dialed.map_err(|error| self.reason(&error))
    }

    /// Returns the cause and text of an error, without the proxy's password.
    // A proxy that intercepts TLS can quote the password in its certificate, whose names are a part of rustls' error.
    #[cold]
    fn reason(&self, error: &DialError) -> Reason {
        let text = format!("{self}: {error}");
        let is_quoted = self.login.as_ref().is_some_and(|login| login.current().is_in(&text));
        let text = if is_quoted {
            format!("{self}: the text is withheld, since it quotes the proxy's password")
        } else {
            text
        };
        Reason::new(error.cause(), text)
    }

    /// Dials, and dials again if the roots have changed meanwhile: the old roots may have accepted a server that is not trusted
    /// now.
    async fn dial_under(&self, step: &AtomicU8) -> Result<(Stream, u64), DialError> {
        loop {
            let generation = self.generation();
            let stream = self.dial(step).await?;
            if self.generation() == generation {
                return Ok((stream, generation));
            }
        }
    }

    /// Goes through all steps once.
    async fn dial(&self, step: &AtomicU8) -> Result<Stream, DialError> {
        let login = self.login.as_ref().map(|login| login.current());
        // Before anything is dialled: while the proxy's refusal is remembered, a connection could only be closed again.
        login.as_deref().map_or(Ok(()), Basic::check)?;
        let mut stream = self.dial_tcp(step).await?;
        // Nagle's algorithm would hold the second of two small writes back until the first one is acknowledged.
        stream.set_nodelay(true)?;
        if let Some(authority) = &self.behind {
            step.store(SetupStep::Turn as u8, Ordering::Relaxed);
            let leave = match login {
                Some(login) => Some(login.leave().await?),
                None => None,
            };
            step.store(SetupStep::Proxy as u8, Ordering::Relaxed);
            stream = proxy::tunnel(stream, authority, leave).await?;
        }
        let Some(Tls { trust, name, offers_http2 }) = &self.tls else { return Ok(Stream::Plain(stream)) };
        step.store(SetupStep::Tls as u8, Ordering::Relaxed);
        let tls = TlsConnector::from(trust.config(*offers_http2));
        let stream = tls.connect(name.clone(), stream).await.map_err(DialError::Tls)?;
        Ok(Stream::Tls(Box::new(stream)))
    }

    /// Connects to an address of the host or the proxy.
    async fn dial_tcp(&self, step: &AtomicU8) -> Result<TcpStream, DialError> {
        step.store(SetupStep::Resolve as u8, Ordering::Relaxed);
        let begin = Instant::now();
        let addresses = match self.host.parse::<IpAddr>() {
            Ok(ip) => vec![SocketAddr::new(ip, self.port)],
            Err(_) => self.addresses.resolve(&self.host, self.port).await.map_err(DialError::Resolve)?,
        };
        let addresses = self.allowed(addresses)?;
        step.store(SetupStep::Connect as u8, Ordering::Relaxed);
        let dialed = dial_any(&addresses, self.timeout.saturating_sub(begin.elapsed())).await;
        let (stream, address) = dialed.inspect_err(|_| self.addresses.expire())?;
        // Checked once more on the socket, before the first byte: that byte may begin a request with the app secret in clear.
        self.allowed(vec![stream.peer_addr()?])?;
        self.addresses.prefer(address);
        Ok(stream)
    }

    /// Returns the addresses that may be connected to: without TLS only those of loopback. Fails if none is left.
    // The name proves nothing: a hosts file can map `localhost` to another machine.
    fn allowed(&self, mut addresses: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, DialError> {
        if self.tls.is_none() {
            addresses.retain(|address| address.ip().to_canonical().is_loopback());
            if addresses.is_empty() {
                return Err(DialError::NotLoopback(self.host.clone()));
            }
        }
        Ok(addresses)
    }
}

/// Connects to the first address that accepts. Each gets an equal share of the time that is left, so that one that is silent
/// leaves time for the others.
async fn dial_any(addresses: &[SocketAddr], time: Duration) -> io::Result<(TcpStream, SocketAddr)> {
    let begin = Instant::now();
    let mut failed = io::ErrorKind::NotFound.into();
    for (i, address) in addresses.iter().enumerate() {
        let left = time.saturating_sub(begin.elapsed());
        let share = left / u32::try_from(addresses.len() - i).unwrap_or(u32::MAX);
        match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok((stream, *address)),
            Ok(Err(error)) => failed = error,
            Err(_) => failed = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(failed)
}

/// A connection to the upstream or the token endpoint.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP, to loopback only.
    Plain(TcpStream),
    /// TLS. Boxed, since its state is large.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// The TCP socket.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    /// Whether the server chose HTTP/2.
    pub fn is_http2(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.get_ref().1.alpn_protocol() == Some(HTTP2),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listener whose queue is full, so that a further connection gets no answer.
    fn silent() -> (SocketAddr, socket2::Socket, Vec<socket2::Socket>) {
        let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        // A backlog of 0 holds one connection on Linux. The kernel drops the SYNs of those behind it.
        let callers = (0..4).map(|_| {
            let caller = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            caller.set_nonblocking(true).unwrap();
            let _ = caller.connect(&address);
            caller
        });
        (address.as_socket().unwrap(), listener, callers.collect())
    }

    #[tokio::test]
    async fn unresponsive_address_leaves_time_to_dial_the_next() {
        let (silent, _listener, _callers) = silent();
        let good = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let answering = good.local_addr().unwrap();
        let time = Duration::from_secs(2);
        let (_, address) = dial_any(&[silent, answering], time).await.unwrap();
        assert_eq!(address, answering);
        // A listener that refuses at once would pass the test above, too.
        let error = dial_any(&[silent, silent], time / 4).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "the control");
    }
}
