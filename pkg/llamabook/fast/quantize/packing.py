"""How a quantized weight lies in the memory of each kind of device, and the product with it there; written by hand.

`choose` finds the first of these that a weight and its device allow:

- `Blocks`: for our C++ kernels, on a CPU;
- `Stock`: for torch's own operators, on a CPU without a compiler and on NVIDIA and AMD GPUs;
- `Plain`: anywhere; the weight is made anew in each product.

Each has `pack`, which makes of a `Quantized` the tensors it reads, once, when the weight is loaded, and is called with
(x, tensors), x (..., K), to give (..., N).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llamabook.errors import LlamaBookError
from llamabook.fast import kernels
from llamabook.fast.quantize.int4 import GROUP_SIZES
from llamabook.fast.quantize.weight import Quantized

TALL, GROUP = 16, 32  # rows of a block, and columns that belong together, as in kernels.cpp
NOTHING = {8: -0x7F7F7F80, 4: -0x77777778}  # the word whose codes all mean 0: bytes of 0x80, or of 0x88
_checked: set[tuple] = set()  # operators that were seen to compute what they should


class Plain:
    """The words as they are. Slow, and right wherever torch runs."""

    rounds = False  # whether it rounds x

    def __init__(self, like: Quantized):
        (self.N, self.K), self.bits, self.groupsize = like.shape, like.bits, like.groupsize

    def pack(self, weight: Quantized) -> list[Tensor]:
        return [tensor for tensor in (weight.words, weight.scales, weight.zeros) if tensor is not None]

    def __call__(self, x: Tensor, tensors: list[Tensor]) -> Tensor:
        words, scales, zeros = [*tensors, None][:3]
        weight = Quantized(words, scales, zeros, self.bits, self.groupsize, self.K)
        return F.linear(x, weight.dequantize().to(x.dtype))


class Blocks(Plain):
    """Rows in blocks of 16, of each row of a block a word in turn: what kernels.cpp reads, from first to last byte."""

    def __init__(self, like: Quantized, exact: bool):
        super().__init__(like)
        self.rounds = not exact and kernels.rounds_activations()

    @staticmethod
    def takes(like: Quantized) -> bool:
        return like.words.device.type == "cpu" and (like.groupsize >= like.K or like.groupsize % GROUP == 0) and kernels.ready()

    def pack(self, weight: Quantized) -> list[Tensor]:
        groups, blocks = weight.scales.shape[1], -(-self.N // TALL)
        columns = -(-self.groupsize // GROUP) * GROUP  # of a group
        width = groups * columns * self.bits // 32
        codes = kernels.large_pages(torch.empty(blocks, width, TALL, dtype=torch.int32))
        codes.fill_(NOTHING[self.bits])
        for first in range(0, blocks, 64):  # few enough to stay in the caches
            rows = weight.words[first * TALL : (first + 64) * TALL]
            whole = len(rows) // TALL
            codes[first : first + whole, : rows.shape[1]] = rows[: whole * TALL].unflatten(0, (-1, TALL)).mT
            if rest := len(rows) % TALL:
                codes[first + whole, : rows.shape[1], :rest] = rows[-rest:].mT
        codes = codes.view(torch.uint8).view(blocks, -1, 4 * TALL)
        codes = codes if self.bits == 8 else codes.unflatten(1, (groups, -1))  # by which the kernel tells them apart
        tables = [table for table in (weight.scales, weight.zeros) if table is not None]
        return [codes, *(F.pad(t, (0, 0, 0, -self.N % TALL)).unflatten(0, (-1, TALL)).mT.contiguous() for t in tables)]

    def __call__(self, x: Tensor, tensors: list[Tensor]) -> Tensor:
        rows = x.reshape(-1, self.K)  # where x has another width, the result does not fit: the C++ knows only the padded one
        rows = rows if x.dtype in kernels.DTYPES else rows.float()
        return kernels.quantized_linear(rows, tensors, self.N, exact=not self.rounds).to(x.dtype).reshape(*x.shape[:-1], self.N)


class Stock(Plain):
    """torch's own operators for codes in bytes and halves of bytes."""

    @staticmethod
    def takes(like: Quantized) -> bool:
        device, (N, K) = like.words.device.type, like.shape
        if like.bits == 8:  # with K % 16 != 0 the CPU's operator reads past the end
            whole = like.zeros is None and like.groupsize >= K  # one scale a row
            return whole and (device == "cuda" or (device == "cpu" and K % 16 == 0))
        if like.groupsize not in GROUP_SIZES:
            return False
        if device == "cpu":
            return N % 16 == 0 and K % like.groupsize == 0
        return device == "cuda" and N % 8 == 0 and K % max(like.groupsize, 128) == 0

    def pack(self, weight: Quantized) -> list[Tensor]:
        codes = weight.codes()
        if self.bits == 8:
            return [codes, weight.scales.flatten()]
        zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
        tables = torch.stack([weight.scales, zeros], dim=-1).transpose(0, 1).contiguous()  # (groups, N, 2)
        if codes.device.type == "cpu":
            return [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1), tables]
        raised = (codes + 8).view(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(raised[:, ::2] << 4 | raised[:, 1::2], 8)
        self.check(weight, [packed, tables])
        return [packed, tables]

    def check(self, weight: Quantized, tensors: list[Tensor]) -> None:
        """Raises LlamaBookError if the operator does not compute the product: its layout is nowhere promised."""
        key = (tensors[0].device, self.bits, self.groupsize, torch.__version__)
        if key not in _checked:
            x = torch.randn(4, self.K, device=tensors[0].device, dtype=torch.bfloat16)
            found, wanted = self(x, tensors).float(), F.linear(x.float(), weight.dequantize())
            if (found - wanted).abs().max() > 0.02 * wanted.abs().max():
                raise LlamaBookError(f"torch {torch.__version__} multiplies int4 otherwise on {key[0]}: load with device='cpu'")
            _checked.add(key)

    def __call__(self, x: Tensor, tensors: list[Tensor]) -> Tensor:
        codes, tables = tensors
        rows = x.reshape(-1, self.K).contiguous()
        if self.bits == 8 and x.device.type == "cpu":
            y = torch.ops.aten._weight_int8pack_mm(rows, codes, tables.to(x.dtype))
        elif self.bits == 8:
            y = F.linear(rows, codes.to(x.dtype)) * tables.to(x.dtype)  # which torch.compile makes one kernel of
        elif x.device.type == "cpu":
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, self.groupsize, tables.to(x.dtype))
        else:
            y = torch.ops.aten._weight_int4pack_mm(rows.bfloat16(), codes, self.groupsize, tables).to(x.dtype)
        return y.reshape(*x.shape[:-1], self.N)


def choose(like: Quantized, exact: bool = False) -> Plain:
    """The way in which weights like this one are kept on their device; exact: one that does not round x."""
    if Blocks.takes(like):
        return Blocks(like, exact)
    return Stock(like) if Stock.takes(like) else Plain(like)
