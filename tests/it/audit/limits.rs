//! A limit on the size of files: `ulimit -f`, `LimitFSIZE=`.

use std::{fs, io::Write, net::TcpStream, process::Command, sync::Arc};

use serde_json::{Value, json};

use super::{assert_refused, assert_resumed, faults, limit_files, outcomes, segments, verify};
use crate::support::*;

/// A segment may have so many bytes under this limit, of which a MiB is kept for outcomes.
const LIMIT: u64 = (1 << 20) + (176 << 10);

/// Under a limit on the size of files, in bytes.
fn under(limit: u64) -> Vec<String> {
    ["prlimit".to_owned(), format!("--fsize={limit}:")].into()
}

/// A body that makes a record of 12 KB.
fn long_body() -> String {
    let mut long: Value = serde_json::from_str(BODY).unwrap();
    long["setCounts"] = (0..500).map(|person| json!({ "personID": format!("{person:019}") })).collect();
    long.to_string()
}

fn is_ready(gateway: &Gateway) {
    wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
}

#[test]
fn at_the_limit_on_file_sizes_the_trail_goes_on_in_a_new_segment_also_behind_a_restart() {
    for durability in ["kernel", "disk"] {
        let (sandbox, folder) = (sandbox(), Arc::new(tempfile::TempDir::new().unwrap()));
        let start = |through| {
            let setup = Setup { through, folder: Some(folder.clone()), ..Setup::default() };
            start_with(&sandbox, setup.set("audit.durability", durability))
        };
        let (long, audit) = (long_body(), folder.path().join("audit"));
        let call_until = |gateway: &Gateway, segment_count: usize| {
            wait_for("another segment", || {
                assert_eq!(gateway.post(&long).outcome(), "succeeded", "{}", gateway.log());
                (segments(&audit).len() >= segment_count).then_some(())
            });
        };
        let mut gateway = start(under(u64::MAX >> 1));
        while fs::metadata(&segments(&audit)[0]).unwrap().len() < 196_801 {
            assert_eq!(gateway.post(&long).outcome(), "succeeded");
        }
        assert_eq!(segments(&audit).len(), 1, "the control: without a limit it fits");
        gateway.signal("-TERM");
        gateway.wait();

        gateway = start(under(LIMIT));
        is_ready(&gateway);
        call_until(&gateway, 3);
        let gateway = {
            gateway.records("outcome", sandbox.requests().len());
            gateway.kill();
            start(under(LIMIT))
        };
        call_until(&gateway, 4);
        let known = segments(&audit).len();
        // The segment that a start goes on with is beyond it.
        limit_files(&gateway, "unlimited");
        while fs::metadata(segments(&audit).pop().unwrap()).unwrap().len() < 2 * LIMIT {
            assert_eq!(gateway.post(&long).outcome(), "succeeded");
        }
        assert_eq!(segments(&audit).len(), known, "the control");
        gateway.records("outcome", sandbox.requests().len());
        gateway.kill();
        if durability == "kernel" {
            let gateway = start(under(LIMIT));
            is_ready(&gateway);
            call_until(&gateway, known + 1);
            assert_resumed(&gateway, &sandbox);
        } else {
            // What a crash left is written again there before it is believed.
            let words = under(LIMIT);
            let mut command = Command::new(&words[0]);
            command.arg(&words[1]).args([BINARY, "serve", "--set", "audit.durability=disk", "--config"]);
            let started = command.arg(folder.path().join("gateway.toml")).output().unwrap();
            let said = String::from_utf8(started.stderr).unwrap();
            assert!(started.status.code() == Some(1) && said.contains("larger than the limit"), "{said}");
        }
        let (whole, said) = verify(&audit);
        assert!(whole, "{durability}: {said}");
        let unrefused = records(&audit, "outcome").len();
        assert_eq!(unrefused, sandbox.requests().len(), "nothing is lost, and nothing was refused");
    }
}

#[test]
fn where_there_can_be_no_new_segment_what_was_sent_gets_its_outcome_and_nothing_new_is_sent() {
    for durability in ["kernel", "disk"] {
        let sandbox = sandbox();
        let setup = || Setup { through: under(LIMIT), ..Setup::default() };
        let gateway = start_with(&sandbox, setup().set("audit.durability", durability));
        assert_eq!(gateway.call().outcome(), "succeeded", "the control");
        let obstacle = gateway.audit_directory().join("segment.new"); // each is made by this name
        fs::create_dir(&obstacle).unwrap();
        faults(&sandbox, json!({ "business": [{ "times": 1, "delay_ms": 6_000 }] }));
        let mut in_flight = TcpStream::connect(gateway.address).unwrap();
        in_flight.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
        wait_for("the request", || (sandbox.requests().len() == 2).then_some(()));
        let long = long_body();
        wait_for("the limit", || {
            let reply = gateway.send_once(&head(long.len(), ""), &long);
            assert!(!gateway.has_ended(), "{}", gateway.log());
            // On a busy machine an intent may also be late.
            (reply.status == 503 && gateway.log().contains("no space can be reserved")).then_some(())
        });
        // What ends gives back what was kept for its outcome, perhaps enough for a short one.
        wait_for("refusals that last", || {
            gateway.records("outcome", sandbox.requests().len() - 1);
            (0..3).all(|_| gateway.call_once().status == 503).then_some(())
        });
        let sent = sandbox.requests().len();
        assert_refused(&gateway, &sandbox);
        assert_eq!(gateway.admin("/readyz").status, 503);
        assert_eq!(gateway.admin("/livez").status, 200);
        let reply = read_reply(&mut in_flight);
        assert_eq!(reply.outcome(), "succeeded", "{reply:?}");
        let id = &reply.headers["x-gateway-request-id"];
        wait_for("its outcome", || outcomes(&gateway.audit_directory()).contains_key(id).then_some(()));
        assert_eq!(sandbox.requests().len(), sent, "nothing new was sent");
        let log = gateway.log();
        assert!(log.contains("File too large") && log.contains("LimitFSIZE="), "{log}");
        assert_eq!(segments(&gateway.audit_directory()).len(), 1);
        fs::remove_dir(&obstacle).unwrap();
        assert_resumed(&gateway, &sandbox);
        assert_eq!(segments(&gateway.audit_directory()).len(), 2);
        let (whole, said) = verify(&gateway.audit_directory());
        assert!(whole, "{durability}: {said}");
    }
}

#[test]
fn a_limit_on_file_sizes_below_a_segment_is_told_and_one_below_any_refuses_the_start() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let config = folder.path().join("gateway.toml");
    let check = |limit: u64, set: &str| {
        let words =
            [under(limit), [BINARY, "check", "--set", set, "--config"].map(str::to_owned).into()].concat();
        let output = Command::new(&words[0]).args(&words[1..]).arg(&config).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout) + &text(output.stderr))
    };
    let default = "audit.segment_size=64MiB";
    let (code, said) = check(67 << 20, default);
    assert!(code == Some(0) && !said.contains("audit.segment_size ("), "the control: {said}");
    let (code, said) = check(66 << 20, default);
    let lower = "or set audit.segment_size to 64512KiB";
    assert!(
        code == Some(0) && said.contains("Note: a file may have 69206016 bytes") && said.contains(lower),
        "{said}"
    );
    let (code, said) = check(66 << 20, "audit.segment_size=64512KiB");
    assert!(code == Some(0) && !said.contains("audit.segment_size ("), "it is of use: {said}");
    let (code, said) = check(300 << 10, default);
    assert!(
        code == Some(78) && said.contains("a file may have 307200 bytes") && said.contains("LimitFSIZE="),
        "{said}"
    );

    let setup = |limit| Setup { through: under(limit), folder: Some(folder.clone()), ..Setup::default() };
    let gateway = start_with(&sandbox, setup(66 << 20));
    wait_for("a warning", || gateway.log().contains(lower).then_some(()));
    drop(gateway);
    let words = under(300 << 10);
    let started = Command::new(&words[0])
        .arg(&words[1])
        .args([BINARY, "serve", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let said = String::from_utf8(started.stderr).unwrap();
    assert!(started.status.code() == Some(78) && said.contains("a file may have 307200 bytes"), "{said}");
}

#[test]
fn commands_beyond_the_limit_on_file_sizes_fail_with_an_error_and_are_no_bad_configuration() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    faults(&sandbox, json!({ "business": [{ "instead": "reset", "times": 1 }] }));
    let id = gateway.call().headers["x-gateway-request-id"].clone();
    gateway.records("outcome", 1);
    let folder = gateway.kill();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (trail, new, output) = (path("audit"), path("new"), path("output"));
    let run = |limit: &str, args: &[&str]| {
        let line = format!("ulimit -f {limit}; exec \"$@\" >\"$0\"");
        let output = Command::new("sh").args(["-c", &line, &output, BINARY]).args(args).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let commands = [
        vec!["--help"],
        vec!["audit", "init", &new],
        vec!["audit", "resolve", &trail, &id, "done", "--by", "me"],
        vec!["audit", "accept-clock", &trail],
    ];
    for limit in ["0", "unlimited"] {
        for command in &commands {
            let (code, said) = run(limit, command);
            if limit == "0" {
                assert!(code == Some(1) && said.contains("File too large"), "{command:?}: {code:?} {said}");
            } else {
                assert_eq!(code, Some(0), "the control: {command:?}: {said}");
            }
        }
    }
    let (code, said) = run("unlimited", &["audit", "accept-clock", "/nowhere"]);
    assert!(code == Some(78), "a directory that is not there is one: {code:?} {said}");
}
