//! Batches form behind busy threads, stay within their limits and answer every caller once.

use super::*;
use crate::inference::Pool;
use proptest::prelude::*;
use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

/// Doubles numbers. Each result holds the double and how many numbers were doubled together. The number 1000 panics.
type Doubling = Batches<(), usize, (usize, usize)>;

fn doubling(limits: Limits) -> Arc<Doubling> {
    let run = |(): &mut (), jobs: Vec<usize>| {
        assert!(!jobs.contains(&1000), "1000 is too much");
        jobs.iter().map(|job| (job * 2, jobs.len())).collect()
    };
    Arc::new(Batches::new(limits, |job| *job, Box::new(run)))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Occupies the pool's only thread until the sender is dropped.
async fn occupy(pool: &Arc<Pool<()>>) -> mpsc::Sender<()> {
    let (release, released) = mpsc::channel::<()>();
    let (started, has_started) = oneshot::channel();
    let busy = Arc::clone(pool);
    tokio::spawn(async move {
        let wait = move |(): &mut ()| {
            started.send(()).unwrap();
            let _ = released.recv();
        };
        busy.run(soon(), wait).await
    });
    has_started.await.unwrap();
    release
}

/// Queues `jobs` behind a busy thread, then frees the thread and returns their results.
async fn behind_a_busy_thread(
    limits: Limits,
    jobs: impl IntoIterator<Item = (usize, Instant)>,
) -> Vec<Result<(usize, usize), JobError>> {
    let (pool, batches) = (Arc::new(Pool::start("test", vec![()], 1000).unwrap()), doubling(limits));
    let release = occupy(&pool).await;
    let mut callers = Vec::new();
    for (job, deadline) in jobs {
        let n_waiting = batches.lock().len();
        let call = {
            let (pool, batches) = (Arc::clone(&pool), Arc::clone(&batches));
            async move { pool.run_together(&batches, deadline, job).await }
        };
        callers.push(tokio::spawn(call));
        while batches.lock().len() == n_waiting {
            tokio::task::yield_now().await;
        }
    }
    drop(release);
    let mut answers = Vec::new();
    for caller in callers {
        answers.push(caller.await.unwrap());
    }
    assert_eq!(batches.lock().len(), 0, "a job was left behind");
    answers
}

const NO_LIMIT: Limits = Limits { max_jobs: usize::MAX, max_size: usize::MAX };

#[tokio::test]
async fn jobs_behind_a_busy_thread_run_together_and_others_run_alone() {
    let jobs = [3, 4, 5].map(|job| (job, soon()));
    assert_eq!(behind_a_busy_thread(NO_LIMIT, jobs).await, [Ok((6, 3)), Ok((8, 3)), Ok((10, 3))]);
    let limits = Limits { max_jobs: 2, ..NO_LIMIT };
    assert_eq!(behind_a_busy_thread(limits, jobs).await, [Ok((6, 2)), Ok((8, 2)), Ok((10, 1))]);
    let limits = Limits { max_size: 7, ..NO_LIMIT };
    let jobs = [9, 3, 4, 1].map(|job| (job, soon()));
    assert_eq!(behind_a_busy_thread(limits, jobs).await, [Ok((18, 1)), Ok((6, 2)), Ok((8, 2)), Ok((2, 1))]);

    let pool = Pool::start("test", vec![()], 8).unwrap();
    let batches = doubling(NO_LIMIT);
    for job in [1, 2] {
        assert_eq!(pool.run_together(&batches, soon(), job).await, Ok((job * 2, 1)));
    }
}

#[tokio::test]
async fn a_panic_fails_only_its_batch() {
    let limits = Limits { max_jobs: 2, ..NO_LIMIT };
    let answers = behind_a_busy_thread(limits, [3, 1000, 5].map(|job| (job, soon()))).await;
    assert!(matches!(&answers[0], Err(JobError::Panicked(message)) if message.contains("too much")), "{answers:?}");
    assert_eq!(answers[1], answers[0]);
    assert_eq!(answers[2], Ok((10, 1)));
}

#[tokio::test]
async fn a_job_that_expired_or_whose_caller_left_is_not_run() {
    let (pool, batches) = (Arc::new(Pool::start("test", vec![()], 8).unwrap()), doubling(NO_LIMIT));
    let release = occupy(&pool).await;
    let in_a_moment = Instant::now() + Duration::from_millis(5);
    assert_eq!(pool.run_together(&batches, in_a_moment, 1).await, Err(JobError::Expired));
    let left = pool.run_together(&batches, soon(), 2);
    assert!(tokio::time::timeout(Duration::from_millis(5), left).await.is_err());
    let waiting = {
        let (pool, batches) = (Arc::clone(&pool), Arc::clone(&batches));
        tokio::spawn(async move { pool.run_together(&batches, soon(), 3).await })
    };
    while batches.lock().len() < 3 {
        tokio::task::yield_now().await;
    }
    drop(release);
    assert_eq!(waiting.await.unwrap(), Ok((6, 1)));
}

#[tokio::test]
async fn a_job_that_a_full_queue_refused_is_not_run() {
    let (pool, batches) = (Arc::new(Pool::start("test", vec![()], 1).unwrap()), doubling(NO_LIMIT));
    let release = occupy(&pool).await;
    let first = {
        let (pool, batches) = (Arc::clone(&pool), Arc::clone(&batches));
        tokio::spawn(async move { pool.run_together(&batches, soon(), 1).await })
    };
    while batches.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(pool.run_together(&batches, soon(), 2).await, Err(JobError::QueueFull));
    drop(release);
    assert_eq!(first.await.unwrap(), Ok((2, 1)), "the refused job ran with the first");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn every_job_is_answered_once_with_its_own_result_within_the_limits(
        jobs in prop::collection::vec((0..100_usize, prop::bool::weighted(0.8)), 0..60),
        max_jobs in 1..10_usize,
        max_size in 1..200_usize,
    ) {
        let limits = Limits { max_jobs, max_size };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let passed = Instant::now();
        let deadline = |in_time: bool| if in_time { soon() } else { passed };
        let answers = runtime.block_on(behind_a_busy_thread(limits, jobs.iter().map(|(job, t)| (*job, deadline(*t)))));
        for ((job, in_time), answer) in jobs.iter().zip(answers) {
            match (in_time, answer) {
                (true, Ok((doubled, n_together))) => {
                    prop_assert_eq!(doubled, job * 2);
                    prop_assert!(n_together <= max_jobs);
                }
                (false, Err(JobError::Expired)) => {}
                (in_time, other) => prop_assert!(false, "{job} {in_time}: {other:?}"),
            }
        }
    }
}
