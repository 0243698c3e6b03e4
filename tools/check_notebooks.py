#!/usr/bin/env python3
"""Hold notebooks to the book's rules; tests/test_notebooks.py does so in `make test`.

    python tools/check_notebooks.py                   every notebook of the book
    python tools/check_notebooks.py ch01_*/02_*.ipynb

A rule is a function that takes a `Notebook` and yields one line per offence. RULES apply to what is executed,
STUDENT_RULES to the student notebooks, which nothing has executed. Needs nothing but Python.
"""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SKIP, IGNORE, RAISES = "nbval-skip", "nbval-ignore-output", "raises-exception"
KNOWN_TAGS = re.compile(rf"{SKIP}|{IGNORE}|{RAISES}|solution-only|(exercise|check):[A-Za-z0-9][\w.-]*")
CELL_LINES, CLASS_LINES = 25, 40
WIDTH, EXPORTED_WIDTH = 120, 110
IMAGES = ("image/png", "image/jpeg", "image/gif")
UNSTABLE_METADATA = ("ExecuteTime", "collapsed", "execution", "pycharm", "scrolled", "trusted", "vscode")
# What a reader has after `make lab`: pkg/pyproject.toml's dependencies and its extra [book], and what they bring.
READERS = {
    "IPython", "llamabook", "matplotlib", "numpy", "regex", "safetensors", "sentencepiece", "tiktoken", "tokenizers",
    "torch", "tqdm", "transformers", "typer",
}  # fmt: skip
PRIVATE_PATH = re.compile(
    r"(?<![\w./:~<-])(?:/(?:home|Users|root|tmp|var|private|usr|opt|mnt|work|workspace|content)/\w|[A-Za-z]:\\\w)"
)
AVOIDED = re.compile(r"(?:\S+\s+){0,3}(?:\b(?:simply|just|obviously)\b|\w+!(?![\[\w]))", re.I)
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,16}\b")


@dataclass
class Cell:
    """One cell: its number from 1, kind, source, and the dict it was read from."""

    number: int
    kind: str
    source: str
    raw: dict

    @property
    def tags(self) -> list[str]:
        return self.raw.get("metadata", {}).get("tags", [])

    @property
    def outputs(self) -> list[dict]:
        return self.raw.get("outputs", [])

    @property
    def here(self) -> str:
        lines = [line.strip() for line in self.source.split("\n") if line.strip() and not line.startswith("#|")]
        return f"cell {self.number} (`{(lines or [''])[0][:50]}`)"


@dataclass
class Notebook:
    """A notebook as the rules see it; `path` is None for one that was made up for a test."""

    raw: dict
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        return cls(json.loads(path.read_text(encoding="utf-8")), path)

    @cached_property
    def cells(self) -> list[Cell]:
        return [Cell(n, c["cell_type"], joined(c["source"]), c) for n, c in enumerate(self.raw["cells"], 1)]

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    @property
    def markdown(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "markdown"]

    @property
    def is_exercise(self) -> bool:
        return self.path is not None and "_exercises" in self.path.name

    @property
    def is_student(self) -> bool:
        return self.path is not None and self.path.name.endswith("_exercises.ipynb")


def joined(text) -> str:
    return text if isinstance(text, str) else "".join(text)


def parsed(source: str) -> ast.Module:
    """The syntax tree, empty where the cell holds magics or is broken on purpose."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def prose(source: str) -> str:
    """Markdown without code, formulas, quotations, comments and link targets."""
    text = re.sub(r"^(```|~~~).*?^\1\s*$", " ", source, flags=re.M | re.S)
    text = re.sub(r"(`+).+?\1|\$\$.+?\$\$|\$[^$\n]+\$|<!--.*?-->", " ", text, flags=re.S)
    text = re.sub(r'"[^"\n]*"|“[^”\n]*”', " ", text)
    return re.sub(r"\]\([^)]*\)|https?://\S+|<[^>]*>", "] ", text)


def texts(output: dict) -> str:
    """All that an output says in letters."""
    parts = [joined(output.get("text", "")), output.get("evalue", ""), "\n".join(output.get("traceback", []))]
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/"):
            parts.append(joined(value) if isinstance(value, (str, list)) else json.dumps(value))
    return "\n".join(parts)


# ---------------------------------------------------------------- one rule, one function


def execution_counts(nb: Notebook) -> Iterator[str]:
    """Code cells are numbered 1..n by one clean run; skipped cells have no output."""
    for expected, cell in enumerate(nb.code, start=1):
        count = cell.raw.get("execution_count")
        if not cell.source.strip():
            yield f"{cell.here}: is empty"
            return
        if SKIP in cell.tags and cell.outputs:
            yield f"{cell.here}: is tagged {SKIP} but holds an output"
        if count != expected:
            yield f"{cell.here}: has execution count {count} instead of {expected}: run tools/run_notebooks.py"
            return
        results = {o.get("execution_count") for o in cell.outputs if o["output_type"] == "execute_result"}
        if results - {count}:
            yield f"{cell.here}: has count {count}, its result {results}"


def no_stderr(nb: Notebook) -> Iterator[str]:
    for cell in nb.code:
        for output in cell.outputs:
            if output["output_type"] == "stream" and output.get("name") == "stderr":
                yield f"{cell.here}: stored stderr: {texts(output).strip()[:80]}"


def no_svg(nb: Notebook) -> Iterator[str]:
    for cell in nb.cells:
        kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
        kinds += [kind for attachment in cell.raw.get("attachments", {}).values() for kind in attachment]
        shown = cell.source if cell.kind == "markdown" else "".join(map(texts, cell.outputs))
        if any("svg" in kind for kind in kinds) or "<svg" in shown or "data:image/svg" in shown:
            yield f"{cell.here}: shows an SVG: show a PNG"


def no_trailing_semicolon(nb: Notebook) -> Iterator[str]:
    """A `;` at the end of a line hides a result from the page, and nbval sees it all the same."""
    for cell in nb.code:
        try:
            tokens = list(tokenize.generate_tokens(io.StringIO(cell.source).readline))
        except (tokenize.TokenError, SyntaxError):
            tokens = []
            if re.search(r";\s*$", cell.source):
                yield f"{cell.here}: ends with `;`"
        for token, after in zip(tokens, tokens[1:]):
            if token.string == ";" and after.type in (tokenize.NEWLINE, tokenize.COMMENT, tokenize.NL):
                yield f"{cell.here}: line {token.start[0]} ends with `;`"


def tag_budget(nb: Notebook) -> Iterator[str]:
    """At most a tenth of the code cells, or two, escape comparison."""
    escaped = [cell for cell in nb.code if {SKIP, IGNORE} & set(cell.tags)]
    allowed = max(2, round(len(nb.code) / 10))
    if len(escaped) > allowed:
        yield f"{len(escaped)} of {len(nb.code)} code cells are tagged {SKIP} or {IGNORE}; {allowed} may be"


def known_tags(nb: Notebook) -> Iterator[str]:
    for cell in nb.cells:
        for tag in cell.tags:
            if not KNOWN_TAGS.fullmatch(tag):
                yield f"{cell.here}: unknown tag `{tag}`"
        if cell.kind == "code" and re.search(r"^\s*#\s*(NBVAL|PYTEST_VALIDATE)_", cell.source, re.M):
            yield f"{cell.here}: a directive for nbval stands in a comment: make it a tag"


def errors_are_meant(nb: Notebook) -> Iterator[str]:
    for cell in nb.code:
        raised = any(output["output_type"] == "error" for output in cell.outputs)
        if raised and RAISES not in cell.tags:
            yield f"{cell.here}: stores an error but isn't tagged {RAISES}"
        if not raised and RAISES in cell.tags and SKIP not in cell.tags:
            yield f"{cell.here}: is tagged {RAISES} but stores no error"


def one_title(nb: Notebook) -> Iterator[str]:
    """Exactly one H1, the first line of the first cell."""
    first = nb.cells[0] if nb.cells else None
    if first is None or first.kind != "markdown" or not re.match(r"# \S", first.source.lstrip()):
        yield "the first cell doesn't open with a title, `# ...`"
    count = 0
    for cell in nb.markdown:
        bare = re.sub(r"^(```|~~~).*?^\1\s*$", "", cell.source, flags=re.M | re.S)
        count += len(re.findall(r"^ {0,3}# \S|^\S.*\n=+\s*$|<h1\b", bare, re.M))
    if count > 1:
        yield f"has {count} titles (`# ...`): a page has one"


def opening(nb: Notebook) -> Iterator[str]:
    """Before any code the page says its goal, what it builds on, and what it costs."""
    top = ""
    for cell in nb.cells:
        if cell.kind == "code":
            break
        top += cell.source + "\n"
    wanted = {
        "its goal": r"\bgoals?\b",
        "its prerequisites": r"\bprerequisites?\b",
        "how many minutes it takes": r"\bminutes?\b",
        "how much memory it needs": r"\bmemory\b",
    }
    for what, pattern in wanted.items():
        if not re.search(pattern, top, re.I):
            yield f"the top doesn't say {what}"


def closing(nb: Notebook) -> Iterator[str]:
    """The page ends with recap, a quiz with folded answers, exercises, and what went into the package."""
    if nb.is_exercise:
        return
    tail = "\n".join(cell.source for cell in nb.markdown[len(nb.markdown) // 2 :])
    for what in ("recap", "quiz", "<details", "exercise", "package"):
        if what not in tail.lower():
            yield f"the end lacks `{what}`: close with recap, quiz (answers folded), exercises, what went where"


def alt_text(nb: Notebook) -> Iterator[str]:
    for cell in nb.cells:
        for output in cell.outputs:
            for kind in IMAGES:
                alt = output.get("metadata", {}).get(kind, {}).get("alt", "")
                if kind in output.get("data", {}) and not str(alt).strip():
                    yield f"{cell.here}: shows an image without alt text"
        if cell.kind == "markdown":
            tags = re.findall(r"<img\b[^>]*>", cell.source, re.I)
            bare = [tag for tag in tags if not re.search(r"\balt\s*=\s*(\"[^\"]*\w[^\"]*\"|'[^']*\w[^']*')", tag)]
            if bare or re.search(r"!\[\s*\]\(", cell.source):
                yield f"{cell.here}: holds an image without alt text"


def cell_length(nb: Notebook) -> Iterator[str]:
    for cell in nb.code:
        lines = [line for line in cell.source.strip().split("\n") if not line.startswith("#| export")]
        lines = [line for line in lines if line.strip() not in ("# BEGIN SOLUTION", "# END SOLUTION")]
        has_class = any(isinstance(node, ast.ClassDef) for node in parsed(cell.source).body)
        limit = CLASS_LINES if has_class else CELL_LINES
        if len(lines) > limit:
            yield f"{cell.here}: has {len(lines)} lines, {limit} at most"
        wide = max(map(len, lines), default=0)
        allowed = EXPORTED_WIDTH if cell.source.startswith("#| export") else WIDTH
        if wide > allowed:
            yield f"{cell.here}: has a line of {wide} characters, {allowed} at most"


def no_private_paths(nb: Notebook) -> Iterator[str]:
    for cell in nb.cells:
        for text in (cell.source, *map(texts, cell.outputs)):
            match = PRIVATE_PATH.search(text)
            if match:
                yield f"{cell.here}: names a path of one machine: `{text[match.start() :][:40].splitlines()[0]}`"


def stable_outputs(nb: Notebook) -> Iterator[str]:
    """No output holds an address or colour codes, unless it is ignored anyway."""
    for cell in nb.code:
        for output in cell.outputs:
            if "\x1b" in texts(output):
                yield f"{cell.here}: stores terminal colour codes"
            if ADDRESS.search(texts(output)) and IGNORE not in cell.tags:
                yield f"{cell.here}: shows a memory address"


def clean_metadata(nb: Notebook) -> Iterator[str]:
    """Nothing is stored that differs from run to run: times, versions, widget state."""
    metadata = nb.raw.get("metadata", {})
    if "version" in metadata.get("language_info", {}):
        yield "stores the Python version it ran on"
    if "widgets" in metadata:
        yield "stores the state of widgets"
    if metadata.get("kernelspec", {}).get("name") != "python3":
        yield "its kernel isn't `python3`"
    if (nb.raw.get("nbformat"), nb.raw.get("nbformat_minor")) != (4, 5):
        yield "isn't in notebook format 4.5"
    ids = [cell.raw.get("id") for cell in nb.cells]
    if None in ids or len(set(ids)) < len(ids):
        yield "has cells without an id or with the same id"
    for cell in nb.cells:
        for key in UNSTABLE_METADATA:
            if key in cell.raw.get("metadata", {}):
                yield f"{cell.here}: stores `{key}`"


def readers_imports(nb: Notebook) -> Iterator[str]:
    """A page imports what `make lab` installs."""
    for cell in nb.code:
        for node in ast.walk(parsed(cell.source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                root = name.split(".")[0]
                if root not in READERS and root not in sys.stdlib_module_names:
                    yield f"{cell.here}: imports {root}, which `make lab` doesn't install"


def folds_close(nb: Notebook) -> Iterator[str]:
    for cell in nb.markdown:
        opened, closed = cell.source.count("<details"), cell.source.count("</details>")
        if opened != closed or opened > cell.source.count("<summary"):
            yield f"{cell.here}: <details> needs a <summary> and a </details> in the same cell"


def links_lead_somewhere(nb: Notebook) -> Iterator[str]:
    if nb.path is None:
        return
    for cell in nb.markdown:
        bare = re.sub(r"^(```|~~~).*?^\1\s*$|`[^`]*`", " ", cell.source, flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", bare):
            file = target.split("#")[0]
            if file and not re.match(r"[a-z]+:", file) and not (nb.path.parent / file).exists():
                yield f"{cell.here}: links to `{file}`, which isn't there"


def voice(nb: Notebook) -> Iterator[str]:
    """The few words and marks that the book does without."""
    for cell in nb.markdown:
        text = prose(cell.source)
        for match in AVOIDED.finditer(text):
            rule = "exclaims" if match[0].endswith("!") else "says simply, just or obviously"
            yield f"{cell.here}: {rule}: `{' '.join(match[0].split())}`"


def untouched(nb: Notebook) -> Iterator[str]:
    """A student notebook has neither counts nor outputs, no solution, and every exercise raises."""
    for cell in nb.code:
        if cell.outputs or cell.raw.get("execution_count") is not None:
            yield f"{cell.here}: a student notebook stores no output and no count"
        if re.search(r"(BEGIN|END) SOLUTION", cell.source) or "solution-only" in cell.tags:
            yield f"{cell.here}: holds a solution"
        for name in [tag.partition(":")[2] for tag in cell.tags if tag.startswith("exercise:")]:
            if not raises(cell.source, f"exercise {name}: write your code here"):
                yield f"{cell.here}: exercise {name} doesn't raise NotImplementedError with its own name"
    if not any(tag.startswith("exercise:") for cell in nb.code for tag in cell.tags):
        yield "holds no exercise"


def raises(source: str, message: str) -> bool:
    """Whether the code holds `raise NotImplementedError(message)`."""
    wanted = ast.dump(ast.parse(f"raise NotImplementedError({message!r})").body[0])
    return any(isinstance(node, ast.Raise) and ast.dump(node) == wanted for node in ast.walk(parsed(source)))


RULES = (
    execution_counts, no_stderr, no_svg, no_trailing_semicolon, tag_budget, known_tags, errors_are_meant, one_title,
    opening, closing, alt_text, cell_length, no_private_paths, stable_outputs, clean_metadata, readers_imports,
    folds_close, links_lead_somewhere, voice,
)  # fmt: skip
STUDENT_RULES = (
    untouched, no_svg, no_trailing_semicolon, known_tags, one_title, opening, alt_text, cell_length, no_private_paths,
    clean_metadata, readers_imports, folds_close, links_lead_somewhere, voice,
)  # fmt: skip


def offences(nb: Notebook) -> list[str]:
    """Every offence of a notebook against the rules that apply to it."""
    return [line for rule in (STUDENT_RULES if nb.is_student else RULES) for line in rule(nb)]


def find(root: Path) -> list[Path]:
    """The book's notebooks in reading order."""
    found = root.glob("ch[0-9]*/**/*.ipynb")
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hold notebooks to the book's rules.")
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all of the book)")
    options = parser.parse_args(argv)
    count = 0
    for path in options.paths or find(Path(__file__).resolve().parents[1]):
        for line in offences(Notebook.read(path)):
            count += 1
            print(f"{path.parent.name}/{path.name}, {line}")
    print(f"{count} offences" if count else "every notebook keeps the rules")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
