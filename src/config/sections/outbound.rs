//! Where requests go: the upstream, its token endpoint, credentials and routes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::forms::{
    As, BaseUrl, Code, Each, FilePath, HOUR, Lifetime, MINUTE, Maybe, Member, Name, Period, Proxy,
    RefusedStatus, ReplyHeader, RoutePath, TokenUrl, Whole,
};
use crate::config::{BUILT_IN_ROUTE, ProxyUrl, Url};
use crate::model::words;

section! {
    /// `[upstream]`.
    #[schemars(extend("required" = Upstream::REQUIRED))]
    Upstream {
        /// Scheme, host and port of the API; its path prefix is empty.
        base_url: Url as "As::<BaseUrl>" = unset(),
        /// Connect and TLS together; also the longest wait for a free connection.
        connect_timeout: Duration as "As::<Period<10, MINUTE>>" = Duration::from_secs(3),
        /// The whole exchange, replay included.
        timeout: Duration as "As::<Period<50, { 10 * MINUTE }>>" = Duration::from_secs(30),
        /// A pooled connection idle for longer is not used.
        idle_timeout: Duration as "As::<Period<10, HOUR>>" = Duration::from_secs(10),
        /// Connections, all workers together.
        max_connections: usize as "As::<Whole<1, 10_000>>" = 64,
        /// So many failures in a row suspend it; 0: none do.
        breaker_failures: u32 as "As::<Whole<0, 1000, u32>>" = 10,
        /// How long it is left alone, the first time.
        breaker_pause: Duration as "As::<Period<100, MINUTE>>" = Duration::from_secs(1),
        /// Which versions of HTTP are offered to it.
        http2: Http2 = Http2::Off,
        /// PEM roots that replace the system's.
        ca_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The gateway's own certificate.
        client_cert_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// Its key.
        client_key_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The proxy on the way to it, and to the token endpoint.
        proxy: Option<ProxyUrl> as "As::<Maybe<Proxy>>" = None,
        /// Who the gateway is to that proxy.
        proxy_user_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// Its password.
        proxy_password_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// Static headers of every upstream request.
        headers: BTreeMap<String, String> = BTreeMap::new(),
        /// Further reply headers that pass to callers.
        reply_headers: Vec<HeaderName> as "As::<Each<ReplyHeader>>" = Vec::new(),
    }
}

impl Upstream {
    /// The keys that it must have: what the credential is sent to is named by somebody.
    pub(in crate::config) const REQUIRED: &[&str] = &["base_url"];

    /// The gateway's own certificate.
    pub fn identity(&self) -> Option<IdentityFiles> {
        let (cert_file, key_file) = self.client_cert_file.clone().zip(self.client_key_file.clone())?;
        Some(IdentityFiles { cert_file, key_file })
    }

    /// The static headers of every request.
    pub fn static_headers(&self) -> HeaderMap {
        let header = |(name, value): (&String, &String)| {
            Some((name.parse().ok()?, HeaderValue::from_str(value).ok()?))
        };
        self.headers.iter().filter_map(header).collect()
    }

    /// Who the gateway is to the proxy.
    pub fn proxy_login(&self) -> Option<LoginFiles> {
        let (user, password) = self.proxy_user_file.clone().zip(self.proxy_password_file.clone())?;
        Some(LoginFiles { user, password })
    }
}

/// A certificate, with what leads from it to its root, and its key: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The certificate.
    pub cert_file: PathBuf,
    /// Its key.
    pub key_file: PathBuf,
}

/// A user and a password: files that hold nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoginFiles {
    /// The user's name.
    pub user: PathBuf,
    /// The password.
    pub password: PathBuf,
}

words! {
    /// Whether HTTP/2 is spoken with the upstream.
    Http2 {
        /// Never: HTTP/1.1.
        Off = "off",
        /// Over TLS, where the upstream picks it; else HTTP/1.1.
        Auto = "auto",
    }
}

/// No URL. `base_url` has no default: what the credential is sent to is named by somebody. That of the token endpoint is `base_url`
/// with another path.
fn unset() -> Url {
    Url { tls: true, host: String::new(), port: 443, path: String::new() }
}

section! {
    /// `[token]`.
    Token {
        /// The token endpoint.
        url: Url as "As::<TokenUrl>" = unset(),
        /// What `X-Token-Expire` asks for and what counts when the reply names no lifetime. `None`: not asked for.
        lifetime: Option<Duration> as "As::<Lifetime>" = Some(Duration::from_secs(600)),
        /// One call of the token endpoint.
        timeout: Duration as "As::<Period<50, MINUTE>>" = Duration::from_secs(5),
        /// The longest that a request waits for a token.
        wait: Duration as "As::<Period<0, MINUTE>>" = Duration::from_secs(5),
        /// Upstream statuses that mean "token refused".
        refused_statuses: Vec<StatusCode> as "As::<Each<RefusedStatus>>" = vec![StatusCode::UNAUTHORIZED],
    }
}

section! {
    /// `[[credentials]]`.
    #[schemars(extend("required" = Credential::REQUIRED, "allOf" = [
        { "oneOf": [{ "required": ["app_key_file"] }, { "required": ["app_key_env"] }] },
        { "oneOf": [{ "required": ["app_secret_file"] }, { "required": ["app_secret_env"] }] },
    ]))]
    Credential {
        /// Its name, unique.
        name: String as "As::<Name>" = String::new(),
        /// Where the app key is, or this:
        app_key_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The variable that holds it.
        app_key_env: Option<String> = None,
        /// Where the app secret is, or this:
        app_secret_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The variable that holds it.
        app_secret_env: Option<String> = None,
    }
}

impl Credential {
    /// The keys that it must have, beside those of which one must be there.
    pub(in crate::config) const REQUIRED: &[&str] = &["name"];

    /// Where the app key is.
    pub fn app_key(&self) -> SecretSource {
        SecretSource::of(self.app_key_file.as_ref(), self.app_key_env.as_ref())
    }

    /// Where the app secret is.
    pub fn app_secret(&self) -> SecretSource {
        SecretSource::of(self.app_secret_file.as_ref(), self.app_secret_env.as_ref())
    }
}

/// Where a secret is kept. Never the secret itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// The file's content, trailing newline trimmed.
    File(PathBuf),
    /// The variable's value.
    Env(String),
}

impl SecretSource {
    /// One of them is there.
    fn of(file: Option<&PathBuf>, variable: Option<&String>) -> Self {
        let variable = || Self::Env(variable.cloned().unwrap_or_default());
        file.map_or_else(variable, |path| Self::File(path.clone()))
    }
}

section! {
    /// `[[routes]]`.
    #[schemars(extend(
        "required" = ["name"],
        "if" = { "properties": { "name": { "const": BUILT_IN_ROUTE } } },
        "then" = { "properties": { "path": false, "result_field": false, "success_codes": false } },
        "else" = { "required": Route::REQUIRED },
    ))]
    Route {
        /// Its name, unique.
        name: String as "As::<Name>" = String::new(),
        /// The exact path, the same on both sides.
        path: String as "As::<RoutePath>" = String::new(),
        /// The contract's JSON Schema.
        contract_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The member of the reply that holds the result code.
        result_field: String as "As::<Member>" = "resultCode".into(),
        /// Result codes that mean success.
        success_codes: Vec<String> as "As::<Each<Code>>" = Vec::new(),
        /// Credential that replaces the caller's on this route.
        credential: Option<String> = None,
        /// Replaces `upstream.timeout` on this route.
        timeout: Option<Duration> as "As::<Maybe<Period<50, { 10 * MINUTE }>>>" = None,
        /// Its requests are refused for now.
        frozen: bool = false,
    }
}

impl Route {
    /// The keys that the built-in one has by itself.
    pub const FIXED: [&str; 3] = ["path", "result_field", "success_codes"];

    /// The keys that it must have, unless it is the built-in one.
    pub(in crate::config) const REQUIRED: &[&str] = &["name", "path", "contract_file", "success_codes"];

    /// Where its contract comes from.
    pub fn contract(&self) -> ContractSource {
        self.contract_file.clone().map_or(ContractSource::BuiltIn, ContractSource::File)
    }
}

/// Where a contract comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContractSource {
    /// `appointQualityTask`, embedded in the binary.
    BuiltIn,
    /// A JSON Schema file.
    File(PathBuf),
}
