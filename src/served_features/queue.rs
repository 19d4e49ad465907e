//! The samples that wait for the writer, bounded in bytes.
//!
//! Whoever offers a sample holds the lock for a few assignments and never waits for the disk. The writer is woken once there is
//! enough for a row group and not for every sample, because waking a thread costs as much as half a sample.
//! The bytes of a sample count until it is written, so samples that the writer has taken cannot add to those that wait.

use super::sample::Sample;
use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    is_due: Condvar,
    max_bytes: usize,
    /// What the writer takes at once.
    batch_bytes: usize,
    /// How long a sample may wait for others to fill a batch.
    max_wait: Duration,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Waiting>,
    n_waiting_bytes: usize,
    /// Those of samples that wait, and of those that are being written.
    n_held_bytes: usize,
    has_ended: bool,
}

#[derive(Debug)]
struct Waiting {
    sample: Sample,
    n_bytes: usize,
    since: Instant,
}

/// Samples that are to be written together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// In the order in which they were offered. None if only files are due to be closed.
    pub(super) samples: Vec<Sample>,
    /// When the first one was offered.
    pub(super) since: Option<Instant>,
    /// What [`Queue::release`] has to be told once they are written.
    pub(super) n_bytes: usize,
    /// No more will come.
    pub(super) is_last: bool,
}

impl Queue {
    pub(super) fn new(max_bytes: usize, batch_bytes: usize, max_wait: Duration) -> Self {
        // A batch must leave room for what comes while it is written.
        let batch_bytes = batch_bytes.min(max_bytes / 4);
        Queue { state: Mutex::default(), is_due: Condvar::new(), max_bytes, batch_bytes, max_wait }
    }

    /// Adds a sample. False, and the sample is dropped, if there is no room for it or the queue has ended.
    pub(super) fn offer(&self, sample: Sample) -> bool {
        let n_bytes = sample.n_bytes();
        let mut state = self.lock();
        if state.has_ended || n_bytes > self.max_bytes - state.n_held_bytes {
            // After the lock, because dropping may free a large allocation.
            drop(state);
            return false;
        }
        let was_due = state.n_waiting_bytes >= self.batch_bytes;
        let is_first = state.waiting.is_empty();
        state.n_waiting_bytes += n_bytes;
        state.n_held_bytes += n_bytes;
        state.waiting.push_back(Waiting { sample, n_bytes, since: Instant::now() });
        let is_due = state.n_waiting_bytes >= self.batch_bytes;
        drop(state);
        // The writer also has to learn how long the first sample may wait.
        if is_first || (is_due && !was_due) {
            self.is_due.notify_one();
        }
        true
    }

    /// Waits for a batch: until enough samples wait, the first of them has waited long enough, the queue has ended, or it is
    /// `wake_at`.
    pub(super) fn take(&self, wake_at: Option<Instant>) -> Batch {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let first_due = state.waiting.front().map(|first| first.since + self.max_wait);
            let until = first_due.into_iter().chain(wake_at).min();
            let is_due = until.is_some_and(|until| until <= now);
            if is_due || state.has_ended || state.n_waiting_bytes >= self.batch_bytes {
                return self.take_some(&mut state);
            }
            state = match until {
                Some(until) => {
                    let (state, _timeout) =
                        self.is_due.wait_timeout(state, until - now).unwrap_or_else(PoisonError::into_inner);
                    state
                }
                None => self.is_due.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn take_some(&self, state: &mut State) -> Batch {
        let mut batch = Batch { since: state.waiting.front().map(|first| first.since), ..Batch::default() };
        while batch.n_bytes < self.batch_bytes {
            let Some(Waiting { sample, n_bytes, .. }) = state.waiting.pop_front() else { break };
            batch.n_bytes += n_bytes;
            batch.samples.push(sample);
        }
        state.n_waiting_bytes -= batch.n_bytes;
        batch.is_last = state.has_ended && state.waiting.is_empty();
        batch
    }

    /// Makes room for as many bytes, which were written or given up.
    pub(super) fn release(&self, n_bytes: usize) {
        self.lock().n_held_bytes -= n_bytes;
    }

    /// Takes no more samples. What waits is still handed out.
    pub(super) fn end(&self) {
        self.lock().has_ended = true;
        self.is_due.notify_one();
    }

    /// Samples that wait.
    pub(super) fn n_waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::stand_ins::page, *};
    use std::{sync::Arc, thread};

    const LONG: Duration = Duration::from_secs(3600);

    /// Room for `n` pages of 20 candidates, of which one is a batch where `n` is at most 4.
    fn queue(n: usize, batch_pages: usize) -> Queue {
        let n_bytes = page(0, 20).n_bytes();
        Queue::new(n * n_bytes, batch_pages * n_bytes, LONG)
    }

    fn requests(batch: &Batch) -> Vec<&str> {
        batch.samples.iter().map(|sample| sample.request.request_id.as_str()).collect()
    }

    #[test]
    fn what_waits_and_what_is_being_written_have_one_bound() {
        let queue = queue(4, 1);
        assert!((0..4).all(|_| queue.offer(page(0, 20))));
        assert!(!queue.offer(page(0, 20)), "the fifth page had room");
        let batch = queue.take(None);
        assert_eq!((batch.samples.len(), queue.n_waiting()), (1, 3));
        assert!(!queue.offer(page(0, 1)), "a page that is being written made room");
        queue.release(batch.n_bytes);
        assert!(queue.offer(page(0, 20)));
        assert!(!queue.offer(page(0, 20)));
    }

    #[test]
    fn a_sample_larger_than_the_queue_is_refused() {
        assert!(!queue(2, 1).offer(page(0, 200)));
    }

    #[test]
    fn a_batch_is_handed_out_once_it_is_full_in_the_order_of_the_samples() {
        let queue = Arc::new(queue(100, 3));
        let taking = Arc::clone(&queue);
        let taken = thread::spawn(move || requests(&taking.take(None)).join(" "));
        for i in 1..=4 {
            assert!(queue.offer(page(i, 20)));
        }
        assert_eq!(taken.join().unwrap(), "request-1 request-2 request-3");
        assert_eq!(queue.n_waiting(), 1);
    }

    #[test]
    fn a_sample_waits_no_longer_than_it_may() {
        let n_bytes = page(0, 20).n_bytes();
        let queue = Queue::new(100 * n_bytes, 50 * n_bytes, Duration::from_millis(1));
        assert!(queue.offer(page(5, 20)));
        let batch = queue.take(None);
        assert_eq!((requests(&batch), batch.is_last), (vec!["request-5"], false));
        let empty = queue.take(Some(Instant::now()));
        assert!(empty.samples.is_empty() && empty.since.is_none());
    }

    #[test]
    fn an_ended_queue_hands_out_the_rest_and_takes_no_more() {
        let queue = queue(8, 2);
        assert!((1..=3).all(|i| queue.offer(page(i, 20))));
        queue.end();
        assert!(!queue.offer(page(4, 1)));
        let (first, last) = (queue.take(None), queue.take(None));
        assert_eq!((requests(&first), first.is_last), (vec!["request-1", "request-2"], false));
        assert_eq!((requests(&last), last.is_last), (vec!["request-3"], true));
    }
}
