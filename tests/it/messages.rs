//! What the gateway says when something is wrong: each text of `tests/messages.toml` is provoked and compared as a whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
    sync::LazyLock,
};

use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::*;

/// `tests/messages.toml`, which says what its parts are.
#[derive(Deserialize)]
struct Messages {
    answers: BTreeMap<String, String>,
    requests: Vec<Request>,
    configurations: Vec<Configuration>,
    contracts: Vec<Contract>,
    commands: Vec<Line>,
}

#[derive(Deserialize)]
struct Request {
    #[serde(default = "post")]
    line: String,
    #[serde(default)]
    headers: String,
    #[serde(default = "good_body")]
    body: String,
    says: Vec<String>,
}

#[derive(Deserialize)]
struct Configuration {
    #[serde(default)]
    replace: Vec<[String; 2]>,
    #[serde(default)]
    append: String,
    #[serde(default)]
    files: Vec<[String; 2]>,
    #[serde(default)]
    environment: Vec<[String; 2]>,
    says: Vec<String>,
}

#[derive(Deserialize)]
struct Contract {
    schema: String,
    says: String,
}

#[derive(Deserialize)]
struct Line {
    command: String,
    says: Vec<String>,
}

static MESSAGES: LazyLock<Messages> = LazyLock::new(|| {
    toml::from_str(include_str!("../messages.toml")).unwrap_or_else(|error| panic!("messages.toml: {error}"))
});

/// Behind the name of an answer that calls with and without a key get with another text.
const WITH_KEY: &str = ", with a key";
const WITHOUT_KEY: &str = ", without a key";

fn post() -> String {
    format!("POST {PATH} HTTP/1.1")
}

fn good_body() -> String {
    BODY.to_owned()
}

/// The detail of an answer of `outcomes.rs`, to a call with or without a key.
pub(crate) fn answer(name: &str, is_keyed: bool) -> &'static str {
    let own = format!("{name}{}", if is_keyed { WITH_KEY } else { WITHOUT_KEY });
    let text = MESSAGES.answers.get(&own).or_else(|| MESSAGES.answers.get(name));
    text.map_or("not in messages.toml", String::as_str)
}

/// The names of all answers that have a text.
pub(crate) fn answers() -> BTreeSet<String> {
    let whole = |name: &String| name.trim_end_matches(WITHOUT_KEY).trim_end_matches(WITH_KEY).to_owned();
    MESSAGES.answers.keys().map(whole).collect()
}

/// A text with `ID` in the place of each request id.
pub(crate) fn without_ids(text: &str) -> String {
    let is_id = |word: &&str| uuid::Uuid::try_parse(word).is_ok();
    let words = text.split(|c: char| !c.is_ascii_hexdigit() && c != '-');
    words.filter(is_id).fold(text.to_owned(), |text, id| text.replace(id, "ID"))
}

/// Tells all rows that say something else, as they could stand in the file.
fn compare(rows: impl IntoIterator<Item = (String, Vec<String>, Vec<String>)>) {
    let differences: Vec<_> = rows
        .into_iter()
        .enumerate()
        .filter(|(_, (_, says, must_say))| says != must_say)
        .map(|(number, (row, says, _))| format!("row {number}: {row}\nsays = {says:#?}\n"))
        .collect();
    assert!(differences.is_empty(), "{} differ:\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn each_rejected_request_gets_its_error_message() {
    let sandbox = sandbox();
    let gateway = start(&sandbox);
    compare(MESSAGES.requests.iter().map(|row| {
        let Request { line, headers, body, says } = row;
        let mut head = format!("{line}\r\n");
        for (name, value) in [
            ("host", "localhost".to_owned()),
            ("content-type", "application/json".to_owned()),
            ("content-length", body.len().to_string()),
            ("connection", "close".to_owned()),
        ] {
            if !headers.to_ascii_lowercase().contains(&format!("{name}:")) {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        for header in headers.lines().filter(|line| !line.is_empty()) {
            head.push_str(&format!("{header}\r\n"));
        }
        let reply = gateway.send(&format!("{head}\r\n"), body);
        let problem: Value = serde_json::from_str(&reply.body).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut said = vec![format!("{}: {}", reply.code(), text(&problem["detail"]))];
        for error in problem["errors"].as_array().into_iter().flatten() {
            said.push(format!("{}: {}", text(&error["pointer"]), text(&error["detail"])));
        }
        (format!("{line:?} {headers:?} {body:?}"), said, says.clone())
    }));
    assert_eq!(sandbox.requests().len(), 0);
    assert_eq!(gateway.call().outcome(), "succeeded", "the control");
}

/// A folder with a good configuration.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    for secret in ["app_key", "app_secret"] {
        fs::write(folder.path().join(secret), "0123456789abcdef0123456789abcdef").unwrap();
    }
    folder
}

/// Runs a command in a folder; returns its code and what it says on stderr, without the folder's name.
fn said(folder: &Path, arguments: &[&str], environment: &[[String; 2]]) -> (i32, Vec<String>) {
    let output = Command::new(BINARY)
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .envs(environment.iter().map(|[name, value]| (name, value)))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let text = text.replace(folder.to_str().unwrap(), "/FOLDER");
    (output.status.code().unwrap(), text.lines().map(|line| line.trim_end().to_owned()).collect())
}

#[test]
fn each_wrong_configuration_gets_its_error_message() {
    let good = fs::read_to_string(format!("{}/config/minimal.toml", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let good = good.replace("/run/secrets/ccsqm/", "");
    let check = ["check", "--config", "gateway.toml"];
    compare(MESSAGES.configurations.iter().map(|row| {
        let Configuration { replace, append, files, environment, says } = row;
        let folder = folder();
        let path = folder.path();
        fs::write(path.join("gateway.toml"), &good).unwrap();
        assert_eq!(said(path, &check, &[]), (0, Vec::new()), "the control");
        for [name, text] in files {
            fs::write(path.join(name), text).unwrap();
        }
        let mut text = good.clone();
        for [old, new] in replace {
            assert!(text.contains(old), "{old}");
            text = text.replacen(old, new, 1);
        }
        fs::write(path.join("gateway.toml"), format!("{text}\n{append}\n")).unwrap();
        let (code, lines) = said(path, &check, environment);
        let name = format!("{replace:?} {append:?} {files:?} {environment:?}");
        let lines = if code == 78 { lines } else { vec![format!("exit code {code}")] };
        (name, lines, says.clone())
    }));
}

#[test]
fn each_wrong_contract_gets_its_error_message() {
    compare(MESSAGES.contracts.iter().map(|Contract { schema, says }| {
        let folder = folder();
        fs::write(folder.path().join("contract.json"), schema).unwrap();
        fs::write(folder.path().join("body.json"), "{}").unwrap();
        let (code, lines) = said(folder.path(), &["contract", "check", "contract.json", "body.json"], &[]);
        assert_eq!(code, 78, "{schema}: {lines:?}");
        (schema.clone(), lines, vec![says.clone()])
    }));
}

#[test]
fn each_failed_command_prints_its_error_message() {
    compare(MESSAGES.commands.iter().map(|Line { command, says }| {
        let folder = folder();
        let arguments: Vec<_> = command.split_whitespace().collect();
        let (code, mut lines) = said(folder.path(), &arguments, &[]);
        lines.insert(0, format!("exit code {code}"));
        (command.clone(), lines, says.clone())
    }));
}
