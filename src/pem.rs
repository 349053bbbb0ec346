//! PEM files: certificates, keys, revocation lists.

use std::io;
use std::path::Path;

use memchr::memmem::{find, find_iter};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem};
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
    /// It holds more than was read.
    #[error(
        "{0} holds a {1} that is not read: each must stand between two lines of their own, `-----BEGIN {2}-----` and \
         `-----END {2}-----`, with nothing before or behind them"
    )]
    Skipped(String, &'static str, &'static str),
    /// A key with a passphrase.
    #[error(
        "{KEY_FILE} holds an encrypted key, and nobody can give its passphrase here: write it anew with `openssl pkey -in OLD -out NEW`"
    )]
    Encrypted,
    /// More than one key.
    #[error("{KEY_FILE} holds more than one private key: leave the one of the certificate")]
    Keys,
}

/// What editors of Windows put in front of a text; with it the first section would be no section.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

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
    list(pem, path, "certificate", "CERTIFICATE")
}

/// All revocation lists that a file holds; at least one.
pub(crate) fn revocation_lists(
    pem: &[u8],
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, PemError> {
    list(pem, path, "revocation list", "X509 CRL")
}

/// All sections of a kind, each of which must be read: a root that is passed over is missed when somebody calls.
fn list<T: PemObject>(
    pem: &[u8],
    path: &Path,
    what: &'static str,
    label: &'static str,
) -> Result<Vec<T>, PemError> {
    let (pem, name) = (unmarked(pem), || path.display().to_string());
    let items = T::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let items = items.map_err(|error| PemError::Content(name(), fault(&error)))?;
    match begins(pem, label) {
        count if items.len() < count => Err(PemError::Skipped(name(), what, label)),
        _ if items.is_empty() => Err(PemError::Nothing(name(), what)),
        _ => Ok(items),
    }
}

/// A key; the only one.
pub(crate) fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, PemError> {
    let pem = unmarked(pem);
    let is_encrypted = || begins(pem, "ENCRYPTED PRIVATE KEY") > 0 || find(pem, b"4,ENCRYPTED").is_some();
    match PrivateKeyDer::from_pem_slice(pem) {
        Ok(_) if begins(pem, "PRIVATE KEY") > 1 => Err(PemError::Keys),
        Err(_) if is_encrypted() => Err(PemError::Encrypted),
        Err(pem::Error::NoItemsFound) if begins(pem, "PRIVATE KEY") > 0 => {
            Err(PemError::Skipped(KEY_FILE.into(), "private key", "PRIVATE KEY"))
        }
        Err(pem::Error::NoItemsFound) => Err(PemError::Nothing(KEY_FILE.into(), "private key")),
        Err(error) => Err(PemError::Content(KEY_FILE.into(), fault(&error))),
        Ok(key) => Ok(key),
    }
}

fn unmarked(pem: &[u8]) -> &[u8] {
    pem.strip_prefix(BYTE_ORDER_MARK).unwrap_or(pem)
}

/// How many sections begin whose label ends like this, wherever they do: `X509 CERTIFICATE` is a certificate, too.
fn begins(pem: &[u8], label: &str) -> usize {
    let begin = b"-----BEGIN ";
    let labels = find_iter(pem, begin).map(|at| &pem[at + begin.len()..]);
    labels
        .filter(|rest| find(rest, b"-----").is_some_and(|end| rest[..end].ends_with(label.as_bytes())))
        .count()
}

/// The library's own words hold parts of the file.
fn fault(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::MissingSectionEnd { .. } => {
            "a section does not end; each line of it must be a line of its own"
        }
        pem::Error::IllegalSectionStart { .. } => "a section does not begin as it should",
        pem::Error::Base64Decode(_) => "a section is not base64, or does not end",
        _ => "it cannot be read",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(name: &str) -> String {
        rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap().cert.pem()
    }

    #[test]
    fn no_certificate_of_a_file_is_passed_over() {
        let (a, b) = (certificate("a"), certificate("b"));
        let of = |pem: &str| certificates(pem.as_bytes(), Path::new("roots.pem"));
        let count = |pem: &str| of(pem).unwrap().len();
        let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
        assert_eq!(count(&format!("a comment\n{a}\n{key}{b}")), 2, "the control");
        assert_eq!(count(&format!("\u{feff}{a}{b}")), 2);
        assert_eq!(count(&format!("{a}{b}").replace('\n', "\r\n")), 2);
        for skipped in [
            format!("{}{b}", a.trim_end()),
            format!(" {a}{b}"),
            format!("{a}\u{feff}{b}"),
            format!("{a}{}", b.replace("CERTIFICATE", "TRUSTED CERTIFICATE")),
            b.replace("CERTIFICATE", "X509 CERTIFICATE"),
        ] {
            let told = of(&skipped).unwrap_err().to_string();
            assert!(told.contains("roots.pem holds a certificate that is not read"), "{told}\n{skipped}");
        }
        // Without padding, so that what two sections hold can be read as one.
        let unpadded =
            (1..).map(|length| certificate(&"a".repeat(length))).find(|pem| !pem.contains('=')).unwrap();
        let endless = unpadded.replace("-----END CERTIFICATE-----\n", "");
        assert!(of(&unpadded).is_ok(), "the control");
        let told = of(&format!("{endless}{b}")).unwrap_err().to_string();
        assert!(told.contains("is not read") && told.contains("`-----END CERTIFICATE-----`"), "{told}");
        let request = format!("{a}{}", b.replace("CERTIFICATE", "CERTIFICATE REQUEST"));
        assert_eq!(count(&request), 1, "that is none");
    }

    #[test]
    fn a_key_is_the_only_one_and_not_encrypted() {
        let good = rcgen::KeyPair::generate().unwrap().serialize_pem();
        let of = |pem: &str| key(pem.as_bytes()).map(drop).map_err(|error| error.to_string());
        assert_eq!(of(&format!("\u{feff}{good}")), Ok(()), "a byte order mark is passed over");
        let encrypted = good.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        let glued = format!("{}{good}", certificate("a").trim_end());
        let old = good.replacen("-----\n", "-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n", 1);
        for (bad, why) in [
            (&encrypted, "an encrypted key"),
            (&old, "an encrypted key"),
            (&good.repeat(2), "more than one"),
            (&format!(" {good}"), "a private key that is not read"),
            (&glued, "a private key that is not read"),
            (&certificate("a"), "holds no private key"),
        ] {
            assert!(of(bad).is_err_and(|told| told.contains(why)), "{bad}");
        }
    }

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
