"""Processes that work off jobs, and end when the process that started them ends, however that happens.

Unlike a pool of `concurrent.futures`, it says which job is doing what, and a process that is killed, as by a kernel
that is short of memory, costs its own job only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

from learn.allocator import keep_freed_memory

# What a job calls to report where it is; the report has to be picklable.
Report = Callable[[Any], None]
Task = Callable[[Any, Report], Any]
# How long a process that is asked to end may take.
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Event:
    """Something that happened to the job at `index`: it was started, reported, or ended one way or the other.

    `content` is the job's report, its result, or the text of its error.
    """

    index: int
    kind: Literal["started", "report", "done", "failed"]
    content: Any = None


def work_off(task: Task, jobs: Sequence[Any], n_workers: int) -> Iterator[Event]:
    """Calls `task` for every job, `n_workers` at a time with one thread each, in the order of the jobs.

    Close the iterator to end the processes; they also end with this process. ValueError without any worker.
    """
    if n_workers < 1:
        raise ValueError(f"{n_workers} workers cannot do anything; give at least 1 (--workers)")
    waiting = list(enumerate(jobs))[::-1]
    workers = [_Worker(task) for _ in range(min(n_workers, len(jobs)))]
    try:
        for worker in workers:
            yield worker.begin(*waiting.pop())
        while busy := {worker.channel: worker for worker in workers if worker.index is not None}:
            for channel in wait(list(busy)):
                worker = busy[channel]
                event = worker.received()
                yield event
                if event.kind == "report":
                    continue
                if not worker.process.is_alive():
                    workers[workers.index(worker)] = worker = _Worker(task)
                worker.index = None
                if waiting:
                    yield worker.begin(*waiting.pop())
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


class _Worker:
    """A process, and the job that it is at."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, other = context.Pipe()
        self.index: int | None = None
        self.process = context.Process(target=_work, args=(task, other), daemon=True)
        self.process.start()
        # So that this end sees the other one close.
        other.close()

    def begin(self, index: int, job: Any) -> Event:
        self.index = index
        self.channel.send(job)
        return Event(index, "started")

    def received(self) -> Event:
        """The next event of the job; a process that has ended failed it."""
        assert self.index is not None
        try:
            kind, content = self.channel.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            kind, content = "failed", f"its process ended with exit code {self.process.exitcode}"
        return Event(self.index, kind, content)

    def end(self) -> None:
        self.process.join(GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.channel.close()


def _work(task: Task, channel: Connection) -> None:
    """The life of a process: one job after the other."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    torch.set_num_threads(1)
    while True:
        try:
            job = channel.recv()
        except EOFError:
            return
        try:
            outcome = ("done", task(job, lambda content: channel.send(("report", content))))
        except (ValueError, OSError) as error:  # What the user can mend.
            outcome = ("failed", str(error))
        except Exception:
            outcome = ("failed", traceback.format_exc())
        channel.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # Without waiting for the job: nobody is left to read its outcome, and it continues from its checkpoint.
    os._exit(1)
