//! Loom runs the real queue under every interleaving of its threads.
//!
//! Covered: all of [`Queue`], including spurious wake-ups. Loom reports a thread that sleeps forever as a
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

/// Pushes two tasks while two threads wait for one each. The queue is never closed, so only a push can wake a thread.
fn check_that_two_tasks_wake_two_threads(disturb: fn(&thread::JoinHandle<Option<u32>>)) {
    loom::model(move || {
        let queue = Arc::new(Queue::new(8));
        let threads = [start_single_pop(&queue), start_single_pop(&queue)];
        disturb(&threads[0]);
        for task in 0..2 {
            queue.push(task).unwrap();
        }
        let mut taken = threads.map(|thread| thread.join().unwrap());
        taken.sort_unstable();
        assert_eq!(taken, [Some(0), Some(1)]);
    });
}

#[test]
fn no_thread_sleeps_while_a_task_waits() {
    check_that_two_tasks_wake_two_threads(|_| {});
}

#[test]
fn a_spurious_wake_up_of_one_thread_takes_none_from_another() {
    check_that_two_tasks_wake_two_threads(|thread| thread.thread().unpark());
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
