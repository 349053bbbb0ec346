//! Why a start is refused though its configuration is good: what `serve` and `check` say of it. The exit code of that, and
//! of an `audit` command that fails.

use std::io;
use std::path::Path;

use ccsqm_gateway::app::BindError;
use ccsqm_gateway::audit::StartError;
use ccsqm_gateway::audit::chain::KeyError;
use serde_json::{Value, json};

use super::BAD_CONFIGURATION;

/// Exit code of what failed and may succeed without anybody's doing: see [`is_lasting`].
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
        let bind = error.downcast_ref::<BindError>().map(|error| error.key.clone());
        let key = bind.or_else(|| key_of(error.downcast_ref()?).map(str::to_owned));
        Self { key, reason: format!("{error:#}"), code: code_of(error) }
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

/// The setting that an error of the audit trail is about.
fn key_of(error: &StartError) -> Option<&'static str> {
    match error {
        StartError::Limit(_) => None,
        StartError::KeyFile(_) => Some("audit.key_file"),
        _ => Some("audit.directory"),
    }
}

/// The exit code of an error of a start, or of an `audit` command.
pub(super) fn code_of(error: &anyhow::Error) -> u8 {
    let is_locked = matches!(error.downcast_ref(), Some(StartError::Locked(_)));
    let may_pass = is_locked || system_error(error).is_some_and(|error| !is_lasting(error));
    if may_pass { FAILED } else { BAD_CONFIGURATION }
}

fn system_error(error: &anyhow::Error) -> Option<&io::Error> {
    if let Some(error) = error.downcast_ref::<BindError>() {
        return Some(&error.error);
    }
    let key = match error.downcast_ref() {
        Some(StartError::Directory(_, error)) => return Some(error),
        Some(StartError::Key(key) | StartError::KeyFile(key)) => Some(key),
        _ => error.downcast_ref(),
    };
    match key {
        Some(KeyError::File(_, error)) => Some(error),
        _ => error.downcast_ref(),
    }
}

/// Whether an operator must change something, such as a limit on the size of files. A full disk, an address that another
/// process has, or that the machine does not have yet: all that may pass, so that a supervisor may try again.
fn is_lasting(error: &io::Error) -> bool {
    use io::ErrorKind::{
        AlreadyExists, FileTooLarge, InvalidFilename, InvalidInput, IsADirectory, NotADirectory, NotFound,
        Other, PermissionDenied, ReadOnlyFilesystem, Unsupported,
    };
    let lasting = [
        AlreadyExists,
        FileTooLarge,
        InvalidFilename,
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

#[cfg(test)]
mod tests {
    use super::*;
    use ErrorKind::{FileTooLarge, NotFound, PermissionDenied, ReadOnlyFilesystem, StorageFull};
    use std::io::ErrorKind;

    #[test]
    fn a_start_and_an_audit_command_agree_whether_something_must_be_changed() {
        for (kind, code) in [
            (NotFound, BAD_CONFIGURATION),
            (PermissionDenied, BAD_CONFIGURATION),
            (ReadOnlyFilesystem, BAD_CONFIGURATION),
            (FileTooLarge, BAD_CONFIGURATION),
            (StorageFull, FAILED),
        ] {
            let of_key = || KeyError::File("key".into(), kind.into());
            let of_trail: [anyhow::Error; 5] = [
                StartError::Directory("trail".into(), kind.into()).into(),
                StartError::Key(of_key()).into(),
                StartError::KeyFile(of_key()).into(),
                anyhow::Error::new(of_key()).context("with a hint"),
                io::Error::from(kind).into(),
            ];
            for error in of_trail {
                assert_eq!(code_of(&error), code, "{error:?}");
            }
        }
    }

    #[test]
    fn a_bad_key_is_told_at_the_setting_that_names_it() {
        let key = |error: StartError| Refusal::of(&error.into()).key;
        let short = || KeyError::Short("key".into());
        assert_eq!(key(StartError::KeyFile(short())).as_deref(), Some("audit.key_file"));
        assert_eq!(key(StartError::Key(short())).as_deref(), Some("audit.directory"), "the control");
    }
}
