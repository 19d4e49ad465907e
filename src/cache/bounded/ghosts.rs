//! The ghost queue of S3-FIFO: hashes of entries that were evicted while on probation.

use foldhash::fast::RandomState;
use std::collections::{HashSet, VecDeque};

/// Remembers as many evicted entries as its owner allows, oldest forgotten first.
#[derive(Default)]
pub(super) struct GhostQueue {
    hashes: HashSet<u32, RandomState>,
    /// Oldest first. Some of them may have returned since and are no longer in `hashes`.
    order: VecDeque<u32>,
}

impl GhostQueue {
    /// Half of the hash is enough: if two entries share it, one of them stays for longer than it should.
    fn short(hash: u64) -> u32 {
        (hash >> 8) as u32
    }

    /// Remembers an evicted entry, and forgets the oldest ones until at most `max` are left.
    pub(super) fn add(&mut self, hash: u64, max: usize) {
        let short = Self::short(hash);
        if self.hashes.insert(short) {
            self.order.push_back(short);
        }
        while self.order.len() > max {
            if let Some(oldest) = self.order.pop_front() {
                self.hashes.remove(&oldest);
            }
        }
    }

    /// Forgets an entry that has returned; returns whether it was remembered.
    pub(super) fn take(&mut self, hash: u64) -> bool {
        self.hashes.remove(&Self::short(hash))
    }
}
