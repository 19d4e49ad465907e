"""Compares a live server with PyTorch, stage by stage (`learn verify`).

Each case is a page of items with the expected vectors (`verify_cases`). For an encoder in int8, of which PyTorch has
no model, ONNX Runtime computes the expected content with the same graph. Each case is sent to the server twice; the
second response comes from its caches. The responses are compared with the expected vectors, one output line per stage:

    content     content embeddings, from an export of the server's content cache; needs an admin address
    adapted     what the user tower reads of an item, from an export of the server's item records; needs one, too
    item_emb    the item tower's output for the server's own content
    user_emb    the user tower's output for the server's own item records, and the actions that were sent with them
    mid_emb     the CVR head's mid-emb for these two
    cvr         the CVR head's probability

Drift thus accumulates from stage to stage as in production, and the first stage out of tolerance is where it begins.
An encoder in int8 has a wide tolerance of its own, for other CPUs. The stages after it have a narrow one if all content
was compared and is as close as single precision is; else they inherit the encoder's drift, and so its tolerance.
With a bundle folder, the server's model is also compared with it: version, digests, dimensions and limits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import safetensors.numpy

from learn.serving import digests, grpc_messages
from learn.serving.tolerances import SINGLE_PRECISION, Tolerance
from learn.serving.verify_cases import Case

STAGES = ("content", "adapted", "item_emb", "user_emb", "mid_emb", "cvr")
# Stages whose vectors are not in responses, but in exports of the server's caches, in fp32.
CACHED_STAGES = ("content", "adapted")
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
    # Of the content embeddings, which the manifest of an encoder in int8 widens.
    content_tolerance: Tolerance = SINGLE_PRECISION
    # Of the stages after them; see `Report.tolerance`.
    tolerance: Tolerance = SINGLE_PRECISION
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.dtype not in grpc_messages.DTYPE_NUMBERS:
            raise ValueError(f"dtype is {self.dtype!r}, but it must be one of {', '.join(grpc_messages.DTYPE_NUMBERS)}")


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

    def is_within(self, tolerance: Tolerance, dtype: str) -> bool:
        """Whether the stage is within the tolerance plus the wire's rounding, which cached vectors do not have."""
        dtype = "f32" if self.stage in CACHED_STAGES else dtype
        absolute, cosine = tolerance.absolute + WIRE_ABSOLUTE[dtype], tolerance.cosine - WIRE_COSINE[dtype]
        return self.max_absolute <= absolute and self.min_cosine >= cosine


@dataclass
class Report:
    """The drift per stage, and the faults found in responses and in the model's facts."""

    model: str
    drifts: list[Drift] = field(default_factory=lambda: [Drift(stage) for stage in STAGES])
    faults: list[str] = field(default_factory=list)
    # What is no fault, but limits what was compared.
    notes: list[str] = field(default_factory=list)
    # Texts whose content embedding could not be compared.
    n_without_content: int = 0

    def of(self, stage: str) -> Drift:
        """Returns the drift of one stage."""
        return next(drift for drift in self.drifts if drift.stage == stage)

    def tolerance(self, stage: str, config: VerifyConfig) -> Tolerance:
        """Returns the tolerance of a stage: for the stages after content, the wider one if content may have drifted."""
        if stage == "content" or self._why_wide(config):
            return config.content_tolerance
        return config.tolerance

    def is_within(self, drift: Drift, config: VerifyConfig) -> bool:
        """Whether one stage is within its tolerance."""
        return drift.is_within(self.tolerance(drift.stage, config), config.dtype)

    def is_good(self, config: VerifyConfig) -> bool:
        """Whether there is no fault, at least one comparison, and every stage is within its tolerances."""
        is_compared = any(drift.n for drift in self.drifts)
        return not self.faults and is_compared and all(self.is_within(drift, config) for drift in self.drifts)

    def table(self, config: VerifyConfig) -> str:
        """Formats one line per stage, note and fault."""
        lines = [f"{self.model} at {config.server}, {config.dtype}"]
        lines += [f"{'stage':10} {'n':>7} {'max abs error':>14} {'min cosine':>12}"]
        for drift in self.drifts:
            if drift.n == 0:
                is_out_of_reach = drift.stage in CACHED_STAGES and config.admin is None
                why = "not on the wire: give an admin address" if is_out_of_reach else "nothing to compare"
                lines.append(f"{drift.stage:10} {0:7} {why}")
                continue
            verdict = "" if self.is_within(drift, config) else "  OUT OF TOLERANCE"
            cosine = "-" if drift.stage == "cvr" else f"{drift.min_cosine:.8f}"
            lines.append(f"{drift.stage:10} {drift.n:7} {drift.max_absolute:14.2e} {cosine:>12}{verdict}")
        notes = list(self.notes)
        if why := self._why_wide(config):
            wide = config.content_tolerance
            notes.append(f"all stages may differ by {wide.absolute:g}, cosine {wide.cosine:g}, as content may: {why}")
        return "\n".join([*lines, *(f"note: {note}" for note in notes), *(f"fault: {fault}" for fault in self.faults)])

    def _why_wide(self, config: VerifyConfig) -> str:
        """Returns why the stages after content get its tolerance, or nothing if they do not."""
        content = self.of("content")
        if config.content_tolerance == config.tolerance:
            return ""
        if content.n == 0:
            return "content was not compared"
        if self.n_without_content:
            return f"the content of {self.n_without_content} texts was not compared"
        if not content.is_within(config.tolerance, "f32"):
            return f"the server's differs by {content.max_absolute:.2e}, as on another CPU"
        return ""


def verify(config: VerifyConfig, cases: Iterable[Case], bundle: Path | None = None) -> Report:
    """Sends every case twice and compares; with `bundle`, also the model's facts.

    Raises the server's gRPC errors as they are, and the admin listener's as ValueErrors.
    """
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
        exported = {stage: _exported(config, info, stage) for stage in CACHED_STAGES}
        _compare_cached(report, known, exported)
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
        "history_liked_from": (_optional(info, "history_liked_from"), manifest["history"].get("liked_from")),
        "history_disliked_to": (_optional(info, "history_disliked_to"), manifest["history"].get("disliked_to")),
    }
    return [f"{name} is {got!r}, but {bundle} has {want!r}" for name, (got, want) in expected.items() if got != want]


def _optional(info: Any, name: str) -> Any:
    return getattr(info, name) if info.HasField(name) else None


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
    """Exports the server's cache of a stage: text digest -> vector. Raises ValueError for an error of gRPC."""
    messages, services = grpc_messages.stubs()
    cache = "item" if stage == "adapted" else stage
    request = messages.ExportCacheRequest(cache=cache, model=info.model.name)
    try:
        with grpc.insecure_channel(config.admin) as channel:
            chunks = services.AdminServiceStub(channel).ExportCache(request, timeout=config.timeout_seconds)
            exported = safetensors.numpy.load(b"".join(chunk.data for chunk in chunks))
    except grpc.RpcError as error:
        raise ValueError(f"{config.admin}: ExportCache: {error.code().name}: {error.details()}") from error
    vectors = exported["vectors"]
    if stage == "adapted":
        vectors = vectors[:, info.item_dim :]  # An item record is [item | adapted].
    return {digest.tobytes(): vector for digest, vector in zip(exported["text_digests"], vectors, strict=True)}


def _compare_cached(
    report: Report, known: dict[str, dict[bytes, np.ndarray]], exported: dict[str, dict[bytes, np.ndarray]]
) -> None:
    """Compares the vectors of the texts that were sent with those in the server's caches, by stage.

    A text whose item record the server had already needs no content embedding, so the cache may lack it.
    """
    for stage, vectors in known.items():
        missing = vectors.keys() - exported[stage].keys()
        needless = missing & exported["adapted"].keys() if stage == "content" else set()
        if needless:
            report.notes.append(
                f"content: {len(needless)} of {len(vectors)} texts are not in the server's cache, because it already "
                "had their item records; their content was not compared"
            )
        if n_faults := len(missing) - len(needless):
            report.faults.append(f"{stage}: {n_faults} of {len(vectors)} texts are not in the server's cache")
        if stage == "content":
            report.n_without_content = len(missing)
        found = [digest for digest in vectors if digest not in missing]
        if found:
            report.of(stage).add(*(np.stack([of[digest] for digest in found]) for of in (exported[stage], vectors)))
