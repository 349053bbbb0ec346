//! Checks of the files that a configuration names. They are the checks that a start makes, so that a bad file is
//! reported before a start fails because of it.
//!
//! The checks themselves are in [`NamedFiles`](super::named_files::NamedFiles). This module resolves relative paths,
//! passes each file to its check, and skips a file if the key that names it is poisoned. Each file is first checked by
//! itself, so that a bad file is reported at its own key, and then together with the files that must match it.

use std::path::{Path, PathBuf};

use super::context::Context;
use super::named_files::{FileKind, NO_FILE};
use super::source::Syntax;
use super::{Config, Control, ListenerTls, SecretSource};

/// Makes all paths absolute, relative to the directory of the configuration file, and checks the files and directories
/// at them. Adds a problem for each that is unusable.
pub(super) fn look_at(context: &mut Context<'_>, config: &mut Config) {
    for (i, credential) in config.credentials.iter_mut().enumerate() {
        let key = |name: &str| format!("credentials[{i}].{name}");
        path(context, &key("app_key_file"), credential.app_key_file.as_mut(), None);
        path(context, &key("app_secret_file"), credential.app_secret_file.as_mut(), None);
        secret(context, &key("app_key"), &credential.app_key(), true);
        secret(context, &key("app_secret"), &credential.app_secret(), false);
    }
    for (i, listener) in config.listeners.iter_mut().enumerate() {
        let Some(tls) = &mut listener.tls else { continue };
        let section = format!("listeners[{i}].tls");
        let mut file = |name, file, kind| path(context, &format!("{section}.{name}"), file, Some(kind));
        file("cert_file", Some(&mut tls.cert_file), FileKind::Certificates);
        file("client_ca_file", tls.client_ca_file.as_mut(), FileKind::ClientCa);
        file("client_crl_file", tls.client_crl_file.as_mut(), FileKind::ClientCrl);
        file("key_file", Some(&mut tls.key_file), FileKind::PrivateKey);
        let is_good = |name| context.is_good(&format!("{section}.{name}"));
        // Bad files are reported already. The others can still be checked.
        let good = ListenerTls {
            client_ca_file: tls.client_ca_file.clone().filter(|_| is_good("client_ca_file")),
            client_crl_file: tls.client_crl_file.clone().filter(|_| is_good("client_crl_file")),
            ..tls.clone()
        };
        if is_good("cert_file")
            && is_good("key_file")
            && let Err((key, reason)) = context.files.check_listener(&good)
        {
            context.problem(&format!("{section}.{key}"), reason);
        }
    }
    let upstream = &mut config.upstream;
    path(context, "upstream.ca_file", upstream.ca_file.as_mut(), Some(FileKind::Roots));
    path(
        context,
        "upstream.client_cert_file",
        upstream.client_cert_file.as_mut(),
        Some(FileKind::Certificates),
    );
    path(context, "upstream.client_key_file", upstream.client_key_file.as_mut(), Some(FileKind::PrivateKey));
    if let Some(identity) = upstream.identity()
        && ["upstream.client_cert_file", "upstream.client_key_file"].iter().all(|key| context.is_good(key))
        && let Err(reason) = context.files.check_identity(&identity)
    {
        context.problem("upstream.client_cert_file", reason);
    }
    path(context, "upstream.proxy_user_file", upstream.proxy_user_file.as_mut(), Some(FileKind::ProxyUser));
    let password = upstream.proxy_password_file.as_mut();
    path(context, "upstream.proxy_password_file", password, Some(FileKind::ProxyPassword));
    for (i, route) in config.routes.iter_mut().enumerate() {
        let key = format!("routes[{i}].contract_file");
        path(context, &key, route.contract_file.as_mut(), Some(FileKind::Contract));
    }
    if let Control::Path(control) = &mut config.admin.control {
        path(context, "admin.control", Some(control), None);
    }
    path(context, "audit.key_file", config.audit.key_file.as_mut(), Some(FileKind::AuditKey));
    path(context, "audit.directory", Some(&mut config.audit.directory), None);
    audit_directory(context, config);
}

/// Makes a path absolute. Then checks the file as `kind` demands; does not check it if `kind` is `None` or the key is
/// poisoned.
fn path(context: &mut Context<'_>, key: &str, path: Option<&mut PathBuf>, kind: Option<FileKind>) {
    let Some(path) = path else { return };
    // Before the check for poisoned keys: other checks and error texts use the path, too.
    *path = context.folder.join(&*path);
    let Some(kind) = kind.filter(|_| context.is_good(key)) else { return };
    context.reads(key);
    if let Err(reason) = context.files.check(kind, path) {
        let reason = in_folder(context, reason);
        context.problem(key, reason);
    }
}

/// Checks a secret in a file or a variable.
fn secret(context: &mut Context<'_>, name: &str, source: &SecretSource, is_app_key: bool) {
    let key = match source {
        SecretSource::File(_) => format!("{name}_file"),
        SecretSource::Env(_) => format!("{name}_env"),
    };
    if !context.is_good(&key) {
        return;
    }
    context.reads(&key);
    let files = context.files;
    let checked = if is_app_key { files.check_app_key(source) } else { files.check_secret(source) };
    if let Err(reason) = checked {
        let reason = in_folder(context, reason);
        context.problem(&key, reason);
    }
}

/// Completes the reason [`NO_FILE`], which shows no path, with the directory at which relative paths start: a wrong
/// directory is the usual cause. Returns other reasons unchanged.
fn in_folder(context: &Context<'_>, reason: String) -> String {
    match &*reason {
        NO_FILE => format!("{reason}; a relative path starts at {}", context.folder.display()),
        _ => reason,
    }
}

/// Checks the directory of the audit trail.
fn audit_directory(context: &mut Context<'_>, config: &Config) {
    let audit = &config.audit;
    // With a misspelt key, or lines that are not TOML, the chain's key may be in a file after all. A placeholder
    // path stands for it, so that the check does not ask for a key in the directory: that would be a second
    // mistake.
    let is_poisoned = context.is_poisoned("audit.key_file");
    let is_elsewhere = (is_poisoned || context.syntax != Syntax::Whole).then_some(Path::new("FILE"));
    let key_file = audit.key_file.as_deref().filter(|_| !is_poisoned).or(is_elsewhere);
    context.reads("audit.directory");
    if !context.is_poisoned("audit.directory")
        && let Err(reason) = context.files.check_audit_directory(&audit.directory, key_file, audit.must_exist)
    {
        context.problem("audit.directory", reason);
    }
}
