"""The command line: one sub-command a step, each a thin call into its module.

Steps talk through one folder (`--run`); see learn/run.py for what lies in it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
SOURCE = "MovieLens ml-latest-small (GroupLens; Harper and Konstan 2015), research use"


def main(argv: list[str] | None = None) -> int:
    """Parses and runs; returns the exit code. What the user can mend is one line, not a stack trace."""
    arguments = _parser().parse_args(argv)
    # Set before torch is imported, which is why every command imports what it needs itself.
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    # Waiting threads that spin starve whoever shares the cores, and that is mostly this process itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from learn.data import DataError

    try:
        arguments.run_command(arguments)
    except (DataError, FileNotFoundError) as error:
        print(f"learn: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--run", type=Path, default=HERE / "runs" / "default", help="folder of the run")
    common.add_argument("--encoder", type=Path, default=HERE / "default", help="folder of the frozen encoder")
    common.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    common.add_argument("--seed", type=int, default=1)
    common.add_argument("--n-test", type=int, default=1, help="newest events a user held out for the test")
    common.add_argument("--n-validation", type=int, default=1, help="events a user held out before those")
    raw = argparse.ArgumentParser(add_help=False)
    raw.add_argument("--data", type=Path, required=True, help="MovieLens folder in its original files")
    bundle = argparse.ArgumentParser(add_help=False)
    bundle.add_argument("--out", type=Path, default=HERE / "default", help="folder of the bundle")
    bundle.add_argument("--name", default="learn-minilm-ml-small", help="name in the manifest")
    bundle.add_argument("--bundle-version", default="1", help="version in the manifest")
    bundle.add_argument("--source", default=SOURCE, help="what the manifest says of the data")
    steps = argparse.ArgumentParser(add_help=False)
    steps.add_argument("--steps", type=int, help="optimiser steps of the towers")

    parser = argparse.ArgumentParser(prog="learn", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function, text, parents in (
        ("prepare", _prepare, "raw data set -> neutral format", [raw]),
        ("encode", _encode, "content embeddings of every item, kept on disk", []),
        ("train", _train, "train the towers", [steps]),
        ("cvr", _cvr, "train the CVR head on frozen towers", []),
        ("evaluate", _evaluate, "full-ranking metrics, and popularity beside them", []),
        ("export", _export, "write and verify the bundle", [bundle]),
        ("all", _all, "every step from prepare to export", [raw, steps, bundle]),
    ):
        command = commands.add_parser(name, help=text, parents=[common, *parents])
        command.set_defaults(run_command=function)
    fixture = commands.add_parser("fixture", help="write the tiny random bundles that tests use")
    fixture.add_argument(
        "--out", type=Path, required=True, help="folder of all fixtures; each bundle gets its own in it"
    )
    fixture.set_defaults(run_command=_fixture, threads=1)
    return parser


def _run(arguments: argparse.Namespace):
    import torch

    from learn.data import SplitConfig
    from learn.run import Run

    torch.set_num_threads(arguments.threads)
    return Run(arguments.run, arguments.encoder, SplitConfig(arguments.n_test, arguments.n_validation))


def _prepare(arguments: argparse.Namespace) -> None:
    _run(arguments).prepare(arguments.data)


def _encode(arguments: argparse.Namespace) -> None:
    run = _run(arguments)
    run.content(run.dataset())


def _train(arguments: argparse.Namespace) -> None:
    from learn.pch import PchConfig
    from learn.train import TrainConfig

    given = {} if arguments.steps is None else {"steps": arguments.steps}
    _run(arguments).train(TrainConfig(seed=arguments.seed, **given), PchConfig())


def _cvr(arguments: argparse.Namespace) -> None:
    from learn.cvr_train import CvrTrainConfig

    _run(arguments).train_cvr(CvrTrainConfig(seed=arguments.seed))


def _evaluate(arguments: argparse.Namespace) -> None:
    _run(arguments).evaluate()


def _export(arguments: argparse.Namespace) -> None:
    from learn.default import Label

    _run(arguments).export(arguments.out, Label(arguments.name, arguments.bundle_version), arguments.source)


def _all(arguments: argparse.Namespace) -> None:
    for step in (_prepare, _encode, _train, _cvr, _evaluate, _export):
        step(arguments)


def _fixture(arguments: argparse.Namespace) -> None:
    from learn.fixture import write_fixtures

    write_fixtures(arguments.out)
