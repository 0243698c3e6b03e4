"""From the notebook ch05_quantization_speculative/01_int8_weight_only.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, K), int8 from -127 to 127, and the scale of each row (N, 1), bfloat16.

    The weight is about codes * scales. A row's largest number, without its sign, becomes 127; a row of zeros
    has the scale 1.
    Source: absmax quantization per output channel, as in LLM.int8() (Dettmers et al. 2022, section 2).
    """
    weight = weight.float()
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()  # (N, 1)
    scales = torch.where(scales == 0, 1, scales)
    codes = (weight / scales.float()).round().clamp(-127, 127)
    return codes.to(torch.int8), scales
