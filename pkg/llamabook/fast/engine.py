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
from llamabook.fast.speculative import PromptLookup, Statistics, speculate_rows
from llamabook.tokenizer import has_tokenizer, load_tokenizer, tokenizer_folder

__all__ = ["generate", "load", "load_draft", "stream", "weight_bytes"]


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
    model, tokenizer = load_weights(path, dtype, device, activations), load_tokenizer(tokenizer_folder(path))
    if tokenizer.vocab_size > model.cfg["vocab_size"]:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model {model.cfg['vocab_size']}, "
            "so they do not belong together: put the model's own tokenizer beside it"
        )
    model.tokenizer = tokenizer  # what stop strings are looked for with
    return model, tokenizer


def load_draft(
    path: str | Path,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    activations: str = "rounded",
) -> Transformer:
    """A checkpoint as `draft` of another model, whose tokenizer speaks for both; arguments and errors as of `load`.

    It needs no tokenizer of its own. If it has one, `generate` compares the two. It may have fewer tokens than the
    model, or more: those that only one of them has are never drafted.
    """
    path = Path(path)
    model = load_weights(path, dtype, device, activations)
    if has_tokenizer(tokenizer_folder(path)):
        model.tokenizer = load_tokenizer(tokenizer_folder(path))
    return model


def load_weights(path: Path, dtype: torch.dtype | None, device: torch.device | str, activations: str) -> Transformer:
    """The model of `load`, without a tokenizer."""
    if activations not in ("rounded", "exact"):
        raise InputError(f"activations is {activations!r}: give 'rounded' or 'exact'")
    if recognize(path)[0].startswith("quantized"):
        return load_engine(read_quantized(path), device, dtype, exact=activations == "exact")
    return from_llama(load_model(path), device=device, dtype=dtype)


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
    draft: nn.Module | PromptLookup | None = None,
    speculate_k: int | None = None,
    statistics: Statistics | None = None,
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
    - draft: a smaller model, the same one in fewer bits, or a `PromptLookup`, that drafts tokens which the model then
      checks several at a time: the same text at temperature 0, else the same distribution. speculate_k: how many a
      round; None: as many as pay by what the run measures, or none (then the text drawn for a seed depends on the
      machine's pace). statistics: a `Statistics` to which this call adds what it did.
    - chunk: how many tokens of the prompts go through the model at once, all rows counted.
    - on_token: called with (row, token) as soon as a token is drawn.

    Raises ContextError, before any work, if a prompt and max_new_tokens are more than the context length; InputError.
    """
    prompts = list(prompts)
    rows: list[list[int]] = [[] for _ in prompts]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "stop": stop, "seed": seed}
    options |= {"compile": compile, "compile_prefill": compile_prefill, "chunk": chunk, "tokenizer": tokenizer}
    options |= {"draft": draft, "speculate_k": speculate_k, "statistics": statistics}
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
    draft: nn.Module | PromptLookup | None = None,
    speculate_k: int | None = None,
    statistics: Statistics | None = None,
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
    if draft is not None:
        check_draft(draft, model, prompts, max_new_tokens, speculate_k)
    elif speculate_k is not None or statistics is not None:
        raise InputError("speculate_k and statistics are of a draft, and this is without a draft: give draft=..., too")
    for each in (model, draft):
        if (compile or compile_prefill) and isinstance(each, nn.Module):
            compile_model(each, {"blocks": False, "whole": True}.get(compile))
    loop = (model, prompts, max_new_tokens, sampler, stops, chunk, bool(compile), compile_prefill)
    if draft is None:
        return stream_rows(*loop)
    statistics = Statistics() if statistics is None else statistics
    statistics.target_bytes = weight_bytes(model)
    statistics.draft_bytes = weight_bytes(draft) if isinstance(draft, nn.Module) else 0
    return speculate_rows(*loop, draft, speculate_k, statistics)


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


def check_draft(draft, model: nn.Module, prompts: list[list[int]], max_new_tokens: int, k: int | None) -> None:
    """Raises InputError for a draft that can't speak for `model`, ContextError for one that can't read so far."""
    if k is not None:
        check_count("speculate_k", k, 1)
    if isinstance(draft, PromptLookup):
        return
    if not isinstance(draft, Transformer):
        raise InputError(f"draft is {type(draft).__name__}: give a model from fast.load, or a PromptLookup")
    ours, theirs = next(model.parameters()).device, next(draft.parameters()).device
    if ours != theirs:
        raise InputError(f"the draft is on {theirs} and the model on {ours}: load both to one device")
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if longest > draft.cfg["context_length"]:
        asked = f"the longest row has {longest} tokens with its new ones"
        raise ContextError(f"{asked}, the draft's context length is {draft.cfg['context_length']}: ask for fewer, or leave the draft out")
    check_same_tokens(getattr(model, "tokenizer", None), getattr(draft, "tokenizer", None))


def check_same_tokens(ours, theirs) -> None:
    """Raises InputError unless both tokenizers, where known, give a sample the same ids."""
    if ours is None or theirs is None:
        return
    sample = "The llama's name is Ada; she eats 12 apples, doesn't she?\n"
    if ours.encode(sample) != theirs.encode(sample):
        raise InputError("the draft's tokenizer gives other ids than the model's: take a draft of the same family")


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
