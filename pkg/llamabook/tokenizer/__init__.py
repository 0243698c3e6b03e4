"""Tokenizers, and one function that picks the right one for a path. Written by hand."""

import re
from pathlib import Path

from llamabook.errors import TokenizerError
from llamabook.tokenizer.llama2 import Llama2ChatFormat, Llama2Tokenizer

__all__ = ["Llama2ChatFormat", "Llama2Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | Path) -> Llama2Tokenizer:
    """The tokenizer in `path`, a tokenizer.model or the folder that holds one.

    Raises TokenizerError if there is none, or if it is of a kind that the book has not reached.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "tokenizer.model").exists():
            inside = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            raise TokenizerError(f"{path} has no tokenizer.model (it holds {inside}): name another folder")
        path = path / "tokenizer.model"
    if path.is_file() and _is_ranks_file(path):
        raise TokenizerError(f"{path} is Llama 3's kind (tiktoken ranks), for chapter 2: give Llama 2's")
    return Llama2Tokenizer(path)


def _is_ranks_file(path: Path) -> bool:
    """Whether the file starts as tiktoken's ranks do: base64, a space and a number on each line."""
    with path.open("rb") as file:
        token, _, rank = file.readline(256).strip().partition(b" ")
    return rank.isdigit() and re.fullmatch(rb"[A-Za-z0-9+/]+=*", token) is not None
