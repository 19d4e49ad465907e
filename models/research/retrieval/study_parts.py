"""Parts of a study, and shorter ones: what `--seeds` and `--steps` of `learn study` ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from research.retrieval.study import Study


def with_seeds(study: Study, seeds: Sequence[int]) -> Study:
    """The study with only these of its seeds. A model that the study gives fewer seeds keeps only those of its own."""
    unknown = sorted(set(seeds) - set(study.seeds))
    if unknown:
        raise ValueError(f"--seeds {unknown[0]}: the seeds of this study are {', '.join(map(str, study.seeds))}")
    models = {}
    for name, arm in study.models.items():
        own = [seed for seed in study.seeds_of(arm) if seed in seeds]
        models[name] = replace(arm, n_seeds=len(own))
    # The chosen seeds keep their order in the study, so the first `n_seeds` of them are those of the model.
    return replace(study, seeds=[seed for seed in study.seeds if seed in seeds], models=models)


def with_steps(study: Study, steps: int) -> Study:
    """The study with runs of this length, whatever its models say; warm-up and checks follow from it.

    It gets a name of its own, so that its results do not replace those of the whole study.
    """
    free = {"warmup": None, "check_every": 0, "steps": steps}
    models = {}
    for name, arm in study.models.items():
        own = {key: value for key, value in arm.train.items() if key not in free}
        models[name] = replace(arm, train=own)
    named = f"{study.study}-{steps}-steps"
    return replace(study, study=named, train=replace(study.train, **free), models=models)
