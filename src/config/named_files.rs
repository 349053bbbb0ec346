//! The files that a configuration names. It opens none of them itself: whoever loads it says how they are looked at.

use std::path::Path;

use super::{ContractSource, IdentityFiles, ListenerTls, SecretSource};

/// Why a file is refused of which the path is not told. The configuration adds where relative paths start.
pub const NO_FILE: &str = "there is no such file";

/// What a file must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Certificates of CAs that the upstream's certificate leads to.
    Roots,
    /// Certificates of the gateway's own.
    Certificates,
    /// The key of a certificate.
    PrivateKey,
    /// The CAs of callers' certificates.
    ClientCa,
    /// Revocation lists of callers' certificates.
    ClientCrl,
    /// A contract.
    Contract,
    /// The key of the audit chain.
    AuditKey,
    /// The user of a proxy.
    ProxyUser,
    /// The password of a proxy.
    ProxyPassword,
}

/// Looks at what a configuration names, as a start would; makes, locks and changes nothing. Each error is a reason that can
/// follow the key of the setting.
pub trait NamedFiles: Sync {
    /// A file.
    fn check(&self, kind: FileKind, path: &Path) -> Result<(), String>;

    /// A secret, in a file or a variable. Its place is not told: somebody may have put the secret itself there.
    fn check_secret(&self, source: &SecretSource) -> Result<(), String>;

    /// An app key: a secret that a header can hold.
    fn check_app_key(&self, source: &SecretSource) -> Result<(), String>;

    /// The roots of the system.
    fn check_system_roots(&self) -> Result<(), String>;

    /// A certificate and its key together.
    fn check_identity(&self, files: &IdentityFiles) -> Result<(), String>;

    /// The files of a listener together. Each can be read by itself; the error comes with the key that is to blame.
    fn check_listener(&self, tls: &ListenerTls) -> Result<(), (&'static str, String)>;

    /// The directory of the trail; without a key file the key of the chain lies in it.
    fn check_audit_directory(
        &self,
        path: &Path,
        key_file: Option<&Path>,
        must_exist: bool,
    ) -> Result<(), String>;

    /// The members that a contract has in the audit trail; none of one that is told to be bad elsewhere.
    fn audit_names(&self, contract: &ContractSource) -> Vec<String>;
}
