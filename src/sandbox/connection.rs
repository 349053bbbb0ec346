//! Accepts connections and serves each one: reads a request, records it, answers it as the rules and the script say.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;

use super::faults::{Fault, Framing, Instead, Then};
use super::http::{Head, Reply};
use super::journal::Recording;
use super::{Cloud, Door, TOKEN_PATH, control, http, rules, tokens};

/// The longest time for which the rest of a refused request is read and dropped.
// A close with unread bytes sends a reset, which can overtake the answer and destroy it at the client.
const DRAIN: Duration = Duration::from_secs(1);

/// The pause after a failed accept.
const RETRY: Duration = Duration::from_millis(5);

/// The bytes of `Instead::Garbage`: a TLS alert, so that a client without TLS meets what a port with TLS would send.
const GARBAGE: &[u8] = b"\x15\x03\x01\x00\x02\x02\x0a this is not HTTP\r\n\r\n";

/// Serves all listeners until the returned set is dropped.
pub(super) fn accept_all(cloud: Arc<Cloud>) -> JoinSet<()> {
    let mut doors = JoinSet::new();
    if cloud.token.is_some() {
        doors.spawn(accept(Arc::clone(&cloud), Role::Token));
        doors.spawn(accept(cloud, Role::Business));
    } else {
        doors.spawn(accept(cloud, Role::Both));
    }
    doors
}

/// What a listener serves. Control calls are served at every one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Both,
    Business,
    Token,
}

impl Role {
    fn door(self, cloud: &Cloud) -> &Door {
        match &cloud.token {
            Some(door) if self == Self::Token => door,
            _ => &cloud.api,
        }
    }

    fn kind(self, path: &str) -> Kind {
        if path.starts_with(control::PREFIX) {
            Kind::Control
        } else if path == TOKEN_PATH && self != Self::Business {
            Kind::Token
        } else {
            Kind::Business
        }
    }

    /// Whether a head that begins with these bytes is that of a token call, or may become one.
    // A test may read the records at any moment. A token call must not be among the business calls then, though its head is
    // incomplete.
    fn may_be_token_call(self, begun: &[u8]) -> bool {
        match self {
            Self::Business => false,
            Self::Token => true,
            Self::Both => {
                let head = b"POST ".iter().chain(TOKEN_PATH.as_bytes());
                begun.iter().zip(head).all(|(byte, of_call)| byte == of_call)
            }
        }
    }
}

enum Kind {
    Control,
    Token,
    Business,
}

async fn accept(cloud: Arc<Cloud>, role: Role) {
    let mut connections = JoinSet::new();
    let mut up = role.door(&cloud).up.subscribe();
    loop {
        // Cannot fail: the sender is in `cloud`, which this task holds.
        let _ = up.wait_for(|up| *up).await;
        tokio::select! {
            () = accept_while_up(&cloud, role, &mut connections) => {}
            _ = up.changed() => {}
        }
    }
}

async fn accept_while_up(cloud: &Arc<Cloud>, role: Role, connections: &mut JoinSet<()>) {
    if let Ok(listener) = role.door(cloud).listener() {
        // Not `accept`: on a socket that was shut down and listens again it retries for ever, and `up.changed` of the caller is
        // never polled. This returns the error.
        while let Ok((tcp, _)) = poll_fn(|cx| listener.poll_accept(cx)).await {
            // A set keeps the results of ended tasks until they are taken, so it would grow with each connection.
            while connections.try_join_next().is_some() {}
            connections.spawn(serve(Arc::clone(cloud), role, tcp));
        }
    }
    // The process is out of file descriptors, or the listener is going down. Without a pause the loop would spin.
    sleep(RETRY).await;
}

/// Serves one connection until either side ends it or its listener goes down.
// Errors are dropped: they say that the client is gone, and what it sent before is recorded.
async fn serve(cloud: Arc<Cloud>, role: Role, tcp: TcpStream) {
    let number = cloud.accepted.fetch_add(1, Relaxed) + 1;
    let _open = Open::new(&cloud);
    let mut up = role.door(&cloud).up.subscribe();
    // The listener may have gone down between the accept and this subscription, which sees later changes only.
    if *up.borrow_and_update() {
        tokio::select! {
            _ = talk(&cloud, role, tcp, number) => {}
            _ = up.changed() => {}
        }
    }
}

async fn talk(cloud: &Arc<Cloud>, role: Role, tcp: TcpStream, number: u64) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    // Not at the token listener: there a control call can end a script whose connection faults have no end.
    let fault = if role == Role::Token { None } else { cloud.script().connection() };
    if let Some(fault) = fault {
        sleep(Duration::from_millis(fault.delay_ms)).await;
        return Socket::Plain(tcp).instead(fault.instead).await;
    }
    let socket = Socket::open(cloud, tcp).await?;
    let buffer = BytesMut::new();
    let mut connection = Connection { cloud: Arc::clone(cloud), role, number, socket, buffer, idle: None };
    while connection.exchange().await? {}
    Ok(())
}

/// Counts a connection as open until it is dropped.
struct Open<'a>(&'a Cloud);

impl<'a> Open<'a> {
    fn new(cloud: &'a Cloud) -> Self {
        cloud.open.fetch_add(1, Relaxed);
        Self(cloud)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

struct Connection {
    cloud: Arc<Cloud>,
    role: Role,
    number: u64,
    socket: Socket,
    buffer: BytesMut,
    /// How long to wait for the next request; `None` is without a limit.
    idle: Option<Duration>,
}

/// Why there is no request.
enum NoRequest {
    /// The client went away, or was idle for too long.
    Gone,
    /// What arrived is not a request that the sandbox reads; this is the answer to it.
    Refused(Reply),
    /// The connection failed.
    Broken(io::Error),
}

impl From<io::Error> for NoRequest {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl Connection {
    /// Serves one request. Returns whether the connection stays open.
    async fn exchange(&mut self) -> io::Result<bool> {
        let mut recording = Recording::new(Arc::clone(&self.cloud), self.number);
        match self.receive(&mut recording).await {
            Ok((head, body)) => {
                let (reply, fault) = self.answer(&head, &body, &recording);
                self.deliver(&reply, &fault, head.closes(), &recording).await
            }
            Err(NoRequest::Gone) => self.socket.close().await.map(|()| false),
            Err(NoRequest::Refused(reply)) => self.refuse(&reply, &recording).await.map(|()| false),
            Err(NoRequest::Broken(error)) => Err(error),
        }
    }

    async fn receive(&mut self, recording: &mut Recording) -> Result<(Head, BytesMut), NoRequest> {
        let head = self.receive_head(recording).await?;
        let length = head.body_length().map_err(NoRequest::Refused)?;
        let mut seen = 0;
        loop {
            let there = self.buffer.len().min(length);
            recording.body(&self.buffer[seen..there]);
            seen = there;
            if seen == length {
                recording.complete();
                return Ok((head, self.buffer.split_to(length)));
            }
            // Only while nothing of the body has arrived: a client that sends already waits for no 100.
            if seen == 0 && head.expects_continue() {
                self.socket.write(&http::interim(100)).await?;
            }
            self.read().await?;
        }
    }

    async fn receive_head(&mut self, recording: &mut Recording) -> Result<Head, NoRequest> {
        if self.buffer.is_empty() {
            self.read_first().await?;
        }
        loop {
            let parsed = Head::parse(&self.buffer);
            if let Ok(Some(head)) = parsed {
                let bytes = self.buffer.split_to(head.length);
                match self.role.kind(&head.path) {
                    Kind::Control => recording.forget(),
                    Kind::Token => recording.token_call(&bytes, head.only("x-token-expire")),
                    Kind::Business => recording.head(&bytes),
                }
                return Ok(head);
            }
            // Recorded with each part that arrives, so that tests see unfinished heads. The kind may change with the next part.
            if self.role.may_be_token_call(&self.buffer) {
                recording.token_call(&self.buffer, None);
            } else {
                recording.head(&self.buffer);
            }
            parsed.map_err(NoRequest::Refused)?;
            self.read().await?;
        }
    }

    async fn read_first(&mut self) -> Result<(), NoRequest> {
        match self.idle.take() {
            Some(idle) => timeout(idle, self.read()).await.unwrap_or(Err(NoRequest::Gone)),
            None => self.read().await,
        }
    }

    async fn read(&mut self) -> Result<(), NoRequest> {
        let count = self.socket.read(&mut self.buffer).await?;
        self.cloud.application_bytes.fetch_add(count as u64, Relaxed);
        if count == 0 { Err(NoRequest::Gone) } else { Ok(()) }
    }

    fn answer(&self, head: &Head, body: &[u8], recording: &Recording) -> (Reply, Fault) {
        let cloud = &self.cloud;
        let (reply, fault) = match self.role.kind(&head.path) {
            Kind::Control => (control::answer(cloud, head, body), Fault::default()),
            Kind::Token => {
                let fault = cloud.script().token();
                (tokens::answer(cloud, head, body, &fault, recording), fault)
            }
            Kind::Business => {
                let fault = cloud.script().business();
                (rules::answer(cloud, head, body, &fault), fault)
            }
        };
        (fault.shape(reply), fault)
    }

    /// Sends an answer as the fault says. Returns whether the connection stays open.
    async fn deliver(
        &mut self,
        reply: &Reply,
        fault: &Fault,
        close: bool,
        recording: &Recording,
    ) -> io::Result<bool> {
        if fault.delay_ms > 0 {
            sleep(fault.delay()).await;
        }
        if let Some(instead) = fault.instead {
            return self.socket.instead(instead).await.map(|()| false);
        }
        // Before the first byte is sent, so that a client that has the answer finds its status in the records.
        recording.status(reply.status);
        let close = close || fault.then == Some(Then::Close);
        let mut wire = fault.interim.map(http::interim).unwrap_or_default();
        wire.extend(reply.head(fault.framing == Some(Framing::Chunked), close));
        let whole = self.send(wire, reply.body(), fault).await?;
        match fault.then {
            Some(Then::CloseIdle(0)) => self.socket.close().await.map(|()| false),
            _ if close || !whole => self.socket.close().await.map(|()| false),
            Some(Then::CloseIdle(idle)) => {
                self.idle = Some(Duration::from_millis(idle));
                Ok(true)
            }
            Some(Then::Close | Then::Extra(_)) | None => Ok(true),
        }
    }

    /// Writes head and body, or as much of them as the fault allows. Returns whether all of it was sent.
    // One write for head, body and what follows, so that a client gets them in one read, as from most servers.
    async fn send(&mut self, mut wire: Vec<u8>, body: &[u8], fault: &Fault) -> io::Result<bool> {
        let cut = match fault.framing {
            Some(Framing::HalfHead) => {
                wire.truncate(wire.len() / 2);
                Some(0)
            }
            Some(Framing::HalfBody) => Some(body.len() / 2),
            Some(Framing::Cut(bytes)) => Some(bytes.min(body.len())),
            Some(Framing::Chunked) => {
                wire.extend(http::chunks(body));
                None
            }
            Some(Framing::SlowBody(pause)) => {
                self.send_slowly(&wire, body, Duration::from_millis(pause)).await?;
                wire.clear();
                None
            }
            None => {
                wire.extend_from_slice(body);
                None
            }
        };
        wire.extend_from_slice(&body[..cut.unwrap_or(0)]);
        if let (None, Some(Then::Extra(extra))) = (cut, &fault.then) {
            wire.extend_from_slice(extra.as_bytes());
        }
        self.socket.write(&wire).await?;
        Ok(cut.is_none())
    }

    async fn send_slowly(&mut self, head: &[u8], body: &[u8], pause: Duration) -> io::Result<()> {
        self.socket.write(head).await?;
        for byte in body {
            sleep(pause).await;
            self.socket.write(std::slice::from_ref(byte)).await?;
        }
        Ok(())
    }

    async fn refuse(&mut self, reply: &Reply, recording: &Recording) -> io::Result<()> {
        recording.status(reply.status);
        let mut wire = reply.head(false, true);
        wire.extend_from_slice(reply.body());
        self.socket.write(&wire).await?;
        self.socket.close().await?;
        // The client may go on sending. After this time it gets a reset.
        let _ = timeout(DRAIN, self.socket.drain()).await;
        Ok(())
    }
}

/// A plain or encrypted stream.
enum Socket {
    Plain(TcpStream),
    Encrypted(Box<TlsStream<TcpStream>>),
}

impl Socket {
    async fn open(cloud: &Cloud, tcp: TcpStream) -> io::Result<Self> {
        let Some(acceptor) = &cloud.tls else { return Ok(Self::Plain(tcp)) };
        match acceptor.accept(tcp).await {
            Ok(stream) => Ok(Self::Encrypted(Box::new(stream))),
            Err(error) => {
                cloud.handshake_failed(&error);
                Err(error)
            }
        }
    }

    async fn read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read_buf(buffer).await,
            Self::Encrypted(stream) => stream.read_buf(buffer).await,
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.write_all(bytes).await,
            // rustls may hold written bytes until a flush.
            Self::Encrypted(stream) => {
                stream.write_all(bytes).await?;
                stream.flush().await
            }
        }
    }

    /// Does this instead of an answer. The caller drops the connection afterwards.
    async fn instead(&mut self, instead: Instead) -> io::Result<()> {
        match instead {
            // Reads on, so that the end of the client is noticed and the task ends with it.
            Instead::Hang => self.drain().await,
            // With a linger time of zero, the drop that follows sends a RST instead of a FIN.
            Instead::Reset => self.tcp().set_zero_linger(),
            Instead::Close => self.close().await,
            Instead::Garbage => {
                self.write(GARBAGE).await?;
                self.close().await
            }
        }
    }

    /// Ends the sending side: FIN, with TLS a `close_notify` before it.
    async fn close(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.shutdown().await,
            Self::Encrypted(stream) => stream.shutdown().await,
        }
    }

    /// Reads and drops bytes until the client ends its side.
    async fn drain(&mut self) -> io::Result<()> {
        let mut dropped = BytesMut::new();
        while self.read(&mut dropped).await? > 0 {
            dropped.clear();
        }
        Ok(())
    }

    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Encrypted(stream) => stream.get_ref().0,
        }
    }
}
