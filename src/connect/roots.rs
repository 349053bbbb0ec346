//! The trusted roots, which are replaced while the gateway runs: `ca_file` is read again when it changes.
//!
//! After a change nothing relies on the old roots: TLS sessions are not resumed, connections that were verified with them get no
//! further request, and a dial that is under way starts again. The roots of the system are read at the start only.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use rustls::{ClientConfig, RootCertStore};

use super::{HTTP1, HTTP2, Identity, TlsError};
use crate::file_watch::{FileWatch, digest, follow};
use crate::pem;

/// The TLS settings of all connectors.
#[derive(Debug)]
pub(super) struct Trust {
    current: ArcSwap<Configs>,
    /// The number of changes of the roots.
    generation: AtomicU64,
    identity: Option<Arc<Identity>>,
}

/// The TLS settings for one set of roots.
#[derive(Debug)]
struct Configs {
    http1: Arc<ClientConfig>,
    /// Offers HTTP/2 before HTTP/1.1.
    http2: Arc<ClientConfig>,
}

impl Trust {
    /// Trusts these roots until they are replaced.
    pub(super) fn new(roots: RootCertStore, identity: Option<Arc<Identity>>) -> Result<Self, TlsError> {
        let current = ArcSwap::from_pointee(Configs::new(roots, identity.clone())?);
        Ok(Self { current, generation: AtomicU64::new(0), identity })
    }

    /// The present settings.
    pub(super) fn config(&self, offers_http2: bool) -> Arc<ClientConfig> {
        let current = self.current.load();
        if offers_http2 { current.http2.clone() } else { current.http1.clone() }
    }

    /// The number of the roots in use. A caller must read it before it makes a connection with them.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn replace(&self, roots: RootCertStore) -> Result<(), TlsError> {
        // The roots first: a dial that reads the new number must get the new roots. The other way round, a connection that the
        // old roots let in could pass for one of the new roots.
        self.current.store(Arc::new(Configs::new(roots, self.identity.clone())?));
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }
}

impl Configs {
    fn new(roots: RootCertStore, identity: Option<Arc<Identity>>) -> Result<Self, TlsError> {
        // New settings have an empty session cache. A resumed TLS session would skip the check against the new roots.
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut http1 = match identity {
            Some(identity) => builder.with_client_cert_resolver(identity),
            None => builder.with_no_client_auth(),
        };
        http1.alpn_protocols = vec![HTTP1.to_vec()];
        let mut http2 = http1.clone();
        http2.alpn_protocols = vec![HTTP2.to_vec(), HTTP1.to_vec()];
        Ok(Self { http1: Arc::new(http1), http2: Arc::new(http2) })
    }
}

/// The watched `ca_file`.
#[derive(Clone, Debug)]
pub struct Roots {
    path: PathBuf,
    trust: Arc<Trust>,
    /// The digest of the file at the start.
    digest: [u8; 32],
}

impl Roots {
    /// The file whose roots `trust` uses; `digest` is of the content that was read.
    pub(super) fn new(path: PathBuf, trust: Arc<Trust>, digest: [u8; 32]) -> Self {
        Self { path, trust, digest }
    }

    /// Follows the file for ever and takes changed roots if they can be used. `report` gets the result of each change.
    pub async fn watch(self, report: impl Fn(Result<(), String>)) {
        let Self { path, trust, digest } = self;
        let paths = vec![path.clone()];
        let read_digest = {
            let path = path.clone();
            move || contents(&path)
        };
        let take = move |_| trust.replace(read(&path)?);
        follow(FileWatch::new(paths, read_digest, digest), take, report).await;
    }
}

/// Returns the roots of a file, at least one. Fails for a file that every user can change, as [`contents`] does.
pub(super) fn read(path: &Path) -> Result<RootCertStore, TlsError> {
    // One bad certificate fails the whole file: an operator who named it would not notice that it is missing.
    let mut roots = RootCertStore::empty();
    for certificate in pem::certificates(&pem::read_roots(path)?, path)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

/// Returns the digest of a file of roots, which tells whether it has changed.
pub(super) fn contents(path: &Path) -> Result<[u8; 32], TlsError> {
    Ok(digest([&*pem::read_roots(path)?]))
}
