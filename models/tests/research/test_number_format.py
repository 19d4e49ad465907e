"""Numbers as they are printed."""

from __future__ import annotations

import pytest

from research.bootstrap import Estimate
from research.report import number_format as shown


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [
        (0.09671, ".0967", "+.0967"),
        (-0.00123, "−.0012", "−.0012"),
        (0.00001, ".0000", ".0000"),
        (-0.00001, ".0000", ".0000"),
        (0.99999, "1.0000", "+1.0000"),
        (12.3, "12.3000", "+12.3000"),
    ],
)
def test_numbers(value, plain, signed):
    assert (shown.number(value), shown.signed(value)) == (plain, signed)


def test_estimates():
    figure = Estimate(0.0967, 0.0901, 0.1032, None, 300, 60, 5)
    gap = Estimate(0.0052, 0.0011, 0.0093, 0.0124, 300, 60, 5)
    nothing = Estimate(-0.0052, -0.0111, 0.0013, 0.21, 300, 60, 5)
    few = Estimate(-0.0052, -0.0111, -0.0013, 0.01, 30, 6, 5)
    assert shown.with_interval(figure) == ".0967 [.0901, .1032]"
    assert shown.difference(gap) == "**+.0052 [+.0011, +.0093], p .012**"
    assert shown.difference(nothing) == "−.0052 [−.0111, +.0013], p .210"
    assert shown.difference(few) == "−.0052 (too few users)"
    assert shown.difference(None) == shown.with_interval(None) == "–"
    assert shown.probability(0.0004) == "p < .001"


def test_how_many_differences_stay_after_benjamini_and_hochberg():
    # Sorted: .001, .02, .04, .9 against .0125, .025, .0375, .05: the first two stay.
    gaps = [Estimate(0.1, 0, 1, p, 300, 60, 5) for p in (0.9, 0.02, 0.001, 0.04)]
    text = shown.multiplicity([*gaps, None])
    assert text.startswith("Bold: p < .05, 3 of 4 comparisons; .2 are expected by chance alone. 2 remain")
    assert shown.multiplicity([None]) == ""


def test_a_row_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        shown.table(["a", "b"], [["x"]])
