//! The commands `audit init | verify | in-doubt | unresolved | resolve | show | head | accept-loss | accept-clock`.
//!
//! They read and verify a trail, also beside a running gateway. What changes the trail of a running gateway is done by that
//! gateway, which has the trail locked: the command asks it through its control socket.

mod show;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{fs, io};

use anyhow::bail;
use ccsqm_gateway::audit::chain::{KeyError, key_path};
use ccsqm_gateway::audit::recovery::{TrailState, read};
use ccsqm_gateway::audit::resolution::{Finding, ResolveError, resolve};
use ccsqm_gateway::audit::unresolved_calls::{Resolution, UnresolvedCall};
use ccsqm_gateway::audit::{OpenError, accept_clock, accept_loss, accept_lost_key, init, is_live};
use ccsqm_gateway::control;
use ccsqm_gateway::control::{Request, Response};
use ccsqm_gateway::keyed_hash::{Keys, hex};
use rustix::process::geteuid;
use serde_json::json;
use uuid::Uuid;

use super::out::{complain, out};
use super::parse_id;
use super::refusal::code_of;

/// Create, verify and read an audit trail. All commands work while a gateway runs, unless they say otherwise.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Create the directory and the key of a new trail. What already exists is not changed.
    Init(Place),
    /// Recompute every hash. Names each line whose hash does not match and what is missing, and exits with 1 if there is any.
    Verify(Trail),
    /// List intents without an outcome: the calls in progress if a gateway runs, otherwise those that a crash left open.
    /// Exits with 1 if there are any. `unresolved` lists the calls of unknown outcome.
    InDoubt(Trail),
    /// List the calls of unknown outcome that are not resolved. Exits with 1 if there are any.
    Unresolved(Trail),
    /// Record what became of a call of unknown outcome. Check in the cloud first. If a gateway runs, it writes the record;
    /// it is asked through its control socket. Exits with 1 if the result contradicts what is known.
    Resolve(Resolve),
    /// Print all records of one request. Exits with 1 if there are none.
    Show(Show),
    /// Print number and hash of the last record, to be kept elsewhere.
    Head(Trail),
    /// Accept the loss of a part of the trail: from then on Idempotency-Keys that are not found count as new, and tasks may
    /// be assigned twice. Recorded in the trail. The gateway must not run.
    AcceptLoss(Trail),
    /// Accept the wall clock although the gateway finds it doubtful. Recorded in the trail. If a gateway runs, it writes the
    /// record; it is asked through its control socket.
    AcceptClock(AcceptClock),
}

#[derive(clap::Args)]
struct Resolve {
    #[command(flatten)]
    place: Place,
    /// The call's request id, as `audit unresolved` lists it.
    #[arg(value_parser = parse_id)]
    id: Uuid,
    /// What you found: the task is assigned, or not.
    #[arg(value_enum)]
    result: Outcome,
    /// Your name, for the record.
    #[arg(long, value_name = "NAME")]
    by: String,
    /// A note for the record.
    #[arg(long, value_name = "TEXT")]
    note: Option<String>,
    /// Replace an earlier resolution by another result; the trail keeps both.
    #[arg(long)]
    correct: bool,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Outcome {
    Done,
    NotDone,
}

#[derive(clap::Args)]
struct Show {
    /// The audit directory.
    directory: PathBuf,
    /// The request id.
    #[arg(value_parser = parse_id)]
    id: Uuid,
    /// Print the lines as they are in the trail, so that their hashes can be recomputed. In lines that an older version or
    /// another program wrote, characters that a terminal may interpret are escaped.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct AcceptClock {
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    asking: Asking,
}

/// How a running gateway is asked.
#[derive(clap::Args)]
struct Asking {
    /// The control socket of the gateway; default: the one that the audit directory names.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Where a trail is.
#[derive(clap::Args)]
struct Place {
    /// The audit directory.
    directory: PathBuf,
    /// The chain's key; default: `audit.key` in the directory.
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Trail {
    #[command(flatten)]
    place: Place,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let good = match &args.command {
        Command::Init(place) => make(place),
        Command::Verify(trail) => trail.read().map(|found| verify(trail, &found)),
        Command::InDoubt(trail) => trail.read().map(|found| in_doubt(trail, &found)),
        Command::Unresolved(trail) => trail.read().map(|found| unresolved(trail, &found)),
        Command::Resolve(args) => record_resolution(args),
        Command::Show(Show { directory, id, json }) => show::show(directory, *id, *json),
        Command::Head(trail) => trail.read().map(|found| head(trail, &found)),
        Command::AcceptLoss(trail) => accept(trail),
        Command::AcceptClock(args) => believe_clock(args),
    };
    Ok(match good {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            complain!("ccsqm-gateway: {error}");
            ExitCode::from(code_of(&error))
        }
    })
}

/// Returns an error with the directory that it is about. Its kind stays, which decides the exit code.
fn named(directory: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", directory.display()))
}

fn make(Place { directory, key_file }: &Place) -> anyhow::Result<bool> {
    let is_new = init::init(directory, key_file.as_deref())?;
    let what = if is_new { "is ready for a new trail" } else { "was ready before; nothing was changed" };
    out!("{} {what}", directory.display());
    Ok(true)
}

impl Place {
    /// Returns the keys of the trail.
    fn keys(&self) -> anyhow::Result<Keys> {
        let Self { directory, key_file } = self;
        // The directory first: without it, or without access to it, the key in it is not what is wrong.
        fs::metadata(directory).map_err(|error| named(directory, &error))?;
        if let Some(path) = key_file {
            return Ok(Keys::load(path)?);
        }
        Keys::load_own(directory).map_err(|error| match &error {
            KeyError::File(_, cause) if cause.kind() == ErrorKind::NotFound => {
                let text = format!("{error}; --key-file names another file with the key of the trail");
                anyhow::Error::new(error).context(text)
            }
            _ => error.into(),
        })
    }
}

impl Trail {
    /// Reads and verifies the whole trail.
    fn read(&self) -> anyhow::Result<TrailState> {
        let directory = &self.place.directory;
        // With a wrong key each record looks changed. One error about the key says more than a line for each record.
        let found = read(directory, &self.place.keys()?).map_err(|error| named(directory, &error))?;
        let record = found.faults.first().map(|fault| fault.seq).filter(|_| !found.fits_its_key());
        if let Some(record) = record {
            let key = self.place.key_file.clone().unwrap_or_else(|| key_path(directory));
            bail!(
                "{}: the key in {} does not match record {record}, nor any other: it is the key of another trail, or \
                 each record was changed. Name the trail's own key with --key-file; if that does not match either, the \
                 records were changed",
                directory.display(),
                key.display()
            );
        }
        Ok(found)
    }
}

/// Prints what is wrong with a trail. Returns whether nothing is.
fn verify(trail: &Trail, found: &TrailState) -> bool {
    // A running gateway may be in the middle of a write, so that a torn last line is no fault.
    let torn = found.torn.as_ref().filter(|_| !is_live(&trail.place.directory));
    // Not a success: otherwise a trail of which all segments were removed would pass as whole.
    let is_empty = found.seq == 0;
    let faults: Vec<_> = found.faults.iter().chain(&found.recorded).collect();
    let whole = faults.is_empty() && found.damage.is_empty() && torn.is_none() && !is_empty;
    if trail.json {
        let torn = torn.map(|(file, offset, _)| json!({ "file": file, "offset": offset }));
        let (records, missing) = (found.seq, &found.damage);
        out!(
            "{}",
            json!({ "whole": whole, "records": records, "faults": faults, "missing": missing, "torn": torn })
        );
        return whole;
    }
    for fault in faults {
        out!("{}:{}: record {}: {}", fault.file.display(), fault.line, fault.seq, fault.reason);
    }
    let directory = &trail.place.directory;
    for damage in &found.damage {
        out!("{}: {}", name(&directory.join(&damage.file)), damage.reason);
    }
    if found.is_lock_unreadable {
        out!(
            "{}: cannot be read, so a missing end of the trail would not be noticed",
            name(&directory.join("lock"))
        );
    }
    if let Some((file, offset, _)) = torn {
        out!("{}: byte {offset}: the last line is torn; the next start cuts it off", name(file));
    }
    if is_empty && found.damage.is_empty() {
        out!("{}: there are no records; either none was written yet, or all were removed", name(directory));
    }
    if whole {
        out!("whole: {} records, head {}", found.seq, hex(&found.hash));
    }
    whole
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

/// Prints what is missing of a trail to stderr, for the commands whose own output does not say it.
// An incomplete trail makes their lists incomplete, which a script that reads stdout alone cannot see.
fn warn(trail: &Trail, found: &TrailState) {
    for damage in &found.damage {
        let file = trail.place.directory.join(&damage.file);
        complain!("ccsqm-gateway: {}: {}", name(&file), damage.reason);
    }
}

fn in_doubt(trail: &Trail, found: &TrailState) -> bool {
    warn(trail, found);
    let open: Vec<_> = found.unresolved.at_work().collect();
    list(trail, &open);
    if !trail.json {
        out!("{} in doubt", open.len());
        let unknown = found.unresolved.unknown().count();
        if unknown > 0 {
            out!("{unknown} more of unknown outcome: see `ccsqm-gateway audit unresolved`");
        }
    }
    open.is_empty()
}

fn unresolved(trail: &Trail, found: &TrailState) -> bool {
    warn(trail, found);
    let unknown: Vec<_> = found.unresolved.unknown().collect();
    list(trail, &unknown);
    if !trail.json {
        out!("{} unresolved", unknown.len());
        let open = found.unresolved.at_work().count();
        if open > 0 && !is_live(&trail.place.directory) {
            out!("{open} more without an outcome: the next start makes them unknown");
        }
    }
    unknown.is_empty()
}

fn list(trail: &Trail, calls: &[&UnresolvedCall]) {
    for call in calls {
        if trail.json {
            out!("{}", json!(call));
            continue;
        }
        let text = |value: &Option<String>| value.as_ref().map_or("-".to_owned(), |text| word(text));
        let task = call.task.as_ref().map_or("-".to_owned(), ToString::to_string);
        let (caller, route) = (text(&call.caller), text(&call.route));
        out!("{} {} caller {caller} route {route} task {task}", call.time, call.id);
    }
}

/// Returns a text for a place in a line of words: in quotes, as JSON, if it could be taken for more than one word.
fn word(text: &str) -> String {
    let is_word = !text.is_empty() && text.chars().all(|it| it > ' ' && it != '"');
    if is_word { text.to_owned() } else { json!(text).to_string() }
}

fn head(trail: &Trail, found: &TrailState) -> bool {
    warn(trail, found);
    let hash = hex(&found.hash);
    if trail.json {
        out!("{}", json!({ "seq": found.seq, "hash": hash }));
    } else {
        out!("{} {hash}", found.seq);
    }
    true
}

fn accept(trail: &Trail) -> anyhow::Result<bool> {
    let Place { directory, key_file } = &trail.place;
    // Without the key nothing in the segments can be proven. They are moved aside, and a new trail begins.
    if let Err(init::Absent::KeyOfSegments { .. }) = init::check(directory, key_file.as_deref(), false) {
        let aside = accept_lost_key(directory)?;
        out!(
            "accepted: the segments without a key are in {}; a new trail begins",
            directory.join(aside).display()
        );
        return Ok(true);
    }
    let found = trail.read()?;
    for fault in found.faults.iter().chain(&found.recorded) {
        out!("{}:{}: record {}: {}", fault.file.display(), fault.line, fault.seq, fault.reason);
    }
    warn(trail, &found);
    match accept_loss(directory, trail.place.keys()?)? {
        Some(seq) => out!("accepted by record {seq}: Idempotency-Keys that are not found count as new"),
        None => out!("nothing is lost that was not accepted before"),
    }
    Ok(true)
}

fn record_resolution(args: &Resolve) -> anyhow::Result<bool> {
    let finding = Finding {
        id: args.id,
        result: match args.result {
            Outcome::Done => Resolution::Done,
            Outcome::NotDone => Resolution::NotDone,
        },
        by: args.by.clone(),
        note: args.note.clone(),
        correct: args.correct,
    };
    // Without a running gateway. The user of this process is recorded, as a gateway records that of the control socket's peer.
    let append = || {
        let resolved = resolve(&args.place.directory, args.place.keys()?, &finding, geteuid().as_raw());
        match resolved {
            Err(ResolveError::Trail(error)) => Err(error.into()),
            resolved => Ok(Response::of_resolution(&finding, resolved)),
        }
    };
    let answer = ask_or_append(&args.place, &args.asking, &Request::Resolve(finding.clone()), append)?;
    Ok(print(&args.asking, &answer))
}

fn believe_clock(args: &AcceptClock) -> anyhow::Result<bool> {
    let append = || {
        let seq = accept_clock(&args.place.directory, args.place.keys()?)?;
        let text = format!("accepted: the next start trusts the wall clock (record {seq})");
        Ok(Response { ok: true, seq: Some(seq), text })
    };
    let answer = ask_or_append(&args.place, &args.asking, &Request::AcceptClock, append)?;
    Ok(print(&args.asking, &answer))
}

/// Asks the gateway that writes a trail; without one, appends to the trail.
///
/// # Errors
///
/// The error of `append`. A gateway that does not answer is a refusal in the answer, not an error.
fn ask_or_append(
    place: &Place,
    asking: &Asking,
    request: &Request,
    append: impl FnOnce() -> anyhow::Result<Response>,
) -> anyhow::Result<Response> {
    let directory = &place.directory;
    if is_live(directory) {
        return Ok(control::ask(directory, asking.control.as_deref(), request).unwrap_or_else(|error| {
            Response::refused(&format!("{}: a gateway writes this trail, but {error:#}", directory.display()))
        }));
    }
    append().or_else(|error| match error.downcast_ref() {
        // Since the check above a gateway has started, or another command has taken the lock.
        Some(OpenError::Locked(_)) => Ok(Response::refused(&format!("{error}; try again"))),
        _ => Err(error),
    })
}

/// Prints an answer. Returns whether it was a success.
fn print(asking: &Asking, answer: &Response) -> bool {
    if asking.json {
        out!("{}", json!(answer));
    } else if answer.ok {
        out!("{}", answer.text);
    } else {
        complain!("ccsqm-gateway: {}", answer.text);
    }
    answer.ok
}
