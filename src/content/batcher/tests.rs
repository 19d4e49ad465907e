//! Every job is encoded once, requests first, similar lengths together, and no batch takes longer than its callers wait.

use super::*;
use proptest::prelude::*;
use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

#[derive(Debug, Clone, PartialEq)]
struct Job {
    id: usize,
    warm_up: bool,
    length: usize,
    tokenized: bool,
    time_left: Duration,
}

impl Job {
    /// A tokenized job of a request without a deadline.
    fn new(id: usize, length: usize) -> Self {
        Job { id, warm_up: false, length, tokenized: true, time_left: Duration::MAX }
    }
}

impl Queued for Job {
    fn priority(&self) -> Priority {
        if self.warm_up { Priority::WarmUp } else { Priority::Request }
    }
    fn n_tokens(&self) -> usize {
        if self.tokenized { self.length } else { 0 }
    }
    fn time_left(&self) -> Duration {
        self.time_left
    }
}

/// Works off the queue on one thread and returns the encoded batches.
fn drain(batcher: &Batcher<Job>) -> Vec<Vec<Job>> {
    batcher.close();
    let mut batches = Vec::new();
    while let Some(work) = batcher.next() {
        match work {
            Work::Tokenize(mut jobs) => {
                for job in &mut jobs {
                    job.tokenized = true;
                }
                batcher.push_tokenized(jobs);
            }
            Work::Encode(jobs) => batches.push(jobs),
        }
    }
    batches
}

proptest! {
    #[test]
    fn every_job_is_encoded_once_within_the_limits_and_requests_first(
        shapes in prop::collection::vec((any::<bool>(), 1..130_usize), 0..600),
        max_items in 1..40_usize,
        max_tokens in 1..1200_usize,
    ) {
        let limits = BatchLimits { max_items, max_tokens };
        let batcher = Batcher::new(limits);
        let new = |(id, (warm_up, length))| Job { warm_up, tokenized: false, ..Job::new(id, length) };
        let jobs: Vec<Job> = shapes.into_iter().enumerate().map(new).collect();
        batcher.push(jobs.clone());
        let batches = drain(&batcher);
        let mut seen = HashSet::new();
        let mut n_requests_left = jobs.iter().filter(|job| !job.warm_up).count();
        for batch in &batches {
            let longest = batch.iter().map(|job| job.length).max().unwrap_or(0);
            prop_assert!(batch.len() == 1 || batch.len() <= max_items && batch.len() * longest <= max_tokens);
            // A batch without a request is allowed only if no request is left.
            prop_assert!(n_requests_left == 0 || batch.iter().any(|job| !job.warm_up));
            n_requests_left -= batch.iter().filter(|job| !job.warm_up).count();
            for job in batch {
                prop_assert!(seen.insert(job.id), "job {} twice", job.id);
            }
        }
        prop_assert_eq!(seen.len(), jobs.len());
    }

    #[test]
    fn a_batch_finishes_before_its_oldest_caller_leaves_unless_it_is_a_single_job(
        jobs in prop::collection::vec((1..100_usize, 0..2000_u64), 1..100),
        token_us in 1..100_u64,
    ) {
        let batcher = Batcher::new(BatchLimits { max_items: 16, max_tokens: 512 });
        batcher.record(1, Duration::from_micros(token_us));
        let new = |(id, (length, left))| Job { time_left: Duration::from_micros(left), ..Job::new(id, length) };
        batcher.push_tokenized(jobs.iter().copied().enumerate().map(new).collect());
        let mut n_encoded = 0;
        let mut left: Vec<usize> = (0..jobs.len()).collect();
        for batch in drain(&batcher) {
            let oldest = left[0];
            let longest = batch.iter().map(|job| job.length).max().unwrap_or(0);
            let takes = Duration::from_micros(token_us * (batch.len() * longest) as u64);
            let waits = Duration::from_micros(jobs[oldest].1);
            prop_assert!(batch.len() == 1 || waits.is_zero() || takes <= waits, "{takes:?} of {waits:?}");
            n_encoded += batch.len();
            left.retain(|id| batch.iter().all(|job| job.id != *id));
        }
        prop_assert_eq!(n_encoded, jobs.len());
    }

    #[test]
    fn the_oldest_request_is_in_the_next_batch(lengths in prop::collection::vec(1..100_usize, 1..100)) {
        let batcher = Batcher::new(BatchLimits { max_items: 4, max_tokens: 200 });
        let new = |(id, length)| Job::new(id, length);
        batcher.push_tokenized(lengths.into_iter().enumerate().map(new).collect());
        let mut left: Vec<usize> = Vec::new();
        for batch in drain(&batcher) {
            if left.is_empty() {
                prop_assert_eq!(batch[0].id, 0);
            }
            left.extend(batch.iter().map(|job| job.id));
            let oldest_left = (0..).find(|id| !left.contains(id)).unwrap_or(0);
            prop_assert!(batch.iter().all(|job| job.id < oldest_left) || batch[0].id < oldest_left);
        }
    }
}

/// A job whose priority the test changes while it is queued.
struct SwitchableJob {
    id: usize,
    is_request: Arc<AtomicBool>,
}

impl Queued for SwitchableJob {
    fn priority(&self) -> Priority {
        if self.is_request.load(Ordering::SeqCst) { Priority::Request } else { Priority::WarmUp }
    }
    fn n_tokens(&self) -> usize {
        1
    }
    fn time_left(&self) -> Duration {
        Duration::ZERO
    }
}

#[test]
fn a_job_that_a_request_joins_goes_first_and_one_that_requests_left_goes_last() {
    let flags: Vec<_> = (0..4).map(|_| Arc::new(AtomicBool::new(false))).collect();
    let set = |i: usize, is_request| flags[i].store(is_request, Ordering::SeqCst);
    set(0, true);
    let batcher = Batcher::new(BatchLimits { max_items: 1, max_tokens: 1 });
    let new = |(id, is_request)| SwitchableJob { id, is_request };
    batcher.push_tokenized(flags.iter().cloned().enumerate().map(new).collect());
    set(0, false);
    set(2, true);
    batcher.close();
    let mut order = Vec::new();
    while let Some(Work::Encode(batch)) = batcher.next() {
        order.extend(batch.iter().map(|job| job.id));
    }
    assert_eq!(order, [2, 1, 3, 0]);
}

#[test]
fn encoding_starts_before_everything_is_tokenized_if_time_is_short() {
    for (time_left, n_expected) in [(Duration::from_millis(5), 32), (Duration::from_secs(5), 256)] {
        let batcher = Batcher::new(BatchLimits { max_items: 16, max_tokens: 512 });
        batcher.record(1, Duration::from_millis(1));
        let new = |id| Job { time_left, tokenized: false, ..Job::new(id, 4) };
        batcher.push((0..500).map(new).collect());
        let mut n_tokenized = 0;
        while let Some(Work::Tokenize(mut jobs)) = batcher.next() {
            n_tokenized += jobs.len();
            for job in &mut jobs {
                job.tokenized = true;
            }
            batcher.push_tokenized(jobs);
        }
        assert_eq!(n_tokenized, n_expected, "with {time_left:?} left");
    }
}

#[test]
fn jobs_of_similar_length_share_a_batch() {
    let batcher = Batcher::new(BatchLimits { max_items: 3, max_tokens: 1000 });
    let new = |(id, length)| Job::new(id, length);
    batcher.push_tokenized([50, 9, 52, 10, 49, 11].into_iter().enumerate().map(new).collect());
    let lengths: Vec<Vec<usize>> =
        drain(&batcher).iter().map(|batch| batch.iter().map(|job| job.length).collect()).collect();
    assert_eq!(lengths, [vec![50, 52, 49], vec![9, 10, 11]]);
}

#[test]
fn a_closed_queue_is_emptied_before_its_threads_end() {
    let batcher = Arc::new(Batcher::new(BatchLimits { max_items: 1, max_tokens: 1 }));
    let waiting = {
        let batcher = batcher.clone();
        std::thread::spawn(move || drain(&batcher).len())
    };
    batcher.push_tokenized((0..10).map(|id| Job::new(id, 1)).collect());
    batcher.close();
    let n_here = drain(&batcher).len();
    assert_eq!(waiting.join().unwrap() + n_here, 10);
}
