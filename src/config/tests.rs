//! The reference file against the code: its keys, defaults and bounds are those that the code has.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use ::config::ValueKind;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::context::Reading;
use super::trail::CALL;
use super::{Config, Problems, source};

use crate::preflight;
use crate::preflight::Preflight;

const REFERENCE: &str = include_str!("../../config/gateway.toml");
const MINIMAL: &str = include_str!("../../config/minimal.toml");

/// Returns a directory with everything that a shipped file names, and the file's text with the paths of that
/// directory.
fn placed(text: &str) -> (TempDir, String) {
    let folder = TempDir::new().unwrap();
    for secret in ["app_key", "app_secret", "audit.key", "proxy_user", "proxy_password"] {
        fs::write(folder.path().join(secret), "0123456789abcdef0123456789abcdef").unwrap();
    }
    let root = rcgen::generate_simple_self_signed(vec!["root".to_owned()]).unwrap();
    // One self-signed certificate does for all: only that the files parse and match is checked, not whom they
    // would admit.
    for name in ["ca.pem", "client-ca.pem", "cert.pem", "client.pem"] {
        fs::write(folder.path().join(name), root.cert.pem()).unwrap();
    }
    for name in ["tls.key", "client.key"] {
        fs::write(folder.path().join(name), root.signing_key.serialize_pem()).unwrap();
    }
    fs::write(folder.path().join("crl.pem"), revocation_list()).unwrap();
    // The reference file sets `must_exist`.
    fs::create_dir(folder.path().join("audit")).unwrap();
    let contracts = concat!("\"", env!("CARGO_MANIFEST_DIR"), "/config/contracts/");
    let text = text
        .replace("/run/secrets/ccsqm/", "")
        .replace("/etc/ssl/certs/ca-certificates.crt", "ca.pem")
        .replace("/etc/ccsqm-gateway/tls/", "")
        .replace("\"contracts/", contracts);
    (folder, text)
}

fn revocation_list() -> String {
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod,
        KeyPair, SerialNumber, date_time_ymd,
    };
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let list = CertificateRevocationListParams {
        // Valid for a century, so that the test does not fail one day.
        this_update: date_time_ymd(2024, 1, 1),
        next_update: date_time_ymd(2124, 1, 1),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(&Issuer::new(ca, KeyPair::generate().unwrap())).unwrap().pem().unwrap()
}

fn load(folder: &TempDir, text: &str) -> Result<(Config, Vec<String>), Problems> {
    let path = folder.path().join("gateway.toml");
    fs::write(&path, text).unwrap();
    Config::load_with_keys(&path, &[], [], &Preflight, Reading::default())
}

fn effective(text: &str) -> Value {
    let (folder, text) = placed(text);
    let (config, _) = load(&folder, &text).unwrap();
    // The directory is temporary: without its name, two effective configurations can be compared.
    let shown = config.effective().to_string();
    serde_json::from_str(&shown.replace(folder.path().to_str().unwrap(), "")).unwrap()
}

/// All keys that the reference file sets, without the names of headers. Keys of all tables of a list count
/// together.
fn keys_of_the_file(path: &Path) -> BTreeSet<String> {
    fn gather(value: &::config::Value, path: &str, keys: &mut BTreeSet<String>) {
        match &value.kind {
            // A section of names that the user chooses.
            ValueKind::Table(_) if path == "upstream.headers" => {}
            ValueKind::Table(members) => {
                for (name, member) in members {
                    let key = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    keys.insert(key.clone());
                    gather(member, &key, keys);
                }
            }
            ValueKind::Array(items) => items.iter().for_each(|item| gather(item, path, keys)),
            _ => {}
        }
    }
    let mut keys = BTreeSet::new();
    gather(&source::read(Some(path), &[], &[]).unwrap().root, "", &mut keys);
    keys
}

#[test]
fn reference_file_holds_exactly_the_keys_that_the_code_reads() {
    let (folder, text) = placed(REFERENCE);
    let (_, asked) = load(&folder, &text).unwrap();
    // A key of one item stands for the key of all: `callers[0].peer` becomes `callers.peer`.
    let without_index =
        |key: String| key.split('[').map(|part| part.split_once(']').map_or(part, |p| p.1)).collect();
    let asked: BTreeSet<String> = asked.into_iter().map(without_index).collect();
    let written = keys_of_the_file(&folder.path().join("gateway.toml"));
    let only_asked: Vec<_> = asked.difference(&written).collect();
    assert_eq!(
        only_asked,
        ["credentials.app_key_env", "credentials.app_secret_env"],
        "alternatives, in a comment"
    );
    for key in only_asked {
        let name = key.rsplit('.').next().unwrap();
        assert!(REFERENCE.contains(&format!("# or {name} = ")), "{key} stands in no comment");
    }
    let only_written: Vec<_> = written.difference(&asked).collect();
    assert!(only_written.is_empty(), "{only_written:?}");
    // Guards against a comparison of two empty sets.
    assert!(asked.len() > 60, "{}", asked.len());
}

#[test]
fn reference_file_shows_the_defaults() {
    let (mut reference, mut least) = (effective(REFERENCE), effective(MINIMAL));
    // What the reference file shows, though it is not a default. Each must differ, or it has become a default and
    // the file's comment is wrong.
    for shown in [
        "/upstream/ca_file",
        "/upstream/headers",
        "/upstream/reply_headers",
        "/upstream/client_cert_file",
        "/upstream/client_key_file",
        "/upstream/proxy",
        "/upstream/proxy_user_file",
        "/upstream/proxy_password_file",
        "/audit/key_file",
        "/audit/must_exist",
        "/audit/max_size",
        "/admin/control",
        "/listeners/1",
        "/routes/1",
        "/callers/0/require_header",
        "/callers/0/max_keys",
    ] {
        assert_ne!(reference.pointer(shown), least.pointer(shown), "{shown} is a default after all");
    }
    for (section, key) in [
        ("upstream", "ca_file"),
        ("upstream", "headers"),
        ("upstream", "reply_headers"),
        ("upstream", "client_cert_file"),
        ("upstream", "client_key_file"),
        ("upstream", "proxy"),
        ("upstream", "proxy_user_file"),
        ("upstream", "proxy_password_file"),
        ("audit", "key_file"),
        ("audit", "must_exist"),
        ("audit", "max_size"),
        ("admin", "control"),
    ] {
        reference[section].as_object_mut().unwrap().remove(key);
        least[section].as_object_mut().unwrap().remove(key);
    }
    for configuration in [&mut reference, &mut least] {
        let caller = configuration["callers"][0].as_object_mut().unwrap();
        caller.retain(|key, _| !["require_header", "max_keys"].contains(&key.as_str()));
    }
    for (list, further) in [("listeners", 2), ("routes", 1)] {
        let more = reference[list].as_array_mut().unwrap().split_off(1);
        assert_eq!(more.len(), further, "{list}");
    }
    assert_eq!(reference, least);
}

#[test]
fn reference_file_shows_the_defaults_of_list_items() {
    let reference = effective(REFERENCE);
    for (line, pointer) in [
        ("mode = \"0660\"", "/listeners/1/mode"),
        ("result_field = \"resultCode\"", "/routes/1/result_field"),
    ] {
        assert!(REFERENCE.contains(line), "{line}");
        let without = effective(&REFERENCE.replace(line, "# "));
        assert_eq!(without.pointer(pointer), reference.pointer(pointer), "{pointer}");
        assert_ne!(reference.pointer(pointer), Some(&Value::Null), "{pointer}");
    }
    // Keys that replace a value elsewhere have no default: `null` means that the caller's or the upstream's
    // counts.
    for (line, pointer) in [
        ("credential = \"default\"              #", "/routes/1/credential"),
        ("timeout = \"30s\"                     # instead", "/routes/1/timeout"),
    ] {
        assert!(REFERENCE.contains(line), "{line}");
        let without = effective(&REFERENCE.replace(line, "# "));
        assert_eq!(without.pointer(pointer), Some(&json!(null)), "{pointer}");
    }
}

/// Removes from a schema what cannot be in a TOML file: null, and the defaults of keys that must be set.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Object(members) => {
            members.retain(|name, value| name != "default" || !value.is_null());
            if let Some(Value::Array(types)) = members.get_mut("type") {
                types.retain(|name| name != "null");
                if let [only] = &mut types[..] {
                    members["type"] = only.take();
                }
            }
            if let Some(Value::Array(kinds)) = members.get_mut("anyOf") {
                kinds.retain(|kind| kind["type"] != "null");
            }
            for name in members.get("required").and_then(Value::as_array).cloned().into_iter().flatten() {
                let property = members.get_mut("properties").and_then(|all| all.get_mut(name.as_str()?));
                property.and_then(Value::as_object_mut).map(|property| property.shift_remove("default"));
            }
            members.values_mut().for_each(tidy);
        }
        _ => {}
    }
}

#[test]
fn editor_schema_is_generated_from_the_code() {
    let mut schema = schemars::schema_for!(Config).to_value();
    tidy(&mut schema);
    // A default path is written as an absolute one, which would differ in each checkout.
    let schema = format!("{schema:#}\n").replace(concat!(env!("CARGO_MANIFEST_DIR"), "/"), "");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/gateway.schema.json");
    if fs::read_to_string(&file).is_ok_and(|old| old == schema) {
        return;
    }
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/gateway.schema.json");
    fs::write(&made, schema).unwrap();
    panic!("it is another one now: cp {} {}", made.display(), file.display());
}

/// Loads the minimal configuration with one text replaced, and with flags over it.
fn minimal(replaced: (&str, &str), set: &[(&str, &str)]) -> Result<Config, Problems> {
    let (folder, text) = placed(MINIMAL);
    let path = folder.path().join("gateway.toml");
    fs::write(&path, text.replace(replaced.0, replaced.1)).unwrap();
    let set: Vec<_> = set.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    preflight::load(&path, &set, [])
}

#[test]
fn trail_growth_follows_caller_limits_and_quota() {
    let caller = "routes = [\"appointQualityTask\"]";
    let limit = |limit: &str| format!("{caller}\n{limit}");
    let second = |limit: &str| {
        let second = "[[callers]]\nname = \"other\"\npeer = \"10.0.0.0/8\"\noperator_id = \"1\"\ncredential = \"default\"";
        let listener = "[[listeners]]\naddress = \"10.0.0.1:1\"\nhosts = [\"a\"]\nallow_plaintext = true";
        format!("{caller}\n{second}\n{caller}\n{limit}\n{listener}\n[[listeners]]\naddress = \"127.0.0.1:2\"")
    };
    for (callers, set, hourly) in [
        (limit(""), vec![], 72_000), // 20/s
        (limit("rate_limit = \"3/m\""), vec![], 180),
        // 50/s, the quota, is the stricter bound here.
        (limit("rate_limit = \"100/s\""), vec![], 180_000),
        (limit("rate_limit = \"100/s\""), vec![("quota.rate", "7/h")], 7),
        (second(""), vec![], 144_000),
        (second("frozen = true"), vec![], 144_000), // it may thaw
    ] {
        let config = minimal((caller, &callers), &set).unwrap();
        let size = config.trail_size();
        assert_eq!(size.calls_per_hour(), hourly, "{callers} {set:?}");
        assert_eq!(size.calls_per_day(), hourly * 24 * CALL);
        assert_eq!(size.max_size_lasts(false), None);
    }
}

#[test]
fn max_size_must_hold_the_trail_of_the_whole_window() {
    let set = |size: u64| [("audit.max_size", format!("{size}B")), ("idempotency.window", "2h".to_owned())];
    let load = |size: u64| {
        let set = set(size);
        minimal(("", ""), &set.each_ref().map(|(key, value)| (*key, &**value)))
    };
    // 20/s for three hours (the window and the slack), a burst, and two segments that do not count.
    let least = (20 * 3600 * 3 + 40) * CALL + (128 << 20);
    let config = load(least).unwrap();
    let lasts = |config: &Config, with_refusals| config.trail_size().max_size_lasts(with_refusals).unwrap();
    assert_eq!(lasts(&config, false), Duration::from_secs(3 * 3600));
    assert!(lasts(&config, true) < Duration::from_secs(3 * 3600));
    assert!(lasts(&load(2 * least).unwrap(), false) > Duration::from_secs(6 * 3600));
    let told = load(least - 1).unwrap_err().to_string();
    assert!(told.contains("audit.max_size: must be \"396MiB\" or more"), "{told}");
    assert!(told.contains("last 3 hours") && told.contains("72000 calls an hour"), "{told}");
    // One mistake is one line: how much the trail needs is not reported for a rate that is wrong.
    let told = minimal(("", ""), &[("audit.max_size", "2GiB"), ("quota.rate", "many")]).unwrap_err();
    assert_eq!(told.iter().count(), 1, "{told}");
    assert_eq!(minimal(("", ""), &[("audit.max_size", "none")]).unwrap().audit.max_size, None);
}

#[test]
fn max_size_must_hold_at_least_four_segments() {
    let load = |size, more: &[(&str, &str)]| {
        let set = [&[("audit.max_size", size), ("quota.rate", "1/h")], more].concat();
        minimal(("", ""), &set)
    };
    let segments = [("audit.segment_size", "64MiB")];
    assert!(load("256MiB", &segments).is_ok());
    let told = load("255MiB", &segments).unwrap_err().to_string();
    assert!(
        told.contains(r#"audit.max_size: must be "256MiB" or more, which is 4 times audit.segment_size"#),
        "{told}"
    );
    assert_eq!(load("255MiB", &[]).unwrap().audit.segment_size, 65_280 << 10, "nobody set it");
}

#[test]
fn space_for_retain_is_reported_if_nothing_else_bounds_the_trail() {
    let lines = |set: &[(&str, &str)]| minimal(("", ""), set).unwrap().trail_size().lines().join("\n");
    let told = lines(&[]);
    assert!(told.contains("72000 calls an hour are allowed, which take 2.1 GiB a day"), "{told}");
    assert!(told.contains("retain = 30 days needs 63 GiB for calls"), "{told}");
    let told = lines(&[("audit.max_size", "4GiB")]);
    assert!(
        told.contains(
            "max_size = 4 GiB holds 44.4 hours of these calls, or 25.2 hours of calls and refusals"
        ),
        "{told}"
    );
    let told = lines(&[("audit.retain", "forever")]);
    assert!(told.contains("Nothing bounds the trail"), "{told}");
}

#[test]
fn bounds_named_in_the_reference_file_are_enforced() {
    let (folder, text) = placed(REFERENCE);
    let reason = |number: usize, line: &str| {
        let lines = text.lines().enumerate().map(|(i, old)| if i == number { line } else { old });
        let told = load(&folder, &lines.collect::<Vec<_>>().join("\n")).err().map(|error| error.to_string());
        told.filter(|told| {
            told.contains("must be from") || told.contains("whole number from") || told.contains("at most")
        })
    };
    let mut bounded = 0;
    for (number, line) in REFERENCE.lines().enumerate() {
        let Some((name, value)) = line.split(" #").next().unwrap().split_once(" = ") else { continue };
        // A value far beyond any bound, in the form of the value that the file shows, provokes the text with the
        // bounds.
        let absurd = match value.trim() {
            number if number.parse::<u64>().is_ok() => "99999999999",
            rate if rate.ends_with("/s\"") => "\"99999999/s\"",
            quantity if quantity.as_bytes()[1].is_ascii_digit() && quantity.ends_with("s\"") => "\"99999d\"",
            quantity if quantity.ends_with("iB\"") => "\"99999GiB\"",
            _ => continue,
        };
        let told =
            reason(number, &format!("{name} = {absurd}")).unwrap_or_else(|| panic!("{line} has no bound"));
        let told = told.rsplit("must be ").next().unwrap();
        let bounds = told.trim_start_matches("a whole number ").trim_start_matches("from ");
        let comment = line.split_once(" # ").map_or("", |(_, comment)| comment);
        assert!(comment.contains(bounds), "{line}\nshould say: {bounds}");
        let range = bounds.split(", or ").next().unwrap(); // `workers` takes a word, too
        if let Some((low, high)) = range.split_once(" to ") {
            // Both bounds are included: each must be accepted.
            for bound in [low, high] {
                let quoted = if absurd.starts_with('"') { format!("\"{bound}\"") } else { bound.to_owned() };
                assert_eq!(reason(number, &format!("{name} = {quoted}")), None, "{name} = {quoted}");
            }
        }
        bounded += 1;
    }
    // Guards against a pattern that matches nothing any more.
    assert!(bounded >= 20, "{bounded} bounds");
}
