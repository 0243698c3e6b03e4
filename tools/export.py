#!/usr/bin/env python3
"""Write the package's modules from the notebooks that teach them.

A code cell whose first line is `#| export llama2.py` goes to pkg/llamabook/llama2.py (`tokenizer/llama2.py`
to a subfolder). A module gets a docstring that names its notebook, then the imports of its cells, grouped
and merged, then the definitions in reading order. One notebook owns a module; a notebook may own several.
Exercise notebooks export nothing. Modules that no notebook writes say `written by hand` in their docstring.

    python tools/export.py           write what has changed
    python tools/export.py --check   write nothing; fail unless every module is, byte for byte, what it should be

Each problem is one line. A notebook with a problem writes none of its modules; the others are written.
Needs nothing but Python 3.10 or newer.
"""

import argparse
import ast
import builtins
import difflib
import json
import keyword
import re
import symtable
import sys
from dataclasses import dataclass, field
from pathlib import Path

from atomic import write

PACKAGE = "llamabook"
WIDTH = 110
MARKER = "Written by tools/export.py"
DIRECTIVE = re.compile(r"#\| export (\S+)")
BY_HAND = re.compile(r"\b(by[\s-]+hand|hand-?written)\b", re.IGNORECASE)
SOLUTION = re.compile(r"#\s*(BEGIN|END)\s+SOLUTION", re.IGNORECASE)
MAGIC = re.compile(r"^\s*(%|!|\?)|^[^#'\"]*=\s*[%!]\w|\?\s*$")
MODULE_NAMES = {"__name__", "__file__", "__doc__", "__package__", "__spec__", "__path__", "__annotations__"}


class ExportError(Exception):
    """What is wrong in one cell or module, in one line."""


@dataclass
class Cell:
    """One exported cell: where it stands and what it says below the directive."""

    place: str
    source: str


@dataclass
class Module:
    """What the cells of one notebook add up to for one file of the package."""

    name: str
    notebook: str
    cells: list[Cell] = field(default_factory=list)


# ---------------------------------------------------------------- reading the notebooks


def notebooks(root: Path) -> list[Path]:
    """The chapters' notebooks in reading order, without checkpoints."""
    found = root.glob("ch[0-9]*/**/*.ipynb")
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def read_cells(path: Path) -> list[tuple[str, str]]:
    """(kind, source) of every cell of a notebook."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"not a notebook of format 4: {type(error).__name__}: {error}") from None


def resembles_directive(line: str) -> bool:
    """Whether a line looks like an attempt at `#| export module.py`."""
    if re.match(r"\s*#+\|", line):
        return True
    match = re.match(r"\s*(?:#+|%%)\s*(\W*)(\w+)\s*(\S*)\s*$", line)
    if not match:
        return False
    punctuation, word, target = match.groups()
    similar = difflib.get_close_matches(word.lower(), ["export", "exports"], n=1, cutoff=0.7)
    return bool(similar) and ("|" in punctuation or target.endswith(".py"))


def check_module_name(name: str) -> None:
    """Refuse a path that isn't a plain module inside the package."""
    parts = name.removesuffix(".py").split("/")
    plain = all(part.isidentifier() and part.isascii() and not keyword.iskeyword(part) for part in parts)
    if not name.endswith(".py") or not plain:
        raise ExportError(f"`{name}` is no module path: write one like `llama2.py` or `tokenizer/llama2.py`")
    if parts[-1] == "__init__":
        raise ExportError(f"`{name}` can't be exported: a package's __init__.py is written by hand")


def exported_cell(kind: str, source: str) -> tuple[str, str] | None:
    """(module, code) of a cell that exports, None of one that doesn't, ExportError of one that tries to."""
    lines = source.split("\n")
    match = DIRECTIVE.fullmatch(lines[0]) if kind == "code" else None
    suspects = lines[1:] if match else lines if kind == "code" else lines[:1]
    for line in suspects:
        if resembles_directive(line):
            rule = "the first line of a code cell must be exactly `#| export module.py`"
            raise ExportError(f"misspelt or misplaced directive `{line.strip()}`: {rule}")
    if not match:
        return None
    check_module_name(match[1])
    return match[1], "\n".join(lines[1:]).strip("\n").rstrip()


def check_code(source: str) -> ast.Module:
    """Parse an exported cell, refusing what has no place in a package."""
    if SOLUTION.search(source):
        raise ExportError("a SOLUTION marker stands in an exported cell: solutions belong to exercise notebooks")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        magic = next((line.strip() for line in source.split("\n") if MAGIC.search(line)), None)
        if magic:
            raise ExportError(f"a magic or shell line can't be exported: `{magic}`") from None
        raise ExportError(f"does not parse, line {(error.lineno or 0) + 1}: {error.msg}") from None
    if not tree.body:
        raise ExportError("the cell exports nothing: code must follow the directive")
    for node in tree.body:
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.Expr, ast.Assert)) and not text:
            line = source.split("\n")[node.lineno - 1].strip()
            raise ExportError(f"`{line}` would run on import: exported cells only define; put it into a cell below")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "get_ipython":
            raise ExportError("`get_ipython` exists only in a notebook: it can't be exported")
    return tree


# ---------------------------------------------------------------- imports


@dataclass
class Imports:
    """The imports of one module, merged: `import x` by module and alias, `from x import ...` by module."""

    plain: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    names: dict[str, dict[tuple[str, str], None]] = field(default_factory=dict)
    above: dict[str, list[str]] = field(default_factory=dict)  # comment lines over a `from x import`
    beside: dict[str, list[str]] = field(default_factory=dict)  # comments at the end of one
    bound: dict[str, str] = field(default_factory=dict)  # name -> what it stands for

    def bind(self, name: str, meaning: str) -> None:
        if self.bound.setdefault(name, meaning) != meaning:
            raise ExportError(f"`{name}` is imported as {self.bound[name]} and as {meaning}: agree on one")

    def add(self, node: ast.Import | ast.ImportFrom, above: list[str], beside: list[str]) -> None:
        """Take one import statement with the comments that stand over it and behind it."""
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ExportError("a relative import doesn't run in a notebook: write `from llamabook...`")
            if any(alias.name == "*" for alias in node.names):
                raise ExportError(f"`from {node.module} import *` hides where names come from: name them")
            for alias in node.names:
                self.bind(alias.asname or alias.name, f"{node.module}.{alias.name}")
                self.names.setdefault(node.module, {})[alias.name, alias.asname or ""] = None
            key = f"from {node.module}"
        else:
            for alias in node.names:
                root = alias.name.split(".")[0]
                self.bind(alias.asname or root, alias.name if alias.asname else root)
                self.plain.setdefault((alias.name, alias.asname or ""), [])
            key = f"import {node.names[0].name} as {node.names[0].asname or ''}"
        for kept, new in ((self.above, above), (self.beside, beside)):
            lines = kept.setdefault(key, [])
            lines.extend(line for line in new if line not in lines)

    def render(self) -> str:
        """Groups in the usual order: __future__, standard library, third party, our own."""
        groups: dict[int, list[tuple[int, str, str]]] = {}
        for module, alias in self.plain:
            statement = f"import {module} as {alias}" if alias else f"import {module}"
            key = f"import {module} as {alias}"
            groups.setdefault(import_group(module), []).append((0, module, self.with_comments(key, statement)))
        for module, names in self.names.items():
            ordered = sorted(names, key=lambda name: (name_rank(name[0]), name))
            listed = [f"{name} as {alias}" if alias else name for name, alias in ordered]
            text = self.with_comments(f"from {module}", from_statement(module, listed))
            groups.setdefault(import_group(module), []).append((1, module, text))
        return "\n\n".join("\n".join(text for _, _, text in sorted(groups[group])) for group in sorted(groups))

    def with_comments(self, key: str, statement: str) -> str:
        beside = "; ".join(comment.lstrip("# ") for comment in self.beside.get(key, []))
        above = list(self.above.get(key, []))
        if beside and "\n" not in statement and len(statement) + len(beside) + 4 <= WIDTH:
            statement += f"  # {beside}"
        elif beside:
            above.append(f"# {beside}")
        return "\n".join([*above, statement])


def import_group(module: str) -> int:
    root = module.split(".")[0]
    if root == "__future__":
        return 0
    return 1 if root in sys.stdlib_module_names else 3 if root == PACKAGE else 2


def name_rank(name: str) -> int:
    """Constants, then classes, then functions: the order that import sorters use."""
    return 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2


def from_statement(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


# ---------------------------------------------------------------- one module


def first_line(node: ast.stmt) -> int:
    """Index of the line on which a statement starts, its decorators included."""
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1


def is_comment(line: str) -> bool:
    return line.startswith("#")


def take_imports(source: str, tree: ast.Module, imports: Imports) -> list[str | None]:
    """Hand the top-level imports of a cell to `imports`; the cell's lines, None where an import was."""
    lines: list[str | None] = list(source.split("\n"))
    for index, node in enumerate(tree.body):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        start, end = node.lineno - 1, node.end_lineno
        neighbours = [*tree.body[max(index - 1, 0) : index], *tree.body[index + 1 : index + 2]]
        if any(first_line(other) < end and other.end_lineno > start for other in neighbours):
            raise ExportError(f"`{lines[start].strip()}`: give an import a line of its own")
        top = start
        while top > 0 and lines[top - 1] is not None and is_comment(lines[top - 1]):
            top -= 1
        beside = comments_in(source.split("\n")[start:end])
        imports.add(node, [line.rstrip() for line in lines[top:start]], beside)
        lines[top:end] = [None] * (end - top)
    return lines


def comments_in(lines: list[str]) -> list[str]:
    """The comments on the lines of an import statement (which holds no strings)."""
    return ["#" + line.split("#", 1)[1].rstrip() for line in lines if "#" in line]


@dataclass
class Chunk:
    """A top-level statement with the comment on top of it, or a comment that stands alone."""

    text: str
    kind: str  # "definition", "plain" or "comment"
    gap: int  # blank lines above it in its cell; -1 for the first of a cell


def chunks(source: str, tree: ast.Module, lines: list[str | None]) -> list[Chunk]:
    """Cut what is left of a cell into pieces that can be spaced anew."""
    spans: list[list] = []  # [start, end, kind]
    for node in tree.body:
        start, end = first_line(node), node.end_lineno
        if lines[start] is None:
            continue
        defines = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if spans and start < spans[-1][1]:  # two statements on one line
            spans[-1][1] = end
        else:
            spans.append([start, end, "definition" if defines else "plain"])
    covered = {i for start, end, _ in spans for i in range(start, end)}
    free = [i for i, line in enumerate(lines) if i not in covered and line is not None and line.strip()]
    for i in free:  # only comments are left
        owner = max((span for span in spans if span[1] <= i), default=None, key=lambda span: span[1])
        if lines[i].startswith((" ", "\t")) and owner:  # an indented one ends the body above it
            owner[1] = i + 1
        elif spans and spans[-1][2] == "comment" and spans[-1][1] == i:
            spans[-1][1] = i + 1
        else:
            spans.append([i, i + 1, "comment"])
    spans.sort()
    joined: list[list] = []
    for span in spans:  # a comment right above a statement belongs to it
        if joined and joined[-1][2] == "comment" and joined[-1][1] == span[0]:
            joined[-1][1:] = span[1:]
        else:
            joined.append(span)
    out: list[Chunk] = []
    for number, (start, end, kind) in enumerate(joined):
        text = "\n".join(line for line in lines[start:end] if line is not None).rstrip()
        out.append(Chunk(text, kind, start - joined[number - 1][1] if number else -1))
    return out


def join_chunks(parts: list[Chunk]) -> str:
    """Two blank lines around definitions, at most one between plain statements."""
    text = ""
    for number, part in enumerate(parts):
        if number:
            before = parts[number - 1]
            if before.kind == "comment" and part.gap >= 0:
                blank = 1
            elif before.kind == "definition" or opens_definition(parts, number):
                blank = 2
            else:
                blank = 0 if part.gap == 0 else 1
            text += "\n" * (blank + 1)
        text += part.text
    return text


def opens_definition(parts: list[Chunk], number: int) -> bool:
    """Whether a chunk is a definition, or a comment that introduces one."""
    kinds = [part.kind for part in parts[number : number + 2]]
    return kinds[0] == "definition" or kinds == ["comment", "definition"]


def defined_names(node: ast.stmt) -> set[str]:
    """The names that a top-level statement binds, imports apart."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        elif isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
            names.add(inner.name)
        elif isinstance(inner, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.split(".")[0] for alias in inner.names}
    return names


def check_names(name: str, trees: list[tuple[str, ast.Module]], imports: Imports) -> None:
    """Refuse a name that is defined twice in a module."""
    seen = dict.fromkeys(imports.bound, "an import")
    for place, tree in trees:
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom, ast.AugAssign)):
                continue
            for defined in sorted(defined_names(node)):
                if defined in seen:
                    raise ExportError(f"{place}: `{defined}` is defined twice in {name}: first in {seen[defined]}")
                seen[defined] = place


def check_references(name: str, text: str) -> None:
    """Refuse a module that uses a name which no exported cell imports or defines."""
    table = symtable.symtable(text, name, "exec")
    known = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    known |= set(dir(builtins)) | MODULE_NAMES
    pending, missing = [table], set()
    while pending:
        scope = pending.pop()
        pending += scope.get_children()
        known |= {s.get_name() for s in scope.get_symbols() if s.is_declared_global() and s.is_assigned()}
        for symbol in scope.get_symbols():
            outer = symbol.is_global() or scope is table
            if symbol.is_referenced() and outer and symbol.get_name() not in known:
                missing.add(symbol.get_name())
    missing = {m for m in missing - known if not (m.startswith("__") and m.endswith("__"))}
    if missing:
        listed = ", ".join(f"`{m}`" for m in sorted(missing))
        raise ExportError(f"{name} uses {listed}, which no exported cell of it imports or defines")


def render(module: Module) -> str:
    """The text of a module."""
    imports, parts, trees = Imports(), [], []
    for cell in module.cells:
        try:
            tree = check_code(cell.source)
            lines = take_imports(cell.source, tree, imports)
        except ExportError as error:
            raise ExportError(f"{cell.place}: {error}") from None
        parts += chunks(cell.source, tree, lines)
        trees.append((cell.place, tree))
    check_names(module.name, trees, imports)
    head = (
        f'"""From the notebook {module.notebook}.\n\n'
        f'{MARKER}: edit the notebook, not this file, then run `make export`.\n"""\n'
    )
    body = join_chunks(parts)
    sections = [head]
    if imports.bound:
        sections.append("\n" + imports.render() + "\n")
    if body:
        sections.append(("\n\n" if opens_definition(parts, 0) else "\n") + body + "\n")
    text = "".join(sections)
    check_references(module.name, text)
    return text


# ---------------------------------------------------------------- the whole book


def collect(root: Path) -> tuple[dict[str, str], list[str]]:
    """What every exported module must say, and the problems found on the way."""
    modules: dict[str, Module] = {}
    problems: list[str] = []
    faulty: set[str] = set()

    def problem(notebook: str, text: object) -> None:
        problems.append(f"{text}")
        faulty.add(notebook)

    for path in notebooks(root):
        notebook = path.relative_to(root).as_posix()
        try:
            cells = read_cells(path)
        except ExportError as error:
            problem(notebook, f"{notebook}: {error}")
            continue
        for number, (kind, source) in enumerate(cells, 1):
            place = f"{notebook}, cell {number}"
            try:
                found = exported_cell(kind, source)
            except ExportError as error:
                problem(notebook, f"{place}: {error}")
                continue
            if not found:
                continue
            name, code = found
            if "_exercises" in path.name:
                problem(notebook, f"{place}: an exercise notebook exports nothing, but this cell exports {name}")
                continue
            module = modules.setdefault(name, Module(name, notebook))
            if module.notebook != notebook:
                owner = f"{name} is exported by {module.notebook} already: one notebook owns a module"
                problem(notebook, f"{place}: {owner}")
                continue
            module.cells.append(Cell(place, code))

    texts = {}
    for name, module in modules.items():
        if name.removesuffix(".py") in {other.rsplit("/", 1)[0] for other in modules if "/" in other}:
            problem(module.notebook, f"{module.notebook}: {name} and the folder of the same name hide each other")
        try:
            text = render(module)
        except ExportError as error:
            message = str(error) if str(error).startswith(module.notebook) else f"{module.notebook}: {error}"
            problem(module.notebook, message)
            continue
        texts[name] = text
    sound = {name: text for name, text in texts.items() if modules[name].notebook not in faulty}
    expected = {name: module.notebook for name, module in modules.items()}
    return sound, problems + strays(root, set(expected))


def strays(root: Path, exported: set[str]) -> list[str]:
    """Modules of the package that neither a notebook nor, by their own word, a hand has written."""
    package = root / "pkg" / PACKAGE
    problems = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name in exported or "__pycache__" in path.parts:
            continue
        shown = path.relative_to(root).as_posix()
        try:
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        except (SyntaxError, ValueError) as error:
            problems.append(f"{shown}: does not parse: {error}")
            continue
        if MARKER in docstring:
            problems.append(f"{shown}: stray: no notebook exports it any more; delete it")
        elif not BY_HAND.search(docstring):
            problems.append(f"{shown}: stray: no notebook exports it, and its docstring doesn't say `written by hand`")
    for folder in sorted({(package / name).parent for name in exported} - {package}):
        if not (folder / "__init__.py").exists():
            shown = (folder / "__init__.py").relative_to(root).as_posix()
            problems.append(f"{shown}: missing: write it by hand, or the folder is no package")
    return problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write pkg/llamabook from the exported cells of the notebooks.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail unless the package is up to date")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    texts, problems = collect(root)
    for name, text in texts.items():
        path = root / "pkg" / PACKAGE / name
        shown = path.relative_to(root).as_posix()
        if path.is_file() and path.read_bytes() == text.encode():
            continue
        if options.check:
            state = "stale: it differs from its notebook" if path.exists() else "missing"
            problems.append(f"{shown}: {state}; run python tools/export.py")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, text)
            print(f"wrote {shown}")
    for line in problems:
        print(f"export: {line}", file=sys.stderr)
    if not problems:
        print(f"export: {len(texts)} modules agree with their notebooks")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
