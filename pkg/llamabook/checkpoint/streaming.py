"""Checkpoints tensor by tensor, in memory that does not grow with the model; written by hand.

`each_weight` reads one of any layout, `TensorWriter` writes the safetensors files of a Hugging Face folder.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from llamabook.checkpoint import recognize
from llamabook.checkpoint.gptfast import gptfast_names, split_fused, to_half_split
from llamabook.checkpoint.huggingface import (
    INDEX,
    huggingface_names,
    index_of,
    read_tensors,
    read_weights,
    shard_names,
    write_json,
)
from llamabook.checkpoint.meta import our_tensors, read_shards
from llamabook.checkpoint.plain import plain_names
from llamabook.errors import InputError, LlamaBookError

SHARD_BYTES = 5_000_000_000  # as `save_huggingface` has it
NAMING = {"huggingface": huggingface_names, "gptfast": gptfast_names, "plain": plain_names}
DTYPES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32",
}  # fmt: skip


def each_weight(path: str | Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Our name and the tensor of every weight in `path`, one after the other; a tied head comes as the table.

    A tensor stays mapped, unless its layout wants it joined or its rows in another order: then it alone is in memory.
    Args: model, what `load_model(path, device="meta")` gives: it has checked all of it.
    """
    layout, place = recognize(path)
    tied = model.cfg.get("tie_embeddings", False)
    for ours, weight in _weights_of(layout, place, model):
        if not (tied and ours == "out_head.weight"):
            yield ours, weight
        if tied and ours == "tok_emb.weight":
            yield "out_head.weight", weight


def _weights_of(layout: str, place: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if layout == "meta":
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        yield from our_tensors(place, read_shards(place), model.cfg, shapes)
        return
    tensors = read_weights(place) if layout == "huggingface" else read_tensors(place)
    tensors = split_fused(place, tensors) if layout == "gptfast" else tensors
    for theirs, ours in NAMING[layout](model.cfg["n_layers"]).items():
        if theirs in tensors:
            weight = tensors[theirs]
            yield ours, to_half_split(ours, weight, model.cfg) if layout == "gptfast" else weight


def split_by_size(plan: dict[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """The entries of `plan`, in its order, in as many parts as `shard_bytes` a part asks for."""
    parts, size = [{}], 0
    for name, tensor in plan.items():
        if parts[-1] and size + tensor.nbytes > shard_bytes:
            parts, size = [*parts, {}], 0
        parts[-1][name], size = tensor, size + tensor.nbytes
    return parts


class TensorWriter:
    """The safetensors files of a new folder, written in pieces, in any order.

    A safetensors file says at its beginning what it holds and where: the length of that in 8 bytes, then JSON, then
    the numbers. So all tensors have their places before the first is there.
    Args: folder; plan, tensors on the meta device, by the names that they will have; shard_bytes, how large a file may
    become; metadata, words for each file's beginning. Raises InputError if shard_bytes is not above 0.
    """

    def __init__(
        self, folder: Path, plan: dict[str, Tensor], shard_bytes: int = SHARD_BYTES, metadata: dict[str, str] | None = None
    ):
        if shard_bytes < 1:
            raise InputError(f"shard_bytes is {shard_bytes}: give the size of a file in bytes")
        self.folder, self.plan, self.metadata = folder, plan, {"format": "pt"} | (metadata or {})
        parts = split_by_size(plan, shard_bytes)
        self.contents = dict(zip(shard_names(len(parts)), parts))
        self.places = {}  # name: file, and the first byte in it
        self.left = sum(tensor.nbytes for tensor in plan.values())  # bytes that are not there yet
        self.files = ExitStack()

    def __enter__(self) -> "TensorWriter":
        for name, part in self.contents.items():
            self._begin(self.files.enter_context((self.folder / name).open("wb")), part)
        return self

    def _begin(self, file, part: dict[str, Tensor]) -> None:
        """Write what stands before the numbers; the widest dtypes come first, so that none begins at an odd address."""
        header, offset = {"__metadata__": self.metadata}, 0
        for name, tensor in sorted(part.items(), key=lambda entry: -entry[1].element_size()):
            end = offset + tensor.nbytes
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in part:
            self.places[name] = file, 8 + len(text) + header[name]["data_offsets"][0]
        file.truncate(8 + len(text) + offset)

    def write(self, name: str, piece: Tensor, first: int = 0) -> None:
        """Put `piece` where row `first` of the tensor `name` begins."""
        like, (file, start) = self.plan[name], self.places[name]
        wanted = (min(len(like) - first, len(piece)), *like.shape[1:])
        if piece.dtype != like.dtype or tuple(piece.shape) != wanted:
            raise LlamaBookError(f"{name}: a piece {tuple(piece.shape)} in {piece.dtype} has no place at row {first}")
        file.seek(start + first * (like.nbytes // len(like)))
        file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy())
        self.left -= piece.nbytes

    def __exit__(self, kind, *error) -> None:
        self.files.close()
        if kind is None and self.left:
            raise LlamaBookError(f"{self.folder} is not whole: {self.left} bytes of its tensors were never written")
        if kind is None and len(self.contents) > 1:
            with (self.folder / INDEX).open("wb") as file:
                write_json(file, index_of(self.contents))
