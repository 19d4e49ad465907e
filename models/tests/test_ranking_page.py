"""The commands of docs/ranking.md, run as they stand: from a log in CSV to two trained ranking models."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import duckdb
import lightgbm
import numpy as np
import pytest
import torch
from conftest import FIXTURE, MODELS

PAGE = MODELS.parent / "docs" / "ranking.md"
SECTION = "Train your ranking model with it"
N_USERS, N_ITEMS, N_VIEWS, DAYS = 80, 40, 30, 60
DAY = 86_400


def blocks_of(page: str, section: str, language: str) -> list[str]:
    """Returns the fenced blocks of a language under a heading of the second level, in order."""
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def home(tmp_path):
    """A home folder with the two files of a shop, and a checkout whose shipped bundle is the tiny one of the tests."""
    shop, models = tmp_path / "shop", tmp_path / "checkout" / "models"
    shop.mkdir()
    models.mkdir(parents=True)
    for name, target in (("learn", MODELS / "learn"), (".venv", sys.prefix), ("default", FIXTURE)):
        (models / name).symlink_to(target)
    rng = np.random.default_rng(1)
    with (shop / "items.jsonl").open("w") as file:
        for number in range(N_ITEMS):
            item = {"id": f"{number:03}", "title": f"Thing {number}", "category": "ab"[number % 2]}
            file.write(json.dumps(item) + "\n")
    events = []
    for user in range(N_USERS):
        for item, day in zip(rng.integers(0, N_ITEMS, N_VIEWS), rng.integers(0, DAYS, N_VIEWS), strict=True):
            viewed = 1_700_000_000 + int(day) * DAY + int(rng.integers(0, 80_000))
            events.append((f"u{user}", f"{item:03}", viewed, "view"))
            if rng.random() < (0.7 if item % 2 == user % 2 else 0.2):
                events.append((f"u{user}", f"{item:03}", viewed + int(rng.integers(0, 3000)), "like"))
    rng.shuffle(events)
    with (shop / "interactions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "timestamp", "action"), *events])
    return tmp_path


def test_the_page_leads_from_a_log_to_trained_ranking_models(home):
    blocks = blocks_of(PAGE.read_text(), SECTION, "sh")
    assert len(blocks) == 5
    environment = {**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    # One shell, as for a reader who pastes the blocks one after the other.
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=home / "checkout", env=environment, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figure = r"-?\d\.\d{4}"
    for name in ("without", "with"):
        assert re.search(rf"^{name} +AUC {figure}  UAUC {figure}  WUAUC {figure}$", result.stdout, re.MULTILINE)
    gain = r"^gain in UAUC [+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\] over \d+ users"
    assert re.search(gain, result.stdout, re.MULTILINE)
    assert "validation loss 0." in result.stdout
    _check_table(home / "shop")
    _check_models(home / "shop")


def _check_table(shop):
    """Labels and counts are recounted in plain Python from the log, for some of the rows."""
    with (shop / "interactions.csv").open() as file:
        log = [(row["user"], row["item"], int(row["timestamp"]), row["action"]) for row in csv.DictReader(file)]
    table = duckdb.sql(f"FROM '{shop}/training.parquet' ORDER BY timestamp, sample").to_arrow_table().to_pylist()
    last = max(event[2] for event in log)
    views = [event for event in log if event[3] == "view"]
    assert len(table) == sum(event[2] + DAY <= last for event in views)
    parts = [row["part"] for row in table]
    names = ["train", "validation", "test"]
    assert parts == sorted(parts, key=names.index) and set(parts) == set(names)

    def is_liked(user, item, when):
        return any(event[:2] == (user, item) and event[3] == "like" and when <= event[2] <= when + DAY for event in log)

    for row in table[:: len(table) // 30]:
        assert row["label"] == is_liked(row["user"], row["item"], row["timestamp"])
        before = row["timestamp"] - DAY
        for key, column in (("user", 0), ("item", 1)):
            known = [event for event in views if event[column] == row[key] and event[2] < before]
            assert row[f"{key}_views"] == len(known)
            assert row[f"{key}_liked"] == sum(is_liked(*event[:3]) for event in known)


def _check_models(shop):
    table = duckdb.sql(f"FROM '{shop}/training.parquet' LIMIT 1").to_arrow_table()
    width = len(table["mid_emb"][0].as_py())
    without, both = (lightgbm.Booster(model_file=shop / f"ranker-{name}.txt") for name in ("without", "with"))
    assert (without.num_feature(), both.num_feature()) == (4, 4 + width + 1)
    saved = torch.load(shop / "ranker.pt", weights_only=True)
    assert saved["weights"]["0.weight"].shape == (32, 4 + width) and saved["mean"].shape == (4 + width,)
    # The new inputs began at 0, and are used by now.
    assert saved["weights"]["0.weight"][:, 4:].abs().max() > 0


def test_blocks_of_other_sections_and_languages_are_not_commands():
    page = "# T\n\n## A\n```sh\none\n```\n```toml\nx = 1\n```\n### B\n```sh\ntwo\n```\n## C\n```sh\nthree\n```\n"
    assert blocks_of(page, "A", "sh") == ["one\n", "two\n"]


def test_the_table_of_served_features_gets_the_columns_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "('b', 'u', '07', TIMESTAMPTZ '2026-01-02 00:00:00+00', 1, [0.5::FLOAT], 0.1::FLOAT, true), "
    rows += "('a', 'u', '08', TIMESTAMPTZ '2026-01-01 00:00:00+00', 0, [0.5::FLOAT], 0.1::FLOAT, false)"
    names = "request_id, user_id, item_id, time, position, mid_emb, cvr, clicked"
    duckdb.sql(f"COPY (FROM (VALUES {rows}) AS served({names})) TO 'training.parquet'")
    (query,) = blocks_of(PAGE.read_text(), SECTION, "sql")
    found = duckdb.sql(f"FROM ({query}) ORDER BY sample").to_arrow_table().to_pylist()
    kept = [(row["sample"], row["user"], row["item"], row["label"]) for row in found]
    assert kept == [(1, "u", "08", 0), (2, "u", "07", 1)]
    assert [row["timestamp"] for row in found] == [1_767_225_600, 1_767_312_000]
