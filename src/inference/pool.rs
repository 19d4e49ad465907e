//! Inference threads: a bounded queue of jobs, each with a deadline, and threads that each own a state to run them on.
//!
//! Invariants:
//! - Every job is answered exactly once: with its result, or with the [`JobError`] that says why it has none.
//! - A job whose deadline has passed or whose caller has left is dropped before it runs.
//! - A panic fails only its own job, or the batch in which the job ran. The thread and its state go on.
//!
//! These jobs are for callers that wait. Work that must go on after its caller has left (encoding) is in `content::batcher`.

use super::{
    JobError, Pace,
    batches::{Batches, Waiting},
    job::run_guarded,
    queue::Queue,
};
use crate::telemetry::events::QueueStay;
use std::{
    fmt, io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

struct Task<S> {
    /// Returns how many jobs it ran. A job that has expired or whose caller has left does not count: it takes no time.
    run: Box<dyn FnOnce(&mut S) -> u32 + Send>,
    /// `None` for a job of a batch, which has a stay of its own.
    stay: Option<QueueStay>,
}

/// A group of threads that each own one `S`.
pub struct Pool<S> {
    name: &'static str,
    queue: Arc<Queue<Task<S>>>,
    n_threads: u32,
    pace: Arc<Pace>,
}

impl<S> fmt::Debug for Pool<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("name", &self.name).field("queued", &self.queue.len()).finish()
    }
}

impl<S: Send + 'static> Pool<S> {
    /// Starts one thread per state. At most `max_queued` jobs wait.
    ///
    /// The threads end once the pool is dropped and its queue is empty.
    pub fn start(name: &'static str, states: Vec<S>, max_queued: usize) -> io::Result<Self> {
        let n_threads = states.len() as u32;
        // If a thread cannot be started, the pool is dropped, which ends those that were started.
        let pool = Pool { name, queue: Arc::new(Queue::new(max_queued)), n_threads, pace: Arc::default() };
        for (i, state) in states.into_iter().enumerate() {
            let (tasks, pace) = (Arc::clone(&pool.queue), Arc::clone(&pool.pace));
            thread::Builder::new().name(format!("{name}-{i}")).spawn(move || work(&tasks, state, &pace))?;
        }
        Ok(pool)
    }

    /// How long a job that joined the queue now would wait for a thread, at the pace of the most recent jobs.
    pub fn expected_wait(&self) -> Duration {
        self.pace.average() * self.queue.len() as u32 / self.n_threads.max(1)
    }

    /// Runs `job` on one of the threads and waits for its result until `deadline`.
    ///
    /// Cancel-safe: if the caller leaves, its job is skipped, unless it is already running.
    pub async fn run<T: Send + 'static>(
        &self,
        deadline: Instant,
        job: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Result<T, JobError> {
        let (reply, answer) = oneshot::channel();
        let name = self.name;
        let run = Box::new(move |state: &mut S| {
            if reply.is_closed() {
                return 0;
            }
            let is_in_time = deadline > Instant::now();
            let result = if is_in_time { run_guarded(name, || job(state)) } else { Err(JobError::Expired) };
            // Sending fails if the caller left while the job ran.
            let _ = reply.send(result);
            is_in_time.into()
        });
        self.queue.push(Task { run, stay: Some(QueueStay::begin(name)) }).map_err(refused)?;
        wait(deadline, answer).await
    }

    /// Like [`Pool::run`], but a thread may run the job together with other jobs of `batches`.
    pub async fn run_together<J, T>(
        &self,
        batches: &Arc<Batches<S, J, T>>,
        deadline: Instant,
        job: J,
    ) -> Result<T, JobError>
    where
        J: Send + 'static,
        T: Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let waiting = Waiting { job, deadline, reply, stay: QueueStay::begin(self.name) };
        let (name, shared) = (self.name, Arc::clone(batches));
        let run = Box::new(move |state: &mut S| shared.run_next(name, state));
        batches.join(waiting, || self.queue.push(Task { run, stay: None }).map_err(refused))?;
        wait(deadline, answer).await
    }
}

impl<S> Drop for Pool<S> {
    fn drop(&mut self) {
        self.queue.close();
    }
}

fn refused<S>(task: Task<S>) -> JobError {
    if let Some(stay) = task.stay {
        stay.refuse();
    }
    JobError::QueueFull
}

async fn wait<T>(deadline: Instant, answer: oneshot::Receiver<Result<T, JobError>>) -> Result<T, JobError> {
    match tokio::time::timeout_at(deadline.into(), answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_dropped)) => Err(JobError::Panicked("no thread is left".to_owned())),
        Err(_elapsed) => Err(JobError::Expired),
    }
}

fn work<S>(tasks: &Queue<Task<S>>, mut state: S, pace: &Pace) {
    while let Some(Task { run, stay }) = tasks.pop() {
        drop(stay);
        let start = Instant::now();
        let n_run = run(&mut state);
        if n_run > 0 {
            pace.record(start.elapsed() / n_run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[tokio::test]
    async fn every_job_runs_on_the_state_of_its_thread() {
        let pool = Pool::start("test", vec![0_u32], 8).unwrap();
        for expected in 1..=5 {
            let counted = pool.run(soon(), |n| {
                *n += 1;
                *n
            });
            assert_eq!(counted.await, Ok(expected));
        }
    }

    #[tokio::test]
    async fn a_panic_fails_only_its_own_job() {
        let pool = Pool::start("test", vec![()], 8).unwrap();
        let failed = pool.run(soon(), |()| -> u8 { panic!("no such row") }).await;
        assert_eq!(failed, Err(JobError::Panicked("no such row".to_owned())));
        assert_eq!(pool.run(soon(), |()| 7).await, Ok(7));
    }

    /// Occupies the pool's only thread until the sender is dropped.
    async fn occupy(pool: &Arc<Pool<()>>) -> (mpsc::Sender<()>, tokio::task::JoinHandle<Result<(), JobError>>) {
        let (release, released) = mpsc::channel::<()>();
        let (started, has_started) = oneshot::channel();
        let busy = Arc::clone(pool);
        let task = tokio::spawn(async move {
            let wait = move |(): &mut ()| {
                started.send(()).unwrap();
                let _ = released.recv();
            };
            busy.run(soon(), wait).await
        });
        has_started.await.unwrap();
        (release, task)
    }

    #[tokio::test]
    async fn a_full_queue_refuses_a_job_and_an_expired_job_never_runs() {
        let pool = Arc::new(Pool::start("test", vec![()], 1).unwrap());
        let (release, busy) = occupy(&pool).await;
        let n_ran = Arc::new(AtomicUsize::new(0));
        let count = |n: &Arc<AtomicUsize>| {
            let n = Arc::clone(n);
            move |(): &mut ()| n.fetch_add(1, Ordering::SeqCst)
        };
        let expired = pool.run(Instant::now() + Duration::from_millis(5), count(&n_ran)).await;
        assert_eq!(expired, Err(JobError::Expired));
        // The expired job still holds the only place in the queue.
        assert_eq!(pool.run(soon(), count(&n_ran)).await, Err(JobError::QueueFull));
        drop(release);
        assert_eq!(busy.await.unwrap(), Ok(()));
        // The thread may not have dropped the expired job yet.
        let next = loop {
            match pool.run(soon(), count(&n_ran)).await {
                Err(JobError::QueueFull) => tokio::task::yield_now().await,
                other => break other,
            }
        };
        assert_eq!(next, Ok(0), "the expired job ran");
    }

    #[tokio::test]
    async fn the_expected_wait_is_the_queue_length_times_the_recent_pace() {
        let pool = Arc::new(Pool::start("test", vec![()], 8).unwrap());
        assert_eq!(pool.expected_wait(), Duration::ZERO);
        let (release, busy) = occupy(&pool).await;
        pool.pace.record(Duration::from_millis(8));
        pool.pace.record(Duration::from_millis(24));
        assert_eq!(pool.pace.average(), Duration::from_millis(9));
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let pool = Arc::clone(&pool);
                tokio::spawn(async move { pool.run(soon(), |()| ()).await })
            })
            .collect();
        while pool.queue.len() < 3 {
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.expected_wait(), Duration::from_millis(27));
        drop(release);
        busy.await.unwrap().unwrap();
        for job in waiting {
            job.await.unwrap().unwrap();
        }
        assert_eq!(pool.expected_wait(), Duration::ZERO);
    }

    #[tokio::test]
    async fn a_job_whose_caller_has_left_is_skipped() {
        let pool = Arc::new(Pool::start("test", vec![()], 4).unwrap());
        let (release, busy) = occupy(&pool).await;
        let n_ran = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&n_ran);
        let left = pool.run(soon(), move |()| counted.fetch_add(1, Ordering::SeqCst));
        assert!(tokio::time::timeout(Duration::from_millis(5), left).await.is_err());
        drop(release);
        busy.await.unwrap().unwrap();
        pool.run(soon(), |()| ()).await.unwrap();
        assert_eq!(n_ran.load(Ordering::SeqCst), 0);
    }
}
