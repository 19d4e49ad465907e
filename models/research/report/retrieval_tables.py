"""The report's tables of retrieval studies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learn.evaluation import metrics
from research.report.expected_models import Model, expected_models
from research.report.number_format import (
    METRIC_NAMES,
    NONE,
    NOT_RUN,
    difference,
    multiplicity,
    number,
    paragraphs,
    percent,
    plain,
    table,
    with_interval,
)
from research.retrieval.estimates import StudyEstimates

# How many users the line on the largest of them counts.
N_LARGEST = 10
ITEM_GROUPS = tuple(f"item {name}" for name in metrics.ITEM_BUCKETS)
USER_GROUPS = tuple(f"user {name}" for name in metrics.USER_BUCKETS)
# Models that read content and no ids when they recommend, and models with ids that they are compared with.
TEXT_MODELS = ("content-mean", "content-mean-whitened", "sasrec-text", "unisrec", "learn-text")
ID_MODELS = ("learn-id", "sasrec", "id-towers")
OTHER_CUTOFFS = (
    "hr_at_100",
    "recall_at_100",
    "hr_at_200",
    "ndcg_at_50",
    "ndcg_at_200",
    "mrr_at_10",
    "mrr_at_50",
    "mrr_at_200",
)


def ordered(study: StudyEstimates) -> list[str]:
    """The models that are no ablations, expected ones first and in their order."""
    known = [model.id for model in expected_models().models if study.has(model.id)]
    others = [model for model in study.models if model not in known and study.any_run(model).family != "ablation"]
    return known + others


def label(study: StudyEstimates, model: str) -> str:
    """The label of the model's runs, or the expected one without a run."""
    return study.any_run(model).label if study.has(model) else expected_models().label(model)


def main_table(study: StudyEstimates, expected: Sequence[Model] = ()) -> str:
    """Models x the headline metrics, with intervals. Expected models without a run have a row that says so."""
    names = ("hr_at_10", "ndcg_at_10", *_by_user(study), "mrr", "hr_at_50")
    rows = []
    for model in ordered(study):
        means = [with_interval(study.mean(model, name)) for name in names]
        rows.append([label(study, model), _n_seeds(study, model), *means])
    for model in expected:
        if not study.has(model.id):
            rows.append([model.label, NOT_RUN, *[""] * len(names)])
    return table(["model", "seeds", *(METRIC_NAMES[name] for name in names)], rows)


def _by_user(study: StudyEstimates) -> tuple[str, ...]:
    """The headline metric as a mean over users, where it differs from the mean over events."""
    return ("ndcg_at_10_by_user",) if study.is_by_time else ()


def largest_users(study: StudyEstimates) -> str:
    """What means over events are mostly about in a study whose users have unequally many test events."""
    if not study.is_by_time:
        return ""
    share = percent(study.share_of_largest_users(N_LARGEST))
    return (
        f"The {N_LARGEST} users with the most test events have {share} of all of them, and means over events weigh "
        "them by that. *By user* is the mean over users of each user's own mean, in which all users weigh the same."
    )


def rivals_table(study: StudyEstimates) -> str:
    """Paired differences to the rivals."""
    rivals, names = expected_models().rivals, ("ndcg_at_10", *_by_user(study), "hr_at_10")
    rows, compared = [], []
    for model in ordered(study):
        gaps = [None if model == rival else study.difference(model, rival, name) for rival in rivals for name in names]
        compared += gaps
        rows.append([label(study, model), *map(difference, gaps)])
    header = ["model", *(f"{METRIC_NAMES[name]} − {label(study, rival)}" for rival in rivals for name in names)]
    return f"{table(header, rows)}\n\n{multiplicity(compared)}"


def cutoffs_table(study: StudyEstimates) -> str:
    """The other cut-offs, and what the lists consist of."""
    top = {"head_share_at_10": "head 1 %", "head_5_percent_share_at_10": "head 5 %", "coverage_at_10": "coverage"}
    rows = []
    for model in ordered(study):
        cells = [plain(study.mean(model, name)) for name in OTHER_CUTOFFS]
        for name in top:
            values = [run.top[name] for run in study.runs(model) if name in run.top]
            cells.append(number(float(np.mean(values)), 3) if values else NONE)
        rows.append([label(study, model), *cells])
    return table(["model", *(METRIC_NAMES[name] for name in OTHER_CUTOFFS), *top.values()], rows)


def groups_table(study: StudyEstimates, groups: Sequence[str], metric: str) -> str:
    """Models x groups, means without intervals; the header has the number of test events of each group."""
    header = [METRIC_NAMES[metric], *(group_title(study, group) for group in groups)]
    rows = []
    for model in ordered(study):
        rows.append([label(study, model), *(plain(study.mean(model, metric, group)) for group in groups)])
    return table(header, rows)


def group_title(study: StudyEstimates, group: str) -> str:
    """Such as "new (212)" or "1–4 (430)"."""
    name = group.split(" ", 1)[1].replace("-", "–")
    name = "new" if group == metrics.NEW else name
    return f"{name} ({int(study.groups[group].sum())})"


def group_differences_table(study: StudyEstimates, metric: str) -> str:
    """LEARN and LEARN+ID against the rivals by popularity of the target, with intervals."""
    pairs = [(model, rival) for model in ("learn-text", "learn-id") for rival in expected_models().rivals]
    rows, compared = [], []
    for group in (*ITEM_GROUPS, metrics.FEW):
        gaps = [study.difference(model, rival, metric, group) for model, rival in pairs]
        compared += gaps
        n_users = len(np.unique(study.study.user[study.groups[group]]))
        rows.append([group_title(study, group), str(n_users), *map(difference, gaps)])
    header = [f"ratings of the target, {METRIC_NAMES[metric]}", "users"]
    header += [f"{label(study, model)} − {label(study, rival)}" for model, rival in pairs]
    return f"{table(header, rows)}\n\n{multiplicity(compared)}"


def questions(study: StudyEstimates, role: str) -> dict[str, list[str]]:
    """Question -> the models of its ablations; expected ones first and in their order.

    `role` is "main", "main-by-time", or "" for any other study, of which no ablation is expected. Those that are
    expected are listed even if they have not been run.
    """
    models_of: dict[str, list[str]] = {}
    expected = [
        ablation for ablation in expected_models().ablations if ablation.study == role or study.has(ablation.id)
    ]
    for ablation in expected:
        question = study.any_run(ablation.id).question if study.has(ablation.id) else ablation.question
        models_of.setdefault(question or ablation.question, []).append(ablation.id)
    known = {ablation.id for ablation in expected}
    for run in study.ablations():
        if run.model not in known:
            models_of.setdefault(run.question or "other", []).append(run.model)
    return models_of


def question_table(study: StudyEstimates, models: Sequence[str]) -> str:
    """The ablations of one question, below the runs that they are compared with."""
    names = ("ndcg_at_10", "hr_at_10", "hr_at_100")
    references = {study.any_run(model).reference for model in models if study.has(model)}
    rows = []
    for model in sorted(name for name in references if name):
        if study.has(model):
            cells = [plain(study.mean(model, name)) for name in names]
            rows.append([f"{label(study, model)} (reference)", _n_seeds(study, model), *cells, "", ""])
        else:
            rows.append([f"`{model}` (reference)", NOT_RUN, *([""] * (len(names) + 2))])
    for model in models:
        rows.append(_ablation_row(study, model, names))
    header = [
        "run",
        "seeds",
        *(METRIC_NAMES[name] for name in names),
        "NDCG@10 − reference",
        "the same, items with < 5 ratings",
    ]
    return table(header, rows)


def _ablation_row(study: StudyEstimates, model: str, names: Sequence[str]) -> list[str]:
    if not study.has(model):
        return [label(study, model), NOT_RUN, *([""] * (len(names) + 2))]
    reference = study.any_run(model).reference or ""
    gaps = [study.difference(model, reference, "ndcg_at_10", group) for group in ("all", metrics.FEW)]
    cells = [plain(study.mean(model, name)) for name in names]
    return [label(study, model), _n_seeds(study, model), *cells, *map(difference, gaps)]


def _n_seeds(study: StudyEstimates, model: str) -> str:
    return str(len(study.runs(model)))


def stronger_id_model(study: StudyEstimates) -> str | None:
    """The ID model that text is compared with: the stronger of SASRec and our own towers with IDs."""
    candidates = [model for model in ("sasrec", "id-towers") if study.has(model)]
    return max(candidates, key=lambda model: study.mean(model, "ndcg_at_10").value, default=None)


def ladder(study: StudyEstimates) -> list[str]:
    """Every model over text from the weakest NDCG@10 to the strongest, with ID models and LEARN+ID among them."""
    chosen = [model for model in (*TEXT_MODELS, *ID_MODELS) if study.has(model)]
    chosen += [run.model for run in study.ablations()]
    return sorted(chosen, key=lambda model: (study.mean(model, "ndcg_at_10").value, model))


def text_ladder(study: StudyEstimates) -> list[str]:
    """The part of the ladder that is over text alone; an ablation counts as the model that it changes."""
    return [model for model in ladder(study) if model.split("/")[0] in TEXT_MODELS]


def ladder_table(study: StudyEstimates) -> str:
    """What each change adds, and which share of the way from no training to IDs the model has covered."""
    goal = stronger_id_model(study)
    if goal is None or not study.has("learn-text"):
        return "Needs runs of `learn-text` and of `id-towers` or `sasrec`: not run yet."
    rows = []
    for model in ladder(study):
        run = study.any_run(model)
        step = study.difference(model, run.reference, "ndcg_at_10") if run.reference else None
        left = None if model == goal else study.difference(model, goal, "ndcg_at_10")
        name = f"**{run.label}**" if model in ("learn-text", goal) else run.label
        figure = with_interval(study.mean(model, "ndcg_at_10"))
        rows.append([name, figure, difference(step), difference(left), _share(study, model, goal)])
    against = f"against {label(study, goal)}"
    return table(["run", "NDCG@10", "against its reference", against, "share of the way"], rows)


def budgets(study: StudyEstimates) -> str:
    """The ablations whose budget decides, with the reason."""
    lines = []
    for run in study.ablations():
        if budget := expected_models().budget(run.model, run.config):
            lines.append(f"- {run.label}: {budget}.")
    if not lines:
        return ""
    return paragraphs(
        "Not tested, because the budget decides; the figures show how far the training came:", "\n".join(lines)
    )


def _share(study: StudyEstimates, model: str, goal: str) -> str:
    share = share_of_way(study, model, goal)
    return NONE if share is None else f"{100 * share:.0f} %".replace("-", "−")


def share_of_way(study: StudyEstimates, model: str, goal: str) -> float | None:
    """(model − content mean) / (goal − content mean) on NDCG@10; None unless the goal is ahead."""
    means = [study.mean(name, "ndcg_at_10") for name in (model, "content-mean", goal)]
    if None in means or means[2].value <= means[1].value:
        return None
    reached, begin, end = (mean.value for mean in means)
    return (reached - begin) / (end - begin)


def costs_table(study: StudyEstimates) -> str:
    """Seconds (means over seeds), parameters and machine."""
    rows = []
    for model in [*ordered(study), *(run.model for run in study.ablations())]:
        runs = study.runs(model)
        train, measure = (np.mean([getattr(run.seconds, name) for run in runs]) for name in ("train", "evaluate"))
        machine = ", ".join(sorted({run.machine for run in runs}))
        size = f"{runs[0].n_parameters:,}"
        last = f"{study.n_still_improving(model)} of {len(runs)}" if study.fewest_seeds(model) else NONE
        seconds = (f"{train:.0f}", f"{measure:.1f}")
        rows.append([label(study, model), _n_seeds(study, model), *seconds, last, size, machine])
    header = ["model", "seeds", "training (s)", "evaluation (s)", "still improving", "parameters", "machine"]
    return table(header, rows)


def still_improving(study: StudyEstimates) -> str:
    """The models with a run that was still improving at its last check: their figures may rise with more steps."""
    models = [*ordered(study), *(run.model for run in study.ablations())]
    parts = [
        f"{label(study, model)} ({n} of {len(study.runs(model))} seeds)"
        for model in models
        if (n := study.n_still_improving(model))
    ]
    if not parts:
        return ""
    return (
        "Still improving on validation at the last check, so that more steps may give more; claims on these models say "
        f"so: {', '.join(parts)}."
    )
