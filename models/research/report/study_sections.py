"""The report's sections on retrieval studies. Each is written for every study, the main one first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from learn.evaluation import metrics
from learn.training.run_length import STILL_RISING
from research.report import plots, retrieval_tables
from research.report.answer import NO_STUDY, Report
from research.report.expected_models import expected_models
from research.report.number_format import paragraphs, percent
from research.report.retrieval_tables import label
from research.report.verdicts import MAIN, MAIN_BY_TIME
from research.retrieval.estimates import StudyEstimates


def models(report: Report) -> str:
    """Section 3: the metrics of all models, and their differences to the rivals."""
    return _for_every_study(report, _models)


def popularity(report: Report) -> str:
    """Section 4: by the number of training events of the target and of the user."""
    opening = (
        "A column is a range of the number of training events of the target, with the number of test events in "
        "brackets."
    )
    return _for_every_study(report, _popularity, opening)


def curves(report: Report) -> str:
    """Section 5: NDCG@10 on validation during training."""
    opening = "Lines are means over seeds, shaded areas the range of the seeds."
    return _for_every_study(report, _curves, opening)


def ablations(report: Report) -> str:
    """Section 6: one table per question, and all models over text from the weakest to the strongest."""
    opening = (
        "How far text alone gets is told from the weakest run to the strongest. Each change is compared with its own "
        "reference, so the steps do not add up. The share of the way counts from the bare content mean (0 %) to the "
        "stronger ID model (100 %), in point estimates."
    )
    return _for_every_study(report, _ablations, opening)


def costs(report: Report) -> str:
    """Section 8: seconds, parameters and machines."""
    opening = (
        "Seconds are means over seeds. *Still improving* counts the runs whose last check on validation was the best, "
        f"by more than {percent(STILL_RISING)} above all checks of the first three quarters."
    )
    return _for_every_study(report, lambda _report, study: [retrieval_tables.costs_table(study)], opening)


def _for_every_study(report: Report, parts_of: Callable[[Report, StudyEstimates], list[str]], opening: str = "") -> str:
    if not report.studies.retrieval:
        return NO_STUDY
    parts = [opening]
    for name, study in report.retrieval():
        parts += [f"### Study `{name}`", *parts_of(report, study)]
    return paragraphs(*parts)


def _is_main(report: Report, study: StudyEstimates) -> bool:
    return study.name == report.studies.main


def _role(report: Report, study: StudyEstimates) -> str:
    """What claims call the study if it is one of the two main ones, else ""."""
    return next((role for role in (MAIN, MAIN_BY_TIME) if report.studies.name(role) == study.name), "")


def _models(report: Report, study: StudyEstimates) -> list[str]:
    return [
        retrieval_tables.main_table(study, expected_models().models if _is_main(report, study) else ()),
        retrieval_tables.largest_users(study),
        "Paired differences to SASRec and to HSTU:",
        retrieval_tables.rivals_table(study),
        "Other cut-offs, and which items the top ten consist of:",
        retrieval_tables.cutoffs_table(study),
    ]


def _popularity(report: Report, study: StudyEstimates) -> list[str]:
    groups = (*retrieval_tables.ITEM_GROUPS, metrics.FEW)
    return [
        retrieval_tables.groups_table(study, groups, "ndcg_at_10"),
        retrieval_tables.groups_table(study, groups, "hr_at_100"),
        _buckets_plot(report, study),
        "Differences:",
        retrieval_tables.group_differences_table(study, "ndcg_at_10"),
        retrieval_tables.group_differences_table(study, "hr_at_100"),
        "By the number of training events of the user:",
        retrieval_tables.groups_table(study, retrieval_tables.USER_GROUPS, "ndcg_at_10"),
    ]


def _buckets_plot(report: Report, study: StudyEstimates) -> str:
    groups = retrieval_tables.ITEM_GROUPS
    names = [retrieval_tables.group_title(study, group) for group in groups]
    by_model = {
        label(study, model): [study.mean(model, "hr_at_100", group) for group in groups]
        for model in retrieval_tables.ordered(study)
    }
    if not by_model:
        return ""
    alt = "H@100 by popularity of the target"
    return report.plot("buckets", study.name, alt, lambda path: plots.buckets(path, names, by_model, "H@100"))


def _curves(report: Report, study: StudyEstimates) -> list[str]:
    learning_curves = [
        curve for model in retrieval_tables.ordered(study) if (curve := curve_of(study, model)) is not None
    ]
    if not learning_curves:
        return ["No run of this study has a learning curve.", retrieval_tables.still_improving(study)]
    shown = report.plot(
        "curves",
        study.name,
        "NDCG@10 on validation against seconds and steps",
        lambda path: plots.curves(path, learning_curves, "NDCG@10, validation"),
    )
    return [shown, retrieval_tables.still_improving(study)]


def curve_of(study: StudyEstimates, model: str) -> plots.Curve | None:
    """The points of the curve that all seeds have; None with fewer than two of them."""
    points_by_seed = [
        {point.step: point for point in run.curve if point.ndcg_at_10 is not None} for run in study.runs(model)
    ]
    steps = sorted(set.intersection(*(set(points) for points in points_by_seed)))
    if len(steps) < 2:
        return None
    seconds, ndcg = (
        np.array([[getattr(points[step], name) for step in steps] for points in points_by_seed])
        for name in ("seconds", "ndcg_at_10")
    )
    return plots.Curve(label(study, model), np.array(steps), seconds.mean(axis=0), ndcg)


def _ablations(report: Report, study: StudyEstimates) -> list[str]:
    role = _role(report, study)
    parts, absent = [], []
    for question, of_question in retrieval_tables.questions(study, role).items():
        remark = report.remark(expected_models().remarks.get(question, "")) if role else ""
        if not any(study.has(model) for model in of_question):
            named = ", ".join(f"`{model}`" for model in of_question)
            absent.append(f"- {question}: {named}. {remark}".rstrip())
            continue
        title = f"#### {question[:1].upper()}{question[1:]}"
        parts += [title, retrieval_tables.question_table(study, of_question), remark]
    if absent:
        parts += ["#### Not run yet", "\n".join(absent)]
    if not parts:
        parts.append("This study has no ablations.")
    parts.append(retrieval_tables.budgets(study))
    return [*parts, "#### How far text alone gets", retrieval_tables.ladder_table(study), _forest(report, study)]


def _forest(report: Report, study: StudyEstimates) -> str:
    gaps = {}
    for run in study.ablations():
        gap = study.difference(run.model, run.reference, "ndcg_at_10")
        if gap is not None:
            gaps[run.label if run.label not in gaps else f"{run.label} ({run.model})"] = gap
    gaps = dict(sorted(gaps.items(), key=lambda pair: (-pair[1].value, pair[0])))
    if not gaps:
        return ""
    xlabel = "NDCG@10 minus that of the reference\n95 % interval; filled marker: p < .05"
    return report.plot("ablations", study.name, "Ablations", lambda path: plots.forest(path, gaps, xlabel))
