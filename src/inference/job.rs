//! Why a job has no result, and the guard that turns a panic into an error.

use crate::telemetry::events;
use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};
use thiserror::Error;

/// Why a job has no result.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JobError {
    /// The queue is full.
    #[error("the queue is full")]
    QueueFull,
    /// The deadline passed before the job was done.
    #[error("the deadline passed")]
    Expired,
    /// The job panicked, or no thread was left to run it.
    #[error("the job panicked: {0}")]
    Panicked(String),
}

/// Runs `job`. A panic becomes an error and one log line that names `threads`, the group of threads that the job ran on.
pub fn run_guarded<T>(threads: &str, job: impl FnOnce() -> T) -> Result<T, JobError> {
    catch_unwind(AssertUnwindSafe(job)).map_err(|panic| {
        let message = panic_message(&*panic);
        events::job_panicked(threads, &message);
        JobError::Panicked(message)
    })
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "no message".to_owned()
    }
}
