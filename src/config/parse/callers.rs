//! Callers, and the credentials that are used for them.

use std::collections::HashSet;

use http::HeaderName;

use super::{in_folder, is_ours, read_limit, read_list, read_name};
use crate::config::peer::parse_peer;
use crate::config::raw::Place;
use crate::config::table::{Context, Found, Referent, Table};
use crate::config::values::{parse_operator, parse_word};
use crate::config::{BareIds, Caller, Credential, PeerRule, SecretSource};
use crate::ids;
use crate::model::header_names::looks_like_credential;

pub(super) fn read_credentials(context: &mut Context<'_>, root: &mut Table) -> Vec<Credential> {
    let tables = root.tables(context, "credentials");
    if tables.is_empty() {
        root.lacks(context, "credentials", "at least one [[credentials]] is needed");
    }
    let mut names = HashSet::new();
    tables
        .into_iter()
        .map(|mut table| {
            let name = read_name(context, &mut table, &mut names);
            let app_key = read_secret(context, &mut table, "app_key", "app_key_file", "app_key_env");
            let app_secret =
                read_secret(context, &mut table, "app_secret", "app_secret_file", "app_secret_env");
            table.close(context);
            Credential { name, app_key, app_secret }
        })
        .collect()
}

fn read_secret(
    context: &mut Context<'_>,
    table: &mut Table,
    inline: &'static str,
    file: &'static str,
    env: &'static str,
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
            good_secret(context, inline == "app_key", SecretSource::File(value), &place, key)
        }
        (None, Some(Found { value, place, key })) => {
            good_secret(context, inline == "app_key", SecretSource::Env(value), &place, key)
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
    source: SecretSource,
    place: &Place,
    key: String,
) -> SecretSource {
    context.reads(place, &key);
    let files = context.files;
    let checked = if is_app_key { files.check_app_key(&source) } else { files.check_secret(&source) };
    if let Err(reason) = checked {
        context.problem(place, key, in_folder(context, reason));
    }
    source
}

pub(super) fn read_callers(context: &mut Context<'_>, root: &mut Table) -> Vec<Caller> {
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
    let rate_limit = read_limit(context, &mut table, "rate_limit", 20, 40);
    let require_header =
        table.parsed(context, "require_header", None, |text| parse_required_header(text).map(Some));
    let bare_ids = table.parsed(context, "bare_ids", BareIds::default(), parse_word);
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
