//! Files that are followed while the gateway runs: certificates, and the user and password for the proxy.
//!
//! Each change is recorded in the trail, whether it was put into use or refused. A refused one changes nothing.

use serde_json::{Map, json};

use super::App;
use crate::audit::Audit;
use crate::changes::Changes;
use crate::supervisor::Supervisor;

/// Starts one task for each thing that is followed. They run on the background runtime, until the process ends.
pub(super) fn watch(app: &App, supervisor: &Supervisor) {
    let App { background, bound, egress, audit, metrics, .. } = app;
    let changes = &metrics.changes;
    // A task for each, so that a file that hangs holds up no other one.
    for (tls, address) in bound.iter().filter_map(|bound| Some((bound.tls()?, bound.address.to_string()))) {
        let vital = supervisor.vital(format!("the certificates of {address}"));
        let change = file_change(&CERTIFICATES, "listener", address, audit, changes);
        background.spawn(vital.run(tls.clone().watch(change)));
    }
    if let Some(identity) = egress.identity().cloned() {
        let vital = supervisor.vital("the client certificate");
        let change = file_change(&CERTIFICATES, "upstream", "client_cert_file".into(), audit, changes);
        background.spawn(vital.run(identity.watch(change)));
    }
    if let Some(roots) = egress.roots().cloned() {
        let vital = supervisor.vital("the roots of the upstream");
        let change = file_change(&CERTIFICATES, "upstream", "ca_file".into(), audit, changes);
        background.spawn(vital.run(roots.watch(change)));
    }
    if let Some(login) = egress.login().cloned() {
        let vital = supervisor.vital("user and password for the proxy");
        let change = file_change(&LOGIN, "upstream", "proxy_password_file".into(), audit, changes);
        background.spawn(vital.run(login.watch(change)));
    }
}

/// What is read again: the event in the trail, and the words for it in the log.
struct Kind {
    event: &'static str,
    what: &'static str,
}

const CERTIFICATES: Kind = Kind { event: "certificate_change", what: "the certificates" };
const LOGIN: Kind = Kind { event: "secret_change", what: "user and password for the proxy" };

/// Makes the function that reports a change of one thing: to `/status`, log and trail.
fn file_change(
    Kind { event, what }: &'static Kind,
    whose: &'static str,
    name: String,
    audit: &Audit,
    changes: &Changes,
) -> impl Fn(Result<(), String>) + use<> {
    let (audit, change) = (audit.clone(), changes.of(format!("{whose} {name}")));
    move |taken| {
        let mut details = Map::from_iter([(whose.to_owned(), json!(name))]);
        match taken {
            Ok(()) => {
                change.accepted();
                tracing::info!(whose, name, "{what} were read again, and the new ones are in use");
                details.insert("result".into(), json!("accepted"));
            }
            Err(error) => {
                change.refused(&error);
                // A warning and no error: the gateway serves on with the old files, until they expire.
                tracing::warn!(whose, name, %error, "{what} cannot be used; the old ones stay in use");
                details.insert("result".into(), json!("refused"));
                details.insert("reason".into(), json!(error));
            }
        }
        audit.event(event, details);
    }
}
