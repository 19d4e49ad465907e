"""`learn report`: the JSONs of `results/` -> REPORT.md with its plots. The same JSONs give the same bytes.

    retrieval.result_files   files -> studies and runs, checked
    retrieval.estimates      runs -> estimates with intervals (`bootstrap`)
    claims, verdicts         what LEARN says -> holds, does not hold, not shown, not tested
    answer                   the short answer, the verdicts, what was not tested
    retrieval_tables, ranking_table, plots, number_format      estimates -> Markdown and PNG
    document                 which of it stands where

No figure and no verdict is written down in code: what was not run says so, and the rest is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from learn.evaluation import metrics
from research.bootstrap import BootstrapConfig
from research.ranking.auc_metrics import POOLED_DRAWS
from research.ranking.study import Row
from research.report import plots, ranking_table, retrieval_tables
from research.report.answer import Report, answer, tally, untested
from research.report.claims import BY_TIME, SECTIONS
from research.report.notes import Notes, read_notes
from research.report.number_format import paragraphs
from research.report.retrieval_tables import Expected, label
from research.report.verdicts import Record, find
from research.retrieval import result_files
from research.retrieval.estimates import Evidence

NOTES = "notes.toml"
PLOTS = "report"
NO_MAIN = "*Not run yet: there is no study of retrieval.*"


def build(results_root: Path, out: Path, config: BootstrapConfig | None = None) -> list[Path]:
    """Reads `results_root` and writes the report `out` and `report/*.png` beside it; returns what was written.

    `config` is for tests that want fewer replicates; its level stays .95, which is what the text says. The folder
    `report/` belongs to the report: PNGs of earlier builds that it no longer shows are removed.

    Raises `DataError` for a file that is not as `result_files` or `notes` says, ValueError if the main study that
    notes.toml names is not there, FileNotFoundError without the folder.
    """
    found, notes, config = (
        result_files.read(results_root),
        read_notes(results_root / NOTES),
        config or BootstrapConfig(),
    )
    studies = {name: Evidence(study, config) for name, study in found.retrieval.items()}
    record = Record(studies, _main_study(studies, notes), ranking_table.read_all(found.ranking, config.n_resamples))
    findings = {claim.key: find(claim, record) for section in SECTIONS for claim in section.claims}
    report = Report(record, notes, findings, config, out.parent / PLOTS, [])
    text = _text(report)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    for stale in set(report.plots.glob("*.png")) - set(report.written):
        stale.unlink()
    print(f"{out}: {tally(report)}, {len(report.written)} plots")
    return [out, *report.written]


def _main_study(studies: dict[str, Evidence], notes: Notes) -> str | None:
    if notes.main is not None and notes.main not in studies and studies:
        raise ValueError(f"{NOTES}: main is {notes.main!r}, but the studies are {', '.join(studies)}")
    others = ("ml-1m", "amazon-")
    own = [name for name in studies if not name.startswith(others) and not name.endswith(BY_TIME)]
    return notes.main if notes.main in studies else next(iter(own), None)


def _text(report: Report) -> str:
    parts = (
        ("1. What was asked, and the short answer", answer),
        ("2. Protocol", _protocol),
        ("3. All models", _models),
        ("4. By popularity of the target", _popularity),
        ("5. Learning curves", _curves),
        ("6. Ablations, and how far text gets", _ablations),
        ("7. A ranking model with and without the mid-emb", _ranking),
        ("8. Costs", _costs),
        ("9. What was not tested, and why", untested),
    )
    opening = paragraphs(
        "# LEARN, tested",
        "Written by `learn report` from the JSON files of the runs. Every figure, interval and verdict below is "
        "computed from them; only the remarks come from a person (`notes.toml`).",
    )
    return paragraphs(opening, *(f"## {title}\n\n{write(report)}" for title, write in parts)) + "\n"


# --- 2 ---------------------------------------------------------------------------------------------------------------


def _protocol(report: Report) -> str:
    lines = [_study_line(name, evidence) for name, evidence in report.record.studies.items()] or [NO_MAIN]
    lines += [
        "Held out are the last events of each user, the newest for the test, those before for validation, or, cut by "
        "time, all events from a moment on; training sees neither. Ties in time are broken by a fixed rule.",
        "The history is what came before the test event, earlier test events included. Every item that the user has "
        "not met is ranked, no sampling of candidates; ties count against the model.",
        "Candidates of the loss are items that training meets, for all models but an ablation that asks what this is "
        "worth: a new item is not known yet when a model is trained, so it is no negative.",
        "HR, NDCG and MRR are means over test events, then over seeds. R@k is the mean over users of each user's share "
        "of hits: HR@k where every user has as many test events.",
        f"Intervals: 95 %, percentile, {report.config.n_resamples:,} replicates (pooled AUC of section 7: "
        f"{min(POOLED_DRAWS, report.config.n_resamples):,}). A replicate draws users with all their events and, "
        "independently, seeds; both models of a difference meet the same draw.",
        "A model with one seed adds no variance of training to its intervals: they are too narrow. Column *seeds* "
        "tells.",
        "Groups go by training counts: of the target (0 is a new item), of the user.",
        "Head share: the part of all top-10 places that the most popular 1 % (5 %) of the catalogue take. Coverage: "
        "the part of the catalogue that stands in at least one top 10.",
        "All models of a study share test events, ranked items and history; what else they share is in each JSON's "
        "`config`.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _study_line(name: str, evidence: Evidence) -> str:
    study = evidence.study
    data, protocol = study.data, study.protocol
    n_users = len(set(study.user))
    held_out = f"{protocol.n_test} held out for the test and {protocol.n_validation} for validation a user"
    if not protocol.n_test:
        held_out = "held out by time, validation before test"
    notes = "".join(f" {note.rstrip('.')}." for note in protocol.notes)
    return (
        f"Study `{name}`: {data.n_users:,} users, {data.n_items:,} items, {data.n_events:,} events; {held_out}; "
        f"{len(study.user):,} test events of {n_users:,} users, {int(evidence.groups[metrics.NEW].sum()):,} of them on "
        f"new items. Digest `{data.digest[:12]}`.{notes}"
    )


# --- 3 to 6 ----------------------------------------------------------------------------------------------------------


def _models(report: Report) -> str:
    if report.main is None:
        return NO_MAIN
    parts = [f"Study `{report.record.main}`.", *_model_tables(report.main, retrieval_tables.MODELS)]
    for name, evidence in report.record.studies.items():
        if name != report.record.main:
            parts += [f"### Study `{name}`", *_model_tables(evidence)]
    return paragraphs(*parts)


def _model_tables(evidence: Evidence, expected: Sequence[Expected] = ()) -> list[str]:
    return [
        retrieval_tables.main_table(evidence, expected),
        "Paired differences to SASRec and to HSTU:",
        retrieval_tables.rivals_table(evidence),
        "Other cut-offs, and what the top ten consist of:",
        retrieval_tables.cutoffs_table(evidence),
    ]


def _popularity(report: Report) -> str:
    evidence = report.main
    if evidence is None:
        return NO_MAIN
    parts = [
        "Columns are how often training meets the target; in brackets, the number of test events.",
        *_popularity_of(report, evidence, "buckets"),
        "By how many events training reads of the user:",
        retrieval_tables.groups_table(evidence, retrieval_tables.USER_GROUPS, "ndcg_at_10"),
    ]
    if (by_time := report.record.study(BY_TIME)) is not None:
        parts += [f"### Study `{by_time.study.study}`", *_popularity_of(report, by_time, "buckets-by-time")]
    return paragraphs(*parts)


def _popularity_of(report: Report, evidence: Evidence, plot: str) -> list[str]:
    groups = (*retrieval_tables.ITEM_GROUPS, metrics.FEW)
    return [
        retrieval_tables.groups_table(evidence, groups, "ndcg_at_10"),
        retrieval_tables.groups_table(evidence, groups, "hr_at_100"),
        _buckets_plot(report, evidence, plot),
        "Differences:",
        retrieval_tables.group_differences_table(evidence, "ndcg_at_10"),
        retrieval_tables.group_differences_table(evidence, "hr_at_100"),
    ]


def _buckets_plot(report: Report, evidence: Evidence, name: str) -> str:
    groups = retrieval_tables.ITEM_GROUPS
    names = [retrieval_tables.group_title(evidence, group) for group in groups]
    found = {
        label(evidence, model): [evidence.figure(model, "hr_at_100", group) for group in groups]
        for model in retrieval_tables.ordered(evidence)
    }
    alt = "H@100 by popularity of the target"
    return report.plot(name, alt, lambda path: plots.buckets(path, names, found, "H@100")) if found else ""


def _curves(report: Report) -> str:
    evidence = report.main
    if evidence is None:
        return NO_MAIN
    found = [curve for model in retrieval_tables.ordered(evidence) if (curve := _curve(evidence, model)) is not None]
    if not found:
        return "*Not run yet: no run left a learning curve.*"
    shown = report.plot(
        "curves",
        "NDCG@10 on validation against seconds and steps",
        lambda path: plots.curves(path, found, "NDCG@10, validation"),
    )
    return paragraphs("Mean over seeds; the range of seeds is shaded.", shown)


def _curve(evidence: Evidence, model: str) -> plots.Curve | None:
    """The checks that all seeds have; None with fewer than two of them."""
    of_seed = [
        {check.step: check for check in run.curve if check.ndcg_at_10 is not None} for run in evidence.runs(model)
    ]
    steps = sorted(set.intersection(*(set(checks) for checks in of_seed)))
    if len(steps) < 2:
        return None
    seconds, figure = (
        np.array([[getattr(checks[step], name) for step in steps] for checks in of_seed])
        for name in ("seconds", "ndcg_at_10")
    )
    return plots.Curve(label(evidence, model), np.array(steps), seconds.mean(axis=0), figure)


def _ablations(report: Report) -> str:
    evidence = report.main
    if evidence is None:
        return NO_MAIN
    parts, absent = [], []
    for question, models in retrieval_tables.questions(evidence).items():
        remark = report.notes.questions.get(question, "")
        if not any(evidence.has(model) for model in models):
            named = ", ".join(f"`{model}`" for model in models)
            absent.append(f"- {question}: {named}. {remark}".rstrip())
            continue
        parts += [
            f"### {question[:1].upper()}{question[1:]}",
            retrieval_tables.question_table(evidence, models),
            remark,
        ]
    if absent:
        parts += ["### Not run yet", "\n".join(absent)]
    return paragraphs(
        *parts,
        "### How far text gets, and by what",
        "From the weakest to the strongest; each change is measured against its own reference, so steps do not add up. "
        "The way goes from the bare content mean (0 %) to the stronger ID model (100 %), a share of point estimates.",
        retrieval_tables.ladder_table(evidence),
        _forest(report, evidence),
    )


def _forest(report: Report, evidence: Evidence) -> str:
    found = {}
    for run in evidence.ablations():
        gap = evidence.difference(run.model, run.reference, "ndcg_at_10")
        if gap is not None:
            found[run.label if run.label not in found else f"{run.label} ({run.model})"] = gap
    found = dict(sorted(found.items(), key=lambda pair: (-pair[1].value, pair[0])))
    if not found:
        return ""
    xlabel = "NDCG@10 less that of the reference\n95 % interval; full: p < .05"
    return report.plot("ablations", "Ablations", lambda path: plots.forest(path, found, xlabel))


# --- 7 and 8 ----------------------------------------------------------------------------------------------------------


def _ranking(report: Report) -> str:
    record = report.record
    if not record.ranking:
        return "*Not run yet.*"
    parts = [
        "The label is a proxy made from ratings: there are no impressions, no conversions and no revenue in this data."
    ]
    for name, rows in sorted(record.ranking.items(), key=lambda pair: (pair[0] != record.main, pair[0])):
        if name != record.main:
            parts.append(f"### Study `{name}`")
        parts += _ranking_of(report, rows, "ranking" if name == record.main else f"ranking-{name}")
    return paragraphs(*parts)


def _ranking_of(report: Report, rows: Sequence[Row], plot: str) -> list[str]:
    base = ranking_table.control(rows)
    gaps = {
        f"{row.group} ({row.n_users} users)": ranking_table.gap(row)
        for row in rows
        if row.arm == "mid_emb" and row.metric == "uauc" and row.difference is not None
    }
    shown = ""
    if gaps:
        xlabel = f"UAUC with the mid-emb less that of `{base}`\n95 % interval; full: p < .05"
        shown = report.plot(plot, "UAUC by group", lambda path: plots.forest(path, gaps, xlabel))
    return [
        ranking_table.figures_table(rows),
        f"UAUC less that of `{base}`, by group:",
        ranking_table.groups_table(rows, "uauc"),
        shown,
        f"WUAUC less that of `{base}`:",
        ranking_table.groups_table(rows, "wuauc"),
        f"AUC less that of `{base}`:",
        ranking_table.groups_table(rows, "auc"),
    ]


def _costs(report: Report) -> str:
    if not report.record.studies:
        return NO_MAIN
    parts = []
    for name, evidence in report.record.studies.items():
        parts += [f"Study `{name}`, means over seeds:", retrieval_tables.costs_table(evidence)]
    return paragraphs(*parts)
