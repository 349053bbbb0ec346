//! Stage 8: the trail, through crashes.

use std::{collections::HashMap, fs, thread};

use serde_json::Value;

use crate::support::*;

#[test]
fn killed_in_the_middle_it_loses_no_request() {
    let sandbox = sandbox();
    let mut folder = None;
    for _ in 0..10 {
        sandbox
            .faults(serde_json::from_value(serde_json::json!({ "business": [{ "delay_ms": 40 }] })).unwrap())
            .unwrap();
        let gateway = start_with(&sandbox, Setup { folder: folder.take(), ..Setup::default() });
        assert_eq!(gateway.call().outcome(), "succeeded");
        let address = gateway.address;
        let callers: Vec<_> = (0..8)
            .map(|_| {
                thread::spawn(move || {
                    use std::io::Write;
                    while let Ok(mut stream) = std::net::TcpStream::connect(address) {
                        let _ = stream.write_all((head(BODY.len(), "") + BODY).as_bytes());
                        let _ = read_reply(&mut stream);
                    }
                })
            })
            .collect();
        gateway.records("outcome", 20);
        folder = Some(gateway.kill());
        for caller in callers {
            caller.join().unwrap();
        }
    }
    let gateway = start_with(&sandbox, Setup { folder, ..Setup::default() });
    let audit = gateway.audit_directory();
    let (code, out, _) = command(&["audit", "verify", audit.to_str().unwrap()]);
    assert_eq!(code, 0, "{out}");
    let intents = records(&audit, "intent");
    let mut outcomes = HashMap::<Value, Vec<Value>>::new();
    for record in records(&audit, "outcome") {
        outcomes.entry(record["id"].clone()).or_default().push(record);
    }
    assert!(intents.len() >= sandbox.requests().len(), "an intent for every request that was received");
    let mut in_doubt = 0;
    for intent in &intents {
        let ends = &outcomes[&intent["id"]];
        assert_eq!(ends.len(), 1, "{ends:?}");
        in_doubt += usize::from(ends[0]["outcome"] == "unknown");
    }
    assert!(in_doubt >= 10, "every round was killed in the middle of something: {in_doubt}");
}

#[test]
fn verify_names_the_line_that_was_changed() {
    let sandbox = sandbox();
    let mut gateway = start(&sandbox);
    for _ in 0..5 {
        assert_eq!(gateway.call().outcome(), "succeeded");
    }
    gateway.records("outcome", 5);
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let audit = gateway.audit_directory();
    let verify = || command(&["audit", "verify", audit.to_str().unwrap()]);
    assert_eq!(verify().0, 0, "the control");
    let segment = fs::read_dir(&audit)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "jsonl"))
        .unwrap();
    let text = fs::read(&segment).unwrap();
    for offset in (0..text.len()).step_by(97) {
        if text[offset] == b'\n' {
            continue;
        }
        let mut changed = text.clone();
        changed[offset] ^= 1;
        fs::write(&segment, &changed).unwrap();
        let line = text[..offset].iter().filter(|b| **b == b'\n').count() + 1;
        let (code, out, _) = verify();
        assert!(code == 1 && out.contains(&format!(".jsonl:{line}: ")), "{offset}: {out}");
    }
    let whole = &text[..text.len() - 1];
    let without_one = whole.split(|b| *b == b'\n').enumerate().filter(|(i, _)| *i != 2).map(|(_, line)| line);
    fs::write(&segment, [without_one.collect::<Vec<_>>().join(&b'\n'), vec![b'\n']].concat()).unwrap();
    let (code, out, _) = verify();
    assert!(code == 1 && out.contains(":3: "), "{out}");
}

#[test]
fn a_torn_last_line_is_cut_off_and_recorded() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.records("outcome", 1);
    let audit = gateway.audit_directory();
    let folder = gateway.kill();
    let segment = fs::read_dir(&audit)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "jsonl"))
        .unwrap();
    let text = fs::read(&segment).unwrap();
    fs::write(&segment, &text[..text.len() - 30]).unwrap();
    let gateway = start_with(&sandbox, Setup { folder: Some(folder), ..Setup::default() });
    let events = gateway.records("event", 3);
    assert!(events.iter().any(|event| event["event"] == "recovery" && event["what"] == "torn line cut off"));
    assert_eq!(records(&audit, "outcome").last().unwrap()["outcome"], "unknown", "its outcome was torn");
    assert_eq!(command(&["audit", "verify", audit.to_str().unwrap()]).0, 0);
}

#[test]
fn two_gateways_never_share_a_trail() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let config = gateway.folder.path().join("gateway.toml");
    let (code, _, error) = command(&["serve", "--config", config.to_str().unwrap()]);
    assert!(code == 1 && error.contains("another process writes here"), "{error}");
}
