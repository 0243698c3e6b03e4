"""Every notebook of the book keeps the book's rules, and every rule fires on a notebook that breaks it."""

import copy
import json
import re
from pathlib import Path

import check_notebooks as rules
import pytest
from made_up import code, markdown, notebook

ROOT = Path(__file__).resolve().parents[1]
BOOK = rules.find(ROOT)
NAME = re.compile(r"\d\d_[a-z0-9_]+\.ipynb")


# ---------------------------------------------------------------- the book


def test_there_is_a_book():
    assert [path for path in BOOK if "_exercises" not in path.name]


@pytest.mark.parametrize("path", BOOK, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_page_keeps_the_rules(path):
    found = rules.offences(rules.Notebook.read(path))
    assert not found, "\n" + "\n".join(found)


def test_pages_are_numbered_in_reading_order():
    for chapter in {path.parent for path in BOOK}:
        names = [path.name for path in BOOK if path.parent == chapter and not path.name.endswith("_exercises.ipynb")]
        assert all(NAME.fullmatch(name) for name in names), names
        assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1)), names
        for name in names:
            if name.endswith("_exercises_solutions.ipynb"):
                assert (chapter / name.replace("_solutions", "")).exists()


# ---------------------------------------------------------------- the rules

OPENING = "# A page\n\n**Goal**: to see. **Prerequisites**: none. About 5 minutes, 200 MB of memory."
CLOSING = (
    "## Recap\n\nWe saw.\n\n## Quiz\n\n<details><summary>Why?</summary>So.</details>\n\n"
    "## Exercises\n\nNone.\n\n## What went into the package\n\nNothing."
)
PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBO"}, "metadata": {"image/png": {"alt": "a line"}}}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": ["ValueError: no"]}


def result(text: str, count: int) -> dict:
    return {"output_type": "execute_result", "data": {"text/plain": text}, "metadata": {}, "execution_count": count}


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def good() -> dict:
    """A page that keeps every rule."""
    return notebook(
        markdown(OPENING),
        code("import torch\n1 + 1", count=1, outputs=[result("2", 1)]),
        markdown("What is `x!` before the run? In math, $n!$.\n\n![a llama](https://example.org/x.png)"),
        code("open('7B')", tags=["nbval-skip"], count=2),
        code("show(figure)", count=3, outputs=[PICTURE]),
        code("print(';')  # a semicolon; inside", count=4, outputs=[printed("a/b/home/x 0x1f\n")]),
        code("raise ValueError('no')", tags=["raises-exception"], count=5, outputs=[ERROR]),
        markdown(CLOSING),
    )


def student() -> dict:
    stub = 'def f(x):\n    raise NotImplementedError("exercise norm: write your code here")'
    return notebook(markdown(OPENING), code(stub, tags=["exercise:norm"]), code("check_norm(f)", tags=["check:norm"]))


STUDENT_PATH = Path("ch01_a/04_exercises.ipynb")


def changed(make, number: int | None = None, append: dict | None = None, **changes) -> dict:
    """A fresh notebook from `make`, with keys of one cell (from 1) changed or a cell put before the last."""
    raw = copy.deepcopy(make())
    if number:
        raw["cells"][number - 1].update(changes)
    else:
        raw.update(changes)
    if append:
        raw["cells"].insert(-1, {**append, "id": "new"})
    return raw


def test_a_good_page_and_a_good_student_page_keep_every_rule():
    assert rules.offences(rules.Notebook(good())) == []
    assert rules.offences(rules.Notebook(student(), STUDENT_PATH)) == []


def many(tag: str, marked: int, total: int) -> dict:
    cells = [code("1", tags=[tag] if number < marked else []) for number in range(total)]
    return notebook(markdown(OPENING), *cells)


LONG = "\n".join(f"x{n} = {n}" for n in range(26))
CLASS = "class A:\n" + "\n".join(f"    x{n} = {n}" for n in range(40))
BROKEN = [
    ("execution_counts", changed(good, 2, execution_count=None), "count None instead of 1"),
    ("execution_counts", changed(good, 5, execution_count=4), "count 4 instead of 3"),
    ("execution_counts", changed(good, 2, execution_count=2), "count 2 instead of 1"),
    ("execution_counts", changed(good, 2, outputs=[result("2", 9)]), "its result {9}"),
    ("execution_counts", changed(good, 2, source=" \n"), "is empty"),
    ("execution_counts", changed(good, 4, execution_count=None), "count None instead of 2"),
    ("execution_counts", changed(good, 4, outputs=[printed("x")]), "tagged nbval-skip but holds"),
    ("no_stderr", changed(good, 2, outputs=[printed("a warning", "stderr")]), "a warning"),
    ("no_svg", changed(good, 2, outputs=[{**PICTURE, "data": {"image/svg+xml": "<svg/>"}}]), "cell 2"),
    ("no_svg", changed(good, 2, outputs=[{**PICTURE, "data": {"text/html": ["<div><svg></svg>"]}}]), "cell 2"),
    ("no_svg", changed(good, 3, source="<svg width='3'></svg>"), "cell 3"),
    ("no_svg", changed(good, 3, attachments={"a.svg": {"image/svg+xml": "x"}}), "cell 3"),
    ("no_trailing_semicolon", changed(good, 2, source="x = 1\nx;"), "line 2 ends with `;`"),
    ("no_trailing_semicolon", changed(good, 2, source="x;  # quiet"), "line 1 ends with `;`"),
    ("no_trailing_semicolon", changed(good, 2, source="x = 1;\ny = 2"), "line 1 ends with `;`"),
    ("no_trailing_semicolon", changed(good, 2, source="%time f();"), "ends with `;`"),
    ("no_trailing_semicolon", changed(good, 2, source="def f(:\n  x;"), "ends with `;`"),
    ("tag_budget", many("nbval-ignore-output", 3, 20), "3 of 20"),
    ("tag_budget", many("nbval-skip", 4, 30), "4 of 30"),
    ("known_tags", changed(good, 2, metadata={"tags": ["nbval-ignore-outputs"]}), "nbval-ignore-outputs"),
    ("known_tags", changed(good, 2, metadata={"tags": ["raise-exception"]}), "raise-exception"),
    ("known_tags", changed(good, 2, source="# NBVAL_IGNORE_OUTPUT\n1"), "make it a tag"),
    ("errors_are_meant", changed(good, 2, outputs=[ERROR]), "isn't tagged"),
    ("errors_are_meant", changed(good, 7, outputs=[]), "stores no error"),
    ("one_title", changed(good, 1, source="## A page"), "doesn't open with a title"),
    ("one_title", changed(good, 1, cell_type="code"), "doesn't open with a title"),
    ("one_title", changed(good, 3, source="Words.\n\n# Another"), "has 2 titles"),
    ("one_title", changed(good, 3, source="Another\n======="), "has 2 titles"),
    ("one_title", notebook(), "doesn't open with a title"),
    ("opening", changed(good, 1, source=OPENING.replace("Goal", "Aim")), "its goal"),
    ("opening", changed(good, 1, source=OPENING.replace("Prerequisites", "x")), "its prerequisites"),
    ("opening", changed(good, 1, source=OPENING.replace("minutes", "hours")), "how many minutes"),
    ("opening", changed(good, 1, source=OPENING.replace("memory", "disk")), "how much memory"),
    ("closing", changed(good, 8, source=CLOSING.replace("Recap", "x")), "`recap`"),
    ("closing", changed(good, 8, source=CLOSING.replace("Quiz", "x")), "`quiz`"),
    ("closing", changed(good, 8, source=CLOSING.replace("details", "x")), "`<details`"),
    ("closing", changed(good, 8, source=CLOSING.replace("Exercises", "x")), "`exercise`"),
    ("closing", changed(good, 8, source=CLOSING.replace("package", "x")), "`package`"),
    ("alt_text", changed(good, 5, outputs=[{**PICTURE, "metadata": {}}]), "image without alt"),
    ("alt_text", changed(good, 5, outputs=[{**PICTURE, "metadata": {"image/png": {"alt": " "}}}]), "without alt"),
    ("alt_text", changed(good, 3, source="![](x.png)"), "image without alt"),
    ("alt_text", changed(good, 3, source='<img src="x.png">'), "image without alt"),
    ("alt_text", changed(good, 3, source='<img src="x.png" alt="">'), "image without alt"),
    ("cell_length", changed(good, 2, source=LONG), "has 26 lines, 25 at most"),
    ("cell_length", changed(good, 2, source=CLASS), "has 41 lines, 40 at most"),
    ("cell_length", changed(good, 2, source="x = 1  # " + "x" * 112), "121 characters, 120 at most"),
    ("cell_length", changed(good, 2, source="#| export m.py\nx = 1  # " + "x" * 102), "111 characters, 110 at most"),
    ("no_private_paths", changed(good, 2, source="open('/home/me/x')"), "`/home/me/x"),
    ("no_private_paths", changed(good, 3, source="See /Users/me/book."), "`/Users/me"),
    ("no_private_paths", changed(good, 2, outputs=[printed("in /tmp/abc")]), "`/tmp/abc"),
    ("no_private_paths", changed(good, 7, outputs=[{**ERROR, "traceback": ["File C:\\Users\\me"]}]), "C:\\Users"),
    ("stable_outputs", changed(good, 2, outputs=[printed("<A object at 0x7f1e5c0b2d90>")]), "memory address"),
    ("stable_outputs", changed(good, 7, outputs=[{**ERROR, "traceback": ["\x1b[31mno"]}]), "colour codes"),
    ("clean_metadata", changed(good, 2, metadata={"execution": {}}), "stores `execution`"),
    ("clean_metadata", changed(good, 2, metadata={"scrolled": True}), "stores `scrolled`"),
    ("clean_metadata", changed(good, 2, id="cell-001"), "the same id"),
    ("clean_metadata", changed(good, metadata={"kernelspec": {"name": "my-env"}}), "its kernel"),
    ("clean_metadata", changed(good, metadata={**good()["metadata"], "widgets": {}}), "state of widgets"),
    ("clean_metadata", changed(good, metadata={**good()["metadata"], "language_info": {"version": "3"}}), "the Python version"),
    ("clean_metadata", changed(good, nbformat_minor=4), "format 4.5"),
    ("readers_imports", changed(good, 2, source="import seaborn as sns"), "imports seaborn"),
    ("readers_imports", changed(good, 2, source="def f():\n    from pandas.io import x"), "imports pandas"),
    ("folds_close", changed(good, 3, source="<details><summary>a</summary>b"), "</details>"),
    ("folds_close", changed(good, 3, source="<details>b</details>"), "<summary>"),
    ("voice", changed(good, 3, source="It is simply x."), "simply"),
    ("voice", changed(good, 3, source="Obviously, it works."), "Obviously"),
    ("voice", changed(good, 3, source="It works!"), "exclaims"),
]


@pytest.mark.parametrize(("rule", "raw", "reason"), BROKEN, ids=[f"{n}-{case[0]}" for n, case in enumerate(BROKEN)])
def test_a_rule_fires_and_is_in_force(rule, raw, reason):
    nb = rules.Notebook(raw)
    found = list(getattr(rules, rule)(nb))
    assert len(found) == 1 and reason in found[0], found
    assert found[0] in rules.offences(nb)


def test_every_rule_has_a_page_that_breaks_it():
    proven = {case[0] for case in BROKEN} | {"links_lead_somewhere", "untouched"}
    assert {rule.__name__ for rule in (*rules.RULES, *rules.STUDENT_RULES)} == proven


def test_links_lead_somewhere(tmp_path):
    (tmp_path / "02_b.ipynb").touch()
    source = "[a](02_b.ipynb#part), [b](https://x.org/y), [c](#here), `[d](nowhere)`, [e](03_c.ipynb)"
    nb = rules.Notebook(changed(good, 3, source=source), tmp_path / "01_a.ipynb")
    assert list(rules.links_lead_somewhere(nb)) == [f"cell 3 (`{source[:50]}`): links to `03_c.ipynb`, which isn't there"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (changed(student, 2, source="def f(x):\n    return x"), "exercise norm doesn't raise"),
        (changed(student, 2, source="def f(x):\n    raise NotImplementedError"), "exercise norm doesn't raise"),
        (changed(student, 2, metadata={"tags": ["exercise:other"]}), "exercise other doesn't raise"),
        (changed(student, 2, execution_count=1), "no output and no count"),
        (changed(student, 3, outputs=[printed("passed")]), "no output and no count"),
        (changed(student, 3, source="# BEGIN SOLUTION\n1\n# END SOLUTION"), "holds a solution"),
        (changed(student, 3, metadata={"tags": ["solution-only"]}), "holds a solution"),
        (changed(student, 2, metadata={}), "holds no exercise"),
    ],
)
def test_student_pages(raw, reason):
    nb = rules.Notebook(raw, STUDENT_PATH)
    found = list(rules.untouched(nb))
    assert len(found) == 1 and reason in found[0], found
    assert found[0] in rules.offences(nb)


@pytest.mark.parametrize(
    ("rule", "raw"),
    [
        ("tag_budget", many("nbval-ignore-output", 2, 3)),
        ("tag_budget", many("nbval-skip", 3, 30)),
        ("cell_length", changed(good, 2, source="#| export m.py\n" + LONG.split("\n", 1)[1])),
        ("cell_length", changed(good, 2, source=CLASS.rsplit("\n", 1)[0])),
        ("one_title", changed(good, 3, source="```bash\n# a comment\n```\n\n## Below")),
        ("stable_outputs", changed(good, 2, metadata={"tags": ["nbval-ignore-output"]}, outputs=[printed("0x7f1e5c0b2d90")])),
        ("no_private_paths", changed(good, 3, source="[x](https://x.org/home/me) ch01/tmp/x ./tmp/y and 1/2, a </tmp>")),
        ("voice", changed(good, 3, source="`x != y!`, ![alt](a.png)\n\n```text\nIt just works!\n```\n<!-- wow! -->")),
        ("voice", changed(good, 3, source="an adjusted, unjust $\\frac{n!}{k!}$ and x != y")),
        ("no_trailing_semicolon", changed(good, 2, source="a = 1; b = 2\ntext = '''x;\n'''")),
    ],
)
def test_what_a_rule_lets_pass(rule, raw):
    assert list(getattr(rules, rule)(rules.Notebook(raw))) == []


def test_the_command_line_tells(tmp_path, capsys):
    path = tmp_path / "01_a.ipynb"
    path.write_text(json.dumps(changed(good, 3, source="Fine.")))
    assert rules.main([str(path)]) == 0 and "keeps the rules" in capsys.readouterr().out
    path.write_text(json.dumps(changed(good, 3, source="Wow!")))
    assert rules.main([str(path)]) == 1
    assert "01_a.ipynb, cell 3 (`Wow!`): exclaims: `Wow!`\n1 offences" in capsys.readouterr().out
