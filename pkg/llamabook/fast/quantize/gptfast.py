"""The quantized files of gpt-fast, read code by code; written by hand.

`model_int8.pth` has an int8 matrix (N, K) and `scales` (N,) for each linear. `model_int4.g32.pth` and
`model_int4-gptq.g32.pth` have `scales_and_zeros` (groups, N, 2), with which a code q from 0 to 15 means
(q - 8) * scale + zero, and codes that torch's `_convert_weight_to_int4pack` has packed for one kind of processor.
A file does not say for which, but its numbers do: see `find_layout`.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from llamabook.checkpoint.gptfast import config_beside, gptfast_names, split_fused, to_half_split
from llamabook.checkpoint.huggingface import read_tensors
from llamabook.checkpoint.meta import rotated_heads
from llamabook.errors import CheckpointError
from llamabook.fast.quantize.files import Kind, Stored, store
from llamabook.fast.quantize.int4 import GROUP_SIZES, pack
from llamabook.fast.quantize.weight import Quantized
from llamabook.llama2 import head_dim_of, interleaved_to_half_split

SAMPLE = 2**18  # groups that are looked at to find out the layout
CLEAR = 0.1  # by how much of all groups the right layout must be ahead


# ---- where torch puts the codes


def nibbles(words: Tensor) -> Tensor:
    """The eight numbers from 0 to 15 in each int32, lowest bits first: (...) to (..., 8), uint8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & 15).to(torch.uint8)


def from_nvidia(words: Tensor, N: int, K: int) -> Tensor:
    """Codes (N, K) from words (N / 8, K / 16 I, 32, I / 2), which lie as the B matrix of an m16n8k16 tensor core wants.

    A word has numbers of one row and of 32 columns every fourth pair: lane 4 r + c has row r, and of pair c + 4 i
    its two numbers in the nibbles i and i + 4.
    """
    tiles, steps, _, inner = words.shape
    parts = nibbles(words).view(tiles, steps, 8, 4, inner, 2, 4)  # tile, step, row, c, inner, which of two, i
    return parts.permute(0, 2, 1, 4, 6, 3, 5).reshape(N, K)


def from_amd(words: Tensor, N: int, K: int) -> Tensor:
    """Codes (N, K) from words of the same shape, which an AMD GPU reads otherwise: 16 rows and 64 lanes to a tile.

    Lane 16 h + r has row r, and of 16 columns pairs 2 h and 2 h + 1.
    """
    tiles, steps, _, inner = words.shape
    parts = nibbles(words).reshape(tiles // 2, steps, 4, 16, inner, 2, 2, 2)  # tile, step, h, row, inner, of two, half, pair
    return parts.permute(0, 3, 1, 4, 6, 2, 7, 5).reshape(N, K)


def from_cpu(tall: int, halves: bool, words: Tensor, N: int, K: int) -> Tensor:
    """Codes (N, K) from bytes in blocks of `tall` rows, of which each column lies together.

    A byte has the numbers of two rows, the first in its low nibble: halves, of row i and i + tall / 2; else, and in a
    last block that is not full, of 2 i and 2 i + 1.
    """
    flat, whole = words.contiguous().view(torch.uint8).flatten(), N // tall * tall
    blocks = []
    for size, rows, apart in ((tall, whole, halves), (N - whole, N - whole, False)):
        if rows:
            part, flat = flat[: rows * K // 2].view(-1, K, size // 2), flat[rows * K // 2 :]
            pair = torch.stack([part & 15, part >> 4], dim=2 if apart else 3)
            blocks.append(pair.flatten(2).transpose(1, 2).reshape(rows, K))
    return torch.cat(blocks)


TALL = (64, 32, 16)  # a block's rows, by the vectors of the CPU
LAYOUTS = {"NVIDIA": from_nvidia, "AMD": from_amd} | {f"CPU, {tall}": partial(from_cpu, tall, False) for tall in TALL}


def this_cpu() -> dict:
    """The one layout that torch gives int4 weights on this machine's CPU, by its name; none if it is of no known kind."""
    codes = torch.arange(128 * 32, dtype=torch.int32).view(128, 32) * 7 // 3 % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError):
        return {}
    for tall in TALL:
        for halves in (True, False):
            if torch.equal(from_cpu(tall, halves, packed, *codes.shape).int(), codes):
                return {f"CPU, {tall}": partial(from_cpu, tall, halves)}
    return {}


def spanned(codes: Tensor, groupsize: int) -> Tensor:
    """The share of whole groups whose codes reach from 0 to 15, as rounding between least and largest makes them."""
    groups = codes[:, : codes.shape[1] // groupsize * groupsize].unflatten(1, (-1, groupsize))
    return ((groups.amin(-1) == 0) & (groups.amax(-1) == 15)).float().mean()


def find_layout(where: Path, matrices: list["Packed"]) -> Callable:
    """What unpacks the matrices of one file. Raises CheckpointError where it is not clear.

    Read rightly, nearly every group has both the code 0 and the code 15. Read wrongly, a group is made of pieces of
    others, and about half of them have. What this can't tell is how a CPU orders the rows of a block: its file is read
    as gpt-fast would read it, on a CPU of the kind that wrote it.
    """
    shares, seen = dict.fromkeys(LAYOUTS, 0.0), 0
    for matrix in sorted(matrices, key=lambda matrix: matrix.N * matrix.K):
        groups = matrix.N * (matrix.K // matrix.groupsize)
        for name in shares if groups else ():
            fits = name.startswith("CPU") or (matrix.words.ndim == 4 and (name != "AMD" or matrix.N % 16 == 0))
            shares[name] += groups * float(spanned(matrix.codes(LAYOUTS[name]), matrix.groupsize)) if fits else 0
        seen += groups
        if seen > SAMPLE:
            break
    (best, name), (second, _) = sorted(((share / max(seen, 1), name) for name, share in shares.items()), reverse=True)[:2]
    if best < second + CLEAR:
        what = "does not show for which kind of processor torch has packed its int4 weights"
        raise CheckpointError(f"{where} {what}: quantize the original with `llamabook quantize`")
    known = LAYOUTS if not name.startswith("CPU") else this_cpu()
    if name not in known:
        what = "has int4 weights that torch has packed for another kind of CPU"
        raise CheckpointError(f"{where} {what}: convert it there, or quantize the original with `llamabook quantize`")
    return known[name]


class Packed:
    """One int4 matrix of a file: words, scales_and_zeros (groups, N, 2), and K, which may be less than they are wide."""

    def __init__(self, words: Tensor, tables: Tensor, K: int):
        self.words, self.tables, self.K = words, tables, K
        self.N, self.wide = tables.shape[1], width(words, tables.shape[1])
        self.groupsize = self.wide // len(tables)

    def codes(self, layout: Callable) -> Tensor:
        """The codes (N, K), uint8 from 0 to 15."""
        return layout(self.words, self.N, self.wide)[:, : self.K]

    def quantized(self, layout: Callable) -> Quantized:
        codes = (self.codes(layout) - 8).view(torch.int8)  # modulo 256
        scales, zeros = self.tables[: -(-self.K // self.groupsize)].permute(2, 1, 0).contiguous()  # two of (N, groups)
        return Quantized(pack(codes, 4), scales, zeros, 4, self.groupsize, self.K)


def width(words: Tensor, N: int) -> int:
    """How many columns packed words of N rows have, 0 if they are of no known shape."""
    if words.dtype == torch.uint8 and words.ndim == 2 and len(words) == N:
        return 2 * words.shape[1]
    if words.dtype == torch.int32 and words.ndim == 4 and len(words) * 8 == N and words.shape[2] == 32:
        return words.shape[1] * words.shape[3] * 32
    return 0


# ---- the file


def read_gptfast(path: Path, config: dict | None = None) -> Stored:
    """The quantized checkpoint in gpt-fast's file `path`; `config` instead of what lies beside it. Raises CheckpointError."""
    tensors = read_tensors(path)
    eight = {name.removesuffix(".scales"): name for name in tensors if name.endswith(".scales")}
    four = {name.removesuffix(".scales_and_zeros"): name for name in tensors if name.endswith(".scales_and_zeros")}
    if eight and four:
        raise CheckpointError(f"{path} has matrices in 8 and in 4 bits, as gpt-fast makes none: download it again")
    tables = {stem: tensors.pop(name) for stem, name in (eight | four).items()}
    words = {stem: tensors.pop(f"{stem}.weight", torch.empty(0)) for stem in tables}
    sizes = {stem: shape_of(path, stem, words[stem], tables[stem]) for stem in tables}
    seen = tensors | {f"{stem}.weight": torch.empty(size, device="meta") for stem, size in sizes.items()}
    config = config_beside(path, seen) if config is None else config
    sizes = {stem: (N, real_width(path, stem, K, config)) for stem, (N, K) in sizes.items()}
    if eight:
        kind = Kind(8, None, method="rtn")
        made = {stem: lambda stem=stem: from_int8(words[stem], tables[stem]) for stem in tables}
    else:
        matrices = {stem: Packed(words[stem], tables[stem], K) for stem, (_, K) in sizes.items()}
        groups = {matrix.groupsize for matrix in matrices.values()}
        if len(groups) > 1 or not groups <= set(GROUP_SIZES):
            raise CheckpointError(f"{path} has groups of {', '.join(map(str, sorted(groups)))} columns: download it again")
        layout = find_layout(path, list(matrices.values()))
        kind = Kind(4, groups.pop(), own=True, method="gptq" if "gptq" in path.name else "rtn")
        made = {stem: partial(matrix.quantized, layout) for stem, matrix in matrices.items()}
    return split(path, config, kind, tensors, sizes, made)


def shape_of(path: Path, stem: str, words: Tensor, table: Tensor) -> tuple[int, int]:
    """Rows and columns of a quantized matrix, as wide as it is stored. Raises CheckpointError if its parts do not fit."""
    if table.ndim == 1:
        N, K = words.shape if words.ndim == 2 and words.dtype == torch.int8 else (0, 0)
        fits = table.shape == (N,)
    else:
        N = table.shape[1] if table.ndim == 3 and table.shape[2] == 2 else 0
        K = width(words, N)
        fits = len(table) and K % len(table) == 0
    if not (N and K and fits and table.is_floating_point()):
        what = f"{stem}.weight is {tuple(words.shape)} in {words.dtype}, and its scales {tuple(table.shape)}"
        raise CheckpointError(f"{path}: {what}, which do not fit together: download it again")
    return N, K


def real_width(path: Path, stem: str, stored: int, config: dict) -> int:
    """K, the columns without those that gpt-fast fills up to a multiple of 1024. Raises CheckpointError."""
    part = stem.rpartition(".")[2]
    heads = config["n_heads"] * head_dim_of(config)
    K = {"wo": heads, "w2": config["hidden_dim"]}.get(part, config["emb_dim"])
    if stored not in (K, -(-K // 1024) * 1024):
        what = f"{stem}.weight has {stored} columns, the configuration wants {K}"
        raise CheckpointError(f"{path}: {what}: use the configuration that belongs to the weights")
    return K


def from_int8(codes: Tensor, scales: Tensor) -> Quantized:
    return Quantized(pack(codes, 8), scales[:, None], None, 8, codes.shape[1], codes.shape[1])


def split(path: Path, config: dict, kind: Kind, tensors: dict, sizes: dict, made: dict) -> Stored:
    """A `Stored` of gpt-fast's matrices, wqkv cut into three, the rows of queries and keys in our order."""
    names = gptfast_names(config["n_layers"])
    stand = {f"{stem}.weight": torch.empty(size, dtype=config["dtype"], device="meta") for stem, size in sizes.items()}
    seen = split_fused(path, tensors | stand)
    one = lru_cache(maxsize=1)(lambda stem: made[stem]())  # three parts of one matrix come one after the other
    matrices = {}
    for stem in made:
        parts, first = [f"{stem}.weight"], 0
        if stem.endswith("wqkv"):
            parts = [f"{stem.removesuffix('wqkv')}{part}.weight" for part in ("wq", "wk", "wv")]
        for part in parts:
            heads = rotated_heads(names[part], config) if part in names else 0
            matrices[part] = partial(rows_of, one, stem, first, first + len(seen[part]), heads)
            first += len(seen[part])
    dense = {
        name: to_half_split(names[name], weight, config) if name in names and name not in matrices else weight
        for name, weight in seen.items()
    }
    return store(path, config, kind, dense, matrices, gptfast_names)


def rows_of(one, stem: str, first: int, end: int, heads: int) -> Quantized:
    """Rows `first` to `end` of the matrix that `one(stem)` makes, those of `heads` heads in our order."""
    rows = one(stem).rows(first, end)
    return rows.map(lambda tensor: interleaved_to_half_split(tensor, heads)) if heads else rows
