//! Parts of the trail that are lost: no key of the window counts as new until an operator accepts that.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead, Sandbox};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{idempotency::until_keys_are_known, support::*};

fn key(number: usize) -> String {
    format!("idempotency-key: k{number}\r\n")
}

fn segments(directory: &Path) -> Vec<PathBuf> {
    let mut segments: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    segments.sort();
    segments
}

fn setup(folder: &Arc<TempDir>) -> Setup {
    Setup { folder: Some(folder.clone()), ..Setup::default() }.set("audit.segment_size", "64KiB")
}

const KEYS: usize = 200;

/// A trail of several segments with that many keys, stopped in order or killed.
fn trail(sandbox: &Sandbox, stops: bool) -> Arc<TempDir> {
    let folder = Arc::new(TempDir::new().unwrap());
    let mut gateway = start_with(sandbox, setup(&folder));
    until_keys_are_known(&gateway);
    for number in 0..KEYS {
        assert_eq!(gateway.post_with(&key(number)).outcome(), "succeeded");
    }
    // The lock file names a record that is a second old.
    let newest = segments(&gateway.audit_directory()).pop().unwrap();
    let name =
        newest.file_stem().unwrap().to_str().unwrap().trim_start_matches("audit-").trim_start_matches('0');
    wait_for("the lock file", || {
        fs::read_to_string(gateway.audit_directory().join("lock")).unwrap().contains(name).then_some(())
    });
    if stops {
        gateway.signal("-TERM");
        assert!(gateway.wait().success());
    } else {
        gateway.kill();
    }
    assert!(segments(&folder.path().join("audit")).len() >= 4);
    folder
}

/// What becomes of each key: sent again, refused, or replayed.
fn repeat(gateway: &Gateway) -> [usize; 3] {
    let mut counts = [0; 3];
    for number in 0..KEYS {
        let reply = gateway.post_with(&key(number));
        let what = match (reply.status, reply.outcome(), reply.code()) {
            (200, "succeeded", _) => 0,
            (503, "not_sent", "idempotency_unavailable") => 1,
            (200, "replayed", _) | (409, _, "outcome_unknown") => 2,
            _ => panic!("{reply:?}"),
        };
        counts[what] += 1;
    }
    counts
}

/// Accepts the loss by the command, or by its word at the start. Returns the gateway that was started then.
fn accept(sandbox: &Sandbox, folder: &Arc<TempDir>, by_command: bool, word: &str) -> Gateway {
    let mut accepting = setup(folder);
    if by_command {
        let audit = folder.path().join("audit");
        let (code, said, error) = command(&["audit", "accept-loss", audit.to_str().unwrap()]);
        assert_eq!(code, 0, "{said}{error}");
    } else {
        accepting.flags = vec![format!("--accept-loss={word}")];
    }
    let gateway = start_with(sandbox, accepting);
    until_keys_are_known(&gateway);
    gateway
}

fn word(gateway: &Gateway) -> String {
    gateway.admin("/status").json()["idempotency"]["loss"]["word"].as_str().unwrap().to_owned()
}

fn is_accepted(folder: &TempDir) -> bool {
    records(&folder.path().join("audit"), "event").iter().any(|event| event["event"] == "loss_accepted")
}

type Harm = fn(&[PathBuf]);

const HARMS: [(&str, bool, Harm); 7] = [
    ("oldest removed", true, |segments| fs::remove_file(&segments[0]).unwrap()),
    ("middle removed", true, |segments| fs::remove_file(&segments[1]).unwrap()),
    ("middle compressed", true, |segments| {
        assert!(Command::new("gzip").arg(&segments[1]).status().unwrap().success());
    }),
    ("middle cut", true, |segments| {
        let text = fs::read(&segments[1]).unwrap();
        let end = text[..text.len() / 2].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
        fs::write(&segments[1], &text[..end]).unwrap();
    }),
    ("a byte flipped", true, |segments| flip(&segments[1])),
    ("newest removed after a stop", true, |segments| fs::remove_file(segments.last().unwrap()).unwrap()),
    ("newest removed after a kill", false, |segments| fs::remove_file(segments.last().unwrap()).unwrap()),
];

#[test]
fn keys_missing_after_a_loss_are_rejected_until_it_is_accepted() {
    for (harm, stops, make) in HARMS {
        for by_command in [true, false] {
            let sandbox = sandbox();
            let folder = trail(&sandbox, stops);
            let audit = folder.path().join("audit");
            make(&segments(&audit));

            // The same after another restart.
            for _ in 0..2 {
                let before = sandbox.requests().len();
                let gateway = start_with(&sandbox, setup(&folder));
                until_keys_are_known(&gateway);
                let [sent, refused, replayed] = repeat(&gateway);
                assert!(sent == 0 && refused > 0 && replayed > 0, "{harm}: {sent} {refused} {replayed}");
                assert_eq!(gateway.post_with("idempotency-key: new\r\n").status, 503, "{harm}");
                let ready = gateway.admin("/readyz");
                assert_eq!(ready.status, 200, "{harm}");
                assert!(ready.body.contains("a part of the audit trail is lost"), "{harm}: {}", ready.body);
                assert!(gateway.admin("/metrics").body.contains("ccsqm_gateway_audit_damaged 1"), "{harm}");
                assert!(gateway.log().contains("a part of the audit trail is lost"), "{harm}");
                assert_eq!(sandbox.requests().len(), before, "{harm}");
                assert_eq!(gateway.call().outcome(), "succeeded", "{harm}: without a key it is served");
                gateway.kill();
            }
            let gateway = start_with(&sandbox, setup(&folder));
            until_keys_are_known(&gateway);
            let word = word(&gateway);
            gateway.kill();
            assert!(!is_accepted(&folder), "{harm}");
            let gateway = accept(&sandbox, &folder, by_command, &word);
            wait_for("the record", || is_accepted(&folder).then_some(()));
            let [sent, refused, replayed] = repeat(&gateway);
            assert!(sent > 0 && refused == 0 && replayed > 0, "{harm}: {sent} {refused} {replayed}");
            let gateway = start_with(&sandbox, Setup { folder: Some(gateway.kill()), ..setup(&folder) });
            until_keys_are_known(&gateway);
            assert_eq!(repeat(&gateway), [0, 0, KEYS], "{harm}: accepted once and for all");
        }
    }
}

/// Flips a byte of the mark of a key.
fn flip(segment: &Path) {
    let mut text = fs::read(segment).unwrap();
    let place = text.windows(7).position(|part| part == b"\"key\":\"").unwrap() + 8;
    text[place] = if text[place] == b'0' { b'1' } else { b'0' };
    fs::write(segment, text).unwrap();
}

#[test]
fn acceptance_does_not_cover_later_damage() {
    for by_command in [true, false] {
        let sandbox = sandbox();
        let folder = trail(&sandbox, true);
        let audit = folder.path().join("audit");
        // Two at once, then another one before the record of the acceptance, then the same line once more.
        let harms: [&dyn Fn(); 3] = [
            &|| {
                flip(&segments(&audit)[1]);
                fs::remove_file(&segments(&audit)[2]).unwrap();
            },
            &|| flip(&segments(&audit)[0]),
            &|| {
                let path = &segments(&audit)[0];
                let text = fs::read_to_string(path).unwrap().replacen("\"key\":\"", "\"kex\":\"", 1);
                fs::write(path, text).unwrap();
            },
        ];
        let mut words = Vec::new();
        for (number, harm) in (0..).zip(harms) {
            harm();
            let stale = words.iter().map(|word| format!("--accept-loss={word}")).next_back();
            let refusing = Setup { flags: stale.into_iter().collect(), ..setup(&folder) };
            let gateway = start_with(&sandbox, refusing);
            until_keys_are_known(&gateway);
            assert_eq!(gateway.post_with("idempotency-key: another\r\n").status, 503, "{number}");
            words.push(word(&gateway));
            gateway.kill();

            let gateway = accept(&sandbox, &folder, by_command, words.last().unwrap());
            let key = format!("idempotency-key: behind-{number}\r\n");
            assert_eq!(gateway.post_with(&key).outcome(), "succeeded", "{number}");
            let gateway = start_with(&sandbox, Setup { folder: Some(gateway.kill()), ..setup(&folder) });
            until_keys_are_known(&gateway);
            assert_eq!(gateway.post_with(&key).outcome(), "replayed", "{number}: accepted once and for all");
            gateway.kill();
        }
        words.dedup();
        assert_eq!(words.len(), 3, "{words:?}");
    }
}

/// Replaces a text in a line from the middle of a segment.
fn replace_in_the_middle(segment: &Path, text: &str, by: &[u8]) {
    let whole = fs::read(segment).unwrap();
    let middle = whole.len() / 2;
    let is_text = |part: &[u8]| part == text.as_bytes();
    let place = middle + whole[middle..].windows(text.len()).position(is_text).unwrap();
    fs::write(segment, [&whole[..place], by, &whole[place + text.len()..]].concat()).unwrap();
}

#[test]
fn accept_loss_command_accepts_the_damage_that_a_start_finds() {
    for (text, by) in [
        ("\"id\":\"0", b"\"id\":\"p".as_slice()),
        ("\"kind\":\"intent", b"\"kinf\":\"intent"),
        ("qa-console", b"qa-\xffonsole"),
        ("\n{\"seq\":", b"\n{\"seq\":9"),
        ("\n{\"seq\":", b"\n{\"seq\":1 "),
        ("\n{\"seq\":", b"\n{\"sed\":"),
    ] {
        for place in [1, 3] {
            let said = format!("{text} by {}, {place}", String::from_utf8_lossy(by));
            let sandbox = sandbox();
            let folder = trail(&sandbox, true);
            let audit = folder.path().join("audit");
            replace_in_the_middle(&segments(&audit)[place], text, by);
            let gateway = start_with(&sandbox, setup(&folder));
            until_keys_are_known(&gateway);
            assert_eq!(gateway.post_with("idempotency-key: new\r\n").status, 503, "{said}");
            gateway.kill();
            let (code, told, error) = command(&["audit", "accept-loss", audit.to_str().unwrap()]);
            assert_eq!(code, 0, "{said}: {told}{error}");
            let gateway = start_with(&sandbox, setup(&folder));
            until_keys_are_known(&gateway);
            assert_eq!(gateway.post_with("idempotency-key: new\r\n").outcome(), "succeeded", "{said}");
            let [sent, refused, replayed] = repeat(&gateway);
            assert!(sent <= 1 && refused == 0 && replayed >= KEYS - 1, "{said}: {sent} {refused} {replayed}");
        }
    }
}

/// The lines behind the last number before the next segment are what a failed fdatasync leaves: nobody checks them.
#[test]
fn acceptance_copied_to_a_segment_end_has_no_effect() {
    let sandbox = sandbox();
    let folder = trail(&sandbox, true);
    let audit = folder.path().join("audit");
    flip(&segments(&audit)[1]);
    let copy = folder.path().join("copy");
    assert!(Command::new("cp").arg("-a").args([&audit, &copy]).status().unwrap().success());
    let (code, said, error) = command(&["audit", "accept-loss", copy.to_str().unwrap()]);
    assert_eq!(code, 0, "{said}{error}");
    let accepted = fs::read_to_string(segments(&copy).last().unwrap()).unwrap();
    let event = accepted.lines().find(|line| line.contains("loss_accepted")).unwrap();
    let closed = &segments(&audit)[0];
    let text = fs::read_to_string(closed).unwrap();
    fs::write(closed, format!("{text}{event}\n")).unwrap();
    let gateway = start_with(&sandbox, setup(&folder));
    until_keys_are_known(&gateway);
    assert_eq!(gateway.post_with("idempotency-key: new\r\n").code(), "idempotency_unavailable");
    gateway.kill();
    fs::remove_dir_all(&audit).unwrap();
    fs::rename(&copy, &audit).unwrap();
    let gateway = start_with(&sandbox, setup(&folder));
    until_keys_are_known(&gateway);
    assert_eq!(gateway.post_with("idempotency-key: new\r\n").outcome(), "succeeded", "where it was written");
}

/// Nor does a resolution there free a key, whatever its number.
#[test]
fn resolution_appended_to_a_segment_end_frees_no_key() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let mut gateway = start_with(&sandbox, setup(&folder));
    until_keys_are_known(&gateway);
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    assert_eq!(gateway.post_with(&key(0)).outcome(), "unknown");
    let audit = gateway.audit_directory();
    let mut next = 1;
    while segments(&audit).len() < 2 {
        assert_eq!(gateway.post_with(&key(next)).outcome(), "succeeded");
        next += 1;
    }
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let mut call = records(&audit, "intent")[0].clone();
    for (name, value) in [("kind", "event"), ("event", "resolution"), ("result", "not-done")] {
        call[name] = json!(value);
    }
    let first = &segments(&audit)[0];
    let text = fs::read_to_string(first).unwrap();
    for seq in [1_000_000, 3] {
        call["seq"] = json!(seq);
        fs::write(first, format!("{text}{call}\n")).unwrap();
        let gateway = start_with(&sandbox, setup(&folder));
        until_keys_are_known(&gateway);
        let reply = gateway.post_with(&key(0));
        assert_eq!(reply.code(), "outcome_unknown", "{seq}: {}", reply.text());
        gateway.kill();
    }
}

/// Nor does one at the end of the trail take a call without a key off the list, or free what equals it.
#[test]
fn resolution_outside_the_hash_chain_removes_no_unresolved_call() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let guarded = || setup(&folder).set("idempotency.without_key", "guard");
    let mut gateway = start_with(&sandbox, guarded());
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    assert_eq!(gateway.call().outcome(), "unknown");
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let audit = gateway.audit_directory();
    let mut call = records(&audit, "intent")[0].clone();
    for (name, value) in [("kind", "event"), ("event", "resolution"), ("result", "not-done")] {
        call[name] = json!(value);
    }
    call["seq"] = json!(records(&audit, "").len() + 1);
    let last = segments(&audit).pop().unwrap();
    fs::write(&last, format!("{}{call}\n", fs::read_to_string(&last).unwrap())).unwrap();
    let gateway = start_with(&sandbox, guarded());
    until_keys_are_known(&gateway);
    assert_eq!(unresolved(&audit), 1);
    let reply = gateway.call();
    assert_eq!(reply.code(), "duplicate_suspected", "{}", reply.text());
    assert_eq!(sandbox.requests().len(), 1);
}

/// How many calls are on the list.
fn unresolved(audit: &Path) -> usize {
    let (code, out, error) = command(&["audit", "unresolved", audit.to_str().unwrap(), "--json"]);
    assert!(code <= 1, "{error}");
    out.lines().filter(|line| line.contains("\"id\"")).count()
}

/// Nor does an outcome that was changed: nobody knows how the call ended. One that says that it succeeded is believed.
#[test]
fn outcome_outside_the_hash_chain_frees_nothing() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let guarded = || setup(&folder).set("idempotency.without_key", "block");
    let mut gateway = start_with(&sandbox, guarded());
    until_keys_are_known(&gateway);
    let other = BODY.replace("954645333549048833", "1");
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(2)));
    assert_eq!(gateway.post_with(&key(0)).outcome(), "unknown");
    assert_eq!(gateway.post(&other).outcome(), "unknown");
    let good = [3, 4].map(|task| BODY.replace("954645333549048833", &task.to_string()));
    let keyed = |gateway: &Gateway| gateway.send(&head(good[0].len(), &key(1)), &good[0]);
    assert_eq!(keyed(&gateway).outcome(), "succeeded");
    assert_eq!(gateway.post(&good[1]).outcome(), "succeeded");
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let last = segments(&gateway.audit_directory()).pop().unwrap();
    let text = fs::read_to_string(&last).unwrap();
    assert_eq!(text.matches("\"outcome\":\"unknown\"").count(), 2);
    let changed = text.replace("\"outcome\":\"unknown\"", "\"outcome\":\"refused\"");
    fs::write(&last, changed.replace("\"stage\":\"upstream\"", "\"stage\":\"upstrean\"")).unwrap();
    let gateway = start_with(&sandbox, guarded());
    until_keys_are_known(&gateway);
    assert_eq!(gateway.post_with(&key(0)).code(), "outcome_unknown");
    assert_eq!(gateway.post(&other).code(), "duplicate_suspected");
    assert_eq!(keyed(&gateway).outcome(), "replayed");
    assert_eq!(gateway.post(&good[1]).code(), "duplicate_suspected");
    assert_eq!(unresolved(&gateway.audit_directory()), 4);
    let sent = sandbox.requests().len();
    assert_eq!(gateway.post(&BODY.replace("954645333549048833", "2")).outcome(), "succeeded", "the control");
    assert_eq!(sandbox.requests().len(), sent + 1);
}

/// A copy whose name sorts behind all segments.
#[test]
fn segment_copy_under_another_name_is_ignored() {
    let sandbox = sandbox();
    let folder = trail(&sandbox, true);
    let audit = folder.path().join("audit");
    let all = segments(&audit);
    for (copied, name) in [(0, "audit-backup.jsonl"), (1, "audit-2026-11-28.jsonl"), (1, "audit-99.jsonl")] {
        fs::copy(&all[copied], audit.join(name)).unwrap();
    }
    let gateway = start_with(&sandbox, setup(&folder));
    until_keys_are_known(&gateway);
    assert!(!gateway.log().contains("is lost"), "{}", gateway.log());
    assert_eq!(repeat(&gateway)[0], 0);
    gateway.kill();
    assert!(all.iter().all(|path| path.exists()));
    let (code, out, _) = command(&["audit", "verify", audit.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}");
}

#[test]
fn wrong_acceptance_code_has_no_effect() {
    let sandbox = sandbox();
    let folder = trail(&sandbox, true);
    HARMS[1].2(&segments(&folder.path().join("audit")));
    let mut wrong = setup(&folder);
    wrong.flags = vec!["--accept-loss=01234567".into()];
    let gateway = start_with(&sandbox, wrong);
    until_keys_are_known(&gateway);
    assert_eq!(repeat(&gateway)[0], 0);
}

#[test]
fn missing_audit_key_fails_the_start_until_the_loss_is_accepted() {
    for by_command in [true, false] {
        let sandbox = sandbox();
        let folder = trail(&sandbox, false);
        let audit = folder.path().join("audit");
        fs::remove_file(audit.join("audit.key")).unwrap();
        let config = folder.path().join("gateway.toml");
        for verb in ["check", "serve"] {
            let (code, _, said) = command(&[verb, "--config", config.to_str().unwrap()]);
            assert_eq!(code, 78, "{verb}: {said}");
            assert!(
                said.matches("audit.key is missing").count() == 1 && said.contains("--accept-loss="),
                "{verb}: {said}"
            );
        }
        let (_, _, said) = command(&["serve", "--config", config.to_str().unwrap()]);
        let word = said.split("--accept-loss=").nth(1).unwrap()[..8].to_owned();
        let gateway = accept(&sandbox, &folder, by_command, &word);
        wait_for("the record", || is_accepted(&folder).then_some(()));
        assert_eq!(repeat(&gateway), [KEYS, 0, 0]);
        let aside =
            fs::read_dir(&audit).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(aside.into_iter().any(|name| name.starts_with("lost-")));
        let event: Value =
            records(&audit, "event").into_iter().find(|it| it["event"] == "loss_accepted").unwrap();
        assert_eq!(event["reason"], "the key was missing");
        gateway.kill();
        // The word stands for that loss, not for the next one, though the next trails have segments of equal names.
        let mut word = word;
        for _ in 0..3 {
            fs::remove_file(audit.join("audit.key")).unwrap();
            let again = format!("--accept-loss={word}");
            let (code, _, said) = command(&["serve", "--config", config.to_str().unwrap(), &again]);
            assert_eq!(code, 78, "{said}");
            assert!(said.contains("--accept-loss=") && !said.contains(&again), "{said}");
            said.split("--accept-loss=").nth(1).unwrap()[..8].clone_into(&mut word);
            accept(&sandbox, &folder, by_command, &word).kill();
            assert_eq!(segments(&audit).len(), 1);
        }
    }
}
