"""How the report prints numbers and tables: few digits, no leading zero, intervals in brackets, real minus signs."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import false_discovery_control

from research.bootstrap import Estimate
from research.retrieval.estimates import has_interval, is_significant

NOT_RUN = "*not run yet*"
NONE = "–"
# Metric -> its name in the report. H@100 and R@100 are the names that LEARN's paper prints.
METRIC_NAMES = {
    "hr_at_10": "HR@10",
    "hr_at_50": "HR@50",
    "hr_at_100": "H@100",
    "hr_at_200": "HR@200",
    "recall_at_10": "Recall@10",
    "recall_at_100": "R@100",
    "ndcg_at_10": "NDCG@10",
    "ndcg_at_10_by_user": "NDCG@10 by user",
    "ndcg_at_50": "NDCG@50",
    "ndcg_at_200": "NDCG@200",
    "mrr": "MRR",
    "mrr_at_10": "MRR@10",
    "mrr_at_50": "MRR@50",
    "mrr_at_200": "MRR@200",
}


def number(value: float, digits: int = 4) -> str:
    """.0967, −.0012, 12.3000; a value that rounds to nothing has no sign."""
    text = f"{abs(value):.{digits}f}"
    is_negative = value < 0 and float(text) != 0
    return ("−" if is_negative else "") + (text[1:] if text.startswith("0.") else text)


def signed(value: float, digits: int = 4) -> str:
    """+.0052, −.0012, .0000."""
    text = number(value, digits)
    return text if text.startswith("−") or float(f"{value:.{digits}f}") == 0 else f"+{text}"


def probability(p: float, name: str = "p") -> str:
    """p .012; what is smaller than .001 is "p < .001"."""
    return f"{name} < .001" if p < 0.001 else f"{name} {number(p, 3)}"


def percent(share: float) -> str:
    """44 %."""
    return f"{100 * share:.0f} %"


def with_interval(estimate: Estimate | None) -> str:
    """.0967 [.0901, .1032]; without the interval if there are too few users for one."""
    if estimate is None:
        return NONE
    if not has_interval(estimate):
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def plain(estimate: Estimate | None) -> str:
    """The value without its interval."""
    return NONE if estimate is None else number(estimate.value)


def difference(estimate: Estimate | None) -> str:
    """+.0052 [+.0011, +.0093], p .012; in bold if p < .05."""
    if estimate is None:
        return NONE
    if not has_interval(estimate):
        return f"{signed(estimate.value)} (too few users)"
    text = f"{with_signs(estimate)}, {probability(estimate.p)}"
    return f"**{text}**" if is_significant(estimate) else text


def with_signs(estimate: Estimate) -> str:
    """+.0052 [+.0011, +.0093]: a difference without its p."""
    return f"{signed(estimate.value)} [{signed(estimate.low)}, {signed(estimate.high)}]"


def ratio(estimate: Estimate) -> str:
    """× 1.29 [1.20, 1.39]: how many times the other mean this one is."""
    return f"× {number(estimate.value, 2)} [{number(estimate.low, 2)}, {number(estimate.high, 2)}]"


def multiplicity(estimates: Sequence[Estimate | None]) -> str:
    """How many comparisons of a table are bold, how many would be by chance, and how many stay after a correction.

    The correction is that of Benjamini and Hochberg (1995): at most 5 % of those that stay are expected to be false.
    """
    p = [estimate.p for estimate in estimates if estimate is not None and has_interval(estimate)]
    if not p:
        return ""
    n_bold = sum(value < 0.05 for value in p)
    n_stay = int((false_discovery_control(p) < 0.05).sum())
    return (
        f"Bold: p < .05, {n_bold} of {len(p)} comparisons; {number(0.05 * len(p), 1)} are expected by chance alone. "
        f"{n_stay} remain at a false discovery rate of 5 %."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row of {len(row)} cells under {len(header)} columns: {row}")
    rule = ["---", *(["---:"] * (len(header) - 1))]
    return "\n".join(_line(cells) for cells in [header, rule, *rows])


def prose_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with every column to the left, for cells of words."""
    return "\n".join(_line(cells) for cells in [header, ["---"] * len(header), *rows])


def _line(cells: Sequence[str]) -> str:
    # A bar inside a cell would open another column, a line break would end the table.
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def paragraphs(*parts: str) -> str:
    """The parts that are not empty, with an empty line between them."""
    return "\n\n".join(part for part in parts if part)
