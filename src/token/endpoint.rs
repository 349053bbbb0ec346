//! One call of tokenByAkSk (`POST …/apigovernance/api/oauth/tokenByAkSk`, vendor's page). Not RFC 6749.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde::Deserialize;
use thiserror::Error;
use tokio::time::timeout;
use zeroize::Zeroizing;

use crate::{
    config,
    connect::{ConnectError, Connector, TlsError},
    secret::Secret,
};

/// A reply is read this far.
const MAX_REPLY: usize = 64 * 1024;

/// What counts when neither the reply nor the configuration is of use.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(600);

/// Why a call brought no token. Says nothing of the reply's body.
#[derive(Debug, Error)]
pub(super) enum FetchError {
    /// The endpoint refuses the pair.
    #[error("the endpoint refuses the credential with status {0}")]
    Refused(StatusCode),
    /// It may work later.
    #[error("status {0}")]
    Status(StatusCode, Option<Duration>),
    /// A 200 without a usable token.
    #[error("the reply holds no usable token: {0}")]
    Invalid(&'static str),
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The exchange broke off.
    #[error("the exchange broke off")]
    Http,
    /// It took too long.
    #[error("no answer in time")]
    Timeout,
}

impl FetchError {
    /// One word for metrics and status.
    pub(super) fn class(&self) -> &'static str {
        match self {
            Self::Refused(_) => "refused",
            Self::Status(..) => "status",
            Self::Invalid(_) => "invalid",
            Self::Connect(error) => error.class(),
            Self::Http => "broken",
            Self::Timeout => "timeout",
        }
    }
}

/// A token as the endpoint handed it out.
pub(super) struct Fetched {
    pub(super) authorization: HeaderValue,
    pub(super) lifetime: Duration,
    /// The endpoint's clock minus ours, in seconds.
    pub(super) skew: Option<i64>,
}

/// Where tokens come from.
#[derive(Debug)]
pub(super) struct Endpoint {
    connector: Connector,
    target: Uri,
    host: HeaderValue,
    lifetime: Option<Duration>,
    timeout: Duration,
}

#[derive(Deserialize)]
struct Reply {
    #[serde(rename = "AccessToken")]
    token: Option<Zeroizing<String>>,
    #[serde(rename = "Expires")]
    expires: Option<serde_json::Value>,
    #[serde(rename = "CreateTime")]
    created: Option<serde_json::Value>,
}

impl Endpoint {
    #[expect(clippy::expect_used, reason = "validation allows host names and plain paths only")]
    pub(super) fn new(token: &config::Token, tls: &Arc<ClientConfig>) -> Result<Self, TlsError> {
        Ok(Self {
            connector: Connector::new(&token.url, tls, token.timeout)?,
            target: token.url.path.parse().expect("a validated path"),
            host: HeaderValue::from_str(&token.url.authority()).expect("a validated host"),
            lifetime: token.lifetime,
            timeout: token.timeout,
        })
    }

    /// One call on a connection of its own.
    pub(super) async fn fetch(&self, app_key: &Secret, app_secret: &Secret) -> Result<Fetched, FetchError> {
        timeout(self.timeout, self.call(app_key, app_secret)).await.unwrap_or(Err(FetchError::Timeout))
    }

    async fn call(&self, app_key: &Secret, app_secret: &Secret) -> Result<Fetched, FetchError> {
        let request = self.request(app_key, app_secret)?;
        let stream = self.connector.connect().await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|_| FetchError::Http)?;
        let driver = tokio::spawn(connection);
        let result = async {
            let response = sender.send_request(request).await.map_err(|_| FetchError::Http)?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_REPLY).collect().await;
            let body = body.map_err(|_| FetchError::Http)?.to_bytes();
            check_status(&head)?;
            self.read(&body)
        }
        .await;
        driver.abort();
        result
    }

    fn request(&self, app_key: &Secret, app_secret: &Secret) -> Result<Request<Full<Bytes>>, FetchError> {
        let text = |secret: &Secret| {
            let text = std::str::from_utf8(secret.expose()).map_err(|_| FetchError::Invalid("not UTF-8"))?;
            serde_json::to_string(text).map(Zeroizing::new).map_err(|_| FetchError::Invalid("not text"))
        };
        let (key, secret) = (text(app_key)?, text(app_secret)?);
        // `Zeroed` overwrites the body when hyper has let go of it.
        let body = format!(r#"{{"app_key":{},"app_secret":{}}}"#, *key, *secret);
        let body = Bytes::from_owner(Zeroed(Zeroizing::new(body.into_bytes())));
        let mut request = Request::post(self.target.clone())
            .header(header::HOST, self.host.clone())
            .header(header::CONTENT_TYPE, "application/json; charset=UTF-8")
            .header(header::CONTENT_LENGTH, body.len())
            .header(header::ACCEPT, "*/*")
            .header(header::USER_AGENT, concat!("ccsqm-gateway/", env!("CARGO_PKG_VERSION")));
        if let Some(lifetime) = self.lifetime {
            request = request.header("x-token-expire", lifetime.as_secs());
        }
        request.body(Full::new(body)).map_err(|_| FetchError::Http)
    }

    fn read(&self, body: &[u8]) -> Result<Fetched, FetchError> {
        let reply: Reply = serde_json::from_slice(body)
            .map_err(|_| FetchError::Invalid("not the JSON that is documented"))?;
        let token = reply
            .token
            .filter(|token| !token.trim().is_empty())
            .ok_or(FetchError::Invalid("no AccessToken"))?;
        let token = token.trim();
        let value = Zeroizing::new(if token.starts_with("Bearer ") {
            token.to_owned()
        } else {
            format!("Bearer {token}")
        });
        let mut authorization =
            HeaderValue::from_str(&value).map_err(|_| FetchError::Invalid("not a header value"))?;
        authorization.set_sensitive(true);
        let fallback = self.lifetime.unwrap_or(DEFAULT_LIFETIME).min(DEFAULT_LIFETIME);
        let lifetime =
            reply.expires.as_ref().and_then(integer).filter(|seconds| (1..=86_400).contains(seconds));
        let lifetime = lifetime.map_or(fallback, |seconds| Duration::from_secs(seconds.unsigned_abs()));
        let skew = reply.created.as_ref().and_then(integer).map(|created| created - now());
        Ok(Fetched { authorization, lifetime, skew })
    }
}

struct Zeroed(Zeroizing<Vec<u8>>);

impl AsRef<[u8]> for Zeroed {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn check_status(head: &http::response::Parts) -> Result<(), FetchError> {
    match head.status.as_u16() {
        200 => Ok(()),
        400 | 401 | 403 | 418 => Err(FetchError::Refused(head.status)),
        _ => {
            let wait =
                head.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let wait = wait.map(|seconds: u64| Duration::from_secs(seconds.min(60)));
            Err(FetchError::Status(head.status, wait))
        }
    }
}

/// All of the endpoint's values are strings on the vendor's page, numbers elsewhere.
fn integer(value: &serde_json::Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_str()?.trim().parse().ok())
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}
