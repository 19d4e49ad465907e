"""The claims of LEARN and of its public record, each with the test that decides it here. Nothing here knows a result.

Verdicts are computed by one rule. For "A is ahead of B", with the paired difference A − B and its 95 % interval:

    holds             p < .05 and the difference is above 0
    does not hold     p < .05 and it is below 0: the opposite is so
    not shown         p >= .05, the interval covers 0: this data set decides nothing; or one seed alone was trained
    not tested here   a run is missing, or nothing offline can test it

For a figure to be reproduced: holds within the tolerance, else does not hold. For a bound to be passed: as above, with
the interval of the figure against the bound.

The paper's figures are those of arXiv 2405.03988 (AAAI 2025), the MovieLens-1M ones those of HSTU (arXiv 2402.17152).
"""

from __future__ import annotations

from dataclasses import dataclass

from research.ranking.auc_metrics import contrast_name

MAIN = "main"
# The same data set cut through the clock, in the study of the main one's name with this after it.
BY_TIME = "-by-time"
# An ablation's reference run, whichever that is.
REFERENCE = "reference"

SHOWN = {
    "hr_at_10": "HR@10",
    "hr_at_50": "HR@50",
    "hr_at_100": "H@100",
    "recall_at_100": "R@100",
    "ndcg_at_10": "NDCG@10",
    "mrr": "MRR",
}


@dataclass(frozen=True)
class Ahead:
    """`model` ranks better than `other` on `metric`. `REFERENCE` stands for what the other one names."""

    model: str
    other: str
    metric: str
    group: str = "all"
    study: str = MAIN


@dataclass(frozen=True)
class Near:
    """The model's figure is within `tolerance` of a published one."""

    model: str
    metric: str
    published: float
    tolerance: float
    study: str


@dataclass(frozen=True)
class Above:
    """The model's figure passes a published one."""

    model: str
    metric: str
    published: float
    study: str


@dataclass(frozen=True)
class Ranked:
    """The ranking model with `arm` is ahead of the one without, within a group of events.

    A group "A − B" asks whether it is further ahead in A than in B.
    """

    arm: str
    metric: str
    group: str
    study: str = MAIN


@dataclass(frozen=True)
class Untestable:
    """No offline run can decide it; `why` is one sentence."""

    why: str


Test = Ahead | Near | Above | Ranked | Untestable


@dataclass(frozen=True)
class Claim:
    """`key` is what remarks in notes.toml are filed under; `paper` is what the source printed."""

    key: str
    text: str
    paper: str
    test: Test


@dataclass(frozen=True)
class Section:
    """Claims that share a heading in the answer."""

    title: str
    claims: tuple[Claim, ...]


INDUSTRIAL = Section(
    "Industrial data set: what the parts are worth",
    (
        Claim(
            "sampling",
            "Two-stage sampling of long histories beats uniform sampling",
            "H@100 .0751 against .0701, R@100 .0970 against .0905",
            Ahead(REFERENCE, "learn-text/published-uniform", "hr_at_100"),
        ),
        Claim(
            "item-tower-2",
            "Item tower (1), targets read as a sequence, beats (2), each item alone",
            "H@100 .0751 against .0505, R@100 .0970 against .0675",
            Ahead(REFERENCE, "learn-text/published-variant-2", "hr_at_100"),
        ),
        Claim(
            "item-tower-3",
            "Item tower (1) beats (3), no PCH for items",
            "H@100 .0751 against .0468, R@100 .0970 against .0626",
            Ahead(REFERENCE, "learn-text/published-variant-3", "hr_at_100"),
        ),
        Claim(
            "alignment",
            "Towers trained on behaviour beat the bare content embeddings",
            "H@100 .0751 against .0101, R@100 .0970 against .0210",
            Ahead("learn-text", "content-mean", "hr_at_100"),
        ),
        Claim(
            "alignment-published",
            "Towers aligned as published, in-batch without logQ, beat the bare content embeddings",
            "H@100 .0751 against .0101, R@100 .0970 against .0210",
            Ahead("learn-text/published", "content-mean", "hr_at_100"),
        ),
        Claim(
            "text-over-id",
            "LLM embeddings beat ID embeddings in our towers",
            "H@100 .0751 against .0503",
            Ahead("learn-text", "id-towers", "hr_at_100"),
        ),
        Claim(
            "llm-over-bert",
            "An LLM's embeddings beat those of a BERT-type encoder",
            "H@100 .0751 against .0576",
            Ahead("learn-text/smollm2", REFERENCE, "hr_at_100"),
        ),
        Claim(
            "frozen-over-lora",
            "A frozen LLM with a transformer on top beats a LoRA-tuned one",
            "H@100 .0751 against .0513",
            Ahead(REFERENCE, "learn-text/lora", "hr_at_100"),
        ),
    ),
)

# Category -> Recall@10 of LEARN, RecFormer, SASRec.
_AMAZON = {
    "scientific": (".1594", ".1448", ".1305"),
    "instruments": (".1240", ".1052", ".0995"),
    "arts": (".1701", ".1614", ".1342"),
    "office": (".1549", ".1403", ".1196"),
    "games": (".1345", ".1039", ".0953"),
    "pet": (".1284", ".1162", ".0881"),
}
AMAZON = Section(
    "Amazon reviews: Recall@10, LEARN against SASRec",
    tuple(
        Claim(
            f"amazon-{name}",
            f"LEARN beats SASRec on Amazon {name.capitalize()}",
            f"Recall@10 {learn} against {sasrec} (RecFormer {recformer})",
            Ahead("learn-text", "sasrec", "hr_at_10", study=f"amazon-{name}"),
        )
        for name, (learn, recformer, sasrec) in _AMAZON.items()
    ),
)

# What claims on retrieval are made of: (model, its name in the text), with a part of the key where that differs.
_RIVALS = (("sasrec", "SASRec"), ("hstu", "HSTU (without time)"))
_OURS = (("text", "learn-text", "LEARN, text only,"), ("id", "learn-id", "LEARN+ID"))
# Metric and what the key ends in.
_METRICS = (("ndcg_at_10", ""), ("hr_at_100", "-h100"))

MOVIELENS = Section(
    "MovieLens",
    (
        *(
            Claim(
                f"movielens-{key}-{other}",
                f"{label} beats {shown}",
                "said so of LEARN, no figures published" if key == "text" else "not in the paper: our aim",
                Ahead(model, other, "ndcg_at_10"),
            )
            for key, model, label in _OURS
            for other, shown in _RIVALS
        ),
        Claim(
            "ml-1m-sasrec",
            "Our SASRec reproduces the published figure on ML-1M",
            "HR@10 .2853, within .015",
            Near("sasrec", "hr_at_10", 0.2853, 0.015, "ml-1m"),
        ),
        Claim(
            "ml-1m-hstu",
            "Our HSTU reproduces the published figure on ML-1M",
            "HR@10 .3097, within .015",
            Near("hstu", "hr_at_10", 0.3097, 0.015, "ml-1m"),
        ),
        Claim(
            "ml-1m-hstu-time",
            "Our HSTU with its time bias reproduces the published figure on ML-1M",
            "HR@10 .3097, within .015",
            Near("hstu-time", "hr_at_10", 0.3097, 0.015, "ml-1m"),
        ),
        Claim(
            "ml-1m-hstu-large",
            "Our HSTU-large reproduces the published figure on ML-1M",
            "HR@10 .3294, within .015",
            Near("hstu-large", "hr_at_10", 0.3294, 0.015, "ml-1m"),
        ),
        Claim(
            "ml-1m-learn-id",
            "LEARN+ID passes the published HSTU on ML-1M",
            "HR@10 .3097; HSTU-large .3294",
            Above("learn-id", "hr_at_10", 0.3097, "ml-1m"),
        ),
        Claim(
            "ml-1m-learn-text",
            "LEARN, text only, beats our HSTU on ML-1M",
            "said so, no figures published",
            Ahead("learn-text", "hstu", "ndcg_at_10", study="ml-1m"),
        ),
    ),
)

COLD = Section(
    "Where text should pay: rare and new items",
    tuple(
        Claim(
            f"{key}-{other}{suffix}",
            f"LEARN, text only, beats {shown} on {what}, {SHOWN[metric]}",
            "offline figures not published; online, revenue of cold-start items +8.77 %, long-tail items +4.63 %",
            Ahead("learn-text", other, metric, group),
        )
        for key, group, what in (
            ("few", "item 0-4", "items with fewer than five ratings"),
            ("new", "item 0", "new items"),
        )
        for metric, suffix in _METRICS
        for other, shown in _RIVALS
    ),
)

_NO_FIGURES = "no such figures published"
CLOCK = Section(
    "Cut through the clock: most users and many items of the test are new",
    (
        *(
            Claim(
                f"clock-new-{other}{suffix}",
                f"LEARN, text only, beats {shown} on new items, {SHOWN[metric]}, cut by time",
                _NO_FIGURES,
                Ahead("learn-text", other, metric, "item 0", BY_TIME),
            )
            for metric, suffix in _METRICS
            for other, shown in _RIVALS
        ),
        *(
            Claim(
                f"clock-{key}-{other}",
                f"{label} beats {shown} on all test events, cut by time",
                _NO_FIGURES,
                Ahead(model, other, "ndcg_at_10", study=BY_TIME),
            )
            for key, model, label in _OURS
            for other, shown in _RIVALS
        ),
        *(
            Claim(
                f"clock-rank-{key}",
                f"The mid-emb {what}, cut by time",
                _NO_FIGURES,
                Ranked("mid_emb", "uauc", group, BY_TIME),
            )
            for key, what, group in (
                ("uauc", "raises UAUC", "all"),
                ("cold", "helps on cold-start items (UAUC)", "cold-start items"),
                (
                    "largest",
                    "helps cold-start items more than other items (UAUC)",
                    contrast_name("cold-start items", "other items"),
                ),
            )
        ),
    ),
)

_REVENUE = {
    "cold-start items": "revenue +8.77 %",
    "long-tail items": "revenue +4.63 %",
    "other items": "revenue about +.3 %",
    "cold-start users": "revenue +1.56 %",
    "long-tail users": "revenue +5.79 %",
    "other users": "revenue about +.3 %",
}
ONLINE = Section(
    "Online test of the ranking model, replayed offline on a proxy label",
    (
        Claim("rank-uauc", "The mid-emb raises UAUC", "UAUC .6885 -> .6969 online", Ranked("mid_emb", "uauc", "all")),
        Claim(
            "rank-wuauc", "The mid-emb raises WUAUC", "WUAUC .7002 -> .7078 online", Ranked("mid_emb", "wuauc", "all")
        ),
        *(
            Claim(
                f"rank-{group.replace(' ', '-')}",
                f"The mid-emb helps on {group} (UAUC in place of revenue)",
                f"{revenue} online",
                Ranked("mid_emb", "uauc", group),
            )
            for group, revenue in _REVENUE.items()
        ),
        *(
            Claim(
                f"rank-largest-{kind}",
                f"The mid-emb helps cold-start {kind} more than other {kind}",
                f"revenue {cold} against about +.3 % online",
                Ranked("mid_emb", "uauc", contrast_name(f"cold-start {kind}", f"other {kind}")),
            )
            for kind, cold in (("items", "+8.77 %"), ("users", "+1.56 %"))
        ),
        Claim(
            "revenue",
            "The mid-emb raises revenue",
            "20 % of traffic, 9 days",
            Untestable("Revenue needs live traffic; no public data set has it."),
        ),
    ),
)

SECTIONS = (INDUSTRIAL, AMAZON, MOVIELENS, COLD, ONLINE, CLOCK)
KEYS = tuple(claim.key for section in SECTIONS for claim in section.claims)
