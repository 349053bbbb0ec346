//! A caller's socket, plain or under TLS, and how the other side of it ends.

use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::net::RecvFlags;
use tokio::io::{AsyncRead as _, AsyncWrite as _, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

/// A caller's socket.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// Unix.
    Unix(UnixStream),
}

/// How the other side of a connection has ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum End {
    /// It sends no more.
    Closed,
    /// It is gone.
    Reset,
}

impl Stream {
    /// Whether the other side has reset the connection.
    pub(super) fn is_reset(&self) -> bool {
        let error = match self {
            Self::Tcp(stream) => stream.take_error(),
            Self::Tls(stream) => stream.get_ref().0.take_error(),
            Self::Unix(stream) => stream.take_error(),
        };
        !matches!(error, Ok(None))
    }

    /// Ready when the other side has closed or reset the connection; not when it has more to say.
    pub(super) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            let peeked = match self {
                Self::Tls(stream) => return poll_tls_end(stream, cx),
                Self::Tcp(stream) => {
                    let _ = ready!(stream.poll_read_ready(cx));
                    stream.try_io(Interest::READABLE, || peek(&*stream))
                }
                Self::Unix(stream) => {
                    let _ = ready!(stream.poll_read_ready(cx));
                    stream.try_io(Interest::READABLE, || peek(&*stream))
                }
            };
            match peeked {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Poll::Ready(End::Reset),
                Ok(0) => return Poll::Ready(End::Closed),
                Ok(_) => return Poll::Pending,
            }
        }
    }

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }

    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// How much can be read, without reading it.
fn peek(socket: impl AsFd) -> io::Result<usize> {
    let mut byte = [0_u8; 1];
    let (_, bytes) = rustix::net::recv(socket, &mut byte[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
    Ok(bytes)
}

/// The end of a TLS stream is told within it, so that it cannot be peeked at: what comes is decrypted, and kept where
/// it will be read.
fn poll_tls_end(stream: &mut TlsStream<TcpStream>, cx: &mut Context<'_>) -> Poll<End> {
    let (socket, session) = stream.get_mut();
    while session.wants_read() {
        match session.read_tls(&mut Present { socket, cx }) {
            Ok(0) => return Poll::Ready(End::Closed),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
            Err(_) => return Poll::Ready(End::Reset),
        }
        match session.process_new_packets() {
            Ok(state) if state.peer_has_closed() => return Poll::Ready(End::Closed),
            Ok(_) => {}
            Err(_) => return Poll::Ready(End::Reset),
        }
    }
    Poll::Pending
}

/// What a socket has at present.
struct Present<'a, 'b> {
    socket: &'a mut TcpStream,
    cx: &'a mut Context<'b>,
}

impl io::Read for Present<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut buf = ReadBuf::new(buf);
        match Pin::new(&mut *self.socket).poll_read(self.cx, &mut buf) {
            Poll::Ready(read) => read.map(|()| buf.filled().len()),
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}
