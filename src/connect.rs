//! Connections to the cloud: TCP and TLS, for the upstream and for the token endpoint.
//!
//! Guarantees that nothing is written to a server whose certificate is not right: there is no switch that
//! turns verification off. Does not pool.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, InvalidDnsNameError, ServerName, pem::PemObject},
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, lookup_host},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::config::Url;

/// Names of protocols in a TLS handshake (RFC 7301).
pub(crate) const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

/// Why TLS could not be set up.
#[derive(Debug, Error)]
pub enum TlsError {
    /// `ca_file` could not be read.
    #[error("ca_file {path}: {source}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// There is no root certificate to trust.
    #[error("no root certificate: {0}")]
    NoRoots(String),
    /// The URL's host cannot be a server name.
    #[error("not a server name: {0}")]
    Name(#[from] InvalidDnsNameError),
    /// rustls refuses the set-up.
    #[error(transparent)]
    Rustls(#[from] rustls::Error),
}

/// Why no connection came about. Addresses in it are for logs, never for callers.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The name did not resolve.
    #[error("the name does not resolve: {0}")]
    Resolve(io::Error),
    /// No address answered.
    #[error("no address answers: {0}")]
    Connect(#[from] io::Error),
    /// The TLS handshake failed.
    #[error("TLS: {0}")]
    Tls(io::Error),
    /// All of it took too long.
    #[error("not within {0:?}")]
    Timeout(Duration),
}

impl ConnectError {
    /// One word for metric labels.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Resolve(_) => "resolve",
            Self::Connect(_) => "connect",
            Self::Tls(_) => "tls",
            Self::Timeout(_) => "timeout",
        }
    }
}

/// What a client trusts: the roots of `ca_file` alone, or the system's.
pub fn client_tls(ca_file: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let fail = |source| TlsError::CaFile { path: path.to_owned(), source };
            for certificate in CertificateDer::pem_file_iter(path).map_err(fail)? {
                roots.add(certificate.map_err(fail)?)?;
            }
        }
        None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
    }
    if roots.is_empty() {
        let place =
            ca_file.map_or("the system has none".into(), |path| format!("{} has none", path.display()));
        return Err(TlsError::NoRoots(place));
    }
    trusting(roots)
}

/// For plain connections only: trusts nobody, and reads no root from anywhere.
pub fn no_tls() -> Result<Arc<ClientConfig>, TlsError> {
    trusting(RootCertStore::empty())
}

fn trusting(roots: RootCertStore) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![HTTP1.to_vec()];
    Ok(Arc::new(config))
}

/// Connects to one host. Clones share what is known of its addresses.
#[derive(Clone)]
pub struct Connector {
    host: Arc<str>,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    timeout: Duration,
    addresses: Arc<Addresses>,
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Connector({}:{})", self.host, self.port)
    }
}

impl Connector {
    /// A connector for the host of a URL. `timeout` covers resolving, connecting and TLS together.
    pub fn new(url: &Url, tls: &Arc<ClientConfig>, timeout: Duration) -> Result<Self, TlsError> {
        let name = || ServerName::try_from(url.host.clone());
        let tls = if url.tls { Some((TlsConnector::from(tls.clone()), name()?)) } else { None };
        let addresses = Arc::default();
        Ok(Self { host: url.host.as_str().into(), port: url.port, tls, timeout, addresses })
    }

    /// The same connector, offering HTTP/2 before HTTP/1.1 where it speaks TLS.
    pub fn offering_http2(mut self) -> Self {
        if let Some((tls, _)) = &mut self.tls {
            let mut config = ClientConfig::clone(tls.config());
            config.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
            *tls = TlsConnector::from(Arc::new(config));
        }
        self
    }

    /// A new connection.
    pub async fn connect(&self) -> Result<Stream, ConnectError> {
        timeout(self.timeout, self.dial()).await.unwrap_or(Err(ConnectError::Timeout(self.timeout)))
    }

    async fn dial(&self) -> Result<Stream, ConnectError> {
        let stream = self.dial_tcp().await?;
        stream.set_nodelay(true)?;
        let Some((tls, name)) = &self.tls else { return Ok(Stream::Plain(stream)) };
        let stream = tls.connect(name.clone(), stream).await.map_err(ConnectError::Tls)?;
        Ok(Stream::Tls(Box::new(stream)))
    }

    async fn dial_tcp(&self) -> Result<TcpStream, ConnectError> {
        let begin = Instant::now();
        let addresses = match self.host.parse::<IpAddr>() {
            Ok(ip) => vec![SocketAddr::new(ip, self.port)],
            Err(_) => self.addresses.resolve(&self.host, self.port).await.map_err(ConnectError::Resolve)?,
        };
        let (stream, address) = dial_any(&addresses, self.timeout.saturating_sub(begin.elapsed())).await?;
        self.addresses.prefer(address);
        Ok(stream)
    }
}

/// Tries the addresses in turn. One that does not answer leaves time for the others.
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

/// What is known of a host's addresses.
#[derive(Debug, Default)]
struct Addresses {
    /// The question that is under way. It outlives who asked it, so that a resolver that hangs holds one
    /// thread and not one for every caller.
    asking: tokio::sync::Mutex<Option<JoinHandle<io::Result<Vec<SocketAddr>>>>>,
    /// The last answer, the address that answered last in front.
    known: Mutex<Vec<SocketAddr>>,
}

impl Addresses {
    /// Asks the system's resolver; while that has no answer, the last one counts.
    async fn resolve(&self, host: &Arc<str>, port: u16) -> io::Result<Vec<SocketAddr>> {
        let mut asking = self.asking.lock().await;
        let question = asking.get_or_insert_with(|| {
            let host = host.clone();
            tokio::spawn(async move { Ok(lookup_host((&*host, port)).await?.collect()) })
        });
        let answer = question.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        *asking = None;
        let mut known = self.known();
        match answer {
            Ok(mut addresses) => {
                let preferred = known.first().copied();
                addresses.sort_by_key(|address| Some(*address) != preferred);
                known.clone_from(&addresses);
                Ok(addresses)
            }
            Err(error) if known.is_empty() => Err(error),
            Err(error) => {
                tracing::warn!(%error, %host, "the name does not resolve; its last addresses are used");
                Ok(known.clone())
            }
        }
    }

    fn prefer(&self, answered: SocketAddr) {
        self.known().sort_by_key(|address| *address != answered);
    }

    fn known(&self) -> MutexGuard<'_, Vec<SocketAddr>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection to the cloud.
#[derive(Debug)]
pub enum Stream {
    /// Plain, to loopback only.
    Plain(TcpStream),
    /// TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// The socket below.
    pub fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }

    /// Whether the server picked HTTP/2.
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

    /// A listener whose queue is full, so that nobody answers there.
    fn silent() -> (SocketAddr, socket2::Socket, Vec<socket2::Socket>) {
        let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let callers = (0..4).map(|_| {
            let caller = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            caller.set_nonblocking(true).unwrap();
            let _ = caller.connect(&address);
            caller
        });
        (address.as_socket().unwrap(), listener, callers.collect())
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_leaves_time_for_the_next() {
        let (silent, _listener, _callers) = silent();
        let good = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let answering = good.local_addr().unwrap();
        let time = Duration::from_secs(2);
        let (_, address) = dial_any(&[silent, answering], time).await.unwrap();
        assert_eq!(address, answering);
        let error = dial_any(&[silent, silent], time / 4).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "the control");
    }

    #[tokio::test]
    async fn the_address_that_answered_last_comes_first_and_counts_while_the_resolver_fails() {
        let addresses = Addresses::default();
        let resolve = |host: &'static str| addresses.resolve_for_test(host);
        let (one, two) = ("127.0.0.1:1".parse().unwrap(), "127.0.0.2:1".parse().unwrap());
        assert!(resolve("no-such-host.invalid").await.is_err(), "the control");
        *addresses.known() = vec![one, two];
        addresses.prefer(two);
        assert_eq!(resolve("no-such-host.invalid").await.unwrap(), [two, one]);
    }

    impl Addresses {
        async fn resolve_for_test(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
            self.resolve(&host.into(), 1).await
        }
    }
}
