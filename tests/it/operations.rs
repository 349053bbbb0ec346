//! What ops see: the admin listener, health, the stop.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Fault, Faults};
use serde_json::json;

use crate::{
    callers::{caller, unix_listener},
    support::*,
};

#[test]
fn readiness_waits_for_the_first_token_and_reports_it() {
    let sandbox = sandbox();
    script(&sandbox, Faults { token_down: true, ..Faults::default() });
    let gateway = start(&sandbox);
    let admin = gateway.admin.to_string();
    assert_eq!(command(&["healthcheck", "--admin", &admin]).0, 0);
    let (code, out, _) = command(&["healthcheck", "--ready", "--admin", &admin]);
    assert!(code == 1 && out.contains("no token yet"), "{out}");
    script(&sandbox, Faults::default());
    gateway.call();
    wait_for("readiness", || (gateway.admin("/readyz").status == 200).then_some(()));
}

#[test]
fn endless_admin_response_does_not_block_the_healthcheck() {
    const HEAD: &str = "HTTP/1.1 200 OK\r\n\r\n";
    let listeners = [Duration::from_millis(50), Duration::ZERO].map(|pause| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(HEAD.as_bytes()).unwrap();
            while stream.write_all(&[b'x'; 1024]).is_ok() {
                thread::sleep(pause);
            }
        });
        address
    });
    for (address, told) in listeners.into_iter().zip(["timed out", "has no end"]) {
        let mut child = Command::new(BINARY);
        child.args(["healthcheck", "--admin", &address.to_string()]);
        let mut child = Running(child.stderr(Stdio::piped()).spawn().unwrap());
        let code = wait_for("the end", || child.0.try_wait().unwrap()).code();
        let mut said = String::new();
        child.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(code == Some(1) && said.contains(told), "{said}");
    }
    let gateway = start(&sandbox());
    assert_eq!(command(&["healthcheck", "--admin", &gateway.admin.to_string()]).0, 0, "the control");
}

#[test]
fn requests_in_flight_finish_during_drain() {
    let sandbox = sandbox();
    let mut gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    script(&sandbox, Faults::business(Fault::delayed(500)));
    let mut stream = crate::outcomes::triggers::hold(&sandbox, &gateway, "", BODY);
    gateway.signal("-TERM");
    assert_eq!(read_reply(&mut stream).outcome(), "succeeded");
    assert!(gateway.wait().success());
    let all = records(&gateway.audit_directory(), "");
    assert_eq!(all.last().unwrap()["event"], "stop");
    assert_eq!(all[all.len() - 2]["outcome"], "succeeded");
}

#[test]
fn soft_limit_on_open_files_is_raised_to_the_hard_limit() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let mut command = Command::new("sh");
    command.args(["-c", r#"ulimit -Sn 128 && exec "$0" serve --config "$1""#, BINARY]);
    command.arg(folder.path().join("gateway.toml")).stderr(Stdio::null());
    let running = Running(command.spawn().unwrap());
    let process = format!("/proc/{}", running.0.id());
    wait_for("the raised limit", || {
        let limits = fs::read_to_string(format!("{process}/limits")).unwrap();
        let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let mut files = files.split_whitespace();
        let (soft, hard) = (files.next(), files.next());
        let is_gateway = fs::read_link(format!("{process}/exe")).unwrap() == Path::new(BINARY);
        (is_gateway && soft == hard).then_some(())
    });
}

#[test]
fn drain_rejects_late_requests_and_ignores_incomplete_ones() {
    let sandbox = sandbox();
    let mut gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    script(&sandbox, Faults::business(Fault::delayed(700)));
    let request = head(BODY.len(), "") + BODY;
    let mut in_flight = TcpStream::connect(gateway.address).unwrap();
    in_flight.write_all(request.as_bytes()).unwrap();
    wait_for("the request", || (sandbox.requests().len() == 2).then_some(()));
    let mut half_a_head = TcpStream::connect(gateway.address).unwrap();
    half_a_head.write_all(&request.as_bytes()[..30]).unwrap();
    let mut begun = TcpStream::connect(gateway.address).unwrap();
    begun.write_all(&request.as_bytes()[..30]).unwrap();
    wait_for("three connections", || {
        gateway.admin("/metrics").body.contains("ccsqm_gateway_connections 3").then_some(())
    });
    let stop = Instant::now();
    gateway.signal("-TERM");
    wait_for("the stop", || gateway.log().contains("shutdown started").then_some(()));
    begun.write_all(&request.as_bytes()[30..]).unwrap();
    let reply = read_reply(&mut begun);
    assert_eq!((reply.status, reply.code(), reply.outcome()), (503, "draining", "not_sent"));
    assert_eq!(read_reply(&mut in_flight).outcome(), "succeeded");
    assert!(gateway.wait().success());
    assert!(stop.elapsed() < Duration::from_secs(5), "half a head held the stop for {:?}", stop.elapsed());
    assert_eq!(sandbox.requests().len(), 2);
}

#[test]
fn drain_timeout_that_cuts_a_long_reply_records_its_outcome() {
    let sandbox = sandbox();
    let mut gateway = start_with(&sandbox, Setup::default().set("server.drain_timeout", "300ms"));
    script(&sandbox, Faults::business(Fault::sized(30_000_000)));
    let mut stream = TcpStream::connect(gateway.address).unwrap();
    stream.write_all((head(BODY.len(), "") + BODY).as_bytes()).unwrap();
    let mut told = [0; 200];
    stream.read_exact(&mut told).unwrap();
    assert!(String::from_utf8_lossy(&told).starts_with("HTTP/1.1 200"));
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    let outcome = records(&gateway.audit_directory(), "outcome").remove(0);
    assert_eq!((&outcome["outcome"], outcome["note"].is_string()), (&json!("succeeded"), true), "{outcome}");
}

#[test]
fn unix_socket_caller_is_identified_by_the_kernel() {
    use std::os::unix::{fs::PermissionsExt, net::UnixStream};
    let sandbox = sandbox();
    let folder = std::sync::Arc::new(tempfile::TempDir::new().unwrap());
    let socket = folder.path().join("gateway.sock");
    let me = String::from_utf8(Command::new("id").arg("-u").output().unwrap().stdout).unwrap();
    let known = |uid: &str| unix_listener(&socket) + &caller("by-uid", &format!("uid:{uid}"), "");
    let call = || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        // Any Host will do: who reaches the socket is named by the kernel.
        let head = head(BODY.len(), "").replace("localhost", "ccsqm.internal");
        stream.write_all((head + BODY).as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let caller = known("4242");
    let gateway = start_with(&sandbox, Setup { caller, folder: Some(folder.clone()), ..Setup::default() });
    assert!(call().contains("x-gateway-error: caller_denied"));
    assert_eq!(sandbox.requests().len(), 0);
    if me.trim() == "0" {
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let url = format!("http://localhost{PATH}");
        let output = Command::new("setpriv")
            .args(["--reuid=4242", "--regid=4242", "--clear-groups", "curl", "-s", "--unix-socket"])
            .arg(&socket)
            .args([&url, "-H", "Content-Type: application/json", "-d", BODY])
            .output()
            .unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("0409000"), "{output:?}");
        let intent = gateway.records("intent", 1).remove(0);
        assert_eq!((&intent["caller"], &intent["operator"]), (&json!("by-uid"), &json!("7")));
        assert_eq!(intent["peer"], "unix:uid=4242,gid=4242");
    }
    drop(gateway);
    let caller = known(me.trim()); // the socket file that the last one left is taken over
    let _gateway = start_with(&sandbox, Setup { caller, folder: Some(folder), ..Setup::default() });
    assert!(call().contains("x-gateway-outcome: succeeded"), "the control");
    let head = String::from_utf8(sandbox.requests().pop().unwrap().head).unwrap().to_ascii_lowercase();
    assert!(head.contains("x-userid: 7\r\n"), "{head}");
}

#[test]
fn only_the_primary_group_of_a_process_identifies_a_caller() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let sandbox = sandbox();
    let folder = std::sync::Arc::new(tempfile::TempDir::new().unwrap());
    if fs::metadata(folder.path()).unwrap().uid() != 0 {
        return; // only root can have any groups
    }
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let socket = folder.path().join("gateway.sock");
    let caller = unix_listener(&socket) + &caller("by-gid", "gid:4343", "");
    let _gateway = start_with(&sandbox, Setup { caller, folder: Some(folder), ..Setup::default() });
    for (groups, is_caller) in
        [(["--regid=4242", "--groups=4343"], false), (["--regid=4343", "--groups=4242"], true)]
    {
        let output = Command::new("setpriv")
            .arg("--reuid=4242")
            .args(groups)
            .args(["curl", "-s", "--unix-socket"])
            .arg(&socket)
            .args([&format!("http://localhost{PATH}"), "-H", "Content-Type: application/json", "-d", BODY])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(
            (said.contains("0409000"), said.contains("caller_denied")),
            (is_caller, !is_caller),
            "{said}"
        );
    }
}

#[test]
fn unix_socket_in_use_is_not_taken_over() {
    use std::os::unix::net::{UnixListener, UnixStream};

    let sandbox = sandbox();
    let gateway = start(&sandbox); // for its folder: secrets and a configuration that works
    let folder = gateway.folder.clone();
    drop(gateway);
    let path = folder.path().join("gateway.sock");
    let config = folder.path().join("unix.toml");
    let text = fs::read_to_string(folder.path().join("gateway.toml")).unwrap();
    let text = text.replacen("\"127.0.0.1:0\"", &format!("\"unix:{}\"", path.display()), 1);
    fs::write(&config, text.replace("peer = \"loopback\"", "peer = \"uid:0\"")).unwrap();
    let serve = || Command::new(BINARY).arg("serve").arg("--config").arg(&config).output().unwrap();

    let theirs = UnixListener::bind(&path).unwrap();
    let refused = serve();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && said.contains("gateway.sock"), "{said}");
    let _ours = UnixStream::connect(&path).unwrap();
    assert!(theirs.accept().is_ok(), "it is still theirs");

    drop(theirs); // what is left is a name that nobody answers to: the control
    let mut child = Command::new(BINARY).arg("serve").arg("--config").arg(&config).spawn().unwrap();
    wait_for("the socket", || UnixStream::connect(&path).ok());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn systemd_units_are_valid_and_hardened() {
    let folder = tempfile::TempDir::new().unwrap();
    let place = |name: &str| {
        let text =
            fs::read_to_string(format!("{}/deploy/systemd/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text.replace("/usr/local/bin/ccsqm-gateway", BINARY)).unwrap();
        path
    };
    let (service, socket) = (place("ccsqm-gateway.service"), place("ccsqm-gateway.socket"));
    let analyze = |args: &[&str], unit: &Path| {
        let output = Command::new("systemd-analyze").args(args).arg(unit).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    for unit in [&service, &socket] {
        assert_eq!(analyze(&["verify", "--man=no"], unit), (true, String::new()));
    }
    let broken = folder.path().join("broken.service");
    fs::write(&broken, "[Service]\nExecStart=/absent\nWatchdogSe=1\n").unwrap();
    assert!(analyze(&["verify", "--man=no"], &broken).1.contains("WatchdogSe"), "the control");
    let (_, text) = analyze(&["security", "--offline=true", "--no-pager"], &service);
    let level = text.split("exposure level for ccsqm-gateway.service: ").nth(1).unwrap();
    let level: f32 = level.split(' ').next().unwrap().parse().unwrap();
    assert!(level <= 1.5, "{text}");
}

#[test]
fn every_test_named_on_the_security_page_exists() {
    let root = env!("CARGO_MANIFEST_DIR");
    let page = fs::read_to_string(format!("{root}/deploy/SECURITY.md")).unwrap();
    let tests = format!("{root}/tests/it");
    let found = Command::new("grep").args(["-rhoE", "fn [a-z0-9_]+", "--include=*.rs", &tests]).output();
    let found = String::from_utf8(found.unwrap().stdout).unwrap();
    let known: Vec<_> = found.lines().filter_map(|line| line.strip_prefix("fn ")).collect();
    let names: Vec<_> = page
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.matches('_').count() > 3 && !name.contains(' '))
        .collect();
    assert!(names.len() > 30, "{}", names.len());
    for name in names {
        assert!(known.contains(&name), "{name}");
    }
}

#[test]
fn test_run_rejects_unknown_arguments_before_its_first_step() {
    for args in [&["--al"][..], &["all"], &["--all", "--quick"], &[""]] {
        let run =
            Command::new(format!("{}/tests/run", env!("CARGO_MANIFEST_DIR"))).args(args).output().unwrap();
        assert_eq!(
            (run.status.code(), String::from_utf8(run.stdout).unwrap()),
            (Some(2), String::new()),
            "{args:?}"
        );
        assert!(
            String::from_utf8(run.stderr).unwrap().contains("usage: tests/run [--all | --quick]"),
            "{args:?}"
        );
    }
}

#[test]
fn each_long_test_has_its_line_in_the_full_test_run() {
    let root = env!("CARGO_MANIFEST_DIR");
    let folders = ["src", "tests/it"].map(|folder| format!("{root}/{folder}"));
    let prefix = "CCSQM_GATEWAY_TEST_";
    let found =
        Command::new("grep").args(["-rhoE", &format!("\"{prefix}[A-Z_]+\"")]).args(folders).output().unwrap();
    let names: Vec<_> =
        String::from_utf8(found.stdout).unwrap().lines().map(|name| name.replace('"', "")).collect();
    assert!(names.len() >= 5, "{names:?}");
    let script = fs::read_to_string(format!("{root}/tests/run")).unwrap();
    for name in names {
        let line = format!("long {name}=");
        assert!(script.lines().any(|text| text.starts_with(&line)), "tests/run has no line `{line}…`");
    }
}
