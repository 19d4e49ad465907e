//! One gRPC connection: TLS, HTTP/2's preface, and its requests.
//!
//! Invariants:
//! - A peer that does not begin to speak HTTP/2 within [`HANDSHAKE`] loses its connection, and never holds up a drain.
//! - So does a peer that takes nothing of what it is sent for `limits.write_ms`. Nobody else notices one whose window is open and whose
//!   socket is full: HTTP/2 has the answers, and counts them as sent.
//! - A drain tells the peer to open no more streams. The connection ends when its calls are answered and the peer has read the
//!   answers, or has had `limits.write_ms` to read them.

use super::{
    listener::{Patient, Slot, with_patience},
    tls::Tls,
};
use crate::{
    telemetry::events,
    wire::{
        drain_began,
        peer::{Peer, fingerprint},
    },
};
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    sync::watch,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::{either::Either, task::TaskTracker};
use tonic::body::Body;
use tower::Service;

/// How long a peer may take to complete TLS and to send HTTP/2's preface.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// What an HTTP/2 client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A peer that vanished is detected within the sum of the two, so that it holds up neither requests nor a drain.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// More metadata than the handlers accept, so that a call with too much of it gets a gRPC status. With still more, HTTP/2 itself
/// answers 431.
const MAX_HEADER_BYTES: u32 = 64 << 10;
/// The part of an answer that HTTP/2 keeps ahead of what the peer has read.
const SEND_BUFFER: usize = 64 << 10;

/// What the connections of a listener have in common.
#[derive(Debug, Clone)]
pub(super) struct Options {
    /// The metrics' label.
    pub(super) listener: &'static str,
    pub(super) tls: Option<Tls>,
    /// The most streams that one connection may have open.
    pub(super) max_streams: u32,
    /// `limits.write_ms`
    pub(super) write: Duration,
    pub(super) draining: watch::Receiver<bool>,
}

/// The service that answers the requests of all connections. It is always ready.
pub(super) trait Handler:
    Service<Request<Incoming>, Response = Response<Body>, Error = Infallible, Future: Send> + Clone + Send + 'static
{
}

impl<S> Handler for S where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible, Future: Send> + Clone + Send + 'static
{
}

type Stream = Either<Patient, TlsStream<Patient>>;

/// Serves one connection to its end. It ends early if the drain begins before its first request can.
pub(super) async fn serve(stream: TcpStream, address: SocketAddr, slot: Slot, handler: impl Handler, options: Options) {
    // Held until the connection is closed.
    let _slot = slot;
    let mut draining = options.draining.clone();
    let opened = tokio::select! {
        opened = tokio::time::timeout(HANDSHAKE, open(stream, &options)) => opened,
        () = drain_began(&mut draining) => return,
    };
    let stream = match opened {
        Ok(Ok(stream)) => stream,
        Ok(Err(refusal)) => return events::connection_refused(options.listener, refusal.label()),
        Err(_elapsed) => return events::connection_refused(options.listener, "silent"),
    };
    // The calls that are being answered.
    let calls = TaskTracker::new();
    let peer = Peer { address: Some(address.ip()), certificate: certificate(&stream), ..Peer::default() };
    let tokens = calls.clone();
    let answer = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        tokens.track_future(handler.clone().call(request))
    });
    let mut connection = pin!(builder(&options).serve_connection(TokioIo::new(Replayed::new(stream)), answer));
    let served = tokio::select! {
        served = &mut connection => served,
        () = drain_began(&mut draining) => {
            connection.as_mut().graceful_shutdown();
            calls.close();
            // Answers that are not read by then are lost, as without a drain. A peer that reads nothing and acknowledges nothing
            // must not hold up the end.
            let answered = async {
                loop {
                    calls.wait().await;
                    tokio::time::sleep(options.write).await;
                    // Otherwise a call that was on its way when the drain began has come.
                    if calls.is_empty() {
                        break;
                    }
                }
            };
            tokio::select! {
                served = &mut connection => served,
                () = answered => return,
            }
        }
    };
    if let Err(error) = served {
        tracing::debug!(listener = options.listener, %error, "connection failed");
    }
}

/// Why a connection is closed before its first request.
enum Refusal {
    /// The TLS handshake failed.
    Tls,
    /// The peer speaks another protocol.
    NotHttp2,
    /// The peer left.
    Left,
}

impl Refusal {
    fn label(&self) -> &'static str {
        match self {
            Refusal::Tls => "tls",
            Refusal::NotHttp2 => "not_http2",
            Refusal::Left => "left",
        }
    }
}

/// Completes TLS, if the listener has it, and reads HTTP/2's preface.
async fn open(stream: TcpStream, options: &Options) -> Result<Stream, Refusal> {
    let stream = with_patience(stream, options.write);
    let mut stream = match &options.tls {
        None => Either::Left(stream),
        Some(tls) => match TlsAcceptor::from(tls.current()).accept(stream).await {
            Ok(stream) => Either::Right(stream),
            Err(error) => {
                tracing::debug!(listener = options.listener, %error, "TLS handshake failed");
                return Err(Refusal::Tls);
            }
        },
    };
    let mut read = [0; PREFACE.len()];
    let mut n_read = 0;
    while n_read < PREFACE.len() {
        match stream.read(&mut read[n_read..]).await {
            Ok(0) | Err(_) => return Err(Refusal::Left),
            Ok(n) => n_read += n,
        }
        if read[..n_read] != PREFACE[..n_read] {
            tell_http1(&mut stream, &read[..n_read]).await;
            return Err(Refusal::NotHttp2);
        }
    }
    Ok(stream)
}

/// Tells a peer that speaks HTTP/1 what this port is. Others are closed without a word.
async fn tell_http1(stream: &mut Stream, first: &[u8]) {
    const TEXT: &str =
        "this port speaks gRPC over HTTP/2; metrics and health over HTTP/1 are at telemetry.metrics_listen\n";
    if !first[0].is_ascii_uppercase() {
        return;
    }
    let answer = format!(
        "HTTP/1.1 505 HTTP Version Not Supported\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{TEXT}",
        TEXT.len()
    );
    if stream.write_all(answer.as_bytes()).await.is_ok() && stream.shutdown().await.is_ok() {
        // Closing with unread bytes would reset the connection before the peer has read the answer.
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {}
    }
}

fn certificate(stream: &Stream) -> Option<Arc<str>> {
    let Either::Right(stream) = stream else { return None };
    let (_, session) = stream.get_ref();
    session.peer_certificates()?.first().map(|certificate| fingerprint(certificate).into())
}

fn builder(options: &Options) -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .max_concurrent_streams(options.max_streams)
        // Streams that the peer resets before they are accepted. A caller may cancel everything that it has open, as one does
        // whose hedged calls were answered elsewhere; a flood of more than that ends the connection.
        .max_pending_accept_reset_streams(options.max_streams as usize)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_send_buf_size(SEND_BUFFER);
    builder
}

/// A stream whose preface was read already, and is read again by HTTP/2.
struct Replayed {
    stream: Stream,
    n_replayed: usize,
}

impl Replayed {
    fn new(stream: Stream) -> Self {
        Replayed { stream, n_replayed: 0 }
    }

    fn stream(&mut self) -> Pin<&mut Stream> {
        Pin::new(&mut self.stream)
    }
}

impl AsyncRead for Replayed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let rest = &PREFACE[self.n_replayed..];
        if rest.is_empty() {
            return self.stream().poll_read(cx, buffer);
        }
        let n = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..n]);
        self.n_replayed += n;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Replayed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
