"""`llamabook draft-eval`, written by hand: how much faster a draft makes a model, at which batch size, with how many tokens."""

import datetime
import re
from functools import partial
from pathlib import Path

from llamabook.bench.texts import beginnings, lines_of
from llamabook.cli.bench import check_output, progress, write_figure
from llamabook.cli.speak import Sampling, draft_folder, pick_device, pick_dtype
from llamabook.errors import InputError

TARGET, DRAFT = "pocket-llama3.2", "pocket-draft"  # where none is named
MOST = 4096  # a list that is longer than any machine has patience for is a slip of the finger


def measure_draft(
    *,
    checkpoint_path: Path | None,
    draft_checkpoint_path: Path | None,
    batch_size: str,
    speculate_k: str,
    prompts: Path | None,
    max_new_tokens: int,
    rounds: int,
    temperature: float,
    seed: int,
    device: str | None,
    dtype: str | None,
    draft_dtype: str | None,
    compile: bool,
    exact_activations: bool,
    output: Path | None,
) -> None:
    """Measure, print what was foretold and what was found, and write JSON and figure if asked."""
    batch_sizes, ks = numbers("batch_size", batch_size), numbers("speculate_k", speculate_k)
    check_output(rounds, output)
    Sampling(max_new_tokens, temperature, seed=seed).check()
    texts = None if prompts is None else lines_of(prompts)
    place, asked, asked_draft = pick_device(device), pick_dtype(dtype), pick_dtype(draft_dtype)

    import torch

    from llamabook import fast, pocket
    from llamabook.bench import draft_report
    from llamabook.bench.draft import ADAPTIVE, Lab, check_length, measure, reach
    from llamabook.bench.worker import machine, versions
    from llamabook.fast import kernels

    check_length(max_new_tokens, ks)
    own = torch.float32 if checkpoint_path is None else None  # small, and the same text on more machines
    path = checkpoint_path or pocket.path(TARGET)
    draft_path = draft_folder(draft_checkpoint_path) if draft_checkpoint_path else pocket.path(DRAFT)
    how = {"device": place, "activations": "exact" if exact_activations else "rounded"}
    model, tokenizer = fast.load(path, dtype=asked or own, **how)
    draft = fast.load_draft(draft_path, dtype=asked_draft or asked or own, **how)
    ids = [tokenizer.encode(text, bos=True) for text in texts or beginnings(max(batch_sizes) * rounds)]
    fast.stream(model, ids, max_new_tokens + reach(*ks, ADAPTIVE), draft=draft)  # refuses what can't be, and does nothing
    if place == "cpu":
        kernels.ready()  # built before anything is timed

    def tell(batch: dict) -> None:
        progress("")
        print(f"{draft_report.table(batch)}\n" if "rows" in batch else draft_report.foretold(batch), flush=True)

    lab = Lab(model, draft, {"temperature": temperature, "compile": compile})
    batches = measure(lab, ids, batch_sizes, ks, max_new_tokens, rounds, seed, progress, tell)
    asked_for = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens, "compile": compile, "rounds": rounds}
    report = {
        "measured": datetime.date.today().isoformat(),
        "target": about(path, model),
        "draft": about(draft_path, draft),
        "prompts": {"from": str(prompts or "the farm"), "number": len(ids), "tokens": [len(row) for row in ids]},
        **asked_for,
        "device": place,
        "versions": versions(torch.device(place)),
        "machine": machine(torch.device(place)),
        "batches": batches,
        "error": draft_report.accuracy(batches),
    }
    print(draft_report.last_line(report["error"]))
    if output is not None:
        from llamabook.bench.report import write_json

        write_json(report, output)
        write_figure(partial(draft_report.draw, report), output.with_suffix(".png"))


def numbers(flag: str, words: str) -> list[int]:
    """The whole numbers from 1 up in a list like "1,2,4" or "1..4,8", in order. Raises InputError."""
    found: list[int] = []
    for word in words.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\.\.(\d{1,9}))?\s*", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last or last - first >= MOST:
            raise InputError(f"--{flag} is {words!r}: give numbers from 1 up, as 1,2,4 or 1..8")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise InputError(f"--{flag} is {words!r}: name each number once")
    return found


def about(path: Path, model) -> dict:
    """Which model: its name, shape and precision, and the bytes of weights that a pass reads."""
    from llamabook.fast.engine import weight_bytes

    shape = {name: value for name, value in model.cfg.items() if name != "dtype"}
    return {
        "name": (path if path.is_dir() else path.parent).resolve().name,
        "dtype": str(model.cfg["dtype"]).removeprefix("torch."),
        "quantization": getattr(model, "quantization", None),
        "bytes": weight_bytes(model),
        "shape": shape,
    }
