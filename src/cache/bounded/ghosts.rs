//! The ghost queue of S3-FIFO: hashes of entries that were evicted while on probation.

use foldhash::fast::RandomState;
use std::collections::{HashSet, VecDeque};

/// Remembers the hashes of a limited number of evicted entries. Forgets the oldest first.
#[derive(Default)]
pub(super) struct GhostQueue {
    hashes: HashSet<u32, RandomState>,
    /// Oldest first. May hold hashes that are no longer in `hashes`, because their entries returned.
    order: VecDeque<u32>,
}

impl GhostQueue {
    /// Half of the hash is enough: if two entries share it, one of them merely stays longer than it should.
    fn shorten(hash: u64) -> u32 {
        (hash >> 8) as u32
    }

    /// Remembers an evicted entry and forgets the oldest ones until at most `max` are left.
    pub(super) fn add(&mut self, hash: u64, max: usize) {
        let short = Self::shorten(hash);
        if self.hashes.insert(short) {
            self.order.push_back(short);
        }
        while self.order.len() > max {
            if let Some(oldest) = self.order.pop_front() {
                self.hashes.remove(&oldest);
            }
        }
    }

    /// Forgets an entry that has returned. Returns whether it was remembered.
    pub(super) fn take(&mut self, hash: u64) -> bool {
        self.hashes.remove(&Self::shorten(hash))
    }
}
