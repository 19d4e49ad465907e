"""A small, complete, synthetic study for the tests of result files and reports. Its figures have no meaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from learn.evaluation.metrics import Ranking
from research.bootstrap import BootstrapConfig
from research.retrieval import result_files
from research.retrieval.estimates import StudyEstimates

N_USERS, N_EVENTS_PER_USER, N_ITEMS = 40, 3, 500
# Users of a study that is split by time: five have ten test events each, all others have two.
EVENTS_BY_TIME = np.r_[np.full(5, 10), np.full(N_USERS - 5, 2)]
COMMIT = "c0ffee" * 6 + "beef"
COUNTS = np.r_[np.zeros(100), np.arange(400) // 2].astype(int)


def synthetic_study(name: str = "ml-small") -> result_files.Study:
    """A study whose name ends in "-by-time" is split by time, so its users have unequally many test events."""
    rng = np.random.default_rng(0)
    n = N_USERS * N_EVENTS_PER_USER
    by_time = name.endswith("-by-time")
    user = np.repeat(np.arange(N_USERS), EVENTS_BY_TIME if by_time else N_EVENTS_PER_USER)
    item = np.where(np.arange(n) % 3 == 0, rng.integers(0, 110, n), rng.integers(110, N_ITEMS, n))
    return result_files.Study(
        study=name,
        data=result_files.Data(n_users=N_USERS, n_items=N_ITEMS, n_events=5000, digest="ab" * 32),
        protocol=result_files.Protocol(n_test=0 if by_time else N_EVENTS_PER_USER, n_validation=0 if by_time else 1),
        user=user,
        item_count=COUNTS[item],
        user_count=15 + 8 * user,
    )


def synthetic_run(study: result_files.Study, model: str, seed: int, skill: float, **changes) -> result_files.Run:
    """A higher `skill` gives better ranks. All models find the same events hard, so that paired comparison matters."""
    difficulty = np.random.default_rng(1).random(len(study.user))
    noise = np.random.default_rng([seed, *model.encode()]).random(len(study.user))
    rank = 1 + ((N_ITEMS - 1) * (0.8 * difficulty + 0.2 * noise) ** skill).astype(int)
    top = np.random.default_rng(seed).integers(0, N_ITEMS, (len(rank), 10))
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
        "curve": synthetic_curve(0.01 * skill, 0.03 * skill, 0.02 * skill),
        "commit": COMMIT,
        **result_files.measured(study, Ranking(rank, top), COUNTS),
    }
    return result_files.Run.model_validate(fields | changes)


def synthetic_curve(*ndcg: float) -> list[dict]:
    """A learning curve with these figures on validation, one per 100 steps."""
    return [
        {"step": 100 * n, "seconds": 3.0 * n, "loss": 5.0 / n, "ndcg_at_10": value} for n, value in enumerate(ndcg, 1)
    ]


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


# Enough replicates for tests that do not look at the third digit.
FAST = BootstrapConfig(n_resamples=300)


def estimates(root: Path, skills: dict[str, float], name: str = "ml-small", seeds=(1, 2, 3)) -> StudyEstimates:
    """Writes such a study and reads it."""
    write_synthetic_study(root, skills, name, seeds)
    return StudyEstimates(result_files.read(root).retrieval[name], FAST)
