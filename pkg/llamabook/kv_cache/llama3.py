"""From the notebook ch04_kv_cache_and_compile/01_the_kv_cache.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamabook.errors import InputError
from llamabook.kv_cache.cache import KVCache, LayerCache
from llamabook.llama2 import Llama2Model, head_dim_of, rope_tables
from llamabook.llama3 import GroupedQueryAttentionFast, Llama3ModelFast


class CachedAttention(GroupedQueryAttentionFast):
    """Attention that puts its new keys and values into a cache and attends to all that the cache holds.

    As `GroupedQueryAttentionFast`; in place of the mask it takes a `LayerCache`.
    """

    def attend(self, Q: Tensor, K: Tensor, V: Tensor, mask: LayerCache | Tensor | None) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V for Q (B, H, T, d), new K and V (B, G, T, d), to (B, H, T, d)."""
        if isinstance(mask, LayerCache):
            K, V = mask.add(K, V)  # two of (B, G, S, d)
            mask = mask.mask
            if mask is None and Q.shape[2] == 1:  # a single query sees all keys
                return F.scaled_dot_product_attention(Q, K, V, enable_gqa=True)
        return super().attend(Q, K, V, mask)  # by the mask; without one causal, for as many keys as queries


def check_cache(cache: KVCache, cfg: dict, idx: Tensor, dtype: torch.dtype) -> None:
    """Raise InputError, in one line, unless `cache` can take the keys of `idx` (B, T) from this model."""
    L, B, G, _, d = cache.keys.shape
    if (L, G, d) != (cfg["n_layers"], cfg["n_kv_groups"], head_dim_of(cfg)):
        raise InputError(
            f"a cache of {L} layers, {G} groups, head dimension {d} is another model's:"
            " make it with the new_cache of this one"
        )
    if B != idx.shape[0]:
        raise InputError(f"the cache is for {B} texts, the input has {idx.shape[0]}: make one for it")
    if (cache.keys.dtype, cache.keys.device) != (dtype, idx.device):
        have, need = f"{cache.keys.dtype} on {cache.keys.device}", f"{dtype} on {idx.device}"
        raise InputError(f"the cache is {have}, the model and its input {need}: use the model's new_cache")


class Llama3Model(Llama3ModelFast):
    """`llamabook.llama3.Llama3Model` that can read on from a cache; serves Llama 2's configurations too."""

    def __init__(self, cfg: dict, attention: type[nn.Module] = CachedAttention):
        super().__init__(cfg, attention)

    @classmethod
    def sharing(cls, model: Llama2Model) -> "Llama3Model":
        """A model with the weights of `model`, a Llama 2 or 3: shared, not copied."""
        with torch.device("meta"):
            cached = cls(model.cfg)
        cached.load_state_dict(model.state_dict(), assign=True)
        return cached.train(model.training)

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """An empty cache of the dtype and on the device of the weights."""
        weight = self.tok_emb.weight
        return KVCache(self.cfg, batch_size, max_tokens, weight.device, weight.dtype)

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), which follow those in `cache` and are in it afterwards."""
        return super().forward(idx) if cache is None else self.read_on(idx, cache)

    @torch.no_grad()
    def read_on(self, idx: Tensor, cache: KVCache) -> Tensor:
        """`forward` with a cache."""
        check_cache(cache, self.cfg, idx, self.tok_emb.weight.dtype)
        layers, end = cache.layers(idx.shape[1]), cache.length + idx.shape[1]
        positions = torch.arange(cache.length, end, device=idx.device)  # (T,)
        cos, sin = rope_tables(positions, self.frequencies(idx.device))  # two of (T, d)
        x = self.tok_emb(idx)  # (B, T, D)
        for block, layer in zip(self.trf_blocks, layers):
            x = block(x, layer, cos, sin)
        cache.length = end
        return self.out_head(self.final_norm(x))  # (B, T, V)
