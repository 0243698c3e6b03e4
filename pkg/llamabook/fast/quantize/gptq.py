"""From the notebook ch05_quantization_speculative/03_gptq.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from llamabook.errors import InputError
from llamabook.fast.quantize.int4 import pack
from llamabook.fast.quantize.weight import Quantized, Scheme, stack

TILE = 2048  # columns of a Hessian that are added up at a time


class Hessian:
    """H = 2/n times the sum of x x^T over the n inputs x of a linear, (K, K): what errors in them cost.

    A row of the weight that is off by e (K,) puts its output off by e x, in the mean square by e H e^T / 2.
    Args: K, the width of the inputs; dtype, in which they are added up.
    """

    def __init__(self, K: int, dtype: torch.dtype = torch.float32):
        self.sum, self.n = torch.zeros(K, K, dtype=dtype), 0

    def add(self, x: Tensor) -> None:
        """Count the inputs x (..., K). Raises InputError for another width, infinite numbers or NaN."""
        K = len(self.sum)
        if x.shape[-1] != K:
            raise InputError(f"the inputs are {x.shape[-1]} wide, the Hessian {K}: give those of one linear")
        x = x.reshape(-1, K).to(self.sum.dtype)
        if not x.isfinite().all():
            raise InputError("the inputs have infinite numbers or NaN: calibrate a sound checkpoint")
        self.n += len(x)
        for start in range(0, K, TILE):  # up to the diagonal: the other half is the same
            end = start + TILE
            self.sum[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])

    def matrix(self) -> Tensor:
        """H (K, K). Raises InputError if no input was counted."""
        if self.n == 0:
            raise InputError("no inputs were counted: calibrate with one text at least")
        half = self.sum.tril()
        return half.add_(half.tril(-1).T).mul_(2 / self.n)


def inverse_factor(hessian: Tensor, percdamp: float = 0.01) -> Tensor:
    """U (K, K), float32, upper triangular with U^T U = (H + damping)^-1.

    The damping, `percdamp` times the mean of H's diagonal, is added to the diagonal. Where H stays singular,
    ten times as much is tried, and a line on stderr says so. Raises InputError where nothing helps.
    Source: Frantar et al., 2022, section 3, step 3.
    """
    H = hessian.flip(0, 1)  # L L^T of this, turned round again, is R R^T = H, and U = R^-1
    mean = H.diagonal().mean().item() or 1.0
    diagonal = H.diagonal().clone()
    for damp in (percdamp, *(max(percdamp, 1e-4) * 10**power for power in range(1, 5))):
        H.diagonal().copy_(diagonal + damp * mean)
        L, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            if damp != percdamp:
                print(f"llamabook: inputs depend on each other: percdamp becomes {damp:g}", file=sys.stderr)
            R = L.flip(0, 1)
            return torch.linalg.solve_triangular(R, torch.eye(len(H)).to(H), upper=True).float()
    raise InputError("the Hessian has no inverse, however much it is damped: give one of `Hessian`")


Grid = tuple[Tensor, Tensor]  # a group's scales and zeros, each (N,), float32


def column_blocks(K: int, groupsize: int, blocksize: int) -> list[tuple[int, int]]:
    """Where blocks of columns begin and end: at most `blocksize` of them, whole groups or a part of one."""
    whole = max(blocksize // groupsize, 1) * groupsize
    spans = [(first, min(first + whole, K)) for first in range(0, K, whole)]
    return [(a, min(a + blocksize, end)) for first, end in spans for a in range(first, end, blocksize)]


def grid_of(columns: Tensor, scheme: Scheme) -> Grid:
    """The grid that `scheme` finds for one group of columns (N, g)."""
    found = scheme(columns)
    scales = found.scales[:, 0].float()
    return scales, torch.zeros_like(scales) if found.zeros is None else found.zeros[:, 0].float()


def round_column(w: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest codes of a column w (N,), and the numbers that they stand for; both float32."""
    scales, zeros = grid
    most = 2 ** (bits - 1) - 1
    codes = ((w - zeros) / scales).round().clamp(-8 if bits == 4 else -most, most)
    return codes, codes * scales + zeros


def round_block(
    W: Tensor, U: Tensor, grid_at: Callable[[int], Grid], bits: int
) -> tuple[Tensor, Tensor]:
    """Codes (b, N), int8, and errors (b, N) of a block: column after column, the rest making up for it.

    Args: W (b, N), the columns as rows, which are changed; U (b, b), the block's part of `inverse_factor`;
    grid_at(j), asked when the turn of column j comes.
    """
    codes, errors = torch.empty(W.shape, dtype=torch.int8), torch.empty_like(W)
    for j in range(len(W)):
        codes[j], rounded = round_column(W[j], grid_at(j), bits)
        errors[j] = (W[j] - rounded) / U[j, j]
        W[j + 1 :] -= U[j, j + 1 :, None] * errors[j]
    return codes, errors


def round_matrix(
    weight: Tensor, U: Tensor, scheme: Scheme, order: Tensor | None, blocksize: int
) -> Quantized:
    """Quantize a matrix (N, K) column by column, in `order` (K,), to which U belongs; None: first to last."""
    K, groupsize = weight.shape[1], scheme.groupsize or weight.shape[1]
    W, places, grids = weight.float().T.contiguous(), torch.arange(K), []  # (K, N): a column lies together
    if order is not None:  # a group's columns come one here, one there: its grid is found before
        grids = [grid_of(group, scheme) for group in W.T.split(groupsize, dim=1)]
        W, places = W[order], order

    def grid_at(j: int) -> Grid:
        if order is None and j % groupsize == 0:
            grids.append(grid_of(W[j : j + groupsize].T, scheme))
        return grids[int(places[j]) // groupsize]

    codes = torch.empty(W.shape, dtype=torch.int8)
    for a, b in column_blocks(K, groupsize, blocksize):
        codes[places[a:b]], errors = round_block(W[a:b], U[a:b, a:b], lambda j: grid_at(a + j), scheme.bits)
        W[b:].addmm_(U[a:b, b:].T, errors, alpha=-1)  # all columns behind the block at once
    scales, zeros = (torch.stack(tables, dim=1).bfloat16() for tables in zip(*grids))
    zeros = zeros if scheme.asymmetric else None
    return Quantized(pack(codes.T, scheme.bits), scales, zeros, scheme.bits, groupsize, K)


def check_settings(percdamp: float, blocksize: int) -> None:
    """Raises InputError for settings that `gptq` can't work with."""
    if type(percdamp) not in (int, float) or not 0 <= percdamp < math.inf:
        raise InputError(f"percdamp is {percdamp!r}: give a number from 0 up, as 0.01")
    if type(blocksize) is not int or blocksize < 1:
        raise InputError(f"blocksize is {blocksize!r}: give a whole number from 1 up")


ROWS = 8192  # of a matrix that are rounded at a time


def gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme, *,
    percdamp: float = 0.01, blocksize: int = 128, act_order: bool = False,
) -> Quantized:  # fmt: skip
    """Quantize a matrix (N, K) so that its outputs stay close on the inputs behind `hessian` (K, K).

    Args: percdamp, as of `inverse_factor`; blocksize, how many columns are finished before those behind them
    change: it costs time, no more; act_order, whether the columns with the largest inputs come first.
    Raises InputError. Source: Frantar et al., 2022, algorithm 1.
    """
    check_settings(percdamp, blocksize)
    if weight.dim() != 2 or tuple(hessian.shape) != (weight.shape[1],) * 2:
        shapes = f"{tuple(weight.shape)}, the Hessian {tuple(hessian.shape)}"
        raise InputError(f"the weight is {shapes}: give (N, K) and (K, K)")
    if not hessian.isfinite().all():
        raise InputError("the Hessian has infinite numbers or NaN: calibrate a sound checkpoint")
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    U = inverse_factor(hessian if order is None else hessian[order][:, order], percdamp)
    return stack([round_matrix(rows, U, scheme, order, blocksize) for rows in weight.split(ROWS)])
