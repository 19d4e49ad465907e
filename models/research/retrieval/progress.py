"""How far a study is: which model and seed runs, how long the rest takes, and the table at its end.

How long a run takes is estimated from what is most like it: runs of its model, else of its kind, else any that was
trained; those that have finished, else those that are under way, in proportion to their steps. A run without training
counts as nothing until one of its model has finished.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from learn.evaluation.metrics import event_values
from learn.training import run_length
from learn.training.run_length import FIGURE
from learn.training.train_config import TrainConfig
from research.retrieval.result_files import Run
from research.retrieval.workers import Event


@dataclass(frozen=True)
class PlannedRun:
    """A model and a seed, and the settings of the run as its file records them. `steps` is 0 if nothing is trained."""

    model: str
    seed: int
    kind: str
    steps: int
    config: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        return f"{self.model} seed {self.seed}"


@dataclass(frozen=True)
class Timed:
    """A run, the seconds that it took or has taken so far, and the share of it that is done."""

    run: PlannedRun
    seconds: float
    share: float = 1.0


def expected_seconds(run: PlannedRun, finished: Sequence[Timed], underway: Sequence[Timed]) -> float | None:
    """How long the run takes from its start, as the head of this file says; None if nothing like it is known."""
    if not run.steps:
        return fmean([other.seconds for other in finished if other.run.model == run.model] or [0.0])
    trained = [other for other in (*finished, *underway) if other.run.steps and other.share > 0.0]
    same_kind = [other for other in trained if other.run.kind == run.kind]
    same_model = [other for other in same_kind if other.run.model == run.model]
    for alike in (same_model, same_kind, trained):
        if alike:
            alike = [other for other in alike if other.share == 1.0] or alike
            return fmean(other.seconds / other.share / other.run.steps for other in alike) * run.steps
    return None


class Progress:
    """Prints a line for each event of a study, and knows how long the rest of it takes."""

    def __init__(
        self,
        waiting: Sequence[PlannedRun],
        finished: Sequence[Timed],
        n_workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runs, self.waiting, self.finished = waiting, list(waiting), list(finished)
        self.n_workers, self.clock = n_workers, clock
        self.n_ended = 0
        # By the index of a run: when it began, and the share of its steps that it has done.
        self.begin: dict[int, float] = {}
        self.share: dict[int, float] = {}
        self.failed: list[PlannedRun] = []

    def note(self, event: Event) -> None:
        """Prints what happened; `content` of a report is a record of `train`."""
        run = self.runs[event.index]
        if event.kind == "started":
            self.waiting.remove(run)
            self.begin[event.index], self.share[event.index] = self.clock(), 0.0
            length = f", {run.steps} steps" if run.steps else ""
            self._say(f"{run} starts{length}; {self._left()}")
        elif event.kind == "report":
            self.share[event.index] = event.content["step"] / run.steps
            # A run that continues from a checkpoint began before this study did.
            trained_since = self.clock() - event.content.get("seconds", 0.0)
            self.begin[event.index] = min(self.begin[event.index], trained_since)
            figure = f", NDCG@10 {event.content[FIGURE]:.4f} on validation" if FIGURE in event.content else ""
            self._say(f"{run}: step {event.content['step']} of {run.steps}{figure}; {self._left()}")
        else:
            seconds = self.clock() - self.begin.pop(event.index)
            del self.share[event.index]
            self.n_ended += 1
            if event.kind == "done":
                self.finished.append(Timed(run, seconds))
                self._say(f"{run} done after {_time(seconds)}; {self._left()}")
            else:
                self.failed.append(run)
                self._say(f"{run} FAILED after {_time(seconds)}: {event.content}")

    def seconds_left(self) -> float | None:
        """Until the last run ends; None if nothing is known yet about one of them."""
        now = self.clock()
        underway = [Timed(self.runs[index], now - self.begin[index], share) for index, share in self.share.items()]
        free = [0.0] * max(self.n_workers, len(underway))
        for place, timed in enumerate(underway):
            if timed.share > 0.0:
                rest = timed.seconds / timed.share - timed.seconds
            elif (whole := expected_seconds(timed.run, self.finished, underway)) is not None:
                rest = max(0.0, whole - timed.seconds)
            else:
                return None
            free[place] = rest
        heapq.heapify(free)
        for run in self.waiting:
            whole = expected_seconds(run, self.finished, underway)
            if whole is None:
                return None
            heapq.heapreplace(free, free[0] + whole)
        return max(free)

    def left(self) -> str:
        """How long the rest takes, in words."""
        seconds = self.seconds_left()
        return "time left not known yet" if seconds is None else f"about {_time(seconds)} left"

    def _left(self) -> str:
        return f"{self.n_ended} of {len(self.runs)} runs over, {self.left()}"

    def _say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


HEADINGS = ("model", "seeds", "best step of", "NDCG@10 valid.", "NDCG@10 test", "HR@10 test", "minutes", "warnings")


def closing_table(runs: Mapping[str, Sequence[Run]]) -> str:
    """The runs of each model in one row, figures as means over its seeds, minutes as their sum; then the warnings."""
    rows, notes = [HEADINGS], []
    for model, seeds in runs.items():
        if not seeds:
            continue
        found = {run.seed: warnings_of(run) for run in seeds}
        warned = {seed: texts for seed, texts in found.items() if texts}
        rows.append(_row(model, seeds, len(warned)))
        if warned:
            seed, texts = next(iter(warned.items()))
            others = f" (and {len(warned) - 1} more of its seeds)" if len(warned) > 1 else ""
            notes += [f"warning: {model} seed {seed}{others}: {text}" for text in texts]
    widths = [max(len(row[place]) for row in rows) for place in range(len(HEADINGS))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *notes])


def warnings_of(run: Run) -> list[str]:
    """What the learning curve of a run says against its length."""
    if not run.curve:
        return []
    return run_length.warnings(training_of(run), curve_of(run))


def training_of(run: Run) -> TrainConfig:
    """The settings that the run was trained with; those of other versions that this one does not know are left out."""
    known = {name: value for name, value in run.config["train"].items() if name in TrainConfig.__dataclass_fields__}
    training = TrainConfig(**known, seed=run.seed)
    return training.with_steps(training.steps)


def curve_of(run: Run) -> list[dict[str, float]]:
    """The curve in the form of `train`."""
    return [point.model_dump(exclude_none=True) for point in run.curve]


def _row(model: str, runs: Sequence[Run], n_warned: int) -> tuple[str, ...]:
    best, steps, validation = "-", "-", "-"
    trained = [run for run in runs if run.curve]
    if trained:
        steps = _range([training_of(run).steps for run in trained])
        bests = [step for run in trained if (step := run_length.best_step(curve_of(run))) is not None]
        if bests:
            best = _range(bests)
            validation = (
                f"{fmean(max(p.ndcg_at_10 for p in run.curve if p.ndcg_at_10 is not None) for run in trained):.4f}"
            )
    test = [f"{fmean(event_values(run.rank, name).mean() for run in runs):.4f}" for name in ("ndcg_at_10", "hr_at_10")]
    minutes = sum(run.seconds.train + run.seconds.evaluate for run in runs) / 60
    length = f"{best} of {steps}" if trained else "-"
    seeds = " ".join(str(run.seed) for run in runs)
    return (model, seeds, length, validation, *test, f"{minutes:.1f}", str(n_warned) if n_warned else "")


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
