//! Sections for the side of the upstream: the upstream itself, its token endpoint, credentials and routes.

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
    /// `[upstream]`: the API that requests are forwarded to.
    #[schemars(extend("required" = Upstream::REQUIRED))]
    Upstream {
        /// Scheme, host and port of the API, without a path: routes have whole paths.
        base_url: Url as "As::<BaseUrl>" = unset(),
        /// The longest time to connect, TLS included; also the longest wait for a free connection. At most `timeout`.
        connect_timeout: Duration as "As::<Period<10, MINUTE>>" = Duration::from_secs(3),
        /// The longest time of a whole exchange, replay included.
        timeout: Duration as "As::<Period<50, { 10 * MINUTE }>>" = Duration::from_secs(30),
        /// The longest time that a pooled connection may be idle; after it the connection is not used again.
        idle_timeout: Duration as "As::<Period<10, HOUR>>" = Duration::from_secs(10),
        /// The most connections, of all workers together; at least `server.workers`.
        max_connections: usize as "As::<Whole<1, 10_000>>" = 64,
        /// Consecutive failures after which the circuit breaker opens; 0: never.
        breaker_failures: u32 as "As::<Whole<0, 1000, u32>>" = 10,
        /// How long the circuit breaker stays open before the first probe. Each probe that fails doubles it, up to 30 s.
        breaker_pause: Duration as "As::<Period<100, MINUTE>>" = Duration::from_secs(1),
        /// Whether HTTP/2 is offered to the upstream over TLS: `off` or `auto`.
        http2: Http2 = Http2::Off,
        /// PEM roots instead of the system's, for the upstream and the token endpoint.
        ca_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The gateway's own certificate (PEM), for an upstream that requests one. Default: none.
        client_cert_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The private key of the gateway's own certificate.
        client_key_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The HTTP proxy (CONNECT) to the upstream and the token endpoint. Default: none.
        proxy: Option<ProxyUrl> as "As::<Maybe<Proxy>>" = None,
        /// The file of the gateway's user name at the proxy. Default: none.
        proxy_user_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The file of the gateway's password at the proxy.
        proxy_password_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// Static headers of every upstream request. No secrets.
        headers: BTreeMap<String, String> = BTreeMap::new(),
        /// Further reply headers that are passed to callers, in addition to those that always are.
        reply_headers: Vec<HeaderName> as "As::<Each<ReplyHeader>>" = Vec::new(),
    }
}

impl Upstream {
    /// The keys that this section must have. `base_url` has no default: an operator must say where the credential is
    /// sent.
    pub(in crate::config) const REQUIRED: &[&str] = &["base_url"];

    /// Returns the gateway's own certificate and its key; `None` if either is not set.
    pub fn identity(&self) -> Option<IdentityFiles> {
        let (cert_file, key_file) = self.client_cert_file.clone().zip(self.client_key_file.clone())?;
        Some(IdentityFiles { cert_file, key_file })
    }

    /// Returns the static headers of every upstream request. An invalid header is left out; a validated configuration
    /// has none.
    pub fn static_headers(&self) -> HeaderMap {
        let header = |(name, value): (&String, &String)| {
            Some((name.parse().ok()?, HeaderValue::from_str(value).ok()?))
        };
        self.headers.iter().filter_map(header).collect()
    }

    /// Returns the gateway's user and password at the proxy; `None` if either is not set.
    pub fn proxy_login(&self) -> Option<LoginFiles> {
        let (user, password) = self.proxy_user_file.clone().zip(self.proxy_password_file.clone())?;
        Some(LoginFiles { user, password })
    }
}

/// A certificate with its intermediate certificates, and its key: PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The file of the certificate.
    pub cert_file: PathBuf,
    /// The file of its private key.
    pub key_file: PathBuf,
}

/// A user and a password, each in a file that holds nothing else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoginFiles {
    /// The file of the user's name.
    pub user: PathBuf,
    /// The file of the password.
    pub password: PathBuf,
}

words! {
    /// Whether HTTP/2 is used with the upstream.
    Http2 {
        /// Never: HTTP/1.1.
        Off = "off",
        /// Over TLS, if the upstream selects it (ALPN); else HTTP/1.1.
        Auto = "auto",
    }
}

/// Returns the URL that stands for one that is not set. `base_url` must be set, and `token.url` is derived from it.
fn unset() -> Url {
    Url { tls: true, host: String::new(), port: 443, path: String::new() }
}

section! {
    /// `[token]`: how tokens are fetched.
    Token {
        /// The token endpoint. Default: `upstream.base_url` with the vendor's path.
        url: Url as "As::<TokenUrl>" = unset(),
        /// The lifetime to request with `X-Token-Expire`, or `none`. If a reply states no lifetime, at most 10 min are assumed.
        lifetime: Option<Duration> as "As::<Lifetime>" = Some(Duration::from_secs(600)),
        /// The longest time of one call of the token endpoint.
        timeout: Duration as "As::<Period<50, MINUTE>>" = Duration::from_secs(5),
        /// The longest time that a request waits for a token; then 503 `token_unavailable`.
        wait: Duration as "As::<Period<0, MINUTE>>" = Duration::from_secs(5),
        /// Upstream statuses that mean that the token was refused: any of 401, 403 and 418.
        refused_statuses: Vec<StatusCode> as "As::<Each<RefusedStatus>>" = vec![StatusCode::UNAUTHORIZED],
    }
}

section! {
    /// `[[credentials]]`: an app key and its secret, each in a file or a variable.
    #[schemars(extend("required" = Credential::REQUIRED, "allOf" = [
        { "oneOf": [{ "required": ["app_key_file"] }, { "required": ["app_key_env"] }] },
        { "oneOf": [{ "required": ["app_secret_file"] }, { "required": ["app_secret_env"] }] },
    ]))]
    Credential {
        /// The name of the credential, unique.
        name: String as "As::<Name>" = String::new(),
        /// The file of the app key, unless `app_key_env` is set.
        app_key_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The environment variable of the app key, unless `app_key_file` is set.
        app_key_env: Option<String> = None,
        /// The file of the app secret, unless `app_secret_env` is set.
        app_secret_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The environment variable of the app secret, unless `app_secret_file` is set.
        app_secret_env: Option<String> = None,
    }
}

impl Credential {
    /// The keys that a credential must have. In addition it must have one source for its app key and one for its app
    /// secret.
    pub(in crate::config) const REQUIRED: &[&str] = &["name"];

    /// Returns where the app key is.
    pub fn app_key(&self) -> SecretSource {
        SecretSource::of(self.app_key_file.as_ref(), self.app_key_env.as_ref())
    }

    /// Returns where the app secret is.
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
    /// Returns the file, or the variable if no file is set. Validation ensures that one of them is.
    fn of(file: Option<&PathBuf>, variable: Option<&String>) -> Self {
        let variable = || Self::Env(variable.cloned().unwrap_or_default());
        file.map_or_else(variable, |path| Self::File(path.clone()))
    }
}

section! {
    /// `[[routes]]`: a call that may be forwarded.
    #[schemars(extend(
        "required" = ["name"],
        "if" = { "properties": { "name": { "const": BUILT_IN_ROUTE } } },
        "then" = { "properties": { "path": false, "result_field": false, "success_codes": false } },
        "else" = { "required": Route::REQUIRED },
    ))]
    Route {
        /// The name of the route, unique. `appointQualityTask` is built in.
        name: String as "As::<Name>" = String::new(),
        /// The exact path, the same for callers and the upstream.
        path: String as "As::<RoutePath>" = String::new(),
        /// The file of the contract: a JSON Schema of the request body.
        contract_file: Option<PathBuf> as "As::<Maybe<FilePath>>" = None,
        /// The member of a reply that holds the result code.
        result_field: String as "As::<Member>" = "resultCode".into(),
        /// The result codes that mean success.
        success_codes: Vec<String> as "As::<Each<Code>>" = Vec::new(),
        /// The credential to use on this route instead of the caller's. Default: the caller's.
        credential: Option<String> = None,
        /// Replaces `upstream.timeout` on this route. Default: `upstream.timeout`.
        timeout: Option<Duration> as "As::<Maybe<Period<50, { 10 * MINUTE }>>>" = None,
        /// Whether its requests are refused for now, with 403 `frozen`.
        frozen: bool = false,
    }
}

impl Route {
    /// The keys that are not accepted for the built-in route, since they are fixed.
    pub const FIXED: [&str; 3] = ["path", "result_field", "success_codes"];

    /// The keys that a route must have, unless it is the built-in one.
    pub(in crate::config) const REQUIRED: &[&str] = &["name", "path", "contract_file", "success_codes"];

    /// Returns where the contract comes from.
    pub fn contract(&self) -> ContractSource {
        self.contract_file.clone().map_or(ContractSource::BuiltIn, ContractSource::File)
    }
}

/// Where a contract comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContractSource {
    /// The contract of `appointQualityTask` that is embedded in the binary.
    BuiltIn,
    /// A JSON Schema file.
    File(PathBuf),
}
