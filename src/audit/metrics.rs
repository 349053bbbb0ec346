//! The metrics of the audit trail.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::batch::Batch;
use super::entry::RecordKind;
use super::sync::Syncs;

use crate::registry::Registry;

/// The counters and gauges of the trail. Clones share their values.
#[derive(Clone, Debug)]
pub struct AuditMetrics {
    /// By kind. Handles are kept, so that counting a record needs no look-up by label.
    pub(super) records: [Counter; RecordKind::ALL.len()],
    pub(super) bytes: Counter,
    pub(super) batches: Counter,
    pub(super) errors: Counter,
    pub(super) syncs: Counter,
    pub(super) sync_errors: Counter,
    pub(super) sync_seconds: Counter<f64>,
    pub(super) removed: Counter,
    pub(super) removed_early: Counter,
    /// Files restored, and files lost.
    pub(super) files_lost: [Counter; 2],
    pub(super) aggregated: Counter,
    pub(super) dropped: Counter,
    pub(super) late: Counter,
    pub(super) queue: Gauge,
    pub(super) doubtful: Gauge,
    pub(super) unresolved: Gauge,
    pub(super) damaged: Gauge,
    pub(super) healthy: Gauge,
    pub(super) free: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

impl AuditMetrics {
    /// Registers the metrics and returns their handles.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let records: Family<KindLabel, Counter> =
            registry.metric("audit_records_total", "Records written, by kind.");
        let files_lost: Family<ResultLabel, Counter> = registry.metric(
            "audit_files_lost_total",
            "Files of the trail that were moved, deleted, replaced or cut by others, by result.",
        );
        Self {
            records: RecordKind::ALL.map(|kind| records.get_or_create_owned(&KindLabel { kind: kind.as_str() })),
            bytes: registry.metric("audit_bytes_total", "Bytes written."),
            batches: registry.metric("audit_batches_total", "Batches written."),
            errors: registry.metric("audit_write_errors_total", "Writes that failed, fdatasync included."),
            syncs: registry
                .metric("audit_syncs_total", "Times that fdatasync succeeded; only with durability disk."),
            sync_errors: registry.metric("audit_sync_errors_total", "Times that fdatasync failed."),
            sync_seconds: registry.metric("audit_sync_seconds_total", "Seconds spent in fdatasync."),
            removed: registry.metric(
                "audit_removed_segments_total",
                "Segments that were removed, since all their records were old enough.",
            ),
            removed_early: registry.metric(
                "audit_removed_early_total",
                "Removed segments whose `retain` had not passed yet, since the trail was larger than max_size.",
            ),
            files_lost: ["restored", "lost"]
                .map(|result| files_lost.get_or_create_owned(&ResultLabel { result })),
            aggregated: registry.renamed(
                "audit_folded_refusals_total",
                "audit_aggregated_rejections_total",
                "Refusals that were only counted in an aggregated record.",
            ),
            dropped: registry.metric("audit_dropped_refusals_total", "Refusals that were not recorded."),
            late: registry.renamed(
                "audit_late_intents_total",
                "audit_intent_timeouts_total",
                "Intents that were not committed in time.",
            ),
            queue: registry.metric("audit_queue_records", "Records that wait to be written."),
            doubtful: registry.metric(
                "clock_doubtful",
                "Whether the wall clock is doubtful, so that no audit segment is removed.",
            ),
            unresolved: registry.metric(
                "unresolved_outcomes",
                "Calls of unknown outcome that are not resolved.",
            ),
            damaged: registry.metric(
                "audit_damaged",
                "Whether a part of the trail within the idempotency window is lost and the loss is not accepted.",
            ),
            healthy: registry.metric(
                "audit_healthy",
                "Whether new calls can be recorded; while they cannot, none is sent.",
            ),
            free: registry.metric("audit_free_bytes", "Free bytes on the file system of the trail."),
        }
    }

    /// Counts a file that was lost, or restored at once.
    pub(super) fn files_lost(&self, is_restored: bool) {
        self.files_lost[usize::from(!is_restored)].inc();
    }

    /// Counts a committed batch.
    pub(super) fn written(&self, batch: &Batch) {
        for (counter, count) in self.records.iter().zip(batch.kinds) {
            if count > 0 {
                counter.inc_by(count);
            }
        }
        self.bytes.inc_by(batch.size() as u64);
        self.batches.inc();
    }

    /// Counts calls of fdatasync.
    pub(super) fn synced(&self, syncs: &Syncs) {
        if syncs.good + syncs.failed == 0 {
            // Durability is `kernel`: without this each batch would add three zeros.
            return;
        }
        self.syncs.inc_by(syncs.good);
        self.sync_errors.inc_by(syncs.failed);
        self.sync_seconds.inc_by(syncs.took.as_secs_f64());
    }
}
