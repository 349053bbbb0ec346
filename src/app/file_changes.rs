//! Certificates, and user and password for the proxy, that change while the gateway runs.

use serde_json::{Map, json};

use super::App;
use crate::audit::Audit;
use crate::changes::Changes;
use crate::supervisor::Supervisor;

/// Takes certificates, and user and password for the proxy, that change while the gateway runs, and puts on record what
/// came of it.
pub(super) fn keep_up(app: &App, supervisor: &Supervisor) {
    let App { background, bound, egress, audit, metrics, .. } = app;
    let changes = &metrics.changes;
    for (tls, address) in bound.iter().filter_map(|bound| Some((bound.tls()?, bound.address.to_string()))) {
        let vital = supervisor.vital(format!("the certificates of {address}"));
        let change = file_change(&CERTIFICATES, "listener", address, audit, changes);
        background.spawn(vital.run(tls.clone().keep_up(change)));
    }
    if let Some(identity) = egress.identity().cloned() {
        let vital = supervisor.vital("the client certificate");
        let change = file_change(&CERTIFICATES, "upstream", "client_cert_file".into(), audit, changes);
        background.spawn(vital.run(identity.keep_up(change)));
    }
    if let Some(roots) = egress.roots().cloned() {
        let vital = supervisor.vital("the roots of the upstream");
        let change = file_change(&CERTIFICATES, "upstream", "ca_file".into(), audit, changes);
        background.spawn(vital.run(roots.keep_up(change)));
    }
    if let Some(login) = egress.login().cloned() {
        let vital = supervisor.vital("user and password for the proxy");
        let change = file_change(&LOGIN, "upstream", "proxy_password_file".into(), audit, changes);
        background.spawn(vital.run(login.keep_up(change)));
    }
}

/// What is read again: the event in the trail, and its name in the log.
struct Kind {
    event: &'static str,
    what: &'static str,
}

const CERTIFICATES: Kind = Kind { event: "certificate_change", what: "the certificates" };
const LOGIN: Kind = Kind { event: "secret_change", what: "user and password for the proxy" };

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
                tracing::info!(whose, name, "{what} were read again and are in use");
                details.insert("result".into(), json!("accepted"));
            }
            Err(error) => {
                change.refused(&error);
                tracing::warn!(whose, name, %error, "{what} cannot be used; the old ones stay in use");
                details.insert("result".into(), json!("refused"));
                details.insert("reason".into(), json!(error));
            }
        }
        audit.event(event, details);
    }
}
