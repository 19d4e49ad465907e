#!/usr/bin/env python3
"""Reloads under load: bundles in turn on one server, every answer checked, what each push costs.

    .venv/bin/python benches/reload.py                   200 pushes beside 100 requests a second, some two minutes
    .venv/bin/python benches/reload.py --reloads 40 --rate 50

The other bundles are made by `benches/variant.py`, once, in target/reload: the same encoder with other towers. With two
bundles a server finds each one's models where it keeps them for a rollback; with three, the default, every push loads.
Each run has a folder of its own for the config files, as the server keeps what was pushed beside its own.
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
    """The manifest is written last: where it is missing, what is there is half a bundle."""
    folder = FOLDER / f"variant-{seed}"
    if not (folder / "manifest.toml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        script = str(ROOT / "benches" / "variant.py")
        arguments = ["--bundle", str(BUNDLE), "--out", str(folder), "--version", f"reload-{seed}", "--seed", str(seed)]
        subprocess.run([sys.executable, script, *arguments], check=True)
    return folder


def free_addresses(n: int) -> list[str]:
    """Addresses that nobody listens on, all open at once so that none comes twice."""
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def config(addresses: dict[str, str], bundle: Path) -> str:
    """A whole config file: TOML takes dotted keys as they are."""
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
        "--bundles", type=int, default=3, help="2: each push takes over what a rollback keeps; 3: each loads"
    )
    parser.add_argument("--rate", type=float, default=100, help="requests a second; 0 is a closed loop")
    parser.add_argument("--requests", type=int, default=2000, help="before the first push")
    parser.add_argument("--json", action="store_true", help="the report as JSON lines")
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
        # The server's environment wins over what is pushed, too: it says the same as the files.
        environment = {f"MIDEMB__{key.upper().replace('.', '__')}": address for key, address in addresses.items()}
        with demo.serving(own, **environment):
            code = scenario(addresses, configs, args)
    sys.exit(code)


if __name__ == "__main__":
    main()
