"""Training the pocket models on two CPU cores, written by hand: `python -m llamabook train pocket-llama2`.

- The data are the training texts of the world, each a row of its own; step s always sees the same texts, so a run that
  was killed goes on from its last saved step as if nothing had happened.
- Matrices learn with Muon (Jordan, 2024; in torch.optim), embeddings, head and norms with AdamW: in a trial on a
  smaller world it learnt in 12 minutes what AdamW alone did not.
- Every loss is logged beside its floor, the entropy of the texts (`floor.py`).

What is trained, architectures and starts, is in `recipes.py`.
"""

import json
import random
import time
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from llamabook import pocket
from llamabook.checkpoint import load_model
from llamabook.errors import InputError
from llamabook.files import replacing
from llamabook.pocket import world
from llamabook.pocket.floor import encode_document, gap, pad
from llamabook.pocket.recipes import RECIPES, VOCAB_SIZE, Recipe, Source, initialize, train_tokenizer, write
from llamabook.tokenizer import Llama2Tokenizer, Llama3Tokenizer, load_tokenizer

__all__ = ["RECIPES", "VOCAB_SIZE", "batch", "train", "train_tokenizer"]


def train(
    name: str,
    output: str | Path | None = None,
    *,
    base: str | Path | None = None,
    steps: int | None = None,
    resume: bool = True,
    evaluate_every: int = 250,
    held_out: int = 200,
    log: Callable[[str], None] = print,
) -> Path:
    """Train a pocket model and write it, its tokenizer and its log to a folder.

    Args:
        name: one of RECIPES.
        output: the folder, by default runs/NAME. It also holds `state.pt`, from which a killed run goes on.
        base: for a recipe that starts from a trained model, the folder of that model; by default the embedded one.
        steps: fewer steps than the recipe's, for a trial.
        resume: go on from `state.pt` where there is one; False starts anew.
        evaluate_every: steps between two measurements on held-out texts (and two saved states).
        held_out: how many held-out texts are measured.
        log: receives a line at each measurement.
    Returns the folder. Raises InputError for an unknown name, or a base that the recipe does not start from.
    """
    if name not in RECIPES:
        raise InputError(f"no recipe trains {name!r}: choose one of {', '.join(RECIPES)}")
    recipe, folder = RECIPES[name], Path(output or Path("runs") / name)
    if base and not recipe.base:
        raise InputError(f"{name} starts from nothing, so it has no base: leave the base out")
    base = Path(base or pocket.path(recipe.base)) if recipe.base else None
    if base and not (base / "tokenizer.model").exists():
        raise InputError(f"{base} is no trained {recipe.base}: it has no tokenizer.model")
    folder.mkdir(parents=True, exist_ok=True)
    total = steps or recipe.steps
    tokenizer = _tokenizer(recipe, folder, base)
    model, optimizers, history, start = _start(recipe, base, folder / "state.pt" if resume else None)
    # from the recipe: optimizers that were loaded hold the rates of their last step
    rates = [(g, rate) for o, rate in zip(optimizers, (recipe.muon_lr, recipe.adam_lr)) for g in o.param_groups]
    probe = list(islice(recipe.source.texts("held_out"), held_out))
    seconds, tokens = (history[-1]["seconds"], history[-1]["tokens"]) if history else (0.0, 0)
    window, begin = [], time.perf_counter()
    for step in tqdm(range(start, total), desc=name, unit="step", initial=start, total=total, disable=None):
        for group, rate in rates:
            group["lr"] = rate * _schedule(step, total, recipe)
        loss, count = _step(model, optimizers, batch(tokenizer, step, recipe.documents, source=recipe.source))
        window.append((loss, count))
        tokens += count
        if step + 1 == total:
            sharpen(model, [row for i in range(8) for row in batch(tokenizer, i, recipe.documents, source=recipe.source)])
        if (step + 1) % evaluate_every == 0 or step + 1 == total:
            seconds += time.perf_counter() - begin
            measured, more = gap(model, tokenizer, probe), recipe.measure(model, tokenizer)
            history.append(
                {
                    "step": step + 1,
                    "tokens": tokens,
                    "seconds": round(seconds, 1),
                    "loss": round(sum(x * n for x, n in window) / sum(n for _, n in window), 5),
                    "held_out": round(measured.loss_per_token, 5),
                    "floor": round(measured.floor_per_token, 5),
                    "gap": round(measured.gap, 5),
                    **more,
                }
            )
            log(
                f"step {step + 1}/{total}: held-out {measured.loss_per_token:.4f} nats per token,"
                f" floor {measured.floor_per_token:.4f}, gap {100 * measured.gap:.2f} % ({seconds / 60:.1f} min)"
                + "".join(f", {name} {value:.3f}" for name, value in more.items())
            )
            _save_state(folder / "state.pt", model, optimizers, history, step + 1)
            window, begin = [], time.perf_counter()
    recipe.save(model, folder)
    write(folder / "training_log.json", (json.dumps(history, indent=0) + "\n").encode())
    return folder


# ---- data ---------------------------------------------------------------------------------------------------------


def batch(
    tokenizer: Llama2Tokenizer | Llama3Tokenizer, step: int, documents: int, batches: int = 8, source: Source = world
) -> list[list[int]]:
    """The rows of token ids that a step sees: a function of the step and the source alone.

    Texts are drawn in pools of `batches` steps and sorted by length, so that the rows of a step need little padding.
    """
    pool, place = divmod(step, batches)
    rows = _pool(tokenizer, pool, documents * batches, source)
    place = random.Random(pool).sample(range(batches), batches)[place]
    return rows[place * documents : (place + 1) * documents]


@lru_cache(maxsize=1)
def _pool(tokenizer: Llama2Tokenizer | Llama3Tokenizer, pool: int, size: int, source: Source) -> list[list[int]]:
    """`size` training texts as ids, shortest first. Pools share no seed; the first seeds are left to examples."""
    seeds = range((pool + 1) * 2 * size, (pool + 2) * 2 * size)  # twice as many as needed: some are held out
    drawn = (source.sample(seed) for seed in seeds)
    texts = islice((d for d in drawn if not source.is_held_out(d.text)), size)
    return sorted((encode_document(d, tokenizer) for d in texts), key=len)


def _tokenizer(recipe: Recipe, folder: Path, base: Path | None) -> Llama2Tokenizer | Llama3Tokenizer:
    path = folder / "tokenizer.model"
    if not path.exists():
        write(path, (base / "tokenizer.model").read_bytes() if base else recipe.tokenizer())
    return load_tokenizer(path)


# ---- one step -----------------------------------------------------------------------------------------------------


def _step(model: nn.Module, optimizers: list, rows: list[list[int]]) -> tuple[float, int]:
    """One update. Returns the mean loss in nats per token and how many tokens were predicted."""
    inputs, targets = pad(rows, multiple=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs)  # (B, T, V)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item(), int((targets != -100).sum())


@torch.no_grad()
def sharpen(model: nn.Module, rows: list[list[int]]) -> float:
    """Divide the logits by the temperature at which the loss on these rows is least, and return it.

    Calibration by temperature (Guo et al., 2017, section 4.2), folded into the last norm: the learning rates fall to
    zero before the logits have grown to their size, so a trained model is a little too unsure.
    """
    model.eval()
    inputs, targets = pad(rows)
    shown = targets != -100
    logits = model(inputs)[shown].float()  # (tokens, V)
    low, high = 0.5, 2.0
    for _ in range(20):  # the loss is convex in 1 / temperature, so thirds close in on its minimum
        third = (high - low) / 3
        near, far = (F.cross_entropy(logits * factor, targets[shown]) for factor in (low + third, high - third))
        low, high = (low, high - third) if near < far else (low + third, high)
    for p in model.final_norm.parameters():
        p.mul_((low + high) / 2)
    model.train()
    return 2 / (low + high)


def _schedule(step: int, total: int, recipe: Recipe) -> float:
    """Warm up, stay, then fall linearly to zero."""
    return min(1.0, (step + 1) / recipe.warmup, (total - step) / (total * recipe.decay))


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    blocks = [p for p in model.trf_blocks.parameters() if p.dim() == 2]
    inside = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(blocks, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


# ---- start and state ----------------------------------------------------------------------------------------------


def _start(recipe: Recipe, base: Path | None, state: Path | None) -> tuple[nn.Module, list, list[dict], int]:
    model = initialize(recipe.build())
    if base:
        model.load_state_dict(load_model(base, dtype=torch.float32).state_dict())
    optimizers = _optimizers(model, recipe)
    if state is None or not state.exists():
        return model, optimizers, [], 0
    saved = torch.load(state, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimizer, values in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(values)
    return model, optimizers, saved["history"], saved["step"]


def _save_state(path: Path, model: nn.Module, optimizers: list, history: list[dict], step: int) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "history": history,
        "step": step,
    }
    with replacing(path) as file:
        torch.save(state, file)
