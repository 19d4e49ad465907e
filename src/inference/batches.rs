//! Jobs that a thread may run together.
//!
//! A job is added to the waiting jobs, and a task for it to the pool's queue. The thread that gets to such a task runs the
//! waiting jobs, oldest first, as many as the limits allow; a task that finds no job left does nothing. So batches form only
//! while threads are busy: no timer holds a job back to wait for others.
//!
//! Invariants (tested): every job is answered exactly once; there are at least as many tasks in the queue as waiting jobs, so
//! none is left behind; a job whose deadline has passed or whose caller has left is dropped before it joins a batch.

use super::{JobError, job::run_guarded};
use crate::telemetry::events::QueueStay;
use std::{
    collections::VecDeque,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::sync::oneshot;

/// The limits of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most jobs. At least one.
    pub max_jobs: usize,
    /// The largest sum of job sizes. A single job may exceed it.
    pub max_size: usize,
}

/// Runs jobs `J` on a state `S`. Must return one result per job, in order.
pub type RunTogether<S, J, T> = Box<dyn Fn(&mut S, Vec<J>) -> Vec<T> + Send + Sync>;

/// Jobs that wait to be run together.
pub struct Batches<S, J, T> {
    waiting: Mutex<VecDeque<Waiting<J, T>>>,
    limits: Limits,
    size: fn(&J) -> usize,
    run: RunTogether<S, J, T>,
}

/// A job that waits.
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
    /// Creates an empty collection. `size` returns the size of a job; `limits.max_size` limits their sum over a batch.
    pub fn new(limits: Limits, size: fn(&J) -> usize, run: RunTogether<S, J, T>) -> Self {
        Batches { waiting: Mutex::default(), limits, size, run }
    }

    /// Adds a job, if `queue_task` succeeds in queueing its task.
    pub(super) fn join(
        &self,
        waiting: Waiting<J, T>,
        queue_task: impl FnOnce() -> Result<(), JobError>,
    ) -> Result<(), JobError> {
        // The lock is held until the task is queued, so that no thread gets to the task before its job is there.
        let mut jobs = self.lock();
        if let Err(error) = queue_task() {
            waiting.stay.refuse();
            return Err(error);
        }
        jobs.push_back(waiting);
        Ok(())
    }

    /// Runs the next batch, if any job waits. Returns how many jobs it had.
    pub(super) fn run_next(&self, pool: &str, state: &mut S) -> u32 {
        let (jobs, replies): (Vec<J>, Vec<_>) = self.take().into_iter().unzip();
        let n_jobs = jobs.len();
        if n_jobs == 0 {
            return 0;
        }
        match run_guarded(pool, || (self.run)(state, jobs)) {
            Ok(results) => {
                let mut results = results.into_iter();
                for reply in replies {
                    let missing = || JobError::Panicked("a batch returned too few results".to_owned());
                    // Sending fails if the caller left while the batch ran.
                    let _ = reply.send(results.next().ok_or_else(missing));
                }
            }
            Err(error) => {
                for reply in replies {
                    let _ = reply.send(Err(error.clone()));
                }
            }
        }
        n_jobs as u32
    }

    /// Takes the oldest jobs whose callers still wait, as many as the limits allow.
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

    /// A poisoned lock is used as it is: the queue only changes by moving whole jobs, so a panic cannot leave it half-changed.
    fn lock(&self) -> MutexGuard<'_, VecDeque<Waiting<J, T>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
