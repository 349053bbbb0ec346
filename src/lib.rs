//! A gateway that lets internal apps call CCSQM without holding a credential.
//!
//! # The way of a request
//!
//! The modules stand in the order in which a request meets them. [`server`] accepts a connection,
//! [`gateway`] walks the request through nine stages, in one straight function:
//!
//! | stage | decides | module |
//! |---|---|---|
//! | admission | is there room, and who calls | [`admission`] |
//! | route | which route, may this caller use it, as this operator | [`route`] |
//! | rate_limit | the caller's own limit | [`rate_limit`] |
//! | contract | the whole body against the route's contract | [`contract`] |
//! | idempotency | was the same call made before | [`idempotency`] |
//! | token | a usable token | [`token`] |
//! | quota | the upstream's budget | [`rate_limit`] |
//! | audit | connection reserved, intent made safe | [`audit`], [`upstream::pool`] |
//! | upstream | send, replay once after a refused token, classify | [`upstream`] |
//!
//! # Invariants
//!
//! * Only [`gateway`] calls stages; stages never call each other.
//! * Nothing leaves before its intent is safe, and everything refusable is refused before the intent.
//! * From the intent on nobody cancels: the exchange belongs to itself, not to the caller's connection.
//! * Only [`upstream::head`] makes an upstream head; nothing of the caller's head is in it.
//! * Only [`error`] turns a failure into a status, a code and a text.
//! * Only [`secret`] and [`token`] ever hold a credential, and neither can be printed; the keys of certificates live in
//!   rustls' own types.
//! * A request sees one [`state`]: what [`reload`] swaps, it swaps whole.

// The way of a request.
pub mod server; // workers, accept, connections and their deadlines
pub mod gateway; // the request function
pub mod admission; // stage 1: room, and who calls
pub mod route; // stage 2: exact path and method, caller, operator
pub mod rate_limit; // stages 3 and 7: GCRA
pub mod contract; // stage 4: body to CheckedBody
pub mod idempotency; // stage 5: the same call twice is one task
pub mod token; // stage 6: the slot
pub mod audit; // stage 8: record, chain, recovery
pub mod upstream; // stage 9: pool, HTTP/1.1 and HTTP/2, breaker
pub mod exchange; // from the intent on: send, replay once, classify, settle
pub mod result_rule; // what a reply says of the task
pub mod error; // failure to status, code and text
pub mod reason; // a cause with its full text, for operators

// What all of it speaks in.
pub mod model; // plain data

// Beside the way.
pub mod app; // composition root
pub mod state; // the compiled configuration
pub mod config; // the validated configuration
pub mod preflight; // loads a configuration, and looks at the files that it names
pub mod reload; // a configuration that changes
mod backoff; // pauses behind refused credentials
pub mod clock; // the time, read once a turn
pub mod concurrency; // bounds on concurrent work
pub mod disconnect; // whether the caller is still there
mod field_values; // what values of header fields say
pub mod request_head; // a caller's head
mod ids; // which users and groups the kernel can show
pub mod plain; // characters that may be taken for something else
mod base64; // bytes as text, for the proxy and the sandbox
mod json; // strict JSON, for bodies and replies
pub mod keyed_hash; // HMAC, hex
pub mod connect; // TCP and TLS to the upstream and to the token endpoint
pub mod secret; // zeroised buffers
mod pem; // certificates, keys, revocation lists
mod files; // reading what others may replace
pub mod changes; // what came of changes of files
pub mod trouble; // the last trouble of one part
mod watched; // files, looked at to notice a change
pub mod metrics; // what is counted
pub mod log; // log lines on their way to stderr
mod supervisor; // what must not end before the process does
mod watchdog; // whether all event loops go round
mod seats; // connections that make room for others
pub mod admin; // /livez, /readyz, /metrics, /status
pub mod control; // the control socket: resolutions, the clock
pub mod sandbox; // the cloud in one process, for demo and tests
#[cfg(any(test, fuzzing))]
pub mod fuzz; // readers of foreign bytes, for tests only
