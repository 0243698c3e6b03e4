"""From the notebook ch04_kv_cache_and_compile/02_attention_and_the_static_cache.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llamabook.fast import kernels


def visible(input_pos: Tensor, n_slots: int) -> Tensor:
    """Where the queries at `input_pos` (B, T) may look: (B, 1, T, S), True for the slots 0 to their own."""
    slots = torch.arange(n_slots, device=input_pos.device)  # (S,)
    return slots <= input_pos[:, None, :, None]


def grouped_attention(q: Tensor, keys: Tensor, values: Tensor, input_pos: Tensor) -> Tensor:
    """`attend` for few queries, as two matrix products per group: no key is repeated, each is read once.

    The H / G query heads of a group stand below each other, as rows of one matrix. Softmax in float32.
    """
    T, d, G, S = q.shape[1], q.shape[3], keys.shape[1], keys.shape[2]
    rows = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, T, H, d) -> (B, G, H/G * T, d)
    scores = (rows @ keys.mT).float() / d**0.5  # (B, G, H/G * T, S)
    scores = scores.unflatten(2, (-1, T))  # (B, G, H/G, T, S)
    scores = scores.masked_fill(~visible(input_pos, S)[:, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1).to(values.dtype).flatten(2, 3)
    context = (weights @ values).unflatten(2, (-1, T))  # (B, G, H/G, T, d)
    return context.permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, T, H, d)


FEW = 8  # new tokens a row: up to here reading the cache takes the time, beyond it the products do


def attend(q: Tensor, keys: Tensor, values: Tensor, input_pos: Tensor) -> Tensor:
    """softmax(q K^T / sqrt(d)) V, where the query at position p of a row sees the slots 0 to p of its row.

    Query head h reads group h // (H / G). What a slot beyond p holds must be finite and does not matter.
    Shape: q (B, T, H, d), keys and values (B, G, S, d), input_pos (B, T), integers below S, to (B, T, H, d).
    """
    if q.shape[1] <= FEW:
        few = kernels.decode_attention if q.device.type == "cpu" else grouped_attention
        return few(q, keys, values, input_pos)
    mask = visible(input_pos, keys.shape[2])
    q = q.transpose(1, 2)  # (B, T, H, d) -> (B, H, T, d)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True).transpose(1, 2)
