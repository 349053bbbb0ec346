//! `/metrics`: both formats, as other programs read them, and what moves the samples.

use std::{
    collections::BTreeSet,
    io::Write,
    process::{Command, Stdio},
    time::UNIX_EPOCH,
};

use serde_json::Value;

use crate::support::*;

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Prints the samples of a text as a list of name, labels, value and exemplar. `le` is a number, which each
/// format writes in its own way.
const PARSER: &str = r#"
import json, sys
if sys.argv[1] == "openmetrics":
    from prometheus_client.openmetrics.parser import text_string_to_metric_families
else:
    from prometheus_client.parser import text_string_to_metric_families
def labels(sample):
    return {name: str(float(value)) if name == "le" else value for name, value in sample.labels.items()}
def exemplar(sample):
    it = sample.exemplar
    return it and {"labels": it.labels, "value": it.value, "time": float(it.timestamp)}
families = text_string_to_metric_families(sys.stdin.read())
samples = [[it.name, labels(it), float(it.value), exemplar(it)] for family in families for it in family.samples]
print(json.dumps(samples, sort_keys=True))
"#;

/// Gives a program a text to read. Returns what it prints.
fn fed(program: &str, args: &[&str], text: &str) -> String {
    let mut command = Command::new(program);
    let command = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        command.spawn().unwrap_or_else(|error| panic!("{program}: {error}; tests/run installs it"));
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn assert_promtool_accepts(text: &str) {
    fed("promtool", &["check", "metrics"], text);
}

/// The samples of a text, as Prometheus' own library for Python reads it.
fn samples(format: &str, text: &str) -> Vec<Value> {
    serde_json::from_str(&fed("/usr/bin/python3", &["-c", PARSER, format], text)).unwrap()
}

/// The text of both formats at a moment when nothing moves, 0.0.4 first.
fn both(gateway: &Gateway) -> [String; 2] {
    let scrape = |accept: &str| gateway.admin_with("/metrics", &format!("accept: {accept}\r\n")).body;
    wait_for("a moment when nothing moves", || {
        let [before, openmetrics, after] = ["*/*", "application/openmetrics-text", "*/*"].map(scrape);
        (before == after).then_some([after, openmetrics])
    })
}

/// The trace ids of all exemplars.
fn traces(samples: &[Value]) -> BTreeSet<&str> {
    samples.iter().filter_map(|sample| sample[3]["labels"]["trace_id"].as_str()).collect()
}

#[test]
fn promtool_accepts_the_metrics_and_requests_change_them() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    gateway.call();
    gateway.post("{}");
    gateway.records("outcome", 1);
    let metrics = gateway.admin("/metrics").body;
    assert_promtool_accepts(&metrics);
    for line in [
        r#"requests_total{code="",outcome="succeeded",stage="upstream"} 1"#,
        r#"requests_total{code="contract_violation",outcome="not_sent",stage="contract"} 1"#,
        r#"limit_checks_total{limit="rate_limit",result="passed"} 2"#,
        r#"limit_checks_total{limit="quota",result="passed"} 1"#,
        r#"token_fetches_total{credential="default",result="ok"} 1"#,
        r#"audit_records_total{kind="intent"} 1"#,
        r#"audit_records_total{kind="outcome"} 1"#,
        r#"upstream_connects_total{result="ok"} 1"#,
        r#"token_generation{credential="default"} 1"#,
        "upstream_connections 1",
        "request_duration_seconds_count 2",
    ] {
        assert!(metrics.contains(&format!("ccsqm_gateway_{line}")), "{line} in {metrics}");
    }
    for name in ["audit_bytes_total", "audit_batches_total"] {
        let line = metrics.lines().find_map(|line| line.strip_prefix(&format!("ccsqm_gateway_{name} ")));
        assert!(line.unwrap().parse::<f64>().unwrap() > 1.0, "{name} in {metrics}");
    }
}

#[test]
fn both_formats_have_the_same_samples_and_openmetrics_has_exemplars() {
    let now = || UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let begun = now();
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let (succeeded, refused) = ("4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c");
    let traced = |trace: &str| format!("traceparent: 00-{trace}-00f067aa0ba902b7-01\r\n");
    assert_eq!(gateway.call().outcome(), "succeeded", "no trace");
    assert_eq!(gateway.post_with(&traced(&"g".repeat(32))).outcome(), "succeeded", "no valid trace");
    gateway.records("outcome", 2);
    let [_, openmetrics] = both(&gateway);
    assert!(traces(&samples("openmetrics", &openmetrics)).is_empty(), "{openmetrics}");

    assert_eq!(gateway.post_with(&traced(succeeded)).outcome(), "succeeded");
    let [_, openmetrics] = both(&gateway);
    assert_eq!(traces(&samples("openmetrics", &openmetrics)), [succeeded].into(), "{openmetrics}");

    let code = gateway.send(&head(2, &traced(refused)), "{}").code().to_owned();
    assert_eq!(code, "contract_violation");
    gateway.records("outcome", 3);
    let [text, openmetrics] = both(&gateway);
    assert_promtool_accepts(&text);
    assert!(!text.contains("trace_id"), "{text}");
    let open = samples("openmetrics", &openmetrics);
    let traces = traces(&open);
    assert!(traces.contains(refused), "{openmetrics}");
    assert!(traces.iter().all(|trace| [succeeded, refused].contains(trace)), "{openmetrics}");
    for [name, labels, _, exemplar] in open.iter().map(|sample| [0, 1, 2, 3].map(|part| &sample[part])) {
        let Some(value) = exemplar["value"].as_f64() else { continue };
        assert_eq!(name, "ccsqm_gateway_request_duration_seconds_bucket");
        assert!(value <= labels["le"].as_str().unwrap().parse().unwrap(), "{labels} {exemplar}");
        assert!((begun..=now()).contains(&exemplar["time"].as_f64().unwrap()), "{exemplar}");
    }
    let bare = |samples: &[Value]| -> BTreeSet<String> {
        samples.iter().map(|sample| format!("{}{} {}", sample[0], sample[1], sample[2])).collect()
    };
    let (plain, open) = (bare(&samples("text", &text)), bare(&open));
    assert!(plain.len() > 50, "{text}");
    assert_eq!(plain.symmetric_difference(&open).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn scrape_gets_openmetrics_only_on_request() {
    let gateway = start(&sandbox());
    for (accept, content_type) in [
        ("", TEXT),
        ("accept: */*\r\n", TEXT),
        ("accept: application/openmetrics-text;q=0\r\n", TEXT),
        ("accept: application/openmetrics-text;q=0.5, text/plain\r\n", TEXT),
        (
            "accept: application/openmetrics-text;version=1.0.0, text/plain;version=0.0.4;q=0.5\r\n",
            OPENMETRICS,
        ),
        ("accept: text/plain;q=0.5\r\naccept: application/openmetrics-text\r\n", OPENMETRICS),
    ] {
        let reply = gateway.admin_with("/metrics", accept);
        assert_eq!((reply.status, &*reply.headers["content-type"]), (200, content_type), "{accept}");
        assert_eq!(reply.body.ends_with("\n# EOF\n"), content_type == OPENMETRICS, "{accept}");
    }
}
