//! An upstream over TLS that speaks HTTP/2, frame by frame as a test wants it, or HTTP/1.1 where it picks that.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Response, Uri};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::Acceptor,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

use crate::exchange::certificate;

pub(crate) const SUCCESS: &str = r#"{"resultCode":"0409000","resultDesc":"success"}"#;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const MAX_CONCURRENT_STREAMS: u16 = 3;

/// A request as frames: all of its body is there.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// How many came before it, on all connections.
    pub(crate) nth: usize,
    /// How many connections were made before its own.
    pub(crate) connection: usize,
    pub(crate) stream: u32,
}

/// A request as a whole.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) nth: usize,
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

type React = dyn Fn(&Wire, Received) + Send + Sync;
type AnswerWhole = dyn Fn(&Seen) -> (u16, Bytes) + Send + Sync;

#[derive(Clone)]
enum Manner {
    /// Frame by frame, with a limit on streams.
    Frames(Option<u32>, Arc<React>),
    /// By a library, which keeps to flow control.
    Whole(Arc<AnswerWhole>),
}

pub(crate) struct Upstream {
    /// What signed its certificate.
    pub(crate) ca: String,
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    manner: Manner,
    tls: [Arc<ServerConfig>; 2],
    picks_http2: AtomicBool,
    log: Mutex<Log>,
    running: Mutex<Option<(oneshot::Sender<()>, JoinHandle<()>)>>,
}

#[derive(Default)]
struct Log {
    received: Vec<Received>,
    seen: Vec<Seen>,
    heads: Vec<String>,
    offers: Vec<Vec<String>>,
    resets: Vec<(usize, u32, u32)>,
    connections: usize,
    pings: usize,
    pongs: usize,
    ended: usize,
    most_open: usize,
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.lock().unwrap().take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

impl Upstream {
    /// Picks HTTP/2 where it is offered; does with each request what it is told.
    pub(crate) fn start(react: impl Fn(&Wire, Received) + Send + Sync + 'static) -> Self {
        Self::run(Manner::Frames(None, Arc::new(react)), true)
    }

    /// The same with a limit on streams.
    pub(crate) fn allowing(streams: u32, react: impl Fn(&Wire, Received) + Send + Sync + 'static) -> Self {
        Self::run(Manner::Frames(Some(streams), Arc::new(react)), true)
    }

    /// Reads whole requests, and answers with what it is told.
    pub(crate) fn speaking_whole(answer: impl Fn(&Seen) -> (u16, Bytes) + Send + Sync + 'static) -> Self {
        Self::run(Manner::Whole(Arc::new(answer)), true)
    }

    /// Picks HTTP/1.1, whatever is offered.
    pub(crate) fn picking_http1() -> Self {
        Self::run(Manner::Frames(None, Arc::new(|_, _| {})), false)
    }

    fn run(manner: Manner, http2: bool) -> Self {
        let (ca, pair) = certificate("localhost", false);
        let config = |protocols: &[&str]| {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let chain =
                CertificateDer::pem_slice_iter(pair.cert_pem.as_bytes()).map(Result::unwrap).collect();
            let mut config = ServerConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(chain, PrivateKeyDer::from_pem_slice(pair.key_pem.as_bytes()).unwrap())
                .unwrap();
            config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
            Arc::new(config)
        };
        let tls = [config(&["http/1.1"]), config(&["h2", "http/1.1"])];
        let (log, running) = (Mutex::default(), Mutex::default());
        let state = Arc::new(State { manner, tls, picks_http2: AtomicBool::new(http2), log, running });
        let address = serve(&state, "127.0.0.1:0".parse().unwrap());
        Self { ca, address, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    /// Closes everything.
    pub(crate) fn stop(&self) {
        let running = self.state.running.lock().unwrap().take();
        let (stop, thread) = running.unwrap();
        drop(stop);
        thread.join().unwrap();
    }

    /// Comes back at the same place, picking this protocol.
    pub(crate) fn restart(&self, http2: bool) {
        self.state.picks_http2.store(http2, Ordering::Relaxed);
        serve(&self.state, self.address);
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.state.log.lock().unwrap().received.clone()
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.log.lock().unwrap().seen.clone()
    }

    /// The heads of requests in HTTP/1.1.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.state.log.lock().unwrap().heads.clone()
    }

    /// What each connection offered to speak, refused ones included.
    pub(crate) fn offers(&self) -> Vec<Vec<String>> {
        self.state.log.lock().unwrap().offers.clone()
    }

    /// Streams that the gateway reset: connection, stream, reason.
    pub(crate) fn resets(&self) -> Vec<(usize, u32, u32)> {
        self.state.log.lock().unwrap().resets.clone()
    }

    /// Connections over which HTTP/2 was spoken.
    pub(crate) fn connections(&self) -> usize {
        self.state.log.lock().unwrap().connections
    }

    pub(crate) fn pings(&self) -> usize {
        self.state.log.lock().unwrap().pings
    }

    /// Connections over which HTTP/2 was spoken that are closed on this side.
    pub(crate) fn ended(&self) -> usize {
        self.state.log.lock().unwrap().ended
    }

    /// Answers to [`Wire::ping`]: whatever was written before it was read.
    pub(crate) fn pongs(&self) -> usize {
        self.state.log.lock().unwrap().pongs
    }

    /// The most streams that were open at once on one connection.
    pub(crate) fn most_open(&self) -> usize {
        self.state.log.lock().unwrap().most_open
    }
}

/// Serves on a thread of its own, until it is stopped; then all connections are closed.
fn serve(state: &Arc<State>, address: SocketAddr) -> SocketAddr {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let listener = runtime.block_on(TcpListener::bind(address)).unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    // Weak, so that the last Upstream that is dropped stops it.
    let weak = Arc::downgrade(state);
    let thread = thread::spawn(move || {
        runtime.block_on(async move {
            let accept = async {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let Some(state) = weak.upgrade() else { return };
                    tokio::spawn(connection(Shared::of(&state), stream));
                }
            };
            tokio::select! {
                () = accept => {}
                _ = stopped => {}
            }
        });
    });
    *state.running.lock().unwrap() = Some((stop, thread));
    address
}

/// What a connection needs. It does not keep the upstream running.
#[derive(Clone)]
struct Shared {
    manner: Manner,
    tls: Arc<ServerConfig>,
    state: std::sync::Weak<State>,
}

impl Shared {
    fn of(state: &Arc<State>) -> Self {
        let tls = state.tls[usize::from(state.picks_http2.load(Ordering::Relaxed))].clone();
        Self { manner: state.manner.clone(), tls, state: Arc::downgrade(state) }
    }

    fn log<T: Default>(&self, write: impl FnOnce(&mut Log) -> T) -> T {
        self.state.upgrade().map(|state| write(&mut state.log.lock().unwrap())).unwrap_or_default()
    }
}

async fn connection(shared: Shared, stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    let Ok(hello) = LazyConfigAcceptor::new(Acceptor::default(), stream).await else { return };
    let offers = hello
        .client_hello()
        .alpn()
        .map_or_else(Vec::new, |names| names.map(|name| String::from_utf8(name.to_vec()).unwrap()).collect());
    shared.log(|log| log.offers.push(offers));
    let Ok(stream) = hello.into_stream(shared.tls.clone()).await else { return };
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        let _ = http1(&shared, stream).await;
        return;
    }
    let connection = shared.log(|log| {
        log.connections += 1;
        log.connections - 1
    });
    match shared.manner.clone() {
        Manner::Frames(limit, react) => {
            let _ = frames(&shared, connection, limit, &*react, stream).await;
            shared.log(|log| log.ended += 1); // its socket is closed
        }
        Manner::Whole(answer) => whole(&shared, answer, stream).await,
    }
}

async fn http1(shared: &Shared, mut stream: TlsStream<TcpStream>) -> io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        let head = loop {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, _)) = text.split_once("\r\n\r\n") {
                break head.to_owned();
            }
            if stream.read_buf(&mut bytes).await? == 0 {
                return Ok(());
            }
        };
        let length = head.to_ascii_lowercase().lines().find_map(|line| {
            line.strip_prefix("content-length: ").map(|length| length.parse::<usize>().unwrap())
        });
        let all = head.len() + 4 + length.unwrap();
        while bytes.len() < all {
            stream.read_buf(&mut bytes).await?;
        }
        bytes.drain(..all);
        shared.log(|log| log.heads.push(head));
        let reply = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{SUCCESS}", SUCCESS.len());
        stream.write_all(reply.as_bytes()).await?;
    }
}

async fn whole(shared: &Shared, answer: Arc<AnswerWhole>, stream: TlsStream<TcpStream>) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let (shared, answer) = (shared.clone(), answer.clone());
        tokio::spawn(async move {
            let (head, mut incoming) = request.into_parts();
            let mut body = Vec::new();
            while let Some(Ok(data)) = incoming.data().await {
                let _ = incoming.flow_control().release_capacity(data.len());
                body.extend_from_slice(&data);
            }
            let seen = shared.log(|log| {
                let nth = log.seen.len();
                let seen = Seen { nth, method: head.method, uri: head.uri, headers: head.headers, body };
                log.seen.push(seen.clone());
                Some(seen)
            });
            let (status, body) = answer(&seen.unwrap());
            let response =
                Response::builder().status(status).header("content-length", body.len()).body(()).unwrap();
            if let Ok(mut send) = respond.send_response(response, false) {
                let _ = send.send_data(body, true);
            }
        });
    }
}

/// The gateway's connection, as its upstream writes to it.
#[derive(Clone)]
pub(crate) struct Wire {
    out: mpsc::UnboundedSender<Out>,
    held: Arc<Mutex<Vec<Received>>>,
    open: Arc<Mutex<HashSet<u32>>>,
    silent: Arc<AtomicBool>,
    reset: Arc<AtomicUsize>,
    /// What the gateway allows beyond the first window, on all streams together.
    credit: Arc<AtomicUsize>,
}

enum Out {
    Bytes(Vec<u8>),
    Close,
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header that the table of HPACK names, its value as it is.
fn literal(name: u8, value: &str) -> Vec<u8> {
    let index = if name < 15 { vec![name] } else { vec![15, name - 15] };
    [&index, &[u8::try_from(value.len()).unwrap()][..], value.as_bytes()].concat()
}

fn header(name: &str, value: &str) -> Vec<u8> {
    let mut block = vec![0, u8::try_from(name.len()).unwrap()];
    block.extend_from_slice(name.as_bytes());
    let mut length = value.len();
    if length < 127 {
        block.push(u8::try_from(length).unwrap());
    } else {
        block.push(127);
        length -= 127;
        while length >= 128 {
            block.push(u8::try_from(length % 128).unwrap() | 128);
            length /= 128;
        }
        block.push(u8::try_from(length).unwrap());
    }
    block.extend_from_slice(value.as_bytes());
    block
}

impl Wire {
    /// Writes bytes as they are.
    pub(crate) fn raw(&self, bytes: Vec<u8>) {
        if !self.silent.load(Ordering::Relaxed) {
            let _ = self.out.send(Out::Bytes(bytes));
        }
    }

    pub(crate) fn head(&self, stream: u32, status: u16, length: Option<usize>) {
        let mut block = literal(8, &status.to_string());
        if let Some(length) = length {
            block.extend(literal(28, &length.to_string()));
        }
        self.raw(frame(HEADERS, END_HEADERS, stream, &block));
    }

    /// A head with these fields, in as many frames as it takes.
    pub(crate) fn head_with(&self, stream: u32, fields: &[(String, String)]) {
        let fields = fields.iter().map(|(name, value)| header(name, value)).collect::<Vec<_>>().concat();
        let block = [literal(8, "200"), fields].concat();
        let chunks: Vec<_> = block.chunks(16_000).collect();
        for (i, chunk) in chunks.iter().enumerate() {
            let (kind, last) = (if i == 0 { HEADERS } else { CONTINUATION }, i + 1 == chunks.len());
            self.raw(frame(kind, if last { END_HEADERS } else { 0 }, stream, chunk));
        }
    }

    pub(crate) fn data(&self, stream: u32, bytes: &[u8], end: bool) {
        if end {
            self.open.lock().unwrap().remove(&stream);
        }
        self.raw(frame(DATA, if end { END_STREAM } else { 0 }, stream, bytes));
    }

    pub(crate) fn trailers(&self, stream: u32) {
        self.raw(frame(HEADERS, END_HEADERS | END_STREAM, stream, &header("x-trailer", "1")));
    }

    pub(crate) fn answer(&self, stream: u32, body: &str) {
        self.head(stream, 200, Some(body.len()));
        self.data(stream, body.as_bytes(), true);
    }

    pub(crate) fn answer_later(&self, stream: u32, body: &'static str, delay: Duration) {
        let wire = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            wire.answer(stream, body);
        });
    }

    pub(crate) fn reset(&self, stream: u32, reason: u32) {
        self.open.lock().unwrap().remove(&stream);
        self.raw(frame(RST_STREAM, 0, stream, &reason.to_be_bytes()));
    }

    pub(crate) fn go_away(&self, last: u32, reason: u32) {
        self.raw(frame(GOAWAY, 0, 0, &[last.to_be_bytes(), reason.to_be_bytes()].concat()));
    }

    pub(crate) fn ping(&self) {
        self.raw(frame(PING, 0, 0, &[0; 8]));
    }

    pub(crate) fn close(&self) {
        let _ = self.out.send(Out::Close);
    }

    /// From here on nobody is there, though the socket stays open.
    pub(crate) fn fall_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    /// Keeps a request for later.
    pub(crate) fn hold(&self, request: Received) {
        self.held.lock().unwrap().push(request);
    }

    pub(crate) fn held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    /// The one that was held last.
    pub(crate) fn release(&self) -> Option<Received> {
        self.held.lock().unwrap().pop()
    }

    pub(crate) fn huge_head(&self, stream: u32, size: usize) {
        self.head_with(stream, &vec![("x-huge".to_owned(), "x".repeat(10_000)); size / 10_000]);
    }

    pub(crate) fn continuation_flood(&self, stream: u32) {
        self.raw(frame(HEADERS, 0, stream, &literal(8, "200")));
        for _ in 0..10_000 {
            self.raw(frame(CONTINUATION, 0, stream, b""));
        }
    }

    /// A text and blanks up to `size`, as the gateway has room for them; to be used on one stream of the connection. Then
    /// the stream is left to `end`.
    pub(crate) fn blanks_behind(
        &self,
        text: &[u8],
        stream: u32,
        size: usize,
        end: impl FnOnce(&Self) + Send + 'static,
    ) {
        let wire = self.clone();
        self.data(stream, text, false);
        let mut sent = text.len();
        tokio::spawn(async move {
            while sent < size && !wire.out.is_closed() {
                let room = 65_536 + wire.credit.load(Ordering::Relaxed) - sent;
                let piece = room.min(size - sent).min(16_384);
                wire.data(stream, &vec![b' '; piece], false);
                sent += piece;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            end(&wire);
        });
    }

    /// Until the gateway resets a stream, or closes.
    pub(crate) fn interim_flood(&self, stream: u32) {
        let wire = self.clone();
        tokio::spawn(async move {
            while wire.reset.load(Ordering::Relaxed) == 0 && !wire.out.is_closed() {
                for _ in 0..20 {
                    wire.head(stream, 103, None);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
    }
}

async fn frames(
    shared: &Shared,
    connection: usize,
    limit: Option<u32>,
    react: &React,
    stream: TlsStream<TcpStream>,
) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (out, mut outgoing) = mpsc::unbounded_channel();
    let wire = Wire {
        out,
        held: Arc::default(),
        open: Arc::default(),
        silent: Arc::default(),
        reset: Arc::default(),
        credit: Arc::default(),
    };
    let settings = limit.map_or_else(Vec::new, |limit| {
        [&MAX_CONCURRENT_STREAMS.to_be_bytes()[..], &limit.to_be_bytes()].concat()
    });
    wire.raw(frame(SETTINGS, 0, 0, &settings));
    let write = async {
        while let Some(Out::Bytes(mut bytes)) = outgoing.recv().await {
            let mut close = false;
            while let Ok(more) = outgoing.try_recv() {
                match more {
                    Out::Bytes(more) => bytes.extend(more),
                    Out::Close => close = true,
                }
            }
            writer.write_all(&bytes).await?;
            writer.flush().await?;
            if close {
                break;
            }
        }
        io::Result::Ok(())
    };
    let read = async {
        let mut preface = [0; 24];
        reader.read_exact(&mut preface).await?;
        assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        let mut bodies = HashMap::new();
        loop {
            let mut head = [0; 9];
            reader.read_exact(&mut head).await?;
            let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
            let length = number(&[&[0], &head[..3]].concat()) as usize;
            let (kind, flags, stream) = (head[3], head[4], number(&head[5..]));
            let mut payload = vec![0; length];
            reader.read_exact(&mut payload).await?;
            match kind {
                SETTINGS if flags & ACK == 0 => wire.raw(frame(SETTINGS, ACK, 0, b"")),
                PING if flags & ACK != 0 => shared.log(|log| log.pongs += 1),
                PING => {
                    shared.log(|log| log.pings += 1);
                    wire.raw(frame(PING, ACK, 0, &payload));
                }
                HEADERS => {
                    assert_eq!(flags & END_HEADERS, END_HEADERS, "heads are small");
                    bodies.insert(stream, Vec::new());
                    let mut open = wire.open.lock().unwrap();
                    open.insert(stream);
                    shared.log(|log| log.most_open = log.most_open.max(open.len()));
                }
                DATA if length > 0 => {
                    bodies.entry(stream).or_default().extend_from_slice(&payload);
                    let length = u32::try_from(length).unwrap().to_be_bytes();
                    wire.raw(frame(WINDOW_UPDATE, 0, 0, &length));
                }
                WINDOW_UPDATE if stream > 0 => {
                    wire.credit.fetch_add(number(&payload) as usize, Ordering::Relaxed);
                }
                RST_STREAM => {
                    wire.open.lock().unwrap().remove(&stream);
                    wire.reset.fetch_add(1, Ordering::Relaxed);
                    shared.log(|log| log.resets.push((connection, stream, number(&payload))));
                }
                _ => {}
            }
            if matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0 {
                assert_eq!(bodies.remove(&stream).unwrap(), crate::support::BODY.as_bytes());
                let received = shared.log(|log| {
                    let received = Received { nth: log.received.len(), connection, stream };
                    log.received.push(received.clone());
                    Some(received)
                });
                react(&wire, received.unwrap());
            }
            if wire.silent.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        ended = write => ended,
        ended = read => ended,
    }
}
