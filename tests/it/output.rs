//! Where the output of a command cannot be written: a closed standard output, a full device, a reader that left.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    process::{Command, Output, Stdio},
};

use ccsqm_gateway::sandbox::{Fault, Faults, Instead};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{contract::start_with_contract, support::*};

/// Runs a command of the binary with its streams redirected as a shell does it.
fn redirected(args: &[String], redirection: &str) -> Output {
    let line = format!("exec \"$@\" {redirection}");
    let mut command = Command::new("sh");
    command.args(["-c", &line, "sh", BINARY]).args(args);
    command.env_remove("CCSQM_GATEWAY__SERVER__WORKERS").stdin(Stdio::null()).output().unwrap()
}

/// The same with a pipe that nobody reads any more in the place of one of the streams.
fn unread(args: &[String], is_stdout: bool) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(BINARY);
    command.args(args).env_remove("CCSQM_GATEWAY__SERVER__WORKERS").stdin(Stdio::null());
    if is_stdout {
        command.stdout(writer)
    } else {
        command.stderr(writer)
    };
    command.output().unwrap()
}

/// All commands: their names, as the help lists them.
fn names(of: &[String]) -> BTreeSet<String> {
    let (_, help, _) = command(&of.iter().map(String::as_str).chain(["--help"]).collect::<Vec<_>>());
    let Some((_, list)) = help.split_once("Commands:\n") else { return BTreeSet::from([of.join(" ")]) };
    let list = list.split("\n\n").next().unwrap();
    let is_name = |line: &&str| line.starts_with("  ") && !line.starts_with("   ");
    let own = list.lines().filter(is_name).map(|line| line.split_whitespace().next().unwrap());
    own.filter(|name| *name != "help").flat_map(|name| names(&[of, &[name.to_owned()]].concat())).collect()
}

#[test]
fn commands_keep_their_exit_code_when_output_is_not_read() {
    let sandbox = sandbox();
    script(&sandbox, Faults::business(Fault::instead(Instead::Reset).times(1)));
    let gateway = start(&sandbox);
    assert_eq!(gateway.call().outcome(), "unknown");
    let id = gateway.records("outcome", 1)[0]["id"].as_str().unwrap().to_owned();
    let mut stopped = start(&sandbox);
    stopped.signal("-TERM");
    assert!(stopped.wait().success());
    let folder = gateway.folder.path().display().to_string();
    let (trail, ended) = (format!("{folder}/audit"), stopped.audit_directory().display().to_string());
    fs::write(gateway.folder.path().join("good.json"), BODY).unwrap();
    fs::write(gateway.folder.path().join("bad.json"), "{}").unwrap();
    fs::write(gateway.folder.path().join("broken.json"), "{").unwrap();
    fs::write(gateway.folder.path().join("bad.toml"), "[[callers]]\n").unwrap();
    let admin = gateway.admin;
    let new = TempDir::new().unwrap();
    let new = new.path().display();
    let nobody = "00000000-0000-7000-8000-000000000000";

    // With what each ends, as long as somebody reads it.
    let commands: Vec<(String, i32)> = [
        ("--help".to_owned(), 0),
        ("--version".into(), 0),
        ("help audit".into(), 0),
        ("serve --help".into(), 0),
        (String::new(), 2),
        ("nonsense".into(), 2),
        (format!("serve --config {folder}/bad.toml"), 78),
        (format!("check --config {folder}/gateway.toml"), 0),
        (format!("check --json --config {folder}/gateway.toml"), 0),
        (format!("check --config {folder}/bad.toml"), 78),
        (format!("check --json --config {folder}/bad.toml"), 78),
        ("demo --once".into(), 0),
        ("sandbox --listen 192.0.2.1:1".into(), 1),
        (format!("healthcheck --admin {admin}"), 0),
        ("healthcheck --admin 127.0.0.1:1".into(), 1),
        (format!("contract check appointQualityTask {folder}/good.json"), 0),
        (format!("contract check appointQualityTask {folder}/bad.json"), 1),
        (format!("contract check --json appointQualityTask {folder}/bad.json"), 1),
        (format!("contract check appointQualityTask {folder}/broken.json"), 1),
        (format!("contract check {folder}/broken.json {folder}/good.json"), 78),
        (format!("contract check --json {folder}/broken.json {folder}/good.json"), 78),
        (format!("audit init {new}/trail"), 0),
        (format!("audit verify {trail}"), 0),
        (format!("audit verify --json {trail}"), 0),
        (format!("audit verify {folder}"), 78),
        (format!("audit in-doubt {trail}"), 0),
        (format!("audit unresolved {trail}"), 1),
        (format!("audit unresolved --json {trail}"), 1),
        (format!("audit show {trail} {id}"), 0),
        (format!("audit show --json {trail} {id}"), 0),
        (format!("audit show {trail} {nobody}"), 1),
        (format!("audit head {trail}"), 0),
        (format!("audit head --json {trail}"), 0),
        (format!("audit accept-loss {ended}"), 0),
        (format!("audit accept-clock {ended}"), 0),
        (format!("audit accept-clock --json {ended}"), 0),
        (format!("audit resolve {trail} {nobody} done --by me"), 1),
        (format!("audit resolve --json {trail} {nobody} done --by me"), 1),
    ]
    .into();
    let is_walked = |name: &String| commands.iter().any(|(words, _)| words.starts_with(name.as_str()));
    let missing: Vec<_> = names(&[]).into_iter().filter(|name| !is_walked(name)).collect();
    assert!(missing.is_empty() && names(&[]).len() > 12, "{missing:?}");

    for (words, code) in &commands {
        let args: Vec<_> = words.split_whitespace().map(str::to_owned).collect();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let plain = redirected(&args, "");
        let said = text(&plain.stderr);
        assert_eq!(plain.status.code(), Some(*code), "{words}: {said}");
        let speaks = !plain.stdout.is_empty();
        assert!(speaks || !said.is_empty(), "{words}: the control");

        let quiet = |case: &str, output: Output| {
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(*code), "{words}, {case}: {said}");
            assert!(
                !said.contains("panic") && !said.contains("cannot be written"),
                "{words}, {case}: {said}"
            );
        };
        quiet("closed", redirected(&args, ">&-"));
        quiet("both closed", redirected(&args, ">&- 2>&-"));
        quiet("nobody reads", unread(&args, true));
        quiet("errors closed", redirected(&args, "2>&-"));
        quiet("errors on a full device", redirected(&args, "2>/dev/full"));
        quiet("nobody reads errors", unread(&args, false));

        let full = redirected(&args, ">/dev/full");
        let said = text(&full.stderr);
        let told =
            said.matches("ccsqm-gateway: the output cannot be written: No space left on device").count();
        let wanted = if speaks && *code == 0 { 1 } else { *code };
        assert_eq!((full.status.code(), told), (Some(wanted), usize::from(speaks)), "{words}: {said}");
        assert!(!said.contains("panic"), "{words}: {said}");
        let full = redirected(&args, ">/dev/full 2>/dev/full");
        assert_eq!(full.status.code(), Some(wanted), "{words}, both full");
    }
}

/// Texts of others that would move the cursor, hide a part, or begin a line of their own.
const ODD: &str =
    "1\n2026-01-01 forged outcome succeeded \u{1b}[2K\r\u{9b}31m\u{202e}\u{2028}\u{e0020}\u{2800}";

/// What a command prints is plain, and has as many lines as the same command with plain texts.
fn assert_plain(words: &[&str], lines: usize, stdout: &str, stderr: &str) {
    for text in [stdout, stderr] {
        let odd = |it: char| it != '\n' && (it.is_control() || ODD[1..].contains(it) && !it.is_ascii());
        assert!(!text.contains(odd), "{words:?}: {text:?}");
        assert!(!text.lines().any(|line| line.starts_with("2026-01-01 forged")), "{words:?}: {text}");
    }
    assert_eq!(stdout.lines().count() + stderr.lines().count(), lines, "{words:?}: {stdout}{stderr}");
}

#[test]
fn commands_escape_characters_that_control_a_terminal() {
    let sandbox = sandbox();
    let contract = serde_json::json!({
        "type": "object",
        "additionalProperties": false,
        "properties": { "task": { "type": "string", "x-audit": "task" } }
    });
    let told = |text: &str| {
        let gateway = start_with_contract(&sandbox, &contract);
        let reply = serde_json::json!({ "resultCode": text }).to_string();
        script(
            &sandbox,
            Faults::business([
                Fault::status(200).with_body(reply).times(1),
                Fault::instead(Instead::Reset).times(1),
            ]),
        );
        let body = serde_json::json!({ "task": text }).to_string();
        assert_eq!((gateway.post(&body).outcome(), gateway.post(&body).outcome()), ("failed", "unknown"));
        let ids: Vec<_> =
            gateway.records("outcome", 2).iter().map(|it| it["id"].as_str().unwrap().to_owned()).collect();
        assert_eq!(gateway.records("outcome", 2)[0]["result_code"], text);
        let trail = gateway.audit_directory().display().to_string();
        let lines: Vec<usize> = [
            &["show", &trail, &ids[0]][..],
            &["show", "--json", &trail, &ids[0]],
            &["unresolved", &trail],
            &["unresolved", "--json", &trail],
        ]
        .map(|words| {
            let words = [&["audit"], words].concat();
            let (code, out, error) = command(&words);
            assert_eq!(code, i32::from(words[1] == "unresolved"), "{words:?}: {error}");
            let lines = out.lines().count();
            assert_plain(&words, lines, &out, &error);
            lines
        })
        .into();
        (lines, gateway)
    };
    let (plain, _) = told("1");
    let (lines, gateway) = told(ODD);
    assert_eq!(lines, plain, "the control: texts that are plain");

    // Names of files, arguments, bodies, and what is wrong with a configuration.
    let odd = gateway.folder.path().join(ODD.replace('/', ""));
    fs::copy(gateway.folder.path().join("gateway.toml"), &odd).unwrap();
    fs::write(gateway.folder.path().join("body.json"), serde_json::json!({ ODD: 1 }).to_string()).unwrap();
    let bad = format!("[server]\n\"{}\" = 1\n", "\\u001b[2K\\n2026-01-01 forged\\u202e");
    fs::write(gateway.folder.path().join("bad.toml"), bad).unwrap();
    let at = |name: &str| gateway.folder.path().join(name).display().to_string();
    let (odd, body, bad) = (odd.display().to_string(), at("body.json"), at("bad.toml"));
    let absent = format!("{odd}-absent");
    let good = [&["check", "--config", &odd][..], &["check", "--json", "--config", &odd]];
    for words in good {
        let (code, out, error) = command(words);
        assert_eq!(code, 0, "{out}{error}");
        assert_plain(words, out.lines().count(), &out, &error);
    }
    for (words, wrong, lines) in [
        (&["check", "--config", &absent][..], 78, 1),
        (&["serve", "--config", &absent], 78, 1),
        (&["check", "--config", &bad], 78, 4),
        (&["contract", "check", "appointQualityTask", &body], 1, 6),
        (&["contract", "check", "--json", "appointQualityTask", &body], 1, 1),
        (&["contract", "check", &absent, &body], 78, 1),
        (&["audit", "verify", &absent], 78, 1),
        (&["audit", "verify", "--json", &absent], 78, 1),
        (&["healthcheck", "--admin", ODD], 2, 3),
        (&[ODD], 2, 5),
        (&["audit", ODD], 2, 5),
    ] {
        let (code, out, error) = command(words);
        assert_eq!(code, wrong, "{words:?}: {out}{error}");
        assert_plain(words, lines, &out, &error);
    }
    let (_, out, _) = command(&["--help"]);
    assert!(out.lines().count() > 9, "the control: lines of our own stay lines");
}

#[test]
fn show_prints_the_exact_lines_of_the_trail() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    // Written anew, a number or an escape would be another text.
    let body = BODY.replace("1600226476732482572", "16\\u0030\\/é");
    assert_eq!(gateway.post(&body).outcome(), "succeeded");
    let id = gateway.records("outcome", 1)[0]["id"].as_str().unwrap().to_owned();
    let trail = gateway.audit_directory();
    let (code, out, _) = command(&["audit", "show", "--json", trail.to_str().unwrap(), &id]);
    let segments = fs::read_dir(&trail).unwrap().map(|entry| entry.unwrap().path());
    let text: String = segments
        .filter(|path| path.extension().is_some_and(|it| it == "jsonl"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let lines: Vec<_> = text.lines().filter(|line| line.contains(&id)).collect();
    assert!(code == 0 && lines.len() == 2 && lines[0].contains("16\\u0030\\/é"), "the control: {lines:?}");
    assert_eq!(out.lines().collect::<Vec<_>>(), lines);
}

#[test]
fn sandbox_and_demo_keep_serving_when_output_is_not_read() {
    for args in [&["sandbox", "--listen"][..], &["demo", "--admin", "127.0.0.1:0", "--listen"]] {
        for full in [false, true] {
            let address = free();
            let mut command = Command::new(BINARY);
            command.args(args).arg(address.to_string()).stderr(Stdio::piped());
            if full {
                command.stdout(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
            } else {
                let (reader, writer) = std::io::pipe().unwrap();
                drop(reader);
                command.stdout(writer);
            }
            let mut child = command.spawn().unwrap();
            drop(command);
            wait_for("a connection", || {
                let ended = child.try_wait().unwrap();
                assert!(ended.is_none(), "{args:?}: {ended:?}");
                std::net::TcpStream::connect(address).ok()
            });
            wait_for("its handlers", || handles_stop(child.id()).then_some(()));
            kill_process(Pid::from_raw(child.id().cast_signed()).unwrap(), Signal::TERM).unwrap();
            let status = wait_for("the end", || child.try_wait().unwrap());
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            assert_eq!(status.code(), Some(i32::from(full)), "{args:?}: {said}");
            assert_eq!(said.contains("the output cannot be written"), full, "{args:?}: {said}");
            assert!(!said.contains("panic"), "{args:?}: {said}");
        }
    }
}

/// Whether a process catches SIGTERM.
fn handles_stop(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0");
    u64::from_str_radix(caught.trim(), 16).unwrap_or(0) & (1 << 14) != 0
}
