"""Weights in safetensors: what is read is what was written, from earlier versions too, and nothing is unpickled."""

from __future__ import annotations

import pickle
from dataclasses import asdict

import pytest
import torch
from conftest import small_pch
from safetensors.torch import save_file

from learn.models import weights_file
from learn.models.pch import Pch, PchConfig

FACTS = {"origin": {"split": {"fractions": [0.8, 0.9]}, "encoder": "e 1"}, "lineage": [{"run": "a"}], "graph": None}


def test_weights_sizes_and_facts_are_read_as_they_were_written(tmp_path):
    pch = small_pch(actions=("like", "view"))
    weights_file.write(tmp_path, "towers", pch, pch.config, FACTS)
    saved = weights_file.read(tmp_path / "towers.safetensors")
    other = Pch(PchConfig(**saved["sizes"]))
    other.load_state_dict(saved["weights"])
    assert other.config == pch.config and {name: saved[name] for name in FACTS} == FACTS
    for name, value in pch.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    before = (tmp_path / "towers.safetensors").read_bytes()
    weights_file.write(tmp_path, "towers", pch, pch.config, FACTS)
    assert (tmp_path / "towers.safetensors").read_bytes() == before


def test_a_file_of_an_earlier_version_is_read_until_it_is_replaced(tmp_path):
    pch = small_pch()
    tuples = {
        "origin": {"split": {"fractions": (0.8, 0.9)}, "encoder": "e 1"},
        "lineage": [{"run": "a"}],
        "graph": None,
    }
    torch.save({"sizes": asdict(pch.config), "weights": pch.state_dict()} | tuples, tmp_path / "towers.pt")
    assert weights_file.path_in(tmp_path, "towers") == tmp_path / "towers.pt"
    earlier = weights_file.read(tmp_path / "towers.pt")
    weights_file.write(tmp_path, "towers", pch, pch.config, FACTS)
    assert not (tmp_path / "towers.pt").exists()
    now = weights_file.read(weights_file.path_in(tmp_path, "towers"))
    assert {name: value for name, value in now.items() if name != "weights"} == {
        name: value for name, value in earlier.items() if name != "weights"
    }
    assert weights_file.path_in(tmp_path, "cvr") == tmp_path / "cvr.safetensors"
    weights_file.remove(tmp_path, "towers")
    assert not list(tmp_path.iterdir())


class Malicious:
    def __reduce__(self):
        return print, ("code from the file has run",)


@pytest.mark.parametrize(
    "raw",
    [b"", b"garbage", b"\x08" + bytes(7) + b'{"a": 1}', pickle.dumps({"weights": Malicious()}, protocol=2)],
    ids=["empty", "garbage", "a header alone", "a pickle that runs code"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_cannot_be_read_is_an_error_and_runs_nothing(tmp_path, capsys, suffix, raw):
    (tmp_path / f"towers{suffix}").write_bytes(raw)
    with pytest.raises(ValueError):
        weights_file.read(tmp_path / f"towers{suffix}")
    assert capsys.readouterr().out == ""


def test_a_file_of_something_else_is_an_error(tmp_path):
    torch.save([1, 2], tmp_path / "towers.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "towers.safetensors", {"midemb": "[]"})
    save_file({"a": torch.zeros(1)}, tmp_path / "cvr.safetensors")
    for name in ("towers.pt", "towers.safetensors", "cvr.safetensors"):
        with pytest.raises(ValueError):
            weights_file.read(tmp_path / name)


def test_a_malicious_pickle_inside_a_file_of_pytorch_is_refused(tmp_path, capsys):
    torch.save({"weights": {}, "sizes": Malicious()}, tmp_path / "towers.pt")
    with pytest.raises(ValueError, match="Weights only load failed"):
        weights_file.read(tmp_path / "towers.pt")
    assert capsys.readouterr().out == ""


def test_a_safetensors_file_of_another_program_is_an_error(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "towers.safetensors")
    with pytest.raises(ValueError, match="midemb"):
        weights_file.read(tmp_path / "towers.safetensors")
