"""`llamabook inflate`, written by hand: a small Llama in the shape of a large one."""

from pathlib import Path

from llamabook.cli.speak import embedded, pick_dtype
from llamabook.errors import InputError


def lay(*, checkpoint_path: Path | None, shape: str, output: Path, dtype: str | None, force: bool) -> None:
    """Inflate a checkpoint into the folder `output` and say what was written."""
    kind = pick_dtype(dtype)

    from llamabook import pocket
    from llamabook.bench.job import shapes

    known = shapes()
    if shape not in known:
        raise InputError(f"there is no shape {shape!r}: this version has {', '.join(sorted(known))}")
    config = known[shape]
    source = checkpoint_path or embedded()
    pocket.inflate(source, {**config, "dtype": kind or config["dtype"]}, output, force=force)
    files = sorted(output.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"Written to {output}: {', '.join(file.name for file in files)} ({size / 1e6:,.1f} MB)")
    print(f"The shape and the cost of {shape}, the texts of {Path(source).resolve().name}: what is added computes zeros.")
    print(f"Next: python -m llamabook generate --checkpoint_path {output}")
