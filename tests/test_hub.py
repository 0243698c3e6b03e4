"""Downloads from servers that misbehave: the file is whole and right, or there is none and one line says why.

Everything is served on this machine: `bad_web` is a server that cuts, refuses and lies as asked, and a small
Hugging Face made of it. No test touches a network.
"""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_web import BadHub, BadWeb, Page
from huggingface_hub import constants

import llamabook
from llamabook.cli import main
from llamabook.errors import DownloadError, InputError
from llamabook.hub import Repository, download, fetch, parse, web
from llamabook.hub.repository import File, choose

PACKAGE = Path(llamabook.__file__).resolve().parent.parent
BODY = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>\n" * 20


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No proxies, no login, no waiting, and an empty folder to work in."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(web, "PAUSE", 0.0)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def server():
    server = BadWeb()
    yield server
    server.close()


@pytest.fixture
def hub(monkeypatch):
    hub = BadHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(Path("no-token").resolve()))
    yield hub
    hub.close()


def everything() -> list[str]:
    """All files and folders here."""
    return sorted(str(path) for path in Path(".").rglob("*"))


def fails(call, *words: str) -> str:
    """Assert that `call` raises one line that holds `words`, and gives it."""
    with pytest.raises((DownloadError, InputError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# One file from the web


def test_a_file_arrives_whole_under_its_own_name(server):
    url = server.put("/some/model.pth", BODY)
    assert download(url) == Path("model.pth")
    assert Path("model.pth").read_bytes() == BODY
    assert everything() == ["model.pth"]
    assert server.count("/some/model.pth") == 1, "a fresh file takes one request"


def test_output_is_a_file_or_a_folder(server):
    url = server.put("/model.pth", BODY)
    assert download(url, "new/other.pth") == Path("new/other.pth")
    assert download(url, "new") == download(url, "new/") == Path("new/model.pth")
    assert download(url, "fresh/") == Path("fresh/model.pth")
    assert len({path.read_bytes() for path in Path(".").rglob("*.pth")}) == 1


def test_a_cut_connection_is_taken_up_where_it_broke(server):
    url = server.put("/model.pth", BODY, cuts=[100_000, 50_000, 0])
    assert Path(download(url)).read_bytes() == BODY
    assert server.ranges("/model.pth") == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert everything() == ["model.pth"]


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(server):
    url = server.put("/model.pth", BODY, headers={"ETag": '"one"'}, cuts=[120_000, *[0] * 10])
    fails(lambda: download(url), "broke off", "120.0 kB are here", "goes on from there")
    (part,) = everything()
    assert part.startswith("model.pth.") and part.endswith(".part") and Path(part).stat().st_size == 120_000
    server.pages["/model.pth"].cuts.clear()
    assert Path(download(url)).read_bytes() == BODY
    assert server.ranges("/model.pth")[-1] == "bytes=120000-"
    assert everything() == ["model.pth"]


@pytest.mark.parametrize("headers", [{"ETag": '"two"'}, {"Last-Modified": "Mon, 02 Mar 2026 10:00:00 GMT"}])
def test_what_was_begun_is_not_continued_with_another_file(headers, server):
    old = {"ETag": '"one"'} if "ETag" in headers else {"Last-Modified": "Sun, 01 Mar 2026 10:00:00 GMT"}
    url = server.put("/model.pth", BODY, headers=old, cuts=[120_000, *[0] * 10])
    fails(lambda: download(url))
    other = BODY[::-1]
    server.put("/model.pth", other, headers=headers)
    assert Path(download(url)).read_bytes() == other
    assert everything() == ["model.pth"], "the old part is gone"


def test_halves_that_do_not_belong_together_are_found_by_the_hash(server):
    """The server gives neither date nor ETag and changes the file between two runs."""
    url = server.put("/model.pth", BODY[::-1], cuts=[120_000, *[0] * 10])
    fails(lambda: download(url, sha256=SHA256))
    server.put("/model.pth", BODY)
    assert Path(download(url, sha256=SHA256)).read_bytes() == BODY
    assert server.ranges("/model.pth")[-2:] == ["bytes=120000-", None]


def test_a_server_without_ranges_starts_over(server):
    url = server.put("/model.pth", BODY, ranges=False, cuts=[100_000, 200_000])
    assert Path(download(url)).read_bytes() == BODY


def test_a_server_that_sends_another_range_is_asked_for_the_whole(server):
    url = server.put("/model.pth", BODY, cuts=[100_000], shift=-10)
    assert Path(download(url)).read_bytes() == BODY
    assert server.ranges("/model.pth") == [None, "bytes=100000-", None]


def test_a_file_that_shrank_on_the_server_starts_over(server):
    url = server.put("/model.pth", BODY, cuts=[250_000])
    first = server.pages["/model.pth"]
    server.pages["/model.pth"] = lambda headers: first if server.count("/model.pth") == 1 else Page(BODY[:200_000])
    fails(lambda: download(url), "200000", "300000")
    assert Path(download(url)).read_bytes() == BODY[:200_000]


@pytest.mark.parametrize("wrong", [{"cut_always": 100_000}, {"cut_always": 100_000, "ranges": False}, {"cut_always": 0}])
def test_a_connection_that_always_breaks_is_given_up(wrong, server):
    if wrong == {"cut_always": 100_000}:
        wrong = {"cuts": [100_000, *[0] * 20]}
    url = server.put("/model.pth", BODY, **wrong)
    fails(lambda: download(url), "broke off")
    assert not Path("model.pth").exists()
    assert server.count("/model.pth") < 12


def test_a_body_shorter_than_announced_is_no_file(server):
    url = server.put("/model.pth", BODY, announce=len(BODY) + 5000)
    fails(lambda: download(url), "/model.pth")
    assert not Path("model.pth").exists()


def test_a_body_of_unannounced_length_is_taken_and_checked(server):
    url = server.put("/model.pth", BODY, length=False)
    assert Path(download(url)).read_bytes() == BODY
    server.put("/model.pth", BODY[:-1], length=False)
    fails(lambda: download(url, "other.pth", sha256=SHA256), "SHA-256")
    assert everything() == ["model.pth"]


def test_the_hash_decides(server):
    url = server.put("/model.pth", BODY)
    assert download(url, sha256=SHA256.upper()) == Path("model.pth")
    server.put("/model.pth", BODY[:-1] + b"!")
    fails(lambda: download(url, "second.pth", sha256=SHA256), "SHA-256", SHA256, "nothing was kept")
    assert everything() == ["model.pth"]


def test_the_hash_that_hugging_face_announces_is_checked(server):
    for body, right in ((BODY, True), (BODY[:-1] + b"!", False)):
        server.put("/blob", body, headers={"ETag": '"x"'})
        server.put("/model.pth", status=302, headers={"Location": server.url + "/blob", "X-Linked-ETag": f'"{SHA256}"'})
        if right:
            assert download(server.url + "/model.pth").read_bytes() == BODY
        else:
            fails(lambda: download(server.url + "/model.pth", "b.pth"), "SHA-256")
    fails(lambda: download(server.url + "/model.pth", "b.pth", sha256="0" * 64), "another file")
    assert everything() == ["model.pth"]


@pytest.mark.parametrize("text", ["12", "g" * 64, SHA256 + "0", ""])
def test_a_hash_that_is_none(text, server):
    fails(lambda: download(server.put("/model.pth", BODY), sha256=text), "--sha256", "64 hexadecimal digits")
    assert everything() == [] and not server.log


def test_what_is_complete_is_not_fetched_again(server):
    url = server.put("/model.pth", BODY)
    download(url)
    before = Path("model.pth").stat().st_mtime_ns
    assert download(url) == Path("model.pth")
    server.pages.clear()
    assert download(url, sha256=SHA256) == Path("model.pth"), "with its hash known, no server is needed"
    assert Path("model.pth").stat().st_mtime_ns == before


def test_another_file_of_that_name_is_only_replaced_by_force(server):
    url = server.put("/model.pth", BODY)
    Path("model.pth").write_bytes(b"mine")
    fails(lambda: download(url), "model.pth exists with other contents (4 bytes", "--force")
    fails(lambda: download(url, sha256=SHA256), "--force")
    assert Path("model.pth").read_bytes() == b"mine"
    download(url, force=True)
    assert Path("model.pth").read_bytes() == BODY and everything() == ["model.pth"]


@pytest.mark.parametrize("status, words", [(401, "login"), (403, "403 Forbidden"), (404, "404 Not Found"), (410, "410"), (418, "418")])
def test_a_refusal_costs_one_request_and_one_line(status, words, server):
    server.put("/model.pth", PAGE, status=status)
    message = fails(lambda: download(server.url + "/model.pth?key=secret"), words)
    assert "secret" not in message, "keys in an address are not repeated"
    assert everything() == [] and len(server.log) == 1


def test_a_busy_server_is_asked_again(server):
    url = server.put("/model.pth", BODY, statuses=[503, 429, 500])
    assert download(url).read_bytes() == BODY
    server.put("/busy.pth", BODY, statuses=[503] * 50)
    fails(lambda: download(server.url + "/busy.pth"), "503 Service Unavailable", "try again later")
    assert everything() == ["model.pth"]


def test_a_busy_server_says_how_long_to_wait(server, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(web, "PAUSE", 0.5)
    server.put("/model.pth", BODY, statuses=[429], headers={"Retry-After": "7"})
    server.pages["/model.pth"].block = len(BODY)
    download(server.url + "/model.pth")
    assert 7.0 in waits


@pytest.mark.parametrize(
    "body, words",
    [
        (PAGE, "web page"),
        (b"\n <html><head>" + PAGE * 9000, "web page"),
        (b"", "0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "Git LFS pointer"),
    ],
    ids=["html", "large html", "empty", "pointer"],
)
@pytest.mark.parametrize("length", [True, False], ids=["length", "no length"])
def test_what_is_no_data_leaves_nothing(body, words, length, server):
    url = server.put("/model.pth", body, length=length)
    fails(lambda: download(url), words)
    fails(lambda: download(url, "new/model.pth"), words)
    assert everything() == []
    assert len(server.log) == 2


def test_a_page_may_be_what_was_asked_for(server):
    assert download(server.put("/licence.html", PAGE)).read_bytes() == PAGE


def test_no_room(server, monkeypatch):
    url = server.put("/model.pth", BODY)
    usage = web.shutil.disk_usage(".")
    monkeypatch.setattr(web.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    fails(lambda: download(url), "300.0 kB are still to come", "100.0 kB free", "--output")
    assert not Path("model.pth").exists()
    assert sum(Path(name).stat().st_size for name in everything()) == 0
    monkeypatch.setattr(web.shutil, "disk_usage", lambda path: usage)
    assert download(url).read_bytes() == BODY


def test_a_disk_that_fills_up(server, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    url = server.put("/model.pth", BODY, cuts=[100_000, *[0] * 10])
    fails(lambda: download(url))
    server.put("/model.pth", BODY)
    with monkeypatch.context() as patch:
        patch.setattr(web, "blocks", full)
        fails(lambda: download(url), "full", "goes on")
    (part,) = everything()
    assert Path(part).stat().st_size == 100_000


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other locks")
def test_two_at_once(server):
    url = server.put("/model.pth", BODY)
    with open(f"model.pth.{web.Offer(len(BODY)).key}.part", "wb") as file, web.alone(file, Path("model.pth")):
        fails(lambda: download(url), "another process")
    assert download(url).read_bytes() == BODY


def test_no_such_server():
    fails(lambda: download("http://127.0.0.1:9/model.pth"), "refused", "check the address")
    assert everything() == []


@pytest.mark.parametrize(
    "source, words",
    [
        ("model", "neither a repository"),
        ("s3://bucket/ckpt", "neither a repository"),
        ("ftp://host/model.pth", "neither a repository"),
        ("http://", "neither a repository"),
        ("a/b/c", "neither a repository"),
        ("../b", "neither a repository"),
        ("", "neither a repository"),
        ("https://host/", "names no file"),
        ("https://host/a/..", "names no file"),
        ("https://host/a%2Fb", "names no file"),
        ("https://host/a%5Cb", "names no file"),
    ],
)
def test_a_source_that_is_none(source, words):
    fails(lambda: download(source), words)
    assert everything() == []


def test_a_path_that_is_here_is_told_apart():
    Path("mine").mkdir()
    Path("mine/model.pth").touch()
    fails(lambda: download("./mine/model.pth"), "it is here already", "convert")


def test_a_login_page_in_the_middle_costs_nothing(server):
    url = server.put("/model.pth", BODY, headers={"ETag": '"one"'}, cuts=[120_000])
    page = server.pages["/model.pth"]
    server.pages["/model.pth"] = lambda headers: Page(PAGE, headers={"Content-Type": "text/html"}) if "range" in headers else page
    fails(lambda: download(url), "a web page all of a sudden")
    server.pages["/model.pth"] = page
    assert download(url).read_bytes() == BODY
    assert server.ranges("/model.pth")[-1] == "bytes=120000-", "what had come is not lost"


def test_a_server_that_compresses_unasked(server):
    packed = gzip.compress(BODY)
    url = server.put("/model.pth", packed, headers={"Content-Encoding": "gzip", "ETag": '"one"'}, cuts=[100_000])
    assert download(url).read_bytes() == BODY
    assert server.ranges("/model.pth") == [None, None], "a part of what is compressed is no part of the file"
    server.put("/other.pth", packed[:1000] + b"?" * 1000 + packed[2000:], headers={"Content-Encoding": "gzip"})
    fails(lambda: download(server.url + "/other.pth"), "compression")
    assert everything() == ["model.pth"]


# Repositories of Hugging Face

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": BODY,
    "tokenizer.model": b"IQ== 0\n",
    "README.md": b"# A model",
    "LICENSE": b"Terms",
    "pytorch_model.bin": b"old",
    "flax/model.msgpack": b"other",
}
NEEDED = ["LICENSE", "config.json", "model.safetensors", "tokenizer.model"]
HERE = ["checkpoints", "checkpoints/org", "checkpoints/org/name", *(f"checkpoints/org/name/{name}" for name in NEEDED)]


def address(file: str, name: str = "org/name") -> str:
    return f"/{name}/resolve/{BadHub.COMMIT}/{file}"


def test_a_repository_becomes_a_folder_that_is_whole(hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    assert download("org/name") == Path("checkpoints/org/name")
    assert everything() == HERE
    assert all(Path("checkpoints/org/name", name).read_bytes() == FILES[name] for name in NEEDED)


def test_a_second_run_fetches_nothing(hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    download("org/name")
    hub.log.clear()
    assert download("org/name") == Path("checkpoints/org/name")
    assert not [path for path, _ in hub.log if "/resolve/" in path]


@pytest.mark.parametrize("form", ["{}/org/name", "{}/org/name/tree/main", "org/name"])
def test_the_page_of_a_repository_is_as_good_as_its_name(form, hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    assert download(form.format(hub.url), "there") == Path("there")
    assert sorted(path.name for path in Path("there").iterdir()) == NEEDED


@pytest.mark.parametrize("form", ["blob", "resolve"])
def test_the_page_of_a_file_gives_the_file(form, hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    assert download(f"{hub.url}/org/name/{form}/main/model.safetensors").read_bytes() == BODY


def test_addresses_of_hugging_face_are_understood(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    home = "https://huggingface.co"
    assert parse("meta-llama/Llama-3.2-1B") == parse(f"{home}/meta-llama/Llama-3.2-1B/") == Repository("meta-llama/Llama-3.2-1B")
    assert parse(f"{home}/org/name/tree/v1") == parse("org/name", "v1") == Repository("org/name", "v1")
    assert parse(f"{home}/org/name/blob/main/sub/a.pth").url == f"{home}/org/name/resolve/main/sub/a.pth"
    assert parse(f"{home}/datasets/org/name/resolve/main/a.txt").home is None
    assert parse("https://elsewhere.org/org/name").url == "https://elsewhere.org/org/name"


def test_large_files_are_resumed_and_checked(hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    blob = f"/blobs/{SHA256}"
    hub.pages[blob].cuts = [100_000, *[0] * 20]
    fails(lambda: download("org/name"), "100.0 kB are here")
    assert not Path("checkpoints/org/name").exists() and Path("checkpoints/org/name.part").is_dir()
    hub.pages[blob].cuts.clear()
    hub.log.clear()
    download("org/name")
    assert everything() == HERE
    assert "bytes=100000-" in hub.ranges(blob)
    assert hub.count(address("config.json")) == 0, "what had arrived is not fetched again"


def test_a_large_file_with_wrong_contents_is_refused(hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    hub.pages[f"/blobs/{SHA256}"].body = BODY[:-1] + b"!"
    fails(lambda: download("org/name"), "SHA-256")
    assert not Path("checkpoints/org/name").exists()
    assert not list(Path(".").rglob("model.safetensors*"))


def test_a_damaged_file_is_found_and_replaced_by_force(hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    download("org/name")
    Path("checkpoints/org/name/model.safetensors").write_bytes(BODY[:-1] + b"!")
    Path("checkpoints/org/name/mine.txt").write_text("kept")
    fails(lambda: download("org/name"), "model.safetensors exists with other contents", "--force")
    download("org/name", force=True)
    assert Path("checkpoints/org/name/model.safetensors").read_bytes() == BODY
    assert Path("checkpoints/org/name/mine.txt").read_text() == "kept"


def test_a_small_file_that_someone_changed_is_kept(hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    download("org/name")
    Path("checkpoints/org/name/config.json").write_text('{"model_type": "mine!"}')
    fails(lambda: download("org/name"), "config.json exists with other contents", "--force")
    assert Path("checkpoints/org/name/config.json").read_text() == '{"model_type": "mine!"}'
    Path("checkpoints/org/name/config.json").unlink()
    download("org/name")
    assert everything() == HERE


@pytest.mark.parametrize("sizes", [False, "never"])
def test_a_mirror_that_knows_less_still_serves(sizes, hub):
    """No sizes in the overview, or no other list either: then each file's own headers must do."""
    hub.repository("org/name", FILES, lfs=["model.safetensors"], sizes=sizes)
    if sizes == "never":
        for page in [path for path in hub.pages if "/tree/" in path]:
            del hub.pages[page]
    download("org/name")
    assert everything() == HERE
    download("org/name")
    hub.pages[f"/blobs/{SHA256}"].body = BODY[:-1] + b"!"
    Path("checkpoints/org/name/model.safetensors").unlink()
    fails(lambda: download("org/name"), "SHA-256")


def test_a_mirror_whose_small_hashes_are_no_git_ids(hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    tree = f"/api/models/org/name/tree/{hub.COMMIT}"
    entries = [{**entry, "oid": "0" * 40} for entry in json.loads(hub.pages[tree].body)]
    hub.put(tree, json.dumps(entries).encode(), headers={"Content-Type": "application/json"})
    for _ in range(2):
        download("org/name")
        assert everything() == HERE


def test_the_default_choice():
    def names(*paths, include=()):
        return [file.path for file in choose([File(path) for path in paths], include)]

    meta = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    bins = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    beside = ["config.json", "generation_config.json", "tokenizer.json"]
    assert names(*meta, "checklist.chk", "README.md") == meta
    assert names(*beside, *shards, *bins, "original/consolidated.00.pth") == sorted([*beside, *shards])
    assert names(*beside, *bins) == sorted([*beside, *bins])
    assert names(*beside, "model.safetensors", *bins, "tf_model.h5") == sorted([*beside, "model.safetensors"])
    assert names("llama.pth", "tokenizer.model") == ["llama.pth", "tokenizer.model"]
    both = ["llama3.2-1B.pth", "llama3.2-3B.pth", "tokenizer.model"]
    assert names(*both, include=["*1B*", "tokenizer.model"]) == [both[0], both[2]]
    for paths, include, word in (
        (both, (), "choose with --include"),
        (["model.gguf"], (), "no weights"),
        ([], (), "nothing"),
        (["pytorch_model.bin.index.json"], (), "no weights"),
        (meta, ["*.safetensors"], "matches no file"),
    ):
        with pytest.raises(InputError, match=word):
            names(*paths, include=include)


def test_a_repository_with_terms(hub, monkeypatch):
    hub.repository("org/name", {"config.json": b"{}", "model.safetensors": BODY}, gated="hf_granted")
    fails(lambda: download("org/name"), "org/name is gated: accept its terms at", "hf auth login", "HF_TOKEN")
    fails(lambda: download(f"{hub.url}/org/name/resolve/main/config.json"), "is gated")
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    fails(lambda: download("org/name"), "gated and your account has no access yet")
    assert everything() == []
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    assert download("org/name").is_dir()


@pytest.mark.parametrize("status", [401, 403])
def test_a_bare_refusal_of_the_list(status, hub):
    hub.put("/api/models/org/name/revision/main", status=status)
    fails(lambda: download("org/name"), "org/name", "hf auth login")
    assert everything() == []


def test_the_login_stays_with_its_server(hub, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    elsewhere = server.put("/blob", BODY).replace("127.0.0.1", "localhost")
    hub.pages[address("model.safetensors")].headers["Location"] = elsewhere
    download("org/name")
    sent = {path: headers.get("authorization") for path, headers in hub.log}
    assert sent[address("config.json")] == "Bearer hf_secret"
    assert [headers.get("authorization") for path, headers in server.log if path == "/blob"] == [None]
    download(server.put("/other.pth", BODY))
    assert "authorization" not in server.log[-1][1]


def test_what_is_not_there(hub):
    hub.repository("org/name", FILES)
    fails(lambda: download("org/nome"), "there is no repository org/nome", "private")
    fails(lambda: download("org/name", revision="v9"), "no branch, tag or commit 'v9'")
    fails(lambda: download(f"{hub.url}/org/name/resolve/main/absent.pth"), "no such file")
    assert everything() == []


def test_a_server_that_is_not_hugging_face(hub, monkeypatch):
    hub.put("/api/models/org/name/revision/main", PAGE)
    fails(lambda: download("org/name"), "does not answer as Hugging Face does")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fails(lambda: download("org/name"), "http://127.0.0.1:9 can't be reached")
    assert everything() == []


def test_offline_means_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(lambda: download("org/name"), "HF_HUB_OFFLINE is set")
    assert not hub.log


def test_a_file_name_that_points_elsewhere(hub):
    hub.repository("org/name", {"../../evil.json": b"{}", **FILES})
    fails(lambda: download("org/name", include=["*evil*"]), "points out of its folder")
    assert everything() == []


def test_no_room_for_a_repository(hub, monkeypatch):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    usage = web.shutil.disk_usage(".")
    monkeypatch.setattr(web.shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    fails(lambda: download("org/name"), "300.0 kB are still to come", "200.0 kB free")
    assert everything() == [], "it is known before the first file"


@pytest.mark.parametrize("name", ["requests", "huggingface_hub"])
def test_a_missing_package_gets_one_line(name, monkeypatch, server):
    monkeypatch.setitem(sys.modules, name, None)
    source = "org/name" if name == "huggingface_hub" else server.put("/model.pth", BODY)
    fails(lambda: download(source), f"pip install {name}")


# The command


def run(*words, capsys) -> tuple[int, str, str]:
    return main(["download", *map(str, words)]), *capsys.readouterr()


def one_line(result, *words) -> None:
    code, out, err = result
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(word in err for word in words), err


def test_the_command_prints_the_path(server, hub, capsys):
    assert run(server.put("/model.pth", BODY), "--sha256", SHA256, capsys=capsys) == (0, "model.pth\n", "")
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    code, out, err = run("org/name", capsys=capsys)
    assert (code, out) == (0, f"{Path('checkpoints/org/name')}\n")
    assert err == "org/name: 4 files, 300.0 kB to come\n"
    assert run("org/name", "--output", "there", "--include", "*.json", capsys=capsys)[:2] == (0, "there\n")
    assert [path.name for path in Path("there").iterdir()] == ["config.json"]


def test_a_mistake_gets_one_line(server, hub, capsys):
    url = server.put("/model.pth", PAGE)
    one_line(run(url, capsys=capsys), "web page")
    one_line(run(server.url + "/none", capsys=capsys), "404")
    one_line(run("org/none", capsys=capsys), "no repository org/none")
    one_line(run(url, "--convert", capsys=capsys), "--convert takes a repository")
    one_line(run("org/name", "--sha256", SHA256, capsys=capsys), "--sha256")
    one_line(run(url, "--revision", "v1", capsys=capsys), "--revision")
    one_line(run(url, "--include", "*.pth", capsys=capsys), "--include")
    one_line(run(capsys=capsys), "REPO_OR_URL")
    assert everything() == []


def test_ctrl_c_says_how_to_go_on(server, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(web, "blocks", interrupt)
    code, out, err = run(server.put("/model.pth", BODY), capsys=capsys)
    assert (code, out) == (130, "") and "the same command goes on" in err
    assert not Path("model.pth").exists()


# From a name to a folder that runs


def text_of(path: Path, capsys) -> str:
    """What the model in `path` writes, greedily."""
    flags = ["--prompt", "The old llama", "--max_new_tokens", "8", "--temperature", "0", "--device", "cpu"]
    assert main(["generate", "--checkpoint_path", str(path), *flags]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """The same kinds of checkpoint as they are published: safetensors, PyTorch's .bin, and Meta's layout."""
    import torch
    from safetensors.torch import load_file
    from small_llamas import write_llama2, write_llama3

    home = tmp_path_factory.mktemp("published")
    llama3 = write_llama3(home / "safetensors", 128)
    binary = home / "bin"
    binary.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (binary / name).write_bytes((llama3 / name).read_bytes())
    torch.save(load_file(llama3 / "model.safetensors"), binary / "pytorch_model.bin")
    return {"safetensors": llama3, "bin": binary, "meta": write_llama2(home / "meta", 128)}


def publish(hub, folder: Path, **more) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "training_log.json"}
    large = [name for name in files if name.endswith((".safetensors", ".bin", ".pth"))]
    hub.repository("org/name", files, lfs=large, **more)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "meta"])
def test_from_a_name_to_a_folder_that_runs(kind, originals, hub, capsys):
    publish(hub, originals[kind])
    folder, original = Path("checkpoints/org/name"), Path("checkpoints/org/name-original")
    code, out, err = run("org/name", "--convert", capsys=capsys)
    assert (code, out) == (0, f"{folder}\n"), err
    assert f"generate --checkpoint_path {folder}" in err
    assert {"config.json", "model.safetensors", "tokenizer.model"} == {path.name for path in folder.iterdir()}
    assert original.exists() == (kind != "safetensors")
    assert text_of(folder, capsys) == text_of(originals[kind], capsys)
    before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")}
    hub.log.clear()
    assert run("org/name", "--convert", capsys=capsys)[:2] == (0, f"{folder}\n")
    assert {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")} == before, "all is there already"
    assert not [path for path, _ in hub.log if "/resolve/" in path]


def test_what_was_downloaded_before_is_converted_now(originals, hub, capsys):
    publish(hub, originals["bin"])
    assert run("org/name", capsys=capsys)[0] == 0
    hub.log.clear()
    assert run("org/name", "--convert", capsys=capsys)[0] == 0
    assert not [path for path, _ in hub.log if "/resolve/" in path]
    assert Path("checkpoints/org/name/model.safetensors").exists()
    assert Path("checkpoints/org/name-original/pytorch_model.bin").exists()


def test_a_conversion_that_is_stopped_is_made_up_for(originals, hub, capsys, monkeypatch):
    publish(hub, originals["meta"])
    with monkeypatch.context() as patch:
        patch.setattr("llamabook.checkpoint.convert.write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("org/name", "--convert", capsys=capsys)[0] == 130
    assert not Path("checkpoints/org/name").exists()
    hub.log.clear()
    assert run("org/name", "--convert", capsys=capsys)[0] == 0
    assert not [path for path, _ in hub.log if "/resolve/" in path], "what was downloaded is used"
    assert Path("checkpoints/org/name/model.safetensors").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_architecture_that_we_lack_is_refused_before_its_weights_come(kind, originals, hub, capsys):
    config = json.loads((originals[kind] / "config.json").read_text()) | {"model_type": "mixtral"}
    files = {path.name: path.read_bytes() for path in originals[kind].iterdir()}
    files["config.json"] = json.dumps(config).encode()
    hub.repository("org/name", files, lfs=["model.safetensors", "pytorch_model.bin"])
    code, out, err = run("org/name", "--convert", capsys=capsys)
    assert (code, out) == (2, "") and "mixtral" in err.splitlines()[-1]
    assert not [path for path in hub.pages if path.startswith("/blobs/") and hub.count(path)]
    assert not list(Path("checkpoints").rglob("*.*"))


# Killed at any point


def start(*words: str, endpoint: str = "") -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    return subprocess.Popen(
        [sys.executable, "-m", "llamabook", "download", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows kills otherwise")
def test_after_a_kill_the_same_command_completes_the_file(server):
    url = server.put("/model.pth", BODY, pause=0.02, headers={"ETag": '"one"'})
    for enough in (20_000, 150_000):
        process = start(url)
        wait_for(lambda: sum(path.stat().st_size for path in Path(".").glob("*.part")) > enough, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not Path("model.pth").exists(), "a name stands for a whole file"
    server.pages["/model.pth"].pause = 0
    process = start(url)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (0, "model.pth\n", "")
    assert Path("model.pth").read_bytes() == BODY and everything() == ["model.pth"]
    assert int(server.ranges("/model.pth")[-1].strip("bytes=-")) > 150_000


@pytest.mark.skipif(sys.platform == "win32", reason="Windows kills otherwise")
def test_after_a_kill_the_same_command_completes_the_repository(hub):
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    blob = hub.pages[f"/blobs/{SHA256}"]
    blob.pause = 0.02
    process = start("org/name", endpoint=hub.url)
    wait_for(lambda: sum(path.stat().st_size for path in Path(".").rglob("*.safetensors.*.part")) > 50_000, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not Path("checkpoints/org/name").exists() and Path("checkpoints/org/name.part").is_dir()
    blob.pause = 0
    process = start("org/name", endpoint=hub.url)
    process.communicate(timeout=300)
    assert process.returncode == 0 and everything() == HERE
    assert hub.ranges(f"/blobs/{SHA256}")[-1] is not None


class Killed(BaseException):
    """Stands for a kill between two steps: nothing of ours can catch it."""


@pytest.mark.parametrize("step", range(1, 15))
def test_a_stop_between_any_two_steps_is_made_up_for(step, hub, monkeypatch):
    """Every call that changes a file is a place to stop; a second run must find its way from there."""
    hub.repository("org/name", FILES, lfs=["model.safetensors"])
    count = 0

    def stopping(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "fsync", "open"):
            patch.setattr(web.os, name, stopping(getattr(os, name)))
        try:
            download("org/name")
            assert step > count
        except Killed:
            pass
    complete = Path("checkpoints/org/name")
    assert not complete.exists() or sorted(path.name for path in complete.iterdir()) == NEEDED
    download("org/name")
    assert everything() == HERE
    assert all(Path("checkpoints/org/name", name).read_bytes() == FILES[name] for name in NEEDED)


def test_fetch_is_there_for_scripts(server):
    assert fetch(server.put("/model.pth", BODY), "a/b.pth", sha256=SHA256, size=len(BODY)) == Path("a/b.pth")
    fails(lambda: fetch(server.url + "/model.pth", "c.pth", size=5), "300000 bytes and should have 5")
    Path("folder").mkdir()
    fails(lambda: fetch(server.url + "/model.pth", "folder"), "is a folder")
