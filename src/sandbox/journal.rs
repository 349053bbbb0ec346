//! The journal of received requests: byte for byte, from the first byte on, finished or not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::Cloud;

/// How many requests (token calls included) and how many tasks are stored; beyond that the oldest are dropped.
pub const KEPT: usize = 200_000;

/// One request as it was received, or the part of it that was.
#[derive(Clone, Debug)]
pub struct Received {
    /// The number of the connection, from 1, in order of acceptance.
    pub connection: u64,
    /// The arrival of the first byte, by the wall clock.
    pub time: SystemTime,
    /// The arrival of the first byte, as the time since the sandbox was started or reset, by the monotonic clock.
    pub at: Duration,
    /// The head with its empty line, or the part that arrived, or bytes that are not HTTP.
    pub head: Vec<u8>,
    /// The body, or the part that arrived.
    pub body: Vec<u8>,
    /// Whether the whole request arrived.
    pub complete: bool,
    /// The status of the reply, set before its first byte is sent; `None` if no HTTP reply was begun.
    pub status: Option<u16>,
}

/// One call of the token endpoint.
#[derive(Clone, Debug)]
pub struct TokenCall {
    /// The call as it was received.
    pub request: Received,
    /// The value of `X-Token-Expire`, if the call has exactly one.
    pub asked: Option<String>,
    /// The token that was issued, without a scripted `Bearer ` prefix.
    pub issued: Option<String>,
}

/// All entries, by a number that grows with the arrival of the first byte.
pub(super) struct Journal {
    started: Instant,
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

/// One request. It is a token call if `token` is set, with the requested lifetime and the issued token; else a business call.
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

    /// Drops all entries.
    pub(super) fn clear(&mut self) {
        // `next` is not reset, so that a request which is being received cannot write into the entry of another one.
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

/// Writes the entry of a request that is being received. The first byte adds the entry. Once the entry is dropped, all methods do
/// nothing.
pub(super) struct Recording {
    cloud: Arc<Cloud>,
    connection: u64,
    number: Option<u64>,
}

impl Recording {
    pub(super) fn new(cloud: Arc<Cloud>, connection: u64) -> Self {
        Self { cloud, connection, number: None }
    }

    /// Records the head of a business call, or the part that has arrived.
    pub(super) fn head(&mut self, bytes: &[u8]) {
        self.record(bytes, None);
    }

    /// Records the head of a token call, or the part that has arrived. The entry is never visible as a business call in between.
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

    /// Appends a part of the body.
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

    /// Drops the entry, if a part of the head has made one, since the call is a control call.
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
