//! Reads the claims of the window back from the audit trail, beside the serving workers.
//!
//! The intent of a keyed call says which key it claimed, its outcome what became of it, and with which answer. A
//! start has given every intent at the end of the trail an outcome; one that was left open before that is in doubt,
//! too. A line that cannot be read is passed over: `audit verify` names it.

use std::{
    borrow::Cow,
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use jiff::Timestamp;
use serde::Deserialize;
use uuid::Uuid;

use super::{
    Idempotency,
    claims::{Claims, Ending, How},
    now, seconds,
    twins::Was,
};
use crate::{
    audit::{
        Audit, StoredReply,
        chain::{Hash, Mark, lines, parse_hex, segments},
    },
    config,
    outcome::Outcome,
};

/// A call that began this long before the window may have ended in it, in seconds.
const LONGEST_CALL: u32 = 15 * 60;

/// How long a failed reading waits.
const RETRY: Duration = Duration::from_secs(1);

/// A record, as far as it matters here.
#[derive(Deserialize)]
struct Line<'a> {
    seq: u64,
    time: &'a str,
    kind: &'a str,
    id: Option<Uuid>,
    key: Option<&'a str>,
    print: Option<&'a str>,
    forced: Option<Uuid>,
    #[serde(borrow)]
    caller: Option<Cow<'a, str>>,
    #[serde(borrow)]
    route: Option<Cow<'a, str>>,
    #[serde(borrow)]
    operator: Option<Cow<'a, str>>,
    digest: Option<&'a str>,
    outcome: Option<&'a str>,
    status: Option<u16>,
    #[serde(borrow)]
    result_code: Option<Cow<'a, str>>,
    reply: Option<StoredReply>,
}

/// What an intent without its outcome says.
#[derive(Clone, Copy)]
enum Intent {
    Keyed(Mark),
    /// Its fingerprint.
    Unkeyed(Mark),
    /// Too old to matter, if it has an outcome.
    Other,
}

struct Reading<'a> {
    table: &'a Idempotency,
    claims: Claims,
    open: HashMap<Uuid, Intent, foldhash::fast::RandomState>,
    /// The last record to read, and the time before which none matters, for keys and for calls without one.
    last: u64,
    window_from: u32,
    twins_from: u32,
}

impl Idempotency {
    /// Reads the trail as the start found it, until that succeeds. Takes as long as the window's part of it is long.
    pub fn rebuild(&self, settings: &config::Idempotency, directory: &Path, audit: &Audit) {
        let mut failed = false;
        while let Err(error) = self.try_rebuild(settings, directory, audit) {
            if !failed {
                tracing::error!(%error, "earlier Idempotency-Keys cannot be read from the audit trail; calls with a key are refused meanwhile");
            }
            failed = true;
            thread::sleep(RETRY);
        }
        self.is_rebuilt.store(true, Ordering::Release);
        tracing::info!(keys = self.keys(), "Idempotency-Keys of the window are known");
    }

    fn try_rebuild(&self, settings: &config::Idempotency, directory: &Path, audit: &Audit) -> io::Result<()> {
        let now = now();
        let window = seconds(settings.window);
        let mut reading = Reading {
            table: self,
            claims: Claims::new(settings.max_keys, window),
            open: HashMap::default(),
            last: audit.begun(),
            window_from: now.saturating_sub(window),
            twins_from: now.saturating_sub(seconds(settings.fingerprint_window)),
        };
        let segments = since(segments(directory)?, reading.window_from.saturating_sub(LONGEST_CALL))?;
        let sizes =
            segments.iter().map(|path| Ok(fs::metadata(path)?.len())).collect::<io::Result<Vec<_>>>()?;
        self.read[0].store(0, Ordering::Relaxed);
        self.read[1].store(sizes.iter().sum(), Ordering::Relaxed);
        for path in &segments {
            for line in lines(path)? {
                let line = line?;
                if reading.take(&line.bytes) {
                    break;
                }
                self.read[0].fetch_add(line.bytes.len() as u64 + 1, Ordering::Relaxed);
            }
        }
        reading.close();
        *self.claims() = reading.claims;
        Ok(())
    }
}

/// The segments that hold a record of that time or later: from the one before the first that begins then.
fn since(segments: Vec<PathBuf>, from: u32) -> io::Result<Vec<PathBuf>> {
    #[derive(Deserialize)]
    struct Begin<'a> {
        time: &'a str,
    }
    let mut skipped = 0;
    for (index, path) in segments.iter().enumerate().skip(1) {
        let begin = lines(path)?.next().transpose()?;
        let begin =
            begin.and_then(|line| Some(unix(serde_json::from_slice::<Begin<'_>>(&line.bytes).ok()?.time)));
        if begin.is_none_or(|begin| begin >= from) {
            break;
        }
        skipped = index;
    }
    Ok(segments.into_iter().skip(skipped).collect())
}

impl Reading<'_> {
    /// Takes a record; whether it lies behind the last one that matters.
    fn take(&mut self, bytes: &[u8]) -> bool {
        let Ok(line) = serde_json::from_slice::<Line<'_>>(bytes) else {
            tracing::error!("a line of the audit trail cannot be read; a key may be forgotten");
            return false;
        };
        if line.seq > self.last {
            return true;
        }
        match (line.kind, line.id) {
            ("intent", Some(id)) => self.intent(id, &line),
            ("outcome", Some(id)) => {
                if let Some(intent) = self.open.remove(&id) {
                    self.outcome(id, intent, line);
                }
            }
            _ => {}
        }
        false
    }

    /// What was left open; it gets its outcome when the trail is verified.
    fn close(&mut self) {
        for (id, intent) in std::mem::take(&mut self.open) {
            match intent {
                Intent::Keyed(key) => self.claims.end(key, id, How::Unknown, now()),
                Intent::Unkeyed(twin) => self.table.twins().end(twin, id, Was::Unknown, now()),
                Intent::Other => {}
            }
        }
    }

    fn intent(&mut self, id: Uuid, line: &Line<'_>) {
        if let (Some(key), Some(print)) = (line.key.and_then(parse_hex), line.print.and_then(parse_hex)) {
            self.claims.restore(key, print, id, line.forced, unix(line.time));
            self.open.insert(id, Intent::Keyed(key));
            return;
        }
        let is_new = unix(line.time).saturating_add(LONGEST_CALL) > self.twins_from;
        let twin = if is_new { self.fingerprint(line) } else { None };
        self.open.insert(id, twin.map_or(Intent::Other, Intent::Unkeyed));
    }

    fn fingerprint(&self, line: &Line<'_>) -> Option<Mark> {
        let digest: Hash = parse_hex(line.digest?)?;
        let operator = line.operator.as_ref()?.as_bytes();
        Some(self.table.fingerprint(line.caller.as_ref()?, line.route.as_ref()?, operator, &digest))
    }

    fn outcome(&mut self, id: Uuid, intent: Intent, line: Line<'_>) {
        let time = unix(line.time);
        let outcome = Outcome::ALL.into_iter().find(|outcome| line.outcome == Some(outcome.as_str()));
        match intent {
            Intent::Keyed(key) => {
                let how = match (outcome, line.status) {
                    (Some(Outcome::NotSent | Outcome::Refused), _) => How::NotDone,
                    (Some(Outcome::Succeeded | Outcome::Failed), Some(status)) => {
                        if let Some(reply) = line.reply.filter(|_| time >= self.window_from) {
                            self.table.replies.insert(id, Arc::new(reply));
                        }
                        let result_code = line.result_code.map(|code| code.as_bytes().into());
                        How::Ended(Ending { status, result_code })
                    }
                    _ => How::Unknown,
                };
                self.claims.end(key, id, how, time);
            }
            Intent::Unkeyed(twin) => {
                let was = match outcome {
                    Some(Outcome::Unknown) => Was::Unknown,
                    Some(Outcome::Succeeded) => Was::Done,
                    _ => return,
                };
                if time >= self.twins_from {
                    self.table.twins().end(twin, id, was, time);
                }
            }
            Intent::Other => {}
        }
    }
}

/// Seconds since 1970; what is no time counts as now, so that it is not forgotten too early.
fn unix(time: &str) -> u32 {
    time.parse::<Timestamp>().ok().and_then(|time| u32::try_from(time.as_second()).ok()).unwrap_or_else(now)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use prometheus::Registry;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        admission::Peer,
        audit::{self, Answer, Durability},
        config::WithoutKey,
        error::Stage,
        idempotency::{Begun, Call},
    };

    fn settings() -> config::Idempotency {
        config::Idempotency {
            window: Duration::from_secs(24 * 60 * 60),
            max_keys: 1_000_000,
            reply_memory: 64 << 20,
            without_key: WithoutKey::Guard,
            fingerprint_window: Duration::from_secs(600),
        }
    }

    fn start(directory: &Path) -> Audit {
        let options = audit::Options {
            directory: directory.into(),
            durability: Durability::Kernel,
            segment_size: 64 << 20,
            key_file: None,
            queue: 16 * 1024,
            intent_deadline: Duration::from_secs(60),
            shown: Default::default(),
            retain: None,
            low_water: 0,
        };
        Audit::start(&options, audit::Metrics::new(&Registry::new()).unwrap()).unwrap()
    }

    fn table(audit: &Audit) -> Arc<Idempotency> {
        Arc::new(Idempotency::new(&settings(), audit))
    }

    fn answer() -> Answer {
        let reply = StoredReply {
            status: 200,
            content_type: Some("application/json".into()),
            body: r#"{"resultCode":"0409000","resultDesc":"Operation succeeded."}"#.into(),
        };
        Answer {
            outcome: Outcome::Succeeded,
            code: None,
            status: Some(200),
            upstream_status: Some(200),
            result_code: Some(b"0409000"[..].into()),
            attempts: 1,
            token_generation: 1,
            note: None,
            reply: Some(Arc::new(reply)),
        }
    }

    /// Calls with keys that all succeed, and one that is open when the process ends.
    async fn call(audit: &Audit, table: &Arc<Idempotency>, keys: u64) {
        table.is_rebuilt.store(true, Ordering::Relaxed);
        let operator = http::HeaderValue::from_static("1611917095665261978");
        for number in 0..=keys {
            let mut record = audit.open(Peer::Tcp(([127, 0, 0, 1], 5000).into()));
            record.caller("qa-console".into());
            record.route("appointQualityTask".into());
            record.operator(operator.clone());
            record.enter(Stage::Idempotency);
            let digest = audit.keys().digest(&number.to_be_bytes());
            let id = record.id();
            let call = Call {
                caller: "qa-console",
                route: "appointQualityTask",
                operator: &operator,
                digest: &digest,
                id,
            };
            let Ok(Begun::Claim(claim)) = table.begin_keyed(call, number.to_string().as_bytes(), None) else {
                panic!()
            };
            let intent = record.intent((8, &digest), &|line| claim.audit_members(line));
            if number == keys {
                intent.await.unwrap();
                std::mem::forget(record); // as a kill would leave it
                return;
            }
            if number % 1000 == 999 {
                intent.await.unwrap();
            } else {
                drop(intent);
            }
            let pending = claim.sent().finish(record.take(), &answer()).unwrap();
            if number % 1000 == 999 {
                assert!(pending.is_safe_by(tokio::time::Instant::now() + Duration::from_secs(60)).await);
            }
        }
    }

    async fn check(keys: u64) -> Duration {
        let folder = TempDir::new().unwrap();
        let audit = start(folder.path());
        let before = table(&audit);
        call(&audit, &before, keys).await;
        audit.close();
        drop(audit); // and with it its lock, once the writer has ended

        let began = Instant::now();
        let audit = start(folder.path());
        let serves = began.elapsed();
        let after = table(&audit);
        after.rebuild(&settings(), folder.path(), &audit);
        println!("{keys} keys: serves after {serves:?}, knows them after {:?}", began.elapsed());
        assert_eq!(after.keys() as u64, keys + 1);
        let operator = http::HeaderValue::from_static("1611917095665261978");
        for number in [0, keys - 1] {
            let digest = audit.keys().digest(&number.to_be_bytes());
            let id = audit.open(Peer::Tcp(([127, 0, 0, 1], 5000).into())).id();
            let call = Call {
                caller: "qa-console",
                route: "appointQualityTask",
                operator: &operator,
                digest: &digest,
                id,
            };
            let begun = after.begin_keyed(call, number.to_string().as_bytes(), None);
            assert!(matches!(begun, Ok(Begun::Replay(..))), "{begun:?}");
        }
        began.elapsed()
    }

    #[tokio::test]
    async fn keys_are_read_back() {
        check(2000).await;
    }

    /// `cargo test --release --lib -- --ignored a_million`; slow where nothing is optimised.
    #[tokio::test]
    #[ignore = "writes and reads more than a gigabyte"]
    async fn a_million_keys_are_read_back_within_the_deadline() {
        let took = check(999_000).await;
        assert!(took < Duration::from_secs(4 * 5), "{took:?}");
    }
}
