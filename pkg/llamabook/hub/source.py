"""What the words after `download` name: a repository of Hugging Face or the address of a file. Written by hand."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from llamabook.errors import DownloadError, InputError

PUBLIC = "https://huggingface.co"


def endpoint() -> str:
    """The server of Hugging Face's repositories: HF_ENDPOINT where it is set, a mirror perhaps."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")


def load_hub():
    """The module huggingface_hub. Raises DownloadError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise DownloadError("repositories need the package huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def find_login() -> str | None:
    """The token of `hf auth login` or HF_TOKEN, None if there is none."""
    return load_hub().get_token()


@dataclass(frozen=True)
class Repository:
    """A repository ORG/NAME at a branch, tag or commit."""

    name: str
    revision: str = "main"

    def url(self, file: str, revision: str | None = None) -> str:
        """The address of one of its files."""
        return f"{endpoint()}/{self.name}/resolve/{quote(revision or self.revision, safe='')}/{quote(file)}"

    def explain(self, status: int, headers) -> str | None:
        """What an answer of Hugging Face's server means and what to do, or None if it needs no words of ours."""
        code, message = headers.get("x-error-code"), headers.get("x-error-message") or ""
        page = f"{endpoint()}/{self.name}"
        if "Invalid credentials" in message:
            return "Hugging Face does not know your token: run `hf auth login` again, or correct HF_TOKEN"
        if code == "GatedRepo" or (status == 403 and not code):
            if find_login():
                return f"{self.name} is gated and your account has no access yet: ask for it at {page} and try again later"
            advice = f"accept its terms at {page}, run `hf auth login` or set HF_TOKEN, and try again"
            return f"{self.name} is gated: {advice}"
        if code == "RevisionNotFound":
            return f"{self.name} has no branch, tag or commit {self.revision!r}: see {page}"
        if code == "EntryNotFound" or (status == 404 and not code):
            return f"{self.name} has no such file at {self.revision!r}: see {page}/tree/{self.revision}"
        if code == "RepoNotFound" or status == 401:
            return (
                f"there is no repository {self.name} on {endpoint()}, or it is private: check the name; "
                "if you have access, run `hf auth login` or set HF_TOKEN, and try again"
            )
        return None


@dataclass(frozen=True)
class Address:
    """A file on the web; `home`, the repository that it belongs to, if Hugging Face has it."""

    url: str
    home: Repository | None = None

    @property
    def login(self) -> str | None:
        """The token to send, to Hugging Face's own server alone."""
        return find_login() if self.home else None

    @property
    def explain(self):
        """Better words for some answers of Hugging Face's server."""
        return self.home.explain if self.home else None

    def target(self, output: str | Path | None) -> Path:
        """The file to write: `output`, or the address's last part in that folder. Raises InputError."""
        name = unquote(urlsplit(self.url).path.rpartition("/")[2])
        if output is not None and not (Path(output).is_dir() or str(output).endswith(("/", os.sep))):
            return Path(output)
        if not name or name in (".", "..") or re.search(r'[/\\:*?"<>|\x00-\x1f]', name):
            raise InputError(f"{self.url} names no file: add --output FILE")
        return Path(output or ".") / name


def parse(source: str, revision: str | None = None) -> Repository | Address:
    """What `source` names: ORG/NAME, its page at Hugging Face, or an address. Raises InputError."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII):
        return Repository(source, revision or "main")
    parts = urlsplit(source) if re.match(r"https?://", source, re.I) else None
    if parts is None or not parts.hostname:
        here = ": it is here already, and `convert` takes it" if os.path.exists(source) else ""
        raise InputError(f"{source!r} is neither a repository ORG/NAME nor an http(s) address{here}")
    homes = {urlsplit(PUBLIC).netloc, "hf.co", urlsplit(endpoint()).netloc}
    words = [unquote(word) for word in parts.path.split("/") if word]
    if parts.netloc not in homes or len(words) < 2 or words[0] in ("datasets", "spaces", "api"):
        return Address(source)
    name = "/".join(words[:2])
    match words[2:]:
        case []:
            return Repository(name, revision or "main")
        case ["tree", branch]:
            return Repository(name, revision or branch)
        case ["blob" | "resolve" | "raw", branch, *file] if file:
            home = Repository(name, revision or branch)
            return Address(home.url("/".join(file)), home)
    return Address(source)
