"""`llamabook train`, written by hand: make an embedded model again, and say how to talk to it."""

import sys
from pathlib import Path

from llamabook.errors import InputError


def learn(*, name: str, output: Path | None, base: Path | None, steps: int | None, restart: bool) -> None:
    """Train the pocket model `name`; killed or interrupted, the same command goes on from the last saved step."""
    if steps is not None and steps < 1:
        raise InputError(f"--steps is {steps}: give 1 or more, or leave it out for the whole recipe")

    from tqdm import tqdm

    from llamabook.pocket.train import train

    try:
        folder = train(name, output, base=base, steps=steps, resume=not restart, log=tqdm.write)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from the last saved step.", file=sys.stderr)
        raise
    print(f"Written to {folder}")
    if name.endswith("-instruct"):
        print(f"Next: python -m llamabook chat --checkpoint_path {folder}")
    elif any((folder / file).exists() for file in ("consolidated.00.pth", "model.safetensors")):
        print(f"Next: python -m llamabook generate --checkpoint_path {folder}")
