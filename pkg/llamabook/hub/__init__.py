"""Downloads: a repository of Hugging Face, or one file from the web. Written by hand.

    from llamabook.hub import download

    download("TinyLlama/TinyLlama-1.1B-Chat-v1.0")                # to checkpoints/TinyLlama/TinyLlama-1.1B-Chat-v1.0
    download("https://example.org/model.pth", sha256="9f86d0...")  # to model.pth

Nothing takes its final name before it is whole and checked, so a path that exists is complete. Whatever stops a
download, a kill included, the same call goes on where it stopped.
"""

from collections.abc import Iterable
from pathlib import Path

from llamabook.errors import InputError
from llamabook.hub.repository import carry_out, default_folder, plan
from llamabook.hub.source import Repository, parse
from llamabook.hub.web import fetch

__all__ = ["Repository", "download", "fetch", "parse"]


def download(
    source: str,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    include: Iterable[str] = (),
    sha256: str | None = None,
    force: bool = False,
) -> Path:
    """Fetch `source`, the name ORG/NAME of a Hugging Face repository or a web address, and return where it is.

    Args: output, the folder of a repository (default checkpoints/ORG/NAME) or the file or folder for an address
    (default: its own name, here); revision, a branch, tag or commit of a repository; include, patterns of the
    files to take from it instead of `repository.choose`; sha256, what a file's bytes must hash to; force, replace
    files that exist with other contents. Raises DownloadError or InputError, in one line.
    """
    wanted, include = parse(source, revision), tuple(include)
    if isinstance(wanted, Repository):
        if sha256 is not None:
            raise InputError("--sha256 goes with the address of one file: a repository brings its own")
        folder = default_folder(wanted) if output is None else Path(output)
        return carry_out(plan(wanted, include), folder, force=force)
    if include or revision is not None:
        raise InputError("--include and --revision go with a repository, and this is the address of one file")
    target = wanted.target(output)
    return fetch(wanted.url, target, sha256=sha256, force=force, explain=wanted.explain, login=wanted.login)
