"""One training run as a folder: each step reads the results of earlier steps from it and writes its own.

    data/            the prepared data set                 (prepare)
    cache/           content embeddings, by digest, and    (encode)
                     the encoder's graph if it is in int8
    encoder-int8-*/  the int8 graph that the towers are    (train)
                     trained on, for the steps after it
    train.jsonl      one line per check                    (train)
    checkpoint.pt    where a stopped training resumes      (train)
    towers.safetensors: sizes and weights of the towers, and the runs they were trained in (train)
    cvr.safetensors  sizes and weights of the head, and    (cvr)
                     which items its histories held
    tuned.safetensors   the towers again, if it tunes them (cvr)
    cvr.json         its figures                           (cvr)
    metrics.json     the towers' figures                   (evaluate)
    ranking/, ranking-lightgbm/: a record per arm and seed (rank, in research)
    ranking-towers/  towers of the past, their features    (rank, in research)

Apart from this folder, steps read only the raw data (prepare), the encoder's folder and, with `--from`, the towers of
another run. Files of earlier versions (towers.pt, cvr.pt and tuned.pt) are still read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn import data
from learn.atomic_file import replacing
from learn.content import ceg, embedding_store
from learn.content.graph_encoder import GraphEncoder
from learn.content.standardise import fits_in_memory
from learn.data.actions import ActionThresholds
from learn.data.item_text import Prompts
from learn.evaluation import full_ranking
from learn.models import weights_file
from learn.models.cvr import CvrConfig, CvrHead
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import Learn
from learn.run_settings import PrepareSettings, Settings
from learn.serving import int8_encoder, shipped_bundle, verify_cases
from learn.serving.tolerances import SINGLE_PRECISION, Tolerance
from learn.training import content_skip, data_parallel, log_needs
from learn.training.cvr_config import History
from learn.training.train_cvr_head import CvrData, train_head
from learn.training.train_recommender import train


@dataclass(frozen=True)
class Run:
    """A run's folder, the folder of its encoder, and its settings."""

    folder: Path
    encoder: Path
    settings: Settings

    def __post_init__(self) -> None:
        self.settings.encoder.check()

    def prepare(self, source: Path | str | data.NeutralFiles) -> None:
        """Reads a data set of any supported layout from `source` and writes data/."""
        data.prepare(source, self.folder / "data", prepare_config(self.settings.prepare, self.settings.chosen_split()))

    def dataset(self) -> data.Dataset:
        """The data set that `prepare` wrote. If the log has no actions, `settings.actions` reads them from values."""
        return data.read_prepared(self.folder / "data", self.settings.actions)

    def split(self, dataset: data.Dataset) -> data.Split:
        """The split into training, validation and test events."""
        return data.split(dataset.sequences, self.settings.chosen_split())

    @cached_property
    def _model(self) -> ceg.EncoderFolder:
        """The frozen language model in floating point, not loaded yet."""
        wanted = self.settings.encoder
        load_config = ceg.LoadConfig(device=wanted.device, dtype=wanted.dtype)
        return ceg.EncoderFolder(self.encoder, wanted.max_tokens, load_config)

    @cached_property
    def source(self) -> ceg.EncoderFolder | GraphEncoder:
        """The encoder to train on: the model, not loaded yet; in int8, its graph, which is made if cache/ lacks it."""
        wanted = self.settings.encoder
        if wanted.precision == "float":
            return self._model
        texts = self.dataset().texts
        if wanted.int8_from:
            return int8_encoder.reused(Path(wanted.int8_from), self._model, texts, self.folder)
        return int8_encoder.of_run(self._model, texts, self.folder)

    @cached_property
    def trained_source(self) -> ceg.EncoderFolder | GraphEncoder:
        """The encoder that the towers were trained on; in int8, the graph that `train` kept.

        Raises ValueError for towers of another precision than that of the settings.
        """
        path, wanted = weights_file.path_in(self.folder, "towers"), self.settings.encoder.precision
        # The first version with int8 did not name the graph.
        graph = _read(path, "train").get("graph", int8_encoder.only_kept(self.folder))
        trained = "int8" if graph else "float"
        if trained != wanted:
            raise ValueError(
                f'{path}: its towers were trained with encoder.precision = "{trained}", but the settings say '
                f'"{wanted}": pass --encoder-precision {trained} (encoder.precision in --config), or train again'
            )
        return int8_encoder.kept(self.folder, graph, self._model) if graph else self._model

    def content(self, dataset: data.Dataset) -> Tensor:
        """Content embeddings of the catalogue [I,C]. Only texts that are not in cache/ are encoded.

        They are fp32 if they fit in memory (`standardise.IN_MEMORY_BYTES`), else a memory map as stored.
        """
        return self._content(self.source, dataset)

    def _content(self, encoder: ceg.EncoderFolder | GraphEncoder, dataset: data.Dataset) -> Tensor:
        storage = embedding_store.StoreConfig(dtype=self.settings.encoder.storage)
        found = embedding_store.encode_cached(encoder, Prompts(dataset.texts), self.folder / "cache", storage)
        content = torch.from_numpy(found)
        return content.float() if fits_in_memory(content) else content

    def train(self, start: Path | None = None) -> None:
        """Trains the towers and saves them; `pch.content_dim` is set to the width of the encoder's output.

        `start` is the folder of another run. Training then starts from that run's towers instead of random ones. They
        need the same sizes and the same encoder, but may come from other data, since towers know items only by text.
        """
        settings = self.settings
        self.check_towers()
        data_parallel.start()
        encoder = data_parallel.first_then_others(lambda: self.source)
        # Read now, because encoder and data may have changed on disk by the time training ends.
        origin, own = self._origin(encoder), self._generation()
        first_towers = None if start is None else self.towers_of(start)
        dataset, device = self.dataset(), data_parallel.device()
        graph = encoder.folder.name if isinstance(encoder, GraphEncoder) else None
        if graph and data_parallel.is_first():
            int8_encoder.keep(encoder, self.folder)
        content = data_parallel.first_then_others(lambda: self.content(dataset))
        # The skip is attached to the trained towers.
        sizes = replace(settings.pch, content_dim=content.shape[1], skip_dim=0)
        torch.manual_seed(settings.train.seed)
        model = Learn(Pch(sizes), content, settings.standardise, settings.ids, settings.id_dropout)
        if first_towers is not None:
            model.load_towers(first_towers["weights"])
        model = model.to(device)
        split = self.split(dataset)
        content_skip.check(settings.pch.skip_dim, content.shape[1], split)
        train(settings.train, model, dataset, split, self.folder)
        if settings.pch.skip_dim:
            tried = content_skip.attach(model, content, settings.pch.skip_dim, dataset, split)
            if data_parallel.is_first():
                print(content_skip.table(tried))
            if content_skip.chosen(tried).weight == 0.0:
                model.pch.detach()
        model.cpu().finish()
        if data_parallel.is_first():
            # These belong to the towers that are replaced here.
            self._remove_results("tuned", "cvr")
            lineage = [*(first_towers["lineage"] if first_towers else []), own]
            facts = {"origin": origin, "lineage": lineage, "graph": graph}
            weights_file.write(self.folder, "towers", model.pch, model.pch.config, facts)
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
            int8_encoder.forget_others(graph, self.folder)
        data_parallel.stop()

    def check_towers(self) -> None:
        """Raises ValueError for settings of towers that cannot be trained or served."""
        if self.settings.pch.item_tower == "content":
            raise ValueError('pch.item_tower = "content" has no item tower to serve; `learn study` can compare it')
        log_needs.check_actions(self.dataset().sequences, self.settings.pch.actions)

    def action_thresholds(self) -> ActionThresholds | None:
        """How values became the towers' actions; None if the towers read none, or the log has actions of its own.

        The later steps of a run refuse other thresholds than those that its towers were trained with.
        """
        if not self.settings.pch.actions or data.read_meta(self.folder / "data").has_actions:
            return None
        return self.settings.actions

    def towers(self) -> Pch:
        """The towers that `train` wrote, or those that `cvr` tuned, if it did."""
        saved = self._load(_trained_towers(self.folder), "train")
        pch = Pch(PchConfig(**saved["sizes"]))
        pch.load_state_dict(saved["weights"])
        return pch.eval()

    def towers_of(self, other: Path) -> dict[str, Any]:
        """The saved towers of another run, for this run to start training from.

        Raises ValueError if they do not fit this run, or may have been trained on events that it holds out.
        """
        path = _trained_towers(other)
        saved, own = _read(path, "train"), self._generation()
        if not saved.get("lineage"):
            raise ValueError(f"{path} was written by an earlier version and does not say what it was trained on")
        for past in saved["lineage"]:
            if past["events"] == own["events"] and past["split"] != own["split"]:
                raise ValueError(
                    f"{path}: its towers were trained in the run {past['run']} on the same events with "
                    f"{past['split']} held out, but this run holds out {own['split']}, so they may have seen its test "
                    "events; use the same split in both runs"
                )
        # Sizes that an earlier version did not know have their defaults.
        found = {"encoder": saved["origin"]["encoder"], **asdict(PchConfig(**saved["sizes"]))}
        encoder = self._origin(self.source)["encoder"]
        is_own_graph = isinstance(self.source, GraphEncoder) and not self.settings.encoder.int8_from
        is_same_model = found["encoder"].rsplit(" ", 1)[0] == encoder.rsplit(" ", 1)[0]
        if found["encoder"] != encoder and saved.get("graph") and is_own_graph and is_same_model:
            raise ValueError(
                f"{path}: its towers were trained on another int8 graph, as each catalogue gives another one: export "
                "that run, and name its bundle as encoder.int8_from in --config, so that this run uses the same graph"
            )
        for name, wanted in {"encoder": encoder, **asdict(self.settings.pch)}.items():
            # The same encoder gives the same content_dim; the other settings here have no weights and may differ.
            is_free = name in ("content_dim", "dropout", "skip_dim") or (
                (name == "max_history" and self.settings.pch.positions == "none")
                or (name == "item_tower" and "adapted" not in (found[name], wanted))
            )
            if found[name] != wanted and not is_free:
                raise ValueError(f"{path}: its towers have {name} = {found[name]!r}, but this run needs {wanted!r}")
        return saved

    def started_from(self) -> tuple[str, ...]:
        """The names of the runs that this run's towers were trained in before, oldest first."""
        lineage = self._load(weights_file.path_in(self.folder, "towers"), "train")["lineage"]
        return tuple(past["run"] for past in lineage[:-1])

    def _generation(self) -> dict[str, Any]:
        """This run's entry in the `lineage` of its towers, which has one entry per run, oldest first."""
        # Only users and times identify the log, so it is the same log whatever the order of the catalogue.
        files = data.read_meta(self.folder / "data").files
        events = " ".join(files[name] for name in ("users.txt", "offsets.npy", "timestamps.npy"))
        own = {"run": self.folder.resolve().name, "events": events, "split": asdict(self.settings.chosen_split())}
        return weights_file.plain(own)

    def check_labels(self) -> None:
        """Raises ValueError if all events are conversions or none is, so that a head has nothing to learn."""
        dataset = self.dataset()
        log_needs.check_liked(dataset.sequences, self.settings.cvr)
        log_needs.check_both_labels(dataset.sequences, self.split(dataset), self.settings.cvr)

    def train_cvr(self) -> None:
        """Trains the head and saves it; with `cvr.tune_towers`, saves the tuned towers as well."""
        self.check_labels()
        trained = self._load(weights_file.path_in(self.folder, "towers"), "train")
        self._remove_results("tuned", "cvr")
        dataset, pch = self.dataset(), self.towers()
        sizes = replace(self.settings.head, in_dim=pch.config.embedding_dim)
        cvr_data = CvrData(self._content(self.trained_source, dataset), dataset, self.split(dataset))
        head, figures = train_head(self.settings.cvr, sizes, pch, cvr_data, self.settings.train)
        if self.settings.cvr.tune_towers:
            facts = {name: trained.get(name) for name in ("origin", "lineage", "graph")}
            weights_file.write(self.folder, "tuned", pch, pch.config, facts)
        facts = {"origin": trained["origin"], "history": self.settings.cvr.history, "task": self.settings.cvr.task}
        weights_file.write(self.folder, "cvr", head, head.config, facts)
        _report(self.folder / "cvr.json", figures)

    def head(self) -> CvrHead:
        """The head that `train_cvr` wrote."""
        saved = self._load(weights_file.path_in(self.folder, "cvr"), "cvr")
        head = CvrHead(CvrConfig(**saved["sizes"]))
        head.load_state_dict(saved["weights"])
        return head.eval()

    def keeps(self) -> History:
        """Which of a user's earlier items the head was trained on, as the training recorded it.

        Where an earlier version trained the head, it is taken from the settings, and that is printed.
        """
        if found := self._load(path := weights_file.path_in(self.folder, "cvr"), "cvr").get("history"):
            return found
        assumed = self.settings.cvr.history
        print(
            f'history.keeps = "{assumed}" is assumed, from cvr.history of the settings, because an earlier version '
            f"wrote {path} and did not record it: pass that run's config, or train the head again"
        )
        return assumed

    def content_tolerance(self) -> Tolerance:
        """How far a server's content embeddings may be from those of this run's encoder."""
        source = self.trained_source
        return Tolerance(**source.facts.tolerance) if isinstance(source, GraphEncoder) else SINGLE_PRECISION

    def cases(self, n_users: int) -> Iterator[verify_cases.Case]:
        """Requests for `n_users` of the run's users, each with the answer that PyTorch computes.

        A request holds the user's newest history and, as candidates, the last items of all these users. Histories are
        up to twice as long as the tower reads, to check where the server truncates them.
        """
        dataset, longest = self.dataset(), 2 * self.settings.pch.max_history
        towers = verify_cases.Towers(self.trained_source.loaded(), self.towers(), self.head())
        users = np.linspace(0, len(dataset.sequences) - 1, n_users).astype(int).tolist()
        shown = sorted({int(dataset.sequences[user].items[-1]) for user in users})
        pages = [(dataset.sequences[user].items[-longest:].tolist(), shown) for user in users]
        return verify_cases.torch_cases(towers, dataset.texts, pages)

    def evaluate(self) -> None:
        """Measures the towers, and popularity as a baseline, on the test events and writes metrics.json."""
        dataset, pch = self.dataset(), self.towers()
        content, split = self._content(self.trained_source, dataset), self.split(dataset)
        towers = full_ranking.metrics(full_ranking.tower_ranks(pch, content, dataset, split.test))
        popular = full_ranking.metrics(full_ranking.popularity_ranks(dataset, split, split.test))
        figures = towers | {f"popularity_{name}": value for name, value in popular.items()}
        figures |= full_ranking.sequence_against_alone(pch, content, dataset, split.test)
        figures |= {"n_users": len(dataset.sequences), "n_items": len(dataset.item_ids), "n_test": len(split.test)}
        _report(self.folder / "metrics.json", figures)

    def _origin(self, encoder: ceg.EncoderFolder | GraphEncoder) -> dict[str, Any]:
        """The split, the encoder and the meaning of actions, which towers, head and metrics of one run must share."""
        name = f"{self.encoder.resolve().name} {encoder.identity.hexdigest()[:12]}"
        origin = {"split": asdict(self.settings.chosen_split()), "encoder": name}
        thresholds = self.action_thresholds()
        return weights_file.plain(origin if thresholds is None else origin | {"actions": asdict(thresholds)})

    def _load(self, path: Path, step: str) -> dict[str, Any]:
        saved = _read(path, step)
        origin, own = saved.get("origin"), self._origin(self.trained_source)
        if origin != own:
            raise ValueError(
                f"{path}: its towers were trained with {origin}, but the settings say {own}; "
                "train again, or pass the config of that training"
            )
        return saved

    def _remove_results(self, *stems: str) -> None:
        """Removes these weights, and the figures that were measured with them."""
        for stem in stems:
            weights_file.remove(self.folder, stem)
        for name in ("cvr.json", "metrics.json"):
            (self.folder / name).unlink(missing_ok=True)

    def export(self, out: Path, label: shipped_bundle.Label, facts: dict[str, Any]) -> None:
        """Writes the run's models as a bundle; its manifest gets `facts` and the metrics of this run."""
        figures = {}
        for name, step in (("metrics.json", "evaluate"), ("cvr.json", "cvr")):
            figures |= json.loads(_there(self.folder / name, step).read_text())
        held_out = self.settings.chosen_split()
        with (self.folder / "train.jsonl").open() as file:
            config = json.loads(file.readline())["config"]
        figures |= {"seed": config["seed"], "steps": config["steps"]}
        facts = facts | {"held_out": {name: value for name, value in asdict(held_out).items() if value is not None}}
        if started_from := self.started_from():
            facts = facts | {"started_from": list(started_from)}
        facts = facts | {"metrics": {name: _rounded(value) for name, value in figures.items()}}
        source, values = self.trained_source.loaded(), self.action_thresholds()
        if values is None and self.keeps() == "liked" and not data.read_meta(self.folder / "data").has_actions:
            values = ActionThresholds(self.settings.cvr.liked_from)
        trained = shipped_bundle.Trained(source, self.towers(), self.head(), self.keeps(), values)
        shipped_bundle.write_default(trained, facts, out, label)


def prepare_config(wanted: PrepareSettings, split: data.SplitConfig | data.TimeSplitConfig) -> data.PrepareConfig:
    """Turns the settings into the config of `data.prepare`."""
    fields = None if wanted.text_fields is None else tuple(wanted.text_fields)
    return data.PrepareConfig(
        split=split,
        max_keywords=wanted.max_keywords,
        min_user_events=wanted.min_user_events,
        min_item_events=wanted.min_item_events,
        text_fields=fields,
        memory_mb=wanted.memory_mb,
    )


def _trained_towers(run: Path) -> Path:
    tuned = weights_file.path_in(run, "tuned")
    return tuned if tuned.is_file() else weights_file.path_in(run, "towers")


def _read(path: Path, step: str) -> dict[str, Any]:
    try:
        return weights_file.read(_there(path, step))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read; write it again with `learn {step}`: {error}") from error


def _there(path: Path, step: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `learn {step}` writes it")
    return path


def _report(path: Path, figures: dict[str, float]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(figures, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name:32} {_rounded(value)}")


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, 5)
