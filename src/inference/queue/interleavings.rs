//! Loom runs the real queue under every interleaving of its threads.
//!
//! Covered: all of [`Queue`], including a thread that wakes up without reason. Loom reports a thread that sleeps for ever as a
//! deadlock. Not covered: more than three threads, and the pool around the queue.

use super::*;
use std::sync::Arc;

/// Starts a thread that takes tasks until the queue is closed.
fn start_worker(queue: &Arc<Queue<u32>>) -> thread::JoinHandle<Vec<u32>> {
    let queue = Arc::clone(queue);
    thread::spawn(move || std::iter::from_fn(|| queue.pop()).collect())
}

/// Starts a thread that takes one task.
fn start_single_pop(queue: &Arc<Queue<u32>>) -> thread::JoinHandle<Option<u32>> {
    let queue = Arc::clone(queue);
    thread::spawn(move || queue.pop())
}

#[test]
fn a_task_is_taken_exactly_once_and_closing_wakes_every_thread() {
    loom::model(|| {
        let queue = Arc::new(Queue::new(8));
        let workers = [start_worker(&queue), start_worker(&queue)];
        queue.push(7).unwrap();
        queue.close();
        let taken: Vec<u32> = workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect();
        assert_eq!(taken, [7]);
    });
}

#[test]
fn no_thread_sleeps_while_a_task_waits() {
    loom::model(|| {
        let queue = Arc::new(Queue::new(8));
        let threads = [start_single_pop(&queue), start_single_pop(&queue)];
        // The queue is never closed, so only a push can wake a thread.
        for task in 0..2 {
            queue.push(task).unwrap();
        }
        let mut taken = threads.map(|thread| thread.join().unwrap());
        taken.sort_unstable();
        assert_eq!(taken, [Some(0), Some(1)]);
    });
}

#[test]
fn a_thread_that_wakes_up_without_reason_costs_no_other_its_wake_up() {
    loom::model(|| {
        let queue = Arc::new(Queue::new(8));
        let threads = [start_single_pop(&queue), start_single_pop(&queue)];
        threads[0].thread().unpark();
        for task in 0..2 {
            queue.push(task).unwrap();
        }
        let mut taken = threads.map(|thread| thread.join().unwrap());
        taken.sort_unstable();
        assert_eq!(taken, [Some(0), Some(1)]);
    });
}

#[test]
fn a_task_is_either_taken_or_returned_to_its_caller() {
    loom::model(|| {
        let queue = Arc::new(Queue::new(1));
        let worker = start_worker(&queue);
        let other_caller = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || queue.push(0))
        };
        let pushed = [queue.push(1), other_caller.join().unwrap()];
        queue.close();
        let returned = pushed.into_iter().filter_map(Result::err);
        let mut tasks: Vec<u32> = worker.join().unwrap().into_iter().chain(returned).collect();
        tasks.sort_unstable();
        assert_eq!(tasks, [0, 1]);
    });
}
