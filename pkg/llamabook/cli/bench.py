"""`llamabook bench`, written by hand: which way of decoding is how fast here, and how fast the memory lets it be."""

import datetime
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from llamabook.cli.speak import draft_folder, embedded, pick_device, pick_dtype
from llamabook.errors import InputError

USUAL = "regular,regular_compiled,kv_cache,kv_cache_compiled,static,static_compiled"
WITH_DRAFT = "static,speculative"


def compare(
    *,
    checkpoint_path: Path | None,
    shape: str | None,
    modes: str | None,
    draft_checkpoint_path: Path | None,
    speculate_k: int | None,
    device: str | None,
    dtype: str,
    batch_size: int,
    prompt_tokens: int,
    max_new_tokens: int,
    check_tokens: int,
    rounds: int,
    cold: bool,
    peers: tuple[str, ...],
    output: Path | None,
) -> None:
    """Measure, print the table, and write JSON and figure if asked."""
    from llamabook.bench.job import Job, check_draft, check_modes, config_of

    if checkpoint_path is not None and shape is not None:
        raise InputError("--checkpoint_path and --shape: give one of them")
    check_output(rounds, output)
    names = check_modes((WITH_DRAFT if draft_checkpoint_path else USUAL) if modes is None else modes)
    others = dict(check_peer(peer, names) for peer in peers)
    pick_dtype(dtype)
    job = Job(
        checkpoint_path=str(checkpoint_path) if checkpoint_path else None,
        shape=shape or (None if checkpoint_path else embedded()),
        device=pick_device(device),
        dtype=dtype,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        check_tokens=check_tokens,
        draft_checkpoint_path=str(draft_folder(draft_checkpoint_path)) if draft_checkpoint_path else None,
        speculate_k=speculate_k,
    )
    config = config_of(job)
    job.check(config)
    check_draft(job, names)

    from llamabook.bench import report
    from llamabook.bench.rotation import measure

    if job.device == "cpu":
        from llamabook.fast import kernels

        kernels.ready()  # built before anything is timed
    results = measure(names, job, config, rounds, cold, others, progress)
    progress("")
    rows = report.rows_of(results, job, config, datetime.date.today().isoformat())
    print(report.table(rows))
    if output is not None:
        report.write_json(rows, output)
        write_figure(partial(report.draw, rows), output.with_suffix(".png"))


def kernels_alone(*, rounds: int, output: Path | None) -> None:
    """Measure our kernels against torch's operators, without a model around them."""
    from llamabook.bench import micro, report

    check_output(rounds, output)
    rows = micro.measure(rounds, say=progress)
    progress("")
    print(micro.table(rows))
    if output is not None:
        report.write_json(rows, output)


def check_output(rounds: int, output: Path | None) -> None:
    """Raise InputError for a number of rounds or a file name that can't be."""
    if rounds < 1:
        raise InputError(f"--rounds is {rounds}: give 1 or more")
    if output is not None and output.suffix != ".json":
        raise InputError(f"--output is {output}: give a name that ends in .json; the figure gets the same one with .png")


def check_peer(words: str, taken: list[str]) -> tuple[str, tuple[str, ...]]:
    """NAME=COMMAND as a name and the words of the command."""
    name, _, command = words.partition("=")
    if not name or not command.strip() or name in taken:
        raise InputError(f"--peer is {words!r}: give NAME=COMMAND, with a name of its own")
    return name, tuple(shlex.split(command))


def progress(text: str) -> None:
    """Show on a terminal what is being done, over what was done before."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def write_figure(make: Callable, path: Path) -> None:
    """Write the figure that `make` makes, or say in one line why there is none."""
    from llamabook.files import replacing

    try:
        figure = make()
    except ImportError:
        print("llamabook: no figure, since matplotlib is not installed: pip install matplotlib", file=sys.stderr)
        return
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
