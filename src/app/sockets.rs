//! The sockets of a gateway: to bind them, and to look whether they could be bound.

use std::{io, net};

use thiserror::Error;

use crate::{
    admin, audit,
    config::{self, Config, ListenAddress},
    control,
    server::{self, Bound, ListenError, inherited::Inherited},
};

/// The key of the admin listener's address.
const ADMIN: &str = "admin.address";

/// The key of the control socket's path.
const CONTROL: &str = "admin.control";

/// No socket can be had.
#[derive(Debug, Error)]
#[error("cannot listen on {address}")]
pub struct BindError {
    /// The key of its address.
    pub key: String,
    address: String,
    /// Why.
    #[source]
    pub error: io::Error,
}

impl BindError {
    fn new(key: impl Into<String>, address: &impl ToString, error: io::Error) -> Self {
        Self { key: key.into(), address: address.to_string(), error }
    }
}

/// Binds what callers connect to, unless it is inherited.
pub(super) fn bind(config: &Config, inherited: &mut Inherited) -> anyhow::Result<Vec<Bound>> {
    let bind = |(i, listener): (usize, &config::Listener)| {
        let only_v6 = match listener.address {
            ListenAddress::Tcp(address) => config.is_only_v6(address),
            ListenAddress::Unix { .. } => false,
        };
        Bound::bind(listener, inherited, config.server.workers, only_v6).map_err(|error| match error {
            ListenError::Socket(error) => BindError::new(listener_key(i), &listener.address, error).into(),
            ListenError::Tls(error) => error.into(),
        })
    };
    config.listeners.iter().enumerate().map(bind).collect()
}

fn listener_key(i: usize) -> String {
    format!("listeners[{i}].address")
}

/// Binds the admin listener, with the queue of ours: std's own is 128, which a burst of strangers fills; see [`admin`].
pub(super) fn bind_admin(config: &Config) -> Result<net::TcpListener, BindError> {
    let address = config.admin.address;
    let bound = server::bind_tcp(address, 1, config.is_only_v6(address));
    let first =
        bound.and_then(|sockets| sockets.into_iter().next().ok_or_else(|| io::ErrorKind::Other.into()));
    first.map(Into::into).map_err(|error| BindError::new(ADMIN, &address, error))
}

/// Binds the control socket, if there is one.
pub(super) fn bind_control(config: &Config) -> Result<Option<control::Bound>, BindError> {
    let bound = control::Bound::bind(&config.admin.control, &config.audit.directory);
    bound.map_err(|error| BindError::new(CONTROL, &config.admin.control, error))
}

/// Checks whether all sockets could be bound. One that is in use belongs to the gateway that runs, if one does. Where systemd runs,
/// it may hold the socket of a listener for a gateway that does not run yet: that is a warning.
pub(super) fn look(config: &Config) -> anyhow::Result<Vec<String>> {
    let listeners = config.listeners.iter().enumerate();
    let listeners = listeners.map(|(i, listener)| (listener_key(i), listener.address.clone()));
    let admin = (ADMIN.to_owned(), ListenAddress::Tcp(config.admin.address));
    let control = match &config.admin.control {
        config::Control::Path(path) => {
            Some((CONTROL.to_owned(), ListenAddress::Unix { path: std::path::absolute(path)?, mode: 0 }))
        }
        config::Control::Default | config::Control::Off => None,
    };
    let mut notes = Vec::new();
    for (key, address) in listeners.chain([admin]).chain(control) {
        let tried = match &address {
            ListenAddress::Tcp(address) => server::try_tcp(*address, config.is_only_v6(*address)),
            ListenAddress::Unix { path, .. } => server::try_unix(path),
        };
        match tried {
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                return Err(BindError::new(key, &address, error).into());
            }
            Err(error) if !runs(config) => {
                let may_be_inherited = key.starts_with("listeners");
                if !may_be_inherited || !sd_notify::booted()? {
                    return Err(BindError::new(key, &address, error).into());
                }
                notes.push(format!(
                    "{key}: {address} is in use, and no gateway runs with this configuration. If that is no socket of a systemd unit \
                     for the gateway, but another program, a start fails"
                ));
            }
            _ => {}
        }
    }
    Ok(notes)
}

/// Whether a gateway runs with this configuration, or with one that differs in part: it writes the same trail, or answers at the same
/// admin listener.
fn runs(config: &Config) -> bool {
    let answers =
        || admin::ask(config.admin.address, "/livez").is_ok_and(|answer| answer.ends_with("\r\n\r\nok\n"));
    audit::is_live(&config.audit.directory) || answers()
}
