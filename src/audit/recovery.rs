//! Reads the trail: recovery at start, `audit verify`, `audit in-doubt`, `audit head`.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::chain::{Hash, Keys, first_seq, lines, segments, stated};

/// No record has so high a number; a line that states one is no place to go on from.
const MAX_SEQ: u64 = 1 << 60;

/// What reading a trail found.
#[derive(Debug, Default)]
pub struct Found {
    /// The last whole record's number.
    pub seq: u64,
    /// The last whole record's hash.
    pub hash: Hash,
    /// Intents without an outcome, by request id, in the order of their ids, which is that of time.
    pub in_doubt: BTreeMap<String, Doubt>,
    /// What does not fit, in the order of the trail.
    pub faults: Vec<Fault>,
    /// The last line, if no newline ends it: the segment, and where the line begins.
    pub torn: Option<(PathBuf, u64, u64)>,
    /// The last segment and its length without a torn line.
    pub last: Option<(PathBuf, u64)>,
}

/// An intent without an outcome.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Doubt {
    /// The request's id.
    pub id: String,
    /// When the intent was recorded.
    pub time: String,
    /// Who called.
    #[serde(default)]
    pub caller: Option<String>,
    /// Which route.
    #[serde(default)]
    pub route: Option<String>,
    /// Which task.
    #[serde(default)]
    pub task: Option<serde_json::Value>,
}

/// A line that does not fit.
#[derive(Clone, Debug, Serialize)]
pub struct Fault {
    /// The segment.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The number that the record should have.
    pub seq: u64,
    /// What is wrong.
    pub reason: &'static str,
}

#[derive(Deserialize)]
struct Head {
    seq: u64,
    kind: String,
    #[serde(default)]
    id: Option<String>,
}

/// Reads all segments of a directory.
pub fn read(directory: &Path, keys: &Keys) -> io::Result<Found> {
    let mut found = Found::default();
    let segments = segments(directory)?;
    for (index, path) in segments.iter().enumerate() {
        let is_last = index + 1 == segments.len();
        found.last = Some((path.clone(), 0));
        for line in lines(path)? {
            let line = line?;
            let length = line.bytes.len() as u64;
            if line.whole || !is_last {
                found.take(path, line.number, &line.bytes, keys);
                found.last = Some((path.clone(), line.offset + length + 1));
            }
            if !line.whole && is_last {
                found.torn = Some((path.clone(), line.offset, length));
            } else if !line.whole {
                // A crash tears the last line of all; elsewhere somebody did.
                found.fault(path, line.number, "the line has no end");
            }
        }
    }
    Ok(found)
}

impl Found {
    /// Where a writer goes on: the last number given away, and the segment with its length. What is damaged
    /// stays as it is: new records then go into a new segment, whose name is that of no other.
    pub(super) fn resume(&self) -> io::Result<(u64, Option<(File, u64)>)> {
        match &self.last {
            Some((path, length)) if self.faults.is_empty() => {
                Ok((self.seq, Some((OpenOptions::new().write(true).open(path)?, *length))))
            }
            Some((path, _)) => Ok((self.seq.max(first_seq(path)), None)),
            None => Ok((self.seq, None)),
        }
    }

    fn fault(&mut self, path: &Path, line: usize, reason: &'static str) {
        self.faults.push(Fault { file: path.into(), line, seq: self.seq, reason });
    }

    fn take(&mut self, path: &Path, number: usize, line: &[u8], keys: &Keys) {
        let seq = self.seq + 1;
        self.seq = seq;
        match keys.check(line, &self.hash) {
            Ok(hash) => self.hash = hash,
            Err(reason) => {
                self.fault(path, number, reason);
                // Go on from what the line states, so that one changed record is one fault.
                self.hash = stated(line).unwrap_or(self.hash);
            }
        }
        let Ok(head) = serde_json::from_slice::<Head>(line) else {
            self.fault(path, number, "not a record");
            return;
        };
        if head.seq != seq {
            self.fault(path, number, "the number does not follow: records were removed, added or swapped");
            // Go on from what the line states, unless nothing could follow it.
            self.seq = if head.seq < MAX_SEQ { head.seq } else { seq };
        }
        match (head.kind.as_str(), head.id) {
            ("intent", Some(id)) => {
                if let Ok(doubt) = serde_json::from_slice(line) {
                    self.in_doubt.insert(id, doubt);
                }
            }
            ("outcome", Some(id)) => drop(self.in_doubt.remove(&id)),
            _ => {}
        }
    }
}
