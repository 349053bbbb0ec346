//! Stage 5: the same call twice is one task.
//!
//! With an `Idempotency-Key` a caller may repeat a call as often as it likes: [`claims`] remembers each key for the
//! window, so that the task is sent once and its answer is given again. Without one, [`twins`] looks for an equal
//! call that may still be at work. Decides from key and body alone, before a token is spent. Guarantees that a claim
//! within the window is never forgotten: a full table refuses new keys, and a start reads the audit trail before
//! it takes any ([`rebuild`]). What a caller was told of a key is in the trail first: see [`Pending`]. Two
//! exceptions: 503 `audit_unavailable` tells of an intent that may still reach a stuck disk, and the head of a reply of
//! more than 64 KiB leaves before its end is known.

mod claims;
pub(crate) mod key;
mod rebuild;
mod recent;
mod twins;

use std::{
    fmt,
    hash::BuildHasher,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use moka::{policy::EvictionPolicy, sync::Cache};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    audit::{
        Answer, Audit, Queued, Record, RequestId, StoredReply,
        chain::{Hash, Keys, Mark, parse_hex},
        recovery::Doubt,
    },
    clock,
    config::{self, WithoutKey},
    error::Code,
    headers::Inbound,
    outcome::Outcome,
    upstream::{Failure, Reply, ReplyBody},
};
use claims::{Claims, Ending, How, Verdict};
pub use key::BadKey;
use key::Given;
use twins::{Twins, Was};

/// What a stored reply weighs beside its body, in bytes.
const REPLY_OVERHEAD: usize = 200;

/// What is remembered of calls, shared by all workers.
pub struct Idempotency {
    without_key: WithoutKey,
    marks: Arc<Keys>,
    hasher: RandomState,
    claims: Mutex<Claims>,
    twins: Mutex<Twins>,
    /// What may be forgotten: then a replay names the result code only.
    replies: Cache<Uuid, Arc<StoredReply>, RandomState>,
    is_rebuilt: AtomicBool,
    /// Bytes of the trail that were read, and that are to be read.
    read: [AtomicU64; 2],
}

/// One call, checked.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Who calls.
    pub caller: &'a str,
    /// Which route.
    pub route: &'a str,
    /// Who acts.
    pub operator: &'a HeaderValue,
    /// The keyed digest of the body.
    pub digest: &'a Hash,
    /// The request's id.
    pub id: RequestId,
}

/// What a call is.
#[derive(Debug)]
pub enum Begun {
    /// A new one; to be sent.
    Claim(Claim),
    /// The repetition of one that is over: the stored answer, and the first call's id.
    Replay(Replay, RequestId),
}

/// What would become of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Would {
    /// It would be sent; an equal one was before, perhaps.
    BeSent(Option<RequestId>),
    /// It would get the answer of the first one.
    BeReplayed(RequestId),
}

/// A stored answer, or what is left of it.
#[derive(Debug)]
pub struct Replay {
    status: u16,
    stored: Option<Arc<StoredReply>>,
    result_code: Option<Box<[u8]>>,
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
    #[error("the first call with this Idempotency-Key is still at work; call again in a second")]
    InProgress(RequestId),
    /// Nobody knows what became of the first call with this key.
    #[error(
        "the first call with this Idempotency-Key may have reached the upstream: look whether the task is assigned; \
         if it is not, repeat the call with `Idempotency-Force: {0}`"
    )]
    Unknown(RequestId),
    /// The key stands for another call.
    #[error("this Idempotency-Key was used for another body or operator; take a new key for a new task")]
    Mismatch(RequestId),
    /// An equal call without a key may still be at work.
    #[error(
        "an equal call was sent a moment ago, and is still at work or may have reached the upstream: look whether the \
         task is assigned; if it is meant twice, give each call an Idempotency-Key"
    )]
    Twin(RequestId),
    /// No more keys within the window.
    #[error("no more Idempotency-Keys can be remembered at the moment; calls without a key still go through")]
    Full,
    /// The trail is still read.
    #[error("the keys of earlier calls are still being read; calls without a key go through already")]
    Rebuilding,
}

impl Refused {
    /// The call that stands in the way.
    pub fn first(&self) -> Option<RequestId> {
        match self {
            Self::InProgress(id) | Self::Unknown(id) | Self::Mismatch(id) | Self::Twin(id) => Some(*id),
            Self::Key(_) | Self::NoKey | Self::Full | Self::Rebuilding => None,
        }
    }
}

/// A call's right to be sent. Dropped before it was sent, it gives its key back; dropped after that, what became
/// of it is unknown.
pub struct Claim {
    table: Arc<Idempotency>,
    id: Uuid,
    kind: Kind,
    is_sent: bool,
}

enum Kind {
    Keyed(Box<Keyed>),
    Unkeyed {
        twin: Mark,
        /// An equal one that was sent before.
        first: Option<Uuid>,
    },
    /// Nothing is remembered, or it is over.
    Free,
}

struct Keyed {
    key: Mark,
    print: Mark,
    /// The call of unknown outcome that this one repeats.
    forced: Option<Uuid>,
}

impl Idempotency {
    /// Remembers only what the start found in doubt; keyed calls are refused until [`Idempotency::rebuild`] is over.
    pub fn new(settings: &config::Idempotency, audit: &Audit) -> Self {
        let table = Self {
            without_key: settings.without_key,
            marks: audit.keys().clone(),
            hasher: RandomState::default(),
            claims: Mutex::new(Claims::new(settings.max_keys, seconds(settings.window))),
            twins: Mutex::new(Twins::new(settings.without_key, seconds(settings.fingerprint_window))),
            replies: Cache::builder()
                .eviction_policy(EvictionPolicy::lru())
                .weigher(|_: &Uuid, reply: &Arc<StoredReply>| weigh(reply))
                .max_capacity(settings.reply_memory)
                .time_to_live(settings.window)
                .build_with_hasher(RandomState::default()),
            is_rebuilt: AtomicBool::new(false),
            read: [AtomicU64::new(0), AtomicU64::new(0)],
        };
        for doubt in audit.left_in_doubt() {
            if let (Some(twin), Ok(id)) = (table.twin_of(doubt), doubt.id.parse()) {
                table.twins().end(twin, id, Was::Unknown, now());
            }
        }
        table
    }

    /// Says what [`Idempotency::begin`] would decide, and remembers nothing.
    pub fn look(&self, call: Call<'_>, head: &Inbound<'_>) -> Result<Would, Refused> {
        let Some(Given { key, force }) = key::read(head)? else {
            let twin = self.twin_for(call)?;
            let first = twin.map(|twin| self.twins().look(twin, now())).transpose();
            return first
                .map(|first| Would::BeSent(first.flatten().map(RequestId::from)))
                .map_err(twin_refused);
        };
        let (key, print) = self.marks_of(call, key)?;
        Ok(match passed(self.claims().look(key, print, force, now()))? {
            Passed::Begin { .. } => Would::BeSent(None),
            Passed::Replay(first, _) => Would::BeReplayed(first.into()),
        })
    }

    /// Decides whether a call is new.
    pub fn begin(self: &Arc<Self>, call: Call<'_>, head: &Inbound<'_>) -> Result<Begun, Refused> {
        match key::read(head)? {
            Some(Given { key, force }) => self.begin_keyed(call, key, force),
            None => self.begin_unkeyed(call),
        }
    }

    #[cold]
    fn begin_keyed(
        self: &Arc<Self>,
        call: Call<'_>,
        key: &[u8],
        force: Option<Uuid>,
    ) -> Result<Begun, Refused> {
        let (key, print) = self.marks_of(call, key)?;
        let id = call.id.uuid();
        let verdict = self.claims().claim(key, print, id, force, now());
        Ok(match passed(verdict)? {
            Passed::Begin { doubt } => {
                let kind = Kind::Keyed(Box::new(Keyed { key, print, forced: doubt }));
                Begun::Claim(Claim { table: self.clone(), id, kind, is_sent: false })
            }
            Passed::Replay(first, Ending { status, result_code }) => {
                let stored = self.replies.get(&first);
                Begun::Replay(Replay { status, stored, result_code }, first.into())
            }
        })
    }

    /// What stands for a key and for its call.
    fn marks_of(&self, call: Call<'_>, key: &[u8]) -> Result<(Mark, Mark), Refused> {
        if !self.is_rebuilt.load(Ordering::Acquire) {
            return Err(Refused::Rebuilding);
        }
        let Call { caller, route, operator, digest, .. } = call;
        let key = self.marks.mark(&[b"key", caller.as_bytes(), route.as_bytes(), key]);
        let print = self.marks.mark(&[b"print", digest, operator.as_bytes(), route.as_bytes()]);
        Ok((key, print))
    }

    fn begin_unkeyed(self: &Arc<Self>, call: Call<'_>) -> Result<Begun, Refused> {
        let id = call.id.uuid();
        let kind = match self.twin_for(call)? {
            None => Kind::Free,
            Some(twin) => {
                let begun = self.twins().begin(twin, id, now());
                Kind::Unkeyed { twin, first: begun.map_err(twin_refused)? }
            }
        };
        Ok(Begun::Claim(Claim { table: self.clone(), id, kind, is_sent: false }))
    }

    /// What stands for a call without a key, where equal ones are looked for.
    fn twin_for(&self, call: Call<'_>) -> Result<Option<Mark>, Refused> {
        match self.without_key {
            WithoutKey::RequireKey => Err(Refused::NoKey),
            WithoutKey::Off => Ok(None),
            WithoutKey::Guard | WithoutKey::Block | WithoutKey::Warn => {
                let Call { caller, route, operator, digest, .. } = call;
                Ok(Some(self.fingerprint(caller, route, operator.as_bytes(), digest)))
            }
        }
    }

    /// The fingerprint of an intent.
    fn twin_of(&self, doubt: &Doubt) -> Option<Mark> {
        let digest = parse_hex(doubt.digest.as_ref()?)?;
        let operator = doubt.operator.as_ref()?.as_bytes();
        Some(self.fingerprint(doubt.caller.as_ref()?, doubt.route.as_ref()?, operator, &digest))
    }

    /// Tells equal calls from others. Stands nowhere but in memory: half of the digest, which is keyed already, and with
    /// it whose call it is, of which there are as many as are configured.
    fn fingerprint(&self, caller: &str, route: &str, operator: &[u8], digest: &Hash) -> Mark {
        let whose = self.hasher.hash_one((caller, route, operator)).to_ne_bytes();
        let mut mark = [0; 16];
        for (at, byte) in mark.iter_mut().enumerate() {
            *byte = digest[at] ^ whose[at % whose.len()];
        }
        mark
    }

    /// For `/status`.
    pub fn status(&self) -> Value {
        let [read, all] = self.read.each_ref().map(|bytes| bytes.load(Ordering::Relaxed));
        json!({
            "keys": self.keys(),
            "rebuilt": self.is_rebuilt.load(Ordering::Relaxed),
            "trail_bytes_read": read,
            "trail_bytes": all,
        })
    }

    /// Whether no call at all can be taken yet.
    pub fn holds_all_up(&self) -> bool {
        self.without_key == WithoutKey::RequireKey && !self.is_rebuilt.load(Ordering::Relaxed)
    }

    /// How many keys are remembered.
    pub fn keys(&self) -> usize {
        self.claims().len()
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn twins(&self) -> MutexGuard<'_, Twins> {
        self.twins.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        Verdict::Mismatch(first) => Err(Refused::Mismatch(first.into())),
        Verdict::Full => Err(Refused::Full),
    }
}

fn twin_refused(first: Uuid) -> Refused {
    Refused::Twin(first.into())
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
    /// An equal call that was sent before this one: it goes out, and is flagged.
    pub fn first(&self) -> Option<RequestId> {
        match self.kind {
            Kind::Unkeyed { first, .. } => first.map(RequestId::from),
            Kind::Keyed(_) | Kind::Free => None,
        }
    }

    /// What the intent says of it, as JSON members with a comma in front of each.
    pub fn audit_members(&self, line: &mut Vec<u8>) {
        if let Kind::Keyed(keyed) = &self.kind {
            for (name, mark) in [("key", keyed.key), ("print", keyed.print)] {
                line.extend_from_slice(
                    format!(",\"{name}\":\"{:032x}\"", u128::from_be_bytes(mark)).as_bytes(),
                );
            }
            if let Some(id) = keyed.forced {
                line.extend_from_slice(format!(",\"forced\":\"{id}\"").as_bytes());
            }
        }
    }

    /// From now on it may be on its way.
    #[must_use]
    pub fn sent(mut self) -> Self {
        self.is_sent = true;
        self
    }

    /// Whether its answer is kept.
    pub fn is_keyed(&self) -> bool {
        matches!(self.kind, Kind::Keyed(_))
    }

    /// Puts the outcome on record. A call with a key is over only when that is safe.
    pub fn finish(mut self, record: Record, answer: &Answer) -> Option<Box<Pending>> {
        let queued = record.finish(answer);
        if !self.is_keyed() {
            self.end(answer.outcome, None);
            return None;
        }
        Some(Box::new(Pending { queued: queued?, answer: answer.clone(), claim: self }))
    }

    fn end(&mut self, outcome: Outcome, ending: Option<Ending>) {
        match std::mem::replace(&mut self.kind, Kind::Free) {
            Kind::Keyed(keyed) => {
                let how = match outcome {
                    Outcome::NotSent | Outcome::Refused => How::NotDone,
                    Outcome::Succeeded | Outcome::Failed => ending.map_or(How::Unknown, How::Ended),
                    Outcome::Unknown | Outcome::Replayed => How::Unknown,
                };
                self.table.claims().end(keyed.key, self.id, how, now());
            }
            Kind::Unkeyed { twin, .. } => {
                let was = match outcome {
                    Outcome::NotSent | Outcome::Refused | Outcome::Failed => Was::NotDone,
                    Outcome::Succeeded => Was::Done,
                    Outcome::Unknown | Outcome::Replayed => Was::Unknown,
                };
                self.table.twins().end(twin, self.id, was, now());
            }
            Kind::Free => {}
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.end(if self.is_sent { Outcome::Unknown } else { Outcome::NotSent }, None);
    }
}

/// The end of a call with a key, while its outcome is not safe yet. The caller learns of it afterwards, so that what
/// it was told is what a restart reads.
#[derive(Debug)]
pub struct Pending {
    queued: Queued,
    answer: Answer,
    claim: Claim,
}

impl Pending {
    /// Hands on what the caller is to be told, once it is safe. If that takes too long, the caller is told to ask
    /// again, and the claim is settled later.
    pub async fn settle(self, told: Result<Reply, Failure>, deadline: Instant) -> Result<Reply, Failure> {
        if self.is_safe_by(deadline).await { told } else { Err(Failure::not_on_record()) }
    }

    /// Settles the claim once its outcome is safe; whether that was in time.
    pub async fn is_safe_by(self, deadline: Instant) -> bool {
        while !self.queued.is_safe().await {
            if Instant::now() >= deadline {
                tokio::spawn(async move {
                    while !self.queued.is_safe().await {}
                    self.close();
                });
                return false;
            }
        }
        self.close();
        true
    }

    fn close(self) {
        let Self { answer: Answer { outcome, status, result_code, reply, .. }, mut claim, .. } = self;
        if let Some(reply) = reply {
            claim.table.replies.insert(claim.id, reply);
        }
        let result_code = result_code.map(|code| code[..].into());
        claim.end(outcome, status.map(|status| Ending { status, result_code }));
    }
}

impl Replay {
    /// The answer, as the first caller got it.
    pub fn into_reply(self, result_field: &str, first: RequestId) -> Reply {
        let stored = self.stored.unwrap_or_else(|| {
            Arc::new(StoredReply::without_body(self.status, result_field, self.result_code.as_deref(), first))
        });
        let mut headers = HeaderMap::new();
        if let Some(media_type) =
            stored.content_type.as_ref().and_then(|text| HeaderValue::from_str(text).ok())
        {
            headers.insert(header::CONTENT_TYPE, media_type);
        }
        Reply {
            status: StatusCode::from_u16(stored.status).unwrap_or_default(),
            headers,
            body: ReplyBody::Whole(stored.body.clone()),
            outcome: Outcome::Replayed,
        }
    }
}

impl Failure {
    /// The upstream has answered, and that can't be put on record.
    fn not_on_record() -> Self {
        let retry_after = Some(Duration::from_secs(1));
        Self { code: Code::RequestInProgress, outcome: Outcome::Unknown, retry_after }
    }
}

/// Seconds since 1970, as the wall clock showed it when this process first looked: a jump of it since then ends no
/// window.
fn now() -> u32 {
    static START: LazyLock<u64> = LazyLock::new(|| clock::unix_nanos().saturating_sub(clock::nanos()));
    u32::try_from((*START + clock::nanos()) / 1_000_000_000).unwrap_or(u32::MAX)
}

fn weigh(reply: &StoredReply) -> u32 {
    u32::try_from(reply.body.len() + REPLY_OVERHEAD).unwrap_or(u32::MAX)
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}
