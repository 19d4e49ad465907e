//! Single flight: one leader per key, and every caller is answered.

use super::*;
use crate::{
    cache::CacheLimits,
    content::encoder::Batching,
    domain::{EncoderDigest, IdKey, ItemText, TextDigest, item_text::Template},
    inference::Provider,
};
use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

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
    let mut states = [ItemState::Led(ticket), ItemState::Followed(other), refuse(ShedReason::Encoding)];
    let settled = tokio::time::timeout_at(before + Duration::from_millis(50), wait_for_all(&mut states)).await;
    assert!(settled.is_err());
    assert_eq!(before.elapsed(), Duration::from_millis(50));
    let [late, in_time, shed] = states.map(ItemState::into_content);
    assert!(matches!(late, Content::NotInTime), "{late:?}");
    assert!(matches!(in_time, Content::Joined(_)), "a result behind a late one was lost: {in_time:?}");
    assert!(matches!(shed, Content::Shed(ShedReason::Encoding)));
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

/// Counts how often it is asked, and lets nobody in.
#[derive(Debug, Default)]
struct Closed(AtomicUsize);

impl EncoderGate for Closed {
    fn enter(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed);
        false
    }
}

/// An encoder without threads: what it is given stays in its queue.
fn idle_encoder() -> Encoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bundle/tokenizer.json");
    let tokenizer = Tokenizer::parse(&std::fs::read(&path).unwrap(), &path, 48).unwrap();
    let template = Template::new("{{ title }}").unwrap();
    let model = EncoderModel {
        template,
        tokenizer,
        pad_id: 0,
        dim: 4,
        batching: Batching::Together,
        digest: EncoderDigest::from_bytes([7; 16]),
    };
    Encoder::start(model, Vec::new(), Provider::Cpu).unwrap()
}

/// An item whose text had been forgotten took a place among those that wait for the encoder, or was reported as shed.
#[tokio::test(start_paused = true)]
async fn only_an_item_that_can_be_encoded_asks_the_gate() {
    let (contents, encoder, gate) = (contents(), idle_encoder(), Closed::default());
    let id = IdKey::from_bytes([0; 16]);
    let forgotten = |n: u8| KnownItem { id, digest: key(n).text, text: None };
    let known = KnownItem { text: Some(Arc::new(ItemText::titled("item 2"))), ..forgotten(2) };
    let (_flight, _ticket) = led(contents.flights.board(key(3), None, &contents.caches.contents));
    let embed = async |items: &[KnownItem]| {
        let until = Instant::now();
        contents.embed(&encoder, EmbedRequest { items, priority: Priority::Request, until, gate: &gate }).await
    };
    assert!(matches!(embed(&[forgotten(1)]).await[..], [Content::NoText]));
    assert_eq!(gate.0.load(Ordering::Relaxed), 0, "asked for an item that cannot be encoded");
    // The third one has no text, either, but it is being encoded for another call.
    let refused = embed(&[forgotten(1), known, forgotten(3)]).await;
    let encoding = |content: &Content| content.shed_reason() == Some(ShedReason::Encoding);
    assert!(matches!(refused[0], Content::NoText) && refused[1..].iter().all(encoding), "{refused:?}");
    assert_eq!(gate.0.load(Ordering::Relaxed), 2);
}

/// A warm-up waited without end for room in the queue of an encoder that was stuck.
#[tokio::test(start_paused = true)]
async fn a_warm_up_waits_for_room_no_longer_than_it_said() {
    let (contents, encoder) = (contents(), idle_encoder());
    let item = |n: usize| {
        let text = ItemText::titled(&format!("{n:0200}"));
        KnownItem { id: IdKey::from_bytes([0; 16]), digest: TextDigest::of(&text), text: Some(Arc::new(text)) }
    };
    let items: Vec<KnownItem> = (0..300).map(item).collect();
    let patience = Duration::from_secs(3600);
    let until = (tokio::time::Instant::now() + patience).into_std();
    let request = EmbedRequest { items: &items, priority: Priority::WarmUp, until, gate: &Open };
    let embedded = tokio::time::timeout(2 * patience, contents.embed(&encoder, request)).await.unwrap();
    assert!(embedded.iter().all(|content| matches!(content, Content::NotInTime)), "{embedded:?}");
    assert_eq!(embedded.len(), 300);
}
