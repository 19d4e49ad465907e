"""Claims meet evidence: what each test found, in words and as one of four verdicts (rules in `claims`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from research.bootstrap import Estimate
from research.ranking.study import Row
from research.report.claims import BY_TIME, MAIN, REFERENCE, SHOWN, Above, Ahead, Claim, Near, Ranked, Test, Untestable
from research.report.number_format import difference, number, with_interval
from research.report.ranking_table import gap as gap_of
from research.retrieval.estimates import Evidence, has_interval


class Verdict(StrEnum):
    """What came out of a test."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    NOT_SHOWN = "not shown"
    NOT_TESTED = "not tested here"


@dataclass(frozen=True)
class Finding:
    """A claim with its verdict; `found` is our figure in words, or what is missing."""

    claim: Claim
    verdict: Verdict
    found: str


@dataclass(frozen=True)
class Record:
    """All evidence: studies of retrieval and of ranking by name, and which name is the main one's."""

    studies: Mapping[str, Evidence]
    main: str | None
    ranking: Mapping[str, Sequence[Row]]

    def name(self, study: str) -> str:
        """The name that `MAIN` or `BY_TIME` stands for, or the name itself; "" if there is no main study."""
        if study not in (MAIN, BY_TIME):
            return study
        return f"{self.main}{study.removeprefix(MAIN)}" if self.main else ""

    def study(self, name: str) -> Evidence | None:
        """The study of retrieval of that name."""
        return self.studies.get(self.name(name))

    def rows(self, name: str) -> Sequence[Row]:
        """The rows of the ranking study of that name."""
        return self.ranking.get(self.name(name), ())


def find(claim: Claim, record: Record) -> Finding:
    """Decides one claim."""
    verdict, found = _decide(claim.test, record)
    return Finding(claim, verdict, found)


def _decide(test: Test, record: Record) -> tuple[Verdict, str]:
    match test:
        case Untestable(why):
            return Verdict.NOT_TESTED, why
        case Ranked():
            return _ranked(test, record)
        case Ahead():
            evidence = record.study(test.study)
            return _no_study(test.study, record) if evidence is None else _ahead(test, evidence)
        case Near() | Above():
            evidence = record.study(test.study)
            return _no_study(test.study, record) if evidence is None else _published(test, evidence)


def _no_study(name: str, record: Record) -> tuple[Verdict, str]:
    which = f"the study `{record.name(name)}`" if record.name(name) else "the main study"
    return Verdict.NOT_TESTED, f"{which} has not been run yet"


def _missing(evidence: Evidence, *models: str) -> str | None:
    absent = [f"`{model}`" for model in models if not evidence.has(model)]
    return f"{' and '.join(absent)} not run yet in the study `{evidence.study.study}`" if absent else None


def _ahead(test: Ahead, evidence: Evidence) -> tuple[Verdict, str]:
    model, other = test.model, test.other
    ablation = other if model == REFERENCE else model
    if REFERENCE in (model, other):
        if absent := _missing(evidence, ablation):
            return Verdict.NOT_TESTED, absent
        reference = evidence.one(ablation).reference
        if reference is None:
            return Verdict.NOT_TESTED, f"the runs of `{ablation}` name no reference"
        model, other = (reference, other) if model == REFERENCE else (model, reference)
    if absent := _missing(evidence, model, other):
        return Verdict.NOT_TESTED, absent
    gap = evidence.difference(model, other, test.metric, test.group)
    if gap is None:
        return Verdict.NOT_TESTED, f"the study `{evidence.study.study}` has no test events in the group {test.group}"
    pair = " against ".join(number(evidence.figure(name, test.metric, test.group).value) for name in (model, other))
    found = f"{SHOWN[test.metric]} {pair}: {difference(gap)}"
    return _by_seeds(_sign(gap), found, evidence.fewest_seeds(model, other))


def _by_seeds(verdict: Verdict, found: str, n_seeds: int | None) -> tuple[Verdict, str]:
    """With one seed nothing is shown: how much of a figure is the seed's, nobody knows. None: nothing was trained."""
    if n_seeds == 1:
        return Verdict.NOT_SHOWN, f"{found}; one seed"
    return verdict, found if n_seeds is None else f"{found}; {n_seeds} seeds"


def _sign(gap: Estimate) -> Verdict:
    if not has_interval(gap):
        return Verdict.NOT_SHOWN
    return by_sign(gap.value, gap.p)


def by_sign(value: float, p: float) -> Verdict:
    """The rule for differences."""
    if p >= 0.05:
        return Verdict.NOT_SHOWN
    return Verdict.HOLDS if value > 0 else Verdict.DOES_NOT_HOLD


def _published(test: Near | Above, evidence: Evidence) -> tuple[Verdict, str]:
    if absent := _missing(evidence, test.model):
        return Verdict.NOT_TESTED, absent
    figure = evidence.figure(test.model, test.metric)
    found = f"{SHOWN[test.metric]} {with_interval(figure)}"
    return _by_seeds(_against(test, figure), found, evidence.fewest_seeds(test.model))


def _against(test: Near | Above, figure: Estimate) -> Verdict:
    if isinstance(test, Near):
        return Verdict.HOLDS if abs(figure.value - test.published) <= test.tolerance else Verdict.DOES_NOT_HOLD
    if not has_interval(figure) or figure.low <= test.published <= figure.high:
        return Verdict.NOT_SHOWN
    return Verdict.HOLDS if figure.low > test.published else Verdict.DOES_NOT_HOLD


def _ranked(test: Ranked, record: Record) -> tuple[Verdict, str]:
    rows = record.rows(test.study)
    if not rows:
        which = f"the ranking study `{record.name(test.study)}`" if record.name(test.study) else "the ranking study"
        return Verdict.NOT_TESTED, f"{which} has not been run yet"
    for row in rows:
        if (row.arm, row.metric, row.group) == (test.arm, test.metric, test.group):
            if row.difference is None:
                return Verdict.NOT_TESTED, f"{test.metric.upper()} is not defined on {test.group} in the ranking study"
            gap = gap_of(row)
            if row.figure is None:
                found = f"gain in {test.metric.upper()}, {test.group}: {difference(gap)}"
            else:
                without = number(row.figure - row.difference)
                found = f"{test.metric.upper()} {without} -> {number(row.figure)}: {difference(gap)}"
            return _by_seeds(_sign(gap), found, row.n_seeds)
    return Verdict.NOT_TESTED, f"the ranking study has no arm `{test.arm}` on {test.group}"
