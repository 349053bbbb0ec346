//! TLS of a listener: its certificate, and which certificates of callers it accepts.
//!
//! Guarantees that a certificate which has expired, was revoked, or is no longer trusted identifies nobody. Sessions
//! are not resumed where certificates are asked for, and a certificate on an open connection is verified again: at
//! once when the files have changed, and every minute otherwise. A revocation list that is out of date identifies
//! nobody either.
//!
//! The files are read again while the gateway runs. Files that cannot be used change nothing.

use std::cell::Cell;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    DigitallySignedStruct, DistinguishedName, InconsistentKeys, RootCertStore, ServerConfig, SignatureScheme,
};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::task_local;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use webpki::EndEntityCert;
use zeroize::Zeroizing;

use crate::config::ListenerTls;
use crate::connect::HTTP1;
use crate::file_watch::{FileWatch, digest, follow};
use crate::log::OncePerSecond;
use crate::pem::BadPem;
use crate::{clock, config, pem};

/// A certificate on an open connection is verified again after this time, in nanoseconds: it may expire meanwhile.
const LOOK_AGAIN: u64 = 60_000_000_000;

/// Why the TLS files of a listener cannot be used.
#[derive(Debug, Error)]
pub enum ListenerTlsError {
    /// A file cannot be read, or is not PEM.
    #[error(transparent)]
    Pem(#[from] BadPem),
    /// The key belongs to another certificate.
    #[error("key_file is not the key of cert_file's certificate")]
    Mismatch,
    /// rustls refuses what the named configuration keys refer to.
    #[error("{0}: {1}")]
    Refused(&'static str, rustls::Error),
    /// The client CA or its revocation lists cannot be used.
    #[error("client_ca_file, client_crl_file: {0}")]
    Clients(#[from] VerifierBuilderError),
}

/// The contents of all files, read at one time, so that a key is never combined with the certificate of another
/// reading.
struct Contents {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Vec<u8>>,
    client_crl: Option<Vec<u8>>,
}

/// The TLS of one listener, shared by all workers.
#[derive(Debug)]
pub struct Tls {
    files: ListenerTls,
    /// Read without a lock at each handshake, and replaced as a whole.
    current: ArcSwap<Current>,
}

#[derive(Debug)]
struct Current {
    config: Arc<ServerConfig>,
    /// Verifies callers' certificates; `None` if none is asked for.
    clients: Option<Arc<dyn ClientCertVerifier>>,
    /// Grows with each reload.
    generation: u64,
    /// Tells whether the files have changed since.
    digest: [u8; 32],
}

/// A caller's handshake that failed.
#[derive(Debug, Error)]
#[error("{error}")]
pub struct NotAccepted {
    /// The cause.
    pub error: io::Error,
    /// The names in the caller's certificate, if that was refused.
    pub names: Option<Vec<String>>,
}

task_local! {
    /// The names in a certificate that is refused in this handshake.
    // Task-local, since rustls' verifier has no other way to hand something to the handshake that called it.
    static REFUSED: Cell<Option<Vec<String>>>;
}

/// A verifier that records the names in a certificate which it refuses. rustls forgets them, and an operator who
/// wants to admit the caller needs them.
#[derive(Debug)]
struct Noting(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Noting {
    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.0.verify_client_cert(own, others, now).inspect_err(|_| {
            // `try_with`: outside a handshake there is nothing to record, and that is no error.
            let _ = REFUSED.try_with(|refused| refused.set(Some(names_in(own))));
        })
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }

    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }
}

/// A caller's certificate, on one connection.
#[derive(Debug)]
pub struct Certificate {
    tls: Arc<Tls>,
    /// The certificate, and what leads from it to a client CA.
    chain: Vec<CertificateDer<'static>>,
    names: Vec<String>,
    verified: Mutex<Verified>,
}

#[derive(Clone, Copy, Debug)]
struct Verified {
    is_good: bool,
    generation: u64,
    /// When it was verified, in nanoseconds of [`clock::nanos`].
    at: u64,
}

impl Tls {
    /// Reads the files of a listener.
    ///
    /// # Errors
    ///
    /// Returns a [`ListenerTlsError`] if a file cannot be read or used.
    pub fn load(files: &ListenerTls) -> Result<Arc<Self>, ListenerTlsError> {
        let current = Current::new(files, &Contents::read(files)?, 0)?;
        Ok(Arc::new(Self { files: files.clone(), current: ArcSwap::from_pointee(current) }))
    }

    /// Returns whether callers are identified by their certificates.
    pub fn asks_for_certificates(&self) -> bool {
        self.files.client_ca_file.is_some()
    }

    /// Performs the handshake of one connection. Also returns the caller's certificate if one is asked for.
    ///
    /// The wait has no bound: the caller bounds it.
    ///
    /// # Errors
    ///
    /// Returns [`NotAccepted`] if the handshake fails, with the names in a certificate that was refused.
    pub async fn accept(
        self: &Arc<Self>,
        stream: TcpStream,
    ) -> Result<(TlsStream<TcpStream>, Option<Certificate>), NotAccepted> {
        // One reading for handshake and certificate: after a reload in between, a certificate would count as verified
        // by a CA that has not seen it.
        let current = self.current.load_full();
        let accepted = REFUSED.scope(Cell::new(None), async {
            let accepted = TlsAcceptor::from(current.config.clone()).accept(stream).await;
            accepted.map_err(|error| NotAccepted { error, names: REFUSED.with(Cell::take) })
        });
        let stream = accepted.await?;
        let certificate = current.clients.as_ref().map(|_| {
            let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
            Certificate::new(self.clone(), chain, current.generation)
        });
        Ok((stream, certificate))
    }

    /// Reads the files again, and puts them into use if they can be used.
    fn reload(&self) -> Result<(), ListenerTlsError> {
        let generation = self.current.load().generation + 1;
        let contents = Contents::read(&self.files)?;
        self.current.store(Arc::new(Current::new(&self.files, &contents, generation)?));
        Ok(())
    }

    /// Watches the files, and puts changed ones into use. Never returns. `report` is called with the result of each
    /// change.
    pub async fn watch(self: Arc<Self>, report: impl Fn(Result<(), String>)) {
        let files = self.files.clone();
        // Contents decide: files that were only touched, or swapped for equal ones, cause no reload and no event.
        let read_digest = move || Contents::read(&files).map(|contents| contents.digest());
        let ListenerTls { cert_file, key_file, client_ca_file, client_crl_file } = &self.files;
        let paths = [Some(cert_file), Some(key_file), client_ca_file.as_ref(), client_crl_file.as_ref()];
        let paths = paths.into_iter().flatten().cloned().collect();
        let watch = FileWatch::new(paths, read_digest, self.current.load().digest);
        follow(watch, move |_| self.reload(), report).await;
    }
}

impl Contents {
    fn read(files: &ListenerTls) -> Result<Self, ListenerTlsError> {
        let optional = |path: &Option<PathBuf>| path.as_deref().map(pem::read_guarded).transpose();
        Ok(Self {
            certificate: pem::read(&files.cert_file)?,
            key: pem::read_key(&files.key_file)?,
            // `read_guarded` refuses a file that every user can change: whoever can write it could admit itself.
            client_ca: optional(&files.client_ca_file)?,
            client_crl: optional(&files.client_crl_file)?,
        })
    }

    /// A digest of all files, to tell a change.
    fn digest(&self) -> [u8; 32] {
        let Self { certificate, key, client_ca, client_crl } = self;
        let parts = [Some(certificate), Some(&**key), client_ca.as_ref(), client_crl.as_ref()];
        digest(parts.map(|part| part.map(Vec::as_slice).unwrap_or_default()))
    }
}

impl Current {
    fn new(files: &ListenerTls, contents: &Contents, generation: u64) -> Result<Self, ListenerTlsError> {
        let provider = Arc::new(default_provider());
        let certificates = pem::certificates(&contents.certificate, &files.cert_file)?;
        let key = pem::key(&contents.key)?;
        let clients = match (&files.client_ca_file, &contents.client_ca) {
            (Some(path), Some(roots)) => Some(clients(files, contents, pem::certificates(roots, path)?)?),
            _ => None,
        };
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| ListenerTlsError::Refused("TLS", error))?;
        let builder = match &clients {
            Some(clients) => builder.with_client_cert_verifier(Arc::new(Noting(clients.clone()))),
            None => builder.with_no_client_auth(),
        };
        // The mismatch is reported in words of its own: rustls' text does not name the files.
        let mut config = builder.with_single_cert(certificates, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => ListenerTlsError::Mismatch,
            error => ListenerTlsError::Refused("cert_file, key_file", error),
        })?;
        // Only HTTP/1.1 is served. A caller that offers h2 alone gets an alert instead of a connection that it cannot
        // use.
        config.alpn_protocols = vec![HTTP1.to_vec()];
        if clients.is_some() {
            // A resumed session shows no certificate, so a revoked one would stay in use.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
        }
        Ok(Self { config: Arc::new(config), clients, generation, digest: contents.digest() })
    }
}

/// A verifier that accepts certificates of these CAs, except those on a revocation list. With a list, each CA on the
/// way from a certificate to its root needs one that is up to date.
fn clients(
    files: &ListenerTls,
    contents: &Contents,
    roots: Vec<CertificateDer<'static>>,
) -> Result<Arc<dyn ClientCertVerifier>, ListenerTlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root).map_err(|error| ListenerTlsError::Refused("client_ca_file", error))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(store), Arc::new(default_provider()));
    let lists = match (&files.client_crl_file, &contents.client_crl) {
        (Some(path), Some(lists)) => pem::revocation_lists(lists, path)?,
        _ => Vec::new(),
    };
    // Without enforcement, an attacker who keeps new lists away would keep a revoked certificate in use.
    Ok(builder.with_crls(lists).enforce_revocation_expiration().build()?)
}

impl Certificate {
    fn new(tls: Arc<Tls>, chain: &[CertificateDer<'_>], generation: u64) -> Self {
        let names = chain.first().map(names_in).unwrap_or_default();
        let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let verified = Mutex::new(Verified { is_good: true, generation, at: clock::nanos() });
        Self { tls, chain, names, verified }
    }

    /// The certificate's names, as a caller's `peer` spells them. Empty if it is no longer good.
    ///
    /// Verifies the certificate again if the files have changed, or if the last time was a minute ago.
    pub fn names(&self) -> &[String] {
        if self.is_good() { &self.names } else { &[] }
    }

    /// Returns whether the certificate is good at present.
    fn is_good(&self) -> bool {
        static NO_LONGER_GOOD: OncePerSecond = OncePerSecond::new();
        let current = self.tls.current.load();
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock::nanos();
        // A failure is kept for the minute, too. Otherwise each request with a bad certificate would cost a
        // verification.
        if verified.generation == current.generation && now.saturating_sub(verified.at) <= LOOK_AGAIN {
            return verified.is_good;
        }
        // `None` does not occur, since a reload keeps the set of files. It would count as not good.
        let passed = current.clients.as_ref().map(|clients| self.verify(&**clients));
        let is_good = matches!(passed, Some(Ok(())));
        *verified = Verified { is_good, generation: current.generation, at: now };
        drop(verified);
        if let Some(Err(error)) = passed
            && let Some(times) = NO_LONGER_GOOD.times()
        {
            tracing::info!(%error, times, "a caller's certificate is no longer valid");
        }
        is_good
    }

    /// Verifies the chain by the wall clock of this moment.
    fn verify(&self, clients: &dyn ClientCertVerifier) -> Result<(), rustls::Error> {
        let (own, others) = self.chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        clients.verify_client_cert(own, others, UnixTime::now()).map(drop)
    }
}

/// The SPIFFE IDs and DNS names among a certificate's subject alternative names. The common name does not count (RFC
/// 9525).
fn names_in(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Vec::new() };
    let ids = certificate.valid_uri_names().filter(|uri| uri.starts_with(config::SPIFFE)).map(str::to_owned);
    let dns =
        certificate.valid_dns_names().map(|name| format!("{}{}", config::DNS, name.to_ascii_lowercase()));
    ids.chain(dns).collect()
}
