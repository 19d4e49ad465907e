"""Prompts, and the golden file from which the server's renderer is tested to give the same bytes."""

from __future__ import annotations

import json

import pytest
from conftest import FIXTURE

from learn.data.item_text import ItemText, render, template_source
from learn.serving.fixture_bundles import PROMPT_CASES, prompt_golden

GOLDEN = FIXTURE.parent / "item_text_golden.json"


def test_the_golden_file_is_what_jinja_renders_now():
    assert GOLDEN.read_text() == prompt_golden()


def test_every_golden_case_renders_to_its_prompt():
    golden = json.loads(GOLDEN.read_text())
    assert golden["template"] == template_source()
    for case in golden["cases"]:
        assert set(case["text"]) == {"title", "category", "brand", "price", "keywords", "attributes"}
        assert render(ItemText.from_json(case["text"]), golden["template"]) == case["prompt"]


def test_the_prompt_matches_the_example_of_the_paper():
    text = ItemText(
        title="Envy Versatile Five-Petal Flower Earrings 357",
        category="Earrings",
        brand="Envy",
        price="9.9 yuan",
        keywords=("Earrings", "Five-Petal Flower Earrings"),
        attributes=("Returns for Damaged Packages",),
    )
    assert render(text) == (
        "The item information is given as follows. "
        'Item title is "Envy Versatile Five-Petal Flower Earrings 357". '
        'This item belongs to "Earrings" and brand is "Envy". The price is "9.9 yuan". '
        'The keywords of item are "Earrings, Five-Petal Flower Earrings". '
        'This item supports "Returns for Damaged Packages".'
    )


def test_template_syntax_in_a_title_is_not_evaluated():
    assert '"{{ 7 * 7 }}"' in render(ItemText(title="{{ 7 * 7 }}"))


@pytest.mark.parametrize("text", PROMPT_CASES)
def test_an_empty_text_renders_to_the_opening_sentence_alone(text):
    assert text.is_empty == (render(text) == "The item information is given as follows.")
    assert render(text).strip() == render(text)
