//! A deadline is kept: what is ready is answered, what is not says so, and nothing that was begun is lost.

use crate::harness::{PATIENCE, Server, call_slowly, films, fixture, ids, page, shipped, statuses};
use std::time::{Duration, Instant};
use tonic::{Code, Request};

fn within(
    request: midemb_client::proto::GetMidEmbRequest,
    timeout: Duration,
) -> Request<midemb_client::proto::GetMidEmbRequest> {
    let mut request = Request::new(request);
    request.set_timeout(timeout);
    request
}

/// The shipped encoder needs milliseconds an item, so 500 cold ones are seconds of work for one thread.
#[tokio::test]
async fn cold_rows_miss_the_deadline_warm_ones_do_not_and_later_all_are_there() {
    let server = Server::start_with(&shipped(), "inference.threads = 1");
    let mut client = server.client().await;
    client.get_mid_emb(within(page(vec![], films("warm", 4)), PATIENCE)).await.unwrap();

    let mut candidates = films("warm", 4);
    candidates.extend(films("cold", 500));
    let answer = client.get_mid_emb(within(page(vec![], candidates.clone()), Duration::from_millis(1500))).await;
    let answer = answer.unwrap().into_inner();
    let first = statuses(&answer);
    assert_eq!(first[..4], ["OK"; 4], "warm rows were lost");
    let n_late = first.iter().filter(|status| **status == "NOT_IN_TIME").count();
    assert!(n_late > 100, "only {n_late} of 500 cold rows were late");
    assert!(first.iter().all(|status| ["OK", "NOT_IN_TIME"].contains(status)), "{first:?}");

    // Nobody waits for what is left of that page: who comes now goes first.
    let live = client.get_mid_emb(within(page(vec![], films("live", 8)), PATIENCE)).await.unwrap().into_inner();
    assert_eq!(statuses(&live), ["OK"; 8]);
    let n_encoded = server.scrape().n_encoded();
    assert!(n_encoded < 400.0, "a live request waited for {n_encoded} items, most of them abandoned");

    // Somebody waits for it again: a page that comes after that, with less time, has no row ready.
    let (mut first, again) = (client.clone(), candidates.clone());
    let later = tokio::spawn(async move { first.get_mid_emb(within(page(vec![], again), PATIENCE)).await });
    while server.scrape().sum("midemb_cache_lookups_total", &["result=\"coalesced\""]) == 0.0 {
        tokio::task::yield_now().await;
    }
    let behind = within(page(vec![], films("behind", 20)), Duration::from_millis(500));
    assert_eq!(client.get_mid_emb(behind).await.unwrap_err().code(), Code::DeadlineExceeded);
    assert_eq!(statuses(&later.await.unwrap().unwrap().into_inner()), ["OK"; 504]);
    let behind = client.get_mid_emb(within(page(vec![], films("behind", 20)), PATIENCE)).await.unwrap().into_inner();
    assert_eq!(statuses(&behind), ["OK"; 20]);
    let scrape = server.scrape();
    assert_eq!(scrape.n_encoded(), 532.0, "what was begun was thrown away, or begun twice");
    assert_eq!(scrape.sum("midemb_rows_total", &["status=\"not_in_time\""]), n_late as f64);
    let expired = ["code=\"DEADLINE_EXCEEDED\"", "model=\"learn\""];
    assert_eq!(scrape.sum("midemb_requests_total", &expired), 1.0);
}

#[tokio::test]
async fn without_a_grpc_timeout_the_default_deadline_holds() {
    let server = Server::start_with(&shipped(), "limits.default_deadline_ms = 200");
    let start = Instant::now();
    let status = server.client().await.get_mid_emb(page(films("h", 80), films("cold", 2000))).await;
    // Either some rows were ready or none was; in no case did the caller wait for seconds of encoding.
    let took = start.elapsed();
    match status {
        Ok(answer) => assert!(statuses(answer.get_ref()).contains(&"NOT_IN_TIME")),
        Err(status) => assert_eq!(status.code(), Code::DeadlineExceeded),
    }
    assert!(took < Duration::from_secs(10), "took {took:?}");
}

/// Fifty milliseconds are a few items' worth of the shipped encoder. They are spent on items that the answer can still hold,
/// not on a full batch that comes too late (how many depends on the machine: `midemb bench w6-cold-page` says it), and the
/// rest is there for the next page.
#[tokio::test]
async fn a_cold_page_with_little_time_loses_nothing_for_the_next() {
    let server = Server::start_with(&shipped(), "inference.threads = 1");
    let mut client = server.client().await;
    // The encoder learns how fast it is.
    client.get_mid_emb(within(page(vec![], films("first", 40)), PATIENCE)).await.unwrap();
    let token_time = server.scrape().sum("midemb_stage_duration_seconds_sum", &["stage=\"encode\""])
        / server.scrape().sum("midemb_batch_tokens_sum", &[]);
    // Half of a full batch's time, on whatever machine this runs.
    let deadline = Duration::from_secs_f64(token_time * 256.0).max(Duration::from_millis(20));
    let cold = films("cold", 300);
    let answer = client.get_mid_emb(within(page(vec![], cold.clone()), deadline)).await;
    if let Ok(answer) = &answer {
        let first = statuses(answer.get_ref());
        assert!(first.contains(&"NOT_IN_TIME"), "{first:?}");
        assert!(first.iter().all(|status| ["OK", "NOT_IN_TIME"].contains(status)), "{first:?}");
    }
    let again = client.get_mid_emb(within(page(vec![], cold), PATIENCE)).await.unwrap().into_inner();
    assert_eq!(statuses(&again), ["OK"; 300]);
    assert_eq!(server.scrape().n_encoded(), 340.0, "an item was encoded twice, or not at all");
}

/// A caller that hangs up strands nobody: the next one finds what the first one began.
#[tokio::test]
async fn a_caller_that_leaves_loses_nothing_for_the_next_one() {
    let server = Server::start_with(&shipped(), "");
    let client = server.client().await;
    let mut leaver = client.clone();
    let call = tokio::spawn(async move { leaver.get_mid_emb(page(vec![], films("cold", 60))).await.map(drop) });
    while server.scrape().n_encoded() == 0.0 {
        tokio::task::yield_now().await;
    }
    call.abort();
    let request = within(page(vec![], films("cold", 60)), PATIENCE);
    let answer = client.clone().get_mid_emb(request).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 60]);
    let scrape = server.scrape();
    assert_eq!(scrape.n_encoded(), 60.0);
    assert_eq!(scrape.sum("midemb_requests_total", &["code=\"CANCELLED\""]), 1.0);
    assert_eq!(scrape.sum("midemb_in_flight_requests", &[]), 0.0);
}

#[tokio::test]
async fn more_requests_than_may_be_in_flight_are_shed_with_a_time_to_come_back() {
    use tonic_types::StatusExt;
    let server = Server::start_with(&shipped(), "limits.max_in_flight = 1");
    let client = server.client().await;
    let mut first = client.clone();
    let busy = tokio::spawn(async move { first.get_mid_emb(within(page(vec![], films("cold", 200)), PATIENCE)).await });
    while server.scrape().sum("midemb_in_flight_requests", &[]) == 0.0 {
        tokio::task::yield_now().await;
    }
    let shed = client.clone().get_mid_emb(page(vec![], films("other", 1))).await.unwrap_err();
    assert_eq!(shed.code(), Code::ResourceExhausted);
    assert!(shed.get_details_retry_info().unwrap().retry_delay.unwrap() > Duration::ZERO);
    assert_eq!(statuses(&busy.await.unwrap().unwrap().into_inner()), ["OK"; 200]);
    assert_eq!(server.scrape().sum("midemb_shed_total", &["reason=\"in_flight\""]), 1.0);
}

/// The encoder's queue holds 2,048 of the longest texts, some 12,000 short ones. What it cannot take is turned away at once and
/// counted, and hits are still served.
#[tokio::test]
async fn a_full_encoder_queue_turns_rows_away_and_still_serves_hits() {
    let server = Server::start_with(&shipped(), "inference.threads = 1");
    let mut client = server.client().await;
    client.get_mid_emb(within(page(vec![], films("warm", 1)), PATIENCE)).await.unwrap();
    for i in 0..9 {
        // Little of it is ready in time, if anything; all of it is queued, until the queue is full.
        let flood = page(vec![], films(&format!("flood-{i}"), 2000));
        drop(client.get_mid_emb(within(flood, Duration::from_millis(200))).await);
    }
    let mut more = films("more", 1999);
    more.extend(films("warm", 1));
    let second = client.get_mid_emb(within(page(vec![], more), Duration::from_secs(2))).await.unwrap().into_inner();
    let second = statuses(&second);
    assert_eq!(second[1999], "OK", "a hit was not served beside a full queue");
    let n_shed = second.iter().filter(|status| **status == "FAILED").count();
    assert!(n_shed > 500, "only {n_shed} rows were turned away");
    assert!(server.scrape().sum("midemb_shed_total", &["reason=\"encoder_queue\""]) >= n_shed as f64);
}

/// More than one thread can score within the deadline, at once, in requests that are all scoring and little else: who cannot be served is told so, and when to come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_is_answered_or_turned_away_and_the_next_request_is_served() {
    use tonic_types::StatusExt;
    let server = Server::start_with(&shipped(), "limits.max_in_flight = 10000\ninference.threads = 1");
    let mut client = server.client().await;
    let items = films("hot", 80);
    client.get_mid_emb(within(page(items.clone(), items.clone()), PATIENCE)).await.unwrap();
    let (items, candidates) = (ids(&items), ids(&items[..5]));
    let calls: Vec<_> = (0..1500)
        .map(|i| {
            // Every user is another one: the tower has to run for each.
            let mut history = items.clone();
            history.rotate_left(i % 80);
            history.swap(i / 80, 20 + i / 80);
            let request = within(page(history, candidates.clone()), Duration::from_millis(400));
            let mut client = client.clone();
            tokio::spawn(async move { client.get_mid_emb(request).await })
        })
        .collect();
    let (mut n_ok, mut n_shed) = (0.0, 0.0);
    for call in calls {
        match call.await.unwrap() {
            Ok(answer) => {
                assert_eq!(statuses(answer.get_ref()), ["OK"; 5]);
                n_ok += 1.0;
            }
            Err(status) if status.code() == Code::ResourceExhausted => {
                assert!(status.get_details_retry_info().unwrap().retry_delay.unwrap() >= Duration::from_millis(50));
                n_shed += 1.0;
            }
            // Its own timer was first, here or there.
            Err(status) => {
                assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
            }
        }
    }
    assert!(n_ok > 0.0 && n_shed > 0.0, "{n_ok} answered, {n_shed} turned away");
    // The answer to some that were turned away may have come after their own timer.
    assert!(server.scrape().sum("midemb_shed_total", &["reason=\"tower_queue\""]) >= n_shed);
    let next = client.get_mid_emb(within(page(vec![], items), PATIENCE)).await.unwrap().into_inner();
    assert_eq!(statuses(&next), ["OK"; 80]);
    assert_eq!(server.scrape().sum("midemb_in_flight_requests", &[]), 0.0);
}

/// A caller that never finishes its message holds a place among the requests in flight until its deadline, and no longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_never_ends_is_given_up_at_its_deadline() {
    let server = Server::start_with(&fixture(), "limits.max_in_flight = 1\nlimits.default_deadline_ms = 300");
    let (hold, held) = tokio::sync::mpsc::channel(1);
    let given_up = call_slowly(server.channel().await, held, None).await.unwrap_err();
    assert_eq!(given_up.code(), Code::DeadlineExceeded, "{given_up:?}");
    let mut client = server.client().await;
    let answer = client.get_mid_emb(within(page(vec![], films("c", 3)), PATIENCE)).await.unwrap().into_inner();
    assert_eq!(statuses(&answer), ["OK"; 3]);
    drop(hold);
}
