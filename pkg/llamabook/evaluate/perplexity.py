"""How probable a model finds given tokens: log-likelihoods, and perplexity with a sliding window. Written by hand.

Both need the probability of known tokens only. So no logits are computed but at the positions before these tokens,
a piece at a time, and a long row goes through the static cache in chunks: memory grows neither with the vocabulary
times the text nor with the text.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import index
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from llamabook.errors import ContextError, InputError
from llamabook.fast.cache import StaticCache
from llamabook.fast.decode import borrowed_cache, compile_model, compiler, pad_right, refuse
from llamabook.fast.engine import check_count

USUAL_WINDOW = 2048  # tokens; longer contexts are read only if asked for
LOGITS_AT_ONCE = 2**25  # numbers: 128 MB in float32

Request = tuple[Sequence[int], Sequence[int]]  # context, which is read, and continuation, which is scored


# ---- the log-likelihood of continuations ---------------------------------------------------------------------------


def log_likelihoods(
    model: nn.Module, requests: Sequence[Request], *, batch_size: int = 16, chunk: int = 2048, compile: bool = False
) -> list[tuple[float, bool]]:
    """For each (context ids, continuation ids): the sum of log p of the continuation, and whether greedy decoding
    gives it.

    The model is a `fast.model.Transformer`. Rows are sorted by length, so that few pads are read; `chunk` is how many
    tokens go through the model at once, all rows counted. log p is a float32 log_softmax, summed in float64.
    Raises InputError for an empty context or continuation, ContextError for a row longer than the context length.
    """
    check_count("batch_size", batch_size, 1)
    check_count("chunk", chunk, 1)
    rows = [check_request(request, number, model.cfg) for number, request in enumerate(requests)]
    if compile:
        compile_model(model)
    longest_first = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
    results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    with tqdm(total=len(rows), desc="scoring", leave=False, disable=None) as bar:
        for start in range(0, len(rows), batch_size):
            part = longest_first[start : start + batch_size]
            for i, (log_probs, likeliest) in zip(part, score(model, [rows[i] for i in part], chunk, compile)):
                results[i] = float(log_probs.double().sum()), bool(likeliest.all())
            bar.update(len(part))
    return results


def score(model: nn.Module, rows: list[Request], chunk: int, compiled: bool = False) -> list[tuple[Tensor, Tensor]]:
    """For each of a batch of (context, continuation), token by token of the continuation: log p, (K,) float32, and
    whether it is the likeliest token, (K,) bool.
    """
    device = next(model.parameters()).device
    whole = [[*context, *continuation] for context, continuation in rows]
    idx, lengths = pad_right([row[:-1] for row in whole], device)  # (B, T), (B,)
    targets, _ = pad_right([row[1:] for row in whole], device)  # (B, T): what follows each position
    counts = torch.tensor([len(continuation) for _, continuation in rows], device=device)  # (B,)
    B, T = idx.shape
    places = torch.arange(T, device=device)
    scored = (places >= (lengths - counts)[:, None]) & (places < lengths[:, None])  # (B, T)
    log_probs, likeliest = torch.zeros(B, T, device=device), torch.zeros(B, T, dtype=torch.bool, device=device)
    width = max(chunk // B, 1)
    with borrowed_cache(model, B, T) as cache:
        for start in range(0, T, width):
            end = min(start + width, T)
            input_pos, now = places[start:end].expand(B, -1), scored[:, start:end]  # (B, T') and (B, T')
            x = hidden(model, idx[:, start:end], input_pos, cache.first(end), compiled)  # (B, T', D)
            found = judge(model, x[now], targets[:, start:end][now])
            log_probs[:, start:end][now], likeliest[:, start:end][now] = found
    ends = zip(lengths.tolist(), counts.tolist())
    return [(log_probs[i, n - k : n].cpu(), likeliest[i, n - k : n].cpu()) for i, (n, k) in enumerate(ends)]


def judge(model: nn.Module, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each target, float32, and whether it is the likeliest: from the last block's output (N, D), two of (N,)."""
    piece = max(LOGITS_AT_ONCE // model.cfg["vocab_size"], 1)
    log_probs, likeliest = [], []
    with torch.no_grad():
        for part, target in zip(x.split(piece), targets.split(piece)):
            logits = model.head(model.norm(part)).float()  # (N', V)
            log_probs.append(F.log_softmax(logits, dim=-1).gather(1, target[:, None])[:, 0])
            likeliest.append(logits.argmax(dim=-1) == target)
    return torch.cat(log_probs), torch.cat(likeliest)


def hidden(model: nn.Module, idx: Tensor, input_pos: Tensor, cache: StaticCache, compiled: bool) -> Tensor:
    """`model.hidden` without gradients; `compiled`, after `compile_model`, block by block where that works."""
    compiled = compiled and getattr(model, "compiled_as", "refused") != "refused"
    with torch.no_grad(), compiler(compiled):
        if not compiled:
            return model.hidden(idx, input_pos, cache)
        from torch._dynamo.exc import ShortenTraceback

        try:
            return model.hidden(idx, input_pos, cache)
        except ShortenTraceback as error:  # the compiler's, not the model's
            refuse(model, error)
    return hidden(model, idx, input_pos, cache, False)


def check_request(request: Request, number: int, cfg: dict) -> Request:
    """The request as two lists of ints. Raises InputError or ContextError if the model can't score it."""
    context, continuation = (check_ids(part, f"request {number}", cfg["vocab_size"]) for part in request)
    if not context:
        raise InputError(f"request {number} has no context: begin with BOS, since nothing comes from nothing")
    if not continuation:
        raise InputError(f"request {number} has no continuation: give one token or more to score")
    if len(context) + len(continuation) - 1 > cfg["context_length"]:  # the last token is scored and never read
        raise ContextError(
            f"request {number} has {len(context) + len(continuation)} tokens, the context length is "
            f"{cfg['context_length']}: shorten its context"
        )
    return context, continuation


def check_ids(ids: Sequence[int], what: str, vocab_size: int) -> list[int]:
    """The ids as a list of ints. Raises InputError if they are no ids of the vocabulary."""
    try:
        ids = [index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise InputError(f"{what} is {str(ids)[:40]!r}: give a list of token ids") from None
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise InputError(f"{what} has the id {wrong}, the model has {vocab_size}: is it the model's tokenizer?")
    return ids


# ---- perplexity ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Perplexity:
    """The loss of a text: nats in all, over so many scored tokens, in so many windows; bytes, of the text, if known."""

    nats: float
    tokens: int
    window: int
    stride: int
    windows: int
    bytes: int | None = None

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens would be as hard to guess."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def nats_per_byte(self) -> float | None:
        return self.nats / self.bytes if self.bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        """The only number here that compares models with different tokenizers."""
        return self.nats_per_byte / math.log(2) if self.bytes else None


def windows(tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, end): the model reads tokens start to end - 2, and tokens first to end - 1 are scored.

    Every token but the first of the text is scored once. A window reads at most `window` tokens; the first scores all
    it can, each other `stride` tokens, with at least window - stride + 1 before the first of them.
    """
    end = min(window + 1, tokens)
    yield 0, 1, end
    while end < tokens:
        first, end = end, min(end + stride, tokens)
        yield max(end - 1 - window, 0), first, end


def perplexity(
    model: nn.Module,
    ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    chunk: int = 2048,
    compile: bool = False,
) -> Perplexity:
    """The loss of `ids`, read through a window that slides over them, `batch_size` windows side by side.

    - The first id is never scored, since nothing stands before it. Begin with BOS, and all of the text is scored. No
      other window has a BOS: what came before is cut off, as it is in most published numbers.
    - window: how many tokens the model reads at once; None: the context length, at most 2048.
    - stride: how far a window moves; None: half a window. A small one gives each token more context, and costs
      window / stride times the reading.
    Raises InputError for fewer than two ids or a stride that leaves tokens out, ContextError for too wide a window.
    """
    ids, cfg = check_ids(ids, "the text", model.cfg["vocab_size"]), model.cfg
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens with BOS: a loss needs one to read and one to score")
    window, stride = check_window(window, stride, cfg["context_length"])
    check_count("batch_size", batch_size, 1)
    check_count("chunk", chunk, 1)
    if compile:
        compile_model(model)
    slides, nats, count = windows(len(ids), window, stride), 0.0, 0
    with tqdm(total=len(ids) - 1, desc="tokens", leave=False, disable=None) as bar:
        while batch := list(islice(slides, batch_size)):
            rows = [(ids[start:first], ids[first:end]) for start, first, end in batch]
            for log_probs, _ in score(model, rows, chunk, compile):
                nats -= float(log_probs.double().sum())
                bar.update(len(log_probs))
            count += len(batch)
    return Perplexity(nats, len(ids) - 1, window, stride, count)


def perplexity_of_text(model: nn.Module, tokenizer, text: str, **options) -> Perplexity:
    """The loss of a text, from its first token on, which follows BOS; per byte of its UTF-8, too. No EOS is scored.

    Options as of `perplexity`. Raises InputError for an empty text.
    """
    if not text:
        raise InputError("the text is empty: there is nothing to score")
    found = perplexity(model, tokenizer.encode(text, bos=True), **options)
    return replace(found, bytes=len(text.encode()))


def perplexity_of_file(model: nn.Module, tokenizer, path: str | Path, **options) -> Perplexity:
    """`perplexity_of_text` of a UTF-8 file, byte for byte. Raises InputError if it has no text."""
    return perplexity_of_text(model, tokenizer, read_text(Path(path)), **options)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, line ends as they are. Raises InputError if it can't be read, is empty or no text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): check the path") from None
    if not data:
        raise InputError(f"{path} is empty: there is nothing to score")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}): name a text file, or convert it") from None


def check_window(window: int | None, stride: int | None, context_length: int) -> tuple[int, int]:
    """Both as numbers that fit. Raises ContextError or InputError if they don't."""
    if window is None:
        window = min(context_length, USUAL_WINDOW)
    check_count("window", window, 1)
    if window > context_length:
        raise ContextError(f"window is {window}, the context length is {context_length}: give that or less")
    if stride is None:
        stride = max(window // 2, 1)
    check_count("stride", stride, 1)
    if stride > window:
        raise InputError(f"stride is {stride}, more than the window of {window}: tokens between would never be read")
    return window, stride
