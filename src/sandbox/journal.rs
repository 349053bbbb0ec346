//! What was received, byte for byte, from the first byte on and whatever became of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::Cloud;

/// Requests (token calls among them) and tasks that are kept; the oldest are forgotten beyond it.
pub const KEPT: usize = 200_000;

/// One request as it came, or as much of it as came.
#[derive(Clone, Debug)]
pub struct Received {
    /// Number of the connection, from 1, in order of acceptance.
    pub connection: u64,
    /// Arrival of the first byte, by the wall clock.
    pub time: SystemTime,
    /// Arrival of the first byte, since the sandbox was started or reset, by the monotonic clock.
    pub at: Duration,
    /// The head with its empty line, or the part that came, or bytes that were not HTTP.
    pub head: Vec<u8>,
    /// The body, or the part that came.
    pub body: Vec<u8>,
    /// Whether all of it came.
    pub complete: bool,
    /// The status answered, set before its first byte goes out; none if no HTTP answer was begun.
    pub status: Option<u16>,
}

/// One call of the token endpoint.
#[derive(Clone, Debug)]
pub struct TokenCall {
    /// The call as it came.
    pub request: Received,
    /// The value of `X-Token-Expire`.
    pub asked: Option<String>,
    /// The token handed out.
    pub issued: Option<String>,
}

pub(super) struct Journal {
    started: Instant,
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

/// A request is an API call, unless its head, or what came of it, is that of a token call.
struct Entry {
    request: Received,
    token: Option<(Option<String>, Option<String>)>,
}

impl Default for Journal {
    fn default() -> Self {
        Self { started: Instant::now(), next: 0, entries: BTreeMap::new() }
    }
}

impl Journal {
    pub(super) fn requests(&self) -> Vec<Received> {
        self.entries
            .values()
            .filter(|entry| entry.token.is_none())
            .map(|entry| entry.request.clone())
            .collect()
    }

    pub(super) fn token_calls(&self) -> Vec<TokenCall> {
        let call = |entry: &Entry| {
            let (asked, issued) = entry.token.clone()?;
            Some(TokenCall { request: entry.request.clone(), asked, issued })
        };
        self.entries.values().filter_map(call).collect()
    }

    /// Forgets everything. Numbers go on, so that a request under way can't write into another's entry.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.started = Instant::now();
    }

    fn open(&mut self, connection: u64) -> u64 {
        if self.entries.len() == KEPT {
            self.entries.pop_first();
        }
        let number = self.next;
        self.next += 1;
        let request = Received {
            connection,
            time: SystemTime::now(),
            at: self.started.elapsed(),
            head: Vec::new(),
            body: Vec::new(),
            complete: false,
            status: None,
        };
        self.entries.insert(number, Entry { request, token: None });
        number
    }
}

/// The entry of a request that is under way. Made by its first byte; a no-op once the entry is forgotten.
pub(super) struct Recording {
    cloud: Arc<Cloud>,
    connection: u64,
    number: Option<u64>,
}

impl Recording {
    pub(super) fn new(cloud: Arc<Cloud>, connection: u64) -> Self {
        Self { cloud, connection, number: None }
    }

    /// The head as far as it came.
    pub(super) fn head(&mut self, bytes: &[u8]) {
        self.record(bytes, None);
    }

    /// The head of a token call as far as it came: nobody may see it as an API call in between.
    pub(super) fn token_call(&mut self, bytes: &[u8], asked: Option<&str>) {
        self.record(bytes, Some((asked.map(str::to_owned), None)));
    }

    fn record(&mut self, head: &[u8], token: Option<(Option<String>, Option<String>)>) {
        let mut journal = self.cloud.journal();
        let number = *self.number.get_or_insert_with(|| journal.open(self.connection));
        if let Some(entry) = journal.entries.get_mut(&number) {
            entry.request.head.clear();
            entry.request.head.extend_from_slice(head);
            entry.token = token;
        }
    }

    /// More of the body.
    pub(super) fn body(&self, bytes: &[u8]) {
        self.edit(|entry| entry.request.body.extend_from_slice(bytes));
    }

    pub(super) fn complete(&self) {
        self.edit(|entry| entry.request.complete = true);
    }

    pub(super) fn status(&self, status: u16) {
        self.edit(|entry| entry.request.status = Some(status));
    }

    pub(super) fn issued(&self, token: &str) {
        self.edit(|entry| {
            if let Some((_, issued)) = &mut entry.token {
                *issued = Some(token.to_owned());
            }
        });
    }

    /// It is a control call: no entry.
    pub(super) fn forget(&self) {
        if let Some(number) = self.number {
            self.cloud.journal().entries.remove(&number);
        }
    }

    fn edit(&self, change: impl FnOnce(&mut Entry)) {
        if let Some(number) = self.number
            && let Some(entry) = self.cloud.journal().entries.get_mut(&number)
        {
            change(entry);
        }
    }
}
