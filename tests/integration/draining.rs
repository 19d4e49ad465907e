//! SIGTERM: what was accepted is answered, what comes later is not accepted, and the process ends well.
//!
//! A drain needs its clients to answer, so they run on threads of their own here while the test waits for log lines.

use crate::harness::{PATIENCE, Server, call_slowly, films, page, shipped, statuses};
use midemb_client::proto::WarmItemsRequest;
use std::{
    error::Error,
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
async fn requests_under_way_are_answered_after_sigterm() {
    let server = Server::start_with(&shipped(), "limits.default_deadline_ms = 60000");
    // One connection each, as ranking services have them.
    let mut calls = Vec::new();
    for i in 0..12 {
        let mut client = server.client().await;
        let request = page(films("h", 4), films(&format!("page-{i}"), 12));
        calls.push(tokio::spawn(async move { client.get_mid_emb(request).await }));
    }
    while server.scrape().sum("midemb_in_flight_requests", &[]) < 12.0 {
        tokio::task::yield_now().await;
    }
    server.signal("TERM");
    server.wait_for_log("draining");
    assert_eq!(server.get("/readyz"), (503, "draining\n".to_owned()));
    for call in calls {
        let answer = call.await.unwrap().expect("an accepted request was lost").into_inner();
        assert_eq!(statuses(&answer), ["OK"; 12]);
    }
    server.wait_for_log("stopped");
    assert!(server.wait().success());
}

/// Hot traffic over the moment of the signal. What was accepted is the server's to say, not the clients': they meet the end
/// of their connections in many ways. A call that is still being sent holds the drain open until the server was asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_loses_no_accepted_request() {
    let server = Server::start();
    let (hold, held) = mpsc::channel(1);
    let held = tokio::spawn(call_slowly(server.channel().await, held, Some(PATIENCE)));
    let n_answered = Arc::new(AtomicUsize::new(0));
    let mut loops = Vec::new();
    for i in 0..8 {
        let mut client = server.client().await;
        let n_answered = Arc::clone(&n_answered);
        loops.push(tokio::spawn(async move {
            loop {
                match client.get_mid_emb(page(films("h", 8), films(&format!("{i}"), 50))).await {
                    Ok(answer) => assert_eq!(statuses(answer.get_ref()), ["OK"; 50]),
                    Err(status) => return status,
                }
                n_answered.fetch_add(1, Ordering::SeqCst);
            }
        }));
    }
    while n_answered.load(Ordering::SeqCst) < 200 {
        tokio::task::yield_now().await;
    }
    server.signal("TERM");
    for call in loops {
        let status = call.await.unwrap();
        // A status that a server sent has no source: this one is the client's own, of a call that nobody took.
        assert!(status.source().is_some(), "the server refused a call: {status:?}");
    }
    let scrape = server.scrape();
    let n_calls = |labels: &[&str]| scrape.sum("midemb_requests_total", labels);
    let n_answered = n_answered.load(Ordering::SeqCst) as f64;
    assert_eq!(n_calls(&["method=\"GetMidEmb\""]), n_answered, "accepted calls and answers that arrived differ");
    assert_eq!(n_calls(&["code=\"OK\""]), n_answered);

    hold.send(page(vec![], films("held", 3))).await.unwrap();
    drop(hold);
    let answer = held.await.unwrap().expect("a call that came before the signal was lost");
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

/// What never ends by itself must not hold a drain: somebody who watches health, and an open stream of items.
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
    while server.scrape().n_encoded() < 10.0 {
        tokio::task::yield_now().await;
    }
    server.signal("TERM");
    let told = warming.await.unwrap().unwrap_err();
    assert_eq!((told.code(), told.message()), (Code::Unavailable, "not serving: draining"));
    assert_eq!(health.message().await.unwrap().unwrap().status, 2, "a watcher was not told NOT_SERVING");
    assert!(health.message().await.unwrap().is_none());
    server.wait_for_log("stopped");
    assert!(server.wait().success());
    drop(sender);
}

/// A minute of encoding that nobody waits for any more does not hold the end up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_with_a_full_encoder_queue_ends_at_once() {
    let server = Server::start_with(&shipped(), "inference.threads = 1\nserver.drain_seconds = 3600");
    let mut client = server.client().await;
    for i in 0..4 {
        let mut flood = Request::new(page(vec![], films(&format!("flood-{i}"), 2000)));
        flood.set_timeout(Duration::from_millis(100));
        // Whether any row of it was in time is not the point.
        drop(client.get_mid_emb(flood).await);
    }
    let n_queued = server.scrape().sum("midemb_queue_depth", &["queue=\"encoder\""]);
    assert!(n_queued > 4000.0, "only {n_queued} texts are queued");
    drop(client);
    server.signal("TERM");
    server.wait_for_log("stopped");
    assert!(server.wait().success());
}
