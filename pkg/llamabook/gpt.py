"""From the notebook ch01_gpt_to_llama2/01_the_gpt_we_start_from.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import math

import torch
from torch import nn

from llamabook.errors import ConfigError, ContextError


class LayerNorm(nn.Module):
    """Layer normalization over the last dimension (Ba, Kiros and Hinton, 2016).

    Args: emb_dim, the width D; eps, added to the variance before the root; dtype of the parameters.
    Shape: (..., D) to (..., D), same dtype; the statistics are taken in float32.
    """

    def __init__(self, emb_dim: int, eps: float = 1e-5, dtype: torch.dtype | None = None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(emb_dim, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(emb_dim, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x.float() - x.float().mean(dim=-1, keepdim=True)
        variance = centred.pow(2).mean(dim=-1, keepdim=True)  # (..., 1)
        return (centred * torch.rsqrt(variance + self.eps)).to(x.dtype) * self.weight + self.bias


class GELU(nn.Module):
    """Gaussian error linear unit, in the tanh form that GPT-2 was trained with (Hendrycks and Gimpel, 2016).

    Shape: any; the result has the shape and dtype of the input.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them, the same for every position.

    Args: cfg with emb_dim (D), hidden_dim (F) and dtype.
    Shape: (B, T, D) to (B, T, D).
    """

    def __init__(self, cfg: dict):
        super().__init__()
        self.fc1 = nn.Linear(cfg["emb_dim"], cfg["hidden_dim"], dtype=cfg["dtype"])
        self.gelu = GELU()
        self.fc2 = nn.Linear(cfg["hidden_dim"], cfg["emb_dim"], dtype=cfg["dtype"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.gelu(self.fc1(x)))  # (B, T, D) -> (B, T, F) -> (B, T, D)


class MultiHeadAttention(nn.Module):
    """Causal attention in H heads, with biases and dropout (Vaswani et al., 2017, section 3.2).

    Args: cfg with emb_dim (D), n_heads (H), drop_rate, qkv_bias and dtype.
    Shape: x (B, T, D) and mask (T, T), True where a query may look, to (B, T, D); softmax in float32.
    Raises ConfigError if H does not divide D.
    """

    def __init__(self, cfg: dict):
        super().__init__()
        D, self.n_heads = cfg["emb_dim"], cfg["n_heads"]
        if D % self.n_heads:
            raise ConfigError(f"emb_dim {D} is not a multiple of n_heads {self.n_heads}: change one of them")
        self.head_dim = D // self.n_heads
        self.W_query = nn.Linear(D, D, bias=cfg["qkv_bias"], dtype=cfg["dtype"])
        self.W_key = nn.Linear(D, D, bias=cfg["qkv_bias"], dtype=cfg["dtype"])
        self.W_value = nn.Linear(D, D, bias=cfg["qkv_bias"], dtype=cfg["dtype"])
        self.out_proj = nn.Linear(D, D, dtype=cfg["dtype"])
        self.dropout = nn.Dropout(cfg["drop_rate"])

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, H, T, d): each head gets its own slice of the width."""
        return x.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        queries = self.split_heads(self.W_query(x))  # (B, H, T, d)
        keys = self.split_heads(self.W_key(x))  # (B, H, T, d)
        values = self.split_heads(self.W_value(x))  # (B, H, T, d)
        scores = queries @ keys.transpose(2, 3) / math.sqrt(self.head_dim)  # (B, H, T, T)
        scores = scores.float().masked_fill(~mask, -torch.inf)
        weights = self.dropout(torch.softmax(scores, dim=-1).to(x.dtype))  # (B, H, T, T)
        context = (weights @ values).transpose(1, 2).flatten(2)  # (B, H, T, d) -> (B, T, D)
        return self.out_proj(context)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each fed a normalized copy; the result is added back (pre-norm).

    Args: cfg, as for the parts.
    Shape: x (B, T, D) and mask (T, T), True where a query may look, to (B, T, D).
    """

    def __init__(self, cfg: dict):
        super().__init__()
        self.norm1 = LayerNorm(cfg["emb_dim"], dtype=cfg["dtype"])
        self.att = MultiHeadAttention(cfg)
        self.norm2 = LayerNorm(cfg["emb_dim"], dtype=cfg["dtype"])
        self.ff = FeedForward(cfg)
        self.dropout = nn.Dropout(cfg["drop_rate"])

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.att(self.norm1(x), mask))
        return x + self.dropout(self.ff(self.norm2(x)))


GPT_CONFIG_124M = {
    "vocab_size": 50257,  # V: byte-pair tokens
    "context_length": 1024,  # positions that the model has a vector for
    "emb_dim": 768,  # D: width of the residual stream
    "n_heads": 12,  # H: heads of d = D / H = 64
    "n_layers": 12,
    "hidden_dim": 3072,  # F: width inside the feed-forward, 4 D
    "drop_rate": 0.1,
    "qkv_bias": True,
    "tie_embeddings": True,  # the head is the token embedding, used a second time
    "dtype": torch.float32,
}


def init_weights(model: nn.Module, n_layers: int) -> None:
    """Draw GPT-2's first weights in place (Radford et al., 2019, section 2.3).

    Matrices are normal with standard deviation 0.02, those that write into the residual stream smaller by
    the root of the 2 * n_layers writers; biases are 0; the norms' weights stay 1.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writes = name.endswith(("out_proj.weight", "fc2.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layers) if writes else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class GPTModel(nn.Module):
    """A decoder-only transformer with GPT-2's parts (Radford et al., 2019).

    Args: cfg, with the keys of GPT_CONFIG_124M; tie_embeddings may be left out and is False then.
    Shape: token ids (B, T) to logits (B, T, V) in cfg["dtype"].
    Raises ConfigError for a missing key, ContextError if T exceeds the context length.
    """

    def __init__(self, cfg: dict):
        super().__init__()
        missing = [key for key in GPT_CONFIG_124M if key not in cfg and key != "tie_embeddings"]
        if missing:
            raise ConfigError(f"the GPT configuration lacks {', '.join(missing)}: see GPT_CONFIG_124M")
        V, D, dtype = cfg["vocab_size"], cfg["emb_dim"], cfg["dtype"]
        self.context_length = cfg["context_length"]
        self.tok_emb = nn.Embedding(V, D, dtype=dtype)
        self.pos_emb = nn.Embedding(self.context_length, D, dtype=dtype)
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.ModuleList(TransformerBlock(cfg) for _ in range(cfg["n_layers"]))
        self.final_norm = LayerNorm(D, dtype=dtype)
        self.out_head = nn.Linear(D, V, bias=False, dtype=dtype)
        if cfg.get("tie_embeddings", False):
            self.out_head.weight = self.tok_emb.weight
        init_weights(self, cfg["n_layers"])

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        T = idx.shape[1]
        if T > self.context_length:
            raise ContextError(f"{T} tokens, but the model has {self.context_length} positions: shorten it")
        positions = torch.arange(T, device=idx.device)
        mask = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()  # True: the query may look there
        x = self.drop_emb(self.tok_emb(idx) + self.pos_emb(positions))  # (B, T, D)
        for block in self.trf_blocks:
            x = block(x, mask)
        return self.out_head(self.final_norm(x))  # (B, T, V)
