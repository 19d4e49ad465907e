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
from research.report.claims import OWNERS, Claim, ClaimList, Section
from research.report.expected_models import expected_models
from research.report.number_format import difference, paragraphs, prose_table, with_interval
from research.report.retrieval_tables import label
from research.report.verdicts import MAIN, MAIN_BY_TIME, Finding, Studies, Verdict
from research.retrieval.estimates import StudyEstimates

NO_STUDY = "*Not run yet: there is no retrieval study.*"
_GROUPS = (
    ("all", "All test events"),
    (metrics.FEW, "Targets with fewer than five ratings"),
    (metrics.NEW, "New items"),
)
_LEGEND = (
    "*Holds*: ahead with q < .05 (a figure to be reproduced: within the tolerance). *Does not hold*: behind with "
    "q < .05 (or outside the tolerance). *Not shown*: q is .05 or more, so this data decides nothing, or a model has "
    "only one seed. *Not tested here*: a run is missing, or a model was trained for so short a time that its figure "
    "shows the time. *Still improving* names models that were perhaps trained too briefly (section 5), so that the "
    "verdict may change with more steps. Differences are paired, with 95 % intervals.",
    "q is p after the correction of Benjamini and Hochberg within a family: the claims of one section, the paper's and "
    "our own apart; the six categories of Amazon reviews are one family of the paper. Of the claims of a family that "
    "are decided by q < .05, at most 5 % are expected to be decided wrongly. Claims that are decided by a tolerance or "
    "by the interval of a single mean are in no family. Intervals are not corrected.",
    "*Not behind* holds if the model is ahead with q < .05, or if the 95 % interval rules out that it is behind by "
    "more than the margin. *Ahead of all* is decided by the closest rival. × is the ratio of two means, with its "
    "paired 95 % interval; a claim on a ratio holds if q < .05 and the ratio is above the figure that it is tested "
    "against.",
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

    def retrieval(self) -> list[tuple[str, StudyEstimates]]:
        """All retrieval studies with their names, the main one first."""
        return sorted(self.studies.retrieval.items(), key=lambda pair: (pair[0] != self.studies.main, pair[0]))

    def ranking(self) -> list[tuple[str, Sequence[Row]]]:
        """All ranking studies with their names, that of the main study first."""
        return sorted(self.studies.ranking.items(), key=lambda pair: (pair[0] != self.studies.main, pair[0]))

    def remark(self, text: str, study: str = MAIN) -> str:
        """The remark on a claim of this study; "" if it is about another main study than the one of this report."""
        is_about_main = study in (MAIN, MAIN_BY_TIME)
        return text if not is_about_main or self.claims.main_study == self.studies.main else ""

    def plot(self, kind: str, study: str, alt: str, draw: Callable[[Path], None]) -> str:
        """Draws a PNG and returns the Markdown that shows it. The plots of the main study have the name of the kind."""
        path = self.plots / f"{kind if study == self.studies.main else f'{kind}-{study}'}.png"
        draw(path)
        self.written.append(path)
        return f"![{alt}]({self.plots.name}/{path.name})"


def tally(report: Report) -> list[str]:
    """How many claims have which verdict: one line on the paper's claims and one on ours."""
    lines = []
    for whose, owner in OWNERS.items():
        verdicts = [finding.verdict for finding in report.findings.values() if finding.claim.whose == whose]
        count, words = Counter(verdicts), {Verdict.HOLDS: "hold", Verdict.DOES_NOT_HOLD: "do not hold"}
        counts = ", ".join(f"{count[verdict]} {words.get(verdict, verdict.value)}" for verdict in Verdict)
        lines.append(f"{owner[0].upper()}{owner[1:]} {len(verdicts)} claims: {counts}")
    return lines


def answer(report: Report) -> str:
    """Section 1: the short answer, and every claim with its verdict."""
    bullets = [*(f"- {line}." for line in tally(report)), *headlines(report)]
    return paragraphs("\n".join(bullets), *_LEGEND, *(_section(report, section) for section in report.claims.sections))


def headlines(report: Report) -> list[str]:
    """The main comparisons of every study, one bullet each."""
    if not report.studies.retrieval and not report.studies.ranking:
        return ["- No study has been run yet."]
    lines = []
    for name, study in report.retrieval():
        lines += [f"- Study `{name}`:", *(f"  - {line}" for line in (*_group_lines(study), _text_line(study)))]
    for name, rows in report.ranking():
        lines += [f"- Ranking study `{name}`: {line}" for line in _ranking_lines(rows)]
    return lines


def _group_lines(study: StudyEstimates) -> list[str]:
    lines = []
    for group, title in _GROUPS:
        if study.groups[group].any():
            lines += [f"{title}, NDCG@10: {_against_rivals(study, model, group)}." for model in _headline_models(study)]
    return lines


def _headline_models(study: StudyEstimates) -> list[str]:
    return [model for model in ("learn-id", "learn-text") if study.has(model)]


def _against_rivals(study: StudyEstimates, model: str, group: str) -> str:
    parts = [f"{label(study, model)} {with_interval(study.mean(model, 'ndcg_at_10', group))}"]
    for rival in expected_models().rivals:
        gap = study.difference(model, rival, "ndcg_at_10", group)
        name = label(study, rival)
        parts.append(f"against {name} {difference(gap)}" if study.has(rival) else f"{name} not run yet")
    return "; ".join(parts)


def _text_line(study: StudyEstimates) -> str:
    """How far the best model over text alone gets."""
    goal = retrieval_tables.stronger_id_model(study)
    text_models = retrieval_tables.text_ladder(study)
    if goal is None or not text_models:
        return "How close text alone comes to ID embeddings: not run yet."
    best = text_models[-1]
    share = retrieval_tables.share_of_way(study, best, goal)
    way = "" if share is None else f", {100 * share:.0f} % of the way from the bare content mean"
    left = difference(study.difference(best, goal, "ndcg_at_10"))
    return (
        f"The best run over text alone ({label(study, best)}; chosen on these same test events) against "
        f"{label(study, goal)}: {left}{way}."
    )


def _ranking_lines(rows: Sequence[Row]) -> list[str]:
    """One line on a ranking study: UAUC over all events and on cold-start items, where the paper gained most."""
    gains = {row.group: row.gain for row in rows if (row.arm, row.metric) == ("mid_emb", "uauc")}
    parts = [f"{group} {difference(gains[group])}" for group in ("all", "cold-start items") if group in gains]
    return [f"gain in UAUC by the mid-emb: {'; '.join(parts)}."] if parts else []


def _section(report: Report, section: Section) -> str:
    if section.until_tested is not None and not _is_tested(report, section):
        row, whose = section.until_tested, " and ".join(dict.fromkeys(claim.whose for claim in section.claims))
        rows = [[row.text, whose, row.source, row.result, Verdict.NOT_TESTED.value]]
    else:
        rows = [_claim_row(report, report.findings[claim.id]) for claim in section.claims]
    table = prose_table(["claim", "whose", "source", "here", "verdict"], rows)
    return paragraphs(f"### {section.title}", table, _families(report, section))


def _families(report: Report, section: Section) -> str:
    """The families of a section's claims, with the number of tests that are corrected together."""
    family_of = report.claims.families()
    sizes = Counter(family_of[name] for name, finding in report.findings.items() if finding.q is not None)
    named = dict.fromkeys(family_of[claim.id] for claim in section.claims if family_of[claim.id] in sizes)
    parts = [f"{family} ({sizes[family]} tests)" for family in named]
    return f"Families of q: {'; '.join(parts)}." if parts else ""


def _is_tested(report: Report, section: Section) -> bool:
    return any(report.findings[claim.id].verdict is not Verdict.NOT_TESTED for claim in section.claims)


def _claim_row(report: Report, finding: Finding) -> list[str]:
    claim, verdict = finding.claim, finding.verdict.value
    shown = verdict if finding.verdict in (Verdict.NOT_TESTED, Verdict.NOT_SHOWN) else f"**{verdict}**"
    remark = _remark(report, claim)
    return [claim.text, claim.whose, claim.source, finding.result, f"{shown}. {remark}" if remark else shown]


def _remark(report: Report, claim: Claim) -> str:
    return report.remark(claim.remark, getattr(claim, "study", MAIN))


def untested(report: Report) -> str:
    """Section 9. Claims that share a reason share a line."""
    texts_by_reason: dict[str, list[str]] = {}
    for section in report.claims.sections:
        for claim in section.claims:
            finding = report.findings[claim.id]
            if finding.verdict is not Verdict.NOT_TESTED:
                continue
            text, result, remark = claim.text, finding.result, _remark(report, claim)
            if (row := section.until_tested) is not None and not _is_tested(report, section):
                text, result, remark = row.text, row.result, ""
            reason = " ".join(part.rstrip(".") + "." for part in (result, remark) if part)
            texts_by_reason.setdefault(reason, []).append(text)
    lines = [f"- {'; '.join(dict.fromkeys(texts))}: {reason}" for reason, texts in texts_by_reason.items()]
    return "\n".join(lines) or f"All {len(report.findings)} claims were tested."
