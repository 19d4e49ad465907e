//! Single flight: one leader per key, and every caller is answered.

use super::*;
use crate::{
    cache::CacheLimits,
    domain::{EncoderDigest, ItemText, TextDigest},
};
use std::time::Duration;

fn contents() -> Contents {
    let bytes = 1 << 20;
    Contents::new(Arc::new(Caches::new(CacheLimits {
        content_bytes: bytes,
        item_bytes: bytes,
        user_bytes: bytes,
        known_items_bytes: bytes,
        max_text_bytes: 100,
    })))
}

fn key(n: u8) -> ContentKey {
    let text = TextDigest::of(&ItemText::titled(&format!("item {n}")));
    ContentKey { part: EncoderDigest::from_bytes([7; 16]), text }
}

fn led(boarding: Boarding) -> (flight::Flight, Ticket) {
    match boarding {
        Boarding::Led(flight, ticket) => (flight, ticket),
        Boarding::Cached(_) | Boarding::Followed(_) => panic!("expected to lead"),
    }
}

fn followed(boarding: Boarding) -> Ticket {
    match boarding {
        Boarding::Followed(ticket) => ticket,
        Boarding::Cached(_) | Boarding::Led(..) => panic!("expected to follow"),
    }
}

async fn arrived(mut ticket: Ticket) -> Content {
    ticket.settled().await;
    ticket.content()
}

#[tokio::test(start_paused = true)]
async fn one_flight_answers_every_caller_and_fills_the_cache() {
    let contents = contents();
    let (flight, leader) = led(contents.flights.board(key(1), None, &contents.caches.contents));
    let follower = followed(contents.flights.board(key(1), None, &contents.caches.contents));
    led(contents.flights.board(key(2), None, &contents.caches.contents));
    // The leading request leaves. Its flight belongs to the job, so the follower is still answered.
    drop(leader);
    flight.land(vec![0.5; 4].into());
    assert!(matches!(arrived(follower).await, Content::Encoded(v) if v[..] == [0.5; 4]));
    assert!(matches!(contents.flights.board(key(1), None, &contents.caches.contents), Boarding::Cached(_)));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_flight_fails_for_every_caller_and_the_next_caller_leads() {
    let contents = contents();
    let (flight, leader) = led(contents.flights.board(key(1), None, &contents.caches.contents));
    let follower = followed(contents.flights.board(key(1), None, &contents.caches.contents));
    drop(flight);
    assert!(matches!(arrived(leader).await, Content::Failed));
    assert!(matches!(arrived(follower).await, Content::Failed));
    assert!(!contents.caches.contents.contains(&key(1)), "a failure was cached");
    led(contents.flights.board(key(1), None, &contents.caches.contents));
}

#[tokio::test(start_paused = true)]
async fn a_caller_waits_until_its_deadline_and_the_late_result_is_cached() {
    let contents = contents();
    let (flight, ticket) = led(contents.flights.board(key(1), None, &contents.caches.contents));
    let (other_flight, other) = led(contents.flights.board(key(2), None, &contents.caches.contents));
    other_flight.land(vec![0.25; 4].into());
    let before = tokio::time::Instant::now();
    let mut states = [ItemState::Led(ticket), ItemState::Followed(other), ItemState::Shed];
    let settled = tokio::time::timeout_at(before + Duration::from_millis(50), wait_for_all(&mut states)).await;
    assert!(settled.is_err());
    assert_eq!(before.elapsed(), Duration::from_millis(50));
    let [late, in_time, shed] = states.map(ItemState::into_content);
    assert!(matches!(late, Content::NotInTime), "{late:?}");
    assert!(matches!(in_time, Content::Joined(_)), "a result behind a late one was lost: {in_time:?}");
    assert!(matches!(shed, Content::Shed));
    flight.land(vec![0.5; 4].into());
    assert!(contents.caches.contents.contains(&key(1)));
}

#[tokio::test(start_paused = true)]
async fn a_warm_up_has_priority_while_a_request_waits_for_it() {
    let contents = contents();
    let (flight, _ticket) = led(contents.flights.board(key(1), None, &contents.caches.contents));
    assert!(!flight.has_waiting_request());
    let in_an_hour = Some(Instant::now() + Duration::from_secs(3600));
    assert!(contents.flights.follow(&key(1), in_an_hour).is_some());
    assert!(flight.has_waiting_request(), "a joined request does not raise the priority");
    let (abandoned, _ticket) = led(contents.flights.board(key(2), Some(Instant::now()), &contents.caches.contents));
    assert!(!abandoned.has_waiting_request(), "a job that nobody waits for keeps its priority");
    assert!(contents.flights.follow(&key(3), in_an_hour).is_none());
}
