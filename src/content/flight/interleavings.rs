//! Loom runs the real flights and the real cache under every interleaving of their threads.
//!
//! Covered: the order of steps in [`Flights`], [`Flight`] and [`Ticket`]; loom reports a caller that is never answered as a deadlock.
//! Not covered: dashmap and tokio's `watch`, which `stand_ins` replaces, the deadlines, and more than two callers.

use super::*;
use crate::{
    cache::CacheName,
    domain::{EncoderDigest, TextDigest},
};
use loom::thread;
use std::{
    pin::pin,
    sync::atomic::AtomicUsize,
    task::{Context, Waker},
};

const KEY: ContentKey = ContentKey { part: EncoderDigest::from_bytes([1; 16]), text: TextDigest::from_bytes([2; 16]) };

/// What the callers of one scenario share.
struct Scene {
    flights: Flights,
    cache: VectorCache<ContentKey>,
    /// How many callers lead now.
    n_leading: AtomicUsize,
    /// How many callers have ever led.
    n_led: AtomicUsize,
}

impl Scene {
    fn new() -> Arc<Self> {
        let cache = VectorCache::new(CacheName::Content, 1 << 10);
        Arc::new(Scene {
            flights: Flights::default(),
            cache,
            n_leading: AtomicUsize::new(0),
            n_led: AtomicUsize::new(0),
        })
    }

    /// Joins or opens the flight for [`KEY`], as `Contents` does. Fails if two callers lead at the same time.
    fn board(&self) -> Boarding {
        if let Some(ticket) = self.flights.follow(&KEY, None) {
            return Boarding::Followed(ticket);
        }
        let boarding = self.flights.board(KEY, None, &self.cache);
        if let Boarding::Led(..) = boarding {
            assert_eq!(self.n_leading.fetch_add(1, Ordering::SeqCst), 0, "two callers lead at the same time");
            self.n_led.fetch_add(1, Ordering::SeqCst);
        }
        boarding
    }

    fn finish(&self, flight: Flight, ending: Ending) {
        self.n_leading.fetch_sub(1, Ordering::SeqCst);
        match ending {
            Ending::Landed => flight.land(vector()),
            Ending::Dropped => drop(flight),
        }
    }

    /// Asks for the vector as a caller does, and finishes the flight if this caller leads it.
    fn call(&self, ending: Ending) -> Content {
        match self.board() {
            Boarding::Cached(vector) => Content::Cached(vector),
            Boarding::Followed(ticket) => wait(ticket),
            Boarding::Led(flight, ticket) => {
                self.finish(flight, ending);
                wait(ticket)
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Ending {
    Landed,
    Dropped,
}

fn vector() -> Vector {
    vec![0.5; 4].into()
}

fn wait(mut ticket: Ticket) -> Content {
    {
        let settled = pin!(ticket.settled());
        let poll = settled.poll(&mut Context::from_waker(Waker::noop()));
        assert!(poll.is_ready(), "the stand-in blocks its thread until it is ready");
    }
    ticket.content()
}

/// Runs two callers at the same time and returns what they got.
fn call_twice(scene: &Arc<Scene>, ending: Ending) -> [Content; 2] {
    let other = {
        let scene = Arc::clone(scene);
        thread::spawn(move || scene.call(ending))
    };
    let content = scene.call(ending);
    [content, other.join().unwrap()]
}

#[test]
fn a_flight_that_lands_answers_every_caller_and_nobody_leads_again() {
    loom::model(|| {
        let scene = Scene::new();
        for content in call_twice(&scene, Ending::Landed) {
            assert!(content.vector().is_some(), "{content:?}");
        }
        assert_eq!(scene.n_led.load(Ordering::SeqCst), 1, "the second leader should have found the cache full");
        assert!(scene.cache.contains(&KEY));
        assert!(scene.flights.follow(&KEY, None).is_none(), "the flight is still in the table");
    });
}

#[test]
fn a_flight_that_is_dropped_fails_for_every_caller_and_leaves_no_trace() {
    loom::model(|| {
        let scene = Scene::new();
        for content in call_twice(&scene, Ending::Dropped) {
            assert!(matches!(content, Content::Failed), "{content:?}");
        }
        assert!(!scene.cache.contains(&KEY), "a failure was cached");
        assert!(scene.flights.follow(&KEY, None).is_none(), "the flight is still in the table");
    });
}

#[test]
fn a_sleeping_follower_is_woken_by_either_ending() {
    for ending in [Ending::Landed, Ending::Dropped] {
        loom::model(move || {
            let scene = Scene::new();
            let Boarding::Led(flight, _ticket) = scene.board() else { panic!("the first caller does not lead") };
            let Some(ticket) = scene.flights.follow(&KEY, None) else { panic!("there is no flight to follow") };
            let follower = thread::spawn(move || wait(ticket));
            scene.finish(flight, ending);
            let content = follower.join().unwrap();
            match ending {
                Ending::Landed => assert!(matches!(content, Content::Encoded(_)), "{content:?}"),
                Ending::Dropped => assert!(matches!(content, Content::Failed), "{content:?}"),
            }
        });
    }
}

#[test]
fn a_result_is_never_mistaken_for_a_failure() {
    loom::model(|| {
        let scene = Scene::new();
        let Boarding::Led(flight, ticket) = scene.board() else { panic!("the first caller does not lead") };
        let reader = thread::spawn(move || ticket.content());
        scene.finish(flight, Ending::Landed);
        let content = reader.join().unwrap();
        assert!(matches!(content, Content::Encoded(_) | Content::NotInTime), "{content:?}");
    });
}

#[test]
fn a_flight_that_has_landed_does_not_close_a_newer_one() {
    loom::model(|| {
        let scene = Scene::new();
        let Boarding::Led(flight, _ticket) = scene.board() else { panic!("the first caller does not lead") };
        let newer = {
            let scene = Arc::clone(&scene);
            thread::spawn(move || {
                // As if the vector were evicted at any moment.
                scene.cache.flush();
                scene.flights.board(KEY, None, &scene.cache)
            })
        };
        flight.land(vector());
        let newer = newer.join().unwrap();
        if let Boarding::Led(..) = newer {
            assert!(scene.flights.follow(&KEY, None).is_some(), "the newer flight was closed by the older one");
        }
    });
}
