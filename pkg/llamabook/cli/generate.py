"""`llamabook generate`, written by hand: texts to stdout as they are drawn, everything about them to stderr."""

import sys
from pathlib import Path

from llamabook.cli.speak import Sampling, Speaker, read_prompt
from llamabook.errors import InputError


def write(
    *,
    checkpoint_path: Path | None,
    prompt: str,
    sampling: Sampling,
    num_samples: int,
    seed: int,
    device: str | None,
    dtype: str | None,
    chat: bool,
) -> None:
    """Write `num_samples` texts that continue `prompt`; sample by sample from one seeded generator."""
    sampling.check()
    if num_samples < 1:
        raise InputError(f"--num_samples is {num_samples}: give 1 or more")
    check_seed(seed)
    prompt = read_prompt(prompt)

    import torch

    speaker = Speaker(checkpoint_path, device, chat, dtype)
    ids = speaker.encode(prompt, sampling.max_new_tokens)
    generator = torch.Generator(speaker.device).manual_seed(seed)
    texts = []
    for number in range(num_samples):
        if number:
            show("\n")
        texts.append(speaker.speak(ids, sampling, generator, show))
        show("\n")
        label = f"Sample {number + 1}: " if num_samples > 1 else ""
        print(f"{label}{texts[-1]}", file=sys.stderr)
        if texts[-1].cut:
            print(f"Stopped at the context length of {speaker.context_length} tokens.", file=sys.stderr)
    if num_samples > 1:
        speed = sum(len(text.ids) for text in texts) / sum(text.seconds for text in texts)
        print(f"Average: {speed:.1f} tokens/s", file=sys.stderr)


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that torch can't take."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed is {seed}: give a whole number from 0 to {2**63 - 1}")


def show(text: str) -> None:
    """Put `text` on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
