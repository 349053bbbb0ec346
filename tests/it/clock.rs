//! A wall clock that is wrong, or set while the gateway runs: nothing is removed, and no key is forgotten.

use std::{fs, path::PathBuf, process::Command, sync::Arc, sync::LazyLock};

use ccsqm_gateway::{
    audit::chain::{Link, OPEN_LINKS, key_path},
    keyed_hash::{Keys, parse_hex},
    sandbox::{Fault, Faults, Instead, Sandbox},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    audit::{segments, verify},
    idempotency::until_keys_are_known,
    support::*,
};

const HOUR: i64 = 3600;
pub(crate) const DAY: i64 = 24 * HOUR;

/// The library that moves the wall clock, compiled once.
static PRELOAD: LazyLock<PathBuf> = LazyLock::new(|| compile("overload/clock"));

/// A machine whose wall clock obeys the test, and its gateway's cloud and folder. The boot time is the real one.
pub(crate) struct Machine {
    pub(crate) sandbox: Sandbox,
    pub(crate) folder: Arc<TempDir>,
    /// Nothing under /proc/sys can be read, as with `ProcSubset=pid`.
    pub(crate) is_hidden: bool,
    /// What its gateway is started with, beside what all have.
    pub(crate) set: Vec<(&'static str, &'static str)>,
    pub(crate) sent: usize,
}

/// Segments are as small as they may be, and kept for a day.
fn small_segments() -> Vec<(&'static str, &'static str)> {
    vec![("audit.segment_size", "64KiB"), ("audit.retain", "1d")]
}

/// How a gateway ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    Stop,
    Crash,
}

impl Machine {
    pub(crate) fn new(is_hidden: bool) -> Self {
        let folder = Arc::new(TempDir::new().unwrap());
        let machine = Self { sandbox: sandbox(), folder, is_hidden, set: Vec::new(), sent: 0 };
        machine.set_clock(0);
        machine
    }

    /// The wall clock is ahead by so many seconds.
    pub(crate) fn set_clock(&self, ahead: i64) {
        let unfinished = self.folder.path().join("clock.new");
        fs::write(&unfinished, ahead.to_string()).unwrap();
        fs::rename(unfinished, self.folder.path().join("clock")).unwrap();
    }

    /// What makes a command see this clock.
    fn with_clock(&self) -> [String; 3] {
        let clock = self.folder.path().join("clock");
        ["env".into(), format!("LD_PRELOAD={}", PRELOAD.display()), format!("CLOCK={}", clock.display())]
    }

    pub(crate) fn start(&self) -> Gateway {
        const HIDE: &str = "mount -t tmpfs -o ro none /proc/sys && exec \"$@\"";
        let hide = ["unshare", "--mount", "sh", "-c", HIDE, "sh"].map(str::to_owned);
        let mut through: Vec<_> = hide.into_iter().filter(|_| self.is_hidden).collect();
        through.extend(self.with_clock());
        let mut setup = Setup { through, folder: Some(self.folder.clone()), ..Setup::default() }
            .set("admin.control", "off");
        for (key, value) in &self.set {
            setup = setup.set(key, value);
        }
        let gateway = start_with(&self.sandbox, setup);
        until_keys_are_known(&gateway);
        wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
        gateway
    }

    pub(crate) fn end(mut gateway: Gateway, end: End) {
        if end == End::Stop {
            gateway.signal("-TERM");
            assert!(gateway.wait().success());
        }
        gateway.kill();
    }

    pub(crate) fn audit_directory(&self) -> PathBuf {
        self.folder.path().join("audit")
    }

    /// A call with a key that succeeds, and was not made before.
    pub(crate) fn succeed(&mut self, gateway: &Gateway, name: &str) {
        assert_eq!(sent(gateway, name).outcome(), "succeeded", "{name}");
        self.sent += 1;
        assert_eq!(self.sandbox.requests().len(), self.sent);
    }

    /// A call with a key of whose outcome nobody knows.
    fn lose(&mut self, gateway: &Gateway, name: &str) {
        script(&self.sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
        assert_eq!(sent(gateway, name).outcome(), "unknown", "{name}");
        self.sent += 1;
    }

    /// Keys from 0 to so many are known, and none is sent again.
    pub(crate) fn assert_known(&self, gateway: &Gateway, keys: usize) {
        for number in 0..keys {
            assert_eq!(gateway.post_with(&key(&format!("done-{number}"))).outcome(), "replayed", "{number}");
        }
        assert_eq!(self.sandbox.requests().len(), self.sent, "nothing is sent again");
    }

    /// Calls with keys from this number on until there are so many segments; returns the next number.
    pub(crate) fn fill(&mut self, gateway: &Gateway, mut number: usize, count: usize) -> usize {
        while segments(&self.audit_directory()).len() < count {
            assert!(number < 2000, "segments are removed as fast as they are begun");
            self.succeed(gateway, &format!("done-{number}"));
            number += 1;
        }
        number
    }

    /// Runs a command of `audit` on the trail, at the machine's clock.
    pub(crate) fn audit(&self, command: &str) -> (i32, String, String) {
        let [env, words @ ..] = self.with_clock();
        let output = Command::new(env)
            .args(words)
            .args([BINARY, "audit", command, self.audit_directory().to_str().unwrap()])
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    pub(crate) fn events(&self, name: &str) -> Vec<Value> {
        let mut events = records(&self.audit_directory(), "event");
        events.retain(|event| event["event"] == name);
        events
    }
}

fn key(name: &str) -> String {
    format!("idempotency-key: {name}\r\n")
}

/// A call with a key.
fn sent(gateway: &Gateway, name: &str) -> Reply {
    gateway.post_with(&key(name))
}

/// What the gateway says of its clock, in each place; nothing if it is not doubtful.
fn doubt(gateway: &Gateway) -> Option<String> {
    let status = gateway.admin("/status").json();
    let reason = status["clock"]["doubtful"].as_str().map(str::to_owned);
    let metric = format!("\nccsqm_gateway_clock_doubtful {}\n", u8::from(reason.is_some()));
    let ready = gateway.admin("/readyz");
    let warnings = ready.json()["warnings"].as_array().unwrap().clone();
    let agree = gateway.admin("/metrics").body.contains(&metric)
        && warnings.iter().any(|warning| warning.as_str().unwrap().contains("clock")) == reason.is_some();
    assert_eq!(ready.status, 200, "{ready:?}");
    // It may have begun or ended in between.
    if agree { reason } else { doubt(gateway) }
}

pub(crate) fn until_doubtful(gateway: &Gateway, is_doubtful: bool) {
    wait_for("the doubt", || (doubt(gateway).is_some() == is_doubtful).then_some(()));
}

fn variants() -> impl Iterator<Item = (bool, End)> {
    [(false, End::Stop), (false, End::Crash), (true, End::Stop), (true, End::Crash)].into_iter()
}

#[test]
fn brief_clock_jump_ahead_removes_no_segment_and_no_key() {
    for (is_hidden, end) in variants() {
        let mut machine = Machine { set: small_segments(), ..Machine::new(is_hidden) };
        let gateway = machine.start();
        let next = machine.fill(&gateway, 0, 3);
        let before = segments(&machine.audit_directory());
        machine.set_clock(31 * DAY);
        let next = machine.fill(&gateway, next, before.len() + 2); // at each new segment an old one is looked for
        assert!(segments(&machine.audit_directory()).starts_with(&before), "nothing was removed");
        until_doubtful(&gateway, true);
        machine.set_clock(0);
        until_doubtful(&gateway, false);
        assert_eq!((machine.events("clock_doubtful").len(), machine.events("clock_trusted").len()), (1, 1));
        assert!(gateway.log().contains("the wall clock is doubtful"), "{}", gateway.log());

        Machine::end(gateway, end);
        let (whole, said) = verify(&machine.audit_directory());
        assert!(whole, "{said}");
        let gateway = machine.start();
        machine.assert_known(&gateway, next);
        assert!(segments(&machine.audit_directory()).starts_with(&before), "nothing was removed");
    }
}

#[test]
fn segments_are_removed_one_by_one_and_none_with_a_doubtful_clock() {
    let mut machine = Machine { set: small_segments(), ..Machine::new(true) };
    let gateway = machine.start();
    let next = machine.fill(&gateway, 0, 4);
    Machine::end(gateway, End::Crash);
    machine.set_clock(31 * DAY);
    assert_eq!(machine.audit("accept-clock").0, 0); // by this clock the records so far are old
    let gateway = machine.start();
    assert_eq!(doubt(&gateway), None);
    let directory = machine.audit_directory();
    let removed = |machine: &Machine| machine.events("retention").len();

    // One at each new segment, once the trail was verified.
    let mut number = next;
    while removed(&machine) == 0 {
        machine.succeed(&gateway, &format!("done-{number}"));
        number += 1;
    }
    assert_eq!(removed(&machine), 1);
    machine.set_clock(33 * DAY);
    until_doubtful(&gateway, true);
    let before = segments(&directory);
    let begun = before.len();
    number = machine.fill(&gateway, number, begun + 2);
    assert!(segments(&directory).starts_with(&before), "nothing was removed meanwhile");
    machine.set_clock(31 * DAY);
    until_doubtful(&gateway, false);
    while removed(&machine) == 1 {
        machine.succeed(&gateway, &format!("done-{number}"));
        number += 1;
    }
    assert!(verify(&directory).0);
}

#[test]
fn no_key_is_forgotten_with_any_clock_at_start() {
    let histories: [&[i64]; 7] = [
        &[0, 25 * HOUR],
        &[-2 * DAY, 0],
        &[0, -2 * DAY, 0],
        &[-2 * HOUR, 0, 23 * HOUR], // no start finds anything odd
        &[0, 25 * HOUR, 25 * HOUR], // the last finds nothing odd
        &[-2 * DAY, 0, 0],
        &[0, 31 * DAY, 0],
    ];
    for (is_hidden, end) in variants() {
        for history in histories {
            let mut machine = Machine::new(is_hidden);
            if end == End::Crash {
                Machine::end(machine.start(), end); // a run without a call, at the right clock
            }
            for (number, ahead) in history.iter().enumerate() {
                machine.set_clock(*ahead);
                let gateway = machine.start();
                machine.assert_known(&gateway, number);
                for earlier in 0..number {
                    let reply = gateway.post_with(&key(&format!("lost-{earlier}")));
                    let said = (reply.status, reply.code());
                    assert_eq!(said, (409, "outcome_unknown"), "{history:?} {is_hidden} {end:?}");
                }
                machine.succeed(&gateway, &format!("done-{number}"));
                machine.lose(&gateway, &format!("lost-{number}"));
                Machine::end(gateway, end);
            }
            assert!(verify(&machine.audit_directory()).0);
        }
    }
}

#[test]
fn clock_set_back_at_run_time_makes_no_record_older() {
    for (is_hidden, end) in variants() {
        let mut machine = Machine::new(is_hidden);
        let gateway = machine.start();
        machine.set_clock(-2 * DAY);
        machine.succeed(&gateway, "done-0");
        machine.set_clock(0);
        machine.succeed(&gateway, "done-1");
        machine.set_clock(-2 * DAY);
        machine.assert_known(&gateway, 2);
        until_doubtful(&gateway, true);
        Machine::end(gateway, end);
        for ahead in [0, -2 * DAY, 0] {
            machine.set_clock(ahead);
            let gateway = machine.start();
            machine.assert_known(&gateway, 2);
            Machine::end(gateway, end);
        }
    }
}

#[test]
fn wrong_clock_at_start_has_no_effect_within_one_boot() {
    let mut machine = Machine::new(false);
    for ahead in [0, 25 * HOUR, -2 * DAY] {
        machine.set_clock(ahead);
        let gateway = machine.start();
        machine.succeed(&gateway, &ahead.to_string());
        assert_eq!(doubt(&gateway), None);
        Machine::end(gateway, End::Crash);
    }
    let starts = machine.events("start");
    assert_eq!(starts.len(), 3);
    for pair in starts.windows(2) {
        assert_eq!(pair[0]["boot_id"], pair[1]["boot_id"]);
        let passed = |member: &str| pair[1][member].as_i64().unwrap() - pair[0][member].as_i64().unwrap();
        assert!(passed("boottime") > 0);
        assert_eq!(passed("boottime"), passed("elapsed"), "{pair:?}");
    }
}

#[test]
fn odd_clock_at_start_is_doubtful_until_an_operator_accepts_it() {
    for (ahead, reason) in [(25 * HOUR, "older than the idempotency window"), (-2 * DAY, "in the future")] {
        let mut machine = Machine::new(true);
        let gateway = machine.start();
        assert_eq!(doubt(&gateway), None, "the control");
        machine.succeed(&gateway, "done-0");
        Machine::end(gateway, End::Crash);
        machine.set_clock(ahead);
        let gateway = machine.start();
        machine.assert_known(&gateway, 1);
        let said = doubt(&gateway).unwrap();
        assert!(said.contains(reason), "{said}");
        assert!(gateway.log().contains(&said), "{}", gateway.log());
        let events = machine.events("clock_doubtful");
        assert!(events.len() == 1 && events[0]["reason"] == said.as_str(), "{events:?}");
        assert!(machine.events("start").iter().all(|start| start.get("boot_id").is_none()));

        let (code, _, error) = machine.audit("accept-clock");
        assert!(code == 1 && error.contains("a gateway writes this trail"), "{code} {error}");
        Machine::end(gateway, End::Crash);
        let (code, out, error) = machine.audit("accept-clock");
        assert!(code == 0 && out.starts_with("accepted"), "{code} {out} {error}");
        let gateway = machine.start();
        assert_eq!(doubt(&gateway), None);
        if ahead > 0 {
            machine.succeed(&gateway, "done-0"); // by the clock that was accepted it is forgotten
        } else {
            machine.assert_known(&gateway, 1);
        }
        assert_eq!(machine.events("clock_accepted").len(), 1);
        assert!(verify(&machine.audit_directory()).0);
    }
    let machine = Machine::new(false);
    let (code, _, error) = machine.audit("accept-clock");
    assert_eq!(code, 78, "there is no trail: {error}");
}

/// Appends a start that states this format, with all that makes it a good record.
pub(crate) fn append_start(directory: &std::path::Path, format: u64) {
    let last = records(directory, "").pop().unwrap();
    let (seq, time) = (last["seq"].as_u64().unwrap() + 1, last["time"].as_str().unwrap());
    let head = format!(r#"{{"seq":{seq},"time":"{time}","kind":"event","event":"start","format":{format}"#);
    let mut line = [head.as_bytes(), OPEN_LINKS].concat();
    let keys = Keys::load(&key_path(directory)).unwrap();
    keys.seal(&mut line, &Link::new(parse_hex(last["hash"].as_str().unwrap()).unwrap()));
    let segment = segments(directory).pop().unwrap();
    fs::write(&segment, [fs::read(&segment).unwrap(), line].concat()).unwrap();
}

#[test]
fn trail_of_a_newer_version_is_not_modified() {
    let machine = Machine::new(false);
    Machine::end(machine.start(), End::Stop);
    let directory = machine.audit_directory();
    append_start(&directory, 1);
    for command in ["verify", "in-doubt", "head"] {
        assert_eq!(machine.audit(command).0, 0, "the control");
    }
    Machine::end(machine.start(), End::Stop);
    append_start(&directory, 2);
    let before = fs::read(segments(&directory).pop().unwrap()).unwrap();
    let said =
        "written by a newer version of the gateway: its format is 2, and this version reads formats up to 1";
    for command in ["verify", "in-doubt", "head", "accept-clock"] {
        let (code, _, error) = machine.audit(command);
        assert!(code == 78 && error.contains(said), "{command}: {code} {error}");
    }
    let config = machine.folder.path().join("gateway.toml");
    for name in ["check", "serve"] {
        let (code, _, error) = command(&[name, "--config", config.to_str().unwrap()]);
        assert!(code == 78 && error.contains(said), "{name}: {code} {error}");
    }
    assert_eq!(fs::read(segments(&directory).pop().unwrap()).unwrap(), before);
}
