"""The command line: what it writes, where it writes it, and one line with exit code 2 for every mistake.

Most tests call `main` in this process; those about exit codes of a real program start one. They use a small
Llama 2 with random weights and a tokenizer trained here; the last section uses the embedded pocket model.
"""

import gzip
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_llamas import kernels_first, shown, write_llama2, write_llama3

import llamabook
from llamabook.checkpoint import load_model
from llamabook.cli import main
from llamabook.cli.run import Page
from llamabook.fast import kernels
from llamabook.generate import generate, token_ids_to_text
from llamabook.sampling import next_token_probs
from llamabook.tokenizer import ChatFormat, Llama2ChatFormat, load_tokenizer

PACKAGE = Path(llamabook.__file__).resolve().parent.parent
CONTEXT = 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A checkpoint in Meta's layout: random weights, and a tokenizer with bytes."""
    return write_llama2(tmp_path_factory.mktemp("checkpoint"), CONTEXT)


@pytest.fixture(scope="session")
def llama3(tmp_path_factory) -> Path:
    """A Llama 3.2 in Hugging Face's layout, and a ranks file."""
    return write_llama3(tmp_path_factory.mktemp("llama3"), CONTEXT)


@pytest.fixture
def cli(folder, capsys):
    """Call `generate` on the random checkpoint with more flags; gives (exit code, stdout, stderr)."""

    def call(*flags, command="generate"):
        checkpoint = [] if "--checkpoint_path" in flags else ["--checkpoint_path", str(folder)]
        code = main([command, *checkpoint, *map(str, flags)])
        return code, *capsys.readouterr()

    return call


def program(*words, cwd=None, **options) -> subprocess.CompletedProcess:
    """Run `python -m llamabook` as a program of its own."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "llamabook", *map(str, words)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        cwd=cwd,
        timeout=120,
        **options,
    )


def one_line(code: int, out: str, err: str, *words: str) -> None:
    """Assert that a mistake was answered with exit code 2 and one line, on stderr, that holds `words`."""
    assert (code, out) == (2, ""), err
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err, err


# What it writes


@torch.no_grad()
def drawn(folder: Path, prompt: str, n: int, seed: int, min_p: float = 0.0, **options) -> list[int]:
    """The ids of a text by another road: the model of chapter 1 without a cache, and a running sum done by hand."""
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ids, dice = tokenizer.encode(prompt, bos=True), torch.Generator().manual_seed(seed)
    for _ in range(min(n, CONTEXT - len(ids))):
        probs = next_token_probs(model(torch.tensor([ids]))[:, -1], **options)[0].double()
        probs[probs < min_p * probs.max()] = 0
        luck, token = float(torch.rand(1, generator=dice, dtype=torch.float64) * probs.sum()), 0
        while (luck := luck - float(probs[token])) >= 0:
            token += 1
        ids.append(token)
        if token in tokenizer.stop_tokens:
            break
    return ids


def test_the_streamed_text_is_the_decoded_generation(cli, folder):
    tokenizer = load_tokenizer(folder)
    flags = ["--max_new_tokens", 30, "--temperature", 1.3, "--top_k", 50, "--top_p", 0.95, "--seed", 3]
    for prompt in ("The old llama", "", "Ünïcödé 🦙 "):
        ids = drawn(folder, prompt, 30, 3, temperature=1.3, top_k=50, top_p=0.95)
        code, out, _ = cli("--prompt", prompt, *flags)
        assert code == 0
        assert out == token_ids_to_text(ids, tokenizer) + "\n"


def test_greedy_text_is_that_of_the_first_chapter(cli, folder):
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ids = torch.tensor([tokenizer.encode("The old llama", bos=True)])
    text = token_ids_to_text(generate(model, ids, 40, CONTEXT, eos_id=tokenizer.stop_tokens), tokenizer)
    assert cli("--prompt", "The old llama", "--max_new_tokens", 40, "--temperature", 0)[:2] == (0, text + "\n")


SPEED = r"\d+ tokens? in \d+\.\d\d s, \d+\.\d tokens/s"
LATER = r" \(prompt \d+\.\d\d s, then \d+\.\d tokens/s\)\nBandwidth achieved: \d+\.\d GB/s\n"
MEMORY = r"(Memory used: \d+\.\d\d GB\n)?"  # not on Windows


def test_text_goes_to_stdout_and_speed_to_stderr(cli):
    code, out, err = cli("--prompt", "The old llama", "--max_new_tokens", 12, "--device", "cpu")
    assert code == 0
    assert out.startswith("The old llama") and out.endswith("\n")
    assert re.fullmatch(SPEED + LATER + MEMORY, err)
    err = cli("--max_new_tokens", 1)[2]
    assert err.startswith("1 token in ") and re.fullmatch(f"{SPEED}\n{MEMORY}", err)


def test_what_is_said_about_speed_adds_up(capsys):
    """Seconds, tokens, and the bytes of weights and caches that the steps after the first need."""
    from llamabook.cli.generate import report
    from llamabook.cli.speak import Speaker, Spoken

    speaker = Speaker(device="cpu")
    weights = sum(weight.nbytes for weight in speaker.model.parameters())  # the head is the embedding
    cfg = speaker.model.cfg
    slot = 2 * cfg["n_layers"] * cfg["n_kv_groups"] * cfg["head_dim"] * 4
    spoken = Spoken(rows=[[1] * 11, [1] * 5], seconds=0.25, first=0.2499, ended=True, cut=False)
    report(speaker, [1] * 20, spoken)
    moved = 10 * weights + 2 * slot * sum(20 + step + 1 for step in range(1, 11))  # a step also writes one slot a row
    said = "16 tokens in 0.25 s, 64.0 tokens/s (prompt 0.25 s, then 140000.0 tokens/s)"
    assert capsys.readouterr().err == f"{said}\nBandwidth achieved: {moved / 1e-4 / 1e9:.1f} GB/s\n"


def test_the_prompt_is_timed_apart(folder, monkeypatch):
    from llamabook.cli.speak import Sampling, Speaker

    def slow(*args, **kwargs):
        for token in (5, 6, 7):
            yield 0, token
            time.sleep(0.1)

    monkeypatch.setattr("llamabook.fast.stream", slow)
    spoken = Speaker(folder, "cpu").speak([1], Sampling(), [str])
    assert spoken.first < 0.1 < 0.3 <= spoken.seconds


def test_no_new_tokens_gives_the_prompt_back(cli):
    assert cli("--prompt", "The old llama", "--max_new_tokens", 0)[:2] == (0, "The old llama\n")


def test_hyphens_underscores_and_equals_signs_are_the_same(cli):
    flags = ["--max_new_tokens", "8", "--top_k", "20", "--seed", "5"]
    expected = cli(*flags)[1]
    assert cli(*[flag.replace("_", "-") for flag in flags])[1] == expected
    assert cli("--max-new-tokens=8", "--top_k=20", "--seed=5")[1] == expected
    assert cli("--prompt=--x_y", "--max_new_tokens=0")[1] == "--x_y\n", "a value keeps its spelling"


def test_the_same_seed_gives_the_same_texts_and_samples_differ(cli):
    flags = ["--max_new_tokens", 20, "--temperature", 1, "--num_samples", 3]
    first, again, other = (cli(*flags, "--seed", seed) for seed in (1, 1, 2))
    assert first[1] == again[1] != other[1]
    texts = first[1].split("\n\n")
    assert len(set(texts)) == 3
    assert cli(*flags[:4], "--seed", 1)[1].strip("\n") == texts[0], "the first sample is that of --num_samples 1"
    heads = [line.split(":")[0] for line in first[2].splitlines()]
    bandwidth, memory = "Bandwidth achieved", [] if sys.platform == "win32" else ["Memory used"]
    assert heads == ["Sample 1", bandwidth, "Sample 2", bandwidth, "Sample 3", bandwidth, "Average", *memory]


def test_text_r_has_the_seed_plus_r_whatever_is_decoded_beside_it(cli, folder):
    tokenizer = load_tokenizer(folder)
    texts = [token_ids_to_text(drawn(folder, "Hay", 25, 5 + row, temperature=1.0), tokenizer) for row in range(5)]
    assert len(set(map(len, texts))) > 1
    flags = ["--prompt", "Hay", "--max_new_tokens", 25, "--temperature", 1, "--seed", 5]
    for batch_size in (1, 2, 3, 5, 7):
        code, out, err = cli(*flags, "--num_samples", 5, "--batch_size", batch_size)
        assert (code, out) == (0, "\n".join(f"{text}\n" for text in texts))
        labels = [line.split(":")[0] for line in err.splitlines() if line.startswith("Sample")]
        starts = range(1, 6, batch_size)
        ends = [min(start + batch_size - 1, 5) for start in starts]
        assert labels == [f"Samples {i} to {j}" if i < j else f"Sample {i}" for i, j in zip(starts, ends)]
    assert cli(*flags, "--batch_size", 5)[1] == out, "a batch is what there is without --num_samples"


def test_the_first_of_a_batch_is_shown_while_the_others_are_drawn(folder, monkeypatch):
    from llamabook.cli import generate as page
    from llamabook.cli.speak import Sampling, Speaker

    shown = []
    monkeypatch.setattr(page, "show", shown.append)
    speaker = Speaker(folder, "cpu")
    page.write_batch(speaker, speaker.encode("Hay", 20), Sampling(20, seed=5), 3, 0)
    assert len(shown) > 10 and "".join(shown[:-1]).startswith("Hay") and shown[-1].count("\n\nHay") == 2


def test_min_p_and_stop_strings(cli, folder):
    tokenizer = load_tokenizer(folder)
    flags = ["--max_new_tokens", 40, "--temperature", 1, "--seed", 8]
    ids = drawn(folder, "One sunny morning,", 40, 8, min_p=0.2, temperature=1.0)
    assert cli(*flags, "--min_p", 0.2)[1] == token_ids_to_text(ids, tokenizer) + "\n" != cli(*flags)[1]
    text = cli(*flags)[1]
    new = text[len("One sunny morning,") :]
    late, early = new[20:23], new[8:10]
    code, out, err = cli(*flags, "--stop", late, "--stop", early, "--stop", "never said")
    assert code == 0 and text.startswith(out.removesuffix("\n"))
    assert early in out[len("One sunny morning,") :] and late not in out and "context" not in err
    assert cli(*flags, "--stop", "sunny")[1] == text, "it is looked for in what is new"
    ends = cli(*flags[2:], "--max_new_tokens", 1000, "--stop", early)[2]
    assert "context" not in ends, "a text that was stopped was not cut by the context"


def test_temperature_zero_needs_no_luck(cli):
    greedy = cli("--max_new_tokens", 10, "--temperature", 0, "--seed", 1)[1]
    assert cli("--max_new_tokens", 10, "--temperature", 0, "--seed", 2)[1] == greedy
    assert cli("--max_new_tokens", 10, "--temperature", 2, "--top_k", 1)[1] == greedy


def test_a_text_stops_at_the_end_of_sequence_token(cli, monkeypatch, folder):
    tokenizer = load_tokenizer(folder)
    hay = tokenizer.encode(" hay")
    monkeypatch.setattr(
        "llamabook.fast.stream",
        lambda *args, **kwargs: iter((0, token) for token in [*hay, tokenizer.eos_id]),
    )
    code, out, err = cli("--prompt", "The llamas eat")
    assert (code, out) == (0, token_ids_to_text(tokenizer.encode("The llamas eat") + hay, tokenizer) + "\n")
    assert f"{len(hay) + 1} tokens in" in err, "the end was drawn too"


def test_a_text_stops_where_the_context_ends_and_says_so(cli, folder):
    code, out, err = cli("--max_new_tokens", 1000, "--temperature", 0)
    assert code == 0
    assert err.splitlines()[2] == f"Stopped at the context length of {CONTEXT} tokens."
    prompt = len(load_tokenizer(folder).encode("One sunny morning,", bos=True))
    assert f"{CONTEXT - prompt} tokens in" in err


def test_the_prompt_can_come_from_stdin(cli, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("A young fårmer\r\n".encode())))
    assert cli("--prompt", "-", "--max_new_tokens", 0)[1] == "A young fårmer\n"


def test_a_chat_prints_the_reply_only(cli, folder):
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    prompt = Llama2ChatFormat(tokenizer).encode("Hay?")
    ids = generate(model, torch.tensor([prompt]), 8, CONTEXT, eos_id=tokenizer.stop_tokens)[0, len(prompt) :]
    code, out, _ = cli("--chat", "--prompt", "Hay?", "--max_new_tokens", 8, "--temperature", 0)
    assert (code, out) == (0, token_ids_to_text(ids, tokenizer) + "\n")


@pytest.mark.parametrize("flag", ["--prompt", "--chat"])
def test_a_llama_3_speaks_with_its_own_tokenizer_and_format(flag, cli, llama3):
    """The text is that of `generate`; control tokens are not shown, and one that ends the text ends it."""
    tokenizer, model = load_tokenizer(llama3), load_model(llama3)
    prompt = ChatFormat(tokenizer).encode("Hay?") if flag == "--chat" else tokenizer.encode("Hay?", bos=True)
    ids = generate(model, torch.tensor([prompt]), 20, CONTEXT, eos_id=tokenizer.stop_tokens)[0].tolist()
    text = shown(tokenizer, ids[len(prompt) * (flag == "--chat") :])
    flags = ["--prompt", "Hay?", *(["--chat"] if flag == "--chat" else []), "--max_new_tokens", 20, "--temperature", 0]
    assert cli("--checkpoint_path", str(llama3), *flags)[:2] == (0, text + "\n")
    assert cli("--checkpoint_path", str(llama3 / "model.safetensors"), *flags)[:2] == (0, text + "\n")


def test_dtype_is_the_type_of_the_weights(cli, monkeypatch):
    seen = []
    monkeypatch.setattr("llamabook.fast.load", lambda *args, dtype, **more: seen.append(dtype) or 1 / 0)
    for flags in ([], ["--dtype", "bfloat16"], ["--dtype=float16"]):
        with pytest.raises(ZeroDivisionError):
            cli(*flags)
    assert seen == [None, torch.bfloat16, torch.float16]


def test_a_tokenizer_is_found_where_meta_puts_it(folder, tmp_path, cli):
    """Meta's own download has the tokenizer one folder up from the weights."""
    (tmp_path / "llama-2").mkdir()
    for name in ("consolidated.00.pth", "params.json"):
        (tmp_path / "llama-2" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    flags = ["--max_new_tokens", 5, "--temperature", 0]
    assert cli("--checkpoint_path", tmp_path / "llama-2", *flags)[:2] == cli(*flags)[:2]


def test_the_weight_file_is_as_good_as_its_folder(cli, folder):
    expected = cli("--max_new_tokens", 5, "--temperature", 0)[1]
    file = folder / "consolidated.00.pth"
    assert cli("--checkpoint_path", str(file), "--max_new_tokens", 5, "--temperature", 0)[1] == expected


# Prompts typed one after the other


def typed(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(line + "\n" for line in lines).encode())))


def test_interactive_continues_each_line(cli, folder, monkeypatch):
    """Only what is new is shown; prompt n draws with the seed + n."""
    tokenizer = load_tokenizer(folder)
    flags = ["--interactive", "--max_new_tokens", 12, "--temperature", 1, "--seed", 4]
    typed(monkeypatch, "Hay", "", "The fårmer ", "Hay")
    code, out, err = cli(*flags)
    expected = []
    for number, prompt in enumerate(("Hay", "The fårmer ", "Hay")):
        ids = drawn(folder, prompt, 12, 4 + number, temperature=1.0)
        expected.append(tokenizer.decode(ids[len(tokenizer.encode(prompt, bos=True)) :]) + "\n")
    assert (code, out) == (0, "".join(expected)) and expected[0] != expected[2]
    assert re.fullmatch(f"({SPEED}{LATER}){{3}}{MEMORY}", err)


def test_interactive_chat_answers_each_line_for_itself(cli, folder, monkeypatch):
    flags = ["--chat", "--max_new_tokens", 8, "--temperature", 0]
    alone = [cli(*flags, "--prompt", prompt)[1] for prompt in ("Hay?", "Why?")]
    typed(monkeypatch, "Hay?", "Why?")
    assert cli("--interactive", *flags)[:2] == (0, "".join(alone))


def test_interactive_mistakes_from_a_pipe(cli, monkeypatch):
    for line in ("llama " * CONTEXT,):
        typed(monkeypatch, line)
        one_line(*cli("--interactive"), "the prompt has")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n")))
    one_line(*cli("--interactive"), "UTF-8")


# Compiled, and traced


def counted(graphs: list):
    """Stands in for the compiler behind torch.compile: runs graphs as they are, and collects them."""
    return lambda graph, example_inputs: graphs.append(graph) or graph.forward


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_compile_is_handed_over_and_timed_apart(command, cli, monkeypatch):
    graphs, texts = [], []
    for flags in ([], ["--compile"], ["--compile_prefill"], ["--compile", "--compile-prefill"]):
        torch._dynamo.reset()
        graphs.append([])
        words = ["--prompt", "Hay?", "--num_samples", 2] if command == "generate" else []
        typed(monkeypatch, "Hay?", "Why?")
        with torch.compiler.set_stance("default", force_backend=counted(graphs[-1])):
            code, out, err = cli(*words, "--max_new_tokens", 12, "--seed", 3, *flags, command=command)
        texts.append(out)
        assert code == 0 and err.count("Compilation time: ") == bool(flags)
    torch._dynamo.reset()
    assert len(set(texts)) == 1
    none, one, other, both = map(len, graphs)
    assert none == 0 < min(one, other) and both > max(one, other)


def test_nothing_is_compiled_after_the_warm_up(folder, capsys):
    from llamabook.cli.speak import Sampling, Speaker

    torch._dynamo.reset()
    graphs, sampling = [], Sampling(30, temperature=1.0)
    speaker = Speaker(folder, "cpu", compile=True, compile_prefill=True)
    ids = speaker.encode("The old llama", 30)
    with torch.compiler.set_stance("default", force_backend=counted(graphs)):
        for rows in (1, 3):
            speaker.warm_up(ids, sampling, rows)
            before = len(graphs)
            speaker.speak(ids, sampling, [str] * rows, number=1)
            assert len(graphs) == before > 0
            speaker.warm_up(ids, sampling, rows)
    torch._dynamo.reset()
    assert capsys.readouterr().err.count("Compilation time") == 2, "once for each number of rows"


def test_without_a_compiler_one_line_and_on(cli):
    def no_compiler(graph, example_inputs):
        raise RuntimeError("No working C++ compiler found\nin many places")

    torch._dynamo.reset()
    flags = ["--max_new_tokens", 12, "--num_samples", 2]
    with torch.compiler.set_stance("default", force_backend=no_compiler):
        code, out, err = cli(*flags, "--compile", "--compile_prefill")
    torch._dynamo.reset()
    assert (code, out) == cli(*flags)[:2]
    assert err.count("torch.compile does not work here") == 1 and "Compilation time" not in err


def test_really_compiled(capsys):
    flags = ["--temperature", "0", "--max_new_tokens", "20"]
    assert main(["generate", *flags]) == 0
    plain = capsys.readouterr().out
    assert main(["generate", *flags, "--compile"]) == 0
    out, err = capsys.readouterr()
    assert out == plain and ("Compilation time: " in err or "does not work here" in err)
    torch._dynamo.reset()


@pytest.mark.parametrize("name, file", [("trace", "trace.json"), ("a.json", "a.json"), ("b.json.gz", "b.json.gz")])
def test_profile_writes_a_trace_of_the_last_batch(name, file, cli, tmp_path):
    flags = ["--max_new_tokens", 9, "--temperature", 0]
    code, out, err = cli(*flags, "--num_samples", 3, "--profile", tmp_path / name)
    assert (code, out) == cli(*flags, "--num_samples", 3)[:2]
    assert [path.name for path in tmp_path.iterdir()] == [file] and err.count(f"The trace is in {tmp_path / file}:") == 1
    content = (tmp_path / file).read_bytes()
    events = json.loads(gzip.decompress(content) if file.endswith(".gz") else content)["traceEvents"]
    names = [event.get("name") for event in events]
    blocks, steps = 2, 9  # the prompt, and 8 tokens of one sample
    in_one_call = steps - 1 if kernels.ready() else 0  # the prompt has more tokens than that is for
    assert names.count("llamabook::layers") == in_one_call
    assert names.count("aten::silu") == blocks * (steps - in_one_call)


def test_profile_that_cannot_be_written(cli, tmp_path, monkeypatch):
    (tmp_path / "x.json").mkdir()
    for path, words in (("no/x", "no folder"), ("x.json", "a folder"), ("x", "a folder"), (".", "a folder")):
        one_line(*cli("--profile", tmp_path / path), "--profile", words)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("llamabook.fast.stream", interrupt)
    assert cli("--profile", tmp_path / "y")[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_lines_are_broken_between_words(capsys):
    page = Page(width=12)
    for piece in ("The o", "ld lla", "ma walks to", " a veryverylongword", ".\nIt", " eats."):
        page.push(piece)
    page.flush()
    assert capsys.readouterr().out == "The old\nllama walks\nto a\nveryverylongword.\nIt eats."


# What it says about itself


def test_help_and_version_are_quick_and_complete():
    code = "import sys; from llamabook.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for words in (["--help"], ["generate", "--help"], ["run", "-h"], ["--version"], [], ["generate", "--top_k", "0"]):
        done = subprocess.run([sys.executable, "-c", code, *words], env=os.environ | {"PYTHONPATH": str(PACKAGE)})
        assert done.returncode == 0, words


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llamabook {llamabook.__version__}\n"


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["--version"]) == 0


def test_no_words_at_all_show_the_help(capsys):
    assert main([]) == 0
    empty = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == empty
    for command in ("run", "generate", "chat", "download", "convert", "train"):
        assert re.search(rf"^  {command} +\w", empty, re.MULTILINE)


# Mistakes: one line, exit code 2


@pytest.mark.parametrize(
    "words, answer",
    [
        (["sing"], ["no command 'sing'", "this version has run, generate, chat, download"]),
        (["generat"], ["did you mean generate?"]),
        (["--frobnicate"], ["no flag --frobnicate"]),
        (["generate", "--frobnicate"], ["llamabook generate:", "no flag --frobnicate"]),
        (["generate", "--max-new-token", "3"], ["did you mean --max_new_tokens?"]),
        (["generate", "-prompt", "x"], ["two hyphens"]),
        (["generate", "--prompt"], ["--prompt"]),
        (["generate", "--prompt", "--seed", "3"], ["--prompt", "needs a value", "--seed"]),
        (["generate", "--prompt", "--max-new-tokens=3"], ["--prompt", "needs a value"]),
        (["generate", "--top_k", "many"], ["--top_k"]),
        (["generate", "--top_k", "0"], ["--top_k is 0"]),
        (["generate", "--top_p", "1.5"], ["--top_p is 1.5"]),
        (["generate", "--top_p", "-0.1"], ["--top_p is -0.1"]),
        (["generate", "--temperature", "-1"], ["--temperature is -1.0"]),
        (["generate", "--temperature", "nan"], ["--temperature is nan"]),
        (["generate", "--temperature", "inf"], ["--temperature is inf"]),
        (["generate", "--max_new_tokens", "-1"], ["--max_new_tokens is -1"]),
        (["generate", "--max_new_tokens", "2.5"], ["--max_new_tokens"]),
        (["generate", "--num_samples", "0"], ["--num_samples is 0"]),
        (["generate", "--batch_size", "0"], ["--batch_size is 0"]),
        (["generate", "--batch_size", "2", "--num_samples", "-1"], ["--num_samples is -1"]),
        (["generate", "--min_p", "1.5"], ["--min_p is 1.5"]),
        (["generate", "--stop", "hay", "--stop="], ["--stop is empty"]),
        (["generate", "--profile", "--seed=3"], ["--profile", "needs a value"]),
        (["generate", "--profile="], ["--profile", "folder"]),
        (["generate", "--interactive", "--prompt", "x"], ["--interactive and --prompt: give one"]),
        (["generate", "--interactive", "--num-samples=2"], ["--interactive and --num_samples: give one"]),
        (["generate", "--interactive", "--batch_size=2"], ["--interactive and --batch_size: give one"]),
        (["generate", "--interactive", "--profile=x"], ["--interactive and --profile: give one"]),
        (["generate", "--interactive", "--seed=-1"], ["--seed is -1"]),
        (["generate", "--seed", "-1"], ["--seed is -1"]),
        (["generate", "--seed", str(2**70)], ["--seed is"]),
        (["run", "--seed", "-1"], ["--seed is -1"]),
        (["generate", "--chat=yes"], ["--chat"]),
        (["generate", "Hello"], ["Hello"]),
        (["run", "Hello"], ["Hello"]),
        (["train"], ["NAME"]),
        (["train", "pocket-lama2"], ["pocket-lama2", "pocket-llama2"]),
        (["train", "pocket-llama2", "--steps", "0"], ["--steps is 0"]),
        (["train", "pocket-llama2", "--output", "--steps=3"], ["--output", "needs a value"]),
        (["generate", "--prompt", "\udcff"], ["UTF-8"]),
        (["generate", "--dtype", "half"], ["--dtype is 'half'", "bfloat16"]),
        (["generate", "--dtype", "--seed=3"], ["--dtype", "needs a value"]),
        (["chat", "--top_k", "0"], ["--top_k is 0"]),
        (["download"], ["REPO_OR_URL"]),
        (["download", "model"], ["neither a repository"]),
        (["generate", "--device", "toaster"], ["--device is 'toaster'"]),
        (["generate", "--device", "cuda:x"], ["--device is 'cuda:x'"]),
        (["generate", "--device", "cuda:99"], ["--device is 'cuda:99'", "--device cpu"]),
        (["generate", "--checkpoint_path", "/no/such/folder"], ["/no/such/folder"]),
    ],
    ids=" ".join,
)
def test_a_mistake_gets_one_line(words, answer, capsys):
    one_line(main(words), *capsys.readouterr(), *answer)


def test_a_prompt_longer_than_the_context(cli):
    one_line(*cli("--prompt", "llama " * CONTEXT), "the prompt has", f"context length is {CONTEXT}")
    one_line(*cli("--prompt", "llama " * CONTEXT, "--chat"), "the prompt has")


def test_a_prompt_that_fills_the_context_leaves_no_room(cli, folder):
    tokenizer = load_tokenizer(folder)
    prompt = "a"
    while len(tokenizer.encode(prompt, bos=True)) < CONTEXT:
        prompt += "z"
    assert len(tokenizer.encode(prompt, bos=True)) == CONTEXT
    one_line(*cli("--prompt", prompt), f"the prompt has {CONTEXT} tokens")
    assert cli("--prompt", prompt, "--max_new_tokens", 0)[:2] == (0, prompt + "\n")
    assert cli("--prompt", prompt[:-1], "--max_new_tokens", 1)[0] == 0


def test_stdin_that_is_not_text(cli, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00")))
    one_line(*cli("--prompt", "-"), "UTF-8")


class Hostile:
    """Pickled, this creates a file when it is loaded without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def damaged(kind: str, folder: Path, copy: Path) -> Path:
    """Copy the checkpoint and damage the weight file in one way; gives the path to hand to the program."""
    for name in ("params.json", "tokenizer.model", "consolidated.00.pth"):
        (copy / name).write_bytes((folder / name).read_bytes())
    weights = copy / "consolidated.00.pth"
    content = weights.read_bytes()
    match kind:
        case "missing":
            weights.unlink()
        case "empty":
            weights.write_bytes(b"")
        case "truncated":
            weights.write_bytes(content[: len(content) // 2])
        case "html":
            weights.write_text("<!DOCTYPE html><html><body>Access denied</body></html>\n" * 20)
        case "hostile":
            torch.save({"tok_embeddings.weight": Hostile(copy / "executed")}, weights)
        case "hostile-pickle":
            weights.write_bytes(pickle.dumps(Hostile(copy / "executed"), protocol=2))
        case "wrong-shapes":
            tensors = torch.load(weights, weights_only=True)
            torch.save({name: tensor[..., :-1] for name, tensor in tensors.items()}, weights)
        case "no-tokenizer":
            (copy / "tokenizer.model").unlink()
        case "no-params":
            (copy / "params.json").unlink()
        case "foreign-tokenizer":
            params = (copy / "params.json").read_text()
            (copy / "params.json").write_text(re.sub(r'"vocab_size": *\d+', '"vocab_size": 300', params))
            tensors = torch.load(weights, weights_only=True)
            for name in ("tok_embeddings.weight", "output.weight"):
                tensors[name] = tensors[name][:300].clone()
            torch.save(tensors, weights)
    return copy


DAMAGES = (
    "missing empty truncated html hostile hostile-pickle wrong-shapes no-tokenizer no-params foreign-tokenizer".split()
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_gets_one_line(kind, cli, folder, tmp_path):
    path = damaged(kind, folder, tmp_path)
    before = sorted(tmp_path.iterdir())
    one_line(*cli("--checkpoint_path", path), str(path))
    if (path / "consolidated.00.pth").exists():
        one_line(*cli("--checkpoint_path", path / "consolidated.00.pth"), str(path))
    assert sorted(tmp_path.iterdir()) == before, "nothing is executed, nothing is written"


# As a program


def test_the_program_speaks_from_any_folder(folder, tmp_path):
    done = program("generate", "--checkpoint-path", folder, "--max-new-tokens", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("One sunny morning,")
    assert re.fullmatch(SPEED + LATER + MEMORY, done.stderr)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["html", "hostile"])
def test_the_program_answers_a_damaged_checkpoint(kind, folder, tmp_path):
    checkpoint, elsewhere = tmp_path / "checkpoint", tmp_path / "cwd"
    checkpoint.mkdir(), elsewhere.mkdir()
    path = damaged(kind, folder, checkpoint)
    done = program("generate", "--checkpoint_path", path, cwd=elsewhere)
    one_line(done.returncode, done.stdout, done.stderr, str(path))
    assert not any(elsewhere.iterdir()) and not (checkpoint / "executed").exists()


def test_the_program_answers_an_unknown_flag():
    done = program("generate", "--promt", "x")
    one_line(done.returncode, done.stdout, done.stderr, "did you mean --prompt?")


def test_ctrl_c_ends_cleanly(cli, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("llamabook.fast.stream", interrupt)
    code, _, err = cli("--prompt", "The old llama")
    assert (code, err.strip()) == (130, "")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")])
def test_too_little_memory_gets_one_line(error, cli, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("llamabook.fast.load", fail)
    one_line(*cli(), "memory", "--device cpu")


def test_a_bug_keeps_its_traceback(cli, monkeypatch):
    monkeypatch.setattr("llamabook.fast.load", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE and other pipes")
def test_a_reader_that_hangs_up_is_no_error(folder):
    words = ["generate", "--checkpoint_path", str(folder), "--num_samples", "200", "--max_new_tokens", "50"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llamabook", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout.read(10) == b"One sunny "
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert "Traceback" not in err and "BrokenPipe" not in err


# Training


def test_train_hands_over_its_flags_and_says_what_comes_next(monkeypatch, tmp_path, capsys):
    calls = []

    def train(name, output, *, base, steps, resume, log):
        calls.append((name, output, base, steps, resume))
        log("step 1/1")
        (tmp_path / "consolidated.00.pth").touch()
        return tmp_path

    monkeypatch.setattr("llamabook.pocket.train.train", train)
    assert main(["train", "pocket-llama2"]) == 0
    assert main(["train", "pocket-gpt", "--output", str(tmp_path), "--steps=3", "--restart"]) == 0
    assert main(["train", "pocket-llama3.2-instruct", "--base", str(tmp_path)]) == 0
    assert calls == [
        ("pocket-llama2", None, None, None, True),
        ("pocket-gpt", tmp_path, None, 3, False),
        ("pocket-llama3.2-instruct", None, tmp_path, None, True),
    ]
    out, _ = capsys.readouterr()
    assert out.splitlines()[0] == "step 1/1"
    assert out.splitlines()[2] == f"Next: python -m llamabook generate --checkpoint_path {tmp_path}"
    assert out.splitlines()[-1] == f"Next: python -m llamabook chat --checkpoint_path {tmp_path}"


def test_an_interrupted_training_says_how_to_go_on(monkeypatch, capsys):
    def train(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("llamabook.pocket.train.train", train)
    assert main(["train", "pocket-llama2"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


# The embedded model


def test_the_embedded_model_is_the_default(capsys):
    flags = ["--prompt", "One sunny morning,", "--max_new_tokens", "30", "--temperature", "0"]
    assert main(["generate", *flags]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("One sunny morning,") and len(out.split()) > 15
    assert "tokens/s" in err


def test_run_tells_a_story_and_says_what_comes_next(capsys):
    assert main(["run"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    head, story, numbers = out.split("\n\n")
    assert "pocket-llama3.2" in head and "million parameters" in head
    assert story.startswith("One sunny morning,") and story.count(".") >= 4
    assert max(map(len, out.splitlines())) <= 100
    assert re.match(rf"pocket-llama3.2: {SPEED} \(prompt .*\)\nNext: ", numbers)
    assert main(["run"]) == 0
    assert capsys.readouterr().out.split("\n\n")[1] == story, "the shown sample does not change from run to run"


def test_the_embedded_model_answers_a_chat(capsys):
    assert main(["generate", "--chat", "--prompt", "What do llamas eat?", "--temperature", "0"]) == 0
    out, _ = capsys.readouterr()
    assert out.strip() and "INST" not in out
