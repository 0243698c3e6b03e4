"""The KV cache against the uncached model and transformers, and a list of known mistakes that these must notice."""

import inspect
import math
import random
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llamas import random_weights
from test_llama3 import CONFIGS, SHORT, relative_error, their_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamabook import generate as uncached
from llamabook import kv_cache, llama3, pocket
from llamabook.errors import ContextError, InputError, LlamaBookError
from llamabook.kv_cache import KVCache
from llamabook.kv_cache import cache as cache_module
from llamabook.kv_cache import generate as loop
from llamabook.kv_cache import llama3 as cached_module
from llamabook.kv_cache.cache import LayerCache, mask_after
from llamabook.kv_cache.generate import generate, generate_text_simple, stream
from llamabook.kv_cache.llama3 import CachedAttention, Llama3Model
from llamabook.llama2 import LLAMA2_CONFIG_7B, LLAMA2_CONFIG_70B, Llama2Model, MultiHeadAttention, head_dim_of

CONTEXT = SHORT["context_length"]
SHAPES = {
    # name: (config, the uncached model)
    "3.2, scaling that shows at once": (SHORT, llama3.Llama3Model),
    "Llama 2, keys for every head": (
        {**SHORT, "n_kv_groups": 4, "rope_freq": None, "tie_embeddings": False, "head_dim": None}, Llama2Model),
    "three to a group, untied": (
        {**SHORT, "n_heads": 6, "emb_dim": 36, "head_dim": None, "tie_embeddings": False, "norm_eps": 1e-2},
        llama3.Llama3Model),
    "one group, three layers": ({**SHORT, "n_kv_groups": 1, "n_layers": 3, "vocab_size": 7}, llama3.Llama3ModelFast),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    """name -> (uncached model, cached model with its weights) for each shape."""
    made = {name: random_weights(model(cfg)) for name, (cfg, model) in SHAPES.items()}
    return {name: (plain, Llama3Model.sharing(plain)) for name, plain in made.items()}


@pytest.fixture(scope="module")
def pair(pairs):
    return pairs["3.2, scaling that shows at once"]


@pytest.fixture
def calls(pair):
    """How many positions each call of the cached model was given."""
    seen = []
    hook = pair[1].register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True)
    yield seen
    hook.remove()


def read(model, idx, pieces, cache=None):
    """The logits of a text that is given to the model in pieces."""
    cache = cache or model.new_cache(len(idx), sum(pieces))
    return torch.cat([model(piece, cache) for piece in idx[:, : sum(pieces)].split(pieces, dim=1)], dim=1)


def assert_same_text(plain, got, expected):
    """Equal token for token; a first difference is excused where two tokens are equally likely in float64."""
    assert got.shape == expected.shape
    for ours, theirs in zip(got.tolist(), expected.tolist()):
        if ours != theirs:
            t = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
            exact = type(plain)({**plain.cfg, "dtype": torch.float64}).eval()
            exact.load_state_dict(plain.state_dict())
            with torch.no_grad():
                best = exact(torch.tensor([ours[:t]]))[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4, f"another token at {t}"


# ---------------------------------------------------------------- cached = uncached


@pytest.mark.parametrize("shape", SHAPES)
@settings(deadline=None, max_examples=12)
@given(pieces=st.lists(st.integers(1, 60), min_size=1, max_size=6), batch=st.integers(1, 3))
def test_a_text_in_pieces_has_the_logits_of_the_whole(pairs, shape, pieces, batch):
    plain, cached = pairs[shape]
    idx = token_ids(plain.cfg, sum(pieces), batch)
    cache = cached.new_cache(batch, sum(pieces) + 3)  # unused slots must not matter
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    with torch.no_grad():
        assert relative_error(read(cached, idx, pieces, cache), plain(idx)) < 1e-4
    assert cache.length == sum(pieces)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_cache_it_is_the_uncached_model(pairs, shape):
    plain, cached = pairs[shape]
    idx = token_ids(plain.cfg, 300, 2)
    with torch.no_grad():
        assert relative_error(cached(idx), plain(idx)) < 1e-4
        assert relative_error(cached(idx, None), plain(idx)) < 1e-4


def test_the_same_512_tokens_uncached_cached_in_chunks_and_in_a_batch(monkeypatch):
    cfg = {**SHORT, "context_length": 560}
    plain = random_weights(llama3.Llama3Model(cfg))
    cached, prompts = Llama3Model.sharing(plain), token_ids(cfg, 40, 3)
    expected = uncached.generate(llama3_fast(plain), prompts[:1], 512, 560)
    assert len(set(expected[0, 40:].tolist())) > 20  # a text that repeats itself would prove little
    assert_same_text(plain, generate(cached, prompts[:1], 512, 560), expected)
    assert_same_text(plain, generate_text_simple(cached, prompts[:1], 512), expected)
    assert_same_text(plain, generate(cached, prompts, 512, 560)[:1], expected)
    monkeypatch.setattr(loop, "PIECE", 7)
    assert_same_text(plain, generate(cached, prompts[:1], 512, 560), expected)


def llama3_fast(model):
    """The same weights without a cache, in the fused model of chapter 2."""
    fast = llama3.Llama3ModelFast(model.cfg).eval()
    fast.load_state_dict(model.state_dict(), assign=True)
    return fast


def test_transformers_with_its_cache_to_the_end_of_the_context(pair):
    from transformers import DynamicCache

    plain, cached = pair
    theirs, prompt = their_model(plain.cfg, plain.state_dict(), "sdpa"), token_ids(plain.cfg, 30)
    expected = theirs.generate(prompt, max_new_tokens=CONTEXT - 30, do_sample=False, use_cache=True, eos_token_id=None)
    assert expected.shape == (1, CONTEXT)
    assert_same_text(plain, generate(cached, prompt, CONTEXT - 30, CONTEXT), expected)
    cache, their_cache = cached.new_cache(1, CONTEXT), DynamicCache()
    with torch.no_grad():
        for piece in expected.split([30, 50, *[1] * (CONTEXT - 80)], dim=1):
            logits = theirs(piece, past_key_values=their_cache, use_cache=True).logits
            assert relative_error(cached(piece, cache), logits) < 1e-4
    for n, layer in enumerate(their_cache.layers):
        assert relative_error(cache.keys[n], layer.keys) < 1e-4 and relative_error(cache.values[n], layer.values) < 1e-4


@pytest.mark.skipif("pocket-llama3.2" not in pocket.names(), reason="the Pocket Llama 3.2 isn't there")
@pytest.mark.parametrize("n", [100, pytest.param(512, marks=pytest.mark.long)])
def test_the_pocket_llama_tells_the_same_story(n):
    from llamabook.checkpoint import load_model
    from llamabook.tokenizer import load_tokenizer

    folder = pocket.path("pocket-llama3.2")
    plain, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    prompt = uncached.text_to_token_ids("One sunny morning,", tokenizer)
    expected = uncached.generate(llama3_fast(plain), prompt, n, plain.cfg["context_length"])
    cached = Llama3Model.sharing(plain)
    assert_same_text(plain, generate_text_simple(cached, prompt, n), expected)
    rows = generate_text_simple(cached, torch.cat([prompt] * 3), n)
    assert_same_text(plain, rows, expected.expand(3, -1))


def test_bfloat16_is_close(pair):
    plain = random_weights(llama3.Llama3Model(SHORT), size=0.6)
    idx, rounded = token_ids(SHORT, 200), llama3.Llama3Model({**SHORT, "dtype": torch.bfloat16}).eval()
    rounded.load_state_dict(plain.state_dict())
    cached = Llama3Model.sharing(rounded)
    cache = cached.new_cache(1, 200)
    assert cache.keys.dtype == torch.bfloat16
    with torch.no_grad():
        assert relative_error(read(cached, idx, [100, 1, 1, 98], cache), plain(idx)) < 2e-2


# ---------------------------------------------------------------- the cache


def published_bytes(cfg, batch, tokens):
    return 2 * cfg["n_layers"] * batch * cfg["n_kv_groups"] * head_dim_of(cfg) * tokens * 2


REAL = {name: cfg for name, (cfg, _) in CONFIGS.items()} | {"2 7B": LLAMA2_CONFIG_7B, "2 70B": LLAMA2_CONFIG_70B}


@pytest.mark.parametrize("name", REAL)
def test_bytes_of_the_real_shapes(name):
    cfg = REAL[name]
    for batch, tokens in ((1, 1), (3, 1000), (1, cfg["context_length"])):
        cache = KVCache(cfg, batch, tokens, device="meta")
        assert cache.bytes == published_bytes(cfg, batch, tokens)
        shape = (cfg["n_layers"], batch, cfg["n_kv_groups"], tokens, head_dim_of(cfg))
        assert cache.keys.shape == cache.values.shape == shape and cache.keys.dtype == torch.bfloat16
        assert (cache.length, cache.batch_size, cache.max_tokens) == (0, batch, tokens)


def test_bytes_a_token_by_heart():
    """Numbers that do not come from a formula: KiB for one token, as the model cards give them."""
    known = {"2 7B": 512, "2 70B": 320, "3 8B": 128, "3.1 70B": 320, "3.1 405B": 504, "3.2 1B": 32, "3.2 3B": 112}
    assert {name: KVCache(REAL[name], 1, 1, device="meta").bytes / 1024 for name in known} == known


def test_dtype_and_device_are_those_asked_for():
    assert KVCache(SHORT, 1, 4).keys.dtype == SHORT["dtype"]
    cache = KVCache(SHORT, 1, 4, "meta", torch.float16)
    assert {(t.dtype, t.device.type) for t in (cache.keys, cache.values)} == {(torch.float16, "meta")}
    assert cache.bytes == KVCache(SHORT, 1, 4, dtype=torch.float32).bytes // 2


@pytest.mark.parametrize("batch, tokens", [(0, 5), (1, 0), (-1, 5), (1, -2)])
def test_sizes_below_one_are_refused(batch, tokens):
    with pytest.raises(InputError, match="from 1 up"):
        KVCache(SHORT, batch, tokens)


def test_more_tokens_than_the_context_are_refused_when_the_cache_is_made():
    assert KVCache(SHORT, 1, CONTEXT).max_tokens == CONTEXT
    with pytest.raises(ContextError, match=f"{CONTEXT + 1} tokens.*context length is {CONTEXT}") as caught:
        KVCache(SHORT, 1, CONTEXT + 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start, T", [(0, 1), (0, 6), (5, 1), (5, 3), (1, 2), (2, 9)])
def test_a_mask_says_who_may_look_where(start, T):
    mask = mask_after(start, T)
    right = [[s <= start + t for s in range(start + T)] for t in range(T)]
    if mask is None:  # one token sees all, or as many queries as keys
        assert T == 1 or start == 0
    else:
        assert mask.tolist() == right and T > 1 and start > 0


def test_memory_is_allocated_once(pair):
    cache = pair[1].new_cache(1, 60)
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    read(pair[1], token_ids(SHORT, 60), [30, 1, 1, 28], cache)
    cache.truncate(3)
    read(pair[1], token_ids(SHORT, 20), [1] * 20, cache)
    assert places == (cache.keys.data_ptr(), cache.values.data_ptr()) and cache.length == 23


class Made(TorchDispatchMode):
    """The largest number of entries of a tensor with memory of its own that an operation returns, and of a mask."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.largest, self.mask = {t.untyped_storage().data_ptr() for t in known}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.numel())
                self.mask = max(self.mask, t.numel() if t.dtype == torch.bool else 0)
        return result


def test_no_copy_of_the_cache_and_no_mask_beyond_the_pieces_own():
    cfg = {**SHORT, "context_length": 4096}
    cached = random_weights(Llama3Model(cfg))
    cache, idx = cached.new_cache(1, 4096), token_ids(cfg, 4096)
    cached(idx[:, :3000], cache)
    for T, mask in ((1, 0), (16, 16 * 3017)):
        with Made(cache.keys, cache.values, *cached.parameters()) as made:
            cached(idx[:, cache.length : cache.length + T], cache)
        assert made.mask <= mask
        assert made.largest <= max(mask, 3000 * 2 * 32 // 4, T * 101)  # a copy of keys would be 3000 * 2 * 32
    cache.truncate(0)
    with Made(cache.keys, cache.values, *cached.parameters()) as made:
        cached(idx[:, :3000], cache)
    assert made.mask == 0 and made.largest < 3000 * 3000 / 8


# ---------------------------------------------------------------- refused before anything is written


def snapshot(cache):
    return cache.length, cache.keys.clone(), cache.values.clone()


def unchanged(cache, before):
    return cache.length == before[0] and all(map(torch.equal, (cache.keys, cache.values), before[1:]))


@pytest.mark.parametrize("pieces, more", [([], 21), ([20], 1), ([13, 1], 7), ([1] * 20, 400)])
def test_overflow_is_refused_and_the_cache_stays_of_use(pair, pieces, more):
    plain, cached = pair
    idx, cache = token_ids(SHORT, 420), cached.new_cache(1, 20)
    if pieces:
        read(cached, idx, pieces, cache)
    before = snapshot(cache)
    with pytest.raises(ContextError, match=f"{more} more after {sum(pieces)} tokens, but the cache holds 20") as caught:
        cached(idx[:, sum(pieces) : sum(pieces) + more], cache)
    assert unchanged(cache, before) and "\n" not in str(caught.value)
    if sum(pieces) < 20:
        with torch.no_grad():
            rest = cached(idx[:, sum(pieces) : 20], cache)
            assert relative_error(rest, plain(idx[:, :20])[:, sum(pieces) :]) < 1e-4
    assert cache.length == 20


FOREIGN = {
    # name: (the cache, what the line must name)
    "more layers": (lambda: KVCache({**SHORT, "n_layers": 3}, 1, 9), "3 layers"),
    "fewer layers": (lambda: KVCache({**SHORT, "n_layers": 1}, 1, 9), "1 layers"),
    "other groups": (lambda: KVCache({**SHORT, "n_kv_groups": 4}, 1, 9), "4 groups"),
    "one group, which would spread": (lambda: KVCache({**SHORT, "n_kv_groups": 1}, 1, 9), "1 groups"),
    "other heads": (lambda: KVCache({**SHORT, "head_dim": 64}, 1, 9), "head dimension 64"),
    "more texts": (lambda: KVCache(SHORT, 3, 9), "for 3 texts, the input has 1"),
    "other numbers": (lambda: KVCache(SHORT, 1, 9, dtype=torch.bfloat16), "bfloat16.*float32"),
    "elsewhere": (lambda: KVCache(SHORT, 1, 9, device="meta"), "on meta.*on cpu"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_models_cache_is_refused(pair, name):
    make, named = FOREIGN[name]
    cache = make()
    with pytest.raises(InputError, match=named) as caught:
        pair[1](token_ids(SHORT, 4), cache)
    assert cache.length == 0 and "\n" not in str(caught.value)
    assert cache.keys.is_meta or not cache.keys.any()


def test_an_interrupted_forward_leaves_the_cache_as_it_was(pair):
    plain, cached = pair
    idx, cache = token_ids(SHORT, 40), cached.new_cache(1, 40)
    cached(idx[:, :20], cache)

    def stop(*_):
        raise KeyboardInterrupt

    hook = cached.trf_blocks[1].att.out_proj.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        cached(idx[:, 30:40], cache)
    hook.remove()
    assert cache.length == 20
    with torch.no_grad():
        assert relative_error(cached(idx[:, 20:], cache), plain(idx)[:, 20:]) < 1e-4


# ---------------------------------------------------------------- several texts, and going back


def test_two_texts_in_turns_on_one_model(pair):
    plain, cached = pair
    texts = token_ids(SHORT, 90, 2).split(1)
    caches, parts = [cached.new_cache(1, 90), cached.new_cache(1, 120)], [[], []]
    state = {name: value for name, value in vars(cached).items() if not name.startswith("_")}
    for start in range(0, 90, 9):
        for text, cache, part in zip(texts, caches, parts):
            part.append(cached(text[:, start : start + 9], cache))
    with torch.no_grad():
        for text, part in zip(texts, parts):
            assert relative_error(torch.cat(part, dim=1), plain(text)) < 1e-4
    assert state == {name: value for name, value in vars(cached).items() if not name.startswith("_")}


def test_a_cache_can_go_to_another_model_with_the_same_weights(pair):
    plain, cached = pair
    idx, cache = token_ids(SHORT, 50), cached.new_cache(1, 50)
    cached(idx[:, :25], cache)
    with torch.no_grad():
        assert relative_error(Llama3Model.sharing(plain)(idx[:, 25:], cache), plain(idx)[:, 25:]) < 1e-4


steps = st.lists(st.tuples(st.sampled_from(["read", "read", "truncate"]), st.integers(0, 25)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=25)
@given(steps=steps, seed=st.integers(0, 99))
def test_after_any_reading_and_truncating_it_is_the_text_that_is_left(pair, steps, seed):
    plain, cached = pair
    draw, text, cache = random.Random(seed), [], cached.new_cache(1, 200)
    for step, n in [*steps, ("read", 2)]:
        if step == "truncate":
            n = min(n, len(text))
            cache.truncate(n)
            text = text[:n]
        else:
            new = [draw.randrange(101) for _ in range(n + 1)]
            text += new
            logits = cached(torch.tensor([new]), cache)
            with torch.no_grad():
                assert relative_error(logits, plain(torch.tensor([text]))[:, -len(new) :]) < 1e-4
        assert cache.length == len(text)


@pytest.mark.parametrize("n", [-1, 21, 100])
def test_truncate_takes_what_is_there_only(pair, n):
    cache = pair[1].new_cache(1, 100)
    pair[1](token_ids(SHORT, 20), cache)
    with pytest.raises(InputError, match=f"truncate to {n}: the cache has 20 tokens"):
        cache.truncate(n)
    assert cache.length == 20
    for n in (20, 7, 0):
        cache.truncate(n)
        assert cache.length == n


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_shared_and_ties_kept(pairs, shape):
    plain, cached = pairs[shape]
    ours, theirs = cached.state_dict(), plain.state_dict()
    assert {name: t.data_ptr() for name, t in ours.items()} == {name: t.data_ptr() for name, t in theirs.items()}
    assert (cached.out_head.weight is cached.tok_emb.weight) == plain.cfg.get("tie_embeddings", False)
    assert not list(cached.buffers())


def test_sharing_keeps_mode_and_dtype():
    for training in (True, False):
        rounded = llama3.Llama3Model({**SHORT, "dtype": torch.float32}).bfloat16().train(training)
        cached = Llama3Model.sharing(rounded)
        assert all(part.training == training for part in cached.modules())
        assert cached.new_cache(1, 2).keys.dtype == torch.bfloat16
        assert cached(token_ids(SHORT, 2), cached.new_cache(1, 2)).dtype == torch.bfloat16


def test_it_is_a_llama_3_and_a_field_file_loads(pair):
    cached = Llama3Model(SHORT)
    assert isinstance(cached, llama3.Llama3Model)
    file = {name: t for name, t in pair[0].state_dict().items() if name != "out_head.weight"}
    cached.load_state_dict(file)
    assert cached.out_head.weight is cached.tok_emb.weight


def test_only_attention_and_the_way_through_are_defined_anew():
    def own(cls):
        return {name for name, value in vars(cls).items() if callable(value) or isinstance(value, classmethod)}

    assert own(CachedAttention) == {"attend"}
    assert own(Llama3Model) == {"__init__", "sharing", "new_cache", "forward", "read_on"}
    kinds = [{type(m) for m in model(SHORT).modules()} for model in (llama3.Llama3ModelFast, Llama3Model)]
    changed = {llama3.Llama3ModelFast: Llama3Model, llama3.GroupedQueryAttentionFast: CachedAttention}
    assert {changed.get(kind, kind) for kind in kinds[0]} == kinds[1]


def test_with_a_cache_there_are_no_gradients_and_without_it_trains(pair):
    cached, idx = Llama3Model.sharing(pair[0]).train(), token_ids(SHORT, 20)
    cache = cached.new_cache(1, 20)
    assert not cached(idx[:, :10], cache).requires_grad and not cache.keys.requires_grad
    cached(idx).sum().backward()
    assert cached.tok_emb.weight.grad is not None


def test_it_works_in_inference_mode_too(pair):
    with torch.inference_mode():
        idx = token_ids(SHORT, 20)
        assert relative_error(read(pair[1], idx, [12, 1, 7]), pair[0](idx)) < 1e-4


def test_it_compiles_without_a_break(pair):
    plain, cached = pair
    idx, cache = token_ids(SHORT, 40), cached.new_cache(1, 40)
    compiled = torch.compile(cached, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(read(compiled, idx, [30, 1, 1, 1, 7], cache), plain(idx)) < 1e-4
    assert cache.length == 40
    assert_same_text(plain, generate_text_simple(compiled, idx, 6), generate_text_simple(cached, idx, 6))


# ---------------------------------------------------------------- the loop


def test_the_call_of_the_books_readers(pair):
    plain, cached = pair
    idx = token_ids(SHORT, 12)
    ids = generate_text_simple(model=cached, idx=idx, max_new_tokens=9, context_size=SHORT["context_length"])
    assert_same_text(plain, ids, uncached.generate(plain, idx, 9, CONTEXT))
    assert ids.shape == (1, 21) and ids.dtype == torch.long
    assert torch.equal(generate_text_simple(cached, idx, 9, use_cache=False), ids)
    assert torch.equal(generate_text_simple(plain, idx, 9, use_cache=False), ids)


KNOBS = [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9}, {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "eos_id": {3, 4, 5, 6, 7, 8, 9}}, {"eos_id": 17},
]  # fmt: skip


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_all_that_the_plain_loop_can_do(pair, knobs):
    plain, cached = pair
    idx = token_ids(SHORT, 8, 3)
    draws = lambda: torch.Generator().manual_seed(4)
    expected = uncached.generate(plain, idx, 60, CONTEXT, **knobs, generator=draws())
    assert torch.equal(generate(cached, idx, 60, CONTEXT, **knobs, generator=draws()), expected)
    tokens = list(stream(cached, idx, 60, CONTEXT, **knobs, generator=draws()))
    assert torch.equal(torch.cat([idx, *tokens], dim=1), expected)


def test_signatures_are_those_of_the_plain_loop():
    for ours, theirs in ((generate, uncached.generate), (stream, uncached.stream)):
        ours, theirs = (
            [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()] for f in (ours, theirs)
        )
        assert ours == theirs


def test_each_token_is_computed_once_and_none_for_nothing(pair, calls):
    generate(pair[1], token_ids(SHORT, 10, 2), 20, CONTEXT)
    assert calls == [10] + [1] * 19


@pytest.mark.parametrize("prompt, pieces", [(7, [7]), (8, [7, 1]), (14, [7, 7]), (20, [7, 7, 6]), (1, [1])])
def test_a_long_prompt_goes_in_pieces(pair, calls, monkeypatch, prompt, pieces):
    monkeypatch.setattr(loop, "PIECE", 7)
    idx = token_ids(SHORT, prompt)
    ids = generate_text_simple(pair[1], idx, 3)
    assert calls == pieces + [1, 1]
    assert_same_text(pair[0], ids, uncached.generate(pair[0], idx, 3, CONTEXT))


def test_no_new_tokens_is_the_prompt_and_no_call(pair, calls):
    idx = token_ids(SHORT, 5)
    assert torch.equal(generate_text_simple(pair[1], idx, 0), idx) and list(stream(pair[1], idx, 0, 9)) == []
    assert calls == []


def test_it_stops_where_all_rows_have_ended(pair, calls):
    idx = token_ids(SHORT, 6)
    free = generate_text_simple(pair[1], idx, 30)[0, 6:].tolist()
    first = free.index(free[11])  # where this token comes for the first time
    calls.clear()
    ids = generate(pair[1], idx, 30, CONTEXT, eos_id=free[11])
    assert ids[0, 6:].tolist() == free[: first + 1] and calls == [6] + [1] * first


def test_a_stream_hands_over_each_token_before_the_next_is_computed(pair, calls):
    tokens = stream(pair[1], token_ids(SHORT, 6), 3, CONTEXT)
    assert calls == []
    for made in ([6], [6, 1], [6, 1, 1]):
        next(tokens)
        assert calls == made
    assert next(tokens, None) is None and calls == [6, 1, 1]


def test_a_text_may_fill_the_context_and_no_more(pair, calls):
    idx = token_ids(SHORT, 390)
    assert generate_text_simple(pair[1], idx, 10).shape == (1, CONTEXT)
    calls.clear()
    for call in (
        lambda: generate_text_simple(pair[1], idx, 11),
        lambda: generate_text_simple(pair[1], idx, 11, use_cache=False),
        lambda: generate_text_simple(pair[1], idx, 11, context_size=9999),
        lambda: generate_text_simple(pair[1], idx[:, :20], 11, context_size=30),
        lambda: generate(pair[1], idx, 11, CONTEXT),
        lambda: stream(pair[1], idx, 11, CONTEXT),  # when it is called, and not when it is first asked
    ):
        with pytest.raises(ContextError, match="tokens and 11 new ones are .*: shorten") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert calls == []
    with pytest.raises(ContextError, match="the prompt has 390 tokens, the context 30"):
        generate_text_simple(pair[1], idx, 1, context_size=30)


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 0), (1, 2, 3)])
def test_a_prompt_must_be_a_batch_of_rows(pair, shape):
    for use_cache in (True, False):
        with pytest.raises(InputError, match="prompt has shape"):
            generate_text_simple(pair[1], torch.zeros(shape, dtype=torch.long), 1, use_cache=use_cache)


OUT_OF_RANGE = [(-1, None, "max_new_tokens"), (1, 0, "context_size"), (1, -3, "context_size")]


@pytest.mark.parametrize("n, size, name", OUT_OF_RANGE)
def test_numbers_out_of_range(pair, n, size, name):
    with pytest.raises(InputError, match=f"^{name} is -?[0-9]: give"):
        generate_text_simple(pair[1], token_ids(SHORT, 3), n, size)


def test_a_model_without_a_cache_is_told_so(pair):
    for call in (generate, stream):
        with pytest.raises(InputError, match="Llama3Model takes no cache: .*sharing"):
            call(pair[0], token_ids(SHORT, 3), 1, CONTEXT)


def test_modes_come_back(pair):
    cached = Llama3Model.sharing(pair[0]).train()
    cached.trf_blocks[0].eval()
    modes = [part.training for part in cached.modules()]
    tokens = stream(cached, token_ids(SHORT, 5), 4, CONTEXT)
    for _ in tokens:
        assert [part.training for part in cached.modules()] == modes and torch.is_grad_enabled()


def test_the_package_shows_its_cache():
    assert kv_cache.KVCache is cache_module.KVCache and kv_cache.__all__ == ["KVCache"]


# ---------------------------------------------------------------- mutants: known mistakes, and who notices


def altered(function, old, new):
    """`function` with a piece of its source replaced, in its own module."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, (function, old)
    source = source.replace("super()", f"super({function.__qualname__.split('.')[0]}, self)")
    scope = inspect.getmodule(function).__dict__
    made = {}
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), "mutant", "exec"), scope, made)
    (result,) = (value for name, value in made.items() if name != "annotations")
    return result


def pieces_error(plain, cached):
    """Reading in pieces of all kinds: a prompt, a piece after it, single tokens, another prompt's length."""
    idx, cache = token_ids(SHORT, 90, 2), cached.new_cache(2, 95)
    with torch.no_grad():
        return relative_error(read(cached, idx, [30, 21, 1, 1, 20, 1, 16], cache), plain(idx))


def singles_error(plain, cached):
    idx = token_ids(SHORT, 40)
    with torch.no_grad():
        return relative_error(read(cached, idx, [1] * 40), plain(idx))


def truncate_error(plain, cached):
    """Reading 20, going back to 8, reading others."""
    idx, other, cache = token_ids(SHORT, 20), token_ids(SHORT, 60)[:, 40:], cached.new_cache(1, 40)
    cached(idx, cache)
    cache.truncate(8)
    with torch.no_grad():
        return relative_error(cached(other, cache), plain(torch.cat([idx[:, :8], other], dim=1))[:, 8:])


def turns_error(plain, cached):
    texts, caches, worst = token_ids(SHORT, 40, 2).split(1), [cached.new_cache(1, 40) for _ in range(2)], 0
    for start in range(0, 40, 10):
        for text, cache in zip(texts, caches):
            with torch.no_grad():
                expected = plain(text)[:, start : start + 10]
                worst = max(worst, relative_error(cached(text[:, start : start + 10], cache), expected))
    return worst


def overflow_error(plain, cached):
    """0 if what doesn't fit is refused and nothing changed, and what fits exactly is taken; else infinite."""
    idx, cache = token_ids(SHORT, 30), cached.new_cache(1, 20)
    cached(idx[:, :12], cache)
    before = snapshot(cache)
    try:
        cached(idx[:, 12:21], cache)
    except ContextError:
        if unchanged(cache, before):
            cached(idx[:, 12:20], cache)
            return 0
    return math.inf


def loop_error(plain, cached):
    """Infinite if the text is another, or the model was asked for more than it must read."""
    idx, seen = token_ids(SHORT, 20, 2), []
    expected = uncached.generate(plain, idx, 12, 32)
    hook = cached.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True)
    same = torch.equal(generate(cached, idx, 12, 32), expected)
    hook.remove()
    try:
        generate(cached, idx, 13, 32)
    except ContextError:
        return 0 if same and seen == [20] + [1] * 11 else math.inf
    return math.inf


def sharing_error(plain, cached):
    again = Llama3Model.sharing(plain)
    return 0 if again.tok_emb.weight.data_ptr() == plain.tok_emb.weight.data_ptr() else math.inf


WITNESSES = {
    "pieces": (pieces_error, 1e-4), "singles": (singles_error, 1e-4), "truncate": (truncate_error, 1e-4),
    "turns": (turns_error, 1e-4), "overflow": (overflow_error, 0), "loop": (loop_error, 0),
    "sharing": (sharing_error, 0),
}  # fmt: skip


def tril(shift):
    return lambda start, T, device=None: (
        None if T == 1 or start == 0 else torch.ones(T, start + T, dtype=torch.bool).tril(start + shift)
    )


def source(cls, name, old, new):
    return f"{cls.__module__}.{cls.__name__}.{name}", altered(inspect.getattr_static(cls, name), old, new)


def read_on(old, new):
    target = f"{Llama3Model.__module__}.Llama3Model.read_on"
    return target, torch.no_grad()(altered(inspect.unwrap(Llama3Model.read_on), old, new))


MASK = "llamabook.kv_cache.cache.mask_after"
MUTANTS = {
    # name: (what to replace, by what, the witnesses that must notice)
    "sees one token ahead": (MASK, tril(1), "pieces truncate"),
    "does not see itself": (MASK, tril(-1), "pieces truncate"),
    "the mask of a text from its beginning": (
        MASK, lambda start, T, device=None: torch.ones(T, start + T, dtype=torch.bool).tril(), "pieces singles"),
    "no mask at all": (MASK, lambda start, T, device=None: None, "pieces truncate turns"),
    "causal for a single query": (*source(CachedAttention, "attend", "Q.shape[2] == 1", "False"), "pieces singles"),
    "never causal": (*source(CachedAttention, "attend", " and Q.shape[2] == 1", ""), "pieces"),
    "attends to the new keys only": (*source(CachedAttention, "attend", "K, V = mask.add(K, V)", "mask.add(K, V)"),
                                     "singles"),
    "positions from 0 each time": (*read_on("arange(cache.length, end,", "arange(0, end - cache.length,"),
                                   "pieces singles truncate turns"),
    "the same position for all new tokens": (*read_on("arange(cache.length, end,",
                                                      "full((idx.shape[1],), cache.length,"), "pieces"),
    "length not advanced": (*read_on("cache.length = end", "pass"), "pieces singles turns loop"),
    "length advanced by one": (*read_on("cache.length = end", "cache.length += 1"), "pieces turns loop"),
    "length advanced too far": (*read_on("cache.length = end", "cache.length = end + 1"), "pieces singles"),
    "all layers share one memory": (*source(KVCache, "layers", "zip(self.keys, self.values)",
                                            "[(self.keys[0], self.values[0])] * len(self.keys)"), "pieces singles"),
    "keys and values share one memory": (*source(KVCache, "__init__", "torch.zeros_like(self.keys)", "self.keys"),
                                         "pieces singles"),
    "a memory for the first text only": (*source(LayerCache, "add", "self.keys[:, :, self.start : end] = K",
                                                 "self.keys[:1, :, self.start : end] = K[:1]"), "pieces"),
    "values forgotten": (*source(LayerCache, "add", "    self.values[:, :, self.start : end] = V\n", ""),
                         "pieces singles"),
    "keys written where values belong": (*source(LayerCache, "add", "self.values[:, :, self.start : end] = V",
                                                 "self.values[:, :, self.start : end] = K"), "pieces singles"),
    "written from the first slot on": (*source(LayerCache, "add", "self.keys[:, :, self.start : end] = K",
                                               "self.keys[:, :, : K.shape[2]] = K"), "pieces singles"),
    "the new key left out": (*source(LayerCache, "add", "return self.keys[:, :, :end], self.values[:, :, :end]",
                                     "return self.keys[:, :, :self.start], self.values[:, :, :self.start]"), "singles"),
    "empty slots are seen": (*source(LayerCache, "add", "return self.keys[:, :, :end], self.values[:, :, :end]",
                                     "return self.keys, self.values"), "singles"),
    "truncate forgets to": (*source(KVCache, "truncate", "self.length = n", "pass"), "truncate"),
    "truncate keeps one too many": (*source(KVCache, "truncate", "self.length = n", "self.length = n + 1"), "truncate"),
    "truncate keeps one too few": (*source(KVCache, "truncate", "self.length = n", "self.length = n - 1"), "truncate"),
    "truncate forgets all": (*source(KVCache, "truncate", "self.length = n", "self.length = 0"), "truncate"),
    "overflow not noticed": (*source(KVCache, "layers", "self.length + T > self.max_tokens", "False"), "overflow"),
    "overflow by one": (*source(KVCache, "layers", "> self.max_tokens", "> self.max_tokens + 1"), "overflow"),
    "a full cache is refused": (*source(KVCache, "layers", "> self.max_tokens", ">= self.max_tokens"), "overflow"),
    "the past is dropped to make room": (
        *source(KVCache, "layers", "raise ContextError", "self.length = 0\n        str"), "overflow"),
    "the whole text is read again": (*source(loop.WithCache, "forward", "idx[:, self.cache.length :]", "idx"), "loop"),
    "the last token only is read": (*source(loop.WithCache, "forward", "idx[:, self.cache.length :]", "idx[:, -1:]"),
                                    "loop"),
    "the cache starts over each time": (*source(loop.WithCache, "forward", "for piece",
                                                "self.cache.truncate(0)\n    for piece"), "loop"),
    "a forward for nothing": (*source(loop.WithCache, "forward", "return logits",
                                      "self.model(piece[:, -1:], cache=self.cache); self.cache.length -= 1\n"
                                      "    return logits"), "loop"),
    "one token beyond the context": ("llamabook.kv_cache.generate.check_text",
                                     altered(loop.check_text, "asked > limit", "asked > limit + 1"), "loop"),
    "weights copied": ("llamabook.kv_cache.llama3.Llama3Model.load_state_dict",
                       lambda self, state, assign: llama3.Llama3Model.load_state_dict(
                           self, {name: t.clone() for name, t in state.items()}, assign=True), "sharing"),
}  # fmt: skip


def test_the_witnesses_accept_the_package(pair):
    for name, (measure, most) in WITNESSES.items():
        assert measure(*pair) <= most, name


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(monkeypatch, pair, name):
    target, mutant, witnesses = MUTANTS[name]
    monkeypatch.setattr(target, mutant)
    for witness in witnesses.split():
        measure, most = WITNESSES[witness]
        try:
            error = measure(*pair)
        except (LlamaBookError, RuntimeError):
            error = math.inf
        assert error > 10 * most, f"{witness} did not notice: {name}"


def test_what_no_test_could_notice(monkeypatch, pair):
    """RoPE knows distances only: a text whose positions are all shifted alike has the same logits."""
    monkeypatch.setattr(*read_on("arange(cache.length, end,", "arange(cache.length + 5, end + 5,"))
    assert pieces_error(*pair) < 1e-4


def test_mutants_are_of_this_package():
    assert cached_module.Llama3Model is Llama3Model
    for target, mutant, witnesses in MUTANTS.values():
        assert target.startswith("llamabook.kv_cache.") and callable(mutant)
        assert set(witnesses.split()) <= set(WITNESSES)
    assert issubclass(CachedAttention, MultiHeadAttention)
