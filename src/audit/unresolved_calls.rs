//! The list of unresolved calls: a work list for people that survives restarts and retention.
//!
//! A call is on the list while it has no outcome, when its outcome is unknown, and when it succeeded but its
//! caller may not have got the answer (*undelivered*). Deduplication rejects equal calls because of it.
//!
//! The first batch of each segment and each event `start` contain the list, unless it is empty. Neither the
//! removal of a segment nor a start that reads only the end of the trail loses an entry. A call of unknown
//! outcome stays until a person resolves it; the others leave the list with the idempotency window. Beyond
//! 10,000 calls the oldest of unknown outcome leave, too, once their window is over. Of calls that are only
//! presumed undelivered, the oldest beyond 2,048 leave.
//!
//! [`UnresolvedList::take`] follows the trail record by record, for readers and for the writer alike.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use uuid::Uuid;

use crate::model::outcome::Outcome;
use crate::plain;

/// The name of the event with the list, which begins a segment.
pub(super) const LIST: &str = "unresolved";

/// The name of the event that replaces a list too long for any file.
pub(super) const LIST_LEFT_OUT: &str = "unresolved_left_out";

/// The event that puts a success on the list because its caller did not get the answer.
pub(crate) const UNDELIVERED: &str = "undelivered";
/// The event that takes an undelivered success off the list.
pub(crate) const DELIVERED: &str = "delivered";
/// The event with which a person resolves a call of unknown outcome.
pub(crate) const RESOLUTION: &str = "resolution";

/// All events that change the list while a gateway runs.
pub(super) const EVENTS: [&str; 4] = [LIST, UNDELIVERED, DELIVERED, RESOLUTION];

/// The time within which an answer counts as on its way after its outcome was recorded, in microseconds.
// An answer with a key waits for the commit of its outcome. A writer that is well commits it within the
// deadline of an intent, which is this long.
const DELIVERY: i64 = 250_000;

/// The largest number of answers that count as on their way when a process is killed: as many as requests can
/// be in flight by default.
const ON_THEIR_WAY: usize = 1024;

/// The largest number of calls on the list that are only presumed undelivered.
// Twice the number that one kill can leave: a process that is killed again and again at the height of its load
// must not fill the list.
const PRESUMED: usize = 2 * ON_THEIR_WAY;

/// The largest number of calls on the list, apart from those whose window is not over. Deduplication remembers
/// as many doubts.
// A bound is needed since each segment begins with the list. At 512 bytes a call, 10,000 take 5 MiB.
pub(crate) const AT_MOST: usize = 10_000;

/// A call on the list.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UnresolvedCall {
    /// The number of its intent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// Its request id.
    pub id: Uuid,
    /// When its intent was recorded (RFC 3339); empty if that is not known.
    #[serde(default)]
    pub time: String,
    /// Why it is on the list.
    #[serde(default)]
    pub state: CallState,
    /// The caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
    /// The route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The operator that the call named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<String>,
    /// The task, as the contract finds it in the body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<Value>,
    /// The keyed digest of the body, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The keyed fingerprint of its `Idempotency-Key`, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The keyed fingerprint of body, operator and route, in hex, by which equal calls are found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub print: Option<String>,
    /// The call of unknown outcome that this one repeats by force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<Uuid>,
    /// Whether a later call repeats this one by force. Then this one no longer blocks equal calls.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub superseded: bool,
    /// Whether it is only presumed undelivered: its process was killed about when the answer left. Most such
    /// answers arrived.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub presumed: bool,
}

/// Why a call is on the list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallState {
    /// It has no outcome yet.
    #[default]
    AtWork,
    /// Its outcome is unknown: it may have been done or not.
    Unknown,
    /// It succeeded, and its caller had disconnected before the answer.
    Undelivered,
    /// Its outcome was unknown, and a person found that it is done.
    Done,
}

impl UnresolvedCall {
    /// The length of its entry on the list in the trail, in bytes.
    pub(super) fn size(&self) -> u64 {
        let mut json = serde_json::to_vec(self).unwrap_or_default();
        // The trail escapes characters that are not plain: DEL takes six bytes there and one here. Counted
        // without that, a list could be promised that no file can hold.
        plain::escape(&mut json, 0);
        json.len() as u64
    }

    /// A call of which only the id is known.
    pub(super) fn of(id: Uuid) -> Self {
        Self { id, ..Self::default() }
    }

    /// Returns the call that an event `resolution` names, and the result that a person found. `None` if the
    /// line is no such event.
    pub fn resolved_by(event: &[u8]) -> Option<(Self, Resolution)> {
        let resolved: Resolved = serde_json::from_slice(event).ok()?;
        let result = resolved.result;
        Some((resolved.into_call(), result))
    }

    /// Returns the call that an event `resolution` names, from a parsed event.
    pub(super) fn told_by_resolution(event: &Value) -> Option<Self> {
        Resolved::deserialize(event).ok().map(Resolved::into_call)
    }
}

impl CallState {
    /// The word used in the trail.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AtWork => "at_work",
            Self::Unknown => "unknown",
            Self::Undelivered => "undelivered",
            Self::Done => "done",
        }
    }
}

/// What a person found out about a call of unknown outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolution {
    /// The task is assigned.
    Done,
    /// The task is not assigned.
    NotDone,
}

impl Resolution {
    /// The word used in the trail and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::NotDone => "not-done",
        }
    }
}

/// The members of a record that can change the list.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct RecordView<'a> {
    pub(super) kind: &'a str,
    pub(super) event: Option<&'a str>,
    pub(super) id: Option<Uuid>,
    pub(super) outcome: Option<&'a str>,
    #[serde(default)]
    pub(super) time: &'a str,
}

/// The members of an event `resolution`.
#[derive(Deserialize)]
struct Resolved {
    result: Resolution,
    /// When the call's intent was recorded. `seq` and `time` of the event are its own.
    #[serde(default)]
    call_time: String,
    call_seq: Option<u64>,
    #[serde(flatten)]
    call: UnresolvedCall,
}

impl Resolved {
    fn into_call(self) -> UnresolvedCall {
        UnresolvedCall { seq: self.call_seq, time: self.call_time, ..self.call }
    }
}

#[derive(Deserialize)]
struct Listed {
    unresolved: Vec<UnresolvedCall>,
}

/// The list. Cloning copies only the ids and shares the calls, so that the writer can copy it while requests
/// wait for its lock.
#[derive(Clone, Debug, Default)]
pub struct UnresolvedList {
    // Ids are UUIDv7, so the order of ids is the order of time.
    calls: BTreeMap<Uuid, Arc<UnresolvedCall>>,
    /// The last successes with their times in microseconds since 1970: their answers may have been on their way
    /// when the trail ended.
    on_their_way: VecDeque<(i64, UnresolvedCall)>,
    /// Calls without an outcome that the next list does not name: a version that wrote no lists left them open.
    orphans: Vec<UnresolvedCall>,
}

impl UnresolvedList {
    /// All calls on the list, oldest first.
    pub fn calls(&self) -> impl Iterator<Item = &UnresolvedCall> {
        self.calls.values().map(|call| &**call)
    }

    /// The calls of unknown outcome, which wait for a person.
    pub fn unknown(&self) -> impl Iterator<Item = &UnresolvedCall> {
        self.calls().filter(|call| call.state == CallState::Unknown)
    }

    /// The calls without an outcome.
    pub fn at_work(&self) -> impl Iterator<Item = &UnresolvedCall> {
        self.calls().filter(|call| call.state == CallState::AtWork)
    }

    /// The calls without an outcome that no list names.
    pub(super) fn orphans(&self) -> &[UnresolvedCall] {
        &self.orphans
    }

    /// The call with this id; `None` if it is not on the list.
    pub fn get(&self, id: Uuid) -> Option<&UnresolvedCall> {
        self.calls.get(&id).map(|call| &**call)
    }

    /// Applies one proven record. A line that cannot be parsed changes nothing.
    pub(super) fn take(&mut self, step: &RecordView<'_>, line: &[u8]) {
        match (step.kind, step.id) {
            ("intent", Some(_)) => {
                if let Ok(call) = serde_json::from_slice::<UnresolvedCall>(line) {
                    // The state is set here and not read from the line: a contract once could name a member
                    // `state`, so a caller's body decided it.
                    self.insert(UnresolvedCall { state: CallState::AtWork, ..call });
                }
            }
            ("outcome", Some(id)) => {
                // An outcome word of a newer version counts as `unknown`: that keeps the call on the list.
                let outcome = Outcome::ALL.into_iter().find(|it| step.outcome == Some(it.as_str()));
                self.end(id, outcome.unwrap_or(Outcome::Unknown), step.time);
            }
            ("event", id) => self.take_event(step.event.unwrap_or_default(), id, line),
            _ => {}
        }
    }

    /// Applies one record that the chain does not prove. It can add calls to the list. It removes none and
    /// changes none, except that a call without an outcome becomes one of unknown outcome.
    pub(super) fn take_unproven(&mut self, step: &RecordView<'_>, line: &[u8]) {
        let state = match (step.kind, step.event) {
            ("outcome", _) => {
                // The line may have had any outcome before it was changed. `unknown` is the only one that
                // blocks a second call.
                let call = step.id.and_then(|id| self.get(id));
                if let Some(id) = call.filter(|call| call.state == CallState::AtWork).map(|call| call.id) {
                    self.end(id, Outcome::Unknown, step.time);
                }
                return;
            }
            ("intent", _) => CallState::AtWork,
            ("event", Some(UNDELIVERED)) => CallState::Undelivered,
            ("event", Some(LIST | "start")) => {
                let listed = serde_json::from_slice(line).map(|Listed { unresolved }| unresolved);
                listed.unwrap_or_default().into_iter().for_each(|call| self.add(call));
                return;
            }
            _ => return,
        };
        if let Ok(call) = serde_json::from_slice::<UnresolvedCall>(line) {
            self.add(UnresolvedCall { state, ..call });
        }
    }

    /// Adds a call unless it is on the list.
    // `forced` is dropped: an unproven call must not supersede another one, which would then no longer block
    // equal calls.
    fn add(&mut self, call: UnresolvedCall) {
        self.calls.entry(call.id).or_insert_with(|| Arc::new(UnresolvedCall { forced: None, ..call }));
    }

    /// Applies one proven line.
    pub(super) fn follow(&mut self, line: &[u8]) {
        if let Ok(step) = serde_json::from_slice(line) {
            self.take(&step, line);
        }
    }

    /// Applies one proven event. `line` is the whole record.
    pub(super) fn take_event(&mut self, name: &str, id: Option<Uuid>, line: &[u8]) {
        match (name, id) {
            (LIST | "start", _) => {
                if let Ok(Listed { unresolved }) = serde_json::from_slice(line) {
                    let listed = unresolved.into_iter().map(|call| (call.id, Arc::new(call))).collect();
                    let before = std::mem::replace(&mut self.calls, listed).into_values();
                    let before = before.map(Arc::unwrap_or_clone);
                    let is_lost = |call: &UnresolvedCall| {
                        call.state == CallState::AtWork && !self.calls.contains_key(&call.id)
                    };
                    self.orphans.extend(before.filter(is_lost));
                    // Only the list of a start contains the successes on their way, as undelivered. A list that
                    // begins a segment does not.
                    if name == "start" {
                        self.on_their_way.clear();
                    }
                }
            }
            // A gateway that is stopped cleanly waits for all answers, so none is on its way. Events appended
            // later, by a command, do not change that.
            ("stop", _) => self.on_their_way.clear(),
            (UNDELIVERED, Some(_)) => {
                if let Ok(call) = serde_json::from_slice::<UnresolvedCall>(line) {
                    self.insert(UnresolvedCall { state: CallState::Undelivered, ..call });
                }
            }
            (DELIVERED, Some(id)) => {
                self.on_their_way.retain(|(_, call)| call.id != id);
                if self.calls.get(&id).is_some_and(|call| call.state == CallState::Undelivered) {
                    self.calls.remove(&id);
                }
            }
            (RESOLUTION, Some(id)) => {
                if let Ok(resolved) = serde_json::from_slice::<Resolved>(line) {
                    self.resolve(id, resolved.result, resolved.into_call());
                }
            }
            _ => {}
        }
    }

    /// Adds a call, or replaces the one with its id.
    pub(super) fn insert(&mut self, call: impl Into<Arc<UnresolvedCall>>) {
        let call = call.into();
        self.calls.insert(call.id, call);
    }

    fn remove(&mut self, id: Uuid) -> Option<UnresolvedCall> {
        self.calls.remove(&id).map(Arc::unwrap_or_clone)
    }

    /// Applies an outcome, recorded at `time`, to a call on the list.
    fn end(&mut self, id: Uuid, outcome: Outcome, time: &str) {
        self.orphans.retain(|call| call.id != id);
        let Some(call) = self.remove(id) else { return };
        if outcome == Outcome::Succeeded {
            self.remember(micros(time), call.clone());
        }
        self.finish(call, outcome);
    }

    /// Applies an outcome to a call that has been taken off the list.
    pub(super) fn finish(&mut self, call: UnresolvedCall, outcome: Outcome) {
        // After `not_sent`, `failed` or `refused` the repetition was not done, so the first call must go on to
        // block equal ones.
        if let Some(forced) = call.forced
            && matches!(outcome, Outcome::Unknown | Outcome::Succeeded)
        {
            self.supersede(forced);
        }
        if outcome == Outcome::Unknown {
            self.insert(UnresolvedCall { state: CallState::Unknown, ..call });
        }
    }

    /// A later call stands for this one from now on.
    fn supersede(&mut self, id: Uuid) {
        match self.calls.get_mut(&id) {
            Some(call) if call.state == CallState::Undelivered => drop(self.calls.remove(&id)),
            // It stays on the list, since a person still has to find out what became of it.
            Some(call) => Arc::make_mut(call).superseded = true,
            None => {}
        }
    }

    /// Remembers a success whose answer may be on its way, and forgets those that have certainly left.
    fn remember(&mut self, time: i64, call: UnresolvedCall) {
        self.on_their_way.push_back((time, call));
        while self.on_their_way.len() > ON_THEIR_WAY
            || self.on_their_way.front().is_some_and(|(first, _)| first + DELIVERY < time)
        {
            self.on_their_way.pop_front();
        }
    }

    /// Applies a person's finding; `described` is the call as the event describes it, for a list that does not have
    /// it.
    fn resolve(&mut self, id: Uuid, result: Resolution, described: UnresolvedCall) {
        let call = self.remove(id).unwrap_or(described);
        match result {
            Resolution::Done => self.insert(UnresolvedCall { state: CallState::Done, ..call }),
            Resolution::NotDone => {
                // The repetition was not done, so the call that it repeated must block equal ones again.
                if let Some(first) = call.forced.and_then(|first| self.calls.get_mut(&first)) {
                    Arc::make_mut(first).superseded = false;
                }
            }
        }
    }

    /// Applies the end of the process that wrote the trail. Calls without an outcome become unknown. If the
    /// process was not stopped cleanly, its last successes become presumed undelivered. Returns the ids of the
    /// calls that had no outcome.
    pub(super) fn close(&mut self) -> Vec<Uuid> {
        for (_, call) in std::mem::take(&mut self.on_their_way) {
            // A call on the list has an event `undelivered`, which is certain and not presumed.
            if !self.calls.contains_key(&call.id) {
                self.insert(UnresolvedCall { state: CallState::Undelivered, presumed: true, ..call });
            }
        }
        let presumed: Vec<_> = self.calls().filter(|call| call.presumed).map(|call| call.id).collect();
        let oldest = &presumed[..presumed.len().saturating_sub(PRESUMED)];
        if !oldest.is_empty() {
            let calls = oldest.len();
            tracing::warn!(
                calls,
                "too many answers may have been lost when gateways were killed, so the oldest of them count as delivered"
            );
        }
        for id in oldest {
            self.calls.remove(id);
        }
        let open: Vec<_> = self.at_work().map(|call| call.id).collect();
        for id in &open {
            if let Some(call) = self.remove(*id) {
                // Through `finish`, so that a repetition by force supersedes its first call here as it does
                // when a gateway runs. Otherwise each of the two would block the other.
                self.finish(call, Outcome::Unknown);
            }
        }
        open
    }

    /// Removes calls whose window is over, as `is_over` tells. Calls of unknown outcome stay, unless the list
    /// is too long. Then the oldest of them leave, and are returned.
    pub(super) fn prune(&mut self, is_over: impl Fn(&UnresolvedCall) -> bool) -> Vec<Arc<UnresolvedCall>> {
        self.calls.retain(|_, call| call.state == CallState::Unknown || !is_over(call));
        let excess = self.calls.len().saturating_sub(AT_MOST);
        let is_unknown = |call: &&Arc<UnresolvedCall>| call.state == CallState::Unknown && is_over(call);
        let forgotten: Vec<_> = self.calls.values().filter(is_unknown).take(excess).cloned().collect();
        for call in &forgotten {
            self.calls.remove(&call.id);
        }
        forgotten
    }

    /// An upper bound on the length of the list in the trail, in bytes: one comma too many is counted.
    pub(super) fn size(&self) -> u64 {
        2 + self.calls().map(|call| 1 + call.size()).sum::<u64>()
    }
}

/// The list as the trail contains it.
impl Serialize for UnresolvedList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.calls())
    }
}

/// Microseconds since 1970; 0 for a text that is no time.
fn micros(time: &str) -> i64 {
    time.parse::<jiff::Timestamp>().map_or(0, |time| time.as_microsecond())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::needless_pass_by_value, reason = "json!(…) reads better without an ampersand")]

    use super::super::batch::Batch;
    use super::*;
    use crate::model::audit_fields::MEMBERS;
    use serde_json::json;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn intent(number: u128) -> Value {
        json!({ "kind": "intent", "id": id(number), "time": "2026-11-28T10:00:00.000000Z", "caller": "qa",
            "route": "r", "task": "7", "print": "ab" })
    }

    fn outcome(number: u128, outcome: Outcome, second: u32) -> Value {
        let time = format!("2026-11-28T10:00:{second:02}.000000Z");
        json!({ "kind": "outcome", "id": id(number), "time": time, "outcome": outcome.as_str() })
    }

    fn event(name: &str, members: Value) -> Value {
        let mut event = json!({ "kind": "event", "event": name });
        event.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
        event
    }

    fn read(lines: impl IntoIterator<Item = Value>) -> UnresolvedList {
        let mut list = UnresolvedList::default();
        lines.into_iter().for_each(|line| list.follow(line.to_string().as_bytes()));
        list
    }

    fn states(list: &UnresolvedList) -> Vec<(u128, CallState)> {
        list.calls().map(|call| (call.id.as_u128(), call.state)).collect()
    }

    #[test]
    fn unresolved_call_stays_listed_until_its_outcome_is_known() {
        // All outcomes but `unknown`: none of them may stay on the list.
        let others =
            [Outcome::NotSent, Outcome::Failed, Outcome::Refused, Outcome::Succeeded].into_iter().zip(2..);
        let mut lines = vec![intent(1), outcome(1, Outcome::Unknown, 0), intent(9)];
        lines.extend(others.flat_map(|(it, number)| [intent(number), outcome(number, it, 0)]));
        let list = read(lines);
        assert_eq!(states(&list), [(1, CallState::Unknown), (9, CallState::AtWork)]);
        assert_eq!(list.unknown().count(), 1);
    }

    #[test]
    fn list_event_replaces_all_earlier_entries() {
        let before = read([intent(1), outcome(1, Outcome::Unknown, 0), intent(2)]);
        let event = event(LIST, json!({ "unresolved": before }));
        let behind = read([intent(8), event, outcome(2, Outcome::Failed, 0)]);
        assert_eq!(states(&behind), [(1, CallState::Unknown)]);
        assert_eq!(behind.get(id(1)), before.get(id(1)));
    }

    #[test]
    fn resolution_removes_a_call_from_the_list() {
        let resolve = |result| event(RESOLUTION, json!({ "id": id(1), "result": result }));
        let unknown = [intent(1), outcome(1, Outcome::Unknown, 0)];
        let list = read(unknown.clone().into_iter().chain([resolve("not-done")]));
        assert_eq!(states(&list), []);
        let list = read(unknown.into_iter().chain([resolve("done")]));
        assert_eq!(states(&list), [(1, CallState::Done)]);
    }

    #[test]
    fn unproven_record_removes_no_call_and_changes_no_ended_one() {
        let told = event(UNDELIVERED, json!({ "id": id(2), "caller": "qa", "print": "ab" }));
        let known = [intent(1), outcome(1, Outcome::Unknown, 0), told, intent(3)];
        let of = |name: &str, number| event(name, json!({ "id": id(number), "result": "done" }));
        // An unproven intent that claims to repeat call 1 must not make it superseded.
        let mut forcing = intent(4);
        forcing["forced"] = json!(id(1));
        for (line, changed) in [
            (of(RESOLUTION, 1), None),
            (of(DELIVERED, 2), None),
            (of(UNDELIVERED, 1), None),
            (intent(1), None),
            (outcome(1, Outcome::Succeeded, 0), None),
            (event("stop", json!({})), None),
            (event(LIST, json!({ "unresolved": [] })), None),
            (event("start", json!({ "unresolved": [{ "id": id(1), "state": "done" }] })), None),
            (event(LIST, json!({ "unresolved": [{ "id": id(4), "state": "unknown" }] })), Some(4)),
            (of(UNDELIVERED, 4), Some(4)),
            (forcing, Some(4)),
            (outcome(3, Outcome::Refused, 0), Some(3)),
        ] {
            let mut list = read(known.clone());
            let before = list.clone();
            let text = line.to_string();
            let name = line["event"].as_str();
            let id = line["id"].as_str().map(|id| id.parse().unwrap());
            let (kind, outcome) = (line["kind"].as_str().unwrap(), line["outcome"].as_str());
            list.take_unproven(&RecordView { kind, event: name, id, outcome, time: "" }, text.as_bytes());
            for call in before.calls().filter(|call| Some(call.id.as_u128()) != changed) {
                assert_eq!(list.get(call.id), Some(call), "{line}");
            }
            let is_more = list.calls().count() > before.calls().count();
            assert_eq!(is_more, changed == Some(4), "{line}");
            assert!(
                changed != Some(3) || list.get(self::id(3)).unwrap().state == CallState::Unknown,
                "{line}"
            );
            list.close();
            assert!(!list.get(self::id(1)).unwrap().superseded, "{line}");
        }
    }

    #[test]
    fn undelivered_success_stays_listed_until_delivered() {
        let undelivered = event(UNDELIVERED, json!({ "id": id(1), "caller": "qa", "print": "ab" }));
        let lines = [intent(1), outcome(1, Outcome::Succeeded, 0), undelivered];
        assert_eq!(states(&read(lines.clone())), [(1, CallState::Undelivered)]);
        let told = event(DELIVERED, json!({ "id": id(1) }));
        assert_eq!(states(&read(lines.into_iter().chain([told]))), []);
    }

    #[test]
    fn crash_leaves_last_successes_undelivered_and_open_calls_unknown() {
        let lines = || {
            // 1,999 successes in second 0 and one in second 5: only the last one can still be on its way.
            let early = (1..2000).flat_map(|number| [intent(number), outcome(number, Outcome::Succeeded, 0)]);
            let last = [intent(3001), intent(3000), outcome(3000, Outcome::Succeeded, 5)];
            early.chain(last)
        };
        let mut list = read(lines());
        assert_eq!(list.close(), [id(3001)]);
        assert_eq!(states(&list), [(3000, CallState::Undelivered), (3001, CallState::Unknown)]);
        let mut list = read(lines().chain([event("stop", json!({}))]));
        assert_eq!(list.close(), [id(3001)]);
        assert_eq!(states(&list), [(3001, CallState::Unknown)], "stopped in order");
        let mut list = read((1..2000).flat_map(|it| [intent(it), outcome(it, Outcome::Succeeded, 0)]));
        list.close();
        assert_eq!(list.calls().count(), ON_THEIR_WAY);
        // Each crash leaves 1,024 presumed calls. The first one and these four leave 5,120, more than the bound
        // of 2,048.
        for crash in 1..=4 {
            let again = (crash * 5000..crash * 5000 + 2000)
                .flat_map(|it| [intent(it), outcome(it, Outcome::Succeeded, 0)]);
            again.for_each(|line| list.follow(line.to_string().as_bytes()));
            list.close();
        }
        assert_eq!(
            states(&list).first().unwrap().0,
            3 * 5000 + 2000 - ON_THEIR_WAY as u128,
            "the oldest are gone"
        );
        assert_eq!(list.calls().count(), PRESUMED);
    }

    #[test]
    fn forced_call_interrupted_by_a_crash_supersedes_its_original() {
        let mut forced = intent(2);
        forced["forced"] = json!(id(1));
        let mut list = read([intent(1), outcome(1, Outcome::Unknown, 0), forced]);
        assert!(!list.get(id(1)).unwrap().superseded);
        assert_eq!(list.close(), [id(2)]);
        assert!(list.get(id(1)).unwrap().superseded);
        assert_eq!(states(&list), [(1, CallState::Unknown), (2, CallState::Unknown)]);
    }

    #[test]
    fn recorded_undelivered_call_is_not_marked_as_presumed() {
        let undelivered = event(UNDELIVERED, json!({ "id": id(1), "caller": "qa", "print": "ab" }));
        let ended = |number| [intent(number), outcome(number, Outcome::Succeeded, 0)];
        let mut list = read(ended(1).into_iter().chain([undelivered]).chain(ended(2)));
        list.close();
        assert_eq!(states(&list), [(1, CallState::Undelivered), (2, CallState::Undelivered)]);
        assert!(!list.get(id(1)).unwrap().presumed && list.get(id(2)).unwrap().presumed);
    }

    #[test]
    fn forced_call_supersedes_its_original_once_it_may_be_done() {
        let mut forced = intent(2);
        forced["forced"] = json!(id(1));
        for (how, is_superseded) in
            [(Outcome::Succeeded, true), (Outcome::Unknown, true), (Outcome::Refused, false)]
        {
            let list = read([intent(1), outcome(1, Outcome::Unknown, 0), forced.clone(), outcome(2, how, 0)]);
            assert_eq!(list.get(id(1)).unwrap().superseded, is_superseded, "{how}");
        }
    }

    #[test]
    fn only_calls_of_unknown_outcome_are_never_pruned() {
        let mut list = UnresolvedList::default();
        let of = |number, state| UnresolvedCall {
            state,
            ..serde_json::from_value(json!({ "id": id(number) })).unwrap()
        };
        list.insert(of(1, CallState::Unknown));
        list.insert(of(2, CallState::Undelivered));
        list.insert(of(3, CallState::Done));
        assert_eq!(list.prune(|_| true).len(), 0);
        assert_eq!(states(&list), [(1, CallState::Unknown)]);
    }

    #[test]
    fn audited_field_may_set_no_member_of_a_call_except_its_task() {
        let call = UnresolvedCall {
            seq: Some(1),
            caller: Some(String::new()),
            route: Some(String::new()),
            operator: Some(String::new()),
            task: Some(json!(7)),
            digest: Some(String::new()),
            key: Some(String::new()),
            print: Some(String::new()),
            forced: Some(id(2)),
            superseded: true,
            presumed: true,
            ..UnresolvedCall::of(id(1))
        };
        let call = json!(call);
        // A contract must not be able to name a member that the list reads, except for the task that it is
        // there to name.
        let free = call.as_object().unwrap().keys().filter(|name| !MEMBERS.contains(&&***name));
        assert!(free.eq(["task"]), "{call}");
    }

    #[test]
    fn computed_list_size_matches_its_size_in_the_trail() {
        let mut list = UnresolvedList::default();
        let written = |list: &UnresolvedList| {
            let mut batch = Batch::default();
            batch.reserve_list();
            batch.fill_list(list, &[]) as u64
        };
        let empty = written(&list);
        for number in 1..=5 {
            // Characters that take more bytes in the trail than in memory.
            let task = Some(json!("\u{7F}\u{200B}\"\u{E0001}é\n".repeat(100)));
            list.insert(UnresolvedCall { task, ..UnresolvedCall::of(id(number)) });
        }
        let size = list.size();
        assert_eq!(
            written(&list),
            empty + size - 3,
            "one comma too many is counted, and the brackets are of both"
        );
    }

    #[test]
    fn oversized_list_drops_the_oldest_expired_calls() {
        let mut list = UnresolvedList::default();
        for number in 1..=AT_MOST as u128 + 3 {
            list.insert(UnresolvedCall { state: CallState::Unknown, ..UnresolvedCall::of(id(number)) });
        }
        // Call 2 is the second oldest, and its window is not over: it must stay although the list is too long.
        let forgotten = list.prune(|call| call.id.as_u128() != 2);
        assert_eq!(forgotten.iter().map(|call| call.id.as_u128()).collect::<Vec<_>>(), [1, 3, 4]);
        assert_eq!(list.calls().count(), AT_MOST);
        assert_eq!(list.prune(|_| true).len(), 0);
    }
}
