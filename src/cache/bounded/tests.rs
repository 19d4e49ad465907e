//! The limit holds, eviction spares what is read, and in any order of calls a read returns what was inserted.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// A cache in which each value is its own weight.
fn cache(max_bytes: u64) -> BoundedCache<u64, u64> {
    BoundedCache::new(CacheName::Item, max_bytes, |_, bytes| *bytes)
}

fn get(cache: &BoundedCache<u64, u64>, key: u64) -> Option<u64> {
    cache.read(&key, |value| *value)
}

#[test]
fn the_limit_holds_in_bytes_and_the_newest_entry_can_be_read() {
    let cache = cache(10_000);
    for key in 0..100_000 {
        cache.insert(key, 1 + key % 20);
        assert!(cache.contains(&key), "the newest entry was evicted");
        let contents = cache.measure();
        assert!(contents.n_bytes <= 10_000 && contents.max_bytes == 10_000, "{contents:?}");
    }
    let contents = cache.measure();
    assert!(contents.n_bytes > 9_900, "the space is not used: {contents:?}");
    assert_eq!(cache.flush(), contents.n_entries);
    assert_eq!((cache.measure().n_entries, cache.measure().n_bytes), (0, 0));
    assert!(!cache.contains(&99_999));
}

#[test]
fn the_limit_of_a_large_cache_holds_over_all_its_shards() {
    let cache = cache(64 << 20);
    for key in 0..200_000 {
        cache.insert(key, 1000);
    }
    let contents = cache.measure();
    assert!(contents.n_bytes <= 64 << 20 && contents.n_bytes > 63 << 20, "{contents:?}");
    let keys: Vec<u64> = (0..200_000).collect();
    let mut n_found = 0;
    cache.read_many(&keys, |_, value| n_found += u64::from(value.is_some()));
    assert_eq!(n_found, contents.n_entries);
}

#[test]
fn entries_that_are_read_survive_a_flood_of_entries_that_are_not() {
    let cache = cache(10_000);
    for key in 0..100 {
        cache.insert(key, 10);
    }
    for round in 0..100 {
        for key in 0..100 {
            assert!(get(&cache, key).is_some(), "{key} was evicted although it is read all the time");
        }
        for i in 0..600 {
            cache.insert(1_000 + 600 * round + i, 10);
        }
    }
}

#[test]
fn an_unread_entry_stays_for_one_round() {
    let cache = cache(1000);
    for key in 0..100 {
        cache.insert(key, 10);
    }
    cache.insert(1000, 10);
    assert!(!cache.contains(&0), "the oldest entry was not evicted first");
    for key in 1001..1099 {
        cache.insert(key, 10);
    }
    assert!(cache.contains(&1000), "a new entry was evicted before older ones");
    cache.insert(1099, 10);
    cache.insert(1100, 10);
    assert!(!cache.contains(&1000));
}

#[test]
fn an_entry_larger_than_the_cache_displaces_all_others() {
    let cache = cache(1000);
    for key in 0..10 {
        cache.insert(key, 100);
    }
    cache.insert(10, 5000);
    assert_eq!((cache.measure().n_entries, get(&cache, 10)), (1, Some(5000)));
    cache.insert(11, 10);
    assert_eq!((cache.measure().n_bytes, get(&cache, 11)), (10, Some(10)));
}

#[test]
fn an_entry_that_outgrows_the_cache_displaces_all_others() {
    for is_in_main in [false, true] {
        let cache = cache(1000);
        cache.insert(0, 100);
        if is_in_main {
            assert_eq!(get(&cache, 0), Some(100));
            for key in 1..20 {
                cache.insert(key, 100);
            }
            assert!(cache.contains(&0));
        }
        for key in 100..105 {
            cache.insert(key, 10);
        }
        cache.insert(0, 5000);
        assert_eq!((cache.measure().n_entries, get(&cache, 0)), (1, Some(5000)), "in the main queue: {is_in_main}");
        cache.insert(1, 10);
        assert_eq!((cache.measure().n_bytes, get(&cache, 1)), (10, Some(10)));
    }
}

#[test]
fn an_entry_that_returns_soon_after_its_eviction_stays_longer_than_a_new_one() {
    let cache = cache(1000);
    // These fill the main queue, whose length is the number of evicted hashes that are remembered.
    for key in 0..100 {
        cache.insert(key, 10);
    }
    for key in 0..100 {
        assert!(get(&cache, key).is_some());
    }
    for key in 100..200 {
        cache.insert(key, 10);
    }
    assert!(!cache.contains(&150));
    cache.insert(150, 10);
    for key in 200..250 {
        cache.insert(key, 10);
    }
    assert!(cache.contains(&150), "an entry that returned was evicted again");
    assert!(!cache.contains(&200), "a new, unread entry stayed as long");
}

#[test]
fn entries_inserted_ahead_wait_for_their_readers_and_displace_none_that_are_read() {
    let cache = cache(1000);
    let read_all = |keys: std::ops::Range<u64>| keys.filter(|key| get(&cache, *key).is_some()).count();
    for key in 0..100 {
        cache.insert(key, 10);
    }
    // Half of the entries are read again and again.
    for _ in 0..3 {
        assert_eq!(read_all(0..50), 50);
    }
    for key in 100..135 {
        cache.insert_ahead(key, 10);
    }
    for key in 200..230 {
        cache.insert(key, 10);
    }
    assert_eq!((read_all(100..135), read_all(0..50)), (35, 50));
}

#[test]
fn keys_are_listed_by_heat_without_counting_a_use() {
    let cache = cache(1000);
    for key in 0..5 {
        cache.insert_ahead(key, 10);
    }
    for key in 10..15 {
        cache.insert(key, 10);
    }
    for (key, n_reads) in [(3, 1), (1, 2), (0, 2), (12, 3), (10, 1)] {
        for _ in 0..n_reads {
            assert!(get(&cache, key).is_some());
        }
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
fn a_spared_entry_is_hotter_than_older_ones_even_when_the_join_counter_wraps() {
    for first_join in [0, u32::MAX - 95] {
        let cache = cache(1000);
        cache.shared.n_joins.store(first_join, Ordering::Relaxed);
        for key in 0..100 {
            cache.insert_ahead(key, 10);
        }
        assert!(get(&cache, 0).is_some() && get(&cache, 1).is_some());
        // The first two in the queue are spared, which costs them their use; the third is evicted.
        cache.insert_ahead(100, 10);
        let keys = cache.hottest_keys();
        assert_eq!((&keys[..4], keys.len()), ([100, 1, 0, 99].as_slice(), 100));
        assert_eq!(keys.last(), Some(&3));
    }
}

#[test]
fn the_bookkeeping_of_a_slot_fits_in_one_word() {
    assert_eq!(size_of::<Slot<[u8; 32], Arc<[f32]>>>(), size_of::<([u8; 32], Arc<[f32]>)>() + 8);
}

#[test]
fn the_keys_of_all_shards_are_sorted_together() {
    let cache = cache(64 << 20);
    for key in 0..20_000 {
        cache.insert_ahead(key, 100);
    }
    assert!(cache.shared.shards.len() > 1);
    assert!(cache.hottest_keys().into_iter().eq((0..20_000).rev()));
}

#[test]
fn no_key_that_stays_is_missed_while_others_come_and_go() {
    let cache = cache(64 << 10);
    for key in 0..1000 {
        cache.insert_ahead(key, 1);
    }
    std::thread::scope(|scope| {
        // No key is inserted twice: one remembered as evicted would join the main queue and in time displace the first keys.
        scope.spawn(|| {
            for i in 0..200_000 {
                cache.insert(1000 + i, 16);
            }
        });
        for _ in 0..50 {
            let mut keys = cache.hottest_keys();
            keys.sort_unstable();
            assert!(keys.iter().all(|key| *key < 201_000));
            assert!(keys.iter().take_while(|key| **key < 1000).copied().eq(0..1000), "a key that stayed was missed");
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
                    for key in keys {
                        cache.insert(key, [key + 1000 * round; 4]);
                    }
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
    /// Compares the cache with a map that never evicts: a value that is found is the newest one, keys are read in order, and
    /// the counts of bytes and entries are those of the entries that can be found.
    #[test]
    fn a_read_returns_the_newest_value_or_none(calls in calls()) {
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
                    let mut read = Vec::new();
                    cache.read_many(&keys, |i, value| read.push((i, value.copied())));
                    prop_assert_eq!(read.len(), keys.len());
                    for (i, (index, value)) in read.into_iter().enumerate() {
                        prop_assert_eq!(i, index);
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
