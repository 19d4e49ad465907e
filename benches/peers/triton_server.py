"""A peer from standard software: Triton with a Python-backend model, with midemb's bundle and work.

    python benches/peers/triton_server.py --bundle models/default [--format 2] [--ids strings] [--instances 2]

Writes a model repository (`triton_model.py`, twice) to a temporary folder and runs the `tritonserver` of the package
nvidia-pytriton on a free loopback port. Prints one line, `serving GRPC PID`, when it is ready. On SIGTERM it stops
Triton and ends. `triton_bench.py` is its client.

It is set up to be fast: one instance per core, one thread each, no batching (so no waiting for a batch), no HTTP, no
metrics, no tracing. The features that it lacks make it faster: those in `python_server.py`, and also all statuses.

It keeps the item tower's adapted items for its user tower to read, as midemb does. With `--format 1` it runs the user
tower of format 1 (`format_1.py`), which reads content embeddings.

With `--ids strings`, ids are BYTES tensors with one element per id, as the protocol intends. Triton decodes these in
Python, which takes 0.3 CPU ms for 580 ids. With `--ids integers` they are INT64 tensors, which need no decoding;
midemb's ids are always strings.

Any Python can start it; it then continues with the Python of `benches/.venv-triton` (`make bench-setup`), because
Triton's Python backend is built for numpy 1 and everything else here uses numpy 2.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

START_WITHIN_SECONDS = 60
STOP_WITHIN_SECONDS = 20
MODEL = Path(__file__).with_name("triton_model.py")
TOWERS = Path(__file__).with_name("towers.py")
ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-triton"
INSTALL = "make bench-setup"

# Triton's data type of the ids.
ID_TYPES = {"strings": "TYPE_STRING", "integers": "TYPE_INT64"}
ID = "ID"
# Model name: (inputs, outputs), where each tensor is (name, type, dims). The type ID stands for one of ID_TYPES.
MODELS = {
    "items": ([("IDS", ID, "-1"), ("CONTENT", "TYPE_FP32", "-1, -1")], [("KEPT", "TYPE_INT64", "1")]),
    "mid_emb": ([("HISTORY", ID, "-1"), ("CANDIDATES", ID, "-1")], [("MID_EMB", "TYPE_FP32", "-1, -1")]),
}


@dataclass(frozen=True)
class Setup:
    """What is served, and how."""

    bundle: Path
    format: int
    id_type: str
    instances: int


class Failed(Exception):
    """Triton cannot run. The message tells the user why."""


def package() -> Path:
    """Returns the folder of Triton's files in the installed package."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None:
        raise Failed(f"nvidia-pytriton is not installed in {ENVIRONMENT}: run `{INSTALL}`")
    return Path(spec.submodule_search_locations[0]) / "tritonserver"


def python_stub(triton: Path) -> Path:
    """Returns the executable that runs a Python model; there is one per Python version."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise Failed(f"nvidia-pytriton has no Python backend for Python {version}")
    return stub


def link_backend(folder: Path, triton: Path) -> None:
    """Links the Python backend and the stub into `folder`, so that the installed package is not changed."""
    folder.mkdir(parents=True)
    parts = filter(Path.is_file, (triton / "backends" / "python").iterdir())
    for file in [*parts, python_stub(triton)]:
        (folder / file.name).symlink_to(file)


def tensors(kind: str, entries: list[tuple[str, str, str]], id_type: str) -> str:
    fields = (
        f'{{ name: "{name}" data_type: {id_type if dtype == ID else dtype} dims: [ {dims} ] }}'
        for name, dtype, dims in entries
    )
    return f"{kind} [ {', '.join(fields)} ]"


def parameter(key: str, value: Path) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def write_model(folder: Path, id_type: str, instances: int, parameters: dict[str, Path]) -> None:
    inputs, outputs = MODELS[folder.name]
    (folder / "1").mkdir(parents=True)
    shutil.copy(MODEL, folder / "1" / "model.py")
    shutil.copy(TOWERS, folder / "1" / TOWERS.name)
    config = [
        'backend: "python"',
        "max_batch_size: 0",
        tensors("input", inputs, id_type),
        tensors("output", outputs, id_type),
        f"instance_group [ {{ kind: KIND_CPU count: {instances} }} ]",
        *(parameter(key, value) for key, value in parameters.items()),
    ]
    (folder / "config.pbtxt").write_text("\n".join(config) + "\n")


def write_user_tower(bundle: Path, file: Path) -> None:
    """Writes the user tower of format 1."""
    import format_1  # It imports onnx, which only the Python of `ENVIRONMENT` is sure to have.

    file.write_bytes(format_1.user_tower(bundle).SerializeToString())


def environment(triton: Path) -> dict[str, str]:
    """Returns Triton's environment. PATH is set, as the stub ignores PYTHONPATH and embeds the first `python3`."""
    added = {
        "LD_LIBRARY_PATH": [sysconfig.get_config_var("LIBDIR"), triton.parents[1] / "nvidia_pytriton.libs"],
        "PATH": [Path(sys.executable).parent],
    }
    inherited = {name: [os.environ[name]] if os.environ.get(name) else [] for name in added}
    return os.environ | {name: ":".join(map(str, added[name] + inherited[name])) for name in added}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def start(folder: Path, setup: Setup, port: int, log: Path) -> subprocess.Popen:
    triton, store = package(), folder / "store"
    store.mkdir()
    link_backend(folder / "backends" / "python", triton)
    parameters = {"bundle": setup.bundle, "store": store}
    if setup.format == 1:
        parameters["format_1_user_tower"] = folder / "user_tower.onnx"
        write_user_tower(setup.bundle, parameters["format_1_user_tower"])
    write_model(folder / "models" / "items", setup.id_type, 1, parameters)
    write_model(folder / "models" / "mid_emb", setup.id_type, setup.instances, parameters)
    command = [
        str(triton / "bin" / "tritonserver"),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={folder / 'backends'}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        "--allow-http=false",
        "--allow-metrics=false",
        "--disable-auto-complete-config",
        "--log-info=false",
        "--exit-timeout-secs=5",
    ]
    with log.open("wb") as output:
        # Triton gets its own process group, so that `stop` can end all of its processes in any case.
        return subprocess.Popen(command, env=environment(triton), stdout=output, stderr=output, start_new_session=True)


def wait_until_ready(process: subprocess.Popen, port: int) -> None:
    """Waits until Triton listens, which means that every instance is up; if one cannot start, Triton exits."""
    until = time.monotonic() + START_WITHIN_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
    raise Failed(f"tritonserver was not ready within {START_WITHIN_SECONDS} s (exit code {process.poll()})")


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=STOP_WITHIN_SECONDS)
    except subprocess.TimeoutExpired:
        print("tritonserver did not end in time and is being killed", file=sys.stderr)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(setup: Setup, folder: Path) -> None:
    log, port = folder / "log", free_port()
    process = start(folder, setup, port, log)
    try:
        wait_until_ready(process, port)
        print(f"serving 127.0.0.1:{port} {process.pid}", flush=True)
        if code := process.wait():
            raise Failed(f"tritonserver ended with exit code {code}")
    except Failed as failed:
        raise Failed(f"{failed}\n{log.read_text(errors='replace')[-4000:]}") from None
    finally:
        stop(process)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--format", type=int, choices=[1, 2], default=2, help="format of the graphs")
    parser.add_argument("--ids", choices=ID_TYPES, default="strings", help="what clients send for an item")
    parser.add_argument("--instances", type=int, default=2)
    args = parser.parse_args()
    python = ENVIRONMENT / "bin" / "python"
    if python.exists() and Path(sys.prefix) != ENVIRONMENT:
        os.execv(python, [str(python), *sys.argv])
    # SystemExit is an exception, so Triton is stopped and the folder removed before the process ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with tempfile.TemporaryDirectory(prefix="midemb-triton-") as folder:
            setup = Setup(args.bundle.resolve(), args.format, ID_TYPES[args.ids], args.instances)
            serve(setup, Path(folder))
    except Failed as failed:
        sys.exit(str(failed))


if __name__ == "__main__":
    main()
