//! The merged layers to a configuration. Goes on after a mistake, so that all are told at once.

use std::net::SocketAddr;
use std::path::Path;

use ::config::{Value, ValueKind};

use super::complete::complete;
use super::context::{Context, Reading};
use super::named_files::NamedFiles;
use super::reader::{section, tables};
use super::source::{Layers, Syntax};
use super::{Admin, BUILT_IN_ROUTE, Config, Problems, defaults, files, relations};

/// The sections and lists of tables.
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

/// Validates what the layers hold. Relative paths are relative to `folder`. Returns the keys that there are, too.
pub(super) fn validate(
    layers: Layers,
    folder: &Path,
    files: &dyn NamedFiles,
    reading: Reading,
) -> Result<(Config, Vec<String>), Problems> {
    let mut context = Context::new(&layers, folder, files, reading);
    let mut config = read(&mut context, &layers.root);
    complete(&mut context, &mut config);
    defaults::give_way(&context, &mut config);
    context.tell_unknown(|variable| config.setting_meant_by(variable));
    files::look_at(&mut context, &mut config);
    context.tell_what_lacks();
    if context.syntax == Syntax::Whole {
        relations::check(&mut context, &config);
    }
    // From here on no key is asked for by the place of its table.
    config.routes.sort_by_key(|route| route.name != BUILT_IN_ROUTE);
    let mut problems = layers.problems;
    problems.append(&mut context.problems);
    if problems.is_empty() {
        return Ok((config, context.known()));
    }
    problems.sort_by(|a, b| (&a.place, &a.key).cmp(&(&b.place, &b.key)));
    Err(Problems(problems))
}

/// The admin listener's address alone. A line that is no TOML may be the one that names it.
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
