"""The command line: one sub-command a step, each a thin call into its module."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parses and runs; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="learn", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    fixture = commands.add_parser("fixture", help="write the tiny random bundle that tests use")
    fixture.add_argument("--out", type=Path, required=True)
    fixture.set_defaults(run=_fixture)
    return parser


def _fixture(arguments: argparse.Namespace) -> None:
    from learn.fixture import write_fixture

    write_fixture(arguments.out)
