//! The queue of the encoder's threads, which forms batches of texts of similar length.
//!
//! Jobs enter raw, are tokenized by whichever thread is free, and are then encoded in batches. A batch starts from the oldest
//! job of the highest priority and takes the jobs nearest to it in length, so that there is little padding, until the token
//! budget is used up. The budget shrinks to what can be encoded before the caller of the oldest job stops waiting: a full batch
//! that is late answers nobody, half of it in time answers some. No timer holds jobs back to fill a batch: an idle thread takes
//! what is queued, and while threads are busy more jobs gather.
//!
//! Invariants (property-tested): every job is handed out exactly once for each step; no batch exceeds its limits or takes
//! longer than its oldest caller waits, unless it is a single job; requests go before warm-up; the oldest request is in the next
//! batch, so none starves. A job's priority may change while it waits: a request may join a warm-up job, or run out of time.
//!
//! The queue's length is not limited here: a job holds a permit of `encoder`'s semaphore until it is done.

use crate::{domain::Priority, inference::Pace};
use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// What the batcher must know about a job.
pub trait Queued {
    /// Who waits for the job. May change while it is queued.
    fn priority(&self) -> Priority;
    /// The number of tokens; 0 until it is tokenized.
    fn n_tokens(&self) -> usize;
    /// How long a request will still wait for the job; zero if none does.
    fn time_left(&self) -> Duration;
}

/// The limits of one run of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// The maximum number of items.
    pub max_items: usize,
    /// The maximum number of tokens, with every item counted as long as the longest one.
    pub max_tokens: usize,
}

impl BatchLimits {
    /// The part of the limits that can safely be encoded in `time_left`. If nobody waits (zero), there is no hurry.
    fn within(self, time_left: Duration, token_time: Duration) -> Self {
        if time_left.is_zero() || token_time.is_zero() {
            return self;
        }
        let n_tokens = (time_left / SAFETY_DIVISOR).as_nanos() / token_time.as_nanos();
        BatchLimits { max_tokens: self.max_tokens.min(n_tokens as usize), ..self }
    }
}

/// What a thread does next.
#[derive(Debug)]
pub enum Work<J> {
    /// Tokenize these and give them back with [`Batcher::push_tokenized`].
    Tokenize(Vec<J>),
    /// Encode these in one run.
    Encode(Vec<J>),
}

/// The most raw jobs that are tokenized together: enough to be worth taking the lock, few enough that threads share the work.
const TOKENIZE_AT_ONCE: usize = 32;
/// A batch may take one part in this many of the time that its oldest job has left. A batch that is slightly late is worth
/// nothing, and spare time serves the next one.
const SAFETY_DIVISOR: u32 = 2;
/// A batch is chosen from this many of the oldest jobs: enough to find similar lengths, few enough to choose quickly.
const WINDOW: usize = 256;

/// The queue between requests and the encoder's threads.
#[derive(Debug)]
pub struct Batcher<J> {
    limits: BatchLimits,
    /// The time per token, including padding.
    pace: Pace,
    state: Mutex<State<J>>,
    more: Condvar,
}

#[derive(Debug)]
struct State<J> {
    /// Indexed by priority.
    raw: [VecDeque<J>; 2],
    /// Indexed by priority.
    tokenized: [VecDeque<J>; 2],
    is_closed: bool,
}

impl<J: Queued> Batcher<J> {
    /// An empty queue.
    pub fn new(limits: BatchLimits) -> Self {
        let state = State { raw: Default::default(), tokenized: Default::default(), is_closed: false };
        Batcher { limits, pace: Pace::default(), state: Mutex::new(state), more: Condvar::new() }
    }

    /// Queues raw jobs, oldest first.
    pub fn push(&self, jobs: Vec<J>) {
        let mut state = self.lock();
        for job in jobs {
            state.raw[job.priority() as usize].push_back(job);
        }
        self.more.notify_all();
    }

    /// Queues tokenized jobs.
    pub fn push_tokenized(&self, jobs: Vec<J>) {
        let mut state = self.lock();
        for job in jobs {
            state.tokenized[job.priority() as usize].push_back(job);
        }
        self.more.notify_all();
    }

    /// The next work. Waits for jobs; returns `None` once the queue is closed and empty.
    pub fn next(&self) -> Option<Work<J>> {
        let mut state = self.lock();
        loop {
            state.refile();
            for priority in [Priority::Request, Priority::WarmUp] {
                if let Some(work) = state.take(priority, self.limits, self.pace.average()) {
                    return Some(work);
                }
            }
            if state.is_closed {
                return None;
            }
            state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Records how long the encoder took for `n_tokens`.
    pub fn record(&self, n_tokens: usize, took: Duration) {
        if n_tokens > 0 {
            self.pace.record(took / n_tokens as u32);
        }
    }

    /// Declares that no more jobs will come. Jobs that are queued are still handed out.
    pub fn close(&self) {
        self.lock().is_closed = true;
        self.more.notify_all();
    }

    /// A poisoned lock is used as it is: the state only changes by moving whole jobs, so a panic cannot leave it half-changed.
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J: Queued> State<J> {
    /// Moves each job whose priority has changed to the end of the other queue.
    fn refile(&mut self) {
        for queues in [&mut self.raw, &mut self.tokenized] {
            for priority in [Priority::Request, Priority::WarmUp] {
                let own = priority as usize;
                if queues[own].iter().all(|job| job.priority() == priority) {
                    continue;
                }
                let jobs = std::mem::take(&mut queues[own]).into_iter();
                let (unchanged, changed): (VecDeque<J>, VecDeque<J>) = jobs.partition(|job| job.priority() == priority);
                queues[own] = unchanged;
                queues[1 - own].extend(changed);
            }
        }
    }

    fn take(&mut self, priority: Priority, limits: BatchLimits, token_time: Duration) -> Option<Work<J>> {
        let (raw, tokenized) = (&mut self.raw[priority as usize], &self.tokenized[priority as usize]);
        let oldest = tokenized.front().or(raw.front())?;
        let in_time = limits.within(oldest.time_left(), token_time);
        // Tokenizing more than a batch can choose from only delays the batch. In a hurry, similar lengths matter less.
        let n_ahead = if in_time == limits { WINDOW } else { limits.max_items };
        if !raw.is_empty() && tokenized.len() < n_ahead {
            let n = raw.len().min(TOKENIZE_AT_ONCE);
            return Some(Work::Tokenize(raw.drain(..n).collect()));
        }
        let limits = in_time;
        // The chosen jobs are requests first; warm-up fills the room that they leave.
        let chosen = choose(self.tokenized.iter().flatten(), limits);
        Some(Work::Encode(remove(&mut self.tokenized, &chosen)))
    }
}

/// The positions, in ascending order, of the jobs of the next batch: the first job and those nearest to it in length.
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

/// Removes the jobs at `places`, which are ascending and counted through both queues.
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
mod tests;
