"""Tiny bundles of random weights, for tests of everything but quality.

Every dimension is another number, so that two of them in each other's place fail a test. The encoder is decoder-only
(Llama-shaped) on purpose: the shipped bundle covers BERT's shape.

There are three, so that a server has something to reload to. `retrained` has the encoder of `bundle`, byte for byte,
and other towers: content that was computed for the one holds for the other. `reencoded` has another encoder as well.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaModel

from learn.content import ceg
from learn.data.item_text import ItemText, render, template_source
from learn.models.cvr import CvrConfig, CvrHead
from learn.models.pch import Pch, PchConfig
from learn.serving.bundle import Bundle, write

VOCABULARY = 512
MAX_TOKENS = 48
SPECIAL = ("<pad>", "<s>")


@dataclass(frozen=True)
class Recipe:
    """What sets one fixture bundle apart from the others."""

    version: str
    seed: int
    # Where the random numbers of towers and head begin; without it they go on where the encoder's ended.
    towers_seed: int | None = None

    def provenance(self) -> dict[str, str | int]:
        """What the manifest says of where the weights came from."""
        seeds = {"seed": self.seed} | ({} if self.towers_seed is None else {"towers_seed": self.towers_seed})
        return {"data": "none: random weights, for tests only", **seeds}


FIRST = Recipe(version="1", seed=20240506)
# Folder -> what lies in it.
RECIPES = {
    "bundle": FIRST,
    "retrained": Recipe(version="2", seed=FIRST.seed, towers_seed=20240507),
    "reencoded": Recipe(version="3", seed=20240508),
}

ITEMS = (
    ItemText("Brass Desk Lamp", "Lighting", "Lumo", "39 euro", ("lamp", "brass", "desk"), ("Free returns",)),
    ItemText(title="Walnut Chess Set"),
    ItemText(title="Green Tea", category="Drinks"),
    ItemText(title="Rain Jacket", brand="Northwind"),
    ItemText(title='The "Quiet" Kettle', price="25 euro"),
    ItemText(title="Café crème — naïve 咖啡 ☕", category="Напитки"),
    ItemText(title="Long Story", keywords=tuple(f"chapter {n} of the long story" for n in range(1, 40))),
    ItemText(category="Gifts", attributes=("Gift wrap", "Next-day delivery")),
    ItemText(keywords=("travel", "mug")),
)

SENTENCES = tuple(render(text) for text in ITEMS) + (
    "A lamp for the desk and a lamp for the shelf, each with a warm light.",
    "The jacket keeps the rain out and lets the walker breathe.",
    "Tea, coffee and water: the kettle boils each of them in two minutes.",
    "Delivery is free and returns are free within thirty days.",
)


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE: every text has tokens, whatever is in it. Opens each text with <s>, as Llama does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def encoder_model() -> LlamaModel:
    """Two layers with grouped-query attention, RoPE and RMSNorm."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=SPECIAL.index("<pad>"),
            bos_token_id=SPECIAL.index("<s>"),
            eos_token_id=None,
            initializer_range=0.2,
        )
    )


def build(tokenizer_path: Path, recipe: Recipe = FIRST) -> Bundle:
    """A fixture in memory; writes its tokenizer to `tokenizer_path`."""
    torch.manual_seed(recipe.seed)
    byte_tokenizer().save(str(tokenizer_path))
    encoder = ceg.wrap("random", encoder_model(), tokenizer_path, MAX_TOKENS, SPECIAL.index("<pad>"))
    if recipe.towers_seed is not None:
        torch.manual_seed(recipe.towers_seed)
    pch = Pch(
        PchConfig(content_dim=32, adaptor_hidden=24, width=40, layers=2, heads=2, ffn=48, out_dim=16, max_history=8)
    )
    head = CvrHead(CvrConfig(in_dim=16, fuse_dim=20, mid_dim=12))
    return Bundle(
        name="fixture",
        version=recipe.version,
        encoder=encoder,
        pch=pch.eval(),
        head=head.eval(),
        golden_items=ITEMS,
        provenance=recipe.provenance(),
    )


# Text that a template, a JSON reader or a tokenizer may trip over, and each way in which fields can be missing.
PROMPT_CASES = (
    ItemText("Envy Clip", "Earrings", "Envy", "9.9 yuan", ("earrings", "clip"), ("Returns for damage",)),
    ItemText(title="Only a Title"),
    ItemText(category="Only a Category"),
    ItemText(brand="Only a Brand"),
    ItemText(price="0"),
    ItemText(keywords=("one",)),
    ItemText(attributes=("first", "second", "third")),
    ItemText(title="Lamp", category="Lighting"),
    ItemText(title="Lamp", brand="Lumo"),
    ItemText(category="Lighting", brand="Lumo", attributes=("Gift wrap",)),
    ItemText(title="Lamp", price="1,000.00 €", keywords=("a, b", "c")),
    ItemText(title='The "Quoted" One', category='"'),
    ItemText(title="Rocket 🚀 and family 👨‍👩‍👧‍👦", keywords=("🇩🇪",)),
    ItemText(title="ספר טוב", category="كتب", brand="mixed עברית text"),
    ItemText(title="before\u0000after"),
    ItemText(title="first line\nsecond line\r\nthird\tcell"),
    ItemText(title="{{ braces }} {% raw %} {# note #}", category="{{ title }}"),
    ItemText(title="<b>Salt & Pepper</b>", brand="A&B's", attributes=("<&>",)),
    ItemText(title="Lists", keywords=("", "kept", ""), attributes=("", "")),
    ItemText(title="e\u0301 is not \u00e9", keywords=("\ufb01", "\u200bzero width")),
    ItemText(title="  spaces  ", category=" ", price="\u00a0"),
    ItemText(title="backslash \\ and \\n", brand="\u2028\u2029"),
    ItemText(title="0", category="false", brand="none", keywords=("0",)),
    ItemText(),
)


def prompt_golden() -> str:
    """The file that holds Jinja2 here and minijinja in the server to the same bytes."""
    cases = [{"text": text.to_json(), "prompt": render(text)} for text in PROMPT_CASES]
    return json.dumps({"template": template_source(), "cases": cases}, ensure_ascii=True, indent=1) + "\n"


def write_fixtures(out: Path) -> None:
    """`python -m learn fixture`: every bundle in a folder of its own in `out`, the golden prompts beside them.

    Graphs and tokenizer are the same bytes on every run of the same versions. The last digits of the golden vectors are
    the processor's.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "item_text_golden.json").write_text(prompt_golden())
    with tempfile.TemporaryDirectory() as temporary:
        for name, recipe in RECIPES.items():
            write(build(Path(temporary) / "tokenizer.json", recipe), out / name)
