//! Tests of the trail against crashes, changed files, slow or failing disks, and requests that end in every way.
//!
//! They use a real directory and the real writer's thread. Tests of files that are moved or deleted are in `places`.

mod places;

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::future::Future;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Command;
use std::sync::MutexGuard;
use std::task::{Context, Waker};
use std::{env, fs};

use tempfile::TempDir;

use super::chain::segments;
use super::commit_waiters::tests::done;
use super::directory::Directory;
use super::lock::Statement;
use super::recovery::TrailState;
use super::start::{Recovered, lock, lock_file, recover};
use super::writer::Writer;
use super::*;
use crate::config::RefusalBudget;
use crate::keyed_hash::{Hash, hex};
use crate::model::code::Code;
use crate::model::durability::Durability;
use crate::model::outcome::Outcome;
use crate::model::stage::Stage;
use crate::registry::Registry;

// As the gateway does: without `verify_past` no age is known, and nothing would be removed.
fn start(options: &Options) -> Audit {
    let audit = Audit::start(options, metrics()).unwrap();
    audit.verify_past(&options.directory).unwrap();
    audit
}

fn metrics() -> AuditMetrics {
    AuditMetrics::new(&mut Registry::new())
}

fn record(audit: &Audit) -> OpenRecord {
    let mut record = audit.open(Peer::Tcp(([127, 0, 0, 1], 5000).into()));
    record.caller("qa-console".into());
    record
}

/// The record of a request whose intent is committed.
async fn intended(audit: &Audit) -> IntendedRecord {
    let mut record = record(audit);
    record.enter(Stage::Audit);
    queued(&mut record, ",\"task\":7").unwrap().await.unwrap()
}

/// An intent that is queued and not committed yet.
type Intent = Pin<Box<dyn Future<Output = Result<IntendedRecord, Unavailable>>>>;

/// Queues an intent.
fn queued(record: &mut OpenRecord, members: &str) -> Result<Intent, Unavailable> {
    let further = |line: &mut Vec<u8>| line.extend_from_slice(members.as_bytes());
    Ok(Box::pin(record.intent(&Permit::default(), 2, &[0; 32], &further)?))
}

/// Queues an intent, and waits until it is committed. Returns the error, if any.
async fn refused(mut record: OpenRecord) -> Option<Unavailable> {
    match queued(&mut record, "") {
        Ok(intent) => intent.await.err(),
        Err(unavailable) => Some(unavailable),
    }
}

fn answer() -> ExchangeResult {
    ExchangeResult {
        outcome: Outcome::Succeeded,
        code: None,
        cause: None,
        status: Some(200),
        upstream_status: Some(200),
        upstream_id: None,
        result_code: Some(b"0409000"[..].into()),
        attempts: 1,
        token_generation: 3,
        note: None,
        reply: None,
    }
}

fn refuse(audit: &Audit) {
    record(audit).refuse(Code::RouteUnknown, None);
}

/// All records of a trail.
fn trail(directory: &Path) -> Vec<Value> {
    let read = |path: PathBuf| trail_of(&fs::read(path).unwrap());
    segments(directory).unwrap().into_iter().flat_map(read).collect()
}

fn outcomes_of(directory: &Path, record: &Value) -> Vec<Value> {
    let is_its = |outcome: &Value| outcome["kind"] == "outcome" && outcome["id"] == record["id"];
    trail(directory).into_iter().filter(is_its).collect()
}

fn verify(directory: &Path) -> TrailState {
    recovery::read(directory, &Keys::load(&chain::key_path(directory)).unwrap()).unwrap()
}

fn assert_whole(directory: &Path) {
    let found = verify(directory);
    let is_whole = found.faults.is_empty() && found.torn.is_none();
    assert!(is_whole && found.damage.is_empty() && found.recorded.is_empty(), "{found:?}");
}

/// The lines of a trail with two open intents, a finished one, a refusal and an event; and the trail's key.
async fn sample() -> (Vec<u8>, Vec<u8>) {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    let open = intended(&audit).await;
    intended(&audit).await.sent().finish(&answer());
    refuse(&audit);
    audit.event("secret change", Map::new());
    // The last record: once it is committed, the whole text is in the file.
    let open_too = intended(&audit).await;
    let segment = segments(folder.path()).unwrap().remove(0);
    let text = fs::read(segment).unwrap();
    // Only after the text was read, since a drop writes the outcome.
    drop((open, open_too));
    audit.close();
    (text, fs::read(chain::key_path(folder.path())).unwrap())
}

/// A directory with a trail of one segment.
fn directory(text: &[u8], key: &[u8]) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(chain::segment_path(folder.path(), 1), text).unwrap();
    fs::write(chain::key_path(folder.path()), key).unwrap();
    silence_lock(folder.path());
    folder
}

/// Empties the lock file, as an older version leaves it. It then states nothing.
// The tests that cut or change a trail look for what the chain shows. The lock file would show the rest as well.
fn silence_lock(directory: &Path) {
    fs::write(directory.join(lock::NAME), "").unwrap();
}

fn lines_of(text: &[u8]) -> Vec<&[u8]> {
    text.split_inclusive(|byte| *byte == b'\n').collect()
}

/// Does what a start does before it serves, without the writer's thread. Returns the segment's length.
fn recovered(path: &Path) -> u64 {
    let keys = Keys::load_own(path).unwrap();
    let directory = Directory::open(path).unwrap();
    lock(&directory).unwrap();
    drop(recover(&Options::small(path), keys.into(), lock_file(directory).unwrap()).unwrap());
    fs::metadata(chain::segment_path(path, 1)).unwrap().len()
}

/// The first 200 lines of a trail with records of every kind; and the trail's key.
async fn long_sample() -> (Vec<u8>, Vec<u8>) {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    let open = intended(&audit).await;
    for round in 0..100 {
        intended(&audit).await.sent().finish(&answer());
        if round % 20 == 0 {
            refuse(&audit);
            audit.event("secret change", Map::new());
        }
    }
    drop(open);
    audit.close();
    let text = fs::read(segments(folder.path()).unwrap().remove(0)).unwrap();
    (lines_of(&text)[..200].concat(), fs::read(chain::key_path(folder.path())).unwrap())
}

/// Changes one byte after the other, `step` bytes apart, in each of the given bits. Verification must name the
/// changed line first.
fn check_changes((text, key): &(Vec<u8>, Vec<u8>), step: usize, bits: impl Fn(usize) -> Vec<u32>) {
    let folder = directory(text, key);
    assert_whole(folder.path());
    let segment = OpenOptions::new().write(true).open(chain::segment_path(folder.path(), 1)).unwrap();
    let line_of = |offset: usize| text[..offset].iter().filter(|byte| **byte == b'\n').count() + 1;
    for offset in (0..text.len()).step_by(step) {
        let line = line_of(offset);
        for bit in bits(offset) {
            segment.write_all_at(&[text[offset] ^ (1 << bit)], offset as u64).unwrap();
            let found = verify(folder.path());
            // A change of the last line's newline makes it a torn line, as after a crash, and no fault.
            let torn = found.torn.as_ref().map(|(_, begin, _)| line_of(usize::try_from(*begin).unwrap()));
            let named = found.faults.first().map(|fault| fault.line).or(torn);
            assert_eq!(named, Some(line), "byte {offset}, bit {bit}: {:?}", found.faults);
        }
        // One file, repaired after each change, since a directory for each would take much longer.
        segment.write_all_at(&text[offset..=offset], offset as u64).unwrap();
    }
    assert_whole(folder.path());
}

// One bit of each byte, another one from byte to byte: all bits of all bytes are tested in the long sweep only.
#[tokio::test]
async fn every_changed_byte_is_detected_in_its_line() {
    check_changes(&sample().await, 1, |offset| vec![offset as u32 % 8]);
}

// The format may be trusted only after the hash is checked. Otherwise anybody could make a start refuse the trail as
// one of a newer version.
#[tokio::test]
async fn changed_format_number_is_reported_as_a_changed_record() {
    let (text, key) = sample().await;
    let changed = String::from_utf8(text).unwrap().replacen("\"format\":1", "\"format\":3", 1);
    let found = verify(directory(changed.as_bytes(), &key).path());
    assert_eq!(found.faults.first().map(|fault| fault.line), Some(1), "{:?}", found.faults);
}

/// Whether the long trail is changed in every bit and cut at every byte, instead of at samples. Half a million trails
/// are then verified, and eighty thousand recovered.
fn is_whole_sweep() -> bool {
    env::var("CCSQM_GATEWAY_TEST_SWEEP").is_ok_and(|sweep| sweep == "whole")
}

// The step is prime, so that it meets every part of a line.
#[tokio::test]
async fn changed_byte_is_detected_in_its_line_among_200_lines() {
    let sample = long_sample().await;
    match is_whole_sweep() {
        true => check_changes(&sample, 1, |_| (0..8).collect()),
        false => check_changes(&sample, 199, |offset| vec![offset as u32 % 8]),
    }
}

#[tokio::test]
async fn removed_swapped_inserted_or_duplicated_records_are_detected() {
    let (text, key) = sample().await;
    // From a trail with another key: lines that are valid JSON with the right number, and only the hash can tell.
    let (foreign, _) = sample().await;
    let lines = lines_of(&text);
    let last = lines.len() - 1;
    let first_fault = |lines: &[&[u8]]| {
        let folder = directory(&lines.concat(), &key);
        verify(folder.path()).faults.first().map(|fault| fault.line)
    };
    assert_eq!(first_fault(&lines), None, "the control");
    for place in [0, last / 2, last] {
        let mut doubled = lines.clone();
        doubled.insert(place, lines[place]);
        assert_eq!(first_fault(&doubled), Some(place + 2), "doubled at {place}");
        let mut inserted = lines.clone();
        inserted.insert(place, lines_of(&foreign)[place]);
        assert_eq!(first_fault(&inserted), Some(place + 1), "inserted at {place}");
        let mut swapped = lines.clone();
        swapped.swap(place, if place == last { last - 1 } else { place + 1 });
        assert_eq!(first_fault(&swapped), Some(place.min(last - 1) + 1), "swapped at {place}");
        let mut removed = lines.clone();
        removed.remove(place);
        // Nothing in the chain shows that the last record is missing. Only a head that is kept elsewhere does, which
        // the last lines test.
        let seen = if place == last { None } else { Some(place + 1) };
        assert_eq!(first_fault(&removed), seen, "removed at {place}");
    }
    let head = verify(directory(&text, &key).path());
    let shorter = verify(directory(&lines[..last].concat(), &key).path());
    assert_eq!((head.seq, shorter.seq), (lines.len() as u64, last as u64));
    assert_ne!(head.hash, shorter.hash);
}

#[tokio::test]
async fn deleted_segment_is_detected_unless_it_was_the_last() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 1, ..Options::small(folder.path()) });
    for _ in 0..4 {
        intended(&audit).await.sent().finish(&answer());
    }
    audit.close();
    assert_whole(folder.path());
    let head = verify(folder.path());
    let all = segments(folder.path()).unwrap();
    assert!(all.len() > 4, "{all:?}");
    for (place, segment) in all.iter().enumerate() {
        let text = fs::read(segment).unwrap();
        fs::remove_file(segment).unwrap();
        let found = verify(folder.path());
        if let Some(next) = all.get(place + 1) {
            assert_eq!((&found.faults[0].file, found.faults[0].line), (next, 1));
        } else {
            assert!(found.faults.is_empty() && found.hash != head.hash);
            assert_eq!(found.damage.len(), 1, "the lock file shows it");
            silence_lock(folder.path());
            assert!(verify(folder.path()).damage.is_empty(), "without it only a head kept elsewhere does");
        }
        fs::write(segment, text).unwrap();
    }
    // A crash leaves a line without an end only at the end of the trail. In the middle it is damage, which recovery
    // must not cut off.
    let text = fs::read(&all[1]).unwrap();
    fs::write(&all[1], &text[..text.len() - 1]).unwrap();
    assert_eq!(verify(folder.path()).faults[0].reason, "the line has no end");
    start(&Options::small(folder.path())).close();
    assert_eq!(fs::read(&all[1]).unwrap(), text[..text.len() - 1], "what is damaged stays as it is");
    assert!(trail(folder.path()).iter().any(|record| record["what"] == "damaged"));
}

#[tokio::test]
async fn damaged_trail_is_never_overwritten() {
    let (text, key) = sample().await;
    // A start that went on from these numbers would write over the first segment, or overflow.
    for number in ["0", "18446744073709551615"] {
        let last = lines_of(&text).pop().unwrap();
        let seq = format!("{{\"seq\":{}", lines_of(&text).len());
        let forged = String::from_utf8(last.to_vec()).unwrap().replace(&seq, &format!("{{\"seq\":{number}"));
        let damaged = [&text[..text.len() - last.len()], forged.as_bytes()].concat();
        let folder = directory(&damaged, &key);
        let audit = start(&Options::small(folder.path()));
        intended(&audit).await.sent().finish(&answer());
        audit.close();
        let all = segments(folder.path()).unwrap();
        assert_eq!((all.len(), fs::read(&all[0]).unwrap()), (2, damaged), "{number}");
        let found = verify(folder.path());
        assert_eq!(found.faults[0].line, lines_of(&text).len(), "{found:?}");
    }
}

/// Cuts a trail at one byte after the other, `step` bytes apart. A start must keep the whole lines, record what it
/// cut off, and give each open intent exactly one outcome.
fn check_cuts((text, key): &(Vec<u8>, Vec<u8>), step: usize) {
    let folder = directory(text, key);
    for cut in (0..=text.len()).step_by(step) {
        silence_lock(folder.path());
        fs::write(chain::segment_path(folder.path(), 1), &text[..cut]).unwrap();
        let kept: usize = lines_of(&text[..cut]).iter().filter(|l| l.ends_with(b"\n")).map(|l| l.len()).sum();
        let (mut open, mut torn) = (BTreeSet::new(), 0);
        for record in trail_of(&text[..kept]) {
            match record["kind"].as_str().unwrap() {
                "intent" => drop(open.insert(record["id"].to_string())),
                "outcome" => drop(open.remove(&record["id"].to_string())),
                _ => {}
            }
        }
        let length = recovered(folder.path());
        assert_eq!(fs::read(chain::segment_path(folder.path(), 1)).unwrap()[..kept], text[..kept]);
        assert_whole(folder.path());
        assert!(verify(folder.path()).unresolved.at_work().count() == 0);
        let mut settled = Vec::new();
        for record in &trail(folder.path())[trail_of(&text[..kept]).len()..] {
            match (record["kind"].as_str().unwrap(), record["event"].as_str()) {
                ("outcome", _) => {
                    assert_eq!(record["outcome"], "unknown");
                    settled.push(record["id"].to_string());
                }
                ("event", Some("recovery")) => {
                    assert_eq!(record["what"], "torn line cut off");
                    torn += record["bytes"].as_u64().unwrap();
                }
                other => assert_eq!(other, ("event", Some("start"))),
            }
        }
        assert_eq!(settled, open.into_iter().collect::<Vec<_>>(), "cut at {cut}");
        assert_eq!(torn, (cut - kept) as u64, "cut at {cut}");
        // A second start must find nothing left to do.
        let before = trail(folder.path()).len();
        assert!(recovered(folder.path()) > length);
        let all = trail(folder.path());
        assert!(all.len() == before + 1 && all[before]["event"] == "start", "settled once");
    }
}

#[tokio::test]
async fn recovery_from_any_cut_keeps_whole_lines_and_closes_calls_once() {
    check_cuts(&sample().await, 1);
}

#[tokio::test]
async fn recovery_from_a_cut_among_200_lines_keeps_the_whole_ones() {
    check_cuts(&long_sample().await, if is_whole_sweep() { 1 } else { 499 });
}

fn trail_of(text: &[u8]) -> Vec<Value> {
    lines_of(text).iter().map(|line| serde_json::from_slice(line).unwrap()).collect()
}

#[tokio::test]
async fn interrupted_recovery_is_completed_by_the_next_one() {
    let (text, key) = sample().await;
    let torn = text.len() - 20;
    let whole = directory(&text[..torn], &key);
    recovered(whole.path());
    let kept = text.len() - lines_of(&text).pop().unwrap().len();
    let recovered_text = fs::read(chain::segment_path(whole.path(), 1)).unwrap();
    let open = trail_of(&text[..kept]);
    let open: Vec<_> = open.iter().filter(|record| record["kind"] == "intent").collect();
    let folder = directory(&text, &key);
    // Recovery is one write. A crash during it leaves any part of that write.
    for cut in kept..recovered_text.len() {
        silence_lock(folder.path());
        fs::write(chain::segment_path(folder.path(), 1), &recovered_text[..cut]).unwrap();
        recovered(folder.path());
        assert_whole(folder.path());
        for intent in &open {
            assert_eq!(outcomes_of(folder.path(), intent).len(), 1, "cut at {cut}");
        }
    }
}

#[tokio::test]
async fn recovery_truncates_a_torn_last_write() {
    let (text, key) = sample().await;
    let lines = lines_of(&text);
    let begin = |line: usize| lines[..line].concat().len();
    for (first, last) in [(1, 1), (2, 4), (lines.len() - 1, lines.len() - 1)] {
        // From the middle of one line to the middle of another, or of the same one: pages do not end where lines do.
        let (from, to) = (begin(first) + lines[first].len() / 3, begin(last) + lines[last].len() / 2);
        // Pages that did not reach the disk read as zeros. Other bytes there are no trace of a crash.
        for (byte, is_crash) in [(0, true), (b'x', false)] {
            let mut torn = text.clone();
            torn[from..to].fill(byte);
            let folder = directory(&torn, &key);
            let found = verify(folder.path());
            if is_crash {
                let path = chain::segment_path(folder.path(), 1);
                let rest = (text.len() - begin(first)) as u64;
                assert_eq!(found.torn, Some((path, begin(first) as u64, rest)), "{:?}", found.faults);
                recovered(folder.path());
                assert_whole(folder.path());
                let all = trail(folder.path());
                assert_eq!(all[first]["bytes"], rest, "what was cut off is recorded");
                assert_eq!(
                    fs::read(chain::segment_path(folder.path(), 1)).unwrap()[..begin(first)],
                    text[..begin(first)]
                );
            } else {
                assert_eq!(found.faults[0].line, first + 1, "a control: no crash does that");
            }
        }
    }
}

#[tokio::test]
async fn gap_far_from_the_end_is_reported_as_damage_and_kept() {
    let (text, key) = sample().await;
    let mut damaged = text.clone();
    damaged[lines_of(&text)[0].len() + 5..][..20].fill(0);
    // More than the longest last write behind the gap, so that a crash cannot have left it.
    damaged.resize(text.len() + (1 << 20), b'\n');
    let folder = directory(&damaged, &key);
    let found = verify(folder.path());
    assert!(found.torn.is_none() && found.faults[0].line == 2, "{:?} {:?}", found.torn, found.faults.first());
    start(&Options::small(folder.path())).close();
    assert_eq!(fs::read(chain::segment_path(folder.path(), 1)).unwrap(), damaged);
}

#[tokio::test]
async fn single_zero_byte_is_damage_and_later_records_are_kept() {
    let (text, key) = sample().await;
    // A single zero can be a flipped bit. If it counted as a lost page, the committed records after it would be cut
    // off.
    let second = lines_of(&text)[0].len();
    let mut damaged = text;
    damaged[second + 40] = 0;
    let folder = directory(&damaged, &key);
    let found = verify(folder.path());
    assert!(found.torn.is_none() && found.faults[0].line == 2, "{:?} {:?}", found.torn, found.faults.first());
    start(&Options::small(folder.path())).close();
    assert_eq!(fs::read(chain::segment_path(folder.path(), 1)).unwrap(), damaged, "all of it stays");
    damaged[second + 40..][..16].fill(0);
    assert!(verify(directory(&damaged, &key).path()).torn.is_some(), "the control");
}

#[tokio::test]
async fn batch_repeated_in_the_next_segment_is_read_once() {
    let (text, key) = sample().await;
    let lines = lines_of(&text);
    let control = verify(directory(&text, &key).path());
    assert!(control.unresolved.at_work().count() > 0);
    for first in 1..lines.len() {
        let good = lines[..first].concat().len();
        let folder = directory(&text, &key);
        let old = chain::segment_path(folder.path(), 1);
        fs::write(chain::segment_path(folder.path(), first as u64 + 1), &text[good..]).unwrap();
        let with_rest = |rest: &[u8]| {
            fs::write(&old, [&text[..good], rest].concat()).unwrap();
            verify(folder.path())
        };
        // The copy in the old segment may have reached the disk as a whole, not at all, up to any byte, or without
        // some of its pages.
        for kept in [good, good + 1, (good + text.len()) / 2, text.len() - 1, text.len()] {
            let mut lacking = text[good..kept].to_vec();
            lacking.iter_mut().take(100).for_each(|byte| *byte = 0);
            for rest in [&text[good..kept], &lacking] {
                let found = with_rest(rest);
                assert!(
                    found.faults.is_empty() && found.torn.is_none(),
                    "{first} {kept}: {:?}",
                    found.faults
                );
                assert_eq!((found.seq, found.hash), (control.seq, control.hash));
                assert!(found.unresolved.at_work().eq(control.unresolved.at_work()));
            }
        }
        let mut changed = text[good..].to_vec();
        changed[10] ^= 1;
        assert!(!with_rest(&changed).faults.is_empty(), "what is not in the next segment is no copy");
        let more = [&text[good..], b"{}\n"].concat();
        assert!(!with_rest(&more).faults.is_empty(), "nor what goes on behind it");
    }
}

#[test]
fn start_removes_an_unfinished_segment_file() {
    // Both: the file may be left by a run with the other durability.
    for durability in Durability::ALL {
        let folder = TempDir::new().unwrap();
        let unfinished = folder.path().join("segment.new");
        fs::write(&unfinished, "{\"seq\":1").unwrap();
        start(&Options { durability, ..Options::small(folder.path()) }).close();
        assert!(!unfinished.exists());
        assert_whole(folder.path());
        assert_eq!(trail(folder.path()).len(), 2, "start and stop");
    }
}

#[tokio::test]
async fn every_way_to_close_a_record_states_if_the_request_was_sent() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));

    let finished = intended(&audit).await.sent();
    let not_sent = intended(&audit).await;
    let left = intended(&audit).await;
    let cut_off = intended(&audit).await.sent();
    let panicked = intended(&audit).await.sent();
    let ids = [&finished, &not_sent, &left, &cut_off, &panicked].map(|record| json!(record.id().to_string()));

    let mut open = audit.open(Peer::Tcp(([127, 0, 0, 1], 5000).into()));
    open.enter(Stage::Audit);
    assert!(!open.is_taken());
    open.enter(Stage::Upstream);
    assert!(open.is_taken(), "a panic from here on may have sent the task");
    drop(open);
    finished.finish(&answer());
    drop(left);
    drop(cut_off);
    // In a task, since a drop in a panic is what `thread::panicking` tells from an ordinary one.
    for record in [not_sent, panicked] {
        let panic = tokio::spawn(async move {
            let _record = record;
            panic!("on purpose");
        });
        assert!(panic.await.unwrap_err().is_panic());
    }
    audit.close();

    let said = ids.map(|id| {
        let outcomes = outcomes_of(folder.path(), &json!({ "id": id }));
        assert_eq!(outcomes.len(), 1, "{outcomes:?}");
        let text = |name: &str| outcomes[0][name].as_str().unwrap_or_default().to_owned();
        (text("outcome"), text("code"))
    });
    let expected = [
        ("succeeded", ""),
        ("not_sent", "internal"),
        ("not_sent", "caller_left"),
        ("unknown", "internal"),
        ("unknown", "internal"),
    ];
    assert_eq!(said, expected.map(|(outcome, code)| (outcome.to_owned(), code.to_owned())));
    assert_whole(folder.path());
}

#[tokio::test]
async fn panic_while_writing_a_record_leaves_no_partial_record() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    intended(&audit).await.sent().finish(&answer());
    let mut broken = record(&audit);
    breaks_off(&mut broken);
    broken.refuse(Code::Internal, None);
    intended(&audit).await.sent().finish(&answer());
    audit.close();
    assert_whole(folder.path());
    let kinds: Vec<_> = trail(folder.path()).iter().map(|record| record["kind"].to_string()).collect();
    let expected = ["event", "intent", "outcome", "refusal", "intent", "outcome", "event"];
    assert_eq!(kinds, expected.map(|kind| format!("\"{kind}\"")));
}

/// Begins an intent that panics in the middle of its line.
fn breaks_off(record: &mut OpenRecord) {
    let panics = |line: &mut Vec<u8>| {
        line.extend_from_slice(b",\"half");
        panic!("on purpose");
    };
    let begun =
        std::panic::AssertUnwindSafe(|| drop(record.intent(&Permit::default(), 2, &[0; 32], &panics)));
    assert!(std::panic::catch_unwind(begun).is_err());
}

#[tokio::test]
async fn partial_record_of_a_panic_is_not_flushed_with_earlier_records() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    let sent = intended(&audit).await.sent();
    // The writer must not take the outcome before the panic has left its half line.
    Audit::defer_wake_ups();
    // It waits until the writer is woken.
    sent.finish(&answer());
    // Bound to the end of the test: its drop would queue a refusal, whose line takes the place of the half one.
    let mut broken = record(&audit);
    breaks_off(&mut broken);
    audit.flush();
    wait_for(|| (trail(folder.path()).len() == 3).then_some(()));
    let segment = fs::read(segments(folder.path()).unwrap().pop().unwrap()).unwrap();
    assert!(segment.ends_with(b"\"}\n"), "{}", String::from_utf8_lossy(&segment));
}

/// A disk that does not answer until it is released.
struct Stuck<'a>(MutexGuard<'a, ()>);

impl<'a> Stuck<'a> {
    fn new(audit: &'a Audit) -> Self {
        Self(audit.shared().disk.lock().unwrap())
    }

    fn release(self) {
        drop(self.0);
    }
}

#[test]
fn backlog_is_written_in_parts_and_the_last_starts_a_segment() {
    for (length, parts) in [(10, 1), (1 << 20, 4)] {
        let folder = TempDir::new().unwrap();
        let metrics = metrics();
        let options = Options { segment_size: 1, ..Options::small(folder.path()) };
        let audit = Audit::start(&options, metrics.clone()).unwrap();
        let stuck = Stuck::new(&audit);
        audit.event("first", Map::new());
        wait_for(|| (audit.shared().is_empty()).then_some(()));
        let details = Map::from_iter([("text".to_owned(), json!("x".repeat(length)))]);
        // The writer is stuck with the first event, so that these ten wait together.
        (0..10).for_each(|_| audit.event("long", details.clone()));
        audit.shared().unresolved().insert(UnresolvedCall::of(uuid::Uuid::from_u128(7)));
        let before = metrics.batches.get();
        stuck.release();
        assert_eq!(audit.close(), None);
        // Without the batch of the first event. That of `stop` may be one of its own.
        let written = metrics.batches.get() - before - 1;
        assert!(written == parts || written == parts + 1, "{length}: {written}");
        assert_eq!(trail(folder.path()).iter().filter(|it| it["event"] == "long").count(), 10);
        assert_whole(folder.path());
        let most = segments(folder.path()).unwrap().into_iter().map(|path| fs::read(path).unwrap());
        let lists =
            most.filter(|text| trail_of(text).iter().any(|it| it["event"] == unresolved_calls::LIST)).count();
        assert!(lists >= 1, "{length}");
        let seqs: Vec<_> = trail(folder.path()).iter().map(|it| it["seq"].as_u64().unwrap()).collect();
        assert!(seqs.iter().copied().eq(1..=seqs.len() as u64), "{seqs:?}");
    }
}

/// Queues an intent and polls it once, so that it waits.
fn waiting(record: &mut OpenRecord, members: &str) -> Option<Intent> {
    let mut intent = queued(record, members).ok()?;
    intent.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending().then_some(intent)
}

#[tokio::test]
async fn retention_removes_old_segments_and_the_hash_chain_verifies() {
    let folder = TempDir::new().unwrap();
    let audit =
        start(&Options { segment_size: 1, retain: Some(Duration::ZERO), ..Options::small(folder.path()) });
    let deadline = Instant::now() + Duration::from_secs(20);
    while segments(folder.path()).unwrap()[0] == chain::segment_path(folder.path(), 1) {
        assert!(Instant::now() < deadline, "nothing was removed");
        intended(&audit).await.sent().finish(&answer());
    }
    audit.close();
    assert_whole(folder.path());
    let said = trail(folder.path()).into_iter().filter(|record| record["event"] == "retention").count();
    assert!(said > 0);

    // The next start finds the trail's beginning by that event, and the trail is still whole.
    let audit = start(&Options::small(folder.path()));
    intended(&audit).await.sent().finish(&answer());
    audit.close();
    assert_whole(folder.path());
    assert!(trail(folder.path()).iter().all(|record| record["what"] != "damaged"));

    let last_said = trail(folder.path()).into_iter().rfind(|record| record["event"] == "retention").unwrap();
    let told = last_said["last_seq"].as_u64().unwrap();
    // Deleted by hand, no event tells of it. The control is above: what retention removed verifies.
    for segment in
        segments(folder.path()).unwrap().iter().take_while(|path| chain::first_seq(path) <= told + 1)
    {
        fs::remove_file(segment).unwrap();
    }
    let found = verify(folder.path());
    assert_eq!(
        found.faults[0].reason,
        "records before this one were removed, and no event records their removal"
    );
}

/// Does what a start does before its writer's thread runs.
fn recover_trail(options: &Options) -> Recovered {
    let keys = Keys::load(&chain::key_path(&options.directory)).unwrap();
    let opened = Directory::open(&options.directory).unwrap();
    lock(&opened).unwrap();
    recover(options, keys.into(), lock_file(opened).unwrap()).unwrap()
}

/// Makes a trail of more than ten segments and goes on with it: a writer that knows of no anchors before its start
/// writes `events` events, each in a batch of its own. Returns the names of all events that it wrote, the start's
/// included, and the number of removed segments.
async fn go_on(options: &Options, prepare: impl FnOnce(&mut Writer), events: usize) -> (Vec<String>, usize) {
    let directory = &options.directory;
    let audit = start(&Options { segment_size: 1, ..Options::small(directory) });
    for _ in 0..10 {
        intended(&audit).await.sent().finish(&answer());
    }
    audit.close();
    drop(audit);
    let (before, found) = (segments(directory).unwrap(), verify(directory));
    let Recovered { mut writer, begun, unresolved, .. } = recover_trail(options);
    writer.clocks.set_anchors(Vec::new());
    prepare(&mut writer);
    let shared = Shared::new(options, metrics(), begun, unresolved);
    thread::scope(|scope| {
        scope.spawn(|| writer.run(&shared));
        for number in 1..=events {
            shared.event("test", json!({}));
            let seq = begun + u64::try_from(number).unwrap();
            wait_for(|| (shared.committed.load(std::sync::atomic::Ordering::Acquire) >= seq).then_some(()));
        }
        shared.close();
    });
    assert_whole(directory);
    let new = trail(directory).into_iter().filter(|record| record["seq"].as_u64() > Some(found.seq));
    let names = new.map(|record| record["event"].as_str().unwrap().to_owned()).collect();
    (names, before.iter().filter(|path| !path.exists()).count())
}

// Calls come one after the other, so that segments begin with an intent as well as with an outcome.
#[tokio::test]
async fn unresolved_list_at_each_segment_start_names_the_open_calls() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 4096, ..Options::small(folder.path()) });
    for _ in 0..100 {
        intended(&audit).await.sent().finish(&answer());
    }
    audit.close();
    assert_eq!(verify(folder.path()).unresolved.calls().count(), 0);
    let (mut open, mut lists) = (BTreeSet::new(), 0);
    for path in segments(folder.path()).unwrap() {
        let records = trail_of(&fs::read(path).unwrap());
        for (index, record) in records.iter().enumerate() {
            let id = record["id"].to_string();
            match record["kind"].as_str().unwrap() {
                "intent" => drop(open.insert(id)),
                "outcome" => drop(open.remove(&id)),
                _ if record["event"] == unresolved_calls::LIST => {
                    let listed = record[unresolved_calls::LIST].as_array().unwrap();
                    assert!(
                        listed.iter().map(|call| call["id"].to_string()).eq(open.iter().cloned()),
                        "{record}"
                    );
                    assert!(index < records.len() / 2, "{index} of {}", records.len());
                    lists += 1;
                }
                _ => {}
            }
        }
    }
    assert!(lists > 2, "{lists}");
}

#[tokio::test]
async fn retention_check_removes_one_segment_outside_the_window() {
    for (hours, gone) in [(0, 1), (1, 0)] {
        let folder = TempDir::new().unwrap();
        // Everything is older than no time at all, and nothing is older than an hour.
        let window = Duration::from_secs(3600 * hours);
        let options = Options { retain: Some(Duration::ZERO), window, ..Options::small(folder.path()) };
        let (events, removed) = go_on(&options, |_| (), 20).await;
        let said = events.iter().filter(|name| *name == "retention").count();
        assert_eq!((removed, said), (gone, gone), "{hours} h: {events:?}");
    }
}

#[tokio::test]
async fn retention_check_beyond_max_size_removes_one_old_segment_early() {
    let hour = Duration::from_secs(3600);
    for (max_size, after, window, gone) in [
        (0, Duration::ZERO, Duration::ZERO, 1),
        (u64::MAX, Duration::ZERO, Duration::ZERO, 0),
        (0, hour, Duration::ZERO, 0),
        (0, Duration::ZERO, hour, 0),
    ] {
        for retain in [None, Some(hour)] {
            let folder = TempDir::new().unwrap();
            let early = Some(Early { max_size, after });
            let options = Options { retain, early, window, ..Options::small(folder.path()) };
            let (events, removed) = go_on(&options, |_| (), 20).await;
            let said = events.iter().filter(|name| *name == "retention").count();
            assert_eq!((removed, said), (gone, gone), "{early:?} {window:?} {retain:?}: {events:?}");
        }
    }
}

#[tokio::test]
async fn only_removal_before_the_retention_time_is_reported_as_early() {
    let hour = Duration::from_secs(3600);
    for (retain, is_early) in [(Some(hour), true), (None, true), (Some(Duration::ZERO), false)] {
        let folder = TempDir::new().unwrap();
        // Five bytes: any trail is larger.
        let early = Some(Early { max_size: 5, after: Duration::ZERO });
        let options = Options { retain, early, ..Options::small(folder.path()) };
        let size = |folder: &TempDir| -> u64 {
            let segments = segments(folder.path()).unwrap();
            segments.iter().map(|path| fs::metadata(path).unwrap().len()).sum()
        };
        go_on(&options, |_| (), 20).await;
        let events = trail(folder.path()).into_iter();
        let [event] = &events.filter(|record| record["event"] == "retention").collect::<Vec<_>>()[..] else {
            panic!("one look")
        };
        assert_eq!(event.get("early").is_some(), is_early, "{event}");
        if is_early {
            let told = event["early"]["trail_size"].as_u64().unwrap();
            assert!(
                event["early"]["max_size"] == 5 && (5000..size(&folder) + 5000).contains(&told),
                "{event}"
            );
        }
    }
}

/// A trail of one start at a time in milliseconds since 1970, with these members.
fn started(time: i64, members: &str) -> TempDir {
    let time = age::text(time);
    let time = time.parse::<jiff::Timestamp>().unwrap();
    let head = format!(r#"{{"seq":1,"time":"{time:.6}","kind":"event","event":"start"{members}"#);
    let mut line = [head.as_bytes(), chain::OPEN_LINKS].concat();
    let folder = directory(&[], &[7; 32]);
    let keys = Keys::load(&chain::key_path(folder.path())).unwrap();
    keys.seal(&mut line, &chain::Link::new(Hash::default()));
    fs::write(chain::segment_path(folder.path(), 1), line).unwrap();
    folder
}

// The earlier run began at a time of its own wall clock, and by the boot time just now or three hours ago. Only the
// boot time may count.
#[test]
fn wall_clock_never_removes_an_unresolved_call() {
    let hour = 3_600_000;
    for (time, booted, is_kept) in [(0, 0, true), (2, 0, true), (48, 0, true), (-48, 3, false), (0, 3, false)]
    {
        let time = clocks::now() - time * hour;
        let (boot, boottime) = (clock::boot_id().unwrap(), clocks::boottime() - booted * hour);
        let members = format!(r#","boot_id":"{boot}","boottime":{boottime},"elapsed":7,"exact_from":7"#);
        let folder = started(time, &members);
        let options = Options { segment_size: 1, ..Options::small(folder.path()) };
        let Recovered { writer, begun, .. } = recover_trail(&options);
        writer.clocks.set_anchors(verify(folder.path()).anchors);
        let call = UnresolvedCall {
            seq: Some(1),
            time: age::text(time),
            state: CallState::Undelivered,
            ..UnresolvedCall::of(uuid::Uuid::from_u128(5))
        };
        let shared = Shared::new(&options, metrics(), begun, UnresolvedList::default());
        shared.unresolved().insert(call);
        shared.event("test", json!({}));
        shared.close();
        assert_eq!(writer.run(&shared), Ok(()));
        assert_eq!(shared.unresolved().calls().count(), usize::from(is_kept), "{time} {booted}");
    }
}

#[tokio::test]
async fn operator_accepts_a_doubtful_clock_at_run_time() {
    let hour = 3_600_000;
    for (age, doubt) in [(0, None), (2 * hour, Some(ClockDoubt::Old)), (-2 * hour, Some(ClockDoubt::Future))]
    {
        let folder = started(clocks::now() - age, "");
        let options = Options { window: Duration::from_secs(3600), ..Options::small(folder.path()) };
        let audit = start(&options);
        let told = |audit: &Audit| (audit.clock_doubt(), audit.shared().metrics.doubtful.get());
        assert_eq!(told(&audit), (doubt, doubt.is_some().into()));
        // A further look must neither end the doubt nor report it again.
        audit.check_clock();
        audit.accept_clock(Map::from_iter([("by".to_owned(), json!("an operator"))]));
        assert_eq!(told(&audit), (None, 0));
        audit.close();
        assert_whole(folder.path());
        let mut events = trail(folder.path());
        events.retain(|event| event["event"].as_str().unwrap().starts_with("clock"));
        let names: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
        let expected = ["clock_doubtful", "clock_accepted"];
        assert_eq!(names, expected[usize::from(doubt.is_none())..]);
        let accepted = events.last().unwrap();
        assert!(accepted["by"] == "an operator" && accepted["accepted"]["wall"].is_string(), "{accepted}");
        drop(audit);
        assert_eq!(told(&start(&options)), (None, 0), "of the same boot");
    }
}

#[tokio::test]
async fn clock_anchor_is_written_every_hour_and_in_every_segment() {
    // Minutes since the last anchor, the size of segments, and how many anchors come.
    for (minutes, segment_size, count) in
        [(0, 1 << 30, 0), (59, 1 << 30, 0), (60, 1 << 30, 1), (120, 1 << 30, 1), (0, 1, 0), (1, 1, 1)]
    {
        let folder = TempDir::new().unwrap();
        let options = Options { segment_size, ..Options::small(folder.path()) };
        let (events, _) = go_on(&options, |writer| writer.anchored -= minutes * 60_000, 5).await;
        let clocks = events.iter().filter(|name| *name == "clock").count();
        assert_eq!(clocks, count, "{minutes} min: {events:?}");
        let anchors = trail(folder.path()).into_iter().filter(|record| record["elapsed"].is_number());
        let anchors: Vec<_> = anchors.collect();
        assert_eq!(anchors.len(), 2 + count, "{anchors:?}");
        for pair in anchors.windows(2) {
            let passed = |name: &str| pair[1][name].as_i64().unwrap() - pair[0][name].as_i64().unwrap();
            assert_eq!(passed("elapsed"), passed("boottime"), "{pair:?}");
            assert_eq!((&pair[0]["format"], &pair[1]["boot_id"]), (&json!(1), &pair[0]["boot_id"]));
        }
    }
}

#[tokio::test]
async fn last_anchor_is_found_before_the_last_two_segments() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 1, ..Options::small(folder.path()) });
    for _ in 0..5 {
        intended(&audit).await.sent().finish(&answer());
    }
    audit.close();
    let keys = Keys::load(&chain::key_path(folder.path())).unwrap();
    let found = recovery::read_end(folder.path(), &keys, &Statement::Nothing).unwrap();
    assert_eq!(found.anchors, verify(folder.path()).anchors);
    assert!(segments(folder.path()).unwrap().len() > 3 && found.anchors.len() == 1);
}

#[tokio::test]
async fn changed_time_in_the_last_record_does_not_move_the_trail_time() {
    let (text, key) = sample().await;
    let text = String::from_utf8(text).unwrap();
    let (before, last) = text.split_at(text.trim_end().rfind('\n').unwrap() + 1);
    let later = last.replacen("\"time\":\"20", "\"time\":\"21", 1);
    assert_ne!(later, last);
    for (last, is_changed) in [(last, false), (&*later, true)] {
        let folder = directory(format!("{before}{last}").as_bytes(), &key);
        assert_eq!(verify(folder.path()).faults.is_empty(), !is_changed);
        start(&Options::small(folder.path())).close();
        let mut records = trail(folder.path());
        records.retain(|record| record["event"] == "start");
        let elapsed = records.pop().unwrap()["elapsed"].as_i64().unwrap();
        assert!((0..3_600_000).contains(&elapsed), "{is_changed}: {elapsed}");
    }
}

// A line that was changed still states a hash, and the chain goes on from it. So a copy of an earlier record can be
// made to fit behind it.
#[tokio::test]
async fn copied_record_is_ignored_and_no_sequence_number_is_reused() {
    let folder = directory(&[], &[7; 32]);
    let keys = Keys::load(&chain::key_path(folder.path())).unwrap();
    let doubt = uuid::Uuid::from_u128(5);
    let (mut text, mut link) = (Vec::new(), chain::Link::new(Hash::default()));
    for (seq, members) in (1..).zip([
        r#""kind":"event","event":"start""#.to_owned(),
        r#""kind":"event","event":"unresolved","unresolved":[]"#.to_owned(),
        format!(r#""kind":"intent","id":"{doubt}","caller":"qa-console""#),
        format!(r#""kind":"outcome","id":"{doubt}","outcome":"unknown""#),
    ]) {
        let head = format!(r#"{{"seq":{seq},"time":"2026-11-28T10:00:00.000000Z",{members}"#);
        let mut line = [head.as_bytes(), chain::OPEN_LINKS].concat();
        link = keys.seal(&mut line, &link);
        text.extend(line);
    }
    let first = lines_of(&text)[0].to_vec();
    let stated = hex(&chain::stated(first.strip_suffix(b"\n").unwrap()).unwrap());
    let changed = format!("{{\"seq\":5,\"hash\":\"{stated}\"}}\n");
    let copied = [&text, changed.as_bytes(), lines_of(&text)[1]].concat();
    for (text, is_whole) in [(text, true), (copied, false)] {
        fs::write(chain::segment_path(folder.path(), 1), text).unwrap();
        let found = verify(folder.path());
        assert_eq!(found.faults.is_empty(), is_whole);
        assert_eq!(found.unresolved.unknown().map(|call| call.id).collect::<Vec<_>>(), [doubt]);
        assert_eq!(loss::find(folder.path(), &keys).unwrap().is_none(), is_whole);
    }
    start(&Options::small(folder.path())).close();
    let newest = segments(folder.path()).unwrap().pop().unwrap();
    assert!(chain::first_seq(&newest) > 5, "{newest:?}");
}

#[tokio::test]
async fn permits_are_not_required_while_the_writer_falls_behind() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    intended(&audit).await.sent().finish(&answer());
    wait_for(|| (trail(folder.path()).len() == 3).then_some(()));
    // As if its last batch had taken no time: on a busy machine it may count as behind.
    audit.shared().finished(u64::MAX);
    let crowd = || (0..40).map(|_| Box::pin(audit.permit()) as Pin<Box<dyn Future<Output = _>>>).collect();
    let (mut first, mut next): (Vec<_>, Vec<_>) = (crowd(), crowd());
    let mut held = done(&mut first);
    assert_eq!((held.len(), done(&mut next).len()), (32, 0), "the control");

    // A batch that is not done in time.
    audit.shared().begin(0);
    wait_for(|| (!audit.shared().is_keeping_up()).then_some(()));
    assert_eq!(done(&mut crowd()).len(), 40);
    held.truncate(30);
    // They get the permits one after the other, since none keeps its permit.
    let handed_on = done(&mut first);
    assert_eq!(handed_on.len(), 8);
    assert_eq!(done(&mut next).len(), 40);
}

#[tokio::test]
async fn permit_wait_counts_toward_the_intent_deadline() {
    let folder = TempDir::new().unwrap();
    let deadline = Duration::from_secs(60);
    let options = Options { segment_size: 1, intent_deadline: deadline, ..Options::small(folder.path()) };
    let audit = start(&options);
    intended(&audit).await.sent().finish(&answer());
    wait_for(|| (trail(folder.path()).len() == 3).then_some(()));
    let stuck = Stuck::new(&audit);
    let mut late = record(&audit);
    let permit = Permit { _held: None, waited: clock::nanos_of(deadline) };
    let intent = late.intent(&permit, 2, &[0; 32], &|_| ()).unwrap();
    let refused = tokio::time::timeout(deadline / 3, intent).await;
    assert_eq!(refused.unwrap().err(), Some(Unavailable));
    stuck.release();
}

// With permits the crowd could be refused 16 at a time, each group after a whole deadline. What a request waits for
// its permit must count.
#[tokio::test]
async fn many_intents_are_rejected_in_time_on_a_stuck_disk() {
    let folder = TempDir::new().unwrap();
    let deadline = Duration::from_millis(250);
    let small = Options::small(folder.path());
    let audit = start(&Options { segment_size: 1, queue: 4096, intent_deadline: deadline, ..small });
    intended(&audit).await.sent().finish(&answer());
    wait_for(|| (trail(folder.path()).len() == 3).then_some(()));
    let stuck = Stuck::new(&audit);
    let begun = Instant::now();
    let crowd: Vec<_> = (0..400)
        .map(|_| {
            let audit = audit.clone();
            tokio::spawn(async move {
                let mut record = record(&audit);
                record.intent(&audit.permit().await, 2, &[0; 32], &|_| ())?.await.map(drop)
            })
        })
        .collect();
    for refused in crowd {
        assert_eq!(refused.await.unwrap(), Err(Unavailable));
    }
    assert!((deadline..deadline * 4).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    stuck.release();
}

// A worker wakes the writer before it sleeps, and this one never does.
#[tokio::test]
async fn busy_worker_still_gets_its_intents_written() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { queue: 4096, ..Options::small(folder.path()) });
    Audit::defer_wake_ups();
    // One each millisecond: a quick machine was done with twenty at once before the turn counted as a long one.
    let mut records: Vec<_> = (0..1000).map(|_| record(&audit)).collect();
    let (mut next, mut intents) = (records.iter_mut(), Vec::new());
    wait_for(|| {
        intents.extend(next.next().map(|record| queued(record, "")));
        trail(folder.path()).iter().any(|record| record["kind"] == "intent").then_some(())
    });
}

#[tokio::test]
async fn busy_worker_with_a_full_queue_wakes_the_writer() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    Audit::defer_wake_ups();
    // On a machine that is busy for longer than a turn may last, the writer is woken before the queue is full.
    let mut waiting = Vec::new();
    while let Ok(intent) = queued(&mut record(&audit), "") {
        assert!(waiting.len() < 100_000, "it is never full");
        waiting.push(intent);
    }
    assert!(waiting.len() > 1, "the control: one found room");
    wait_for(|| trail(folder.path()).iter().any(|record| record["kind"] == "intent").then_some(()));
}

#[tokio::test]
async fn stuck_disk_does_not_fill_the_memory() {
    const MEMBERS: usize = 4 << 20;
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 1, queue: 1024, ..Options::small(folder.path()) });
    intended(&audit).await.sent().finish(&answer());
    wait_for(|| (trail(folder.path()).len() == 3).then_some(()));
    let stuck = Stuck::new(&audit);
    let members = format!(",\"inspectors\":\"{}\"", "1".repeat(MEMBERS));
    let mut records: Vec<_> = (0..64).map(|_| record(&audit)).collect();
    let intents: Vec<_> = records.iter_mut().filter_map(|record| waiting(record, &members)).collect();
    let queued = intents.len();
    // The bound in bytes must be met before the bound of 1024 records.
    let full = queue::MAX_QUEUED / MEMBERS;
    // The writer may have taken as much again before it got stuck.
    assert!((full..=2 * full + 2).contains(&queued), "{queued}");
    stuck.release();
    drop((records, intents));
    let again = async {
        while refused(record(&audit)).await.is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), again).await.unwrap();
}

// A batch of more than 4 MiB is written in parts, and only its last part begins the segment. The list there must have
// the calls of the first parts.
#[tokio::test]
async fn calls_with_intents_before_a_new_segment_are_carried_over() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 1, queue: 64, ..Options::small(folder.path()) });
    let stuck = Stuck::new(&audit);
    audit.event("first", Map::new());
    wait_for(|| audit.shared().is_empty().then_some(()));
    let members = format!(",\"inspectors\":\"{}\"", "1".repeat(1 << 20));
    let mut records: Vec<_> = (0..10).map(|_| record(&audit)).collect();
    let intents: Vec<_> = records.iter_mut().map(|record| waiting(record, &members).unwrap()).collect();
    stuck.release();
    wait_for(|| (segments(folder.path()).unwrap().len() > 1).then_some(()));
    for intent in intents {
        drop(intent.await.unwrap().sent());
    }
    wait_for(|| (audit.shared().unresolved().calls().count() == 10).then_some(()));
    for call in audit.shared().unresolved().calls() {
        assert_eq!(call.caller.as_deref(), Some("qa-console"));
    }
}

#[tokio::test]
async fn oversized_list_or_record_is_omitted_without_losing_others() {
    const LIMIT: u64 = 24 << 20;
    // In a process of its own: the limit would hold for the files of all tests that run beside this one.
    if limit::of_files() > LIMIT {
        let line = format!("trap '' XFSZ; exec prlimit --fsize={LIMIT}: \"$0\" --exact \"$1\"");
        let name = thread::current().name().unwrap().to_owned();
        let run = Command::new("sh").args(["-c", &line]).arg(env::current_exe().unwrap()).arg(name).output();
        let run = run.unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
        assert!(String::from_utf8_lossy(&run.stdout).contains("1 passed"));
        return;
    }
    let long = format!("\"{}\"", "1".repeat(1 << 20));
    // On the list such a number is written out as 1000000000000000.0, so that the list is longer than the intents.
    let numbers = format!("[{}1]", "1e15,".repeat(200_000));
    for (task, count, is_left_out) in [(&long, 6, false), (&long, 40, true), (&numbers, 6, true)] {
        let folder = TempDir::new().unwrap();
        let audit = start(&Options { segment_size: 1, queue: 256, ..Options::small(folder.path()) });
        let stuck = Stuck::new(&audit);
        audit.event("first", Map::new());
        wait_for(|| audit.shared().is_empty().then_some(()));
        let members = format!(",\"task\":{task}");
        let mut records: Vec<_> = (0..count).map(|_| record(&audit)).collect();
        let intents: Vec<_> = records.iter_mut().map(|record| waiting(record, &members).unwrap()).collect();
        stuck.release();
        wait_for(|| audit.shared().is_empty().then_some(()));
        for intent in intents {
            intent.await.unwrap().finish(&answer());
        }
        // Before the close, which waits for three seconds only.
        wait_for(|| audit.shared().is_empty().then_some(()));
        assert_eq!(audit.close(), None, "{count}");
        let all = trail(folder.path());
        assert_eq!(all.iter().filter(|it| it["kind"] == "outcome").count(), count);
        let left_out = all.iter().find(|it| it["event"] == unresolved_calls::LIST_LEFT_OUT);
        assert_eq!(left_out.is_some(), is_left_out, "{count}");
        assert!(left_out.is_none_or(|it| it["calls"] == count), "{left_out:?}");
        assert_whole(folder.path());
    }

    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    for (length, is_recorded) in [(5 << 20, true), (25 << 20, false), (5 << 20, true)] {
        let member = format!(",\"task\":\"{}\"", "1".repeat(length));
        let intent = queued(&mut record(&audit), &member);
        assert_eq!(intent.is_ok(), is_recorded, "{length}");
        if let Ok(intent) = intent {
            intent.await.unwrap().sent().finish(&answer());
        }
    }
    assert_eq!(audit.close(), None);
    assert_whole(folder.path());
}

#[tokio::test]
async fn late_intent_on_a_stuck_disk_is_rejected_as_not_sent() {
    let folder = TempDir::new().unwrap();
    let deadline = Duration::from_millis(250);
    let options = Options { segment_size: 1, intent_deadline: deadline, ..Options::small(folder.path()) };
    let audit = start(&options);
    intended(&audit).await.sent().finish(&answer());
    let control = wait_for(|| (trail(folder.path()).len() == 3).then(|| trail(folder.path())[1].clone()));
    let stuck = Stuck::new(&audit);

    let late = record(&audit);
    let mut left = record(&audit);
    let ids = [&late, &left].map(|record| json!({ "id": record.id().to_string() }));
    let begun = Instant::now();
    assert_eq!(refused(late).await, Some(Unavailable));
    assert!((deadline..deadline * 4).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    drop(waiting(&mut left, "").unwrap());
    let begun = Instant::now();
    (0..1000).for_each(|_| refuse(&audit));
    assert!(begun.elapsed() < Duration::from_secs(1), "no request waits for the disk but an intent");

    stuck.release();
    audit.close();
    assert_whole(folder.path());
    assert_eq!(outcomes_of(folder.path(), &control)[0]["outcome"], "succeeded");
    for (id, code) in ids.iter().zip(["audit_unavailable", "caller_left"]) {
        let outcomes = outcomes_of(folder.path(), id);
        assert_eq!(outcomes.len(), 1, "{outcomes:?}");
        assert_eq!((&outcomes[0]["outcome"], &outcomes[0]["code"]), (&json!("not_sent"), &json!(code)));
    }
    assert_eq!(audit.shared().metrics.late.get(), 1);
}

#[tokio::test]
async fn full_queue_rejects_intents_keeps_outcomes_and_counts_refusals() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { segment_size: 1, queue: 16, ..Options::small(folder.path()) });
    let in_flight = vec![intended(&audit).await.sent(), intended(&audit).await.sent()];
    // The segment of the second intent has the list in its first batch, since the first call is at work.
    wait_for(|| (trail(folder.path()).len() == 4).then_some(()));
    let stuck = Stuck::new(&audit);

    let mut ids: Vec<_> = in_flight.iter().map(IntendedRecord::id).collect();
    let mut intents = Vec::new();
    loop {
        let mut record = record(&audit);
        let Some(intent) = waiting(&mut record, "") else { break };
        ids.push(record.id());
        intents.push(intent);
    }
    assert!((5..=16).contains(&intents.len()), "{}", intents.len());
    for _ in 0..100 {
        refuse(&audit);
    }
    assert_eq!(audit.shared().metrics.dropped.get(), 101, "the one that found no room, and the others");
    in_flight.into_iter().for_each(|record| drop(record.finish(&answer())));
    drop(intents);

    stuck.release();
    audit.close();
    assert_whole(folder.path());
    for (place, id) in ids.iter().enumerate() {
        let outcomes = outcomes_of(folder.path(), &json!({ "id": id.to_string() }));
        assert_eq!(outcomes.len(), 1, "{outcomes:?}");
        assert_eq!(outcomes[0]["outcome"], if place < 2 { "succeeded" } else { "not_sent" });
    }
    let gap = trail(folder.path())
        .into_iter()
        .find(|record| record["event"] == "gap" && record["count"] != json!(null));
    assert_eq!(gap.unwrap()["count"], 101, "the trail says how many it lacks");
}

#[tokio::test]
async fn refusals_are_only_counted_below_the_low_water_mark() {
    // No free space is below the first mark, and any is below the second.
    for (low_water, recorded) in [(0, 3), (u64::MAX, 0)] {
        let folder = TempDir::new().unwrap();
        let audit = start(&Options { low_water, ..Options::small(folder.path()) });
        wait_for(|| (audit.shared().space_left.is_set() == (low_water == 0)).then_some(()));
        (0..3).for_each(|_| refuse(&audit));
        intended(&audit).await.sent().finish(&answer());
        audit.close();
        let all = trail(folder.path());
        let count = |kind: &str| all.iter().filter(|record| record["kind"] == kind).count();
        assert_eq!((count("refusal"), count("intent"), count("outcome")), (recorded, 1, 1));
        let gap: Vec<_> = all.iter().filter(|record| record["event"] == "gap").collect();
        assert_eq!(gap.iter().map(|gap| gap["count"].as_u64().unwrap()).sum::<u64>(), 3 - recorded as u64);
    }
}

#[test]
fn refusals_of_many_unknown_peers_are_aggregated() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options { queue: 100_000, ..Options::small(folder.path()) });
    let begun = Instant::now();
    for address in 0..2_000_u32 {
        for _ in 0..5 {
            let peer = Peer::Tcp((std::net::Ipv4Addr::from(0x7f00_0000 + address), 5000).into());
            audit.open(peer).refuse(Code::HostUnknown, None);
        }
    }
    audit.close();
    let all = trail(folder.path());
    let refusals: Vec<_> = all.iter().filter(|record| record["kind"] == "refusal").collect();
    let count = |record: &&Value| record["count"].as_u64().unwrap_or(1);
    assert_eq!(refusals.iter().map(count).sum::<u64>(), 10_000);
    // Each second: ten addresses with five refusals each, ten refusals of the others one by one, and one count for
    // the rest.
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap() + 1;
    let several = refusals.iter().filter(|record| record["peers"] == "several").count();
    assert!(refusals.len() <= 61 * seconds && (1..=seconds).contains(&several), "{}", refusals.len());
}

// An hour lasts two seconds here.
#[test]
fn callers_and_unknown_peers_have_separate_hourly_refusal_budgets() {
    let folder = TempDir::new().unwrap();
    let refusals = RefusalBudget { strangers: 8_000, callers: 5_000 };
    let hour = Duration::from_secs(2);
    let audit = start(&Options { queue: 100_000, refusals, hour, ..Options::small(folder.path()) });
    let (begun, mut sent) = (Instant::now(), [0_u64; 2]);
    let mut address = 0;
    while begun.elapsed() < Duration::from_secs(9) {
        for _ in 0..50 {
            address += 1;
            let peer = Peer::Tcp((std::net::Ipv4Addr::from(0x0a00_0000 + address), 5000).into());
            audit.open(peer).refuse(Code::HostUnknown, None);
            audit.open(peer).refuse(Code::CallerDenied, None);
            sent[0] += 2;
        }
        for code in [Code::RouteUnknown, Code::RateLimited] {
            record(&audit).refuse(code, None);
            sent[1] += 1;
        }
        // A flood that goes on for several hours.
        thread::sleep(Duration::from_millis(20));
    }
    let hours = begun.elapsed().as_secs() / 2 + 1;
    audit.close();
    let refused: Vec<_> =
        trail(folder.path()).into_iter().filter(|record| record["kind"] == "refusal").collect();
    for (of, budget) in [(0, refusals.strangers), (1, refusals.callers)] {
        let of: Vec<_> =
            refused.iter().filter(|record| record.get("caller").is_some() == (of == 1)).collect();
        let counts = of.iter().map(|record| record["count"].as_u64().unwrap_or(1)).sum::<u64>();
        assert_eq!(counts, sent[usize::from(of[0].get("caller").is_some())], "each is counted");
        let bytes = of.iter().map(|record| record.to_string().len() as u64).sum::<u64>();
        // The last refusal within the budget may go beyond it. Then come the first one and one count for each code.
        assert!(bytes < (budget + 5 * 700) * hours, "{bytes} in {hours} hours");
        assert!(bytes > budget * (hours - 1) / 2, "what the budget allows is recorded: {bytes}");
    }
    let several = refused.iter().filter(|record| record["peers"] == "several");
    assert!(several.count() as u64 >= hours, "what is counted becomes a record each hour");
}

#[test]
fn unusable_trail_fails_the_start_with_its_reason() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    let error = |options: &Options| Audit::start(options, metrics()).unwrap_err();
    assert!(
        matches!(error(&Options::small(folder.path())), OpenError::Locked(path) if path == folder.path())
    );
    audit.close();
    // The control: the lock is released with its holder.
    start(&Options::small(folder.path())).close();

    let file = folder.path().join("lock").join("audit");
    let message = error(&Options::small(&file)).to_string();
    assert!(message.contains("lock/audit") && message.contains("Not a directory"), "{message}");

    let short = folder.path().join("short");
    fs::write(&short, "x").unwrap();
    let message = error(&Options { key_file: Some(short), ..Options::small(folder.path()) }).to_string();
    assert!(message.contains("at least 32 bytes"), "{message}");
}

#[tokio::test]
async fn audit_files_are_private_to_the_gateway_user() {
    use std::os::unix::fs::PermissionsExt;
    let folder = TempDir::new().unwrap();
    let directory = folder.path().join("made/here");
    let audit = start(&Options::small(&directory));
    intended(&audit).await.sent().finish(&answer());
    audit.close();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    let files: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    // The segment, the key and the lock file.
    assert_eq!(files.len(), 3, "{files:?}");
    assert!(files.iter().all(|file| mode(file) == 0o600), "{files:?}");
}

#[tokio::test]
async fn record_names_caller_task_and_outcome_and_ends_with_its_hashes() {
    let folder = TempDir::new().unwrap();
    let audit = start(&Options::small(folder.path()));
    intended(&audit).await.sent().finish(&answer());
    audit.close();
    let all = trail(folder.path());
    for (previous, record) in all.iter().zip(&all[1..]) {
        let names: Vec<_> = record.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names[..3], ["seq", "time", "kind"]);
        assert_eq!(names[names.len() - 2..], ["prev", "hash"]);
        assert_eq!(record["prev"], previous["hash"]);
        assert_eq!(record["seq"].as_u64().unwrap(), previous["seq"].as_u64().unwrap() + 1);
        assert_eq!(record["time"].as_str().unwrap().len(), "2026-01-01T00:00:00.000000Z".len());
    }
    let (intent, outcome) = (&all[1], &all[2]);
    assert_eq!((&intent["task"], &intent["body_size"]), (&json!(7), &json!(2)));
    assert_eq!(intent["digest"].as_str().unwrap().len(), 64);
    assert_eq!((&intent["caller"], &intent["peer"]), (&json!("qa-console"), &json!("127.0.0.1:5000")));
    assert_eq!(outcome["token_generation"], 3);
    let stages: Vec<_> = outcome["ms"].as_object().unwrap().keys().map(String::as_str).collect();
    let known: Vec<_> = Stage::ALL.map(Stage::as_str).into_iter().filter(|s| stages.contains(s)).collect();
    assert!(stages.contains(&"audit") && stages == known, "those that took time, in their order: {stages:?}");
}

fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "it did not come");
        thread::sleep(Duration::from_millis(1));
    }
}
