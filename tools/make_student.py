#!/usr/bin/env python3
"""Write the student notebook NN_exercises.ipynb from its source NN_exercises_solutions.ipynb.

    python tools/make_student.py           write what has changed
    python tools/make_student.py --check   write nothing, fail unless every student notebook is up to date

- The lines between `# BEGIN SOLUTION` and `# END SOLUTION`, each alone on its line, become one line
  `raise NotImplementedError("exercise NAME: write your code here")` at the indentation of the first marker.
- NAME comes from the cell's tag `exercise:NAME`. A cell with that tag has a solution region, and the other
  way round. The cell that checks the answer carries no such tag.
- Cells tagged `solution-only` are dropped. Outputs and counts are cleared. Ids and everything else stay.
- No line of a solution may stand anywhere in the student notebook.

The markers are those of nbgrader, so a teacher can release the source notebook with it: set
`c.ClearSolutions.enforce_metadata = False`, or mark the tagged cells as autograded answers.
Each problem is one line, and nothing is written for a notebook that has one. Needs nothing but Python.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

from atomic import write

BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
RESEMBLES = re.compile(r"#.*\b(BEGIN|END)[\W_]*SOLUTIONS?\b", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
SUFFIX = "_exercises_solutions.ipynb"
TOO_SHORT = 10  # a line with fewer visible characters gives nothing away
COMMONPLACE = re.compile(r"return\w+|for\w+inrange\(\w+\):|#.*")


class StudentError(Exception):
    """What is wrong with a source notebook, in one line."""


def text_of(cell: dict) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def exercise_name(cell: dict) -> str | None:
    """The NAME of the cell's tag `exercise:NAME`, if it has one."""
    names = [tag.partition(":")[2] for tag in cell["metadata"].get("tags", []) if tag.startswith("exercise:")]
    if len(names) > 1:
        raise StudentError(f"has {len(names)} tags `exercise:...`: one cell, one exercise")
    if names and not NAME.fullmatch(names[0]):
        raise StudentError(f"tag `exercise:{names[0]}`: a name is letters, digits, `.`, `_` and `-`")
    return names[0] if names else None


def blank(source: str, name: str | None) -> tuple[str, list[str]]:
    """The source with its solutions replaced, and the solution lines."""
    kept: list[str] = []
    hidden: list[str] = []
    inside = False
    for line in source.split("\n"):
        marker = line.strip()
        if marker == BEGIN:
            if inside:
                raise StudentError(f"`{BEGIN}` inside a solution: regions don't nest")
            if not name:
                raise StudentError("has a solution but no tag `exercise:NAME`")
            inside = True
            pad = line[: len(line) - len(line.lstrip())]
            kept.append(f'{pad}raise NotImplementedError("exercise {name}: write your code here")')
        elif marker == END:
            if not inside:
                raise StudentError(f"`{END}` without `{BEGIN}`")
            inside = False
        elif RESEMBLES.search(line):
            raise StudentError(f"misspelt marker `{marker}`: write `{BEGIN}` or `{END}`, alone on its line")
        else:
            (hidden if inside else kept).append(line)
    if inside:
        raise StudentError(f"`{BEGIN}` without `{END}`")
    return "\n".join(kept), hidden


def student(notebook: dict) -> dict:
    """The student version of a source notebook."""
    cells, hidden = [], []
    for number, cell in enumerate(notebook["cells"], 1):
        try:
            if "solution-only" in cell["metadata"].get("tags", []):
                continue
            new = dict(cell)
            if cell["cell_type"] == "code":
                name = exercise_name(cell)
                source, solution = blank(text_of(cell), name)
                if name and not any(line.strip() for line in solution):
                    rule = f"put `{BEGIN}` and `{END}` around its answer (a cell that checks an answer has no such tag)"
                    raise StudentError(f"is tagged `exercise:{name}` but has no solution: {rule}")
                if name:
                    check_parses(source)
                new.update(source=source.splitlines(keepends=True), outputs=[], execution_count=None)
                hidden += [(number, line.strip()) for line in solution]
            elif RESEMBLES.search(text_of(cell)):
                rule = "put an answer in words into a cell tagged `solution-only`"
                raise StudentError(f"has a solution marker in a {cell['cell_type']} cell: {rule}")
            cells.append(new)
        except StudentError as error:
            raise StudentError(f"cell {number}: {error}") from None
    if not hidden:
        raise StudentError("has no exercise: no cell holds a solution region")
    check_leaks(cells, hidden)
    return {**notebook, "cells": cells}


def check_parses(source: str) -> None:
    try:
        ast.parse(source)
    except SyntaxError as error:
        raise StudentError(f"without its solution the cell doesn't parse: {error.msg} in line {error.lineno}") from None


def check_leaks(cells: list[dict], hidden: list[tuple[int, str]]) -> None:
    """Fail if a line of a solution can be read in the student notebook."""
    texts = [(number, squeeze(text_of(cell))) for number, cell in enumerate(cells, 1)]
    for origin, line in hidden:
        wanted = squeeze(line)
        if len(wanted) < TOO_SHORT or COMMONPLACE.fullmatch(wanted):
            continue
        for number, text in texts:
            if wanted in text:
                where = f"the student would read it in cell {number} of the student notebook"
                raise StudentError(f"cell {origin}: the solution `{line}` leaks: {where}")


def dump(notebook: dict) -> str:
    """As nbformat writes it."""
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True, separators=(",", ": ")) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write student notebooks from their solution notebooks.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail unless all are up to date")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    books = sorted(root.glob("ch[0-9]*/**/*.ipynb"))
    books = [p for p in books if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    sources = [p for p in books if p.name.endswith(SUFFIX)]
    targets = [p.with_name(p.name.removesuffix(SUFFIX) + "_exercises.ipynb") for p in sources]
    problems = []
    for source, target in zip(sources, targets):
        shown = target.relative_to(root).as_posix()
        try:
            text = dump(student(json.loads(source.read_text(encoding="utf-8"))))
        except (StudentError, ValueError, KeyError, TypeError) as error:
            kind = "" if isinstance(error, StudentError) else f"not a notebook: {type(error).__name__}: "
            problems.append(f"{source.relative_to(root).as_posix()}, {kind}{error}")
            continue
        if target.is_file() and target.read_bytes() == text.encode():
            continue
        if options.check:
            state = "stale: it differs from its solution notebook" if target.exists() else "missing"
            problems.append(f"{shown}: {state}; run python tools/make_student.py")
        else:
            write(target, text)
            print(f"wrote {shown}")
    for book in books:
        if book.name.endswith("_exercises.ipynb") and book not in targets:
            problems.append(f"{book.relative_to(root).as_posix()}: stray: it has no {book.stem}_solutions.ipynb")
    for line in problems:
        print(f"make_student: {line}", file=sys.stderr)
    if not problems:
        print(f"make_student: {len(sources)} student notebooks agree with their solutions")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
