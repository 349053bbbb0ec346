//! Raw values to typed ones. Goes on after a mistake, so that all are told at once.

mod callers;
mod inbound;
mod outbound;
mod routes;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::model::durability::Durability;
use crate::model::redaction::Shown;

use callers::{read_callers, read_credentials};
use inbound::{read_admin, read_listeners, read_server};
use outbound::{is_ours, read_token, read_upstream};
use routes::read_routes;

use super::named_files::{FileKind, NO_FILE, NamedFiles};
use super::raw::{Kind, Layers, Syntax, Value};
use super::table::{Context, Found, Reading, Table};
use super::values::{parse_level, parse_rate, parse_word};
use super::{
    Audit, Config, Idempotency, Limit, Log, LogFormat, LogRequests, Problems, RefusalBudget, WithoutKey,
    relations,
};

/// Bounds of a whole exchange.
const EXCHANGE: (&str, &str) = ("50ms", "10m");

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
    let quota = read_limit(context, &mut section, "rate", 50, 100);
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

fn read_admin_address(context: &mut Context<'_>, table: &mut Table) -> SocketAddr {
    table.parsed(context, "address", ([127, 0, 0, 1], 9090).into(), |text| {
        text.parse::<SocketAddr>()
            .map_err(|_| "must be an address with a port, as in \"127.0.0.1:9090\"".into())
    })
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

fn read_limit(
    context: &mut Context<'_>,
    table: &mut Table,
    rate: &'static str,
    per_second: u32,
    burst: u32,
) -> Limit {
    let one = NonZeroU32::MIN;
    let default = (NonZeroU32::new(per_second).unwrap_or(one), Duration::from_secs(1));
    let (count, period) = table.parsed(context, rate, default, parse_rate);
    let burst = table.integer(context, "burst", burst as usize, 1..=1_000_000);
    Limit { count, period, burst: u32::try_from(burst).ok().and_then(NonZeroU32::new).unwrap_or(one) }
}

fn read_audit(context: &mut Context<'_>, root: &mut Table) -> Audit {
    let mut table = root.section(context, "audit");
    let named = table.path(context, "directory");
    let must_exist = table.boolean(context, "must_exist");
    let durability = table.parsed(context, "durability", Durability::default(), parse_word);
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
        let word = match &value.kind {
            Kind::Text(text) | Kind::Loose(text) => text,
            _ => "",
        };
        match parse_word(word) {
            Ok(shown) => fields.push((name, shown)),
            Err(reason) => context.problem(&value.place, format!("{key}.{name}"), reason),
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
        without_key: table.parsed(context, "without_key", WithoutKey::Guard, parse_word),
        fingerprint_window: table.duration(context, "fingerprint_window", "10m", ("1s", "24h")),
    };
    table.close(context);
    idempotency
}

fn read_log(context: &mut Context<'_>, root: &mut Table) -> Log {
    let mut table = root.section(context, "log");
    let level = table.parsed(context, "level", "info".to_owned(), parse_level);
    let format = table.parsed(context, "format", LogFormat::Auto, parse_word);
    let requests = table.parsed(context, "requests", LogRequests::Failures, parse_word);
    table.close(context);
    Log { level, format, requests }
}
