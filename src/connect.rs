//! Connections to the cloud: TCP and TLS, for the upstream and for the token endpoint.
//!
//! Guarantees that nothing is written to a server whose certificate is not right: there is no switch that
//! turns verification off. Does not pool.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, InvalidDnsNameError, ServerName, pem::PemObject},
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, lookup_host},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::config::Url;

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
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Connects to one host.
#[derive(Clone)]
pub struct Connector {
    host: Arc<str>,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    timeout: Duration,
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
        Ok(Self { host: url.host.as_str().into(), port: url.port, tls, timeout })
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
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(TcpStream::connect(SocketAddr::new(ip, self.port)).await?);
        }
        let addresses = lookup_host((&*self.host, self.port)).await.map_err(ConnectError::Resolve)?;
        let mut failed = io::ErrorKind::NotFound.into();
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failed = error,
            }
        }
        Err(ConnectError::Connect(failed))
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
