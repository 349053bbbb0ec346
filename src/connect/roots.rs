//! Whom a client trusts, as it is at present: `ca_file` is read again when it changes.
//!
//! What was agreed under other roots counts for nothing from then on: TLS sessions are not resumed, connections that
//! were made before are not used for another request, and one that is being made is made anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use rustls::{ClientConfig, RootCertStore};

use super::{HTTP1, HTTP2, Identity, TlsError};
use crate::pem;
use crate::watched::{Watched, digest, follow};

/// TLS of all connectors.
#[derive(Debug)]
pub(super) struct Trust {
    current: ArcSwap<Configs>,
    /// Counts the changes of the roots.
    generation: AtomicU64,
    identity: Option<Arc<Identity>>,
}

/// What one set of roots gives.
#[derive(Debug)]
struct Configs {
    http1: Arc<ClientConfig>,
    /// It offers HTTP/2 before HTTP/1.1.
    http2: Arc<ClientConfig>,
}

impl Trust {
    pub(super) fn new(roots: RootCertStore, identity: Option<Arc<Identity>>) -> Result<Self, TlsError> {
        let current = ArcSwap::from_pointee(Configs::new(roots, identity.clone())?);
        Ok(Self { current, generation: AtomicU64::new(0), identity })
    }

    pub(super) fn config(&self, offers_http2: bool) -> Arc<ClientConfig> {
        let current = self.current.load();
        if offers_http2 { current.http2.clone() } else { current.http1.clone() }
    }

    /// Which roots are in use. To be asked for before a connection is made with them.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn replace(&self, roots: RootCertStore) -> Result<(), TlsError> {
        self.current.store(Arc::new(Configs::new(roots, self.identity.clone())?));
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }
}

impl Configs {
    fn new(roots: RootCertStore, identity: Option<Arc<Identity>>) -> Result<Self, TlsError> {
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

/// The file of the roots, where they are not the system's.
#[derive(Clone, Debug)]
pub struct Roots {
    path: PathBuf,
    trust: Arc<Trust>,
    /// Of what was read first.
    digest: [u8; 32],
}

impl Roots {
    /// A file whose roots are in use; `digest` is of what it held then.
    pub(super) fn new(path: PathBuf, trust: Arc<Trust>, digest: [u8; 32]) -> Self {
        Self { path, trust, digest }
    }

    /// Looks for a changed file for ever, and takes what can be used. `tell` hears of each change, and what came of it.
    pub async fn keep_up(self, tell: impl Fn(Result<(), String>)) {
        let Self { path, trust, digest } = self;
        let paths = vec![path.clone()];
        let look = {
            let path = path.clone();
            move || contents(&path)
        };
        let take = move |_| trust.replace(read(&path)?);
        follow(Watched::new(paths, look, digest), take, tell).await;
    }
}

/// The roots of a file, at least one. A file that every user can change is refused, here and in [`contents`].
pub(super) fn read(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in pem::certificates(&pem::read_roots(path)?, path)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

pub(super) fn contents(path: &Path) -> Result<[u8; 32], TlsError> {
    Ok(digest([&*pem::read_roots(path)?]))
}
