//! Stage 5: deduplication. The same call twice is one task.
//!
//! With an `Idempotency-Key` a caller may repeat a call as often as it likes: [`claims`] remembers each key for the
//! window, so that the task is sent once and its answer is given again. [`duplicates`] looks for equal calls, with and
//! without keys, that may still be at work, in doubt, or done without their callers having learnt of it. Decides from
//! key and body alone, before a token is spent. Guarantees that a claim within the window is never forgotten: a full
//! table refuses new keys, and a start reads the audit trail before it takes any ([`rebuild`]). What a caller was
//! told of a key is in the trail first: the exchange sees to it. Two exceptions: 503 `audit_unavailable` tells of an intent
//! that may still reach a stuck disk, and the head of a reply of more than 64 KiB leaves before its end is known.

mod claim;
mod claims;
mod delivery;
mod duplicates;
pub(crate) mod key;
mod lost;
pub mod memory;
mod past;
mod rebuild;
mod recent;
mod refusal;
mod slots;

use std::fmt;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;
use http::HeaderValue;
use moka::policy::EvictionPolicy;
use moka::sync::Cache;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::audit::loss::Loss;
use crate::audit::{Audit, StoredReply};
use crate::config::WithoutKey;
use crate::keyed_hash::{Hash, Keys, Mark};
use crate::model::outcome::Outcome;
use crate::model::request_id::{FirstCall, RequestId};
use crate::request_head::Inbound;
use crate::{clock, config};
pub use claim::Claim;
use claim::Step;
pub use claims::Ending;
use claims::{Claims, How, Verdict, Wanted};
pub use delivery::{Delivery, DeliverySlot};
use duplicates::{Duplicate, DuplicateDetector, First, Forced, Rejection};
pub use key::BadKey;
use key::Given;
use past::Meanwhile;
use refusal::{Passed, passed, rejected};
pub use refusal::{Refusal, Refused};

/// What a stored reply takes beside its body, in bytes: measured, most of it the cache's.
const REPLY_OVERHEAD: usize = 450;

/// What is remembered of calls, shared by all workers.
pub struct Idempotency {
    without_key: WithoutKey,
    max_keys: usize,
    audit: Audit,
    marks: Arc<Keys>,
    hasher: RandomState,
    claims: Mutex<Claims>,
    duplicates: Mutex<DuplicateDetector>,
    /// What may be forgotten: then a replay names the result code only.
    replies: Cache<Uuid, Arc<StoredReply>, RandomState>,
    is_rebuilt: AtomicBool,
    /// A part of the trail within the window is lost, so that keys which are not found are refused; until when, in seconds since
    /// 1970.
    loss: Mutex<Option<(Loss, u32)>>,
    /// The word of a loss that the operator accepts.
    accept_loss: Option<String>,
    /// What came while the trail is still read: it is newer than all that is read there. `None` after that.
    meanwhile: Mutex<Option<Meanwhile>>,
    /// Bytes of the trail that were read, and that are to be read.
    read: [AtomicU64; 2],
}

/// One call, checked.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Who calls.
    pub caller: &'a str,
    /// There is no other caller, so that this one may hold all that can be remembered.
    pub is_alone: bool,
    /// The most keys that this caller may hold, where it is configured.
    pub max_keys: Option<usize>,
    /// Which route.
    pub route: &'a str,
    /// Who acts.
    pub operator: &'a HeaderValue,
    /// The keyed digest of the body.
    pub digest: &'a Hash,
    /// The request's id, without the text.
    pub id: Uuid,
}

/// What a call is.
#[derive(Debug)]
pub enum Begun {
    /// A new one; to be sent.
    Claim(Claim),
    /// The repetition of one that is over.
    Replay(Replay),
}

/// What would become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Would {
    /// It would be sent; an equal one was before, perhaps.
    BeSent(Option<FirstCall>),
    /// It would get the answer of the first one.
    BeReplayed(FirstCall),
}

/// A stored answer, or what is left of it.
#[derive(Debug)]
pub struct Replay {
    /// The call that was answered first.
    pub first: FirstCall,
    /// What the answer was, whatever else was forgotten.
    pub ending: Ending,
    /// The answer, unless it was not kept.
    pub stored: Option<Arc<StoredReply>>,
    /// To be settled once the answer is delivered, if it tells of a success.
    pub delivery: Delivery,
}

impl Idempotency {
    /// Remembers only what the start found in doubt; calls with a key, and under `block` all calls, are refused until
    /// [`Idempotency::rebuild`] is over.
    /// `accept_loss` is the word of a loss of the trail that the operator accepts.
    pub fn new(settings: &config::Idempotency, audit: &Audit, accept_loss: Option<String>) -> Self {
        let (window, success_window) = (seconds(settings.window), seconds(settings.fingerprint_window));
        let table = Self {
            without_key: settings.without_key,
            max_keys: settings.max_keys,
            audit: audit.clone(),
            marks: audit.keys().clone(),
            hasher: RandomState::default(),
            claims: Mutex::new(Claims::new(settings.max_keys, window)),
            duplicates: Mutex::new(DuplicateDetector::new(
                settings.without_key,
                window,
                success_window,
                settings.max_keys,
            )),
            replies: Cache::builder()
                .eviction_policy(EvictionPolicy::lru())
                .weigher(|_: &Uuid, reply: &Arc<StoredReply>| weigh(reply))
                .max_capacity(settings.reply_memory)
                .time_to_live(settings.window)
                .build_with_hasher(RandomState::default()),
            is_rebuilt: AtomicBool::new(false),
            loss: Mutex::new(None),
            accept_loss,
            meanwhile: Mutex::new(Some(Meanwhile::default())),
            read: [AtomicU64::new(0), AtomicU64::new(0)],
        };
        // From now on for a window: what the time between was worth, only a clock could tell.
        let calls: Vec<_> = audit.unresolved().calls().cloned().collect();
        for call in calls {
            table.restore(&call, now());
        }
        table
    }

    /// Says what [`Idempotency::begin`] would decide, and remembers nothing.
    pub fn look(&self, call: Call<'_>, head: &Inbound<'_>) -> Result<Would, Refusal> {
        let Given { key, force } = key::read(head)?;
        let print = self.print(call);
        let key = key.map(|key| self.key_mark(call, key)).transpose()?;
        if let Some(key) = key {
            let wanted = self.wanted(call, key, print, force);
            let verdict = self.claims().look(wanted, now());
            self.check_loss(&verdict)?;
            self.check_superseded(&verdict, call, wanted)?;
            if let Passed::Replay(id, ending) = passed(verdict)? {
                return Ok(Would::BeReplayed(FirstCall { id, outcome: ending.outcome() }));
            }
        }
        let Some((mark, duplicate)) = self.compared(call, print, key)? else {
            return Ok(Would::BeSent(None));
        };
        let mut duplicates = self.duplicates();
        duplicates.expire(now());
        let first = duplicates.look(mark, duplicate, force, call.is_alone, now());
        drop(duplicates);
        Ok(Would::BeSent(first.map_err(rejected)?.map(FirstCall::from)))
    }

    /// Decides whether a call is new.
    pub fn begin(self: &Arc<Self>, call: Call<'_>, head: &Inbound<'_>) -> Result<Begun, Refusal> {
        let Given { key, force } = key::read(head)?;
        match key {
            Some(key) => self.begin_keyed(call, key, force),
            None => self.claim(call, self.print(call), None, force).map(Begun::Claim),
        }
    }

    #[cold]
    fn begin_keyed(
        self: &Arc<Self>,
        call: Call<'_>,
        key: &[u8],
        force: Option<Uuid>,
    ) -> Result<Begun, Refusal> {
        let (key, print) = (self.key_mark(call, key)?, self.print(call));
        let id = call.id;
        let wanted = self.wanted(call, key, print, force);
        if self.is_lost() {
            let verdict = self.claims().look(wanted, now());
            self.check_loss(&verdict)?;
        }
        let verdict = self.claims().claim(wanted, id, now());
        self.check_superseded(&verdict, call, wanted)?;
        match passed(verdict)? {
            Passed::Begin { doubt } => {
                let claimed = self.claim(call, print, Some(key), force);
                if claimed.is_err() {
                    self.claims().end(key, id, How::NotDone, now());
                }
                let mut claim = claimed?;
                // Another call may have come to stand for the doubt meanwhile, and be over by now.
                if let Some(first) = doubt.filter(|_| self.claims().is_superseded(key)) {
                    drop(claim);
                    return Err(Refused::Unknown(first.into()).into());
                }
                if let Some(id) = doubt.filter(|_| claim.forced.is_none()) {
                    claim.forced = Some(Box::new(Forced { id, key: Some(key) }));
                }
                Ok(Begun::Claim(claim))
            }
            Passed::Replay(first, ending) => {
                let stored = self.replies.get(&first);
                let mark = self.mark_of(call.caller, print);
                let delivery = Delivery::of_other_answer(self, mark, first, call);
                let first = FirstCall { id: first, outcome: ending.outcome() };
                Ok(Begun::Replay(Replay { first, ending, stored, delivery }))
            }
        }
    }

    /// Looks for equal calls, and remembers this one.
    fn claim(
        self: &Arc<Self>,
        call: Call<'_>,
        print: Mark,
        key: Option<Mark>,
        force: Option<Uuid>,
    ) -> Result<Claim, Refusal> {
        let compared = self.compared(call, print, key)?;
        let (mut first, mut forced) = (None, None);
        if let Some((mark, duplicate)) = compared {
            let begun = self.duplicates().begin(mark, duplicate, force, call.is_alone, now());
            (first, forced) = begun.map_err(|rejection| self.refuse(rejection, mark, call))?;
        }
        let (mark, forced) = (compared.map(|(mark, _)| mark), forced.map(Box::new));
        let table = self.clone();
        Ok(Claim { table, id: call.id, print, mark, key, first, forced, step: Step::Claimed })
    }

    /// A refusal that tells of an undelivered success ends that doubt, once it is delivered.
    fn refuse(self: &Arc<Self>, rejection: Rejection, mark: Mark, call: Call<'_>) -> Refusal {
        let delivery = match rejection {
            Rejection::Duplicate(First::Succeeded(id)) => {
                Some(Box::new(Delivery::of_other_answer(self, mark, id, call)))
            }
            Rejection::Duplicate(First::Open(_)) | Rejection::Full | Rejection::FullOfSuccesses => None,
        };
        Refusal { reason: rejected(rejection), delivery }
    }

    /// A call names the one of its key that is of unknown outcome, though another one repeated that by force: it is told of the
    /// other one, where that is still open.
    fn check_superseded(&self, verdict: &Verdict, call: Call<'_>, wanted: Wanted) -> Result<(), Refused> {
        let Verdict::Unknown(first) = *verdict else { return Ok(()) };
        if wanted.force == Some(first)
            && let Some((mark, duplicate)) = self.compared(call, wanted.print, Some(wanted.key))?
        {
            let looked = self.duplicates().look(mark, duplicate, None, true, now());
            if let Err(rejection @ Rejection::Duplicate(First::Open(_))) = looked {
                return Err(rejected(rejection));
            }
        }
        Ok(())
    }

    fn key_mark(&self, call: Call<'_>, key: &[u8]) -> Result<Mark, Refused> {
        if !self.is_rebuilt.load(Ordering::Acquire) {
            return Err(Refused::Rebuilding);
        }
        Ok(self.marks.mark(&[b"key", call.caller.as_bytes(), call.route.as_bytes(), key]))
    }

    /// A caller gets half of all keys, or all if there is no other, unless its share is configured.
    fn wanted(&self, call: Call<'_>, key: Mark, print: Mark, force: Option<Uuid>) -> Wanted {
        let share = if call.is_alone { self.max_keys } else { self.max_keys.div_ceil(2) };
        let share = call.max_keys.unwrap_or(share);
        Wanted { key, print, caller: self.hash_of(call.caller), share, force }
    }

    /// Equal for equal bodies, operators and routes. Written to the trail.
    fn print(&self, call: Call<'_>) -> Mark {
        self.marks.mark(&[b"print", call.digest, call.operator.as_bytes(), call.route.as_bytes()])
    }

    /// Under which mark, and as what, a call is compared with others; `None`: it is not.
    fn compared(
        &self,
        call: Call<'_>,
        print: Mark,
        key: Option<Mark>,
    ) -> Result<Option<(Mark, Duplicate)>, Refused> {
        match self.without_key {
            WithoutKey::RequireKey if key.is_none() => Err(Refused::NoKey),
            // Nobody knows yet which calls succeeded.
            WithoutKey::Block if !self.is_rebuilt.load(Ordering::Acquire) => Err(Refused::Rebuilding),
            WithoutKey::RequireKey | WithoutKey::Off => Ok(None),
            WithoutKey::Guard | WithoutKey::Block | WithoutKey::Warn => {
                Ok(Some(self.compared_of(call.caller, print, call.id, key)))
            }
        }
    }

    /// The print of a call, and whose call it is. Stands nowhere but in memory.
    fn mark_of(&self, caller: &str, print: Mark) -> Mark {
        salted(print, self.hasher.hash_one(caller))
    }

    fn compared_of(&self, caller: &str, print: Mark, id: Uuid, key: Option<Mark>) -> (Mark, Duplicate) {
        let hash = self.hasher.hash_one(caller); // once: every call comes here
        (salted(print, hash), Duplicate { id, key, caller: half(hash), stands_for_unkeyed: false })
    }

    fn hash_of(&self, caller: &str) -> u32 {
        half(self.hasher.hash_one(caller))
    }

    /// For `/status`.
    pub fn status(&self) -> Value {
        let [read, all] = self.read.each_ref().map(|bytes| bytes.load(Ordering::Relaxed));
        json!({
            "keys": self.keys(),
            "rebuilt": self.is_rebuilt.load(Ordering::Relaxed),
            "loss": self.loss(),
            "trail_bytes_read": read,
            "trail_bytes": all,
        })
    }

    /// Whether no call at all can be taken yet.
    pub fn holds_all_up(&self) -> bool {
        matches!(self.without_key, WithoutKey::RequireKey | WithoutKey::Block)
            && !self.is_rebuilt.load(Ordering::Relaxed)
    }

    /// How many keys are remembered.
    pub fn keys(&self) -> usize {
        self.claims().len()
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn duplicates(&self) -> MutexGuard<'_, DuplicateDetector> {
        self.duplicates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn salted(print: Mark, caller: u64) -> Mark {
    let caller = u128::from(caller);
    (u128::from_ne_bytes(print) ^ (caller << 64 | caller)).to_ne_bytes()
}

#[expect(clippy::cast_possible_truncation, reason = "half of a hash")]
fn half(hash: u64) -> u32 {
    hash as u32
}

impl From<First> for FirstCall {
    fn from(first: First) -> Self {
        match first {
            First::Open(id) => Self { id, outcome: Outcome::Unknown },
            First::Succeeded(id) => Self { id, outcome: Outcome::Succeeded },
        }
    }
}

impl Ending {
    fn outcome(&self) -> Outcome {
        if self.is_success { Outcome::Succeeded } else { Outcome::Failed }
    }
}

impl fmt::Debug for Idempotency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Idempotency")
    }
}

/// *Now* in seconds since 1970 (see [`clock`]): no jump of the wall clock ends a window.
fn now() -> u32 {
    u32::try_from(clock::unix_nanos() / 1_000_000_000).unwrap_or(u32::MAX)
}

/// The memory that a stored reply takes, in bytes. The allocator rounds a body up by an eighth at most.
fn weigh(reply: &StoredReply) -> u32 {
    u32::try_from(reply.body.len() * 9 / 8 + REPLY_OVERHEAD).unwrap_or(u32::MAX)
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}
