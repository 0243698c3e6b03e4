"""Our own small models and the world they speak of, written by hand.

`path(name)` is the folder of an embedded model, in the true format of its kind; `world` draws the texts it was trained
on, `questions` those that the instruct model learned from; `floor` measures a model against their entropy; `recipes`
says what the models are, and `train` makes them again. `inflate` lays one into the shape of a large model.
"""

import json
from importlib.resources import files
from pathlib import Path

from llamabook.errors import InputError

DEFAULT = "pocket-llama2"


def names() -> list[str]:
    """The embedded models."""
    return sorted(p.name for p in _models().iterdir() if p.is_dir())


def path(name: str = DEFAULT) -> Path:
    """The folder of an embedded model. Raises InputError for an unknown name."""
    folder = _models() / name
    if name not in names():
        raise InputError(f"no embedded model is called {name!r}: choose one of {', '.join(names())}")
    return folder


def training_log(name: str = DEFAULT) -> list[dict]:
    """The kept log of an embedded model's training.

    A list of measurements with step, tokens (seen so far), seconds, loss (training, nats per token), held_out and
    floor (model and world on the same held-out texts, nats per token) and gap (their distance per document, as a share
    of the entropy); the instruct model's also right (the share of 200 held-out questions).
    """
    return json.loads((path(name) / "training_log.json").read_text())


def load_gpt():
    """The embedded pocket GPT and its tokenizer: (GPTModel in float32 and eval mode, Llama2Tokenizer)."""
    import torch

    from llamabook.gpt import GPTModel
    from llamabook.tokenizer import Llama2Tokenizer

    folder = path("pocket-gpt")
    model = GPTModel({**json.loads((folder / "config.json").read_text()), "dtype": torch.float32})
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    return model.eval(), Llama2Tokenizer(folder / "tokenizer.model")


def inflate(model, config: dict, output: str | Path | None = None, *, force: bool = False):
    """A small Llama in the shape `config`, computing the same function: its texts at the cost of a larger model.

    Args: model, the name of an embedded one, a folder that `load_model` takes, or a Llama2Model or Llama3Model; config, as
    LLAMA32_CONFIG_1B, with the same head_dim and nothing smaller; output, a Hugging Face folder to write, which says where
    it comes from; force, whether it may replace a checkpoint there.
    Returns the model, in config["dtype"], or the folder, which takes less than a GB of memory to write, whatever its size.
    RoPE and the ids that end a text are the small model's. Raises InputError if it does not fit into the shape.
    """
    from llamabook.pocket.inflation import inflate  # imported here: torch and the checkpoints take a second

    return inflate(model, config, output, force=force)


def _models() -> Path:
    return Path(str(files(__name__))) / "models"
