//! User and password for a proxy that wants credentials (`Basic`, RFC 7617). Read again when their files change.
//!
//! Guarantees that neither can be printed, and that those which the proxy refuses are not sent by each connection: a directory
//! behind it locks an account after a few wrong tries. Does not ask whether the proxy takes them: a connection shows that.

use std::{
    fmt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use thiserror::Error;
use tokio::sync;
use zeroize::Zeroizing;

use super::ProxyError;
use crate::{
    base64::base64,
    config::{LoginFiles, SecretSource},
    secret::{Secret, SecretError, needles::Needles},
    watched::{Watched, digest, follow},
};

/// What the proxy refuses is not sent for so long. Each further refusal doubles it, as far as [`LONGEST`].
const PAUSE: Duration = Duration::from_secs(30);
const LONGEST: Duration = Duration::from_secs(300);

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
    /// Who has it may send them while they are unproven.
    turn: sync::Mutex<()>,
}

/// What the proxy says to user and password.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// Nothing so far.
    Unproven,
    /// They opened the last tunnel.
    Taken,
    /// It refuses them. They are sent once more behind the pause.
    Refused { until: Instant, pause: Duration, takes_basic: bool },
}

impl Standing {
    /// Behind a refusal. One that was on its way when another came adds nothing.
    fn refused(self, now: Instant, takes_basic: bool) -> Self {
        let pause = match self {
            Self::Refused { until, .. } if now < until => return self,
            Self::Refused { pause, .. } => LONGEST.min(pause * 2),
            Self::Unproven | Self::Taken => PAUSE,
        };
        Self::Refused { until: now + pause, pause, takes_basic }
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
        Self { encoded, needles, standing: Mutex::new(Standing::Unproven), turn: sync::Mutex::default() }
    }

    /// Fails during the pause that follows a refusal.
    pub(super) fn check(&self) -> Result<(), ProxyError> {
        self.is_taken().map(drop)
    }

    /// Waits for leave to send them. While they are unproven one connection has it, and the others wait for what comes of it.
    pub(super) async fn leave(&self) -> Result<Option<sync::MutexGuard<'_, ()>>, ProxyError> {
        if self.is_taken()? {
            return Ok(None);
        }
        let turn = self.turn.lock().await;
        let is_taken = self.is_taken()?; // by now
        Ok(Some(turn).filter(|_| !is_taken))
    }

    fn is_taken(&self) -> Result<bool, ProxyError> {
        match *self.standing() {
            Standing::Refused { until, takes_basic, .. } if Instant::now() < until => {
                Err(refusal(takes_basic))
            }
            Standing::Taken => Ok(true),
            Standing::Unproven | Standing::Refused { .. } => Ok(false),
        }
    }

    /// They opened a tunnel.
    pub(super) fn taken(&self) {
        *self.standing() = Standing::Taken;
    }

    /// The proxy refuses them. `takes_basic`: it may take others.
    pub(super) fn refused(&self, takes_basic: bool) -> ProxyError {
        let mut standing = self.standing();
        *standing = standing.refused(Instant::now(), takes_basic);
        refusal(takes_basic)
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

fn refusal(takes_basic: bool) -> ProxyError {
    if takes_basic { ProxyError::WrongLogin } else { ProxyError::NotBasic }
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

    #[test]
    fn a_refusal_is_remembered_from_thirty_seconds_to_five_minutes() {
        let (mut now, mut standing) = (Instant::now(), Standing::Unproven);
        for seconds in [30, 60, 120, 240, 300, 300] {
            standing = standing.refused(now, true);
            let pause = Duration::from_secs(seconds);
            assert_eq!(standing, Standing::Refused { until: now + pause, pause, takes_basic: true });
            assert_eq!(standing.refused(now + pause / 2, true), standing, "it was on its way");
            now += pause;
        }
        let Standing::Refused { pause, .. } = Standing::Taken.refused(now, true) else { panic!() };
        assert_eq!(pause, PAUSE, "what was taken begins anew");
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
