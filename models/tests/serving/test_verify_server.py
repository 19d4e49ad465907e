"""A live server, the real binary with the fixture bundle, is compared with PyTorch, and drift is found."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from conftest import FIXTURE, FIXTURES
from live_server import serving

from learn.serving import fixture_bundles, grpc_messages, verify_server
from learn.serving.verify_server import Case, Drift, Towers, VerifyConfig

PAGES = [([], [0, 1]), ([2], [3]), ([5, 4, 3, 2, 1, 0, 1, 2, 3, 4], [6, 7, 8, 0])]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(FIXTURE, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """The models of the fixture bundle in PyTorch, rebuilt from its recipe."""
    built = fixture_bundles.build(tmp_path_factory.mktemp("towers") / "tokenizer.json")
    return Towers(built.encoder, built.pch, built.head)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_server_reproduces_the_golden_vectors(server, dtype, capsys):
    config = VerifyConfig(server.grpc, admin=server.admin, dtype=dtype)
    assert verify_server.verify_and_print(config, verify_server.golden_cases(FIXTURE), FIXTURE) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("learn 1 (") and "OUT OF" not in shown
    rows = dict(re.findall(r"^(\w+) +(\d+) +[\d.e-]+ ", shown, re.MULTILINE))
    # The content of nine items is read once, from the cache; five users and all items are compared cold and cached.
    n_pairs = sum(bool(np.isfinite(cvr)) for case in verify_server.golden_cases(FIXTURE) for cvr in case.cvr)
    assert rows == {
        "content": "9",
        "item_emb": str(2 * 5 * 9),
        "user_emb": str(2 * 5),
        "mid_emb": str(2 * n_pairs),
        "cvr": str(2 * n_pairs),
    }


def test_the_server_matches_the_towers_of_a_run(server, towers):
    cases = list(verify_server.torch_cases(towers, fixture_bundles.ITEMS, PAGES))
    config = VerifyConfig(server.grpc, admin=server.admin)
    report = verify_server.verify(config, cases)
    assert report.is_good(config), report.table(config)
    assert [drift.n for drift in report.drifts] == [6, 2 * 7, 2 * 3, 2 * 7, 2 * 7]
    # Both sides compute in fp32: they differ in the last digits only, and a difference of 0 would mean a copy.
    assert 0 < max(drift.max_absolute for drift in report.drifts) < 2e-5


def test_other_towers_are_reported_from_the_first_output_that_differs(server, capsys):
    other = fixture_bundles.RECIPES["retrained"]
    config = VerifyConfig(server.grpc, admin=server.admin)
    assert (
        verify_server.verify_and_print(
            config, verify_server.golden_cases(FIXTURES / "retrained"), FIXTURES / "retrained"
        )
        == 1
    )
    shown = capsys.readouterr().out
    off = re.findall(r"^(\w+) .*OUT OF TOLERANCE$", shown, re.MULTILINE)
    # The encoder is the same in both bundles, so content is within the tolerance.
    assert off == ["item_emb", "user_emb", "mid_emb", "cvr"]
    assert f"fault: version is '1', but {FIXTURES / 'retrained'} has '{other.version}'" in shown
    faults = re.findall(r"^fault: (\w+) is", shown, re.MULTILINE)
    assert faults == ["version", "digest", "tower_digest"]


def test_without_an_admin_address_content_is_reported_as_not_compared(server):
    config = VerifyConfig(server.grpc)
    report = verify_server.verify(config, verify_server.golden_cases(FIXTURE))
    assert report.is_good(config)
    assert "not on the wire: give an admin address" in report.table(config)


def test_rows_that_are_not_ok_are_a_fault(server, towers):
    (case,) = verify_server.torch_cases(towers, fixture_bundles.ITEMS, [([0], [1, 2])])
    config = VerifyConfig(server.grpc)
    too_long = dataclasses.replace(case.candidates[0], title="x" * 9000)
    bad = dataclasses.replace(case, candidates=[too_long, case.candidates[1]])
    report = verify_server.verify(config, [bad])
    assert not report.is_good(config)
    assert report.faults[0] == ("page 0, cold: 1 rows not OK ['ROW_STATUS_INVALID_ITEM'], 1 of 1 history items used")


def test_a_model_name_that_is_not_served_is_an_error(server):
    with pytest.raises(ValueError, match="serves learn, but no model 'other'"):
        verify_server.verify(VerifyConfig(server.grpc, model="other"), [])


def test_an_unreachable_server_is_reported(capsys):
    assert verify_server.verify_and_print(VerifyConfig("127.0.0.1:1"), []) == 1
    assert "127.0.0.1:1: UNAVAILABLE" in capsys.readouterr().out


def test_drift_matches_hand_computed_values():
    drift = Drift("mid_emb")
    drift.add(np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([[4.0, 3.0], [np.nan, 1.0]]))
    assert (drift.n, drift.max_absolute) == (1, 1.0)
    assert drift.min_cosine == pytest.approx(24 / 25)
    drift.add(np.array([[np.nan, 1.0]]), np.array([[1.0, 1.0]]))
    assert (drift.n, drift.max_absolute, drift.min_cosine) == (2, np.inf, -1.0)
    with pytest.raises(ValueError, match=r"mid_emb: the server's shape is \[1, 3\], expected \[1, 2\]"):
        drift.add(np.zeros((1, 3)), np.zeros((1, 2)))


def test_a_report_without_comparisons_is_not_good():
    assert not verify_server.Report("x").is_good(VerifyConfig("x"))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_only_the_rounding_of_the_wire_dtype_is_allowed(dtype):
    config = VerifyConfig("x", dtype=dtype)
    want = torch.linspace(-2, 2, 4001).reshape(1, -1)
    rounded = want.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]).float()
    inside, outside = Drift("mid_emb"), Drift("mid_emb")
    inside.add(rounded.numpy(), want.numpy())
    assert inside.is_within(config)
    outside.add((want + 1.1e-4 + verify_server.WIRE_ABSOLUTE[dtype]).numpy(), want.numpy())
    assert not outside.is_within(config)


@pytest.mark.parametrize("dtype", [1, 2, 3])
def test_tensors_of_each_dtype_are_decoded(dtype):
    messages, _services = grpc_messages.stubs()
    values = np.array([[1.5, -2.0], [0.25, 0.0]], np.float32)
    data = values.astype(grpc_messages.DTYPES[dtype]).tobytes()
    assert np.array_equal(grpc_messages.array(messages.Tensor(dtype=dtype, shape=[2, 2], data=data)), values)
    with pytest.raises(ValueError, match=rf"has {len(data)} bytes for the shape \[2, 3\]"):
        grpc_messages.array(messages.Tensor(dtype=dtype, shape=[2, 3], data=data))
    with pytest.raises(ValueError, match="has the dtype 0"):
        grpc_messages.array(messages.Tensor(dtype=0, shape=[2, 2], data=data))


def test_a_case_does_not_depend_on_its_other_candidates(towers):
    (case,) = verify_server.torch_cases(towers, fixture_bundles.ITEMS, [([1, 2], [3, 4])])
    assert isinstance(case, Case)
    (alone,) = verify_server.torch_cases(towers, fixture_bundles.ITEMS, [([1, 2], [4])])
    np.testing.assert_allclose(case.mid_emb[1], alone.mid_emb[0], atol=1e-6)
    np.testing.assert_allclose(case.content[1], alone.content[0], atol=1e-6)
