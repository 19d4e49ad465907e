"""Tests the claims: the result of each, in words and as one of four verdicts.

Every test has a p, which is corrected within the claim's family by the method of Benjamini and Hochberg (1995) and then
called q: at most 5 % of the claims of a family that are decided by q < .05 are expected to be decided wrongly. This
assumes that the tests are independent or depend positively on each other (Benjamini and Yekutieli 2001), as those that
share a model and test events mostly do. For a difference, a ratio, or a gain of a ranking model:

    holds             q < .05, and the model is ahead
    does not hold     q < .05, and it is behind: the opposite is true
    not shown         q >= .05: this data set decides nothing; or only one seed was trained, or there are too few users
    not tested here   a run is missing, the budget of a run decides, or nothing offline can test the claim

These tests have rules of their own:

    ahead-of-all   The closest rival decides. To be ahead of all at p, a model has to be ahead of each at p
                   (intersection-union test), so p is not corrected for the number of rivals. If it is behind one, p is
                   multiplied by their number, because the rival was chosen for its figure (Bonferroni).
    not-behind     It also holds if the 95 % interval of the difference is above minus the margin, and does not hold if
                   the interval is below it. Intervals are not corrected.
    reproduces     It holds within the tolerance and does not hold outside; there is no p.
    exceeds        The published figure is compared with the interval of our mean; there is no p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from scipy.stats import false_discovery_control

from research.bootstrap import Estimate
from research.ranking.summary import Row
from research.report.claims import (
    AheadBy,
    AheadOfAll,
    Claim,
    ClaimList,
    Difference,
    Exceeds,
    NotBehind,
    RankingGain,
    Reproduces,
    RetrievalClaim,
    Untestable,
)
from research.report.expected_models import expected_models
from research.report.number_format import (
    METRIC_NAMES,
    difference,
    number,
    percent,
    probability,
    ratio,
    with_interval,
    with_signs,
)
from research.retrieval.estimates import StudyEstimates, has_interval

MAIN = "main"
MAIN_BY_TIME = "main-by-time"
# What q has to stay below.
LEVEL = 0.05


class Verdict(StrEnum):
    """The outcome of a test."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_SHOWN = "not shown"
    NOT_TESTED = "not tested here"


@dataclass(frozen=True)
class Finding:
    """A claim with its verdict; `result` is our figure in words, or what is missing.

    `q` is the corrected p, None where a claim is decided without one.
    """

    claim: Claim
    verdict: Verdict
    result: str
    q: float | None = None


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


@dataclass(frozen=True)
class Measured:
    """What the runs say of a claim before p is corrected. With a `verdict`, the claim is decided without p.

    `gap` is what is tested against `null`, `shown` is `gap` in print, without p. Words before and after complete the
    result. `margin` is that of a claim `not-behind`.
    """

    claim: Claim
    before: str
    after: str = ""
    verdict: Verdict | None = None
    gap: Estimate | None = None
    shown: str = ""
    p: float = 1.0
    null: float = 0.0
    margin: float = 0.0


def findings(claims: ClaimList, studies: Studies) -> dict[str, Finding]:
    """The id of each claim -> its finding, with p corrected within the families."""
    measured = [_measure(claim, studies) for claim in claims.claims()]
    family_of = claims.families()
    members: dict[str, list[Measured]] = {}
    for test in measured:
        if test.verdict is None:
            members.setdefault(family_of[test.claim.id], []).append(test)
    q_of: dict[str, float] = {}
    for family in members.values():
        corrected = false_discovery_control([test.p for test in family])
        q_of |= {test.claim.id: float(q) for test, q in zip(family, corrected, strict=True)}
    return {test.claim.id: _finding(test, q_of.get(test.claim.id)) for test in measured}


def _finding(test: Measured, q: float | None) -> Finding:
    if q is None:
        return Finding(test.claim, test.verdict or Verdict.NOT_SHOWN, f"{test.before}{test.after}")
    text = f"{test.shown}, {probability(test.p)}, {probability(q, 'q')}"
    text = f"**{text}**" if q < LEVEL else text
    return Finding(test.claim, _verdict(test, q), f"{test.before}{text}{test.after}", q)


def _verdict(test: Measured, q: float) -> Verdict:
    gap = test.gap
    if isinstance(test.claim, NotBehind):
        if (q < LEVEL and gap.value > 0) or gap.low > -test.margin:
            return Verdict.HOLDS
        return Verdict.DOES_NOT_HOLD if gap.high < -test.margin else Verdict.NOT_SHOWN
    if q >= LEVEL:
        return Verdict.NOT_SHOWN
    return Verdict.HOLDS if gap.value > test.null else Verdict.DOES_NOT_HOLD


def _measure(claim: Claim, studies: Studies) -> Measured:
    match claim:
        case Untestable():
            return _untested(claim, claim.reason)
        case RankingGain():
            return _ranking_gain(claim, studies)
    study = studies.study(claim.study)
    if study is None:
        name = studies.name(claim.study)
        return _untested(claim, f"the study `{name}` has not been run yet" if name else "there is no main study")
    if absent := [f"`{model}`" for model in claim.models if not study.has(model)]:
        return _untested(claim, f"{', '.join(absent)} not run yet in the study `{study.name}`")
    if not study.groups[claim.group].any():
        return _untested(claim, f"the study `{study.name}` has no test events in the group {claim.group}")
    test = _of_retrieval(claim, study)
    if budget := _budget(claim, study):
        return _untested(claim, f"{budget}. As far as it was trained: {test.before.removesuffix(': ')}")
    return _with_training(test, study.fewest_seeds(*claim.models), _still_improving(claim, study))


def _untested(claim: Claim, reason: str) -> Measured:
    return Measured(claim, reason, verdict=Verdict.NOT_TESTED)


def _of_retrieval(claim: RetrievalClaim, study: StudyEstimates) -> Measured:
    match claim:
        case Difference():
            return _difference(claim, claim.against, study)
        case NotBehind():
            margin = claim.relative_margin * study.mean(claim.against, claim.metric, claim.group).value
            after = f"; the margin of {percent(claim.relative_margin)} is {number(margin)}"
            return replace(_difference(claim, claim.against, study), margin=margin, after=after)
        case AheadOfAll():
            return _ahead_of_all(claim, study)
        case AheadBy():
            return _ahead_by(claim, study)
    return _published(claim, study)


def _means(claim: RetrievalClaim, against: str, study: StudyEstimates) -> str:
    means = (number(study.mean(model, claim.metric, claim.group).value) for model in (claim.model, against))
    return f"{METRIC_NAMES[claim.metric]} {' against '.join(means)}: "


def _difference(claim: RetrievalClaim, against: str, study: StudyEstimates) -> Measured:
    gap = study.difference(claim.model, against, claim.metric, claim.group)
    return _of_gap(claim, _means(claim, against, study), gap)


def _of_gap(claim: Claim, before: str, gap: Estimate) -> Measured:
    if not has_interval(gap):
        return Measured(claim, f"{before}{difference(gap)}", verdict=Verdict.NOT_SHOWN)
    return Measured(claim, before, gap=gap, shown=with_signs(gap), p=gap.p)


def _ahead_of_all(claim: AheadOfAll, study: StudyEstimates) -> Measured:
    def rank(test: Measured) -> tuple[float, float]:
        """The p of "not ahead", as a one-sided test has it; the smaller difference decides between equal ones."""
        if test.gap is None:
            return 2.0, 0.0
        return (test.p if test.gap.value > 0 else 2.0 - test.p), -test.gap.value

    tests = {against: _difference(claim, against, study) for against in claim.against}
    closest = max(tests, key=lambda against: rank(tests[against]))
    test, n_rivals = tests[closest], len(tests)
    before = f"of {n_rivals} rivals, `{closest}` is the closest: {test.before}"
    if test.gap is not None and test.gap.value <= 0:
        return replace(test, before=before, p=min(1.0, n_rivals * test.p))
    return replace(test, before=before)


def _ahead_by(claim: AheadBy, study: StudyEstimates) -> Measured:
    null = 1.0 + claim.share
    gap = study.ratio(claim.model, claim.against, claim.metric, claim.group, null)
    before = _means(claim, claim.against, study)
    if gap is None or not has_interval(gap):
        reason = "there is no ratio to 0" if gap is None else "too few users for a ratio"
        return Measured(claim, f"{before}{reason}", verdict=Verdict.NOT_SHOWN)
    return Measured(claim, before, gap=gap, shown=f"{ratio(gap)}, tested against {number(null, 2)}", p=gap.p, null=null)


def _published(claim: Reproduces | Exceeds, study: StudyEstimates) -> Measured:
    mean = study.mean(claim.model, claim.metric, claim.group)
    if isinstance(claim, Reproduces):
        is_near = abs(mean.value - claim.published) <= claim.tolerance
        verdict = Verdict.HOLDS if is_near else Verdict.DOES_NOT_HOLD
    elif not has_interval(mean) or mean.low <= claim.published <= mean.high:
        verdict = Verdict.NOT_SHOWN
    else:
        verdict = Verdict.HOLDS if mean.low > claim.published else Verdict.DOES_NOT_HOLD
    return Measured(claim, f"{METRIC_NAMES[claim.metric]} {with_interval(mean)}", verdict=verdict)


def _ranking_gain(claim: RankingGain, studies: Studies) -> Measured:
    rows, group, metric = studies.rows(claim.study), claim.row_group, claim.metric.upper()
    if not rows:
        name = studies.name(claim.study)
        which = f"the ranking study `{name}`" if name else "the ranking study"
        return _untested(claim, f"{which} has not been run yet")
    row = next((row for row in rows if (row.arm, row.metric, row.group) == (claim.arm, claim.metric, group)), None)
    if row is None:
        return _untested(claim, f"the ranking study has no arm `{claim.arm}` on {group}")
    if row.gain is None:
        return _untested(claim, f"{metric} is not defined on {group} in the ranking study")
    before = f"gain in {metric}, {group}: "
    if row.mean is not None:
        before = f"{metric} {number(row.mean - row.gain.value)} -> {number(row.mean)}: "
    return _with_training(_of_gap(claim, before, row.gain), row.gain.n_seeds, "")


def _budget(claim: RetrievalClaim, study: StudyEstimates) -> str:
    """Why the budget of one of the claim's models decides; "" if it does for none."""
    reasons = [expected_models().budget(model, study.any_run(model).config) for model in claim.models]
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def _still_improving(claim: RetrievalClaim, study: StudyEstimates) -> str:
    """Which models of the claim were still improving at their last check: longer training could change the figure."""
    parts = [
        f"`{model}` ({n} of {len(study.runs(model))} seeds)"
        for model in claim.models
        if (n := study.n_still_improving(model))
    ]
    return f"; still improving at the last check: {', '.join(parts)}" if parts else ""


def _with_training(test: Measured, n_seeds: int | None, still_improving: str) -> Measured:
    """One seed shows nothing, since its share in the figure is unknown. `n_seeds` is None if nothing was trained."""
    if n_seeds is None:
        return test
    after = f"{test.after}; {'one seed' if n_seeds == 1 else f'{n_seeds} seeds'}{still_improving}"
    if n_seeds > 1:
        return replace(test, after=after)
    before = f"{test.before}{test.shown}, {probability(test.p)}" if test.gap is not None else test.before
    return replace(test, before=before, after=after, verdict=Verdict.NOT_SHOWN)
