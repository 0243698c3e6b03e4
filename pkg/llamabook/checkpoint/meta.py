"""From the notebook ch01_gpt_to_llama2/03_tokenizer_and_weights.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from llamabook.errors import CheckpointError, ConfigError, InputError
from llamabook.files import replacing, why_unreadable
from llamabook.llama2 import Llama2Model, half_split_to_interleaved, head_dim_of, interleaved_to_half_split

PARTS = {  # Meta's name: our name, and the dimension that shards cut (None: each shard has the whole)
    "attention_norm": ("norm1", None),
    "attention.wq": ("att.W_query", 0),
    "attention.wk": ("att.W_key", 0),
    "attention.wv": ("att.W_value", 0),
    "attention.wo": ("att.out_proj", 1),
    "ffn_norm": ("norm2", None),
    "feed_forward.w1": ("ff.fc1", 0),
    "feed_forward.w3": ("ff.fc2", 0),
    "feed_forward.w2": ("ff.fc3", 1),
}


def tensor_names(n_layers: int) -> dict[str, tuple[str, int | None]]:
    """Meta's name of every tensor, with our name and the dimension that shards cut (None: not cut)."""
    names = {"tok_embeddings.weight": ("tok_emb.weight", 1)}
    for layer in range(n_layers):
        for meta, (ours, dim) in PARTS.items():
            names[f"layers.{layer}.{meta}.weight"] = (f"trf_blocks.{layer}.{ours}.weight", dim)
    return names | {"norm.weight": ("final_norm.weight", None), "output.weight": ("out_head.weight", 0)}


def load_unrun(path: Path) -> object:
    """What torch.save put into `path`, tensors mapped into memory; nothing that is not data gets loaded.

    Raises CheckpointError if the file asks for code, is damaged, or is no zip archive.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        wish = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {wish[1]}" if wish else "holds more than tensors"
        raise CheckpointError(f"{path} {what}: unsafe, and none of it was run; find another source") from None
    except (RuntimeError, ValueError, EOFError, OSError):
        raise CheckpointError(f"{path} is damaged or cut off: download it again, to the end") from None


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one .pth file by name, mapped into memory. Raises CheckpointError if they are not."""
    problem = why_unreadable(path)
    if problem:
        raise CheckpointError(f"{path} {problem}")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise CheckpointError(f"{path} is no zip archive, as torch.save writes: get the weights as one")
    shard = load_unrun(path)
    tensors = shard.values() if isinstance(shard, dict) else [None]
    if not all(torch.is_tensor(tensor) and tensor.is_floating_point() for tensor in tensors):
        raise CheckpointError(f"{path} is no dictionary of floating-point tensors: give a file of weights")
    return shard


def join(where: str, parts: list[torch.Tensor], dim: int | None) -> torch.Tensor:
    """One tensor from its parts in the shards, cut along `dim` (None: not cut, so all are the same).

    Raises CheckpointError, which begins with `where`, if the parts do not belong together.
    """
    if any(part.shape != parts[0].shape for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise CheckpointError(f"{where} has shards of {shapes}, from different models: download them again")
    if len(parts) == 1:
        return parts[0]
    if dim is not None:
        return torch.cat(parts, dim)
    if not all(torch.equal(part, parts[0]) for part in parts[1:]):
        raise CheckpointError(f"{where} differs between shards, from different models: download them again")
    return parts[0]


def read_shards(folder: str | Path) -> list[dict[str, torch.Tensor]]:
    """The tensors of consolidated.00.pth, consolidated.01.pth and so on. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give the one with consolidated.00.pth and params.json")
    names = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    if not names:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{folder} has no consolidated.00.pth (it holds {inside}): download it")
    for rank, name in enumerate(names):
        wanted = f"consolidated.{rank:02d}.pth"
        if name != wanted:
            raise CheckpointError(f"{folder} has {name} but not {wanted}: download the missing shard")
    return [read_shard(folder / name) for name in names]


def matrix(folder: str | Path, shard: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor `name` of a shard. Raises CheckpointError if it is missing, empty, or no matrix."""
    if name not in shard or shard[name].ndim != 2 or not shard[name].numel():
        first = ", ".join(list(map(str, shard))[:2]) or "nothing"
        raise CheckpointError(f"{folder} has no matrix {name} (but {first}): give weights in Meta's format")
    return shard[name]


def vocabulary(folder: str | Path, shards: list[dict[str, torch.Tensor]], params: dict) -> int:
    """V: all rows of the token table, even if shards cut it by rows (Llama 3). Raises CheckpointError."""
    heads, dim = params["n_heads"], params["dim"]
    check_count(folder, shards, heads * params.get("head_dim", dim // heads))
    rows, columns = matrix(folder, shards[0], "tok_embeddings.weight").shape
    rows *= len(shards) if columns == dim else 1
    if params.get("vocab_size", -1) not in (-1, rows):
        what = f"vocab_size is {params['vocab_size']}, the rows of tok_embeddings.weight {rows}"
        raise CheckpointError(f"{folder}: {what}: use the params.json that belongs to the weights")
    return rows


def check_count(folder: str | Path, shards: list[dict], width: int) -> None:
    """Raises CheckpointError if shards are missing: wo, of which each has some columns, has `width`."""
    part = matrix(folder, shards[0], "layers.0.attention.wo.weight").shape[1]
    if part * len(shards) < width and width % part == 0:
        want, absent = width // part, f"consolidated.{len(shards):02d}.pth"
        raise CheckpointError(f"{folder} has {len(shards)} of {want} shards: {absent} is missing")


def check_shards(folder: Path, shards: list[dict], names: Iterable[str]) -> None:
    """Raises CheckpointError unless each shard has the tensors `names`, and no others.

    One more tensor is accepted and ignored: rope.freqs, which we compute.
    """
    for rank, shard in enumerate(shards):
        missing = [name for name in names if name not in shard]
        extra = [name for name in shard if name not in names and name != "rope.freqs"]
        for kind, found in (("lacks", missing), ("has the unexpected", extra)):
            if found:
                what = f"{kind} {found[0]}" + (f" and {len(found) - 1} more" if found[1:] else "")
                file = folder / f"consolidated.{rank:02d}.pth"
                raise CheckpointError(f"{file} {what}: use the params.json that belongs to the weights")


COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "head_dim")  # above 0


def read_json(path: Path) -> dict:
    """What params.json says, less what is null, the numbers that we use checked. Raises CheckpointError."""
    problem = why_unreadable(path)
    if problem:
        raise CheckpointError(f"{path} {problem}")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): download it again") from None
    params = {k: v for k, v in params.items() if v is not None} if isinstance(params, dict) else {}
    for key in COUNTS[:3]:
        if key not in params:
            raise CheckpointError(f"{path} has no {key!r}: give the params.json that belongs to the weights")
    for key in (*COUNTS, "norm_eps", "rope_theta"):
        value, kinds = params.get(key, 1), (int,) if key in COUNTS else (int, float)
        if type(value) not in kinds or not value > 0:
            raise CheckpointError(f"{path} says {key} is {value!r}, not a number above 0: download it again")
    return params


def read_params(folder: str | Path, shards: list[dict[str, torch.Tensor]] | None = None) -> dict:
    """The configuration of a folder in Meta's format: params.json, and the tensors where that is silent.

    Without rope_theta the base is 10 000, without max_seq_len the context 4096. Raises CheckpointError.
    """
    shards = read_shards(folder) if shards is None else shards
    params = read_json(Path(folder) / "params.json")
    gate = matrix(folder, shards[0], "layers.0.feed_forward.w1.weight")  # (F / shards, D)
    return {
        "vocab_size": vocabulary(folder, shards, params),
        "context_length": params.get("max_seq_len", 4096),
        "emb_dim": params["dim"],
        "n_heads": params["n_heads"],
        "n_layers": params["n_layers"],
        "hidden_dim": gate.shape[0] * len(shards),
        "n_kv_groups": params.get("n_kv_heads", params["n_heads"]),
        "rope_base": float(params.get("rope_theta", 10_000.0)),
        "rope_freq": None,
        "norm_eps": params.get("norm_eps", 1e-5),
        "dtype": shards[0]["tok_embeddings.weight"].dtype,
    }


def build_empty(folder: Path, config: dict, model_class: Callable[[dict], nn.Module]) -> nn.Module:
    """The model of `config` on the meta device, which has shapes and no memory. Raises CheckpointError."""
    heads, groups = config.get("n_heads"), config.get("n_kv_groups")
    if model_class is Llama2Model and heads != groups:
        what = f"{heads} query heads share {groups} key-value heads (grouped-query attention)"
        raise CheckpointError(f"{folder}: {what}, which chapter 2 adds: Llama 2 7B and 13B load now")
    try:
        with torch.device("meta"):
            return model_class(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def rotated_heads(name: str, config: dict) -> int:
    """How many heads of rows the tensor `name` (ours) has if RoPE turns what comes out of it, else 0."""
    part = name.split(".")[-2]
    return {"W_query": config["n_heads"], "W_key": config["n_kv_groups"]}.get(part, 0)


def our_tensors(
    folder: Path, shards: list[dict], config: dict, shapes: dict[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name (ours) and tensor, one after the other: joined from all shards, rows in our half-split order.

    Raises CheckpointError if a tensor has not the shape that `shapes` has for it.
    """
    for name, (ours, dim) in tqdm(tensor_names(config["n_layers"]).items(), leave=False, disable=None):
        parts = [shard[name].to(config["dtype"]) for shard in shards]
        if ours == "tok_emb.weight" and parts[0].shape[1:] == shapes[ours][1:]:
            dim = 0  # every shard has all columns: Llama 3 cuts the token table by rows
        weight = join(f"{folder}: {name}", parts, dim)
        if weight.shape != shapes[ours]:
            what = f"{name} is {tuple(weight.shape)}, the configuration wants {tuple(shapes[ours])}"
            raise CheckpointError(f"{folder}: {what}: use the params.json that belongs to the weights")
        heads = rotated_heads(ours, config)
        yield ours, interleaved_to_half_split(weight, heads) if heads else weight


def load_meta(
    path: str | Path, config: dict | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None, model_class: Callable[[dict], nn.Module] = Llama2Model,
) -> nn.Module:  # fmt: skip
    """A model from a folder with consolidated.*.pth and params.json, as Meta publishes Llama 2.

    Args: path, the folder; config, used instead of params.json; dtype, None for the files' own; model_class,
    what is built from the configuration. The weights are never there twice: files are mapped, and a tensor
    is copied only if it is joined, permuted, converted or moved, one after the other. Raises CheckpointError.
    """
    folder, shards = Path(path), read_shards(path)
    config = dict(read_params(folder, shards) if config is None else config)
    config["dtype"] = dtype or matrix(folder, shards[0], "tok_embeddings.weight").dtype
    model = build_empty(folder, config, model_class)
    check_count(folder, shards, config["n_heads"] * head_dim_of(config))
    check_shards(folder, shards, tensor_names(config["n_layers"]))
    shapes, state = {name: tensor.shape for name, tensor in model.state_dict().items()}, {}
    for name, weight in our_tensors(folder, shards, config, shapes):
        state[name] = weight.to(device=device, dtype=config["dtype"])
    model.load_state_dict(state, assign=True)
    return model.eval()


def hidden_numbers(dim: int, hidden: int) -> dict[str, int | float]:
    """A multiple_of and, if need be, an ffn_dim_multiplier from which Meta's code computes `hidden`.

    It takes 2/3 of 4 dim, times the multiplier, and rounds up to a multiple. We try short multipliers first.
    """
    width = int(2 * (4 * dim) / 3)
    for multiplier in (1, *(round(hidden / width, digits) for digits in range(1, 9)), (hidden + 0.5) / width):
        for multiple in (256, 512, 1024, 2048, 4096, 128, 64, 32, 16, 8, 4, 2, 1):
            if -(-int(multiplier * width) // multiple) * multiple == hidden:
                numbers = {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
                return numbers if multiplier != 1 else {"multiple_of": multiple}
    raise ConfigError(f"no multiple_of gives a hidden width of {hidden} for dim {dim}: choose another width")


def to_params(cfg: dict) -> dict:
    """What params.json says of a configuration. Raises ConfigError if Meta's Llama 2 format can't hold it."""
    if cfg.get("head_dim") not in (None, cfg["emb_dim"] // cfg["n_heads"]) or cfg["rope_freq"] is not None:
        raise ConfigError("Meta's Llama 2 format has no place for head_dim and rope_freq: leave them unset")
    params = {"dim": cfg["emb_dim"], "n_layers": cfg["n_layers"], "n_heads": cfg["n_heads"]}
    params |= {"vocab_size": cfg["vocab_size"], "norm_eps": cfg.get("norm_eps", 1e-5)}
    params |= hidden_numbers(cfg["emb_dim"], cfg["hidden_dim"])
    unusual = {  # Meta's names, our values, and those that need not be written
        "n_kv_heads": (cfg["n_kv_groups"], cfg["n_heads"]),
        "rope_theta": (cfg["rope_base"], 10_000.0),
        "max_seq_len": (cfg["context_length"], 4096),
    }
    return params | {key: value for key, (value, usual) in unusual.items() if value != usual}


def to_shard(model: nn.Module, rank: int, shards: int) -> dict[str, torch.Tensor]:
    """The tensors of file number `rank` of `shards`, by Meta's names and in Meta's row order."""
    cfg, weights, part = model.cfg, model.state_dict(), {}
    for name, (ours, dim) in tensor_names(cfg["n_layers"]).items():
        weight, heads = weights[ours].cpu(), rotated_heads(ours, cfg)
        if heads:
            weight = half_split_to_interleaved(weight, heads)
        if dim is not None and shards > 1:
            weight = weight.chunk(shards, dim)[rank].clone()  # a mere view would be saved whole
        part[name] = weight
    return part


def save_meta(model: nn.Module, folder: str | Path, shards: int = 1, params: dict | None = None) -> None:
    """Write `model` as Meta would: params.json and `shards` files consolidated.00.pth and so on.

    Every file is complete before the first takes its name: an interrupted call leaves the old ones.
    Without `params`, it's `to_params(model.cfg)`, which may raise ConfigError; InputError for wrong `shards`.
    """
    folder, cfg, params = Path(folder), model.cfg, to_params(model.cfg) if params is None else params
    if shards < 1 or any(cfg[key] % shards for key in ("n_kv_groups", "hidden_dim", "vocab_size", "emb_dim")):
        raise InputError(f"{shards} shards do not divide heads, widths and vocabulary evenly: choose fewer")
    with ExitStack() as files:
        for rank in range(shards):
            file = files.enter_context(replacing(folder / f"consolidated.{rank:02d}.pth"))
            torch.save(to_shard(model, rank, shards), file)
            file.flush()
        text = json.dumps(params, indent=2) + "\n"
        files.enter_context(replacing(folder / "params.json")).write(text.encode())
    for path in folder.glob("consolidated.*.pth"):
        if path.name >= f"consolidated.{shards:02d}.pth":
            path.unlink()  # left over from a save with more shards
