"""`llamabook quantize`, written by hand: a checkpoint in 8 or 4 bits a weight, and what that saves."""

import os
from pathlib import Path

from llamabook.cli.speak import embedded
from llamabook.errors import InputError

MODES = ("int8", "int4", "int4-gptq")
CALIBRATION = ("calibration_tasks", "calibration_limit", "calibration_seq_length", "calibration_file")
GPTQ = (*CALIBRATION, "percdamp", "blocksize", "act_order")


def shrink(
    *,
    checkpoint_path: Path | None,
    mode: str,
    groupsize: int,
    asymmetric: bool,
    output: Path | None,
    force: bool,
    given: dict,
) -> None:
    """Quantize a checkpoint and say what was written; `given` are the flags that were set, by name."""
    if mode not in MODES:
        raise InputError(f"--mode is {mode!r}: give {', '.join(MODES[:-1])} or {MODES[-1]}")
    refuse(given, ("groupsize", "asymmetric") if mode == "int8" else (), "int4 and int4-gptq")
    refuse(given, () if mode == "int4-gptq" else GPTQ, "int4-gptq")
    if given.get("calibration_file") and given.get("calibration_tasks"):
        raise InputError("--calibration_file and --calibration_tasks: give one of them")

    from llamabook import pocket
    from llamabook.fast.quantize.weight import Scheme

    scheme = Scheme(8) if mode == "int8" else Scheme(4, groupsize, asymmetric)
    src = pocket.path(embedded()) if checkpoint_path is None else checkpoint_path
    dst = output or beside(src, str(scheme).replace("int4", mode), is_embedded=checkpoint_path is None)
    if mode == "int4-gptq":
        calibrated(src, dst, scheme, given, force)
    else:
        from llamabook.fast.quantize.files import quantize

        quantize(src, dst, scheme, force=force)
    tell(src, dst)


def refuse(given: dict, names: tuple[str, ...], modes: str) -> None:
    """Raise InputError for a flag that was set and belongs to other modes."""
    for name in names:
        if name in given:
            raise InputError(f"--{name} belongs to --mode {modes}: leave it out")


def beside(src: Path, ending: str, is_embedded: bool) -> Path:
    """The folder NAME-ENDING beside the checkpoint, or in the current folder where nothing can be written beside it."""
    alone = src.is_file() and src.suffix in (".pth", ".pt") and src.name != "model.pth" and "consolidated" not in src.name
    whole = (src if src.is_dir() else src.parent).resolve()
    name, parent = (src.stem, whole) if alone else (whole.name, whole.parent)
    return Path("" if is_embedded or not os.access(parent, os.W_OK) else parent) / f"{name}-{ending}"


def calibrated(src: Path, dst: Path, scheme, given: dict, force: bool) -> None:
    """Quantize by GPTQ, on texts from a file, from tasks or from the farm."""
    from llamabook.fast.quantize.calibrate import calibration_ids, quantize_gptq
    from llamabook.tokenizer import load_tokenizer, tokenizer_folder

    names = dict(zip(CALIBRATION, ("tasks", "limit", "seq_length", "file")))
    texts = calibration_ids(
        load_tokenizer(tokenizer_folder(src)), **{names[name]: given[name] for name in CALIBRATION if name in given}
    )
    settings = {name: given[name] for name in GPTQ if name in given and name not in CALIBRATION}
    quantize_gptq(src, dst, scheme, texts, force=force, **settings)


def tell(src: Path, dst: Path) -> None:
    """Say what was written, how much smaller it is, and what comes next."""
    from llamabook.checkpoint import load_model
    from llamabook.fast.quantize.files import bits_per_weight, read_quantized

    files = sorted(dst.iterdir())
    before = sum(weight.nbytes for weight in load_model(src, device="meta").parameters())
    after = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    stored = read_quantized(dst)
    print(f"Written to {dst}: {', '.join(file.name for file in files)}")
    print(
        f"{stored.kind}: {before / 1e6:,.1f} MB of weights before, {after / 1e6:,.1f} MB now; "
        f"{bits_per_weight(stored):.2f} bits for each quantized weight"
    )
    print(f"Next: python -m llamabook generate --checkpoint_path {dst}")
