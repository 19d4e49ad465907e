//! The queue between those who log and the thread that writes their lines to standard error.
//!
//! Whatever is at the other end of standard error (a pipe whose reader left, a full pipe that nobody reads, a full disk), who
//! logs never waits, fails or panics. Lines that have no room in the queue, or that cannot be written, are lost and counted.
//! `tracing-appender` has such a queue, too, but it neither counts lines that cannot be written nor ends without writing to
//! standard output, which may be full as well.

use super::events;
use std::{
    collections::VecDeque,
    io::{self, Write},
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};
use tracing_subscriber::fmt::MakeWriter;

/// The bytes of the lines that may wait: thousands of lines.
const MAX_WAITING_BYTES: usize = 1 << 20;
/// How long the thread waits before it tries again to write to a full pipe that another process made non-blocking.
const RETRY_AFTER: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    n_waiting_bytes: usize,
    is_writing: bool,
    is_closed: bool,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    /// A line was added or written, or the queue was closed.
    changed: Condvar,
}

impl Queue {
    /// The lock is held to add or take one line, never while a line is written.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether there was room for the line.
    fn push(&self, line: &[u8]) -> bool {
        let mut state = self.lock();
        if state.is_closed || state.n_waiting_bytes + line.len() > MAX_WAITING_BYTES {
            return false;
        }
        state.n_waiting_bytes += line.len();
        state.lines.push_back(line.to_vec());
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Takes the oldest line. Waits until there is one; returns `None` once the queue is closed and empty.
    fn pop(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        if mem::take(&mut state.is_writing) {
            self.changed.notify_all();
        }
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.n_waiting_bytes -= line.len();
                state.is_writing = true;
                return Some(line);
            }
            if state.is_closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until all lines are written, at most for `patience`.
    fn wait_until_written(&self, patience: Duration) {
        let has_lines = |state: &mut State| state.is_writing || !state.lines.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), patience, has_lines));
    }
}

/// The end of the queue that takes lines. It is cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct LineSender(Arc<Queue>);

impl Write for LineSender {
    /// Queues `line`, which must be a whole line, or loses it. Never fails.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.0.push(line) {
            events::log_line_lost("no_room");
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LineSender {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// The thread that writes. Its drop waits until the lines that were queued are written, for a second at most.
#[derive(Debug)]
pub struct WriterThread(Arc<Queue>);

impl WriterThread {
    /// How long the end of the process waits for a log that is not read.
    const PATIENCE: Duration = Duration::from_secs(1);

    /// Starts the thread, which writes to `output` what the sender queues.
    pub(super) fn start(mut output: impl Write + Send + 'static) -> io::Result<(LineSender, Self)> {
        let queue = Arc::new(Queue::default());
        let lines = Arc::clone(&queue);
        let run = move || {
            while let Some(line) = lines.pop() {
                if write_whole(&mut output, &line).is_err() {
                    events::log_line_lost("not_written");
                }
            }
        };
        thread::Builder::new().name("log".to_owned()).spawn(run)?;
        Ok((LineSender(Arc::clone(&queue)), WriterThread(queue)))
    }
}

impl Drop for WriterThread {
    fn drop(&mut self) {
        self.0.wait_until_written(Self::PATIENCE);
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

fn write_whole(output: &mut impl Write, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        match output.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n_bytes) => line = &line[n_bytes..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY_AFTER),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, sync::mpsc};

    /// Hands over every line that is written, and fails or blocks as the test says.
    struct Output {
        written: mpsc::Sender<Vec<u8>>,
        results: mpsc::Receiver<io::Result<()>>,
    }

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let result = self.results.recv().unwrap_or(Ok(()));
            result.map(|()| {
                drop(self.written.send(bytes.to_vec()));
                bytes.len()
            })
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_written_in_order_and_the_last_one_before_the_end_too() {
        let ((written, lines), (results, next)) = (mpsc::channel(), mpsc::channel());
        drop(results);
        let (mut sender, thread) = WriterThread::start(Output { written, results: next }).unwrap();
        let expected: Vec<Vec<u8>> = (0..100).map(|i| format!("line {i}\n").into_bytes()).collect();
        for line in &expected {
            sender.write_all(line).unwrap();
        }
        drop(thread);
        assert_eq!(lines.try_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn an_output_that_blocks_costs_lines_and_never_the_caller() {
        let ((written, lines), (results, next)) = (mpsc::channel(), mpsc::channel());
        let (mut sender, thread) = WriterThread::start(Output { written, results: next }).unwrap();
        let line = vec![b'x'; 1 << 10];
        // The thread may have taken one line, which does not wait any more.
        for _ in 0..MAX_WAITING_BYTES / line.len() + 1 {
            sender.write_all(&line).unwrap();
        }
        assert!(!sender.0.push(&line), "the queue has no bound");
        results.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        drop(results);
        drop(thread);
        assert!(
            lines.try_iter().count() >= MAX_WAITING_BYTES / line.len() - 1,
            "lines after a failure are not written"
        );
    }

    #[test]
    fn a_full_disk_does_not_fail_the_caller() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (mut sender, thread) = WriterThread::start(full).unwrap();
        sender.write_all(b"line\n").unwrap();
        drop(thread);
        assert!(sender.0.lock().lines.is_empty());
        assert!(!sender.0.push(b"too late\n"), "a line was queued that nobody will write");
    }

    #[test]
    fn a_pipe_that_is_full_for_a_moment_loses_nothing() {
        let ((written, lines), (results, next)) = (mpsc::channel(), mpsc::channel());
        let (mut sender, thread) = WriterThread::start(Output { written, results: next }).unwrap();
        sender.write_all(b"line\n").unwrap();
        for kind in [io::ErrorKind::WouldBlock, io::ErrorKind::Interrupted] {
            results.send(Err(kind.into())).unwrap();
        }
        drop(results);
        drop(thread);
        assert_eq!(lines.recv().unwrap(), b"line\n");
    }
}
