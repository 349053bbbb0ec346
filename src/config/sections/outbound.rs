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

/// `[upstream]`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(extend("required" = Upstream::REQUIRED))]
pub struct Upstream {
    /// Scheme, host and port of the API; its path prefix is empty.
    #[serde(with = "As::<BaseUrl>")]
    pub base_url: Url,
    /// Connect and TLS together; also the longest wait for a free connection.
    #[serde(with = "As::<Period<10, MINUTE>>")]
    pub connect_timeout: Duration,
    /// The whole exchange, replay included.
    #[serde(with = "As::<Period<50, { 10 * MINUTE }>>")]
    pub timeout: Duration,
    /// A pooled connection idle for longer is not used.
    #[serde(with = "As::<Period<10, HOUR>>")]
    pub idle_timeout: Duration,
    /// Connections, all workers together.
    #[serde(with = "As::<Whole<1, 10_000>>")]
    pub max_connections: usize,
    /// So many failures in a row suspend it; 0: none do.
    #[serde(with = "As::<Whole<0, 1000, u32>>")]
    pub breaker_failures: u32,
    /// How long it is left alone, the first time.
    #[serde(with = "As::<Period<100, MINUTE>>")]
    pub breaker_pause: Duration,
    /// Which versions of HTTP are offered to it.
    pub http2: Http2,
    /// PEM roots that replace the system's.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub ca_file: Option<PathBuf>,
    /// The gateway's own certificate.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub client_cert_file: Option<PathBuf>,
    /// Its key.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub client_key_file: Option<PathBuf>,
    /// The proxy on the way to it, and to the token endpoint.
    #[serde(with = "As::<Maybe<Proxy>>")]
    pub proxy: Option<ProxyUrl>,
    /// Who the gateway is to that proxy.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub proxy_user_file: Option<PathBuf>,
    /// Its password.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub proxy_password_file: Option<PathBuf>,
    /// Static headers of every upstream request.
    pub headers: BTreeMap<String, String>,
    /// Further reply headers that pass to callers.
    #[serde(with = "As::<Each<ReplyHeader>>")]
    pub reply_headers: Vec<HeaderName>,
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

/// `[token]`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Token {
    /// The token endpoint.
    #[serde(with = "As::<TokenUrl>")]
    pub url: Url,
    /// What `X-Token-Expire` asks for and what counts when the reply names no lifetime. `None`: not asked for.
    #[serde(with = "As::<Lifetime>")]
    pub lifetime: Option<Duration>,
    /// One call of the token endpoint.
    #[serde(with = "As::<Period<50, MINUTE>>")]
    pub timeout: Duration,
    /// The longest that a request waits for a token.
    #[serde(with = "As::<Period<0, MINUTE>>")]
    pub wait: Duration,
    /// Upstream statuses that mean "token refused".
    #[serde(with = "As::<Each<RefusedStatus>>")]
    pub refused_statuses: Vec<StatusCode>,
}

/// `[[credentials]]`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(extend("required" = Credential::REQUIRED, "allOf" = [
    { "oneOf": [{ "required": ["app_key_file"] }, { "required": ["app_key_env"] }] },
    { "oneOf": [{ "required": ["app_secret_file"] }, { "required": ["app_secret_env"] }] },
]))]
pub struct Credential {
    /// Its name, unique.
    #[serde(with = "As::<Name>")]
    pub name: String,
    /// Where the app key is, or this:
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub app_key_file: Option<PathBuf>,
    /// The variable that holds it.
    pub app_key_env: Option<String>,
    /// Where the app secret is, or this:
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub app_secret_file: Option<PathBuf>,
    /// The variable that holds it.
    pub app_secret_env: Option<String>,
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

/// `[[routes]]`.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(extend(
    "required" = ["name"],
    "if" = { "properties": { "name": { "const": BUILT_IN_ROUTE } } },
    "then" = { "properties": { "path": false, "result_field": false, "success_codes": false } },
    "else" = { "required": Route::REQUIRED },
))]
pub struct Route {
    /// Its name, unique.
    #[serde(with = "As::<Name>")]
    pub name: String,
    /// The exact path, the same on both sides.
    #[serde(with = "As::<RoutePath>")]
    pub path: String,
    /// The contract's JSON Schema.
    #[serde(with = "As::<Maybe<FilePath>>")]
    pub contract_file: Option<PathBuf>,
    /// The member of the reply that holds the result code.
    #[serde(with = "As::<Member>")]
    pub result_field: String,
    /// Result codes that mean success.
    #[serde(with = "As::<Each<Code>>")]
    pub success_codes: Vec<String>,
    /// Credential that replaces the caller's on this route.
    pub credential: Option<String>,
    /// Replaces `upstream.timeout` on this route.
    #[serde(with = "As::<Maybe<Period<50, { 10 * MINUTE }>>>")]
    pub timeout: Option<Duration>,
    /// Its requests are refused for now.
    pub frozen: bool,
}

impl Route {
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
