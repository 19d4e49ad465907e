"""Builds tiny bundles with random weights, for tests of everything but quality.

All dimensions differ, so that a test fails if two of them are swapped. The encoder is decoder-only (Llama-shaped) on
purpose: the shipped bundle covers BERT's shape.

There are three bundles, so that a server can reload from one to another. `retrained` has the encoder of `bundle`, byte
for byte, and other towers, so content embeddings of one are valid for the other. `reencoded` also has another encoder,
and its user tower reads no actions.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaModel

from learn.content import ceg
from learn.data.actions import ActionThresholds
from learn.data.item_text import ItemText, render, template_source
from learn.models.cvr import CvrConfig, CvrHead
from learn.models.pch import Pch, PchConfig
from learn.serving.bundle import Bundle, write

VOCABULARY = 512
MAX_TOKENS = 48
SPECIAL = ("<pad>", "<s>")
SIZES = PchConfig(content_dim=32, adaptor_hidden=24, width=40, layers=2, heads=2, ffn=48, out_dim=16, max_history=8)
ACTION_SCALE = 10.0


@dataclass(frozen=True)
class Recipe:
    """Version and seeds of one fixture bundle."""

    version: str
    seed: int
    # Seed of the towers and the head; without it they continue the encoder's sequence of random numbers.
    towers_seed: int | None = None
    actions: tuple[str, ...] = ("click", "like", "dislike", "purchase")
    values: ActionThresholds | None = None

    def provenance(self) -> dict[str, str | int]:
        """Returns the manifest's provenance table."""
        seeds = {"seed": self.seed} | ({} if self.towers_seed is None else {"towers_seed": self.towers_seed})
        return {"data": "none: random weights, for tests only", **seeds}


FIRST = Recipe(version="1", seed=20240506)
# Folder name -> recipe of the bundle in it.
RECIPES = {
    "bundle": FIRST,
    "retrained": Recipe(version="2", seed=FIRST.seed, towers_seed=20240507, values=ActionThresholds(4.0, 2.0)),
    "reencoded": Recipe(version="3", seed=20240508, actions=()),
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
    """Trains a byte-level BPE tokenizer, which gives tokens for any text. Each text starts with <s>, as in Llama."""
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
    """Returns a model of two layers with grouped-query attention, RoPE and RMSNorm."""
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
    """Builds a fixture bundle in memory and writes its tokenizer to `tokenizer_path`."""
    torch.manual_seed(recipe.seed)
    byte_tokenizer().save(str(tokenizer_path))
    encoder = ceg.wrap("random", encoder_model(), tokenizer_path, MAX_TOKENS, SPECIAL.index("<pad>"))
    if recipe.towers_seed is not None:
        torch.manual_seed(recipe.towers_seed)
    pch = Pch(SIZES)
    head = CvrHead(CvrConfig(in_dim=16, fuse_dim=20, mid_dim=12))
    if recipe.actions:
        pch = _with_actions(pch, recipe.actions)
    return Bundle(
        name="fixture",
        version=recipe.version,
        encoder=encoder,
        pch=pch.eval(),
        head=head.eval(),
        golden_items=ITEMS,
        provenance=recipe.provenance(),
        keeps="all",
        values=recipe.values,
    )


def _with_actions(pch: Pch, actions: tuple[str, ...]) -> Pch:
    """Returns the same towers with random vectors for actions.

    They are drawn last, so the other weights of a seed do not depend on them, and scaled up, so that no rounding error
    looks like another action.
    """
    towers = Pch(replace(pch.config, actions=actions))
    towers.load_state_dict(pch.state_dict(), strict=False)
    with torch.no_grad():
        towers.actions.weight.mul_(ACTION_SCALE)
    return towers


# Texts that a template, a JSON reader or a tokenizer may handle wrongly, and several combinations of missing fields.
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
    """Returns the file that tests that Jinja2 here and minijinja in the server render the same bytes."""
    cases = [{"text": text.to_json(), "prompt": render(text)} for text in PROMPT_CASES]
    return json.dumps({"template": template_source(), "cases": cases}, ensure_ascii=True, indent=1) + "\n"


def write_fixtures(out: Path) -> None:
    """Writes each bundle to its own folder in `out`, and the golden prompts beside them (`python -m learn fixture`).

    Graphs and tokenizer are byte-identical across runs with the same package versions. The last digits of the golden
    vectors depend on the processor.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "item_text_golden.json").write_text(prompt_golden())
    with tempfile.TemporaryDirectory() as temporary:
        for name, recipe in RECIPES.items():
            write(build(Path(temporary) / "tokenizer.json", recipe), out / name)
