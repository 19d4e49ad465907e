"""The paper's online A/B test replayed offline: one ranking model, trained with and without what LEARN adds.

LEARN reports UAUC .6885 -> .6969 for its ranking model with the mid-emb, with the largest gains on cold-start items.
Here a ranking model (DCN-V2 or LightGBM) ranks the films that a user met by a PROXY label (value >= 4, "liked"):
MovieLens has neither impressions nor conversions, so nothing here is a click or a purchase.

The arms of a study differ in their extra features only. For one seed, all arms have the same starting point (a ranker
without extra features, trained on the towers' part of the log), the same events of the ranker's part to train on, the
same list of trials, the same early stopping on validation, and the same random seed. `event_parts` explains the parts.

LEARN's features come from a `FeatureSource`: `learn features` with a bundle of the towers' part (`tower_runs`).
`result_files` lists the files that a study leaves.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn.data import Dataset
from learn.toml_config import as_read
from research import provenance, record_files
from research.ranking import event_parts, features, summary, tower_runs
from research.ranking.arms import ARMS, CONTROL
from research.ranking.auc_metrics import GroupConfig, HeldOut
from research.ranking.event_parts import RANKER_PART, TEST, TOWER_PART, VALIDATION, Events, RankSplitConfig
from research.ranking.model_inputs import Inputs, RankingModel, Widths
from research.ranking.ranker import Dcn
from research.ranking.result_files import RankingRun, RankingStudy
from research.ranking.summary import Row
from research.ranking.tower_runs import Features, FeatureSource

PARTS = {"towers": TOWER_PART, "ranker": RANKER_PART, "validation": VALIDATION, "test": TEST}


@dataclass(frozen=True)
class RankConfig:
    """One study."""

    study: str = "rank"
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    arms: tuple[str, ...] = tuple(ARMS)
    split: RankSplitConfig = field(default_factory=RankSplitConfig)
    # How towers and head are trained, for the record: `FeatureSource` has the settings that count.
    mid: dict[str, Any] = field(default_factory=dict)
    ranker: RankingModel = field(default_factory=Dcn)
    # Rows of each id table, including row 0 for unknown ids; with more ids than rows, ids share rows.
    id_rows: int = 100_000
    groups: GroupConfig = field(default_factory=GroupConfig)
    # How many categories, the most frequent first, are columns of the arms with categories.
    n_categories: int = 32

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"unknown arm {unknown[0]!r}; known are {', '.join(ARMS)}")
        if CONTROL not in self.arms:
            raise ValueError(f"the arm {CONTROL!r} is missing from {self.arms}; all others are compared with it")


@dataclass(frozen=True)
class Table:
    """All events as the ranker reads them, without the extra features of an arm.

    `digest` is that of the events and the catalogue.
    """

    events: Events
    plain: Inputs
    widths: Widths
    categories: Tensor = field(repr=False)
    digest: str = ""

    def inputs(self, extra: Tensor, *parts: int) -> Inputs:
        """Events of these parts. `extra` [n,X] has one row per event after the towers' part, or no columns."""
        rows = torch.from_numpy(self.events.rows(*parts))
        chosen = self.plain.take(rows)
        if not extra.shape[1]:
            return chosen
        place = torch.from_numpy(np.searchsorted(self.events.rows(RANKER_PART, VALIDATION, TEST), rows.numpy()))
        return replace(chosen, extra=extra[place])


def rank(config: RankConfig, dataset: Dataset, source: FeatureSource, out: Path) -> list[Row]:
    """Runs the study, or the part of it that is missing, and returns `summary.summarise(out)`.

    An arm and seed that `out` has with the same config is kept.
    """
    provenance.commit()  # Before training: the first call in a process decides.
    out.mkdir(parents=True, exist_ok=True)
    table = tabulate(config, dataset, event_parts.cut(dataset, config.split))
    record_files.write(out / record_files.RANKING_STUDY_FILE, describe(config, dataset, table))
    for seed in config.seeds:
        missing = [arm for arm in config.arms if not _is_done(out, arm, seed, config, table)]
        if missing:
            run_seed(config, seed, table, source, missing, out)
    rows = summary.summarise(out)
    print(summary.text(rows))
    print(summary.choices(out))
    return rows


def tabulate(config: RankConfig, dataset: Dataset, events: Events) -> Table:
    """Ids, simple features and labels of all events. Raises ValueError if all labels of a part are the same."""
    for name, part in PARTS.items():
        labels = events.label[events.part == part]
        if not 0 < labels.sum() < len(labels):
            raise ValueError(
                f"{int(labels.sum()):,} of the {len(labels):,} events of the part {name!r} have a value of "
                f"cvr.liked_from = {config.split.liked_from:g} or more, but a ranking model needs both labels there"
            )
    rows = config.id_rows
    ids = []
    for key, n_keys in ((events.user, len(dataset.sequences)), (events.item, len(dataset.item_ids))):
        hashed = features.hashed_rows(features.training_counts(events, key, n_keys), rows)
        ids.append((torch.from_numpy(hashed[key]), min(rows, n_keys + 1)))
    numeric = torch.from_numpy(features.numeric(events))
    (user, n_users), (item, n_items) = ids
    plain = Inputs(user, item, numeric, torch.zeros(len(numeric), 0), torch.from_numpy(events.label))
    categories = torch.from_numpy(features.categories(dataset, config.n_categories))
    digest = tower_runs.digest(dataset, events)
    return Table(events, plain, Widths(n_users, n_items, numeric.shape[1]), categories, digest)


def run_seed(config: RankConfig, seed: int, table: Table, source: FeatureSource, arms: list[str], out: Path) -> None:
    """Makes LEARN's features and the starting point once, then trains every arm."""
    learned = source(seed)
    begin = time.monotonic()
    no_extra = table.plain.extra
    train, validation = table.inputs(no_extra, TOWER_PART), table.inputs(no_extra, VALIDATION)
    start = config.ranker.start(train, validation, table.widths, seed)
    shared_seconds = learned.seconds | {"starting_point": round(time.monotonic() - begin, 1)}
    figures = {name: _rounded(value) for name, value in learned.figures.items()}
    for arm in arms:
        begin = time.monotonic()
        extra = extra_features(table, learned.features, ARMS[arm])
        parts = [table.inputs(extra, part) for part in (RANKER_PART, VALIDATION, TEST)]
        fitted = config.ranker.fit(start, parts[0], parts[1], seed)
        # What is equal but for rounding errors counts as a tie.
        scores = np.round(fitted.scores(parts[2]).astype(np.float64), 5)
        run = RankingRun(
            study=config.study,
            arm=arm,
            seed=seed,
            data=table.digest,
            config=_recorded_config(config),
            chosen={name: _rounded(value) for name, value in fitted.chosen.items()},
            seconds=shared_seconds | {"ranker": round(time.monotonic() - begin, 1)},
            learned=figures,
            score_rank=record_files.score_ranks(scores),
        )
        record_files.write(record_files.run_path(out, arm, seed), run)
        print(f"{config.study}: {arm}, seed {seed}: {run.chosen}", flush=True)


def extra_features(table: Table, learned: Features, blocks: tuple[str, ...]) -> Tensor:
    """[n,X] for every event after the towers' part, each column standardised over the ranker's part."""
    later = table.events.rows(RANKER_PART, VALIDATION, TEST)
    if not blocks:
        return torch.zeros(len(later), 0)
    known = {"mid_emb": learned.mid_emb, "cvr": learned.logit, "user": learned.user, "item": learned.item}
    known["categories"] = table.categories[torch.from_numpy(table.events.item[later])]
    columns = torch.cat([known[name] for name in blocks], dim=1)
    if not columns.shape[1]:  # No item has a category.
        return columns
    in_ranker_part = columns[torch.from_numpy(table.events.part[later] == RANKER_PART)]
    spread = in_ranker_part.std(dim=0)
    return (columns - in_ranker_part.mean(dim=0)) / torch.where(spread > 1e-6, spread, torch.inf)


def held_out(table: Table) -> HeldOut:
    """Labels and training counts of the test events."""
    events = table.events
    rows = events.rows(TEST)
    users = features.training_counts(events, events.user, int(events.user.max()) + 1)
    items = features.training_counts(events, events.item, int(events.item.max()) + 1)
    user, item = events.user[rows], events.item[rows]
    return HeldOut(user, events.label[rows], items[item], users[user])


def describe(config: RankConfig, dataset: Dataset, table: Table) -> RankingStudy:
    """The record of what all arms share."""
    events = held_out(table)
    names = np.array([dataset.sequences[user].user for user in events.user.tolist()])
    return RankingStudy(
        study=config.study,
        label_meaning=f"proxy: value >= {config.split.liked_from:g} among items the user met",
        split=as_read(asdict(config.split)),
        groups=as_read(asdict(config.groups)),
        n_events={name: int((table.events.part == part).sum()) for name, part in PARTS.items()},
        user=np.unique(names, return_inverse=True)[1],
        label=events.label.astype(np.int64),
        item_train_count=events.item_train_count,
        user_train_count=events.user_train_count,
    )


def _recorded_config(config: RankConfig) -> dict[str, Any]:
    """The settings that a run depends on. The rest is left out, so that seeds and arms can be added to a study."""
    recorded = {name: value for name, value in asdict(config).items() if name not in ("study", "seeds", "arms")}
    return as_read(recorded | {"ranker": {"name": config.ranker.name} | recorded["ranker"]})


def _is_done(out: Path, arm: str, seed: int, config: RankConfig, table: Table) -> bool:
    path = record_files.run_path(out, arm, seed)
    if not path.is_file():
        return False
    run = record_files.read(path, RankingRun)
    return (run.data, run.config) == (table.digest, _recorded_config(config))


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
