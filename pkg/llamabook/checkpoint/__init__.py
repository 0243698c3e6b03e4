"""Weights in files, and the functions that find out which format a path holds. Written by hand."""

from pathlib import Path

import torch

from llamabook.checkpoint.gptfast import config_beside, load_gptfast
from llamabook.checkpoint.huggingface import (
    COUNTED,
    LEFT_OUT,
    choose_dtype,
    load_huggingface,
    read_config,
    read_object,
    read_tensors,
    read_weights,
    weight_files,
)
from llamabook.checkpoint.llama3_meta import load_llama3_meta, read_llama3_params
from llamabook.checkpoint.plain import load_plain
from llamabook.errors import CheckpointError
from llamabook.llama2 import Llama2Model

__all__ = ["load_config", "load_model"]



def load_quantized(
    path: str | Path, config: dict | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Llama2Model:  # fmt: skip
    """The model whose weights are the numbers that quantized ones stand for. Raises CheckpointError."""
    from llamabook.fast.quantize.files import load_dense  # a higher row, asked for these files alone

    return load_dense(path, config, device, dtype)


LOADERS = {
    "huggingface": load_huggingface,
    "meta": load_llama3_meta,
    "gptfast": load_gptfast,
    "plain": load_plain,
    "quantized": load_quantized,
    "quantized_gptfast": load_quantized,
}


def load_config(path: str | Path) -> dict:
    """The configuration of the checkpoint in `path`, a dict as LLAMA2_CONFIG_7B or LLAMA32_CONFIG_1B.

    `path` is as for `load_model`, or a folder with a config.json and no weights. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir() and (path / "config.json").exists() and not _weights_in(path):
        return check_config(path / "config.json")
    layout, place = recognize(path)
    if layout.startswith("quantized"):
        from llamabook.fast.quantize.files import read_quantized

        return read_quantized(path).config
    if layout == "meta":
        return read_llama3_params(place)
    if layout == "huggingface":
        tensors, folder = read_weights(place), place if place.is_dir() else place.parent
        config = read_config(folder / "config.json")
    else:
        tensors = read_tensors(place)
        config = config_beside(place, tensors)
    weights = {name: tensor for name, tensor in tensors.items() if not LEFT_OUT.search(name)}
    return config | {"dtype": choose_dtype(place, weights, None, config["dtype"])}


def load_model(
    path: str | Path,
    *,
    config: dict | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Llama2Model:
    """The model in `path`, in evaluation mode on `device`: a Llama2Model, or a Llama3Model where it takes one.

    `path` is a folder of Hugging Face (config.json, *.safetensors or *.bin), of Meta (consolidated.*.pth,
    params.json) or of gpt-fast (model.pth, config.json), one of these files, or a .pth by our own weight names.
    Quantized ones, which `llamabook quantize` or gpt-fast wrote, give the model of the numbers that they stand for.
    `config` is used instead of what stands beside the weights; dtype=None keeps their own.
    Nothing in the files is run, and they are mapped, not read. Raises CheckpointError.
    """
    layout, place = recognize(path)
    return LOADERS[layout](place, config, device, dtype)


def check_config(path: Path) -> dict:
    """What a config.json says, of a quantized checkpoint, too. Raises CheckpointError."""
    if "quantization_config" not in read_object(path):
        return read_config(path)
    from llamabook.fast.quantize.files import read_quantized_config

    return read_quantized_config(path)[0]


def recognize(path: str | Path) -> tuple[str, Path]:
    """The layout of what is in `path`, one of LOADERS, and the path that its loader takes. Raises CheckpointError."""
    layout, place = _layout_and_place(Path(path))
    config = (place if place.is_dir() else place.parent) / "config.json"
    if layout == "huggingface" and config.exists() and "quantization_config" in read_object(config):
        layout = "quantized"
    return layout, place


def _layout_and_place(path: Path) -> tuple[str, Path]:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path")
    if path.is_dir():
        found = _weights_in(path)
        if found is None:
            inside = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            what = f"has no model.safetensors, consolidated.00.pth or model.pth (it holds {inside})"
            raise CheckpointError(f"{path} {what}: give the folder with the weights")
        return found if isinstance(found, tuple) else _layout_and_place(found)
    if path.match("consolidated.*.pth") or path.name == "params.json":
        return "meta", path.parent
    if COUNTED.search(path.name):
        return "huggingface", path
    if path.suffix == ".json":
        return _layout_and_place(path.parent)
    return _layout_of(path), path


def _weights_in(folder: Path) -> tuple[str, Path] | Path | None:
    """What a folder's weights are, by the names of its files: a layout, a single file, or None."""
    files = weight_files(folder)
    if files:
        return ("huggingface", folder) if len(files) > 1 else files[0]
    if any(folder.glob("consolidated.*.pth")):
        return "meta", folder
    single = folder / "model.pth"
    others = [single] if single.exists() else sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    if len(others) > 1:
        names = ", ".join(file.name for file in others[:3])
        raise CheckpointError(f"{folder} has several files of weights ({names}): name the one to load")
    if not others and any(folder.glob("original/consolidated.*.pth")):
        return "meta", folder / "original"
    return others[0] if others else None


def _layout_of(path: Path) -> str:
    """The layout of one file of weights, by the names in it. Raises CheckpointError if they are of no Llama."""
    names = list(map(str, read_tensors(path)))
    for layout, beginnings in (
        ("huggingface", ("model.layers.", "model.embed_tokens.")),
        ("plain", ("trf_blocks.", "tok_emb.")),
        ("gptfast", ("layers.", "tok_embeddings.")),
    ):
        if any(name.startswith(beginnings) for name in names):
            quantized = layout == "gptfast" and any(name.endswith((".scales", ".scales_and_zeros")) for name in names)
            return f"quantized_{layout}" if quantized else layout
    what = ", ".join(name[:60] for name in names[:2]) or "nothing"
    raise CheckpointError(f"{path} has no weights of a Llama (but {what}): give another file")
