"""The frozen encoder as one module: token ids -> content embeddings, with the ports that the bundle format names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EncoderGraph(nn.Module):
    """input_ids [b,s], attention_mask [b,s] -> content [b,C]: the masked mean of the last hidden states, with length 1.

    `model` is any Hugging Face base model, encoder-only or decoder-only. Mean and norm are always in fp32.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Otherwise a decoder would return its key-value cache, which cannot be an output of the exported graph.
        self.extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Content embeddings [b,C] of token ids [b,s]; padding, where the mask is 0, does not change them."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.extra).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(torch.float32)  # [b,s,1]
        mean = (hidden.to(torch.float32) * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        return F.normalize(mean, dim=-1)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts all weights to `dtype`, in place; fp16 -> fp32 -> fp16 restores the original values.

    Buffers are not cast, as when a checkpoint is loaded in `dtype`: rotary frequencies must stay fp32, because in fp16
    the angle of a token at position 100 would already be wrong.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
