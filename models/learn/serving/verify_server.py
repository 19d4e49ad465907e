"""Compares a live server with PyTorch, stage by stage (`learn verify`).

Each case is a page of items with the expected vectors, taken from a bundle's golden vectors, which the trainer computed
with PyTorch, or computed here by a run's own encoder, towers and head. Each case is sent to the server twice; the
second response comes from its caches. The responses are compared with the expected vectors, one output line per stage:

    content     content embeddings, from an export of the server's content cache; needs an admin address
    adapted     what the user tower reads of an item, from an export of the server's item records; needs one, too
    item_emb    the item tower's output for the server's own content
    user_emb    the user tower's output for the server's own item records, and the actions that were sent with them
    mid_emb     the CVR head's mid-emb for these two
    cvr         the CVR head's probability

Drift thus accumulates from stage to stage as in production, and the first stage out of tolerance is where it begins.
With a bundle folder, the server's model is also compared with it: version, digests, dimensions and limits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import safetensors.numpy

from learn.data.item_text import ItemText
from learn.serving import digests, grpc_messages
from learn.serving.tolerances import SINGLE_PRECISION, Tolerance

if TYPE_CHECKING:
    from learn.content.ceg import Encoder
    from learn.models.cvr import CvrHead
    from learn.models.pch import Pch

STAGES = ("content", "adapted", "item_emb", "user_emb", "mid_emb", "cvr")
# Stages whose vectors are not in responses, but in exports of the server's caches, in fp32.
CACHED_STAGES = ("content", "adapted")
# The seed of the actions in the requests of a run; half of its requests have some.
ACTIONS_SEED = 20240509
# The error that rounding to the wire's dtype may add: for a value of 1 half a unit in the last place, 2**-11 or 2**-8,
# doubled because mid-embs reach 2. Cosines of whole vectors lose far less.
WIRE_ABSOLUTE = {"f32": 0.0, "f16": 2.0**-10, "bf16": 2.0**-7}
WIRE_COSINE = {"f32": 0.0, "f16": 1e-6, "bf16": 1e-4}
MAX_MESSAGE_BYTES = 256 << 20


@dataclass(frozen=True)
class VerifyConfig:
    """Addresses of the server, and the tolerances."""

    # HOST:PORT of the server's `server.listen`.
    server: str
    # HOST:PORT of the server's `admin.listen`, for `CACHED_STAGES`; it must need neither TLS nor credentials.
    admin: str | None = None
    # The name that the model is served under; empty selects the only model.
    model: str = ""
    dtype: str = "f32"
    # Of every stage, because what the encoder's rounding changes on another CPU goes through all of them.
    tolerance: Tolerance = SINGLE_PRECISION
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.dtype not in grpc_messages.DTYPE_NUMBERS:
            raise ValueError(f"dtype is {self.dtype!r}, but it must be one of {', '.join(grpc_messages.DTYPE_NUMBERS)}")


@dataclass(frozen=True)
class Case:
    """One request with the vectors that PyTorch computes for it."""

    name: str
    history: Sequence[ItemText]
    candidates: Sequence[ItemText]
    user_emb: np.ndarray  # [E]
    item_emb: np.ndarray  # [n,E]
    mid_emb: np.ndarray  # [n,M]; a row of NaN is not compared
    cvr: np.ndarray  # [n]; a NaN is not compared
    content: np.ndarray | None = None  # [n,C]
    adapted: np.ndarray | None = None  # [n,D]
    # What the user did with each history item: names of `learn.models.pch.ACTIONS`, or "unspecified".
    actions: Sequence[str] = ()


@dataclass
class Drift:
    """The largest deviation of one stage."""

    stage: str
    n: int = 0
    max_absolute: float = 0.0
    min_cosine: float = 1.0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        """Adds rows [n,d]; cosines are compared if d is more than 1. Raises ValueError if the shapes differ."""
        if got.shape != want.shape:
            raise ValueError(f"{self.stage}: the server's shape is {list(got.shape)}, expected {list(want.shape)}")
        known = np.isfinite(want).all(axis=1)
        got, want = got[known].astype(np.float64), want[known].astype(np.float64)
        if len(got) == 0:
            return
        self.n += len(got)
        # A NaN from the server counts as an infinite error, because max and min could ignore it.
        error = np.where(np.isfinite(got), np.abs(got - want), np.inf)
        self.max_absolute = max(self.max_absolute, float(error.max()))
        if got.shape[1] > 1:
            lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
            cosines = np.nan_to_num((got * want).sum(axis=1) / np.maximum(lengths, 1e-30), nan=-1.0)
            self.min_cosine = min(self.min_cosine, float(cosines.min()))

    def is_within(self, config: VerifyConfig) -> bool:
        """Whether the stage is within tolerances plus the wire's rounding; what is read from caches is not rounded."""
        dtype = "f32" if self.stage in CACHED_STAGES else config.dtype
        absolute = config.tolerance.absolute + WIRE_ABSOLUTE[dtype]
        return self.max_absolute <= absolute and self.min_cosine >= config.tolerance.cosine - WIRE_COSINE[dtype]


@dataclass
class Report:
    """The drift per stage, and the faults found in responses and in the model's facts."""

    model: str
    drifts: list[Drift] = field(default_factory=lambda: [Drift(stage) for stage in STAGES])
    faults: list[str] = field(default_factory=list)

    def of(self, stage: str) -> Drift:
        """Returns the drift of one stage."""
        return next(drift for drift in self.drifts if drift.stage == stage)

    def is_good(self, config: VerifyConfig) -> bool:
        """Whether there is no fault, at least one comparison, and every stage is within its tolerances."""
        return not self.faults and any(d.n for d in self.drifts) and all(d.is_within(config) for d in self.drifts)

    def table(self, config: VerifyConfig) -> str:
        """Formats one line per stage and one line per fault."""
        lines = [f"{self.model} at {config.server}, {config.dtype}"]
        lines += [f"{'stage':10} {'n':>7} {'max abs error':>14} {'min cosine':>12}"]
        for drift in self.drifts:
            if drift.n == 0:
                is_out_of_reach = drift.stage in CACHED_STAGES and config.admin is None
                why = "not on the wire: give an admin address" if is_out_of_reach else "nothing to compare"
                lines.append(f"{drift.stage:10} {0:7} {why}")
                continue
            verdict = "" if drift.is_within(config) else "  OUT OF TOLERANCE"
            cosine = "-" if drift.stage == "cvr" else f"{drift.min_cosine:.8f}"
            lines.append(f"{drift.stage:10} {drift.n:7} {drift.max_absolute:14.2e} {cosine:>12}{verdict}")
        return "\n".join([*lines, *(f"fault: {fault}" for fault in self.faults)])


def verify(config: VerifyConfig, cases: Iterable[Case], bundle: Path | None = None) -> Report:
    """Sends every case twice and compares; with `bundle`, also the model's facts. Raises gRPC's errors as they are."""
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    messages, services = grpc_messages.stubs()
    with grpc.insecure_channel(config.server, options=options) as channel:
        stub = services.MidEmbServiceStub(channel)
        info = _model_info(stub.GetModelInfo(messages.GetModelInfoRequest(), timeout=config.timeout_seconds), config)
        report = Report(f"{info.model.name} {info.model.version} ({info.model.digest[:12]})")
        if bundle is not None:
            report.faults += _facts(info, bundle)
        known: dict[str, dict[bytes, np.ndarray]] = {stage: {} for stage in CACHED_STAGES}
        for number, case in enumerate(cases):
            for turn in ("cold", "cached"):
                answer = stub.GetMidEmb(_request(case, config, number), timeout=config.timeout_seconds)
                _compare(report, case, answer, (info, turn))
            for stage, vectors in (("content", case.content), ("adapted", case.adapted)):
                if vectors is not None:
                    known[stage] |= dict(zip(map(digests.text_digest, case.candidates), vectors, strict=True))
    if config.admin is not None:
        for stage, vectors in known.items():
            if vectors:
                _compare_cached(report.of(stage), report, vectors, _exported(config, info, stage))
    return report


def verify_and_print(config: VerifyConfig, cases: Iterable[Case], bundle: Path | None = None) -> int:
    """Runs `verify` for the command line: prints the table and returns the exit code, 1 for any error or deviation."""
    try:
        report = verify(config, cases, bundle)
    except grpc.RpcError as error:
        print(f"learn verify: {config.server}: {error.code().name}: {error.details()}")
        return 1
    except ValueError as error:
        print(f"learn verify: {error}")
        return 1
    print(report.table(config))
    return 0 if report.is_good(config) else 1


# --- expected vectors ------------------------------------------------------------------------------------------------


def golden_cases(bundle: Path) -> Iterator[Case]:
    """Yields a bundle's golden vectors as one case per golden user, with all golden items as candidates."""
    manifest = digests.read_manifest(bundle)
    golden = json.loads((bundle / manifest["golden"]["file"]).read_text())
    texts = [ItemText.from_json(entry["text"]) for entry in golden["items"]]
    content, adapted, item_emb = (
        np.array([entry[key] for entry in golden["items"]], np.float32) for key in ("content", "adapted", "item")
    )
    for number, user in enumerate(golden["users"]):
        mid_emb = np.full((len(texts), manifest["cvr"]["dim"]), np.nan, np.float32)
        cvr = np.full(len(texts), np.nan, np.float32)
        for pair in golden["pairs"]:
            if pair["user"] == number:
                mid_emb[pair["item"]], cvr[pair["item"]] = pair["mid_emb"], pair["cvr"]
        history = [texts[position] for position in user["history"]]
        yield Case(
            f"golden user {number}",
            history,
            texts,
            np.array(user["user"], np.float32),
            item_emb,
            mid_emb,
            cvr,
            content,
            adapted,
            tuple(user.get("actions", ())),
        )


@dataclass(frozen=True)
class Towers:
    """The PyTorch models of a run."""

    encoder: Encoder
    pch: Pch
    head: CvrHead


def torch_cases(
    towers: Towers, texts: Sequence[ItemText], pages: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[Case]:
    """Yields one case per page of (history, candidates), positions in `texts`, with the vectors that PyTorch computes.

    The texts are encoded page by page. For towers that read actions, every other page has random ones.
    """
    import torch

    from learn.data.item_text import render
    from learn.models.pch import ACTIONS, UNSPECIFIED
    from learn.models.served_graphs import CvrGraph, ItemTowerGraph, UserTowerGraph

    user_tower, item_tower, cvr_graph = UserTowerGraph(towers.pch), ItemTowerGraph(towers.pch), CvrGraph(towers.head)
    modules = [module.eval() for module in (user_tower, item_tower, cvr_graph)]
    sizes, rng = towers.pch.config, np.random.default_rng(ACTIONS_SEED)
    for number, (history, candidates) in enumerate(pages):
        has_actions = bool(sizes.actions) and number % 2 == 0
        actions = rng.choice([UNSPECIFIED, *ACTIONS], len(history)).tolist() if has_actions else []
        window = list(history)[-sizes.max_history :]
        content = torch.from_numpy(towers.encoder.encode([render(texts[p]) for p in [*window, *candidates]]))
        with torch.inference_mode():
            item, adapted = modules[1](content)
            # An empty history is one item of padding.
            seen = adapted[: len(window)] if window else torch.zeros(1, sizes.width)
            mask = torch.ones(1, len(seen), dtype=torch.int64) * bool(window)
            action = None
            if has_actions and window:
                action = torch.tensor([[sizes.action_number(name) for name in actions[-len(window) :]]])
            user = modules[0](seen[None], mask, action)
            shown = item[len(window) :]
            mid_emb, cvr = modules[2](user, shown, torch.zeros(len(shown), dtype=torch.int64))
        yield Case(
            f"page {number}",
            [texts[position] for position in history],
            [texts[position] for position in candidates],
            user[0].numpy(),
            shown.numpy(),
            mid_emb.numpy(),
            cvr.numpy(),
            content[len(window) :].numpy(),
            adapted[len(window) :].numpy(),
            actions,
        )


# --- the server's responses ------------------------------------------------------------------------------------------


def _model_info(answer: Any, config: VerifyConfig) -> Any:
    served = [info for info in answer.models if not info.shadow_of]
    names = [info.model.name for info in served]
    if config.model:
        served = [info for info in served if info.model.name == config.model]
    if len(served) != 1:
        problem = f"but no model {config.model!r}" if config.model else "so the model to verify must be named"
        raise ValueError(f"{config.server} serves {', '.join(names)}, {problem}")
    return served[0]


def _facts(info: Any, bundle: Path) -> list[str]:
    """Returns the differences between GetModelInfo's response and the bundle folder."""
    manifest = digests.read_manifest(bundle)
    expected = {
        "version": (info.model.version, manifest["version"]),
        "digest": (info.model.digest, digests.bundle_digest(bundle)),
        "encoder_digest": (info.encoder_digest, digests.encoder_digest(manifest)),
        "tower_digest": (info.tower_digest, digests.tower_digest(manifest)),
        "content_dim": (info.content_dim, manifest["encoder"]["dim"]),
        "user_dim": (info.user_dim, manifest["user_tower"]["dim"]),
        "item_dim": (info.item_dim, manifest["item_tower"]["dim"]),
        "adapted_dim": (info.adapted_dim, manifest["item_tower"]["adapted_dim"]),
        "mid_dim": (info.mid_dim, manifest["cvr"]["dim"]),
        "max_history": (info.max_history, manifest["user_tower"]["max_history"]),
        "max_tokens": (info.max_tokens, manifest["item_text"]["max_tokens"]),
        "history_actions": (grpc_messages.action_names(info.history_actions), manifest["history"]["actions"]),
        "history_keeps": (info.history_keeps, manifest["history"]["keeps"]),
    }
    return [f"{name} is {got!r}, but {bundle} has {want!r}" for name, (got, want) in expected.items() if got != want]


def _request(case: Case, config: VerifyConfig, number: int) -> Any:
    messages, _services = grpc_messages.stubs()
    # The id is derived from the text's digest, so no two cases give the server different texts under one id.
    item = lambda text: grpc_messages.item(f"verify-{digests.text_digest(text).hex()}", text)  # noqa: E731
    return messages.GetMidEmbRequest(
        user_id=f"verify-{number}",
        history=[item(text) for text in case.history],
        history_actions=grpc_messages.action_numbers(case.actions),
        candidates=[item(text) for text in case.candidates],
        model=config.model,
        outputs=[messages.OUTPUT_MID_EMB, messages.OUTPUT_CVR, messages.OUTPUT_USER_EMB, messages.OUTPUT_ITEM_EMB],
        dtype=grpc_messages.DTYPE_NUMBERS[config.dtype],
    )


def _compare(report: Report, case: Case, answer: Any, turn: tuple[Any, str]) -> None:
    info, when = turn
    messages, _services = grpc_messages.stubs()
    if (answer.model.version, answer.model.digest) != (info.model.version, info.model.digest):
        report.faults.append(
            f"{case.name}: another model responded, {answer.model.version} ({answer.model.digest[:12]})"
        )
    failed = [messages.RowStatus.Name(status) for status in answer.statuses if status != messages.ROW_STATUS_OK]
    n_expected = min(len(case.history), info.max_history)
    if failed or answer.history_used != n_expected:
        used = f"{answer.history_used} of {n_expected} history items used"
        report.faults.append(f"{case.name}, {when}: {len(failed)} rows not OK {sorted(set(failed))}, {used}")
        return
    report.of("item_emb").add(grpc_messages.array(answer.item_emb), case.item_emb)
    report.of("user_emb").add(grpc_messages.array(answer.user_emb)[None], case.user_emb[None])
    report.of("mid_emb").add(grpc_messages.array(answer.mid_emb), case.mid_emb)
    report.of("cvr").add(grpc_messages.array(answer.cvr)[:, None], case.cvr[:, None])


def _exported(config: VerifyConfig, info: Any, stage: str) -> dict[bytes, np.ndarray]:
    """Exports the server's cache of a stage: text digest -> vector."""
    messages, services = grpc_messages.stubs()
    cache = "item" if stage == "adapted" else stage
    request = messages.ExportCacheRequest(cache=cache, model=info.model.name)
    with grpc.insecure_channel(config.admin) as channel:
        chunks = services.AdminServiceStub(channel).ExportCache(request, timeout=config.timeout_seconds)
        exported = safetensors.numpy.load(b"".join(chunk.data for chunk in chunks))
    vectors = exported["vectors"]
    if stage == "adapted":
        vectors = vectors[:, info.item_dim :]  # An item record is [item | adapted].
    return {digest.tobytes(): vector for digest, vector in zip(exported["text_digests"], vectors, strict=True)}


def _compare_cached(
    drift: Drift, report: Report, known: dict[bytes, np.ndarray], exported: dict[bytes, np.ndarray]
) -> None:
    """Compares the vectors of the texts that were sent with those in the server's cache."""
    found = [digest for digest in known if digest in exported]
    if len(found) < len(known):
        n_missing = len(known) - len(found)
        report.faults.append(f"{drift.stage}: {n_missing} of {len(known)} texts are not in the server's cache")
    if found:
        drift.add(*(np.stack([vectors[digest] for digest in found]) for vectors in (exported, known)))
