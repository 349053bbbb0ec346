//! User and password for a proxy that wants credentials (`Basic`, RFC 7617). Read again when their files change.
//!
//! Guarantees that neither can be printed, and that those which the proxy refuses are not sent by each connection: a directory
//! behind it locks an account after a few wrong tries. Does not ask whether the proxy takes them: a connection shows that.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use thiserror::Error;
use tokio::sync;
use tokio::sync::OwnedMutexGuard;
use zeroize::Zeroizing;

use super::ProxyError;
use crate::backoff::after_refusals;
use crate::base64::base64;
use crate::config::{LoginFiles, SecretSource};
use crate::secret::needles::Needles;
use crate::secret::{Secret, SecretError};
use crate::watched::{Watched, digest, follow};

/// Connections send user and password side by side for so long after the proxy last took them. After that one connection goes first:
/// they may have expired, and as many wrong tries as there are connections would go out at once.
const FRESH: Duration = Duration::from_secs(5);

/// Why user and password cannot be used. Names places, never a content.
#[derive(Debug, Error)]
pub enum LoginError {
    /// A file could not be read.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A user that cannot be sent.
    #[error("proxy_user_file {0}")]
    User(&'static str),
}

/// User and password, as they are at present. Cannot be printed, and neither can their digest: it would tell who guesses
/// whether a guess is right.
pub struct Login {
    files: LoginFiles,
    current: ArcSwap<Basic>,
    /// Of what was read first.
    digest: [u8; 32],
}

impl Login {
    /// Reads both files.
    pub fn load(files: LoginFiles) -> Result<Arc<Self>, LoginError> {
        let digest = contents(&files)?; // before they are read: what changes in between is noticed later
        let current = ArcSwap::from_pointee(Basic::load(&files)?);
        Ok(Arc::new(Self { files, current, digest }))
    }

    /// What is sent now.
    pub(super) fn current(&self) -> Arc<Basic> {
        self.current.load_full()
    }

    /// Looks for changed files for ever, and takes what can be used. `tell` hears of each change, and what came of it.
    pub async fn keep_up(self: Arc<Self>, tell: impl Fn(Result<(), String>)) {
        let files = self.files.clone();
        let paths = vec![files.user.clone(), files.password.clone()];
        let watched = Watched::new(paths, move || contents(&files), self.digest);
        let take = move |_| {
            self.current.store(Arc::new(Basic::load(&self.files)?));
            Ok(())
        };
        follow(watched, take, tell).await;
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login")
    }
}

/// User and password of these files, such that they can be sent.
fn read(files: &LoginFiles) -> Result<[Secret; 2], LoginError> {
    let load = |path: &Path| Secret::load(&SecretSource::File(path.to_owned()));
    let (user, password) = (load(&files.user)?, load(&files.password)?);
    check_user(user.expose()).map_err(LoginError::User)?;
    Ok([user, password])
}

fn contents(files: &LoginFiles) -> Result<[u8; 32], LoginError> {
    Ok(digest(read(files)?.each_ref().map(Secret::expose)))
}

/// A user has no colon, which ends it (RFC 7617, section 2). No secret has a control character.
pub(crate) fn check_user(user: &[u8]) -> Result<(), &'static str> {
    let is_whole = !user.contains(&b':');
    is_whole
        .then_some(())
        .ok_or("holds a colon, which no user's name can have: the password has a file of its own")
}

/// User and password as they are sent, and what the proxy says to them. Cannot be printed.
pub(super) struct Basic {
    encoded: Zeroizing<String>,
    needles: Needles,
    standing: Mutex<Standing>,
    /// Held by the only connection that may send them while it is not known whether the proxy takes them.
    turn: Arc<sync::Mutex<()>>,
}

/// Leave to send user and password once.
pub(super) struct Leave {
    pub(super) login: Arc<Basic>,
    /// No other connection sends them while this is held; `None`: others may.
    pub(super) turn: Option<OwnedMutexGuard<()>>,
}

/// What the proxy says to user and password.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// Nothing so far. `is_unanswered`: the last try had no answer.
    Unproven { is_unanswered: bool },
    /// It last took them at this time.
    Taken(Instant),
    /// It refuses them, as so often before in a row. They are sent once more after the pause.
    Refused { until: Instant, before: u32, why: Why },
}

/// Why user and password are held back.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Why {
    /// The proxy refuses them.
    Wrong,
    /// The proxy takes nothing by Basic.
    NotBasic,
    /// Two tries in a row had no answer.
    Unanswered,
}

impl Standing {
    /// After a refusal. One that was on its way when another came adds nothing.
    fn refused(self, now: Instant, why: Why) -> Self {
        let before = match self {
            Self::Refused { until, .. } if now < until => return self,
            Self::Refused { before, .. } => before.saturating_add(1),
            Self::Unproven { .. } | Self::Taken(_) => 0,
        };
        Self::Refused { until: now + after_refusals(before), before, why }
    }

    /// After a try that had no answer. The second one in a row counts as a refusal: a proxy may need long to refuse, or refuse by
    /// closing the connection. Where the proxy took them before, it is more likely that the host behind it does not answer.
    fn unanswered(self, now: Instant) -> Self {
        match self {
            Self::Taken(_) => self,
            Self::Unproven { is_unanswered: false } => Self::Unproven { is_unanswered: true },
            Self::Unproven { is_unanswered: true } | Self::Refused { .. } => {
                self.refused(now, Why::Unanswered)
            }
        }
    }

    /// Whether they may be sent side by side. Fails during the pause after a refusal.
    fn is_fresh(self, now: Instant) -> Result<bool, ProxyError> {
        match self {
            Self::Refused { until, why, .. } if now < until => Err(why.error()),
            Self::Taken(at) => Ok(now < at + FRESH),
            Self::Unproven { .. } | Self::Refused { .. } => Ok(false),
        }
    }
}

impl Why {
    fn error(self) -> ProxyError {
        match self {
            Self::Wrong => ProxyError::WrongLogin,
            Self::NotBasic => ProxyError::NotBasic,
            Self::Unanswered => ProxyError::Unanswered,
        }
    }
}

impl Basic {
    fn load(files: &LoginFiles) -> Result<Self, LoginError> {
        let [user, password] = read(files)?;
        Ok(Self::new(user.expose(), password.expose()))
    }

    pub(super) fn new(user: &[u8], password: &[u8]) -> Self {
        let encoded = Zeroizing::new(base64(&Zeroizing::new([user, b":", password].concat())));
        let needles = Needles::new([encoded.as_bytes(), password, b""]);
        let standing = Mutex::new(Standing::Unproven { is_unanswered: false });
        Self { encoded, needles, standing, turn: Arc::default() }
    }

    /// Fails during the pause that follows a refusal.
    pub(super) fn check(&self) -> Result<(), ProxyError> {
        self.is_fresh().map(drop)
    }

    /// Waits for leave to send them. While it is not known whether the proxy takes them, one connection has it, and the others wait
    /// for what comes of it.
    pub(super) async fn leave(self: Arc<Self>) -> Result<Leave, ProxyError> {
        let mut turn = None;
        if !self.is_fresh()? {
            let mine = self.turn.clone().lock_owned().await;
            let is_fresh = self.is_fresh()?; // by now
            turn = (!is_fresh).then_some(mine);
        }
        Ok(Leave { login: self, turn })
    }

    fn is_fresh(&self) -> Result<bool, ProxyError> {
        self.standing().is_fresh(Instant::now())
    }

    /// Whether the proxy took them, and has not refused them since.
    pub(super) fn is_proven(&self) -> bool {
        matches!(*self.standing(), Standing::Taken(_))
    }

    /// The proxy takes them.
    pub(super) fn taken(&self) {
        *self.standing() = Standing::Taken(Instant::now());
    }

    /// The proxy refuses them. `takes_basic`: it may take others.
    pub(super) fn refused(&self, takes_basic: bool) -> ProxyError {
        let why = if takes_basic { Why::Wrong } else { Why::NotBasic };
        let mut standing = self.standing();
        *standing = standing.refused(Instant::now(), why);
        why.error()
    }

    /// They were sent, and no answer came.
    pub(super) fn unanswered(&self) {
        let mut standing = self.standing();
        *standing = standing.unanswered(Instant::now());
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In base64, as they stand behind the name of the scheme.
    pub(super) fn encoded(&self) -> &[u8] {
        self.encoded.as_bytes()
    }

    /// Whether a text quotes the password.
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
    fn user_and_password_are_sent_as_the_rfc_shows() {
        // RFC 7617, sections 2 and 2.1.
        assert_eq!(Basic::new(b"Aladdin", b"open sesame").encoded(), b"QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(Basic::new(b"test", "123\u{a3}".as_bytes()).encoded(), b"dGVzdDoxMjPCow==");
    }

    #[test]
    fn a_user_with_a_colon_is_refused() {
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
            standing = standing.refused(now, Why::Wrong);
            let pause = Duration::from_secs(seconds);
            assert_eq!(standing, Standing::Refused { until: now + pause, before, why: Why::Wrong });
            assert_eq!(standing.refused(now + pause / 2, Why::Wrong), standing, "it was on its way");
            now += pause;
        }
        let taken = Standing::Taken(now);
        let Standing::Refused { before, .. } = taken.refused(now, Why::Wrong) else { panic!() };
        assert_eq!(before, 0, "what was taken begins anew");
    }

    #[test]
    fn two_tries_without_an_answer_are_a_refusal_unless_the_proxy_took_them_before() {
        let now = Instant::now();
        let once = UNPROVEN.unanswered(now);
        assert!(once.is_fresh(now).is_ok(), "{once:?}");
        let twice = once.unanswered(now);
        let until = now + Duration::from_secs(30);
        assert_eq!(twice, Standing::Refused { until, before: 0, why: Why::Unanswered });
        assert_eq!(twice.unanswered(now), twice, "it was on its way");
        let Standing::Refused { before, .. } = twice.unanswered(until) else { panic!() };
        assert_eq!(before, 1);
        let taken = Standing::Taken(now);
        assert_eq!(taken.unanswered(now).unanswered(now), taken);
    }

    #[test]
    fn what_the_proxy_took_is_sent_side_by_side_for_five_seconds() {
        let (now, moment) = (Instant::now(), Duration::from_millis(1));
        let is_fresh = |after| Standing::Taken(now).is_fresh(now + after).unwrap();
        assert_eq!([FRESH - moment, FRESH].map(is_fresh), [true, false]);
        assert!(!UNPROVEN.is_fresh(now).unwrap());
    }

    #[test]
    fn neither_they_nor_their_digest_show_in_debug() {
        assert_eq!(format!("{:?}", Basic::new(b"user", b"s3cret")), "Basic");
        let folder = tempfile::TempDir::new().unwrap();
        let [user, password] = ["user", "s3cret"].map(|name| folder.path().join(name));
        [&user, &password].iter().for_each(|path| std::fs::write(path, "s3cret").unwrap());
        let login = Login::load(LoginFiles { user, password }).unwrap();
        assert_eq!(format!("{login:?}"), "Login");
        let egress = Egress { login: Some(login), ..Egress::plain() };
        assert!(format!("{egress:?}").contains("login: Some(Login)"), "{egress:?}");
    }
}
