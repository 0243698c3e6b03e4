"""Kernels for decoding on a CPU, written by hand: C++ where it can be built, torch's own operators elsewhere.

- `linear(x, weight)` is `F.linear` for any number of rows, and reads the weights at the speed of the memory for few.
- `quantized_linear(x, weight, N)` is x W^T for a weight in 8 or 4 bits, as `fast.quantize` packs it.
- `decode_attention(q, keys, values, input_pos)` attends from a few positions to a cache of many.
- `layers(...)` is any number of whole layers for few tokens, all of those and what lies between them, in one call.
- `read_all(x)` reads the memory of a tensor once: the speed limit of the others.
- `large_pages(x)` has new memory in pages of 2 MB where the system allows it.
- `ready()` builds or loads the C++ on first use and says whether there is any; LLAMABOOK_KERNELS=0 switches it off.

Importing this package builds nothing. Everything here can be compiled by torch.compile in one graph.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llamabook.fast.kernels import build

__all__ = [
    "MAX_QUERIES", "MAX_ROWS", "decode_attention", "large_pages", "layers", "linear", "quantized_linear", "read_all", "ready",
    "rounds_activations", "takes_layer",
]  # fmt: skip

MAX_ROWS = 8  # with more, F.linear's blocks reuse what they read, and win
MAX_QUERIES = 8  # new positions per row of the batch; prefill has more, and other kernels
DTYPES = (torch.float32, torch.bfloat16)

_loaded: bool | None = None  # not tried yet
_loading = threading.Lock()


@torch.compiler.assume_constant_result
def ready() -> bool:
    """Whether the C++ kernels can be used here; the first call builds or loads them.

    Where they can't, one line on stderr says why, once. torch.compile asks while it traces, and keeps the answer.
    """
    global _loaded
    with _loading:
        if _loaded is None:
            _loaded = _load()
    return _loaded


def _load() -> bool:
    if os.environ.get("LLAMABOOK_KERNELS") == "0":
        return False
    try:
        torch.ops.load_library(build.build(build.SOURCE))
    except (build.NoKernels, OSError) as error:
        reason = " ".join(str(error).split())
        print(f"llamabook: no CPU kernels, so torch's own operators decode, slower: {reason}", file=sys.stderr)
        return False
    torch.library.register_fake("llamabook::linear", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))
    torch.library.register_fake("llamabook::quantized_linear", lambda x, weight, N, exact: x.new_empty(x.shape[0], N))
    torch.library.register_fake("llamabook::decode_attention", lambda q, keys, values, input_pos: torch.empty_like(
        q, memory_format=torch.contiguous_format))  # fmt: skip
    torch.library.register_fake("llamabook::layers", lambda x, *others: torch.empty_like(
        x, memory_format=torch.contiguous_format))  # fmt: skip
    torch.library.register_fake("llamabook::read_all", lambda x: x.new_empty(1, dtype=torch.int32))
    return True


def _ours(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on the CPU, of one known dtype, and nobody wants their gradients."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in DTYPES
        and all(tensor.dtype == first.dtype for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and ready()
    )


def _heads(*tensors: Tensor) -> bool:
    """Whether the C++ can read the last dimension of these, head_dim: some whole vectors, without gaps."""
    return all(tensor.shape[-1] % 16 == 0 and tensor.shape[-1] <= 256 and tensor.stride(-1) == 1 for tensor in tensors)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, as `F.linear`: x (..., K) and weight (N, K), of the same dtype, to (..., N)."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if not 0 < rows <= MAX_ROWS or weight.stride(-1) != 1 or not _ours(x, weight):
        return F.linear(x, weight)
    y = torch.ops.llamabook.linear(x.reshape(rows, x.shape[-1]), weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@torch.compiler.assume_constant_result
def rounds_activations() -> bool:
    """Whether `quantized_linear` rounds x to 8 bits on this CPU, unless `exact` is asked for: it can with AVX-512 VNNI."""
    return ready() and torch.ops.llamabook.rounds()


def quantized_linear(x: Tensor, weight: list[Tensor], N: int, exact: bool = False) -> Tensor:
    """x W^T for x (..., K), float32 or bfloat16, and a weight of N rows in codes, to (..., N).

    weight: codes, scales and perhaps zeros, as `fast.quantize.packing.Blocks` lays them out. Where the CPU multiplies 8-bit numbers
    fastest, x is rounded to them, with a scale for each 32; `exact` leaves x as it is. To be called where `ready`.
    """
    y = torch.ops.llamabook.quantized_linear(x.reshape(-1, x.shape[-1]), weight, N, exact)
    return y.reshape(*x.shape[:-1], N)


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, input_pos: Tensor) -> Tensor:
    """softmax(q K^T / sqrt(d)) V, where the query at position p of a row sees the slots 0..p of that row.

    Shape: q (B, T, H, d), keys and values (B, G, S, d), of one dtype, input_pos (B, T), to (B, T, H, d).
    Query head h reads group h // (H / G). What no query of a row may see is not read by the C++, so it does not
    matter what is there. Every position must be in 0..S - 1.
    """
    if (
        q.shape[1] <= MAX_QUERIES
        and _heads(q, keys, values)
        and _ours(q, keys, values)
    ):
        return torch.ops.llamabook.decode_attention(q, keys, values, input_pos)
    slots = torch.arange(keys.shape[2], device=keys.device)
    visible = slots <= input_pos[:, None, :, None]  # (B, 1, T, S)
    context = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=visible, enable_gqa=True)
    return context.transpose(1, 2)  # (B, H, T, d) -> (B, T, H, d)


def takes_layer(x: Tensor, keys: Tensor, values: Tensor, matrices: Sequence[list[Tensor]], F: int) -> bool:
    """Whether `layers` computes for these tokens (B, T, D), cache, matrices and F hidden numbers; where not, its parts do."""
    return (
        0 < x.shape[0] * x.shape[1] <= MAX_ROWS
        and x.shape[2] % 16 == F % 16 == 0
        and all(matrices)
        and _heads(keys, values)
        and _ours(x, keys, values, *(matrix[0] for matrix in matrices if len(matrix) == 1))
    )


def layers(
    x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, keys: list[Tensor], values: list[Tensor], weights: list[Tensor],
    heads: int, F: int, eps: float, exact: bool = False,
) -> Tensor:  # fmt: skip
    """What some `fast.model.Block` in turn compute of their weights, for few tokens; the cache has theirs in it afterwards.

    Between its products a layer does so little that calling operators for it takes longer than doing it: while
    the weights stream by, all that Python needs for a call is driven out of the processor's caches.
    keys, values: one tensor a layer. weights: of each layer norm1, wqkv, wo, norm2, w13 and w2, in one list; a quantized
    matrix is its two or three tensors.
    Shape: as `Block`, with `heads` query heads and F hidden numbers. To be called where `takes_layer` for each layer.
    """
    return torch.ops.llamabook.layers(x, cos, sin, input_pos, keys, values, weights, heads, F, eps, exact)


def read_all(x: Tensor) -> Tensor:
    """Read the memory of `x` once and return one number of it, so that nobody can leave the reading out."""
    if x.device.type == "cpu" and x.is_contiguous() and ready():
        return torch.ops.llamabook.read_all(x)
    whole = x.reshape(-1).view(torch.int32) if x.numel() * x.element_size() % 4 == 0 else x
    return whole.sum()


LARGE = 2 * 1024**2  # bytes of a large page
MADV_HUGEPAGE = 14  # from Linux's sys/mman.h


def large_pages(x: Tensor) -> Tensor:
    """`x`, whose memory, if nobody has written there yet, will lie in pages of 2 MB: fewer to look up when it is read.

    Only on Linux, and for the whole large pages within tensors on the CPU; elsewhere it changes nothing.
    """
    if sys.platform == "linux" and x.device.type == "cpu":
        first, end = -(-x.data_ptr() // LARGE), (x.data_ptr() + x.nbytes) // LARGE
        if end > first:
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(first * LARGE), ctypes.c_size_t((end - first) * LARGE), MADV_HUGEPAGE)
    return x
