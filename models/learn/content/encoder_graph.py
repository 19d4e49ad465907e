"""The frozen encoder as one module: token ids -> content embeddings, as the bundle format names its ports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EncoderGraph(nn.Module):
    """input_ids [b,s], attention_mask [b,s] -> content [b,C]: the masked mean of the last hidden states, length 1.

    Takes any Hugging Face base model, encoder or decoder-only. Mean and norm are in fp32 whatever the weights are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A decoder would otherwise return its key-value cache, which is no tensor and has no place in the graph.
        self.extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Shapes as above."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **self.extra).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(torch.float32)  # [b,s,1]
        mean = (hidden.to(torch.float32) * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        return F.normalize(mean, dim=-1)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Puts all weights into `dtype`, in place; fp16 -> fp32 -> fp16 gives back what was there.

    Buffers stay as they are, as in a checkpoint that was loaded in `dtype`: rotary frequencies are fp32 whatever the
    weights are, and in fp16 a token at position 100 would be turned by a wrong angle.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
