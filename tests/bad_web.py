"""A web server on this machine that misbehaves as asked, and a small Hugging Face made of it, for the tests."""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Page:
    """What is at one address, and how it goes wrong."""

    body: bytes = b""
    status: int = 200
    headers: dict = field(default_factory=dict)
    statuses: list = field(default_factory=list)  # answers to the first requests, before `status`
    cuts: list = field(default_factory=list)  # the connection ends after so many bytes of the first answers
    cut_always: int | None = None  # and of all answers
    ranges: bool = True  # whether a Range is honoured
    length: bool = True  # whether the length is announced
    announce: int | None = None  # a length that is announced instead of the true one
    shift: int = 0  # a Range begins so many bytes off
    pause: float = 0.0  # seconds before every block
    block: int = 4096


class BadWeb:
    """The server. `pages` by path; `log` has (path, headers) of each request."""

    def __init__(self):
        self.pages: dict[str, Page] = {}
        self.log: list[tuple[str, dict]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                web.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # clients hang up, or are killed
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, path: str, body: bytes = b"", **wrong) -> str:
        """Put a page at `path`; gives its whole address."""
        self.pages[path] = Page(body, **wrong)
        return self.url + path

    def ranges(self, path: str) -> list[str | None]:
        """The Range of every request for `path`."""
        return [headers.get("range") for asked, headers in self.log if asked == path]

    def count(self, path: str) -> int:
        """How often `path` was asked for."""
        return sum(asked == path for asked, _ in self.log)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.log.append((path, headers))
        page = self.pages.get(path, Page(b"not here", status=404))
        if callable(page):
            page = page(headers)
        try:
            self.send(request, page, headers)
        except (BrokenPipeError, ConnectionResetError):
            request.close_connection = True

    def send(self, request: BaseHTTPRequestHandler, page: Page, headers: dict) -> None:
        status, body, start = page.status, page.body, 0
        if page.statuses:
            status, body = page.statuses.pop(0), b"later"
        asked = headers.get("range", "")
        same = headers.get("if-range") in (None, page.headers.get("ETag"), page.headers.get("Last-Modified"))
        if status == 200 and asked and page.ranges and same:
            start = int(asked.removeprefix("bytes=").rstrip("-")) + page.shift
            status = 206 if start < len(body) else 416
        sent = {**page.headers}
        if status == 206:
            sent["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if status == 416:
            sent["Content-Range"], body, start = f"bytes */{len(body)}", b"", 0
        if page.length:
            sent["Content-Length"] = str((len(body) if page.announce is None else page.announce) - start)
        else:
            sent["Connection"] = "close"
        request.send_response(status)
        for name, value in sent.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        stop = page.cut_always
        if page.cuts and status in (200, 206):
            stop = page.cuts.pop(0)
        end = len(body) if stop is None else min(len(body), start + stop)
        for begin in range(start, end, page.block):
            time.sleep(page.pause)
            request.wfile.write(body[begin : min(begin + page.block, end)])
        if not page.length or end < len(body) or page.announce is not None:
            request.close_connection = True


class BadHub(BadWeb):
    """A small Hugging Face: `repository(...)` adds one with files; large ones (`lfs`) come through a redirect."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def repository(self, name: str, files: dict[str, bytes], *, lfs=(), gated=False, sizes=True, branch="main") -> None:
        entries, tree = [], []
        for path, body in files.items():
            git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            sha256 = hashlib.sha256(body).hexdigest()
            large = {"lfs": {"sha256": sha256, "oid": sha256, "size": len(body), "pointerSize": 134}} if path in lfs else {}
            known = {"size": len(body), "blobId": git, **large} if sizes else {}
            entries.append({"rfilename": path, **known})
            tree.append({"type": "file", "path": path, "size": len(body), "oid": git, **large})
            for revision in (self.COMMIT, branch):
                address = f"/{name}/resolve/{revision}/{path}"
                headers = {"X-Repo-Commit": self.COMMIT, "ETag": f'"{sha256 if large else git}"'}
                if gated:
                    refusal = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
                    self.pages[address] = self.for_those_with(gated, Page(b"", 401, refusal), Page(b"", 403, refusal), Page(body, headers=headers))
                elif path in lfs:
                    blob = f"/blobs/{sha256}"
                    self.put(blob, body, headers={"ETag": f'"{git[:16]}"'})
                    headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(body)), "Location": self.url + blob}
                    self.pages[address] = Page(b"", 302, headers)
                else:
                    self.pages[address] = Page(body, headers=headers)
        info = {"id": name, "modelId": name, "sha": self.COMMIT, "siblings": entries, "private": False, "tags": [], "downloads": 0}
        for revision in (self.COMMIT, branch):
            self.put(f"/api/models/{name}/revision/{revision}", json.dumps(info).encode(), headers={"Content-Type": "application/json"})
        if sizes != "never":
            self.put(f"/api/models/{name}/tree/{self.COMMIT}", json.dumps(tree).encode(), headers={"Content-Type": "application/json"})

    @staticmethod
    def for_those_with(token: str, stranger: Page, other: Page, page: Page):
        """Two refusals: without a token, and with another one than `token`."""

        def choose(headers):
            sent = headers.get("authorization")
            return page if sent == f"Bearer {token}" else other if sent else stranger

        return choose
