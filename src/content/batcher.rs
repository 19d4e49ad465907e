//! What the encoder's threads do next: a queue that makes batches of texts of like length.
//!
//! Jobs enter raw, are tokenized by whichever thread is free, and are then encoded in batches. A batch starts from the
//! oldest job of the highest priority and takes in the jobs nearest to it in length, so that little is padded, until
//! the token budget is used up. No timer waits for company: an idle thread takes what is there, a busy one finds more.
//!
//! Invariants (property-tested): every job is handed out exactly once at each step; no batch is over its limits, unless it
//! is a single job; requests go before warm-up; the oldest request is in the next batch, so none starves. A job's priority
//! may change while it waits: a request may join a warm-up, or leave.
//!
//! The queue's bound is not here: a job holds a place of `encoder`'s semaphore for as long as it lives.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

/// Who waits for a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A request with a deadline.
    Request,
    /// Traffic to come.
    WarmUp,
}

/// What the batcher has to know of a job.
pub trait Queued {
    /// Who waits for it. May change while it is queued.
    fn priority(&self) -> Priority;
    /// Its length; zero as long as it is raw.
    fn n_tokens(&self) -> usize;
}

/// How much one run of the encoder takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Items at most.
    pub max_items: usize,
    /// Items times the longest one's tokens at most.
    pub max_tokens: usize,
}

/// What a thread does next.
#[derive(Debug)]
pub enum Work<J> {
    /// Tokenize these and give them back with [`Batcher::push_tokenized`].
    Tokenize(Vec<J>),
    /// Encode these in one run.
    Encode(Vec<J>),
}

/// So many raw jobs are tokenized in one go: long enough to be worth a lock, short enough that threads share the work.
const TOKENIZE_AT_ONCE: usize = 32;
/// A batch is chosen among so many of the oldest jobs: enough for like lengths, and the choice stays cheap.
const WINDOW: usize = 256;

/// The queue between requests and the encoder's threads.
#[derive(Debug)]
pub struct Batcher<J> {
    limits: BatchLimits,
    state: Mutex<State<J>>,
    more: Condvar,
}

#[derive(Debug)]
struct State<J> {
    raw: [VecDeque<J>; 2],
    tokenized: [VecDeque<J>; 2],
    closed: bool,
}

impl<J: Queued> Batcher<J> {
    /// An empty queue.
    pub fn new(limits: BatchLimits) -> Self {
        let state = State { raw: Default::default(), tokenized: Default::default(), closed: false };
        Batcher { limits, state: Mutex::new(state), more: Condvar::new() }
    }

    /// Queues raw jobs, oldest first.
    pub fn push(&self, jobs: Vec<J>) {
        let mut state = self.lock();
        for job in jobs {
            state.raw[job.priority() as usize].push_back(job);
        }
        self.more.notify_all();
    }

    /// Queues jobs that were tokenized.
    pub fn push_tokenized(&self, jobs: Vec<J>) {
        let mut state = self.lock();
        for job in jobs {
            state.tokenized[job.priority() as usize].push_back(job);
        }
        self.more.notify_all();
    }

    /// What to do next. Waits for work; `None` once the queue is closed and empty.
    pub fn next(&self) -> Option<Work<J>> {
        let mut state = self.lock();
        loop {
            state.refile();
            for priority in [Priority::Request, Priority::WarmUp] {
                if let Some(work) = state.take(priority, self.limits) {
                    return Some(work);
                }
            }
            if state.closed {
                return None;
            }
            state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more jobs will come. What is queued is still handed out.
    pub fn close(&self) {
        self.lock().closed = true;
        self.more.notify_all();
    }

    /// The state is only ever changed by moves of whole jobs, so a panic elsewhere cannot leave it half-changed.
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J: Queued> State<J> {
    /// Moves jobs whose priority has changed while they waited behind those that have it.
    fn refile(&mut self) {
        for queues in [&mut self.raw, &mut self.tokenized] {
            for (i, priority) in [Priority::Request, Priority::WarmUp].into_iter().enumerate() {
                if queues[i].iter().any(|job| job.priority() != priority) {
                    let (stay, moved) =
                        std::mem::take(&mut queues[i]).into_iter().partition(|job| job.priority() == priority);
                    queues[i] = stay;
                    let moved: VecDeque<J> = moved;
                    queues[1 - i].extend(moved);
                }
            }
        }
    }

    fn take(&mut self, priority: Priority, limits: BatchLimits) -> Option<Work<J>> {
        let raw = &mut self.raw[priority as usize];
        if !raw.is_empty() {
            let n = raw.len().min(TOKENIZE_AT_ONCE);
            return Some(Work::Tokenize(raw.drain(..n).collect()));
        }
        if self.tokenized[priority as usize].is_empty() {
            return None;
        }
        // Requests stand first in what is chosen among; room that they leave is filled with warm-up.
        let chosen = choose(self.tokenized.iter().flatten(), limits);
        Some(Work::Encode(remove(&mut self.tokenized, &chosen)))
    }
}

/// The places, in queue order, of the jobs of the next batch: the first one and those nearest to it in length.
fn choose<'a, J: Queued + 'a>(jobs: impl Iterator<Item = &'a J>, limits: BatchLimits) -> Vec<usize> {
    let mut by_length: Vec<(usize, usize)> =
        jobs.take(WINDOW).enumerate().map(|(place, job)| (job.n_tokens(), place)).collect();
    by_length.sort_unstable();
    let Some(seed) = by_length.iter().position(|(_, place)| *place == 0) else { return Vec::new() };
    let (mut first, mut last) = (seed, seed);
    let seed_length = by_length[seed].0;
    loop {
        let shorter = first.checked_sub(1).map(|i| seed_length - by_length[i].0);
        let longer = by_length.get(last + 1).map(|(length, _)| length - seed_length);
        let n_items = last - first + 2;
        let fits = |longest: usize| n_items <= limits.max_items && n_items * longest <= limits.max_tokens;
        match (shorter, longer) {
            (_, Some(gap)) if shorter.is_none_or(|s| gap <= s) && fits(seed_length + gap) => last += 1,
            (Some(_), _) if fits(by_length[last].0) => first -= 1,
            _ => break,
        }
    }
    let mut chosen: Vec<usize> = by_length[first..=last].iter().map(|(_, place)| *place).collect();
    chosen.sort_unstable();
    chosen
}

/// Takes the jobs at `places` (ascending, counted through both queues) out.
fn remove<J>(queues: &mut [VecDeque<J>; 2], places: &[usize]) -> Vec<J> {
    let n_requests = queues[0].len();
    let mut taken: Vec<J> = Vec::with_capacity(places.len());
    for place in places.iter().rev() {
        let (queue, i) = if *place < n_requests { (0, *place) } else { (1, place - n_requests) };
        taken.extend(queues[queue].remove(i));
    }
    taken.reverse();
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[derive(Debug, Clone, PartialEq)]
    struct Job {
        id: usize,
        warm_up: bool,
        length: usize,
        tokenized: bool,
    }

    impl Queued for Job {
        fn priority(&self) -> Priority {
            if self.warm_up { Priority::WarmUp } else { Priority::Request }
        }
        fn n_tokens(&self) -> usize {
            if self.tokenized { self.length } else { 0 }
        }
    }

    /// Runs the queue dry on one thread; returns the encoded batches.
    fn run_dry(batcher: &Batcher<Job>) -> Vec<Vec<Job>> {
        batcher.close();
        let mut batches = Vec::new();
        while let Some(work) = batcher.next() {
            match work {
                Work::Tokenize(mut jobs) => {
                    jobs.iter_mut().for_each(|job| job.tokenized = true);
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
            let new = |(id, (warm_up, length))| Job { id, warm_up, length, tokenized: false };
            let jobs: Vec<Job> = shapes.into_iter().enumerate().map(new).collect();
            batcher.push(jobs.clone());
            let batches = run_dry(&batcher);
            let mut seen = HashSet::new();
            let mut n_requests_left = jobs.iter().filter(|job| !job.warm_up).count();
            for batch in &batches {
                let longest = batch.iter().map(|job| job.length).max().unwrap_or(0);
                prop_assert!(batch.len() == 1 || batch.len() <= max_items && batch.len() * longest <= max_tokens);
                // A batch without a request may only come when no request is left.
                prop_assert!(n_requests_left == 0 || batch.iter().any(|job| !job.warm_up));
                n_requests_left -= batch.iter().filter(|job| !job.warm_up).count();
                for job in batch {
                    prop_assert!(seen.insert(job.id), "job {} twice", job.id);
                }
            }
            prop_assert_eq!(seen.len(), jobs.len());
        }

        #[test]
        fn the_oldest_request_is_in_the_next_batch(lengths in prop::collection::vec(1..100_usize, 1..100)) {
            let batcher = Batcher::new(BatchLimits { max_items: 4, max_tokens: 200 });
            let new = |(id, length)| Job { id, warm_up: false, length, tokenized: true };
            batcher.push_tokenized(lengths.into_iter().enumerate().map(new).collect());
            let mut left: Vec<usize> = Vec::new();
            for batch in run_dry(&batcher) {
                if left.is_empty() {
                    prop_assert_eq!(batch[0].id, 0);
                }
                left.extend(batch.iter().map(|job| job.id));
                let oldest_left = (0..).find(|id| !left.contains(id)).unwrap_or(0);
                prop_assert!(batch.iter().all(|job| job.id < oldest_left) || batch[0].id < oldest_left);
            }
        }
    }

    /// A job whose priority is changed from outside.
    struct Fickle(usize, std::sync::Arc<std::sync::atomic::AtomicBool>);

    impl Queued for Fickle {
        fn priority(&self) -> Priority {
            if self.1.load(std::sync::atomic::Ordering::SeqCst) { Priority::Request } else { Priority::WarmUp }
        }
        fn n_tokens(&self) -> usize {
            1
        }
    }

    #[test]
    fn a_job_that_somebody_has_come_to_wait_for_goes_first_and_one_that_was_left_goes_last() {
        let flags: Vec<_> = (0..4).map(|_| std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false))).collect();
        let set = |i: usize, wanted| flags[i].store(wanted, std::sync::atomic::Ordering::SeqCst);
        set(0, true);
        let batcher = Batcher::new(BatchLimits { max_items: 1, max_tokens: 1 });
        batcher.push_tokenized(flags.iter().cloned().enumerate().map(|(i, flag)| Fickle(i, flag)).collect());
        set(0, false);
        set(2, true);
        batcher.close();
        let mut order = Vec::new();
        while let Some(Work::Encode(batch)) = batcher.next() {
            order.extend(batch.iter().map(|job| job.0));
        }
        assert_eq!(order, [2, 1, 3, 0]);
    }

    #[test]
    fn like_lengths_share_a_batch() {
        let batcher = Batcher::new(BatchLimits { max_items: 3, max_tokens: 1000 });
        let new = |(id, length)| Job { id, warm_up: false, length, tokenized: true };
        batcher.push_tokenized([50, 9, 52, 10, 49, 11].into_iter().enumerate().map(new).collect());
        let lengths: Vec<Vec<usize>> =
            run_dry(&batcher).iter().map(|batch| batch.iter().map(|job| job.length).collect()).collect();
        assert_eq!(lengths, [vec![50, 52, 49], vec![9, 10, 11]]);
    }

    #[test]
    fn a_closed_queue_is_emptied_before_its_threads_end() {
        let batcher = std::sync::Arc::new(Batcher::new(BatchLimits { max_items: 1, max_tokens: 1 }));
        let waiting = {
            let batcher = batcher.clone();
            std::thread::spawn(move || run_dry(&batcher).len())
        };
        batcher.push_tokenized((0..10).map(|id| Job { id, warm_up: false, length: 1, tokenized: true }).collect());
        batcher.close();
        let n_here = run_dry(&batcher).len();
        assert_eq!(waiting.join().unwrap() + n_here, 10);
    }
}
