"""The report's tables of retrieval studies, each from `Evidence` alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learn.evaluation import metrics
from research.report.claims import SHOWN
from research.report.number_format import NONE, NOT_RUN, difference, multiplicity, number, plain, table, with_interval
from research.retrieval.estimates import Evidence

ITEM_GROUPS = tuple(f"item {name}" for name in metrics.ITEM_BUCKETS)
USER_GROUPS = tuple(f"user {name}" for name in metrics.USER_BUCKETS)


@dataclass(frozen=True)
class Expected:
    """A model that the report waits for; `question` is what an ablation answers."""

    model: str
    label: str
    question: str = ""


MODELS = (
    Expected("popularity", "Popularity"),
    Expected("content-mean", "Content mean, no training"),
    Expected("sasrec", "SASRec"),
    Expected("hstu", "HSTU, without time"),
    Expected("hstu-time", "HSTU, with time"),
    Expected("id-towers", "ID embeddings in our towers"),
    Expected("learn-text", "LEARN, text only"),
    Expected("learn-id", "LEARN+ID"),
)
RIVALS = ("sasrec", "hstu")
ABLATIONS = (
    Expected("learn-text/published", "alignment as published", "loss"),
    Expected("learn-text/published-variant-2", "as published, item tower (2)", "item tower, as published"),
    Expected("learn-text/published-variant-3", "as published, item tower (3)", "item tower, as published"),
    Expected("learn-text/published-uniform", "as published, uniform sampling", "sampling, as published"),
    Expected("learn-text/variant-2", "item tower (2)", "item tower"),
    Expected("learn-text/variant-3", "item tower (3)", "item tower"),
    Expected("learn-text/alignment", "alignment in place of softmax", "loss"),
    Expected("learn-text/uniform-sampling", "uniform sampling", "sampling"),
    Expected("learn-text/linear-adaptor", "linear adaptor", "adaptor"),
    Expected("learn-text/no-standardise", "content not standardised", "scaling of content"),
    Expected("learn-text/whitening", "whitened content", "scaling of content"),
    Expected("learn-text/temperature-0.1", "temperature .1", "temperature"),
    Expected("learn-text/keywords", "keywords from tags", "keywords"),
    Expected("learn-text/smollm2", "SmolLM2 as encoder", "encoder"),
    Expected("learn-text/lora", "MiniLM tuned with LoRA", "encoder"),
)


def ordered(evidence: Evidence) -> list[str]:
    """Models that are no ablations, the expected ones first and in their order."""
    known = [expected.model for expected in MODELS if evidence.has(expected.model)]
    others = [model for model in evidence.models if model not in known and evidence.one(model).family != "ablation"]
    return known + others


def label(evidence: Evidence, model: str) -> str:
    """The run's own label, or the expected one."""
    if evidence.has(model):
        return evidence.one(model).label
    return next((expected.label for expected in MODELS + ABLATIONS if expected.model == model), f"`{model}`")


def main_table(evidence: Evidence, expected: Sequence[Expected] = ()) -> str:
    """Models x the headline metrics, with intervals. Of the expected ones, those without a run say so."""
    names = ("hr_at_10", "ndcg_at_10", "mrr", "hr_at_50")
    rows = []
    for model in ordered(evidence):
        figures = [with_interval(evidence.figure(model, name)) for name in names]
        rows.append([label(evidence, model), str(len(evidence.runs(model))), *figures])
    header = ["model", "seeds", *(SHOWN[name] for name in names)]
    absent = [model.label for model in expected if not evidence.has(model.model)]
    return table(header, rows + [[name, NOT_RUN, *([""] * len(names))] for name in absent])


def rivals_table(evidence: Evidence) -> str:
    """Paired differences to SASRec and HSTU."""
    names = ("ndcg_at_10", "hr_at_10")
    rows, compared = [], []
    for model in ordered(evidence):
        gaps = [
            None if model == rival else evidence.difference(model, rival, name) for rival in RIVALS for name in names
        ]
        compared += gaps
        rows.append([label(evidence, model), *map(difference, gaps)])
    header = ["model", *(f"{SHOWN[name]} − {label(evidence, rival)}" for rival in RIVALS for name in names)]
    return f"{table(header, rows)}\n\n{multiplicity(compared)}"


def cutoffs_table(evidence: Evidence) -> str:
    """Every other cut-off, and what the lists consist of."""
    shown = {
        "hr_at_100": "H@100",
        "recall_at_100": "R@100",
        "hr_at_200": "HR@200",
        "ndcg_at_50": "NDCG@50",
        "ndcg_at_200": "NDCG@200",
        "mrr_at_10": "MRR@10",
        "mrr_at_50": "MRR@50",
        "mrr_at_200": "MRR@200",
    }
    top = {"head_share_at_10": "head 1 %", "head_5_percent_share_at_10": "head 5 %", "coverage_at_10": "coverage"}
    rows = []
    for model in ordered(evidence):
        cells = [plain(evidence.figure(model, name)) for name in shown]
        for name in top:
            given = [run.top[name] for run in evidence.runs(model) if name in run.top]
            cells.append(number(float(np.mean(given)), 3) if given else NONE)
        rows.append([label(evidence, model), *cells])
    return table(["model", *shown.values(), *top.values()], rows)


def groups_table(evidence: Evidence, groups: Sequence[str], metric: str) -> str:
    """Models x buckets, the figure alone; the header says how many test events a bucket has."""
    header = [SHOWN[metric], *(group_title(evidence, group) for group in groups)]
    rows = []
    for model in ordered(evidence):
        rows.append([label(evidence, model), *(plain(evidence.figure(model, metric, group)) for group in groups)])
    return table(header, rows)


def group_title(evidence: Evidence, group: str) -> str:
    """new (212), 1–4 (430), .."""
    name = group.split(" ", 1)[1].replace("-", "–")
    name = "new" if group == metrics.NEW else name
    return f"{name} ({int(evidence.groups[group].sum())})"


def group_differences_table(evidence: Evidence, metric: str) -> str:
    """LEARN and LEARN+ID against both rivals by popularity of the target, with intervals."""
    pairs = [(model, rival) for model in ("learn-text", "learn-id") for rival in RIVALS]
    rows, compared = [], []
    for group in (*ITEM_GROUPS, metrics.FEW):
        gaps = [evidence.difference(model, rival, metric, group) for model, rival in pairs]
        compared += gaps
        n_users = len({user for user, is_in in zip(evidence.study.user, evidence.groups[group], strict=True) if is_in})
        rows.append([group_title(evidence, group), str(n_users), *map(difference, gaps)])
    header = [f"ratings of the target, {SHOWN[metric]}", "users"]
    header += [f"{label(evidence, model)} − {label(evidence, rival)}" for model, rival in pairs]
    return f"{table(header, rows)}\n\n{multiplicity(compared)}"


def questions(evidence: Evidence) -> dict[str, list[str]]:
    """Question -> models of its ablations, run or expected, in the order of `ABLATIONS`; others after them."""
    found: dict[str, list[str]] = {}
    for expected in ABLATIONS:
        question = evidence.one(expected.model).question if evidence.has(expected.model) else expected.question
        found.setdefault(question or expected.question, []).append(expected.model)
    named = {expected.model for expected in ABLATIONS}
    for run in evidence.ablations():
        if run.model not in named:
            found.setdefault(run.question or "other", []).append(run.model)
    return found


def question_table(evidence: Evidence, models: Sequence[str]) -> str:
    """The ablations of one question under their reference runs."""
    names = ("ndcg_at_10", "hr_at_10", "hr_at_100")
    references = {evidence.one(model).reference for model in models if evidence.has(model)}
    rows = []
    for model in sorted(name for name in references if name):
        if evidence.has(model):
            cells = [plain(evidence.figure(model, name)) for name in names]
            rows.append([f"{label(evidence, model)} (reference)", _seeds(evidence, model), *cells, "", ""])
        else:
            rows.append([f"`{model}` (reference)", NOT_RUN, *([""] * (len(names) + 2))])
    for model in models:
        rows.append(_ablation_row(evidence, model, names))
    header = ["run", "seeds", *(SHOWN[name] for name in names), "NDCG@10 − reference", "of it, items with < 5 ratings"]
    return table(header, rows)


def _ablation_row(evidence: Evidence, model: str, names: Sequence[str]) -> list[str]:
    if not evidence.has(model):
        return [label(evidence, model), NOT_RUN, *([""] * (len(names) + 2))]
    reference = evidence.one(model).reference or ""
    gaps = [evidence.difference(model, reference, "ndcg_at_10", group) for group in ("all", metrics.FEW)]
    cells = [plain(evidence.figure(model, name)) for name in names]
    return [label(evidence, model), _seeds(evidence, model), *cells, *map(difference, gaps)]


def _seeds(evidence: Evidence, model: str) -> str:
    return str(len(evidence.runs(model)))


def goal_of(evidence: Evidence) -> str | None:
    """The ID model that text is measured by: the stronger of SASRec and our own towers with IDs."""
    found = [model for model in ("sasrec", "id-towers") if evidence.has(model)]
    return max(found, key=lambda model: evidence.figure(model, "ndcg_at_10").value, default=None)


def ladder(evidence: Evidence) -> list[str]:
    """Every model of text, from the weakest NDCG@10 to the strongest; ID models and LEARN+ID stand among them."""
    chosen = ["content-mean", "learn-text", "learn-id", "sasrec", "id-towers"]
    chosen += [run.model for run in evidence.ablations()]
    chosen = [model for model in dict.fromkeys(chosen) if evidence.has(model)]
    return sorted(chosen, key=lambda model: (evidence.figure(model, "ndcg_at_10").value, model))


def ladder_table(evidence: Evidence) -> str:
    """What each change does, and how much of the way from no training to IDs is gone after it."""
    goal = goal_of(evidence)
    if goal is None or not evidence.has("learn-text"):
        return "Needs runs of `learn-text` and of `id-towers` or `sasrec`: not run yet."
    rows = []
    for model in ladder(evidence):
        run = evidence.one(model)
        step = evidence.difference(model, run.reference, "ndcg_at_10") if run.reference else None
        left = None if model == goal else evidence.difference(model, goal, "ndcg_at_10")
        name = f"**{run.label}**" if model in ("learn-text", goal) else run.label
        figure = with_interval(evidence.figure(model, "ndcg_at_10"))
        rows.append([name, figure, difference(step), difference(left), _share(evidence, model, goal)])
    against = f"against {label(evidence, goal)}"
    return table(["run", "NDCG@10", "against its reference", against, "share of the way"], rows)


def _share(evidence: Evidence, model: str, goal: str) -> str:
    share = way_gone(evidence, model, goal)
    return NONE if share is None else f"{100 * share:.0f} %".replace("-", "−")


def way_gone(evidence: Evidence, model: str, goal: str) -> float | None:
    """(model − content mean) / (goal − content mean) on NDCG@10; None unless there is a way to go."""
    found = [evidence.figure(name, "ndcg_at_10") for name in (model, "content-mean", goal)]
    if None in found or found[2].value <= found[1].value:
        return None
    return (found[0].value - found[1].value) / (found[2].value - found[1].value)


def costs_table(evidence: Evidence) -> str:
    """Seconds, parameters and machine, means over seeds."""
    rows = []
    for model in [*ordered(evidence), *(run.model for run in evidence.ablations())]:
        runs = evidence.runs(model)
        train, measure = (np.mean([getattr(run.seconds, name) for run in runs]) for name in ("train", "evaluate"))
        machine = ", ".join(sorted({run.machine for run in runs}))
        size = f"{runs[0].n_parameters:,}"
        rows.append([label(evidence, model), _seeds(evidence, model), f"{train:.0f}", f"{measure:.1f}", size, machine])
    return table(["model", "seeds", "seconds of training", "of evaluation", "parameters", "machine"], rows)
