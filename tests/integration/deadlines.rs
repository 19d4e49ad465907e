//! A deadline is kept: what is ready is answered, what is not says so, and nothing that was begun is lost.

use crate::harness::{PATIENCE, Server, films, page, shipped, statuses};
use std::time::{Duration, Instant};
use tonic::{Code, Request};

fn within(
    request: midemb::wire::proto::GetMidEmbRequest,
    timeout: Duration,
) -> Request<midemb::wire::proto::GetMidEmbRequest> {
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

    let none_ready =
        client.get_mid_emb(within(page(vec![], candidates[500..].to_vec()), Duration::from_millis(20))).await;
    assert_eq!(none_ready.unwrap_err().code(), Code::DeadlineExceeded);

    let later = client.get_mid_emb(within(page(vec![], candidates), PATIENCE)).await.unwrap().into_inner();
    assert_eq!(statuses(&later), ["OK"; 504]);
    let scrape = server.scrape();
    assert_eq!(scrape.n_encoded(), 504.0, "what was begun was thrown away, or begun twice");
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
