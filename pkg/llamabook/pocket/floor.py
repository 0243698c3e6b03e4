"""The distance of a model from the floor that no model can beat, written by hand.

The world reports the log-probability of each of its texts. On the same texts, document by document,

    model loss + world log-probability        (nats per document)

is an unbiased estimate of KL(world || model) >= 0: a mean below zero by more than its error means a wrong floor.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from llamabook.generate import generate
from llamabook.pocket.world import GRAMMAR, Document
from llamabook.tokenizer import Llama2Tokenizer, Llama3Tokenizer, chat_format

LONGEST = 200  # tokens; the longest story of the world needs fewer


@dataclass(frozen=True)
class Gap:
    """Model against world on the same texts.

    gap: mean excess loss as a share of the texts' mean entropy; nats and error: the same in nats per document with
    its standard error; loss_per_token and floor_per_token: both in nats per predicted token.
    """

    gap: float
    nats: float
    error: float
    loss_per_token: float
    floor_per_token: float
    documents: int


def encode_document(document: Document, tokenizer: Llama2Tokenizer | Llama3Tokenizer) -> list[int]:
    """The token ids of a document as the pocket models see it: BOS, text, EOS; a chat in its tokenizer's chat format.

    In a chat format each answer has its own end. The chat as a whole then ends once more, as any text does: a row must
    show how many exchanges there were, since the world draws their number.
    """
    if document.kind != "chat":
        return tokenizer.encode(document.text, bos=True, eos=True)
    return [*chat_format(tokenizer).encode_dialog(document.turns, complete=True), tokenizer.eos_id]


def pad(rows: list[list[int]], multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids to inputs and targets, both (B, T): targets are one ahead, and -100 where there is nothing to predict.

    T is rounded up to a multiple: every new shape costs the CPU's matrix library a compilation.
    """
    width = -(-(max(map(len, rows)) - 1) // multiple) * multiple
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    return inputs, targets


@torch.no_grad()
def losses(model: nn.Module, rows: list[list[int]], batch_size: int = 32) -> torch.Tensor:
    """The loss of each row in nats, (rows,), float64: the sum of -log p over its predicted tokens."""
    training = model.training
    model.eval()
    result = torch.zeros(len(rows), dtype=torch.float64)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), batch_size):
        part = by_length[start : start + batch_size]
        inputs, targets = pad([rows[i] for i in part], multiple=16)
        logits = model(inputs).float()  # (B, T, V)
        nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")  # (B, T)
        result[part] = nats.sum(dim=1).double()
    model.train(training)
    return result


def gap(model: nn.Module, tokenizer: Llama2Tokenizer | Llama3Tokenizer, documents: list[Document]) -> Gap:
    """Measure a model against the floor on these documents (held-out ones, or the answer means nothing)."""
    rows = [encode_document(d, tokenizer) for d in documents]
    entropy = torch.tensor([-d.log_prob for d in documents], dtype=torch.float64)
    loss = losses(model, rows)
    excess = loss - entropy
    tokens = sum(len(row) - 1 for row in rows)
    return Gap(
        gap=float(excess.mean() / entropy.mean()),
        nats=float(excess.mean()),
        error=float(excess.std() / math.sqrt(len(documents))),
        loss_per_token=float(loss.sum() / tokens),
        floor_per_token=float(entropy.sum() / tokens),
        documents=len(documents),
    )


def sample_stories(
    model: nn.Module, tokenizer: Llama2Tokenizer | Llama3Tokenizer, count: int, seed: int = 0
) -> list[str]:
    """What the model tells from BOS alone at temperature 1, until it has told `count` stories.

    Texts of the other kinds are left out by what they come closest to: a chat by its tag, facts and questions because
    they follow their rule of the grammar further than the story's. A text that follows none counts as a story, and
    so does one that is still going on after LONGEST tokens.
    """
    told = _told(model, tokenizer, torch.Generator().manual_seed(seed), batch_size=min(50, 2 * count))
    return list(islice(told, count))


def _told(
    model: nn.Module, tokenizer: Llama2Tokenizer | Llama3Tokenizer, generator: torch.Generator, batch_size: int
) -> Iterator[str]:
    begin = torch.full((batch_size, 1), tokenizer.bos_id)
    while True:
        rows = generate(
            model, begin, LONGEST, LONGEST, temperature=1.0, eos_id=tokenizer.eos_id, generator=generator
        )  # (batch_size, T)
        for row in rows.tolist():
            ids = row[1:]
            text = tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)
            reach = {kind: GRAMMAR.furthest(text, kind) for kind in ("story", "facts", "questions")}
            if not text.startswith(("[INST]", "<|start_header_id|>")) and reach["story"] == max(reach.values()):
                yield text


def share_parsed(stories: list[str]) -> float:
    """The share of texts that the grammar derives as stories."""
    return sum(bool(GRAMMAR.parse(text, "story", limit=1)) for text in stories) / len(stories)
