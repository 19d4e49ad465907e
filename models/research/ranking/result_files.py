"""The results of a ranking study on disk: `ranking.npz` for the study, and one file per arm and seed.

    <folder>/ranking.npz                 how the log was cut, and label and training counts of every test event
    <folder>/<arm>-seed<seed>.npz        config, costs, and the order in which one arm puts the test events

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
from research.record_files import RANKING_STUDY_FILE, Column, Record, RunRecord


class RankingStudy(Record):
    """What all arms of a ranking study share. Each array has one entry per test event.

    `user` numbers the users in the order of their ids as texts. `item_train_count` and `user_train_count` are numbers
    of training events, `label` is 0 or 1 with the meaning that `label_meaning` gives it.
    """

    kind: Literal["ranking study"] = "ranking study"
    study: str
    label_meaning: str
    split: dict[str, Any]
    groups: dict[str, list[float]]
    n_events: dict[str, int]
    user: Column
    label: Column
    item_train_count: Column
    user_train_count: Column

    @validator(mode="after")
    def _arrays_agree(self) -> RankingStudy:
        for name in ("label", "item_train_count", "user_train_count"):
            if len(getattr(self, name)) != len(self.user):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.user)} in user")
        return self


class RankingRun(RunRecord):
    """One arm trained with one seed.

    `score_rank` has, for each test event, the place of its score among the distinct scores of the run, the lowest at 0:
    all that AUC depends on. `data` is the digest of events and content embeddings.
    """

    kind: Literal["ranking run"] = "ranking run"
    study: str
    arm: str
    seed: NonNegativeInt
    data: str
    config: dict[str, Any]
    chosen: dict[str, float | None]
    seconds: dict[str, float]
    learned: dict[str, float | None]
    score_rank: Column


@dataclass(frozen=True)
class RankingResults:
    """A ranking study and its runs: arm -> seed -> run."""

    study: RankingStudy
    runs: dict[str, dict[int, RankingRun]]


def study_name(folder: Path) -> str:
    """The name of the study in this folder."""
    return record_files.read(folder / RANKING_STUDY_FILE, RankingStudy).study


def read_ranking(folder: Path) -> RankingResults:
    """A ranking study with its runs. `DataError` if a run is of other data or was made with another config."""
    study = record_files.read(folder / RANKING_STUDY_FILE, RankingStudy)
    runs: dict[str, dict[int, RankingRun]] = {}
    first: RankingRun | None = None
    for path in sorted(folder.glob("*-seed*.npz")):
        run = record_files.read(path, RankingRun)
        first = first or run
        if len(run.score_rank) != len(study.user):
            reason = f"has {len(run.score_rank)} entries for {len(study.user)} test events"
            raise DataError(path, None, "score_rank", reason)
        if (run.data, run.config) != (first.data, first.config):
            reason = "is of other data or another config than the files before it; run the study again"
            raise DataError(path, None, None, reason)
        runs.setdefault(run.arm, {})[run.seed] = run
    return RankingResults(study, runs)
