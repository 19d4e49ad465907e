"""The arms of a ranking study: one ranking model with different extra features."""

from __future__ import annotations

# The arm without extra features, which all others are compared with.
CONTROL = "base"
# Arm -> the blocks of extra features that it gets. `mid_emb+cvr` is what `learn features` computes by default.
ARMS = {
    CONTROL: (),
    "mid_emb": ("mid_emb",),
    "mid_emb+cvr": ("mid_emb", "cvr"),
    "mid_emb+user+item": ("mid_emb", "user", "item"),
    "categories": ("categories",),
    "categories+mid_emb": ("categories", "mid_emb"),
}
