//! Jobs that a thread may run together.
//!
//! A job joins the others that wait and leaves a task of its own in the pool's queue. The thread that comes to such a task
//! takes what waits, oldest first and up to the limits; who comes after it and finds nothing goes on. So batches form
//! where threads are busy and nowhere else: no timer holds a job back for company.
//!
//! Invariants (tested): every job is answered exactly once; there are at least as many tasks in the queue as jobs that wait,
//! so none is left behind; a job whose deadline passed, or whose caller left, is dropped before it joins a batch.

use super::{JobError, job::run_guarded};
use crate::telemetry::events::QueueStay;
use std::{
    collections::VecDeque,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::sync::oneshot;

/// How much one run may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Jobs at most; at least one.
    pub max_jobs: usize,
    /// The sum of their sizes at most, unless it is a single job.
    pub max_size: usize,
}

/// Runs jobs `J` on a state `S`: as many results as there were jobs, in their order.
pub type RunTogether<S, J, T> = Box<dyn Fn(&mut S, Vec<J>) -> Vec<T> + Send + Sync>;

/// Jobs that wait to be run together.
pub struct Batches<S, J, T> {
    waiting: Mutex<VecDeque<Waiting<J, T>>>,
    limits: Limits,
    size: fn(&J) -> usize,
    run: RunTogether<S, J, T>,
}

/// One job that waits.
pub(super) struct Waiting<J, T> {
    pub(super) job: J,
    pub(super) deadline: Instant,
    pub(super) reply: oneshot::Sender<Result<T, JobError>>,
    pub(super) stay: QueueStay,
}

impl<S, J, T> fmt::Debug for Batches<S, J, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batches").field("limits", &self.limits).field("waiting", &self.lock().len()).finish()
    }
}

impl<S, J, T> Batches<S, J, T> {
    /// No job waits. `size` is what `limits.max_size` counts.
    pub fn new(limits: Limits, size: fn(&J) -> usize, run: RunTogether<S, J, T>) -> Self {
        Batches { waiting: Mutex::default(), limits, size, run }
    }

    /// Lets a job wait, if `queue_task` finds room for its task.
    pub(super) fn join(
        &self,
        waiting: Waiting<J, T>,
        queue_task: impl FnOnce() -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        // Locked until the task is queued: no thread may come to it before its job is there.
        let mut jobs = self.lock();
        if let Err(error) = queue_task() {
            waiting.stay.refuse();
            return Err(error);
        }
        jobs.push_back(waiting);
        Ok(())
    }

    /// Runs the next batch, if anything waits; returns how many jobs it had.
    pub(super) fn run_next(&self, pool: &str, state: &mut S) -> u32 {
        let (jobs, replies): (Vec<J>, Vec<_>) = self.take().into_iter().unzip();
        let n_jobs = jobs.len();
        if n_jobs == 0 {
            return 0;
        }
        let mut results = match run_guarded(pool, || (self.run)(state, jobs)) {
            Ok(results) => results.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => (0..n_jobs).map(|_| Err(error.clone())).collect::<Vec<_>>(),
        }
        .into_iter();
        for reply in replies {
            let missing = || Err(JobError::Panicked("a batch gave too few results".to_owned()));
            // Who asked may have left while the batch ran.
            let _ = reply.send(results.next().unwrap_or_else(missing));
        }
        n_jobs as u32
    }

    /// The oldest jobs that somebody still waits for, as many as one run may take.
    fn take(&self) -> Vec<(J, oneshot::Sender<Result<T, JobError>>)> {
        let (mut jobs, now) = (self.lock(), Instant::now());
        let (mut taken, mut size) = (Vec::new(), 0);
        while let Some(next) = jobs.front() {
            let next_size = (self.size)(&next.job);
            let is_late = next.deadline <= now;
            let fits =
                taken.is_empty() || taken.len() < self.limits.max_jobs && size + next_size <= self.limits.max_size;
            if !is_late && !next.reply.is_closed() && !fits {
                break;
            }
            let Some(Waiting { job, reply, stay, .. }) = jobs.pop_front() else { break };
            drop(stay);
            if reply.is_closed() {
                continue;
            }
            if is_late {
                let _ = reply.send(Err(JobError::Expired));
                continue;
            }
            size += next_size;
            taken.push((job, reply));
        }
        taken
    }

    /// What is locked is only ever changed by moves of whole jobs, so a panic elsewhere cannot leave it half-changed.
    fn lock(&self) -> MutexGuard<'_, VecDeque<Waiting<J, T>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
