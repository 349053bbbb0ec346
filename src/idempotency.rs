//! Stage 5: deduplication. A call that is sent twice becomes one task at the upstream, which itself is not idempotent.
//!
//! Two tables decide whether a call is sent. They do so before the call needs a token or counts against the quota:
//!
//! * [`claims`] maps each `Idempotency-Key` to its call, for the configured window. The call is sent once. A repetition gets the
//!   stored reply (it is *replayed*), or is refused while the first call is at work or its outcome is unknown.
//! * [`duplicates`] compares calls by caller, route, operator and body, with and without keys. It finds an equal call that is at
//!   work, has an unknown outcome, or succeeded without its caller having received the answer. The setting `without_key`
//!   ([`WithoutKey`]) chooses whether the new call is then refused or only *flagged*: sent, with a reply that names the equal
//!   call. This table also remembers recent successes of calls without a key. An equal call without a key is then flagged, or
//!   refused under `block`. `off` and `require_key` compare nothing.
//!
//! A key within the window is never evicted: a full table refuses new keys, and after a start no key is accepted before the
//! audit trail has been read ([`rebuild`]). Stored replies may be evicted; a replay then names the result code only.
//!
//! The outcome of a call with a key is committed to the trail before the caller gets the reply. There are two exceptions:
//!
//! * 503 `audit_unavailable`: the intent was not committed in time, so nothing was sent. A stuck disk may still write it later.
//! * A reply of more than 64 KiB: its head is sent before the commit. Only the last part waits for the commit.
//!
//! Terms:
//!
//! * *Fingerprint* (`print`): a keyed hash of body, operator and route. The trail contains it.
//! * *Call hash*: the fingerprint of a call, combined with its caller. *Key hash*: a keyed hash of caller, route and key.
//! * *Claim*: in [`claims`], the entry that says which call holds a key. The [`Claim`] that [`Idempotency::begin`] returns is a
//!   call's right to be sent. A call without a key has such a right, too, but no entry.
//! * *Doubt*: a call that has ended, but whose caller does not know how it ended. Its outcome is unknown, or it is *undelivered*
//!   (it succeeded, but the caller did not get the answer), or a person *resolved* it as done.
//! * *By force*: a call with `Idempotency-Force` names a doubt or an earlier success and repeats it. If it repeats a doubt, it
//!   *supersedes* that doubt: new calls are compared with the repetition, no longer with the doubt.

mod claim;
mod claims;
mod delivery;
mod duplicates;
mod hashes;
pub(crate) mod key;
mod lost;
pub mod memory;
mod past;
mod rebuild;
mod recent;
mod refusal;
mod slots;

use std::fmt;
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
use crate::keyed_hash::{Hash, KeyedFingerprint, Keys};
use crate::model::outcome::Outcome;
use crate::model::request_id::{FirstCall, RequestId};
use crate::request_head::Inbound;
use crate::{clock, config};
pub use claim::Claim;
use claim::ExchangeStep;
pub use claims::StoredResult;
use claims::{Claims, KeyDecision, KeyedCompletion, Wanted};
pub use delivery::{Delivery, PendingDelivery};
use duplicates::{DuplicateDetector, First, Forced, Rejection};
pub use key::BadKey;
use key::Given;
use past::Meanwhile;
use refusal::{Passed, passed, rejected};
pub use refusal::{Refusal, Refused};

/// The memory that a stored reply takes in addition to its body, in bytes. Measured; the cache's own entry is most of it.
const REPLY_OVERHEAD: usize = 450;

/// The state of deduplication, shared by all workers.
///
/// Never blocks on I/O, but for [`Idempotency::rebuild`], which has a thread of its own.
pub struct Idempotency {
    without_key: WithoutKey,
    max_keys: usize,
    audit: Audit,
    hash_keys: Arc<Keys>,
    hasher: RandomState,
    // `claims` and `duplicates` are never locked together: a request locks them one after the other, so that no order of
    // locks has to be kept between them. `begin_keyed` repairs what can happen in between.
    claims: Mutex<Claims>,
    duplicates: Mutex<DuplicateDetector>,
    /// Replies by the id of their call, bounded by `reply_memory`. They may be evicted: a replay then names the result code
    /// only.
    replies: Cache<Uuid, Arc<StoredReply>, RandomState>,
    is_rebuilt: AtomicBool,
    /// The loss of a part of the trail within the window, and the time until which keys that are not found are refused because
    /// of it, in seconds since 1970. `None` without a loss.
    loss: Mutex<Option<(Loss, u32)>>,
    /// The word of the loss that the operator accepts: the hash that identifies it ([`crate::audit::loss`]).
    accept_loss: Option<String>,
    /// Changes of claims that were made during the rebuild. It applies them last, since they are newer than all that it reads.
    /// `None` once the rebuild is over.
    meanwhile: Mutex<Option<Meanwhile>>,
    /// Progress of the rebuild: the bytes of the trail that it has read so far, and the bytes that it reads in total.
    read: [AtomicU64; 2],
}

/// One call whose head and body were checked.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The caller's name in the configuration.
    pub caller: &'a str,
    /// Whether no other caller is configured. Such a caller may use the whole of each table, others half of it.
    pub is_alone: bool,
    /// The most keys that this caller may hold within the window; `None` if that is not configured.
    pub max_keys: Option<usize>,
    /// The route's name in the configuration.
    pub route: &'a str,
    /// The operator that the caller acts as, for `x-UserId`.
    pub operator: &'a HeaderValue,
    /// The keyed digest of the body.
    pub digest: &'a Hash,
    /// The request's id.
    pub id: Uuid,
}

/// What [`Idempotency::begin`] decided about a call.
#[derive(Debug)]
pub enum ClaimDecision {
    /// The call is to be sent. Dropping the claim before [`Claim::sent`] releases the key.
    Claim(Claim),
    /// The call repeats a call that has ended, and gets the answer of that call.
    Replay(Replay),
}

/// The decision that [`Idempotency::peek`] predicts for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DryRunDecision {
    /// The call would be sent. The field is the equal call that came first, if there is one.
    BeSent(Option<FirstCall>),
    /// The call would get the answer of the call in the field.
    BeReplayed(FirstCall),
}

/// The answer of an earlier call with the same key.
#[derive(Debug)]
pub struct Replay {
    /// The call that was answered first.
    pub first: FirstCall,
    /// How that call ended. Known even if its reply was evicted.
    pub result: StoredResult,
    /// Its reply; `None` if it was evicted or never stored.
    pub stored: Option<Arc<StoredReply>>,
    /// Goes to the caller's connection with this answer. If the first call was undelivered, handing over this answer ends the
    /// doubt. Otherwise the delivery has no effect.
    pub delivery: Delivery,
}

impl Idempotency {
    /// Creates the tables, with the calls of the unresolved list ([`crate::audit::unresolved_calls`]). The other earlier calls
    /// are restored by [`Idempotency::rebuild`]. Until that is over, calls with a key are refused, and under `block` all calls.
    ///
    /// `accept_loss` is the word of a loss of the trail that the operator accepts ([`crate::audit::loss`]).
    pub fn new(settings: &config::Idempotency, audit: &Audit, accept_loss: Option<String>) -> Self {
        let (window, success_window) = (seconds(settings.window), seconds(settings.fingerprint_window));
        let table = Self {
            without_key: settings.without_key,
            max_keys: settings.max_keys,
            audit: audit.clone(),
            hash_keys: audit.keys().clone(),
            hasher: RandomState::default(),
            claims: Mutex::new(Claims::new(settings.max_keys, window)),
            duplicates: Mutex::new(DuplicateDetector::new(
                settings.without_key,
                window,
                success_window,
                settings.max_keys,
            )),
            replies: Cache::builder()
                // LRU admits every new reply. moka's default, TinyLFU, may refuse one in favour of older ones that were
                // asked for more often, and the reply of a call that has just ended is the one that a retry asks for.
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
        // Before the first call is served: a call that a crash cut off is the likeliest to be sent again, and a call without a
        // key does not wait for the rebuild. Each doubt refuses equal calls for a whole window from now on: only a wall clock,
        // which may be wrong, could tell how long the gateway was down.
        let calls: Vec<_> = audit.unresolved().calls().cloned().collect();
        for call in calls {
            table.restore(&call, now());
        }
        table
    }

    /// Returns what [`Idempotency::begin`] would decide, and remembers nothing. For dry runs.
    ///
    /// Fails with the refusal that the call would get.
    pub fn peek(&self, call: Call<'_>, head: &Inbound<'_>) -> Result<DryRunDecision, Refusal> {
        let Given { key, force } = key::read(head)?;
        let print = self.print(call);
        let key = key.map(|key| self.key_hash(call, key)).transpose()?;
        if let Some(key) = key {
            let wanted = self.wanted(call, key, print, force);
            let decision = self.claims().peek(wanted, now());
            self.check_loss(&decision)?;
            self.check_superseded(&decision, call, wanted)?;
            if let Passed::Replay(id, result) = passed(decision)? {
                return Ok(DryRunDecision::BeReplayed(FirstCall { id, outcome: result.outcome() }));
            }
        }
        let Some((call_hash, duplicate)) = self.compared(call, print, key)? else {
            return Ok(DryRunDecision::BeSent(None));
        };
        let mut duplicates = self.duplicates();
        // `DuplicateDetector::peek` does not expire anything. Without this, a dry run under `block` was refused for want of
        // room long after the next call would have found some.
        duplicates.expire(now());
        let first = duplicates.peek(call_hash, duplicate, force, call.is_alone, now());
        drop(duplicates);
        Ok(DryRunDecision::BeSent(first.map_err(rejected)?.map(FirstCall::from)))
    }

    /// Decides whether a call is sent, and registers it as at work if it is.
    ///
    /// Fails, and registers nothing, if a header breaks its rules, if an earlier call with the key or an equal call forbids this
    /// one, if a table is full, or if the trail has not been read yet.
    pub fn begin(self: &Arc<Self>, call: Call<'_>, head: &Inbound<'_>) -> Result<ClaimDecision, Refusal> {
        let Given { key, force } = key::read(head)?;
        match key {
            Some(key) => self.begin_keyed(call, key, force),
            None => self.claim(call, self.print(call), None, force).map(ClaimDecision::Claim),
        }
    }

    // Cold and apart, so that the path of a call without a key stays short.
    #[cold]
    fn begin_keyed(
        self: &Arc<Self>,
        call: Call<'_>,
        key: &[u8],
        force: Option<Uuid>,
    ) -> Result<ClaimDecision, Refusal> {
        let (key, print) = (self.key_hash(call, key)?, self.print(call));
        let id = call.id;
        let wanted = self.wanted(call, key, print, force);
        // Before the key is claimed: afterwards it would be a known one.
        if self.is_lost() {
            let decision = self.claims().peek(wanted, now());
            self.check_loss(&decision)?;
        }
        let decision = self.claims().claim(wanted, id, now());
        self.check_superseded(&decision, call, wanted)?;
        match passed(decision)? {
            Passed::Begin { repeats } => {
                let claimed = self.claim(call, print, Some(key), force);
                if claimed.is_err() {
                    // Refused for an equal call. Nothing was sent, so the key must be free for the next attempt.
                    self.claims().end(key, id, KeyedCompletion::NotDone, now());
                }
                let mut claim = claimed?;
                // Between the two locks a call without this key may have repeated the same doubt by force, and may have ended
                // by now, so that the duplicates no longer show it. Sending this call too would send the task twice. The
                // drop of the claim restores the doubt.
                if let Some(first) = repeats.filter(|_| self.claims().is_superseded(key)) {
                    drop(claim);
                    return Err(Refused::Unknown(first.into()).into());
                }
                // Equal calls may not be compared at all (`off`, `require_key`). The intent must name the call that it repeats
                // all the same: a restart reads from it that the doubt was forced already.
                if let Some(id) = repeats.filter(|_| claim.forced.is_none()) {
                    claim.forced = Some(Box::new(Forced { id, key: Some(key) }));
                }
                Ok(ClaimDecision::Claim(claim))
            }
            Passed::Replay(first, result) => {
                let stored = self.replies.get(&first);
                // The success may be undelivered. Then this answer is the one that its caller gets.
                let call_hash = self.call_hash_of(call.caller, print);
                let delivery = Delivery::of_other_answer(self, call_hash, first, call);
                let first = FirstCall { id: first, outcome: result.outcome() };
                Ok(ClaimDecision::Replay(Replay { first, result, stored, delivery }))
            }
        }
    }

    /// Compares a call with equal calls and registers it as at work. The caller has claimed `key` before. Fails, and registers
    /// nothing, if an equal call refuses it or a table is full.
    fn claim(
        self: &Arc<Self>,
        call: Call<'_>,
        print: KeyedFingerprint,
        key: Option<KeyedFingerprint>,
        force: Option<Uuid>,
    ) -> Result<Claim, Refusal> {
        let compared = self.compared(call, print, key)?;
        let (mut first, mut forced) = (None, None);
        if let Some((call_hash, duplicate)) = compared {
            let began = self.duplicates().begin(call_hash, duplicate, force, call.is_alone, now());
            (first, forced) = began.map_err(|rejection| self.refuse(rejection, call_hash, call))?;
        }
        let (call_hash, forced) = (compared.map(|(call_hash, _)| call_hash), forced.map(Box::new));
        let table = self.clone();
        Ok(Claim { table, id: call.id, print, call_hash, key, first, forced, step: ExchangeStep::Claimed })
    }

    /// Returns the refusal for a rejection by the table of equal calls. If it names a call that succeeded, it carries a
    /// [`Delivery`]: once the refusal is handed over, that call is no longer undelivered.
    fn refuse(
        self: &Arc<Self>,
        rejection: Rejection,
        call_hash: KeyedFingerprint,
        call: Call<'_>,
    ) -> Refusal {
        let delivery = match rejection {
            Rejection::Duplicate(First::Succeeded(id)) => {
                Some(Box::new(Delivery::of_other_answer(self, call_hash, id, call)))
            }
            Rejection::Duplicate(First::Open(_)) | Rejection::Full | Rejection::FullOfSuccesses => None,
        };
        Refusal { reason: rejected(rejection), delivery }
    }

    /// Checks a call whose `Idempotency-Force` names the call that holds its key. Refuses it if another call supersedes the
    /// named one and is at work or of unknown outcome. The refusal names the other call, which is the one to look up now.
    /// Returns `Ok` in all other cases.
    fn check_superseded(
        &self,
        decision: &KeyDecision,
        call: Call<'_>,
        wanted: Wanted,
    ) -> Result<(), Refused> {
        let KeyDecision::Unknown(first) = *decision else { return Ok(()) };
        if wanted.force == Some(first)
            && let Some((call_hash, duplicate)) = self.compared(call, wanted.print, Some(wanted.key))?
        {
            // `None` for `force`, since no call may be left out. `true` for `is_alone`: whether there is room does not matter
            // here, and the pattern below ignores it.
            let looked = self.duplicates().peek(call_hash, duplicate, None, true, now());
            if let Err(rejection @ Rejection::Duplicate(First::Open(_))) = looked {
                return Err(rejected(rejection));
            }
        }
        Ok(())
    }

    /// Returns a call's request for a key. The caller's share is its `max_keys`; without one, half of all keys, or all of them
    /// if there is no other caller.
    fn wanted(
        &self,
        call: Call<'_>,
        key: KeyedFingerprint,
        print: KeyedFingerprint,
        force: Option<Uuid>,
    ) -> Wanted {
        // Half, since keys are held for the whole window: a caller that used up all of them had the others refused for a day.
        let share = if call.is_alone { self.max_keys } else { self.max_keys.div_ceil(2) };
        let share = call.max_keys.unwrap_or(share);
        Wanted { key, print, caller: self.hash_of(call.caller), share, force }
    }

    /// The state of deduplication as JSON, for `/status`: the number of keys, progress of the rebuild, and a loss of the trail.
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

    /// Whether all calls are refused at present because the rebuild is not over. `/readyz` fails meanwhile.
    pub fn holds_all_up(&self) -> bool {
        matches!(self.without_key, WithoutKey::RequireKey | WithoutKey::Block)
            && !self.is_rebuilt.load(Ordering::Relaxed)
    }

    /// The number of keys that are held.
    pub fn keys(&self) -> usize {
        self.claims().len()
    }

    // A panic ends one request only. The tables are valid after each step that can panic, so a poisoned lock is used as well.
    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn duplicates(&self) -> MutexGuard<'_, DuplicateDetector> {
        self.duplicates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<First> for FirstCall {
    fn from(first: First) -> Self {
        match first {
            First::Open(id) => Self { id, outcome: Outcome::Unknown },
            First::Succeeded(id) => Self { id, outcome: Outcome::Succeeded },
        }
    }
}

impl StoredResult {
    /// The outcome of the call with this result, as replies name it.
    fn outcome(&self) -> Outcome {
        if self.is_success { Outcome::Succeeded } else { Outcome::Failed }
    }
}

impl fmt::Debug for Idempotency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Idempotency")
    }
}

/// *Now* in seconds since 1970. It comes from [`clock`], so that no jump of the wall clock ends a window.
fn now() -> u32 {
    // 32 bits of seconds reach to the year 2106 and keep an entry of a table small.
    u32::try_from(clock::unix_nanos() / 1_000_000_000).unwrap_or(u32::MAX)
}

/// The memory that a stored reply takes, in bytes. The allocator rounds the size of a body up by an eighth at most.
fn weigh(reply: &StoredReply) -> u32 {
    u32::try_from(reply.body.len() * 9 / 8 + REPLY_OVERHEAD).unwrap_or(u32::MAX)
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}
