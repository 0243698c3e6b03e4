"""From the notebook ch02_llama2_to_llama3/03_every_checkpoint.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from pathlib import Path

import torch
from torch import nn

from llamabook.checkpoint.gptfast import config_beside
from llamabook.checkpoint.huggingface import fill, huggingface_names, read_tensors


def plain_names(n_layers: int) -> dict[str, str]:
    """Our own name of every tensor, twice."""
    return {ours: ours for ours in huggingface_names(n_layers).values()}


def load_plain(
    path: str | Path, config: dict | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:  # fmt: skip
    """A model from a .pth (or safetensors) file with our own weight names, as llama3.2-1B-instruct.pth.

    Args: path; config, used instead of the config.json beside it; dtype, None for the file's own.
    Stored masks and RoPE tables are passed over. Raises CheckpointError.
    """
    path = Path(path)
    tensors = read_tensors(path)
    config = config_beside(path, tensors) if config is None else config
    return fill(path, tensors, plain_names, config, device, dtype)
