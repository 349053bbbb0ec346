//! Cross-field validation: what must hold between values.
//!
//! Runs after all tables were read, and after [`super::defaults`] has adapted the defaults to the values that are set.
//! A relation is checked only if none of its values is poisoned (see [`Context`]), so that a mistake is reported once
//! and not again as a broken relation.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::model::audit_fields::REDACTABLE;

use super::context::Context;
use super::{Config, Control, ListenAddress, PeerRule, Route};

/// Checks all relations. Adds a problem to the context for each that is broken.
pub(super) fn check(context: &mut Context<'_>, config: &Config) {
    references(context, config);
    peers(context, config);
    addresses(context, config);
    let upstream = &config.upstream;
    if upstream.connect_timeout > upstream.timeout {
        // The connection is part of the exchange: a longer connect time-out would never be reached.
        let reason = "must not be longer than upstream.timeout";
        between(context, ["upstream.connect_timeout", "upstream.timeout"], reason);
    }
    if config.server.drain_grace >= config.server.drain_timeout && !config.server.drain_grace.is_zero() {
        // Both count from the stop signal. With no time between them, requests accepted within the grace would be
        // cut off.
        let reason = "must be shorter than server.drain_timeout, so that requests in flight can end";
        between(context, ["server.drain_grace", "server.drain_timeout"], reason);
    }
    fields(context, config);
    if config.audit.retain.is_some_and(|retain| retain < config.idempotency.window) {
        // The trail is all that remembers keys across a restart. With a shorter `retain` it would forget keys that
        // are still valid, and a repeated call would be sent twice.
        let reason = "must not be shorter than idempotency.window: the trail stores the Idempotency-Keys";
        between(context, ["audit.retain", "idempotency.window"], reason);
    }
    if config.idempotency.fingerprint_window > config.idempotency.window {
        // A start reads back `window` of the trail. Beyond it, an equal call would be recognised before a restart
        // and sent again after it.
        let reason =
            "must not be longer than idempotency.window: at a start the gateway reads no older calls";
        between(context, ["idempotency.fingerprint_window", "idempotency.window"], reason);
    }
    trail_size(context, config);
    shares(context, config);
    if upstream.max_connections < config.server.workers {
        // Each worker has a pool of its own, with its part of the connections. One without any could forward
        // nothing.
        let reason = "must be at least server.workers";
        between(context, ["upstream.max_connections", "server.workers"], reason);
    }
    // The system's roots are needed only if something speaks TLS. A container may have none; it is refused here
    // and not at the first token fetch.
    context.reads("upstream.ca_file");
    let is_known = !["upstream.base_url", "token.url"].iter().any(|key| context.is_poisoned(key));
    if is_known
        && (upstream.base_url.tls || config.token.url.tls)
        && upstream.ca_file.is_none()
        && !context.is_poisoned("upstream.ca_file")
        && let Err(reason) = context.files.check_system_roots()
    {
        context.problem("upstream.ca_file", format!("is needed here: {reason}"));
    }
}

/// Adds a problem at the first key, unless one of the two keys is poisoned.
fn between(context: &mut Context<'_>, keys: [&str; 2], reason: &str) {
    if !keys.iter().any(|key| context.is_poisoned(key)) {
        context.problem(keys[0], reason);
    }
}

/// Checks that every credential and route that a caller or a route names exists.
fn references(context: &mut Context<'_>, config: &Config) {
    let credentials: Vec<_> = config.credentials.iter().map(|credential| &*credential.name).collect();
    let routes: Vec<_> = config.routes.iter().map(|route| &*route.name).collect();
    for (i, caller) in config.callers.iter().enumerate() {
        let key = format!("callers[{i}].credential");
        refer(context, &key, &key, ("credential", &credentials), &caller.credential);
        let list = format!("callers[{i}].routes");
        // A poisoned list makes each of its items poisoned, and the search below for items that are not would have
        // no end: a misspelt key beside the right list once hung the start there.
        if context.is_poisoned(&list) {
            continue;
        }
        // Items that could not be read are not in `caller.routes`. Their indices are skipped, so that each name
        // that was read is reported under the index that it has in the file.
        let items: Vec<_> = (0..)
            .map(|j| format!("{list}[{j}]"))
            .filter(|item| !context.is_poisoned(item))
            .take(caller.routes.len())
            .collect();
        for (item, route) in items.iter().zip(&caller.routes) {
            refer(context, item, &list, ("route", &routes), route);
        }
    }
    for (i, credential) in config.routes.iter().map(|route| &route.credential).enumerate() {
        let key = format!("routes[{i}].credential");
        credential.iter().for_each(|name| refer(context, &key, &key, ("credential", &credentials), name));
    }
}

/// Adds a problem if no credential or route has this name. Adds none if `names` contains an empty name: that is one
/// that could not be read, and it may be the right one.
fn refer(context: &mut Context<'_>, at: &str, key: &str, (what, names): (&str, &[&str]), name: &str) {
    let is_poisoned =
        context.is_poisoned(&format!("{what}s")) || names.contains(&"") || context.is_poisoned(at);
    if !is_poisoned && !names.contains(&name) {
        let reason = format!("no {what} has this name; there are: {}", names.join(", "));
        context.problem_of(at, key, reason);
    }
}

/// Checks that each name in `audit.fields` is a member that can be hidden: one of [`REDACTABLE`], or one that a contract
/// names with `x-audit`. A misspelt name is refused, since the member that it should hide would be written in clear.
fn fields(context: &mut Context<'_>, config: &Config) {
    // A contract that cannot be read may have a member of any name.
    if context.is_poisoned_within("routes") {
        return;
    }
    let files = context.files;
    for name in config.audit.fields.keys() {
        let has = |route: &Route| files.audit_names(&route.contract()).contains(name);
        let of_contracts = || config.routes.iter().any(has);
        if !REDACTABLE.contains(&name.as_str()) && !of_contracts() {
            let own = REDACTABLE.join(", ");
            let reason =
                format!("`{name}` cannot be hidden; these can: {own}, and what contracts name with x-audit");
            context.problem("audit.fields", reason);
        }
    }
}

/// Checks that `audit.max_size` is large enough for the idempotency window at the configured rates. Records within the
/// window are never removed early, so that the trail would grow beyond a smaller `max_size`.
fn trail_size(context: &mut Context<'_>, config: &Config) {
    // The size follows from all of these. If one is poisoned, its default would give a size that was not configured.
    let limits = (0..config.callers.len())
        .flat_map(|i| ["rate_limit", "burst"].map(|key| format!("callers[{i}].{key}")))
        .chain(["quota.rate", "quota.burst"].map(str::to_owned));
    let sizes = ["audit.max_size", "audit.segment_size", "idempotency.window"].map(str::to_owned);
    if sizes.into_iter().chain(limits).any(|key| context.is_poisoned(&key)) {
        return;
    }
    if let Some(reason) = config.trail_size().refusal() {
        context.problem("audit.max_size", reason);
    }
}

/// Checks that no caller's `max_keys` is greater than `idempotency.max_keys`, which bounds the keys of all callers
/// together.
fn shares(context: &mut Context<'_>, config: &Config) {
    for (i, caller) in config.callers.iter().enumerate() {
        if caller.max_keys.is_some_and(|share| share > config.idempotency.max_keys) {
            let key = format!("callers[{i}].max_keys");
            between(context, [&key, "idempotency.max_keys"], "must not be more than idempotency.max_keys");
        }
    }
}

/// Says which listener a peer needs, as the end of an error text.
fn needed_listener(peer: &PeerRule) -> &'static str {
    match peer {
        PeerRule::Loopback => "loopback needs a TCP listener without client_ca_file",
        PeerRule::Network(network) if network.addr().is_loopback() => {
            "a network needs a TCP listener without client_ca_file"
        }
        PeerRule::Network(_) => {
            "a network beyond loopback needs a TCP listener without client_ca_file that is not on loopback"
        }
        PeerRule::Certificate(_) => "a name in a certificate needs a TCP listener with client_ca_file",
        PeerRule::Uid(_) | PeerRule::Gid(_) => "users and groups need a listener on a Unix socket",
    }
}

/// Checks that no peer matches the rules of two callers, and that for each caller a listener exists where its peers can
/// connect.
fn peers(context: &mut Context<'_>, config: &Config) {
    // Which peers a listener can see depends on its address and on `client_ca_file`. With either poisoned, it may
    // be the listener that a caller seems to lack.
    let doubtful_listeners = (0..config.listeners.len()).any(|i| {
        let listener = format!("listeners[{i}]");
        context.is_poisoned(&format!("{listener}.address"))
            || context.is_poisoned_within(&format!("{listener}.tls"))
    });
    for (i, caller) in config.callers.iter().enumerate() {
        let key = format!("callers[{i}].peer");
        if context.is_poisoned(&key) {
            continue;
        }
        // Two callers for one peer would make its identity, credential and limits depend on the order in the file.
        let other = (0..i).find(|other| {
            !context.is_poisoned(&format!("callers[{other}].peer"))
                && config.callers[*other].peer.can_be(&caller.peer)
        });
        if let Some(other) = other {
            let other = &config.callers[other].name;
            context.problem(
                &key,
                format!(
                    "one peer can be both `{other}` and `{}`: each peer must belong to one caller only",
                    caller.name
                ),
            );
        } else if !doubtful_listeners && config.listeners_of(caller).next().is_none() {
            let needed = needed_listener(&caller.peer);
            context.problem(&key, format!("no listener can see this peer: {needed}"));
        }
    }
}

/// Checks that no two sockets have the same address: a start could not bind the second one.
fn addresses(context: &mut Context<'_>, config: &Config) {
    let admin = ("admin.address".to_owned(), ListenAddress::Tcp(config.admin.address));
    let listener = |(i, listener): (usize, &super::Listener)| {
        (format!("listeners[{i}].address"), listener.address.clone())
    };
    let control = match &config.admin.control {
        Control::Path(path) => {
            // The mode has no part in the comparison; any value does.
            let address = ListenAddress::Unix { path: path.clone(), mode: 0 };
            Some(("admin.control".to_owned(), address))
        }
        Control::Default | Control::Off => None,
    };
    let listeners = config.listeners.iter().enumerate().map(listener);
    let all: Vec<_> = listeners.chain([admin]).chain(control).collect();
    for (i, (key, address)) in all.iter().enumerate() {
        let clash = all[..i].iter().find(|(key, other)| !context.is_poisoned(key) && clash(address, other));
        if let Some((other, _)) = clash
            && !context.is_poisoned(key)
        {
            context.problem(key, format!("overlaps with {other}: give one of them another address or port"));
        }
    }
}

/// Whether two sockets cannot be bound at the same time because their addresses overlap.
fn clash(a: &ListenAddress, b: &ListenAddress) -> bool {
    match (a, b) {
        (ListenAddress::Tcp(a), ListenAddress::Tcp(b)) => {
            // Port 0 lets the kernel choose, a different one each time.
            a.port() == b.port() && a.port() != 0 && meet(*a, *b)
        }
        (ListenAddress::Unix { path: a, .. }, ListenAddress::Unix { path: b, .. }) => {
            socket_path(a) == socket_path(b)
        }
        _ => false,
    }
}

/// Returns the path of a socket with the real path of its directory, so that different spellings of one place compare
/// equal. Returns the path unchanged if the directory does not exist.
pub(crate) fn socket_path(path: &Path) -> PathBuf {
    // Only the directory is resolved: the socket itself need not exist yet.
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    let whole = folder.zip(path.file_name()).map(|(folder, name)| folder.join(name));
    whole.unwrap_or_else(|| path.to_owned())
}

/// Whether two IP addresses are of the same family and overlap: they are equal, or one is unspecified. An IPv4-mapped
/// IPv6 address counts as IPv4. `[::]` and an IPv4 address do not overlap, since a `[::]` socket beside an IPv4 socket is
/// bound for IPv6 only (see [`Config::is_only_v6`]).
fn meet(a: SocketAddr, b: SocketAddr) -> bool {
    let (a, b) = (a.ip().to_canonical(), b.ip().to_canonical());
    a == b || (a.is_ipv4() == b.is_ipv4() && (a.is_unspecified() || b.is_unspecified()))
}
