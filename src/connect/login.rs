//! User and password for a proxy (`Basic`, RFC 7617), guarded against account lock-out. They are read again when their files
//! change.
//!
//! A directory behind the proxy may lock an account after a few wrong tries. Until the proxy has accepted a password,
//! therefore, one connection at a time sends it, and a refused password is held back: exponential back-off from 30 s to 5 min.
//!
//! Neither user nor password can be printed. No request is made only to test them: the next connection shows whether they are
//! right.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use thiserror::Error;
use tokio::sync;
use tokio::sync::OwnedMutexGuard;
use zeroize::Zeroizing;

use super::TunnelError;
use crate::backoff::after_refusals;
use crate::base64::base64;
use crate::config::{LoginFiles, SecretSource};
use crate::file_watch::{FileWatch, digest, follow};
use crate::secret::needles::Needles;
use crate::secret::{Secret, UnusableSecret};

/// For this long after the proxy last accepted the password, connections send it at the same time. After that one connection goes
/// first: the password may have expired, and each of many connections would make a wrong try.
const FRESH: Duration = Duration::from_secs(5);

/// Why user and password cannot be used. The text names the file, never its content.
#[derive(Debug, Error)]
pub enum BadLogin {
    /// A file could not be read, or its content cannot be a secret.
    #[error(transparent)]
    Secret(#[from] UnusableSecret),
    /// The user's name cannot be sent.
    #[error("proxy_user_file {0}")]
    User(&'static str),
}

/// The user and password of two watched files. `Debug` shows neither them nor their digest, with which guesses could be tested.
pub struct Login {
    files: LoginFiles,
    current: ArcSwap<Basic>,
    /// The digest of both at the start.
    digest: [u8; 32],
}

impl Login {
    /// Reads both files. Fails if their content cannot be sent; whether the proxy accepts it is not checked.
    pub fn load(files: LoginFiles) -> Result<Arc<Self>, BadLogin> {
        // Taken before the files are read: a change in between then differs from the digest and is noticed later.
        let digest = contents(&files)?;
        let current = ArcSwap::from_pointee(Basic::load(&files)?);
        Ok(Arc::new(Self { files, current, digest }))
    }

    /// The present user and password.
    pub(super) fn current(&self) -> Arc<Basic> {
        self.current.load_full()
    }

    /// Follows the files for ever and takes a changed user or password if they can be sent. `report` gets the result of each
    /// change.
    pub async fn watch(self: Arc<Self>, report: impl Fn(Result<(), String>)) {
        let files = self.files.clone();
        let paths = vec![files.user.clone(), files.password.clone()];
        let watch = FileWatch::new(paths, move || contents(&files), self.digest);
        let take = move |_| {
            // A new value also forgets a refusal: nobody has refused the changed password.
            self.current.store(Arc::new(Basic::load(&self.files)?));
            Ok(())
        };
        follow(watch, take, report).await;
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login")
    }
}

/// Returns the user and password in these files, checked for what a request can carry.
fn read(files: &LoginFiles) -> Result<[Secret; 2], BadLogin> {
    let load = |path: &Path| Secret::load(&SecretSource::File(path.to_owned()));
    let (user, password) = (load(&files.user)?, load(&files.password)?);
    check_user(user.expose()).map_err(BadLogin::User)?;
    Ok([user, password])
}

fn contents(files: &LoginFiles) -> Result<[u8; 32], BadLogin> {
    Ok(digest(read(files)?.each_ref().map(Secret::expose)))
}

/// Fails for a user's name with a colon, which ends the name (RFC 7617, section 2).
// Control characters, which that section forbids as well, do not get here: no `Secret` has one.
pub(crate) fn check_user(user: &[u8]) -> Result<(), &'static str> {
    let is_whole = !user.contains(&b':');
    is_whole.then_some(()).ok_or(
        "contains a colon, which a user name cannot have: put the password into the file of proxy_password_file",
    )
}

/// A user and password in the form in which they are sent, with what the proxy has said about them. `Debug` shows nothing.
pub(super) struct Basic {
    encoded: Zeroizing<String>,
    needles: Needles,
    standing: Mutex<Standing>,
    /// Held by the one connection that may send them while it is unknown whether the proxy accepts them.
    turn: Arc<sync::Mutex<()>>,
}

/// The permit to send user and password once.
pub(super) struct Leave {
    pub(super) login: Arc<Basic>,
    /// While this is held, no other connection sends them; `None`: others may.
    pub(super) turn: Option<OwnedMutexGuard<()>>,
}

/// What the proxy has said about user and password.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// Nothing yet. `is_unanswered`: the last try got no answer.
    Unproven { is_unanswered: bool },
    /// It last accepted them at this time.
    Taken(Instant),
    /// It refused them, and `before` times in a row before that. They are sent again after `until`.
    Refused { until: Instant, before: u32, why: HoldReason },
}

/// Why user and password are held back.
// Kept, so that connections that fail during the pause report the same cause and text as the one that was refused.
#[derive(Clone, Copy, Debug, PartialEq)]
enum HoldReason {
    /// The proxy refused them.
    Wrong,
    /// The proxy does not offer `Basic`.
    NotBasic,
    /// Two tries in a row got no answer.
    Unanswered,
}

impl Standing {
    /// Returns the standing after a refusal. One that arrives during the pause was on its way when the pause began and changes
    /// nothing.
    fn refused(self, now: Instant, why: HoldReason) -> Self {
        let before = match self {
            Self::Refused { until, .. } if now < until => return self,
            Self::Refused { before, .. } => before.saturating_add(1),
            Self::Unproven { .. } | Self::Taken(_) => 0,
        };
        Self::Refused { until: now + after_refusals(before), before, why }
    }

    /// Returns the standing after a try without an answer. The second in a row counts as a refusal, since a proxy may refuse
    /// late or by closing the connection. It does not if the proxy accepted them before: more likely the host behind it does
    /// not answer.
    fn unanswered(self, now: Instant) -> Self {
        match self {
            Self::Taken(_) => self,
            Self::Unproven { is_unanswered: false } => Self::Unproven { is_unanswered: true },
            Self::Unproven { is_unanswered: true } | Self::Refused { .. } => {
                self.refused(now, HoldReason::Unanswered)
            }
        }
    }

    /// Whether any number of connections may send them at the same time. Fails during the pause after a refusal.
    fn is_fresh(self, now: Instant) -> Result<bool, TunnelError> {
        match self {
            Self::Refused { until, why, .. } if now < until => Err(why.error()),
            Self::Taken(at) => Ok(now < at + FRESH),
            Self::Unproven { .. } | Self::Refused { .. } => Ok(false),
        }
    }
}

impl HoldReason {
    fn error(self) -> TunnelError {
        match self {
            Self::Wrong => TunnelError::WrongLogin,
            Self::NotBasic => TunnelError::NotBasic,
            Self::Unanswered => TunnelError::Unanswered,
        }
    }
}

impl Basic {
    /// Reads both files. They count as unproven.
    fn load(files: &LoginFiles) -> Result<Self, BadLogin> {
        let [user, password] = read(files)?;
        Ok(Self::new(user.expose(), password.expose()))
    }

    /// Encodes a user and a password that may be sent. They count as unproven.
    pub(super) fn new(user: &[u8], password: &[u8]) -> Self {
        let encoded = Zeroizing::new(base64(&Zeroizing::new([user, b":", password].concat())));
        // The encoded form as well: whoever quotes the whole header quotes the password.
        let needles = Needles::new([encoded.as_bytes(), password, b""]);
        let standing = Mutex::new(Standing::Unproven { is_unanswered: false });
        Self { encoded, needles, standing, turn: Arc::default() }
    }

    /// Fails during the pause after a refusal, with the error of that refusal.
    pub(super) fn check(&self) -> Result<(), TunnelError> {
        self.is_fresh().map(drop)
    }

    /// Waits for the permit to send them. While it is unknown whether the proxy accepts them, one connection has the permit,
    /// and the others wait for its result. Fails as [`Self::check`] does. Cancellation safe.
    pub(super) async fn leave(self: Arc<Self>) -> Result<Leave, TunnelError> {
        let mut turn = None;
        if !self.is_fresh()? {
            let mine = self.turn.clone().lock_owned().await;
            // Asked again: during the wait another connection has had its answer. If that was a refusal, this one must not try.
            let is_fresh = self.is_fresh()?;
            turn = (!is_fresh).then_some(mine);
        }
        Ok(Leave { login: self, turn })
    }

    fn is_fresh(&self) -> Result<bool, TunnelError> {
        self.standing().is_fresh(Instant::now())
    }

    /// Whether the proxy has accepted them, at any time, and has not refused them since.
    pub(super) fn is_proven(&self) -> bool {
        matches!(*self.standing(), Standing::Taken(_))
    }

    /// Records that the proxy accepts them.
    pub(super) fn taken(&self) {
        *self.standing() = Standing::Taken(Instant::now());
    }

    /// Records that the proxy refuses them, and returns the error. `takes_basic`: it may accept others.
    pub(super) fn refused(&self, takes_basic: bool) -> TunnelError {
        let why = if takes_basic { HoldReason::Wrong } else { HoldReason::NotBasic };
        let mut standing = self.standing();
        *standing = standing.refused(Instant::now(), why);
        why.error()
    }

    /// Records that they were sent and no answer came.
    pub(super) fn unanswered(&self) {
        let mut standing = self.standing();
        *standing = standing.unanswered(Instant::now());
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The credentials of the header, behind the scheme: user, colon and password in base64.
    pub(super) fn encoded(&self) -> &[u8] {
        self.encoded.as_bytes()
    }

    /// Whether a text quotes the password, plain or encoded.
    pub(super) fn is_in(&self, text: &str) -> bool {
        self.needles.are_in(text.as_bytes())
    }
}

impl fmt::Debug for Basic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Basic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::Egress;

    #[test]
    fn basic_credentials_match_the_examples_of_rfc_7617() {
        // RFC 7617, sections 2 and 2.1.
        assert_eq!(Basic::new(b"Aladdin", b"open sesame").encoded(), b"QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(Basic::new(b"test", "123\u{a3}".as_bytes()).encoded(), b"dGVzdDoxMjPCow==");
    }

    #[test]
    fn user_name_with_a_colon_is_rejected() {
        // Blanks, a backslash and letters beyond ASCII are usual in the names of a Windows domain.
        assert!(check_user("DOMAIN\\user name \u{a3}".as_bytes()).is_ok(), "the control");
        for bad in [":", "user:", ":password", "user:password"] {
            assert!(check_user(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    const UNPROVEN: Standing = Standing::Unproven { is_unanswered: false };

    #[test]
    fn a_refusal_is_remembered_from_thirty_seconds_to_five_minutes() {
        let (mut now, mut standing) = (Instant::now(), UNPROVEN);
        for (before, seconds) in (0..).zip([30, 60, 120, 240, 300, 300]) {
            standing = standing.refused(now, HoldReason::Wrong);
            let pause = Duration::from_secs(seconds);
            assert_eq!(standing, Standing::Refused { until: now + pause, before, why: HoldReason::Wrong });
            assert_eq!(standing.refused(now + pause / 2, HoldReason::Wrong), standing, "it was on its way");
            now += pause;
        }
        let taken = Standing::Taken(now);
        let Standing::Refused { before, .. } = taken.refused(now, HoldReason::Wrong) else { panic!() };
        // A refusal before the acceptance must not prolong the pause of one that comes after it.
        assert_eq!(before, 0, "what was taken begins anew");
    }

    #[test]
    fn two_unanswered_attempts_count_as_refusal_of_unproven_credentials() {
        let now = Instant::now();
        let once = UNPROVEN.unanswered(now);
        assert!(once.is_fresh(now).is_ok(), "{once:?}");
        let twice = once.unanswered(now);
        let until = now + Duration::from_secs(30);
        assert_eq!(twice, Standing::Refused { until, before: 0, why: HoldReason::Unanswered });
        assert_eq!(twice.unanswered(now), twice, "it was on its way");
        let Standing::Refused { before, .. } = twice.unanswered(until) else { panic!() };
        assert_eq!(before, 1);
        let taken = Standing::Taken(now);
        assert_eq!(taken.unanswered(now).unanswered(now), taken);
    }

    #[test]
    fn accepted_credentials_are_sent_in_parallel_for_five_seconds() {
        let (now, moment) = (Instant::now(), Duration::from_millis(1));
        let is_fresh = |after| Standing::Taken(now).is_fresh(now + after).unwrap();
        assert_eq!([FRESH - moment, FRESH].map(is_fresh), [true, false]);
        assert!(!UNPROVEN.is_fresh(now).unwrap());
    }

    #[test]
    fn debug_output_hides_credentials_and_their_digest() {
        assert_eq!(format!("{:?}", Basic::new(b"user", b"s3cret")), "Basic");
        // By way of `Egress` as well, whose `Debug` is derived.
        let folder = tempfile::TempDir::new().unwrap();
        let [user, password] = ["user", "s3cret"].map(|name| folder.path().join(name));
        [&user, &password].iter().for_each(|path| std::fs::write(path, "s3cret").unwrap());
        let login = Login::load(LoginFiles { user, password }).unwrap();
        assert_eq!(format!("{login:?}"), "Login");
        let egress = Egress { login: Some(login), ..Egress::plain() };
        assert!(format!("{egress:?}").contains("login: Some(Login)"), "{egress:?}");
    }
}
