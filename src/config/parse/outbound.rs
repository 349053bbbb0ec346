//! The upstream and the token endpoint.

use std::collections::HashSet;
use std::mem::discriminant;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::{EXCHANGE, good_file};
use crate::config::named_files::FileKind;
use crate::config::raw::Kind;
use crate::config::table::{Context, Found, Table};
use crate::config::values::{parse_proxy, parse_url, parse_word};
use crate::config::{Http2, IdentityFiles, LoginFiles, Token, Upstream, Url};
use crate::model::header_names::{looks_like_credential, may_pass};

const TOKEN_PATH: &str = "/apigovernance/api/oauth/tokenByAkSk";

pub(super) fn read_upstream(context: &mut Context<'_>, root: &mut Table) -> Upstream {
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
        http2: table.parsed(context, "http2", Http2::Off, parse_word),
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

pub(super) fn is_ours(name: &HeaderName) -> bool {
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

pub(super) fn read_token(context: &mut Context<'_>, root: &mut Table, base_url: &Url) -> Token {
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
