//! Variables of the environment, `healthcheck`, which reads them, too, and defaults beside what somebody set.

use std::{fs, net::TcpListener, process::Command, sync::Arc};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::*;

/// Runs the binary with nothing in the environment but these variables: exit code, stdout, stderr.
fn run(args: &[&str], variables: &[(&str, &str)]) -> (i32, String, String) {
    let output =
        Command::new(BINARY).args(args).env_clear().envs(variables.iter().copied()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The configuration of a gateway that was started once.
fn configured() -> (Arc<TempDir>, String) {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let path = folder.path().join("gateway.toml").display().to_string();
    (folder, path)
}

#[test]
fn header_named_by_a_variable_is_sent_with_dashes() {
    let sandbox = sandbox();
    let variable = "CCSQM_GATEWAY__UPSTREAM__HEADERS__X_TENANTSPACEID=7";
    for (flag, sent) in [(None, "x-tenantspaceid: 7"), (Some("8"), "x-tenantspaceid: 8")] {
        let mut setup = Setup { through: vec!["env".into(), variable.into()], ..Setup::default() };
        // The same header in other capitals, from a layer above.
        setup.set.extend(flag.map(|value| ("upstream.headers.X-TenantSpaceId", value.to_owned())));
        assert_eq!(start_with(&sandbox, setup).call().outcome(), "succeeded");
        let head = String::from_utf8(sandbox.requests().pop().unwrap().head).unwrap().to_lowercase();
        let headers: Vec<_> = head.lines().filter(|line| line.contains("tenantspaceid")).collect();
        assert_eq!(headers, [sent], "{head}");
    }
}

#[test]
fn variable_without_double_underscores_warns_with_the_right_name() {
    let (folder, path) = configured();
    let notices = |variables: &[(&str, &str)]| {
        let (code, out, error) = run(&["check", "--json", "--config", &path], variables);
        assert_eq!(code, 0, "{error}");
        serde_json::from_str::<Value>(&out).unwrap()["notices"].to_string()
    };
    for (name, meant, value) in [
        ("CCSQM_GATEWAY_SERVER_WORKERS", "CCSQM_GATEWAY__SERVER__WORKERS", "2"),
        ("CCSQM_GATEWAY_SERVER__WORKERS", "CCSQM_GATEWAY__SERVER__WORKERS", "2"),
        ("ccsqm_gateway__server__workers", "CCSQM_GATEWAY__SERVER__WORKERS", "2"),
        ("CCSQM_GATEWAY_AUDIT_MUST_EXIST", "CCSQM_GATEWAY__AUDIT__MUST_EXIST", "true"),
        (
            "CCSQM_GATEWAY_UPSTREAM_HEADERS_X_TENANTSPACEID",
            "CCSQM_GATEWAY__UPSTREAM__HEADERS__X_TENANTSPACEID",
            "2",
        ),
    ] {
        let told = format!("the variable {name} is not read: the setting is named {meant}\"");
        assert!(notices(&[(name, value)]).contains(&told), "{told}");
        assert!(!notices(&[(meant, value)]).contains("is not read"), "the control: {meant}");
    }
    // Kubernetes sets such variables for services of our name, and other programs have their own.
    for name in [
        "CCSQM_GATEWAY_SERVICE_HOST",
        "CCSQM_GATEWAY_PORT_8080_TCP",
        "CCSQM_GATEWAY_ADMIN_SERVICE_HOST",
        "CCSQM_GATEWAY_ADMIN_PORT",
        "CCSQM_GATEWAY_TOKEN",
        "CCSQM_GATEWAYS_SERVER_WORKERS",
        "MY_CCSQM_GATEWAY_SERVER_WORKERS",
    ] {
        assert!(!notices(&[(name, "2")]).contains("is not read"), "{name}");
    }
    let mut command = Command::new("env");
    command.args(["CCSQM_GATEWAY_SERVER_WORKERS=2", BINARY, "serve", "--config", &path]);
    let gateway = spawn(command, &folder);
    let log = gateway.log();
    let warning = log.lines().find(|line| line.contains("CCSQM_GATEWAY_SERVER_WORKERS is not read"));
    assert!(warning.is_some_and(|line| line.contains("\"WARN\"")), "{log}");
}

#[test]
fn healthcheck_finds_the_admin_listener_of_its_gateway() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    let admin = gateway.admin.to_string();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let file = gateway.folder.path().join("other.toml");
    let other = file.to_str().unwrap().to_owned();
    // What a gateway that runs needs no more is not looked at.
    fs::write(&file, format!("[admin]\naddress = \"{admin}\"\n[server]\nworkers = 0\n")).unwrap();
    let variable = "CCSQM_GATEWAY__ADMIN__ADDRESS";
    let by_name = format!("localhost:{}", gateway.admin.port());
    let (good, bad) = ([(variable, &*admin)], [(variable, &*closed)]);
    for (args, variables, expected) in [
        (&[][..], &good[..], 0),
        (&[], &bad, 1),
        (&["--config", &other], &[], 0),
        (&["--config", &other], &bad, 1),
        (&["--config", &other, "--admin", &closed], &good, 1),
        (&["--admin", &by_name], &bad, 0),
        (&["--admin", &by_name, "--ready"], &[], 0),
        (&["--admin", "no-such-host.invalid:9090"], &[], 1),
        (&["--admin", "localhost"], &[], 2),
        (&["--config", "/absent"], &good, 78),
        (&[], &[(variable, "localhost")], 78),
    ] {
        let args: Vec<_> = ["healthcheck"].iter().chain(args).copied().collect();
        let asked = || run(&args, variables);
        if expected == 0 {
            wait_for(&format!("{args:?} {variables:?}"), || (asked().0 == 0).then_some(()));
        } else {
            let (code, _, error) = asked();
            assert!(code == expected && !error.is_empty(), "{args:?} {variables:?}: {code} {error}");
        }
    }
    fs::write(&file, "[admin\naddress = \"127.0.0.1:1\"\n").unwrap();
    let (code, _, error) = run(&["healthcheck", "--config", &other], &good);
    assert!(code == 78 && error.contains("other.toml:1: file: "), "{error}");
}

#[test]
fn default_yields_to_a_set_value_and_two_set_values_must_agree() {
    let (_folder, path) = configured();
    let check = |set: &[&str]| {
        let flags = set.iter().flat_map(|set| ["--set", set]);
        run(&["check", "--json", "--config", &path].into_iter().chain(flags).collect::<Vec<_>>(), &[])
    };
    let few = ["quota.rate=1/h", "quota.burst=1"];
    for (set, pointer, value, contradicts) in [
        ("upstream.timeout=1s", "upstream/connect_timeout", "1s", "upstream.connect_timeout=3s"),
        ("upstream.connect_timeout=40s", "upstream/timeout", "40s", "upstream.timeout=30s"),
        ("audit.max_size=1MiB", "audit/segment_size", "256KiB", "audit.segment_size=64MiB"),
        ("server.workers=auto", "upstream/max_connections", "1", "server.workers=2"),
    ] {
        let mut all: Vec<_> = few.into_iter().chain([set]).collect();
        all.extend((set == "server.workers=auto").then_some("upstream.max_connections=1"));
        let (code, out, error) = check(&all);
        assert_eq!(code, 0, "{set}: {error}{out}");
        let checked: Value = serde_json::from_str(&out).unwrap();
        let shown = checked["configuration"].pointer(&format!("/{pointer}")).unwrap().to_string();
        assert_eq!(shown.trim_matches('"'), value, "{set}");
        all.push(contradicts);
        assert_eq!(check(&all).0, 78, "{all:?}");
    }
    let text = fs::read_to_string(&path).unwrap();
    let own_grace = text.replace("drain_grace = \"0s\"", "drain_grace = \"15s\"");
    let own_share = text.replace("peer = \"loopback\"", "peer = \"loopback\"\nmax_keys = 2000000");
    for (text, pointer, value, contradicts) in [
        (own_grace, "server/drain_timeout", "30s", "server.drain_timeout=10s"),
        (own_share, "idempotency/max_keys", "2000000", "idempotency.max_keys=1000000"),
    ] {
        fs::write(&path, text).unwrap();
        let (code, out, error) = check(&[]);
        assert_eq!(code, 0, "{pointer}: {error}{out}");
        let checked: Value = serde_json::from_str(&out).unwrap();
        let shown = checked["configuration"].pointer(&format!("/{pointer}")).unwrap().to_string();
        assert_eq!(shown.trim_matches('"'), value);
        assert_eq!(check(&[contradicts]).0, 78, "{contradicts}");
    }
}
