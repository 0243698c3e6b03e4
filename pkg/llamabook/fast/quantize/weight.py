"""From the notebook ch05_quantization_speculative/02_int4_in_groups.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from llamabook.errors import InputError
from llamabook.fast.quantize.int4 import GROUP_SIZES, pack, quantize_int4, quantize_int4_asymmetric, unpack
from llamabook.fast.quantize.int8 import quantize_int8


@dataclass(frozen=True)
class Quantized:
    """A matrix (N, K) in 8 or 4 bits: codes * scales + zeros, as it is stored, for any device.

    words (N, ceil(K * bits / 32)), int32, as `pack` makes them; scales and zeros (N, groups), bfloat16, of
    groups of `groupsize` columns, the last of which may be short; no zeros: None.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    groupsize: int
    K: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.words), self.K

    def codes(self) -> Tensor:
        """The codes (N, K), int8 from -2^(bits - 1) up."""
        return unpack(self.words, self.bits, self.K)

    def dequantize(self) -> Tensor:
        """The matrix (N, K) that is meant, float32."""
        N, groups = self.scales.shape
        codes = F.pad(self.codes().float(), (0, groups * self.groupsize - self.K))  # (N, groups * groupsize)
        weight = codes.unflatten(1, (groups, -1)) * self.scales.float().unsqueeze(-1)
        weight = weight if self.zeros is None else weight + self.zeros.float().unsqueeze(-1)
        return weight.flatten(1)[:, : self.K]

    def map(self, change) -> "Quantized":
        """The same with each of its tensors changed."""
        zeros = None if self.zeros is None else change(self.zeros)
        return replace(self, words=change(self.words), scales=change(self.scales), zeros=zeros)

    def rows(self, start: int, stop: int) -> "Quantized":
        """Rows `start` to `stop` of it, not copied."""
        return self.map(lambda tensor: tensor[start:stop])


def stack(parts: Sequence[Quantized]) -> Quantized:
    """All rows of `parts`, matrices of the same width and kind, as one."""
    tensors = zip(*((part.words, part.scales, part.zeros) for part in parts))
    words, scales, zeros = (torch.cat(each) if each[0] is not None else None for each in tensors)
    return replace(parts[0], words=words, scales=scales, zeros=zeros)


@dataclass(frozen=True)
class Scheme:
    """How matrices are quantized: Scheme(8), one scale a row, or Scheme(4, groupsize). Raises InputError.

    Called with a matrix (N, K), it gives a `Quantized` by rounding to the nearest code.
    """

    bits: int
    groupsize: int | None = None
    asymmetric: bool = False

    def __post_init__(self):
        if self.bits not in (8, 4):
            raise InputError(f"{self.bits} bits: give 8 or 4")
        if self.bits == 8 and (self.groupsize is not None or self.asymmetric):
            raise InputError("int8 has one scale a row and no zeros: leave group size and asymmetric out")
        if self.bits == 4 and self.groupsize not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise InputError(f"the group size is {self.groupsize}: give one of {sizes}")

    def __str__(self) -> str:
        return "int8" if self.bits == 8 else f"int4.g{self.groupsize}"

    def __call__(self, weight: Tensor) -> Quantized:
        """Raises InputError where a number of `weight` is none (NaN) or infinite."""
        if not weight.isfinite().all():
            raise InputError("the weight has infinite numbers or NaN: quantize a sound checkpoint")
        zeros = None
        if self.bits == 8:
            codes, scales = quantize_int8(weight)
        elif self.asymmetric:
            codes, scales, zeros = quantize_int4_asymmetric(weight, self.groupsize)
        else:
            codes, scales = quantize_int4(weight, self.groupsize)
        K = weight.shape[1]
        return Quantized(pack(codes, self.bits), scales, zeros, self.bits, self.groupsize or K, K)
