"""`llamabook eval`, written by hand: scores on tasks, or the perplexity of a text, as a table and as JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from llamabook.cli.generate import check_count
from llamabook.cli.speak import Speaker
from llamabook.errors import InputError


def score_tasks(
    *,
    names: list[str],
    load: Callable[[], Speaker],
    limit: int | None,
    max_length: int | None,
    batch_size: int,
    compile: bool,
    output: Path | None,
) -> None:
    """Print what the model scores on these tasks, by default those of the farm."""
    check_count("batch_size", batch_size)
    check_output(output)
    for flag, value in (("limit", limit), ("max_seq_length", max_length)):
        if value is not None:
            check_count(flag, value)
    from llamabook.evaluate.harness import FARM, evaluate, load_tasks

    tasks = load_tasks(names or FARM)  # before the model: what is missing is said at once
    speaker = load()
    limit_of_model(speaker, "max_seq_length", max_length)
    scores = evaluate(
        speaker.model, speaker.tokenizer, tasks,
        limit=limit, batch_size=batch_size, max_length=max_length, compile=compile,
    )  # fmt: skip
    rows = [score for metrics in scores.values() for score in metrics.values()]
    print(table_of_scores(rows))
    write(output, {"model": speaker.name, "limit": limit, "scores": [asdict(row) for row in rows]})


def score_text(
    *,
    path: Path,
    load: Callable[[], Speaker],
    window: int | None,
    stride: int | None,
    batch_size: int,
    compile: bool,
    output: Path | None,
) -> None:
    """Print the perplexity of a text file."""
    from llamabook.evaluate.perplexity import perplexity_of_text, read_text

    check_count("batch_size", batch_size)
    check_output(output)
    for flag, value in (("window", window), ("stride", stride)):
        if value is not None:
            check_count(flag, value)
    text = read_text(path)
    speaker = load()
    limit_of_model(speaker, "window", window)
    found = perplexity_of_text(
        speaker.model, speaker.tokenizer, text, window=window, stride=stride, batch_size=batch_size, compile=compile
    )
    derived = ("nats_per_token", "perplexity", "nats_per_byte", "bits_per_byte")
    rows = {**asdict(found), **{name: getattr(found, name) for name in derived}}
    shown = {"tokens": found.tokens, "bytes": found.bytes} | {name: f"{rows[name]:.4f}" for name in derived}
    print(aligned([[name.replace("_", " "), str(value)] for name, value in shown.items()]))
    print(f"Windows of {found.window} tokens, {found.stride} apart: {found.windows}.")
    write(output, {"model": speaker.name, "file": str(path), **rows})


def table_of_scores(rows: list) -> str:
    """One line for each task and metric."""
    lines = [["task", "metric", "score", "chance", "questions"]]
    for row in rows:
        error = "" if row.error is None else f" ± {row.error:.4f}"
        chance = "" if row.chance is None else f"{row.chance:.4f}"
        lines.append([row.task, row.metric, f"{row.value:.4f}{error}", chance, str(row.questions or "")])
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Cells in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def limit_of_model(speaker: Speaker, flag: str, value: int | None) -> None:
    """Raise InputError for more tokens than the model has context."""
    if value is not None and value > speaker.context_length:
        raise InputError(f"--{flag} is {value}, the model's context length is {speaker.context_length}: give that or less")


def check_output(output: Path | None) -> None:
    """Raise InputError for a file that can't be written, before anything is measured."""
    if output is not None and (output.suffix != ".json" or output.is_dir()):
        raise InputError(f"--output is {output}: give the name of a file that ends in .json")


def write(output: Path | None, content: dict) -> None:
    """Write `content` as JSON, if there is a name for it."""
    if output is None:
        return
    from llamabook.files import replacing

    with replacing(output) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
