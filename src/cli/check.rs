//! The command `check`: validates a configuration, then prints the one in effect and who can use which credential.
//!
//! It succeeds exactly when `serve` would start, and changes nothing. Its output is a valid configuration; everything else is in
//! comments of it. No secret is printed.

use std::io;
use std::io::IsTerminal;
use std::process::ExitCode;

use ccsqm_gateway::app::App;
use ccsqm_gateway::audit::limit;
use ccsqm_gateway::config::trail::CALL;
use ccsqm_gateway::config::{BUILT_IN_ROUTE, Config, CredentialUser, LOOPBACK_NOTICE, Route};
use ccsqm_gateway::idempotency::memory::{KeyMemory, mebibytes};
use ccsqm_gateway::preflight::exposures;
use ccsqm_gateway::secret::needles;
use ccsqm_gateway::{log, plain};
use serde_json::{Map, Value, json};

use super::out::{self, complain, out};
use super::refusal::StartRefusal;
use super::{BAD_CONFIGURATION, Configured, snippet};

/// A configuration, and how to speak about it.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    configured: Configured,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let file = args.configured.config.display().to_string();
    match args.configured.load() {
        // A good file is not enough: a directory, a port or a key may be missing that only a start would notice.
        Ok(config) => match App::dry_run(&config, &args.configured.config) {
            Err(error) => {
                let refusal = StartRefusal::of(&error);
                if args.json {
                    let problems = [refusal.to_json()];
                    document(&json!({ "good": false, "file": file, "problems": problems }));
                } else {
                    complain!("{}", refusal.line(&args.configured.config));
                }
                ExitCode::from(refusal.code)
            }
            Ok(notes) if args.json => {
                document(&machine_readable(&args.configured, &config, notes));
                ExitCode::SUCCESS
            }
            Ok(notes) => {
                print(&args.configured, &config, notes);
                ExitCode::SUCCESS
            }
        },
        Err(problems) => {
            if args.json {
                let problems: Vec<_> = problems.iter().map(|problem| problem.to_json()).collect();
                document(&json!({ "good": false, "file": file, "problems": problems }));
            // Only on a terminal: tools read the plain form, one line for each mistake.
            } else if io::stderr().is_terminal() {
                log::say(&snippet::reports(&problems));
            } else {
                out::complain_lines(&problems.to_string());
            }
            ExitCode::from(BAD_CONFIGURATION)
        }
    }
}

/// Prints a JSON document, indented.
fn document(value: &Value) {
    out::lines(&format!("{value:#}"));
}

fn print(configured: &Configured, config: &Config, notes: Vec<String>) {
    let file = configured.config.display();
    out!("# {file} is a good configuration. In effect, with environment, flags and defaults:");
    sections(&config.effective());
    access(config);
    memory(config);
    config.trail_size().lines().iter().for_each(|line| out!("# {line}"));
    for notice in notices(configured, config).into_iter().chain(notes) {
        out!("#");
        out!("# Note: {notice}");
    }
}

/// Prints who can use each credential.
fn access(config: &Config) {
    out!("");
    out!("# Who can use which credential:");
    let access = config.access();
    // By the credentials, not by their users: one that nobody can use must be seen, too.
    for name in config.effective()["credentials"].as_array().into_iter().flatten().map(|c| &c["name"]) {
        let mut users = access.iter().filter(|access| *name == *access.credential).peekable();
        let nobody = if users.peek().is_none() { " nobody" } else { "" };
        out!("# {}:{nobody}", name.as_str().unwrap_or_default());
        users.for_each(user);
    }
}

fn memory(config: &Config) {
    let KeyMemory { keys, successes, replies } = KeyMemory::new(&config.idempotency);
    let max_keys = config.idempotency.max_keys;
    let (keys, replies) = (mebibytes(keys), mebibytes(replies));
    out!("");
    out!("# Memory: {max_keys} keys take at most {keys} MiB, stored replies {replies} MiB.");
    if successes > 0 {
        let successes = mebibytes(successes);
        out!("# Memory: {max_keys} successes of calls without a key take at most {successes} MiB.");
    }
}

fn machine_readable(configured: &Configured, config: &Config, notes: Vec<String>) -> Value {
    let KeyMemory { keys, successes, replies } = KeyMemory::new(&config.idempotency);
    let trail = config.trail_size();
    let lasts = |with_refusals| trail.max_size_lasts(with_refusals).map(|time| time.as_secs());
    json!({
        "good": true,
        "file": configured.config.display().to_string(),
        "configuration": config.effective(),
        "access": config.access(),
        "memory": { "keys_bytes": keys, "successes_bytes": successes, "replies_bytes": replies },
        "trail": {
            "call_bytes": CALL,
            "calls_per_hour": trail.calls_per_hour(),
            "calls_bytes_per_day": trail.calls_per_day(),
            "refusals_bytes_per_day": trail.refusals_per_day(),
            "max_size_lasts_seconds": lasts(false),
            "max_size_lasts_with_refusals_seconds": lasts(true),
            "retain_needs_bytes": trail.retain_needs(),
        },
        "notices": notices(configured, config).into_iter().chain(notes).collect::<Vec<_>>(),
    })
}

/// Returns what an operator should know of a good configuration, as sentences.
fn notices(configured: &Configured, config: &Config) -> Vec<String> {
    let loopback = config.trusts_loopback().then(|| LOOPBACK_NOTICE.to_owned());
    let memory = KeyMemory::new(&config.idempotency).notice();
    let (limit, trail) = (limit::notice(config), config.trail_size().notice());
    let misnamed = config.misnamed_variables(std::env::vars_os());
    let exposures = exposures(config, &configured.config);
    let of_trail = trail.into_iter().chain(limit);
    loopback
        .into_iter()
        .chain(memory)
        .chain(of_trail)
        .chain(needles::notices(config))
        .chain(misnamed)
        .chain(exposures)
        .collect()
}

fn user(access: &CredentialUser) {
    let (who, is_frozen) = (&access.who, if access.is_frozen { "; FROZEN" } else { "" });
    out!(
        "#   {}: {who}, at {}; on {}; as operator {}; {}, burst {}{is_frozen}",
        access.caller,
        access.listeners.join(" and "),
        access.routes.join(", "),
        access.operators.join(" or "),
        access.rate_limit,
        access.burst,
    );
}

fn sections(configuration: &Value) {
    for (name, section) in configuration.as_object().into_iter().flatten() {
        match section {
            Value::Array(tables) => tables.iter().for_each(|table| members(&format!("[[{name}]]"), table)),
            _ => members(&format!("[{name}]"), section),
        }
    }
}

/// Prints one table of the configuration.
fn members(header: &str, table: &Value) {
    // A file may not set these keys of the built-in route, so they are comments: the output must be accepted as a configuration.
    let built_in = header == "[[routes]]" && table["name"] == BUILT_IN_ROUTE;
    let is_fixed = |key: &str| built_in && Route::FIXED.contains(&key);
    out!("");
    out!("{header}");
    for (key, value) in table.as_object().into_iter().flatten() {
        match value {
            Value::Null if built_in && key == "contract_file" => out!("# {key}: built in"),
            // TOML has no null, so that a key which is not set can only be a comment.
            Value::Null => out!("# {key}: not set"),
            _ if built_in && key == "contract_file" => {
                out!("{key} = {} # replaces the built-in contract", toml(value));
            }
            _ if is_fixed(key) => out!("# {key}: {}, built in", toml(value)),
            _ => out!("{key} = {}", toml(value)),
        }
    }
}

/// Returns a value in the syntax of TOML, on one line.
fn toml(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(toml).collect::<Vec<_>>().join(", ")),
        Value::Object(members) => inline_table(members),
        _ => value.to_string().chars().map(escaped).collect(),
    }
}

/// Returns a character of a JSON text as TOML writes it: escaped if it is not plain.
// Both languages have the same escapes, except that TOML has no surrogate pairs: a character beyond U+FFFF is `\UXXXXXXXX`.
fn escaped(character: char) -> String {
    let (escaped, code) = (plain::line(character.encode_utf8(&mut [0; 4])), u32::from(character));
    if escaped.len() > 6 { format!("\\U{code:08x}") } else { escaped }
}

fn inline_table(members: &Map<String, Value>) -> String {
    if members.is_empty() {
        return "{}".into();
    }
    let set = members.iter().filter(|(_, value)| !value.is_null());
    let members: Vec<_> =
        set.map(|(key, value)| format!("{} = {}", toml(&json!(key)), toml(value))).collect();
    format!("{{ {} }}", members.join(", "))
}
