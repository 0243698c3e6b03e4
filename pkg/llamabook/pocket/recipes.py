"""What is trained: the architecture of every pocket model, its data, its start and its files. Written by hand.

    pocket-llama2              Llama 2: a head of attention has keys and values of its own; SentencePiece, Meta's files
    pocket-gpt                 the GPT of chapter 1, as many weights, the same texts and tokenizer
    pocket-llama3.2            Llama 3.2: grouped queries, scaled RoPE, head tied to the embedding; tiktoken ranks,
                               Hugging Face's files
    pocket-llama3.2-instruct   the same model, trained further on questions and chats
    pocket-draft               the smallest, a quarter of it, with the same tokenizer, to guess ahead of the others

`train.py` trains what is written here.
"""

import io
import json
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from llamabook.checkpoint.huggingface import save_huggingface
from llamabook.checkpoint.meta import save_meta
from llamabook.files import replacing
from llamabook.gpt import GPTModel
from llamabook.llama2 import Llama2Model
from llamabook.llama3 import LLAMA32_CONFIG_1B, Llama3Model
from llamabook.pocket import questions, world
from llamabook.pocket.ranks import train_ranks
from llamabook.tokenizer import load_tokenizer

# ---- architectures ------------------------------------------------------------------------------------------------

VOCAB_SIZE = 1792
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

RANKS = 1792  # 999 of 1000 words of the world are one token; its words hold about 1980 tokens in all
# All that is not a size is as in Llama 3.2 1B: four query heads a group, d = 64, base 500 000, scaling, tied head.
LLAMA32_CONFIG = {
    **LLAMA32_CONFIG_1B,
    "vocab_size": RANKS + 256, "emb_dim": 256, "n_heads": 8, "head_dim": 64, "n_layers": 3, "hidden_dim": 512,
    "n_kv_groups": 2, "norm_eps": 1e-5, "dtype": torch.float32,
}  # fmt: skip
DRAFT_CONFIG = {**LLAMA32_CONFIG, "emb_dim": 128, "n_heads": 4, "n_layers": 2, "hidden_dim": 256}


# ---- recipes ------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where texts come from: the module `world`, or a mix of it with questions."""

    def sample(self, seed: int) -> world.Document: ...
    def is_held_out(self, text: str) -> bool: ...
    def texts(self, split: str, start: int = 0) -> Iterator[world.Document]: ...


@dataclass(frozen=True)
class Recipe:
    """What is trained, for how many steps, and how the result is written.

    base: the pocket model whose weights and tokenizer are the start; measure: what is logged beside the loss.
    """

    build: Callable[[], nn.Module]
    tokenizer: Callable[[], bytes]
    save: Callable[[nn.Module, Path], None]
    source: Source = world
    base: str | None = None
    measure: Callable[[nn.Module, object], dict] = lambda model, tokenizer: {}
    steps: int = 8000
    documents: int = 32  # per step
    muon_lr: float = 0.02
    adam_lr: float = 5e-3
    warmup: int = 100
    decay: float = 0.75  # the last share of the steps, over which the learning rates fall to zero


# ---- tokenizers ---------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[world.Document], vocab_size: int = VOCAB_SIZE) -> bytes:
    """A SentencePiece model with the structure of Llama 2's: byte pairs, byte fallback, split digits, <unk> <s> </s>."""
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


def _llama2_tokenizer() -> bytes:
    return train_tokenizer(islice(world.texts("train"), 20_000))


def train_llama3_tokenizer(documents: Iterable[world.Document], size: int = RANKS) -> bytes:
    """A ranks file of Llama 3's kind, learned from texts as its chat format cuts them."""
    texts = (text for d in documents for text in ([d.text] if not d.turns else _messages(d)))
    return train_ranks(texts, size)


def _messages(document: world.Document) -> list[str]:
    """Roles, and what is said behind the header of each; the system never speaks here, but may elsewhere."""
    return ["system", *(text for t in document.turns for text in (t["role"], f"\n\n{t['content']}"))]


def _llama3_tokenizer() -> bytes:
    """From as many texts as Llama 2's, and from questions, which have words of their own."""
    asked = (questions.dialog(seed) for seed in range(2 * 2000))
    return train_llama3_tokenizer(
        [*islice(world.texts("train"), 20_000), *(d for d in asked if not questions.is_held_out(d.text))]
    )


# ---- the start ----------------------------------------------------------------------------------------------------


def initialize(model: nn.Module, seed: int = 1) -> nn.Module:
    """Start where attention already copies: after Trockman and Kolter (2023, "mimetic initialization").

    - The head starts as a copy of the embedding (or is the embedding, where they are tied).
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
            block.att.out_proj.weight.copy_(_way_out(block.att))
            [layer for layer in block.ff.modules() if isinstance(layer, nn.Linear)][-1].weight.zero_()
            if isinstance(model, Llama2Model):
                _blind_to_distance(block.att, model.frequencies())
    return model


def _way_out(attention: nn.Module) -> torch.Tensor:
    """The transposed way in, (D, H * d): that of its group for each head, divided by how often H * d holds D."""
    value = attention.W_value.weight  # (G * d, D)
    width, D = attention.n_heads * attention.head_dim, value.shape[1]
    each = width // len(value)  # H / G
    heads = value.unflatten(0, (-1, attention.head_dim)).repeat_interleave(each, dim=0)  # (H, d, D)
    return heads.flatten(0, 1).T * (D / width)


def _blind_to_distance(attention: nn.Module, frequencies: torch.Tensor) -> None:
    """Zero the queries and keys of every other group in the pairs that turn by a right angle within a text.

    Queries and keys that are both zero get no gradient, so these heads stay as they start. Learned positions leave a
    GPT free to do the same; without this, the Llama learns to repeat names and places much later than the GPT.
    """
    d = attention.head_dim
    groups = len(attention.W_key.weight) // d  # G; in Llama 2 each head is a group
    fast = frequencies * CONTEXT_LENGTH > torch.pi / 2  # (d / 2,)
    for layer in (attention.W_query, attention.W_key):
        heads = layer.weight.view(groups, -1, 2, d // 2, layer.in_features)  # (G, heads, halves, pairs, D)
        heads[::2, :, :, fast] = 0


# ---- the files ----------------------------------------------------------------------------------------------------


def write(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def _save_llama2(model: nn.Module, folder: Path) -> None:
    save_meta(model.to(torch.bfloat16), folder)


def _save_gpt(model: nn.Module, folder: Path) -> None:
    config = {**GPT_CONFIG, "dtype": "bfloat16"}
    write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    with replacing(folder / "model.pth") as file:
        torch.save(model.to(torch.bfloat16).state_dict(), file)


def _save_llama3(model: nn.Module, folder: Path, chats: bool = False) -> None:
    """As a Hugging Face folder; a model that chats also ends where a message ends."""
    tokenizer = load_tokenizer(folder)
    ends = sorted(tokenizer.stop_tokens) if chats else tokenizer.eos_id
    model.to(torch.bfloat16).cfg["dtype"] = torch.bfloat16
    save_huggingface(model, folder, metadata={"bos_token_id": tokenizer.bos_id, "eos_token_id": ends})


def _right(model: nn.Module, tokenizer) -> dict:
    asked = questions.held_out_questions(200)
    return {"right": sum(questions.answers_right(model, tokenizer, asked)) / len(asked)}


_llama3 = partial(Recipe, tokenizer=_llama3_tokenizer, save=_save_llama3)

RECIPES = {
    "pocket-llama2": Recipe(partial(Llama2Model, LLAMA2_CONFIG), _llama2_tokenizer, _save_llama2),
    "pocket-gpt": Recipe(partial(GPTModel, GPT_CONFIG), _llama2_tokenizer, _save_gpt),
    "pocket-llama3.2": _llama3(partial(Llama3Model, LLAMA32_CONFIG), steps=7000),
    # Half of its texts are chats of the world, half questions. Shorter: it knows the world already.
    "pocket-llama3.2-instruct": _llama3(
        partial(Llama3Model, LLAMA32_CONFIG), save=partial(_save_llama3, chats=True), base="pocket-llama3.2",
        source=questions.Mix(0.5, "chat"), measure=_right, steps=2500, muon_lr=0.015, adam_lr=3e-3, decay=0.8,
    ),
    # Guesses for both of them, so it reads all that they read.
    "pocket-draft": _llama3(partial(Llama3Model, DRAFT_CONFIG), source=questions.Mix(0.125, "document"), steps=2500),
}  # fmt: skip
