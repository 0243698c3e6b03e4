"""`llamabook download`, written by hand: bring a repository or a file here, ready to run if asked."""

import os
import sys
from pathlib import Path

from llamabook.errors import InputError


def bring(
    *,
    source: str,
    output: Path | None,
    convert: bool,
    revision: str | None,
    include: tuple[str, ...],
    sha256: str | None,
    force: bool,
) -> None:
    """Download `source`, and with `convert` make it a folder that runs. The path goes to stdout, all else to stderr."""
    from llamabook.hub import Repository, download, parse
    from llamabook.hub.repository import carry_out, default_folder, plan

    wanted = parse(source, revision)
    try:
        if not isinstance(wanted, Repository):
            if convert:
                raise InputError("--convert takes a repository ORG/NAME: `convert` does it for files that are here")
            print(download(source, output, revision=revision, include=include, sha256=sha256, force=force))
            return
        if sha256 is not None:
            raise InputError("--sha256 goes with the address of one file: a repository brings its own")
        folder = default_folder(wanted) if output is None else output
        if convert:
            make_runnable(wanted, folder, include, force)
        else:
            carry_out(plan(wanted, include), folder, force=force, say=tell)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from here.", file=sys.stderr)
        raise
    print(folder)
    if convert:
        tell(f"Next: python -m llamabook generate --checkpoint_path {folder}")


def tell(text: str) -> None:
    """Say what is going on."""
    print(text, file=sys.stderr, flush=True)


def make_runnable(repository, folder: Path, include: tuple[str, ...], force: bool) -> None:
    """Bring `repository` to `folder` as safetensors with configuration and tokenizer, whatever format it has.

    Files in another format are kept in NAME-original beside it, from where they are converted.
    """
    from llamabook.checkpoint import check_config
    from llamabook.hub.repository import carry_out, plan

    wanted = plan(repository, include)
    if wanted.is_canonical:
        carry_out(wanted, folder, force=force, say=tell, check=check_config)
    else:
        original = folder.with_name(folder.name + "-original")
        if folder.is_dir() and not original.exists() and has_all(folder, wanted):
            os.rename(folder, original)  # downloaded before, without --convert
        if folder.exists() and not force:
            tell(f"{folder} is there already; --force converts again.")
        else:
            from llamabook.checkpoint.convert import convert

            carry_out(wanted, original, force=force, say=tell, check=check_config)
            tell(f"Converting {original} to {folder}")
            convert(original, folder, force=force)
            tell(f"The files as published stay in {original}; nothing needs them any more.")
    check_runnable(folder)


def has_all(folder: Path, wanted) -> bool:
    """Whether `folder` looks like the download that `wanted` plans: all files, and their sizes."""
    paths = [(folder / file.path, file.size) for file in wanted.files]
    return all(path.is_file() and size in (None, path.stat().st_size) for path, size in paths)


def check_runnable(folder: Path) -> None:
    """Raise the error that `generate` would, if configuration or tokenizer can't be read."""
    from llamabook.checkpoint import load_config
    from llamabook.tokenizer import load_tokenizer

    load_config(folder)
    load_tokenizer(folder)
