//! What other users of the machine can read or change: refused, or told.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, lchown, symlink},
        process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use ccsqm_gateway::contract::Contract;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    callers::{CALLER, Ca, SERVER},
    support::*,
};

const KEY: &str = "Qm4v8sXz1Lr0TgYc7WbNe5KdJh2Ua9Fp";

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A configuration that `check` has nothing to say of, with a trail that is there.
fn folder() -> (TempDir, String) {
    let folder = TempDir::new().unwrap();
    for name in ["app_key", "app_secret", "own.key"] {
        fs::write(folder.path().join(name), KEY).unwrap();
        set_mode(&folder.path().join(name), 0o600);
    }
    let text = "[upstream]\nbase_url = \"http://127.0.0.1:9\"\n[[credentials]]\nname = \"default\"\napp_key_file = \"app_key\"\n\
         app_secret_file = \"app_secret\"\n[[listeners]]\naddress = \"unix:/nowhere/gateway.sock\"\n[[callers]]\nname = \"a\"\n\
         peer = \"uid:1\"\noperator_id = \"1\"\ncredential = \"default\"\nroutes = [\"appointQualityTask\"]\n[audit]\n";
    // Beside the folder, whose own mode is another matter.
    let text = text.replace("/nowhere/gateway.sock", &socket(&folder));
    let audit = folder.path().join("audit");
    assert_eq!(command(&["audit", "init", audit.to_str().unwrap()]).0, 0);
    (folder, text)
}

fn socket(folder: &TempDir) -> String {
    folder.path().with_extension("sock").display().to_string()
}

fn configure(folder: &TempDir, text: &str) -> String {
    let config = folder.path().join("gateway.toml");
    fs::write(&config, text).unwrap();
    set_mode(&config, 0o644);
    config.to_str().unwrap().to_owned()
}

/// What `check` says of a good configuration.
fn notices(config: &str) -> Vec<String> {
    let (code, out, error) = command(&["check", "--json", "--config", config]);
    assert_eq!(code, 0, "{out}{error}");
    let found: Value = serde_json::from_str(&out).unwrap();
    let notices: Vec<_> =
        found["notices"].as_array().unwrap().iter().map(|it| it.as_str().unwrap().to_owned()).collect();
    let (_, text, _) = command(&["check", "--config", config]);
    assert!(notices.iter().all(|notice| text.contains(&format!("# Note: {notice}\n"))), "{text}");
    notices
}

#[test]
fn world_writable_trail_or_key_is_rejected() {
    let (folder, text) = folder();
    let at = |name: &str| folder.path().join(name);
    symlink("audit", at("link")).unwrap();
    symlink("own.key", at("link.key")).unwrap();
    let named = "directory = \"link\"\n";
    let (key_file, linked_key) = ("key_file = \"own.key\"\n", "key_file = \"link.key\"\n");
    for (more, file, bad, good, key) in [
        ("", "audit", 0o777, 0o700, "audit.directory"),
        ("", "audit", 0o702, 0o775, "audit.directory"),
        ("", "audit", 0o772, 0o1777, "audit.directory"),
        (named, "audit", 0o777, 0o700, "audit.directory"),
        ("", "audit/audit.key", 0o666, 0o600, "audit.directory"),
        ("", "audit/audit.key", 0o1602, 0o640, "audit.directory"),
        (key_file, "own.key", 0o606, 0o604, "audit.key_file"),
        (linked_key, "own.key", 0o666, 0o600, "audit.key_file"),
    ] {
        let config = configure(&folder, &(text.clone() + more));
        set_mode(&at(file), bad);
        for name in ["check", "serve"] {
            let (code, out, error) = command(&[name, "--config", &config]);
            let told = out + &error;
            assert_eq!(code, 78, "{name} {file} {bad:o}: {told}");
            assert!(told.contains(&format!("{key}: ")) && told.contains("chmod o-w "), "{told}");
            assert_eq!(told.lines().count(), 1, "{told}");
        }
        set_mode(&at(file), good);
        notices(&config); // the control
        set_mode(&at(file), if file == "audit" { 0o700 } else { 0o600 });
    }
    // Where it is made, too.
    let open = at("open");
    fs::create_dir(&open).unwrap();
    let init = || command(&["audit", "init", open.to_str().unwrap()]);
    set_mode(&open, 0o777);
    let (code, out, error) = init();
    assert!(code == 78 && error.contains("chmod o-w "), "{out}{error}");
    assert_eq!(fs::read_dir(&open).unwrap().count(), 0, "nothing is made");
    set_mode(&open, 0o700);
    assert_eq!(init().0, 0, "the control");
}

#[test]
fn files_open_to_other_users_cause_a_warning() {
    let (folder, text) = folder();
    let at = |name: &str| folder.path().join(name);
    let config = configure(&folder, &text);
    assert_eq!(notices(&config), Vec::<String>::new(), "the control");
    let is_told = |notices: &[String], parts: &[&str]| {
        notices.len() == 1 && parts.iter().all(|part| notices[0].contains(part))
    };
    for (file, mode, parts) in [
        ("app_key", 0o604, &["credentials[0].app_key_file: ", "read", "chmod o-rwx "][..]),
        ("app_secret", 0o644, &["credentials[0].app_secret_file: ", "read", "chmod o-rwx "]),
        ("app_secret", 0o602, &["credentials[0].app_secret_file: ", "change", "chmod o-rwx "]),
        ("audit/audit.key", 0o644, &["audit.directory: ", "audit.key", "read", "chmod o-rwx "]),
        ("audit", 0o770, &["audit.directory: ", "group ", "chmod g-w "]),
        ("audit", 0o1777, &["audit.directory: ", "every user", "chmod o-w "]),
        ("gateway.toml", 0o646, &["gateway.toml", "change", "chmod o-w "]),
        ("", 0o707, &["every user", "chmod o-w "]),
    ] {
        let (path, before) = (at(file), fs::metadata(at(file)).unwrap().permissions());
        set_mode(&path, mode);
        let notices = notices(&config);
        assert!(is_told(&notices, parts), "{file} {mode:o}: {notices:?}");
        fs::set_permissions(&path, before).unwrap();
    }
    for (key, is_weak) in [
        ("a".repeat(32), true),
        ("ab".repeat(32), true),
        ("\0".repeat(64), true),
        (KEY.to_owned(), false),
        ("0123456789abcdef".repeat(2), false),
    ] {
        fs::write(at("own.key"), &key).unwrap();
        let config = configure(&folder, &format!("{text}key_file = \"own.key\"\n"));
        let notices = notices(&config);
        let told = is_told(&notices, &["audit.key_file: ", "guess"]);
        assert!(told == is_weak && notices.is_empty() != is_weak, "{key}: {notices:?}");
        assert!(!notices.concat().contains(&key));
    }
}

/// A configuration that names a file by each of its settings, and what the settings are called.
fn with_every_file() -> (TempDir, String, [(&'static str, &'static str); 14]) {
    let (folder, text) = folder();
    let ca = Ca::new();
    let (server, client) = (ca.issue(SERVER), ca.issue(CALLER));
    let contract = Contract::APPOINT_QUALITY_TASK;
    for (name, content, mode) in [
        ("roots.pem", &*ca.0.pem(), 0o644),
        ("client.pem", &client.certificate, 0o644),
        ("client.key", &client.key, 0o600),
        ("proxy_user", "gateway", 0o600),
        ("proxy_password", "a-password-of-the-proxy", 0o600),
        ("server.pem", &server.certificate, 0o644),
        ("server.key", &server.key, 0o600),
        ("ca.pem", &ca.0.pem(), 0o644),
        ("revoked.pem", &ca.revoke(&[], 2124), 0o644),
        ("contract.json", contract, 0o644),
    ] {
        fs::write(folder.path().join(name), content).unwrap();
        set_mode(&folder.path().join(name), mode);
    }
    let upstream = "[upstream]\nca_file = \"roots.pem\"\nclient_cert_file = \"client.pem\"\nclient_key_file = \"client.key\"\n\
        proxy = \"http://egress.internal:3128\"\nproxy_user_file = \"proxy_user\"\nproxy_password_file = \"proxy_password\"\n";
    let more = "key_file = \"own.key\"\n[[listeners]]\naddress = \"127.0.0.1:0\"\n[listeners.tls]\n\
         cert_file = \"server.pem\"\nkey_file = \"server.key\"\nclient_ca_file = \"ca.pem\"\n\
         client_crl_file = \"revoked.pem\"\n[[routes]]\nname = \"appointQualityTask\"\ncontract_file = \"contract.json\"\n";
    let files = [
        ("gateway.toml", "--config"),
        ("app_key", "credentials[0].app_key_file"),
        ("app_secret", "credentials[0].app_secret_file"),
        ("roots.pem", "upstream.ca_file"),
        ("client.pem", "upstream.client_cert_file"),
        ("client.key", "upstream.client_key_file"),
        ("proxy_user", "upstream.proxy_user_file"),
        ("proxy_password", "upstream.proxy_password_file"),
        ("server.pem", "listeners[1].tls.cert_file"),
        ("server.key", "listeners[1].tls.key_file"),
        ("ca.pem", "listeners[1].tls.client_ca_file"),
        ("revoked.pem", "listeners[1].tls.client_crl_file"),
        ("contract.json", "contract_file of the route appointQualityTask"),
        ("own.key", "audit.key_file"),
    ];
    (folder, text.replacen("[upstream]\n", upstream, 1) + more, files)
}

#[test]
fn every_world_writable_configured_file_is_reported() {
    let (folder, text, files) = with_every_file();
    let reference = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/gateway.toml")).unwrap();
    let keys = reference.lines().filter_map(|line| line.trim_start_matches(['#', ' ']).split_once(" = "));
    let keys: Vec<_> = keys.map(|(key, _)| key).filter(|key| key.ends_with("_file")).collect();
    let is_walked = |key: &&str| files.iter().any(|(_, setting)| setting.contains(*key));
    assert!(keys.len() >= 11 && keys.iter().all(is_walked), "each key of the reference: {keys:?}");
    let config = configure(&folder, &text);
    assert_eq!(notices(&config), Vec::<String>::new(), "the control");
    for (file, setting) in files {
        let path = folder.path().join(file);
        let before = fs::metadata(&path).unwrap().permissions();
        set_mode(&path, before.mode() | 0o002);
        // Of those that are refused: what anybody could do, or that no record could be believed.
        let harm = match setting {
            "upstream.ca_file" => Some("so everyone could decide who gets the credential"),
            "listeners[1].tls.client_ca_file" | "listeners[1].tls.client_crl_file" => {
                Some("so everyone could decide who may call")
            }
            "audit.key_file" => Some("so no record could be trusted"),
            _ => None,
        };
        if let Some(harm) = harm {
            for name in ["check", "serve"] {
                let (code, out, error) = command(&[name, "--config", &config]);
                assert!(code == 78 && out.is_empty(), "{name} {file}: {out}{error}");
                assert!(error.contains(&format!(": {setting}: ")), "{error}");
                assert!(error.contains("every user can change ") && error.contains(harm), "{error}");
                assert!(error.contains("chmod o-w ") && error.lines().count() == 1, "{error}");
            }
        } else {
            let told = notices(&config);
            assert!(
                told.len() == 1 && told[0].starts_with(&format!("{setting}: every user can ")),
                "{file}: {told:?}"
            );
            assert!(told[0].contains("change") && told[0].contains("chmod o-"), "{told:?}");
        }
        // Of the group, nothing is said here.
        set_mode(&path, before.mode() | 0o020);
        assert_eq!(notices(&config), Vec::<String>::new(), "the control: {file}");
        fs::set_permissions(&path, before).unwrap();
    }
}

#[test]
fn world_writable_folder_is_reported_in_one_line_with_all_settings() {
    let (folder, text, files) = with_every_file();
    let config = configure(&folder, &text);
    set_mode(folder.path(), 0o777);
    let told = notices(&config);
    assert_eq!(told.len(), 1, "{told:?}");
    for (_, setting) in files {
        assert!(told[0].contains(setting), "{setting}: {told:?}");
    }
    assert!(told[0].contains("audit.directory") && !told[0].contains("listeners[0].address"), "{told:?}");
    assert!(
        told[0].contains("mode 0777") && told[0].ends_with(&format!("chmod o-w {}", folder.path().display())),
        "{told:?}"
    );
    set_mode(folder.path(), 0o1777);
    assert_eq!(notices(&config), Vec::<String>::new(), "the control: sticky");
    // Another folder is another line, with its own setting alone; so is that of a socket.
    set_mode(folder.path(), 0o755);
    for name in ["keys", "run"] {
        fs::create_dir(folder.path().join(name)).unwrap();
        set_mode(&folder.path().join(name), 0o757);
    }
    fs::rename(folder.path().join("app_key"), folder.path().join("keys/app_key")).unwrap();
    let socket = folder.path().join("run/gateway.sock");
    let text = text.replacen("\"app_key\"", "\"keys/app_key\"", 1);
    let config = configure(&folder, &text.replacen(&self::socket(&folder), socket.to_str().unwrap(), 1));
    let told = notices(&config);
    assert!(told.len() == 2 && told[0].starts_with("credentials[0].app_key_file: every user"), "{told:?}");
    assert!(told[1].starts_with("listeners[0].address: every user"), "{told:?}");
}

#[test]
fn world_writable_parent_or_link_folder_is_reported() {
    let (outer, text) = folder();
    let config = configure(&outer, &text);
    let at = |name: &str| outer.path().join(name);
    for name in ["up", "up/in", "up/in/deep", "links", "links/more"] {
        fs::create_dir(at(name)).unwrap();
        set_mode(&at(name), 0o755);
    }
    fs::rename(at("app_key"), at("up/in/deep/key")).unwrap();
    // A link to a link, by way of a folder in which neither lies.
    symlink("links/more/second", at("app_key")).unwrap();
    symlink(at("up/in/../in/deep/key"), at("links/more/second")).unwrap();
    assert_eq!(notices(&config), Vec::<String>::new(), "the control");
    for (name, mode) in
        [("up", 0o777), ("up/in", 0o757), ("up/in/deep", 0o702), ("links", 0o777), ("links/more", 0o777)]
    {
        set_mode(&at(name), mode);
        let told = notices(&config);
        assert!(
            told.len() == 1 && told[0].starts_with("credentials[0].app_key_file: every user can replace"),
            "{name}: {told:?}"
        );
        assert!(
            told[0].ends_with(&format!("chmod o-w {}", fs::canonicalize(at(name)).unwrap().display())),
            "{told:?}"
        );
        set_mode(&at(name), 0o1777);
        assert_eq!(notices(&config), Vec::<String>::new(), "the control: sticky {name}");
        set_mode(&at(name), 0o755);
    }
}

#[test]
fn file_owners_other_than_root_and_the_gateway_user_are_reported() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return; // only root gives files away
    }
    let (folder, text, files) = with_every_file();
    let config = configure(&folder, &text);
    let own = |path: &Path, uid: u32| chown(path, Some(uid), Some(uid)).unwrap();
    for (file, setting) in files {
        let path = folder.path().join(file);
        own(&path, 4242);
        let told = notices(&config);
        assert!(
            told.len() == 1 && told[0].starts_with(&format!("{setting}: user 4242, ")),
            "{file}: {told:?}"
        );
        assert!(told[0].contains(path.to_str().unwrap()), "{told:?}");
        own(&path, 0);
        assert_eq!(notices(&config), Vec::<String>::new(), "the control: {file}");
    }
    // A folder, for all that lies in it.
    own(folder.path(), 4242);
    let told = notices(&config);
    assert!(told.len() == 1 && files.iter().all(|(_, setting)| told[0].contains(setting)), "{told:?}");
    // Who owns the audit directory is who the gateway runs as; without one nobody knows, when root asks.
    let audit = folder.path().join("audit");
    own(&audit, 4242);
    assert_eq!(notices(&config), Vec::<String>::new(), "the gateway's user");
    own(&audit, 0);
    assert_eq!(notices(&config).len(), 1, "the control");
    fs::rename(&audit, folder.path().join("away")).unwrap();
    assert_eq!(notices(&config), Vec::<String>::new(), "who it is, is not known");
    fs::rename(folder.path().join("away"), &audit).unwrap();
    own(folder.path(), 0);
    // Where a link can be changed by its owner alone, that one counts.
    let link = folder.path().join("link.pem");
    symlink("roots.pem", &link).unwrap();
    lchown(&link, Some(4242), Some(4242)).unwrap();
    let config = configure(&folder, &text.replacen("\"roots.pem\"", "\"link.pem\"", 1));
    assert_eq!(notices(&config), Vec::<String>::new(), "the control: only root changes this folder");
    set_mode(folder.path(), 0o1777);
    let told = notices(&config);
    assert!(told.len() == 1 && told[0].starts_with("upstream.ca_file: user 4242, "), "{told:?}");
}

#[test]
fn file_owners_are_reported_only_when_certain() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return;
    }
    let (folder, text, _) = with_every_file();
    let config = configure(&folder, &text.replacen("uid:1", "uid:0", 1));
    let other = folder.path().join("roots.pem");
    chown(&other, Some(4242), Some(4242)).unwrap();
    assert_eq!(notices(&config).len(), 1, "the control");
    let said = |wrapper: &[&str]| {
        let command = Command::new(wrapper[0])
            .args(&wrapper[1..])
            .arg(BINARY)
            .args(["check", "--config", &config])
            .output()
            .unwrap();
        let text = String::from_utf8(command.stdout).unwrap();
        assert_eq!(command.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&command.stderr));
        text.matches("# Note: ").count()
    };
    assert_eq!(said(&["env"]), 1, "the control");
    // Nobody else is mapped: all other users look alike.
    assert_eq!(said(&["unshare", "--user", "--map-root-user"]), 0);
    // Read-only here, but for the trail.
    let place = folder.path().display();
    let bind = format!(
        "mount --bind {place} {place} && mount -o remount,bind,ro {place} && mount --bind {place}/audit {place}/audit && \
         mount -o remount,bind,rw {place}/audit && exec \"$@\""
    );
    assert_eq!(said(&["unshare", "--mount", "sh", "-c", &bind, "sh"]), 0);
}

#[test]
fn start_logs_the_same_warnings_as_check() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let setup = || Setup { folder: Some(folder.clone()), ..Setup::default() };
    for name in ["app_key", "app_secret"] {
        fs::write(folder.path().join(name), "").unwrap();
        set_mode(&folder.path().join(name), 0o600);
    }
    let told = |gateway: &Gateway| {
        let log = gateway.log();
        log.lines()
            .filter(|line| line.contains("WARN") && line.contains("chmod "))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(told(&start_with(&sandbox, setup())), Vec::<String>::new(), "the control");
    set_mode(&folder.path().join("app_secret"), 0o644);
    let warnings = told(&start_with(&sandbox, setup()));
    assert!(warnings.len() == 1 && warnings[0].contains("credentials[0].app_secret_file"), "{warnings:?}");
}

#[test]
fn unknown_key_beside_secrets_is_not_quoted() {
    let (folder, text) = folder();
    let pasted = "Zx81kTq7PastedSecret";
    for (good, table, known) in [
        ("[[credentials]]\n", "credentials[0]", "app_secret_file"),
        ("[upstream]\n", "upstream", "client_key_file"),
        ("[audit]\n", "audit", "key_file"),
    ] {
        for wrong in
            [format!("{pasted} = \"x\""), format!("{pasted}.more = 1"), format!("\"{pasted} {pasted}\" = 1")]
        {
            let text = text.replacen(good, &format!("{good}{wrong}\n"), 1);
            let line = text.lines().position(|line| line == wrong).unwrap() + 1;
            let config = configure(&folder, &text);
            for args in [&["check", "--config"][..], &["check", "--json", "--config"], &["serve", "--config"]]
            {
                let (code, out, error) = command(&[args, &[&config]].concat());
                let told = out + &error;
                assert!(code == 78 && !told.contains(pasted), "{told}");
                assert!(
                    told.contains(&format!(":{line}")) && told.contains(table) && told.contains(known),
                    "{told}"
                );
            }
        }
    }
    // A slip is still told from what was meant, and explains what lacks; elsewhere the key is named: the controls.
    let config = configure(&folder, &text.replacen("app_secret_file", "app_secrt_file", 1));
    let (_, _, error) = command(&["check", "--config", &config]);
    assert!(error.lines().count() == 1 && error.contains("credentials[0]: "), "{error}");
    assert!(error.contains("did you mean `app_secret_file`?") && !error.contains("secrt"), "{error}");
    let config = configure(&folder, &format!("{text}[log]\nlevl = \"info\"\n"));
    assert!(command(&["check", "--config", &config]).2.contains("log.levl: unknown key"));
}

#[test]
fn other_processes_of_the_same_user_cannot_inspect_the_gateway() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return; // it takes another user, so that root's rights do not count
    }
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    let binary = folder.path().join("binary");
    // Not by this process: what another test starts meanwhile would hold the file open for writing.
    assert!(Command::new("cp").arg(BINARY).arg(&binary).status().unwrap().success());
    let owned = Command::new("chown").args(["-R", "4242:4242"]).arg(folder.path()).status().unwrap();
    assert!(owned.success());
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).uid(4242).gid(4242).stderr(Stdio::null()).stdout(Stdio::null());
        command.env("APP_SECRET", KEY);
        command
    };
    let reads = |pid: u32, file: &str| {
        run("head", &["-c", "1", &format!("/proc/{pid}/{file}")]).status().unwrap().success()
    };
    let owner = |pid: u32| fs::metadata(format!("/proc/{pid}/mem")).unwrap().uid();
    let mut other = Running(run("sleep", &["1000"]).spawn().unwrap());
    wait_for("the control", || reads(other.0.id(), "environ").then_some(()));
    assert_eq!(owner(other.0.id()), 4242, "the control");
    let config = folder.path().join("gateway.toml");
    let socket = folder.path().join("audit/control.sock");
    fs::remove_file(&socket).unwrap(); // the killed one's
    let mut gateway = Running(
        run(binary.to_str().unwrap(), &["serve", "--config", config.to_str().unwrap()]).spawn().unwrap(),
    );
    let pid = gateway.0.id();
    wait_for("its own socket", || socket.exists().then_some(()));
    assert_eq!(owner(pid), 0);
    for file in ["environ", "maps", "auxv"] {
        assert!(reads(other.0.id(), file), "the control: {file}");
        assert!(!reads(pid, file), "{file}");
    }
    assert!(reads(pid, "stat"), "what everybody may know of a process");
    // The same of a command that reads secrets; it waits for somebody to write its configuration.
    let pipe = folder.path().join("pipe");
    assert!(run("mkfifo", &[pipe.to_str().unwrap()]).status().unwrap().success());
    let check = Running(
        run(binary.to_str().unwrap(), &["check", "--config", pipe.to_str().unwrap()]).spawn().unwrap(),
    );
    wait_for("a hidden memory", || (owner(check.0.id()) == 0).then_some(()));
    assert!(!reads(check.0.id(), "environ"));
    assert!(gateway.0.try_wait().unwrap().is_none() && other.0.try_wait().unwrap().is_none());
}

#[test]
fn audit_commands_distinguish_unreadable_from_missing_files() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return; // it takes another user
    }
    let (folder, _) = folder();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (binary, trail) = (at("binary"), at("audit"));
    assert!(Command::new("cp").args([BINARY, &binary]).status().unwrap().success());
    set_mode(folder.path(), 0o755);
    fs::create_dir_all(at("closed/audit")).unwrap();
    set_mode(&folder.path().join("closed"), 0o700);
    let says = |args: &[&str]| {
        let mut command = Command::new(&binary);
        let output = command.args(["audit", "unresolved"]).args(args).uid(4242).gid(4242).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), said.contains("--key-file names another file"), said)
    };
    for (args, reason) in [
        (&[&*trail][..], "audit/audit.key: Permission denied"),
        (&[&at("closed/audit")], "closed/audit: Permission denied"),
        (&[&trail, "--key-file", &at("own.key")], "own.key: Permission denied"),
        (&[&trail, "--key-file", &at("missing")], "missing: No such file"),
        (&[&at("missing")], "missing: No such file"),
    ] {
        let (code, is_hinted, said) = says(args);
        assert!(code == 78 && said.contains(reason) && !is_hinted, "{args:?}: {said}");
    }
    set_mode(Path::new(&trail), 0o755);
    fs::remove_file(at("audit/audit.key")).unwrap();
    let (code, is_hinted, said) = says(&[&trail]);
    assert!(code == 78 && said.contains("audit.key: No such file") && is_hinted, "the control: {said}");
}

#[test]
fn other_users_cannot_change_the_trail_under_any_umask() {
    let sandbox = sandbox();
    let folder = Arc::new(TempDir::new().unwrap());
    let socket = folder.path().join("elsewhere.sock");
    let through = ["sh", "-c", "umask 0 && exec \"$@\"", "sh"].map(str::to_owned).into();
    let setup = Setup { folder: Some(folder), through, ..Setup::default() };
    let gateway = start_with(&sandbox, setup.set("admin.control", socket.display()));
    assert_eq!(gateway.call().outcome(), "succeeded");
    gateway.records("outcome", 1);
    let audit = gateway.audit_directory();
    let files: Vec<_> = fs::read_dir(&audit).unwrap().map(|entry| entry.unwrap().path()).collect();
    for name in ["control", "audit.key", "lock"] {
        assert!(files.contains(&audit.join(name)), "the control: {name}");
    }
    for path in files.iter().chain([&audit, &socket]) {
        let mode = fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", path.display());
    }
}

#[test]
fn check_and_start_honour_capabilities_that_override_permissions() {
    let sandbox = sandbox();
    let folder = start(&sandbox).kill();
    if fs::metadata(folder.path()).unwrap().uid() != 0 {
        return; // only root can give it
    }
    // Another user reads all of it, and may make nothing in it.
    fs::remove_dir_all(folder.path().join("audit")).unwrap();
    set_mode(folder.path(), 0o755);
    let config = folder.path().join("gateway.toml");
    let text = fs::read_to_string(&config).unwrap();
    let socket = folder.path().join("gateway.sock").display().to_string();
    fs::write(
        &config,
        text.replacen("\"127.0.0.1:0\"", &format!("\"unix:{socket}\""), 1)
            .replace("peer = \"loopback\"", "peer = \"uid:0\""),
    )
    .unwrap();
    let run = |command: &str, capability: &[&str]| {
        let mut process = Command::new("setpriv");
        process.args(["--reuid=4242", "--regid=4242", "--clear-groups"]).args(capability).arg(BINARY);
        process.args([command, "--config"]).arg(&config).stdout(Stdio::null()).stderr(Stdio::piped());
        process.spawn().unwrap()
    };
    let told = |command, capability: &[&str]| {
        let output = run(command, capability).wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let may = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"];
    assert_eq!(told("check", &may), (Some(0), String::new()));
    let running = Running(run("serve", &may));
    wait_for("the socket", || std::os::unix::net::UnixStream::connect(&socket).ok());
    drop(running);
    for command in ["check", "serve"] {
        let (code, said) = told(command, &[]);
        assert!(code == Some(78) && said.contains("Permission denied"), "the control: {command}: {said}");
    }
}
