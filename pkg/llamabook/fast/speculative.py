"""Speculative decoding: a draft proposes tokens, the model checks several at a time. To be the page's."""

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


def accept(
    p: Tensor, drafted: Tensor, counts: Tensor, q: Tensor | None, trials: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens of each row stay, (B,), and the token after them, (B, 1): together as if drawn from p.

    A token x stays with probability min(1, p(x) / q(x)); at the first that does not, one is drawn from what p has
    more than q; behind the last, from p (Leviathan et al., 2023, algorithm 1; Chen et al., 2023).
    Shape: p (B, k + 1, V) and q (B, k, V'), V' <= V, float32; q None: the draft was sure of its tokens.
    drafted (B, k), of which a row's first counts (B,) are meant; trials (B, k) and last (B, 1), from 0 to below 1, float64.
    """
    B, k = drafted.shape
    rows = torch.arange(B, device=p.device)
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


def before_first_false(stays: Tensor, counts: Tensor) -> Tensor:
    """How many of a row's first `counts` (B,) are True before one is not: (B, k) to (B,)."""
    meant = torch.arange(stays.shape[1], device=stays.device) < counts[:, None]
    return (stays & meant).long().cumprod(1).sum(1)


class ModelDraft:
    """Drafts with a smaller model that has a cache of its own, rolled back like the target's: by position.

    `unread` is how many tokens of each row it may not have read yet. It reads two where one would do, so that its
    calls keep their shape.
    """

    def __init__(self, model: nn.Module, vocab_size: int, unread: int, cache: StaticCache, chunk: int, compiled: bool):
        self.model, self.unread, self.cache, self.chunk, self.compiled = model, unread, cache, chunk, compiled
        self.vocab_size = min(vocab_size, model.cfg["vocab_size"])  # what both have
        self.limit = cache.max_tokens  # the least of the text's length and the draft's context

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Nothing to note: it reads them in `text`."""

    def logits(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        """Of the next token, (B, V'). An id that the draft does not have is read as its last one."""
        ids = ids.clamp(max=self.model.cfg["vocab_size"] - 1)
        last = torch.full_like(ids[:, 0], ids.shape[1] - 1) if ids.shape[1] > 2 else None
        logits = forward(self.model, ids, input_pos, self.cache, last, self.compiled)
        return (logits if last is not None else logits[:, -1])[:, : self.vocab_size]

    def __call__(self, text: Tensor, pos: Tensor, k: int, sampler: Sampler, uniforms: Tensor):
        """Tokens (B, k), how many of them a row has (B,), and their probabilities (B, k, V'), or None at temperature 0.

        text (B, S) is written up to pos (B, 1), the place of its last token, in each row; uniforms (B, k).
        """
        places = (pos + torch.arange(1 - self.unread, 1, device=pos.device)).clamp(0, self.limit - 1)  # (B, unread)
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


class PromptLookup:
    """Drafts without a model: what followed the last time that the same few tokens stood in the text (Saxena, 2023).

    Args: longest and shortest, how many tokens have to be the same; longer matches come first.
    """

    def __init__(self, longest: int = 3, shortest: int = 2):
        if not 1 <= shortest <= longest:
            raise InputError(f"prompt look-up of {shortest} to {longest} tokens: give 1 or more, the smaller first")
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


class Watch:
    """Seconds between its marks: by the clock, or by events on a GPU, which works on while Python waits for nothing."""

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


class Speculation:
    """Rows of text that a model writes with the help of a draft: each `step` adds 1 to k + 1 tokens to each row.

    text (B, S) is written up to pos (B, 1); the cache holds the tokens before that. What was rejected is forgotten
    by setting `pos`: the next tokens take its slots. What goes beyond the last slot is not needed by anyone.
    """

    def __init__(self, model: nn.Module, draft, text: Tensor, pos: Tensor, cache: StaticCache, sampler: Sampler,
                 compiled: bool = False):  # fmt: skip
        self.model, self.draft, self.text, self.pos = model, draft, text, pos
        self.cache, self.sampler, self.compiled = cache, sampler, compiled
        home = "cpu" if text.device.type == "mps" else text.device  # where there is float64 to draw with
        self.uniforms = lambda n: torch.stack(
            [torch.rand(n, generator=generator, dtype=torch.float64) for generator in sampler.generators]).to(home)  # fmt: skip

    def places(self, first: int, last: int) -> Tensor:
        """The places pos + first to pos + last of each row, (B, last - first + 1), none beyond the last slot."""
        reach = torch.arange(first, last + 1, device=self.pos.device)
        return (self.pos + reach).clamp(max=self.text.shape[1] - 1)

    def step(self, wanted: int) -> tuple[list[tuple[int, list[int]]], float, float]:
        """(tokens that were drafted, tokens that were added) of each row, seconds of the draft, of the check."""
        watch, uniforms = Watch(self.text.device), self.uniforms(2 * wanted + 1)
        watch.mark()
        if wanted:
            drafted, counts, q = self.draft(self.text, self.pos, wanted, self.sampler, uniforms[:, :wanted])
        else:
            drafted, counts, q = self.text[:, :0], torch.zeros_like(self.pos[:, 0]), None
        watch.mark()
        k, tokens = drafted.shape[1], torch.cat([self.text.gather(1, self.pos), drafted], 1)  # (B, k + 1)
        logits = forward(self.model, tokens, self.places(0, k), self.cache, compiled=self.compiled)
        n, token = self.accept(logits, drafted, counts, q, uniforms[:, wanted : wanted + k], uniforms[:, -1:])
        added = torch.cat([drafted, token], 1).scatter(1, n, token)  # (B, k + 1), right up to column n
        self.text.scatter_(1, self.places(1, k + 1), added)
        self.pos = (self.pos + n + 1).clamp(max=self.text.shape[1] - 1)
        self.draft.unread += 0 if wanted else 1
        rows = torch.cat([counts[:, None], n, added], 1).tolist()  # the one time that Python waits for the device
        watch.mark()
        return [(count, added[: n + 1]) for count, n, *added in rows], *watch.seconds()

    def accept(self, logits: Tensor, drafted: Tensor, counts: Tensor, q: Tensor | None, trials: Tensor, last: Tensor):
        """How many drafted tokens of each row stay, and the token after them: two of (B, 1)."""
        if self.sampler.temperature == 0:
            n, token = accept_greedy(logits, drafted, counts)
        else:
            p, home = self.sampler.probs(logits.flatten(0, 1)), last.device
            n, token = accept(p.view(logits.shape).to(home), drafted.to(home), counts.to(home), q, trials, last)
        return n[:, None].to(drafted.device), token.to(drafted.device)


@contextmanager
def drafting(draft, model: nn.Module, prompts: Sequence[Sequence[int]], size: int, chunk: int, compiled: bool):
    """What proposes tokens while the block lasts: a `ModelDraft`, with a cache of `size` slots, or a `LookupDraft`."""
    if isinstance(draft, PromptLookup):
        yield LookupDraft(draft, prompts)
        return
    with borrowed_cache(draft, len(prompts), size) as cache:
        longest = max(map(len, prompts))
        yield ModelDraft(draft, model.cfg["vocab_size"], longest + 1, cache, chunk, compiled)


def payoff_of(draft, model: nn.Module, rows: int, compiled: bool) -> Payoff:
    """What earlier calls have learned of this draft for this model and number of rows, kept with the draft."""
    known = vars(draft).setdefault("payoffs", WeakKeyDictionary()).setdefault(model, {})
    return known.setdefault((rows, compiled), Payoff())


def speculate_rows(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampler: Sampler, stops: Stops, chunk: int,
    compiled: bool, compiled_prefill: bool, draft, k: int | None, statistics: Statistics,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """`stream_rows` with a draft: k tokens a round, or, if None, as many as pay. Rows go on at a pace of their own."""
    if not prompts or not max_new_tokens:
        return
    idx, lengths = pad_right(prompts, next(model.parameters()).device)
    size, left = idx.shape[1] + max_new_tokens, [max_new_tokens] * len(prompts)
    payoff = payoff_of(draft, model, len(prompts), compiled)
    with (borrowed_cache(model, len(prompts), size) as cache,
          drafting(draft, model, prompts, size, chunk, compiled) as drafter):  # fmt: skip
        token = sampler(prefill(model, idx, lengths, cache, chunk, compiled_prefill))  # (B, 1)
        text = F.pad(idx, (0, max_new_tokens)).scatter(1, lengths[:, None], token)  # (B, S)
        writing = Speculation(model, drafter, text, lengths[:, None], cache, sampler, compiled)
        rows = [(0, [token]) for token in token.flatten().tolist()]
        while True:
            for row, (_, added) in enumerate(rows):
                drafter.extend(row, added)
                for token in added[: left[row]]:
                    yield row, token
                    left[row] = 0 if stops.ended(row, token) else left[row] - 1
                    if not left[row]:
                        break
            if not any(left):
                return
            going = [row for row in range(len(left)) if left[row]]
            wanted = min(payoff.choose(), max(left) - 1) if k is None else k
            longest = max(len(prompts[row]) + max_new_tokens - left[row] for row in going)
            rows, *seconds = writing.step(wanted if longest + wanted <= drafter.limit else 0)
            drafted = max(count for count, _ in rows)
            round_ = [(rows[row][0], len(rows[row][1]) - 1) for row in going]
            payoff.note(drafted, *statistics.note(drafted, round_, *seconds), *seconds)
