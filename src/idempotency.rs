//! Stage 5: deduplication. The same call twice is one task.
//!
//! With an `Idempotency-Key` a caller may repeat a call as often as it likes: [`claims`] remembers each key for the
//! window, so that the task is sent once and its answer is given again. [`duplicates`] looks for equal calls, with and
//! without keys, that may still be at work, in doubt, or done without their callers having learnt of it. Decides from
//! key and body alone, before a token is spent. Guarantees that a claim within the window is never forgotten: a full
//! table refuses new keys, and a start reads the audit trail before it takes any ([`rebuild`]). What a caller was
//! told of a key is in the trail first: the exchange sees to it. Two exceptions: 503 `audit_unavailable` tells of an intent
//! that may still reach a stuck disk, and the head of a reply of more than 64 KiB leaves before its end is known.

mod claims;
mod delivery;
mod duplicates;
pub(crate) mod key;
pub mod memory;
mod rebuild;
mod recent;
mod slots;

use std::{
    fmt,
    hash::BuildHasher,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use http::HeaderValue;
use moka::{policy::EvictionPolicy, sync::Cache};
use serde_json::{Value, json};
use thiserror::Error;
use uuid::Uuid;

use crate::{
    audit::{
        Answer, Audit, Names, StoredReply,
        loss::{self, Fault, Loss},
        unresolved::{CallState, Resolution, UnresolvedCall},
    },
    clock,
    config::{self, WithoutKey},
    keyed_hash::{Hash, Keys, Mark, parse_hex, push_hex},
    model::{
        outcome::Outcome,
        request_id::{FirstCall, RequestId},
    },
    request_head::Inbound,
};
pub use claims::Ending;
use claims::{Claims, How, Verdict, Wanted};
pub use delivery::{Delivery, DeliverySlot};
use duplicates::{Completion, Doubt, DoubtKind, Duplicate, DuplicateDetector, First, Forced, Rejection};
pub use key::BadKey;
use key::Given;

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

/// What changes claims that are not known yet.
#[derive(Default)]
struct Meanwhile {
    resolved: Vec<(UnresolvedCall, Resolution)>,
    /// Keys and calls of unknown outcome, and whether another call stands for them.
    superseded: Vec<(Mark, Uuid, bool)>,
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

/// Why a call goes no further, and whose success the answer tells of.
#[derive(Debug)]
pub struct Refusal {
    /// Why.
    pub reason: Refused,
    /// To be settled once the answer is delivered, where it tells that the first call succeeded.
    pub delivery: Option<Box<Delivery>>,
}

/// Why a call goes no further.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// The header breaks its rules.
    #[error(transparent)]
    Key(#[from] BadKey),
    /// `without_key = "require_key"`.
    #[error("an Idempotency-Key is needed here: 1 to 255 visible characters, another one for each task")]
    NoKey,
    /// The first call with this key is not over.
    #[error(
        "the first call with this Idempotency-Key is still at work; call again with the same key in a second"
    )]
    InProgress(RequestId),
    /// Nobody knows what became of the first call with this key.
    #[error(
        "the first call with this Idempotency-Key may have reached the upstream, so that this one was not sent: look in the \
         cloud whether the task is assigned; if it is not, repeat the call with the same key and `Idempotency-Force: {0}`; if \
         that is refused, too, take a new key"
    )]
    Unknown(RequestId),
    /// The key stands for another call.
    #[error("this Idempotency-Key was used for another body or operator; take a new key for a new task")]
    Mismatch(FirstCall),
    /// An equal call is at work or of unknown outcome.
    #[error(
        "an equal call (same body, same x-userid) is at work or may have reached the upstream, so that this one was not sent: \
         look in the cloud whether the task is assigned; if it is not, or if it is meant twice, repeat the call with \
         `Idempotency-Force: {0}`"
    )]
    Duplicate(RequestId),
    /// An equal call succeeded.
    #[error(
        "an equal call (same body, same x-userid) succeeded, so that the task is assigned and this one was not sent; if it is \
         meant twice, repeat the call with `Idempotency-Force: {0}`"
    )]
    Done(RequestId),
    /// No more keys within the window.
    #[error("no more Idempotency-Keys can be remembered at the moment; keep the key and call again later")]
    NoMoreKeys,
    /// No more keys of this caller within the window.
    #[error(
        "this caller holds as many Idempotency-Keys as it may (half of all, or its `max_keys`); keep the key and call \
         again later"
    )]
    NoMoreKeysOfCaller,
    /// No more calls of unknown outcome can be remembered.
    #[error(
        "too many calls are of unknown outcome, so that a further one could be lost; the operators must resolve them"
    )]
    NoMoreDoubts,
    /// No more successes of calls without a key, where they refuse equal calls.
    #[error(
        "no more calls without an Idempotency-Key can be remembered at the moment, so that an equal one could pass; call again \
         later, or give each task a key"
    )]
    NoMoreSuccesses,
    /// A part of the trail is lost, and the key is not in the rest.
    #[error(
        "a part of the audit trail is lost, so that nobody knows whether this Idempotency-Key was used; keep the key and call \
         again later; the operators must restore the trail or accept the loss"
    )]
    Lost,
    /// The trail is still read.
    #[error(
        "earlier calls are still being read from the audit trail; call again in a moment, with the same key if it has one"
    )]
    Rebuilding,
}

impl Refused {
    /// The call that stands in the way, and what became of it.
    pub fn first(&self) -> Option<FirstCall> {
        let first = |id: &RequestId, outcome| Some(FirstCall { id: id.uuid(), outcome });
        match self {
            Self::InProgress(id) | Self::Unknown(id) | Self::Duplicate(id) => first(id, Outcome::Unknown),
            Self::Done(id) => first(id, Outcome::Succeeded),
            Self::Mismatch(call) => Some(*call),
            Self::Key(_)
            | Self::NoKey
            | Self::NoMoreKeys
            | Self::NoMoreKeysOfCaller
            | Self::NoMoreDoubts
            | Self::NoMoreSuccesses
            | Self::Lost
            | Self::Rebuilding => None,
        }
    }
}

impl<R: Into<Refused>> From<R> for Refusal {
    fn from(reason: R) -> Self {
        Self { reason: reason.into(), delivery: None }
    }
}

/// A call's right to be sent. Dropped before it was sent, it gives its key back; dropped after that, what became
/// of it is unknown.
pub struct Claim {
    table: Arc<Idempotency>,
    id: Uuid,
    /// Equal for equal bodies, operators and routes.
    print: Mark,
    /// Under which equal calls are looked for; `None`: they are not.
    mark: Option<Mark>,
    key: Option<Mark>,
    /// An equal one that came first; this one is sent all the same.
    first: Option<First>,
    /// The call of unknown outcome that this one repeats; there seldom is one.
    forced: Option<Box<Forced>>,
    step: Step,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Claimed,
    Sent,
    Ended,
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

    /// Refuses a key that is not found while a part of the trail is lost.
    fn check_loss(&self, verdict: &Verdict) -> Result<(), Refused> {
        let is_new = matches!(verdict, Verdict::Begin { doubt: None });
        if is_new && self.is_lost() { Err(Refused::Lost) } else { Ok(()) }
    }

    /// What is lost of the trail, as long as that matters.
    pub fn loss(&self) -> Option<Loss> {
        self.present_loss().as_ref().map(|(loss, _)| loss.clone())
    }

    fn is_lost(&self) -> bool {
        self.present_loss().is_some()
    }

    fn present_loss(&self) -> MutexGuard<'_, Option<(Loss, u32)>> {
        let mut loss = self.loss.lock().unwrap_or_else(PoisonError::into_inner);
        if loss.as_ref().is_some_and(|(_, until)| *until < now()) {
            *loss = None;
            self.audit.set_damaged(false);
        }
        loss
    }

    /// The rebuild found something lost.
    fn lose(&self, loss: Loss, window: u32) {
        let Loss { first: Fault { file, line, reason, .. }, word, .. } = &loss;
        if self.accept_loss.as_ref() == Some(word) {
            tracing::warn!(file, line, reason, "a part of the audit trail is lost, and that is accepted");
            self.audit.event(loss::ACCEPTED, loss.details());
            return;
        }
        tracing::warn!(
            file,
            line,
            reason,
            word,
            "a part of the audit trail is lost: Idempotency-Keys that are not found get 503; restore it, or accept the loss \
             with `ccsqm-gateway audit accept-loss` or `serve --accept-loss=<word>`"
        );
        self.audit.set_damaged(true);
        *self.loss.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((loss, now().saturating_add(window)));
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

    /// Remembers a doubt that the trail tells of.
    fn restore(&self, call: &UnresolvedCall, since: u32) {
        let kind = match call.state {
            CallState::AtWork | CallState::Unknown if call.superseded => return,
            CallState::AtWork | CallState::Unknown => DoubtKind::Unknown,
            CallState::Undelivered => DoubtKind::Undelivered,
            CallState::Done => DoubtKind::Resolved,
        };
        if let Some((mark, call)) = self.identify(call) {
            self.duplicates().doubt(mark, call, Doubt { kind, since });
        }
    }

    /// Remembers a success that the trail tells of.
    fn restore_success(&self, call: &UnresolvedCall, since: u32) {
        if let Some((mark, call)) = self.identify(call) {
            self.duplicates().succeed(mark, call, since);
        }
    }

    /// Takes into account what a person found about a call of unknown outcome; its event is committed.
    pub fn resolve(&self, call: &UnresolvedCall, result: Resolution) {
        let mut meanwhile = self.meanwhile();
        if let Some(meanwhile) = &mut *meanwhile {
            meanwhile.resolved.push((call.clone(), result));
        }
        self.resolve_claim(&mut self.claims(), call, result, now());
        self.resolve_duplicate(call, result, now());
        drop(meanwhile);
        // The list has changed by now: a call that this one repeated by force guards again.
        let first = call.forced.and_then(|first| self.audit.unresolved().get(first).cloned());
        if let Some(first) = first.filter(|_| result == Resolution::NotDone) {
            self.restore(&first, now());
            if let Some(key) = first.key.as_ref().and_then(|key| parse_hex(key)) {
                self.set_superseded(key, first.id, first.superseded);
            }
        }
    }

    /// Says whether another call stands for one of unknown outcome with a key.
    fn set_superseded(&self, key: Mark, id: Uuid, superseded: bool) {
        if let Some(meanwhile) = &mut *self.meanwhile() {
            meanwhile.superseded.push((key, id, superseded));
        }
        self.claims().set_superseded(key, id, superseded);
    }

    fn meanwhile(&self) -> MutexGuard<'_, Option<Meanwhile>> {
        self.meanwhile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the key of a resolved call stands for, if it has one.
    fn resolve_claim(&self, claims: &mut Claims, call: &UnresolvedCall, result: Resolution, now: u32) {
        let Some(key) = call.key.as_ref().and_then(|key| parse_hex(key)) else { return };
        match (result, call.print.as_ref().and_then(|print| parse_hex(print))) {
            (Resolution::Done, Some(print)) => {
                let caller = self.hash_of(call.caller.as_deref().unwrap_or_default());
                let wanted = Wanted { key, print, caller, share: usize::MAX, force: None };
                claims.resolve_done(wanted, call.id, now);
            }
            (Resolution::Done, None) => {} // no intent with a key lacks its print
            (Resolution::NotDone, _) => claims.resolve_not_done(key, call.id, now),
        }
    }

    fn resolve_duplicate(&self, call: &UnresolvedCall, result: Resolution, now: u32) {
        if let Some((mark, duplicate)) = self.identify(call) {
            self.duplicates().resolve(mark, duplicate, result == Resolution::Done, now);
        }
    }

    fn identify(&self, call: &UnresolvedCall) -> Option<(Mark, Duplicate)> {
        let caller = call.caller.as_ref()?;
        let key = call.key.as_ref().and_then(|key| parse_hex(key));
        let (mark, duplicate) = self.compared_of(caller, self.print_of(call)?, call.id, key);
        let stands_for_unkeyed = key.is_some() && self.repeats_unkeyed(call);
        Some((mark, Duplicate { stands_for_unkeyed, ..duplicate }))
    }

    /// Whether a call repeats by force one without a key, or one that does so. What is not on the list may have been such a call.
    fn repeats_unkeyed(&self, call: &UnresolvedCall) -> bool {
        let list = self.audit.unresolved();
        let mut forced = call.forced;
        while let Some(id) = forced {
            match list.get(id) {
                // Ids are in the order of the wall clock, which may have gone back. Where they go up, the chain is not
                // followed, so that it ends whatever stands in the list.
                Some(first) if first.key.is_some() && first.forced.is_none_or(|earlier| earlier < id) => {
                    forced = first.forced;
                }
                _ => return true,
            }
        }
        false
    }

    /// The print of an intent. Intents without a key had none in earlier versions.
    fn print_of(&self, call: &UnresolvedCall) -> Option<Mark> {
        if let Some(print) = &call.print {
            return parse_hex(print);
        }
        let digest: Hash = parse_hex(call.digest.as_ref()?)?;
        let (operator, route) = (call.operator.as_ref()?, call.route.as_ref()?);
        Some(self.marks.mark(&[b"print", &digest, operator.as_bytes(), route.as_bytes()]))
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

/// A verdict that lets a call pass.
enum Passed {
    Begin { doubt: Option<Uuid> },
    Replay(Uuid, Ending),
}

fn passed(verdict: Verdict) -> Result<Passed, Refused> {
    match verdict {
        Verdict::Begin { doubt } => Ok(Passed::Begin { doubt }),
        Verdict::Replay(first, ending) => Ok(Passed::Replay(first, ending)),
        Verdict::InFlight(first) => Err(Refused::InProgress(first.into())),
        Verdict::Unknown(first) => Err(Refused::Unknown(first.into())),
        Verdict::Mismatch(first, ending) => {
            let outcome = ending.map_or(Outcome::Unknown, |ending| ending.outcome());
            Err(Refused::Mismatch(FirstCall { id: first, outcome }))
        }
        Verdict::Full => Err(Refused::NoMoreKeys),
        Verdict::ShareFull => Err(Refused::NoMoreKeysOfCaller),
    }
}

fn rejected(rejection: Rejection) -> Refused {
    match rejection {
        Rejection::Duplicate(First::Open(id)) => Refused::Duplicate(id.into()),
        Rejection::Duplicate(First::Succeeded(id)) => Refused::Done(id.into()),
        Rejection::Full => Refused::NoMoreDoubts,
        Rejection::FullOfSuccesses => Refused::NoMoreSuccesses,
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

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Claim({})", self.id)
    }
}

impl Claim {
    /// An equal call that came before this one: it goes out, and is flagged.
    pub fn first(&self) -> Option<FirstCall> {
        self.first.map(FirstCall::from)
    }

    /// Whether it repeats a call of unknown outcome by force.
    pub fn is_forced(&self) -> bool {
        self.forced.is_some()
    }

    /// What the intent says of it, as JSON members with a comma in front of each.
    pub fn audit_members(&self, line: &mut Vec<u8>) {
        let mut member = |name: &[u8], mark: &Mark| {
            line.extend_from_slice(name);
            push_hex(mark, line);
            line.push(b'"');
        };
        if let Some(key) = &self.key {
            member(b",\"key\":\"", key);
        }
        member(b",\"print\":\"", &self.print);
        if let Some(Forced { id, .. }) = self.forced.as_deref() {
            line.extend_from_slice(format!(",\"forced\":\"{id}\"").as_bytes());
        }
    }

    /// From now on it may be on its way.
    #[must_use]
    pub fn sent(mut self) -> Self {
        self.step = Step::Sent;
        self
    }

    /// Whether its answer is kept.
    pub fn is_keyed(&self) -> bool {
        self.key.is_some()
    }

    /// The call is over, and its record closed; of a call with a key the record is committed, and its reply is kept. Returns
    /// what a success still waits for.
    pub fn end(mut self, answer: &Answer, names: Names) -> Option<Delivery> {
        let mut ending = None;
        if self.is_keyed() {
            if let Some(reply) = &answer.reply {
                self.table.replies.insert(self.id, reply.clone());
            }
            let (is_success, code) = (answer.outcome == Outcome::Succeeded, answer.result_code.as_ref());
            ending = answer.status.map(|status| Ending {
                is_success,
                status,
                result_code: code.map(|code| code[..].into()),
                is_resolved: false,
            });
        }
        self.end_in_tables(answer.outcome, ending, names)
    }

    /// Ends the call in the tables. Returns what a success still waits for.
    fn end_in_tables(&mut self, outcome: Outcome, ending: Option<Ending>, names: Names) -> Option<Delivery> {
        self.step = Step::Ended;
        if let Some(key) = self.key {
            let how = match outcome {
                Outcome::NotSent | Outcome::Refused => How::NotDone,
                Outcome::Succeeded | Outcome::Failed => ending.map_or(How::Unknown, How::Ended),
                Outcome::Unknown | Outcome::Replayed => How::Unknown,
            };
            self.table.claims().end(key, self.id, how, now());
        }
        if let Some(&Forced { id, key: Some(key) }) = self.forced.as_deref()
            && self.key != Some(key)
            && matches!(outcome, Outcome::Succeeded | Outcome::Unknown | Outcome::Replayed)
        {
            self.table.set_superseded(key, id, true);
        }
        let mark = self.mark?;
        let completion = match outcome {
            Outcome::Succeeded => {
                let forced = self.forced.as_deref().map(|forced| forced.id);
                return Some(Delivery::of_own_answer(&self.table, mark, (self.id, self.key, forced), names));
            }
            Outcome::NotSent | Outcome::Refused | Outcome::Failed => Completion::NotDone,
            Outcome::Unknown | Outcome::Replayed => Completion::Doubt(DoubtKind::Unknown),
        };
        self.table.duplicates().end(mark, self.id, completion, now());
        None
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let outcome = match self.step {
            Step::Claimed => Outcome::NotSent,
            Step::Sent => Outcome::Unknown,
            Step::Ended => return,
        };
        self.end_in_tables(outcome, None, Names::default());
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
