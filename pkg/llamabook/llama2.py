"""From the notebook ch01_gpt_to_llama2/02_converting_gpt_to_llama2.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamabook.errors import ConfigError, ContextError, InputError


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension (Zhang and Sennrich, 2019, eq. 4).

    Args: emb_dim, the width D; eps, added to the mean square before the root; dtype of the weight.
    Shape: (..., D) to (..., D), same dtype; the statistics are taken in float32.
    """

    def __init__(self, emb_dim: int, eps: float = 1e-5, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(emb_dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        return (x.float() * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


class SiLU(nn.Module):
    """x * sigmoid(x), elementwise (Elfwing et al., 2017), as torch's fused operator.

    Shape: any to the same, same dtype, rounded once.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class FeedForward(nn.Module):
    """The SwiGLU feed-forward layer, fc3(SiLU(fc1(x)) * fc2(x)), without biases (Shazeer, 2020, eq. 6).

    fc1 is the gate, fc2 the value, fc3 the way back; Meta's files call them w1, w3, w2.
    Args: cfg with emb_dim D, hidden_dim F, dtype.
    Shape: (..., D) to (..., D).
    """

    def __init__(self, cfg: dict):
        super().__init__()
        self.fc1 = nn.Linear(cfg["emb_dim"], cfg["hidden_dim"], bias=False, dtype=cfg["dtype"])
        self.fc2 = nn.Linear(cfg["emb_dim"], cfg["hidden_dim"], bias=False, dtype=cfg["dtype"])
        self.fc3 = nn.Linear(cfg["hidden_dim"], cfg["emb_dim"], bias=False, dtype=cfg["dtype"])
        self.silu = SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.silu(self.fc1(x)) * self.fc2(x))  # (..., D) -> (..., F) -> (..., D)


def rope_frequencies(
    head_dim: int, base: float = 10_000.0, device: torch.device | str | None = None
) -> Tensor:
    """Radians per position for each pair of entries: base^(-2i/d) (Su et al., 2021, section 3.2.2).

    Returns (d / 2,), float32, falling from 1 towards 1 / base.
    Raises ConfigError if head_dim d is odd: a rotation needs pairs.
    """
    if head_dim % 2:
        raise ConfigError(f"RoPE turns pairs of entries, but head_dim is {head_dim}: choose an even one")
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim  # (d / 2,)
    return 1.0 / base**exponents


def rope_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, in the half-split layout: entries i and i + d/2 share one.

    Args: positions (...), integers; frequencies (d / 2,).
    Returns cos and sin, each (..., d), float32.
    """
    angles = positions[..., None].float() * frequencies  # (..., d / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., d)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle (Su et al., 2021, eq. 34; half-split layout).

    Args: x (B, H, T, d), queries or keys; cos and sin (T, d), from `rope_tables`.
    Shape: (B, H, T, d), computed in float32, returned in the dtype of x.
    """
    first, second = x.float().chunk(2, dim=-1)  # two of (B, H, T, d / 2)
    turned = torch.cat((-second, first), dim=-1)  # (B, H, T, d), each pair turned by 90 degrees
    return (x.float() * cos + turned * sin).to(x.dtype)


def check_rows(weight: Tensor, n_heads: int) -> None:
    """Raise InputError unless the rows of `weight` are `n_heads` heads of an even head dimension."""
    rows = weight.shape[0]
    if n_heads < 1 or rows == 0 or rows % (2 * n_heads):
        raise InputError(f"{rows} rows are not {n_heads} heads of an even head dimension: check n_heads")


def interleaved_to_half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection from Meta's pairs (2i, 2i+1) to ours, (i, i + d/2).

    Args: weight (n_heads * d, ...), a matrix or a bias, any dtype; n_heads, the heads that its rows hold.
    Returns the same shape. Raises InputError if the rows are not n_heads times an even number.
    """
    check_rows(weight, n_heads)
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (H, d/2, 2) -> (H, 2, d/2)


def half_split_to_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `interleaved_to_half_split`, with the same arguments and errors."""
    check_rows(weight, n_heads)
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # (H, 2, d/2) -> (H, d/2, 2)


def head_dim_of(cfg: dict) -> int:
    """The head dimension d: cfg["head_dim"] if it is given, else emb_dim / n_heads.

    Raises ConfigError if it isn't given and n_heads does not divide emb_dim.
    """
    if cfg.get("head_dim") is not None:
        return cfg["head_dim"]
    if cfg["emb_dim"] % cfg["n_heads"]:
        raise ConfigError(
            f"emb_dim {cfg['emb_dim']} is no multiple of n_heads {cfg['n_heads']}: change one or set head_dim"
        )
    return cfg["emb_dim"] // cfg["n_heads"]


class MultiHeadAttention(nn.Module):
    """Causal attention in H heads with RoPE, without biases and dropout (Touvron et al., 2023, section 2.2).

    Args: cfg with emb_dim D, n_heads H, n_kv_groups (here = H), dtype, and head_dim d where it is not D / H.
    Shape: x (B, T, D), mask (T, T), True where a query may look, cos and sin (T, d), to (B, T, D).
    Raises ConfigError if n_kv_groups differs from n_heads.
    """

    def __init__(self, cfg: dict):
        super().__init__()
        D, self.n_heads, groups, dtype = cfg["emb_dim"], cfg["n_heads"], cfg["n_kv_groups"], cfg["dtype"]
        if groups != self.n_heads:
            raise ConfigError(
                f"n_kv_groups {groups} differs from n_heads {self.n_heads}: that is grouped-query attention,"
                " which chapter 2 builds (llamabook.llama3.GroupedQueryAttention)"
            )
        self.head_dim = head_dim_of(cfg)
        self.W_query = nn.Linear(D, self.n_heads * self.head_dim, bias=False, dtype=dtype)
        self.W_key = nn.Linear(D, self.n_heads * self.head_dim, bias=False, dtype=dtype)
        self.W_value = nn.Linear(D, self.n_heads * self.head_dim, bias=False, dtype=dtype)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, D, bias=False, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projected = self.W_query(x), self.W_key(x), self.W_value(x)  # three of (B, T, H * d)
        Q, K, V = (p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projected)  # (B, H, T, d)
        context = self.attend(apply_rope(Q, cos, sin), apply_rope(K, cos, sin), V, mask)
        return self.out_proj(context.transpose(1, 2).flatten(2))  # (B, H, T, d) -> (B, T, D)

    def attend(self, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V, the softmax in float32; Q, K, V and the result are (B, H, T, d)."""
        scores = Q @ K.transpose(2, 3) / self.head_dim**0.5  # (B, H, T, T)
        scores = scores.masked_fill(~mask, -torch.inf)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(V.dtype) @ V


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each fed a normalized copy; the result is added back (pre-norm).

    Args: cfg; attention, a class built from cfg and called as `MultiHeadAttention` is.
    Shape: x (B, T, D), mask (T, T), cos and sin (T, d), to (B, T, D).
    """

    def __init__(self, cfg: dict, attention: type[nn.Module] = MultiHeadAttention):
        super().__init__()
        eps = cfg.get("norm_eps", 1e-5)
        self.norm1 = RMSNorm(cfg["emb_dim"], eps, cfg["dtype"])
        self.att = attention(cfg)
        self.norm2 = RMSNorm(cfg["emb_dim"], eps, cfg["dtype"])
        self.ff = FeedForward(cfg)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x), mask, cos, sin)
        return x + self.ff(self.norm2(x))


LLAMA2_CONFIG_7B = {
    "vocab_size": 32_000,  # V: byte-pair tokens, SentencePiece
    "context_length": 4096,  # the longest text it was trained on
    "emb_dim": 4096,  # D: width of the residual stream
    "n_heads": 32,  # H: heads of d = D / H = 128
    "n_layers": 32,
    "hidden_dim": 11_008,  # F: 2/3 of 4 D, rounded up to a multiple of 256
    "n_kv_groups": 32,  # G: as many as heads, each has keys and values of its own
    "rope_base": 10_000.0,
    "rope_freq": None,  # no scaling of the frequencies
    "norm_eps": 1e-5,
    "dtype": torch.bfloat16,
}


class Llama2Model(nn.Module):
    """Llama 2, from token ids (B, T) to logits (B, T, V) in cfg["dtype"] (Touvron et al., 2023).

    Args: cfg as LLAMA2_CONFIG_7B, perhaps with head_dim and tie_embeddings; attention, of each block.
    Raises ConfigError for a missing or impossible value, ContextError if T exceeds the context length.
    """

    def __init__(self, cfg: dict, attention: type[nn.Module] = MultiHeadAttention):
        super().__init__()
        if missing := [key for key in LLAMA2_CONFIG_7B if key not in cfg and key != "norm_eps"]:
            raise ConfigError(f"the Llama configuration lacks {', '.join(missing)}: see LLAMA2_CONFIG_7B")
        self.cfg, V, D, dtype = dict(cfg), cfg["vocab_size"], cfg["emb_dim"], cfg["dtype"]
        self.frequencies()  # refuses now, and not at the first forward, what it can't compute
        self.tok_emb = nn.Embedding(V, D, dtype=dtype)
        self.trf_blocks = nn.ModuleList(TransformerBlock(cfg, attention) for _ in range(cfg["n_layers"]))
        self.final_norm = RMSNorm(D, cfg.get("norm_eps", 1e-5), dtype)
        self.out_head = nn.Linear(D, V, bias=False, dtype=dtype)
        if cfg.get("tie_embeddings", False):
            self.out_head.weight = self.tok_emb.weight

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """The RoPE frequencies (d / 2,), float32. A model that scales them overrides this."""
        if self.cfg["rope_freq"] is not None:
            raise ConfigError("rope_freq is set, but Llama 2 knows no scaling: use chapter 2's Llama3Model")
        return rope_frequencies(head_dim_of(self.cfg), self.cfg["rope_base"], device)

    def mask(self, T: int, device: torch.device) -> Tensor | None:
        """(T, T), True where a query may look. A model whose attention needs no mask overrides this."""
        return torch.ones(T, T, dtype=torch.bool, device=device).tril()

    def forward(self, idx: Tensor) -> Tensor:
        T, limit = idx.shape[1], self.cfg["context_length"]
        if T > limit:
            raise ContextError(f"{T} tokens, but the context length is {limit}: shorten the input")
        mask = self.mask(T, idx.device)
        cos, sin = rope_tables(torch.arange(T, device=idx.device), self.frequencies(idx.device))  # (T, d)
        x = self.tok_emb(idx)  # (B, T, D)
        for block in self.trf_blocks:
            x = block(x, mask, cos, sin)
        return self.out_head(self.final_norm(x))  # (B, T, V)


LLAMA2_CONFIG_13B = {
    **LLAMA2_CONFIG_7B,
    "emb_dim": 5120,
    "n_heads": 40,
    "n_layers": 40,
    "hidden_dim": 13_824,
    "n_kv_groups": 40,
}

LLAMA2_CONFIG_70B = {
    **LLAMA2_CONFIG_7B,
    "emb_dim": 8192,
    "n_heads": 64,
    "n_layers": 80,
    "hidden_dim": 28_672,  # 2/3 of 4 D, times 1.3, rounded up to a multiple of 4096
    "n_kv_groups": 8,  # G: eight query heads share keys and values (chapter 2)
}
