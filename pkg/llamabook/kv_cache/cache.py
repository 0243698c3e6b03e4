"""From the notebook ch04_kv_cache_and_compile/01_the_kv_cache.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llamabook.errors import ContextError, InputError
from llamabook.llama2 import head_dim_of


def mask_after(start: int, T: int, device: torch.device | str | None = None) -> Tensor | None:
    """Who may look where when T tokens follow `start` others: (T, start + T), True at slots 0 to start + t.

    None where no matrix is needed: a single token sees all, and T tokens after none are "causal".
    """
    if T == 1 or start == 0:
        return None
    return torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)


@dataclass
class LayerCache:
    """One layer's part of a `KVCache` in one forward; it stands where an uncached model has its mask.

    keys, values: (B, G, max_tokens, d), the cache's own memory; start: the slot of the first new token;
    mask: what `mask_after` says.
    """

    keys: Tensor
    values: Tensor
    start: int
    mask: Tensor | None

    def add(self, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, G, T, d); return those of all tokens so far, (B, G, S, d)."""
        end = self.start + K.shape[2]
        self.keys[:, :, self.start : end] = K
        self.values[:, :, self.start : end] = V
        return self.keys[:, :, :end], self.values[:, :, :end]


def check_cache_size(cfg: dict, batch_size: int, max_tokens: int) -> None:
    """Raise InputError or ContextError where no cache of this size can be of use."""
    if batch_size < 1 or max_tokens < 1:
        raise InputError(f"a cache for {batch_size} texts of {max_tokens} tokens: give numbers from 1 up")
    if max_tokens > cfg["context_length"]:
        limit = cfg["context_length"]
        raise ContextError(f"a cache of {max_tokens} tokens, but the context length is {limit}: ask for less")


class KVCache:
    """The keys and values of the tokens that a model has read, allocated once. It knows how many they are.

    Args: cfg, the model's; batch_size B, texts of equal length; max_tokens, the most that each may have;
    device; dtype, None for the configuration's. One model can serve any number of caches.
    keys, values: (L, B, G, max_tokens, d), filled up to slot `length` - 1.
    Raises ContextError if max_tokens exceeds the context length, InputError for sizes below 1.
    """

    def __init__(
        self, cfg: dict, batch_size: int, max_tokens: int,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):
        check_cache_size(cfg, batch_size, max_tokens)
        self.length, self.batch_size, self.max_tokens = 0, batch_size, max_tokens
        shape = (cfg["n_layers"], batch_size, cfg["n_kv_groups"], max_tokens, head_dim_of(cfg))
        self.keys = torch.zeros(shape, device=device, dtype=dtype or cfg["dtype"])
        self.values = torch.zeros_like(self.keys)

    @property
    def bytes(self) -> int:
        """What keys and values take in memory, filled or not."""
        return self.keys.nbytes + self.values.nbytes

    def layers(self, T: int) -> list[LayerCache]:
        """For each layer, where T new tokens go. Raises ContextError, nothing written, if they don't fit."""
        if self.length + T > self.max_tokens:
            what = f"{T} more after {self.length} tokens, but the cache holds {self.max_tokens}"
            raise ContextError(f"{what}: make a longer one, or truncate it")
        mask = mask_after(self.length, T, self.keys.device)
        return [LayerCache(K, V, self.length, mask) for K, V in zip(self.keys, self.values)]

    def truncate(self, n: int) -> None:
        """Keep the first n tokens and forget the others. Raises InputError unless n is from 0 to `length`."""
        if not 0 <= n <= self.length:
            raise InputError(f"truncate to {n}: the cache has {self.length} tokens, give 0 to {self.length}")
        self.length = n
