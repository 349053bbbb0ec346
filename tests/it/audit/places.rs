//! Files of the trail that somebody moves, deletes, replaces or cuts under load, and what the trail says of it.
//!
//! `CCSQM_GATEWAY_TEST_LOSSES` says how many rounds; without it each way to lose a file comes once, and once more while the
//! gateway cannot notice it.

use std::{
    hash::{BuildHasher, RandomState},
    os::unix::fs::{PermissionsExt, symlink},
};

use tempfile::TempDir;

use super::{disk::metric, *};

// ---- Under load ------------------------------------------------------------------------------------------

/// A way to lose a file, in an audit directory.
struct Loss {
    how: &'static str,
    lose: fn(&Path),
    /// The segment size, which decides whether there are closed segments.
    segment_size: &'static str,
    then: Then,
}

/// What becomes of it when the gateway notices.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The file is there again.
    Restored,
    /// Its records are lost.
    Lost,
    /// Nothing is sent until it is moved back.
    Back,
    /// Nothing is sent until a restart.
    Gone,
}

/// Where a test keeps a copy, or moves something to.
fn beside(audit: &Path) -> PathBuf {
    audit.with_extension("beside")
}

fn newest(audit: &Path) -> PathBuf {
    segments(audit).pop().unwrap()
}

const LOSSES: [Loss; 10] = [
    Loss {
        how: "the open segment is renamed",
        lose: |audit| fs::rename(newest(audit), newest(audit).with_extension("jsonl.1")).unwrap(),
        segment_size: "64MiB",
        then: Then::Restored,
    },
    Loss {
        how: "the open segment is replaced by an older copy",
        lose: |audit| fs::rename(beside(audit), newest(audit)).unwrap(),
        segment_size: "64MiB",
        then: Then::Restored,
    },
    Loss {
        how: "the open segment is deleted",
        lose: |audit| fs::remove_file(newest(audit)).unwrap(),
        segment_size: "64MiB",
        then: Then::Restored,
    },
    Loss {
        how: "the open segment is linked elsewhere and deleted",
        lose: |audit| {
            fs::hard_link(newest(audit), audit.join("link")).unwrap();
            fs::remove_file(newest(audit)).unwrap();
        },
        segment_size: "64MiB",
        then: Then::Restored,
    },
    Loss {
        how: "the open segment is cut to the length of an older copy",
        lose: |audit| {
            let length = fs::metadata(beside(audit)).unwrap().len();
            OpenOptions::new().write(true).open(newest(audit)).unwrap().set_len(length).unwrap();
        },
        segment_size: "64MiB",
        then: Then::Lost,
    },
    Loss {
        how: "a closed segment is deleted",
        lose: |audit| fs::remove_file(&segments(audit)[1]).unwrap(),
        segment_size: "64KiB",
        then: Then::Lost,
    },
    Loss {
        how: "the directory is renamed",
        lose: |audit| fs::rename(audit, audit.with_extension("away")).unwrap(),
        segment_size: "64KiB",
        then: Then::Back,
    },
    Loss {
        how: "the directory is replaced by an empty one",
        lose: |audit| {
            fs::rename(audit, audit.with_extension("away")).unwrap();
            fs::create_dir(audit).unwrap();
        },
        segment_size: "64MiB",
        then: Then::Back,
    },
    Loss {
        how: "the lock file is renamed",
        lose: |audit| fs::rename(audit.join("lock"), audit.join("lock.away")).unwrap(),
        segment_size: "64MiB",
        then: Then::Back,
    },
    Loss {
        how: "the lock file is deleted",
        lose: |audit| fs::remove_file(audit.join("lock")).unwrap(),
        segment_size: "64MiB",
        then: Then::Gone,
    },
];

impl Loss {
    /// Moves back what was moved.
    fn undo(&self, audit: &Path) {
        if self.how.starts_with("the directory") {
            let _ = fs::remove_dir(audit);
            fs::rename(audit.with_extension("away"), audit).unwrap();
        } else {
            fs::rename(audit.join("lock.away"), audit.join("lock")).unwrap();
        }
    }

    /// The value of the metric's label.
    fn result(&self) -> &'static str {
        if self.then == Then::Restored { "restored" } else { "lost" }
    }
}

fn random(below: usize) -> usize {
    RandomState::new().hash_one(()) as usize % below
}

fn is_stopped(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") T ")
}

/// The number of the record that the lock file names.
fn stated(audit: &Path) -> u64 {
    let text = fs::read_to_string(audit.join("lock")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["seq"].as_u64().unwrap()
}

/// A gateway under load, until it is killed.
struct Round<'a> {
    sandbox: &'a Sandbox,
    gateway: Gateway,
    callers: Vec<thread::JoinHandle<()>>,
    audit: PathBuf,
}

impl<'a> Round<'a> {
    /// There are some segments, a copy of the newest one, and records behind that of which the lock file knows.
    fn begin(sandbox: &'a Sandbox, loss: &Loss) -> Self {
        let gateway = start_with(sandbox, Setup::default().set("audit.segment_size", loss.segment_size));
        let load = Load { task: Arc::new(AtomicU64::new(1_000)), told: Arc::default() };
        let callers = load.begin(gateway.address);
        let audit = gateway.audit_directory();
        let enough = 20 + random(100);
        wait_for("replies", || (load.told() > enough).then_some(()));
        if loss.segment_size == "64KiB" {
            wait_for("closed segments", || (segments(&audit).len() > 3).then_some(()));
        }
        fs::copy(newest(&audit), beside(&audit)).unwrap();
        let seq = records(&audit, "").len() as u64;
        wait_for("the lock file to name later records", || (stated(&audit) > seq + 10).then_some(()));
        Self { sandbox, gateway, callers, audit }
    }

    /// Kills it, and gives what is checked then: the folder, and what the upstream received.
    fn kill(self) -> (Arc<TempDir>, HashMap<u64, Vec<Received>>) {
        let folder = self.gateway.kill();
        self.callers.into_iter().for_each(|caller| caller.join().unwrap());
        (folder, received(self.sandbox))
    }

    /// Loses a file while it is served, and checks what is said, and what becomes of new requests.
    fn lose_and_notice(&self, loss: &Loss) {
        (loss.lose)(&self.audit);
        let name = format!("audit_files_lost_total{{result=\"{}\"}}", loss.result());
        wait_for("the metric", || (metric(&self.gateway, &name) == 1.0).then_some(()));
        if matches!(loss.then, Then::Back | Then::Gone) {
            assert_refused(&self.gateway, self.sandbox);
            let ready = self.gateway.admin("/readyz");
            assert!(ready.status == 503 && ready.body.contains("audit"), "{}: {ready:?}", loss.how);
        }
        if loss.then == Then::Back {
            loss.undo(&self.audit);
        }
        if loss.then != Then::Gone {
            wait_for("service", || (self.gateway.call_once().outcome() == "succeeded").then_some(()));
        }
        let is_its = |event: &Value| event["event"] == "gap" && event["result"] == loss.result();
        wait_for("the event", || records(&self.audit, "event").iter().any(is_its).then_some(()));
        let level = if matches!(loss.then, Then::Back | Then::Gone) { "ERROR" } else { "WARN" };
        let is_told = |line: &str| line.contains(level) && line.contains("audit");
        wait_for(&format!("the line in the log: {}", loss.how), || {
            self.gateway.log().lines().any(is_told).then_some(())
        });
    }

    /// Loses a file while the gateway cannot notice it.
    fn lose_unnoticed(&self, loss: &Loss) {
        self.gateway.signal("-STOP");
        wait_for("the stop", || is_stopped(self.gateway.pid()).then_some(()));
        (loss.lose)(&self.audit);
    }
}

/// What was sent and is not on record.
fn missing(audit: &Path, received: &HashMap<u64, Vec<Received>>) -> usize {
    let tasks: BTreeSet<_> =
        records(audit, "intent").iter().filter_map(|intent| intent["task"].as_u64()).collect();
    received.keys().filter(|task| **task != 0 && !tasks.contains(task)).count()
}

/// After a kill, after a start, and after a stop verification says the same.
fn check(how: &str, folder: &Arc<TempDir>, sandbox: &Sandbox, is_whole: bool) {
    let audit = folder.path().join("audit");
    for when in ["killed", "started", "stopped"] {
        let (whole, said) = verify(&audit);
        assert_eq!(whole, is_whole, "{how}, {when}: {said}");
        assert_eq!(said.contains("whole: "), is_whole, "{how}, {when}: {said}");
        if when == "killed" {
            let mut gateway = start_with(sandbox, Setup { folder: Some(folder.clone()), ..Setup::default() });
            gateway.call();
            gateway.signal("-TERM");
            assert!(gateway.wait().success());
        }
    }
}

fn run_noticed(loss: &Loss) {
    let sandbox = sandbox();
    let round = Round::begin(&sandbox, loss);
    let audit = round.audit.clone();
    round.lose_and_notice(loss);
    let (folder, received) = round.kill();
    let missing = missing(&audit, &received);
    let sent = received.len();
    assert_eq!(missing > 0, loss.then == Then::Lost, "{}: {missing} of {sent} not on record", loss.how);
    check(loss.how, &folder, &sandbox, matches!(loss.then, Then::Restored | Then::Back));
}

/// Of a directory that is gone whole nothing tells the next start.
fn run_unnoticed(loss: &Loss) {
    let sandbox = sandbox();
    let round = Round::begin(&sandbox, loss);
    let audit = round.audit.clone();
    round.lose_unnoticed(loss);
    let (folder, received) = round.kill();
    let missing = missing(&audit, &received);
    let sent = received.len();
    assert_eq!(missing > 0, !loss.how.contains("lock file"), "{}: {missing} of {sent}", loss.how);
    check(loss.how, &folder, &sandbox, false);
}

#[test]
fn incomplete_trail_never_passes_for_whole() {
    let all: Vec<_> = LOSSES
        .iter()
        .map(|loss| (loss, true))
        .chain(LOSSES.iter().filter(|loss| !loss.how.contains("directory")).map(|loss| (loss, false)))
        .collect();
    let rounds =
        std::env::var("CCSQM_GATEWAY_TEST_LOSSES").map_or(all.len(), |rounds| rounds.parse().unwrap());
    for (loss, is_noticed) in all.into_iter().cycle().take(rounds) {
        if is_noticed { run_noticed(loss) } else { run_unnoticed(loss) }
    }
}

// ---- At rest ---------------------------------------------------------------------------------------------

#[test]
fn lost_directory_is_reported_once_and_works_again_when_restored() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    gateway.records("outcome", 1);
    let (audit, away) = (gateway.audit_directory(), gateway.folder.path().join("away"));
    fs::rename(&audit, &away).unwrap();
    wait_for("the fault", || (gateway.admin("/readyz").status == 503).then_some(()));
    (0..3).for_each(|_| assert_refused(&gateway, &sandbox));
    fs::create_dir(&audit).unwrap();
    assert_refused(&gateway, &sandbox);
    assert_eq!(fs::read_dir(&audit).unwrap().count(), 0, "nothing is written to another directory");
    fs::remove_dir(&audit).unwrap();
    fs::rename(&away, &audit).unwrap();
    assert_resumed(&gateway, &sandbox);
    let log = gateway.log();
    assert_eq!(log.matches("the directory was moved, deleted or replaced").count(), 1, "{log}");
    assert_eq!(log.matches("in their place again").count(), 1, "{log}");
}

#[test]
fn missing_lock_file_still_keeps_a_second_gateway_out() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let config = gateway.folder.path().join("gateway.toml");
    fs::remove_file(gateway.audit_directory().join("lock")).unwrap();
    // At a port that is taken, so that one that is not kept out ends, too.
    let admin = format!("admin.address={}", gateway.admin);
    let (code, _, error) = command(&["serve", "--config", config.to_str().unwrap(), "--set", &admin]);
    assert!(code == 1 && error.contains("another process writes here"), "{error}");
    assert!(!gateway.audit_directory().join("lock").exists(), "and makes nothing");
}

/// An older version locks the file and knows nothing of the directory's lock.
#[test]
fn older_version_and_this_one_lock_each_other_out() {
    let sandbox = sandbox();
    let mut gateway = start(&sandbox);
    let config = gateway.folder.path().join("gateway.toml");
    assert_eq!(gateway.call().outcome(), "succeeded");
    let lock = fs::File::open(gateway.audit_directory().join("lock")).unwrap();
    assert!(lock.try_lock().is_err());
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    lock.try_lock().unwrap();
    let (code, _, error) = command(&["serve", "--config", config.to_str().unwrap()]);
    assert!(code == 1 && error.contains("another process writes here"), "{error}");
}

// ---- The commands ----------------------------------------------------------------------------------------

#[test]
fn verify_reports_missing_parts_of_the_trail() {
    let sandbox = sandbox();
    let mut gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.records("outcome", 1);
    let audit = gateway.audit_directory();
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let run =
        |words: &[&str]| command(&[&["audit", words[0], audit.to_str().unwrap()], &words[1..]].concat());
    assert_eq!(run(&["verify"]).0, 0, "the control");
    let (segment, lock) = (newest(&audit), audit.join("lock"));
    let (text, stated) = (fs::read(&segment).unwrap(), fs::read(&lock).unwrap());

    fs::rename(&segment, audit.join("moved")).unwrap();
    let (code, out, _) = run(&["verify"]);
    assert!(
        code == 1 && out.contains(".jsonl: the newest segment, which the lock file names, is missing"),
        "{out}"
    );
    let json: Value = serde_json::from_str(&run(&["verify", "--json"]).1).unwrap();
    assert_eq!((&json["whole"], &json["missing"][0]["lacks"]), (&json!(false), &json!("newest_segment")));
    for words in ["in-doubt", "head"] {
        let (_, _, error) = run(&[words]);
        assert!(
            error.contains("the newest segment, which the lock file names, is missing"),
            "{words}: {error}"
        );
    }
    fs::write(&lock, "").unwrap();
    let (code, out, _) = run(&["verify"]);
    assert!(code == 1 && out.contains("there are no records"), "{out}");

    let last = text.split_inclusive(|byte| *byte == b'\n').next_back().unwrap().len();
    fs::write(&segment, &text[..text.len() - last]).unwrap();
    assert_eq!(run(&["verify"]).0, 0, "an older version's lock file says nothing");
    fs::write(&lock, &stated).unwrap();
    let (code, out, _) = run(&["verify"]);
    assert!(code == 1 && out.contains("but the lock file says that record"), "{out}");
    fs::write(&lock, &stated[..100]).unwrap();
    let (code, out, _) = run(&["verify"]);
    assert!(code == 0 && out.contains("lock: cannot be read"), "{out}");
    fs::remove_file(&lock).unwrap();
    let (code, out, _) = run(&["verify"]);
    assert!(code == 1 && out.contains("lock: the lock file is missing"), "{out}");

    fs::write(&segment, text).unwrap();
    fs::write(&lock, stated).unwrap();
    assert_eq!(run(&["verify"]).0, 0, "the control");
}

#[test]
fn audit_init_creates_directory_and_key_once() {
    let folder = TempDir::new().unwrap();
    let audit = folder.path().join("made/audit");
    let init = |more: &[&str]| command(&[&["audit", "init", audit.to_str().unwrap()], more].concat());
    let (code, out, error) = init(&[]);
    assert!(code == 0 && out.contains("is ready for a new trail"), "{out}{error}");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let key = audit.join("audit.key");
    assert_eq!((mode(&audit), mode(&key)), (0o700, 0o600));
    let text = fs::read(&key).unwrap();
    let (code, out, _) = init(&[]);
    assert!(code == 0 && out.contains("nothing was changed"), "{out}");
    assert_eq!(fs::read(&key).unwrap(), text);

    fs::write(audit.join("audit-00000000000000000001.jsonl"), "{}\n").unwrap();
    assert_eq!(init(&[]).0, 0, "with their key segments are no matter");
    fs::remove_file(&key).unwrap();
    let (code, _, error) = init(&[]);
    assert!(code == 78 && error.contains("audit.key is missing, and there are segments"), "{error}");
    assert!(!key.exists());

    let other = folder.path().join("key");
    fs::write(&other, [7; 32]).unwrap();
    symlink(&other, folder.path().join("secret")).unwrap();
    fs::remove_dir_all(&audit).unwrap();
    let (code, out, error) = init(&["--key-file", folder.path().join("secret").to_str().unwrap()]);
    assert!(code == 0 && audit.is_dir() && !key.exists(), "{out}{error}");
    let (code, _, error) = init(&["--key-file", "/nowhere"]);
    assert!(code == 78 && error.contains("/nowhere"), "{error}");
}

#[test]
fn start_does_not_create_a_trail_that_must_exist() {
    let sandbox = sandbox();
    let setup = || Setup::default().set("audit.must_exist", false);
    let gateway = start_with(&sandbox, setup()); // for its folder, and the control
    let (config, audit) = (gateway.folder.path().join("gateway.toml"), gateway.audit_directory());
    let folder = gateway.kill();
    let run = |command_name: &str, must_exist: bool| {
        let set = format!("audit.must_exist={must_exist}");
        command(&[command_name, "--config", config.to_str().unwrap(), "--set", &set])
    };
    let refused = |reason: &str| {
        for name in ["check", "serve"] {
            let (code, _, error) = run(name, true);
            assert!(
                code == 78 && error.contains(reason) && error.contains(": audit.directory: "),
                "{name}: {error}"
            );
        }
    };
    assert_eq!(run("check", true).0, 0, "the control: it is there");
    fs::remove_file(audit.join("audit.key")).unwrap();
    refused("there are segments that were written with it");
    assert_eq!(run("check", false).0, 78, "without their key segments are of no use, whatever is set");
    fs::remove_file(newest(&audit)).unwrap();
    refused(&format!(
        "audit.key is missing, and must_exist is set: restore it; for a new trail, run `ccsqm-gateway audit init {}`",
        audit.display()
    ));
    assert_eq!(run("check", false).0, 0, "the control");
    fs::remove_dir_all(&audit).unwrap();
    refused(&format!("run `ccsqm-gateway audit init {}` once", audit.display()));
    assert!(!audit.exists(), "nothing is made");

    assert_eq!(command(&["audit", "init", audit.to_str().unwrap()]).0, 0);
    let setup = Setup { folder: Some(folder), ..Setup::default() };
    assert_eq!(start_with(&sandbox, setup.set("audit.must_exist", true)).call().outcome(), "succeeded");
}
