"""From the notebook ch01_gpt_to_llama2/01_the_gpt_we_start_from.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llamabook.errors import ContextError, InputError
from llamabook.sampling import next_token_probs, sample


def text_to_token_ids(text: str, tokenizer) -> torch.Tensor:
    """Encode a text as a batch of one: (1, T), long; begins with BOS where the tokenizer has a `bos_id`."""
    begins = getattr(tokenizer, "bos_id", None) is not None
    ids = tokenizer.encode(text, bos=True) if begins else tokenizer.encode(text)
    return torch.tensor([ids], dtype=torch.long)


def token_ids_to_text(token_ids: torch.Tensor | list[int], tokenizer) -> str:
    """Decode one row of ids, as a tensor (1, T) or (T,) or a list. Raises InputError for several rows."""
    ids = torch.as_tensor(token_ids)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]  # (1, T) -> (T,)
    if ids.dim() != 1:
        raise InputError(f"token ids of shape {tuple(ids.shape)}: decode one row at a time")
    return tokenizer.decode(ids.tolist())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this block no dropout and no gradients; afterwards each part of `model` has its mode back."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_prompt(idx: torch.Tensor, max_new_tokens: int, context_size: int) -> None:
    """Raise InputError or ContextError, in one line, where `stream` could not begin."""
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise InputError(f"the prompt has shape {tuple(idx.shape)}: give token ids (B, T), T at least 1")
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}: give a number from 0 up")
    if context_size < 1:
        raise InputError(f"context_size is {context_size}: give the model's context length")
    if idx.shape[1] > context_size:
        raise ContextError(f"the prompt has {idx.shape[1]} tokens, the context {context_size}: shorten it")


def stream(
    model: nn.Module, idx: torch.Tensor, max_new_tokens: int, context_size: int,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    eos_id: int | Iterable[int] | None = None, generator: torch.Generator | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the next ids (B, 1), long, one step at a time, each as soon as it is drawn.

    Args: idx, the prompt (B, T); eos_id, one or several ids that end a row, which then repeats its end until
    all rows have ended. Text beyond `context_size` is seen through a window of its last tokens, at positions
    0, 1, ... again. Temperature 0 takes the likeliest. Raises ContextError if the prompt alone is too long.
    """
    check_prompt(idx, max_new_tokens, context_size)
    ends = torch.tensor([eos_id] if isinstance(eos_id, int) else list(eos_id or ())).to(idx)
    ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        with evaluating(model):
            logits = model(idx[:, -context_size:])[:, -1]  # (B, T, V) -> (B, V)
        probs = next_token_probs(logits, temperature, top_k, top_p)
        drawn = probs.argmax(dim=-1, keepdim=True) if temperature == 0 else sample(probs, generator)
        drawn = torch.where(ended, idx[:, -1:], drawn)  # (B, 1), an ended row repeats its last token
        yield drawn
        idx, ended = torch.cat([idx, drawn], dim=1), ended | torch.isin(drawn, ends)
        if ended.all():
            return


def generate(
    model: nn.Module, idx: torch.Tensor, max_new_tokens: int, context_size: int,
    temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    eos_id: int | Iterable[int] | None = None, generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return the prompt and what `stream` yields after it: (B, T) to (B, T + n), n <= max_new_tokens."""
    steps = stream(model, idx, max_new_tokens, context_size, temperature, top_k, top_p, eos_id, generator)
    return torch.cat([idx, *steps], dim=1)
