"""The paper's online A/B test replayed offline: one ranking model, with and without what LEARN adds.

LEARN reports UAUC .6885 -> .6969 for its ranking model with the mid-emb, gains being largest on cold-start items. Here
DCN-V2 ranks the films that a user met by a PROXY label (value >= 4, "liked"): MovieLens has neither impressions nor
conversions, so nothing here is a click or a purchase.

What is the same for all arms of a seed: the starting point (a ranker without extra features, trained on the towers'
part), the events of the ranker's part that it is trained on, the list of trials, early stopping on validation, and the
seed. So all arms know ids and statistics of both parts alike, and differ in the extra features only. See `event_parts`
for the parts.

    <out>/test_events.json               user, item, label and training counts of every test event
    <out>/<arm>-seed<seed>.json          config, figures and scores of one arm and seed
    <out>/towers-seed<seed>.jsonl        the log of the towers
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn.data import Dataset
from learn.toml_config import as_read
from research.ranking import auc_metrics, event_parts, features, learn_features, ranker
from research.ranking.auc_metrics import GroupConfig, HeldOut
from research.ranking.event_parts import RANKER_PART, TEST, TOWER_PART, VALIDATION, Events, RankSplitConfig
from research.ranking.learn_features import Features, MidEmbeddingConfig
from research.ranking.ranker import Inputs, Ranker, RankerConfig, Trial, Widths

FORMAT = 1
CONTROL = "base"
# Arm -> the blocks of extra features that it takes.
ARMS = {
    CONTROL: (),
    "mid_emb": ("mid_emb",),
    "mid_emb+user+item": ("mid_emb", "user", "item"),
    "categories": ("categories",),
    "categories+mid_emb": ("categories", "mid_emb"),
}


# Groups whose gains are compared: the paper has its largest where ids know least.
CONTRASTS = (("cold-start items", "other items"), ("cold-start users", "other users"))


@dataclass(frozen=True)
class RankConfig:
    """One study."""

    study: str = "rank"
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    arms: tuple[str, ...] = tuple(ARMS)
    split: RankSplitConfig = field(default_factory=RankSplitConfig)
    mid: MidEmbeddingConfig = field(default_factory=MidEmbeddingConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    # Every arm tries all of these and keeps what validation likes best. The first one trains the starting point.
    trials: tuple[Trial, ...] = (Trial(1e-3, 1e-2), Trial(3e-4, 1e-2), Trial(1e-3, 1.0), Trial(3e-4, 1.0))
    groups: GroupConfig = field(default_factory=GroupConfig)
    # The commonest categories that the content-side control takes, one column each.
    n_categories: int = 32

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"unknown arm {unknown[0]!r}; known are {', '.join(ARMS)}")
        if CONTROL not in self.arms:
            raise ValueError(f"the arm {CONTROL!r} is what all others are compared with, and is not among {self.arms}")


@dataclass(frozen=True)
class Table:
    """All events as the ranker reads them; `extra` is filled in by arm."""

    events: Events
    plain: Inputs
    widths: Widths
    categories: Tensor = field(repr=False)
    # Of the events and the content embeddings.
    digest: str = ""

    def inputs(self, extra: Tensor, *parts: int) -> Inputs:
        """Events of these parts. `extra` [n,X] has a row for each event after the towers' part, or no columns."""
        rows = torch.from_numpy(self.events.rows(*parts))
        chosen = self.plain.take(rows)
        if not extra.shape[1]:
            return chosen
        place = torch.from_numpy(np.searchsorted(self.events.rows(RANKER_PART, VALIDATION, TEST), rows.numpy()))
        return replace(chosen, extra=extra[place])


@dataclass(frozen=True)
class Row:
    """A line of the report: one metric of one arm in one group, its mean over seeds, and what it adds to the control.

    `n_users` are those with both labels in the group, `n_seeds` the seeds that arm and control share. Difference,
    interval and p are None for the control, and where the metric is not defined. A group "A − B" has the gain in A less
    that in B as its difference, and no figure.
    """

    arm: str
    group: str
    metric: str
    figure: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    n_users: int
    n_events: int
    n_seeds: int


def rank(config: RankConfig, dataset: Dataset, content: Tensor, out: Path) -> list[Row]:
    """Runs the study, or what is missing of it, and returns `summarise(out)`.

    content [I,C] in the order of `dataset.item_ids`. An arm and seed that is in `out` with the same config is kept.
    """
    if len(content) != len(dataset.item_ids):
        raise ValueError(f"content has {len(content)} rows, the catalogue has {len(dataset.item_ids)} items")
    out.mkdir(parents=True, exist_ok=True)
    table = tabulate(config, dataset, event_parts.cut(dataset, config.split))
    table = replace(table, digest=_digest(table.events, content))
    _write(out / "test_events.json", shared(config, dataset, table))
    for seed in config.seeds:
        missing = [arm for arm in config.arms if not _is_done(_path(out, arm, seed), config, arm, table)]
        if missing:
            run_seed(config, seed, (dataset, content, table), missing, out)
    rows = summarise(out)
    print(text(rows))
    return rows


def tabulate(config: RankConfig, dataset: Dataset, events: Events) -> Table:
    """Ids, simple features and labels of all events."""
    for part, name in ((TOWER_PART, "A"), (RANKER_PART, "B"), (VALIDATION, "validation"), (TEST, "test")):
        labels = events.label[events.part == part]
        if not 0 < labels.sum() < len(labels):
            raise ValueError(
                f"part {name} has {len(labels)} events, {int(labels.sum())} of them with a value of cvr.liked_from = "
                f"{config.split.liked_from:g} or more, and a ranking model learns from both kinds"
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


def run_seed(config: RankConfig, seed: int, data: tuple[Dataset, Tensor, Table], arms: list[str], out: Path) -> None:
    """Towers and head once, the starting point once, then every arm."""
    dataset, content, table = data
    learned = learn_features.learn(config.mid, seed, content, dataset, table.events, out / f"towers-seed{seed}.jsonl")
    found = learn_features.features(learned, config.mid, content, dataset, table.events)
    start, seconds = starting_point(config, seed, table)
    shared_seconds = learned.seconds | {"starting_point": seconds}
    for arm in arms:
        begin = time.monotonic()
        record = run_arm(config, arm, seed, table, (start, found))
        record["seconds"] = shared_seconds | {"ranker": round(time.monotonic() - begin, 1)}
        record["learned"] = {name: _rounded(value) for name, value in learned.figures.items()}
        _write(_path(out, arm, seed), record)


def starting_point(config: RankConfig, seed: int, table: Table) -> tuple[Ranker, float]:
    """The ranker that "was there before": the towers' part, no extra features. Returns it with its seconds."""
    begin = time.monotonic()
    torch.manual_seed(seed)
    blank = Ranker(config.ranker, table.widths)
    no_extra = table.plain.extra
    train, validation = table.inputs(no_extra, TOWER_PART), table.inputs(no_extra, VALIDATION)
    fitted = ranker.fit(blank, train, validation, config.trials[0], seed)
    return fitted.model, round(time.monotonic() - begin, 1)


def run_arm(config: RankConfig, arm: str, seed: int, table: Table, made: tuple[Ranker, Features]) -> dict[str, Any]:
    """Trains one arm on the ranker's part and measures it on the test events; the record lacks `seconds` only."""
    start, found = made
    extra = extra_features(table, found, ARMS[arm])
    torch.manual_seed(seed)
    wide = start.widened(extra.shape[1])
    train, validation = table.inputs(extra, RANKER_PART), table.inputs(extra, VALIDATION)
    fitted, trial = ranker.best_fit(wide, train, validation, config.trials, seed)
    scores = np.round(ranker.scores(fitted.model, table.inputs(extra, TEST)).astype(np.float64), 5)
    events = held_out(table)
    metrics = {
        name: auc_metrics.measure(scores, events, mask)
        for name, mask in auc_metrics.groups(events, config.groups).items()
    }
    return {
        **_head(config, arm, seed, table),
        "chosen": asdict(trial) | {"epochs": fitted.epochs, "validation_log_loss": _rounded(fitted.validation_loss)},
        "metrics": metrics,
        "scores": scores.tolist(),
    }


def extra_features(table: Table, found: Features, blocks: tuple[str, ...]) -> Tensor:
    """[n,X] of every event after the towers' part, each column standardised over the ranker's part."""
    later = table.events.rows(RANKER_PART, VALIDATION, TEST)
    if not blocks:
        return torch.zeros(len(later), 0)
    known = {"mid_emb": found.mid_emb, "user": found.user, "item": found.item}
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


def shared(config: RankConfig, dataset: Dataset, table: Table) -> dict[str, Any]:
    """The content of test_events.json."""
    events, rows = held_out(table), table.events.rows(TEST)
    names = {user: dataset.sequences[user].user for user in np.unique(events.user).tolist()}
    return {
        "format": FORMAT,
        "kind": "test_events",
        "study": config.study,
        "label_is": label_of(config),
        "split": asdict(config.split),
        "groups": asdict(config.groups),
        "n_events": {name: int((table.events.part == part).sum()) for name, part in _PARTS.items()},
        "user": [names[user] for user in events.user.tolist()],
        "item": [dataset.item_ids[item] for item in table.events.item[rows]],
        "label": events.label.astype(int).tolist(),
        "item_train_count": events.item_train_count.tolist(),
        "user_train_count": events.user_train_count.tolist(),
    }


_PARTS = {"A": TOWER_PART, "B": RANKER_PART, "validation": VALIDATION, "test": TEST}


def name_of(folder: Path) -> str:
    """What the study in this folder is called."""
    return json.loads((folder / "test_events.json").read_text())["study"]


def summarise(folder: Path, n_draws: int = 10_000) -> list[Row]:
    """Every arm, group and metric of a finished study, from its files alone; `n_draws` replicates of the bootstrap."""
    common = json.loads((folder / "test_events.json").read_text())
    user = np.unique(np.array(common["user"]), return_inverse=True)[1]
    columns = (np.array(common[name]) for name in ("label", "item_train_count", "user_train_count"))
    events = HeldOut(user, *columns)
    bounds = {name: tuple(value) for name, value in common["groups"].items()}
    by_arm: dict[str, dict[int, np.ndarray]] = {}
    origin: dict[str, Any] | None = None
    for path in sorted(folder.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        if len(record["scores"]) != len(user):
            raise ValueError(f"{path}: {len(record['scores'])} scores for {len(user)} test events")
        of = {key: record.get(key) for key in ("data", "config")}
        origin = origin or of
        if of != origin:
            raise ValueError(f"{path}: of other data or another config than the files before it; run the study again")
        by_arm.setdefault(record["arm"], {})[record["seed"]] = np.array(record["scores"])
    if CONTROL not in by_arm:
        raise ValueError(f"{folder}: no record of the arm {CONTROL!r}")
    rows = []
    for arm in [name for name in ARMS if name in by_arm]:
        masks = auc_metrics.groups(events, GroupConfig(**bounds))
        for group, mask in masks.items():
            rows += _arm_rows(arm, group, by_arm, (events, mask), n_draws)
        if arm != CONTROL:
            for pair in CONTRASTS:
                rows += _contrast_rows(arm, pair, by_arm, (events, masks), n_draws)
    return rows


def _contrast_rows(arm: str, pair: tuple[str, str], by_arm: dict, within: tuple, n_draws: int) -> list[Row]:
    events, masks = within
    treated, control = _both(by_arm, arm)
    gap = None
    if len(treated):
        gap = auc_metrics.contrast(treated, control, events, (masks[pair[0]], masks[pair[1]]), (n_draws, 0))
    if gap is None:
        return []
    measured = [auc_metrics.measure(treated[0], events, masks[group]) for group in pair]
    sizes = (min(part[name] for part in measured) for name in ("n_users", "n_events"))
    name, found = auc_metrics.contrast_name(*pair), (gap.difference, gap.low, gap.high, gap.p)
    return [Row(arm, name, "uauc", None, *found, *sizes, len(treated))]


def _both(by_arm: dict, arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores [seeds,n] of the arm and of the control, for the seeds that both have."""
    seeds = sorted(by_arm[arm].keys() & by_arm[CONTROL].keys())
    treated, control = (np.array([by_arm[name][seed] for seed in seeds]) for name in (arm, CONTROL))
    return treated, control


def _arm_rows(arm: str, group: str, by_arm: dict, within: tuple[HeldOut, np.ndarray], n_draws: int) -> list[Row]:
    events, mask = within
    measured = [auc_metrics.measure(scores, events, mask) for scores in by_arm[arm].values()]
    treated, control = _both(by_arm, arm)
    gaps = {}
    if arm != CONTROL and len(treated):
        gaps = auc_metrics.paired(treated, control, events, mask, (n_draws, 0))
    rows = []
    for metric in auc_metrics.METRICS:
        values = [figures[metric] for figures in measured]
        figure = None if None in values else float(np.mean(values))
        gap = gaps.get(metric)
        found = (gap.difference, gap.low, gap.high, gap.p) if gap else (None,) * 4
        sizes = (measured[0]["n_users"], measured[0]["n_events"], len(treated))
        rows.append(Row(arm, group, metric, figure, *found, *sizes))
    return rows


def text(rows: list[Row], metrics: tuple[str, ...] = ("auc", "uauc", "wuauc")) -> str:
    """The rows as a plain table, fit for a terminal."""
    lines = [f"{'group':18} {'metric':6} {'arm':20} {'figure':>7}  difference to {CONTROL} [95 % interval], p"]
    order = {name: place for place, name in enumerate(dict.fromkeys(row.group for row in rows))}
    for row in sorted(rows, key=lambda row: (order[row.group], auc_metrics.METRICS.index(row.metric))):
        if row.metric not in metrics or (row.figure is None and row.difference is None):
            continue
        gap = ""
        if row.difference is not None:
            gap = f"  {row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}], p {row.p:.3f}"
        group = f"{row.group} ({row.n_users})"
        figure = "" if row.figure is None else f"{row.figure:.4f}"
        lines.append(f"{group:24} {row.metric:6} {row.arm:20} {figure:>7}{gap}")
    return "\n".join(lines)


def label_of(config: RankConfig) -> str:
    """What the labels are, in words."""
    return f"proxy: value >= {config.split.liked_from:g} among items the user met"


def _digest(events: Events, content: Tensor) -> str:
    """SHA-256 over who met what when, with which value, and the content embeddings."""
    found = hashlib.sha256(content.numpy().tobytes())
    for column in (events.user, events.item, events.value, events.clock, events.part):
        found.update(np.ascontiguousarray(column).tobytes())
    return found.hexdigest()


def _head(config: RankConfig, arm: str, seed: int, table: Table) -> dict[str, Any]:
    # What does not change this record is left out, so that more seeds or arms can be added to a study.
    settings = {name: value for name, value in asdict(config).items() if name not in ("study", "seeds", "arms")}
    head = {"format": FORMAT, "kind": "ranking", "study": config.study, "arm": arm, "label": label_of(config)}
    return head | {"seed": seed, "data": table.digest, "config": as_read(settings)}


def _is_done(path: Path, config: RankConfig, arm: str, table: Table) -> bool:
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    wanted = _head(config, arm, record["seed"], table)
    return all(record.get(key) == wanted[key] for key in ("data", "config"))


def _path(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm}-seed{seed}.json"


def _write(path: Path, record: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n")
    partial.rename(path)


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
