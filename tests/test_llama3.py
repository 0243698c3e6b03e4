"""Llama 3 to 3.3 against oracles that took another road, and a list of known mistakes that these must notice."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llamas import random_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamabook import llama2, llama3
from llamabook.errors import CheckpointError, ConfigError, ContextError
from llamabook.llama2 import Llama2Model, MultiHeadAttention, rope_frequencies, rope_tables
from llamabook.llama3 import (
    LLAMA3_CONFIG_8B,
    LLAMA3_CONFIG_70B,
    LLAMA31_CONFIG_8B,
    LLAMA31_CONFIG_70B,
    LLAMA31_CONFIG_405B,
    LLAMA32_CONFIG_1B,
    LLAMA32_CONFIG_3B,
    LLAMA33_CONFIG_70B,
    GroupedQueryAttention,
    GroupedQueryAttentionFast,
    Llama3Model,
    Llama3ModelFast,
    as_our_state,
    scale_frequencies,
)

CONFIGS = {
    # name: (config, parameters as published)
    "3 8B": (LLAMA3_CONFIG_8B, 8_030_261_248),
    "3 70B": (LLAMA3_CONFIG_70B, 70_553_706_496),
    "3.1 8B": (LLAMA31_CONFIG_8B, 8_030_261_248),
    "3.1 70B": (LLAMA31_CONFIG_70B, 70_553_706_496),
    "3.1 405B": (LLAMA31_CONFIG_405B, 405_853_388_800),
    "3.2 1B": (LLAMA32_CONFIG_1B, 1_235_814_400),
    "3.2 3B": (LLAMA32_CONFIG_3B, 3_212_749_824),
    "3.3 70B": (LLAMA33_CONFIG_70B, 70_553_706_496),
}
LONG = 2100  # positions: long enough that the real scaling shows
SMALL = {
    **LLAMA32_CONFIG_1B, "vocab_size": 101, "emb_dim": 48, "n_heads": 4, "n_kv_groups": 2, "head_dim": 64,
    "n_layers": 2, "hidden_dim": 96, "dtype": torch.float32,
}  # fmt: skip
EARLY = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context_length": 100}
SHORT = {**SMALL, "head_dim": 32, "rope_freq": EARLY, "rope_base": 10_000.0, "context_length": 400}  # shows at once
SHAPES = {
    # name: (config, positions)
    "3.2, real scaling": (SMALL, LONG),
    "3.1, real scaling": ({**LLAMA31_CONFIG_8B, "vocab_size": 101, "emb_dim": 40, "n_heads": 4, "n_kv_groups": 1,
                           "head_dim": 128, "n_layers": 1, "hidden_dim": 70, "dtype": torch.float32}, LONG),
    "3, unscaled, eight to a group": ({**SHORT, "rope_freq": None, "tie_embeddings": False, "n_heads": 16,
                                       "rope_base": 500_000.0}, 300),
    "scaling that shows at once": (SHORT, 300),
    "three to a group, as 3B": ({**SHORT, "n_heads": 6, "emb_dim": 36, "head_dim": None, "tie_embeddings": False,
                                 "norm_eps": 1e-2}, 300),
    "a group for each head": ({**SHORT, "n_kv_groups": 4, "rope_freq": {**EARLY, "high_freq_factor": 9.0}}, 300),
    "one group, one layer": ({**SHORT, "n_kv_groups": 1, "n_layers": 1, "vocab_size": 7}, 300),
}  # fmt: skip
NAMES = {
    "tok_emb": "model.embed_tokens", "trf_blocks": "model.layers", "final_norm": "model.norm", "out_head": "lm_head",
    "att.W_query": "self_attn.q_proj", "att.W_key": "self_attn.k_proj", "att.W_value": "self_attn.v_proj",
    "att.out_proj": "self_attn.o_proj", "ff.fc1": "mlp.gate_proj", "ff.fc2": "mlp.up_proj", "ff.fc3": "mlp.down_proj",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
}  # fmt: skip
MODELS = [Llama3Model, Llama3ModelFast]


def token_ids(cfg, length, batch=1):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, cfg["vocab_size"], (batch, length), generator=generator)


def their_config(cfg, attention="eager"):
    """The configuration of transformers, written from ours."""
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": cfg["rope_base"]}
    if cfg["rope_freq"] is not None:
        rope |= {"rope_type": "llama3", **cfg["rope_freq"]}
        rope["original_max_position_embeddings"] = rope.pop("original_context_length")
    return LlamaConfig(
        vocab_size=cfg["vocab_size"], hidden_size=cfg["emb_dim"], intermediate_size=cfg["hidden_dim"],
        num_hidden_layers=cfg["n_layers"], num_attention_heads=cfg["n_heads"], num_key_value_heads=cfg["n_kv_groups"],
        head_dim=cfg.get("head_dim") or cfg["emb_dim"] // cfg["n_heads"], rope_parameters=rope,
        max_position_embeddings=cfg["context_length"], rms_norm_eps=cfg.get("norm_eps", 1e-5),
        tie_word_embeddings=cfg.get("tie_embeddings", False), attn_implementation=attention,
    )  # fmt: skip


def their_model(cfg, state, attention="eager"):
    """LlamaForCausalLM with our weights, shared and not copied."""
    from transformers import LlamaForCausalLM

    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    with torch.device("meta"):
        reference = LlamaForCausalLM(their_config(cfg, attention)).eval()
    reference.load_state_dict(renamed, assign=True)
    rotary = type(reference.model.rotary_emb)
    reference.model.rotary_emb = rotary(config=reference.config)  # its tables must not stay on meta
    return reference


def relative_error(got, expected):
    """The largest difference, relative to the largest entry; infinite where there is a NaN."""
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return error.item() if error.isfinite() else math.inf


class Watch(TorchDispatchMode):
    """The largest number of entries of any tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


# ---------------------------------------------------------------- the whole model


@pytest.fixture(scope="module")
def reference():
    """name -> (cfg, state dict, ids, logits and attention weights of transformers) for each shape."""
    made = {}
    for name, (cfg, length) in SHAPES.items():
        state, idx = random_weights(Llama3Model(cfg)).state_dict(), token_ids(cfg, length, 2 if length < 1000 else 1)
        with torch.no_grad():
            out = their_model(cfg, state)(idx, output_attentions=True)
        made[name] = cfg, state, idx, out.logits, [a[:, :, 100:].amax(-1).mean().item() for a in out.attentions]
    return made


def model_error(reference, shape, model=Llama3Model):
    """How far a newly built model with the reference's weights is from transformers' logits."""
    cfg, state, idx, expected, _ = reference[shape]
    ours = model(cfg).eval()
    ours.load_state_dict(state)
    with torch.no_grad():
        return relative_error(ours(idx), expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(reference, shape, model):
    assert model_error(reference, shape, model) < 1e-4


def test_reference_attention_has_favourites(reference):
    """A uniform attention would hide mistakes: the first choice of a query gets many times its equal share."""
    for shape, (cfg, length) in SHAPES.items():
        assert min(reference[shape][4]) > 0.1, shape  # uniform: at most 0.01


def width_of_1b(layers, hidden, size):
    """(cfg, state, ids): the true width of Llama 3.2 1B, its heads, groups and scaling, over 2048 positions."""
    cfg = {**LLAMA32_CONFIG_1B, "n_layers": layers, "hidden_dim": hidden, "vocab_size": 500, "dtype": torch.float32}
    with torch.device("meta"):
        empty = Llama3Model(cfg)
    return cfg, random_weights(empty.to_empty(device="cpu"), size).state_dict(), token_ids(cfg, 2048)


def test_true_width_of_1b():
    cfg, state, idx = width_of_1b(layers=1, hidden=2048, size=2.0)
    with torch.no_grad():
        expected = their_model(cfg, state, "sdpa")(idx).logits
        for model in MODELS:
            with torch.device("meta"):
                ours = model(cfg).eval()
            ours.load_state_dict(state, assign=True)
            assert relative_error(ours(idx), expected) < 1e-4, model.__name__


@pytest.mark.long
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_four_layers_of_1b(dtype, most):
    cfg, state, idx = width_of_1b(layers=4, hidden=8192, size=2.0 if dtype == torch.float32 else 0.6)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    with torch.no_grad():
        expected = their_model(cfg, state, "sdpa")(idx).logits
        for model in MODELS:
            with torch.device("meta"):
                ours = model({**cfg, "dtype": dtype}).eval()
            ours.load_state_dict(state, assign=True)
            assert relative_error(ours(idx), expected) < most, model.__name__


def test_bfloat16_is_close():
    """Against transformers in bfloat16, and no farther from the truth in float32 than transformers itself.

    Large weights would prove nothing here: they magnify every rounding, transformers' own ones past any tolerance.
    """
    idx = token_ids(SMALL, LONG)
    state = {n: t.bfloat16() for n, t in random_weights(Llama3Model(SMALL), size=0.6).state_dict().items()}
    with torch.no_grad():
        theirs = their_model(SMALL, state, "sdpa")(idx).logits
        exact = their_model(SMALL, {name: tensor.float() for name, tensor in state.items()}, "sdpa")(idx).logits
        for model in MODELS:
            ours = model({**SMALL, "dtype": torch.bfloat16}).eval()
            ours.load_state_dict(state)
            rounded = ours(idx)
            assert rounded.dtype == torch.bfloat16
            assert relative_error(rounded, theirs) < 2e-2, model.__name__
            assert relative_error(rounded, exact) < 2e-2, model.__name__
            assert (rounded.float() - exact).norm() < 1.1 * (theirs.float() - exact).norm(), model.__name__


@pytest.mark.parametrize("model", MODELS)
def test_the_future_does_not_matter(model):
    ours, idx = random_weights(model(SHORT)), token_ids(SHORT, 60)
    changed = idx.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 101
    with torch.no_grad():
        before, after = ours(idx), ours(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-5)
    assert ((before - after)[:, 40:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("model", MODELS)
def test_a_prefix_and_a_row_give_what_they_give_alone(model):
    ours, idx = random_weights(model(SHORT)), token_ids(SHORT, 50, 3)
    with torch.no_grad():
        whole = ours(idx)
        for length in (1, 20):
            torch.testing.assert_close(ours(idx[1:2, :length]), whole[1:2, :length], rtol=0, atol=1e-4)


def test_state_dict_names():
    names = {"tok_emb.weight", "final_norm.weight", "out_head.weight"}
    for n in range(2):
        names |= {f"trf_blocks.{n}.att.{part}.weight" for part in ("W_query", "W_key", "W_value", "out_proj")}
        names |= {f"trf_blocks.{n}.{part}.weight" for part in ("ff.fc1", "ff.fc2", "ff.fc3", "norm1", "norm2")}
    for model in MODELS:
        assert set(model(SMALL).state_dict()) == names
        assert not list(model(SMALL).buffers())


@pytest.mark.parametrize("model", MODELS)
def test_compiles_without_a_break(model):
    ours, idx = random_weights(model(SHORT)), token_ids(SHORT, 16)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(idx), ours(idx), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_trains_under_autocast(model):
    ours, idx = random_weights(model(SHORT)), token_ids(SHORT, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = ours(idx)
    F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    for name, p in ours.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_the_fast_model_shares_every_other_class():
    def own(cls):
        return {name for name, value in vars(cls).items() if inspect.isfunction(value)}

    assert issubclass(Llama3ModelFast, Llama3Model) and own(Llama3ModelFast) == {"__init__", "mask"}
    assert own(GroupedQueryAttentionFast) == {"attend"}
    plain, fast = Llama3Model(SMALL), Llama3ModelFast(SMALL)
    kinds = [{type(module) for module in model.modules()} for model in (plain, fast)]
    assert kinds[0] ^ kinds[1] == {Llama3Model, Llama3ModelFast, GroupedQueryAttention, GroupedQueryAttentionFast}


def test_fast_attention_takes_a_mask_too():
    """Chapter 4's cache asks a few queries against many keys, and then the mask says who may look where."""
    ours, fast = GroupedQueryAttention(SMALL), GroupedQueryAttentionFast(SMALL)
    generator = torch.Generator().manual_seed(1)
    Q, K, V = (torch.randn(2, heads, length, 64, generator=generator) for heads, length in ((4, 3), (2, 9), (2, 9)))
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6)
    assert relative_error(fast.attend(Q, K, V, mask), ours.attend(Q, K, V, mask)) < 1e-5


# ---------------------------------------------------------------- what is allocated


@pytest.mark.parametrize("model", MODELS)
def test_a_long_context_costs_nothing_before_it_is_used(model):
    with Watch() as watch:
        ours = model({**SMALL, "context_length": 131_072})
        built = watch.largest
        with torch.no_grad():
            ours(token_ids(SMALL, 8))
    assert max(p.numel() for p in ours.parameters()) == 256 * 48  # W_query
    assert built <= 256 * 48 and watch.largest <= 256 * 48  # nothing is larger than the largest weight


def test_the_fast_model_makes_nothing_that_grows_with_the_square():
    largest = {}
    for model in MODELS:
        for length in (500, 1000):
            with torch.no_grad(), Watch() as watch:
                random_weights(model({**SMALL, "n_layers": 1}))(token_ids(SMALL, length))
            largest[model, length] = watch.largest
    assert largest[Llama3Model, 1000] == 4 * 1000 * 1000  # scores of four heads
    assert largest[Llama3ModelFast, 1000] == 2 * largest[Llama3ModelFast, 500] == 1000 * 4 * 64  # queries


def test_more_tokens_than_the_context_holds():
    for model in MODELS:
        with pytest.raises(ContextError, match="13 tokens.*12"), torch.no_grad():
            model({**SMALL, "context_length": 12})(token_ids(SMALL, 13))


# ---------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts(name):
    cfg, published = CONFIGS[name]
    with torch.device("meta"):
        ours = Llama3ModelFast(cfg)
    assert sum(p.numel() for p in ours.parameters()) == published  # a tied one is counted once
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_of_transformers(name):
    """Every parameter of the first two layers of the published configuration, on the meta device."""
    from transformers import LlamaForCausalLM

    cfg = {**CONFIGS[name][0], "n_layers": 2}
    with torch.device("meta"):
        ours, theirs = Llama3Model(cfg).state_dict(), LlamaForCausalLM(their_config(cfg)).state_dict()
    renamed = {}
    for key, tensor in ours.items():
        for mine, other in NAMES.items():
            key = key.replace(mine, other)
        renamed[key] = tuple(tensor.shape)
    assert renamed == {key: tuple(tensor.shape) for key, tensor in theirs.items()}


def test_configurations_share_no_dict():
    scalings = [cfg["rope_freq"] for cfg, _ in CONFIGS.values() if cfg["rope_freq"] is not None]
    assert len({id(scaling) for scaling in scalings}) == len(scalings) == 6
    assert [cfg["rope_freq"] and cfg["rope_freq"]["factor"] for cfg, _ in CONFIGS.values()] == [
        None, None, 8.0, 8.0, 8.0, 32.0, 32.0, 8.0
    ]  # fmt: skip
    assert {cfg["context_length"] for cfg, _ in CONFIGS.values() if cfg["rope_freq"]} == {131_072}
    assert {cfg["rope_base"] for cfg, _ in CONFIGS.values()} == {500_000.0}


IMPOSSIBLE = {
    # name: (change, what the line must name)
    "groups that don't divide": ({"n_kv_groups": 3}, "4 query heads.*3 groups"),
    "more groups than heads": ({"n_kv_groups": 8}, "8 groups"),
    "no group": ({"n_kv_groups": 0}, "0 groups"),
    "a negative group": ({"n_kv_groups": -2}, "-2 groups"),
    "odd head dimension": ({"head_dim": 15}, "head_dim is 15"),
    "heads that don't divide the width": ({"head_dim": None, "emb_dim": 50}, "n_heads 4"),
    "a number for a dict": ({"rope_freq": 8.0}, "rope_freq is 8.0"),
    "a scaling without its factor": ({"rope_freq": {k: v for k, v in EARLY.items() if k != "factor"}}, "factor"),
    "a scaling with a foreign key": ({"rope_freq": {**EARLY, "rope_type": "yarn"}}, "yarn"),
    "bands in the wrong order": ({"rope_freq": {**EARLY, "low_freq_factor": 4.0}}, "low_freq_factor must be less"),
    "a factor of zero": ({"rope_freq": {**EARLY, "factor": 0.0}}, "factor.*0.0"),
    "a factor that is no number": ({"rope_freq": {**EARLY, "factor": "8"}}, "'8'"),
    "a factor that is NaN": ({"rope_freq": {**EARLY, "factor": math.nan}}, "nan"),
    "no original context": ({"rope_freq": {**EARLY, "original_context_length": None}}, "None"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_configurations(name, model):
    change, named = IMPOSSIBLE[name]
    with pytest.raises(ConfigError, match=named) as caught:
        model({**SMALL, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in LLAMA3_CONFIG_8B if key != "norm_eps"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=key):
        Llama3Model({k: v for k, v in SMALL.items() if k != key})


def test_tokenizer_is_found_beside_the_model():
    from llamabook import tokenizer

    for name in ("Llama3Tokenizer", "ChatFormat", "clean_text"):
        assert getattr(llama3, name) is getattr(tokenizer, name)


# ---------------------------------------------------------------- grouped queries


def naive_attention(Q, K, V):
    """One query head and one query at a time, in float64."""
    B, H, T, d = Q.shape
    result = torch.zeros(B, H, T, d, dtype=torch.float64)
    for h in range(H):
        g = h * K.shape[1] // H
        for t in range(T):
            scores = torch.einsum("bd,bsd->bs", Q[:, h, t].double(), K[:, g, : t + 1].double()) / math.sqrt(d)
            result[:, h, t] = torch.einsum("bs,bsd->bd", scores.softmax(-1), V[:, g, : t + 1].double())
    return result


def attention_error(attention, H=6, G=2, length=12):
    generator = torch.Generator().manual_seed(3)
    layer = attention({**SMALL, "n_heads": H, "n_kv_groups": G, "head_dim": 8})
    Q, K, V = (2 * torch.randn(2, heads, length, 8, generator=generator) for heads in (H, G, G))
    mask = None if attention is GroupedQueryAttentionFast else torch.ones(length, length, dtype=torch.bool).tril()
    return relative_error(layer.attend(Q, K, V, mask), naive_attention(Q, K, V))


@pytest.mark.parametrize("attention", [GroupedQueryAttention, GroupedQueryAttentionFast])
@pytest.mark.parametrize("H, G", [(4, 4), (4, 2), (4, 1), (6, 2), (6, 3), (8, 2), (1, 1)])
def test_each_query_head_reads_its_group(attention, H, G):
    assert attention_error(attention, H, G) < 1e-5


@pytest.mark.parametrize("attention", [GroupedQueryAttention, GroupedQueryAttentionFast])
def test_shared_keys_are_equal_keys(attention):
    """GQA is the MHA whose heads agree on their keys and values: rows written out once per query head."""
    cfg = {**SMALL, "n_heads": 6, "n_kv_groups": 2, "head_dim": 8}
    grouped, spelt_out = random_weights(attention(cfg)), MultiHeadAttention({**cfg, "n_kv_groups": 6})
    state = grouped.state_dict()
    for name in ("W_key.weight", "W_value.weight"):
        first, second = state[name].chunk(2)
        state[name] = torch.cat((first, first, first, second, second, second))
    spelt_out.load_state_dict(state)
    x = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(4))
    mask, tables = torch.ones(30, 30, dtype=torch.bool).tril(), rope_tables(torch.arange(30), rope_frequencies(8))
    with torch.no_grad():
        assert relative_error(grouped(x, mask, *tables), spelt_out(x, mask, *tables)) < 1e-5


def test_llama2_needs_only_the_attention_class():
    """Without scaling and ties Llama 3 is chapter 1's model with grouped queries."""
    cfg = {**SHORT, "rope_freq": None, "tie_embeddings": False}
    old, new = random_weights(Llama2Model(cfg, GroupedQueryAttention)), Llama3Model(cfg).eval()
    new.load_state_dict(old.state_dict())
    idx = token_ids(cfg, 40)
    with torch.no_grad():
        assert torch.equal(old(idx), new(idx))


# ---------------------------------------------------------------- scaled frequencies


def banded(theta, factor, low_freq_factor, high_freq_factor, original_context_length):
    """One frequency, by bands of wavelengths, as Python floats."""
    wavelength = 2 * math.pi / theta
    if wavelength < original_context_length / high_freq_factor:
        return theta
    if wavelength > original_context_length / low_freq_factor:
        return theta / factor
    smooth = (original_context_length / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return (1 - smooth) * theta / factor + smooth * theta


def scaling_error(head_dim=128, base=500_000.0, rope_freq=LLAMA31_CONFIG_8B["rope_freq"]):
    frequencies = llama2.rope_frequencies(head_dim, base)
    exact = torch.tensor([banded(theta, **rope_freq) for theta in frequencies.tolist()], dtype=torch.float64)
    return ((llama3.scale_frequencies(frequencies, rope_freq) - exact).abs() / exact).max().item()


@pytest.mark.parametrize("cfg", [LLAMA31_CONFIG_8B, LLAMA31_CONFIG_405B, LLAMA32_CONFIG_1B, LLAMA32_CONFIG_3B])
def test_scaling_equals_transformers_and_the_bands(cfg):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](their_config(cfg), torch.device("cpu"))
    with torch.device("meta"):
        ours = Llama3Model({**cfg, "n_layers": 1}).frequencies("cpu")
    assert attention_factor == 1.0 and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert scaling_error(llama2.head_dim_of(cfg), cfg["rope_base"], cfg["rope_freq"]) < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 8, 64, 128]), st.floats(2.0, 1e7), st.floats(1.0, 100.0), st.floats(0.1, 10.0),
    st.floats(0.5, 30.0), st.integers(1, 200_000),
)  # fmt: skip
def test_scaling_of_anything(head_dim, base, factor, low, wider, context):
    rope_freq = {
        "factor": factor, "low_freq_factor": low, "high_freq_factor": low + wider, "original_context_length": context
    }  # fmt: skip
    frequencies = rope_frequencies(head_dim, base)
    scaled = scale_frequencies(frequencies, rope_freq)
    assert scaling_error(head_dim, base, rope_freq) < 1e-3  # a narrow blend magnifies the rounding of the turns
    assert (scaled <= frequencies * (1 + 1e-6)).all() and (scaled >= frequencies / factor * (1 - 1e-6)).all()
    assert (scaled.diff() < 0).all()  # still from fast to slow
    turns = context * frequencies.double() / (2 * math.pi)
    assert torch.equal(scaled[turns > (low + wider) * 1.001], frequencies[turns > (low + wider) * 1.001])
    assert torch.equal(scaled[turns < low * 0.999], frequencies[turns < low * 0.999] / factor)


# ---------------------------------------------------------------- ties and files


def tied_with(model):
    return model.out_head.weight is model.tok_emb.weight


def foreign_tables():
    """What implementations of the field save beside the weights."""
    tables = {"mask": torch.ones(5, 5).triu(1).bool(), "cos": torch.ones(5, 64), "sin": torch.ones(5, 64)}
    return tables | {f"trf_blocks.{n}.att.{name}": table for n in range(2) for name, table in tables.items()}


def files():
    """name -> state dict of the same tied model, as it may stand in a file."""
    state = random_weights(Llama3Model(SMALL)).state_dict()
    bare = {name: tensor for name, tensor in state.items() if name != "out_head.weight"}
    return {
        "head and embedding share": state,
        "head copied": {**state, "out_head.weight": state["tok_emb.weight"].clone()},
        "head missing": bare,
        "with tables": {**bare, **foreign_tables()},
        "head in another dtype": {**state, "out_head.weight": state["tok_emb.weight"].bfloat16()},
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_files_of_the_field_load_with_ties_kept(tmp_path, model, assign):
    expected = None
    for name, state in files().items():
        torch.save(state, tmp_path / "model.pth")
        content = torch.load(tmp_path / "model.pth", weights_only=True, mmap=assign)
        keys = set(content)
        ours = model(SMALL).eval()
        result = ours.load_state_dict(content, assign=assign)
        assert not result.missing_keys and not result.unexpected_keys, name
        assert tied_with(ours), name
        assert set(content) == keys, f"{name}: the caller's dict was changed"
        with torch.no_grad():
            logits = ours(token_ids(SMALL, 30))
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected), name


def count(model):
    """Parameters, each memory counted once."""
    return sum({p.data_ptr(): p.numel() for p in model.state_dict().values()}.values())


def tie_error(model=Llama3Model):
    """Parameters too many after each way to build, fill, copy and move a tied model; 0 is right."""
    state = files()["head missing"]
    with torch.device("meta"):
        assigned, emptied = model(SMALL), model(SMALL)
    assigned.load_state_dict(state, assign=True)
    emptied.to_empty(device="cpu")
    built = model(SMALL)
    built.load_state_dict(state)
    made = [assigned, emptied, built, copy.deepcopy(assigned), copy.deepcopy(built).to(torch.bfloat16)]
    right = sum(tensor.numel() for tensor in state.values())
    return sum(abs(count(m) - right) + abs(sum(p.numel() for p in m.parameters()) - right) for m in made)


@pytest.mark.parametrize("model", MODELS)
def test_ties_outlast_everything(model):
    assert tie_error(model) == 0


def test_tied_weights_learn_as_one():
    ours, idx = random_weights(Llama3Model(SMALL)), token_ids(SMALL, 20)
    F.cross_entropy(ours(idx)[0, :-1], idx[0, 1:]).backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    assert torch.equal(ours.tok_emb.weight, ours.out_head.weight) and tied_with(ours)


def test_a_head_that_differs_is_refused_and_nothing_is_loaded():
    state = files()["head copied"]
    state["out_head.weight"][3, 5] += 0.01
    ours = Llama3Model(SMALL)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError, match="differs from tok_emb.weight.*tie_embeddings") as caught:
        ours.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    free = Llama3Model({**SMALL, "tie_embeddings": False})
    free.load_state_dict(state)
    assert not tied_with(free) and not torch.equal(free.out_head.weight, free.tok_emb.weight)


def test_a_head_of_another_shape_is_refused():
    state = files()["head copied"]
    state["out_head.weight"] = state["out_head.weight"][:50]
    with pytest.raises(CheckpointError, match="differs"):
        Llama3Model(SMALL).load_state_dict(state)


FAULTS = {
    "a layer's weight missing": lambda s: s.pop("trf_blocks.1.att.W_key.weight"),
    "embedding missing": lambda s: s.pop("tok_emb.weight"),
    "a weight too many": lambda s: s.update({"trf_blocks.2.norm1.weight": torch.ones(48)}),
    "a bias too many": lambda s: s.update({"trf_blocks.0.att.W_key.bias": torch.ones(128)}),
    "a table under a foreign name": lambda s: s.update({"trf_blocks.0.ff.mask": torch.ones(5)}),
    "a table of the wrong layer's kind": lambda s: s.update({"trf_blocks.x.att.mask": torch.ones(5)}),
    "wrong shape": lambda s: s.update({"trf_blocks.0.att.W_key.weight": torch.ones(256, 48)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_anything_else_stays_an_error(fault):
    state = dict(files()["head missing"])
    FAULTS[fault](state)
    with pytest.raises(RuntimeError, match="Llama3Model"):
        Llama3Model(SMALL).load_state_dict(state)


def test_a_head_missing_where_nothing_is_tied():
    with pytest.raises(RuntimeError, match="out_head.weight"):
        Llama3Model({**SMALL, "tie_embeddings": False}).load_state_dict(files()["head missing"])


def test_as_our_state_reads_only():
    state = {"tok_emb.weight": torch.ones(3, 2), **foreign_tables()}
    assert set(as_our_state(state, tied=True)) == {"tok_emb.weight", "out_head.weight"}
    assert set(as_our_state(state, tied=False)) == {"tok_emb.weight"}
    assert len(state) == 10


# ---------------------------------------------------------------- mutants: each known mistake must be noticed


def scaled(rule):
    """A version of `scale_frequencies`: rule(theta, turns, factor, low, high) -> frequencies."""

    def mutant(frequencies, rope_freq):
        turns = rope_freq["original_context_length"] * frequencies / (2 * math.pi)
        return rule(frequencies, turns, *(rope_freq[k] for k in ("factor", "low_freq_factor", "high_freq_factor")))

    return mutant


def blend(theta, keep, factor):
    keep = keep.clamp(0, 1)
    return keep * theta + (1 - keep) * theta / factor


def with_original(context):
    return lambda f, r: scale_frequencies(f, {**r, "original_context_length": context})


def grouped(keys, values=None, mask=lambda m: m):
    """A version of `GroupedQueryAttention.attend` with the groups or the mask handled another way."""

    def mutant(self, Q, K, V, seen):
        each = self.n_heads // self.n_kv_groups
        return MultiHeadAttention.attend(self, Q, keys(K, each), (values or keys)(V, each), mask(seen))

    return mutant


def in_order(K, each):
    return K.repeat_interleave(each, dim=1)


def tiled(K, each):
    return K.repeat(1, each, 1, 1)


def fused(keys=in_order, **changes):
    """A version of `GroupedQueryAttentionFast.attend` with one thing changed."""

    def mutant(self, Q, K, V, mask):
        each = self.n_heads // self.n_kv_groups
        return F.scaled_dot_product_attention(Q, keys(K, each), keys(V, each), **{"is_causal": True, **changes})

    return mutant


def one_ahead(self, Q, K, V, mask):
    mask = torch.ones(Q.shape[2], K.shape[2], dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(Q, K, V, attn_mask=mask, enable_gqa=True)


def untie(self):
    self.out_head.weight = nn.Parameter(self.tok_emb.weight.detach().clone())


def another_head(self):
    self.out_head.weight = nn.Parameter(self.tok_emb.weight.detach().roll(1, 0))


MUTANTS = {
    # name: (what is patched, how, the oracles that must notice)
    "base 10 000": ("rope_frequencies", lambda d, b, v=None: rope_frequencies(d, 10_000.0, v), "long long-fast"),
    "base 1 000 000": ("rope_frequencies", lambda d, b, v=None: rope_frequencies(d, 1e6, v), "long-fast"),
    "base ignored": ("rope_frequencies", lambda d, b, v=None: rope_frequencies(d, 500_000.0, v), "short"),
    "not scaled": ("scale_frequencies", lambda f, r: f, "long long-fast bands"),
    "factor 8 for 32": ("scale_frequencies", lambda f, r: scale_frequencies(f, {**r, "factor": 8.0}), "long-fast"),
    "all slowed": ("scale_frequencies", lambda f, r: f / r["factor"], "long-fast bands"),
    "made faster": ("scale_frequencies", scaled(lambda t, r, f, lo, hi: blend(t, (r - lo) / (hi - lo), 1 / f)),
                    "long-fast bands"),
    "fast ones slowed": ("scale_frequencies", scaled(lambda t, r, f, lo, hi: blend(t, (hi - r) / (hi - lo), f)),
                         "long-fast bands"),
    "no blend, all kept": ("scale_frequencies", scaled(lambda t, r, f, lo, hi: torch.where(r > lo, t, t / f)),
                           "long-fast bands"),
    "no blend, all slowed": ("scale_frequencies", scaled(lambda t, r, f, lo, hi: torch.where(r < hi, t / f, t)),
                             "long-fast bands"),
    "blend in wavelengths": ("scale_frequencies", scaled(
        lambda t, r, f, lo, hi: blend(t, (1 / lo - 1 / r) / (1 / lo - 1 / hi), f)), "long-fast bands"),
    "turns without 2 pi": ("scale_frequencies", scaled(
        lambda t, r, f, lo, hi: blend(t, (2 * math.pi * r - lo) / (hi - lo), f)), "long-fast bands"),
    "bands of the new context": ("scale_frequencies", with_original(131_072), "long-fast bands"),
    "groups tiled": ("GroupedQueryAttention.attend", grouped(tiled), "long short heads"),
    "keys tiled": ("GroupedQueryAttention.attend", grouped(tiled, in_order), "short heads"),
    "values tiled": ("GroupedQueryAttention.attend", grouped(in_order, tiled), "short heads"),
    "groups backwards": ("GroupedQueryAttention.attend", grouped(lambda K, n: in_order(K, n).flip(1)), "short heads"),
    "one group for all": ("GroupedQueryAttention.attend", grouped(
        lambda K, n: K[:, :1].expand(-1, n * K.shape[1], -1, -1)), "short heads"),
    "no mask": ("GroupedQueryAttention.attend", grouped(in_order, mask=torch.ones_like), "long short heads"),
    "sees one token ahead": (
        "GroupedQueryAttention.attend", grouped(in_order, mask=lambda m: m | m.roll(-1, 0)), "short heads"),
    "fast: groups tiled": ("GroupedQueryAttentionFast.attend", fused(tiled), "short-fast heads-fast"),
    "fast: no mask": ("GroupedQueryAttentionFast.attend", fused(is_causal=False), "long-fast short-fast heads-fast"),
    "fast: sees one token ahead": ("GroupedQueryAttentionFast.attend", one_ahead, "short-fast heads-fast"),
    "fast: scores not scaled": ("GroupedQueryAttentionFast.attend", fused(scale=1.0), "short-fast heads-fast"),
    "a copy for a tie": ("Llama3Model.tie", untie, "ties"),
    "another head": ("Llama3Model.tie", another_head, "short short-fast ties"),
    "never tied again": ("Llama3Model.tie", lambda self: None, "ties"),
    "not tied after to_empty": ("Llama3Model.to_empty", Llama2Model.to_empty, "ties"),
}  # fmt: skip


@pytest.fixture(scope="module")
def oracles(reference):
    """name -> (measure, the most that it may be)."""
    long, short = "3.2, real scaling", "scaling that shows at once"
    return {
        "long": (lambda: model_error(reference, long), 1e-4),
        "long-fast": (lambda: model_error(reference, long, Llama3ModelFast), 1e-4),
        "short": (lambda: model_error(reference, short), 1e-4),
        "short-fast": (lambda: model_error(reference, short, Llama3ModelFast), 1e-4),
        "heads": (lambda: attention_error(GroupedQueryAttention), 1e-5),
        "heads-fast": (lambda: attention_error(GroupedQueryAttentionFast), 1e-5),
        "bands": (scaling_error, 1e-5),
        "ties": (tie_error, 0),
    }


def test_the_oracles_accept_the_package(oracles):
    for name, (measure, most) in oracles.items():
        assert measure() <= most, name


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(monkeypatch, oracles, name):
    target, mutant, witnesses = MUTANTS[name]
    monkeypatch.setattr(f"llamabook.llama3.{target}", mutant)
    for witness in witnesses.split():
        measure, most = oracles[witness]
        assert measure() > 10 * most, f"{witness} did not notice: {name}"


def test_eight_tokens_of_a_fresh_model_would_notice_no_scaling():
    """Why the tests above are long and their weights large: this witness calls a forgotten scaling correct."""
    right = random_weights(Llama3Model(SMALL), size=0.02 * math.sqrt(48))
    wrong = Llama3Model({**SMALL, "rope_freq": None}).eval()
    wrong.load_state_dict(right.state_dict())
    idx = token_ids(SMALL, 8)
    with torch.no_grad():
        assert relative_error(wrong(idx), right(idx)) < 1e-4
