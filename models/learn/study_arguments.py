"""The arguments of `learn study` and `learn report`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_study(
    commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser], here: Path
) -> argparse.ArgumentParser:
    """Adds `study`, and returns its parser; `here` is the folder of the default config, encoders and runs."""
    study = commands.add_parser(
        "study", parents=parents, help="train and evaluate several models and seeds; writes one .npz record per run"
    )
    study.add_argument(
        "--config", type=Path, default=here / "configs" / "ml-latest-small.toml", help="TOML file of the study"
    )
    study.add_argument(
        "--run", type=Path, help="folder of prepared data and embeddings (default: runs/<name of the study>)"
    )
    study.add_argument("--encoders", type=Path, default=here, help="folder that contains the study's encoders")
    study.add_argument(
        "--name", help="name of the study; overrides the config, so that one config serves several data sets"
    )
    study.add_argument("--only", nargs="+", metavar="MODEL", help="run only these models")
    study.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="run only these seeds of the study")
    study.add_argument(
        "--steps",
        type=int,
        help="optimiser steps of every model, whatever the config says; the study is then called <name>-<steps>-steps",
    )
    study.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="number of parallel runs, one thread per run"
    )
    study.add_argument(
        "--dry-run",
        action="store_true",
        help="prepare and encode, print the runs, their steps and how long they would take, and stop",
    )
    return study


def add_tune(
    commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser], here: Path
) -> argparse.ArgumentParser:
    """Adds `tune`, and returns its parser."""
    tune = commands.add_parser(
        "tune",
        parents=parents,
        help="equally many trials for every model, on validation alone; writes one JSON line per trial",
    )
    tune.add_argument(
        "--config",
        type=Path,
        default=here / "configs" / "tuning" / "ml-latest-small-by-time.toml",
        help="TOML file of the grids",
    )
    tune.add_argument(
        "--run", type=Path, help="folder of prepared data and embeddings (default: runs/<name of the study>)"
    )
    tune.add_argument("--encoders", type=Path, default=here, help="folder that contains the study's encoders")
    tune.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="number of parallel trials, one thread each"
    )
    return tune


def add_report(commands: argparse._SubParsersAction, here: Path) -> argparse.ArgumentParser:
    """Adds `report`, and returns its parser."""
    report = commands.add_parser("report", help="write REPORT.md with tables and plots from the records of all studies")
    report.add_argument("--results", type=Path, default=here / "results", help="folder of the studies")
    report.add_argument("--out", type=Path, default=here, help="folder for REPORT.md and report/")
    return report
