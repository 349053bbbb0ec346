//! Reads the trail: recovery at start, `audit verify`, `audit in-doubt`, `audit head`.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::chain::{Hash, Keys, lines, segments, stated};

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
    for path in segments(directory)? {
        found.last = Some((path.clone(), 0));
        for line in lines(&path)? {
            let line = line?;
            let length = line.bytes.len() as u64;
            if !line.whole {
                found.torn = Some((path.clone(), line.offset, length));
                continue;
            }
            found.take(&path, line.number, &line.bytes, keys);
            found.last = Some((path.clone(), line.offset + length + 1));
        }
    }
    Ok(found)
}

impl Found {
    fn take(&mut self, path: &Path, number: usize, line: &[u8], keys: &Keys) {
        let seq = self.seq + 1;
        let mut fault = |reason| self.faults.push(Fault { file: path.into(), line: number, seq, reason });
        match keys.check(line, &self.hash) {
            Ok(hash) => self.hash = hash,
            Err(reason) => {
                fault(reason);
                // Go on from what the line states, so that one changed record is one fault.
                self.hash = stated(line).unwrap_or(self.hash);
            }
        }
        self.seq = seq;
        let Ok(head) = serde_json::from_slice::<Head>(line) else {
            self.faults.push(Fault { file: path.into(), line: number, seq, reason: "not a record" });
            return;
        };
        if head.seq != seq {
            let reason = "the number does not follow: records were removed, added or swapped";
            self.faults.push(Fault { file: path.into(), line: number, seq, reason });
            self.seq = head.seq;
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
