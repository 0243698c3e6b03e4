"""A repository of Hugging Face as a folder that appears when it is whole. Written by hand.

The package huggingface_hub knows the repository: its commit, its files with sizes and hashes, and who we are. The
bytes come through `hub.web`: huggingface_hub begins a file anew after a kill, and does not compare its hash.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

from llamabook.errors import DownloadError, InputError, LlamaBookError
from llamabook.hub.source import Repository, endpoint, find_login, load_hub
from llamabook.hub.web import check_space, fetch, hash_file, look, megabytes, reason

SHARD = r"-\d+-of-\d+"
WEIGHTS = (  # the first kind that a repository has is taken
    r"model\.safetensors",
    rf"model{SHARD}\.safetensors|model\.safetensors\.index\.json",
    r"pytorch_model\.bin",
    rf"pytorch_model{SHARD}\.bin|pytorch_model\.bin\.index\.json",
    r"consolidated\.\d\d\.pth|params\.json",
    r"model\.pth",
)
BESIDE = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|tokenizer\.model|chat_template\.jinja|(?i:licen[cs]e|notice|use_policy)(\.txt|\.md)?"
)


@dataclass(frozen=True)
class File:
    """One file of a repository and what is known of it; `git` is git's own hash, by which small files are known."""

    path: str
    size: int | None = None
    sha256: str | None = None
    git: str | None = None

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` is this one for certain."""
        if not path.is_file() or self.size not in (None, path.stat().st_size):
            return False
        if self.sha256:
            return hash_file(path) == self.sha256
        return git_hash(path) == self.git if self.git else self.size is not None


def git_hash(path: Path) -> str:
    """The id that git gives to the contents of a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def list_files(repository: Repository) -> tuple[str, list[File]]:
    """The commit that `repository` stands at now, and its files. Raises DownloadError."""
    load_hub()
    from huggingface_hub import HfApi

    api, name = HfApi(endpoint=endpoint()), repository.name
    with explained(repository):
        info = api.model_info(name, revision=repository.revision)
    try:
        tree = list(api.list_repo_tree(name, revision=info.sha, recursive=True))
        entries = [(entry.path, entry) for entry in tree if hasattr(entry, "blob_id")]
    except Exception:  # a mirror without this list: sizes and hashes come with the files
        with explained(repository):
            entries = [(entry.rfilename, entry) for entry in info.siblings or ()]
    files = []
    for path, entry in entries:
        if path.startswith("/") or re.search(r"\\|:|(^|/)\.\.?(/|$)", path):
            raise DownloadError(f"{name} has a file {path!r}, which points out of its folder: nothing was downloaded")
        sha256 = getattr(entry.lfs, "sha256", None)  # large files
        files.append(File(path, entry.size, sha256, None if entry.lfs else entry.blob_id))
    return info.sha or repository.revision, files


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Within this block, what huggingface_hub raises becomes a DownloadError of one line."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except DownloadError:
        raise
    except OfflineModeIsEnabled:
        raise DownloadError(f"HF_HUB_OFFLINE is set, so {repository.name} can't be downloaded: unset it") from None
    except HFValidationError:
        raise DownloadError(f"{repository.name!r} can't be the name of a repository: give ORG/NAME") from None
    except Exception as error:
        response = getattr(error, "response", None)
        if response is not None:
            headers = dict(response.headers)
            if response.status_code == 404 and "x-error-code" not in headers:
                headers["x-error-code"] = "RepoNotFound" if repository.revision == "main" else "RevisionNotFound"
            says = f"{endpoint()} answers {response.status_code} for {repository.name}: try again later"
            raise DownloadError(repository.explain(response.status_code, headers) or says) from None
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests"):
            raise DownloadError(f"{endpoint()} can't be reached: {reason(error)}: check the connection") from None
        if isinstance(error, (ValueError, KeyError, TypeError)):  # not JSON, or another one
            what = "does not answer as Hugging Face does"
            raise DownloadError(f"{endpoint()} {what}: check HF_ENDPOINT and proxy") from None
        raise


def choose(files: Iterable[File], include: Iterable[str] = ()) -> list[File]:
    """The files that `include` names, or else the weights in the best format there is and what belongs to them.

    Of several formats, safetensors come first. Raises InputError if nothing is left to take.
    """
    files, include = list(files), tuple(include)
    for pattern in include:
        if not any(fnmatch(file.path, pattern) for file in files):
            raise InputError(f"--include {pattern!r} matches no file: it holds {inside(files)}")
    if include:
        return [file for file in files if any(fnmatch(file.path, pattern) for pattern in include)]
    here = [file for file in files if "/" not in file.path]
    loose = [file for file in here if file.path.endswith((".safetensors", ".pth", ".pt", ".bin"))]
    for kind in WEIGHTS:
        found = [file for file in here if re.fullmatch(kind, file.path)]
        if any(file in loose for file in found):
            break
    else:
        found = loose
        if len(loose) > 1:
            raise InputError(f"it holds several files of weights: choose with --include from {inside(loose)}")
    if not found:
        raise InputError(f"it holds no weights that this book reads, but {inside(files)}")
    beside = [file for file in here if re.fullmatch(BESIDE, file.path)]
    return sorted({*found, *beside}, key=lambda file: file.path)


def inside(files: list[File], limit: int = 8) -> str:
    """The names of some files."""
    names = [file.path for file in files]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "nothing"


def default_folder(repository: Repository) -> Path:
    """Where a repository goes if nothing else is said: checkpoints/ORG/NAME."""
    return Path("checkpoints", *repository.name.split("/"))


@dataclass(frozen=True)
class Plan:
    """The files of one commit that are to be fetched."""

    repository: Repository
    commit: str
    files: tuple[File, ...]

    @property
    def is_canonical(self) -> bool:
        """Whether the files are already what `convert` would write: a configuration, safetensors and a tokenizer."""
        names = {file.path for file in self.files}
        weights = any(re.fullmatch("|".join(WEIGHTS[:2]), name) for name in names - {"model.safetensors.index.json"})
        return weights and "config.json" in names and bool(names & {"tokenizer.model", "tokenizer.json"})


def plan(repository: Repository, include: Iterable[str] = ()) -> Plan:
    """What `choose` takes of a repository as it is now. Raises DownloadError or InputError."""
    commit, files = list_files(repository)
    try:
        chosen = choose(files, include)
    except InputError as error:
        raise InputError(f"{repository.name}: {error}") from None
    known = (file if file.size is not None else ask(repository, commit, file) for file in chosen)
    return Plan(repository, commit, tuple(known))


def ask(repository: Repository, commit: str, file: File) -> File:
    """The file with the size and the hash that its own address tells."""
    offer = look(repository.url(file.path, commit), login=find_login(), explain=repository.explain)
    return replace(file, size=offer.size, sha256=offer.sha256)


def carry_out(
    plan: Plan,
    folder: Path,
    *,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Bring the files of `plan` to `folder`, and return it. Raises DownloadError or InputError.

    A new folder appears when all is there; until then it is called NAME.part. In a folder that exists, files of
    other contents are only replaced with `force`. `say` gets a line about what is going to happen; `check` gets
    the path of config.json before anything large is fetched, and may raise.
    """
    return Fetcher(plan, folder, force).run(say, check)


class Fetcher:
    """Brings the files of one commit to a folder."""

    def __init__(self, plan: Plan, folder: Path, force: bool):
        self.plan, self.force = plan, force
        self.folder = folder if folder.name not in ("", "..") else folder.resolve()
        self.waiting = self.folder.with_name(self.folder.name + ".part")
        self.login = find_login()

    def run(self, say: Callable[[str], None] | None, check: Callable[[Path], object] | None) -> Path:
        """Fetch what is missing, then show it under its final name."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file: name a folder with --output")
        missing = [file for file in self.plan.files if not self.is_there(file)]
        if missing:
            rest = max(sum((file.size or 0) - self.bytes_waiting(file) for file in missing), 0)
            check_space(self.folder.parent, rest)
            if say:
                count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
                say(f"{self.plan.repository.name}: {count}, {megabytes(rest)} to come")
            for file in sorted(missing, key=lambda file: file.size or 0):
                self.fetch(file)
                if check and file.path == "config.json":
                    self.approve(check)
            self.publish(missing)
        shutil.rmtree(self.waiting, ignore_errors=True)
        return self.folder

    def approve(self, check: Callable[[Path], object]) -> None:
        """Call `check`; if it objects, what has arrived is of no use."""
        try:
            check(self.waiting / "config.json")
        except LlamaBookError:
            shutil.rmtree(self.waiting)
            raise

    def other(self, path: Path) -> DownloadError:
        """The error for a file that we may not replace."""
        name = self.plan.repository.name
        return DownloadError(f"{path} exists with other contents than in {name}: move it away, or add --force")

    def is_there(self, file: File) -> bool:
        """Whether the folder has this file. Raises DownloadError if it has another one under its name."""
        path = self.folder / file.path
        there = file.is_at(path)
        if file.sha256 and path.exists() and not there and not self.force:
            raise self.other(path)
        return there

    def bytes_waiting(self, file: File) -> int:
        """How much of a file has arrived by now."""
        path = self.waiting / file.path
        parts = path.parent.glob(escape(path.name) + ".????????.part") if path.parent.is_dir() else []
        return max((part.stat().st_size for part in (path, *parts) if part.exists()), default=0)

    def fetch(self, file: File) -> None:
        """Bring one file to the waiting folder."""
        path = self.waiting / file.path
        if not file.is_at(path):
            path.unlink(missing_ok=True)  # of another commit
            fetch(
                self.plan.repository.url(file.path, self.plan.commit), path,
                sha256=file.sha256, size=file.size, login=self.login, explain=self.plan.repository.explain,
            )  # fmt: skip

    def publish(self, files: list[File]) -> None:
        """Give the files their place: all at once in a new folder, one by one in one that exists."""
        pairs = [(self.waiting / file.path, self.folder / file.path) for file in files]
        if not self.folder.exists():
            ours = {new for new, _ in pairs}
            for path in [path for path in self.waiting.rglob("*") if path.is_file() and path not in ours]:
                path.unlink()  # of another commit, or another --include
            os.rename(self.waiting, self.folder)
            return
        for new, old in pairs:
            if not self.force and old.exists() and new.read_bytes() != old.read_bytes():
                raise self.other(old)
        for new, old in pairs:
            old.parent.mkdir(parents=True, exist_ok=True)
            os.replace(new, old)
