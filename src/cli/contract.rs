//! `contract check`: a body against a contract.

use std::{io::Read, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use ccsqm_gateway::contract::{Contract, Fault};

use super::BAD_CONFIGURATION;

/// Check a body against a contract.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Check a body; exits with 1 when it breaks the contract.
    Check {
        /// A JSON Schema file, or `appointQualityTask` for the built-in one.
        schema: String,
        /// The body, or `-` for standard input.
        body: PathBuf,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Command::Check { schema, body } = args.command;
    let text = if schema == "appointQualityTask" {
        Contract::APPOINT_QUALITY_TASK.to_owned()
    } else {
        std::fs::read_to_string(&schema).with_context(|| schema.clone())?
    };
    let contract = match Contract::compile(&text) {
        Ok(contract) => contract,
        Err(error) => {
            eprintln!("{schema}: {error}");
            return Ok(ExitCode::from(BAD_CONFIGURATION));
        }
    };
    let mut bytes = Vec::new();
    if body.as_os_str() == "-" {
        std::io::stdin().read_to_end(&mut bytes)?;
    } else {
        bytes = std::fs::read(&body).with_context(|| body.display().to_string())?;
    }
    match contract.check(bytes.into()) {
        Ok(_) => {
            println!("the body keeps the contract");
            return Ok(ExitCode::SUCCESS);
        }
        Err(Fault::NotJson(fault)) => println!("not strict JSON: {fault}"),
        Err(Fault::Violations(violations)) => {
            for violation in &violations.list {
                println!("{}: {} ({})", violation.pointer, violation.detail, violation.code);
            }
            println!("{} in all", violations.total);
        }
    }
    Ok(ExitCode::FAILURE)
}
