"""`llamabook convert`, written by hand: a checkpoint of one layout from one of another."""

from pathlib import Path

from llamabook.cli.speak import pick_dtype


def rewrite(*, src: Path, dst: Path, layout: str, dtype: str | None, force: bool) -> None:
    """Convert `src` into the folder `dst` and say what was written."""
    kind = pick_dtype(dtype)

    from llamabook.checkpoint.convert import convert

    convert(src, dst, layout=layout, dtype=kind, force=force)
    files = sorted(dst.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"Written to {dst}: {', '.join(file.name for file in files)} ({size / 1e6:,.1f} MB)")
