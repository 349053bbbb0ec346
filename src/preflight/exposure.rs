//! Review of file permissions: what other users of the machine can read or change of the files that a configuration
//! names.
//!
//! A user who can change the trail or its key can make the gateway send a call twice. So a start refuses a trail or a
//! key that every user can change (see [`crate::audit::init`]). Everything else is only a warning: volumes often come
//! with modes that no operator chose.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::fs::Metadata;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::process::geteuid;
use zeroize::Zeroizing;

use crate::audit::chain::key_path;
use crate::config::{Config, Control, ListenAddress};
use crate::files::is_open_to_all;
use crate::{files, ids};

/// Permission bits of `st_mode` (inode(7)).
const OTHERS_READ: u32 = 0o004;
const OTHERS_WRITE: u32 = 0o002;
const GROUP_WRITE: u32 = 0o020;

/// A key with fewer different bytes than this was probably typed, and not generated at random. Of random keys of 32 hex
/// digits, one in 28 million has fewer; a random key of 32 bytes practically never has.
const FEW_BYTES: usize = 8;

/// A path, the setting that names it, and what to check about it.
struct Named<'a> {
    setting: String,
    path: &'a Path,
    what: What,
}

#[derive(Clone, Copy, PartialEq, Eq)]
/// What is checked about a path.
enum What {
    /// A file that others must neither read nor change.
    Secret,
    /// A file that others must not change.
    Plain,
    /// A path of which only the directories that lead to it are checked.
    OnlyFolders,
}

/// Returns the warnings: one for each file or directory that other users can read or change but should not, and one for
/// an audit key that can be guessed. `file` is the configuration file. A path that cannot be checked gives no warning.
pub fn exposures(config: &Config, file: &Path) -> Vec<String> {
    let key = config.audit.key_file.clone().unwrap_or_else(|| key_path(&config.audit.directory));
    let of_key_file = if config.audit.key_file.is_some() { "audit.key_file" } else { "audit.directory" };
    let mut named = vec![Named { setting: "--config".into(), path: file, what: What::Plain }];
    name_files(config, &mut named);
    named.push(Named { setting: of_key_file.into(), path: &key, what: What::Secret });
    let mut warnings = of_files(&named);
    warnings.extend(of_directory(&config.audit.directory));
    warnings.extend(of_key(of_key_file, &key));
    warnings.extend(of_folders(&named));
    warnings.extend(of_owners(&named, &config.audit.directory));
    warnings
}

/// Adds all paths that the settings name, except that of the audit key.
fn name_files<'a>(config: &'a Config, named: &mut Vec<Named<'a>>) {
    let mut name = |setting: String, path: Option<&'a Path>, what| {
        named.extend(path.map(|path| Named { setting, path, what }));
    };
    for (i, credential) in config.credentials.iter().enumerate() {
        for (key, path) in
            [("app_key_file", &credential.app_key_file), ("app_secret_file", &credential.app_secret_file)]
        {
            name(format!("credentials[{i}].{key}"), path.as_deref(), What::Secret);
        }
    }
    for (i, listener) in config.listeners.iter().enumerate() {
        if let ListenAddress::Unix { path, .. } = &listener.address {
            name(format!("listeners[{i}].address"), Some(path), What::OnlyFolders);
        }
        let Some(tls) = &listener.tls else { continue };
        name(format!("listeners[{i}].tls.key_file"), Some(&tls.key_file), What::Secret);
        for (key, path) in [
            ("cert_file", Some(&*tls.cert_file)),
            ("client_ca_file", tls.client_ca_file.as_deref()),
            ("client_crl_file", tls.client_crl_file.as_deref()),
        ] {
            name(format!("listeners[{i}].tls.{key}"), path, What::Plain);
        }
    }
    let upstream = &config.upstream;
    for (key, path, what) in [
        ("ca_file", &upstream.ca_file, What::Plain),
        ("client_cert_file", &upstream.client_cert_file, What::Plain),
        ("client_key_file", &upstream.client_key_file, What::Secret),
        ("proxy_user_file", &upstream.proxy_user_file, What::Secret),
        ("proxy_password_file", &upstream.proxy_password_file, What::Secret),
    ] {
        name(format!("upstream.{key}"), path.as_deref(), what);
    }
    for route in &config.routes {
        let setting = format!("contract_file of the route {}", route.name);
        name(setting, route.contract_file.as_deref(), What::Plain);
    }
    if let Control::Path(path) = &config.admin.control {
        name("admin.control".into(), Some(path), What::OnlyFolders);
    }
    name("audit.directory".into(), Some(&config.audit.directory), What::OnlyFolders);
}

/// Returns a warning for each file with a wrong mode. A file that several settings name gets one warning.
fn of_files(named: &[Named<'_>]) -> Vec<String> {
    let mut files: Vec<&Path> = Vec::new();
    for one in named.iter().filter(|one| one.what != What::OnlyFolders) {
        if !files.contains(&one.path) {
            files.push(one.path);
        }
    }
    let line = |path: &Path| {
        let of_path = || named.iter().filter(|one| one.what != What::OnlyFolders && one.path == path);
        // The stricter use counts: a file may hold a certificate and its key.
        let is_secret = of_path().any(|one| one.what == What::Secret);
        of_file(&settings(of_path()), path, is_secret)
    };
    files.into_iter().filter_map(line).collect()
}

/// Returns the settings, each once, separated by commas.
fn settings<'a>(named: impl Iterator<Item = &'a Named<'a>>) -> String {
    let mut settings: Vec<&str> = Vec::new();
    for one in named {
        if !settings.contains(&&*one.setting) {
            settings.push(&one.setting);
        }
    }
    settings.join(", ")
}

/// Returns the warning for one file, if others can read or change it. Group bits do not count: a group is
/// an operator's choice, and Kubernetes' fsGroup sets them.
fn of_file(settings: &str, path: &Path, is_secret: bool) -> Option<String> {
    let found = fs::metadata(path).ok().filter(Metadata::is_file)?;
    let bits = found.mode();
    let can = match (is_secret && bits & OTHERS_READ != 0, bits & OTHERS_WRITE != 0) {
        (true, true) => "read and change",
        (true, false) => "read",
        (false, true) => "change",
        (false, false) => return None,
    };
    let take = if is_secret { "o-rwx" } else { "o-w" };
    let (mode, path) = (mode(&found), path.display());
    Some(format!("{settings}: every user can {can} {path} (mode {mode}): chmod {take} {path}"))
}

/// Returns the warning for the audit directory. Its group counts, since its members can replace segments.
fn of_directory(path: &Path) -> Option<String> {
    let found = fs::metadata(path).ok()?;
    let (mode, path) = (mode(&found), path.display());
    match found.mode() {
        bits if bits & OTHERS_WRITE != 0 => Some(format!(
            "audit.directory: every user can make files in {path} (mode {mode}): chmod o-w {path}"
        )),
        bits if bits & GROUP_WRITE != 0 => Some(format!(
            "audit.directory: every member of group {} can change the trail in {path} (mode {mode}): chmod g-w {path}, \
             unless the group is the gateway's own, as with fsGroup",
            found.gid()
        )),
        _ => None,
    }
}

/// Returns a warning if the key can be guessed.
fn of_key(name: &str, path: &Path) -> Option<String> {
    // Zeroised on drop, as everywhere else where a key is in memory.
    let bytes = Zeroizing::new(files::read(path).ok()?);
    let different = bytes.iter().collect::<HashSet<_>>().len();
    (different < FEW_BYTES).then(|| {
        format!(
            "{name}: {} has only {different} different bytes, so it can be guessed, and the trail can be forged. For a \
             new trail, make a key with `head -c 32 /dev/urandom`",
            path.display()
        )
    })
}

/// Returns a warning for each directory that every user can change and that leads to a path of `named`. Whoever can
/// change a directory can replace what is in it, whatever the modes of the files.
fn of_folders(named: &[Named<'_>]) -> Vec<String> {
    let mut folders: Vec<(PathBuf, Vec<&Named<'_>>)> = Vec::new();
    for one in named {
        for folder in Way::to(one.path).folders {
            match folders.iter_mut().find(|(known, _)| *known == folder) {
                Some((_, known)) => known.push(one),
                None => folders.push((folder, vec![one])),
            }
        }
    }
    let line = |(folder, named): (PathBuf, Vec<&Named<'_>>)| {
        // A sticky directory such as /tmp passes: there, only the owner of a file can replace it.
        let found = fs::metadata(&folder).ok().filter(is_open_to_all)?;
        let (settings, mode, folder) = (settings(named.into_iter()), mode(&found), folder.display());
        Some(format!(
            "{settings}: every user can replace the file or directory, since the folder {folder} has mode {mode}: chmod \
             o-w {folder}"
        ))
    };
    folders.into_iter().filter_map(line).collect()
}

/// Returns a warning for each user who owns a file or a directory of a path in `named`, and is neither root nor the
/// user of the gateway. An owner can change a file or a directory, whatever its mode.
///
/// The user of this process counts as that of the gateway. If that is root, so does the owner of the audit directory.
/// If root runs this without an audit directory, there are no warnings: it is then unknown which user the gateway will
/// have.
fn of_owners(named: &[Named<'_>], directory: &Path) -> Vec<String> {
    let own = geteuid().as_raw();
    let of_trail = fs::metadata(directory).ok().map(|found| found.uid());
    if own == 0 && of_trail.is_none() {
        return Vec::new();
    }
    let is_trusted = |uid: u32| uid == 0 || uid == own || (own == 0 && of_trail == Some(uid));
    let mut owners: BTreeMap<u32, (Vec<&Named<'_>>, Vec<PathBuf>)> = BTreeMap::new();
    for one in named {
        let Way { folders, links, end } = Way::to(one.path);
        for path in folders
            .into_iter()
            .chain(links)
            .chain((one.what != What::OnlyFolders && end.is_file()).then_some(end))
        {
            let Ok(found) = fs::symlink_metadata(&path) else { continue };
            // An id that is not mapped may be anybody's, root's included. A read-only mount cannot be changed
            // here, whoever owns the files: Kubernetes mounts secrets like this.
            if is_trusted(found.uid()) || ids::users().is_nobody(found.uid()) || is_read_only(&path) {
                continue;
            }
            let (settings, paths) = owners.entry(found.uid()).or_default();
            settings.push(one);
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    let line = |(uid, (named, paths)): (u32, (Vec<&Named<'_>>, Vec<PathBuf>))| {
        let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        format!(
            "{}: user {uid}, who is neither root nor the gateway's own, can change the file or directory, since {uid} \
             owns {}: chown it",
            settings(named.into_iter()),
            paths.join(", ")
        )
    };
    owners.into_iter().map(line).collect()
}

/// Whether the path is on a file system that is mounted read-only. `false` if that is unknown.
fn is_read_only(path: &Path) -> bool {
    statvfs(path).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::RDONLY))
}

/// The directories and links that the kernel visits to resolve a path (path_resolution(7)).
#[derive(Default)]
struct Way {
    /// All directories in which a name is looked up, symbolic links resolved.
    folders: Vec<PathBuf>,
    /// The symbolic links that are in a directory where every user can create files. Even if it is sticky, the owner of
    /// a link can replace it.
    links: Vec<PathBuf>,
    /// The path without links.
    end: PathBuf,
}

impl Way {
    /// Resolves a path link by link. `canonicalize` would return only the end, but each directory on the way counts.
    fn to(path: &Path) -> Self {
        /// The number of links after which Linux fails with `ELOOP` (path_resolution(7)).
        const MAX_LINKS: usize = 40;
        let mut way = Self { end: "/".into(), ..Self::default() };
        let Ok(path) = std::path::absolute(path) else { return way };
        let parts =
            |path: &Path| path.components().rev().map(|it| it.as_os_str().to_owned()).collect::<Vec<_>>();
        let mut rest = parts(&path);
        let mut links = 0;
        while let Some(part) = rest.pop() {
            if part == "/" {
                way.end = "/".into();
                continue;
            }
            // `end` has no links, so its parent is the directory that the kernel goes to.
            if part == ".." {
                way.end.pop();
                continue;
            }
            if !way.folders.contains(&way.end) {
                way.folders.push(way.end.clone());
            }
            let next = way.end.join(&part);
            match fs::read_link(&next) {
                Ok(target) if links < MAX_LINKS => {
                    links += 1;
                    if fs::metadata(&way.end).is_ok_and(|found| found.mode() & OTHERS_WRITE != 0) {
                        way.links.push(next);
                    }
                    rest.extend(parts(&target));
                }
                _ => way.end = next,
            }
        }
        way
    }
}

fn mode(found: &Metadata) -> String {
    format!("{:04o}", found.permissions().mode() & 0o7777)
}
