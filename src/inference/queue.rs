//! The bounded queue between callers and the threads of a pool.
//!
//! Tasks are taken oldest first, but the thread that fell asleep last is woken first: its weights and buffers are still in its
//! core's caches, and the threads that have slept longer can go on sleeping. When there are fewer requests than threads, a
//! request costs a tenth less than if the threads took turns.
//!
//! `interleavings` checks the queue with loom (`--features loom`).

#[cfg(feature = "loom")]
use loom::{
    sync::{Mutex, MutexGuard},
    thread::{self, Thread},
};
use std::{collections::VecDeque, fmt, sync::PoisonError};
#[cfg(not(feature = "loom"))]
use std::{
    sync::{Mutex, MutexGuard},
    thread::{self, Thread},
};

/// Tasks that wait for a thread.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    max_waiting: usize,
}

struct State<T> {
    tasks: VecDeque<T>,
    /// In the order in which they fell asleep.
    asleep: Vec<Thread>,
    is_closed: bool,
}

impl<T> fmt::Debug for Queue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("waiting", &self.len()).field("max_waiting", &self.max_waiting).finish()
    }
}

impl<T> Queue<T> {
    /// An empty queue in which at most `max_waiting` tasks wait.
    pub(super) fn new(max_waiting: usize) -> Self {
        let state = State { tasks: VecDeque::new(), asleep: Vec::new(), is_closed: false };
        Queue { state: Mutex::new(state), max_waiting }
    }

    /// How many tasks wait.
    pub(super) fn len(&self) -> usize {
        self.lock().tasks.len()
    }

    /// Queues `task`, or returns it if the queue is full.
    pub(super) fn push(&self, task: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.tasks.len() >= self.max_waiting {
            return Err(task);
        }
        state.tasks.push_back(task);
        let sleeper = state.asleep.pop();
        drop(state);
        if let Some(sleeper) = sleeper {
            sleeper.unpark();
        }
        Ok(())
    }

    /// Takes the oldest task. Waits until there is one; returns `None` once the queue is closed and empty.
    pub(super) fn pop(&self) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(task) = state.tasks.pop_front() {
                return Some(task);
            }
            if state.is_closed {
                return None;
            }
            let this = thread::current();
            state.asleep.push(this.clone());
            drop(state);
            thread::park();
            state = self.lock();
            // `park` may return without `unpark`, in which case this thread is still in the list.
            state.asleep.retain(|thread| thread.id() != this.id());
        }
    }

    /// Declares that no more tasks will come. Tasks that wait are still handed out.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        for sleeper in state.asleep.drain(..) {
            sleeper.unpark();
        }
    }

    /// A poisoned lock is used as it is: the state only changes by moving whole tasks, so a panic cannot leave it half-changed.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, feature = "loom"))]
mod interleavings;

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::{Arc, mpsc},
        time::Duration,
    };

    fn wait_for_sleepers(queue: &Queue<u32>, n: usize) {
        while queue.lock().asleep.len() != n {
            thread::yield_now();
        }
    }

    #[test]
    fn the_thread_that_fell_asleep_last_is_woken_first() {
        let queue = Arc::new(Queue::new(8));
        let (taken, takes) = mpsc::channel();
        let threads: Vec<_> = (0..3)
            .map(|i| {
                let (queue, taken) = (Arc::clone(&queue), taken.clone());
                let thread = thread::spawn({
                    let queue = Arc::clone(&queue);
                    move || {
                        while let Some(task) = queue.pop() {
                            taken.send((i, task)).unwrap();
                        }
                    }
                });
                wait_for_sleepers(&queue, i + 1);
                thread
            })
            .collect();
        for task in 0..20 {
            queue.push(task).unwrap();
            assert_eq!(takes.recv_timeout(Duration::from_secs(30)), Ok((2, task)), "another thread was woken");
            wait_for_sleepers(&queue, 3);
        }
        queue.close();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn a_full_queue_returns_the_task_and_a_closed_queue_is_emptied_oldest_first() {
        let queue = Queue::new(2);
        assert_eq!([queue.push(1), queue.push(2), queue.push(3)], [Ok(()), Ok(()), Err(3)]);
        assert_eq!(queue.len(), 2);
        queue.close();
        assert_eq!([queue.pop(), queue.pop(), queue.pop()], [Some(1), Some(2), None]);
    }

    #[test]
    fn many_threads_take_every_task_exactly_once() {
        let queue = Arc::new(Queue::new(usize::MAX));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let queue = Arc::clone(&queue);
                thread::spawn(move || std::iter::from_fn(|| queue.pop()).collect::<Vec<u32>>())
            })
            .collect();
        for task in 0..20_000 {
            queue.push(task).unwrap();
            if task % 64 == 0 {
                thread::yield_now();
            }
        }
        queue.close();
        let mut taken: Vec<u32> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        taken.sort_unstable();
        assert_eq!(taken, (0..20_000).collect::<Vec<_>>());
    }
}
