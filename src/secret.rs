//! Secrets in zeroised buffers: not printable, not serialisable.

pub mod needles;

use std::{fmt, io};

use thiserror::Error;
use zeroize::Zeroizing;

use crate::config::SecretSource;
use crate::{files, plain};

/// A secret's bytes, overwritten on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

/// Why a secret could not be read. Names the place, never the content.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The file could not be read.
    #[error("{0}: {1}")]
    File(String, io::Error),
    /// What it holds cannot be one.
    #[error("{0} {1}")]
    Impossible(String, Impossible),
    /// The variable is not set.
    #[error("the environment has no variable {0}")]
    Variable(String),
}

/// Why something cannot be a secret that the cloud gave out. To send it would be a failed try, of which the cloud takes a few
/// before it locks the account.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Impossible {
    /// Nothing.
    #[error("is empty")]
    Empty,
    /// What some editors and shells of Windows write.
    #[error("is UTF-16: save it as UTF-8, without a byte order mark")]
    Utf16,
    /// No text.
    #[error("is not UTF-8")]
    NotUtf8,
    /// An invisible beginning.
    #[error("begins with a byte order mark: save it as UTF-8 without one")]
    ByteOrderMark,
    /// More than the newline at the end of a file.
    #[error("holds more than one line: it must hold the secret, and one newline at most behind it")]
    Lines,
    /// Blanks around it.
    #[error("begins or ends with a blank: remove it")]
    Blank,
    /// NUL, and other characters that show nothing.
    #[error("holds a control character, such as NUL, or another one that nobody sees: write it anew")]
    Unseen,
}

impl Impossible {
    fn check(bytes: &[u8]) -> Result<(), Self> {
        let is_wide = || bytes.len().is_multiple_of(2) && bytes.chunks(2).all(|pair| pair.contains(&0));
        match bytes {
            [] => return Err(Self::Empty),
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => return Err(Self::Utf16),
            _ if is_wide() => return Err(Self::Utf16),
            _ => {}
        }
        let text = str::from_utf8(bytes).map_err(|_| Self::NotUtf8)?;
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
    /// Takes a secret as it stands in a file or a variable: a newline at its end is not part of it.
    pub fn new(bytes: Vec<u8>) -> Result<Self, Impossible> {
        let mut bytes = Zeroizing::new(bytes);
        for newline in [b'\n', b'\r'] {
            if bytes.last() == Some(&newline) {
                bytes.pop();
            }
        }
        Impossible::check(&bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a secret from where it is kept.
    pub fn load(source: &SecretSource) -> Result<Self, SecretError> {
        let (bytes, place) = match source {
            SecretSource::File(path) => {
                let place = path.display().to_string();
                (files::read(path).map_err(|error| SecretError::File(place.clone(), error))?, place)
            }
            SecretSource::Env(name) => {
                let value = std::env::var(name).map_err(|_| SecretError::Variable(name.clone()))?;
                (value.into_bytes(), name.clone())
            }
        };
        Self::new(bytes).map_err(|why| SecretError::Impossible(place, why))
    }

    /// The bytes. Whoever asks must not keep them in a buffer that is not overwritten.
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
    fn a_trailing_newline_is_trimmed_and_debug_shows_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "s3cret\r\n").unwrap();
        let secret = Secret::load(&SecretSource::File(file.path().into())).unwrap();
        assert_eq!(secret.expose(), b"s3cret");
        assert_eq!(format!("{secret:?}"), "Secret");
        std::fs::write(file.path(), "\n").unwrap();
        assert!(Secret::load(&SecretSource::File(file.path().into())).is_err());
    }

    #[test]
    fn what_cannot_be_a_secret_is_told_from_what_can() {
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
            ("s3cret\u{a0}".as_bytes(), Impossible::Blank),
            (b"s3\0cret", Impossible::Unseen),
            (b"s3\x1bcret", Impossible::Unseen),
            ("s3\u{200b}cret".as_bytes(), Impossible::Unseen),
        ] {
            assert_eq!(of(bad), Err(why), "{bad:?}");
        }
    }

    #[test]
    fn a_variable_holds_a_secret_as_well_and_a_missing_one_is_named() {
        let load = |name: &str| Secret::load(&SecretSource::Env(name.to_owned()));
        assert_eq!(load("CARGO_PKG_NAME").unwrap().expose(), b"ccsqm-gateway");
        assert!(load("NO_SUCH_VARIABLE").unwrap_err().to_string().contains("NO_SUCH_VARIABLE"));
    }
}
