"""Refuses runs that were not made by what the config of their study says today.

The report prints a figure under the name of a model, and a reader looks the model up in `configs/<study>.toml`. If the
config has changed since the run, the figure is of something else. Studies without a config of their name are not
checked. Steps that follow from a length in epochs are not compared, since how many an epoch has follows from the log.
Whether a run is of the data of its study, `retrieval.result_files` checks.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.retrieval import result_files
from research.retrieval.result_files import Results, Run
from research.retrieval.study import Study, read_study, run_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# How many files a message names.
N_NAMED = 10
# What a record has beyond `run_config`: these depend on the data and on the seed.
ADDED = ("content", "seed")
# Settings that follow from a length in epochs where the config does not say them (`run_length.planned`).
LENGTH = tuple(f"train.{name}" for name in ("steps", "warmup", "check_every", "patience"))


class StaleRecordsError(ValueError):
    """Runs that the configs of today do not describe."""


def check(results_root: Path, results: Results, configs: Path = CONFIGS) -> None:
    """Raises `StaleRecordsError` with file, reason and remedy of every stale run, or of the first ones if many are."""
    stale = []
    for name, study in results.retrieval.items():
        path = configs / f"{name}.toml"
        if not _describes_study(path):
            continue
        config = read_study(path)
        for model in study.runs:
            for run in study.runs[model].values():
                if reason := _why_stale(run, config, path):
                    stale.append(f"{result_files.run_path(results_root, name, model, run.seed)}: {reason}")
    if stale:
        more = [f"and {len(stale) - N_NAMED} more"] if len(stale) > N_NAMED else []
        raise StaleRecordsError("\n".join(["stale results:", *stale[:N_NAMED], *more]))


def _describes_study(path: Path) -> bool:
    """Whether there is such a config, and it is that of a retrieval study: other configs lie in the same folder."""
    return path.is_file() and "models" in tomllib.loads(path.read_text(encoding="utf-8"))


def _why_stale(run: Run, config: Study, path: Path) -> str | None:
    if run.model not in config.models:
        return f"{path.name} has no model {run.model!r}; put it back, or remove the file"
    if run.seed not in (seeds := config.seeds_of(config.models[run.model])):
        return f"{path.name} gives this model the seeds {seeds}; give it {run.seed} as well, or remove the file"
    shown = config.models[run.model].shown()
    then = _flat({key: value for key, value in run.config.items() if key not in ADDED})
    then |= {key: getattr(run, key) for key in shown}
    now = _flat(run_config(config, config.models[run.model])) | shown
    not_compared = set()
    if "train.steps" not in now:
        not_compared = {"train.epochs", *(key for key in LENGTH if key not in now)}
    for key in sorted((then.keys() | now.keys()) - not_compared):
        if then.get(key) != now.get(key):
            rerun = f"`learn study --config configs/{path.name} --only {run.model}`"
            before, after = (repr(table[key]) if key in table else "not set" for table in (then, now))
            return f"{key} is {before} and in {path.name} {after}; run {rerun} again"
    return None


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found
