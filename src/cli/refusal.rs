//! The message and exit code of a start that is refused though its configuration is good; and the exit code of a failed `audit`
//! command.
//!
//! `serve` and `check` share it, so that they say the same. The exit code decides whether a supervisor tries again: 1 for what
//! may pass, 78 for what an operator must change.

use std::io;
use std::path::Path;

use ccsqm_gateway::app::BindError;
use ccsqm_gateway::audit::OpenError;
use ccsqm_gateway::audit::chain::KeyError;
use serde_json::{Value, json};

use super::BAD_CONFIGURATION;

/// The exit code of a failure that may pass by itself: see [`is_lasting`].
const FAILED: u8 = 1;

/// The reason why a start is refused.
pub(super) struct StartRefusal {
    /// The key of the setting that it is about, if there is one.
    key: Option<String>,
    reason: String,
    pub(super) code: u8,
}

impl StartRefusal {
    /// Returns the refusal for an error of [`ccsqm_gateway::app::App`].
    pub(super) fn of(error: &anyhow::Error) -> Self {
        let bind = error.downcast_ref::<BindError>().map(|error| error.key.clone());
        let key = bind.or_else(|| key_of(error.downcast_ref()?).map(str::to_owned));
        Self { key, reason: format!("{error:#}"), code: code_of(error) }
    }

    /// Returns the refusal as one line. `file` is that of the configuration.
    pub(super) fn line(&self, file: &Path) -> String {
        match &self.key {
            Some(key) => format!("{}: {key}: {}", file.display(), self.reason),
            // No setting is wrong, so the file must not be blamed.
            None => format!("ccsqm-gateway: {}", self.reason),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        json!({ "key": self.key, "reason": self.reason })
    }
}

/// Returns the key of the setting that an error of the audit trail is about.
fn key_of(error: &OpenError) -> Option<&'static str> {
    match error {
        // The limit on the size of files is the process's (`ulimit -f`), and no setting of the configuration.
        OpenError::Limit(_) => None,
        OpenError::KeyFile(_) => Some("audit.key_file"),
        _ => Some("audit.directory"),
    }
}

/// Returns the exit code of an error of a start, or of an `audit` command.
pub(super) fn code_of(error: &anyhow::Error) -> u8 {
    // The gateway that holds the trail may stop at any moment, as in a restart.
    let is_locked = matches!(error.downcast_ref(), Some(OpenError::Locked(_)));
    let may_pass = is_locked || system_error(error).is_some_and(|error| !is_lasting(error));
    if may_pass { FAILED } else { BAD_CONFIGURATION }
}

/// Returns the error of the operating system in an error, if it has one.
fn system_error(error: &anyhow::Error) -> Option<&io::Error> {
    if let Some(error) = error.downcast_ref::<BindError>() {
        return Some(&error.error);
    }
    let key = match error.downcast_ref() {
        Some(OpenError::Directory(_, error)) => return Some(error),
        Some(OpenError::Key(key) | OpenError::KeyFile(key)) => Some(key),
        _ => error.downcast_ref(),
    };
    match key {
        Some(KeyError::File(_, error)) => Some(error),
        _ => error.downcast_ref(),
    }
}

/// Whether an operator must change something, such as a limit on the size of files. False for what may pass: a full disk, an
/// address that another process uses, or that the machine does not have yet.
// With 78 systemd does not restart the unit. The list has the lasting kinds, so that an unforeseen one is tried again: a restart
// too many does less harm than a gateway that stays down.
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
    fn start_and_audit_commands_map_an_error_to_the_same_exit_code() {
        for (kind, code) in [
            (NotFound, BAD_CONFIGURATION),
            (PermissionDenied, BAD_CONFIGURATION),
            (ReadOnlyFilesystem, BAD_CONFIGURATION),
            (FileTooLarge, BAD_CONFIGURATION),
            // The control: the one of these that passes.
            (StorageFull, FAILED),
        ] {
            let of_key = || KeyError::File("key".into(), kind.into());
            let of_trail: [anyhow::Error; 5] = [
                OpenError::Directory("trail".into(), kind.into()).into(),
                OpenError::Key(of_key()).into(),
                OpenError::KeyFile(of_key()).into(),
                anyhow::Error::new(of_key()).context("with a hint"),
                io::Error::from(kind).into(),
            ];
            for error in of_trail {
                assert_eq!(code_of(&error), code, "{error:?}");
            }
        }
    }

    #[test]
    fn bad_key_is_reported_at_the_setting_that_names_it() {
        let key = |error: OpenError| StartRefusal::of(&error.into()).key;
        let short = || KeyError::Short("key".into());
        assert_eq!(key(OpenError::KeyFile(short())).as_deref(), Some("audit.key_file"));
        assert_eq!(key(OpenError::Key(short())).as_deref(), Some("audit.directory"), "the control");
    }
}
