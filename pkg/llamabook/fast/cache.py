"""From the notebook ch04_kv_cache_and_compile/02_attention_and_the_static_cache.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import copy

import torch
from torch import Tensor

from llamabook.errors import ContextError
from llamabook.llama2 import head_dim_of


def write(cache: Tensor, new: Tensor, input_pos: Tensor) -> None:
    """Put the keys (or values) of new tokens, (B, T, G, d), into their rows' slots of a layer's (B, G, S, d).

    input_pos (B, T) names the slots. Nothing is copied but what is new.
    """
    rows = torch.arange(len(new), device=new.device)[:, None]  # (B, 1)
    cache[rows, :, input_pos] = new.to(cache.dtype)  # the indexed part is (B, T, G, d)


class StaticCache:
    """Keys and values of all layers for B rows of S slots, allocated once; slot s of a row is its position s.

    It has no position of its own: each call of the model says where its tokens stand.
    Args: cfg; batch_size B; max_tokens S, or ContextError if the context is shorter; dtype, None for cfg's.
    keys, values: lists of L tensors (B, G, S, d).
    """

    def __init__(
        self, cfg: dict, batch_size: int, max_tokens: int,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        limit = cfg["context_length"]
        if not 1 <= max_tokens <= limit:
            raise ContextError(f"a cache of {max_tokens} tokens: give 1 to {limit}, the context length")
        shape = (batch_size, cfg["n_kv_groups"], max_tokens, head_dim_of(cfg))
        kind = {"device": device, "dtype": dtype or cfg["dtype"]}
        self.keys = [torch.zeros(shape, **kind) for _ in range(cfg["n_layers"])]  # zeros: 0 * NaN is NaN
        self.values = [torch.zeros(shape, **kind) for _ in range(cfg["n_layers"])]

    @property
    def max_tokens(self) -> int:
        return self.keys[0].shape[2]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def first(self, n: int) -> "StaticCache":
        """The first n slots of each row, a cache on the same memory: nobody need read what is empty."""
        part = copy.copy(self)
        part.keys = [keys[:, :, :n] for keys in self.keys]
        part.values = [values[:, :, :n] for values in self.values]
        return part
