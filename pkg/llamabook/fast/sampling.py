"""From the notebook ch04_kv_cache_and_compile/03_torch_compile.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor

from llamabook.errors import InputError
from llamabook.sampling import next_token_probs


def keep_min_p(probs: Tensor, min_p: float) -> Tensor:
    """Set probabilities below `min_p` times the largest to 0; the rest sum to 1 again (Nguyen et al., 2024).

    Shape: (..., V) to (..., V), same dtype; the largest stays. Raises InputError if min_p is outside [0, 1].
    """
    if not 0 <= min_p <= 1:
        raise InputError(f"min_p is {min_p!r}: give a share of the largest probability, from 0 to 1, or None")
    kept = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0)
    return kept / kept.sum(dim=-1, keepdim=True)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The id at which each row's running sum, in float64, passes its number: inverse transform sampling.

    Shape: probs (B, V), any float dtype, and uniforms (B, 1), float64, from 0 to below 1; to (B, 1), long.
    A token of probability 0 is never drawn.
    """
    mass = probs.double().cumsum(dim=-1)  # (B, V), rising from 0 to the row's sum
    return torch.searchsorted(mass, uniforms * mass[:, -1:], right=True)


def greedy(logits: Tensor) -> Tensor:
    """The id of the largest logit, of equal ones the lowest: (B, V) to (B, 1). Raises InputError for NaN."""
    largest, ids = logits.max(dim=-1, keepdim=True)  # two of (B, 1); NaN counts as largest
    if not largest.isfinite().all():
        raise InputError("a row of logits has a NaN or no largest entry: look for it in the model's weights")
    return ids


class Sampler:
    """Logits (B, V) to ids (B, 1): the likeliest at temperature 0, else drawn, each row by its own generator.

    Row r draws with the seed `seed` + r, one uniform number per token: alone, with that seed, as in a batch.
    seed=None takes one from torch's default generator. Temperature, top-k, top-p, then min-p.
    Raises InputError for arguments out of range.
    """

    def __init__(
        self, rows: int, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
        min_p: float | None = None, seed: int | None = None,
    ):  # fmt: skip
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.probs(torch.zeros(1, 1))  # refuses now, and not at the first token, what it can't compute
        if seed is None:
            seed = 0 if temperature == 0 else int(torch.randint(2**62, ()))
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InputError(f"seed is {seed!r}: give a whole number from 0 up, below 2**63, or None")
        self.generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]

    def probs(self, logits: Tensor) -> Tensor:
        """The probabilities to draw from: (B, V) to (B, V), float32."""
        probs = next_token_probs(logits, self.temperature, self.top_k, self.top_p)
        return probs if self.min_p is None else keep_min_p(probs, self.min_p)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return greedy(logits)
        uniforms = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in self.generators]
        probs = self.probs(logits)
        if probs.device.type == "mps":  # has no float64
            probs = probs.cpu()
        return draw(probs, torch.stack(uniforms).to(probs.device)).to(logits.device)
