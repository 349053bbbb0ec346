//! A caller's socket, plain or under TLS, and how its other side ends.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::RecvFlags;
use tokio::io::{AsyncRead as _, AsyncWrite as _, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

/// The socket of a caller's connection.
#[derive(Debug)]
pub enum CallerStream {
    /// Plain TCP.
    Tcp(TcpStream),
    /// TLS over TCP. Boxed, since a TLS session is much larger than a socket.
    Tls(Box<TlsStream<TcpStream>>),
    /// A Unix socket.
    Unix(UnixStream),
}

/// How the other side of a connection has ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum PeerEnd {
    /// It sends no more. It may still read.
    Closed,
    /// It is gone, and reads nothing any more.
    Reset,
}

impl CallerStream {
    /// Returns whether the other side has reset the connection. Does not read.
    pub(super) fn is_reset(&self) -> bool {
        let error = match self {
            Self::Tcp(stream) => stream.take_error(),
            Self::Tls(stream) => stream.get_ref().0.take_error(),
            Self::Unix(stream) => stream.take_error(),
        };
        // An error of the question itself counts as a reset: the success is then undelivered, which never sends a
        // task twice.
        !matches!(error, Ok(None))
    }

    /// Waits until the other side has closed or reset the connection. Stays pending while there is something to read.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<PeerEnd> {
        loop {
            let peeked = match self {
                Self::Tls(stream) => return poll_tls_end(stream, cx),
                Self::Tcp(stream) => {
                    // Its error is found by the peek, which also tells a reset from an end.
                    let _ = ready!(stream.poll_read_ready(cx));
                    stream.try_io(Interest::READABLE, || peek(&*stream))
                }
                Self::Unix(stream) => {
                    let _ = ready!(stream.poll_read_ready(cx));
                    stream.try_io(Interest::READABLE, || peek(&*stream))
                }
            };
            match peeked {
                // `try_io` has cleared tokio's readiness, so the next round waits for an event.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Poll::Ready(PeerEnd::Reset),
                Ok(0) => return Poll::Ready(PeerEnd::Closed),
                // Bytes of a next request. The socket stays readable, so the end after them wakes nothing: the caller
                // counts as connected until hyper reads on.
                Ok(_) => return Poll::Pending,
            }
        }
    }

    /// Reads, as [`tokio::io::AsyncRead`] does.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }

    /// Shuts down the sending side, under TLS with a close_notify before.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// How many bytes can be read, at most 1. Does not read them.
fn peek(socket: impl AsFd) -> io::Result<usize> {
    let mut byte = [0_u8; 1];
    let (_, bytes) = rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
    Ok(bytes)
}

/// As [`CallerStream::poll_end`] for TLS. The end of a TLS stream is a record within it, so it cannot be peeked at: what
/// comes is decrypted, and stays in the session until hyper reads it.
fn poll_tls_end(stream: &mut TlsStream<TcpStream>, cx: &mut Context<'_>) -> Poll<PeerEnd> {
    let (socket, session) = stream.get_mut();
    // rustls wants no more once it holds plaintext that nobody has read, which bounds what a caller can make it keep.
    while session.wants_read() {
        match session.read_tls(&mut Present { socket, cx }) {
            Ok(0) => return Poll::Ready(PeerEnd::Closed),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
            Err(_) => return Poll::Ready(PeerEnd::Reset),
        }
        match session.process_new_packets() {
            Ok(state) if state.peer_has_closed() => return Poll::Ready(PeerEnd::Closed),
            Ok(_) => {}
            Err(_) => return Poll::Ready(PeerEnd::Reset),
        }
    }
    Poll::Pending
}

/// A reader that gets what the socket has at present, for rustls, which reads without waiting.
struct Present<'a, 'b> {
    socket: &'a mut TcpStream,
    cx: &'a mut Context<'b>,
}

impl io::Read for Present<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut buf = ReadBuf::new(buf);
        match Pin::new(&mut *self.socket).poll_read(self.cx, &mut buf) {
            Poll::Ready(read) => read.map(|()| buf.filled().len()),
            // The waker is registered by then, so this end of the reading is not the last one.
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}
