//! PEM files: certificates, keys, revocation lists.

use std::{io, path::Path};

use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::files;

/// What a key's file is called. Its path is not told: somebody may have put the key itself there.
const KEY_FILE: &str = "the key's file";

/// Why a file cannot be used.
#[derive(Debug, Error)]
pub enum PemError {
    /// It could not be read.
    #[error("{0}: {1}")]
    Read(String, io::Error),
    /// It is not PEM. What it is instead is not told: a key with a broken frame would stand in a log.
    #[error("{0} is not PEM: {1}")]
    Content(String, &'static str),
    /// It holds nothing of the kind.
    #[error("{0} holds no {1}")]
    Nothing(String, &'static str),
}

/// A file's bytes.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, PemError> {
    read_as(path, path.display().to_string())
}

/// The bytes of a file that says who may call; one that every user can change is refused.
pub(crate) fn read_guarded(path: &Path) -> Result<Vec<u8>, PemError> {
    read_unless_open(path, "say who may call")
}

/// The bytes of a file that says who is the cloud; one that every user can change is refused.
pub(crate) fn read_roots(path: &Path) -> Result<Vec<u8>, PemError> {
    read_unless_open(path, "say who gets the credential")
}

fn read_unless_open(path: &Path, harm: &str) -> Result<Vec<u8>, PemError> {
    files::read_guarded(path, harm).map_err(|error| PemError::Read(path.display().to_string(), error))
}

/// A key's bytes.
pub(crate) fn read_key(path: &Path) -> Result<Zeroizing<Vec<u8>>, PemError> {
    read_as(path, KEY_FILE.into()).map(Zeroizing::new)
}

fn read_as(path: &Path, name: String) -> Result<Vec<u8>, PemError> {
    files::read(path).map_err(|error| PemError::Read(name, error))
}

/// All certificates that a file holds; at least one.
pub(crate) fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    list(pem, path, "certificate")
}

/// All revocation lists that a file holds; at least one.
pub(crate) fn revocation_lists(
    pem: &[u8],
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, PemError> {
    list(pem, path, "revocation list")
}

fn list<T: PemObject>(pem: &[u8], path: &Path, what: &'static str) -> Result<Vec<T>, PemError> {
    let name = || path.display().to_string();
    let items = T::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let items = items.map_err(|error| PemError::Content(name(), fault(&error)))?;
    if items.is_empty() { Err(PemError::Nothing(name(), what)) } else { Ok(items) }
}

/// A key.
pub(crate) fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, PemError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| match error {
        pem::Error::NoItemsFound => PemError::Nothing(KEY_FILE.into(), "private key"),
        error => PemError::Content(KEY_FILE.into(), fault(&error)),
    })
}

/// The library's own words hold parts of the file.
fn fault(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::MissingSectionEnd { .. } => {
            "a section does not end; each line of it must be a line of its own"
        }
        pem::Error::IllegalSectionStart { .. } => "a section does not begin as it should",
        pem::Error::Base64Decode(_) => "a section is not base64",
        _ => "it cannot be read",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_broken_key_holds_nothing_of_it() {
        let whole = rcgen::KeyPair::generate().unwrap().serialize_pem();
        assert!(key(whole.as_bytes()).is_ok(), "the control");
        let secret = whole.lines().nth(1).unwrap();
        let decimal = format!("{:?}", secret.as_bytes());
        for broken in [
            whole.replace('\n', " "),
            whole.replace('\n', "\\n"),
            whole.replace('\n', ""),
            whole.replacen("-----\n", "\n", 1),
            whole.replace("-----END", "-----ENDE"),
            whole.replace(secret, &format!("{secret}!")),
            secret.to_owned(),
        ] {
            let said = key(broken.as_bytes()).unwrap_err();
            let said = format!("{said} {said:?}");
            let part = &decimal[1..decimal.len() - 1];
            assert!(!said.contains(&secret[..8]) && !said.contains(&part[..20]), "{said}");
        }
    }
}
