//! A listener: accepts connections within their bound, and drains.
//!
//! Invariants:
//! - A connection has a [`Slot`] until it is closed. Where there is none left, a new one is closed at once.
//! - A failed accept, for example because the process is out of file descriptors, is tried again after a pause and logged once.
//! - A drain ends the accepting, and then waits until every connection is closed; [`super::connection`] says how that comes about.

use crate::{
    telemetry::events::{self, OpenConnection},
    wire::drain_began,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{future::Future, io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tokio_io_timeout::TimeoutWriter;
use tokio_util::task::TaskTracker;

/// The pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(100);

/// What accepting needs besides the socket.
#[derive(Debug, Clone)]
pub(super) struct Accepting {
    /// The metrics' label.
    pub(super) listener: &'static str,
    /// The places for connections.
    pub(super) slots: Arc<Semaphore>,
    pub(super) draining: watch::Receiver<bool>,
}

/// A connection's place among those that may be open.
#[derive(Debug)]
#[expect(dead_code, reason = "held for its drop, never read")]
pub(super) struct Slot(OwnedSemaphorePermit, OpenConnection);

/// Runs `serve` for each connection, in a task of its own. Returns when a drain has begun and all of them are closed.
pub(super) async fn accept<F>(
    listener: TcpListener,
    accepting: Accepting,
    serve: impl Fn(TcpStream, SocketAddr, Slot) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let Accepting { listener: name, slots, mut draining } = accepting;
    events::listener_started(name);
    let connections = TaskTracker::new();
    let mut accept_fails = false;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = drain_began(&mut draining) => break,
        };
        match accepted {
            Ok((stream, address)) => {
                if std::mem::take(&mut accept_fails) {
                    tracing::info!(listener = name, "connections are accepted again");
                }
                if let Some(slot) = take_slot(name, &slots) {
                    set_options(&stream);
                    connections.spawn(serve(stream, address, slot));
                }
            }
            // The peer left before it was accepted.
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                if !std::mem::replace(&mut accept_fails, true) {
                    tracing::error!(listener = name, %error, "connections cannot be accepted, trying again");
                }
                events::connection_refused(name, "accept_failed");
                // A drain waits for this pause, too, which is short.
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    // New peers are refused by the kernel from here on.
    drop(listener);
    connections.close();
    connections.wait().await;
}

fn take_slot(listener: &'static str, slots: &Arc<Semaphore>) -> Option<Slot> {
    match Arc::clone(slots).try_acquire_owned() {
        Ok(permit) => Some(Slot(permit, OpenConnection::start(listener))),
        Err(_) => {
            events::connection_refused(listener, "too_many");
            None
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// A socket whose writes fail when the peer has taken nothing of them for the time `write`. Neither HTTP/2's pings nor a bound on idle
/// connections help there: pings wait behind the data that does not leave, and what is half sent is not idle.
pub(super) type Patient = Pin<Box<TimeoutWriter<TcpStream>>>;

pub(super) fn with_patience(stream: TcpStream, write: Duration) -> Patient {
    let mut writer = TimeoutWriter::new(stream);
    writer.set_timeout(Some(write));
    Box::pin(writer)
}

/// A failure costs the option and nothing else.
fn set_options(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection keeps Nagle's delay");
    }
}

/// Raises the number of files that this process may have open as far as it may itself, and warns if `n_connections` do not fit.
pub(super) fn raise_open_files(n_connections: usize) {
    /// Libraries, snapshots, logs and the sockets of the metrics listener.
    const OTHERS: u64 = 512;
    let limits = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limits.maximum, ..limits };
    let is_raised = setrlimit(Resource::Nofile, raised).is_ok();
    // None means that there is no bound.
    let n_files = if is_raised { raised.current } else { limits.current };
    if n_files.is_some_and(|n| n < n_connections as u64 + OTHERS) {
        tracing::warn!(n_files, n_connections, "server.max_connections is more than this process may open (ulimit -n)");
    }
}

/// The address that `listener` is bound to, for the log.
pub(super) fn address(listener: &TcpListener) -> String {
    listener.local_addr().as_ref().map_or_else(|_| String::new(), SocketAddr::to_string)
}
