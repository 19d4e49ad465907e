//! SIGTERM: accepted calls are answered, later calls are not accepted, and the process ends with exit code 0.
//!
//! While a test waits for a log line it blocks its thread, and a drain needs clients that go on meanwhile. So these tests run
//! on two threads.

use crate::harness::{
    ONE_CPU_THREAD, PATIENCE, Server, call_slowly, config, eventually, films, fixture, long_films, midemb, page,
    send_signal, shipped, statuses,
};
use midemb_client::proto::WarmItemsRequest;
use std::{
    error::Error,
    io::{BufRead, BufReader},
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_in_flight_are_answered_after_sigterm() {
    let server = Server::start_with(&shipped(), "");
    // One connection per call, as ranking services have them. Every message is held back until the server drains.
    let mut calls = Vec::new();
    for i in 0..12 {
        let (send, message) = mpsc::channel(1);
        let call = tokio::spawn(call_slowly(server.channel().await, message, Some(PATIENCE)));
        calls.push((call, send, page(films("h", 4), films(&format!("page-{i}"), 12))));
    }
    eventually("twelve calls wait for their messages", async || server.scrape().n_receiving() == 12.0).await;
    server.signal("TERM");
    server.wait_for_log("draining");
    assert_eq!(server.get("/readyz"), (503, "draining\n".to_owned()));
    for (call, send, request) in calls {
        send.send(request).await.unwrap();
        drop(send);
        let answer = call.await.unwrap().expect("an accepted request was lost");
        assert_eq!(statuses(&answer), ["OK"; 12]);
    }
    server.wait_for_log("stopped");
    assert!(server.wait().success());
}

/// Hot traffic while the signal arrives. Only the server can say which calls it accepted, because clients see their
/// connections end in many ways. A call whose message is held back keeps the server running until its counters are read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_loses_no_accepted_request() {
    let server = Server::start();
    let (send, message) = mpsc::channel(1);
    let held_back = tokio::spawn(call_slowly(server.channel().await, message, Some(PATIENCE)));
    let n_answered = Arc::new(AtomicUsize::new(0));
    let mut callers = Vec::new();
    for i in 0..8 {
        let mut client = server.client().await;
        let n_answered = Arc::clone(&n_answered);
        callers.push(tokio::spawn(async move {
            loop {
                match client.get_mid_emb(page(films("h", 8), films(&format!("{i}"), 50))).await {
                    Ok(answer) => assert_eq!(statuses(answer.get_ref()), ["OK"; 50]),
                    Err(status) => return status,
                }
                n_answered.fetch_add(1, Ordering::SeqCst);
            }
        }));
    }
    eventually("200 calls are answered", async || n_answered.load(Ordering::SeqCst) >= 200).await;
    server.signal("TERM");
    for caller in callers {
        let status = caller.await.unwrap();
        // A status that the server sent has no source. One with a source is the client's own: the call was not accepted.
        assert!(status.source().is_some(), "the server refused a call: {status:?}");
    }
    let scrape = server.scrape();
    let n_calls = |labels: &[&str]| scrape.sum("midemb_requests_total", labels);
    let n_answered = n_answered.load(Ordering::SeqCst) as f64;
    assert_eq!(n_calls(&["method=\"GetMidEmb\""]), n_answered, "accepted calls and answers that arrived differ");
    assert_eq!(n_calls(&["code=\"OK\""]), n_answered);

    send.send(page(vec![], films("held-back", 3))).await.unwrap();
    drop(send);
    let answer = held_back.await.unwrap().expect("a call from before the signal was lost");
    assert_eq!(statuses(&answer), ["OK"; 3]);
    server.wait_for_log("stopped");
    assert!(server.wait().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_follows_the_server() {
    let server = Server::start();
    assert_eq!(server.get("/livez"), (200, "ok\n".to_owned()));
    assert_eq!(server.get("/readyz"), (200, "ready\n".to_owned()));
    assert_eq!(server.get("/nothing").0, 404);
    server.signal("INT");
    assert!(server.wait().success());
}

/// Streams that never end by themselves must not keep the server running: a health watch, and a warm-up that stays open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_streams_end_with_the_drain() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let server = Server::start();
    let watch = HealthCheckRequest { service: "midemb.v1.MidEmbService".to_owned() };
    let mut health = HealthClient::new(server.channel().await).watch(watch).await.unwrap().into_inner();
    assert_eq!(health.message().await.unwrap().unwrap().status, 1);

    let (sender, receiver) = mpsc::channel(1);
    sender.send(WarmItemsRequest { items: films("warm", 10) }).await.unwrap();
    let mut client = server.client().await;
    let stream = ReceiverStream::new(receiver);
    let warming = tokio::spawn(async move { client.warm_items(stream).await });
    eventually("the ten items are encoded", async || server.scrape().n_encoded() >= 10.0).await;
    server.signal("TERM");
    let ended = warming.await.unwrap().unwrap_err();
    assert_eq!((ended.code(), ended.message()), (Code::Unavailable, "not serving: draining"));
    assert_eq!(health.message().await.unwrap().unwrap().status, 2, "the health watch did not report NOT_SERVING");
    assert!(health.message().await.unwrap().is_none());
    server.wait_for_log("stopped");
    assert!(server.wait().success());
    drop(sender);
}

/// 2,000 items of `long_films` are at least 20 s of encoding, and a minute on most machines. No call waits for them any more,
/// so the server does not, either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_does_not_wait_for_an_encoder_queue_that_no_call_waits_for() {
    let server = Server::start_with(&shipped(), &format!("{ONE_CPU_THREAD}\nserver.drain_seconds = 3600"));
    let mut client = server.client().await;
    let mut n_floods = 0;
    eventually("1,500 texts are queued", async || {
        n_floods += 1;
        let mut flood = Request::new(page(vec![], long_films(&format!("flood-{n_floods}"), 2000)));
        flood.set_timeout(Duration::from_millis(500));
        // The call ends at its deadline, and its items stay queued.
        drop(client.get_mid_emb(flood).await);
        server.scrape().sum("midemb_queue_depth", &["queue=\"encoder\""]) >= 1500.0
    })
    .await;
    drop(client);
    server.signal("TERM");
    server.wait_for_log("stopped");
    assert!(server.wait().success());
}

/// Starts the server, sends SIGTERM after `n_lines` lines of its log, or after the line "serving", and waits for its end. Returns
/// the number of lines until then.
fn start_and_end(config: &Path, n_lines: usize) -> usize {
    let mut serve = midemb();
    let mut child = serve.arg("serve").arg("--config").arg(config).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let is_time = |(n, line): &(usize, String)| n + 1 == n_lines || line.contains("\"message\":\"serving\"");
    let (n, line) = lines.by_ref().enumerate().find(is_time).unwrap();
    send_signal(child.id(), "TERM");
    let last = lines.last().unwrap_or_default();
    let status = child.wait().unwrap();
    assert!(status.success(), "{status} after line {n}, {line}; the last line was {last}");
    n + 1
}

/// A loader thread that was inside ONNX Runtime while the process ran the library's destructors crashed one start of ten. ONNX
/// Runtime logs each step of its loading at the level debug, so the lines are moments all over the load.
#[test]
fn sigterm_while_a_bundle_loads_is_a_clean_end() {
    let (_folder, path) = config(&fixture(), "inference.threads = 4\ntelemetry.log_filter = \"debug\"");
    let n_lines = start_and_end(&path, usize::MAX);
    assert!(n_lines > 1000, "only {n_lines} lines: the library does not log its steps");
    for i in 1..=30 {
        start_and_end(&path, i * n_lines / 31);
    }
}
