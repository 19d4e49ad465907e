"""Runs with an int8 encoder: towers, the graph that they were trained on, and graphs of other bundles."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from child_process import torchrun
from conftest import write_movielens
from int8_bundle import TEXTS, encoder_folder, write_bundle

from learn.cli import main
from learn.content.ceg import EncoderFolder
from learn.models import weights_file
from learn.run_settings import EncoderSettings, Settings
from learn.serving import bundle_check, digests, fixture_bundles, int8_encoder, quantise, tolerances
from learn.training_run import Run

INT8 = ("--encoder-precision", "int8")


def films(folder: Path, name: str = "Film") -> Path:
    catalogue = [(i, f"{name} number {i}", "Drama|War" if i % 2 else "Comedy") for i in range(1, 21)]
    ratings = [(u, (u * 3 + i) % 20 + 1, 5.0 if (u + i) % 2 else 2.0, i) for u in range(1, 13) for i in range(8)]
    return write_movielens(folder, ratings, catalogue)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A folder with a finished run in run/ and its bundle in out/."""
    folder = tmp_path_factory.mktemp("finished")
    data, out = films(folder / "ml"), folder / "out"
    steps = ["--data", str(data), "--steps", "3", "--out", str(out)]
    assert main(["all", *options(folder, tiny_folder), *steps, *INT8]) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run and its bundle for a test that changes them."""
    return shutil.copytree(finished, tmp_path / "copy")


def options(folder: Path, encoder: EncoderFolder, run: str = "run") -> list[str]:
    return ["--run", str(folder / run), "--encoder", str(encoder.folder), "--threads", "1"]


def int8_from(bundle: Path, config: Path) -> list[str]:
    config.write_text(f"[encoder]\nprecision = 'int8'\nint8_from = '{bundle}'\n")
    return ["--config", str(config)]


# --- the graph of a run ----------------------------------------------------------------------------------------------


def test_towers_are_trained_on_the_content_of_the_exported_graph(finished):
    bundle_check.verify(finished / "out")
    manifest = digests.read_manifest(finished / "out")
    provenance = manifest["provenance"]["quantisation"]
    assert manifest["encoder"]["precision"] == "int8" and provenance["n_texts"] == 16
    assert provenance["n_checked"] == 4 and 0.98 < provenance["cosine_min"] <= provenance["cosine_median"] < 1
    (made,) = (finished / "run" / "cache").glob("encoder-int8-*")
    assert (finished / "out" / "encoder.onnx").read_bytes() == (made / "encoder.onnx").read_bytes()


def test_towers_keep_their_graph(tiny_folder, copy, monkeypatch):
    """Anybody may delete cache/, and the catalogue may change; the graph lies beside the towers."""
    run = options(copy, tiny_folder)
    before = (copy / "out" / "encoder.onnx").read_bytes()
    (kept,) = (copy / "run").glob("encoder-int8-*")
    shutil.rmtree(copy / "run" / "cache")
    monkeypatch.setattr(quantise, "quantise", None)
    for data in (copy / "ml", films(copy / "other", "Another film")):
        assert main(["prepare", *run, "--data", str(data), *INT8]) == 0
        for step in (["cvr"], ["evaluate"], ["export", "--out", str(copy / "out")]):
            assert main([*step, *run, *INT8]) == 0
        assert (copy / "out" / "encoder.onnx").read_bytes() == before == (kept / "encoder.onnx").read_bytes()
    assert not list((copy / "run" / "cache").glob("encoder-int8-*"))
    # Towers that are trained anew, on other content, do not need it.
    assert main(["train", *run, "--steps", "2"]) == 0
    assert not kept.exists()


def test_towers_that_do_not_name_their_graph_have_the_one_that_their_run_keeps(tiny_folder, copy):
    for stem in ("towers", "cvr"):
        saved = weights_file.read(copy / "run" / f"{stem}.safetensors")
        saved.pop("graph", None)
        # The first version wrote files of PyTorch.
        (copy / "run" / f"{stem}.safetensors").unlink()
        torch.save(saved, copy / "run" / f"{stem}.pt")
    run = options(copy, tiny_folder)
    assert main(["evaluate", *run, *INT8]) == 0
    assert main(["evaluate", *run]) == 1


def test_towers_whose_graph_was_removed_have_to_be_trained_again(tiny_folder, copy, capsys):
    (kept,) = (copy / "run").glob("encoder-int8-*")
    shutil.rmtree(kept)
    assert main(["evaluate", *options(copy, tiny_folder), *INT8]) == 1
    assert capsys.readouterr().err.endswith(
        f"{kept} is missing, and the towers of this run need that int8 graph: train again\n"
    )


def test_a_step_in_another_precision_is_refused_and_removes_nothing(tiny_folder, copy, capsys):
    run = options(copy, tiny_folder)
    before = sorted(path.name for path in (copy / "run").iterdir())
    for step in (["cvr"], ["evaluate"], ["export", "--out", str(copy / "out")]):
        assert main([*step, *run]) == 1
        assert capsys.readouterr().err == (
            f"learn: {copy / 'run' / 'towers.safetensors'}: its towers were trained with encoder.precision = "
            '"int8", but the settings say "float": pass --encoder-precision int8 (encoder.precision in --config), or '
            "train again\n"
        )
    assert sorted(path.name for path in (copy / "run").iterdir()) == before
    with pytest.raises(ValueError, match="trained with"):
        Run(copy / "run", tiny_folder.folder, Settings()).content_tolerance()
    int8 = Settings(encoder=EncoderSettings(precision="int8"))
    assert Run(copy / "run", tiny_folder.folder, int8).content_tolerance() == tolerances.INT8

    assert main(["train", *run, "--steps", "2"]) == 0
    assert Run(copy / "run", tiny_folder.folder, Settings()).content_tolerance() == tolerances.SINGLE_PRECISION
    capsys.readouterr()
    assert main(["evaluate", *run, *INT8]) == 1
    assert 'with encoder.precision = "float", but the settings say "int8": pass' in capsys.readouterr().err


def test_processes_of_one_training_make_the_graph_once(tiny_folder, finished, tmp_path):
    run = options(tmp_path, tiny_folder)
    assert main(["prepare", *run, "--data", str(finished / "ml")]) == 0
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from learn.cli import main\n"
        "from learn.serving import int8_encoder\n"
        "make = int8_encoder._make\n"
        "int8_encoder._make = lambda *arguments: (print('made'), make(*arguments))[1]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = torchrun(script, "train", *run, "--steps", "2", *INT8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("made") == 1 and (tmp_path / "run" / "towers.safetensors").is_file()


# --- the graph of a bundle -------------------------------------------------------------------------------------------


def test_the_next_run_uses_the_graph_of_a_bundle_even_when_that_bundle_is_gone(tiny_folder, copy, capsys):
    run = options(copy, tiny_folder, "next")
    data = films(copy / "other", "Another film")
    assert main(["prepare", *run, "--data", str(data)]) == 0
    capsys.readouterr()
    # The catalogue has changed, so this run would make a graph of its own.
    assert main(["train", *run, "--steps", "2", "--from", str(copy / "run"), *INT8]) == 1
    assert "name its bundle as encoder.int8_from in --config" in capsys.readouterr().err
    run += int8_from(copy / "out", copy / "next.toml")
    renamed = shutil.copytree(tiny_folder.folder, copy / "renamed")
    assert main(["train", *run, "--encoder", str(renamed), "--steps", "2", "--from", str(copy / "run")]) == 1
    assert "towers have encoder = " in capsys.readouterr().err
    assert main(["train", *run, "--steps", "2", "--from", str(copy / "run")]) == 0
    first = (copy / "out" / "encoder.onnx").read_bytes()
    shutil.rmtree(copy / "out")
    shutil.rmtree(copy / "next" / "cache")
    for step in (["cvr"], ["evaluate"], ["export", "--out", str(copy / "out")]):
        assert main([*step, *run]) == 0
    assert (copy / "out" / "encoder.onnx").read_bytes() == first
    assert digests.read_manifest(copy / "out")["provenance"]["started_from"] == ["run"]


def test_a_graph_of_another_model_is_refused(tiny_bundle, tmp_path):
    (tmp_path / "other").mkdir()
    other, run = encoder_folder(tmp_path / "other", fixture_bundles.FIRST.seed + 1), tmp_path / "run"
    with pytest.raises(ValueError, match="has an int8 graph of other weights than those in"):
        int8_encoder.reused(tiny_bundle, other, TEXTS, run)
    # A graph of another tool may not say what it was made from, but its vectors do.
    manifest = (tiny_bundle / "manifest.toml").read_text()
    silent = shutil.copytree(tiny_bundle, tmp_path / "silent")
    lines = [line for line in manifest.splitlines() if not line.startswith("quantised_from")]
    (silent / "manifest.toml").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="is too far from the model"):
        int8_encoder.reused(silent, other, TEXTS, run)
    assert not list((run / "cache").iterdir())
    (silent / "manifest.toml").write_text(manifest.replace("template = ", 'template = "x" # ', 1))
    with pytest.raises(ValueError, match="has another template for the text of items"):
        int8_encoder.reused(silent, other, TEXTS, run)


def test_how_close_a_graph_is_is_measured_on_the_catalogue_that_uses_it(tiny_folder, tiny_bundle, tmp_path):
    texts = [replace(text, title=f"{text.title}, once more") for text in TEXTS[:7]]
    reused = int8_encoder.reused(tiny_bundle, tiny_folder, texts, tmp_path)
    before = digests.read_manifest(tiny_bundle)["provenance"]["quantisation"]
    assert reused.facts.made["n_checked"] == 7 and before["n_checked"] == 3
    assert reused.facts.made["cosine_min"] != before["cosine_min"] and reused.facts.made["n_texts"] == 15
    known = int8_encoder.reused(tiny_bundle, tiny_folder, TEXTS, tmp_path)
    assert known.folder != reused.folder and known.identity.digest() == reused.identity.digest()


# --- the folder of the encoder ---------------------------------------------------------------------------------------


def test_a_bundle_that_would_remove_the_weights_of_its_encoder_is_refused(tiny_folder, tiny_int8, tmp_path):
    own = shutil.copytree(tiny_folder.folder, tmp_path / "bundle")
    folder = replace(tiny_folder, folder=own)
    # In float, the bundle has the encoder's own weights.
    # First in int8, which the float bundle may replace, as no model is loaded from its graph.
    write_bundle(replace(tiny_int8, tokenizer_path=own / "tokenizer.json"), tmp_path)
    write_bundle(folder.loaded(), tmp_path)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    assert "model.safetensors" in {entry["path"] for entry in digests.read_manifest(own)["files"]}
    with pytest.raises(ValueError, match=r"the new bundle would remove model\.safetensors from it"):
        write_bundle(replace(tiny_int8, tokenizer_path=own / "tokenizer.json"), tmp_path)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    write_bundle(folder.loaded(), tmp_path)
