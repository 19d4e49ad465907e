"""Tests the claims: the result of each, in words and as one of four verdicts.

For a difference, or a gain of a ranking model, with its 95 % interval:

    holds             p < .05 and the difference is above 0
    does not hold     p < .05 and it is below 0: the opposite is true
    not shown         p >= .05: this data set decides nothing; or only one seed was trained
    not tested here   a run is missing, or nothing offline can test the claim

A figure to be reproduced holds within the tolerance and does not hold outside. A figure to be exceeded is compared with
the interval of our mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from research.bootstrap import Estimate
from research.ranking.summary import Row
from research.report.claims import Claim, Difference, Exceeds, RankingGain, Reproduces, Untestable
from research.report.number_format import METRIC_NAMES, difference, number, with_interval
from research.retrieval.estimates import StudyEstimates, has_interval

MAIN = "main"
MAIN_BY_TIME = "main-by-time"


class Verdict(StrEnum):
    """The outcome of a test."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_SHOWN = "not shown"
    NOT_TESTED = "not tested here"


@dataclass(frozen=True)
class Finding:
    """A claim with its verdict; `result` is our figure in words, or what is missing."""

    claim: Claim
    verdict: Verdict
    result: str


@dataclass(frozen=True)
class Studies:
    """All studies: retrieval and ranking studies by name, and the name of the main one."""

    retrieval: Mapping[str, StudyEstimates]
    main: str | None
    ranking: Mapping[str, Sequence[Row]]

    def name(self, study: str) -> str:
        """The name that `MAIN` or `MAIN_BY_TIME` stands for, or the name itself; "" if there is no main study."""
        if study not in (MAIN, MAIN_BY_TIME):
            return study
        return f"{self.main}{study.removeprefix(MAIN)}" if self.main else ""

    def study(self, name: str) -> StudyEstimates | None:
        """The retrieval study of that name."""
        return self.retrieval.get(self.name(name))

    def rows(self, name: str) -> Sequence[Row]:
        """The rows of the ranking study of that name."""
        return self.ranking.get(self.name(name), ())


def decide(claim: Claim, studies: Studies) -> Finding:
    """Tests one claim."""
    match claim:
        case Untestable():
            return Finding(claim, Verdict.NOT_TESTED, claim.reason)
        case RankingGain():
            return _ranking_gain(claim, studies)
    study = studies.study(claim.study)
    if study is None:
        name = studies.name(claim.study)
        which = f"the study `{name}`" if name else "the main study"
        return Finding(claim, Verdict.NOT_TESTED, f"{which} has not been run yet")
    return _difference(claim, study) if isinstance(claim, Difference) else _published(claim, study)


def _missing(study: StudyEstimates, *models: str) -> str | None:
    absent = [f"`{model}`" for model in models if not study.has(model)]
    return f"{' and '.join(absent)} not run yet in the study `{study.study.study}`" if absent else None


def _difference(claim: Difference, study: StudyEstimates) -> Finding:
    models = (claim.model, claim.against)
    if absent := _missing(study, *models):
        return Finding(claim, Verdict.NOT_TESTED, absent)
    gap = study.difference(*models, claim.metric, claim.group)
    if gap is None:
        return Finding(
            claim, Verdict.NOT_TESTED, f"the study `{study.study.study}` has no test events in the group {claim.group}"
        )
    means = " against ".join(number(study.mean(model, claim.metric, claim.group).value) for model in models)
    result = f"{METRIC_NAMES[claim.metric]} {means}: {difference(gap)}"
    return _if_seeds_suffice(Finding(claim, _by_sign(gap), result), study.fewest_seeds(*models))


def _published(claim: Reproduces | Exceeds, study: StudyEstimates) -> Finding:
    if absent := _missing(study, claim.model):
        return Finding(claim, Verdict.NOT_TESTED, absent)
    mean = study.mean(claim.model, claim.metric)
    if isinstance(claim, Reproduces):
        is_near = abs(mean.value - claim.published) <= claim.tolerance
        verdict = Verdict.HOLDS if is_near else Verdict.DOES_NOT_HOLD
    elif not has_interval(mean) or mean.low <= claim.published <= mean.high:
        verdict = Verdict.NOT_SHOWN
    else:
        verdict = Verdict.HOLDS if mean.low > claim.published else Verdict.DOES_NOT_HOLD
    result = f"{METRIC_NAMES[claim.metric]} {with_interval(mean)}"
    return _if_seeds_suffice(Finding(claim, verdict, result), study.fewest_seeds(claim.model))


def _ranking_gain(claim: RankingGain, studies: Studies) -> Finding:
    rows, group, metric = studies.rows(claim.study), claim.row_group, claim.metric.upper()
    if not rows:
        name = studies.name(claim.study)
        which = f"the ranking study `{name}`" if name else "the ranking study"
        return Finding(claim, Verdict.NOT_TESTED, f"{which} has not been run yet")
    row = next((row for row in rows if (row.arm, row.metric, row.group) == (claim.arm, claim.metric, group)), None)
    if row is None:
        return Finding(claim, Verdict.NOT_TESTED, f"the ranking study has no arm `{claim.arm}` on {group}")
    if row.gain is None:
        return Finding(claim, Verdict.NOT_TESTED, f"{metric} is not defined on {group} in the ranking study")
    if row.mean is None:
        result = f"gain in {metric}, {group}: {difference(row.gain)}"
    else:
        without = number(row.mean - row.gain.value)
        result = f"{metric} {without} -> {number(row.mean)}: {difference(row.gain)}"
    return _if_seeds_suffice(Finding(claim, _by_sign(row.gain), result), row.gain.n_seeds)


def _by_sign(gap: Estimate) -> Verdict:
    if not has_interval(gap) or gap.p >= 0.05:
        return Verdict.NOT_SHOWN
    return Verdict.HOLDS if gap.value > 0 else Verdict.DOES_NOT_HOLD


def _if_seeds_suffice(finding: Finding, n_seeds: int | None) -> Finding:
    """One seed shows nothing, since its share in the figure is unknown. `n_seeds` is None if nothing was trained."""
    if n_seeds is None:
        return finding
    if n_seeds == 1:
        return replace(finding, verdict=Verdict.NOT_SHOWN, result=f"{finding.result}; one seed")
    return replace(finding, result=f"{finding.result}; {n_seeds} seeds")
