"""Helpers that several tests share. Tests generate all their data: none downloads anything or needs a data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learn.models.pch import Pch, PchConfig

# Their fixtures are for any test.
pytest_plugins = ["int8_bundle", "study_inputs"]

MODELS = Path(__file__).parents[1]
FIXTURES = MODELS.parent / "tests" / "fixtures"
FIXTURE = FIXTURES / "bundle"
DEFAULT = MODELS / "default"
# Of format 1, written by `bundle.write` of commit c6fdc2b, the last that wrote this format.
OLD_BUNDLE = Path(__file__).parent / "serving" / "data" / "format_1"


@pytest.fixture(autouse=True)
def _fixed_seed_and_one_thread():
    torch.manual_seed(0)
    # The models here are so small that a second thread costs more than it gains.
    torch.set_num_threads(1)


def small_pch(**changes) -> Pch:
    sizes = {"content_dim": 12, "adaptor_hidden": 10, "width": 16, "layers": 3, "heads": 2, "ffn": 20, "out_dim": 6}
    pch = Pch(PchConfig(**(sizes | {"max_history": 9, "dropout": 0.0} | changes)))
    # Norm weights start at 1 and biases at 0; with these values, an error in how they are applied would not show.
    with torch.no_grad():
        for parameter in pch.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if pch.actions is not None:
            pch.actions.weight[0] = 0.0  # As in training, which never moves the vector of an unknown action.
        if pch.skip is not None:
            pch.skip.weight.fill_(0.4)
    return pch.eval()


def write_movielens(
    folder: Path, ratings: list[tuple[int, int, float, int]], movies: list[tuple[int, str, str]]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in ratings)]
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    quoted = (f'{movie_id},"{title}",{genres}' for movie_id, title, genres in movies)
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *quoted]) + "\n")
    return folder
