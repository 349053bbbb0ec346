//! Mistakes for the reference file, in generated places.

/// A key of the reference file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) section: String,
    pub(super) name: String,
    pub(super) value: String,
    pub(super) line: usize,
    pub(super) header: usize,
}

impl Key {
    pub(super) fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// How a key that is unknown in the same section is named: not by itself where it may be a pasted secret.
    fn unknown(&self, name: &str) -> String {
        let names_secrets = ["credentials[0]", "listeners[2].tls", "upstream", "audit"];
        let is_quoted = !names_secrets.contains(&self.section.as_str());
        if is_quoted { format!("{}.{name}", self.section) } else { self.section.clone() }
    }

    /// Its path without the index of a list.
    fn kind(&self) -> String {
        self.path().replace("[0]", "").replace("[1]", "").replace("[2]", "")
    }
}

pub(super) fn keys_of(text: &str) -> Vec<Key> {
    let (mut section, mut header, mut keys) = (String::new(), 0, Vec::<Key>::new());
    for (i, line) in text.lines().enumerate() {
        let code = line.split(" #").next().unwrap().trim();
        if let Some(list) = code.strip_prefix("[[") {
            let list = list.trim_end_matches("]]");
            let heads = text.lines().take(i).filter(|line| line.starts_with(&format!("[[{list}]]")));
            section = format!("{list}[{}]", heads.count());
            header = i + 1;
        } else if let Some(table) = code.strip_prefix('[') {
            let table = table.trim_end_matches(']');
            let (last, list) = (section.split('.').next().unwrap(), table.split('.').next().unwrap());
            let nested = last.split('[').next().filter(|name| *name == list && last.ends_with(']'));
            section = nested.map_or_else(|| table.to_owned(), |_| last.to_owned() + &table[list.len()..]);
            header = i + 1;
        } else if let Some((name, value)) = code.split_once(" = ").filter(|_| !code.starts_with('#')) {
            let (name, value) = (name.to_owned(), value.to_owned());
            keys.push(Key { section: section.clone(), name, value, line: i + 1, header });
        }
    }
    keys
}

/// A key, broken.
#[derive(Clone, Debug)]
pub(super) struct Mistake {
    pub(super) way: &'static str,
    pub(super) text: String,
    /// The key that must be named.
    pub(super) key: String,
    /// On which line of `text` it is.
    pub(super) offset: usize,
    /// Something is missing: told at the section's header.
    pub(super) at_header: bool,
    /// It is made in a variable or a flag, of this name and with this text, and the file is right.
    pub(super) layer: Option<(Layer, String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layer {
    Variable,
    Flag,
}

impl Mistake {
    /// The same mistake in a variable or a flag, if it can be made there.
    fn elsewhere(mut self, key: &Key, random: &mut Random) -> Self {
        let line = self.text.lines().last().unwrap_or_default().to_owned();
        let Some((name, value)) = line.split_once(" = ") else { return self };
        let text = value.trim_matches('"');
        // A text there may be meant as a number; a table has no text.
        let is_wrong_there = ["bounds", "file", "misspelt", "unit", "unknown", "value"].contains(&self.way)
            && !value.starts_with('{')
            && !text.contains('\\')
            && (name != "mode" || self.way != "unit");
        if is_wrong_there {
            let path = format!("{}.{name}", key.section);
            let is_flag = key.section.contains('[') || random.below(2) == 0;
            let name = if is_flag {
                path
            } else {
                format!("CCSQM_GATEWAY__{}", path.replace('.', "__").to_uppercase())
            };
            self.layer = Some((if is_flag { Layer::Flag } else { Layer::Variable }, name, text.to_owned()));
        }
        self
    }
}

/// The ways to break a key. The last two do not go with `syntax`: what is missing, or means nothing, may stand
/// on a line that is no TOML, and is not told.
pub(super) const WAYS: [&str; 11] = [
    "bounds", "file", "misspelt", "secret", "type", "unit", "unknown", "value", "syntax", "dangling",
    "missing",
];

/// So many keys, each broken in one way; every way is as likely.
pub(super) fn mistakes<'a>(
    random: &mut Random,
    keys: &'a [Key],
    with_syntax: bool,
    count: usize,
) -> Vec<(&'a Key, Mistake)> {
    let mut picked: Vec<(&Key, Mistake)> = Vec::new();
    while picked.len() < count {
        let way = WAYS[random.below(WAYS.len())];
        let broken =
            keys.iter().flat_map(|key| ways_to_break(key, random).into_iter().map(move |m| (key, m)));
        let mut broken: Vec<_> = broken.filter(|(_, mistake)| mistake.way == way).collect();
        let (key, mistake) = broken.swap_remove(random.below(broken.len()));
        let fits = if with_syntax { !["dangling", "missing"].contains(&way) } else { way != "syntax" };
        // A name that cannot be read may be the one that a reference means.
        let name = |key: &Key| ["credentials.name", "routes.name"].contains(&key.kind().as_str());
        // Files that go together may both be missing, and a route without a name is the built-in one if nothing else is set.
        let pair = |key: &Key| key.name.starts_with("client_") || key.name.starts_with("proxy");
        let clash = picked.iter().any(|(other, earlier)| {
            let are_both = |of: &dyn Fn(&Key) -> bool| of(key) && of(other);
            *other == key
                || (name(key) && earlier.way == "dangling")
                || (name(other) && way == "dangling")
                || (are_both(&pair) && way == "missing" && earlier.way == "missing")
                || (are_both(&|key| key.section == "routes[0]") && [way, earlier.way].contains(&"missing"))
        });
        if fits && !clash {
            let mistake = if random.below(3) == 0 { mistake.elsewhere(key, random) } else { mistake };
            picked.push((key, mistake));
        }
    }
    picked
}

/// Every way to break a key that fits what it is.
fn ways_to_break(key: &Key, random: &mut Random) -> Vec<Mistake> {
    let (name, value) = (key.name.as_str(), key.value.as_str());
    let mistake =
        |way, text: String, key: String| Mistake { way, text, key, offset: 0, at_header: false, layer: None };
    let value_is = |way, value: &str| mistake(way, format!("{name} = {value}"), key.path());
    let middle = 1 + random.below(name.len() - 1);
    let misspelt = format!("{}x{}", &name[..middle], &name[middle..]);
    let mut ways = vec![
        mistake("misspelt", format!("{misspelt} = {value}"), key.unknown(&misspelt)),
        Mistake {
            offset: 1,
            ..mistake(
                "unknown",
                format!("{name} = {value}\nnot_{name} = 1"),
                key.unknown(&format!("not_{name}")),
            )
        },
        value_is("type", "1979-05-27"),
        value_is("type", "1.5"),
        mistake("syntax", format!("{name} {value}"), "file".into()),
        mistake("syntax", format!("{name} = "), "file".into()),
        mistake("syntax", format!("{name} = {value} and more"), "file".into()),
        Mistake { offset: 1, ..mistake("syntax", format!("{name} = {value}\n{name} = 1"), "file".into()) },
    ];
    if value.starts_with(['"', '[', '{']) {
        let all_but_last = &value[..value.len() - 1];
        ways.push(mistake("syntax", format!("{name} = {all_but_last}"), "file".into()));
    }
    let required = [
        "listeners.address",
        "listeners.tls.cert_file",
        "listeners.tls.key_file",
        "upstream.base_url",
        "upstream.client_cert_file", // both, or none
        "upstream.proxy",
        "upstream.proxy_user_file", // both, or none
        "credentials.name",
        "credentials.app_key_file",
        "credentials.app_secret_file",
        "callers.name",
        "callers.peer",
        "callers.operator_id",
        "callers.credential",
        "callers.routes",
        "routes.name",
        "routes.path",
        "routes.contract_file",
        "routes.success_codes",
    ];
    if required.contains(&key.kind().as_str()) {
        ways.push(Mistake { at_header: true, ..mistake("missing", "# nothing".into(), key.path()) });
    }
    let is_quantity = value.starts_with('"') && value.as_bytes()[1].is_ascii_digit();
    match key.kind().as_str() {
        "listeners.address" | "admin.address" => {
            ways.push(value_is("value", "\"localhost\""));
            ways.push(value_is("value", "\"unix:relative.sock\""));
        }
        "listeners.mode" => ways.extend([value_is("value", "\"0888\""), value_is("unit", "660")]),
        "upstream.base_url" => ways.extend([
            value_is("value", "\"http://service.besclouds.com\""),
            value_is("value", "\"https://user:s3cret@service.besclouds.com\""),
            value_is("value", "\"https://service.besclouds.com/path\""),
        ]),
        "upstream.breaker_failures" => {
            ways.extend(["-1", "1001", "99999999999999999999"].map(|number| value_is("bounds", number)));
        }
        "upstream.proxy" => ways.extend([
            value_is("value", "\"egress.internal:3128\""),
            value_is("value", "\"https://egress.internal:3128\""),
            value_is("value", "\"http://user:s3cret@egress.internal:3128\""),
            value_is("value", "\"http://egress.internal\""),
        ]),
        "token.url" => ways.push(value_is("value", "\"service.besclouds.com\"")),
        "upstream.headers" => ways.extend([
            mistake(
                "secret",
                "headers = { authorization = \"s3cret\" }".into(),
                format!("{}.authorization", key.path()),
            ),
            mistake(
                "secret",
                "headers = { X-Auth_Token = \"s3cret\" }".into(),
                format!("{}.X-Auth_Token", key.path()),
            ),
            mistake("value", "headers = { \"no name\" = \"x\" }".into(), format!("{}.no name", key.path())),
        ]),
        "token.refused_statuses" => ways.push(value_is("bounds", "[500]")),
        "credentials.app_key_file" | "credentials.app_secret_file" => {
            let inline = name.trim_end_matches("_file");
            ways.push(mistake(
                "secret",
                format!("{inline} = \"s3cret\""),
                format!("{}.{inline}", key.section),
            ));
            ways.push(value_is("file", "\"s3cret\""));
            ways.push(mistake(
                "secret",
                format!("{inline}_env = \"s3cret\""),
                format!("{}.{inline}_env", key.section),
            ));
        }
        "upstream.ca_file"
        | "audit.key_file"
        | "routes.contract_file"
        | "upstream.client_cert_file"
        | "upstream.client_key_file"
        | "upstream.proxy_user_file"
        | "upstream.proxy_password_file"
        | "listeners.tls.cert_file"
        | "listeners.tls.key_file"
        | "listeners.tls.client_ca_file"
        | "listeners.tls.client_crl_file" => {
            ways.extend([
                value_is("file", "\"absent\""),
                value_is("file", "\"contracts\""),
                value_is("file", "\"\""),
            ]);
        }
        "credentials.name" | "callers.name" | "routes.name" => ways.push(value_is("value", "\"a b\"")),
        "callers.peer" => {
            let bad = [
                "uid:x",
                "10.0.0.1/8",
                "10.0.0.0/33",
                "::ffff:10.0.0.0/104",
                "dns:*.internal",
                "spiffe://Org/x",
            ];
            ways.extend(bad.map(|peer| value_is("value", &format!("\"{peer}\""))));
        }
        "callers.operator_id" => ways.push(value_is("value", "\"\\r\\nx: y\"")),
        "callers.operators" => ways.push(value_is("value", "[\"a b\"]")),
        "callers.credential" | "routes.credential" => ways.push(value_is("dangling", "\"nobody\"")),
        "callers.routes" => ways.push(value_is("dangling", "[\"appointQualityTask\", \"nobody\"]")),
        "routes.path" => {
            ways.extend([value_is("value", "\"/elsewhere\""), value_is("value", "\"/apiaccess/%2e\"")]);
        }
        "audit.directory" => ways.push(value_is("file", "\"app_key\"")),
        "audit.durability" => ways.push(value_is("value", "\"tape\"")),
        "audit.fields" => {
            ways.push(mistake(
                "value",
                "fields = { task = \"hide\" }".into(),
                format!("{}.task", key.path()),
            ));
        }
        "log.level" => ways.push(value_is("value", "\"inof\"")),
        "log.format" => ways.push(value_is("value", "\"xml\"")),
        "admin.control" => {} // any path will do
        _ if value.contains('/') => {
            ways.extend(
                ["0/s", "5/d", "2000000/s", "5"].map(|rate| value_is("bounds", &format!("\"{rate}\""))),
            );
            ways.push(value_is("unit", "20"));
        }
        _ if is_quantity => {
            ways.extend(
                ["9999d", "9999GiB", "10", "10 s", "-1s"].map(|q| value_is("unit", &format!("\"{q}\""))),
            );
            ways.extend([value_is("unit", "10"), value_is("bounds", "\"18446744073709551615d\"")]);
        }
        _ if value.parse::<u64>().is_ok() => {
            ways.extend(["0", "-1", "99999999999999999999"].map(|number| value_is("bounds", number)));
            ways.push(value_is("type", "\"many\""));
        }
        _ => {}
    }
    ways
}

/// SplitMix64: enough for choosing, and the same everywhere.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}
