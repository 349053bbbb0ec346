//! Validation pipeline: the merged layers become a [`Config`], or the list of all mistakes in them.
//!
//! Each step goes on after a mistake. The order of the steps is what keeps one mistake from being reported as
//! several.

use std::net::SocketAddr;
use std::path::Path;

use ::config::{Value, ValueKind};

use super::complete::complete;
use super::context::{Context, Reading};
use super::named_files::NamedFiles;
use super::reader::{section, tables};
use super::source::{Layers, Syntax};
use super::{Admin, BUILT_IN_ROUTE, Config, Problems, defaults, files, relations};

/// The names at the top level: sections and lists of tables.
const SECTIONS: [&str; 12] = [
    "listeners",
    "admin",
    "server",
    "upstream",
    "token",
    "credentials",
    "callers",
    "quota",
    "audit",
    "idempotency",
    "log",
    "routes",
];

/// Validates the layers. Returns the configuration and all keys that it may have, or every mistake, sorted by place.
/// Relative paths start at `folder`. `files` checks the named files, and `reading` is set to the key whose file is
/// being read.
pub(super) fn validate(
    layers: Layers,
    folder: &Path,
    files: &dyn NamedFiles,
    reading: Reading,
) -> Result<(Config, Vec<String>), Problems> {
    let mut context = Context::new(&layers, folder, files, reading);
    // 1. Types and bounds of single values. Poisons the keys of values that cannot be read; all later steps check that.
    let mut config = read(&mut context, &layers.root);
    // 2. What each table must contain. Before unknown names: the suggestion for a misspelt name prefers a missing key.
    complete(&mut context, &mut config);
    // 3. Before relations, so that none of them fails because of a default that can be adapted.
    defaults::give_way(&context, &mut config);
    // 4. Before files: a misspelt `key_file` poisons `audit.key_file`. Otherwise the default place of the key
    // would be checked, and a missing key would be a second mistake.
    context.report_unknown(|variable| config.setting_meant_by(variable));
    // 5. Before relations, which skip what a bad file has poisoned.
    files::look_at(&mut context, &mut config);
    context.report_missing();
    // With lines missing, any value may be a default in the place of one that was written: no relation is certain.
    if context.syntax == Syntax::Whole {
        relations::check(&mut context, &config);
    }
    // Keys name tables by their index in the file. So the built-in route moves to the front only when no key is
    // needed any more.
    config.routes.sort_by_key(|route| route.name != BUILT_IN_ROUTE);
    let mut problems = layers.problems;
    problems.append(&mut context.problems);
    if problems.is_empty() {
        return Ok((config, context.known()));
    }
    problems.sort_by(|a, b| (&a.location, &a.key).cmp(&(&b.location, &b.key)));
    Err(Problems(problems))
}

/// Returns the address of the admin listener, for `healthcheck`. Mistakes in other settings are ignored, since the
/// gateway that runs may have started with an older file. If a line of the file is not TOML, every mistake of the
/// layers is an error: that line may be the one with the address.
pub(super) fn admin_address(layers: Layers, files: &dyn NamedFiles) -> Result<SocketAddr, Problems> {
    let mut context = Context::new(&layers, Path::new("."), files, Reading::default());
    let admin: Admin = section(&mut context, &layers.root, "admin");
    let Layers { mut problems, syntax, .. } = layers;
    problems.retain(|problem| syntax != Syntax::Whole || problem.key.starts_with("admin"));
    problems.extend(
        context.problems.into_iter().filter(|problem| ["admin", "admin.address"].contains(&&*problem.key)),
    );
    if problems.is_empty() { Ok(admin.address) } else { Err(Problems(problems)) }
}

/// Reads all sections. A value that cannot be read gets its default, and its mistake is noted in the context.
fn read(context: &mut Context<'_>, root: &Value) -> Config {
    if let ValueKind::Table(members) = &root.kind {
        context.expect("", &SECTIONS, members.keys());
    }
    Config {
        listeners: tables(context, root, "listeners"),
        admin: section(context, root, "admin"),
        server: section(context, root, "server"),
        upstream: section(context, root, "upstream"),
        token: section(context, root, "token"),
        credentials: tables(context, root, "credentials"),
        callers: tables(context, root, "callers"),
        quota: section(context, root, "quota"),
        audit: section(context, root, "audit"),
        idempotency: section(context, root, "idempotency"),
        log: section(context, root, "log"),
        routes: tables(context, root, "routes"),
    }
}
