"""From the notebook ch04_kv_cache_and_compile/01_the_kv_cache.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from llamabook import generate as uncached
from llamabook.errors import ContextError, InputError
from llamabook.kv_cache.cache import KVCache

PIECE = 512  # tokens of a prompt that go through the model at once


class WithCache(nn.Module):
    """A model and a cache, asked as a model without one: given a whole text, it reads what is new in it."""

    def __init__(self, model: nn.Module, cache: KVCache):
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, idx: Tensor) -> Tensor:
        """Logits of the end of a text (B, T) that begins with what is in the cache: (B, at most PIECE, V)."""
        for piece in idx[:, self.cache.length :].split(PIECE, dim=1):
            logits = self.model(piece, cache=self.cache)
        return logits


def check_text(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> None:
    """Raise InputError or ContextError, in one line, unless prompt and new tokens fit into the context."""
    uncached.check_prompt(idx, max_new_tokens, context_size)
    limit, asked = min(context_size, model.cfg["context_length"]), idx.shape[1] + max_new_tokens
    if asked > limit:
        raise ContextError(
            f"{idx.shape[1]} tokens and {max_new_tokens} new ones are {asked}, but the context is {limit}:"
            " shorten the prompt or ask for fewer"
        )


def with_cache(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> WithCache:
    """The model with an empty cache for the prompt and its new tokens. Raises as `check_text` does."""
    if not hasattr(model, "new_cache"):
        what = f"{type(model).__name__} takes no cache"
        raise InputError(f"{what}: make it one of kv_cache.llama3, with Llama3Model.sharing(model)")
    check_text(model, idx, max_new_tokens, context_size)
    return WithCache(model, model.new_cache(len(idx), idx.shape[1] + max_new_tokens))


def stream(
    model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    eos_id: int | Iterable[int] | None = None, generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """As `llamabook.generate.stream`, each token of the text computed once.

    Raises ContextError at once, before any work, if prompt and new tokens exceed the context.
    """
    cached = with_cache(model, idx, max_new_tokens, context_size)
    return uncached.stream(
        cached, idx, max_new_tokens, context_size, temperature, top_k, top_p, eos_id, generator
    )


def generate(
    model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    eos_id: int | Iterable[int] | None = None, generator: torch.Generator | None = None,
) -> Tensor:
    """The prompt and what `stream` yields after it: (B, T) to (B, T + n), n <= max_new_tokens."""
    steps = stream(model, idx, max_new_tokens, context_size, temperature, top_k, top_p, eos_id, generator)
    return torch.cat([idx, *steps], dim=1)


def generate_text_simple(
    model: nn.Module, idx: Tensor, max_new_tokens: int,
    context_size: int | None = None, use_cache: bool = True,
) -> Tensor:
    """The prompt (B, T) and `max_new_tokens` more, each the likeliest: (B, T + max_new_tokens).

    Without `use_cache` each step reads the whole text again; the result is the same.
    context_size: None for the model's own. Raises ContextError if prompt and new tokens exceed it.
    """
    context_size = model.cfg["context_length"] if context_size is None else context_size
    if use_cache:
        return generate(model, idx, max_new_tokens, context_size)
    check_text(model, idx, max_new_tokens, context_size)
    return uncached.generate(model, idx, max_new_tokens, context_size)
