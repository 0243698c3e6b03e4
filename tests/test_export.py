"""tools/export.py: what it writes, and that it refuses, in one line each, whatever would let page and package drift."""

import ast
import subprocess
import sys
from pathlib import Path

import export
import pytest
from made_up import code, markdown, save

ROOT = Path(__file__).resolve().parents[1]
HAND = '"""Written by hand."""\n'


@pytest.fixture
def book(tmp_path):
    """An empty book: a package with a hand-written __init__."""
    package = tmp_path / "pkg" / "llamabook"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(HAND)
    return tmp_path


def page(book: Path, *sources: str, name: str = "ch01_a/01_first.ipynb") -> Path:
    return save(book / name, *[code(source) for source in sources])


def run(book: Path, capsys, *arguments: str) -> tuple[int, list[str]]:
    """Exit code of export.py and the lines that it complains with."""
    status = export.main([*arguments, "--root", str(book)])
    return status, capsys.readouterr().err.splitlines()


def exported(book: Path, name: str = "m.py") -> str:
    return (book / "pkg" / "llamabook" / name).read_text()


def complaint(book: Path, capsys) -> str:
    """The one line with which export.py refuses a book, in both modes, writing no m.py."""
    status, lines = run(book, capsys, "--check")
    again, same = run(book, capsys)
    assert (status, again) == (1, 1) and lines == same
    assert len(lines) == 1, lines
    assert not (book / "pkg" / "llamabook" / "m.py").exists()
    return lines[0]


# ---------------------------------------------------------------- what is written


def test_a_module_reads_as_if_written_by_hand(book, capsys):
    page(
        book,
        "#| export m.py\n"
        "import math\n"
        "# the norm is ours, so nn is all we need\n"
        "from torch import nn\n"
        "\n"
        "LIMIT = 3\n"
        "SMALL = 1\n"
        "\n\n\n\n"
        "# Two roads to the same place.\n"
        "def f(x):\n"
        '    """Doc.\n\n    Shape: any.\n    """\n'
        "    return math.sqrt(x)\n"
        "    # the end of f\n"
        "def g(x: nn.Module):\n"
        "    return LIMIT",
        "print('not exported')",
        "#| export m.py\n"
        "import torch\n"
        "from torch import Tensor\n"
        "from llamabook.errors import InputError\n"
        "from collections.abc import Callable\n"
        "import os, sys\n"
        "\n"
        "@torch.no_grad()\n"
        "def h(x: Tensor, call: Callable):\n"
        "    raise InputError(os.sep + sys.byteorder)\n"
        "TABLE = {'f': f}",
    )
    assert run(book, capsys) == (0, [])
    assert exported(book) == '''"""From the notebook ch01_a/01_first.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import math
import os
import sys
from collections.abc import Callable

import torch
# the norm is ours, so nn is all we need
from torch import Tensor, nn

from llamabook.errors import InputError

LIMIT = 3
SMALL = 1


# Two roads to the same place.
def f(x):
    """Doc.

    Shape: any.
    """
    return math.sqrt(x)
    # the end of f


def g(x: nn.Module):
    return LIMIT


@torch.no_grad()
def h(x: Tensor, call: Callable):
    raise InputError(os.sep + sys.byteorder)


TABLE = {'f': f}
'''
    assert run(book, capsys, "--check") == (0, [])


def test_imports_are_merged_and_keep_their_comments(book, capsys):
    names = [f"quite_a_long_name_{letter}" for letter in "dbcae"]
    page(
        book,
        "#| export m.py\nfrom __future__ import annotations\n"
        "import numpy as np  # arrays\n"
        "from torch import nn\nfrom torch import Tensor, nn\nfrom torch import compile as build  # may be missing",
        "#| export m.py\nimport numpy as np\nfrom elsewhere import (\n"
        + "".join(f"    {name},\n" for name in names)
        + ")\ndef f() -> Tensor: return np, nn, build, "
        + ", ".join(names),
    )
    assert run(book, capsys) == (0, [])
    head = exported(book).split('"""\n\n', 1)[1].split("\n\n\n")[0]
    assert head == (
        "from __future__ import annotations\n\n"
        "import numpy as np  # arrays\n"
        "from elsewhere import (\n" + "".join(f"    {name},\n" for name in sorted(names)) + ")\n"
        "from torch import Tensor, compile as build, nn  # may be missing"
    )


def test_subfolders_reading_order_and_what_is_left_out(book, capsys):
    folder = book / "pkg" / "llamabook" / "tokenizer"
    folder.mkdir()
    (folder / "__init__.py").write_text(HAND)
    page(book, "#| export tokenizer/llama2.py\nA = 1", "#| export m.py\nB = 2", "#| export tokenizer/llama2.py\nC = 3")
    page(book, "#| export late.py\nZ = 1", name="ch02_b/deeper/01_x.ipynb")
    page(book, "#| export m.py\nthis is no code", name="ch01_a/.ipynb_checkpoints/01_first-checkpoint.ipynb")
    page(book, "#| export nowhere.py\nA = 1", name="docs/01_x.ipynb")
    assert run(book, capsys) == (0, [])
    assert exported(book, "tokenizer/llama2.py").endswith('"""\n\nA = 1\n\nC = 3\n')
    assert exported(book).endswith("B = 2\n") and exported(book, "late.py").endswith("Z = 1\n")
    assert not (book / "pkg" / "llamabook" / "nowhere.py").exists()


def test_unchanged_modules_are_not_touched_and_no_temporary_file_stays(book, capsys):
    page(book, "#| export m.py\nA = 1")
    run(book, capsys)
    module = book / "pkg" / "llamabook" / "m.py"
    before = module.stat().st_mtime_ns
    run(book, capsys)
    assert module.stat().st_mtime_ns == before
    assert sorted(p.name for p in module.parent.iterdir()) == ["__init__.py", "m.py"]


def test_a_faulty_notebook_does_not_hold_up_the_others(book, capsys):
    page(book, "#| export m.py\nA = 1", "#| exprot m.py\nB = 2")
    page(book, "#| export sound.py\nA = 1", name="ch01_a/02_second.ipynb")
    status, lines = run(book, capsys)
    assert status == 1 and len(lines) == 1 and "01_first.ipynb, cell 2" in lines[0]
    assert "A = 1" in exported(book, "sound.py")
    assert not (book / "pkg" / "llamabook" / "m.py").exists()


# ---------------------------------------------------------------- stale, missing, stray


def test_stale_and_missing_modules_fail_the_check_only(book, capsys):
    page(book, "#| export m.py\nA = 1")
    status, lines = run(book, capsys, "--check")
    assert status == 1 and lines == ["export: pkg/llamabook/m.py: missing; run python tools/export.py"]
    assert not (book / "pkg" / "llamabook" / "m.py").exists()
    run(book, capsys)
    module = book / "pkg" / "llamabook" / "m.py"
    module.write_bytes(module.read_bytes() + b"\n")  # one byte
    status, lines = run(book, capsys, "--check")
    assert status == 1 and len(lines) == 1 and "m.py: stale" in lines[0]
    assert run(book, capsys) == (0, []) and run(book, capsys, "--check") == (0, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('"""From x.\n\nWritten by tools/export.py: edit the notebook."""\n', "no notebook exports it any more"),
        ('"""A helper."""\n', "doesn't say `written by hand`"),
        ("A = 1\n", "doesn't say `written by hand`"),
        ("def f(:\n", "does not parse"),
    ],
)
@pytest.mark.parametrize("name", ["left.py", "sub/left.py", "sub/__init__.py"])
def test_strays_fail(book, capsys, text, reason, name):
    path = book / "pkg" / "llamabook" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    line = complaint(book, capsys)
    assert f"pkg/llamabook/{name}: " in line and reason in line


@pytest.mark.parametrize("words", ["Written by hand.", "This one is written by\nhand, too.", "A hand-written switch."])
def test_handwritten_modules_pass(book, capsys, words):
    (book / "pkg" / "llamabook" / "mine.py").write_text(f'"""{words}"""\n')
    assert run(book, capsys, "--check") == (0, [])


def test_an_exported_subfolder_needs_its_init(book, capsys):
    page(book, "#| export tokenizer/llama2.py\nA = 1")
    status, lines = run(book, capsys)
    assert status == 1 and len(lines) == 1 and "tokenizer/__init__.py: missing" in lines[0]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "source",
    [
        "#|export m.py\nA = 1",
        "# | export m.py\nA = 1",
        "#| exprot m.py\nA = 1",
        "#| export  m.py\nA = 1",
        "#| export m.py \nA = 1",
        "#| Export m.py\nA = 1",
        "#| export: m.py\nA = 1",
        "#| export\nA = 1",
        "#| exports m.py\nA = 1",
        "##| export m.py\nA = 1",
        "# export m.py\nA = 1",
        "%%export m.py\nA = 1",
        "#| hide\nA = 1",
        "\n#| export m.py\nA = 1",
        "# a comment\n#| export m.py\nA = 1",
        "#| export m.py\n#| export other.py\nA = 1",
        "A = 1\n    #| export m.py",
    ],
)
def test_misspelt_directives_fail(book, capsys, source):
    page(book, "A = 1  # fine", source)
    line = complaint(book, capsys)
    assert "ch01_a/01_first.ipynb, cell 2: misspelt or misplaced directive" in line


@pytest.mark.parametrize("source", ["# |x| is small\nA = 1", "# we export nothing here\nA = 1", "A = 1  # | export"])
def test_ordinary_comments_are_no_directives(book, capsys, source):
    page(book, source)
    assert run(book, capsys, "--check") == (0, [])


def test_a_directive_in_a_markdown_cell_fails(book, capsys):
    save(book / "ch01_a/01_first.ipynb", markdown("#| export m.py\ndef f(): pass"))
    assert "misspelt or misplaced" in complaint(book, capsys)


@pytest.mark.parametrize(
    "name", ["../m.py", "a/../../m.py", "/etc/m.py", "m", "m.txt", "m.py.bak", "a//m.py", "./m.py", "1m.py", "class.py"]
)
def test_paths_outside_the_package_fail(book, capsys, name):
    page(book, f"#| export {name}\nA = 1")
    assert "is no module path" in complaint(book, capsys)
    assert not list(book.rglob("m*.*")) and not (book.parent / "m.py").exists()


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        (["#| export m.py\ndef f(): pass", "#| export m.py\ndef f(): pass"], "`f` is defined twice in m.py"),
        (["#| export m.py\nclass A: pass\nA = 1"], "`A` is defined twice in m.py"),
        (["#| export m.py\nimport math\nmath = 1"], "`math` is defined twice in m.py: first in an import"),
        (["#| export m.py\nA, B = 1, 2", "#| export m.py\nif A:\n    B = 3"], "`B` is defined twice"),
        (["#| export m.py\nfrom a import x", "#| export m.py\nfrom b import x"], "`x` is imported as a.x and as b.x"),
        (["#| export m.py\nimport\nA = 1"], "does not parse, line 2"),
        (["#| export m.py\nfrom x import (a,\nA = 1"], "does not parse"),
        (["#| export m.py\ndef f(:\n    pass"], "does not parse"),
        (["#| export m.py\nimport os; A = 1"], "give an import a line of its own"),
        (["#| export m.py\nfrom x import *"], "hides where names come from"),
        (["#| export m.py\nfrom .x import a"], "relative import"),
        (["#| export m.py\n%matplotlib inline\nA = 1"], "a magic or shell line can't be exported: `%matplotlib inline`"),
        (["#| export m.py\n!ls\nA = 1"], "`!ls`"),
        (["#| export m.py\nA = !ls"], "`A = !ls`"),
        (["#| export m.py\nA = %time 1"], "`A = %time 1`"),
        (["#| export m.py\nA = 1\nA?"], "`A?`"),
        (["#| export m.py\ndef f():\n    get_ipython().run_line_magic('time', '')"], "`get_ipython`"),
        (["#| export m.py\ndef f():\n    # BEGIN SOLUTION\n    pass\n    # END SOLUTION"], "SOLUTION marker"),
        (["#| export m.py\ndef f(): pass\nprint(f())"], "`print(f())` would run on import"),
        (["#| export m.py\nA = 1\nassert A"], "would run on import"),
        (["#| export m.py"], "exports nothing"),
        (["#| export m.py\n# to do"], "exports nothing"),
        (["import math", "#| export m.py\ndef f(x):\n    return math.sqrt(x)"], "m.py uses `math`"),
        (["#| export m.py\nclass A:\n    def f(self) -> Tensor: ..."], "m.py uses `Tensor`"),
        (["#| export __init__.py\nA = 1"], "written by hand"),
    ],
)
def test_what_has_no_place_in_a_package_fails(book, capsys, sources, reason):
    page(book, *sources)
    line = complaint(book, capsys)
    assert reason in line and "ch01_a/01_first.ipynb" in line


@pytest.mark.parametrize("second", ["def g(): pass", "def f(): pass"])
def test_one_notebook_owns_a_module(book, capsys, second):
    page(book, "#| export other.py\ndef f(): pass")
    page(book, f"#| export other.py\n{second}", name="ch01_a/02_second.ipynb")
    status, lines = run(book, capsys)
    assert status == 1 and len(lines) == 1
    assert "02_second.ipynb, cell 1: other.py is exported by ch01_a/01_first.ipynb already" in lines[0]


def test_exercise_notebooks_export_nothing(book, capsys):
    page(book, "#| export m.py\nA = 1", name="ch01_a/04_exercises_solutions.ipynb")
    assert "an exercise notebook exports nothing" in complaint(book, capsys)


def test_a_module_and_a_folder_of_its_name_fail(book, capsys):
    (book / "pkg/llamabook/m").mkdir()
    (book / "pkg/llamabook/m/__init__.py").write_text(HAND)
    page(book, "#| export m.py\nA = 1", "#| export m/x.py\nA = 1")
    assert "hide each other" in complaint(book, capsys)


def test_a_file_that_is_no_notebook_fails(book, capsys):
    (book / "ch01_a").mkdir()
    (book / "ch01_a/01_first.ipynb").write_text("<html>")
    assert "01_first.ipynb: not a notebook" in complaint(book, capsys)


def test_names_that_are_no_globals_are_understood(book, capsys):
    page(
        book,
        "#| export m.py\n"
        "_cache = None\n"
        "def f(n, *rest, **more):\n"
        "    global _cache, _late\n"
        "    _cache = _late = [x + n for x in rest if (y := x)]\n"
        "    def inner():\n"
        "        nonlocal n\n"
        "        n += 1\n"
        "        return __name__, lambda z: z + n\n"
        "    return inner, _late, len(more)\n"
        "class A:\n"
        "    size = 3\n"
        "    def g(self):\n"
        "        try:\n            return super().g(), __class__, later()\n"
        "        except ValueError as error:\n            return error\n"
        "def later(): ...",
    )
    assert run(book, capsys) == (0, [])
    ast.parse(exported(book))


# ---------------------------------------------------------------- the book itself


def test_the_book_and_its_package_agree():
    done = subprocess.run([sys.executable, "tools/export.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_function_or_class_stands_twice_in_the_package():
    """A body of some length that occurs in two modules should be imported by one from the other."""
    seen, twice = {}, []
    for path in sorted((ROOT / "pkg" / "llamabook").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                key = ast.dump(ast.Module(body=body, type_ignores=[]))
                if sum(1 for inner in body for _ in ast.walk(inner)) < 60:
                    continue
                where = f"{path.relative_to(ROOT).as_posix()}: {node.name}"
                if key in seen:
                    twice.append(f"{seen[key]} = {where}")
                seen.setdefault(key, where)
    assert not twice, "\n".join(twice)
