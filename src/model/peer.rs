//! The other end of a connection, as the kernel reports it. Whether it is a known caller is not decided here.

use std::io::Write as _;
use std::net::{SocketAddr, SocketAddrV4};
use std::{fmt, io};

/// The other end of a caller's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A TCP peer.
    Tcp(SocketAddr),
    // The kernel takes these when the peer connects (`SO_PEERCRED`): a process that changes its ids later stays who it was.
    /// The process that connected a Unix socket.
    Unix {
        /// Effective user id.
        uid: u32,
        /// Effective group id.
        gid: u32,
    },
}

impl Peer {
    /// The length in bytes of the buffer for [`Self::text`].
    // The longest text is that of an IPv6 address with a scope id and a port, of 58 bytes.
    pub const TEXT: usize = 64;

    /// Returns the same text as [`fmt::Display`], in a buffer of the caller.
    // Each audit record has it: no allocation, and no formatting for the usual kind.
    pub fn text<'a>(&self, buffer: &'a mut [u8; Self::TEXT]) -> &'a [u8] {
        let mut rest = &mut buffer[..];
        let _ = match self {
            Self::Tcp(SocketAddr::V4(address)) => write_v4(&mut rest, address),
            _ => write!(rest, "{self}"),
        };
        let written = Self::TEXT - rest.len();
        &buffer[..written]
    }
}

/// Writes an IPv4 address and port.
// Formatting an address through `fmt` costs as much as parsing the head of a request.
fn write_v4(rest: &mut &mut [u8], address: &SocketAddrV4) -> io::Result<()> {
    let mut number = itoa::Buffer::new();
    for (octet, behind) in address.ip().octets().into_iter().zip([b".", b".", b".", b":"]) {
        rest.write_all(number.format(octet).as_bytes())?;
        rest.write_all(behind)?;
    }
    rest.write_all(number.format(address.port()).as_bytes())
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix { uid, gid } => write!(f, "unix:uid={uid},gid={gid}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_text_equals_its_display_output() {
        let unix = Peer::Unix { uid: u32::MAX, gid: u32::MAX };
        let tcp = [
            "127.0.0.1:1",
            "255.255.255.255:65535",
            "[::1]:80",
            "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
        ];
        for peer in tcp.map(|address| Peer::Tcp(address.parse().unwrap())).into_iter().chain([unix]) {
            assert_eq!(peer.text(&mut [0; Peer::TEXT]), peer.to_string().as_bytes());
        }
    }
}
