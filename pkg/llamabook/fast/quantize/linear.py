"""From the notebook ch05_quantization_speculative/02_int4_in_groups.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import torch
from torch import Tensor, nn

from llamabook.fast.quantize.packing import Blocks, choose
from llamabook.fast.quantize.weight import Quantized, Scheme


class QuantizedLinear(nn.Module):
    """x W^T without a bias, of a weight in few bits: it stands where `fast.linear.Linear` does.

    Args: the widths K and N; dtype, not used: x has its own; scheme, by which `set_weight` quantizes; exact,
    whether x is never rounded to 8 bits, which the CPU's fast kernel does. Shape: (..., K) to (..., N).
    """

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype | None = None,
        scheme: Scheme | None = None, exact: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.exact = scheme, exact
        for name in ("codes", "scales", "zeros"):
            self.register_buffer(name, None, persistent=False)

    def set_weight(self, weight: Tensor) -> None:
        """Quantize the matrix (N, K) and keep that. Raises InputError."""
        if weight.device.type != "meta":
            self.set_quantized(self.scheme(weight.detach()))

    def set_quantized(self, weight: Quantized) -> None:
        """Take a quantized matrix (N, K), packed for the device that it is on."""
        self.way = choose(weight, self.exact)
        self.parts = self.way.pack(weight)  # the buffers that there are, in a list
        self.codes, self.scales, self.zeros = [*self.parts, None][:3]

    def _apply(self, fn, recurse=True):
        return self  # `to` and its like leave a packed weight as it is

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.codes, self.scales, self.zeros) if tensor is not None]

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x, self.tensors())

    def for_layer(self) -> list[Tensor]:
        """What `kernels.layers` reads of it; nothing where it is packed for another operator."""
        return self.parts if isinstance(self.way, Blocks) else []
