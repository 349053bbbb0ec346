//! The gateway's client certificate (mutual TLS), for an upstream that asks for one. It is read again when its files change.
//!
//! A file that cannot be used leaves the old certificate in use. Whether the upstream trusts it is not checked here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys, SignatureScheme};

use super::TlsError;
use crate::file_watch::{FileWatch, digest, follow};
use crate::pem;

/// A certificate and its key. The TLS handshakes of all connections share them.
#[derive(Debug)]
pub struct Identity {
    cert_file: PathBuf,
    key_file: PathBuf,
    current: ArcSwap<CertifiedKey>,
    /// The digest of both files at the start.
    digest: [u8; 32],
}

impl Identity {
    /// Reads both files. Fails if one cannot be read, or the key does not belong to the certificate.
    pub fn load(cert_file: PathBuf, key_file: PathBuf) -> Result<Arc<Self>, TlsError> {
        // Taken before the files are read: a change in between then differs from the digest and is noticed later.
        let digest = contents(&cert_file, &key_file)?;
        let current = ArcSwap::new(read(&cert_file, &key_file)?);
        Ok(Arc::new(Self { cert_file, key_file, current, digest }))
    }

    /// Follows the files for ever and takes a changed certificate if it can be used. `report` gets the result of each change.
    pub async fn watch(self: Arc<Self>, report: impl Fn(Result<(), String>)) {
        let files = (self.cert_file.clone(), self.key_file.clone());
        let read_digest = move || contents(&files.0, &files.1);
        let paths = vec![self.cert_file.clone(), self.key_file.clone()];
        let watch = FileWatch::new(paths, read_digest, self.digest);
        let take = move |_| {
            self.current.store(read(&self.cert_file, &self.key_file)?);
            Ok(())
        };
        follow(watch, take, report).await;
    }
}

fn read(cert_file: &Path, key_file: &Path) -> Result<Arc<CertifiedKey>, TlsError> {
    let chain = pem::certificates(&pem::read(cert_file)?, cert_file)?;
    let key = pem::key(&pem::read_key(key_file)?)?;
    // rustls' text for a wrong pair names no file. It is the usual mistake during a renewal, so it has an error of its own.
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
        // The issuers and schemes that the server names are ignored: there is one certificate, and a server that does not
        // accept it says so in its alert, which tells more than a handshake without a certificate.
        Some(self.current.load_full())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
