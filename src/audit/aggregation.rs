//! The aggregation of refusals: load shedding for the trail, so that no flood of refused requests fills the disk.
//!
//! Refusals are of one kind if they have the same peer or caller and the same reason. In each second the first few
//! refusals of a kind are recorded one by one; the others become one record with a count.
//!
//! In addition there is a budget of bytes per hour for strangers (peers that are no known caller), and another one for
//! callers. Once a budget is spent, the refusals of one kind become one record at the end of the hour.
//!
//! Each refusal is counted in a record. If the process is killed, only the counts that are not recorded yet are lost.

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

/// How many kinds of strangers' refusals are distinguished each second. All further strangers count as one peer.
// Addresses cost a stranger nothing, so their number must not decide how fast the trail grows. Callers need no such
// bound: their number is configured.
const STRANGERS: usize = 10;

/// The shorter period of aggregation. The longer one is the hour.
const SECOND: Duration = Duration::from_secs(1);

/// Aggregates the refusals of the present second and hour.
pub(super) struct RefusalAggregator {
    since: Instant,
    /// The refusals of this second, by kind.
    kinds: HashMap<(RefusedPeer, RefusalReason), Aggregate>,
    /// How many kinds of strangers there are in this second.
    strangers: usize,
    hour: Hour,
    /// How many refusals were dropped without a record, since the last event `gap`.
    pub(super) unrecorded: u64,
}

#[derive(Default)]
struct Aggregate {
    /// The number of refusals that were recorded one by one or aggregated in this second.
    seen: u32,
    /// The aggregate of all but the first [`FULL_REFUSALS`].
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
    used: [u64; 2],
    /// The kinds that were seen in this hour, each with the aggregate of its refusals after the budget was spent. All
    /// strangers count as one peer.
    // The first refusal of each kind is recorded whatever was spent: a flood must not hide that something new
    // happens.
    kinds: HashMap<(RefusedPeer, RefusalReason), Option<NotForwarded>>,
}

impl RefusalAggregator {
    /// Makes an aggregator that has seen nothing. `hour` is the length of an hour, which only tests change.
    pub(super) fn new(budget: RefusalBudget, hour: Duration) -> Self {
        let now = Instant::now();
        let hour = Hour { budget, lasts: hour, since: now, used: [0; 2], kinds: HashMap::new() };
        Self { since: now, kinds: HashMap::new(), strangers: 0, hour, unrecorded: 0 }
    }

    /// Whether the second is over.
    pub(super) fn is_due(&self) -> bool {
        self.since.elapsed() >= SECOND
    }

    /// Whether there is a count that must become a record: an aggregate of this second, dropped refusals, or an aggregate
    /// of an hour that is over.
    pub(super) fn is_pending(&self) -> bool {
        let counted = self.kinds.values().any(|aggregate| aggregate.more.is_some());
        self.unrecorded > 0 || counted || self.hour.is_over() && self.hour.is_pending()
    }

    /// Appends a record of a refusal to `batch`, or adds the refusal to an aggregate.
    pub(super) fn push(
        &mut self,
        facts: Box<RequestFacts>,
        (reason, status): (RefusalReason, u16),
        batch: &mut Batch,
        metrics: &AuditMetrics,
    ) {
        let peer = facts.refused_peer();
        let of = usize::from(matches!(peer, RefusedPeer::Caller(_)));
        let refusal = |facts, several| NotForwarded {
            time: clock::unix_nanos() / 1000,
            facts,
            reason,
            status,
            count: 1,
            several,
        };
        // The hour is decided first: beyond its budget not even the first ten of a second are recorded.
        let is_exhausted = self.hour.is_exhausted(of);
        let kind = (if of == 0 { RefusedPeer::Others } else { peer.clone() }, reason);
        match self.hour.kinds.get_mut(&kind) {
            Some(more) if is_exhausted => {
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
        let peer = self.counted_as(peer, reason);
        let several = peer == RefusedPeer::Others;
        let aggregate = self.kinds.entry((peer, reason)).or_default();
        aggregate.seen += 1;
        let full = aggregate.seen <= FULL_REFUSALS;
        match &mut aggregate.more {
            Some(more) => more.count += 1,
            // A refusal with a record of its own names its own peer, even if its kind is shared by strangers.
            None if full => self.hour.record(of, &refusal(facts, false), batch),
            more => *more = Some(refusal(facts, several)),
        }
    }

    /// Ends the second: each aggregate of it becomes a record. If the hour is over as well, so does each aggregate of
    /// the hour.
    pub(super) fn flush(&mut self, batch: &mut Batch, metrics: &AuditMetrics) {
        self.since = Instant::now();
        self.strangers = 0;
        for ((peer, _), aggregate) in std::mem::take(&mut self.kinds) {
            if let Some(refusal) = aggregate.more {
                metrics.aggregated.inc_by(refusal.count);
                self.hour.record(usize::from(matches!(peer, RefusedPeer::Caller(_))), &refusal, batch);
            }
        }
        if self.hour.is_over() {
            self.end_hour(batch);
        }
    }

    /// Ends the hour: each aggregate beyond the budget becomes a record, and another hour begins.
    pub(super) fn end_hour(&mut self, batch: &mut Batch) {
        self.hour.since = Instant::now();
        self.hour.used = [0; 2];
        for refusal in std::mem::take(&mut self.hour.kinds).into_values().flatten() {
            batch.push(&Entry::NotForwarded(&refusal));
        }
    }

    /// Appends an event `gap` with the number of refusals that were dropped without a record, if there are any.
    pub(super) fn close_gap(&mut self, batch: &mut Batch) {
        let unrecorded = std::mem::take(&mut self.unrecorded);
        if unrecorded > 0 {
            let what = "refusals were not recorded, since the queue was full, or the trail could not be written or had too little space";
            batch.event("gap", json!({ "what": what, "count": unrecorded }));
        }
    }

    /// Returns the peer or caller under which a refusal is aggregated in this second.
    fn counted_as(&mut self, peer: RefusedPeer, reason: RefusalReason) -> RefusedPeer {
        if matches!(peer, RefusedPeer::Caller(_)) || self.kinds.contains_key(&(peer.clone(), reason)) {
            return peer;
        }
        if self.strangers == STRANGERS {
            return RefusedPeer::Others;
        }
        self.strangers += 1;
        peer
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

    /// Whether a budget is spent: that of strangers if `of` is 0, that of callers if it is 1.
    fn is_exhausted(&self, of: usize) -> bool {
        self.used[of] >= [self.budget.strangers, self.budget.callers][of]
    }

    /// Appends a record to `batch`, and counts its length against the budget.
    fn record(&mut self, of: usize, refusal: &NotForwarded, batch: &mut Batch) {
        let before = batch.size();
        batch.push(&Entry::NotForwarded(refusal));
        self.used[of] += (batch.size() - before) as u64;
    }
}
