"""From the notebook ch02_llama2_to_llama3/03_every_checkpoint.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from pathlib import Path

import torch
from torch import nn

from llamabook.checkpoint.huggingface import fill, read_config, read_tensors, to_config, write_json
from llamabook.checkpoint.llama3_meta import read_llama3_params
from llamabook.checkpoint.meta import rotated_heads, tensor_names
from llamabook.errors import CheckpointError
from llamabook.files import replacing
from llamabook.llama2 import half_split_to_interleaved, interleaved_to_half_split


def split_fused(where: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-fast's tensors by Meta's names: attention.wqkv becomes wq, wk and wv. Raises CheckpointError."""
    parts = {}
    for name, weight in tensors.items():
        if not name.endswith("attention.wqkv.weight"):
            parts[name] = weight
            continue
        stem = name.removesuffix("wqkv.weight")
        out = tensors.get(f"{stem}wo.weight")  # (D, H * d)
        queries = out.shape[1] if out is not None and out.ndim == 2 else 0
        rest = weight.shape[0] - queries if weight.ndim == 2 else 0  # 2 * G * d rows
        if not queries or rest <= 0 or rest % 2:
            what = f"{name} is {tuple(weight.shape)}, no queries, keys and values for its wo"
            raise CheckpointError(f"{where}: {what}: download it again")
        cut = weight.split([queries, rest // 2, rest // 2])
        parts |= {f"{stem}{part}.weight": rows for part, rows in zip(("wq", "wk", "wv"), cut)}
    return parts


def to_half_split(ours: str, weight: torch.Tensor, config: dict) -> torch.Tensor:
    """The weight with the rows of queries and keys in our order; values get memory of their own."""
    heads = rotated_heads(ours, config)
    if heads:
        return interleaved_to_half_split(weight, heads)
    return weight.clone() if ".W_value." in ours else weight  # a view would keep, and save, all of wqkv


def config_beside(path: Path, tensors: dict[str, torch.Tensor]) -> dict:
    """What config.json, or else Meta's params.json, says beside `path`. Raises CheckpointError."""
    if (path.parent / "config.json").exists():
        return read_config(path.parent / "config.json")
    if (path.parent / "params.json").exists() and "tok_embeddings.weight" in tensors:
        return read_llama3_params(path.parent, [tensors])
    what = "holds weights but no configuration"
    raise CheckpointError(f"{path} {what}: put the model's config.json beside it, or give config=")


def load_gptfast(
    path: str | Path, config: dict | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:  # fmt: skip
    """A model from gpt-fast's model.pth; wq, wk and wv may be fused or not.

    Args: path, the file or its folder; config, used instead of the config.json (or params.json) beside it;
    dtype, None for the file's own. Raises CheckpointError.
    """
    path = Path(path)
    path = path / "model.pth" if path.is_dir() else path
    tensors = read_tensors(path)
    config = config_beside(path, tensors) if config is None else config
    return fill(path, split_fused(path, tensors), gptfast_names, config, device, dtype, to_half_split)


def gptfast_names(n_layers: int) -> dict[str, str]:
    """The names of gpt-fast's tensors, wqkv cut into three, with ours: they are Meta's."""
    return {meta: ours for meta, (ours, _) in tensor_names(n_layers).items()}


def to_fused(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of `model` by gpt-fast's names, queries and keys in its row order and fused with values."""
    weights, fused = {name: weight.cpu() for name, weight in model.state_dict().items()}, {}
    for meta, ours in gptfast_names(model.cfg["n_layers"]).items():
        weight, heads = weights[ours], rotated_heads(ours, model.cfg)
        weight = half_split_to_interleaved(weight, heads) if heads else weight
        stem, _, part = meta.removesuffix(".weight").rpartition(".")
        name = f"{stem}.wqkv.weight" if part in ("wq", "wk", "wv") else meta
        fused[name] = torch.cat([fused[name], weight]) if name in fused else weight
    return fused


def save_gptfast(model: nn.Module, folder: str | Path, metadata: dict | None = None) -> None:
    """Write `model` for gpt-fast: model.pth, and beside it a config.json as `to_config` makes it."""
    folder = Path(folder)
    with replacing(folder / "model.pth") as file, replacing(folder / "config.json") as config:
        torch.save(to_fused(model), file)
        file.flush()
        write_json(config, to_config(model.cfg, metadata))
