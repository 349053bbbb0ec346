//! Sockets that were bound by somebody else (systemd socket activation): they outlive this process, so that who connects
//! while none runs waits for the next one.

use std::io;

use listenfd::ListenFd;
use socket2::Socket;
use thiserror::Error;

use crate::config::ListenAddress;

/// Why inherited sockets cannot be used.
#[derive(Debug, Error)]
pub enum InheritError {
    /// One is no listening socket.
    #[error("inherited socket {0} is not a listening one: {1}")]
    Kind(usize, io::Error),
    /// One is at an address that nobody asked for.
    #[error("a socket at {0} is inherited, and no [[listeners]] has that address")]
    Unasked(ListenAddress),
}

/// Inherited sockets that no listener has taken yet.
#[derive(Debug, Default)]
pub struct Inherited(Vec<(ListenAddress, Socket)>);

impl Inherited {
    /// What the environment names (`LISTEN_FDS`, `LISTEN_PID`). To be called before there are threads.
    pub fn from_env() -> Result<Self, InheritError> {
        let mut handed = ListenFd::from_env();
        let sockets =
            (0..handed.len()).map(|i| take(&mut handed, i).map_err(|error| InheritError::Kind(i, error)));
        sockets.collect::<Result<Vec<_>, _>>().map(|sockets| Self(sockets.into_iter().flatten().collect()))
    }

    /// The socket at an address, if there is one.
    pub(super) fn take(&mut self, address: &ListenAddress) -> Option<Socket> {
        let is_it = |other: &ListenAddress| match (address, other) {
            (ListenAddress::Unix { path, .. }, ListenAddress::Unix { path: other, .. }) => path == other,
            (address, other) => address == other,
        };
        let found = self.0.iter().position(|(other, _)| is_it(other))?;
        Some(self.0.swap_remove(found).1)
    }

    /// Nothing is left: what nobody accepts from would hold callers up for ever.
    pub fn finish(mut self) -> Result<(), InheritError> {
        self.0.pop().map_or(Ok(()), |(address, _)| Err(InheritError::Unasked(address)))
    }
}

fn take(handed: &mut ListenFd, i: usize) -> io::Result<Option<(ListenAddress, Socket)>> {
    if let Ok(listener) = handed.take_tcp_listener(i) {
        let Some(listener) = listener else { return Ok(None) };
        return listening(ListenAddress::Tcp(listener.local_addr()?), listener.into()).map(Some);
    }
    let Some(listener) = handed.take_unix_listener(i)? else { return Ok(None) };
    let address = listener.local_addr()?;
    let path = address.as_pathname().unwrap_or("".as_ref()).to_owned();
    listening(ListenAddress::Unix { path, mode: 0 }, listener.into()).map(Some)
}

/// A connected socket (`Accept=yes`) looks the same but for this.
fn listening(address: ListenAddress, socket: Socket) -> io::Result<(ListenAddress, Socket)> {
    if socket.is_listener()? { Ok((address, socket)) } else { Err(io::ErrorKind::InvalidInput.into()) }
}
