//! What other users of the machine can read or change, of the files that a configuration names.
//!
//! Whoever can change the trail or its key can make the gateway send a task twice, so that is refused: see
//! [`crate::audit::init`]. The rest is told and not refused: volumes come with modes that nobody chose.

use std::{
    collections::HashSet,
    fs::{self, Metadata},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

use super::{Config, SecretSource};
use crate::audit::{chain::key_path, init::is_open_to_all};

/// Permission bits.
const OTHERS_READ: u32 = 0o004;
const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITE: u32 = 0o020;

/// A key with fewer different bytes was typed, not drawn: 32 random hex digits have fewer once in billions.
const FEW_BYTES: usize = 8;

impl Config {
    /// What other users can read or change though they should not, and a key that can be guessed: a line each. `file` is
    /// the configuration's own.
    pub fn exposures(&self, file: &Path) -> Vec<String> {
        let key = self.audit.key_file.clone().unwrap_or_else(|| key_path(&self.audit.directory));
        let of_key_file = if self.audit.key_file.is_some() { "audit.key_file" } else { "audit.directory" };
        let mut told = of_file(file);
        let secrets: Vec<_> = self.secret_files().collect();
        for (name, path) in
            secrets.iter().map(|(name, path)| (name.as_str(), *path)).chain([(of_key_file, &*key)])
        {
            told.extend(of_secret(name, path));
        }
        told.extend(of_directory(&self.audit.directory));
        told.extend(of_key(of_key_file, &key));
        let paths = secrets.iter().map(|(_, path)| *path).chain([file, &*key, &*self.audit.directory]);
        told.extend(of_folders(paths));
        told
    }

    /// The files that hold secrets, but for the audit key.
    fn secret_files(&self) -> impl Iterator<Item = (String, &Path)> {
        let credentials = self.credentials.iter().enumerate().flat_map(|(i, credential)| {
            [("app_key_file", &credential.app_key), ("app_secret_file", &credential.app_secret)].map(
                |(key, source)| match source {
                    SecretSource::File(path) => Some((format!("credentials[{i}].{key}"), &**path)),
                    SecretSource::Env(_) => None,
                },
            )
        });
        let listeners = self.listeners.iter().enumerate().map(|(i, listener)| {
            let tls = listener.tls.as_ref()?;
            Some((format!("listeners[{i}].tls.key_file"), &*tls.key_file))
        });
        let upstream = self.upstream.identity.iter();
        let upstream = upstream.map(|it| Some(("upstream.client_key_file".to_owned(), &*it.key_file)));
        credentials.chain(listeners).chain(upstream).flatten()
    }
}

fn of_file(file: &Path) -> Vec<String> {
    let found = fs::metadata(file).ok().filter(|found| found.is_file() && found.mode() & OTHERS_WRITE != 0);
    found
        .map(|found| {
            format!("every user can change {0} (mode {1}): chmod o-w {0}", file.display(), mode(&found))
        })
        .into_iter()
        .collect()
}

fn of_secret(name: &str, path: &Path) -> Option<String> {
    let found = fs::metadata(path).ok()?;
    let can = match (found.mode() & OTHERS_READ != 0, found.mode() & OTHERS_WRITE != 0) {
        (true, true) => "read and change",
        (true, false) => "read",
        (false, true) => "change",
        (false, false) => return None,
    };
    Some(format!(
        "{name}: every user can {can} {0} (mode {1}): chmod o-rwx {0}",
        path.display(),
        mode(&found)
    ))
}

fn of_directory(path: &Path) -> Option<String> {
    let found = fs::metadata(path).ok()?;
    let (mode, path) = (mode(&found), path.display());
    match found.mode() {
        bits if bits & OTHERS_WRITE != 0 => Some(format!(
            "audit.directory: every user can make files in {path} (mode {mode}): chmod o-w {path}"
        )),
        bits if bits & GROUP_WRITE != 0 => Some(format!(
            "audit.directory: whoever is of group {} can change the trail in {path} (mode {mode}): chmod g-w {path}, unless \
             the group is the gateway's own, as with fsGroup",
            found.gid()
        )),
        _ => None,
    }
}

fn of_key(name: &str, path: &Path) -> Option<String> {
    let bytes =
        Zeroizing::new(fs::metadata(path).ok().filter(Metadata::is_file).and_then(|_| fs::read(path).ok())?);
    let different = bytes.iter().collect::<HashSet<_>>().len();
    (different < FEW_BYTES).then(|| {
        format!(
            "{name}: {} has only {different} different bytes, so that it can be guessed, and the trail forged. Make one \
             with `head -c 32 /dev/urandom`, for a new trail",
            path.display()
        )
    })
}

/// Whoever can change a folder can put something else in the place of what lies in it.
fn of_folders<'a>(paths: impl Iterator<Item = &'a Path>) -> Vec<String> {
    let mut told: Vec<PathBuf> = Vec::new();
    let mut lines = Vec::new();
    for path in paths {
        // Where it is named, and where it lies.
        let whole = std::path::absolute(path).ok();
        for folder in [whole, fs::canonicalize(path).ok()]
            .into_iter()
            .flatten()
            .filter_map(|path| Some(path.parent()?.to_owned()))
        {
            let Ok(found) = fs::metadata(&folder) else { continue };
            if !is_open_to_all(&found) || told.contains(&folder) {
                continue;
            }
            lines.push(format!(
                "every user can replace {} (the folder has mode {}): chmod o-w {}",
                path.display(),
                mode(&found),
                folder.display()
            ));
            told.push(folder);
        }
    }
    lines
}

fn mode(found: &Metadata) -> String {
    format!("{:04o}", found.permissions().mode() & 0o7777)
}
