//! A limit on the size of files: `ulimit -f`, `LimitFSIZE=`.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    net::TcpStream,
    path::Path,
    process::Command,
    sync::{Arc, LazyLock},
};

use ccsqm_gateway::{
    audit::chain::{Link, OPEN_LINKS, key_path},
    keyed_hash::{Keys, parse_hex},
    sandbox::{Fault, Faults, Instead, Sandbox},
};
use serde_json::{Value, json};

use super::{assert_refused, assert_resumed, limit_files, outcomes, segments, text, verify};
use crate::{idempotency::until_keys_are_known, support::*};

/// What `check` calls the least limit of [`small`], in bytes.
static LEAST: LazyLock<u64> = LazyLock::new(|| {
    let folder = start_with(&sandbox(), small(Setup::default())).kill();
    let set = ["--set", "server.max_in_flight=64", "--set", "server.max_body=64KiB"];
    least(&check(&folder.path().join("gateway.toml"), 4096, &set).1)
});

/// So much of a segment is kept for outcomes, in bytes.
const KEPT: u64 = (1 << 20) + (128 << 10);

/// As the settings are for which the least limit is low.
fn small(setup: Setup) -> Setup {
    setup.set("server.max_in_flight", 64).set("server.max_body", "64KiB")
}

/// Under a limit on the size of files, in bytes.
fn under(limit: u64) -> Vec<String> {
    ["prlimit".to_owned(), format!("--fsize={limit}:")].into()
}

/// Runs a command under a limit: exit code, and what was said.
fn run(limit: u64, words: &[&str]) -> (Option<i32>, String) {
    let through = under(limit);
    let output = Command::new(&through[0]).arg(&through[1]).arg(BINARY).args(words).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout) + &text(output.stderr))
}

fn check(config: &Path, limit: u64, more: &[&str]) -> (Option<i32>, String) {
    run(limit, &[&["check", "--config", config.to_str().unwrap()], more].concat())
}

/// The least limit that a refusal names.
fn least(said: &str) -> u64 {
    let number = said.split("needs at least ").nth(1).and_then(|said| said.split(':').next());
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{said}"))
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

fn length(segment: &Path) -> u64 {
    fs::metadata(segment).unwrap().len()
}

fn newest(audit: &Path) -> u64 {
    length(&segments(audit).pop().unwrap())
}

/// Appends records to a trail that nobody writes. Of each the head up to its number and the time is made here.
pub(super) fn append(audit: &Path, members: impl IntoIterator<Item = String>) {
    let last = records(audit, "").pop().unwrap();
    let (mut seq, time) = (last["seq"].as_u64().unwrap(), text(&last["time"]));
    let keys = Keys::load(&key_path(audit)).unwrap();
    let mut link = Link::new(parse_hex(last["hash"].as_str().unwrap()).unwrap());
    let mut lines = Vec::new();
    for members in members {
        seq += 1;
        let head = format!(r#"{{"seq":{seq},"time":"{time}",{members}"#);
        let mut line = [head.as_bytes(), OPEN_LINKS].concat();
        link = keys.seal(&mut line, &link);
        lines.extend(line);
    }
    let segment = segments(audit).pop().unwrap();
    OpenOptions::new().append(true).open(segment).unwrap().write_all(&lines).unwrap();
}

/// The members of an event that is as long as this, and some more.
pub(super) fn event(length: usize) -> String {
    format!(r#""kind":"event","event":"test","text":"{}""#, "x".repeat(length))
}

/// Makes the newest segment of a trail that nobody writes as long as this, but for less than a kilobyte.
fn pad(audit: &Path, until: u64) {
    let missing = until.saturating_sub(newest(audit)) as usize;
    let most = 64 << 10;
    append(audit, (0..missing / (most + 300)).map(|_| event(most)));
    append(audit, [event((missing % (most + 300)).saturating_sub(500))]);
}

#[test]
fn trail_continues_in_a_new_segment_at_the_file_size_limit() {
    for durability in ["kernel", "disk"] {
        let (sandbox, folder) = (sandbox(), Arc::new(tempfile::TempDir::new().unwrap()));
        let limit = *LEAST;
        let start = |limit| {
            let setup = Setup { through: under(limit), folder: Some(folder.clone()), ..Setup::default() };
            start_with(&sandbox, small(setup).set("audit.durability", durability))
        };
        let (long, audit) = (long_body(), folder.path().join("audit"));
        let call =
            |gateway: &Gateway| assert_eq!(gateway.post(&long).outcome(), "succeeded", "{}", gateway.log());
        let call_until = |gateway: &Gateway, segment_count: usize| {
            wait_for("another segment", || {
                call(gateway);
                (segments(&audit).len() >= segment_count).then_some(())
            });
        };
        let kill = |gateway: Gateway| {
            gateway.records("outcome", sandbox.requests().len());
            drop(gateway.kill());
        };
        let mut gateway = start(u64::MAX >> 1);
        call(&gateway);
        gateway.signal("-TERM");
        gateway.wait();
        pad(&audit, limit - KEPT - (100 << 10));
        gateway = start(u64::MAX >> 1);
        while newest(&audit) < limit - KEPT + (20 << 10) {
            call(&gateway);
        }
        assert_eq!(segments(&audit).len(), 1, "the control: without a limit it fits");
        kill(gateway);

        gateway = start(limit);
        is_ready(&gateway);
        call_until(&gateway, 2);
        kill(gateway);
        pad(&audit, limit - KEPT - (100 << 10));
        gateway = start(limit);
        call_until(&gateway, 3);
        kill(gateway);
        // The segment that a start goes on with is beyond it.
        pad(&audit, limit + (1 << 20));
        gateway = start(u64::MAX >> 1);
        call(&gateway);
        assert_eq!(segments(&audit).len(), 3, "the control");
        kill(gateway);
        if durability == "kernel" {
            let gateway = start(limit);
            is_ready(&gateway);
            call_until(&gateway, 4);
            assert_resumed(&gateway, &sandbox);
        } else {
            // What a crash left is written again there before it is believed.
            let config = folder.path().join("gateway.toml");
            let config = config.to_str().unwrap();
            let sets = ["audit.durability=disk", "server.max_in_flight=64", "server.max_body=64KiB"];
            let words = |command| {
                [&[command, "--config", config][..], &sets.map(|set| ["--set", set]).concat()].concat()
            };
            let (code, said) = run(u64::MAX >> 1, &words("check"));
            assert_eq!(code, Some(0), "the control: {said}");
            for command in ["check", "serve"] {
                let (code, said) = run(limit, &words(command));
                assert!(code == Some(78) && said.contains("larger than the limit"), "{command}: {said}");
            }
        }
        let (whole, said) = verify(&audit);
        assert!(whole, "{durability}: {said}");
        let unrefused = records(&audit, "outcome").len();
        assert_eq!(unrefused, sandbox.requests().len(), "nothing is lost, and nothing was refused");
    }
}

/// A trail with so many calls of unknown outcome.
fn with_unknown(sandbox: &Sandbox, count: usize) -> Arc<tempfile::TempDir> {
    script(sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let gateway = start_with(sandbox, small(Setup::default()));
    until_keys_are_known(&gateway);
    assert_eq!(gateway.post_with("idempotency-key: first-of-many\r\n").outcome(), "unknown");
    gateway.records("outcome", 1);
    let (audit, folder) = (gateway.audit_directory(), gateway.kill());
    let text = fs::read_to_string(&segments(&audit)[0]).unwrap();
    let members = |kind: &str| {
        let line = text.lines().find(|line| line.contains(&format!(r#","kind":"{kind}""#))).unwrap();
        let (begin, end) = (line.find(r#""kind""#).unwrap(), line.find(r#","prev""#).unwrap());
        line[begin..end].to_owned()
    };
    let (intent, outcome) = (members("intent"), members("outcome"));
    let id = super::text(&records(&audit, "intent")[0]["id"]);
    let key = super::text(&records(&audit, "intent")[0]["key"]);
    append(
        &audit,
        (1..count).flat_map(|number| {
            let of = |members: &str| {
                let members = members.replace(&id, &format!("{}{number:012x}", &id[..id.len() - 12]));
                if key.is_empty() {
                    members
                } else {
                    members.replace(&key, &format!("{number:08x}{}", &key[8..]))
                }
            };
            [of(&intent), of(&outcome)]
        }),
    );
    folder
}

#[test]
fn long_unresolved_list_leaves_room_under_the_least_file_size_limit() {
    let (sandbox, count) = (sandbox(), 10_000);
    let folder = with_unknown(&sandbox, count);
    let (audit, limit) = (folder.path().join("audit"), *LEAST);
    let start = |limit| {
        start_with(
            &sandbox,
            small(Setup { through: under(limit), folder: Some(folder.clone()), ..Setup::default() }),
        )
    };
    let long = long_body();
    let call =
        |gateway: &Gateway| assert_eq!(gateway.post(&long).outcome(), "succeeded", "{}", gateway.log());
    // Of the list alone.
    let gateway = start(limit);
    is_ready(&gateway);
    drop(gateway.kill());
    pad(&audit, limit - KEPT - (4 << 20));
    let gateway = start(limit);
    let (before, began) = (segments(&audit).len(), sandbox.requests().len());
    wait_for("another segment", || {
        call(&gateway);
        (segments(&audit).len() > before).then_some(())
    });
    (0..50).for_each(|_| call(&gateway));
    assert_eq!(segments(&audit).len(), before + 1, "it has room for more than its list");
    assert!(newest(&audit) > 2 << 20, "the control: the list is long");
    is_ready(&gateway);

    // Where a new segment would have no more room than this one, none is begun.
    limit_files(&gateway, &(newest(&audit) + (1 << 20) + (200 << 10)).to_string());
    script(&sandbox, Faults::business(Fault::delayed(3_000).times(1)));
    let sent = sandbox.requests().len();
    let mut in_flight = TcpStream::connect(gateway.address).unwrap();
    in_flight.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    wait_for("the request", || (sandbox.requests().len() > sent).then_some(()));
    wait_for("the limit", || {
        let reply = gateway.send_once(&head(long.len(), ""), &long);
        (reply.status == 503 && gateway.log().contains("no space can be reserved")).then_some(())
    });
    let reply = read_reply(&mut in_flight);
    assert_eq!(reply.outcome(), "succeeded", "{reply:?}");
    let id = &reply.headers["x-gateway-request-id"];
    wait_for("its outcome", || outcomes(&audit).contains_key(id).then_some(()));
    assert_eq!(segments(&audit).len(), before + 1, "the lists do not fill the disk");
    limit_files(&gateway, &limit.to_string());
    wait_for("service", || (gateway.call_once().outcome() == "succeeded").then_some(()));
    let known =
        outcomes(&audit).values().flatten().filter(|outcome| outcome["outcome"] == "succeeded").count();
    assert!(known + 1 >= sandbox.requests().len() - began, "{known}");
    drop(gateway.kill());

    let gateway = start(limit);
    is_ready(&gateway);
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert!(gateway.admin("/metrics").body.contains(&format!("unresolved_outcomes {count}\n")));
    let (whole, said) = verify(&audit);
    assert!(whole, "{said}");
}

#[test]
fn sent_calls_get_outcomes_when_the_file_size_limit_blocks_new_ones() {
    let sandbox = sandbox();
    let gateway = start_with(&sandbox, Setup { through: under(u64::MAX >> 1), ..Setup::default() });
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
    script(&sandbox, Faults::business(Fault::delayed(2_000).times(1)));
    let mut in_flight = TcpStream::connect(gateway.address).unwrap();
    in_flight.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    wait_for("the request", || (sandbox.requests().len() == 2).then_some(()));
    let audit = gateway.audit_directory();
    // A file has room for the outcome, and none for what is reserved.
    limit_files(&gateway, &(newest(&audit) + 100).to_string());
    // What finds space that was reserved before is still sent.
    wait_for("refusals", || (gateway.call_once().code() == "audit_unavailable").then_some(()));
    assert_refused(&gateway, &sandbox);
    let (segment_count, reply) = (segments(&audit).len(), read_reply(&mut in_flight));
    let id = &reply.headers["x-gateway-request-id"];
    wait_for("its outcome", || outcomes(&audit).contains_key(id).then_some(()));
    assert_eq!(outcomes(&audit)[id][0]["outcome"], "succeeded");
    assert_eq!(segment_count, 2, "it is in a new segment");
    assert!(segments(&audit).len() <= 3, "what was sent takes no segment a record");
    assert_refused(&gateway, &sandbox);
    limit_files(&gateway, "unlimited");
    assert_resumed(&gateway, &sandbox);
    let (whole, said) = verify(&audit);
    assert!(whole, "{said}");
}

#[test]
fn sent_calls_get_outcomes_when_no_new_segment_can_be_created() {
    for durability in ["kernel", "disk"] {
        let sandbox = sandbox();
        let folder = start(&sandbox).kill();
        pad(&folder.path().join("audit"), *LEAST - KEPT - (100 << 10));
        let setup = small(Setup { through: under(*LEAST), folder: Some(folder), ..Setup::default() });
        let gateway = start_with(&sandbox, setup.set("audit.durability", durability));
        assert_eq!(gateway.call().outcome(), "succeeded", "the control");
        let obstacle = gateway.audit_directory().join("segment.new"); // each is made by this name
        fs::create_dir(&obstacle).unwrap();
        script(&sandbox, Faults::business(Fault::delayed(6_000).times(1)));
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
fn low_file_size_limit_is_noted_and_a_too_low_one_fails_the_start() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let config = folder.path().join("gateway.toml");
    let check = |limit: u64, set: &str| check(&config, limit, &["--set", set]);
    let default = "audit.segment_size=64MiB";
    let (code, said) = check(67 << 20, default);
    assert!(code == Some(0) && !said.contains("audit.segment_size ("), "the control: {said}");
    let (code, said) = check(66 << 20, default);
    let lower = "or set audit.segment_size to 64512KiB";
    assert!(
        code == Some(0)
            && said.contains("Note: a file can have at most 69206016 bytes")
            && said.contains(lower),
        "{said}"
    );
    let (code, said) = check(66 << 20, "audit.segment_size=64512KiB");
    assert!(code == Some(0) && !said.contains("audit.segment_size ("), "it is of use: {said}");
    for (limit, set, good) in [
        (21 << 20, default, true),
        ((21 << 20) - 1, default, false),
        (21 << 20, "server.max_in_flight=1025", false),
        (21 << 20, "server.max_body=257KiB", false),
        (300 << 10, default, false),
    ] {
        let (code, said) = check(limit, set);
        assert_eq!(code, Some(if good { 0 } else { 78 }), "{limit} {set}: {said}");
        let told =
            ["a segment of the audit trail needs", "raise the limit on the size of files (LimitFSIZE="];
        assert_eq!(told.iter().all(|told| said.contains(told)), !good, "{limit} {set}: {said}");
        assert!(good || !said.contains("audit.directory"), "no setting is wrong: {said}");
    }
    let (code, said) = super::limits::check(&config, 300 << 10, &["--json"]);
    let problem = &serde_json::from_str::<Value>(&said).unwrap()["problems"][0];
    assert!(code == Some(78) && problem["key"].is_null(), "{said}");
    assert!(text(&problem["reason"]).starts_with("a file can have at most 307200 bytes"), "{said}");

    let setup = |limit| Setup { through: under(limit), folder: Some(folder.clone()), ..Setup::default() };
    let gateway = start_with(&sandbox, setup(66 << 20));
    wait_for("a warning", || gateway.log().contains(lower).then_some(()));
    drop(gateway);
    let (code, said) = run(300 << 10, &["serve", "--config", config.to_str().unwrap()]);
    assert!(code == Some(78) && said.matches("a file can have at most 307200 bytes").count() == 1, "{said}");
    assert!(said.contains("LimitFSIZE=") && !said.contains("audit.directory"), "{said}");
}

#[test]
fn audit_commands_exit_with_78_at_the_file_size_limit() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
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
                let must_change = if command[0] == "audit" { 78 } else { 1 }; // output is lost, no more
                let is_told = code == Some(must_change) && said.contains("File too large");
                assert!(is_told, "{command:?}: {code:?} {said}");
            } else {
                assert_eq!(code, Some(0), "the control: {command:?}: {said}");
            }
        }
    }
    let (code, said) = run("unlimited", &["audit", "accept-clock", "/nowhere"]);
    assert!(code == Some(78), "a directory that is not there is one: {code:?} {said}");
}
