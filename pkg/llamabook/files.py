"""What a file is before anyone parses it, and writing a file whole or not at all. Written by hand.

Downloads go wrong in a few known ways: nothing arrives, a login page arrives, or a pointer arrives where the
data should be. The first bytes tell them apart, so that the error can say what to do.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def why_unreadable(path: Path) -> str | None:
    """Why `path` is no data file, as a phrase with advice, or None if its first bytes show no reason."""
    if not path.exists():
        return "does not exist: check the path"
    if path.is_dir():
        return "is a folder, not a file: name a file in it"
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        return f"can't be opened ({error.strerror}): check its permissions"
    if not start:
        return "is empty (0 bytes): download it again"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, most likely a login page that a download saved: log in and download again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the data that it points to: run `git lfs pull` where it was cloned"
    return None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which takes the name `path` when the block ends and vanishes if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode
            yield file
        temporary.chmod(mode)  # a library that writes by name may leave a file that only its owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
