"""From the notebook ch02_llama2_to_llama3/03_every_checkpoint.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from llamabook.checkpoint.meta import build_empty, load_unrun
from llamabook.errors import CheckpointError, InputError
from llamabook.files import replacing, why_unreadable
from llamabook.llama2 import LLAMA2_CONFIG_7B, Llama2Model, head_dim_of
from llamabook.llama3 import Llama3Model


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, mapped into memory. Raises CheckpointError if it is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).removeprefix("Error while deserializing header: ").split())[:80]
        raise CheckpointError(f"{path} is damaged or cut off ({reason}): download it again") from None


def is_dense(name: object, value: object) -> bool:
    """Whether this is a name and a tensor that holds its numbers, one behind the other."""
    there = torch.is_tensor(value) and value.layout is torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and there


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file by name, mapped into memory: safetensors, or what torch.save has written.

    Its first bytes tell which of the two it is, and its name must not say otherwise. Raises CheckpointError.
    """
    if problem := why_unreadable(path):
        raise CheckpointError(f"{path} {problem}")
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" and path.suffix != ".safetensors":
        found = load_unrun(path)
    elif start[8:] == b"{":
        found = read_safetensors(path)
    else:
        what = "is cut off, or not what its name says: safetensors, or a zip archive as torch.save writes"
        raise CheckpointError(f"{path} {what}: download it again")
    if not isinstance(found, dict) or not all(is_dense(*entry) for entry in found.items()):
        raise CheckpointError(f"{path} is no dictionary of tensors: give a file of weights and nothing else")
    return found


def read_object(path: Path) -> dict:
    """The object in a JSON file, without entries that are null. Raises CheckpointError."""
    if problem := why_unreadable(path):
        raise CheckpointError(f"{path} {problem}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}): download it again") from None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again")
    return {key: value for key, value in said.items() if value is not None}


def files_of_index(index: Path) -> list[Path]:
    """The files that an index names, all of them there. Raises CheckpointError."""
    places = read_object(index).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} has no weight_map from tensors to files beside it: download it again")
    for name in names:
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index.parent} lacks {name}, which {index.name} names: download it")
    return [index.parent / name for name in names]


COUNTED = re.compile(r"-(\d+)-of-(\d+)\.(safetensors|bin)$")


def counted_files(folder: Path, ending: str) -> list[Path]:
    """Files like model-00002-of-00004.safetensors, as many as they say. Raises CheckpointError otherwise."""
    paths = sorted(p for p in folder.glob(f"*.{ending}") if COUNTED.search(p.name))
    for path in paths[:1]:
        total = int(COUNTED.search(path.name)[2])
        if len(paths) != total:
            what = f"has {len(paths)} of {total} files *.{ending}"
            raise CheckpointError(f"{folder} {what}: download those that are missing")
    return paths


def weight_files(path: Path) -> list[Path]:
    """The files of weights in a Hugging Face folder, none if there are none; a file that is not one of many
    stands for itself. Raises CheckpointError if one of many is missing.
    """
    if path.is_file() and not (COUNTED.search(path.name) or path.suffix == ".json"):
        return [path]
    folder = path if path.is_dir() else path.parent
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if single.exists():
            return [single]
        if files := files_of_index(index) if index.exists() else counted_files(folder, ending):
            return files
    others = list(folder.glob("*.safetensors"))
    return others if len(others) == 1 else []


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face folder (or one of its files) by name, mapped. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path")
    files = weight_files(path)
    if not files:
        inside = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"{path} has no model.safetensors (it holds {inside}): give another folder")
    tensors = {}
    for file in files:
        found = read_tensors(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(f"{file} has {twice[0]}, as an earlier file has: download the folder again")
        tensors |= found
    return tensors


PLAIN = {  # key of config.json: what it is about, and the values with which the model still is a plain Llama
    "model_type": ("another architecture", ("llama",)),
    "architectures": ("another architecture", ("LlamaForCausalLM", "LLaMAForCausalLM")),
    "hidden_act": ("another activation", ("silu",)),
    "attention_bias": ("biases in attention", (False,)),
    "mlp_bias": ("biases in the feed-forward", (False,)),
    "sliding_window": ("sliding-window attention", ()),
    "use_sliding_window": ("sliding-window attention", (False,)),
    "layer_types": ("layers of several kinds", ("full_attention",)),
    "attention_chunk_size": ("chunked attention", ()),
    "partial_rotary_factor": ("RoPE on a part of each head", (1,)),
    "no_rope_layers": ("layers without RoPE", (1, [])),
    "num_local_experts": ("a mixture of experts", (0,)),
    "num_experts": ("a mixture of experts", (0,)),
    "n_routed_experts": ("a mixture of experts", (0,)),
    "use_qk_norm": ("normalized queries and keys", (False,)),
    "attn_logit_softcapping": ("capped scores", ()),
    "final_logit_softcapping": ("capped logits", ()),
    "logits_scaling": ("scaled logits", (1,)),
    "embedding_multiplier": ("scaled embeddings", (1,)),
    "residual_multiplier": ("a scaled residual stream", (1,)),
    "vision_config": ("images", ()),
    "quantization_config": ("quantized weights", ()),
}


def refuse_unknown(path: Path, said: dict) -> None:
    """Raises CheckpointError, by name, if config.json asks for what a Llama does not have."""
    for key, (about, allowed) in PLAIN.items():
        value = said.get(key)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]
        if value is not None and value not in allowed:
            what = f"{about} ({key}: {str(value)[:60]})"
            raise CheckpointError(f"{path} asks for {what}, which no plain Llama has: give another one")


def number(path: Path, said: dict, key: str, default: float | None = None, whole: bool = True) -> float:
    """The number above 0 that `said` has by that name. Raises CheckpointError if it has none."""
    value = said.get(key, default)
    if value is None:
        raise CheckpointError(f"{path} has no {key}: give the file that belongs to the weights")
    kinds, most = ((int,), 2**24) if whole else ((int, float), 1e12)
    if type(value) not in kinds or not 0 < value <= most:
        what = f"says {key} is {str(value)[:40]!r}, not a {'whole ' * whole}number above 0 of sensible size"
        raise CheckpointError(f"{path} {what}: download it again")
    return value


def rope_of(path: Path, said: dict) -> tuple[float, dict | None]:
    """RoPE's base and its scaling (None: none), in the older or newer spelling. Raises CheckpointError."""
    rope = said.get("rope_scaling") or said.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path} has several RoPE settings, which no plain Llama has: give another one")
    refuse_unknown(path, rope)  # partial_rotary_factor may stand here, too
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = float(number(path, said | rope, "rope_theta", 10_000.0, whole=False))
    if kind == "default":
        return base, None
    if kind != "llama3":
        what = f"RoPE scaling of the type {str(kind)[:40]!r}, and we know llama3 and default"
        raise CheckpointError(f"{path} asks for {what}: give another checkpoint")
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    scaling = {key: float(number(path, rope, key, whole=False)) for key in keys}
    original = "original_max_position_embeddings"
    return base, scaling | {"original_context_length": number(path, rope, original)}


DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def dtype_of(path: Path, said: dict) -> torch.dtype:
    """The dtype that config.json states, float32 if none. Raises CheckpointError if it is none of DTYPES."""
    stated = str(said.get("dtype", said.get("torch_dtype", "float32"))).removeprefix("torch.")
    if stated not in (*DTYPES, "auto"):
        what = f"says the dtype is {stated[:40]!r}"
        raise CheckpointError(f"{path} {what}: give a checkpoint in {', '.join(DTYPES)}")
    return DTYPES.get(stated, torch.float32)


def own_config(path: Path, said: dict) -> dict:
    """The configuration in a JSON file with our own keys, as LLAMA32_CONFIG_1B. Raises CheckpointError."""
    floats, other = ("rope_base", "norm_eps"), ("rope_freq", "tie_embeddings", "dtype")
    known = {*LLAMA2_CONFIG_7B, "head_dim", "tie_embeddings"}
    given = {key: value for key, value in said.items() if key in known}
    checked = (key for key in {**LLAMA2_CONFIG_7B, **given} if key not in other)
    config = {key: number(path, {"norm_eps": 1e-5} | given, key, whole=key not in floats) for key in checked}
    config["rope_base"] = float(config["rope_base"])
    return {"rope_freq": None} | given | config | {"dtype": dtype_of(path, said)}


def read_config(path: Path, apart: str = "") -> dict:
    """The configuration in a config.json, in our keys, less the key `apart`. Raises CheckpointError."""
    said = {key: value for key, value in read_object(path).items() if key != apart}
    if "emb_dim" in said:
        return own_config(path, said)
    refuse_unknown(path, said)
    heads, width = number(path, said, "num_attention_heads"), number(path, said, "hidden_size")
    base, scaling = rope_of(path, said)
    config = {
        "vocab_size": number(path, said, "vocab_size"),
        "context_length": number(path, said, "max_position_embeddings", 2048),
        "emb_dim": width,
        "n_heads": heads,
        "n_layers": number(path, said, "num_hidden_layers"),
        "hidden_dim": number(path, said, "intermediate_size"),
        "n_kv_groups": number(path, said, "num_key_value_heads", heads),
        "rope_base": base,
        "rope_freq": scaling,
        "norm_eps": number(path, said, "rms_norm_eps", 1e-6, whole=False),
        "dtype": dtype_of(path, said),
    }
    if (head_dim := number(path, said, "head_dim", width // heads or 1)) * heads != width:
        config["head_dim"] = head_dim
    return config | ({"tie_embeddings": True} if said.get("tie_word_embeddings") is True else {})


PARTS = {  # Hugging Face's name within a layer: ours
    "input_layernorm": "norm1",
    "self_attn.q_proj": "att.W_query",
    "self_attn.k_proj": "att.W_key",
    "self_attn.v_proj": "att.W_value",
    "self_attn.o_proj": "att.out_proj",
    "post_attention_layernorm": "norm2",
    "mlp.gate_proj": "ff.fc1",
    "mlp.up_proj": "ff.fc2",
    "mlp.down_proj": "ff.fc3",
}


def huggingface_names(n_layers: int) -> dict[str, str]:
    """Hugging Face's name of every tensor, with ours."""
    names = {"model.embed_tokens.weight": "tok_emb.weight"}
    for layer in range(n_layers):
        for theirs, ours in PARTS.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"trf_blocks.{layer}.{ours}.weight"
    return names | {"model.norm.weight": "final_norm.weight", "lm_head.weight": "out_head.weight"}


LEFT_OUT = re.compile(  # what we compute ourselves and some files store: angles, masks
    r"(^|\.)(rotary_emb\.inv_freq|rope\.freqs|freqs_cis|causal_mask|mask|cos|sin)$"
)


def equal(head: torch.Tensor | None, table: torch.Tensor | None) -> bool:
    """Whether both are there and hold the same numbers. Most that differ do so in the first row."""
    if head is None or table is None or head.shape != table.shape or head.dtype != table.dtype:
        return False
    return torch.equal(head[:1], table[:1]) and torch.equal(head, table)


def match_names(where: Path, tensors: dict, names: dict[str, str], tied: bool) -> dict[str, str]:
    """The part of `names` (theirs: ours) to be loaded: all, less the head if it is tied to the table.

    Raises CheckpointError, which begins with `where`, if one is missing, unknown, or tied and different.
    """
    theirs = {ours: name for name, ours in names.items()}
    table, head = theirs["tok_emb.weight"], theirs["out_head.weight"]
    wanted = {name: ours for name, ours in names.items() if not (tied and name == head)}
    for found, what in (
        ([name for name in wanted if name not in tensors], "lacks {}"),
        ([n for n in tensors if n not in names and not LEFT_OUT.search(n)], "has {}, which Llama has not"),
    ):
        if found:
            what = what.format(str(found[0])[:80] + (f" and {len(found) - 1} more" if found[1:] else ""))
            raise CheckpointError(f"{where} {what}: use the configuration and files of one model")
    if tied and head in tensors and not equal(tensors[head], tensors[table]):
        what = f"{head} differs from {table}, but the configuration ties them"
        raise CheckpointError(f"{where}: {what}: set tie_word_embeddings to false, or download it again")
    return wanted


def build_llama(cfg: dict) -> nn.Module:
    """A Llama2Model if that can compute what `cfg` says, else a Llama3Model, its weights not yet set."""
    shared = cfg.get("n_kv_groups") != cfg.get("n_heads")
    newer = shared or cfg.get("rope_freq") is not None or cfg.get("tie_embeddings", False)
    return Llama3Model(cfg) if newer else Llama2Model(cfg)


def choose_dtype(
    where: Path, tensors: dict[str, torch.Tensor], asked: torch.dtype | None, stated: torch.dtype | None
) -> torch.dtype:
    """`asked`, or the tensors' own dtype, or of several the `stated` one. Raises CheckpointError."""
    kinds = {tensor.dtype: name for name, tensor in tensors.items()}
    for dtype, name in kinds.items():
        if dtype not in DTYPES.values():
            what = f"{name} is {dtype}, not one of {', '.join(DTYPES)}"
            raise CheckpointError(f"{where}: {what}: give the weights as they were before quantization")
    if asked is None and len(kinds) > 1 and stated not in kinds:
        a, b = sorted(str(kind) for kind in kinds)[:2]
        raise CheckpointError(f"{where} has tensors in {a} and in {b}: choose with dtype=")
    return asked or (stated if len(kinds) > 1 else next(iter(kinds)))


def check_layers(where: Path, tensors: dict, config: dict) -> int:
    """The number of layers. Raises CheckpointError if there can't be as many: each has nine tensors."""
    layers = config.get("n_layers")
    if type(layers) is not int or not 0 < layers <= len(tensors) / 6:  # six, where three of them are fused
        what = f"has {len(tensors)} tensors, and the configuration says n_layers is {str(layers)[:40]}"
        raise CheckpointError(f"{where} {what}: use the configuration that belongs to the weights")
    return layers


def check_shapes(where: Path, tensors: dict, names: dict[str, str], wanted: dict) -> None:
    """Raises CheckpointError unless the tensors have the shapes that `wanted` has under our names."""
    for theirs, ours in names.items():
        if tensors[theirs].shape != wanted[ours].shape:
            has, wants = tuple(tensors[theirs].shape), tuple(wanted[ours].shape)
            what = f"{theirs} is {has}, the configuration wants {wants}"
            raise CheckpointError(f"{where}: {what}: use the configuration that belongs to the weights")


def fill(
    where: Path, tensors: dict, naming: Callable[[int], dict[str, str]], config: dict,
    device: torch.device | str, dtype: torch.dtype | None, change: Callable | None = None,
) -> nn.Module:  # fmt: skip
    """The model of `config` with `tensors`, whose names `naming(n_layers)` tells. Raises CheckpointError.

    `change(ours, weight, config)` may reorder one. It is copied only if changed, converted or moved.
    """
    tied = config.get("tie_embeddings", False)
    names = match_names(where, tensors, naming(check_layers(where, tensors, config)), tied)
    dtype = choose_dtype(where, {name: tensors[name] for name in names}, dtype, config.get("dtype"))
    model, state = build_empty(where, {**config, "dtype": dtype}, build_llama), {}
    check_shapes(where, tensors, names, model.state_dict())
    for theirs, ours in tqdm(names.items(), leave=False, disable=None):
        weight = change(ours, tensors[theirs], config) if change else tensors[theirs]
        state[ours] = weight.to(device=device, dtype=dtype)
    state |= {"out_head.weight": state["tok_emb.weight"]} if tied else {}
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_huggingface(
    path: str | Path, config: dict | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:  # fmt: skip
    """A model from a folder as Hugging Face has them: config.json, and safetensors or .bin files.

    Args: path, the folder or a file in it; config, instead of config.json; dtype, None for the files' own.
    Nothing in the files is run, and the weights are never there twice. Raises CheckpointError.
    """
    path = Path(path)
    tensors, folder = read_weights(path), path if path.is_dir() else path.parent
    config = read_config(folder / "config.json") if config is None else config
    return fill(path, tensors, huggingface_names, config, device, dtype)


RENAMED = {"original_context_length": "original_max_position_embeddings"}


def to_config(cfg: dict, metadata: dict | None = None) -> dict:
    """What config.json says of a configuration; `metadata` has more keys for it, as eos_token_id."""
    rope = {RENAMED.get(key, key): value for key, value in (cfg["rope_freq"] or {}).items()}
    return (metadata or {}) | {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"},
        "vocab_size": cfg["vocab_size"],
        "max_position_embeddings": cfg["context_length"],
        "hidden_size": cfg["emb_dim"],
        "intermediate_size": cfg["hidden_dim"],
        "num_hidden_layers": cfg["n_layers"],
        "num_attention_heads": cfg["n_heads"],
        "num_key_value_heads": cfg["n_kv_groups"],
        "head_dim": head_dim_of(cfg),
        "rms_norm_eps": cfg.get("norm_eps", 1e-5),
        "rope_theta": cfg["rope_base"],
        "rope_scaling": rope | {"rope_type": "llama3"} if rope else None,
        "tie_word_embeddings": bool(cfg.get("tie_embeddings", False)),
        "torch_dtype": str(cfg["dtype"]).removeprefix("torch."),
    }


def to_parts(model: nn.Module, shard_bytes: int) -> list[dict[str, torch.Tensor]]:
    """The weights by Hugging Face's names, in as many parts as `shard_bytes` a part asks for."""
    weights, parts, size = model.state_dict(), [{}], 0
    tied = model.cfg.get("tie_embeddings", False)
    for theirs, ours in huggingface_names(model.cfg["n_layers"]).items():
        if not (tied and ours == "out_head.weight"):
            weight = weights[ours].contiguous()
            if parts[-1] and size + weight.nbytes > shard_bytes:
                parts, size = [*parts, {}], 0
            parts[-1][theirs], size = weight, size + weight.nbytes
    return parts


def write_json(file: BinaryIO, content: dict) -> None:
    """Write `content` as indented JSON in UTF-8."""
    file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


INDEX = "model.safetensors.index.json"


def shard_names(count: int) -> list[str]:
    """The names of so many files of weights."""
    many = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return many if count > 1 else ["model.safetensors"]


def index_of(contents: dict[str, dict[str, torch.Tensor]]) -> dict:
    """What the index says of files with these tensors."""
    total = sum(weight.nbytes for part in contents.values() for weight in part.values())
    places = {name: file for file, part in contents.items() for name in part}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def write_huggingface(folder: Path, contents: dict[str, dict[str, torch.Tensor]], config: dict) -> None:
    """Write files of tensors, their index if they are several, and config.json; names come last."""
    index = [INDEX] if len(contents) > 1 else []
    with ExitStack() as files:
        for name, part in tqdm(contents.items(), leave=False, disable=None):
            file = files.enter_context(replacing(folder / name))
            save_file({key: weight.cpu() for key, weight in part.items()}, file.name, {"format": "pt"})
        for name in index:
            write_json(files.enter_context(replacing(folder / name)), index_of(contents))
        write_json(files.enter_context(replacing(folder / "config.json")), config)
    for path in (*folder.glob("model*.safetensors"), folder / INDEX):
        if path.name not in (*contents, *index):
            path.unlink(missing_ok=True)  # left over from a save with other shards


def save_huggingface(
    model: nn.Module, folder: str | Path, *, shard_bytes: int = 5_000_000_000, metadata: dict | None = None
) -> None:
    """Write `model` as a Hugging Face folder: config.json and model.safetensors, or shards and their index.

    Args: shard_bytes, how large a file may become; metadata, more keys for config.json, as eos_token_id.
    Every file is complete before the first takes its name. Raises InputError if shard_bytes is not above 0.
    """
    if shard_bytes < 1:
        raise InputError(f"shard_bytes is {shard_bytes}: give the size of a file in bytes")
    parts = to_parts(model, shard_bytes)
    write_huggingface(Path(folder), dict(zip(shard_names(len(parts)), parts)), to_config(model.cfg, metadata))
