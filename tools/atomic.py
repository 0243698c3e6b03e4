"""How the tools write a file. Needs nothing but Python."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write in one step: a reader of the file, or an interrupted run, finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
