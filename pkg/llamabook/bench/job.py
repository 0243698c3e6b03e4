"""What a benchmark measures, written by hand: modes, shapes, and the bytes that a token needs."""

from dataclasses import asdict, dataclass
from pathlib import Path

from llamabook.errors import ContextError, InputError

MODES = {
    "regular": "no cache: each token reads the whole text again",
    "fast": "no cache, with fused attention",
    "kv_cache": "the cache of chapter 4's first page",
    "static": "the engine: static cache and kernels",
    "speculative": "the engine with a draft",
}
QUANTIZED = ("static", "speculative")  # which modes there are in each of PRECISIONS
COMPILED = "_compiled"
UNCACHED = ("regular", "fast")
PRECISIONS = ("int8", "int4", "int4.g64", "int4.g128", "int4.g256")  # of the engine's weights; int4 has groups of 32


@dataclass(frozen=True)
class Job:
    """One benchmark: a checkpoint, or a shape with random weights, and how much text."""

    checkpoint_path: str | None
    shape: str | None
    device: str
    dtype: str
    batch_size: int
    prompt_tokens: int
    max_new_tokens: int
    check_tokens: int = 0  # how many tokens at once are timed against one at a time; 0: none
    draft_checkpoint_path: str | None = None  # then all modes read text
    speculate_k: int | None = None  # None: as many as pay

    def check(self, config: dict) -> None:
        """Raise InputError or ContextError, in one line, before any process starts."""
        for name, least in (("batch_size", 1), ("prompt_tokens", 1), ("max_new_tokens", 2)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"--{name} is {value}: give {least} or more")
        if not 0 <= self.check_tokens <= self.prompt_tokens + self.max_new_tokens:
            raise InputError(f"--check_tokens is {self.check_tokens}: give 0 up to as many as the text has")
        length = self.prompt_tokens + self.max_new_tokens
        if length > config["context_length"]:
            raise ContextError(
                f"{self.prompt_tokens} prompt tokens and {self.max_new_tokens} new ones are {length}, the context is"
                f" {config['context_length']}: ask for fewer"
            )

    def as_dict(self) -> dict:
        return asdict(self)


def parts_of(mode: str) -> tuple[str, str | None]:
    """A mode's name in MODES, and the precision of its weights, one of PRECISIONS, or None for the job's dtype."""
    plain = mode.removesuffix(COMPILED)
    return next(((plain.removesuffix(f"_{p}"), p) for p in PRECISIONS if plain.endswith(f"_{p}")), (plain, None))


def check_modes(words: str) -> list[str]:
    """The modes in a list like "regular,static_int8_compiled". Raises InputError for one that does not exist."""
    modes = [word.strip() for word in words.split(",") if word.strip()]
    for mode in modes:
        name, precision = parts_of(mode)
        if name not in MODES or (precision and name not in QUANTIZED):
            quantized = (f"{name}_{precision}" for name in QUANTIZED for precision in PRECISIONS)
            known = ", ".join(f"{mode}[{COMPILED}]" for mode in (*MODES, *quantized))
            raise InputError(f"there is no mode {mode!r}: this version has {known}")
    if not modes or len(set(modes)) < len(modes):
        raise InputError(f"--modes is {words!r}: name each mode once, with commas between")
    return modes


def static_of(mode: str) -> str:
    """The mode that decodes without a draft what `mode` decodes with one."""
    return mode.replace("speculative", "static", 1)


def check_draft(job: Job, modes: list[str]) -> None:
    """Raises a LlamaBookError, in one line, for a draft that can't speak for the job's model, or has nothing to do."""
    from llamabook.checkpoint import load_config
    from llamabook.fast.engine import check_same_tokens
    from llamabook.tokenizer import has_tokenizer, load_tokenizer, tokenizer_folder

    speculative = [mode for mode in modes if parts_of(mode)[0] == "speculative"]
    if job.draft_checkpoint_path is None:
        if speculative:
            raise InputError(f"{speculative[0]} needs a draft: give --draft_checkpoint_path")
        if job.speculate_k is not None:
            raise InputError("--speculate_k is for a draft: give --draft_checkpoint_path, too")
        return
    if job.checkpoint_path is None:
        raise InputError("a draft of random weights is never right: give --checkpoint_path with --draft_checkpoint_path")
    if not speculative:
        raise InputError("--draft_checkpoint_path is for the speculative modes: name one in --modes, or leave --modes out")
    if job.speculate_k is not None and job.speculate_k < 1:
        raise InputError(f"--speculate_k is {job.speculate_k}: give 1 or more, or leave it out")
    places = [Path(path) for path in (job.checkpoint_path, job.draft_checkpoint_path)]
    length = job.prompt_tokens + job.max_new_tokens
    if length > (context := load_config(places[1])["context_length"]):
        raise ContextError(f"prompt and new tokens are {length}, the draft's context is {context}: ask for fewer")
    folders = [tokenizer_folder(place) for place in places]
    ours = load_tokenizer(folders[0])
    check_same_tokens(ours, load_tokenizer(folders[1]) if has_tokenizer(folders[1]) else None)


def shapes() -> dict[str, dict]:
    """The shapes that can be measured without a checkpoint, and that `inflate` gives a small model, by name."""
    from llamabook import llama2, llama3

    draft = {  # of a Llama 2 that guesses ahead of a larger one, in the size of gpt-fast's forks for it
        **llama2.LLAMA2_CONFIG_7B,
        "context_length": 2048,
        "emb_dim": 768,
        "n_heads": 12,
        "n_kv_groups": 12,
        "n_layers": 4,
        "hidden_dim": 3072,
    }
    return {
        "draft-80m": draft,
        "llama2-7b": llama2.LLAMA2_CONFIG_7B,
        "llama3-8b": llama3.LLAMA3_CONFIG_8B,
        "llama3.1-8b": llama3.LLAMA31_CONFIG_8B,
        "llama3.2-1b": llama3.LLAMA32_CONFIG_1B,
        "llama3.2-3b": llama3.LLAMA32_CONFIG_3B,
    }


def config_of(job: Job) -> dict:
    """The configuration of the job's checkpoint or shape, with the job's dtype."""
    import torch

    from llamabook import pocket
    from llamabook.checkpoint import load_config

    known = shapes()
    if job.checkpoint_path is not None:
        config = load_config(Path(job.checkpoint_path))
    elif job.shape in known:
        config = known[job.shape]
    elif job.shape in pocket.names():
        config = load_config(pocket.path(job.shape))
    else:
        names = ", ".join([*sorted(known), *pocket.names()])
        raise InputError(f"there is no shape {job.shape!r}: this version has {names}")
    return {"rope_freq": None, "n_kv_groups": config["n_heads"], **config, "dtype": getattr(torch, job.dtype)}


def cache_bytes_per_slot(config: dict) -> int:
    """What one token takes in the cache of one row, all layers together."""
    from llamabook.llama2 import head_dim_of

    return 2 * config["n_layers"] * config["n_kv_groups"] * head_dim_of(config) * config["dtype"].itemsize


def weight_bytes(config: dict) -> int:
    """What one forward reads of the weights: all of them, but of an embedding that is not the head only a few rows."""
    from llamabook.llama2 import head_dim_of

    D, F, V, d = config["emb_dim"], config["hidden_dim"], config["vocab_size"], head_dim_of(config)
    attention = 2 * D * d * (config["n_heads"] + config["n_kv_groups"])
    layer = attention + 3 * D * F + 2 * D
    return (config["n_layers"] * layer + D + V * D) * config["dtype"].itemsize


def bytes_per_step(mode: str, job: Job, config: dict, weights: int | None = None) -> float:
    """What a decoding step must read and write at least, on average over the steps that are timed.

    The weights once for all rows, `weights` bytes (None: all in the job's dtype); in a cached mode, for each row, the
    slots so far, the one that is written and read in this step included.
    """
    read = weight_bytes(config) if weights is None else weights
    if parts_of(mode)[0] in UNCACHED:
        return read
    steps = job.max_new_tokens - 1  # step i reads the prompt and i new tokens, 1 <= i <= steps
    slots = job.prompt_tokens + (1 + steps) / 2
    return read + job.batch_size * (slots + 1) * cache_bytes_per_slot(config)  # + 1: what is written
