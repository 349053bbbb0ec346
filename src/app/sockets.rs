//! The sockets of a gateway: to bind them, and to look whether they could be bound.

use std::cell::LazyCell;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::{io, net};

use serde_json::Value;
use thiserror::Error;

use crate::admin::Place;
use crate::config::{Config, ListenAddress, socket_path};
use crate::server::inherited::Inherited;
use crate::server::{Bound, ListenError};
use crate::{admin, audit, config, control, server};

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

/// Checks whether all sockets could be bound, if the gateway that this configuration would replace were gone. Returns warnings: what
/// may stop a start nevertheless. `file` is the configuration's own.
pub(super) fn look(config: &Config, file: &Path) -> anyhow::Result<Vec<String>> {
    let present = LazyCell::new(|| Present::find(config, file));
    let mut notes = Vec::new();
    for (key, address) in addresses(config)? {
        let tried = match &address {
            ListenAddress::Tcp(address) => server::try_tcp(*address, config.is_only_v6(*address)),
            ListenAddress::Unix { path, .. } => server::try_unix(path),
        };
        let Err(error) = tried else { continue };
        if error.kind() != io::ErrorKind::AddrInUse {
            return Err(BindError::new(key, &address, error).into());
        }
        match &*present {
            Present::At(sockets) if sockets.iter().any(|socket| covers(socket, &address)) => {}
            Present::Silent => notes.push(format!(
                "{key}: {address} is in use. A gateway writes this audit trail, and does not say at admin.address where it listens. \
                 If another program has that socket, a start fails"
            )),
            // Only those of callers are ever inherited.
            _ if key.starts_with("listeners") && sd_notify::booted()? => notes.push(format!(
                "{key}: {address} is in use, and not by a gateway with this configuration. If that is no socket of a systemd unit \
                 for the gateway, but another program, a start fails"
            )),
            _ => return Err(BindError::new(key, &address, error).into()),
        }
    }
    Ok(notes)
}

/// The keys and addresses of all sockets that a start cannot do without.
fn addresses(config: &Config) -> io::Result<Vec<(String, ListenAddress)>> {
    let listeners = config.listeners.iter().enumerate();
    let listeners = listeners.map(|(i, listener)| (listener_key(i), listener.address.clone()));
    let admin = (ADMIN.to_owned(), ListenAddress::Tcp(config.admin.address));
    let control = match &config.admin.control {
        config::Control::Path(path) => {
            Some((CONTROL.to_owned(), ListenAddress::Unix { path: std::path::absolute(path)?, mode: 0 }))
        }
        config::Control::Default | config::Control::Off => None,
    };
    Ok(listeners.chain([admin]).chain(control).collect())
}

/// The gateway that a configuration would replace.
enum Present {
    /// There is none.
    No,
    /// It writes the same trail, and does not say where it listens.
    Silent,
    /// It has these sockets.
    At(Vec<String>),
}

impl Present {
    /// A gateway that writes the same trail, or that was started with the same file.
    fn find(config: &Config, file: &Path) -> Self {
        let place = || -> Option<Place> {
            let answer = admin::ask(config.admin.address, "/status").ok()?;
            let (_, body) = answer.split_once("\r\n\r\n")?;
            let mut status: Value = serde_json::from_str(body).ok()?;
            serde_json::from_value(status["place"].take()).ok()
        };
        let is_it = |place: &Place| {
            let has_trail = place.audit_directory == whole(&config.audit.directory);
            let has_file = place.file.is_some() && place.file == regular(file);
            // In another container the same paths lead elsewhere.
            (has_trail || has_file) && audit::is_live(&place.audit_directory)
        };
        match place().filter(is_it) {
            Some(place) => Self::At(place.sockets),
            None if audit::is_live(&config.audit.directory) => Self::Silent,
            None => Self::No,
        }
    }
}

/// Where a gateway with this configuration is, by the real addresses of its listeners.
pub(super) fn place(
    config: &Config,
    file: Option<&Path>,
    listeners: &[String],
    admin: SocketAddr,
) -> io::Result<Place> {
    let control = addresses(config)?.into_iter().filter(|(key, _)| key == CONTROL);
    let others = control.map(|(_, address)| address.to_string()).chain([admin.to_string()]);
    Ok(Place {
        file: file.and_then(regular),
        audit_directory: whole(&config.audit.directory),
        sockets: listeners.iter().cloned().chain(others).collect(),
    })
}

/// A path without links, as far as it leads anywhere.
fn whole(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// The same of a file; `None` for a pipe, by which each process could mean another configuration.
fn regular(file: &Path) -> Option<PathBuf> {
    file.canonicalize().ok().filter(|file| file.is_file())
}

/// Whether a socket keeps another one from this address: it is at the same, or one of both is at all addresses.
fn covers(socket: &str, address: &ListenAddress) -> bool {
    match (socket.strip_prefix("unix:"), address) {
        (Some(socket), ListenAddress::Unix { path, .. }) => {
            socket_path(Path::new(socket)) == socket_path(path)
        }
        (None, ListenAddress::Tcp(address)) => socket.parse().is_ok_and(|socket: SocketAddr| {
            let [theirs, ours] = [socket.ip(), address.ip()].map(|ip| ip.to_canonical());
            let meet = theirs == ours || theirs.is_unspecified() || ours.is_unspecified();
            meet && socket.port() == address.port()
        }),
        _ => false,
    }
}
