"""How far ONNX Runtime and the server may differ from golden vectors; the server checks with these bounds, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The largest absolute difference per value, and what the cosine per vector must be greater than.
ABSOLUTE = 1e-4
COSINE = 0.99999


@dataclass(frozen=True)
class Tolerance:
    """The largest absolute difference per value, and what the cosine per vector must be greater than."""

    absolute: float = ABSOLUTE
    cosine: float = COSINE

    def table(self) -> dict[str, float]:
        """Returns `encoder.tolerance` of a manifest."""
        return {"absolute": self.absolute, "cosine": self.cosine}

    def holds(self, absolute: float, cosine: float) -> bool:
        """Returns whether differences are within both bounds; a NaN never is."""
        return absolute <= self.absolute and cosine > self.cosine


SINGLE_PRECISION = Tolerance()
# Content of an encoder in int8 on another CPU: about twice what was measured on MiniLM when noise of one part in 10^7
# moved some values to the other side of a step (models/INT8.md).
INT8 = Tolerance(0.02, 0.997)
# The server accepts no wider tolerance (src/bundle/manifest.rs): a vector further away is another vector.
MAX_ABSOLUTE, MIN_COSINE = 0.1, 0.98
# How far a text's content embedding in company may be from the one computed alone, for graphs whose texts share runs.
# It does not depend on `encoder.tolerance`, which is about other CPUs: on one CPU, a graph that computes each text by
# itself differs in the last digits only. The server has the same bounds.
BATCH_TOLERANCE = SINGLE_PRECISION


def of_content(manifest: Mapping[str, Any]) -> Tolerance:
    """Returns the tolerance of a bundle's content embeddings.

    As in the server, `encoder.tolerance` is left out or has both bounds. Raises ValueError for anything else, and for
    bounds that are wider than a server accepts.
    """
    table = manifest["encoder"].get("tolerance")
    if table is None:
        return SINGLE_PRECISION
    expected = set(SINGLE_PRECISION.table())
    if not isinstance(table, Mapping) or set(table) != expected:
        found = ", ".join(sorted(table)) if isinstance(table, Mapping) else repr(table)
        raise ValueError(
            f"encoder.tolerance has {found or 'nothing'}, but it must have {' and '.join(sorted(expected))}"
        )
    for name, low, high in (("absolute", 0.0, MAX_ABSOLUTE), ("cosine", MIN_COSINE, 1.0)):
        value = table[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and low <= value < high):
            raise ValueError(f"encoder.tolerance.{name} is {value!r}, but it must be from {low:g} and below {high:g}")
    return Tolerance(**table)
