"""The report's sections on claims: the short answer, the tables of verdicts, and the claims that were not tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from learn.evaluation import metrics
from research.bootstrap import BootstrapConfig
from research.ranking.summary import Row
from research.report import retrieval_tables
from research.report.claims import ClaimList, Section
from research.report.expected_models import expected_models
from research.report.number_format import difference, paragraphs, plain, prose_table, with_interval
from research.report.retrieval_tables import label
from research.report.verdicts import MAIN, MAIN_BY_TIME, Finding, Studies, Verdict
from research.retrieval.estimates import StudyEstimates

_GROUPS = (
    ("all", "All test events"),
    (metrics.FEW, "Targets with fewer than five ratings"),
    (metrics.NEW, "New items"),
)


@dataclass(frozen=True)
class Report:
    """What every section is written from, and where plots go. `findings` is by the id of the claim."""

    studies: Studies
    claims: ClaimList
    findings: dict[str, Finding]
    config: BootstrapConfig
    plots: Path
    written: list[Path]

    @property
    def main(self) -> StudyEstimates | None:
        """The main study."""
        return self.studies.retrieval.get(self.studies.main or "")

    def remark(self, text: str) -> str:
        """The remark, or "" if it is about another study than the main one of this report."""
        return text if self.claims.main_study == self.studies.main else ""

    def plot(self, name: str, alt: str, draw: Callable[[Path], None]) -> str:
        """Draws a PNG and returns the Markdown that shows it."""
        path = self.plots / f"{name}.png"
        draw(path)
        self.written.append(path)
        return f"![{alt}]({self.plots.name}/{path.name})"


def tally(report: Report) -> str:
    """How many claims have which verdict."""
    count = Counter(finding.verdict for finding in report.findings.values())
    words = {Verdict.HOLDS: "hold", Verdict.DOES_NOT_HOLD: "do not hold"}
    parts = (f"{count[verdict]} {words.get(verdict, verdict.value)}" for verdict in Verdict)
    return f"{len(report.findings)} claims: {', '.join(parts)}"


def answer(report: Report) -> str:
    """Section 1: the short answer, and every claim with its verdict."""
    legend = (
        "*Holds*: ahead with p < .05 (a published figure to be reproduced: within the tolerance). *Does not hold*: "
        "behind with p < .05 (or outside the tolerance). *Not shown*: the interval covers 0, so this data decides "
        "nothing, or a model has only one seed. Differences are paired, with 95 % intervals. p is not corrected for "
        "the number of claims."
    )
    bullets = [f"- {tally(report)}.", *headlines(report)]
    return paragraphs("\n".join(bullets), legend, *(_section(report, section) for section in report.claims.sections))


def headlines(report: Report) -> list[str]:
    """The main comparisons, one bullet each."""
    studies = report.studies
    lines = ["- The main study has not been run yet."]
    if report.main is not None:
        lines = [*_group_lines(report.main, ""), _text_line(report.main)]
    if (by_time := studies.study(MAIN_BY_TIME)) is not None:
        lines += _group_lines(by_time, "Split by time: ")
    lines += _ranking_lines(studies.rows(MAIN), "")
    return lines + _ranking_lines(studies.rows(MAIN_BY_TIME), "Split by time: ")


def _group_lines(study: StudyEstimates, prefix: str) -> list[str]:
    return [
        f"- {prefix}{title}, NDCG@10: {_against_rivals(study, model, group)}."
        for group, title in _GROUPS
        for model in ("learn-id", "learn-text")
        if study.groups[group].any()
    ]


def _against_rivals(study: StudyEstimates, model: str, group: str) -> str:
    if not study.has(model):
        return f"{label(study, model)} has not been run yet"
    parts = [f"{label(study, model)} {with_interval(study.mean(model, 'ndcg_at_10', group))}"]
    for rival in expected_models().rivals:
        gap = study.difference(model, rival, "ndcg_at_10", group)
        name = label(study, rival)
        parts.append(f"against {name} {difference(gap)}" if study.has(rival) else f"{name} not run yet")
    return "; ".join(parts)


def _text_line(study: StudyEstimates) -> str:
    """How far the best model over text alone gets."""
    goal = retrieval_tables.stronger_id_model(study)
    text_models = [model for model in retrieval_tables.ladder(study) if model.startswith("learn-text")]
    if goal is None or not text_models:
        return "- How close text alone comes to ID embeddings: not run yet."
    best = text_models[-1]
    share = retrieval_tables.share_of_way(study, best, goal)
    way = "" if share is None else f", {100 * share:.0f} % of the way from the bare content mean"
    left = difference(study.difference(best, goal, "ndcg_at_10"))
    return (
        f"- The best run over text alone ({label(study, best)}; chosen on these same test events) against "
        f"{label(study, goal)}: {left}{way}."
    )


def _ranking_lines(rows: Sequence[Row], prefix: str) -> list[str]:
    """One line on a ranking study: UAUC over all events and on cold-start items, where the paper gained most."""
    gains = {row.group: row.gain for row in rows if (row.arm, row.metric) == ("mid_emb", "uauc")}
    parts = [f"{group} {difference(gains[group])}" for group in ("all", "cold-start items") if group in gains]
    return [f"- {prefix}Gain of a ranking model in UAUC by the mid-emb: {'; '.join(parts)}."] if parts else []


def _section(report: Report, section: Section) -> str:
    if section.until_tested is not None and not _is_tested(report, section):
        rows = [_row_until_tested(report, section)]
    else:
        rows = [_claim_row(report, report.findings[claim.id]) for claim in section.claims]
    return f"### {section.title}\n\n" + prose_table(["claim", "source", "here", "verdict"], rows)


def _is_tested(report: Report, section: Section) -> bool:
    return any(report.findings[claim.id].verdict is not Verdict.NOT_TESTED for claim in section.claims)


def _row_until_tested(report: Report, section: Section) -> list[str]:
    row, result = section.until_tested, section.until_tested.result
    pair = (row.instead.model, row.instead.against)
    gap = report.main and report.main.difference(*pair, row.instead.metric)
    if gap:
        means = " against ".join(plain(report.main.mean(model, row.instead.metric)) for model in pair)
        result += f"; on `{report.studies.main}` instead, {row.instead.shown_as} {means}: {difference(gap)}"
    return [row.text, row.source, result, _with_remark(Verdict.NOT_TESTED.value, report.remark(row.remark))]


def _claim_row(report: Report, finding: Finding) -> list[str]:
    claim, verdict = finding.claim, finding.verdict.value
    shown = verdict if finding.verdict in (Verdict.NOT_TESTED, Verdict.NOT_SHOWN) else f"**{verdict}**"
    return [claim.text, claim.source, finding.result, _with_remark(shown, report.remark(claim.remark))]


def _with_remark(verdict: str, remark: str) -> str:
    return f"{verdict}. {remark}" if remark else verdict


def untested(report: Report) -> str:
    """Section 9. Claims that share a reason share a line."""
    texts_by_reason: dict[str, list[str]] = {}
    for section in report.claims.sections:
        for claim in section.claims:
            finding = report.findings[claim.id]
            if finding.verdict is not Verdict.NOT_TESTED:
                continue
            text, result, remark = claim.text, finding.result, claim.remark
            if (row := section.until_tested) is not None and not _is_tested(report, section):
                text, result, remark = row.text, row.result, row.remark
            reason = " ".join(part.rstrip(".") + "." for part in (result, report.remark(remark)) if part)
            texts_by_reason.setdefault(reason, []).append(text)
    lines = [f"- {'; '.join(dict.fromkeys(texts))}: {reason}" for reason, texts in texts_by_reason.items()]
    return "\n".join(lines) or f"All {len(report.findings)} claims were tested."
