//! Configuration files: those that are shipped, and those that are wrong.

use std::fs;

use tempfile::TempDir;

use crate::support::command;

/// The shipped configuration, with secrets where it looks for them.
fn shipped(name: &str) -> (TempDir, String) {
    let folder = TempDir::new().unwrap();
    let root = env!("CARGO_MANIFEST_DIR");
    for file in ["contracts", "sandbox-secrets"] {
        let to = folder.path().join(file);
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(format!("{root}/config/{file}")).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
        }
    }
    for secret in ["app_key", "app_secret", "audit.key"] {
        fs::write(folder.path().join(secret), "0123456789abcdef0123456789abcdef").unwrap();
    }
    let text = fs::read_to_string(format!("{root}/config/{name}")).unwrap();
    let text =
        text.replace("/run/secrets/ccsqm/", "").replace("/etc/ssl/certs/ca-certificates.crt", "app_key");
    (folder, text)
}

fn check(folder: &TempDir, text: &str) -> (i32, String, String) {
    let path = folder.path().join("gateway.toml");
    fs::write(&path, text).unwrap();
    command(&["check", "--config", path.to_str().unwrap()])
}

#[test]
fn every_shipped_file_is_good() {
    for name in ["gateway.toml", "minimal.toml", "sandbox.toml"] {
        let (folder, text) = shipped(name);
        let (code, out, error) = check(&folder, &text);
        assert_eq!(code, 0, "{name}: {error}");
        assert!(out.contains("every process in this network namespace"), "{name}");
        assert!(!out.contains("0123456789abcdef") && !out.contains("sandbox-app-secret"), "{name}");
    }
}

#[test]
fn five_mistakes_are_five_lines_with_their_places() {
    let (folder, text) = shipped("gateway.toml");
    let mut text = text;
    let mut lines = Vec::new();
    for (good, bad, key) in [
        ("workers = 1 ", "workers = 0 ", "server.workers"),
        ("header_timeout = \"10s\"", "header_timeout = 10", "server.header_timeout"),
        ("max_body", "max_bodi", "server.max_bodi"),
        ("peer = \"loopback\"", "peer = \"10.0.0.0/8\"", "callers[0].peer"),
        ("rate = \"50/s\"", "rate = \"50\"", "quota.rate"),
    ] {
        let at = text.find(good).unwrap_or_else(|| panic!("{good}"));
        lines.push((text[..at].matches('\n').count() + 1, key));
        text = text.replacen(good, bad, 1);
    }
    let (code, _, error) = check(&folder, &text);
    assert_eq!(code, 78);
    let found: Vec<_> = error.lines().collect();
    assert_eq!(found.len(), 5, "{error}");
    for (line, key) in lines {
        assert!(
            found.iter().any(|found| found.contains(&format!("gateway.toml:{line}: {key}: "))),
            "{line} {key}: {error}"
        );
    }
}

#[test]
fn what_would_be_dangerous_is_refused() {
    let (folder, text) = shipped("minimal.toml");
    assert_eq!(check(&folder, &text).0, 0, "the control");
    for (more, reason) in [
        ("[upstream]\nbase_url = \"http://service.besclouds.com\"\n", "loopback address only"),
        ("[[listeners]]\naddress = \"0.0.0.0:8080\"\n", "allow_plaintext"),
        (
            "[[callers]]\nname = \"b\"\npeer = \"loopback\"\noperator_id = \"1\"\ncredential = \"default\"\nroutes = [\"appointQualityTask\"]\n",
            "can be both",
        ),
        (
            "[[credentials]]\nname = \"b\"\napp_key = \"k\"\napp_secret = \"s\"\n",
            "must not stand in the configuration",
        ),
        ("[upstream.headers]\nauthorization = \"x\"\n", "set by the gateway itself"),
    ] {
        let (code, _, error) = check(&folder, &(text.clone() + more));
        assert!(code == 78 && error.contains(reason), "{more}: {error}");
    }
}
