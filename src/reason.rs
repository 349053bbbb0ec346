//! Failures as operators are told of them: a cause with its full text, counted, logged and remembered.
//!
//! The word of the cause is for everybody. The full text is for operators only: it may name addresses, and the other side has a say
//! in it, such as by the names in its certificate.

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

/// So much of a text is shown, in bytes.
const MAX_TEXT: usize = 256;

impl Cause {
    /// The cause of an error of a socket, or of TLS on it.
    pub fn of_io(error: &io::Error) -> Self {
        use io::ErrorKind as Kind;
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

    /// The cause of an exchange's failure. What broke it lies in the errors below hyper's.
    // tests/hyper.rs: an_http1_reply_that_is_cut_short_or_badly_framed_is_an_error_that_tells_it
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
            None if error.is_remote() && error.is_go_away() => Self::NotProcessed,
            None if error.reason() == Some(h2::Reason::REFUSED_STREAM) => Self::NotProcessed,
            None if error.is_remote() => Self::Reset,
            None => Self::ReplyUnreadable,
        }
    }

    /// Of an error while an answer is read: hyper tells bad framing by it, too.
    fn of_reply(error: &io::Error) -> Self {
        let is_of_tls = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::ReplyCut,
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput if !is_of_tls => Self::ReplyUnreadable,
            _ => Self::of_io(error),
        }
    }
}

/// Whether an alert is about the gateway's own certificate, or a signature made for it (RFC 8446, section 6.2).
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
    /// The word.
    pub cause: Cause,
    /// What the error says, as it came: see [`shown`].
    pub text: Arc<str>,
}

impl Reason {
    /// A reason of its own words.
    pub fn new(cause: Cause, text: impl fmt::Display) -> Self {
        Self { cause, text: text.to_string().into() }
    }

    /// Why an exchange failed.
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

/// What may be wrong with a reply, where the libraries tell no more than that something is. They keep apart neither the bounds
/// that a head has, nor what a reply over HTTP/2 breaks.
// tests/hyper.rs: a_reply_over_any_bound_is_the_same_error
// tests/hyper.rs: a_large_head_and_a_wrong_length_are_the_same_error_over_http2
fn more_of(error: &hyper::Error) -> Option<&'static str> {
    const {
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

/// The label of what is counted by cause.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CauseLabel {
    cause: Cause,
}

/// Failures of one kind, told to operators: counted, logged, and the last one for `/status`.
#[derive(Debug)]
pub struct Failures {
    count: Family<CauseLabel, Counter>,
    /// Each cause has a line a second.
    lines: [OncePerSecond; Cause::COUNT],
    /// The last one is not over.
    is_failing: AtomicBool,
    last: LastTrouble,
}

impl Failures {
    /// None so far.
    pub fn new(count: Family<CauseLabel, Counter>) -> Self {
        let lines = [const { OncePerSecond::new() }; Cause::COUNT];
        Self { count, lines, is_failing: AtomicBool::new(false), last: LastTrouble::default() }
    }

    /// Something failed. `needles` are what must not be quoted. Returns the text, and how often it happened since it was
    /// logged last, if it is to be logged now.
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

    /// It works.
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

    /// The last one.
    pub fn last(&self) -> Option<Trouble> {
        self.last.get()
    }
}

/// What an error says, for operators: in one line, and without what quotes the credential. The other side has a say in some
/// texts, such as by the names in its certificate: they may be long, odd, or quote.
pub fn shown<'a>(reason: &Reason, needles: impl IntoIterator<Item = &'a Needles>) -> String {
    let text = &*reason.text;
    if needles.into_iter().any(|needles| needles.are_in(text.as_bytes())) {
        return format!("{}: what it says quotes the credential", reason.cause);
    }
    let cut = text.char_indices().map(|(place, _)| place).find(|place| *place >= MAX_TEXT);
    let mut plain = plain::line(&text[..cut.unwrap_or(text.len())]);
    plain.push_str(cut.map_or("", |_| " (cut)"));
    plain
}
