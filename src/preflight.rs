//! Pre-flight checks: loads a configuration and checks every file that it names, with the functions that a start uses.
//! So a bad file is reported before a start fails because of it.
//!
//! These checks only read: they create, lock and change nothing. `check`, a start and each reload run them. Binding
//! sockets and locking the trail are not checked here, but by the dry run of a start in [`crate::app`].

mod exposure;

use std::ffi::OsString;
use std::fs::Metadata;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use rustix::fs::Access;

use crate::audit::chain::key_path;
use crate::audit::init;
use crate::audit::init::Absent;
use crate::config::named_files::{FileKind, NO_FILE, NamedFiles};
use crate::config::{Config, ContractSource, IdentityFiles, ListenerTls, Problems, SecretSource};
use crate::connect::{Identity, login};
use crate::contract::Contract;
use crate::files::{MAX_SIZE, access, read_text};
use crate::keyed_hash::Keys;
use crate::secret::{Impossible, Secret, UnusableSecret};
use crate::server::tls::{ListenerTlsError, Tls};
use crate::token::app_key_header;
use crate::{connect, pem};

/// Loads a configuration and checks every file that it names: see [`Config::load`]. Fails with all problems.
pub fn load(
    path: &Path,
    overrides: &[(String, String)],
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Config, Problems> {
    Config::load(path, overrides, environment, &Preflight)
}

/// Loads a configuration within `patience`: see [`Config::load_in_time`]. Fails with all problems.
pub fn load_in_time(
    path: &Path,
    overrides: &[(String, String)],
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    patience: Duration,
) -> Result<Config, Problems> {
    Config::load_in_time(path, overrides, environment, &Preflight, patience)
}

/// Returns the address of the admin listener: see [`Config::admin_address`]. Fails if it cannot be read.
pub fn admin_address(
    path: Option<&Path>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<SocketAddr, Problems> {
    Config::admin_address(path, environment, &Preflight)
}

/// Implements [`NamedFiles`] with the functions that a start uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Preflight;

impl NamedFiles for Preflight {
    fn check(&self, kind: FileKind, path: &Path) -> Result<(), String> {
        match kind {
            FileKind::Roots => roots(path),
            FileKind::Certificates => certificates(path),
            FileKind::PrivateKey => private_key(path),
            // A user who can change these files can get in as a caller, so one that every user can change is refused.
            FileKind::ClientCa => guarded(path, |bytes| pem::certificates(bytes, path)),
            FileKind::ClientCrl => guarded(path, |bytes| pem::revocation_lists(bytes, path)),
            FileKind::Contract => contract(path),
            FileKind::AuditKey => audit_key(path),
            FileKind::ProxyUser => proxy_user(path),
            FileKind::ProxyPassword => self.check_secret(&SecretSource::File(path.to_owned())),
        }
    }

    fn check_secret(&self, source: &SecretSource) -> Result<(), String> {
        read_secret(source).map(drop)
    }

    fn check_app_key(&self, source: &SecretSource) -> Result<(), String> {
        app_key_header(&read_secret(source)?)
            .map(drop)
            .map_err(|_| "holds a character that a header cannot have, such as one beyond ASCII".into())
    }

    fn check_system_roots(&self) -> Result<(), String> {
        connect::roots(None).map(drop).map_err(|error| error.to_string())
    }

    fn check_identity(&self, files: &IdentityFiles) -> Result<(), String> {
        let identity = Identity::load(files.cert_file.clone(), files.key_file.clone());
        identity.map(drop).map_err(|error| error.to_string())
    }

    fn check_listener(&self, tls: &ListenerTls) -> Result<(), (&'static str, String)> {
        let Err(error) = Tls::load(tls) else { return Ok(()) };
        let key = match &error {
            // The error may name several keys; a mistake is reported at one.
            ListenerTlsError::Refused(key, _) if key.ends_with("_file") => {
                key.split(',').next().unwrap_or_default()
            }
            ListenerTlsError::Clients(_) if tls.client_crl_file.is_some() => "client_crl_file",
            ListenerTlsError::Clients(_) => "client_ca_file",
            ListenerTlsError::Mismatch | ListenerTlsError::Pem(_) | ListenerTlsError::Refused(..) => {
                "cert_file"
            }
        };
        Err((key, error.to_string()))
    }

    fn check_audit_directory(
        &self,
        path: &Path,
        key_file: Option<&Path>,
        must_exist: bool,
    ) -> Result<(), String> {
        audit_directory(path, key_file, must_exist)
    }

    fn audit_names(&self, contract: &ContractSource) -> Vec<String> {
        let text = match contract {
            ContractSource::BuiltIn => Ok(Contract::APPOINT_QUALITY_TASK.to_owned()),
            // A contract that cannot be read or compiled is reported by `check`. Here it has no members.
            ContractSource::File(path) => read_text(path),
        };
        let contract = text.ok().and_then(|text| Contract::compile(&text).ok());
        contract.map(|contract| contract.audit_names().map(str::to_owned).collect()).unwrap_or_default()
    }
}

pub use exposure::exposures;

/// The error for a variable that is missing or empty. It does not show the name, which may be the secret itself, pasted
/// by mistake.
const NO_VARIABLE: &str = "the environment has no variable of this name, or it is empty";

/// Checks the user name for a proxy: a secret without a colon, since Basic authentication cannot carry one (RFC 7617
/// section 2).
fn proxy_user(path: &Path) -> Result<(), String> {
    Ok(login::check_user(read_secret(&SecretSource::File(path.to_owned()))?.expose())?)
}

/// Returns a secret. The error shows neither the secret nor its path.
fn read_secret(source: &SecretSource) -> Result<Secret, String> {
    if let SecretSource::File(path) = source {
        nameless_regular(path)?;
    }
    Secret::load(source).map_err(|error| match error {
        UnusableSecret::File(_, error) => format!("cannot be read: {error}"),
        UnusableSecret::Impossible(_, Impossible::Empty) if matches!(source, SecretSource::Env(_)) => {
            NO_VARIABLE.into()
        }
        UnusableSecret::Impossible(_, why) => why.to_string(),
        UnusableSecret::Variable(_) => NO_VARIABLE.into(),
    })
}

/// As [`regular`], but the error does not show the path.
fn nameless_regular(path: &Path) -> Result<(), String> {
    let found = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NO_FILE.to_owned(),
        _ => format!("cannot be read: {error}"),
    })?;
    is_regular(&found)
}

/// Checks PEM roots, and that not every user can change their file.
fn roots(path: &Path) -> Result<(), String> {
    regular(path)?;
    connect::roots(Some(path)).map(drop).map_err(|error| error.to_string())
}

/// Checks the key of the audit chain.
fn audit_key(path: &Path) -> Result<(), String> {
    regular(path)?;
    let found = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    // A user who can replace the key can forge the trail, and so make the gateway send a call twice.
    init::refuse_open(path, &found).map_err(|refused| refused.to_string())?;
    Keys::load(path).map(drop).map_err(|error| error.to_string())
}

/// Checks PEM certificates.
fn certificates(path: &Path) -> Result<(), String> {
    regular(path)?;
    pem::read(path)
        .and_then(|bytes| pem::certificates(&bytes, path))
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Checks the private key of a certificate. The error does not show the path.
fn private_key(path: &Path) -> Result<(), String> {
    nameless_regular(path)?;
    pem::read_key(path).and_then(|bytes| pem::key(&bytes)).map(drop).map_err(|error| error.to_string())
}

/// Checks a file with `parse`, and checks that not every user can change it.
fn guarded<T>(path: &Path, parse: impl Fn(&[u8]) -> Result<T, pem::BadPem>) -> Result<(), String> {
    regular(path)?;
    pem::read_guarded(path).and_then(|bytes| parse(&bytes)).map(drop).map_err(|error| error.to_string())
}

/// Checks a contract by compiling it.
fn contract(path: &Path) -> Result<(), String> {
    regular(path)?;
    let shown = path.display();
    let text = read_text(path).map_err(|error| format!("{shown}: {error}"))?;
    Contract::compile(&text).map(drop).map_err(|error| format!("{shown}: {error}"))
}

/// Checks that the audit directory can be used or created. If `key_file` is `None`, the key of the hash chain in the
/// directory is checked, too.
fn audit_directory(path: &Path, key_file: Option<&Path>, must_exist: bool) -> Result<(), String> {
    let shown = path.display();
    match init::check(path, key_file, must_exist) {
        // A start with `--accept-loss` sets these segments aside (see `audit::loss`). Refusing them here would
        // make that impossible.
        Ok(()) | Err(Absent::KeyOfSegments { .. }) => {}
        Err(absent) => return Err(absent.to_string()),
    }
    match fs::metadata(path) {
        Ok(meta) if !meta.is_dir() => Err(format!("{shown} is not a directory")),
        Ok(_) => {
            let writable = access(path, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK);
            writable.map_err(|error| format!("{shown} cannot be used: {error}"))?;
            let key = key_path(path);
            // Without following a link: a link to nothing is a mistake to report, not a key that is still to be
            // made.
            if key_file.is_some() || key.symlink_metadata().is_err() {
                return Ok(());
            }
            regular(&key)?;
            Keys::load_own(path).map(drop).map_err(|error| error.to_string())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => can_be_made(path),
        Err(error) => Err(format!("{shown}: {error}")),
    }
}

/// Checks that a directory can be created: its nearest existing parent must be a directory in which this process may
/// write.
fn can_be_made(path: &Path) -> Result<(), String> {
    let path = std::path::absolute(path).map_err(|error| error.to_string())?;
    // Without following links, since `mkdir` fails below a link to nothing, and `exists` would pass over it to the
    // parent above.
    let is_there = |parent: &&Path| parent.symlink_metadata().is_ok();
    let Some(parent) = path.ancestors().find(is_there) else { return Ok(()) };
    let fail =
        |reason: String| Err(format!("{} cannot be made: {} {reason}", path.display(), parent.display()));
    if !parent.exists() {
        return fail("is a symbolic link that leads nowhere".into());
    }
    if !parent.is_dir() {
        return fail("is not a directory".into());
    }
    access(parent, Access::WRITE_OK | Access::EXEC_OK).or_else(|error| fail(format!("refuses it: {error}")))
}

/// Checks that a path leads to a regular file. Otherwise reading it could hang (a pipe) or never end (a device).
fn regular(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    is_regular(&meta).map_err(|reason| format!("{shown} {reason}"))
}

/// Checks that a file is a regular one, not empty, and at most [`MAX_SIZE`] bytes long.
fn is_regular(meta: &Metadata) -> Result<(), String> {
    match meta.len() {
        _ if !meta.is_file() => Err("is not a regular file".into()),
        0 => Err("is empty".into()),
        length if length > MAX_SIZE => Err("is larger than 16 MiB".into()),
        _ => Ok(()),
    }
}
