//! `audit init | verify | in-doubt | unresolved | head | accept-loss | accept-clock`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use ccsqm_gateway::audit::{
    StartError, accept_clock, accept_loss, accept_lost_key,
    chain::{KeyError, Keys, hex},
    init, is_live,
    recovery::{Found, read},
    unresolved::UnresolvedCall,
};
use serde_json::json;

use super::BAD_CONFIGURATION;

/// Make, verify and read an audit trail. All work beside a running gateway, but for those that say otherwise.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make the directory of a new trail and its key, once; what is there stays.
    Init(Place),
    /// Recompute every hash; exits with 1 and names each line that does not fit, and what is missing.
    Verify(Trail),
    /// List intents without an outcome: of a stopped trail those that a crash left open, of a live one those at work.
    /// Exits with 1 when there are some. Those of unknown outcome are listed by `unresolved`.
    InDoubt(Trail),
    /// List the calls of unknown outcome that nobody has resolved; exits with 1 when there are some.
    Unresolved(Trail),
    /// Print the last record's number and hash, to be kept elsewhere.
    Head(Trail),
    /// Accept that a part of the trail is lost: Idempotency-Keys that are not found count as new from then on, and tasks may
    /// be assigned twice. Recorded in the trail. The gateway must not run.
    AcceptLoss(Trail),
    /// Believe the wall clock as it is, where a gateway finds it doubtful; recorded in the trail. The gateway must not run.
    AcceptClock(Trail),
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
    /// For machines.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let good = match &args.command {
        Command::Init(place) => make(place),
        Command::Verify(trail) => trail.read().map(|found| verify(trail, &found)),
        Command::InDoubt(trail) => trail.read().map(|found| in_doubt(trail, &found)),
        Command::Unresolved(trail) => trail.read().map(|found| unresolved(trail, &found)),
        Command::Head(trail) => trail.read().map(|found| head(trail, &found)),
        Command::AcceptLoss(trail) => accept(trail),
        Command::AcceptClock(trail) => believe_clock(trail),
    };
    Ok(match good {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ccsqm-gateway: {error}");
            ExitCode::from(BAD_CONFIGURATION)
        }
    })
}

fn make(Place { directory, key_file }: &Place) -> anyhow::Result<bool> {
    let is_new = init::init(directory, key_file.as_deref())?;
    let what = if is_new { "is ready for a new trail" } else { "was ready before; nothing was changed" };
    println!("{} {what}", directory.display());
    Ok(true)
}

impl Trail {
    fn keys(&self) -> Result<Keys, KeyError> {
        let Place { directory, key_file } = &self.place;
        match key_file {
            Some(path) => Keys::load(path),
            None => Keys::load_own(directory),
        }
    }

    fn read(&self) -> anyhow::Result<Found> {
        let directory = self.place.directory.display();
        read(&self.place.directory, &self.keys()?).map_err(|error| anyhow::anyhow!("{directory}: {error}"))
    }
}

fn verify(trail: &Trail, found: &Found) -> bool {
    // A live trail may end in the middle of a write.
    let torn = found.torn.as_ref().filter(|_| !is_live(&trail.place.directory));
    let is_empty = found.seq == 0;
    let faults: Vec<_> = found.faults.iter().chain(&found.recorded).collect();
    let whole = faults.is_empty() && found.damage.is_empty() && torn.is_none() && !is_empty;
    if trail.json {
        let torn = torn.map(|(file, offset, _)| json!({ "file": file, "offset": offset }));
        let (records, missing) = (found.seq, &found.damage);
        println!(
            "{}",
            json!({ "whole": whole, "records": records, "faults": faults, "missing": missing, "torn": torn })
        );
        return whole;
    }
    for fault in faults {
        println!("{}:{}: record {}: {}", fault.file.display(), fault.line, fault.seq, fault.reason);
    }
    let directory = &trail.place.directory;
    for damage in &found.damage {
        println!("{}: {}", name(&directory.join(&damage.file)), damage.reason);
    }
    if found.is_lock_unreadable {
        println!(
            "{}: cannot be read, so that a missing end would not be noticed",
            name(&directory.join("lock"))
        );
    }
    if let Some((file, offset, _)) = torn {
        println!("{}: byte {offset}: the last line is torn; the next start cuts it off", name(file));
    }
    if is_empty && found.damage.is_empty() {
        println!(
            "{}: there are no records; either none was written yet, or all were removed",
            name(directory)
        );
    }
    if whole {
        println!("whole: {} records, head {}", found.seq, hex(&found.hash));
    }
    whole
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

/// Says what is missing to who asked for something else.
fn warn(trail: &Trail, found: &Found) {
    for damage in &found.damage {
        let file = trail.place.directory.join(&damage.file);
        eprintln!("ccsqm-gateway: {}: {}", name(&file), damage.reason);
    }
}

fn in_doubt(trail: &Trail, found: &Found) -> bool {
    warn(trail, found);
    let open: Vec<_> = found.unresolved.at_work().collect();
    list(trail, &open);
    if !trail.json {
        println!("{} in doubt", open.len());
        let unknown = found.unresolved.unknown().count();
        if unknown > 0 {
            println!("{unknown} more of unknown outcome: see `ccsqm-gateway audit unresolved`");
        }
    }
    open.is_empty()
}

fn unresolved(trail: &Trail, found: &Found) -> bool {
    warn(trail, found);
    let unknown: Vec<_> = found.unresolved.unknown().collect();
    list(trail, &unknown);
    if !trail.json {
        println!("{} unresolved", unknown.len());
        let open = found.unresolved.at_work().count();
        if open > 0 && !is_live(&trail.place.directory) {
            println!("{open} more without an outcome: the next start makes them unknown");
        }
    }
    unknown.is_empty()
}

fn list(trail: &Trail, calls: &[&UnresolvedCall]) {
    for call in calls {
        if trail.json {
            println!("{}", json!(call));
            continue;
        }
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
        let task = call.task.as_ref().map_or("-".to_owned(), ToString::to_string);
        let (caller, route) = (text(&call.caller), text(&call.route));
        println!("{} {} caller {caller} route {route} task {task}", call.time, call.id);
    }
}

fn head(trail: &Trail, found: &Found) -> bool {
    warn(trail, found);
    let hash = hex(&found.hash);
    if trail.json {
        println!("{}", json!({ "seq": found.seq, "hash": hash }));
    } else {
        println!("{} {hash}", found.seq);
    }
    true
}

fn accept(trail: &Trail) -> anyhow::Result<bool> {
    let Place { directory, key_file } = &trail.place;
    if let Err(init::Absent::KeyOfSegments { .. }) = init::check(directory, key_file.as_deref(), false) {
        let aside = accept_lost_key(directory)?;
        println!(
            "accepted: the segments without a key are in {}; a new trail begins",
            directory.join(aside).display()
        );
        return Ok(true);
    }
    let found = trail.read()?;
    if found.faults.is_empty() && found.damage.is_empty() && found.recorded.is_empty() {
        println!("nothing is lost: the trail is whole");
        return Ok(true);
    }
    for fault in found.faults.iter().chain(&found.recorded) {
        println!("{}:{}: record {}: {}", fault.file.display(), fault.line, fault.seq, fault.reason);
    }
    warn(trail, &found);
    let seq = accept_loss(directory, trail.keys()?)?;
    println!("accepted by record {seq}: Idempotency-Keys that are not found count as new");
    Ok(true)
}

fn believe_clock(trail: &Trail) -> anyhow::Result<bool> {
    match accept_clock(&trail.place.directory, trail.keys()?) {
        Ok(seq) if trail.json => println!("{}", json!({ "accepted": true, "seq": seq })),
        Ok(seq) => println!("accepted: the next start believes the wall clock (record {seq})"),
        Err(StartError::Locked(directory)) => {
            let directory = directory.display();
            eprintln!(
                "ccsqm-gateway: {directory}: a gateway writes this trail; stop it, accept the clock, and start it again"
            );
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    }
    Ok(true)
}
