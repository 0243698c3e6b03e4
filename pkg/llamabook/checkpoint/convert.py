"""A checkpoint of one layout from one of another, whole or not at all. Written by hand."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from llamabook.checkpoint import load_model, recognize
from llamabook.checkpoint.gptfast import save_gptfast
from llamabook.checkpoint.huggingface import read_object, save_huggingface
from llamabook.checkpoint.llama3_meta import save_llama3_meta
from llamabook.errors import InputError, LlamaBookError
from llamabook.tokenizer import load_tokenizer

LAYOUTS = ("huggingface", "meta", "gptfast")
COMPANIONS = (  # files that go where the weights go
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "inflated_from")  # what config.json says beside the shape
CARD = "README.md"  # what people read first
ENDINGS = {".json", ".safetensors", ".bin", ".pth", ".pt", ".model", ".jinja"}  # what --force may replace, beside it


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str = "huggingface",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write the checkpoint in `src`, whatever `load_model` reads, as a folder `dst`, and return `dst`.

    Args: layout, one of LAYOUTS; dtype, None for the checkpoint's own; force, whether a checkpoint that is
    in `dst` already may be replaced. The tokenizer goes along. Everything is written beside `dst` and renamed
    at the end, so an interrupted call leaves `dst` as it was.
    Quantized weights become what they stand for, but for gpt-fast's in Hugging Face's layout: they stay as they are.
    Raises InputError for an impossible request, CheckpointError for a bad checkpoint.
    """
    src, dst = Path(src), Path(dst)
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}: choose one of {', '.join(LAYOUTS)}")
    with whole(src, dst, force) as part:
        companions = companions_of(src)
        if layout == "huggingface" and recognize(src)[0] == "quantized_gptfast":
            rewrite_quantized(src, dst, part, dtype, companions)
        else:
            model = load_model(src, dtype=dtype)
            check_space(sum(weight.nbytes for weight in model.parameters()), companions, dst)
            write(model, part, layout, token_ids(src, companions))
        for file in companions:
            shutil.copyfile(file, part / file.name)
    return dst


@contextmanager
def whole(src: Path | None, dst: Path, force: bool) -> Iterator[Path]:
    """Where a folder is to be written that takes the name `dst` when the block ends, and vanishes if it raises.

    Args: src, what it is made from, if that is on disk; force, whether a checkpoint in `dst` may be replaced.
    Raises InputError unless `dst` is free, or may be replaced.
    """
    part, old = (dst.parent / f".{dst.name}.{ending}" for ending in ("part", "old"))
    restore(dst, part, old)
    check_target(src, dst, force)
    try:
        yield part
        if dst.exists():
            dst.rename(old)
        part.rename(dst)
    finally:
        restore(dst, part, old)


def rewrite_quantized(src: Path, dst: Path, part: Path, dtype: torch.dtype | None, companions: list[Path]) -> None:
    """Write the codes of a checkpoint that gpt-fast has quantized into `part`, in our own form of them."""
    from llamabook.fast.quantize import files  # a higher row, asked for this kind of files alone

    stored = files.read_quantized(src)
    out = files.writer_of(stored, part, dtype, token_ids(src, companions))
    check_space(out.nbytes(), companions, dst)
    files.copy_stored(stored, out)


def write(model: nn.Module, folder: Path, layout: str, metadata: dict) -> None:
    """Save `model` into `folder`; `metadata` are more keys for its config.json."""
    folder.mkdir(parents=True)
    if layout == "meta":
        save_llama3_meta(model, folder)
    elif layout == "gptfast":
        save_gptfast(model, folder, metadata=metadata)
    else:
        save_huggingface(model, folder, metadata=metadata)


def restore(dst: Path, part: Path, old: Path) -> None:
    """Remove what a conversion leaves beside `dst`, and give `dst` back what it held if nothing took its place."""
    shutil.rmtree(part, ignore_errors=True)
    if old.exists() and not dst.exists():
        old.rename(dst)
    shutil.rmtree(old, ignore_errors=True)


def check_target(src: Path | None, dst: Path, force: bool) -> None:
    """Raises InputError unless `dst` is free, or may be replaced because it holds a checkpoint and nothing else."""
    there = dst.resolve()
    if dst.name in ("", "..") or (src and there in (src.resolve(), *src.resolve().parents)):
        raise InputError(f"{dst} holds {src} itself: give another folder to write")
    if not dst.exists():
        return
    if not dst.is_dir():
        raise InputError(f"{dst} is a file: give a folder to write")
    inside = sorted(dst.iterdir())
    foreign = [path.name for path in inside if path.is_dir() or (path.suffix not in ENDINGS and path.name != CARD)]
    known = any((dst / name).exists() for name in ("config.json", "params.json"))
    if inside and (foreign or not known):
        name = (foreign or [inside[0].name])[0]
        raise InputError(f"{dst} holds {name}, which is no part of a checkpoint: give another folder")
    if inside and not force:
        raise InputError(f"{dst} holds a checkpoint already: give another folder, or --force to replace it")


def check_space(nbytes: int, companions: list[Path], dst: Path) -> None:
    """Raises InputError if the disk of `dst` has too little room for `nbytes` of weights and what goes along."""
    needed = nbytes + sum(file.stat().st_size for file in companions) + 2**20  # headers, indices, JSON
    disk = next(path for path in dst.resolve().parents if path.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        what = f"{dst} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free"
        raise InputError(f"{what}: free some, or write to another disk")


def companions_of(src: Path) -> list[Path]:
    """The tokenizer and its kin that belong to the checkpoint in `src`."""
    layout, place = recognize(src)
    folder = place if place.is_dir() else place.parent
    found = [folder / name for name in COMPANIONS if (folder / name).is_file()]
    if not any(path.name in COMPANIONS[:2] for path in found):
        # Llama 3's repositories keep Meta's files in original/, Llama 2's downloads the tokenizer one folder up
        further = [folder / "original"] + ([folder.parent] if layout == "meta" else [])
        found += [path / "tokenizer.model" for path in further if (path / "tokenizer.model").is_file()][:1]
    return found


def token_ids(src: Path, companions: list[Path]) -> dict:
    """The ids that begin and end a text: what a config.json in `src` says, else what the tokenizer says.

    A config.json may also say what its model was inflated from, and then that goes along.
    """
    config = (src if src.is_dir() else src.parent) / "config.json"
    if config.exists():
        return {key: value for key, value in read_object(config).items() if key in KEPT}
    tokenizers = [path for path in companions if path.name in COMPANIONS[:2]]
    try:
        tokenizer = load_tokenizer(tokenizers[0])
    except (IndexError, LlamaBookError):
        return {}  # it goes along as it is, and whoever uses it will see
    stops = sorted(tokenizer.stop_tokens)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops if stops[1:] else stops[0]}
