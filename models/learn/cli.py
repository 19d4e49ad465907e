"""The command line: one subcommand per step; each is a thin call into its module.

Steps pass their results on through one folder (`--run`); learn/training_run.py lists its files. Settings come from one
TOML file (`--config`); without it, the defaults in learn/run_settings.py apply.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from learn import run_arguments
from learn.allocator import keep_freed_memory
from learn.features_arguments import add_features
from learn.serving.tolerances import ABSOLUTE, COSINE
from learn.study_arguments import add_report, add_study, add_tune

HERE = Path(__file__).parents[1]
CVR_STUDY = HERE / "configs" / "cvr-ml-latest-small.toml"
Arguments = argparse.Namespace
# `rank`, `study`, `report` and `export --figures` need a separate package, which is not installed with this one.
RESEARCH = "research"
NO_RESEARCH = "this command needs the package `research`, which is not installed: run it in models/ of a checkout"


def main(argv: list[str] | None = None) -> int:
    """Parses the arguments, runs the command and returns the exit code.

    An error that the user can fix is printed as one line, without a stack trace.
    """
    arguments = _parser().parse_args(argv)
    # Must be set before torch is imported, so each command imports its modules itself.
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    # Spinning threads would take CPU time from other threads on the same cores, most of which belong to this process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return arguments.run_command(arguments) or 0
    except (ValueError, OSError) as error:  # DataError is a ValueError.
        print(f"learn: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name != RESEARCH:
            raise
        print(f"learn: {NO_RESEARCH}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="learn", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    common, raw, start = run_arguments.common(HERE), run_arguments.raw(), run_arguments.start()
    bundle, results = run_arguments.bundle(), run_arguments.results(HERE)
    for name, function, text, parents in (
        ("prepare", _prepare, "raw data set -> prepared folder", [common, raw]),
        ("encode", _encode, "compute the content embedding of every item and store it on disk", [common]),
        ("train", _train, "train the towers", [common, start]),
        ("cvr", _cvr, "train the CVR head, and the towers with it if the config says so", [common]),
        ("rank", _rank, "train and compare a ranking model with and without mid-emb", [common]),
        ("cvr-study", _cvr_study, "train and compare CVR heads; writes one .npz record per run", [common, results]),
        ("evaluate", _evaluate, "full-ranking metrics of the towers and of the popularity baseline", [common]),
        ("export", _export, "write and verify the bundle", [common, bundle]),
        ("all", _all, "every step from prepare to export, except rank", [common, raw, start, bundle]),
    ):
        commands.add_parser(name, help=text, parents=parents).set_defaults(run_command=function)
    add_study(commands, [raw, results], HERE).set_defaults(run_command=_study, threads=1)
    add_tune(commands, [raw, results], HERE).set_defaults(run_command=_tune, threads=1)
    add_report(commands, HERE).set_defaults(run_command=_report, threads=1)
    _add_serving(commands, common)
    fixture = commands.add_parser("fixture", help="write the tiny random bundles that tests use")
    fixture.add_argument("--out", type=Path, required=True, help="folder of all fixtures; each bundle gets a subfolder")
    fixture.set_defaults(run_command=_fixture, threads=1)
    return parser


def _add_serving(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    embed = commands.add_parser("embed", help="content embeddings and item records of a whole catalogue, as Parquet")
    embed.add_argument("--bundle", type=Path, default=HERE / "default", help="folder of the bundle")
    embed.add_argument(
        "--items", type=Path, required=True, help="JSONL or Parquet file of items, or a folder of such files"
    )
    embed.add_argument("--out", type=Path, required=True, help="folder of the Parquet shards")
    embed.add_argument("--ray", metavar="ADDRESS", help="run on Ray: a cluster's address, or `local`")
    embed.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="number of parallel processes on Ray"
    )
    embed.set_defaults(run_command=_embed, threads=1)
    snapshot = commands.add_parser("snapshot", help="Parquet shards -> files that `midemb cache import` reads")
    snapshot.add_argument("--parts", type=Path, required=True, help="folder that `embed` wrote")
    snapshot.add_argument("--out", type=Path, required=True, help="folder of the .safetensors files")
    snapshot.add_argument("--kind", choices=("content", "item"), default="content")
    snapshot.set_defaults(run_command=_snapshot, threads=1)
    features = add_features(commands, HERE / "default")
    features.set_defaults(run_command=_features, threads=1)
    upgrade = commands.add_parser("upgrade", help="bundle of format 1 -> format 2, without the run that it came from")
    upgrade.add_argument("old", type=Path, help="folder of the bundle")
    upgrade.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    upgrade.add_argument("--bundle-version", help="version in the manifest (default: the old one)")
    upgrade.add_argument(
        "--keeps",
        choices=("all", "liked"),
        help="which of a user's items the head was trained on: cvr.history of the run (default: all is assumed)",
    )
    upgrade.set_defaults(run_command=_upgrade, threads=1)
    verify = commands.add_parser("verify", parents=[common], help="compare a live server with PyTorch, stage by stage")
    verify.add_argument("--server", required=True, metavar="HOST:PORT", help="the server's server.listen address")
    verify.add_argument(
        "--admin",
        metavar="HOST:PORT",
        help="the server's admin.listen address; if given, the vectors in its caches are compared too",
    )
    verify.add_argument(
        "--bundle", type=Path, help="compare with this bundle's golden vectors instead of the towers of --run"
    )
    verify.add_argument("--model", default="", help="name under which the model is served")
    verify.add_argument(
        "--wire", choices=("f32", "f16", "bf16"), default="f32", help="dtype of the vectors in the responses"
    )
    verify.add_argument(
        "--absolute",
        type=float,
        help=f"largest accepted difference of any entry (default: {ABSOLUTE}, wider for int8 content)",
    )
    verify.add_argument(
        "--cosine",
        type=float,
        help=f"smallest accepted cosine of any vector (default: {COSINE}, lower for int8 content)",
    )
    verify.add_argument("--users", type=int, default=20, help="number of users of the run whose histories are sent")
    verify.set_defaults(run_command=_verify)


def _run(arguments: Arguments):
    from dataclasses import replace

    import torch

    from learn.run_settings import read_settings
    from learn.training_run import Run

    torch.set_num_threads(arguments.threads)
    settings = read_settings(arguments.config).with_seed(arguments.seed)
    if arguments.steps is not None:
        settings = replace(settings, train=replace(settings.train, steps=arguments.steps))
    if getattr(arguments, "tensorboard", None) is not None:
        settings = replace(settings, train=replace(settings.train, tensorboard=str(arguments.tensorboard)))
    if arguments.dtype is not None:
        settings = replace(settings, encoder=replace(settings.encoder, dtype=arguments.dtype))
    if arguments.encoder_precision is not None:
        settings = replace(settings, encoder=replace(settings.encoder, precision=arguments.encoder_precision))
    return Run(arguments.run, arguments.encoder, settings)


def _prepare(arguments: Arguments) -> None:
    _run(arguments).prepare(arguments.data)


def _encode(arguments: Arguments) -> None:
    run = _run(arguments)
    run.content(run.dataset())


def _train(arguments: Arguments) -> None:
    _check_tensorboard(arguments)
    keep_freed_memory()
    _run(arguments).train(arguments.start)


def _check_tensorboard(arguments: Arguments) -> None:
    from learn.training.listeners import check_tensorboard

    if _run(arguments).settings.train.tensorboard:
        check_tensorboard()


def _cvr(arguments: Arguments) -> None:
    keep_freed_memory()
    _run(arguments).train_cvr()


def _rank(arguments: Arguments) -> None:
    from research.ranking.run_command import rank_run

    keep_freed_memory()
    seeds = (1, 2, 3, 4, 5) if arguments.seed is None else (arguments.seed,)
    rank_run(_run(arguments), seeds)


def _cvr_study(arguments: Arguments) -> None:
    import torch

    from research.cvr.run_command import study_run

    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    study_run(arguments.config or CVR_STUDY, arguments.run, arguments.encoder, arguments.out)


def _evaluate(arguments: Arguments) -> None:
    _run(arguments).evaluate()


def _export(arguments: Arguments) -> None:
    from learn.serving.shipped_bundle import Label

    run, facts = _run(arguments), {"data": arguments.source}
    if arguments.figures is not None:
        facts["study"] = _study_figures(arguments, run)
    run.export(arguments.out, Label(arguments.name, arguments.bundle_version), facts)


def _study_figures(arguments: Arguments, run):
    from dataclasses import replace

    from learn.training.run_length import planned
    from research.retrieval.manifest_figures import figures_of, subject_of

    # A study's records have the length in steps, which may follow from the log.
    settings, split = run.settings, run.split(run.dataset())
    settings = replace(settings, train=planned(settings.train, split.n_train, settings.pch.max_history))
    return figures_of(arguments.figures, arguments.model, replace(subject_of(run), settings=settings))


def _all(arguments: Arguments) -> None:
    for step in (_prepare, _check, _encode, _train, _cvr, _evaluate, _export):
        step(arguments)


def _check(arguments: Arguments) -> None:
    # These errors should appear before hours of encoding and training, not after.
    from learn.serving import placing

    placing.named(arguments.out)
    run = _run(arguments)
    run.check_towers()
    run.check_labels()
    _check_tensorboard(arguments)
    if arguments.start is not None:
        run.towers_of(arguments.start)


def _study(arguments: Arguments) -> int:
    from dataclasses import replace

    from research.retrieval.study import dry_run, inputs_of, only, read_study, run_study
    from research.retrieval.study_parts import with_seeds, with_steps

    study = read_study(arguments.config)
    if arguments.name:
        study = replace(study, study=arguments.name)
    # A study of another length has the same data and content.
    run = arguments.run or HERE / "runs" / study.study
    if arguments.only:
        study = only(study, arguments.only)
    if arguments.seeds:
        study = with_seeds(study, arguments.seeds)
    if arguments.steps:
        study = with_steps(study, arguments.steps)
    inputs = inputs_of(study, arguments.data, run, arguments.encoders)
    if arguments.dry_run:
        dry_run(study, inputs, arguments.out, arguments.workers)
        return 0
    failed = run_study(study, inputs, arguments.out, arguments.workers)
    return 1 if failed else 0


def _tune(arguments: Arguments) -> None:
    from research.retrieval.study import inputs_of
    from research.retrieval.tuning import read_budget, run_command

    study, budget = read_budget(arguments.config)
    run = arguments.run or HERE / "runs" / study.study
    inputs = inputs_of(study, arguments.data, run, arguments.encoders)
    run_command(study, budget, inputs, arguments.out / "tuning" / f"{study.study}.jsonl", arguments.workers)


def _report(arguments: Arguments) -> None:
    from research.report.document import build

    build(arguments.results, arguments.out / "REPORT.md")


def _embed(arguments: Arguments) -> None:
    from learn.serving.bulk_embedding import BulkConfig, RayConfig, embed_catalogue

    ray = None
    if arguments.ray:
        ray = RayConfig(address=None if arguments.ray == "local" else arguments.ray, workers=arguments.workers)
    embed_catalogue(BulkConfig(arguments.bundle, arguments.items, arguments.out, ray=ray))


def _features(arguments: Arguments) -> int:
    from learn.serving.bulk_embedding import RayConfig
    from learn.serving.feature_inputs import SortConfig
    from learn.serving.features import FeaturesConfig, compute_features

    ray = None
    if arguments.ray:
        ray = RayConfig(address=None if arguments.ray == "local" else arguments.ray, workers=arguments.workers)
    config = FeaturesConfig(
        arguments.bundle,
        arguments.log,
        arguments.samples,
        arguments.items,
        arguments.out,
        outputs=tuple(arguments.outputs),
        liked_from=arguments.liked_from,
        disliked_to=arguments.disliked_to,
        sort=SortConfig(memory_mb=arguments.memory_mb),
        workers=arguments.workers,
        ray=ray,
    )
    compute_features(config)
    if arguments.check is None:
        return 0
    from learn.serving.feature_check import CheckConfig, check_and_print

    return check_and_print(config, CheckConfig(arguments.check, arguments.model))


def _snapshot(arguments: Arguments) -> None:
    from learn.serving.cache_snapshot import snapshot

    snapshot(arguments.parts, arguments.out, arguments.kind)


def _upgrade(arguments: Arguments) -> None:
    from learn.serving.upgrade import UpgradeConfig, upgrade

    upgrade(UpgradeConfig(arguments.old, arguments.out, arguments.bundle_version, arguments.keeps))


def _verify(arguments: Arguments) -> int:
    from learn.serving.digests import read_manifest
    from learn.serving.tolerances import Tolerance, of_content
    from learn.serving.verify_cases import golden_cases
    from learn.serving.verify_server import VerifyConfig, verify_and_print

    run = None if arguments.bundle is not None else _run(arguments)
    of_bundle = of_content(read_manifest(arguments.bundle)) if run is None else run.content_tolerance()

    def chosen(default: Tolerance) -> Tolerance:
        return Tolerance(
            default.absolute if arguments.absolute is None else arguments.absolute,
            default.cosine if arguments.cosine is None else arguments.cosine,
        )

    config = VerifyConfig(
        arguments.server, arguments.admin, arguments.model, arguments.wire, chosen(of_bundle), chosen(Tolerance())
    )
    cases = golden_cases(arguments.bundle) if run is None else run.cases(arguments.users)
    return verify_and_print(config, cases, arguments.bundle)


def _fixture(arguments: Arguments) -> None:
    from learn.serving.fixture_bundles import write_fixtures

    write_fixtures(arguments.out)
