"""A small, complete, synthetic study for the tests of result files and reports. Its figures have no meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from learn.evaluation.metrics import Ranking
from research.retrieval import result_files

N_USERS, N_EVENTS_PER_USER, N_ITEMS = 40, 3, 500
COUNTS = np.r_[np.zeros(100), np.arange(400) // 2].astype(int)


def synthetic_study(name: str = "ml-small") -> result_files.Study:
    rng = np.random.default_rng(0)
    n = N_USERS * N_EVENTS_PER_USER
    user = np.repeat(np.arange(N_USERS), N_EVENTS_PER_USER)
    item = np.where(np.arange(n) % 3 == 0, rng.integers(0, 110, n), rng.integers(110, N_ITEMS, n))
    return result_files.Study(
        study=name,
        data=result_files.Data(n_users=N_USERS, n_items=N_ITEMS, n_events=5000, digest="ab" * 32),
        protocol=result_files.Protocol(n_test=N_EVENTS_PER_USER, n_validation=1),
        user=user,
        item=item,
        item_count=COUNTS[item],
        user_count=15 + 8 * user,
    )


def synthetic_run(study: result_files.Study, model: str, seed: int, skill: float, **changes) -> result_files.Run:
    """A higher `skill` gives better ranks. All models find the same events hard, so that paired comparison matters."""
    difficulty = np.random.default_rng(1).random(len(study.user))
    noise = np.random.default_rng([seed, *model.encode()]).random(len(study.user))
    rank = 1 + ((N_ITEMS - 1) * (0.8 * difficulty + 0.2 * noise) ** skill).astype(int)
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


def write_synthetic_study(
    root: Path, skills: dict[str, float], name: str = "ml-small", seeds=(1, 2, 3)
) -> result_files.Study:
    """Writes a study with these models. A name with a slash is an ablation of the model before the slash."""
    study = synthetic_study(name)
    result_files.write_study(root, study)
    for model, skill in skills.items():
        changes = {}
        if "/" in model:
            changes = {"family": "ablation", "reference": model.split("/")[0], "question": "item tower"}
        for seed in seeds:
            result_files.write_run(root, synthetic_run(study, model, seed, skill, **changes))
    return study
