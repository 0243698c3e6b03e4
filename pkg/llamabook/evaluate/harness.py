"""lm-eval on our engine: an adapter, and `evaluate`, which gives scores with their errors. Written by hand.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) is the harness that most published scores come from. A
task of it asks a model for three things only: the log-likelihood of a continuation, that of a text, and a text that it
generates. `Engine` answers them as the harness's own adapter for transformers does for a Llama, BOS and truncation
included, so that scores can be compared; this module needs lm-eval, the rest of the package does not.
"""

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partialmethod
from itertools import groupby
from pathlib import Path

from torch import nn
from tqdm import tqdm

from llamabook import fast
from llamabook.errors import InputError
from llamabook.evaluate.farm import TASKS
from llamabook.evaluate.perplexity import log_likelihoods, windows
from llamabook.fast.engine import check_count

try:
    from lm_eval import evaluator
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    if error.name != "lm_eval":
        raise InputError(f"lm-eval can't be imported ({error}): install it again, pip install 'llamabook[eval]'") from None
    raise InputError("tasks need lm-eval, which is not installed: pip install 'llamabook[eval]'") from None

FARM = tuple(TASKS)
CHOICES = ("acc", "acc_norm", "acc_bytes")  # metrics that a blind guess among the choices can hit


@dataclass(frozen=True)
class Score:
    """What a model scored in a task by one metric.

    value and error: the metric and its standard error, None where lm-eval knows none; chance: what blind guessing would
    score, None where nothing can be guessed; questions: how many were asked; each: the metric of each question, in their
    order, where the metric is their mean.
    """

    task: str
    metric: str
    value: float
    error: float | None
    chance: float | None
    questions: int
    each: tuple[float, ...] = ()


class Engine(TemplateLM):
    """The engine as lm-eval sees a model.

    Args: model and tokenizer, as from `fast.load`; batch_size, rows side by side; max_length, how many tokens are read
    at most, None for the context length; compile, as of `fast.generate`.
    """

    def __init__(
        self, model: nn.Module, tokenizer, *, batch_size: int = 16, max_length: int | None = None, compile: bool = False
    ):
        super().__init__()
        check_count("batch_size", batch_size, 1)
        limit = model.cfg["context_length"]
        if max_length is not None and (type(max_length) is not int or not 1 <= max_length <= limit):
            raise InputError(f"max_length is {max_length!r}: give a number of tokens from 1 to {limit}, the context length")
        self.model, self.tokens, self.batch_size, self.compile = model, tokenizer, batch_size, compile
        self.max_length: int = max_length or limit

    # ---- tokens -------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """The ids of a text, behind BOS unless that is refused, or the text begins with its name already."""
        name = self.tokens.decode([self.prefix_token_id]) if hasattr(self.tokens, "special_tokens") else ""
        if add_special_tokens is None and name and string.startswith(name):
            string = string.removeprefix(name)  # BOS comes once
        return self.tokens.encode(string, bos=add_special_tokens is not False)

    # ---- what a task may ask for --------------------------------------------------------------------------------

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding gives it) of each continuation, given its context."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """The same for ids. What is too long loses its beginning."""
        rows = [self.cut(context, continuation) for _, context, continuation in requests]
        return log_likelihoods(self.model, rows, batch_size=self.batch_size, compile=self.compile)

    def cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The end of a context, so short that the model reads no more than `max_length` tokens."""
        room = self.max_length + 1 - len(continuation)  # the last token is not read
        if room < 1:
            raise InputError(f"a continuation has {len(continuation)} tokens, of {self.max_length} that can be read")
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        """log p of each text, in windows of `max_length` tokens side by side, the last of them full.

        As in the harness's adapter for transformers the first window is BOS, BOS, text, so that p(BOS | BOS) counts.
        """
        rows, of = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = [self.prefix_token_id, *self.tok_encode(text)]
            for start, first, end in windows(len(ids), self.max_length, self.max_length):
                rows.append((ids[start:first], ids[first:end]))
                of.append(number)
        sums = [0.0] * len(requests)
        found = log_likelihoods(self.model, rows, batch_size=self.batch_size, compile=self.compile)
        for number, (log_prob, _) in zip(of, found):
            sums[number] += log_prob
        return sums

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        """What the model writes behind each context, up to the first of its stop strings, or the end of the text."""
        asked = sorted(enumerate(request.args for request in requests), key=lambda item: repr(sorted(item[1][1].items())))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="answering", leave=False, disable=None) as bar:
            for _, group in groupby(asked, key=lambda item: item[1][1]):
                group = [(number, context, options) for number, (context, options) in group]
                group.sort(key=lambda item: -len(item[1]))  # contexts of like length side by side
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    for (number, *_), text in zip(batch, self.write([c for _, c, _ in batch], batch[0][2])):
                        texts[number] = text
                    bar.update(len(batch))
        return texts

    def write(self, contexts: list[str], options: dict) -> list[str]:
        """The texts of one batch, which has the same options."""
        until, most, sampling = read_options(options)
        room = self.max_length - most
        if room < 1:
            raise InputError(
                f"a task asks for up to {most} new tokens, and {self.max_length} can be read and written in all: "
                "take a model with a longer context"
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        rows = fast.generate(
            self.model, prompts, most, stop=[self.eot_token_id, *until], tokenizer=self.tokens,
            compile=self.compile, compile_prefill=self.compile, **sampling,
        )  # fmt: skip
        return [first_part(self.text_of(row), until) for row in rows]

    def text_of(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        streamer = self.tokens.streamer()
        return "".join([*map(streamer.push, ids), streamer.flush()])

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        raise InputError("tasks are asked as plain text here, without a chat format: leave apply_chat_template out")


def read_options(options: dict) -> tuple[list[str], int, dict]:
    """A task's generation options as stop strings, a number of tokens, and what `fast.generate` samples with.

    They are read as the harness reads them: greedy unless do_sample or a temperature says otherwise, 256 tokens unless
    told. Raises InputError for an option that the engine does not have.
    """
    options = dict(options)
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else [text for text in until if text]
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = [value for name in names if (value := options.pop(name, None)) is not None]
    temperature = float(options.pop("temperature", None) or 0.0)
    sample = options.pop("do_sample", None)
    if sample and not temperature:
        temperature = 1.0  # as transformers does
    sampling = {"temperature": temperature if sample or sample is None else 0.0}
    for name in ("top_k", "top_p", "min_p"):
        if (value := options.pop(name, None)) is not None and sampling["temperature"]:
            sampling[name] = value
    if options:
        raise InputError(f"a task wants the generation option {next(iter(options))}, which the engine does not have")
    return until, int(most[0]) if most else 256, sampling


def first_part(text: str, until: list[str]) -> str:
    """What stands before the first of the stop strings."""
    for stop in until:
        text = text.split(stop)[0]
    return text


# ---- tasks ---------------------------------------------------------------------------------------------------------


def load_tasks(names: Sequence[str] = FARM) -> dict:
    """The tasks of these names with their data, as `evaluate` takes them; a name may be that of a YAML file.

    Tasks that are not the farm's have their data on the Hugging Face Hub, and come from its cache if they are there.
    Raises InputError for an unknown name, with names like it, and if the data can't be had.
    """
    names = list(dict.fromkeys([names] if isinstance(names, str) else names))
    if not names:
        raise InputError(f"no task is named: give one or more, such as {', '.join(FARM)}")
    with quiet():
        foreign = [name for name in names if name not in TASKS]
        manager = manager_of(bool(foreign))
        for name in foreign:
            check_name(name, manager)
        loaded: dict = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            for kind, found in load_task(name, manager).items():
                loaded[kind] |= found
    for task in loaded["tasks"].values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # the harness's own default
    return loaded


@cache
def manager_of(all_tasks: bool) -> TaskManager:
    """What loads tasks; with the names of all the harness's own, which takes seconds to read."""
    return TaskManager(include_defaults=all_tasks)


def check_name(name: str, manager: TaskManager) -> None:
    """Raises InputError if there is no such task."""
    if name in manager.all_tasks or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
        return
    near = difflib.get_close_matches(name, [*FARM, *manager.all_tasks], n=3)
    hint = f"is it {' or '.join(near)}?" if near else f"the farm's own are {', '.join(FARM)}"
    raise InputError(f"there is no task {name!r}: {hint}")


def load_task(name: str, manager: TaskManager) -> dict:
    """One task, or group of tasks, with its data. Raises InputError in one line if it can't be had."""
    try:
        return manager.load([TASKS[name].config() if name in TASKS else name])
    except Exception as error:  # of the harness, of datasets, of the Hub or of the task's own code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        advice = f"its own code fails ({reason}): take another task"
        if isinstance(error, ModuleNotFoundError):
            advice = f"it needs the package {error.name}: install it with pip"
        elif isinstance(error, OSError):
            advice = (
                "its data is on the Hugging Face Hub: connect to it, or take the farm's tasks, which need no download: "
                f"{', '.join(FARM)} ({reason})"
            )
        raise InputError(f"the task {name} can't be loaded: {advice}") from None


def evaluate(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str] | dict = FARM,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    compile: bool = False,
) -> dict[str, dict[str, Score]]:
    """The scores of a model: task to metric to `Score`. A group of tasks has its own scores, too.

    Args: tasks, names, or what `load_tasks` gave; limit, only the first so many questions of each task; batch_size,
    max_length and compile as of `Engine`.
    Raises InputError.
    """
    if limit is not None:
        check_count("limit", limit, 1)
    engine = Engine(model, tokenizer, batch_size=batch_size, max_length=max_length, compile=compile)
    loaded = tasks if isinstance(tasks, dict) else load_tasks(tasks)
    with quiet():
        found = evaluator.evaluate(engine, loaded, limit=limit, bootstrap_iters=1000, log_samples=True)
    scores: dict[str, dict[str, Score]] = {}
    for task, entries in (found["results"] | found.get("groups", {})).items():
        scores[task] = dict(read_scores(task, entries, loaded["tasks"].get(task), found))
    return scores


def read_scores(task: str, entries: dict, loaded, found: dict) -> Iterator[tuple[str, Score]]:
    """Each metric of a task, from the harness's entries such as "acc,none" and "acc_stderr,none"."""
    samples = found["samples"].get(task, [])
    for key, value in entries.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = entries.get(f"{metric}_stderr,{filtered}")
        each = tuple(sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample)
        mean = bool(each) and all(isinstance(one, (int, float)) for one in each)
        questions = len(each) or entries.get("sample_count", {}).get(key) or entries.get("sample_len") or 0
        name = metric if filtered == "none" else f"{metric},{filtered}"
        yield name, Score(
            task, name, float(value), float(error) if isinstance(error, (int, float)) else None,
            chance_of(loaded) if metric in CHOICES else None, questions, tuple(map(float, each)) if mean else (),
        )  # fmt: skip


def chance_of(task) -> float | None:
    """What blind guessing scores in a task with choices: the mean of one over their number, over its questions."""
    if task is None or task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices = Counter(request.doc_id for request in task.instances).values()
    return sum(1 / number for number in choices) / len(choices)


@contextmanager
def quiet() -> Iterator[None]:
    """Within this block lm-eval and what it uses show bars on a terminal only, warn of nothing, and print to stderr."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "httpx", "evaluate")]
    levels, begin = [logger.level for logger in loggers], tqdm.__init__
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(begin, disable=None)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        tqdm.__init__ = begin
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
