"""The GPT against transformers' GPT-2, PyTorch's own parts and closed forms; and known wrong models against these."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llamabook.errors import ConfigError, ContextError
from llamabook.gpt import GELU, GPT_CONFIG_124M, FeedForward, GPTModel, LayerNorm, MultiHeadAttention, TransformerBlock

TINY = {
    **GPT_CONFIG_124M,
    "vocab_size": 61,
    "context_length": 130,
    "emb_dim": 48,
    "n_heads": 4,
    "n_layers": 3,
    "hidden_dim": 100,
}


def random_model(seed=0, **changes):
    """A model whose weights are large enough that every part shows in the logits."""
    model = GPTModel({**TINY, **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(*shape, seed=1, vocab_size=TINY["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def as_transformers(model, cfg):
    """The same function in transformers' GPT-2: fused and transposed (`Conv1D` keeps its weights as (in, out))."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = model.state_dict()
    theirs = {"transformer.wte.weight": ours["tok_emb.weight"], "transformer.wpe.weight": ours["pos_emb.weight"]}
    theirs |= {f"transformer.ln_f.{kind}": ours[f"final_norm.{kind}"] for kind in ("weight", "bias")}
    theirs["lm_head.weight"] = ours["out_head.weight"]
    for n in range(cfg["n_layers"]):
        a, b = f"transformer.h.{n}", f"trf_blocks.{n}"
        qkv = [f"{b}.att.W_{part}" for part in ("query", "key", "value")]
        theirs[f"{a}.attn.c_attn.weight"] = torch.cat([ours[f"{name}.weight"].T for name in qkv], dim=1)
        zeros = torch.zeros(cfg["emb_dim"])
        theirs[f"{a}.attn.c_attn.bias"] = torch.cat([ours.get(f"{name}.bias", zeros) for name in qkv])
        for x, y in (("attn.c_proj", "att.out_proj"), ("mlp.c_fc", "ff.fc1"), ("mlp.c_proj", "ff.fc2")):
            theirs[f"{a}.{x}.weight"], theirs[f"{a}.{x}.bias"] = ours[f"{b}.{y}.weight"].T, ours[f"{b}.{y}.bias"]
        for x, y in (("ln_1", "norm1"), ("ln_2", "norm2")):
            theirs |= {f"{a}.{x}.{kind}": ours[f"{b}.{y}.{kind}"] for kind in ("weight", "bias")}
    config = GPT2Config(
        vocab_size=cfg["vocab_size"],
        n_positions=cfg["context_length"],
        n_embd=cfg["emb_dim"],
        n_head=cfg["n_heads"],
        n_layer=cfg["n_layers"],
        n_inner=cfg["hidden_dim"],
        tie_word_embeddings=cfg["tie_embeddings"],
        bos_token_id=0,
        eos_token_id=0,
    )
    reference = GPT2LMHeadModel(config).eval()
    reference.load_state_dict({name: tensor.clone() for name, tensor in theirs.items()})
    return reference


def relative_error(model, reference_logits, ids):
    with torch.no_grad():
        logits = model(ids)
    error = (logits - reference_logits).abs().max() / reference_logits.abs().max()
    return math.inf if error.isnan() else error.item()


CHANGES = [{}, {"tie_embeddings": False}, {"qkv_bias": False}, {"n_heads": 1}, {"n_layers": 1}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_logits_are_those_of_transformers_gpt2(changes):
    model, ids = random_model(**changes), random_ids(2, 120)
    with torch.no_grad():
        expected = as_transformers(model, {**TINY, **changes})(ids).logits
    assert expected.shape == (2, 120, 61) and expected.std() > 1
    assert relative_error(model, expected, ids) < 1e-5


class WrongLayerNorm(LayerNorm):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) * self.weight + self.bias


def divide_by_d_minus_1(model):
    for part in model.modules():
        if type(part) is LayerNorm:
            part.__class__ = WrongLayerNorm


def each(change):
    def apply(model):
        for block in model.trf_blocks:
            change(block)

    return apply


def replace_mask(change):
    return each(lambda b: b.att.register_forward_pre_hook(lambda att, args: (args[0], change(args[1]))))


def swap(b, first, second):
    parts = [b.get_submodule(name) for name in (first, second)]
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    parts[0].load_state_dict(states[1])
    parts[1].load_state_dict(states[0])


def scale_query(b, factor):
    b.att.W_query.weight.mul_(factor)
    b.att.W_query.bias.mul_(factor)


def interleave_heads(b):
    b.att.split_heads = lambda x: x.unflatten(-1, (b.att.head_dim, b.att.n_heads)).permute(0, 3, 1, 2)


def parallel(b):
    b.forward = lambda x, mask: x + b.att(b.norm1(x), mask) + b.ff(b.norm2(x))


def post_norm(b):
    b.forward = lambda x, mask: b.norm2((y := b.norm1(x + b.att(x, mask))) + b.ff(y))


WRONG_MODELS = {
    "exact GELU": each(lambda b: setattr(b.ff, "gelu", nn.GELU())),
    "ReLU": each(lambda b: setattr(b.ff, "gelu", nn.ReLU())),
    "mask sees one ahead": replace_mask(lambda mask: torch.ones_like(mask).tril(1)),
    "no mask": replace_mask(torch.ones_like),
    "mask hides the token itself": replace_mask(lambda mask: mask.tril(-1)),
    "mask the other way round": replace_mask(lambda mask: mask.T),
    "positions start at 1": lambda m: m.pos_emb.weight.copy_(m.pos_emb.weight.roll(-1, 0)),
    "no positions": lambda m: m.pos_emb.weight.zero_(),
    "scores not scaled": each(lambda b: scale_query(b, math.sqrt(b.att.head_dim))),
    "scores scaled by D": each(lambda b: scale_query(b, math.sqrt(b.att.head_dim / 48))),
    "query and key swapped": each(lambda b: swap(b.att, "W_query", "W_key")),
    "key and value swapped": each(lambda b: swap(b.att, "W_key", "W_value")),
    "norms swapped": each(lambda b: swap(b, "norm1", "norm2")),
    "heads interleaved": each(interleave_heads),
    "output matrix transposed": each(lambda b: b.att.out_proj.weight.copy_(b.att.out_proj.weight.T.clone())),
    "no bias of the output": each(lambda b: b.att.out_proj.bias.zero_()),
    "no final norm": lambda m: setattr(m, "final_norm", nn.Identity()),
    "variance over D - 1": divide_by_d_minus_1,
    "attention and feed-forward in parallel": each(parallel),
    "norms after the sum": each(post_norm),
    "dropout left on": lambda m: m.train(),
}


@pytest.fixture(scope="module")
def oracle():
    model, ids = random_model(), random_ids(2, 120)
    with torch.no_grad():
        return model, ids, as_transformers(model, TINY)(ids).logits


@pytest.mark.parametrize("wrong", WRONG_MODELS)
def test_the_oracle_rejects(wrong, oracle):
    model, ids, expected = oracle
    mutant = copy.deepcopy(model)
    with torch.no_grad():
        WRONG_MODELS[wrong](mutant)
    assert relative_error(mutant, expected, ids) > 1e-4


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 48), (1, 1)])
def test_layer_norm_is_torchs(shape):
    x = 5 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    norm = LayerNorm(shape[-1])
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, shape[-1]))
        norm.bias.copy_(torch.linspace(3, -1, shape[-1]))
    expected = F.layer_norm(x.double(), shape[-1:], norm.weight.double(), norm.bias.double(), 1e-5)
    assert torch.allclose(norm(x).double(), expected, atol=1e-5)


def test_layer_norm_far_from_zero_and_of_a_constant():
    x = 10_000 + torch.sin(torch.arange(64))
    assert torch.allclose(LayerNorm(64)(x).double(), F.layer_norm(x.double(), (64,)), atol=1e-2)
    assert torch.equal(LayerNorm(5)(torch.full((2, 5), 7.0)), torch.zeros(2, 5))


def test_layer_norm_takes_its_statistics_in_float32():
    x = torch.linspace(-2, 3, 4096).bfloat16()
    norm = LayerNorm(4096, dtype=torch.bfloat16)
    expected = F.layer_norm(x.float(), (4096,)).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) != expected).sum() <= 4  # bfloat16 throughout differs in hundreds


def test_gelu_is_torchs_tanh_form_also_far_out():
    x = torch.linspace(-30, 30, 4001)
    assert torch.allclose(GELU()(x), F.gelu(x, approximate="tanh"), atol=1e-6)
    assert (GELU()(x) - F.gelu(x)).abs().max() > 1e-4  # so the test above can tell the forms apart


def test_feed_forward_treats_positions_alike():
    ff = FeedForward(TINY)
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    expected = F.gelu(x @ ff.fc1.weight.T + ff.fc1.bias, approximate="tanh") @ ff.fc2.weight.T + ff.fc2.bias
    assert torch.allclose(ff(x), expected, atol=1e-6)
    assert torch.allclose(ff(x.flip(1)), ff(x).flip(1), atol=1e-6)


def test_attention_is_torchs_multihead_attention():
    att = MultiHeadAttention(TINY).eval()
    reference = nn.MultiheadAttention(48, 4, batch_first=True).eval()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [getattr(W, kind) for W in (att.W_query, att.W_key, att.W_value)]
            getattr(reference, f"in_proj_{kind}").copy_(torch.cat(parts))
            getattr(reference.out_proj, kind).copy_(getattr(att.out_proj, kind))
        x = 3 * torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(20, 20, dtype=torch.bool).tril()
        expected, _ = reference(x, x, x, attn_mask=~mask)  # there True means: may not look
        assert torch.allclose(att(x, mask), expected, atol=1e-5)


def test_block_with_silent_output_matrices_is_the_identity():
    block = TransformerBlock(TINY).eval()
    for part in (block.att.out_proj, block.ff.fc2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    x = torch.randn(1, 6, 48)
    assert torch.equal(block(x, torch.ones(6, 6, dtype=torch.bool).tril()), x)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("t", [0, 1, 17, 38, 39])
def test_a_token_changes_only_its_own_and_later_logits(t):
    model, ids = random_model(), random_ids(1, 40)
    changed = ids.clone()
    changed[0, t] = (ids[0, t] + 1) % 61
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(dim=-1)[0]  # (T,)
    assert (difference[:t] == 0).all() and (difference[t:] > 1e-4).all()


def test_rows_of_a_batch_do_not_see_each_other():
    model, ids = random_model(), random_ids(3, 30)
    with torch.no_grad():
        together = model(ids)
        alone = torch.cat([model(row[None]) for row in ids])
    assert torch.allclose(together, alone, atol=1e-4)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, ids = random_model(drop_rate=0.3), random_ids(1, 20)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), model(ids))
        assert not torch.equal(model.train()(ids), model(ids))
        still = random_model(drop_rate=0.0)
        assert torch.equal(still.train()(ids), still.eval()(ids))


@pytest.mark.parametrize("place", ["drop_emb", "trf_blocks.0.att.dropout", "trf_blocks.1.dropout"])
def test_each_dropout_acts(place):
    model, ids = random_model(drop_rate=0.3), random_ids(1, 20)
    with torch.no_grad():
        expected = model(ids)
        model.get_submodule(place).train()
        assert not torch.allclose(model(ids), expected, atol=1e-3)


def test_a_context_full_of_tokens_fits_and_one_more_does_not():
    model = random_model(context_length=12)
    assert model(random_ids(1, 12)).shape == (1, 12, 61)
    with pytest.raises(ContextError, match=r"^13 tokens.*12 positions.*shorten") as caught:
        model(random_ids(1, 13))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in GPT_CONFIG_124M if key != "tie_embeddings"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=rf"lacks {key}: see GPT_CONFIG_124M"):
        GPTModel({k: v for k, v in TINY.items() if k != key})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="emb_dim 48 is not a multiple of n_heads 5"):
        GPTModel({**TINY, "n_heads": 5})


def test_tie_embeddings_may_be_left_out():
    model = GPTModel({k: v for k, v in TINY.items() if k != "tie_embeddings"})
    assert model.out_head.weight is not model.tok_emb.weight


def test_the_tie_survives_loading_and_an_update():
    model, other = random_model(seed=0), random_model(seed=5)
    model.load_state_dict(other.state_dict())
    ids = random_ids(1, 9)
    assert torch.equal(model(ids), other(ids))
    torch.optim.SGD(model.parameters(), lr=0.1).step(lambda: model(ids).sum().backward())
    assert model.out_head.weight is model.tok_emb.weight
    assert not torch.equal(model.tok_emb.weight, other.tok_emb.weight)


def test_weight_names():
    block = [f"att.{W}.{kind}" for W in ("W_query", "W_key", "W_value", "out_proj") for kind in ("weight", "bias")]
    block += [f"{part}.{kind}" for part in ("ff.fc1", "ff.fc2", "norm1", "norm2") for kind in ("weight", "bias")]
    outer = ["tok_emb.weight", "pos_emb.weight", "final_norm.weight", "final_norm.bias", "out_head.weight"]
    expected = set(outer) | {f"trf_blocks.{n}.{name}" for n in range(3) for name in block}
    assert set(random_model().state_dict()) == expected


def test_parameters_of_gpt2_124m():
    with torch.device("meta"):
        tied, untied = GPTModel(GPT_CONFIG_124M), GPTModel({**GPT_CONFIG_124M, "tie_embeddings": False})
    V, T, D, L = 50257, 1024, 768, 12
    closed_form = V * D + T * D + L * (12 * D * D + 13 * D) + 2 * D
    assert sum(p.numel() for p in tied.parameters()) == closed_form == 124_439_808
    assert sum(p.numel() for p in untied.parameters()) == closed_form + V * D == 163_037_184
    assert tied(torch.zeros(1, 8, dtype=torch.long, device="meta")).shape == (1, 8, V)


def test_the_first_guess_is_fair():
    torch.manual_seed(0)
    model, ids = GPTModel({**TINY, "vocab_size": 500, "emb_dim": 96}).eval(), random_ids(4, 100, vocab_size=500)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - math.log(500)) < 0.1


def test_first_weights():
    torch.manual_seed(0)
    model = GPTModel({**TINY, "emb_dim": 96, "n_layers": 8})
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            writer = name.endswith(("out_proj.weight", "fc2.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / 4 if writer else 0.02, rel=0.1), name
        else:
            assert (parameter == ("norm" in name and name.endswith("weight"))).all(), name


def test_every_parameter_learns_and_a_batch_can_be_overfitted():
    torch.manual_seed(0)
    model, ids = GPTModel({**TINY, "drop_rate": 0.0}), random_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            silent = {name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-9}
            assert all("W_key.bias" in name for name in silent)  # it shifts all scores of a query alike
        optimizer.step()
    assert loss < 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, ids = random_model(dtype=dtype), random_ids(1, 30)
    with torch.no_grad():
        logits = model(ids)
        expected = copy.deepcopy(model).float()(ids)
    assert logits.dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
    assert (logits.float() - expected).abs().max() < tolerance * expected.abs().max()
