//! PEM files (RFC 7468): certificates, private keys, revocation lists.
//!
//! Every section of the wanted kind must be readable. The library skips sections that are not framed exactly;
//! here that is an error, since a CA that is skipped is noticed only when a peer fails. No error quotes the
//! content of a file, nor the path of a key's file.

use std::io;
use std::path::Path;

use memchr::memmem::{find, find_iter};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::files;

/// The name of a key's file in errors.
// Its path is not used: somebody may have put the key itself there.
const KEY_FILE: &str = "the key's file";

/// Why a PEM file cannot be used.
#[derive(Debug, Error)]
pub enum BadPem {
    /// The file could not be read.
    #[error("{0}: {1}")]
    Read(String, io::Error),
    /// The file is not valid PEM.
    // What it is instead is not quoted: a key with a broken frame would be in the log.
    #[error("{0} is not PEM: {1}")]
    Content(String, &'static str),
    /// The file has no section of the kind.
    #[error("{0} holds no {1}")]
    Nothing(String, &'static str),
    /// The file has a section of the kind that the library skips.
    #[error(
        "{0} contains a {1} that is not read: each must be between the lines `-----BEGIN {2}-----` and `-----END \
         {2}-----`, with nothing before or after them on these lines"
    )]
    Skipped(String, &'static str, &'static str),
    /// The key has a passphrase.
    #[error(
        "{KEY_FILE} contains an encrypted key, and the gateway cannot ask for its passphrase: decrypt it with `openssl \
         pkey -in OLD -out NEW`"
    )]
    Encrypted,
    /// The file has more than one private key.
    #[error("{KEY_FILE} contains more than one private key: keep only the one of the certificate")]
    Keys,
}

/// The UTF-8 byte order mark.
// Editors on Windows write it. With it the first line is not `-----BEGIN`, so the first CA would be skipped.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads a file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, BadPem> {
    read_as(path, path.display().to_string())
}

/// Reads a file that determines which callers are accepted. Fails if every user can change it.
pub(crate) fn read_guarded(path: &Path) -> Result<Vec<u8>, BadPem> {
    read_unless_open(path, "decide who may call")
}

/// Reads a file that determines which server is trusted as the cloud. Fails if every user can change it.
pub(crate) fn read_roots(path: &Path) -> Result<Vec<u8>, BadPem> {
    read_unless_open(path, "decide who gets the credential")
}

fn read_unless_open(path: &Path, harm: &str) -> Result<Vec<u8>, BadPem> {
    files::read_guarded(path, harm).map_err(|error| BadPem::Read(path.display().to_string(), error))
}

/// Reads a key's file into a buffer that is zeroed on drop.
pub(crate) fn read_key(path: &Path) -> Result<Zeroizing<Vec<u8>>, BadPem> {
    read_as(path, KEY_FILE.into()).map(Zeroizing::new)
}

fn read_as(path: &Path, name: String) -> Result<Vec<u8>, BadPem> {
    files::read(path).map_err(|error| BadPem::Read(name, error))
}

/// Parses all certificates of a file, which must have at least one. `path` is for errors only.
pub(crate) fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, BadPem> {
    list(pem, path, "certificate", "CERTIFICATE")
}

/// Parses all revocation lists of a file, which must have at least one. `path` is for errors only.
pub(crate) fn revocation_lists(
    pem: &[u8],
    path: &Path,
) -> Result<Vec<CertificateRevocationListDer<'static>>, BadPem> {
    list(pem, path, "revocation list", "X509 CRL")
}

/// Parses all sections of a kind. Fails if any of them is skipped.
fn list<T: PemObject>(
    pem: &[u8],
    path: &Path,
    what: &'static str,
    label: &'static str,
) -> Result<Vec<T>, BadPem> {
    let (pem, name) = (unmarked(pem), || path.display().to_string());
    let items = T::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let items = items.map_err(|error| BadPem::Content(name(), fault(&error)))?;
    match begins(pem, label) {
        count if items.len() < count => Err(BadPem::Skipped(name(), what, label)),
        _ if items.is_empty() => Err(BadPem::Nothing(name(), what)),
        _ => Ok(items),
    }
}

/// Parses the only private key of a file.
pub(crate) fn key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, BadPem> {
    let pem = unmarked(pem);
    // Two forms: PKCS #8 has a label of its own, and older files have a header within the section (RFC 1421,
    // section 4.6.1.1).
    let is_encrypted = || begins(pem, "ENCRYPTED PRIVATE KEY") > 0 || find(pem, b"4,ENCRYPTED").is_some();
    match PrivateKeyDer::from_pem_slice(pem) {
        Ok(_) if begins(pem, "PRIVATE KEY") > 1 => Err(BadPem::Keys),
        Err(_) if is_encrypted() => Err(BadPem::Encrypted),
        Err(pem::Error::NoItemsFound) if begins(pem, "PRIVATE KEY") > 0 => {
            Err(BadPem::Skipped(KEY_FILE.into(), "private key", "PRIVATE KEY"))
        }
        Err(pem::Error::NoItemsFound) => Err(BadPem::Nothing(KEY_FILE.into(), "private key")),
        Err(error) => Err(BadPem::Content(KEY_FILE.into(), fault(&error))),
        Ok(key) => Ok(key),
    }
}

fn unmarked(pem: &[u8]) -> &[u8] {
    pem.strip_prefix(BYTE_ORDER_MARK).unwrap_or(pem)
}

/// Counts the sections whose label ends with `label`, wherever in a line they begin.
// The end of the label, since `X509 CERTIFICATE` and `TRUSTED CERTIFICATE` are certificates, too. A
// `CERTIFICATE REQUEST` is not.
fn begins(pem: &[u8], label: &str) -> usize {
    let begin = b"-----BEGIN ";
    let labels = find_iter(pem, begin).map(|at| &pem[at + begin.len()..]);
    labels
        .filter(|rest| find(rest, b"-----").is_some_and(|end| rest[..end].ends_with(label.as_bytes())))
        .count()
}

/// A fixed description of an error.
// The library's own text contains parts of the file, which may be a key.
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
    fn no_certificate_in_a_pem_file_is_skipped() {
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
            assert!(told.contains("roots.pem contains a certificate that is not read"), "{told}\n{skipped}");
        }
        // A certificate without padding at its end: only then can the base64 of two sections be read as one.
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
    fn pem_file_must_hold_exactly_one_unencrypted_key() {
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

    // Each kind of damage takes another way through the library, with another error text.
    #[test]
    fn error_of_a_broken_key_reveals_nothing_of_the_key() {
        let whole = rcgen::KeyPair::generate().unwrap().serialize_pem();
        assert!(key(whole.as_bytes()).is_ok(), "the control");
        let secret = whole.lines().nth(1).unwrap();
        // `Debug` of the library's error shows bytes as decimal numbers.
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
