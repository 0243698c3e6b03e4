"""The engine against the plain models, transformers and counts of its own forward calls; and against mutants."""

import inspect
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llamas import SENTENCES, random_weights, write_llama2, write_llama3
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamabook import fast
from llamabook.checkpoint import load_model
from llamabook.errors import CheckpointError, ContextError, InputError
from llamabook.fast import decode
from llamabook.fast.cache import StaticCache
from llamabook.fast.model import from_llama
from llamabook.fast.sampling import Sampler, draw, greedy, keep_min_p
from llamabook.generate import generate as plain_generate
from llamabook.llama2 import LLAMA2_CONFIG_7B, Llama2Model
from llamabook.llama3 import LLAMA32_CONFIG_1B, Llama3Model

INF = math.inf
V, CONTEXT = 101, 400
EARLY = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 40}
LLAMA3 = {
    **LLAMA32_CONFIG_1B, "vocab_size": V, "context_length": CONTEXT, "emb_dim": 48, "n_heads": 6, "n_kv_groups": 2,
    "head_dim": 16, "n_layers": 3, "hidden_dim": 80, "rope_freq": EARLY, "rope_base": 10_000.0, "dtype": torch.float32,
}  # fmt: skip
LLAMA2 = {
    **LLAMA2_CONFIG_7B, "vocab_size": V, "context_length": CONTEXT, "emb_dim": 48, "n_heads": 4, "n_kv_groups": 4,
    "n_layers": 2, "hidden_dim": 80, "dtype": torch.float32,
}  # fmt: skip
PROMPTS = [[5, 17, 3, 99, 20], list(range(40, 77)), [8], [100, 0, 100, 0, 100, 0, 55, 54, 53, 12]]


@pytest.fixture(scope="module")
def llamas():
    """The plain models, by name."""
    return {"llama2": random_weights(Llama2Model(LLAMA2)), "llama3": random_weights(Llama3Model(LLAMA3))}


@pytest.fixture(scope="module")
def engines(llamas):
    return {name: from_llama(model) for name, model in llamas.items()}


@pytest.fixture
def engine(llamas):
    """A fresh engine that a test may compile or watch."""
    return from_llama(llamas["llama3"])


def is_greedy_text(model, prompt, new):
    """Whether `new` is what `model` says greedily after `prompt`, seen in one uncached pass, ties in float64 excused."""
    ids = torch.tensor([[*prompt, *new]])
    with torch.no_grad():
        logits = model(ids[:, :-1])[0, len(prompt) - 1 :].double()  # (n, V)
    lead = logits.amax(-1) - logits[range(len(new)), new]
    return len(new) > 0 and bool((lead < 1e-4).all())


class Forwards:
    """Counts the calls of `model` and notes the shapes and positions that it is given."""

    def __init__(self, model, monkeypatch):
        self.calls = []
        before = model.forward

        def forward(idx, input_pos, cache, last=None):
            self.calls.append((tuple(idx.shape), input_pos.clone(), cache))
            return before(idx, input_pos, cache, last)

        monkeypatch.setattr(model, "forward", forward)

    @property
    def shapes(self):
        return [shape for shape, _, _ in self.calls]


# ---------------------------------------------------------------- the same text


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_the_text_of_the_plain_model(llamas, engines, name):
    for prompt in PROMPTS:
        (new,) = fast.generate(engines[name], [prompt], 40)
        expected = plain_generate(llamas[name], torch.tensor([prompt]), 40, CONTEXT)[0, len(prompt) :]
        assert new == expected.tolist()
        assert len(set(new)) > 5  # a text, and not a stutter that any mistake would repeat


@pytest.mark.parametrize("name", ["llama2", "llama3"])
@pytest.mark.parametrize("chunk", [512, 23, 4, 1])
def test_ragged_batches_and_chunks(llamas, engines, name, chunk):
    rows = fast.generate(engines[name], PROMPTS, 60, chunk=chunk)
    for prompt, new in zip(PROMPTS, rows):
        assert len(new) == 60 and is_greedy_text(llamas[name], prompt, new)


def test_to_the_very_end_of_the_context(llamas, engines):
    for prompts in ([PROMPTS[1]], PROMPTS[:2]):
        n = CONTEXT - max(map(len, prompts))
        rows = fast.generate(engines["llama3"], prompts, n, chunk=16)
        for prompt, new in zip(prompts, rows):
            assert len(new) == n and is_greedy_text(llamas["llama3"], prompt, new)


@settings(deadline=None, max_examples=12)
@given(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=30), min_size=1, max_size=5), st.integers(1, 40))
def test_any_prompts_in_any_chunks(llamas, engines, prompts, chunk):
    rows = fast.generate(engines["llama3"], prompts, 6, chunk=chunk)
    assert all(is_greedy_text(llamas["llama3"], prompt, new) for prompt, new in zip(prompts, rows))


def test_transformers_says_the_same(llamas, engines):
    from test_llama3 import their_model

    theirs = their_model(LLAMA3, llamas["llama3"].state_dict(), "sdpa")
    ids = torch.tensor([PROMPTS[1]])
    said = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert fast.generate(engines["llama3"], [PROMPTS[1]], 64) == [said[0, ids.shape[1] :].tolist()]


def test_prefill_gives_the_logits_of_each_rows_last_token(llamas, engines):
    for chunk in (512, 20, 3):
        idx, lengths = decode.pad_right(PROMPTS)
        cache = StaticCache(LLAMA3, len(PROMPTS), 64)
        logits = decode.prefill(engines["llama3"], idx, lengths, cache, chunk)
        for row, prompt in enumerate(PROMPTS):
            with torch.no_grad():
                expected = llamas["llama3"](torch.tensor([prompt]))[0, -1]
            assert (logits[row] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_bfloat16_runs_in_bfloat16(llamas):
    model = from_llama(llamas["llama3"], dtype=torch.bfloat16)
    seen = []
    model.head.register_forward_hook(lambda module, inputs, logits: seen.append(logits.dtype))
    assert [len(row) for row in fast.generate(model, PROMPTS, 5)] == [5] * 4
    assert set(seen) == {torch.bfloat16} and model.blocks[0].attention.wqkv.weight.dtype == torch.bfloat16


# ---------------------------------------------------------------- what is called, and what is held


def test_no_forward_is_wasted(engine, monkeypatch):
    forwards = Forwards(engine, monkeypatch)
    for prompts, n, chunk, expected in (
        ([[1, 2, 3]], 1, 512, [(1, 3)]),
        ([[1, 2, 3]], 4, 512, [(1, 3), (1, 1), (1, 1), (1, 1)]),
        ([[1] * 7], 2, 3, [(1, 3), (1, 3), (1, 1), (1, 1)]),
        ([[1], [2] * 5], 2, 6, [(2, 3), (2, 2), (2, 1)]),
        ([[1, 2, 3]], 0, 512, []),
        ([], 5, 512, []),
    ):
        forwards.calls.clear()
        rows = fast.generate(engine, prompts, n, chunk=chunk)
        assert forwards.shapes == expected and [len(row) for row in rows] == [n] * len(prompts)


def test_the_loop_ends_when_all_rows_have(engine, monkeypatch):
    whole = fast.generate(engine, PROMPTS, 30)
    forwards = Forwards(engine, monkeypatch)
    stops = [row[place] for row, place in zip(whole, (2, 9, 4, 6))]
    firsts = [min(row.index(stop) for stop in stops if stop in row) for row in whole]
    rows = fast.generate(engine, PROMPTS, 30, stop=stops)
    assert rows == [row[: first + 1] for row, first in zip(whole, firsts)]
    assert len(set(map(len, rows))) > 1
    assert len(forwards.calls) == 1 + max(firsts)  # the prefill, and one for each token but the last
    last = forwards.calls[-1][1].flatten().tolist()
    assert last == [len(prompt) + max(firsts) - 1 for prompt in PROMPTS]  # each row at its own position


def test_prefill_holds_no_more_for_a_longer_prompt(engine):
    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if not operation.is_view:
                sizes = (t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
                self.largest = max(self.largest, *sizes, 0)
            return result

    largest = []
    for length in (100, 300):
        idx, lengths = decode.pad_right([[3] * length, [4]])
        with Watch() as watch:
            decode.prefill(engine, idx, lengths, StaticCache(LLAMA3, 2, 320), chunk=32)
        largest.append(watch.largest)
    assert largest[1] <= 3.2 * largest[0]  # a chunk looks at all slots so far; all tokens at once would make 9


def test_pads_leave_nothing_that_anyone_sees(engine, monkeypatch):
    """A pad's keys and values, were they seen, would be poison here: the tokens that stand for pads are NaN."""
    pad = decode.pad_right

    def poisoned(prompts, device=None):
        idx, lengths = pad(prompts, device)
        for row, length in enumerate(lengths):
            idx[row, length:] = V - 1
        return idx, lengths

    expected = fast.generate(engine, PROMPTS[:3], 50)
    monkeypatch.setattr(decode, "pad_right", poisoned)
    assert fast.generate(engine, PROMPTS[:3], 50) == expected


def test_two_streams_on_one_model(engine):
    alone = [fast.generate(engine, [prompt], 20)[0] for prompt in PROMPTS[:2]]
    streams = [fast.stream(engine, [prompt], 20) for prompt in PROMPTS[:2]]
    together = list(zip(*streams))
    assert [[token for _, token in side] for side in zip(*together)] == alone


def test_stream_and_on_token(engine):
    whole = fast.generate(engine, PROMPTS, 6, stop=[PROMPTS[0][0]])
    heard = []
    assert fast.generate(engine, PROMPTS, 6, on_token=lambda row, token: heard.append((row, token))) == whole
    assert heard == [(row, whole[row][step]) for step in range(6) for row in range(4)]
    assert list(fast.stream(engine, PROMPTS, 6)) == heard
    early = fast.stream(engine, PROMPTS, 6)
    assert [next(early) for _ in range(5)] == heard[:5]
    early.close()
    assert fast.generate(engine, PROMPTS, 6) == whole


# ---------------------------------------------------------------- sampling


def test_draw_is_the_inverse_of_the_running_sum():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    n = 4000
    uniforms = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    drawn = draw(probs.expand(n, -1), uniforms).flatten()
    assert torch.equal(drawn.bincount(minlength=6), torch.tensor([0, 1000, 0, 2000, 1000, 0]))
    assert (drawn.diff() >= 0).all()
    edges = torch.tensor([[0.0], [0.25], [0.75], [1 - 2**-53]], dtype=torch.float64)
    assert draw(probs.expand(4, -1), edges).flatten().tolist() == [1, 3, 4, 4]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.floats(0, 1 - 2**-53))
def test_nothing_of_probability_0_is_drawn(weights, u):
    weights = torch.tensor([weights], dtype=torch.float32)
    if weights.sum() > 0:
        token = draw(weights, torch.tensor([[u]], dtype=torch.float64))
        assert token.shape == (1, 1) and 0 <= token < weights.shape[1] and weights[0, token] > 0


def test_min_p_is_that_of_transformers():
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    for temperature, k, p, min_p in [(0.7, 40, 0.9, 0.05), (1.3, 200, 0.99, 0.3), (1.0, 7, 0.8, 1.0), (2.0, 150, 1.0, 0.0)]:
        expected = logits
        warpers = TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p), MinPLogitsWarper(min_p)
        for warp in warpers:
            expected = warp(None, expected)
        probs = Sampler(5, temperature, k, p, min_p, seed=0).probs(logits)
        assert torch.allclose(probs, expected.softmax(-1), atol=1e-6)


def test_min_p_at_its_edges():
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.4, 0.2]])
    assert torch.equal(keep_min_p(probs, 0.0), probs)
    assert torch.equal(keep_min_p(probs, 1.0), torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]))
    assert torch.equal(keep_min_p(probs, 0.5), torch.stack([probs[0], probs[1]]))
    assert torch.equal(keep_min_p(probs, 0.51)[0], torch.tensor([1.0, 0, 0]))


def test_greedy_is_argmax():
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(3))
    assert torch.equal(greedy(logits).flatten(), logits.argmax(-1))
    assert greedy(torch.tensor([[1.0, 7, 7, -INF]])).item() == 1
    for bad in ([math.nan, 1.0], [INF, 0.0], [-INF, -INF]):
        with pytest.raises(InputError, match="logits"):
            greedy(torch.tensor([[0.0, 1.0], bad]))


def test_a_row_draws_the_same_alone_as_in_a_batch(engine):
    knobs = {"temperature": 1.0, "top_k": 30, "top_p": 0.95, "min_p": 0.01}
    rows = fast.generate(engine, PROMPTS, 25, seed=11, **knobs)
    assert [fast.generate(engine, [p], 25, seed=11 + r, **knobs)[0] for r, p in enumerate(PROMPTS)] == rows
    assert fast.generate(engine, PROMPTS, 25, seed=11, chunk=5, **knobs) == rows
    assert fast.generate(engine, PROMPTS, 40, seed=11, **knobs)[2][:25] == rows[2]
    assert fast.generate(engine, PROMPTS, 25, seed=12, **knobs) != rows
    same = fast.generate(engine, [PROMPTS[0]] * 3, 25, seed=11, **knobs)
    assert len({tuple(row) for row in same}) == 3  # one prompt, three texts


def test_without_a_seed_torch_decides(engine):
    def said():
        return fast.generate(engine, PROMPTS[:2], 12, temperature=1.5)

    torch.manual_seed(5)
    first, second = said(), said()
    torch.manual_seed(5)
    assert first != second and said() == first
    before = torch.get_rng_state()
    fast.generate(engine, PROMPTS[:2], 3)
    fast.generate(engine, PROMPTS[:2], 3, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_drawn_follows_the_probabilities(engine):
    n, prompt = 3000, PROMPTS[1]
    idx, lengths = decode.pad_right([prompt])
    logits = decode.prefill(engine, idx, lengths, StaticCache(LLAMA3, 1, 40))
    sampler = Sampler(n, 1.5, seed=0)
    counts = sampler(logits.expand(n, -1)).flatten().bincount(minlength=V).double()
    probs = sampler.probs(logits)[0].double()
    likely = probs > 0.01
    assert likely.sum() > 3
    sigma = (n * probs * (1 - probs)).sqrt()
    assert ((counts - n * probs).abs() < 4 * sigma)[likely].all()
    assert counts[~likely].sum() < n * probs[~likely].sum() + 4 * math.sqrt(n)


def test_uniforms_are_uniform_over_rows_and_over_time():
    """Neighbouring seeds must not be neighbours in what they draw (Kolmogorov-Smirnov, and correlations)."""
    sampler = Sampler(2000, 1.0, seed=123)
    flat = torch.zeros(1, 4096).expand(2000, -1)  # all ids alike, so that the id drawn shows the uniform number
    first, second = ((sampler(flat).flatten() + 0.5) / 4096 for _ in range(2))
    for u in (first, second):
        grid = (torch.arange(2000) + 0.5) / 2000
        assert (u.sort().values - grid).abs().max() < 1.63 / math.sqrt(2000)  # 1 %
    for a, b in ((first, second), (first[1:], first[:-1]), (second[1:], second[:-1])):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.06


# ---------------------------------------------------------------- stops


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_llama3(tmp_path_factory.mktemp("fast") / "llama3", 128)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return fast.load(checkpoint, dtype=torch.float32)


def test_load(checkpoint, loaded):
    model, tokenizer = loaded
    prompts = [tokenizer.encode(text, bos=True) for text in ("The old llama", "What do llamas eat?")]
    plain = load_model(checkpoint)
    for prompt, new in zip(prompts, fast.generate(model, prompts, 30)):
        assert is_greedy_text(plain, prompt, new)
    model, _ = fast.load(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in fast.load(str(checkpoint), dtype=None)[0].parameters()} == {torch.float32}


def test_load_llama2(tmp_path):
    path = write_llama2(tmp_path / "llama2", 64)
    model, tokenizer = fast.load(path, dtype=torch.float32)
    prompt = tokenizer.encode("In the evening", bos=True)
    text = fast.generate(model, [prompt], 20)
    assert is_greedy_text(load_model(path), prompt, text[0])
    said = tokenizer.decode(prompt + text[0])[len(tokenizer.decode(prompt)) :]
    piece = said[3:6]
    cut = fast.generate(model, [prompt], 20, stop=piece)[0]
    assert cut == text[0][: len(cut)] and len(cut) < 20


def test_load_refuses_the_wrong_tokenizer(checkpoint, tmp_path):
    from llamabook.pocket.ranks import train_ranks

    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(train_ranks(SENTENCES, 330))
    with pytest.raises(CheckpointError, match="do not belong together"):
        fast.load(tmp_path)


def test_stop_strings(loaded):
    model, tokenizer = loaded
    prompts = [tokenizer.encode(text, bos=True) for text in ("The old llama", "What do llamas eat?")]
    whole = fast.generate(model, prompts, 40)
    for row, prompt in enumerate(prompts):
        streamer, texts = tokenizer.streamer(), []
        for token in prompt:
            streamer.push(token)
        for token in whole[row]:
            texts.append((texts or [""])[-1] + streamer.push(token))
        for start, end in ((0, 1), (2, 3), (1, 6), (4, 14)):
            stop = texts[-1][start:end]
            expected = next(n for n, text in enumerate(texts, start=1) if stop in text)
            assert fast.generate(model, [prompt], 40, stop=stop) == [whole[row][:expected]]
            assert fast.generate(model, [prompt], 40, stop=["no such text", stop, 2**40]) == [whole[row][:expected]]
    assert fast.generate(model, prompts, 40, stop="no such text") == whole


def test_a_stop_string_over_several_tokens_and_not_in_the_prompt(loaded):
    model, tokenizer = loaded
    stops = decode.Stops(["ab", "xyz"], [tokenizer.encode("a"), tokenizer.encode("xy")], tokenizer)
    a, b, x, y, z = (tokenizer.encode(letter)[0] for letter in "abxyz")
    assert not stops.ended(0, b)  # the a before it is the prompt's
    assert not stops.ended(0, a) and not stops.ended(1, z)
    assert not stops.ended(1, x) and stops.ended(0, b)
    assert not stops.ended(1, x) and not stops.ended(1, y) and stops.ended(1, z)


def test_stop_ids(engine):
    (whole,) = fast.generate(engine, [PROMPTS[0]], 20)
    first = whole.index(whole[7])
    for stop in (whole[7], [whole[7]], {whole[7]}, torch.tensor([whole[7]])):
        assert fast.generate(engine, [PROMPTS[0]], 20, stop=stop) == [whole[: first + 1]]


# ---------------------------------------------------------------- what is refused


REFUSED = {
    "a text": (["The llama"], 3, {}, InputError, "prompt 0"),
    "not in a list": ([1, 2, 3], 3, {}, InputError, "prompt 0"),
    "an empty prompt": ([[1], []], 3, {}, InputError, "prompt 1"),
    "an id beyond the vocabulary": ([[1, V]], 3, {}, InputError, "prompt 0.*101"),
    "a negative id": ([[-1]], 3, {}, InputError, "prompt 0.*-1"),
    "half an id": ([[1.5]], 3, {}, InputError, "prompt 0"),
    "max_new_tokens": ([[1]], -1, {}, InputError, "max_new_tokens"),
    "chunk": ([[1]], 1, {"chunk": 0}, InputError, "chunk"),
    "temperature": ([[1]], 1, {"temperature": -1.0}, InputError, "temperature"),
    "top_k": ([[1]], 1, {"temperature": 1.0, "top_k": 0}, InputError, "top_k"),
    "top_p": ([[1]], 1, {"temperature": 1.0, "top_p": 1.5}, InputError, "top_p"),
    "min_p": ([[1]], 1, {"temperature": 1.0, "min_p": -0.1}, InputError, "min_p"),
    "min_p of NaN": ([[1]], 1, {"temperature": 1.0, "min_p": math.nan}, InputError, "min_p"),
    "seed": ([[1]], 1, {"temperature": 1.0, "seed": -1}, InputError, "seed"),
    "seed, half": ([[1]], 1, {"temperature": 1.0, "seed": 0.5}, InputError, "seed"),
    "compile": ([[1]], 1, {"compile": "fast"}, InputError, "compile"),
    "a stop string without a tokenizer": ([[1]], 1, {"stop": ["end"]}, InputError, "tokenizer"),
    "an empty stop string": ([[1]], 1, {"stop": ["end", ""]}, InputError, "empty"),
    "beyond the context": ([[1], [1] * (CONTEXT - 4)], 5, {}, ContextError, "prompt 1 has 396 tokens and 5.*400"),
    "a prompt beyond the context": ([[1] * (CONTEXT + 1)], 0, {}, ContextError, "prompt 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(engine, monkeypatch, case):
    prompts, n, knobs, kind, says = REFUSED[case]
    forwards = Forwards(engine, monkeypatch)
    monkeypatch.setattr(decode, "StaticCache", None)
    for call in (fast.generate, fast.stream):  # stream refuses at once, too, and not when it is iterated
        with pytest.raises(kind, match=says) as error:
            call(engine, prompts, n, **knobs)
        assert "\n" not in str(error.value)
    assert not forwards.calls


def test_damaged_weights_are_named(llamas):
    model = from_llama(random_weights(Llama3Model(LLAMA3)))  # of its own: weights are shared, not copied
    model.blocks[1].norm1.weight.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="NaN"):
            fast.generate(model, PROMPTS, 3, temperature=temperature)


def test_numpy_and_torch_prompts(engine):
    import numpy

    expected = fast.generate(engine, PROMPTS[:1], 4)
    assert fast.generate(engine, torch.tensor(PROMPTS[:1]), 4) == expected
    assert fast.generate(engine, [torch.tensor(PROMPTS[0])], 4) == expected
    assert fast.generate(engine, [numpy.array(PROMPTS[0])], 4) == expected
    assert fast.generate(engine, (tuple(prompt) for prompt in PROMPTS[:1]), 4) == expected


# ---------------------------------------------------------------- compiled


class Graphs:
    """Stands in for the compiler behind torch.compile: runs graphs as they are, and notes how many it was given."""

    def __init__(self):
        self.sizes = []

    def __call__(self, graph, example_inputs):
        self.sizes.append(len(graph.graph.nodes))
        return graph.forward


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    counting = Graphs()
    with torch.compiler.set_stance("default", force_backend=counting):
        yield counting
    torch._dynamo.reset()


def test_one_graph_for_all_layers_and_all_that_varies(engine, graphs):
    plain = fast.generate(engine, PROMPTS, 12)
    assert fast.generate(engine, PROMPTS[:1], 12, compile=True) == plain[:1]
    assert len(graphs.sizes) == 1  # three layers
    for prompt, n in zip(PROMPTS, (12, 40, 90, 200)):  # lengths and sizes of the cache
        assert fast.generate(engine, [prompt], n, compile=True) == fast.generate(engine, [prompt], n)
    fast.generate(engine, PROMPTS[:1], 12, temperature=1.0, seed=1, top_p=0.9, compile=True)
    assert len(graphs.sizes) == 1
    assert fast.generate(engine, PROMPTS, 12, compile=True) == plain
    many = len(graphs.sizes)
    assert many <= 2
    for rows in (2, 3, 4):
        assert fast.generate(engine, PROMPTS[:rows], 30 + rows, compile=True)[1][:12] == plain[1]
    assert len(graphs.sizes) == many


def test_sizes_that_happen_to_be_equal(engine, graphs):
    """16 is the head dimension: a cache of 16 slots, or a batch of six rows, must not tie the graph to it."""
    for rows, n in ((1, 15), (1, 16), (1, 23), (6, 12), (2, 12), (16, 12), (3, 80), (80, 3)):
        fast.generate(engine, [[1, 2]] * rows, n, compile=True)
    assert len(graphs.sizes) <= 3  # one row, some, and more than our kernels take


def test_prefill_is_compiled_on_request_and_for_every_length(engine, graphs):
    plain = fast.generate(engine, PROMPTS, 3)
    assert fast.generate(engine, PROMPTS[1:2], 3, compile_prefill=True, chunk=20) == plain[1:2]
    first = len(graphs.sizes)
    assert 1 <= first <= 2  # long chunks, and a short rest
    for length, chunk in ((33, 32), (40, 512), (90, 25), (64, 64), (16, 512), (80, 48)):
        prompt = list(range(length))
        expected = fast.generate(engine, [prompt], 3)
        assert fast.generate(engine, [prompt], 3, compile_prefill=True, chunk=chunk) == expected
    assert len(graphs.sizes) <= 3
    assert fast.generate(engine, PROMPTS, 3, compile_prefill=True, compile=True) == plain


def test_the_whole_as_one_graph(engine, graphs):
    plain = fast.generate(engine, PROMPTS[:1], 12)
    fast.generate(engine, PROMPTS[:1], 12, compile="blocks")
    blocks = list(graphs.sizes)
    assert fast.generate(engine, PROMPTS[:1], 12, compile="whole") == plain
    assert len(graphs.sizes) == len(blocks) + 1 and graphs.sizes[-1] > 2.5 * blocks[0]
    for n in (12, 50):
        fast.generate(engine, PROMPTS[:1], n, compile="whole")
    assert len(graphs.sizes) == len(blocks) + 1
    fast.generate(engine, PROMPTS[:1], 12, compile="blocks")
    assert len(graphs.sizes) == len(blocks) + 1


def test_many_models_in_one_process(llamas, graphs):
    for width in range(10):  # more than torch's default limit of 8 for one function
        cfg = {**LLAMA3, "hidden_dim": 16 + 8 * width, "n_layers": 1}
        fast.generate(from_llama(random_weights(Llama3Model(cfg))), [[1, 2]], 3, compile=True)
    assert len(graphs.sizes) == 10


def test_not_compiled_unless_asked(engine, graphs):
    fast.generate(engine, PROMPTS[:1], 3)
    assert not graphs.sizes
    fast.generate(engine, PROMPTS[:1], 3, compile=True)
    first = len(graphs.sizes)
    fast.generate(engine, PROMPTS[:3], 3)
    assert first and len(graphs.sizes) == first


def test_without_a_compiler_one_line_and_on(engine, capsys):
    def no_compiler(graph, example_inputs):
        raise RuntimeError("No working C++ compiler found\nin many places")

    torch._dynamo.reset()
    plain = fast.generate(engine, PROMPTS, 5)
    with torch.compiler.set_stance("default", force_backend=no_compiler):
        for knobs in ({"compile": True}, {"compile": True, "compile_prefill": True}, {"compile": "whole"}):
            assert fast.generate(engine, PROMPTS, 5, **knobs) == plain
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No working C++ compiler found in many places" in said and "without" in said
    torch._dynamo.reset()


def test_really_compiled(llamas):
    """With the real compiler: the same text, and no compilation after the first of its kind."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = from_llama(random_weights(Llama3Model({**LLAMA3, "n_layers": 2})))
    plain = fast.generate(model, PROMPTS, 24)
    counters.clear()
    assert fast.generate(model, PROMPTS, 24, compile=True, compile_prefill=True) == plain
    if model.compiled_as == "refused":
        pytest.skip("no C++ compiler here")
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 3
    assert fast.generate(model, PROMPTS[::-1], 30, compile=True, compile_prefill=True, seed=3)[-1][:24] == plain[0]
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


# ---------------------------------------------------------------- the pocket model, where it is there


def test_pocket_512_tokens():
    from llamabook import pocket

    if "pocket-llama3.2" not in pocket.names():
        pytest.skip("pocket-llama3.2 is not in this repository yet")
    path = pocket.path("pocket-llama3.2")
    plain = load_model(path, dtype=torch.float32)
    model, tokenizer = fast.load(path, dtype=torch.float32)
    prompts = [tokenizer.encode(text, bos=True) for text in ("The llama", "One morning the farmer went to", "Hay")]
    n = min(512, model.cfg["context_length"] - max(map(len, prompts)))
    assert_same_text(model, plain, prompts, n)


def test_layers_as_wide_as_in_1b():
    """Two of them with random weights: the kernels meet the widths, and the heads, that people run."""
    cfg = {**LLAMA32_CONFIG_1B, "n_layers": 2, "vocab_size": 2000, "context_length": 200, "dtype": torch.float32}
    plain = random_weights(Llama3Model(cfg), size=1.0)
    prompts = [[7, 1999, 30], list(range(100, 195)), [0] * 20]
    assert_same_text(from_llama(plain), plain, prompts, 96)


def assert_same_text(model, plain, prompts, n):
    """Uncached = cached = in chunks = in a ragged batch = compiled."""
    torch._dynamo.reset()
    for rows, knobs in ((prompts, {}), (prompts, {"chunk": 12}), (prompts[:1], {}), (prompts, {"compile": True}),
                        (prompts[1:2], {"compile": True, "compile_prefill": True, "chunk": 40})):  # fmt: skip
        for prompt, new in zip(rows, fast.generate(model, rows, n, **knobs), strict=True):
            assert len(new) == n and is_greedy_text(plain, prompt, new), knobs
    torch._dynamo.reset()


# ---------------------------------------------------------------- mutants


def battery(module):
    """What a decode module must do, in few calls; raises for a wrong one."""
    llama = random_weights(Llama3Model({**LLAMA3, "context_length": 64}))
    model = from_llama(llama)

    def said(prompts, n, stop=(), **knobs):
        rows = [[] for _ in prompts]
        for row, token in module.stream_rows(model, prompts, n, Sampler(len(rows)), module.Stops(stop, prompts), **knobs):
            rows[row].append(token)
        return rows

    calls = []
    model.blocks[0].register_forward_hook(lambda block, inputs, x: calls.append(tuple(x.shape[:2])))
    prompts = [PROMPTS[0][:4], PROMPTS[1], PROMPTS[3]]  # one ends where a chunk of 12 ends
    for chunk in (512, 12):
        rows = said(prompts, 27, chunk=chunk)  # to the end of the context
        assert [len(row) for row in rows] == [27] * 3
        assert all(is_greedy_text(llama, prompt, row) for prompt, row in zip(prompts, rows))
        assert max(b * t for b, t in calls) <= max(chunk, 3)
        assert len(calls) == math.ceil(37 / max(chunk // 3, 1)) + 26
        calls.clear()
    stop = rows[1][4]
    cut = said(prompts, 27, stop=[stop])
    assert cut == [row[: row.index(stop) + 1] if stop in row else row for row in rows]
    calls.clear()
    assert said(prompts[1:2], 27, stop=[stop]) == [rows[1][: rows[1].index(stop) + 1]]
    assert len(calls) == rows[1].index(stop) + 1
    assert said(prompts, 0) == [[], [], []]


MUTANTS = {
    "positions do not advance": ("input_pos = input_pos + 1", "pass"),
    "positions advance by two": ("input_pos = input_pos + 1", "input_pos = input_pos + 2"),
    "the first token in the wrong slot": ("lengths[:, None].clone(), set", "lengths[:, None] - 1, set"),
    "all rows as long as the longest": ("lengths[:, None].clone(), set", "lengths.amax().expand(len(prompts), 1), set"),
    "logits of the padded end": ("(lengths - 1 - start).clamp(0, end - start - 1)", "torch.full_like(lengths, end - start - 1)"),
    "logits one too early": ("(lengths - 1 - start).clamp", "(lengths - 2 - start).clamp"),
    "later chunks win": ("torch.where(goes_on, new, logits)", "new"),
    "the first chunk wins": ("torch.where(goes_on, new, logits)", "logits"),
    "a chunk too late": ("lengths > start", "lengths >= start"),
    "positions from 0 in each chunk": ("torch.arange(start, end, device", "torch.arange(0, end - start, device"),
    "chunks of all rows each": ("max(chunk // B, 1)", "chunk"),
    "one forward too many": ("if not left or not going", "if not going"),
    "goes on to the end": ("if not left or not going", "if not left"),
    "pads on the left": ("[*prompt, *[prompt[-1]] * (longest - len(prompt))]", "[*[prompt[0]] * (longest - len(prompt)), *prompt]"),
    "ended rows go on talking": ("if row in going:", "if True:"),
    "the stop token is not kept": ("yield row, token\n                    if stops.ended(row, token):", "if not stops.ended(row, token):\n                        yield row, token\n                    else:"),
}  # fmt: skip


def mutant(old, new):
    source = inspect.getsource(decode)
    assert source.count(old) == 1, old
    module = types.ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), module.__dict__)
    return module


def test_the_battery_passes():
    battery(decode)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_battery_rejects(name):
    with pytest.raises((AssertionError, IndexError, RuntimeError, KeyError)):
        battery(mutant(*MUTANTS[name]))


# ---------------------------------------------------------------- the package


def test_importing_builds_and_compiles_nothing():
    import subprocess

    code = "import sys, llamabook.fast; print([m for m in ('torch._inductor.codecache', 'matplotlib') if m in sys.modules])"
    package = str(Path(fast.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": package, "PATH": ""})
    assert done.stdout.strip() == "[]" and not done.stderr
