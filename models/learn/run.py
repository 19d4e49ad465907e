"""One training run as a folder: each step reads what the steps before it left there, and leaves its own.

    data/            the neutral data set                  (prepare)
    cache/           content embeddings, by digest         (encode)
    train.jsonl      a line a check                        (train)
    towers.pt        sizes and weights of the towers       (train)
    cvr.pt           sizes and weights of the head         (cvr)
    cvr.json         its figures                           (cvr)
    metrics.json     the towers' figures                   (evaluate)

Nothing is read from anywhere else but the encoder's folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learn import ceg, data, default, evaluate
from learn.cvr import CvrConfig, CvrHead
from learn.cvr_train import CvrTrainConfig, train_head
from learn.item_text import render
from learn.pch import Pch, PchConfig
from learn.recommender import Learn
from learn.standardise import Method
from learn.train import TrainConfig, train


@dataclass(frozen=True)
class Run:
    """Where a run lives, what it encodes with, and what it holds out."""

    folder: Path
    encoder: Path
    split: data.SplitConfig
    standardise: Method = "scale"

    def prepare(self, movielens: Path) -> None:
        """A MovieLens folder -> data/."""
        data.write_neutral(*data.read_movielens(movielens), self.folder / "data")
        dataset = self.dataset()
        n_events = sum(len(sequence.items) for sequence in dataset.sequences)
        print(f"{len(dataset.sequences)} users, {len(dataset.item_ids)} items, {n_events} events")

    def dataset(self) -> data.Dataset:
        """What `prepare` wrote."""
        return data.read_neutral(self.folder / "data")

    def load_encoder(self) -> ceg.Encoder:
        """The frozen language model."""
        return ceg.load(self.encoder, default.MAX_TOKENS)

    def content(self, dataset: data.Dataset) -> Tensor:
        """[I,C], from the cache if it is there."""
        prompts = [render(text) for text in dataset.texts]
        return torch.from_numpy(ceg.encode_cached(self.load_encoder(), prompts, self.folder / "cache"))

    def train(self, config: TrainConfig, sizes: PchConfig) -> None:
        """Trains and keeps the towers; `sizes.content_dim` is whatever the encoder gives."""
        dataset = self.dataset()
        split = data.split(dataset.sequences, self.split)
        content = self.content(dataset)
        sizes = replace(sizes, content_dim=content.shape[1])
        torch.manual_seed(config.seed)
        model = Learn(Pch(sizes), content, self.standardise)
        train(config, model, dataset, split, self.folder)
        model.finish()
        _save(self.folder / "towers.pt", model.pch, sizes)

    def towers(self) -> Pch:
        """What `train` left."""
        saved = torch.load(self.folder / "towers.pt", weights_only=True)
        pch = Pch(PchConfig(**saved["sizes"]))
        pch.load_state_dict(saved["weights"])
        return pch.eval()

    def train_cvr(self, config: CvrTrainConfig) -> None:
        """Trains and keeps the head."""
        dataset, pch = self.dataset(), self.towers()
        split = data.split(dataset.sequences, self.split)
        sizes = CvrConfig(in_dim=pch.config.out_dim)
        head, figures = train_head(config, sizes, pch, self.content(dataset), dataset, split)
        _save(self.folder / "cvr.pt", head, sizes)
        _report(self.folder / "cvr.json", figures)

    def head(self) -> CvrHead:
        """What `train_cvr` left."""
        saved = torch.load(self.folder / "cvr.pt", weights_only=True)
        head = CvrHead(CvrConfig(**saved["sizes"]))
        head.load_state_dict(saved["weights"])
        return head.eval()

    def evaluate(self) -> None:
        """Towers and popularity on the test events."""
        dataset, pch = self.dataset(), self.towers()
        content = self.content(dataset)
        split = data.split(dataset.sequences, self.split)
        towers = evaluate.metrics(evaluate.tower_ranks(pch, content, dataset, split.test))
        popular = evaluate.metrics(evaluate.popularity_ranks(dataset, split, split.test))
        figures = towers | {f"popularity_{name}": value for name, value in popular.items()}
        figures |= evaluate.sequence_against_alone(pch, content, dataset, split.test)
        figures |= {"n_users": len(dataset.sequences), "n_items": len(dataset.item_ids), "n_test": len(split.test)}
        _report(self.folder / "metrics.json", figures)

    def export(self, out: Path, label: default.Label, source: str) -> None:
        """The run's models -> a bundle."""
        figures = {}
        for name in ("metrics.json", "cvr.json"):
            figures |= json.loads((self.folder / name).read_text())
        with (self.folder / "train.jsonl").open() as file:
            config = json.loads(file.readline())["config"]
        figures |= {"seed": config["seed"], "steps": config["steps"]}
        figures |= {"held_out_test": self.split.n_test, "held_out_validation": self.split.n_validation}
        facts = {"data": source, "metrics": {name: _rounded(value) for name, value in figures.items()}}
        default.write_default(self.load_encoder(), self.towers(), self.head(), facts, out, label)


def _save(path: Path, module: torch.nn.Module, sizes: Any) -> None:
    partial = path.with_suffix(".partial")
    torch.save({"sizes": asdict(sizes), "weights": module.state_dict()}, partial)
    partial.rename(path)


def _report(path: Path, figures: dict[str, float]) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name:32} {_rounded(value)}")


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, 5)
