"""From the notebook ch02_llama2_to_llama3/03_every_checkpoint.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from pathlib import Path

import torch
from torch import nn

from llamabook.checkpoint.huggingface import build_llama, check_layers, choose_dtype, equal, number
from llamabook.checkpoint.meta import load_meta, read_json, read_params, read_shards, save_meta, to_params
from llamabook.errors import CheckpointError
from llamabook.llama2 import head_dim_of

CONTEXTS = {500_000.0: 8192, 1_000_000.0: 16_384}  # by the base of RoPE: Llama 3, Code Llama (others: 4096)
FOREIGN = {  # what a params.json may ask for that no plain Llama has
    "quantization_args": "quantized weights",
    "lora_args": "low-rank adapters",
    "moe_args": "a mixture of experts",
    "moe": "a mixture of experts",
    "vision_chunk_size": "images",
    "sliding_window": "sliding-window attention",
    "attention_chunk_size": "chunked attention",
    "use_qk_norm": "normalized queries and keys",
}


def scaling_of(path: Path, params: dict, tied: bool) -> dict | None:
    """The RoPE scaling of a params.json, with Meta's numbers if it is silent. Raises CheckpointError."""
    if not params.get("use_scaled_rope"):
        return None
    usual = {"factor": 32.0 if tied else 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    names = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor")
    given = (number(path, params, name, usual[key], whole=False) for key, name in zip(usual, names))
    scaling = {key: float(value) for key, value in zip(usual, given)}
    return scaling | {"original_context_length": number(path, params, "rope_original_context_length", 8192)}


def read_llama3_params(folder: str | Path, shards: list[dict[str, torch.Tensor]] | None = None) -> dict:
    """The configuration of a folder in Meta's format, Llama 2 or 3: `read_params`, and what Llama 3 adds.

    The head is tied if it equals the token table. Raises CheckpointError.
    """
    path, shards = Path(folder) / "params.json", read_shards(folder) if shards is None else shards
    params, config = read_json(path), read_params(folder, shards)
    for key, about in FOREIGN.items():
        if params.get(key) not in (None, False, -1):
            what = f"asks for {about} ({key}), which no plain Llama has"
            raise CheckpointError(f"{path} {what}: give another checkpoint")
    tied = all(equal(shard.get("output.weight"), shard.get("tok_embeddings.weight")) for shard in shards)
    config["rope_freq"] = scaling_of(path, params, tied)
    if "max_seq_len" not in params:
        context = 131_072 if config["rope_freq"] else CONTEXTS.get(config["rope_base"], 4096)
        config["context_length"] = context
    if params.get("head_dim", 0) * config["n_heads"] not in (0, config["emb_dim"]):
        config["head_dim"] = params["head_dim"]
    return config | ({"tie_embeddings": True} if tied else {})


def load_llama3_meta(
    path: str | Path, config: dict | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:  # fmt: skip
    """A model from a folder with consolidated.*.pth and params.json, as Meta publishes Llama 2 and 3.

    Args: path, the folder; config, used instead of params.json; dtype, None for the files' own.
    Raises CheckpointError.
    """
    path, shards = Path(path), read_shards(path)
    config = read_llama3_params(path, shards) if config is None else config
    check_layers(path, shards[0], config)
    for shard in shards:
        choose_dtype(path, shard, torch.float32, None)  # refuses what is no plain floating point
    return load_meta(path, config, device, dtype, model_class=build_llama)


def to_llama3_params(cfg: dict) -> dict:
    """What params.json says of a configuration of Llama 2 or 3; what is usual there is left out.

    Two keys are our own, where a scaling of RoPE is unlike Meta's: rope_low_freq_factor and
    rope_original_context_length. Meta's program knows neither these nor head_dim.
    """
    params = to_params({**cfg, "rope_freq": None, "head_dim": None})
    scaling, tied = cfg["rope_freq"], cfg.get("tie_embeddings", False)
    if head_dim_of(cfg) * cfg["n_heads"] != cfg["emb_dim"]:
        params["head_dim"] = head_dim_of(cfg)
    if scaling is not None:
        params["use_scaled_rope"] = True
        usual = scaling_of(Path("params.json"), params, tied)
        names = {key: f"rope_{key}" for key in usual} | {"factor": "rope_scaling_factor"}
        params |= {names[key]: scaling[key] for key in usual if scaling[key] != usual[key]}
    usual = 131_072 if scaling else CONTEXTS.get(cfg["rope_base"], 4096)
    params.pop("max_seq_len", None)
    return params | ({"max_seq_len": cfg["context_length"]} if cfg["context_length"] != usual else {})


def save_llama3_meta(model: nn.Module, folder: str | Path, shards: int = 1) -> None:
    """`save_meta` with the params.json of Llama 3."""
    save_meta(model, folder, shards, to_llama3_params(model.cfg))
