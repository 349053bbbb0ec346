//! A small trail of format 1, made once and stored under `tests/trails`: every later version must read it.

use std::{fs, path::Path, sync::Arc};

use jiff::Timestamp;
use serde_json::Value;
use tempfile::TempDir;

use crate::{clock::Machine, support::*};

/// Copies the stored trail; returns when its last record was written.
fn stored(audit: &Path) -> Timestamp {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/trails/format-1");
    fs::create_dir(audit).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, audit.join(path.file_name().unwrap())).unwrap();
    }
    let last = records(audit, "").pop().unwrap();
    last["time"].as_str().unwrap().parse().unwrap()
}

fn body(task: u32) -> String {
    BODY.replace("954645333549048833", &task.to_string())
}

fn call(gateway: &Gateway, task: u32, key: &str) -> Reply {
    let headers = if key.is_empty() { String::new() } else { format!("idempotency-key: {key}\r\n") };
    let body = body(task);
    gateway.send(&head(body.len(), &headers), &body)
}

#[test]
fn stored_trail_of_format_1_is_read() {
    let machine = Machine { set: vec![("idempotency.without_key", "guard")], ..Machine::new(false) };
    let audit = machine.audit_directory();
    // Its keys are remembered for a day: the gateway is started a minute after the last record.
    let age = Timestamp::now().as_second() - stored(&audit).as_second();
    machine.set_clock(60 - age);
    let path = audit.to_str().unwrap();
    let (code, said, error) = command(&["audit", "verify", path]);
    assert_eq!(code, 0, "{said}{error}");
    let (code, said, _) = command(&["audit", "unresolved", path, "--json"]);
    let tasks: Vec<Value> =
        said.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["task"].clone()).collect();
    assert_eq!((code, tasks), (1, vec!["103".into(), "104".into()]));

    let gateway = machine.start();
    let success = call(&gateway, 101, "stored-success");
    assert_eq!((success.status, success.outcome()), (200, "replayed"), "{success:?}");
    assert_eq!(success.json()["resultCode"], "0409000");
    let failure = call(&gateway, 102, "stored-failure");
    assert_eq!((failure.outcome(), &*failure.headers["x-gateway-first-outcome"]), ("replayed", "failed"));
    assert_eq!(call(&gateway, 103, "stored-unknown").code(), "outcome_unknown");
    let unknown = call(&gateway, 104, "");
    assert_eq!((unknown.code(), unknown.outcome()), ("duplicate_suspected", "unknown"));
    let undelivered = call(&gateway, 106, "");
    assert_eq!((undelivered.code(), undelivered.outcome()), ("duplicate_suspected", "succeeded"));
    assert_eq!(machine.sandbox.requests().len(), 0);
    assert_eq!(call(&gateway, 107, "new").outcome(), "succeeded", "the control");
}

#[test]
fn trail_of_a_newer_format_is_rejected() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let gateway = start_with(&sandbox, Setup { folder: Some(folder.clone()), ..Setup::default() });
    let audit = gateway.audit_directory();
    gateway.kill();
    crate::clock::append_start(&audit, 2);
    let config = folder.path().join("gateway.toml");
    for arguments in [
        vec!["serve", "--config", config.to_str().unwrap()],
        vec!["audit", "verify", audit.to_str().unwrap()],
        vec!["audit", "unresolved", audit.to_str().unwrap()],
    ] {
        let (code, _, said) = command(&arguments);
        assert_eq!(code, 78, "{arguments:?}: {said}");
        assert!(
            said.contains("written by a newer version of the gateway: its format is 2, and this version reads formats up to 1"),
            "{arguments:?}: {said}"
        );
    }
}
