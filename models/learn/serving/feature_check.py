"""Sends some of the samples of `features` to a live server, and compares its answers with the table.

Each sample becomes one request with the user's events before the sample's time, as a caller would send it: more of them
than the model reads, with texts, and with actions if the bundle reads any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pyarrow.parquet as pq

from learn.data.actions import ACTIONS, UNSPECIFIED
from learn.data.item_text import ItemText
from learn.serving import digests, feature_inputs, features, grpc_messages, item_shards
from learn.serving.feature_inputs import ITEM, RECORD, TS, USER, Part
from learn.serving.features import VECTORS, FeaturesConfig

# How far a value may be off: both sides run the same graphs on the same inputs, in batches of other sizes.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class CheckConfig:
    """Which server to compare with, on how many samples."""

    server: str
    model: str = ""
    n_samples: int = 100
    seed: int = 1
    timeout_seconds: float = 60.0


@dataclass(frozen=True)
class Row:
    """One sample with its features, and the user's earlier events, oldest first: rows of the catalogue, and actions."""

    record: int
    item: int
    items_before: np.ndarray
    actions_before: np.ndarray
    found: dict[str, Any]


@dataclass
class Report:
    """The largest difference of each column that was compared, and what is wrong, one line each."""

    largest: dict[str, float]
    faults: list[str]

    @property
    def is_good(self) -> bool:
        """Whether all statuses and lengths are equal, and all values within the tolerance."""
        return not self.faults and all(value <= TOLERANCE for value in self.largest.values())


def check_and_print(config: FeaturesConfig, check: CheckConfig) -> int:
    """Runs `check_features` for the command line, and returns the exit code: 1 for any error or difference."""
    try:
        report = check_features(config, check)
    except grpc.RpcError as error:
        print(f"learn features: {check.server}: {error.code().name}: {error.details()}")
        return 1
    for fault in report.faults:
        print(f"learn features: {check.server}: {fault}")
    for name, value in report.largest.items():
        verdict = "" if value <= TOLERANCE else f", more than the accepted {TOLERANCE:g}"
        print(f"{name}: the largest difference to {check.server} is {value:.2g}{verdict}")
    return 0 if report.is_good else 1


def check_features(config: FeaturesConfig, check: CheckConfig) -> Report:
    """Compares random samples; raises grpc.RpcError if the server cannot be called."""
    parts = feature_inputs.read_parts(features.work_folder(config.out)) or []
    manifest = digests.read_manifest(config.bundle)
    rows = list(_rows(config, check, parts, 2 * manifest["user_tower"]["max_history"]))
    texts = _texts(config, {number for row in rows for number in (row.item, *row.items_before.tolist()) if number >= 0})
    report = Report({name: 0.0 for name in config.outputs}, [])
    _messages, services = grpc_messages.stubs()
    with grpc.insecure_channel(check.server) as channel:
        stub = services.MidEmbServiceStub(channel)
        for row in rows:
            request = _request(row, texts, check, bool(manifest["history"]["actions"]))
            answer = stub.GetMidEmb(request, timeout=check.timeout_seconds)
            _compare(report, row, answer, config)
    return report


def _rows(config: FeaturesConfig, check: CheckConfig, parts: list[Part], longest: int) -> Iterator[Row]:
    """Yields the chosen samples, drawn from all parts alike."""
    sizes = np.array([part.n_samples for part in parts])
    rng = np.random.default_rng(check.seed)
    chosen = np.sort(rng.choice(sizes.sum(), min(check.n_samples, int(sizes.sum())), replace=False))
    begins, work = np.cumsum(sizes) - sizes, features.work_folder(config.out)
    for part, begin in zip(parts, begins.tolist(), strict=True):
        positions = chosen[(chosen >= begin) & (chosen < begin + part.n_samples)] - begin
        if not len(positions):
            continue
        events = feature_inputs.read(feature_inputs.events_of(work, part))
        samples = pq.read_table(feature_inputs.samples_of(work, part), columns=[RECORD, USER, TS, ITEM])
        # The features are in the order of the records, the samples in that of users and time.
        order = np.argsort(samples[RECORD].to_numpy(), kind="stable")
        table = pq.read_table(features.part_path(config.out, part))
        for position in positions.tolist():
            sample = samples.slice(int(order[position]), 1).to_pylist()[0]
            before = _before(events, sample, longest)
            found = table.slice(position, 1).to_pylist()[0]
            yield Row(sample[RECORD], sample[ITEM], before["item"], before["action"], found)


def _before(events: dict[str, np.ndarray], sample: dict[str, int], longest: int) -> dict[str, np.ndarray]:
    if not events:
        return {"item": np.empty(0, np.int32), "action": np.empty(0, np.uint8)}
    earlier = np.flatnonzero((events["user"] == sample[USER]) & (events["ts"] < sample[TS]))[-longest:]
    return {name: events[name][earlier] for name in ("item", "action")}


def _texts(config: FeaturesConfig, wanted: set[int]) -> dict[int, ItemText]:
    """Returns the texts of these rows of the catalogue."""
    ids: dict[str, int] = {}
    row = 0
    for path in sorted((config.out / "items").glob("part-*.parquet")):
        for identifier in pq.read_table(path, columns=["id"])["id"].to_pylist():
            if row in wanted:
                ids[identifier] = row
            row += 1
    texts = {}
    shards, _digests = item_shards.plan(config.items, 10_000)
    for shard in shards:
        for item in item_shards.read(shard, 8192)[0]:
            if item.id in ids:
                texts[ids[item.id]] = item.text
    return texts


def _request(row: Row, texts: dict[int, ItemText], check: CheckConfig, reads_actions: bool) -> Any:
    messages, _services = grpc_messages.stubs()
    names = (UNSPECIFIED, *ACTIONS)
    actions = [names[number] for number in row.actions_before] if reads_actions else []

    def item(number: int, place: str) -> Any:
        if number not in texts:
            return messages.Item(id=f"features-check-without-text-{row.record}-{place}")
        return grpc_messages.item(f"features-check-{digests.text_digest(texts[number]).hex()}", texts[number])

    return messages.GetMidEmbRequest(
        user_id=f"features-check-{row.record}",
        history=[item(number, str(place)) for place, number in enumerate(row.items_before.tolist())],
        history_actions=grpc_messages.action_numbers(actions),
        candidates=[item(row.item, "candidate")],
        model=check.model,
        outputs=[messages.OUTPUT_MID_EMB, messages.OUTPUT_CVR, messages.OUTPUT_USER_EMB, messages.OUTPUT_ITEM_EMB],
    )  # fmt: skip


def _compare(report: Report, row: Row, answer: Any, config: FeaturesConfig) -> None:
    messages, _services = grpc_messages.stubs()
    status = messages.RowStatus.Name(answer.statuses[0]).removeprefix("ROW_STATUS_")
    # An item that the catalogue rejected is sent without its text, so the server does not know it.
    expected = {"INVALID_ITEM": "UNKNOWN_ITEM"}.get(row.found["status"], row.found["status"])
    facts = {
        "status": (status, expected),
        "history_length": (answer.history_used, row.found["history_length"]),
        "bundle_digest": (answer.model.digest, row.found["bundle_digest"]),
    }
    for name, (got, wanted) in facts.items():
        if got != wanted:
            report.faults.append(f"sample {row.record + 1}: {name} is {got!r} there, but {wanted!r} in {config.out}")
    if status != "OK" or row.found["status"] != "OK":
        return
    for name in VECTORS:
        if name in config.outputs:
            got = grpc_messages.array(getattr(answer, name)).ravel()
            difference = float(np.abs(got - np.asarray(row.found[name], np.float32).ravel()).max())
            report.largest[name] = max(report.largest[name], difference if np.isfinite(difference) else np.inf)
