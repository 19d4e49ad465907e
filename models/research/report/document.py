"""`learn report`: the files of `results/` -> REPORT.md and its plots. Equal files give equal bytes.

    retrieval.result_files, ranking.result_files    files -> studies and runs, checked
    retrieval.estimates, ranking.summary            runs -> estimates with intervals
    claims, verdicts                                what LEARN claims -> holds, does not hold, not shown, not tested
    answer                                          the short answer, the verdicts, what was not tested
    retrieval_tables, ranking_table, plots          estimates -> Markdown and PNG
    document                                        the sections and their order

No figure and no verdict is written into code: they are computed, and what was not run is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from learn.atomic_file import replacing
from learn.evaluation import metrics
from research.bootstrap import BootstrapConfig
from research.ranking.arms import CONTROL
from research.ranking.auc_metrics import POOLED_DRAWS
from research.ranking.summary import Row
from research.report import plots, ranking_table, retrieval_tables
from research.report.answer import Report, answer, tally, untested
from research.report.claims import ClaimList, read_claims
from research.report.expected_models import Model, expected_models
from research.report.number_format import paragraphs
from research.report.retrieval_tables import label
from research.report.verdicts import MAIN_BY_TIME, Studies, decide
from research.retrieval import result_files
from research.retrieval.estimates import StudyEstimates

PLOTS = "report"
NO_MAIN = "*Not run yet: there is no retrieval study.*"


def build(
    results_root: Path, out: Path, config: BootstrapConfig | None = None, claims: ClaimList | None = None
) -> list[Path]:
    """Reads `results_root` and writes the report `out` and `report/*.png` beside it; returns the paths written.

    `claims` are those of `claims.toml` by default. `config` is for tests that need fewer replicates; its level has to
    stay .95, which is what the text says. PNGs in `report/` that the new report does not show are removed.

    Raises `DataError` for a file that does not have the form that `result_files` describes, FileNotFoundError if the
    folder is missing.
    """
    results, config, claims = result_files.read(results_root), config or BootstrapConfig(), claims or read_claims()
    retrieval = {name: StudyEstimates(study, config) for name, study in results.retrieval.items()}
    studies = Studies(retrieval, _main_study(retrieval, claims), ranking_table.read_all(results.ranking, config))
    findings = {claim.id: decide(claim, studies) for claim in claims.claims()}
    report = Report(studies, claims, findings, config, out.parent / PLOTS, [])
    text = _text(report)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        partial.write_text(text, encoding="utf-8")
    for stale in set(report.plots.glob("*.png")) - set(report.written):
        stale.unlink()
    print(f"{out}: {tally(report)}, {len(report.written)} plots")
    return [out, *report.written]


def _main_study(retrieval: dict[str, StudyEstimates], claims: ClaimList) -> str | None:
    """The main study that the claims name, or else the first one that no claim names as a study of its own."""
    if claims.main_study in retrieval:
        return claims.main_study
    named = {getattr(claim, "study", None) for claim in claims.claims()}
    return next((name for name in retrieval if name not in named and not name.endswith("-by-time")), None)


def _text(report: Report) -> str:
    parts = (
        ("1. The claims, and the short answer", answer),
        ("2. Protocol", _protocol),
        ("3. All models", _models),
        ("4. By popularity of the target", _popularity),
        ("5. Learning curves", _curves),
        ("6. Ablations, and how far text alone gets", _ablations),
        ("7. A ranking model with and without the mid-emb", _ranking),
        ("8. Costs", _costs),
        ("9. Claims that were not tested, and why", untested),
    )
    opening = paragraphs(
        "# LEARN, tested",
        "Written by `learn report` from the files of the runs in `results/`. Every figure, interval and verdict is "
        "computed from them. Only the claims and the remarks on them were written by a person "
        "(`research/report/claims.toml`).",
    )
    return paragraphs(opening, *(f"## {title}\n\n{write(report)}" for title, write in parts)) + "\n"


# --- 2 ---------------------------------------------------------------------------------------------------------------


def _protocol(report: Report) -> str:
    lines = [_study_line(name, study) for name, study in report.studies.retrieval.items()] or [NO_MAIN]
    lines += [
        "The last events of each user are held out: the newest for the test, those before them for validation. In a "
        "study that is split by time, all events after a moment are held out. Training sees none of them. Ties in time "
        "are broken by a fixed rule.",
        "The history of a test event is everything before it, earlier test events included. All items that the user "
        "has not met are ranked, without sampling; ties count against the model.",
        "The candidates of the loss are the items that training meets, because a new item is not known yet when a "
        "model is trained and so cannot be a negative. One ablation measures what this choice is worth.",
        "HR, NDCG and MRR are means over test events, then over seeds. R@k is the mean over users of each user's share "
        "of hits; it equals HR@k where all users have equally many test events.",
        f"Intervals are 95 % percentile intervals of {report.config.n_resamples:,} bootstrap replicates "
        f"({min(POOLED_DRAWS, report.config.n_resamples):,} for the pooled AUC of section 7). A replicate draws users "
        "with all their events and, independently, seeds; both models of a difference are measured on the same draw.",
        "The intervals of a model with one seed (column *seeds*) are too narrow, because they have no variance of "
        "training.",
        "Groups of events are formed by the number of training events of the target (0 is a new item) or of the user.",
        "Head share is the share of all top-10 places that go to the most popular 1 % (5 %) of the catalogue. Coverage "
        "is the share of the catalogue that is in at least one top 10.",
        "All models of a study share test events, ranked items and history. The settings of each run are in the header "
        "of its file.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _study_line(name: str, estimates: StudyEstimates) -> str:
    study = estimates.study
    data, protocol = study.data, study.protocol
    held_out = f"held out per user are {protocol.n_test} for the test and {protocol.n_validation} for validation"
    if not protocol.n_test:
        held_out = "split by time, validation before test"
    notes = "".join(f" {note.rstrip('.')}." for note in protocol.notes)
    n_users, n_new = len(np.unique(study.user)), int(estimates.groups[metrics.NEW].sum())
    return (
        f"Study `{name}`: {data.n_users:,} users, {data.n_items:,} items, {data.n_events:,} events; {held_out}; "
        f"{len(study.user):,} test events of {n_users:,} users, {n_new:,} of them on new items. "
        f"Digest `{data.digest[:12]}`.{notes}"
    )


# --- 3 to 6 ----------------------------------------------------------------------------------------------------------


def _models(report: Report) -> str:
    if report.main is None:
        return NO_MAIN
    parts = [f"Study `{report.studies.main}`.", *_model_tables(report.main, expected_models().models)]
    for name, study in report.studies.retrieval.items():
        if name != report.studies.main:
            parts += [f"### Study `{name}`", *_model_tables(study)]
    return paragraphs(*parts)


def _model_tables(study: StudyEstimates, expected: Sequence[Model] = ()) -> list[str]:
    return [
        retrieval_tables.main_table(study, expected),
        "Paired differences to SASRec and to HSTU:",
        retrieval_tables.rivals_table(study),
        "Other cut-offs, and which items the top ten consist of:",
        retrieval_tables.cutoffs_table(study),
    ]


def _popularity(report: Report) -> str:
    study = report.main
    if study is None:
        return NO_MAIN
    parts = [
        "A column is a range of the number of training events of the target, with the number of test events in "
        "brackets.",
        *_popularity_of_study(report, study, "buckets"),
        "By the number of training events of the user:",
        retrieval_tables.groups_table(study, retrieval_tables.USER_GROUPS, "ndcg_at_10"),
    ]
    if (by_time := report.studies.study(MAIN_BY_TIME)) is not None:
        parts += [f"### Study `{by_time.study.study}`", *_popularity_of_study(report, by_time, "buckets-by-time")]
    return paragraphs(*parts)


def _popularity_of_study(report: Report, study: StudyEstimates, plot: str) -> list[str]:
    groups = (*retrieval_tables.ITEM_GROUPS, metrics.FEW)
    return [
        retrieval_tables.groups_table(study, groups, "ndcg_at_10"),
        retrieval_tables.groups_table(study, groups, "hr_at_100"),
        _buckets_plot(report, study, plot),
        "Differences:",
        retrieval_tables.group_differences_table(study, "ndcg_at_10"),
        retrieval_tables.group_differences_table(study, "hr_at_100"),
    ]


def _buckets_plot(report: Report, study: StudyEstimates, name: str) -> str:
    groups = retrieval_tables.ITEM_GROUPS
    names = [retrieval_tables.group_title(study, group) for group in groups]
    by_model = {
        label(study, model): [study.mean(model, "hr_at_100", group) for group in groups]
        for model in retrieval_tables.ordered(study)
    }
    alt = "H@100 by popularity of the target"
    return report.plot(name, alt, lambda path: plots.buckets(path, names, by_model, "H@100")) if by_model else ""


def _curves(report: Report) -> str:
    study = report.main
    if study is None:
        return NO_MAIN
    learning_curves = [
        curve for model in retrieval_tables.ordered(study) if (curve := _curve(study, model)) is not None
    ]
    if not learning_curves:
        return "*Not run yet: no run has a learning curve.*"
    shown = report.plot(
        "curves",
        "NDCG@10 on validation against seconds and steps",
        lambda path: plots.curves(path, learning_curves, "NDCG@10, validation"),
    )
    return paragraphs("Lines are means over seeds, shaded areas the range of the seeds.", shown)


def _curve(study: StudyEstimates, model: str) -> plots.Curve | None:
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


def _ablations(report: Report) -> str:
    study = report.main
    if study is None:
        return NO_MAIN
    parts, absent = [], []
    for question, models in retrieval_tables.questions(study).items():
        remark = report.remark(expected_models().remarks.get(question, ""))
        if not any(study.has(model) for model in models):
            named = ", ".join(f"`{model}`" for model in models)
            absent.append(f"- {question}: {named}. {remark}".rstrip())
            continue
        parts += [
            f"### {question[:1].upper()}{question[1:]}",
            retrieval_tables.question_table(study, models),
            remark,
        ]
    if absent:
        parts += ["### Not run yet", "\n".join(absent)]
    return paragraphs(
        *parts,
        "### How far text alone gets, and by which changes",
        "From the weakest run to the strongest. Each change is compared with its own reference, so the steps do not "
        "add up. The share of the way counts from the bare content mean (0 %) to the stronger ID model (100 %), in "
        "point estimates.",
        retrieval_tables.ladder_table(study),
        _forest(report, study),
    )


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
    return report.plot("ablations", "Ablations", lambda path: plots.forest(path, gaps, xlabel))


# --- 7 and 8 ----------------------------------------------------------------------------------------------------------


def _ranking(report: Report) -> str:
    studies = report.studies
    if not studies.ranking:
        return "*Not run yet.*"
    parts = ["The label is a proxy made from ratings: this data has no impressions, no conversions and no revenue."]
    for name, rows in sorted(studies.ranking.items(), key=lambda pair: (pair[0] != studies.main, pair[0])):
        if name != studies.main:
            parts.append(f"### Study `{name}`")
        parts += _ranking_study(report, rows, "ranking" if name == studies.main else f"ranking-{name}")
    return paragraphs(*parts)


def _ranking_study(report: Report, rows: Sequence[Row], plot: str) -> list[str]:
    gains = {
        f"{row.group} ({row.n_users} users)": row.gain
        for row in rows
        if row.arm == "mid_emb" and row.metric == "uauc" and row.gain is not None
    }
    shown = ""
    if gains:
        xlabel = f"UAUC with the mid-emb minus that of `{CONTROL}`\n95 % interval; filled marker: p < .05"
        shown = report.plot(plot, "UAUC by group", lambda path: plots.forest(path, gains, xlabel))
    return [
        ranking_table.means_table(rows),
        f"UAUC minus that of `{CONTROL}`, by group:",
        ranking_table.groups_table(rows, "uauc"),
        shown,
        f"WUAUC minus that of `{CONTROL}`, by group:",
        ranking_table.groups_table(rows, "wuauc"),
        f"AUC minus that of `{CONTROL}`, by group:",
        ranking_table.groups_table(rows, "auc"),
    ]


def _costs(report: Report) -> str:
    if not report.studies.retrieval:
        return NO_MAIN
    parts = []
    for name, study in report.studies.retrieval.items():
        parts += [f"Study `{name}`; seconds are means over seeds:", retrieval_tables.costs_table(study)]
    return paragraphs(*parts)
