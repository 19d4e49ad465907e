"""`learn cvr-study`: the study of a TOML file on the data and the encoder of one training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from learn.run_settings import Settings, read_toml
from learn.training import log_needs
from learn.training_run import Run
from research.cvr.study import CvrStudy, run_study


def study_run(config: Path, folder: Path, encoder: Path, out: Path) -> None:
    """Runs the study on what `learn prepare` left in `folder`; `out` gets a folder with the study's name."""
    study = read_toml(CvrStudy, config)
    run = Run(folder, encoder, replace(Settings(), actions=study.thresholds))
    dataset = run.dataset()
    if any(arm.actions for arm in study.arms.values()):
        log_needs.check_actions(dataset.sequences, tuple(study.actions))
    run_study(study, dataset, run.content(dataset), folder / "cvr-study", out / study.study)
