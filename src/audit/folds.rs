//! How many refusals are recorded one by one: some of each kind a second, and a budget of bytes an hour for those of strangers and
//! another one for those of callers. What goes beyond is counted, so that nobody fills the disk with refusals.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Metrics;
use super::batch::Batch;
use super::entry::{Entry, Refusal, Why};
use super::facts::Facts;
use crate::clock;
use crate::config::RefusalBudget;

/// Refusals of one kind that are recorded in full each second; the rest of the second is one record.
const FULL_REFUSALS: u32 = 10;

/// So many kinds of strangers' refusals are told apart each second; further strangers share one kind a code.
/// Addresses cost a stranger nothing, so their number must not decide how fast the trail grows. Callers are
/// as many as are configured.
const STRANGERS: usize = 10;

const SECOND: Duration = Duration::from_secs(1);

/// The refusals of the present second and hour.
pub(super) struct Folds {
    since: Instant,
    kinds: HashMap<(Who, Why), Fold>,
    strangers: usize,
    hour: Hour,
    /// Refusals that were not recorded since the last record that says so.
    pub(super) unrecorded: u64,
}

#[derive(Default)]
struct Fold {
    seen: u32,
    more: Option<Refusal>,
}

/// Whose refusals are folded together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Who {
    Caller(Arc<str>),
    Address(IpAddr),
    Uid(u32),
    Others,
}

/// What was recorded in this hour.
struct Hour {
    budget: RefusalBudget,
    lasts: Duration,
    since: Instant,
    /// By strangers and by callers, in bytes.
    spent: [u64; 2],
    /// Of each kind the first one is recorded whatever was spent. Strangers are one kind.
    kinds: HashMap<(Who, Why), Option<Refusal>>,
}

impl Folds {
    /// `hour`: how long an hour lasts.
    pub(super) fn new(budget: RefusalBudget, hour: Duration) -> Self {
        let now = Instant::now();
        let hour = Hour { budget, lasts: hour, since: now, spent: [0; 2], kinds: HashMap::new() };
        Self { since: now, kinds: HashMap::new(), strangers: 0, hour, unrecorded: 0 }
    }

    /// Whether a second or an hour is over.
    pub(super) fn is_due(&self) -> bool {
        self.since.elapsed() >= SECOND
    }

    /// Whether something is counted that is to become a record when its second or hour is over.
    pub(super) fn is_pending(&self) -> bool {
        let counted = self.kinds.values().any(|fold| fold.more.is_some());
        self.unrecorded > 0 || counted || self.hour.is_over() && self.hour.is_pending()
    }

    /// Records a refusal, or counts it.
    pub(super) fn push(
        &mut self,
        facts: Box<Facts>,
        (why, status): (Why, u16),
        batch: &mut Batch,
        metrics: &Metrics,
    ) {
        let who = facts.who();
        let of = usize::from(matches!(who, Who::Caller(_)));
        let refusal = |facts, several| Refusal {
            time: clock::unix_nanos() / 1000,
            facts,
            why,
            status,
            count: 1,
            several,
        };
        let is_spent = self.hour.is_spent(of);
        let kind = (if of == 0 { Who::Others } else { who.clone() }, why);
        match self.hour.kinds.get_mut(&kind) {
            Some(more) if is_spent => {
                match more {
                    Some(more) => more.count += 1,
                    None => *more = Some(refusal(facts, of == 0)),
                }
                metrics.folded.inc();
                return;
            }
            Some(_) => {}
            None => drop(self.hour.kinds.insert(kind, None)),
        }
        let who = self.place(who, why);
        let several = who == Who::Others;
        let fold = self.kinds.entry((who, why)).or_default();
        fold.seen += 1;
        let full = fold.seen <= FULL_REFUSALS;
        match &mut fold.more {
            Some(more) => more.count += 1,
            None if full => self.hour.record(of, &refusal(facts, false), batch),
            more => *more = Some(refusal(facts, several)),
        }
    }

    /// The second is over: what was only counted becomes one record each. If the hour is over as well, so does what was counted
    /// beyond its budget.
    pub(super) fn fold_up(&mut self, batch: &mut Batch, metrics: &Metrics) {
        self.since = Instant::now();
        self.strangers = 0;
        for ((who, _), fold) in std::mem::take(&mut self.kinds) {
            if let Some(refusal) = fold.more {
                metrics.folded.inc_by(refusal.count);
                self.hour.record(usize::from(matches!(who, Who::Caller(_))), &refusal, batch);
            }
        }
        if self.hour.is_over() {
            self.end_hour(batch);
        }
    }

    /// What was counted beyond the budget becomes one record each, and another hour begins.
    pub(super) fn end_hour(&mut self, batch: &mut Batch) {
        self.hour.since = Instant::now();
        self.hour.spent = [0; 2];
        for refusal in std::mem::take(&mut self.hour.kinds).into_values().flatten() {
            batch.push(&Entry::Refusal(&refusal));
        }
    }

    /// Records how many refusals were not recorded.
    pub(super) fn close_gap(&mut self, batch: &mut Batch) {
        let unrecorded = std::mem::take(&mut self.unrecorded);
        if unrecorded > 0 {
            let what = "refusals were not recorded, for want of room or space";
            batch.event("gap", json!({ "what": what, "count": unrecorded }));
        }
    }

    /// The kind under which a refusal is folded.
    fn place(&mut self, who: Who, why: Why) -> Who {
        if matches!(who, Who::Caller(_)) || self.kinds.contains_key(&(who.clone(), why)) {
            return who;
        }
        if self.strangers == STRANGERS {
            return Who::Others;
        }
        self.strangers += 1;
        who
    }
}

impl Hour {
    fn is_over(&self) -> bool {
        self.since.elapsed() >= self.lasts
    }

    fn is_pending(&self) -> bool {
        self.kinds.values().any(Option::is_some)
    }

    fn is_spent(&self, of: usize) -> bool {
        self.spent[of] >= [self.budget.strangers, self.budget.callers][of]
    }

    fn record(&mut self, of: usize, refusal: &Refusal, batch: &mut Batch) {
        let before = batch.size();
        batch.push(&Entry::Refusal(refusal));
        self.spent[of] += (batch.size() - before) as u64;
    }
}
