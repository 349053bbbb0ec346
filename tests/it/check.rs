//! `check` is 0 exactly when `serve` would start, if the gateway that runs with the same configuration were gone: a table of
//! configurations, secrets, certificates, directories and sockets, each tried with both.

use std::{
    any::Any,
    fs,
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use ccsqm_gateway::sandbox::{Options, Sandbox};
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;

use crate::{
    callers::{CALLER, CONSOLE, Ca, Identity, SERVER, caller},
    support::*,
};

/// What must come of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// `check` is 0, and `serve` serves.
    Good,
    /// Both are refused with this code and name this.
    Bad(i32, &'static str),
}
use Verdict::{Bad, Good};

/// Name, what it changes, what must come of it.
type Case = (&'static str, fn(&mut Draft), Verdict);

/// A configuration with all that belongs to it.
struct Draft {
    folder: TempDir,
    ca: Ca,
    server: Identity,
    client: Identity,
    /// Of the only listener, until a case has others.
    address: SocketAddr,
    admin: SocketAddr,
    listeners: String,
    more: String,
    flags: Vec<String>,
    variables: Vec<(&'static str, &'static str)>,
    /// Sockets of another program; with them nothing runs before.
    held: Vec<Box<dyn Any>>,
    /// Where a good one must answer.
    tls: Vec<SocketAddr>,
    plain: Vec<SocketAddr>,
    unix: Vec<PathBuf>,
}

impl Draft {
    fn new() -> Self {
        let (folder, ca) = (TempDir::new().unwrap(), Ca::new());
        let (server, client) = (ca.issue(SERVER), ca.issue(CALLER));
        let (address, admin) = (free(), free());
        let listeners = format!("[[listeners]]\naddress = \"{address}\"\n");
        let Options { app_key, app_secret, .. } = Options::default();
        let draft = Self {
            folder,
            ca,
            server,
            client,
            address,
            admin,
            listeners,
            more: String::new(),
            flags: Vec::new(),
            variables: Vec::new(),
            held: Vec::new(),
            tls: Vec::new(),
            plain: vec![address],
            unix: Vec::new(),
        };
        draft.put("app_key", app_key);
        draft.put("app_secret", app_secret);
        draft.put("server.pem", &draft.server.certificate);
        draft.put("server.key", &draft.server.key);
        draft.put("ca.pem", draft.ca.0.pem());
        draft.put("revoked.pem", draft.ca.revoke(&[], 2124));
        draft
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn shown(&self, name: &str) -> String {
        self.at(name).display().to_string()
    }

    fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.at(name), content).unwrap();
    }

    fn set(&mut self, key: &str, value: impl std::fmt::Display) {
        self.flags.extend(["--set".to_owned(), format!("{key}={value}")]);
    }

    /// One more listener that a caller may use, wherever it is.
    fn listen(&mut self, address: impl std::fmt::Display, more: &str) {
        self.listeners += &format!("[[listeners]]\naddress = \"{address}\"\n{more}\n");
    }

    fn listen_openly(&mut self, address: &str) {
        self.listen(address, "hosts = [\"localhost\"]\nallow_plaintext = true");
    }

    fn listen_unix(&mut self, path: &str) {
        self.listen(format_args!("unix:{path}"), "");
        self.unix.push(path.into());
    }

    /// A listener with TLS, of these files.
    fn listen_tls(&mut self, certificate: &str, key: &str) {
        let address = free();
        self.listen(address, &format!("tls = {{ cert_file = \"{certificate}\", key_file = \"{key}\" }}"));
        self.tls.push(address);
    }

    /// The same, and callers show a certificate.
    fn listen_mutual(&mut self, client_ca: &str, revoked: &str) {
        let address = free();
        let files = "cert_file = \"server.pem\", key_file = \"server.key\"";
        let clients = format!("client_ca_file = \"{client_ca}\", client_crl_file = \"{revoked}\"");
        self.listen(address, &format!("tls = {{ {files}, {clients} }}"));
        self.more += &caller("console", CONSOLE, "");
        self.tls.push(address);
    }

    /// The gateway's own certificate.
    fn identify(&mut self, certificate: &str, key: &str) {
        self.put("client.pem", certificate);
        self.put("client.key", key);
        self.set("upstream.client_cert_file", "client.pem");
        self.set("upstream.client_key_file", "client.key");
    }

    fn write(&self, sandbox: &Sandbox) {
        let text = format!(
            r#"{}
[admin]
address = "{}"
[server]
drain_grace = "0s"
[upstream]
base_url = "{}"
[token]
url = "{}"
[log]
format = "json"
[[credentials]]
name = "default"
app_key_file = "app_key"
app_secret_file = "app_secret"
{}
{}"#,
            self.listeners,
            self.admin,
            sandbox.url(),
            sandbox.token_url(),
            caller("qa-console", "loopback", ""),
            self.more
        );
        self.put("gateway.toml", text);
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(BINARY);
        command.arg(name).arg("--config").arg(self.at("gateway.toml")).args(&self.flags);
        command.envs(self.variables.iter().copied()).stdin(Stdio::null());
        command
    }

    /// Exit code and first error of `check`.
    fn check(&self) -> (i32, String) {
        let output = self.command("check").output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), said.lines().next().unwrap_or_default().to_owned())
    }

    /// Exit code of `check`, and all that it says, on a machine that systemd runs, or on one that it does not.
    fn check_where(&self, systemd_runs: bool) -> (i32, String) {
        self.check_behind(if systemd_runs { "mkdir -p /run/systemd/system" } else { "true" })
    }

    /// The same behind a command, on a machine that systemd does not run unless the command says so.
    fn check_behind(&self, first: &str) -> (i32, String) {
        let mount = format!("mount -t tmpfs none /run && {first} && exec \"$@\"");
        let check = self.command("check");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &mount, "sh"]).arg(check.get_program()).args(check.get_args());
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout) + &text(output.stderr))
    }

    /// A gateway that serves, or its exit code and first error.
    fn serve(&self) -> Result<Running, (i32, String)> {
        let mut child = self.command("serve").stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let (tell, told) = mpsc::channel();
        thread::spawn(move || lines.for_each(|line| drop(tell.send(line))));
        let mut first = None;
        for line in &told {
            if line.contains("listening (admin)") {
                let running = Running(child);
                self.answers();
                return Ok(running);
            }
            first = first.or(Some(line).filter(|line| !line.starts_with('{')));
        }
        Err((end(&mut child), first.unwrap_or_default()))
    }

    /// Waits until every socket answers.
    fn answers(&self) {
        wait_for("the admin listener", || {
            ask(self.admin, "GET /livez HTTP/1.1\r\n").filter(|status| *status == 200)
        });
        for address in &self.plain {
            wait_for("a listener", || ask(*address, "GET / HTTP/1.1\r\n").filter(|status| *status == 404));
        }
        for address in &self.tls {
            let reply = self.ca.call(*address, Some(&self.client)).unwrap();
            assert_eq!(reply.outcome(), "succeeded", "{reply:?}");
        }
        for path in &self.unix {
            drop(UnixStream::connect(path).unwrap());
        }
    }
}

/// Whether systemd runs this machine.
fn is_booted() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn end(child: &mut Child) -> i32 {
    wait_for("the end", || child.try_wait().unwrap()).code().unwrap()
}

/// The status of an answer.
fn ask(address: SocketAddr, line: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "{line}host: localhost\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.split(' ').nth(1)?.parse().ok()
}

/// A port that is free on all addresses, and that no outgoing connection takes.
fn free_everywhere() -> u16 {
    wait_for("a free port", || {
        let port = fastrand::u16(20_000..32_000);
        let is_free = |address: &str| TcpListener::bind((address, port)).is_ok();
        (is_free("0.0.0.0") && is_free("::")).then_some(port)
    })
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn secret() -> String {
    Options::default().app_secret
}

const MARK: &str = "\u{feff}";

const SECRETS: &[Case] = &[
    ("as it is", |_| {}, Good),
    ("a newline", |it| it.put("app_secret", secret() + "\n"), Good),
    ("a newline of Windows", |it| it.put("app_secret", secret() + "\r\n"), Good),
    ("a blank within", |it| it.put("app_secret", "two words, \u{e9}\n"), Good),
    (
        "UTF-16 with its mark",
        |it| it.put("app_secret", utf16("\u{feff}s3cret\r\n")),
        Bad(78, "app_secret_file: is UTF-16"),
    ),
    ("UTF-16 without", |it| it.put("app_secret", utf16("s3cret")), Bad(78, "app_secret_file: is UTF-16")),
    (
        "UTF-16 the other way",
        |it| it.put("app_secret", b"\xfe\xff\0s\0e"),
        Bad(78, "app_secret_file: is UTF-16"),
    ),
    ("a byte order mark", |it| it.put("app_secret", MARK.to_owned() + &secret()), Bad(78, "byte order mark")),
    (
        "blanks only",
        |it| it.put("app_secret", "  \n"),
        Bad(78, "app_secret_file: begins or ends with a blank"),
    ),
    ("nothing", |it| it.put("app_secret", ""), Bad(78, "app_secret_file: is empty")),
    ("only a newline", |it| it.put("app_secret", "\n"), Bad(78, "app_secret_file: is empty")),
    (
        "a NUL byte",
        |it| it.put("app_secret", "s3\0cret"),
        Bad(78, "app_secret_file: contains a control character"),
    ),
    (
        "two newlines",
        |it| it.put("app_secret", secret() + "\n\n"),
        Bad(78, "app_secret_file: holds more than one line"),
    ),
    (
        "a newline before",
        |it| it.put("app_secret", "\n".to_owned() + &secret()),
        Bad(78, "more than one line"),
    ),
    ("a blank before", |it| it.put("app_secret", " ".to_owned() + &secret()), Bad(78, "a blank")),
    ("a tab behind", |it| it.put("app_secret", secret() + "\t\n"), Bad(78, "a blank")),
    ("a zero-width blank", |it| it.put("app_secret", "s3\u{200b}cret"), Bad(78, "another invisible one")),
    ("no UTF-8", |it| it.put("app_secret", b"s3cret\xff"), Bad(78, "app_secret_file: is not UTF-8")),
    ("a key in UTF-16", |it| it.put("app_key", utf16("key-1")), Bad(78, "app_key_file: is UTF-16")),
    (
        "a key with a mark",
        |it| it.put("app_key", "\u{feff}key-1"),
        Bad(78, "app_key_file: begins with a byte order mark"),
    ),
    (
        "a key with two newlines",
        |it| it.put("app_key", "key-1\n\n"),
        Bad(78, "app_key_file: holds more than one line"),
    ),
    (
        "a key beyond ASCII",
        |it| it.put("app_key", "k\u{e9}y"),
        Bad(78, "app_key_file: holds a character that a header cannot have"),
    ),
    (
        "no key",
        |it| fs::remove_file(it.at("app_key")).unwrap(),
        Bad(78, "app_key_file: there is no such file"),
    ),
    (
        "a folder",
        |it| {
            fs::remove_file(it.at("app_key")).unwrap();
            fs::create_dir(it.at("app_key")).unwrap();
        },
        Bad(78, "app_key_file: is not a regular file"),
    ),
    (
        "a link to nothing",
        |it| {
            fs::remove_file(it.at("app_key")).unwrap();
            symlink("nowhere", it.at("app_key")).unwrap();
        },
        Bad(78, "app_key_file: there is no such file"),
    ),
    (
        "a link to a key",
        |it| {
            fs::rename(it.at("app_key"), it.at("other")).unwrap();
            symlink("other", it.at("app_key")).unwrap();
        },
        Good,
    ),
    ("a variable", |it| second_credential(it, "s3cret\n"), Good),
    (
        "no variable",
        |it| second_credential(it, ""),
        Bad(78, "app_secret_env: the environment has no variable"),
    ),
    (
        "a blank variable",
        |it| second_credential(it, " "),
        Bad(78, "app_secret_env: begins or ends with a blank"),
    ),
    (
        "a variable of two lines",
        |it| second_credential(it, "a\nb"),
        Bad(78, "app_secret_env: holds more than one"),
    ),
];

fn second_credential(it: &mut Draft, value: &'static str) {
    it.more +=
        "[[credentials]]\nname = \"second\"\napp_key_file = \"app_key\"\napp_secret_env = \"THE_SECRET\"\n";
    it.variables.push(("THE_SECRET", value));
}

const CERTIFICATES: &[Case] = &[
    ("TLS", |it| it.listen_tls("server.pem", "server.key"), Good),
    ("a mark before both", |it| tls(it, |pem| MARK.to_owned() + pem, |key| MARK.to_owned() + key), Good),
    (
        "lines of Windows",
        |it| tls(it, |pem| pem.replace('\n', "\r\n"), |key| key.replace('\n', "\r\n")),
        Good,
    ),
    ("comments", |it| tls(it, |pem| format!("of the server\n{pem}\n# end\n"), str::to_owned), Good),
    (
        "both in one file",
        |it| {
            it.put("both", it.server.key.clone() + &it.server.certificate);
            it.listen_tls("both", "both");
        },
        Good,
    ),
    (
        "another's key",
        |it| {
            let other = it.ca.issue(SERVER);
            tls(it, |pem| pem.to_owned(), |_| other.key.clone());
        },
        Bad(78, "key_file is not the key"),
    ),
    (
        "an encrypted key",
        |it| tls(it, str::to_owned, |key| key.replace("PRIVATE", "ENCRYPTED PRIVATE")),
        Bad(78, "key_file: the key's file contains an encrypted key"),
    ),
    ("a key encrypted as of old", |it| tls(it, str::to_owned, encrypt), Bad(78, "an encrypted key")),
    ("two keys", |it| tls(it, str::to_owned, |key| key.repeat(2)), Bad(78, "more than one private key")),
    ("an indented key", |it| tls(it, str::to_owned, |key| format!(" {key}")), Bad(78, "is not read")),
    (
        "a key glued to a certificate",
        |it| {
            it.put("both", it.server.certificate.trim_end().to_owned() + &it.server.key);
            it.listen_tls("both", "both");
        },
        Bad(78, "a private key that is not read"),
    ),
    ("no key in it", |it| tls(it, str::to_owned, |_| "none".into()), Bad(78, "no private key")),
    ("an empty key", |it| tls(it, str::to_owned, |_| String::new()), Bad(78, "key_file: is empty")),
    ("an empty certificate", |it| tls(it, |_| String::new(), str::to_owned), Bad(78, "server.pem is empty")),
    ("no certificate in it", |it| tls(it, |_| "\n".into(), str::to_owned), Bad(78, "holds no certificate")),
    (
        "a certificate in UTF-16",
        |it| {
            let wide = utf16(&it.server.certificate);
            it.put("server.pem", wide);
            it.listen_tls("server.pem", "server.key");
        },
        Bad(78, "holds no certificate"),
    ),
    (
        "one glued to another",
        |it| tls(it, |pem| pem.trim_end().to_owned() + pem, str::to_owned),
        Bad(78, "is not read"),
    ),
    ("an indented one", |it| tls(it, |pem| format!("{pem} {pem}"), str::to_owned), Bad(78, "is not read")),
    ("no PEM within", |it| tls(it, |pem| pem.replacen("MI", "??", 1), str::to_owned), Bad(78, "is not PEM")),
    ("callers' CA", |it| it.listen_mutual("ca.pem", "revoked.pem"), Good),
    (
        "callers' CA with a mark",
        |it| {
            let pem = MARK.to_owned() + &it.ca.0.pem() + &Ca::new().0.pem();
            it.put("ca.pem", pem);
            it.listen_mutual("ca.pem", "revoked.pem");
        },
        Good,
    ),
    (
        "callers' first CA indented",
        |it| {
            let pem = " ".to_owned() + &it.ca.0.pem() + &Ca::new().0.pem();
            it.put("ca.pem", pem);
            it.listen_mutual("ca.pem", "revoked.pem");
        },
        Bad(78, "client_ca_file: "),
    ),
    (
        "a CA that every user can change",
        |it| {
            let open = fs::Permissions::from_mode(0o666);
            fs::set_permissions(it.at("ca.pem"), open).unwrap();
            it.listen_mutual("ca.pem", "revoked.pem");
        },
        Bad(78, "every user can change it"),
    ),
    (
        "a list that is a certificate",
        |it| it.listen_mutual("ca.pem", "server.pem"),
        Bad(78, "no revocation list"),
    ),
    (
        "roots with a mark",
        |it| {
            it.put("roots.pem", MARK.to_owned() + &it.ca.0.pem());
            it.set("upstream.ca_file", "roots.pem");
        },
        Good,
    ),
    (
        "the first root passed over",
        |it| {
            it.put("roots.pem", it.ca.0.pem().trim_end().to_owned() + &Ca::new().0.pem());
            it.set("upstream.ca_file", "roots.pem");
        },
        Bad(78, "upstream.ca_file: "),
    ),
    (
        "its own certificate",
        |it| {
            let Identity { certificate, key } = it.client.clone();
            it.identify(&certificate, &key);
        },
        Good,
    ),
    (
        "its own with another's key",
        |it| {
            let (own, other) = (it.client.clone(), it.server.clone());
            it.identify(&own.certificate, &other.key);
        },
        Bad(78, "client_key_file is not the key"),
    ),
    (
        "its own, empty",
        |it| {
            let key = it.client.key.clone();
            it.identify("", &key);
        },
        Bad(78, "client_cert_file: "),
    ),
];

/// A listener with TLS whose files are changed.
fn tls(it: &mut Draft, certificate: impl Fn(&str) -> String, key: impl Fn(&str) -> String) {
    it.put("server.pem", certificate(&it.server.certificate));
    it.put("server.key", key(&it.server.key));
    it.listen_tls("server.pem", "server.key");
}

fn encrypt(key: &str) -> String {
    key.replacen("-----\n", "-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n", 1)
}

const DIRECTORIES: &[Case] = &[
    ("missing parents", |it| it.set("audit.directory", "a/b/c"), Good),
    (
        "a link to a folder",
        |it| {
            fs::create_dir(it.at("there")).unwrap();
            symlink("there", it.at("trail")).unwrap();
            it.set("audit.directory", "trail");
        },
        Good,
    ),
    (
        "a link to no folder",
        |it| {
            symlink("nowhere", it.at("trail")).unwrap();
            it.set("audit.directory", "trail");
        },
        Bad(78, "audit.directory: "),
    ),
    (
        "below a link to nothing",
        |it| {
            symlink("nowhere", it.at("trail")).unwrap();
            it.set("audit.directory", "trail/a/b");
        },
        Bad(78, "a symbolic link that leads nowhere"),
    ),
    ("no folder", |it| it.set("audit.directory", "app_key"), Bad(78, "is not a directory")),
    ("below no folder", |it| it.set("audit.directory", "app_key/a"), Bad(78, "audit.directory: ")),
    (
        "it must be there",
        |it| {
            it.set("audit.directory", "trail");
            it.set("audit.must_exist", "true");
        },
        Bad(78, "is missing, and must_exist is set"),
    ),
    (
        "everybody's",
        |it| {
            fs::create_dir(it.at("trail")).unwrap();
            fs::set_permissions(it.at("trail"), fs::Permissions::from_mode(0o777)).unwrap();
            it.set("audit.directory", "trail");
        },
        Bad(78, "every user can change"),
    ),
    (
        "a short key in it",
        |it| {
            fs::create_dir(it.at("trail")).unwrap();
            it.put("trail/audit.key", "short");
            it.set("audit.directory", "trail");
        },
        Bad(78, "at least 32 bytes"),
    ),
    (
        "a short key elsewhere",
        |it| {
            it.put("key", "short");
            it.set("audit.key_file", "key");
        },
        Bad(78, "audit.key_file: "),
    ),
    (
        "a folder in the lock's place",
        |it| {
            fs::create_dir_all(it.at("trail/lock")).unwrap();
            it.put("trail/audit.key", [7; 32]);
            it.set("audit.directory", "trail");
        },
        Bad(78, "audit directory"),
    ),
    (
        "a link in the lock's place",
        |it| {
            fs::create_dir_all(it.at("trail")).unwrap();
            it.put("trail/audit.key", [7; 32]);
            symlink("audit.key", it.at("trail/lock")).unwrap();
            it.set("audit.directory", "trail");
        },
        Bad(78, "lock is no regular file"),
    ),
    (
        "a folder in the lock's place, and no key",
        |it| folder_in(it, "lock", false),
        Bad(78, "audit directory"),
    ),
    (
        "a link in the lock's place, and no key",
        |it| {
            fs::create_dir_all(it.at("trail")).unwrap();
            symlink("nowhere", it.at("trail/lock")).unwrap();
            it.set("audit.directory", "trail");
        },
        Bad(78, "lock is no regular file"),
    ),
    (
        "a folder where the key is made",
        |it| folder_in(it, "audit.key.new", false),
        Bad(78, "in the place of the file audit.key.new"),
    ),
    (
        "a folder where the lock is made",
        |it| folder_in(it, "lock.new", true),
        Bad(78, "in the place of the file lock.new"),
    ),
    (
        "a folder where segments are made",
        |it| folder_in(it, "segment.new", true),
        Bad(78, "in the place of the file segment.new"),
    ),
    ("a folder that nothing is made in", |it| folder_in(it, "other.new", false), Good),
    (
        "a folder in a segment's place",
        |it| {
            fs::create_dir_all(it.at(&segment())).unwrap();
            it.put("trail/audit.key", [7; 32]);
            it.set("audit.directory", "trail");
        },
        Bad(78, "audit directory"),
    ),
    (
        "a segment without its key",
        |it| {
            fs::create_dir_all(it.at("trail")).unwrap();
            it.put(&segment(), "{}\n");
            it.set("audit.directory", "trail");
        },
        Bad(78, "audit.key is missing"),
    ),
];

/// An audit directory that holds a folder of this name, and perhaps a key.
fn folder_in(it: &mut Draft, name: &str, has_key: bool) {
    fs::create_dir_all(it.at("trail").join(name)).unwrap();
    if has_key {
        it.put("trail/audit.key", [7; 32]);
    }
    it.set("audit.directory", "trail");
}

fn segment() -> String {
    format!("trail/audit-{:020}.jsonl", 1)
}

const SOCKETS: &[Case] = &[
    ("a Unix socket", |it| it.listen_unix(&it.shown("a.sock")), Good),
    (
        "one that was left behind",
        |it| {
            let at = it.shown("a.sock");
            drop(UnixListener::bind(&at).unwrap());
            it.listen_unix(&at);
        },
        Good,
    ),
    (
        "in a missing folder",
        |it| it.listen_unix(&it.shown("nowhere/a.sock")),
        Bad(78, "listeners[1].address: cannot listen on unix:"),
    ),
    ("below a file", |it| it.listen_unix(&it.shown("app_key/a.sock")), Bad(78, "listeners[1].address: ")),
    (
        "a file in its place",
        |it| it.listen_unix(&it.shown("app_key")),
        Bad(78, "something other than a socket"),
    ),
    (
        "a link in its place",
        |it| {
            symlink("nowhere", it.at("a.sock")).unwrap();
            it.listen_unix(&it.shown("a.sock"));
        },
        Bad(78, "something other than a socket"),
    ),
    (
        "another program's",
        |it| {
            let at = it.shown("a.sock");
            it.held.push(Box::new(UnixListener::bind(&at).unwrap()));
            it.listen_unix(&at);
        },
        Bad(1, "in use"),
    ),
    (
        "twice",
        |it| {
            it.listen_unix(&it.shown("a.sock"));
            it.listen_unix(&it.shown("./a.sock"));
        },
        Bad(78, "overlaps with listeners[1].address"),
    ),
    (
        "a control socket",
        |it| {
            it.set("admin.control", "c.sock");
            it.unix.push(it.at("c.sock"));
        },
        Good,
    ),
    (
        "its folder is missing",
        |it| it.set("admin.control", "nowhere/c.sock"),
        Bad(78, "admin.control: cannot listen on"),
    ),
    (
        "its path is too long",
        |it| it.set("admin.control", "c".repeat(108)),
        Bad(78, "admin.control: cannot listen on"),
    ),
    (
        "where a listener is",
        |it| {
            it.listen_unix(&it.shown("a.sock"));
            it.set("admin.control", "a.sock");
        },
        Bad(78, "admin.control: overlaps with listeners"),
    ),
];

const ADDRESSES: &[Case] = &[
    ("all of IPv4 and all of IPv6", |it| both(it, "0.0.0.0", "[::]"), Good),
    ("all of IPv6 and all of IPv4", |it| both(it, "[::]", "0.0.0.0"), Good),
    ("one of IPv4 and all of IPv6", |it| both(it, "127.0.0.1", "[::]"), Good),
    (
        "all of IPv6 alone",
        |it| {
            let port = free_everywhere();
            it.listen_openly(&format!("[::]:{port}"));
            it.plain.extend(at(port, &["127.0.0.1", "[::1]"]));
        },
        Good,
    ),
    ("one of each kind", |it| both(it, "127.0.0.1", "[::1]"), Good),
    (
        "admin on all of IPv6",
        |it| {
            let port = free_everywhere();
            it.listen_openly(&format!("127.0.0.1:{port}"));
            it.set("admin.address", format_args!("[::]:{port}"));
            it.admin = at(port, &["[::1]"])[0];
            it.plain.extend(at(port, &["127.0.0.1"]));
        },
        Good,
    ),
    (
        "all and one of IPv4",
        |it| both(it, "0.0.0.0", "127.0.0.1"),
        Bad(78, "listeners[2].address: overlaps with listeners[1].address"),
    ),
    (
        "IPv4 as IPv6",
        |it| both(it, "127.0.0.1", "[::ffff:127.0.0.1]"),
        Bad(78, "overlaps with listeners[1].address"),
    ),
    (
        "admin where a listener is",
        |it| it.set("admin.address", it.address),
        Bad(78, "admin.address: overlaps with listeners"),
    ),
    (
        "no address of this machine",
        |it| it.listen_openly("192.0.2.1:8080"),
        Bad(1, "listeners[1].address: cannot listen on 192.0.2.1:8080"),
    ),
    (
        "another program's port",
        |it| {
            let other = TcpListener::bind("127.0.0.1:0").unwrap();
            it.listen_openly(&other.local_addr().unwrap().to_string());
            it.held.push(Box::new(other));
        },
        Bad(1, "in use"),
    ),
    (
        "another program's port for admin",
        |it| {
            let other = TcpListener::bind("127.0.0.1:0").unwrap();
            it.set("admin.address", other.local_addr().unwrap());
            it.held.push(Box::new(other));
        },
        Bad(1, "admin.address: cannot listen on"),
    ),
];

/// Two listeners with one port.
fn both(it: &mut Draft, first: &str, second: &str) {
    let port = free_everywhere();
    for host in [first, second] {
        it.listen_openly(&format!("{host}:{port}"));
        let reached = host.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]");
        it.plain.extend(at(port, &[&reached]));
    }
}

fn at(port: u16, hosts: &[&str]) -> Vec<SocketAddr> {
    hosts.iter().map(|host| format!("{host}:{port}").parse().unwrap()).collect()
}

const SETTINGS: &[Case] = &[
    ("two workers", |it| it.set("server.workers", 2), Good),
    ("an unknown key", |it| it.more += "[quota]\nbrust = 1\n", Bad(78, "quota.brust: unknown key")),
    ("no TOML", |it| it.more += "[quota\n", Bad(78, ": file: ")),
    (
        "HTTP/2 to a host that is no name",
        |it| it.set("upstream.base_url", "https://a b"),
        Bad(78, "upstream.base_url: "),
    ),
    (
        "a contract",
        |it| {
            it.put("contract.json", ccsqm_gateway::contract::Contract::APPOINT_QUALITY_TASK);
            route(it);
        },
        Good,
    ),
    (
        "a contract in UTF-16",
        |it| {
            it.put("contract.json", utf16("{}"));
            route(it);
        },
        Bad(78, "contract_file: "),
    ),
    ("a contract that is missing", route, Bad(78, "contract_file: ")),
    (
        "a max_size that is too small",
        |it| it.set("audit.max_size", "1MiB"),
        Bad(78, "audit.max_size: must be"),
    ),
    (
        "a variable that is no setting",
        |it| it.variables.push(("CCSQM_GATEWAY__SERVER__WORKER", "2")),
        Bad(78, "did you mean `workers`?"),
    ),
    ("a variable that is not read", |it| it.variables.push(("CCSQM_GATEWAY_SERVER_WORKERS", "2")), Good),
];

fn route(it: &mut Draft) {
    it.more += "[[routes]]\nname = \"appointQualityTask\"\ncontract_file = \"contract.json\"\n";
}

/// What differs from what must come of it.
fn try_case(sandbox: &Sandbox, (name, change, verdict): &Case) -> Result<(), String> {
    let mut draft = Draft::new();
    draft.write(sandbox);
    let before = draft.serve().map_err(|told| format!("{name}: the control: {told:?}"))?;
    change(&mut draft);
    draft.write(sandbox);
    // Whoever holds a socket that the gateway had, or keeps it from it, comes when that is gone.
    let beside = draft.held.is_empty().then(|| draft.check());
    drop(before);
    let alone = draft.check();
    let (served, again) = match draft.serve() {
        Ok(running) => {
            let beside = draft.check();
            drop(running);
            ((0, String::new()), Some(beside))
        }
        Err(told) => (told, None),
    };
    let after = again.is_some().then(|| draft.check()); // sockets of a process that was killed are left behind
    let checks = [Some(&alone), beside.as_ref(), again.as_ref(), after.as_ref()];
    let all =
        format!("{name}: {verdict:?}, serve {served:?}, check alone, beside, again, after: {checks:#?}");
    // Where systemd runs, it may hold the socket of a listener for the gateway: that is a note.
    let is_note = served.0 == 1 && served.1.contains(": listeners[") && served.1.contains("in use");
    let told = if is_note && is_booted() { &(0, String::new()) } else { &served };
    let agree = checks.into_iter().flatten().all(|check| check == told);
    let is_told_once =
        |said: &str| said.rsplit(": ").next().is_some_and(|end| said.matches(end).count() == 1);
    let expected = match verdict {
        Good => served.0 == 0,
        Bad(code, part) => served.0 == *code && served.1.contains(part) && is_told_once(&served.1),
    };
    if agree && expected { Ok(()) } else { Err(all) }
}

#[test]
fn check_succeeds_exactly_when_serve_starts() {
    let cases: Vec<&Case> =
        [SECRETS, CERTIFICATES, DIRECTORIES, SOCKETS, ADDRESSES, SETTINGS].into_iter().flatten().collect();
    assert!(cases.len() >= 60, "{}", cases.len());
    let only = std::env::var("CASE").ok();
    let (sandbox, next, wrong) = (sandbox(), AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if only.as_deref().is_none_or(|only| case.0 == only) {
                        let told = try_case(&sandbox, case).err();
                        wrong.lock().unwrap().extend(told);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn socket_in_use_under_systemd_is_a_note_only_for_listeners() {
    let (sandbox, folder) = (sandbox(), TempDir::new().unwrap());
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = other.local_addr().unwrap().to_string();
    let unix = folder.path().join("s").display().to_string();
    let _unix = UnixListener::bind(&unix).unwrap();
    type Change = fn(&mut Draft, &str);
    let cases: [(&str, &str, Change, i32); 5] = [
        ("", "", |_, _| {}, 0), // the control
        ("listeners[1].address", &tcp, |it, at| it.listen_openly(at), 0),
        ("listeners[1].address", &unix, |it, at| it.listen_unix(at), 0),
        ("admin.address", &tcp, |it, at| it.set("admin.address", at), 1),
        ("admin.control", &unix, |it, at| it.set("admin.control", at), 1),
    ];
    for (key, at, change, code) in cases {
        let mut draft = Draft::new();
        change(&mut draft, at);
        draft.write(&sandbox);
        let (there, said) = draft.check_where(true);
        assert!(there == code && said.contains(key), "{key}: {said}");
        assert_eq!(said.contains("systemd unit"), key.starts_with("listeners"), "{key}: {said}");
        let (elsewhere, said) = draft.check_where(false);
        assert!(elsewhere == i32::from(!key.is_empty()) && said.contains(key), "{key}: {said}");
    }
}

#[test]
fn check_treats_sockets_of_a_running_gateway_as_free() {
    let sandbox = sandbox();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = other.local_addr().unwrap();
    let mut draft = Draft::new();
    draft.set("admin.control", "c.sock");
    draft.listen_unix(&draft.shown("a.sock"));
    draft.write(&sandbox);
    let _running = draft.serve().map_err(|told| panic!("{told:?}"));
    assert_eq!(draft.check_where(false).0, 0, "the control");
    let refused = |draft: &Draft, part: &str| {
        draft.write(&sandbox);
        let (code, said) = draft.check_where(false);
        assert!(code == 1 && said.contains(part) && said.contains("in use"), "{part}: {code} {said}");
    };
    let good = |draft: &Draft, part: &str| {
        draft.write(&sandbox);
        let (code, said) = draft.check_where(false);
        assert!(code == 0 && said.contains(part), "{part}: {code} {said}");
    };

    // An edit of the file: another listener, then another trail.
    let (listeners, flags) = (draft.listeners.clone(), draft.flags.clone());
    draft.listen_openly(&taken.to_string());
    refused(&draft, "listeners[2].address");
    draft.listeners = listeners.clone();
    draft.listen_openly(&free().to_string());
    good(&draft, "a good configuration");
    draft.set("audit.directory", "another");
    good(&draft, "a good configuration");
    (draft.listeners, draft.flags) = (listeners, flags.clone());
    // At another admin address it cannot be asked.
    draft.set("admin.address", free());
    good(&draft, "does not report at admin.address where it listens");
    draft.flags = flags;

    // Another file for the same trail, and another gateway.
    draft.write(&sandbox);
    fs::copy(draft.at("gateway.toml"), draft.at("next.toml")).unwrap();
    let next = draft.shown("next.toml");
    let check = ["check", "--config", &next, "--set", "admin.control=c.sock"];
    let (code, said, _) = command(&check);
    assert!(code == 0, "{said}");
    let folder = draft.folder.path().display();
    let other = format!("cp -a {folder} /run/other && mount --bind /run/other {folder}");
    let (code, said) = draft.check_behind(&other);
    assert!(code == 1 && said.contains("in use"), "the same paths in another container: {said}");
    let mut second = Draft::new();
    second.admin = draft.admin;
    refused(&second, "admin.address");
    second.admin = free();
    good(&second, "a good configuration");
}

/// A queue that is full, so that who connects has to wait.
pub(crate) fn full_queue(path: &Path) -> Vec<Socket> {
    let socket = || Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    let (listener, address) = (socket(), SockAddr::unix(path).unwrap());
    listener.bind(&address).unwrap();
    listener.listen(0).unwrap();
    let mut all = vec![listener];
    loop {
        let caller = socket();
        caller.set_nonblocking(true).unwrap();
        if caller.connect(&address).is_err() {
            return all;
        }
        all.push(caller);
    }
}

#[test]
fn check_and_start_probe_a_unix_socket_without_waking_or_waiting() {
    let sandbox = sandbox();
    for name in ["listener", "full"] {
        let mut draft = Draft::new();
        let path = draft.at("a.sock");
        let (listener, queue) = match name {
            "full" => (None, full_queue(&path)),
            _ => (Some(UnixListener::bind(&path).unwrap()), Vec::new()),
        };
        draft.listen_unix(&draft.shown("a.sock"));
        draft.write(&sandbox);
        for command in ["check", "serve"] {
            let mut child = draft.command(command);
            let mut child = Running(child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
            let is_note = command == "check" && is_booted();
            assert_eq!(end(&mut child.0), i32::from(!is_note), "{name}: {command}");
        }
        if let Some(listener) = listener {
            listener.set_nonblocking(true).unwrap();
            let came = listener.accept().map(drop).unwrap_err();
            assert_eq!(came.kind(), ErrorKind::WouldBlock, "somebody connected");
            let _control = UnixStream::connect(&path).unwrap();
            assert!(listener.accept().is_ok());
        }
        drop(queue);
        // What is left is a name that nobody answers to: the control.
        drop(draft.serve().map_err(|told| panic!("{name}: {told:?}")));
    }
}
