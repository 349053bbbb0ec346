//! Sockets that systemd bound (socket activation) and that this process inherits.
//!
//! They outlive the process: no connection fails during a restart, since it waits in the socket for the next process.

use std::io;

use listenfd::ListenFd;
use socket2::Socket;
use thiserror::Error;

use crate::config::ListenAddress;

/// Why inherited sockets cannot be used.
#[derive(Debug, Error)]
pub enum InheritError {
    /// The socket of this number is no listening socket.
    #[error("inherited socket {0} is not a listening one: {1}")]
    Kind(usize, io::Error),
    /// A socket has an address that no listener of the configuration has.
    #[error("a socket at {0} is inherited, and no [[listeners]] has that address")]
    Unasked(ListenAddress),
}

/// Inherited sockets that no listener has taken yet.
#[derive(Debug, Default)]
pub struct Inherited(Vec<(ListenAddress, Socket)>);

impl Inherited {
    /// Takes the sockets that the environment names (`LISTEN_FDS`, `LISTEN_PID`). Must be called before there are
    /// other threads, since it changes the environment.
    ///
    /// # Errors
    ///
    /// [`InheritError::Kind`] if one is no listening socket.
    pub fn from_env() -> Result<Self, InheritError> {
        let mut handed = ListenFd::from_env();
        let sockets =
            (0..handed.len()).map(|i| take(&mut handed, i).map_err(|error| InheritError::Kind(i, error)));
        sockets.collect::<Result<Vec<_>, _>>().map(|sockets| Self(sockets.into_iter().flatten().collect()))
    }

    /// Takes the socket with this address, if there is one.
    pub(super) fn take(&mut self, address: &ListenAddress) -> Option<Socket> {
        let is_it = |other: &ListenAddress| match (address, other) {
            // By path alone: the mode of an inherited socket is systemd's matter, and is not known here.
            (ListenAddress::Unix { path, .. }, ListenAddress::Unix { path: other, .. }) => path == other,
            (address, other) => address == other,
        };
        let found = self.0.iter().position(|(other, _)| is_it(other))?;
        Some(self.0.swap_remove(found).1)
    }

    /// Checks that each socket was taken by a listener. Nobody would accept from one that is left, and its callers
    /// would wait forever.
    ///
    /// # Errors
    ///
    /// [`InheritError::Unasked`] if one is left.
    pub fn finish(mut self) -> Result<(), InheritError> {
        self.0.pop().map_or(Ok(()), |(address, _)| Err(InheritError::Unasked(address)))
    }
}

/// Takes one socket out of the environment's list, with its address.
fn take(handed: &mut ListenFd, i: usize) -> io::Result<Option<(ListenAddress, Socket)>> {
    if let Ok(listener) = handed.take_tcp_listener(i) {
        let Some(listener) = listener else { return Ok(None) };
        return listening(ListenAddress::Tcp(listener.local_addr()?), listener.into()).map(Some);
    }
    // `take_tcp_listener` leaves a socket of another kind in the list, so this can try it.
    let Some(listener) = handed.take_unix_listener(i)? else { return Ok(None) };
    let address = listener.local_addr()?;
    let path = address.as_pathname().unwrap_or("".as_ref()).to_owned();
    listening(ListenAddress::Unix { path, mode: 0 }, listener.into()).map(Some)
}

/// Checks that a socket listens. A connected one, as `Accept=yes` passes, looks the same but for this.
fn listening(address: ListenAddress, socket: Socket) -> io::Result<(ListenAddress, Socket)> {
    if socket.is_listener()? { Ok((address, socket)) } else { Err(io::ErrorKind::InvalidInput.into()) }
}
