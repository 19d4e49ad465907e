"""`learn rank`: the ranking study with the data, the encoder and the settings of one training run."""

from __future__ import annotations

from dataclasses import replace

from learn.training_run import Run
from research.ranking.event_parts import RankSplitConfig, by_time
from research.ranking.learn_features import MidEmbeddingConfig
from research.ranking.study import RankConfig, rank


def rank_run(run: Run, seeds: tuple[int, ...]) -> None:
    """Trains a ranking model with and without mid-emb, with new towers and head for each seed; writes ranking/."""
    dataset, settings = run.dataset(), run.settings
    head = settings.head
    mid = MidEmbeddingConfig(
        settings.train, settings.pch, settings.standardise, settings.cvr, head.fuse_dim, head.mid_dim
    )
    split = RankSplitConfig() if settings.time_split is None else by_time(dataset.sequences, settings.time_split)
    split = replace(split, liked_from=settings.cvr.liked_from)
    config = RankConfig(study=run.folder.name, seeds=seeds, split=split, mid=mid)
    rank(config, dataset, run.content(dataset), run.folder / "ranking")
