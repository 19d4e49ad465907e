"""What the peers' bundles have in common: how their towers are called in either format. `Towers` itself loads no graph.

`triton_server.py` copies this file beside `triton_model.py` into a model repository.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Towers(ABC):
    """The towers of a bundle. In format 1, `manifest` must name the inputs of the format-1 user tower."""

    manifest: dict[str, Any]
    format: int

    @abstractmethod
    def run(self, graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        """Runs a graph with its inputs in the manifest's order; returns its outputs in that order."""

    def history_dim(self) -> int:
        """Returns the width of what the user tower reads of an item."""
        return self.manifest["encoder"]["dim"] if self.format == 1 else self.manifest["item_tower"]["adapted_dim"]

    def item(self, content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps content [n,C] to item embeddings [n,E] and to what the user tower reads of each item."""
        item, adapted = self.run("item_tower", content)
        return item, content if self.format == 1 else adapted

    def user(self, history: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Maps a history [1,l,C or D] and its mask [1,l] to a user embedding [1,E]. No action is known."""
        actions = [np.zeros_like(mask)] if self.manifest["history"]["actions"] else []
        return self.run("user_tower", history, mask, *actions)[0]
