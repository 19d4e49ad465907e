"""The paper's online A/B test replayed offline: one ranking model, trained with and without what LEARN adds.

LEARN reports UAUC .6885 -> .6969 for its ranking model with the mid-emb, with the largest gains on cold-start items.
Here DCN-V2 ranks the films that a user met by a PROXY label (value >= 4, "liked"): MovieLens has neither impressions
nor conversions, so nothing here is a click or a purchase.

The arms of a study differ in their extra features only. For one seed, all arms have the same starting point (a ranker
without extra features, trained on the towers' part of the log), the same events of the ranker's part to train on, the
same list of trials, the same early stopping on validation, and the same random seed. `event_parts` explains the parts.

`result_files` lists the files that a study leaves; the log of each seed's towers lies beside them as
`towers-seed<seed>.jsonl`.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn.data import Dataset
from learn.toml_config import as_read
from research import record_files
from research.ranking import event_parts, features, learn_features, ranker, result_files, summary
from research.ranking.arms import ARMS, CONTROL
from research.ranking.auc_metrics import GroupConfig, HeldOut
from research.ranking.event_parts import RANKER_PART, TEST, TOWER_PART, VALIDATION, Events, RankSplitConfig
from research.ranking.learn_features import Features, MidEmbeddingConfig
from research.ranking.ranker import Inputs, Ranker, RankerConfig, Trial, Widths
from research.ranking.result_files import RankingRun, RankingStudy
from research.ranking.summary import Row

PARTS = {"towers": TOWER_PART, "ranker": RANKER_PART, "validation": VALIDATION, "test": TEST}


@dataclass(frozen=True)
class RankConfig:
    """One study."""

    study: str = "rank"
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    arms: tuple[str, ...] = tuple(ARMS)
    split: RankSplitConfig = field(default_factory=RankSplitConfig)
    mid: MidEmbeddingConfig = field(default_factory=MidEmbeddingConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    # Every arm tries all of these and keeps the best on validation. The first one trains the starting point.
    trials: tuple[Trial, ...] = (Trial(1e-3, 1e-2), Trial(3e-4, 1e-2), Trial(1e-3, 1.0), Trial(3e-4, 1.0))
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

    `digest` is that of the events and the content embeddings.
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


@dataclass(frozen=True)
class StudyData:
    """The data set, its content embeddings [I,C], and its events as the ranker reads them."""

    dataset: Dataset
    content: Tensor
    table: Table


@dataclass(frozen=True)
class ArmInputs:
    """What all arms of a seed train from: the starting point and LEARN's features."""

    start: Ranker
    learned: Features


def rank(config: RankConfig, dataset: Dataset, content: Tensor, out: Path) -> list[Row]:
    """Runs the study, or the part of it that is missing, and returns `summary.summarise(out)`.

    content [I,C] is in the order of `dataset.item_ids`. An arm and seed that `out` has with the same config is kept.
    """
    if len(content) != len(dataset.item_ids):
        raise ValueError(f"content has {len(content)} rows, the catalogue has {len(dataset.item_ids)} items")
    out.mkdir(parents=True, exist_ok=True)
    table = tabulate(config, dataset, event_parts.cut(dataset, config.split))
    table = replace(table, digest=_digest(table.events, content))
    record_files.write(out / record_files.RANKING_STUDY_FILE, describe(config, dataset, table))
    for seed in config.seeds:
        missing = [arm for arm in config.arms if not _is_done(out, arm, seed, config, table)]
        if missing:
            run_seed(config, seed, StudyData(dataset, content, table), missing, out)
    rows = summary.summarise(out)
    print(summary.text(rows))
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
    rows = config.ranker.id_rows
    ids = []
    for key, n_keys in ((events.user, len(dataset.sequences)), (events.item, len(dataset.item_ids))):
        hashed = features.hashed_rows(features.training_counts(events, key, n_keys), rows)
        ids.append((torch.from_numpy(hashed[key]), min(rows, n_keys + 1)))
    numeric = torch.from_numpy(features.numeric(events))
    (user, n_users), (item, n_items) = ids
    plain = Inputs(user, item, numeric, torch.zeros(len(numeric), 0), torch.from_numpy(events.label))
    categories = torch.from_numpy(features.categories(dataset, config.n_categories))
    return Table(events, plain, Widths(n_users, n_items, numeric.shape[1]), categories)


def run_seed(config: RankConfig, seed: int, data: StudyData, arms: list[str], out: Path) -> None:
    """Trains towers, head and starting point once, then every arm."""
    dataset, content, table = data.dataset, data.content, data.table
    learned = learn_features.learn(config.mid, seed, content, dataset, table.events, out / f"towers-seed{seed}.jsonl")
    learned_features = learn_features.features(learned, config.mid, content, dataset, table.events)
    start, seconds = starting_point(config, seed, table)
    shared_seconds = learned.seconds | {"starting_point": seconds}
    figures = {name: _rounded(value) for name, value in learned.figures.items()}
    for arm in arms:
        begin = time.monotonic()
        trained = train_arm(config, arm, seed, table, ArmInputs(start, learned_features))
        run = RankingRun(
            study=config.study,
            arm=arm,
            seed=seed,
            data=table.digest,
            config=_recorded_config(config),
            chosen=trained.chosen,
            seconds=shared_seconds | {"ranker": round(time.monotonic() - begin, 1)},
            learned=figures,
            score_rank=result_files.score_ranks(trained.scores),
        )
        record_files.write(result_files.run_path(out, arm, seed), run)


def starting_point(config: RankConfig, seed: int, table: Table) -> tuple[Ranker, float]:
    """The ranker that every arm starts from: trained on the towers' part, no extra features. And its seconds."""
    begin = time.monotonic()
    torch.manual_seed(seed)
    blank = Ranker(config.ranker, table.widths)
    no_extra = table.plain.extra
    train, validation = table.inputs(no_extra, TOWER_PART), table.inputs(no_extra, VALIDATION)
    fitted = ranker.fit(blank, train, validation, config.trials[0], seed)
    return fitted.model, round(time.monotonic() - begin, 1)


@dataclass(frozen=True)
class TrainedArm:
    """The chosen trial with its epochs and validation loss, and the scores [n] of the test events."""

    chosen: dict[str, float | None]
    scores: np.ndarray


def train_arm(config: RankConfig, arm: str, seed: int, table: Table, inputs: ArmInputs) -> TrainedArm:
    """Trains one arm on the ranker's part and scores the test events.

    Scores are rounded to 5 digits, so that what is equal but for rounding errors counts as a tie.
    """
    extra = extra_features(table, inputs.learned, ARMS[arm])
    torch.manual_seed(seed)
    wide = inputs.start.widened(extra.shape[1])
    train, validation = table.inputs(extra, RANKER_PART), table.inputs(extra, VALIDATION)
    fitted, trial = ranker.best_fit(wide, train, validation, config.trials, seed)
    scores = np.round(ranker.scores(fitted.model, table.inputs(extra, TEST)).astype(np.float64), 5)
    chosen = asdict(trial) | {"epochs": fitted.epochs, "validation_log_loss": _rounded(fitted.validation_loss)}
    return TrainedArm(chosen, scores)


def extra_features(table: Table, learned: Features, blocks: tuple[str, ...]) -> Tensor:
    """[n,X] for every event after the towers' part, each column standardised over the ranker's part."""
    later = table.events.rows(RANKER_PART, VALIDATION, TEST)
    if not blocks:
        return torch.zeros(len(later), 0)
    known = {"mid_emb": learned.mid_emb, "user": learned.user, "item": learned.item}
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


def _digest(events: Events, content: Tensor) -> str:
    """SHA-256 over who met what when, with which value, and the content embeddings."""
    digest = hashlib.sha256(content.numpy().tobytes())
    for column in (events.user, events.item, events.value, events.clock, events.part):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


def _recorded_config(config: RankConfig) -> dict[str, Any]:
    """The settings that a run depends on. The rest is left out, so that seeds and arms can be added to a study."""
    recorded = {name: value for name, value in asdict(config).items() if name not in ("study", "seeds", "arms")}
    recorded["mid"]["pch"] = config.mid.pch.recorded()
    return as_read(recorded)


def _is_done(out: Path, arm: str, seed: int, config: RankConfig, table: Table) -> bool:
    path = result_files.run_path(out, arm, seed)
    if not path.is_file():
        return False
    run = record_files.read(path, RankingRun)
    return (run.data, run.config) == (table.digest, _recorded_config(config))


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
