//! Work that has time: encoding and loading give way to hot requests, which have milliseconds.

use super::{JobError, job::run_guarded};
use std::{io, thread};
use thiserror::Error;
use tokio::sync::oneshot;

/// At this niceness a busy thread gets a tenth of a core that both want, and all that scoring leaves.
const NICENESS: i32 = 10;
const THREAD: &str = "loader";

/// How a background thread shares the cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Like every other thread: nothing is being served yet.
    Normal,
    /// Gives way to the threads that serve.
    GivesWay,
}

/// A background job has no result.
#[derive(Debug, Error)]
pub enum BackgroundError {
    /// No thread could be started.
    #[error("a background thread cannot be started: {0}")]
    Spawn(#[from] io::Error),
    /// The job panicked.
    #[error(transparent)]
    Job(#[from] JobError),
}

/// Lowers the calling thread's priority for good (on Linux, niceness belongs to a thread, and threads that it starts inherit it).
pub fn give_way() {
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::warn!(%error, "a background thread keeps normal priority, so hot requests will be slower while it works");
    }
}

/// Runs `job`, which may block, on a thread of its own. The job goes on if the caller stops waiting.
pub async fn run<T: Send + 'static>(
    urgency: Urgency,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BackgroundError> {
    let (reply, answer) = oneshot::channel();
    let work = move || {
        if urgency == Urgency::GivesWay {
            give_way();
        }
        // An error says that the caller has left: a server that drains waits for no load.
        let _ = reply.send(run_guarded(THREAD, job));
    };
    thread::Builder::new().name(THREAD.to_owned()).spawn(work)?;
    let result = answer.await.map_err(|_dropped| JobError::Panicked("its thread ended early".to_owned()))?;
    Ok(result?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_background_job_gives_its_result_or_its_panic() {
        assert_eq!(run(Urgency::Normal, || 7).await.unwrap(), 7);
        let failed = run(Urgency::GivesWay, || panic!("no such file")).await;
        assert!(matches!(failed, Err(BackgroundError::Job(JobError::Panicked(message))) if message == "no such file"));
    }
}
