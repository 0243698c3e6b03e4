"""Our own small models and the world they speak of, written by hand.

`path(name)` is the folder of an embedded model, in the true format of its kind; `world` draws the texts it was trained
on, `questions` those that the instruct model learned from; `floor` measures a model against their entropy; `recipes`
says what the models are, and `train` makes them again.
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


def _models() -> Path:
    return Path(str(files(__name__))) / "models"
