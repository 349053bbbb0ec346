//! The one integration crate. Real sockets, the real binary, the sandbox as the cloud; tests assert what the
//! upstream received and what the audit trail says.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;
mod http2_upstream;

mod admission;
mod callers;
mod strangers;
mod body;
mod contract;
mod idempotency;
mod dry_run;
mod exchange;
mod habits;
mod replies;
mod outcomes;
mod messages;
mod http2;
mod bounds;
mod overload;
mod egress;
mod causes;
mod namespaces;
mod token;
mod audit;
mod losses;
mod stored_trail;
mod clock;
mod trail_size;
mod states;
mod resolution;
mod configuration;
mod environment;
mod check;
mod reload;
mod changes;
mod files;
mod restart;
mod signals;
mod logs;
mod supervision;
mod operations;
mod metrics;
mod admin;
mod output;
mod secrets;
mod quotes;
mod permissions;
mod budgets;
mod hostile;
mod kills;
