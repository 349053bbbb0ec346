//! What the files that a configuration names must be, so that a start does not fail on them. Looks only: makes,
//! locks and changes nothing.

use std::{
    fs::{self, Metadata},
    io,
    path::Path,
};

use rustix::fs::{Access, access};

use super::{ContractSource, Route, SecretSource};
use crate::{
    audit::{
        chain::key_path,
        init::{self, Absent},
    },
    connect::{self, login},
    contract::Contract,
    files::{MAX_SIZE, read_text},
    keyed_hash::Keys,
    pem,
    secret::{Impossible, Secret, SecretError},
    token::app_key_header,
};

/// Where the configuration may hold the secret itself instead of a path, the folder alone is told: see `parse`.
pub(super) const NO_FILE: &str = "there is no such file";

const NO_VARIABLE: &str = "the environment has no variable of this name, or it is empty";

/// A secret. Its place is not told: somebody may have put the secret itself there.
pub(super) fn secret(source: &SecretSource) -> Result<(), String> {
    read_secret(source).map(drop)
}

/// An app key: a secret that a header can hold.
pub(super) fn app_key(source: &SecretSource) -> Result<(), String> {
    app_key_header(&read_secret(source)?)
        .map(drop)
        .map_err(|_| "holds a character that a header cannot have, such as one beyond ASCII".into())
}

/// The user of a proxy.
pub(super) fn proxy_user(path: &Path) -> Result<(), String> {
    Ok(login::check_user(read_secret(&SecretSource::File(path.to_owned()))?.expose())?)
}

/// The password of a proxy.
pub(super) fn proxy_password(path: &Path) -> Result<(), String> {
    secret(&SecretSource::File(path.to_owned()))
}

fn read_secret(source: &SecretSource) -> Result<Secret, String> {
    if let SecretSource::File(path) = source {
        nameless_regular(path)?;
    }
    Secret::load(source).map_err(|error| match error {
        SecretError::File(_, error) => format!("cannot be read: {error}"),
        SecretError::Impossible(_, Impossible::Empty) if matches!(source, SecretSource::Env(_)) => {
            NO_VARIABLE.into()
        }
        SecretError::Impossible(_, why) => why.to_string(),
        SecretError::Variable(_) => NO_VARIABLE.into(),
    })
}

/// The same as [`regular`], but the path is not told.
fn nameless_regular(path: &Path) -> Result<(), String> {
    let found = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NO_FILE.to_owned(),
        _ => format!("cannot be read: {error}"),
    })?;
    is_regular(&found)
}

/// PEM roots, in a file that not every user can change.
pub(super) fn roots(path: &Path) -> Result<(), String> {
    regular(path)?;
    connect::roots(Some(path)).map(drop).map_err(|error| error.to_string())
}

/// The system's roots.
pub(super) fn system_roots() -> Result<(), String> {
    connect::roots(None).map(drop).map_err(|error| error.to_string())
}

/// The audit chain's key.
pub(super) fn audit_key(path: &Path) -> Result<(), String> {
    regular(path)?;
    let found = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    init::refuse_open(path, &found).map_err(|refused| refused.to_string())?;
    Keys::load(path).map(drop).map_err(|error| error.to_string())
}

/// Certificates.
pub(super) fn certificates(path: &Path) -> Result<(), String> {
    regular(path)?;
    pem::read(path)
        .and_then(|bytes| pem::certificates(&bytes, path))
        .map(drop)
        .map_err(|error| error.to_string())
}

/// The key of a certificate.
pub(super) fn private_key(path: &Path) -> Result<(), String> {
    nameless_regular(path)?;
    pem::read_key(path).and_then(|bytes| pem::key(&bytes)).map(drop).map_err(|error| error.to_string())
}

/// The CAs of callers' certificates.
pub(super) fn client_ca(path: &Path) -> Result<(), String> {
    guarded(path, |bytes| pem::certificates(bytes, path))
}

/// Revocation lists of callers' certificates.
pub(super) fn client_crl(path: &Path) -> Result<(), String> {
    guarded(path, |bytes| pem::revocation_lists(bytes, path))
}

fn guarded<T>(path: &Path, parse: impl Fn(&[u8]) -> Result<T, pem::PemError>) -> Result<(), String> {
    regular(path)?;
    pem::read_guarded(path).and_then(|bytes| parse(&bytes)).map(drop).map_err(|error| error.to_string())
}

/// A contract.
pub(super) fn contract(path: &Path) -> Result<(), String> {
    regular(path)?;
    let shown = path.display();
    let text = read_text(path).map_err(|error| format!("{shown}: {error}"))?;
    Contract::compile(&text).map(drop).map_err(|error| format!("{shown}: {error}"))
}

/// What a route's contract has in the audit trail; nothing of one that is told to be bad elsewhere.
pub(super) fn audit_names(route: &Route) -> Vec<String> {
    let text = match &route.contract {
        ContractSource::BuiltIn => Ok(Contract::APPOINT_QUALITY_TASK.to_owned()),
        ContractSource::File(path) => read_text(path),
    };
    let contract = text.ok().and_then(|text| Contract::compile(&text).ok());
    contract.map(|contract| contract.audit_names().map(str::to_owned).collect()).unwrap_or_default()
}

/// The audit directory: usable, or such that it can be made. Without a key file the chain's key lies in it.
pub(super) fn audit_directory(path: &Path, key_file: Option<&Path>, must_exist: bool) -> Result<(), String> {
    let shown = path.display();
    match init::check(path, key_file, must_exist) {
        // A start can be told to accept that: see `audit::loss`.
        Ok(()) | Err(Absent::KeyOfSegments { .. }) => {}
        Err(absent) => return Err(absent.to_string()),
    }
    match fs::metadata(path) {
        Ok(meta) if !meta.is_dir() => Err(format!("{shown} is not a directory")),
        Ok(_) => {
            let writable = access(path, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK);
            writable.map_err(|error| format!("{shown} cannot be used: {}", io::Error::from(error)))?;
            let key = key_path(path);
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

fn can_be_made(path: &Path) -> Result<(), String> {
    let path = std::path::absolute(path).map_err(|error| error.to_string())?;
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
    access(parent, Access::WRITE_OK | Access::EXEC_OK)
        .or_else(|error| fail(format!("refuses it: {}", io::Error::from(error))))
}

/// Nothing that a read could hang on, or never end on.
pub(super) fn regular(path: &Path) -> Result<(), String> {
    let shown = path.display();
    let meta = fs::metadata(path).map_err(|error| format!("{shown} cannot be read: {error}"))?;
    is_regular(&meta).map_err(|reason| format!("{shown} {reason}"))
}

fn is_regular(meta: &Metadata) -> Result<(), String> {
    match meta.len() {
        _ if !meta.is_file() => Err("is not a regular file".into()),
        0 => Err("is empty".into()),
        length if length > MAX_SIZE => Err("is larger than 16 MiB".into()),
        _ => Ok(()),
    }
}
