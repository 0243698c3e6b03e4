"""From the notebook ch05_quantization_speculative/02_int4_in_groups.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP_SIZES = (32, 64, 128, 256)  # how many columns may share a scale


def in_groups(weight: Tensor, groupsize: int) -> Tensor:
    """The columns of (N, K) in groups, (N, groups, groupsize), float32.

    A short last group repeats its last column.
    """
    short = -weight.shape[1] % groupsize
    whole = F.pad(weight.float(), (0, short), mode="replicate") if short else weight.float()
    return whole.unflatten(1, (-1, groupsize))


def codes_of(groups: Tensor, scales: Tensor, zeros: Tensor, K: int) -> Tensor:
    """The nearest codes (N, K), int8 from -8 to 7, of groups (N, groups, groupsize).

    scales and zeros: (N, groups).
    """
    codes = (groups - zeros.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)
    return codes.round().clamp(-8, 7).flatten(1)[:, :K].to(torch.int8)


def quantize_int4(weight: Tensor, groupsize: int = 32) -> tuple[Tensor, Tensor]:
    """Codes (N, K), int8 from -8 to 7, and the scale of each row and group (N, groups), bfloat16.

    Sixteen codes are -8 to 7, one more below zero than above. So a group's largest number, whatever its sign,
    becomes -8, by a scale of the other sign: steps of an eighth of it, where 7 would make them a seventh.
    Source: ggml's Q4_0.
    """
    groups = in_groups(weight, groupsize)  # (N, groups, groupsize)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)  # with its sign
    scales = (largest / -8).bfloat16()  # (N, groups)
    scales = torch.where(scales == 0, 1, scales)
    return codes_of(groups, scales, torch.zeros_like(scales), weight.shape[1]), scales


def quantize_int4_asymmetric(weight: Tensor, groupsize: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K), int8 from -8 to 7, scales and zeros (N, groups), bfloat16.

    The weight is about codes * scales + zeros: sixteen codes, from a group's least number to its largest one.
    Source: gpt-fast's int4, which keeps its zeros in the same way.
    """
    groups = in_groups(weight, groupsize)
    least, most = groups.amin(dim=-1), groups.amax(dim=-1)  # (N, groups)
    scales = ((most - least) / 15).bfloat16()
    zeros = (least + 8 * scales.float()).bfloat16()
    scales = torch.where(scales == 0, 1, scales)  # a group of equal numbers is its zero
    return codes_of(groups, scales, zeros, weight.shape[1]), scales, zeros


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words int32 (N, ceil(K * bits / 32)) of codes (N, K), int8 from -2^(bits - 1) up.

    A word has 4 codes of 8 bits or 8 of 4, the first in its lowest bits, each raised by 2^(bits - 1) so that
    none is negative. What fills up the last word means 0.
    """
    codes = F.pad(codes, (0, -codes.shape[1] % (32 // bits)))
    raised = codes.view(torch.uint8) + 2 ** (bits - 1)  # modulo 256
    if bits == 4:
        raised = raised[:, ::2] | raised[:, 1::2] << 4  # two to a byte
    return raised.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int, K: int) -> Tensor:
    """The codes (N, K), int8 from -2^(bits - 1) up, in words int32 (N, ceil(K * bits / 32))."""
    raised = words.contiguous().view(torch.uint8)
    if bits == 4:
        raised = torch.stack([raised & 15, raised >> 4], dim=-1).flatten(1)
    return (raised[:, :K] - 2 ** (bits - 1)).view(torch.int8)
