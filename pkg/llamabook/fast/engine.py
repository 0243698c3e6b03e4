"""The engine's three functions: load a checkpoint, generate from it, stream from it. Written by hand.

They put together what chapters 4 and 5 build: `model.py` computes, `decode.py` runs the loop, `sampling.py` draws.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from pathlib import Path

import torch
from torch import nn

from llamabook.checkpoint import load_model, recognize
from llamabook.errors import CheckpointError, ContextError, InputError
from llamabook.fast.decode import Stops, compile_model, stream_rows
from llamabook.fast.model import Transformer, from_llama
from llamabook.fast.quantize.files import load_engine, read_quantized
from llamabook.fast.sampling import Sampler
from llamabook.tokenizer import load_tokenizer, tokenizer_folder

__all__ = ["generate", "load", "stream", "weight_bytes"]


def load(
    path: str | Path,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    activations: str = "rounded",
) -> tuple[Transformer, object]:
    """The model of a checkpoint, ready to generate, and its tokenizer.

    `path` is as for `llamabook.checkpoint.load_model`, with the tokenizer's file beside the weights. dtype=None keeps
    the weights' own. A quantized checkpoint stays so: dtype is that of the rest, and the model's `quantization` says what
    it is, as "int4.g32". activations: "rounded" lets a CPU round what its codes are multiplied with to 8 bits, where it
    multiplies such numbers fastest; "exact" does not. Raises CheckpointError, TokenizerError or InputError.
    """
    path = Path(path)
    if activations not in ("rounded", "exact"):
        raise InputError(f"activations is {activations!r}: give 'rounded' or 'exact'")
    if recognize(path)[0].startswith("quantized"):
        model = load_engine(read_quantized(path), device, dtype, exact=activations == "exact")
    else:
        model = from_llama(load_model(path), device=device, dtype=dtype)
    tokenizer = load_tokenizer(tokenizer_folder(path))
    if tokenizer.vocab_size > model.cfg["vocab_size"]:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model {model.cfg['vocab_size']}, "
            "so they do not belong together: put the model's own tokenizer beside it"
        )
    model.tokenizer = tokenizer  # what stop strings are looked for with
    return model, tokenizer


def weight_bytes(model: Transformer) -> int:
    """What a step reads of the model's weights: blocks, norms and head as they lie in memory; of a table that is not the
    head it takes but a few rows.
    """
    tensors = [t for part in (model.blocks, model.norm, model.head) for t in (*part.parameters(), *part.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | str | Iterable[int | str] = (),
    seed: int | None = None,
    compile: bool | str = False,
    compile_prefill: bool = False,
    chunk: int = 512,
    tokenizer=None,
    on_token: Callable[[int, int], object] | None = None,
) -> list[list[int]]:
    """The new tokens of each row, for prompts of any lengths, each a list of token ids.

    - temperature 0 takes the likeliest token; else each row draws by a generator of its own, row r with the seed
      `seed` + r, so that it gives the same text alone as in a batch; temperature, then top_k, top_p, min_p.
    - stop: ids and strings that end a row, which keeps the token that ended it. Strings need `tokenizer`; a model
      from `load` brings its own.
    - compile: run the decoding steps through torch.compile, compile_prefill: the reading of the prompts, too. True
      takes what starts soonest on the device: one block for all layers on a CPU ("blocks"), all of it on a GPU
      ("whole"). Where there is no compiler, a line says so, and all runs as it is written.
    - chunk: how many tokens of the prompts go through the model at once, all rows counted.
    - on_token: called with (row, token) as soon as a token is drawn.

    Raises ContextError, before any work, if a prompt and max_new_tokens are more than the context length; InputError.
    """
    prompts = list(prompts)
    rows: list[list[int]] = [[] for _ in prompts]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "stop": stop, "seed": seed}
    options |= {"compile": compile, "compile_prefill": compile_prefill, "chunk": chunk, "tokenizer": tokenizer}
    for row, token in stream(model, prompts, max_new_tokens, **options):
        rows[row].append(token)
        if on_token is not None:
            on_token(row, token)
    return rows


def stream(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop: int | str | Iterable[int | str] = (),
    seed: int | None = None,
    compile: bool | str = False,
    compile_prefill: bool = False,
    chunk: int = 512,
    tokenizer=None,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token) as soon as each is drawn; arguments and errors as of `generate`.

    What can't be done is refused here, not at the first token. Leaving the loop early is fine.
    """
    prompts = [check_prompt(prompt, row, model.cfg["vocab_size"]) for row, prompt in enumerate(prompts)]
    check_count("max_new_tokens", max_new_tokens, 0)
    check_count("chunk", chunk, 1)
    check_room(prompts, max_new_tokens, model.cfg["context_length"])
    if compile not in (False, True, "blocks", "whole"):
        raise InputError(f"compile is {compile!r}: give False, True, 'blocks' or 'whole'")
    sampler = Sampler(len(prompts), temperature, top_k, top_p, min_p, seed)
    stops = Stops(stop, prompts, tokenizer or getattr(model, "tokenizer", None))
    if compile or compile_prefill:
        compile_model(model, {"blocks": False, "whole": True}.get(compile))
    return stream_rows(model, prompts, max_new_tokens, sampler, stops, chunk, bool(compile), compile_prefill)


def check_prompt(prompt: Sequence[int], row: int, vocab_size: int) -> list[int]:
    """The prompt as a list of ints. Raises InputError if it is not one or more ids of the vocabulary."""
    try:
        ids = [index(token) for token in (prompt.tolist() if hasattr(prompt, "tolist") else prompt)]
    except TypeError:
        ids = []
    if not ids:
        raise InputError(f"prompt {row} is {str(prompt)[:40]!r}: give a list of token ids, one or more, for each row")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(f"prompt {row} has the id {token}, the model has {vocab_size}: is it the model's tokenizer?")
    return ids


def check_count(name: str, value: int, least: int) -> None:
    """Raises InputError unless `value` is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise InputError(f"{name} is {value!r}: give a whole number from {least} up")


def check_room(prompts: list[list[int]], max_new_tokens: int, context_length: int) -> None:
    """Raises ContextError for a row whose prompt and new tokens do not fit in the context."""
    for row, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > context_length:
            asked = f"prompt {row} has {len(prompt)} tokens and {max_new_tokens} more are asked for"
            raise ContextError(f"{asked}, the context length is {context_length}: ask for fewer or shorten it")
