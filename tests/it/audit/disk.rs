//! Durability `disk`, on a disk that obeys the test: `disk.c`, preloaded into the gateway.

use std::{
    os::unix::fs::DirEntryExt,
    sync::LazyLock,
    time::{SystemTime, UNIX_EPOCH},
};

use ccsqm_gateway::sandbox::{Fault, Faults};
use tempfile::TempDir;

use super::*;

/// The library, compiled once.
static PRELOAD: LazyLock<PathBuf> = LazyLock::new(|| compile("audit/disk"));

/// What a test asks of the disk, and what the disk tells.
pub(crate) struct Disk(TempDir);

/// A call of fdatasync or fsync.
#[derive(Clone, Debug)]
struct Call {
    name: String,
    /// The last part of the path.
    file: String,
    begun: SystemTime,
    /// None while it has not returned.
    ended: Option<SystemTime>,
    failed: bool,
}

impl Disk {
    pub(crate) fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("platter")).unwrap();
        Self(folder)
    }

    /// It has all that is in a directory.
    fn holds(&self, directory: &Path) {
        let files = fs::read_dir(directory).unwrap().map(Result::unwrap);
        // The control socket is none.
        for file in files.filter(|file| file.file_type().unwrap().is_file()) {
            fs::copy(file.path(), self.0.path().join("platter").join(file.ino().to_string())).unwrap();
        }
    }

    /// A gateway's setup on this disk.
    pub(crate) fn setup(&self, durability: &str) -> Setup {
        let (preload, disk) = (PRELOAD.display(), self.0.path().display());
        let through = vec!["env".to_owned(), format!("LD_PRELOAD={preload}"), format!("DISK={disk}")];
        Setup { through, ..Setup::default() }.set("audit.durability", durability)
    }

    fn ask(&self, what: &str) {
        self.ask_for(what, "");
    }

    pub(crate) fn ask_for(&self, what: &str, value: &str) {
        // Renamed into its place: the gateway must not read a half of it.
        let unfinished = self.0.path().join("unfinished");
        fs::write(&unfinished, value).unwrap();
        fs::rename(unfinished, self.0.path().join(what)).unwrap();
    }

    pub(crate) fn no_more(&self, what: &str) {
        fs::remove_file(self.0.path().join(what)).unwrap();
    }

    /// All calls so far, in their order. One thread makes them, one after the other.
    fn calls(&self) -> Vec<Call> {
        let log = fs::read_to_string(self.0.path().join("log")).unwrap_or_default();
        let mut calls = Vec::<Call>::new();
        for line in log.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            let words: Vec<_> = line.trim_end().splitn(4, ' ').collect();
            let time = UNIX_EPOCH + Duration::from_nanos(words[0].parse().unwrap());
            if words[1] == "begins" {
                let file = words[3].rsplit('/').next().unwrap().to_owned();
                calls.push(Call { name: words[2].into(), file, begun: time, ended: None, failed: false });
            } else {
                let call = calls.last_mut().unwrap();
                (call.ended, call.failed) = (Some(time), words[1] == "failed");
            }
        }
        calls
    }

    /// Those for a segment's bytes.
    fn syncs(&self) -> Vec<Call> {
        let mut calls = self.calls();
        calls.retain(|call| call.name == "fdatasync" && call.file != "audit.key.new");
        calls
    }

    /// What a power cut leaves of the directory: what was synced last, and of what was written since then some.
    fn after_a_power_cut(&self, directory: &Path, survives: Survives) {
        let platter = self.0.path().join("platter");
        let names = fs::read_to_string(platter.join("names")).unwrap();
        let files = names.lines().map(|line| {
            let (inode, name) = line.split_once(' ').unwrap();
            let proven = fs::read(platter.join(inode)).unwrap_or_default();
            let written = fs::read(directory.join(name)).unwrap_or_default();
            let more = written.get(proven.len()..).unwrap_or_default();
            (name.to_owned(), [proven, survives.of(more)].concat())
        });
        let files: Vec<_> = files.collect();
        fs::remove_dir_all(directory).unwrap();
        fs::create_dir(directory).unwrap();
        for (name, bytes) in files {
            fs::write(directory.join(name), bytes).unwrap();
        }
    }
}

/// What a power cut leaves of bytes that no call has brought to the disk.
#[derive(Clone, Copy, Debug)]
enum Survives {
    Nothing,
    FirstHalf,
    /// Pages may reach the disk in any order.
    SecondHalf,
}

impl Survives {
    fn of(self, bytes: &[u8]) -> Vec<u8> {
        let (first, second) = bytes.split_at(bytes.len() / 2);
        match self {
            Self::Nothing => Vec::new(),
            Self::FirstHalf => first.to_vec(),
            Self::SecondHalf => [vec![0; first.len()], second.to_vec()].concat(),
        }
    }
}

pub(super) fn metric(gateway: &Gateway, name: &str) -> f64 {
    let metrics = gateway.admin("/metrics").body;
    let line = metrics.lines().find_map(|line| line.strip_prefix(&format!("ccsqm_gateway_{name} ")));
    line.unwrap_or_else(|| panic!("{name} in {metrics}")).parse().unwrap()
}

/// Every request that the sandbox received has one intent in the trail, and one outcome.
fn assert_accounted(audit: &Path, sandbox: &Sandbox) {
    let (whole, said) = verify(audit);
    assert!(whole, "{said}");
    let intents: HashMap<_, _> = records(audit, "intent")
        .into_iter()
        .filter_map(|intent| Some((intent["task"].as_u64()?, text(&intent["id"]))))
        .collect();
    let outcomes = outcomes(audit);
    // 0: the example's task, which several requests share.
    for task in received(sandbox).keys().filter(|task| **task != 0) {
        let id = intents.get(task).unwrap_or_else(|| panic!("{task} was sent without an intent"));
        assert_eq!(outcomes[id].len(), 1, "{:?}", outcomes[id]);
    }
}

/// Calls with tasks of their own, all at once, some from each of the callers; returns what each was told.
fn call_at_once(gateway: &Gateway, callers: u64, each: u64) -> Vec<(u64, Reply)> {
    static NEXT: AtomicU64 = AtomicU64::new(1_000_000);
    let caller = || {
        let task = || NEXT.fetch_add(1, Ordering::Relaxed);
        let call = |body: &str| gateway.send_once(&head(body.len(), ""), body);
        (0..each).map(|_| task()).map(|task| (task, call(&body(task)))).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..callers).map(|_| scope.spawn(caller)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

fn begin_second_segment(gateway: &Gateway) {
    wait_for("a second segment", || {
        assert_eq!(gateway.call().outcome(), "succeeded");
        (segments(&gateway.audit_directory()).len() == 2).then_some(())
    });
}

#[test]
fn check_shows_whether_durability_is_kernel_or_disk() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let config = gateway.folder.path().join("gateway.toml");
    let _folder = gateway.kill();
    let check =
        |more: &[&str]| command(&[&["check", "--json", "--config", config.to_str().unwrap()], more].concat());
    let shown = |more: &[&str]| {
        let (_, out, _) = check(more);
        text(&serde_json::from_str::<Value>(&out).unwrap()["configuration"]["audit"]["durability"])
    };
    assert_eq!(shown(&[]), "kernel");
    assert_eq!(shown(&["--set", "audit.durability=kernel"]), "kernel");
    assert_eq!(shown(&["--set", "audit.durability=disk"]), "disk");
    let (code, out, _) = check(&["--set", "audit.durability=tape"]);
    assert!(code == 78 && out.contains(r#"must be \"kernel\" or \"disk\""#), "{out}");
}

#[test]
fn nothing_is_sent_before_its_intent_is_durable() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("disk"));
    disk.ask_for("slow", "60");
    let begun = wait_for("a request that is in time", || {
        let begun = SystemTime::now();
        (gateway.call_once().outcome() == "succeeded").then_some(begun)
    });
    let sent = sandbox.requests().pop().unwrap().time;
    let calls = disk.syncs();
    let before =
        calls.iter().filter(|call| call.begun > begun && call.ended.is_some_and(|ended| ended < sent));
    assert!(before.count() >= 1, "sent at {sent:?}, begun at {begun:?}: {calls:#?}");
    let took = sent.duration_since(begun).unwrap();
    assert!(took >= Duration::from_millis(60), "{took:?}");
    let unfinished =
        calls.iter().find(|call| call.begun < sent && call.ended.is_none_or(|ended| ended > sent));
    assert!(unfinished.is_none(), "{unfinished:?}");

    gateway.records("outcome", records(&gateway.audit_directory(), "intent").len());
    assert!(metric(&gateway, "audit_sync_seconds_total") >= 0.06);
}

#[test]
fn durability_kernel_syncs_no_segment() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let mut gateway = start_with(&sandbox, disk.setup("kernel").set("audit.segment_size", "64KiB"));
    // A control of the disk: with `disk` this stops all.
    disk.ask("hang");
    begin_second_segment(&gateway);
    assert_eq!(metric(&gateway, "audit_syncs_total"), 0.0);
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let files: Vec<_> = disk.calls().into_iter().map(|call| call.file).collect();
    assert_eq!(files, ["audit.key.new"], "the control: the disk is asked at all");
}

#[test]
fn first_start_syncs_directory_key_and_first_segment() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("disk"));
    let folder = gateway.folder.path().file_name().unwrap().to_str().unwrap().to_owned();
    let calls: Vec<_> = disk.calls().into_iter().map(|call| (call.name, call.file)).collect();
    let expected = [
        ("fsync", &*folder),
        ("fsync", "audit.key.new"),
        ("fsync", "audit"),
        ("fdatasync", "segment.new"),
        ("fsync", "audit"),
    ];
    let expected = expected.map(|(name, file)| (name.to_owned(), file.to_owned()));
    assert_eq!(calls[..5], expected, "before anybody can call");
    let audit = gateway.audit_directory();
    let _folder = gateway.kill();
    disk.after_a_power_cut(&audit, Survives::Nothing);
    let (whole, said) = verify(&audit);
    assert!(whole && said.starts_with("whole: 1 records"), "{said}");
}

#[test]
fn group_commit_shares_one_fdatasync_among_requests() {
    const CALLERS: u64 = 32;
    const EACH: u64 = 8;
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("disk"));
    disk.ask_for("slow", "10");
    let before = disk.syncs().len();
    let told = call_at_once(&gateway, CALLERS, EACH);
    // On a slow machine the 250 ms of an intent may be over.
    let late = told.iter().filter(|(_, reply)| reply.code() == "audit_unavailable").count();
    let succeeded = told.iter().filter(|(_, reply)| reply.outcome() == "succeeded").count();
    assert!(
        succeeded + late == told.len() && late * 4 <= told.len(),
        "{succeeded} succeeded, {late} were late"
    );
    gateway.records("outcome", told.len());
    let syncs = wait_for("the last fdatasync to be counted", || {
        let syncs = disk.syncs();
        (metric(&gateway, "audit_syncs_total") == syncs.len() as f64).then_some(syncs)
    });
    println!("{} requests, {} fdatasyncs", told.len(), syncs.len() - before);
    assert!((syncs.len() - before) * 4 <= told.len(), "{} fdatasyncs", syncs.len() - before);
    assert_eq!(metric(&gateway, "audit_batches_total") as usize, syncs.len() - 1, "but for the start's");
    assert!(metric(&gateway, "audit_sync_seconds_total") >= 0.01 * (syncs.len() - before) as f64);
    assert_accounted(&gateway.audit_directory(), &sandbox);
}

#[test]
fn hanging_fdatasync_rejects_new_requests_in_time() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("disk"));
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    gateway.records("outcome", 1);
    disk.ask("hang");
    let begun = Instant::now();
    assert_refused(&gateway, &sandbox);
    let waited = begun.elapsed();
    assert!((Duration::from_millis(250)..Duration::from_secs(1)).contains(&waited), "{waited:?}");
    assert_eq!(records(&gateway.audit_directory(), "intent").len(), 2, "written, and not safe");
    assert_refused(&gateway, &sandbox);
    assert_eq!(gateway.admin("/livez").status, 200);
    disk.no_more("hang");
    assert_resumed(&gateway, &sandbox);
    assert_eq!(segments(&gateway.audit_directory()).len(), 1);
}

#[test]
fn stuck_disk_rejects_new_requests_in_time_and_blocks_no_worker() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("kernel"));
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    gateway.records("outcome", 1);
    disk.ask("hang-writes");
    let begun = Instant::now();
    assert_refused(&gateway, &sandbox);
    let waited = begun.elapsed();
    assert!((Duration::from_millis(250)..Duration::from_secs(1)).contains(&waited), "{waited:?}");
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(gateway.send(&head(0, "").replace(PATH, "/nowhere"), "").code(), "route_unknown");
    }
    assert_eq!(gateway.admin("/livez").status, 200);
    for name in ["audit_intent_timeouts_total", "audit_late_intents_total"] {
        assert_eq!(metric(&gateway, name), 1.0, "{name}");
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    disk.no_more("hang-writes");
    assert_resumed(&gateway, &sandbox);
}

#[test]
fn segment_that_cannot_be_synced_or_truncated_is_replaced() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("disk"));
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    gateway.records("outcome", 1);
    let audit = gateway.audit_directory();
    let length = fs::metadata(&segments(&audit)[0]).unwrap().len();
    disk.ask("fail-cuts");
    disk.ask("fail-once");
    gateway.call_once();
    wait_for("a new segment", || (segments(&audit).len() == 2).then_some(()));
    disk.no_more("fail-cuts");
    wait_for("service", || (gateway.call().outcome() == "succeeded").then_some(()));
    assert!(fs::metadata(&segments(&audit)[0]).unwrap().len() > length, "the batch stands in both");
    let (whole, said) = verify(&audit);
    assert!(whole, "and is read once: {said}");
}

#[test]
fn failed_fdatasync_rewrites_its_records_to_a_new_segment() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("disk"));
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    gateway.records("outcome", 1);
    let audit = gateway.audit_directory();
    let good = fs::read(&segments(&audit)[0]).unwrap();
    disk.ask("fail-once");
    let told = call_at_once(&gateway, 8, 2);
    for (task, reply) in &told {
        // Those that waited are late, or in time with the new segment.
        let said = (reply.status, reply.code(), reply.outcome());
        let sent = received(&sandbox).contains_key(task);
        assert!(
            said == (200, "", "succeeded") && sent || said == (503, "audit_unavailable", "not_sent") && !sent
        );
    }
    assert_resumed(&gateway, &sandbox);
    let events = gateway.records("event", 2);
    assert!(
        events.iter().any(|event| event["event"] == "recovery" && text(&event["what"]).contains("fdatasync"))
    );
    assert_eq!(metric(&gateway, "audit_sync_errors_total"), 1.0);

    let all = segments(&audit);
    assert_eq!((all.len(), fs::read(&all[0]).unwrap()), (2, good), "cut back to what was proven");
    let calls = disk.syncs();
    let failed = calls.iter().position(|call| call.failed).unwrap();
    let again = calls[failed + 1..].iter().find(|call| call.file == calls[failed].file);
    assert!(again.is_none(), "the file that failed is not asked again: {again:?}");

    let folder = Some(gateway.kill());
    disk.after_a_power_cut(&audit, Survives::Nothing);
    let _gateway = start_with(&sandbox, Setup { folder, ..Setup::default() });
    assert_accounted(&audit, &sandbox);
}

#[test]
fn stop_with_an_unwritten_trail_reports_it_and_fails() {
    // The last one: what a start finds, where the machine did not go down.
    for (durability, fault, said, found) in [
        ("kernel", "fail-writes", "the end of the audit trail could not be written", "unknown"),
        ("kernel", "hang-writes", "the audit writer ended: it hangs", "unknown"),
        ("disk", "fail", "the end of the audit trail could not be written", "succeeded"),
        ("disk", "hang", "the audit writer ended: it hangs", "succeeded"),
        ("disk", "", "", ""),
    ] {
        let (sandbox, disk) = (sandbox(), Disk::new());
        let mut gateway = start_with(&sandbox, disk.setup(durability));
        assert_eq!(gateway.call().outcome(), "succeeded", "{fault}");
        script(&sandbox, Faults::business(Fault::delayed(1000).times(1)));
        let reply = thread::scope(|scope| {
            let under_way = scope.spawn(|| gateway.call_once());
            wait_for("the call under way", || (sandbox.requests().len() == 2).then_some(()));
            if !fault.is_empty() {
                disk.ask_for(fault, "5"); // EIO
            }
            gateway.signal("-TERM");
            under_way.join().unwrap()
        });
        assert_eq!(reply.outcome(), "succeeded", "{fault}: what was sent is answered");
        let code = gateway.wait().code();
        let log = gateway.log();
        if fault.is_empty() {
            assert_eq!(code, Some(0), "the control: {log}");
            continue;
        }
        assert_eq!(code, Some(70), "{fault}: {log}");
        assert!(log.contains(said), "{fault}: {log}");
        disk.no_more(fault);
        let audit = gateway.audit_directory();
        let outcome = || {
            let id = reply.headers["x-gateway-request-id"].as_str();
            let outcomes = records(&audit, "outcome").into_iter();
            outcomes.filter(|outcome| outcome["id"] == id).map(|it| text(&it["outcome"])).collect::<Vec<_>>()
        };
        assert_eq!(outcome().len(), usize::from(found != "unknown"), "{fault}");
        let _next = start_with(&sandbox, Setup { folder: Some(gateway.folder.clone()), ..Setup::default() });
        wait_for("its outcome", || (outcome() == [found]).then_some(()));
    }
}

#[test]
fn temporary_disk_failure_rejects_requests_and_loses_nothing() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let mut gateway = start_with(&sandbox, disk.setup("disk"));
    let failed = || disk.syncs().iter().filter(|call| call.failed).count();
    let fails_no_more = || {
        wait_for("some tries", || (failed() >= 5).then_some(()));
        disk.no_more("fail");
    };
    assert_outage(&gateway, &sandbox, || disk.ask("fail"), fails_no_more);
    assert_eq!(metric(&gateway, "audit_sync_errors_total") as usize, failed());
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let audit = gateway.audit_directory();
    assert_eq!(segments(&audit).len(), 2);
    let mut names: Vec<_> = fs::read_dir(&audit).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.retain(|name| !name.to_str().unwrap().ends_with(".jsonl"));
    names.sort();
    assert_eq!(names, ["audit.key", "lock"], "nothing is left over");
}

/// No administrator can do this to a trail that is open for writing: the kernel finds it busy. A file system does it to
/// itself, when its disk fails.
#[test]
fn failing_writes_reject_requests_until_they_succeed_again() {
    for (error, number) in [("EIO", "5"), ("EROFS", "30")] {
        for durability in ["kernel", "disk"] {
            println!("{error}, durability {durability}");
            let (sandbox, disk) = (sandbox(), Disk::new());
            let gateway = start_with(&sandbox, disk.setup(durability));
            let begin = || disk.ask_for("fail-writes", number);
            assert_outage(&gateway, &sandbox, begin, || disk.no_more("fail-writes"));
            assert!(metric(&gateway, "audit_write_errors_total") > 0.0);
            assert_eq!(segments(&gateway.audit_directory()).len(), 1);
        }
    }
}

#[test]
fn new_segment_with_an_unsynced_name_is_started_again() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("disk"));
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    gateway.records("outcome", 1);
    disk.ask("fail-name");
    disk.ask("fail-once");
    gateway.call_once();
    wait_for("both failures", || (disk.calls().iter().filter(|call| call.failed).count() == 2).then_some(()));
    assert_resumed(&gateway, &sandbox);
    let audit = gateway.audit_directory();
    assert_eq!(segments(&audit).len(), 2);
    let _folder = gateway.kill();
    disk.after_a_power_cut(&audit, Survives::Nothing);
    let (whole, said) = verify(&audit);
    assert!(whole, "{said}");
    let sent = sandbox.requests().len();
    assert!(records(&audit, "intent").len() >= sent, "the platter has the new segment by its name");
}

#[test]
fn next_process_syncs_what_a_killed_one_could_not() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let gateway = start_with(&sandbox, disk.setup("disk"));
    assert_eq!(gateway.post(&body(1)).outcome(), "succeeded");
    gateway.records("outcome", 1);
    let audit = gateway.audit_directory();
    disk.ask("fail");
    assert_refused(&gateway, &sandbox);
    wait_for("a failure", || disk.syncs().iter().any(|call| call.failed).then_some(()));
    let folder = gateway.kill();
    assert_eq!(records(&audit, "intent").len(), 2, "for the kernel it is written");
    disk.no_more("fail");
    let setup = Setup { folder: Some(folder), ..disk.setup("disk") };
    let mut gateway = start_with(&sandbox, setup);
    assert_eq!(gateway.post(&body(2)).outcome(), "succeeded");
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let all = records(&audit, "").len();
    disk.after_a_power_cut(&audit, Survives::Nothing);
    assert_eq!((records(&audit, "").len(), segments(&audit).len()), (all, 1));
    assert_accounted(&audit, &sandbox);
}

#[test]
fn switch_from_kernel_to_disk_syncs_older_segments_at_start() {
    let (sandbox, disk) = (sandbox(), Disk::new());
    let mut gateway = start_with(&sandbox, disk.setup("kernel").set("audit.segment_size", "64KiB"));
    let audit = gateway.audit_directory();
    begin_second_segment(&gateway);
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let setup = Setup { folder: Some(gateway.folder.clone()), ..disk.setup("disk") };
    let folder = start_with(&sandbox, setup).kill();
    let all = records(&audit, "").len();
    disk.after_a_power_cut(&audit, Survives::Nothing);
    let (whole, said) = verify(&audit);
    assert!(whole && records(&audit, "").len() == all, "{said}");
    drop(folder);
}

#[test]
fn power_cut_loses_no_intent_of_a_sent_call() {
    let (sandbox, mut folder, mut tails) = (sandbox(), None, 0);
    let load = Load { task: Arc::new(AtomicU64::new(1_000)), told: Arc::default() };
    for round in 0.. {
        let disk = Disk::new();
        folder.iter().for_each(|folder: &Arc<TempDir>| disk.holds(&folder.path().join("audit")));
        let setup = Setup { folder: folder.take(), ..disk.setup("disk").set("audit.segment_size", "64KiB") };
        let gateway = start_with(&sandbox, setup);
        disk.ask_for("slow", "5");
        let before = load.told();
        let callers = load.begin(gateway.address);
        wait_for("replies", || (load.told() >= before + 20).then_some(()));
        if round % 2 == 1 {
            disk.ask("fail-once");
            wait_for("a failure", || disk.calls().iter().any(|call| call.failed).then_some(()));
            let enough = load.told() + round * 5;
            wait_for("replies", || (load.told() >= enough).then_some(()));
        }
        // Killed with a call under way, so that something is written and not synced.
        disk.ask("hang");
        wait_for("a call", || disk.calls().last().is_some_and(|call| call.ended.is_none()).then_some(()));
        let audit = gateway.audit_directory();
        folder = Some(gateway.kill());
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        let survives = [Survives::Nothing, Survives::FirstHalf, Survives::SecondHalf][round % 3];
        let written = records(&audit, "").len();
        disk.after_a_power_cut(&audit, survives);
        let left = records(&audit, "").len();
        tails += usize::from(left < written);
        println!("round {round}, {survives:?} survives: {left} of {written} records left");

        let gateway = start_with(&sandbox, Setup { folder: folder.take(), ..Setup::default() });
        assert_accounted(&audit, &sandbox);
        folder = Some(gateway.kill());
        // Whether something was written and not on the disk is a matter of luck.
        if round >= 8 && tails >= 5 {
            break;
        }
        assert!(round < 40, "in {tails} of {round} rounds something was written and not on the disk");
    }
    println!("{} replies", load.told());
}

#[test]
fn kill_with_durability_disk_loses_no_request() {
    let (sandbox, mut folder) = (sandbox(), None);
    let load = Load { task: Arc::new(AtomicU64::new(1_000)), told: Arc::default() };
    for round in 0..6 {
        hold_some(&sandbox);
        let setup = |folder| Setup { folder, ..Setup::default().set("audit.durability", "disk") };
        let gateway = start_with(&sandbox, setup(folder.take()));
        let (before, enough) = (load.told(), 10 + round * 11);
        let callers = load.begin(gateway.address);
        wait_for("replies", || (load.told() >= before + enough).then_some(()));
        let audit = gateway.audit_directory();
        folder = Some(gateway.kill());
        let received = received(&sandbox);
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        let ended: BTreeSet<_> =
            records(&audit, "outcome").iter().map(|record| text(&record["id"])).collect();
        let mut open = records(&audit, "intent");
        open.retain(|intent| !ended.contains(&text(&intent["id"])));
        assert!(!open.is_empty(), "two requests are held");
        let gateway = start_with(&sandbox, setup(folder.take()));
        check_after_a_kill(&audit, &received, &load, &open);
        folder = Some(gateway.kill());
    }
}
