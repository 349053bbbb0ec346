//! Why a start is refused though its configuration is good: what `serve` and `check` say of it, and their exit code.

use std::{io, path::Path};

use ccsqm_gateway::{
    app::BindError,
    audit::{StartError, chain::KeyError},
};
use serde_json::{Value, json};

use super::BAD_CONFIGURATION;

/// Exit code of a refusal that may be over without anybody's doing: see [`is_lasting`].
const FAILED: u8 = 1;

/// Why a start is refused.
pub(super) struct Refusal {
    /// What it is about, if that is a setting.
    key: Option<String>,
    reason: String,
    pub(super) code: u8,
}

impl Refusal {
    /// Of an error of [`ccsqm_gateway::app::App`].
    pub(super) fn of(error: &anyhow::Error) -> Self {
        let bind = error
            .downcast_ref::<BindError>()
            .map(|error| (Some(error.key.clone()), is_lasting(&error.error)));
        let start = error.downcast_ref::<StartError>().map(of_trail);
        let system = error.downcast_ref::<io::Error>().map(|error| (None, is_lasting(error)));
        let (key, is_lasting) = bind.or(start).or(system).unwrap_or((None, true));
        let code = if is_lasting { BAD_CONFIGURATION } else { FAILED };
        Self { key, reason: format!("{error:#}"), code }
    }

    /// In one line.
    pub(super) fn line(&self, file: &Path) -> String {
        match &self.key {
            Some(key) => format!("{}: {key}: {}", file.display(), self.reason),
            None => format!("ccsqm-gateway: {}", self.reason), // no setting is wrong
        }
    }

    pub(super) fn to_json(&self) -> Value {
        json!({ "key": self.key, "reason": self.reason })
    }
}

fn of_trail(error: &StartError) -> (Option<String>, bool) {
    let is_lasting = match error {
        StartError::Directory(_, error) | StartError::Key(KeyError::File(_, error)) => is_lasting(error),
        StartError::Locked(_) => false,
        StartError::Key(KeyError::Short(_))
        | StartError::Newer(..)
        | StartError::Absent(_)
        | StartError::Limit(_) => true,
    };
    let key = if matches!(error, StartError::Limit(_)) { None } else { Some("audit.directory".to_owned()) };
    (key, is_lasting)
}

/// Whether an operator must change something. A full disk, an address that another process has, or that the machine does
/// not have yet: all that may pass, so that a supervisor may try again.
fn is_lasting(error: &io::Error) -> bool {
    use io::ErrorKind::{
        AlreadyExists, InvalidInput, IsADirectory, NotADirectory, NotFound, Other, PermissionDenied,
        ReadOnlyFilesystem, Unsupported,
    };
    let lasting = [
        AlreadyExists,
        InvalidInput,
        IsADirectory,
        NotADirectory,
        NotFound,
        Other,
        PermissionDenied,
        ReadOnlyFilesystem,
        Unsupported,
    ];
    lasting.contains(&error.kind())
}
