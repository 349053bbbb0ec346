//! Files that are read while the gateway serves, and what takes their place: a pipe that nobody writes to, a device that never
//! ends, a folder, a mount that is dead. For such a mount a library stands in that holds the reading of a file: see [`hanging`].

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ccsqm_gateway::sandbox::{Faults, Sandbox};
use tempfile::TempDir;

use crate::{
    callers::{CALLER, Ca, SERVER, caller, listener, swap},
    signals::{hanging, probe},
    support::*,
};

/// What is read again while the gateway serves, with what tells of each: a line of the log, or of which file.
const WATCHED: [(&str, &str); 9] = [
    ("gateway.toml", "the configuration is rejected"),
    ("contract.json", "the configuration is rejected"),
    ("app_key", "the secret cannot be used"),
    ("app_secret", "the secret cannot be used"),
    ("server.pem", "\"whose\":\"listener\""),
    ("server.key", "\"whose\":\"listener\""),
    ("ca.pem", "\"whose\":\"listener\""),
    ("revoked.pem", "\"whose\":\"listener\""),
    ("client.pem", "\"whose\":\"upstream\""),
];

const CONTRACT: &str =
    r#"{ "type": "object", "additionalProperties": false, "properties": { "a": { "type": "integer" } } }"#;

/// A gateway with one of each kind of file, whose token lives for four seconds.
fn start_with_files(sandbox: &Sandbox, through: Vec<String>, folder: &Arc<TempDir>) -> Gateway {
    let ca = Ca::new();
    let place = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    place("ca.pem", &ca.0.pem());
    place("revoked.pem", &ca.revoke(&[], 2124));
    place("contract.json", CONTRACT);
    let client = ca.issue(CALLER);
    place("client.pem", &client.certificate);
    place("client.key", &client.key);
    place("proxy_user", "gateway");
    place("proxy_password", "password");
    let more = ", client_ca_file = \"ca.pem\", client_crl_file = \"revoked.pem\"";
    let caller = listener(folder, &ca.issue(SERVER), more)
        + &caller("console", "dns:batch.qa.internal", "")
        + OTHER_ROUTE;
    script(sandbox, Faults { lifetime_ms: Some(4000), ..Faults::default() });
    let address = crate::egress::guard(&ca, sandbox.address());
    let setup = Setup {
        base_url: Some(format!("https://localhost:{}", address.port())),
        folder: Some(folder.clone()),
        caller,
        through,
        ..Setup::default()
    };
    let setup = setup.set("upstream.ca_file", "ca.pem").set("upstream.client_cert_file", "client.pem");
    let gateway = start_with(sandbox, setup.set("upstream.client_key_file", "client.key"));
    assert_eq!(gateway.call().outcome(), "succeeded", "{}", gateway.log());
    gateway
}

/// Puts something in the place of a file, at once.
fn put(folder: &TempDir, name: &str, kind: &str) {
    let new = folder.path().join("new");
    let made = match kind {
        "pipe" => Command::new("mkfifo").arg(&new).status(),
        "device" => Command::new("mknod").arg(&new).args(["c", "1", "5"]).status(), // /dev/zero
        "folder" => Command::new("mkdir").arg(&new).status(),
        link => return replace_by_link(&folder.path().join(name), link),
    };
    assert!(made.unwrap().success(), "{kind}");
    let place = folder.path().join(name);
    if kind == "folder" {
        fs::remove_file(&place).unwrap();
    }
    fs::rename(new, place).unwrap();
}

fn replace_by_link(place: &Path, to: &str) {
    let new = place.with_extension("link");
    symlink(to, &new).unwrap();
    fs::rename(new, place).unwrap();
}

fn remove(path: &Path) {
    fs::remove_file(path).or_else(|_| fs::remove_dir(path)).unwrap();
}

/// The gateway serves, and goes on fetching tokens.
fn assert_lives(gateway: &Gateway, sandbox: &Sandbox, when: &str) {
    let fetches = sandbox.token_calls().len();
    wait_for(&format!("another token, {when}"), || (sandbox.token_calls().len() > fetches).then_some(()));
    assert_eq!(gateway.call().outcome(), "succeeded", "{when}");
    for path in ["/livez", "/readyz", "/metrics", "/status"] {
        assert_eq!(probe(gateway.admin, path), Some(200), "{when}: {path}");
    }
}

fn assert_stops(mut gateway: Gateway, when: &str) {
    let begun = Instant::now();
    gateway.signal("-TERM");
    assert!(gateway.wait().success(), "{when}: {}", gateway.log());
    assert!(begun.elapsed() < Duration::from_secs(5), "{when}: {:?}", begun.elapsed());
}

/// How often a text stands in the log.
fn told(gateway: &Gateway, text: &str) -> usize {
    gateway.log().matches(text).count()
}

#[test]
fn non_regular_file_blocks_nothing_and_the_old_one_stays_in_use() {
    for kind in ["pipe", "device", "folder", "/dev/zero"] {
        let (sandbox, folder) = (sandbox(), Arc::new(TempDir::new().unwrap()));
        let gateway = start_with_files(&sandbox, Vec::new(), &folder);
        let mut files: Vec<_> = WATCHED.iter().map(|(name, told)| (*name, *told)).collect();
        files.push(("client.key", "\"whose\":\"upstream\""));
        for (name, line) in &files {
            let text = fs::read_to_string(folder.path().join(name)).unwrap();
            let before = told(&gateway, line);
            put(&folder, name, kind);
            gateway.signal("-HUP");
            wait_for(&format!("a word of {name}, {kind}"), || (told(&gateway, line) > before).then_some(()));
            assert!(gateway.log().contains("is not a regular file"), "{kind} {name}: {}", gateway.log());
            assert_eq!(gateway.call().outcome(), "succeeded", "{kind} {name}");
            assert_eq!(probe(gateway.admin, "/livez"), Some(200), "{kind} {name}");
            if kind == "folder" {
                remove(&folder.path().join(name));
            }
            swap(&folder, name, &text);
        }
        assert_lives(&gateway, &sandbox, kind);
        // The control: all are followed again.
        let changes = told(&gateway, "the configuration changed");
        let text = fs::read_to_string(folder.path().join("gateway.toml")).unwrap();
        swap(&folder, "gateway.toml", &text.replace("name = \"console\"", "name = \"terminal\""));
        wait_for("the change", || (told(&gateway, "the configuration changed") > changes).then_some(()));
        swap(&folder, "app_secret", "another-secret");
        wait_for("the trial", || (told(&gateway, "the secret changed") > 0).then_some(()));
        // And with all of them gone for ever it stops.
        for (name, _) in &files {
            put(&folder, name, kind);
        }
        gateway.signal("-HUP");
        assert_stops(gateway, kind);
    }
}

#[test]
fn dead_mount_blocks_neither_calls_nor_tokens_nor_the_stop() {
    let (sandbox, folder) = (sandbox(), Arc::new(TempDir::new().unwrap()));
    let hang = folder.path().join("dead");
    let gateway = start_with_files(&sandbox, hanging(&hang), &folder);
    // One of each thread that reads.
    for file in ["gateway.toml", "contract.json", "app_secret", "server.key", "client."] {
        let line = match file {
            "gateway.toml" | "contract.json" => "the configuration is rejected",
            "app_secret" => "the secret cannot be used",
            _ => "the certificates cannot be used",
        };
        let silent = "does not answer within 10 s";
        let is_told =
            || gateway.log().lines().filter(|text| text.contains(line) && text.contains(silent)).count();
        let before = is_told();
        fs::write(&hang, file).unwrap();
        gateway.signal("-HUP");
        wait_for(&format!("a word of {file}"), || (is_told() > before).then_some(()));
        assert_lives(&gateway, &sandbox, file);
        let not_in_use = || {
            let config = gateway.admin("/status").json()["config"].take();
            let config = config.as_object().unwrap().values().filter(|of| of["successful"] == false);
            config.map(|of| of["last_error"]["detail"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert!(not_in_use().iter().any(|detail| detail.contains(silent)), "{file}: {:?}", not_in_use());
        let good = told(&gateway, "is good again");
        fs::remove_file(&hang).unwrap();
        if line.starts_with("the configuration") {
            wait_for("the end of it", || (told(&gateway, "is good again") > good).then_some(()));
        }
        wait_for("all to be in use", || not_in_use().is_empty().then_some(()));
    }
    // The control: what was held goes on.
    let text = fs::read_to_string(folder.path().join("gateway.toml")).unwrap();
    swap(&folder, "gateway.toml", &text.replace("name = \"console\"", "name = \"terminal\""));
    wait_for("the change", || (told(&gateway, "the configuration changed") > 0).then_some(()));
    fs::write(&hang, folder.path().display().to_string()).unwrap();
    gateway.signal("-HUP");
    let begun = Instant::now();
    wait_for("all to hang", || (begun.elapsed() > Duration::from_secs(2)).then_some(()));
    fs::write(&hang, "app_").unwrap(); // the trail is written to the end
    assert_stops(gateway, "all");
}

/// Something is wrong with a file, then it hangs, then the same is wrong with it.
fn is_told_behind_a_hang(what: &str, file: &str, bad: &str, says: &str) {
    let (sandbox, folder) = (sandbox(), Arc::new(TempDir::new().unwrap()));
    let hang = folder.path().join("dead");
    let gateway = start_with_files(&sandbox, hanging(&hang), &folder);
    let stands = || {
        let config = gateway.admin("/status").json()["config"].take();
        let mut all = config.as_object().unwrap().iter();
        let (_, of) = all.find(|(name, _)| name.starts_with(what)).unwrap();
        let detail = of["last_error"]["detail"].as_str().unwrap_or_default().to_owned();
        (of["successful"] == true, detail)
    };
    let wait_until_bad = |says: &str, when: &str| {
        let is_so = || Some(stands()).filter(|(is_good, detail)| !is_good && detail.contains(says)).map(drop);
        wait_for(&format!("{what}: {when}"), is_so);
    };
    assert_eq!(stands(), (true, String::new()), "the control of {what}");
    let good = fs::read_to_string(folder.path().join(file)).unwrap();
    swap(&folder, file, bad);
    wait_until_bad(says, "the fault");
    fs::write(&hang, file).unwrap();
    wait_until_bad("does not answer within 10 s", "the hang");
    fs::remove_file(&hang).unwrap();
    wait_until_bad(says, "the fault behind the hang");
    swap(&folder, file, &good);
    wait_for(&format!("the end of {what}"), || stands().0.then_some(()));
}

#[test]
fn current_error_is_reported_after_a_file_hang() {
    thread::scope(|scope| {
        for (what, file, bad, says) in [
            ("configuration", "gateway.toml", "rubbish", "gateway.toml:1"),
            ("credential default", "app_secret", "", "is empty"),
            ("credential default", "app_secret", "of-nobody", "token_refused"),
            ("listener", "server.pem", "rubbish", "server.pem"),
            ("upstream client_cert_file", "client.pem", "rubbish", "client.pem"),
        ] {
            scope.spawn(move || is_told_behind_a_hang(what, file, bad, says));
        }
    });
}

#[test]
fn file_watch_detects_a_pipe_in_place_of_configuration_or_contract() {
    let (sandbox, folder) = (sandbox(), Arc::new(TempDir::new().unwrap()));
    let gateway = start_with_files(&sandbox, Vec::new(), &folder);
    for name in ["gateway.toml", "contract.json"] {
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        let good = told(&gateway, "is good again");
        put(&folder, name, "pipe");
        let is_told = || {
            let log = gateway.log();
            let mut lines = log.lines().filter(|line| line.contains("the configuration is rejected"));
            lines.any(|line| line.contains(name) && line.contains("is not a regular file")).then_some(())
        };
        wait_for(&format!("a word of {name}"), is_told);
        assert_lives(&gateway, &sandbox, name);
        swap(&folder, name, &text);
        wait_for(&format!("{name} to be good"), || (told(&gateway, "is good again") > good).then_some(()));
    }
    // The control: a change is noticed without a signal, too.
    let text = fs::read_to_string(folder.path().join("gateway.toml")).unwrap();
    swap(&folder, "gateway.toml", &text.replace("name = \"console\"", "name = \"terminal\""));
    wait_for("the change", || (told(&gateway, "the configuration changed") > 0).then_some(()));
}

#[test]
fn start_rejects_non_regular_files_within_a_deadline() {
    let (sandbox, folder) = (sandbox(), Arc::new(TempDir::new().unwrap()));
    drop(start_with_files(&sandbox, Vec::new(), &folder));
    let config = folder.path().join("gateway.toml");
    let set = [
        "upstream.ca_file=ca.pem",
        "upstream.client_cert_file=client.pem",
        "upstream.client_key_file=client.key",
        "upstream.proxy=http://127.0.0.1:1",
        "upstream.proxy_user_file=proxy_user",
        "upstream.proxy_password_file=proxy_password",
    ];
    let run = |command: &str, through: &[String], config: &Path| {
        let mut words = through.to_vec();
        words.extend([BINARY, command, "--config"].map(str::to_owned));
        let mut child = Command::new(&words[0])
            .args(&words[1..])
            .arg(config)
            .args(set.iter().flat_map(|set| ["--set", *set]))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let status = wait_for("the end", || child.try_wait().unwrap());
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.code(), said)
    };
    assert_eq!(run("check", &[], &config).0, Some(0), "the control");
    for (name, key) in [
        ("contract.json", "routes.1.contract_file"),
        ("app_key", "app_key_file"),
        ("app_secret", "app_secret_file"),
        ("server.pem", "cert_file"),
        ("server.key", "key_file"),
        ("ca.pem", "client_ca_file"),
        ("revoked.pem", "client_crl_file"),
        ("client.pem", "client_cert_file"),
        ("client.key", "client_key_file"),
        ("proxy_user", "proxy_user_file"),
        ("proxy_password", "proxy_password_file"),
    ] {
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        for kind in ["pipe", "device"] {
            put(&folder, name, kind);
            for command in ["check", "serve"] {
                let (code, said) = run(command, &[], &config);
                let is_told = said.contains(key.rsplit('.').next().unwrap());
                assert!(code == Some(78) && is_told, "{command} {kind} {name}: {code:?} {said}");
                assert!(said.contains("is not a regular file"), "{command} {kind} {name}: {said}");
            }
        }
        swap(&folder, name, &text);
    }
    // What hangs is told by its key.
    let hang = folder.path().join("dead");
    for (path, key) in [
        ("app_secret", "app_secret_file: does not answer within 20 s"),
        ("gateway.toml", "file: does not answer"),
    ] {
        fs::write(&hang, path).unwrap();
        let (code, said) = run("serve", &hanging(&hang), &config);
        assert!(code == Some(78) && said.contains(key), "{path}: {code:?} {said}");
    }
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let (code, said) = run("serve", &[], &pipe);
    assert!(code == Some(78) && said.contains("pipe:1: file: does not answer"), "{code:?} {said}");
}

#[test]
fn pipe_in_a_trail_blocks_no_command() {
    let sandbox = sandbox();
    let mut gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "succeeded");
    let trail = gateway.audit_directory();
    let run = |command: &str| {
        let args = ["20", BINARY, "audit", command];
        let output = Command::new("timeout").args(args).arg(&trail).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    assert_eq!(run("accept-clock").0, 0, "the control");
    let pipe = |name: &str| assert!(Command::new("mkfifo").arg(trail.join(name)).status().unwrap().success());
    pipe("control");
    let (code, said) = run("accept-clock");
    assert!(code == 1 && said.contains("is not a regular file"), "{code}: {said}");
    gateway.signal("-TERM");
    assert!(gateway.wait().success());
    fs::remove_file(trail.join("control")).unwrap();
    fs::remove_file(trail.join("lock")).unwrap();
    assert_eq!(run("unresolved").0, 0, "the control");
    pipe("lock");
    for command in ["verify", "unresolved", "in-doubt", "head", "accept-clock", "accept-loss"] {
        let (code, said) = run(command);
        assert!(code != 124, "{command} waits: {said}");
    }
}

#[test]
fn pipe_in_place_of_a_key_or_certificate_blocks_no_command() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (trail, key, pipe) = (path("audit"), path("key"), path("pipe"));
    let (cert, cert_key) = (path("cert.pem"), path("key.pem"));
    let server = Ca::new().issue(SERVER);
    fs::write(&key, "0123456789abcdef0123456789abcdef").unwrap();
    fs::write(&cert, server.certificate).unwrap();
    fs::write(&cert_key, server.key).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let run = |args: &[&str]| {
        let output = Command::new("timeout").args(["20", BINARY]).args(args).output().unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code().unwrap(), said)
    };
    for command in ["init", "verify", "head"] {
        let (code, said) = run(&["audit", command, "--key-file", &pipe, &trail]);
        assert!(code == 78 && said.contains("is not a regular file"), "{command}: {code} {said}");
        let (code, said) = run(&["audit", command, "--key-file", &key, &trail]);
        assert!(code < 2, "the control: {command}: {code} {said}");
    }
    for (cert, cert_key) in [(&pipe, &cert_key), (&cert, &pipe)] {
        let (code, said) = run(&["sandbox", "--listen", "127.0.0.1:0", "--cert", cert, "--key", cert_key]);
        assert!(code == 1 && said.contains("is not a regular file"), "sandbox: {code} {said}");
    }
    let args = ["2", BINARY, "sandbox", "--listen", "127.0.0.1:0", "--cert", &cert, "--key", &cert_key];
    let output = Command::new("timeout").args(args).output().unwrap();
    assert!(String::from_utf8(output.stdout).unwrap().contains("https://"), "the control");
}

#[test]
fn configuration_from_a_pipe_is_read_once() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let config = folder.path().join("gateway.toml");
    let text = fs::read_to_string(&config).unwrap();
    let place = |text: &str| text.replace("\"app_", &format!("\"{}/app_", folder.path().display()));
    let text = place(&text) + &format!("[audit]\ndirectory = \"{}/audit\"\n", folder.path().display());
    let (input, mut output) = std::io::pipe().unwrap();
    output.write_all(text.as_bytes()).unwrap();
    drop(output);
    let mut command = Command::new(BINARY);
    command.args(["serve", "--config", "/dev/stdin"]).stdin(input);
    let gateway = spawn(command, &folder);
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.signal("-HUP");
    wait_for("a word", || (told(&gateway, "is not read again") > 0).then_some(()));
    assert_eq!(gateway.call().outcome(), "succeeded");
    assert_eq!(probe(gateway.admin, "/livez"), Some(200));
    assert_stops(gateway, "a pipe");
}

#[test]
fn unchanged_files_are_checked_but_not_read() {
    let (sandbox, folder) = (sandbox(), Arc::new(TempDir::new().unwrap()));
    let gateway = start_with_files(&sandbox, Vec::new(), &folder);
    let trace = folder.path().join("trace");
    let mut strace = Command::new("strace")
        .args(["-f", "-qq", "-e", "trace=openat,statx,newfstatat", "-p", &gateway.id().to_string(), "-o"])
        .arg(&trace)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let seen = |call: &str, file: &str| {
        let text = fs::read_to_string(&trace).unwrap_or_default();
        text.lines().filter(|line| line.contains(call) && line.contains(&format!("/{file}\""))).count()
    };
    // By then it is sure of all of them.
    wait_for("some looks", || (seen("stat", "gateway.toml") > 12).then_some(()));
    File::create(&trace).unwrap(); // strace goes on behind a hole
    wait_for("three looks at each", || WATCHED.iter().all(|(file, _)| seen("stat", file) >= 3).then_some(()));
    let read: Vec<_> = WATCHED.iter().filter(|(file, _)| seen("openat", file) > 0).collect();
    assert!(read.is_empty(), "{read:?}");
    // The control: a change is read.
    swap(&folder, "contract.json", &CONTRACT.replace("integer", "string"));
    wait_for("the change", || (told(&gateway, "the configuration changed") > 0).then_some(()));
    assert!(seen("openat", "contract.json") > 0);
    assert!(Command::new("kill").args(["-INT", &strace.id().to_string()]).status().unwrap().success());
    strace.wait().unwrap();
}
