//! What came of changed files is told by `/status`, metrics and log, and cleared when it is mended.

use std::{fs, sync::Arc, time::UNIX_EPOCH};

use ccsqm_gateway::sandbox::Options;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    callers::{CALLER, Ca, SERVER, listener, swap},
    support::*,
};

/// How one thing stands: whether it is in use, its last error, and whether that is over.
fn stands(gateway: &Gateway, what: &str) -> (bool, String, bool) {
    let status = gateway.admin("/status").json();
    let of = &status["config"][what];
    let last = &of["last_error"];
    let is_good = of["successful"].as_bool().unwrap_or_else(|| panic!("{what}: {status}"));
    (is_good, last["detail"].as_str().unwrap_or_default().to_owned(), last["over"].is_string())
}

fn metric(gateway: &Gateway, name: &str, what: &str) -> i64 {
    let metrics = gateway.admin("/metrics").body;
    let begin = format!("ccsqm_gateway_config_last_reload_{name}{{what=\"{what}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&begin));
    line.unwrap_or_else(|| panic!("{begin}: {metrics}")).parse().unwrap()
}

/// In seconds since 1970.
fn now() -> i64 {
    i64::try_from(UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap()
}

#[test]
fn failed_file_change_is_reported_with_its_time_until_corrected() {
    let (sandbox, ca) = (sandbox(), Ca::new());
    let folder = Arc::new(TempDir::new().unwrap());
    let own = ca.issue(CALLER);
    for (name, text) in [("ca.pem", ca.0.pem()), ("own.pem", own.certificate), ("own.key", own.key)]
        .into_iter()
        .chain(["proxy_user", "proxy_password"].map(|name| (name, "gateway".to_owned())))
    {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let caller = listener(&folder, &ca.issue(SERVER), "");
    let setup = Setup { folder: Some(folder.clone()), caller, ..Setup::default() };
    let setup = setup.set("upstream.ca_file", "ca.pem").set("upstream.client_cert_file", "own.pem");
    let setup = setup.set("upstream.proxy", format!("http://{}", free()));
    let setup = setup.set("upstream.proxy_user_file", "proxy_user");
    let setup = setup.set("upstream.proxy_password_file", "proxy_password");
    // The files of TLS are read where something is spoken to over TLS.
    let setup = Setup { base_url: Some(format!("https://{}", free())), ..setup };
    let gateway = start_with(&sandbox, setup.set("upstream.client_key_file", "own.key"));
    wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));

    let listener = format!("listener {}", gateway.second.unwrap());
    let config = fs::read_to_string(folder.path().join("gateway.toml")).unwrap();
    let unread = config.replace("qa-console", "qa console");
    let refused = Options::default().app_secret + "-of-nobody";
    let cases: [(&str, &str, &str, &str); 9] = [
        ("configuration", "gateway.toml", &unread, "callers[0].name"),
        ("credential default", "app_secret", "", "app_secret"),
        ("credential default", "app_secret", &refused, "token_refused"),
        (&listener, "server.pem", "rubbish", "server.pem"),
        ("upstream client_cert_file", "own.pem", "rubbish", "own.pem"),
        ("upstream ca_file", "ca.pem", "rubbish", "ca.pem"),
        ("upstream ca_file", "ca.pem", "", "ca.pem"),
        ("upstream proxy_password_file", "proxy_user", "gate:way", "proxy_user_file contains a colon"),
        ("upstream proxy_password_file", "proxy_password", "", "proxy_password is empty"),
    ];
    for (what, file, bad, says) in cases {
        let good = fs::read_to_string(folder.path().join(file)).unwrap();
        assert!(stands(&gateway, what).0, "the control of {what}");
        let (lines, began) = (gateway.log().len(), metric(&gateway, "success_timestamp_seconds", what));
        swap(&folder, file, bad);
        let (_, detail, is_over) = wait_for(what, || Some(stands(&gateway, what)).filter(|it| !it.0));
        assert!(detail.contains(says) && !is_over, "{what}: {detail}");
        assert_eq!(metric(&gateway, "successful", what), 0, "{what}");
        assert_eq!(metric(&gateway, "success_timestamp_seconds", what), began, "{what}");
        wait_for("the log", || gateway.log()[lines..].contains(says).then_some(()));
        let others: Vec<_> = cases.iter().map(|case| case.0).filter(|other| *other != what).collect();
        assert!(others.iter().all(|other| stands(&gateway, other).0), "{what}");

        let mended = wait_for("another second", || Some(now()).filter(|now| *now > began));
        swap(&folder, file, &good);
        let (_, detail, is_over) = wait_for(what, || Some(stands(&gateway, what)).filter(|it| it.0));
        assert!(detail.contains(says) && is_over, "{what}: {detail}");
        assert_eq!(metric(&gateway, "successful", what), 1, "{what}");
        let told = metric(&gateway, "success_timestamp_seconds", what);
        assert!((mended..=now()).contains(&told), "{what}: {told}, mended at {mended}");
    }
}

#[test]
fn unwritable_trail_is_reported_with_its_time_until_writable() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let told = || {
        let metrics = gateway.admin("/metrics").body;
        let value = |name: &str| {
            let line =
                metrics.lines().find_map(|line| line.strip_prefix(&format!("ccsqm_gateway_audit_{name} ")));
            line.unwrap().parse::<u64>().unwrap()
        };
        let mut audit = gateway.admin("/status").json()["audit"].take();
        // They are asked one after the other.
        let is_same = (audit["healthy"] == true) == (value("healthy") == 1);
        is_same.then(|| (value("healthy") == 1, value("free_bytes"), audit["last_error"].take()))
    };
    let (_, free, last) = wait_for("the free space", || told().filter(|told| told.1 > 0));
    assert!(last.is_null() && free > 1 << 20);
    let (audit, away) = (gateway.audit_directory(), gateway.folder.path().join("away"));
    fs::rename(&audit, &away).unwrap();
    let (.., last) = wait_for("the loss", || told().filter(|told| !told.0));
    assert!(last["detail"].as_str().unwrap().contains("directory was moved"), "{last}");
    assert!(last["since"].is_string() && last["over"].is_null(), "{last}");
    assert_eq!(gateway.call().code(), "audit_unavailable");
    fs::rename(&away, &audit).unwrap();
    let over = wait_for("its end", || told().filter(|told| told.0 && told.2["over"] != Value::Null));
    assert_eq!(over.2["since"], last["since"]);
    assert_eq!(gateway.call().outcome(), "succeeded");
}
