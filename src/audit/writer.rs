//! The writer's thread: formats, chains and writes, one write a batch.
//!
//! Nothing that failed is believed: the segment is cut back to its last good length and the batch is tried
//! again, while intents time out. A stuck disk holds this thread, never a worker.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    chain::{Hash, Keys},
    queue::Shared,
    record::Entry,
};

/// How long a failed write waits.
const RETRY: Duration = Duration::from_millis(100);

/// Where the trail stands.
pub(super) struct Writer {
    pub(super) directory: PathBuf,
    pub(super) segment_size: u64,
    pub(super) keys: Keys,
    pub(super) seq: u64,
    pub(super) hash: Hash,
    pub(super) segment: Option<(File, u64)>,
    /// Held for as long as the trail is written.
    pub(super) _lock: File,
}

impl Writer {
    /// Writes until the trail is closed and everything queued is written.
    pub(super) fn run(mut self, shared: &Arc<Shared>) {
        let mut batch = Vec::new();
        while shared.next_batch(&mut batch) {
            let mut text = Vec::with_capacity(batch.len() * 512);
            let before = (self.seq, self.hash);
            for entry in &batch {
                self.append(entry, &mut text);
            }
            if !self.write_persistently(&text, before.0 + 1, shared) {
                (self.seq, self.hash) = before;
                tracing::error!(
                    records = batch.len(),
                    "the audit trail closes with records that could not be written"
                );
                return;
            }
            shared.written(&batch, text.len());
            batch.clear();
        }
    }

    /// Formats one record and links it.
    pub(super) fn append(&mut self, entry: &Entry, text: &mut Vec<u8>) {
        self.seq += 1;
        let mut line = Vec::with_capacity(512);
        entry.format(self.seq, &self.keys, &mut line);
        self.hash = self.keys.seal(&mut line, &self.hash);
        text.extend_from_slice(&line);
    }

    /// Tries until it is written; gives up only when the trail is closing.
    fn write_persistently(&mut self, text: &[u8], first: u64, shared: &Shared) -> bool {
        let mut failed = false;
        loop {
            match self.write(text, first) {
                Ok(()) => {
                    if failed {
                        tracing::info!("the audit trail can be written again");
                    }
                    shared.set_healthy(true);
                    return true;
                }
                Err(error) => {
                    shared.count_error();
                    if !failed {
                        tracing::error!(%error, "the audit trail cannot be written; nothing is sent meanwhile");
                    }
                    failed = true;
                    shared.set_healthy(false);
                    if shared.wait_for_retry(RETRY) {
                        return self.write(text, first).is_ok();
                    }
                }
            }
        }
    }

    /// Writes records of which `first` is the first one's number.
    pub(super) fn write(&mut self, text: &[u8], first: u64) -> io::Result<()> {
        if self.segment.as_ref().is_some_and(|(_, length)| *length >= self.segment_size) {
            self.segment = None;
        }
        let (file, length) = match &mut self.segment {
            Some(segment) => segment,
            empty => empty.insert((open(&self.directory, first)?, 0)),
        };
        match file.write_all_at(text, *length) {
            Ok(()) => {
                *length += text.len() as u64;
                Ok(())
            }
            Err(error) => {
                file.set_len(*length)?;
                Err(error)
            }
        }
    }
}

/// A segment is named after the first record in it.
fn open(directory: &Path, first: u64) -> io::Result<File> {
    let path = directory.join(format!("audit-{first:020}.jsonl"));
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}
