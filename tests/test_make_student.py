"""tools/make_student.py: the student notebook holds every question, no answer, and never drifts from its source."""

import json
import subprocess
import sys
from pathlib import Path

import make_student
import pytest
from made_up import code, markdown, save

ROOT = Path(__file__).resolve().parents[1]
ANSWER = """def rms(x, eps):
    \"\"\"The root mean square of x.\"\"\"
    # BEGIN SOLUTION
    squares = [value * value for value in x]

    return (sum(squares) / len(x) + eps) ** 0.5
    # END SOLUTION


print("given")"""
QUESTION = '''def rms(x, eps):
    """The root mean square of x."""
    raise NotImplementedError("exercise rms: write your code here")


print("given")'''


@pytest.fixture
def book(tmp_path):
    (tmp_path / "ch01_a").mkdir()
    return tmp_path


def source(book: Path, *cells: dict, name: str = "04_exercises_solutions") -> Path:
    return save(book / "ch01_a" / f"{name}.ipynb", *cells)


def run(book: Path, capsys, *arguments: str) -> tuple[int, list[str]]:
    status = make_student.main([*arguments, "--root", str(book)])
    return status, capsys.readouterr().err.splitlines()


def student(book: Path, name: str = "04_exercises") -> dict:
    return json.loads((book / "ch01_a" / f"{name}.ipynb").read_text())


def text(cell: dict) -> str:
    return "".join(cell["source"])


def exercise(body: str, name: str = "rms") -> dict:
    return code(body, tags=[f"exercise:{name}"])


def solution(lines: str = "    return compute(x)", begin="# BEGIN SOLUTION", end="# END SOLUTION") -> dict:
    return exercise(f"def f(x):\n    {begin}\n{lines}\n    {end}")


def test_what_a_student_gets(book, capsys):
    printed = [{"output_type": "stream", "name": "stdout", "text": ["given\n"]}]
    source(
        book,
        markdown("# Exercises"),
        code(ANSWER, tags=["exercise:rms"], count=1, outputs=printed),
        code("check_rms(rms)", tags=["check:rms"], count=2, outputs=printed),
        markdown("The mean of the squares, then the root.", tags=["solution-only"]),
        code("rms([3, 4], 0)", tags=["solution-only"], count=3),
        code("print('end')", count=4),
    )
    assert run(book, capsys) == (0, [])
    cells = student(book)["cells"]
    assert [text(cell) for cell in cells] == ["# Exercises", QUESTION, "check_rms(rms)", "print('end')"]
    assert [cell["id"] for cell in cells] == ["cell-001", "cell-002", "cell-003", "cell-006"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells[1:])
    assert cells[1]["metadata"]["tags"] == ["exercise:rms"]
    assert run(book, capsys, "--check") == (0, [])


def test_every_stub_raises_its_name(book, capsys):
    nested = "class A:\n    def f(self):\n        # BEGIN SOLUTION\n        return 1\n        # END SOLUTION"
    source(book, markdown("# E"), exercise(nested, "a-1"), exercise("# BEGIN SOLUTION\nx = 1\n# END SOLUTION", "top"))
    assert run(book, capsys) == (0, [])
    one, two = (text(cell) for cell in student(book)["cells"][1:])
    names = {}
    exec(one, names)
    with pytest.raises(NotImplementedError, match="^exercise a-1: write your code here$"):
        names["A"]().f()
    with pytest.raises(NotImplementedError, match="^exercise top: write your code here$"):
        exec(two)


def test_two_regions_in_one_cell(book, capsys):
    body = "def f():\n    # BEGIN SOLUTION\n    return 1\n    # END SOLUTION\n"
    source(book, markdown("# E"), exercise(body + "\n\n" + body.replace("f()", "g()") + "last = 3", "two"))
    assert run(book, capsys) == (0, [])
    assert text(student(book)["cells"][1]).count("raise NotImplementedError") == 2
    assert text(student(book)["cells"][1]).endswith("last = 3")


def test_stale_missing_and_stray(book, capsys):
    source(book, markdown("# E"), solution())
    status, lines = run(book, capsys, "--check")
    assert status == 1 and len(lines) == 1 and "04_exercises.ipynb: missing" in lines[0]
    assert not (book / "ch01_a/04_exercises.ipynb").exists()
    run(book, capsys)
    target = book / "ch01_a/04_exercises.ipynb"
    stamp = target.stat().st_mtime_ns
    assert run(book, capsys) == (0, []) and target.stat().st_mtime_ns == stamp
    target.write_text(target.read_text() + " ")
    status, lines = run(book, capsys, "--check")
    assert status == 1 and len(lines) == 1 and "04_exercises.ipynb: stale" in lines[0]
    run(book, capsys)
    save(book / "ch01_a/05_exercises.ipynb", markdown("# Left over"))
    for flags in (["--check"], []):
        status, lines = run(book, capsys, *flags)
        assert status == 1 and len(lines) == 1 and "05_exercises.ipynb: stray" in lines[0]
    assert sorted(p.name for p in target.parent.iterdir()) == [
        "04_exercises.ipynb",
        "04_exercises_solutions.ipynb",
        "05_exercises.ipynb",
    ]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (exercise("def f():\n    # BEGIN SOLUTION\n    return 1"), "`# BEGIN SOLUTION` without `# END SOLUTION`"),
        (exercise("def f():\n    return 1\n    # END SOLUTION"), "`# END SOLUTION` without `# BEGIN SOLUTION`"),
        (exercise("# BEGIN SOLUTION\n# BEGIN SOLUTION\nx = 1\n# END SOLUTION\n# END SOLUTION"), "don't nest"),
        (code("# BEGIN SOLUTION\nx = 1\n# END SOLUTION"), "no tag `exercise:NAME`"),
        (exercise("# BEGIN SOLUTION\nx = 1\n# END SOLUTION", ""), "a name is"),
        (exercise("# BEGIN SOLUTION\nx = 1\n# END SOLUTION", "two words"), "a name is"),
        (code("# BEGIN SOLUTION\nx = 1\n# END SOLUTION", tags=["exercise:a", "exercise:b"]), "one cell, one exercise"),
        (exercise("def f():\n    return the_answer"), "has no solution"),
        (exercise("def f():\n    # BEGIN SOLUTION\n\n    # END SOLUTION"), "has no solution"),
        (solution(begin="# begin solution"), "misspelt marker"),
        (solution(begin="#BEGIN SOLUTION"), "misspelt marker"),
        (solution(begin="# BEGIN_SOLUTION"), "misspelt marker"),
        (solution(begin="# ### BEGIN SOLUTION"), "misspelt marker"),
        (solution(begin="pass  # BEGIN SOLUTION"), "misspelt marker"),
        (solution(end="# END SOLUTIONS"), "misspelt marker"),
        (markdown("# BEGIN SOLUTION\nwords\n# END SOLUTION"), "in a markdown cell"),
        (exercise("if x:\n    y = 1\n  # BEGIN SOLUTION\n    y = 2\n# END SOLUTION"), "doesn't parse"),
    ],
)
def test_faulty_markers_fail(book, capsys, cell, reason):
    source(book, markdown("# E"), cell, solution("    return something_else(x)"))
    for flags in (["--check"], []):
        status, lines = run(book, capsys, *flags)
        assert status == 1 and len(lines) == 1, lines
        assert lines[0].startswith("make_student: ch01_a/04_exercises_solutions.ipynb, cell 2: ") and reason in lines[0]
    assert not (book / "ch01_a/04_exercises.ipynb").exists()


@pytest.mark.parametrize(
    "leak",
    [
        markdown("Hint: `return x / (x.norm() + eps)` is close."),
        markdown("```python\nreturn x/( x.norm()+eps )\n```"),
        code("def given(x):\n    return x / (x.norm() + eps)"),
        code("text = 'return x / (x.norm() + eps)'", tags=["check:rms"]),
        exercise("# BEGIN SOLUTION\ny = 1\n# END SOLUTION\n# return x / (x.norm() + eps)", "other"),
    ],
)
def test_a_solution_line_anywhere_in_the_student_notebook_fails(book, capsys, leak):
    source(book, markdown("# E"), solution("    return x / (x.norm() + eps)"), leak)
    status, lines = run(book, capsys)
    assert status == 1 and len(lines) == 1
    assert "cell 2: the solution `return x / (x.norm() + eps)` leaks" in lines[0]
    assert "cell 3 of the student notebook" in lines[0]
    assert not (book / "ch01_a/04_exercises.ipynb").exists()


def test_commonplace_lines_are_no_leak(book, capsys):
    body = "    for i in range(n):\n        pass\n    # a remark on the next line\n    return total"
    source(book, markdown("# E"), solution(body), code(f"def given(x):\n{body}"))
    assert run(book, capsys) == (0, [])


def test_a_source_without_an_exercise_or_that_is_no_notebook_fails(book, capsys):
    source(book, markdown("# E"), code("x = 1"))
    assert "has no exercise" in run(book, capsys)[1][0]
    (book / "ch01_a/04_exercises_solutions.ipynb").write_text("<html>")
    status, lines = run(book, capsys)
    assert status == 1 and "not a notebook" in lines[0]


def test_a_faulty_source_does_not_hold_up_the_others(book, capsys):
    source(book, markdown("# E"), exercise("# BEGIN SOLUTION"))
    source(book, markdown("# E"), solution(), name="05_exercises_solutions")
    status, lines = run(book, capsys)
    assert status == 1 and len(lines) == 1
    assert student(book, "05_exercises")["cells"]


def test_the_books_student_notebooks_are_up_to_date():
    done = subprocess.run([sys.executable, "tools/make_student.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_they_are_written_as_nbformat_writes():
    import nbformat

    paths = sorted(ROOT.glob("ch[0-9][0-9]_*/*_exercises.ipynb"))
    assert paths
    for path in paths:
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
        assert nbformat.writes(nb).rstrip("\n") + "\n" == path.read_text(encoding="utf-8")
