//! Secrets in zeroised buffers: overwritten on drop, without a way to print or serialise them.
//!
//! A value that cannot be a secret of the cloud, such as UTF-16 or one with a blank at its end, is refused when it is read.
//! Nothing here locks memory: a secret may reach swap. Copies in header values belong to the HTTP library and are not
//! overwritten.

pub mod needles;

use std::{fmt, io};

use thiserror::Error;
use zeroize::Zeroizing;

use crate::config::SecretSource;
use crate::{files, plain};

/// A secret, at least one byte of UTF-8 without control characters. Overwritten on drop; `Debug` shows nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

/// Why a secret could not be read. The text names the file or variable, never the content.
#[derive(Debug, Error)]
pub enum UnusableSecret {
    /// The file could not be read.
    #[error("{0}: {1}")]
    File(String, io::Error),
    /// The file or variable holds something that cannot be a secret.
    #[error("{0} {1}")]
    Impossible(String, Impossible),
    /// The environment variable is not set, or is not UTF-8.
    #[error("the environment has no variable {0}")]
    Variable(String),
}

/// Why a value cannot be a secret that the cloud issued. Sending it would be a failed try, and the cloud locks an account after
/// a few.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Impossible {
    /// The value is empty.
    #[error("is empty")]
    Empty,
    /// The encoding that some editors and shells of Windows write.
    #[error("is UTF-16: save it as UTF-8, without a byte order mark")]
    Utf16,
    /// The bytes are no text.
    #[error("is not UTF-8")]
    NotUtf8,
    /// The text begins with U+FEFF.
    #[error("begins with a byte order mark: save it as UTF-8 without one")]
    ByteOrderMark,
    /// The text has a line break other than one at the end of the file.
    #[error("holds more than one line: it must hold the secret, and one newline at most behind it")]
    Lines,
    /// White space before or behind the text.
    #[error("begins or ends with a blank: remove it")]
    Blank,
    /// NUL, another control character, or one that is not visible.
    #[error("contains a control character, such as NUL, or another invisible one: write it again")]
    Unseen,
}

impl Impossible {
    fn check(bytes: &[u8]) -> Result<(), Self> {
        // UTF-16 without a byte order mark: ASCII in it has a zero in each pair. The zeros are valid UTF-8, so that it would be
        // reported as a control character, which says nothing of the cause.
        let is_wide = || bytes.len().is_multiple_of(2) && bytes.chunks(2).all(|pair| pair.contains(&0));
        match bytes {
            [] => return Err(Self::Empty),
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => return Err(Self::Utf16),
            _ if is_wide() => return Err(Self::Utf16),
            _ => {}
        }
        let text = str::from_utf8(bytes).map_err(|_| Self::NotUtf8)?;
        // The more specific faults first: a byte order mark and a line break are also characters that nobody sees.
        match text {
            _ if text.starts_with('\u{feff}') => Err(Self::ByteOrderMark),
            _ if text.contains(['\n', '\r']) => Err(Self::Lines),
            _ if text.trim() != text => Err(Self::Blank),
            _ if !plain::is_plain(text) => Err(Self::Unseen),
            _ => Ok(()),
        }
    }
}

impl Secret {
    /// Makes a secret of the content of a file or variable, without one newline (LF or CRLF) at its end. Fails if the rest
    /// cannot be a secret.
    pub fn new(bytes: Vec<u8>) -> Result<Self, Impossible> {
        // First of all, so that a refused value is overwritten as well: it may be a secret with a slip.
        let mut bytes = Zeroizing::new(bytes);
        // One newline, which every editor writes. With more than one it is unclear what the secret is.
        for newline in [b'\n', b'\r'] {
            if bytes.last() == Some(&newline) {
                bytes.pop();
            }
        }
        Impossible::check(&bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a secret from a file or an environment variable. Blocks on the file. Fails if it cannot be read, or if its
    /// contents cannot be a secret (see [`Impossible`]).
    pub fn load(source: &SecretSource) -> Result<Self, UnusableSecret> {
        let (bytes, name) = match source {
            SecretSource::File(path) => {
                let name = path.display().to_string();
                (files::read(path).map_err(|error| UnusableSecret::File(name.clone(), error))?, name)
            }
            SecretSource::Env(name) => {
                let value = std::env::var(name).map_err(|_| UnusableSecret::Variable(name.clone()))?;
                (value.into_bytes(), name.clone())
            }
        };
        Self::new(bytes).map_err(|why| UnusableSecret::Impossible(name, why))
    }

    /// The bytes. A caller must copy them only into buffers that are overwritten, or into what goes out.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_file_is_trimmed_and_debug_output_hides_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "s3cret\r\n").unwrap();
        let secret = Secret::load(&SecretSource::File(file.path().into())).unwrap();
        assert_eq!(secret.expose(), b"s3cret");
        assert_eq!(format!("{secret:?}"), "Secret");
        std::fs::write(file.path(), "\n").unwrap();
        assert!(Secret::load(&SecretSource::File(file.path().into())).is_err());
    }

    #[test]
    fn impossible_secrets_are_rejected_with_their_reason() {
        let of = |bytes: &[u8]| Secret::new(bytes.to_vec()).map(|secret| secret.expose().to_vec());
        for good in ["s3cret", "two words", "\u{e9}\u{1f600}", "#!\"'\\{}"] {
            for end in ["", "\n", "\r\n"] {
                assert_eq!(of(format!("{good}{end}").as_bytes()), Ok(good.as_bytes().to_vec()));
            }
        }
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
        for (bad, why) in [
            (&b""[..], Impossible::Empty),
            (b"\r\n", Impossible::Empty),
            (&utf16("\u{feff}s3cret\r\n"), Impossible::Utf16),
            (&utf16("s3cret"), Impossible::Utf16),
            // Big-endian, of which the encoder above makes none.
            (b"\xfe\xff\0s", Impossible::Utf16),
            (b"s3cret\xff", Impossible::NotUtf8),
            (b"\xef\xbb\xbfs3cret", Impossible::ByteOrderMark),
            (b"s3cret\n\n", Impossible::Lines),
            (b"\ns3cret", Impossible::Lines),
            (b"s3\ncret", Impossible::Lines),
            (b"s3cret\r\n\r\n", Impossible::Lines),
            (b" ", Impossible::Blank),
            (b" s3cret", Impossible::Blank),
            (b"s3cret\t\n", Impossible::Blank),
            // A no-break space, as a copy from a web page brings it.
            ("s3cret\u{a0}".as_bytes(), Impossible::Blank),
            (b"s3\0cret", Impossible::Unseen),
            (b"s3\x1bcret", Impossible::Unseen),
            ("s3\u{200b}cret".as_bytes(), Impossible::Unseen),
        ] {
            assert_eq!(of(bad), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn secret_is_read_from_a_variable_and_a_missing_one_is_named() {
        let load = |name: &str| Secret::load(&SecretSource::Env(name.to_owned()));
        // A variable that cargo sets: a test that sets one itself would change the environment of the tests beside it.
        assert_eq!(load("CARGO_PKG_NAME").unwrap().expose(), b"ccsqm-gateway");
        assert!(load("NO_SUCH_VARIABLE").unwrap_err().to_string().contains("NO_SUCH_VARIABLE"));
    }
}
