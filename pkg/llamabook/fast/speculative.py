"""From the notebook ch05_quantization_speculative/09_speculative_decoding.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamabook.errors import InputError
from llamabook.fast.cache import StaticCache
from llamabook.fast.decode import Stops, borrowed_cache, forward, pad_right, prefill
from llamabook.fast.payoff import Payoff
from llamabook.fast.sampling import Sampler, draw, greedy
from llamabook.fast.statistics import Statistics


def before_first_false(stays: Tensor, counts: Tensor) -> Tensor:
    """How many of a row's first `counts` (B,) are True before one is not: (B, k) to (B,)."""
    meant = torch.arange(stays.shape[1], device=stays.device) < counts[:, None]
    return (stays & meant).long().cumprod(1).sum(1)


def accept(
    p: Tensor, drafted: Tensor, counts: Tensor, q: Tensor | None, trials: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens of each row stay, (B,), and the token after them, (B, 1): as if drawn from p.

    Leviathan et al. (2023), algorithm 1; Chen et al. (2023). Shape: p (B, k + 1, V), q (B, k, V'), V' <= V,
    float32; q None: the draft was sure of its tokens. drafted (B, k), of which a row's first counts (B,) are
    meant. trials (B, k) and last (B, 1): uniform numbers, float64.
    """
    (B, k), rows = drafted.shape, torch.arange(len(p), device=p.device)
    if not k:
        return torch.zeros_like(counts), draw(p[:, 0], last)
    of_p = p[:, :k].gather(2, drafted[..., None]).squeeze(2)  # (B, k)
    of_q = torch.ones_like(of_p) if q is None else q.gather(2, drafted[..., None]).squeeze(2)
    stays = trials * of_q < of_p  # never where p is 0
    n = before_first_false(stays, counts)
    here, at = p[rows, n], n.clamp(max=k - 1)  # (B, V), (B,)
    guess = F.one_hot(drafted[rows, at], p.shape[2]) if q is None else q[rows, at]
    excess = (here - F.pad(guess, (0, p.shape[2] - guess.shape[1]))).clamp(min=0)
    rejected = (n < counts) & (excess.sum(-1) > 0)  # rounding may leave no excess, where p is q
    return n, draw(torch.where(rejected[:, None], excess, here), last)


def accept_greedy(logits: Tensor, drafted: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`accept` at temperature 0, from logits (B, k + 1, V): a token stays where it is the likeliest."""
    best = greedy(logits.flatten(0, 1)).view(len(logits), -1)  # (B, k + 1)
    n = before_first_false(drafted == best[:, :-1], counts)
    return n, best.gather(1, n[:, None])


class ModelDraft:
    """Drafts with a smaller model that has a cache of its own, rolled back like the target's: by position.

    `unread`: how many of a row's last tokens it may not have read. Its cache may be shorter than the text.
    """

    def __init__(self, model: nn.Module, vocab: int, unread: int, cache: StaticCache, chunk: int, compiled):
        self.model, self.cache, self.unread, self.chunk, self.compiled = model, cache, unread, chunk, compiled
        self.vocab_size = min(vocab, model.cfg["vocab_size"])  # what both have
        self.limit = cache.max_tokens

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Nothing to note: it reads them in `text`."""

    def logits(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        """Of the next token, (B, V'). An id that the draft does not have is read as its last one."""
        ids = ids.clamp(max=self.model.cfg["vocab_size"] - 1)
        last = torch.full_like(ids[:, 0], ids.shape[1] - 1)
        return forward(self.model, ids, input_pos, self.cache, last, self.compiled)[:, : self.vocab_size]

    def __call__(self, text: Tensor, pos: Tensor, k: int, sampler: Sampler, uniforms: Tensor):
        """Tokens (B, k), how many a row has (B,), their probabilities (B, k, V'), None at temperature 0.

        text (B, S) is written up to pos (B, 1), the place of its last token, in each row; uniforms (B, k).
        """
        places = (pos + torch.arange(1 - self.unread, 1, device=pos.device)).clamp(0, self.limit - 1)
        for piece in places.split(max(self.chunk // len(pos), 1), dim=1):
            logits = self.logits(text.gather(1, piece), piece)
        drafted, q, self.unread = [], [], 2
        for i in range(k):
            if i:
                logits = self.logits(drafted[-1], (pos + i).clamp(max=self.limit - 1))
            if sampler.temperature == 0:
                drafted.append(logits.argmax(-1, keepdim=True))
            else:
                q.append(sampler.probs(logits).to(uniforms.device))
                drafted.append(draw(q[-1], uniforms[:, i : i + 1]).to(pos.device))
        return torch.cat(drafted, 1), torch.full_like(pos[:, 0], k), torch.stack(q, 1) if q else None


class Watch:
    """Seconds between its marks: by the clock, or by events on a GPU, where Python is ahead of the device."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", []

    def mark(self) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """To be asked when the last mark has been reached."""
        pairs = zip(self.marks, self.marks[1:])
        return [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in pairs]


def numbers(sampler: Sampler, n: int, device: torch.device) -> Tensor:
    """n uniform numbers of each row's own generator, (B, n), float64; on the CPU where a device has none."""
    drawn = [torch.rand(n, generator=generator, dtype=torch.float64) for generator in sampler.generators]
    return torch.stack(drawn).to("cpu" if device.type == "mps" else device)


def check(
    sampler: Sampler, logits: Tensor, drafted: Tensor, counts: Tensor, q: Tensor | None, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens of each row stay, and the token after them: two of (B, 1).

    logits (B, k + 1, V); uniforms (B, k + 1); the rest as of `accept`.
    """
    k, home = drafted.shape[1], uniforms.device
    if sampler.temperature == 0:
        n, token = accept_greedy(logits, drafted, counts)
    else:
        p = sampler.probs(logits.flatten(0, 1)).view(logits.shape).to(home)
        n, token = accept(p, drafted.to(home), counts.to(home), q, uniforms[:, :k], uniforms[:, k:])
    return n[:, None].to(drafted.device), token.to(drafted.device)


class Speculation:
    """Rows of text that a model writes with a draft's help: each `step` adds 1 to k + 1 tokens to each row.

    text (B, S) is written up to pos (B, 1), and the cache holds the tokens before that. Beyond the last slot
    are only places of rows that have ended: what is written there is not needed.
    """

    def __init__(
        self, model: nn.Module, draft, text: Tensor, pos: Tensor, cache: StaticCache, sampler: Sampler,
        compiled: bool = False,
    ):  # fmt: skip
        self.model, self.draft, self.text, self.pos = model, draft, text, pos
        self.cache, self.sampler, self.compiled = cache, sampler, compiled

    def places(self, first: int, last: int) -> Tensor:
        """The places pos + first to pos + last of each row, (B, last - first + 1)."""
        reach = torch.arange(first, last + 1, device=self.pos.device)
        return (self.pos + reach).clamp(max=self.text.shape[1] - 1)

    def step(self, k: int) -> tuple[list[tuple[int, list[int]]], float, float]:
        """(how many were drafted, the added tokens) of each row; seconds of the draft and of the check."""
        watch, u = Watch(self.text.device), numbers(self.sampler, 2 * k + 1, self.text.device)
        watch.mark()
        drafted, counts, q = self.text[:, :0], torch.zeros_like(self.pos[:, 0]), None
        if k:
            drafted, counts, q = self.draft(self.text, self.pos, k, self.sampler, u[:, :k])
        watch.mark()
        self.draft.unread += 0 if k else 1
        u, k = torch.cat([u[:, k : k + drafted.shape[1]], u[:, -1:]], 1), drafted.shape[1]
        tokens = torch.cat([self.text.gather(1, self.pos), drafted], 1)  # (B, k + 1)
        logits = forward(self.model, tokens, self.places(0, k), self.cache, compiled=self.compiled)
        n, token = check(self.sampler, logits, drafted, counts, q, u)
        added = torch.cat([drafted, token], 1).scatter(1, n, token)  # (B, k + 1), right up to column n
        self.text.scatter_(1, self.places(1, k + 1), added)
        self.pos = (self.pos + n + 1).clamp(max=self.text.shape[1] - 1)
        rows = torch.cat([counts[:, None], n, added], 1).tolist()  # the one time that Python waits
        watch.mark()
        return [(count, added[: n + 1]) for count, n, *added in rows], *watch.seconds()


class PromptLookup:
    """Drafts without a model: what followed the last time that the same few tokens stood in the text.

    Args: longest and shortest, how many tokens have to be the same; longer matches come first.
    Source: Saxena, "Prompt Lookup Decoding", 2023.
    """

    def __init__(self, longest: int = 3, shortest: int = 2):
        if not 1 <= shortest <= longest:
            asked = f"prompt look-up of {shortest} to {longest} tokens"
            raise InputError(f"{asked}: give 1 or more, the smaller first")
        self.sizes = range(longest, shortest - 1, -1)


class LookupDraft:
    """The texts of a `PromptLookup`, with a dictionary of what followed, so that they may be long."""

    def __init__(self, lookup: PromptLookup, prompts: Sequence[Sequence[int]]):
        self.sizes, self.unread, self.limit = lookup.sizes, 0, math.inf
        self.texts, self.after = [[] for _ in prompts], [{} for _ in prompts]
        for row, prompt in enumerate(prompts):
            self.extend(row, prompt)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Write on. The last few tokens get their entry as soon as something follows them."""
        text, after = self.texts[row], self.after[row]
        for token in tokens:
            for size in self.sizes:
                if size <= len(text):
                    after[tuple(text[-size:])] = len(text)
            text.append(token)

    def find(self, row: int, k: int) -> list[int]:
        """k tokens that may follow, or none."""
        text = self.texts[row]
        for size in self.sizes:
            start = self.after[row].get(tuple(text[-size:]))
            if start is not None:
                since = text[start:]
                return (since * (k // len(since) + 1))[:k]  # at the text's end it goes round
        return []

    def __call__(self, text: Tensor, pos: Tensor, k: int, sampler: Sampler, uniforms: Tensor):
        found = [self.find(row, k) for row in range(len(text))]
        k = max(map(len, found))
        counts = torch.tensor([len(tokens) for tokens in found], device=pos.device)
        filled = [tokens or [0] * k for tokens in found]
        return torch.tensor(filled, dtype=torch.long, device=pos.device).view(len(text), k), counts, None


@contextmanager
def drafting(
    draft, model: nn.Module, prompts: Sequence[Sequence[int]], size: int, chunk: int, compiled: bool
) -> Iterator[ModelDraft | LookupDraft]:
    """What drafts while the block lasts: a model, with a cache of at most `size` slots, or a look-up."""
    if isinstance(draft, PromptLookup):
        yield LookupDraft(draft, prompts)
        return
    with borrowed_cache(draft, len(prompts), size) as cache:
        unread = max(map(len, prompts)) + 1
        yield ModelDraft(draft, model.cfg["vocab_size"], unread, cache, chunk, compiled)


def payoff_of(draft, model: nn.Module, rows: int, compiled: bool) -> Payoff:
    """What earlier calls learned of this draft for this model and number of rows; kept with the draft."""
    known = vars(draft).setdefault("payoffs", WeakKeyDictionary()).setdefault(model, {})
    return known.setdefault((rows, compiled), Payoff())


def next_round(
    writing: Speculation, ends: list[int], left: list[int], k: int | None, payoff: Payoff,
    statistics: Statistics,
) -> list[tuple[int, list[int]]]:  # fmt: skip
    """A step of `writing`; what it says of rows that go on is noted. k None: as many as pay.

    ends: where each row will be full; left: how many tokens it is short of that, 0 if it has ended.
    """
    going = [row for row, tokens in enumerate(left) if tokens]
    wanted = min(payoff.choose(), max(left) - 1) if k is None else k
    longest = min(max(ends[row] - left[row] for row in going) + wanted, writing.text.shape[1])
    rows, *seconds = writing.step(wanted if longest <= writing.draft.limit else 0)
    drafted = max(count for count, _ in rows)
    within = [(rows[row], left[row]) for row in going]  # what goes beyond a row's end does not count
    seen = [(min(count, end), min(len(added) - 1, end)) for (count, added), end in within]
    payoff.note(drafted, *statistics.note(drafted, seen, *seconds), *seconds)
    return rows


def handed_out(
    rows: list[tuple[int, list[int]]], left: list[int], stops: Stops, drafts: ModelDraft | LookupDraft
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) of what a round has added; `left` counts down, at a stop at once to 0."""
    for row, (_, added) in enumerate(rows):
        drafts.extend(row, added)
        for token in added[: left[row]]:
            yield row, token
            left[row] = 0 if stops.ended(row, token) else left[row] - 1
            if not left[row]:
                break


def speculate_rows(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampler: Sampler, stops: Stops,
    chunk: int, compiled: bool, compiled_prefill: bool, draft, k: int | None, statistics: Statistics,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """`stream_rows` with a draft: k tokens a round, or, if None, as many as pay; each row at its own pace."""
    if not prompts or not max_new_tokens:
        return
    idx, lengths = pad_right(prompts, next(model.parameters()).device)
    B, size = len(prompts), idx.shape[1] + max_new_tokens
    ends, left = [len(prompt) + max_new_tokens for prompt in prompts], [max_new_tokens] * B
    payoff = payoff_of(draft, model, B, compiled)
    with (borrowed_cache(model, B, size) as cache,
          drafting(draft, model, prompts, size, chunk, compiled) as drafts):  # fmt: skip
        token = sampler(prefill(model, idx, lengths, cache, chunk, compiled_prefill))  # (B, 1)
        text = F.pad(idx, (0, max_new_tokens)).scatter(1, lengths[:, None], token)  # (B, S)
        writing = Speculation(model, drafts, text, lengths[:, None], cache, sampler, compiled)
        rows = [(0, [token]) for token in token.flatten().tolist()]
        while True:
            yield from handed_out(rows, left, stops, drafts)
            if not any(left):
                return
            rows = next_round(writing, ends, left, k, payoff, statistics)
