//! Failures of the network as operators see them: a cause with its full text, counted, logged, and kept for
//! `/status`.
//!
//! The cause is one word of a fixed list and is for everybody, callers included. The full text is for operators
//! only: it may contain addresses, and the other side influences it, for example by the names in its
//! certificate. It is searched for credentials, escaped and cut before it is shown: see [`shown`].

use std::error::Error as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fmt, io};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use rustls::{AlertDescription, CertificateError};

use crate::log::OncePerSecond;
use crate::model::cause::Cause;
use crate::model::reply::{MAX_FIELDS, MAX_HEAD};
use crate::plain;
use crate::secret::needles::Needles;
use crate::trouble::{LastTrouble, Trouble};

/// How many bytes of a text are shown.
const MAX_TEXT: usize = 256;

impl Cause {
    /// The cause of an error of a socket, or of TLS on it.
    pub fn of_io(error: &io::Error) -> Self {
        use io::ErrorKind as Kind;
        // rustls errors come wrapped in an `io::Error` of the kind `InvalidData`, so the kind says less than
        // what is inside.
        if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
            return Self::of_tls(tls);
        }
        match error.kind() {
            Kind::ConnectionRefused => Self::Refused,
            Kind::TimedOut => Self::Timeout,
            Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::BrokenPipe
            | Kind::NotConnected
            | Kind::UnexpectedEof => Self::Reset,
            Kind::HostUnreachable | Kind::NetworkUnreachable | Kind::NetworkDown => Self::Unreachable,
            // What is left has its cause on this machine: no file, port or memory is left, or a rule forbids
            // the connection.
            _ => Self::Local,
        }
    }

    fn of_tls(error: &rustls::Error) -> Self {
        use CertificateError as Certificate;
        match error {
            rustls::Error::InvalidCertificate(why) => match why {
                Certificate::Expired
                | Certificate::ExpiredContext { .. }
                | Certificate::NotValidYet
                | Certificate::NotValidYetContext { .. } => Self::TlsExpired,
                Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => Self::TlsName,
                _ => Self::TlsUntrusted,
            },
            rustls::Error::NoCertificatesPresented => Self::TlsUntrusted,
            rustls::Error::AlertReceived(alert) if is_of_certificate(*alert) => Self::TlsIdentity,
            _ => Self::TlsProtocol,
        }
    }

    /// The cause of an exchange that hyper ended with an error.
    // The cause is in the errors below hyper's own, which tells kinds apart only by methods.
    // tests/hyper.rs: truncated_and_misframed_http1_replies_have_distinct_errors
    pub fn of_exchange(error: &hyper::Error) -> Self {
        let mut below = error.source();
        while let Some(source) = below {
            if let Some(error) = source.downcast_ref::<h2::Error>() {
                return Self::of_http2(error);
            }
            if let Some(error) = source.downcast_ref::<io::Error>() {
                return Self::of_reply(error);
            }
            below = source.source();
        }
        match error {
            _ if error.is_parse() => Self::ReplyUnreadable,
            _ if error.is_incomplete_message() => Self::ReplyCut,
            _ => Self::Reset,
        }
    }

    fn of_http2(error: &h2::Error) -> Self {
        match error.get_io() {
            Some(error) => Self::of_reply(error),
            // Of GOAWAY and REFUSED_STREAM the peer says that the request was not processed (RFC 9113, sections
            // 6.8 and 8.7). Other resets say nothing about it.
            None if error.is_remote() && error.is_go_away() => Self::NotProcessed,
            None if error.reason() == Some(h2::Reason::REFUSED_STREAM) => Self::NotProcessed,
            None if error.is_remote() => Self::Reset,
            None => Self::ReplyUnreadable,
        }
    }

    /// The cause of an error while an answer is read.
    // hyper reports bad framing as an `io::Error` of the kind `InvalidData`, too. Only an error of TLS is
    // excepted.
    fn of_reply(error: &io::Error) -> Self {
        let is_of_tls = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::ReplyCut,
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput if !is_of_tls => Self::ReplyUnreadable,
            _ => Self::of_io(error),
        }
    }
}

/// Whether an alert is about the gateway's own certificate, or about a signature made for it (RFC 8446, section
/// 6.2).
fn is_of_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::NoCertificate
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError
            | AlertDescription::CertificateRequired
    )
}

/// A cause with its full text.
#[derive(Clone, Debug)]
pub struct Reason {
    /// The word for everybody.
    pub cause: Cause,
    /// The text of the error, for operators. It may be long and contain anything: show it through [`shown`]
    /// only.
    pub text: Arc<str>,
}

impl Reason {
    /// A reason with a text of the gateway's own.
    pub fn new(cause: Cause, text: impl fmt::Display) -> Self {
        Self { cause, text: text.to_string().into() }
    }

    /// The reason why an exchange failed, with the texts of all errors below hyper's.
    pub fn of_exchange(error: &hyper::Error) -> Self {
        let mut text = error.to_string();
        let mut below = error.source();
        while let Some(source) = below {
            text = format!("{text}: {source}");
            below = source.source();
        }
        text.push_str(more_of(error).unwrap_or_default());
        Self::new(Cause::of_exchange(error), text)
    }
}

/// A hint at what may be wrong with a reply, where the libraries report only that something is. They do not
/// tell the bounds on a head apart, nor the rules that a reply over HTTP/2 breaks.
// tests/hyper.rs: reply_over_any_limit_causes_the_same_error
// tests/hyper.rs: large_head_and_wrong_length_cause_the_same_http2_error
fn more_of(error: &hyper::Error) -> Option<&'static str> {
    const {
        // A changed bound must change the texts below.
        assert!(MAX_HEAD == 64 * 1024 && MAX_FIELDS == 256, "they stand in these texts");
    }
    if error.is_parse_too_large() {
        return Some(
            ": it has more than 64 KiB or 256 fields, or states a Content-Length that no body can have",
        );
    }
    let http2 = error.source()?.downcast_ref::<h2::Error>()?;
    http2.is_library().then_some(
        ": the reply breaks RFC 9113 (as by a Content-Length that is not its body's), or its head is larger than 64 KiB",
    )
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The label of metrics that count by cause.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CauseLabel {
    cause: Cause,
}

/// Failures of one kind: counted by cause, logged at most once a second for each cause, and the last one kept
/// for `/status`.
#[derive(Debug)]
pub struct Failures {
    count: Family<CauseLabel, Counter>,
    // One limiter for each cause: a flood of one must not hide the first line of another.
    lines: [OncePerSecond; Cause::COUNT],
    /// Whether the last failure has not ended.
    // Success is reported for every exchange. This flag keeps it from taking the lock of `last`.
    is_failing: AtomicBool,
    last: LastTrouble,
}

impl Failures {
    /// Failures that count into `count`.
    pub fn new(count: Family<CauseLabel, Counter>) -> Self {
        let lines = [const { OncePerSecond::new() }; Cause::COUNT];
        Self { count, lines, is_failing: AtomicBool::new(false), last: LastTrouble::default() }
    }

    /// Notes a failure. `needles` are the secrets that the text must not contain. Returns the text to log and
    /// how often the failure happened since the last line, this time included; `None` if it is not to be logged
    /// now.
    #[cold]
    pub fn failed<'a>(
        &self,
        reason: &Reason,
        needles: impl IntoIterator<Item = &'a Needles>,
    ) -> Option<(String, u64)> {
        let (cause, text) = (reason.cause, shown(reason, needles));
        self.count.get_or_create(&CauseLabel { cause }).inc();
        self.last.begins(Some(cause), text.clone());
        self.is_failing.store(true, Ordering::Relaxed);
        self.lines[cause as usize].times().map(|times| (text, times))
    }

    /// Notes a success, which ends the last failure. Cheap if there is none.
    pub fn succeeded(&self) {
        if self.is_failing.load(Ordering::Relaxed) {
            self.end();
        }
    }

    #[cold]
    fn end(&self) {
        self.is_failing.store(false, Ordering::Relaxed);
        self.last.ends();
    }

    /// Returns the last failure, if there was any.
    pub fn last(&self) -> Option<Trouble> {
        self.last.get()
    }
}

/// Returns the text of a reason for operators: one line, cut after 256 bytes and then escaped. If it contains
/// one of the secrets, it is replaced as a whole.
// The search comes before the cut: a secret that the cut divides would not be found, and its first part be
// shown.
pub fn shown<'a>(reason: &Reason, needles: impl IntoIterator<Item = &'a Needles>) -> String {
    let text = &*reason.text;
    if needles.into_iter().any(|needles| needles.are_in(text.as_bytes())) {
        return format!("{}: the text is withheld, since it quotes the credential", reason.cause);
    }
    let cut = text.char_indices().map(|(at, _)| at).find(|at| *at >= MAX_TEXT);
    let mut plain = plain::line(&text[..cut.unwrap_or(text.len())]);
    plain.push_str(cut.map_or("", |_| " (cut)"));
    plain
}
