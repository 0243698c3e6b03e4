"""What the command line understands, written by hand: commands, flags, and one line for every mistake.

Typer reads the words; a command then returns what is to be done, and `main` does it. So every way to end is in
`main`: 0 for done, 2 for a mistake of the caller (one line on stderr), 130 for Ctrl-C, 141 for a reader that has
hung up. Flag words are those of gpt-fast, and `--max-new-tokens` is the same as `--max_new_tokens`.

torch is imported by the commands that need it, after their flags are known to be right.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer
from typer.core import TyperCommand, TyperGroup

from llamabook import __version__
from llamabook.errors import InputError, LlamaBookError

# click's UsageError, the parent of every mistake that Typer finds; its home depends on Typer's version
UsageError = typer.BadParameter.__base__
Action = Callable[[], None]


def underscores(word: str) -> str:
    """The spelling under which a flag is known: `max-new-tokens` is `max_new_tokens`."""
    return word.replace("-", "_")


class Commands(TyperGroup):
    """The group of commands; it names what exists when it is asked for something else."""

    def resolve_command(self, ctx, args):
        known = self.list_commands(ctx)
        args = [next((name for name in known if underscores(name) == underscores(args[0])), args[0]), *args[1:]]
        if args[0] not in known:
            near = difflib.get_close_matches(args[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"this version has {', '.join(known)}"
            raise InputError(f"there is no command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)


class SeveralTasks(TyperCommand):
    """A command whose flags for tasks take several words, as in gpt-fast: `--tasks a b` is `--tasks a --tasks b`."""

    SEVERAL = ("--tasks", "--calibration_tasks", "--calibration-tasks")

    def parse_args(self, ctx, args):
        flag, words = "", [""]
        for word in args:
            if word.startswith("-"):
                flag = word.partition("=")[0]
                if words[-1] in self.SEVERAL:
                    raise typer.BadParameter(f"needs a value, and was followed by {flag}", ctx, param_hint=words[-1])
            elif flag in self.SEVERAL and words[-1] != flag:
                words.append(flag)
            words.append(word)
        return super().parse_args(ctx, words[1:])


app = typer.Typer(
    name="llamabook",
    cls=Commands,
    help="The Llama Book: Llama from scratch, then fast.",
    epilog="'llamabook COMMAND --help' lists a command's flags; hyphens and underscores are the same.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "token_normalize_func": underscores,
        "help_option_names": ["--help", "-h"],
        "max_content_width": 100,
    },
)


def not_a_flag(ctx: typer.Context, param: typer.CallbackParam, value):
    """Refuse a flag of this command as a value: `--prompt --seed 3` lacks its prompt."""
    flags = {flag for parameter in ctx.command.params for flag in parameter.opts}
    word = str(value).split("=")[0]
    if word.startswith("--") and "--" + underscores(word[2:]) in flags:
        raise typer.BadParameter(f"needs a value, and was followed by {word}", param_hint=f"--{param.name}")
    return value


def word(flag: str, metavar: str, help: str):
    """An option that takes a word: a text, a name or a path, but none of the command's own flags."""
    return typer.Option(flag, metavar=metavar, help=help, callback=not_a_flag)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        print(f"llamabook {__version__}")
        raise typer.Exit()


CheckpointPath = Annotated[
    Optional[Path],
    word(
        "--checkpoint_path",
        "PATH",
        "Folder with weights, parameters and tokenizer, or the weight file in it. [default: an embedded model]",
    ),
]
Prompt = Annotated[str, word("--prompt", "TEXT", "How the text begins; - reads it from stdin.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max_new_tokens", metavar="N", help="Stop after N tokens, or earlier at the end of the text.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0 always takes the likeliest token; higher varies more.")
]
TopK = Annotated[
    Optional[int], typer.Option("--top_k", metavar="K", help="Draw from the K likeliest tokens only.")
]
TopP = Annotated[
    Optional[float],
    typer.Option("--top_p", metavar="P", help="Draw from the fewest tokens that have P of the probability together."),
]
MinP = Annotated[
    Optional[float],
    typer.Option("--min_p", metavar="P", help="Draw from the tokens with at least P of the likeliest's probability."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same texts.")]
Device = Annotated[Optional[str], word("--device", "NAME", "cpu, cuda, cuda:1 or mps. [default: the fastest there is]")]
Dtype = Annotated[
    Optional[str],
    word("--dtype", "NAME", "Type of the weights: float32, bfloat16 or float16. [default: the checkpoint's own]"),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Decode through torch.compile, which first takes some seconds.")
]
CompilePrefill = Annotated[bool, typer.Option("--compile_prefill", help="Compile the reading of the prompt, too.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
ExactActivations = Annotated[
    bool,
    typer.Option("--exact_activations", help="With quantized weights, never round what they are multiplied with to 8 bits."),
]


@app.callback(invoke_without_command=True)
def llamabook(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


@app.command()
def run(prompt: Prompt = "One sunny morning,", seed: Seed = 1234) -> Action:
    """Let an embedded Llama tell a story."""
    from llamabook.cli.run import tell

    return partial(tell, prompt=prompt, seed=seed)


@app.command()
def generate(
    ctx: typer.Context,
    checkpoint_path: CheckpointPath = None,
    prompt: Prompt = "One sunny morning,",
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Each line of stdin is a prompt, instead of --prompt.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message in the model's chat format; print the reply.")
    ] = False,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    stop: Annotated[
        Optional[list[str]],
        typer.Option("--stop", metavar="TEXT", help="A text also ends when it has come to hold TEXT. Repeatable."),
    ] = None,
    seed: Seed = 1234,
    num_samples: Annotated[
        Optional[int], typer.Option("--num_samples", metavar="N", help="How many texts to write. [default: a batch]")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch_size", metavar="N", help="How many texts to decode together; they stay the same.")
    ] = 1,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
    compile_prefill: CompilePrefill = False,
    profile: Annotated[
        Optional[Path],
        word("--profile", "FILE", "Write a trace of the last batch, for Perfetto: FILE.json, or FILE if it is .json.gz."),
    ] = None,
    exact_activations: ExactActivations = False,
) -> Action:
    """Continue a prompt with a Llama.

    The text goes to stdout as it is drawn, the speed to stderr. It ends at the end-of-sequence token, after
    max_new_tokens tokens, or where the model's context ends. Text n of a run draws with the seed SEED + n, from 0 on.

    With --interactive prompts are typed, or come from a pipe, and only what follows them is shown; Ctrl-C stops a text.
    It goes with neither --prompt, --num_samples, --batch_size nor --profile.
    """
    from llamabook.cli.generate import continue_lines, write
    from llamabook.cli.speak import Sampling, Speaker

    load = partial(
        Speaker,
        checkpoint_path,
        device,
        chat=chat,
        dtype=dtype,
        compile=compile,
        compile_prefill=compile_prefill,
        exact_activations=exact_activations,
    )
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, tuple(stop or ()), seed)
    if interactive:
        for flag in ("prompt", "num_samples", "batch_size", "profile"):
            if ctx.get_parameter_source(flag).name == "COMMANDLINE":
                raise InputError(f"--interactive and --{flag}: give one of them")
        return partial(continue_lines, load=load, sampling=sampling)
    return partial(
        write,
        load=load,
        prompt=prompt,
        sampling=sampling,
        num_samples=batch_size if num_samples is None else num_samples,
        batch_size=batch_size,
        profile=profile,
    )


@app.command()
def chat(
    checkpoint_path: CheckpointPath = None,
    system: Annotated[
        Optional[str], word("--system", "TEXT", "What the model is told before the first message.")
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.6,
    top_k: TopK = None,
    top_p: TopP = 0.9,
    min_p: MinP = None,
    seed: Seed = 1234,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
    compile_prefill: CompilePrefill = False,
    exact_activations: ExactActivations = False,
) -> Action:
    """Talk with a Llama.

    Each line is a message; from a pipe too. Ctrl-C stops an answer, Ctrl-D ends, /help lists the commands. When the
    context is full, the oldest messages are forgotten.
    """
    from llamabook.cli.chat import talk
    from llamabook.cli.speak import Sampling, Speaker

    return partial(
        talk,
        load=partial(
            Speaker,
            checkpoint_path,
            device,
            chat=True,
            dtype=dtype,
            compile=compile,
            compile_prefill=compile_prefill,
            exact_activations=exact_activations,
        ),
        system=system,
        sampling=Sampling(max_new_tokens, temperature, top_k, top_p, min_p, seed=seed),
    )


@app.command()
def download(
    source: Annotated[
        str, typer.Argument(metavar="REPO_OR_URL", help="ORG/NAME of a Hugging Face repository, or a file's address.")
    ],
    output: Annotated[
        Optional[Path],
        word("--output", "PATH", "Where it goes. [default: checkpoints/ORG/NAME, or a file of its own name here]"),
    ] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Make a folder of safetensors of whatever format the repository has.")
    ] = False,
    revision: Annotated[Optional[str], word("--revision", "NAME", "Branch, tag or commit of the repository.")] = None,
    include: Annotated[
        Optional[list[str]],
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Take these files of the repository, instead of its best weights and what belongs to them. Repeatable.",
        ),
    ] = None,
    sha256: Annotated[Optional[str], word("--sha256", "HEX", "What the file's bytes must hash to.")] = None,
    force: Force = False,
) -> Action:
    """Download a model or a file.

    Repeated after an interruption, it goes on where it stopped. Nothing has its final name before it is whole and
    checked. For repositories with terms, log in with 'hf auth login' or set HF_TOKEN.
    """
    from llamabook.cli.download import bring

    return partial(
        bring,
        source=source,
        output=output,
        convert=convert,
        revision=revision,
        include=tuple(include or ()),
        sha256=sha256,
        force=force,
    )


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder or file of weights, in any layout that loads.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    layout: Annotated[str, word("--layout", "NAME", "huggingface, meta or gptfast.")] = "huggingface",
    dtype: Dtype = None,
    force: Force = False,
) -> Action:
    """Write a checkpoint in another layout.

    SRC stays as it is. DST gets its name when everything is in it, so an interrupted conversion leaves nothing.
    """
    from llamabook.cli.convert import rewrite

    return partial(rewrite, src=src, dst=dst, layout=layout, dtype=dtype, force=force)


@app.command(cls=SeveralTasks)
def quantize(
    ctx: typer.Context,
    checkpoint_path: CheckpointPath = None,
    mode: Annotated[str, word("--mode", "NAME", "int8, int4 or int4-gptq.")] = "int8",
    groupsize: Annotated[
        int, typer.Option("--groupsize", metavar="N", help="int4: how many weights share a scale: 32, 64, 128 or 256.")
    ] = 32,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="int4: each group also has a zero of its own, which no other library reads.")
    ] = False,
    output: Annotated[
        Optional[Path],
        word("--output", "DIR", "The folder to write. [default: beside the checkpoint, as NAME-int8, NAME-int4.g32 or so]"),
    ] = None,
    calibration_file: Annotated[
        Optional[Path], word("--calibration_file", "TEXT", "int4-gptq: a text to calibrate with. [default: the farm's texts]")
    ] = None,
    calibration_tasks: Annotated[
        Optional[list[str]],
        typer.Option("--calibration_tasks", metavar="NAME", help="int4-gptq: or the texts of these tasks of lm-eval."),
    ] = None,
    calibration_limit: Annotated[
        Optional[int], typer.Option("--calibration_limit", metavar="N", help="int4-gptq: at most N texts.")
    ] = None,
    calibration_seq_length: Annotated[
        Optional[int], typer.Option("--calibration_seq_length", metavar="N", help="int4-gptq: N tokens each.")
    ] = None,
    percdamp: Annotated[
        Optional[float],
        typer.Option("--percdamp", metavar="X", help="int4-gptq: what is added to the Hessian, as a share of its diagonal."),
    ] = None,
    blocksize: Annotated[
        Optional[int], typer.Option("--blocksize", metavar="N", help="int4-gptq: columns that are worked on together.")
    ] = None,
    act_order: Annotated[
        bool, typer.Option("--act_order", help="int4-gptq: the columns with the largest inputs come first.")
    ] = False,
    force: Force = False,
) -> Action:
    """Write a checkpoint with 8 or 4 bits a weight.

    int8 has one scale a row, int4 one for each group of a row, int4-gptq chooses its codes by what they do to texts. The
    token table and the norms stay as they are. generate and chat take the folder as any other.
    """
    from llamabook.cli.quantize import shrink

    given = {name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name).name == "COMMANDLINE"}
    return partial(
        shrink,
        checkpoint_path=checkpoint_path,
        mode=mode,
        groupsize=groupsize,
        asymmetric=asymmetric,
        output=output,
        force=force,
        given=given,
    )


@app.command()
def train(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="pocket-llama2, pocket-gpt, pocket-llama3.2, pocket-llama3.2-instruct or pocket-draft.",
        ),
    ],
    output: Annotated[Optional[Path], word("--output", "DIR", "Where to write. [default: runs/NAME]")] = None,
    base: Annotated[
        Optional[Path],
        word(
            "--base",
            "DIR",
            "For pocket-llama3.2-instruct: the model to start from. [default: the embedded pocket-llama3.2]",
        ),
    ] = None,
    steps: Annotated[
        Optional[int], typer.Option("--steps", metavar="N", help="Fewer steps than the recipe has, for a trial.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where a saved state would be used.")] = False,
) -> Action:
    """Train an embedded model again.

    It takes 30 to 40 minutes on two CPU cores; instruct and draft take less. A run that was stopped goes on when the
    command is repeated.
    """
    from llamabook.cli.train import learn

    return partial(learn, name=name, output=output, base=base, steps=steps, restart=restart)


@app.command(cls=SeveralTasks)
def eval(
    ctx: typer.Context,
    checkpoint_path: CheckpointPath = None,
    tasks: Annotated[
        Optional[list[str]],
        typer.Option(
            "--tasks",
            metavar="NAME ...",
            help="Tasks of lm-eval, such as hellaswag winogrande, or YAML files. [default: the farm's, which need no download]",
        ),
    ] = None,
    limit: Annotated[
        Optional[int], typer.Option("--limit", metavar="N", help="Only the first N questions of each task.")
    ] = None,
    perplexity: Annotated[
        Optional[Path], word("--perplexity", "FILE", "Instead of tasks, how well the model predicts a text.")
    ] = None,
    window: Annotated[
        Optional[int],
        typer.Option("--window", metavar="N", help="Of the text, N tokens are read at once. [default: the context, at most 2048]"),
    ] = None,
    stride: Annotated[
        Optional[int], typer.Option("--stride", metavar="N", help="The window moves N tokens. [default: half a window]")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch_size", metavar="N", help="How many texts or windows to read side by side.")
    ] = 16,
    max_seq_length: Annotated[
        Optional[int],
        typer.Option("--max_seq_length", metavar="N", help="Read at most N tokens of a question. [default: the context]"),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run through torch.compile, which first takes some seconds.")
    ] = False,
    output: Annotated[Optional[Path], word("--output", "FILE", "Write the scores as JSON.")] = None,
) -> Action:
    """Measure how good a Llama is: scores on tasks, or the perplexity of a text.

    Tasks run in lm-eval (pip install 'llamabook[eval]'); several names follow one --tasks. Each score stands with its
    standard error and with what guessing would score.
    """
    from llamabook.cli.eval import score_tasks, score_text
    from llamabook.cli.speak import Speaker

    others = ("tasks", "limit", "max_seq_length") if perplexity else ("window", "stride")
    for flag in others:
        if ctx.get_parameter_source(flag).name == "COMMANDLINE":
            raise InputError(
                f"--perplexity and --{flag}: give one of them" if perplexity else f"--{flag} is for --perplexity: give that, too"
            )
    load = partial(Speaker, checkpoint_path, device, dtype=dtype)
    how = {"load": load, "batch_size": batch_size, "compile": compile, "output": output}
    if perplexity:
        return partial(score_text, path=perplexity, window=window, stride=stride, **how)
    names = [name.strip() for word in tasks or () for name in word.split(",")]
    return partial(score_tasks, names=names, limit=limit, max_length=max_seq_length, **how)


@app.command()
def bench(
    checkpoint_path: Annotated[
        Optional[Path],
        word("--checkpoint_path", "PATH", "Folder with weights, or the weight file in it. [default: --shape]"),
    ] = None,
    shape: Annotated[
        Optional[str],
        word(
            "--shape",
            "NAME",
            "Random weights of a model's shape: llama3.2-1b, llama3.2-3b, llama3-8b, llama3.1-8b, llama2-7b, draft-80m or an "
            "embedded model's. [default: an embedded model's]",
        ),
    ] = None,
    modes: Annotated[
        Optional[str],
        word(
            "--modes",
            "LIST",
            "What to compare, with commas between: regular, fast, kv_cache and static, static_int8, static_int4 "
            "(groups of 32; static_int4.g64 and so on), and speculative in the same kinds, each also with _compiled. "
            "[default: regular, kv_cache and static, each also compiled; with a draft static,speculative]",
        ),
    ] = None,
    draft_checkpoint_path: Annotated[
        Optional[Path], word("--draft_checkpoint_path", "PATH", "The draft of the speculative modes; all modes then read text.")
    ] = None,
    speculate_k: Annotated[
        Optional[int], typer.Option("--speculate_k", metavar="N", help="How many tokens it drafts a round. [default: as many as pay]")
    ] = None,
    device: Device = None,
    dtype: Annotated[str, word("--dtype", "NAME", "Type of the weights: float32, bfloat16 or float16.")] = "bfloat16",
    batch_size: Annotated[int, typer.Option("--batch_size", metavar="N", help="How many texts at once.")] = 1,
    prompt_tokens: Annotated[int, typer.Option("--prompt_tokens", metavar="N", help="How long the prompt is.")] = 32,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", metavar="N", help="How many tokens follow.")] = 48,
    check_tokens: Annotated[
        int, typer.Option("--check_tokens", metavar="N", help="Also time steps of N tokens at once, in the engine's modes.")
    ] = 0,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="How often each mode has its turn.")] = 9,
    cold: Annotated[
        bool,
        typer.Option("--cold/--no_cold", help="Also start each compiled mode with nothing compiled before."),
    ] = True,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Measure the CPU kernels alone, against torch's operators; no model.")
    ] = False,
    peer: Annotated[
        Optional[list[str]],
        typer.Option(
            "--peer",
            metavar="NAME=COMMAND",
            help="Another program in the rotation, which speaks as llamabook.bench.worker does. Repeatable.",
        ),
    ] = None,
    output: Annotated[
        Optional[Path], word("--output", "FILE", "Write the rows as JSON, and a figure beside it as PNG.")
    ] = None,
) -> Action:
    """Measure how fast a Llama decodes here, and how fast the memory lets it.

    Each mode runs in a process of its own; they take turns, and beside each turn stands the speed of reading the
    weights. Prefill and decoding are timed apart.
    """
    from llamabook.cli.bench import compare, kernels_alone

    if kernels:
        return partial(kernels_alone, rounds=rounds, output=output)
    return partial(
        compare,
        checkpoint_path=checkpoint_path,
        shape=shape,
        modes=modes,
        draft_checkpoint_path=draft_checkpoint_path,
        speculate_k=speculate_k,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        check_tokens=check_tokens,
        rounds=rounds,
        cold=cold,
        peers=tuple(peer or ()),
        output=output,
    )


@app.command()
def inflate(
    shape: Annotated[
        str,
        word("--shape", "NAME", "What is to be written: llama3.2-1b or draft-80m, or another shape of bench with the same head_dim."),
    ],
    output: Annotated[Path, word("--output", "DIR", "The folder to write.")],
    checkpoint_path: Annotated[
        Optional[Path],
        word("--checkpoint_path", "NAME", "An embedded model, or a folder with weights. [default: pocket-llama3.2]"),
    ] = None,
    dtype: Annotated[
        Optional[str], word("--dtype", "NAME", "Type of the weights: float32, bfloat16 or float16. [default: the shape's, bfloat16]")
    ] = None,
    force: Force = False,
) -> Action:
    """Lay a small Llama into a large shape.

    The result writes the small model's texts at the large one's cost: what is added computes exact zeros. So speed,
    quantization and speculation can be measured at real size, offline. Its config.json says what it was inflated from.
    """
    from llamabook.cli.inflate import lay

    return partial(lay, checkpoint_path=checkpoint_path, shape=shape, output=output, dtype=dtype, force=force)


@app.command(name="draft-eval")
def draft_eval(
    checkpoint_path: Annotated[
        Optional[Path],
        word("--checkpoint_path", "PATH", "The model: folder with weights and tokenizer. [default: the embedded pocket-llama3.2]"),
    ] = None,
    draft_checkpoint_path: Annotated[
        Optional[Path],
        word("--draft_checkpoint_path", "PATH", "The draft; it needs no tokenizer. [default: the embedded pocket-draft]"),
    ] = None,
    batch_size: Annotated[str, word("--batch_size", "LIST", "How many texts at once, as 1,2,4 or 1..4.")] = "1,2,4,8",
    speculate_k: Annotated[str, word("--speculate_k", "LIST", "How many tokens to draft a round.")] = "1..8",
    prompts: Annotated[
        Optional[Path], word("--prompts", "FILE", "A prompt a line. [default: beginnings of the farm's held-out stories]")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", metavar="N", help="How long each text becomes; no end of text stops it.")
    ] = 64,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="How often everything has its turn.")] = 5,
    temperature: Temperature = 0.0,
    seed: Seed = 1234,
    device: Device = None,
    dtype: Dtype = None,
    draft_dtype: Annotated[
        Optional[str], word("--draft_dtype", "NAME", "Type of the draft's weights. [default: as --dtype]")
    ] = None,
    compile: Compile = False,
    exact_activations: ExactActivations = False,
    output: Annotated[
        Optional[Path], word("--output", "FILE", "Write all numbers as JSON, and a figure beside it as PNG.")
    ] = None,
) -> Action:
    """Measure how much faster a draft makes a model.

    For each batch size, first what steps cost, and how often a draft must be right to pay at that. Then texts, with each
    number of drafted tokens and plainly, in turns: how often the draft is right, what the formula predicts, what was
    gained. Any checkpoint that loads can be the draft.
    """
    from llamabook.cli.draft_eval import measure_draft

    return partial(
        measure_draft,
        checkpoint_path=checkpoint_path,
        draft_checkpoint_path=draft_checkpoint_path,
        batch_size=batch_size,
        speculate_k=speculate_k,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        draft_dtype=draft_dtype,
        compile=compile,
        exact_activations=exact_activations,
        output=output,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Do what `argv` (default: the program's arguments) asks for and return the exit code."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? rather than stopping
    try:
        action = app(
            args=list(sys.argv[1:] if argv is None else argv), prog_name="llamabook", standalone_mode=False
        )
        if callable(action):
            action()
        sys.stdout.flush()
        return action if isinstance(action, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        print(file=sys.stderr)
        return 130
    except UsageError as error:
        return complain(usage_line(error), error.ctx.command_path if error.ctx else "llamabook")
    except LlamaBookError as error:
        return complain(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 141
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            return complain("the memory of this device is too small for this model: try a smaller one, or --device cpu")
        raise


def usage_line(error: Exception) -> str:
    """Say in one line what is wrong with the words of the command line."""
    if hasattr(error, "possibilities"):  # click's NoSuchOption
        near = [flag for flag in error.possibilities or () if flag.startswith("--")]
        hint = f"did you mean {near[0]}?" if near else "--help lists those that exist"
        if not error.option_name.startswith("--"):
            hint = "flags have two hyphens, as in --help"
        return f"there is no flag {error.option_name}: {hint}"
    message = error.format_message()
    return message[:1].lower() + message[1:]


def complain(message: str, command: str = "llamabook") -> int:
    """Print the one line that a mistake gets, and return its exit code."""
    sys.stdout.flush()
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return 2
