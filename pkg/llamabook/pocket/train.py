"""Training the pocket models on two CPU cores, written by hand: `python -m llamabook train pocket-llama2`.

- The data are the training texts of the world, each a row of its own; step s always sees the same texts, so a run that
  was killed goes on from its last saved step as if nothing had happened.
- Matrices learn with Muon (Jordan, 2024; in torch.optim), embeddings, head and norms with AdamW: in a trial on a
  smaller world it learnt in 12 minutes what AdamW alone did not.
- Every loss is logged beside its floor, the world's entropy (`floor.py`).
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from llamabook.checkpoint.meta import save_meta
from llamabook.errors import InputError
from llamabook.files import replacing
from llamabook.gpt import GPTModel
from llamabook.llama2 import Llama2Model, rope_frequencies
from llamabook.pocket import world
from llamabook.pocket.floor import encode_document, gap, pad
from llamabook.tokenizer import Llama2Tokenizer

VOCAB_SIZE = 1536
CONTEXT_LENGTH = 256

LLAMA2_CONFIG = {
    "vocab_size": VOCAB_SIZE, "context_length": CONTEXT_LENGTH, "emb_dim": 256, "n_heads": 8, "n_layers": 3,
    "hidden_dim": 512, "n_kv_groups": 8, "rope_base": 10_000.0, "rope_freq": None, "dtype": torch.float32,
}  # fmt: skip
# As many weights in a feed-forward layer as Llama's: 2 · 256 · 768 = 3 · 256 · 512.
GPT_CONFIG = {
    "vocab_size": VOCAB_SIZE, "context_length": CONTEXT_LENGTH, "emb_dim": 256, "n_heads": 8, "n_layers": 3,
    "hidden_dim": 768, "drop_rate": 0.0, "qkv_bias": True, "tie_embeddings": False, "dtype": torch.float32,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What is trained, for how many steps, and how the result is written."""

    build: Callable[[], nn.Module]
    save: Callable[[nn.Module, Path], None]
    steps: int = 7000
    documents: int = 32  # per step
    muon_lr: float = 0.02
    adam_lr: float = 5e-3
    warmup: int = 100
    decay: float = 0.6  # the last share of the steps, over which the learning rates fall to zero


def train(
    name: str,
    output: str | Path | None = None,
    *,
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
        steps: fewer steps than the recipe's, for a trial.
        resume: go on from `state.pt` where there is one; False starts anew.
        evaluate_every: steps between two measurements on held-out texts (and two saved states).
        held_out: how many held-out texts are measured.
        log: receives a line at each measurement.
    Returns the folder. Raises InputError for an unknown name.
    """
    if name not in RECIPES:
        raise InputError(f"no recipe trains {name!r}: choose one of {', '.join(RECIPES)}")
    recipe, folder = RECIPES[name], Path(output or Path("runs") / name)
    folder.mkdir(parents=True, exist_ok=True)
    total = steps or recipe.steps
    tokenizer = _tokenizer(folder)
    model, optimizers, history, start = _start(recipe, folder / "state.pt" if resume else None)
    # from the recipe: optimizers that were loaded hold the rates of their last step
    rates = [(g, rate) for o, rate in zip(optimizers, (recipe.muon_lr, recipe.adam_lr)) for g in o.param_groups]
    probe = list(islice(world.texts("held_out"), held_out))
    seconds, tokens = (history[-1]["seconds"], history[-1]["tokens"]) if history else (0.0, 0)
    window, begin = [], time.perf_counter()
    for step in tqdm(range(start, total), desc=name, unit="step", initial=start, total=total, disable=None):
        for group, rate in rates:
            group["lr"] = rate * _schedule(step, total, recipe)
        loss, count = _step(model, optimizers, batch(tokenizer, step, recipe.documents))
        window.append((loss, count))
        tokens += count
        if (step + 1) % evaluate_every == 0 or step + 1 == total:
            seconds += time.perf_counter() - begin
            measured = gap(model, tokenizer, probe)
            history.append(
                {
                    "step": step + 1,
                    "tokens": tokens,
                    "seconds": round(seconds, 1),
                    "loss": round(sum(x * n for x, n in window) / sum(n for _, n in window), 5),
                    "held_out": round(measured.loss_per_token, 5),
                    "floor": round(measured.floor_per_token, 5),
                    "gap": round(measured.gap, 5),
                }
            )
            log(
                f"step {step + 1}/{total}: held-out {measured.loss_per_token:.4f} nats per token,"
                f" floor {measured.floor_per_token:.4f}, gap {100 * measured.gap:.2f} % ({seconds / 60:.1f} min)"
            )
            _save_state(folder / "state.pt", model, optimizers, history, step + 1)
            window, begin = [], time.perf_counter()
    recipe.save(model, folder)
    _write(folder / "training_log.json", (json.dumps(history, indent=0) + "\n").encode())
    return folder


# ---- data ---------------------------------------------------------------------------------------------------------


def batch(tokenizer: Llama2Tokenizer, step: int, documents: int, batches: int = 8) -> list[list[int]]:
    """The rows of token ids that a step sees: a function of the step alone.

    Texts are drawn in pools of `batches` steps and sorted by length, so that the rows of a step need little padding.
    """
    pool, place = divmod(step, batches)
    rows = _pool(tokenizer, pool, documents * batches)
    place = random.Random(pool).sample(range(batches), batches)[place]
    return rows[place * documents : (place + 1) * documents]


@lru_cache(maxsize=1)
def _pool(tokenizer: Llama2Tokenizer, pool: int, size: int) -> list[list[int]]:
    """`size` training texts as ids, shortest first. Pools share no seed; the first seeds are left to examples."""
    seeds = range((pool + 1) * 2 * size, (pool + 2) * 2 * size)  # twice as many as needed: some are held out
    drawn = (world.sample(seed) for seed in seeds)
    texts = islice((d for d in drawn if not world.is_held_out(d.text)), size)
    return sorted((encode_document(d, tokenizer) for d in texts), key=len)


def _tokenizer(folder: Path) -> Llama2Tokenizer:
    path = folder / "tokenizer.model"
    if not path.exists():
        _write(path, train_tokenizer(islice(world.texts("train"), 20_000)))
    return Llama2Tokenizer(path)


def train_tokenizer(documents: Iterator[world.Document], vocab_size: int = VOCAB_SIZE) -> bytes:
    """A SentencePiece model with the structure of Llama 2's: byte pairs, byte fallback, split digits, <unk> <s> </s>."""
    import io
    import string

    import sentencepiece

    lines = (line for d in documents for line in _lines(d))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", add_dummy_prefix=True,
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
        character_coverage=1.0, required_chars=string.ascii_letters + string.digits + string.punctuation,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _lines(document: world.Document) -> list[str]:
    """The text as the tokenizer will meet it, chats with their tags."""
    if not document.turns:
        return document.text.split("\n")
    return [f"[INST] {t['content']} [/INST]" if t["role"] == "user" else t["content"] for t in document.turns]


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


def _initialize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Start where attention already copies: after Trockman and Kolter (2023, "mimetic initialization").

    - The head starts as a copy of the embedding (they are not tied).
    - In every head of attention, the way out is the transpose of the way in: what is attended to is passed on as it is.
    - In a Llama, half of the heads see only the slow pairs of RoPE, so they can look for a name at any distance.
    - The feed-forward layers write nothing yet.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(0, 0.02 if "emb" in name else p.shape[1] ** -0.5, generator=generator)
        model.out_head.weight.copy_(model.tok_emb.weight)
        for block in model.trf_blocks:
            block.att.out_proj.weight.copy_(block.att.W_value.weight.T)
            [layer for layer in block.ff.modules() if isinstance(layer, nn.Linear)][-1].weight.zero_()
            if isinstance(model, Llama2Model):
                _blind_to_distance(block.att)
    return model


def _blind_to_distance(attention: nn.Module) -> None:
    """Zero the queries and keys of every other head in the pairs that turn by a right angle within the context.

    Queries and keys that are both zero get no gradient, so these heads stay as they start. Learned positions leave a
    GPT free to do the same; without this, the Llama learns to repeat names and places much later than the GPT.
    """
    d = attention.head_dim
    fast = rope_frequencies(d) * CONTEXT_LENGTH > torch.pi / 2  # (d / 2,)
    for layer in (attention.W_query, attention.W_key):
        heads = layer.weight.view(-1, 2, d // 2, layer.in_features)  # (H, halves, pairs, D)
        heads[::2, :, fast] = 0


# ---- start, state and result --------------------------------------------------------------------------------------


def _start(recipe: Recipe, state: Path | None) -> tuple[nn.Module, list, list[dict], int]:
    model = _initialize(recipe.build())
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


def _save_llama2(model: nn.Module, folder: Path) -> None:
    save_meta(model.to(torch.bfloat16), folder)


def _save_gpt(model: nn.Module, folder: Path) -> None:
    config = {**GPT_CONFIG, "dtype": "bfloat16"}
    _write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    with replacing(folder / "model.pth") as file:
        torch.save(model.to(torch.bfloat16).state_dict(), file)


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


RECIPES = {
    "pocket-llama2": Recipe(partial(Llama2Model, LLAMA2_CONFIG), _save_llama2),
    "pocket-gpt": Recipe(partial(GPTModel, GPT_CONFIG), _save_gpt),
}
