"""The engine's model, cache and attention against transformers and loops in float64; and a list of known mistakes."""

import copy
import inspect
import math
import sys
import textwrap
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llamas import random_weights
from test_llama3 import CONFIGS, SHORT, SMALL, Watch, relative_error, their_model, token_ids
from torch import nn

from llamabook.errors import ContextError
from llamabook.fast import attention, kernels, linear
from llamabook.fast import cache as cache_module
from llamabook.fast import model as model_module
from llamabook.fast.attention import FEW, attend, grouped_attention, visible
from llamabook.fast.cache import StaticCache, write
from llamabook.fast.linear import Linear
from llamabook.fast.model import Block, Transformer, from_llama
from llamabook.llama2 import LLAMA2_CONFIG_7B, LLAMA2_CONFIG_13B, LLAMA2_CONFIG_70B, Llama2Model, rope_frequencies
from llamabook.llama3 import LLAMA32_CONFIG_1B, Llama3Model

LENGTH = 150  # tokens of a text in these tests; SHORT's scaling shows after 100
SHAPES = {
    # name: (config, the model that the weights come from)
    "3.2, scaling that shows at once": (SHORT, Llama3Model),
    "Llama 2, keys for every head": (
        {**SHORT, "n_kv_groups": 4, "rope_freq": None, "tie_embeddings": False, "head_dim": None}, Llama2Model),
    "three to a group, untied": (
        {**SHORT, "n_heads": 6, "emb_dim": 36, "head_dim": None, "tie_embeddings": False, "norm_eps": 1e-2},
        Llama3Model),
    "one group, three layers": ({**SHORT, "n_kv_groups": 1, "n_layers": 3, "vocab_size": 7}, Llama3Model),
}  # fmt: skip
FIRST = "3.2, scaling that shows at once"


@pytest.fixture(autouse=True)
def torchs_operators(monkeypatch):
    """No C++ here: tests/test_kernels.py holds the kernels against float64."""
    monkeypatch.setattr(kernels, "ready", lambda: False)


@pytest.fixture(scope="module")
def references():
    """name -> (cfg, state, ids (2, LENGTH), the logits of transformers) for each shape."""
    made = {}
    for name, (cfg, kind) in SHAPES.items():
        state, idx = random_weights(kind(cfg)).state_dict(), token_ids(cfg, LENGTH, 2)
        with torch.no_grad():
            made[name] = cfg, state, idx, their_model(cfg, state)(idx).logits
    return made


def source_of(references, shape=FIRST):
    """A newly built Llama2Model or Llama3Model with the reference's weights."""
    cfg, state, _, _ = references[shape]
    llama = SHAPES[shape][1](cfg).eval()
    llama.load_state_dict(state)
    return llama


def engine_of(references, shape=FIRST, **options):
    """A newly built engine with the reference's weights."""
    return model_module.from_llama(source_of(references, shape), **options)


def everywhere(idx):
    """The positions 0 to T - 1 for each row."""
    return torch.arange(idx.shape[1]).expand_as(idx)


def read(model, idx, pieces, cut=False, cache=None):
    """The logits of the first sum(pieces) tokens, read in pieces; `cut`: through a cache of the slots so far."""
    cache = cache or StaticCache(model.cfg, len(idx), sum(pieces) + 5)
    end, logits = 0, []
    for T in pieces:
        start, end = end, end + T
        part = cache.first(end) if cut else cache
        logits.append(model(idx[:, start:end], everywhere(idx)[:, start:end], part))
    return torch.cat(logits, dim=1)


def read_ragged(model, idx, lengths, pieces):
    """[(logits, positions)]: rows of different lengths padded on the right, then pieces from where each row is."""
    lengths, rows = torch.tensor(lengths), torch.arange(len(idx))[:, None]
    cache = StaticCache(model.cfg, len(idx), idx.shape[1])
    prompts = idx[:, : lengths.max()].clone()
    prompts[everywhere(prompts) >= lengths[:, None]] = 3  # pads
    last = model(prompts, everywhere(prompts), cache, last=lengths - 1)
    results = [(last[:, None], lengths[:, None] - 1)]
    for T in pieces:
        positions = lengths[:, None] + torch.arange(T)  # (B, T)
        results.append((model(idx[rows, positions], positions, cache), positions))
        lengths = lengths + T
    return results


def naive(q, keys, values, input_pos):
    """Attention by row, token and head, in float64: (B, T, H, d)."""
    (B, T, H, d), G = q.shape, keys.shape[1]
    context = torch.zeros(B, T, H, d, dtype=torch.float64)
    for b, t, h in product(range(B), range(T), range(H)):
        K, V = (cache[b, h // (H // G), : input_pos[b, t] + 1].double() for cache in (keys, values))
        context[b, t, h] = torch.softmax(K @ q[b, t, h].double() / d**0.5, dim=0) @ V
    return context


def made_up(B, T, H, G, d, S, dtype=torch.float32, seed=0):
    """q, keys, values, and for each row other positions, in order."""
    generator = torch.Generator().manual_seed(seed)
    q, keys, values = (torch.randn(shape, generator=generator) for shape in ((B, T, H, d), (B, G, S, d), (B, G, S, d)))
    starts = torch.randint(0, S - T + 1, (B, 1), generator=generator)
    return (3 * q).to(dtype), keys.to(dtype), values.to(dtype), starts + torch.arange(T)


# ---------------------------------------------------------------- the whole model


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers_however_it_is_read(references, shape):
    _, _, idx, expected = references[shape]
    model = engine_of(references, shape)
    for pieces in ([LENGTH], [50, 60, 40], [FEW, FEW + 1, 1, LENGTH - 2 * FEW - 2]):
        for cut in (False, True):
            assert relative_error(read(model, idx, pieces, cut), expected) < 1e-4, (pieces, cut)
    assert relative_error(read(model, idx, [1] * 110), expected[:, :110]) < 1e-4


@settings(deadline=None, max_examples=15)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=2),
    pieces=st.lists(st.integers(1, 14), max_size=6),
)
def test_each_row_is_where_it_is(references, shape, lengths, pieces):
    _, _, idx, expected = references[shape]
    model = engine_of(references, shape)
    for logits, positions in read_ragged(model, idx, lengths, pieces):
        assert relative_error(logits, expected[torch.arange(2)[:, None], positions]) < 1e-4


@pytest.mark.parametrize("pieces", [[20, 30], [1] * 20, [FEW] * 3])
def test_what_nobody_has_written_does_not_matter(references, pieces):
    cfg, _, idx, expected = references[FIRST]
    cache = StaticCache(cfg, 2, LENGTH)
    for tensor in (*cache.keys, *cache.values):
        tensor.uniform_(-1e4, 1e4)
    logits = read(engine_of(references), idx, pieces, cache=cache)
    assert relative_error(logits, expected[:, : sum(pieces)]) < 1e-4


def test_going_back_is_a_smaller_position(references):
    cfg, _, idx, _ = references[FIRST]
    model, cache = engine_of(references), StaticCache(references[FIRST][0], 1, 100)
    question, answers = idx[:1, :40], (idx[1:, :30], idx[1:, 60:80])
    model(question, everywhere(question), cache)
    for answer in answers:
        whole = torch.cat([question, answer], dim=1)
        again = model(answer, everywhere(whole)[:, 40:], cache)
        fresh = model(whole, everywhere(whole), StaticCache(cfg, 1, 100))[:, 40:]
        assert relative_error(again, fresh) < 1e-5


def test_two_texts_on_one_model(references):
    cfg, _, idx, expected = references[FIRST]
    model, caches = engine_of(references), [StaticCache(cfg, 1, 60) for _ in range(2)]
    for start in range(0, 60, 10):
        for row, cache in enumerate(caches):
            piece = slice(start, start + 10)
            logits = model(idx[row : row + 1, piece], everywhere(idx)[:1, piece], cache)
            assert relative_error(logits, expected[row : row + 1, piece]) < 1e-4


def test_true_width_of_1b():
    cfg = {**LLAMA32_CONFIG_1B, "n_layers": 1, "hidden_dim": 512, "vocab_size": 300, "dtype": torch.float32}
    with torch.device("meta"):
        llama = Llama3Model(cfg)
    llama, idx = random_weights(llama.to_empty(device="cpu")), token_ids(cfg, 260)
    with torch.no_grad():
        expected = their_model(cfg, llama.state_dict(), "sdpa")(idx).logits
    assert relative_error(read(from_llama(llama), idx, [200, 1, 59], cut=True), expected) < 1e-4


def test_bfloat16_is_no_farther_from_the_truth_than_transformers():
    idx = token_ids(SMALL, 300)
    state = {n: t.bfloat16() for n, t in random_weights(Llama3Model(SMALL), size=0.6).state_dict().items()}
    llama = Llama3Model({**SMALL, "dtype": torch.bfloat16}).eval()
    llama.load_state_dict(state)
    model = from_llama(llama)
    with torch.no_grad():
        theirs = their_model(SMALL, state, "sdpa")(idx).logits
        exact = their_model(SMALL, {name: tensor.float() for name, tensor in state.items()}, "sdpa")(idx).logits
    for pieces in ([300], [1] * 40 + [260]):
        rounded = read(model, idx, pieces)
        assert rounded.dtype == torch.bfloat16
        assert relative_error(rounded, exact) < 2e-2
        assert (rounded.float() - exact).norm() < 1.15 * (theirs.float() - exact).norm()


class Rows(Linear):
    """A `Linear` that notes how many rows it is given."""

    def forward(self, x):
        self.rows = x.numel() // x.shape[-1]
        return super().forward(x)


def test_the_head_computes_what_is_asked_for(references):
    cfg, _, idx, expected = references[FIRST]
    model, last = engine_of(references, linear=Rows), torch.tensor([9, 33])
    logits = model(idx[:, :40], everywhere(idx)[:, :40], StaticCache(cfg, 2, 40), last=last)
    assert logits.shape == (2, cfg["vocab_size"]) and model.head.rows == 2
    assert relative_error(logits, expected[torch.arange(2), last]) < 1e-4
    del model.head.rows
    cache = StaticCache(cfg, 2, 41)
    assert model.hidden(idx[:, :40], everywhere(idx)[:, :40], cache).shape == (2, 40, cfg["emb_dim"])
    assert not hasattr(model.head, "rows")
    logits = model(idx[:, 40:41], everywhere(idx)[:, 40:41], cache)
    assert relative_error(logits, expected[:, 40:41]) < 1e-4 and model.head.rows == 2


def test_nothing_is_as_long_as_the_context(references):
    cfg = {**SHORT, "context_length": 131_072}
    model = from_llama(random_weights(Llama3Model(cfg)))
    cache, idx = StaticCache(cfg, 1, 64), token_ids(cfg, 30)
    with Watch() as watch:
        model(idx, everywhere(idx), cache)
        model(idx[:, :1], torch.tensor([[30]]), cache)
    assert watch.largest < 131_072
    assert all(tensor.numel() < 131_072 for tensor in model.buffers())


def test_no_gradients(references):
    cfg, _, idx, _ = references[FIRST]
    model, cache = engine_of(references), StaticCache(references[FIRST][0], 2, 20)
    logits = model(idx[:, :20], everywhere(idx)[:, :20], cache)
    assert not logits.requires_grad and not any(p.requires_grad for p in model.parameters())
    assert not any(tensor.requires_grad for tensor in (*cache.keys, *cache.values))
    assert not model.training and not any(p.requires_grad for p in Transformer(cfg).parameters())


@pytest.mark.parametrize("position", [20, -21])
def test_a_position_without_a_slot(references, position):
    cfg, _, idx, _ = references[FIRST]
    with pytest.raises(IndexError):
        engine_of(references)(idx[:, :1], torch.full((2, 1), position), StaticCache(cfg, 2, 20))


PUBLISHED = {name: cfg for name, (cfg, _) in CONFIGS.items()} | {
    "2 7B": LLAMA2_CONFIG_7B, "2 13B": LLAMA2_CONFIG_13B, "2 70B": LLAMA2_CONFIG_70B
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    cfg = PUBLISHED[name]
    with torch.device("meta"):
        engine, llama = Transformer(cfg), Llama3Model(cfg)
    assert sum(p.numel() for p in engine.parameters()) == sum(p.numel() for p in llama.parameters())
    assert engine.theta.device.type == "cpu" and torch.equal(engine.theta, llama.frequencies("cpu"))
    cache = StaticCache(cfg, 3, 1000, device="meta")
    each = {"2 7B": 524_288, "3 8B": 131_072, "3 70B": 327_680, "3.2 1B": 32_768}.get(name)
    assert each is None or cache.bytes == 3 * 1000 * each


# ---------------------------------------------------------------- weights


def memory(*models):
    """Bytes of all parameters; memory with several names counts once."""
    storages = [p.untyped_storage() for model in models for p in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory_error(references):
    """By how much the memory of source and engine together exceeds that of the source alone; 0 is right."""
    llama = source_of(references)
    alone = memory(llama)
    return abs(memory(llama, model_module.from_llama(llama)) - alone) / alone


def source_error(references):
    """What becoming an engine does to the source's logits."""
    llama, (_, _, idx, expected) = source_of(references), references[FIRST]
    model_module.from_llama(llama)
    with torch.no_grad():
        return relative_error(llama(idx), expected)


def test_the_source_shares_its_memory_and_still_works(references):
    assert memory_error(references) == 0
    assert source_error(references) < 1e-4
    llama = source_of(references)
    model = from_llama(llama)
    with torch.no_grad():
        llama.trf_blocks[1].att.W_key.weight.zero_()
    H, G, d = SHORT["n_heads"], SHORT["n_kv_groups"], SHORT["head_dim"]
    assert model.blocks[1].attention.wqkv.weight[H * d : (H + G) * d].eq(0).all()


def test_it_is_filled_layer_by_layer(references):
    llama = source_of(references)
    with Watch() as watch:
        from_llama(llama)
    largest_joined = 2 * SHORT["hidden_dim"] * SHORT["emb_dim"]
    assert watch.largest <= max(largest_joined, (4 + 2 * 2) * 32 * SHORT["emb_dim"], llama.tok_emb.weight.numel())


@pytest.mark.parametrize("shape", SHAPES)
def test_ties(references, shape):
    model, tied = engine_of(references, shape), SHAPES[shape][0].get("tie_embeddings", False)
    for m in (model, copy.deepcopy(model), engine_of(references, shape, dtype=torch.bfloat16)):
        assert (m.head.weight is m.embedding.weight) == tied
        assert (m.head.weight.data_ptr() == m.embedding.weight.data_ptr()) == tied


def test_another_dtype_leaves_the_source_alone(references):
    llama, (cfg, _, idx, expected) = source_of(references), references[FIRST]
    before = {p.data_ptr() for p in llama.parameters()}
    model = from_llama(llama, dtype=torch.float64)
    assert {p.data_ptr() for p in llama.parameters()} == before
    assert {p.dtype for p in model.parameters()} == {torch.float64} and model.cfg["dtype"] == torch.float64
    assert not {p.data_ptr() for p in model.parameters()} & before
    assert relative_error(read(model, idx, [LENGTH]), expected) < 1e-4
    assert cfg["dtype"] == torch.float32


class Packed(nn.Module):
    """A matrix that is kept in another form, as a quantized one is: halves, and in two pieces."""

    def __init__(self, in_features, out_features, dtype=None):
        super().__init__()
        self.shape = out_features, in_features

    def set_weight(self, weight):
        assert weight.shape == self.shape
        self.halves = [half.clone() / 2 for half in weight.chunk(2, dim=0)]

    def forward(self, x):
        return 2 * torch.cat([x @ half.T for half in self.halves], dim=-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_another_linear_takes_the_place_of_every_matrix(references, shape):
    cfg, _, idx, expected = references[shape]
    llama = source_of(references, shape)
    before = {p.data_ptr() for p in llama.parameters()}
    model = model_module.from_llama(llama, linear=Packed)
    assert sum(isinstance(part, Packed) for part in model.modules()) == 4 * cfg["n_layers"] + 1
    assert not any(isinstance(part, (Linear, nn.Linear)) for part in model.modules())
    assert {p.data_ptr() for p in llama.parameters()} == before  # nothing joined outlives its packing
    assert relative_error(read(model, idx, [40, 1, LENGTH - 41]), expected) < 1e-4


def test_linear_is_f_linear():
    module, weight = Linear(6, 4, dtype=torch.float32), torch.randn(4, 6)
    module.set_weight(weight)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight))
    assert module.weight.data_ptr() == weight.data_ptr() and not module.weight.requires_grad
    assert Linear(6, 4, torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_model_of_random_weights_without_a_checkpoint():
    model, idx = Transformer(SHORT), token_ids(SHORT, 20)
    for p in model.parameters():
        p.normal_(0, 0.1)
    assert model(idx, everywhere(idx), StaticCache(SHORT, 1, 20)).isfinite().all()
    assert model.head.weight is model.embedding.weight
    assert set(model.state_dict()) == set(from_llama(random_weights(Llama3Model(SHORT))).state_dict())


# ---------------------------------------------------------------- the cache


def test_cache():
    cache = StaticCache(SHORT, 3, 40, dtype=torch.bfloat16)
    assert len(cache.keys) == len(cache.values) == SHORT["n_layers"] and cache.max_tokens == 40
    assert all(t.shape == (3, 2, 40, 32) and t.dtype == torch.bfloat16 for t in (*cache.keys, *cache.values))
    assert cache.bytes == 2 * 2 * 3 * 2 * 40 * 32 * 2
    assert StaticCache(SHORT, 1, 400).keys[0].dtype == SHORT["dtype"]  # the whole context


@pytest.mark.parametrize("max_tokens", [401, 0, -1])
def test_a_cache_that_no_row_can_use(max_tokens):
    with pytest.raises(ContextError, match="1 to 400, the context length") as caught:
        StaticCache(SHORT, 1, max_tokens)
    assert "\n" not in str(caught.value)


def test_the_first_slots_are_the_same_memory():
    cache = StaticCache(SHORT, 2, 40)
    part = cache.first(10)
    assert part.max_tokens == 10 and part.bytes * 4 == cache.bytes and cache.max_tokens == 40
    write(part.values[1], torch.ones(2, 1, 2, 32), torch.tensor([[9], [0]]))
    assert cache.values[1].sum() == 2 * 2 * 32 and cache.values[1][0, :, 9].eq(1).all()
    assert cache.first(100).max_tokens == 40


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
def test_write(B, T, G, seed):
    _, cache, new, input_pos = made_up(B, T, G, G, 4, 20, seed=seed)
    new = new[:, :, :T].transpose(1, 2)  # (B, T, G, d)
    expected = cache.clone()
    for b, t, g in product(range(B), range(T), range(G)):
        expected[b, g, input_pos[b, t]] = new[b, t, g]
    write(cache, new, input_pos)
    assert torch.equal(cache, expected)


# ---------------------------------------------------------------- attention


@settings(deadline=None, max_examples=60)
@given(
    B=st.integers(1, 3), T=st.integers(1, 12), G=st.integers(1, 3), each=st.integers(1, 4),
    d=st.sampled_from([2, 16, 64]), more=st.integers(0, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_equals_a_loop(B, T, G, each, d, more, seed):
    q, keys, values, input_pos = made_up(B, T, G * each, G, d, T + more, seed=seed)
    expected = naive(q, keys, values, input_pos)
    whole = torch.randn(B, T, G * each + 2 * G, d)
    whole[:, :, : G * each] = q  # as a part of wqkv's output
    wide = torch.randn(B, G, T + more + 7, d)
    wide[:, :, : T + more] = keys  # as the first slots of a longer cache
    for function in (attend, grouped_attention):
        assert relative_error(function(q, keys, values, input_pos), expected) < 1e-5
        strided = function(whole[:, :, : G * each], wide[:, :, : T + more], values, input_pos)
        assert relative_error(strided, expected) < 1e-5


@pytest.mark.parametrize("T", [1, FEW, FEW + 1])
def test_attention_in_bfloat16(T):
    q, keys, values, input_pos = made_up(2, T, 8, 2, 64, 200, torch.bfloat16)
    expected = naive(q, keys, values, input_pos)
    for function in (attend, grouped_attention):
        context = function(q, keys, values, input_pos)
        assert context.dtype == torch.bfloat16 and relative_error(context, expected) < 3e-2


def test_large_scores_do_not_overflow():
    q, keys, values, input_pos = made_up(1, 2, 4, 2, 16, 50)
    for function in (attend, grouped_attention):
        context = function(1e4 * q, keys, values, input_pos)
        assert context.isfinite().all()
        assert relative_error(context, naive(1e4 * q, keys, values, input_pos)) < 1e-3


def test_no_key_is_repeated():
    q, keys, values, input_pos = made_up(1, 1, 32, 8, 64, 3000)
    with Watch() as watch:
        grouped_attention(q, keys, values, input_pos)
    assert watch.largest <= keys.numel()  # repeated, it would be four times that


def test_visible():
    mask = visible(torch.tensor([[0, 2], [4, 5]]), 5)
    assert mask.shape == (2, 1, 2, 5) and mask.sum(-1).flatten().tolist() == [1, 3, 5, 5]
    assert mask[0, 0, 1].tolist() == [True, True, True, False, False]


# ---------------------------------------------------------------- compiling


class Counter:
    """A compiler that counts its graphs and leaves them as they are."""

    graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


def test_a_step_is_one_graph_for_all_positions_and_texts(references, counter):
    cfg, _, idx, expected = references[FIRST]
    model = engine_of(references)
    step = torch.compile(model, backend=counter, fullgraph=True)
    for text in range(2):
        cache = StaticCache(cfg, 2, LENGTH)
        read(model, idx, [20 + text], cache=cache)
        for position in range(20 + text, 32):
            input_pos = torch.full((2, 1), position)
            logits = step(idx[:, position : position + 1], input_pos, cache)
            assert relative_error(logits, expected[:, position : position + 1]) < 1e-4
    assert counter.graphs == 1
    for size in (33, 50, 120):  # other sizes: one graph more, for any size
        step(idx[:, :1], torch.zeros(2, 1, dtype=torch.long), StaticCache(cfg, 2, size))
    assert counter.graphs == 2


def test_all_layers_share_one_graph(references, counter):
    shape = "one group, three layers"
    cfg, _, idx, expected = references[shape]
    model = engine_of(references, shape)
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    assert relative_error(read(model, idx, [1] * 12), expected[:, :12]) < 1e-4
    assert len(model.blocks) == 3 and counter.graphs == 1


@pytest.mark.parametrize("T", [1, 30])
def test_a_compiler_finds_nothing_to_break_at(references, counter, T, monkeypatch):
    """Whole forwards in one graph, with `last`, and for the road of other devices."""
    cfg, _, idx, expected = references[FIRST]
    monkeypatch.setattr(kernels, "decode_attention", grouped_attention)
    step = torch.compile(engine_of(references), backend=counter, fullgraph=True, dynamic=True)
    last = torch.full((2,), T - 1)
    logits = step(idx[:, :T], everywhere(idx)[:, :T], StaticCache(cfg, 2, 40), last)
    assert relative_error(logits, expected[:, T - 1]) < 1e-4 and counter.graphs == 1


# ---------------------------------------------------------------- mutants: each known mistake must be noticed


def engine_error(pieces, cut=False):
    """How far the logits of a newly built engine are from transformers', read in pieces."""

    def measure(references):
        _, _, idx, expected = references[FIRST]
        logits = read(engine_of(references), idx, pieces, cut)
        return relative_error(logits, expected[:, : sum(pieces)])

    return measure


def ragged_error(references):
    _, _, idx, expected = references[FIRST]
    results = read_ragged(engine_of(references), idx, [50, 23], [1, 1, 12, 5])
    rows = torch.arange(2)[:, None]
    return max(relative_error(logits, expected[rows, positions]) for logits, positions in results)


def grouped_error(references):
    inputs = made_up(3, 4, 8, 2, 16, 40)
    return relative_error(attention.grouped_attention(*inputs), naive(*inputs))


ORACLES = {
    "prompt": engine_error([LENGTH]),
    "steps": engine_error([1] * 20),
    "chunks": engine_error([20, 30, 60]),
    "cut": engine_error([20, 30, 60], cut=True),
    "ragged": ragged_error,
    "grouped": grouped_error,
    "source": source_error,
    "memory": memory_error,
}
ROW_0 = "input_pos[:1].expand_as(input_pos)"
MUTANTS = {
    # name: (function, a part of it, what stands there instead, the oracles that must notice)
    "does not see itself": ("attention.visible", "<=", "<", "prompt chunks grouped"),
    "sees one slot ahead": ("attention.visible", "None]\n", "None] + 1\n", "prompt chunks grouped"),
    "sees everything": ("attention.visible", "<= input_pos", "<= 1000 + 0 * input_pos", "prompt chunks grouped"),
    "sees the others": ("attention.visible", "<=", ">", "prompt grouped"),
    "sees what row 0 sees": ("attention.visible", "input_pos[:,", "input_pos[:1,", "ragged grouped"),
    "causal from slot 0": ("attention.attend", "attn_mask=mask", "is_causal=True", "chunks ragged"),
    "groups tiled": (
        "attention.grouped_attention", "(G, -1)).permute(0, 2, 3, 1, 4)", "(-1, G)).permute(0, 3, 2, 1, 4)", "grouped"),
    "scores not scaled": ("attention.grouped_attention", " / d**0.5", "", "grouped"),
    "tokens and heads mixed up": (
        "attention.grouped_attention", "scores.unflatten(2, (-1, T))", "scores.unflatten(2, (T, -1)).transpose(2, 3)",
        "grouped"),
    "heads in another order": (
        "attention.grouped_attention", "permute(0, 3, 1, 2, 4)", "permute(0, 3, 2, 1, 4)", "grouped"),
    "one slot too early": ("cache.write", "input_pos]", "input_pos - 1]", "steps chunks prompt ragged"),
    "into row 0's slots": ("cache.write", ":, input_pos]", f":, {ROW_0}]", "ragged"),
    "into row 0 only": ("cache.write", "[:, None]", "[:, None] * 0", "steps prompt"),
    "a copy of the first slots": ("cache.StaticCache.first", "[:, :, :n]", "[:, :, :n].clone()", "cut"),
    "the last slots": ("cache.StaticCache.first", "[:, :, :n]", "[:, :, -n:]", "cut"),
    "memory that nobody has cleared": (
        "cache.StaticCache.__init__", "torch.zeros(shape", "torch.full(shape, torch.nan", "chunks"),
    "keys not turned": ("model.Attention.forward", "apply_rope(k, cos, sin)", "k", "steps prompt"),
    "queries not turned": ("model.Attention.forward", "apply_rope(q, cos, sin)", "q", "steps prompt"),
    "values turned": ("model.Attention.forward", "(values, v,", "(values, apply_rope(v, cos, sin),", "steps prompt"),
    "keys and values exchanged": ("model.Attention.forward", "q, k, v =", "q, v, k =", "steps prompt"),
    "looks before it writes": (
        "model.Attention.forward", "write(values, v, input_pos)",
        "values, now = values.clone(), values; write(now, v, input_pos)", "steps prompt"),
    "gate and value exchanged": ("model.FeedForward.forward", "gate, value =", "value, gate =", "prompt"),
    "one norm for both": ("model.Block.forward", "norm2", "norm1", "prompt"),
    "the first residual dropped": ("model.Block.forward", "x = x + ", "x = ", "prompt"),
    "positions of row 0": ("model.Transformer.hidden", "rope_tables(input_pos", f"rope_tables({ROW_0}", "ragged"),
    "each piece at 0": (
        "model.Transformer.hidden", "tables(input_pos", "tables(input_pos - input_pos[:, :1]", "steps chunks"),
    "one layer's slots for all": (
        "model.through", "cache.keys, cache", "[cache.keys[0]] * len(model.blocks), cache", "steps chunks"),
    "the last column": ("model.Transformer.forward", "len(x), device=x.device), last]", "len(x)), -1]", "ragged"),
    "the token before the last": ("model.Transformer.forward", ", last]", ", last - 1]", "ragged"),
    "no final norm": ("model.Transformer.forward", "self.norm(x)", "x", "prompt"),
    "frequencies not scaled": (
        "model.from_llama", "new.theta.to", "rope_frequencies(32, source.cfg['rope_base']).to", "prompt"),
    "key and value weights exchanged": (
        "model.fill_block", "W_key.weight, old.att.W_value.weight", "W_value.weight, old.att.W_key.weight", "prompt"),
    "w1 and w3 exchanged": (
        "model.fill_block", "old.ff.fc1.weight, old.ff.fc2.weight", "old.ff.fc2.weight, old.ff.fc1.weight", "prompt"),
    "norms exchanged": ("model.fill_block", "fixed(old.norm1.weight, to), fixed(old.norm2.weight, to)",
                        "fixed(old.norm2.weight, to), fixed(old.norm1.weight, to)", "prompt"),
    "everything twice": ("model.give", "part.data = view", "pass", "memory"),
    "the embedding twice": ("model.fixed", "gathered([weight], to)", "gathered([weight], to).clone()", "memory"),
    "a lone matrix twice": ("model.gathered", "if len(rows) == 1 and", "if not rows and", "memory"),
    "the parts in another order": ("model.gathered", "place.copy_(part)", "place.copy_(rows[0][: len(place)])", "prompt"),
    "another part's memory": ("model.give", "part.data = view", "part.data = view.flip(0)", "source memory"),
}  # fmt: skip


def mutate(monkeypatch, target, old, new):
    """Let `target`, a function or method in llamabook.fast, be what its source says with `new` in place of `old`."""
    module, *path, name = target.split(".")
    owner = sys.modules[f"llamabook.fast.{module}"]
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(original))
    assert old in source, f"{target} does not say {old!r}"
    namespace = vars(sys.modules[original.__module__]) | {"rope_frequencies": rope_frequencies}
    exec(source.replace(old, new), namespace)
    for place in (attention, cache_module, linear, model_module) if not path else (owner,):
        if getattr(place, name, None) is original:
            monkeypatch.setattr(place, name, namespace[name])


@pytest.mark.parametrize("name", ORACLES)
def test_the_oracles_accept_the_package(references, name):
    assert ORACLES[name](references) < 1e-4


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(monkeypatch, references, name):
    *where, witnesses = MUTANTS[name]
    mutate(monkeypatch, *where)
    for witness in witnesses.split():
        error = ORACLES[witness](references)
        assert error > 1e-3 or math.isinf(error), f"{witness} did not notice: {name}"


def test_blocks_know_no_number():
    """So that one compiled block can serve all layers: what two blocks hold differs in their weights alone."""
    first, second = Transformer(SHORT).blocks
    a, b = ({k: v for k, v in vars(layer.attention).items() if k[0] != "_"} for layer in (first, second))
    assert isinstance(first, Block) and a == b
