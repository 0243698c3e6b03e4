"""Tokenizers, and the functions that pick the right one and the right chat format. Written by hand."""

import re
from pathlib import Path

from llamabook.errors import TokenizerError
from llamabook.tokenizer.chat import ChatFormat, clean_text
from llamabook.tokenizer.llama2 import Llama2ChatFormat, Llama2Tokenizer
from llamabook.tokenizer.llama3 import Llama3Tokenizer

__all__ = [
    "ChatFormat",
    "Llama2ChatFormat",
    "Llama2Tokenizer",
    "Llama3Tokenizer",
    "chat_format",
    "clean_text",
    "has_tokenizer",
    "load_tokenizer",
    "tokenizer_folder",
]


NAMES = ("tokenizer.model", "tokenizer.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's file is in `folder`."""
    return any((folder / name).exists() for name in NAMES)


def load_tokenizer(path: str | Path) -> Llama2Tokenizer | Llama3Tokenizer:
    """The tokenizer in `path`: a tokenizer.model of Llama 2 or 3, a tokenizer.json of Llama 3, or the folder of one.

    A folder's tokenizer.model comes first. Which kind a file is, its first bytes say and not its name.
    Raises TokenizerError if there is none.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).exists()]
        if not found:
            inside = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            raise TokenizerError(
                f"{path} has no tokenizer.model and no tokenizer.json (it holds {inside}): name another folder"
            )
        path = found[0]
    return Llama3Tokenizer(path) if path.is_file() and _is_llama3s(path) else Llama2Tokenizer(path)


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer of a checkpoint is: beside the weights, or where Meta's own downloads put it."""
    folder = path if path.is_dir() else path.parent
    places = [folder, folder / "original"]
    if any(folder.glob("consolidated.*.pth")):
        places.append(folder.resolve().parent)
    return next(filter(has_tokenizer, places), folder)


def chat_format(tokenizer: Llama2Tokenizer | Llama3Tokenizer) -> Llama2ChatFormat | ChatFormat:
    """The chat format that goes with a tokenizer."""
    return ChatFormat(tokenizer) if isinstance(tokenizer, Llama3Tokenizer) else Llama2ChatFormat(tokenizer)


def _is_llama3s(path: Path) -> bool:
    """Whether the file starts as JSON does, or as tiktoken's ranks do: base64, a space and a number on a line."""
    with path.open("rb") as file:
        line = file.readline(256).lstrip(b"\xef\xbb\xbf \t").strip()
    token, _, rank = line.partition(b" ")
    return line[:1] == b"{" or rank.isdigit() and re.fullmatch(rb"[A-Za-z0-9+/]+=*", token) is not None
