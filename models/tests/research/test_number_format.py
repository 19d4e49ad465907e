"""How the report prints numbers."""

from __future__ import annotations

import pytest

from research.bootstrap import Estimate
from research.report import number_format


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
def test_numbers_are_printed_with_four_decimals_and_an_optional_sign(value, plain, signed):
    assert (number_format.number(value), number_format.signed(value)) == (plain, signed)


def test_estimates_are_printed_with_interval_and_p():
    figure = Estimate(0.0967, 0.0901, 0.1032, None, 300, 60, 5)
    gap = Estimate(0.0052, 0.0011, 0.0093, 0.0124, 300, 60, 5)
    nothing = Estimate(-0.0052, -0.0111, 0.0013, 0.21, 300, 60, 5)
    few = Estimate(-0.0052, -0.0111, -0.0013, 0.01, 30, 6, 5)
    assert number_format.with_interval(figure) == ".0967 [.0901, .1032]"
    assert number_format.difference(gap) == "**+.0052 [+.0011, +.0093], p .012**"
    assert number_format.difference(nothing) == "−.0052 [−.0111, +.0013], p .210"
    assert number_format.difference(few) == "−.0052 (too few users)"
    assert number_format.difference(None) == number_format.with_interval(None) == "–"
    assert number_format.probability(0.0004) == "p < .001"


def test_multiplicity_counts_the_differences_that_benjamini_and_hochberg_keep():
    # The sorted p values .001, .02, .04 and .9 are compared with .0125, .025, .0375 and .05: the first two remain.
    gaps = [Estimate(0.1, 0, 1, p, 300, 60, 5) for p in (0.9, 0.02, 0.001, 0.04)]
    text = number_format.multiplicity([*gaps, None])
    assert text.startswith("Bold: p < .05, 3 of 4 comparisons; .2 are expected by chance alone. 2 remain")
    assert number_format.multiplicity([None]) == ""


def test_a_row_with_a_wrong_number_of_cells_is_an_error():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        number_format.table(["a", "b"], [["x"]])
