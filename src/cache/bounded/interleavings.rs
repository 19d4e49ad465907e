//! Loom runs the real cache under every interleaving of its threads.
//!
//! Covered: the shards' locks and the atomics, with one and with two shards; loom reports deadlocks. Not covered: more than three
//! threads. What a single thread does while it holds a lock is checked by `tests`.

use super::*;
use loom::thread;
use std::sync::LazyLock;

/// Loom replays executions, so all of them must compute the same hashes.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::default);

/// Both halves of a value are the same number, and every entry weighs 10.
type Cache = BoundedCache<u32, [u32; 2]>;

fn cache(max_bytes: u64) -> Cache {
    let mut cache = Cache::new(CacheName::Item, max_bytes, |_, _| 10);
    Arc::get_mut(&mut cache.shared).unwrap().hasher = HASHER.clone();
    cache
}

/// Reads `keys` together, checks that each entry is whole, and returns the values.
fn read_whole(cache: &Cache, keys: &[u32]) -> Vec<Option<u32>> {
    let mut values = Vec::new();
    cache.read_many(keys, |_, value| {
        assert!(value.is_none_or(|[left, right]| left == right), "{value:?} is half of one entry and half of another");
        values.push(value.map(|[left, _right]| *left));
    });
    values
}

/// Checks that the cache's counts are those of the entries that can be found.
fn assert_counts_add_up(cache: &Cache, keys: &[u32], max_bytes: u64) {
    let n_found = read_whole(cache, keys).into_iter().flatten().count() as u64;
    let usage = cache.measure();
    assert_eq!((usage.n_entries, usage.n_bytes), (n_found, n_found * 10));
    assert!(usage.n_bytes <= max_bytes, "{usage:?}");
}

#[test]
fn an_inserted_entry_can_be_read_immediately_while_others_insert_and_read() {
    loom::model(|| {
        let cache = cache(20);
        cache.insert(0, [0; 2]);
        let writers = [1, 2].map(|key| {
            let cache = cache.clone();
            thread::spawn(move || {
                cache.insert(key, [key; 2]);
                // The cache has room for both new entries, so only the old one may be evicted.
                assert_eq!(cache.read(&key, |value| *value), Some([key; 2]));
            })
        });
        for writer in writers {
            writer.join().unwrap();
        }
        assert_counts_add_up(&cache, &[0, 1, 2], 20);
    });
}

#[test]
fn readers_see_whole_entries_while_they_are_replaced_and_evicted() {
    loom::model(|| {
        let cache = cache(20);
        cache.insert(0, [0; 2]);
        let writer = {
            let cache = cache.clone();
            thread::spawn(move || {
                cache.insert(0, [100; 2]);
                cache.insert(1, [1; 2]);
                cache.insert(2, [2; 2]);
            })
        };
        let reader = {
            let cache = cache.clone();
            thread::spawn(move || {
                let values = read_whole(&cache, &[0, 1]);
                assert!([None, Some(0), Some(100)].contains(&values[0]) && [None, Some(1)].contains(&values[1]));
            })
        };
        writer.join().unwrap();
        reader.join().unwrap();
        assert_counts_add_up(&cache, &[0, 1, 2], 20);
    });
}

#[test]
fn two_readers_that_count_the_same_use_leave_a_valid_count() {
    loom::model(|| {
        let cache = cache(20);
        cache.insert(0, [0; 2]);
        let reader = {
            let cache = cache.clone();
            thread::spawn(move || {
                read_whole(&cache, &[0, 0]);
            })
        };
        read_whole(&cache, &[0, 0]);
        reader.join().unwrap();
        let shard = read_lock(&cache.shared.shards[0]);
        assert!((2..=MAX_USES).contains(&shard.slots[0].uses.load(Ordering::Relaxed)));
    });
}

#[test]
fn counts_add_up_after_a_flush_among_insertions() {
    loom::model(|| {
        let cache = cache(20);
        let writer = {
            let cache = cache.clone();
            thread::spawn(move || {
                cache.insert(0, [0; 2]);
                cache.insert_ahead(1, [1; 2]);
            })
        };
        let n_flushed = cache.flush();
        writer.join().unwrap();
        assert_counts_add_up(&cache, &[0, 1], 20);
        assert_eq!(cache.measure().n_entries, 2 - n_flushed);
    });
}

#[test]
fn threads_that_write_one_shard_and_read_two_do_not_deadlock() {
    loom::model(|| {
        let cache = cache(2 * MIN_SHARD_BYTES);
        assert_eq!(cache.shared.shards.len(), 2);
        let key_in = |shard: usize| (0..).find(|key: &u32| shard_of(HASHER.hash_one(key), 2) == shard).unwrap();
        let keys = [key_in(0), key_in(1)];
        let threads = [(keys[0], keys[1]), (keys[1], keys[0])].map(|(own, other)| {
            let cache = cache.clone();
            thread::spawn(move || {
                cache.insert(own, [own; 2]);
                let values = read_whole(&cache, &[own, other]);
                assert!(values[0] == Some(own) && [None, Some(other)].contains(&values[1]), "{values:?}");
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
        assert_counts_add_up(&cache, &keys, 2 * MIN_SHARD_BYTES);
    });
}
