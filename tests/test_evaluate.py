"""Perplexity, log-likelihoods and the adapter for lm-eval, against one plain forward a row and the harness's own adapter."""

import json
import math
import os
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_llamas import kernels_first, write_llama3

from llamabook import fast, pocket
from llamabook.checkpoint import load_model
from llamabook.cli import main
from llamabook.errors import ContextError, InputError
from llamabook.evaluate import farm, log_likelihoods, perplexity, perplexity_of_file, perplexity_of_text
from llamabook.evaluate import perplexity as function
from llamabook.evaluate.farm import TASKS
from llamabook.pocket import world
from llamabook.pocket.world import GRAMMAR

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before datasets reads it: nothing here waits for a network

import llamabook.evaluate.harness as harness  # noqa: E402
from llamabook.evaluate.harness import Engine, evaluate, load_tasks, quiet, read_options  # noqa: E402

module = sys.modules[function.__module__]
CONTEXT = 48
OWN = Path(harness.evaluator.__file__).parent / "tasks"  # the harness's own tasks


@pytest.fixture(autouse=True)
def few_tasks(request, monkeypatch):
    """Of the harness's own tasks only hellaswag: its list of all is 14 000 files."""
    if "long" not in request.keywords:
        folder = {True: OWN / "hellaswag", False: None}
        own = {known: harness.TaskManager(include_defaults=False, include_path=path) for known, path in folder.items()}
        monkeypatch.setattr(harness, "manager_of", own.get)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama3(tmp_path_factory.mktemp("llama3"), CONTEXT)


@pytest.fixture(scope="module")
def small(folder):
    """The engine with random weights, a vocabulary of 576 and a context of 48, and its tokenizer."""
    return fast.load(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(folder):
    """The same weights in the book's own Llama, in float64: log p of every token after the first, by one forward."""
    model = load_model(folder, dtype=torch.float64).eval()

    @torch.no_grad()
    def log_probs(ids: list[int]) -> torch.Tensor:
        rows = model(torch.tensor([ids[:-1]])).log_softmax(dim=-1)[0]  # (T - 1, V)
        return rows, rows[torch.arange(len(ids) - 1), ids[1:]]

    return log_probs


@pytest.fixture(scope="module")
def llama32():
    return fast.load(pocket.path("pocket-llama3.2"), dtype=torch.float32)


def some_ids(number: int, seed: int = 0, vocabulary: int = 500) -> list[int]:
    return torch.randint(vocabulary, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---------------------------------------------------------------- windows


@given(st.integers(2, 200), st.integers(1, 60), st.data())
def test_windows_score_each_token_once(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    slides = list(module.windows(tokens, window, stride))
    assert [i for _, first, end in slides for i in range(first, end)] == list(range(1, tokens))
    for number, (start, first, end) in enumerate(slides):
        assert 0 <= start < first < end and end - 1 - start <= window
        if number:
            assert first - start >= window - stride + 1
            assert end - 1 - start == window  # as much context as there is room for


# ---------------------------------------------------------------- perplexity


def nats_of(plain, ids: list[int], window: int, stride: int) -> float:
    """The definition: each token's loss in the one window that scores it, a forward a window."""
    ends = [min(window + 1, len(ids))]
    while ends[-1] < len(ids):
        ends.append(min(ends[-1] + stride, len(ids)))
    nats, scored = 0.0, 1
    for end in ends:
        _, log_probs = plain(ids[max(end - 1 - window, 0) : end])
        nats -= float(log_probs[len(log_probs) - (end - scored) :].sum())
        scored = end
    return nats


@pytest.mark.parametrize("window, stride, batch_size, chunk", [
    (17, 5, 3, 7), (48, 48, 2, 2048), (48, 1, 16, 50), (1, 1, 5, 4), (13, 12, 1, 1), (30, 30, 4, 31), (None, None, 4, 2048),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [2, 3, 48, 49, 50, 131])
def test_perplexity_is_the_plain_one(small, plain, tokens, window, stride, batch_size, chunk):
    ids = some_ids(tokens)
    found = perplexity(small[0], ids, window=window, stride=stride, batch_size=batch_size, chunk=chunk)
    expected = nats_of(plain, ids, window or CONTEXT, stride or (window or CONTEXT) // 2)
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.tokens == tokens - 1
    assert found.perplexity == pytest.approx(math.exp(expected / (tokens - 1)), rel=1e-4)
    assert (found.window, found.stride) == (window or CONTEXT, stride or (window or CONTEXT) // 2)


def test_more_context_is_better(llama32):
    """On the model's own kind of text, and with a step that shows: half a sentence is not a story."""
    model, tokenizer = llama32
    text = next(d.text for d in world.texts("held_out") if d.kind == "story")
    losses = [perplexity_of_text(model, tokenizer, text, window=w, stride=1).nats_per_token for w in (4, 16, 200)]
    assert losses[0] > 1.5 * losses[1] > 2 * losses[2]


def test_a_long_text_takes_no_more_room_than_a_short_one(small, monkeypatch):
    """Logits in pieces, and only where a token is scored; caches of one batch of windows."""
    model, pieces, caches = small[0], [], []
    head, borrowed = model.head.forward, module.borrowed_cache
    monkeypatch.setattr(model.head, "forward", lambda x: pieces.append(len(x)) or head(x))
    monkeypatch.setattr(module, "borrowed_cache", lambda m, *size: caches.append(size) or borrowed(m, *size))
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * model.cfg["vocab_size"] + 5)
    perplexity(model, some_ids(400), window=16, stride=4, batch_size=3)
    assert max(pieces) == 7 and sum(pieces) == 399
    assert set(caches) <= {(rows, 16) for rows in (1, 2, 3)} and len(caches) == math.ceil((1 + 383 / 4) / 3)


def test_bytes_and_bits(llama32, tmp_path):
    model, tokenizer = llama32
    text = "Una mañana soleada,\r\nLeo went to the valley.\n"
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    found, same = perplexity_of_file(model, tokenizer, file), perplexity_of_text(model, tokenizer, text)
    assert found == same and found.bytes == len(text.encode()) == len(text) + 1
    assert found.tokens == len(tokenizer.encode(text))  # BOS is read and not scored; no EOS
    assert found.nats_per_byte == pytest.approx(found.nats / (len(text) + 1))
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity) * found.tokens / found.bytes)
    assert perplexity(model, tokenizer.encode(text, bos=True)).bits_per_byte is None


def test_files_that_are_no_text(small, tmp_path):
    model, tokenizer = small
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.bin"
    empty.write_bytes(b"")
    binary.write_bytes(b"llama \xff\xfe\x00")
    for path, words in ((empty, "is empty"), (binary, r"no UTF-8 text \(byte 6\)"), (tmp_path / "no", "check the path")):
        with pytest.raises(InputError, match=f"{re.escape(path.name)} .*{words}|{words}"):
            perplexity_of_file(model, tokenizer, path)
    with pytest.raises(InputError, match="can't be read"):
        perplexity_of_file(model, tokenizer, tmp_path)


@pytest.mark.parametrize("ids, options, error, words", [
    ([3], {}, InputError, "1 tokens"),
    ([], {}, InputError, "0 tokens"),
    ([3, 576], {}, InputError, "the id 576"),
    ([3, -1], {}, InputError, "the id -1"),
    ("no", {}, InputError, "list of token ids"),
    ([3, 4], {"window": 49}, ContextError, "context length is 48"),
    ([3, 4], {"window": 0}, InputError, "window is 0"),
    ([3, 4], {"window": 4, "stride": 5}, InputError, "never be read"),
    ([3, 4], {"stride": 0}, InputError, "stride is 0"),
    ([3, 4], {"batch_size": 0}, InputError, "batch_size is 0"),
    ([3, 4], {"chunk": True}, InputError, "chunk is True"),
])  # fmt: skip
def test_what_perplexity_refuses(small, ids, options, error, words):
    with pytest.raises(error, match=words):
        perplexity(small[0], ids, **options)


# ---------------------------------------------------------------- log-likelihoods


@pytest.mark.parametrize("batch_size, chunk", [(1, 2048), (4, 2048), (5, 11), (64, 1)])
def test_log_likelihoods_row_by_row(small, plain, batch_size, chunk):
    """Ragged rows in any order, the longest one token more than the context, which is scored and not read."""
    shapes = [(1, 1), (9, 4), (2, 20), (30, 1), (48, 1), (1, 48), (9, 4), (5, 2), (17, 3)]
    requests = [(some_ids(c, seed=i), some_ids(k, seed=99 + i)) for i, (c, k) in enumerate(shapes)]
    for i in (1, 3, 7):  # continuations that greedy decoding gives
        context, continuation = requests[i]
        ids = list(context)
        for _ in continuation:
            ids.append(int(plain([*ids, 0])[0][-1].argmax()))
        requests[i] = context, ids[len(context) :]
    found = log_likelihoods(small[0], requests, batch_size=batch_size, chunk=chunk)
    assert [greedy for _, greedy in found] == [i in (1, 3, 7) for i in range(len(shapes))]
    for (context, continuation), (log_prob, _) in zip(requests, found):
        _, expected = plain([*context, *continuation])
        assert log_prob == pytest.approx(float(expected[len(context) - 1 :].sum()), rel=1e-5)


def test_no_requests(small):
    assert log_likelihoods(small[0], []) == []


def test_compiled_is_the_same(small, monkeypatch):
    """What the compiler is asked for, and the way on where it fails; the compiler itself has its tests elsewhere."""
    model, asked = small[0], []
    from torch._dynamo.exc import ShortenTraceback

    def refused(*_):
        asked.append(1)
        raise ShortenTraceback("no compiler", first_useful_frame=None)

    monkeypatch.setattr(module, "compile_model", lambda model: setattr(model, "compiled_as", "blocks"))
    requests = [([1, 2, 3], [4, 5]), ([7], [8])]
    expected = log_likelihoods(model, requests)
    monkeypatch.setattr(model, "hidden", refused)
    monkeypatch.setattr(module, "refuse", lambda m, error: (setattr(m, "compiled_as", "refused"), monkeypatch.undo()))
    assert log_likelihoods(model, requests, compile=True) == expected
    assert asked == [1]


@pytest.mark.parametrize("request_, error, words", [
    (([], [1]), InputError, "request 1 has no context"),
    (([1], []), InputError, "request 1 has no continuation"),
    (([1], [576]), InputError, "request 1 has the id 576"),
    (([1], ["a"]), InputError, "request 1 is"),
    (([1] * 40, [1] * 10), ContextError, "request 1 has 50 tokens, the context length is 48"),
])  # fmt: skip
def test_what_log_likelihoods_refuse(small, request_, error, words):
    with pytest.raises(error, match=words):
        log_likelihoods(small[0], [([1], [2]), request_])


# ---------------------------------------------------------------- the farm's tasks


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_fixed_and_different(name):
    rows = TASKS[name].rows()
    assert len(rows) == 400 and len({row["query"] for row in rows}) == 400
    make = getattr(farm, name.removeprefix("farm_")).__wrapped__
    assert make(0, 20) == rows[:20]
    assert make(1, 20) != rows[:20]


def test_the_right_choice_is_of_the_world_and_no_wrong_one_is():
    """By the grammar's own parser; the right text is held out, so no model was trained on it."""
    for rows, kind in ((farm.facts(), "questions"), (farm.endings(), "story")):
        for row in rows[:60]:
            assert len(row["choices"]) == len(set(row["choices"])) == 4
            for i, text in enumerate(row["choices"]):
                whole = f"{row['query']} {text}"
                assert bool(GRAMMAR.parse(whole, kind, limit=1)) == (i == row["gold"]), whole
            assert world.is_held_out(f"{row['query']} {row['choices'][row['gold']]}")


def test_the_right_choice_stands_anywhere():
    for rows in (farm.facts(), farm.endings()):
        places = [sum(row["gold"] == i for row in rows) for i in range(4)]
        assert min(places) > 70  # 100 each on average, with a deviation of 9


def test_all_right_answers_are_named():
    for row in farm.answers()[:60]:
        assert row["right"] and all(GRAMMAR.parse(f"{row['query']} {right}", "questions", limit=1) for right in row["right"])
        animal = re.search(r"What do (\w+) eat\? Answer:$", row["query"])
        if animal:
            foods = next(entry["eats"] for entry in world.LEXICONS["animals"].values() if entry["plural"] == animal[1])
            assert len(row["right"]) == len(foods)


def test_scores_tell_models_apart(llama32):
    """Well trained, less well trained, trained on other forms, and not at all: in this order, beyond what chance does."""
    tasks, scores = load_tasks(["farm_facts"]), []
    for name in ("pocket-llama3.2", "pocket-draft", "pocket-llama3.2-instruct"):
        model, tokenizer = llama32 if name == "pocket-llama3.2" else fast.load(pocket.path(name), dtype=torch.float32)
        scores.append(evaluate(model, tokenizer, tasks, limit=40)["farm_facts"]["acc"])
    model, tokenizer = fast.load(pocket.path("pocket-draft"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks:  # random weights
        for parameter in block.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.1, generator=generator)
    blind = evaluate(model, tokenizer, tasks, limit=40)["farm_facts"]["acc"]
    good, less, other = (score.value for score in scores)
    assert good == 1.0 > less > 0.9 > other > blind.value + 0.1
    assert blind.chance == 0.25 and abs(blind.value - 0.25) < 4 * 0.0685  # the deviation of a share of 40
    assert [score.questions for score in scores] == [40] * 3
    assert blind.error == pytest.approx(math.sqrt(blind.value * (1 - blind.value) / 39))
    assert sum(blind.each) / 40 == pytest.approx(blind.value) and set(blind.each) == {0.0, 1.0}


# ---------------------------------------------------------------- the adapter, against the harness's own


@pytest.fixture(scope="module")
def transformers_adapter():
    """lm-eval's adapter for transformers on the weights of pocket-llama3.2, with a tokenizer from the same ranks."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from llamabook.tokenizer.llama3 import SPLIT, special_names

    folder, bos = pocket.path("pocket-llama3.2"), "<|begin_of_text|>"
    names = special_names()
    made = TikTokenConverter(vocab_file=str(folder / "tokenizer.model"), pattern=SPLIT, extra_special_tokens=names)
    fast_tokenizer = made.converted()
    fast_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, fast_tokenizer.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer, bos_token=bos, eos_token="<|end_of_text|>", pad_token="<|finetune_right_pad_id|>"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with quiet():  # without its cache, which mixes up texts that repeat themselves
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu", logits_cache=False)


def test_tasks_score_as_in_the_harness(transformers_adapter, llama32):
    """The same questions, on the same weights: each log p, each answer, and each score."""
    from lm_eval import evaluator

    tasks = load_tasks()
    with quiet():
        theirs = evaluator.evaluate(transformers_adapter, tasks, limit=16, bootstrap_iters=0)
        ours = evaluator.evaluate(Engine(*llama32, batch_size=5), tasks, limit=16, bootstrap_iters=0)
    assert ours["results"] == theirs["results"] and set(ours["results"]) == set(TASKS)
    for task in TASKS:
        for one, other in zip(theirs["samples"][task], ours["samples"][task]):
            assert one["arguments"] == other["arguments"]
            for (expected,), (found,) in zip(one["resps"], other["resps"]):
                if isinstance(expected, str):
                    assert found == expected and found.strip()
                else:
                    assert found[0] == pytest.approx(expected[0], abs=1e-3) and found[1] == expected[1]
                    assert expected[0] < -1e-3 or expected[1]


def instances(kind: str, *arguments: tuple) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


@pytest.mark.parametrize("max_length", [7, 64, None])
def test_texts_and_pairs_as_in_the_harness(transformers_adapter, llama32, monkeypatch, max_length):
    """BOS, spaces at the seam, nothing before, cuts on the left, windows over a text: all as there."""
    ours = Engine(*llama32, batch_size=3, max_length=max_length)
    monkeypatch.setattr(transformers_adapter, "_max_length", max_length)
    stories = [document.text for document in islice(world.texts("held_out"), 3)]
    texts = instances("loglikelihood_rolling", *[(text,) for text in (*stories, "It repeats. " * 40, "Hi", "")])
    pairs = instances(
        "loglikelihood",
        (stories[0], " And so they stayed friends."), ("", "Leo went"), ("<|begin_of_text|>One", " sunny"),
        ("One sunny  ", "  morning"), ("Ma", "ple was here"), ("<|begin_of_text|>", "One"), ("a\n\n", "b"),
    )  # fmt: skip
    with quiet():
        theirs = transformers_adapter.loglikelihood_rolling(texts, disable_tqdm=True)
        expected = transformers_adapter.loglikelihood(pairs, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs, rel=1e-5, abs=1e-3)
    found = ours.loglikelihood(pairs)
    assert [log_prob for log_prob, _ in found] == pytest.approx([log_prob for log_prob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_texts_are_generated_as_in_the_harness(transformers_adapter, llama32, monkeypatch):
    """Stop strings that begin within a token, several of them, a limit, and contexts that lose their beginning."""
    ours = Engine(*llama32, batch_size=2, max_length=40)
    monkeypatch.setattr(transformers_adapter, "_max_length", 40)
    story = next(d.text for d in world.texts("held_out") if d.kind == "story")
    asked = instances(
        "generate_until",
        ("One sunny morning,", {"until": ["lama"], "max_gen_toks": 30}), ("Question: What do", {"until": "?", "max_gen_toks": 9}),
        (story, {"until": [". T", ", and"], "max_gen_toks": 30}), ("On", {"until": [], "max_gen_toks": 5, "do_sample": False}),
        ("Once", {"until": ["lama"], "max_gen_toks": 30}), ("In the", {"until": ["lama"], "max_gen_toks": 30}),
        (f"{story} {story}", {"until": ["\n"], "max_new_tokens": 30, "temperature": 0.0}),
    )  # fmt: skip
    with quiet():
        expected = transformers_adapter.generate_until(asked, disable_tqdm=True)
    found = ours.generate_until(asked)
    assert found == expected
    assert not any("lama" in text for text in found) and all(found)


# ---------------------------------------------------------------- what a task may ask for


@pytest.mark.parametrize("options, until, most, sampling", [
    ({}, [], 256, {"temperature": 0.0}),
    ({"until": "\n", "do_sample": False, "temperature": 0.7}, ["\n"], 256, {"temperature": 0.0}),
    ({"until": None, "do_sample": True}, [], 256, {"temperature": 1.0}),
    ({"until": ["", "a"], "temperature": 0.5, "top_k": 3}, ["a"], 256, {"temperature": 0.5, "top_k": 3}),
    ({"max_tokens": 4, "max_gen_toks": 7, "top_p": 0.9}, [], 7, {"temperature": 0.0}),
])  # fmt: skip
def test_generation_options(options, until, most, sampling):
    before = dict(options)
    assert read_options(options) == (until, most, sampling)
    assert options == before


def test_what_the_adapter_refuses(small):
    engine = Engine(*small, max_length=40)
    with pytest.raises(InputError, match="plain text"):
        engine.apply_chat_template([])
    with pytest.raises(InputError, match="num_beams"):
        engine.generate_until(instances("generate_until", ("a", {"num_beams": 2})))
    with pytest.raises(InputError, match="up to 40 new tokens, and 40"):
        engine.generate_until(instances("generate_until", ("a", {"max_gen_toks": 40})))
    with pytest.raises(InputError, match="continuation has 41 tokens, of 40"):
        engine._loglikelihood_tokens([(None, [1], [1] * 41)])
    for wrong in (0, 49, "9"):
        with pytest.raises(InputError, match="max_length is"):
            Engine(*small, max_length=wrong)
    with pytest.raises(InputError, match="batch_size is 0"):
        Engine(*small, batch_size=0)
    with pytest.raises(InputError, match="limit is 0"):
        evaluate(*small, limit=0)


@pytest.fixture
def own_tasks(tmp_path):
    """Task files as anyone writes them for lm-eval: a text to predict, a last word, sampled texts, and their data."""
    lines = [{"text": "The llama eats hay.", "word": "hay"}, {"text": "A goat eats leaves at home.", "word": "leaves"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/data.jsonl\ntest_split: train\n"
    kinds = {
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n',
        "word": 'output_type: loglikelihood\ndoc_to_text: "It eats"\ndoc_to_target: " {{word}}"\n',
    }
    for name, text in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: own_{name}\n{common}{text}")
    return {name: str(tmp_path / f"{name}.yaml") for name in kinds}


def test_task_files(llama32, own_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    scores = evaluate(*llama32, list(own_tasks.values()))
    model, tokenizer = llama32
    texts, bos = ["The llama eats hay.", "A goat eats leaves at home."], tokenizer.bos_id
    ids = [[bos, *tokenizer.encode(text, bos=True)] for text in texts]
    nats = sum(perplexity(model, row).nats for row in ids)
    rolling = scores["own_rolling"]
    assert rolling["word_perplexity"].value == pytest.approx(math.exp(nats / 10), rel=1e-4)
    assert rolling["bits_per_byte"].value == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-4)
    assert rolling["bits_per_byte"].each == () and rolling["bits_per_byte"].chance is None
    last = scores["own_word"]["acc"]
    assert last.questions == 2 and last.chance is None and len(last.each) == 2


def test_tasks_that_can_not_be_had(monkeypatch):
    with pytest.raises(InputError, match="there is no task 'farm_fact': is it farm_facts"):
        load_tasks("farm_fact")
    with pytest.raises(InputError, match="hellaswag can't be loaded: its data is on the Hugging Face Hub: connect"):
        load_tasks(["farm_facts", "hellaswag"])
    with pytest.raises(InputError, match="no task is named"):
        load_tasks([])

    def broken(self, names):
        raise ModuleNotFoundError("No module named 'antlr4'", name="antlr4")

    monkeypatch.setattr(harness.TaskManager, "load", broken)
    with pytest.raises(InputError, match="farm_facts can't be loaded: it needs the package antlr4"):
        load_tasks("farm_facts")


@pytest.mark.long
def test_the_harness_s_own_names():
    with pytest.raises(InputError, match="there is no task 'winogrand': is it winogrande"):
        load_tasks("winogrand")
    with pytest.raises(InputError, match="winogrande can't be loaded: its data is on the Hugging Face Hub: connect"):
        load_tasks("winogrande")


def test_nothing_is_left_behind(small, capsys):
    """No bars and no words where there is no terminal; the log levels and tqdm as before."""
    import logging

    from tqdm import tqdm

    begin, level = tqdm.__init__, logging.getLogger("lm_eval").level
    evaluate(*small, ["farm_facts"], limit=2, max_length=30)
    assert capsys.readouterr() == ("", "")
    assert tqdm.__init__ is begin and logging.getLogger("lm_eval").level == level


# ---------------------------------------------------------------- the command line


def call(capsys, *words) -> tuple[int, str, str]:
    code = main(["eval", *map(str, words)])
    return code, *capsys.readouterr()


def test_the_table(capsys, tmp_path):
    file = tmp_path / "scores.json"
    code, out, err = call(capsys, "--limit", 4, "--tasks", "farm_facts", "farm_answers", "--output", file)
    assert (code, err) == (0, "")
    heads, *lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert heads == ["task", "metric", "score", "chance", "questions"]
    assert [line[:2] for line in lines] == [["farm_facts", "acc"], ["farm_facts", "acc_norm"], ["farm_answers", "exact_match"]]
    assert lines[0][2:] == ["1.0000 ± 0.0000", "0.2500", "4"] and len(lines[2]) == 4
    written = json.loads(file.read_text())
    assert written["model"] == "pocket-llama3.2" and written["limit"] == 4
    assert [row["metric"] for row in written["scores"]] == ["acc", "acc_norm", "exact_match"]
    assert written["scores"][0]["each"] == [1.0] * 4


@pytest.mark.parametrize("words", [
    ["--tasks", "a", "b", "--limit", "3"], ["--limit", "3", "--tasks", "a,b"], ["--tasks=a", "b", "--limit", "3"],
    ["--tasks", "a", "--limit", "3", "--tasks", "b"], ["--tasks", "a", ",b", "--limit=3"],
])  # fmt: skip
def test_several_tasks(capsys, monkeypatch, words):
    """One --tasks takes several words, as in gpt-fast."""
    asked = []
    monkeypatch.setattr(harness, "load_tasks", lambda names: asked.append(names) or exec("raise InputError('enough')"))
    monkeypatch.setattr(harness, "InputError", InputError)
    code, _, err = call(capsys, *words)
    assert asked == [["a", "b"]] or asked == [["a", "", "b"]], err


def test_perplexity_of_a_file(capsys, tmp_path, folder):
    text, file = tmp_path / "text.txt", tmp_path / "loss.json"
    text.write_text("The old llama walks slowly to the green pond. " * 3)
    code, out, err = call(
        capsys, "--checkpoint_path", folder, "--dtype", "float32", "--perplexity", text, "--window", 20, "--stride", 7,
        "--output", file,
    )  # fmt: skip
    assert (code, err) == (0, "")
    model, tokenizer = fast.load(folder, dtype=torch.float32)
    expected = perplexity_of_file(model, tokenizer, text, window=20, stride=7)
    assert f"{expected.perplexity:.4f}" in out and f"{expected.bits_per_byte:.4f}" in out
    assert f"Windows of 20 tokens, 7 apart: {expected.windows}." in out
    assert json.loads(file.read_text())["nats"] == pytest.approx(expected.nats)


@pytest.mark.parametrize("words, line", [
    (["--tasks"], "requires an argument"),
    (["--tasks", "--limit", "3"], "--tasks: needs a value, and was followed by --limit"),
    (["farm_facts"], "unexpected extra argument"),
    (["--tasks", "nosuch_task_at_all"], "there is no task 'nosuch_task_at_all'"),
    (["--tasks", "hellaswag"], "connect to it, or take the farm's tasks"),
    (["--limit", "0"], "--limit is 0"),
    (["--batch_size", "0"], "--batch_size is 0"),
    (["--max_seq_length", "0"], "--max_seq_length is 0"),
    (["--tasks", "farm_facts", "--max_seq_length", "999999"], "context length is 131072"),
    (["--output", "scores.txt"], "ends in .json"),
    (["--window", "9"], "--window is for --perplexity"),
    (["--perplexity", "no.txt"], "no.txt can't be read"),
    (["--perplexity", "no.txt", "--limit", "3"], "--perplexity and --limit: give one"),
    (["--perplexity", "no.txt", "--tasks", "farm_facts"], "--perplexity and --tasks: give one"),
    (["--perplexity", __file__, "--window", "9", "--stride", "10"], "stride is 10, more than the window"),
    (["--perplexity", __file__, "--window", "0"], "--window is 0"),
    (["--perplexity", __file__, "--window", "999999"], "--window is 999999"),
])  # fmt: skip
def test_one_line_for_each_mistake(capsys, words, line):
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and line in err


@pytest.mark.parametrize("missing, line", [
    ("lm_eval", "tasks need lm-eval, which is not installed: pip install 'llamabook[eval]'"),
    ("lm_eval.tasks", "lm-eval can't be imported"),
])  # fmt: skip
def test_without_lm_eval(capsys, monkeypatch, tmp_path, missing, line):
    """Where it is missing or broken; perplexity needs none of it."""
    monkeypatch.delitem(sys.modules, "llamabook.evaluate.harness")
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = call(capsys)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and line in err
    text = tmp_path / "text.txt"
    text.write_text("A llama.")
    code, out, err = call(capsys, "--perplexity", text)
    assert (code, err) == (0, "") and "nats per token" in out
    assert "llamabook.evaluate.harness" not in sys.modules
