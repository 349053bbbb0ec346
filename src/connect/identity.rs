//! The gateway's own certificate, for an upstream that asks for one. Read again when its files change.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys, SignatureScheme};

use super::TlsError;
use crate::pem;
use crate::watched::{Watched, digest, follow};

/// A certificate and its key, as they are at present.
#[derive(Debug)]
pub struct Identity {
    cert_file: PathBuf,
    key_file: PathBuf,
    current: ArcSwap<CertifiedKey>,
    /// Of what was read first.
    digest: [u8; 32],
}

impl Identity {
    /// Reads both files.
    pub fn load(cert_file: PathBuf, key_file: PathBuf) -> Result<Arc<Self>, TlsError> {
        let digest = contents(&cert_file, &key_file)?; // before they are read: what changes in between is noticed later
        let current = ArcSwap::new(read(&cert_file, &key_file)?);
        Ok(Arc::new(Self { cert_file, key_file, current, digest }))
    }

    /// Looks for changed files for ever, and takes what can be used. `tell` hears of each change, and what came of it.
    pub async fn keep_up(self: Arc<Self>, tell: impl Fn(Result<(), String>)) {
        let files = (self.cert_file.clone(), self.key_file.clone());
        let look = move || contents(&files.0, &files.1);
        let paths = vec![self.cert_file.clone(), self.key_file.clone()];
        let watched = Watched::new(paths, look, self.digest);
        let take = move |_| {
            self.current.store(read(&self.cert_file, &self.key_file)?);
            Ok(())
        };
        follow(watched, take, tell).await;
    }
}

fn read(cert_file: &Path, key_file: &Path) -> Result<Arc<CertifiedKey>, TlsError> {
    let chain = pem::certificates(&pem::read(cert_file)?, cert_file)?;
    let key = pem::key(&pem::read_key(key_file)?)?;
    let certified = CertifiedKey::from_der(chain, key, &default_provider()).map_err(|error| match error {
        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => TlsError::Mismatch,
        error => error.into(),
    })?;
    Ok(Arc::new(certified))
}

fn contents(cert_file: &Path, key_file: &Path) -> Result<[u8; 32], TlsError> {
    Ok(digest([&*pem::read(cert_file)?, &**pem::read_key(key_file)?]))
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
