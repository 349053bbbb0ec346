//! Configuration files: those that are shipped, and those that are wrong.

mod mistakes;

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
    time::{SystemTime, UNIX_EPOCH},
};

use ccsqm_gateway::contract::Contract;
use serde_json::{Value, json};
use tempfile::TempDir;

use self::mistakes::{Layer, Random, WAYS, keys_of, mistakes};
use crate::support::BINARY;

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A shipped configuration, with secrets where it looks for them.
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
    for secret in ["app_key", "app_secret", "audit.key", "proxy_user", "proxy_password"] {
        fs::write(folder.path().join(secret), SECRET).unwrap();
    }
    let root_certificate = rcgen::generate_simple_self_signed(vec!["root".to_owned()]).unwrap();
    for name in ["ca.pem", "client-ca.pem", "cert.pem", "client.pem"] {
        fs::write(folder.path().join(name), root_certificate.cert.pem()).unwrap();
    }
    for name in ["tls.key", "client.key"] {
        fs::write(folder.path().join(name), root_certificate.signing_key.serialize_pem()).unwrap();
    }
    fs::write(folder.path().join("crl.pem"), crate::callers::empty_list()).unwrap();
    let text = fs::read_to_string(format!("{root}/config/{name}")).unwrap();
    if text.contains("must_exist = true") {
        fs::create_dir(folder.path().join("audit")).unwrap();
    }
    let text =
        text.replace("/run/secrets/ccsqm/", "").replace("/etc/ssl/certs/ca-certificates.crt", "ca.pem");
    let text = text.replace("/etc/ccsqm-gateway/tls/", "").replace("10.0.0.5:8443", "0.0.0.0:8443");
    let runtime = format!("{}/", folder.path().display());
    let text = text.replace("/run/ccsqm-gateway/", &runtime);
    (folder, text)
}

/// Runs the binary with nothing in the environment but these variables: exit code, stdout, stderr.
fn run(args: &[&str], variables: &[(&str, &OsStr)]) -> (i32, String, String) {
    let output =
        Command::new(BINARY).args(args).env_clear().envs(variables.iter().copied()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn write(folder: &TempDir, text: &str) -> String {
    let path = folder.path().join("gateway.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn check(folder: &TempDir, text: &str) -> (i32, String, String) {
    run(&["check", "--config", &write(folder, text)], &[])
}

/// What is in effect, with these flags and variables.
fn effective(path: &str, flags: &[&str], variables: &[(&str, &str)]) -> Value {
    let mut args = vec!["check", "--json", "--config", path];
    args.extend(flags.iter().flat_map(|flag| ["--set", flag]));
    let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, OsStr::new(*value))).collect();
    let (_, out, error) = run(&args, &variables);
    serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{error}"))
}

/// The reference file with one text replaced, which must be there.
fn with(text: &str, good: &str, bad: &str) -> String {
    assert!(text.contains(good), "{good}");
    text.replacen(good, bad, 1)
}

/// `file:line: key: ` of the line that holds a text.
fn at(folder: &TempDir, text: &str, part: &str, key: &str) -> String {
    let start = text.find(part).unwrap() + part.len() - part.trim_start().len();
    let line = text[..start].matches('\n').count() + 1;
    format!("{}:{line}: {key}: ", folder.path().join("gateway.toml").display())
}

#[test]
fn every_shipped_configuration_is_valid() {
    for name in ["gateway.toml", "minimal.toml", "sandbox.toml"] {
        let (folder, text) = shipped(name);
        let (code, out, error) = check(&folder, &text);
        assert_eq!(code, 0, "{name}: {error}");
        assert!(out.contains("every process in this network namespace"), "{name}");
        assert!(!out.contains(SECRET) && !out.contains("sandbox-app-secret"), "{name}");
    }
}

/// Says of each file, one a line, what the schema for editors has against it.
const VALIDATOR: &str = r#"
import json, sys, tomllib, jsonschema
with open(sys.argv[1]) as file:
    schema = json.load(file)
jsonschema.Draft202012Validator.check_schema(schema)
validator = jsonschema.Draft202012Validator(schema)
for path in sys.argv[2:]:
    with open(path, "rb") as file:
        errors = list(validator.iter_errors(tomllib.load(file)))
    print(" ".join(error.json_path for error in errors) or "good")
"#;

#[test]
fn editor_schema_accepts_shipped_files_and_rejects_mistakes() {
    let root = env!("CARGO_MANIFEST_DIR");
    let validate = |files: &[String]| {
        let python = Command::new("/usr/bin/python3")
            .args(["-c", VALIDATOR, &format!("{root}/config/gateway.schema.json")])
            .args(files)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&python.stderr);
        assert!(python.status.success(), "{error}");
        String::from_utf8(python.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let shipped =
        ["gateway.toml", "minimal.toml", "sandbox.toml"].map(|name| format!("{root}/config/{name}"));
    assert_eq!(validate(&shipped), ["good"; 3]);
    let good = fs::read_to_string(&shipped[0]).unwrap();
    let folder = TempDir::new().unwrap();
    let mistakes = [
        ("workers = 1 ", "workers = 65 ", "$.server.workers"),
        ("workers = 1 ", "worker = 1 ", "$.server"),
        ("max_body = \"256KiB\"", "max_body = 262144", "$.server.max_body"),
        ("header_timeout = \"10s\"", "header_timeout = \"10 s\"", "$.server.header_timeout"),
        ("base_url = ", "# ", "$.upstream"),
        ("http2 = \"off\"", "http2 = \"on\"", "$.upstream.http2"),
        ("refused_statuses = [401]", "refused_statuses = [500]", "$.token.refused_statuses[0]"),
        ("app_key_file = ", "app_key = ", "$.credentials[0]"),
        ("frozen = false  ", "frozen = 0  ", "$.callers[0].frozen"),
        ("[log]", "[logs]", "$"),
        ("success_codes = ", "# ", "$.routes[0]"),
        ("name = \"deleteQualityTask\"", "name = \"appointQualityTask\"", "$.routes[0]"),
    ];
    let files = mistakes.iter().enumerate().map(|(i, (right, wrong, _))| {
        let path = folder.path().join(format!("{i}.toml"));
        fs::write(&path, with(&good, right, wrong)).unwrap();
        path.to_str().unwrap().to_owned()
    });
    for ((_, wrong, place), said) in mistakes.iter().zip(validate(&files.collect::<Vec<_>>())) {
        assert!(said.split(' ').all(|said| said.starts_with(place)), "{wrong}: {said}");
    }
}

/// Runs `check` on a pseudoterminal without colours: exit code and what it shows.
fn check_on_terminal(path: &str, args: &[&str]) -> (Option<i32>, String) {
    run_on_terminal(path, args, "1")
}

fn run_on_terminal(path: &str, args: &[&str], no_color: &str) -> (Option<i32>, String) {
    const TERMINAL: &str =
        "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))";
    let output = Command::new("/usr/bin/python3")
        .args(["-c", TERMINAL, BINARY, "check", "--config", path])
        .args(args)
        .env_clear()
        .envs([("TERM", "xterm"), ("NO_COLOR", no_color)])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap().replace("\r\n", "\n"))
}

#[test]
fn check_on_a_terminal_shows_the_faulty_line_but_no_secret() {
    let (folder, text) = shipped("gateway.toml");
    let wrong = with(&text, "workers = 1 ", "workers = 0 ");
    let wrong = with(&wrong, "app_key_file = \"app_key\"", "app_key = \"s3cret\"");
    let wrong = with(&wrong, "app_secret_file = \"app_secret\"", "app_secret_file \"s3cret\"");
    let wrong = with(&wrong, "format = \"auto\"", "format = \"\u{9b}31m\"");
    let path = write(&folder, &wrong);
    let set = ["--set", "quota.burst=0"];
    let (code, told) = check_on_terminal(&path, &set);
    let line = |part: &str| wrong.lines().position(|line| line.starts_with(part)).unwrap() + 1;
    let number = line("workers = 0");
    let margin = " ".repeat(number.to_string().len());
    let first = format!(
        "error: server.workers: must be a whole number from 1 to 64, or \"auto\"\n{margin}--> {path}:{number}:11\n{margin} |\n\
         {number} | workers = 0\n{margin} |           ^\n"
    );
    assert!(code == Some(78) && told.starts_with(&first), "{told}");
    for part in ["app_key = ", "app_secret_file "] {
        assert!(told.contains(&format!("\n--> {path}:{}\n", line(part))), "{told}");
    }
    assert!(told.contains(&format!("\n{} | format = \"\\u009b31m\"\n", line("format = "))), "{told}");
    assert!(
        told.ends_with("error: --set quota.burst: quota.burst: must be a whole number from 1 to 1000000\n"),
        "{told}"
    );
    assert!(!told.contains("s3cret") && !told.contains(['\u{1b}', '\u{9b}']), "{told}");
    let (code, coloured) = run_on_terminal(&path, &set, "");
    assert!(code == Some(78) && coloured.contains("\u{1b}[") && !coloured.contains("s3cret"), "{coloured}");
}

/// The values of known keys that name no secret are shown, and nothing else of a line: somebody may have pasted a secret anywhere.
#[test]
fn check_on_a_terminal_shows_no_secret_at_any_position() {
    let (folder, text) = shipped("minimal.toml");
    let pem = "\"-----BEGIN PRIVATE KEY-----\ns3cret\nczNjcmV0s3cret==\n\"";
    for (good, bad) in [
        ("app_secret_file = \"app_secret\"", "app_secret: s3cret"),
        ("app_secret_file = \"app_secret\"", "app_secret =\ns3cret"),
        ("app_secret_file = \"app_secret\"", &format!("app_secret_file = {pem}")),
        ("app_secret_file = \"app_secret\"", "s3cret = 1\napp_secret_file = 1"),
        ("[[credentials]]", "[credentials.s3cret]\n[[credentials]]"),
        ("peer = \"loopback\"", "peer = \"loopback\"\npassword = \"s3cret\""),
        ("peer = \"loopback\"", "peer = \"loopback\"\nrequire_header = \"Bearer s3cret\""),
        ("peer = \"loopback\"", "peer = \"x\" # s3cret"),
        ("peer = \"loopback\"", "peer = \"x\"\t# s3cret"),
        ("peer = \"loopback\"", "peer = \"loopback\" # s3cret \u{7}"),
        ("[[credentials]]", "[token]\nurl = \"https://ak:s3cret@x/\"\n[[credentials]]"),
        ("[upstream]", "upstrem = { headers = { x-y = \"s3cret\" } }\n[upstream]"),
        ("[upstream]", "credentials = [{ name = \"default\", app_key = \"s3cret\" }]\n[upstream]"),
    ] {
        let (code, told) = check_on_terminal(&write(&folder, &with(&text, good, bad)), &[]);
        assert!(code == Some(78) && !told.contains("s3cret"), "{bad}: {told}");
    }
}

#[test]
fn mistake_neither_hides_nor_causes_another_one() {
    let (folder, text) = shipped("minimal.toml");
    let listener = |address: &str| format!("[[listeners]]\naddress = \"{address}\"\n");
    let routes = "routes = [\"appointQualityTask\"]";
    for (wrong, keys) in [
        (with(&text, routes, "routes = [\"a\",\n\"b\"]"), &["callers[0].routes", "callers[0].routes"][..]),
        (with(&text, routes, "routes = [true,\n\"a\"]"), &["callers[0].routes", "callers[0].routes"]),
        (with(&text, routes, "routes = [true]"), &["callers[0].routes"]),
        (
            [text.clone(), listener("bad"), listener("127.0.0.1:8080").repeat(2)].concat(),
            &["listeners[0].address", "listeners[2].address"],
        ),
        (text.clone() + "[[routes]]\nname = \"appointQualityTask\"\npath = \"x\"\n", &["routes[0].path"]),
        (text.clone() + "[[routes]]\nname = \"appointQualityTask\"\npat = \"x\"\n", &["routes[0].pat"]),
        (format!("\"callers[0]\" = 1\n{text}"), &["\"callers[0]\""]),
        (
            with(&format!("\"upstream.base_url\" = 1\n{text}"), "base_url = \"https", "# \""),
            &["\"upstream.base_url\"", "upstream.base_url"],
        ),
        (
            with(&text, "[[credentials]]", "[admin]\nhosts = [1.5, \"a b\"]\n[[credentials]]"),
            &["admin.hosts"; 2],
        ),
    ] {
        let (code, _, error) = check(&folder, &wrong);
        let told: Vec<_> = error.lines().map(|line| line.split(": ").nth(1).unwrap_or_default()).collect();
        assert!(code == 78 && told == keys, "{error}");
        assert!(!error.contains("did you mean `path`") && !error.contains("result_field"), "{error}");
    }
    // A line that is no TOML may be the one that holds the item.
    let no_toml = write(&folder, &with(&text, routes, &format!("{routes}\noperators = [ x")));
    let (_, _, error) = run(&["check", "--config", &no_toml, "--set", "callers[0].operators[1]=5"], &[]);
    assert!(error.lines().count() == 1 && error.contains(": file: "), "{error}");
}

#[test]
fn flag_or_variable_of_any_name_is_applied_or_reported() {
    let (folder, text) = shipped("minimal.toml");
    let path = write(&folder, &text);
    let header = effective(&path, &["upstream.headers.x-a~b=v"], &[]);
    assert_eq!(header["configuration"]["upstream"]["headers"]["x-a~b"], "v", "{header}");
    for (name, says) in [
        ("SERVER____WORKERS", "the setting is named CCSQM_GATEWAY__SERVER__WORKERS"),
        ("SERVER__", "known here: workers, "),
        ("SERVER__WORKERS ", "did you mean `workers`?"),
    ] {
        let (code, _, error) =
            run(&["check", "--config", &path], &[(&format!("CCSQM_GATEWAY__{name}"), OsStr::new("2"))]);
        assert!(code == 78 && error.lines().count() == 1 && error.contains(says), "{name}: {error}");
    }
    for key in ["", "a b", "listeners.größe", &format!("{}a", "a.".repeat(5000))] {
        let (code, _, error) = run(&["check", "--config", &path, "--set", &format!("{key}=1")], &[]);
        assert!(code == 78 && error.lines().count() == 1, "{key:.20}: {error:.300}");
    }
}

/// The gateway's configuration in the Kubernetes example.
fn of_sidecar() -> String {
    let text =
        fs::read_to_string(format!("{}/deploy/kubernetes/sidecar.yaml", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let (_, text) = text.split_once("  gateway.toml: |\n").unwrap();
    text.lines().map_while(|line| line.strip_prefix("    ")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn every_shipped_deployment_creates_its_trail_once() {
    let (folder, _) = shipped("minimal.toml");
    let audit = folder.path().join("state/audit");
    let of_sidecar = of_sidecar().replace("/run/secrets/ccsqm/", "");
    let (_, minimal) = shipped("minimal.toml");
    for (text, variables) in [
        (with(&of_sidecar, "/var/lib/ccsqm-gateway/audit", audit.to_str().unwrap()), vec![]),
        (minimal, vec![("DIRECTORY", audit.as_os_str()), ("MUST_EXIST", OsStr::new("true"))]), // as in compose.yaml
    ] {
        let path = write(&folder, &text);
        let names = ["CCSQM_GATEWAY__AUDIT__DIRECTORY", "CCSQM_GATEWAY__AUDIT__MUST_EXIST"];
        let variables: Vec<_> =
            variables.iter().zip(names).map(|((_, value), name)| (name, *value)).collect();
        let check = || run(&["check", "--config", &path], &variables);
        let (code, _, error) = check();
        assert!(code == 78 && error.contains(&format!("audit init {}", audit.display())), "{error}");
        assert_eq!(run(&["audit", "init", audit.to_str().unwrap()], &[]).0, 0);
        assert_eq!(check().0, 0, "{}", check().2);
        fs::remove_dir_all(&audit).unwrap();
    }
    for file in ["compose.yaml", "kubernetes/audit-init.yaml", "systemd/ccsqm-gateway.service"] {
        let text = fs::read_to_string(format!("{}/deploy/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let says = ["audit init /var/lib/ccsqm-gateway/audit", "[audit, init, /var/lib/ccsqm-gateway/audit]"];
        assert!(says.iter().any(|says| text.contains(says)), "{file} says how it is made");
        assert!(!text.lines().any(|line| line.starts_with("ExecStartPre")), "{file}");
    }
}

#[test]
fn every_shipped_healthcheck_uses_the_configured_address() {
    let root = env!("CARGO_MANIFEST_DIR");
    for (file, probes) in [("Dockerfile", 1), ("kubernetes/sidecar.yaml", 3)] {
        let text = fs::read_to_string(format!("{root}/deploy/{file}")).unwrap().replace('"', "");
        let asks: Vec<_> = text.lines().filter(|line| line.contains("ccsqm-gateway, healthcheck")).collect();
        assert_eq!(asks.len(), probes, "{file}: {asks:?}");
        for line in asks {
            assert!(
                line.contains("healthcheck, --config, /etc/ccsqm-gateway/gateway.toml"),
                "{file}: {line}"
            );
        }
    }
    // There the image's configuration lies, and the example's is mounted.
    let image = fs::read_to_string(format!("{root}/deploy/Dockerfile")).unwrap();
    assert!(image.contains(r#"CMD ["serve", "--config", "/etc/ccsqm-gateway/gateway.toml"]"#), "{image}");
}

#[test]
fn each_of_up_to_twenty_mistakes_is_reported_once_with_its_place() {
    let (folder, text) = shipped("gateway.toml");
    let (code, _, error) = check(&folder, &text);
    assert_eq!(code, 0, "the control: {error}");
    let keys = keys_of(&text);
    assert!(keys.len() > 45, "the reference file has {} keys", keys.len());
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64;
    let seed = std::env::var("SEED").map_or(seed, |seed| seed.parse().unwrap());
    let rounds = std::env::var("ROUNDS").map_or(200, |rounds| rounds.parse().unwrap());
    let mut random = Random(seed);
    let (mut broken, mut ways, mut layers) = (BTreeSet::new(), BTreeSet::new(), [0; 3]);
    for round in 0..rounds {
        let count = 1 + random.below(20);
        let mistakes = mistakes(&mut random, &keys, round % 2 == 1, count);
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let (mut flags, mut variables) = (Vec::new(), Vec::new());
        for (key, mistake) in &mistakes {
            match &mistake.layer {
                None => lines[key.line - 1] = mistake.text.clone(),
                Some((Layer::Flag, name, text)) => {
                    flags.extend(["--set".to_owned(), format!("{name}={text}")]);
                }
                Some((Layer::Variable, name, text)) => variables.push((name.as_str(), OsStr::new(text))),
            }
            layers[mistake.layer.as_ref().map_or(0, |(layer, ..)| 1 + *layer as usize)] += 1;
            broken.insert(key.path());
            ways.insert(mistake.way);
        }
        let path = write(&folder, &lines.join("\n"));
        let args: Vec<_> =
            ["check", "--config", &path].into_iter().chain(flags.iter().map(String::as_str)).collect();
        let (code, _, error) = run(&args, &variables);
        let told: Vec<&str> = error.lines().collect();
        let say = || format!("SEED={seed}, round {round}: {mistakes:#?}\n{error}");
        assert!(code == 78 && told.len() == count, "{} of {count}: {}", told.len(), say());
        for (key, mistake) in &mistakes {
            // A mistake may be two lines long; those before it shift it.
            let above = &lines[..if mistake.at_header { key.header } else { key.line } - 1];
            let number =
                above.iter().map(|line| line.lines().count().max(1)).sum::<usize>() + 1 + mistake.offset;
            let place = match &mistake.layer {
                None => format!("{path}:{number}"),
                Some((Layer::Flag, name, _)) => format!("--set {name}"),
                Some((Layer::Variable, name, _)) => format!("environment {name}"),
            };
            let place = format!("{place}: {}: ", mistake.key);
            let reasons: Vec<_> = told.iter().filter_map(|told| told.strip_prefix(&place)).collect();
            assert!(reasons.len() == 1 && !reasons[0].is_empty(), "{place}\n{}", say());
        }
        assert!(!error.contains("s3cret"), "{}", say());
    }
    assert!(
        rounds < 200
            || (broken.len() > 60 && ways.len() == WAYS.len() && layers.iter().all(|count| *count > 50)),
        "{} keys, {ways:?}, {layers:?}",
        broken.len()
    );
}

#[test]
fn misspelt_key_hides_no_other_mistake() {
    let (folder, text) = shipped("gateway.toml");
    let files = ["cert", "key"].map(|it| {
        text.lines().find(|line| line.starts_with(&format!("client_{it}_file"))).unwrap().to_owned()
    });
    for (name, misspelt, missing) in [
        // `operators` is nearer than what lacks.
        ("operators = ", "operatorxs = ", "operator_id = \"1611917095665261978\""),
        ("client_key_file = ", "client_kexy_file = ", &files[0]),
    ] {
        let wrong = with(&with(&text, name, misspelt), missing, "");
        let (code, _, error) = check(&folder, &wrong);
        assert!(code == 78 && error.lines().count() == 2, "{error}");
        let lacks = missing.split(' ').next().unwrap();
        // Where secrets are named, it is not quoted: it may be one.
        let unknown = if name.starts_with("client") { "upstream" } else { misspelt.trim_end_matches(" = ") };
        let meant = name.trim_end_matches(" = ");
        assert!(error.contains(&format!("{unknown}: unknown key; did you mean `{meant}`?")), "{error}");
        assert!(error.contains(&format!(".{lacks}: is ")), "{error}");
        // Without that, the misspelling explains what lacks.
        let (_, _, error) = check(&folder, &with(&text, name, misspelt));
        assert!(error.lines().count() == 1 && error.contains("unknown key"), "{error}");
    }
}

/// A flag is read beside the right key of the file; a line of the file would replace it.
#[test]
fn misspelt_flag_beside_the_right_key_is_reported_once() {
    let (folder, text) = shipped("gateway.toml");
    let path = write(&folder, &text);
    for key in keys_of(&text) {
        let (first, rest) = key.name.split_at(1);
        let misspelt = format!("{}.{first}x{rest}", key.section);
        let flag = format!("{misspelt}={}", key.value);
        let (code, _, error) = run(&["check", "--config", &path, "--set", &flag], &[]);
        assert!(code == 78 && error.lines().count() == 1, "{flag}: {error}");
        assert!(error.starts_with(&format!("--set {misspelt}: ")), "{flag}: {error}");
    }
}

#[test]
fn dangerous_configuration_settings_are_rejected() {
    let (folder, text) = shipped("minimal.toml");
    assert_eq!(check(&folder, &text).0, 0, "the control");
    let plain = with(&text, "https://service", "http://service");
    let header = "base_url = \"https://service.besclouds.com\"";
    for (wrong, reason) in [
        (plain, "loopback address only"),
        (with(&text, header, ""), "upstream.base_url: is missing"),
        (text.clone() + "[[listeners]]\naddress = \"0.0.0.0:8080\"\n", "allow_plaintext"),
        (
            text.clone()
                + "[[callers]]\nname = \"b\"\npeer = \"loopback\"\noperator_id = \"1\"\ncredential = \"default\"\nroutes = [\"appointQualityTask\"]\n",
            "can be both",
        ),
        (
            text.clone() + "[[credentials]]\nname = \"b\"\napp_key = \"k\"\napp_secret = \"s\"\n",
            "must not be in the configuration",
        ),
        (
            with(&text, header, &format!("{header}\nheaders = {{ authorization = \"x\" }}")),
            "set by the gateway itself",
        ),
        (with(&text, header, &format!("{header}\nheaders = {{ x_api_key = \"x\" }}")), "looks like a secret"),
        (
            text.clone() + "[[listeners]]\naddress = \"127.0.0.1:9090\"\n",
            "admin.address: overlaps with listeners[0].address",
        ),
        (text.clone() + "[log]\nlevel = \"inof\"\n", "log.level"),
        (
            with(&text, header, &format!("{header}\nproxy = \"http://u:p@egress.internal:3128\"")),
            "upstream.proxy: must not contain a user: put user and password",
        ),
        (
            with(&text, header, &format!("{header}\nproxy = \"http://e:1\"\nproxy_user_file = \"app_key\"")),
            "upstream.proxy_password_file: is needed for proxy_user_file",
        ),
        (
            with(
                &text,
                header,
                &format!("{header}\nproxy = \"http://e:1\"\nproxy_password_file = \"app_key\""),
            ),
            "upstream.proxy_user_file: is needed for proxy_password_file",
        ),
        (
            with(
                &text,
                header,
                &format!("{header}\nproxy_user_file = \"app_key\"\nproxy_password_file = \"app_key\""),
            ),
            "upstream.proxy: is needed for proxy_user_file",
        ),
        (
            with(&text, header, &format!("{header}\nhttp2 = \"on\"")),
            "upstream.http2: must be \"off\" or \"auto\"",
        ),
        (
            with(&text, "peer = \"loopback\"", "peer = \"loopback\"\nbare_ids = \"ignore\""),
            "callers[0].bare_ids: must be \"detect\", \"exact\" or \"refuse\"",
        ),
        (
            with(&text, "peer = \"loopback\"", "peer = \"loopback\"\nmax_keys = 1000001")
                + "[idempotency]\nmax_keys = 1000000\n",
            "callers[0].max_keys: must not be more than idempotency.max_keys",
        ),
    ] {
        let (code, _, error) = check(&folder, &wrong);
        assert!(code == 78 && error.contains(reason), "{reason}: {error}");
    }
}

#[test]
fn conflict_between_two_values_is_reported_at_the_first_one() {
    let (folder, text) = shipped("gateway.toml");
    for (good, bad, key) in [
        ("connect_timeout = \"3s\"", "connect_timeout = \"31s\"", "upstream.connect_timeout"),
        ("max_connections = 64", "max_connections = 0x01", "upstream.max_connections"),
        ("fingerprint_window = \"10m\"", "fingerprint_window = \"2h\"", "idempotency.fingerprint_window"),
        ("peer = \"loopback\"", "peer = \"uid:1000\"", "callers[0].peer"),
    ] {
        let text =
            with(&text, "workers = 1 ", "workers = 2 ").replace("\nwindow = \"24h\"", "\nwindow = \"1h\"");
        // A Unix socket would see the caller by its user.
        let text = if key == "callers[0].peer" {
            text.replace("address = \"unix:", "# \"").replace("mode =", "address = \"127.0.0.1:1\" #")
        } else {
            text
        };
        assert_eq!(check(&folder, &text).0, 0, "the control of {key}");
        let wrong = with(&text, good, bad);
        let (code, _, error) = check(&folder, &wrong);
        assert!(code == 78 && error.starts_with(&at(&folder, &wrong, bad, key)), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn built_in_route_can_be_overridden_once_and_in_part() {
    let (folder, text) = shipped("minimal.toml");
    let built_in = "[[routes]]\nname = \"appointQualityTask\"\n";
    assert_eq!(check(&folder, &format!("{text}\n{built_in}timeout = \"1s\"\n")).0, 0, "the control");
    for (more, key) in [
        (built_in.repeat(2), "routes[1].name: `appointQualityTask` is taken already"),
        (format!("{built_in}path = \"/apiaccess/x\"\n"), "routes[0].path: unknown key; known here: name"),
    ] {
        let (code, _, error) = check(&folder, &format!("{text}\n{more}"));
        assert!(code == 78 && error.contains(key) && error.lines().count() == 1, "{error}");
    }
}

#[test]
fn invalid_toml_line_is_reported_once_and_hides_nothing_else() {
    let (folder, text) = shipped("gateway.toml");
    let wrong = with(&text, "[\"localhost\", \"127.0.0.1\", \"[::1]\"]", "[\"localhost\", ");
    let wrong = with(&wrong, "workers = 1 ", "workers = 0 ");
    let wrong = with(&wrong, "format = \"auto\"", "format = auto");
    let (code, _, error) = check(&folder, &wrong);
    let lines: Vec<_> = error.lines().collect();
    assert!(code == 78 && lines.len() == 3, "{error}");
    assert!(lines[0].starts_with(&at(&folder, &wrong, "hosts = [\"localhost\", ", "file")), "{error}");
    assert!(lines[1].starts_with(&at(&folder, &wrong, "workers = 0 ", "server.workers")), "{error}");
    assert!(lines[2].starts_with(&at(&folder, &wrong, "format = auto", "file")), "{error}");
    // A broken header hides its section, but not the other broken lines, and not what is set elsewhere.
    let wrong = with(&wrong, "[server]", "[server");
    let (_, _, error) = run(
        &["check", "--config", &write(&folder, &wrong), "--set", "quota.burst=0"],
        &[("CCSQM_GATEWAY__SERVER__WORKER", OsStr::new("1"))],
    );
    let keys: Vec<_> = error.lines().map(|line| line.split(": ").nth(1).unwrap_or_default()).collect();
    assert_eq!(keys, ["file", "file", "file", "server.worker", "quota.burst"], "{error}");
}

#[test]
fn hostile_configuration_files_are_rejected_in_clear_lines() {
    let (folder, good) = shipped("minimal.toml");
    let file = folder.path().join("gateway.toml");
    let open_text = good.clone() + "x = \"\"\"\n" + &"no end\n".repeat(1000);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], ":1: callers: at least one"),
        ("blank", b"\n \n\t\n".to_vec(), ":1: upstream.base_url: is missing"),
        ("not a configuration", b"#!/bin/sh\necho hello\n".to_vec(), ":2: file: "),
        ("NUL", [good.as_bytes(), b"\0\0\0"].concat(), ": file: "),
        ("NUL in a text", [good.as_bytes(), b"\n[log]\nlevel = \"a\0b\"\n"].concat(), ": file: "),
        ("not UTF-8", [good.as_bytes(), b"\xff\xfe"].concat(), ": file: is not UTF-8"),
        (
            "binary",
            (0..200_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect(),
            ":1: file: ",
        ),
        ("UTF-16", good.encode_utf16().flat_map(u16::to_le_bytes).collect(), ": file: "),
        ("deep arrays", format!("a = {}", "[".repeat(100_000)).into(), ":1: file: "),
        ("deep tables", format!("a = {}", "{a=".repeat(50_000)).into(), ":1: file: "),
        ("a deep key", format!("{}a = 1", "a.".repeat(50_000)).into(), ":1: file: "),
        ("a deep header", format!("{good}[{}a]", "a.".repeat(50_000)).into(), ": file: "),
        ("many brackets", "[".repeat(200_000).into(), ":1: file: "),
        ("a text without end", open_text.into(), ": file: "),
        ("huge", "# nothing\n".repeat(1_000_000).into(), ":1: file: is larger than"),
        (
            "many keys",
            (0..20_000).map(|i| format!("k{i} = 1\n")).collect::<String>().into(),
            ":20000: k19999: unknown key",
        ),
        (
            "a line break in a key",
            (good.clone() + "[log]\n\"a\\nb\" = 1\n").into(),
            ": log.a\\nb: unknown key",
        ),
        (
            "a number beyond 64 bits",
            (good + "[quota]\nburst = 99999999999999999999\n").into(),
            ": quota.burst: ",
        ),
    ];
    let shown = file.display().to_string();
    let refused = |name: &str, path: &str, reason: &str| {
        let (code, out, error) = run(&["check", "--config", path], &[]);
        assert!(code == 78 && out.is_empty(), "{name}: {code} {error:.2000}");
        assert!(error.contains(reason) && !error.contains("panicked"), "{name}: {error:.2000}");
        assert!(error.lines().all(|line| line.starts_with(path)), "{name}: {error:.2000}");
    };
    for (name, bytes, reason) in cases {
        fs::write(&file, bytes).unwrap();
        refused(name, &shown, reason);
    }
    refused(
        "a directory",
        folder.path().to_str().unwrap(),
        ":1: file: cannot be read: is not a regular file, but a directory",
    );
    refused("absent", &format!("{shown}.absent"), ":1: file: cannot be read: No such file");
    refused("endless", "/dev/zero", ":1: file: is larger than");
}

/// Exit code and errors of `check`, run by somebody who may not read everything, as root may.
fn check_as_nobody(binary: &Path, path: &str, is_root: bool) -> (i32, String) {
    let mut command = Command::new(binary);
    command.args(["check", "--config", path]).env_clear();
    if is_root {
        command.uid(65_534).gid(65_534);
    }
    let output = command.output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn unreadable_file_is_reported_at_the_key_that_names_it() {
    let (folder, text) = shipped("gateway.toml");
    let path = write(&folder, &text);
    let binary = folder.path().join("binary");
    assert!(Command::new("cp").arg(BINARY).arg(&binary).status().unwrap().success());
    let is_root = fs::metadata(folder.path()).unwrap().uid() == 0;
    if is_root {
        assert!(
            Command::new("chown").args(["-R", "65534:65534"]).arg(folder.path()).status().unwrap().success()
        );
    }
    let check = || check_as_nobody(&binary, &path, is_root);
    for (name, file, key) in [
        ("cert_file", "cert.pem", "listeners[2].tls.cert_file"),
        ("key_file", "tls.key", "listeners[2].tls.key_file"),
        ("client_ca_file", "client-ca.pem", "listeners[2].tls.client_ca_file"),
        ("client_crl_file", "crl.pem", "listeners[2].tls.client_crl_file"),
        ("ca_file", "ca.pem", "upstream.ca_file"),
        ("client_cert_file", "client.pem", "upstream.client_cert_file"),
        ("client_key_file", "client.key", "upstream.client_key_file"),
        ("proxy_user_file", "proxy_user", "upstream.proxy_user_file"),
        ("proxy_password_file", "proxy_password", "upstream.proxy_password_file"),
        ("contract_file", "contracts/deleteQualityTask.json", "routes[0].contract_file"),
        ("key_file", "audit.key", "audit.key_file"),
    ] {
        let file_at = folder.path().join(file);
        assert_eq!(check().0, 0, "the control: {file} {}", check().1);
        fs::set_permissions(&file_at, fs::Permissions::from_mode(0o000)).unwrap();
        let (code, error) = check();
        let place = at(&folder, &text, &format!("{name} = \"{file}\""), key);
        assert!(code == 78 && error.starts_with(&place), "{place}: {error}");
        assert!(error.contains("Permission denied") && error.lines().count() == 1, "{error}");
        fs::set_permissions(&file_at, fs::Permissions::from_mode(0o600)).unwrap();
    }
}

#[test]
fn unreadable_configuration_file_is_rejected() {
    let (folder, text) = shipped("minimal.toml");
    let path = write(&folder, &text);
    let forbid = |file: &str| fs::set_permissions(file, fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // Root may read everything, so that this runs as somebody else, who must reach the binary.
    let binary = folder.path().join("binary");
    // Not by this process: what another test starts meanwhile would hold the file open for writing.
    assert!(Command::new("cp").arg(BINARY).arg(&binary).status().unwrap().success());
    let is_root = fs::metadata(folder.path()).unwrap().uid() == 0;
    let check = || check_as_nobody(&binary, &path, is_root);
    let wrong_directory = check();
    if is_root {
        // The folder is root's: no audit directory can be made in it.
        assert!(
            wrong_directory.0 == 78 && wrong_directory.1.contains("audit.directory: "),
            "{wrong_directory:?}"
        );
        assert!(wrong_directory.1.lines().count() == 1 && wrong_directory.1.contains("cannot be made"));
    }
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(check().0, 0, "the control: {}", check().1);
    let secret = folder.path().join("app_secret");
    forbid(secret.to_str().unwrap());
    let (code, error) = check();
    assert!(
        code == 78
            && error.starts_with(&at(&folder, &text, "app_secret_file", "credentials[0].app_secret_file")),
        "{error}"
    );
    assert!(error.contains("Permission denied") && error.lines().count() == 1, "{error}");
    forbid(&path);
    let (code, error) = check();
    assert!(
        code == 78 && error.starts_with(&format!("{path}:1: file: cannot be read: Permission denied")),
        "{error}"
    );
}

#[test]
fn environment_overrides_the_file_and_flags_override_both() {
    let (folder, text) = shipped("gateway.toml");
    let path = write(&folder, &text);
    let of = |flags: &[&str], variables: &[(&str, &str)]| {
        effective(&path, flags, variables)["configuration"].clone()
    };
    let file = of(&[], &[]);
    assert_eq!(file["server"]["workers"], 1);
    let variable = [("CCSQM_GATEWAY__SERVER__WORKERS", "2")];
    assert_eq!(of(&[], &variable)["server"]["workers"], 2);
    assert_eq!(of(&["server.workers=3"], &variable)["server"]["workers"], 3);
    assert_eq!(of(&["server.workers=3", "server.workers=4"], &[])["server"]["workers"], 4, "the last flag");
    let mut only = file.clone();
    only["server"]["workers"] = json!(2);
    assert_eq!(of(&[], &variable), only, "nothing else moves");
    for (variable, value, pointer, expected) in [
        ("UPSTREAM__BASE_URL", "http://127.0.0.1:1", "/upstream/base_url", json!("http://127.0.0.1:1")),
        ("UPSTREAM__BASE_URL", "http://127.0.0.1:1", "/token/url", file["token"]["url"].clone()),
        ("UPSTREAM__HEADERS__X-TENANTSPACEID", "7", "/upstream/headers/x-tenantspaceid", json!("7")),
        ("UPSTREAM__HEADERS__X_TENANTSPACEID", "7", "/upstream/headers/x-tenantspaceid", json!("7")),
        ("TOKEN__REFUSED_STATUSES", "[401, 403]", "/token/refused_statuses", json!([401, 403])),
        ("TOKEN__LIFETIME", "none", "/token/lifetime", json!("none")),
        ("ADMIN__HOSTS", "ops.internal", "/admin/hosts", json!(["ops.internal"])),
        ("ADMIN__HOSTS", "ops.internal,[::1]", "/admin/hosts", json!(["ops.internal", "[::1]"])),
        ("ADMIN__HOSTS", "[::1]", "/admin/hosts", json!(["[::1]"])),
        ("ADMIN__HOSTS", "[::1],[::2]", "/admin/hosts", json!(["[::1]", "[::2]"])),
        ("ADMIN__HOSTS", "[\"[::1]\", \"ops\"]", "/admin/hosts", json!(["[::1]", "ops"])),
        ("SERVER__MAX_BODY", "2MiB", "/server/max_body", json!("2MiB")),
        ("QUOTA__RATE", "5/h", "/quota/rate", json!("5/h")),
        ("LOG__FORMAT", "json", "/log/format", json!("json")),
    ] {
        let name = format!("CCSQM_GATEWAY__{variable}");
        assert_eq!(of(&[], &[(&name, value)]).pointer(pointer), Some(&expected), "{name}");
    }
    let (minimal, text) = shipped("minimal.toml");
    let path = write(&minimal, &text);
    let moved = effective(&path, &["upstream.base_url=http://127.0.0.1:1"], &[]);
    let token_url = "http://127.0.0.1:1/apigovernance/api/oauth/tokenByAkSk";
    assert_eq!(moved["configuration"]["token"]["url"], token_url, "the default follows base_url");
}

#[test]
fn flag_sets_a_key_of_an_item_in_a_list_of_tables() {
    let (folder, text) = shipped("gateway.toml");
    let whole = write(&folder, &text);
    let (folder, text) = shipped("minimal.toml");
    let minimal = write(&folder, &text); // has no listener
    for (path, flags, pointer, expected) in [
        (&whole, &["listeners[0].address=127.0.0.1:1"][..], "/listeners/0/address", json!("127.0.0.1:1")),
        (
            &whole,
            &["listeners[2].tls.client_ca_file=ca.pem"],
            "/listeners/0/address",
            json!("127.0.0.1:8080"),
        ),
        (&whole, &["callers[0].operators=1,2"], "/callers/0/operators", json!(["1", "2"])),
        (
            &whole,
            &["callers[0].routes[0]=deleteQualityTask"],
            "/callers/0/routes",
            json!(["deleteQualityTask"]),
        ),
        (&minimal, &["listeners[0].address=127.0.0.1:1"], "/listeners/0/address", json!("127.0.0.1:1")),
        (
            &minimal,
            &["listeners[0].address=127.0.0.1:1", "listeners[1].address=127.0.0.1:2"],
            "/listeners/1/hosts/0",
            json!("localhost"),
        ),
        (
            &minimal,
            &["routes[0].name=appointQualityTask", "routes[0].frozen=true"],
            "/routes/0/frozen",
            json!(true),
        ),
    ] {
        let shown = effective(path, flags, &[]);
        assert_eq!(shown["configuration"].pointer(pointer), Some(&expected), "{flags:?} {shown}");
    }
    for (set, reason) in [
        ("listeners[9].address=127.0.0.1:1", "names neither an item of the list"),
        ("callers[2].peer=uid:1", "names neither an item of the list"),
        ("listeners[-1].address=127.0.0.1:1", "is no key"),
        ("listeners[].address=127.0.0.1:1", "is no key"),
        ("listeners[0.address=127.0.0.1:1", "is no key"),
        ("listeners[0]address=127.0.0.1:1", "is no key"),
        ("listeners[99999999999999999999].address=x", "is no key"),
        ("callers[0]=x", "is a section, not a value"),
        ("server[0].workers=1", "lies below a value"),
        ("callers[0].peer.uid=1", "lies below a value"),
        ("callers[0].peers=uid:1", "did you mean `peer`?"),
        ("callers[0].peer=uid:x", "callers[0].peer: "),
    ] {
        let (code, _, error) = run(&["check", "--config", &whole, "--set", set], &[]);
        assert!(code == 78 && error.lines().count() == 1, "{set}: {error}");
        let place = format!("--set {}: ", set.split('=').next().unwrap());
        assert!(error.starts_with(&place) && error.contains(reason), "{set}: {error}");
    }
}

const LIST_OF_TABLES: &str = "set a list of tables in the file, or keys of its items by flags";

#[test]
fn invalid_variable_or_flag_is_rejected_by_name() {
    let (folder, text) = shipped("gateway.toml");
    let path = write(&folder, &text);
    let not_text = OsStr::from_bytes(b"\xff");
    let variables: [(&str, &OsStr, &str); 14] = [
        ("SERVER__WORKER", OsStr::new("2"), "did you mean `workers`?"),
        ("SERVR__WORKERS", OsStr::new("2"), "did you mean `server`?"),
        ("WORKERS", OsStr::new("2"), "unknown key"),
        ("SERVER", OsStr::new("2"), "is a section, not a value"),
        ("SERVER__WORKERS", OsStr::new("0"), "from 1 to 64"),
        ("SERVER__WORKERS", OsStr::new(""), "from 1 to 64"),
        ("SERVER__WORKERS", not_text, "is not UTF-8"),
        ("SERVER__WORKERS__MORE", OsStr::new("1"), "lies below a value"),
        ("server__workers", OsStr::new("2"), "in capitals"),
        ("", OsStr::new("2"), "CCSQM_GATEWAY__SECTION__KEY"),
        ("SERVER__BODY_TIMEOUT", OsStr::new("10"), "a number with a unit"),
        ("CALLERS", OsStr::new("[]"), LIST_OF_TABLES),
        ("CALLERS__0__PEER", OsStr::new("uid:0"), LIST_OF_TABLES),
        ("LISTENERS__ADDRESS", OsStr::new("127.0.0.1:1"), LIST_OF_TABLES),
    ];
    for (name, value, reason) in variables {
        let name = format!("CCSQM_GATEWAY__{name}");
        let (code, _, error) = run(&["check", "--config", &path], &[(&name, value)]);
        assert!(code == 78 && error.lines().count() == 1, "{name}: {error}");
        assert!(
            error.starts_with(&format!("environment {name}: ")) && error.contains(reason),
            "{name}: {error}"
        );
    }
    let (minimal, text) = shipped("minimal.toml");
    let without_listeners = write(&minimal, &text);
    for (key, reason) in [
        ("listeners.address", LIST_OF_TABLES),
        ("listeners", LIST_OF_TABLES),
        ("server.worker", "did you mean `workers`?"),
    ] {
        let set = format!("{key}=1");
        let (code, _, error) = run(&["check", "--config", &without_listeners, "--set", &set], &[]);
        assert!(code == 78 && error.starts_with("--set ") && error.contains(reason), "{key}: {error}");
    }
    // Kubernetes sets such variables for a service of our name, and other programs have their own.
    for name in ["CCSQM_GATEWAY_SERVICE_HOST", "CCSQM_GATEWAY_PORT_8080_TCP", "CCSQM_GATEWAYS__X__Y"] {
        let (code, _, error) = run(&["check", "--config", &path], &[(name, OsStr::new("x"))]);
        assert_eq!(code, 0, "{name}: {error}");
    }
    // All at once, with those of the file.
    let wrong = write(&folder, &with(&fs::read_to_string(&path).unwrap(), "workers = 1 ", "workers = 0 "));
    let (_, _, error) = run(
        &["check", "--config", &wrong, "--set", "quota.brust=1"],
        &[("CCSQM_GATEWAY__CALLERS", OsStr::new("x")), ("CCSQM_GATEWAY__LOG__LEVEL", OsStr::new("loud"))],
    );
    assert_eq!(error.lines().count(), 4, "{error}");
}

#[test]
fn check_finds_start_failures_and_creates_nothing() {
    let (folder, text) = shipped("gateway.toml");
    let make = |name: &str, content: &[u8]| fs::write(folder.path().join(name), content).unwrap();
    make("empty", b"");
    make("newline", b"\n");
    make("two_lines", b"a\nb\n");
    make("short", b"too short");
    make("colon", b"user:password");
    make("nul", b"a\0b");
    make("not_pem", b"no certificate");
    make("no_json", b"{");
    make("no_schema", br#"{ "type": "object", "additionalProperties": false, "oneOf": [] }"#);
    make("broken.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    fs::create_dir(folder.path().join("trail")).unwrap();
    make("trail/audit.key", b"too short");
    assert!(Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap().success());
    let files = || -> BTreeSet<_> {
        fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let path = write(&folder, &text);
    let before = files();
    assert_eq!(check(&folder, &text).0, 0, "the control");
    assert_eq!(files(), before, "a good check makes nothing");
    let set = |name: &str, old: &str, new: &str| {
        with(&text, &format!("{name} = \"{old}\""), &format!("{name} = \"{new}\""))
    };
    let contract = "contracts/deleteQualityTask.json";
    let own_key = text.replace("key_file = \"audit.key\"", "#");
    let mut cases = vec![
        ("audit.directory", own_key.replace("\"audit\"", "\"trail\""), "at least 32 bytes"),
        ("audit.directory", set("directory", "audit", "app_key"), "is not a directory"),
        ("audit.directory", set("directory", "audit", "app_key/deeper"), "app_key"),
    ];
    for (file, reason) in [
        ("absent", "no such file"),
        ("empty", "is empty"),
        ("newline", "is empty"),
        ("trail", "is not a regular file"),
        ("pipe", "is not a regular file"),
    ] {
        cases.push(("credentials[0].app_key_file", set("app_key_file", "app_key", file), reason));
        cases.push(("credentials[0].app_secret_file", set("app_secret_file", "app_secret", file), reason));
        cases.push(("upstream.proxy_user_file", set("proxy_user_file", "proxy_user", file), reason));
        let password = set("proxy_password_file", "proxy_password", file);
        cases.push(("upstream.proxy_password_file", password, reason));
    }
    cases.push((
        "credentials[0].app_key_file",
        set("app_key_file", "app_key", "two_lines"),
        "more than one line",
    ));
    for (file, reason) in
        [("colon", "contains a colon"), ("two_lines", "more than one line"), ("nul", "a control")]
    {
        cases.push(("upstream.proxy_user_file", set("proxy_user_file", "proxy_user", file), reason));
        if file != "colon" {
            let password = set("proxy_password_file", "proxy_password", file);
            cases.push(("upstream.proxy_password_file", password, reason));
        }
    }
    for (file, reason) in [
        ("absent", "No such file"),
        ("not_pem", "certificate"),
        ("broken.pem", "certificate"),
        ("trail", "is not a regular file"),
    ] {
        cases.push(("upstream.ca_file", set("ca_file", "ca.pem", file), reason));
    }
    let other = rcgen::generate_simple_self_signed(vec!["other".to_owned()]).unwrap();
    fs::write(folder.path().join("other.pem"), other.cert.pem()).unwrap();
    let before = files();
    let client_ca = "client_ca_file";
    cases.push((
        "listeners[2].tls.cert_file",
        set("cert_file", "cert.pem", "other.pem"),
        "key_file is not the key",
    ));
    cases.push(("listeners[2].tls.client_ca_file", set(client_ca, "client-ca.pem", "broken.pem"), client_ca));
    for (key, file, reason) in [
        ("listeners[2].tls.cert_file", "cert.pem", "holds no certificate"),
        ("listeners[2].tls.key_file", "tls.key", "holds no private key"),
        ("listeners[2].tls.client_ca_file", "client-ca.pem", "holds no certificate"),
        ("listeners[2].tls.client_crl_file", "crl.pem", "holds no revocation list"),
    ] {
        cases.push((key, set(key.rsplit('.').next().unwrap(), file, "not_pem"), reason));
    }
    cases.push((
        "upstream.client_cert_file",
        set("client_cert_file", "client.pem", "not_pem"),
        "no certificate",
    ));
    cases.push((
        "upstream.client_key_file",
        set("client_key_file", "client.key", "not_pem"),
        "no private key",
    ));
    let mismatch = "client_key_file is not the key";
    cases.push(("upstream.client_cert_file", set("client_cert_file", "client.pem", "other.pem"), mismatch));
    for (file, reason) in [("absent", "no such file"), ("trail", "is not a regular file")] {
        cases.push(("listeners[2].tls.cert_file", set("cert_file", "cert.pem", file), reason));
        cases.push(("listeners[2].tls.key_file", set("key_file", "tls.key", file), reason));
        cases.push(("listeners[2].tls.client_ca_file", set("client_ca_file", "client-ca.pem", file), reason));
        cases.push(("listeners[2].tls.client_crl_file", set("client_crl_file", "crl.pem", file), reason));
    }
    for (file, reason) in
        [("absent", "No such file"), ("short", "at least 32 bytes"), ("pipe", "is not a regular file")]
    {
        cases.push(("audit.key_file", set("key_file", "audit.key", file), reason));
    }
    for (file, reason) in [
        ("absent", "No such file"),
        ("no_json", "#: "),
        ("no_schema", "oneOf"),
        ("pipe", "is not a regular file"),
    ] {
        cases.push(("routes[0].contract_file", set("contract_file", contract, file), reason));
    }
    for (key, wrong, reason) in cases {
        let line = text.lines().zip(wrong.lines()).take_while(|(good, bad)| good == bad).count() + 1;
        fs::write(&path, &wrong).unwrap();
        for command in ["check", "serve"] {
            let (code, _, error) = run(&[command, "--config", &path], &[]);
            let place = format!("{path}:{line}: {key}: ");
            assert!(code == 78 && error.starts_with(&place), "{command} {key} {reason}: {code} {error}");
            assert!(error.to_lowercase().contains(&reason.to_lowercase()), "{reason}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        assert_eq!(files(), before, "a bad check makes nothing");
    }
    let no_roots =
        [("SSL_CERT_FILE", OsStr::new("/dev/null")), ("SSL_CERT_DIR", OsStr::new("/proc/self/fd"))];
    let own_roots = write(&folder, &text);
    assert_eq!(run(&["check", "--config", &own_roots], &no_roots).0, 0, "the control");
    let systems_roots = write(&folder, &text.replace("\nca_file = ", "\n# "));
    let (code, _, error) = run(&["check", "--config", &systems_roots], &no_roots);
    assert!(
        code == 78 && error.contains(": upstream.ca_file: is needed here: no root certificate"),
        "{error}"
    );
    let wrong = set("app_secret_file", "app_secret", "x").replace("app_secret_file", "app_secret_env");
    fs::write(&path, &wrong).unwrap();
    assert_eq!(run(&["check", "--config", &path], &[("x", OsStr::new("s"))]).0, 0, "the control");
    for value in ["", "\n"] {
        let (code, _, error) = run(&["check", "--config", &path], &[("x", OsStr::new(value))]);
        assert!(code == 78 && error.contains("app_secret_env: the environment has no variable"), "{error}");
    }
}

#[test]
fn check_output_reads_back_as_the_same_configuration() {
    for name in ["gateway.toml", "minimal.toml", "sandbox.toml"] {
        let (folder, text) = shipped(name);
        let path = write(&folder, &text);
        let variables = [("CCSQM_GATEWAY__SERVER__IDLE_TIMEOUT", OsStr::new("1500ms"))];
        let (code, out, error) = run(&["check", "--config", &path], &variables);
        assert_eq!(code, 0, "{error}");
        let first = effective(&path, &[], &[("CCSQM_GATEWAY__SERVER__IDLE_TIMEOUT", "1500ms")]);
        let again = folder.path().join("again.toml");
        fs::write(&again, &out).unwrap();
        let second = effective(again.to_str().unwrap(), &[], &[]);
        assert_eq!(second["good"], true, "{second}\n{out}");
        assert_eq!(first["configuration"], second["configuration"], "{out}");
        assert_eq!(first["configuration"]["server"]["idle_timeout"], "1500ms");
        assert_eq!(first["access"], second["access"]);
    }
}

#[test]
fn check_output_with_odd_names_is_valid_toml() {
    let (folder, text) = shipped("minimal.toml");
    let odd = "a\u{1b}\u{7f}\u{202e}\u{e0020}\u{1f600}é \\ \" .json";
    fs::write(folder.path().join(odd), Contract::APPOINT_QUALITY_TASK).unwrap();
    let name = r#""a\u001b\u007f\u202e\U000e0020😀é \\ \" .json""#;
    let path = write(
        &folder,
        &format!("{text}\n[[routes]]\nname = \"appointQualityTask\"\ncontract_file = {name}\n"),
    );
    let (code, out, error) = run(&["check", "--config", &path], &[]);
    assert_eq!(code, 0, "{error}");
    let line = out.lines().find(|line| line.starts_with("contract_file = ")).unwrap();
    assert!(line.contains(&name[1..name.len() - 1]), "{line}");
    let again = write(&folder, &out);
    let shown = effective(&again, &[], &[])["configuration"]["routes"][0]["contract_file"].clone();
    assert_eq!(shown, folder.path().join(odd).to_str().unwrap(), "{out}");
}

#[test]
fn bad_file_is_reported_as_one_mistake() {
    let (folder, text) = shipped("gateway.toml");
    fs::write(folder.path().join("bad"), "neither PEM nor JSON").unwrap();
    let mut contract: Value = serde_json::from_str(Contract::APPOINT_QUALITY_TASK).unwrap();
    contract["properties"]["isTakeEffect"]["x-audit"] = json!("only_here");
    fs::write(folder.path().join("own.json"), contract.to_string()).unwrap();
    // A caller that only this listener sees, and a field that only this contract has.
    let text = with(&text, "contracts/deleteQualityTask.json", "own.json");
    let fields = text.lines().find(|line| line.starts_with("fields = ")).unwrap().to_owned();
    let text = with(&text, &fields, "fields = { only_here = \"omit\" }");
    let text = with(&text, "max_size = \"4GiB\"", "max_size = \"8GiB\""); // room for one more caller's calls
    let text = text
        + "[[callers]]\nname = \"by-certificate\"\npeer = \"dns:qa.internal\"\noperator_id = \"7\"\n\
         credential = \"default\"\nroutes = [\"appointQualityTask\"]\n";
    let (code, _, error) = check(&folder, &text);
    assert_eq!(code, 0, "the control: {error}");
    for (key, file) in [
        ("cert_file", "cert.pem"),
        ("key_file", "tls.key"),
        ("client_ca_file", "client-ca.pem"),
        ("client_crl_file", "crl.pem"),
        ("contract_file", "own.json"),
    ] {
        for bad in ["bad", "absent"] {
            let wrong = with(&text, &format!("{key} = \"{file}\""), &format!("{key} = \"{bad}\""));
            let (code, _, error) = check(&folder, &wrong);
            assert!(code == 78 && error.lines().count() == 1, "{key} {bad}: {error}");
        }
    }
    // A listener without TLS explains nothing: the control.
    let wrong = with(&text, "client_ca_file = \"client-ca.pem\"", "# ");
    let (code, _, error) = check(&folder, &wrong);
    let needed = "listeners[2].tls.client_ca_file: is needed for client_crl_file";
    assert!(code == 78 && error.contains(needed), "{error}");
    let wrong = with(&wrong, "client_crl_file = \"crl.pem\"", "# ");
    let (_, _, error) = check(&folder, &wrong);
    assert!(error.contains(".peer: no listener can see this peer"), "{error}");
    let wrong = with(&text, "only_here", "nowhere");
    assert!(check(&folder, &wrong).2.contains("audit.fields: `nowhere` cannot be hidden"), "the control");
}

#[test]
fn values_compared_by_bytes_hold_no_invisible_characters() {
    let (folder, text) = shipped("gateway.toml");
    assert_eq!(check(&folder, &text).0, 0, "the control");
    let odd = [
        "",
        "\\u200b0",
        "0\\u2800",
        "0\\u00a0",
        "0\\t",
        "0\\u001b[2K",
        "0\\n",
        "\u{e9}",
        "\\u202e0",
        " 0",
        "0 ",
    ];
    for (line, key, blank_is_good) in [
        ("success_codes = [\"{}\"]", "routes[0].success_codes", false),
        ("success_codes = [\"0409000\", \"{}\"]", "routes[0].success_codes", false),
        ("result_field = \"{}\"", "routes[0].result_field", true),
        ("hosts = [\"localhost\", \"{}\"]", "listeners[0].hosts", false),
        ("hosts = [\"{}\"]", "listeners[2].hosts", false),
        ("hosts = [\"{}\"] # of ops", "admin.hosts", false),
    ] {
        let name = line.split(' ').next().unwrap();
        let section = match key.split('.').next().unwrap() {
            "listeners[0]" => "[[listeners]]",
            "listeners[2]" => "hosts = [\"gateway.internal",
            "admin" => "[admin]",
            _ => "[[routes]]",
        };
        let at = text.find(section).unwrap();
        let old = text[at..].lines().find(|line| line.starts_with(&format!("{name} = "))).unwrap();
        let put = |value: &str| {
            let new = line.replace("{}", value);
            text[..at].to_owned() + &text[at..].replacen(old, &new, 1)
        };
        for value in odd.into_iter().chain((!blank_is_good).then_some("0 1")) {
            let (code, _, error) = check(&folder, &put(value));
            assert!(code == 78 && error.lines().count() == 1, "{key} {value}: {error}");
            assert!(
                error.contains(&format!(": {key}: must be visible ASCII characters")),
                "{key} {value}: {error}"
            );
        }
        for value in ["0409000", "A-b_c.9~"].into_iter().chain(blank_is_good.then_some("result code")) {
            let (code, _, error) = check(&folder, &put(value));
            assert_eq!(code, 0, "the control: {key} {value}: {error}");
        }
    }
}

#[test]
fn check_lists_the_peers_that_can_use_each_credential() {
    let (folder, _) = shipped("minimal.toml");
    let credential = |name: &str| {
        format!(
            "[[credentials]]\nname = \"{name}\"\napp_key_file = \"app_key\"\napp_secret_file = \"app_secret\"\n"
        )
    };
    let caller = |name: &str, peer: &str, routes: &str| {
        format!(
            "[[callers]]\nname = \"{name}\"\npeer = \"{peer}\"\noperator_id = \"1\"\noperators = [\"2\"]\ncredential = \"first\"\nroutes = [{routes}]\n"
        )
    };
    let text = [
        "[upstream]\nbase_url = \"https://service.besclouds.com\"\n".to_owned(),
        "[[listeners]]\naddress = \"127.0.0.1:8080\"\n[[listeners]]\naddress = \"unix:/run/gateway.sock\"\n".into(),
        credential("first") + &credential("second") + &credential("third"),
        caller("app", "loopback", "\"appointQualityTask\""),
        caller("batch", "uid:1000", "\"appointQualityTask\", \"deleteQualityTask\""),
        "[[routes]]\nname = \"deleteQualityTask\"\npath = \"/apiaccess/d\"\ncontract_file = \"contracts/deleteQualityTask.json\"\nsuccess_codes = [\"0\"]\ncredential = \"second\"\n".into(),
    ]
    .concat();
    let path = write(&folder, &text);
    let checked = effective(&path, &[], &[]);
    let found: Vec<_> = checked["access"]
        .as_array()
        .unwrap()
        .iter()
        .map(|access| {
            json!([
                access["credential"],
                access["caller"],
                access["peer"],
                access["listeners"],
                access["routes"],
                access["operators"]
            ])
        })
        .collect();
    let (tcp, unix) = (["127.0.0.1:8080"], ["unix:/run/gateway.sock"]);
    assert_eq!(
        json!(found),
        json!([
            ["first", "app", "loopback", tcp, ["appointQualityTask"], ["1", "2"]],
            ["first", "batch", "uid:1000", unix, ["appointQualityTask"], ["1", "2"]],
            ["second", "batch", "uid:1000", unix, ["deleteQualityTask"], ["1", "2"]],
        ]),
        "the route's credential counts, not the caller's"
    );
    let (_, out, _) = run(&["check", "--config", &path], &[]);
    assert!(out.contains("# third: nobody"), "{out}");
    assert!(
        out.contains(
            "#   batch: every process of user 1000, at unix:/run/gateway.sock; on deleteQualityTask;"
        ),
        "{out}"
    );
}

#[test]
fn check_and_documents_state_that_gid_means_the_primary_group() {
    let (folder, text) = shipped("minimal.toml");
    let text = with(&text, "\"loopback\"", "\"gid:1000\"")
        + "\n[[listeners]]\naddress = \"unix:/run/gateway.sock\"\n";
    let (code, out, error) = check(&folder, &text);
    assert_eq!(code, 0, "{error}");
    assert!(out.contains("#   qa-console: every process whose primary group is 1000, at unix:"), "{out}");
    for file in ["README.md", "config/gateway.toml"] {
        let text = fs::read_to_string(format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(text.contains("gid:") && text.contains("primary group"), "{file}");
    }
}

#[test]
fn check_reports_mistakes_as_json() {
    let (folder, text) = shipped("gateway.toml");
    let path = write(&folder, &with(&text, "workers = 1 ", "workers = 0 "));
    let (code, out, error) = run(&["check", "--json", "--config", &path, "--set", "quota.burst=0"], &[]);
    assert!(code == 78 && error.is_empty(), "{error}");
    let found: Value = serde_json::from_str(&out).unwrap();
    let line = text[..text.find("workers = 1").unwrap()].matches('\n').count() + 1;
    let reason = "must be a whole number from 1 to 64, or \"auto\"";
    assert_eq!(found["good"], false);
    assert_eq!(
        found["problems"],
        json!([
            { "place": format!("{path}:{line}"), "file": path, "line": line, "key": "server.workers", "reason": reason },
            { "place": "--set quota.burst", "file": null, "line": null, "key": "quota.burst", "reason": "must be a whole number from 1 to 1000000" },
        ])
    );
}

#[test]
fn contract_check_supports_json_output() {
    let folder = TempDir::new().unwrap();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let check = |contract: &str, body: &str| {
        let (code, out, _) = run(&["contract", "check", contract, body, "--json"], &[]);
        (code, serde_json::from_str::<Value>(&out).unwrap())
    };
    let built_in = "appointQualityTask";
    let (code, good) = check(built_in, &file("good", crate::support::BODY));
    assert_eq!((code, good), (0, json!({ "good": true, "not_json": null, "errors": [], "total": 0 })));
    let (code, bad) = check(
        built_in,
        &file(
            "bad",
            r#"{"qualityTaskId":"x","setCountsType":2,"isTakeEffect":0,"setCounts":[{"personID":"1"}]}"#,
        ),
    );
    let pointers: Vec<_> = bad["errors"].as_array().unwrap().iter().map(|error| &error["pointer"]).collect();
    assert_eq!((code, json!(pointers)), (1, json!(["/qualityTaskId", "/setCountsType"])), "{bad}");
    assert!(
        bad["total"] == 2
            && bad["errors"]
                .as_array()
                .unwrap()
                .iter()
                .all(|e| e["code"].is_string() && e["detail"].is_string()),
        "{bad}"
    );
    let rounded = crate::support::BODY.replace("\"954645333549048833\"", "954645333549048800");
    let (code, rounded) = check(built_in, &file("rounded", &rounded));
    assert_eq!((code, &rounded["errors"][0]["code"]), (1, &json!("number_may_be_rounded")), "{rounded}");
    let (code, broken) = check(built_in, &file("broken", "{"));
    assert!(code == 1 && broken["good"] == false && broken["not_json"].is_string(), "{broken}");
    for contract in [file("contract", "{ \"oneOf\": [] }"), "/absent".to_owned(), "/dev/null".to_owned()] {
        let (code, refused) = check(&contract, &file("good", crate::support::BODY));
        assert!(code == 78 && refused["good"] == false && refused["contract"].is_string(), "{refused}");
    }
}

#[test]
fn check_reports_the_memory_bound_and_examples_allow_it() {
    let (folder, text) = shipped("minimal.toml");
    let (code, out, _) = check(&folder, &text);
    assert!(
        code == 0 && out.contains("\n# Memory: 1000000 keys take at most 111 MiB, stored replies 64 MiB.\n"),
        "{out}"
    );
    let path = write(&folder, &text);
    let memory = |flags: &[&str]| {
        let args = ["check", "--json", "--config", &path].into_iter().chain(flags.iter().copied());
        let (code, out, error) = run(&args.collect::<Vec<_>>(), &[]);
        assert_eq!(code, 0, "{error}");
        let memory = serde_json::from_str::<Value>(&out).unwrap()["memory"].take();
        ["keys_bytes", "replies_bytes"].map(|name| memory[name].as_u64().unwrap())
    };
    let [keys, replies] = memory(&[]);
    assert_eq!((keys >> 20, replies), (110, 64 << 20));
    let [few, small] =
        memory(&["--set", "idempotency.max_keys=10000", "--set", "idempotency.reply_memory=1MiB"]);
    assert!(few < 3 << 20 && small == 1 << 20, "{few} {small}");
    assert!(!out.contains("successes"), "{out}");
    let blocks = with(&text, "[[callers]]", "[idempotency]\nwithout_key = \"block\"\n[[callers]]");
    let (code, out, error) = check(&folder, &blocks);
    let line = "# Memory: 1000000 successes of calls without a key take at most ";
    assert!(code == 0 && out.contains(line), "{out}{error}");

    for (example, member, unit) in
        [("kubernetes/sidecar.yaml", "limits: { memory: ", "Mi"), ("compose.yaml", "mem_limit: ", "m")]
    {
        let text = fs::read_to_string(format!("{}/deploy/{example}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let limit = text.split_once(member).and_then(|(_, rest)| rest.split_once(unit)).unwrap().0;
        let limit = limit.parse::<u64>().unwrap() << 20;
        let room = 128 << 20;
        assert!(keys + replies + room <= limit, "{example}: {limit}");
    }
}

#[test]
fn check_and_start_reject_a_max_size_too_small_for_the_window() {
    let (folder, text) = shipped("minimal.toml");
    let path = write(&folder, &text);
    let told = |command: &str, set: &[&str]| {
        let flags = set.iter().flat_map(|set| ["--set", set]);
        run(&[command, "--config", &path].into_iter().chain(flags).collect::<Vec<_>>(), &[])
    };
    // 20/s for 25 hours are 1.8 million calls.
    for (good, bad) in [
        (&["audit.max_size=3GiB"][..], &["audit.max_size=2GiB"][..]),
        (
            &["audit.max_size=2GiB", "idempotency.window=12h"],
            &["audit.max_size=2GiB", "idempotency.window=36h"],
        ),
        (&["audit.max_size=2GiB", "quota.rate=10/s"], &["audit.max_size=2GiB", "quota.rate=30/s"]),
        (
            &["audit.max_size=256MiB", "quota.rate=1/s", "audit.segment_size=64MiB"],
            &["audit.max_size=255MiB", "quota.rate=1/s", "audit.segment_size=64MiB"],
        ),
        (
            &["audit.max_size=256KiB", "quota.rate=1/h", "audit.segment_size=64KiB", "quota.burst=1"],
            &["audit.max_size=256KiB", "quota.rate=1/h", "audit.segment_size=64KiB"],
        ),
    ] {
        let (code, out, error) = told("check", good);
        assert!(code == 0 && out.contains("\n# max_size = "), "{good:?}: {out} {error}");
        for command in ["check", "serve"] {
            let (code, _, error) = told(command, bad);
            assert!(code == 78 && error.contains("audit.max_size: must "), "{command} {bad:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}

#[test]
fn check_reports_how_long_max_size_lasts_or_what_retain_needs() {
    let (folder, text) = shipped("minimal.toml");
    let (code, out, _) = check(&folder, &text);
    let says = "\n# Audit trail: a call takes about 1300 bytes. 72000 calls an hour are allowed, which take 2.1 GiB a day.";
    assert!(code == 0 && out.contains(says) && out.contains("\n# retain = 30 days needs 63 GiB"), "{out}");
    let path = write(&folder, &text);
    let (_, out, _) = run(&["check", "--config", &path, "--set", "audit.max_size=16GiB"], &[]);
    assert!(
        out.contains(
            "\n# max_size = 16 GiB holds 7.5 days of these calls, or 4.3 days of calls and refusals."
        ),
        "{out}"
    );
    let trail = |set: &str| effective(&path, &[set], &[])["trail"].take();
    let (with, without) = (trail("audit.max_size=4GiB"), trail("audit.max_size=none"));
    assert_eq!((&with["call_bytes"], &with["calls_per_hour"]), (&json!(1300), &json!(72_000)));
    assert!(with["max_size_lasts_seconds"].as_u64().unwrap() > 25 * 3600, "{with}");
    assert_eq!(without["max_size_lasts_seconds"], Value::Null);
    assert!(without["retain_needs_bytes"].as_u64().unwrap() > 60 << 30, "{without}");
}

#[test]
fn check_warns_if_the_file_system_is_smaller_than_max_size() {
    let (folder, text) = shipped("minimal.toml");
    let path = write(&folder, &text);
    let notices = |size| effective(&path, &[size, "quota.rate=1/s"], &[])["notices"].to_string();
    let (small, large) = (notices("audit.max_size=256MiB"), notices("audit.max_size=8192GiB"));
    assert!(!small.contains("it may be full before"), "{small}");
    assert!(large.contains("audit.max_size is 8192 GiB, and the file system of"), "{large}");
    assert!(large.contains("it may be full before"), "{large}");
}

#[test]
fn kubernetes_example_holds_the_window_within_max_size_and_volume() {
    let (folder, _) = shipped("minimal.toml");
    let audit = folder.path().join("audit");
    fs::create_dir(&audit).unwrap();
    fs::write(audit.join("audit.key"), SECRET).unwrap();
    let of_sidecar = of_sidecar().replace("/run/secrets/ccsqm/", "");
    let path = write(&folder, &with(&of_sidecar, "/var/lib/ccsqm-gateway/audit", audit.to_str().unwrap()));
    let checked = effective(&path, &[], &[]);
    let lasts = checked["trail"]["max_size_lasts_with_refusals_seconds"].as_u64().unwrap();
    assert!(lasts >= 25 * 3600, "{lasts}");
    let [size, segment] = ["max_size", "segment_size"].map(|key| {
        let size = checked["configuration"]["audit"][key].as_str().unwrap();
        let units = [("GiB", 30), ("MiB", 20)];
        let (number, shift) =
            units.iter().find_map(|(unit, shift)| Some((size.strip_suffix(unit)?, shift))).unwrap();
        number.parse::<u64>().unwrap() << shift
    });
    for file in ["sidecar.yaml", "audit-init.yaml"] {
        let text =
            fs::read_to_string(format!("{}/deploy/kubernetes/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let volume = text.split_once("{ storage: ").and_then(|(_, rest)| rest.split_once("Gi }")).unwrap().0;
        let volume = volume.parse::<u64>().unwrap() << 30;
        // A file system takes some for itself.
        assert!(size + segment + (64 << 20) <= volume - volume / 16, "{file}: {volume}");
    }
}
