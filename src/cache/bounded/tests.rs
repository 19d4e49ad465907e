//! The bound, who has to go, and whatever order of calls: the cache never says what was not put in.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// Values are their own weight.
fn cache(max_bytes: u64) -> BoundedCache<u64, u64> {
    BoundedCache::new(CacheName::Item, max_bytes, |_, bytes| *bytes)
}

fn get(cache: &BoundedCache<u64, u64>, key: u64) -> Option<u64> {
    cache.read(&key, |value| *value)
}

#[test]
fn the_bound_is_held_in_bytes_and_the_newest_entry_is_there() {
    let cache = cache(10_000);
    for key in 0..100_000 {
        cache.insert(key, 1 + key % 20);
        assert!(cache.contains(&key), "the newest entry was thrown away");
        let contents = cache.measure();
        assert!(contents.n_bytes <= 10_000 && contents.max_bytes == 10_000, "{contents:?}");
    }
    let contents = cache.measure();
    assert!(contents.n_bytes > 9_900, "room is not used: {contents:?}");
    assert_eq!(cache.flush(), contents.n_entries);
    assert_eq!((cache.measure().n_entries, cache.measure().n_bytes), (0, 0));
    assert!(!cache.contains(&99_999));
}

#[test]
fn a_large_cache_has_shards_and_holds_its_bound_over_all_of_them() {
    let cache = cache(64 << 20);
    (0..200_000).for_each(|key| cache.insert(key, 1000));
    let contents = cache.measure();
    assert!(contents.n_bytes <= 64 << 20 && contents.n_bytes > 63 << 20, "{contents:?}");
    let keys: Vec<u64> = (0..200_000).collect();
    let mut n_found = 0;
    cache.read_many(&keys, |_, value| n_found += u64::from(value.is_some()));
    assert_eq!(n_found, contents.n_entries);
}

#[test]
fn what_is_read_again_outlives_a_flood_of_what_is_not() {
    let cache = cache(10_000);
    (0..100).for_each(|key| cache.insert(key, 10));
    for round in 0..100 {
        for key in 0..100 {
            assert!(get(&cache, key).is_some(), "{key} was dropped although it is read all the time");
        }
        (0..600).for_each(|i| cache.insert(1_000 + 600 * round + i, 10));
    }
}

#[test]
fn an_entry_that_nobody_reads_stays_for_one_turn() {
    let cache = cache(1000);
    (0..100).for_each(|key| cache.insert(key, 10));
    cache.insert(1000, 10);
    assert!(!cache.contains(&0), "the oldest goes first");
    (1001..1099).for_each(|key| cache.insert(key, 10));
    assert!(cache.contains(&1000), "a new entry went before older ones");
    cache.insert(1099, 10);
    cache.insert(1100, 10);
    assert!(!cache.contains(&1000));
}

#[test]
fn an_entry_larger_than_the_cache_takes_its_place_alone() {
    let cache = cache(1000);
    (0..10).for_each(|key| cache.insert(key, 100));
    cache.insert(10, 5000);
    assert_eq!((cache.measure().n_entries, get(&cache, 10)), (1, Some(5000)));
    cache.insert(11, 10);
    assert_eq!((cache.measure().n_bytes, get(&cache, 11)), (10, Some(10)));
}

#[test]
fn an_entry_that_grows_makes_everything_else_go_and_stays() {
    for is_proven in [false, true] {
        let cache = cache(1000);
        cache.insert(0, 100);
        if is_proven {
            assert_eq!(get(&cache, 0), Some(100));
            (1..20).for_each(|key| cache.insert(key, 100));
            assert!(cache.contains(&0));
        }
        (100..105).for_each(|key| cache.insert(key, 10));
        cache.insert(0, 5000);
        assert_eq!((cache.measure().n_entries, get(&cache, 0)), (1, Some(5000)), "proven: {is_proven}");
        cache.insert(1, 10);
        assert_eq!((cache.measure().n_bytes, get(&cache, 1)), (10, Some(10)));
    }
}

#[test]
fn what_comes_back_soon_after_it_was_evicted_stays_longer_than_what_is_new() {
    let cache = cache(1000);
    // Entries that proved themselves: how many they are is how many hashes are remembered.
    (0..100).for_each(|key| cache.insert(key, 10));
    (0..100).for_each(|key| assert!(get(&cache, key).is_some()));
    (100..200).for_each(|key| cache.insert(key, 10));
    assert!(!cache.contains(&150));
    cache.insert(150, 10);
    (200..250).for_each(|key| cache.insert(key, 10));
    assert!(cache.contains(&150), "it came back, and was forgotten again");
    assert!(!cache.contains(&200), "something new that nobody read has stayed as long");
}

#[test]
fn what_is_put_in_ahead_of_its_readers_waits_for_them_and_displaces_nobody_who_is_read() {
    let cache = cache(1000);
    let read_all = |keys: std::ops::Range<u64>| keys.filter(|key| get(&cache, *key).is_some()).count();
    (0..100).for_each(|key| cache.insert(key, 10));
    // Half of what is there is asked for, again and again.
    (0..3).for_each(|_| assert_eq!(read_all(0..50), 50));
    (100..135).for_each(|key| cache.insert_ahead(key, 10));
    (200..230).for_each(|key| cache.insert(key, 10));
    assert_eq!((read_all(100..135), read_all(0..50)), (35, 50));
}

#[test]
fn keys_are_read_by_heat_and_reading_them_counts_no_use() {
    let cache = cache(1000);
    (0..5).for_each(|key| cache.insert_ahead(key, 10));
    (10..15).for_each(|key| cache.insert(key, 10));
    for (key, n_reads) in [(3, 1), (1, 2), (0, 2), (12, 3), (10, 1)] {
        (0..n_reads).for_each(|_| assert!(get(&cache, key).is_some()));
    }
    let by_heat = [1, 0, 3, 4, 2, 12, 10, 14, 13, 11];
    for _ in 0..9 {
        assert_eq!(cache.hottest_keys(), by_heat);
        let mut peeked = Vec::new();
        cache.peek_many(&[4, 99, 11], |i, value| peeked.push((i, value.copied())));
        assert_eq!(peeked, [(0, Some(10)), (1, None), (2, Some(10))]);
    }
    cache.flush();
    assert_eq!(cache.hottest_keys(), [0; 0]);
}

#[test]
fn what_was_spared_is_hotter_than_what_has_waited_longer_and_heat_outlives_the_count_of_turns() {
    for first_turn in [0, u32::MAX - 95] {
        let cache = cache(1000);
        cache.shared.turns.store(first_turn, Ordering::Relaxed);
        (0..100).for_each(|key| cache.insert_ahead(key, 10));
        assert!(get(&cache, 0).is_some() && get(&cache, 1).is_some());
        // The first in the queue are spared and lose the use that they were spared for; the third has to go.
        cache.insert_ahead(100, 10);
        let keys = cache.hottest_keys();
        assert_eq!((&keys[..4], keys.len()), ([100, 1, 0, 99].as_slice(), 100));
        assert_eq!(keys.last(), Some(&3));
    }
}

#[test]
fn what_an_entry_is_judged_by_fits_beside_it_in_one_word() {
    assert_eq!(size_of::<Slot<[u8; 32], Arc<[f32]>>>(), size_of::<([u8; 32], Arc<[f32]>)>() + 8);
}

#[test]
fn the_keys_of_all_shards_are_in_one_order() {
    let cache = cache(64 << 20);
    (0..20_000).for_each(|key| cache.insert_ahead(key, 100));
    assert!(cache.shared.shards.len() > 1);
    assert!(cache.hottest_keys().into_iter().eq((0..20_000).rev()));
}

#[test]
fn keys_are_gathered_while_others_come_and_go() {
    let cache = cache(64 << 10);
    (0..1000).for_each(|key| cache.insert_ahead(key, 1));
    std::thread::scope(|scope| {
        // No key comes twice: one that is remembered as evicted would join the main queue, and in time push out what stays.
        scope.spawn(|| (0..200_000_u64).for_each(|i| cache.insert(1000 + i, 16)));
        for _ in 0..50 {
            let mut keys = cache.hottest_keys();
            keys.sort_unstable();
            assert!(keys.iter().all(|key| *key < 201_000));
            assert!(keys.iter().take_while(|key| **key < 1000).copied().eq(0..1000), "what stayed was missed");
        }
    });
}

#[test]
fn readers_and_writers_of_many_threads_see_whole_entries() {
    let cache: BoundedCache<u64, [u64; 4]> = BoundedCache::new(CacheName::Item, 8 << 20, |_, _| 100);
    std::thread::scope(|scope| {
        for t in 0..4_u64 {
            let cache = &cache;
            scope.spawn(move || {
                for round in 0..2000 {
                    let keys: Vec<u64> = (0..50).map(|i| (t * 31 + round * 17 + i * 7) % 1000).collect();
                    cache.read_many(&keys, |i, value| {
                        assert!(value.is_none_or(|v| v.iter().all(|part| part % 1000 == keys[i] && *part == v[0])));
                    });
                    keys.iter().for_each(|key| cache.insert(*key, [key + 1000 * round; 4]));
                }
            });
        }
    });
    assert_eq!(cache.measure().n_entries, 1000);
}

#[derive(Debug, Clone)]
enum Call {
    Insert(u64, u64),
    Read(Vec<u64>),
    Flush,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = prop_oneof![
        8 => (0..40_u64, 1..60_u64).prop_map(|(key, value)| Call::Insert(key, value)),
        4 => prop::collection::vec(0..40_u64, 0..20).prop_map(Call::Read),
        1 => Just(Call::Flush),
    ];
    prop::collection::vec(call, 0..400)
}

proptest! {
    /// Against a map that forgets nothing: what is found is the newest value, keys are answered in order, and the books
    /// of bytes and entries are those of what can be found.
    #[test]
    fn it_never_answers_what_was_not_put_in(calls in calls()) {
        let cache = cache(400);
        let mut newest = HashMap::new();
        for call in calls {
            match call {
                Call::Insert(key, value) => {
                    cache.insert(key, value);
                    newest.insert(key, value);
                    prop_assert_eq!(get(&cache, key), Some(value));
                }
                Call::Read(keys) => {
                    let mut answered = Vec::new();
                    cache.read_many(&keys, |i, value| answered.push((i, value.copied())));
                    prop_assert_eq!(answered.len(), keys.len());
                    for (i, (place, value)) in answered.into_iter().enumerate() {
                        prop_assert_eq!(i, place);
                        prop_assert!(value.is_none() || value == newest.get(&keys[i]).copied());
                    }
                }
                Call::Flush => {
                    cache.flush();
                    newest.clear();
                }
            }
            let found: Vec<u64> = (0..40).filter_map(|key| get(&cache, key)).collect();
            let contents = cache.measure();
            prop_assert_eq!(contents.n_entries, found.len() as u64);
            prop_assert_eq!(contents.n_bytes, found.iter().sum::<u64>());
            prop_assert!(contents.n_bytes <= 400);
        }
    }
}
