"""GPTQ for a whole checkpoint, one block at a time, written by hand; `gptq.py` quantizes a matrix, and is taught.

Each matrix is calibrated with the inputs that it will see: those which come out of what was quantized before it. So the
rows of calibration go through the model in step with the work, block by block.

- In memory there is one block, in float32, the Hessian of one linear, and a batch of the rows.
- What the rows have become between two blocks is in a file that is mapped: it counts as cache of the disk, not as
  memory. It has the checkpoint's own dtype, bfloat16 for one in 16 bits, as the model itself computes.
- Each finished block is kept in a folder beside the new one, `.NAME.gptq`, until all is done. After a kill the same
  command goes on behind the last of them.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llamabook.checkpoint import recognize
from llamabook.checkpoint.convert import check_space
from llamabook.checkpoint.huggingface import PARTS, read_safetensors
from llamabook.checkpoint.streaming import each_weight
from llamabook.errors import CheckpointError, ContextError, InputError
from llamabook.fast.quantize.files import blocks_of, writing
from llamabook.fast.quantize.gptq import Hessian, check_settings, gptq
from llamabook.fast.quantize.weight import Quantized, Scheme
from llamabook.files import replacing, why_unreadable
from llamabook.llama2 import RMSNorm, TransformerBlock, rope_tables
from llamabook.llama3 import GroupedQueryAttentionFast

ROWS, DOCUMENTS = 128, 512  # what to calibrate with unless told: rows of a text or of tasks, documents of the farm
BATCH = 2048  # tokens that go through a block at once


# ---- what to calibrate with


def calibration_ids(
    tokenizer, *, file: str | Path | None = None, tasks: Sequence[str] | None = None, limit: int | None = None,
    seq_length: int = 2048,
) -> list[list[int]]:  # fmt: skip
    """Rows of token ids to calibrate with, each BOS and at most seq_length - 1 tokens more.

    They come from the text in `file` (UTF-8), from questions and answers of `tasks` of the lm-evaluation-harness, or, with
    neither, from the farm's training texts, a document a row. What is longer is cut, and gives several rows.
    Args: limit, how many rows at most, None for 128, or for 512 documents of the farm. Raises InputError.
    """
    if file is not None and tasks:
        raise InputError("a file and tasks: calibrate with one of them")
    for name, value, least in (("limit", limit, 1), ("seq_length", seq_length, 2)):
        if value is not None and (type(value) is not int or value < least):
            raise InputError(f"the calibration's {name} is {value!r}: give a whole number from {least} up")
    count = limit or (DOCUMENTS if file is None and not tasks else ROWS)
    if file is not None:
        texts = [text_in(Path(file), 16 * count * seq_length)]
    else:
        texts = texts_of(tasks) if tasks else None
    rows = farm_rows(tokenizer) if texts is None else (tokenizer.encode(text, bos=True) for text in texts)
    cut = ([row[0], *row[start : start + seq_length - 1]] for row in rows for start in range(1, len(row), seq_length - 1))
    found = list(islice(cut, count))
    if not found:
        raise InputError("there is no text to calibrate with: give another file, or other tasks")
    return found


def text_in(file: Path, characters: int) -> str:
    """The beginning of a text. Raises InputError if there is none."""
    if problem := why_unreadable(file):
        raise InputError(f"{file} {problem.replace('download it again', 'give a text')}")
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(characters)
    except UnicodeDecodeError:
        text = ""
    if "\0" in text or not text.strip():
        raise InputError(f"{file} holds no text in UTF-8: give one to calibrate with")
    return text


def texts_of(tasks: Sequence[str]) -> Iterator[str]:
    """The texts of tasks, from what there is to learn from, else from what is asked. Raises InputError."""
    from llamabook.evaluate.harness import load_tasks, quiet  # a higher row, asked for this alone; it needs lm-eval

    for task in load_tasks(tasks)["tasks"].values():
        with quiet():
            kinds = (task.has_training_docs, task.training_docs), (task.has_validation_docs, task.validation_docs)
            documents = next((documents for has, documents in kinds if has()), task.test_docs)()
        for document in documents:
            yield answered(task, document)


def answered(task, document: dict) -> str:
    """A question of a task with its right answer."""
    question, answer = task.doc_to_text(document), task.doc_to_target(document)
    choices = task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else []
    if isinstance(question, int):  # the choices are beginnings, and all end alike
        question = choices[question]
    elif isinstance(answer, int) and choices:
        answer = choices[answer]
    answer = answer[0] if isinstance(answer, list) and answer else answer  # of several, all of them right
    return f"{question}{task.config.target_delimiter}{answer}".strip()


def farm_rows(tokenizer) -> Iterator[list[int]]:
    """The farm's training texts, as the pocket models have seen them, without end."""
    from llamabook.pocket.floor import encode_document  # a higher row, asked for this alone
    from llamabook.pocket.world import texts

    return (encode_document(document, tokenizer) for document in texts("train"))


def check_rows(rows: Iterable[Sequence[int]], cfg: dict) -> list[list[int]]:
    """The rows, the longest first. Raises InputError or ContextError for what the model can't read."""
    rows = sorted(map(list, rows), key=len, reverse=True)
    if not rows or not rows[-1]:
        raise InputError("a row to calibrate with is empty, or there is none: give ids of one token or more")
    if len(rows[0]) > cfg["context_length"]:
        what = f"a row to calibrate with has {len(rows[0])} tokens, the model's context {cfg['context_length']}"
        raise ContextError(f"{what}: make them with that seq_length")
    for token in {token for row in rows for token in row}:
        if type(token) is not int or not 0 <= token < cfg["vocab_size"]:
            what = f"a row to calibrate with has the id {token!r}, the model has {cfg['vocab_size']}"
            raise InputError(f"{what}: is it the model's tokenizer?")
    return rows


# ---- the rows between two blocks


def batches_of(lengths: list[int]) -> Iterator[tuple[slice, list[int]]]:
    """Where the next rows of about BATCH tokens stand, of rows one behind the other, and their lengths."""
    first, start = 0, 0
    while first < len(lengths):
        some = lengths[first : first + max(BATCH // lengths[first], 1)]
        yield slice(start, start + sum(some)), some
        first, start = first + len(some), start + sum(some)


class Stream:
    """What the rows have become between two blocks: x (tokens, D), row behind row, in a mapped file.

    Args: file, which is made if it is not there; lengths, of the rows; width D; dtype.
    """

    def __init__(self, file: Path, lengths: list[int], width: int, dtype: torch.dtype):
        self.file, self.lengths, size = file, lengths, sum(lengths) * width
        self.x = torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(-1, width)

    def through(self, function: Callable[[Tensor], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """What `function` makes of each batch, float32 (B, T, D) to (B, T, width), as (tokens, width), and its place in x.

        Short rows are filled up to T. Attention looks back, so that changes nothing, and what comes of it is left out.
        """
        for place, lengths in batches_of(self.lengths):
            rows = pad_sequence(self.x[place].float().split(lengths), batch_first=True)
            yield place, torch.cat([row[:length] for row, length in zip(function(rows), lengths)])


# ---- one block


HALVES = (  # of a block: norm, part, the linears that begin the part, the one that ends it
    ("norm1", "att", ("W_query", "W_key", "W_value"), "out_proj"),
    ("norm2", "ff", ("fc1", "fc2"), "fc3"),
)
PASSES = 6  # of all rows through a block's halves


def build_block(weights: dict[str, Tensor], cfg: dict) -> TransformerBlock:
    """A block with these weights, by their names in it, in float32 and with fused attention."""
    with torch.device("meta"):
        block = TransformerBlock({**cfg, "dtype": torch.float32}, GroupedQueryAttentionFast)
    block.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return block.requires_grad_(False)


class Rounder:
    """Quantizes linears with the inputs that they are given.

    Args: scheme and settings, as of `gptq`; tables, cos and sin (T, d) of the positions; tick, called for each batch.
    """

    def __init__(self, scheme: Scheme, settings: dict, tables: tuple[Tensor, Tensor], tick: Callable[[], object]):
        self.scheme, self.settings, self.tables, self.tick = scheme, settings, tables, tick

    def weights(self, weights: list[Tensor], stream: Stream, function: Callable[[Tensor], Tensor]) -> list[Quantized]:
        """Matrices that are multiplied with one input, which is what `function` makes of the stream."""
        hessian = Hessian(weights[0].shape[1])
        for _, x in stream.through(function):
            hessian.add(x)
            self.tick()
        whole = gptq(torch.cat(weights) if weights[1:] else weights[0], hessian.matrix(), self.scheme, **self.settings)
        ends = [sum(map(len, weights[:count])) for count in range(len(weights) + 1)]
        return [whole.rows(start, end) for start, end in zip(ends, ends[1:])]

    def linears(self, linears: dict[str, nn.Linear], stream: Stream, function: Callable) -> dict[str, Quantized]:
        """The same for linears by name; they go on with what their codes stand for."""
        found = self.weights([linear.weight for linear in linears.values()], stream, function)
        for linear, quantized in zip(linears.values(), found):
            linear.weight = nn.Parameter(quantized.dequantize(), requires_grad=False)
        return dict(zip(linears, found))

    def block(self, block: TransformerBlock, stream: Stream, out: Stream) -> dict[str, Quantized]:
        """All matrices of a block, by their names in it; `out` becomes what the quantized block makes of `stream`."""
        done = {}
        for name, part, begin, end in HALVES:
            norm, half = getattr(block, name), getattr(block, part)
            last, first = getattr(half, end), {name: getattr(half, name) for name in begin}
            setattr(half, end, nn.Identity())  # now `half` gives what its last linear is to be given

            def inside(x: Tensor) -> Tensor:
                positions = (None, *(table[: x.shape[1]] for table in self.tables)) if part == "att" else ()
                return half(norm(x), *positions)

            found = self.linears(first, stream, norm) | self.linears({end: last}, stream, inside)
            done |= {f"{part}.{name}.weight": quantized for name, quantized in found.items()}
            for place, x in stream.through(lambda x: x + last(inside(x))):
                out.x[place] = x.to(out.x.dtype)
                self.tick()
            stream = out
        return done


# ---- what is kept until all is done


def kind_of(src: Path, scheme: Scheme, settings: dict, rows: list[list[int]]) -> str:
    """A hash of all that a run depends on: the files of the checkpoint by name, size and time, settings, rows."""
    _, place = recognize(src)
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    states = [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    said = [str(place.resolve()), states, repr(scheme), sorted(settings.items()), rows]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class Kept:
    """The folder of finished blocks: block-000.safetensors and so on, and the stream behind the last of them.

    Args: folder; kind, of `kind_of`: a folder of another kind is emptied.
    """

    def __init__(self, folder: Path, kind: str):
        self.folder, note = folder, folder / "kind"
        if not (note.exists() and note.read_text() == kind):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with replacing(note) as file:
                file.write(kind.encode())

    def block(self, number: int) -> Path:
        return self.folder / f"block-{number:03}.safetensors"

    def stream(self, number: int) -> Path:
        """What goes into a block."""
        return self.folder / f"stream-{number:03}"

    def done(self) -> int:
        """How many blocks are finished."""
        return next(number for number in count() if not self.block(number).exists())

    def finish(self, number: int, found: dict[str, Quantized], out: Stream | None = None) -> None:
        """Keep a block; `out` goes into the next one."""
        if out is not None:
            out.file.replace(self.stream(number + 1))
        tensors = {f"{name}:{key}": tensor.clone() for name, q in found.items() for key, tensor in parts_of(q).items()}
        with replacing(self.block(number)) as file:
            save_file(tensors, file.name)
        self.stream(number).unlink()

    def matrices(self, scheme: Scheme, widths: dict[str, int]) -> Iterator[tuple[str, Quantized]]:
        """All matrices of all finished blocks by our names; `widths` has their K."""
        for number in range(self.done()):
            tensors = read_safetensors(self.block(number))
            for name in dict.fromkeys(name.partition(":")[0] for name in tensors):
                words, scales, zeros = (tensors.get(f"{name}:{key}") for key in ("words", "scales", "zeros"))
                K = widths[name]
                yield name, Quantized(words, scales, zeros, scheme.bits, scheme.groupsize or K, K)


def parts_of(weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a quantized matrix by name."""
    parts = {"words": weight.words, "scales": weight.scales, "zeros": weight.zeros}
    return {name: tensor for name, tensor in parts.items() if tensor is not None}


# ---- the whole checkpoint


def blocks_in(src: Path, model: nn.Module, rest: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The weights of each block in turn, by their names in it. What belongs to none is put into `rest`: the table first."""
    number = 0
    for ours, weight in each_weight(src, model):
        rest[ours] = weight
        names = {part: f"trf_blocks.{number}.{part}.weight" for part in PARTS.values()}
        if all(name in rest for name in names.values()):
            yield {f"{part}.weight": rest.pop(name) for part, name in names.items()}
            number += 1


def check_finite(src: Path, weights: dict[str, Tensor]) -> None:
    """Raises CheckpointError, which names the weight, where one has infinite numbers or NaN."""
    for name, weight in weights.items():
        if not weight.abs().amax().isfinite():
            raise CheckpointError(f"{src}: {name} has infinite numbers or NaN: give a sound checkpoint")


@torch.no_grad()
def quantize_all(
    src: Path, model: nn.Module, rows: list[list[int]], scheme: Scheme, settings: dict, kept: Kept
) -> None:  # fmt: skip
    """Quantize all blocks, and the head as if it were one more, into `kept`."""
    cfg, rest, lengths, done = model.cfg, {}, [len(row) for row in rows], kept.done()
    layers, tables = cfg["n_layers"], rope_tables(torch.arange(lengths[0]), model.frequencies("cpu"))

    def stream(file: Path) -> Stream:
        return Stream(file, lengths, cfg["emb_dim"], cfg["dtype"])

    batches = len(list(batches_of(lengths)))
    begun, total = batches * PASSES * done, batches * (PASSES * layers + 1)
    with tqdm(total=total, initial=min(begun, total), unit="batch", leave=False, disable=None) as bar:
        rounder = Rounder(scheme, settings, tables, bar.update)
        for number, weights in enumerate(blocks_in(src, model, rest)):
            if number < done:
                continue
            bar.set_description(f"block {number + 1} of {layers}")
            check_finite(src, {f"trf_blocks.{number}.{name}": weight for name, weight in weights.items()})
            if number == 0:
                embed(rest["tok_emb.weight"], rows, stream(kept.stream(0)))
            out = stream(kept.folder / "stream.part")
            found = rounder.block(build_block(weights, cfg), stream(kept.stream(number)), out)
            kept.finish(number, {f"trf_blocks.{number}.{name}": matrix for name, matrix in found.items()}, out)
        if done <= layers:
            bar.set_description("head")
            check_finite(src, {"out_head.weight": rest["out_head.weight"]})
            norm = RMSNorm(cfg["emb_dim"], cfg.get("norm_eps", 1e-5))
            norm.weight = nn.Parameter(rest["final_norm.weight"].float())
            (head,) = rounder.weights([rest["out_head.weight"]], stream(kept.stream(layers)), norm)
            kept.finish(layers, {"out_head.weight": head})


def embed(table: Tensor, rows: list[list[int]], out: Stream) -> None:
    """Make `out` what goes into the first block."""
    ids = torch.tensor([token for row in rows for token in row])
    for place, _ in batches_of(out.lengths):
        out.x[place] = table[ids[place]].to(out.x.dtype)


def quantize_gptq(
    src: str | Path, dst: str | Path, scheme: Scheme, rows: Iterable[Sequence[int]], *,
    percdamp: float = 0.01, blocksize: int = 128, act_order: bool = False, force: bool = False,
) -> Path:  # fmt: skip
    """Write the checkpoint in `src`, whatever `load_model` reads, quantized by GPTQ as a folder `dst`, and return `dst`.

    Args: rows to calibrate with, as of `calibration_ids`; percdamp, blocksize and act_order as of `gptq`; force, whether a
    checkpoint that is in `dst` already may be replaced.
    The same call after a kill goes on at the block where it was. `dst` appears when it is whole; the tokenizer goes along.
    Raises InputError for an impossible request, CheckpointError for a bad checkpoint.
    """
    src, dst, settings = Path(src), Path(dst), {"percdamp": percdamp, "blocksize": blocksize, "act_order": bool(act_order)}
    check_settings(percdamp, blocksize)
    with writing(src, dst, scheme, method="gptq", force=force) as (model, out):
        rows = check_rows(rows, model.cfg)
        kept = Kept(dst.parent / f".{dst.name}.gptq", kind_of(src, scheme, settings, rows))
        tokens, layers = sum(map(len, rows)), model.cfg["n_layers"]
        check_space(2 * (out.nbytes() + tokens * model.cfg["emb_dim"] * model.cfg["dtype"].itemsize), [], dst)
        if tokens < model.cfg["hidden_dim"]:
            what = f"{tokens} tokens to calibrate with, and inputs of {model.cfg['hidden_dim']} numbers"
            print(f"llamabook: {what}: with more it becomes better", file=sys.stderr)
        if kept.done():
            print(f"llamabook: going on behind {min(kept.done(), layers)} of {layers} blocks", file=sys.stderr)
        quantize_all(src, model, rows, scheme, settings, kept)
        widths = {name: weight.shape[-1] for name, weight in model.state_dict().items()}
        for ours, matrix in kept.matrices(scheme, widths):
            out.put(ours, matrix)
        for ours, weight in each_weight(src, model):
            for first, part in blocks_of(weight) if ours not in out.matrices else ():
                out.put(ours, part.to(out.dtype), first)
    shutil.rmtree(kept.folder)
    return dst
