//! Threads that give way: encoding and loading have time, a hot request has milliseconds.

/// At this niceness a busy thread gets a tenth of a core that both want, and all of what scoring leaves.
const NICENESS: i32 = 10;

/// Lowers the calling thread's priority for good (on Linux niceness is a thread's own, and threads that it starts inherit it).
pub fn step_back() {
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::warn!(%error, "a background thread keeps normal priority, hot requests will feel it");
    }
}
