//! Secrets in zeroised buffers: not printable, not serialisable.

pub mod needles;

use std::{fmt, io};

use thiserror::Error;
use zeroize::Zeroizing;

use crate::{config::SecretSource, files};

/// A secret's bytes, overwritten on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

/// Why a secret could not be read. Names the place, never the content.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The file could not be read.
    #[error("{0}: {1}")]
    File(String, io::Error),
    /// There is nothing in it.
    #[error("{0} is empty")]
    Empty(String),
    /// The variable is not set.
    #[error("the environment has no variable {0}")]
    Variable(String),
}

impl Secret {
    /// Reads a secret from where it is kept. The trailing newline of a file is not part of it.
    pub fn load(source: &SecretSource) -> Result<Self, SecretError> {
        let (mut bytes, place) = match source {
            SecretSource::File(path) => {
                let place = path.display().to_string();
                let bytes = files::read(path).map_err(|error| SecretError::File(place.clone(), error))?;
                (Zeroizing::new(bytes), place)
            }
            SecretSource::Env(name) => {
                let value = std::env::var(name).map_err(|_| SecretError::Variable(name.clone()))?;
                (Zeroizing::new(value.into_bytes()), name.clone())
            }
        };
        for newline in [b'\n', b'\r'] {
            if bytes.last() == Some(&newline) {
                bytes.pop();
            }
        }
        if bytes.is_empty() { Err(SecretError::Empty(place)) } else { Ok(Self(bytes)) }
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
    fn a_variable_holds_a_secret_as_well_and_a_missing_one_is_named() {
        let load = |name: &str| Secret::load(&SecretSource::Env(name.to_owned()));
        assert_eq!(load("CARGO_PKG_NAME").unwrap().expose(), b"ccsqm-gateway");
        assert!(load("NO_SUCH_VARIABLE").unwrap_err().to_string().contains("NO_SUCH_VARIABLE"));
    }
}
