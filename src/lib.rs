//! A gateway that lets internal apps call CCSQM without holding a credential.
//!
//! # Life of a request
//!
//! [`server`] accepts a connection. [`gateway`] takes each request through nine stages: the first three in `Gateway::enter`,
//! the others in `Gateway::proxy`. A request that can no longer be refused goes to the [`exchange`], whose reply the gateway
//! passes to the caller.
//!
//! | | stage | decides | module |
//! |---|---|---|---|
//! | 1 | admission | is there room (load shedding), and who calls | [`concurrency`], [`admission`] |
//! | 2 | route | which route, may this caller use it, as this operator | [`route`] |
//! | 3 | rate_limit | the caller's own limit (GCRA) | [`rate_limit`] |
//! | 4 | contract | the whole body against the route's contract | [`contract`] |
//! | 5 | idempotency | was the same call made before (deduplication) | [`idempotency`] |
//! | 6 | token | a usable token, fetched by one task for all (single flight) | [`token`] |
//! | 7 | quota | the upstream's budget, shared by all callers | [`rate_limit`] |
//! | 8 | audit | connection reserved, intent committed (write-ahead, group commit) | [`upstream::pool`], [`audit`] |
//! | 9 | upstream | send, replay once, classify | [`exchange`], on a connection of [`upstream`] |
//!
//! Where to find what:
//!
//! * **The token** is put into the headers by [`upstream::head`]; `exchange/terms.rs` builds the request with them.
//! * **The outcome** of a reply is decided by [`result_rule`], unless `exchange/conclude.rs` finds that the upstream refused the
//!   token. Without a reply, which includes one that breaks off within its first 64 KiB, `Exchange::fail` decides it.
//! * **The record** of a request is closed by `exchange/settlement.rs`, which then ends its claim; by [`gateway`] if nothing was
//!   sent (refused, replayed, dry run); by its `Drop` if its future is dropped; by the next start after a crash.
//! * **A caller that disconnects** is noticed by `server/connection`, which notes it in [`disconnect`]. A request that waits for
//!   a token, a permit or a connection is refused then. An exchange goes on without its caller (`exchange/detached.rs`). Whether
//!   a success reached its caller is settled by `idempotency/delivery.rs`.
//! * **A failure** gets its code and text in [`error`], from the error of its stage; [`model::code`] has the statuses.
//! * **hyper**: where the code relies on more than hyper documents, `tests/hyper.rs` has a test for it.
//!
//! # Layers
//!
//! The modules below are listed by layers, the upper ones first. A module and its children are one unit. A unit uses units of
//! lower layers, and of its own layer without a cycle. Stages do not use each other, with two exceptions: proofs of earlier
//! stages (such as [`admission::Admitted`]), and the trail, which is the memory of [`idempotency`]. `tests/layers.rs` checks
//! this.
//!
//! # Invariants
//!
//! * No request is sent before its intent is committed, and whatever can be refused is refused before that.
//! * Once an exchange has the record, nothing cancels it: it does not depend on the caller's connection.
//! * Only [`upstream::head`] makes the headers of an upstream request; of the caller's head only the operator is in them.
//! * Each stage has an error of its own; only [`error`] turns it into a code and a text.
//! * Only [`secret`] and [`token`] hold a credential, and neither can be printed; elsewhere it is a header value that is marked
//!   sensitive. The keys of certificates are held by rustls' own types.
//! * A request sees one [`state`]: [`reload`] swaps it as a whole.

// Around a request: process, listeners, operation.
pub mod app; // composition root: build, start, supervise, drain
pub mod server; // workers, accept, connections and their deadlines
pub mod admin; // /livez, /readyz, /metrics, /status
pub mod control; // the control socket: resolutions, the clock
pub mod reload; // puts a changed configuration into effect
pub mod preflight; // loads a configuration, and checks the files that it names
mod watchdog; // whether all event loops still turn

// A request.
pub mod gateway; // the request function
pub mod state; // the compiled configuration, routes included
pub mod error; // failure to status, code and text
pub mod metrics; // counters, gauges and histograms

// Behind the intent.
pub mod exchange; // stage 9: send, replay once, classify, settle; with or without the caller

// Stages.
pub mod admission; // stage 1: who calls
pub mod route; // stage 2: exact path and method, caller, operator
pub mod contract; // stage 4: receives a body and checks it against its schema
pub mod idempotency; // stage 5: deduplication; undelivered successes
pub mod token; // stage 6: one slot per credential, and its fetcher
pub mod audit; // stage 8: write-ahead trail: records, hash chain, crash recovery
pub mod upstream; // stages 8 and 9: connection pool, HTTP/1.1 and HTTP/2, circuit breaker, head
pub mod result_rule; // stage 9: classifies a reply

// Parts of stages.
pub mod concurrency; // stage 1: bounds on concurrent work
pub mod request_head; // a caller's head, read once
pub mod rate_limit; // stages 3 and 7: rate limits (GCRA)
pub mod connect; // TCP and TLS to the upstream and to the token endpoint
pub mod secret; // zeroised buffers
pub mod reason; // a cause with its full text, for operators
pub mod trouble; // the last failure of one part
pub mod changes; // results of changes of files
pub mod log; // the queue of log lines, which never blocks

// Configuration.
pub mod config; // text to typed values and their relations

// Model.
pub mod model; // plain data: outcomes, codes, stages, causes, ids

// Tools.
mod backoff; // exponential back-off after refused credentials
mod base64; // bytes as text, for the proxy and the sandbox
pub mod clock; // the time, read once a turn of the event loop
pub mod disconnect; // whether the caller is still connected
mod field_values; // parses values of header fields
mod files; // reads files that others may replace
mod ids; // which users and groups the kernel can show
mod json; // strict JSON, for bodies and replies
pub mod keyed_hash; // HMAC, hex
mod pem; // certificates, keys, revocation lists
pub mod plain; // escapes characters that may be taken for something else
mod registry; // makes and registers metrics in one step
mod seats; // bounded connections, of which the longest idle makes room
mod supervisor; // threads and tasks that must not end before the process
mod file_watch; // notices changed files

// Beside the layers.
pub mod sandbox; // the cloud in one process, for demo and tests
// Compiled for tests only: it reaches into private parsers of foreign bytes.
#[cfg(any(test, fuzzing))]
pub mod fuzz;
