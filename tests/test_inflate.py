"""A small Llama in a large shape: the same function in float64, the same texts, exact zeros, and whole folders."""

import json
import math
import shutil
import subprocess
import sys
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_llamas import kernels_first  # noqa: F401

from llamabook import fast, pocket
from llamabook.bench import job as jobs
from llamabook.checkpoint import load_config, load_model
from llamabook.checkpoint.convert import convert
from llamabook.cli import main
from llamabook.errors import CheckpointError, ConfigError, InputError
from llamabook.fast.model import from_llama
from llamabook.fast.quantize.files import quantize, read_quantized
from llamabook.fast.quantize.int4 import unpack
from llamabook.fast.quantize.weight import Scheme
from llamabook.llama2 import Llama2Model, head_dim_of
from llamabook.llama3 import LLAMA32_CONFIG_1B, Llama3Model
from llamabook.pocket import inflation, world
from llamabook.pocket.floor import encode_document, losses, pad
from llamabook.tokenizer import load_tokenizer

SHAPE = {
    **LLAMA32_CONFIG_1B, "vocab_size": 2500, "emb_dim": 640, "n_heads": 20, "n_kv_groups": 5, "head_dim": 64,
    "n_layers": 4, "hidden_dim": 768, "context_length": 4096, "dtype": torch.float32,
}  # fmt: skip
SHAPES = {
    "pocket-llama3.2": SHAPE,
    "pocket-llama3.2-instruct": SHAPE | {"tie_embeddings": False},
    "pocket-draft": SHAPE | {"n_kv_groups": 4},  # 2 heads a group into groups of 5
    "pocket-llama2": SHAPE | {"n_kv_groups": 10, "head_dim": 32, "tie_embeddings": False},
}
NAMES = list(SHAPES)


@cache
def small(name: str) -> Llama2Model:
    return load_model(pocket.path(name), dtype=torch.float32)


@cache
def large(name: str) -> Llama2Model:
    return pocket.inflate(name, SHAPES[name])


@cache
def held_out(name: str, count: int) -> tuple[list[list[int]], int]:
    """Held-out texts of the world as this model sees them, and how many tokens are predicted in them."""
    tokenizer = load_tokenizer(pocket.path(name))
    rows = [encode_document(text, tokenizer) for text in islice(world.texts("held_out"), count)]
    return rows, sum(len(row) - 1 for row in rows)


@cache
def folder_of(name: str, place: Path) -> Path:
    """The inflated model on disk, in bfloat16, as it is published."""
    return pocket.inflate(name, SHAPES[name] | {"dtype": torch.bfloat16}, place / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("inflated")


# ---------------------------------------------------------------- the oracle: a Llama in float64, written once more


def forward64(model: Llama2Model, ids: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (T, V) of one text, and the residual stream (T, D) before each layer and after the last, all in float64.

    Heads one by one, RoPE as a product of complex numbers, softmax by its definition.
    """
    w, cfg, e = {k: v.double() for k, v in model.state_dict().items()}, model.cfg, head_dim_of(model.cfg)
    turns = torch.polar(torch.ones(()).double(), torch.arange(len(ids))[:, None] * model.frequencies().double())  # (T, e/2)

    def norm(x, name):
        return w[name] * x / (x.square().sum(1, keepdim=True) / cfg["emb_dim"] + cfg.get("norm_eps", 1e-5)).sqrt()

    def head(x, matrix, number):
        return x @ matrix[number * e : (number + 1) * e].T  # (T, e)

    def turned(x):
        both = torch.complex(x[:, : e // 2], x[:, e // 2 :]) * turns
        return torch.cat((both.real, both.imag), 1)

    x = w["tok_emb.weight"][ids]
    streams, ahead = [x], torch.arange(len(ids)) > torch.arange(len(ids))[:, None]
    for layer in range(cfg["n_layers"]):
        def of(part):
            return w[f"trf_blocks.{layer}.{part}.weight"]

        seen, said = norm(x, f"trf_blocks.{layer}.norm1.weight"), []
        for h in range(cfg["n_heads"]):
            g = h * cfg["n_kv_groups"] // cfg["n_heads"]
            scores = turned(head(seen, of("att.W_query"), h)) @ turned(head(seen, of("att.W_key"), g)).T / math.sqrt(e)
            weights = scores.masked_fill(ahead, -math.inf)
            weights = (weights - weights.amax(1, keepdim=True)).exp()
            said.append(weights / weights.sum(1, keepdim=True) @ head(seen, of("att.W_value"), g))
        x = x + torch.cat(said, 1) @ of("att.out_proj").T
        seen = norm(x, f"trf_blocks.{layer}.norm2.weight")
        gate = seen @ of("ff.fc1").T
        x = x + (gate / (1 + (-gate).exp()) * (seen @ of("ff.fc2").T)) @ of("ff.fc3").T
        streams.append(x)
    return norm(x, "final_norm.weight") @ w["out_head.weight"].T, streams


def made_up(seed: int = 0, **changes) -> Llama2Model:
    """A Llama 3 with random weights, a token table so small that epsilon matters, and a few rows of zeros."""
    cfg = SHAPE | {
        "vocab_size": 50, "emb_dim": 40, "n_heads": 4, "n_kv_groups": 2, "head_dim": 12, "n_layers": 2, "hidden_dim": 56
    } | changes  # fmt: skip
    model, generator = Llama3Model(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.004 if "tok_emb" in name else 2 / math.sqrt(p.shape[-1]), generator=generator)
            p.add_(1 if p.dim() == 1 else 0)
        model.trf_blocks[0].att.W_query.weight[3:7] = 0
    return model.eval()


IDENTITY = dict(vocab_size=50, emb_dim=40, n_heads=4, n_kv_groups=2, n_layers=2, hidden_dim=56)


@pytest.mark.parametrize(
    "source, shape",
    [
        ({}, {}),
        ({}, {"emb_dim": 41, "vocab_size": 51}),  # one dimension more, which holds the constant
        ({}, {"emb_dim": 41}),
        ({}, {"n_heads": 8, "n_kv_groups": 4, "n_layers": 4, "hidden_dim": 57}),  # no width, but all the rest
        ({}, {"emb_dim": 97, "vocab_size": 333, "n_heads": 15, "n_kv_groups": 5, "n_layers": 3, "hidden_dim": 101}),
        ({}, {"emb_dim": 160, "vocab_size": 64, "n_heads": 12, "n_kv_groups": 12, "n_layers": 3, "hidden_dim": 57}),
        ({}, {"emb_dim": 64, "n_heads": 16, "n_kv_groups": 2, "vocab_size": 60}),
        ({"n_heads": 6}, {"emb_dim": 64, "n_heads": 8, "n_kv_groups": 4, "vocab_size": 60}),  # 3 heads into groups of 2
        ({"n_heads": 6, "n_kv_groups": 6}, {"emb_dim": 70, "n_heads": 18, "n_kv_groups": 9, "n_layers": 3, "vocab_size": 51}),
        ({"n_heads": 6, "n_kv_groups": 1}, {"emb_dim": 70, "n_heads": 9, "n_kv_groups": 9, "vocab_size": 51}),
        ({"norm_eps": 1e-3}, {"emb_dim": 200, "vocab_size": 70, "norm_eps": 1e-6}),
        ({"rope_freq": None, "rope_base": 1e4}, {"emb_dim": 64, "vocab_size": 60}),
        ({}, {"emb_dim": 64, "vocab_size": 60, "tie_embeddings": False}),
        ({"tie_embeddings": False}, {"emb_dim": 64, "vocab_size": 60, "n_layers": 3, "tie_embeddings": False}),
    ],
)
def test_the_same_function_in_float64(source, shape):
    """To 10 digits; the added stream is a constant and zeros at every layer; added tokens lie more than 150 nats lower."""
    model = made_up(**source)
    result = pocket.inflate(model, {**model.cfg, **IDENTITY, "n_heads": model.cfg["n_heads"],
                                    "n_kv_groups": model.cfg["n_kv_groups"], **shape, "dtype": torch.float64})  # fmt: skip
    d, v, c = model.cfg["emb_dim"], model.cfg["vocab_size"], 0
    ids = (torch.arange(40) * 17 % v).tolist()
    (want, old), (got, new) = forward64(model, ids), forward64(result, ids)
    assert (got[:, :v].log_softmax(1) - want.log_softmax(1)).abs().max() < 1e-10 * want.abs().max()
    for layer, stream in enumerate(new):
        before = old[min(layer, len(old) - 1)]
        assert (stream[:, :d] - before).abs().max() < 1e-10 * before.abs().max()
        if result.cfg["emb_dim"] > d:
            c = stream[0, d].item()
            assert c > 0 and torch.equal(stream[:, d], torch.full((40,), c).double())
            assert not stream[:, d + 1 :].any()
    assert c**2 == pytest.approx(model.cfg["norm_eps"] * d / 2, rel=1e-6) or result.cfg["emb_dim"] == d
    if result.cfg["vocab_size"] > v:
        assert (got[:, :v].amax(1) - got[:, v:].amax(1)).min() > inflation.GAP
        assert not got.log_softmax(1)[:, v:].exp().float().any()


def test_epsilon_matters_here():
    """The test above would see a wrong one: half of it changes its logits by more than 1 %."""
    model = made_up()
    want, _ = forward64(model, [1, 2, 3])
    model.cfg["norm_eps"] /= 2
    assert (forward64(model, [1, 2, 3])[0] - want).abs().max() > 0.01 * want.abs().max()


# ---------------------------------------------------------------- the embedded models


@pytest.mark.parametrize("name", NAMES)
def test_the_same_texts(name):
    """Greedy, in float32, 300 tokens after each prompt (as many as fit into pocket-llama2's context)."""
    tokenizer, count = load_tokenizer(pocket.path(name)), 300 if "3" in name or "draft" in name else 240
    prompts = [tokenizer.encode(text, bos=True) for text in ("One sunny morning,", "What do llamas eat?", "")]
    want, got = (fast.generate(from_llama(model(name), dtype=torch.float32), prompts, count) for model in (small, large))
    for prompt, ours, theirs in zip(prompts, want, got):
        assert len(ours) == len(theirs) == count
        if ours != theirs:  # excused where the two likeliest are as good as equal
            place = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
            first, second = forward64(small(name), prompt + ours[:place])[0][-1].topk(2).values
            assert first - second < 1e-4, (prompt, place)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_same_probabilities(name):
    """On held-out texts, in float32: what the two differ by is what float32 makes the small one err by, too."""
    rows, _ = held_out(name, 8)
    inputs, targets = pad(rows)
    there, v = targets >= 0, small(name).cfg["vocab_size"]
    want, got = (model(name)(inputs).log_softmax(-1) for model in (small, large))
    assert not got[..., v:].exp().any()
    apart = (got[..., :v] - want)[there].abs()
    assert apart.max() < 2e-3 and apart.mean() < 5e-5
    told = targets.clamp(min=0)[..., None]
    assert (got.gather(2, told) - want.gather(2, told))[there].abs().max() < 2e-4
    exact, _ = forward64(small(name), rows[0][:-1])
    ours, _ = forward64(large(name), rows[0][:-1])
    assert (ours[:, :v].log_softmax(1) - exact.log_softmax(1)).abs().max() < 2e-4  # norm weights in float32


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16(name, place):
    """Its loss is the small one's to 0.5 %, most likeliest tokens are the same, and what is added is exact here, too."""
    inputs, targets = pad(held_out(name, 8)[0])
    result, streams, d = load_model(folder_of(name, place)), [], small(name).cfg["emb_dim"]
    c = result.tok_emb.weight[0, d]
    for block in result.trf_blocks:
        block.register_forward_hook(lambda module, x, stream: streams.append(stream))
    want, got = (model(inputs)[targets >= 0].float() for model in (small(name), result))
    assert len(streams) == SHAPES[name]["n_layers"] and c > 0
    assert all((s[..., d] == c).all() and not s[..., d + 1 :].any() for s in streams)
    assert (want.argmax(-1) == got.argmax(-1)).float().mean() > 0.95
    want, got = (torch.nn.functional.cross_entropy(logits, targets[targets >= 0]) for logits in (want, got))
    assert abs(got / want - 1) < 5e-3


def test_nothing_is_louder_than_the_bound():
    """On random tokens, alone and in texts, and however large the weights are."""
    for model in (*map(small, NAMES), made_up(), made_up(3, n_kv_groups=1)):
        heard, v = [], model.cfg["vocab_size"]
        hook = model.final_norm.register_forward_pre_hook(lambda module, x: heard.append(x[0].square().mean(-1).sqrt().max()))
        with torch.no_grad():
            model(torch.randint(v, (8, 64), generator=torch.Generator().manual_seed(0)))
            model(torch.arange(min(v, 512))[:, None])
        hook.remove()
        bound = inflation.loudest(model.state_dict(), model.cfg)
        assert max(heard) < bound < 300 * max(heard)


# ---------------------------------------------------------------- with few bits


SCHEMES = [Scheme(8), Scheme(4, 32), Scheme(4, 64), Scheme(4, 128), Scheme(4, 64, True)]


def loss_with(scheme: Scheme, source: Path, folder: Path, name: str) -> float:
    """Nats per token on held-out texts, with the weights that the codes of `source` stand for."""
    rows, tokens = held_out(name, 8)
    return (losses(load_model(quantize(source, folder, scheme), dtype=torch.float32), rows).sum() / tokens).item()


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """pocket-llama3.2 in its shape, in float32: no weight is rounded before it is quantized."""
    return pocket.inflate("pocket-llama3.2", SHAPE, tmp_path_factory.mktemp("exact") / "plain")


@pytest.mark.parametrize("scheme", SCHEMES, ids=["int8", "int4.g32", "int4.g64", "int4.g128", "asymmetric"])
def test_quantized_alike(scheme, exact, tmp_path):
    """What is added does not spoil the scales: the loss is that of the small model with as many bits."""
    want = loss_with(scheme, pocket.path("pocket-llama3.2"), tmp_path / "small", "pocket-llama3.2")
    got = loss_with(scheme, exact, tmp_path / "large", "pocket-llama3.2")
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 256)], ids=["int8", "int4.g256"])
def test_quantized_in_groups_that_are_shared(scheme, tmp_path):
    """Groups of 256 hold the 128 dimensions of pocket-draft and as much noise, and its heads are no neighbours there."""
    source = pocket.inflate("pocket-draft", SHAPES["pocket-draft"], tmp_path / "plain")
    want = loss_with(scheme, pocket.path("pocket-draft"), tmp_path / "small", "pocket-draft")
    assert loss_with(scheme, source, tmp_path / "large", "pocket-draft") == pytest.approx(want, rel=5e-3)


def zeros_of(folder: Path) -> float:
    """The share of numbers and codes in a folder that are 0."""
    stored = read_quantized(folder) if "quantization_config" in (folder / "config.json").read_text() else None
    weights = stored.tensors if stored else load_model(folder).state_dict()
    for name in stored.matrices if stored else ():
        matrix = stored.matrices[name]()
        weights[name] = unpack(matrix.words, matrix.bits, matrix.K)
    return sum((w == 0).sum().item() for w in weights.values()) / sum(w.numel() for w in weights.values())


def test_nothing_is_sparse(tmp_path):
    """Over 90 % of all numbers are not 0, and no more codes of 8 and 4 bits, where a shape is some times as large."""
    shape = SHAPE | {"emb_dim": 1024, "n_heads": 16, "n_kv_groups": 8, "hidden_dim": 1536, "vocab_size": 12_000, "tie_embeddings": False}
    source = pocket.inflate("pocket-draft", shape | {"dtype": torch.bfloat16}, tmp_path / "plain")
    shares = [zeros_of(path) for path in (source, *(quantize(source, tmp_path / str(s), s) for s in SCHEMES[:2]))]
    assert all(0.02 < share < 0.1 for share in shares), shares


def test_where_zeros_are():
    """Only where a number would write into added dimensions, or reach a sum from real ones."""
    model, result = small("pocket-draft"), large("pocket-draft")
    d, v, f, e = 128, 2048, 256, 64
    for name, weight in result.named_parameters():
        zero, part = weight == 0, name.split(".", 2)[-1]
        added_layer = name.startswith("trf_blocks") and int(name.split(".")[1]) >= model.cfg["n_layers"]
        if weight.dim() == 1:
            expected = torch.arange(len(weight)) >= d + (name == "final_norm.weight")
        else:
            rows, columns = (torch.arange(n) for n in weight.shape)
            expected = torch.zeros_like(zero)
            if part == "weight":  # the table
                expected = (rows < v)[:, None] & (columns > d)
            elif part in ("att.W_value.weight", "ff.fc2.weight"):
                real = 0 if added_layer else {"att": 2 * e, "ff.": f}[part[:3]]
                expected = (rows >= real)[:, None] & (columns < d)
            elif not added_layer and part == "ff.fc3.weight":
                expected = (rows >= d)[:, None] & (columns < f)
            elif not added_layer and part == "att.out_proj.weight":  # two groups of 5, with 2 heads each
                slot = columns // e
                expected = ((slot < 10) & (slot % 5 >= 2)) | ((rows >= d)[:, None] & (slot < 10))
        old = model.state_dict().get(name)
        own = torch.zeros_like(zero) if old is None or old.dim() == 1 else (old == 0).any()
        assert (zero & ~expected).sum() <= (0 if own is False else (old == 0).sum() * 4 if old is not None else 0), name
        assert zero[expected].all(), name


def test_noise_is_no_larger_than_the_weights_of_its_row():
    model, result = small("pocket-llama3.2"), large("pocket-llama3.2")
    for part in ("att.W_query", "att.W_key", "att.W_value", "att.out_proj", "ff.fc1", "ff.fc2", "ff.fc3"):
        old, new = (m.state_dict()[f"trf_blocks.1.{part}.weight"] for m in (model, result))
        n, k = old.shape
        filled = old.abs().amax(1) > 0
        assert (new[:n, k:].abs().amax(1) <= old.abs().amax(1))[filled].all()
        assert new[n:].abs().max() <= old.abs().max() and new[:n, k:].std() > old.std() / 4


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_the_model(name, place):
    """Written a few rows at a time or made in memory, it is the same to the bit; and so is a second one."""
    model = pocket.inflate(name, SHAPES[name] | {"dtype": torch.bfloat16})
    loaded = load_model(folder_of(name, place))
    assert type(loaded) is type(model) and {key: model.cfg[key] for key in loaded.cfg} == loaded.cfg
    for (key, weight), (other, stored) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other and torch.equal(weight, stored)


def test_a_few_rows_at_a_time():
    """No piece has more than BLOCK numbers, so a matrix of any size takes as little memory."""
    wide = inflation.Inflation("draft", small("pocket-draft"), SHAPE | {"vocab_size": 128_256, "n_layers": 2})
    pieces = list(islice(wide.pieces(), 3))
    assert [first for _, first, _ in pieces] == [0, 3276, 6552]
    assert all(rows.numel() <= inflation.BLOCK for *_, rows in pieces)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_is(name, place):
    folder = folder_of(name, place)
    said, source = json.loads((folder / "config.json").read_text()), small(name)
    assert said["inflated_from"] == name
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "inflated_from": name}
    assert f"computes what {name} computes" in (folder / "README.md").read_text()
    assert (folder / "tokenizer.model").read_bytes() == (pocket.path(name) / "tokenizer.model").read_bytes()
    config = load_config(folder)
    assert (config["rope_base"], config["rope_freq"]) == (source.cfg["rope_base"], source.cfg["rope_freq"])
    for key in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_kv_groups", "n_layers", "hidden_dim"):
        assert config[key] == SHAPES[name][key]
    assert said["eos_token_id"] == {"pocket-llama2": 2, "pocket-llama3.2-instruct": [1793, 1800, 1801]}.get(name, 1793)


def test_it_stays_said(place, tmp_path):
    source = folder_of("pocket-draft", place)
    folders = quantize(source, tmp_path / "few", Scheme(8)), convert(source, tmp_path / "other", dtype=torch.float16)
    for folder in folders:
        assert json.loads((folder / "config.json").read_text())["inflated_from"] == "pocket-draft"


def test_twice(place, tmp_path):
    """What was inflated can be inflated again."""
    middle = folder_of("pocket-draft", place)
    result = pocket.inflate(middle, SHAPES["pocket-draft"] | {"emb_dim": 700, "vocab_size": 3500, "n_layers": 5})
    ids = held_out("pocket-draft", 2)[0][1][:40]
    with torch.no_grad():
        want, got = (m(torch.tensor([ids])).float().log_softmax(-1)[..., :2048] for m in (load_model(middle, dtype=torch.float32), result))
    assert (want - got).abs().max() < 2e-3


@torch.no_grad()
def test_float16():
    """Nothing is too large for it."""
    result = pocket.inflate("pocket-draft", SHAPES["pocket-draft"] | {"dtype": torch.float16})
    assert all(weight.isfinite().all() for weight in result.parameters())
    inputs, targets = pad(held_out("pocket-draft", 1)[0])
    want, got = (model(inputs)[targets >= 0].float().log_softmax(-1) for model in (small("pocket-draft"), result))
    assert (want.argmax(-1) == got.argmax(-1)).float().mean() > 0.95 and not got[:, 2048:].exp().any()


@pytest.mark.parametrize("name", NAMES)
def test_as_transformers_sees_it(name, place):
    """Its reading of the folder, in float32, against our reading of the small one."""
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder_of(name, place), dtype=torch.float32).eval()
    assert type(oracle).__name__ == "LlamaForCausalLM" and oracle.config.inflated_from == name
    rows, _ = held_out(name, 4)
    inputs, targets = pad(rows)
    v, there = small(name).cfg["vocab_size"], targets >= 0
    with torch.no_grad():
        got = oracle(inputs).logits.log_softmax(-1)
        ours = load_model(folder_of(name, place), dtype=torch.float32)(inputs).log_softmax(-1)
        want = small(name)(inputs).log_softmax(-1)
    assert (got - ours)[there][:, :v].abs().max() < 2e-3  # the same weights
    assert not got[..., v:].exp().any()
    assert (got[..., :v].argmax(-1) == want.argmax(-1))[there].float().mean() > 0.95  # their norms are rounded to bfloat16


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    """What stops it in the middle leaves nothing, or what was there; what a kill left behind is in nobody's way."""
    dst, write = tmp_path / "dst", inflation.TensorWriter.write
    (tmp_path / ".dst.part").mkdir()
    (tmp_path / ".dst.part" / "model.safetensors").write_bytes(b"half")

    def stop(writer, name, piece, first=0):
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        write(writer, name, piece, first)

    with monkeypatch.context() as patch:
        patch.setattr(inflation.TensorWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            pocket.inflate("pocket-draft", SHAPES["pocket-draft"], dst)
        assert not any(tmp_path.iterdir())
    shape = SHAPES["pocket-draft"] | {"n_layers": 2, "hidden_dim": 512}
    assert pocket.inflate("pocket-draft", shape, dst) == dst
    before = {path.name: path.read_bytes() for path in dst.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(inflation.TensorWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            pocket.inflate("pocket-draft", shape | {"n_layers": 3}, dst, force=True)
    with pytest.raises(InputError, match="holds a checkpoint already: .*--force"):
        pocket.inflate("pocket-draft", shape | {"n_layers": 3}, dst)
    assert {path.name: path.read_bytes() for path in dst.iterdir()} == before
    assert load_config(pocket.inflate("pocket-draft", shape | {"n_layers": 3}, dst, force=True))["n_layers"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_model_in_memory(tmp_path):
    """It has no tokenizer to go along, and no name."""
    folder = pocket.inflate(small("pocket-draft"), SHAPES["pocket-draft"] | {"n_layers": 2}, tmp_path / "dst")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["inflated_from"] == "a model in memory"


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("pocket-llama3.2", {"head_dim": 128}, "its head_dim is 64, the shape's 128: give a shape with the same"),
        ("pocket-llama3.2", {"vocab_size": 2000}, "vocab_size is 2000: give 2048 or more"),
        ("pocket-llama3.2", {"emb_dim": 255}, "emb_dim is 255: give 256 or more"),
        ("pocket-llama3.2", {"n_layers": 2}, "n_layers is 2: give 3 or more"),
        ("pocket-llama3.2", {"hidden_dim": 511}, "hidden_dim is 511: give 512 or more"),
        ("pocket-llama3.2", {"n_kv_groups": 1}, "n_kv_groups is 1, with 20 query heads each: give 2 or more"),
        ("pocket-llama3.2", {"n_heads": 6, "n_kv_groups": 6}, "n_kv_groups is 6, with 1 query heads each: give 8 or more"),
        ("pocket-llama3.2", {"emb_dim": 256}, "emb_dim 256 has no dimension left .*: give 257 or more, or vocab_size 2048"),
        ("pocket-llama2", {"head_dim": 32, "n_kv_groups": 10}, "the shape ties them: give a shape with tie_embeddings False"),
    ],
)
def test_what_does_not_fit(name, change, words, tmp_path):
    with pytest.raises(InputError, match=f"{name} does not fit into the shape: .*{words}") as error:
        pocket.inflate(name, SHAPE | change, tmp_path / "dst")
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_what_is_no_shape_or_model(tmp_path):
    with pytest.raises(ConfigError, match="20 query heads can't share 3 groups"):
        pocket.inflate("pocket-draft", SHAPE | {"n_kv_groups": 3})
    with pytest.raises(ConfigError, match="lacks hidden_dim"):
        pocket.inflate("pocket-draft", {key: value for key, value in SHAPE.items() if key != "hidden_dim"})
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        pocket.inflate(tmp_path / "nowhere", SHAPE)
    with pytest.raises(InputError, match="model is a Linear: give a Llama"):
        pocket.inflate(torch.nn.Linear(2, 2), SHAPE)
    with pytest.raises(CheckpointError):
        pocket.inflate("pocket-gpt", SHAPE)


def test_importing_pocket_stays_light():
    code = "import sys, llamabook.pocket; print('torch' in sys.modules, callable(llamabook.pocket.inflate))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False True\n"


# ---------------------------------------------------------------- the command


@pytest.fixture
def cli(capsys, monkeypatch):
    """Call the command line, which has one more shape, "tiny"; gives (exit code, stdout, stderr)."""
    shapes = jobs.shapes() | {"tiny": SHAPES["pocket-draft"] | {"dtype": torch.bfloat16}}
    monkeypatch.setattr(jobs, "shapes", lambda: shapes)

    def call(*words):
        return main(list(map(str, words))), *capsys.readouterr()

    return call


def test_the_command(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("inflate", "--shape", "tiny", "--output", "dst", "--checkpoint-path", "pocket-llama3.2-instruct")
    size = sum(path.stat().st_size for path in Path("dst").iterdir()) / 1e6
    written, meaning, following = out.splitlines()
    assert (code, err) == (0, "")
    assert written == f"Written to dst: README.md, config.json, model.safetensors, tokenizer.model ({size:,.1f} MB)"
    assert "of tiny" in meaning and "pocket-llama3.2-instruct" in meaning and following.endswith("--checkpoint_path dst")
    flags = ["--temperature", 0, "--max_new_tokens", 30, "--dtype", "float32", "--chat", "--prompt", "What do llamas eat?"]
    want, got = (cli("generate", *flags, "--checkpoint_path", path) for path in (pocket.path("pocket-llama3.2-instruct"), "dst"))
    assert got[:2] == want[:2] and got[0] == 0
    assert cli("inflate", "--shape=tiny", "--output=dst")[0] == 2
    code, out, _ = cli("inflate", "--shape=tiny", "--output=dst", "--force", "--dtype", "float32")  # the default model
    assert code == 0 and "texts of pocket-llama3.2:" in out
    assert load_config("dst")["dtype"] is torch.float32
    for mode, folder in (("int8", "dst-int8"), ("int4", "dst-int4.g32")):
        assert cli("quantize", "--checkpoint_path", "dst", "--mode", mode)[0] == 0
        code, out, _ = cli("generate", "--checkpoint_path", folder, "--max_new_tokens", 12, "--temperature", 0)
        assert code == 0 and out.startswith("One sunny morning, ")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--shape", "huge"], "there is no shape 'huge': this version has draft-80m, llama2-13b, "),
        (["--shape", "llama3.2-3b"], "pocket-llama3.2 does not fit into the shape: its head_dim is 64, the shape's 128"),
        (["--shape", "tiny", "--dtype", "int8"], "--dtype is 'int8': give "),
        (["--shape", "tiny", "--checkpoint_path", "nowhere"], "nowhere does not exist"),
        (["--shape", "tiny", "--checkpoint_path", "pocket-gpt"], "pocket-gpt"),
        ([], "missing option '--shape'"),
        (["--shape", "--force"], "needs a value"),
    ],
)
def test_one_line_for_a_mistake(cli, tmp_path, words, said):
    code, out, err = cli("inflate", *words, "--output", tmp_path / "dst")
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_too_little_room(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1, 10**9))
    code, out, err = cli("inflate", "--shape", "llama3.2-1b", "--output", tmp_path / "dst")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "needs 2.47 GB, and its disk has 1.00 GB free: free some, or write to another disk" in err
    assert not any(tmp_path.iterdir())


def test_the_help_lists_its_flags(cli):
    code, out, _ = cli("inflate", "--help")
    assert code == 0
    for flag in ("--shape", "--output", "--checkpoint_path", "--dtype", "--force", "llama3.2-1b", "draft-80m"):
        assert flag in out


def test_the_shape_of_a_draft():
    shape = jobs.shapes()["draft-80m"]
    sizes = [shape[key] for key in ("n_layers", "emb_dim", "n_heads", "n_kv_groups", "hidden_dim", "vocab_size", "context_length")]
    assert sizes == [4, 768, 12, 12, 3072, 32_000, 2048] and head_dim_of(shape) == 64


# ---------------------------------------------------------------- the real size


@pytest.mark.long
def test_at_real_size(tmp_path):
    """The shape of Llama 3.2 1B: memory, zeros and loss."""
    code = (
        "import resource, sys; from llamabook import pocket; from llamabook.llama3 import LLAMA32_CONFIG_1B\n"
        "pocket.inflate('pocket-llama3.2', LLAMA32_CONFIG_1B, sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    folder = tmp_path / "1b"
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 1e6  # KiB
    model = load_model(folder)
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400
    assert sum((p == 0).sum().item() for p in model.parameters()) < 0.04 * 1_235_814_400
    rows, tokens = held_out("pocket-llama3.2", 4)
    want, got = (losses(m, rows, 2).sum() / tokens for m in (small("pocket-llama3.2"), model))
    assert abs(got / want - 1) < 5e-3
