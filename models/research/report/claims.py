"""Reads `claims.toml`: the claims of LEARN and of its public record, each with the test that decides it here.

A claim has an `id`, its `text`, whose it is (`whose`: "paper" or "ours"), what the `source` printed, a `remark` if a
person has one, and one of these tests:

    difference     `model` has a higher mean than `against`, on `metric` within `group` of the retrieval study `study`
    ahead-of-all   `model` has a higher mean than each model of `against`
    ahead-by       the mean of `model` is at least 1 + `share` times that of `against`; with a share of 0, it is higher
    not-behind     the mean of `model` is above that of `against`, or below it by less than `relative_margin` of it
    reproduces     the mean of `model` is within `tolerance` of `published`
    exceeds        the mean of `model` is above `published`
    ranking-gain   the ranking model of `arm` has a higher metric than the one without extra features; with
                   `beyond_group`, its gain in `group` is larger than that in `beyond_group`
    none           no offline run can decide the claim; `reason` says why

p is corrected within a family: the claims of one section, the paper's and ours apart. `family` gives a claim to another
family than that of its section. `verdicts` has the rule that turns a test into a verdict.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationError

from learn.data import DataError
from research.ranking.auc_metrics import contrast_name
from research.record_files import Strict

CLAIMS = Path(__file__).with_name("claims.toml")
# What `whose` may be, in the words of the report.
OWNERS = {"paper": "the paper's", "ours": "our own"}


class _Claim(Strict):
    id: str
    text: str
    whose: Literal["paper", "ours"]
    source: str
    remark: str = ""
    family: str = ""


class _OfModel(_Claim):
    study: str
    metric: str
    group: str = "all"
    model: str

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the claim needs."""
        return (self.model,)


class _OfPair(_OfModel):
    against: str

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the claim needs."""
        return (self.model, self.against)


class Difference(_OfPair):
    """`model` is ahead of `against`."""

    test: Literal["difference"]


class AheadOfAll(_OfModel):
    """`model` is ahead of every model of `against`."""

    test: Literal["ahead-of-all"]
    against: Annotated[list[str], Field(min_length=1)]

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the claim needs."""
        return (self.model, *self.against)


class AheadBy(_OfPair):
    """`model` is ahead of `against` by a share of its mean."""

    test: Literal["ahead-by"]
    share: NonNegativeFloat


class NotBehind(_OfPair):
    """`model` is ahead of `against`, or behind by no more than a margin (a test of non-inferiority)."""

    test: Literal["not-behind"]
    relative_margin: PositiveFloat


class Reproduces(_OfModel):
    """The model's mean is within `tolerance` of a published figure."""

    test: Literal["reproduces"]
    published: float
    tolerance: float


class Exceeds(_OfModel):
    """The model's mean is above a published figure."""

    test: Literal["exceeds"]
    published: float


class RankingGain(_Claim):
    """The ranking model of `arm` is ahead of the one without extra features."""

    test: Literal["ranking-gain"]
    study: str
    metric: str
    group: str = "all"
    beyond_group: str | None = None
    arm: str

    @property
    def row_group(self) -> str:
        """The group in the words of `ranking.summary.Row`."""
        return self.group if self.beyond_group is None else contrast_name(self.group, self.beyond_group)


class Untestable(_Claim):
    """No offline run can decide the claim."""

    test: Literal["none"]
    reason: str


RetrievalClaim = Difference | AheadOfAll | AheadBy | NotBehind | Reproduces | Exceeds
Claim = Annotated[RetrievalClaim | RankingGain | Untestable, Field(discriminator="test")]


class UntilTested(Strict):
    """The row that stands for all claims of a section until one of its studies has been run."""

    text: str
    source: str
    result: str


class Section(Strict):
    """Claims that share a heading."""

    title: str
    until_tested: UntilTested | None = None
    claims: list[Claim]

    def family(self, claim: Claim) -> str:
        """The family of a claim of this section, by name."""
        return f"{claim.family or self.title}, {OWNERS[claim.whose]}"


class ClaimList(Strict):
    """The file. `main_study` is the study that remarks are about and that claims of "main" are tested on."""

    main_study: str
    sections: list[Section]

    def claims(self) -> list[Claim]:
        """All claims, in the order of the file."""
        return [claim for section in self.sections for claim in section.claims]

    def families(self) -> dict[str, str]:
        """The id of each claim -> its family."""
        return {claim.id: section.family(claim) for section in self.sections for claim in section.claims}


def read_claims(path: Path = CLAIMS) -> ClaimList:
    """`DataError` names the field that is wrong, and an id that two claims share."""
    try:
        claims = ClaimList.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise DataError(path, None, None, str(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(path, None, ".".join(map(str, first["loc"])), first["msg"]) from error
    ids = [claim.id for claim in claims.claims()]
    for claim_id in ids:
        if ids.count(claim_id) > 1:
            raise DataError(path, None, "id", f"two claims are called {claim_id!r}")
    return claims
