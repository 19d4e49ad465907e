//! The Rust client against real servers: texts that are sent once, unknown items, several replicas and deadlines.

use crate::harness::{
    ONE_CPU_THREAD, PATIENCE, Server, call_slowly, eventually, films, fixture, ids, long_films, page, shipped, statuses,
};
use midemb_client::{Client, RetryPolicy, proto::FlushCacheRequest};
use std::time::Duration;
use tokio::sync::mpsc;

/// The number of rows that the server answered with the status `UNKNOWN_ITEM`.
fn n_unknown_rows(server: &Server) -> f64 {
    server.scrape().sum("midemb_rows_total", &["status=\"unknown_item\""])
}

#[tokio::test]
async fn an_item_that_the_server_has_forgotten_is_sent_again_with_its_text() {
    let server = Server::start();
    let client = Client::connect([server.grpc.as_str()]).await.unwrap();
    let request = page(films("h", 4), films("c", 20));
    let first = client.get_mid_emb(&request, PATIENCE).await.unwrap();
    let second = client.get_mid_emb(&request, PATIENCE).await.unwrap();
    assert_eq!((statuses(&second), &second.mid_emb), (vec!["OK"; 20], &first.mid_emb));
    assert_eq!(n_unknown_rows(&server), 0.0);

    let flush = FlushCacheRequest { cache: "known_items".to_owned() };
    server.admin().await.flush_cache(flush).await.unwrap();
    // The server no longer knows the ids. If the client sends ids alone, each candidate is unknown exactly once.
    let third = client.get_mid_emb(&request, PATIENCE).await.unwrap();
    assert_eq!((statuses(&third), &third.mid_emb), (vec!["OK"; 20], &first.mid_emb));
    assert_eq!(n_unknown_rows(&server), 20.0, "the client did not send ids alone before it sent texts");
}

#[tokio::test]
async fn only_unknown_candidates_are_requested_again_and_merged_into_the_response() {
    let server = Server::start();
    let client = Client::connect([server.grpc.as_str()]).await.unwrap();
    let request = page(films("h", 4), films("c", 20));
    let first = client.get_mid_emb(&request, PATIENCE).await.unwrap();
    let flush = FlushCacheRequest { cache: "known_items".to_owned() };
    server.admin().await.flush_cache(flush).await.unwrap();
    // Another caller makes the history and half of the candidates known again.
    let half = page(films("h", 4), films("c", 10));
    server.client().await.get_mid_emb(half).await.unwrap();
    let merged = client.get_mid_emb(&request, PATIENCE).await.unwrap();
    assert_eq!(statuses(&merged), ["OK"; 20]);
    assert_eq!((&merged.cvr, &merged.item_emb), (&first.cvr, &first.item_emb));
    assert_eq!(n_unknown_rows(&server), 10.0);
}

#[tokio::test]
async fn an_unknown_item_without_a_text_stays_unknown() {
    let server = Server::start();
    let client = Client::connect([server.grpc.as_str()]).await.unwrap();
    let response = client.get_mid_emb(&page(vec![], ids(&films("never-seen", 3))), PATIENCE).await.unwrap();
    assert_eq!(statuses(&response), ["UNKNOWN_ITEM"; 3]);
    assert_eq!(n_unknown_rows(&server), 3.0, "a row without a text was requested again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_spread_over_two_replicas_and_succeed_while_one_of_them_drains() {
    let servers = [Server::start(), Server::start()];
    let client = Client::connect(servers.iter().map(|server| server.grpc.as_str())).await.unwrap();
    let request = page(films("h", 4), films("c", 5));
    for _ in 0..40 {
        let response = client.get_mid_emb(&request, PATIENCE).await.unwrap();
        assert_eq!(statuses(&response), ["OK"; 5]);
    }
    let n_calls = |server: &Server| server.scrape().sum("midemb_requests_total", &["method=\"GetMidEmb\""]);
    let [drained, other] = servers;
    assert!(n_calls(&drained) > 0.0 && n_calls(&other) > 0.0, "a replica received no calls");
    assert_eq!(n_calls(&drained) + n_calls(&other), 40.0, "a call was sent twice");
    // A call whose message is held back keeps the replica draining while the client makes further calls.
    let (sender, message) = mpsc::channel(1);
    let held_back = tokio::spawn(call_slowly(drained.channel().await, message, Some(PATIENCE)));
    eventually("a call waits for its message", async || drained.scrape().n_receiving() == 1.0).await;
    drained.signal("TERM");
    drained.wait_for_log("draining");
    for _ in 0..20 {
        let response = client.get_mid_emb(&request, PATIENCE).await.unwrap();
        assert_eq!(statuses(&response), ["OK"; 5]);
    }
    sender.send(request.clone()).await.unwrap();
    drop(sender);
    let response = held_back.await.unwrap().expect("an accepted request was lost");
    assert_eq!(statuses(&response), ["OK"; 5]);
    assert!(drained.wait().success());
    for _ in 0..20 {
        let response = client.get_mid_emb(&request, PATIENCE).await.unwrap();
        assert_eq!(statuses(&response), ["OK"; 5]);
    }
}

#[tokio::test]
async fn warmed_items_are_encoded_by_every_replica() {
    let servers = [Server::start(), Server::start()];
    let client = Client::connect(servers.iter().map(|server| server.grpc.as_str())).await.unwrap();
    let warmed = client.warm_items(films("warm", 100)).await;
    assert!(warmed.iter().all(|warmed| warmed.result.as_ref().is_ok_and(|counts| counts.encoded == 100)), "{warmed:?}");
    for server in &servers {
        assert_eq!(server.scrape().n_encoded(), 100.0);
    }
}

/// Encoding 300 items of `long_films` takes at least 3 s, and the server's own default deadline is one minute here.
#[tokio::test]
async fn the_deadline_of_a_call_is_sent_to_the_server() {
    let server = Server::start_with(&shipped(), ONE_CPU_THREAD);
    let client = Client::builder([server.grpc.as_str()]).retry(RetryPolicy::NEVER).connect().await.unwrap();
    let mut candidates = films("warm", 4);
    client.get_mid_emb(&page(vec![], candidates.clone()), PATIENCE).await.unwrap();
    candidates.extend(long_films("cold", 300));
    // Some rows are ready, so the server answers in time, but only if it knows the deadline.
    let response = client.get_mid_emb(&page(vec![], candidates), Duration::from_millis(700)).await.unwrap();
    assert!(statuses(&response).contains(&"NOT_IN_TIME"), "300 items were encoded in 0.7 s");
    assert!(server.scrape().sum("midemb_rows_total", &["status=\"not_in_time\""]) > 0.0);
}

#[tokio::test]
async fn connecting_fails_with_the_address_if_no_replica_is_reachable_but_one_of_two_is_enough() {
    let error = Client::connect(["127.0.0.1:1"]).await.unwrap_err();
    assert!(error.to_string().contains("cannot connect to 127.0.0.1:1"), "{error}");
    let server = Server::start_with(&fixture(), "");
    let client = Client::connect(["127.0.0.1:1", server.grpc.as_str()]).await.unwrap();
    let info = client.get_model_info(PATIENCE).await.unwrap();
    assert_eq!(info.models.len(), 1);
}
