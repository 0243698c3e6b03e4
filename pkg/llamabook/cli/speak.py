"""What `run`, `generate` and `chat` share, written by hand: settings, loading, and text that appears as it is drawn."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llamabook.errors import CheckpointError, ContextError, InputError

TELLERS = ("pocket-llama3.2", "pocket-llama2")  # of the embedded models the first that is there tells stories,
TALKERS = ("pocket-llama3.2-instruct", "pocket-llama2")  # and answers messages
DTYPES = ("float32", "bfloat16", "float16")


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


@dataclass(frozen=True)
class Spoken:
    """What became of one text: the drawn token ids, the seconds they took, and why it ended.

    `ended`: by a stop token; `cut`: by the context, before `max_new_tokens`.
    """

    ids: list[int]
    seconds: float
    ended: bool
    cut: bool

    @property
    def speed(self) -> float:
        """Tokens per second, the reading of the prompt included."""
        return len(self.ids) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        tokens = "1 token" if len(self.ids) == 1 else f"{len(self.ids)} tokens"
        return f"{tokens} in {self.seconds:.2f} s, {self.speed:.1f} tokens/s"


class Speaker:
    """A model, its tokenizer and the device they are on, ready to continue a prompt.

    Args: checkpoint_path, a folder or the weight file in it, None for an embedded model; device, a name, None for
    the fastest there is; chat, whether prompts are messages in the model's chat format; dtype, the name of the
    weights' type, None for the checkpoint's own (an embedded model's: float32).
    """

    def __init__(
        self,
        checkpoint_path: Path | None = None,
        device: str | None = None,
        chat: bool = False,
        dtype: str | None = None,
    ):
        import torch

        from llamabook import pocket
        from llamabook.checkpoint import load_config, load_model
        from llamabook.tokenizer import chat_format, load_tokenizer, tokenizer_folder

        self.device = torch.device(pick_device(device))
        dtype = pick_dtype(dtype)
        path = checkpoint_path
        if path is None:
            path = pocket.path(embedded(chat))
            dtype = dtype or torch.float32  # small, and the same text on more machines
        config = load_config(path)
        self.model = load_model(path, config=config, device=self.device, dtype=dtype)
        self.tokenizer = load_tokenizer(tokenizer_folder(path))
        if self.tokenizer.vocab_size > config["vocab_size"]:
            raise CheckpointError(
                f"{path}: the tokenizer has {self.tokenizer.vocab_size} tokens and the model {config['vocab_size']}, "
                "so they do not belong together: put the model's own tokenizer beside it"
            )
        self.name = (path if path.is_dir() else path.parent).resolve().name
        self.context_length = config["context_length"]
        self.chat = chat_format(self.tokenizer) if chat else None

    def encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        """The prompt's ids, BOS included. Raises ContextError if they leave no room for a token."""
        ids = self.chat.encode(prompt) if self.chat else self.tokenizer.encode(prompt, bos=True)
        if len(ids) + min(max_new_tokens, 1) > self.context_length:
            raise ContextError(
                f"the prompt has {len(ids)} tokens and the model's context length is {self.context_length}: "
                "shorten the prompt so that it leaves room for an answer"
            )
        return ids

    def speak(self, ids: list[int], sampling: Sampling, generator, write: Callable[[str], None]) -> Spoken:
        """Continue `ids`, give the text to `write` piece by piece, and return what was drawn.

        The prompt is written first, except in a chat. The text stops at a stop token or at the end of the context.
        """
        import torch

        from llamabook.generate import stream

        streamer = self.tokenizer.streamer()
        if not self.chat:
            for token in ids:
                write(streamer.push(token))
        room = min(sampling.max_new_tokens, self.context_length - len(ids))
        drawn: list[int] = []
        start = time.perf_counter()
        for token in stream(
            self.model,
            torch.tensor([ids], device=self.device),  # (1, T)
            max_new_tokens=room,
            context_size=self.context_length,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            eos_id=self.tokenizer.stop_tokens,
            generator=generator,
        ):
            drawn.append(int(token))
            if drawn[-1] not in self.tokenizer.stop_tokens:
                write(streamer.push(drawn[-1]))
        seconds = time.perf_counter() - start
        write(streamer.flush())
        ended = bool(drawn) and drawn[-1] in self.tokenizer.stop_tokens
        return Spoken(drawn, seconds, ended, cut=room < sampling.max_new_tokens and not ended)


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
