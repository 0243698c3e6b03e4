"""From the notebook ch04_kv_cache_and_compile/02_attention_and_the_static_cache.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from llamabook.fast import kernels
from llamabook.fast.attention import attend
from llamabook.fast.cache import StaticCache, write
from llamabook.fast.linear import Linear
from llamabook.llama2 import Llama2Model, RMSNorm, TransformerBlock, apply_rope, head_dim_of, rope_tables
from llamabook.llama3 import Llama3Model


class Attention(nn.Module):
    """Attention of the new tokens over a layer's cache; one product gives queries, keys and values.

    Shape: x (B, T, D), cos and sin (B, T, 1, d), input_pos (B, T), keys, values (B, G, S, d), to (B, T, D).
    """

    def __init__(self, cfg: dict, linear: type[nn.Module] = Linear):
        super().__init__()
        self.d, H, G = head_dim_of(cfg), cfg["n_heads"], cfg["n_kv_groups"]
        self.parts = [H, G, G]  # heads of wqkv's output: queries, keys, values
        self.wqkv = linear(cfg["emb_dim"], sum(self.parts) * self.d, dtype=cfg["dtype"])
        self.wo = linear(H * self.d, cfg["emb_dim"], dtype=cfg["dtype"])

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        heads = self.wqkv(x).unflatten(-1, (-1, self.d))  # (B, T, H + 2 G, d)
        q, k, v = heads.split(self.parts, dim=2)  # (B, T, H, d) and two of (B, T, G, d)
        write(keys, apply_rope(k, cos, sin), input_pos)
        write(values, v, input_pos)
        context = attend(apply_rope(q, cos, sin), keys, values, input_pos)  # (B, T, H, d)
        return self.wo(context.flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU, w2(SiLU(w1 x) * w3 x), with w1 and w3 as one product. Shape: (..., D) to (..., D)."""

    def __init__(self, cfg: dict, linear: type[nn.Module] = Linear):
        super().__init__()
        self.w13 = linear(cfg["emb_dim"], 2 * cfg["hidden_dim"], dtype=cfg["dtype"])
        self.w2 = linear(cfg["hidden_dim"], cfg["emb_dim"], dtype=cfg["dtype"])

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x).chunk(2, dim=-1)  # two of (..., F)
        return self.w2(F.silu(gate) * value)


class OneCall:
    """What a layer says of itself to `kernels.layers`, which computes many of them in one call."""

    def linears(self) -> list[nn.Module]:
        return [self.attention.wqkv, self.attention.wo, self.feed_forward.w13, self.feed_forward.w2]

    def for_layers(self, x: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
        """What `kernels.layers` reads of this layer, in one list; nothing where it can't compute it."""
        matrices = [getattr(linear, "for_layer", list)() for linear in self.linears()]
        if self._forward_hooks or not kernels.takes_layer(x, keys, values, matrices, self.hidden):
            return []
        wqkv, wo, w13, w2 = matrices
        return [self.norm1.weight, *wqkv, *wo, self.norm2.weight, *w13, *w2]

    def settings(self) -> tuple[int, int, float, bool]:
        """Heads, hidden numbers, the norms' epsilon, and whether x must not be rounded."""
        exact = any(getattr(linear, "exact", False) for linear in self.linears())
        return self.heads, self.hidden, self.norm1.eps, exact


class Block(OneCall, nn.Module):
    """One layer: attention, then feed-forward, each on a normalized copy; it does not know which layer it is.

    Shape: as `Attention`.
    """

    def __init__(self, cfg: dict, linear: type[nn.Module] = Linear):
        super().__init__()
        eps = cfg.get("norm_eps", 1e-5)
        self.norm1 = RMSNorm(cfg["emb_dim"], eps, cfg["dtype"])
        self.attention = Attention(cfg, linear)
        self.norm2 = RMSNorm(cfg["emb_dim"], eps, cfg["dtype"])
        self.feed_forward = FeedForward(cfg, linear)
        self.heads, self.hidden = cfg["n_heads"], cfg["hidden_dim"]

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        if weights := self.for_layers(x, keys, values):
            return kernels.layers(x, cos, sin, input_pos, [keys], [values], weights, *self.settings())
        x = x + self.attention(self.norm1(x), cos, sin, input_pos, keys, values)
        return x + self.feed_forward(self.norm2(x))


def in_one_call(model: nn.Module, x: Tensor, cache: StaticCache) -> list[Tensor]:
    """What `kernels.layers` reads of all layers, where it computes them all; else nothing.

    To look at each layer takes longer than to compute it, so the cache keeps the answer for this model.
    """
    compiled = getattr(model, "compiled_as", "refused") != "refused"  # then block by block, as asked
    if compiled or torch.compiler.is_compiling() or not 0 < x.shape[0] * x.shape[1] <= kernels.MAX_ROWS:
        return []
    owner, weights = getattr(cache, "plan", (None, []))
    if owner is not model:
        parts = [block.for_layers(x, *slots) for block, *slots in zip(model.blocks, cache.keys, cache.values)]
        alike = len({block.settings() for block in model.blocks}) == 1
        weights = sum(parts, []) if alike and all(parts) else []
        cache.plan = model, weights
    return weights


def through(
    model: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, cache: StaticCache
) -> Tensor:
    """x (B, T, D) through all of the model's blocks, in one call where that can be; shapes as of `Block`."""
    if weights := in_one_call(model, x, cache):
        settings = model.blocks[0].settings()
        return kernels.layers(x, cos, sin, input_pos, cache.keys, cache.values, weights, *settings)
    for block, keys, values in zip(model.blocks, cache.keys, cache.values):
        x = block(x, cos, sin, input_pos, keys, values)
    return x


class Transformer(nn.Module):
    """Every Llama, 2 to 3.3, for inference on a `StaticCache`; `from_llama` gives it its weights.

    Args: cfg; linear, the class of its matrices.
    Shape: idx (B, T), input_pos (B, T), the position of each token in its row, to logits (B, T, V), or with
    last (B,), the place in T of the one token whose logits are wanted, to (B, V).
    """

    frequencies = Llama3Model.frequencies  # of cfg alone, as there

    def __init__(self, cfg: dict, linear: type[nn.Module] = Linear):
        super().__init__()
        self.cfg, V, D, dtype = dict(cfg), cfg["vocab_size"], cfg["emb_dim"], cfg["dtype"]
        self.register_buffer("theta", self.frequencies("cpu"), persistent=False)  # (d / 2,)
        self.embedding = nn.Embedding.from_pretrained(torch.empty(V, D, dtype=dtype))
        self.blocks = nn.ModuleList(Block(cfg, linear) for _ in range(cfg["n_layers"]))
        self.norm = RMSNorm(D, cfg.get("norm_eps", 1e-5), dtype)
        self.head = linear(D, V, dtype=dtype)
        if cfg.get("tie_embeddings", False):
            self.head.set_weight(self.embedding.weight)
        self.requires_grad_(False)

    def hidden(self, idx: Tensor, input_pos: Tensor, cache: StaticCache) -> Tensor:
        """The last block's output (B, T, D), with the keys and values of the new tokens now in the cache."""
        cos, sin = (table.unsqueeze(2) for table in rope_tables(input_pos, self.theta))  # (B, T, 1, d)
        return through(self, self.embedding(idx), cos, sin, input_pos, cache)

    def forward(self, idx: Tensor, input_pos: Tensor, cache: StaticCache, last: Tensor | None = None):
        x = self.hidden(idx, input_pos, cache)
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last]  # (B, D)
        return self.head(self.norm(x))


def gathered(parts: list[nn.Parameter], to: dict) -> Tensor:
    """The rows of all `parts` as one matrix, at to["device"] in to["dtype"]; a lone one may stay as it is."""
    rows, like = [part.detach() for part in parts], parts[0].detach()[:0].to(**to)
    if len(rows) == 1 and (like.dtype, like.device) == (rows[0].dtype, rows[0].device):
        return rows[0]
    whole = kernels.large_pages(like.new_empty(sum(map(len, rows)), *like.shape[1:]))
    for part, place in zip(rows, whole.split([len(part) for part in rows])):
        place.copy_(part)
    return whole


def give(linear: nn.Module, parts: list[nn.Parameter], to: dict) -> None:
    """Give `linear` the rows of all `parts` as one matrix.

    Where it keeps that matrix as it is, the parts become views of it. So the model that they come from still
    works, and no weight is in memory twice.
    """
    whole = gathered(parts, to)
    linear.set_weight(whole)
    if type(linear) is Linear and (whole.dtype, whole.device) == (parts[0].dtype, parts[0].device):
        for part, view in zip(parts, whole.split([len(part) for part in parts])):
            part.data = view


def fixed(weight: Tensor, to: dict) -> nn.Parameter:
    """A weight for inference at to["device"] in to["dtype"]; not copied where it is there already."""
    return nn.Parameter(gathered([weight], to), requires_grad=False)


def fill_block(new: Block, old: TransformerBlock, to: dict) -> None:
    """Give one layer of the engine the weights of one of a Llama2Model or Llama3Model."""
    give(new.attention.wqkv, [old.att.W_query.weight, old.att.W_key.weight, old.att.W_value.weight], to)
    give(new.attention.wo, [old.att.out_proj.weight], to)
    give(new.feed_forward.w13, [old.ff.fc1.weight, old.ff.fc2.weight], to)
    give(new.feed_forward.w2, [old.ff.fc3.weight], to)
    new.norm1.weight, new.norm2.weight = fixed(old.norm1.weight, to), fixed(old.norm2.weight, to)


def from_llama(
    source: Llama2Model, linear: type[nn.Module] = Linear,
    device: torch.device | str | None = None, dtype: torch.dtype | None = None,
) -> Transformer:  # fmt: skip
    """The `Transformer` with the weights of a Llama2Model or Llama3Model, filled layer by layer.

    What needs no conversion is shared with `source`, not copied: `source` still works, on the same memory.
    Args: linear, the class of the matrices; device and dtype, None for the source's own.
    """
    table, tied = source.tok_emb.weight, source.out_head.weight is source.tok_emb.weight
    to = {"device": device or table.device, "dtype": dtype or table.dtype}
    with torch.device("meta"):  # shapes without memory
        new = Transformer({**source.cfg, "dtype": to["dtype"], "tie_embeddings": tied}, linear)
    new.theta = new.theta.to(to["device"])
    new.embedding.weight, new.norm.weight = fixed(table, to), fixed(source.final_norm.weight, to)
    for block, old in tqdm(list(zip(new.blocks, source.trf_blocks)), leave=False, disable=None):
        fill_block(block, old, to)
    new.head.set_weight(new.embedding.weight if tied else fixed(source.out_head.weight, to))
    return new.eval()
