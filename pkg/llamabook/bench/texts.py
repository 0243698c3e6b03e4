"""What a draft is measured on, written by hand: text, since how often a draft is right depends on what is said."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from llamabook.errors import InputError
from llamabook.files import why_unreadable


def stories() -> Iterator[str]:
    """Stories of the farm that no embedded model was trained on, endless, always the same."""
    from llamabook.pocket import world

    return (document.text for document in world.texts("held_out") if document.kind == "story")


def beginnings(n: int) -> list[str]:
    """The first sentences of n stories."""
    return [re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0] for text in islice(stories(), n)]


def lines_of(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines are none. Raises InputError if there is nothing to read."""
    reason = None if path.exists() and not path.is_dir() else why_unreadable(path)
    if reason:
        raise InputError(f"--prompts {path}: {reason}")
    try:
        found = [line for line in path.read_bytes().decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeError:
        raise InputError(f"--prompts {path}: it is not valid UTF-8: save it as UTF-8") from None
    if not found:
        raise InputError(f"--prompts {path}: there is no prompt in it: write one a line")
    return found


def rows_of_text(tokenizer, rows: int, tokens: int) -> list[list[int]]:
    """`rows` prompts of exactly `tokens` ids each: BOS, and stories one after the other until it is enough."""
    drawn, prompts = stories(), []
    for _ in range(rows):
        text, ids = next(drawn), []
        while len(ids := tokenizer.encode(text, bos=True)) < tokens:
            text += "\n" + next(drawn)
        prompts.append(ids[:tokens])
    return prompts
