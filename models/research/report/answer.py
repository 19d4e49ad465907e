"""What the report says of claims: the short answer and the tables of verdicts, and what was not tested.

`Report` is what every section is written from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from learn.evaluation import metrics
from research.bootstrap import BootstrapConfig
from research.ranking.study import Row
from research.report import retrieval_tables
from research.report.claims import AMAZON, BY_TIME, MAIN, SECTIONS, Section
from research.report.notes import AMAZON as AMAZON_KEY
from research.report.notes import Notes
from research.report.number_format import difference, paragraphs, plain, prose_table, with_interval
from research.report.ranking_table import gap
from research.report.retrieval_tables import label
from research.report.verdicts import Finding, Record, Verdict
from research.retrieval.estimates import Evidence

AMAZON_ALL, NO_AMAZON = "LEARN beats SASRec on six categories of Amazon reviews", "no study of them has been run yet"
_GROUPS = (
    ("all", "All test events"),
    (metrics.FEW, "Targets with fewer than five ratings"),
    (metrics.NEW, "New items"),
)


@dataclass(frozen=True)
class Report:
    """What goes into the text: evidence, remarks, and where plots go."""

    record: Record
    notes: Notes
    findings: dict[str, Finding]
    config: BootstrapConfig
    plots: Path
    written: list[Path]

    @property
    def main(self) -> Evidence | None:
        """The main study."""
        return self.record.studies.get(self.record.main or "")

    def plot(self, name: str, alt: str, draw: Callable[[Path], None]) -> str:
        """Draws a PNG and returns the Markdown that shows it."""
        path = self.plots / f"{name}.png"
        draw(path)
        self.written.append(path)
        return f"![{alt}]({self.plots.name}/{path.name})"


def tally(report: Report) -> str:
    """How many claims came out which way."""
    count = Counter(finding.verdict for finding in report.findings.values())
    words = {Verdict.HOLDS: "hold", Verdict.DOES_NOT_HOLD: "do not hold"}
    parts = (f"{count[verdict]} {words.get(verdict, verdict.value)}" for verdict in Verdict)
    return f"{len(report.findings)} claims: {', '.join(parts)}"


def answer(report: Report) -> str:
    """Section 1: the short answer, and every claim with its verdict."""
    legend = (
        "*Holds*: ahead with p < .05 (for a published figure to be reproduced: within the tolerance). *Does not hold*: "
        "behind with p < .05 (or outside the tolerance). *Not shown*: the interval covers 0, so this data decides "
        "nothing, or a model has one seed alone. Differences are paired, with 95 % intervals. p is not corrected for "
        "the number of claims."
    )
    bullets = [f"- {tally(report)}.", *headlines(report)]
    return paragraphs("\n".join(bullets), legend, *(_section(report, section) for section in SECTIONS))


def headlines(report: Report) -> list[str]:
    """The main comparisons, a bullet each."""
    record, lines = report.record, ["- The main study has not been run yet."]
    if report.main is not None:
        lines = [*_lines_of(report.main, ""), _gap_line(report.main)]
    if (by_time := record.study(BY_TIME)) is not None:
        lines += _lines_of(by_time, "Cut by time: ")
    return [*lines, *_ranking_lines(record.rows(MAIN), ""), *_ranking_lines(record.rows(BY_TIME), "Cut by time: ")]


def _lines_of(evidence: Evidence, cut: str) -> list[str]:
    return [
        f"- {cut}{what}, NDCG@10: {_against_rivals(evidence, model, group)}."
        for group, what in _GROUPS
        for model in ("learn-id", "learn-text")
        if evidence.groups[group].any()
    ]


def _ranking_lines(rows: Sequence[Row], cut: str) -> list[str]:
    """One line on a ranking model: UAUC over all events and on cold-start items, where the paper gained most."""
    gaps = {row.group: gap(row) for row in rows if (row.arm, row.metric) == ("mid_emb", "uauc")}
    found = [f"{group} {difference(gaps[group])}" for group in ("all", "cold-start items") if group in gaps]
    return [f"- {cut}What the mid-emb adds to the UAUC of a ranking model: {'; '.join(found)}."] if found else []


def _against_rivals(evidence: Evidence, model: str, group: str) -> str:
    if not evidence.has(model):
        return f"{label(evidence, model)} has not been run yet"
    parts = [f"{label(evidence, model)} {with_interval(evidence.figure(model, 'ndcg_at_10', group))}"]
    for rival in retrieval_tables.RIVALS:
        gap = evidence.difference(model, rival, "ndcg_at_10", group)
        name = label(evidence, rival)
        parts.append(f"against {name} {difference(gap)}" if evidence.has(rival) else f"{name} not run yet")
    return "; ".join(parts)


def _gap_line(evidence: Evidence) -> str:
    goal = retrieval_tables.goal_of(evidence)
    texts = [model for model in retrieval_tables.ladder(evidence) if model.startswith("learn-text")]
    if goal is None or not texts:
        return "- How far text alone gets towards ID embeddings: not run yet."
    best = texts[-1]
    share = retrieval_tables.way_gone(evidence, best, goal)
    way = "" if share is None else f", {100 * share:.0f} % of the way from the bare content mean"
    left = difference(evidence.difference(best, goal, "ndcg_at_10"))
    return (
        f"- The best run of text alone ({label(evidence, best)}; picked on these test events, so with hindsight) "
        f"stands against {label(evidence, goal)} at {left}{way}."
    )


def _section(report: Report, section: Section) -> str:
    findings = [report.findings[claim.key] for claim in section.claims]
    if section is AMAZON and _no_amazon(report):
        printed = "; ".join(f"{f.claim.key.removeprefix('amazon-')} {f.claim.paper}" for f in findings)
        found = f"{NO_AMAZON}{_stand_in(report)}"
        rows = [[AMAZON_ALL, printed, found, f"not tested here{_remark(report, AMAZON_KEY)}"]]
    else:
        rows = [_claim_row(report, finding) for finding in findings]
    return f"### {section.title}\n\n" + prose_table(["claim", "the source", "here", "verdict"], rows)


def _stand_in(report: Report) -> str:
    """The same comparison on the main study's data: what there is until somebody runs Amazon's."""
    evidence, name = report.main, report.record.main
    found = None if evidence is None else evidence.difference("learn-text", "sasrec", "recall_at_10")
    if found is None:
        return ""
    pair = " against ".join(plain(evidence.figure(model, "recall_at_10")) for model in ("learn-text", "sasrec"))
    return f"; on `{name}` in their place, Recall@10 {pair}: {difference(found)}"


def _no_amazon(report: Report) -> bool:
    return all(report.findings[claim.key].verdict is Verdict.NOT_TESTED for claim in AMAZON.claims)


def _claim_row(report: Report, finding: Finding) -> list[str]:
    claim, verdict = finding.claim, finding.verdict.value
    shown = verdict if finding.verdict in (Verdict.NOT_TESTED, Verdict.NOT_SHOWN) else f"**{verdict}**"
    return [claim.text, claim.paper, finding.found, shown + _remark(report, claim.key)]


def _remark(report: Report, key: str) -> str:
    remark = report.notes.claims.get(key)
    return f". {remark}" if remark else ""


def untested(report: Report) -> str:
    """Section 9. Claims that share a reason share a line."""
    by_reason: dict[str, list[str]] = {}
    for finding in report.findings.values():
        if finding.verdict is Verdict.NOT_TESTED:
            text, key, found = finding.claim.text, finding.claim.key, finding.found
            if finding.claim in AMAZON.claims and _no_amazon(report):
                text, key, found = AMAZON_ALL, AMAZON_KEY, NO_AMAZON
            reason = " ".join(part.rstrip(".") + "." for part in (found, report.notes.claims.get(key)) if part)
            by_reason.setdefault(reason, []).append(text)
    lines = [f"- {'; '.join(dict.fromkeys(texts))}: {reason}" for reason, texts in by_reason.items()]
    return "\n".join(lines) or f"All {len(report.findings)} claims were tested."
