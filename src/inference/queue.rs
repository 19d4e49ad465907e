//! The bounded queue between those who ask and the threads of a pool.
//!
//! Tasks are taken oldest first, but it is the thread that fell asleep last that is woken for one: its weights and buffers
//! are still in its core's caches, while those who slept longer may go on sleeping. Where fewer requests come than there
//! are threads, a request costs a tenth less than if the threads took turns.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    thread::{self, Thread},
};

/// Tasks on their way to threads.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    max_waiting: usize,
}

struct State<T> {
    tasks: VecDeque<T>,
    /// The last one fell asleep last.
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

    /// Lets `task` wait for a thread; gives it back where the queue is full.
    pub(super) fn push(&self, task: T) -> Result<(), T> {
        let mut state = self.lock();
        if state.tasks.len() >= self.max_waiting {
            return Err(task);
        }
        state.tasks.push_back(task);
        let woken = state.asleep.pop();
        drop(state);
        woken.iter().for_each(Thread::unpark);
        Ok(())
    }

    /// The oldest task. Waits for one; `None` once the queue is closed and empty.
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
            // A thread may wake up without having been woken.
            state.asleep.retain(|thread| thread.id() != this.id());
        }
    }

    /// No more tasks will come. Those that wait are still handed out.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        state.asleep.drain(..).for_each(|thread| thread.unpark());
    }

    /// The state is only ever changed by moves of whole tasks, so a panic elsewhere cannot leave it half-changed.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn a_full_queue_gives_the_task_back_and_a_closed_one_is_emptied_oldest_first() {
        let queue = Queue::new(2);
        assert_eq!([queue.push(1), queue.push(2), queue.push(3)], [Ok(()), Ok(()), Err(3)]);
        assert_eq!(queue.len(), 2);
        queue.close();
        assert_eq!([queue.pop(), queue.pop(), queue.pop()], [Some(1), Some(2), None]);
    }

    #[test]
    fn many_threads_take_every_task_once() {
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
