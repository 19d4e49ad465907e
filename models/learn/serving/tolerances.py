"""How far ONNX Runtime and the server may differ from golden vectors; the server checks with these bounds, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The largest absolute difference per value, and the smallest cosine per vector.
ABSOLUTE = 1e-4
COSINE = 0.99999


@dataclass(frozen=True)
class Tolerance:
    """The largest absolute difference per value, and the smallest cosine per vector."""

    absolute: float = ABSOLUTE
    cosine: float = COSINE

    def table(self) -> dict[str, float]:
        """Returns `encoder.tolerance` of a manifest."""
        return {"absolute": self.absolute, "cosine": self.cosine}


SINGLE_PRECISION = Tolerance()
# Content of an encoder in int8 on another CPU: about twice what was measured on MiniLM when noise of one part in 10^7
# moved some values to the other side of a step ("An encoder in int8" in models/README.md).
INT8 = Tolerance(0.02, 0.997)


def of_content(manifest: Mapping[str, Any]) -> Tolerance:
    """Returns the tolerance of a bundle's content embeddings."""
    return Tolerance(**manifest["encoder"].get("tolerance", {}))
