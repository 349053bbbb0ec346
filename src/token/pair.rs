//! A credential's app key and app secret, loaded together and checked for what a request can carry.
//!
//! Whether the cloud accepts them is not checked here: only a fetch shows that.

use http::HeaderValue;
use thiserror::Error;

use crate::config::SecretSource;
use crate::secret::{Secret, UnusableSecret};

/// Where the app key and the app secret are stored, in this order.
pub(super) type Sources = (SecretSource, SecretSource);

/// Why a pair cannot be used. The text names the file or variable, never its content.
#[derive(Debug, Error)]
pub enum BadPair {
    /// A part could not be read, or cannot be a secret.
    #[error(transparent)]
    Secret(#[from] UnusableSecret),
    /// The app key has characters that a header value cannot have.
    #[error("the app key holds characters that a header cannot hold")]
    AppKey,
}

/// An app key and an app secret that a request can carry. Has no `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct AppKeyPair {
    pub(super) app_key: Secret,
    pub(super) app_secret: Secret,
    /// The app key as the value of `x-app-key`, marked sensitive.
    pub(super) header: HeaderValue,
}

impl AppKeyPair {
    /// Reads both parts. Blocks on files, so it runs on a thread of its own once the gateway serves.
    pub(super) fn load((app_key, app_secret): &Sources) -> Result<Self, BadPair> {
        let (app_key, app_secret) = (Secret::load(app_key)?, Secret::load(app_secret)?);
        let header = header(&app_key)?;
        Ok(Self { app_key, app_secret, header })
    }
}

/// Returns an app key as the value of `x-app-key`, marked sensitive. Fails if it has characters that a header value cannot have.
pub(crate) fn header(app_key: &Secret) -> Result<HeaderValue, BadPair> {
    // Bytes beyond ASCII have no agreed encoding in a header (RFC 9110, section 5.5), so each server could read another key. The
    // error says so at the start, before the cloud refuses the key and counts a failed try.
    let bytes = Some(app_key.expose()).filter(|bytes| bytes.is_ascii()).ok_or(BadPair::AppKey)?;
    let mut header = HeaderValue::from_bytes(bytes).map_err(|_| BadPair::AppKey)?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use tempfile::TempDir;

    use super::*;
    use crate::file_watch::{FileChange, FileWatch};

    fn sources(folder: &Path) -> Sources {
        let file = |name: &str| SecretSource::File(folder.join(name));
        (file("app_key"), file("app_secret"))
    }

    fn write(folder: &Path, key: &str, secret: &str) {
        fs::write(folder.join("app_key"), key).unwrap();
        fs::write(folder.join("app_secret"), secret).unwrap();
    }

    type Secrets = FileWatch<AppKeyPair, BadPair>;

    fn watch(sources: Sources) -> Secrets {
        let pair = AppKeyPair::load(&sources).unwrap();
        let files = [&sources.0, &sources.1].map(|source| match source {
            SecretSource::File(path) => path.clone(),
            SecretSource::Env(_) => unreachable!(),
        });
        FileWatch::new(files.into(), move || AppKeyPair::load(&sources), pair)
    }

    fn watch_files(key: &str, secret: &str) -> (TempDir, Secrets) {
        let folder = TempDir::new().unwrap();
        write(folder.path(), key, secret);
        let secrets = watch(sources(folder.path()));
        (folder, secrets)
    }

    fn changed(change: FileChange<AppKeyPair, BadPair>) -> Option<(Vec<u8>, Vec<u8>)> {
        let FileChange::Changed(pair) = change else { return None };
        Some((pair.app_key.expose().to_vec(), pair.app_secret.expose().to_vec()))
    }

    #[test]
    fn changed_pair_takes_effect_after_two_equal_reads() {
        let (folder, mut secrets) = watch_files("key", "secret");
        assert!(matches!(secrets.poll(), FileChange::Nothing), "the control");
        write(folder.path(), "key", "other\n");
        assert!(matches!(secrets.poll(), FileChange::Settling));
        assert_eq!(changed(secrets.poll()), Some((b"key".to_vec(), b"other".to_vec())));
        assert!(matches!(secrets.poll(), FileChange::Nothing));
    }

    // A mixed pair would be a failed try at the cloud, which locks an account after a few.
    #[test]
    fn files_written_one_after_the_other_form_no_mixed_pair() {
        let (folder, mut secrets) = watch_files("key", "secret");
        fs::write(folder.path().join("app_key"), "key-2").unwrap();
        assert!(matches!(secrets.poll(), FileChange::Settling));
        fs::write(folder.path().join("app_secret"), "").unwrap();
        assert!(matches!(secrets.poll(), FileChange::Unusable(BadPair::Secret(_))), "truncated");
        fs::write(folder.path().join("app_secret"), "sec").unwrap();
        assert!(matches!(secrets.poll(), FileChange::Settling), "torn");
        fs::write(folder.path().join("app_secret"), "secret-2").unwrap();
        assert!(matches!(secrets.poll(), FileChange::Settling));
        assert_eq!(changed(secrets.poll()), Some((b"key-2".to_vec(), b"secret-2".to_vec())));
    }

    #[test]
    fn change_reverted_between_two_reads_is_ignored() {
        let (folder, mut secrets) = watch_files("key", "secret");
        write(folder.path(), "key-2", "secret");
        assert!(matches!(secrets.poll(), FileChange::Settling));
        write(folder.path(), "key", "secret");
        assert!(matches!(secrets.poll(), FileChange::Nothing));
        write(folder.path(), "key-2", "secret");
        assert!(matches!(secrets.poll(), FileChange::Settling), "the count begins anew");
    }

    /// The files of a mounted Kubernetes secret are links into `..data`, which is a link to the folder of a version. An update
    /// makes a new folder and renames a new link over `..data`.
    #[test]
    fn swap_of_a_mounted_kubernetes_secret_is_detected() {
        let folder = TempDir::new().unwrap();
        let mount = |version: &str| {
            let at = folder.path().join(version);
            fs::create_dir(&at).unwrap();
            write(&at, &format!("key-{version}"), &format!("secret-{version}"));
            symlink(version, folder.path().join("..data_tmp")).unwrap();
            fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
        };
        mount("..1");
        for name in ["app_key", "app_secret"] {
            symlink(Path::new("..data").join(name), folder.path().join(name)).unwrap();
        }
        let mut secrets = watch(sources(folder.path()));
        mount("..2");
        // The kubelet removes the old folder at once: a watch on the files themselves would see nothing but their end.
        fs::remove_dir_all(folder.path().join("..1")).unwrap();
        assert!(matches!(secrets.poll(), FileChange::Settling));
        assert_eq!(changed(secrets.poll()), Some((b"key-..2".to_vec(), b"secret-..2".to_vec())));
    }

    #[test]
    fn unsendable_pair_is_rejected_with_the_faulty_part() {
        let (folder, _) = watch_files("key", "secret");
        let load = || AppKeyPair::load(&sources(folder.path()));
        assert!(load().is_ok_and(|pair| pair.header.is_sensitive()), "the control");
        write(folder.path(), "k\u{e9}y", "secret");
        assert!(matches!(load(), Err(BadPair::AppKey)));
        fs::write(folder.path().join("app_key"), "key").unwrap();
        fs::write(folder.path().join("app_secret"), [0xff]).unwrap();
        assert!(matches!(load(), Err(BadPair::Secret(_))));
        fs::remove_file(folder.path().join("app_secret")).unwrap();
        let error = load().err().unwrap().to_string();
        assert!(error.contains("app_secret"), "{error}");
    }
}
