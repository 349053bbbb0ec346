//! Crash recovery of the keys: reads the claims of the window back from the write-ahead trail, while the workers serve.
//!
//! The intent of a call with a key names the key. Its outcome says how the call ended, and contains the reply. Without an
//! outcome the call is of unknown outcome. Successes of calls without a key are read back, too. Doubts about such calls are not:
//! they are on the unresolved list, which the start has read already.
//!
//! Guarantees that a key which was used within the window is not taken for a new one. The hash chain shows lines that are
//! missing or were changed. Each of them, and each line that cannot be read, is a loss. After a loss, keys that are not found are
//! refused. The age of a record depends on no wall clock: see [`crate::audit::age`].
//!
//! One thread reads and parses, another applies. A million keys, more than a gigabyte, are known within 5 s.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{fs, io, thread};

use jiff::Timestamp;
use serde::Deserialize;
use uuid::Uuid;

use super::claims::{Claims, KeyedCompletion, StoredResult, Wanted};
use super::{Idempotency, Meanwhile, now, seconds, weigh};
use crate::audit::age::Ages;
use crate::audit::chain::{Lines, first_seq, segments};
use crate::audit::loss::{ChainCheck, LineCheck, Loss};
use crate::audit::unresolved_calls::{CallState, RESOLUTION, Resolution, UnresolvedCall};
use crate::audit::{Audit, StoredReply};
use crate::config;
use crate::keyed_hash::{KeyedFingerprint, parse_hex};
use crate::model::outcome::Outcome;

/// The longest time from an intent to its outcome, in seconds, with a margin: a call that began this long before the window
/// may have ended in it.
// An exchange takes at most 10 minutes, the largest `timeout` that the configuration allows.
const LONGEST_CALL: u32 = 15 * 60;

/// The least number of bytes of the trail that a call with a key takes, with intent and outcome.
// Only used to reserve room in the table. A wrong figure costs memory or a growth of the index, no key.
const LEAST_CALL: u64 = 1024;

/// The largest number of records that are handed over at once.
// In batches, so that the threads do not wake each other for each record.
const BATCH: usize = 1000;
/// A batch is also handed over once this many bytes of the trail have been read for it.
const BATCH_BYTES: usize = 1 << 20;
/// The largest number of batches that wait to be applied.
// The bound keeps a reader that is faster than the other half from filling the memory.
const BATCHES: usize = 8;

/// The pause after a reading that failed.
const RETRY: Duration = Duration::from_secs(1);

/// The members of a record that matter here.
// Borrowed from the line, and no others: a start may parse a million records, and must be fast.
#[derive(Deserialize)]
struct Line<'a> {
    time: &'a str,
    kind: &'a str,
    event: Option<&'a str>,
    id: Option<Uuid>,
    caller: Option<&'a str>,
    key: Option<&'a str>,
    print: Option<&'a str>,
    forced: Option<Uuid>,
    outcome: Option<&'a str>,
    status: Option<u16>,
    #[serde(borrow)]
    result_code: Option<Cow<'a, str>>,
    reply: Option<StoredReply>,
}

/// What a record says about a call.
struct CallRecord {
    id: Uuid,
    /// The time of the record by the present clock: *now* minus its age, in seconds since 1970.
    time: u32,
    what: What,
}

enum What {
    /// The intent of a call with a key.
    Claim(Wanted),
    /// Any other intent; `None` if it is too old to matter or cannot be read.
    Intent(Option<Box<UnresolvedCall>>),
    Outcome {
        outcome: Option<Outcome>,
        status: Option<u16>,
        result_code: Option<Arc<[u8]>>,
        reply: Option<StoredReply>,
    },
    Resolution(Box<UnresolvedCall>, Resolution),
}

/// A call whose intent has been read and whose outcome has not: `Key` with the key that it holds, or `Body` if it has no key.
/// `Nothing` if its outcome does not matter.
enum Open {
    Key(KeyedFingerprint),
    Body(Box<UnresolvedCall>),
    Nothing,
}

/// The parsing half: reads and parses lines and checks their chain, on a thread of its own, while [`Reading`] applies them.
struct Parser<'a> {
    table: &'a Idempotency,
    /// The number of the last record to read.
    last: u64,
    /// The beginning of the window, in seconds since 1970.
    window_from: u32,
    second: Second,
    /// The ages of records at the moment `now`.
    ages: Ages,
    now: u32,
    chain: ChainCheck<'a>,
    /// The length of the window, if the first record must be older than the window and has not been checked yet; otherwise
    /// `None`.
    window_time: Option<Duration>,
}

/// The applying half: builds the claims from what [`Parser`] hands over.
struct Reading<'a> {
    table: &'a Idempotency,
    // A table of its own, put in place at the end: an attempt that fails is dropped as a whole, and the other table's lock is not
    // taken for each record.
    claims: Claims,
    open: HashMap<Uuid, Open, foldhash::fast::RandomState>,
    replies: Replies,
    /// The last resolution of each call.
    resolved: HashMap<Uuid, (UnresolvedCall, Resolution, u32), foldhash::fast::RandomState>,
    /// The beginning of the window, in seconds since 1970.
    window_from: u32,
    /// The beginning of the shorter window of successes without a key, in seconds since 1970.
    successes_from: u32,
}

/// The newest replies, as many as `reply_memory` has room for.
// To put all of them into the cache, which then evicts most, took half of the time of a start.
struct Replies {
    newest: VecDeque<(Uuid, StoredReply)>,
    weight: u64,
    max: u64,
}

/// The second that was parsed last, and its text.
// A busy second has many records, and to parse a date takes longer than to compare its text.
#[derive(Default)]
struct Second {
    text: String,
    unix: u32,
}

impl Idempotency {
    /// Rebuilds the claims from the part of the trail that covers the window, up to the start of this process. After an error it
    /// tries again each second until it succeeds.
    ///
    /// Blocks, for seconds if the trail is long: to be called on a thread of its own. Calls with a key are refused until it
    /// returns.
    ///
    /// # Panics
    ///
    /// If the thread that parses panics.
    pub fn rebuild(&self, settings: &config::Idempotency, directory: &Path, audit: &Audit) {
        let mut failed = false;
        while let Err(error) = self.try_rebuild(settings, directory, audit) {
            // Once, not each second: the cause rarely changes, and `/status` says that the keys are not known yet.
            if !failed {
                tracing::error!(
                    %error,
                    "earlier Idempotency-Keys cannot be read from the audit trail; calls with a key are refused until \
                     they can"
                );
            }
            failed = true;
            thread::sleep(RETRY);
        }
        self.is_rebuilt.store(true, Ordering::Release);
        tracing::info!(
            keys = self.keys(),
            "the Idempotency-Keys of the window were read from the audit trail"
        );
    }

    /// Reads the trail once. After an error no claim has changed, and successes that were restored are not added twice by the
    /// next attempt.
    // Reading begins `LONGEST_CALL` before the window: an intent from that time may have its outcome in the window.
    fn try_rebuild(&self, settings: &config::Idempotency, directory: &Path, audit: &Audit) -> io::Result<()> {
        let now = now();
        let window = seconds(settings.window);
        let window_from = now.saturating_sub(window);
        let successes_from = now.saturating_sub(seconds(settings.fingerprint_window));
        let mut segments = segments(directory)?;
        let within = settings.window + Duration::from_secs(LONGEST_CALL.into());
        let (first, ages) = audit.ages(&segments, within)?;
        segments.drain(..first);
        let sizes =
            segments.iter().map(|path| Ok(fs::metadata(path)?.len())).collect::<io::Result<Vec<_>>>()?;
        let size = sizes.iter().sum();
        self.read[0].store(0, Ordering::Relaxed);
        self.read[1].store(size, Ordering::Relaxed);
        let room = usize::try_from(size / LEAST_CALL).unwrap_or(usize::MAX);
        let mut reading = Reading {
            table: self,
            claims: Claims::with_room(settings.max_keys, window, room),
            open: HashMap::default(),
            replies: Replies { newest: VecDeque::new(), weight: 0, max: settings.reply_memory },
            resolved: HashMap::default(),
            window_from,
            successes_from,
        };
        let (last, second) = (audit.begun(), Second::default());
        let chain = ChainCheck::begin(audit.keys(), &segments)?;
        // Retention removes nothing of the window. A trail whose first record is not number 1 and lies in the window has lost
        // its beginning.
        let may_begin_late = first == 0 && segments.first().is_some_and(|path| first_seq(path) > 1);
        let window_time = may_begin_late.then_some(settings.window);
        let parser = Parser { table: self, last, window_from, second, ages, now, chain, window_time };
        let loss = thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(BATCHES);
            let parsing = thread::Builder::new()
                .name("key-rebuild".into())
                .spawn_scoped(scope, move || parser.read(&segments, &sender))?;
            receiver.into_iter().flatten().for_each(|call_record| reading.take(call_record));
            parsing.join().unwrap_or_else(|panic| resume_unwind(panic))
        })?;
        reading.close();
        if let Some(loss) = loss {
            self.lose(loss, window);
        }
        Ok(())
    }
}

impl Parser<'_> {
    /// Parses the segments and sends the records to the applying half, in order. Returns the loss, if a part of the trail is
    /// lost. Fails if a segment cannot be read.
    // A send fails only if the applying half has panicked. Then the scope ends with that panic, so the result is not used.
    fn read(
        mut self,
        segments: &[PathBuf],
        sender: &SyncSender<Vec<CallRecord>>,
    ) -> io::Result<Option<Loss>> {
        let (mut batch, mut bytes) = (Vec::with_capacity(BATCH), 0);
        for (index, path) in segments.iter().enumerate() {
            self.chain.enter(path, segments.get(index + 1));
            let mut lines = Lines::open(path)?;
            // Reads up to the event of this start. Later records are of calls that this process has in its tables. Stops at the
            // record that the chain proves, not at its number: a changed line with too high a number would hide the rest.
            while !self.chain.has_proven(self.last)
                && let Some(line) = lines.read()?
            {
                let checked = self.chain.check(line.number, line.bytes);
                let record = parse::<Line<'_>>(line.bytes).ok();
                if let Some(record) = record.filter(|_| checked != LineCheck::Repeated) {
                    self.look_for_late_begin(record.time, checked);
                    match record.kind {
                        // An event can free a key or make records look old. So it counts only if the chain proves it.
                        "event" if checked == LineCheck::Proven => {
                            self.ages.anchor(line.bytes);
                            self.chain.event(line.number, record.event.unwrap_or_default(), line.bytes);
                            batch.extend(self.resolution(&record, line.bytes));
                        }
                        "event" => {}
                        _ => batch.extend(self.call_record(record, line.bytes, checked)),
                    }
                }
                self.table.read[0].fetch_add(line.bytes.len() as u64 + 1, Ordering::Relaxed);
                bytes += line.bytes.len();
                if batch.len() == BATCH || bytes >= BATCH_BYTES {
                    bytes = 0;
                    let _ = sender.send(std::mem::replace(&mut batch, Vec::with_capacity(BATCH)));
                }
            }
        }
        let _ = sender.send(batch);
        Ok(self.chain.loss())
    }

    /// Checks the first record of a trail that does not begin with record 1. Reports a loss if that record lies in the
    /// window, or was changed, so that its age is unknown. Does nothing for later records and other trails.
    fn look_for_late_begin(&mut self, time: &str, checked: LineCheck) {
        if let Some(window) = self.window_time.take()
            && (checked == LineCheck::Changed || self.ages.age(self.second.millis(time)) <= window)
        {
            self.chain.begins_late();
        }
    }

    /// Returns the resolution that an event contains; `None` for any other event.
    fn resolution(&mut self, line: &Line<'_>, bytes: &[u8]) -> Option<CallRecord> {
        let id = line.id.filter(|_| line.event == Some(RESOLUTION))?;
        let (call, result) = UnresolvedCall::resolved_by(bytes)?;
        let time = self.time(line, LineCheck::Proven);
        Some(CallRecord { id, time, what: What::Resolution(Box::new(call), result) })
    }

    /// Returns *now* minus the age of a record, in seconds since 1970. A record that was changed counts as new, whatever time it
    /// states: if its call were forgotten too early, the call could be sent twice.
    fn time(&mut self, line: &Line<'_>, checked: LineCheck) -> u32 {
        if checked == LineCheck::Changed {
            return self.now;
        }
        let millis = self.second.millis(line.time);
        self.now.saturating_sub(seconds(self.ages.age(millis)))
    }

    /// What an intent or an outcome says about its call; `None` for any other record, and for one without an id.
    fn call_record(&mut self, line: Line<'_>, bytes: &[u8], checked: LineCheck) -> Option<CallRecord> {
        let (id, time) = (line.id?, self.time(&line, checked));
        let is_changed = checked == LineCheck::Changed;
        let what = match line.kind {
            // A changed intent is believed: it may name a key, which then is not taken for a new one.
            "intent" => self.intent(&line, time, bytes),
            "outcome" => What::Outcome {
                // A changed outcome is believed only where that frees no key. `not_sent` and `refused` would.
                outcome: Outcome::ALL
                    .into_iter()
                    .find(|outcome| line.outcome == Some(outcome.as_str()))
                    .filter(|outcome| !is_changed || matches!(outcome, Outcome::Succeeded | Outcome::Failed)),
                status: line.status,
                result_code: line.result_code.map(|code| code.as_bytes().into()),
                reply: line.reply,
            },
            _ => return None,
        };
        Some(CallRecord { id, time, what })
    }

    /// Returns what an intent says about its call. If the intent has a key and a fingerprint, that is the claim on the key.
    /// Otherwise it is the call itself, unless the intent is too old to matter or cannot be parsed.
    fn intent(&self, line: &Line<'_>, time: u32, bytes: &[u8]) -> What {
        if let (Some(key), Some(print)) = (line.key.and_then(parse_hex), line.print.and_then(parse_hex)) {
            let caller = self.table.hash_of(line.caller.unwrap_or_default());
            return What::Claim(Wanted { key, print, caller, share: usize::MAX, force: line.forced });
        }
        // An older intent cannot matter, and to parse all of its members is slow.
        let is_new = time.saturating_add(LONGEST_CALL) > self.window_from;
        What::Intent(if is_new { serde_json::from_slice(bytes).ok() } else { None })
    }
}

impl Reading<'_> {
    /// Applies one record.
    fn take(&mut self, CallRecord { id, time, what }: CallRecord) {
        match what {
            What::Claim(wanted) => {
                self.claims.restore(wanted, id, time);
                self.open.insert(id, Open::Key(wanted.key));
            }
            What::Intent(open) => drop(self.open.insert(id, open.map_or(Open::Nothing, Open::Body))),
            What::Outcome { outcome, status, result_code, reply } => match self.open.remove(&id) {
                Some(Open::Key(key)) => {
                    let completion = match (outcome, status) {
                        (Some(Outcome::NotSent | Outcome::Refused), _) => KeyedCompletion::NotDone,
                        (Some(Outcome::Succeeded | Outcome::Failed), Some(status)) => {
                            // The claim of a call that ended before the window expires at once, so that no call can ask for its
                            // reply.
                            if let Some(reply) = reply.filter(|_| time >= self.window_from) {
                                self.replies.push(id, reply);
                            }
                            let is_success = outcome == Some(Outcome::Succeeded);
                            KeyedCompletion::Ended(StoredResult {
                                is_success,
                                status,
                                result_code,
                                is_resolved: false,
                            })
                        }
                        _ => KeyedCompletion::Unknown,
                    };
                    self.claims.end(key, id, completion, time);
                }
                Some(Open::Body(open)) => self.end(&open, outcome, time),
                Some(Open::Nothing) | None => {}
            },
            What::Resolution(call, result) => self.resolve(*call, result, time),
        }
    }

    /// Applies a resolution to the claim of its call, and keeps the resolution for [`Self::close`]. Does nothing if the
    /// resolution is older than the window.
    ///
    /// If the resolution says that the call was done, `close` restores a doubt for it. The unresolved list may no longer contain
    /// such a call if the call began before the window.
    fn resolve(&mut self, call: UnresolvedCall, result: Resolution, time: u32) {
        if time < self.window_from {
            return;
        }
        self.table.resolve_claim(&mut self.claims, &call, result, time);
        self.resolved.insert(call.id, (call, result, time));
    }

    /// Applies the outcome of a call without a key: restores a recent success, and ignores any other outcome.
    fn end(&self, open: &UnresolvedCall, outcome: Option<Outcome>, time: u32) {
        // Only successes: doubts are on the list that the start has read.
        if outcome == Some(Outcome::Succeeded) && time >= self.successes_from {
            self.table.restore_success(open, time);
        }
    }

    /// Replaces the shared claims by those that were read, and stores the replies. A call that still has no outcome is of
    /// unknown outcome.
    // The lock of `meanwhile` is held to the end, so that a resolution that comes now waits and then finds the new claims. What
    // came meanwhile is applied after the trail, since it is newer.
    fn close(mut self) {
        for (id, open) in self.open {
            match open {
                Open::Key(key) => self.claims.end(key, id, KeyedCompletion::Unknown, now()),
                Open::Body(_) | Open::Nothing => {}
            }
        }
        for (id, reply) in self.replies.newest {
            self.table.replies.insert(id, Arc::new(reply));
        }
        self.claims.sort();
        let mut meanwhile = self.table.meanwhile();
        let Meanwhile { resolved, superseded } = meanwhile.take().unwrap_or_default();
        for call in self.table.audit.unresolved().unknown().filter(|call| call.superseded) {
            if let Some(key) = call.key.as_ref().and_then(|key| parse_hex(key)) {
                self.claims.set_superseded(key, call.id, true);
            }
        }
        for (key, id, superseded) in superseded {
            self.claims.set_superseded(key, id, superseded);
        }
        for (call, result) in resolved {
            self.table.resolve_claim(&mut self.claims, &call, result, now());
            // The duplicates have this result already. An older one from the trail must not replace it.
            self.resolved.remove(&call.id);
        }
        for (call, result, time) in self.resolved.into_values() {
            if result == Resolution::Done {
                let call = UnresolvedCall { state: CallState::Done, ..call };
                self.table.restore(&call, time);
            }
        }
        *self.table.claims() = self.claims;
    }
}

impl Replies {
    /// Adds a reply, and drops the oldest ones that no longer fit.
    fn push(&mut self, id: Uuid, reply: StoredReply) {
        self.weight += u64::from(weigh(&reply));
        self.newest.push_back((id, reply));
        while self.weight > self.max
            && let Some((_, oldest)) = self.newest.pop_front()
        {
            self.weight -= u64::from(weigh(&oldest));
        }
    }
}

impl Second {
    /// The milliseconds since 1970 of a record's time; now, if the text is no time.
    fn millis(&mut self, time: &str) -> i64 {
        let millis = time.get("2026-01-01T00:00:00.".len()..).and_then(|rest| rest.get(..3)?.parse().ok());
        i64::from(self.unix(time)) * 1000 + millis.unwrap_or(0)
    }

    /// Returns the seconds since 1970 of a record's time, as the function [`unix`] does. Parses the text only if its second
    /// differs from that of the last call.
    fn unix(&mut self, time: &str) -> u32 {
        let (second, rest) = time.split_at_checked("2026-01-01T00:00:00".len()).unwrap_or((time, ""));
        let is_micros = |rest: &str| rest.len() == 6 && rest.bytes().all(|digit| digit.is_ascii_digit());
        if !rest.strip_prefix('.').and_then(|rest| rest.strip_suffix('Z')).is_some_and(is_micros) {
            // Not as the gateway writes it. With an offset after it, the same text names another second.
            return unix(time);
        }
        if self.text != second {
            self.text.replace_range(.., second);
            self.unix = unix(time);
        }
        self.unix
    }
}

/// Parses a line.
// Checked for UTF-8 as a whole first: serde_json then checks no member for it. A line with a damaged text is still parsed, since
// its key may be readable.
fn parse<'a, T: Deserialize<'a>>(line: &'a [u8]) -> serde_json::Result<T> {
    match std::str::from_utf8(line) {
        Ok(text) => serde_json::from_str(text),
        Err(_) => serde_json::from_slice(line),
    }
}

/// The seconds since 1970 of a time; now, if the text is no time, so that its call is not forgotten too early.
fn unix(time: &str) -> u32 {
    time.parse::<Timestamp>().ok().and_then(|time| u32::try_from(time.as_second()).ok()).unwrap_or_else(now)
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Instant;

    use http::HeaderValue;
    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;
    use crate::audit;
    use crate::audit::unresolved_calls::UNDELIVERED;
    use crate::audit::{ExchangeResult, Permit};
    use crate::config::WithoutKey;
    use crate::idempotency::{Call, ClaimDecision, Refused};
    use crate::keyed_hash::Hash;
    use crate::model::peer::Peer;
    use crate::model::request_id::RequestId;
    use crate::model::stage::Stage;
    use crate::registry::Registry;

    const OPERATOR: &str = "1611917095665261978";

    fn settings() -> config::Idempotency {
        config::Idempotency {
            window: Duration::from_secs(24 * 60 * 60),
            max_keys: 1_000_000,
            is_max_keys_set: false,
            reply_memory: 64 << 20,
            without_key: WithoutKey::Guard,
            fingerprint_window: Duration::from_secs(600),
        }
    }

    pub(in super::super) fn start(directory: &Path) -> Audit {
        let options = audit::Options {
            segment_size: 64 << 20,
            queue: 16 * 1024,
            // Far above what a busy machine takes, so that only the trail's contents decide.
            intent_deadline: Duration::from_secs(60),
            ..audit::Options::small(directory)
        };
        Audit::start(&options, audit::AuditMetrics::new(&mut Registry::new())).unwrap()
    }

    pub(in super::super) fn table(audit: &Audit) -> Arc<Idempotency> {
        Arc::new(Idempotency::new(&settings(), audit, None))
    }

    fn answer() -> ExchangeResult {
        let reply = StoredReply {
            status: 200,
            content_type: Some("application/json".into()),
            body: r#"{"resultCode":"0409000","resultDesc":"Operation succeeded."}"#.into(),
        };
        ExchangeResult {
            outcome: Outcome::Succeeded,
            code: None,
            cause: None,
            status: Some(200),
            upstream_status: Some(200),
            upstream_id: None,
            result_code: Some(b"0409000"[..].into()),
            attempts: 1,
            token_generation: 1,
            note: None,
            reply: Some(Arc::new(reply)),
        }
    }

    /// Begins the call with the key `number`. Returns the digest of its body, too.
    fn begin(audit: &Audit, table: &Arc<Idempotency>, id: RequestId, number: u64) -> (Hash, ClaimDecision) {
        let operator = HeaderValue::from_static(OPERATOR);
        let digest = audit.keys().digest(&number.to_be_bytes());
        let (caller, route) = ("qa-console", "appointQualityTask");
        let id = id.uuid();
        let call =
            Call { caller, is_alone: true, max_keys: None, route, operator: &operator, digest: &digest, id };
        (digest, table.begin_keyed(call, number.to_string().as_bytes(), None).unwrap())
    }

    /// Makes calls with keys that all succeed, and a last one that is open when the process ends.
    async fn call(audit: &Audit, table: &Arc<Idempotency>, keys: u64) {
        table.is_rebuilt.store(true, Ordering::Relaxed);
        let mut pending = Vec::new();
        for number in 0..=keys {
            let mut record = audit.open(Peer::Tcp(([127, 0, 0, 1], 5000).into()));
            record.caller("qa-console".into());
            record.route("appointQualityTask".into());
            record.operator(HeaderValue::from_static(OPERATOR));
            record.enter(Stage::Idempotency);
            let (digest, ClaimDecision::Claim(claim)) = begin(audit, table, record.id(), number) else {
                panic!()
            };
            let members = |line: &mut Vec<u8>| claim.audit_members(line);
            let intent = record.intent(&Permit::default(), 8, &digest, &members).unwrap();
            if number == keys {
                // Forgotten, not dropped: the drop would record an outcome, and a kill records none.
                std::mem::forget(intent.await.unwrap());
                return;
            }
            pending.push((intent, claim));
            // A thousand at a time: the queue of the trail has room for 16,384 records.
            if number % 1000 == 999 {
                let mut finished = Vec::new();
                for (intent, claim) in pending.drain(..) {
                    let record = intent.await.unwrap().sent();
                    finished.push((record.finish(&answer()), claim.sent()));
                }
                for ((queued, names), claim) in finished {
                    assert!(queued.is_committed().await);
                    claim.end(&answer(), names).unwrap().hand_over();
                }
            }
        }
    }

    async fn check(keys: u64) -> Duration {
        let folder = TempDir::new().unwrap();
        let audit = start(folder.path());
        let before = table(&audit);
        call(&audit, &before, keys).await;
        audit.close();
        // The lock of the directory goes with it, once the writer has ended.
        drop(audit);

        let began = Instant::now();
        let audit = start(folder.path());
        let serves = began.elapsed();
        let after = table(&audit);
        after.rebuild(&settings(), folder.path(), &audit);
        let took = began.elapsed();
        println!("{keys} keys: serves after {serves:?}, knows them after {took:?}");
        assert_eq!(after.keys() as u64, keys + 1);
        // The oldest and the newest: of many replies the newest are the ones that are kept.
        for (number, has_body) in [(0, keys <= KEPT), (keys - 1, true)] {
            let id = audit.open(Peer::Tcp(([127, 0, 0, 1], 5000).into())).id();
            let ClaimDecision::Replay(replay) = begin(&audit, &after, id, number).1 else { panic!() };
            assert_eq!((replay.result.status, replay.stored.is_some()), (200, has_body), "{number}");
        }
        took
    }

    /// Under `block` a success refuses an equal call, and successes are known only once the trail is read.
    #[test]
    fn block_mode_rejects_calls_until_the_rebuild_ends() {
        let folder = TempDir::new().unwrap();
        let audit = start(folder.path());
        for (without_key, refused) in [
            (WithoutKey::Guard, None),
            (WithoutKey::Warn, None),
            (WithoutKey::Block, Some(Refused::Rebuilding)),
        ] {
            let settings = config::Idempotency { without_key, ..settings() };
            let table = Arc::new(Idempotency::new(&settings, &audit, None));
            let (operator, digest) = (HeaderValue::from_static(OPERATOR), audit.keys().digest(b"body"));
            let (caller, route, id) = ("qa-console", "appointQualityTask", Uuid::from_u128(1));
            let call = Call {
                caller,
                is_alone: true,
                max_keys: None,
                route,
                operator: &operator,
                digest: &digest,
                id,
            };
            let begin =
                || table.claim(call, table.print(call), None, None).err().map(|refusal| refusal.reason);
            assert_eq!(begin(), refused, "{without_key:?}");
            assert_eq!(table.holds_all_up(), refused.is_some(), "{without_key:?}");
            table.rebuild(&settings, folder.path(), &audit);
            assert_eq!((begin(), table.holds_all_up()), (None, false), "{without_key:?}");
        }
    }

    /// Ids are in the order of the wall clock. In the second chain the clock went back between the first call and the second.
    #[test]
    fn forced_call_is_linked_to_its_unkeyed_original_in_any_id_order() {
        for (chain, stands) in [
            ([(1, false), (2, true), (3, true)], true),
            ([(9, false), (2, true), (3, true)], true),
            ([(1, true), (2, true), (3, true)], false),
        ] {
            let folder = TempDir::new().unwrap();
            let audit = start(folder.path());
            let mut forced = None;
            let mut last = Value::Null;
            for (number, is_keyed) in chain {
                let id = RequestId::from(Uuid::from_u128(number));
                last = json!({ "id": id.as_str(), "caller": "qa-console", "print": "07".repeat(16) });
                if is_keyed {
                    last["key"] = "08".repeat(16).into();
                }
                if let Some(forced) = forced.replace(id) {
                    last["forced"] = forced.as_str().into();
                }
                audit.event(UNDELIVERED, last.as_object().unwrap().clone());
            }
            audit.close();
            drop(audit);
            let call: UnresolvedCall = serde_json::from_value(last).unwrap();
            let (_, duplicate) = table(&start(folder.path())).identify(&call).unwrap();
            assert_eq!(duplicate.replaces_unkeyed, stands, "{chain:?}");
        }
    }

    /// The number of keys up to which `reply_memory` has room for all replies.
    const KEPT: u64 = 120_000;

    #[test]
    fn rebuild_keeps_the_newest_replies() {
        let reply = StoredReply { status: 200, content_type: None, body: "12345".into() };
        let mut replies =
            Replies { newest: VecDeque::new(), weight: 0, max: 3 * u64::from(weigh(&reply)) + 1 };
        for number in 0..9 {
            replies.push(Uuid::from_u128(number), reply.clone());
        }
        let kept: Vec<_> = replies.newest.iter().map(|(id, _)| id.as_u128()).collect();
        assert_eq!(kept, [6, 7, 8]);
    }

    #[test]
    fn parsed_time_matches_jiff_after_any_previous_time() {
        let mut second = Second::default();
        for time in [
            "2026-11-27T10:00:00.000000Z",
            "2026-11-27T10:00:00.999999Z",
            "2026-11-27T10:00:00.999999+02:00",
            "2026-11-27T10:00:01.000000Z",
            "2026-11-27T10:00:01Z",
            "2026-11-27T10:00:01.5Z",
            "1970-01-01T00:00:00.000000Z",
            "2026-11-27T10:00:01.123456Z",
        ] {
            let read: Timestamp = time.parse().unwrap();
            assert_eq!(i64::from(second.unix(time)), read.as_second(), "{time}");
            let millis = second.millis(time);
            assert!(millis == read.as_millisecond() || time.ends_with(".5Z"), "{time}: {millis}");
        }
        for time in
            ["", "2026-11-27T10:00:01.12345xZ", "2026-11-27T10:61:00.000000Z", "1969-12-31T23:59:59.000000Z"]
        {
            assert!(second.unix(time).abs_diff(now()) <= 1, "{time}: what is no time is now");
        }
    }

    /// `CCSQM_GATEWAY_TEST_REBUILD` sets the number of keys: 999,000 are more than a gigabyte, and must be known within 5 s in an
    /// optimised build.
    #[tokio::test]
    async fn keys_are_read_back_within_the_deadline() {
        let keys = std::env::var("CCSQM_GATEWAY_TEST_REBUILD").map_or(2_000, |keys| keys.parse().unwrap());
        let took = check(keys).await;
        // Four times the deadline, for builds that are not optimised.
        assert!(took < Duration::from_secs(4 * 5), "{took:?}");
    }
}
