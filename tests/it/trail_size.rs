//! How large the trail becomes: what a call takes, and what goes early beyond `max_size`.

use std::{fs, path::Path};

use ccsqm_gateway::config::trail::CALL;
use serde_json::Value;

use crate::{
    audit::{segments, verify},
    clock::{DAY, End, Machine, until_doubtful},
    idempotency::until_keys_are_known,
    support::*,
};

/// What a machine has before it has a `max_size`: no rate that bounds the trail.
const UNBOUNDED: [(&str, &str); 1] = [("audit.segment_size", "64KiB")];

/// What holds the window of these rates, and less than the trail that was there before.
const BOUNDED: [(&str, &str); 4] = [
    ("audit.segment_size", "64KiB"),
    ("audit.max_size", "768KiB"),
    ("quota.rate", "1/h"),
    ("quota.burst", "400"),
];

/// So many segments are larger than `max_size`, by four.
const SEGMENTS: usize = 16;

fn size(directory: &Path) -> u64 {
    segments(directory).iter().map(|path| fs::metadata(path).unwrap().len()).sum()
}

/// A machine with a trail that is larger than the `max_size` that its next start has, and the number of its next call. The calls
/// so far were so many days ago.
fn large(days: i64) -> (Machine, usize) {
    let mut machine = Machine::new(true);
    machine.set = UNBOUNDED.into();
    let gateway = machine.start();
    let next = machine.fill(&gateway, 0, SEGMENTS);
    Machine::end(gateway, End::Stop);
    machine.set_clock(days * DAY);
    if days > 0 {
        assert_eq!(machine.audit("accept-clock").0, 0); // by this clock the records so far are old
    }
    machine.set = BOUNDED.into();
    assert!(size(&machine.audit_directory()) > 768 << 10);
    (machine, next)
}

/// Calls until so many further segments have begun, however many go meanwhile. At each that begins an old one is looked for.
fn begin_segments(machine: &mut Machine, gateway: &Gateway, next: &mut usize, count: usize) {
    let newest = |machine: &Machine| segments(&machine.audit_directory()).pop().unwrap();
    for _ in 0..count {
        let last = newest(machine);
        while newest(machine) == last {
            machine.succeed(gateway, &format!("done-{next}"));
            *next += 1;
        }
    }
}

fn metric(gateway: &Gateway, name: &str) -> u64 {
    let (metrics, begin) = (gateway.admin("/metrics").body, format!("ccsqm_gateway_{name} "));
    metrics.lines().find_map(|line| line.strip_prefix(&begin)).unwrap().parse().unwrap()
}

/// What was removed early, so many segments or more, as trail and metrics tell.
fn removed_early(machine: &Machine, gateway: &Gateway, least: usize) -> Vec<Value> {
    // A segment goes behind its record, and that is written some time after the segment that made somebody look.
    wait_for("the removal of what is on record", || {
        let told = machine.events("retention");
        let counts = ["removed_early_total", "removed_segments_total"]
            .map(|name| metric(gateway, &format!("audit_{name}")));
        (told.len() >= least && counts == [told.len() as u64; 2]).then_some(told)
    })
}

/// So many WARNs that hold a text, and no more: the log comes some time after what it tells of.
fn warned(gateway: &Gateway, text: &str, count: usize) -> Vec<Value> {
    let said = wait_for(text, || Some(warnings(gateway, text)).filter(|said| said.len() >= count));
    assert_eq!(said.len(), count, "{said:?}");
    said
}

/// The WARNs that hold a text.
fn warnings(gateway: &Gateway, text: &str) -> Vec<Value> {
    let lines = gateway.log();
    let events = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    events.filter(|event| event["level"] == "WARN" && event.to_string().contains(text)).collect()
}

const REMOVED: &str = "was removed before `retain` had passed";
const NONE_MAY: &str = "no segment may be removed";
const DOUBT: &str = "no segment is removed while the clock is doubtful";

#[test]
fn segments_outside_the_window_are_removed_early_beyond_max_size() {
    let (mut machine, first) = large(2);
    let (directory, mut next) = (machine.audit_directory(), first);
    let before = segments(&directory);
    let gateway = machine.start();
    removed_early(&machine, &gateway, 1); // by the first look
    begin_segments(&mut machine, &gateway, &mut next, 2);
    let told = removed_early(&machine, &gateway, 3);
    for (event, path) in told.iter().zip(&before) {
        assert_eq!(event["file"], path.file_name().unwrap().to_str().unwrap());
        assert!(!path.exists(), "{event}");
        let early = &event["early"];
        assert!(early["why"] == "max_size" && early["max_size"] == 768 << 10, "{event}");
        assert!(early["trail_size"].as_u64() > early["max_size"].as_u64(), "{event}");
    }
    let said = warned(&gateway, REMOVED, told.len());
    assert!(
        said[0]["fields"]["file"] == told[0]["file"]
            && said[0].to_string().contains("raise [audit] max_size")
    );
    assert_eq!(warnings(&gateway, NONE_MAY), [] as [Value; 0]);

    Machine::end(gateway, End::Crash);
    let (whole, said) = verify(&directory);
    assert!(whole, "{said}");
    // A start knows all keys of the window, and that nothing is lost.
    let gateway = machine.start();
    until_keys_are_known(&gateway);
    for number in [first, next - 1] {
        let reply = gateway.post_with(&format!("idempotency-key: done-{number}\r\n"));
        assert_eq!(reply.outcome(), "replayed", "{number}");
    }
    assert_eq!(metric(&gateway, "audit_damaged"), 0);
    machine.succeed(&gateway, "new");
    let id = records(&directory, "intent")[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(command(&["audit", "show", directory.to_str().unwrap(), &id]).0, 0);
    Machine::end(gateway, End::Stop);
    assert!(verify(&directory).0);
    assert_eq!(machine.audit("in-doubt").0, 0);
}

#[test]
fn nothing_is_removed_early_up_to_max_size() {
    let (mut machine, mut next) = large(2);
    let before = segments(&machine.audit_directory());
    let small = ("audit.max_size", "16MiB");
    machine.set =
        BOUNDED.iter().map(|(key, value)| if *key == small.0 { small } else { (*key, *value) }).collect();
    let gateway = machine.start();
    begin_segments(&mut machine, &gateway, &mut next, 2);
    assert!(segments(&machine.audit_directory()).starts_with(&before));
    assert_eq!(removed_early(&machine, &gateway, 0), [] as [Value; 0]);
}

#[test]
fn nothing_within_the_window_is_removed_early_and_one_warning_logged() {
    let (mut machine, mut next) = large(0);
    let before = segments(&machine.audit_directory());
    let gateway = machine.start();
    warned(&gateway, NONE_MAY, 1);
    begin_segments(&mut machine, &gateway, &mut next, 2);
    assert!(segments(&machine.audit_directory()).starts_with(&before));
    assert_eq!(removed_early(&machine, &gateway, 0), [] as [Value; 0]);
    let said = warned(&gateway, NONE_MAY, 1);
    assert_eq!(said[0]["fields"]["max_size"], 768 << 10);
    machine.assert_known(&gateway, 3);
}

#[test]
fn nothing_is_removed_early_while_the_clock_is_doubtful() {
    let (mut machine, mut next) = large(2);
    let gateway = machine.start();
    let removed = removed_early(&machine, &gateway, 1).len(); // by the first look
    machine.set_clock(4 * DAY);
    until_doubtful(&gateway, true);
    let before = segments(&machine.audit_directory());
    begin_segments(&mut machine, &gateway, &mut next, 2);
    assert!(segments(&machine.audit_directory()).starts_with(&before));
    assert_eq!(removed_early(&machine, &gateway, 0).len(), removed);
    warned(&gateway, DOUBT, 1);
    machine.set_clock(2 * DAY);
    until_doubtful(&gateway, false);
    begin_segments(&mut machine, &gateway, &mut next, 2);
    removed_early(&machine, &gateway, removed + 1); // the control
}

#[test]
fn start_warns_if_the_file_system_is_smaller_than_max_size() {
    let sandbox = sandbox();
    for (max_size, is_told) in [("256MiB", false), ("8192GiB", true)] {
        let setup =
            Setup::default().set("audit.max_size", max_size).set("quota.rate", "1/s").set("quota.burst", 10);
        let gateway = start_with(&sandbox, setup);
        // What a start warns of comes before it listens.
        assert_eq!(
            !warnings(&gateway, "it may be full before a segment is removed early").is_empty(),
            is_told
        );
    }
}

/// The figure with which `check` reckons: the example call, with a key, takes a tenth more or less.
#[test]
fn bytes_of_a_call_in_the_trail_match_the_estimate_of_check() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let (directory, mut took) = (gateway.audit_directory(), Vec::new());
    for with_key in [false, true] {
        // Once what was answered is on record, nothing else is written.
        let calls = || {
            let calls = records(&directory, "intent").len();
            gateway.records("outcome", calls);
            calls
        };
        let before = (calls(), size(&directory));
        for number in 0..50 {
            let key = if with_key { format!("idempotency-key: key-{number}\r\n") } else { String::new() };
            assert_eq!(gateway.post_with(&key).outcome(), "succeeded");
        }
        let after = (calls(), size(&directory));
        took.push((after.1 - before.1) / (after.0 - before.0) as u64);
    }
    println!("bytes of a call, without a key and with one: {took:?}");
    assert!(took[0] < took[1] && took[1].abs_diff(CALL) <= CALL / 10, "{took:?}");
}
