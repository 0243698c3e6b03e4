"""Llama 2 against oracles that took another road, and a list of known mistakes that these oracles must notice."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llamas import random_weights

from llamabook import llama2
from llamabook.errors import ConfigError, ContextError, InputError
from llamabook.llama2 import (
    LLAMA2_CONFIG_7B,
    LLAMA2_CONFIG_13B,
    LLAMA2_CONFIG_70B,
    FeedForward,
    Llama2Model,
    MultiHeadAttention,
    RMSNorm,
    SiLU,
    apply_rope,
    half_split_to_interleaved,
    head_dim_of,
    interleaved_to_half_split,
    rope_frequencies,
    rope_tables,
)

T = 300  # positions: long enough for slow pairs of entries to turn
PLAIN = {
    "vocab_size": 101, "context_length": 320, "emb_dim": 64, "n_heads": 4, "n_layers": 3, "hidden_dim": 171,
    "n_kv_groups": 4, "rope_base": 10_000.0, "rope_freq": None, "dtype": torch.float32,
}  # fmt: skip
SHAPES = {
    "plain": PLAIN,
    "head dimension of its own": {**PLAIN, "emb_dim": 48, "n_heads": 2, "n_kv_groups": 2, "head_dim": 32},
    "another base and epsilon": {**PLAIN, "rope_base": 500.0, "norm_eps": 1e-2, "hidden_dim": 77},
    "tied": {**PLAIN, "emb_dim": 40, "n_heads": 5, "n_kv_groups": 5, "tie_embeddings": True, "n_layers": 2},
    "one head": {**PLAIN, "emb_dim": 24, "n_heads": 1, "n_kv_groups": 1, "n_layers": 1, "vocab_size": 7},
}
NAMES = {
    "tok_emb": "model.embed_tokens", "trf_blocks": "model.layers", "final_norm": "model.norm", "out_head": "lm_head",
    "att.W_query": "self_attn.q_proj", "att.W_key": "self_attn.k_proj", "att.W_value": "self_attn.v_proj",
    "att.out_proj": "self_attn.o_proj", "ff.fc1": "mlp.gate_proj", "ff.fc2": "mlp.up_proj", "ff.fc3": "mlp.down_proj",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
}  # fmt: skip


def token_ids(cfg, batch=2, length=T):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, cfg["vocab_size"], (batch, length), generator=generator)


def their_names(state):
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def transformers_logits(cfg, state, idx):
    """Logits and attention weights of LlamaForCausalLM with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cfg["vocab_size"], hidden_size=cfg["emb_dim"], intermediate_size=cfg["hidden_dim"],
        num_hidden_layers=cfg["n_layers"], num_attention_heads=cfg["n_heads"], num_key_value_heads=cfg["n_heads"],
        head_dim=cfg.get("head_dim", cfg["emb_dim"] // cfg["n_heads"]), max_position_embeddings=cfg["context_length"],
        rms_norm_eps=cfg.get("norm_eps", 1e-5), rope_theta=cfg["rope_base"],
        tie_word_embeddings=cfg.get("tie_embeddings", False), attn_implementation="eager",
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(their_names(state))
    with torch.no_grad():
        out = theirs(idx, output_attentions=True)
    return out.logits, out.attentions


def relative_error(got, expected):
    """The largest difference, relative to the largest entry; infinite where there is a NaN."""
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    return error.item() if error.isfinite() else math.inf


# ---------------------------------------------------------------- the whole model


@pytest.fixture(scope="module")
def reference():
    """name -> (cfg, state dict, ids, logits of transformers) for each shape."""
    made = {}
    for name, cfg in SHAPES.items():
        model, idx = random_weights(Llama2Model(cfg)), token_ids(cfg)
        logits, attentions = transformers_logits(cfg, model.state_dict(), idx)
        made[name] = cfg, model.state_dict(), idx, logits, attentions
    return made


def model_error(reference, shape):
    """How far a newly built Llama2Model with the reference's weights is from transformers' logits."""
    cfg, state, idx, expected, _ = reference[shape]
    model = Llama2Model(cfg).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return relative_error(model(idx), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers(reference, shape):
    assert model_error(reference, shape) < 1e-4


def test_reference_attention_has_favourites(reference):
    """A uniform attention would hide mistakes: most queries with a choice of keys must prefer few of them."""
    for shape in SHAPES:
        attentions = torch.stack(reference[shape][4])  # (layers, B, H, T, T)
        assert attentions[..., 100:, :].amax(-1).mean() > 0.1, shape  # uniform: at most 0.01


def test_state_dict_names():
    names = {"tok_emb.weight", "final_norm.weight", "out_head.weight"}
    for n in range(3):
        names |= {f"trf_blocks.{n}.att.{part}.weight" for part in ("W_query", "W_key", "W_value", "out_proj")}
        names |= {f"trf_blocks.{n}.{part}.weight" for part in ("ff.fc1", "ff.fc2", "ff.fc3", "norm1", "norm2")}
    assert set(Llama2Model(PLAIN).state_dict()) == names


def test_the_future_does_not_matter():
    model, idx = random_weights(Llama2Model(PLAIN)), token_ids(PLAIN, 1, 60)
    changed = idx.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 101
    with torch.no_grad():
        before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-5)
    assert ((before - after)[:, 40:].abs().amax(-1) > 1e-3).all()


def test_a_prefix_and_a_row_give_what_they_give_alone():
    model, idx = random_weights(Llama2Model(PLAIN)), token_ids(PLAIN, 3, 50)
    with torch.no_grad():
        whole = model(idx)
        torch.testing.assert_close(model(idx[1:2, :20]), whole[1:2, :20], rtol=0, atol=1e-4)


def test_bfloat16_is_close_to_float32():
    model, idx = random_weights(Llama2Model({**PLAIN, "n_layers": 1})), token_ids(PLAIN)
    short = Llama2Model({**PLAIN, "n_layers": 1, "dtype": torch.bfloat16}).eval()
    short.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact, rounded = model(idx), short(idx)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03


def test_trains_under_autocast():
    model, idx = random_weights(Llama2Model(PLAIN)), token_ids(PLAIN, 2, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(idx)
    F.cross_entropy(logits.float()[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_compiles_without_a_break():
    model, idx = random_weights(Llama2Model(PLAIN)), token_ids(PLAIN, 1, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(idx), model(idx), rtol=0, atol=1e-5)


def test_built_on_meta_and_filled_by_assignment():
    model, idx = random_weights(Llama2Model(PLAIN)), token_ids(PLAIN, 1, 30)
    with torch.device("meta"):
        empty = Llama2Model(PLAIN).eval()
    assert all(p.is_meta for p in empty.parameters()) and not list(empty.buffers())
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty(idx), model(idx))


def test_a_long_context_costs_nothing_before_it_is_used():
    model = random_weights(Llama2Model({**PLAIN, "context_length": 2**31}))
    with torch.no_grad():
        assert model(token_ids(PLAIN, 1, 5)).shape == (1, 5, 101)


def test_the_attention_class_and_the_frequencies_can_be_replaced():
    class Fused(MultiHeadAttention):
        def attend(self, Q, K, V, mask):
            return F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)

    class Stretched(Llama2Model):
        def frequencies(self, device=None):
            return super().frequencies(device) / 4

    model, idx = random_weights(Llama2Model(PLAIN)), token_ids(PLAIN, 1, 64)
    fused, stretched = Llama2Model(PLAIN, attention=Fused).eval(), Stretched(PLAIN).eval()
    with torch.no_grad():
        for other in (fused, stretched):
            other.load_state_dict(model.state_dict())
        assert relative_error(fused(idx), model(idx)) < 1e-5
        assert relative_error(stretched(idx), model(idx)) > 1e-2


def test_tied_embeddings_are_shared_not_copied():
    model = Llama2Model(SHAPES["tied"])
    assert model.out_head.weight is model.tok_emb.weight
    free = Llama2Model({**SHAPES["tied"], "tie_embeddings": False})
    assert free.out_head.weight is not free.tok_emb.weight


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("cfg, published", [(LLAMA2_CONFIG_7B, 6_738_415_616), (LLAMA2_CONFIG_13B, 13_015_864_320)])
def test_parameter_counts(cfg, published):
    with torch.device("meta"):
        model = Llama2Model(cfg)
    assert sum(p.numel() for p in model.parameters()) == published
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_parameter_count_of_70b_by_formula():
    cfg = LLAMA2_CONFIG_70B
    D, groups = cfg["emb_dim"], cfg["n_kv_groups"] * head_dim_of(cfg)
    layer = 2 * D * D + 2 * D * groups + 3 * D * cfg["hidden_dim"] + 2 * D
    assert 2 * cfg["vocab_size"] * D + cfg["n_layers"] * layer + D == 68_976_648_192


def test_sizes_share_no_dict():
    assert LLAMA2_CONFIG_7B["n_layers"] == 32 and LLAMA2_CONFIG_13B["n_layers"] == 40
    cfg = dict(PLAIN)
    model = Llama2Model(cfg)
    cfg["context_length"] = 1
    assert model.cfg["context_length"] == 320


# ---------------------------------------------------------------- RMSNorm, SiLU, SwiGLU


def norm_error():
    """RMSNorm in float32 against torch's operator in float64, for vectors of very different lengths."""
    x = torch.sin(torch.arange(5 * 64).float()).reshape(5, 64) * 10.0 ** torch.arange(-4, 1)[:, None]
    norm = RMSNorm(64, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 64))
        return relative_error(norm(x), F.rms_norm(x.double(), (64,), norm.weight.double(), eps=1e-5))


def norm_roundings():
    """The share of bfloat16 outputs that are not the correctly rounded float64 ones."""
    x = torch.linspace(-2, 3, 4096).bfloat16()
    exact = F.rms_norm(x.double(), (4096,), eps=1e-5).bfloat16()
    return (RMSNorm(4096, dtype=torch.bfloat16)(x) != exact).float().mean().item()


def test_rms_norm():
    assert norm_error() < 1e-6
    assert norm_roundings() < 1e-3
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert RMSNorm(8, dtype=dtype)(torch.ones(2, 8, dtype=dtype)).dtype == dtype


def test_silu_and_feed_forward():
    x = torch.linspace(-20, 20, 401)
    assert relative_error(SiLU()(x), x.double() / (1 + torch.exp(-x.double()))) < 1e-6
    ff = random_weights(FeedForward({"emb_dim": 6, "hidden_dim": 11, "dtype": torch.float32}))
    x = torch.sin(torch.arange(30).float()).reshape(5, 6)
    gate, value, back = (getattr(ff, name).weight.double() for name in ("fc1", "fc2", "fc3"))
    g = x.double() @ gate.T
    assert relative_error(ff(x), (g * torch.sigmoid(g) * (x.double() @ value.T)) @ back.T) < 1e-6
    assert all(name.endswith("weight") for name, _ in ff.named_parameters())


# ---------------------------------------------------------------- RoPE


def complex_rope(x, positions, base):
    """RoPE by complex numbers in float64, half-split."""
    first, second = x.double().chunk(2, dim=-1)
    exponents = torch.arange(first.shape[-1], dtype=torch.float64) / first.shape[-1]
    turns = torch.exp(1j * positions.double()[:, None] * base**-exponents)
    turned = torch.complex(first, second) * turns
    return torch.cat((turned.real, turned.imag), dim=-1)


def rope_error(head_dim=64, base=10_000.0, positions=T):
    x = torch.sin(torch.arange(3 * positions * head_dim).float() ** 1.3).reshape(1, 3, positions, head_dim)
    places = torch.arange(positions)
    cos, sin = llama2.rope_tables(places, llama2.rope_frequencies(head_dim, base))
    return relative_error(llama2.apply_rope(x, cos, sin), complex_rope(x, places, base))


@pytest.mark.parametrize("head_dim, base, positions", [(64, 1e4, 300), (2, 1e4, 9), (6, 100.0, 50), (128, 5e5, 4096)])
def test_rope_equals_complex_multiplication(head_dim, base, positions):
    assert rope_error(head_dim, base, positions) < (1e-4 if positions <= 300 else 1e-3)


def test_rope_tables_take_positions_of_any_shape():
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    cos, sin = rope_tables(positions, rope_frequencies(8))
    assert cos.shape == sin.shape == (2, 3, 8) and cos.dtype == torch.float32
    assert torch.equal(cos[1], rope_tables(positions[1], rope_frequencies(8))[0])


def test_rope_is_computed_in_float32_and_rounded_once():
    x = torch.sin(torch.arange(2 * 50 * 16).float()).reshape(1, 2, 50, 16).bfloat16()
    tables = rope_tables(torch.arange(50), rope_frequencies(16))
    assert apply_rope(x, *tables).dtype == torch.bfloat16
    assert torch.equal(apply_rope(x, *tables), apply_rope(x.float(), *tables).bfloat16())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
def test_layouts_round_trip(n_heads, half, dtype):
    rows = n_heads * 2 * half
    for weight in (torch.arange(rows).to(dtype), torch.arange(rows * 3).reshape(rows, 3).to(dtype)):
        ours = interleaved_to_half_split(weight, n_heads)
        assert torch.equal(half_split_to_interleaved(ours, n_heads), weight)
        for head in range(n_heads):
            one = weight[head * 2 * half : (head + 1) * 2 * half]
            assert torch.equal(ours[head * 2 * half : (head + 1) * 2 * half], torch.cat((one[0::2], one[1::2])))


def interleaved_scores(x, W_query, W_key, n_heads):
    """Scores (H, T, T) as Meta computes them, neighbours as complex numbers, in float64."""
    length, d = len(x), len(W_query) // n_heads
    turns = torch.exp(
        1j * torch.arange(length).double()[:, None] * 1e4 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    )
    q, k = ((x.double() @ W.double().T).reshape(length, n_heads, d // 2, 2) for W in (W_query, W_key))
    q, k = (torch.view_as_complex(a.contiguous()) * turns[:, None] for a in (q, k))
    return torch.einsum("mhi,nhi->hmn", q, k.conj()).real


def layout_error():
    """Our scores with permuted weights against Meta's way with its own."""
    x = torch.sin(torch.arange(80 * 24).float()).reshape(80, 24)
    W_query, W_key = torch.sin(torch.arange(2 * 64 * 24).float() ** 1.1).reshape(2, 64, 24)
    q, k = (llama2.interleaved_to_half_split(W, 4) for W in (W_query, W_key))
    q, k = ((x @ W.T).unflatten(-1, (4, 16)).transpose(0, 1)[None] for W in (q, k))
    cos, sin = llama2.rope_tables(torch.arange(80), llama2.rope_frequencies(16))
    ours = llama2.apply_rope(q, cos, sin) @ llama2.apply_rope(k, cos, sin).transpose(2, 3)
    return relative_error(ours[0], interleaved_scores(x, W_query, W_key, 4))


def test_both_layouts_give_the_same_scores():
    assert layout_error() < 1e-5


@pytest.mark.parametrize("rows, n_heads", [(12, 4), (10, 4), (8, 0), (8, -1), (0, 2)])
def test_rows_that_hold_no_heads(rows, n_heads):
    for permute in (interleaved_to_half_split, half_split_to_interleaved):
        with pytest.raises(InputError, match="n_heads"):
            permute(torch.zeros(rows, 3), n_heads)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("key", PLAIN)
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=key):
        Llama2Model({k: v for k, v in PLAIN.items() if k != key})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"n_kv_groups": 2}, "chapter 2"),
        ({"emb_dim": 66}, "n_heads 4"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rope_freq": {"factor": 8.0}}, "rope_freq"),
    ],
)
def test_impossible_configurations(change, named):
    with pytest.raises(ConfigError, match=named) as caught:
        Llama2Model({**PLAIN, **change})
    assert "\n" not in str(caught.value)


def test_70b_is_refused_at_once():
    with torch.device("meta"), pytest.raises(ConfigError, match="grouped-query"):
        Llama2Model(LLAMA2_CONFIG_70B)


def test_more_tokens_than_the_context_holds():
    model = random_weights(Llama2Model({**PLAIN, "context_length": 12}))
    with torch.no_grad():
        assert model(token_ids(PLAIN, 1, 12)).shape == (1, 12, 101)
        with pytest.raises(ContextError, match="13 tokens.*12"):
            model(token_ids(PLAIN, 1, 13))


# ---------------------------------------------------------------- mutants: each known mistake must be noticed


def attend(score=lambda s: s, scale=lambda d: d**0.5, mask=lambda m: m):
    """A version of `MultiHeadAttention.attend` with one thing changed."""

    def mutant(self, Q, K, V, seen):
        scores = Q @ K.transpose(2, 3) / scale(self.head_dim)
        scores = scores.masked_fill(~mask(seen), -torch.inf)
        return torch.softmax(scores.float(), dim=-1) @ V

    return mutant


def blind_to_itself(mask):
    mask = mask & ~torch.eye(len(mask), dtype=torch.bool)
    mask[0, 0] = True
    return mask


def interleaved_apply(x, cos, sin):
    half = x.shape[-1] // 2
    cos, sin = (t[..., :half].repeat_interleave(2, dim=-1) for t in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def norm(statistics):
    def mutant(self, x):
        return statistics(x, self.eps) * self.weight

    return mutant


def block(wiring):
    def mutant(self, x, mask, cos, sin):
        return wiring(self, x, lambda y: self.att(y, mask, cos, sin))

    return mutant


def turn_queries_only():
    calls = []

    def mutant(x, cos, sin):
        calls.append(None)
        return apply_rope(x, cos, sin) if len(calls) % 2 else x

    return mutant


def mean_square(x):
    return x.pow(2).mean(dim=-1, keepdim=True)


MUTANTS = {
    # name: (what is patched, how, the oracle that must notice)
    "base 500 000": ("rope_frequencies", lambda d, b, v=None: rope_frequencies(d, 500_000.0, v), "model"),
    "base ignored": ("rope_frequencies", lambda d, b=1e4, v=None: rope_frequencies(d, 1e4, v), "other base"),
    "exponents half as large": ("rope_frequencies", lambda d, b=1e4, v=None: rope_frequencies(d, b**0.5, v), "model"),
    "positions from 1": ("rope_tables", lambda p, f: rope_tables(p + 1, f), "rope"),
    "positions backwards": ("rope_tables", lambda p, f: rope_tables(p.flip(0), f), "model"),
    "cos and sin exchanged": ("rope_tables", lambda p, f: rope_tables(p, f)[::-1], "rope"),
    "interleaved": ("apply_rope", interleaved_apply, "model"),
    "turned the other way": ("apply_rope", lambda x, cos, sin: apply_rope(x, cos, -sin), "model"),
    "no rotation": ("apply_rope", lambda x, cos, sin: x, "model"),
    "queries only": ("apply_rope", turn_queries_only(), "model"),
    "permuted the wrong way": ("interleaved_to_half_split", half_split_to_interleaved, "layout"),
    "not permuted": ("interleaved_to_half_split", lambda w, n: w, "layout"),
    "permuted across heads": ("interleaved_to_half_split", lambda w, n: interleaved_to_half_split(w, 1), "layout"),
    "sees one token ahead": ("MultiHeadAttention.attend", attend(mask=lambda m: m | m.roll(-1, 0)), "model"),
    "sees everything": ("MultiHeadAttention.attend", attend(mask=torch.ones_like), "model"),
    "blind to itself": ("MultiHeadAttention.attend", attend(mask=blind_to_itself), "model"),
    "scores not scaled": ("MultiHeadAttention.attend", attend(scale=lambda d: 1), "model"),
    "scaled by d": ("MultiHeadAttention.attend", attend(scale=lambda d: d), "model"),
    "scaled by D / H": ("MultiHeadAttention.attend", attend(scale=lambda d: 24**0.5), "own head dimension"),
    "first residual missing": ("TransformerBlock.forward", block(
        lambda b, x, att: (y := att(b.norm1(x))) + b.ff(b.norm2(y))), "model"),
    "second residual missing": ("TransformerBlock.forward", block(
        lambda b, x, att: b.ff(b.norm2(x + att(b.norm1(x))))), "model"),
    "norms exchanged": ("TransformerBlock.forward", block(
        lambda b, x, att: (y := x + att(b.norm2(x))) + b.ff(b.norm1(y))), "model"),
    "post-norm": ("TransformerBlock.forward", block(
        lambda b, x, att: b.norm2((y := b.norm1(x + att(x))) + b.ff(y))), "model"),
    "parallel": ("TransformerBlock.forward", block(
        lambda b, x, att: x + att(b.norm1(x)) + b.ff(b.norm2(x))), "model"),
    "gate and value exchanged": (
        "FeedForward.forward", lambda ff, x: ff.fc3(ff.silu(ff.fc2(x)) * ff.fc1(x)), "model"),
    "no gate": ("FeedForward.forward", lambda ff, x: ff.fc3(ff.silu(ff.fc1(x))), "model"),
    "GELU": ("SiLU.forward", lambda self, x: F.gelu(x), "model"),
    "sigmoid": ("SiLU.forward", lambda self, x: torch.sigmoid(x), "model"),
    "epsilon outside the root": ("RMSNorm.forward", norm(lambda x, eps: x / (mean_square(x).sqrt() + eps)), "norm"),
    "epsilon forgotten": ("RMSNorm.forward", norm(lambda x, eps: x / mean_square(x).sqrt()), "norm"),
    "epsilon fixed": ("RMSNorm.forward", norm(lambda x, eps: x / (mean_square(x) + 1e-5).sqrt()), "other base"),
    "sum, not mean": ("RMSNorm.forward", norm(lambda x, eps: x / x.norm(dim=-1, keepdim=True)), "norm"),
    "centered": ("RMSNorm.forward", norm(lambda x, eps: F.layer_norm(x, x.shape[-1:], eps=eps)), "norm"),
    "weight 1 + w": ("RMSNorm.forward", lambda n, x: F.rms_norm(x, x.shape[-1:], 1 + n.weight, n.eps), "norm"),
    "statistics in bfloat16": (
        "RMSNorm.forward", norm(lambda x, eps: x * torch.rsqrt(mean_square(x) + eps)), "roundings"),
}  # fmt: skip


@pytest.fixture(scope="module")
def oracles(reference):
    """name -> (measure, the most that it may be)."""
    return {
        "model": (lambda: model_error(reference, "plain"), 1e-4),
        "other base": (lambda: model_error(reference, "another base and epsilon"), 1e-4),
        "own head dimension": (lambda: model_error(reference, "head dimension of its own"), 1e-4),
        "rope": (rope_error, 1e-4),
        "layout": (layout_error, 1e-5),
        "norm": (norm_error, 1e-6),
        "roundings": (norm_roundings, 1e-3),
    }


def test_the_oracles_accept_the_package(oracles):
    for name, (measure, most) in oracles.items():
        assert measure() < most, name


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(monkeypatch, oracles, name):
    target, mutant, oracle = MUTANTS[name]
    monkeypatch.setattr(f"llamabook.llama2.{target}", mutant)
    measure, most = oracles[oracle]
    assert measure() > 10 * most, f"nobody noticed: {name}"


def test_positions_from_1_change_no_logits(monkeypatch, reference):
    """Not a mistake that logits could show: scores depend on distances. `rope_error` has to notice it."""
    monkeypatch.setattr("llamabook.llama2.rope_tables", lambda p, f: rope_tables(p + 1, f))
    assert model_error(reference, "plain") < 1e-4
