"""From the notebook ch01_gpt_to_llama2/03_tokenizer_and_weights.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import json
import pickle
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from llamabook.errors import CheckpointError, ConfigError, InputError
from llamabook.files import replacing, why_unreadable
from llamabook.llama2 import Llama2Model, half_split_to_interleaved, interleaved_to_half_split

PARTS = {  # Meta's name: our name, and the dimension that shards cut (None: each shard holds the whole)
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
    """Every tensor of Meta's format: its name there, ours, and the dimension that shards cut (None: not cut)."""
    names = {"tok_embeddings.weight": ("tok_emb.weight", 1)}
    for layer in range(n_layers):
        for meta, (ours, dim) in PARTS.items():
            names[f"layers.{layer}.{meta}.weight"] = (f"trf_blocks.{layer}.{ours}.weight", dim)
    names["norm.weight"] = ("final_norm.weight", None)
    names["output.weight"] = ("out_head.weight", 0)
    return names


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one .pth file, mapped into memory, not read. Raises CheckpointError; never runs the file's code."""
    problem = why_unreadable(path)
    if problem:
        raise CheckpointError(f"{path} {problem}")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise CheckpointError(f"{path} is not a zip archive, as torch.save writes since 1.6: convert or download it")
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        wish = re.search(r"GLOBAL (\S+)", str(error))
        what = f"wants to run {wish[1]}" if wish else "holds more than tensors"
        raise CheckpointError(f"{path} {what}, so it is unsafe and was not loaded: find another source") from None
    except (RuntimeError, EOFError, ValueError, OSError):
        raise CheckpointError(f"{path} is damaged or cut off: the download did not finish, repeat it") from None
    if not isinstance(shard, dict) or not all(torch.is_tensor(t) and t.is_floating_point() for t in shard.values()):
        raise CheckpointError(f"{path} is no dictionary of floating-point tensors: it is not a file of model weights")
    return shard


def read_shards(folder: str | Path) -> list[dict[str, torch.Tensor]]:
    """consolidated.00.pth, .01.pth, ... of `folder`, in order, mapped into memory. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: name the one that holds consolidated.00.pth and params.json")
    found = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    if not found:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{folder} has no consolidated.00.pth (it holds {inside}): is the download complete?")
    for rank, name in enumerate(found):
        if name != f"consolidated.{rank:02d}.pth":
            raise CheckpointError(f"{folder} has {name} but no consolidated.{rank:02d}.pth: download the missing shard")
    return [read_shard(folder / name) for name in found]


def read_params(folder: str | Path, shards: list[dict[str, torch.Tensor]] | None = None) -> dict:
    """The configuration of a folder in Meta's format: params.json, and from the tensors what it leaves out.

    Meta's file has no hidden width and may have vocab_size -1. Without rope_theta the base is 10 000, without
    max_seq_len the context is 4096, as in Llama 2. Raises CheckpointError.
    """
    shards = read_shards(folder) if shards is None else shards
    params = _read_json(Path(folder) / "params.json")
    embedding, gate = (_matrix(folder, shards[0], f"{n}.weight") for n in ("tok_embeddings", "layers.0.feed_forward.w1"))
    return {
        "vocab_size": embedding.shape[0],
        "context_length": params.get("max_seq_len", 4096),
        "emb_dim": params["dim"],
        "n_heads": params["n_heads"],
        "n_layers": params["n_layers"],
        "hidden_dim": gate.shape[0] * len(shards),
        "n_kv_groups": params.get("n_kv_heads") or params["n_heads"],
        "rope_base": params.get("rope_theta", 10_000.0),
        "rope_freq": None,
        "norm_eps": params.get("norm_eps", 1e-5),
        "dtype": embedding.dtype,
    }


NUMBERS = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"), (int,)) | dict.fromkeys(
    ("norm_eps", "rope_theta"), (int, float)
)


def _read_json(path: Path) -> dict:
    """The object in params.json, its numbers checked. Raises CheckpointError."""
    problem = why_unreadable(path)
    if problem:
        raise CheckpointError(f"{path} {problem}")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from None
    for key in ("dim", "n_layers", "n_heads"):
        if not isinstance(params, dict) or key not in params:
            raise CheckpointError(f"{path} has no {key!r}: it is not the params.json of a Llama")
    for key, value in params.items():
        if key in NUMBERS and not (type(value) in NUMBERS[key] and value > 0):
            raise CheckpointError(f"{path} says {key} is {value!r}, not a number above 0: download it again")
    return params


def _matrix(folder: str | Path, shard: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor `name` of a shard. Raises CheckpointError if it is missing or no matrix."""
    if name not in shard or shard[name].ndim != 2:
        first = ", ".join(list(shard)[:2]) or "nothing"
        raise CheckpointError(f"{folder} has no matrix {name} (but {first}): it is not in Meta's format")
    return shard[name]


def join(where: str, parts: list[torch.Tensor], dim: int | None) -> torch.Tensor:
    """One tensor from its parts in every shard, cut along `dim` (None: not cut, and all the same).

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
        raise CheckpointError(f"{where} differs between shards, which are from different models: download them again")
    return parts[0]


def check_shards(folder: Path, shards: list[dict[str, torch.Tensor]], config: dict, names: Iterable[str]) -> None:
    """Raises CheckpointError unless all shards are there and each has the tensors `names` (rope.freqs may be, too)."""
    width, want = _matrix(folder, shards[0], "tok_embeddings.weight").shape[1], config["emb_dim"]
    if width * len(shards) < want and want % width == 0:
        absent = f"consolidated.{len(shards):02d}.pth"
        raise CheckpointError(
            f"{folder} has {len(shards)} of {want // width} shards: {absent} is missing, download the rest"
        )
    for rank, shard in enumerate(shards):
        missing = [name for name in names if name not in shard]
        extra = [name for name in shard if name not in names and name != "rope.freqs"]
        for kind, found in (("lacks", missing), ("has unexpected", extra)):
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                file = f"{folder}/consolidated.{rank:02d}.pth"
                raise CheckpointError(f"{file} {kind} {found[0]}{more}: does params.json belong to this model?")


def build_empty(folder: Path, config: dict, model_class: Callable[[dict], nn.Module]) -> nn.Module:
    """The model of `config` on the meta device: shapes, and no memory. Raises CheckpointError if there is none."""
    if model_class is Llama2Model and config["n_kv_groups"] != config["n_heads"]:
        raise CheckpointError(
            f"{folder} has {config['n_heads']} heads but {config['n_kv_groups']} key-value heads: that is"
            " grouped-query attention, which chapter 2 adds; Llama 2 7B and 13B load now"
        )
    try:
        with torch.device("meta"):
            return model_class(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def load_meta(
    path: str | Path,
    config: dict | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    model_class: Callable[[dict], nn.Module] = Llama2Model,
) -> nn.Module:
    """A model from a folder with consolidated.*.pth and params.json, as Meta publishes Llama 2.

    The weights are never held twice: the files are mapped into memory, and one tensor after the other is joined,
    permuted to the half-split layout and converted, where it needs to be.
    Args: path, the folder; config, instead of what params.json says; dtype, None for the files' own;
    model_class, what to build from the configuration. Raises CheckpointError.
    """
    folder, shards = Path(path), read_shards(path)
    config = dict(read_params(folder, shards) if config is None else config)
    config["dtype"] = dtype or _matrix(folder, shards[0], "tok_embeddings.weight").dtype
    model, names = build_empty(folder, config, model_class), tensor_names(config["n_layers"])
    check_shards(folder, shards, config, names)
    shapes, state = {name: tensor.shape for name, tensor in model.state_dict().items()}, {}
    for name, (ours, dim) in tqdm(names.items(), desc="loading", leave=False, disable=None):
        weight = join(f"{folder}: {name}", [shard[name] for shard in shards], dim)
        if weight.shape != shapes[ours]:
            got, want = tuple(weight.shape), tuple(shapes[ours])
            raise CheckpointError(f"{folder}: {name} is {got}, not {want}: does params.json belong to this model?")
        if heads := rotated_heads(ours, config):
            weight = interleaved_to_half_split(weight, heads)
        state[ours] = weight.to(device=device, dtype=config["dtype"])
    model.load_state_dict(state, assign=True)
    return model.eval()


def rotated_heads(name: str, config: dict) -> int:
    """How many heads the rows of the tensor `name` (ours) hold if RoPE turns what it makes, else 0."""
    part = name.split(".")[-2]
    return {"W_query": config["n_heads"], "W_key": config["n_kv_groups"]}.get(part, 0)


def save_meta(model: nn.Module, folder: str | Path, shards: int = 1) -> None:
    """Write `model` as Meta would: consolidated.00.pth and so on, cut into `shards` files, and params.json.

    All files are complete before the first takes its name, so an interrupted call leaves what was there before.
    Raises InputError if the model can't be cut into so many shards, ConfigError if Meta's format can't hold it.
    """
    folder, cfg, weights = Path(folder), model.cfg, model.state_dict()
    params = to_params(cfg)
    if shards < 1 or any(cfg[key] % shards for key in ("n_kv_groups", "hidden_dim", "vocab_size", "emb_dim")):
        raise InputError(f"the model does not divide into {shards} shards: choose a divisor of its heads and widths")
    with ExitStack() as files:
        for rank in range(shards):
            file = files.enter_context(replacing(folder / f"consolidated.{rank:02d}.pth"))
            part = {}
            for name, (ours, dim) in tensor_names(cfg["n_layers"]).items():
                weight, heads = weights[ours].cpu(), rotated_heads(ours, cfg)
                weight = half_split_to_interleaved(weight, heads) if heads else weight
                part[name] = weight if dim is None or shards == 1 else weight.chunk(shards, dim)[rank].clone()
            torch.save(part, file)
        file = files.enter_context(replacing(folder / "params.json"))
        file.write(json.dumps(params, indent=2).encode() + b"\n")
    for path in folder.glob("consolidated.*.pth"):
        if path.name >= f"consolidated.{shards:02d}.pth":
            path.unlink()  # left from a model of more shards


def to_params(cfg: dict) -> dict:
    """What Meta's params.json says of a configuration. Raises ConfigError if the format can't hold it.

    Meta's code computes the hidden width from dim: two thirds of 4 dim, times ffn_dim_multiplier, rounded up to
    multiple_of. We look for the two numbers that give the width we have.
    """
    if cfg.get("head_dim", None) not in (None, cfg["emb_dim"] // cfg["n_heads"]) or cfg["rope_freq"] is not None:
        raise ConfigError("Meta's Llama 2 format has no place for head_dim or rope_freq: leave them unset, or None")
    width, hidden = int(2 * (4 * cfg["emb_dim"]) / 3), cfg["hidden_dim"]
    params = {"dim": cfg["emb_dim"], "n_layers": cfg["n_layers"], "n_heads": cfg["n_heads"]}
    if cfg["n_kv_groups"] != cfg["n_heads"]:
        params["n_kv_heads"] = cfg["n_kv_groups"]
    fits = [m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if -(-width // m) * m == hidden]
    params |= {"vocab_size": cfg["vocab_size"], "multiple_of": fits[0] if fits else 1}
    if not fits:
        params["ffn_dim_multiplier"] = (hidden + 0.5) / width
    params["norm_eps"] = cfg.get("norm_eps", 1e-5)
    optional = {"rope_theta": (cfg["rope_base"], 10_000.0), "max_seq_len": (cfg["context_length"], 4096)}
    return params | {key: value for key, (value, usual) in optional.items() if value != usual}
