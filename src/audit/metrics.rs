//! What the trail counts.

use prometheus::{Counter, IntCounter, IntGauge, Registry};

use super::batch::Batch;
use super::entry::Kind;
use super::sync::Syncs;

use crate::registry::{counter, counters, gauge, registered};

/// Counts of the trail.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) records: [IntCounter; Kind::ALL.len()],
    pub(super) bytes: IntCounter,
    pub(super) batches: IntCounter,
    pub(super) errors: IntCounter,
    pub(super) syncs: IntCounter,
    pub(super) sync_errors: IntCounter,
    pub(super) sync_seconds: Counter,
    pub(super) removed: IntCounter,
    pub(super) removed_early: IntCounter,
    /// Restored, and lost.
    pub(super) files_lost: [IntCounter; 2],
    pub(super) folded: IntCounter,
    pub(super) dropped: IntCounter,
    pub(super) late: IntCounter,
    pub(super) queue: IntGauge,
    pub(super) doubtful: IntGauge,
    pub(super) unresolved: IntGauge,
    pub(super) damaged: IntGauge,
    pub(super) healthy: IntGauge,
    pub(super) free: IntGauge,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name, help| counter(registry, name, help);
        let counters = |name, help, label| counters(registry, name, help, &[label]);
        let gauge = |name, help| gauge(registry, name, help);
        let records = counters("audit_records_total", "Records written, by kind.", "kind")?;
        let files_lost = counters(
            "audit_files_lost_total",
            "Files of the trail that were moved, deleted, replaced or cut by others, by result.",
            "result",
        )?;
        let sync_seconds =
            Counter::new("ccsqm_gateway_audit_sync_seconds_total", "Seconds spent in fdatasync.");
        Ok(Self {
            records: Kind::ALL.map(|kind| records.with_label_values(&[kind.as_str()])),
            bytes: counter("audit_bytes_total", "Bytes written.")?,
            batches: counter("audit_batches_total", "Batches written.")?,
            errors: counter("audit_write_errors_total", "Writes that failed, fdatasync included.")?,
            syncs: counter(
                "audit_syncs_total",
                "Times that fdatasync succeeded; only with durability disk.",
            )?,
            sync_errors: counter("audit_sync_errors_total", "Times that fdatasync failed.")?,
            sync_seconds: registered(registry, sync_seconds)?,
            removed: counter(
                "audit_removed_segments_total",
                "Segments removed since all in them was old enough.",
            )?,
            removed_early: counter(
                "audit_removed_early_total",
                "Of these, those removed before `retain` had passed, since the trail was larger than max_size.",
            )?,
            files_lost: ["restored", "lost"].map(|result| files_lost.with_label_values(&[result])),
            folded: counter("audit_folded_refusals_total", "Refusals that were recorded by count only.")?,
            dropped: counter("audit_dropped_refusals_total", "Refusals that were not recorded.")?,
            late: counter("audit_late_intents_total", "Intents that were not safe in time.")?,
            queue: gauge("audit_queue_records", "Records that wait to be written.")?,
            doubtful: gauge(
                "clock_doubtful",
                "Whether the wall clock is doubtful, so that no audit segment is removed.",
            )?,
            unresolved: gauge("unresolved_outcomes", "Calls of unknown outcome that nobody has resolved.")?,
            damaged: gauge(
                "audit_damaged",
                "Whether a part of the trail within the idempotency window is lost and nobody has accepted that.",
            )?,
            healthy: gauge(
                "audit_healthy",
                "Whether new calls can be put on record; without that none is sent.",
            )?,
            free: gauge("audit_free_bytes", "What is free on the trail's file system.")?,
        })
    }

    pub(super) fn files_lost(&self, is_restored: bool) {
        self.files_lost[usize::from(!is_restored)].inc();
    }

    pub(super) fn written(&self, batch: &Batch) {
        for (counter, count) in self.records.iter().zip(batch.kinds) {
            if count > 0 {
                counter.inc_by(count);
            }
        }
        self.bytes.inc_by(batch.size() as u64);
        self.batches.inc();
    }

    pub(super) fn synced(&self, syncs: &Syncs) {
        if syncs.good + syncs.failed == 0 {
            return; // durability `kernel`
        }
        self.syncs.inc_by(syncs.good);
        self.sync_errors.inc_by(syncs.failed);
        self.sync_seconds.inc_by(syncs.took.as_secs_f64());
    }
}
