"""From the notebook ch02_llama2_to_llama3/01_converting_llama2_to_llama3.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamabook.errors import CheckpointError, ConfigError
from llamabook.llama2 import Llama2Model, MultiHeadAttention, head_dim_of, rope_frequencies
from llamabook.tokenizer import ChatFormat, Llama3Tokenizer, clean_text  # found here too, beside their model

LLAMA3_CONFIG_8B = {
    "vocab_size": 128_256,  # V: 128 000 pieces of text and 256 special tokens
    "context_length": 8192,  # the longest text it was trained on
    "emb_dim": 4096,  # D: width of the residual stream
    "n_heads": 32,  # H: query heads of d = D / H = 128
    "n_layers": 32,
    "hidden_dim": 14_336,  # F: 2/3 of 4 D, times 1.3, rounded up to a multiple of 1024
    "n_kv_groups": 8,  # G: four query heads share keys and values
    "rope_base": 500_000.0,
    "rope_freq": None,  # no scaling of the frequencies yet
    "norm_eps": 1e-5,
    "dtype": torch.bfloat16,
}

LLAMA3_CONFIG_70B = {
    **LLAMA3_CONFIG_8B,
    "emb_dim": 8192,
    "n_heads": 64,
    "n_layers": 80,
    "hidden_dim": 28_672,  # 2/3 of 4 D, times 1.3, rounded up to a multiple of 4096
}


class GroupedQueryAttention(MultiHeadAttention):
    """Causal attention whose H query heads share the keys and values of G groups (Ainslie et al., 2023).

    Query head h reads group h // (H / G). G = H is multi-head attention, G = 1 multi-query attention.
    Args: cfg with emb_dim D, n_heads H, n_kv_groups G, dtype, and head_dim d where it is not D / H.
    Shape: x (B, T, D), mask (T, T), True where a query may look, cos and sin (T, d), to (B, T, D).
    Raises ConfigError if G does not divide H.
    """

    def __init__(self, cfg: dict):
        nn.Module.__init__(self)  # not MultiHeadAttention's, which gives every head keys of its own
        D, self.n_heads, self.n_kv_groups = cfg["emb_dim"], cfg["n_heads"], cfg["n_kv_groups"]
        if self.n_kv_groups < 1 or self.n_heads % self.n_kv_groups:
            raise ConfigError(
                f"{self.n_heads} query heads can't share {self.n_kv_groups} groups of keys and values evenly:"
                " choose an n_kv_groups that divides n_heads"
            )
        self.head_dim, dtype = head_dim_of(cfg), cfg["dtype"]
        self.W_query = nn.Linear(D, self.n_heads * self.head_dim, bias=False, dtype=dtype)
        self.W_key = nn.Linear(D, self.n_kv_groups * self.head_dim, bias=False, dtype=dtype)
        self.W_value = nn.Linear(D, self.n_kv_groups * self.head_dim, bias=False, dtype=dtype)
        self.out_proj = nn.Linear(self.n_heads * self.head_dim, D, bias=False, dtype=dtype)

    def attend(self, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None) -> Tensor:
        """As `MultiHeadAttention.attend`, for K and V (B, G, T, d): each serves H / G heads in a row."""
        each = self.n_heads // self.n_kv_groups
        K, V = K.repeat_interleave(each, dim=1), V.repeat_interleave(each, dim=1)  # two of (B, H, T, d)
        return super().attend(Q, K, V, mask)


def check_rope_freq(rope_freq: dict) -> None:
    """Raise ConfigError unless `rope_freq` is what `scale_frequencies` computes with."""
    keys = {"factor", "low_freq_factor", "high_freq_factor", "original_context_length"}
    if not isinstance(rope_freq, dict) or set(rope_freq) != keys:
        raise ConfigError(f"rope_freq is {rope_freq!r}: give None or a dict with {', '.join(sorted(keys))}")
    for key, value in rope_freq.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ConfigError(f"rope_freq[{key!r}] is {value!r}: give a positive number")
    if rope_freq["low_freq_factor"] >= rope_freq["high_freq_factor"]:
        raise ConfigError(f"rope_freq is {rope_freq!r}: low_freq_factor must be less than high_freq_factor")


def scale_frequencies(frequencies: Tensor, rope_freq: dict) -> Tensor:
    """Slow the slow pairs, keep the fast ones, blend between: RoPE for Llama 3.1 and later, in three bands.

    A pair that makes r turns within the original context keeps its frequency where r is at least
    high_freq_factor; it is divided by `factor` where r is at most low_freq_factor; between, linear in r.
    Args: frequencies (d / 2,), radians per position; rope_freq, a dict with factor, low_freq_factor,
    high_freq_factor and original_context_length.
    Returns (d / 2,), float32. Raises ConfigError for a missing, unknown or impossible entry.
    """
    check_rope_freq(rope_freq)
    low, high = rope_freq["low_freq_factor"], rope_freq["high_freq_factor"]
    turns = frequencies * (rope_freq["original_context_length"] / (2 * math.pi))  # r, (d / 2,)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # s, (d / 2,): 0 slowed, 1 kept
    return keep * frequencies + (1 - keep) * frequencies / rope_freq["factor"]


LLAMA31_CONFIG_8B = {
    **LLAMA3_CONFIG_8B,
    "context_length": 131_072,
    "rope_freq": {
        "factor": 8.0,  # by how much the slow pairs are slowed
        "low_freq_factor": 1.0,  # slow: at most this many turns in the original context
        "high_freq_factor": 4.0,  # fast: at least this many
        "original_context_length": 8192,  # Llama 3's
    },
}

LLAMA31_CONFIG_70B = {
    **LLAMA3_CONFIG_70B,
    "context_length": 131_072,
    "rope_freq": dict(LLAMA31_CONFIG_8B["rope_freq"]),
}

LLAMA31_CONFIG_405B = {
    **LLAMA31_CONFIG_70B,
    "emb_dim": 16_384,
    "n_heads": 128,
    "n_layers": 126,
    "hidden_dim": 53_248,  # 2/3 of 4 D, times 1.2, rounded up to a multiple of 4096
    "rope_freq": dict(LLAMA31_CONFIG_8B["rope_freq"]),
}

LLAMA33_CONFIG_70B = {**LLAMA31_CONFIG_70B, "rope_freq": dict(LLAMA31_CONFIG_8B["rope_freq"])}

LLAMA32_CONFIG_1B = {
    **LLAMA31_CONFIG_8B,
    "emb_dim": 2048,
    "n_heads": 32,  # d = D / H = 64
    "n_layers": 16,
    "hidden_dim": 8192,
    "rope_freq": {**LLAMA31_CONFIG_8B["rope_freq"], "factor": 32.0},
    "tie_embeddings": True,  # the output head is the embedding
}

LLAMA32_CONFIG_3B = {
    **LLAMA32_CONFIG_1B,
    "emb_dim": 3072,
    "n_heads": 24,  # d = D / H = 128
    "n_layers": 28,
    "rope_freq": dict(LLAMA32_CONFIG_1B["rope_freq"]),
}


def as_our_state(state_dict: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights of a state dict as `Llama3Model` names them; the dict that was given stays as it is.

    Drops the tables that other implementations save beside the weights (mask, cos, sin). For a tied model the
    embedding is the head, whether the file holds the head again or not.
    Raises CheckpointError if a tied model's file holds a head that differs from the embedding.
    """
    table = re.compile(r"(trf_blocks\.\d+\.att\.)?(mask|cos|sin)")
    state = {name: tensor for name, tensor in state_dict.items() if not table.fullmatch(name)}
    if tied and "tok_emb.weight" in state:
        embedding, head = state["tok_emb.weight"], state.get("out_head.weight")
        if head is not None and not head.is_meta and not torch.equal(head, embedding.to(head)):
            raise CheckpointError(
                "out_head.weight differs from tok_emb.weight, but the model ties them: load this file with"
                ' "tie_embeddings": False in the configuration'
            )
        state["out_head.weight"] = embedding
    return state


class Llama3Model(Llama2Model):
    """Llama 3, 3.1, 3.2 and 3.3, from token ids (B, T) to logits (B, T, V) in cfg["dtype"].

    Args: cfg as LLAMA32_CONFIG_1B, perhaps with head_dim; attention, the class that each block attends with.
    Raises ConfigError for a missing or impossible value, ContextError if T exceeds the context length.
    """

    def __init__(self, cfg: dict, attention: type[nn.Module] = GroupedQueryAttention):
        super().__init__(cfg, attention)

    def frequencies(self, device: torch.device | str | None = None) -> Tensor:
        """The RoPE frequencies (d / 2,), float32, scaled as cfg["rope_freq"] says."""
        frequencies = rope_frequencies(head_dim_of(self.cfg), self.cfg["rope_base"], device)
        rope_freq = self.cfg["rope_freq"]
        return frequencies if rope_freq is None else scale_frequencies(frequencies, rope_freq)

    def tie(self) -> None:
        """Where the configuration says so, let the head be the embedding's parameter again."""
        if self.cfg.get("tie_embeddings", False):
            self.out_head.weight = self.tok_emb.weight

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As torch's, for the files of `as_our_state` too; ties outlast `assign=True`."""
        state = as_our_state(state_dict, self.cfg.get("tie_embeddings", False))
        result = super().load_state_dict(state, strict, assign)
        self.tie()
        return result

    def to_empty(self, *, device: torch.device | str, recurse: bool = True):
        """As torch's, which gives every name memory of its own; ties outlast it."""
        super().to_empty(device=device, recurse=recurse)
        self.tie()
        return self


class GroupedQueryAttentionFast(GroupedQueryAttention):
    """The same function by torch's fused operator: no (T, T) scores in memory, no keys repeated.

    As `GroupedQueryAttention`; a mask of None means causal, for as many keys as queries.
    """

    def attend(self, Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V for Q (B, H, T, d), K and V (B, G, T, d), to (B, H, T, d)."""
        causal = mask is None
        return F.scaled_dot_product_attention(Q, K, V, attn_mask=mask, is_causal=causal, enable_gqa=True)


class Llama3ModelFast(Llama3Model):
    """`Llama3Model` with fused attention and without a mask: the same weights, names and logits."""

    def __init__(self, cfg: dict, attention: type[nn.Module] = GroupedQueryAttentionFast):
        super().__init__(cfg, attention)

    def mask(self, T: int, device: torch.device) -> None:
        """None: the attention is causal without a mask."""
        return None
