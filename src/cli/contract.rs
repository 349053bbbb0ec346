//! The command `contract check`: checks a body against a contract, as the gateway would.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use ccsqm_gateway::config::BareIds;
use ccsqm_gateway::contract::{BodyFault, Contract};
use serde_json::{Value, json};

use super::BAD_CONFIGURATION;
use super::out::{complain, out};

/// Check a body against a contract.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Check a body. Exits with 1 if it breaks the contract.
    Check {
        /// A JSON Schema file, or `appointQualityTask` for the built-in one.
        schema: String,
        /// The body, or `-` for standard input.
        body: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Command::Check { schema, body, json } = args.command;
    let contract = match compile(&schema) {
        Ok(contract) => contract,
        Err(reason) => {
            if json {
                out!("{}", json!({ "good": false, "contract": reason }));
            } else {
                complain!("{schema}: {reason}");
            }
            return Ok(ExitCode::from(BAD_CONFIGURATION));
        }
    };
    // `Detect` is the default of `bare_ids`, so that most callers get this result.
    let fault = contract.check(read(&body)?.into(), BareIds::Detect).result.err();
    if json {
        out!("{}", machine_text(fault.as_ref()));
    } else {
        print(fault.as_ref());
    }
    Ok(if fault.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compile(schema: &str) -> Result<Contract, String> {
    let text = match schema {
        "appointQualityTask" => Contract::APPOINT_QUALITY_TASK.to_owned(),
        path => std::fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?,
    };
    Contract::compile(&text).map_err(|error| error.to_string())
}

fn read(body: &Path) -> anyhow::Result<Vec<u8>> {
    if body.as_os_str() != "-" {
        return std::fs::read(body).with_context(|| body.display().to_string());
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn print(fault: Option<&BodyFault>) {
    match fault {
        None => out!("the body conforms to the contract"),
        Some(BodyFault::NotJson(fault)) => out!("not strict JSON: {fault}"),
        Some(BodyFault::Violations(violations)) => {
            for violation in &violations.list {
                out!("{}: {} ({})", violation.pointer, violation.detail, violation.code);
            }
            out!("{} in all", violations.total);
        }
    }
}

/// Returns the result as JSON. The violations have the form that they have in the `errors` of a refusal to a caller.
fn machine_text(fault: Option<&BodyFault>) -> Value {
    let (not_json, list, total) = match fault {
        None => (None, &[][..], 0),
        Some(BodyFault::NotJson(fault)) => (Some(fault.to_string()), &[][..], 0),
        Some(BodyFault::Violations(violations)) => (None, &violations.list[..], violations.total),
    };
    let errors: Vec<_> =
        list.iter().map(|v| json!({ "pointer": v.pointer, "code": v.code, "detail": v.detail })).collect();
    json!({ "good": fault.is_none(), "not_json": not_json, "errors": errors, "total": total })
}
