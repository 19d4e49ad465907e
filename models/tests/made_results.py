"""A small, complete, made-up study for the tests of results and report. No figure in it means anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from learn.evaluation.metrics import Ranking
from research.retrieval import result_files

N_USERS, N_EVENTS_EACH, N_ITEMS = 40, 3, 500
COUNTS = np.r_[np.zeros(100), np.arange(400) // 2].astype(int)


def made_study(name: str = "ml-small") -> result_files.Study:
    rng = np.random.default_rng(0)
    n = N_USERS * N_EVENTS_EACH
    user = np.repeat(np.arange(N_USERS), N_EVENTS_EACH)
    item = np.where(np.arange(n) % 3 == 0, rng.integers(0, 110, n), rng.integers(110, N_ITEMS, n))
    return result_files.Study(
        study=name,
        data=result_files.Data(n_users=N_USERS, n_items=N_ITEMS, n_events=5000, digest="ab" * 32),
        protocol=result_files.Protocol(n_test=N_EVENTS_EACH, n_validation=1),
        user=user,
        item=item,
        item_count=COUNTS[item],
        user_count=15 + 8 * user,
    )


def made_run(study: result_files.Study, model: str, seed: int, skill: float, **changes) -> result_files.Run:
    """Better ranks with a higher `skill`; all models find the same events easy, so that pairing matters."""
    ease = np.random.default_rng(1).random(len(study.user))
    luck = np.random.default_rng([seed, *model.encode()]).random(len(study.user))
    rank = 1 + ((N_ITEMS - 1) * (0.8 * ease + 0.2 * luck) ** skill).astype(int)
    top = np.random.default_rng(seed).integers(0, N_ITEMS, (len(rank), 10))
    curve = [{"step": 100 * n, "seconds": 3.0 * n, "loss": 5.0 / n, "ndcg_at_10": 0.01 * n * skill} for n in (1, 2, 3)]
    fields = {
        "study": study.study,
        "model": model,
        "label": model.upper(),
        "family": "learn" if model.startswith("learn") else "baseline",
        "seed": seed,
        "config": {"width": 64, "seed": seed},
        "n_parameters": 123_456,
        "machine": "2 cores",
        "seconds": {"train": 12.5, "evaluate": 0.5},
        "curve": curve,
        **result_files.measured(study, Ranking(rank, top), COUNTS),
    }
    return result_files.Run.model_validate(fields | changes)


def write_made(root: Path, skills: dict[str, float], name: str = "ml-small", seeds=(1, 2, 3)) -> result_files.Study:
    """A study with these models. A name with a slash is an ablation of `learn-text`."""
    study = made_study(name)
    result_files.write_study(root, study)
    for model, skill in skills.items():
        changes = {}
        if "/" in model:
            changes = {"family": "ablation", "reference": model.split("/")[0], "question": "item tower"}
        for seed in seeds:
            result_files.write_run(root, made_run(study, model, seed, skill, **changes))
    return study
