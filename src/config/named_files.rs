//! Interface to the files that a configuration names.
//!
//! The configuration opens none of them. The parts that can check them (TLS, contracts, secrets, the trail) depend
//! on the configuration, so it must not depend on them: the caller of [`super::Config::load`] passes in how they
//! are checked.

use std::path::Path;

use super::{ContractSource, IdentityFiles, ListenerTls, SecretSource};

/// The reason for a missing file whose path must not be shown. The configuration adds where relative paths start.
pub const NO_FILE: &str = "there is no such file";

/// What a file must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Certificates of the CAs that the upstream's certificate must lead to.
    Roots,
    /// The gateway's own certificate, with its chain.
    Certificates,
    /// The key of a certificate.
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

/// Checks what a configuration names, as a start would. Makes, locks and changes nothing. Each error is a reason
/// that can follow the key of the setting. May block for ever on a file that does not answer.
pub trait NamedFiles: Sync {
    /// Checks that a file can be read and is what it must be.
    fn check(&self, kind: FileKind, path: &Path) -> Result<(), String>;

    /// Checks a secret in a file or a variable. The error shows neither path nor name: a secret may have been
    /// pasted in their place.
    fn check_secret(&self, source: &SecretSource) -> Result<(), String>;

    /// Checks an app key: a secret that a header can hold.
    fn check_app_key(&self, source: &SecretSource) -> Result<(), String>;

    /// Checks that the system has trusted roots.
    fn check_system_roots(&self) -> Result<(), String>;

    /// Checks that a certificate and a key belong together.
    fn check_identity(&self, files: &IdentityFiles) -> Result<(), String>;

    /// Checks the files of a listener together, each of which is good by itself. The error comes with the key that
    /// is to blame.
    fn check_listener(&self, tls: &ListenerTls) -> Result<(), (&'static str, String)>;

    /// Checks that the directory of the trail can be used or made. Without a key file the key of the chain is in
    /// it.
    fn check_audit_directory(
        &self,
        path: &Path,
        key_file: Option<&Path>,
        must_exist: bool,
    ) -> Result<(), String>;

    /// The members that a contract adds to an audit record. Empty for a bad contract, which is reported by `check`.
    fn audit_names(&self, contract: &ContractSource) -> Vec<String>;
}
