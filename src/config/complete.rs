//! Validation of single tables: required keys, keys that exclude each other, and defaults that depend on other keys
//! of the same table.

use std::collections::{BTreeMap, HashSet};
use std::mem::discriminant;

use super::context::{Context, member};
use super::values::{check_static_header, loopback_names};
use super::{
    BUILT_IN_ROUTE, Caller, Config, Credential, ListenAddress, Listener, ListenerTls, Route, Upstream,
};

/// The path of the built-in route, from the vendor's page of `appointQualityTask`. Callers and the upstream use the
/// same path.
const BUILT_IN_PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask";

/// Checks every table, and adds the default listener and the built-in route where they are not configured.
pub(super) fn complete(context: &mut Context<'_>, config: &mut Config) {
    for (i, listener) in config.listeners.iter_mut().enumerate() {
        complete_listener(context, &format!("listeners[{i}]"), listener);
    }
    if config.listeners.is_empty() {
        config.listeners.push(Listener {
            hosts: Some(loopback_names()),
            // The effective configuration is printed in a form that can be read again. So defaults that depend on the
            // address are filled in here, and not by the type.
            allow_plaintext: Some(false),
            ..Listener::default()
        });
    }
    complete_upstream(context, &mut config.upstream);
    for (list, is_empty) in
        [("credentials", config.credentials.is_empty()), ("callers", config.callers.is_empty())]
    {
        if is_empty {
            context.lacks(list, format!("at least one [[{list}]] is needed"));
        }
    }
    check_names(context, "credentials", config.credentials.iter().map(|credential| &*credential.name));
    check_names(context, "callers", config.callers.iter().map(|caller| &*caller.name));
    check_names(context, "routes", config.routes.iter().map(|route| &*route.name));
    for (i, credential) in config.credentials.iter().enumerate() {
        check_credential(context, &format!("credentials[{i}]"), credential);
    }
    for (i, caller) in config.callers.iter().enumerate() {
        check_caller(context, &format!("callers[{i}]"), caller);
    }
    complete_routes(context, &mut config.routes);
}

/// Checks one listener, and fills in the defaults that depend on its address. A TCP listener that is not on loopback must
/// set `hosts`, and either `tls` or `allow_plaintext = true`.
fn complete_listener(context: &mut Context<'_>, table: &str, listener: &mut Listener) {
    let key = |name| member(table, name);
    context.require(table, Listener::REQUIRED);
    if listener.tls.is_some() {
        let tls = key("tls");
        context.require(&tls, ListenerTls::REQUIRED);
        let [roots, revoked] = ["client_ca_file", "client_crl_file"].map(|name| member(&tls, name));
        if context.is_set(&revoked) && !context.is_set(&roots) {
            // Without CAs no certificate is asked for, and a revocation list would look like protection and do
            // nothing.
            context.lacks(&roots, "is needed for client_crl_file");
        }
    }
    // A `tls` table with a mistake counts as present: asking for `allow_plaintext` instead would be bad advice.
    let has_tls = listener.tls.is_some() || context.is_poisoned(&key("tls"));
    if has_tls && listener.allow_plaintext == Some(true) {
        context.problem(
            &key("allow_plaintext"),
            "contradicts tls: with TLS nothing crosses the network unencrypted",
        );
    }
    match &mut listener.address {
        ListenAddress::Unix { mode, .. } => {
            *mode = *listener.mode.get_or_insert(*mode);
            // A browser cannot connect to a Unix socket, so there is no DNS rebinding to guard against by `Host`.
            (listener.hosts, listener.allow_plaintext) = (None, None);
            if listener.tls.is_some() {
                let reason = "is for TCP listeners only: a Unix socket does not cross the network";
                context.problem(&key("tls"), reason);
            }
        }
        ListenAddress::Tcp(address) => {
            // A poisoned address has the default, a TCP one, and the real one may be the Unix socket that `mode`
            // is for.
            if listener.mode.is_some() && !context.is_poisoned(&key("address")) {
                context.problem(&key("mode"), "is for Unix sockets only");
            }
            let allow_plaintext = *listener.allow_plaintext.get_or_insert(false);
            // On loopback nothing crosses the network, and the names are known.
            if address.ip().is_loopback() {
                listener.hosts.get_or_insert_with(loopback_names);
                return;
            }
            // `Host` guards against DNS rebinding: a web page that points its own name at the gateway. On
            // another address than a loopback one only the operator knows the right names.
            let has_hosts = listener.hosts.as_ref().is_some_and(|hosts| !hosts.is_empty());
            if !has_hosts && !context.is_poisoned_within(&key("hosts")) {
                let reason = "is needed on a listener that is not on loopback: the names that Host may carry";
                context.lacks(&key("hosts"), reason);
            }
            if !allow_plaintext && !has_tls && !context.is_poisoned(&key("allow_plaintext")) {
                let reason = "must be true on a listener that is not on loopback and has no tls: callers' requests cross the network unencrypted";
                context.lacks(&key("allow_plaintext"), reason);
            }
        }
    }
}

/// Checks `[upstream]`, and converts the names of static headers to lower case. If two layers spell a name differently,
/// the later layer replaces the value.
fn complete_upstream(context: &mut Context<'_>, upstream: &mut Upstream) {
    context.require("upstream", Upstream::REQUIRED);
    for (name, others) in [
        ("client_cert_file", &["client_key_file"][..]),
        ("client_key_file", &["client_cert_file"]),
        ("proxy_user_file", &["proxy_password_file"]),
        ("proxy_password_file", &["proxy_user_file"]),
        ("proxy", &["proxy_user_file", "proxy_password_file"]),
    ] {
        context.require_beside("upstream", name, others);
    }
    // Header names are case-insensitive (RFC 9110 section 5.1), keys are not. So `X-A` in a variable replaces
    // `x-a` of the file: sorted by place, the later layer comes last.
    let headers = std::mem::take(&mut upstream.headers).into_iter();
    let mut headers: Vec<_> =
        headers.map(|(name, value)| (member("upstream.headers", &name), name, value)).collect();
    headers.sort_by(|(a, ..), (b, ..)| context.location(a).cmp(context.location(b)));
    let mut spellings = HashSet::new();
    let mut by_name = BTreeMap::new();
    for (key, name, value) in headers {
        // Two spellings in one layer are a mistake: no rule says which of them is meant.
        if !spellings.insert((discriminant(context.location(&key)), name.to_ascii_lowercase())) {
            context.problem(&key, "is set twice, in different capitals: remove one of them");
        } else if let Err(reason) = check_static_header(&name, &value) {
            context.problem(&key, reason);
        } else {
            by_name.insert(name.to_ascii_lowercase(), value);
        }
    }
    upstream.headers = by_name;
}

/// Checks that no name occurs twice in a list. An empty name is one that could not be read, and is skipped.
fn check_names<'a>(context: &mut Context<'_>, list: &str, names: impl Iterator<Item = &'a str>) {
    let mut known = HashSet::new();
    for (i, name) in names.enumerate() {
        if !name.is_empty() && !known.insert(name) {
            context.problem(&format!("{list}[{i}].name"), format!("`{name}` is taken already"));
        }
    }
}

/// Checks that the app key and the app secret each have exactly one source, and that neither is written in the
/// configuration.
fn check_credential(context: &mut Context<'_>, table: &str, credential: &Credential) {
    context.require(table, Credential::REQUIRED);
    let Credential { app_key_file, app_key_env, app_secret_file, app_secret_env, .. } = credential;
    for (name, file, variable) in [
        ("app_key", app_key_file.is_some(), app_key_env.is_some()),
        ("app_secret", app_secret_file.is_some(), app_secret_env.is_some()),
    ] {
        let [inline, in_file, in_variable] = ["", "_file", "_env"].map(|of| format!("{table}.{name}{of}"));
        let is_poisoned = context.is_poisoned(&in_file) || context.is_poisoned(&in_variable);
        // The table has no key `app_key`. Setting it gets an error text of its own, which says where a secret belongs.
        // The sources are poisoned, so that they are not reported as missing as well.
        if context.is_set(&inline) {
            let reason = format!(
                "a secret must not be in the configuration; put it into a file and set {name}_file to its path"
            );
            context.problem(&inline, reason);
            context.poison(&[in_file, in_variable]);
        } else if file && variable {
            context.problem(&in_file, format!("either {name}_file or {name}_env, not both"));
        } else if !file && !variable && !is_poisoned {
            context.lacks(&in_file, format!("is missing; set it, or {name}_env instead"));
        }
    }
}

/// Checks the required keys of a caller.
fn check_caller(context: &mut Context<'_>, table: &str, caller: &Caller) {
    need_one(context, &member(table, "routes"), &caller.routes, "[\"appointQualityTask\"]");
    context.require(table, Caller::REQUIRED);
}

/// Reports a required list as missing if it is empty. An empty list whose items were poisoned is not reported: its
/// items were left out by the reader, not by the author.
fn need_one(context: &mut Context<'_>, key: &str, list: &[String], example: &str) {
    if list.is_empty() && !context.is_poisoned_within(key) {
        context.lacks(key, format!("at least one is needed, as in {example}"));
    }
}

/// Checks the routes, and adds the built-in one unless a table configures it.
fn complete_routes(context: &mut Context<'_>, routes: &mut Vec<Route>) {
    let mut paths = HashSet::from([BUILT_IN_PATH.to_owned()]);
    for (i, route) in routes.iter_mut().enumerate() {
        let table = format!("routes[{i}]");
        let key = |name| member(&table, name);
        // A table without a readable name may be either kind. It counts as the built-in route unless it has a path
        // or a contract file, so that a built-in one with a bad name is not asked for those.
        let has_more = ["path", "contract_file"].iter().any(|name| context.is_set(&key(name)));
        if route.name == BUILT_IN_ROUTE || (route.name.is_empty() && !has_more) {
            context.require(&table, &["name"]);
            context.exclude(&table, &Route::FIXED);
            // Starts from the built-in route and takes over only what may be set, so that nothing in the table can
            // change the path or the success codes that the embedded contract was written for.
            let Route { contract_file, credential, timeout, frozen, .. } = std::mem::take(route);
            *route = Route { contract_file, credential, timeout, frozen, ..built_in() };
            continue;
        }
        need_one(context, &key("success_codes"), &route.success_codes, "[\"0409000\"]");
        context.require(&table, Route::REQUIRED);
        if !route.path.is_empty() && !paths.insert(route.path.clone()) {
            context.problem(&key("path"), "another route has this path");
        }
    }
    if !routes.iter().any(|route| route.name == BUILT_IN_ROUTE) {
        routes.push(built_in());
    }
}

/// Returns the built-in route, with the result code that the vendor's page gives for success.
fn built_in() -> Route {
    Route {
        name: BUILT_IN_ROUTE.into(),
        path: BUILT_IN_PATH.into(),
        success_codes: vec!["0409000".into()],
        ..Route::default()
    }
}
