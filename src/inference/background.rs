//! Background work, such as encoding and loading. It gives way to hot requests, which must be answered within milliseconds.

use super::{JobError, job::run_guarded};
use std::{io, thread};
use thiserror::Error;
use tokio::sync::oneshot;

/// At this niceness a busy thread gets a tenth of a core that a normal thread also wants, and all of an otherwise idle core.
const NICENESS: i32 = 10;
const THREAD: &str = "loader";

/// How a background thread shares the cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Normal priority, for work before the server serves.
    Normal,
    /// Low priority, for work while the server serves.
    GivesWay,
}

/// Why a background job has no result.
#[derive(Debug, Error)]
pub enum BackgroundError {
    /// No thread could be started.
    #[error("a background thread cannot be started: {0}")]
    Spawn(#[from] io::Error),
    /// The job panicked.
    #[error(transparent)]
    Job(#[from] JobError),
}

/// Lowers the calling thread's priority for good. On Linux, niceness belongs to a thread, and threads that it starts inherit it.
pub fn give_way() {
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::warn!(%error, "a background thread keeps normal priority, so hot requests will be slower while it works");
    }
}

/// Runs `job`, which may block, on a thread of its own. If the caller stops waiting, the job still runs to its end.
pub async fn run<T: Send + 'static>(
    urgency: Urgency,
    job: impl FnOnce() -> T + Send + 'static,
) -> Result<T, BackgroundError> {
    let (reply, answer) = oneshot::channel();
    let work = move || {
        if urgency == Urgency::GivesWay {
            give_way();
        }
        // Sending fails if the caller has left, for example because the server is draining.
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
    async fn a_background_job_returns_its_result_or_its_panic() {
        assert_eq!(run(Urgency::Normal, || 7).await.unwrap(), 7);
        let failed = run(Urgency::GivesWay, || panic!("no such file")).await;
        assert!(matches!(failed, Err(BackgroundError::Job(JobError::Panicked(message))) if message == "no such file"));
    }
}
