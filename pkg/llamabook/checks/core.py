"""The machinery of the exercise checks, written by hand.

A check tries one property of the reader's function after another and stops at the first that fails, with one
line that names the check and says what is wrong in the reader's words. Three promises hold for every check:

- it compares with an answer that was found by another road than the solution's;
- it leaves the session as it was: random state, default dtype, the arguments that it passes;
- it says the same thing whenever it is run.
"""

import contextlib
import functools
import html
import linecache
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


class CheckFailed(AssertionError):
    """The first property that the reader's function lacks, in one line; IPython shows no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]


CheckFailed.__module__ = "llamabook.checks"  # the name by which plain Python shows it


class Wrong(Exception):
    """Inside a check: this property fails. It leaves the check as a `CheckFailed` that names the exercise."""


@dataclass(frozen=True)
class Exercise:
    """What a notebook, a grader and a score table need to know about one exercise.

    `name` is the function that the reader writes; `check_<name>` is its check.
    """

    name: str
    chapter: int
    title: str
    minutes: int
    difficulty: str  # one of DIFFICULTIES
    points: int
    body: Callable[["Student"], None]

    @property
    def label(self) -> str:
        """The line under an exercise's heading in the notebook."""
        return f"`{self.name}` · {self.difficulty} · {self.minutes} minutes · {self.points} points"

    def diagnose(self, function: Any) -> str | None:
        """None if `function` has every property, else the line that says which one is missing."""
        if not callable(function):
            return f"check_{self.name}: give it your function `{self.name}`, not a {type(function).__name__}."
        try:
            with _undisturbed():
                self.body(Student(function))
        except Wrong as wrong:
            return f"check_{self.name}: {_one_line(str(wrong), limit=400)}"
        except Exception as error:  # an answer of a kind that no property foresaw
            what = f"{type(error).__name__}: {_one_line(str(error))}"
            return f"check_{self.name}: this check can't work with what your function returned ({what})."
        return None


DIFFICULTIES = ("warm-up", "core", "stretch")
EXERCISES: dict[str, Exercise] = {}  # in the order of the notebooks
_session: dict[str, bool] = {}  # name -> did the last run pass


def exercise(name: str, *, chapter: int, title: str, minutes: int, difficulty: str, points: int) -> Callable:
    """Register a check's body under the name of the function that it checks, and make it a check."""
    if difficulty not in DIFFICULTIES or name in EXERCISES:
        raise ValueError(f"exercise {name}: difficulty {difficulty!r} is unknown, or the name is taken")

    def register(body: Callable[["Student"], None]) -> Callable[[Any], None]:
        entry = EXERCISES[name] = Exercise(name, chapter, title, minutes, difficulty, points, body)

        @functools.wraps(body)
        def check(function: Any) -> None:
            message = entry.diagnose(function)
            _session[name] = message is None
            if message is not None:
                raise CheckFailed(message)
            earned, possible = score(chapter)
            print(f"✓ check_{name}: passed, {points} points ({earned} of {possible} so far)")

        del (
            check.__wrapped__
        )  # its signature is (function), and its source is not the first thing that `??` shows
        return check

    return register


# --- calling the reader's function ---


class Student:
    """The reader's function, called so that whatever it does becomes one line."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        given = _copied(args)
        with self._guarded():
            result = self.function(*given)
        self._compare(args, given)
        return result

    def steps(self, *args: Any) -> Iterator[Any]:
        """Call a generator function and hand on what it yields, one by one."""
        given = _copied(args)
        with self._guarded():
            result = self.function(*given)
        if result is None:
            raise Wrong("your function returned None. Write a generator: hand out each string with `yield`.")
        if isinstance(result, (str, bytes)) or not hasattr(result, "__iter__"):
            raise Wrong(
                f"your function returned a {type(result).__name__}. Hand out the strings with `yield`."
            )
        steps = iter(result)
        while True:
            with self._guarded():
                try:
                    step = next(steps)
                except StopIteration:
                    break
            yield step
        self._compare(args, given)

    def _compare(self, before: tuple, after: tuple) -> None:
        if not _same(before, after):
            raise Wrong(
                "your function changes its arguments. Work on a copy: the caller still needs the original."
            )

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except NotImplementedError:
            raise Wrong(
                "not written yet. Put your code in the place of `raise NotImplementedError`."
            ) from None
        except Wrong:  # from something that the check had passed to the function
            raise
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {_one_line(str(error))}"
            raise Wrong(f"your function stopped with {what}{self._line(error)}") from None

    def _line(self, error: BaseException) -> str:
        """Where in the reader's own code the error came up, if that can be told."""
        code, trace, found = getattr(self.function, "__code__", None), error.__traceback__, None
        while trace is not None and code is not None:
            if trace.tb_frame.f_code.co_filename == code.co_filename:
                found = trace.tb_lineno
            trace = trace.tb_next
        if found is None:
            return " (does your function still take the arguments of the exercise?)"
        source = linecache.getline(code.co_filename, found).strip()
        return f" (your line {found}{': ' + source if source else ''})"


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else value
        return type(value)(_copied(item) for item in items)
    return value


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same_kind = isinstance(two, torch.Tensor) and one.shape == two.shape and one.dtype == two.dtype
        return same_kind and torch.equal(one.detach(), two.detach())
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_same, one, two))
    return one is two or one == two


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run with fixed random states and the usual torch settings; afterwards everything is as it was."""
    dtype, state = torch.get_default_dtype(), random.getstate()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        random.seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            random.setstate(state)


def _one_line(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- what the bodies of checks are made of ---


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float32 numbers that depend on nothing but their shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def require(condition: Any, message: str) -> None:
    """Fail with `message` unless `condition` holds."""
    if not bool(condition):
        raise Wrong(message)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Do the two agree, relative to the largest number that is wanted (at least 1)?"""
    got, want = got.detach().double(), want.detach().double()
    return got.shape == want.shape and bool(
        (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))
    )


def off_by(got: torch.Tensor, want: torch.Tensor) -> str:
    """The largest difference, for a message."""
    return f"largest error {float((got.double() - want.double()).abs().max()):.2g}"


def tensor(
    value: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None, **hints: Any
) -> torch.Tensor:
    """`value` if it is a finite tensor of this shape and dtype.

    Optional: what, the words for the value; shapes, a dict from a typical wrong shape to its hint; kind, the
    hint for a wrong dtype; finite, the hint for NaN or infinity.
    """
    what, shapes = hints.get("what", "the result"), hints.get("shapes", {})
    present(value)
    require(isinstance(value, torch.Tensor), f"{what} is a {type(value).__name__}; want a tensor.")
    if tuple(value.shape) != tuple(shape):
        hint = shapes.get(tuple(value.shape), "")
        raise Wrong(f"{what} has shape {tuple(value.shape)}, want {tuple(shape)}. {hint}")
    if dtype is not None and value.dtype != dtype:
        raise Wrong(f"{what} is {_short(value.dtype)}, want {_short(dtype)}. {hints.get('kind', '')}")
    if not bool(torch.isfinite(value.detach()).all()):
        raise Wrong(f"{what} holds NaN or infinity. {hints.get('finite', '')}")
    return value.detach()


def whole(value: Any, what: str = "the result") -> int:
    """`value` if it is an int."""
    present(value)
    if isinstance(value, float) and value.is_integer():
        raise Wrong(f"{what} is the float {value}; a count is an int. Use // rather than /, or int().")
    require(
        isinstance(value, int) and not isinstance(value, bool),
        f"{what} is a {type(value).__name__}; want an int.",
    )
    return value


def several(value: Any, count: int, message: str) -> list | tuple:
    """`value` if it is a tuple or a list of so many."""
    present(value)
    require(isinstance(value, (tuple, list)) and len(value) == count, message)
    return value


def present(value: Any) -> None:
    """Fail if the reader's function returned nothing."""
    require(value is not None, "your function returned None. Did you forget `return`?")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the score ---


def exercises(chapter: int | None = None) -> list[Exercise]:
    """The registered exercises, all or those of one chapter, in reading order."""
    return [entry for entry in EXERCISES.values() if chapter in (None, entry.chapter)]


def score(chapter: int | None = None) -> tuple[int, int]:
    """Points earned in this session, and points possible."""
    chosen = exercises(chapter)
    return sum(e.points for e in chosen if _session.get(e.name)), sum(e.points for e in chosen)


def reset() -> None:
    """Forget what was passed in this session."""
    _session.clear()


@dataclass(frozen=True)
class Result:
    """One exercise's outcome: passed, failed (with the check's line) or not tried."""

    exercise: Exercise
    state: str  # "passed", "failed" or "not tried"
    message: str = ""

    @property
    def points(self) -> int:
        return self.exercise.points if self.state == "passed" else 0


@dataclass(frozen=True)
class Report:
    """A score table: text for `print`, a table in a notebook."""

    results: tuple[Result, ...]

    @property
    def points(self) -> tuple[int, int]:
        return sum(r.points for r in self.results), sum(r.exercise.points for r in self.results)

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("", "exercise", "difficulty", "points", "")]
        for number, result in enumerate(self.results, start=1):
            entry = result.exercise
            points = f"{result.points} / {entry.points}"
            state = {"failed": "not yet"}.get(result.state, result.state)
            rows.append((str(number), entry.title, entry.difficulty, points, state))
        return rows + [("", "total", "", "{} / {}".format(*self.points), "")]

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = [[html.escape(cell) for cell in row] for row in self._rows()]
        left = '<td style="text-align: left">'
        lines = ["<table>", "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"{left}{cell}</td>" for cell in row) + "</tr>" for row in body]
        return "\n".join([*lines, "</table>"])


def report(chapter: int | None = None) -> Report:
    """The score table of this session, from the checks that were run in it."""
    names = {None: "not tried", True: "passed", False: "failed"}
    return Report(tuple(Result(entry, names[_session.get(entry.name)]) for entry in exercises(chapter)))


def grade(namespace: dict[str, Any], chapter: int | None = None) -> Report:
    """Run every check on the functions of these names in `namespace` (say, a notebook's globals), quietly.

    Nothing is raised and the session's score stays as it is: what a function lacks is in `Result.message`.
    """
    results = []
    for entry in exercises(chapter):
        if entry.name not in namespace:
            results.append(Result(entry, "not tried", f"check_{entry.name}: there is no `{entry.name}`."))
            continue
        message = entry.diagnose(namespace[entry.name])
        results.append(Result(entry, "passed" if message is None else "failed", message or ""))
    return Report(tuple(results))
