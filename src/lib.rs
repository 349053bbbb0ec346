//! A gateway that lets internal apps call CCSQM without holding a credential.
//!
//! # The way of a request
//!
//! [`server`] accepts a connection. [`gateway`] walks each request through nine stages: the first three in `Gateway::enter`, the
//! others in `Gateway::proxy`. What it cannot refuse any more it hands to the [`exchange`], whose reply it passes to the caller.
//!
//! | | stage | decides | module |
//! |---|---|---|---|
//! | 1 | admission | is there room, and who calls | [`concurrency`], [`admission`] |
//! | 2 | route | which route, may this caller use it, as this operator | [`route`] |
//! | 3 | rate_limit | the caller's own limit | [`rate_limit`] |
//! | 4 | contract | the whole body against the route's contract | [`contract`] |
//! | 5 | idempotency | was the same call made before | [`idempotency`] |
//! | 6 | token | a usable token | [`token`] |
//! | 7 | quota | the upstream's budget | [`rate_limit`] |
//! | 8 | audit | connection reserved, intent on record | [`upstream::pool`], [`audit`] |
//! | 9 | upstream | send, replay once, classify | [`exchange`], on a connection of [`upstream`] |
//!
//! Where to look:
//!
//! * **The token** goes into the headers in [`upstream::head`]; `exchange/terms.rs` makes the request with them.
//! * **The outcome** of a reply is decided by [`result_rule`], unless `exchange/conclude.rs` finds that the upstream refused the
//!   token. `Exchange::fail` decides it where there is no reply, which includes one that breaks off within its first 64 KiB.
//! * **The record** of a request is closed by `exchange/settlement.rs`, which then ends its claim; by [`gateway`] if nothing was
//!   sent (refused, replayed, dry run); by its `Drop` if its future is dropped; by the next start after a crash.
//! * **A caller that leaves** is noticed by `server/connection`, which tells [`disconnect`]. Where the request waits for a token, a
//!   permit or a connection, it is refused. The exchange goes on without the caller (`exchange/detached.rs`). Whether a success
//!   reached its caller is settled by `idempotency/delivery.rs`.
//! * **A failure** gets its code from the stage's error in [`error`], which writes the text; [`model::code`] has the statuses.
//! * **hyper** is relied on beyond its documentation in some places: `tests/hyper.rs` has a test for each.
//!
//! # Layers
//!
//! The modules below are listed by layers, the upper ones first. A module and its children are one unit. A unit names units of
//! lower layers, and of its own layer without a circle. Stages do not name each other, but for proofs of earlier stages (such
//! as [`admission::Admitted`]) and for the trail, which is the memory of [`idempotency`]. `tests/layers.rs` holds all of this.
//!
//! # Invariants
//!
//! * Nothing leaves before its intent is on record, and everything refusable is refused before that.
//! * Once an exchange has the record, nobody cancels it: it belongs to itself, not to the caller's connection.
//! * Only [`upstream::head`] makes the headers of an upstream request; of the caller's head only the operator is in them.
//! * Each stage has an error of its own; only [`error`] turns it into a code and a text.
//! * Only [`secret`] and [`token`] hold a credential, and neither can be printed; elsewhere it is a header value that is marked
//!   sensitive. The keys of certificates live in rustls' own types.
//! * A request sees one [`state`]: what [`reload`] swaps, it swaps whole.

// Around the way of a request.
pub mod app; // composition root: build, start, supervise, drain
pub mod server; // workers, accept, connections and their deadlines
pub mod admin; // /livez, /readyz, /metrics, /status
pub mod control; // the control socket: resolutions, the clock
pub mod reload; // a configuration that changes
pub mod preflight; // loads a configuration, and looks at the files that it names
mod watchdog; // whether all event loops go round

// The way of a request.
pub mod gateway; // the request function
pub mod state; // the compiled configuration, routes included
pub mod error; // failure to status, code and text
pub mod metrics; // what is counted

// Behind the intent.
pub mod exchange; // stage 9: send, replay once, classify, settle; with or without the caller

// Stages.
pub mod admission; // stage 1: who calls
pub mod route; // stage 2: exact path and method, caller, operator
pub mod contract; // stage 4: body to CheckedBody
pub mod idempotency; // stage 5: the same call twice is one task; undelivered successes
pub mod token; // stage 6: the slot
pub mod audit; // stage 8: record, chain, recovery
pub mod upstream; // stages 8 and 9: pool, HTTP/1.1 and HTTP/2, breaker, head
pub mod result_rule; // stage 9: what a reply says of the task

// Parts of stages.
pub mod concurrency; // stage 1: bounds on concurrent work
pub mod request_head; // a caller's head
pub mod rate_limit; // stages 3 and 7: GCRA
pub mod connect; // TCP and TLS to the upstream and to the token endpoint
pub mod secret; // zeroised buffers
pub mod reason; // a cause with its full text, for operators
pub mod trouble; // the last trouble of one part
pub mod changes; // what came of changes of files
pub mod log; // log lines on their way to stderr

// Configuration.
pub mod config; // text to typed values and their relations

// Words.
pub mod model; // plain data: outcomes, codes, stages, causes, ids

// Tools.
mod backoff; // pauses behind refused credentials
mod base64; // bytes as text, for the proxy and the sandbox
pub mod clock; // the time, read once a turn
pub mod disconnect; // whether the caller is still there
mod field_values; // what values of header fields say
mod files; // reading what others may replace
mod ids; // which users and groups the kernel can show
mod json; // strict JSON, for bodies and replies
pub mod keyed_hash; // HMAC, hex
mod pem; // certificates, keys, revocation lists
pub mod plain; // characters that may be taken for something else
mod registry; // metrics, made and registered in one step
mod seats; // connections that make room for others
mod supervisor; // what must not end before the process does
mod watched; // files, looked at to notice a change

// Beside the layers.
pub mod sandbox; // the cloud in one process, for demo and tests
#[cfg(any(test, fuzzing))]
pub mod fuzz; // readers of foreign bytes, for tests only
