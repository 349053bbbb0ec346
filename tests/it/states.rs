//! The table of states that a start can find: clock, trail and boot, and what the gateway does in each. `tests/states.json` is
//! the table; each of its rows is brought about and observed on the real binary.
//!
//! All rows begin with copies of one trail. Its first run was 40 days ago in another boot, and an operator accepted the
//! present clock since, so that retention may remove its segments. The second run belongs to this boot, and has all calls that
//! are asked about.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{audit::segments, idempotency::until_keys_are_known, outcomes::caught, support::*};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

const CLOCKS: [&str; 2] = ["good", "doubtful"];
const TRAILS: [&str; 7] = ["whole", "gap", "newest", "all", "key", "empty", "absent"];
const BOOTS: [&str; 2] = ["same", "other"];

/// Rows that are walked at the same time.
const AT_ONCE: usize = 4;

/// The library that moves the wall clock, compiled once.
static PRELOAD: LazyLock<PathBuf> = LazyLock::new(|| compile("overload/clock"));

#[derive(Deserialize)]
struct Table {
    /// What each column, each state and each short word of the table means.
    #[expect(dead_code, reason = "for people")]
    about: Value,
    columns: Vec<String>,
    /// The short words of answers, and their status, code and outcome.
    answers: BTreeMap<String, String>,
    /// The short words of warnings, and how the warnings begin.
    warnings: BTreeMap<String, String>,
    rows: Vec<Vec<Value>>,
}

/// A row by its columns.
type Row = BTreeMap<String, Value>;

impl Table {
    fn load() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/states.json");
        serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
    }

    fn rows(&self) -> Vec<Row> {
        let row = |values: &Vec<Value>| {
            assert_eq!(values.len(), self.columns.len(), "{values:?}");
            self.columns.iter().cloned().zip(values.iter().cloned()).collect()
        };
        self.rows.iter().map(row).collect()
    }

    /// The short word of an answer.
    fn word(&self, reply: &Reply) -> String {
        let Reply { status, .. } = reply;
        let said = format!("{status} {} {}", reply.code(), reply.outcome()).replace("  ", " ");
        let known = self.answers.iter().find(|(_, answer)| **answer == said);
        known.map_or(said.clone(), |(word, _)| word.clone())
    }

    /// The short words of what `/readyz` warns of.
    fn words(&self, warnings: &Value) -> String {
        let word = |warning: &Value| {
            let text = warning.as_str().unwrap();
            let known = self.warnings.iter().find(|(_, begin)| text.starts_with(begin.as_str()));
            known.map_or(text, |(word, _)| word.as_str()).to_owned()
        };
        let words: Vec<_> = warnings.as_array().unwrap().iter().map(word).collect();
        if words.is_empty() { "-".into() } else { words.join(" ") }
    }
}

/// A folder with configuration, trail and wall clock, and the cloud behind it.
struct Machine {
    sandbox: Sandbox,
    folder: Arc<TempDir>,
    /// Which boot it is; `None`: that of the machine that runs the test.
    boot: Option<&'static str>,
}

impl Machine {
    fn new(boot: Option<&'static str>) -> Self {
        let machine = Self { sandbox: sandbox(), folder: Arc::new(TempDir::new().unwrap()), boot };
        machine.set_clock(0);
        machine
    }

    fn audit_directory(&self) -> PathBuf {
        self.folder.path().join("audit")
    }

    /// The wall clock is ahead by so many seconds.
    fn set_clock(&self, ahead: i64) {
        let unfinished = self.folder.path().join("clock.new");
        fs::write(&unfinished, ahead.to_string()).unwrap();
        fs::rename(unfinished, self.folder.path().join("clock")).unwrap();
    }

    /// What makes a command see this boot and this clock.
    fn through(&self) -> Vec<String> {
        const BOOT: &str = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
        let mut through = Vec::new();
        if let Some(boot) = self.boot {
            let file = self.folder.path().join("boot_id");
            fs::write(&file, format!("{boot}\n")).unwrap();
            through
                .extend(["unshare", "--mount", "sh", "-c", BOOT, file.to_str().unwrap()].map(str::to_owned));
        }
        let clock = self.folder.path().join("clock");
        through.push("env".into());
        through.push(format!("LD_PRELOAD={}", PRELOAD.display()));
        through.push(format!("CLOCK={}", clock.display()));
        through
    }

    fn start(&self, retain: &str, must_exist: bool) -> Gateway {
        let setup = Setup { through: self.through(), folder: Some(self.folder.clone()), ..Setup::default() }
            .set("idempotency.without_key", "guard")
            .set("audit.segment_size", "64KiB")
            .set("audit.retain", retain)
            .set("audit.must_exist", must_exist);
        let gateway = start_with(&self.sandbox, setup);
        until_keys_are_known(&gateway);
        wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
        gateway
    }

    /// The exit code of a command, and what it says. One that does not end is stopped.
    fn run(&self, words: &[&str]) -> (i32, String) {
        let through = self.through();
        let output = Command::new(&through[0])
            .args(&through[1..])
            .args(["timeout", "20", BINARY])
            .args(words)
            .env_remove("CCSQM_GATEWAY__SERVER__WORKERS")
            .output()
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    fn run_with_config(&self, verb: &str) -> (i32, String) {
        let config = self.folder.path().join("gateway.toml");
        self.run(&[verb, "--config", config.to_str().unwrap(), "--set", "audit.must_exist=true"])
    }
}

/// A call: which task, with which key; without one if that is empty. Many inspectors fill segments sooner.
fn call(gateway: &Gateway, task: u64, key: &str) -> Reply {
    let counts: Vec<_> = (0..INSPECTORS)
        .map(|number| json!({ "personID": format!("{}", 1_600_000 + number), "count": 2 }))
        .collect();
    let body = json!({
        "qualityTaskId": task.to_string(),
        "setCountsType": 1,
        "isTakeEffect": 0,
        "setCounts": counts,
    })
    .to_string();
    let key = if key.is_empty() { String::new() } else { format!("idempotency-key: {key}\r\n") };
    gateway.send(&head(body.len(), &key), &body)
}

const INSPECTORS: u64 = 40;

/// The tasks of the calls that the table asks about, and the first one of those that fill the trail.
const KNOWN: u64 = 954_645_333_549_000_001;
const DOUBTFUL: u64 = KNOWN + 1;
const DOUBTFUL_WITHOUT_KEY: u64 = KNOWN + 2;
const LONG_AGO: u64 = KNOWN + 3;
const UNKNOWN: u64 = KNOWN + 4;
const SUCCEEDED: u64 = KNOWN + 5;
const FILLING: u64 = KNOWN + 1000;

/// A call of unknown outcome.
fn lose(machine: &Machine, gateway: &Gateway, task: u64, key: &str) {
    script(&machine.sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    assert_eq!(call(gateway, task, key).outcome(), "unknown");
}

/// The trail that all rows begin with.
struct History {
    machine: Machine,
    /// A key in the segment that a gap removes, and one in the newest.
    in_gap: String,
    in_newest: String,
}

impl History {
    const BOOT: &str = "11111111-1111-4111-8111-111111111111";

    fn make() -> Self {
        let mut machine = Machine::new(Some(Self::BOOT));
        machine.set_clock(-40 * DAY);
        let mut gateway = machine.start("forever", false);
        lose(&machine, &gateway, LONG_AGO, "long-ago");
        let next = fill(&machine, &gateway, 0, 3);
        stop(&mut gateway);
        machine.boot = None;
        machine.set_clock(0);
        let audit = machine.audit_directory();
        let (code, said) = machine.run(&["audit", "accept-clock", audit.to_str().unwrap()]);
        assert_eq!(code, 0, "{said}");

        let mut gateway = machine.start("forever", false);
        assert_eq!(call(&gateway, KNOWN, "known").outcome(), "succeeded");
        assert_eq!(call(&gateway, SUCCEEDED, "").outcome(), "succeeded");
        lose(&machine, &gateway, DOUBTFUL, "doubtful");
        lose(&machine, &gateway, DOUBTFUL_WITHOUT_KEY, "");
        let in_gap = fill(&machine, &gateway, next, 5);
        let in_newest = fill(&machine, &gateway, in_gap + 1, 7);
        assert_eq!(call(&gateway, FILLING, &name(in_newest)).outcome(), "succeeded");
        stop(&mut gateway);
        assert_eq!(segments(&audit).len(), 7);
        let (code, said, _) = command(&["audit", "in-doubt", audit.to_str().unwrap()]);
        assert!(code == 0 && said.contains("3 more of unknown outcome"), "{code} {said}");
        Self { machine, in_gap: name(in_gap), in_newest: name(in_newest) }
    }

    /// A copy of it, in this state.
    fn copy(&self, trail: &str, boot: Option<&'static str>) -> Machine {
        let machine = Machine::new(boot);
        for name in ["gateway.toml", "app_key", "app_secret", "audit"] {
            let from = self.machine.folder.path().join(name);
            assert!(
                Command::new("cp").arg("-a").arg(from).arg(machine.folder.path()).status().unwrap().success()
            );
        }
        harm(&machine.audit_directory(), trail);
        machine
    }
}

/// Which segment a gap lacks. The ones before it have all calls that the table asks about.
const GAP: usize = 4;

fn harm(audit: &Path, trail: &str) {
    let segments = segments(audit);
    let remove = |paths: &[PathBuf]| paths.iter().for_each(|path| fs::remove_file(path).unwrap());
    match trail {
        "whole" => {}
        "gap" => remove(&segments[GAP..=GAP]),
        "newest" => remove(&segments[segments.len() - 1..]),
        "all" => remove(&segments),
        "key" => fs::remove_file(audit.join("audit.key")).unwrap(),
        "empty" => {
            fs::remove_dir_all(audit).unwrap();
            assert_eq!(command(&["audit", "init", audit.to_str().unwrap()]).0, 0);
        }
        "absent" => fs::remove_dir_all(audit).unwrap(),
        _ => panic!("no such trail: {trail}"),
    }
}

fn name(number: u64) -> String {
    format!("filling-{number}")
}

/// Calls with keys until there are so many segments; returns the next number. Its call is in the last segment.
fn fill(machine: &Machine, gateway: &Gateway, mut number: u64, count: usize) -> u64 {
    while segments(&machine.audit_directory()).len() < count {
        assert_eq!(call(gateway, FILLING, &name(number)).outcome(), "succeeded");
        number += 1;
    }
    number
}

fn stop(gateway: &mut Gateway) -> i32 {
    gateway.signal("-TERM");
    gateway.wait().code().unwrap()
}

/// Walks a row: brings the state about and observes each column.
fn walk(table: &Table, history: &History, row: &Row) -> Row {
    let state = |column: &str| row[column].as_str().unwrap();
    let (clock, trail) = (state("clock"), state("trail"));
    let boot = (state("boot") == "other").then_some("22222222-2222-4222-8222-222222222222");
    let machine = history.copy(trail, boot);
    if clock == "doubtful" {
        machine.set_clock(31 * DAY);
    }
    let mut seen: Row = row.keys().map(|column| (column.clone(), json!("-"))).collect();
    for column in ["clock", "trail", "boot"] {
        seen.insert(column.into(), row[column].clone());
    }
    let (check, said) = machine.run_with_config("check");
    seen.insert("check".into(), check.into());
    if row["starts"] == false {
        let (code, serve) = machine.run_with_config("serve");
        seen.insert("starts".into(), false.into());
        seen.insert("exit".into(), code.into());
        for said in [said, serve] {
            assert!(said.contains("is missing"), "{said}");
        }
        return seen;
    }
    observe(table, history, &machine, row, &mut seen);
    seen
}

/// Observes a gateway that starts.
fn observe(table: &Table, history: &History, machine: &Machine, row: &Row, seen: &mut Row) {
    let audit = machine.audit_directory();
    let (mut before, mut removed_before) = (segments(&audit), 0);
    let has_old = !before.is_empty();
    let cut = calls_cut_in_two(&audit);
    let mut gateway = machine.start("30d", true);
    let mut see = |column: &str, value: Value| {
        assert!(seen.insert(column.into(), value).is_some(), "{column} is no column");
    };
    see("starts", true.into());
    see("at start", table.words(&gateway.admin("/readyz").json()["warnings"]).into());
    if row["clock"] == "doubtful" && row["boot"] == "same" {
        machine.set_clock(62 * DAY);
        // What was removed before that is not what the row asks about.
        wait_for("the doubt", || (metric(&gateway, "clock_doubtful") == 1).then_some(()));
        until_removals_are_over(&gateway);
        (before, removed_before) = (segments(&audit), metric(&gateway, REMOVED));
    }
    let mut sent = 0;
    let mut answer = |task: u64, key: &str| {
        let reply = call(&gateway, task, key);
        sent += usize::from(reply.outcome() == "succeeded");
        table.word(&reply)
    };
    let in_harm = if row["trail"] == "gap" { &history.in_gap } else { &history.in_newest };
    for (column, task, key) in [
        ("unknown key", UNKNOWN, "unknown"),
        ("known key", KNOWN, "known"),
        ("key in harm", FILLING, in_harm),
        ("key in doubt", DOUBTFUL, "doubtful"),
        ("old key in doubt", LONG_AGO, "long-ago"),
        ("equal to doubt", DOUBTFUL_WITHOUT_KEY, ""),
        ("equal to success", SUCCEEDED, ""),
    ] {
        see(column, answer(task, key).into());
    }
    let (removed, filled) = begin_segments(&gateway, &before, row["removed"] == true);
    see("removed", if has_old { removed.into() } else { "-".into() });
    until_removals_are_over(&gateway);
    let ready = gateway.admin("/readyz");
    see("readyz", ready.status.into());
    assert_eq!(ready.json()["reasons"], json!([]));
    see("warnings", table.words(&ready.json()["warnings"]).into());
    let metrics = gateway.admin("/metrics").body;
    for (column, metric) in [("doubtful", "clock_doubtful"), ("damaged", "audit_damaged")] {
        see(column, value(&metrics, metric).into());
    }
    see("unresolved", (value(&metrics, "unresolved_outcomes") - cut).into());
    assert_eq!(value(&metrics, REMOVED) > removed_before, removed, "segments are counted as removed");
    assert_eq!(machine.sandbox.requests().len(), sent + filled, "what is refused is not sent");
    see("exit", stop(&mut gateway).into());
}

/// Calls whose intents are there and whose outcomes were in a part that is missing: to a start, they are of unknown outcome.
fn calls_cut_in_two(audit: &Path) -> u64 {
    let ids = |kind| {
        records(audit, kind).into_iter().map(|record| record["id"].to_string()).collect::<BTreeSet<_>>()
    };
    ids("intent").difference(&ids("outcome")).count() as u64
}

/// Calls without keys until the trail has begun enough segments for retention to have removed the oldest one, if it may.
/// Returns whether it did, and the number of calls.
fn begin_segments(gateway: &Gateway, before: &[PathBuf], is_removed: bool) -> (bool, usize) {
    let audit = gateway.audit_directory();
    let mut begun: BTreeSet<_> = segments(&audit).into_iter().collect();
    let known = begun.len();
    let (mut calls, enough) = (0, if is_removed { 10 } else { 3 });
    loop {
        let now = segments(&audit);
        let removed = before.first().is_some_and(|oldest| !now.contains(oldest));
        begun.extend(now);
        if begun.len() >= known + enough || (is_removed && removed) {
            return (removed, calls);
        }
        assert_eq!(call(gateway, FILLING + 1 + calls as u64, "").outcome(), "succeeded");
        calls += 1;
    }
}

/// Counts the segments that retention removed.
const REMOVED: &str = "audit_removed_segments_total";

/// Waits until each segment that is on record as old is gone, and counted: it goes behind its record.
fn until_removals_are_over(gateway: &Gateway) {
    wait_for("the removal of what is on record as old", || {
        let events = records(&gateway.audit_directory(), "event").into_iter();
        let told = events.filter(|event| event["event"] == "retention").count();
        (metric(gateway, REMOVED) == told as u64).then_some(())
    });
}

fn metric(gateway: &Gateway, name: &str) -> u64 {
    value(&gateway.admin("/metrics").body, name)
}

fn value(metrics: &str, name: &str) -> u64 {
    let begin = format!("ccsqm_gateway_{name} ");
    metrics.lines().find_map(|line| line.strip_prefix(&begin)).unwrap().parse().unwrap()
}

#[test]
fn state_table_has_each_state_once() {
    let states: Vec<_> = Table::load()
        .rows()
        .iter()
        .map(|row| ["clock", "trail", "boot"].map(|column| row[column].to_string()))
        .collect();
    let all: BTreeSet<_> = CLOCKS
        .into_iter()
        .flat_map(|clock| TRAILS.map(|trail| (clock, trail)))
        .flat_map(|(clock, trail)| BOOTS.map(|boot| [clock, trail, boot].map(|word| json!(word).to_string())))
        .collect();
    assert_eq!(states.len(), all.len());
    assert_eq!(states.into_iter().collect::<BTreeSet<_>>(), all);
}

#[test]
fn each_state_of_clock_trail_and_boot_behaves_as_in_the_table() {
    let table = Table::load();
    let rows = table.rows();
    let history = History::make();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let walked = caught(|| walk(&table, &history, row));
                    let state =
                        ["clock", "trail", "boot"].map(|column| row[column].as_str().unwrap()).join(", ");
                    match walked {
                        Ok(seen) => failures.lock().unwrap().extend(differences(&table, &state, row, &seen)),
                        Err(panic) => failures
                            .lock()
                            .unwrap()
                            .push(format!("{state}: it failed: {}", panic.replace('\n', " "))),
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Where a state behaves otherwise, and the row as it should stand then.
fn differences(table: &Table, state: &str, row: &Row, seen: &Row) -> Option<String> {
    let differ: Vec<_> = table.columns.iter().filter(|column| row[*column] != seen[*column]).collect();
    let told = differ.iter().map(|column| format!("{column}: {}, not {}", seen[*column], row[*column]));
    let line: Vec<_> = table.columns.iter().map(|column| &seen[column]).collect();
    (!differ.is_empty())
        .then(|| format!("{state}: {}\n  {}", told.collect::<Vec<_>>().join("; "), json!(line)))
}
