#!/usr/bin/env python3
"""What few bits cost: the loss above the world's entropy, and more, of the embedded models in each precision.

    python tools/quality.py                 writes ch05_quantization_speculative/quality/quality.json and quality.png
    python tools/quality.py --redraw        only the figure, from that file

Every checkpoint is written by `quantize`, as a user would write it, and runs in the engine: with activations rounded to 8
bits, which is what the fast CPU kernels do, and without. All are compared on the same held-out texts, document by
document, so that a difference has a smaller error than either loss. It takes some minutes on two cores.
"""

import argparse
import datetime
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from llamabook import fast, pocket
from llamabook.bench.worker import machine, versions
from llamabook.fast.cache import StaticCache
from llamabook.fast.decode import forward
from llamabook.fast.quantize import GROUP_SIZES, Scheme
from llamabook.files import replacing
from llamabook.pocket import floor, world

FOLDER = Path(__file__).resolve().parents[1] / "ch05_quantization_speculative" / "quality"
MODELS = ("pocket-llama3.2", "pocket-llama2")
ROWS = 16  # documents side by side


def checkpoints(model: str, folder: Path) -> Iterator[tuple[str, str | None, int | None, Path]]:
    """(precision, method, group size, path) of the model as it is and in each precision, written into `folder`."""
    from llamabook.fast.quantize.calibrate import calibration_ids, quantize_gptq
    from llamabook.fast.quantize.files import quantize
    from llamabook.tokenizer import load_tokenizer

    source = pocket.path(model)
    yield "bf16", None, None, source
    yield "int8", "rounding", None, quantize(source, folder / f"{model}-int8", Scheme(8))
    rows = calibration_ids(load_tokenizer(source))
    for size in GROUP_SIZES:
        yield "int4", "rounding", size, quantize(source, folder / f"{model}-int4.g{size}", Scheme(4, size))
        asymmetric = folder / f"{model}-int4a.g{size}"
        yield "int4", "asymmetric", size, quantize(source, asymmetric, Scheme(4, size, asymmetric=True))
        yield "int4", "GPTQ", size, quantize_gptq(source, folder / f"{model}-gptq.g{size}", Scheme(4, size), rows)


def judge(model, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row: its loss in nats, (rows,) float64, and for all predicted tokens in turn the likeliest one."""
    losses, likeliest = [], []
    for start in range(0, len(rows), ROWS):
        inputs, targets = floor.pad(rows[start : start + ROWS])  # (B, T)
        B, T = inputs.shape
        cache = StaticCache(model.cfg, B, T, "cpu")
        logits = forward(model, inputs, torch.arange(T).expand(B, -1), cache).float()  # (B, T, V)
        nats = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none")  # (B, T)
        losses.append(nats.double().sum(dim=1))
        likeliest.append(logits.argmax(dim=-1)[targets != -100])
    return torch.cat(losses), torch.cat(likeliest)


def measure(documents: int, questions: int) -> list[dict]:
    """A row for each model, precision and way of taking activations."""
    from llamabook.evaluate.harness import evaluate

    texts = list(islice(world.texts("held_out"), documents))
    entropy = torch.tensor([-text.log_prob for text in texts], dtype=torch.float64)
    found = []
    for name in MODELS:
        original, tokenizer = fast.load(pocket.path(name), dtype=torch.float32)
        rows = [floor.encode_document(text, tokenizer) for text in texts]
        tokens = sum(len(row) - 1 for row in rows)
        base, wanted = judge(original, rows)
        with tempfile.TemporaryDirectory() as folder:
            for precision, method, size, path in tqdm(checkpoints(name, Path(folder)), desc=name, disable=None):
                for activations in ("exact", "rounded") if method else ("exact",):
                    model, _ = fast.load(path, activations=activations)
                    losses, likeliest = judge(model, rows)
                    added = losses - base
                    asked = questions and (activations == "rounded" or not method)  # on the path that is fast, too
                    scores = evaluate(model, tokenizer, limit=questions) if asked else {}
                    found.append({
                        "model": name, "precision": precision, "method": method, "groupsize": size,
                        "activations": activations, "documents": documents, "tokens": tokens,
                        "loss_per_token": float(losses.sum() / tokens), "floor_per_token": float(entropy.sum() / tokens),
                        "perplexity": math.exp(losses.sum() / tokens),
                        "above_floor": float((losses - entropy).mean() / entropy.mean()),
                        "added": float(added.sum() / base.sum()),
                        "added_error": float(added.std() * math.sqrt(documents) / base.sum()),
                        "agreement": float((likeliest == wanted).double().mean()),
                        "scores": {f"{s.task} {s.metric}": [s.value, s.error, s.chance, s.questions] for task in scores.values() for s in task.values()},
                        "measured": datetime.date.today().isoformat(),
                        "versions": versions(torch.device("cpu")), "machine": machine(torch.device("cpu")),
                    })  # fmt: skip
                    print(line(found[-1]), flush=True)
    return found


def line(row: dict) -> str:
    """A row for the terminal."""
    what = " ".join(str(row[key]) for key in ("model", "precision", "method", "groupsize", "activations") if row[key])
    scores = "  ".join(f"{name} {value:.3f}" for name, (value, *_) in row["scores"].items())
    cost = f"{row['above_floor']:.2%} above the floor, added {row['added']:+.3%} ± {row['added_error']:.3%}"
    return f"{what:56} {cost}, same token {row['agreement']:.2%}  {scores}"


def draw(rows: list[dict]):
    """The loss that each precision adds, with its standard error, for each model."""
    from llamabook.figures import COLORS, figure

    fig, axes = figure(1, len(MODELS), height=3.8, sharey=True)
    for axis, model in zip(axes, MODELS):
        of = [row for row in rows if row["model"] == model and row["method"]]
        for method, color, marker in (("rounding", "gpt", "o"), ("asymmetric", "third", "^"), ("GPTQ", "llama", "s")):
            for activations, fill in (("rounded", "full"), ("exact", "none")):
                some = [r for r in of if (r["method"], r["activations"], r["precision"]) == (method, activations, "int4")]
                shift = {"rounding": 0.0, "asymmetric": 0.06, "GPTQ": -0.06}[method] + (0.025 if fill == "none" else 0)
                axis.errorbar(
                    [math.log2(r["groupsize"]) + shift for r in some], [100 * r["added"] for r in some],
                    yerr=[100 * r["added_error"] for r in some], color=COLORS[color], marker=marker, fillstyle=fill,
                    ls="-" if fill == "full" else "none", capsize=2, lw=1.4,
                    label=f"int4, {method}" if fill == "full" else None,
                )  # fmt: skip
        for row in (row for row in of if row["precision"] == "int8" and row["activations"] == "rounded"):
            axis.axhline(100 * row["added"], color=COLORS["floor"], ls="--", lw=1.4, label="int8")
        axis.set_xticks([math.log2(size) for size in GROUP_SIZES], GROUP_SIZES)
        axis.set_xlabel("numbers that share a scale")
        axis.set_title(model)
    axes[0].set_ylabel("loss added, % of the original's")
    axes[0].set_ylim(bottom=min(0, axes[0].get_ylim()[0]))
    axes[0].legend(fontsize=9, loc="upper left")
    fig.suptitle("What few bits cost (filled: activations in 8 bits; hollow: exact; bars: one standard error)", fontsize=10)
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=600, help="how many held-out texts")
    parser.add_argument("--questions", type=int, default=60, help="how many questions of each of the farm's tasks")
    parser.add_argument("--redraw", action="store_true", help="only draw what has been measured")
    parser.add_argument("--output", type=Path, default=FOLDER / "quality.json")
    options = parser.parse_args()
    if options.redraw:
        rows = json.loads(options.output.read_text(encoding="utf-8"))
    else:
        rows = measure(options.documents, options.questions)
        with replacing(options.output) as file:
            file.write((json.dumps(rows, indent=1) + "\n").encode())
    with replacing(options.output.with_suffix(".png")) as file:
        draw(rows).savefig(file, format="png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
