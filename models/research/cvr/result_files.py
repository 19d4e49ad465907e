"""The results of a CVR study on disk: `cvr.npz` for the study, and one file per arm and seed.

    <folder>/cvr.npz                     how the log was split, the test events, and the item means' order of them
    <folder>/<arm>-seed<seed>.npz        config, figures, and the order in which one head puts the test events

`record_files` says what such a file looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt
from pydantic import model_validator as validator

from learn.data import DataError
from research import record_files
from research.record_files import CVR_STUDY_FILE, Column, Record, RunRecord


class CvrStudyRecord(Record):
    """What all arms of a CVR study share. Each array has one entry per test event.

    `item_mean_rank` has the place of the event's item mean among the distinct ones, the lowest at 0: the baseline.
    """

    kind: Literal["cvr study"] = "cvr study"
    study: str
    label_meaning: str
    data: str
    split: dict[str, Any]
    user: Column
    label: Column
    item_mean_rank: Column

    @validator(mode="after")
    def _arrays_agree(self) -> CvrStudyRecord:
        for name in ("label", "item_mean_rank"):
            if len(getattr(self, name)) != len(self.user):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.user)} in user")
        return self


class CvrRun(RunRecord):
    """One arm trained with one seed; `score_rank` is to its scores what `item_mean_rank` is to item means."""

    kind: Literal["cvr run"] = "cvr run"
    study: str
    arm: str
    seed: NonNegativeInt
    data: str
    config: dict[str, Any]
    figures: dict[str, float]
    seconds: float
    score_rank: Column


@dataclass(frozen=True)
class CvrResults:
    """A CVR study and its runs: arm -> seed -> run."""

    study: CvrStudyRecord
    runs: dict[str, dict[int, CvrRun]]


def read_cvr(folder: Path) -> CvrResults:
    """A CVR study with its runs. `DataError` if a run is of other data."""
    study = record_files.read(folder / CVR_STUDY_FILE, CvrStudyRecord)
    runs: dict[str, dict[int, CvrRun]] = {}
    for path in sorted(folder.glob("*-seed*.npz")):
        run = record_files.read(path, CvrRun)
        if run.data != study.data or len(run.score_rank) != len(study.user):
            raise DataError(path, None, "data", "is of other data than the study; run the study again")
        runs.setdefault(run.arm, {})[run.seed] = run
    return CvrResults(study, runs)
