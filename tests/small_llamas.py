"""Models with random weights that are large enough to matter, and small checkpoints of such."""

import io
import math
import os
from itertools import groupby
from pathlib import Path

import pytest
import sentencepiece
import torch

from llamabook.checkpoint.huggingface import save_huggingface
from llamabook.checkpoint.meta import save_meta
from llamabook.fast import kernels
from llamabook.llama2 import Llama2Model
from llamabook.llama3 import Llama3Model
from llamabook.pocket.ranks import train_ranks
from llamabook.tokenizer import load_tokenizer

SENTENCES = [
    "The old llama walks slowly to the green pond behind the barn.",
    "A young farmer brings fresh hay, and the llamas eat it at once.",
    "In the evening the sheep and the goats come home over the hill.",
    "What do llamas eat? They eat grass, hay and a carrot on Sundays.",
]
SHAPE = {"emb_dim": 32, "n_heads": 2, "n_layers": 2, "hidden_dim": 64, "rope_base": 10_000.0, "dtype": torch.float32}


@pytest.fixture(scope="session", autouse=True)
def kernels_first():
    """Where the kernels can't be built, that is said now, and not in the middle of a test."""
    if not kernels.ready():
        os.environ["LLAMABOOK_KERNELS"] = "0"


def shown(tokenizer, ids: list[int]) -> str:
    """The text of `ids` as a reader sees it: special tokens are not shown, and end a character that is not complete."""
    special = getattr(tokenizer, "special_ids", ())
    runs = groupby(ids, key=lambda token: token in special)
    return "".join(tokenizer.decode(list(run)) for is_special, run in runs if not is_special)


def random_weights(model, size=2.0, seed=0):
    """Weights large enough that attention has favourites; norm weights that differ from 1 and from each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, size / math.sqrt(p.shape[1]), generator=generator)
            else:
                p.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Give every matrix of `model` random weights of a realistic size."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.empty_like(parameter).normal_(std=0.3, generator=generator))
    return model


def write_llama2(folder: Path, context_length: int) -> Path:
    """A Llama 2 in Meta's layout, and a SentencePiece tokenizer that has all bytes."""
    tokenizer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=tokenizer,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.getvalue())
    sizes = {"vocab_size": load_tokenizer(folder).vocab_size, "context_length": context_length}
    save_meta(shake(Llama2Model({**SHAPE, **sizes, "n_kv_groups": 2, "rope_freq": None})), folder)
    return folder


def write_llama3(folder: Path, context_length: int) -> Path:
    """A Llama 3.2 in Hugging Face's layout (grouped queries, tied, scaled RoPE), and a ranks file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_ranks(SENTENCES, 320))
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 64}
    sizes = {"vocab_size": load_tokenizer(folder).vocab_size, "context_length": context_length}
    cfg = {**SHAPE, **sizes, "n_heads": 4, "n_kv_groups": 2, "rope_freq": scaling, "tie_embeddings": True}
    save_huggingface(shake(Llama3Model(cfg)), folder)
    return folder
