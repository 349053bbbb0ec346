//! A configuration that changes while the gateway runs; what is bad changes nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{audit::text, callers::caller, idempotency::until_keys_are_known, support::*};

fn file(gateway: &Gateway) -> PathBuf {
    gateway.folder.path().join("gateway.toml")
}

/// Replaces a file at once.
fn replace(file: &Path, text: &[u8]) {
    let new = file.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, file).unwrap();
}

fn write(gateway: &Gateway, text: &[u8]) {
    replace(&file(gateway), text);
}

/// Changes the file.
fn edit(gateway: &Gateway, from: &str, to: &str) {
    let text = fs::read_to_string(file(gateway)).unwrap();
    assert!(text.contains(from), "{from}");
    write(gateway, text.replace(from, to).as_bytes());
}

fn events(gateway: &Gateway) -> Vec<Value> {
    let mut events = records(&gateway.audit_directory(), "event");
    events.retain(|event| event["event"] == "reload");
    events
}

/// Waits for so many events, and sees no more: an event is on record some time after what it tells of.
fn reloads(gateway: &Gateway, count: usize) -> Vec<Value> {
    let events = wait_for(&format!("{count} reloads"), || {
        let events = events(gateway);
        (events.len() >= count).then_some(events)
    });
    assert_eq!(events.len(), count, "{events:?}");
    events
}

/// Sends SIGHUP and gives the event number `count`.
fn reload(gateway: &Gateway, count: usize) -> Value {
    gateway.signal("-HUP");
    reloads(gateway, count).remove(count - 1)
}

#[test]
fn reload_changes_callers_routes_and_levels_and_keeps_state() {
    let sandbox = sandbox();
    let config = caller("other", "127.0.0.2/32", "rate_limit = \"1/h\"\nburst = 2");
    let gateway = start_with(&sandbox, Setup { caller: config, ..Setup::default() });
    let from_other = || crate::callers::call_from("127.0.0.2", &gateway, "");
    until_keys_are_known(&gateway);
    assert_eq!(gateway.post_with("idempotency-key: one\r\n").outcome(), "succeeded");
    assert_eq!(from_other().outcome(), "succeeded");

    edit(&gateway, "operator_id = \"7\"", "operator_id = \"8\"");
    let event = reload(&gateway, 1);
    assert_eq!((&event["result"], &event["changed"]), (&"accepted".into(), &serde_json::json!(["callers"])));
    assert_eq!(from_other().outcome(), "succeeded");
    let head = String::from_utf8(sandbox.requests().pop().unwrap().head).unwrap().to_ascii_lowercase();
    assert!(head.contains("x-userid: 8\r\n"), "{head}");
    assert_eq!(from_other().code(), "rate_limited", "what was spent before stays spent");
    edit(&gateway, "burst = 2\n", "burst = 3\n");
    reload(&gateway, 2);
    assert_eq!(from_other().outcome(), "succeeded", "one more");
    assert_eq!(from_other().code(), "rate_limited");

    assert_eq!(gateway.post_with("idempotency-key: one\r\n").outcome(), "replayed");
    assert_eq!(sandbox.token_calls().len(), 1, "the token stays");

    edit(&gateway, "peer = \"127.0.0.2/32\"", "peer = \"127.0.0.3/32\"");
    reload(&gateway, 3);
    assert_eq!(from_other().outcome(), "succeeded", "it is the loopback caller now");
    edit(&gateway, "peer = \"loopback\"", "frozen = true\npeer = \"loopback\"");
    reload(&gateway, 4);
    assert_eq!(gateway.call().code(), "frozen");

    assert!(!gateway.log().contains("\"DEBUG\""), "the control");
    edit(&gateway, "level = \"info\"", "level = \"debug\"");
    assert_eq!(reload(&gateway, 5)["changed"], serde_json::json!(["log.level"]));
    gateway.call();
    wait_for("more log", || gateway.log().contains("\"DEBUG\"").then_some(()));

    assert!(!gateway.log().contains("a request ended"), "the control");
    edit(&gateway, "level = \"debug\"", "level = \"debug\"\nrequests = \"all\"");
    assert_eq!(reload(&gateway, 6)["changed"], serde_json::json!(["log.requests"]));
    gateway.call();
    wait_for("a line of a request", || gateway.log().contains("a request ended").then_some(()));
}

#[test]
fn numeric_ids_are_logged_once_and_checked_as_set_per_caller() {
    let sandbox = sandbox();
    let other = caller("other", "127.0.0.2/32", "bare_ids = \"exact\"");
    let gateway = start_with(&sandbox, Setup { caller: other, ..Setup::default() });
    let body = |id: &str| BODY.replace("\"954645333549048833\"", id);
    // As JavaScript writes it, exact, small, as a string.
    let bodies =
        ["954645333549048800", "954645333549048833", "954125366", "\"954645333549048800\""].map(body);
    let codes = |post: &dyn Fn(&str) -> Reply| {
        bodies.each_ref().map(|body| {
            let reply = post(body);
            if reply.outcome() == "succeeded" {
                return String::new();
            }
            assert_eq!(
                (reply.status, reply.code(), reply.outcome()),
                (422, "contract_violation", "not_sent")
            );
            let errors = reply.json()["errors"].take();
            assert_eq!(
                (&errors[0]["pointer"], errors.as_array().unwrap().len()),
                (&"/qualityTaskId".into(), 1)
            );
            errors[0]["code"].as_str().unwrap().to_owned()
        })
    };
    let console = || codes(&|body| gateway.post(body));
    let other = || codes(&|body| crate::callers::post_from("127.0.0.2", &gateway, "", body));
    let told = || {
        let log = gateway.log();
        let lines = log.lines().filter(|line| line.contains("sends ids above 2^53 as numbers"));
        lines.map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>()
    };
    let counted = |caller: &str, count: usize| {
        let wanted = format!("ccsqm_gateway_bare_ids_total{{caller=\"{caller}\"}} {count}\n");
        gateway.admin("/metrics").body.contains(&wanted)
    };

    // By default those are refused that may be rounded.
    assert_eq!(console(), ["number_may_be_rounded", "", "", ""]);
    let warning = wait_for("the warning", || told().pop());
    assert_eq!((&warning["level"], &warning["fields"]["caller"]), (&"WARN".into(), &"qa-console".into()));
    assert!(!warning.to_string().contains("9546453335490488"), "no value of a caller: {warning}");
    assert_eq!(console(), ["number_may_be_rounded", "", "", ""]);
    // Whose ids are exact is not warned of: somebody has looked.
    assert_eq!(other(), ["", "", "", ""]);
    assert!(counted("qa-console", 4) && counted("other", 2), "{}", gateway.admin("/metrics").body);

    // What a caller may send changes while the gateway runs; it is told once for all that.
    let text = fs::read_to_string(file(&gateway)).unwrap();
    let (name, as_they_are) = ("name = \"qa-console\"", "bare_ids = \"exact\"");
    let text =
        text.replace(as_they_are, "bare_ids = \"refuse\"").replace(name, &format!("{name}\n{as_they_are}"));
    write(&gateway, text.as_bytes());
    reload(&gateway, 1);
    let all = "number_must_be_string";
    assert_eq!(console(), ["", "", "", ""]);
    assert_eq!(other(), [all, all, all, ""]);
    wait_for("the other's warning", || (told().len() == 2).then_some(()));
    assert_eq!(told()[1]["fields"]["caller"], "other");
    edit(&gateway, "bare_ids = \"exact\"", "bare_ids = \"detect\"");
    reload(&gateway, 2);
    assert_eq!(console(), ["number_may_be_rounded", "", "", ""]);
    assert_eq!(other(), [all, all, all, ""]);
    assert!(counted("qa-console", 8) && counted("other", 6), "{}", gateway.admin("/metrics").body);

    // Another level, so that all that was logged before is there.
    edit(&gateway, "level = \"info\"", "level = \"debug\"");
    reload(&gateway, 3);
    wait_for("the reload", || gateway.log().contains("log.level").then_some(()));
    assert_eq!(told().len(), 2, "{}", gateway.log());
}

#[test]
fn changed_configuration_or_contract_file_is_reloaded() {
    let sandbox = sandbox();
    let folder = std::sync::Arc::new(tempfile::TempDir::new().unwrap());
    let contract = |kind: &str| {
        let text = format!(
            r#"{{ "type": "object", "additionalProperties": false, "properties": {{ "a": {{ "type": "{kind}" }} }} }}"#
        );
        replace(&folder.path().join("contract.json"), text.as_bytes());
    };
    contract("integer");
    let config = OTHER_ROUTE.to_owned() + &caller("other", "127.0.0.2/32", "");
    let gateway =
        start_with(&sandbox, Setup { caller: config, folder: Some(folder.clone()), ..Setup::default() });
    let call = || gateway.send(&head(7, "").replacen(PATH, OTHER_PATH, 1), r#"{"a":1}"#);
    assert_eq!(call().code(), "route_denied");
    edit(&gateway, "routes = [\"appointQualityTask\"]", "routes = [\"appointQualityTask\", \"other\"]");
    wait_for("the new route", || (call().code() != "route_denied").then_some(()));
    assert_ne!(call().code(), "contract_violation");
    contract("string");
    wait_for("the new contract", || (call().code() == "contract_violation").then_some(()));
    let changed: Vec<_> = reloads(&gateway, 2).iter().map(|event| event["changed"].to_string()).collect();
    assert_eq!(changed, [r#"["callers"]"#, r#"["contracts"]"#]);
}

#[test]
fn bad_configuration_file_changes_nothing_and_is_reported_once() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let good = fs::read_to_string(file(&gateway)).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replacen(from, to, 1).into_bytes()
    };
    let base_url = format!("base_url = \"{}\"", sandbox.url());
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("no TOML", b"[[callers]\n".to_vec()),
        ("cut off", good.as_bytes()[..good.len() / 2].to_vec()),
        (
            "not UTF-8",
            with("qa-console", "qa-console\u{0}")
                .into_iter()
                .map(|b| if b == 0 { 0xff } else { b })
                .collect(),
        ),
        ("too large", vec![b'#'; 5 << 20]),
        ("an unknown key", with("peer = ", "peeer = ")),
        ("a wrong value", with("\"loopback\"", "\"everybody\"")),
        ("a dangling name", with("routes = [\"appointQualityTask\"]", "routes = [\"nothing\"]")),
        (
            "two callers in one",
            good.clone()
                .into_bytes()
                .into_iter()
                .chain(caller("twin", "loopback", "").into_bytes())
                .collect(),
        ),
        ("an inline secret", with("app_secret_file = \"app_secret\"", "app_secret = \"s3cret\"")),
        ("another upstream", with(&base_url, "base_url = \"https://elsewhere.example\"")),
        ("another port", with("address = \"127.0.0.1:0\"", "address = \"127.0.0.1:1\"")),
    ];
    for (count, (case, text)) in bad.iter().enumerate() {
        write(&gateway, text);
        let event = reload(&gateway, count + 1);
        assert_eq!(event["result"], "refused", "{case}");
        assert!(!event.to_string().contains("s3cret"));
        gateway.signal("-HUP");
        assert_eq!(gateway.call().outcome(), "succeeded", "{case}");
    }
    fs::remove_file(file(&gateway)).unwrap();
    assert_eq!(reload(&gateway, bad.len() + 1)["result"], "refused", "no file");
    let reason = events(&gateway)[10]["reason"].to_string();
    assert!(reason.contains("upstream cannot change while the gateway runs"), "{reason}");
    assert_eq!(gateway.log().matches("the old one stays in effect").count(), bad.len() + 1, "each once");
    write(&gateway, &with("qa-console", "qa-terminal"));
    assert_eq!(reload(&gateway, bad.len() + 2)["result"], "accepted", "the control");
    assert_eq!(gateway.call().outcome(), "succeeded");
    let intents = gateway.records("intent", bad.len() + 1);
    assert_eq!(intents.last().unwrap()["caller"], "qa-terminal");
    assert!(intents[..bad.len()].iter().all(|intent| intent["caller"] == "qa-console"));
}

#[test]
fn one_thousand_reload_signals_under_load_fail_no_request() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let stop = AtomicBool::new(false);
    let (calls, swaps) = thread::scope(|scope| {
        let load = || {
            let mut calls = 0;
            while !stop.load(Ordering::Relaxed) {
                let reply = gateway.call();
                assert_eq!(reply.outcome(), "succeeded", "{reply:?}");
                calls += 1;
            }
            calls
        };
        let callers: Vec<_> = (0..4).map(|_| scope.spawn(load)).collect();
        let begin = Instant::now();
        let mut signals = 0;
        while signals < 1000 || begin.elapsed() < Duration::from_secs(1) {
            if signals % 50 == 0 {
                let burst = |number: usize| format!("burst = {}\n", 1_000_000 - number);
                edit(&gateway, &burst(signals / 50), &burst(signals / 50 + 1));
            }
            rustix::process::kill_process(
                rustix::process::Pid::from_raw(gateway.pid().cast_signed()).unwrap(),
                rustix::process::Signal::HUP,
            )
            .unwrap();
            signals += 1;
        }
        edit(&gateway, "qa-console", "qa-terminal");
        gateway.signal("-HUP");
        wait_for("a swap", || events(&gateway).last().map(drop));
        stop.store(true, Ordering::Relaxed);
        (callers.into_iter().map(|caller| caller.join().unwrap()).sum::<usize>(), events(&gateway).len())
    });
    assert!(calls > 50 && swaps >= 1, "{calls} calls, {swaps} swaps");
    assert_eq!((sandbox.requests().len(), gateway.records("outcome", calls).len()), (calls, calls));
    assert_eq!(sandbox.token_calls().len(), 1);
}

#[test]
fn reload_rejects_limits_too_high_for_max_size() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let path = folder.path().join("gateway.toml");
    let (large, small) = (
        "rate = \"1000000/s\"\nburst = 1000000\n[idem",
        "rate = \"1/s\"\nburst = 10\n[audit]\nmax_size = \"256MiB\"\n[idem",
    );
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(large));
    fs::write(&path, text.replace(large, small)).unwrap();
    let gateway = serve(&folder);
    edit(&gateway, "rate = \"1/s\"", "rate = \"30/m\"");
    assert_eq!(reload(&gateway, 1)["result"], "accepted", "the control");
    edit(&gateway, "rate = \"30/m\"", "rate = \"2/s\"");
    let event = reload(&gateway, 2);
    assert_eq!(event["result"], "refused");
    wait_for("the reason", || gateway.log().contains("audit.max_size: must be").then_some(()));
}

#[test]
fn reload_allows_max_keys_of_a_caller_up_to_the_start_value() {
    let sandbox = sandbox();
    let config = caller("other", "127.0.0.2/32", "frozen = false\nmax_keys = 1500000");
    let gateway = start_with(&sandbox, Setup { caller: config, ..Setup::default() });
    edit(&gateway, "max_keys = 1500000", "max_keys = 1200000");
    assert_eq!(reload(&gateway, 1)["result"], "accepted");
    edit(&gateway, "max_keys = 1200000\n", "");
    assert_eq!(reload(&gateway, 2)["result"], "accepted");
    edit(&gateway, "frozen = false", "max_keys = 1500000");
    assert_eq!(reload(&gateway, 3)["result"], "accepted", "as many as at the start");
    edit(&gateway, "max_keys = 1500000", "max_keys = 1500001");
    let refused = reload(&gateway, 4);
    let reason = text(&refused["reason"]);
    assert!(refused["result"] == "refused" && reason.starts_with("callers[1].max_keys is more"), "{refused}");
    assert!(reason.contains("idempotency.max_keys, which is 1500000"), "{reason}");
    // Where somebody sets it, that is a change of its own.
    edit(&gateway, "[idempotency]", "[idempotency]\nmax_keys = 1500001");
    let reason = text(&reload(&gateway, 5)["reason"]);
    assert!(reason.starts_with("idempotency cannot change"), "the control: {reason}");
}
