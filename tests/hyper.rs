//! What the gateway takes for granted about hyper, h2 and hyper-util beyond their documentation: one test for each assumption,
//! named after it. They use hyper directly and nothing of the gateway, so that a test which fails with a new version of hyper
//! says which place of the gateway to look at: the comment there names the test.
//!
//! Connections are polled by hand over pipes in memory, so that a test also sees what hyper does not do.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    cell::{Cell, RefCell},
    error::Error as _,
    fs,
    future::{Future, poll_fn},
    io,
    path::Path,
    pin::{Pin, pin},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    body::{Body as _, Incoming},
    client::conn::{TrySendError, http1 as client, http2},
    server::conn::http1 as server,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf, duplex},
    sync::{Notify, Semaphore},
    task::yield_now,
    time::timeout,
};

/// As many polls are enough for all that hyper does by itself.
const TURNS: usize = 20;

/// No condition takes as many polls to come true.
const MANY: usize = 10_000;

const HEAD: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

/// What hyper did with a socket.
#[derive(Debug, Default)]
struct Log {
    /// Calls of `poll_read`, and the bytes that they gave.
    read_calls: Cell<usize>,
    read: Cell<usize>,
    written: Cell<usize>,
    flushes: Cell<usize>,
    shutdowns: Cell<usize>,
    /// Reads fail from now on.
    fails: Cell<bool>,
    /// A shutdown takes until this is false.
    holds_shutdown: Cell<bool>,
}

/// A socket that notes what hyper does with it.
struct Noted {
    stream: DuplexStream,
    log: Rc<Log>,
}

/// The other side of a socket, the socket, and what hyper does with it.
fn noted() -> (DuplexStream, TokioIo<Noted>, Rc<Log>) {
    let (other, stream) = duplex(1 << 20);
    let log = Rc::new(Log::default());
    (other, TokioIo::new(Noted { stream, log: log.clone() }), log)
}

fn add(cell: &Cell<usize>, more: usize) {
    cell.set(cell.get() + more);
}

impl AsyncRead for Noted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        add(&self.log.read_calls, 1);
        if self.log.fails.get() {
            return Poll::Ready(Err(io::ErrorKind::OutOfMemory.into()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        add(&self.log.read, buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Noted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        add(&self.log.written, written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        add(&self.log.flushes, 1);
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        add(&self.log.shutdowns, 1);
        if self.log.holds_shutdown.get() {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Polls something once.
async fn turn<F: Future + ?Sized>(future: &mut Pin<&mut F>) -> Poll<F::Output> {
    yield_now().await; // or tokio's budget for one poll is used up
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
}

/// Polls something as often as it can be of use; it must not end.
async fn turns<F: Future + ?Sized>(future: &mut Pin<&mut F>) {
    for _ in 0..TURNS {
        assert!(turn(future).await.is_pending(), "it ended");
    }
}

/// Polls something until a condition holds; it must not end before.
async fn until<F: Future + ?Sized>(future: &mut Pin<&mut F>, holds: impl Fn() -> bool) {
    for _ in 0..MANY {
        if holds() {
            return;
        }
        assert!(turn(future).await.is_pending(), "it ended");
    }
    panic!("the condition does not come to hold");
}

/// Polls something to its end.
async fn end<F: Future + ?Sized>(future: &mut Pin<&mut F>) -> F::Output {
    for _ in 0..MANY {
        if let Poll::Ready(output) = turn(future).await {
            return output;
        }
    }
    panic!("it does not end");
}

/// What there is to read at present.
async fn take(stream: &mut DuplexStream) -> Vec<u8> {
    let mut taken = Vec::new();
    poll_fn(|cx| {
        let mut space = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut space);
            match Pin::new(&mut *stream).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => taken.extend_from_slice(buf.filled()),
                _ => return Poll::Ready(()),
            }
        }
    })
    .await;
    taken
}

async fn text(stream: &mut DuplexStream) -> String {
    String::from_utf8(take(stream).await).unwrap()
}

fn answer(body: &'static str) -> hyper::Result<Response<Full<Bytes>>> {
    Ok(Response::new(Full::new(Bytes::from_static(body.as_bytes()))))
}

/// How the gateway serves its callers.
fn serving() -> server::Builder {
    let mut builder = server::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(None).half_close(true).writev(false);
    builder
}

// Server, HTTP/1.1.

#[tokio::test]
async fn hyper_does_not_read_while_a_request_is_in_progress() {
    let (mut caller, socket, log) = noted();
    let (is_asked, goes_on) = (Cell::new(false), Notify::new());
    let service = service_fn(|_| async {
        is_asked.set(true);
        goes_on.notified().await;
        answer("")
    });
    let mut connection = pin!(serving().serve_connection(socket, service));
    caller.write_all(HEAD).await.unwrap();
    until(&mut connection, || is_asked.get()).await;
    let calls = log.read_calls.get();
    caller.write_all(HEAD).await.unwrap();
    turns(&mut connection).await;
    caller.shutdown().await.unwrap();
    turns(&mut connection).await;
    assert_eq!((log.read_calls.get(), log.read.get()), (calls, HEAD.len()));
    goes_on.notify_one();
    until(&mut connection, || log.read.get() == 2 * HEAD.len()).await;
}

#[tokio::test]
async fn hyper_flushes_on_each_wake_while_a_request_is_in_progress() {
    let (mut caller, socket, log) = noted();
    let polls = Cell::new(0);
    let service = service_fn(|_| async {
        poll_fn(|_| {
            add(&polls, 1);
            Poll::<()>::Pending
        })
        .await;
        answer("")
    });
    let mut connection = pin!(serving().serve_connection(socket, service));
    caller.write_all(HEAD).await.unwrap();
    until(&mut connection, || polls.get() > 0).await;
    for _ in 0..TURNS {
        let before = (log.flushes.get(), polls.get());
        assert!(turn(&mut connection).await.is_pending());
        let after = (log.flushes.get(), polls.get());
        assert!(after.0 > before.0, "no flush");
        assert!(after.1 > before.1, "the request was not polled by its connection");
    }
}

#[tokio::test]
async fn hyper_reads_more_body_only_after_delivering_the_last_part() {
    let (mut caller, socket, log) = noted();
    let (passed, permits) = (Cell::new(0), Semaphore::new(0));
    let service = service_fn(|request: Request<Incoming>| async {
        let mut body = request.into_body();
        loop {
            permits.acquire().await.unwrap().forget();
            let Some(frame) = body.frame().await else { return answer("") };
            add(&passed, frame?.into_data().unwrap().len());
        }
    });
    let mut connection = pin!(serving().serve_connection(socket, service));
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let first = b"1\r\na\r\n".repeat(5);
    caller.write_all(head).await.unwrap();
    until(&mut connection, || log.read.get() == head.len()).await;
    caller.write_all(&first).await.unwrap();
    until(&mut connection, || log.read.get() == head.len() + first.len()).await;
    caller.write_all(&first).await.unwrap();
    // One piece is passed on before anybody asks for it, and the fifth lies behind it.
    for count in 1..=3 {
        permits.add_permits(1);
        until(&mut connection, || passed.get() == count).await;
        turns(&mut connection).await;
        assert_eq!(log.read.get(), head.len() + first.len(), "behind {count}");
    }
    permits.add_permits(3);
    until(&mut connection, || passed.get() == 6).await;
    assert_eq!(log.read.get(), head.len() + 2 * first.len());
}

#[tokio::test]
async fn hyper_reads_nothing_after_the_end_of_a_body() {
    for (framing, body) in
        [("content-length: 5", "hello"), ("transfer-encoding: chunked", "5\r\nhello\r\n0\r\n\r\n")]
    {
        let (mut caller, socket, log) = noted();
        let (is_read, goes_on) = (Cell::new(false), Notify::new());
        let service = service_fn(|request: Request<Incoming>| async {
            request.into_body().collect().await?;
            is_read.set(true);
            goes_on.notified().await;
            answer("")
        });
        let mut connection = pin!(serving().serve_connection(socket, service));
        let request = format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n{body}");
        let (first, last) = request.split_at(request.len() - 1);
        caller.write_all(first.as_bytes()).await.unwrap();
        until(&mut connection, || log.read.get() == first.len()).await;
        caller.write_all(last.as_bytes()).await.unwrap();
        until(&mut connection, || is_read.get()).await;
        let calls = log.read_calls.get();
        caller.write_all(HEAD).await.unwrap();
        turns(&mut connection).await;
        assert_eq!((log.read_calls.get(), log.read.get()), (calls, request.len()), "{framing}");
        goes_on.notify_one();
        until(&mut connection, || log.read.get() > request.len()).await;
    }
}

/// The bound of a head, as large as the gateway's: how far a head may exceed it depends on how buffers grow up to it.
const BOUND: usize = 64 * 1024;

/// The answer to a head of so many bytes, and how the connection ended, if it did.
async fn answer_to_head(size: usize, builder: &server::Builder) -> (String, Option<hyper::Error>) {
    let (mut caller, socket, _) = noted();
    let mut connection = pin!(builder.serve_connection(socket, service_fn(|_| async { answer("") })));
    let head = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "x".repeat(size - 32));
    assert_eq!(head.len(), size);
    caller.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..TURNS {
        if let Poll::Ready(ended) = turn(&mut connection).await {
            return (text(&mut caller).await, ended.err());
        }
    }
    (text(&mut caller).await, None)
}

#[tokio::test]
async fn buffer_limit_alone_admits_a_head_of_nearly_twice_its_size() {
    let mut builder = serving();
    builder.max_buf_size(BOUND);
    let (said, _) = answer_to_head(7 * BOUND / 4 - 1, &builder).await;
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    builder.max_header_size(BOUND);
    let (said, error) = answer_to_head(BOUND, &builder).await;
    assert!(said.starts_with("HTTP/1.1 200") && error.is_none(), "{said}");
    let (said, error) = answer_to_head(BOUND + 1, &builder).await;
    assert!(said.starts_with("HTTP/1.1 431"), "{said}");
    assert!(error.unwrap().is_parse());
}

#[tokio::test]
async fn graceful_shutdown_closes_an_idle_connection_at_once() {
    let (mut caller, socket, log) = noted();
    let mut connection = pin!(serving().serve_connection(socket, service_fn(|_| async { answer("") })));
    caller.write_all(HEAD).await.unwrap();
    until(&mut connection, || log.written.get() > 0).await;
    turns(&mut connection).await;
    connection.as_mut().graceful_shutdown();
    assert!(matches!(turn(&mut connection).await, Poll::Ready(Ok(()))));
    assert_eq!(log.shutdowns.get(), 1);
}

#[tokio::test]
async fn half_closed_caller_still_gets_its_response() {
    let (mut caller, socket, _) = noted();
    let mut connection = pin!(serving().serve_connection(
        socket,
        service_fn(|_| async {
            yield_now().await;
            answer("hello")
        })
    ));
    caller.write_all(HEAD).await.unwrap();
    caller.shutdown().await.unwrap();
    end(&mut connection).await.unwrap();
    assert!(text(&mut caller).await.ends_with("hello"));
}

#[tokio::test]
async fn header_timeout_also_applies_to_an_idle_connection() {
    let (mut caller, socket, log) = noted();
    let mut builder = serving();
    builder.header_read_timeout(Duration::from_millis(20));
    let mut connection = pin!(builder.serve_connection(socket, service_fn(|_| async { answer("") })));
    caller.write_all(HEAD).await.unwrap();
    until(&mut connection, || log.written.get() > 0).await;
    let ended = timeout(Duration::from_secs(60), connection).await;
    assert!(ended.is_ok(), "it idles on");
}

#[tokio::test]
async fn read_error_is_the_source_of_the_connection_error() {
    let (mut caller, socket, log) = noted();
    let mut connection = pin!(serving().serve_connection(socket, service_fn(|_| async { answer("") })));
    caller.write_all(&HEAD[..HEAD.len() - 2]).await.unwrap();
    turns(&mut connection).await;
    log.fails.set(true);
    caller.write_all(b"\r").await.unwrap();
    let error = end(&mut connection).await.unwrap_err();
    let cause = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
    assert_eq!(cause.kind(), io::ErrorKind::OutOfMemory);
    assert!(!error.is_parse());
}

#[tokio::test]
async fn connection_ends_with_a_socket_shutdown_after_the_last_response() {
    let (mut caller, socket, log) = noted();
    log.holds_shutdown.set(true);
    let service = service_fn(|_| async {
        let mut last = answer("hello")?;
        last.headers_mut().insert(http::header::CONNECTION, http::HeaderValue::from_static("close"));
        hyper::Result::Ok(last)
    });
    let mut connection = pin!(serving().serve_connection(socket, service));
    caller.write_all(HEAD).await.unwrap();
    caller.write_all(HEAD).await.unwrap(); // gets no answer
    until(&mut connection, || log.shutdowns.get() > 0).await;
    let said = text(&mut caller).await;
    assert!(said.ends_with("hello") && said.matches("HTTP/1.1").count() == 1, "{said}");
    turns(&mut connection).await;
    log.holds_shutdown.set(false);
    end(&mut connection).await.unwrap();
}

#[tokio::test]
async fn hyper_sends_continue_only_when_the_body_is_polled() {
    let (mut caller, socket, log) = noted();
    let (is_asked, goes_on) = (Cell::new(false), Notify::new());
    let service = service_fn(|request: Request<Incoming>| async {
        is_asked.set(true);
        goes_on.notified().await;
        request.into_body().collect().await?;
        answer("")
    });
    let mut connection = pin!(serving().serve_connection(socket, service));
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n";
    caller.write_all(head).await.unwrap();
    until(&mut connection, || is_asked.get()).await;
    turns(&mut connection).await;
    assert_eq!(log.written.get(), 0);
    goes_on.notify_one();
    until(&mut connection, || log.written.get() > 0).await;
    assert_eq!(text(&mut caller).await, "HTTP/1.1 100 Continue\r\n\r\n");
}

#[tokio::test]
async fn hyper_omits_the_body_of_a_response_to_head() {
    let (mut caller, socket, log) = noted();
    let mut connection = pin!(serving().serve_connection(socket, service_fn(|_| async { answer("hello") })));
    caller.write_all(b"HEAD / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    until(&mut connection, || log.written.get() > 0).await;
    turns(&mut connection).await;
    let said = text(&mut caller).await;
    assert!(said.contains("content-length: 5\r\n") && said.ends_with("\r\n\r\n"), "{said}");
}

#[tokio::test]
async fn bare_lf_after_the_last_chunk_starts_a_trailer() {
    let (mut caller, socket, log) = noted();
    let is_trailer = Cell::new(None);
    let service = service_fn(|request: Request<Incoming>| async {
        let mut body = request.into_body();
        let data = body.frame().await.unwrap()?;
        assert!(data.is_data());
        is_trailer.set(body.frame().await.map(|frame| frame.is_ok_and(|frame| frame.is_trailers())));
        answer("")
    });
    let mut connection = pin!(serving().serve_connection(socket, service));
    let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n";
    caller.write_all(head.as_bytes()).await.unwrap();
    caller.write_all(b"0\r\n\nGET / HTTP/1.1\r\nx: y\r\n\r\n").await.unwrap();
    until(&mut connection, || log.written.get() > 0).await;
    assert_eq!(is_trailer.get(), Some(true));
}

// Client, HTTP/1.1.

/// How the gateway speaks to the cloud.
fn asking() -> client::Builder {
    let mut builder = client::Builder::new();
    builder
        .max_buf_size(BOUND)
        .max_header_size(BOUND)
        .max_headers(FIELDS)
        .allow_spaces_after_header_name_in_responses(true)
        .writev(false);
    builder
}

const FIELDS: usize = 256;

/// Any request.
fn request() -> Request<Full<Bytes>> {
    Request::get("https://a/").header("host", "a").body(Full::default()).unwrap()
}

/// A client's connection, the cloud behind it, and what hyper does with the socket.
struct Asking {
    sender: client::SendRequest<Full<Bytes>>,
    /// `None` once it has ended.
    connection: Option<client::Connection<TokioIo<Noted>, Full<Bytes>>>,
    cloud: DuplexStream,
    log: Rc<Log>,
}

impl Asking {
    async fn new(builder: &client::Builder) -> Self {
        let (cloud, socket, log) = noted();
        let (sender, connection) = builder.handshake(socket).await.unwrap();
        Self { sender, connection: Some(connection), cloud, log }
    }

    /// Polls the connection as often as it can be of use.
    async fn turns(&mut self) {
        for _ in 0..TURNS {
            if let Some(connection) = &mut self.connection
                && turn(&mut Pin::new(connection)).await.is_ready()
            {
                self.connection = None;
            }
        }
    }

    /// Whether a request can be sent.
    async fn is_ready(&mut self) -> Poll<hyper::Result<()>> {
        turn(&mut pin!(self.sender.ready())).await
    }

    /// What comes of something that the connection does.
    async fn outcome<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        for _ in 0..MANY {
            if let Poll::Ready(output) = turn(&mut future).await {
                return output;
            }
            self.turns().await;
        }
        panic!("nothing comes of it");
    }

    /// Sends a request; the cloud answers with these bytes.
    async fn ask(&mut self, answer: &str) -> hyper::Result<Response<Incoming>> {
        let sent = self.sender.send_request(request());
        self.turns().await;
        assert!(self.log.written.get() > 0);
        self.cloud.write_all(answer.as_bytes()).await.unwrap();
        self.outcome(sent).await
    }

    /// The same, and all of the body; the cloud closes behind it.
    async fn ask_whole(&mut self, answer: &str) -> hyper::Result<Bytes> {
        let sent = self.sender.send_request(request());
        self.turns().await;
        self.cloud.write_all(answer.as_bytes()).await.unwrap();
        self.cloud.shutdown().await.unwrap();
        let body = self.outcome(sent).await?.into_body();
        Ok(self.outcome(body.collect()).await?.to_bytes())
    }
}

#[tokio::test]
async fn response_before_the_request_is_written_is_an_error() {
    let mut asking = Asking::new(&asking()).await;
    asking.cloud.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    let sent = asking.sender.send_request(request());
    assert!(asking.outcome(sent).await.is_err());
    assert_eq!(asking.log.written.get(), 0);
    assert!(asking.sender.is_closed());
}

#[tokio::test]
async fn sender_is_ready_only_after_the_last_exchange_ends() {
    let mut asking = Asking::new(&asking()).await;
    let response = asking.ask("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na").await.unwrap();
    asking.turns().await;
    assert!(asking.is_ready().await.is_pending());
    asking.cloud.write_all(b"b").await.unwrap();
    let body = asking.outcome(response.into_body().collect()).await.unwrap();
    assert_eq!(body.to_bytes(), "ab");
    asking.turns().await;
    assert!(matches!(asking.is_ready().await, Poll::Ready(Ok(()))));
    asking.cloud.shutdown().await.unwrap();
    asking.turns().await;
    assert!(asking.sender.is_closed());
    assert!(matches!(asking.is_ready().await, Poll::Ready(Err(_))));
}

#[tokio::test]
async fn dropping_an_unfinished_reply_closes_its_connection() {
    let mut asking = Asking::new(&asking()).await;
    let response = asking.ask("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na").await.unwrap();
    drop(response);
    asking.turns().await;
    assert!(asking.sender.is_closed() && asking.connection.is_none());
}

#[tokio::test]
async fn body_of_known_length_ends_with_its_last_byte() {
    let mut asking = Asking::new(&asking()).await;
    let mut body = asking.ask("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na").await.unwrap().into_body();
    asking.outcome(body.frame()).await.unwrap().unwrap();
    assert!(!body.is_end_stream());
    asking.cloud.write_all(b"b").await.unwrap();
    asking.outcome(body.frame()).await.unwrap().unwrap();
    assert!(body.is_end_stream());
    drop(body);
    asking.turns().await;
    assert!(!asking.sender.is_closed() && asking.sender.is_ready());
}

#[tokio::test]
async fn only_interim_response_101_is_returned() {
    let final_one = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    for (interim, status) in
        [("100 Continue", 200), ("103 Early Hints", 200), ("101 Switching Protocols", 101)]
    {
        let mut asking = Asking::new(&asking()).await;
        let answer = format!("HTTP/1.1 {interim}\r\n\r\n{final_one}");
        assert_eq!(asking.ask(&answer).await.unwrap().status(), status, "{interim}");
    }
}

#[tokio::test]
async fn truncated_and_misframed_http1_replies_have_distinct_errors() {
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    for (answer, is_incomplete, kind) in [
        (String::new(), true, None),
        ("HTTP/1.1 200".into(), true, None),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na".into(), false, Some(io::ErrorKind::UnexpectedEof)),
        (format!("{chunked}2\r\na"), false, Some(io::ErrorKind::UnexpectedEof)),
        (format!("{chunked}1\r\na\r\n"), false, Some(io::ErrorKind::UnexpectedEof)),
        (format!("{chunked}z"), false, Some(io::ErrorKind::InvalidInput)),
    ] {
        let mut asking = Asking::new(&asking()).await;
        let error = asking.ask_whole(&answer).await.unwrap_err();
        let source = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
        let seen = (error.is_incomplete_message(), source.map(io::Error::kind));
        assert_eq!(seen, (is_incomplete, kind), "{answer:?}: {error:?}");
    }
}

/// A head with so many fields more, and so many bytes.
fn reply(fields: usize, size: usize) -> String {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{}", "a: b\r\n".repeat(fields));
    format!("{head}x: {}\r\n\r\n", "x".repeat(size.saturating_sub(head.len() + 7)))
}

#[tokio::test]
async fn reply_over_any_limit_causes_the_same_error() {
    for answer in [reply(FIELDS - 2, 0), reply(0, BOUND)] {
        Asking::new(&asking()).await.ask(&answer).await.unwrap();
    }
    let length = "HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551615\r\n\r\n".to_owned();
    for answer in [reply(FIELDS - 1, 0), reply(0, BOUND + 1), length] {
        let error = Asking::new(&asking()).await.ask(&answer).await.unwrap_err();
        assert!(error.is_parse() && error.is_parse_too_large(), "{error:?}");
    }
    let mut by_the_buffer = asking();
    by_the_buffer.max_header_size(usize::MAX);
    Asking::new(&by_the_buffer).await.ask(&reply(0, 7 * BOUND / 4 - 1)).await.unwrap();
}

#[tokio::test]
async fn blanks_before_a_colon_are_removed_and_folded_lines_rejected() {
    let answer = |field| format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{field}\r\n\r\n");
    let response = Asking::new(&asking()).await.ask(&answer("x \t: y")).await.unwrap();
    assert_eq!(response.headers()["x"], "y");
    let error = Asking::new(&asking()).await.ask(&answer("x: y\r\n z")).await.unwrap_err();
    assert!(error.is_parse() && !error.is_parse_too_large(), "{error:?}");
}

/// Bytes that tell when nobody holds them any more.
struct Owned(Arc<AtomicBool>);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        b"secret"
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn hyper_drops_a_request_body_once_it_is_written() {
    let mut asking = Asking::new(&asking()).await;
    let is_dropped = Arc::new(AtomicBool::new(false));
    let body = Full::new(Bytes::from_owner(Owned(is_dropped.clone())));
    let _sent = asking.sender.send_request(Request::post("/").header("host", "a").body(body).unwrap());
    asking.turns().await;
    assert!(text(&mut asking.cloud).await.ends_with("secret"));
    assert!(is_dropped.load(Ordering::Relaxed), "it waits for the answer");
}

// Client, HTTP/2.

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

const NO_ERROR: u32 = 0;
const CANCEL: u32 = 8;
const REFUSED_STREAM: u32 = 7;

/// `:status: 200`, indexed (RFC 7541, appendix A).
const OK: &[u8] = &[0x88];
/// `:status: 103`, a literal with an indexed name.
const EARLY_HINTS: &[u8] = b"\x08\x03103";

/// Stands for the limit on streams until it is told, as in the gateway.
const UNTOLD: usize = usize::MAX - 1;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn reset(stream: u32, reason: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &reason.to_be_bytes())
}

fn go_away(last: u32, reason: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last.to_be_bytes(), reason.to_be_bytes()].concat())
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// The futures that hyper spawned and that have not ended.
#[derive(Clone, Default)]
struct Spawned(Rc<RefCell<Vec<Task>>>);

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Spawned {
    fn execute(&self, future: F) {
        self.0.borrow_mut().push(Box::pin(future));
    }
}

impl Spawned {
    fn count(&self) -> usize {
        self.0.borrow().len()
    }

    /// Polls each once.
    async fn turn(&self) {
        yield_now().await;
        poll_fn(|cx| {
            let mut tasks = self.0.take();
            tasks.retain_mut(|task| task.as_mut().poll(cx).is_pending());
            self.0.borrow_mut().splice(0..0, tasks);
            Poll::Ready(())
        })
        .await;
    }
}

type Answer = Result<Response<Incoming>, TrySendError<Request<Full<Bytes>>>>;

/// A client's connection, polled in the order of the gateway: the driver, the handover, what belongs to requests.
struct Http2 {
    sender: http2::SendRequest<Full<Bytes>>,
    handover: Option<http2::Connection<TokioIo<DuplexStream>, Full<Bytes>, Spawned>>,
    driver: Spawned,
    spawned: Spawned,
    cloud: DuplexStream,
}

impl Http2 {
    /// A connection on which the cloud has said nothing yet.
    async fn silent() -> Self {
        let (cloud, socket) = duplex(1 << 20);
        let spawned = Spawned::default();
        let mut builder = http2::Builder::new(spawned.clone());
        builder.initial_max_send_streams(UNTOLD).max_header_list_size(1024);
        let (sender, handover) = builder.handshake(TokioIo::new(socket)).await.unwrap();
        let driver = Spawned(Rc::new(RefCell::new(spawned.0.take())));
        Self { sender, handover: Some(handover), driver, spawned, cloud }
    }

    /// A connection on which the cloud has greeted.
    async fn greeted() -> Self {
        let mut http2 = Self::silent().await;
        http2.says(&[frame(SETTINGS, 0, 0, &[]), frame(SETTINGS, ACK, 0, &[])]).await;
        http2
    }

    /// Sends a request, to the last byte.
    async fn ask(&mut self) -> Pin<Box<dyn Future<Output = Answer>>> {
        let sent = Box::pin(self.sender.try_send_request(request()));
        self.turns().await;
        sent
    }

    /// The cloud sends frames, and hyper sees them.
    async fn says(&mut self, frames: &[Vec<u8>]) {
        self.cloud.write_all(&frames.concat()).await.unwrap();
        self.turns().await;
    }

    async fn turn(&mut self) {
        self.driver.turn().await;
        if let Some(handover) = &mut self.handover
            && turn(&mut Pin::new(handover)).await.is_ready()
        {
            self.handover = None;
        }
        self.spawned.turn().await;
    }

    async fn turns(&mut self) {
        for _ in 0..TURNS {
            self.turn().await;
        }
    }

    fn limit(&self) -> usize {
        self.handover.as_ref().unwrap().current_max_send_streams()
    }
}

/// What is there by now.
async fn now<T>(mut future: Pin<Box<dyn Future<Output = T>>>) -> T {
    match turn(&mut future.as_mut()).await {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it is not there yet"),
    }
}

/// What h2 says of a request without an answer: whether it came from the cloud, whether by a GOAWAY, and the reason.
fn told(why: &TrySendError<Request<Full<Bytes>>>) -> (bool, bool, Option<u32>) {
    let cause = why.error().source().unwrap().downcast_ref::<h2::Error>().unwrap();
    (cause.is_remote(), cause.is_go_away(), cause.reason().map(u32::from))
}

#[tokio::test]
async fn stream_limit_is_the_initial_one_until_settings_arrive() {
    for (settings, limit) in
        [(&[][..], usize::MAX), (&[0, 3, 0, 0, 0, 7], 7), (&[0, 3, 255, 255, 255, 255], 0xffff_ffff)]
    {
        let mut http2 = Http2::silent().await;
        http2.turns().await;
        assert_eq!(http2.limit(), UNTOLD);
        http2.says(&[frame(SETTINGS, 0, 0, settings)]).await;
        assert_eq!(http2.limit(), limit);
    }
}

#[tokio::test]
async fn hyper_spawns_the_driver_first_and_then_one_task_per_request() {
    let mut http2 = Http2::greeted().await;
    assert_eq!((http2.driver.count(), http2.spawned.count()), (1, 0));
    let _first = http2.ask().await;
    let first = http2.spawned.count();
    let second = http2.ask().await;
    assert_eq!((first, http2.spawned.count()), (1, 2));
    http2.says(&[frame(HEADERS, END_HEADERS | END_STREAM, 3, OK)]).await;
    assert_eq!(http2.spawned.count(), 1);
    now(second).await.unwrap();
}

#[tokio::test]
async fn goaway_is_reported_only_to_streams_beyond_its_last_one() {
    for reason in [NO_ERROR, CANCEL] {
        let mut http2 = Http2::greeted().await;
        let (covered, cut, beyond) = (http2.ask().await, http2.ask().await, http2.ask().await);
        http2.says(&[go_away(3, reason)]).await;
        assert_eq!(told(&now(beyond).await.unwrap_err()), (true, true, Some(reason)));
        http2.says(&[frame(HEADERS, END_HEADERS | END_STREAM, 1, OK)]).await;
        now(covered).await.unwrap();
        http2.cloud.shutdown().await.unwrap();
        http2.turns().await;
        let why = now(cut).await.unwrap_err();
        assert!(why.error().source().unwrap().is::<io::Error>(), "{why:?}");
    }
}

#[tokio::test]
async fn goaway_ends_the_handover_while_streams_are_open() {
    let mut http2 = Http2::greeted().await;
    let open = http2.ask().await;
    http2.says(&[go_away(1, NO_ERROR)]).await;
    assert!(http2.handover.is_none() && http2.sender.is_closed());
    http2.says(&[frame(HEADERS, END_HEADERS | END_STREAM, 1, OK)]).await;
    now(open).await.unwrap();
}

#[tokio::test]
async fn sender_is_closed_before_a_goaway_returns_its_request() {
    let mut http2 = Http2::greeted().await;
    let mut denied = http2.ask().await;
    http2.cloud.write_all(&go_away(0, NO_ERROR)).await.unwrap();
    for _ in 0..MANY {
        http2.turn().await;
        if turn(&mut denied.as_mut()).await.is_ready() {
            assert!(http2.sender.is_closed());
            return;
        }
    }
    panic!("it was not denied");
}

#[tokio::test]
async fn refused_stream_is_reported_as_a_remote_reset() {
    let mut http2 = Http2::greeted().await;
    let (refused, other) = (http2.ask().await, http2.ask().await);
    http2.says(&[reset(1, REFUSED_STREAM), reset(3, CANCEL)]).await;
    let why = now(refused).await.unwrap_err();
    assert_eq!(told(&why), (true, false, Some(REFUSED_STREAM)));
    assert!(why.message().is_none(), "it was written");
    assert_eq!(told(&now(other).await.unwrap_err()), (true, false, Some(CANCEL)));
}

#[tokio::test]
async fn hyper_returns_only_requests_it_has_not_written() {
    let mut http2 = Http2::greeted().await;
    let written = http2.ask().await;
    http2.cloud.shutdown().await.unwrap();
    // Handed over before the end of the connection is seen.
    let unwritten = Box::pin(http2.sender.try_send_request(request()));
    http2.turns().await;
    assert!(now(written).await.unwrap_err().message().is_none());
    let late = http2.ask().await;
    assert!(now(late).await.unwrap_err().message().is_some());
    assert!(now(unwritten).await.unwrap_err().message().is_some());
    let written = take(&mut http2.cloud).await;
    let count = |stream| {
        let head = &frame(HEADERS, END_HEADERS | END_STREAM, stream, &[])[3..];
        written.windows(head.len()).filter(|bytes| *bytes == head).count()
    };
    assert_eq!((count(1), count(3), count(5)), (1, 0, 0));
}

#[tokio::test]
async fn only_end_stream_shows_that_an_http2_body_is_complete() {
    let ends: [(_, _, &[_]); 4] = [
        ("whole", true, &[frame(DATA, END_STREAM, 1, b"b")]),
        (
            "whole, with trailers",
            true,
            &[frame(DATA, 0, 1, b"b"), frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\0\x01x\x01y")],
        ),
        ("reset", false, &[reset(1, NO_ERROR)]),
        ("denied", false, &[go_away(0, NO_ERROR)]),
    ];
    for (name, is_whole, end) in ends {
        let mut http2 = Http2::greeted().await;
        let asked = http2.ask().await;
        http2.says(&[frame(HEADERS, END_HEADERS, 1, OK), frame(DATA, 0, 1, b"a")]).await;
        let mut body = now(asked).await.unwrap().into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "a");
        http2.says(end).await;
        while let Poll::Ready(Some(frame)) = turn(&mut pin!(body.frame())).await {
            frame.unwrap();
        }
        assert!(matches!(turn(&mut pin!(body.frame())).await, Poll::Ready(None)), "{name}");
        assert_eq!(body.is_end_stream(), is_whole, "{name}");
    }
    let mut http2 = Http2::greeted().await;
    let asked = http2.ask().await;
    http2.says(&[frame(HEADERS, END_HEADERS, 1, OK)]).await;
    let mut body = now(asked).await.unwrap().into_body();
    http2.says(&[reset(1, CANCEL)]).await;
    assert!(body.frame().await.unwrap().is_err(), "another reason is an error");
}

#[tokio::test]
async fn hyper_hides_interim_responses_over_http2() {
    let hints = |stream| frame(HEADERS, END_HEADERS, stream, EARLY_HINTS);
    let mut http2 = Http2::greeted().await;
    let (answered, refused) = (http2.ask().await, http2.ask().await);
    http2
        .says(&[
            hints(1),
            hints(3),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, OK),
            reset(3, REFUSED_STREAM),
        ])
        .await;
    assert_eq!(now(answered).await.unwrap().status(), 200);
    assert_eq!(told(&now(refused).await.unwrap_err()), (true, false, Some(REFUSED_STREAM)));
}

#[tokio::test]
async fn response_on_an_unopened_stream_closes_the_connection() {
    let mut http2 = Http2::greeted().await;
    let asked = http2.ask().await;
    http2.says(&[frame(HEADERS, END_HEADERS | END_STREAM, 99, OK)]).await;
    let why = now(asked).await.unwrap_err();
    let cause = why.error().source().unwrap().downcast_ref::<h2::Error>().unwrap();
    assert!(cause.is_go_away() && !cause.is_remote(), "{why:?}");
    assert!(http2.sender.is_closed());
}

#[tokio::test]
async fn large_head_and_wrong_length_cause_the_same_http2_error() {
    let large = [b"\0\x01x\x7f\x81\x0f", &[b'y'; 2048][..]].concat();
    let large = [OK, &large].concat();
    let length = [OK, b"\x0f\x0d\x015"].concat(); // `content-length: 5`
    let answers: [&[_]; 2] = [
        &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &large)],
        &[frame(HEADERS, END_HEADERS, 1, &length), frame(DATA, END_STREAM, 1, b"abc")],
    ];
    for answer in answers {
        let mut http2 = Http2::greeted().await;
        let asked = http2.ask().await;
        http2.says(answer).await;
        let error = match now(asked).await {
            Ok(response) => response.into_body().collect().await.unwrap_err(),
            Err(why) => why.into_error(),
        };
        let cause = error.source().unwrap().downcast_ref::<h2::Error>().unwrap();
        assert!(cause.is_library() && !cause.is_remote(), "{error:?}");
        assert_eq!(cause.reason(), Some(h2::Reason::PROTOCOL_ERROR));
    }
}

/// The texts of all files in a folder.
fn texts(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(texts(&path)),
            false => found.push(fs::read_to_string(path).unwrap()),
        }
    }
    found
}

#[test]
fn each_test_is_named_where_its_assumption_is_used() {
    let mut named: Vec<String> = texts(Path::new("src"))
        .iter()
        .flat_map(|text| text.split("tests/hyper.rs: ").skip(1))
        .map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap().to_owned())
        .collect();
    named.sort();
    named.dedup();
    let here = include_str!("hyper.rs").split("#[tokio::test]\nasync fn ").skip(1);
    let mut here: Vec<_> = here.map(|rest| rest.split('(').next().unwrap()).collect();
    here.sort_unstable();
    assert_eq!(named, here);
}
