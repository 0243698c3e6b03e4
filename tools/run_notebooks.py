#!/usr/bin/env python3
"""Execute notebooks in place so that a second run gives the same bytes.

    python tools/run_notebooks.py ch01_gpt_to_llama2             every notebook of a folder
    python tools/run_notebooks.py PATH.ipynb ... --check         execute, compare with what is stored, write nothing

What a run does:

- It starts a fresh kernel of this Python in the notebook's folder and keeps no timing, version or widget state.
- A cell tagged `nbval-skip` isn't executed: it is stored without output. All code cells are numbered 1..n in
  their order, the skipped ones too, so the number of a cell is its place on the page.
- A cell tagged `nbval-ignore-output` is executed and stored. If nothing else has changed, the file keeps
  the output it has, so that a re-run leaves no difference in git.
- The traceback of a cell tagged `raises-exception` is stored without colours, with paths that start at the
  repository or at site-packages. Such a cell has to raise.
- Any other error, a warning or anything else on stderr, an SVG or a path of this machine in an output leaves
  the file as it was: one line names the notebook, the cell and the problem.
- Files are written to a temporary name and renamed.

Student notebooks (NN_exercises.ipynb) are never executed: tools/make_student.py writes them.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from atomic import write

SKIP, IGNORE, RAISES = "nbval-skip", "nbval-ignore-output", "raises-exception"
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}
UNSTABLE_METADATA = ("ExecuteTime", "collapsed", "execution", "pycharm", "scrolled", "trusted", "vscode")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
INSTALLED = re.compile(r"[^\s:'\"(]*[/\\](?:site|dist)-packages[/\\]")
STANDARD = re.compile(r"[^\s:'\"(]*[/\\]lib[/\\]python3\.\d+[/\\]")


class RunError(Exception):
    """Why a notebook can't be stored, in one line."""


class ThisPython(KernelSpecManager):
    """Whatever kernels are installed, the one that runs is the Python that runs this script."""

    def get_kernel_spec(self, kernel_name):
        quiet = ["--log-level=CRITICAL"]  # what matters reaches us as messages
        return self.kernel_spec_class(resource_dir=RESOURCES, **get_kernel_dict(extra_arguments=quiet))


class Manager(AsyncKernelManager):
    """Starts that kernel."""

    def _kernel_spec_manager_default(self):
        return ThisPython()


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def is_student(path: Path) -> bool:
    return path.name.endswith("_exercises.ipynb")


def find(paths: list[Path]) -> list[Path]:
    """The notebooks meant by files and folders, in reading order, without student notebooks in folders."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.rglob("*.ipynb"))
            hidden = [p for p in inside if any(part.startswith(".") for part in p.relative_to(path).parts)]
            found += [p for p in inside if p not in hidden and not is_student(p)]
        elif path.suffix != ".ipynb" or not path.is_file():
            raise RunError(f"{path}: no such notebook or folder")
        elif is_student(path):
            raise RunError(f"{path}: a student notebook isn't executed; run its _solutions notebook")
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def read(stored: str):
    """The notebook in the one form that is stored: every cell with its own id, no outputs, no counts, no times."""
    try:
        raw = json.loads(stored)
        used = {cell["id"] for cell in raw["cells"] if "id" in cell}
        kept = set()
        for number, cell in enumerate(raw["cells"], 1):
            if cell.get("id", "") in kept | {""}:  # nbformat would draw a random one
                names = [f"cell-{number:03d}", *(f"cell-{number:03d}-{again}" for again in range(2, 1000))]
                cell["id"] = next(name for name in names if name not in used)
            used.add(cell["id"])
            kept.add(cell["id"])
            for key in UNSTABLE_METADATA:
                cell["metadata"].pop(key, None)
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        raw.update(nbformat=4, nbformat_minor=5)
        nb = nbformat.reads(json.dumps(raw), as_version=4)
        nbformat.validate(nb)
    except (ValueError, KeyError, TypeError, nbformat.ValidationError) as error:
        raise RunError(f"not a notebook of format 4: {str(error).splitlines()[0]}") from error
    return nb


def execute(nb, folder: Path, root: Path, timeout: float) -> None:
    """Run the cells in a fresh kernel; RunError at the first that may not be stored."""
    with tempfile.TemporaryDirectory(prefix="ipython-") as profile:
        given = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        environment = {
            **os.environ,
            "IPYTHONDIR": profile,  # no start-up files or settings of this user
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "PYTHONPATH": os.pathsep.join([str(root / "pkg"), *given]),
        }
        client = NotebookClient(
            nb,
            kernel_name="python3",
            kernel_manager_class=Manager,
            timeout=timeout,
            record_timing=False,
            store_widget_state=False,
            coalesce_streams=True,  # a slow machine hands over one text in several pieces
            skip_cells_with_tag=SKIP,
            resources={"metadata": {"path": str(folder)}},
        )
        running = 0

        def started(cell, cell_index):
            nonlocal running
            running = cell_index

        client.on_cell_start = started
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            name, _, text = f"{error.ename}: {error.evalue}".partition("\n")
            more = " ..." if text.strip() else ""
            raise RunError(f"{where(nb, running)}: {ANSI.sub('', name)}{more}") from error
        except CellTimeoutError as error:
            raise RunError(f"{where(nb, running)}: ran longer than {timeout:g} s") from error
        except DeadKernelError as error:
            raise RunError(f"{where(nb, running)}: the kernel died, perhaps for lack of memory") from error


def where(nb, index: int) -> str:
    """A cell in words: its number in the notebook and the first line that says something."""
    lines = [line for line in nb.cells[index].source.split("\n") if line.strip() and not line.startswith("#|")]
    return f"cell {index + 1} (`{(lines or [''])[0].strip()[:60]}`)"


def normalize_text(text: str, root: Path) -> str:
    """Remove colours and what is this machine's from a traceback."""
    text = ANSI.sub("", text)
    text = INSTALLED.sub("site-packages/", text)
    text = STANDARD.sub("lib/python/", text)
    home = str(Path.home())
    for prefix in (str(root), str(root).replace(home, "~", 1)):
        text = text.replace(prefix + os.sep, "")
    return re.sub(r"[^\s'\"(]*ipykernel_\d+[/\\]\d+\.py", "Cell", text)


def output_texts(output) -> list[str]:
    """All text of an output that a reader sees, images apart."""
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return [output.evalue, *output.traceback]
    return [value for kind, value in output.data.items() if isinstance(value, str) and not kind.startswith("image/")]


def finish(nb, root: Path) -> None:
    """Make what a run has left the same on every run; RunError for what may not be stored."""
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE})
    number = 0
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        number += 1
        for numbered in (cell, *(output for output in cell.outputs if output.output_type == "execute_result")):
            numbered.execution_count = number
        errors = [output for output in cell.outputs if output.output_type == "error"]
        for output in errors:
            output.traceback = [normalize_text(line, root) for line in output.traceback]
        if RAISES in tags(cell) and SKIP not in tags(cell) and not errors:
            raise RunError(f"{where(nb, index)}: is tagged {RAISES} but raises nothing")
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                line = output.text.strip().split("\n")[0]
                raise RunError(f"{where(nb, index)}: writes to stderr: {line[:150]}")
            if "image/svg+xml" in output.get("data", {}):
                raise RunError(f"{where(nb, index)}: shows an SVG, which differs from run to run; show a PNG")
            for text in output_texts(output):
                for private in {str(root), str(Path.home())} - {"/"}:
                    if re.search(re.escape(private) + r"(?![\w.-])", text):
                        raise RunError(f"{where(nb, index)}: shows a path of this machine, `{private}`")
            output.pop("transient", None)


def without_ignored(nb) -> dict:
    """The notebook without the outputs of ignored cells, its texts in one piece."""
    copy = nbformat.v4.rwbase.rejoin_lines(nbformat.from_dict(nb))
    for cell in copy.cells:
        if cell.cell_type == "code" and IGNORE in tags(cell):
            cell.outputs = []
    return copy


def run(path: Path, root: Path, *, check: bool = False, timeout: float = 600) -> str:
    """Execute one notebook and store it; a word on what happened. RunError leaves the file as it was."""
    try:
        stored = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RunError(f"not a notebook: {error}") from error
    nb = read(stored)
    execute(nb, path.parent, root, timeout)
    finish(nb, root)
    text = nbformat.writes(nb).rstrip("\n") + "\n"
    if text == stored:
        return "unchanged"
    old = nbformat.from_dict(json.loads(stored))
    canonical = json.dumps(old, ensure_ascii=False, indent=1, sort_keys=True) + "\n" == stored
    if canonical and without_ignored(nb) == without_ignored(old):
        return "unchanged but for ignored outputs, which are kept"
    if check:
        raise RunError(f"a re-run differs{first_difference(old, nb)}; run tools/run_notebooks.py on it")
    write(path, text)
    return "written"


def first_difference(old, new) -> str:
    """Where a stored notebook differs first from its re-run."""
    old, new = without_ignored(old), without_ignored(new)
    for index, (before, after) in enumerate(zip(old.cells, new.cells)):
        if before != after:
            return f" in {where(new, index)}"
    return " in its metadata"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute notebooks in place, the same bytes on every run.")
    parser.add_argument("paths", nargs="+", type=Path, help="notebooks, or folders of them")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a re-run would change a file")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a cell may take (default 600)")
    parser.add_argument("--traceback", action="store_true", help="print the whole traceback of a failing cell")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the repository")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    failed = 0
    try:
        found = find([path.absolute() for path in options.paths])
        if not found:
            raise RunError(f"no notebook in {', '.join(map(str, options.paths))}")
    except RunError as error:
        print(f"run_notebooks: {error}", file=sys.stderr)
        return 1
    for path in found:
        shown = os.path.relpath(path, root) if path.is_relative_to(root) else str(path)
        try:
            print(f"{shown}: {run(path, root, check=options.check, timeout=options.timeout)}", flush=True)
        except RunError as error:
            failed += 1
            print(f"run_notebooks: {shown}, {error}", file=sys.stderr, flush=True)
            if options.traceback and isinstance(error.__cause__, CellExecutionError):
                print(ANSI.sub("", str(error.__cause__)), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
