"""A live server, the real binary with the fixture bundle, is compared with PyTorch, and drift is found."""

from __future__ import annotations

import dataclasses
import json
import re

import grpc
import numpy as np
import pytest
import tomli_w
import torch
from conftest import FIXTURE, FIXTURES
from live_server import serving

from learn.cli import main
from learn.data.item_text import ItemText, render
from learn.serving import digests, fixture_bundles, grpc_messages, verify_cases, verify_server
from learn.serving.tolerances import INT8, SINGLE_PRECISION, Tolerance
from learn.serving.verify_cases import Case, Towers
from learn.serving.verify_server import Drift, VerifyConfig

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
    assert verify_server.verify_and_print(config, verify_cases.golden_cases(FIXTURE), FIXTURE) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("learn 1 (") and "OUT OF" not in shown
    rows = dict(re.findall(r"^(\w+) +(\d+) +[\d.e-]+ ", shown, re.MULTILINE))
    # Content and records of nine items are read once, from the caches; users and items are compared cold and cached.
    cases = list(verify_cases.golden_cases(FIXTURE))
    assert len(cases) == 9 and sum(bool(case.actions) for case in cases) == 4
    n_pairs = sum(bool(np.isfinite(cvr)) for case in cases for cvr in case.cvr)
    assert rows == {
        "content": "9",
        "adapted": "9",
        "item_emb": str(2 * 9 * 9),
        "user_emb": str(2 * 9),
        "mid_emb": str(2 * n_pairs),
        "cvr": str(2 * n_pairs),
    }


def test_the_server_matches_the_towers_of_a_run(server, towers):
    cases = list(verify_cases.torch_cases(towers, fixture_bundles.ITEMS, PAGES))
    config = VerifyConfig(server.grpc, admin=server.admin)
    report = verify_server.verify(config, cases)
    assert report.is_good(config), report.table(config)
    assert [bool(case.actions) for case in cases] == [False, False, True]
    assert [drift.n for drift in report.drifts] == [6, 6, 2 * 7, 2 * 3, 2 * 7, 2 * 7]
    # Both sides compute in fp32: they differ in the last digits only, and a difference of 0 would mean a copy.
    assert 0 < max(drift.max_absolute for drift in report.drifts) < 2e-5


def test_other_towers_are_reported_from_the_first_output_that_differs(server, capsys):
    other = fixture_bundles.RECIPES["retrained"]
    config = VerifyConfig(server.grpc, admin=server.admin)
    assert (
        verify_server.verify_and_print(
            config, verify_cases.golden_cases(FIXTURES / "retrained"), FIXTURES / "retrained"
        )
        == 1
    )
    shown = capsys.readouterr().out
    off = re.findall(r"^(\w+) .*OUT OF TOLERANCE$", shown, re.MULTILINE)
    # The encoder is the same in both bundles, so content is within the tolerance.
    assert off == ["adapted", "item_emb", "user_emb", "mid_emb", "cvr"]
    assert f"fault: version is '1', but {FIXTURES / 'retrained'} has '{other.version}'" in shown
    faults = re.findall(r"^fault: (\w+) is", shown, re.MULTILINE)
    assert faults == ["version", "digest", "tower_digest", "history_liked_from", "history_disliked_to"]


def test_a_server_that_got_its_item_records_from_elsewhere_needs_no_content(server, towers, tmp_path):
    """Records are imported and no text is embedded, so none is in the content cache; that is no fault."""
    messages, services = grpc_messages.stubs()
    # A server caches the content of its golden texts itself, so these are others, but one.
    texts = [fixture_bundles.ITEMS[0], *(ItemText(title=f"Something new, number {number}") for number in range(3))]
    cases = list(verify_cases.torch_cases(towers, texts, [([1, 2], [3, 0]), ([], [1, 2])]))
    assert verify_server.verify(VerifyConfig(server.grpc, admin=server.admin), cases).notes == []
    with grpc.insecure_channel(server.admin) as channel:
        request = messages.ExportCacheRequest(cache="item", model="learn")
        exported = b"".join(chunk.data for chunk in services.AdminServiceStub(channel).ExportCache(request))
    (tmp_path / "item-000000.safetensors").write_bytes(exported)
    with serving(FIXTURE, tmp_path) as fresh:
        fresh.import_cache(tmp_path / "item-000000.safetensors")
        config = VerifyConfig(fresh.grpc, admin=fresh.admin)
        report = verify_server.verify(config, cases)
    assert report.is_good(config), report.table(config)
    assert [report.of(stage).n for stage in ("content", "adapted")] == [1, 4] and report.n_without_content == 3
    assert (
        "note: content: 3 of 4 texts are not in the server's cache, because it already had their item records; their "
        "content was not compared"
    ) in report.table(config).splitlines()


def test_without_an_admin_address_what_is_only_in_caches_is_reported_as_not_compared(server):
    config = VerifyConfig(server.grpc)
    report = verify_server.verify(config, verify_cases.golden_cases(FIXTURE))
    assert report.is_good(config)
    for stage in ("content", "adapted"):
        assert re.search(rf"^{stage} +0 not on the wire: give an admin address$", report.table(config), re.MULTILINE)


def test_an_error_of_the_admin_listener_names_its_address_and_call(server, capsys):
    assert verify_server.verify_and_print(VerifyConfig(server.grpc, admin="127.0.0.1:1"), []) == 1
    assert capsys.readouterr().out.startswith("learn verify: 127.0.0.1:1: ExportCache: UNAVAILABLE: ")


def test_a_server_that_read_other_actions_is_found_in_the_user_embedding(server, towers):
    (case,) = verify_cases.torch_cases(towers, fixture_bundles.ITEMS, [PAGES[2]])
    config = VerifyConfig(server.grpc)
    assert verify_server.verify(config, [case]).is_good(config)
    for actions in ((), ["dislike"] * len(case.history)):
        report = verify_server.verify(config, [dataclasses.replace(case, actions=actions)])
        off = [drift.stage for drift in report.drifts if not report.is_within(drift, config)]
        assert off[0] == "user_emb" and not report.faults


def test_rows_that_are_not_ok_are_a_fault(server, towers):
    (case,) = verify_cases.torch_cases(towers, fixture_bundles.ITEMS, [([0], [1, 2])])
    config = VerifyConfig(server.grpc)
    too_long = dataclasses.replace(case.candidates[0], title="x" * 9000)
    bad = dataclasses.replace(case, candidates=[too_long, case.candidates[1]])
    report = verify_server.verify(config, [bad])
    assert not report.is_good(config)
    assert report.faults[0] == ("page 0, cold: 1 rows not OK ['ROW_STATUS_INVALID_ITEM'], 1 of 1 history items used")


def test_a_model_name_that_is_not_served_is_an_error(server):
    with pytest.raises(ValueError, match="serves learn, but no model 'other'"):
        verify_server.verify(VerifyConfig(server.grpc, model="other"), [])


# --- without a server ------------------------------------------------------------------------------------------------


def model_info(bundle):
    """What a server of this bundle says about it, without digests."""
    messages, _services = grpc_messages.stubs()
    manifest = digests.read_manifest(bundle)
    return messages.ModelInfo(
        content_dim=manifest["encoder"]["dim"],
        user_dim=manifest["user_tower"]["dim"],
        item_dim=manifest["item_tower"]["dim"],
        adapted_dim=manifest["item_tower"]["adapted_dim"],
        mid_dim=manifest["cvr"]["dim"],
        max_history=manifest["user_tower"]["max_history"],
        max_tokens=manifest["item_text"]["max_tokens"],
        history_actions=[messages.Action.Value(f"ACTION_{a.upper()}") for a in manifest["history"]["actions"]],
        history_keeps=manifest["history"]["keeps"],
        history_liked_from=manifest["history"].get("liked_from"),
        history_disliked_to=manifest["history"].get("disliked_to"),
    )


def test_facts_about_histories_and_records_are_compared_with_the_manifest():
    def faults(info):
        lines = verify_server._facts(info, FIXTURE)
        return [line for line in lines if "digest" not in line and not line.startswith("version")]

    info = model_info(FIXTURE)
    assert faults(info) == []
    info.adapted_dim, info.history_keeps, info.history_liked_from = 41, "liked", 4
    info.history_actions[1] = 9
    assert faults(info) == [
        f"adapted_dim is 41, but {FIXTURE} has 40",
        f"history_actions is ['click', '9', 'dislike', 'purchase'], but {FIXTURE} has "
        "['click', 'like', 'dislike', 'purchase']",
        f"history_keeps is 'liked', but {FIXTURE} has 'all'",
        f"history_liked_from is 4.0, but {FIXTURE} has None",
    ]
    without = model_info(FIXTURES / "reencoded")
    assert not without.history_actions and [line.split(" ")[0] for line in faults(without)] == ["history_actions"]


def test_a_request_has_one_action_per_history_item_or_none(towers):
    messages, _services = grpc_messages.stubs()
    requests = [
        verify_server._request(case, VerifyConfig("x"), 0)
        for case in (
            *verify_cases.golden_cases(FIXTURE),
            *verify_cases.torch_cases(towers, fixture_bundles.ITEMS, PAGES),
        )
    ]
    golden = json.loads((FIXTURE / "golden.json").read_text())["users"]
    for user, request in zip(golden, requests, strict=False):
        names = [messages.Action.Name(number).removeprefix("ACTION_").lower() for number in request.history_actions]
        assert names == user.get("actions", [])
        assert len(request.history) == len(user["history"])
    assert all(len(request.history_actions) in (0, len(request.history)) for request in requests)
    assert messages.ACTION_UNSPECIFIED in requests[8].history_actions and len(requests[-1].history_actions) == 10


def test_expected_vectors_of_a_run_depend_on_the_actions_of_the_items_that_the_tower_reads(towers):
    history = [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]  # The towers read the last eight.
    pages = [(history, [1]), (history, [1]), (history, [1])]
    first, silent, second = verify_cases.torch_cases(towers, fixture_bundles.ITEMS, pages)
    assert first.actions != second.actions and not silent.actions
    assert np.abs(first.user_emb - second.user_emb).max() > 1e-2 < np.abs(first.user_emb - silent.user_emb).max()
    (again, *_rest) = verify_cases.torch_cases(towers, fixture_bundles.ITEMS, pages[:1])
    assert again.actions == first.actions
    np.testing.assert_array_equal(again.user_emb, first.user_emb)
    # The same by hand: content -> adapted items, whose actions are numbered by the towers' own setting.
    numbers = {name: number for number, name in enumerate(("click", "like", "dislike", "purchase"), start=1)}
    texts = [render(fixture_bundles.ITEMS[position]) for position in history[2:]]
    action = torch.tensor([[numbers.get(name, 0) for name in first.actions[2:]]])
    with torch.no_grad():
        content = torch.from_numpy(towers.encoder.encode(texts))[None]
        want = towers.pch.last(content, torch.ones(1, 8, dtype=torch.int64), action)
    np.testing.assert_allclose(first.user_emb, want[0], atol=1e-6)


def test_towers_without_actions_get_none(towers):
    silent = dataclasses.replace(towers, pch=fixture_bundles.Pch(fixture_bundles.SIZES).eval())
    cases = verify_cases.torch_cases(silent, fixture_bundles.ITEMS, PAGES)
    assert not any(case.actions for case in cases)


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


def report_of(**errors):
    """A report of one vector per stage that was compared, each off by the given error."""
    report = verify_server.Report("x")
    for stage, error in errors.items():
        want = np.ones((1, 64))
        want[0, 0] += 1.0
        got = want.copy()
        got[0, 1] += error
        report.of(stage).add(got, want)
    return report


FOR_INT8 = VerifyConfig("x", admin="y", content_tolerance=INT8)


def test_the_wide_tolerance_of_content_hides_no_fault_of_the_towers():
    off = {"item_emb": 0.01, "user_emb": 0.01, "adapted": 0.01, "mid_emb": 0.01, "cvr": 0.01}
    for stage, error in off.items():
        report = report_of(content=0.0, **{stage: error})
        assert not report.is_good(FOR_INT8) and not report.is_within(report.of(stage), FOR_INT8)
        assert report.is_within(report.of("content"), FOR_INT8)
        assert report.table(FOR_INT8).count("OUT OF TOLERANCE") == 1 and "note:" not in report.table(FOR_INT8)
    assert report_of(content=0.0, item_emb=5e-5).is_good(FOR_INT8)


def test_the_stages_after_content_inherit_its_drift_and_so_its_tolerance():
    # As on another CPU: content is within its own tolerance, and no closer.
    report = report_of(content=0.01, item_emb=0.01)
    assert report.is_good(FOR_INT8)
    assert "note: all stages may differ by 0.02, cosine 0.997, as content may: the server's differs by 1.00e-02" in (
        report.table(FOR_INT8)
    )
    # Without content, or with some of it, nobody knows.
    assert report_of(item_emb=0.01).is_good(FOR_INT8)
    assert "content was not compared" in report_of(item_emb=0.01).table(FOR_INT8)
    partial = report_of(content=0.0, item_emb=0.01)
    assert not partial.is_good(FOR_INT8)
    partial.n_without_content = 2
    assert partial.is_good(FOR_INT8) and "the content of 2 texts was not compared" in partial.table(FOR_INT8)
    for report in (report_of(content=0.03), report_of(content=0.01, item_emb=0.03), report_of(item_emb=0.03)):
        assert not report.is_good(FOR_INT8)
    # In single precision, there is one tolerance for all.
    single = VerifyConfig("x", admin="y")
    assert not report_of(content=2e-4).is_good(single) and not report_of(item_emb=2e-4).is_good(single)
    assert "note:" not in report_of(item_emb=5e-5).table(single)


def test_the_command_line_widens_the_tolerance_of_content_alone(tmp_path, monkeypatch):
    manifest = digests.read_manifest(FIXTURE)
    manifest["encoder"]["tolerance"] = {"absolute": 0.03, "cosine": 0.99}
    (tmp_path / "manifest.toml").write_text(tomli_w.dumps(manifest))
    configs = []
    monkeypatch.setattr(verify_server, "verify_and_print", lambda config, *_: configs.append(config) or 0)
    for options in ([], ["--absolute", "0.5"], ["--cosine", "0.9"]):
        assert main(["verify", "--server", "x", "--bundle", str(tmp_path), *options]) == 0
    assert [(config.content_tolerance, config.tolerance) for config in configs] == [
        (Tolerance(0.03, 0.99), SINGLE_PRECISION),
        (Tolerance(0.5, 0.99), Tolerance(0.5, 0.99999)),
        (Tolerance(0.03, 0.9), Tolerance(1e-4, 0.9)),
    ]


@pytest.mark.parametrize("key", ["tolerance", "batching"])
def test_a_bundle_whose_manifest_is_wrong_is_refused_before_a_server_is_called(tmp_path, capsys, key):
    manifest = digests.read_manifest(FIXTURE)
    manifest["encoder"][key] = "wide"
    (tmp_path / "manifest.toml").write_text(tomli_w.dumps(manifest))
    assert main(["verify", "--server", "127.0.0.1:1", "--bundle", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"learn: {tmp_path}/manifest.toml: encoder.{key} ")


def test_a_text_that_is_in_neither_cache_is_a_fault():
    one, two, three = (np.full(4, value, np.float32) for value in (1.0, 2.0, 3.0))
    known = {"content": {b"a": one, b"b": two, b"c": three}, "adapted": {b"a": one, b"b": two, b"c": three}}
    report = verify_server.Report("x")
    # The server computed a; it got the record of b from elsewhere, and c is nowhere.
    verify_server._compare_cached(report, known, {"content": {b"a": one}, "adapted": {b"a": one, b"b": two}})
    assert report.faults == [
        "content: 1 of 3 texts are not in the server's cache",
        "adapted: 1 of 3 texts are not in the server's cache",
    ]
    assert len(report.notes) == 1 and report.notes[0].startswith("content: 1 of 3 texts are not in the server's cache,")
    assert (report.of("content").n, report.of("adapted").n, report.n_without_content) == (1, 2, 2)


def test_a_report_without_comparisons_is_not_good():
    assert not verify_server.Report("x").is_good(VerifyConfig("x"))


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_only_the_rounding_of_the_wire_dtype_is_allowed(dtype):
    want = torch.linspace(-2, 2, 4001).reshape(1, -1)
    rounded = want.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]).float()
    inside, outside = Drift("mid_emb"), Drift("mid_emb")
    inside.add(rounded.numpy(), want.numpy())
    assert inside.is_within(SINGLE_PRECISION, dtype)
    outside.add((want + 1.1e-4 + verify_server.WIRE_ABSOLUTE[dtype]).numpy(), want.numpy())
    assert not outside.is_within(SINGLE_PRECISION, dtype)


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
    (case,) = verify_cases.torch_cases(towers, fixture_bundles.ITEMS, [([1, 2], [3, 4])])
    assert isinstance(case, Case)
    (alone,) = verify_cases.torch_cases(towers, fixture_bundles.ITEMS, [([1, 2], [4])])
    np.testing.assert_allclose(case.mid_emb[1], alone.mid_emb[0], atol=1e-6)
    np.testing.assert_allclose(case.content[1], alone.content[0], atol=1e-6)
    np.testing.assert_allclose(case.adapted[1], alone.adapted[0], atol=1e-6)
