//! What the encoder's threads do next: a queue that makes batches of texts of like length.
//!
//! Jobs enter raw, are tokenized by whichever thread is free, and are then encoded in batches. A batch starts from the
//! oldest job of the highest priority and takes in the jobs nearest to it in length, so that little is padded, until
//! the token budget is used up. The budget shrinks to what can be encoded before the oldest job's caller stops waiting: a
//! full batch that is late answers nothing, half of one that is in time does. No timer waits for company: an idle thread
//! takes what is there, a busy one finds more.
//!
//! Invariants (property-tested): every job is handed out exactly once at each step; no batch is over its limits, nor longer
//! than its caller waits, unless it is a single job; requests go before warm-up; the oldest request is in the next batch, so
//! none starves. A job's priority may change while it waits: a request may join a warm-up, or run out of time.
//!
//! The queue's bound is not here: a job holds a place of `encoder`'s semaphore for as long as it lives.

use crate::{domain::Priority, inference::Pace};
use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// What the batcher has to know of a job.
pub trait Queued {
    /// Who waits for it. May change while it is queued.
    fn priority(&self) -> Priority;
    /// Its length; zero as long as it is raw.
    fn n_tokens(&self) -> usize;
    /// How long a request will still wait for it; zero where none does.
    fn time_left(&self) -> Duration;
}

/// How much one run of the encoder takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Items at most.
    pub max_items: usize,
    /// Items times the longest one's tokens at most.
    pub max_tokens: usize,
}

impl BatchLimits {
    /// What can surely be done of it in `time_left`. Where nobody waits (none is left) there is no hurry.
    fn within(self, time_left: Duration, token_time: Duration) -> Self {
        if time_left.is_zero() || token_time.is_zero() {
            return self;
        }
        let n_tokens = (time_left / SAFETY).as_nanos() / token_time.as_nanos();
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

/// So many raw jobs are tokenized in one go: long enough to be worth a lock, short enough that threads share the work.
const TOKENIZE_AT_ONCE: usize = 32;
/// A batch is cut to this part of the time that its oldest job has: one that is just too late is worth nothing, and what
/// time is left is good for another.
const SAFETY: u32 = 2;
/// A batch is chosen among so many of the oldest jobs: enough for like lengths, and the choice stays cheap.
const WINDOW: usize = 256;

/// The queue between requests and the encoder's threads.
#[derive(Debug)]
pub struct Batcher<J> {
    limits: BatchLimits,
    /// Of one token, padding included.
    pace: Pace,
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
                if let Some(work) = state.take(priority, self.limits, self.pace.average()) {
                    return Some(work);
                }
            }
            if state.closed {
                return None;
            }
            state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Learns how long the encoder takes.
    pub fn record(&self, n_tokens: usize, took: Duration) {
        if n_tokens > 0 {
            self.pace.record(took / n_tokens as u32);
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

    fn take(&mut self, priority: Priority, limits: BatchLimits, token_time: Duration) -> Option<Work<J>> {
        let (raw, tokenized) = (&mut self.raw[priority as usize], &self.tokenized[priority as usize]);
        let oldest = tokenized.front().or(raw.front())?;
        let in_time = limits.within(oldest.time_left(), token_time);
        // More to choose from than a batch looks at only delays the first one; in a hurry, like lengths matter less.
        let n_ahead = if in_time == limits { WINDOW } else { limits.max_items };
        if !raw.is_empty() && tokenized.len() < n_ahead {
            let n = raw.len().min(TOKENIZE_AT_ONCE);
            return Some(Work::Tokenize(raw.drain(..n).collect()));
        }
        let limits = in_time;
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
mod tests;
