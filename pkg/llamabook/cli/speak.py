"""What `run`, `generate` and `chat` share, written by hand: settings, loading, and text that appears as it is drawn."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from llamabook.cli.console import tell
from llamabook.errors import ContextError, InputError

TELLERS = ("pocket-llama3.2", "pocket-llama2")  # of the embedded models the first that is there tells stories,
TALKERS = ("pocket-llama3.2-instruct", "pocket-llama2")  # and answers messages
DTYPES = ("float32", "bfloat16", "float16")
LOOKUP = "prompt-lookup"  # drafts without a model, from the text itself
FIRST_TOKENS = 4  # of a row, until nothing new has to be compiled: the prompt's, and a GPU compiles, records, replays


def embedded(chat: bool = False) -> str:
    """The name of the embedded model that is used where none is named."""
    from llamabook import pocket

    return next(name for name in (TALKERS if chat else TELLERS) if name in pocket.names())


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, with the flag words of the command line."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 1234

    def check(self) -> None:
        """Raise InputError for a value outside its range, before anything is loaded."""
        if self.max_new_tokens < 0:
            raise InputError(f"--max_new_tokens is {self.max_new_tokens}: give 0 or more")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature is {self.temperature}: give 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top_k is {self.top_k}: give 1 or more, or leave it out to draw from all tokens")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise InputError(f"--top_p is {self.top_p}: give a probability from 0 to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"--min_p is {self.min_p}: give a share of the largest probability, from 0 to 1")
        if "" in self.stop:
            raise InputError("--stop is empty, which would end every text: leave it out")
        if not 0 <= self.seed < 2**62:  # the second text draws with seed + 1, and so on
            raise InputError(f"--seed is {self.seed}: give a whole number from 0 to {2**62 - 1}")


@dataclass(frozen=True)
class Spoken:
    """What became of one text or of several drawn side by side.

    rows: the drawn ids of each; seconds: what they took, and `first` of it until their first tokens; ended: each by a
    stop; cut: by the context, before `max_new_tokens`; statistics: what a draft did, where there was one.
    """

    rows: list[list[int]]
    seconds: float
    first: float
    ended: bool
    cut: bool
    statistics: object | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    @property
    def steps(self) -> int:
        """How often the model was asked for one more token a row, the reading of the prompt apart."""
        return max(map(len, self.rows)) - 1

    @property
    def steps_per_second(self) -> float:
        return self.steps / max(self.seconds - self.first, 1e-9)

    def __str__(self) -> str:
        tokens = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        text = f"{tokens} in {self.seconds:.2f} s, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"
        if self.steps < 1:
            return text
        later = (self.tokens - len(self.rows)) / max(self.seconds - self.first, 1e-9)
        return f"{text} (prompt {self.first:.2f} s, then {later:.1f} tokens/s)"


class Speaker:
    """A model, its tokenizer and the device they are on, ready to continue a prompt.

    Args: checkpoint_path, a folder or the weight file in it, None for an embedded model; device, a name, None for
    the fastest there is; chat, whether prompts are messages in the model's chat format; dtype, the name of the
    weights' type, None for the checkpoint's own (an embedded model's: float32); compile and compile_prefill, as of
    `fast.generate`; exact_activations, that quantized weights leave what they are multiplied with as it is; draft, the
    folder of a draft model or LOOKUP, None for plain decoding; speculate_k, as of `fast.generate`.
    """

    def __init__(
        self,
        checkpoint_path: Path | None = None,
        device: str | None = None,
        chat: bool = False,
        dtype: str | None = None,
        compile: bool = False,
        compile_prefill: bool = False,
        exact_activations: bool = False,
        draft: Path | str | None = None,
        speculate_k: int | None = None,
    ):
        import torch

        from llamabook import fast, pocket
        from llamabook.fast import kernels
        from llamabook.tokenizer import chat_format

        self.device = torch.device(pick_device(device))
        dtype = pick_dtype(dtype)
        path = checkpoint_path
        if path is None:
            path = pocket.path(embedded(chat))
            dtype = dtype or torch.float32  # small, and the same text on more machines
        activations = "exact" if exact_activations else "rounded"
        to = {"dtype": dtype, "device": self.device, "activations": activations}
        self.model, self.tokenizer = fast.load(path, **to)
        self.speculation = {}
        if draft is not None:
            drafts = fast.PromptLookup() if draft == LOOKUP else fast.load_draft(draft, **to)
            self.speculation = {"draft": drafts, "speculate_k": speculate_k}
        if self.device.type == "cpu":
            kernels.ready()  # built before anything is timed
        self.name = (path if path.is_dir() else path.parent).resolve().name
        self.context_length = self.model.cfg["context_length"]
        self.chat = chat_format(self.tokenizer) if chat else None
        self.compiling = {"compile": compile, "compile_prefill": compile_prefill}
        self.warm: set[int] = set()

    def __str__(self) -> str:
        kind = getattr(self.model, "quantization", None)
        return f"{self.name}{f' in {kind}' if kind else ''} on {self.device}, {self.context_length} tokens of context"

    def encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        """The prompt's ids, BOS included. Raises ContextError if they leave no room for a token."""
        ids = self.chat.encode(prompt) if self.chat else self.tokenizer.encode(prompt, bos=True)
        if len(ids) + min(max_new_tokens, 1) > self.context_length:
            raise ContextError(
                f"the prompt has {len(ids)} tokens and the model's context length is {self.context_length}: "
                "shorten the prompt so that it leaves room for an answer"
            )
        return ids

    def speak(
        self,
        ids: list[int],
        sampling: Sampling,
        writers: list[Callable[[str], object]],
        number: int = 0,
        echo: bool = False,
    ) -> Spoken:
        """Continue `ids` once for each of `writers`, side by side; each is given its text piece by piece.

        Text r draws with the seed sampling.seed + number + r, so it does not matter what is drawn beside it. It ends at
        a stop token, with the token that completes a stop string, or at the end of the context. With `echo` the prompt
        is its beginning.
        """
        from llamabook.fast import Statistics
        from llamabook.fast.decode import Stops

        streamers = [self.tokenizer.streamer() for _ in writers]
        for streamer, write in zip(streamers, writers):
            for token in ids if echo else ():
                write(streamer.push(token))
        stops = Stops(self.stop(sampling), [ids] * len(writers), self.tokenizer)
        rows: list[list[int]] = [[] for _ in writers]
        ended, first, start = set(), 0.0, time.perf_counter()
        statistics = Statistics() if self.speculation else None
        for row, token in self.stream(ids, sampling, len(writers), number, statistics):
            first = first or time.perf_counter() - start
            rows[row].append(token)
            if token not in self.tokenizer.stop_tokens:
                writers[row](streamers[row].push(token))
            if stops.ended(row, token):
                ended.add(row)
        seconds = time.perf_counter() - start
        for streamer, write in zip(streamers, writers):
            write(streamer.flush())
        all_ended = len(ended) == len(rows)
        cut = self.room(ids, sampling) < sampling.max_new_tokens and not all_ended
        return Spoken(rows, seconds, first, all_ended, cut, statistics)

    def warm_up(self, ids: list[int], sampling: Sampling, rows: int = 1) -> None:
        """Have all compiled that `speak` needs for so many rows, and say how long that took."""
        if rows in self.warm or not any(self.compiling.values()):
            return
        self.warm.add(rows)
        start = time.perf_counter()
        for _ in islice(self.stream(ids, sampling, rows), FIRST_TOKENS * rows):
            pass
        if self.model.compiled_as != "refused":
            tell(f"Compilation time: {time.perf_counter() - start:.2f} s")

    def stream(
        self, ids: list[int], sampling: Sampling, rows: int, number: int = 0, statistics=None
    ) -> Iterator[tuple[int, int]]:
        """(row, token) as each is drawn, of `rows` texts that continue `ids`; `statistics` takes what a draft did."""
        from llamabook import fast

        return fast.stream(
            self.model,
            [ids] * rows,
            self.room(ids, sampling),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            stop=self.stop(sampling),
            seed=sampling.seed + number,
            **self.compiling,
            **self.speculation,
            **({"statistics": statistics} if self.speculation else {}),
        )

    def stop(self, sampling: Sampling) -> list[int | str]:
        """All that ends a text: the model's stop tokens, and strings."""
        return [*self.tokenizer.stop_tokens, *sampling.stop]

    def room(self, ids: list[int], sampling: Sampling) -> int:
        """How many tokens may follow `ids`."""
        return min(sampling.max_new_tokens, self.context_length - len(ids))

    def step_bytes(self, prompt_tokens: int, spoken: Spoken) -> float:
        """What a step after the first token read and wrote at least: the weights, and the rows' caches so far."""
        from llamabook.bench import job
        from llamabook.fast.engine import weight_bytes

        texts = job.Job(None, None, str(self.device), "", len(spoken.rows), prompt_tokens, spoken.steps + 1)
        caches = job.bytes_per_step("static", texts, self.model.cfg) - job.weight_bytes(self.model.cfg)
        return weight_bytes(self.model) + caches


def draft_of(path: Path | None, lookup: bool, k: int | None) -> Path | str | None:
    """What drafts, of the flags. Raises InputError where they don't fit."""
    if path is not None and lookup:
        raise InputError("--draft_checkpoint_path and --prompt_lookup: give one of them")
    if k is not None and k < 1:
        raise InputError(f"--speculate_k is {k}: give 1 or more, or leave it out for as many as pay")
    if k is not None and path is None and not lookup:
        raise InputError("--speculate_k needs what drafts: give --draft_checkpoint_path or --prompt_lookup, too")
    return LOOKUP if lookup else path and draft_folder(path)


def draft_folder(path: Path) -> Path:
    """`path`, or the folder of the embedded model that has this name where no such path is."""
    from llamabook import pocket

    return pocket.path(str(path)) if not path.exists() and str(path) in pocket.names() else path


def pick_device(name: str | None) -> str:
    """`name` if this machine has it, the fastest device if None. Raises InputError in one line otherwise."""
    import torch

    has_mps = torch.backends.mps.is_available()
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdecimal())):
        raise InputError(f"--device is {name!r}: give cpu, cuda, cuda:1 or mps")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device is {name!r}, and torch sees {torch.cuda.device_count()} CUDA devices: try --device cpu")
    if kind == "mps" and not has_mps:
        raise InputError("--device is 'mps', and torch has no MPS here: try --device cpu")
    return name


def pick_dtype(name: str | None):
    """torch's dtype called `name`, None for None. Raises InputError for another word."""
    import torch

    if name not in (None, *DTYPES):
        raise InputError(f"--dtype is {name!r}: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return name and getattr(torch, name)


def read_prompt(prompt: str) -> str:
    """The prompt's text; `-` stands for what comes from stdin, without its last line break."""
    try:
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
        prompt.encode()
    except UnicodeError:
        raise InputError("the prompt is not valid UTF-8: save or type it as UTF-8") from None
    return prompt
