"""From the notebook ch04_kv_cache_and_compile/02_attention_and_the_static_cache.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor, nn

from llamabook.fast import kernels


class Linear(nn.Module):
    """x W^T without a bias, for inference: the part of the engine that another class may take the place of.

    Such a class is built as this one, from the widths K and N and a dtype; `set_weight` gives it its matrix.
    Shape: (..., K) to (..., N).
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)

    def set_weight(self, weight: Tensor) -> None:
        """Take the matrix (N, K), here as it is, not copied. Another class may pack it, or take a part."""
        kept = isinstance(weight, nn.Parameter)  # a tied head stays the embedding's very parameter
        self.weight = weight if kept else nn.Parameter(weight, requires_grad=False)

    def for_layer(self) -> list[Tensor]:
        """What `kernels.layers` reads of it; nothing from a class that computes otherwise."""
        return [self.weight] if type(self) is Linear else []

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)
