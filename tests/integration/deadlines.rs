//! Deadlines: an answer holds the rows that are ready, says which rows are not, and loses no work that was begun.

use crate::harness::{
    ONE_CPU_THREAD, Server, call_slowly, eventually, films, fixture, ids, long_films, page, shipped, statuses,
};
use midemb_client::proto::{FlushCacheRequest, GetMidEmbRequest};
use std::time::Duration;
use tokio::task::JoinSet;
use tonic::{Code, Request};

/// The deadline of a call that has to be answered in full, on however slow a machine.
const NO_HURRY: Duration = Duration::from_secs(1800);

fn within(request: GetMidEmbRequest, timeout: Duration) -> Request<GetMidEmbRequest> {
    let mut request = Request::new(request);
    request.set_timeout(timeout);
    request
}

/// 120 items of `long_films` are at least 1.2 s of work: more than both short deadlines together.
#[tokio::test]
async fn cold_rows_miss_the_deadline_warm_rows_do_not_and_a_later_call_gets_all() {
    let server = Server::start_with(&shipped(), ONE_CPU_THREAD);
    let mut client = server.client().await;
    client.get_mid_emb(within(page(vec![], films("warm", 4)), NO_HURRY)).await.unwrap();

    let mut candidates = films("warm", 4);
    candidates.extend(long_films("cold", 120));
    let answer = client.get_mid_emb(within(page(vec![], candidates.clone()), Duration::from_millis(700))).await;
    let answer = answer.unwrap().into_inner();
    let first = statuses(&answer);
    assert_eq!(first[..4], ["OK"; 4], "a warm row missed the deadline");
    let n_late = first.iter().filter(|status| **status == "NOT_IN_TIME").count();
    assert!(n_late > 0, "the encoder did 1.2 s of work in 0.7 s");
    assert!(first.iter().all(|status| ["OK", "NOT_IN_TIME"].contains(status)), "{first:?}");

    // No request waits for the other rows of that page any more, so a new request goes before them.
    let live = client.get_mid_emb(within(page(vec![], films("live", 8)), NO_HURRY)).await.unwrap().into_inner();
    assert_eq!(statuses(&live), ["OK"; 8]);
    let n_encoded = server.scrape().n_encoded();
    assert!(n_encoded < 132.0, "a new request waited for all items of one that had ended");

    // Once a request waits for those rows again, they are encoded before those of a request that comes later.
    let (mut first, again) = (client.clone(), candidates.clone());
    let waiting = tokio::spawn(async move { first.get_mid_emb(within(page(vec![], again), NO_HURRY)).await });
    eventually("the second call joins the items that are queued", async || {
        server.scrape().sum("midemb_cache_lookups_total", &["result=\"coalesced\""]) > 0.0
    })
    .await;
    let behind = within(page(vec![], films("behind", 20)), Duration::from_millis(300));
    assert_eq!(client.get_mid_emb(behind).await.unwrap_err().code(), Code::DeadlineExceeded);
    assert_eq!(statuses(&waiting.await.unwrap().unwrap().into_inner()), ["OK"; 124]);
    let behind = client.get_mid_emb(within(page(vec![], films("behind", 20)), NO_HURRY)).await.unwrap().into_inner();
    assert_eq!(statuses(&behind), ["OK"; 20]);
    let scrape = server.scrape();
    assert_eq!(scrape.n_encoded(), 152.0, "an item was encoded twice, or not at all");
    assert_eq!(scrape.sum("midemb_rows_total", &["status=\"not_in_time\""]), n_late as f64);
    let expired = ["code=\"DEADLINE_EXCEEDED\"", "model=\"learn\""];
    assert_eq!(scrape.sum("midemb_requests_total", &expired), 1.0);
}

#[tokio::test]
async fn a_call_without_grpc_timeout_has_the_default_deadline() {
    let server = Server::start_with(&shipped(), &format!("{ONE_CPU_THREAD}\nlimits.default_deadline_ms = 200"));
    match server.client().await.get_mid_emb(page(vec![], long_films("cold", 300))).await {
        Ok(answer) => assert!(statuses(answer.get_ref()).contains(&"NOT_IN_TIME")),
        Err(status) => assert_eq!(status.code(), Code::DeadlineExceeded),
    }
    assert!(server.scrape().n_encoded() < 300.0, "the call was answered only when everything had been encoded");
}

/// In 50 ms the encoder finishes a few items at most. Whether the answer has some rows or none depends on the machine, but the
/// next call must find all the work that was begun, although nobody waited for it when it was done and the cache of content
/// embeddings is full.
#[tokio::test]
async fn a_cold_page_with_little_time_loses_nothing_for_the_next() {
    let server = Server::start_with(&shipped(), &format!("{ONE_CPU_THREAD}\ncache.content_mb = 1"));
    let mut client = server.client().await;
    // These fill the cache, and from them the encoder measures its pace, by which it cuts batches to the time that is left.
    client.get_mid_emb(within(page(vec![], films("first", 700)), NO_HURRY)).await.unwrap();
    assert!(server.scrape().sum("midemb_cache_evictions_total", &["cache=\"content\""]) > 0.0, "the cache is not full");
    let cold = long_films("cold", 60);
    match client.get_mid_emb(within(page(vec![], cold.clone()), Duration::from_millis(50))).await {
        Ok(answer) => {
            let first = statuses(answer.get_ref());
            assert!(first.contains(&"NOT_IN_TIME"), "{first:?}");
            assert!(first.iter().all(|status| ["OK", "NOT_IN_TIME"].contains(status)), "{first:?}");
        }
        // The client's own timer may be first.
        Err(status) => assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}"),
    }
    eventually("all items are encoded", async || server.scrape().n_encoded() >= 760.0).await;
    let again = client.get_mid_emb(within(page(vec![], cold), NO_HURRY)).await.unwrap().into_inner();
    assert_eq!(statuses(&again), ["OK"; 60]);
    assert_eq!(server.scrape().n_encoded(), 760.0, "an item was encoded twice, or not at all");
}

#[tokio::test]
async fn what_a_cancelled_call_began_is_there_for_the_next() {
    let server = Server::start_with(&shipped(), ONE_CPU_THREAD);
    let client = server.client().await;
    let mut first = client.clone();
    let call = tokio::spawn(async move { first.get_mid_emb(page(vec![], long_films("cold", 60))).await.map(drop) });
    eventually("the encoder begins", async || server.scrape().n_encoded() > 0.0).await;
    call.abort();
    let request = within(page(vec![], long_films("cold", 60)), NO_HURRY);
    let answer = client.clone().get_mid_emb(request).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 60]);
    let scrape = server.scrape();
    assert_eq!(scrape.n_encoded(), 60.0);
    assert_eq!(scrape.sum("midemb_requests_total", &["code=\"CANCELLED\""]), 1.0);
    assert_eq!(scrape.sum("midemb_in_flight_requests", &[]), 0.0);
}

/// Calls that are sent together overlap sooner or later, and only one may be in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_above_the_limit_in_flight_are_shed_with_a_retry_delay() {
    use tonic_types::StatusExt;
    let server = Server::start_with(&fixture(), "limits.max_in_flight = 1");
    let request = page(films("h", 20), films("c", 5000));
    server.client().await.get_mid_emb(within(request.clone(), NO_HURRY)).await.unwrap();
    let mut shed = None;
    eventually("a call is shed", async || {
        let mut calls = JoinSet::new();
        for _ in 0..16 {
            let (mut client, request) = (server.client().await, within(request.clone(), NO_HURRY));
            calls.spawn(async move { client.get_mid_emb(request).await });
        }
        let mut n_ok = 0;
        while let Some(answer) = calls.join_next().await {
            match answer.unwrap() {
                Ok(answer) => {
                    assert_eq!(statuses(&answer.into_inner()), ["OK"; 5000]);
                    n_ok += 1;
                }
                Err(status) => shed = Some(status),
            }
        }
        assert!(n_ok > 0, "all calls were shed: {shed:?}");
        shed.is_some()
    })
    .await;
    let shed = shed.unwrap();
    assert_eq!(shed.code(), Code::ResourceExhausted);
    assert!(shed.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
    assert!(server.scrape().sum("midemb_shed_total", &["reason=\"in_flight\""]) >= 1.0);
}

/// The encoder's queue holds 2,048 texts of the greatest length, or about 12,000 short ones.
#[tokio::test]
async fn a_full_encoder_queue_turns_rows_away_and_hits_are_still_served() {
    let server = Server::start_with(&shipped(), ONE_CPU_THREAD);
    let mut client = server.client().await;
    client.get_mid_emb(within(page(vec![], films("warm", 1)), NO_HURRY)).await.unwrap();
    let mut n_floods = 0;
    eventually("the encoder's queue is full", async || {
        n_floods += 1;
        let flood = page(vec![], films(&format!("flood-{n_floods}"), 2000));
        // The call ends at its deadline, and its items stay queued.
        drop(client.get_mid_emb(within(flood, Duration::from_millis(500))).await);
        server.scrape().sum("midemb_shed_total", &["reason=\"encoder_queue\""]) > 0.0
    })
    .await;
    let mut more = films("more", 1999);
    more.extend(films("warm", 1));
    let answer = client.get_mid_emb(within(page(vec![], more), Duration::from_secs(5))).await.unwrap().into_inner();
    let second = statuses(&answer);
    assert_eq!(second[1999], "OK", "a hit was not served while the queue was full");
    let n_shed = second.iter().filter(|status| **status == "FAILED").count();
    assert!(n_shed > 0, "no row was turned away");
    assert!(server.scrape().sum("midemb_shed_total", &["reason=\"encoder_queue\""]) >= n_shed as f64);
}

/// What became of the calls of one burst.
#[derive(Debug, Default)]
struct Burst {
    n_ok: u32,
    n_shed: u32,
}

/// 1,500 calls at once. Each is for a user with another history, so that the user tower runs for each.
async fn burst(server: &Server, deadline: Duration) -> Burst {
    use tonic_types::StatusExt;
    let client = server.client().await;
    let items = ids(&films("hot", 80));
    let calls: Vec<_> = (0..1500)
        .map(|i| {
            let mut history = items.clone();
            history.rotate_left(i % 80);
            history.swap(i / 80, 20 + i / 80);
            let request = within(page(history, items[..5].to_vec()), deadline);
            let mut client = client.clone();
            tokio::spawn(async move { client.get_mid_emb(request).await })
        })
        .collect();
    let mut burst = Burst::default();
    for call in calls {
        match call.await.unwrap() {
            Ok(answer) => {
                assert_eq!(statuses(answer.get_ref()), ["OK"; 5]);
                burst.n_ok += 1;
            }
            Err(status) if status.code() == Code::ResourceExhausted => {
                assert!(status.get_details_retry_info().unwrap().retry_delay.unwrap() >= Duration::from_millis(50));
                burst.n_shed += 1;
            }
            // The deadline passed, on the server or on the client.
            Err(status) => {
                assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
            }
        }
    }
    burst
}

/// How many calls a machine can score within a deadline is not known before, so the deadline is adjusted until a burst is more
/// than the server can do, and not too much for even one call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_is_answered_or_turned_away_and_the_next_request_is_served() {
    let server = Server::start_with(&shipped(), &format!("{ONE_CPU_THREAD}\nlimits.max_in_flight = 10000"));
    let mut client = server.client().await;
    let items = films("hot", 80);
    client.get_mid_emb(within(page(items.clone(), items.clone()), NO_HURRY)).await.unwrap();
    let mut deadline = Duration::from_millis(400);
    let mut n_shed = 0;
    eventually("one burst has calls that are answered and calls that are turned away", async || {
        server.admin().await.flush_cache(FlushCacheRequest { cache: "user".to_owned() }).await.unwrap();
        let burst = burst(&server, deadline).await;
        n_shed += burst.n_shed;
        if burst.n_ok == 0 {
            deadline *= 2;
        } else if burst.n_shed == 0 {
            deadline /= 2;
        }
        burst.n_ok > 0 && burst.n_shed > 0
    })
    .await;
    // Some calls that were turned away may have ended with the client's own timer, so the server can count more.
    assert!(server.scrape().sum("midemb_shed_total", &["reason=\"tower_queue\""]) >= f64::from(n_shed));
    let next = client.get_mid_emb(within(page(vec![], ids(&items)), NO_HURRY)).await.unwrap().into_inner();
    assert_eq!(statuses(&next), ["OK"; 80]);
    eventually("no call is in flight", async || server.scrape().sum("midemb_in_flight_requests", &[]) == 0.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_never_ends_gives_up_its_place_at_the_deadline() {
    let server = Server::start_with(&fixture(), "limits.max_in_flight = 1\nlimits.default_deadline_ms = 300");
    let (send, message) = tokio::sync::mpsc::channel(1);
    let given_up = call_slowly(server.channel().await, message, None).await.unwrap_err();
    assert_eq!(given_up.code(), Code::DeadlineExceeded, "{given_up:?}");
    let mut client = server.client().await;
    let answer = client.get_mid_emb(within(page(vec![], films("c", 3)), NO_HURRY)).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 3]);
    drop(send);
}
