"""`llamabook generate`, written by hand: texts to stdout as they are drawn, everything about them to stderr."""

import gzip
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

from llamabook.cli.console import converse, show, stoppable, tell
from llamabook.cli.speak import Sampling, Speaker, Spoken, read_prompt
from llamabook.errors import InputError


def write(
    *,
    load: Callable[[], Speaker],
    prompt: str,
    sampling: Sampling,
    num_samples: int,
    batch_size: int,
    profile: Path | None,
) -> None:
    """Write `num_samples` texts that continue `prompt`, at most `batch_size` of them side by side.

    The first of a batch is shown as it is drawn, the others when all are there: the same bytes for every batch size.
    """
    sampling.check()
    check_count("batch_size", batch_size)
    check_count("num_samples", num_samples)
    trace = profile and trace_path(profile)
    if trace:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks; torch reads it when it is imported
    prompt = read_prompt(prompt)
    speaker = load()
    ids = speaker.encode(prompt, sampling.max_new_tokens)
    batches = []
    for number in range(0, num_samples, batch_size):
        rows = min(batch_size, num_samples - number)
        speaker.warm_up(ids, sampling, rows)
        if number:
            show("\n")
        with tracing(trace if number + rows == num_samples else None):
            batches.append(write_batch(speaker, ids, sampling, rows, number))
        label = f"Samples {number + 1} to {number + rows}" if rows > 1 else f"Sample {number + 1}"
        report(speaker, ids, batches[-1], f"{label}: " if num_samples > 1 else "")
    if len(batches) > 1:
        speed = sum(batch.tokens for batch in batches) / sum(batch.seconds for batch in batches)
        tell(f"Average: {speed:.1f} tokens/s")
    tell_memory(speaker.device)


def write_batch(speaker: Speaker, ids: list[int], sampling: Sampling, rows: int, number: int) -> Spoken:
    """Write the texts from `number` on, an empty line between two of them."""
    later = [io.StringIO() for _ in range(rows - 1)]
    writers = [show, *(text.write for text in later)]
    spoken = speaker.speak(ids, sampling, writers, number, echo=not speaker.chat)
    show("\n" + "".join(f"\n{text.getvalue()}\n" for text in later))
    return spoken


def continue_lines(*, load: Callable[[], Speaker], sampling: Sampling) -> None:
    """Continue each line of stdin, or, if the speaker is one for a chat, answer it; none remembers those before."""
    sampling.check()
    speaker = load()
    speaker.warm_up(speaker.encode("?", 1), sampling)
    numbers = count()

    def take(line: str) -> bool:
        if not line.strip():
            return True
        ids = speaker.encode(line, sampling.max_new_tokens)
        try:
            with stoppable():
                spoken = speaker.speak(ids, sampling, [show], next(numbers))
        except KeyboardInterrupt:
            spoken = None
        show("\n")
        if spoken:
            report(speaker, ids, spoken)
        else:
            tell("Stopped.")
        return True

    converse(take, f"{speaker}. Each line is a prompt.")
    tell_memory(speaker.device)


def report(speaker: Speaker, ids: list[int], spoken: Spoken, label: str = "") -> None:
    """Say how fast it was, and how much of the memory's speed that is."""
    tell(f"{label}{spoken}")
    if spoken.statistics is not None:
        tell(f"Speculation: {spoken.statistics}")
    elif spoken.steps > 0:
        speed = speaker.step_bytes(len(ids), spoken) * spoken.steps_per_second
        tell(f"Bandwidth achieved: {speed / 1e9:.1f} GB/s")
    if spoken.cut:
        tell(f"Stopped at the context length of {speaker.context_length} tokens.")


def tell_memory(device) -> None:
    """Say the most memory that was used: torch's on a GPU, else the whole program's, mapped files included."""
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated(device)
    else:
        try:
            import resource
        except ImportError:  # Windows
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tell(f"Memory used: {peak / 1e9:.2f} GB")


def check_count(name: str, value: int) -> None:
    """Raise InputError unless `value` is 1 or more."""
    if value < 1:
        raise InputError(f"--{name} is {value}: give 1 or more")


def trace_path(path: Path) -> Path:
    """Where the trace goes: `path`, with .json behind it if it has no such ending. Raises InputError if it can't."""
    whole = Path(path if path.name.endswith((".json", ".json.gz")) else f"{path}.json")
    if path.is_dir() or whole.is_dir():
        raise InputError(f"--profile is {path}: that is a folder, name a file")
    if not whole.parent.is_dir():
        raise InputError(f"--profile is {path}: there is no folder {whole.parent}")
    return whole


@contextmanager
def tracing(path: Path | None) -> Iterator[None]:
    """Write what happens in this block to `path`, for Perfetto or chrome://tracing; None: do nothing."""
    if path is None:
        yield
        return
    from torch.profiler import profile

    from llamabook.files import replacing

    with profile() as profiler:
        yield
    with tempfile.TemporaryDirectory() as folder, replacing(path) as file:
        plain = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(plain))
        packed = gzip.open(file, "wb") if path.suffix == ".gz" else nullcontext(file)
        with plain.open("rb") as source, packed as target:
            shutil.copyfileobj(source, target)
    tell(f"The trace is in {path}: open it at https://ui.perfetto.dev")
