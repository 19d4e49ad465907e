"""`learn report`: the files of `results/` -> REPORT.md and its plots. Equal files give equal bytes.

    retrieval.result_files, ranking.result_files    files -> studies and runs, checked
    stale_records                                   refuses runs that the configs of today do not describe
    retrieval.estimates, ranking.summary            runs -> estimates with intervals
    claims, verdicts                                what LEARN claims -> holds, does not hold, not shown, not tested
    answer                                          the short answer, the verdicts, what was not tested
    study_sections, ranking_table                   the sections on retrieval studies and on ranking studies
    retrieval_tables, plots                         estimates -> Markdown and PNG
    document                                        the sections and their order

No figure and no verdict is written into code: they are computed, and what was not run is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from learn.atomic_file import replacing
from learn.evaluation import metrics
from research.bootstrap import BootstrapConfig
from research.provenance import CHANGED
from research.ranking.arms import CONTROL
from research.ranking.auc_metrics import POOLED_DRAWS
from research.ranking.summary import Row
from research.report import plots, ranking_table, stale_records, study_sections
from research.report.answer import NO_STUDY, Report, answer, tally, untested
from research.report.claims import ClaimList, read_claims
from research.report.number_format import paragraphs
from research.report.verdicts import MAIN, MAIN_BY_TIME, Studies, findings
from research.retrieval import result_files
from research.retrieval.estimates import StudyEstimates

PLOTS = "report"
BY_TIME = MAIN_BY_TIME.removeprefix(MAIN)


def build(
    results_root: Path,
    out: Path,
    config: BootstrapConfig | None = None,
    claims: ClaimList | None = None,
    configs: Path = stale_records.CONFIGS,
) -> list[Path]:
    """Reads `results_root` and writes the report `out` and `report/*.png` beside it; returns the paths written.

    `claims` are those of `claims.toml` by default. `config` is for tests that need fewer replicates; its level has to
    stay .95, which is what the text says. PNGs in `report/` that the new report does not show are removed.

    Raises `DataError` for a file that does not have the form that `result_files` describes, `StaleRecordsError` for a
    run that `configs` do not describe, FileNotFoundError if the folder is missing.
    """
    results, config, claims = result_files.read(results_root), config or BootstrapConfig(), claims or read_claims()
    stale_records.check(results_root, results, configs)
    retrieval = {name: StudyEstimates(study, config) for name, study in results.retrieval.items()}
    ranking = ranking_table.read_all(results.ranking, config)
    studies = Studies(retrieval, _main_study([*retrieval, *ranking], claims), ranking)
    report = Report(studies, claims, findings(claims, studies), config, out.parent / PLOTS, [])
    text = _text(report)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        partial.write_text(text, encoding="utf-8")
    for stale in set(report.plots.glob("*.png")) - set(report.written):
        stale.unlink()
    print(f"{out}: {'; '.join(tally(report))}; {len(report.written)} plots")
    return [out, *report.written]


def _main_study(names: Sequence[str], claims: ClaimList) -> str | None:
    """The main study that the claims name, or else the first of `names` that no claim names as a study of its own.

    The one of the claims stays the main study if only its ranking study, or only a study of it by time, has been run.
    """
    if {claims.main_study, f"{claims.main_study}{BY_TIME}"} & set(names):
        return claims.main_study
    named = {getattr(claim, "study", None) for claim in claims.claims()}
    return next((name for name in names if name not in named and not name.endswith(BY_TIME)), None)


def _text(report: Report) -> str:
    parts = (
        ("1. The claims, and the short answer", answer),
        ("2. Protocol", _protocol),
        ("3. All models", study_sections.models),
        ("4. By popularity of the target", study_sections.popularity),
        ("5. Learning curves", study_sections.curves),
        ("6. Ablations, and how far text alone gets", study_sections.ablations),
        ("7. A ranking model with and without the mid-emb", _ranking),
        ("8. Costs", study_sections.costs),
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
    lines = [_study_line(name, study) for name, study in report.retrieval()] or [NO_STUDY]
    lines += [
        "The last events of each user are held out: the newest for the test, those before them for validation. In a "
        "study that is split by time, all events after a moment are held out. Training sees none of them. Ties in time "
        "are broken by a fixed rule.",
        "The history of a test event is everything before it, earlier test events included. All items that the user "
        "has not met are ranked, without sampling; ties count against the model.",
        "The candidates of the loss are the items that training meets, because a new item is not known yet when a "
        "model is trained and so cannot be a negative. One ablation measures what this choice is worth.",
        "HR, NDCG and MRR are means over test events, then over seeds. R@k and Recall@k are means over users of each "
        "user's share of hits, and a metric *by user* is the mean over users of each user's own mean; where all users "
        "have equally many test events, both kinds of mean are the same.",
        f"Intervals are 95 % percentile intervals of {report.config.n_resamples:,} bootstrap replicates "
        f"({min(POOLED_DRAWS, report.config.n_resamples):,} for the pooled AUC of section 7). A replicate draws users "
        "with all their events and, independently, seeds; both models of a difference or a ratio are measured on the "
        "same draw.",
        "The intervals of a model with one seed (column *seeds*) are too narrow, because they have no variance of "
        "training.",
        "Groups of events are formed by the number of training events of the target (0 is a new item) or of the user.",
        "Head share is the share of all top-10 places that go to the most popular 1 % (5 %) of the catalogue. Coverage "
        "is the share of the catalogue that is in at least one top 10.",
        "All models of a study share test events, ranked items and history. The settings of each run are in the header "
        "of its file, with the digest of its data and the commit of its code. A run is refused if its study has other "
        "data, or if today's config of the study has no such model or other settings of it.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _study_line(name: str, estimates: StudyEstimates) -> str:
    study = estimates.study
    data, protocol = study.data, study.protocol
    held_out = f"held out per user are {protocol.n_test} for the test and {protocol.n_validation} for validation"
    if estimates.is_by_time:
        held_out = "split by time, validation before test"
    notes = "".join(f" {note.rstrip('.')}." for note in protocol.notes)
    n_users, n_new = len(np.unique(study.user)), int(estimates.groups[metrics.NEW].sum())
    return (
        f"Study `{name}`: {data.n_users:,} users, {data.n_items:,} items, {data.n_events:,} events; {held_out}; "
        f"{len(study.user):,} test events of {n_users:,} users, {n_new:,} of them on new items. "
        f"Digest `{data.digest[:12]}`.{notes} {_commits(estimates)}"
    )


def _commits(estimates: StudyEstimates) -> str:
    """The code of a study's runs: how many of them each commit has."""
    commits = Counter(run.commit for model in estimates.models for run in estimates.runs(model))
    parts = [f"{_commit(commit)} ({n} runs)" for commit, n in sorted(commits.items(), key=lambda pair: str(pair[0]))]
    return f"Code: {', '.join(parts)}." if parts else "No model has been run."


def _commit(commit: str | None) -> str:
    if commit is None:
        return "not recorded"
    short = f"`{commit.removesuffix(CHANGED)[:12]}`"
    return f"{short} with changes" if commit.endswith(CHANGED) else short


# --- 7 ---------------------------------------------------------------------------------------------------------------


def _ranking(report: Report) -> str:
    if not report.studies.ranking:
        return "*Not run yet.*"
    parts = ["The label is a proxy made from ratings: this data has no impressions, no conversions and no revenue."]
    for name, rows in report.ranking():
        parts += [f"### Study `{name}`", *_ranking_study(report, name, rows)]
    return paragraphs(*parts)


def _ranking_study(report: Report, name: str, rows: Sequence[Row]) -> list[str]:
    gains = {
        f"{row.group} ({row.n_users} users)": row.gain
        for row in rows
        if row.arm == "mid_emb" and row.metric == "uauc" and row.gain is not None
    }
    shown = ""
    if gains:
        xlabel = f"UAUC with the mid-emb minus that of `{CONTROL}`\n95 % interval; filled marker: p < .05"
        shown = report.plot("ranking", name, "UAUC by group", lambda path: plots.forest(path, gains, xlabel))
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
