"""The arguments of `learn features`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_features(commands: argparse._SubParsersAction, bundle: Path) -> argparse.ArgumentParser:
    """Adds the command, and returns its parser; `bundle` is the default of --bundle."""
    features = commands.add_parser(
        "features", help="mid-embs and more for samples of the past, as a server would have answered, as Parquet"
    )
    table = "a .csv or .parquet file, a folder of such files, or a glob"
    features.add_argument("--bundle", type=Path, default=bundle, help="folder of the bundle")
    features.add_argument(
        "--log", required=True, help=f"interactions: {table}; columns user, item, timestamp, and action or value"
    )
    features.add_argument(
        "--samples", required=True, help=f"{table}; columns user, item, timestamp, and any others, which are kept"
    )
    features.add_argument(
        "--items", type=Path, required=True, help="JSONL or Parquet file of items, or a folder of such files"
    )
    features.add_argument("--out", type=Path, required=True, help="folder of the Parquet files")
    features.add_argument(
        "--outputs",
        nargs="+",
        choices=("mid_emb", "cvr", "user_emb", "item_emb"),
        default=["mid_emb", "cvr"],
        help="columns to compute (default: mid_emb cvr)",
    )
    features.add_argument(
        "--liked-from", type=float, help="for a log with values instead of actions: a like has this value or more"
    )
    features.add_argument("--disliked-to", type=float, help="the same: a dislike has this value or less")
    features.add_argument(
        "--memory-mb", type=int, default=256, help="memory for sorting the log; more is faster for large logs"
    )
    features.add_argument("--ray", metavar="ADDRESS", help="run on Ray: a cluster's address, or `local`")
    features.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="number of parallel processes"
    )
    features.add_argument(
        "--check", metavar="HOST:PORT", help="then send a hundred of the samples to this server, and compare"
    )
    features.add_argument("--model", default="", help="name under which the server of --check serves the bundle")
    return features
