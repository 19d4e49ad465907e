"""Arguments that several commands share: each function returns a parser to be the parent of theirs.

`here` is the folder of the default runs, encoder and results.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def common(here: Path) -> argparse.ArgumentParser:
    """The run's folder, its settings, and what replaces single ones of them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--run", type=Path, default=here / "runs" / "default", help="folder of the run")
    parser.add_argument("--config", type=Path, help="TOML file of settings; see configs/ for examples")
    parser.add_argument("--encoder", type=Path, default=here / "default", help="folder of the frozen encoder")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    dtypes = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, help="dtype of the encoder's weights; overrides the config")
    parser.add_argument(
        "--encoder-precision",
        choices=("float", "int8"),
        help="int8: quantise the encoder and train on its content; overrides the config",
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="seed of towers and head; overrides the config; for rank, the only seed (default: 1 to 5)",
    )
    parser.add_argument(
        "--steps", type=int, help="optimiser steps of the towers, whatever the log; overrides the config"
    )
    return parser


def _location(given: str) -> Path | str:
    """A folder, or the URL of an object store, in which a Path would lose a slash."""
    return given if "://" in given else Path(given)


def raw() -> argparse.ArgumentParser:
    """Where the raw data are."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--data",
        type=_location,
        required=True,
        help="MovieLens or Amazon data in their original files, or data in the neutral format, also in an object store",
    )
    return parser


def results(here: Path) -> argparse.ArgumentParser:
    """Where results go."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--out",
        type=Path,
        default=here / "results",
        help="parent folder of the results; the study gets a subfolder with its name",
    )
    return parser


def start() -> argparse.ArgumentParser:
    """How training of the towers starts, and what it logs."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--from",
        type=Path,
        dest="start",
        metavar="RUN",
        help="start from the towers of this run instead of random ones",
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write losses, learning rate and figures for TensorBoard"
    )
    return parser


def bundle() -> argparse.ArgumentParser:
    """The bundle's folder, and what its manifest says."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--name", default="learn", help="name in the manifest")
    parser.add_argument("--bundle-version", default="1", help="version in the manifest")
    parser.add_argument("--source", default="not said", help="description of the data for the manifest")
    parser.add_argument("--figures", type=Path, help="folder of a study; its figures for --model go into the manifest")
    parser.add_argument("--model", default="learn-text", help="model of that study; this bundle is one of its seeds")
    return parser
