"""One file from the web, written by hand: resumed where it broke off, checked, and named only when it is whole.

The bytes go to NAME.KEY.part beside the target. KEY stands for the contents that the server announced (its SHA-256,
or else its ETag or date, and its size), so what was begun is only ever continued with the same file.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from llamabook import __version__
from llamabook.errors import DownloadError, InputError
from llamabook.files import why_unreadable

BLOCK = 1 << 16  # bytes
ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 0.5  # seconds before the second attempt; doubled each time
TIMEOUT = (15, 60)  # seconds to connect, and without a byte
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that may be others in a moment
PAGES = {".html", ".htm", ".xml", ".md", ".txt"}  # where a web page is what was asked for
ADVICE = {
    401: "it wants a login: get a link that needs none, or that carries its key",
    403: "the server refuses: the link may have expired, or need a login; get a new one",
    404: "check the address",
    410: "the file was removed: find another source",
}
Explain = Callable[[int, dict], str | None]  # from a status and its headers to a better message


class Broken(Exception):
    """The transfer stopped for a reason that may pass. `wait`: the seconds the server asks for; None: it was silent."""

    def __init__(self, reason: str, wait: float | None = 0.0):
        super().__init__(reason)
        self.wait = wait


class Useless(DownloadError):
    """What arrived can never become the file: none of it is kept."""


@dataclass(frozen=True)
class Offer:
    """What a server says about a file: bytes, SHA-256, and a stamp that changes with the contents, where known."""

    size: int | None = None
    sha256: str | None = None
    stamp: str = ""

    @property
    def key(self) -> str:
        """Eight characters that stand for these contents."""
        return hashlib.sha256((self.sha256 or f"{self.stamp}|{self.size}").encode()).hexdigest()[:8]


def fetch(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    force: bool = False,
    login: str | None = None,
    explain: Explain | None = None,
) -> Path:
    """Download `url` to the file `path`, unless it is there already, and return `path`.

    Args: sha256 and size, what is known beforehand; the headers of Hugging Face's servers tell it too; force,
    replace a `path` that is another file; login, a bearer token, sent to this host alone; explain, a better
    message for an answer, or None. Raises DownloadError or InputError, in one line.
    """
    path, sha256 = Path(path), check_sha256(sha256)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the file in it")
    if sha256 and path.exists() and hash_file(path) == sha256:
        return path
    Transfer(url, path, Offer(size, sha256), login, explain).run(force)
    return path


def look(url: str, *, login: str | None = None, explain: Explain | None = None) -> Offer:
    """What the server says about the file at `url`, which is not read. Raises DownloadError."""
    transfer = Transfer(url, Path(), Offer(), login, explain)
    with transfer.session, transfer.persist(lambda: transfer.request(0)) as response:
        return read_offer(response)


def check_sha256(text: str | None) -> str | None:
    """`text` in lower case. Raises InputError if it is no SHA-256 in hexadecimal."""
    if text is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise InputError(f"--sha256 is {text!r}: give the 64 hexadecimal digits of a SHA-256")
    return text and text.lower()


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, with a progress bar while it is read."""
    digest, total = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file, progress(f"checking {path.name}", total) as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def progress(label: str, total: int | None, initial: int = 0) -> tqdm:
    """A bar of bytes on stderr, on a terminal only, once it takes over a second."""
    return tqdm(
        desc=label, total=total, initial=initial, unit="B", unit_scale=True, leave=False, delay=1, disable=None
    )


def megabytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000


def check_space(folder: Path, need: int) -> None:
    """Raise DownloadError if `folder`'s disk has not `need` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DownloadError(
            f"{megabytes(need)} are still to come and {folder.resolve()} has {megabytes(free)} free: "
            "make room, or name another place with --output"
        )


def without_secrets(url: str) -> str:
    """The address without user, password and query, which may hold keys."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def web_session():
    """A session of requests. Raises DownloadError where that is not installed."""
    try:
        import requests
    except ImportError:
        raise DownloadError("downloading needs the package requests: pip install requests") from None
    session = requests.Session()
    session.headers.update({"User-Agent": f"llamabook/{__version__}", "Accept-Encoding": "identity"})
    return session


def read_offer(response) -> Offer:
    """What the answer, and those that led to it, say about the file."""
    answers = [*response.history, response]
    from_hub = any("x-repo-commit" in answer.headers for answer in answers)
    linked = [answer.headers.get("x-linked-etag", "") for answer in answers]
    linked += [answer.headers.get("etag", "") for answer in answers if from_hub]
    hashes = [tag for tag in (tag.strip('W/"').lower() for tag in linked) if re.fullmatch("[0-9a-f]{64}", tag)]
    etag, date = response.headers.get("etag", ""), response.headers.get("last-modified", "")
    stamp = ("" if etag.startswith("W/") else etag) or date
    return Offer(total_size(response), hashes[0] if hashes else None, stamp)


def total_size(response) -> int | None:
    """How many bytes the whole file has, not the part that was asked for; None where the answer does not say."""
    if response.headers.get("content-encoding", "identity") != "identity":
        return None
    for name, pattern in (("content-range", r"bytes .*/(\d+)"), ("content-length", r"(\d+)")):
        if name in response.headers:
            found = re.fullmatch(pattern, response.headers[name].strip())
            return int(found[1]) if found else None
    return None


@contextmanager
def alone(file: BinaryIO, path: Path) -> Iterator[None]:
    """Hold the file for this process. Raises DownloadError if another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DownloadError(f"{path} is being downloaded by another process: wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks
    yield


class Transfer:
    """One download. `want`, what is known beforehand; `offer`, that and what the server says."""

    def __init__(self, url: str, path: Path, want: Offer, login: str | None, explain: Explain | None):
        self.url, self.path, self.want, self.login, self.explain = url, path, want, login, explain
        self.name, self.session = without_secrets(url), web_session()
        self.offer: Offer | None = None
        self.first = None  # the answer that made the offer: its body is used if nothing is there yet
        self.encoded = False  # compressed on the way, so that a part of it is no part of the file
        self.resumed = False

    def run(self, force: bool) -> None:
        """Do it; on return `path` is there and whole."""
        with self.session:
            self.first = self.persist(lambda: self.request(0))
            with self.first:
                self.offer = self.merge(read_offer(self.first))
                self.encoded = self.first.headers.get("content-encoding", "identity") != "identity"
                if not self.path.exists() or not self.is_complete(force):
                    self.fetch_part()

    def merge(self, said: Offer) -> Offer:
        """What was known beforehand counts more than what the server says, which must not contradict it."""
        want = self.want
        if want.sha256 and said.sha256 and want.sha256 != said.sha256:
            raise DownloadError(f"{self.name} has the SHA-256 {said.sha256}, not {want.sha256}: it is another file")
        return Offer(said.size if want.size is None else want.size, want.sha256 or said.sha256, said.stamp)

    def is_complete(self, force: bool) -> bool:
        """Whether `path` is what the server has. Raises DownloadError if it is not and may not be replaced."""
        size = self.path.stat().st_size
        same = size == self.offer.size and (not self.offer.sha256 or hash_file(self.path) == self.offer.sha256)
        if same or force:
            return same
        there = "an unknown number of" if self.offer.size is None else self.offer.size
        raise DownloadError(
            f"{self.path} exists with other contents ({size} bytes; {self.name} has {there}): "
            "move it away, or add --force"
        )

    def fetch_part(self) -> None:
        """Fill the part, give it its name, and remove others that were begun with other contents."""
        folder = self.path.parent
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(self.part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as file:
                with alone(file, self.path):
                    self.fill(file)
        except Useless:
            self.part.unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DownloadError(f"the disk of {self.path} is full: make room; the same command goes on") from None
            raise
        os.replace(self.part, self.path)
        for other in list(folder.iterdir()):
            if re.fullmatch(re.escape(self.path.name) + r"\.[0-9a-f]{8}\.part", other.name):
                other.unlink(missing_ok=True)

    def fill(self, file: BinaryIO) -> None:
        """Bring the part to its full length and check it. Raises DownloadError; what can be used stays."""
        size, have = self.offer.size, file.seek(0, os.SEEK_END)
        if not self.resumable or (size is not None and have > size):
            have = empty(file)
        check_space(self.path.parent, (size or 0) - have)
        while True:
            if size is None or have < size or not have:
                with progress(self.path.name, size, have) as bar:
                    self.persist(lambda: self.receive(file, bar), lambda: file.seek(0, os.SEEK_END))
            file.flush()
            os.fsync(file.fileno())
            if problem := self.why_unusable():
                raise Useless(f"{self.name} {problem}")
            if not self.offer.sha256 or (found := hash_file(self.part)) == self.offer.sha256:
                return
            if not (self.resumed or have):
                raise Useless(
                    f"{self.name} arrived with the SHA-256 {found}, not {self.offer.sha256}: "
                    "it was damaged on the way, or is another file; nothing was kept"
                )
            self.resumed, have = False, empty(file)  # the halves may not have belonged together: once more, whole

    def why_unusable(self) -> str | None:
        """What the first bytes show to be wrong, or None."""
        if self.path.suffix.lower() in PAGES or (self.want.size == 0 and not self.part.stat().st_size):
            return None
        return why_unreadable(self.part)

    def persist(self, attempt: Callable, reached: Callable[[], int] = lambda: 0):
        """Call `attempt` until it does not break, but not for ever: `reached` says how many bytes are there."""
        most, failures = reached(), 0
        while True:
            try:
                return attempt()
            except Broken as broken:
                more = reached() > most
                most, failures = max(most, reached()), 1 if more else failures + 1
                if failures >= (2 if self.offer is None and broken.wait is None else ATTEMPTS):
                    rest = "check the address and the connection" if broken.wait is None else "try again later"
                    rest = f"{megabytes(most)} are here, and the same command goes on from there" if most else rest
                    raise DownloadError(f"{self.name}: {broken}: {rest}") from None
                time.sleep(max(min(broken.wait or 0, 60), PAUSE * 2 ** (failures - 1)))

    def request(self, start: int):
        """The answer to a request for the bytes from `start` on. Raises Broken or DownloadError."""
        headers = {"Authorization": f"Bearer {self.login}"} if self.login else {}
        if start:
            headers["Range"] = f"bytes={start}-"
            if self.offer.stamp:
                headers["If-Range"] = self.offer.stamp
        with self.mishaps():
            response = self.session.get(self.url, headers=headers, stream=True, timeout=TIMEOUT)
        try:
            self.check_status(response)
        except Exception:
            response.close()
            raise
        return response

    @contextmanager
    def mishaps(self) -> Iterator[None]:
        """Within this block, what requests raises becomes Broken or DownloadError."""
        import requests
        import urllib3

        try:
            yield
        except (requests.exceptions.SSLError, requests.exceptions.ProxyError) as error:
            raise DownloadError(f"{self.name} can't be reached: {reason(error)}: check certificates and proxy") from None
        except (requests.exceptions.ContentDecodingError, urllib3.exceptions.DecodeError):
            raise Useless(f"{self.name} arrives damaged, its compression can't be undone: try again later") from None
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            raise Broken(reason(error), wait=None) from None
        except urllib3.exceptions.HTTPError as error:
            raise Broken(reason(error), wait=None) from None
        except (requests.RequestException, UnicodeError, ValueError) as error:
            raise DownloadError(f"{self.name} can't be fetched: {reason(error)}: check the address") from None

    def check_status(self, response) -> None:
        """Raise Broken or DownloadError for an answer that is no file."""
        status = response.status_code
        if status in (200, 206):
            return
        by_hub = not response.history or "x-error-code" in response.headers  # not by what it redirects to
        if message := by_hub and self.explain and self.explain(status, response.headers):
            raise DownloadError(message)
        says = f"the server answers {status} {response.reason or ''}".rstrip()
        if status in PASSING or "range" in response.request.headers:
            wait = response.headers.get("retry-after", "")
            raise Broken(says, float(wait) if wait.isdecimal() else 0.0)
        raise DownloadError(f"{self.name}: {says}: {ADVICE.get(status, 'check the address')}")

    def receive(self, file: BinaryIO, bar: tqdm) -> None:
        """Append what is missing. Raises Broken where the connection ends too early."""
        start = file.seek(0, os.SEEK_END) if self.resumable else empty(file)
        first, self.first = self.first, None
        if first and start:
            first.close()
        try:
            response = first if first and not start else self.request(start)
        except Broken as broken:
            if "answers 416" in str(broken):
                empty(file)  # the server has not as much as is here
            raise
        with response, self.mishaps():
            total = total_size(response)
            begins = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
            if response.status_code == 206 and (not begins or int(begins[1]) != start):
                empty(file)
                raise Broken("the server sends another part than the one asked for")
            if response.status_code == 200:
                if start:
                    self.refuse_another(response, total)
                start = empty(file)  # the server can't resume: all of it again
            self.resumed = self.resumed or start > 0
            bar.n = start
            for block in blocks(response):
                file.write(block)
                file.flush()
                bar.update(len(block))
                if start < 256 <= file.tell() and (problem := self.why_unusable()):
                    raise Useless(f"{self.name} {problem}")
                start = file.tell()
            self.check_length(start, total)

    def refuse_another(self, response, total: int | None) -> None:
        """Raise DownloadError, and keep what is here, if a whole answer to a request for a part is something else."""
        is_page = "text/html" in response.headers.get("content-type", "") and self.path.suffix.lower() not in PAGES
        if is_page or total not in (None, self.offer.size):
            what = "a web page" if is_page else f"{total} bytes where it had {self.offer.size}"
            raise DownloadError(f"{self.name}: the server sends {what} all of a sudden: try again later")

    @property
    def resumable(self) -> bool:
        """Whether what comes next may be taken to belong to what is here."""
        return not self.encoded and bool(self.offer.sha256 or self.offer.stamp or self.offer.size)

    @property
    def part(self) -> Path:
        """Where the bytes go until they are all there."""
        return self.path.with_name(f"{self.path.name}.{self.offer.key}.part")

    def check_length(self, have: int, total: int | None) -> None:
        """Raise Broken if bytes are missing, Useless if the server has another number of them than announced."""
        if total is not None and have < total:
            raise Broken("the connection broke off")
        if self.offer.size is not None and have != self.offer.size:
            raise Useless(f"{self.name} has {have} bytes and should have {self.offer.size}: damaged, or another file")


def empty(file: BinaryIO) -> int:
    """Remove what is in the file, and return its length: 0."""
    file.seek(0)
    return file.truncate()


def blocks(response) -> Iterator[bytes]:
    """The body as it comes in: what has arrived before a connection breaks is not lost."""
    if not hasattr(response.raw, "read1"):  # urllib3 1
        yield from response.iter_content(8192)
        return
    while block := response.raw.read1(BLOCK, decode_content=True):
        yield block


def reason(error: BaseException) -> str:
    """The innermost cause, in a few words."""
    text = str(error)
    for known, words in (
        ("Name or service|nodename nor servname|getaddrinfo|Temporary failure", "there is no such host, or no network"),
        ("Connection refused", "the connection was refused"),
        ("timed out|Read timed out", "the server does not answer"),
        ("IncompleteRead|broken|reset|aborted|RemoteDisconnected|EOF", "the connection broke off"),
        ("Network is unreachable|No route", "there is no network"),
        ("CERTIFICATE|certificate", "the server's certificate is not trusted"),
    ):  # fmt: skip
        if re.search(known, text):
            return words
    return re.sub(r"\s+", " ", text)[:200] or type(error).__name__
