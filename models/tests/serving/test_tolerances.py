"""A manifest's tolerance is one that a server accepts, or is refused by name."""

from __future__ import annotations

import pytest

from learn.serving import tolerances
from learn.serving.tolerances import Tolerance


def of(table):
    return tolerances.of_content({"encoder": {"tolerance": table}})


def test_a_manifest_without_a_tolerance_has_that_of_single_precision():
    assert tolerances.of_content({"encoder": {}}) == tolerances.SINGLE_PRECISION == Tolerance(1e-4, 0.99999)


def test_bounds_up_to_those_of_the_server_are_read():
    assert of({"absolute": 0.0999, "cosine": 0.98}) == Tolerance(0.0999, 0.98)
    assert of({"absolute": 0, "cosine": 0.9999999}) == Tolerance(0, 0.9999999)
    assert of(tolerances.INT8.table()) == tolerances.INT8


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({"absolute": 0.01, "cosine": 0.99, "relative": 0.1}, "absolute, cosine, relative"),
        ({"absolut": 0.01, "cosine": 0.99}, "absolut, cosine"),
        ({"absolute": 0.01}, "absolute"),
        ({"cosine": 0.99}, "cosine"),
        ({}, "nothing"),
        (0.01, "0.01"),
    ],
)
def test_unknown_and_missing_bounds_are_refused(table, found):
    """A server refuses them, too. With a default in their place, a misspelt bound would have no effect."""
    with pytest.raises(ValueError) as caught:
        of(table)
    assert str(caught.value) == f"encoder.tolerance has {found}, but it must have absolute and cosine"


@pytest.mark.parametrize("value", [0.1, 1.0, -1e-9, float("nan"), float("inf"), "0.01", True, None])
def test_a_difference_that_is_too_wide_or_no_number_is_refused(value):
    with pytest.raises(ValueError, match=r"encoder\.tolerance\.absolute is .*, but it must be from 0 and below 0\.1"):
        of({"absolute": value, "cosine": 0.99})


@pytest.mark.parametrize("value", [0.9799, 0.0, -1.0, 1.0, 1, 2.0, float("nan"), "0.99", True])
def test_a_cosine_that_is_too_low_or_no_cosine_is_refused(value):
    with pytest.raises(ValueError, match=r"encoder\.tolerance\.cosine is .*, but it must be from 0\.98 and below 1"):
        of({"absolute": 0.01, "cosine": value})
