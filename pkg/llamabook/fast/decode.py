"""From the notebook ch04_kv_cache_and_compile/03_torch_compile.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llamabook.errors import InputError
from llamabook.fast.cache import StaticCache
from llamabook.fast.kernels.build import cache_folder
from llamabook.fast.sampling import Sampler


def keep_compiled() -> None:
    """Let torch.compile keep its work in the user's cache folder, or where TORCHINDUCTOR_CACHE_DIR says."""
    folder = cache_folder().with_name("torch_compile")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # then among temporary files
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compile_model(model: nn.Module, whole: bool | None = None) -> None:
    """Let `forward` run the model compiled. The first call with each kind of shape compiles: some seconds.

    The graph of one block serves all layers and any number of tokens. Args: whole, whether steps of one
    token a row get a graph of all layers instead; None: on a GPU, where it is recorded once and replayed.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    way = "whole" if whole or (whole is None and on_gpu) else "blocks"
    if getattr(model, "compiled_as", None) in (way, "refused"):
        return
    keep_compiled()
    model._compiled_call_impl = None  # it may have been compiled whole before
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=True)
    if way == "whole":
        settings = {"mode": "reduce-overhead", "dynamic": False} if on_gpu else {"dynamic": True}
        model.compile(fullgraph=True, **settings)
    model.compiled_as = way


@contextmanager
def compiler(on: bool) -> Iterator[None]:
    """Within this block what `compile_model` has prepared runs compiled, or, if not `on`, as it is written.

    No two sizes count as one because they happen to be equal, and one process may compile many models.
    """
    if not on:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    from torch._dynamo import config
    from torch.fx.experimental import _config as shapes

    before = config.recompile_limit, shapes.use_duck_shape
    config.recompile_limit, shapes.use_duck_shape = 64, False
    try:
        yield
    finally:
        config.recompile_limit, shapes.use_duck_shape = before


def refuse(model: nn.Module, error: Exception) -> None:
    """Say in one line why `model` runs as it is written from now on."""
    reason = " ".join(str(getattr(error, "inner_exception", error)).split())[:160]
    print(f"llamabook: torch.compile does not work here, going on without it ({reason})", file=sys.stderr)
    model.compiled_as = "refused"


def forward(
    model: nn.Module, idx: Tensor, input_pos: Tensor, cache: StaticCache, last: Tensor | None = None,
    compiled: bool = False,
) -> Tensor:  # fmt: skip
    """The model's logits, without gradients; `compiled`, after `compile_model`, where that works."""
    way = getattr(model, "compiled_as", "refused") if compiled else "refused"
    call = model.forward if way == "whole" and idx.shape[1] > 1 else model  # prefill goes block by block
    with torch.no_grad():
        if way == "refused":
            with compiler(False):
                return call(idx, input_pos, cache, last)
        from torch._dynamo.exc import ShortenTraceback

        try:
            with compiler(True):
                return call(idx, input_pos, cache, last)
        except ShortenTraceback as error:  # the compiler's, not the model's
            refuse(model, error)
    return forward(model, idx, input_pos, cache, last)


def pad_right(
    prompts: Sequence[Sequence[int]], device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of one length, filled up with their last token, and their true lengths: (B, T) and (B,), long."""
    longest = max(map(len, prompts))
    rows = [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return torch.tensor(rows, device=device), lengths


def prefill(
    model: nn.Module, idx: Tensor, lengths: Tensor, cache: StaticCache, chunk: int = 512,
    compiled: bool = False,
) -> Tensor:  # fmt: skip
    """Read prompts (B, T), padded on the right, into the cache; the logits (B, V) after each row's end.

    At most `chunk` tokens go through the model at once, all rows counted, so its memory does not grow with T.
    What a pad leaves in the cache stands behind its row's end, where the row's own tokens will stand.
    """
    B, T = idx.shape
    width, logits = max(chunk // B, 1), None
    for start in range(0, T, width):
        end = min(start + width, T)
        input_pos = torch.arange(start, end, device=idx.device).expand(B, -1)  # (B, T'), T' = end - start
        last = (lengths - 1 - start).clamp(0, end - start - 1)  # (B,), right where the row ends in this chunk
        new = forward(model, idx[:, start:end], input_pos, cache.first(end), last, compiled)  # (B, V)
        goes_on = (lengths > start)[:, None]  # the row ends here or later, where `new` is replaced
        logits = new if logits is None else torch.where(goes_on, new, logits)
    return logits


class Stops:
    """Says when a row has ended: at a stop token, or where its new text has come to hold a stop string.

    Args: stop, ids and strings; prompts, the text before; tokenizer, needed for strings.
    Raises InputError for an empty string, and for strings without a tokenizer.
    """

    def __init__(self, stop: Iterable[int | str], prompts: Sequence[Sequence[int]], tokenizer=None):
        stop = [stop] if isinstance(stop, (int, str)) else list(stop)
        self.texts = [entry for entry in stop if isinstance(entry, str)]
        self.ids = {int(entry) for entry in stop if not isinstance(entry, str)}
        if "" in self.texts:
            raise InputError(f"stop is {stop!r}: an empty string would end every text, leave it out")
        if self.texts and tokenizer is None:
            raise InputError(f"stop is {stop!r}: strings are looked for in text, so give tokenizer=..., too")
        self.longest = max(map(len, self.texts), default=0)
        self.tails = [""] * len(prompts)  # of each row's new text, what a stop string may have begun with
        self.streamers = [tokenizer.streamer() for _ in prompts] if self.texts else []
        for streamer, prompt in zip(self.streamers, prompts):
            for token in prompt:
                streamer.push(token)

    def ended(self, row: int, token: int) -> bool:
        """Whether `token` is the last of `row`; to be asked for each new token, in order."""
        if token in self.ids or not self.texts:
            return token in self.ids
        text = self.tails[row] + self.streamers[row].push(token)
        self.tails[row] = text[max(len(text) - self.longest + 1, 0) :]
        return any(stop in text for stop in self.texts)


@contextmanager
def borrowed_cache(model: nn.Module, rows: int, tokens: int) -> Iterator[StaticCache]:
    """A cache for `rows` rows of `tokens` tokens, or a few more, while the block lasts.

    A recorded graph is bound to addresses. So on a GPU sizes are powers of two, and a cache waits for the
    next call that wants one of its size; no two calls ever have the same at the same time.
    """
    device = next(model.parameters()).device
    recorded = device.type == "cuda" and getattr(model, "compiled_as", None) == "whole"
    size = 2 ** (tokens - 1).bit_length() if recorded else -(-tokens // 8) * 8
    size = min(size, model.cfg["context_length"])
    cache = model.__dict__.pop("spare_cache", None)
    if cache is None or (len(cache.keys[0]), cache.max_tokens) != (rows, size):
        cache = StaticCache(model.cfg, rows, size, device)
    if recorded:
        for tensor in (*cache.keys, *cache.values):
            torch._dynamo.mark_static_address(tensor)
    try:
        yield cache
    finally:
        if recorded:
            model.spare_cache = cache


def stream_rows(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampler: Sampler, stops: Stops,
    chunk: int = 512, compiled: bool = False, compiled_prefill: bool = False,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Yield (row, token) as each is drawn, until every row has `max_new_tokens` or has been stopped."""
    if not prompts or not max_new_tokens:
        return
    idx, lengths = pad_right(prompts, next(model.parameters()).device)
    with borrowed_cache(model, len(prompts), idx.shape[1] + max_new_tokens - 1) as cache:
        logits = prefill(model, idx, lengths, cache, chunk, compiled_prefill)
        input_pos, going = lengths[:, None].clone(), set(range(len(prompts)))  # (B, 1), of the next tokens
        for left in reversed(range(max_new_tokens)):
            tokens = sampler(logits)  # (B, 1)
            for row, token in enumerate(tokens.flatten().tolist()):
                if row in going:
                    yield row, token
                    if stops.ended(row, token):
                        going.remove(row)
            if not left or not going:  # nothing follows the last tokens: they need no forward
                return
            logits = forward(model, tokens, input_pos, cache, compiled=compiled)[:, -1]  # (B, V)
            input_pos = input_pos + 1
