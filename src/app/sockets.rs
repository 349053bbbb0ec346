//! The sockets of a gateway: binds them, and checks for `check` whether they could be bound.
//!
//! The check asks a running gateway which sockets it has, so that only the sockets of other programs
//! count as in use.

use std::cell::LazyCell;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::{io, net};

use serde_json::Value;
use thiserror::Error;

use crate::admin::Instance;
use crate::config::{Config, ListenAddress, socket_path};
use crate::server::inherited::Inherited;
use crate::server::{BoundListener, ListenError};
use crate::{admin, audit, config, control, server};

/// The configuration key of the admin listener's address.
const ADMIN: &str = "admin.address";

/// The configuration key of the control socket's path.
const CONTROL: &str = "admin.control";

/// A socket that cannot be bound.
#[derive(Debug, Error)]
#[error("cannot listen on {address}")]
pub struct BindError {
    /// The configuration key of its address.
    pub key: String,
    address: String,
    /// The cause.
    #[source]
    pub error: io::Error,
}

impl BindError {
    fn new(key: impl Into<String>, address: &impl ToString, error: io::Error) -> Self {
        Self { key: key.into(), address: address.to_string(), error }
    }
}

/// Binds the listeners for callers, except those whose sockets are inherited.
///
/// # Errors
///
/// Returns a [`BindError`], or the error of a TLS file.
pub(super) fn bind(config: &Config, inherited: &mut Inherited) -> anyhow::Result<Vec<BoundListener>> {
    let bind = |(i, listener): (usize, &config::Listener)| {
        let only_v6 = match listener.address {
            ListenAddress::Tcp(address) => config.is_only_v6(address),
            ListenAddress::Unix { .. } => false,
        };
        BoundListener::bind(listener, inherited, config.server.workers, only_v6).map_err(
            |error| match error {
                ListenError::Socket(error) => {
                    BindError::new(listener_key(i), &listener.address, error).into()
                }
                ListenError::Tls(error) => error.into(),
            },
        )
    };
    config.listeners.iter().enumerate().map(bind).collect()
}

/// The configuration key of a listener's address.
fn listener_key(i: usize) -> String {
    format!("listeners[{i}].address")
}

/// Binds the admin listener.
pub(super) fn bind_admin(config: &Config) -> Result<net::TcpListener, BindError> {
    let address = config.admin.address;
    // Not by std, whose queue of 128 connections a burst of strangers fills: a probe whose SYN is dropped comes back
    // after a second.
    let bound = server::bind_tcp(address, 1, config.is_only_v6(address));
    let first =
        // One worker is one socket. `Other` does not occur, and avoids a panic path.
        bound.and_then(|sockets| sockets.into_iter().next().ok_or_else(|| io::ErrorKind::Other.into()));
    first.map(Into::into).map_err(|error| BindError::new(ADMIN, &address, error))
}

/// Binds the control socket; `None` if the configuration has none.
pub(super) fn bind_control(config: &Config) -> Result<Option<control::BoundSocket>, BindError> {
    let bound = control::BoundSocket::bind(&config.admin.control, &config.audit.directory);
    bound.map_err(|error| BindError::new(CONTROL, &config.admin.control, error))
}

/// Checks whether all sockets could be bound, were the gateway that this configuration replaces gone.
///
/// `file` is the file of the configuration. Returns warnings: what may stop a start nevertheless.
///
/// # Errors
///
/// Returns a [`BindError`] for a socket that a start could not bind.
pub(super) fn check(config: &Config, file: &Path) -> anyhow::Result<Vec<String>> {
    // Lazy: without a conflict nobody is asked, and `check` needs no network.
    let present = LazyCell::new(|| Present::find(config, file));
    let mut notes = Vec::new();
    for (key, address) in addresses(config)? {
        let tried = match &address {
            ListenAddress::Tcp(address) => server::try_tcp(*address, config.is_only_v6(*address)),
            ListenAddress::Unix { path, .. } => server::try_unix(path),
        };
        // Only "in use" may pass once the other gateway is gone. All other causes stay.
        let Err(error) = tried else { continue };
        if error.kind() != io::ErrorKind::AddrInUse {
            return Err(BindError::new(key, &address, error).into());
        }
        match &*present {
            Present::At(sockets) if sockets.iter().any(|socket| covers(socket, &address)) => {}
            // Not an error: its admin address may just have been edited, or it is an older version.
            Present::Silent => notes.push(format!(
                "{key}: {address} is in use. A gateway writes this audit trail, but does not report at admin.address \
                 where it listens. If another program uses the address, the gateway cannot start"
            )),
            // systemd may hold the socket for the gateway. It only ever passes those of `[[listeners]]`.
            _ if key.starts_with("listeners") && sd_notify::booted()? => notes.push(format!(
                "{key}: {address} is in use, but not by a gateway with this configuration. Unless it is a socket of a \
                 systemd unit for the gateway, the gateway cannot start"
            )),
            _ => return Err(BindError::new(key, &address, error).into()),
        }
    }
    Ok(notes)
}

/// The keys and addresses of all sockets without which a start fails.
fn addresses(config: &Config) -> io::Result<Vec<(String, ListenAddress)>> {
    let listeners = config.listeners.iter().enumerate();
    let listeners = listeners.map(|(i, listener)| (listener_key(i), listener.address.clone()));
    let admin = (ADMIN.to_owned(), ListenAddress::Tcp(config.admin.address));
    let control = match &config.admin.control {
        config::Control::Path(path) => {
            Some((CONTROL.to_owned(), ListenAddress::Unix { path: std::path::absolute(path)?, mode: 0 }))
        }
        // The default socket is no condition of a start: without it the gateway serves all the same.
        config::Control::Default | config::Control::Off => None,
    };
    Ok(listeners.chain([admin]).chain(control).collect())
}

/// The gateway that a configuration would replace, as far as it can be found.
enum Present {
    /// None is running.
    No,
    /// One writes the same trail, and does not say where it listens.
    Silent,
    /// One is running that has these sockets.
    At(Vec<String>),
}

impl Present {
    /// Looks for a gateway that writes the same trail, or that was started with the same file.
    fn find(config: &Config, file: &Path) -> Self {
        let place = || -> Option<Instance> {
            let answer = admin::ask(config.admin.address, "/status").ok()?;
            let (_, body) = answer.split_once("\r\n\r\n")?;
            let mut status: Value = serde_json::from_str(body).ok()?;
            serde_json::from_value(status["place"].take()).ok()
        };
        let is_it = |place: &Instance| {
            let has_trail = place.audit_directory == whole(&config.audit.directory);
            let has_file = place.file.is_some() && place.file == regular(file);
            // The lock of its trail must be held here: in another container the same paths lead elsewhere.
            (has_trail || has_file) && audit::is_live(&place.audit_directory)
        };
        match place().filter(is_it) {
            Some(place) => Self::At(place.sockets),
            None if audit::is_live(&config.audit.directory) => Self::Silent,
            None => Self::No,
        }
    }
}

/// Where a gateway with this configuration is, for `/status`; with the real addresses of its listeners.
pub(super) fn place(
    config: &Config,
    file: Option<&Path>,
    listeners: &[String],
    admin: SocketAddr,
) -> io::Result<Instance> {
    // The listeners come from the caller: with port 0 the configuration does not know theirs.
    let control = addresses(config)?.into_iter().filter(|(key, _)| key == CONTROL);
    let others = control.map(|(_, address)| address.to_string()).chain([admin.to_string()]);
    Ok(Instance {
        file: file.and_then(regular),
        audit_directory: whole(&config.audit.directory),
        sockets: listeners.iter().cloned().chain(others).collect(),
    })
}

/// A path without symbolic links. One that leads nowhere is returned as it is.
fn whole(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// A file's path without symbolic links; `None` for a pipe, by whose name each process may mean another
/// configuration.
fn regular(file: &Path) -> Option<PathBuf> {
    file.canonicalize().ok().filter(|file| file.is_file())
}

/// Returns whether a socket takes this address: it is bound to the same one, or one of the two is bound to all
/// addresses.
fn covers(socket: &str, address: &ListenAddress) -> bool {
    match (socket.strip_prefix("unix:"), address) {
        (Some(socket), ListenAddress::Unix { path, .. }) => {
            socket_path(Path::new(socket)) == socket_path(path)
        }
        (None, ListenAddress::Tcp(address)) => socket.parse().is_ok_and(|socket: SocketAddr| {
            // In canonical form, since an IPv4 address may be written as one of IPv6.
            let [theirs, ours] = [socket.ip(), address.ip()].map(|ip| ip.to_canonical());
            let meet = theirs == ours || theirs.is_unspecified() || ours.is_unspecified();
            meet && socket.port() == address.port()
        }),
        _ => false,
    }
}
