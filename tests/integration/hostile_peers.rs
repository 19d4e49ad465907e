//! Peers that hold on to what they do not use: calls without a message, answers that they do not read, connections without a word.
//! They lose it, and nobody else notices.

use crate::harness::{
    ONE_CPU_THREAD, PATIENCE, Server, eventually, films, fixture, ids, long_films, page, shipped, statuses,
};
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderMap, Request, Response};
use midemb_client::proto::{CacheChunk, GetMidEmbRequest, GetStatusRequest, WarmItemsRequest};
use prost::Message;
use std::{
    io::{self, Read, Write},
    net::TcpStream as StdTcpStream,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

const GET_MID_EMB: &str = "/midemb.v1.MidEmbService/GetMidEmb";

/// An HTTP/2 connection that offers the server windows of this size to send into, and the most streams that the server allows.
async fn connect(address: &str, window: u32) -> (SendRequest<Bytes>, Arc<AtomicUsize>) {
    let stream = TcpStream::connect(address).await.unwrap();
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(window).initial_max_send_streams(0);
    let (mut calls, connection) = builder.handshake(stream).await.unwrap();
    let n_streams = Arc::new(AtomicUsize::new(0));
    let announced = Arc::clone(&n_streams);
    let mut connection = Box::pin(connection);
    tokio::spawn(std::future::poll_fn(move |cx| {
        let polled = connection.as_mut().poll(cx);
        announced.store(connection.max_concurrent_send_streams(), Ordering::SeqCst);
        polled
    }));
    calls = calls.ready().await.unwrap();
    (calls, n_streams)
}

/// A socket that is no longer read once it `stops`.
struct Stalling {
    stream: TcpStream,
    stops: Arc<AtomicBool>,
}

impl AsyncRead for Stalling {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.stops.load(Ordering::SeqCst) {
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stalling {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn call(path: &str, headers: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::post(format!("http://midemb{path}"));
    for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")].iter().chain(headers) {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

fn framed(message: &impl Message) -> Bytes {
    let message = message.encode_to_vec();
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    frame.into()
}

/// The status of a call whose answer has no body, and its message.
fn status(response: &Response<h2::RecvStream>) -> (Code, String) {
    let header = |headers: &HeaderMap, name: &str| {
        headers.get(name).map(|value| value.to_str().unwrap().replace("%20", " ")).unwrap_or_default()
    };
    let code = header(response.headers(), "grpc-status");
    (Code::from_bytes(code.as_bytes()), header(response.headers(), "grpc-message"))
}

async fn answer(call: ResponseFuture) -> Response<h2::RecvStream> {
    tokio::time::timeout(PATIENCE, call).await.expect("the call was never answered").unwrap()
}

fn n_calls(server: &Server, code: &str) -> f64 {
    server.scrape().sum("midemb_requests_total", &["method=\"GetMidEmb\"", &format!("code=\"{code}\"")])
}

async fn assert_serves(server: &Server) {
    let answer = server.client().await.get_mid_emb(page(films("h", 2), films("c", 3))).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 3]);
}

/// 256 calls without a message, which say that they have an hour, took every place in flight for that hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_whose_messages_never_come_take_no_place_in_flight() {
    let server =
        Server::start_with(&fixture(), "limits.max_in_flight = 2\nserver.max_streams = 300\nlimits.read_ms = 2000");
    let (mut calls, n_streams) = connect(&server.grpc, 1 << 16).await;
    eventually("the server announces its bound on streams", async || n_streams.load(Ordering::SeqCst) == 300).await;
    let mut open = Vec::new();
    for _ in 0..256 {
        calls = calls.ready().await.unwrap();
        open.push(calls.send_request(call(GET_MID_EMB, &[("grpc-timeout", "1H")]), false).unwrap());
    }
    eventually("all of them wait for their messages", async || server.scrape().n_receiving() == 256.0).await;
    assert_serves(&server).await;
    for (response, _body) in open {
        let response = answer(response).await;
        let expected = "the message did not arrive within 2000 ms (limits.read_ms)".to_owned();
        assert_eq!(status(&response), (Code::DeadlineExceeded, expected));
    }
    eventually("none waits any more", async || server.scrape().n_receiving() == 0.0).await;
    assert_eq!(server.scrape().sum("midemb_shed_total", &[]), 0.0);
}

/// 200 answers of megabytes to a peer with a window of zero stayed in memory for as long as it liked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_nobody_reads_are_bounded_and_dropped() {
    let server = Server::start_with(&fixture(), "limits.max_unsent_mb = 1\nlimits.write_ms = 2000");
    let warm = page(vec![], films("c", 3000));
    server.client().await.get_mid_emb(warm.clone()).await.unwrap();
    let (mut calls, _) = connect(&server.grpc, 0).await;
    let request = framed(&page(vec![], ids(&warm.candidates)));
    let mut answers = Vec::new();
    for _ in 0..64 {
        calls = calls.ready().await.unwrap();
        let (response, mut body) = calls.send_request(call(GET_MID_EMB, &[("grpc-timeout", "1H")]), false).unwrap();
        body.send_data(request.clone(), true).unwrap();
        answers.push(answer(response).await);
        let held = server.scrape().sum("midemb_budget_bytes", &["budget=\"unsent\""]);
        assert!(held <= f64::from(1 << 20), "{held} bytes of answers are held");
    }
    let n_shed = answers.iter().filter(|answer| status(answer).0 == Code::ResourceExhausted).count();
    assert!(n_shed > 0, "64 unread answers fit into the budget, so the test shows nothing");
    assert_eq!(server.scrape().sum("midemb_shed_total", &["reason=\"unsent_answers\""]), n_shed as f64);
    eventually("nothing is held", async || server.scrape().sum("midemb_budget_bytes", &["budget=\"unsent\""]) == 0.0)
        .await;
    assert!(server.scrape().sum("midemb_answers_dropped_total", &[]) > 0.0);
    assert_serves(&server).await;
}

/// A peer with open windows and a full socket kept its connection, and what HTTP/2 had taken of its answers, for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_takes_nothing_from_its_socket_loses_its_connection() {
    let server = Server::start_with(&fixture(), "limits.write_ms = 1000");
    let warm = page(vec![], films("c", 3000));
    server.client().await.get_mid_emb(warm.clone()).await.unwrap();
    let n_open = async || server.scrape().sum("midemb_connections", &["main"]);
    eventually("no other connection is open", async || n_open().await == 0.0).await;
    let stops = Arc::new(AtomicBool::new(false));
    let stream = Stalling { stream: TcpStream::connect(&server.grpc).await.unwrap(), stops: Arc::clone(&stops) };
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(1 << 30).initial_connection_window_size(1 << 30);
    let (calls, connection) = builder.handshake(stream).await.unwrap();
    tokio::spawn(async move { connection.await.unwrap_err() });
    let mut calls = calls.ready().await.unwrap();
    stops.store(true, Ordering::SeqCst);
    let request = framed(&page(vec![], ids(&warm.candidates)));
    let mut open = Vec::new();
    for _ in 0..100 {
        calls = calls.ready().await.unwrap();
        let (response, mut body) = calls.send_request(call(GET_MID_EMB, &[]), false).unwrap();
        body.send_data(request.clone(), true).unwrap();
        open.push(response);
    }
    eventually("the calls arrive", async || n_open().await == 1.0 && n_calls(&server, "OK") > 1.0).await;
    eventually("the connection is closed", async || n_open().await == 0.0).await;
    assert_serves(&server).await;
}

/// So did one that asked for metrics and read nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_read_its_metrics_loses_its_connection() {
    let server = Server::start_with(&fixture(), "limits.write_ms = 1000");
    // The peer stops sending when the server reads no more.
    let mut peer = StdTcpStream::connect(&server.metrics).unwrap();
    peer.set_write_timeout(Some(std::time::Duration::from_millis(500))).unwrap();
    let requests = "GET /metrics HTTP/1.1\r\nhost: midemb\r\n\r\n".repeat(20_000);
    let sent = tokio::task::spawn_blocking(move || (peer.write_all(requests.as_bytes()), peer)).await.unwrap();
    let n_open = async || server.scrape().sum("midemb_connections", &["metrics"]);
    eventually("the scrape's own connection is the only one", async || n_open().await == 1.0).await;
    drop(sent);
}

/// Health checks and reflection took the room for warm-up, and reflection never gave it back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_other_services_are_bounded_and_take_nothing_of_ours() {
    const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    const CHECK: &str = "/grpc.health.v1.Health/Check";
    let server = Server::start_with(
        &fixture(),
        "limits.read_ms = 1000\nlimits.max_message_mb = 1\nlimits.max_receiving_mb = 4\nlimits.max_warm_up_mb = 1",
    );
    let (mut calls, _) = connect(&server.grpc, 1 << 20).await;
    let mut open = Vec::new();
    for _ in 0..64 {
        calls = calls.ready().await.unwrap();
        open.push(calls.send_request(call(REFLECTION, &[]), false).unwrap());
    }
    let mut others = Vec::new();
    for (path, headers, sent) in [
        (REFLECTION, vec![], Bytes::new()),
        (CHECK, vec![], Bytes::new()),
        (CHECK, vec![("x-trace", "x".repeat(20_000))], Bytes::new()),
    ] {
        calls = calls.ready().await.unwrap();
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let (response, mut body) = calls.send_request(call(path, &headers), false).unwrap();
        body.send_data(sent, false).unwrap();
        others.push((status(&answer(response).await).0, body));
    }
    let codes: Vec<Code> = others.iter().map(|(code, _)| *code).collect();
    assert_eq!(codes, [Code::ResourceExhausted, Code::DeadlineExceeded, Code::InvalidArgument]);
    let mut client = server.client().await;
    let warmed = client.warm_items(tokio_stream::iter([WarmItemsRequest { items: films("w", 100) }]));
    assert_eq!(tokio::time::timeout(PATIENCE, warmed).await.unwrap().unwrap().into_inner().encoded, 100);
    drop((open, others));
}

/// Calls of 5 bytes that declared 16 MB took the whole budget for messages that arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_only_claims_to_be_long_takes_little() {
    let server = Server::start_with(&fixture(), "limits.max_receiving_mb = 16\nlimits.read_ms = 60000");
    let mut open = Vec::new();
    for _ in 0..4 {
        let (mut calls, _) = connect(&server.grpc, 1 << 16).await;
        for _ in 0..10 {
            calls = calls.ready().await.unwrap();
            let (response, mut body) = calls.send_request(call(GET_MID_EMB, &[("grpc-timeout", "1H")]), false).unwrap();
            body.send_data(Bytes::from_static(b"\0\0\xff\0\0"), false).unwrap();
            open.push((calls.clone(), response, body));
        }
    }
    eventually("all of them are arriving", async || server.scrape().n_receiving() == 40.0).await;
    assert_serves(&server).await;
    assert_eq!(server.scrape().sum("midemb_shed_total", &[]), 0.0);
}

/// Requests that wait for the encoder kept their texts, 16 MB each, and nothing counted them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_texts_of_requests_that_are_being_answered_are_bounded() {
    let keys = format!("{ONE_CPU_THREAD}\nlimits.max_message_mb = 1\nlimits.max_decoded_mb = 1");
    let server = Server::start_with(&shipped(), &keys);
    let mut client = server.client().await;
    let hot = page(films("h", 2), films("c", 3));
    client.get_mid_emb(hot.clone()).await.unwrap();
    let held = async || server.scrape().sum("midemb_budget_bytes", &["budget=\"decoded\""]);
    let mut waiting = JoinSet::new();
    for i in 0..2 {
        let texts = long_films(&format!("cold-{i}"), 900);
        let mut request = tonic::Request::new(page(vec![], texts));
        request.set_timeout(PATIENCE);
        let mut client = client.clone();
        waiting.spawn(async move { client.get_mid_emb(request).await });
    }
    let one = page(vec![], long_films("cold-2", 900)).encoded_len() as f64;
    assert!(3.0 * one > f64::from(2 << 20) && one < f64::from(1 << 20), "the requests have {one} bytes each");
    eventually("two of them are held", async || held().await > 2.0 * one).await;
    let refused = client.get_mid_emb(page(vec![], long_films("cold-2", 900))).await.unwrap_err();
    let expected = "overloaded: too many bytes of requests are being answered";
    assert_eq!((refused.code(), refused.message()), (Code::ResourceExhausted, expected));
    assert_eq!(statuses(&client.get_mid_emb(hot).await.unwrap().into_inner()), ["OK"; 3]);
    waiting.abort_all();
    eventually("nothing is held", async || held().await == 0.0).await;
}

/// One client with many connections kept operators out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_do_not_take_the_connections_of_operators() {
    let server = Server::start_with(&fixture(), "server.max_connections = 4");
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(connect(&server.grpc, 1 << 16).await);
    }
    let mut further = StdTcpStream::connect(&server.grpc).unwrap();
    further.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(further.read(&mut [0]).unwrap_or(0), 0, "a fifth connection is open");
    server.admin().await.get_status(GetStatusRequest {}).await.unwrap();
}

/// One silent peer, or half a preface, held up a drain for all of `server.drain_seconds`, and so did any stream but a warm-up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_peer_holds_up_a_drain() {
    let server = Server::start_with(&fixture(), "server.drain_seconds = 3600\nlimits.write_ms = 1000");
    let silent: Vec<StdTcpStream> = [&server.grpc, &server.admin, &server.metrics]
        .map(|address| StdTcpStream::connect(address.as_str()).unwrap())
        .into();
    let mut half = StdTcpStream::connect(&server.grpc).unwrap();
    half.write_all(b"PRI * HTTP").unwrap();
    // After its preface, this one neither reads nor answers pings.
    let mut mute = StdTcpStream::connect(&server.grpc).unwrap();
    mute.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();

    let mut streams = JoinSet::new();
    let (import, chunks) = mpsc::channel(1);
    import.send(CacheChunk { data: vec![1, 2, 3].into() }).await.unwrap();
    let mut admin = server.admin().await;
    streams.spawn(async move { admin.import_cache(ReceiverStream::new(chunks)).await.map(drop) });
    let (warm, items) = mpsc::channel(1);
    warm.send(WarmItemsRequest { items: films("warm", 1) }).await.unwrap();
    let mut client = server.client().await;
    streams.spawn(async move { client.warm_items(ReceiverStream::new(items)).await.map(drop) });
    // Calls of other services: one that streams, and one whose message never comes.
    let (mut calls, _) = connect(&server.grpc, 1 << 16).await;
    let mut others = Vec::new();
    for path in ["/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Check"] {
        calls = calls.ready().await.unwrap();
        others.push(calls.send_request(call(path, &[]), false).unwrap());
    }
    // An answer that nobody reads.
    let (mut unread, _) = connect(&server.grpc, 0).await;
    unread = unread.ready().await.unwrap();
    let (response, mut body) = unread.send_request(call(GET_MID_EMB, &[]), false).unwrap();
    body.send_data(framed(&page(vec![], films("c", 3))), true).unwrap();
    let unread_answer = answer(response).await;

    eventually("every connection is open", async || server.scrape().sum("midemb_connections", &["main"]) >= 6.0).await;
    server.signal("TERM");
    while let Some(ended) = streams.join_next().await {
        let status = ended.unwrap().unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "not serving: draining"));
    }
    server.wait_for_log("stopped");
    assert!(server.wait().success());
    drop((silent, half, mute, import, warm, others, unread_answer));
}

#[test]
fn a_peer_that_never_speaks_loses_its_connection() {
    let server = Server::start();
    let mut peers: Vec<StdTcpStream> =
        [&server.grpc, &server.admin].map(|address| StdTcpStream::connect(address.as_str()).unwrap()).into();
    peers.push(StdTcpStream::connect(&server.grpc).unwrap());
    peers[2].write_all(b"PRI * HTTP").unwrap();
    for mut peer in peers {
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the connection is still open");
    }
    assert_eq!(server.scrape().sum("midemb_connections_refused_total", &["reason=\"silent\""]), 3.0);
}

#[test]
fn a_peer_that_speaks_http1_is_told_what_the_port_is() {
    let server = Server::start();
    for address in [&server.grpc, &server.admin] {
        let mut peer = StdTcpStream::connect(address.as_str()).unwrap();
        peer.write_all(b"GET /metrics HTTP/1.1\r\nhost: midemb\r\n\r\n").unwrap();
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        peer.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 505 HTTP Version Not Supported\r\n"), "{answer}");
        assert!(answer.contains("this port speaks gRPC over HTTP/2"), "{answer}");
    }
}

/// A page of hedged calls that are all cancelled looked like a flood, and the innocent calls of the connection failed with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_calls_do_not_harm_others_of_their_connection() {
    let server = Server::start();
    let (mut calls, _) = connect(&server.grpc, 1 << 20).await;
    let request = framed(&page(vec![], films("c", 3)));
    for _ in 0..10 {
        let mut innocent = Vec::new();
        for i in 0..60 {
            calls = calls.ready().await.unwrap();
            let (response, mut body) = calls.send_request(call(GET_MID_EMB, &[]), false).unwrap();
            if i % 3 == 0 {
                body.send_data(request.clone(), true).unwrap();
                innocent.push(response);
            } else {
                body.send_reset(h2::Reason::CANCEL);
            }
        }
        for response in innocent {
            assert_eq!(answer(response).await.headers().get("grpc-status"), None, "an innocent call failed");
        }
    }
}

/// What a caller does wrong was counted as INTERNAL or UNKNOWN, which an alert takes for our fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn codes_say_whose_fault_it_was() {
    let server = Server::start();
    let (mut calls, _) = connect(&server.grpc, 1 << 16).await;
    let message = framed(&page(vec![], films("c", 3)));
    let flagged = |flag: u8| Bytes::from([&[flag], &message[1..]].concat());
    let twice = Bytes::from([&message[..], &message[..]].concat());
    let cases = [
        (Bytes::new(), "request: no message was sent"),
        (message.slice(..3), "request: the message is cut off"),
        (message.slice(..message.len() - 1), "request: the message is cut off"),
        (twice, "request: more than one message was sent"),
        (flagged(7), "request: 7 is not a compression flag, use 0"),
    ];
    for (sent, expected) in cases {
        calls = calls.ready().await.unwrap();
        let (response, mut body) = calls.send_request(call(GET_MID_EMB, &[]), false).unwrap();
        body.send_data(sent, true).unwrap();
        assert_eq!(status(&answer(response).await), (Code::InvalidArgument, expected.to_owned()));
    }
    assert_eq!(n_calls(&server, "INVALID_ARGUMENT"), 5.0);
    calls = calls.ready().await.unwrap();
    let (response, mut body) = calls.send_request(call(GET_MID_EMB, &[("grpc-encoding", "gzip")]), false).unwrap();
    body.send_data(flagged(1), true).unwrap();
    let refused = status(&answer(response).await);
    assert!(
        refused.0 == Code::Unimplemented && refused.1.contains("compressed messages are not accepted"),
        "{refused:?}"
    );

    calls = calls.ready().await.unwrap();
    let (response, mut body) = calls.send_request(call(GET_MID_EMB, &[]), false).unwrap();
    body.send_data(message.slice(..10), false).unwrap();
    eventually("the message is arriving", async || server.scrape().n_receiving() == 1.0).await;
    body.send_reset(h2::Reason::CANCEL);
    eventually("the call is counted", async || n_calls(&server, "CANCELLED") == 1.0).await;
    drop(response);
    let gone =
        connect(&server.grpc, 1 << 16).await.0.ready().await.unwrap().send_request(call(GET_MID_EMB, &[]), false);
    eventually("the message is arriving", async || server.scrape().n_receiving() == 1.0).await;
    drop(gone);
    eventually("that call is counted, too", async || n_calls(&server, "CANCELLED") == 2.0).await;
    assert_eq!(n_calls(&server, "INTERNAL") + n_calls(&server, "UNKNOWN"), 0.0);
    assert_serves(&server).await;
}

/// HTTP/2 answered 431 to more than 16 KB of metadata, which clients report as UNKNOWN and nobody counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_metadata_is_an_invalid_argument() {
    let server = Server::start();
    let mut request = tonic::Request::new(page(vec![], films("c", 3)));
    request.metadata_mut().insert("x-trace", "x".repeat(20_000).parse().unwrap());
    let refused = server.client().await.get_mid_emb(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    assert!(
        refused.message().starts_with("metadata: has ") && refused.message().ends_with("at most 16384 are allowed")
    );
    assert_eq!(n_calls(&server, "INVALID_ARGUMENT"), 1.0);
}

/// tonic answered an expired deadline with CANCELLED.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_answers_an_expired_deadline_with_its_own_code() {
    let server = Server::start();
    let (items, stream) = mpsc::channel(1);
    items.send(WarmItemsRequest { items: films("warm", 1) }).await.unwrap();
    let (calls, _) = connect(&server.grpc, 1 << 16).await;
    let mut calls = calls.ready().await.unwrap();
    let (response, _body) =
        calls.send_request(call("/midemb.v1.MidEmbService/WarmItems", &[("grpc-timeout", "100m")]), false).unwrap();
    assert_eq!(status(&answer(response).await).0, Code::DeadlineExceeded);
    let (calls, _) = connect(&server.admin, 1 << 16).await;
    let mut calls = calls.ready().await.unwrap();
    let (response, _body) =
        calls.send_request(call("/midemb.v1.AdminService/PushConfig", &[("grpc-timeout", "100m")]), false).unwrap();
    assert_eq!(status(&answer(response).await).0, Code::DeadlineExceeded);
    drop((items, stream));
}

/// The accept loops took most of a core, and said nothing, while the process had no file descriptor left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_without_file_descriptors_waits_and_says_so_once() {
    let server = Server::start_with_open_files(96);
    let mut peers = Vec::new();
    let line = tokio::task::spawn_blocking({
        let address = server.grpc.clone();
        move || {
            for _ in 0..96 {
                peers.extend(StdTcpStream::connect(&address));
            }
            peers
        }
    });
    let peers = line.await.unwrap();
    assert_eq!(server.wait_for_log("connections cannot be accepted, trying again")["listener"], "main");
    drop(peers);
    assert_eq!(server.wait_for_log("connections are accepted again")["listener"], "main");
    assert_serves(&server).await;
}

/// Each import holds the whole file in memory: eight of 120 MB took 1.2 GB.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_import_or_export_runs_at_a_time() {
    let server = Server::start();
    let chunk = || CacheChunk { data: vec![0; 1000].into() };
    // Which of two calls reaches the server first is not known, so it may take several pairs until the open one does.
    eventually("a second import is refused", async || {
        let (chunks, stream) = mpsc::channel(1);
        chunks.send(chunk()).await.unwrap();
        let mut admin = server.admin().await;
        let open = tokio::spawn(async move { admin.import_cache(ReceiverStream::new(stream)).await });
        let second = server.admin().await.import_cache(tokio_stream::iter([chunk()])).await.unwrap_err();
        drop(chunks);
        let open = open.await.unwrap().unwrap_err();
        let refusals = [&open, &second].into_iter().filter(|status| status.code() == Code::ResourceExhausted);
        assert!(refusals.clone().all(|status| status.message() == "overloaded: too many calls of this kind are open"));
        // The file of the other one is not a safetensors file.
        assert!(
            [&open, &second].into_iter().any(|status| status.code() == Code::InvalidArgument),
            "{open:?} {second:?}"
        );
        refusals.count() == 1
    })
    .await;
}

/// A request whose rows have to be encoded waits a thousand times as long as a hot one, and took its place in flight meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cold_requests_never_crowd_out_hot_ones() {
    let server = Server::start_with(
        &shipped(),
        &format!("{ONE_CPU_THREAD}\nlimits.max_in_flight = 4\nlimits.max_encoding = 60"),
    );
    let hot = page(films("h", 10), films("c", 50));
    server.client().await.get_mid_emb(hot.clone()).await.unwrap();
    let mut cold = JoinSet::new();
    let mut client = server.client().await;
    // Each takes the encoder at least 50 ms.
    for i in 0..60 {
        let mut request = tonic::Request::new(page(vec![], long_films(&format!("cold-{i}"), 5)));
        request.set_timeout(PATIENCE);
        let mut client = client.clone();
        cold.spawn(async move { client.get_mid_emb(request).await });
    }
    eventually("more requests wait for the encoder than may be in flight", async || {
        server.scrape().sum("midemb_encoding_requests", &[]) > 20.0
    })
    .await;
    for _ in 0..50 {
        let answer = client.get_mid_emb(hot.clone()).await.expect("a hot request was turned away").into_inner();
        assert_eq!(statuses(&answer), ["OK"; 50]);
    }
    assert!(server.scrape().sum("midemb_encoding_requests", &[]) > 0.0, "the cold requests ended before the hot ones");
    cold.abort_all();
}

/// Of a request that finds too many waiting for the encoder, the rows that need no encoder are answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_may_not_wait_for_the_encoder_gets_its_hot_rows() {
    let server = Server::start_with(&shipped(), &format!("{ONE_CPU_THREAD}\nlimits.max_encoding = 1"));
    let mut client = server.client().await;
    client.get_mid_emb(page(vec![], films("c", 2))).await.unwrap();
    let mut busy = client.clone();
    let waiting = tokio::spawn(async move { busy.get_mid_emb(page(vec![], long_films("slow", 100))).await });
    eventually("one waits", async || server.scrape().sum("midemb_encoding_requests", &[]) == 1.0).await;
    let mixed = page(vec![], [films("c", 2), films("new", 1)].concat());
    assert_eq!(statuses(&client.get_mid_emb(mixed).await.unwrap().into_inner()), ["OK", "OK", "FAILED"]);
    let cold: GetMidEmbRequest = page(vec![], films("newer", 2));
    let refused = client.get_mid_emb(cold).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.message(), "overloaded: too many requests wait for the encoder");
    let scrape = server.scrape();
    assert_eq!(scrape.sum("midemb_shed_total", &["reason=\"encoding\""]), 3.0);
    assert_eq!(scrape.sum("midemb_rows_total", &["status=\"shed\""]), 1.0);
    assert_eq!(scrape.sum("midemb_rows_total", &["status=\"failed\""]), 0.0);
    waiting.abort();
}
