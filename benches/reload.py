#!/usr/bin/env python3
"""Pushes bundles in turn to one server under load, checks every response and reports the cost of each push.

    .venv/bin/python benches/reload.py                   200 pushes beside 100 requests per second, about two minutes
    .venv/bin/python benches/reload.py --reloads 40 --rate 50

`benches/variant.py` makes the other bundles once, in target/reload, with the same encoder and other towers. With two
bundles, each push reuses the models that the server keeps for a rollback; with three, the default, each push loads
models. Each run has its own folder for the config files, because the server stores pushed files beside its own file.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy"))
import demo  # noqa: E402

BENCH = ROOT / "target" / "release" / "midemb-bench"
BUNDLE = ROOT / "models" / "default"
FOLDER = ROOT / "target" / "reload"
LISTENERS = ("server.listen", "admin.listen", "telemetry.metrics_listen")


def variant(seed: int) -> Path:
    """Returns a variant's folder; replaces one without a manifest, which is written last, or older than the bundle."""
    folder = FOLDER / f"variant-{seed}"
    written, base = folder / "manifest.toml", BUNDLE / "manifest.toml"
    if not written.exists() or written.stat().st_mtime < base.stat().st_mtime:
        shutil.rmtree(folder, ignore_errors=True)
        script = str(ROOT / "benches" / "variant.py")
        arguments = ["--bundle", str(BUNDLE), "--out", str(folder), "--version", f"reload-{seed}", "--seed", str(seed)]
        subprocess.run([sys.executable, script, *arguments], check=True)
    return folder


def free_addresses(n: int) -> list[str]:
    """Returns free addresses; all are open at the same time, so they differ."""
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def config(addresses: dict[str, str], bundle: Path) -> str:
    """Returns a complete config file; TOML accepts dotted keys."""
    lines = [f'{key} = "{address}"' for key, address in addresses.items()]
    return "\n".join([*lines, "", "[[models]]", 'name = "learn"', f'bundle = "{bundle}"', ""])


def scenario(addresses: dict[str, str], configs: list[Path], args: argparse.Namespace) -> int:
    where = [*zip(("--server", "--admin", "--metrics"), (addresses[key] for key in LISTENERS), strict=True)]
    command = [str(BENCH), "w7-reload", *(word for pair in where for word in pair)]
    command += ["--configs", *map(str, configs), "--reloads", str(args.reloads), "--requests", str(args.requests)]
    if args.rate > 0:
        command += ["--rate", str(args.rate)]
    if args.json:
        command.append("--json")
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reloads", type=int, default=200)
    parser.add_argument(
        "--bundles",
        type=int,
        default=3,
        help="2: each push reuses the models kept for a rollback; 3: each loads models",
    )
    parser.add_argument("--rate", type=float, default=100, help="requests per second; 0 is a closed loop")
    parser.add_argument("--requests", type=int, default=2000, help="requests before the first push")
    parser.add_argument("--json", action="store_true", help="print the report as JSON lines")
    args = parser.parse_args()
    for program, target in ((demo.MIDEMB, "build"), (BENCH, "bench-build")):
        if not program.exists():
            sys.exit(f"{program} is missing: run `make {target}`")
    FOLDER.mkdir(parents=True, exist_ok=True)
    bundles = [BUNDLE, *(variant(seed) for seed in range(1, args.bundles))]
    print("load average before:", *(f"{load:.2f}" for load in os.getloadavg()), file=sys.stderr)
    addresses = dict(zip(LISTENERS, free_addresses(len(LISTENERS)), strict=True))
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        own = Path(folder) / "midemb.toml"
        configs = [Path(folder) / f"bundle-{i}.toml" for i in range(len(bundles))]
        for path, bundle in zip((own, *configs), (BUNDLE, *bundles), strict=True):
            path.write_text(config(addresses, bundle))
        # The server's environment also overrides pushed files, so it is set to the same values.
        environment = {f"MIDEMB__{key.upper().replace('.', '__')}": address for key, address in addresses.items()}
        with demo.serving(own, **environment):
            code = scenario(addresses, configs, args)
    sys.exit(code)


if __name__ == "__main__":
    main()
