"""tools/run_notebooks.py: the same bytes on every run, and no file changed by a run that failed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_notebooks
import nbformat
import pytest
import run_notebooks
from made_up import code, markdown, notebook, save

ROOT = Path(__file__).resolve().parents[1]


def run(root: Path, *paths: Path, **options) -> int:
    flags = [f"--{name}={value}" if value is not True else f"--{name}" for name, value in options.items()]
    return run_notebooks.main([*flags, "--root", str(root), *map(str, paths)])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A notebook with every kind of cell, as stored by a first run."""
    root = tmp_path_factory.mktemp("book")
    package = root / "pkg" / "llamabook"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("here = 'this package'")
    picture = "import base64\nfrom IPython.display import Image, display\npixel = base64.b64decode('iVBORw0KGgo=')"
    path = save(
        root / "ch01_a" / "01_first.ipynb",
        markdown("# A page"),
        code("1 + 1", count=7),
        code("open('/nowhere/weights')", tags=["nbval-skip"], count=3),
        code("import time\nprint(time.perf_counter())", tags=["nbval-ignore-output"]),
        code(f"{picture}\ndisplay(Image(pixel, format='png', alt='one pixel'))"),
        code("import json\njson.loads('{')", tags=["raises-exception"]),
        code("from pathlib import Path\nprint(Path('01_first.ipynb').exists())\nprint('one'); print('two')"),
        code("import llamabook\nllamabook.here"),
    )
    raw = json.loads(path.read_text())
    raw["metadata"]["widgets"] = {"state": {}}
    raw["metadata"]["language_info"] = {"name": "python", "version": "3.9.1"}
    raw["cells"][1]["metadata"] = {"execution": {"iopub.execute_input": "2026-01-01"}, "scrolled": True}
    del raw["cells"][3]["id"]
    raw["cells"][4]["id"] = raw["cells"][5]["id"]
    path.write_text(json.dumps(raw))
    assert run(root, path) == 0
    return path


def outputs(path: Path) -> list[list[dict]]:
    return [cell["outputs"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_what_is_stored(page):
    raw = json.loads(page.read_text())
    cells = [cell for cell in raw["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [1, 2, 3, 4, 5, 6, 7]
    result, skipped, timing, image, error, streams, own = outputs(page)
    assert result[0]["data"]["text/plain"] == ["2"] and result[0]["execution_count"] == 1
    assert skipped == [] and len(timing) == 1
    assert image[0]["metadata"]["image/png"]["alt"] == "one pixel"
    assert streams[0]["text"] == ["True\n", "one\n", "two\n"]  # it runs in the notebook's folder
    assert own[0]["data"]["text/plain"] == ["'this package'"]  # pkg/ is on the path
    assert error[0]["ename"] == "JSONDecodeError"
    traceback = "\n".join(error[0]["traceback"])
    assert "\x1b" not in traceback and "File lib/python/json/" in traceback
    assert len({cell["id"] for cell in raw["cells"]}) == len(raw["cells"])
    nb = check_notebooks.Notebook(raw)
    for rule in ("execution_counts", "clean_metadata", "stable_outputs", "no_private_paths", "errors_are_meant"):
        assert list(getattr(check_notebooks, rule)(nb)) == []


def test_a_second_run_gives_the_same_bytes(page, capsys):
    before = page.read_bytes()
    root = page.parents[1]
    assert run(root, page.parent) == 0
    assert page.read_bytes() == before
    assert "ignored outputs, which are kept" in capsys.readouterr().out
    assert sorted(p.name for p in page.parent.iterdir()) == [page.name]


def test_an_edit_elsewhere_stores_ignored_outputs_anew(page, tmp_path):
    shutil.copytree(page.parents[1], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ch01_a" / page.name
    path.write_text(page.read_text().replace("1 + 1", "2 + 1"))
    assert run(tmp_path, path) == 0
    result, _, timing, *_ = outputs(path)
    assert result[0]["data"]["text/plain"] == ["3"] and timing != outputs(page)[2]


def test_check_tells_of_a_stale_output_and_writes_nothing(page, tmp_path, capsys):
    shutil.copytree(page.parents[1], tmp_path, dirs_exist_ok=True)
    stale = tmp_path / "ch01_a" / page.name
    stale.write_text(page.read_text().replace('"2"', '"3"'))
    before = stale.read_bytes()
    assert run(tmp_path, stale, check=True) == 1
    assert stale.read_bytes() == before
    assert "ch01_a/01_first.ipynb, a re-run differs in cell 2 (`1 + 1`)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (code("x = 1\nundefined + x"), "cell 2 (`x = 1`): NameError: name 'undefined' is not defined"),
        (code("import warnings\nwarnings.warn('careful')"), "writes to stderr"),
        (code("import os\nos._exit(1)"), "the kernel died"),
        (code("import time\ntime.sleep(60)"), "ran longer than 1 s"),
    ],
)
def test_a_run_that_fails_leaves_the_file_and_says_why(tmp_path, capsys, cell, reason):
    path = save(tmp_path / "ch01_a" / "01_bad.ipynb", markdown("# Bad"), cell)
    before = path.read_bytes()
    assert run(tmp_path, path, timeout=1) == 1
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("run_notebooks: ch01_a/01_bad.ipynb, cell 2 (") and reason in lines[0]


@pytest.mark.parametrize(
    ("output", "tags", "reason"),
    [
        ({"output_type": "stream", "name": "stdout", "text": f"{ROOT}/pkg"}, [], "shows a path of this machine"),
        ({"output_type": "stream", "name": "stdout", "text": f"in {Path.home()}"}, [], "shows a path of this machine"),
        ({"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": "<svg/>"}}, [], "shows an SVG"),
        ({"output_type": "stream", "name": "stdout", "text": "fine"}, ["raises-exception"], "raises nothing"),
        ({"output_type": "stream", "name": "stderr", "text": "1%"}, ["nbval-ignore-output"], "writes to stderr: 1%"),
    ],
)
def test_outputs_that_may_not_be_stored(output, tags, reason):
    cells = markdown("# A"), code("f()", tags=tags, count=1, outputs=[output])
    nb = nbformat.reads(json.dumps(notebook(*cells)), as_version=4)
    with pytest.raises(run_notebooks.RunError, match=re.escape(reason)) as error:
        run_notebooks.finish(nb, ROOT)
    assert str(error.value).startswith("cell 2 (`f()`)")


def test_paths_and_colours_of_a_machine_are_taken_out():
    text = (
        "\x1b[31mFile /home/me/book/pkg/llamabook/llama2.py:7, in f\x1b[39m\n"
        "File ~/venv/lib/python3.12/site-packages/torch/nn/modules/linear.py:125\n"
        "File /usr/lib/python3.12/json/decoder.py:3\n"
        "File /tmp/ipykernel_123/456.py:1"
    )
    assert run_notebooks.normalize_text(text, Path("/home/me/book")) == (
        "File pkg/llamabook/llama2.py:7, in f\n"
        "File site-packages/torch/nn/modules/linear.py:125\n"
        "File lib/python/json/decoder.py:3\n"
        "File Cell:1"
    )


def test_what_is_found(tmp_path, capsys):
    for name in ("02_b", "01_a", "03_exercises", "03_exercises_solutions", ".ipynb_checkpoints/01_a-checkpoint"):
        save(tmp_path / "ch01_a" / f"{name}.ipynb")
    names = [path.name for path in run_notebooks.find([tmp_path / "ch01_a"])]
    assert names == ["01_a.ipynb", "02_b.ipynb", "03_exercises_solutions.ipynb"]
    assert run(tmp_path, tmp_path / "ch01_a" / "03_exercises.ipynb") == 1
    assert "a student notebook isn't executed" in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "none.ipynb") == 1
    assert "no such notebook" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path, tmp_path / "empty") == 1
    assert "no notebook in" in capsys.readouterr().err
    (tmp_path / "x.ipynb").write_text("<html>")
    assert run(tmp_path, tmp_path / "x.ipynb") == 1
    assert "x.ipynb, not a notebook" in capsys.readouterr().err


@pytest.mark.long
def test_the_whole_book_runs_twice_to_the_same_bytes(tmp_path):
    """`make check-long`: every page, executed in a copy, gives what is stored, byte for byte."""
    for name in ["pkg", "tools", *(p.name for p in ROOT.glob("ch[0-9][0-9]_*"))]:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    chapters = sorted(p.name for p in tmp_path.glob("ch[0-9][0-9]_*") if list(p.glob("*.ipynb")))
    assert chapters
    command = [sys.executable, "tools/run_notebooks.py", "--check", *chapters]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
