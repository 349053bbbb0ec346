//! Raw values to typed ones. Goes on after a mistake, so that all are told at once.

use std::{
    collections::HashSet,
    mem::discriminant,
    net::SocketAddr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::{
    ids,
    model::{
        durability::Durability,
        header_names::{looks_like_credential, may_pass},
    },
};

use super::{
    Admin, Audit, BUILT_IN_ROUTE, BareIds, Caller, Config, ContractSource, Control, Credential, Http2,
    Idempotency, IdentityFiles, Limit, ListenAddress, Listener, ListenerTls, Log, LogFormat, LogRequests,
    LoginFiles, PeerRule, Problems, RefusalBudget, Route, SecretSource, Server, Shown, Token, Upstream, Url,
    WithoutKey,
    named_files::{FileKind, NO_FILE, NamedFiles},
    peer::parse_peer,
    raw::{Kind, Layers, Place, Syntax, Value},
    relations,
    table::{Context, Found, Reading, Referent, Table},
    values::{
        parse_code, parse_host, parse_level, parse_listen_address, parse_member, parse_operator, parse_proxy,
        parse_rate, parse_route_path, parse_url,
    },
};

/// Bounds of a whole exchange.
const EXCHANGE: (&str, &str) = ("50ms", "10m");

const TOKEN_PATH: &str = "/apigovernance/api/oauth/tokenByAkSk";
const BUILT_IN_PATH: &str = "/apiaccess/CCSQM/rest/ccisqm/v1/qualitytask/appointQualityTask";

/// Validates a raw configuration. Relative paths are relative to `folder`. Returns the keys that were looked
/// for, too.
pub(super) fn validate(
    layers: Layers,
    folder: &Path,
    files: &dyn NamedFiles,
    reading: Reading,
) -> Result<(Config, Vec<String>), Problems> {
    let Layers { root, mut problems, syntax } = layers;
    let mut context = Context::new(folder, syntax, files, reading);
    let mut config = read_config(&mut context, root);
    relations::let_defaults_give_way(&context, &mut config);
    config.name_unknown_variables(&mut context);
    context.tell_what_lacks();
    if syntax == Syntax::Whole {
        relations::check(&mut context, &config);
    }
    problems.append(&mut context.problems);
    if problems.is_empty() {
        return Ok((config, context.asked));
    }
    problems.sort_by(|a, b| (&a.place, &a.key).cmp(&(&b.place, &b.key)));
    Err(Problems(problems))
}

/// The admin listener's address alone. A line that is no TOML may be the one that names it.
pub(super) fn admin_address(layers: Layers, files: &dyn NamedFiles) -> Result<SocketAddr, Problems> {
    let Layers { root, mut problems, syntax } = layers;
    let mut context = Context::new(Path::new("."), syntax, files, Reading::default());
    let mut root = Table::open(&mut context, String::new(), root);
    let mut table = root.section(&mut context, "admin");
    let address = read_admin_address(&mut context, &mut table);
    problems.append(&mut context.problems);
    problems.retain(|problem| syntax != Syntax::Whole || problem.key.starts_with("admin"));
    if problems.is_empty() { Ok(address) } else { Err(Problems(problems)) }
}

fn read_config(context: &mut Context<'_>, root: Value) -> Config {
    let mut root = Table::open(context, String::new(), root);
    let listeners = read_listeners(context, &mut root);
    let admin = read_admin(context, &mut root);
    let upstream = read_upstream(context, &mut root);
    let server = read_server(context, &mut root, upstream.max_connections);
    let token = read_token(context, &mut root, &upstream.base_url);
    let credentials = read_credentials(context, &mut root);
    let routes = read_routes(context, &mut root);
    let callers = read_callers(context, &mut root);
    let mut section = root.section(context, "quota");
    let quota = read_limit(context, &mut section, "rate", (50, 1), 100);
    section.close(context);
    let audit = read_audit(context, &mut root);
    let idempotency = read_idempotency(context, &mut root);
    let log = read_log(context, &mut root);
    root.close(context);
    Config {
        listeners,
        admin,
        server,
        upstream,
        token,
        credentials,
        callers,
        quota,
        audit,
        idempotency,
        routes,
        log,
    }
}

fn read_listeners(context: &mut Context<'_>, root: &mut Table) -> Vec<Listener> {
    let tables = root.tables(context, "listeners");
    if tables.is_empty() {
        let address = ListenAddress::Tcp(([127, 0, 0, 1], 8080).into());
        return vec![Listener { address, hosts: Some(loopback_names()), allow_plaintext: false, tls: None }];
    }
    tables.into_iter().map(|table| read_listener(context, table)).collect()
}

fn read_listener(context: &mut Context<'_>, mut table: Table) -> Listener {
    let fallback = ListenAddress::Tcp(([127, 0, 0, 1], 0).into());
    let mut address = table.required(context, "address", fallback, parse_listen_address);
    let named = read_list(context, &mut table, "hosts", parse_host);
    let allow_plaintext = table.boolean(context, "allow_plaintext");
    let tls = table.section_if_any(context, "tls");
    let has_tls = tls.is_some() || context.is_doubtful(&table.key("tls"));
    let tls = tls.and_then(|section| read_tls(context, section));
    let mode = table.parsed(context, "mode", None, |text| {
        let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o777);
        bits.map(Some).ok_or_else(|| "must be octal permission bits, as in \"0660\"".into())
    });
    match (&mut address, mode) {
        (_, None) => {}
        (ListenAddress::Unix { mode, .. }, Some(bits)) => *mode = bits,
        (ListenAddress::Tcp(_), Some(_)) if context.is_doubtful(&table.key("address")) => {}
        (ListenAddress::Tcp(_), Some(_)) => {
            context.problem_at(&table.key("mode"), "is for Unix sockets only");
        }
    }
    if tls.is_some() && matches!(address, ListenAddress::Unix { .. }) {
        context.problem_at(
            &table.key("tls"),
            "is for TCP listeners only: nobody can read a Unix socket on its way",
        );
    }
    if has_tls && allow_plaintext {
        context.problem_at(
            &table.key("allow_plaintext"),
            "contradicts tls: nothing crosses the network unencrypted there",
        );
    }
    let hosts = match &address {
        ListenAddress::Unix { .. } => None,
        ListenAddress::Tcp(tcp) if tcp.ip().is_loopback() => Some(named.unwrap_or_else(loopback_names)),
        ListenAddress::Tcp(_) => {
            if named.as_ref().is_none_or(Vec::is_empty) && !context.is_doubtful(&table.key("hosts")) {
                let reason = "is needed on a listener that is not on loopback: the names that Host may carry";
                table.lacks(context, "hosts", reason);
            }
            if !allow_plaintext && !has_tls && !context.is_doubtful(&table.key("allow_plaintext")) {
                let reason = "must be true on a listener that is not on loopback and has no tls: callers' requests cross the network unencrypted";
                table.lacks(context, "allow_plaintext", reason);
            }
            named
        }
    };
    table.close(context);
    Listener { address, hosts, allow_plaintext, tls }
}

fn read_tls(context: &mut Context<'_>, mut table: Table) -> Option<ListenerTls> {
    for name in ["cert_file", "key_file"] {
        if !table.members.contains_key(name) {
            table.lacks(context, name, "is missing");
        }
    }
    if table.members.contains_key("client_crl_file") && !table.members.contains_key("client_ca_file") {
        table.lacks(context, "client_ca_file", "is needed for client_crl_file");
    }
    let mut file = |name, kind| table.path(context, name).and_then(|found| good_file(context, found, kind));
    let cert_file = file("cert_file", FileKind::Certificates);
    let client_ca_file = file("client_ca_file", FileKind::ClientCa);
    let client_crl_file = file("client_crl_file", FileKind::ClientCrl);
    let key_file = file("key_file", FileKind::PrivateKey);
    let path = table.path.clone();
    table.close(context);
    let tls = ListenerTls { cert_file: cert_file?, key_file: key_file?, client_ca_file, client_crl_file };
    if let Err((key, reason)) = context.files.check_listener(&tls) {
        context.problem_at(&format!("{path}.{key}"), reason);
    }
    Some(tls)
}

fn loopback_names() -> Vec<String> {
    ["localhost", "127.0.0.1", "[::1]"].map(str::to_owned).into()
}

fn read_admin_address(context: &mut Context<'_>, table: &mut Table) -> SocketAddr {
    table.parsed(context, "address", ([127, 0, 0, 1], 9090).into(), |text| {
        text.parse::<SocketAddr>()
            .map_err(|_| "must be an address with a port, as in \"127.0.0.1:9090\"".into())
    })
}

fn read_admin(context: &mut Context<'_>, root: &mut Table) -> Admin {
    let mut table = root.section(context, "admin");
    let address = read_admin_address(context, &mut table);
    let hosts = read_list(context, &mut table, "hosts", parse_host).unwrap_or_default();
    let control = match table.path(context, "control") {
        None => Control::Default,
        Some(path) if path.value == context.folder.join("off") => Control::Off,
        Some(path) => Control::Path(path.value),
    };
    table.close(context);
    Admin { address, hosts, control }
}

/// No worker is without a connection to the upstream, of which there are `connections`.
fn read_server(context: &mut Context<'_>, root: &mut Table, connections: usize) -> Server {
    let mut table = root.section(context, "server");
    let auto = || std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4).min(connections));
    let workers = match table.members.get("workers").map(|value| &value.kind) {
        Some(Kind::Text(text) | Kind::Loose(text)) if text == "auto" => {
            drop(table.take(context, "workers"));
            auto()
        }
        _ => table.integer(context, "workers", 1, 1..=64),
    };
    let server = Server {
        workers,
        max_connections: table.integer(context, "max_connections", 4096, 1..=1_000_000),
        max_in_flight: table.integer(context, "max_in_flight", 1024, 1..=100_000),
        max_body: usize::try_from(table.size(context, "max_body", 256 * 1024, ("1KiB", "16MiB")))
            .unwrap_or(usize::MAX),
        max_head: usize::try_from(table.size(context, "max_head", 16 * 1024, ("8KiB", "64KiB")))
            .unwrap_or(usize::MAX),
        max_unfinished: usize::try_from(table.size(context, "max_unfinished", 32 << 20, ("1MiB", "16GiB")))
            .unwrap_or(usize::MAX),
        header_timeout: table.duration(context, "header_timeout", "10s", ("100ms", "5m")),
        body_timeout: table.duration(context, "body_timeout", "10s", ("100ms", "5m")),
        idle_timeout: table.duration(context, "idle_timeout", "60s", ("100ms", "1h")),
        drain_grace: table.duration(context, "drain_grace", "1s", ("0s", "5m")),
        drain_timeout: table.duration(context, "drain_timeout", "10s", ("0s", "10m")),
    };
    table.close(context);
    server
}

fn read_upstream(context: &mut Context<'_>, root: &mut Table) -> Upstream {
    let mut table = root.section(context, "upstream");
    let none = Url { tls: true, host: String::new(), port: 443, path: String::new() };
    // No default: what the credential is sent to is named by somebody.
    let base_url = table.required(context, "base_url", none, |text| {
        let mut url = parse_url(text)?;
        if url.path != "/" {
            return Err("must have no path: routes have whole paths of their own".into());
        }
        url.path.clear();
        Ok(url)
    });
    let ca_file = table.path(context, "ca_file").and_then(|found| good_file(context, found, FileKind::Roots));
    let upstream = Upstream {
        base_url,
        connect_timeout: table.duration(context, "connect_timeout", "3s", ("10ms", "1m")),
        timeout: table.duration(context, "timeout", "30s", EXCHANGE),
        idle_timeout: table.duration(context, "idle_timeout", "10s", ("10ms", "1h")),
        max_connections: table.integer(context, "max_connections", 64, 1..=10_000),
        breaker_failures: u32::try_from(table.integer(context, "breaker_failures", 10, 0..=1000))
            .unwrap_or(0),
        breaker_pause: table.duration(context, "breaker_pause", "1s", ("100ms", "1m")),
        http2: table.parsed(context, "http2", Http2::Off, |text| match text {
            "off" => Ok(Http2::Off),
            "auto" => Ok(Http2::Auto),
            _ => Err("must be \"off\" or \"auto\"".into()),
        }),
        ca_file,
        identity: read_identity(context, &mut table),
        proxy_login: read_proxy_login(context, &mut table),
        proxy: table.parsed(context, "proxy", None, |text| parse_proxy(text).map(Some)),
        headers: read_headers(context, &mut table),
        reply_headers: read_reply_headers(context, &mut table),
    };
    table.close(context);
    upstream
}

/// The gateway's own certificate: both files, or none.
fn read_identity(context: &mut Context<'_>, table: &mut Table) -> Option<IdentityFiles> {
    needed(context, table, "client_cert_file", &["client_key_file"]);
    needed(context, table, "client_key_file", &["client_cert_file"]);
    let cert_file = table
        .path(context, "client_cert_file")
        .and_then(|found| good_file(context, found, FileKind::Certificates));
    let key_file = table
        .path(context, "client_key_file")
        .and_then(|found| good_file(context, found, FileKind::PrivateKey));
    let files = IdentityFiles { cert_file: cert_file?, key_file: key_file? };
    if let Err(reason) = context.files.check_identity(&files) {
        context.problem_at(&table.key("client_cert_file"), reason);
    }
    Some(files)
}

/// Who the gateway is to the proxy: both files, or none, and never without a proxy.
fn read_proxy_login(context: &mut Context<'_>, table: &mut Table) -> Option<LoginFiles> {
    needed(context, table, "proxy_user_file", &["proxy_password_file"]);
    needed(context, table, "proxy_password_file", &["proxy_user_file"]);
    needed(context, table, "proxy", &["proxy_user_file", "proxy_password_file"]);
    let mut file = |name, kind| table.path(context, name).and_then(|found| good_file(context, found, kind));
    let user = file("proxy_user_file", FileKind::ProxyUser);
    let password = file("proxy_password_file", FileKind::ProxyPassword);
    Some(LoginFiles { user: user?, password: password? })
}

/// A key must be there where one of the others is.
fn needed(context: &mut Context<'_>, table: &mut Table, name: &'static str, others: &[&str]) {
    let other = others.iter().find(|other| table.seems_given(other));
    if let Some(other) = other.filter(|_| !table.members.contains_key(name)) {
        table.lacks(context, name, format!("is needed for {other}"));
    }
}

fn read_reply_headers(context: &mut Context<'_>, table: &mut Table) -> Vec<HeaderName> {
    let mut names = Vec::new();
    for Found { value, place, key } in table.texts(context, "reply_headers").unwrap_or_default() {
        match HeaderName::try_from(&value) {
            Ok(name) if may_pass(&name) => names.push(name),
            Ok(name) => context.problem(&place, key, format!("{name} never passes to callers")),
            Err(_) => context.problem(&place, key, "must be a list of header names, as in [\"x-trace-id\"]"),
        }
    }
    names
}

fn read_headers(context: &mut Context<'_>, table: &mut Table) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let Some(value) = table.take(context, "headers") else { return headers };
    let key = table.key("headers");
    let Kind::Table(members) = value.kind else {
        context.problem(&value.place, key, "must be a table, as in { x-tenantspaceid = \"…\" }");
        return headers;
    };
    // A name in other capitals is the same header: the later layer's value counts.
    let mut members: Vec<_> = members.into_iter().collect();
    members.sort_by(|(_, a), (_, b)| a.place.cmp(&b.place));
    let mut spellings = HashSet::new();
    for (name, value) in members {
        let key = format!("{key}.{name}");
        if !spellings.insert((discriminant(&value.place), name.to_ascii_lowercase())) {
            context.problem(&value.place, key, "is set already, in other capitals: leave one of them");
            continue;
        }
        match (HeaderName::try_from(&name), &value.kind) {
            (Ok(header), _) if is_ours(&header) => {
                context.problem(&value.place, key, "is set by the gateway itself");
            }
            (Ok(header), _) if looks_like_credential(header.as_str()) => {
                context.problem(
                    &value.place,
                    key,
                    "looks like a secret, which must not stand in the configuration",
                );
            }
            (Ok(header), Kind::Text(text) | Kind::Loose(text)) if HeaderValue::from_str(text).is_ok() => {
                HeaderValue::from_str(text).ok().and_then(|value| headers.insert(header, value));
            }
            (Ok(_), _) => context.problem(&value.place, key, "must be a text that a header can hold"),
            (Err(_), _) => context.problem(&value.place, key, "is not a header name"),
        }
    }
    headers
}

fn is_ours(name: &HeaderName) -> bool {
    const OURS: [&str; 19] = [
        "accept",
        "accept-encoding",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "cookie",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "user-agent",
        "x-app-key",
        "x-userid",
    ];
    OURS.contains(&&*name.as_str().replace('_', "-"))
}

fn read_token(context: &mut Context<'_>, root: &mut Table, base_url: &Url) -> Token {
    let mut table = root.section(context, "token");
    let default = Url { path: TOKEN_PATH.to_owned(), ..base_url.clone() };
    let url = table.parsed(context, "url", default, parse_url);
    let lifetime = match table.members.get("lifetime").map(|value| &value.kind) {
        Some(Kind::Text(text) | Kind::Loose(text)) if text == "none" => {
            drop(table.take(context, "lifetime"));
            None
        }
        _ => Some(table.duration(context, "lifetime", "600s", ("1s", "3600s"))),
    };
    let timeout = table.duration(context, "timeout", "5s", ("50ms", "1m"));
    let wait = table.duration(context, "wait", "5s", ("0s", "1m"));
    let statuses = table.texts(context, "refused_statuses");
    let refused_statuses = match statuses {
        None => vec![StatusCode::UNAUTHORIZED],
        Some(statuses) => {
            let mut parsed = Vec::new();
            for Found { value, place, key } in statuses {
                match value.parse::<StatusCode>() {
                    // A replay is safe only where the answer says that nothing was done.
                    Ok(status) if matches!(status.as_u16(), 401 | 403 | 418) => parsed.push(status),
                    _ => context.problem(&place, key, "must be a list of 401, 403 or 418"),
                }
            }
            parsed
        }
    };
    table.close(context);
    Token { url, lifetime, timeout, wait, refused_statuses }
}

fn read_credentials(context: &mut Context<'_>, root: &mut Table) -> Vec<Credential> {
    let tables = root.tables(context, "credentials");
    if tables.is_empty() {
        root.lacks(context, "credentials", "at least one [[credentials]] is needed");
    }
    let mut names = HashSet::new();
    tables
        .into_iter()
        .map(|mut table| {
            let name = read_name(context, &mut table, &mut names);
            let app_key = read_secret(context, &mut table, ("app_key", "app_key_file", "app_key_env"));
            let app_secret =
                read_secret(context, &mut table, ("app_secret", "app_secret_file", "app_secret_env"));
            table.close(context);
            Credential { name, app_key, app_secret }
        })
        .collect()
}

fn read_name(context: &mut Context<'_>, table: &mut Table, names: &mut HashSet<String>) -> String {
    let name = table.required(context, "name", String::new(), |text| {
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let fits = plain && (1..=64).contains(&text.len());
        fits.then(|| text.to_owned()).ok_or_else(|| "must be 1 to 64 letters, digits, '.', '_' or '-'".into())
    });
    if !name.is_empty() && !names.insert(name.clone()) {
        context.problem_at(&table.key("name"), format!("`{name}` is taken already"));
    }
    name
}

fn read_secret(
    context: &mut Context<'_>,
    table: &mut Table,
    (inline, file, env): (&'static str, &'static str, &'static str),
) -> SecretSource {
    let from_inline = table.members.remove(inline);
    let from_file = table.path(context, file);
    let from_env = table.text(context, env);
    if let Some(value) = from_inline {
        let reason = format!(
            "a secret must not stand in the configuration; put it into a file and name that as {file}"
        );
        context.problem(&value.place, table.key(inline), reason);
        return SecretSource::Env(String::new());
    }
    match (from_file, from_env) {
        (Some(Found { value, place, key }), None) => {
            good_secret(context, inline == "app_key", (SecretSource::File(value), &place, key))
        }
        (None, Some(Found { value, place, key })) => {
            good_secret(context, inline == "app_key", (SecretSource::Env(value), &place, key))
        }
        (Some(found), Some(_)) => {
            context.problem(&found.place, found.key, format!("either {file} or {env}, not both"));
            SecretSource::Env(String::new())
        }
        (None, None) => {
            let doubtful = context.is_doubtful(&table.key(file)) || context.is_doubtful(&table.key(env));
            if !doubtful {
                table.lacks(context, file, format!("is missing ({env} would do, too)"));
            }
            SecretSource::Env(String::new())
        }
    }
}

/// A secret, looked at as a start does.
fn good_secret(
    context: &mut Context<'_>,
    is_app_key: bool,
    (source, place, key): (SecretSource, &Place, String),
) -> SecretSource {
    context.reads(place, &key);
    let files = context.files;
    let checked = if is_app_key { files.check_app_key(&source) } else { files.check_secret(&source) };
    if let Err(reason) = checked {
        context.problem(place, key, in_folder(context, reason));
    }
    source
}

/// A reason that names no path says where a relative one starts.
fn in_folder(context: &Context<'_>, reason: String) -> String {
    match &*reason {
        NO_FILE => format!("{reason}; a relative path starts at {}", context.folder.display()),
        _ => reason,
    }
}

/// A file that is what it must be.
fn good_file(context: &mut Context<'_>, found: Found<PathBuf>, kind: FileKind) -> Option<PathBuf> {
    context.reads(&found.place, &found.key);
    match context.files.check(kind, &found.value) {
        Ok(()) => Some(found.value),
        Err(reason) => {
            context.problem(&found.place, found.key, in_folder(context, reason));
            None
        }
    }
}

fn read_routes(context: &mut Context<'_>, root: &mut Table) -> Vec<Route> {
    let mut names = HashSet::new();
    let mut paths = HashSet::from([BUILT_IN_PATH.to_owned()]);
    let mut built_in = None;
    let mut routes = Vec::new();
    for mut table in root.tables(context, "routes") {
        let name = read_name(context, &mut table, &mut names);
        // One whose name cannot be read may be either.
        let has_more = ["path", "contract_file"].iter().any(|key| table.members.contains_key(*key));
        if name == BUILT_IN_ROUTE || (name.is_empty() && !has_more) {
            let contract = table
                .path(context, "contract_file")
                .and_then(|found| good_file(context, found, FileKind::Contract));
            let terms = read_terms(context, &mut table);
            table.close(context);
            built_in = Some(built_in_route(contract, terms));
            continue;
        }
        let path = table.required(context, "path", String::new(), parse_route_path);
        if !path.is_empty() && !paths.insert(path.clone()) {
            context.problem_at(&table.key("path"), "another route has this path");
        }
        if !table.members.contains_key("contract_file") {
            table.lacks(context, "contract_file", "is missing");
        }
        let contract = table
            .path(context, "contract_file")
            .and_then(|found| good_file(context, found, FileKind::Contract));
        let result_field = table.parsed(context, "result_field", "resultCode".to_owned(), parse_member);
        let codes = read_list(context, &mut table, "success_codes", parse_code).unwrap_or_default();
        if codes.is_empty() && !context.is_doubtful(&table.key("success_codes")) {
            table.lacks(context, "success_codes", "at least one is needed, as in [\"0409000\"]");
        }
        let Terms { credential, timeout, frozen } = read_terms(context, &mut table);
        table.close(context);
        routes.push(Route {
            name,
            path,
            contract: ContractSource::File(contract.unwrap_or_default()),
            result_field,
            success_codes: codes,
            credential,
            timeout,
            frozen,
        });
    }
    routes.insert(0, built_in.unwrap_or_else(|| built_in_route(None, Terms::default())));
    routes
}

/// On which terms a route is used: all that can be said of the built-in one, beside another contract.
#[derive(Default)]
struct Terms {
    credential: Option<String>,
    timeout: Option<Duration>,
    frozen: bool,
}

fn read_terms(context: &mut Context<'_>, table: &mut Table) -> Terms {
    let credential =
        table.text(context, "credential").map(|found| context.refer(Referent::Credential, found));
    let has_timeout = table.members.contains_key("timeout");
    let timeout = table.duration(context, "timeout", "30s", EXCHANGE);
    Terms { credential, timeout: has_timeout.then_some(timeout), frozen: table.boolean(context, "frozen") }
}

fn built_in_route(contract: Option<PathBuf>, Terms { credential, timeout, frozen }: Terms) -> Route {
    Route {
        name: BUILT_IN_ROUTE.into(),
        path: BUILT_IN_PATH.into(),
        contract: contract.map_or(ContractSource::BuiltIn, ContractSource::File),
        result_field: "resultCode".into(),
        success_codes: vec!["0409000".into()],
        credential,
        timeout,
        frozen,
    }
}

fn read_callers(context: &mut Context<'_>, root: &mut Table) -> Vec<Caller> {
    let tables = root.tables(context, "callers");
    if tables.is_empty() {
        root.lacks(context, "callers", "at least one [[callers]] is needed");
    }
    let mut names = HashSet::new();
    tables.into_iter().map(|table| read_caller(context, table, &mut names)).collect()
}

fn read_caller(context: &mut Context<'_>, mut table: Table, names: &mut HashSet<String>) -> Caller {
    let name = read_name(context, &mut table, names);
    let peer = table.required(context, "peer", PeerRule::Loopback, |text| {
        let peer = parse_peer(text)?;
        match peer {
            PeerRule::Uid(uid) => ids::users().check(uid)?,
            PeerRule::Gid(gid) => ids::groups().check(gid)?,
            PeerRule::Loopback | PeerRule::Network(_) | PeerRule::Certificate(_) => {}
        }
        Ok(peer)
    });
    let operator_id = table.required(context, "operator_id", String::new(), parse_operator);
    let operators = read_list(context, &mut table, "operators", parse_operator).unwrap_or_default();
    if !table.members.contains_key("credential") {
        table.lacks(context, "credential", "is missing");
    }
    let credential = table.text(context, "credential");
    let credential = credential.map(|found| context.refer(Referent::Credential, found)).unwrap_or_default();
    let routes = table.texts(context, "routes").unwrap_or_default();
    if routes.is_empty() && !context.is_doubtful(&table.key("routes")) {
        table.lacks(context, "routes", "at least one is needed, as in [\"appointQualityTask\"]");
    }
    let routes = routes.into_iter().map(|found| context.refer(Referent::Route, found)).collect();
    let rate_limit = read_limit(context, &mut table, "rate_limit", (20, 1), 40);
    let require_header =
        table.parsed(context, "require_header", None, |text| parse_required_header(text).map(Some));
    let bare_ids = table.parsed(context, "bare_ids", BareIds::Detect, |text| {
        let named = BareIds::ALL.into_iter().find(|(_, word)| *word == text);
        named
            .map(|(bare_ids, _)| bare_ids)
            .ok_or_else(|| "must be \"detect\", \"exact\" or \"refuse\"".into())
    });
    let has_max_keys = table.members.contains_key("max_keys");
    let max_keys = table.integer(context, "max_keys", 1, 1..=10_000_000);
    let frozen = table.boolean(context, "frozen");
    table.close(context);
    Caller {
        name,
        peer,
        operator_id,
        operators,
        credential,
        routes,
        rate_limit,
        require_header,
        bare_ids,
        max_keys: has_max_keys.then_some(max_keys),
        frozen,
    }
}

/// A list of texts that `parse` understands; a mistake for each of the others.
fn read_list<T>(
    context: &mut Context<'_>,
    table: &mut Table,
    name: &'static str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Option<Vec<T>> {
    let mut values = Vec::new();
    for Found { value, place, key } in table.texts(context, name)? {
        match parse(&value) {
            Ok(value) => values.push(value),
            Err(reason) => context.problem(&place, key, reason),
        }
    }
    Some(values)
}

/// Generic clients must not send it by themselves, and it is no place for a secret.
fn parse_required_header(text: &str) -> Result<HeaderName, String> {
    let name = HeaderName::try_from(text).map_err(|_| "must be the name of a header".to_owned())?;
    let is_usual = is_ours(&name) || !name.as_str().starts_with("x-") || looks_like_credential(name.as_str());
    let reason = "must begin with x-, and be none that clients or proxies send by themselves";
    if is_usual || USUAL.contains(&name.as_str()) { Err(reason.into()) } else { Ok(name) }
}

/// Headers that proxies and browsers add.
const USUAL: [&str; 7] = [
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-real-ip",
    "x-request-id",
    "x-requested-with",
];

fn read_limit(
    context: &mut Context<'_>,
    table: &mut Table,
    rate: &'static str,
    (count, seconds): (u32, u64),
    burst: u32,
) -> Limit {
    let one = NonZeroU32::MIN;
    let default = (NonZeroU32::new(count).unwrap_or(one), Duration::from_secs(seconds));
    let (count, period) = table.parsed(context, rate, default, parse_rate);
    let burst = table.integer(context, "burst", burst as usize, 1..=1_000_000);
    Limit { count, period, burst: u32::try_from(burst).ok().and_then(NonZeroU32::new).unwrap_or(one) }
}

fn read_audit(context: &mut Context<'_>, root: &mut Table) -> Audit {
    let mut table = root.section(context, "audit");
    let named = table.path(context, "directory");
    let must_exist = table.boolean(context, "must_exist");
    let durability = table.parsed(context, "durability", Durability::default(), |text| {
        let named = Durability::ALL.into_iter().find(|durability| durability.as_str() == text);
        named.ok_or_else(|| "must be \"kernel\" or \"disk\"".into())
    });
    let segment_size = table.size(context, "segment_size", 64 << 20, ("64KiB", "1GiB"));
    let retain = match table.members.get("retain").map(|value| &value.kind) {
        Some(Kind::Text(text) | Kind::Loose(text)) if text == "forever" => {
            drop(table.take(context, "retain"));
            None
        }
        _ => Some(table.duration(context, "retain", "30d", ("1d", "3650d"))),
    };
    let max_size = read_max_size(context, &mut table);
    let key_file =
        table.path(context, "key_file").and_then(|found| good_file(context, found, FileKind::AuditKey));
    let directory = named.map_or_else(|| context.folder.join("audit"), |found| found.value);
    let fields = read_fields(context, &mut table);
    let RefusalBudget { strangers, callers } = RefusalBudget::default();
    let refusals = RefusalBudget {
        strangers: table.size(context, "stranger_refusals", strangers, ("64KiB", "1GiB")),
        callers: table.size(context, "caller_refusals", callers, ("64KiB", "1GiB")),
    };
    table.close(context);
    // A misspelt key, or one on a line that is no TOML, may be the one that says where the chain's key is.
    let may_be_named = context.is_doubtful("audit.key_file") || context.syntax != Syntax::Whole;
    let is_elsewhere = may_be_named.then_some(Path::new("FILE"));
    context.reads_at("audit.directory");
    if !context.is_doubtful("audit.directory")
        && let Err(reason) =
            context.files.check_audit_directory(&directory, key_file.as_deref().or(is_elsewhere), must_exist)
    {
        context.problem_at("audit.directory", reason);
    }
    Audit { directory, must_exist, durability, segment_size, retain, max_size, refusals, key_file, fields }
}

fn read_max_size(context: &mut Context<'_>, table: &mut Table) -> Option<u64> {
    match table.members.get("max_size").map(|value| &value.kind) {
        Some(Kind::Text(text) | Kind::Loose(text)) if text == "none" => {
            drop(table.take(context, "max_size"));
            None
        }
        _ => Some(table.size(context, "max_size", 0, ("256KiB", "8192GiB"))).filter(|size| *size > 0),
    }
}

fn read_fields(context: &mut Context<'_>, table: &mut Table) -> Vec<(String, Shown)> {
    let Some(value) = table.take(context, "fields") else { return Vec::new() };
    let key = table.key("fields");
    let Kind::Table(members) = value.kind else {
        context.problem(&value.place, key, "must be a table, as in { inspectors = \"hmac\" }");
        return Vec::new();
    };
    let mut fields = Vec::new();
    for (name, value) in members {
        let shown = match &value.kind {
            Kind::Text(text) | Kind::Loose(text) => Shown::ALL.into_iter().find(|(_, word)| word == text),
            _ => None,
        };
        match shown {
            Some((shown, _)) => fields.push((name, shown)),
            None => {
                let reason = "must be \"clear\", \"hmac\" or \"omit\"";
                context.problem(&value.place, format!("{key}.{name}"), reason);
            }
        }
    }
    fields
}

fn read_idempotency(context: &mut Context<'_>, root: &mut Table) -> Idempotency {
    let mut table = root.section(context, "idempotency");
    let idempotency = Idempotency {
        is_max_keys_set: table.members.contains_key("max_keys"),
        window: table.duration(context, "window", "24h", ("1h", "7d")),
        max_keys: table.integer(context, "max_keys", 1_000_000, 1..=10_000_000),
        reply_memory: table.size(context, "reply_memory", 64 << 20, ("64KiB", "16GiB")),
        without_key: table.parsed(context, "without_key", WithoutKey::Guard, |text| {
            let named = WithoutKey::ALL.into_iter().find(|(_, word)| *word == text);
            named.map(|(mode, _)| mode).ok_or_else(|| {
                let words = WithoutKey::ALL.map(|(_, word)| format!("\"{word}\""));
                format!("must be one of {}", words.join(", "))
            })
        }),
        fingerprint_window: table.duration(context, "fingerprint_window", "10m", ("1s", "24h")),
    };
    table.close(context);
    idempotency
}

fn read_log(context: &mut Context<'_>, root: &mut Table) -> Log {
    let mut table = root.section(context, "log");
    let level = table.parsed(context, "level", "info".to_owned(), parse_level);
    let format = table.parsed(context, "format", LogFormat::Auto, |text| match text {
        "auto" => Ok(LogFormat::Auto),
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("must be \"auto\", \"text\" or \"json\"".into()),
    });
    let requests = table.parsed(context, "requests", LogRequests::Failures, |text| {
        let all = [LogRequests::Off, LogRequests::Failures, LogRequests::All];
        let found = all.into_iter().find(|requests| requests.as_str() == text);
        found.ok_or_else(|| "must be \"off\", \"failures\" or \"all\"".into())
    });
    table.close(context);
    Log { level, format, requests }
}
