"""Llama 2 from scratch. Made by tools/export.py from ch01_gpt_to_llama2/02_converting_gpt_to_llama2.ipynb."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from llamabook.errors import ConfigError, ContextError, InputError


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension (Zhang and Sennrich, 2019, eq. 4).

    Args: emb_dim, the width D; eps, added to the mean square before the root.
    Shape: (..., D) to (..., D), in the dtype of x and weight together; the statistics are taken in float32.
    """

    def __init__(self, emb_dim: int, eps: float = 1e-5, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(emb_dim, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.float().pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        return (x.float() * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


class SiLU(nn.Module):
    """x * sigmoid(x), elementwise, in one fused pass (Elfwing et al., 2017; "Swish" in Ramachandran et al., 2017).

    Shape: any to the same, same dtype, rounded once.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)


class FeedForward(nn.Module):
    """The SwiGLU feed-forward layer: fc3(SiLU(fc1(x)) * fc2(x)), no biases (Shazeer, 2020, eq. 6).

    fc1 is the gate, fc2 the value that it lets through, fc3 the way back (Meta's w1, w3, w2).
    Args: cfg with emb_dim D, hidden_dim F, dtype.
    Shape: (..., D) to (..., D).
    """

    def __init__(self, cfg: dict):
        super().__init__()
        self.fc1 = nn.Linear(cfg["emb_dim"], cfg["hidden_dim"], bias=False, dtype=cfg["dtype"])
        self.fc2 = nn.Linear(cfg["emb_dim"], cfg["hidden_dim"], bias=False, dtype=cfg["dtype"])
        self.fc3 = nn.Linear(cfg["hidden_dim"], cfg["emb_dim"], bias=False, dtype=cfg["dtype"])
        self.silu = SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(self.silu(self.fc1(x)) * self.fc2(x))  # (..., F) inside


def rope_frequencies(
    head_dim: int, base: float = 10_000.0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Radians per position for each pair of dimensions: base^(-2i/d) (Su et al., 2021, section 3.2.2).

    Returns (head_dim / 2,), float32, falling from 1 towards 1 / base.
    Raises ConfigError if head_dim is odd: a rotation needs pairs.
    """
    if head_dim % 2:
        raise ConfigError(f"RoPE rotates pairs of dimensions, but head_dim is {head_dim}: choose an even one")
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim  # (d / 2,)
    return 1.0 / base**exponents


def rope_tables(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position's angles, in the half-split layout: entries i and i + d/2 are a pair.

    Args: positions (...), integers; frequencies (d / 2,).
    Returns cos and sin, each (..., d), float32.
    """
    angles = positions[..., None].float() * frequencies  # (..., d / 2)
    angles = torch.cat((angles, angles), dim=-1)  # (..., d)
    return angles.cos(), angles.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[i], x[i + d/2]) by its position's angle (Su et al., 2021, eq. 34, half-split layout).

    Args: x (B, H, T, d), queries or keys; cos and sin (T, d), from `rope_tables`.
    Shape: (B, H, T, d), computed in float32, returned in the dtype of x.
    """
    first, second = x.float().chunk(2, dim=-1)  # 2 x (B, H, T, d / 2)
    turned = torch.cat((-second, first), dim=-1)  # (B, H, T, d): each pair turned by 90 degrees
    return (x.float() * cos + turned * sin).to(x.dtype)


def interleaved_to_half_split(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder a query or key projection's rows from Meta's layout, pairs (2i, 2i+1), to ours, (i, i + d/2).

    Args: weight (n_heads * d, ...), a matrix or a bias, any dtype; n_heads, the heads that its rows hold.
    Returns the same shape. Raises InputError if the rows are not n_heads times an even number.
    """
    _check_rows(weight, n_heads)
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)  # (H, d/2, 2) -> (H, 2, d/2)


def half_split_to_interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The inverse of `interleaved_to_half_split`: from our pairs (i, i + d/2) back to Meta's (2i, 2i+1).

    Args: weight (n_heads * d, ...), a matrix or a bias, any dtype; n_heads, the heads that its rows hold.
    Returns the same shape. Raises InputError if the rows are not n_heads times an even number.
    """
    _check_rows(weight, n_heads)
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # (H, 2, d/2) -> (H, d/2, 2)


def _check_rows(weight: torch.Tensor, n_heads: int) -> None:
    if n_heads < 1 or weight.shape[0] % (2 * n_heads):
        raise InputError(
            f"a weight of {weight.shape[0]} rows does not hold {n_heads} heads of an even head_dim: check n_heads"
        )


def head_dim_of(cfg: dict) -> int:
    """The head dimension d: cfg["head_dim"] if it is given, else emb_dim / n_heads.

    Raises ConfigError if neither gives a whole number.
    """
    if cfg.get("head_dim") is None and cfg["emb_dim"] % cfg["n_heads"]:
        raise ConfigError(
            f"emb_dim {cfg['emb_dim']} does not divide into {cfg['n_heads']} heads: change n_heads or set head_dim"
        )
    return cfg.get("head_dim") or cfg["emb_dim"] // cfg["n_heads"]


class MultiHeadAttention(nn.Module):
    """Causal multi-head attention with RoPE, without biases and dropout (Touvron et al., 2023, section 2.2).

    Args: cfg with emb_dim D, n_heads H, n_kv_groups (= H here), dtype, and head_dim d if it is not D / H.
    Raises ConfigError if n_kv_groups differs from n_heads.
    """

    def __init__(self, cfg: dict):
        super().__init__()
        if cfg["n_kv_groups"] != cfg["n_heads"]:
            raise ConfigError(
                f"n_kv_groups is {cfg['n_kv_groups']} and n_heads {cfg['n_heads']}: MultiHeadAttention needs them"
                " equal; use GroupedQueryAttention (chapter 2, llamabook.llama3)"
            )
        self.n_heads, self.head_dim = cfg["n_heads"], head_dim_of(cfg)
        width = self.n_heads * self.head_dim
        self.W_query = nn.Linear(cfg["emb_dim"], width, bias=False, dtype=cfg["dtype"])
        self.W_key = nn.Linear(cfg["emb_dim"], width, bias=False, dtype=cfg["dtype"])
        self.W_value = nn.Linear(cfg["emb_dim"], width, bias=False, dtype=cfg["dtype"])
        self.out_proj = nn.Linear(width, cfg["emb_dim"], bias=False, dtype=cfg["dtype"])

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """x (B, T, D); mask (T, T), True where a query may look; cos and sin (T, d). Returns (B, T, D)."""
        queries = self.W_query(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, d)
        keys = self.W_key(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        values = self.W_value(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        queries, keys = apply_rope(queries, cos, sin), apply_rope(keys, cos, sin)
        context = self.attend(queries, keys, values, mask)  # (B, H, T, d)
        return self.out_proj(context.transpose(1, 2).flatten(2))  # (B, T, D)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """softmax(Q K^T / sqrt(d)) V with the softmax in float32; all but mask are (B, H, T, d)."""
        scores = queries @ keys.transpose(2, 3) / self.head_dim**0.5  # (B, H, T, T)
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        return weights.to(values.dtype) @ values


class TransformerBlock(nn.Module):
    """One Llama block, pre-norm: x + att(norm1(x)), then x + ff(norm2(x)).

    Args: cfg; attention, a class that is built from cfg and called as `MultiHeadAttention.forward`.
    Shape: (B, T, D) to (B, T, D).
    """

    def __init__(self, cfg: dict, attention: type[nn.Module] = MultiHeadAttention):
        super().__init__()
        eps = cfg.get("norm_eps", 1e-5)
        self.norm1 = RMSNorm(cfg["emb_dim"], eps, cfg["dtype"])
        self.att = attention(cfg)
        self.norm2 = RMSNorm(cfg["emb_dim"], eps, cfg["dtype"])
        self.ff = FeedForward(cfg)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        x = x + self.att(self.norm1(x), mask, cos, sin)
        return x + self.ff(self.norm2(x))


CONFIG_KEYS = (
    "vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "hidden_dim",
    "n_kv_groups", "rope_base", "rope_freq", "dtype",
)  # fmt: skip


class Llama2Model(nn.Module):
    """Llama 2, from token ids to logits (Touvron et al., 2023).

    Args: cfg with the keys of CONFIG_KEYS, optionally head_dim, norm_eps (1e-5), tie_embeddings (False);
    attention, the attention class of every block.
    Raises ConfigError if a key is missing or its value can't be built.
    """

    def __init__(self, cfg: dict, attention: type[nn.Module] = MultiHeadAttention):
        super().__init__()
        for key in CONFIG_KEYS:
            if key not in cfg:
                raise ConfigError(f"the configuration has no {key!r}: add it (LLAMA2_CONFIG_7B shows every key)")
        self.cfg = dict(cfg)
        self.frequencies()  # refuses what it can't follow now, not at the first forward
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"], dtype=cfg["dtype"])
        self.trf_blocks = nn.ModuleList(TransformerBlock(cfg, attention) for _ in range(cfg["n_layers"]))
        self.final_norm = RMSNorm(cfg["emb_dim"], cfg.get("norm_eps", 1e-5), cfg["dtype"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False, dtype=cfg["dtype"])
        if cfg.get("tie_embeddings", False):
            self.out_head.weight = self.tok_emb.weight

    def frequencies(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The RoPE frequencies (d / 2,), float32. A model that scales them overrides this one method."""
        if self.cfg["rope_freq"] is not None:
            raise ConfigError("rope_freq is set, but Llama 2 does not scale RoPE: set it to None or use Llama3Model")
        return rope_frequencies(head_dim_of(self.cfg), self.cfg["rope_base"], device)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to logits (B, T, V). Raises ContextError if T exceeds the context length."""
        T = idx.shape[1]
        if T > self.cfg["context_length"]:
            raise ContextError(
                f"{T} tokens do not fit the context length of {self.cfg['context_length']}: shorten the input"
            )
        mask = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()  # (T, T)
        positions = torch.arange(T, device=idx.device)
        cos, sin = rope_tables(positions, self.frequencies(idx.device))  # (T, d)
        x = self.tok_emb(idx)  # (B, T, D)
        for block in self.trf_blocks:
            x = block(x, mask, cos, sin)
        return self.out_head(self.final_norm(x))  # (B, T, V)


LLAMA2_CONFIG_7B = {
    "vocab_size": 32_000,  # SentencePiece, byte-pair
    "context_length": 4096,
    "emb_dim": 4096,
    "n_heads": 32,
    "n_layers": 32,
    "hidden_dim": 11_008,  # 2/3 of 4 * emb_dim, rounded up to a multiple of 256
    "n_kv_groups": 32,  # = n_heads: every query head has its own key and value head
    "rope_base": 10_000.0,
    "rope_freq": None,  # no scaling of RoPE
    "norm_eps": 1e-5,
    "dtype": torch.bfloat16,
}

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
    "hidden_dim": 28_672,  # 1.3 times 2/3 of 4 * emb_dim, rounded up to a multiple of 4096
    "n_kv_groups": 8,  # eight query heads share a key and value head (chapter 2)
}
