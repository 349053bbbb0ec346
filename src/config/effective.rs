//! A configuration shown as it is in effect: every key of the file, defaults included, secrets only as their
//! place, and who can use which credential.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    Admin, Audit, Caller, Config, ContractSource, Control, Credential, Idempotency, Limit, ListenAddress,
    Listener, ListenerTls, Route, SecretSource, Server, Token, Upstream,
};

/// A caller that can use a credential.
#[derive(Clone, Debug, Serialize)]
pub struct Access {
    /// The credential's name.
    pub credential: String,
    /// The caller's name.
    pub caller: String,
    /// The caller's `peer`.
    pub peer: String,
    /// The same in words.
    #[serde(skip)]
    pub who: String,
    /// Its requests, or those on all these routes, are refused for now.
    pub is_frozen: bool,
    /// Where it is seen.
    pub listeners: Vec<String>,
    /// On which routes it uses this credential.
    pub routes: Vec<String>,
    /// As which operators, the default one first.
    pub operators: Vec<String>,
    /// How often.
    pub rate_limit: String,
    /// How many requests may come at once.
    pub burst: u32,
}

impl Config {
    /// Everything that is in effect, in the form of the file; what is not set is `null`.
    pub fn effective(&self) -> Value {
        json!({
            "listeners": self.listeners.iter().map(listener).collect::<Vec<_>>(),
            "admin": admin(&self.admin),
            "server": server(&self.server),
            "upstream": upstream(&self.upstream),
            "token": token(&self.token),
            "credentials": self.credentials.iter().map(credential).collect::<Vec<_>>(),
            "callers": self.callers.iter().map(caller).collect::<Vec<_>>(),
            "quota": { "rate": rate(&self.quota), "burst": self.quota.burst },
            "audit": audit(&self.audit),
            "idempotency": idempotency(&self.idempotency),
            "log": { "level": self.log.level, "format": self.log.format.as_str(), "requests": self.log.requests.as_str() },
            "routes": self.routes.iter().map(route).collect::<Vec<_>>(),
        })
    }

    /// Who can use which credential, credential by credential.
    pub fn access(&self) -> Vec<Access> {
        let pairs = self.credentials.iter().flat_map(|c| self.callers.iter().map(move |caller| (c, caller)));
        pairs.filter_map(|(credential, caller)| self.access_of(credential, caller)).collect()
    }

    fn access_of(&self, credential: &Credential, caller: &Caller) -> Option<Access> {
        let uses = |route: &&Route| {
            let used = route.credential.as_ref().unwrap_or(&caller.credential);
            caller.routes.contains(&route.name) && *used == credential.name
        };
        let is_frozen = caller.frozen || !self.routes.iter().filter(uses).any(|route| !route.frozen);
        let routes: Vec<_> = self.routes.iter().filter(uses).map(|route| route.name.clone()).collect();
        let operators = std::iter::once(&caller.operator_id).chain(&caller.operators);
        let access = Access {
            credential: credential.name.clone(),
            caller: caller.name.clone(),
            peer: caller.peer.to_string(),
            who: who(caller),
            is_frozen,
            listeners: self.listeners_of(caller).map(|listener| listener.address.to_string()).collect(),
            routes,
            operators: operators.cloned().collect(),
            rate_limit: rate(&caller.rate_limit),
            burst: caller.rate_limit.burst.get(),
        };
        (!access.routes.is_empty()).then_some(access)
    }
}

fn control(control: &Control) -> Value {
    match control {
        Control::Default => Value::Null,
        Control::Path(path) => json!(path),
        Control::Off => json!("off"),
    }
}

fn who(caller: &Caller) -> String {
    let who = caller.peer.who();
    caller.require_header.as_ref().map_or(who.clone(), |name| format!("{who} that sends {name}"))
}

fn admin(admin: &Admin) -> Value {
    json!({ "address": admin.address.to_string(), "hosts": admin.hosts, "control": control(&admin.control) })
}

fn server(server: &Server) -> Value {
    json!({
        "workers": server.workers,
        "max_connections": server.max_connections,
        "max_in_flight": server.max_in_flight,
        "max_body": size(server.max_body as u64),
        "max_head": size(server.max_head as u64),
        "max_unfinished": size(server.max_unfinished as u64),
        "header_timeout": duration(server.header_timeout),
        "body_timeout": duration(server.body_timeout),
        "idle_timeout": duration(server.idle_timeout),
        "drain_grace": duration(server.drain_grace),
        "drain_timeout": duration(server.drain_timeout),
    })
}

fn upstream(upstream: &Upstream) -> Value {
    let headers: Map<String, Value> = upstream
        .headers
        .iter()
        .map(|(name, value)| (name.to_string(), json!(value.to_str().unwrap_or_default())))
        .collect();
    json!({
        "base_url": upstream.base_url.to_string(),
        "connect_timeout": duration(upstream.connect_timeout),
        "timeout": duration(upstream.timeout),
        "idle_timeout": duration(upstream.idle_timeout),
        "max_connections": upstream.max_connections,
        "breaker_failures": upstream.breaker_failures,
        "breaker_pause": duration(upstream.breaker_pause),
        "http2": upstream.http2.as_str(),
        "ca_file": upstream.ca_file.as_deref().map(whole_path),
        "client_cert_file": upstream.identity.as_ref().map(|files| whole_path(&files.cert_file)),
        "client_key_file": upstream.identity.as_ref().map(|files| whole_path(&files.key_file)),
        "proxy": upstream.proxy.as_ref().map(ToString::to_string),
        "proxy_user_file": upstream.proxy_login.as_ref().map(|files| whole_path(&files.user)),
        "proxy_password_file": upstream.proxy_login.as_ref().map(|files| whole_path(&files.password)),
        "headers": headers,
        "reply_headers": upstream.reply_headers.iter().map(http::HeaderName::as_str).collect::<Vec<_>>(),
    })
}

fn token(token: &Token) -> Value {
    let statuses: Vec<_> = token.refused_statuses.iter().map(|status| status.as_u16()).collect();
    json!({
        "url": token.url.to_string(),
        "lifetime": token.lifetime.map_or("none".to_owned(), duration),
        "timeout": duration(token.timeout),
        "wait": duration(token.wait),
        "refused_statuses": statuses,
    })
}

fn audit(audit: &Audit) -> Value {
    json!({
        "directory": whole_path(&audit.directory),
        "must_exist": audit.must_exist,
        "durability": audit.durability.as_str(),
        "segment_size": size(audit.segment_size),
        "retain": audit.retain.map_or("forever".to_owned(), duration),
        "max_size": audit.max_size.map_or("none".to_owned(), size),
        "stranger_refusals": size(audit.refusals.strangers),
        "caller_refusals": size(audit.refusals.callers),
        "key_file": audit.key_file.as_deref().map(whole_path),
        "fields": audit.fields.iter().map(|(name, shown)| (name.clone(), json!(shown.as_str()))).collect::<Map<_, _>>(),
    })
}

fn idempotency(idempotency: &Idempotency) -> Value {
    json!({
        "window": duration(idempotency.window),
        "max_keys": idempotency.max_keys,
        "reply_memory": size(idempotency.reply_memory),
        "without_key": idempotency.without_key.as_str(),
        "fingerprint_window": duration(idempotency.fingerprint_window),
    })
}

fn listener(Listener { address, hosts, allow_plaintext, tls }: &Listener) -> Value {
    let (mode, allow_plaintext) = match address {
        ListenAddress::Tcp(_) => (None, Some(allow_plaintext)),
        ListenAddress::Unix { mode, .. } => (Some(format!("{mode:04o}")), None),
    };
    let tls = tls.as_ref().map(|ListenerTls { cert_file, key_file, client_ca_file, client_crl_file }| {
        json!({
            "cert_file": whole_path(cert_file),
            "key_file": whole_path(key_file),
            "client_ca_file": client_ca_file.as_deref().map(whole_path),
            "client_crl_file": client_crl_file.as_deref().map(whole_path),
        })
    });
    json!({
        "address": address.to_string(),
        "mode": mode,
        "hosts": hosts,
        "allow_plaintext": allow_plaintext,
        "tls": tls,
    })
}

fn credential(credential: &Credential) -> Value {
    let file = |source: &SecretSource| match source {
        SecretSource::File(path) => Some(whole_path(path)),
        SecretSource::Env(_) => None,
    };
    let env = |source: &SecretSource| match source {
        SecretSource::File(_) => None,
        SecretSource::Env(name) => Some(name.clone()),
    };
    let Credential { name, app_key, app_secret } = credential;
    json!({
        "name": name,
        "app_key_file": file(app_key),
        "app_key_env": env(app_key),
        "app_secret_file": file(app_secret),
        "app_secret_env": env(app_secret),
    })
}

fn caller(caller: &Caller) -> Value {
    json!({
        "name": caller.name,
        "peer": caller.peer.to_string(),
        "operator_id": caller.operator_id,
        "operators": caller.operators,
        "credential": caller.credential,
        "routes": caller.routes,
        "rate_limit": rate(&caller.rate_limit),
        "burst": caller.rate_limit.burst,
        "require_header": caller.require_header.as_ref().map(|name| name.as_str()),
        "bare_ids": caller.bare_ids.as_str(),
        "max_keys": caller.max_keys,
        "frozen": caller.frozen,
    })
}

/// The built-in route has no `contract_file`.
fn route(route: &Route) -> Value {
    let contract = match &route.contract {
        ContractSource::BuiltIn => None,
        ContractSource::File(path) => Some(whole_path(path)),
    };
    json!({
        "name": route.name,
        "path": route.path,
        "contract_file": contract,
        "result_field": route.result_field,
        "success_codes": route.success_codes,
        "credential": route.credential,
        "timeout": route.timeout.map(duration),
        "frozen": route.frozen,
    })
}

/// A relative path says little to who does not know the folder.
fn whole_path(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

fn duration(duration: Duration) -> String {
    match duration.as_millis() {
        milliseconds if milliseconds % 1000 == 0 => format!("{}s", milliseconds / 1000),
        milliseconds => format!("{milliseconds}ms"),
    }
}

fn size(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = units.into_iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    unit.map_or_else(|| format!("{bytes}B"), |(unit, name)| format!("{}{name}", bytes / unit))
}

fn rate(limit: &Limit) -> String {
    let unit = match limit.period.as_secs() {
        1 => "s",
        60 => "m",
        _ => "h",
    };
    format!("{}/{unit}", limit.count)
}
