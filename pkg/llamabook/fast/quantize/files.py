"""Quantized checkpoints on disk, written by hand: `quantize` writes them, `read_quantized` reads them.

The format is that of the library compressed-tensors, by the name "pack-quantized": a Hugging Face folder where a matrix
NAME.weight (N, K) is three tensors, so that transformers and vLLM can read it.

- NAME.weight_packed (N, ceil(K * bits / 32)) int32, the words of `Quantized`;
- NAME.weight_scale (N, groups) bfloat16;
- NAME.weight_shape (2,) int64, N and K.

config.json says in its "quantization_config" how many bits there are and what shares a scale. The token table and the
norms stay as they were, and a tied head becomes a matrix of its own: quantized, it is the table no longer.

Two things are ours alone. Asymmetric matrices have one tensor more, NAME.weight_zero (N, groups) bfloat16, which no
other library knows; config.json then has a key more in "weights", at which compressed-tensors refuses what it would
read wrong. And a last group may be short, where it wants groups to divide K.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import copyfile

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llamabook import __version__
from llamabook.checkpoint import load_model, recognize
from llamabook.checkpoint.convert import check_space, companions_of, token_ids, whole
from llamabook.checkpoint.huggingface import (
    build_llama,
    check_layers,
    check_shapes,
    choose_dtype,
    fill,
    huggingface_names,
    match_names,
    read_config,
    read_object,
    read_weights,
    to_config,
    write_json,
)
from llamabook.checkpoint.meta import build_empty
from llamabook.checkpoint.plain import plain_names
from llamabook.checkpoint.streaming import SHARD_BYTES, TensorWriter, each_weight
from llamabook.errors import CheckpointError, InputError
from llamabook.fast.linear import Linear
from llamabook.fast.model import Transformer, fixed, gathered
from llamabook.fast.quantize.int4 import GROUP_SIZES, unpack
from llamabook.fast.quantize.linear import QuantizedLinear
from llamabook.fast.quantize.weight import Quantized, Scheme, stack

KEY = "quantization_config"
METHOD, FORMAT = "compressed-tensors", "pack-quantized"
BLOCK = 2**18  # numbers of a matrix that are quantized at a time, few enough to stay in the caches


# ---- what config.json says


def to_quantization_config(scheme: Scheme, method: str = "rtn", ignore: list[str] | None = None) -> dict:
    """What config.json says of matrices that `scheme` describes.

    Args: method, how they came about, "rtn" for rounding to nearest or "gptq"; ignore, the names of matrices that stayed
    as they were.
    """
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": not scheme.asymmetric,
        "strategy": "channel" if scheme.groupsize is None else "group",
        "group_size": scheme.groupsize,
        "dynamic": False,
    } | ({"float_zeros": True} if scheme.asymmetric else {})
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore or [],
        "kv_cache_scheme": None,
        "llamabook": {"version": __version__, "method": method},  # others pass over it
    }


@dataclass(frozen=True)
class Kind:
    """How the matrices of a folder are quantized: the bits of a code, and the columns of a group, None for all.

    own: our own zeros belong to them; zeros: the integers of compressed-tensors do.
    """

    bits: int
    groupsize: int | None
    own: bool = False
    zeros: bool = False
    method: str = "rtn"

    def __str__(self) -> str:
        bits = f"int{self.bits}" + ("-gptq" if self.method == "gptq" else "")
        return bits if self.groupsize is None else f"{bits}.g{self.groupsize}"


def read_kind(file: Path, said: dict) -> Kind:
    """What the quantization_config in `file` asks for. Raises CheckpointError where we don't read that."""

    def check(fine: bool, what: str) -> None:
        if not fine:
            raise CheckpointError(
                f"{file} asks for quantized weights ({KEY}: {what[:60]}), and we read int4 and int8 of {METHOD}, {FORMAT}: "
                "give those, or the weights as they were before quantization"
            )

    check(isinstance(said, dict), str(said))
    check(said.get("quant_method") == METHOD, f"quant_method {said.get('quant_method')}")
    groups = said.get("config_groups")
    check(isinstance(groups, dict) and len(groups) == 1, f"config_groups {groups}")
    group = next(iter(groups.values()))
    weights = group.get("weights") if isinstance(group, dict) else None
    check(isinstance(weights, dict), f"config_groups {groups}")
    for where, key, usual in (
        (said, "format", (FORMAT,)), (group, "format", (None, FORMAT)),
        (said, "quantization_status", ("compressed",)), (weights, "type", (None, "int")),
        (said, "kv_cache_scheme", (None,)), (said, "transform_config", (None, {})),
        (group, "input_activations", (None,)), (group, "output_activations", (None,)),
        (weights, "num_bits", (4, 8)), (weights, "strategy", (None, "group", "channel")),
        (weights, "dynamic", (None, False)), (weights, "actorder", (None, False, "weight", "static")),
    ):  # fmt: skip
        check(where.get(key) in usual, f"{key} {where.get(key)}")
    bits, size, symmetric = weights["num_bits"], weights.get("group_size"), weights.get("symmetric", True)
    channel = size in (None, -1) if weights.get("strategy") is None else weights["strategy"] == "channel"
    check(channel or (type(size) is int and size > 0), f"group_size {size}")
    extras = said.get("llamabook") if isinstance(said.get("llamabook"), dict) else {}
    own = weights.get("float_zeros") is True
    return Kind(bits, None if channel else size, own, not own and not symmetric, str(extras.get("method", "rtn")))


def read_quantized_config(file: Path) -> tuple[dict, Kind]:
    """Our configuration of the model that config.json describes, and how it is quantized. Raises CheckpointError."""
    return read_config(file, apart=KEY), read_kind(file, read_object(file)[KEY])


# ---- reading


@dataclass(frozen=True)
class Stored:
    """A quantized checkpoint, nothing of it in memory yet, by our names.

    config and kind; tensors, all of them, mapped, or on the meta device where they are quantized; matrices, which give
    those when they are called.
    """

    where: Path
    config: dict
    kind: Kind
    tensors: dict[str, Tensor]
    matrices: dict[str, Callable[[], Quantized]]


def store(
    where: Path, config: dict, kind: Kind, tensors: dict[str, Tensor], matrices: dict[str, Callable[[], Quantized]],
    naming: Callable[[int], dict[str, str]],
) -> Stored:  # fmt: skip
    """A `Stored` of tensors and matrices by the names that `naming(n_layers)` translates. Raises CheckpointError.

    The tensors that stand for `matrices` are on the meta device.
    """
    tied = config.get("tie_embeddings", False)
    names = naming(check_layers(where, tensors, config))
    head = next(theirs for theirs, ours in names.items() if ours == "out_head.weight")
    if tied and head in matrices:
        raise CheckpointError(f"{where}: the configuration ties the head, which is quantized: set tie_word_embeddings to false")
    names = match_names(where, tensors, names, tied)
    plain = {name: tensors[name] for name in names if name not in matrices}
    config = {**config, "dtype": choose_dtype(where, plain, None, config["dtype"])}
    check_shapes(where, tensors, names, build_empty(where, config, build_llama).state_dict())
    ours = {names[name]: tensors[name] for name in names}
    return Stored(where, config, kind, ours, {names[name]: matrices[name] for name in matrices})


def read_quantized(path: str | Path, config: dict | None = None) -> Stored:
    """The quantized checkpoint in `path`, a folder of ours or of compressed-tensors, or gpt-fast's file.

    `config` is used instead of what stands beside the weights. Raises CheckpointError, or InputError where `path` holds
    no quantized one.
    """
    layout, place = recognize(path)
    if layout == "quantized_gptfast":
        from llamabook.fast.quantize.gptfast import read_gptfast  # which builds on this module

        return read_gptfast(place, config)
    if layout != "quantized":
        raise InputError(f"{path} is not quantized: `llamabook quantize` makes it so")
    file = (place if place.is_dir() else place.parent) / "config.json"
    stated, kind = read_quantized_config(file)
    config, tensors, matrices = config or stated, read_weights(place), {}
    for stem in [name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")]:
        if stem in tensors:
            raise CheckpointError(f"{place} has {stem} and {stem}_packed, one too many: download it again")
        weight = take_matrix(place, tensors, stem, kind)
        matrices[stem] = partial(lambda weight: weight, weight)
        tensors[stem] = torch.empty(weight.shape, dtype=config["dtype"], device="meta")
    return store(place, config, kind, tensors, matrices, huggingface_names)


def take_matrix(where: Path, tensors: dict[str, Tensor], stem: str, kind: Kind) -> Quantized:
    """Take the parts of the matrix `stem` out of `tensors`. Raises CheckpointError unless they fit together."""
    wanted = ["_packed", "_scale", "_shape", *["_zero"] * kind.own, *["_zero_point"] * kind.zeros]
    for ending in wanted:
        if stem + ending not in tensors:
            raise CheckpointError(f"{where} lacks {stem}{ending}: download it again")
    words, scales, shape, *zeros = (tensors.pop(stem + ending) for ending in wanted)
    N, K = shape.tolist() if shape.shape == (2,) and not shape.is_floating_point() else (0, 0)
    size = kind.groupsize or max(K, 1)
    groups = -(-K // size)
    parts = {"_packed": (words, (N, -(-K * kind.bits // 32))), "_scale": (scales, (N, groups))}
    if zeros:
        parts[wanted[3]] = zeros[0], (N, groups) if kind.own else (-(-N * kind.bits // 32), groups)
    for ending, (tensor, fit) in parts.items():
        integer = ending in ("_packed", "_zero_point")
        if min(N, K) < 1 or tuple(tensor.shape) != fit or (tensor.dtype == torch.int32) != integer:
            what = f"{stem}{ending} is {tuple(tensor.shape)} in {tensor.dtype}, and its matrix {tuple(shape.tolist())}"
            raise CheckpointError(f"{where}: {what}, which do not fit together: download it again")
    if kind.zeros:  # integers that are taken from the codes, packed from top to bottom
        points = unpack(zeros[0].T, kind.bits, N).T
        zeros = [-points.float() * scales.float()]
    return Quantized(words, scales, zeros[0] if zeros else None, kind.bits, size, K)


def bits_per_weight(stored: Stored) -> float:
    """How many bits a quantized number takes, scales and zeros counted, on average."""
    matrices = [matrix() for matrix in stored.matrices.values()]
    nbytes = sum(t.nbytes for m in matrices for t in (m.words, m.scales, m.zeros) if t is not None)
    return 8 * nbytes / sum(matrix.shape[0] * matrix.K for matrix in matrices)


def load_dense(
    path: str | Path, config: dict | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:  # fmt: skip
    """The model of chapters 1 and 2 with the numbers that the codes in `path` stand for. Raises CheckpointError."""
    stored = read_quantized(path, config)

    def change(ours: str, weight: Tensor, config: dict) -> Tensor:
        return stored.matrices[ours]().dequantize() if ours in stored.matrices else weight

    return fill(stored.where, stored.tensors, plain_names, stored.config, device, dtype, change)


def engines(where: Path, ours: str, weight: Quantized) -> Quantized:
    """The same matrix in a form that we write, and that the engine multiplies. Raises CheckpointError if there is none.

    That is 8 bits with a scale for each row, or 4 bits in groups of GROUP_SIZES, with scales and zeros in bfloat16.
    """
    N, K = weight.shape
    tables = [table for table in (weight.scales, weight.zeros) if table is not None]
    exact = all(torch.equal(table.bfloat16().to(table.dtype), table) for table in tables)
    if weight.bits == 8:
        sizes = [weight.groupsize] if weight.groupsize >= K and weight.zeros is None else []
    else:  # a larger group is some small ones that are alike
        sizes = [size for size in GROUP_SIZES if weight.groupsize % size == 0 or weight.groupsize >= K]
    if not exact or not sizes:
        form = f"{weight.bits} bits in groups of {weight.groupsize}, " + ", ".join(
            f"{name} in {table.dtype}" for name, table in zip(("scales", "zeros"), tables)
        )
        what = f"{ours} has {form}, which the engine can't multiply as they are"
        raise CheckpointError(f"{where}: {what}: `llamabook convert` makes a folder without codes of it")
    size = weight.groupsize if weight.groupsize in sizes else sizes[-1]
    times, groups = -(-min(weight.groupsize, K) // size), -(-K // size)
    scales, zeros = (
        None if table is None else table.bfloat16().repeat_interleave(times, dim=1)[:, :groups]
        for table in (weight.scales, weight.zeros)
    )
    return replace(weight, scales=scales, zeros=zeros, groupsize=size)


PARTS = {  # of a block of the engine: our names of the rows that it stacks
    "attention.wqkv": ("att.W_query", "att.W_key", "att.W_value"),
    "attention.wo": ("att.out_proj",),
    "feed_forward.w13": ("ff.fc1", "ff.fc2"),
    "feed_forward.w2": ("ff.fc3",),
}


def plain_linear(weight: Tensor) -> Linear:
    """The engine's linear for a matrix that is not quantized."""
    with torch.device("meta"):
        linear = Linear(*reversed(weight.shape), dtype=weight.dtype)
    linear.set_weight(weight)
    return linear


def load_engine(
    stored: Stored, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, exact: bool = False
) -> Transformer:
    """The engine's model of a quantized checkpoint, filled matrix by matrix, each packed for `device`.

    Args: dtype, of activations, table and norms, None for the checkpoint's own; exact, as of `QuantizedLinear`.
    Its attribute `quantization` says what was loaded, as "int4.g32". Raises CheckpointError.
    """
    cfg = {**stored.config, "dtype": dtype or stored.config["dtype"]}
    to = {"device": torch.device(device), "dtype": cfg["dtype"]}
    with torch.device("meta"):  # shapes without memory
        new = Transformer(cfg, partial(QuantizedLinear, exact=exact))

    def give(place: nn.Module, name: str, parts: list[str]) -> None:
        """Give the linear `name` in `place` the rows of all `parts`, and make it a plain one where they are not quantized."""
        found = [stored.matrices[part] for part in parts if part in stored.matrices]
        if found and len(found) < len(parts):
            what = f"of {', '.join(parts)} some are quantized and some are not"
            raise CheckpointError(f"{stored.where}: {what}: `llamabook convert` makes a folder without codes of it")
        if found:
            rows = [engines(stored.where, part, matrix()) for part, matrix in zip(parts, found)]
            matrix = rows[0] if len(rows) == 1 else stack(rows)
            getattr(place, name).set_quantized(matrix.map(lambda tensor: tensor.to(device)))
        else:
            setattr(place, name, plain_linear(gathered([stored.tensors[part] for part in parts], to)))

    new.theta = new.theta.to(device)
    new.embedding.weight = fixed(stored.tensors["tok_emb.weight"], to)
    new.norm.weight = fixed(stored.tensors["final_norm.weight"], to)
    for number, block in enumerate(tqdm(new.blocks, leave=False, disable=None)):
        for name, parts in PARTS.items():
            place, _, last = name.rpartition(".")
            give(block.get_submodule(place), last, [f"trf_blocks.{number}.{part}.weight" for part in parts])
        block.norm1.weight = fixed(stored.tensors[f"trf_blocks.{number}.norm1.weight"], to)
        block.norm2.weight = fixed(stored.tensors[f"trf_blocks.{number}.norm2.weight"], to)
    if "out_head.weight" in stored.tensors:
        give(new, "head", ["out_head.weight"])
    else:  # tied, and neither is quantized
        new.head = plain_linear(new.embedding.weight)
    new.quantization = str(stored.kind)
    return new.eval()


# ---- writing


class Writer:
    """A quantized checkpoint that is written into a new folder, matrix by matrix or in blocks of rows, in any order.

    Args: folder; cfg and shapes, the model's configuration and the shapes of its weights by our names, head included;
    scheme, of all matrices but the table and those in `plain`; method, as of `to_quantization_config`; metadata, more keys
    for config.json; shard_bytes, how large a file may become.
    """

    def __init__(
        self, folder: Path, cfg: dict, shapes: dict[str, torch.Size], scheme: Scheme, *, method: str = "rtn",
        plain: tuple[str, ...] = (), metadata: dict | None = None, shard_bytes: int = SHARD_BYTES,
    ):  # fmt: skip
        self.folder, self.scheme, self.dtype = folder, scheme, cfg["dtype"]
        self.names = {ours: theirs for theirs, ours in huggingface_names(cfg["n_layers"]).items()}
        self.matrices = [ours for ours in self.names if len(shapes[ours]) == 2 and ours not in ("tok_emb.weight", *plain)]
        config = to_config({**cfg, "tie_embeddings": False}, metadata)
        ignore = [self.names[ours].removesuffix(".weight") for ours in plain]
        self.config = config | {KEY: to_quantization_config(scheme, method, ignore)}
        self.plan = {}
        for ours, theirs in self.names.items():
            self.plan |= self.parts_of(ours, theirs, shapes[ours], cfg["dtype"])
        self.tensors = TensorWriter(folder, self.plan, shard_bytes)

    def parts_of(self, ours: str, theirs: str, shape: torch.Size, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that stand for one weight, on the meta device."""
        if ours not in self.matrices:
            return {theirs: torch.empty(shape, dtype=dtype, device="meta")}
        (N, K), bits = shape, self.scheme.bits
        table = torch.empty(N, -(-K // (self.scheme.groupsize or K)), dtype=torch.bfloat16, device="meta")
        words = torch.empty(N, -(-K * bits // 32), dtype=torch.int32, device="meta")
        sizes = torch.empty(2, dtype=torch.int64, device="meta")
        parts = {"_packed": words, "_scale": table, "_shape": sizes, **({"_zero": table} if self.scheme.asymmetric else {})}
        return {theirs + ending: tensor for ending, tensor in parts.items()}

    def nbytes(self) -> int:
        """How many bytes of tensors there will be."""
        return self.tensors.left

    def put(self, ours: str, weight: Quantized | Tensor, first: int = 0) -> None:
        """Write rows of a weight, from row `first` on: codes of a matrix, or numbers of another one."""
        name = self.names[ours]
        if ours not in self.matrices:
            return self.tensors.write(name, weight, first)
        self.tensors.write(f"{name}_packed", weight.words, first)
        self.tensors.write(f"{name}_scale", weight.scales, first)
        if self.scheme.asymmetric:
            zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
            self.tensors.write(f"{name}_zero", zeros, first)
        if first == 0:
            rows = self.plan[f"{name}_packed"].shape[0]
            self.tensors.write(f"{name}_shape", torch.tensor([rows, weight.K]))

    def __enter__(self) -> "Writer":
        self.folder.mkdir(parents=True)
        self.tensors.__enter__()
        return self

    def __exit__(self, kind, *error) -> None:
        self.tensors.__exit__(kind, *error)
        if kind is None:
            with (self.folder / "config.json").open("wb") as file:
                write_json(file, self.config)


@contextmanager
def writing(
    src: str | Path, dst: str | Path, scheme: Scheme, *, method: str = "rtn", force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[tuple[nn.Module, Writer]]:  # fmt: skip
    """A `Writer` for the quantized weights of the checkpoint in `src`, and its model on the meta device.

    When the block ends, all of it has the name `dst`; if it raises, none of it is left.
    Raises InputError for a request that can't be met, CheckpointError for a bad checkpoint.
    """
    src, dst = Path(src), Path(dst)
    with whole(src, dst, force) as part:
        if recognize(src)[0].startswith("quantized"):
            raise InputError(f"{src} is quantized already ({read_quantized(src).kind}): give the checkpoint it was made from")
        model, companions = load_model(src, device="meta"), companions_of(src)
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        metadata = token_ids(src, companions)
        writer = Writer(part, model.cfg, shapes, scheme, method=method, metadata=metadata, shard_bytes=shard_bytes)
        check_space(writer.nbytes(), companions, dst)
        with writer:
            yield model, writer
        for file in companions:
            copyfile(file, part / file.name)


def blocks_of(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of a weight in blocks of about BLOCK numbers: the number of the first one, and the rows."""
    rows = max(BLOCK // weight[0].numel(), 1)
    for first in range(0, len(weight), rows):
        yield first, weight[first : first + rows]


def on_all_cores(work: Callable, items: Iterable) -> Iterator:
    """What `work` makes of each item, in order, on all cores, without running far ahead.

    For operators as short as these, threads that each do all of one item beat those that share each operator.
    """
    threads, waiting = torch.get_num_threads(), deque()
    torch.set_num_threads(1)  # also for threads that begin now
    try:
        with ThreadPoolExecutor(threads) as pool:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)


def quantize(
    src: str | Path, dst: str | Path, scheme: Scheme, *, force: bool = False, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write the checkpoint in `src`, whatever `load_model` reads, quantized as a folder `dst`, and return `dst`.

    It goes from file to file in blocks of rows, so its memory does not grow with the model. The tokenizer goes along.
    Everything is written beside `dst` and renamed at the end.
    Args: scheme; force, whether a checkpoint that is in `dst` already may be replaced; shard_bytes, how large a file may
    become. Raises InputError for an impossible request, CheckpointError for a bad checkpoint.
    """
    with writing(src, dst, scheme, force=force, shard_bytes=shard_bytes) as (model, out):

        def work(block: tuple[str, int, Tensor]) -> tuple[str, Quantized | Tensor, int, int]:
            ours, first, rows = block
            numbers = rows.float()
            if not numbers.abs().amax().isfinite():
                what = f"{out.names[ours]} has numbers that are infinite or none (NaN)"
                raise CheckpointError(f"{src}: {what}: give a sound checkpoint")
            return ours, scheme(numbers) if ours in out.matrices else rows.to(out.dtype), first, rows.nbytes

        blocks = ((ours, first, rows) for ours, weight in each_weight(src, model) for first, rows in blocks_of(weight))
        total = sum(weight.nbytes for weight in model.state_dict().values())
        with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for ours, weight, first, nbytes in on_all_cores(work, blocks):
                out.put(ours, weight, first)
                bar.update(nbytes)
    return Path(dst)


def writer_of(stored: Stored, folder: Path, dtype: torch.dtype | None, metadata: dict) -> Writer:
    """A `Writer` for a quantized checkpoint, whatever form it has: into the new `folder`, in ours.

    Args: dtype, of what is not quantized, None for its own; metadata, more keys for config.json.
    """
    kind, cfg = stored.kind, {**stored.config, "dtype": dtype or stored.config["dtype"]}
    shapes = {ours: tensor.shape for ours, tensor in stored.tensors.items()}
    plain = tuple(o for o, shape in shapes.items() if len(shape) == 2 and o not in (*stored.matrices, "tok_emb.weight"))
    scheme = Scheme(kind.bits, kind.groupsize, kind.own)
    return Writer(folder, cfg, shapes, scheme, method=kind.method, plain=plain, metadata=metadata)


def copy_stored(stored: Stored, out: Writer) -> None:
    """Give `out` all of a quantized checkpoint, its codes as they are. Raises CheckpointError."""
    with out:
        for ours, tensor in tqdm(stored.tensors.items(), leave=False, disable=None):
            if ours in stored.matrices:
                out.put(ours, engines(stored.where, ours, stored.matrices[ours]()))
            else:
                out.put(ours, tensor.to(out.dtype))
