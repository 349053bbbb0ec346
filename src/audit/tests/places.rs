//! Tests of files that others move, replace or cut: segments, the lock file, the directory.

use std::io::Write;
use std::os::unix::fs::symlink;

use super::lock::{ClosingStatement, Statement};
use super::recovery::Lacking;
use super::*;

/// The only segment of a short trail.
fn segment(directory: &Path) -> PathBuf {
    chain::segment_path(directory, 1)
}

fn append(path: &Path, bytes: &[u8]) {
    OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

fn cut(path: &Path, length: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// The files that are not segments, key or lock.
fn others(directory: &Path) -> Vec<PathBuf> {
    let mut others: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    let is_usual = |path: &PathBuf| path.extension().is_some_and(|it| it == "jsonl" || it == "key");
    others.retain(|path| !is_usual(path) && !path.ends_with(lock::NAME));
    others
}

fn gaps(directory: &Path) -> Vec<Value> {
    trail(directory).into_iter().filter(|record| record["event"] == "gap").collect()
}

/// Files restored, and files lost.
fn files_lost(audit: &Audit) -> [u64; 2] {
    audit.shared().metrics.files_lost.each_ref().map(|counter| counter.get())
}

/// Waits until the trail has `count` events `gap`.
fn wait_for_gaps(directory: &Path, count: usize) -> Vec<Value> {
    wait_for(|| Some(gaps(directory)).filter(|gaps| gaps.len() == count))
}

type Damage = fn(&Path);

/// Ways to take the open segment's name from it, and whether another file has the name then.
const LOSSES: [(&str, bool, Damage); 7] = [
    ("renamed", false, |path| fs::rename(path, path.with_extension("jsonl.1")).unwrap()),
    ("deleted", false, |path| fs::remove_file(path).unwrap()),
    ("linked and deleted", false, |path| {
        fs::hard_link(path, path.with_extension("link")).unwrap();
        fs::remove_file(path).unwrap();
    }),
    ("replaced by a copy", true, |path| {
        fs::copy(path, path.with_extension("copy")).unwrap();
        fs::rename(path.with_extension("copy"), path).unwrap();
    }),
    ("replaced by a link to itself", true, |path| {
        fs::rename(path, path.with_extension("moved")).unwrap();
        symlink(path.with_extension("moved"), path).unwrap();
    }),
    ("replaced by a directory", true, |path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    }),
    ("written to", true, |path| append(path, b"a line of somebody else\n")),
];

#[tokio::test]
async fn moved_or_deleted_open_segment_is_restored_completely() {
    // Both, since the copy is synced only with `disk`.
    for durability in Durability::ALL {
        for (how, is_aside, damage) in LOSSES {
            let folder = TempDir::new().unwrap();
            let audit = start(&Options { durability, ..Options::small(folder.path()) });
            let in_flight = intended(&audit).await.sent();
            damage(&segment(folder.path()));
            in_flight.finish(&answer());
            intended(&audit).await.sent().finish(&answer());
            let gaps = wait_for_gaps(folder.path(), 1);
            assert_eq!((&gaps[0]["result"], files_lost(&audit)), (&json!("restored"), [1, 0]), "{how}");
            assert_eq!(gaps[0]["file"], "audit-00000000000000000001.jsonl");
            let aside =
                others(folder.path()).into_iter().filter(|path| path.to_str().unwrap().contains("foreign"));
            assert_eq!(
                (aside.count() == 1, !gaps[0]["aside"].is_null()),
                (is_aside, is_aside),
                "{how}: {gaps:?}"
            );
            audit.close();
            assert_whole(folder.path());
            assert_eq!(segments(folder.path()).unwrap(), [segment(folder.path())], "{how}");
            let kinds = trail(folder.path());
            let count = |kind: &str| kinds.iter().filter(|record| record["kind"] == kind).count();
            assert_eq!((count("intent"), count("outcome")), (2, 2), "{how}: no record is lost");
        }
    }
}

#[tokio::test]
async fn start_resumes_a_restored_segment() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    fs::remove_file(segment(folder.path())).unwrap();
    intended(&audit).await.sent().finish(&answer());
    audit.close();
    let audit = start(&Options::small(folder.path()));
    assert!(audit.damage().is_empty());
    audit.close();
    assert_whole(folder.path());
    assert_eq!(segments(folder.path()).unwrap().len(), 1);
}

// Nothing is written meanwhile, so only the check of each second can notice it.
#[tokio::test]
async fn idle_gateway_detects_a_lost_segment_within_a_second() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    intended(&audit).await.sent().finish(&answer());
    wait_for(|| (trail(folder.path()).len() == 3).then_some(()));
    let begun = Instant::now();
    fs::rename(segment(folder.path()), folder.path().join("audit.1")).unwrap();
    wait_for(|| segment(folder.path()).exists().then_some(()));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    wait_for_gaps(folder.path(), 1);
    audit.close();
    assert_whole(folder.path());
}

#[tokio::test]
async fn truncated_open_segment_is_a_loss_and_a_new_one_starts() {
    // Cut to nothing; by a byte, which the next record makes up for in length; by a line. Each at rest, and
    // with a record that follows.
    for (how, is_at_rest) in [(0, false), (1, false), (2, false), (0, true), (1, true), (2, true)] {
        let folder = TempDir::new().unwrap();
        let audit = start(&Options::small(folder.path()));
        intended(&audit).await.sent().finish(&answer());
        wait_for(|| (trail(folder.path()).len() == 3).then_some(()));
        let path = segment(folder.path());
        let text = fs::read(&path).unwrap();
        let left = [0, text.len() - 1, text.len() - lines_of(&text).pop().unwrap().len()][how];
        cut(&path, left as u64);
        if !is_at_rest {
            intended(&audit).await.sent().finish(&answer());
        }
        let next = chain::segment_path(folder.path(), 4);
        let text_of = || fs::read_to_string(&next).unwrap_or_default();
        wait_for(|| text_of().contains(r#""result":"lost""#).then_some(()));
        assert!(text_of().contains("the open segment was cut shorter"), "{}", text_of());
        assert_eq!(files_lost(&audit), [0, 1]);
        audit.close();
        assert_eq!(fs::read(&path).unwrap(), text[..left], "what is left stays, and nothing is added to it");
        assert!(!verify(folder.path()).faults.is_empty(), "{how}: no verification passes over it");
    }
}

// Its intent is in the part that is left. The writer must read it before it moves on to a new segment.
#[tokio::test]
async fn call_in_flight_survives_truncation_of_its_segment() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    let at_work = intended(&audit).await.sent();
    let id = at_work.id().uuid();
    let left = length(&segment(folder.path()));
    intended(&audit).await.sent().finish(&answer());
    cut(&segment(folder.path()), left);
    intended(&audit).await.sent().finish(&answer());
    // Without an answer the outcome is `unknown`.
    drop(at_work);
    let list = || audit.shared().unresolved();
    let call = wait_for(|| list().calls().find(|call| call.id == id).cloned());
    assert_eq!((call.task, call.caller), (Some(json!(7)), Some("qa-console".into())));
    audit.close();
}

// With a `segment_size` of 1, every batch begins a new segment.
#[tokio::test]
async fn lost_closed_segment_is_recorded_once() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 1, ..Options::small(folder.path()) });
    for _ in 0..4 {
        intended(&audit).await.sent().finish(&answer());
    }
    let is_request = |record: &Value| record["kind"] != "event";
    wait_for(|| (trail(folder.path()).iter().filter(|it| is_request(it)).count() == 8).then_some(()));
    let all = segments(folder.path()).unwrap();
    fs::rename(&all[0], folder.path().join("moved")).unwrap();
    fs::remove_file(&all[1]).unwrap();
    fs::copy(&all[2], folder.path().join("copy")).unwrap();
    fs::rename(folder.path().join("copy"), &all[2]).unwrap();
    let gaps = wait_for_gaps(folder.path(), 3);
    let of = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        gaps.iter().find(|gap| gap["file"] == name).unwrap()
    };
    assert_eq!(of(&all[0])["found_as"], "moved");
    assert_eq!(of(&all[1])["what"], "a closed segment was moved or deleted");
    assert_eq!(of(&all[2])["what"], "a closed segment was replaced by another file");
    assert_eq!(files_lost(&audit), [0, 3]);
    // The control: the check of the next second notices one that is lost later.
    fs::remove_file(&all[3]).unwrap();
    wait_for_gaps(folder.path(), 4);
    audit.close();
    assert!(!verify(folder.path()).faults.is_empty());
}

// The writer must not take its own removal for a loss: also of a segment that was begun after the start.
#[tokio::test]
async fn segment_removed_by_retention_is_not_reported_as_lost() {
    let folder = TempDir::new().unwrap();
    let audit =
        start(&Options { segment_size: 1, retain: Some(Duration::ZERO), ..Options::small(folder.path()) });
    let deadline = Instant::now() + Duration::from_secs(20);
    // 15 removals take long enough for at least one check of the places between two of them.
    while audit.shared().metrics.removed.get() < 15 {
        assert!(Instant::now() < deadline, "nothing was removed");
        intended(&audit).await.sent().finish(&answer());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(files_lost(&audit), [0, 0]);
    audit.close();
    // The control, by a trail that removes nothing itself.
    let audit = start(&Options { segment_size: 1, ..Options::small(folder.path()) });
    intended(&audit).await.sent().finish(&answer());
    intended(&audit).await.sent().finish(&answer());
    fs::remove_file(&segments(folder.path()).unwrap()[0]).unwrap();
    wait_for(|| (files_lost(&audit) == [0, 1]).then_some(()));
    audit.close();
}

#[tokio::test]
async fn nothing_is_sent_while_directory_or_lock_file_is_missing() {
    for lost in ["audit", "audit/lock"] {
        for foreign in ["", "a file", "a directory"] {
            let folder = TempDir::new().unwrap();
            let directory = folder.path().join("audit");
            // Short, since the intents of this test wait until their deadline while the files are away.
            let options =
                Options { intent_deadline: Duration::from_millis(50), ..Options::small(&directory) };
            let audit = start(&options);
            let in_flight = intended(&audit).await.sent();
            let id = json!({ "id": in_flight.id().to_string() });
            let (path, away) = (folder.path().join(lost), folder.path().join("away"));
            fs::rename(&path, &away).unwrap();
            match foreign {
                "a file" => fs::write(&path, "").unwrap(),
                "a directory" => fs::create_dir(&path).unwrap(),
                _ => {}
            }
            wait_for(|| (!audit.healthy()).then_some(()));
            assert_eq!(refused(record(&audit)).await, Some(Unavailable), "{lost}, {foreign}");
            assert_eq!(files_lost(&audit), [0, 1]);
            in_flight.finish(&answer());
            if foreign == "a directory" {
                assert_eq!(fs::read_dir(&path).unwrap().count(), 0, "nothing is written there");
                fs::remove_dir(&path).unwrap();
            } else if foreign == "a file" {
                fs::remove_file(&path).unwrap();
            }
            fs::rename(&away, &path).unwrap();
            wait_for(|| audit.healthy().then_some(()));
            intended(&audit).await.sent().finish(&answer());
            audit.close();
            assert_whole(&directory);
            assert_eq!(outcomes_of(&directory, &id)[0]["outcome"], "succeeded");
            let what: Vec<_> = trail(&directory).iter().map(|record| record["what"].to_string()).collect();
            assert!(what.iter().any(|what| what.contains("moved, deleted or replaced")), "{what:?}");
            assert!(what.iter().any(|what| what.contains("in their place again")), "{what:?}");
        }
    }
}

// A copy has the same names, but may belong to another gateway. Only the identity of the directory tells.
#[tokio::test]
async fn nothing_is_written_to_a_replaced_directory() {
    let folder = TempDir::new().unwrap();
    let directory = folder.path().join("audit");
    let deadline = Duration::from_millis(50);
    let audit = start(&Options { intent_deadline: deadline, segment_size: 1, ..Options::small(&directory) });
    intended(&audit).await.sent().finish(&answer());
    wait_for(|| (trail(&directory).len() == 3).then_some(()));
    fs::rename(&directory, folder.path().join("away")).unwrap();
    fs::create_dir(&directory).unwrap();
    for entry in fs::read_dir(folder.path().join("away")).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), directory.join(entry.file_name())).unwrap();
    }
    let before = trail(&directory).len();
    assert_eq!(refused(record(&audit)).await, Some(Unavailable));
    wait_for(|| (!audit.healthy()).then_some(()));
    assert_eq!((trail(&directory).len(), segments(&directory).unwrap().len()), (before, 3));
    assert!(others(&directory).is_empty(), "{:?}", others(&directory));
}

#[tokio::test]
async fn file_at_the_path_of_the_next_segment_is_moved_aside() {
    let make: [Damage; 5] = [
        |path| fs::write(path, "").unwrap(),
        |path| fs::write(path, "somebody else's").unwrap(),
        |path| fs::create_dir(path).unwrap(),
        |path| symlink("/dev/null", path).unwrap(),
        |path| {
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        },
    ];
    for durability in Durability::ALL {
        for make in make {
            let folder = TempDir::new().unwrap();
            let audit = start(&Options { durability, segment_size: 1, ..Options::small(folder.path()) });
            make(&chain::segment_path(folder.path(), 2));
            intended(&audit).await.sent().finish(&answer());
            let gaps = wait_for_gaps(folder.path(), 1);
            assert_eq!(gaps[0]["what"], "a file with the name of a new segment already existed");
            audit.close();
            assert_whole(folder.path());
            assert_eq!(others(folder.path()).len(), 1);
        }
    }
}

// ---- What the lock file says -----------------------------------------------------------------------------

fn statement(directory: &Path) -> ClosingStatement {
    match lock::read(directory).unwrap() {
        Statement::Of(stated) => stated,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn lock_file_names_the_newest_segment_and_its_last_record() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 1, ..Options::small(folder.path()) });
    assert_eq!((statement(folder.path()).newest, statement(folder.path()).is_stopped), (1, false));
    intended(&audit).await.sent().finish(&answer());
    // The lock file is written within a second after a record.
    wait_for(|| (statement(folder.path()).last.seq == 3).then_some(()));
    assert_eq!(statement(folder.path()).newest, 3);
    audit.close();
    let (found, stated) = (verify(folder.path()), statement(folder.path()));
    assert_eq!((stated.newest, stated.last.seq, stated.last.hash), (4, found.seq, found.hash));
    assert!(stated.is_stopped);
}

#[test]
fn torn_lock_file_counts_as_unreadable() {
    let folder = TempDir::new().unwrap();
    start(&Options::small(folder.path())).close();
    let path = folder.path().join(lock::NAME);
    let good = fs::read(&path).unwrap();
    let said = |text: &[u8]| {
        fs::write(&path, text).unwrap();
        lock::read(folder.path()).unwrap()
    };
    assert!(matches!(said(&good), Statement::Of(_)), "the control");
    assert_eq!(said(b""), Statement::Nothing);
    for length in 1..good.len() {
        assert_eq!(said(&good[..length]), Statement::Unreadable, "{length}");
        let torn = [&good[..length], &vec![0; good.len() - length]].concat();
        assert_eq!(said(&torn), Statement::Unreadable, "{length}");
    }
    let text = String::from_utf8(good).unwrap();
    for (old, new) in [
        ("audit-00000000000000000001", "audit-00000000000000000000"),
        ("audit-00000000000000000001", "audit-99999999999999999999"),
        // A forged name must not lead out of the directory.
        ("audit-00000000000000000001", "../..-00000000000000000001"),
        ("\"seq\":2", "\"seq\":x"),
        ("\"stopped\":true", "\"stopped\":\"no\""),
    ] {
        assert!(text.contains(old), "{text}");
        assert_eq!(said(text.replace(old, new).as_bytes()), Statement::Unreadable, "{new}");
    }
    fs::write(&path, "{}").unwrap();
    let audit = start(&Options::small(folder.path()));
    assert!(audit.damage().is_empty(), "an unreadable one is told, and no damage");
    audit.close();
    assert!(
        trail(folder.path())
            .iter()
            .any(|record| record["what"].to_string().contains("lock file cannot be read"))
    );
    assert_whole(folder.path());
}

/// A trail of several segments, of a gateway that was stopped or not.
async fn several_segments(is_stopped: bool) -> TempDir {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 1, ..Options::small(folder.path()) });
    intended(&audit).await.sent().finish(&answer());
    wait_for(|| (statement(folder.path()).last.seq == 3).then_some(()));
    let copy = TempDir::new().unwrap();
    if is_stopped {
        audit.close();
    }
    for entry in fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn newest(directory: &Path) -> PathBuf {
    segments(directory).unwrap().pop().unwrap()
}

const SHORTER: [(&str, Damage); 5] = [
    ("the newest is moved", |directory| fs::rename(newest(directory), directory.join("moved")).unwrap()),
    ("all are deleted", |directory| {
        segments(directory).unwrap().iter().for_each(|it| fs::remove_file(it).unwrap());
    }),
    ("the newest is cut to nothing", |directory| cut(&newest(directory), 0)),
    ("the newest is cut by a byte", |directory| cut(&newest(directory), length(&newest(directory)) - 1)),
    ("the lock file is missing", |directory| fs::remove_file(directory.join(lock::NAME)).unwrap()),
];

#[tokio::test]
async fn start_records_damage_if_the_lock_file_names_missing_records() {
    for is_stopped in [true, false] {
        let control = several_segments(is_stopped).await;
        assert_whole(control.path());
        let audit = start(&Options::small(control.path()));
        assert!(audit.damage().is_empty(), "the control");
        audit.close();
        assert_whole(control.path());
        for (how, damage) in SHORTER {
            let folder = several_segments(is_stopped).await;
            let seq = verify(folder.path()).seq;
            damage(folder.path());
            assert_eq!(verify(folder.path()).damage.len(), 1, "{how}: verification says so");
            let audit = start(&Options::small(folder.path()));
            let [found] = audit.damage() else { panic!("{how}: {:?}", audit.damage()) };
            let end = if is_stopped { Lacking::LastRecords } else { Lacking::LastRecordsAfterCrash };
            let expected = match how {
                "the lock file is missing" => Lacking::LockFile,
                "the newest is moved" | "all are deleted" => Lacking::NewestSegment,
                _ => end,
            };
            assert!(found.at_end && found.lacks == expected, "{how}: {found:?}");
            let all = trail(folder.path());
            let event = all.iter().find(|record| record["what"] == "damaged").unwrap();
            assert_eq!(event["reason"], found.reason);
            assert!(event["seq"].as_u64().unwrap() > seq, "{how}: no number is given twice");
            audit.close();

            // It stays on record, whatever starts come after.
            for _ in 0..2 {
                let audit = start(&Options::small(folder.path()));
                assert!(audit.damage().is_empty(), "{how}: it is told once: {:?}", audit.damage());
                audit.close();
                let found = verify(folder.path());
                assert!(found.damage.is_empty() && found.recorded.len() == 1, "{how}: {found:?}");
            }
        }
    }
}

// The start was killed between making the lock file and recording that there was none.
#[tokio::test]
async fn missing_lock_file_is_still_reported_after_an_interrupted_start() {
    let folder = several_segments(true).await;
    fs::remove_file(folder.path().join(lock::NAME)).unwrap();
    drop(lock_file(Directory::open(folder.path()).unwrap()).unwrap());
    let audit = start(&Options::small(folder.path()));
    assert_eq!(audit.damage()[0].lacks, Lacking::LockFile);
    audit.close();
}

#[tokio::test]
async fn symlinks_in_the_audit_directory_are_not_followed() {
    let link = |path: &Path| {
        let target = path.with_extension("target");
        fs::rename(path, &target).unwrap();
        symlink(target, path).unwrap();
    };
    for file in ["audit-00000000000000000004.jsonl", "audit-00000000000000000003.jsonl", "lock", "audit.key"]
    {
        let folder = several_segments(true).await;
        link(&folder.path().join(file));
        let error = Audit::start(&Options::small(folder.path()), metrics()).unwrap_err().to_string();
        assert!(error.contains(&format!("{file} is no regular file")), "{error}");
    }
    let folder = several_segments(true).await;
    let key = folder.path().join("elsewhere.key");
    fs::rename(chain::key_path(folder.path()), &key).unwrap();
    link(&key);
    let audit = Audit::start(&Options { key_file: Some(key), ..Options::small(folder.path()) }, metrics());
    audit.expect("a key file of the configuration may be a link").close();
}
