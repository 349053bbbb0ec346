//! The aggregation of refusals: load shedding for the trail, so that no flood of refused requests fills the disk.
//!
//! Some refusals of each kind are recorded one by one each second; the rest of the second becomes one record with a
//! count. In addition there is a budget of bytes an hour for strangers, and another one for callers. Beyond it,
//! refusals of one kind become one record at the end of the hour. Each refusal is counted in some record; what is
//! lost at a kill is only what was counted and not yet recorded.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::AuditMetrics;
use super::batch::Batch;
use super::entry::{Entry, NotForwarded, RefusalReason};
use super::facts::RequestFacts;
use crate::clock;
use crate::config::RefusalBudget;

/// How many refusals of one kind are recorded one by one each second.
const FULL_REFUSALS: u32 = 10;

/// How many kinds of strangers' refusals are distinguished each second. Further strangers share one kind for each
/// code.
// Addresses cost a stranger nothing, so that their number must not decide how fast the trail grows. Callers need no
// such bound: their number is configured.
const STRANGERS: usize = 10;

/// The period of the finer aggregation.
const SECOND: Duration = Duration::from_secs(1);

/// The refusals of the present second and hour.
pub(super) struct RefusalAggregator {
    since: Instant,
    /// What was seen in this second, by kind.
    kinds: HashMap<(RefusedPeer, RefusalReason), Aggregate>,
    /// How many kinds of strangers there are in this second.
    strangers: usize,
    hour: Hour,
    /// How many refusals were not recorded at all since the last event that says so.
    pub(super) unrecorded: u64,
}

#[derive(Default)]
struct Aggregate {
    /// How many came in this second.
    seen: u32,
    /// The aggregate of those beyond the first.
    more: Option<NotForwarded>,
}

/// The peer or caller whose refusals are aggregated.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum RefusedPeer {
    Caller(Arc<str>),
    Address(IpAddr),
    Uid(u32),
    /// All further strangers.
    Others,
}

/// What was recorded in the present hour.
struct Hour {
    budget: RefusalBudget,
    lasts: Duration,
    since: Instant,
    /// The bytes recorded for strangers and for callers.
    spent: [u64; 2],
    /// The kinds that were seen in this hour, and the aggregate beyond the budget. Strangers are one kind for each
    /// code.
    // The first refusal of each kind is recorded whatever was spent: a flood must not hide that something new
    // happens.
    kinds: HashMap<(RefusedPeer, RefusalReason), Option<NotForwarded>>,
}

impl RefusalAggregator {
    /// An empty aggregation. `hour` is how long an hour lasts, which only tests change.
    pub(super) fn new(budget: RefusalBudget, hour: Duration) -> Self {
        let now = Instant::now();
        let hour = Hour { budget, lasts: hour, since: now, spent: [0; 2], kinds: HashMap::new() };
        Self { since: now, kinds: HashMap::new(), strangers: 0, hour, unrecorded: 0 }
    }

    /// Whether the second is over.
    pub(super) fn is_due(&self) -> bool {
        self.since.elapsed() >= SECOND
    }

    /// Whether something is counted that must become a record when its second or hour is over.
    pub(super) fn is_pending(&self) -> bool {
        let counted = self.kinds.values().any(|aggregate| aggregate.more.is_some());
        self.unrecorded > 0 || counted || self.hour.is_over() && self.hour.is_pending()
    }

    /// Records a refusal, or adds it to an aggregate.
    pub(super) fn push(
        &mut self,
        facts: Box<RequestFacts>,
        (why, status): (RefusalReason, u16),
        batch: &mut Batch,
        metrics: &AuditMetrics,
    ) {
        let who = facts.who();
        let of = usize::from(matches!(who, RefusedPeer::Caller(_)));
        let refusal = |facts, several| NotForwarded {
            time: clock::unix_nanos() / 1000,
            facts,
            why,
            status,
            count: 1,
            several,
        };
        // The hour is decided first: beyond its budget not even the first ten of a second are recorded.
        let is_spent = self.hour.is_spent(of);
        let kind = (if of == 0 { RefusedPeer::Others } else { who.clone() }, why);
        match self.hour.kinds.get_mut(&kind) {
            Some(more) if is_spent => {
                match more {
                    Some(more) => more.count += 1,
                    None => *more = Some(refusal(facts, of == 0)),
                }
                metrics.aggregated.inc();
                return;
            }
            Some(_) => {}
            None => drop(self.hour.kinds.insert(kind, None)),
        }
        let who = self.place(who, why);
        let several = who == RefusedPeer::Others;
        let aggregate = self.kinds.entry((who, why)).or_default();
        aggregate.seen += 1;
        let full = aggregate.seen <= FULL_REFUSALS;
        match &mut aggregate.more {
            Some(more) => more.count += 1,
            // Recorded one by one, a refusal names its own peer, even in the kind that strangers share.
            None if full => self.hour.record(of, &refusal(facts, false), batch),
            more => *more = Some(refusal(facts, several)),
        }
    }

    /// Ends the second: each aggregate of it becomes a record. If the hour is over as well, so does each aggregate of
    /// the hour.
    pub(super) fn flush(&mut self, batch: &mut Batch, metrics: &AuditMetrics) {
        self.since = Instant::now();
        self.strangers = 0;
        for ((who, _), aggregate) in std::mem::take(&mut self.kinds) {
            if let Some(refusal) = aggregate.more {
                metrics.aggregated.inc_by(refusal.count);
                self.hour.record(usize::from(matches!(who, RefusedPeer::Caller(_))), &refusal, batch);
            }
        }
        if self.hour.is_over() {
            self.end_hour(batch);
        }
    }

    /// Ends the hour: each aggregate beyond the budget becomes a record, and another hour begins.
    pub(super) fn end_hour(&mut self, batch: &mut Batch) {
        self.hour.since = Instant::now();
        self.hour.spent = [0; 2];
        for refusal in std::mem::take(&mut self.hour.kinds).into_values().flatten() {
            batch.push(&Entry::NotForwarded(&refusal));
        }
    }

    /// Records how many refusals were not recorded, if any.
    // So the trail is not silent about what it lacks.
    pub(super) fn close_gap(&mut self, batch: &mut Batch) {
        let unrecorded = std::mem::take(&mut self.unrecorded);
        if unrecorded > 0 {
            let what = "refusals were not recorded, for want of room or space";
            batch.event("gap", json!({ "what": what, "count": unrecorded }));
        }
    }

    /// The kind under which a refusal is aggregated in this second.
    fn place(&mut self, who: RefusedPeer, why: RefusalReason) -> RefusedPeer {
        if matches!(who, RefusedPeer::Caller(_)) || self.kinds.contains_key(&(who.clone(), why)) {
            return who;
        }
        if self.strangers == STRANGERS {
            return RefusedPeer::Others;
        }
        self.strangers += 1;
        who
    }
}

impl Hour {
    /// Whether the hour is over.
    fn is_over(&self) -> bool {
        self.since.elapsed() >= self.lasts
    }

    fn is_pending(&self) -> bool {
        self.kinds.values().any(Option::is_some)
    }

    /// Whether the budget is spent: `of` is 0 for strangers, 1 for callers.
    fn is_spent(&self, of: usize) -> bool {
        self.spent[of] >= [self.budget.strangers, self.budget.callers][of]
    }

    /// Records a refusal at the expense of the budget.
    fn record(&mut self, of: usize, refusal: &NotForwarded, batch: &mut Batch) {
        let before = batch.size();
        batch.push(&Entry::NotForwarded(refusal));
        self.spent[of] += (batch.size() - before) as u64;
    }
}
