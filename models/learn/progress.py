"""A progress bar that shows the rate, also in tokens."""

from __future__ import annotations

from tqdm import tqdm


class Rate:
    """A progress bar that also shows real tokens per second, where there are any. Nothing is shown without a title."""

    def __init__(self, title: str | None, n_items: int | None, unit: str = "item") -> None:
        self._bar = tqdm(total=n_items, desc=title, unit=unit, disable=title is None, smoothing=0.05)
        self._n_tokens = 0

    def __enter__(self) -> Rate:
        return self

    def __exit__(self, *_error: object) -> None:
        self._bar.close()

    def add(self, n_items: int, n_tokens: int = 0) -> None:
        """Counts items that were encoded just now, and their tokens."""
        self._n_tokens += n_tokens
        if self._n_tokens and not self._bar.disable:
            elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{self._n_tokens / elapsed:,.0f} tokens/s", refresh=False)
        self._bar.update(n_items)

    def skip(self, n_items: int) -> None:
        """Counts items that were encoded earlier; they do not affect the rate."""
        if not self._bar.disable:
            self._bar.initial += n_items
        self._bar.update(n_items)
