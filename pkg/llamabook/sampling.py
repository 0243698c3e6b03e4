"""From the notebook ch01_gpt_to_llama2/01_the_gpt_we_start_from.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch

from llamabook.errors import InputError


def keep_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Set all but the `top_k` largest logits to -inf; of equal ones the lower ids stay (Fan et al., 2018).

    Shape: (..., V) to (..., V), same dtype; exactly min(top_k, V) stay. Raises InputError if top_k < 1.
    """
    if not isinstance(top_k, int) or top_k < 1:
        raise InputError(f"top_k is {top_k!r}: give a whole number from 1 up, or None to keep every token")
    kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]  # (..., 1), the smallest that may stay
    above, equal = logits > kth, logits == kth
    places = top_k - above.sum(dim=-1, keepdim=True)  # (..., 1), left for those equal to the k-th
    keep = above | (equal & (equal.cumsum(dim=-1) <= places))
    return logits.masked_fill(~keep, -torch.inf)


def keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set all logits to -inf but the fewest likely ones that reach the mass `top_p` (Holtzman et al., 2020).

    Shape: (..., V) to (..., V), same dtype; at least one stays; the mass is summed in float32.
    Raises InputError if top_p is outside [0, 1].
    """
    if not 0 <= top_p <= 1:
        raise InputError(f"top_p is {top_p!r}: give a probability from 0 to 1, or None to keep every token")
    if top_p == 1:
        return logits
    probs, ids = torch.softmax(logits.float(), dim=-1).sort(dim=-1, descending=True, stable=True)
    outside = probs.cumsum(dim=-1) - probs >= top_p  # the likelier tokens already reach top_p
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, ids, outside), -torch.inf)


def next_token_probs(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Turn logits into probabilities: temperature (0 puts all on the largest), then top-k, then top-p.

    Shape: (..., V), any float dtype, to (..., V), float32, in which all is computed. Raises InputError for
    arguments out of range, and for a row of logits with NaN, with +inf, or with nothing but -inf.
    """
    limits = torch.finfo(torch.float32)
    if not 0 <= temperature <= limits.max:
        raise InputError(f"temperature is {temperature!r}: give a number from 0 up")
    logits = logits.float()
    largest = logits.amax(dim=-1, keepdim=True)  # (..., 1), NaN if any logit is
    if not largest.isfinite().all():
        raise InputError("a row of logits holds NaN, +inf or only -inf: look for it in the model's weights")
    if temperature < limits.tiny:
        logits = keep_top_k(logits, 1)
    else:
        logits = (logits - largest) / temperature  # at most 0, so that nothing overflows
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.softmax(logits, dim=-1)


def sample(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token id from each row of probabilities.

    Shape: (..., V) to (..., 1), long. The generator must be on the device of `probs`; None takes torch's own.
    """
    rows = probs.reshape(-1, probs.shape[-1])
    return torch.multinomial(rows, num_samples=1, generator=generator).reshape(*probs.shape[:-1], 1)
