"""Weights in files, and the functions that find out which format a path holds. Written by hand."""

from pathlib import Path

import torch

from llamabook.checkpoint.meta import load_meta, read_params
from llamabook.errors import CheckpointError
from llamabook.llama2 import Llama2Model

__all__ = ["load_config", "load_model"]


def load_config(path: str | Path) -> dict:
    """The configuration of the checkpoint in `path`, a dict as LLAMA2_CONFIG_7B. Raises CheckpointError."""
    return read_params(find_meta(path))


def load_model(
    path: str | Path,
    *,
    config: dict | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Llama2Model:
    """The model in `path`, in evaluation mode on `device`. dtype=None keeps the checkpoint's own.

    `path` is a folder with Meta's consolidated.*.pth and params.json, or one of those files.
    `config` is used instead of what the checkpoint says. Raises CheckpointError.
    """
    return load_meta(find_meta(path), config=config, device=device, dtype=dtype)


def find_meta(path: str | Path) -> Path:
    """The folder of a checkpoint in Meta's format. Raises CheckpointError that says what is there instead."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and not (path.match("consolidated.*.pth") or path.name == "params.json"):
        raise CheckpointError(f"{path} is no consolidated.00.pth: give the folder that holds one")
    names = sorted(file.name for file in folder.iterdir())
    if any(Path(name).match("consolidated.*.pth") for name in names):
        return folder
    if any(name == "config.json" or name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{folder} is in Hugging Face's format, for chapter 2: give one in Meta's")
    inside = ", ".join(names[:5]) or "nothing"
    raise CheckpointError(f"{folder} has no consolidated.00.pth (it holds {inside}): give another folder")
