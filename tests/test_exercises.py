"""The exercises keep three promises.

Solutions pass; untouched stubs fail with one line that names their exercise; each check rejects its mutants,
the known wrong answers, with the hint that is meant for them.

No kernel is started: the cells of the committed notebooks are executed here. A mutant is the solution with
one mistake, made by replacing a piece of its text, so it is wrong in nothing else.
"""

import ast
import contextlib
import io
import json
import math
import random
import re
import traceback
from pathlib import Path

import answers_ch02
import answers_ch03
import answers_ch04
import answers_ch05_drafts
import answers_ch05_evaluation
import answers_ch05_gptq
import answers_ch05_int4
import answers_ch05_int8
import answers_ch05_speculative
import pytest
import torch
import torch.nn.functional as F

from llamabook import checks
from llamabook.checks.core import DIFFICULTIES, EXERCISES

BOOK = Path(__file__).parents[1]
FOLDERS = {path.name[:4]: path for path in BOOK.glob("ch[0-9]*")}
CHAPTERS = {  # a chapter's solutions, one notebook a topic, their exercises numbered throughout
    1: [FOLDERS["ch01"] / "04_exercises_solutions.ipynb"],
    2: [FOLDERS["ch02"] / "04_exercises_solutions.ipynb"],
    3: [FOLDERS["ch03"] / "02_exercises_solutions.ipynb"],
    4: [FOLDERS["ch04"] / f"{topic}_exercises_solutions.ipynb" for topic in ("05_cache", "06_speed")],
    5: [
        FOLDERS["ch05"] / f"{topic}_exercises_solutions.ipynb"
        for topic in ("05_int8", "06_int4", "07_gptq", "08_evaluation", "11_speculative", "12_draft")
    ],
}
PAGES = [path for paths in CHAPTERS.values() for path in paths]
NAMES = list(EXERCISES)

# For each exercise: (text of the solution, what stands there instead, a piece of the hint that must come).
# Several replacements in one mutant: a list of pairs in the place of the first two.
# Those of chapter 1 stand here, those of later chapters in files of their own.
MUTANTS = answers_ch02.MUTANTS | answers_ch03.MUTANTS | answers_ch04.MUTANTS
MUTANTS |= answers_ch05_int8.MUTANTS | answers_ch05_int4.MUTANTS | answers_ch05_gptq.MUTANTS
MUTANTS |= answers_ch05_evaluation.MUTANTS | answers_ch05_speculative.MUTANTS | answers_ch05_drafts.MUTANTS
MUTANTS |= {
    "rms_norm": [
        (
            "wide = x.float()",
            "wide = x.float() - x.float().mean(dim=-1, keepdim=True)",
            "does not subtract the mean",
        ),
        (".mean(dim=-1, keepdim=True)", ".mean()", "over the last dimension only"),
        (".mean(", ".sum(", "or their sum"),
        ("torch.rsqrt(mean_square + eps)", "1 / (mean_square + eps)", "Is the root there"),
        (" * weight", "", "multiply by `weight`"),
        (" * weight", " + weight - 1", "proportional to `weight`"),
        ("torch.rsqrt(mean_square + eps)", "1 / (mean_square.sqrt() + eps)", "inside the root"),
        ("mean_square + eps", "mean_square + 1e-5", "it is an argument"),
        ("+ eps", "", "zeros must stay"),
        ("x.float()", "x", "for bfloat16 input"),
        (".to(x.dtype) * weight", " * weight", "Give back x's dtype"),
    ],
    "silu_slope": [
        ("return s + x * s * (1 - s)", "return x * s", "That is SiLU's value"),
        ("return s + x * s * (1 - s)", "return s * (1 - s)", "the sigmoid alone"),
        ("return s + x * s * (1 - s)", "return s", "negative somewhere"),
        ("return s + x * s * (1 - s)", "return s + x * s", "must go to 1"),
        (
            "s = torch.sigmoid(x)\n    return s + x * s * (1 - s)",
            "e = torch.exp(-x)\n    return 1 / (1 + e) + x * e / (1 + e) ** 2",
            "exp overflows",
        ),
        (
            "return s + x * s * (1 - s)",
            "return torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / 6.2831853**0.5",
            "not autograd's slope",
        ),
        ("return s + x * s * (1 - s)", "return s + 2 * x * s * (1 - s)", "not autograd's slope"),
        ("return s + x * s * (1 - s)", "return s + x * x * s * (1 - s) * (x < 0) * -1", "must add up to 1"),
    ],
    "swiglu": [
        ("gate = F", "W_gate, W_up = W_up, W_gate\n    gate = F", "doubling W_up"),
        ("F.silu(", "F.gelu(", "has GELU on it"),
        ("F.silu(", "F.relu(", "has ReLU on it"),
        ("F.silu(", "(", "has nothing on it"),
        ("F.silu(", "torch.sigmoid(", "only a sigmoid"),
        ("gate * (x", "gate + (x", "multiply, don't add"),
        (" @ W_down.T", "", "way back down"),
        ("(x @ W_up.T)", "F.silu(x @ W_up.T)", "no activation on that branch"),
        (
            "return (gate * (x @ W_up.T)) @ W_down.T",
            "return F.silu((gate * (x @ W_up.T)) @ W_down.T)",
            "W_down",
        ),
        ("W_gate.T", "W_gate", "stopped with RuntimeError"),
    ],
    "hidden_width": [
        ("2 * (4 * emb_dim) // 3", "4 * emb_dim", "Is the 2/3 there"),
        ("(width + multiple_of - 1) // multiple_of", "width // multiple_of", "never down"),
        ("(width + multiple_of - 1) // multiple_of", "(width // multiple_of + 1)", "leave it"),
        ("int(multiplier * width)", "width", "Is the multiplier used"),
        ("// 3", "/ 3", "a count is an int"),
        ([("// 3", "/ 3"), ("return (", "width = int(width)\n    return (")], "drop the fraction"),
        (
            "return (width + multiple_of - 1) // multiple_of * multiple_of",
            "return width",
            "not a multiple of 256",
        ),
        (
            [
                ("    if multiplier is not None:\n        width = int(multiplier * width)\n", ""),
                (
                    "return (width + multiple_of - 1) // multiple_of * multiple_of",
                    "width = (width + multiple_of - 1) // multiple_of * multiple_of\n"
                    "    return width if multiplier is None else int(multiplier * width)",
                ),
            ],
            "First the multiplier",
        ),
    ],
    "rope_frequencies": [
        ("torch.arange(0, head_dim, 2)", "torch.arange(2, head_dim + 2, 2)", "count the pairs from 1"),
        ("torch.arange(0, head_dim, 2)", "torch.arange(head_dim // 2)", "Is it 2i/d"),
        ("1.0 / base", "1.0 * base", "Look at the sign"),
        ("/ head_dim", "/ (head_dim - 2)", "not to 1"),
        ("base**", "10_000.0**", "use the argument"),
        ("torch.arange(0, head_dim, 2)", "torch.arange(head_dim)", "for each pair"),
        ("torch.arange(0, head_dim, 2)", "torch.arange(0, head_dim - 2, 2)", "last pair missing"),
        (".float()", ".double()", "float32"),
        ("1.0 / base**exponents", "1.0 - exponents", "the same fraction"),
    ],
    "apply_rope": [
        (
            [
                ("x.float().chunk(2, dim=-1)", "x.float()[..., ::2], x.float()[..., 1::2]"),
                ("torch.cat([", "torch.stack(["),
                ("], dim=-1)", "], dim=-1).flatten(-2)"),
            ],
            "you pair neighbours",
        ),
        ("positions[:, None].float()", "(positions[:, None].float() + 1)", "Do your positions start at 1"),
        ("a * sin + b * cos", "b * cos - a * sin", "the lengths change"),
        ("a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin", "the other way"),
        ("positions[:, None]", "torch.arange(x.shape[2])[:, None]", "count positions yourself"),
        (
            ".float() * frequencies",
            ".to(x.dtype) * frequencies.to(x.dtype)",
            "Compute angles, cos and sin in float32",
        ),
        (".to(x.dtype)", "", "Give back x's dtype"),
        ("angles.cos(), angles.sin()", "angles.sin(), angles.cos()", "cos and sin swapped"),
        ("a * cos - b * sin, a * sin + b * cos", "a * sin + b * cos, a * cos - b * sin", "position 0"),
        ("* frequencies", "* frequencies[:1]", "position times frequency"),
        ("* frequencies", "/ frequencies", "position times frequency"),
        ("a * cos - b * sin, a * sin + b * cos", "a, b", "nothing has turned"),
        ("positions[:, None]", "positions", "stopped with RuntimeError"),
        ("return", "x.mul_(1)\n    x += 1\n    return", "changes its arguments"),
    ],
    "interleaved_to_half_split": [
        ("(n_heads, -1, 2)", "(n_heads, 2, -1)", "this is the way back"),
        ("(n_heads, -1, 2)", "(1, -1, 2)", "from one head to another"),
        (".transpose(1, 2)", "", "no row has moved"),
        (".transpose(1, 2)", ".transpose(0, 1)", "from one head to another"),
        ("return tables", "return weight.flip(1)  #", "columns"),
        ("return tables", "return weight[::2].repeat(2, 1)  #", "there twice"),
        (".transpose(1, 2)", ".transpose(1, 2).flip(1)", "head 0's rows come out as [1, 3"),
        (
            "weight.unflatten(0, (n_heads, -1, 2))",
            "weight.reshape(n_heads, -1, 2, weight.shape[1])",
            "IndexError",
        ),
    ],
    "rope_score": [
        ("a * e - b * c", "b * c - a * e", "the other way"),
        (" + across * angles.sin()", "", "where is the sine"),
        ([("q.chunk(2)", "q[::2], q[1::2]"), ("k.chunk(2)", "k[::2], k[1::2]")], "neighbours"),
        ("a * c + b * e", "a * c - b * e", "at distance 0"),
        (" * frequencies", "", "is another one"),
        ("angles = distances", "angles = distances.abs()", "a key ahead and a key behind"),
        (".sum(dim=-1)", "", "Add up the pairs"),
        (".sum(dim=-1)", ".sum()", "One score for each distance"),
        ("a * e - b * c", "a * e + b * c", "Look at the sine's factor"),
        ("across * angles.sin()", "angles.sin()", "doubling q"),
    ],
    "causal_mask": [
        ("<= positions", "> positions", "inverted"),
        ("<= positions", "< positions", "its own position"),
        ("torch.arange(n_keys - n_queries, n_keys)", "torch.arange(n_queries)", "last"),
        (
            "torch.arange(n_keys) <= positions[:, None]",
            "(torch.arange(n_keys) <= positions[:, None]).float()",
            "boolean",
        ),
        ("<= positions", ">= positions", "comes after it"),
        ("<= positions[:, None]", "<= positions[:, None] + 1", "comes after it"),
        ("<= positions", "== positions", "all positions before it"),
        ("<= positions[:, None]", "<= positions.max() + 0 * positions[:, None]", "sees everything"),
        (
            "torch.arange(n_keys) <= positions[:, None]",
            "torch.arange(n_keys)[:, None] <= positions",
            "comes after",
        ),
    ],
    "causal_attention": [
        (" / d**0.5", "", "not scaled at all"),
        ("d**0.5", "d", "instead of its root"),
        ("d**0.5", "2", "the scale is √d"),
        ("softmax(dim=-1", "softmax(dim=-2", "the last dimension"),
        ("scores.masked_fill(~allowed, -torch.inf)", "scores", "see the future"),
        ("tril()", "tril(1)", "see the future"),
        ("tril()", "tril(-1)", "everything is hidden"),
        (
            [
                ("scores.masked_fill(~allowed, -torch.inf)", "scores"),
                ("return weights", "weights = weights.masked_fill(~allowed, 0)\n    return weights"),
            ],
            "after hiding, not before",
        ),
        (
            ".softmax(dim=-1, dtype=torch.float32)",
            ".exp()\n    weights = weights / weights.sum(dim=-1, keepdim=True)",
            "overflow",
        ),
        ("k.transpose(-2, -1)", "k", "stopped with RuntimeError"),
        ("weights.to(v.dtype) @ v", "weights @ v.float()", "Give back v's dtype"),
        ("tril()", "triu()", "see the future"),
    ],
    "repaired_block": [
        ("x.shape[-1] ** 0.5", "x.shape[-1]", "symptom 7"),
        ("tril()", "tril(diagonal=1)", "symptom 1"),
        ("middle = x +", "middle = normed +", "symptom 2"),
        (
            'F.silu(normed @ w["fc1"].T) * (normed @ w["fc2"].T)',
            '(normed @ w["fc1"].T) * F.silu(normed @ w["fc2"].T)',
            "symptom 3",
        ),
        (
            'normed = F.rms_norm(middle, x.shape[-1:], w["norm2"], eps=1e-5)',
            'normed = middle * w["norm2"]',
            "symptom 4",
        ),
        ('w["norm2"]', 'w["norm1"]', "symptom 5"),
        (
            'normed = F.rms_norm(x, x.shape[-1:], w["norm1"], eps=1e-5)',
            'normed = x * w["norm1"]',
            "symptom 6",
        ),
        ("F.silu(", "F.gelu(", "symptom 8"),
        ("return middle +", "return x +", "symptom 7"),
        ("return middle + hidden", "return hidden", "symptom 2"),
    ],
    "count_parameters": [
        (" + 2 * D\n", "\n", "two norms"),
        ("* block + D +", "* block +", "norm before the head"),
        ("2 * D * G * d", "2 * D * H * d", "key-value heads"),
        ("3 * D * hidden", "2 * D * hidden", "three matrices"),
        ('matrices = 1 if cfg.get("tie_embeddings") else 2', "matrices = 2", "count it once"),
        ('matrices = 1 if cfg.get("tie_embeddings") else 2', "matrices = 1", "two matrices"),
        ('cfg.get("head_dim") or D // H', "D // H", "head_dim = 10"),
        ("+ matrices *", '+ cfg["context_length"] * D + matrices *', "RoPE has nothing"),
        ("attention = 2", "attention = 4 * D + 2", "no biases"),
        ("+ 2 * D\n", "+ 4 * D\n", "no bias"),
        ("D // H", "D / H", "a count is an int"),
    ],
    "inference_bytes": [
        ("2 * cfg", "cfg", "keys *and* values"),
        ('cfg["n_kv_groups"]', 'cfg["n_heads"]', "Only n_kv_groups"),
        ('cfg["n_layers"] * ', "", "each layer has its own"),
        ("per_position * batch", "per_position", "its own keys and values"),
        ("return n_parameters", "return 4 * n_parameters", "nor optimizer state"),
        ("return n_parameters", "return 2 * n_parameters", "no gradients"),
        ("return n_parameters", "return batch * n_parameters", "there once"),
        ("batch * positions", "batch * positions**2", "not scores"),
        ("positions * bytes_per_number", "positions * 2", "twice as large"),
        ('cfg.get("head_dim") or ', "", "head_dim means it"),
        ("d = cfg", "return n_parameters * bytes_per_number\n    d = cfg", "return two numbers"),
    ],
    "top_k_probs": [
        ("/ temperature", "* temperature", "wrong way round"),
        (
            "kept = torch",
            "kept = (logits / temperature).masked_fill(logits < best.values[..., -1:], -torch.inf)  #",
            "every tie",
        ),
        (
            "return kept.softmax(dim=-1)",
            "return (logits / temperature).softmax(dim=-1) * (kept > -torch.inf)",
            "add up to 1 again",
        ),
        ("temperature, top_k = 1.0, 1", "pass", "a case of its own"),
        ("temperature, top_k = 1.0, 1", "temperature = 1.0", "the largest logit has probability 1"),
        (
            "temperature, top_k = 1.0, 1",
            "return (logits == logits.amax(dim=-1, keepdim=True)).float()",
            "one token",
        ),
        ("min(top_k, logits.shape[-1])", "top_k", "stopped with RuntimeError"),
        ("logits = logits.float()\n", "\n", "Probabilities are float32"),
        ("min(top_k,", "min(top_k + 1,", "must be 1 in each row"),
        (
            "logits = logits.float()",
            "logits = logits.float()\n    logits -= logits.max()",
            "changes its arguments",
        ),
        ("-torch.inf", "0.0", "must be 1 in each row"),
        ("kept.softmax(dim=-1)", "kept.softmax(dim=0)", "of a row must add up to 1"),
    ],
    "top_p_probs": [
        ("before >= top_p", "values.cumsum(dim=-1) > top_p", "always stays"),
        ("before >= top_p", "(values.cumsum(dim=-1) > top_p) & (before > 0)", "crosses the line"),
        ("before >= top_p", "before > top_p", "one is too many"),
        (" / kept.sum(dim=-1, keepdim=True)", "", "divide by its sum"),
        ("torch.zeros_like(probs).scatter(-1, places, values)", "values", "bring each probability back"),
        ("descending=True", "descending=False", "from the bottom"),
        ("kept.sum(dim=-1, keepdim=True)", "kept.sum()", "in a batch"),
        ("before >= top_p", "values < 0.3", "nothing is cut"),
    ],
    "generate_batch": [
        ("ended.all()", "ended.any()", "cut off with it"),
        ("tokens = tokens.masked_fill(ended, eos_id)", "pass", "filled with the end's id"),
        (
            [("tokens = tokens.masked_fill(ended, eos_id)", "pass"), ("ended |= ", "ended = ")],
            "remember which",
        ),
        ("[:, -1]", "[:, 0]", "Only the last position"),
        (
            "ended = torch.zeros(len(idx), dtype=torch.bool)",
            "ended = (idx == eos_id).any(dim=1)",
            "in the *prompt*",
        ),
        (
            "ended = torch.zeros(len(idx), dtype=torch.bool)",
            "ended = idx[:, -1] == eos_id",
            "still be answered",
        ),
        ("            break", "            pass", "ends after two tokens"),
        (
            [
                ("        if ended.all():\n            break\n", ""),
                (
                    "        tokens = tokens.masked",
                    "        if ended.all():\n            break\n        tokens = tokens.masked",
                ),
            ],
            "yet the model was called 3 times",
        ),
        ("return idx", "return idx[:, -1:]", "begin with the prompt"),
        ("model(idx)", "model(idx[:, -1:])", "give it the prompt"),
        ("range(max_new_tokens)", "range(max_new_tokens + 1)", "makes 4 new tokens"),
        ("model(idx)[:, -1].argmax(dim=-1)", "model(idx)[:, -1].argmax()[None]", "its own likeliest token"),
        ("return idx", "return idx.float()", "whole numbers"),
    ],
    "stream_text": [
        ("decoder.decode(piece)", 'piece.decode("utf-8", "replace")', "must wait"),
        ("decoder.decode(piece)", 'piece.decode("utf-8", "ignore")', "may be lost"),
        ("decoder.decode(piece)", 'piece.decode("latin-1")', "came out as"),
        ("decoder.decode(piece)", "piece.decode()", "stopped with UnicodeDecodeError"),
        (
            '    if rest := decoder.decode(b"", final=True):\n        yield rest\n',
            "",
            "nobody believes it complete",
        ),
        (
            'if rest := decoder.decode(b"", final=True):\n        yield rest',
            'yield decoder.decode(b"", final=True)',
            "no more if no byte",
        ),
        ("for piece in pieces:", "for piece in list(pieces):", "yield while you read"),
        ("for piece in pieces:", 'for piece in [b"".join(pieces)]:', "yielded first"),
        (
            "    for piece in pieces:\n        yield decoder.decode(piece)\n",
            '    waiting = b""\n    for piece in pieces:\n        waiting += piece\n        try:\n'
            '            yield waiting.decode()\n            waiting = b""\n'
            "        except UnicodeDecodeError:\n"
            '            yield ""\n    decoder.decode(waiting)\n',
            "is certain; you have shown",
        ),
        (
            "    for piece in pieces:\n        yield decoder.decode(piece)\n",
            '    shown = ""\n    for piece in pieces:\n        shown += decoder.decode(piece)\n'
            "        yield shown\n",
            "yours is 'LlLlamaLlama eats'",
        ),
        ("yield decoder.decode(piece)", "yield piece", "yield text"),
        (
            "        yield decoder.decode(piece)\n",
            "        if text := decoder.decode(piece):\n            yield text\n",
            "yield one for each piece",
        ),
    ],
    "chat_prompt": [
        (".strip()", "", "must be stripped"),
        ('[/INST]"', '[/INST]</s>"', "waits for its answer"),
        ('            prefix = ""\n', "", "first exchange only"),
        ('text += f"<s>[INST]', 'text += ("" if text else "<s>") + f"[INST]', "two <s>"),
        (
            'prefix = f"<<SYS>>\\n{content}\\n<</SYS>>\\n\\n"',
            'text += f"<s>[INST] <<SYS>>\\n{content}\\n<</SYS>> [/INST]"',
            "no [INST] of its own",
        ),
        (
            'prefix = f"<<SYS>>\\n{content}\\n<</SYS>>\\n\\n"',
            'text += f"<<SYS>>\\n{content}\\n<</SYS>>\\n\\n"',
            "inside|begin",
        ),
        ('\\n\\n"', '\\n"', "mind the newlines"),
        ('f" {content} </s>"', 'f"{content}</s>"', "an answered message"),
        ('f" {content} </s>"', 'f" {content} "', "there is one </s>"),
        ('message["content"].strip()', 'message.pop("content").strip()', "changes its arguments"),
        ("[INST] {prefix}{content} [/INST]", "[INST]{prefix}{content}[/INST]", "one user message is wrong"),
        ("<s>[INST]", "[INST]", "begins with <s>"),
        ("return text", "return [text]", "one string"),
    ],
    "merge_shards": [
        ('{"wo", "w2", "tok_embeddings"}', '{"wo", "w2"}', "the other dimension"),
        ("dim=dim", "dim=0", "the other dimension"),
        ('{"wo", "w2", "tok_embeddings"}', '{"wo", "w2", "wk", "tok_embeddings"}', "the other dimension"),
        ("if first.dim() == 1:", "if False:", "holds the whole norm"),
        (
            "merged[name] = first",
            "merged[name] = sum(shard[name] for shard in shards)",
            "holds the whole norm",
        ),
        ("for shard in shards]", "for shard in shards[::-1]]", "in order"),
        ('name == "rope.freqs"', "False", "it can be computed"),
        ("torch.cat([shard[name] for shard in shards], dim=dim)", "first", "has shape"),
        ("if first.dim() == 1:\n", 'if "attention" in name or first.dim() == 1:\n', "has shape"),
        ("merged[name] = first", "pass", "weights are missing"),
        ("return merged", "return list(merged.values())", "one dict"),
        ("return merged", "shards.clear()\n    return merged", "changes its arguments"),
    ],
    "entropy_gap": [
        ("losses + log_probs", "losses - log_probs", "Mind the sign"),
        ("differences.std(correction=1)", "(losses.var() + log_probs.var()) ** 0.5", "text by text"),
        (" / len(differences) ** 0.5", "", "root of the number of texts"),
        ("correction=1", "correction=0", "N - 1"),
        ("gap / -log_probs.mean()", "gap / losses.mean()", "with the entropy, not with the loss"),
        ("float(gap / -", "float(100 * gap / -", "not per cent"),
        ("gap = differences.mean()", "gap = differences.sum()", "A mean over texts"),
        ("gap = differences.mean()", "gap = differences.mean().clamp(min=0)", "Don't hide it"),
        ("gap = differences.mean()", "gap = differences.abs().mean()", "Don't hide it"),
        ("return float(gap)", "return differences", "one number each"),
        ("return float(gap), float(error), ", "return float(gap), ", "return three numbers"),
    ],
}


# --- the notebooks' cells ---


def cells_of(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        cell | {"source": "".join(cell["source"]), "tags": cell["metadata"].get("tags", [])} for cell in cells
    ]


def exercise_cells(path: Path) -> dict[str, str]:
    """Name of the exercise -> the source of its cell."""
    tagged = [(tag, cell["source"]) for cell in cells_of(path) for tag in cell["tags"]]
    return {tag.removeprefix("exercise:"): source for tag, source in tagged if tag.startswith("exercise:")}


def student_path(path: Path) -> Path:
    return path.with_name(path.name.replace("_solutions", ""))


def chapter_cells(chapter: int, student: bool = False) -> list[dict]:
    """The cells of all exercise notebooks of a chapter."""
    return [cell for path in CHAPTERS[chapter] for cell in cells_of(student_path(path) if student else path)]


SOURCES = {name: source for path in PAGES for name, source in exercise_cells(path).items()}
STUBS = {name: source for path in PAGES for name, source in exercise_cells(student_path(path)).items()}


def function(name: str, source: str):
    """The function that a cell defines, where nothing but torch is at hand."""
    namespace = {"torch": torch, "F": torch.nn.functional}
    exec(compile(source, f"<{name}>", "exec"), namespace)
    return namespace[name]


def mutants(name: str) -> list[tuple[str, str]]:
    """Source and hint of every mutant of one exercise."""
    made = []
    for *edit, hint in MUTANTS[name]:
        source = SOURCES[name]
        for old, new in edit[0] if isinstance(edit[0], list) else [edit]:
            assert old in source, f"{name}: the solution no longer holds {old!r}"
            source = source.replace(old, new)
        made.append((source, hint))
    return made


def run_check(name: str, answer) -> str | None:
    """The check's line, or None if it passes; what it prints is swallowed."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(checks, f"check_{name}")(answer)
    except checks.CheckFailed as failed:
        return str(failed)
    return None


def assert_helpful(name: str, line: str | None) -> None:
    """One line that names its exercise, from a property that foresaw the mistake, and gives nothing away."""
    assert line is not None, f"check_{name} passes a wrong answer"
    assert line.startswith(f"check_{name}: ") and len(line.splitlines()) == 1 and len(line) < 450, line
    assert "can't work with" not in line, f"no property foresaw this: {line}"
    said = re.sub(r"\s+", "", line.split("(your line")[0])  # there it quotes the reader's own code
    solution = SOURCES[name].split("# BEGIN SOLUTION")[1].split("# END SOLUTION")[0]
    secrets = [re.sub(r"\s+|#.*", "", code) for code in solution.splitlines()]
    assert not [code for code in secrets if len(code) > 8 and code in said], f"a solution leaks: {line}"


# --- first promise: solutions pass ---


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_solutions_notebook_runs_and_earns_every_point(chapter):
    checks.reset()
    printed = io.StringIO()
    namespace: dict = {}
    with contextlib.redirect_stdout(printed):
        for cell in chapter_cells(chapter):
            if cell["cell_type"] == "code":
                exec(compile(cell["source"], "<cell>", "exec"), namespace)
    passed = [line for line in printed.getvalue().splitlines() if line.startswith("✓")]
    entries = checks.exercises(chapter)
    assert [line.split(":")[0] for line in passed] == [f"✓ check_{entry.name}" for entry in entries]
    earned, possible = checks.score(chapter)
    assert earned == possible == sum(entry.points for entry in entries)
    assert f"({possible} of {possible} so far)" in passed[-1]
    graded = checks.grade(namespace, chapter)
    assert graded.points == (possible, possible) and not any(result.message for result in graded.results)
    checks.reset()


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes_alone(name):
    assert run_check(name, function(name, SOURCES[name])) is None


# --- second promise: stubs fail helpfully ---


@pytest.mark.parametrize("name", NAMES)
def test_stub_fails_with_one_line(name):
    line = run_check(name, function(name, STUBS[name]))
    assert_helpful(name, line)
    assert "not written yet" in line


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_student_notebook_runs_but_for_its_checks(chapter):
    namespace: dict = {}
    failures = []
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in chapter_cells(chapter, student=True):
            if cell["cell_type"] == "code":
                try:
                    exec(compile(cell["source"], "<cell>", "exec"), namespace)
                except checks.CheckFailed as failed:
                    failures.append(str(failed).split(":")[0])
    assert failures == [f"check_{entry.name}" for entry in checks.exercises(chapter)]
    assert not any("BEGIN SOLUTION" in cell["source"] for cell in chapter_cells(chapter, student=True))
    checks.reset()


# --- third promise: mutants are rejected ---


@pytest.mark.parametrize("name", NAMES)
def test_mutants_are_rejected_with_their_hint(name):
    made = mutants(name)
    assert len(made) >= 4 and len({source for source, _ in made}) == len(made)
    for source, hint in made:
        line = run_check(name, function(name, source))
        assert line is not None, f"check_{name} passes this mutant:\n{source}"
        assert_helpful(name, line)
        assert any(words in line for words in hint.split("|")), (
            f"want a hint on {hint!r}, got: {line}\n{source}"
        )


def broken_answers(right):
    """Answers that are wrong for any exercise, made from a right one."""

    def changed(change):
        def answer(*args):
            return change(right(*args))

        return answer

    def each(value, tensors, numbers, texts):
        if isinstance(value, torch.Tensor):
            return tensors(value)
        if isinstance(value, dict):
            return {key: each(item, tensors, numbers, texts) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(each(item, tensors, numbers, texts) for item in value)
        if isinstance(value, (int, float)):
            return numbers(value)
        if isinstance(value, str):
            return texts(value)
        return [each(item, tensors, numbers, texts) for item in value]  # a generator

    nan = float("nan")
    yield "None", changed(lambda value: None)
    yield "a text", changed(lambda value: "llama")
    yield "a number", changed(lambda value: 7)
    yield "a list", changed(lambda value: ["llama"])
    yield "an empty tensor", changed(lambda value: torch.zeros(0))
    yield "zeros", changed(lambda value: each(value, torch.zeros_like, lambda v: 0 * v, lambda v: ""))
    yield (
        "NaN",
        changed(
            lambda value: each(
                value, lambda v: v.new_full(v.shape, nan) if v.is_floating_point() else ~v, lambda v: nan, len
            )
        ),
    )
    yield (
        "another dimension",
        changed(
            lambda value: each(value, lambda v: v.unsqueeze(0), lambda v: torch.tensor([v, v]), lambda v: [v])
        ),
    )
    yield "another dtype", changed(lambda value: each(value, torch.Tensor.double, str, str.encode))

    def raises(*args):
        raise ValueError("two lines\nof complaint")

    yield "an exception", raises
    yield "no arguments", lambda: None
    yield "not a function", 3
    yield "None instead of a function", None


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_any_wrong_kind_are_rejected(name):
    for kind, answer in broken_answers(function(name, SOURCES[name])):
        line = run_check(name, answer)
        assert line is not None, f"check_{name} passes {kind}"
        assert line.startswith(f"check_{name}: ") and len(line.splitlines()) == 1, line
        assert "can't work with" not in line, f"{kind}: {line}"
        if kind == "None":
            assert "return" in line
        if kind == "an exception":
            assert "ValueError: two lines of complaint" in line


LAZY = {"stream_text", "until_stop"}
UNCHANGEABLE = {  # the arguments are numbers, or a model
    "hidden_width", "rope_frequencies", "causal_mask", "unfinished_pairs", "scaled_frequency", "held_bytes",
    "positions_computed", "slots_hold", "most_tokens_per_s", "rows_until_compute", "draft_cost",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_answers_that_change_their_arguments_are_rejected(name):
    right = function(name, SOURCES[name])
    changed_something = False

    def spoil(value) -> None:
        nonlocal changed_something
        if isinstance(value, torch.Tensor) and value.numel():
            value.logical_not_() if value.dtype == torch.bool else value.add_(1)
        elif isinstance(value, (list, dict)) and value:
            value.clear()
        else:
            return
        changed_something = True

    def answer(*args):
        result = right(*args)
        result = iter(list(result)) if name in LAZY else result
        for value in args:
            spoil(value)
        return result

    line = run_check(name, answer)
    assert line is not None if changed_something else name in UNCHANGEABLE
    if changed_something and name not in LAZY:  # these have to be lazy before anything else
        assert "changes its arguments" in line


def test_a_broken_loader_is_repaired_one_symptom_at_a_time():
    source = next(c["source"] for c in chapter_cells(2) if c["source"].startswith("def broken_loader"))
    repairs = [('.wk"), n_heads)', '.wk"), n_kv_groups)'), ('half_split(join(f"{att}.wv"), n_kv_groups)', 'join(f"{att}.wv")'),
               (".w3", ".w9"), (".w1", ".w3"), (".w9", ".w1"),
               (".ffn_norm", ".x_norm"), (".attention_norm", ".ffn_norm"), (".x_norm", ".attention_norm")]  # fmt: skip
    steps = [repairs[:1], repairs[1:2], repairs[2:5], repairs[5:]]
    assert all(source.count(old) == 1 for old, _ in [repairs[0], repairs[1], repairs[2], repairs[5]])
    for left_out in range(16):
        repaired = source
        for number, step in enumerate(steps):
            for old, new in step if left_out >> number & 1 == 0 else []:
                repaired = repaired.replace(old, new)
        line = run_check("repaired_loader", function("broken_loader", repaired))
        assert (line is None) == (left_out == 0) and (line is None or "symptom" in line), f"{left_out:04b}: {line}"


def test_a_broken_block_is_repaired_one_symptom_at_a_time():
    source = next(c["source"] for c in chapter_cells(1) if c["source"].startswith("def broken_block"))
    repairs = [("/ D  #", "/ D**0.5  #"), ("tril(diagonal=1)", "tril()"), ("x = h + (", "x = x + ("),
               ("gate * F.silu(up)", "F.silu(gate) * up")]  # fmt: skip
    assert all(source.count(old) == 1 for old, _ in repairs)
    for left_out in range(16):
        repaired = source
        for number, (old, new) in enumerate(repairs):
            repaired = repaired.replace(old, new) if left_out >> number & 1 == 0 else repaired
        line = run_check("repaired_block", function("broken_block", repaired))
        assert (line is None) == (left_out == 0), f"{left_out:04b}: {line}"


# --- what else a check promises ---


def by_bytes(pieces):
    """Streaming by hand: hold back what follows the last complete character."""
    waiting = b""
    for piece in pieces:
        waiting += piece
        end = len(waiting)
        for back in range(1, min(4, len(waiting)) + 1):
            byte = waiting[-back]
            if byte >= 0b11000000:  # a first byte: is its character complete?
                length = 2 if byte < 0b11100000 else 3 if byte < 0b11110000 else 4
                end -= back if length > back else 0
                break
            if byte < 0b10000000:
                break
        yield waiting[:end].decode()
        waiting = waiting[end:]
    if waiting:
        yield "\ufffd"


def by_rows(logits, temperature, top_k):
    """Top-k with Python lists."""
    rows = []
    for row in logits.float().reshape(-1, logits.shape[-1]).tolist():
        best = sorted(range(len(row)), key=lambda i: -row[i])[: top_k if temperature else 1]
        top = row[best[0]]
        weights = {i: math.exp((row[i] - top) / (temperature or 1)) for i in best}
        rows.append([weights.get(i, 0) / sum(weights.values()) for i in range(len(row))])
    return torch.tensor(rows).reshape(logits.shape)


def until_all_ended(model, idx, limit, end):
    prompt = idx.shape[1]
    while idx.shape[1] < prompt + limit:
        done = (idx[:, prompt:] == end).any(dim=1)
        if done.all():
            break
        best = torch.where(done, end, model(idx)[:, -1].argmax(-1))
        idx = torch.hstack([idx, best.unsqueeze(1)])
    return idx


def turned_by_tables(x, positions, frequencies):
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).type_as(x)


def turned_key(q, k, distances, frequencies):
    return (turned_by_tables(k.expand(len(distances), -1), -distances, frequencies) * q).sum(-1)


def nucleus(probs, top_p):
    result = torch.zeros_like(probs)
    for row, out in zip(probs.reshape(-1, probs.shape[-1]), result.view(-1, probs.shape[-1])):
        mass = 0.0
        for token in row.argsort(descending=True):
            out[token] = row[token]
            mass += row[token]
            if mass >= top_p:
                break
        out /= mass
    return result


def wide_norm(x, weight, eps):
    return (F.rms_norm(x.double(), x.shape[-1:], eps=eps) * weight).to(x.dtype)


OTHERS = {
    "rms_norm": wide_norm,
    "silu_slope": lambda x: torch.func.vmap(torch.func.grad(F.silu))(x.flatten()).reshape(x.shape),
    "swiglu": lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
    "hidden_width": lambda D, m, f=None: -(-int((f or 1) * int(8 * D / 3)) // m) * m,
    "rope_frequencies": lambda d, base: torch.tensor([base ** (-2 * i / d) for i in range(d // 2)]),
    "apply_rope": turned_by_tables,
    "interleaved_to_half_split": lambda w, heads: torch.cat(
        [torch.cat([h[::2], h[1::2]]) for h in w.chunk(heads)]
    ),
    "rope_score": turned_key,
    "causal_mask": lambda T, S: torch.ones(T, S).tril(S - T).bool(),
    "causal_attention": lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True),
    "top_k_probs": by_rows,
    "top_p_probs": nucleus,
    "generate_batch": until_all_ended,
    "stream_text": by_bytes,
    "entropy_gap": lambda a, b: ((a + b).mean(), (a + b).std() / 50**0.5, (a + b).mean() / -b.mean()),
    **answers_ch02.OTHERS,
    **answers_ch03.OTHERS,
    **answers_ch04.OTHERS,
    **answers_ch05_int8.OTHERS,
    **answers_ch05_int4.OTHERS,
    **answers_ch05_gptq.OTHERS,
    **answers_ch05_evaluation.OTHERS,
    **answers_ch05_speculative.OTHERS,
    **answers_ch05_drafts.OTHERS,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_right_answers_pass(name):
    assert run_check(name, OTHERS[name]) is None


def test_checks_leave_the_session_as_it_was():
    def messy(x, weight, eps=1e-5):
        torch.manual_seed(1), random.seed(1), torch.rand(3)
        torch.set_default_dtype(torch.float64)
        return function("rms_norm", SOURCES["rms_norm"])(x, weight, eps)

    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    assert run_check("rms_norm", messy) is None
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        assert run_check("silu_slope", function("silu_slope", SOURCES["silu_slope"])) is None
        assert not torch.is_grad_enabled()


def test_checks_say_the_same_twice_whatever_the_random_state():
    for name in NAMES:
        source = mutants(name)[0][0]
        torch.manual_seed(1)
        first = run_check(name, function(name, source))
        torch.manual_seed(2)
        assert run_check(name, function(name, source)) == first


def test_checks_have_roads_of_their_own():
    for path in (BOOK / "pkg" / "llamabook" / "checks").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {
            name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
        }
        ours = {name for name in modules if name.startswith("llamabook")}
        assert all(name.startswith("llamabook.checks") for name in ours), (
            f"{path.name} asks the package itself"
        )


def test_a_failure_is_one_line_in_a_notebook_and_readable_in_plain_python():
    with pytest.raises(checks.CheckFailed) as caught:
        checks.check_rms_norm(lambda x, weight, eps: None)
    failed = caught.value
    assert isinstance(failed, AssertionError)
    assert failed._render_traceback_() == [f"✗ {failed}"]
    assert traceback.format_exception_only(failed) == [f"llamabook.checks.CheckFailed: {failed}\n"]
    assert failed.__cause__ is None and (failed.__context__ is None or failed.__suppress_context__)
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shell.user_ns["checks"] = checks
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        shell.run_cell("checks.check_rms_norm(lambda x, weight, eps: None)")
    assert out.getvalue().strip() == f"✗ {failed}"


def test_an_interrupt_is_not_swallowed():
    def endless(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checks.check_rms_norm(endless)


def test_an_error_is_told_with_the_readers_own_line(tmp_path):
    path = tmp_path / "cell.py"
    path.write_text("def silu_slope(x):\n    y = x + 1\n    return y @ [1]\n")
    namespace: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    line = run_check("silu_slope", namespace["silu_slope"])
    assert "TypeError" in line and "(your line 3: return y @ [1])" in line
    line = run_check("silu_slope", lambda: None)
    assert "does your function still take the arguments" in line


def test_score_report_and_grade():
    checks.reset()
    right = function("silu_slope", SOURCES["silu_slope"])
    assert run_check("silu_slope", right) is None
    run_check("rms_norm", lambda *args: None)
    assert checks.score(1) == (5, 200)
    table = checks.report(1)
    states = {result.exercise.name: result.state for result in table.results}
    assert (states["silu_slope"], states["rms_norm"], states["swiglu"]) == ("passed", "failed", "not tried")
    assert "The slope of SiLU" in str(table) and str(table).splitlines()[-1].split() == [
        "total",
        "5",
        "/",
        "200",
    ]
    assert table._repr_html_().count("<tr>") == len(table.results) + 2
    graded = checks.grade({"silu_slope": right, "swiglu": right, "hidden_width": None}, chapter=1)
    outcome = {result.exercise.name: result for result in graded.results}
    assert graded.points == (5, 200) and checks.score(1) == (5, 200)
    assert outcome["swiglu"].state == "failed" and outcome["swiglu"].message.startswith("check_swiglu: ")
    assert (
        outcome["rms_norm"].state == "not tried" and "there is no `rms_norm`" in outcome["rms_norm"].message
    )
    run_check("silu_slope", lambda x: x)
    assert checks.score(1) == (0, 200)
    checks.reset()


# --- page and registry agree ---


def test_registry_is_complete():
    assert set(MUTANTS) == set(SOURCES) == set(STUBS) == set(EXERCISES)
    least = {1: 12, 2: 8, 3: 3, 4: 11, 5: 20}
    worth = {"warm-up": 5, "core": 10, "stretch": 20}
    assert checks.score(1)[1] == 200
    for chapter in CHAPTERS:
        entries = checks.exercises(chapter)
        assert len(entries) >= least[chapter] and {entry.difficulty for entry in entries} == set(DIFFICULTIES)
        assert all(entry.points == worth[entry.difficulty] for entry in entries)
    for entry in checks.exercises():
        assert 5 <= entry.minutes <= 30 and f"check_{entry.name}" in checks.__all__


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_exercise_has_statement_hints_stub_check_and_explanation(chapter):
    solutions, student = chapter_cells(chapter), chapter_cells(chapter, student=True)
    for number, entry in enumerate(checks.exercises(chapter), start=1):
        tag = f"exercise:{entry.name}"
        at = next(i for i, cell in enumerate(student) if tag in cell["tags"])
        heading = re.compile(rf"^### {number}\. {re.escape(entry.title)}( ★)?$", re.MULTILINE)
        statement = next(cell["source"] for cell in student if heading.search(cell["source"]))
        assert f"\n{entry.label}\n" in statement
        assert [f"<summary>Hint {n}: " in statement for n in (1, 2, 3)] == [True] * 3
        assert statement.count("<details>") == statement.count("</details>") == 3
        assert student[at + 1]["source"] == f"checks.check_{entry.name}({entry.name})"
        stub = ast.parse(student[at]["source"]).body[-1]
        assert isinstance(stub, ast.FunctionDef) and stub.name == entry.name and ast.get_docstring(stub)
        words = [
            c["source"]
            for c in solutions
            if "solution-only" in c["tags"] and f"**Solution {number}.**" in c["source"]
        ]
        assert len(words) == 1 and len(words[0]) > 150
        assert not any(words[0] in cell["source"] for cell in student)
    assert sum(e.minutes for e in checks.exercises(chapter)) < 330  # the page says about 5 hours


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_student_notebook_offers_no_answer(chapter):
    for cell in chapter_cells(chapter, student=True):
        if cell["cell_type"] == "code":
            imports = re.findall(r"llamabook[\w.]*(?: import .*)?", cell["source"])
            assert all(line == "llamabook import checks" for line in imports), imports
            assert not cell["outputs"] and cell["execution_count"] is None
