"""`learn rank`: the ranking study with the data, the encoder and the settings of one training run."""

from __future__ import annotations

from dataclasses import replace

from learn.training_run import Run
from research.ranking import event_parts, tower_runs
from research.ranking.boosted_ranker import Boosted
from research.ranking.event_parts import RankSplitConfig, by_time
from research.ranking.ranker import Dcn
from research.ranking.study import RankConfig, rank
from research.ranking.tower_runs import Learned

# Folder of the results in the run -> the ranking model.
RANKERS = {"ranking": Dcn(), "ranking-lightgbm": Boosted()}


def rank_run(run: Run, seeds: tuple[int, ...]) -> None:
    """Trains both ranking models with and without mid-emb, with new towers and head for each seed.

    Writes a folder of results for each model, and ranking-towers/, which has the bundle and the features of each seed.
    """
    dataset, settings = run.dataset(), run.settings
    if settings.cvr.task != "conversion" or settings.cvr.conversions:
        raise ValueError(
            "`learn rank` judges by values of cvr.liked_from or more, so it cannot judge a head with cvr.conversions "
            "or another cvr.task; docs/ranking.md shows how to train a ranker on labels of your own"
        )
    split = RankSplitConfig() if settings.time_split is None else by_time(dataset.sequences, settings.time_split)
    split = replace(split, liked_from=settings.cvr.liked_from)
    events = event_parts.cut(dataset, split)
    mid = tower_runs.recorded(settings) | {"encoder_digest": tower_runs.encoder_of(run)}

    def features_of(seed: int) -> Learned:
        return tower_runs.learn(run, seed, dataset, events, run.folder / "ranking-towers" / f"seed{seed}")

    for folder, ranker in RANKERS.items():
        study = run.folder.name + folder.removeprefix("ranking")
        config = RankConfig(study=study, seeds=seeds, split=split, mid=mid, ranker=ranker)
        rank(config, dataset, features_of, run.folder / folder)
