//! Interface for checking the files that a configuration names.
//!
//! The checks need TLS, contracts, secrets and the trail. Those modules depend on [`super::Config`], so the
//! configuration cannot call them itself. The caller of [`super::Config::load`] passes in an implementation of
//! [`NamedFiles`] instead.

use std::path::Path;

use super::{ContractSource, IdentityFiles, ListenerTls, SecretSource};

/// The error text for a missing file whose path must not be shown. [`super::files`] appends the directory at which
/// relative paths start.
pub const NO_FILE: &str = "there is no such file";

/// What a file must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Certificates of the CAs that the upstream's certificate must lead to.
    Roots,
    /// The gateway's own certificate, with its chain.
    Certificates,
    /// The private key of a certificate.
    PrivateKey,
    /// Certificates of the CAs that callers' certificates must lead to.
    ClientCa,
    /// Revocation lists of callers' certificates.
    ClientCrl,
    /// A contract: a JSON Schema.
    Contract,
    /// The key of the audit chain.
    AuditKey,
    /// The user of a proxy.
    ProxyUser,
    /// The password of a proxy.
    ProxyPassword,
}

/// Checks of the files, secrets and directories that a configuration names; the same checks that a start makes.
///
/// An implementation creates, locks and changes nothing. Each error is a text that is printed after the key of the
/// setting. A check may block for ever on a file that does not answer.
pub trait NamedFiles: Sync {
    /// Checks that a file can be read and is what it must be.
    fn check(&self, kind: FileKind, path: &Path) -> Result<(), String>;

    /// Checks a secret in a file or a variable. The error shows neither path nor name: a secret may have been
    /// pasted in their place.
    fn check_secret(&self, source: &SecretSource) -> Result<(), String>;

    /// Checks an app key as [`NamedFiles::check_secret`] does, and checks that a header can hold it.
    fn check_app_key(&self, source: &SecretSource) -> Result<(), String>;

    /// Checks that the system has trusted roots.
    fn check_system_roots(&self) -> Result<(), String>;

    /// Checks that a certificate and a key belong together.
    fn check_identity(&self, files: &IdentityFiles) -> Result<(), String>;

    /// Checks that the files of a listener match each other. Each file has passed its own check before. The error is
    /// the key at which to report it, and the reason.
    fn check_listener(&self, tls: &ListenerTls) -> Result<(), (&'static str, String)>;

    /// Checks that the directory of the trail can be used or created. If `key_file` is `None`, the key of the hash
    /// chain is in this directory. With `must_exist` the directory and the key must already exist.
    fn check_audit_directory(
        &self,
        path: &Path,
        key_file: Option<&Path>,
        must_exist: bool,
    ) -> Result<(), String>;

    /// Returns the members that a contract adds to an audit record. Empty for a bad contract, which
    /// [`NamedFiles::check`] reports.
    fn audit_names(&self, contract: &ContractSource) -> Vec<String>;
}
