"""LEARN's features for the ranking study, made as a team makes them: a run on the past, its bundle, `learn features`.

    FOLDER/job.json          what all of this depends on; if that has changed, the folder is made anew
    FOLDER/past/             the towers' part of the log and the catalogue, in the neutral format
    FOLDER/run/              `learn prepare`, `train`, `cvr` and `evaluate` on it; cache/ is that of the study's run
    FOLDER/bundle/           `learn export`
    FOLDER/log.parquet       the whole log
    FOLDER/samples.parquet   every event after the towers' part
    FOLDER/features/         `learn features` with these
    FOLDER/seconds.json      how long each step took; written last

The towers never see anything but `past/`, and a sample's history is what happened strictly before it. A study that was
stopped continues with the step that is missing; training and `learn features` continue in the middle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from learn.atomic_file import replacing
from learn.data import Dataset, has_own_actions
from learn.data.actions import ACTIONS
from learn.models import weights_file
from learn.run_settings import PrepareSettings, Settings
from learn.serving.features import STATUS, VECTORS, FeaturesConfig, compute_features
from learn.serving.shipped_bundle import Label
from learn.toml_config import as_read
from learn.training_run import Run
from research.ranking.event_parts import RANKER_PART, TEST, TOWER_PART, VALIDATION, Events

# The key of a sample: the index of its event.
EVENT = "event"


@dataclass(frozen=True)
class Features:
    """One row per event after the towers' part: mid_emb [n,M], user [n,E] and item [n,E] embedding, CVR logit [n,1].

    All are 0 where `learn features` has no vectors, as for an item whose text is too long.
    """

    mid_emb: Tensor
    user: Tensor
    item: Tensor
    logit: Tensor


@dataclass(frozen=True)
class Learned:
    """The features of one seed, the figures of its towers and head, and seconds per step."""

    features: Features
    figures: dict[str, float]
    seconds: dict[str, float]


# From the seed of towers and head to their features.
FeatureSource = Callable[[int], Learned]


def learn(run: Run, seed: int, dataset: Dataset, events: Events, folder: Path) -> Learned:
    """Trains towers and head on the towers' part, or continues, and returns the features of all later events.

    `run` has the data, the encoder and the settings. Within their part, the towers hold out `settings.split`.
    """
    settings = settings_of(run.settings, seed)
    _claim(
        folder,
        {"seed": seed, "events": digest(dataset, events), "encoder": encoder_of(run), "settings": recorded(settings)},
    )
    own = Run(folder / "run", run.encoder, settings)
    steps = {
        "towers": lambda: _train(run, own, dataset, events, folder),
        "export": lambda: own.export(folder / "bundle", Label("ranking-study", str(seed)), {"data": "ranking study"}),
        "features": lambda: _compute(settings, dataset, events, folder),
    }
    seconds: dict[str, float] = {}
    if (path := folder / "seconds.json").is_file():
        seconds = json.loads(path.read_text())
    for name, step in steps.items():
        if name not in seconds:
            begin = time.monotonic()
            step()
            seconds[name] = round(time.monotonic() - begin, 1)
            with replacing(path) as partial:
                partial.write_text(json.dumps(seconds) + "\n")
    figures = {}
    for name in ("metrics.json", "cvr.json"):
        figures |= json.loads((own.folder / name).read_text())
    figures = {name: float(value) for name, value in figures.items()}
    return Learned(read_features(folder / "features", events), figures, seconds)


def settings_of(settings: Settings, seed: int) -> Settings:
    """The settings of a seed's towers: no filters, which the study's own log has passed, and no second cut in time."""
    plain = PrepareSettings(memory_mb=settings.prepare.memory_mb)
    return replace(settings.with_seed(seed), prepare=plain, time_split=None)


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings that features depend on, as a record holds them, without the seeds: a record has its own."""
    kept = asdict(settings)
    kept["pch"] = settings.pch.recorded()
    for part in ("train", "cvr"):
        del kept[part]["seed"]
    parts = ("encoder", "split", "actions", "standardise", "pch", "train", "head", "cvr")
    return as_read({name: kept[name] for name in parts})


def encoder_of(run: Run) -> str:
    """Which encoder computes the content."""
    return run.source.identity.hexdigest()


def digest(dataset: Dataset, events: Events) -> str:
    """SHA-256 over who met what when, with which value, in which part, and the texts of the items."""
    found = hashlib.sha256()
    for column in (events.user, events.item, events.value, events.clock, events.part):
        found.update(np.ascontiguousarray(column).tobytes())
    if has_own_actions(dataset):
        for sequence in dataset.sequences:
            found.update(sequence.actions.tobytes())
    for item_id, text in zip(dataset.item_ids, dataset.texts, strict=True):
        found.update(json.dumps([item_id, text.to_json()]).encode())
    return found.hexdigest()


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Removes what was made for another job."""
    path = folder / "job.json"
    if path.is_file() and json.loads(path.read_text()) == job:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(job, indent=1) + "\n")


def _train(run: Run, own: Run, dataset: Dataset, events: Events, folder: Path) -> None:
    past = folder / "past"
    if not (own.folder / "data" / "meta.json").is_file():
        shutil.rmtree(past, ignore_errors=True)
        past.mkdir()
        pq.write_table(log_table(dataset, events, events.rows(TOWER_PART)), past / "interactions.parquet")
        _write_items(dataset, past / "items.jsonl")
        own.prepare(past)
    if not (own.folder / "cache").exists():
        # The catalogue is that of the study's run, so its content is encoded once for all seeds.
        cache = (run.folder / "cache").resolve()
        cache.mkdir(parents=True, exist_ok=True)
        (own.folder / "cache").symlink_to(cache, target_is_directory=True)
    # A mistake in the labels should be found before the towers are trained.
    own.check_labels()
    if not weights_file.path_in(own.folder, "towers").is_file():
        own.train()
    own.train_cvr()
    own.evaluate()


def _compute(settings: Settings, dataset: Dataset, events: Events, folder: Path) -> None:
    later = events.rows(RANKER_PART, VALIDATION, TEST)
    for name, rows in (("log", np.arange(len(events.user))), ("samples", later)):
        path = folder / f"{name}.parquet"
        # `learn features` takes a file that was written again for another one.
        if not path.is_file():
            with replacing(path) as partial:
                table = log_table(dataset, events, rows)
                pq.write_table(table if name == "log" else sample_table(table, rows), partial)
    # For a log with values: as the towers learned them, or which items are liked, if the towers read no actions.
    liked_from = settings.actions.liked_from if settings.pch.actions else settings.cvr.liked_from
    config = FeaturesConfig(
        folder / "bundle",
        str(folder / "log.parquet"),
        str(folder / "samples.parquet"),
        folder / "past" / "items.jsonl",
        folder / "features",
        outputs=VECTORS,
        liked_from=liked_from,
        disliked_to=settings.actions.disliked_to if settings.pch.actions else None,
    )
    compute_features(config)


def log_table(dataset: Dataset, events: Events, rows: np.ndarray) -> pa.Table:
    """These events as `learn prepare` and `learn features` read them; actions only if the log has any."""
    users, items = pa.array([sequence.user for sequence in dataset.sequences]), pa.array(dataset.item_ids)
    columns = {
        "user": users.take(pa.array(events.user[rows])),
        "item": items.take(pa.array(events.item[rows])),
        "timestamp": pa.array(events.clock[rows].astype(np.int64)),
        "value": pa.array(events.value[rows].astype(np.float64)),
    }
    if has_own_actions(dataset):
        action = np.concatenate([np.asarray(sequence.actions) for sequence in dataset.sequences])
        columns["action"] = pa.array(np.array(["", *ACTIONS])[action[rows]].tolist(), pa.string())
    return pa.table(columns)


def sample_table(log: pa.Table, rows: np.ndarray) -> pa.Table:
    """The samples of these events; nothing that is known only after them is in it."""
    return log.select(["user", "item", "timestamp"]).append_column(EVENT, pa.array(rows.astype(np.int64)))


def _write_items(dataset: Dataset, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for item_id, text in zip(dataset.item_ids, dataset.texts, strict=True):
            given = {name: value for name, value in text.to_json().items() if value}
            file.write(json.dumps({"id": item_id, "text": given}, ensure_ascii=False) + "\n")


def read_features(folder: Path, events: Events) -> Features:
    """Reads the table of `learn features` in the order of `events.rows(RANKER_PART, VALIDATION, TEST)`.

    ValueError if a sample is missing or if a vector could not be computed.
    """
    columns = [EVENT, STATUS, *VECTORS]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in sorted(folder.glob("part-*.parquet"))])
    order = np.argsort(table[EVENT].to_numpy())
    table = table.take(pa.array(order))
    if not np.array_equal(table[EVENT].to_numpy(), events.rows(RANKER_PART, VALIDATION, TEST)):
        raise ValueError(f"{folder}: its samples are not the events after the towers' part; remove the folder")
    status = np.array(table[STATUS].to_pylist())
    if (status == "FAILED").any():
        raise ValueError(f"{folder}: {int((status == 'FAILED').sum())} samples have vectors that are not finite")
    vectors = {name: _filled(table[name].combine_chunks(), status == "OK") for name in VECTORS}
    cvr = vectors["cvr"].clamp(1e-6, 1 - 1e-6)
    logit = torch.where(torch.from_numpy(status == "OK")[:, None], torch.logit(cvr), 0.0)
    return Features(vectors["mid_emb"], vectors["user_emb"], vectors["item_emb"], logit)


def _filled(column: pa.Array, is_ok: np.ndarray) -> Tensor:
    """[n,width] f32 with zeros in the rows that are not OK."""
    is_list = pa.types.is_fixed_size_list(column.type)
    width = column.type.list_size if is_list else 1
    known = column.filter(pa.array(is_ok))
    values = np.zeros((len(column), width), np.float32)
    values[is_ok] = (known.flatten() if is_list else known).to_numpy(zero_copy_only=False).reshape(-1, width)
    return torch.from_numpy(values)
